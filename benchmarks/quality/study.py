"""How good edits are: numbers of facts, generators, gates and seeds on one data set.

    python -m benchmarks.quality.study ../shared/data/counterfact_500.json --name counterfact \
        --facts 64 256 500 --seeds 0 1 2 --tuning ../shared/data/counterfact_10k.json
    python -m benchmarks.quality.study ../shared/data/zsre_1000.json --name zsre --skip-known \
        --facts 64 256 1000 --tuning ../shared/data/zsre_extra_multirephrase.json
    python -m benchmarks.quality.study ../shared/data/counterfact_10k.json --asked 1000 --nested \
        --name counterfact-10k --facts 64 256 1000 4096 10000 \
        --tuning ../shared/data/counterfact_500.json meg_kernels/data/tuning_facts.jsonl \
        ../shared/data/zsre_extra_multirephrase.json

For each number of facts and seed a model is edited once, as `meg edit` does it, and saved under
--work. Every question is then asked with the neuron of the nearest edited fact mounted, whatever
the gate says, and of the base model; a gate's decision picks one of the two answers, so that all
gates and thresholds are compared on the same answers. Other generators are trained on the same
neurons; the distilled one samples in one step, as the DiT does, but what the DiT samples in fifty.
With --nested only the largest number is edited; for the others the rest is removed again and the
generator trained anew, on the neurons that are left: encoder and neurons are the same in all rows.

--gates compares the paper's familiarity network, alone and with ours. --zero-pairs trains the DiT
once more, as the paper's A.3 has it, with queries beside the edited ones that shall get
the zero neuron.

Writes benchmarks/results/quality-NAME.json, one row for each number of facts, seed and generator.
Rows that are in it already are not measured again; an edited model that is saved is not edited
again, and what the base model answered is kept too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conftest import version_of
from meg_kernels import EditorConfig, EncoderTuningConfig, Fact, GeneratorConfig, MeGEditor
from meg_kernels.editing.answered import answers_with
from meg_kernels.editing.evaluate import (
    Evaluation,
    Metrics,
    Question,
    Verdict,
    has_own_neuron,
)
from meg_kernels.editing.layers import default_layer
from meg_kernels.editing.prompting import PromptTemplate
from meg_kernels.editing.train import train_generator
from meg_kernels.facts import read_facts
from meg_kernels.familiarity import Calibration
from meg_kernels.neuron import Neurons
from meg_kernels.routing.generators import NetworkGeneratorConfig, build_generator
from meg_kernels.routing.router import Routing
from meg_kernels.storage import write_json
from meg_kernels.texts import normalized_query

RESULTS = Path(__file__).parents[1] / "results"
DISTILLED = "dit, distilled"
GENERATORS = {
    "dit": GeneratorConfig.dit(),
    DISTILLED: GeneratorConfig.dit(),
    "dit, other wordings": GeneratorConfig.dit(reword=True),
    "dit-b": GeneratorConfig.dit_b(),
    "mlp": GeneratorConfig.mlp(),
    "mlp, other wordings": GeneratorConfig.mlp(reword=True),
    "bank": GeneratorConfig.bank(),
}
ZERO_PAIRS = "dit, zero pairs"
CURVE = 41  # thresholds on a trade-off curve

Asked = Callable[[Question], bool | None]
"""Whether a question is asked."""


class Edited:
    """An edited model, asked the questions of those of its facts that an evaluation has.

    Args:
        editor: with the facts edited.
        evaluation: of its model, on any facts.
    """

    def __init__(self, editor: MeGEditor, evaluation: Evaluation):
        self.editor, self.evaluation = editor, evaluation
        places = {fact.normalized_query: row for row, fact in enumerate(editor.facts)}
        self.rows = [places.get(fact.normalized_query, -1) for fact in evaluation.facts]

    def of_edited(self, question: Question) -> bool:
        """Whether the question belongs to a fact that is edited."""
        return self.rows[question.fact] >= 0

    def base(self) -> dict[Question, Verdict]:
        verdicts = self.evaluation.base_verdicts(progress=True)
        return by_question(v for v in verdicts if self.of_edited(v.question))

    def ceiling(self) -> Metrics:
        """With each fact's own collected neuron, without gate and generator."""
        neurons = self.editor.edits.neurons

        def mount(queries: Sequence[str], owners: Sequence[int]):
            index = torch.tensor([self.rows[owner] for owner in owners])
            return self.editor.attached.neurons(neurons, index)

        def asked(question: Question) -> bool:
            return self.of_edited(question) and has_own_neuron(question)

        return Metrics.of(self.evaluation.verdicts(mount, progress=True, among=asked))

    def ungated(self, snap: bool, among: Asked | None = None) -> dict[Question, Verdict]:
        """The answers with a neuron for every question, or among some of them."""
        router = self.editor.router
        config, router.config = router.config, dataclasses.replace(router.config, snap=snap)

        def mount(queries: Sequence[str], owners: Sequence[int]):
            routing = self.editor.route(queries)
            everything = torch.ones_like(routing.accepted)
            return self.editor.routed(queries, dataclasses.replace(routing, accepted=everything))

        def asked(question: Question) -> bool:
            return self.of_edited(question) and (among is None or among(question))

        try:
            return by_question(self.evaluation.verdicts(mount, progress=True, among=asked))
        finally:
            router.config = config

    def routing(self, questions: Sequence[Question]) -> Routing:
        """What the present gate makes of the questions."""
        return self.editor.route([question.query for question in questions])


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


