"""Comparing layers, against models that are really one hidden unit wider, one query at a time."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from tiny import FACTS, fails, greedy, make_model, make_tokenizer, run, widened

from meg_kernels import CollectionConfig, cli, write_facts
from meg_kernels.cli.plots import plot_layers
from meg_kernels.editing import layers as comparing
from meg_kernels.editing.collect import collect
from meg_kernels.editing.layers import LayerComparison, LayerQuality, compare_layers
from meg_kernels.editing.prompting import PromptedModel, answer_text, answers_match
from meg_kernels.nn import attach
from meg_kernels.nn.families import decoder_layers

CONFIG = CollectionConfig(learning_rate=0.1, max_steps=25)
DEPTH, DEFAULT = 3, 2
ASKED = FACTS[:5]


@pytest.fixture(scope="module", autouse=True)
def settings():
    """What a tiny model needs of the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "CollectionConfig", lambda: CONFIG)
        patch.setattr(cli.tables.console, "width", 200, raising=False)
        yield


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tiny_model, tokenizer):
    return make_model(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEG_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def forbidden(*args, **kwargs):
    raise AssertionError("work was done")


def measured_layers(monkeypatch) -> list[int]:
    """The layers that are measured from now on."""
    measured, measure = [], comparing._measure
    monkeypatch.setattr(
        comparing, "_measure", lambda *given: (measured.append(given[1]), measure(*given))[1]
    )
    return measured


def share(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_each_layer_is_worth_what_the_physically_wider_model_answers(model, tokenizer):
    comparison = compare_layers(PromptedModel.of(model, tokenizer), ASKED, range(DEPTH))
    assert [quality.layer for quality in comparison.layers] == [0, 1, 2]
    for quality in comparison.layers:
        attached = attach(model, quality.layer)
        collection = collect(PromptedModel.of(model, tokenizer), attached, ASKED, CONFIG)
        attached.detach()
        neurons = collection.neurons
        wider = [widened(model, quality.layer, neurons[i : i + 1]) for i in range(len(ASKED))]

        def answers(i, query, wider=wider):
            said = answer_text(tokenizer, greedy(wider[i], tokenizer, query))
            return answers_match(said, ASKED[i].answer)

        assert quality.reliability == share(answers(i, f.query) for i, f in enumerate(ASKED))
        assert quality.generality == pytest.approx(
            share(answers(i, query) for i, f in enumerate(ASKED) for query in f.paraphrases)
        )
        assert quality.learnt == share(collection.learnt.tolist())
        assert quality.steps == share(collection.steps.tolist())
        squares = neurons.key.square().sum(1) + neurons.value.square().sum(1)
        assert quality.norm == pytest.approx(share(squares.sqrt().tolist()))
        assert quality.seconds > 0
    assert len({quality.generality for quality in comparison.layers}) > 1  # there is a choice
    assert comparison.n == len(ASKED)
    assert comparison.protocol["queries"] == {
        "reliability": 5,
        "generality": 10,
        "locality": 0,
    }


def test_the_seconds_are_those_of_one_fact_and_of_its_collection_alone(
    model, tokenizer, monkeypatch
):
    clock = [0.0]
    monkeypatch.setattr(comparing.time, "perf_counter", lambda: clock[0])

    def slow(*args, made=comparing.collect, **more):
        clock[0] += 30.0
        return made(*args, **more)

    monkeypatch.setattr(comparing, "collect", slow)
    comparison = compare_layers(PromptedModel.of(model, tokenizer), ASKED, [1])
    assert [quality.seconds for quality in comparison.layers] == [6.0, 6.0]


def test_by_default_every_second_layer_is_compared_and_the_default_always(
    tiny_model, tokenizer, monkeypatch
):
    measured = []
    nothing = LayerQuality(0, 0.0, 0.0, None, 0.0, 0.0, 0.0)
    monkeypatch.setattr(
        comparing, "_measure", lambda *given: (measured.append(given[1]), nothing)[1]
    )
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=5)
    assert compare_layers(PromptedModel.of(model, tokenizer), ASKED).default == 3
    assert measured == [0, 2, 3, 4]
    measured.clear()
    compare_layers(PromptedModel.of(model, tokenizer), ASKED, [4, 1, 4])
    assert measured == [1, 3, 4]


def test_the_model_stays_as_it_was(model, tokenizer):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    compare_layers(PromptedModel.of(model, tokenizer), ASKED[:1], [1])
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def quality(layer: int, reliability: float, generality: float | None) -> LayerQuality:
    return LayerQuality(layer, 1.0, reliability, generality, 10.0, 0.1, 5.0)


@pytest.mark.parametrize(
    "qualities, best",
    [
        ([(4, 1.0, 0.7), (6, 0.8, 0.9), (8, 1.0, 0.8)], 6),
        ([(4, 1.0, 0.9), (6, 1.0, 0.9), (8, 1.0, 0.8)], 6),  # the higher one is cheaper
        ([(4, 0.9, None), (6, 1.0, None), (8, 0.8, None)], 6),
        ([(4, 0.9, None), (6, 0.9, None), (8, 0.8, None)], 6),
    ],
)
def test_the_best_layer_generalises_best_and_of_equals_it_is_the_highest(qualities, best):
    for given in (qualities, qualities[::-1]):
        comparison = LayerComparison([quality(*one) for one in given], 6, 10, {})
        assert comparison.best.layer == comparison.to_dict()["best"] == best


# Resuming


def test_an_interrupted_comparison_goes_on_where_it_was(model, tokenizer, tmp_path, monkeypatch):
    expected = compare_layers(PromptedModel.of(model, tokenizer), ASKED, [0, 1])
    measure = comparing._measure
    with monkeypatch.context() as patch:
        patch.setattr(
            comparing, "_measure", lambda *given: interrupt() if given[1] else measure(*given)
        )
        with pytest.raises(KeyboardInterrupt):
            compare_layers(PromptedModel.of(model, tokenizer), ASKED, [0, 1], work_folder=tmp_path)
    measured = measured_layers(monkeypatch)
    resumed = compare_layers(
        PromptedModel.of(model, tokenizer), ASKED, [0, 1], work_folder=tmp_path
    )
    assert measured == [1, 2]

    def without_seconds(comparison):
        return [dataclasses.replace(one, seconds=0.0) for one in comparison.layers]

    assert without_seconds(resumed) == without_seconds(expected)
    again = compare_layers(PromptedModel.of(model, tokenizer), ASKED, [0, 1], work_folder=tmp_path)
    assert measured == [1, 2] and again.layers == resumed.layers


def test_nothing_is_taken_over_from_other_facts_settings_or_weights(
    model, tokenizer, tmp_path, monkeypatch
):
    def compare(facts=ASKED[:2], config=CONFIG):
        compare_layers(PromptedModel.of(model, tokenizer), facts, [2], config, work_folder=tmp_path)

    compare()
    measured = measured_layers(monkeypatch)
    compare()
    assert measured == []
    compare(facts=[ASKED[0], dataclasses.replace(ASKED[1], answer="red red")])
    compare(facts=[ASKED[0], dataclasses.replace(ASKED[1], paraphrases=())])
    compare(config=dataclasses.replace(CONFIG, max_steps=3))
    with torch.no_grad():
        decoder_layers(model)[2].mlp.down_proj.weight[0, 0] += 1
    compare()
    assert measured == [2, 2, 2, 2]


def test_a_damaged_file_is_made_again(model, tokenizer, tmp_path, monkeypatch):
    compare_layers(PromptedModel.of(model, tokenizer), ASKED[:1], [2], work_folder=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:20])
    measured = measured_layers(monkeypatch)
    compare_layers(PromptedModel.of(model, tokenizer), ASKED[:1], [2], work_folder=tmp_path)
    assert measured == [2]
    seconds = {"seconds": pytest.approx(0, abs=100)}
    assert json.loads(path.read_text())["content"] == whole["content"] | seconds


