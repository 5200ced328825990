"""Floor 1: the ops. Each file holds one op's mathematics, reference and dispatch."""

from meg_kernels.ops.backend import BACKENDS, backend, usable_backends
from meg_kernels.ops.dynamic_neuron import dynamic_neuron, dynamic_neuron_
from meg_kernels.ops.entropy_gate import GateDecision, entropy_gate

__all__ = [
    "BACKENDS",
    "GateDecision",
    "backend",
    "dynamic_neuron",
    "dynamic_neuron_",
    "entropy_gate",
    "usable_backends",
]
