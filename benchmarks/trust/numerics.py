"""How close the ops come to the bounds of their rounding: the worst error over its bound.

    python -m benchmarks.trust.numerics [--trials 20] [--no-record]

Every op runs on every backend that runs here, csrc/ as compiled by g++ and Triton's kernels in its
interpreter, on random numbers of ordinary and extreme size: subnormal, near overflow, of mixed
magnitudes, zeros, NaN and infinities. Its results are compared with the definition in float64.
The bounds are derived beside each op below; `u` is the epsilon of the accumulation's dtype.
A ratio above 1 is a broken promise, and so is infinity: a NaN, or a finite number that is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from meg_kernels.neuron import ACTIVATIONS, Neurons
from meg_kernels.ops import dynamic_neuron, native
from meg_kernels.ops.backend import backend
from meg_kernels.ops.linear_gelu import linear_gelu
from meg_kernels.ops.modulated_norm import gated_residual_layer_norm, modulated_layer_norm
from meg_kernels.ops.short_attention import short_attention
from meg_kernels.ops.softmax_entropy import softmax_entropy
from meg_kernels.ops.solver_step import solver_step

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("ordinary", "mixed", "subnormal", "large", "huge", "zeros", "special")
STEEPEST = 1.13  # the slope of any activation


@dataclass(frozen=True)
class Compared:
    """A result, the definition's in float64, and how far apart they may be.

    Args:
        name: of the result.
        actual: as the op returned it.
        exact: in float64.
        allowed: float64; infinite or NaN where nothing is promised.
    """

    name: str
    actual: Tensor
    exact: Tensor
    allowed: Tensor

    def worst(self) -> float:
        """The largest error over its bound; infinity for a wrong NaN, infinity or finite number."""
        actual, exact = self.actual.double(), self.exact
        top = torch.finfo(self.actual.dtype).max
        promised = exact.isfinite() & self.allowed.isfinite()
        # What must be representable: above, infinity is right; in between, both are.
        within = promised & (exact.abs() + self.allowed <= top)
        beyond = promised & (exact.abs() - self.allowed > top * 1.01)
        ratio = ((actual - exact).abs() / self.allowed)[within]
        wrong = ratio.isnan().any() | actual[beyond].isfinite().any()
        wrong |= ~actual[exact.isnan()].isnan().all()
        wrong |= (actual != exact)[exact.isinf()].any()
        return math.inf if wrong else float(ratio.max()) if len(ratio) else 0.0


def numbers(
    generator: torch.Generator, kind: str, dtype: torch.dtype, *shape: int, scale: float = 1.0
) -> Tensor:
    """Random numbers of one kind.

    Args:
        generator: of the randomness.
        kind: one of `KINDS`; "large" have squares about as large as the dtype holds, "huge" are
            about as large as it holds themselves.
        dtype: of the result.
        shape: of the result.
        scale: of ordinary ones.
    """
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    info = torch.finfo(dtype)
    values = normal * scale
    if kind == "mixed":
        values = values * 10 ** (uniform * 12 - 6 if dtype != torch.float16 else uniform * 6 - 4)
    elif kind == "subnormal":
        values = normal * info.smallest_normal
    elif kind == "large":
        values = normal * math.sqrt(info.max)
    elif kind == "huge":
        values = (normal * info.max / 4).clamp(-info.max, info.max)
    elif kind == "zeros":
        values = values * (uniform < 0.1)
    elif kind == "special":
        odd = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
        chosen = odd[torch.randint(3, shape, generator=generator)]
        values = torch.where(uniform < 0.5 / shape[-1], chosen, values)
    return values.to(dtype)


def rounded(error: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """An error in the accumulation's dtype, and then a rounding to `dtype`."""
    info = torch.finfo(dtype)
    # float32's range of exponents may be cut off at its normal numbers; float16's is not.
    least = info.smallest_normal * (info.eps if dtype == torch.float16 else 1)
    return error + info.eps * (exact.abs() + error) + least


def promised(allowed: Tensor, *parts: Tensor) -> Tensor:
    """`allowed` where all that is computed in between is within float32's range; else infinity."""
    top = torch.finfo(torch.float32).max
    for part in parts:
        allowed = torch.where(part.abs() <= top, allowed, math.inf)
    return allowed


U = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).smallest_normal

