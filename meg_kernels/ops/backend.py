"""Which implementation of an op runs: chosen by device and dtype, or forced by the user.

    cuda        the C++ kernels of csrc/, where `meg_kernels._C` is built and the GPU fits it
    triton      the Triton kernels of meg_kernels/kernels/
    cpu         PyTorch, arranged for CPUs
    reference   the definition in plain PyTorch, anywhere

A GPU's tensors take the first of cuda, triton and reference that can run; a CPU's take cpu.
`MEG_KERNELS_BACKEND=triton`, or `with backend("triton"):`, forces one; where it cannot run, the op
raises and says why, instead of falling back.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from meg_kernels.kernels import launching
from meg_kernels.ops import native

log = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton", "cpu", "reference")
VARIABLE = "MEG_KERNELS_BACKEND"
_AUTOMATIC = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu",)}
_forced: ContextVar[str | None] = ContextVar("meg_kernels_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context every op runs on one backend, or raises RuntimeError and says why not.

    Args:
        name: one of `BACKENDS`.

    Raises:
        ValueError: there is no such backend.
    """
    token = _forced.set(_known(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that `backend()` or the environment forces; None if the choice is automatic."""
    if (name := _forced.get()) is not None:
        return name
    name = os.environ.get(VARIABLE, "")
    return _known(name, VARIABLE) if name else None


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where} is {name!r}; it must be one of {', '.join(BACKENDS)}")
    return name


def usable_backends(device: torch.device | str) -> dict[str, str | None]:
    """Each backend, and why it cannot run on `device`; None if it can."""
    return {name: unusable_reason(name, torch.device(device)) for name in BACKENDS}


Supported = Mapping[str, Sequence[torch.dtype] | None]
"""The backends that an op has, each with the dtypes that its kernels take, or None for any."""
_EVERY: Supported = dict.fromkeys(BACKENDS)


def unusable_reason(
    name: str,
    device: torch.device,
    *dtypes: torch.dtype,
    supported: Sequence[torch.dtype] | None = None,
) -> str | None:
    """Why a backend cannot run on tensors of `device` and `dtypes`; None if it can.

    Args:
        name: one of `BACKENDS`.
        device: of all the tensors.
        dtypes: of the tensors.
        supported: the dtypes that the backend's kernels take. Default: any.
    """
    if name == "reference":
        return None
    if name == "cpu":
        return None if device.type == "cpu" else f"the tensors are on {device}"
    if len(set(dtypes)) > 1:
        names = ", ".join(sorted({str(dtype) for dtype in dtypes}))
        return f"the tensors are of {names}; its kernels need one dtype"
    if supported is not None and not set(dtypes) <= set(supported):
        listed = ", ".join(str(dtype) for dtype in supported)
        return f"the tensors are of {dtypes[0]}; its kernels take {listed}"
    if name == "triton":
        return launching.unavailable_reason(device)
    if device.type != "cuda":
        return f"the tensors are on {device}, and its kernels run on CUDA devices"
    return native.unavailable_reason(device)


def choose(
    op: str,
    device: torch.device,
    *dtypes: torch.dtype,
    supported: Supported = _EVERY,
) -> str:
    """The backend that runs `op` on tensors of `device` and `dtypes`.

    Args:
        op: its name, for messages.
        device: of all the tensors.
        dtypes: of the tensors.
        supported: the backends that `op` has, each with the dtypes that it takes. Default: all
            backends, and any dtypes.

    Raises:
        RuntimeError: the backend that is forced cannot run.
    """

    def reason(name: str) -> str | None:
        return unusable_reason(name, device, *dtypes, supported=supported[name])

    if (name := forced_backend()) is not None:
        if name not in supported:
            problem: str | None = f"this op has only {', '.join(supported)}"
        else:
            problem = reason(name)
        if problem:
            raise RuntimeError(f"{op}: backend {name!r} is forced, but {problem}")
        return name
    candidates = [name for name in _AUTOMATIC.get(device.type, ("reference",)) if name in supported]
    chosen = next(name for name in candidates if reason(name) is None)
    _log_once(op, device.type, chosen)
    return chosen


def refuse_gradient(op: str, **tensors: Tensor | None) -> None:
    """RuntimeError if one of the tensors requires a gradient, which `op` cannot give."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op} has no backward; {name} requires a gradient: call it under "
                f"torch.no_grad(), or use the reference, {op}_reference"
            )


@functools.cache
def _log_once(op: str, device: str, chosen: str) -> None:
    log.debug("%s runs on backend %s on %s", op, chosen, device)
