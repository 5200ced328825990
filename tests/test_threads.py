"""One model, one editor, several threads and asyncio tasks: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from tiny import EDITED, FACTS, MIXED, MOST, PARAPHRASES, QUERIES

from meg_kernels import (
    DiTConfig,
    FamiliarityNetwork,
    GeneratorConfig,
    MeGEditor,
    MeGLinear,
    NeuronLayout,
    Neurons,
    attach,
    checkpoints,
)
from meg_kernels.editing.train import train_generator
from meg_kernels.nn import LowerLayers, last_feed_forward_sees
from meg_kernels.nn.changed import replaced, uncompiled
from meg_kernels.nn.mounted import EMPTY, Mounted, Place
from meg_kernels.ops.dynamic_neuron import dynamic_neuron
from meg_kernels.pretrained import tokenized
from meg_kernels.routing.generators import build_generator
from meg_kernels.routing.neuron_cache import Served
from meg_kernels.routing.router import Router, RoutingConfig
from meg_kernels.scoped import held, holding, seeded

THREADS = 8
LAYER = 1


@pytest.fixture(scope="module")
def editor() -> MeGEditor:
    made = tiny.make_editor(tiny.BANK)
    tiny.edit(made)
    return made


def at_once(*calls):
    """What the calls return, each made in a thread of its own, all of them begun together."""
    barrier = threading.Barrier(len(calls))

    def begin(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(begin, call) for call in calls]]


def some_neurons(seed: int, count: int, width: int = 32) -> Neurons:
    parts = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))
    return Neurons(parts[0], None, parts[1])


# ---- values that follow the call -----------------------------------------------------------------


def test_what_one_thread_holds_no_other_one_sees():
    owner = object()
    with holding({owner: 1}):
        assert held(owner) == 1
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(held, owner).result() is None
            context = contextvars.copy_context()
            assert pool.submit(context.run, held, owner).result() == 1
    assert held(owner) is None


def test_blocks_are_left_in_any_order():
    first, second = object(), object()
    outer, inner = holding({first: 1}), holding({second: 2})
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert (held(first), held(second)) == (None, 2)
    inner.__exit__(None, None, None)
    assert held(second) is None


def test_blocks_of_one_owner_are_left_in_any_order():
    owner = object()
    outer, inner = holding({owner: 1}), holding({owner: 2})
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert held(owner) == 2
    inner.__exit__(None, None, None)
    assert held(owner) is None


def test_what_a_block_held_ends_with_it_also_for_what_was_started_inside():
    owner = object()
    with holding({owner: 1}):
        context = contextvars.copy_context()
    assert context.run(held, owner) is None


def test_the_mapping_that_values_came_in_stays_as_it_is():
    owner = object()
    values = {owner: 1}
    with holding(values):
        values[owner] = 2
        assert held(owner) == 1
    assert values == {owner: 2}


def test_an_inner_value_hides_the_outer_one():
    owner = object()
    with holding({owner: 1}):
        with holding({owner: 2}):
            assert held(owner) == 2
        assert held(owner) == 1


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_each_thread_has_its_own_neurons_and_a_plain_call_has_none(tiny_model, family):
    model = tiny_model(family)
    attached = attach(model, LAYER)
    ids = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(1))

    def logits():
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    layout = attached.layout
    fitting = [
        dataclasses.replace(
            some_neurons(seed, 3),
            bias=torch.full((3,), 0.5) if layout.has_bias else None,
            activation=layout.activation,
        )
        for seed in range(4)
    ]

    def mounted(own):
        with attached.neurons(own):
            return logits()

    plain = logits()
    alone = [mounted(own) for own in fitting]
    assert not any(torch.equal(plain, found) for found in alone)

    def repeat(call):
        return [call() for _ in range(12)]

    calls = [lambda own=own: repeat(lambda: mounted(own)) for own in fitting]
    *found, found_plain = at_once(*calls, lambda: repeat(logits))
    for expected, all_found in zip([*alone, plain], [*found, found_plain], strict=True):
        assert all(torch.equal(expected, one) for one in all_found)


def test_each_thread_has_its_own_neurons_in_a_meglinear():
    layer, x = MeGLinear(6, 5), torch.randn(2, 3, 6)
    neurons = [Neurons(torch.randn(2, 6), None, torch.randn(2, 5)) for _ in range(4)]

    def run(own):
        with torch.no_grad(), layer.mounted(own):
            return layer(x)

    alone = [run(own) for own in neurons]
    found = at_once(*(lambda own=own: [run(own) for _ in range(50)] for own in neurons))
    for expected, all_found in zip(alone, found, strict=True):
        assert all(torch.equal(expected, one) for one in all_found)
    assert torch.equal(layer(x), layer.project(x))


def test_a_place_knows_whether_anybody_uses_it_and_learns():
    place, cpu = Place(), torch.device("cpu")
    plain, learning = some_neurons(0, 2), some_neurons(1, 2)
    learning.value.requires_grad_()
    plain, learning = (
        Mounted.at(cpu, torch.float32, neurons, None) for neurons in (plain, learning)
    )

    def state():
        return place.in_use, place.learns

    with place.holding(EMPTY):
        assert state() == (False, False)
    with ThreadPoolExecutor(1) as pool, place.holding(plain):
        assert state() == (True, False)
        other = place.holding(learning)
        pool.submit(other.__enter__).result()
        assert state() == (True, True)
        pool.submit(other.__exit__, None, None, None).result()
        assert state() == (True, False)
    assert state() == (False, False)
    place.everywhere = learning
    assert state() == (True, True)
    with place.holding(EMPTY):
        assert place.mounted is None
    place.everywhere = None
    assert state() == (False, False)


def test_with_gradients_an_output_that_its_layer_needs_again_stays_as_it_is():
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = torch.tanh(weight)  # whose gradient is computed from y
    neurons = Mounted.at(y.device, y.dtype, some_neurons(0, 2), None)
    neurons.add(y, torch.ones(2, 32)).sum().backward()
    torch.testing.assert_close(weight.grad, 1 - torch.tanh(weight.detach()).square())


def test_what_compiled_code_calls_leaves_its_arguments_as_they_are():
    place, y = Place(), torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    before, x = y.clone(), torch.ones(2, 32)
    run = torch.ops.meg_kernels.add_mounted
    neurons = Mounted.at(y.device, y.dtype, some_neurons(0, 2), None)
    with place.holding(neurons):
        assert torch.equal(run(y, x, None, place.name), place.add(y.clone(), x))
    assert torch.equal(y, before)
    alone = run(y, x, None, place.name)
    assert torch.equal(alone, y) and alone.data_ptr() != y.data_ptr()


def test_what_is_mounted_from_now_on_is_there_for_all_threads_but_those_with_their_own():
    layer, x = MeGLinear(6, 5), torch.randn(2, 3, 6)
    everywhere, own = (Neurons(torch.randn(2, 6), None, torch.randn(2, 5)) for _ in range(2))
    with torch.no_grad():
        with layer.mounted(own):
            expected_own = layer(x)
        layer.mount(everywhere)
        expected = layer(x)
        with layer.mounted(own):
            assert torch.equal(layer(x), expected_own)
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(torch.no_grad()(layer), x).result(), expected)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        layer.unmount()
        assert torch.equal(layer(x), layer.project(x))


def test_tasks_that_interleave_have_their_own_neurons(tiny_model):
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def logits():
        return model(input_ids=ids, use_cache=False).logits

    async def task(seed: int | None, steps: int):
        found = []
        if seed is None:
            for _ in range(steps):
                found.append(logits())
                await asyncio.sleep(0)
            return found
        with attached.neurons(some_neurons(seed, 2)):
            for _ in range(steps):
                found.append(logits())
                await asyncio.sleep(0)
                found.append(await asyncio.to_thread(logits))
        return found

    async def together(seeds, steps):
        return await asyncio.gather(*(task(seed, steps) for seed in seeds))

    seeds = [0, 1, None, 2]
    alone = [asyncio.run(together([seed], 1))[0][0] for seed in seeds]
    assert not any(torch.equal(alone[2], alone[i]) for i in (0, 1, 3))
    for expected, found in zip(alone, asyncio.run(together(seeds, 5)), strict=True):
        assert all(torch.equal(expected, one) for one in found)


def test_a_compiled_model_gives_each_thread_its_own_neurons(tiny_model):
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    compiled = torch.compile(model, backend="aot_eager")
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def logits(run, own=None):
        if own is None:
            return run(input_ids=ids, use_cache=False).logits
        with attached.neurons(own):
            return run(input_ids=ids, use_cache=False).logits

    neurons = [some_neurons(seed, 2) for seed in range(3)]
    alone = [logits(model, own) for own in (None, *neurons)]
    for own in (None, neurons[0]):  # compile what is needed, which is not done at once
        logits(compiled, own)
    calls = [lambda own=own: [logits(compiled, own) for _ in range(6)] for own in (None, *neurons)]
    for expected, found in zip(alone, at_once(*calls), strict=True):
        for one in found:
            torch.testing.assert_close(one, expected)
    assert not torch.allclose(alone[0], alone[1])


@pytest.mark.parametrize("trains", [False, True])
def test_answers_are_the_same_while_another_thread_compiles(tiny_model, monkeypatch, trains):
    model = tiny_model("llama").train(trains)
    attached = attach(model, LAYER)
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    neurons, index = some_neurons(0, 2), torch.tensor([0, 1])

    def answers():
        with torch.set_grad_enabled(trains), attached.neurons(neurons):
            return model(input_ids=ids, use_cache=False).logits.detach()

    alone = answers()
    y, x = some_neurons(1, 2).value.unsqueeze(1), some_neurons(2, 2).value.unsqueeze(1)
    compiling = threading.Event()
    done = threading.Event()

    def backend(graph, examples):
        compiling.set()
        assert done.wait(60)
        return graph

    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(torch.compile(lambda x: x + 1, backend=backend), torch.ones(1))
        try:
            assert compiling.wait(60)
            assert torch.equal(answers(), alone)
            with pytest.raises(ValueError, match="index holds values"):
                dynamic_neuron(y, x, neurons, index + 5)
        finally:
            done.set()
        assert compiled.result() == 2


def test_gradients_of_neurons_pass_through_a_compiled_model(tiny_model):
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    compiled = torch.compile(model, backend="aot_eager")
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    gradients = []
    for run in (model, compiled):
        own = some_neurons(0, 2)
        own.value.requires_grad_()
        with attached.neurons(own):
            run(input_ids=ids, use_cache=False).logits.square().mean().backward()
        gradients.append(own.value.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_parts_of_a_model_run_in_one_thread_while_others_run_it_whole(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    lower = LowerLayers(model, 2)

    @torch.no_grad()
    def whole():
        return model(input_ids=ids, use_cache=False).logits

    expected = whole()

    @torch.no_grad()
    def part():
        hidden = lower.run(**inputs)
        known = lower.outputs(hidden, **inputs)
        with lower.replaced_by(hidden, known), last_feed_forward_sees(model, 1):
            return whole()[:, -1:]

    part()  # tries whether layers can be skipped
    found = at_once(
        *(lambda: [part() for _ in range(10)] for _ in range(2)),
        *(lambda: [whole() for _ in range(20)] for _ in range(2)),
    )
    for last in (*found[0], *found[1]):
        torch.testing.assert_close(last, expected[:, -1:])
    assert all(torch.equal(one, expected) for one in (*found[2], *found[3]))
    assert torch.equal(whole(), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def switching():
    """Threads give way to each other as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_method_is_given_back_to_all_while_others_call_it(switching):
    module, x, stop = torch.nn.Identity(), torch.ones(1), threading.Event()
    places = {(module, "forward"): lambda x: x + 1}

    def call():
        said = set()
        while not stop.is_set():
            said.add(module(x).item())
        return said

    def change():
        try:
            for _ in range(1000):
                with replaced(places, everywhere=True):
                    pass
        finally:
            stop.set()

    assert at_once(change, call, call)[1] <= {1.0, 2.0}
    assert "forward" not in vars(module)