# ---- one op after the other --------------------------------------------------------------------

Results = Iterator[Compared]


def neuron(generator: torch.Generator, kind: str, dtype: torch.dtype, on: str) -> Results:
    """dynamic_neuron: forward and gradients.

    The pre-activation's sum of n terms errs by (n + 4) u S, S the sum of their magnitudes; the
    activation passes 1.13 of that on and adds 8 u |pre|; value multiplies it, and y is added. Where
    the activation is 0 to the left of -1024, it errs by nothing. In between, |h| and |h v| must be
    within float32's range; the sum need not be on the way.
    """
    names = sorted(ACTIVATIONS)
    activation = names[int(torch.randint(len(names), (), generator=generator))]
    samples, tokens, d_in, d_out, count = 5, 3, 37, 21, 4

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return numbers(generator, kind, dtype, *shape, scale=scale)

    y, x = draw(samples, tokens, d_out), draw(samples, tokens, d_in)
    key, value = draw(count, d_in, scale=d_in**-0.5), draw(count, d_out)
    if kind in ("large", "huge"):  # beside values with which the result is representable
        value = numbers(generator, "ordinary", dtype, count, d_out)
    bias, index = draw(count), torch.tensor([2, 0, -1, 2, 3])
    neurons = Neurons(key, bias, value, activation)
    grad = numbers(generator, "ordinary", dtype, samples, tokens, d_out)
    out = torch.empty_like(y)
    parts = (x, key, bias, value, index, activation)
    if on == "csrc":
        native.dynamic_neuron_forward(out, y, x, neurons, index)
        found = native.dynamic_neuron_backward(grad, x, neurons, index, (True,) * 4)
    else:
        with backend(on):
            out = dynamic_neuron.dynamic_neuron(y, x, neurons, index)
            found = torch.ops.meg_kernels.dynamic_neuron_backward(grad, *parts, [True] * 4)

    rows = index >= 0
    used = index[rows]
    y, x, key, bias, value, grad = (t.double() for t in (y, x, key, bias, value, grad))
    y, x, grad = y[rows], x[rows], grad[rows]
    k, v, b = key[used][:, None], value[used][:, None], bias[used][:, None]
    size = (x * k).abs().sum(-1) + b.abs()  # S
    pre = ((x * k).sum(-1) + b).requires_grad_()
    hidden = ACTIVATIONS[activation](pre)
    (slope,) = torch.autograd.grad(hidden.sum(), pre)
    pre, hidden = pre.detach(), hidden.detach()
    of_pre = (d_in + 5) * U * size + d_in * TINY
    of_hidden = STEEPEST * of_pre + 8 * U * pre.abs() + 256 * TINY
    if activation != "identity":
        of_hidden = torch.where(pre + of_pre < -1024, 0.0, of_hidden)
    h, e = hidden.unsqueeze(-1), of_hidden.unsqueeze(-1)
    exact = y + h * v
    error = v.abs() * e + 4 * U * ((h * v).abs() + y.abs()) + TINY
    allowed = promised(rounded(error, exact, dtype), h.expand_as(exact), h * v)
    yield Compared("out", out[rows], exact, allowed)
    if kind == "special":
        return

    upstream = (grad * v).sum(-1)
    of_upstream = (d_out + 4) * U * (grad * v).abs().sum(-1) + d_out * TINY
    of_slope = (STEEPEST * of_pre + 64 * U).clamp(max=1.3)
    if activation == "relu":
        of_slope = (pre.abs() <= of_pre).double()
    elif activation == "identity":
        of_slope = torch.zeros_like(pre)
    else:
        of_slope = torch.where(pre.abs() - of_pre > 40, 64 * U, of_slope)
    dpre = slope * upstream
    of_dpre = upstream.abs() * of_slope + (slope.abs() + of_slope) * of_upstream
    of_dpre = promised(of_dpre + 4 * U * dpre.abs() + TINY, upstream)

    def summed(weight: Tensor, error: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """Of each neuron the sum of weight * of over its tokens, and its error."""
        exact, size, wrong = (torch.zeros(count, of.shape[-1], dtype=torch.float64) for _ in "abc")
        for total, part in (
            (exact, weight.unsqueeze(-1) * of),
            (size, (weight.unsqueeze(-1) * of).abs()),
            (wrong, error.unsqueeze(-1) * of.abs()),
        ):
            total.index_add_(0, used, part.sum(1))
        terms = samples * tokens
        error = wrong + (terms + 4) * U * size + terms * TINY
        return exact, promised(rounded(error, exact, dtype), size)

    one = torch.ones(*pre.shape, 1, dtype=torch.float64)
    dx = dpre.unsqueeze(-1) * k
    error = of_dpre.unsqueeze(-1) * k.abs() + 4 * U * dx.abs() + TINY
    yield Compared("dx", found[0][rows], dx, rounded(error, dx, dtype))
    yield Compared("dkey", found[1], *summed(dpre, of_dpre, x))
    yield Compared("dbias", found[2][:, None], *summed(dpre, of_dpre, one))
    of_hidden = promised(of_hidden, hidden)
    yield Compared("dvalue", found[3], *summed(hidden, of_hidden, grad))


def norm(generator: torch.Generator, kind: str, dtype: torch.dtype, on: str) -> Results:
    """modulated_layer_norm and gated_residual_layer_norm.

    With K = (D + 8) u, A the largest |r| and s the root of variance + eps: the mean errs by K A,
    each centred element by 2 K A, the variance relatively by t = K + 4 K A/s + (2 K A/s)^2, and so
    the normalised z by 2 K A/s (1 + t) + |z| (t + 8 u). Nothing is promised from t = 1/2: the
    spread of such a row is drowned by the rounding of its mean.
    """
    batch, tokens, width = 2, 3, 48

    def draw(*shape: int) -> Tensor:
        return numbers(generator, kind, dtype, *shape)

    def ordinary(*shape: int) -> Tensor:
        return numbers(generator, "ordinary", dtype, *shape)

    x, update = draw(batch, tokens, width), draw(batch, tokens, width)
    shift, scale, gate = (ordinary(batch, width) for _ in range(3))
    gate = gate / 8
    eps = 1e-6
    with backend(on):
        alone = modulated_layer_norm(x, shift, scale, eps)
        stream, added = gated_residual_layer_norm(x, update, gate, shift, scale, eps)
    term = gate.double()[:, None] * update.double()
    exact = x.double() + term
    error = 4 * U * (x.double().abs() + term.abs()) + TINY
    yield Compared("stream", stream, exact, promised(rounded(error, exact, dtype), term))
    shift, scale = shift.double()[:, None], scale.double()[:, None]
    for name, r, out in (("out", x.double(), alone), ("gated out", stream.double(), added)):
        centred = r - r.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        z, near = centred / spread, r.abs().amax(-1, keepdim=True) / spread
        k = (width + 8) * U
        t = k + 4 * k * near + (2 * k * near) ** 2
        exact = z * (1 + scale) + shift
        error = (1 + scale.abs()) * (2 * k * near * (1 + t) + z.abs() * (t + 8 * U))
        error = error + 4 * U * (z * (1 + scale)).abs() + 4 * U * shift.abs() + TINY
        error = torch.where(t <= 0.5, error, math.inf)
        yield Compared(name, out, exact, promised(rounded(error, exact, dtype), exact))


def gelu(generator: torch.Generator, kind: str, dtype: torch.dtype, on: str) -> Results:
    """linear_gelu: as a neuron's pre-activation, which the reference rounds to the dtype.

    x w + b must be within the range of the dtype, and its sum on the way within float32's.
    """
    rows, depth, columns = 5, 40, 19
    x = numbers(generator, kind, dtype, rows, depth)
    weight = numbers(generator, "ordinary", dtype, columns, depth, scale=depth**-0.5)
    bias = numbers(generator, "ordinary", dtype, columns)
    with backend(on):
        out = linear_gelu(x, weight, bias)
    x, weight, bias = x.double(), weight.double(), bias.double()
    pre = x @ weight.T + bias
    size = x.abs() @ weight.abs().T + bias.abs()
    of_pre = (depth + 5) * U * size + depth * TINY
    of_pre = rounded(of_pre, pre, dtype)
    exact = ACTIVATIONS["gelu_tanh"](pre)
    error = STEEPEST * of_pre + 8 * U * pre.abs() + 256 * TINY
    allowed = promised(rounded(error, exact, dtype), size)
    allowed = torch.where(size <= torch.finfo(dtype).max, allowed, math.inf)
    if kind == "special":  # the library's product decides what becomes of minus infinity
        exact = torch.where(pre.isfinite(), exact, 0)
        allowed = torch.where(pre.isfinite(), allowed, math.inf)
    yield Compared("out", out, exact, allowed)


def attention(generator: torch.Generator, kind: str, dtype: torch.dtype, on: str) -> Results:
    """short_attention.

    A score errs by e = (D + 8) u sum |q k| / sqrt(D), a probability relatively by exp(2 e) - 1
    + (T + 8) u + two roundings to the dtype, which it may go through. Nothing is promised from
    e = 1/4, and T max |v| must be within float32's range.
    """
    batch, tokens, heads, dim = 2, 5, 2, 16
    qkv = numbers(generator, kind, dtype, batch, tokens, 3 * heads * dim)
    if kind in ("large", "huge"):  # of the values alone: such scores are the largest's alone
        qkv[..., : 2 * heads * dim] = numbers(
            generator, "ordinary", dtype, batch, tokens, 2 * heads * dim
        )
    with backend(on):
        out = short_attention(qkv, heads)
    q, k, v = qkv.double().unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    score, size = q @ k.mT / dim**0.5, q.abs() @ k.abs().mT / dim**0.5
    p = score.softmax(-1)
    e = (dim + 8) * U * size.amax(-1, keepdim=True)
    info = torch.finfo(dtype)
    share = torch.expm1(2 * e) + (tokens + 8) * U + 2 * info.eps
    largest = v.abs().amax(-2, keepdim=True)
    error = p @ v.abs() * share + tokens * largest * (TINY + info.smallest_normal * info.eps)
    exact = p @ v
    allowed = promised(rounded(error, exact, dtype), tokens * largest * torch.ones_like(exact))
    allowed = torch.where(e < 0.25, allowed, math.inf)
    exact, allowed = (part.transpose(1, 2).flatten(2) for part in (exact, allowed))
    if kind == "special":  # a NaN or an infinity is the whole row's, as softmax has it
        return
    yield Compared("out", out, exact, allowed)


def entropy(generator: torch.Generator, kind: str, dtype: torch.dtype, on: str) -> Results:
    """softmax_entropy: (C + 16) u (1 + sum p |l| + sum p l^2), l the logits below the largest."""
    logits = numbers(generator, kind, dtype, 7, 10, scale=3.0)
    if on == "csrc":
        out = native.softmax_entropy(logits)
    else:
        with backend(on):
            out = softmax_entropy(logits)
    exact_logits = logits.double()
    below = exact_logits - exact_logits.amax(-1, keepdim=True)
    p = exact_logits.softmax(-1)
    below = torch.where(p > 0, below, 0.0)
    exact = below.exp().where(p > 0, torch.zeros_like(p)).sum(-1).log() - (p * below).sum(-1)
    exact = torch.where(p.isnan().any(-1), math.nan, exact)
    size = 1 + (p * below.abs()).sum(-1) + (p * below.square()).sum(-1)
    yield Compared("out", out, exact, (logits.shape[1] + 16) * U * size)


def step(generator: torch.Generator, kind: str, dtype: torch.dtype, on: str) -> Results:
    """solver_step: 8 u times the sum of the terms' magnitudes, each within float32's range."""
    kinds = ("ordinary", "large") if kind == "huge" else (kind, kind)

    def draw(*shape: int) -> Tensor:
        return numbers(generator, kinds[0], torch.float32, *shape)

    x_t, previous, noise = draw(3, 24), draw(3, 24), draw(24)
    prediction = numbers(generator, kinds[1], dtype, 3, 24)
    variance = numbers(generator, "ordinary", dtype, 3, 24)
    table = torch.randn(2, 8, generator=generator)
    table[:, 7] = 1
    with backend(on):
        x_next, x0 = solver_step(x_t, prediction, previous, table, 1, noise, variance)
    a, b, c, d, e, posterior, beta, _ = table[1].double()
    x_t, previous, noise, prediction, variance = (
        part.double() for part in (x_t, previous, noise, prediction, variance)
    )
    fraction = (variance + 1) / 2
    exponent = (fraction * beta + (1 - fraction) * posterior) / 2
    in_exponent = (fraction.abs() * beta.abs() + (1 + fraction.abs()) * posterior.abs()) / 2
    parts = [a * x_t, b * prediction]
    exact = parts[0] + parts[1]
    of_x0 = 8 * U * (parts[0].abs() + parts[1].abs()) + 2 * TINY
    yield Compared("x0", x0, exact, promised(of_x0, *parts))
    parts = [c * x_t, d * exact, e * previous, exponent.exp() * noise]
    size = sum(part.abs() for part in parts)
    error = 8 * U * size + d.abs() * of_x0 + 16 * U * in_exponent * parts[3].abs() + 8 * TINY
    yield Compared("x_next", x_next, sum(parts), promised(error, *parts, exact))  # type: ignore[arg-type]


OPS: dict[str, Callable[[torch.Generator, str, torch.dtype, str], Results]] = {
    "dynamic_neuron": neuron,
    "modulated_norm": norm,
    "linear_gelu": gelu,
    "short_attention": attention,
    "softmax_entropy": entropy,
    "solver_step": step,
}
IN_CSRC = ("dynamic_neuron", "softmax_entropy")
MULTIPLIES = ("linear_gelu", "short_attention")
"""What multiplies matrices; Triton's interpreter does not multiply bfloat16."""


def worst(op: str, dtype: torch.dtype, on: str, trials: int, seed: int = 0) -> dict[str, float]:
    """The worst error over its bound for each kind of input.

    Args:
        op: one of `OPS`.
        dtype: of its tensors.
        on: the backend: reference, cpu, triton, or csrc for the kernels compiled by g++.
        trials: calls of each kind.
        seed: of the inputs.
    """
    found = {}
    for kind in KINDS:
        generator = torch.Generator().manual_seed(seed)
        ratios = [
            compared.worst()
            for _ in range(trials)
            for compared in OPS[op](generator, kind, dtype, on)
        ]
        found[kind] = max(ratios, default=0.0)
    return found


@contextlib.contextmanager
def csrc_on_host() -> Iterator[bool]:
    """Inside, `native` calls csrc/ as compiled by g++; False where there is no g++."""
    import shutil

    if shutil.which("g++") is None:
        yield False
        return
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from csrc_on_host import HostExtension

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        extension = HostExtension.build(Path(folder))
        for name, value in {
            "_extension": lambda: extension,
            "unavailable_reason": lambda device=None: None,
            "_stream": lambda device: (0, 0),
        }.items():
            stack.enter_context(mock.patch.object(native, name, value))
        stack.enter_context(
            mock.patch.object(torch.cuda, "device", lambda _: contextlib.nullcontext())
        )
        yield True


def backends(op: str, dtype: torch.dtype, csrc: bool) -> Iterator[str]:
    """What runs `op` on this machine's CPU."""
    yield from ("reference", "cpu")
    if not (op in MULTIPLIES and dtype == torch.bfloat16):
        yield "triton"
    if csrc and op in IN_CSRC:
        yield "csrc"


def main() -> None:
    """Print the table, and record it."""
    from benchmarks.trust import record

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=20, help="calls of each kind of input")
    parser.add_argument("--no-record", action="store_true", help="only print")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with csrc_on_host() as csrc, torch.no_grad():
        for op in OPS:
            for dtype in DTYPES:
                for on in backends(op, dtype, csrc):
                    slow = on in ("triton", "csrc")
                    trials = max(arguments.trials // (8 if slow else 1), 1)
                    with torch.enable_grad():
                        kinds = worst(op, dtype, on, trials)
                    name = str(dtype).removeprefix("torch.")
                    found = max(kinds.values())
                    rows.append({"op": op, "dtype": name, "backend": on, "worst": found})
                    print(f"{op:16} {name:9} {on:10} {found:8.3f}", kinds if found > 1 else "")
    highest = {
        f"{op} {str(dtype).removeprefix('torch.')}": max(
            row["worst"]
            for row in rows
            if row["op"] == op and row["dtype"] == str(dtype).removeprefix("torch.")
        )
        for op in OPS
        for dtype in DTYPES
    }
    broken = [name for name, ratio in highest.items() if not ratio <= 1]
    print("worst error over bound:", {name: round(ratio, 3) for name, ratio in highest.items()})
    if not arguments.no_record:
        record("numerics", {"trials": arguments.trials, "worst": highest, "runs": rows})
    if broken:
        sys.exit(f"beyond their bounds: {', '.join(broken)}")


if __name__ == "__main__":
    main()
