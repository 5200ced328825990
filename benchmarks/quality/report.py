"""The tables and plots of docs/results/quality.md: see benchmarks/report.py.

Each function takes all studies, by name, and the folder for its plots; it returns Markdown, empty
where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality.steps import means
from meg_kernels.cli.plots import plot_layers
from meg_kernels.editing.layers import LayerComparison, LayerQuality

Record = Mapping[str, Any]
Studies = Mapping[str, Sequence[Record]]
OURS = "MeG, ours"
FEWEST_TRADED = 256  # facts: with so few, hardly any threshold trades one metric for another


def markdown(title: str, rows: Sequence[Mapping[str, str]]) -> str:
    """A table with the columns of all rows, in the order in which they first appear.

    >>> print(markdown("t", [{"a": "1"}, {"a": "2", "b": "3"}]))
    **t**
    <BLANKLINE>
    | a | b |
    | --- | --- |
    | 1 |  |
    | 2 | 3 |
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(name, "") for name in columns] for row in rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


@contextmanager
def figure(path: Path, title: str) -> Iterator[Any]:
    """Axes to draw on, saved at `path` if anything was drawn."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    try:
        yield axes
        if axes.has_data():
            axes.set_title(title)
            axes.spines[["top", "right"]].set_visible(False)
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path, dpi=110)
        else:
            path.unlink(missing_ok=True)
    finally:
        pyplot.close(drawn)


def image(path: Path) -> str:
    """A link from a page to a plot in the folder beside it, if the plot was drawn."""
    return f"![{path.stem}]({path.parent.name}/{path.name})" if path.exists() else ""


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def spread(values: Sequence[float | None]) -> str:
    """The mean of some runs, and how far the outermost ones are apart.

    >>> spread([0.95]), spread([0.9, 1.0]), spread([None])
    ('0.950', '0.950 (0.900 to 1.000)', '–')
    """
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    ends = f" ({min(known):.3f} to {max(known):.3f})" if min(known) < max(known) else ""
    return f"{fmean(known):.3f}{ends}"


def six(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """The cells of the six metrics and the Score, AG / TF."""
    cells = {}
    for kind in ("reliability", "generality", "locality"):
        both = [share(metrics[f"{kind}_{setting}"]) for setting in ("ag", "tf")]
        cells[f"{kind.capitalize()} AG / TF"] = " / ".join(both)
    return cells | {"Score": share(metrics["score"])}


# ---- sampling steps ---------------------------------------------------------------------------


def steps(studies: Studies, plots: Path) -> str:
    found = studies["steps"]
    if not found:
        return ""
    path = plots / "steps.png"
    with figure(path, "the same generator, sampled in more or fewer steps") as axes:
        plot_steps(found, axes)
    return paragraphs(*map(steps_table, found), image(path))


def steps_table(study: Record) -> str:
    """One line for each solver and step count of benchmarks.quality.steps."""
    rows = []
    alone = means(study["rows"], snap=False)
    for (solver, count), mean in means(study["rows"], snap=True).items():
        rows.append(
            {
                "solver": solver,
                "steps": str(count),
                "seeds": str(mean["seeds"]),
                "distance": share(mean["distance"]),
                "Reliability": share(mean["reliability"]),
                "Generality": share(mean["generality"]),
                "without snapping": share(alone[solver, count]["generality"]),
            }
        )
    ceiling = study["collected"]
    shares = {name.capitalize(): share(ceiling[name]) for name in ("reliability", "generality")}
    rows.append({"solver": "collected neurons", "distance": "0", **shares})
    return markdown(f"{study['data']}, {study['facts']} facts", rows)


def plot_steps(found: Sequence[Record], axes: Any) -> None:
    """Generality against the number of steps, on each data set, with and without snapping."""
    for study, color in zip(found, ("C0", "C1", "C2", "C3"), strict=False):
        for snap, style in ((True, "-"), (False, "--")):
            points = {
                count: mean["generality"]
                for (solver, count), mean in means(study["rows"], snap).items()
                if solver == "ddim"
            }
            label = study["data"] + ("" if snap else ", without snapping")
            axes.plot([*points], [*points.values()], style, color=color, marker="o", label=label)
        axes.axhline(study["collected"]["generality"], color=color, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="DDIM steps", ylabel="Generality AG (dotted: collected neurons)")
    axes.set_xticks([1, 2, 4, 8, 16, 50], ["1", "2", "4", "8", "16", "50"])
    axes.minorticks_off()
    axes.legend(fontsize=8)


# ---- numbers of facts, generators, gates ------------------------------------------------------


def quality(studies: Studies, plots: Path) -> str:
    found = [study for study in studies["quality"] if study["rows"]]
    if not found:
        return ""
    scale, trade_off = plots / "number-of-facts.png", plots / "trade-off.png"
    with figure(scale, "more and more facts in one model") as axes:
        plot_numbers(found, axes)
    with figure(trade_off, "thresholds of the gates") as axes:
        plot_trade_offs(found, axes)
    return paragraphs(
        *map(quality_table, found),
        image(scale),
        paraphrases_table(found),
        gates_table(found),
        image(trade_off),
        ability_table(found),
    )


def quality_table(study: Record) -> str:
    """One line for each number of facts and generator of benchmarks.quality.study."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for row in study["rows"]:
        groups.setdefault((row["facts"], row["generator"]), []).append(row)
    lines = []
    # The default generator first, then those whose names begin like it.
    for (n, generator), rows in sorted(
        groups.items(), key=lambda item: (item[0][0], not item[0][1].startswith("dit"), item[0][1])
    ):

        def mean(of: str, name: str, rows: list[Record] = rows) -> str:
            return spread([row[of][name] for row in rows])

        line = {
            "facts": str(n),
            "asked about": str(rows[0]["asked"]),
            "generator": generator,
            "seeds": str(len(rows)),
            "Reliability": mean("metrics", "reliability_ag"),
            "Generality": mean("metrics", "generality_ag"),
            "Locality": mean("metrics", "locality_ag"),
            "Locality, other subjects": spread(
                [row.get("locality_about_others", {}).get("ag") for row in rows]
            ),
            "Score": mean("metrics", "score"),
            "Generality, collected": mean("collected", "generality_ag"),
            "Generality, without snapping": mean("without_snapping", "generality_ag"),
            "edited in": edited_in(rows),
        }
        lines.append(line)
    return markdown(study["data"], lines)


