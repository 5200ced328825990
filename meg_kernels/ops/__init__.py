"""Floor 1: the ops. Each file holds one op's mathematics, reference and dispatch."""

from meg_kernels.ops.backend import BACKENDS, backend, usable_backends
from meg_kernels.ops.dynamic_neuron import dynamic_neuron, dynamic_neuron_
from meg_kernels.ops.entropy_gate import GateDecision, entropy_gate
from meg_kernels.ops.linear_epilogue import linear_gated_residual, linear_gelu
from meg_kernels.ops.modulated_norm import gated_residual_layer_norm, modulated_layer_norm
from meg_kernels.ops.short_attention import short_attention
from meg_kernels.ops.solver_step import solver_step

__all__ = [
    "BACKENDS",
    "GateDecision",
    "backend",
    "dynamic_neuron",
    "dynamic_neuron_",
    "entropy_gate",
    "gated_residual_layer_norm",
    "linear_gated_residual",
    "linear_gelu",
    "modulated_layer_norm",
    "short_attention",
    "solver_step",
    "usable_backends",
]
