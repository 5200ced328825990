"""The study of the encoder: what it counts is what an edited model does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import CONFIG, EDITED, GENERATORS, OTHER_FACTS, UNRELATED, make_editor, make_encoder

from benchmarks.quality import encoder as study
from meg_kernels import EditorConfig


def test_a_row_counts_what_an_edited_model_finds_and_rejects(monkeypatch):
    poolings = []

    def fresh(pooling):
        poolings.append(pooling)
        return make_encoder()

    monkeypatch.setattr(study.TextEncoder, "from_pretrained", fresh)
    monkeypatch.setattr(study, "shipped_unrelated_queries", lambda: UNRELATED)
    choice = {"pooling": "mean", "encoder_tuning": CONFIG.encoder_tuning}
    row = study.measure(make_editor(), EDITED, OTHER_FACTS, choice)

    bank = GENERATORS["bank"]
    config = EditorConfig(
        layer=CONFIG.layer,
        collection=dataclasses.replace(CONFIG.collection, max_steps=1),
        generator=bank,
        encoder_tuning=CONFIG.encoder_tuning,
        serve_unlearnt=True,  # with one step, that is most of them
        require_subject=False,  # an encoder is measured by itself
    )
    editor = make_editor(config)
    editor.edit(EDITED, tuning_facts=OTHER_FACTS, unrelated_queries=UNRELATED)
    owners = [i for i, fact in enumerate(EDITED) for _ in fact.paraphrases]
    routing = editor.route([query for fact in EDITED for query in fact.paraphrases])
    right = routing.fact == torch.tensor(owners)
    away = editor.route([other.query for fact in EDITED for other in fact.locality]).accepted
    assert row["retrieved"] == pytest.approx(float(right.float().mean()))
    assert row["accepted"] == pytest.approx(float((right & routing.accepted).float().mean()))
    assert row["rejected"] == pytest.approx(float((~away).float().mean()))
    assert row["rejected"] > 0 and row["accepted"] > 0 and row["seconds"] > 0
    assert poolings == ["mean"] and choice["pooling"] == "mean"
    assert row["calibration"] == dataclasses.asdict(editor.edits.report.calibration)
