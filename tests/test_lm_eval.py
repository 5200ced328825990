"""lm-evaluation-harness on a tiny edited model: local tasks, and request by request.

Every answer against the harness's own HFLM, of the base model, or of the physically wider one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import sys

import pytest
import torch
from tiny import (
    BANK,
    CONFIG,
    EDITED,
    LAYER,
    UNRELATED,
    edit,
    fails,
    make_editor,
    make_language_model,
    own_neuron,
    run,
    widened,
)

from meg_kernels import PromptTemplate, cli

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)
# A sum of float32 log-probabilities, of batches of other sizes.
CLOSE = 1e-4
COLORS = ("red", "blue", "green", "gold", "pink")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """The harness says what it always says."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def editor():
    editor = make_editor(BANK)
    edit(editor)
    return editor


def harness_model(model, tokenizer, batch_size=3):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@pytest.fixture
def edited(editor):
    from meg_kernels.integrations.lm_eval import EditedLM

    return EditedLM(editor, batch_size=3)


@pytest.fixture
def base(editor):
    """The base model, loaded anew."""
    return harness_model(make_language_model(editor.tokenizer), editor.tokenizer)


@pytest.fixture
def wider(editor):
    """wider(query): the base model with the neuron that the query has in the edited one."""

    def build(query):
        model = make_language_model(editor.tokenizer)
        return harness_model(
            widened(model, LAYER, own_neuron(editor, query)), editor.tokenizer, batch_size=1
        )

    return build


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def prompt(query) -> str:
    return f"Q: {query}\nA:"


def expected(base, wider, kind, arguments, edits):
    """What each request gets by itself; `edits` names the query that is edited, or None."""
    answers = []
    for given, query in zip(arguments, edits, strict=True):
        model = base if query is None else wider(query)
        answers += getattr(model, kind)(requests(kind, given), disable_tqdm=True)
    return answers


# Requests


@needs_lm_eval
def test_each_context_is_scored_with_its_own_neuron_or_none(edited, base, wider):
    queries = [query for pair in zip(EDITED, UNRELATED, strict=False) for query in pair]
    arguments, edits = [], []
    for asked in queries:
        query = asked if isinstance(asked, str) else asked.paraphrases[0]
        for continuation in (" red", " blue", " red blue."):
            arguments.append((prompt(query), continuation))
            edits.append(None if isinstance(asked, str) else query)
    answers = edited.loglikelihood(requests("loglikelihood", *arguments), disable_tqdm=True)
    singly = expected(base, wider, "loglikelihood", arguments, edits)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in singly]
    assert [score for score, _ in answers] == pytest.approx([s for s, _ in singly], abs=CLOSE)
    unedited = expected(base, wider, "loglikelihood", arguments, [None] * len(arguments))
    for query, (score, _), (before, _) in zip(edits, answers, unedited, strict=True):
        assert (abs(score - before) > 100 * CLOSE) == (query is not None)
    assert (len(edited.seen), sum(edited.seen.values())) == (8, 4)


@needs_lm_eval
def test_what_the_gate_rejects_is_scored_by_the_base_model_to_the_bit(edited, base):
    rejected = [(prompt(query), f" {color}") for query in UNRELATED for color in COLORS]
    rejected += [("", " red blue"), (prompt(UNRELATED[0]) + " ", "red")]
    accepted = [(prompt(fact.query), f" {fact.answer}") for fact in EDITED]
    as_before = base.loglikelihood(requests("loglikelihood", *rejected), disable_tqdm=True)
    alone = edited.loglikelihood(requests("loglikelihood", *rejected), disable_tqdm=True)
    assert alone == as_before
    assert set(edited.seen) == set(UNRELATED)  # without a context there is nothing to route by
    both = edited.loglikelihood(requests("loglikelihood", *rejected, *accepted), disable_tqdm=True)
    mixed = base.loglikelihood(requests("loglikelihood", *rejected, *accepted), disable_tqdm=True)
    assert both[: len(rejected)] == mixed[: len(rejected)]
    assert all(
        after > before
        for (after, _), (before, _) in zip(
            both[len(rejected) :], mixed[len(rejected) :], strict=True
        )
    )


@needs_lm_eval
def test_long_contexts_are_cut_as_the_harness_cuts_them(edited, wider):
    query = EDITED[0].query
    context = "red " * 80 + f"\n{prompt(query)}"  # the model takes 64 tokens
    (answer,) = edited.loglikelihood(requests("loglikelihood", (context, " red blue")))
    (singly,) = wider(query).loglikelihood(requests("loglikelihood", (context, " red blue")))
    assert answer == (pytest.approx(singly[0], abs=CLOSE), singly[1])


