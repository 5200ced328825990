"""The command `meg`: edit facts into a language model, ask it, evaluate it."""

from __future__ import annotations

import dataclasses
import logging
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from meg_kernels.storage import write_json

if TYPE_CHECKING:
    from meg_kernels.editing.distill import Distillation
    from meg_kernels.editing.editor import EditReport, MeGEditor
    from meg_kernels.editing.evaluate import EvaluationReport
    from meg_kernels.editing.layers import LayerComparison
    from meg_kernels.facts import Fact
    from meg_kernels.familiarity import Calibration
    from meg_kernels.integrations.lm_eval import TaskScores
    from meg_kernels.routing.edits import Training
    from meg_kernels.routing.generators import GeneratorConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Massive editing of language models by dynamic weight generation.",
)
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)


class Dtype(str, Enum):
    """Of the language model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class GeneratorKind(str, Enum):
    """The weight generators."""

    dit = "dit"
    dit_b = "dit-b"
    mlp = "mlp"
    bank = "bank"


class GateKind(str, Enum):
    """The familiarity gates."""

    similarity = "similarity"
    familiarity = "familiarity"


Facts = Annotated[Path, typer.Argument(help="CounterFact or ZsRE JSON, or JSON lines.")]
Model = Annotated[str, typer.Option(help="smollm2, a folder, or a Hugging Face id.")]
Folder = Annotated[Path, typer.Argument(help="What `meg edit` saved.")]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder for the result. Default: FOLDER, whose edits it replaces."),
]
Device = Annotated[str, typer.Option(help="Torch device, e.g. cpu, cuda, cuda:1.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="Of the model's weights; float32 keeps answers independent of batching."),
]
LoadDtype = Annotated[
    Optional[Dtype],  # noqa: UP045
    typer.Option(help="Of the model's weights. Default: as it was edited in."),
]
Limit = Annotated[Optional[int], typer.Option(min=1, help="Use the first N facts only.")]  # noqa: UP045
JsonOut = Annotated[Optional[Path], typer.Option("--json", help="Write the report here.")]  # noqa: UP045
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
Layer = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Edited feed-forward layer, from 0. Default: three quarters up the model."),
]
Generator = Annotated[
    GeneratorKind, typer.Option(help="What makes the neurons; dit-b: a DiT of the paper's size.")
]
Gate = Annotated[GateKind, typer.Option(help="What tells edited queries from others.")]
SAVING = ("edit", "add", "train", "distill")
"""Commands of long work whose result is an edited model."""

SUBJECT = "Edit only queries that name the subject of the nearest edited fact. Default:"
Encoder = Annotated[str, typer.Option(help="Text encoder: a folder or a Hugging Face model id.")]


@app.command(epilog="**Example:** `meg edit facts.jsonl --model smollm2 --out edited`")
def edit(
    facts: Facts,
    out: Annotated[Path, typer.Option(help="Folder for the edited model.")],
    model: Model = "smollm2",
    limit: Limit = None,
    tuning: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            help="Other facts, to tune the encoder and calibrate the gate; may be given more than "
            "once. Default: those of FACTS beyond the limit, and the package's where they are few."
        ),
    ] = None,
    on_conflict: Annotated[
        str, typer.Option(help="Facts that contradict each other: error, or keep the first.")
    ] = "error",
    skip_known: Annotated[
        bool,
        typer.Option("--skip-known", help="Leave out facts that the model answers so already."),
    ] = False,
    layer: Layer = None,
    generator: Generator = GeneratorKind.dit,
    gate: Gate = GateKind.similarity,
    require_subject: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help=f"{SUBJECT} from 1000 edited facts on."),
    ] = None,
    snap: Annotated[
        bool, typer.Option(help="Generate from the nearest edited query's condition.")
    ] = True,
    encoder: Encoder = "all-MiniLM-L6-v2",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Edit FACTS into a model and save the result.

    An interrupted edit resumes when it is started again with the same arguments.
    """
    from meg_kernels.facts import read_facts

    if on_conflict not in ("error", "first"):
        raise typer.BadParameter(f"{on_conflict!r} is neither 'error' nor 'first'")
    edited = read_facts(facts, limit, on_conflict=on_conflict)  # type: ignore[arg-type]
    editor = _editor(
        model, encoder, layer, generator, gate, snap, seed, device, dtype, require_subject
    )
    others = _tuning_facts(facts, tuning, edited, editor.config.tuning_facts_for(len(edited)))
    # Beside the result, so that it is found again; gone when the result is written.
    with _work_folder(out, "edit") as work:
        report = editor.edit(
            edited, tuning=others, skip_known=skip_known, work_folder=work, progress=True
        )
        editor.save_pretrained(out)
    _print_edit("Editing", report, editor.facts, editor)
    if known := report.known:
        given = known + len(editor.facts)
        console.print(f"left out: {known} of {given} facts, which the model answers so already")
    _print_saved(editor, out)
    query = editor.facts[0].query
    console.print(f"ask it: {shlex.join(['meg', 'ask', str(out), query])}", markup=False)


