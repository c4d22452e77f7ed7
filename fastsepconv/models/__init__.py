"""Networks built on the fast layers."""

from __future__ import annotations

from .xception import entry_flow, exit_flow, middle_flow, pointwise_then_depthwise, xception

__all__ = ["entry_flow", "exit_flow", "middle_flow", "pointwise_then_depthwise", "xception"]
