"""How many sampling steps a generator needs: the same trained network, sampled in more or fewer.

    meg demo --out build/demo
    meg distill build/demo --steps 2 --out build/demo-2
    python -m benchmarks.quality.steps build/demo --name demo --seeds 0 1 2 --students build/demo-2

For each number of steps and solver, every edited fact gets its generated neuron, without the gate,
and the model is asked the fact's query and paraphrases (Reliability and Generality, AG). With
snapping the generator is asked about the edited query for all of them, without it about each
wording's own condition. For each seed another generator is trained on the same neurons; only the
first is sampled in every way. Distances to the collected neurons are relative to those neurons'
spread around their mean: 1 is as far off as the mean neuron. The answer is the fewest steps whose
Reliability and Generality are both within half a point of 50 DDIM steps'. Students, distilled from
that generator, are asked in their own steps.

Writes benchmarks/results/steps-NAME.json, from which `python -m benchmarks.report` makes the table
and the plot of docs/results/quality.md. Rows that are in it already are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import operator
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.conftest import version_of
from meg_kernels import MeGEditor
from meg_kernels.diffusion import SamplerConfig
from meg_kernels.editing.evaluate import Evaluation
from meg_kernels.routing.generators import DiTGenerator
from meg_kernels.storage import write_json

RESULTS = Path(__file__).parents[1] / "results"
REFERENCE = SamplerConfig("ddim", 50)
SAMPLERS = [
    REFERENCE,
    *(SamplerConfig("ddim", steps) for steps in (1, 2, 4, 8)),
    SamplerConfig("dpmsolver++", 4),
]
RELEASED = SamplerConfig("ddpm", 50, "respaced")
AGAIN = [REFERENCE, *(SamplerConfig("ddim", steps) for steps in (1, 2))]  # of other seeds
WITHIN = 0.005
STUDENT = ", distilled"  # after the solver's name


def label(sampler: SamplerConfig, snap: bool) -> str:
    """
    >>> label(SamplerConfig("ddim", 4), snap=True)
    'ddim-4-snap'
    """
    return f"{sampler.solver}-{sampler.num_steps}" + ("-snap" if snap else "")


class Study:
    """An edited model, asked with its generator's neurons in one way after the other."""

    def __init__(self, editor: MeGEditor):
        generator = editor.edits.generator
        if not isinstance(generator, DiTGenerator):
            raise SystemExit("the generator of this edited model takes no steps: it is no DiT")
        self.editor, self.edits, self.generator = editor, editor.edits, generator
        self.trained = generator.config
        self.evaluation = Evaluation(editor.prompted, self.edits.facts)

    def samplers(self) -> list[SamplerConfig]:
        """In which it is sampled; one that learnt a variance also as the paper's authors do."""
        learnt = self.generator.network.learns_variance
        return [*SAMPLERS, *([RELEASED] if learnt else [])]

    def of_seed(self, seed: int) -> Study:
        """The same with a generator that is trained from another seed."""
        self.editor.replace_generator(self.trained.with_training(seed=seed), progress=True)
        return Study(self.editor)

    def measure(self, sampler: SamplerConfig, snap: bool) -> dict[str, Any]:
        """One row of the table."""
        self.generator.config = dataclasses.replace(self.trained, sampler=sampler)
        own = self.generator.generate(self.edits.conditions)

        def mounting(queries, owners):
            if snap:
                return self.editor.attached.neurons(own, torch.tensor(owners))
            z = self.editor.encoder.encode(queries).to(self.edits.conditions.device)
            return self.editor.attached.neurons(self.generator.generate(z))

        metrics = self.evaluation.collected(mounting)
        return {
            "solver": sampler.solver,
            "steps": sampler.num_steps,
            "snap": snap,
            "seed": self.trained.training.seed,
            "reliability": metrics.reliability_ag,
            "generality": metrics.generality_ag,
            "distance": self.distance(self.flat(own)),
        }

    def ceiling(self) -> dict[str, Any]:
        """The same with each fact's collected neuron."""
        metrics = self.evaluation.collected(
            lambda queries, owners: self.editor.attached.neurons(
                self.edits.neurons, torch.tensor(owners)
            )
        )
        return {"reliability": metrics.reliability_ag, "generality": metrics.generality_ag}

    def flat(self, neurons) -> Tensor:
        return self.generator.layout.pack(neurons).cpu()

    def distance(self, flat: Tensor) -> float:
        collected = self.flat(self.edits.neurons)
        spread = (collected - collected.mean(0)).norm(dim=1).mean()
        return float((flat - collected).norm(dim=1).mean() / spread)


