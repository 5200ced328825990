"""Floor 2: modules that carry neurons."""

from meg_kernels.nn.attached import Attached, attach
from meg_kernels.nn.linear import MeGLinear
from meg_kernels.nn.lower_layers import LowerLayers
from meg_kernels.nn.partial import input_device, input_of, last_feed_forward_sees
from meg_kernels.nn.prefix import SharedPrefix

__all__ = [
    "Attached",
    "LowerLayers",
    "MeGLinear",
    "SharedPrefix",
    "attach",
    "input_device",
    "input_of",
    "last_feed_forward_sees",
]
