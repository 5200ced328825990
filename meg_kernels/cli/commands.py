"""The commands of `meg` and their options.

A command imports what it needs when it runs: torch and transformers take seconds, which `meg
--help` should not.
"""

from __future__ import annotations

import dataclasses
import platform
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from meg_kernels.checks import SEED, as_path
from meg_kernels.cli.plots import check_plot, plot_contexts, plot_layers
from meg_kernels.cli.tables import (
    EditedFact,
    calibration_text,
    console,
    print_answers,
    print_components,
    print_contexts,
    print_conversation,
    print_distillation,
    print_edit,
    print_evaluation,
    print_facts,
    print_layers,
    print_saved,
    print_tasks,
    print_written,
    training_text,
)
from meg_kernels.cli.work import changing, check_results, resumable
from meg_kernels.facts import Fact, read_facts, unrelated_to
from meg_kernels.storage import write_json

if TYPE_CHECKING:
    import torch

    from meg_kernels import EditorConfig, GeneratorConfig, MeGEditor

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Massive editing of language models by dynamic weight generation.",
)


@app.callback(invoke_without_command=True)
def main(
    shown: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Massive editing of language models by dynamic weight generation."""
    if shown:
        console.print(f"meg-kernels {_version('meg-kernels')}", highlight=False)
        raise typer.Exit


class Dtype(str, Enum):
    """Data types of the language model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    def to_torch(self) -> torch.dtype:
        """The data type as torch names it."""
        import torch

        return getattr(torch, self.value)


class OnConflict(str, Enum):
    """What to do with facts that contradict each other."""

    error = "error"
    first = "first"
    last = "last"


class ZsreTarget(str, Enum):
    """Which field of a ZsRE record is the new answer."""

    answers = "answers"
    alt = "alt"


class GeneratorKind(str, Enum):
    """Kinds of weight generators."""

    dit = "dit"
    dit_b = "dit-b"
    mlp = "mlp"
    hypernetwork = "hypernetwork"
    bank = "bank"


class GateKind(str, Enum):
    """Kinds of familiarity gates."""

    similarity = "similarity"
    familiarity = "familiarity"


class Contexts(str, Enum):
    """In which contexts facts are fitted."""

    all = "all"
    template = "template"


DEFAULT_ENCODER = "all-MiniLM-L6-v2"


def path(value: str) -> Path:
    """A path as it is given on the command line: `Path("")` would be the current folder."""
    try:
        return as_path("it", value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def seed_or_none(value: int | None) -> int | None:
    """A seed as it is given on the command line, also where nothing is drawn from it."""
    try:
        return None if value is None else SEED("it", value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


FactsFile = Annotated[
    Path,
    typer.Argument(parser=path, help="Facts as CounterFact, ZsRE or our own JSON, or JSON lines."),
]
ConflictOption = Annotated[
    OnConflict,
    typer.Option(
        help="What to do with facts that contradict each other: stop with an error, or keep the "
        "first or the last of each."
    ),
]
ZsreOption = Annotated[
    ZsreTarget | None,
    typer.Option(
        help="Which field of a ZsRE record is the new answer: answers, the true one, or alt, a "
        "counterfactual one. Default: answers, with a note if there are both."
    ),
]
ServeUnlearnt = Annotated[
    bool,
    typer.Option(
        help="Use the neurons of facts that were not learnt, too; otherwise the base model "
        "answers for those facts."
    ),
]
Model = Annotated[
    str, typer.Option(help="Language model: smollm2, a folder, or a Hugging Face model id.")
]
Encoder = Annotated[
    str,
    typer.Option(
        help="Text encoder: all-MiniLM-L6-v2, which knows English; multilingual-e5-small, for "
        "other languages; a folder, or a Hugging Face model id."
    ),
]
Folder = Annotated[Path, typer.Argument(parser=path, help="Folder that `meg edit` saved.")]
Out = Annotated[
    Path | None,
    typer.Option(
        parser=path, help="Folder for the result. Default: FOLDER, whose edits it replaces."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Torch device, such as cpu, cuda or cuda:1. Default: an accelerator if there is one."
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Data type of the language model's weights; with float32, answers do not depend on "
        "the batch that a query is in."
    ),
]
LoadDtype = Annotated[
    Dtype | None,
    typer.Option(
        help="Data type of the language model's weights. Default: the one that it was edited in."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N facts.")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", parser=path, help="Write the results to this file, as JSON."),
]
Seed = Annotated[int, typer.Option(callback=seed_or_none, help="Seed of every random choice.")]
Layer = Annotated[
    int | None,
    typer.Option(
        help="Feed-forward layer to edit, counted from 0. Default: three quarters up the model."
    ),
]
Generator = Annotated[
    GeneratorKind,
    typer.Option(
        help="Kind of weight generator, which makes the neurons; dit-b: a DiT of the paper's size; "
        "hypernetwork: needs no training, and makes neurons of facts that it never saw; bank: "
        "keeps each fact's own."
    ),
]
Gate = Annotated[
    GateKind, typer.Option(help="Kind of gate, which tells edited queries from all others.")
]
Snap = Annotated[
    bool,
    typer.Option(
        help="Generate the neuron from the nearest edited query's condition; otherwise from that "
        "of the query itself."
    ),
]


TuningOption = Annotated[
    list[Path] | None,
    typer.Option(
        parser=path,
        help="Other facts, to tune the encoder and calibrate the gate; may be given more than "
        "once. Default: those of FACTS beyond the limit, and the package's where they are few.",
    ),
]
ContextsOption = Annotated[
    Contexts,
    typer.Option(
        help="Where the edits are to hold: in the template, in bare text and in conversations; or "
        "in the template alone, which takes two thirds of the time."
    ),
]
RequireSubject = Annotated[
    bool, typer.Option(help="Edit only queries that name the subject of the edited fact.")
]


@app.command(
    epilog="**Example:** `meg edit facts.jsonl --model smollm2 --out edited`; or, with what `meg "
    "prepare` saved, `meg edit facts.jsonl --prepared prepared --out edited`"
)
def edit(
    context: typer.Context,
    facts: FactsFile,
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the edited model.")],
    model: Model = "smollm2",
    prepared: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Folder that `meg prepare` saved: model, encoder, gate and generator are its own, "
            "and editing takes a fraction of the time.",
        ),
    ] = None,
    limit: Limit = None,
    tuning: TuningOption = None,
    on_conflict: ConflictOption = OnConflict.error,
    zsre_target: ZsreOption = None,
    contexts: ContextsOption = Contexts.all,
    skip_known: Annotated[
        bool,
        typer.Option("--skip-known", help="Leave out facts whose answers the model already gives."),
    ] = False,
    layer: Layer = None,
    generator: Generator = GeneratorKind.dit,
    gate: Gate = GateKind.similarity,
    require_subject: RequireSubject = True,
    snap: Snap = True,
    serve_unlearnt: ServeUnlearnt = False,
    encoder: Encoder = DEFAULT_ENCODER,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Edit FACTS into a model and save the result.

    An interrupted edit resumes when it is started again with the same arguments.
    """
    edited = _read_facts(facts, limit, on_conflict, zsre_target)
    if prepared is not None:
        _only_with(
            context, "prepared", "facts", "out", "limit", "on_conflict", "zsre_target", "device"
        )
        if out.resolve() == prepared.resolve():
            raise ValueError(f"choose another folder than {prepared} for the edited model")
        with changing(context, out, prepared) as change:
            editor = _load(prepared, device)
            if editor.facts:
                raise ValueError(
                    f"{prepared} holds an edited model; `meg add` edits further facts into it"
                )
            report = editor.add(edited, work_folder=change.work, progress=True)
            change.save(editor)
    else:
        config = _editor_config(
            contexts, layer, generator, gate, require_subject, snap, serve_unlearnt, seed
        )
        wanted = config.tuning_facts_for(len(edited))
        others = _tuning_facts(facts, tuning, edited, wanted, zsre_target)
        with changing(context, out) as change:
            editor = _new_editor(model, config, encoder, dtype, device)
            report = editor.edit(
                edited,
                tuning_facts=others,
                skip_known=skip_known,
                work_folder=change.work,
                progress=True,
            )
            change.save(editor)
    print_edit("Editing", report, editor.facts, editor)
    if known := report.num_left_out:
        given = known + len(editor.facts)
        console.print(f"left out: {known} of {given} facts, whose answers the model already gives")
    print_saved(editor, out)
    query = editor.facts[0].query
    console.print(f"ask it: {shlex.join(['meg', 'ask', str(out), query])}", markup=False)


@app.command(
    epilog="**Example:** `meg prepare smollm2 --facts facts.jsonl --limit 2000 --out prepared`"
)
def prepare(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Language model: smollm2, a folder, or a Hugging Face model id.")
    ],
    out: Annotated[Path, typer.Option(parser=path, help="Folder for what is learnt.")],
    facts: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Facts to learn from, like those that will be edited; a thousand or more. "
            "Default: the package's 423.",
        ),
    ] = None,
    limit: Limit = None,
    tuning: TuningOption = None,
    on_conflict: ConflictOption = OnConflict.error,
    zsre_target: ZsreOption = None,
    contexts: ContextsOption = Contexts.all,
    layer: Layer = None,
    gate: Gate = GateKind.similarity,
    require_subject: RequireSubject = True,
    serve_unlearnt: ServeUnlearnt = False,
    encoder: Encoder = DEFAULT_ENCODER,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Learn from facts how to edit others into MODEL at once, and save that; none is edited.

    The result is an edited model without facts: `meg edit --prepared OUT` makes edited models of
    it, each in a folder of its own. An interrupted preparation resumes when it is started again
    with the same arguments.
    """
    from meg_kernels.shipped import shipped_tuning_facts

    learnt = (
        shipped_tuning_facts()[:limit]
        if facts is None
        else _read_facts(facts, limit, on_conflict, zsre_target)
    )
    kind = GeneratorKind.hypernetwork
    config = _editor_config(
        contexts, layer, kind, gate, require_subject, True, serve_unlearnt, seed
    )
    others = None
    if facts is not None:
        wanted = config.tuning_facts_for(len(learnt))
        others = _tuning_facts(facts, tuning, learnt, wanted, zsre_target)
    elif tuning:
        others = _given_tuning_facts(tuning, zsre_target)
    with changing(context, out) as change:
        editor = _new_editor(model, config, encoder, dtype, device)
        report = editor.prepare(learnt, tuning_facts=others, work_folder=change.work, progress=True)
        change.save(editor)
    print_edit("Preparing", report, learnt, editor)
    console.print(f"saved to {out}", markup=False)
    line = ["meg", "edit", "FACTS", "--prepared", str(out), "--out", "edited"]
    console.print(f"edit with it: {shlex.join(line)}", markup=False)


@app.command("list", epilog="**Example:** `meg list edited`")
def list_facts(folder: Folder, report: JsonFile = None) -> None:
    """List the edited facts, without loading the language model.

    A neuron is made by the generator, or still the collected one until `meg train` teaches it to
    the generator. A fact is learnt if the model gave its answer when the neuron was collected; for
    one that was not, the base model answers, unless `--serve-unlearnt` was asked for.
    """
    from meg_kernels.routing.saving import load_edits

    check_results(report)
    saved = load_edits(folder, "cpu")
    edits, serve_unlearnt = saved.edits, saved.config["serve_unlearnt"]
    states = zip(edits.facts, edits.generated.tolist(), edits.learnt.tolist(), strict=True)
    edited = [
        EditedFact(fact, generated, learnt, learnt or serve_unlearnt)
        for fact, generated, learnt in states
    ]
    print_facts(edited)
    if report is not None:
        write_json(report, [row.to_dict() for row in edited])
        print_written("list", report)


@app.command(epilog="**Example:** `meg add edited more.jsonl`")
def add(
    context: typer.Context,
    folder: Folder,
    facts: FactsFile,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace edited facts that have the same query or id."),
    ] = False,
    on_conflict: ConflictOption = OnConflict.error,
    zsre_target: ZsreOption = None,
    limit: Limit = None,
    out: Out = None,
    device: Device = None,
) -> None:
    """Edit further FACTS into an edited model; those that are in it keep their answers.

    The neurons of FACTS are kept as they are collected, until `meg train` teaches them to the
    generator. An interrupted addition resumes when it is started again with the same arguments.
    """
    out = out or folder
    added = _read_facts(facts, limit, on_conflict, zsre_target)
    with changing(context, out, folder) as change:
        editor = _load(folder, device)
        before = len(editor.facts)
        report = editor.add(added, replace=replace, work_folder=change.work, progress=True)
        change.save(editor)
    print_edit("Adding", report, added, editor)
    if replaced := before + len(added) - len(editor.facts):
        console.print(f"edited facts that they replaced: {replaced}", highlight=False)
    print_saved(editor, out)


@app.command(epilog='**Example:** `meg remove edited "What is the capital of France?"`')
def remove(
    context: typer.Context,
    folder: Folder,
    facts: Annotated[
        list[str],
        typer.Argument(help="Ids or queries of edited facts; see `meg list`."),
    ],
    out: Out = None,
    device: Device = None,
) -> None:
    """Take edits back: the base model answers their queries again."""
    out = out or folder
    from meg_kernels.routing.saving import load_edits

    with changing(context, out, folder) as change:
        edits = load_edits(folder, "cpu").edits  # names are checked before the model is loaded
        if len(edits.rows_to_remove(facts)) == len(edits):
            raise ValueError(f"these are all edited facts; instead, delete the folder {folder}")
        editor = _load(folder, device)
        editor.remove(facts)
        change.save(editor)
    print_saved(editor, out)


@app.command("layers", epilog="**Example:** `meg layers facts.jsonl --limit 32 --plot layers.png`")
def try_layers(
    facts: FactsFile,
    model: Model = "smollm2",
    limit: Limit = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to compare, such as 4,8,12. Default: every second one. The layer that "
            "`meg edit` takes by default is always among them."
        ),
    ] = None,
    on_conflict: ConflictOption = OnConflict.error,
    zsre_target: ZsreOption = None,
    report: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Draw the comparison to this file, as PNG, PDF or SVG; needs matplotlib.",
        ),
    ] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Compare feed-forward layers, to choose the one to edit.

    A few dozen facts with paraphrases are enough. An interrupted comparison resumes when it is
    started again with the same arguments.
    """
    from meg_kernels.editing.layers import compare_layers
    from meg_kernels.editing.prompting import PromptedModel
    from meg_kernels.pretrained import load_language_model

    chosen = None if layers is None else _numbers(layers)
    asked = _read_facts(facts, limit, on_conflict, zsre_target)
    check_results(report, plot)
    if plot is not None:
        check_plot(plot)  # now, not when the work is done
    with _loading(model):
        loaded, tokenizer = load_language_model(model, dtype.to_torch(), device)
    with resumable("layers", facts.resolve(), model) as work:
        comparison = compare_layers(
            PromptedModel.of(loaded, tokenizer), asked, chosen, work_folder=work, progress=True
        )
        print_layers(comparison)
        if report is not None:
            write_json(report, {"model": model} | comparison.to_dict())
            print_written("report", report)
        if plot is not None:
            plot_layers(comparison, plot)
            print_written("plot", plot)


@app.command(epilog="**Example:** `meg evaluate edited --json report.json`")
def evaluate(
    folder: Folder,
    facts: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="File of the edited facts with other paraphrases or locality queries. Default: "
            "the facts as they were edited.",
        ),
    ] = None,
    limit: Limit = None,
    on_conflict: ConflictOption = OnConflict.error,
    zsre_target: ZsreOption = None,
    contexts: Annotated[
        bool,
        typer.Option(
            "--contexts",
            help="Ask in conversations and elsewhere instead of in the template alone.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(parser=path, help="Draw --contexts to this file, such as contexts.png."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness to run too, such as arc_easy,piqa; needs lm-eval."
        ),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(parser=path, help="Folder with further tasks, as YAML.")
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first N examples of each task.")
    ] = None,
    report: JsonFile = None,
    device: Device = None,
    dtype: LoadDtype = None,
) -> None:
    """Measure Reliability, Generality and Locality of an edited model, and its general ability.

    An interrupted evaluation resumes when it is started again with the same arguments.
    """
    if contexts and tasks is not None:
        raise typer.BadParameter("--contexts and --tasks are two evaluations; run one of them")
    if tasks is not None:
        from meg_kernels.integrations.lm_eval import evaluate_tasks
    elif task_path is not None or task_limit is not None:
        raise typer.BadParameter("--task-path and --task-limit need --tasks")
    if plot is not None:
        if not contexts:
            raise typer.BadParameter("--plot draws what --contexts measures; add --contexts")
        check_plot(plot)
    check_results(report)
    read = None if facts is None else _read_facts(facts, limit, on_conflict, zsre_target)
    editor = _load(folder, device, dtype)
    asked = editor.facts[:limit] if read is None else read
    with resumable("evaluate", folder.resolve()) as work:
        if contexts:
            found = editor.evaluate_by_context(asked, work_folder=work, progress=True)
            print_contexts(found)
            if plot is not None:
                plot_contexts(found, plot)
                print_written("plot", plot)
            content = found.to_dict()
        else:
            evaluation = editor.evaluate(asked, work_folder=work, progress=True)
            passages = editor.perplexity(progress=True)
            evaluation = dataclasses.replace(evaluation, perplexity=passages)
            print_evaluation(evaluation)
            content = evaluation.to_dict()
        if tasks is not None:
            names = [name.strip() for name in tasks.split(",")]
            scores = evaluate_tasks(editor, names, task_path=task_path, limit=task_limit)
            print_tasks(scores)
            content["tasks"] = dataclasses.asdict(scores)
        if report is not None:
            write_json(report, content)
            print_written("report", report)


@app.command(
    epilog='**Example:** `meg ask edited "What is the capital of France?" "Who wrote Emma?"`'
)
def ask(
    folder: Folder,
    prompts: Annotated[list[str], typer.Argument(help="Questions, or sentences to complete.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of the longest answer, in tokens. Default: 32, or as edited."
        ),
    ] = None,
    device: Device = None,
    dtype: LoadDtype = None,
) -> None:
    """Ask the base and the edited model, side by side."""
    print_answers(_load(folder, device, dtype), prompts, max_new_tokens)


@app.command(epilog="**Example:** `meg chat edited`")
def chat(
    folder: Folder,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of the longest answer, in tokens. Default: 256, or as edited."
        ),
    ] = None,
    device: Device = None,
    dtype: LoadDtype = None,
) -> None:
    """Talk with an edited model, see which edit answered, and edit on the fly."""
    import contextlib

    from meg_kernels.cli.chat import Chat

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() lets the user edit the line
    Chat(_load(folder, device, dtype), folder, max_new_tokens).run()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="**Example:** `meg serve edited --port 8000 --max-model-len 2048`",
)
def serve(context: typer.Context, folder: Folder) -> None:
    """Serve an edited model with vLLM's OpenAI server, which takes all of vLLM's options."""
    from meg_kernels.integrations.vllm.server import serve as become_server

    become_server(folder, context.args)


@app.command(epilog="**Example:** `meg train edited --generator mlp --out edited-mlp`")
def train(
    context: typer.Context,
    folder: Folder,
    generator: Annotated[
        GeneratorKind | None,
        typer.Option(
            help="Kind of a new generator, trained from the start. Default: train the present one "
            "further, on the facts that were added."
        ),
    ] = None,
    out: Out = None,
    seed: Annotated[
        int | None,
        typer.Option(callback=seed_or_none, help="Seed of a new generator. Default: 0."),
    ] = None,
    device: Device = None,
) -> None:
    """Train a generator on the neurons that were collected for all edited facts.

    An interrupted training resumes when it is started again with the same arguments.
    """
    if generator is None and seed is not None:
        raise typer.BadParameter("--seed is for a new generator; choose one with --generator")
    out = out or folder
    with changing(context, out, folder) as change:
        editor = _load(folder, device)
        before = editor.edits
        if generator is None:
            training = editor.train(work_folder=change.work, progress=True)
        else:
            config = _generator_config(generator, seed or 0)
            training = editor.replace_generator(config, work_folder=change.work, progress=True)
        change.save(editor)
    if editor.edits is before:
        console.print("the generator learns nothing further; --generator trains another one")
    else:
        seconds = editor.edits.report.seconds["generator"]
        if generator is None:  # trained further: these are with those that it had taken before
            seconds -= before.report.seconds.get("generator", 0.0)
        console.print(f"{training_text(training)}, in {seconds:.1f} s", highlight=False)
    print_saved(editor, out)


@app.command("gate", epilog="**Example:** `meg gate edited --threshold 0.7`")
def set_gate(
    context: typer.Context,
    folder: Folder,
    gate: Annotated[
        GateKind | None, typer.Option(help="Kind of gate. Default: that of the present one.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Score above which a query is taken for an edited one: a higher one gives more "
            "Locality and less Generality. Default: the present one."
        ),
    ] = None,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated", help="Take the threshold calibrated on other facts, not a chosen one."
        ),
    ] = False,
    require_subject: Annotated[
        bool | None,
        typer.Option(
            help="Edit only queries that name the subject of the edited fact. Default: as it was "
            "set before."
        ),
    ] = None,
    serve_unlearnt: Annotated[
        bool | None,
        typer.Option(
            help="Use the neurons of facts that were not learnt, too, or leave those facts to the "
            "base model. Default: as it was set before."
        ),
    ] = None,
    out: Out = None,
    device: Device = None,
) -> None:
    """Put another gate, or another threshold, into an edited model.

    Scores are cosines to the nearest edited query (similarity), or minus the entropy of the
    prediction in nats (familiarity).
    """
    if calibrated and threshold is not None:
        raise typer.BadParameter("choose one of --threshold and --calibrated")
    out = out or folder
    with changing(context, out, folder) as change:
        editor = _load(folder, device)
        calibration = editor.set_gate(
            None if gate is None else gate.value,
            threshold="calibrated" if calibrated else threshold,
            require_subject=require_subject,
            serve_unlearnt=serve_unlearnt,
            progress=True,
        )
        change.save(editor)
    console.print(calibration_text(calibration), highlight=False)
    if (chosen := editor.config.threshold) is not None:
        console.print(f"accepts scores above {chosen}, as asked", highlight=False)
    print_saved(editor, out)


@app.command(epilog="**Example:** `meg distill edited --steps 2`")
def distill(
    context: typer.Context,
    folder: Folder,
    steps: Annotated[int, typer.Option(help="Sampling steps from now on, 1 to 4.")],
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            help="Sampling steps of the teacher, a multiple of STEPS. Default: the multiple that "
            "is closest to 50."
        ),
    ] = None,
    out: Out = None,
    seed: Annotated[
        int | None,
        typer.Option(callback=seed_or_none, help="Seed of the training. Default: the edit's."),
    ] = None,
    device: Device = None,
) -> None:
    """Train an edited model's DiT to sample in a few steps what it samples in many.

    Teacher and student are sampled with ddim, whatever the generator was sampled with before. An
    interrupted distillation resumes when it is started again with the same arguments.
    """
    out = out or folder
    with changing(context, out, folder) as change:
        editor = _load(folder, device)
        sampler = editor.edits.protocol()["sampler"]  # None where the generator is no DiT
        distillation = editor.distill(
            steps, teacher_steps=teacher_steps, seed=seed, work_folder=change.work, progress=True
        )
        change.save(editor)
    print_distillation(distillation)
    if sampler["solver"] != "ddim":
        console.print(f"sampled with ddim from now on, no longer with {sampler['solver']}")
    console.print(f"saved to {out}", markup=False)


@app.command(epilog="**Example:** `meg demo --json demo.json`")
def demo(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Keep the edited model in this folder.")
    ] = None,
    report: JsonFile = None,
    limit: Limit = None,
    generator: Generator = GeneratorKind.dit,
    gate: Gate = GateKind.similarity,
    snap: Snap = True,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Edit SmolLM2-135M-Instruct with the package's 64 facts, ask it and measure it."""
    from meg_kernels.conversation import has_chat
    from meg_kernels.editing.contexts import Context
    from meg_kernels.shipped import demo_facts

    check_results(report)
    facts = demo_facts()[:limit]
    console.print(f"editing [bold]{len(facts)}[/] facts into SmolLM2-135M-Instruct")
    config = _editor_config(Contexts.all, None, generator, gate, True, snap, False, seed)
    with nullcontext() if out is None else changing(context, out) as change:
        editor = _new_editor("smollm2", config, DEFAULT_ENCODER, dtype, device)
        edited = editor.edit(facts, progress=True)
        if change is not None:
            change.save(editor)
    print_edit("Editing", edited, facts, editor)
    asked = [query for fact in facts[:4] for query in (fact.paraphrases[0], fact.locality[0].query)]
    print_answers(editor, asked, 16)
    evaluation = editor.evaluate(progress=True)
    print_evaluation(evaluation)
    content = evaluation.to_dict()
    if has_chat(editor.tokenizer):
        print_conversation(editor, [f"Hello! {asked[0]}", f"Thanks. {asked[1]}", asked[2]])
        short = [dataclasses.replace(f, paraphrases=(), locality=f.locality[:1]) for f in facts]
        chats = editor.evaluate_by_context(
            short, [Context("chat", "chat")], max_new_tokens=24, progress=True
        )
        print_contexts(chats)
        content["contexts"] = chats.to_dict()
    if report is not None:
        write_json(report, content)
        print_written("report", report)