@app.command(epilog="**Example:** `meg add edited more.jsonl`")
def add(
    folder: Folder,
    facts: Facts,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="In place of edited facts with the same query or id."),
    ] = False,
    limit: Limit = None,
    out: Out = None,
    device: Device = "cpu",
) -> None:
    """Edit further FACTS into an edited model; those that are in it keep their answers.

    The neurons of FACTS are kept as they are collected, until `meg train` teaches them to the
    generator. An interrupted addition resumes when it is started again with the same arguments.
    """
    from meg_kernels.facts import read_facts

    out = folder if out is None else out
    added = read_facts(facts, limit)
    editor = _load(folder, device, None)
    before = len(editor.facts)
    with _work_folder(out, "add") as work:
        report = editor.add(added, replace=replace, work_folder=work, progress=True)
        editor.save_pretrained(out)
    _print_edit("Adding", report, added, editor)
    if replaced := before + len(added) - len(editor.facts):
        console.print(f"facts that they took the place of: {replaced}", highlight=False)
    _print_saved(editor, out)


@app.command(epilog="**Example:** `meg remove edited dynamite`")
def remove(
    folder: Folder,
    ids: Annotated[list[str], typer.Argument(help="The facts' ids.")],
    out: Out = None,
    device: Device = "cpu",
) -> None:
    """Take edits back: the base model answers their queries again."""
    out = folder if out is None else out
    editor = _load(folder, device, None)
    if not {fact.id for fact in editor.facts} - set(ids):
        raise ValueError(f"these are all edited facts; instead, delete the folder {folder}")
    editor.remove(ids)
    editor.save_pretrained(out)
    _print_saved(editor, out)


