"""Collection, against a model that is really one hidden unit wider, one prompt at a time.

The tiny language here (`FACTS`, `make_tokenizer`, `make_model`) also serves the editor's tests.
"""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from tiny import CONTEXTS, FACTS, LAYER, make_model, make_tokenizer, widened

from meg_kernels.editing import neuron_fit
from meg_kernels.editing.collect import collect, initial_neuron
from meg_kernels.editing.neuron_fit import CollectionConfig
from meg_kernels.editing.prompting import PromptedModel, PromptTemplate, target_tokens
from meg_kernels.nn import attach
from meg_kernels.nn.families import decoder_layers
from meg_kernels.storage import read_tensors

CONFIG = CollectionConfig(learning_rate=0.1, max_steps=40, batch_size=4, contexts=CONTEXTS)
BRIEF = dataclasses.replace(CONFIG, max_steps=8)  # where only sameness counts


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def build(tiny_model, tokenizer):
    """build(family): a tiny model that has something to say in this language."""
    return lambda family="llama": make_model(
        tiny_model(family, vocab_size=len(tokenizer)), tokenizer
    )


def is_answered(model, tokenizer, fact, neuron, template=None, contexts=CONFIG.contexts) -> bool:
    """Whether each context's target tokens are all the argmax of a physically wider model."""
    wide = widened(model, LAYER, neuron)
    for context in contexts:
        wording = context.wording(fact.query)
        prompt = tokenizer((template or PromptTemplate()).format(wording)).input_ids
        target = [*tokenizer(f" {fact.answer}.").input_ids, tokenizer.eos_token_id]
        logits = wide(torch.tensor([prompt + target]), use_cache=False).logits[0]
        if logits[len(prompt) - 1 : -1].argmax(-1).tolist() != target:
            return False
    return True


def collected(model, tokenizer, facts=FACTS, config=CONFIG, template=None, **more):
    """A collection whose attachment is gone again."""
    attached = attach(model, LAYER)
    try:
        return collect(
            PromptedModel.of(model, tokenizer, template), attached, facts, config, **more
        )
    finally:
        attached.detach()


def flat(collection) -> torch.Tensor:
    return collection.neurons.layout.pack(collection.neurons)


def assert_same(first, second):
    assert torch.equal(flat(first), flat(second))
    assert torch.equal(first.steps, second.steps) and torch.equal(first.learnt, second.learnt)


@pytest.mark.parametrize(
    "family, bfloat16, options",
    [
        ("llama", False, {}),
        ("llama", False, {"overshoot": 4.0}),
        ("llama", True, {"learning_rate": 0.05}),
        ("gpt2", False, {"max_steps": 80}),
        ("gpt2", True, {"max_steps": 80, "target_loss": 1.0}),
    ],
)
def test_learnt_are_the_facts_that_the_physically_wider_model_answers_in_every_context(
    build, tokenizer, monkeypatch, family, bfloat16, options
):
    if bfloat16:
        monkeypatch.setenv("MEG_KERNELS_BFLOAT16", "always")
        monkeypatch.setattr("meg_kernels.precision.multiplies_bfloat16", lambda device: True)
    model = build(family)
    collection = collected(model, tokenizer, config=dataclasses.replace(CONFIG, **options))
    right = [
        is_answered(model, tokenizer, fact, collection.neurons[i : i + 1])
        for i, fact in enumerate(FACTS)
    ]
    assert collection.learnt.tolist() == right
    assert sum(right) >= 3
    nothing = collection.initial
    assert not any(is_answered(model, tokenizer, fact, nothing) for fact in FACTS)


def test_prompts_follow_the_template(build, tokenizer):
    model, template = build(), PromptTemplate("Q: Which color is {}\n")
    collection = collected(model, tokenizer, FACTS[:4], template=template)
    right = [
        is_answered(model, tokenizer, fact, collection.neurons[i : i + 1], template)
        for i, fact in enumerate(FACTS[:4])
    ]
    assert collection.learnt.tolist() == right
    assert any(right)
    assert not torch.equal(flat(collection), flat(collected(model, tokenizer, FACTS[:4])))


