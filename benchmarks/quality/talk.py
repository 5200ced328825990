"""Edits where people talk, beside the two simple rivals: the fact in the prompt, the stored answer.

    python -m benchmarks.quality.talk --data ../shared/data --work build/talk

The facts are edited as `meg edit` does it, with nothing to tune on but what the package ships. Then
they are asked in the measured contexts, of three systems with one gate and one generator's worth of
training between them:

    neuron   the query's own neuron is mounted (MeG)
    prompt   the fact that the gate finds stands before the question, and no neuron is mounted
    stored   the answer that is stored with that fact is returned, and no model is asked

How the fact is put is the best of `TOLD`, chosen on other facts than those that are measured.

What comes next is measured as well: a second turn that uses the first one's answer. And what a
prompt costs: its tokens, and the seconds until its first token.

Writes benchmarks/results/talk.json; rows that are in it already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TextStreamer

from benchmarks.quality.gate import data_sets
from benchmarks.quality.kept import CHAT, kept
from meg_kernels import Fact, MeGEditor
from meg_kernels.conversation import Message, Prompt, prompt_tokens
from meg_kernels.editing.by_context import ByContext, contains
from meg_kernels.editing.contexts import MEASURED, Context
from meg_kernels.editing.evaluate import queries
from meg_kernels.editing.prompting import answers_match
from meg_kernels.pretrained import SMOLLM2
from meg_kernels.shipped import shipped_passages, shipped_tuning_facts
from meg_kernels.storage import write_json
from meg_kernels.texts import is_question

RESULT = Path(__file__).parents[1] / "results" / "talk.json"
TEMPLATE_AND_CHAT = (*MEASURED[:1], CHAT)
# The last turn of a conversation whose first one asked a fact's own query.
NEXT = "Say that again in a whole sentence, please."
ANSWER = 48  # tokens of a turn, at most
TIMED = 32  # facts that are asked about one at a time
LONG = 4  # turns before the last one, in a long conversation


@dataclass(frozen=True)
class Told:
    """How a fact is put before a question.

    Args:
        text: around the fact, before the question.
        is_system: whether it is the system's message, in a chat.
    """

    text: str
    is_system: bool = False


TOLD = (
    Told("{}\n"),
    Told("Use this fact: {}\n\n"),
    Told("You know this: {}", is_system=True),
)


def sentence(fact: Fact) -> str:
    """The fact in words: its query and its answer.

    >>> sentence(Fact("Who wrote Emma?", "Ann Radcliffe"))
    'Who wrote Emma? Ann Radcliffe.'
    """
    return f"{fact.query.strip()} {fact.answer.removesuffix('.')}."


def told_in(context: Context, fact: Fact, told: Told) -> Context:
    """The context with the fact before the question."""
    said = told.text.replace("{}", sentence(fact).replace("{}", "{ }"))
    if told.is_system and context.form == "chat":
        return replace(context, system=f"{context.system or ''} {said}".strip())
    said = said if said.endswith("\n") else f"{said}\n"
    return replace(context, question=said + context.question, beginning=said + context.beginning)


class Rivals:
    """The three systems over one edited model.

    Args:
        editor: of the edited model.
        told: how facts are put into prompts.
    """

    def __init__(self, editor: MeGEditor, told: Told):
        self.editor, self.told = editor, told

    def found(self, query: str, context: Context) -> Fact | None:
        """The fact that the gate takes the query for."""
        routing = self.editor.route([context.asked(query)])
        return self.editor.facts[int(routing.fact)] if bool(routing.accepted) else None

    def wording(self, query: str, context: Context) -> Context:
        """The context with the fact that the gate finds, if any, before the question."""
        fact = self.found(query, context)
        return context if fact is None else told_in(context, fact, self.told)

    def first_turn(self, query: str, system: str) -> list[Message]:
        """The conversation in which a system is asked a query."""
        context = self.wording(query, CHAT) if system == "prompt" else CHAT
        return context.messages(query)

    def answering(self, system: str) -> AbstractContextManager:
        """Inside, the model answers as a part of this system: only one of them mounts neurons."""
        return nullcontext() if system == "neuron" else self.editor.disabled()

    def stored(self, facts: Sequence[Fact], context: Context) -> dict[str, float | None]:
        """Shares of the questions that the stored answers answer, and of others left alone."""
        asked = [*queries(facts)]
        routing = self.editor.route([context.asked(query) for _, _, query in asked])
        right: dict[str, list[bool]] = {"reliability": [], "generality": [], "locality": []}
        for (kind, owner, _), answer in zip(asked, routing.answers(), strict=True):
            is_right = (
                not answer if kind == "locality" else answers_match(answer, facts[owner].answer)
            )
            right[kind].append(is_right)
        return {kind: statistics.fmean(each) if each else None for kind, each in right.items()}


def by_context(
    rivals: Rivals,
    facts: Sequence[Fact],
    contexts: Sequence[Context],
    chosen: DataSet,
    work: Path,
) -> list[dict[str, Any]]:
    """A row for each context and system.

    Args:
        rivals: the systems.
        facts: that are edited, with what else is asked about them.
        contexts: in which.
        chosen: how many of the facts bring a locality query, one each, and where a fact is put
            into the prompt as well.
        work: keeps answers.
    """
    editor = rivals.editor
    some = [replace(f, locality=f.locality[: i < chosen.local]) for i, f in enumerate(facts)]
    identity, about = editor._measured()
    rows = []

    def own_neurons(asked: Sequence[Prompt], _: Sequence[int]) -> AbstractContextManager:
        return editor.routed(asked)

    def no_neurons(asked: Sequence[Prompt], _: Sequence[int]) -> AbstractContextManager:
        return nullcontext()

    for system, asked_in, edited, wording in (
        ("neuron", contexts, own_neurons, None),
        ("prompt", [c for c in contexts if c in chosen.prompted], no_neurons, rivals.wording),
    ):
        if not asked_in:
            continue
        evaluation = ByContext(
            editor.prompted, some, asked_in, work_folder=work, identity=[system, *identity]
        )
        with editor.serving():
            report = evaluation.report(
                edited,
                wording=wording,
                against_base=any(fact.locality for fact in some),
                protocol=about,
                progress=True,
            )
        rows += [
            {"system": system, "context": name, **asdict(shares)}
            for name, shares in report.contexts.items()
        ]
    for context in contexts:
        rows.append({"system": "stored", "context": context.name, **rivals.stored(some, context)})
    return rows


def next_turn(rivals: Rivals, facts: Sequence[Fact], system: str) -> float:
    """Share of second turns, which use the first one's answer, that contain the edited answer."""
    editor, right = rivals.editor, []
    for fact in facts:
        first = rivals.first_turn(fact.query, system)
        if system == "stored":
            said = editor.route([first]).answers()[0]
        else:
            with rivals.answering(system):
                said = editor.chat(first, ANSWER)
        second = [
            *first,
            {"role": "assistant", "content": said},
            {"role": "user", "content": NEXT},
        ]
        with rivals.answering(system):
            again = editor.chat(second, ANSWER)
        right.append(contains(again, fact.answer))
    return statistics.fmean(right)


