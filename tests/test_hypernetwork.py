"""The hypernetwork: ridge regression against least squares, and collection that starts from it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import tiny
import torch
from tiny import CONTEXTS, FACTS, LAYER, make_encoder, make_language_model, make_tokenizer, widened

from meg_kernels import EditorConfig, Fact, GeneratorConfig, MeGEditor
from meg_kernels.editing import neuron_fit
from meg_kernels.editing.collect import Foresight, collect
from meg_kernels.editing.contexts import Context
from meg_kernels.editing.hypernetwork import known_answers
from meg_kernels.editing.neuron_fit import CollectionConfig
from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.neuron import NeuronLayout
from meg_kernels.nn import attach
from meg_kernels.routing.generators import HypernetworkGenerator, build_generator
from meg_kernels.routing.ridge import ANSWER, QUERY, ridge_regression, said
from meg_kernels.storage import read_tensors

CONFIG = CollectionConfig(learning_rate=0.1, max_steps=60, batch_size=2, contexts=CONTEXTS, pilot=4)
TEMPLATES = (Context("plain"), Context("why", question="Tell: {}", beginning="Tell: {}"))
HYPER = dataclasses.replace(
    tiny.CONFIG,
    generator=GeneratorConfig.hypernetwork(),
    collection=dataclasses.replace(tiny.CONFIG.collection, pilot=4, batch_size=2, max_steps=200),
)


def known_map(facts: int, features: int, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(facts)
    of_facts = torch.randn(facts, features, generator=rng) + 3
    weight = torch.randn(features, dim, generator=rng)
    return of_facts, of_facts @ weight + torch.arange(dim)


@pytest.mark.parametrize("facts, features", [(7, 20), (20, 20), (40, 6)])
def test_it_is_the_ridge_regression_that_least_squares_finds(facts, features):
    of_facts, neurons = known_map(facts, features)
    neurons += torch.randn(neurons.shape, generator=torch.Generator().manual_seed(1))
    ridge = 2.5
    x, y = (t.double().numpy() - t.double().numpy().mean(0) for t in (of_facts, neurons))
    # A ridge is a row for each feature that says its weight is zero.
    rows = np.concatenate([x, ridge**0.5 * np.eye(features)])
    wanted, *_ = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((features, 5))]), rcond=None)
    x_mean, y_mean, weight = ridge_regression(of_facts, neurons, ridge)
    np.testing.assert_allclose(weight.numpy(), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(x_mean, of_facts.mean(0))
    torch.testing.assert_close(y_mean, neurons.mean(0))


LAYOUT = NeuronLayout(3, 2, False, "identity")


def hypernetwork(features: int = 20) -> HypernetworkGenerator:
    made = build_generator(GeneratorConfig.hypernetwork(), LAYOUT, features)
    assert isinstance(made, HypernetworkGenerator)
    return made


def test_it_tells_neurons_of_facts_that_it_never_saw():
    of_facts, neurons = known_map(200, 20)
    made = hypernetwork()
    made.learn(of_facts[:150], LAYOUT.unpack(neurons[:150]), ridge=1e-6)
    told = LAYOUT.pack(made.generate(of_facts[150:]))
    torch.testing.assert_close(told, neurons[150:], rtol=1e-3, atol=1e-3)


def test_what_it_cannot_learn_from_is_refused():
    none, one = torch.zeros(0, 20), LAYOUT.unpack(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="there are no facts to learn from"):
        hypernetwork().learn(none, LAYOUT.unpack(torch.zeros(0, 5)))
    with pytest.raises(ValueError, match="conditions is"):
        hypernetwork().learn(none, one)
    with pytest.raises(ValueError, match="must be finite"):
        hypernetwork().learn(torch.full((1, 20), torch.nan), one)
    with pytest.raises(ValueError, match="ridge"):
        hypernetwork().learn(torch.zeros(1, 20), one, ridge=0.0)


@pytest.fixture
def prompted():
    tokenizer = make_tokenizer()
    return PromptedModel.of(make_language_model(tokenizer), tokenizer)


def test_what_a_fact_says_is_its_query_its_answer_and_the_answers_tokens(prompted):
    encoder, facts = make_encoder(), [FACTS[0], FACTS[9], FACTS[6]]
    conditions = 3 * encoder.encode([fact.query for fact in facts])
    of_facts = said(conditions, known_answers(prompted, encoder, facts))
    embedded = prompted.model.get_input_embeddings().weight
    for row, condition, fact in zip(of_facts, conditions, facts, strict=True):
        ids = [*prompted.tokenizer(f" {fact.answer}.").input_ids, prompted.tokenizer.eos_token_id]
        parts = row.split([32] * 4)
        assert len(row) == 4 * 32
        expected = [
            condition,
            encoder.encode([fact.answer])[0],
            embedded[ids[0]],
            embedded[ids].mean(0),
        ]
        for part, vector, square in zip(parts, expected, (QUERY, *ANSWER), strict=True):
            torch.testing.assert_close(part, vector / vector.norm() * square**0.5)
    assert known_answers(prompted, encoder, []).shape == (0, 3 * 32)


class Memory:
    """In place of a hypernetwork that has learnt: it knows each fact by what it says."""

    def __init__(self, of_facts: torch.Tensor, neurons):
        self.said, self.neurons, self.learnt_from = of_facts, neurons, []

    def learnt(self, foresight, rows, neurons):
        self.learnt_from.append(len(rows))
        for row, neuron in zip(rows, neurons.layout.pack(neurons), strict=True):
            at = int((self.said - foresight.said[row]).norm(dim=1).argmin())
            torch.testing.assert_close(neurons.layout.pack(self.neurons)[at], neuron)
        return self

    def generate(self, asked: torch.Tensor):
        return self.neurons[torch.cdist(asked, self.said).argmin(1)]


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
    assert plain.learnt.all() and plain.steps.min() > 0 and plain.hypernetwork is None
    conditions = encoder.encode([fact.query for fact in FACTS])
    memory = Memory(said(conditions, known_answers(prompted, encoder, FACTS)), plain.neurons)
    monkeypatch.setattr(Foresight, "learnt", lambda *args: memory.learnt(*args))
    monkeypatch.setattr(neuron_fit, "SURE", 0.0)
    config = dataclasses.replace(CONFIG, max_steps=200)
    found = collected(prompted, config=config, encoder=encoder, initial=plain.initial)
    assert memory.learnt_from == [4]  # what it tells is not learnt from again
    assert sorted(found.steps.tolist())[:6] == [0] * 6 and (found.steps == 0).sum() == 6
    assert found.learnt.all() and found.hypernetwork is memory and found.num_predicted == 6
    assert torch.equal(found.told, found.steps == 0)
    torch.testing.assert_close(flat(found), flat(plain))
    assert torch.equal(flat(found)[found.told], flat(plain)[found.told])  # to the last bit


class Guess:
    """In place of a hypernetwork: it tells what a function of the neurons and the number says."""

    def __init__(self, layout, tell):
        self.layout, self.tell = layout, tell

    def generate(self, asked: torch.Tensor):
        return self.layout.unpack(self.tell(len(asked)))


def guessing(monkeypatch, tell, learnt_from=None):
    def learnt(foresight, rows, neurons):
        if learnt_from is not None:
            learnt_from.append(len(rows))
        known = neurons.layout.pack(neurons)
        return Guess(neurons.layout, lambda count: tell(known, count))

    monkeypatch.setattr(Foresight, "learnt", learnt)


def test_a_wrong_prediction_is_fitted_and_learnt_from(prompted, monkeypatch):
    encoder, learnt_from = make_encoder(), []
    guessing(monkeypatch, lambda known, n: known.mean(0).expand(n, -1), learnt_from)
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
        runs.append(fit.predicted is not None)
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
    monkeypatch.setattr("meg_kernels.editing.collect.said", tiny.interrupt)
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

    def wrong(fit, facts, values, context, with_gradient):
        looked = look(fit, facts, values, context, with_gradient)
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
    seen, learnt, run, learn = [], [], neuron_fit.NeuronFit.run, HypernetworkGenerator.learn

    def look(fit, config):
        seen.append((fit.predicted is not None, len(fit.flat)))
        run(fit, config)

    def noting(made, of_facts, neurons):
        learnt.append((of_facts, neurons))
        learn(made, of_facts, neurons)

    monkeypatch.setattr(neuron_fit.NeuronFit, "run", look)
    monkeypatch.setattr(HypernetworkGenerator, "learn", noting)
    editor.add(FACTS[5:6])  # too few to pay
    assert seen == [(False, 1)] and not learnt
    editor.add(FACTS[6:9])
    assert seen[1:] == [(True, 3)]
    ((of_facts, neurons),) = learnt
    edits = editor.edits
    assert len(of_facts) == len(neurons) == 6
    assert torch.equal(edits.layout.pack(neurons), edits.layout.pack(edits.neurons[:6]))
    own = edits.conditions[:6].cpu()
    wanted = own / own.norm(dim=1, keepdim=True) * QUERY**0.5
    torch.testing.assert_close(of_facts[:, : own.shape[1]], wanted)
    assert editor.generate([fact.query for fact in FACTS[6:9]]) == [f.answer for f in FACTS[6:9]]


def test_wild_predictions_are_given_up_for_the_common_start(prompted, monkeypatch):
    encoder, config = make_encoder(), dataclasses.replace(CONFIG, max_steps=200)

    def wild(known, n):
        none = torch.full((known.shape[1],), torch.nan)
        return torch.stack([none if i % 2 else 1e3 * known.mean(0) for i in range(n)])

    guessing(monkeypatch, wild)
    found = collected(prompted, config=config, encoder=encoder)
    plain = collected(prompted, config=dataclasses.replace(config, pilot=None))
    assert flat(found).isfinite().all()
    assert found.learnt.sum() >= plain.learnt.sum() - 1 and plain.learnt.sum() >= 8


@pytest.mark.parametrize("sure", [0.0, 1e9])
def test_a_prediction_is_tried_in_all_contexts(prompted, monkeypatch, sure):
    encoder, contexts = make_encoder(), (*TEMPLATES, Context("raw", "raw"))
    config = dataclasses.replace(CONFIG, max_steps=200, contexts=contexts)
    plain = collected(prompted, FACTS[:9], config)
    conditions = encoder.encode([fact.query for fact in FACTS[:9]])
    memory = Memory(said(conditions, known_answers(prompted, encoder, FACTS[:9])), plain.neurons)
    monkeypatch.setattr(Foresight, "learnt", lambda *args: memory)
    monkeypatch.setattr(neuron_fit, "SURE", sure)
    looks, look = [], neuron_fit.NeuronFit._look

    def noting(fit, facts, values, context, with_gradient):
        if fit.predicted is not None:
            looks.append((context, with_gradient))
        return look(fit, facts, values, context, with_gradient)

    monkeypatch.setattr(neuron_fit.NeuronFit, "_look", noting)
    found = collected(prompted, FACTS[:9], config, encoder=encoder, initial=plain.initial)
    if sure:
        assert not found.told.any() and (0, True) in looks and (1, True) in looks
    else:
        assert {(0, False), (1, False), (2, False)} == {*looks} and found.told.sum() == 5


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


# The generator that knows facts that it never saw, in an editor.
ALONE = [dataclasses.replace(fact, locality=()) for fact in FACTS]  # others can be tuned with


@pytest.fixture
def hyper(monkeypatch) -> MeGEditor:
    monkeypatch.setattr(neuron_fit, "SURE", 0.0)
    editor = tiny.make_editor(HYPER)
    tiny.edit(editor, ALONE)
    return editor


def answered(editor: MeGEditor, facts) -> list[bool]:
    said_now = editor.generate([fact.query for fact in facts], tiny.MOST)
    return [text == fact.answer for text, fact in zip(said_now, facts, strict=True)]


def test_facts_that_it_does_not_tell_keep_their_own_neurons(hyper):
    edits = hyper.edits
    assert edits.learnt.sum() >= 9 and not edits.generated.all()
    assert answered(hyper, ALONE) == edits.learnt.tolist()
    assert edits.report.training.answered == pytest.approx(edits.generated.double().mean().item())
    made = edits.generator.generate(edits.inputs())
    rows = edits.generated
    torch.testing.assert_close(
        edits.layout.pack(made)[rows], edits.layout.pack(edits.neurons)[rows], rtol=1e-4, atol=1e-5
    )
    assert hyper.evaluate().metrics.reliability_ag >= 0.9


def test_it_is_saved_without_the_neurons_that_it_makes(hyper, tmp_path):
    every = torch.ones(len(ALONE), dtype=torch.bool)
    flat = hyper.edits.layout.pack(hyper.edits.neurons)
    told = hyper.edits.layout.pack(hyper.edits.generator.generate(hyper.edits.inputs()))
    every[[0, 3]] = False
    some = hyper.edits.layout.unpack(told.where(every.unsqueeze(1), flat))
    hyper.router.put(dataclasses.replace(hyper.edits, generated=every, neurons=some))
    hyper.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("edits-*.safetensors")
    tensors, _ = read_tensors(path)
    assert len(tensors["neurons"]) == 2 and len(tensors["conditions"]) == len(ALONE)
    assert len(tensors["answers"]) == len({fact.answer for fact in ALONE}) < len(ALONE)
    loaded = tiny.load(tmp_path)
    assert torch.equal(loaded.edits.answers, hyper.edits.answers)
    assert torch.equal(loaded.edits.generated, every)
    torch.testing.assert_close(
        loaded.edits.layout.pack(loaded.edits.neurons), hyper.edits.layout.pack(some)
    )
    queries = tiny.MIXED[:12]
    assert loaded.generate(queries, tiny.MOST) == hyper.generate(queries, tiny.MOST)
    loaded.save_pretrained(tmp_path / "again")
    assert path.name in [each.name for each in (tmp_path / "again").iterdir()]


@pytest.mark.parametrize("tensor", ["answers", "neurons"])
def test_a_damaged_folder_is_refused(hyper, tmp_path, tensor):
    from meg_kernels.routing.saving import _check_shapes
    from meg_kernels.storage import CorruptFileError

    hyper.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("edits-*.safetensors")
    tensors, _ = read_tensors(path)
    layout, config = hyper.edits.layout, hyper.edits.generator.config
    _check_shapes(path, tensors, ALONE, layout, config)
    tensors[tensor] = torch.cat([tensors[tensor], torch.zeros(1, tensors[tensor].shape[1])])
    with pytest.raises(CorruptFileError, match=tensor):
        _check_shapes(path, tensors, ALONE, layout, config)
    del tensors[tensor]
    with pytest.raises(CorruptFileError, match=f"{tensor} is missing"):
        _check_shapes(path, tensors, ALONE, layout, config)


def test_facts_are_added_changed_removed_and_learnt(hyper):
    editor, more = hyper, [Fact("Eruk is painted in", "gold", subject="Eruk"), tiny.OTHER_FACTS[3]]
    before = editor.edits.generator
    editor.remove(ALONE[2])
    editor.add(more)
    assert editor.edits.generator is before
    assert all(answered(editor, more)) and not answered(editor, [ALONE[2]])[0]
    left = [fact for fact in ALONE if fact is not ALONE[2]]
    assert sum(answered(editor, left)) >= 8
    editor.add([dataclasses.replace(ALONE[4], answer="red")], replace=True)
    assert editor.generate([ALONE[4].query], tiny.MOST) == ["red"]
    edits = editor.edits
    editor.train()  # a hypernetwork stays as it is
    assert editor.edits is edits
    editor.remove([])
    assert editor.edits is edits
    editor.remove(editor.facts)
    assert editor.facts == [] and editor.edits.generator is before
    editor.add(more)
    assert all(answered(editor, more))


def test_without_snapping_it_is_asked_with_the_querys_own_condition(hyper, monkeypatch):
    config = dataclasses.replace(hyper.router.config, snap=False)
    hyper.router.config = config
    asked = []
    generate = HypernetworkGenerator.generate
    monkeypatch.setattr(
        HypernetworkGenerator, "generate", lambda made, z: (asked.append(z), generate(made, z))[1]
    )
    every = torch.ones(len(ALONE), dtype=torch.bool)
    hyper.router.put(dataclasses.replace(hyper.edits, generated=every))
    query = ALONE[0].paraphrases[0]
    routing = hyper.route([query])
    assert routing.accepted.all()
    hyper.router.neurons(routing)
    (z,) = asked
    own = hyper.encoder.encode([query])
    torch.testing.assert_close(z, said(own, hyper.edits.answers[routing.fact]))


def test_facts_with_one_query_and_other_answers_are_told_apart_in_the_cache(hyper):
    edits = hyper.edits
    same = edits.conditions[:1].expand(len(ALONE), -1).clone()
    assert len({*dataclasses.replace(edits, conditions=same).keys}) == len(
        {fact.answer for fact in ALONE}
    )


def test_without_snapping_a_changed_answer_is_not_the_cached_one(hyper):
    hyper.router.config = dataclasses.replace(hyper.router.config, snap=False)
    every = torch.ones(len(ALONE), dtype=torch.bool)
    edits = dataclasses.replace(hyper.edits, generated=every)
    hyper.router.put(edits)
    first, _ = hyper.router.neurons(hyper.route([ALONE[0].query]))
    other = dataclasses.replace(ALONE[0], answer="gold")
    answers = known_answers(hyper.prompted, hyper.encoder, [other, *ALONE[1:]])
    changed = dataclasses.replace(edits, facts=(other, *ALONE[1:]), answers=answers)
    hyper.router.put(changed)
    second, _ = hyper.router.neurons(hyper.route([ALONE[0].query]))
    assert not torch.equal(first.value, second.value)


def test_work_of_another_hypernetwork_is_not_called_told(prompted, monkeypatch, tmp_path):
    encoder, config = make_encoder(), dataclasses.replace(CONFIG, max_steps=200)
    plain = collected(prompted, config=config)
    conditions = encoder.encode([fact.query for fact in FACTS])
    memory = Memory(said(conditions, known_answers(prompted, encoder, FACTS)), plain.neurons)
    monkeypatch.setattr(neuron_fit, "SURE", 0.0)
    given = {"encoder": encoder, "initial": plain.initial, "work_folder": tmp_path}
    monkeypatch.setattr(Foresight, "learnt", lambda *args: memory)
    once = collected(prompted, config=config, **given)
    again = collected(prompted, config=config, **given)
    assert once.told.sum() > 0 and torch.equal(again.told, once.told)
    guessing(monkeypatch, lambda known, n: known.mean(0).expand(n, -1))
    found = collected(prompted, config=config, **given)
    assert torch.equal(flat(found), flat(once)) and not found.told.any()


def test_another_generator_takes_its_place_and_gives_it_back(hyper):
    learnt = int(hyper.edits.learnt.sum())
    hyper.replace_generator(tiny.GENERATORS["mlp"])
    assert hyper.edits.answers is None and sum(answered(hyper, ALONE)) >= learnt - 1
    hyper.replace_generator(dataclasses.replace(tiny.GENERATORS["mlp"], with_answers=True))
    edits = hyper.edits
    assert edits.generator.condition_dim == 4 * 32 == edits.inputs().shape[1]
    assert edits.training.answered >= 0.9 and sum(answered(hyper, ALONE)) >= learnt - 1
    hyper.replace_generator(GeneratorConfig.hypernetwork())
    assert sum(answered(hyper, ALONE)) >= learnt - 1


def test_edits_refuse_answers_that_their_generator_does_not_know(hyper):
    with pytest.raises(ValueError, match="answers must be given to a generator"):
        dataclasses.replace(hyper.edits, answers=None)


def test_answers_and_rewording_are_not_had_together():
    with pytest.raises(ValueError, match="reword is True, but with answers"):
        dataclasses.replace(GeneratorConfig.mlp(reword=True), with_answers=True)
    both = dataclasses.replace(GeneratorConfig.mlp(), with_answers=True)
    assert not both.rewords(snap=False) and GeneratorConfig.mlp().rewords(snap=False)


def test_few_facts_are_fitted_and_learnt_afterwards():
    few = dataclasses.replace(HYPER.collection, pilot=64)
    editor = tiny.make_editor(dataclasses.replace(HYPER, collection=few))
    tiny.edit(editor)
    assert editor.edits.report.num_predicted == 0
    assert all(answered(editor, tiny.EDITED)) and len(editor.edits.generator.weight) == 4 * 32
    assert editor.edits.generator.weight.abs().sum() > 0


def test_what_is_prepared_edits_any_facts(tmp_path, monkeypatch):
    monkeypatch.setattr(neuron_fit, "SURE", 0.0)
    plain = EditorConfig(**{f.name: getattr(HYPER, f.name) for f in dataclasses.fields(HYPER)})
    config = dataclasses.replace(plain, generator=tiny.GENERATORS["mlp"])
    editor = tiny.make_editor(config)
    report = editor.prepare(
        ALONE[:7], tuning_facts=tiny.OTHER_FACTS, unrelated_queries=tiny.UNRELATED
    )
    assert "collect" in report.seconds and not editor.facts
    assert isinstance(editor.edits.generator, HypernetworkGenerator)
    base = editor.generate(tiny.MIXED[:6], tiny.MOST)
    with editor.disabled():
        assert base == editor.generate(tiny.MIXED[:6], tiny.MOST)
    editor.save_pretrained(tmp_path)
    for verb in (
        lambda: editor.set_gate(threshold=0.5),
        lambda: editor.replace_generator(GeneratorConfig.bank()),
    ):
        with pytest.raises(RuntimeError, match="no facts are edited yet, this is only prepared"):
            verb()
    with pytest.raises(ValueError, match="there are no facts to evaluate"):
        editor.evaluate()
    seen, run = [], neuron_fit.NeuronFit.run
    monkeypatch.setattr(
        neuron_fit.NeuronFit,
        "run",
        lambda fit, config: (seen.append(fit.predicted is not None), run(fit, config)),
    )
    for facts in (ALONE[7:], ALONE[:4]):
        loaded = tiny.load(tmp_path)
        assert loaded.facts == [] and "0 facts" in repr(loaded)
        loaded.add(facts)
        assert seen[0]  # and those that are lost by it are fitted again
        assert loaded.facts == list(facts) and sum(answered(loaded, facts)) >= len(facts) - 1
        assert loaded.edits.calibration.num_edited == len(facts)
        loaded.save_pretrained(tmp_path / f"{len(facts)}")
        assert tiny.load(tmp_path / f"{len(facts)}").facts == list(facts)