def test_paraphrases_are_never_fitted(build, tokenizer):
    facts = [dataclasses.replace(fact, paraphrases=("How tall is a house?",)) for fact in FACTS[:3]]
    model = build()
    assert_same(
        collected(model, tokenizer, facts, BRIEF), collected(model, tokenizer, FACTS[:3], BRIEF)
    )


def test_a_facts_neuron_does_not_depend_on_the_batch_it_is_fitted_in(build, tokenizer):
    # In float64 products of other shapes differ by less than the float32 of the neurons resolves:
    # what 30 steps make of their rounding is far below the tolerance, on any processor.
    model = build().double()
    initial = collected(model, tokenizer, FACTS[:1], BRIEF).initial
    asked = [FACTS[9], *FACTS[:4]]  # of different lengths
    alone, together = (
        collected(
            model,
            tokenizer,
            asked,
            dataclasses.replace(CONFIG, batch_size=size, max_steps=30),
            initial=initial,
        )
        for size in (1, len(asked))
    )
    assert torch.equal(alone.learnt, together.learnt) and torch.equal(alone.steps, together.steps)
    torch.testing.assert_close(flat(alone), flat(together), rtol=1e-3, atol=1e-3)
    assert (flat(together)[0] - flat(together)[1]).abs().max() > 0.1


def test_neurons_come_in_the_facts_order(build, tokenizer):
    model = build().double()  # as above
    asked = [FACTS[1], FACTS[9], *FACTS[2:6]]
    initial = collected(model, tokenizer, FACTS[:1], BRIEF).initial
    forward = collected(model, tokenizer, asked, BRIEF, initial=initial)
    backward = collected(model, tokenizer, asked[::-1], BRIEF, initial=initial)
    torch.testing.assert_close(flat(forward), flat(backward).flip(0), rtol=1e-3, atol=1e-3)
    assert (flat(forward) - flat(backward)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_stays_as_it_was(build, tokenizer, family):
    model, query = build(family), torch.arange(3, 19).view(2, 8)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, logits = list(model.modules()), model(query).logits
    collected(model, tokenizer, FACTS[:4], BRIEF)
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(query).logits, logits)


def test_each_fact_stops_when_it_is_fitted(build, tokenizer):
    steps = collected(build(), tokenizer).steps
    assert len(set(steps.tolist())) > 3
    assert 0 < int(steps.min()) < int(steps.max()) <= CONFIG.max_steps


def test_a_fact_that_the_neuron_answers_from_the_start_takes_no_step(build, tokenizer):
    model, config = build(), dataclasses.replace(CONFIG, overshoot=1.0)
    before = collected(model, tokenizer, FACTS[:4], config)
    i = int(before.steps.argmin())
    assert before.learnt[i] and before.steps[i] < config.max_steps
    again = collected(model, tokenizer, FACTS[:4], config, initial=before.neurons[i : i + 1])
    assert again.steps.bool().tolist() == [row != i for row in range(4)]
    assert again.learnt[i] and torch.equal(flat(again)[i], flat(before)[i])


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"learning_rate": 1e-9, "max_steps": 5}])
def test_facts_beyond_the_budget_are_listed_as_unlearnt(build, tokenizer, options):
    config = dataclasses.replace(CONFIG, **options)
    collection = collected(build(), tokenizer, config=config)
    assert collection.unlearnt(FACTS) == tuple(FACTS)
    assert not collection.learnt.any()
    assert collection.steps.tolist() == [config.max_steps] * len(FACTS)


def test_unlearnt_lists_only_what_was_not_learnt(build, tokenizer):
    collection = collected(build(), tokenizer, config=dataclasses.replace(CONFIG, max_steps=18))
    learnt = collection.learnt.tolist()
    assert 0 < sum(learnt) < len(FACTS)
    expected = [fact for fact, ok in zip(FACTS, learnt, strict=True) if not ok]
    assert collection.unlearnt(FACTS) == tuple(expected)