def test_each_block_gives_back_what_it_replaced_and_no_more():
    module = torch.nn.Identity()
    module.forward = own = lambda x: x
    place = (module, "forward")
    with replaced({place: lambda x: x + 1}), ThreadPoolExecutor(1) as pool:
        with replaced({place: lambda x: x + 2}, everywhere=True):
            with replaced({place: lambda x: x + 3}, everywhere=True):
                assert (module(1), pool.submit(module, 1).result()) == (2, 4)
            assert pool.submit(module, 1).result() == 3
        assert (module(1), pool.submit(module, 1).result()) == (2, 1)
    assert vars(module)["forward"] is own


class Slow(torch.nn.Module):
    """A module whose method takes its time to be found, for others to look for it meanwhile."""

    class Method:
        def __get__(self, module, kind):
            meanwhile, module.meanwhile = module.meanwhile, None
            if meanwhile is not None:
                meanwhile()
            return lambda x: x

    meanwhile = None
    forward = Method()


def let_go_on(thread: threading.Thread) -> None:
    """Let it run to its end, or to where it has to wait for us."""
    thread.start()
    thread.join(0.5)


def test_two_that_replace_a_method_at_once_both_do():
    module, said, leave = Slow(), [], threading.Event()

    def other():
        with replaced({(module, "forward"): lambda x: x + 2}):
            leave.wait()
            said.append(module(1))

    thread = threading.Thread(target=other)
    module.meanwhile = lambda: let_go_on(thread)
    with replaced({(module, "forward"): lambda x: x + 1}):
        leave.set()
        thread.join()
        assert (module(1), said) == (2, [3])
    assert "forward" not in vars(module)


