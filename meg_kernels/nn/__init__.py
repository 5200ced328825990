"""Floor 2: modules that carry neurons."""

from meg_kernels.nn.attach import Attached, attach
from meg_kernels.nn.linear import MeGConv1D, MeGLinear

__all__ = ["Attached", "MeGConv1D", "MeGLinear", "attach"]