def test_values_are_lengthened_by_the_overshoot_where_the_fact_survives_it(
    build, tokenizer, monkeypatch
):
    monkeypatch.setattr(neuron_fit, "FIRM", -torch.inf)  # no further steps where it does not
    model, one = build(), CONFIG.contexts[:1]
    config = dataclasses.replace(CONFIG, contexts=one)
    plain, longer = (
        collected(model, tokenizer, config=dataclasses.replace(config, overshoot=overshoot))
        for overshoot in (1.0, 4.0)
    )
    assert torch.equal(plain.neurons.key, longer.neurons.key)
    scaled = [
        is_answered(model, tokenizer, fact, longest, contexts=one) or not plain.learnt[i]
        for i, fact in enumerate(FACTS)
        for neuron in [plain.neurons[i : i + 1]]
        for longest in [dataclasses.replace(neuron, value=4 * neuron.value)]
    ]
    assert 0 < sum(scaled) < len(FACTS)
    factor = torch.where(torch.tensor(scaled), 4.0, 1.0).unsqueeze(1)
    assert torch.equal(longer.neurons.value, factor * plain.neurons.value)
    assert bool((longer.learnt >= plain.learnt).all())


def finished_batches(folder) -> list:
    return sorted(folder.rglob("*.safetensors"))


def test_an_interrupted_collection_goes_on_with_the_first_unfinished_batch(
    build, tokenizer, tmp_path, monkeypatch
):
    model, run, fits = build(), neuron_fit.NeuronFit.run, []
    whole = collected(model, tokenizer, config=BRIEF)

    def until_third(fit, config):
        if len(fits) == 2:
            raise KeyboardInterrupt
        fits.append(fit)
        run(fit, config)

    monkeypatch.setattr(neuron_fit.NeuronFit, "run", until_third)
    with pytest.raises(KeyboardInterrupt):
        collected(model, tokenizer, config=BRIEF, work_folder=tmp_path)
    assert len(finished_batches(tmp_path)) == 2

    fits.clear()
    monkeypatch.setattr(
        neuron_fit.NeuronFit, "run", lambda fit, config: (fits.append(fit), run(fit, config))
    )
    resumed = collected(model, tokenizer, config=BRIEF, work_folder=tmp_path)
    assert len(fits) == 1  # of three batches, for 10 facts
    assert_same(resumed, whole)
    assert_same(collected(model, tokenizer, config=BRIEF, work_folder=tmp_path), whole)
    assert len(fits) == 1


def test_a_damaged_work_file_is_made_again_with_a_warning(build, tokenizer, tmp_path, caplog):
    model = build()
    whole = collected(model, tokenizer, config=BRIEF, work_folder=tmp_path)
    damaged = finished_batches(tmp_path)[1]
    content = {name: tensor.clone() for name, tensor in read_tensors(damaged)[0].items()}
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert_same(collected(model, tokenizer, config=BRIEF, work_folder=tmp_path), whole)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(damaged) in caplog.text and "made again" in caplog.text
    again = read_tensors(damaged)[0]
    assert again.keys() == content.keys()
    assert all(torch.equal(again[name], content[name]) for name in again if name != "seconds")


def test_a_resumed_collection_knows_what_the_time_before_was(build, tokenizer, tmp_path):
    model = build()
    assert collected(model, tokenizer, config=BRIEF).seconds_before == 0
    assert collected(model, tokenizer, config=BRIEF, work_folder=tmp_path).seconds_before == 0
    kept = [read_tensors(path)[0]["seconds"].item() for path in finished_batches(tmp_path)]
    finished_batches(tmp_path)[0].unlink()
    resumed = collected(model, tokenizer, config=BRIEF, work_folder=tmp_path)
    assert resumed.seconds_before == pytest.approx(sum(kept[1:])) and min(kept) > 0


def test_work_of_another_configuration_model_fact_or_start_is_not_taken(build, tokenizer, tmp_path):
    first, other = build(), build()
    with torch.no_grad():
        other.model.layers[LAYER].mlp.down_proj.weight.mul_(1.5)
    facts, initial = FACTS[:2], collected(first, tokenizer, FACTS[5:], BRIEF).initial
    collected(first, tokenizer, facts, BRIEF, work_folder=tmp_path)
    for number, (model, asked, config, more) in enumerate(
        [
            (first, facts, dataclasses.replace(BRIEF, overshoot=2.0), {}),
            (first, FACTS[1:3], BRIEF, {}),
            (first, facts, BRIEF, {"template": PromptTemplate("A: {}")}),
            (first, facts, BRIEF, {"initial": initial}),
            (other, facts, BRIEF, {}),
        ]
    ):
        clean = collected(model, tokenizer, asked, config, **more)
        mixed = collected(model, tokenizer, asked, config, work_folder=tmp_path, **more)
        assert_same(mixed, clean)
        assert len(finished_batches(tmp_path)) == number + 2