@app.command("layers", epilog="**Example:** `meg layers facts.jsonl --limit 32 --plot layers.png`")
def compare_layers(
    facts: Facts,
    model: Model = "smollm2",
    limit: Limit = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Which, e.g. 4,8,12. Default: every second one. The one that `meg edit` takes by "
            "default is always among them."
        ),
    ] = None,
    json: JsonOut = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw them here, as PNG, PDF or SVG; needs matplotlib."),
    ] = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Compare feed-forward layers, to choose the one to edit.

    Some tens of facts with paraphrases are enough. An interrupted comparison resumes when it is
    started again with the same arguments.
    """
    import torch

    from meg_kernels.editing.layers import compare_layers, plot_layers, require_matplotlib
    from meg_kernels.facts import read_facts
    from meg_kernels.pretrained import load_language_model

    chosen = None if layers is None else _numbers(layers)
    asked = read_facts(facts, limit)
    if plot is not None:
        require_matplotlib()  # now, not when the work is done
    with console.status(f"loading {escape(model)}"):
        loaded, tokenizer = load_language_model(model, getattr(torch, dtype.value), device)
    with _work_folder(json or plot or Path("layers"), "layers") as work:
        comparison = compare_layers(
            loaded, tokenizer, asked, chosen, work_folder=work, progress=True
        )
        _print_layers(comparison)
        _write_report(json, {"model": model} | comparison.to_dict())
        if plot is not None:
            plot_layers(comparison, plot)
            console.print(f"plot in {plot}", markup=False)


@app.command(epilog="**Example:** `meg evaluate edited --json report.json`")
def evaluate(
    folder: Folder,
    facts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The edited facts with other paraphrases or locality queries."),
    ] = None,
    limit: Limit = None,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of lm-evaluation-harness, e.g. arc_easy,piqa; needs lm-eval."),
    ] = None,
    task_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with further tasks, as YAML."),
    ] = None,
    task_limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Examples of each task. Default: all."),
    ] = None,
    json: JsonOut = None,
    device: Device = "cpu",
    dtype: LoadDtype = None,
) -> None:
    """Measure Reliability, Generality and Locality of an edited model, and its general ability.

    An interrupted evaluation resumes when it is started again with the same arguments.
    """
    from meg_kernels.facts import read_facts

    if tasks is not None:
        from meg_kernels.integrations.lm_eval import evaluate_tasks
    elif task_path is not None or task_limit is not None:
        raise typer.BadParameter("--task-path and --task-limit need --tasks")
    editor = _load(folder, device, dtype)
    asked = editor.facts[:limit] if facts is None else read_facts(facts, limit)
    with _work_folder(folder, "evaluate") as work:
        report = editor.evaluate(asked, work_folder=work, progress=True)
        report = dataclasses.replace(report, perplexity=editor.perplexity(progress=True))
        _print_report(report)
        content = report.to_dict()
        if tasks is not None:
            names = [name.strip() for name in tasks.split(",")]
            scores = evaluate_tasks(editor, names, task_path=task_path, limit=task_limit)
            _print_tasks(scores)
            content["tasks"] = dataclasses.asdict(scores)
        _write_report(json, content)


@app.command(
    epilog='**Example:** `meg ask edited "What is the capital of France?" "Who wrote Emma?"`'
)
def ask(
    folder: Folder,
    prompts: Annotated[list[str], typer.Argument(help="Questions, or sentences to complete.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 32,
    device: Device = "cpu",
    dtype: LoadDtype = None,
) -> None:
    """Ask the base and the edited model, side by side."""
    _print_answers(_load(folder, device, dtype), prompts, max_new_tokens)


@app.command(epilog="**Example:** `meg train edited --generator mlp --out edited-mlp`")
def train(
    folder: Folder,
    generator: Annotated[
        Optional[GeneratorKind],  # noqa: UP045
        typer.Option(
            help="Train one of this kind from the start. Default: train the present one further, "
            "on facts that were added."
        ),
    ] = None,
    out: Out = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Of a generator trained from the start. Default: 0."),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Train a generator on the neurons that were collected for all edited facts.

    An interrupted training resumes when it is started again with the same arguments.
    """
    if generator is None and seed is not None:
        raise typer.BadParameter("--seed is of a new generator: give its --generator too")
    out = folder if out is None else out
    editor = _load(folder, device, None)
    before = editor.edits
    config = None if generator is None else _generator_config(generator, seed or 0)
    with _work_folder(out, "train") as work:
        training = editor.train(config, work_folder=work, progress=True)
        editor.save_pretrained(out)
    if editor.edits is before:
        console.print("the generator makes all neurons already; --generator trains another one")
    else:
        seconds = editor.edits.report.seconds["generator"]
        if generator is None:  # trained further: these are with those that it had taken before
            seconds -= before.report.seconds["generator"]
        console.print(f"{_trained(training)}, in {seconds:.1f} s", highlight=False)
    _print_saved(editor, out)