def edited_in(rows: Sequence[Record]) -> str:
    """Mean seconds of all stages, where a model was edited for these rows."""
    if not all(row["seconds"] and row["training_seconds"] is not None for row in rows):
        return "–"
    stages = ("collect", "encoder", "gate")
    whole = [sum(row["seconds"][s] for s in stages) + row["training_seconds"] for row in rows]
    return f"{fmean(whole):.0f} s"


def gates_table(found: Sequence[Record]) -> str:
    """One line for each gate where more than one was compared."""
    lines = [
        {
            "data": study["data"],
            "facts": str(row["facts"]),
            "gate": name,
            "AUROC, held out": share(gate["calibration"]["auroc"]) if name != "both" else "–",
            **six(gate["metrics"]),
        }
        for study, row, gates in having("gates", found)
        if len(gates) > 1
        for name, gate in gates.items()
    ]
    return markdown("gates, on the same answers", lines) if lines else ""


def paraphrases_table(found: Sequence[Record]) -> str:
    """What the gate took paraphrases for, for each number of facts."""
    lines = [
        {
            "data": study["data"],
            "facts": str(row["facts"]),
            "paraphrases": str(taken["asked"]),
            "taken for their own fact": str(taken["own"]),
            "for another fact about the same subject": str(taken["same_subject"]),
            "for one about another subject": str(taken["another"]),
            "for none": str(taken["none"]),
        }
        for study, row, taken in having("paraphrases", found)
    ]
    return markdown("what paraphrases are taken for", lines) if lines else ""