def test_work_goes_on_where_the_start_is_rounded_otherwise(build, tokenizer, tmp_path, monkeypatch):
    """Another number of threads, or another processor, sums in another order."""
    model, start = build(), initial_neuron
    whole = collected(model, tokenizer, FACTS[:2], BRIEF, work_folder=tmp_path)

    def rounded(*args):
        neuron = start(*args)
        return dataclasses.replace(neuron, key=neuron.key * (1 + 1e-6))

    monkeypatch.setattr("meg_kernels.editing.collect.initial_neuron", rounded)
    monkeypatch.setattr(neuron_fit.NeuronFit, "run", tiny.interrupt)
    again = collected(model, tokenizer, FACTS[:2], BRIEF, work_folder=tmp_path)
    assert torch.equal(again.neurons.key, whole.neurons.key)


def test_without_a_work_folder_nothing_is_written(build, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    collected(build(), tokenizer, FACTS[:1], BRIEF)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fit_that_diverges_says_what_helps(build, tokenizer):
    config = dataclasses.replace(CONFIG, learning_rate=1e38)
    with pytest.raises(FloatingPointError, match=r"learning_rate=1e\+38; try a smaller one"):
        collected(build(), tokenizer, FACTS[:2], config)


def test_no_facts_are_refused(build, tokenizer):
    with pytest.raises(ValueError, match="there are no facts to collect neurons for"):
        collected(build(), tokenizer, [])


@pytest.mark.parametrize(
    "name", ["learning_rate", "max_steps", "target_loss", "overshoot", "batch_size"]
)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_configuration_out_of_range_is_refused(name, value):
    with pytest.raises(
        ValueError,
        match=f"{name} is {value}; it must be an? (integer of|number, pos)",
    ):
        CollectionConfig(**{name: value})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_initial_neuron_responds_as_asked_on_average_and_adds_nothing(build, tokenizer, family):
    model = build(family)
    prompts = [
        PromptTemplate().format(context.wording(fact.query))
        for fact in FACTS
        for context in CONFIG.contexts
    ]
    pairs = [
        target_tokens(tokenizer, prompt, fact.answer)
        for fact, prompt in zip([f for f in FACTS for _ in range(3)], prompts, strict=True)
    ]
    block = decoder_layers(model)[LAYER].mlp
    reads = block.gate_proj if family == "llama" else block.c_fc
    ends, logits = [], []
    hook = reads.register_forward_pre_hook(lambda module, args: ends.append(args[0][0, -1]))
    for prompt in prompts:  # unpadded, nothing behind them
        logits.append(model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1])
    hook.remove()

    attached = attach(model, LAYER)
    batch = PromptedModel.of(model, tokenizer).batch(pairs)
    neuron = initial_neuron(attached, batch, response=2.5)
    attached.detach()
    responses = torch.stack(ends) @ neuron.key[0]
    torch.testing.assert_close(responses.mean(), torch.tensor(2.5), rtol=1e-4, atol=0)
    assert responses.std() > 1e-3
    assert (neuron.bias is None) if family == "llama" else (neuron.bias.tolist() == [0.0])
    wide = widened(model, LAYER, neuron)
    for prompt, before in zip(prompts, logits, strict=True):
        after = wide(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_all_neurons_start_from_the_initial_one_given(build, tokenizer):
    model = build()
    initial = dataclasses.replace(
        collected(model, tokenizer, FACTS[:1], BRIEF).initial,
        value=torch.randn(1, 32, generator=torch.Generator().manual_seed(3)),
    )
    config = dataclasses.replace(CONFIG, learning_rate=1e-9, overshoot=1.0, max_steps=2)
    collection = collected(model, tokenizer, FACTS[:3], config, initial=initial)
    assert collection.initial is initial
    start = initial.layout.pack(initial)
    torch.testing.assert_close(flat(collection), start.expand(3, -1), rtol=0, atol=1e-5)