# Errors


@pytest.mark.parametrize("layer", [-1, DEPTH])
def test_a_layer_that_is_not_there_is_refused_before_any_work(model, tokenizer, monkeypatch, layer):
    monkeypatch.setattr(comparing, "_measure", forbidden)
    with pytest.raises(ValueError, match=rf"^layer is {layer}; the model has layers 0 to 2$"):
        compare_layers(PromptedModel.of(model, tokenizer), ASKED, [1, layer])


def test_a_comparison_without_facts_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="there are no facts"):
        compare_layers(PromptedModel.of(model, tokenizer), [], [1])


# The command


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """Where a model and a file of facts lie, and where `meg` is run."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_facts(tmp_path / "facts.jsonl", ASKED)
    return tmp_path


@pytest.fixture
def command(folder, monkeypatch):
    (folder / "run").mkdir()
    monkeypatch.chdir(folder / "run")
    return ["layers", folder / "facts.jsonl", "--model", folder / "model", "--limit", 4]


def rows(shown) -> dict[str, list[str]]:
    """The table's cells, by the layer."""
    lines = [line.strip("│ ").split("│") for line in shown.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_command_shows_and_writes_the_comparison(folder, command):
    shown = run(*command, "--layers", "0,1", "--json", "out/layers.json")
    content = json.loads((folder / "run/out/layers.json").read_text(encoding="utf-8"))
    assert set(content) == {"model", "n", "best", "default", "layers", "protocol"}
    assert (content["n"], content["default"]) == (4, DEFAULT)
    assert [quality["layer"] for quality in content["layers"]] == [0, 1, 2]
    table = rows(shown)
    assert list(table) == ["0", "1", "2 (default)"]
    for cells, quality in zip(table.values(), content["layers"], strict=True):
        assert cells == [
            f"{quality['learnt']:.3f}",
            f"{quality['reliability']:.3f}",
            f"{quality['generality']:.3f}",
            f"{quality['steps']:.1f}",
            f"{quality['seconds']:.2f}",
            f"{quality['norm']:.2f}",
        ]
    assert f"best by Generality: layer {content['best']}; edit it" in shown
    assert [path.name for path in (folder / "run/out").iterdir()] == ["layers.json"]


def test_an_interrupted_command_goes_on_and_leaves_no_work_behind(
    folder, command, monkeypatch, capsys
):
    arguments = [*command, "--layers", "0"]
    monkeypatch.setattr(sys, "argv", ["meg", *map(str, arguments)])
    measure = comparing._measure
    with monkeypatch.context() as patch:
        patch.setattr(
            comparing, "_measure", lambda *given: interrupt() if given[1] else measure(*given)
        )
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    assert exit_.value.code == 130
    assert "start it again with the same arguments" in " ".join(capsys.readouterr().err.split())
    measured = measured_layers(monkeypatch)
    run(*arguments)
    assert measured == [DEFAULT]
    assert list((folder / "run").iterdir()) == []
    assert {path.name for path in folder.iterdir()} == {"model", "facts.jsonl", "run"}


def test_without_paraphrases_generality_is_a_dash_and_reliability_decides(folder, command):
    bare = [dataclasses.replace(fact, paraphrases=()) for fact in ASKED]
    write_facts(folder / "facts.jsonl", bare)
    shown = run(*command, "--layers", "2", "--json", "layers.json")
    assert rows(shown)["2 (default)"][2] == "–"
    assert "best by Reliability, without paraphrases: layer 2" in shown
    content = json.loads((folder / "run/layers.json").read_text(encoding="utf-8"))
    assert content["layers"][0]["generality"] is None


@pytest.mark.parametrize("generality", [0.9, None])
def test_a_plot_has_the_format_of_its_suffix(tmp_path, generality):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    comparison = LayerComparison([quality(i, 1.0, generality) for i in (4, 6)], 6, 10, {})
    for name, signature in (("a.png", b"\x89PNG"), ("new/a.pdf", b"%PDF")):
        plot_layers(comparison, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(signature)


def test_the_command_plots(folder, command):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert "plot in layers.svg" in run(*command, "--layers", "2", "--plot", "layers.svg")
    assert "<svg" in (folder / "run/layers.svg").read_text(encoding="utf-8")


def test_without_matplotlib_a_plot_is_refused_before_any_work(command, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "_measure", forbidden)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = fails(monkeypatch, capsys, *command, "--plot", "layers.png")
    assert said == "error: plots need matplotlib; run: pip install matplotlib"


def test_what_a_user_can_mend_is_one_clear_line(folder, command, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "_measure", forbidden)
    for more, message in (
        (["--layers", "2,3"], "layer is 3; the model has layers 0 to 2"),
        (["--device", "cuda:99"], "cuda:99"),
    ):
        said = fails(monkeypatch, capsys, *command, *more)
        assert message in said and "\n" not in said
    (folder / "facts.jsonl").write_text("")
    assert "must hold at least one fact" in fails(monkeypatch, capsys, *command)


def test_layers_that_are_no_numbers_are_refused(command):
    from typer.testing import CliRunner

    result = CliRunner().invoke(cli.app, [*map(str, command), "--layers", "4;8"])
    assert result.exit_code == 2
    assert "'4;8' is not a list of layers such as 4,8,12" in " ".join(result.output.split())
