"""`MeGEditor` from edit to save, on a tiny model: every answer against one query at a time.

The tiny editor here (`make_editor`) also serves the command line's tests.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tiny import (
    ANSWERS,
    BANK,
    CONFIG,
    EDITED,
    FACTS,
    FURTHER,
    GENERATORS,
    LAYER,
    LOCALITY,
    MIXED,
    MOST,
    OTHER_FACTS,
    PARAPHRASES,
    QUERIES,
    UNRELATED,
    edit,
    greedy,
    interrupt,
    load,
    make_editor,
    make_encoder,
    make_language_model,
    make_tokenizer,
    own_neuron,
    saved_editor,
    state,
    widened,
)

from meg_kernels import (
    CollectionConfig,
    CorruptFileError,
    DiTConfig,
    EditorConfig,
    Fact,
    FactsError,
    GeneratorConfig,
    MeGEditor,
    PromptTemplate,
    Router,
    TextEncoder,
)
from meg_kernels.editing import fit as fitting
from meg_kernels.editing import stages, tuning
from meg_kernels.editing.contexts import MEASURED
from meg_kernels.editing.evaluate import Evaluation
from meg_kernels.editing.prompting import PromptedModel, answers_match
from meg_kernels.familiarity import calibrate
from meg_kernels.routing import saving
from meg_kernels.routing.manifest import sealed
from meg_kernels.routing.neuron_cache import Served
from meg_kernels.routing.router import RoutingConfig
from meg_kernels.storage import read_tensors, write_tensors


@pytest.fixture(scope="module")
def mlp_folder(tmp_path_factory):
    return saved_editor(tmp_path_factory, "mlp", CONFIG)


@pytest.fixture(scope="module")
def bank_folder(tmp_path_factory):
    return saved_editor(tmp_path_factory, "bank", BANK)


@pytest.fixture
def editor(mlp_folder):
    """An editor with edited facts, its own to be changed."""
    return load(mlp_folder)


@pytest.fixture
def bank(bank_folder):
    return load(bank_folder)


@pytest.fixture
def folder(mlp_folder, tmp_path):
    """A saved editor, to be damaged."""
    return shutil.copytree(mlp_folder, tmp_path / "edited")


def asked_of(facts) -> list[str]:
    return [query for fact in facts for query in (fact.query, *fact.paraphrases)]


def base_editor() -> MeGEditor:
    """Nothing edited: the model as it was."""
    return make_editor()


def said_by(editor: MeGEditor, queries) -> list[list[int]]:
    prompts = [editor.template.format(query) for query in queries]
    with editor.routed(queries):
        return editor.prompted.answers(prompts, MOST)


# Editing and answering


@pytest.mark.parametrize(
    "kind, gate", [("dit", "similarity"), ("mlp", "familiarity"), ("bank", "similarity")]
)
def test_edited_facts_are_answered_in_any_wording_and_other_queries_as_before(kind, gate):
    config = dataclasses.replace(CONFIG, generator=GENERATORS[kind], gate=gate)
    editor = make_editor(config)
    report = edit(editor)
    assert report.unlearnt == () and report.training.answered == 1.0
    assert set(report.seconds) == {"collect", "encoder", "gate", "generator"}
    assert editor.facts == EDITED
    assert editor.edits.gate.kind == gate
    routing = editor.route(QUERIES + PARAPHRASES + UNRELATED)
    others = len(UNRELATED)
    assert routing.accepted[: len(QUERIES)].all()
    assert routing.fact[: len(QUERIES)].tolist() == list(range(len(EDITED)))
    assert routing.fact[len(QUERIES) : -others].tolist() == [i for i in range(5) for _ in range(2)]
    rejected = [query for query in UNRELATED if not editor.route([query]).accepted.any()]
    assert rejected == UNRELATED if gate == "similarity" else len(rejected) > others / 2
    base = base_editor()
    assert editor.generate(QUERIES, MOST) == ANSWERS
    assert base.generate(QUERIES, MOST) != ANSWERS
    as_before = base.generate(rejected, MOST)
    assert editor.generate(rejected, MOST) == as_before == editor.generate_base(rejected, MOST)


@pytest.mark.parametrize("added", [[], FURTHER])
@pytest.mark.parametrize("snap", [True, False])
def test_each_row_of_a_mixed_batch_is_answered_by_its_own_widened_model(mlp_folder, snap, added):
    editor = load(mlp_folder)
    editor.router.config = RoutingConfig(snap=snap)
    base, tokenizer = make_language_model(editor.tokenizer), editor.tokenizer
    mixed = [*MIXED]
    if added:
        editor.add(added)
        mixed[::7] = itertools.islice(itertools.cycle(asked_of(added)), len(mixed[::7]))
    routing = editor.route(mixed)
    edited = routing.accepted.tolist()
    assert 5 < sum(edited) < len(mixed) - 5
    taken = editor.edits.generated[routing.fact[routing.accepted]]
    assert bool(taken.any()) and bool((~taken).any()) == bool(added)
    expected, moved = [], 0
    for query, accepted in zip(mixed, edited, strict=True):
        plain = greedy(base, tokenizer, query)
        if accepted:
            expected.append(
                greedy(widened(base, LAYER, own_neuron(editor, query)), tokenizer, query)
            )
            moved += expected[-1] != plain
        else:
            expected.append(plain)
    assert said_by(editor, mixed) == expected
    assert moved >= len(EDITED)


def test_with_snapping_all_wordings_of_a_fact_have_one_neuron_and_without_their_own(editor):
    made = {}
    generate = editor.edits.generator.generate
    for snap in (True, False):
        editor.router.config = RoutingConfig(snap=snap)
        editor.edits.generator.generate = lambda z, snap=snap: made.setdefault(snap, generate(z))
        editor.router.forget()
        editor.generate(MIXED, 1)
    routing = editor.route(MIXED)
    accepted, facts = int(routing.accepted.sum()), routing.fact[routing.accepted].unique()
    assert (len(made[True]), len(made[False])) == (len(facts), accepted)
    assert len(facts) < accepted


def test_a_fact_asked_again_costs_no_generation_until_the_generator_changes(editor):
    query, fact = EDITED[0].query, FURTHER[0]
    first = editor.generate([query, query, *UNRELATED], MOST)
    asked = 2 + len(UNRELATED)
    assert editor.router.served == Served(asked, 2, 1, 0)
    assert editor.generate([query], MOST) == first[:1]
    assert editor.router.served == Served(asked + 1, 3, 1, 1)
    editor.add([fact])  # whose neuron is the collected one
    editor.generate([query, fact.query], MOST)
    assert editor.router.served == Served(asked + 3, 5, 1, 3)
    snapping, editor.config = editor.config, dataclasses.replace(editor.config, snap=False)
    editor.generate([fact.query, fact.query], MOST)
    assert editor.router.served == Served(asked + 5, 7, 1, 4)
    editor.config = snapping
    editor.train()  # what the generator made before is not asked for again
    editor.generate([query, fact.query], MOST)
    assert editor.router.served == Served(asked + 7, 9, 3, 4)


def test_nothing_is_generated_for_queries_that_are_not_edited(editor):
    def generate(z):
        raise AssertionError("the generator ran")

    editor.edits.generator.generate = generate
    assert editor.generate(UNRELATED, MOST) == base_editor().generate(UNRELATED, MOST)


def test_detach_gives_the_base_model_back_bit_for_bit(editor):
    base, tokens = make_language_model(editor.tokenizer), torch.arange(3, 19).view(2, 8)
    with editor.routed(QUERIES[:2]):
        assert not torch.equal(editor.model(tokens).logits, base(tokens).logits)
    assert torch.equal(editor.model(tokens).logits, base(tokens).logits)
    editor.detach()
    editor.detach()
    assert torch.equal(editor.model(tokens).logits, base(tokens).logits)
    assert [type(m) for m in editor.model.modules()] == [type(m) for m in base.modules()]
    weights = base.state_dict()
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in editor.model.state_dict().items()
    )


def packed(editor: MeGEditor) -> list[str]:
    """The modules whose products are replaced."""
    return [
        name
        for name, module in editor.model.named_modules()
        if {"forward", "project"} & vars(module).keys()
    ]


def test_while_serving_all_products_are_packed_and_the_answers_are_the_same(editor):
    queries = [EDITED[0].query, *EDITED[1].paraphrases, UNRELATED[0]]
    expected = editor.generate(queries, 4)
    assert not packed(editor)
    with editor.serving():
        linears = [m for m in editor.model.modules() if isinstance(m, torch.nn.Linear)]
        names = packed(editor)
        assert len(names) == len(linears) > 0
        with editor.serving():
            assert editor.generate(queries, 4) == expected
        assert packed(editor) == names  # the inner block did not end the outer one
        assert editor.generate(queries, 4) == expected
    assert not packed(editor)


def test_evaluation_serves(editor, monkeypatch):
    seen = []
    run = Evaluation._ask
    monkeypatch.setattr(
        Evaluation, "_ask", lambda *args, **more: seen.append(packed(editor)) or run(*args, **more)
    )
    editor.evaluate()
    assert len(seen) == 3 and all(seen) and not packed(editor)


def test_a_model_of_more_than_a_quarter_of_the_memory_is_not_packed(editor, monkeypatch):
    size = editor.model.get_memory_footprint()
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 4 * size - 1}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    with editor.serving():
        assert not packed(editor)
    pages["SC_PHYS_PAGES"] += 1
    with editor.serving():
        assert packed(editor)


def test_prompts_must_be_a_list(editor):
    assert editor.generate([]) == []
    with pytest.raises(TypeError, match=r"prompts is the text '.*'; it must be a list of texts"):
        editor.generate(QUERIES[0])


@pytest.mark.parametrize("method", ["generate", "generate_base", "route", "perplexity"])
@pytest.mark.parametrize("given", [QUERIES[0], [None], [[{"role": "user"}]], 7])
def test_what_is_no_list_of_texts_is_refused(editor, method, given):
    with pytest.raises(TypeError, match=r"^(prompts|queries|texts)(\[0\])* is .*; it must be"):
        getattr(editor, method)(given)


def test_prompts_may_come_in_a_tuple_or_one_after_the_other(editor):
    expected = editor.generate(QUERIES, MOST)
    assert editor.generate(tuple(QUERIES), MOST) == expected
    assert editor.generate((query for query in QUERIES), MOST) == expected


@pytest.mark.parametrize(
    "keyword",
    [
        {"return_dict_in_generate": True},
        {"max_length": 9},
        {"input_ids": torch.ones(1, 1)},
        {"tokenizer": "mine"},
        {"output_scores": True},
    ],
)
def test_keywords_of_generate_that_contradict_ours_are_refused_by_name(editor, keyword):
    (name,) = keyword
    with pytest.raises(TypeError, match=f"^{name} cannot be given here .*routed"):
        editor.generate(QUERIES, MOST, **keyword)


def test_other_keywords_of_generate_work(editor):
    expected = editor.generate(QUERIES, MOST)
    for harmless in (
        {"return_dict_in_generate": False},
        {"pad_token_id": 0},
        {"max_length": None},
        {"eos_token_id": [editor.tokenizer.eos_token_id]},
        {"use_cache": False},
    ):
        assert editor.generate(QUERIES, MOST, **harmless) == expected
    # An answer ends where it is told to, here with its first token.
    first = editor.tokenizer(f" {EDITED[0].answer}").input_ids
    with editor.routed(QUERIES[:1]):
        prompts = [editor.prompted.prompt(QUERIES[0])]
        (ended,) = editor.prompted.answers(prompts, MOST, eos_token_id=first)
        assert ended == first


def test_a_streamer_gets_the_answer_as_it_comes(editor, capsys):
    streamer = transformers.TextStreamer(editor.tokenizer, skip_prompt=True)
    (answer,) = editor.generate(QUERIES[:1], MOST, streamer=streamer)
    assert answer and answer in capsys.readouterr().out


def test_disabled_is_the_base_model_for_every_call_inside(editor):
    base = make_editor()
    texts = [editor.prompted.prompt(query) for query in QUERIES]
    batch = editor.tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        plain = base.model(**batch).logits
        with editor.routed(QUERIES):
            edited = editor.model(**batch).logits
            with editor.disabled():
                assert torch.equal(editor.model(**batch).logits, plain)
            assert torch.equal(editor.model(**batch).logits, edited)
        with editor.disabled(), editor.routed(QUERIES):
            assert torch.equal(editor.model(**batch).logits, plain)
    assert not torch.equal(edited, plain)
    with editor.disabled():
        assert editor.generate(QUERIES, MOST) == base.generate(QUERIES, MOST)
    assert editor.generate(QUERIES, MOST) == ANSWERS


def test_the_given_tokenizer_stays_as_it_is():
    given = make_tokenizer()
    given.pad_token, given.padding_side = None, "right"
    editor = MeGEditor(make_language_model(make_tokenizer()), given, make_encoder(), BANK)
    assert given.pad_token is None and given.padding_side == "right"
    assert editor.tokenizer.padding_side == "left" and editor.tokenizer.pad_token is not None


def test_the_repr_says_what_is_edited(editor):
    assert repr(editor) == (
        f"MeGEditor({editor.name!r}, layer 1, 5 facts edited, similarity gate, torch.float32 on "
        "cpu)"
    )


def test_facts_come_as_dicts_too():
    editor = make_editor(BANK)
    edit(editor, [{"query": fact.query, "answer": fact.answer} for fact in EDITED])
    editor.add({"query": FURTHER[0].query, "answer": FURTHER[0].answer})
    assert editor.generate([*QUERIES, FURTHER[0].query], MOST) == [*ANSWERS, FURTHER[0].answer]


def test_edits_are_pushed_with_a_card(editor, monkeypatch):
    seen = {}

    def upload(folder, repo_id, **options):
        seen.update(options, repo_id=repo_id, files={path.name for path in Path(folder).iterdir()})
        seen["card"] = (Path(folder) / "README.md").read_text(encoding="utf-8")
        return "there"

    monkeypatch.setattr("meg_kernels.editing.kept.push_to_hub", upload)
    assert editor.push_to_hub("me/edits", private=True) == "there"
    assert {"meg.json", "README.md"} < seen["files"] and seen["private"] is True
    assert "me/edits" in seen["card"] and "5" in seen["card"]
    with pytest.raises(ValueError, match="my edits"):
        editor.push_to_hub("my edits")


def test_beams_equal_one_query_at_a_time(editor):
    together = editor.generate(MIXED, MOST, num_beams=3, num_return_sequences=2)
    alone = [
        line
        for query in MIXED
        for line in editor.generate([query], MOST, num_beams=3, num_return_sequences=2)
    ]
    assert together == alone
    assert len(together) == 2 * len(MIXED)
    best = editor.generate(QUERIES, MOST, num_beams=3, num_return_sequences=2)[::2]
    assert best == ANSWERS


def test_sampled_answers_follow_the_rows_own_distribution(editor):
    """At a low temperature sampling is the argmax; at a high one it is not."""
    for temperature, same in ((1e-3, True), (50.0, False)):
        torch.manual_seed(0)
        sampled = editor.generate(
            QUERIES, MOST, do_sample=True, temperature=temperature, num_return_sequences=3
        )
        assert (sampled == [answer for answer in ANSWERS for _ in range(3)]) == same


def test_nothing_edited_answers_as_the_base_model_and_says_so():
    editor = base_editor()
    assert editor.facts == []
    assert editor.generate(MIXED, MOST) == editor.generate_base(MIXED, MOST)
    assert not editor.route(MIXED).accepted.any()
    for ask in (
        lambda: editor.edits,
        lambda: editor.add(FURTHER),
        lambda: editor.evaluate(),
        lambda: editor.save_pretrained("nowhere"),
    ):
        with pytest.raises(RuntimeError, match=r"nothing is edited yet; call edit\(facts\) first"):
            ask()


def test_an_edit_replaces_the_one_before(editor):
    edit(editor, FURTHER)
    assert editor.facts == FURTHER
    assert editor.generate([fact.query for fact in FURTHER], MOST) == [f.answer for f in FURTHER]
    rejected = [query for query in QUERIES if not editor.route([query]).accepted.any()]
    assert len(rejected) >= 3
    assert editor.generate(rejected, MOST) == base_editor().generate(rejected, MOST)


def test_a_single_fact_can_be_edited_and_others_added():
    editor = make_editor()
    report = edit(editor, EDITED[:1])
    assert report.training.answered == 1.0
    editor.add(EDITED[1:3])
    assert editor.generate(QUERIES[:3], MOST) == ANSWERS[:3]


def test_facts_that_cannot_be_learnt_are_reported(editor):
    brief = dataclasses.replace(CONFIG.collection, max_steps=1)
    editor.config = dataclasses.replace(editor.config, collection=brief)
    assert editor.add(FURTHER).unlearnt == tuple(FURTHER) == editor.edits.report.unlearnt
    assert edit(editor, FURTHER).unlearnt == tuple(FURTHER)
    editor.remove([FURTHER[0].id])
    assert editor.edits.report.unlearnt == tuple(FURTHER[1:])


def unlearnt_editor(**changes) -> MeGEditor:
    """All of EDITED, of which the last two were not learnt; their neurons answer something."""
    editor = make_editor(dataclasses.replace(BANK, **changes))
    edit(editor)
    report = dataclasses.replace(editor.edits.report, unlearnt=tuple(EDITED[3:]))
    editor.router.edits = dataclasses.replace(editor.edits, report=report)
    return editor


def test_the_base_model_answers_for_facts_that_were_not_learnt(tmp_path):
    editor = unlearnt_editor()
    base = editor.generate_base(QUERIES, MOST)
    routing = editor.route([*QUERIES, UNRELATED[0]])
    assert routing.accepted.tolist() == [True] * 3 + [False] * 3
    assert routing.left_to_base.tolist() == [False] * 3 + [True] * 2 + [False]
    assert editor.generate(QUERIES, MOST) == ANSWERS[:3] + base[3:] != ANSWERS
    editor.save_pretrained(tmp_path)
    assert load(tmp_path).generate(QUERIES, MOST) == ANSWERS[:3] + base[3:]
    router = Router.from_pretrained(tmp_path, "cpu")
    assert router.route(QUERIES).accepted.tolist() == [True] * 3 + [False] * 2


def test_their_neurons_answer_if_that_is_asked_for(tmp_path):
    editor = unlearnt_editor(serve_unlearnt=True)
    assert editor.generate(QUERIES, MOST) == ANSWERS
    editor.set_gate(serve_unlearnt=False)
    assert editor.route(QUERIES).accepted.tolist() == [True] * 3 + [False] * 2
    editor.set_gate(serve_unlearnt=True)
    editor.save_pretrained(tmp_path)
    assert load(tmp_path).generate(QUERIES, MOST) == ANSWERS
    assert Router.from_pretrained(tmp_path, "cpu").route(QUERIES).accepted.all()


def test_an_evaluation_counts_the_facts_that_are_left_to_the_base_model():
    report = unlearnt_editor().evaluate()
    assert report.n == len(EDITED) and report.metrics.reliability_ag == 3 / 5
    assert report.protocol["left_to_base"] == 2
    served = unlearnt_editor(serve_unlearnt=True).evaluate()
    assert served.metrics.reliability_ag == 1 and served.protocol["left_to_base"] == 0


def test_facts_that_are_learnt_after_all_have_their_neurons():
    editor = unlearnt_editor()
    editor.add(EDITED[3:4], replace=True)
    assert editor.route(QUERIES).accepted.tolist() == [True] * 4 + [False]
    editor.remove(EDITED[4])
    assert editor.router.num_left_to_base == 0


@pytest.mark.parametrize(("on_conflict", "kept"), [("first", "red"), ("last", "pink")])
def test_of_contradicting_facts_one_is_edited_on_request(on_conflict, kept):
    other = Fact(EDITED[0].query.upper(), "pink")
    editor = make_editor(BANK)
    with pytest.warns(UserWarning, match=r"facts\[0\] and facts\[2\]: .*\n.* of each is kept"):
        edit(editor, [*EDITED[:2], other], on_conflict=on_conflict)
    assert {fact.answer for fact in editor.facts} == {kept, EDITED[1].answer}
    with pytest.warns(UserWarning, match="of each is kept"):
        editor.add([FURTHER[0], dataclasses.replace(FURTHER[0], answer="x")], on_conflict="first")
    assert editor.facts[-1] == FURTHER[0]


def test_a_repeated_fact_is_edited_once():
    editor = make_editor(BANK)
    again = Fact(EDITED[0].query.upper(), f"{EDITED[0].answer}.")
    with pytest.warns(UserWarning, match=r"repeats facts \(1\), each kept once"):
        edit(editor, [*EDITED[:2], again])
    assert editor.facts == EDITED[:2]


def test_a_network_that_cannot_be_built_is_refused_before_the_work(monkeypatch):
    huge = GeneratorConfig.dit(network=DiTConfig(width=65536, depth=4))
    editor = make_editor(dataclasses.replace(CONFIG, generator=huge))
    monkeypatch.setattr("meg_kernels.editing.stages.fit_neurons", interrupt)
    with pytest.raises(ValueError, match=r"the generator's network takes .* GiB"):
        edit(editor)


@pytest.mark.parametrize(
    "facts, message",
    [
        ([], "facts is empty; there must be"),
        ([EDITED[0], dataclasses.replace(EDITED[0], answer="pink", id="")], "The color of Abo is"),
    ],
)
def test_facts_that_cannot_be_edited_are_refused(facts, message):
    with pytest.raises(FactsError, match=message):
        edit(make_editor(), facts)


def test_answers_that_differ_for_one_subject_and_relation_are_warned_of_once():
    again = dataclasses.replace(EDITED[0], id="again", query="Abo looks", answer="pink")
    message = re.escape(f"'{EDITED[0].query}' 'red', but 'Abo looks' 'pink'")
    with pytest.warns(UserWarning, match=f"one relation \\(1\\):\n  {message}\na paraphrase of"):
        editor = make_editor(BANK)
        edit(editor, [*EDITED[:2], again])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editor.add([EDITED[2]])
        edit(make_editor(BANK), [EDITED[0], EDITED[1]])
    third = dataclasses.replace(again, id="third", query="Abo is painted", answer="blue")
    with pytest.warns(UserWarning, match=r"one relation \(1\):\n.*but 'Abo is painted' 'blue'"):
        editor.add([third])


def test_too_few_tuning_facts_are_refused():
    lonely = [dataclasses.replace(fact, paraphrases=()) for fact in OTHER_FACTS[7:]]
    with pytest.raises(FactsError, match=r"5 of 16 tuning facts have .* at least 8 are needed"):
        make_editor().edit(
            EDITED, tuning_facts=OTHER_FACTS[:7] + lonely, unrelated_queries=UNRELATED
        )
    # Those that share a subject with an edited fact do not count.
    with pytest.raises(FactsError, match=r"0 of 5 tuning facts"):
        make_editor().edit(EDITED, tuning_facts=EDITED, unrelated_queries=UNRELATED)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate": "none"}, "gate is 'none'; it must be one of 'similarity', 'familiarity'"),
        (
            {"calibration_share": 0.0},
            "calibration_share is 0.0; it must be a number, above 0 and below 1",
        ),
        (
            {"calibration_share": 1.0},
            "calibration_share is 1.0; it must be a number, above 0 and below 1",
        ),
        ({"threshold": math.nan}, "threshold is nan; it must be a number, finite, or None"),
        ({"threshold": "high"}, "threshold is 'high'; it must be a number, finite, or None"),
        ({"layer": -1}, "layer is -1; it must be an integer of at least 0, or None"),
        ({"layer": "mlp"}, "layer is 'mlp'; it must be an integer of at least 0, or None"),
        (
            {"most_tuning_facts": 0},
            "most_tuning_facts is 0; it must be an integer of at least 1, or None",
        ),
        ({"rejection_weight": 0.0}, "rejection_weight is 0.0; it must be a number, positive"),
        ({"rejection_weight": math.inf}, "rejection_weight is inf; it must be a number, positive"),
        (
            {"encoder_tuning": None},
            "encoder_tuning is None; it must be an instance of EncoderTuningConfig",
        ),
        ({"collection": {}}, "collection is {}; it must be an instance of CollectionConfig"),
        ({"generator": "mlp"}, "generator is 'mlp'; it must be an instance of GeneratorConfig"),
        (
            {"template": "Q: {}"},
            "template is 'Q: {}'; it must be an instance of PromptTemplate, or None",
        ),
    ],
)
def test_a_configuration_out_of_range_is_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        EditorConfig(**change)


@pytest.mark.parametrize(
    "config",
    [
        EditorConfig(),
        CONFIG,
        EditorConfig(
            template=PromptTemplate("{} ->"),
            gate="familiarity",
            snap=False,
            generator=GeneratorConfig.paper(),
            collection=CollectionConfig(contexts=MEASURED[:3]),
        ),
    ],
)
def test_a_configuration_survives_json(config):
    assert EditorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_edited_layer_is_three_quarters_up_unless_named():
    assert make_editor(dataclasses.replace(CONFIG, layer=None)).layer == 2
    assert make_editor(dataclasses.replace(CONFIG, layer=0)).layer == 0
    with pytest.raises(ValueError, match="layer is 3; the model has layers 0 to 2"):
        make_editor(dataclasses.replace(CONFIG, layer=3))


@pytest.mark.parametrize("gate", ["similarity", "familiarity"])
def test_another_gate_is_that_of_an_edit_with_it(gate, tmp_path):
    editor, expected = make_editor(), make_editor(dataclasses.replace(CONFIG, gate=gate))
    edit(editor), edit(expected)
    calibration = editor.set_gate(gate)
    assert calibration == expected.edits.report.calibration == editor.edits.report.calibration
    asked = [*QUERIES, *PARAPHRASES, *LOCALITY]
    assert torch.equal(editor.route(asked).score, expected.route(asked).score)
    assert torch.equal(editor.route(asked).accepted, expected.route(asked).accepted)
    editor.save_pretrained(tmp_path)
    editor.detach()
    loaded = MeGEditor.from_pretrained(tmp_path, editor.model, editor.tokenizer)
    assert loaded.config.gate == gate and loaded.edits.report == editor.edits.report


def test_a_threshold_can_be_chosen_and_a_gate_that_does_not_exist_cannot(editor):
    before = editor.edits.gate.threshold
    calibration = editor.set_gate("similarity", threshold=-2.0, require_subject=False)
    assert calibration.threshold != before and editor.route(LOCALITY).accepted.all()
    editor.set_gate(require_subject=True)
    with pytest.raises(ValueError, match="it must be one of 'similarity', 'familiarity'"):
        editor.set_gate("nearest")
    with pytest.raises(ValueError, match="threshold is nan; it must be a number, finite"):
        editor.set_gate("similarity", threshold=float("nan"))
    gate = editor.edits.gate
    editor.set_gate("similarity", require_subject=True)  # which leaves it as it is
    assert editor.edits.gate is gate
    assert editor.evaluate(EDITED[:1]).protocol["threshold"] == -2.0
    editor.set_gate(threshold="calibrated")
    assert editor.edits.gate.threshold == before and editor.config.threshold is None


def test_another_kind_of_gate_has_a_threshold_of_its_own(editor):
    editor.set_gate(threshold=-2.0)
    calibration = editor.set_gate("familiarity")
    assert editor.edits.gate.threshold == calibration.threshold != -2.0


def test_a_query_can_be_required_to_name_the_subject(editor):
    editor.set_gate(threshold=-2.0, require_subject=True)
    asked = [*PARAPHRASES, *LOCALITY]
    routing = editor.route(asked)
    nearest = [editor.facts[row].subject for row in routing.fact.tolist()]
    named = [s.lower() in query.lower() for s, query in zip(nearest, asked, strict=True)]
    assert routing.accepted.tolist() == routing.named.tolist() == named
    assert any(named) and not all(named)
    assert editor.evaluate(EDITED[:1]).protocol["require_subject"]
    editor.set_gate(threshold=2.0)  # which leaves that as it is
    routing = editor.route(asked)
    assert routing.named.tolist() == named and not routing.accepted.any()


def test_a_fact_whose_own_query_does_not_spell_its_subject_asks_for_none(editor):
    unspelt, unknown = (dataclasses.replace(EDITED[0], subject=s) for s in ("Nobody", None))
    assert unspelt.is_named_in("anything") and unknown.is_named_in("anything")
    assert not EDITED[0].is_named_in("anything") and EDITED[0].is_named_in(EDITED[0].query)
    editor.router.edits = dataclasses.replace(editor.edits, facts=(unspelt, *EDITED[1:]))
    editor.set_gate(require_subject=True)
    assert editor.route(QUERIES).accepted.all()


def test_a_query_must_name_the_subject_unless_asked_otherwise(editor):
    editor.set_gate(threshold=-2.0)
    assert editor.config.require_subject is True
    routing = editor.route(LOCALITY)
    subjects = [fact.subject.lower() for fact in EDITED]
    named = [any(subject in query.lower() for subject in subjects) for query in LOCALITY]
    assert routing.accepted.tolist() == routing.named.tolist() == named and not all(named)
    assert editor.evaluate(EDITED[:1]).protocol["require_subject"] is True
    editor.set_gate(require_subject=False)
    assert editor.route(LOCALITY).accepted.all()
    assert editor.evaluate(EDITED[1:2]).protocol["require_subject"] is False


def test_a_threshold_by_name_is_that_of_what_names_the_subject(editor):
    held = editor.edits.held_out
    own = (held.queries * held.paraphrases).sum(1)
    alike = (held.alike_queries * held.alike).sum(1)
    weight = editor.config.rejection_weight
    found = calibrate(own[held.named], alike[held.alike_named], 5, weight)
    calibration = editor.edits.calibration
    assert calibration.threshold == editor.edits.gate.threshold == found.threshold
    accepted = held.named & (own > found.threshold)
    rejected = ~(held.alike_named & (alike > found.threshold))
    assert calibration.acceptance == pytest.approx(float(accepted.double().mean()))
    others = len(held.unrelated)
    share = (int(rejected.sum()) + others) / (len(rejected) + others)
    assert calibration.rejection == pytest.approx(share)
    assert calibration.num_negatives == len(rejected) + others
    editor.set_gate(require_subject=False)
    other = editor.edits.calibration
    assert other != calibration and editor.edits.gate.threshold == other.threshold
    editor.set_gate(threshold=0.5)
    editor.set_gate(require_subject=True)  # what was chosen stays
    assert editor.edits.gate.threshold == 0.5
    editor.set_gate(threshold="calibrated")
    assert editor.edits.calibration == calibration


@pytest.mark.parametrize("reword", [None, True, False])
@pytest.mark.parametrize("snap", [True, False])
def test_every_training_sees_other_wordings_if_it_is_asked_about_them(monkeypatch, snap, reword):
    generator = CONFIG.generator.with_training(reword=reword)
    editor, seen = make_editor(dataclasses.replace(CONFIG, snap=snap, generator=generator)), []

    def noted(name):
        real = getattr(stages, name)

        def training(*args, rewording, **more):
            seen.append(rewording)
            return real(*args, rewording=rewording, **more)

        monkeypatch.setattr(stages, name, training)

    noted("train_generator"), noted("distill")
    edit(editor)
    editor.add([next(fact for fact in FACTS if fact not in EDITED)])
    editor.train()
    editor.replace_generator(GENERATORS["dit"].with_training(reword=reword))
    editor.distill(1)
    assert len(seen) == 4
    if reword is False or (reword is None and snap):
        assert seen == [None] * 4
        return
    held_out = editor.edits.held_out
    for rewording in seen:
        assert torch.equal(rewording.queries, held_out.queries)
        assert torch.equal(rewording.paraphrases, held_out.paraphrases)


def test_a_chosen_threshold_stays_when_facts_are_removed_or_added():
    editor = make_editor(BANK)
    edit(editor)
    editor.set_gate(threshold=0.875)
    editor.remove([EDITED[0].id])
    assert editor.edits.gate.threshold == 0.875
    editor.add([EDITED[0]])
    assert editor.edits.gate.threshold == editor.config.threshold == 0.875


@pytest.mark.parametrize("gate", ["similarity", "familiarity"])
def test_the_gate_is_calibrated_again_only_when_there_are_half_as_many_facts_again(gate, tmp_path):
    editor = make_editor(dataclasses.replace(BANK, gate=gate))
    edit(editor, FACTS[:4])
    first, calibrated = editor.edits.report.calibration, []
    real = tuning.calibrated_gate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "calibrated_gate", lambda *a: calibrated.append(1) or real(*a))
        threshold = editor.edits.gate.threshold
        editor.add(FACTS[4:6])  # six
        editor.remove([fact.id for fact in FACTS[:3]])  # three
        editor.save_pretrained(tmp_path)
        editor = load(tmp_path)
        assert len(calibrated) == (0 if gate == "similarity" else 2)
        if gate == "similarity":
            assert editor.edits.gate.threshold == threshold
            assert editor.edits.report.calibration == first and first.num_edited == 4
        editor.add(FACTS[:3])  # six
        editor.add(FACTS[6:7])  # seven
        number = len(calibrated)
        assert editor.edits.report.calibration.num_edited == 7
        assert number == (1 if gate == "similarity" else 4)
        editor.remove([fact.id for fact in FACTS[1:5]])  # three
        assert editor.edits.report.calibration.num_edited == 3 and len(calibrated) == number + 1


def test_facts_that_the_model_knows_are_left_out_and_counted(tmp_path):
    editor = make_editor(BANK)
    known = dataclasses.replace(EDITED[1], answer=editor.generate([QUERIES[1]], 16)[0])
    some = [EDITED[0], known, *EDITED[2:]]
    report = edit(editor, some, skip_known=True)
    assert editor.facts == [EDITED[0], *EDITED[2:]] and report.num_left_out == 1
    assert editor.evaluate().protocol["left_out"].startswith("1 facts")
    editor.add([FURTHER[0]])
    editor.save_pretrained(tmp_path)
    editor.detach()
    loaded = MeGEditor.from_pretrained(tmp_path, editor.model, editor.tokenizer)
    assert loaded.edits.report.num_left_out == 1
    with pytest.raises(FactsError, match="answers all 1 facts so already"):
        edit(make_editor(BANK), [known], skip_known=True)


# Interruptions


@pytest.mark.parametrize(
    "again, stage",
    [
        ("edit", "fit_neurons"),
        ("edit", "calibrated_gate"),
        ("edit", "train_generator"),
        ("edit", "EditReport"),
        ("add", "fit_neurons"),
        ("add", "regated"),
        ("add", "EditReport"),
    ],
)
def test_a_failed_edit_leaves_what_was_edited_before(editor, monkeypatch, stage, again):
    before = state(editor)
    with monkeypatch.context() as patch:
        patch.setattr(stages, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            edit(editor, FURTHER) if again == "edit" else editor.add(FURTHER)
    assert state(editor) == before
    editor.add(FURTHER)
    assert editor.facts == EDITED + FURTHER


def test_an_interrupted_edit_resumes_with_the_work_that_was_done(tmp_path, monkeypatch):
    whole = make_editor()
    edit(whole)
    resumed = make_editor()
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_generator", interrupt)
        with pytest.raises(KeyboardInterrupt):
            edit(resumed, work_folder=tmp_path)
    (path,) = tmp_path.glob("encoder-*.safetensors")
    tuned = float(read_tensors(path)[1]["seconds"])
    monkeypatch.setattr("meg_kernels.editing.neuron_fit.NeuronFit.run", interrupt)
    monkeypatch.setattr(TextEncoder, "tune", interrupt)
    edit(resumed, work_folder=tmp_path)
    took = resumed.edits.report.seconds["encoder"]
    assert took > tuned > 0  # what the interruption ended counts
    seconds = {"seconds": {}}
    assert dataclasses.replace(resumed.edits.report, **seconds) == dataclasses.replace(
        whole.edits.report, **seconds
    )
    assert state(resumed)[2:] == state(whole)[2:]


@pytest.mark.parametrize("changed", ["seed", "facts", "pooling", "encoder", "nothing"])
def test_an_encoder_that_was_tuned_is_taken_for_the_same_tuning_only(
    tmp_path, monkeypatch, changed
):
    first = make_editor(BANK)
    edit(first, work_folder=tmp_path)
    tunings = []
    tune = TextEncoder.tune
    monkeypatch.setattr(TextEncoder, "tune", lambda *args: tunings.append(1) or tune(*args))
    tuning = dataclasses.replace(BANK.encoder_tuning, seed=9 if changed == "seed" else 0)
    editor = make_editor(dataclasses.replace(BANK, encoder_tuning=tuning))
    more = {"tuning_facts": OTHER_FACTS[:-1]} if changed == "facts" else {}
    if changed == "pooling":
        editor.encoder.pooling = "cls"
    if changed == "encoder":
        with torch.no_grad():
            next(editor.encoder.model.parameters()).mul_(1.5)
    edit(editor, work_folder=tmp_path, **more)
    assert len(tunings) == (changed != "nothing")
    assert torch.equal(editor.edits.conditions, first.edits.conditions) == (changed == "nothing")


def test_a_work_file_that_holds_no_tuned_encoder_is_made_again(tmp_path, caplog):
    first = make_editor(BANK)
    edit(first, work_folder=tmp_path)
    (path,) = tmp_path.glob("encoder-*.safetensors")
    for content in ({}, {"seconds": "1.0"}):
        write_tensors(path, {"other": torch.zeros(1)}, content)
        editor = make_editor(BANK)
        edit(editor, work_folder=tmp_path)
        assert torch.equal(editor.edits.conditions, first.edits.conditions)
        assert "holds no tuned encoder; it is made again" in caplog.text
        caplog.clear()


def test_the_gate_is_calibrated_on_wordings_that_the_encoder_was_not_tuned_on(monkeypatch):
    seen = []
    tune = TextEncoder.tune

    def noting(encoder, wordings, *args):
        seen.extend(text for wording in wordings for text in wording.same)
        return tune(encoder, wordings, *args)

    monkeypatch.setattr(TextEncoder, "tune", noting)
    editor = make_editor(BANK)
    edit(editor)
    held_out = editor.edits.held_out
    tuned = editor.encoder.encode(seen)
    nearest = (held_out.queries @ tuned.T).amax(1)
    assert seen and bool((nearest < 1 - 1e-4).all())


# Adding and removing


@pytest.mark.parametrize("kind", ["dit", "bank"])
def test_another_generator_is_trained_on_the_same_neurons(editor, tmp_path, kind):
    before = editor.edits
    config = GENERATORS[kind]
    training = editor.replace_generator(config)
    after = editor.edits
    assert training.answered == 1.0 and after.report.training == training
    assert after.generator.config == editor.config.generator == config
    assert after.neurons is before.neurons and after.gate is before.gate
    assert before.generator.config.kind == "mlp"  # as it was
    editor.save_pretrained(tmp_path)
    editor.detach()
    loaded = MeGEditor.from_pretrained(tmp_path, editor.model, editor.tokenizer)
    assert loaded.config.generator == config
    assert loaded.generate(QUERIES, MOST) == ANSWERS


def test_an_interrupted_training_leaves_the_generator_and_goes_on(editor, tmp_path, monkeypatch):
    before, config = editor.edits, GENERATORS["dit"].with_training(seed=4)
    steps = []
    step = torch.optim.AdamW.step

    def interrupted(optimizer, *args, **kwargs):
        steps.append(1)
        if len(steps) == config.training.check_every + 5:
            raise KeyboardInterrupt
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.replace_generator(config, work_folder=tmp_path)
    assert editor.edits is before and editor.config.generator.kind == "mlp"
    taken = len(steps)
    training = editor.replace_generator(config, work_folder=tmp_path)
    assert len(steps) - taken == training.steps - config.training.check_every


@pytest.mark.parametrize("kind", ["mlp", "bank"])
def test_added_facts_join_those_that_keep_their_neurons(editor, bank, kind):
    editor = bank if kind == "bank" else editor
    before, asked = editor.edits, [*asked_of(EDITED), *UNRELATED]
    neurons, held_out = before.neurons, before.held_out
    made, said = before.generator.generate(before.conditions), editor.generate(asked, 16)
    report = editor.add(FURTHER)
    assert report.unlearnt == () and report.training is None
    assert editor.facts == EDITED + FURTHER
    pack = editor.attached.layout.pack
    assert torch.equal(pack(editor.edits.neurons)[: len(EDITED)], pack(neurons))
    assert len(editor.edits.neurons) == len(EDITED + FURTHER)
    assert editor.edits.held_out is held_out
    assert report.seconds.keys() == {"collect", "encoder", "gate"}
    for stage, took in before.report.seconds.items():
        both = took + report.seconds.get(stage, 0.0)
        assert editor.edits.report.seconds[stage] == pytest.approx(both)
    generated = editor.edits.generator.generate(editor.edits.conditions[: len(EDITED)])
    assert torch.equal(pack(generated), pack(made))
    assert editor.edits.generated.tolist() == [True] * len(EDITED) + [kind == "bank"] * 2
    queries = [fact.query for fact in EDITED + FURTHER]
    assert editor.generate(queries, MOST) == [fact.answer for fact in EDITED + FURTHER]
    assert editor.generate(asked, 16) == said  # to the last word


def test_added_facts_keep_their_collected_neurons_until_the_generator_learns_them(editor):
    queries = [fact.query for fact in EDITED + FURTHER]
    editor.generate(queries, MOST)  # what is generated now is not asked for again
    editor.add([dataclasses.replace(EDITED[0], answer=EDITED[1].answer), *FURTHER], replace=True)
    answers = [ANSWERS[1], *ANSWERS[1:], *(fact.answer for fact in FURTHER)]
    assert editor.generate(queries[:1], MOST) == answers[:1]
    assert editor.generate(queries, MOST) == answers
    before = editor.edits
    assert before.generated.tolist() == [True] * 4 + [False] * 3
    assert editor.evaluate().protocol["generated_facts"] == 4
    with pytest.raises(ValueError, match="only a dit can be distilled"):
        editor.distill(1)
    training, after = editor.train(), editor.edits
    assert training.answered == 1.0 and after.report.training == training
    assert after.generated.all() and after.neurons is before.neurons and after.gate is before.gate
    assert editor.generate(queries, MOST) == answers
    # Trained further: the generator's scales are still those of the facts that came first.
    assert torch.equal(after.generator.weight_std, before.generator.weight_std)
    assert editor.config.generator == CONFIG.generator
    assert after.report.seconds["generator"] > before.report.seconds["generator"]
    assert editor.train() == training and editor.edits is after  # nothing was added since
    assert editor.evaluate().protocol["generated_facts"] == len(queries)


def test_only_a_generator_that_learnt_all_facts_is_distilled():
    editor = make_editor(dataclasses.replace(CONFIG, generator=GENERATORS["dit"]))
    edit(editor)
    editor.add(FURTHER)
    with pytest.raises(ValueError, match=r"not trained on facts that were added, 2 of 7: train it"):
        editor.distill(1)


def test_added_facts_that_the_generator_does_not_learn_keep_their_collected_neurons(editor):
    hopeless = dataclasses.replace(FURTHER[1], answer=" ".join(["red", "blue"] * 6))
    added = [FURTHER[0], EDITED[0]]
    editor.remove([EDITED[0].id])
    editor.add(added)
    brief = dataclasses.replace(CONFIG.collection, max_steps=1)
    editor.config = dataclasses.replace(editor.config, collection=brief)
    assert editor.add([hopeless]).unlearnt == (hopeless,)
    generator = editor.edits.generator
    generator.config = generator.config.with_training(max_steps=1)
    queries = [fact.query for fact in (*EDITED[1:], *added)]
    answers = [fact.answer for fact in (*EDITED[1:], *added)]
    assert editor.train().answered < 1
    # The second it had learnt before; of the third, not even the collected neuron answers.
    assert editor.edits.generated.tolist() == [True] * 4 + [False, True, True]
    assert editor.generate(queries[4:], MOST) == answers[4:]
    generator = editor.edits.generator
    generator.config = generator.config.with_training(max_steps=300)
    editor.train()
    assert editor.edits.generated.all() and editor.generate(queries, MOST) == answers


def test_a_fact_that_waits_for_its_training_may_be_all_that_is_left(editor, tmp_path):
    editor.add(FURTHER)
    editor.remove([EDITED[1].id, FURTHER[0].id])
    assert editor.edits.generated.tolist() == [True] * 4 + [False]
    editor.remove([fact.id for fact in editor.facts[:4]])
    assert editor.generate([FURTHER[1].query], MOST) == [FURTHER[1].answer]
    assert state(load_copy(editor, tmp_path)) == state(editor)
    editor.train()
    assert editor.edits.generated.tolist() == [True]
    assert editor.generate([FURTHER[1].query], MOST) == [FURTHER[1].answer]


def test_a_bank_of_one_fact_takes_others():
    editor = make_editor(BANK)
    edit(editor, EDITED[:1])
    changed = dataclasses.replace(EDITED[0], answer=EDITED[1].answer)
    editor.add([FURTHER[0]])
    editor.add([changed], replace=True)
    queries = [FURTHER[0].query, changed.query]
    assert editor.generate(queries, MOST) == [FURTHER[0].answer, changed.answer]


def test_evaluations_before_and_after_the_generator_learns_are_kept_apart(editor, tmp_path):
    editor.add(FURTHER)
    editor.evaluate(work_folder=tmp_path)
    files = names(tmp_path)
    editor.router.edits = dataclasses.replace(
        editor.edits, generated=torch.ones_like(editor.edits.generated)
    )
    editor.evaluate(work_folder=tmp_path)
    assert names(tmp_path) > files


def test_an_interrupted_further_training_goes_on(editor, tmp_path, monkeypatch):
    editor.add(FURTHER)
    whole = load_copy(editor, tmp_path / "whole")
    expected = whole.train()
    before, saves = editor.edits, []
    save = fitting._Checkpoint.save

    def interrupted(*args):
        save(*args)
        saves.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting._Checkpoint, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            editor.train(work_folder=tmp_path / "work")
    assert saves and editor.edits is before
    assert editor.train(work_folder=tmp_path / "work") == expected
    assert state(editor)[2:] == state(whole)[2:]


def load_copy(editor: MeGEditor, folder) -> MeGEditor:
    editor.save_pretrained(folder)
    return load(folder)


@pytest.mark.parametrize(
    "fact, message",
    [
        (Fact(EDITED[0].query.upper(), "pink"), "COLOR OF ABO"),
        (EDITED[1], EDITED[1].query.replace("?", r"\?")),
        (Fact("A new query", "red", id=EDITED[2].id), EDITED[2].id),
    ],
)
def test_a_fact_that_is_edited_already_is_not_added(editor, fact, message):
    before = state(editor)
    with pytest.raises(FactsError, match=message):
        editor.add([FURTHER[0], fact])
    with pytest.raises(FactsError, match="facts is empty; there must be"):
        editor.add([])
    assert state(editor) == before


@pytest.mark.parametrize("kind", ["mlp", "bank"])
def test_an_edited_fact_can_be_changed_and_the_others_keep_their_neurons(editor, bank, kind):
    editor = bank if kind == "bank" else editor
    before = editor.edits
    changed = [
        dataclasses.replace(EDITED[1], answer=EDITED[2].answer),  # the same id and query
        Fact(EDITED[3].query, EDITED[0].answer, id="another"),
    ]
    assert changed[0].answer != EDITED[1].answer and changed[1].answer != EDITED[3].answer
    report = editor.add([*changed, FURTHER[0]], replace=True)
    kept = [0, 2, 4]
    assert report.unlearnt == () and report.training is None
    assert editor.facts == [*(EDITED[row] for row in kept), *changed, FURTHER[0]]
    assert torch.equal(editor.edits.conditions[:3], before.conditions[kept])
    assert torch.equal(editor.edits.neurons.key[:3], before.neurons.key[kept])
    expected = [*ANSWERS]
    expected[1], expected[3] = (fact.answer for fact in changed)
    assert editor.generate(QUERIES, MOST) == expected
    assert editor.generate([FURTHER[0].query], MOST) == [FURTHER[0].answer]
    assert editor.generate(UNRELATED, MOST) == base_editor().generate(UNRELATED, MOST)


def test_facts_that_were_not_learnt_are_reported_until_they_are_replaced(editor):
    hopeless = dataclasses.replace(FURTHER[0], answer=" ".join(["red", "blue"] * 6))
    config = dataclasses.replace(CONFIG.collection, max_steps=1)
    editor.config = dataclasses.replace(editor.config, collection=config)
    assert editor.add([hopeless]).unlearnt == (hopeless,)
    editor.config = dataclasses.replace(editor.config, collection=CONFIG.collection)
    assert editor.add([FURTHER[1]]).unlearnt == ()
    assert editor.edits.report.unlearnt == (hopeless,)
    assert editor.add([FURTHER[0]], replace=True).unlearnt == ()


@pytest.mark.parametrize("kind", ["mlp", "bank"])
def test_a_removed_fact_is_answered_by_the_base_model_again(editor, bank, kind, tmp_path):
    editor = bank if kind == "bank" else editor
    kept = [0, 2, 4]
    editor.remove([EDITED[1].id, EDITED[3].id])
    assert editor.facts == [EDITED[i] for i in kept]
    routing = editor.route(QUERIES)
    assert routing.accepted.tolist() == [i in kept for i in range(5)]
    assert routing.fact[kept].tolist() == [0, 1, 2]
    base = base_editor().generate(QUERIES, MOST)
    expected = [answer if i in kept else base[i] for i, answer in enumerate(ANSWERS)]
    assert editor.generate(QUERIES, MOST) == expected != base
    editor.save_pretrained(tmp_path)
    assert state(load(tmp_path)) == state(editor)
    editor.add([EDITED[1]])
    assert editor.generate(QUERIES[:3], MOST) == ANSWERS[:3]


def test_removing_everything_gives_the_base_model_back(editor):
    editor.remove([fact.id for fact in EDITED])
    assert editor.facts == []
    assert editor.generate(QUERIES, MOST) == base_editor().generate(QUERIES, MOST)
    with pytest.raises(RuntimeError, match="nothing is edited yet"):
        editor.save_pretrained("nowhere")


def test_an_unknown_id_removes_nothing(editor):
    before = state(editor)
    with pytest.raises(KeyError, match="no edited fact has the id or the query 'color-Mars'"):
        editor.remove([EDITED[0].id, "color-Mars"])
    assert state(editor) == before
    with pytest.raises(RuntimeError, match="nothing is edited yet"):
        base_editor().remove(["x"])


@pytest.mark.parametrize(
    "name", [EDITED[1].id, EDITED[1].query, f"  {EDITED[1].query.upper()} ", EDITED[1]]
)
def test_a_fact_is_removed_by_its_id_its_query_or_itself(editor, name):
    editor.remove(name)
    assert editor.facts == [EDITED[0], *EDITED[2:]]


def test_an_id_is_looked_for_before_a_query(editor):
    taken = dataclasses.replace(EDITED[1], id=EDITED[0].query)
    editor.router.edits = dataclasses.replace(editor.edits, facts=(EDITED[0], taken, *EDITED[2:]))
    editor.remove(EDITED[0].query)
    assert editor.facts == [EDITED[0], *EDITED[2:]]


# Keeping


@pytest.mark.parametrize(
    "kind, gate", [("dit", "similarity"), ("mlp", "familiarity"), ("bank", "similarity")]
)
def test_what_is_loaded_is_what_was_saved(tmp_path, kind, gate):
    generator = GENERATORS[kind]
    if kind != "bank":
        generator = generator.with_training(max_steps=40)
    config = dataclasses.replace(CONFIG, generator=generator, gate=gate, snap=False)
    editor = make_editor(config)
    edit(editor)
    editor.save_pretrained(tmp_path / "edited")
    loaded = load(tmp_path / "edited")
    assert state(loaded) == state(editor)
    assert loaded.config == editor.config
    assert torch.equal(loaded.edits.conditions, editor.edits.conditions)
    pack = editor.attached.layout.pack
    for name in ("neurons", "initial"):
        assert torch.equal(pack(getattr(loaded.edits, name)), pack(getattr(editor.edits, name)))
    if gate == "familiarity":
        return
    # And both go on alike.
    for one in (loaded, editor):
        one.add(FURTHER)
    editor.save_pretrained(tmp_path / "edited")
    loaded = load(tmp_path / "edited")
    assert state(loaded) == state(editor)
    for one in (loaded, editor):
        one.train()
    seconds = {"seconds": {}}
    assert dataclasses.replace(loaded.edits.report, **seconds) == dataclasses.replace(
        editor.edits.report, **seconds
    )
    assert state(loaded)[2:] == state(editor)[2:]


def test_reported_facts_are_saved(editor, tmp_path):
    brief = dataclasses.replace(CONFIG.collection, max_steps=1)
    editor.config = dataclasses.replace(editor.config, collection=brief)
    editor.add(FURTHER)
    editor.save_pretrained(tmp_path)
    assert load(tmp_path).edits.report == editor.edits.report
    assert load(tmp_path).edits.report.unlearnt == tuple(FURTHER)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_saving_again_leaves_no_stale_files(editor, folder):
    first = names(folder)
    editor.save_pretrained(folder)
    assert names(folder) == first
    editor.add(FURTHER)
    editor.save_pretrained(folder)
    manifest = json.loads((folder / "meg.json").read_text(encoding="utf-8"))
    assert names(folder) == {"meg.json", *manifest["files"].values()}
    assert len(names(folder) & first) == 3  # `add` leaves the generator and the encoder alone
    assert state(load(folder)) == state(editor)


@pytest.mark.parametrize("stage", ["write_facts", "write_tensors", "sync_files", "write_json"])
def test_an_interruption_while_saving_leaves_what_was_saved(editor, folder, monkeypatch, stage):
    before = state(editor)
    editor.add(FURTHER)
    with monkeypatch.context() as patch:
        patch.setattr(saving, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            editor.save_pretrained(folder)
    assert state(load(folder)) == before
    editor.save_pretrained(folder)
    manifest = json.loads((folder / "meg.json").read_text(encoding="utf-8"))
    assert names(folder) == {"meg.json", *manifest["files"].values()}
    assert state(load(folder)) == state(editor)


def test_an_interruption_of_the_first_save_does_not_lock_the_folder(editor, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            editor.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"meg.json does not exist; .* no edited model"):
        load(tmp_path)
    editor.save_pretrained(tmp_path)
    assert state(load(tmp_path)) == state(editor)


def test_a_folder_that_holds_something_else_is_not_written_to(editor, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds other files \(thesis.tex\); choose an empty"):
        editor.save_pretrained(tmp_path)
    assert names(tmp_path) == {"thesis.tex"}


def file_of(folder, kind):
    (path,) = folder.glob(f"{kind}-*")
    return path


@pytest.mark.parametrize("kind", ["edits", "gate", "generator"])
def test_a_truncated_file_is_named(folder, kind):
    path = file_of(folder, kind)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptFileError, match=f"{path.name} does not hold what was saved"):
        load(folder)


@pytest.mark.parametrize("kind", ["edits", "gate", "generator"])
def test_a_file_with_other_content_is_named(folder, kind):
    path = file_of(folder, kind)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # one bit of the last weight
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"{path.name} does not hold what was saved"):
        load(folder)


def test_facts_with_other_content_are_named(folder):
    path = file_of(folder, "facts")
    path.write_text(path.read_text().replace('"red"', '"blue"'))
    with pytest.raises(CorruptFileError, match=f"{path.name} does not hold what was saved"):
        load(folder)


def test_a_truncated_encoder_is_named(folder):
    (path,) = file_of(folder, "encoder").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptFileError, match=f"{path.parent.name} does not hold what was saved"):
        load(folder)


def test_an_encoder_with_other_content_is_named(folder):
    (path,) = file_of(folder, "encoder").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"{path.parent.name} does not hold what was saved"):
        load(folder)


@pytest.mark.parametrize("kind", ["facts", "edits", "gate", "generator", "encoder"])
def test_a_missing_file_is_named(folder, kind):
    path = file_of(folder, kind)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CorruptFileError, match=f"{path.name} is missing; restore the folder"):
        load(folder)


def change_manifest(folder, **changes):
    path = folder / "meg.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(sealed(manifest | changes)), encoding="utf-8")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "other"}, "meg.json was not written by MeG Kernels"),
        ({"version": 3}, "has format version 3; this release reads version 1: upgrade meg-kernels"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(folder, changes, message):
    change_manifest(folder, **changes)
    with pytest.raises(CorruptFileError, match=message):
        load(folder)


def test_a_manifest_that_is_no_json_is_refused(folder):
    path = folder / "meg.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(CorruptFileError, match=r"meg\.json is not valid JSON"):
        load(folder)


def test_files_of_another_configuration_are_refused(folder):
    config = json.loads((folder / "meg.json").read_text(encoding="utf-8"))["config"]
    config["generator"]["width"] = 32
    change_manifest(folder, config=config)
    with pytest.raises(CorruptFileError, match=r"generator-.* does not fit its configuration"):
        load(folder)


def test_a_folder_without_edits_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no edited model"):
        load(tmp_path / "nowhere")


def test_edits_of_another_model_are_refused(folder, tiny_model):
    tokenizer = make_tokenizer()
    other = tiny_model("llama", vocab_size=len(tokenizer) + 1)
    with pytest.raises(ValueError, match=r"these edits are for .* pass the base model that was"):
        MeGEditor.from_pretrained(folder, other, tokenizer)
    with pytest.raises(ValueError, match="pass both model and tokenizer, or neither"):
        MeGEditor.from_pretrained(folder, make_language_model(tokenizer))


def test_the_model_is_loaded_again_by_its_name(editor, tmp_path):
    editor.detach()
    editor.model.save_pretrained(tmp_path / "base")
    editor.tokenizer.save_pretrained(tmp_path / "base")
    editor.encoder.save_pretrained(tmp_path / "encoder")
    named = MeGEditor.for_model(
        str(tmp_path / "base"), CONFIG, encoder=str(tmp_path / "encoder"), dtype=torch.bfloat16
    )
    assert named.model.dtype == torch.bfloat16
    edit(named)
    named.save_pretrained(tmp_path / "edited")
    loaded = MeGEditor.from_pretrained(tmp_path / "edited")
    assert loaded.model.dtype == torch.bfloat16
    assert state(loaded) == state(named)
    wider = MeGEditor.from_pretrained(tmp_path / "edited", dtype=torch.float32)
    assert wider.model.dtype == torch.float32


# Evaluating


def test_the_evaluation_counts_what_generate_says(editor):
    report = editor.evaluate()
    base = base_editor()
    said = editor.generate(PARAPHRASES, 16)
    owners = [fact.answer for fact in EDITED for _ in fact.paraphrases]
    right = [answers_match(text, answer) for text, answer in zip(said, owners, strict=True)]
    same = [
        a == b
        for a, b in zip(editor.generate(LOCALITY, 16), base.generate(LOCALITY, 16), strict=True)
    ]
    assert report.n == len(EDITED)
    assert report.metrics.reliability_ag == 1.0
    assert report.metrics.generality_ag == pytest.approx(sum(right) / len(right))
    assert report.metrics.locality_ag == pytest.approx(sum(same) / len(same))
    assert report.collected.reliability_ag == 1.0
    assert report.base.locality_ag == 1.0 and report.base.reliability_ag == 0.0
    assert report.protocol["edited_facts"] == len(EDITED)
    assert report.protocol["layer"] == LAYER and report.protocol["generator"] == "mlp"
    assert set(report.seconds) == {"collect", "encoder", "gate", "generator", "evaluate"}


def test_an_interrupted_evaluation_resumes_until_the_edits_change(editor, tmp_path, monkeypatch):
    expected = editor.evaluate().metrics
    routed, asked = editor.routed, []
    monkeypatch.setattr(editor, "routed", lambda queries: asked.append(queries) or routed(queries))
    assert editor.evaluate(work_folder=tmp_path).metrics == expected and asked
    asked.clear()
    assert editor.evaluate(work_folder=tmp_path).metrics == expected and not asked
    editor.set_gate("similarity", threshold=2.0)
    rejecting = editor.evaluate(work_folder=tmp_path).metrics
    assert asked and rejecting.reliability_ag == 0 and rejecting.locality_ag == 1


def test_an_evaluation_of_chosen_facts_asks_only_them(editor):
    report = editor.evaluate([EDITED[3], EDITED[1]])
    assert report.n == 2
    assert report.protocol["queries"] == {"reliability": 2, "generality": 4, "locality": 4}
    assert report.collected.reliability_ag == report.metrics.reliability_ag == 1.0


def test_facts_that_the_model_does_not_answer_are_found(editor):
    base = base_editor()
    said = base.generate(QUERIES, 16)
    known = dataclasses.replace(EDITED[1], answer=said[1].split(".")[0])
    assert editor.unknown([EDITED[0], known, *EDITED[2:]]) == [EDITED[0], *EDITED[2:]]
    assert editor.unknown(EDITED) == EDITED  # the base model is asked, not the edited one


def test_answers_are_tokenized_and_checked_once(monkeypatch):
    checked = []
    targets = PromptedModel.targets

    def noted(prompted, facts, *framings):
        checked.extend(fact.id for fact in facts)
        return targets(prompted, facts, *framings)

    monkeypatch.setattr(PromptedModel, "targets", noted)
    editor = make_editor(BANK)
    edit(editor)
    editor.add(FURTHER)
    assert checked == [fact.id for fact in (*EDITED, *FURTHER)]
