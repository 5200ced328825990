"""The baselines: MEMIT against its definitions, one prompt at a time; all edits undone exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import FACTS, LAYER, make_model, make_tokenizer

from benchmarks.quality import baselines, memit
from benchmarks.quality.baselines import (
    BASELINES,
    Baseline,
    InContextConfig,
    LoraConfig,
    Request,
    TrainingConfig,
)
from benchmarks.quality.memit import MemitConfig, least_squares_update
from meg_kernels.editing.evaluate import Evaluation
from meg_kernels.editing.neuron_fit import CollectionConfig
from meg_kernels.editing.prompting import PromptTemplate, target_tokens
from meg_kernels.facts import Fact

TUNING = TrainingConfig(learning_rate=5e-3, max_epochs=60)
LORA = LoraConfig(learning_rate=5e-2, max_epochs=200)
MEMIT = MemitConfig(
    num_layers=2,
    num_prefixes=0,
    learning_rate=0.05,
    max_steps=60,
    target_loss=0.5,
    most_change=10.0,
    covariance_weight=1e-3,
    text_tokens=4,
)
# Nothing stands after the query, and MEMIT edits its last token: in a random model little gets
# from one token to another.
TEMPLATE = PromptTemplate("Q: {}")
LONE = dataclasses.replace(FACTS[0], subject=None)
EDITS = {
    "fine_tuning": (baselines.fine_tuning, TUNING, FACTS[:3]),
    "lora": (baselines.lora, LORA, FACTS[:3]),
    "memit": (baselines.memit, MEMIT, [LONE]),
}
WIDTH = 48  # of the tiny FFN
# float32 sums of some dozens of products, through a layer.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tiny_model, tokenizer):
    return make_model(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)


@pytest.fixture
def request_for(model, tokenizer):
    """request_for(facts): what a baseline is asked."""
    return lambda facts: Request(model, tokenizer, facts, TEMPLATE, LAYER)


def is_answered(model, tokenizer, fact, prompt=None) -> bool:
    prompt, target = target_tokens(tokenizer, prompt or f"Q: {fact.query}", fact.answer)
    logits = model(torch.tensor([prompt + target]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == target


def seen(model, tokenizer, text, layer) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's output projection reads [T, n], and what the layer leaves [T, d]."""
    block, read = model.model.layers[layer], []
    hooks = [
        block.mlp.down_proj.register_forward_hook(lambda _, args, __: read.append(args[0][0])),
        block.register_forward_hook(
            lambda _, __, output: read.append(output[0] if isinstance(output, tuple) else output)
        ),
    ]
    model(torch.tensor([tokenizer(text).input_ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return read[0], read[1].reshape(-1, read[1].shape[-1])


# ---- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
def test_the_model_answers_the_facts_inside_and_is_bit_for_bit_what_it_was_after(request_for, name):
    edit, config, facts = EDITS[name]
    request = request_for(facts)
    model = request.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [*model.modules()]
    assert not any(is_answered(model, request.tokenizer, fact) for fact in request.facts)
    with edit(request, config):
        assert all(is_answered(model, request.tokenizer, fact) for fact in request.facts)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_fails_leaves_the_model_as_it_was(request_for, monkeypatch, name):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    edit, config, facts = EDITS[name]
    request = request_for(facts)
    before = {key: value.clone() for key, value in request.model.state_dict().items()}
    monkeypatch.setattr(memit, "least_squares_update", fail)
    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(KeyboardInterrupt), edit(request, config):
        pass
    after = request.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(p.requires_grad for p in request.model.parameters())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("fine_tuning", {f"{LAYER}.mlp.{part}_proj" for part in ("gate", "up", "down")}),
        ("lora", {f"{LAYER}.mlp.{part}_proj" for part in ("gate", "up", "down")}),
        ("memit", {f"{layer}.mlp.down_proj" for layer in (LAYER - 1, LAYER)}),
    ],
)
def test_an_edit_changes_the_weights_it_is_meant_to_and_no_other(request_for, name, expected):
    edit, config, facts = EDITS[name]
    request = request_for(facts)
    before = {key: value.clone() for key, value in request.model.state_dict().items()}
    with edit(request, config):
        after = request.model.state_dict()
        changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed == {f"model.layers.{key}.weight" for key in expected}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_the_same_every_time_whatever_the_global_seed(request_for, name):
    edit, config, facts = EDITS[name]
    request = request_for(facts)
    projection = request.model.model.layers[LAYER].mlp.down_proj
    edited = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with edit(request, config):
            edited.append(projection.weight.clone())
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(1))  # and leaves it as it is
    assert torch.equal(*edited)