class _First(TextStreamer):
    """Notes when the first token of an answer came."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True)
        self.came = 0.0
        self._puts = 0

    def put(self, value: Any) -> None:
        self._puts += 1
        if self._puts == 2:  # the first put is the prompt
            self.came = time.perf_counter()

    def end(self) -> None:
        pass


def first_token(rivals: Rivals, facts: Sequence[Fact], system: str) -> float:
    """Median milliseconds from a conversation to its first token, one at a time."""
    took = []
    for fact in facts[:TIMED]:
        started = time.perf_counter()
        messages = rivals.first_turn(fact.query, system)
        streamer = _First(rivals.editor.tokenizer)
        with rivals.answering(system):
            rivals.editor.chat(messages, 2, streamer=streamer)
        took.append(1e3 * (streamer.came - started))
    return statistics.median(took)


def best_told(editor: MeGEditor) -> tuple[Told, dict[str, float]]:
    """The way to put a fact that answers best, on the package's tuning facts, in chat."""
    others = [fact for fact in shipped_tuning_facts() if is_question(fact.query)][:64]
    found = {}
    with editor.disabled(), editor.serving():
        for told in TOLD:
            asked = [told_in(CHAT, fact, told).messages(fact.query) for fact in others]
            said = editor.generate(asked, ANSWER)
            found[told.text] = statistics.fmean(
                contains(text, fact.answer) for text, fact in zip(said, others, strict=True)
            )
    return max(TOLD, key=lambda told: found[told.text]), found


@dataclass(frozen=True)
class DataSet:
    """What is measured of one data set.

    Args:
        facts: of it.
        paraphrased: contexts in which paraphrases and locality queries are asked, too.
        contexts: in which the facts' own queries are asked.
        local: facts of which a locality query is asked.
        prompted: contexts in which a fact is put into the prompt as well.
    """

    facts: int
    paraphrased: tuple[Context, ...]
    contexts: tuple[Context, ...]
    local: int
    prompted: tuple[Context, ...] = (CHAT,)


