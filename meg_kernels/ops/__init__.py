"""Floor 1: the ops. Each file holds one op's mathematics, reference, registration and dispatch.

An op is imported from its own file, since most share their names with it:

    from meg_kernels.ops.dynamic_neuron import dynamic_neuron
"""