def having(name: str, found: Sequence[Record]) -> Iterator[tuple[Record, Record, Any]]:
    """Study, row and `row[name]` of the rows that have it, those of the fewest facts first.

    Of the default generator and the first seed alone.
    """
    for study in found:
        for row in sorted(study["rows"], key=lambda row: row["facts"]):
            if row["generator"] == "dit" and row["seed"] == 0 and name in row:
                yield study, row, row[name]


def ability_table(found: Sequence[Record]) -> str:
    """Perplexity before and after the edits, for each number of facts."""
    lines = [
        {
            "data": study["data"],
            "facts": str(row["facts"]),
            "passages": str(read["passages"]),
            "taken for an edited query": str(read["accepted"]),
            "perplexity, base model": f"{read['base']:.3f}",
            "perplexity, edited": f"{read['edited']:.3f}",
        }
        for study, row, read in having("perplexity", found)
    ]
    return markdown("text that has nothing to do with the edits", lines) if lines else ""


def ability(studies: Studies, plots: Path) -> str:
    """Base and edited model on tasks of lm-evaluation-harness."""
    tables = []
    for study in studies["ability"]:
        lines = [
            {
                "task": score["task"],
                "metric": score["metric"],
                "base model": with_error(score["base"], score["stderr"]),
                "edited": share(score["edited"]),
                "taken for an edited query": f"{study['accepted']} of {study['contexts']}",
            }
            for score in study["scores"]
        ]
        title = f"{study['questions']} questions, {study['facts']} facts of {study['data']} edited"
        tables.append(markdown(title, lines))
    return paragraphs(*tables)


def with_error(value: float, stderr: float | None) -> str:
    """
    >>> with_error(0.25, 0.0137), with_error(0.25, None)
    ('0.250 ± 0.014', '0.250')
    """
    return share(value) + ("" if stderr is None else f" ± {stderr:.3f}")


def plot_numbers(found: Sequence[Record], axes: Any) -> None:
    """Each metric against the number of facts, for each data set's first generator."""
    mains = {
        study["data"]: [row for row in study["rows"] if row["generator"] == "dit"]
        for study in found
    }
    several = {data: rows for data, rows in mains.items() if len({r["facts"] for r in rows}) > 1}
    for (data, main), style in zip(several.items(), ("-", "--", ":", "-."), strict=False):
        numbers = sorted({row["facts"] for row in main})
        for color, name in enumerate(("reliability_ag", "generality_ag", "locality_ag")):
            shares = [
                fmean(row["metrics"][name] for row in main if row["facts"] == n) for n in numbers
            ]
            label = f"{name.removesuffix('_ag').capitalize()}, {data}"
            axes.plot(numbers, shares, style, color=f"C{color}", marker="o", label=label)
        ceiling = [
            fmean(row["collected"]["generality_ag"] for row in main if row["facts"] == n)
            for n in numbers
        ]
        axes.plot(numbers, ceiling, style, color="0.6", label=f"collected, {data}")
    if axes.has_data():
        axes.set(xscale="log", xlabel="edited facts", ylabel="AG (grey: Generality of collected)")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))


def plot_trade_offs(found: Sequence[Record], axes: Any) -> None:
    """Generality against Locality over the gates' thresholds, with the calibrated ones marked."""
    rows = [
        (f"{study['data']}, {row['facts']} facts", gates)
        for study, row, gates in having("gates", found)
        if row["facts"] > FEWEST_TRADED
    ]
    styles = {"similarity": "-", "similarity, subject named": "-.", "familiarity": "--"}
    for number, (label, gates) in enumerate(rows):
        color = f"C{number}"
        for name, gate in gates.items():
            points = [(point["locality_ag"], point["generality_ag"]) for point in gate["curve"]]
            own = label if len(gates) == 1 else f"{label}, {name}"
            axes.plot(*zip(*points, strict=True), styles.get(name, ":"), color=color, label=own)
            chosen = gate["metrics"]
            axes.plot(chosen["locality_ag"], chosen["generality_ag"], "o", color=color)
    ylabel = "Generality AG (dots: the calibrated thresholds)"
    axes.set(xlabel="Locality AG", ylabel=ylabel, xlim=(0.8, 1.005), ylim=(0.5, 1.01))
    axes.legend(fontsize=7)