def test_compiled_code_runs_again_once_all_have_left_in_whatever_way():
    ran, x = [], torch.ones(2)

    def backend(graph, _):
        return lambda *args: (ran.append(1), graph.forward(*args))[1]

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    compiled(x)
    ran.clear()
    with uncompiled():
        with contextlib.suppress(KeyError), uncompiled():
            raise KeyError
        compiled(x)
    assert not ran
    compiled(x)
    assert ran


def test_what_somebody_else_put_in_place_of_a_method_stays():
    module = torch.nn.Identity()
    with replaced({(module, "forward"): lambda x: x + 1}, everywhere=True):
        inner = module.forward
        module.forward = lambda x: 10 * inner(x)
        assert module(1) == 20
    assert module(1) == 10


def test_a_copy_is_not_what_somebody_has_replaced_meanwhile(editor):
    with replaced({(editor.model, "forward"): lambda *_, **__: 0}, everywhere=True):
        module = copy.deepcopy(editor.model)
    assert module.forward.__self__ is module
    with editor.serving():
        twin = copy.deepcopy(editor)
        weights = [p for p in twin.model.parameters() if p.dim() > 1]
        assert twin.generate(QUERIES, MOST) == [fact.answer for fact in EDITED]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    assert twin.generate(QUERIES[:1], MOST) != [EDITED[0].answer]
    twin.detach()