@needs_lm_eval
def test_a_text_has_the_neuron_of_its_first_sentence_from_beginning_to_end(edited, base, wider):
    long = " Sing a song. How tall is a house? Seven and eight are red." * 9  # several windows
    texts = [f"{EDITED[0].query}\n{long}", f"{UNRELATED[0]}\n{long}", f"{EDITED[1].query} red."]
    edits = [EDITED[0].query, None, EDITED[1].query]
    arguments = [(text,) for text in texts]
    answers = edited.loglikelihood_rolling(requests("loglikelihood_rolling", *arguments))
    singly = expected(base, wider, "loglikelihood_rolling", arguments, edits)
    assert answers == pytest.approx(singly, rel=CLOSE)
    unedited = base.loglikelihood_rolling(requests("loglikelihood_rolling", *arguments))
    assert answers[1] == unedited[1]
    for row in (0, 2):
        assert abs(answers[row] - unedited[row]) > 100 * CLOSE


@needs_lm_eval
def test_generated_text_is_the_edited_models(editor, edited, base):
    until = {"until": ["\n", "."], "max_gen_toks": 4}
    queries = [query for pair in zip(EDITED, UNRELATED, strict=False) for query in pair]
    queries = [query if isinstance(query, str) else query.paraphrases[0] for query in queries]
    asked = requests("generate_until", *[(prompt(query), until) for query in queries])
    answers = edited.generate_until(asked, disable_tqdm=True)
    before = base.generate_until(asked, disable_tqdm=True)
    assert [answer.strip() for answer in answers[::2]] == [fact.answer for fact in EDITED[:4]]
    said = [answer.split(".")[0].strip() for answer in editor.generate(queries, 4)]
    assert [answer.strip() for answer in answers] == said
    assert answers[1::2] == before[1::2]
    assert answers[::2] != before[::2]
    assert (len(edited.seen), sum(edited.seen.values())) == (8, 4)


@needs_lm_eval
def test_what_the_harness_keeps_for_an_interruption_are_the_edited_models_answers(edited):
    kept = {}

    class Hook:
        def add_partial(self, kind, request, answer):
            kept[kind, request] = answer

    edited.set_cache_hook(Hook())
    for kind, arguments in (
        ("loglikelihood", [(prompt(query), " red") for query in (EDITED[0].query, UNRELATED[0])]),
        ("loglikelihood_rolling", [(f"{EDITED[0].query}\nred blue",), (UNRELATED[0],)]),
    ):
        answers = getattr(edited, kind)(requests(kind, *arguments), disable_tqdm=True)
        assert [kept[kind, given] for given in arguments] == answers


@needs_lm_eval
@pytest.mark.parametrize(
    "template, context, query",
    [
        ("Q: {}\nA:", "Q: Who?\nA:", "Who?"),
        ("Q: {}\nA:", "  Q: Who?\nA: ", "Who?"),
        ("Q: {}\nA:", "Answer.\n\nQ: When?\nA: Now\n\nQ: Who?\nA:", "Who?"),
        ("Q: {}\nA:", "Q: FAQ: Who?\nA:", "FAQ: Who?"),
        ("Q: {}\nA:", "Question: Who?\nAnswer:", "Question: Who?\nAnswer:"),
        ("Q: {}\nA:", "Q: Who?", "Q: Who?"),
        ("Tell me. {}", "Tell me. Who?", "Who?"),
        ("{}", " Who? ", "Who?"),
        ("{} is", "Paris is", "Paris"),
    ],
)
def test_the_gate_sees_the_last_query_in_the_template_or_the_whole_context(
    template, context, query
):
    from meg_kernels.integrations.lm_eval import query_of

    assert query_of(context, PromptTemplate(template)) == query


# Tasks


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks on edited facts, and two on other things."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    about = {
        "edited": [(fact.paraphrases[0], fact.answer) for fact in EDITED],
        "other": [(query, COLORS[i]) for i, query in enumerate(UNRELATED)],
    }
    for name, pairs in about.items():
        records = [{"query": q, "answer": a, "choices": list(COLORS)} for q, a in pairs]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
        common = (
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, "
            f"cache_dir: {tmp_path}/cache}}\n"
            'test_split: test\ndoc_to_text: "Q: {{query}}\\nA:"\n'
        )
        (folder / f"{name}_choice.yaml").write_text(
            f"task: {name}_choice\noutput_type: multiple_choice\n{common}"
            'doc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: " "\n'
            "metric_list: [{metric: acc}]\n"
        )
        (folder / f"{name}_words.yaml").write_text(
            f"task: {name}_words\noutput_type: generate_until\n{common}doc_to_target: answer\n"
            'generation_kwargs: {until: ["\\n", "."], max_gen_toks: 4}\n'
            "filter_list: [{name: stripped, filter: [{function: remove_whitespace}]}]\n"
            "metric_list: [{metric: exact_match}]\n"
        )
    return folder


EVERY = ["edited_choice", "edited_words", "other_choice", "other_words"]


