"""The hypernetwork: ridge regression against least squares, and collection that starts from it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import tiny
import torch
from tiny import CONTEXTS, FACTS, LAYER, make_encoder, make_language_model, make_tokenizer, widened

from meg_kernels.editing import neuron_fit
from meg_kernels.editing.collect import collect
from meg_kernels.editing.hypernetwork import PARTS, Hypernetwork, said_by
from meg_kernels.editing.neuron_fit import CollectionConfig
from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.nn import attach
from meg_kernels.storage import read_tensors

CONFIG = CollectionConfig(learning_rate=0.1, max_steps=60, batch_size=2, contexts=CONTEXTS, pilot=4)


def known_map(facts: int, features: int, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(facts)
    said = torch.randn(facts, features, generator=rng) + 3
    weight = torch.randn(features, dim, generator=rng)
    return said, said @ weight + torch.arange(dim)


@pytest.mark.parametrize("facts, features", [(7, 20), (20, 20), (40, 6)])
def test_it_is_the_ridge_regression_that_least_squares_finds(facts, features):
    said, neurons = known_map(facts, features)
    neurons += torch.randn(neurons.shape, generator=torch.Generator().manual_seed(1))
    ridge = 2.5
    x, y = (t.double().numpy() - t.double().numpy().mean(0) for t in (said, neurons))
    # A ridge is a row for each feature that says its weight is zero.
    rows = np.concatenate([x, ridge**0.5 * np.eye(features)])
    wanted, *_ = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((features, 5))]), rcond=None)
    made = Hypernetwork.fitted(said, neurons, ridge)
    np.testing.assert_allclose(made.weight.numpy(), wanted, rtol=1e-3, atol=1e-4)
    new = torch.randn(3, features)
    expected = (new.double().numpy() - said.double().numpy().mean(0)) @ wanted
    expected += neurons.double().numpy().mean(0)
    np.testing.assert_allclose(made(new).numpy(), expected, rtol=1e-3, atol=1e-3)


def test_it_tells_neurons_of_facts_that_it_never_saw():
    said, neurons = known_map(200, 20)
    made = Hypernetwork.fitted(said[:150], neurons[:150], ridge=1e-6)
    torch.testing.assert_close(made(said[150:]), neurons[150:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("facts, neurons", [(0, 0), (3, 2)])
def test_facts_and_neurons_must_pair_up(facts, neurons):
    with pytest.raises(ValueError, match=f"{facts} facts and {neurons} neurons do not pair up"):
        Hypernetwork.fitted(torch.zeros(facts, 4), torch.zeros(neurons, 4))


@pytest.fixture
def prompted():
    tokenizer = make_tokenizer()
    return PromptedModel.of(make_language_model(tokenizer), tokenizer)


def test_what_a_fact_says_is_its_query_its_answer_and_the_answers_tokens(prompted):
    encoder, facts = make_encoder(), [FACTS[0], FACTS[9]]
    answers = [prompted.tokenizer(f" {fact.answer}.").input_ids for fact in facts]
    said = said_by(prompted, encoder, facts, answers)
    embedded = prompted.model.get_input_embeddings().weight
    for row, fact, ids in zip(said, facts, answers, strict=True):
        parts = row.split([32] * 4)
        assert len(row) == 4 * 32
        expected = [
            encoder.encode([fact.query])[0],
            encoder.encode([fact.answer])[0],
            embedded[ids[0]],
            embedded[ids].mean(0),
        ]
        for part, vector, square in zip(parts, expected, PARTS, strict=True):
            torch.testing.assert_close(part, vector / vector.norm() * square**0.5)


class Memory:
    """In place of a hypernetwork that has learnt: it knows each fact by what it says."""

    def __init__(self, said: torch.Tensor, neurons: torch.Tensor):
        self.said, self.neurons, self.learnt_from = said, neurons, []

    def fitted(self, said: torch.Tensor, neurons: torch.Tensor):
        self.learnt_from.append(len(said))
        for row, neuron in zip(said, neurons, strict=True):
            at = int((self.said - row).norm(dim=1).argmin())
            torch.testing.assert_close(self.neurons[at], neuron)
        return lambda asked: self.neurons[torch.cdist(asked, self.said).argmin(1)]


def flat(collection) -> torch.Tensor:
    return collection.neurons.layout.pack(collection.neurons)


def collected(prompted, facts=FACTS, config=CONFIG, **more):
    attached = attach(prompted.model, LAYER)
    try:
        return collect(prompted, attached, facts, config, **more)
    finally:
        attached.detach()


def test_facts_whose_predicted_neuron_answers_take_no_step(prompted, monkeypatch):
    encoder = make_encoder()
    plain = collected(prompted, config=dataclasses.replace(CONFIG, max_steps=200))
    assert plain.learnt.all() and plain.steps.min() > 0
    said = said_by(
        prompted,
        encoder,
        FACTS,
        [prompted.target(prompted.prompt(fact.query), fact.answer)[1] for fact in FACTS],
    )
    memory = Memory(said, flat(plain))
    monkeypatch.setattr("meg_kernels.editing.collect.Hypernetwork", memory)
    monkeypatch.setattr(neuron_fit, "SURE", 0.0)
    config = dataclasses.replace(CONFIG, max_steps=200)
    found = collected(prompted, config=config, encoder=encoder, initial=plain.initial)
    assert memory.learnt_from == [4]  # what it tells is not learnt from again
    assert sorted(found.steps.tolist())[:6] == [0] * 6 and (found.steps == 0).sum() == 6
    assert found.learnt.all()
    torch.testing.assert_close(flat(found), flat(plain))


def test_a_wrong_prediction_is_fitted_and_learnt_from(prompted, monkeypatch):
    encoder, learnt_from = make_encoder(), []

    class Wrong:
        @staticmethod
        def fitted(said, neurons):
            learnt_from.append(len(said))
            return lambda asked: neurons.mean(0).expand(len(asked), -1)

    monkeypatch.setattr("meg_kernels.editing.collect.Hypernetwork", Wrong)
    config = dataclasses.replace(CONFIG, max_steps=200)
    found = collected(prompted, config=config, encoder=encoder)
    assert learnt_from[0] == 4 and len(learnt_from) > 1  # again when there is half as much again
    assert all(later > 1.5 * before for before, later in itertools.pairwise(learnt_from))
    for i, fact in enumerate(FACTS):
        wide = widened(prompted.model, LAYER, found.neurons[i : i + 1])
        for context in CONTEXTS:
            prompt, target = prompted.target(prompted.prompt(fact.query, context), fact.answer)
            logits = wide(torch.tensor([prompt + target]), use_cache=False).logits[0]
            right = logits[len(prompt) - 1 : -1].argmax(-1).tolist() == target
            assert right or not found.learnt[i]
    assert found.learnt.sum() >= 8


def test_an_interrupted_collection_predicts_as_a_whole_one_does(prompted, monkeypatch, tmp_path):
    encoder = make_encoder()
    whole = collected(prompted, encoder=encoder)
    run, runs = neuron_fit.NeuronFit.run, []

    def until_fourth(fit, config):
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append(fit.is_predicted)
        run(fit, config)

    with monkeypatch.context() as patch:
        patch.setattr(neuron_fit.NeuronFit, "run", until_fourth)
        with pytest.raises(KeyboardInterrupt):
            collected(prompted, encoder=encoder, work_folder=tmp_path)
    assert runs == [False, False, True]
    resumed = collected(prompted, encoder=encoder, work_folder=tmp_path)
    assert torch.equal(flat(resumed), flat(whole))
    assert torch.equal(resumed.steps, whole.steps)
    assert len([*tmp_path.rglob("*.safetensors")]) == 5
    assert all(read_tensors(path)[0]["seconds"] > 0 for path in tmp_path.rglob("*.safetensors"))


def test_few_facts_and_those_of_no_pilot_are_fitted_from_one_neuron(prompted, monkeypatch):
    monkeypatch.setattr("meg_kernels.editing.collect.said_by", tiny.interrupt)
    encoder, brief = make_encoder(), dataclasses.replace(CONFIG, max_steps=2)
    few = collected(prompted, FACTS[:4], brief, encoder=encoder)
    assert torch.equal(flat(few), flat(collected(prompted, FACTS[:4], brief)))
    none = dataclasses.replace(brief, pilot=None)
    assert len(collected(prompted, FACTS, none, encoder=encoder).steps) == len(FACTS)
    with pytest.raises(KeyboardInterrupt):
        collected(prompted, FACTS, brief, encoder=encoder)


@pytest.mark.parametrize("unsure", [0.0, 1e9])
def test_where_rounding_could_decide_the_model_is_asked_as_it_is(prompted, monkeypatch, unsure):
    """Margins that are wrong by far are not believed where they are called unsure."""
    look = neuron_fit.NeuronFit._look

    def wrong(fit, facts, values, turn, with_gradient):
        looked = look(fit, facts, values, turn, with_gradient)
        return looked if with_gradient else dataclasses.replace(looked, margins=-looked.margins)

    sound = collected(prompted, config=dataclasses.replace(CONFIG, max_steps=200))
    monkeypatch.setattr(neuron_fit.NeuronFit, "_look", wrong)
    monkeypatch.setattr(neuron_fit, "ROUNDED", unsure)
    monkeypatch.setattr(neuron_fit, "OF_LOGITS", 0.0)
    monkeypatch.setenv("MEG_KERNELS_BFLOAT16", "always")
    monkeypatch.setattr("meg_kernels.precision.multiplies_bfloat16", lambda device: True)
    found = collected(prompted, config=dataclasses.replace(CONFIG, max_steps=200))
    both = found.learnt & sound.learnt  # either way, since what was fitted is tried as well
    assert both.sum() >= 8
    longer = found.neurons.value.norm(dim=1) / sound.neurons.value.norm(dim=1)
    assert (longer[both].mean() > 0.95) == (unsure > 0)


def test_facts_are_added_with_what_those_before_tell(monkeypatch):
    """With enough facts edited before, none of those that are added is a pilot."""
    monkeypatch.setattr("meg_kernels.editing.collect.FEWEST_PREDICTED", 2)
    config = dataclasses.replace(tiny.BANK.collection, pilot=5)
    editor = tiny.make_editor(dataclasses.replace(tiny.BANK, collection=config))
    tiny.edit(editor)
    seen, learnt, run = [], [], neuron_fit.NeuronFit.run

    def look(fit, config):
        seen.append((fit.is_predicted, len(fit.flat)))
        run(fit, config)

    class Noting(Hypernetwork):
        @classmethod
        def fitted(cls, said, neurons):
            learnt.append((said, neurons))
            return Hypernetwork.fitted(said, neurons)

    monkeypatch.setattr(neuron_fit.NeuronFit, "run", look)
    monkeypatch.setattr("meg_kernels.editing.collect.Hypernetwork", Noting)
    editor.add(FACTS[5:6])  # too few to pay
    assert seen == [(False, 1)] and not learnt
    editor.add(FACTS[6:9])
    assert seen[1:] == [(True, 3)]
    ((said, neurons),) = learnt
    edits = editor.edits
    assert len(said) == len(neurons) == 6
    assert torch.equal(neurons, edits.layout.pack(edits.neurons[:6]))
    own = edits.conditions[:6].cpu()
    wanted = own / own.norm(dim=1, keepdim=True) * PARTS[0] ** 0.5
    torch.testing.assert_close(said[:, : own.shape[1]], wanted)
    assert editor.generate([fact.query for fact in FACTS[6:9]]) == [f.answer for f in FACTS[6:9]]


def test_wild_predictions_are_given_up_for_the_common_start(prompted, monkeypatch):
    encoder, config = make_encoder(), dataclasses.replace(CONFIG, max_steps=200)

    class Wild:
        @staticmethod
        def fitted(said, neurons):
            wild = torch.full((neurons.shape[1],), torch.nan)
            far = 1e3 * neurons.mean(0)
            return lambda asked: torch.stack([wild if i % 2 else far for i in range(len(asked))])

    monkeypatch.setattr("meg_kernels.editing.collect.Hypernetwork", Wild)
    found = collected(prompted, config=config, encoder=encoder)
    plain = collected(prompted, config=dataclasses.replace(config, pilot=None))
    assert flat(found).isfinite().all()
    assert found.learnt.sum() >= plain.learnt.sum() - 1 and plain.learnt.sum() >= 8


@pytest.mark.parametrize("logits, unsure", [(8.0, 0.5), (200.0, 200 / 128)])
def test_large_logits_are_rounded_by_more(prompted, monkeypatch, logits, unsure):
    score, seen = PromptedModel.score, []

    def large(model, batch, with_margins=False):
        scores = score(model, batch, with_margins)
        if scores.largest is None:
            return scores
        return dataclasses.replace(scores, largest=torch.full_like(scores.largest, logits))

    monkeypatch.setattr(PromptedModel, "score", large)
    monkeypatch.setenv("MEG_KERNELS_BFLOAT16", "always")
    monkeypatch.setattr("meg_kernels.precision.multiplies_bfloat16", lambda device: True)
    settle = neuron_fit.NeuronFit.settle
    monkeypatch.setattr(
        neuron_fit.NeuronFit, "settle", lambda fit: (seen.append(fit.unsure), settle(fit))
    )
    collected(prompted, FACTS[:2], dataclasses.replace(CONFIG, max_steps=2))
    torch.testing.assert_close(seen[0], torch.full((2,), unsure))