def test_loading_changes_no_setting_of_the_process_for_good(tmp_path, switching):
    variable = checkpoints._NO_CONVERSION
    assert variable not in os.environ

    def load():
        for _ in range(300):
            with checkpoints.reaching(tmp_path):
                assert os.environ[variable] == "1"

    at_once(*[load] * 4)
    assert variable not in os.environ


def test_threads_that_share_a_tokenizer_take_turns():
    tokenizer, texts = tiny.make_tokenizer(), ["Abo", FACTS[0].query]
    plain = tokenized(tokenizer, texts).input_ids
    assert len(set(map(len, plain))) > 1  # padding shows
    padded = tokenized(tokenizer, texts, padding=True).input_ids

    def repeat(expected, **options):
        return all(tokenized(tokenizer, texts, **options).input_ids == expected for _ in range(300))

    calls = [lambda: repeat(plain), lambda: repeat(padded, padding=True)] * (THREADS // 2)
    assert all(at_once(*calls))


# ---- calls that would go astray ------------------------------------------------------------------


def test_attachments_left_in_the_order_in_which_they_were_entered_leave_nothing(tiny_model):
    model = tiny_model("llama")
    before = dict(vars(model))
    first, second = attach(model, 0), attach(model, 2)
    a, b = first.neurons(some_neurons(0, 2)), second.neurons(some_neurons(1, 2))
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    b.__exit__(None, None, None)
    first.detach()
    second.detach()
    assert dict(vars(model)) == before


def test_both_attachments_know_of_beams(tiny_model):
    model = tiny_model("llama")
    first, second = attach(model, 0), attach(model, 2)
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    with first.neurons(some_neurons(0, 2)), second.neurons(some_neurons(1, 2)):
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, do_sample=False, max_new_tokens=2
        )
    assert said.shape == (2, 7)