@app.command("gate", epilog="**Example:** `meg gate edited --threshold 0.7`")
def set_gate(
    folder: Folder,
    gate: Annotated[
        Optional[GateKind],  # noqa: UP045
        typer.Option(help="Its kind. Default: that of the present one."),
    ] = None,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Accept scores above this: the higher, the more Locality and the less Generality. "
            "Default: as it is."
        ),
    ] = None,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated", help="Take the threshold calibrated on other facts, not a chosen one."
        ),
    ] = False,
    require_subject: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help=f"{SUBJECT} as it is."),
    ] = None,
    out: Out = None,
    device: Device = "cpu",
) -> None:
    """Put another gate, or another threshold, into an edited model.

    Scores are cosines to the nearest edited query (similarity), or minus the entropy of the
    prediction in nats (familiarity).
    """
    out = folder if out is None else out
    editor = _load(folder, device, None)
    kind: Any = None if gate is None else gate.value
    calibration = editor.set_gate(
        kind,
        threshold=threshold,
        calibrated=calibrated,
        require_subject=require_subject,
        progress=True,
    )
    editor.save_pretrained(out)
    console.print(_calibrated(calibration), highlight=False)
    if (chosen := editor.config.threshold) is not None:
        console.print(f"accepts scores above {chosen}, as asked", highlight=False)
    _print_saved(editor, out)


@app.command(epilog="**Example:** `meg distill edited --steps 2`")
def distill(
    folder: Folder,
    steps: Annotated[int, typer.Option(help="Sampling steps from now on, 1 to 4.")],
    teacher_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="In which the generator teaches them: a multiple of STEPS. Default: the one "
            "closest to 50."
        ),
    ] = None,
    out: Out = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Of the training. Default: the edit's."),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Train an edited model's DiT to sample in a few steps what it samples in many.

    Teacher and student are sampled with ddim, whatever the generator was sampled with before. An
    interrupted distillation resumes when it is started again with the same arguments.
    """
    out = folder if out is None else out
    editor = _load(folder, device, None)
    sampler = editor.config.generator.to_dict().get("sampler")
    with _work_folder(out, "distill") as work:
        report = editor.distill(
            steps, teacher_steps=teacher_steps, seed=seed, work_folder=work, progress=True
        )
        editor.save_pretrained(out)
    _print_distillation(report)
    if sampler and sampler["solver"] != "ddim":
        console.print(f"sampled with ddim from now on, no longer with {sampler['solver']}")
    console.print(f"saved to {out}", markup=False)


@app.command(epilog="**Example:** `meg demo --json demo.json`")
def demo(
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Keep the edited model in this folder."),
    ] = None,
    json: JsonOut = None,
    limit: Limit = None,
    generator: Generator = GeneratorKind.dit,
    gate: Gate = GateKind.similarity,
    snap: Annotated[
        bool, typer.Option(help="Generate from the nearest edited query's condition.")
    ] = True,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Edit SmolLM2-135M-Instruct with the package's 64 facts, ask it and measure it."""
    from meg_kernels.shipped import demo_facts

    facts = demo_facts()[:limit]
    console.print(f"editing [bold]{len(facts)}[/] facts into SmolLM2-135M-Instruct")
    editor = _editor(
        "smollm2", "all-MiniLM-L6-v2", None, generator, gate, snap, seed, device, dtype
    )
    report = editor.edit(facts, progress=True)
    if out is not None:
        editor.save_pretrained(out)
    _print_edit("Editing", report, facts, editor)
    asked = [query for fact in facts[:4] for query in (fact.paraphrases[0], fact.locality[0].query)]
    _print_answers(editor, asked, 16)
    evaluation = editor.evaluate(progress=True)
    _print_report(evaluation)
    _write_report(json, evaluation.to_dict())