def about_others(questions: Iterable[Question], facts: Iterable[Fact]) -> set[Question]:
    """The locality queries that name no edited subject.

    With very many edits some of the others ask for an edited fact in other words, and the data
    wants the old answer all the same.
    """
    subjects = {normalized_query(fact.subject) for fact in facts if fact.subject}
    return {
        question
        for question in questions
        if question.kind == "locality"
        and not any(map(normalized_query(question.query).__contains__, subjects))
    }


def taken_for(edited: Edited, questions: Sequence[Question], routing: Routing) -> dict[str, int]:
    """What the gate takes the paraphrases among some questions for, by their routing.

    For their own fact, for another one about the same subject, for yet another one, or for no
    edited fact.
    """
    facts = edited.editor.facts
    counts = dict.fromkeys(("asked", "own", "same_subject", "another", "none"), 0)
    where = zip(questions, routing.accepted.tolist(), routing.fact.tolist(), strict=True)
    for question, accepted, near in where:
        if question.kind != "generality":
            continue
        own = edited.rows[question.fact]
        counts["asked"] += 1
        if not accepted:
            counts["none"] += 1
        elif near == own:
            counts["own"] += 1
        else:
            mine, theirs = (normalized_query(facts[row].subject or "") for row in (own, near))
            counts["same_subject" if mine == theirs else "another"] += 1
    return counts


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


@dataclass(frozen=True)
class Decisions:
    """What a gate makes of some questions.

    Args:
        scores: [Q] its scores.
        threshold: the calibrated one.
        calibration: how that went, on other queries.
    """

    scores: Tensor
    threshold: float
    calibration: Calibration

    @classmethod
    def of(cls, edited: Edited, routing: Routing) -> Decisions:
        """The present gate's, and of the names where subjects are required."""
        edits = edited.editor.edits
        return cls(routing.score, edits.gate.threshold, edits.calibration).only(routing.named)

    def only(self, where: Tensor) -> Decisions:
        """The same where `where` [Q] is true; elsewhere, no threshold accepts."""
        rejected = torch.full_like(self.scores, float(self.scores.min()) - 2)
        return dataclasses.replace(self, scores=torch.where(where, self.scores, rejected))

    def accepted(self, questions: Iterable[Question]) -> dict[Question, bool]:
        return dict(zip(questions, (self.scores > self.threshold).tolist(), strict=True))

    def row(
        self, ungated: dict[Question, Verdict], base: dict[Question, Verdict]
    ) -> dict[str, Any]:
        return {
            "metrics": gated(ungated, base, self.accepted(base)).to_dict(),
            "calibration": dataclasses.asdict(self.calibration),
            "curve": curve(self.scores, ungated, base),
        }


def compare_gates(
    edited: Edited,
    own: Decisions,
    ungated: dict[Question, Verdict],
    base: dict[Question, Verdict],
) -> dict[str, Any]:
    """The present gate, similarity, beside familiarity, and what both accept."""
    editor = edited.editor
    editor.set_gate("familiarity", progress=True)
    other = Decisions.of(edited, edited.routing([*base]))
    editor.set_gate("similarity")
    both = own.only(other.scores > other.threshold)
    return {"familiarity": other.row(ungated, base), "both": both.row(ungated, base)}


def without_names(edited: Edited, questions: Sequence[Question]) -> Decisions:
    """The present gate's decisions where no subject is required."""
    router = edited.editor.router
    config = router.config
    router.config = dataclasses.replace(config, require_subject=False)
    try:
        return Decisions.of(edited, edited.routing(questions))
    finally:
        router.config = config


