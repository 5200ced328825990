"""Neurons of facts that were never fitted: how many answer, by the facts that were.

    python -m benchmarks.quality.hypernetwork --data ../shared/data --work build/hypernetwork

CounterFact facts are fitted, none of them predicted. From the first 128, 256, ... of them a
hypernetwork learns, which then predicts the neurons of 128 facts that it never saw. These are
asked in each context, with no step of SGD; and in the template their paraphrases are, beside the
same facts' fitted neurons. So are ZsRE's facts, with CounterFact's hypernetwork, and the other way
round. Beside it: the same regression given the gradient of the loss at the initial neuron as well,
in two contexts; an MLP and a DiT, given query and answer.

Then the same facts are collected both ways, with a hypernetwork and without, in turns.

Writes benchmarks/results/hypernetwork.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.kept import kept
from meg_kernels import Fact, GeneratorConfig, MeGEditor
from meg_kernels.editing.answered import answers_with
from meg_kernels.editing.collect import (
    Foresight,
    collect,
    collectable,
    fit_neurons,
)
from meg_kernels.editing.contexts import Context
from meg_kernels.editing.hypernetwork import known_answers
from meg_kernels.editing.neuron_fit import SURE
from meg_kernels.editing.train import train_generator
from meg_kernels.editing.trial import TRIED_AT_ONCE
from meg_kernels.facts import read_facts
from meg_kernels.neuron import Neurons
from meg_kernels.nn import LowerLayers
from meg_kernels.pretrained import SMOLLM2
from meg_kernels.routing.generators import Generator, NetworkGeneratorConfig, build_generator
from meg_kernels.routing.ridge import said, scaled
from meg_kernels.storage import write_json

RESULT = Path(__file__).parents[1] / "results" / "hypernetwork.json"
NEW = 128  # facts that are never fitted but to compare with
TIMED = 256  # facts that are collected both ways
TURNS = 2
SPREAD = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles of the facts' margins
GRADIENT = 576.0  # squared length of a fact's gradient in one context, beside what the fact says
NETWORKS = {"mlp": GeneratorConfig.mlp, "dit": GeneratorConfig.dit}


def drawn(path: Path, count: int) -> list[Fact]:
    """So many facts, and those that are never fitted first; with paraphrases, where there are."""
    facts = read_facts(path, on_conflict="first")
    random.Random(0).shuffle(facts)
    new = [fact for fact in facts if fact.paraphrases][:NEW]
    taken = {fact.id for fact in new}
    return new + [fact for fact in facts if fact.id not in taken][:count]


def one_of_each_form(contexts: Sequence[Context]) -> list[int]:
    """The numbers of the first context of each form: what might be enough to try."""
    first: dict[str, int] = {}
    for number, context in enumerate(contexts):
        first.setdefault(context.form, number)
    return [*first.values()]


def slips(looked_at: Tensor, right: Tensor, least: float) -> dict[str, float]:
    """What would slip through if some contexts alone were looked at.

    Args:
        looked_at: [F, some] margins in these contexts.
        right: [F, contexts] whether each fact is answered in each context.
        least: margin in nats from which on a fact counts as answered everywhere.
    """
    taken = looked_at.amin(1) >= least
    wrong = taken & (right.amin(1) == 0)
    return {
        "least": least,
        "taken": taken.double().mean().item(),
        "wrong": wrong.double().mean().item(),
    }


class New:
    """Facts that are asked with neurons that were not fitted for them.

    Args:
        editor: of the language model.
        facts: with paraphrases.
    """

    def __init__(self, editor: MeGEditor, facts: Sequence[Fact]):
        self.editor, self.facts = editor, facts
        config = editor.config.collection
        self.contexts = config.contexts_of(editor.tokenizer)
        self.targets = editor.prompted.targets(facts, self.contexts)
        pairs = [(i, text) for i, fact in enumerate(facts) for text in fact.paraphrases]
        self.owners = torch.tensor([i for i, _ in pairs])
        asked = [
            Fact(text, facts[i].answer, f"paraphrase {n}") for n, (i, text) in enumerate(pairs)
        ]
        self.paraphrases = answers_with(editor.prompted, editor.attached, asked, config.batch_size)

    @torch.no_grad()
    def margins(self, neurons: Neurons) -> Tensor:
        """[F, contexts] by how much each fact's answer is ahead in each context, in nats."""
        prompted, found = self.editor.prompted, []
        for rows in torch.arange(len(self.facts)).split(16):
            each = []
            for context in range(len(self.contexts)):
                batch = prompted.batch([self.targets[row][context] for row in rows.tolist()])
                with self.editor.attached.neurons(neurons[rows]):
                    each.append(prompted.score(batch, with_margins=True).margins)
            found.append(torch.stack(each, 1))
        return torch.cat(found)

    def shares(self, neurons: Neurons) -> dict[str, Any]:
        """Shares of the facts that are answered, and of their paraphrases in the template."""
        margins = self.margins(neurons)
        least = margins.amin(1).double()  # over the contexts
        right = (margins > 0).double()
        names = [context.name for context in self.contexts]
        tried = one_of_each_form(self.contexts)
        paraphrased = self.paraphrases(neurons[self.owners], torch.arange(len(self.owners)))
        return {
            "answered": dict(zip(names, right.mean(0).tolist(), strict=True)),
            "in_all": right.amin(1).mean().item(),
            "surely_in_all": (least >= SURE).double().mean().item(),
            "margins": {str(q): least.quantile(q).item() for q in SPREAD},
            "paraphrases": paraphrased.double().mean().item(),
            "tried": [slips(margins[:, tried], right, least) for least in (0.0, SURE)],
        }


