"""Products with frozen weights, which a CPU may have rearranged ("packed") once for oneDNN.

Packing saves oneDNN a rearrangement at every call. Whether that makes a product faster depends on
the processor, the weight's shape and dtype, and the number of rows: on one machine it gains half
again for one row, on another it loses as much. So a product is measured when it is first called
with few (1), some (8) or many (64) rows, packed against plain, and runs packed where that gains at
least 10% (`meg_kernels.machine` measures, and keeps the results). One number of rows always takes
one path. A weight is packed when a call first wants it so, and the plain one stays beside it.

MEG_KERNELS_PACKING decides instead of a measurement: `always` (wherever oneDNN takes the product),
`never`, or `auto`, the default.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meg_kernels.machine import WORTHWHILE, Choice, Contest, gain, gains, policy
from meg_kernels.nn.changed import replaced
from meg_kernels.nn.linear import MeGLinear
from meg_kernels.precision import quick_backward

log = logging.getLogger(__name__)

VARIABLE = "MEG_KERNELS_PACKING"
# Up to `most` rows, the choice is that measured with `rows`; the bounds are geometric means.
_ROWS = ((2, 1), (22, 8))
_MANY_ROWS = 64
_MOST_BYTES = 16 * 2**20  # of a measured weight; larger ones are measured by a part of their rows
# A model's weights come from memory at every step. Weights that fit a cache would be measured
# there, so each turn multiplies another one, and together they are larger than most caches.
_CACHE_BYTES, _MOST_WEIGHTS = 32 * 2**20, 32
_NAME = "packed over plain product"


def projections(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The plain projections among and in `modules`, whether or not they carry neurons."""
    kinds = (nn.Linear, Conv1D, MeGLinear)
    parts = (part for module in modules for part in module.modules() if type(part) in kinds)
    # A quantised weight is a tensor of a class of its own; one that is offloaded is on `meta`.
    return (
        part
        for part in parts
        if type(part.weight) in (Tensor, nn.Parameter) and not part.weight.is_meta
    )


class FrozenProducts:
    """Products of frozen projections in a dtype, which can be put in place several times.

        products = FrozenProducts([model], torch.bfloat16)
        with products():
            ...

    On a CPU, weights are packed where that is faster; that costs up to as much memory as a copy of
    them in `dtype`, and up to another one if there is a backward pass. Weights of another dtype are
    converted once, into a further copy. Both pay from some tens of calls on, and the weights must
    stay as they are meanwhile. Elsewhere this is autocast. Outputs have their inputs' dtype;
    gradients flow to the inputs only. Under `torch.no_grad()` every projection is frozen.

    Args:
        modules: which are searched for projections.
        dtype: of the products.
        everywhere: on a CPU in all threads; otherwise in this thread or task alone.

    Raises:
        ValueError: MEG_KERNELS_PACKING is not `auto`, `always` or `never`.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype, everywhere: bool = False):
        learns = torch.is_grad_enabled()
        frozen: list[Any] = [
            part for part in projections(modules) if not (learns and part.weight.requires_grad)
        ]
        self._dtype, self._everywhere = dtype, everywhere
        self._own = frozen[0].weight if frozen else None
        on_cpu = self._own is not None and self._own.device.type == "cpu"
        self._products = {
            # A MeGLinear's product is replaced, and not what it adds for its neurons.
            (part, "project" if isinstance(part, MeGLinear) else "forward"): _Frozen(part, dtype)
            for part in (frozen if on_cpu else [])
        }

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, these products take the place of the projections' own, forward and backward."""
        own = self._own
        if own is None:
            yield
        elif own.device.type != "cpu":
            with torch.autocast(own.device.type, self._dtype, enabled=self._dtype != own.dtype):
                yield
        else:
            with (
                replaced(self._products, self._everywhere),
                quick_backward(own.device, own.dtype),
            ):
                yield


def frozen_products(
    modules: Iterable[nn.Module], dtype: torch.dtype, everywhere: bool = False
) -> AbstractContextManager[None]:
    """Inside, frozen projections among and in `modules` multiply in `dtype`.

    Arguments and errors are those of `FrozenProducts`, which is made at once: gradients that are
    turned off must be so when this is called.
    """
    return FrozenProducts(modules, dtype, everywhere)()


def packing_choices() -> list[Choice]:
    """What was chosen on this machine with this number of threads: one choice for each shape."""
    if (wanted := policy(VARIABLE)) != "auto":
        chosen = "packed" if wanted == "always" else "plain"
        return [Choice("products of frozen weights", chosen, f"{VARIABLE}={wanted}")]
    measured: dict[str, dict[int, float]] = {}
    for name, times in gains().items():
        kind, _, rest = name.partition(": ")
        if kind == _NAME:
            shape, _, rows = rest.rpartition(", rows ")
            measured.setdefault(shape, {})[int(rows)] = times
    choices = []
    for shape, by_rows in sorted(measured.items()):
        ordered = sorted(by_rows.items())
        packed = [str(rows) for rows, times in ordered if times >= WORTHWHILE]
        chosen = f"packed for {', '.join(packed)} rows" if packed else "plain"
        why = ", ".join(f"{times:.2f} for {rows}" for rows, times in ordered)
        choices.append(Choice(f"products {shape}", chosen, f"gain by packing: {why}"))
    return choices


