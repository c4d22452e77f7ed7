"""A node's state: the words, each 8 bytes, that its kernel finds at every run. Made and freed with the node."""

from __future__ import annotations

# What the node was made with.
FUNCTION, STRIDES, DILATIONS, SAME, PADDING, WANTED, OPERATION, KEEP, RELU = 0, 1, 3, 5, 6, 10, 11, 12, 13
# The constant kernel that it keeps packed: see `tensorflow_kept`.
LOCK, TENSOR, ADDRESS, PANELS = 14, 15, 16, 17

WORDS = 18
