"""What the commands print: their tables, and the lines below them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from meg_kernels.facts import Fact

if TYPE_CHECKING:
    from meg_kernels.conversation import Message
    from meg_kernels.editing.by_context import ContextReport
    from meg_kernels.editing.distill import Distillation
    from meg_kernels.editing.editor import MeGEditor
    from meg_kernels.editing.evaluate import EvaluationReport
    from meg_kernels.editing.layers import LayerComparison
    from meg_kernels.familiarity import Calibration
    from meg_kernels.integrations.lm_eval import TaskScores
    from meg_kernels.routing.edits import EditReport, Training


class _Console(Console):
    """Lays out tables; breaks no line of text, so that commands and paths can be copied."""

    def print(self, *objects: Any, **options: Any) -> None:
        texts = all(isinstance(shown, str) for shown in objects)
        super().print(*objects, **{"soft_wrap": texts, **options})


console = _Console(emoji=False)
errors = _Console(stderr=True, emoji=False)


@dataclass(frozen=True)
class EditedFact:
    """One row of `meg list`.

    Args:
        fact: the edited fact.
        generated: whether the generator makes its neuron; else the collected neuron answers.
        learnt: whether the model gave the answer when the neuron was collected.
        served: whether the neuron answers at all; else the base model does.
    """

    fact: Fact
    generated: bool
    learnt: bool
    served: bool

    @property
    def neuron(self) -> str:
        """Where the fact's neuron comes from, in one word."""
        return "generated" if self.generated else "collected"

    def to_dict(self) -> dict[str, Any]:
        """The row as it is written to JSON."""
        fact = self.fact
        return {
            "id": fact.id,
            "query": fact.query,
            "answer": fact.answer,
            "subject": fact.subject,
            "neuron": self.neuron,
            "learnt": self.learnt,
            "served": self.served,
        }


def print_error(error: Exception) -> None:
    """Print what went wrong, in one line, to stderr."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    errors.print(f"[bold red]error:[/] {escape(str(text))}", highlight=False)


def print_components(states: Mapping[str, str]) -> None:
    """Print the parts of the installation and the state of each."""
    table = Table("component", "state", title="MeG Kernels", title_justify="left")
    for component, state in states.items():
        table.add_row(component, state)
    console.print(table)


def print_written(what: str, path: Path) -> None:
    """Say where `what` was written."""
    console.print(f"{what} in {path}", markup=False)


def print_saved(editor: MeGEditor, out: Path) -> None:
    """Say what is edited now, and what is left to do."""
    count = len(editor.facts)
    edited = "1 fact is edited" if count == 1 else f"{count} facts are edited"
    console.print(f"{edited}; saved to {out}", markup=False)
    if left := editor.router.num_left_to_base:
        console.print(f"not learnt, so that the base model answers for them: {left} of them")
    waiting = editor.edits.num_waiting
    if waiting and not editor.edits.is_hypernetworks:
        console.print(
            f"answered by collected neurons until the generator learns theirs: {waiting} of them; "
            f"{shlex.join(['meg', 'train', str(out)])}",
            markup=False,
        )


def print_edit(title: str, report: EditReport, facts: Sequence[Fact], editor: MeGEditor) -> None:
    """Print what was done for `facts`, in one step of editing."""
    unlearnt, training, calibration = report.unlearnt, report.training, report.calibration
    learnt = f"{len(facts) - len(unlearnt)} of {len(facts)} facts learnt"
    if unlearnt and not editor.router.config.serve_unlearnt:
        learnt += f", {len(unlearnt)} left to the base model"
    if report.num_predicted:
        learnt += f"; {report.num_predicted} of them by a predicted neuron"
    kept = f"threshold as it was, {editor.edits.gate.threshold:.3f}"
    results = {
        "collect": learnt,
        "encoder": "as it was" if training is None else "tuned on other facts",
        "gate": kept if calibration is None else calibration_text(calibration),
        "generator": "as it was" if training is None else training_text(training),
    }
    table = Table("stage", "seconds", "result", title=title, title_justify="left")
    for stage, seconds in report.seconds.items():
        table.add_row(stage, f"{seconds:.1f}", results[stage])
    table.add_row("all", f"{sum(report.seconds.values()):.1f}", "")
    console.print(table)
    for fact in unlearnt:
        text = f"{fact.id}: {fact.query!r} -> {fact.answer!r}"
        errors.print(f"[yellow]not learnt:[/] {escape(text)}")


def calibration_text(calibration: Calibration) -> str:
    """The gate's threshold, and how well it separates held-out queries."""
    return (
        f"threshold {calibration.threshold:.3f}; held out: AUROC {calibration.auroc:.3f}, "
        f"{calibration.acceptance:.1%} of {calibration.num_positives} paraphrases accepted, "
        f"{calibration.rejection:.1%} of {calibration.num_negatives} others rejected"
    )