@needs_lm_eval
def test_tasks_on_edited_facts_are_solved_and_on_other_things_as_before(editor, tasks):
    from meg_kernels.integrations.lm_eval import evaluate_tasks

    results = evaluate_tasks(editor, EVERY, task_path=tasks)
    scores = {score.task: score for score in results.scores}
    assert set(scores) == set(EVERY)
    base = make_language_model(editor.tokenizer)
    for name in EVERY:
        lines = (tasks / f"{name.split('_')[0]}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        right = [said_right(base, editor.tokenizer, name, record) for record in records]
        assert scores[name].base == sum(right) / len(right)
    for name in ("edited_choice", "edited_words"):
        assert scores[name].edited == 1.0 > scores[name].base
    for name in ("other_choice", "other_words"):
        assert scores[name].edited == scores[name].base
    assert scores["edited_choice"].metric == "acc"
    assert scores["edited_words"].metric == "exact_match (stripped)"
    assert scores["edited_choice"].stderr is not None
    assert (results.contexts, results.accepted) == (5 + len(UNRELATED), 5)


def said_right(model, tokenizer, task, record) -> bool:
    """Of the base model, one forward pass at a time."""
    tokens = tokenizer(prompt(record["query"])).input_ids
    if task.endswith("choice"):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        choices = [tokenizer(f" {choice}").input_ids[0] for choice in record["choices"]]
        return record["choices"][int(logits[choices].argmax())] == record["answer"]
    said = model.generate(torch.tensor([tokens]), max_new_tokens=4, do_sample=False)
    text = tokenizer.decode(said[0, len(tokens) :], skip_special_tokens=True)
    return text.split("\n")[0].split(".")[0].strip() == record["answer"]


@needs_lm_eval
def test_the_limit_is_of_each_task(editor, tasks):
    from meg_kernels.integrations.lm_eval import evaluate_tasks

    results = evaluate_tasks(editor, ["edited_choice", "other_choice"], task_path=tasks, limit=2)
    assert (results.contexts, results.accepted) == (4, 2)


@needs_lm_eval
def test_the_model_is_as_before_when_the_tasks_are_done(editor, tasks):
    from meg_kernels.integrations.lm_eval import evaluate_tasks

    answers = editor.generate([EDITED[0].query, UNRELATED[0]], 4)
    evaluate_tasks(editor, ["edited_words"], task_path=tasks, limit=1)
    assert editor.generate([EDITED[0].query, UNRELATED[0]], 4) == answers
    base = make_language_model(editor.tokenizer)
    tokens = torch.arange(3, 19).view(2, 8)
    assert torch.equal(editor.model(tokens).logits, base(tokens).logits)


@needs_lm_eval
def test_evaluate_shows_base_and_edited_model_side_by_side(editor, tasks, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.commands, "_load", lambda *given: editor)
    monkeypatch.setattr(cli.tables.console, "width", 200, raising=False)
    monkeypatch.setattr("meg_kernels.editing.edited_model.shipped_passages", lambda: UNRELATED)
    report = tmp_path / "report.json"
    more = ["--tasks", "edited_choice, other_words", "--task-path", tasks, "--task-limit", 3]
    shown = run("evaluate", tmp_path, "--limit", 1, *more, "--json", report)
    content = json.loads(report.read_text(encoding="utf-8"))["tasks"]
    for score, name in zip(content["scores"], ("edited_choice", "other_words"), strict=True):
        assert score["task"] == name
        (line,) = [line for line in shown.splitlines() if f" {name} " in line]
        _, metric, base, edited = [cell.strip() for cell in line.strip("│ ").split("│")]
        assert metric == score["metric"] and edited == f"{score['edited']:.3f}"
        assert base.startswith(f"{score['base']:.3f}")
    assert "6 different contexts and took 3 for edited queries" in shown
    assert (content["contexts"], content["accepted"]) == (6, 3)


# Errors


@needs_lm_eval
def test_what_is_no_task_is_refused(editor, tasks, monkeypatch):
    from meg_kernels.integrations import lm_eval

    # Looking through the harness's own thousands takes seconds.
    few = functools.partial(lm_eval.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval, "TaskManager", few)
    with pytest.raises(ValueError, match=r"'nonesuch', which is none .* lm-eval ls tasks$"):
        lm_eval.evaluate_tasks(editor, ["edited_choice", "nonesuch"], task_path=tasks)
    with pytest.raises(
        FileNotFoundError, match=r"^task_path is .*absent, where there is no folder$"
    ):
        lm_eval.evaluate_tasks(editor, ["edited_choice"], task_path=tasks / "absent")
    with pytest.raises(RuntimeError, match="nothing is edited"):
        lm_eval.evaluate_tasks(make_editor(CONFIG), ["edited_choice"], task_path=tasks)


def test_without_the_harness_tasks_are_refused_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "meg_kernels.integrations.lm_eval", raising=False)
    monkeypatch.setattr(cli.commands, "_load", None)
    said = fails(monkeypatch, capsys, "evaluate", tmp_path, "--tasks", "arc_easy")
    assert said.endswith("run: pip install 'meg-kernels[lm-eval]'") and "\n" not in said


def test_options_of_tasks_without_tasks_are_refused(tmp_path):
    from typer.testing import CliRunner

    for more in (["--task-limit", "3"], ["--task-path", str(tmp_path)]):
        result = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path), *more])
        assert result.exit_code == 2
        assert "--task-path and --task-limit need --tasks" in " ".join(result.output.split())