class Learnt:
    """Facts whose neurons were collected, from which generators learn; and what facts say.

    Args:
        editor: of the language model.
        facts: that are collected.
        work: keeps what was collected.
    """

    def __init__(self, editor: MeGEditor, facts: Sequence[Fact], work: Path):
        self.editor, self.facts = editor, facts
        config = dataclasses.replace(editor.config.collection, pilot=None)
        targets = collectable(editor.prompted, editor.attached, facts, config)
        self.said = self.says(facts)
        self.collection = fit_neurons(
            editor.prompted,
            editor.attached,
            targets,
            config,
            work_folder=work,
            progress=True,
        )

    def says(self, facts: Sequence[Fact]) -> Tensor:
        """[N, features] what facts say."""
        encoder = self.editor.router.encoder
        conditions = encoder.encode([fact.query for fact in facts]).cpu()
        return said(conditions, known_answers(self.editor.prompted, encoder, facts))

    def gradients(self, facts: Sequence[Fact]) -> Tensor:
        """[N, features] the gradients of facts' losses at the initial neuron, in two contexts."""
        prompted, attached = self.editor.prompted, self.editor.attached
        contexts = self.editor.config.collection.contexts_of(self.editor.tokenizer)
        start, found = attached.layout.pack(self.collection.initial), []
        for context in (contexts[0], contexts[-1]):
            lower, each = LowerLayers(prompted.model, attached.layer), []
            targets = prompted.targets(facts, [context])
            for rows in torch.arange(len(facts)).split(16):
                batch = prompted.batch([targets[row][0] for row in rows.tolist()])
                flat = start.repeat(len(rows), 1).requires_grad_()
                hidden = lower.run(**batch.inputs)
                mounted = attached.neurons(attached.layout.unpack(flat))
                with torch.enable_grad(), lower.replaced_by(hidden), mounted:
                    loss = prompted.score(batch).losses.sum()
                each += torch.autograd.grad(loss, flat)
            found.append(scaled(torch.cat(each), GRADIENT))
        return torch.cat(found, 1)

    def pilot(self, facts: int) -> list[int]:
        """Those of the first facts that were learnt."""
        return self.collection.learnt[:facts].nonzero()[:, 0].tolist()

    def told(self, new: Tensor, facts: int, known: Tensor | None = None) -> Neurons:
        """The neurons of facts that say what `new` does, as the first ones of these tell them.

        Args:
            new: [N, features].
            facts: how many of these.
            known: [M, features] of these, in the place of what they say.
        """
        rows = self.pilot(facts)
        foresight = Foresight(self.said if known is None else known)
        return foresight.learnt(rows, self.collection.neurons[rows]).generate(new)

    def trained(self, config: NetworkGeneratorConfig, facts: int) -> Generator:
        """A network that learnt from the first ones of these, given query and answer."""
        rows, prompted = self.pilot(facts), self.editor.prompted
        asked = [self.facts[row] for row in rows]
        config = dataclasses.replace(config, with_answers=True)
        made = build_generator(config, self.editor.attached.layout, self.said.shape[1])
        answers = answers_with(prompted, self.editor.attached, asked, TRIED_AT_ONCE)
        train_generator(made, self.said[rows], self.collection.neurons[rows], answers)
        return made


