"""The card of an edited model and its upload, to a Hub that only takes notes."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import RepoCard

from meg_kernels.routing import hub
from meg_kernels.routing.hub import ModelCard, check_repo_id, push_to_hub

DIGEST = "0123456789abcdef"
ABOUT = ModelCard(
    "HuggingFaceTB/SmolLM2-135M",
    num_facts=1234,
    layer=20,
    generator="diffusion transformer, 4 steps",
    gate="similarity",
    threshold=0.71839,
)


def metadata(card: ModelCard) -> dict:
    _, front, _ = card.markdown().split("---\n", 2)
    return yaml.safe_load(front)


# The card


def test_the_card_says_what_was_edited_and_how():
    text = ABOUT.markdown()
    for row in (
        "| base model | HuggingFaceTB/SmolLM2-135M |",
        "| edited facts | 1,234 |",
        "| layer | 20 |",
        "| generator | diffusion transformer, 4 steps |",
        "| gate | similarity, threshold 0.7184 |",
    ):
        assert row in text.splitlines()
    assert "# HuggingFaceTB/SmolLM2-135M with 1,234 facts edited" in text
    assert "## What it does not do" in text


def test_one_fact_is_not_1_facts():
    text = dataclasses.replace(ABOUT, num_facts=1).markdown()
    assert "with 1 fact edited" in text and "1 facts" not in text


def test_the_hub_reads_the_metadata():
    assert metadata(ABOUT) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "library_name": "meg-kernels",
        "license": "unknown",
        "tags": ["knowledge-editing", "model-editing", "meg"],
    }
    data = RepoCard(ABOUT.markdown()).data
    assert data.library_name == "meg-kernels" and data.license == "unknown"


@pytest.mark.parametrize(
    ("name", "on_hub", "shown"),
    [
        ("gpt2", "gpt2", "gpt2"),
        ("smollm2", *["HuggingFaceTB/SmolLM2-135M-Instruct"] * 2),
        ("/home/me/models/mine", None, "mine"),
        ("./mine", None, "mine"),
        ("a/b/c", None, "c"),
    ],
)
def test_a_base_model_that_is_a_folder_is_no_id_of_the_hub(name, on_hub, shown):
    card = dataclasses.replace(ABOUT, base_model=name)
    assert metadata(card).get("base_model") == on_hub
    assert f"| base model | {shown} |" in card.markdown()
    assert "/home/me" not in card.markdown()


def test_a_folder_that_looks_like_an_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in metadata(dataclasses.replace(ABOUT, base_model="models/mine"))


@pytest.mark.parametrize("license", ["mit", "apache-2.0", 'odd: "quoted"'])
def test_a_licence_is_named_where_it_is_given(license):
    card = dataclasses.replace(ABOUT, license=license)
    assert metadata(card)["license"] == license
    assert f"## Licence\n\n{license}, for the edits." in card.markdown()
    assert "## Licence\n\nUnknown, for the edits." in ABOUT.markdown()


def test_metrics_are_shown_with_their_protocol_if_there_are_any():
    assert "## Measured" not in ABOUT.markdown()
    metrics = {"Reliability": 1.0, "Locality": 0.98765}
    text = dataclasses.replace(ABOUT, metrics=metrics, protocol="On three facts.").markdown()
    assert "| Reliability | 1 |\n| Locality | 0.9877 |\n\nOn three facts." in text


@pytest.mark.parametrize(
    ("repo_id", "source"),
    [(None, '"path/to/this/folder"'), ("me/edits", 'snapshot_download("me/edits")')],
)
def test_the_card_shows_code_that_loads_the_edits(repo_id, source):
    text = dataclasses.replace(ABOUT, repo_id=repo_id).markdown()
    (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert f"MeGEditor.from_pretrained({source})" in code


# Uploading


class Hub:
    """In HfApi's place: keeps what it is asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, token):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))
        return SimpleNamespace(commit_url=f"https://the.hub/{options['repo_id']}/commit/1")


@pytest.fixture
def taking_notes(monkeypatch):
    fake = Hub()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


@pytest.fixture
def edited(tmp_path):
    (tmp_path / "meg.json").write_text(json.dumps({"format": "meg-kernels"}))
    return tmp_path


def test_a_folder_is_uploaded_in_one_commit_to_a_repository_that_is_made(edited, taking_notes):
    address = push_to_hub(
        edited, "edits", private=True, token="hf_x", commit_message="New facts", revision="v2"
    )
    assert address == "https://the.hub/me/edits/commit/1"
    token, repo, branch, (name, upload) = taking_notes.calls
    assert token == ("token", "hf_x")
    assert repo == ("create_repo", "edits", {"private": True, "exist_ok": True})
    assert branch == ("create_branch", "me/edits", {"branch": "v2", "exist_ok": True})
    assert name == "upload_folder"
    assert (upload["repo_id"], upload["folder_path"]) == ("me/edits", edited)
    assert (upload["commit_message"], upload["revision"]) == ("New facts", "v2")


def test_main_is_uploaded_to_and_privacy_left_to_the_namespace_by_default(edited, taking_notes):
    push_to_hub(str(edited), "me/edits")
    names = [call[0] for call in taking_notes.calls]
    assert names == ["token", "create_repo", "upload_folder"]
    assert taking_notes.calls[1][2]["private"] is None
    assert taking_notes.calls[2][1]["revision"] is None


def test_files_of_an_earlier_upload_are_deleted_and_others_kept(edited, taking_notes):
    push_to_hub(edited, "me/edits")
    patterns = taking_notes.calls[-1][1]["delete_patterns"]
    there = {
        "meg.json": False,
        "README.md": False,
        "LICENSE": False,
        "picture-of-edits.png": False,
        "facts-mine.jsonl": False,
        "gate-notes.txt": False,
        f"gate-{DIGEST}.txt": False,
        f"edits-{DIGEST}0.safetensors": False,
        f"facts-{DIGEST}.jsonl": True,
        f"edits-{DIGEST}.safetensors": True,
        f"gate-{DIGEST}.safetensors": True,
        f"generator-{DIGEST}.safetensors": True,
        f"encoder-{DIGEST}/model.safetensors": True,
    }
    deleted = {p: any(fnmatch.fnmatchcase(p, pattern) for pattern in patterns) for p in there}
    assert deleted == there


@pytest.mark.parametrize("repo_id", ["a/b/c", "a b", "", "-a", "a--b", "a/b.git", None, 3])
def test_what_cannot_be_a_repository_is_refused_before_any_work(edited, taking_notes, repo_id):
    with pytest.raises(ValueError, match=f"^repo_id is {re.escape(repr(repo_id))}; it must be"):
        push_to_hub(edited, repo_id)
    with pytest.raises(ValueError, match=r"^repo_id is "):
        check_repo_id(repo_id)
    assert not taking_notes.calls


def test_a_card_for_what_cannot_be_a_repository_is_refused():
    with pytest.raises(ValueError, match=r"^repo_id is 'a/b/c'; it must be"):
        dataclasses.replace(ABOUT, repo_id="a/b/c")


def test_a_folder_without_edits_is_not_uploaded(tmp_path, taking_notes):
    with pytest.raises(FileNotFoundError, match=r"holds no edited model; write one with MeGEditor"):
        push_to_hub(tmp_path, "me/edits")
    assert not taking_notes.calls
