"""The Triton kernels behind the ops, one file per op, with the op's name.

Only those files import triton. `launching.unavailable_reason` says whether they can be imported,
and `limits` what they take, on machines without it too.
"""