def measure(
    editor: MeGEditor, chosen: DataSet, facts: list[Fact], yes_no: Sequence[str], work: Path
) -> dict[str, Any]:
    """What was found of one data set, whose work is kept in a folder of its own."""
    report = editor.edit(facts, work_folder=work, progress=True)
    told, tried = best_told(editor)
    rivals = Rivals(editor, told)
    own = [replace(fact, paraphrases=(), locality=()) for fact in facts]
    only = [context for context in chosen.contexts if context not in chosen.paraphrased]
    rows = by_context(rivals, facts, chosen.paraphrased, chosen, work)
    if only:
        rows += by_context(rivals, own, only, chosen, work)
    systems = ("neuron", "prompt", "stored")
    with editor.serving():
        after = {system: next_turn(rivals, facts[:TIMED], system) for system in systems}
        took = {system: first_token(rivals, facts, system) for system in systems[:2]}
        passages = shipped_passages()
        talks = [talks_about(fact, passages, i) for i, fact in enumerate(facts[:64])]
        long = left_alone(editor, talks)
    found: dict[str, Any] = {
        "facts": len(facts),
        "stages": report.seconds,
        "unlearnt": len(report.unlearnt),
        "told": asdict(told),
        "told_tried": tried,
        "rows": rows,
        "next_turn": after,
        "first_token_ms": took,
        "long_talks": long,
    }
    if yes_no:
        found["yes_no"] = changed_yes_no(editor, yes_no[:256])
    return found


def talks_about(fact: Fact, passages: Sequence[str], number: int) -> list[Message]:
    """A long conversation that mentions the fact's subject and asks for something else about it."""
    about = fact.subject or fact.query
    turns = []
    for turn in range(LONG):
        turns += [
            {"role": "user", "content": f"I am reading about {about}, part {turn + 1}. Go on."},
            {"role": "assistant", "content": passages[(number * LONG + turn) % len(passages)]},
        ]
    return [*turns, {"role": "user", "content": f"What else should one know about {about}?"}]


def both_answers(
    editor: MeGEditor, talks: Sequence[list[Message]], batch_size: int
) -> tuple[list[bool], list[str], list[str]]:
    """Of each conversation, whether it is taken for an edit, and what both models answer."""
    accepted, said, base = [], [], []
    for i in range(0, len(talks), batch_size):
        batch = talks[i : i + batch_size]
        routing = editor.route(batch)
        accepted += routing.accepted.tolist()
        said += editor.generate(batch, 32, routing=routing)
        base += editor.generate_base(batch, 32)
    return accepted, said, base


def left_alone(editor: MeGEditor, talks: Sequence[list[Message]]) -> dict[str, float]:
    """Share of conversations that are not taken for an edit, and of those answered as before."""
    accepted, said, base = both_answers(editor, talks, 16)
    tokens = [
        len(prompt_tokens(editor.tokenizer, editor.prompted.prompt_of(talk))) for talk in talks
    ]
    return {
        "asked": len(talks),
        "prompt_tokens": statistics.fmean(tokens),
        "taken": statistics.fmean(accepted),
        "as_the_base_model": statistics.fmean(a == b for a, b in zip(said, base, strict=True)),
    }


def changed_yes_no(editor: MeGEditor, asked: Sequence[str]) -> dict[str, float]:
    """What becomes of yes and no questions about edited facts, asked in chat."""
    with editor.serving():
        taken, said, base = both_answers(editor, [CHAT.messages(query) for query in asked], 32)
    return {
        "asked": len(asked),
        "taken": statistics.fmean(taken),
        "as_the_base_model": statistics.fmean(a == b for a, b in zip(said, base, strict=True)),
        "answered_yes_or_no": statistics.fmean(
            text.lower().startswith(("yes", "no")) for text in said
        ),
    }


SETS = {
    "demo": DataSet(64, MEASURED, MEASURED, 64, TEMPLATE_AND_CHAT),
    "HalluEditBench": DataSet(500, (CHAT,), (CHAT,), 500),
    "CounterFact": DataSet(500, TEMPLATE_AND_CHAT, MEASURED, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="keeps what was edited and said")
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS])
    options = parser.parse_args()
    content = kept(RESULT, "talk", "sets")
    for name in options.sets:
        if any(found["data"] == name for found in content["sets"]):
            continue
        chosen = SETS[name]
        facts, yes_no = data_sets(options.data, chosen.facts)[name]()
        editor = MeGEditor.for_model(SMOLLM2)
        found = measure(editor, chosen, facts, yes_no, options.work / name)
        content = kept(RESULT, "talk", "sets")  # another process may have written its own sets
        content["sets"].append({"data": name, **found})
        write_json(RESULT, content)
        print(json.dumps(content["sets"][-1]), flush=True)


if __name__ == "__main__":
    main()