# ---- other methods ----------------------------------------------------------------------------


def baselines(studies: Studies, plots: Path) -> str:
    """Tables like the paper's Table 1: other methods and ours on the same facts."""
    tables = []
    for study in studies["quality-baselines"]:
        if study["data"] == "search":
            continue
        asked = str(study["asked"])
        lines = [{"method": "base model", "asked about": asked, **six(study["base"])}]
        for row in study["rows"]:
            name = row["baseline"].replace("_", " ")
            line = {"method": name, "asked about": asked, **six(row["metrics"])}
            lines.append(line | {"edited in": f"{row['seconds']:.0f} s"})
        for other in studies["quality"]:
            for row in other["rows"]:
                same = other["data"] == study["data"] and row["facts"] == study["facts"]
                if same and not row["seed"]:
                    name = f"{OURS} ({row['generator']})"
                    line = {"method": name, "asked about": str(row["asked"]), **six(row["metrics"])}
                    lines.append(line | {"edited in": edited_in([row])})
        tables.append(markdown(f"{study['data']}, {study['facts']} facts", lines))
    return paragraphs(*tables)


# ---- training, encoder, layers, the life of edits ---------------------------------------------


def convergence(studies: Studies, plots: Path) -> str:
    """Seconds and steps until enough is answered, by choice and number of facts."""
    tables = []
    for study in studies["convergence"]:
        rows: dict[str, dict[str, str]] = {}
        for row in sorted(study["rows"], key=lambda row: row["n"]):
            cells = rows.setdefault(row["choice"], {"choice": row["choice"]})
            cells["parameters"] = f"{row['parameters'] / 1e6:.1f} M"
            cells[f"{row['n']} facts"] = (
                f"{row['seconds']:.0f} s, {row['steps']} steps"
                if row["seconds"] is not None
                else f"not in {row['history'][-1]['step']} steps ({row['answered']:.0%})"
            )
        path = plots / f"convergence-{study['data']}.png"
        with figure(path, f"seconds until {study['wanted']:.0%} are answered") as axes:
            plot_convergence(study, axes)
        title = f"{study['data']}: until {study['wanted']:.0%} are answered"
        tables += [markdown(title, [*rows.values()]), image(path)]
    return paragraphs(*tables)


def plot_convergence(study: Record, axes: Any) -> None:
    choices = dict.fromkeys(row["choice"] for row in study["rows"])
    for choice in choices:
        points = sorted(
            (row["n"], row["seconds"])
            for row in study["rows"]
            if row["choice"] == choice and row["seconds"] is not None
        )
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=choice)
    if axes.has_data():
        threads = study["threads"]
        ylabel = f"seconds on {threads} thread{'s' * (threads > 1)}"
        axes.set(xscale="log", yscale="log", xlabel="facts", ylabel=ylabel)
        axes.legend(fontsize=7)


def encoder(studies: Studies, plots: Path) -> str:
    """What each choice of tuning is worth."""
    tables = []
    for study in studies["encoder"]:
        lines = [
            {
                "choice": row["choice"],
                "tuned on": f"{row['tuning_facts']} facts",
                "seconds": f"{row['seconds']:.0f}",
                "nearest is the right fact": share(row["retrieved"]),
                "paraphrases accepted for it": share(row["accepted"]),
                "locality queries rejected": share(row["rejected"]),
                "AUROC": share(row["auroc"]),
            }
            for row in study["rows"]
        ]
        tables.append(markdown(f"{study['data']}, {study['facts']} facts", lines))
    return paragraphs(*tables)


