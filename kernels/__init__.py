"""Numba kernels of depthwise, pointwise and separable convolution. NumPy and Numba only, no framework.

`geometry` holds the shape arithmetic, `reference` the formulas in float64 NumPy, `cpu` the fast kernels.
"""
