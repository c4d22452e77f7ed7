"""A plugin for pytest: TensorFlow's CPU passes for its card. To be named by `-p`, before the bridge is imported.

The ops' kernels for a card are registered for the CPU, and those for the CPU for a GPU, which is not there. So
TensorFlow itself calls the former, with its own tensors; their memory is the computer's, as it is in the simulator.
"""

from __future__ import annotations

from fastsepconv import dispatch
from fastsepconv.bridge import tensorflow_registration as registration

registration.HOST, registration.CARD = registration.CARD, registration.HOST
dispatch._obstacle = lambda backend: None