def test_calls_that_share_neurons_have_beams_of_their_own(tiny_model):
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attached.neurons(some_neurons(0, 2)):
        three = {"input_ids": ids.repeat_interleave(3, 0), "use_cache": False}
        model._expand_inputs_for_generation(expand_size=3, input_ids=ids)
        other = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool:
            expand = model._expand_inputs_for_generation
            pool.submit(other.run, lambda: expand(expand_size=1, input_ids=ids)).result()
        model(**three)


def test_attaching_at_once_takes_turns(tiny_model, switching):
    model = tiny_model("llama")
    before = dict(vars(model))

    def attached(layer):
        try:
            return [attach(model, layer)]
        except ValueError:
            return []

    for _ in range(20):
        made = at_once(*(lambda layer=layer: attached(layer) for layer in (0, 0, 1, 2)))
        assert [len(made[0]) + len(made[1]), len(made[2]), len(made[3])] == [1, 1, 1]
        at_once(*(one.detach for each in made for one in each))
        assert dict(vars(model)) == before


def test_a_copy_of_a_model_carries_no_neurons_and_can_be_attached(tiny_model):
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    own = some_neurons(0, 2)

    @torch.no_grad()
    def logits(run):
        return run(input_ids=ids, use_cache=False).logits

    plain = logits(model)
    with attached.neurons(own):
        edited, twin = logits(model), copy.deepcopy(model)
        assert torch.equal(logits(twin), plain)
    again = attach(twin, LAYER)
    with again.neurons(own):
        assert torch.equal(logits(twin), edited)
        assert torch.equal(logits(model), plain)
    again.detach()
    assert type(twin) is type(model) and torch.equal(logits(twin), plain)
    assert not twin.model.layers[LAYER].mlp._forward_hooks
    # A static method in version 4.
    assert getattr(twin._expand_inputs_for_generation, "__self__", twin) is twin
    with pytest.raises(ValueError, match="carries neurons already"):
        attach(model, LAYER)


