"""A node's state: the words, each 8 bytes, that its kernel finds at every run. Made and freed with the node."""

from __future__ import annotations

# What the node was made with.
FUNCTION, STRIDES, DILATIONS, SAME, PADDING, WANTED, OPERATION = 0, 1, 3, 5, 6, 10, 11
KEEP, RELU, RELU_X, RESIDUALS = 12, 13, 14, 15  # what `tensorflow_freeze` sets
# The constant kernel that it keeps packed: see `tensorflow_kept`.
LOCK, TENSOR, ADDRESS, PANELS = 16, 17, 18, 19

WORDS = 20
