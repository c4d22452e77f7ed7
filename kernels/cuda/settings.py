"""What the environment asks of the CUDA kernels, read at each call.

FASTSEPCONV_CUDA_TIER   plain (the default), or fast: kernels for tensor cores and windows in registers, where they
                        serve a call. Tests assemble and emulate them; which have run on a card, the README tells.
FASTSEPCONV_TF32        1: the fast tier computes products of float32 as TF32, with 11 bits of each factor, rounded to
                        nearest or, by warpgroups (see `warpgroup_tile`), cut off; 0 (the default): as three TF32
                        products, with the accuracy of float32.
"""

from __future__ import annotations

import os

TIER, TF32 = "FASTSEPCONV_CUDA_TIER", "FASTSEPCONV_TF32"


def tier() -> str:
    """The fastest tier that calls may use.

    Raises:
        ValueError: FASTSEPCONV_CUDA_TIER names none.
    """
    return _choice(TIER, "plain", "fast")


def tf32() -> bool:
    """Whether products of float32 may be computed as TF32.

    Raises:
        ValueError: FASTSEPCONV_TF32 is neither 0 nor 1.
    """
    return _choice(TF32, "0", "1") == "1"


def _choice(variable: str, *choices: str) -> str:
    """The variable's value; the first of the choices where it is not set."""
    value = os.environ.get(variable) or choices[0]
    if value not in choices:
        raise ValueError(
            f"Invalid value for environment variable `{variable}`. "
            f"Expected one of {', '.join(choices)}. Received: {variable}={value}"
        )
    return value
