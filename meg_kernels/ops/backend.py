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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from meg_kernels import kernels
from meg_kernels.ops import native

log = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton", "cpu", "reference")
VARIABLE = "MEG_KERNELS_BACKEND"
_AUTOMATIC = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu",)}
_forced: ContextVar[str | None] = ContextVar("meg_kernels_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Every op inside runs on backend `name`, or raises RuntimeError and says why it cannot.

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


def unusable_reason(name: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why backend `name` cannot run on tensors of `device` and `dtypes`; None if it can."""
    if name == "reference":
        return None
    if name == "cpu":
        return None if device.type == "cpu" else f"the tensors are on {device}"
    if len(set(dtypes)) > 1:
        names = ", ".join(sorted({str(dtype) for dtype in dtypes}))
        return f"the tensors are of {names}; its kernels need one dtype"
    if name == "triton":
        return kernels.unavailable_reason(device)
    if device.type != "cuda":
        return f"the tensors are on {device}, and its kernels run on CUDA devices"
    for dtype in dtypes:
        if dtype not in native.DTYPES:
            supported = ", ".join(str(dtype) for dtype in native.DTYPES)
            return f"the tensors are of {dtype}; its kernels take {supported}"
    return native.unavailable_reason(device)


def choose(
    op: str, device: torch.device, *dtypes: torch.dtype, backends: Sequence[str] = BACKENDS
) -> str:
    """The backend that runs `op` on tensors of `device` and `dtypes`.

    Args:
        backends: those that `op` has an implementation for.

    Raises:
        RuntimeError: the forced backend cannot.
    """
    if (name := forced_backend()) is not None:
        if name not in backends:
            reason: str | None = f"this op has none but {', '.join(backends)}"
        else:
            reason = unusable_reason(name, device, *dtypes)
        if reason:
            raise RuntimeError(f"{op}: backend {name!r} is forced, but {reason}")
        return name
    candidates = [name for name in _AUTOMATIC.get(device.type, ("reference",)) if name in backends]
    chosen = next(name for name in candidates if unusable_reason(name, device, *dtypes) is None)
    _log_once(op, device.type, chosen)
    return chosen


@functools.cache
def _log_once(op: str, device: str, chosen: str) -> None:
    log.debug("%s runs on backend %s on %s", op, chosen, device)
