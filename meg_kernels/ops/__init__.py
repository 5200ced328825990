"""Floor 1: the ops. Each file holds one op's mathematics, reference and dispatch."""

from meg_kernels.ops.dynamic_neuron import dynamic_neuron, dynamic_neuron_

__all__ = ["dynamic_neuron", "dynamic_neuron_"]
