"""Compiles every configuration of every Triton kernel for every chip, and reads the machine code.

    python tests/ahead_of_time.py

Needs triton, but no GPU, and a process of its own: where Triton's interpreter is switched on, as in
the other tests, there is nothing to compile. Prints one JSON object: `launches` that are none of
the configurations (there must not be any), and `compiled`, a `Compiled` for each.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from meg_kernels.kernels import (
    dynamic_neuron,
    linear_gelu,
    modulated_norm,
    short_attention,
    softmax_entropy,
    solver_step,
)
from meg_kernels.kernels.launching import Configuration
from meg_kernels.kernels.limits import MAX_CLASSES, MAX_TOKENS, MAX_WIDTH
from meg_kernels.neuron import Neurons

ARCHITECTURES = (80, 90, 100)
OPS = (
    dynamic_neuron,
    linear_gelu,
    modulated_norm,
    short_attention,
    softmax_entropy,
    solver_step,
)
# The parameter whose type names a configuration's dtype, where it is not x_ptr.
NAMED_AFTER = {
    "short_attention": "qkv_ptr",
    "softmax_entropy": "logits_ptr",
    "solver_step": "prediction_ptr",
    "sum_rows": "rows_ptr",
}


@dataclass
class Compiled:
    """What was read about one configuration on one chip.

    Args:
        architecture: 90 for sm_90.
        name: `name_of` the configuration.
        threads, registers: per program, and per thread.
        stack, local, shared: bytes of memory, per thread, per thread and per program.
        spills: instructions that move registers to local memory, or back.
        loads, stores: how many instructions move how many bits from and to device memory.
        in_flight: loads of 16 bytes that are issued before anything is multiplied.
        matrix: how many matrix instructions of each kind (HMMA, HGMMA, UTCHMMA) there are.
    """

    architecture: int
    name: str
    threads: int
    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    loads: dict[str, int]
    stores: dict[str, int]
    in_flight: int
    matrix: dict[str, int]


def configurations() -> list[Configuration]:
    return [configuration for op in OPS for configuration in op.configurations()]


def name_of(configuration: Configuration) -> str:
    """Such as `forward-bf16-BLOCK=4096-ROWS_ALIGNED=True-NEURONS_ALIGNED=True`."""
    kernel = configuration.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    rows = NAMED_AFTER.get(kernel, "x_ptr")
    constants = [
        f"{name}={value}"
        for name, value in configuration.constants.items()
        if name != "ACCUMULATE"  # which follows from the dtype
    ]
    return "-".join([kernel, configuration.types[rows].removeprefix("*"), *constants])


def compile_all(architecture: int, op: int) -> list[Compiled]:
    """Every configuration of `OPS[op]` for one chip."""
    codes, everything = [], []
    for configuration in OPS[op].configurations():
        source = triton.compiler.ASTSource(
            configuration.kernel, configuration.types, configuration.constants
        )
        target = GPUTarget("cuda", architecture, 32)
        options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
        codes.append((configuration, triton.compile(source, target=target, options=options)))
    texts = [machine_code(code.asm["cubin"]) for _, code in codes]
    opcodes = iter(disassembled(b"".join(texts), architecture))
    for (configuration, code), text in zip(codes, texts, strict=True):
        own = list(itertools.islice(opcodes, len(text) // 16))  # bytes of an instruction
        products = [at for at, opcode in enumerate(own) if re.match(r"FMUL|FFMA|\w+MMA\b", opcode)]
        wide = [at for at, opcode in enumerate(own) if opcode.startswith("LDG.E.128")]
        multiplied = next((at for at in products if wide and at > wide[0]), 0)
        compiled = Compiled(
            architecture,
            name_of(configuration),
            32 * configuration.warps,
            *resources(code.asm["cubin"]),
            code.metadata.shared,
            spills=sum(opcode.startswith(("LDL", "STL")) for opcode in own),
            loads=widths(opcode for opcode in own if opcode.startswith(("LDG.", "LDGSTS."))),
            stores=widths(opcode for opcode in own if opcode.startswith("STG")),
            in_flight=sum(at < multiplied for at in wide),
            matrix=dict(Counter(re.findall(r"^\w+MMA\b", "\n".join(own), re.MULTILINE))),
        )
        everything.append(compiled)
    assert next(opcodes, None) is None
    return everything


def machine_code(cubin: bytes) -> bytes:
    """The instructions of the one kernel in an ELF file."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    strings = sections[names][4]
    (text,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin[strings + name :].startswith(b".text.")
    )
    return text


