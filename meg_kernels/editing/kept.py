"""What is edited, kept: in a folder, and on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from meg_kernels.editing.config import EditorConfig
from meg_kernels.editing.edited_model import EditedModel, one_at_a_time
from meg_kernels.editing.evaluate import EvaluationReport
from meg_kernels.routing.hub import ModelCard, check_repo_id, push_to_hub
from meg_kernels.routing.saving import save_edits
from meg_kernels.storage import write_text


class KeptModel(EditedModel):
    """An edited model that can be saved.

    Attributes:
        config: how it is edited.
    """

    config: EditorConfig
    _states: dict[Path, str | None]  # of the folders that these edits are in, or were

    @one_at_a_time
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the edits, everything but the base model, to `folder`: whole or not at all.

        Raises:
            RuntimeError: nothing is edited, or another process writes there, or did since loading.
            OSError: the folder holds something else, or cannot be written.
        """
        config = self.config.to_dict()
        save_edits(folder, self.edits, self.encoder, self.base, config, self._states)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        report: EvaluationReport | None = None,
        **options: Any,
    ) -> str:
        """Upload the edits, with a model card, to the Hugging Face Hub.

        Args:
            repo_id: `name`, in the user's own namespace, or `namespace/name`.
            license: that the edits are shared under, such as `mit`.
            report: an evaluation, for the card.
            options: private, token, commit_message, revision, as in `editing.hub.push_to_hub`.

        Returns:
            Where they are on the Hub.

        Raises:
            RuntimeError: nothing is edited.
            ValueError: no such name can be on the Hub.
        """
        check_repo_id(repo_id)
        metrics = {} if report is None else report.metrics.to_dict()
        protocol = "" if report is None else report.protocol["ag"]
        card = ModelCard.of(self.edits, self.name, self.layer, metrics, protocol, license, repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_text(Path(folder) / "README.md", card.markdown())
            return push_to_hub(folder, repo_id, **options)