def means(rows: list[dict[str, Any]], snap: bool) -> dict[tuple[str, int], dict[str, float]]:
    """The means over the seeds, by solver and number of steps, and how many seeds there are.

    >>> row = {"solver": "ddim", "steps": 2, "snap": True, "distance": 0.2, "reliability": 1.0}
    >>> rows = [{**row, "generality": 0.9}, {**row, "generality": 1.0}]
    >>> means(rows, snap=True)["ddim", 2]["generality"]
    0.95
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["snap"] == snap:
            groups.setdefault((row["solver"], row["steps"]), []).append(row)
    return {
        key: {
            name: statistics.fmean(row[name] for row in group)
            for name in ("distance", "reliability", "generality")
        }
        | {"seeds": len(group)}
        for key, group in sorted(groups.items())
    }


def fewest(rows: list[dict[str, Any]], snap: bool) -> int | None:
    """The fewest steps of any solver that answer within half a point of the reference.

    >>> row = {"solver": "ddim", "snap": True, "reliability": 1.0, "generality": 0.9}
    >>> row |= {"distance": 0.2}
    >>> rows = [{**row, "steps": 50}, {**row, "steps": 2, "generality": 0.89}, {**row, "steps": 4}]
    >>> fewest(rows, snap=True)
    4
    """
    every = means(rows, snap)
    if (full := every.get((REFERENCE.solver, REFERENCE.num_steps))) is None:
        return None
    return min(
        steps
        for (solver, steps), mean in every.items()
        if not solver.endswith(STUDENT)
        and mean["reliability"] >= full["reliability"] - WITHIN
        and mean["generality"] >= full["generality"] - WITHIN
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what `meg edit` or `meg demo --out` saved")
    parser.add_argument("--name", required=True, help="of the data, in the result's name")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="besides the folder's own")
    parser.add_argument("--students", type=Path, nargs="*", default=[], help="folders as well")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    path = RESULTS / f"steps-{arguments.name}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    study = Study(MeGEditor.from_pretrained(arguments.folder, device=arguments.device))
    content |= {
        "study": "steps",
        "data": arguments.name,
        "facts": len(study.edits.facts),
        "generator": study.trained.to_dict(),
        "trained_steps": study.edits.report.training.steps,
        "protocol": study.evaluation.protocol(),
        "versions": {name: version_of(name) for name in ("torch", "transformers")},
    }
    done = {(row["seed"], row["solver"], row["steps"], row["snap"]) for row in content["rows"]}
    with study.editor.serving():
        content["collected"] = content.get("collected") or study.ceiling()
    own = study.trained.seed
    for seed in (own, *(seed for seed in arguments.seeds if seed != own)):
        todo = [
            (sampler, snap)
            for sampler in (study.samplers() if seed == own else AGAIN)
            for snap in (True, False)
            if (seed, sampler.solver, sampler.num_steps, snap) not in done
        ]
        if todo and seed != own:
            study = study.of_seed(seed)
        with study.editor.serving():
            for sampler, snap in (bar := tqdm(todo, desc=f"seed {seed}", unit="row")):
                bar.set_postfix_str(label(sampler, snap))
                content["rows"].append(study.measure(sampler, snap))
                write_json(path, content)
    study.editor.detach()
    for folder in arguments.students:
        student = Study(MeGEditor.from_pretrained(folder, device=arguments.device))
        with student.editor.serving():
            for snap in (True, False):
                row = student.measure(student.trained.sampler, snap)
                row["solver"] += STUDENT
                key = operator.itemgetter("seed", "solver", "steps", "snap")
                others = [other for other in content["rows"] if key(other) != key(row)]
                content["rows"] = [*others, row]
                write_json(path, content)
    for snap in (True, False):
        content["fewest" + ("_snap" if snap else "")] = fewest(content["rows"], snap)
    write_json(path, content)
    print(json.dumps(content["rows"], indent=1))


if __name__ == "__main__":
    main()