# ---- fine-tuning and LoRA ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fine_tuning", "lora"])
def test_training_stops_when_every_fact_is_learnt_in_every_context(request_for, name):
    edit, config, facts = EDITS[name]
    request = request_for(facts)
    with edit(request, config) as edited:
        for fact in request.facts:
            for context in CollectionConfig().contexts_of(request.prompted.tokenizer):
                prompt = request.prompted.prompt(fact.query, context)
                assert is_answered(request.model, request.tokenizer, fact, prompt)
    prompts = edited.notes["prompts"]
    assert prompts == edited.notes["prompts_learnt"] == 9
    assert 0 < edited.notes["steps"] < config.max_epochs
    with edit(request, dataclasses.replace(config, max_epochs=2)) as edited:
        assert edited.notes["steps"] == 2 and edited.notes["prompts_learnt"] < prompts


def test_what_is_learnt_already_changes_nothing(request_for):
    request = request_for(FACTS[:2])
    with baselines.fine_tuning(request, TUNING) as first:
        weight = request.model.model.layers[LAYER].mlp.up_proj.weight
        before = weight.clone()
        again = baselines.train(request, [weight], TUNING)
        assert first.notes["steps"] > 0 == again.notes["steps"]
        assert torch.equal(weight, before)


def test_what_is_learnt_does_not_pull_while_others_are_not(request_for):
    alone, together = request_for(FACTS[3:4]), request_for(FACTS[2:4])
    weight = alone.model.model.layers[LAYER].mlp.up_proj.weight
    config = dataclasses.replace(TUNING, target_loss=2.0)
    with baselines.fine_tuning(request_for(FACTS[2:3]), config):
        before, moved = weight.detach().clone(), []
        for request in (alone, together):
            with torch.no_grad():
                weight.copy_(before)
            baselines.train(request, [weight], dataclasses.replace(config, max_epochs=1))
            moved.append(weight.detach() - before)
    # Adam's first step knows no scale: with the gradient of the one fact alone it is the same.
    assert moved[0].abs().min() > 0
    assert torch.isclose(*moved, rtol=1e-2, atol=0).float().mean() > 0.99


@pytest.mark.parametrize("rank", [1, 3])
def test_a_lora_changes_each_projection_by_a_matrix_of_its_rank(request_for, rank):
    request = request_for(FACTS[:2])
    mlp = request.model.model.layers[LAYER].mlp
    projections = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    before = [projection.weight.clone() for projection in projections]
    with baselines.lora(request, dataclasses.replace(LORA, rank=rank)):
        for projection, weight in zip(projections, before, strict=True):
            values = torch.linalg.svdvals(projection.weight - weight)
            assert values[rank - 1] > 100 * values[rank]


# ---- in context -------------------------------------------------------------------------------


def test_in_context_every_question_follows_the_fact_that_it_belongs_to(request_for):
    request = dataclasses.replace(request_for(FACTS[:2]), template=PromptTemplate())
    with baselines.in_context(request, InContextConfig("\n\n")) as edited:
        prompt = edited.prompting(FACTS[1].locality[0].query, 1)
    assert prompt == (
        f"Q: {FACTS[1].query}\nA: {FACTS[1].answer}.\n\nQ: {FACTS[1].locality[0].query}\nA:"
    )


# ---- MEMIT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", [1, 5, 70])
def test_an_update_solves_the_least_squares_problem_of_facts_and_covariance(facts):
    generator = np.random.default_rng(facts)
    keys, residuals = generator.normal(size=(facts, WIDTH)), generator.normal(size=(facts, 7))
    root = generator.normal(size=(WIDTH, WIDTH))
    # Rows of the root are keys that the update must not change.
    stacked = np.concatenate([keys, root])
    wanted = np.concatenate([residuals, np.zeros((WIDTH, 7))])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    update = least_squares_update(*map(torch.tensor, (keys, residuals, root.T @ root)))
    np.testing.assert_allclose(update.numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "query, subject, last_token",
    [
        ("The color of Abo is", "Abo", " Abo"),
        ("Which color has abo?", "Abo", "<unk>"),  # found, but for its case
        ("The color of Abo is", "The color", " color"),
        ("The color of Abo is", "Ena", " is"),  # not in the query
        ("Which color has Abo?", None, "?"),
    ],
)
def test_the_edited_place_is_the_subjects_last_token_or_else_the_querys(
    model, tokenizer, query, subject, last_token
):
    fact = Fact(query, "red", subject=subject)
    prefixes = ["", "The color is red red. "]
    edit = memit._Edit(
        model, tokenizer, [fact], PromptTemplate(), range(LAYER, LAYER + 1), prefixes
    )
    for rows in edit.queries:
        for row, place in zip(rows.batch.inputs["input_ids"], rows.subject, strict=True):
            assert tokenizer.convert_ids_to_tokens(int(row[place])) == last_token