def training_text(training: Training) -> str:
    """How many edited queries the generator answers, and after how many steps."""
    return f"{training.answered:.1%} of edited queries answered after {training.steps} steps"


def print_facts(rows: Sequence[EditedFact]) -> None:
    """Print the edited facts, one a row."""
    table = Table("id", "query", "answer", "subject", "neuron", "learnt")
    for row in rows:
        fact = row.fact
        texts = (escape(text) for text in (fact.id, fact.query, fact.answer, fact.subject or "–"))
        learnt = "yes" if row.learnt else "no" if row.served else "no: left to the base model"
        table.add_row(*texts, row.neuron, learnt)
    console.print(table)
    collected = sum(not row.generated for row in rows)
    unlearnt = sum(not row.learnt for row in rows)
    left = sum(not row.served for row in rows)
    console.print(
        f"{len(rows)} facts are edited; {collected} of them with collected neurons, "
        f"{unlearnt} not learnt, {left} left to the base model",
        highlight=False,
    )


def print_layers(comparison: LayerComparison) -> None:
    """Print what neurons in each layer are worth, the best layer in bold."""
    table = Table(
        Column("layer", no_wrap=True),
        "learnt",
        "Reliability AG",
        "Generality AG",
        "steps",
        "s/fact",
        "norm",
        title=f"{comparison.n} facts, each with its own collected neuron",
        title_justify="left",
    )
    best = comparison.best
    for quality in comparison.layers:
        default = " (default)" if quality.layer == comparison.default else ""
        table.add_row(
            f"{quality.layer}{default}",
            _share(quality.learnt),
            _share(quality.reliability),
            _share(quality.generality),
            f"{quality.steps:.1f}",
            f"{quality.seconds:.2f}",
            f"{quality.norm:.2f}",
            style="bold" if quality is best else "",
        )
    console.print(table)
    by = "Reliability, without paraphrases" if best.generality is None else "Generality"
    console.print(f"best by {by}: layer {best.layer}; edit it: meg edit ... --layer {best.layer}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def print_distillation(report: Distillation) -> None:
    """Print the student beside its teacher, and what the student was before."""
    table = Table(
        Column("sampled network", no_wrap=True),
        "steps",
        "answered",
        "distance to teacher",
        "distance to collected",
        title="Distillation",
        title_justify="left",
    )
    teacher, student = report.teacher, report.student
    sampled = {"teacher": teacher, "undistilled": report.undistilled, "student": student}
    for name, quality in sampled.items():
        table.add_row(
            name,
            str(quality.num_steps),
            f"{quality.answered:.1%}",
            f"{quality.to_teacher:.4f}",
            f"{quality.to_collected:.4f}",
        )
    console.print(table)
    console.print(
        f"answered: of {report.asked} edited queries, by generated neurons; distance: relative L2 "
        f"of their standardised neurons; undistilled: the teacher's network in as few steps; "
        f"{report.steps} training steps",
        style="dim",
        highlight=False,
    )
    if student.answered < teacher.answered:
        errors.print("[yellow]the student answers fewer queries than its teacher[/]")


def print_answers(editor: MeGEditor, prompts: list[str], max_new_tokens: int | None) -> None:
    """Ask the base and the edited model, and print their answers side by side."""
    table = Table(
        "prompt",
        "base model",
        "edited model",
        Column("edited?", no_wrap=True),
        title="Answers (in brackets: the gate's score)",
        title_justify="left",
    )
    routing = editor.route(prompts)
    base = editor.generate_base(prompts, max_new_tokens, routing=routing)
    edited = editor.generate(prompts, max_new_tokens, routing=routing)
    for row, (prompt, before, after) in enumerate(zip(prompts, base, edited, strict=True)):
        texts = (escape(text) for text in (prompt, before, after))
        why = "" if routing.named[row] else ", subject not named"
        if routing.left_to_base[row]:
            why = ", not learnt"
        taken = "yes" if routing.accepted[row] else "no"
        table.add_row(*texts, f"{taken} ({routing.score[row]:.2f}{why})")
    console.print(table)


def print_evaluation(report: EvaluationReport) -> None:
    """Print the metrics of the base and the edited model, and how they were measured."""
    queries = report.protocol["queries"]
    table = Table(
        Column("metric", no_wrap=True),
        "asked",
        "base AG",
        "base TF",
        "edited AG",
        "edited TF",
        Column("ceiling AG", no_wrap=True),
        title=f"{report.n} facts",
        title_justify="left",
    )
    for kind in ("reliability", "generality", "locality"):
        cells = [
            _share(getattr(metrics, f"{kind}_{setting}"))
            for metrics in (report.base, report.metrics)
            for setting in ("ag", "tf")
        ]
        ceiling = None if report.collected is None else getattr(report.collected, f"{kind}_ag")
        table.add_row(kind.capitalize(), str(queries[kind]), *cells, _share(ceiling))
    table.add_row("Score", "", _share(report.base.score), "", _share(report.metrics.score), "", "")
    console.print(table)
    protocol = report.protocol
    console.print(
        f"AG: {protocol['ag']}; TF: {protocol['tf']}; Generality: {protocol['generality']}; "
        f"locality {protocol['locality']}; {protocol['decoding']}; template "
        f"{protocol['prompt_template']!r}; {protocol['dtype']} on {protocol['device']}; left out: "
        f"{protocol['left_out']}; ceiling: each fact's own collected neuron, no gate, no "
        "generator.",
        style="dim",
        markup=False,
        highlight=False,
    )
    edited, generated = protocol["edited_facts"], protocol["generated_facts"]
    if generated < edited:
        console.print(
            f"answered by collected neurons, which the generator has not learnt yet: "
            f"{edited - generated} of {edited} facts",
            highlight=False,
        )
    if left := protocol["left_to_base"]:
        console.print(
            f"not learnt and left to the base model, but counted: {left} of {edited} facts",
            highlight=False,
        )
    served = report.served
    console.print(
        f"{served.queries} queries asked of the edited model, {served.edited} taken for edited "
        f"ones; {served.generated} neurons generated, {served.reused} reused",
        highlight=False,
    )
    if (read := report.perplexity) is not None:
        console.print(
            f"perplexity of {read.passages} passages on other things ({read.tokens} tokens): base "
            f"{read.base:.3f}, edited {read.edited:.3f}; {read.accepted} taken for edited queries",
            highlight=False,
        )
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    console.print(f"seconds: {seconds}", highlight=False)


def print_conversation(editor: MeGEditor, said: list[str], max_new_tokens: int = 48) -> None:
    """Say these, one after the other, in one conversation, and print it."""
    console.print("A conversation (in brackets: what the gate took it for)")
    messages: list[Message] = []
    for text in said:
        messages.append({"role": "user", "content": text})
        routing = editor.route(messages)
        answer = editor.chat(messages, max_new_tokens)
        messages.append({"role": "assistant", "content": answer})
        taken = "nothing edited"
        if routing.accepted[0]:
            taken = editor.edits.facts[int(routing.fact)].query
        console.print(f"  user:  {text}", markup=False, highlight=False)
        console.print(f"  model: {answer}  ({taken})", markup=False, highlight=False)


def print_contexts(report: ContextReport) -> None:
    """Print the shares in each context, and how they were measured."""
    # In a narrow terminal the contexts' names are broken, never the figures.
    figures = ("Relia-\nbility", "con-\ntained", "base", "Gene-\nrality", "con-\ntained")
    table = Table(
        "context",
        *(Column(name, no_wrap=True) for name in (*figures, "Loca-\nlity", "runs\non")),
        title=f"{report.n} facts, asked where people ask",
        title_justify="left",
    )
    for name, shares in report.contexts.items():
        columns = (
            shares.reliability,
            shares.reliability_contained,
            shares.base_reliability,
            shares.generality,
            shares.generality_contained,
            shares.locality,
            shares.runs_on,
        )
        table.add_row(name, *map(_share, columns))
    console.print(table)
    protocol = report.protocol
    console.print(
        f"exact: {protocol['exact']}; contained: {protocol['contained']}; locality: "
        f"{protocol['locality']}; {protocol['decoding']}; {protocol['dtype']} on "
        f"{protocol['device']}",
        style="dim",
        markup=False,
        highlight=False,
    )


def print_tasks(scores: TaskScores) -> None:
    """Print the scores of lm-evaluation-harness, of the base and the edited model."""
    table = Table("task", "metric", "base", "edited", title="Tasks", title_justify="left")
    for score in scores.scores:
        stderr = "" if score.stderr is None else f" ± {score.stderr:.3f}"
        table.add_row(score.task, score.metric, f"{score.base:.3f}{stderr}", f"{score.edited:.3f}")
    console.print(table)
    console.print(
        f"lm_eval {scores.version}; the gate saw {scores.contexts} different contexts and took "
        f"{scores.accepted} for edited queries",
        highlight=False,
    )
