"""How good edits are: numbers of facts, generators, gates and seeds on one data set.

    python -m benchmarks.quality.study ../shared/data/counterfact_500.json --name counterfact \\
        --facts 64 256 499 --seeds 0 1 2 --tuning ../shared/data/counterfact_10k.json
    python -m benchmarks.quality.study ../shared/data/zsre_1000.json --name zsre --skip-known \\
        --facts 64 1000 --tuning ../shared/data/zsre_extra_multirephrase.json

For each number of facts and seed a model is edited once, as `meg edit` does it, and saved under
--work. Every question is then asked with the neuron of the nearest edited fact mounted, whatever
the gate says, and of the base model; a gate's decision picks one of the two answers, so that all
gates and thresholds are compared on the same answers. Other generators are trained on the same
neurons.

Writes benchmarks/results/quality-NAME.json, one row for each number of facts, seed and generator.
Rows that are in it already are not measured again; an edited model that is saved is not edited
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conftest import version_of
from meg_kernels import EditorConfig, EncoderTuningConfig, Fact, GeneratorConfig, MeGEditor
from meg_kernels.editing.evaluate import (
    Evaluation,
    Metrics,
    Question,
    Verdict,
    has_own_neuron,
)
from meg_kernels.editing.facts import read_facts
from meg_kernels.storage import write_json

RESULTS = Path(__file__).parents[1] / "results"
GENERATORS = {
    "dit": GeneratorConfig(),
    "dit-b": GeneratorConfig.dit_b(),
    "mlp": GeneratorConfig(kind="mlp"),
    "bank": GeneratorConfig(kind="bank"),
}
CURVE = 41  # thresholds on a trade-off curve


class Edited:
    """One edited model and the questions that it is measured on.

    Args:
        editor: with the facts edited.
        asked: the facts that are asked about; a sample, where there are very many.
    """

    def __init__(self, editor: MeGEditor, asked: Sequence[Fact]):
        self.editor, self.asked = editor, list(asked)
        self.evaluation = Evaluation(editor.model, editor.tokenizer, self.asked, editor.template)
        places = {fact.normalized_query: row for row, fact in enumerate(editor.facts)}
        self.rows = [places[fact.normalized_query] for fact in self.asked]

    def base(self) -> dict[Question, Verdict]:
        return by_question(self.evaluation.base_verdicts(progress=True))

    def ceiling(self) -> Metrics:
        """With each fact's own collected neuron, without gate and generator."""
        neurons = self.editor.edits.neurons

        def mount(queries: Sequence[str], owners: Sequence[int]):
            index = torch.tensor([self.rows[owner] for owner in owners])
            return self.editor.attached.neurons(neurons, index)

        return self.evaluation.collected(mount, progress=True)

    def ungated(self, snap: bool, among=None) -> dict[Question, Verdict]:
        """The answers with a neuron for every question."""
        config = self.editor.config
        self.editor.config = dataclasses.replace(config, snap=snap)

        def mount(queries: Sequence[str], owners: Sequence[int]):
            routing = self.editor.route(queries)
            everything = torch.ones_like(routing.edited)
            return self.editor.routed(queries, dataclasses.replace(routing, edited=everything))

        try:
            return by_question(self.evaluation.verdicts(mount, progress=True, among=among))
        finally:
            self.editor.config = config

    def scores(self, questions: Sequence[Question]) -> Tensor:
        """[Q] the present gate's scores."""
        return self.editor.route([question.query for question in questions]).score.cpu()


def by_question(verdicts: Iterable[Verdict]) -> dict[Question, Verdict]:
    return {verdict.question: verdict for verdict in verdicts}


def gated(
    ungated: dict[Question, Verdict],
    base: dict[Question, Verdict],
    accepted: dict[Question, bool],
) -> Metrics:
    """The metrics of a gate that accepts these questions: the others are the base model's."""
    return Metrics.of(
        ungated[question] if accepted[question] else verdict for question, verdict in base.items()
    )


def curve(
    scores: Tensor, ungated: dict[Question, Verdict], base: dict[Question, Verdict]
) -> list[dict[str, float | None]]:
    """The metrics at thresholds spread over the scores, from accepting all to accepting none."""
    quantiles = torch.linspace(0, 1, CURVE)
    thresholds = [float(scores.min()) - 1, *torch.quantile(scores, quantiles).tolist()]
    points = []
    for threshold in dict.fromkeys(thresholds):
        accepted = dict(zip(base, (scores > threshold).tolist(), strict=True))
        points.append({"threshold": threshold} | gated(ungated, base, accepted).to_dict())
    return points