class PackedWeight:
    """A weight [out, in] whose products run packed or plain, whichever is faster for their rows.

    Args:
        weight: on any device, of any dtype; it must stay as it is. Only float32 and bfloat16 on a
            CPU are packed.

    Raises:
        ValueError: MEG_KERNELS_PACKING is not `auto`, `always` or `never`.
    """

    def __init__(self, weight: Tensor):
        self._weight = weight
        self._policy = policy(VARIABLE) if _takes(weight) else "never"
        self._packed: _OneDnnWeight | None = None
        self._chosen: dict[int, bool] = {}

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight | None:
        """None where products with the weight [out, in] never run packed."""
        made = cls(weight)
        return None if made._policy == "never" else made

    def __call__(self, x: Tensor, bias: Tensor | None, gelu_tanh: bool = False) -> Tensor:
        """The product x @ weight.T + bias, or its tanh-GELU.

        Args:
            x: [..., in], of the weight's dtype.
            bias: [out], of the weight's dtype, or None.
            gelu_tanh: apply the GELU in its tanh form.

        Returns:
            [..., out], of the weight's dtype.
        """
        try:
            if self._runs_packed(x.shape[:-1].numel()):
                if (packed := self._packed) is None:  # another thread may take it back
                    packed = self._packed = _OneDnnWeight(self._weight)
                return packed(x, bias, gelu_tanh)
        except _OneDnnRefuses as error:
            y = self._plain(x, bias, gelu_tanh)  # where the arguments do not fit, this says it
            log.debug("products with a weight %s run plain: %s", tuple(self._weight.shape), error)
            self._packed, self._policy = None, "never"
            return y
        return self._plain(x, bias, gelu_tanh)

    def _plain(self, x: Tensor, bias: Tensor | None, gelu_tanh: bool) -> Tensor:
        y = F.linear(x, self._weight, bias)
        return F.gelu(y, approximate="tanh") if gelu_tanh else y

    def _runs_packed(self, rows: int) -> bool:
        if self._policy != "auto" or rows == 0:
            return self._policy == "always"
        bucket = next((measured for most, measured in _ROWS if rows <= most), _MANY_ROWS)
        if bucket not in self._chosen:
            contest = functools.partial(_contest, self._weight, bucket)
            self._chosen[bucket] = gain(_name(self._weight, bucket), contest) >= WORTHWHILE
        return self._chosen[bucket]


class _OneDnnRefuses(RuntimeError):
    """PyTorch lacks the private op, or it does not take this product."""


class _OneDnnWeight:
    """A weight [out, in] rearranged once: all that is used of PyTorch's private oneDNN ops."""

    def __init__(self, weight: Tensor):
        try:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        except (AttributeError, RuntimeError) as error:
            raise _OneDnnRefuses(str(error)) from error

    def __call__(self, x: Tensor, bias: Tensor | None, gelu_tanh: bool = False) -> Tensor:
        """The product x [..., in] @ weight.T + bias, or its tanh-GELU, in the weight's dtype."""
        epilogue: tuple = ("gelu", [], "tanh") if gelu_tanh else ("none", [], "")
        try:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, *epilogue)
        except (AttributeError, RuntimeError) as error:
            raise _OneDnnRefuses(str(error)) from error


def _takes(weight: Tensor) -> bool:
    known = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return known and torch.backends.mkldnn.is_available()


def _name(weight: Tensor, rows: int) -> str:
    wide, dtype = tuple(weight.shape), str(weight.dtype).removeprefix("torch.")
    turned = "" if weight.is_contiguous() else " transposed"
    return f"{_NAME}: {dtype} {wide[1]} to {wide[0]}{turned}, rows {rows}"


def _contest(weight: Tensor, rows: int) -> Contest:
    """The plain and the packed product of `rows` rows with weights like `weight`."""
    dtype, (wide, read) = weight.dtype, weight.shape
    wide = max(1, min(wide, _MOST_BYTES // (read * dtype.itemsize)))
    number = min(_MOST_WEIGHTS, -(-_CACHE_BYTES // (wide * read * dtype.itemsize)))
    # Any numbers do, but each weight has to have memory of its own: zeros may share a page.
    shape = (wide, read) if weight.is_contiguous() else (read, wide)
    x = torch.full((rows, read), 0.5, dtype=dtype, device="cpu")
    bias = torch.full((wide,), 0.5, dtype=dtype, device="cpu")
    plain: list[Tensor] = []
    packed: list[_OneDnnWeight] = []
    for _ in range(number):
        made = torch.full(shape, 0.01, dtype=dtype, device="cpu")
        plain.append(made if weight.is_contiguous() else made.t())
        packed.append(_OneDnnWeight(plain[-1]))
        if len(packed) == 1:
            packed[0](x, bias)  # where this is refused, no other weight is made in vain
    return Contest(
        plain=lambda turn: F.linear(x, plain[turn % number], bias),
        other=lambda turn: packed[turn % number](x, bias),
    )


class _Frozen:
    """A frozen projection's product, forward and backward."""

    def __init__(self, projection: nn.Linear | Conv1D, dtype: torch.dtype):
        self.projection, self.dtype = projection, dtype
        weight = projection.weight.detach().to(dtype)
        # A Linear's weight is [out, in]; a Conv1D's is [in, out].
        self._weight = weight.t() if isinstance(projection, Conv1D) else weight
        self.weight = PackedWeight(self._weight)
        self.bias = None if projection.bias is None else projection.bias.detach().to(dtype)

    @functools.cached_property
    def transposed(self) -> PackedWeight:
        return PackedWeight(self._weight.t())

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            if self.projection.weight.requires_grad:  # another thread trains what we do not
                kind: Any = Conv1D if isinstance(self.projection, Conv1D) else nn.Linear
                return kind.forward(self.projection, x)
            if x.requires_grad:
                return _FrozenProduct.apply(x, self)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        return self.weight(x.to(self.dtype), self.bias).to(x.dtype)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: _Frozen) -> Tensor:
        ctx.frozen = frozen
        return frozen.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        frozen: _Frozen = ctx.frozen
        return frozen.transposed(gradient.to(frozen.dtype), None).to(gradient.dtype), None
