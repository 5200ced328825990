"""The command `meg`, on tiny models that were saved to folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from tiny import (
    CONFIG,
    FACTS,
    GENERATORS,
    OTHER_FACTS,
    UNRELATED,
    fails,
    interrupt,
    make_encoder,
    make_language_model,
    make_tokenizer,
    run,
)
from typer.testing import CliRunner

import meg_kernels
from meg_kernels import (
    CollectionConfig,
    EditorConfig,
    FactsError,
    GeneratorConfig,
    MeGEditor,
    cli,
    read_facts,
    shipped,
    write_facts,
)
from meg_kernels.cli import commands, tables
from meg_kernels.editing.contexts import FITTED, TEMPLATE
from meg_kernels.editing.distill import Distillation, Quality
from meg_kernels.editing.evaluate import METRICS
from meg_kernels.routing.generators import NetworkGeneratorConfig
from meg_kernels.routing.manifest import sealed

EDITED = FACTS[:4]
COMMANDS = (
    "prepare",
    "edit",
    "list",
    "add",
    "remove",
    "layers",
    "evaluate",
    "ask",
    "chat",
    "train",
    "gate",
    "distill",
    "demo",
    "info",
)
SHARES = {*METRICS, "score"}


@pytest.fixture(scope="module", autouse=True)
def tiny_settings(tmp_path_factory):
    """The stages' settings as the tiny models need them, tables in full width."""

    def configure(**given) -> EditorConfig:
        chosen = given["generator"]
        if isinstance(chosen, NetworkGeneratorConfig):
            given["generator"] = GENERATORS[chosen.kind].with_training(seed=chosen.training.seed)
        return EditorConfig(
            **(given | {"collection": CONFIG.collection, "encoder_tuning": CONFIG.encoder_tuning})
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meg_kernels, "EditorConfig", configure)
        # The tiny encoder takes 32 tokens.
        patch.setattr("meg_kernels.editing.edited_model.shipped_passages", lambda: UNRELATED)
        patch.setattr(tables.console, "width", 300, raising=False)
        patch.setenv("MEG_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The options that name a tiny model and a tiny encoder."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    make_language_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    make_encoder().save_pretrained(folder / "encoder")
    return ["--model", str(folder / "model"), "--encoder", str(folder / "encoder")]


@pytest.fixture(scope="module")
def facts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    write_facts(path, EDITED)
    return path


@pytest.fixture(scope="module")
def tuning_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuning") / "tuning.jsonl"
    write_facts(path, OTHER_FACTS)
    return path


@pytest.fixture(scope="module")
def edited(models, facts_file, tuning_file, tmp_path_factory):
    """A folder with an edited model, and what making it printed."""
    out = tmp_path_factory.mktemp("edited") / "edited"
    arguments = ("--out", out, "--tuning", tuning_file, "--layer", 1, "--generator", "mlp")
    return out, run("edit", facts_file, *models, *arguments)


@pytest.fixture(scope="module")
def edited_dit(models, facts_file, tuning_file, tmp_path_factory):
    """A folder with an edited model whose generator is a DiT."""
    out = tmp_path_factory.mktemp("dit") / "edited"
    run("edit", facts_file, *models, "--out", out, "--tuning", tuning_file, "--layer", 1)
    return out


def test_facts_can_be_fitted_in_the_template_alone(
    models, facts_file, tuning_file, tmp_path, monkeypatch
):
    configure, fitted = meg_kernels.EditorConfig, []

    def noted(**given):
        fitted.append(given["collection"].contexts)
        return configure(**given)

    monkeypatch.setattr(meg_kernels, "EditorConfig", noted)
    arguments = ["--tuning", tuning_file, "--layer", 1, "--generator", "bank", "--limit", 2]
    for more in (["--contexts", "template"], []):
        out = tmp_path / f"out{len(more)}"
        run("edit", facts_file, *models, "--out", out, *arguments, *more)
    assert fitted == [TEMPLATE, FITTED]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_shows_an_example_that_it_accepts(command):
    shown = run(command, "--help")
    assert f"Example: meg {command}" in " ".join(shown.split())
    assert "Usage:" in shown


def alone(code) -> str:
    """What a new Python prints in which nothing of the package is imported yet."""
    code = f"import sys; {code}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_help_is_shown_without_loading_torch_or_transformers():
    shown = alone(
        "import atexit; sys.argv = ['meg', 'edit', '--help']; "
        "atexit.register(lambda: print({'torch', 'transformers', 'matplotlib'} & {*sys.modules})); "
        "from meg_kernels.cli import main; main()"
    )
    assert "Usage:" in shown and shown.endswith("set()\n")


def test_the_package_runs_as_a_module():
    ran = subprocess.run(
        [sys.executable, "-m", "meg_kernels.cli", "--help"], capture_output=True, text=True
    )
    assert ran.returncode == 0 and "Usage:" in ran.stdout, ran.stderr


def test_the_version_is_shown():
    assert run("--version").strip() == f"meg-kernels {meg_kernels.__version__}"


def test_the_help_lists_all_commands():
    shown = run("--help")
    assert all(f" {command} " in shown for command in COMMANDS)


def test_info_says_what_is_installed_and_usable():
    shown = run("info")
    assert torch.__version__ in shown
    assert "backend reference" in shown and "chosen automatically" in shown
    for name in ("cuda", "triton", "cpu"):
        (line,) = [line for line in shown.splitlines() if f"backend {name}" in line]
        assert "usable" in line or "off: " in line


def test_edit_saves_an_editor_that_answers_the_facts(edited):
    out, shown = edited
    assert "4 of 4 facts learnt" in shown and "AUROC" in shown
    assert f"meg ask {out}" in " ".join(shown.split()).replace("\n", "")
    editor = MeGEditor.from_pretrained(out)
    assert editor.facts == EDITED and editor.layer == 1
    assert editor.config.generator.kind == "mlp"
    assert editor.generate([f.query for f in EDITED], 5) == [f.answer for f in EDITED]
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # no work is left


def test_ask_shows_base_and_edited_answers_side_by_side(edited):
    out, _ = edited
    shown = run("ask", out, EDITED[1].query, UNRELATED[0], "--max-new-tokens", 3)
    editor = MeGEditor.from_pretrained(out)
    for query, accepted in ((EDITED[1].query, "yes"), (UNRELATED[0], "no")):
        (line,) = [line for line in shown.splitlines() if query in line]
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        assert cells[1] == editor.generate_base([query], 3)[0]
        assert cells[2] == editor.generate([query], 3)[0]
        assert cells[3].startswith(accepted)
    assert EDITED[1].answer in shown


def assert_report(content, n):
    parts = {"n", "metrics", "base", "collected", "protocol", "seconds", "served", "perplexity"}
    assert set(content) == parts
    assert content["n"] == n
    for part in ("metrics", "base", "collected"):
        assert set(content[part]) == SHARES
    stages = {"collect", "encoder", "gate", "generator", "evaluate"}
    assert set(content["seconds"]) == stages
    assert content["metrics"]["reliability_ag"] == content["collected"]["reliability_ag"] == 1.0
    assert content["base"]["reliability_ag"] == 0.0 and content["base"]["locality_ag"] == 1.0


def test_evaluate_writes_the_report_that_it_shows(edited, tmp_path):
    out, _ = edited
    shown = run("evaluate", out, "--json", tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert_report(content, len(EDITED))
    assert "Reliability" in shown and "Generality" in shown and "Locality" in shown
    assert f"{content['metrics']['generality_ag']:.3f}" in shown
    assert content["protocol"]["edited_facts"] == len(EDITED)


def test_evaluate_writes_nothing_to_the_folder_and_needs_no_cache(edited, tmp_path, monkeypatch):
    out = edited[0]
    before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEG_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    shown = run("evaluate", out, "--limit", 1)
    assert shown.count("not resumable after an interruption") == 1 and "Reliability" in shown
    assert before == {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}


def test_evaluate_asks_the_facts_of_another_file_up_to_the_limit(edited, facts_file, tmp_path):
    out, _ = edited
    report = tmp_path / "report.json"
    run("evaluate", out, "--facts", facts_file, "--limit", 2, "--json", report)
    assert_report(json.loads(report.read_text(encoding="utf-8")), 2)
    run("evaluate", out, "--limit", 3, "--json", report)
    assert_report(json.loads(report.read_text(encoding="utf-8")), 3)


def cells(shown, title) -> list[str]:
    """Of the table's row that starts so."""
    (line,) = [line for line in shown.splitlines() if line.startswith(f"│ {title} ")]
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_facts_that_the_model_knows_can_be_left_out(models, tuning_file, tmp_path, edited):
    base = MeGEditor.from_pretrained(edited[0]).generate_base([EDITED[0].query], 16)
    known = dataclasses.replace(EDITED[0], answer=base[0].split(".")[0])
    write_facts(tmp_path / "facts.jsonl", [known, *EDITED[1:]])
    more = ("--tuning", tuning_file, "--layer", 1, "--generator", "bank", "--skip-known")
    out = tmp_path / "edited"
    shown = run("edit", tmp_path / "facts.jsonl", *models, "--out", out, *more)
    assert "left out: 1 of 4 facts" in shown
    assert MeGEditor.from_pretrained(out).facts == EDITED[1:]


def test_tuning_facts_are_those_asked_for_or_the_files_others_and_ours_where_they_are_few(tmp_path):
    path, other = tmp_path / "facts.jsonl", tmp_path / "other.jsonl"
    write_facts(path, FACTS[:6])
    write_facts(other, OTHER_FACTS[:2])
    edited, rest = FACTS[:2], FACTS[2:6]
    assert commands._tuning_facts(path, None, edited, len(rest)) == rest
    ours = shipped.shipped_tuning_facts()
    assert commands._tuning_facts(path, None, edited, len(rest) + 1) == [*rest, *ours]
    assert commands._tuning_facts(path, [other, path], edited, 1000) == [
        *OTHER_FACTS[:2],
        *FACTS[:6],
    ]


def test_a_gate_and_its_threshold_can_be_changed(edited, tmp_path):
    out = shutil.copytree(edited[0], tmp_path / "edited")
    shown = run("gate", out, "--gate", "familiarity")
    assert "AUROC" in shown and "accepts scores above" not in shown
    assert MeGEditor.from_pretrained(out).config.gate == "familiarity"
    shown = run("gate", out, "--threshold", 2)
    assert "accepts scores above 2" in shown
    editor = MeGEditor.from_pretrained(out)
    assert editor.config.gate == "familiarity" and editor.edits.gate.threshold == 2
    assert not editor.route([EDITED[0].query]).accepted
    run("gate", out, "--gate", "similarity", "--require-subject")
    assert MeGEditor.from_pretrained(out).config.require_subject
    name = EDITED[0].query, EDITED[0].paraphrases[0]
    run("gate", out, "--threshold", -2)
    nameless = "of all"  # in the tiny encoder's words
    assert "subject not named)" in run("ask", out, *name, nameless, "--max-new-tokens", 3)
    shown = run("gate", out, "--no-require-subject")
    assert "accepts scores above -2" in shown  # as before
    editor = MeGEditor.from_pretrained(out)
    assert editor.config.gate == "similarity" and editor.config.require_subject is False
    assert "subject" not in run("ask", out, nameless, "--max-new-tokens", 3)
    run("gate", out, "--calibrated")
    assert -1 < MeGEditor.from_pretrained(out).edits.gate.threshold < 1


def facts_table(shown) -> list[list[str]]:
    """The rows of the table that `meg list` prints."""
    return [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in shown.splitlines()
        if line.startswith("│")
    ]


def test_list_shows_each_fact_and_where_its_neuron_comes_from(edited, tmp_path, monkeypatch):
    out = shutil.copytree(edited[0], tmp_path / "edited")
    named = dataclasses.replace(FACTS[4], subject=None)
    write_facts(tmp_path / "more.jsonl", [named])
    run("add", out, tmp_path / "more.jsonl")
    manifest = json.loads((out / "meg.json").read_text(encoding="utf-8"))
    manifest["report"]["unlearnt"] = [EDITED[1].id]
    manifest["base"]["name"] = "absent"  # which list does not look for
    (out / "meg.json").write_text(json.dumps(sealed(manifest)), encoding="utf-8")
    monkeypatch.setattr(MeGEditor, "from_pretrained", lambda *given: pytest.fail("it was loaded"))
    shown = run("list", out, "--json", tmp_path / "list.json")
    content = json.loads((tmp_path / "list.json").read_text(encoding="utf-8"))
    facts = [*EDITED, named]
    assert content == [
        {
            "id": fact.id,
            "query": fact.query,
            "answer": fact.answer,
            "subject": fact.subject,
            "neuron": "collected" if fact is named else "generated",
            "learnt": fact is not EDITED[1],
            "served": fact is not EDITED[1],
        }
        for fact in facts
    ]
    assert facts_table(shown) == [
        [
            row["id"],
            row["query"],
            row["answer"],
            row["subject"] or "–",
            row["neuron"],
            "yes" if row["learnt"] else "no: left to the base model",
        ]
        for row in content
    ]
    assert "5 facts are edited; 1 of them with collected neurons, 1 not learnt, 1 left" in shown
    manifest["config"]["serve_unlearnt"] = True
    (out / "meg.json").write_text(json.dumps(sealed(manifest)), encoding="utf-8")
    shown = run("list", out)
    assert facts_table(shown)[1][-1] == "no" and "1 not learnt, 0 left to the base" in shown


def test_facts_that_are_not_learnt_are_left_to_the_base_model_and_said_to_be(
    models, facts_file, tuning_file, tmp_path, monkeypatch
):
    hopeless = CollectionConfig(max_steps=1)
    monkeypatch.setattr("test_cli.CONFIG", dataclasses.replace(CONFIG, collection=hopeless))
    out = tmp_path / "out"
    arguments = ["edit", facts_file, *models, "--out", out, "--tuning", tuning_file, "--layer", 1]
    shown = run(*arguments, "--generator", "bank")
    assert cells(shown, "collect")[2] == "0 of 4 facts learnt, 4 left to the base model"
    assert "not learnt, so that the base model answers for them: 4 of them" in shown
    shown = run("ask", out, EDITED[0].query, "--max-new-tokens", 3)
    (row,) = facts_table(shown)
    assert row[1] == row[2] and "not learnt" in row[3]
    shown = run("evaluate", out)
    assert "not learnt and left to the base model, but counted: 4 of 4 facts" in shown
    assert "base model answers" not in run("gate", out, "--serve-unlearnt")
    assert facts_table(run("ask", out, EDITED[0].query))[0][3].startswith("yes")
    shown = run(*arguments, "--generator", "bank", "--serve-unlearnt")
    assert cells(shown, "collect")[2] == "0 of 4 facts learnt"


def test_facts_are_removed_by_id_or_query(edited, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(edited[0], tmp_path / "edited")
    run("remove", out, EDITED[0].id, f"  {EDITED[2].query.upper()} ")
    assert MeGEditor.from_pretrained(out).facts == [EDITED[1], EDITED[3]]
    said = fails(monkeypatch, capsys, "remove", out, EDITED[1].id, EDITED[0].query)
    assert f"no edited fact has the id or the query {EDITED[0].query!r}" in said
    assert said.endswith("`meg list` shows them all")
    assert MeGEditor.from_pretrained(out).facts == [EDITED[1], EDITED[3]]


@pytest.fixture(scope="module")
def prepared(models, tuning_file, tmp_path_factory):
    """A folder with what `meg prepare` saves, and what it printed."""
    folder = tmp_path_factory.mktemp("prepared")
    write_facts(folder / "learnt.jsonl", [dataclasses.replace(f, locality=()) for f in FACTS[5:7]])
    (_, model, *encoder) = models
    arguments = ("--facts", folder / "learnt.jsonl", "--tuning", tuning_file, "--layer", 1)
    shown = run("prepare", model, *encoder, *arguments, "--out", folder / "prepared")
    return folder / "prepared", shown


def test_what_is_prepared_edits_facts_into_other_folders(prepared, facts_file, tmp_path):
    folder, shown = prepared
    assert "2 of 2 facts learnt" in shown and f"--prepared {folder}" in " ".join(shown.split())
    before = sorted(path.name for path in folder.iterdir())
    shown = run("edit", facts_file, "--prepared", folder, "--out", tmp_path / "edited")
    assert f"{len(EDITED)} facts are edited" in shown and "meg ask" in shown
    loaded = MeGEditor.from_pretrained(tmp_path / "edited")
    assert loaded.generate([f.query for f in EDITED], 5) == [f.answer for f in EDITED]
    assert sorted(path.name for path in folder.iterdir()) == before
    assert "0 facts" in run("list", folder)


@pytest.mark.parametrize("option", ["--layer=1", "--generator=bank", "--no-snap", "--seed=3"])
def test_what_was_decided_when_it_was_prepared_is_not_asked_again(
    prepared, facts_file, tmp_path, monkeypatch, capsys, option
):
    arguments = ("edit", facts_file, "--prepared", prepared[0], "--out", tmp_path / "no", option)
    said = fails(monkeypatch, capsys, *arguments)
    name = option.removeprefix("--no-").removeprefix("--").partition("=")[0]
    assert f"leave out --{name}, which --prepared decides" in " ".join(said.split())
    assert not (tmp_path / "no").exists()


def test_an_edited_model_is_not_what_was_prepared(
    edited, facts_file, tmp_path, monkeypatch, capsys
):
    arguments = ("edit", facts_file, "--prepared", edited[0], "--out", tmp_path / "no")
    said = fails(monkeypatch, capsys, *arguments)
    assert "holds an edited model; `meg add`" in " ".join(said.split())


def test_a_folder_of_other_things_is_refused_before_the_work(
    facts_file, models, edited, tmp_path, monkeypatch, capsys
):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(MeGEditor, "edit", lambda *args, **more: pytest.fail("it was edited"))
    monkeypatch.setattr(MeGEditor, "train", lambda *args, **more: pytest.fail("it was trained"))
    for arguments in (("edit", facts_file, *models), ("train", edited[0])):
        said = fails(monkeypatch, capsys, *arguments, "--out", tmp_path)
        assert "holds other files (notes.txt)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_commands_own_input_is_safe_in_the_folder_that_it_writes(
    edited, models, tuning_file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "p"
    write_facts(out / "facts-mine.jsonl", [FACTS[4]])
    arguments = ("edit", out / "facts-mine.jsonl", *models, "--tuning", tuning_file)
    said = fails(monkeypatch, capsys, *arguments, "--out", out)
    assert "holds other files (facts-mine.jsonl)" in said
    shutil.copytree(edited[0], out, dirs_exist_ok=True)
    run("add", out, out / "facts-mine.jsonl")
    assert read_facts(out / "facts-mine.jsonl") == [FACTS[4]]
    assert MeGEditor.from_pretrained(out).facts == [*EDITED, FACTS[4]]


def test_facts_are_added_changed_and_removed(edited, tmp_path):
    out = shutil.copytree(edited[0], tmp_path / "edited")
    further = FACTS[4]
    write_facts(tmp_path / "more.jsonl", [further])
    shown = run("add", out, tmp_path / "more.jsonl")
    assert "5 facts are edited" in shown and cells(shown, "encoder")[2] == "as it was"
    assert cells(shown, "collect")[2] == "1 of 1 facts learnt" and "they replaced" not in shown
    assert cells(shown, "gate")[2].startswith("threshold as it was, 0.")
    waiting = (
        "answered by collected neurons until the generator learns theirs: 1 of them; meg train"
    )
    assert waiting in " ".join(shown.split())
    assert "which the generator has not learnt yet: 1 of 5 facts" in run("evaluate", out)
    assert further.answer in run("ask", out, further.query, "--max-new-tokens", 3)
    changed = dataclasses.replace(EDITED[0], answer=EDITED[1].answer)
    write_facts(tmp_path / "more.jsonl", [changed])
    with pytest.raises(FactsError, match=r"answered with both(.|\n)*meg add --replace"):
        run("add", out, tmp_path / "more.jsonl")
    shown = run("add", out, tmp_path / "more.jsonl", "--replace")
    assert "5 facts are edited" in shown and "edited facts that they replaced: 1" in shown
    assert "4 facts are edited" in run("remove", out, further.id)
    editor = MeGEditor.from_pretrained(out)
    assert editor.facts == [*EDITED[1:], changed]
    assert editor.generate([EDITED[0].query], 3) == [changed.answer]
    before = editor.edits.report.seconds["generator"]
    shown = run("train", out)
    after = MeGEditor.from_pretrained(out).edits.report.seconds["generator"]
    assert "100.0% of edited queries answered after" in shown
    assert f"in {after - before:.1f} s" in shown and "learns theirs" not in shown
    assert MeGEditor.from_pretrained(out).generate([EDITED[0].query], 3) == [changed.answer]
    assert "the generator learns nothing further; --generator trains" in run("train", out)
    assert "has not learnt yet" not in run("evaluate", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited", "more.jsonl"]


def test_an_interrupted_further_training_is_kept_in_the_folder(edited, tmp_path, monkeypatch):
    out = shutil.copytree(edited[0], tmp_path / "edited")
    write_facts(tmp_path / "more.jsonl", [FACTS[4]])
    run("add", out, tmp_path / "more.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("meg_kernels.editing.editor.MeGEditor._put", interrupt)
        result = CliRunner().invoke(cli.app, ["train", str(out)])
    assert result.exit_code != 0
    assert list((out / ".meg-work" / "train").glob("generator-*.safetensors"))
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a: steps.append(1) or step(*a))
    run("train", out)
    assert not steps and MeGEditor.from_pretrained(out).edits.generated.all()


def test_a_seed_needs_a_new_generator(edited, tmp_path):
    result = CliRunner().invoke(cli.app, ["train", str(edited[0]), "--seed", "3"])
    said = " ".join(result.output.replace("│", " ").split())
    assert (
        result.exit_code == 2
        and "--seed is for a new generator; choose one with --generator" in said
    )


def test_train_puts_another_generator_in_place_and_keeps_the_neurons(
    edited_dit, tmp_path, monkeypatch
):
    manifest = (edited_dit / "meg.json").read_bytes()
    tiny = CONFIG.generator.with_training(seed=3)
    asked = []
    monkeypatch.setattr(
        commands, "_generator_config", lambda *given: (asked.append(given), tiny)[1]
    )
    out = tmp_path / "mlp"
    shown = run("train", edited_dit, "--generator", "mlp", "--seed", 3, "--out", out)
    assert asked == [(commands.GeneratorKind.mlp, 3)]
    assert "100.0% of edited queries answered after" in shown
    assert f"saved to {out}" in " ".join(shown.split())
    assert (edited_dit / "meg.json").read_bytes() == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["mlp"]  # no work is left
    before, after = MeGEditor.from_pretrained(edited_dit), MeGEditor.from_pretrained(out)
    assert after.config.generator == tiny and after.facts == before.facts
    assert torch.equal(after.edits.neurons.key, before.edits.neurons.key)
    assert after.generate([f.query for f in EDITED], 5) == [f.answer for f in EDITED]


def test_each_generator_has_a_configuration():
    for kind in commands.GeneratorKind:
        made = commands._generator_config(kind, 7)
        assert made.kind == kind.value.removesuffix("-b")
        assert made.kind in ("bank", "hypernetwork") or made.training.seed == 7
    published = GeneratorConfig.paper().network
    big = commands._generator_config(commands.GeneratorKind.dit_b, 0)
    assert big.network == dataclasses.replace(published, condition_dropout=0.0)
    assert big.training.standardize and big.sampler.num_steps == 2


def test_distill_replaces_the_generator_by_one_of_fewer_steps(edited_dit, tmp_path):
    out = shutil.copytree(edited_dit, tmp_path / "edited")
    teacher = MeGEditor.from_pretrained(out)
    shown = run("distill", out, "--steps", 1, "--teacher-steps", 6, "--seed", 3)
    editor = MeGEditor.from_pretrained(out)
    assert editor.config.generator.sampler.num_steps == 1
    assert editor.config.generator.training.seed == 3
    assert editor.generate([f.query for f in EDITED], 5) == [f.answer for f in EDITED]
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]  # no work is left

    made, collected = [
        editor.edits.generator.scaled_weights(neurons)
        for neurons in (
            editor.edits.generator.generate(editor.edits.conditions),
            editor.edits.neurons,
        )
    ]
    _, steps, answered, _, distance = cells(shown, "student")
    assert (steps, answered) == ("1", "100.0%")
    size = max(collected.norm().item(), collected.numel() ** 0.5)
    assert float(distance) == pytest.approx((made - collected).norm().item() / size, abs=1e-4)
    assert cells(shown, "teacher")[1:4] == ["6", "100.0%", "0.0000"]
    assert cells(shown, "undistilled")[1] == "1"
    assert "of 4 edited queries" in shown and "no longer with" not in shown
    assert teacher.config.generator.sampler.num_steps == 2


def test_distill_leaves_its_folder_alone_if_another_is_named(edited_dit, tmp_path):
    out, before = tmp_path / "few", {path.name for path in edited_dit.iterdir()}
    manifest = (edited_dit / "meg.json").read_bytes()
    shown = run("distill", edited_dit, "--steps", 1, "--teacher-steps", 6, "--out", out)
    assert f"saved to {out}" in " ".join(shown.split())
    assert {path.name for path in edited_dit.iterdir()} == before
    assert (edited_dit / "meg.json").read_bytes() == manifest
    assert MeGEditor.from_pretrained(out).config.generator.sampler.num_steps == 1
    assert EDITED[0].answer in run("ask", out, EDITED[0].query, "--max-new-tokens", 3)


def test_distill_says_that_another_solver_is_replaced(edited_dit, tmp_path):
    out = shutil.copytree(edited_dit, tmp_path / "edited")
    manifest = json.loads((out / "meg.json").read_text(encoding="utf-8"))
    sampler = {"solver": "ddpm", "num_steps": 6, "spacing": "respaced"}
    manifest["config"]["generator"]["sampler"] |= sampler
    (out / "meg.json").write_text(json.dumps(sealed(manifest)), encoding="utf-8")
    shown = run("distill", out, "--steps", 2, "--teacher-steps", 6)
    assert "sampled with ddim from now on, no longer with ddpm" in shown
    assert MeGEditor.from_pretrained(out).config.generator.sampler.solver == "ddim"


def test_an_interrupted_distillation_goes_on_where_it_was(
    edited_dit, tmp_path, monkeypatch, capsys
):
    arguments = ["distill", edited_dit, "--steps", 1, "--teacher-steps", 6]
    arguments += ["--out", tmp_path / "few"]
    monkeypatch.setattr(sys, "argv", ["meg", *map(str, arguments)])

    with monkeypatch.context() as patch:
        patch.setattr("meg_kernels.routing.saving.Writer.save", interrupt)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    assert exit_.value.code == 130
    assert "start it again with the same arguments" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in (tmp_path / "few").iterdir()] == [".meg-work"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupt)
        run(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["few"]


def test_a_student_that_answers_less_than_its_teacher_is_reported(capsys):
    teacher, student = (
        Quality(steps, answered, 0.0, 0.1) for steps, answered in ((50, 0.9), (1, 0.8))
    )
    for made, said in ((student, True), (teacher, False)):
        tables.print_distillation(Distillation(10, teacher, student, made, 20))
        assert ("the student answers fewer queries" in capsys.readouterr().err) == said


def test_demo_edits_asks_and_measures(models, monkeypatch, tmp_path):
    for_model = MeGEditor.for_model.__func__

    def tiny(cls, name, config, *, encoder, dtype, device):
        assert name == "smollm2" and encoder == "all-MiniLM-L6-v2"
        config = dataclasses.replace(config, layer=1)
        editor = for_model(cls, models[1], config, encoder=models[3], dtype=dtype, device=device)
        shipped_edit = editor.edit
        editor.edit = lambda facts, **more: shipped_edit(
            facts, tuning_facts=OTHER_FACTS, unrelated_queries=UNRELATED, **more
        )
        return editor

    monkeypatch.setattr(MeGEditor, "for_model", classmethod(tiny))
    monkeypatch.setattr(shipped, "demo_facts", lambda: FACTS)
    out, report = tmp_path / "kept", tmp_path / "demo.json"
    shown = run("demo", "--limit", 4, "--out", out, "--json", report, "--generator", "bank")
    assert "4 of 4 facts learnt" in shown
    assert_report(json.loads(report.read_text(encoding="utf-8")), 4)
    assert MeGEditor.from_pretrained(out).facts == FACTS[:4]


def test_an_interrupted_edit_goes_on_where_it_was(
    models, facts_file, tuning_file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out" / "edited"
    arguments = ["edit", facts_file, *models, "--out", out, "--tuning", tuning_file, "--layer", 1]
    arguments += ["--generator", "bank"]
    monkeypatch.setattr(sys, "argv", ["meg", *map(str, arguments)])

    with monkeypatch.context() as patch:
        patch.setattr("meg_kernels.editing.stages.train_generator", interrupt)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    assert exit_.value.code == 130
    assert "start it again with the same arguments" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in out.iterdir()] == [".meg-work"]
    with monkeypatch.context() as patch:
        patch.setattr("meg_kernels.editing.neuron_fit.NeuronFit.run", interrupt)
        run(*arguments)
    assert MeGEditor.from_pretrained(out).facts == EDITED
    assert [path.name for path in out.parent.iterdir()] == ["edited"]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_facts_that_contradict_each_other_are_refused_or_the_first_kept(
    models, tuning_file, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "facts.jsonl"
    lines = [{"query": "The color of Abo is", "answer": color} for color in ("red", "blue")]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "out"
    arguments = ["edit", path, *models, "--out", out, "--tuning", tuning_file, "--layer", 1]
    arguments += ["--generator", "bank"]
    assert "The color of Abo is" in fails(monkeypatch, capsys, *arguments)
    assert not out.exists()
    with pytest.warns(UserWarning):
        run(*arguments, "--on-conflict", "first")
    assert [fact.answer for fact in MeGEditor.from_pretrained(out).facts] == ["red"]
    with pytest.warns(UserWarning, match="the last of each is kept"):
        run(*arguments, "--on-conflict", "last")
    assert [fact.answer for fact in MeGEditor.from_pretrained(out).facts] == ["blue"]
    lines = [{"query": "The color of Bena is", "answer": color} for color in ("red", "blue")]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert "--on-conflict first" in fails(monkeypatch, capsys, "add", out, path)
    with pytest.warns(UserWarning, match="the last of each is kept"):
        run("add", out, path, "--on-conflict", "last")
    assert [fact.answer for fact in MeGEditor.from_pretrained(out).facts] == ["blue", "blue"]


def test_which_answer_of_zsre_was_taken_is_said_and_can_be_chosen(edited, tmp_path):
    path, out = tmp_path / "zsre.json", shutil.copytree(edited[0], tmp_path / "edited")
    record = {"src": "The color of Fina is", "answers": ["red"], "alt": "blue"}
    path.write_text(json.dumps([record]))
    with pytest.warns(UserWarning, match=r"1 of 1 records .* answers are taken. Choose .*--zsre-t"):
        run("add", out, path)
    assert MeGEditor.from_pretrained(out).facts[-1].answer == "red"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run("add", out, path, "--zsre-target", "alt", "--replace")
    assert MeGEditor.from_pretrained(out).facts[-1].answer == "blue"


def test_an_unknown_way_to_treat_conflicts_is_refused(facts_file, tmp_path):
    arguments = ["edit", str(facts_file), "--out", str(tmp_path), "--on-conflict", "newest"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert "'newest' is not one of 'error', 'first', 'last'" in said


def test_what_a_user_can_mend_is_one_clear_line(edited, edited_dit, tmp_path, monkeypatch, capsys):
    for arguments, message in (
        (["edit", "absent.jsonl", "--out", tmp_path / "new"], "absent.jsonl"),
        (["ask", tmp_path, "Who?"], "holds no edited model"),
        (["list", tmp_path], "holds no edited model"),
        (["remove", tmp_path, "Who?"], "holds no edited model"),
        (["evaluate", tmp_path / "absent"], "holds no edited model"),
        (["evaluate", edited[0], "--json", edited[0] / "meg.json" / "report"], "meg.json"),
        (["evaluate", edited[0], "--device", "cuda:99"], "cuda:99"),
        (["distill", tmp_path / "absent", "--steps", 1], "holds no edited model"),
        (["remove", edited[0], *(fact.id for fact in EDITED)], "instead, delete the folder"),
        (["distill", edited[0], "--steps", 1], "mlp and bank already take one step"),
        (["distill", edited_dit, "--steps", 5], "steps is 5; it must be an integer in 1 to 4"),
        (["distill", edited_dit, "--steps", 2, "--teacher-steps", 2], "teacher_steps is 2"),
    ):
        said = fails(monkeypatch, capsys, *arguments)
        assert message in said and "\n" not in said
    assert not (tmp_path / "new").exists()


def test_bad_facts_are_listed_with_their_places(edited, models, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "The color of Abo is"}\n{"query": "x", "answer": 3}\n')
    for arguments in (
        ["edit", bad, "--out", tmp_path / "new", *models],
        ["evaluate", edited[0], "--facts", bad],
    ):
        first, *places = fails(monkeypatch, capsys, *arguments).splitlines()
        assert first == f"error: {bad} has 2 bad records:"
        assert "line 1 (record 1): answer is missing" in places[0]
        assert "line 2 (record 2): answer is 3" in places[1]
    assert not (tmp_path / "new").exists()


def test_texts_are_shown_as_they_are_whatever_brackets_they_hold(
    edited, monkeypatch, capsys, tmp_path
):
    shown = run("ask", edited[0], "Is [bold] the :heart: of [/INST]?", "--max-new-tokens", 2)
    assert "Is [bold] the :heart: of [/INST]?" in shown
    said = fails(monkeypatch, capsys, "ask", tmp_path / "an [old] and [/new] folder", "Who?")
    assert "an [old] and [/new] folder" in said