class Study:
    """The rows of one data set."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.path = RESULTS / f"quality-{arguments.name}.json"
        self.content: dict[str, Any] = {"study": "quality", "data": arguments.name, "rows": []}
        if self.path.exists():
            self.content |= json.loads(self.path.read_text(encoding="utf-8"))
        self.content["versions"] = {n: version_of(n) for n in ("torch", "transformers")}

    def row(self, **key: Any) -> dict[str, Any] | None:
        for row in self.content["rows"]:
            if all(row[name] == value for name, value in key.items()):
                return row
        return None

    def keep(self, row: dict[str, Any]) -> None:
        self.content["rows"].append(row)
        write_json(self.path, self.content)

    def edited(self, facts: Sequence[Fact], n: int, seed: int) -> MeGEditor:
        """The model with so many of the facts edited, from --work if it is there."""
        options = self.arguments
        folder = options.work / f"{options.name}-{n}-{seed}"
        if (folder / "meg.json").exists():
            return MeGEditor.from_pretrained(folder)
        tuning = read_facts(options.tuning, on_conflict="first")
        config = EditorConfig(
            encoder_tuning=EncoderTuningConfig(seed=seed),
            generator=dataclasses.replace(GENERATORS["dit"], seed=seed),
            seed=seed,
        )
        editor = MeGEditor.for_model("smollm2", config)
        work = options.work / f".{folder.name}"
        editor.edit(facts, tuning=tuning, work_folder=work, progress=True)
        editor.save_pretrained(folder)
        return editor

    def facts(self, n: int, seed: int) -> list[Fact]:
        """The first n facts, or, of another seed than 0, any n."""
        facts = self.usable()
        if seed:
            random.Random(seed).shuffle(facts)
        return facts[:n]

    def usable(self) -> list[Fact]:
        facts = read_facts(self.arguments.data, on_conflict="first")
        if not self.arguments.skip_known:
            return facts
        known = self.content.get("known")
        if known is None:
            editor = MeGEditor.for_model("smollm2")
            unknown = {fact.id for fact in editor.unknown(facts, progress=True)}
            known = self.content["known"] = [f.id for f in facts if f.id not in unknown]
        return [fact for fact in facts if fact.id not in set(known)]

    def measure(self, n: int, seed: int) -> None:
        generators = [*self.arguments.generators]
        if all(self.row(n=n, seed=seed, generator=name) for name in generators):
            return
        facts = self.facts(n, seed)
        editor = self.edited(facts, n, seed)
        asked = facts[: self.arguments.asked]
        with editor.serving():
            edited = Edited(editor, asked)
            base = edited.base()
            ceiling = edited.ceiling()
        own = editor.config.generator
        shared = {
            "n": n,
            "seed": seed,
            "facts": len(facts),
            "asked": len(asked),
            "base": edited.evaluation.base().to_dict(),
            "collected": ceiling.to_dict(),
            "unlearnt": len(editor.edits.report.unlearnt),
            "seconds": editor.edits.report.seconds,
            "protocol": edited.evaluation.protocol(),
            "calibration": dataclasses.asdict(editor.edits.report.calibration),
        }
        questions = [*base]
        scores = edited.scores(questions)
        accepted = dict(
            zip(questions, (scores > editor.edits.gate.threshold).tolist(), strict=True)
        )
        for name in generators:
            if self.row(n=n, seed=seed, generator=name) is not None:
                continue
            config = dataclasses.replace(GENERATORS[name], seed=seed)
            if config != own or editor.config.generator != own:
                editor.train(config, progress=True)
            training = editor.edits.report.training
            row = shared | {
                "generator": name,
                "training_steps": training.steps,
                "training_seconds": editor.edits.report.seconds["generator"],
            }
            with editor.serving():
                main = name == generators[0]

                def answered(question: Question, main=main) -> bool:
                    return main or accepted[question]

                snapped = edited.ungated(snap=True, among=answered)
                row["metrics"] = gated(snapped, base, accepted).to_dict()
                own_alone = edited.ungated(
                    snap=False, among=lambda q: has_own_neuron(q) and accepted[q]
                )
                alone = gated(snapped | own_alone, base, accepted)
                row["without_snapping"] = alone.to_dict()
            if main:
                row["curve"] = curve(scores, snapped, base)
            self.keep(row)
            print(name, n, seed, json.dumps(row["metrics"]))
        editor.detach()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="CounterFact or ZsRE JSON")
    parser.add_argument("--name", required=True, help="of the data, in the result's name")
    parser.add_argument("--tuning", type=Path, required=True, help="other facts, to tune on")
    parser.add_argument("--facts", type=int, nargs="+", default=[64], help="numbers of facts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--generators", nargs="+", choices=[*GENERATORS], default=["dit", "mlp", "bank"]
    )
    parser.add_argument("--asked", type=int, help="ask about the first so many facts only")
    parser.add_argument("--skip-known", action="store_true", help="as `meg edit --skip-known`")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    study = Study(arguments)
    for n in arguments.facts:
        for seed in arguments.seeds:
            study.measure(n, seed)


if __name__ == "__main__":
    main()
