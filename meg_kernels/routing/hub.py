"""An edited model on the Hugging Face Hub: its card, and the upload of its folder.

What is shared are the edits: facts, neurons, gate, generator and encoder. The language model is not
among them; the card names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from meg_kernels.checks import FLAG, as_path
from meg_kernels.pretrained import SMOLLM2
from meg_kernels.routing.edits import Edits
from meg_kernels.routing.manifest import KINDS, MANIFEST

_SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Uploading never overwrites these: what an earlier upload left has another name.
_NAMED_AFTER_CONTENT = [
    f"{kind}-{'[0-9a-f]' * 16}{ending or '/*'}" for kind, ending in KINDS.items()
]


@dataclass(frozen=True)
class ModelCard:
    """What the card of an edited model says.

    Args:
        base_model: the edited language model's name, as it was given: an id on the Hub, a folder,
            or `smollm2`.
        num_facts: number of edited facts.
        layer: the feed-forward layer that carries the neurons, from 0.
        generator: where a query's neuron comes from, in a few words, such as
            "diffusion transformer, 4 steps".
        gate: what decides whether a query gets a neuron, in a few words, such as "similarity".
        threshold: the gate's threshold, in the gate's own unit.
        metrics: name to value, such as `{"Reliability": 0.99}`; empty if nothing was measured.
        protocol: one sentence on how `metrics` were measured; empty if it is not known.
        license: an identifier of the Hub, such as `mit`, that the edits are shared under; None if
            that is not decided.
        repo_id: where the folder is going to be, `name` or `namespace/name`; None if it stays a
            folder.

    Raises:
        ValueError: `repo_id` is not an id of the Hub.
    """

    base_model: str
    num_facts: int
    layer: int
    generator: str
    gate: str
    threshold: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    protocol: str = ""
    license: str | None = None
    repo_id: str | None = None

    def __post_init__(self) -> None:
        if self.repo_id is not None:
            check_repo_id(self.repo_id)

    @classmethod
    def of(
        cls,
        edits: Edits,
        base_model: str,
        layer: int,
        metrics: Mapping[str, float | None],
        protocol: str,
        license: str | None = None,
        repo_id: str | None = None,
    ) -> ModelCard:
        """The card of these edits; a metric that is None was not measured."""
        return cls(
            base_model,
            len(edits),
            layer,
            edits.generator.config.kind,
            edits.gate.kind,
            edits.gate.threshold,
            {name: share for name, share in metrics.items() if share is not None},
            protocol,
            license,
            repo_id,
        )

    def markdown(self) -> str:
        """The card as the text of a README.md with the Hub's metadata before it."""
        return "\n\n".join([self._metadata(), *self._sections()]) + "\n"

    def _metadata(self) -> str:
        """YAML, whose strings may be written as JSON's."""
        base = _on_hub(self.base_model)
        lines = [f"base_model: {json.dumps(base)}"] if base else []
        lines += [
            "library_name: meg-kernels",
            f"license: {json.dumps(self.license or 'unknown')}",
            "tags:",
            *(f"- {tag}" for tag in ("knowledge-editing", "model-editing", "meg")),
        ]
        return "\n".join(["---", *lines, "---"])

    def _sections(self) -> list[str]:
        facts = "1 fact" if self.num_facts == 1 else f"{self.num_facts:,} facts"
        sections = [
            f"# {_in_text(self.base_model)} with {facts} edited",
            "Edits made with MeG Kernels (massive editing by dynamic weight generation). A query "
            "about an edited fact gets a neuron of its own in one feed-forward layer; every other "
            "query is answered by the model as it was.",
            _table(
                ("", ""),
                {
                    "base model": _in_text(self.base_model),
                    "edited facts": f"{self.num_facts:,}",
                    "layer": str(self.layer),
                    "generator": self.generator,
                    "gate": f"{self.gate}, threshold {self.threshold:.4g}",
                },
            ),
            "## Use",
            f"```python\n{self._use()}\n```",
            "This repository holds the edits only. The base model is loaded from where it is.",
        ]
        if self.metrics:
            values = {name: f"{value:.4g}" for name, value in self.metrics.items()}
            sections += ["## Measured", _table(("metric", "value"), values)]
            sections += [self.protocol] if self.protocol else []
        sections += [
            "## What it does not do",
            "- The weights of the base model are not changed: without MeG Kernels nothing is "
            "edited.\n"
            "- The gate can err: an edited fact in unusual words may get the old answer, and a "
            "query that merely resembles an edited one may get a new answer.\n"
            "- Edits are not reasoned with: what follows from an edited fact is not edited.\n"
            "- The facts may be counterfactual; nothing here says that they are true.",
            "## Licence",
            f"{self.license or 'Unknown'}, for the edits. The base model has a licence of its own.",
        ]
        return sections

    def _use(self) -> str:
        if self.repo_id is None:
            return (
                "from meg_kernels import MeGEditor\n\n"
                'editor = MeGEditor.from_pretrained("path/to/this/folder")\n'
                'editor.generate(["..."])'
            )
        return (
            "from huggingface_hub import snapshot_download\n"
            "from meg_kernels import MeGEditor\n\n"
            f"editor = MeGEditor.from_pretrained(snapshot_download({json.dumps(self.repo_id)}))\n"
            'editor.generate(["..."])'
        )


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository on the Hub.

    Args:
        repo_id: `name`, in the user's own namespace, or `namespace/name`.

    Raises:
        ValueError: it is anything else; the message says why.
    """
    try:
        if not isinstance(repo_id, str):
            raise HFValidationError("it is not text")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id is {repo_id!r}; it must be 'name' or 'namespace/name', of letters, digits, "
            f"'-', '_' and '.': {error}"
        ) from error


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload edits",
    revision: str | None = None,
) -> str:
    """Upload a folder to a model repository on the Hugging Face Hub, in one commit.

    Files of edits that the repository holds from an earlier upload, and the folder no longer does,
    are deleted.

    Args:
        folder: what `MeGEditor.save_pretrained` wrote.
        repo_id: `name`, in the user's own namespace, or `namespace/name`; made if it is not there.
        private: whether a repository that is made is private; None: as the namespace has it.
        token: of the Hub; None: that of `hf auth login` or $HF_TOKEN.
        commit_message: first line of the commit.
        revision: branch to upload to, made if it is not there; None: main.

    Returns:
        The address of the commit.

    Raises:
        ValueError: `repo_id` is not an id of the Hub.
        FileNotFoundError: `folder` holds no edited model.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, for instance for want of a token.
    """
    check_repo_id(repo_id)
    private = FLAG.or_none()("private", private)
    folder = as_path("folder", folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} holds no edited model; write one with MeGEditor.save_pretrained"
        )
    hub = HfApi(token=token)
    full_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        hub.create_branch(full_id, branch=revision, exist_ok=True)
    commit = hub.upload_folder(
        repo_id=full_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        delete_patterns=_NAMED_AFTER_CONTENT,
        ignore_patterns=[".*"],
    )
    return commit.commit_url


def _on_hub(name: str) -> str | None:
    """The Hub's id of a base model; None for a folder, which the Hub would refuse."""
    if name == SMOLLM2:
        return _SMOLLM2_ON_HUB
    if Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _in_text(name: str) -> str:
    """A model's name for readers: of a folder, only its own name, as its path is private."""
    return _on_hub(name) or Path(name).name


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