@app.command(epilog="**Example:** `meg info`")
def info() -> None:
    """Show versions, devices, and which backends are usable or why not."""
    import torch

    from meg_kernels.nn.packing import packing_choices
    from meg_kernels.ops.backend import BACKENDS, choose, forced_backend, unusable_reason
    from meg_kernels.precision import bfloat16_choice

    table = Table("component", "state", title="MeG Kernels", title_justify="left")
    table.add_row("torch", torch.__version__)  # with what it is built for
    for package in ("meg-kernels", "transformers", "triton", "flash-attn"):
        table.add_row(package, _version(package))
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}")
    table.add_row("cpu threads", str(torch.get_num_threads()))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            table.add_row(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}")
    for name in BACKENDS:
        device = torch.device("cpu" if name == "cpu" else "cuda")
        reason = unusable_reason(name, device)
        table.add_row(f"backend {name}", "usable" if reason is None else f"off: {reason}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = "chosen automatically" if forced_backend() is None else "forced"
    table.add_row(f"ops on {device} run on", f"{choose('meg info', device)}, {how}")
    for choice in (bfloat16_choice(device), *packing_choices()):
        table.add_row(choice.what, f"{choice.chosen}; {choice.why}")
    console.print(table)


def main() -> None:
    """Run `meg`; what a user can mend is told in one line, without a traceback."""
    # Loading bars of other libraries tell a user nothing.
    for library in ("transformers", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *rest, **more: errors.print(
        f"[yellow]{escape(str(message))}[/]"
    )
    try:
        _quiet_transformers()
        app()
    except (OSError, ValueError, KeyError, RuntimeError, FloatingPointError, ImportError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        errors.print(f"[bold red]error:[/] {escape(str(text))}", highlight=False)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as ended:
        # Typer makes an interruption the exit status that shells know it by.
        if isinstance(ended, SystemExit) and ended.code != 130:
            raise
        errors.print("interrupted; start it again with the same arguments to go on")
        sys.exit(130)


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _editor(
    model: str,
    encoder: str,
    layer: int | None,
    generator: GeneratorKind,
    gate: GateKind,
    snap: bool,
    seed: int,
    device: str,
    dtype: Dtype,
    require_subject: bool | None = None,
) -> MeGEditor:
    import torch

    from meg_kernels import EditorConfig, EncoderTuningConfig, MeGEditor

    config = EditorConfig(
        layer=layer,
        encoder_tuning=EncoderTuningConfig(seed=seed),
        generator=_generator_config(generator, seed),
        gate=gate.value,
        require_subject=require_subject,
        snap=snap,
        seed=seed,
    )
    with console.status(f"loading {escape(model)}"):
        return MeGEditor.for_model(
            model, config, encoder=encoder, dtype=getattr(torch, dtype.value), device=device
        )


def _generator_config(kind: GeneratorKind, seed: int) -> GeneratorConfig:
    from meg_kernels import GeneratorConfig

    if kind is GeneratorKind.bank:
        return GeneratorConfig.bank()
    if kind is GeneratorKind.mlp:
        return GeneratorConfig.mlp(seed=seed)
    if kind is GeneratorKind.dit_b:
        return GeneratorConfig.dit_b(seed=seed)
    return GeneratorConfig.dit(seed=seed)


def _load(folder: Path, device: str, dtype: Dtype | None) -> MeGEditor:
    import torch

    from meg_kernels import MeGEditor

    asked = None if dtype is None else getattr(torch, dtype.value)
    with console.status(f"loading {escape(str(folder))}"):
        return MeGEditor.from_pretrained(folder, device=device, dtype=asked)


def _tuning_facts(
    facts: Path, tuning: list[Path] | None, edited: list[Fact], wanted: int
) -> list[Fact]:
    """The tuning files' facts, or those of the file that are not edited, filled up with ours."""
    from meg_kernels.facts import read_facts, unrelated_to
    from meg_kernels.shipped import shipped_tuning_facts

    if tuning:
        return [fact for path in tuning for fact in read_facts(path, on_conflict="first")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest = read_facts(facts, on_conflict="first")
    others = [fact for fact in unrelated_to(rest, edited) if fact.paraphrases]
    return others if len(others) >= wanted else [*others, *shipped_tuning_facts()]


@contextmanager
def _work_folder(out: Path, command: str) -> Iterator[Path]:
    """A folder beside `out`, where an interrupted command goes on; gone when it is done."""
    out = out.resolve()  # which gives even "." a name
    if command in SAVING:
        from meg_kernels.editing.saving import check_free

        check_free(out)  # now, not when the work is done
    work = out.parent / f".{out.name}.{command}"
    yield work
    shutil.rmtree(work, ignore_errors=True)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of layers like 4,8,12") from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _print_saved(editor: MeGEditor, out: Path) -> None:
    console.print(f"{len(editor.facts)} facts are edited; saved to {out}", markup=False)
    if editor.config.requires_subject(len(editor.facts)):
        console.print("only queries that name the subject of the nearest one are taken for it")
    if waiting := int((~editor.edits.generated).sum()):
        console.print(
            f"answered by collected neurons until the generator learns theirs: {waiting} of them; "
            f"{shlex.join(['meg', 'train', str(out)])}",
            markup=False,
        )


def _print_edit(title: str, report: EditReport, facts: Sequence[Fact], editor: MeGEditor) -> None:
    """What was done for these facts, among those that are edited now."""
    unlearnt = [fact for fact in report.unlearnt if fact in facts]
    trained, calibration = "generator" in report.seconds, report.calibration
    results = {
        "collect": f"{len(facts) - len(unlearnt)} of {len(facts)} facts learnt",
        "encoder": "tuned on other facts" if trained else "as it was",
        "gate": _calibrated(calibration),
        "generator": _trained(report.training),
    }
    if calibration.edited != len(editor.facts):
        results["gate"] = f"threshold as it was, {editor.edits.gate.threshold:.3f}"
    table = Table("stage", "seconds", "result", title=title, title_justify="left")
    for stage, seconds in report.seconds.items():
        table.add_row(stage, f"{seconds:.1f}", results[stage])
    table.add_row("all", f"{sum(report.seconds.values()):.1f}", "")
    console.print(table)
    for fact in unlearnt:
        text = f"{fact.id}: {fact.query!r} -> {fact.answer!r}"
        errors.print(f"[yellow]not learnt:[/] {escape(text)}")


def _calibrated(calibration: Calibration) -> str:
    return (
        f"threshold {calibration.threshold:.3f}; held out: AUROC {calibration.auroc:.3f}, "
        f"{calibration.acceptance:.1%} of {calibration.num_positives} paraphrases accepted, "
        f"{calibration.rejection:.1%} of {calibration.num_negatives} others rejected"
    )


def _trained(training: Training) -> str:
    return f"{training.answered:.1%} of edited queries answered after {training.steps} steps"


def _print_layers(comparison: LayerComparison) -> None:
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


def _print_distillation(report: Distillation) -> None:
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


def _print_answers(editor: MeGEditor, prompts: list[str], max_new_tokens: int) -> None:
    table = Table(
        "prompt",
        "base model",
        "edited model",
        Column("edited?", no_wrap=True),
        title="Answers (in brackets: the gate's score)",
        title_justify="left",
    )
    routing = editor.route(prompts)
    base = editor.generate_base(prompts, max_new_tokens)
    edited = editor.generate(prompts, max_new_tokens)
    for row, (prompt, before, after) in enumerate(zip(prompts, base, edited, strict=True)):
        texts = (escape(text) for text in (prompt, before, after))
        unnamed = "" if routing.named[row] else ", subject not named"
        taken = "yes" if routing.edited[row] else "no"
        table.add_row(*texts, f"{taken} ({routing.score[row]:.2f}{unnamed})")
    console.print(table)


def _print_report(report: EvaluationReport) -> None:
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
            f"answered by collected neurons, which the generator did not learn yet: "
            f"{edited - generated} of {edited} facts",
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


def _print_tasks(scores: TaskScores) -> None:
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


def _write_report(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, content)
        console.print(f"report in {path}", markup=False)


if __name__ == "__main__":
    main()