def gate(studies: Studies, plots: Path) -> str:
    """What the gate makes of people's questions, tuned on the package's facts alone."""
    asked, changed, placed = [], [], []
    for row in (row for study in studies["gate"] for row in study["rows"]):
        name = {"data": row["data"], "encoder": row["encoder"], "facts": str(row["facts"])}
        calibration, plain = row["calibration"], row["without_names"]
        asked.append(
            name
            | {
                "own queries": share(row["own"]),
                "paraphrases": share(row["paraphrases"]),
                "calibrated": share(calibration["acceptance"]),
                "locality": share(row["locality"]),
                "no names: paraphrases": share(plain["paraphrases"]),
                "no names: locality": share(plain["locality"]),
                "yes, no": "" if row["yes_no"] is None else share(row["yes_no"]),
                "conversations": share(row["conversations"]),
                "seconds": f"{row['seconds']:.0f}",
            }
        )
        changed.append(name | {kind: share(found) for kind, found in row["misspelt"].items()})
        if row["documents"]:
            placed.append(name | {where: share(f) for where, f in row["documents"].items()})
    if not asked:
        return ""
    return paragraphs(
        markdown("Taken for their fact, and left alone", asked),
        markdown("Misspelt, as a share of what is found when spelt right", changed),
        markdown("Found in so many tokens of other text, at its start, middle and end", placed),
    )


SYSTEMS = {"neuron": "MeG", "prompt": "in the prompt", "stored": "stored answer"}


def talk(studies: Studies, plots: Path) -> str:
    """Edits in conversations, beside the fact in the prompt and the stored answer."""
    parts, costs = [], []
    for found in (found for study in studies["talk"] for found in study["sets"]):
        lines = []
        for row in sorted(
            found["rows"], key=lambda row: (row["context"], [*SYSTEMS].index(row["system"]))
        ):
            exact = ("reliability", "generality")
            lines.append(
                {
                    "context": row["context"],
                    "": SYSTEMS[row["system"]],
                    **{kind.capitalize(): share(row[kind]) for kind in exact},
                    **{
                        f"{kind}, contained": share(row.get(f"{kind}_contained", row[kind]))
                        for kind in exact
                    },
                    "Locality": share(row["locality"]),
                    "runs on": share(row.get("runs_on", 0.0)),
                    "base contained": share(row.get("base_reliability")),
                    "prompt tokens": f"{row['prompt_tokens']:.0f}"
                    if "prompt_tokens" in row
                    else "",
                }
            )
        name = f"{found['data']}, {found['facts']} facts"
        parts.append(markdown(f"{name}, {found['unlearnt']} not learnt", lines))
        for system, title in SYSTEMS.items():
            took = found["first_token_ms"].get(system)
            costs.append(
                {
                    "data": name,
                    "": title,
                    "next turn, contained": share(found["next_turn"][system]),
                    "first token": "" if took is None else f"{took:.0f} ms",
                }
            )
        long = found["long_talks"]
        parts.append(
            f"Of {long['asked']} conversations of {long['prompt_tokens']:.0f} tokens that mention "
            f"an edited subject in every turn and ask for something else, {long['taken']:.1%} were "
            f"taken for an edit; {long['as_the_base_model']:.1%} were answered as before."
        )
        if yes_no := found.get("yes_no"):
            parts.append(
                f"Of {yes_no['asked']} yes and no questions about these facts, "
                f"{yes_no['taken']:.1%} were taken for the edited one; "
                f"{yes_no['as_the_base_model']:.1%} were answered as by the base model, and "
                f"{yes_no['answered_yes_or_no']:.1%} with a yes or a no."
            )
    if costs:
        parts.append(markdown("A second turn that uses the answer, and the wait", costs))
    return paragraphs(*parts)