def of_seed(name: str, seed: int) -> GeneratorConfig:
    """The generator of this name, trained from this seed if it is trained."""
    config = GENERATORS[name]
    return config.with_training(seed=seed) if isinstance(config, NetworkGeneratorConfig) else config


def train_with_zero_pairs(editor: MeGEditor, config: NetworkGeneratorConfig) -> None:
    """Train a generator on the neurons and on zero ones, and put it in the editor's place.

    The zero neurons are for what the gate was calibrated to reject, moved beside edited queries.
    """
    edits = editor.edits
    generator = torch.Generator().manual_seed(config.training.seed)
    away = edits.held_out.negative(edits.conditions, generator)
    layout = editor.attached.layout
    zero = layout.unpack(torch.zeros(len(away), layout.dim))
    size, count = editor.config.collection.batch_size, len(edits.facts)
    answers = answers_with(editor.prompted, editor.attached, edits.facts, size)

    def edited_answers(neurons: Neurons, rows: Tensor) -> Tensor:
        right = torch.ones(len(rows), dtype=torch.bool)
        own = rows < count
        right[own] = answers(neurons[own.nonzero()[:, 0]], rows[own])
        return right

    made = build_generator(config, layout, editor.encoder.dim)
    conditions = torch.cat([edits.conditions, away])
    neurons = Neurons.cat([edits.neurons, zero])
    train_generator(
        made,
        conditions,
        neurons,
        edited_answers,
        rewording=edits.held_out.rewording,  # such queries are asked about by themselves
        progress=True,
    )
    editor.router.edits = dataclasses.replace(edits, generator=made)


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
        shares = {name: value and round(value, 3) for name, value in row["metrics"].items()}
        print(row["facts"], row["generator"], row["seed"], json.dumps(shares), flush=True)

    def usable(self) -> list[Fact]:
        most = self.arguments.locality
        facts = [
            dataclasses.replace(fact, locality=fact.locality[:most])
            for fact in read_facts(self.arguments.data, on_conflict="first")
        ]
        if not self.arguments.skip_known:
            return facts
        known = self.content.get("known")
        if known is None:
            editor = MeGEditor.for_model("smollm2")
            unknown = {fact.id for fact in editor.unknown(facts, progress=True)}
            known = self.content["known"] = [f.id for f in facts if f.id not in unknown]
        return [fact for fact in facts if fact.id not in set(known)]

    def edited(self, facts: Sequence[Fact], n: int, seed: int) -> MeGEditor:
        """The model with these facts edited, from --work if it is there."""
        options = self.arguments
        folder = options.work / f"{options.name}-{n}-{seed}"
        config = EditorConfig(
            encoder_tuning=EncoderTuningConfig(seed=seed),
            generator=of_seed("dit", seed),
            seed=seed,
        )
        if (folder / "meg.json").exists():
            saved = MeGEditor.from_pretrained(folder)
            wanted = dataclasses.replace(
                config,
                layer=default_layer(saved.model),
                template=PromptTemplate.for_model(saved.model),
                generator=saved.config.generator,
            )
            if saved.config != wanted or saved.facts != [*facts]:
                raise SystemExit(f"{folder} was edited otherwise; move it, or rename this study")
            return saved
        editor = MeGEditor.for_model("smollm2", config)
        tuning = [fact for path in options.tuning for fact in read_facts(path, on_conflict="first")]
        work = options.work / f".{folder.name}"
        editor.edit(facts, tuning_facts=tuning, work_folder=work, progress=True)
        editor.save_pretrained(folder)
        shutil.rmtree(work)
        return editor

    def run(self) -> None:
        options = self.arguments
        for seed in options.seeds:
            facts = self.usable()
            random.Random(seed).shuffle(facts)
            editor: MeGEditor | None = None
            for n in sorted(options.facts, reverse=True):
                if self.done(n, seed):
                    continue
                chosen = facts[:n]
                if not options.nested:
                    editor = self.edited(chosen, n, seed)
                elif editor is None:
                    most = max(options.facts)
                    editor = self.edited(facts[:most], most, seed)
                kept = {fact.id for fact in chosen}
                editor.remove([fact.id for fact in editor.facts if fact.id not in kept])
                self.measure(editor, facts[: options.asked], n, seed)

    def done(self, n: int, seed: int) -> bool:
        names = [*self.arguments.generators, *([ZERO_PAIRS] if self.arguments.zero_pairs else [])]
        return all(self.row(n=n, seed=seed, generator=name) for name in names)

    def measure(self, editor: MeGEditor, asked: Sequence[Fact], n: int, seed: int) -> None:
        options = self.arguments
        edited_n = max(options.facts) if options.nested else n
        evaluation = Evaluation(
            editor.prompted, asked[:edited_n], work_folder=options.work / ".base"
        )
        edited = Edited(editor, evaluation)
        with editor.serving():
            base = edited.base()
            ceiling = edited.ceiling()
        routing = edited.routing([*base])
        decisions = Decisions.of(edited, routing)
        accepted = dict(zip(base, routing.accepted.tolist(), strict=True))
        whole = n == edited_n
        own = editor.config.generator if whole else None
        shared = {
            "n": n,
            "seed": seed,
            "facts": len(editor.facts),
            "asked": sum(row >= 0 for row in edited.rows),
            "base": Metrics.of(base.values()).to_dict(),
            "collected": ceiling.to_dict(),
            "unlearnt": len(editor.edits.report.unlearnt),
            "seconds": dict(editor.edits.report.seconds) if whole else {},
            "protocol": evaluation.protocol(),
            "calibration": dataclasses.asdict(decisions.calibration),
            "requires_subject": editor.router.requires_subject,
            "perplexity": dataclasses.asdict(editor.perplexity(progress=True)),
            "paraphrases": taken_for(edited, [*base], routing),
        }
        strangers = about_others(base, editor.facts)
        others = {q: verdict for q, verdict in base.items() if q in strangers}
        for name in options.generators:
            if self.row(n=n, seed=seed, generator=name) is not None:
                continue
            config = of_seed(name, seed)
            if config != own:
                editor.replace_generator(config, progress=True)
                own = config
            steps = editor.edits.training.steps
            seconds = editor.edits.report.seconds["generator"]
            if name == DISTILLED:
                steps += editor.distill(steps=1, progress=True).steps
                seconds += editor.edits.report.seconds["distill"]
                own = None
            main = name == options.generators[0]
            with editor.serving():
                snapped = edited.ungated(snap=True, among=None if main else accepted.get)
                alone = edited.ungated(
                    snap=False, among=lambda q: has_own_neuron(q) and accepted[q]
                )
            row = shared | {
                "generator": name,
                "training_steps": steps,
                "training_seconds": seconds,
                "metrics": gated(snapped, base, accepted).to_dict(),
                "locality_about_others": {
                    "asked": len(others),
                    "ag": gated(snapped, others, accepted).locality_ag,
                },
                "without_snapping": gated(snapped | alone, base, accepted).to_dict(),
            }
            if main:
                row["gates"] = {
                    "similarity": without_names(edited, [*base]).row(snapped, base),
                    "similarity, subject named": decisions.row(snapped, base),
                }
                if options.gates:
                    row["gates"] |= compare_gates(edited, decisions, snapped, base)
            self.keep(row)
        if options.zero_pairs and self.row(n=n, seed=seed, generator=ZERO_PAIRS) is None:
            train_with_zero_pairs(editor, of_seed("dit", seed))
            with editor.serving():
                alone = edited.ungated(snap=False, among=accepted.get)
            metrics = gated(alone, base, accepted).to_dict()
            row = {"generator": ZERO_PAIRS, "metrics": metrics, "without_snapping": metrics}
            self.keep(shared | row | {"training_seconds": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="CounterFact or ZsRE JSON")
    parser.add_argument("--name", required=True, help="of the data, in the result's name")
    parser.add_argument(
        "--tuning", type=Path, nargs="+", required=True, help="files of other facts, to tune on"
    )
    parser.add_argument("--facts", type=int, nargs="+", default=[64], help="numbers of facts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--generators", nargs="+", choices=[*GENERATORS], default=["dit", "mlp", "bank"]
    )
    parser.add_argument("--nested", action="store_true", help="edit the largest number only")
    parser.add_argument("--gates", action="store_true", help="compare gates")
    parser.add_argument("--zero-pairs", action="store_true", help="train with zero neurons as well")
    parser.add_argument("--asked", type=int, help="ask about the first so many facts only")
    parser.add_argument("--locality", type=int, help="so many locality queries of each fact only")
    parser.add_argument("--skip-known", action="store_true", help="as `meg edit --skip-known`")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    Study(arguments).run()


if __name__ == "__main__":
    main()
