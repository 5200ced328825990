"""Objects of another kind than is wanted, where Python is given them."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import tiny
import torch

from bad_inputs import Case
from meg_kernels import (
    Attached,
    CollectionConfig,
    EditorConfig,
    Fact,
    FactsError,
    GeneratorConfig,
    MeGEditor,
    NeuronLayout,
    Neurons,
    PromptedModel,
    PromptTemplate,
    Router,
    attach,
    collect,
    read_facts,
)
from meg_kernels.cli.plots import check_plot
from meg_kernels.cli.work import check_results
from meg_kernels.pretrained import load_encoder, load_language_model, usable_device
from meg_kernels.routing.generators import build_generator
from meg_kernels.routing.hub import push_to_hub
from meg_kernels.routing.router import Routing
from meg_kernels.storage import WorkFolder

PATH, TENSOR = "must be a path", r"must be a torch\.Tensor"
LAYOUT = NeuronLayout(3, 4, True, "gelu")
NEURONS = Neurons(torch.ones(2, 3), torch.ones(2), torch.ones(2, 4), "gelu")
QUERIES = tiny.QUERIES


@functools.cache
def _editor() -> MeGEditor:
    editor = tiny.make_editor(tiny.BANK)
    tiny.edit(editor)
    return editor


@functools.cache
def _prompted() -> PromptedModel:
    tokenizer = tiny.make_tokenizer()
    return PromptedModel.of(tiny.make_language_model(tokenizer), tokenizer)


@functools.cache
def _attached() -> Attached:
    return attach(_prompted().model, tiny.LAYER)


def _asks(**generation: Any):
    return lambda _: _editor().generate(QUERIES, 3, **generation)


def _routed(routing: Any, queries: Any = QUERIES):
    def act(_: Path) -> None:
        given = routing() if callable(routing) else routing
        with _editor().routed(queries, given):
            pass

    return act


def _mounted(index: Any, neurons: Any = None):
    def act(_: Path) -> None:
        made = _attached().layout.unpack(torch.ones(2, _attached().layout.dim))
        with _attached().neurons(made if neurons is None else neurons, index):
            pass

    return act


def _collects(**given: Any):
    good = {"facts": tiny.EDITED, "config": tiny.CONFIG.collection}

    def act(_: Path) -> None:
        prompted, attached = _prompted(), _attached()
        collect(**{"prompted": prompted, "attached": attached} | good | given)

    return act


def _generates(kind: str, z: Any):
    config = GeneratorConfig.mlp(width=8) if kind == "mlp" else GeneratorConfig.bank()
    return lambda _: build_generator(config, LAYOUT, 8).generate(z)


def _stores(conditions: Any, neurons: Any = NEURONS):
    return lambda _: build_generator(GeneratorConfig.bank(), LAYOUT, 8).store(conditions, neurons)


def _file(use):
    def act(folder: Path) -> None:
        (folder / "file").write_text("")
        use(folder / "file")

    return act


PATHS = [
    Case(
        f"{name} of {value!r}",
        functools.partial(lambda _, use, value: use(value), use=use, value=value),
        TypeError if not isinstance(value, str) else ValueError,
        (wanted, PATH),
    )
    for name, use in {
        "from_pretrained": MeGEditor.from_pretrained,
        "Router.from_pretrained": Router.from_pretrained,
        "save_pretrained": lambda path: _editor().save_pretrained(path),
        "read_facts": read_facts,
        "a work folder": WorkFolder.of,
    }.items()
    for value, wanted in ((3, "is 3"), (["x"], r"\['x'\]"), ("", "''"), ("a\0b", "x00b"))
] + [
    Case(
        "an edit whose work folder is a number",
        lambda _: _editor().edit(tiny.EDITED, work_folder=3),
        TypeError,
        ("work_folder is 3", PATH),
    ),
    Case(
        "an evaluation whose work folder is a file",
        _file(lambda path: _editor().evaluate(work_folder=path)),
        NotADirectoryError,
        ("could not write", "choose another"),
    ),
    Case(
        "a collection whose work folder is a file",
        _file(lambda path: _collects(work_folder=path)(path)),
        NotADirectoryError,
        ("could not write", "choose another"),
    ),
    Case(
        "a report in place of the edits",
        lambda folder: check_results(
            *((folder / "meg.json").write_text("{}") and [folder / "meg.json"])
        ),
        FileExistsError,
        ("meg.json is a file of an edited model", "choose another file"),
    ),
    Case(
        "a plot in no format",
        lambda folder: check_plot(folder / "layers.nope"),
        ValueError,
        (r"\.nope", "must be one of .*png"),
    ),
    Case(
        "a model by a number",
        lambda _: load_language_model(3),  # type: ignore[arg-type]
        TypeError,
        ("model '3'", "must be 'smollm2'.* a folder"),
    ),
    Case(
        "an encoder without a name",
        lambda _: MeGEditor(
            tiny.make_language_model(tiny.make_tokenizer()), tiny.make_tokenizer(), ""
        ),
        OSError,
        ("encoder ''", "must be 'all-MiniLM-L6-v2'"),
    ),
    Case(
        "an encoder whose path is no UTF-8",
        lambda _: load_encoder("a\udcff"),
        ValueError,
        ("encoder 'a.udcff'.* no UTF-8", "rename the folder"),
    ),
    Case(
        "a model's name that is no UTF-8",
        lambda _: MeGEditor(
            tiny.make_language_model(tiny.make_tokenizer()), tiny.make_tokenizer(), name="a\udcff"
        ),
        ValueError,
        ("name is 'a.udcff'", "without halves of surrogate pairs"),
    ),
    Case(
        "an encoder by a number",
        lambda _: load_encoder(3),  # type: ignore[arg-type]
        TypeError,
        ("encoder '3'", "must be 'all-MiniLM-L6-v2'"),
    ),
    Case(
        "a device without values",
        lambda _: usable_device("meta"),
        ValueError,
        ("device is meta", "choose cpu or cuda"),
    ),
]

GENERATION = [
    Case(f"{name} of {value!r}", _asks(**{name: value}), error, (f"{name} is", wanted))
    for name, value, error, wanted in (
        ("num_beams", 0, ValueError, "integer of at least 1"),
        ("num_beams", "x", ValueError, "integer of at least 1"),
        ("num_return_sequences", 0, ValueError, "integer of at least 1"),
        ("temperature", -1.0, ValueError, "at least 0"),
        ("top_p", 7.0, ValueError, "at most 1"),
        ("top_k", -1, ValueError, "integer of at least 0"),
        ("max_time", "x", ValueError, "must be a number"),
        ("repetition_penalty", 0, ValueError, "positive"),
        ("do_sample", "yes", ValueError, "True or False"),
        ("early_stopping", "soon", ValueError, "'never'"),
        ("generation_config", {"a": 1}, TypeError, "GenerationConfig"),
        ("stopping_criteria", 3, TypeError, "must be a list"),
        ("streamer", 3, TypeError, "put and end"),
    )
]

PROMPTS = [
    Case("a blank prompt", lambda _: _editor().generate([""]), ValueError, ("blank", "a word")),
    Case(
        "a blank prompt among others",
        lambda _: _editor().generate([QUERIES[0], " "]),
        ValueError,
        ("blank", "give each at least a word"),
    ),
    Case(
        "answers to a text",
        lambda _: _prompted().answers("text", 3),
        ValueError,
        ("prompts is 'text'", "list of texts"),
    ),
    Case(
        "answers to numbers",
        lambda _: _prompted().answers([1], 3),  # type: ignore[list-item]
        ValueError,
        (r"prompts is \[1\]", "list of texts"),
    ),
    Case(
        "answers to nothing",
        lambda _: _prompted().answers([], 3),
        ValueError,
        (r"prompts is \[\]", "at least one"),
    ),
    Case(
        "the prompt of a number",
        lambda _: _prompted().prompt(3),  # type: ignore[arg-type]
        TypeError,
        ("query is 3", "must be text"),
    ),
    Case(
        "targets of dicts",
        lambda _: _prompted().targets([{"query": "a", "answer": "b"}]),  # type: ignore[list-item]
        TypeError,
        (r"facts\[0\] is a dict", "as_facts"),
    ),
    *(
        Case(
            f"targets of {name}",
            functools.partial(lambda _, value: _prompted().targets(value), value=value),
            TypeError,
            (f"facts is {shown}", "must be a list of Facts"),
        )
        for name, value, shown in (("a number", 3, "3"), ("a text", "x", "'x'"), ("None", None, ""))
    ),
    Case(
        "the target of a number",
        lambda _: _prompted().target("Q", 3),  # type: ignore[arg-type]
        ValueError,
        ("answer is 3", "must be text"),
    ),
    *(
        Case(
            f"a batch of {name}",
            functools.partial(lambda _, pairs: _prompted().batch(pairs), pairs=pairs),
            ValueError,
            ("pairs is ", r"must be a list of pairs .* token ids from 0 to \d+"),
        )
        for name, pairs in {
            "texts": [("a", "b")],
            "a text": "ab",
            "a number": 3,
            "nothing": [],
            "tokens without their targets": [[1, 2], [3, 4]],
            "empty targets": [([1, 2], [])],
            "floats": [([1.5], [2.0])],
            "tokens below 0": [([1, -2], [3])],
            "tokens that the model has not": [([1, 2], [10**6])],
        }.items()
    ),
    Case(
        "the score of tokens",
        lambda _: _prompted().score([([1], [2])]),  # type: ignore[arg-type]
        TypeError,
        ("batch is ", "instance of TargetBatch"),
    ),
    Case(
        "the text of a text",
        lambda _: _prompted().text("abc"),  # type: ignore[arg-type]
        ValueError,
        ("tokens is 'abc'", "must be a list of token ids"),
    ),
    Case(
        "prompts in one text",
        lambda _: _prompted().check_prompts("abc", 3),
        TypeError,
        ("prompts is the text 'abc'", "must be a list of texts"),
    ),
    Case(
        "a template as text",
        lambda _: PromptedModel.of(_prompted().model, tiny.make_tokenizer(), "Q: {}"),  # type: ignore[arg-type]
        TypeError,
        ("template is 'Q: {}'", "instance of PromptTemplate"),
    ),
    Case(
        "half a character in a template",
        lambda _: PromptTemplate("\ud800{}"),
        ValueError,
        ("template is", "surrogate"),
    ),
    Case(
        "the template of a name",
        lambda _: PromptTemplate.for_model("phi"),  # type: ignore[arg-type]
        TypeError,
        ("model is a str", "must be a transformers PreTrainedModel"),
    ),
    Case(
        "a tokenizer by its name",
        lambda _: PromptedModel.of(_prompted().model, "smollm2"),  # type: ignore[arg-type]
        TypeError,
        ("tokenizer is a str", r"AutoTokenizer\.from_pretrained"),
    ),
]

ROUTING = [
    Case(
        "a routing of other queries",
        _routed(lambda: _editor().route(QUERIES[:2])),
        ValueError,
        ("of 2 prompts, and 5", r"route\(prompts\)"),
    ),
    Case("a routing in words", _routed("x"), TypeError, ("routing is 'x'", "instance of Routing")),
    Case(
        "neurons of a mask",
        lambda _: _editor().router.neurons([True]),  # type: ignore[arg-type]
        TypeError,
        (r"routing is \[True\]", Routing.__name__),
    ),
    Case(
        "a router without encoder",
        lambda _: Router(None),  # type: ignore[arg-type]
        TypeError,
        ("encoder is None", "TextEncoder"),
    ),
    Case(
        "a router of facts",
        lambda _: Router(_editor().encoder, tiny.EDITED),  # type: ignore[arg-type]
        TypeError,
        ("edits is", "instance of Edits"),
    ),
    Case(
        "a router's configuration as a dict",
        lambda _: Router(_editor().encoder, None, {"snap": True}),  # type: ignore[arg-type]
        TypeError,
        ("config is", "RoutingConfig"),
    ),
    Case(
        "a privacy in words",
        lambda folder: push_to_hub(folder, "you/name", private="yes"),  # type: ignore[arg-type]
        ValueError,
        ("private is 'yes'", "True or False"),
    ),
]

NEURONS_GIVEN = [
    Case(f"an index of {name}", _mounted(index), TypeError, ("index is", "list of neuron numbers"))
    for name, index in {
        "text": "01",
        "a set": {0, 1},
        "one number": 0,
        "a number too large": [0, 2**70],
        "texts": ["0", "1"],
    }.items()
] + [
    Case(
        "a list of neurons",
        _mounted([0, 1], neurons=[1]),
        TypeError,
        ("neurons is a list", "must be a Neurons"),
    ),
    Case(
        "neurons as integers",
        lambda _: NEURONS.to(torch.int32),
        ValueError,
        ("int32", "must be floating-point"),
    ),
    Case(
        "conditions in a list", _generates("mlp", [[1.0] * 8]), TypeError, ("z is a list", TENSOR)
    ),
    Case(
        "conditions of integers",
        _generates("mlp", torch.ones(2, 8).long()),
        ValueError,
        ("int64", r"z\.float\(\)"),
    ),
    Case(
        "an empty bank",
        _generates("bank", torch.ones(2, 8)),
        ValueError,
        ("holds no neurons", "call store"),
    ),
    Case(
        "a bank with more conditions than neurons",
        _stores(torch.ones(3, 8)),
        ValueError,
        (r"\(3, 8\)", r"must be \(2, 8\)"),
    ),
    Case(
        "a bank with NaN",
        _stores(torch.full((2, 8), torch.nan)),
        ValueError,
        ("NaN", "must be finite"),
    ),
    Case(
        "a generator as a dict",
        lambda _: build_generator({"kind": "mlp"}, LAYOUT, 8),  # type: ignore[arg-type]
        TypeError,
        ("config is", "GeneratorConfig"),
    ),
    *(
        Case(
            f"a bank of {n!r} neurons",
            functools.partial(
                lambda _, n: build_generator(GeneratorConfig.bank(), LAYOUT, 8).resize(n), n=n
            ),
            ValueError,
            (re.escape(f"n is {n!r}"), "an integer of at least 0"),
        )
        for n in (-1, "x", 2.0, None)
    ),
    *(
        Case(
            f"the steps for {facts!r} facts",
            functools.partial(
                lambda _, facts: GeneratorConfig.mlp().training.steps_for(facts), facts=facts
            ),
            ValueError,
            (re.escape(f"facts is {facts!r}"), "an integer of at least 0"),
        )
        for facts in ("x", -1, None)
    ),
    Case(
        "the tuning facts for a text",
        lambda _: EditorConfig().tuning_facts_for("x"),  # type: ignore[arg-type]
        ValueError,
        ("num_facts is 'x'", "an integer of at least 0"),
    ),
    Case(
        "parts that are a number",
        lambda _: Neurons.cat(3),  # type: ignore[arg-type]
        TypeError,
        ("parts is a int", "must be a list of Neurons"),
    ),
    Case(
        "the rows of a fact's id",
        lambda _: _editor().edits.rows_of(["color-Abo"]),  # type: ignore[list-item]
        TypeError,
        (r"facts\[0\] is a str", "must be a Fact"),
    ),
    Case(
        "a base model by its name",
        lambda _: _editor().check_base("smollm2"),  # type: ignore[arg-type]
        TypeError,
        ("noted is 'smollm2'", "instance of BaseModel"),
    ),
    Case(
        "a fact from a text",
        lambda _: Fact.from_dict("x"),  # type: ignore[arg-type]
        FactsError,
        ("record is 'x'", "must be a dict"),
    ),
    Case(
        "a subject in a number",
        lambda _: tiny.EDITED[0].is_named_in(3),  # type: ignore[arg-type]
        ValueError,
        ("query is 3", "must be text"),
    ),
    Case(
        "a layout as a tuple",
        lambda _: build_generator(GeneratorConfig.mlp(), (3, 4), 8),  # type: ignore[arg-type]
        TypeError,
        (r"layout is \(3, 4\)", "NeuronLayout"),
    ),
    Case(
        "conditions of no width",
        lambda _: build_generator(GeneratorConfig.mlp(), LAYOUT, 0),
        ValueError,
        ("condition_dim is 0", "at least 1"),
    ),
    Case(
        "a saved generator by its kind",
        lambda _: EditorConfig.from_dict({"generator": "bank"}),
        ValueError,
        ("generator is 'bank'", "must be an object"),
    ),
]

COLLECTING = [
    Case(
        "a model in place of a prompted one",
        lambda _: collect(_prompted().model, _attached(), tiny.EDITED),  # type: ignore[arg-type]
        TypeError,
        ("prompted is", "instance of PromptedModel"),
    ),
    Case(
        "a layer in place of an attachment",
        _collects(attached=1),
        TypeError,
        ("attached is 1", "instance of Attached"),
    ),
    Case(
        "a collection's configuration as a dict",
        _collects(config={"max_steps": 3}),
        TypeError,
        ("config is", CollectionConfig.__name__),
    ),
    Case(
        "facts as dicts where neurons are collected",
        _collects(facts=[{"query": "The color of Abo is", "answer": "red"}]),
        TypeError,
        (r"facts\[0\] is a dict", "as_facts"),
    ),
    Case(
        "a model by its name where edits are loaded",
        lambda folder: MeGEditor.from_pretrained(folder, "smollm2", tiny.make_tokenizer()),  # type: ignore[arg-type]
        TypeError,
        ("model is a str", "PreTrainedModel"),
    ),
]

CASES = [*PATHS, *GENERATION, *PROMPTS, *ROUTING, *NEURONS_GIVEN, *COLLECTING]