def test_a_copied_editor_is_another_one(editor):
    twin = copy.deepcopy(editor)
    twin.remove(EDITED[0])
    assert len(twin.facts) == len(editor.facts) - 1
    assert editor.generate(QUERIES, MOST) == [fact.answer for fact in EDITED]
    assert twin.generate(QUERIES[1:], MOST) == [fact.answer for fact in EDITED[1:]]
    twin.detach()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_checkpointed_layers_run_again_with_the_neurons_of_the_first_time(
    tiny_model, family, use_reentrant
):
    model = tiny_model(family)
    attached = attach(model, LAYER)
    layout = attached.layout
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))

    def neurons(seed):
        made = some_neurons(seed, 2)
        bias = torch.ones(2) if layout.has_bias else None
        return Neurons(made.key, bias, made.value, layout.activation)

    def gradient(seed: int | None, then: int | None) -> torch.Tensor:
        weight = model.get_input_embeddings().weight.requires_grad_()
        weight.grad = None
        run = {"input_ids": ids, "use_cache": False}
        if seed is None:
            loss = model(**run).logits.square().mean()
        else:
            with attached.neurons(neurons(seed)):
                loss = model(**run).logits.square().mean()
        if then is None:
            loss.backward()
        else:
            with attached.neurons(neurons(then)):
                loss.backward()
        return weight.grad.clone()

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if hasattr(model.config, "dropout"):
        for part in model.modules():
            if hasattr(part, "dropout") and isinstance(part.dropout, float):
                part.dropout = 0.0
    # First one before any neurons were mounted.
    calls = ((None, 1), (0, None), (None, None), (0, 1), (None, 1))
    plain = [gradient(seed, then) for seed, then in calls]
    assert not torch.allclose(plain[1], plain[2])
    attached.detach()
    attached = attach(model, LAYER)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    again = [gradient(seed, then) for seed, then in calls]
    for expected, found in zip(plain, again, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_checkpoint_around_the_whole_model_is_refused_outside_of_the_block(tiny_model):
    model = tiny_model("llama").train()
    attached = attach(model, LAYER)
    model.get_input_embeddings().weight.requires_grad_()
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))

    def whole(ids):
        return model(input_ids=ids, use_cache=False).logits

    def loss():
        return torch.utils.checkpoint.checkpoint(whole, ids, use_reentrant=False).square().mean()

    loss().backward()  # there were none
    with ThreadPoolExecutor(1) as pool:
        other = attached.neurons(some_neurons(0, 2))
        pool.submit(other.__enter__).result()
        loss().backward()  # nor here
        pool.submit(other.__exit__, None, None, None).result()
    with attached.neurons(some_neurons(0, 2)):
        loss().backward()  # here the neurons are the same
        outside = loss()
    with pytest.raises(RuntimeError, match=r"outside of the `with` block.*inside that block"):
        outside.backward()


def test_rows_that_hold_several_sequences_are_refused(tiny_model):
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    ids = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(1))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    padded = torch.tensor([[1, 1, 0, 1, 2, 3]])
    with torch.no_grad(), attached.neurons(some_neurons(0, 1)):
        with pytest.raises(ValueError, match=r"several sequences.*row of its own"):
            model(input_ids=ids, position_ids=packed, use_cache=False)
        model(input_ids=ids, position_ids=padded, use_cache=False)
    with torch.no_grad():
        model(input_ids=ids, position_ids=packed, use_cache=False)


def test_continuous_batching_is_refused_while_neurons_are_mounted(tiny_model):
    model = tiny_model("llama")
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    attached = attach(model, LAYER)
    refused = pytest.raises(ValueError, match="packs its requests into one row")
    with attached.neurons(some_neurons(0, 1)), refused:
        model.generate_batch(inputs=[[5, 6, 7]])
    attached.detach()
    assert "generate_batch" not in vars(model)


def test_a_layer_is_not_detached_while_a_thread_answers_with_neurons(tiny_model):
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        other = attached.neurons(some_neurons(0, 2))
        pool.submit(other.__enter__).result()
        expected = pool.submit(lambda: model(input_ids=ids, use_cache=False).logits).result()
        with pytest.raises(RuntimeError, match=r"neurons mounted in another thread or task; wait"):
            attached.detach()
        found = pool.submit(lambda: model(input_ids=ids, use_cache=False).logits).result()
        assert torch.equal(found, expected)
        assert not torch.equal(found, model(input_ids=ids, use_cache=False).logits)
        pool.submit(other.__exit__, None, None, None).result()
    with attached.disabled():
        attached.detach()  # the base model answers as before
    with pytest.raises(RuntimeError, match="was detached"), attached.neurons(some_neurons(0, 2)):
        pass