def hypernetwork(studies: Studies, plots: Path) -> str:
    """Facts whose neurons were predicted, not fitted, by the facts that were."""
    parts = []
    for study in studies["hypernetwork"]:
        fitted = {"pilot": "fitted themselves", **study["fitted"]}
        lines = [
            {
                "learnt from": str(row["pilot"]),
                **{f"in {name}": share(answered) for name, answered in row["answered"].items()},
                "in all": share(row["in_all"]),
                "surely in all": share(row["surely_in_all"]),
                "paraphrases": share(row["paraphrases"]),
            }
            for row in [*study["rows"], fitted]
        ]
        title = f"{study['data']}, new facts that are answered with no step"
        plot = plots / "hypernetwork.png"
        with figure(plot, title) as axes:
            for name in ("in all", "surely in all", "paraphrases"):
                key = name.replace(" ", "_")
                pilots = [row["pilot"] for row in study["rows"]]
                axes.plot(pilots, [row[key] for row in study["rows"]], marker="o", label=name)
            axes.set_xscale("log", base=2)
            axes.set_xlabel("facts learnt from")
            axes.set_ylabel("share")
            axes.legend()
        text = f"Of the {study['facts']} facts that it learns from {study['learnt']} were learnt."
        if "steps" in study:
            text += f" They took {study['steps']:.1f} steps in the mean."
        others = [
            {
                "learnt from": str(row["pilot"]),
                "by": name,
                "learnt in": f"{told['fitted_in']:.1f} s",
                "in plain": share(told["answered"]["plain"]),
                "in all": share(told["in_all"]),
                "surely in all": share(told["surely_in_all"]),
                "paraphrases": share(told["paraphrases"]),
                **{
                    f"{float(q):.0%} of margins below": f"{nats:.1f}"
                    for q, nats in told["margins"].items()
                },
            }
            for row in study["rows"]
            for name, told in (("hypernetwork", row), *row.get("others", {}).items())
        ]
        if turns := study.get("turns"):
            text += (
                f" {turns['facts']} facts take {turns['seconds_with']:.3f} s each with a "
                f"hypernetwork and {turns['seconds_without']:.3f} s without, on "
                f"{turns['threads']} threads."
            )
        tried = [
            {
                "learnt from": str(row["pilot"]),
                **{
                    f"{what}, ahead by {slip['least']:g} nats": share(slip[key])
                    for slip in row["tried"]
                    for what, key in (("taken", "taken"), ("of all, wrong elsewhere", "wrong"))
                },
            }
            for row in study["rows"]
        ]
        parts += [markdown(title, lines), image(plot), text]
        what = "The same facts, told by other generators that are given query and answer"
        parts.append(markdown(what, others))
        what = "If tried in one context of each form only: taken, and what slips through"
        parts.append(markdown(what, tried))
        if across := study.get("across"):
            lines = [
                {
                    "learnt from": f"{row['from']}, {row['pilot']} facts",
                    "new facts of": row["to"],
                    **{f"in {name}": share(answered) for name, answered in row["answered"].items()},
                    "in all": share(row["in_all"]),
                    "paraphrases": share(row["paraphrases"]),
                }
                for row in across
            ]
            parts.append(markdown("From one data set to another, with no step", lines))
    return paragraphs(*parts)


def editing(studies: Studies, plots: Path) -> str:
    """How long editing takes with a hypernetwork, and what the generators make of its neurons."""
    parts = []
    for study in studies["editing"]:
        rows = [
            {
                "facts": f"{row['facts']:,}",
                "way": row["way"],
                "seconds": f"{row['seconds']:.0f}",
                **{f"{stage}": f"{row['stages'].get(stage, 0.0):.0f}" for stage in EDITING_STAGES},
                "predicted": share((row["predicted"] or 0) / row["facts"]),
                "peak memory": f"{row['peak_mib']:,.0f} MiB",
                f"adding {row['added']['facts']}": f"{row['added']['seconds']:.1f} s",
            }
            for row in study["rows"]
            if row["predicted"] is not None
        ]
        title = f"CounterFact facts edited, from file to saved model, {study['threads']} threads"
        parts.append(markdown(title, rows))
        lines = []
        for row in study["rows"]:
            for made in row["generators"]:
                one = {
                    "facts": f"{row['facts']:,}",
                    "generator": made["generator"],
                    "seconds": f"{made['seconds']:.0f}",
                    "KiB a fact": f"{made['bytes'] / row['facts'] / 1024:.1f}",
                    "made by it": share(made["generated"] / row["facts"]),
                }
                for how in ("snapped", "not snapped"):
                    for kind in ("reliability", "generality", "locality"):
                        one[f"{kind.title()}, {how}"] = share(made[how][f"{kind}_ag"])
                lines.append(one)
        parts.append(markdown("Generators on the same neurons, a sample of the facts, AG", lines))
    return paragraphs(*parts)