def by_pilot(
    editor: MeGEditor,
    facts: list[Fact],
    pilots: Sequence[int],
    networks: Sequence[int],
    work: Path,
) -> Any:
    """What generators that learnt from so many facts tell of new ones.

    Args:
        editor: of the language model.
        facts: the new ones first.
        pilots: numbers of facts that are learnt from.
        networks: those of them that networks learn from as well.
        work: keeps what was collected.
    """
    new, learnt = facts[:NEW], Learnt(editor, facts[NEW:], work)
    asked, rows = New(editor, new), []
    says = learnt.says(new)
    started = time.perf_counter()
    gradients = learnt.gradients(new)
    gradient_seconds = (time.perf_counter() - started) / len(new)
    with_gradients = torch.cat([learnt.said, learnt.gradients(learnt.facts)], 1)
    for pilot in (each for each in pilots if each <= len(learnt.said)):
        started = time.perf_counter()
        neurons = learnt.told(says, pilot)
        seconds = time.perf_counter() - started
        row = {"pilot": pilot, "fitted_in": seconds}
        row |= asked.shares(neurons)
        started = time.perf_counter()
        neurons = learnt.told(torch.cat([says, gradients], 1), pilot, with_gradients)
        seconds = time.perf_counter() - started
        shares = asked.shares(neurons)
        others = {"hypernetwork with gradients": {"fitted_in": seconds, **shares}}
        for kind in NETWORKS if pilot in networks else ():
            started = time.perf_counter()
            made = learnt.trained(NETWORKS[kind](), pilot)
            seconds = time.perf_counter() - started
            others[kind] = {"fitted_in": seconds, **asked.shares(made.generate(says))}
        rows.append({**row, "others": others})
        print(json.dumps(rows[-1]), flush=True)
    config = dataclasses.replace(editor.config.collection, pilot=None)
    fitted = collect(editor.prompted, editor.attached, new, config)
    collection = learnt.collection
    return {
        "facts": len(learnt.said),
        "learnt": int(collection.learnt.sum()),
        "steps": collection.steps.double().mean().item(),
        "gradient_seconds": gradient_seconds,
        "by_pilot": rows,
        "fitted": asked.shares(fitted.neurons),
    }


def across(editor: MeGEditor, sets: dict[str, list[Fact]], work: Path) -> list[dict[str, Any]]:
    """What a hypernetwork of one set of facts tells of new facts of another.

    Args:
        editor: of the language model.
        sets: facts by their names, the new ones first.
        work: keeps what was collected.
    """
    rows = []
    for one, facts in sets.items():
        learnt = Learnt(editor, facts[NEW:], work)
        for other in sets:
            new = sets[other][:NEW]
            neurons = learnt.told(learnt.says(new), len(learnt.said))
            shares = New(editor, new).shares(neurons)
            rows.append({"from": one, "pilot": len(learnt.said), "to": other, **shares})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def in_turns(editor: MeGEditor, facts: list[Fact]) -> dict[str, Any]:
    """The same facts collected with a hypernetwork and without, one after the other."""
    config = editor.config.collection
    ways = {"without": (dataclasses.replace(config, pilot=None), None)}
    ways["with"] = (config, editor.router.encoder)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, (chosen, encoder) in ways.items():
            started = time.perf_counter()
            collect(editor.prompted, editor.attached, facts, chosen, encoder=encoder)
            took[name].append((time.perf_counter() - started) / len(facts))
            print(name, took[name][-1], flush=True)
    seconds = {f"seconds_{name}": median(times) for name, times in took.items()}
    return {"facts": len(facts), "threads": torch.get_num_threads(), **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="keeps what was collected")
    parser.add_argument("--facts", type=int, default=2048, help="that are collected")
    parser.add_argument(
        "--networks", type=int, nargs="*", default=[1024], help="facts that networks learn from"
    )
    parser.add_argument("--no-turns", action="store_true", help="do not collect both ways")
    options = parser.parse_args()
    editor = MeGEditor.for_model(SMOLLM2)
    facts = drawn(options.data / "counterfact_10k.json", options.facts)
    pilots = [128 * 2**i for i in range(7)]
    content = kept(RESULT, "hypernetwork") | {"data": "CounterFact"}
    content |= by_pilot(editor, facts, pilots, options.networks, options.work)
    content["rows"] = content.pop("by_pilot")
    write_json(RESULT, content)
    zsre = drawn(options.data / "zsre_1000.json", options.facts)
    sets = {"CounterFact": facts, "ZsRE": zsre}
    content["across"] = across(editor, sets, options.work)
    write_json(RESULT, content)
    if not options.no_turns:
        content["turns"] = in_turns(editor, facts[NEW : NEW + TIMED])
        write_json(RESULT, content)


if __name__ == "__main__":
    main()
