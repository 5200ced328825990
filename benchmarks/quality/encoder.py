"""What tuning the text encoder is worth: which wordings find their fact, and which the gate takes.

    python -m benchmarks.quality.encoder ../shared/data/counterfact_500.json --name counterfact \\
        --tuning ../shared/data/counterfact_10k.json

The facts of the file count as edited. Generality is bounded by the share of their paraphrases that
the gate accepts for the right fact, Locality is decided by the share of their locality queries that
it rejects: no language model is asked. Every row tunes a fresh encoder on other facts and
calibrates the gate on others again, as `meg edit` does it, but for the choice that it names; where
it names no number, on 512 facts.

Writes benchmarks/results/encoder-NAME.json. Rows that are in it already are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.conftest import version_of
from meg_kernels import EditorConfig, EncoderTuningConfig, Fact, MeGEditor, TextEncoder
from meg_kernels.editing.tuning import calibrated_gate, tuned_router, usable_for_tuning
from meg_kernels.facts import read_facts
from meg_kernels.familiarity import calibrate, nearest
from meg_kernels.routing.router import Router
from meg_kernels.shipped import shipped_unrelated_queries
from meg_kernels.storage import write_json

RESULTS = Path(__file__).parents[1] / "results"
REFERENCE = "512 facts"


def changed(tuning_facts: int = 512, pooling: str = "mean", **changes: Any) -> dict[str, Any]:
    """The reference with so many facts, pooling and changes of the tuning."""
    tuning = dataclasses.replace(EncoderTuningConfig(), **changes)
    return {"most_tuning_facts": tuning_facts, "pooling": pooling, "encoder_tuning": tuning}


CHOICES: dict[str, dict[str, Any]] = {
    "not tuned": changed(learning_rate=1e-30, epochs=1),  # which changes no bit of a weight
    REFERENCE: changed(),
    "128 facts": changed(128),
    "2000 facts": changed(2000),
    "2000 facts, 1 epoch": changed(2000, epochs=1),
    "2000 facts, 2 epochs": changed(2000, epochs=2),
    "batches of any facts": changed(alike_batches=False),
    "no hard negatives": changed(hard_negatives=False),
    "first token instead of the mean": changed(pooling="cls"),
    "1 epoch": changed(epochs=1),
    "8 epochs": changed(epochs=8),
    "temperature 0.1": changed(temperature=0.1),
}


def measure(
    editor: MeGEditor, facts: Sequence[Fact], tuning: Sequence[Fact], choice: dict[str, Any]
) -> dict[str, Any]:
    """One row: an encoder tuned so, and the gate over the facts' queries."""
    options = dict(choice)
    encoder = TextEncoder.from_pretrained(pooling=options.pop("pooling"))
    router = Router(encoder, device=editor.model.device)
    config = dataclasses.replace(EditorConfig(), layer=editor.layer, **options)
    wordings = usable_for_tuning(tuning, facts, config)
    started = time.perf_counter()
    unrelated = shipped_unrelated_queries()
    router, held_out, _ = tuned_router(router, wordings, unrelated, config, None, progress=True)
    seconds = time.perf_counter() - started
    conditions = router.encode([fact.query for fact in facts])
    gate, calibration = calibrated_gate((), conditions, held_out, config, progress=False)
    owners, paraphrases = zip(
        *((row, text) for row, fact in enumerate(facts) for text in fact.paraphrases), strict=True
    )
    similarity, row = nearest(router.encode(paraphrases), conditions)
    right = row == torch.tensor(owners)
    local = [query.query for fact in facts for query in fact.locality]
    away = gate.score(router.encode(local))
    return {
        "tuning_facts": len(wordings),
        "seconds": seconds,
        "retrieved": float(right.float().mean()),
        "accepted": float((right & (similarity > gate.threshold)).float().mean()),
        "rejected": float((away <= gate.threshold).float().mean()),
        "auroc": calibrate(similarity, away, len(facts)).auroc,
        "calibration": dataclasses.asdict(calibration),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="CounterFact or ZsRE JSON")
    parser.add_argument("--name", required=True, help="of the data, in the result's name")
    parser.add_argument("--tuning", type=Path, required=True, help="other facts, to tune on")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=[*CHOICES])
    arguments = parser.parse_args()
    path = RESULTS / f"encoder-{arguments.name}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    facts = read_facts(arguments.data, on_conflict="first")
    tuning = read_facts(arguments.tuning, on_conflict="first")
    content |= {
        "study": "encoder",
        "data": arguments.name,
        "facts": len(facts),
        "versions": {name: version_of(name) for name in ("torch", "transformers")},
    }
    editor = MeGEditor.for_model("smollm2")
    for name in arguments.only:
        if name in {row["choice"] for row in content["rows"]}:
            continue
        row = measure(editor, facts, tuning, CHOICES[name])
        content["rows"].append({"choice": name, **row})
        write_json(path, content)
        print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