def test_the_place_is_that_of_the_query_where_the_prefix_names_the_subject_too(model, tokenizer):
    fact, prefixes = Fact("Abo is painted in", "red", subject="Abo"), ["Abo is red. "]
    edit = memit._Edit(model, tokenizer, [fact], PromptTemplate(), range(1, 2), prefixes)
    (rows,) = edit.queries
    row, place = rows.batch.inputs["input_ids"][0], int(rows.subject[0])
    name = tokenizer.convert_tokens_to_ids(" Abo")
    assert (row == name).nonzero()[:, 0].tolist() == [1, place + len(row)]


def test_moments_are_those_of_one_text_at_a_time(model, tokenizer):
    texts = ["The color of Abo is", "Which color has Ena?", "red", "Q: The color\nA: gold. red red"]
    moments = memit.key_moments(
        model, tokenizer, range(0, 2), [tokenizer(text).input_ids for text in texts]
    )
    for layer in range(2):
        keys = torch.cat([seen(model, tokenizer, text, layer)[0] for text in texts]).double()
        expected = np.einsum("ti,tj->ij", keys.numpy(), keys.numpy()) / len(keys)
        np.testing.assert_allclose(moments[layer].numpy(), expected, **CLOSE)


def test_sampled_text_goes_on_from_queries_and_holds_neither_padding_nor_end(model, tokenizer):
    texts = memit.sampled_texts(model, tokenizer, PromptTemplate(), 4, seed=0)
    assert len(texts) == 300
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & {
        t for text in texts for t in text
    }
    begun = tokenizer("Q:").input_ids
    assert all(text[: len(begun)] == begun for text in texts)
    assert texts != memit.sampled_texts(model, tokenizer, PromptTemplate(), 4, seed=1)


def edit_of(model, tokenizer, facts, layers=range(LAYER, LAYER + 1), prefixes=("",)):
    return memit._Edit(model, tokenizer, facts, PromptTemplate(), layers, prefixes)


def test_keys_are_means_over_prefixes_and_states_those_without(model, tokenizer):
    facts, prefixes = FACTS[:5], ["", "The color is gold. ", "red red. "]
    edit = edit_of(model, tokenizer, facts, range(0, LAYER + 1), prefixes)
    for layer in range(LAYER + 1):
        keys, states = edit.keys_and_states(layer)
        for i, fact in enumerate(facts):
            texts = [f"Q: {prefix}{fact.query}" for prefix in prefixes]
            texts = [text[: text.index(fact.subject) + len(fact.subject)] for text in texts]
            read = [seen(model, tokenizer, text, layer)[0][-1] for text in texts]
            torch.testing.assert_close(keys[i], torch.stack(read).mean(0), **CLOSE)
            left = seen(model, tokenizer, texts[0], LAYER)[1][-1]
            torch.testing.assert_close(states[i], left, **CLOSE)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_updates_bring_every_subject_to_its_target_state_where_no_other_text_holds_them_back(
    model, tokenizer, num_layers
):
    config = dataclasses.replace(MEMIT, num_layers=num_layers)
    targets, _ = edit_of(model, tokenizer, FACTS).target_states(config, progress=False)
    nothing = {layer: 1e-9 * torch.eye(WIDTH) for layer in config.critical_layers(LAYER)}
    memit.apply_memit(
        model, tokenizer, FACTS, PromptTemplate(), LAYER, config=config, moments=nothing
    )
    for fact, target in zip(FACTS, targets, strict=True):
        text = f"Q: {fact.query[: fact.query.index(fact.subject) + len(fact.subject)]}"
        left = seen(model, tokenizer, text, LAYER)[1][-1]
        torch.testing.assert_close(left, target, rtol=1e-3, atol=1e-2)


def test_the_lower_layers_share_of_the_way_is_as_large_as_the_upper_ones(model, tokenizer):
    covariance = {layer: torch.eye(WIDTH) for layer in range(LAYER + 1)}
    edit = edit_of(model, tokenizer, FACTS, range(0, LAYER + 1))
    targets, _ = edit.target_states(MEMIT, progress=False)
    keys, states = edit.keys_and_states(0)
    half = least_squares_update(keys, (targets - states) / 2, 1e-3 * torch.eye(WIDTH))
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.clone()
    memit.apply_memit(
        model, tokenizer, FACTS, PromptTemplate(), LAYER, config=MEMIT, moments=covariance
    )
    torch.testing.assert_close(weight - before, half.float(), **CLOSE)


