"""From queries to answers, each query with its own edit: prefill and 8 greedy tokens, end to end.

Ours answers all queries in one batch, as inside `MeGEditor.serving`: on a CPU over packed weights.
Baselines, on the same weights: one query at a time as the paper's released code does it, one query
at a time our way, and PEFT's mixed batch, as it is and over packed weights as well.

Greedy answers do not depend on batching in float32 only. A model that is timed in another dtype is
gated in float32: the same ways, the same weights, the first queries.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import MixedAdapters, OneAtATime, answer
from benchmarks.measure import Case, Passed, Race, Way
from benchmarks.models import Subject, llama_3_8b, smollm2, twin
from meg_kernels.nn import attach
from meg_kernels.nn.packing import frozen_products

GPU = torch.cuda.is_available()
COUNTS = (8, 64)
NEW_TOKENS = 8
FEW = 8  # queries of the gate in float32, where that is not the dtype that is timed
OURS, RELEASED, OURS_ALONE = "one batch", "one at a time, as released", "one at a time, our way"
PEFT, PACKED_PEFT = "PEFT mixed batch", "PEFT mixed batch, packed weights"

Ways = dict[str, Callable[[], Tensor]]  # each gives tokens [queries, NEW_TOKENS]


@pytest.fixture(scope="module")
def subject(device: torch.device) -> Subject:
    return llama_3_8b(torch.bfloat16, device) if GPU else smollm2(torch.float32, device)


@pytest.fixture(scope="module")
def exact(subject: Subject) -> Subject:
    """The subject in float32."""
    if subject.model.dtype == torch.float32:
        return subject
    return replace(subject, model=copy.deepcopy(subject.model).float())


def some(count: int) -> range:
    """FEW of `count` queries, evenly: one at a time, all of them would only take longer."""
    return range(0, count, count // FEW)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


def ours(stack: contextlib.ExitStack, subject: Subject, queries: list[Tensor]) -> Ways:
    """All in one batch; some of them one at a time."""
    neurons = subject.neurons(len(queries))
    attached = attach(twin(subject.model), subject.layer)
    stack.enter_context(frozen_products([attached.model], subject.model.dtype))

    def in_one_batch() -> Tensor:
        with attached.neurons(neurons):
            return answer(attached.model, queries, NEW_TOKENS)

    def one_at_a_time() -> Tensor:
        rows = []
        for row in some(len(queries)):
            with attached.neurons(neurons[row : row + 1]):
                rows.append(answer(attached.model, [queries[row]], NEW_TOKENS))
        return torch.cat(rows)

    return {OURS: in_one_batch, OURS_ALONE: one_at_a_time}


def released(subject: Subject, queries: list[Tensor]) -> Ways:
    neurons = subject.neurons(len(queries))
    wider = OneAtATime(subject)
    return {RELEASED: lambda: wider.answer(queries, neurons, NEW_TOKENS)}


def check_neurons(subject: Subject, queries: list[Tensor], results: dict[str, Tensor]) -> Passed:
    """All ways give the tokens of the physically wider model, which are not the base model's."""
    expected = results[RELEASED]
    alone = {OURS_ALONE: results[OURS_ALONE].tolist()}
    Passed.identical(alone, expected[list(some(len(queries)))].tolist(), RELEASED)
    base = answer(subject.model, queries, NEW_TOKENS)
    changed = (expected != base).any(1).float().mean()
    assert changed > 0.8, f"neurons changed {changed:.0%} of the answers only"
    together = {OURS: results[OURS].tolist()}
    return Passed.identical(together, expected.tolist(), f"{RELEASED}, float32")


@pytest.mark.parametrize("count", COUNTS)
@torch.no_grad()
def test_against_one_at_a_time(
    race: Race, stack: contextlib.ExitStack, subject: Subject, exact: Subject, count: int
):
    queries = subject.queries[:count]
    ways = ours(stack, subject, queries) | released(subject, queries)

    def gate(results: dict[str, Tensor]) -> Passed:
        if exact is subject:
            return check_neurons(subject, queries, results)
        few = queries[:FEW]
        in_float32 = ours(stack, exact, few) | released(exact, few)
        return check_neurons(exact, few, {name: run() for name, run in in_float32.items()})

    race(
        case(subject, count),
        Way(OURS, ways[OURS], items=count),
        Way(RELEASED, ways[RELEASED], items=count),
        Way(OURS_ALONE, ways[OURS_ALONE], items=FEW),
        gate=gate,
        rounds=3,
    )


@pytest.mark.parametrize("count", COUNTS)
@torch.no_grad()
def test_against_peft(
    race: Race, stack: contextlib.ExitStack, subject: Subject, exact: Subject, count: int
):
    queries = subject.queries[:count]
    ways = ours(stack, subject, queries)
    adapters, packed = MixedAdapters(subject, count), MixedAdapters(subject, count)
    stack.enter_context(frozen_products([packed.model], subject.model.dtype))

    def gate(results: dict[str, Tensor]) -> Passed:
        few = queries[:FEW]
        in_float32 = ours(stack, exact, few) | released(exact, few)
        passed = check_neurons(exact, few, {name: run() for name, run in in_float32.items()})
        # PEFT's adapters are other maths than neurons: its oracle is itself.
        alone = MixedAdapters(exact, len(few))
        each = [alone.answer_one(row, few[row], NEW_TOKENS) for row in range(len(few))]
        mixed = {PEFT: alone.answer(few, NEW_TOKENS).tolist()}
        Passed.identical(mixed, torch.cat(each).tolist(), "PEFT, one at a time")
        return passed

    race(
        case(subject, count),
        Way(OURS, ways[OURS], items=count),
        Way(PEFT, lambda: adapters.answer(queries, NEW_TOKENS), items=count),
        Way(PACKED_PEFT, lambda: packed.answer(queries, NEW_TOKENS), items=count),
        gate=gate,
        longer=8,
    )


def case(subject: Subject, count: int) -> Case:
    shape = {"model": subject.name, "queries": count, "new tokens": NEW_TOKENS}
    return Case("answer a query", shape, subject.model.dtype)