def disassembled(code: bytes, architecture: int) -> list[str]:
    """The opcodes. Most of nvdisasm's time is its start: hand it many kernels' code at once."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        listing = run("nvdisasm", "--binary", f"SM{architecture}", file.name)
    return re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE
    )


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, and bytes of stack and of local memory."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        usage = run("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    return int(found.group(1)), int(found.group(2)), int(found.group(3))


def widths(opcodes: Iterable[str]) -> dict[str, int]:
    """Such as {"128": 18, "64": 1}; LDG.E.U16 moves 16 bits, and LDG.E 32."""
    named = (re.search(r"\.U?(128|64|16|8)\b", opcode) for opcode in opcodes)
    return dict(Counter(width.group(1) if width else "32" for width in named))


def run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def unlisted_launches() -> list[str]:
    """What the launchers would have compiled that is none of the configurations.

    Triton's own binder says what it would compile for a launch; nothing is launched.
    """
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    listed = [
        (one.kernel, one.types, one.constants, {"num_warps": one.warps, "num_stages": one.stages})
        for one in configurations()
    ]
    unlisted = []

    def note(kernel, *arguments, grid, warmup, **options):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialized, options = binder(*arguments, **options)
        types = {name: kind for name, (kind, _) in zip(bound, specialized, strict=True)}
        constants = {name: bound[name] for name, kind in types.items() if kind == "constexpr"}
        special = [what for kind, what in specialized if kind != "constexpr" and what is not None]
        if special or (kernel, types, constants, options) not in listed:
            unlisted.append(f"{kernel.__name__}: {specialized} {options}")

    run_kernel, JITFunction.run = JITFunction.run, note
    try:
        for launch in (
            launch_dynamic_neuron,
            launch_linear_gelu,
            launch_modulated_norm,
            launch_short_attention,
            launch_softmax_entropy,
            launch_solver_step,
        ):
            launch()
    finally:
        JITFunction.run = run_kernel
    return unlisted


def launch_dynamic_neuron() -> None:
    for dtype in dynamic_neuron.DTYPES:
        for rows, width in ((1, 1), (2, 576), (3, 2560), (2, 5121), (1, 9000)):
            x, index = torch.zeros(rows, width, dtype=dtype), torch.arange(rows)
            for bias in (None, x[:, 0]):
                neurons, narrow = Neurons(x, bias, x, "gelu"), Neurons(x, bias, x[:, :1], "silu")
                dynamic_neuron.forward(x, x, x, neurons, index)
                dynamic_neuron.forward(x, x[:, :1], x, narrow, index)
                dynamic_neuron.backward(x, x, neurons, index, (True, True, True, True))
                dynamic_neuron.backward(x, x, neurons, index, (False, False, True, False))


def launch_linear_gelu() -> None:
    for dtype in linear_gelu.DTYPES:
        for rows, depth, columns in ((1, 8, 8), (2, 33, 7), (2080, 8, 1024)):
            x, weight = torch.zeros(rows, depth, dtype=dtype), torch.zeros(columns, depth).to(dtype)
            linear_gelu.forward(x, weight, torch.zeros(columns, dtype=dtype))


def launch_modulated_norm() -> None:
    for dtype in modulated_norm.DTYPES:
        for width in (1, 256, 512, 768, 1024, MAX_WIDTH):
            x = torch.zeros(2, 3, width, dtype=dtype)
            row = x[:, 0]
            modulated_norm.forward(x, x, row, row, 1e-6)
            modulated_norm.forward(x, x, row, row, 1e-6, x, x, row)


def launch_short_attention() -> None:
    for dtype in short_attention.DTYPES:
        for tokens in (1, 3, 12, 17, 52, 82, MAX_TOKENS):
            for head_dim in (9, 64, 128):
                short_attention.forward(torch.zeros(2, tokens, 6 * head_dim, dtype=dtype), 2)


def launch_softmax_entropy() -> None:
    for dtype in softmax_entropy.DTYPES:
        for classes in (2, 10, 33, 576, MAX_CLASSES):
            softmax_entropy.forward(torch.zeros(2, classes, dtype=dtype))


def launch_solver_step() -> None:
    table = torch.zeros(2, 8)
    for dtype in solver_step.DTYPES:
        for batch, dim in ((1, 1), (2, 1536), (3, 5121)):
            state = torch.zeros(batch, dim)
            prediction = state.to(dtype)
            for noise in (None, state[0]):
                for variance in (None, prediction):
                    rest = (state, table, 1, noise, variance)
                    solver_step.forward(state, state, state, prediction, *rest)


if __name__ == "__main__":
    launches = unlisted_launches()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        work = zip(*itertools.product(ARCHITECTURES, range(len(OPS))), strict=True)
        compiled = [asdict(one) for some in pool.map(compile_all, *work) for one in some]
    print(json.dumps({"launches": launches, "compiled": compiled}))