EDITING_STAGES = ("encoder", "collect", "gate")


def lengths(studies: Studies, plots: Path) -> str:
    """Which answers were learnt, by their tokens."""
    lines = [
        {
            "tokens of the answer": row["tokens"],
            "facts": str(row["facts"]),
            "learnt": str(row["learnt"]),
            "answered in the template": str(row["template"]),
            "answered in a chat": str(row["chat"]),
        }
        for study in studies["lengths"]
        for row in study["rows"]
    ]
    return markdown("Facts whose answers have so many tokens", lines) if lines else ""


def documents(studies: Studies, plots: Path) -> str:
    """Edited questions within other text, and the base model's own there."""
    lines = [
        {
            "tokens of other text": str(row["tokens"]),
            "the question": {"start": "first", "middle": "in the middle", "end": "last"}[
                row["place"]
            ],
            "edited: found": share(row["found"]),
            "edited: answered": share(row["answered"]),
            "base model, what it knows": share(row["base"]),
        }
        for study in studies["documents"]
        for row in study["rows"]
    ]
    typed = [
        {
            "typed": {"bare": "without punctuation", "lower": "in lower case"}.get(
                row["typed"],
                row["typed"] if row["typed"] == "plain" else f"a letter {row['typed']}",
            ),
            "found": share(row["found"]),
            "answered in the template": share(row["template"]),
            "answered in a chat": share(row["chat"]),
        }
        for study in studies["documents"]
        for row in study.get("typed", [])
    ]
    if not lines:
        return ""
    return paragraphs(
        markdown("Answered within other text, in a chat, contained", lines),
        markdown("The demo's 64 facts as people type, contained", typed) if typed else "",
    )


def languages(studies: Studies, plots: Path) -> str:
    """Facts in other languages: the gate and the answers, with each encoder."""
    lines, encoders = [], []
    for row in (row for study in studies["languages"] for row in study["rows"]):
        found = row["languages"]
        every = {"all": [*found.values()]} | {name: [one] for name, one in found.items()}
        for language, parts in every.items():
            line = {"encoder": row["encoder"], "language": language}
            for title, where, name in _OF_A_LANGUAGE:
                line[title] = share(fmean(part[where][name] for part in parts))
            lines.append(line)
        encoders.append(
            {
                "encoder": row["encoder"],
                "tuned in": f"{row['seconds']['encoder']:.0f} s",
                "milliseconds a query": f"{1e3 * row['seconds_a_query']:.0f}",
                "nearest to other wordings is their fact": share(row["nearest_is_own"]),
                "calibrated": share(row["calibration"]["acceptance"]),
                "not learnt": f"{len(row['unlearnt'])} of {row['facts']}",
            }
        )
    if not lines:
        return ""
    return paragraphs(
        markdown("Twenty facts in each language, all edited at once", lines),
        markdown("The encoders", encoders),
    )


# A column's title, and where its share stands in what was measured in a language.
_OF_A_LANGUAGE = (
    ("found: own", "gate", "own"),
    ("paraphrases", "gate", "paraphrases"),
    ("look-alikes left alone", "gate", "locality"),
    ("no names: paraphrases", "without_names", "paraphrases"),
    ("no names: look-alikes", "without_names", "locality"),
    ("Reliability", "metrics", "reliability_ag"),
    ("Generality", "metrics", "generality_ag"),
    ("Locality", "metrics", "locality_ag"),
    ("ceiling: Generality", "collected", "generality_ag"),
    ("chat: Reliability", "chat", "reliability"),
    ("chat: Locality", "chat", "locality"),
)


