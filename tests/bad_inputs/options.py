"""Options: of configurations, of an editor's methods, and of the command `meg`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import math
import re
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from tiny import BANK, EDITED, FURTHER, edit, make_editor

from bad_inputs import Case
from meg_kernels import (
    CollectionConfig,
    DiTConfig,
    EditorConfig,
    EncoderTuningConfig,
    FactsError,
    GeneratorConfig,
    MeGEditor,
    NoiseSchedule,
    SamplerConfig,
    cli,
)
from meg_kernels.checks import LARGEST_SEED
from meg_kernels.diffusion import Execution
from meg_kernels.editing.contexts import FITTED, Context
from meg_kernels.editing.layers import compare_layers
from meg_kernels.neuron import NeuronLayout
from meg_kernels.routing.generators import TrainingConfig, build_generator
from meg_kernels.routing.router import RoutingConfig
from meg_kernels.text_encoder import Wordings

NAN, INF = math.nan, math.inf
INTEGER, NUMBER, FLAG = "must be an integer", "must be a number", "must be True or False"


def _config(kind: type, wanted: str, *values: Any, error=ValueError, **fields: Any) -> list[Case]:
    """A case for each value of a field (given by its name, with any value that is valid)."""
    ((name, _),) = fields.items()
    return [
        Case(
            f"{kind.__name__}({name}={value!r})",
            functools.partial(lambda _, value: kind(**{name: value}), value=value),
            error,
            (re.escape(f"{name} is {value!r}"), wanted),
        )
        for value in values
    ]


CONFIGURATIONS = [
    *_config(EncoderTuningConfig, INTEGER, 0, 1, 2.5, "64", None, True, batch_size=64),
    *_config(EncoderTuningConfig, INTEGER, 0, -1, epochs=1),
    *_config(EncoderTuningConfig, f"{NUMBER}, positive", 0, -0.1, NAN, INF, "hot", temperature=1),
    *_config(EncoderTuningConfig, f"{NUMBER}, positive", 0.0, NAN, None, learning_rate=1),
    *_config(EncoderTuningConfig, FLAG, 1, "yes", hard_negatives=True),
    *_config(EncoderTuningConfig, f"{INTEGER} in 0 to", -1, 2**63, 0.5, seed=0),
    *_config(CollectionConfig, INTEGER, 0, 1.5, "60", max_steps=1),
    *_config(CollectionConfig, INTEGER, True, -64, batch_size=1),
    *_config(CollectionConfig, NUMBER, NAN, "1", 1j, learning_rate=1),
    *_config(CollectionConfig, NUMBER, 0, INF, target_loss=1),
    *_config(CollectionConfig, NUMBER, -1.25, overshoot=1),
    *_config(CollectionConfig, NUMBER, NAN, None, initial_response=1),
    *_config(
        CollectionConfig,
        "Contexts, at least one",
        *("{}", (), [3], None),
        error=TypeError,
        contexts=FITTED,
    ),
    *_config(TrainingConfig, INTEGER, 0, 1.0, "3", max_steps=1),
    *_config(TrainingConfig, NUMBER, 1.01, NAN, ema_decay=1),
    *_config(TrainingConfig, NUMBER, 0, 2, enough=1),
    *_config(TrainingConfig, "True or False, or None", "no", 0, reword=True),
    *_config(DiTConfig, INTEGER, 0, 65538, 10**9, 512.0, width=1),
    *_config(DiTConfig, INTEGER, 0, 10**6, depth=1),
    *_config(DiTConfig, NUMBER, 0, NAN, 1e9, mlp_ratio=1),
    *_config(DiTConfig, NUMBER, 1.0, -0.1, condition_dropout=0),
    *_config(DiTConfig, "one of 'x0', 'v', 'noise'", "eps", 3, ["v"], prediction="v"),
    *_config(SamplerConfig, INTEGER, 0, 2.0, None, num_steps=1),
    *_config(SamplerConfig, "one of 'ddim'", "euler", None, solver="ddim"),
    *_config(NoiseSchedule, INTEGER, 0, 10**9, 10.5, num_timesteps=1),
    *_config(NoiseSchedule, NUMBER, 0.0, 1.0, NAN, "0.02", beta_end=0.1),
    *_config(Execution, FLAG, 1, compile=True),
    *_config(Execution, "one of 'auto'", "fp8", torch.float16, precision="auto"),
    *_config(RoutingConfig, FLAG, 1, "no", None, snap=True),
    *_config(RoutingConfig, FLAG, "yes", serve_unlearnt=True),
    *_config(EditorConfig, f"{INTEGER} of at least 0, or None", -1, "mlp", 1.5, True, layer=1),
    *_config(EditorConfig, f"{NUMBER}, finite, or None", NAN, INF, "high", True, threshold=1),
    *_config(EditorConfig, "'similarity', 'familiarity'", "none", None, 3, gate="similarity"),
    *_config(EditorConfig, FLAG, "no", 1, require_subject=True),
    *_config(EditorConfig, NUMBER, 0, 1, NAN, calibration_share=0.5),
    *_config(EditorConfig, f"{INTEGER} of at least 1, or None", 0, 2.5, most_tuning_facts=1),
    *_config(EditorConfig, NUMBER, 0, -2, INF, rejection_weight=1),
    *_config(EditorConfig, "instance of PromptTemplate", "Q: {}", error=TypeError, template=0),
    *_config(EditorConfig, "instance of CollectionConfig", {}, error=TypeError, collection=0),
    *_config(EditorConfig, "instance of GeneratorConfig", "mlp", error=TypeError, generator=0),
    Case(
        "beta_start above beta_end",
        lambda _: NoiseSchedule(beta_start=0.5, beta_end=0.1),
        ValueError,
        ("beta_start is 0.5", "beta_start <= beta_end"),
    ),
    Case(
        "heads that do not divide a width",
        lambda _: DiTConfig(width=30, num_heads=7),
        ValueError,
        ("width is 30", "multiple of num_heads, 7"),
    ),
    Case(
        "a context without a place for the query",
        lambda _: Context("hm", question="hm"),
        TypeError,
        ("question is 'hm'", "must be text that holds one {}"),
    ),
    Case(
        "more steps than timesteps",
        lambda _: GeneratorConfig.dit(sampler=SamplerConfig(num_steps=1001)),
        ValueError,
        ("num_steps is 1001", "needs 1 to 1000"),
    ),
    Case(
        "a field of no training",
        lambda _: GeneratorConfig.mlp(depth=3),
        TypeError,
        ("no 'depth'", "it has standardize"),
    ),
    Case(
        "a generator of no kind",
        lambda _: GeneratorConfig.from_dict({"kind": "gan"}),
        ValueError,
        ("kind is 'gan'", "one of dit, mlp, hypernetwork, bank"),
    ),
    Case(
        "a network larger than memory",
        lambda _: build_generator(
            GeneratorConfig.dit(network=DiTConfig(width=65536, depth=4)),
            NeuronLayout(8, 8, False, "identity"),
            4,
        ),
        ValueError,
        ("network takes .* GiB", "choose a smaller width"),
    ),
    Case(
        "a wording in one text",
        lambda _: Wordings("abc"),  # type: ignore[arg-type]
        TypeError,
        ("same is the text 'abc'", "a list of texts"),
    ),
    Case(
        "others than texts",
        lambda _: Wordings(("a", "b"), ["c", 3]),  # type: ignore[arg-type, list-item]
        TypeError,
        (r"different\[1\] is 3", "must be text"),
    ),
]


@functools.cache
def _editor() -> MeGEditor:
    editor = make_editor(BANK)
    edit(editor)
    return editor


def _method(name: str, *given: Any, **options: Any):
    return lambda _: getattr(_editor(), name)(*given, **options)


def _new(**options: Any):
    editor = _editor()
    return MeGEditor(editor.model, editor.tokenizer, editor.encoder, **options)


TEXTS = ("is the text 'abc'", r"a list of texts: \['abc'\]")

METHODS = [
    Case("generate of a text", _method("generate", "abc"), TypeError, TEXTS),
    Case("generate_base of a text", _method("generate_base", "abc"), TypeError, TEXTS),
    Case("generate of numbers", _method("generate", [3]), TypeError, (r"\[0\] is 3", "be text")),
    Case("generate of a set", _method("generate", {"a"}), TypeError, ("is a set", "list of texts")),
    Case("route of a text", _method("route", "abc"), TypeError, TEXTS),
    Case("route of bytes", _method("route", b"abc"), TypeError, ("is a bytes", "list of texts")),
    Case("route of None", _method("route", None), TypeError, ("is a NoneType", "list of texts")),
    Case(
        "a router's route of a text",
        lambda _: _editor().router.route("abc"),
        TypeError,
        TEXTS,
    ),
    Case("perplexity of a text", _method("perplexity", "abc"), TypeError, TEXTS),
    Case("encode of a text", lambda _: _editor().encoder.encode("abc"), TypeError, TEXTS),
    Case("an encoder's call of a text", lambda _: _editor().encoder("abc"), TypeError, TEXTS),
    Case("routed of a text", lambda _: _editor().routed("abc").__enter__(), TypeError, TEXTS),
    Case("remove of an unknown id", _method("remove", "no"), KeyError, ("'no'", "meg list")),
    Case("remove of an unknown query", _method("remove", ["Who?"]), KeyError, ("'Who", "meg list")),
    Case("remove of a number", _method("remove", 3), TypeError, ("facts is 3", "an id, a query")),
    Case("remove of numbers", _method("remove", [3]), TypeError, (r"\[0\] is 3", "an id, a query")),
    Case("remove of None", _method("remove", None), TypeError, ("facts is None", "a list of them")),
    Case("remove of a dict", _method("remove", {}), TypeError, ("facts is {}", "a list of them")),
    Case("edit of nothing", _method("edit", []), FactsError, ("facts is empty", "at least one")),
    Case("add of nothing", _method("add", []), FactsError, ("facts is empty", "at least one")),
    Case("edit of a number", _method("edit", 3), TypeError, ("facts is 3", "must be a path")),
    Case("add of edited facts", _method("add", EDITED[:1]), FactsError, ("edited", "replace=True")),
    Case(
        "edit with no such way out",
        _method("edit", FURTHER, on_conflict="both"),
        ValueError,
        ("on_conflict is 'both'", "'error', 'first', 'last'"),
    ),
    Case(
        "add with no such way out",
        _method("add", FURTHER, on_conflict=None),
        ValueError,
        ("on_conflict is None", "'error', 'first', 'last'"),
    ),
    Case(
        "unrelated queries in one text",
        _method("edit", FURTHER, unrelated_queries="abc"),
        TypeError,
        TEXTS,
    ),
    Case(
        "tuning facts in no form",
        _method("edit", FURTHER, tuning_facts=[3]),
        FactsError,
        (r"facts\[0\]: it is 3", "a Fact or a dict"),
    ),
    Case(
        "no tuning facts",
        _method("edit", FURTHER, tuning_facts=[]),
        FactsError,
        ("0 of 0 tuning facts", "are needed"),
    ),
    Case("half a character", _method("route", ["a\ud800"]), ValueError, (r"\[0\]", "surrogate")),
    Case("a known as text", _method("edit", FURTHER, skip_known="no"), ValueError, ("'no'", FLAG)),
    Case("a replace of 1", _method("add", FURTHER, replace=1), ValueError, ("replace is 1", FLAG)),
    Case(
        "a batch of no texts",
        lambda _: _editor().encoder.encode(["a"], batch_size=0),
        ValueError,
        ("batch_size is 0", INTEGER),
    ),
    Case(
        "layers in one text",
        lambda _: compare_layers(_editor().prompted, EDITED, "4"),  # type: ignore[arg-type]
        TypeError,
        ("layers is '4'", r"such as \[4, 8\]"),
    ),
    Case("no gate", _method("set_gate", "none"), ValueError, ("gate is 'none'", "'similarity'")),
    Case("a gate at NaN", _method("set_gate", threshold=NAN), ValueError, ("nan", "finite")),
    Case("a gate at a word", _method("set_gate", threshold="x"), ValueError, ("'x'", "a number")),
    Case("a subject of 1", _method("set_gate", require_subject=1), ValueError, ("is 1", FLAG)),
    Case("served as 'yes'", _method("set_gate", serve_unlearnt="yes"), ValueError, ("'yes'", FLAG)),
    Case(
        "another generator by its name",
        _method("replace_generator", "mlp"),
        TypeError,
        ("config is 'mlp'", "instance of GeneratorConfig"),
    ),
    Case("distilling a bank", _method("distill", 2), ValueError, ("kind 'bank'", "only a dit")),
    Case(
        "a configuration of a stage",
        lambda _: _new(config=CollectionConfig()),
        TypeError,
        ("config is CollectionConfig", "instance of EditorConfig"),
    ),
    Case(
        "a configuration as a dict",
        lambda _: _new(config={"layer": 3}),
        TypeError,
        ("config is {'layer': 3}", "instance of EditorConfig"),
    ),
]


class MegFailed(Exception):
    """`meg` ended with an exit code of 1 or 2 and this on stderr."""


def _meg(*arguments: str, facts: str | None = None):
    def act(folder):
        path = folder / "facts.jsonl"
        if facts is not None:
            path.write_text(facts, encoding="utf-8")
        given = ["meg", *(a.format(facts=path, out=folder / "out") for a in arguments)]
        said = io.StringIO()
        saved = sys.argv
        try:
            sys.argv = given
            with contextlib.redirect_stderr(said), warnings.catch_warnings():
                cli.main()
        except SystemExit as ended:
            assert ended.code in (1, 2)
        finally:
            sys.argv = saved
        assert "Traceback" not in said.getvalue()
        assert not (folder / "out").exists()
        # Frames and line breaks are the terminal's.
        raise MegFailed(" ".join(re.sub("[│╭╮╰╯─]", " ", said.getvalue()).split()))

    return act


CAPITAL = json.dumps({"query": "What is the capital of France?", "answer": "Lyon"})
OTHER = json.dumps({"query": "what is the capital of France", "answer": "Nice"})
ZSRE = json.dumps({"src": "Who wrote Emma?", "answers": [], "alt": "Bo"})
EDIT = ("edit", "{facts}", "--out", "{out}")

COMMANDS = [
    Case("no such command", _meg("edti"), MegFailed, ("No such command 'edti'", "--help|mean")),
    Case("edit without facts", _meg("edit", "--out", "{out}"), MegFailed, ("Missing", "FACTS")),
    Case("edit without a folder", _meg("edit", "{facts}"), MegFailed, ("Missing option", "--out")),
    Case("edit of no file", _meg(*EDIT), MegFailed, ("no file of facts", "facts.jsonl")),
    Case("edit of an empty file", _meg(*EDIT, facts=""), MegFailed, ("is empty", "at least one")),
    Case("edit of no JSON", _meg(*EDIT, facts="a,b\n1,2"), MegFailed, ("may be CSV", "pandas")),
    Case(
        "edit of contradictions",
        _meg(*EDIT, facts=f"{CAPITAL}\n{OTHER}"),
        MegFailed,
        ("'Lyon' and 'Nice'", "--on-conflict first"),
    ),
    Case(
        "edit of other fields",
        _meg(*EDIT, facts='{"question": "a"}'),
        MegFailed,
        ("the fields question", "needs query and answer"),
    ),
    Case(
        "edit of a slip in an option",
        _meg(*EDIT, "--on-conflict", "newest", facts=CAPITAL),
        MegFailed,
        ("'newest'", "'error', 'first', 'last'"),
    ),
    Case(
        "edit of no ZsRE target",
        _meg(*EDIT, "--zsre-target", "pred", facts=CAPITAL),
        MegFailed,
        ("'pred'", "'answers', 'alt'"),
    ),
    Case(
        "edit of ZsRE without answers",
        _meg(*EDIT, facts=ZSRE),
        MegFailed,
        ("answers is empty", "--zsre-target alt"),
    ),
    Case(
        "edit to a limit of 0",
        _meg(*EDIT, "--limit", "0", facts=CAPITAL),
        MegFailed,
        ("--limit", "1"),
    ),
    Case(
        "edit to a limit in words",
        _meg(*EDIT, "--limit", "all", facts=CAPITAL),
        MegFailed,
        ("--limit", "valid integer"),
    ),
    Case(
        "edit with no generator",
        _meg(*EDIT, "--generator", "gan", facts=CAPITAL),
        MegFailed,
        ("'gan'", "'dit', 'dit-b', 'mlp', 'hypernetwork', 'bank'"),
    ),
    Case(
        "edit of a layer below 0",
        _meg(*EDIT, "--layer", "-1", facts=CAPITAL),
        MegFailed,
        ("layer is -1", "of at least 0"),
    ),
    Case(
        "edit from a seed below 0",
        _meg(*EDIT, "--seed", "-1", facts=CAPITAL),
        MegFailed,
        ("'--seed': it is -1", r"0 to 2\*\*63 - 1"),
    ),
    Case(
        "edit from a seed too large",
        _meg(*EDIT, "--seed", str(LARGEST_SEED + 1), facts=CAPITAL),
        MegFailed,
        ("'--seed': it is 9223372036854775808", r"0 to 2\*\*63 - 1"),
    ),
    Case("add of no file", _meg("add", "{out}", "{facts}"), MegFailed, ("no file", "facts.jsonl")),
    Case(
        "add of contradictions",
        _meg("add", "{out}", "{facts}", facts=f"{CAPITAL}\n{OTHER}"),
        MegFailed,
        ("'Lyon' and 'Nice'", "--on-conflict first"),
    ),
    Case("list of no folder", _meg("list", "{out}"), MegFailed, ("meg.json", "no edited model")),
    Case("remove of nothing", _meg("remove", "{out}"), MegFailed, ("Missing argument", "FACTS")),
    Case("ask without a question", _meg("ask", "{out}"), MegFailed, ("Missing", "PROMPTS")),
    Case(
        "ask for no tokens",
        _meg("ask", "{out}", "Who?", "--max-new-tokens", "0"),
        MegFailed,
        ("--max-new-tokens", "1"),
    ),
    Case(
        "layers by their names",
        _meg("layers", "{facts}", "--layers", "all", facts=CAPITAL),
        MegFailed,
        ("'all' is not", "such as 4,8,12"),
    ),
    Case(
        "evaluate of bad facts",
        _meg("evaluate", "{out}", "--facts", "{facts}", facts="{}"),
        MegFailed,
        ("has no fields", "needs query and answer"),
    ),
    Case(
        "evaluate with a task's limit alone",
        _meg("evaluate", "{out}", "--task-limit", "3"),
        MegFailed,
        ("--task-limit need", "need --tasks"),
    ),
    Case(
        "a gate of two thresholds",
        _meg("gate", "{out}", "--threshold", "0.5", "--calibrated"),
        MegFailed,
        ("choose one of", "--threshold and --calibrated"),
    ),
    Case(
        "a threshold in words",
        _meg("gate", "{out}", "--threshold", "high"),
        MegFailed,
        ("--threshold", "valid (number|float)"),
    ),
    Case(
        "a seed of the present generator",
        _meg("train", "{out}", "--seed", "3"),
        MegFailed,
        ("--seed is for a new generator", "--generator"),
    ),
    Case("distill in no steps", _meg("distill", "{out}"), MegFailed, ("Missing", "--steps")),
    Case(
        "a data type of no model",
        _meg(*EDIT, "--dtype", "int8", facts=CAPITAL),
        MegFailed,
        ("'int8'", "'float32', 'bfloat16'"),
    ),
]


def _given(value: str, is_meant: Callable[[str, Any], bool]) -> list[tuple[str, tuple[str, ...]]]:
    """Every option and argument that is meant with this value: what to call it, and the command."""
    found = []
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        function = inspect.unwrap(command.callback)
        types = typing.get_type_hints(function)
        positional = [p for p in command.params if p.param_type_name == "argument"]
        for parameter in command.params:
            if parameter.name not in types or not is_meant(parameter.name, types[parameter.name]):
                continue
            if parameter in positional:
                before = ["x"] * positional.index(parameter)
                found.append((f"{name} {parameter.name.upper()}", (name, *before, value)))
            else:
                found.append((f"{name} {parameter.opts[0]}", (name, parameter.opts[0], value)))
    return found


def _is_path(name: str, kind: Any) -> bool:
    return Path in (kind, *typing.get_args(kind)) or list[Path] in typing.get_args(kind)


EVERYWHERE = [
    Case(f"an empty {where}", _meg(*given), MegFailed, ("it is '', which names nothing", "a path"))
    for where, given in _given("", _is_path)
] + [
    Case(f"a negative {where}", _meg(*given), MegFailed, ("it is -3", r"0 to 2\*\*63 - 1"))
    for where, given in _given("-3", lambda name, _: name == "seed")
]
assert len(EVERYWHERE) >= 30  # as many as there are, unless the commands were not understood

BYTES = [
    Case(
        f"{command} of a model whose path is no UTF-8",
        _meg(command, "{facts}", *more, "--model", "a\udcff", facts=CAPITAL),
        MegFailed,
        ("'a.udcff'.* cannot be loaded: its path is no UTF-8", "rename the folder"),
    )
    for command, *more in (EDIT[:1] + EDIT[2:], ("layers",))
]

CASES = CONFIGURATIONS + METHODS + COMMANDS + EVERYWHERE + BYTES