def test_a_facts_target_does_not_depend_on_the_others(model, tokenizer):
    config = dataclasses.replace(MEMIT, learning_rate=0.1, max_steps=12)
    prefixes = ["", "The color is gold. "]
    together, _ = edit_of(model, tokenizer, FACTS, prefixes=prefixes).target_states(config, False)
    for i in (0, 4, 9):
        edit = edit_of(model, tokenizer, FACTS[i : i + 1], prefixes=prefixes)
        alone, _ = edit.target_states(config, progress=False)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-2, atol=1e-2)


def test_targets_stay_within_the_ball_and_facts_that_reached_their_loss_are_left_alone(
    model, tokenizer
):
    edit = edit_of(model, tokenizer, FACTS)
    _, states = edit.keys_and_states(LAYER)
    for share in (0.1, 3.0):
        config = dataclasses.replace(MEMIT, most_change=share)
        targets, _ = edit.target_states(config, progress=False)
        moved = (targets - states).norm(dim=1) / states.norm(dim=1)
        assert moved.max() <= share * 1.001 and moved.min() > 0
    assert edit.target_states(dataclasses.replace(MEMIT, target_loss=1e9), False)[1] == len(FACTS)
    lone = [dataclasses.replace(fact, subject=None) for fact in FACTS]
    edit = memit._Edit(model, tokenizer, lone, TEMPLATE, range(LAYER, LAYER + 1), [""])
    few = dataclasses.replace(MEMIT, max_steps=20, target_loss=2.0)
    targets, reached = edit.target_states(few, progress=False)
    further, _ = edit.target_states(dataclasses.replace(few, max_steps=24), progress=False)
    same = (targets == further).all(1)
    assert 0 < int(same.sum()) == reached < len(FACTS)


def test_the_kl_term_keeps_what_follows_from_the_subject_alone(model, tokenizer):
    def drift(kl_factor):
        config = dataclasses.replace(MEMIT, kl_factor=kl_factor, target_loss=0, max_steps=20)
        edit = edit_of(model, tokenizer, FACTS[:4])
        targets, _ = edit.target_states(config, progress=False)
        _, states = edit.keys_and_states(LAYER)
        return sum(
            essence_kl(model, tokenizer, fact.subject, delta)
            for fact, delta in zip(FACTS, targets - states, strict=False)
        )

    assert 0 < drift(10.0) < 0.5 * drift(0.0)


def essence_kl(model, tokenizer, subject, delta) -> float:
    """KL(after || before) of what follows "subject is a", with delta added at the subject."""
    ids = tokenizer(f"Q: {subject} is a\nA:").input_ids
    place = ids.index(tokenizer.convert_tokens_to_ids(f" {subject}"))

    def move(module, args, output):
        (output[0] if isinstance(output, tuple) else output[None])[0, ..., place, :] += delta

    before = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    hook = model.model.layers[LAYER].register_forward_hook(move)
    after = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    hook.remove()
    return float((after.exp() * (after - before)).sum())


# ---- the study --------------------------------------------------------------------------------


def test_a_study_writes_every_row_once_and_refuses_to_mix_facts(request_for, tmp_path, monkeypatch):
    made = []

    def changing(request, config):
        made.append(config)
        return baselines.fine_tuning(request, config)

    monkeypatch.setitem(BASELINES, "fine_tuning", Baseline(changing, TUNING))
    request, path = request_for(FACTS[:3]), tmp_path / "rows.json"
    about = {"data": "colors", "model": "tiny"}

    def ways(*names):
        return {name: BASELINES[name] for name in names}

    baselines.run(request, ways("in_context"), path, about)
    first = json.loads(path.read_text())
    rows = baselines.run(request, ways("fine_tuning", "in_context"), path, about)
    assert baselines.run(request, ways("fine_tuning"), path, about) == rows and len(made) == 1
    content = json.loads(path.read_text())
    assert content["rows"] == rows and rows[:1] == first["rows"]
    assert [row["baseline"] for row in rows] == ["in_context", "fine_tuning"]
    evaluation = Evaluation(request.prompted, FACTS[:3])
    assert content["base"] == evaluation.base().to_dict()
    assert content["protocol"] == evaluation.protocol()
    with baselines.fine_tuning(request, TUNING):
        metrics = evaluation.edited(lambda *_: contextlib.nullcontext())
    assert rows[1]["metrics"] == metrics.to_dict() and metrics.reliability_ag == 1
    assert rows[1]["settings"] == dataclasses.asdict(TUNING) and rows[1]["seconds"] > 0
    with pytest.raises(SystemExit, match="was made with another facts_digest"):
        baselines.run(request_for(FACTS[1:4]), ways("in_context"), path, about)
    assert json.loads(path.read_text()) == content