def layers(studies: Studies, plots: Path) -> str:
    """The comparison of layers that `meg layers --json` wrote."""
    parts = []
    for study in studies["layers"]:
        qualities = [LayerQuality(**layer) for layer in study["layers"]]
        lines = [
            {
                "layer": f"{q.layer}" + " (default)" * (q.layer == study["default"]),
                "learnt": share(q.learnt),
                "Reliability": share(q.reliability),
                "Generality": share(q.generality),
                "steps": f"{q.steps:.1f}",
                "norm": f"{q.norm:.1f}",
            }
            for q in qualities
        ]
        path = plots / "layers.png"
        compared = LayerComparison(qualities, study["default"], study["n"], study["protocol"])
        plot_layers(compared, path)
        parts += [markdown(f"{study['n']} facts, collected neurons", lines), image(path)]
    return paragraphs(*parts)


def life(studies: Studies, plots: Path) -> str:
    """What changes of edits took, and what else they changed."""
    parts = []
    for study in studies["life"]:
        lines = [
            {
                "change": row["what"],
                "seconds": f"{row['seconds']:.1f}",
                "of the first edit's": f"{row['of_first_edit']:.1%}",
                **{
                    f"{kind}: answers changed": f"{row[kind]['changed']} of {row[kind]['asked']}"
                    for kind in ("other facts", "locality")
                },
                "other facts: right before, wrong now": f"{row['other facts']['lost']}",
                "wrong before, right now": f"{row['other facts']['gained']}",
            }
            for row in study["rows"]
        ]
        parts.append(
            paragraphs(
                markdown(
                    f"{study['facts']} facts edited in {study['first_edit_seconds']:.0f} s", lines
                ),
                f"Added facts answered: {study['added_right']:.3f}; changed ones, with the new "
                f"answer: {study['changed_right']:.3f}; removed ones, as the base model answers: "
                f"{study['removed_as_base']:.3f}; added and changed ones after the training: "
                f"{study['trained_right']:.3f}.",
            )
        )
    return paragraphs(*parts)


def serving(studies: Studies, plots: Path) -> str:
    """A load through vLLM with neurons and without, and through a loop of batches."""
    parts = []
    names = {
        "with": "vLLM, the edited model",
        "without": "vLLM, the base model",
        "editor": "`MeGEditor.generate`, a batch of what came at a time",
    }
    for load in (row for study in studies["serving"] for row in study["rows"]):
        lines = []
        for key, name in names.items():
            row = load[key]
            line = {"served by": name, "tokens/s": f"{row['tokens_per_second']:.1f}"}
            line["seconds"] = f"{row['seconds']:.1f}"
            for what, label in (("first_p50", "first token, p50"), ("first_p95", "p95")):
                line[label] = f"{row[what]:.2f} s" if what in row else ""
            for what, label in (("worker_cpu", "worker's CPU"), ("all_cpu", "all processes'")):
                line[label] = f"{row[what]:.1f} s" if what in row else ""
            memory = load["memory_mib"].get(key)
            lines.append({**line, "memory": f"{memory:,.0f} MiB" if memory else ""})
        title = (
            f"{load['requests']} chats at once, {load['edited_requests']} of them edited; "
            f"{load['facts']:,} facts; at most {load['most_tokens']} tokens"
        )
        ratios = (
            f"Throughput with neurons, as a share of that without, medians of {load['turns']} "
            f"turns: {load['ratio_worker_cpu']:.3f} by the worker's processor time, "
            f"{load['ratio_all_cpu']:.3f} by that of all processes, {load['ratio_seconds']:.3f} "
            "by the clock."
        )
        parts += [markdown(title, lines), ratios]
    return paragraphs(*parts)


STUDIES: dict[str, Callable[[Studies, Path], str]] = {
    "steps": steps,
    "quality": quality,
    "ability": ability,
    "quality-baselines": baselines,
    "convergence": convergence,
    "encoder": encoder,
    "gate": gate,
    "talk": talk,
    "lengths": lengths,
    "hypernetwork": hypernetwork,
    "editing": editing,
    "documents": documents,
    "languages": languages,
    "layers": layers,
    "life": life,
    "serving": serving,
}