# ---- random numbers ------------------------------------------------------------------------------


def _fitted(seed: int) -> list[torch.Tensor]:
    """A gate that is made and trained with dropout: all of it draws."""
    z = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
    with seeded(seed):
        gate = FamiliarityNetwork(8, depth=1, dropout=0.5)
    gate.fit(z, steps=30, seed=seed)
    return [*gate.state_dict().values()]


def _trained(seed: int) -> list[torch.Tensor]:
    """A generator whose network drops parts of the conditions while it is trained."""
    network = DiTConfig(width=16, depth=1, num_heads=2, patch_size=8, condition_dropout=0.3)
    config = GeneratorConfig.dit(network=network, seed=seed, max_steps=20, check_every=5)
    generator = build_generator(config, NeuronLayout(8, 8, False, "identity"), 8)
    z = torch.nn.functional.normalize(torch.eye(8)[:6], dim=1)
    neurons = generator.layout.unpack(
        torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    )
    never = lambda neurons, rows: torch.zeros(len(rows), dtype=torch.bool)  # noqa: E731
    train_generator(generator, z, neurons, never)
    return [*generator.state_dict().values()]


@pytest.mark.parametrize("draws", [_fitted, _trained])
def test_what_draws_random_numbers_draws_those_of_its_own_seed(draws):
    alone = [draws(seed) for seed in range(4)]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    beside = at_once(*(lambda seed=seed: draws(seed) for seed in range(4)))
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(alone, beside, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


# ---- the editor ----------------------------------------------------------------------------------


def expected_answers(editor: MeGEditor) -> tuple[dict[str, str], dict[str, str]]:
    base = {query: editor.generate_base([query], MOST)[0] for query in MIXED}
    return {query: editor.generate([query], MOST)[0] for query in MIXED}, base


def test_threads_get_the_answers_that_they_get_alone(editor):
    edited, base = expected_answers(editor)
    assert edited != base

    def ask(seed: int) -> list[tuple[str, str]]:
        chosen, wrong = random.Random(seed), []
        for _ in range(25):
            queries = chosen.sample(MIXED, chosen.randint(1, 4))
            kind = chosen.choice(["edited", "base", "routed", "serving"])
            if kind == "base":
                found, right = editor.generate_base(queries, MOST), base
            elif kind == "serving":
                with editor.serving():
                    found, right = editor.generate(queries, MOST), edited
            elif kind == "routed":
                with editor.routed(queries):
                    found, right = editor.generate_base(queries, MOST), base
            else:
                found, right = editor.generate(queries, MOST), edited
            wrong += [(kind, q, f) for q, f in zip(queries, found, strict=True) if f != right[q]]
        return wrong

    assert at_once(*(lambda seed=seed: ask(seed) for seed in range(THREADS))) == [[]] * THREADS
    assert not any("forward" in vars(module) for module in editor.model.modules())


def test_tasks_get_the_answers_that_they_get_alone(editor):
    edited, base = expected_answers(editor)

    async def ask(seed: int) -> bool:
        chosen = random.Random(seed)
        for _ in range(10):
            query = chosen.choice(MIXED)
            verb, right = chosen.choice([(editor.generate, edited), (editor.generate_base, base)])
            if await asyncio.to_thread(verb, [query], MOST) != [right[query]]:
                return False
        return True

    async def together() -> list[bool]:
        return await asyncio.gather(*(ask(seed) for seed in range(THREADS)))

    assert all(asyncio.run(together()))


def test_editing_goes_on_beside_answers_that_are_those_before_or_after():
    editor = tiny.make_editor(tiny.BANK)
    tiny.edit(editor)
    old, _ = expected_answers(editor)
    added = FACTS[5:7]
    stop, wrong = threading.Event(), []

    def ask() -> int:
        asked = 0
        while not stop.is_set() or asked < 3:
            for query in (*QUERIES, *(fact.query for fact in added)):
                found = editor.generate([query], MOST)[0]
                allowed = {old.get(query), *(f.answer for f in added if f.query == query)}
                if query in QUERIES and found not in allowed:
                    wrong.append((query, found))
            asked += 1
        return asked

    def change() -> None:
        try:
            editor.add(added)
            tiny.edit(editor, [*EDITED, *added])
        finally:
            stop.set()

    at_once(change, ask, ask)
    assert not wrong
    assert editor.generate([f.query for f in added], MOST) == [f.answer for f in added]


def test_what_is_measured_stays_as_it_is_until_it_is_measured():
    editor = tiny.make_editor(tiny.BANK)
    tiny.edit(editor)
    expected = editor.evaluate().metrics
    other = threading.Thread(target=editor.remove, args=(EDITED[0],))

    def change(*_):
        if other.ident is None:
            other.start()
            other.join(0.5)  # it waits for us

    handle = editor.model.register_forward_pre_hook(change)
    assert editor.evaluate().metrics == expected
    handle.remove()
    other.join()
    assert len(editor.facts) == len(EDITED) - 1


def test_a_batch_on_its_way_ends_with_the_configuration_that_it_began_with(editor):
    router = Router(editor.encoder, editor.edits, RoutingConfig(snap=False), editor.router.device)
    routing = router.route(PARAPHRASES)
    assert routing.accepted.any()
    expected = router.neurons(routing)[0]
    router.config = RoutingConfig(snap=True)
    assert torch.equal(router.neurons(routing)[0].value, expected.value)
    assert len(router.neurons(router.route(PARAPHRASES))[0]) < len(expected)


class SlowRouter(Router):
    """A router whose edits take their time to be read, for others to put other ones meanwhile."""

    meanwhile = None

    @property
    def edits(self):
        found, meanwhile, self.meanwhile = self._by.edits, self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return found


def test_a_configuration_does_not_bring_back_edits_that_were_replaced_meanwhile(editor):
    router = SlowRouter(editor.encoder, editor.edits)
    thread = threading.Thread(target=router.put, args=(None,))
    router.meanwhile = lambda: let_go_on(thread)
    Router.config.fset(router, RoutingConfig(serve_unlearnt=True))
    thread.join()
    assert router.edits is None and router.config.serve_unlearnt


def test_every_query_is_counted(editor):
    class SlowCount(Served):
        def __add__(self, more):
            if not thread.ident:
                let_go_on(thread)
            return super().__add__(more)

    router = Router(editor.encoder, editor.edits)
    routing = router.route(QUERIES)
    thread = threading.Thread(target=router.neurons, args=(routing,))
    router.served = SlowCount()
    router.neurons(routing)
    thread.join()
    assert router.served.queries == 2 * len(QUERIES)


def test_two_additions_at_once_are_both_kept():
    editor = tiny.make_editor(tiny.BANK)
    tiny.edit(editor)
    at_once(*(lambda fact=fact: editor.add([fact]) for fact in FACTS[5:8]))
    assert {fact.id for fact in editor.facts} == {fact.id for fact in FACTS[:8]}


def test_what_is_mounted_is_not_measured_or_edited_as_if_it_were_the_base_model(editor):
    verbs = (
        lambda: editor.evaluate(),
        lambda: editor.perplexity(["A text."]),
        lambda: editor.unknown(EDITED),
        lambda: editor.add(FACTS[6]),
        lambda: editor.generate(QUERIES, MOST),
    )
    with editor.routed(QUERIES):
        for verb in verbs:
            with pytest.raises(RuntimeError, match=r"neurons are mounted.*leave that `with` block"):
                verb()
