"""Floor 2: modules that carry neurons."""

from meg_kernels.nn.attach import Attached, attach
from meg_kernels.nn.linear import MeGConv1D, MeGLinear
from meg_kernels.nn.lower_layers import LowerLayers

__all__ = ["Attached", "LowerLayers", "MeGConv1D", "MeGLinear", "attach"]