@app.command(epilog="**Example:** `meg info`")
def info() -> None:
    """Show versions, devices, and which backends are usable or why not."""
    import torch

    from meg_kernels.nn.packing import packing_choices
    from meg_kernels.ops.backend import BACKENDS, choose, forced_backend, unusable_reason
    from meg_kernels.precision import bfloat16_choice

    states = {"torch": str(torch.__version__)}  # with what it is built for
    for package in ("meg-kernels", "transformers", "triton", "flash-attn"):
        states[package] = _version(package)
    states["python"] = f"{platform.python_version()} on {platform.machine()}"
    states["cpu threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            states[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
    for name in BACKENDS:
        device = torch.device("cpu" if name == "cpu" else "cuda")
        reason = unusable_reason(name, device)
        states[f"backend {name}"] = "usable" if reason is None else f"off: {reason}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = "chosen automatically" if forced_backend() is None else "forced"
    states[f"ops on {device} run on"] = f"{choose('meg info', device)}, {how}"
    for choice in (bfloat16_choice(device), *packing_choices()):
        states[choice.what] = f"{choice.chosen}; {choice.why}"
    print_components(states)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Say that `name` is being loaded, in place of transformers' own bars and notes."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with console.status(f"loading {escape(name)}"):
        yield


def _only_with(context: typer.Context, option: str, *allowed: str) -> None:
    """Refuse what was given on the command line beside an option that decides it."""
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in (option, *allowed):
            raise ValueError(
                f"leave out --{name.replace('_', '-')}, which --{option} decides or has no use for"
            )


def _editor_config(
    contexts: Contexts,
    layer: int | None,
    generator: GeneratorKind,
    gate: GateKind,
    require_subject: bool,
    snap: bool,
    serve_unlearnt: bool,
    seed: int,
) -> EditorConfig:
    from meg_kernels import CollectionConfig, EditorConfig, EncoderTuningConfig
    from meg_kernels.editing.contexts import FITTED, TEMPLATE

    fitted = FITTED if contexts is Contexts.all else TEMPLATE
    return EditorConfig(
        layer=layer,
        collection=CollectionConfig(contexts=fitted),
        encoder_tuning=EncoderTuningConfig(seed=seed),
        generator=_generator_config(generator, seed),
        gate=gate.value,
        require_subject=require_subject,
        snap=snap,
        serve_unlearnt=serve_unlearnt,
        seed=seed,
    )


def _new_editor(
    model: str, config: EditorConfig, encoder: str, dtype: Dtype, device: str | None
) -> MeGEditor:
    from meg_kernels import MeGEditor

    with _loading(model):
        return MeGEditor.for_model(
            model, config, encoder=encoder, dtype=dtype.to_torch(), device=device
        )


def _load(folder: Path, device: str | None, dtype: Dtype | None = None) -> MeGEditor:
    from meg_kernels import MeGEditor

    with _loading(str(folder)):
        return MeGEditor.from_pretrained(
            folder, device=device, dtype=None if dtype is None else dtype.to_torch()
        )


def _generator_config(kind: GeneratorKind, seed: int) -> GeneratorConfig:
    from meg_kernels import GeneratorConfig

    if kind is GeneratorKind.dit:
        return GeneratorConfig.dit(seed=seed)
    if kind is GeneratorKind.dit_b:
        return GeneratorConfig.dit_b(seed=seed)
    if kind is GeneratorKind.mlp:
        return GeneratorConfig.mlp(seed=seed)
    if kind is GeneratorKind.hypernetwork:
        return GeneratorConfig.hypernetwork()
    return GeneratorConfig.bank()


def _read_facts(
    path: Path, limit: int | None, on_conflict: OnConflict, zsre_target: ZsreTarget | None
) -> list[Fact]:
    return read_facts(
        path,
        limit,
        on_conflict=on_conflict.value,
        zsre_target=None if zsre_target is None else zsre_target.value,
    )


def _tuning_facts(
    facts: Path,
    tuning: list[Path] | None,
    edited: list[Fact],
    wanted: int,
    zsre_target: ZsreTarget | None = None,
) -> list[Fact]:
    """The tuning files' facts, or those of the file that are not edited, filled up with ours."""
    from meg_kernels.shipped import shipped_tuning_facts

    if tuning:
        return _given_tuning_facts(tuning, zsre_target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest = _read_facts(facts, None, OnConflict.first, zsre_target)
    others = [fact for fact in unrelated_to(rest, edited) if fact.paraphrases]
    return others if len(others) >= wanted else [*others, *shipped_tuning_facts()]


def _given_tuning_facts(tuning: list[Path], zsre_target: ZsreTarget | None) -> list[Fact]:
    return [
        fact for path in tuning for fact in _read_facts(path, None, OnConflict.first, zsre_target)
    ]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of layers such as 4,8,12") from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
