"""The tables of evidence/README.md and the pictures: python evidence/tables.py

They are made anew from the records beside this file. What stands above the mark in
README.md is kept.
"""

import functools
import json
import math
import sys
from pathlib import Path

import pandas
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fpt
from evidence.study import CHANGES, FIXED, GROWING, LONG, SEEDS, STEPS, TASKS

HERE = Path(__file__).resolve().parent
MARK = "<!-- From here on: python evidence/tables.py -->\n"
MODELS = {"shipped": "study", "trained whole": "study-whole"}
SPEEDS = ["speed-cpu", "speed-xeon", "speed-gpu"]

# T5-LARGE in the paper's Tables 1 and 2: the mean of its five tasks less that of PT,
# FLOPs over those of PT, and "Improve", which is the gain.
PAPER = {
    "0.25x1": (-25.7, 0.30),
    "0.5x1": (-20.3, 0.54),
    "1x0.25": (-8.4, 0.58),
    "1x0.5": (-3.3, 0.72),
    "0.25x0.25": (-25.5, 0.20),
    "0.5x0.5": (-23.1, 0.40),
    "ld": (-0.6, 0.72, 0.11),
    "fr": (0.0, 0.83, 0.49),
    "cr": (-0.6, 0.65, 0.38),
}


@functools.cache
def load(name):
    """A record beside this file."""
    return json.loads((HERE / f"{name}.json").read_text())


@functools.cache
def frame_of(name):
    """The cells of a record as `fpt.compare` sees them: a row for each run.

    The index is the schedule, or the change to it. A run of a task and a number of
    updates is compared with the `pt` run of the same.
    """
    cells = pandas.DataFrame(load(name)["cells"])
    cells["name"] = cells.change.where(cells.change != "", cells.schedule)
    cells["name"] = cells.name.str.removesuffix(":1")
    frames = []
    for (task, steps), rows in cells.groupby(["task", "steps"]):
        runs = []
        for cell in rows.to_dict("records"):
            log = pandas.DataFrame({"dev": cell["dev"], "flops": cell["flops"]})
            log["best"] = log.dev.cummax()
            cell |= {"best_dev": log.best.max(), "flops": cell["flops"][-1]}
            runs.append(
                cell | {"schedule": cell["name"], "log": log.to_dict("records")}
            )
        frame = fpt.compare(runs).reset_index(names="name")
        frame["seed"] = rows.seed.to_list()
        frame["whole"] = rows["on the whole"].to_list()  # NaN if it is none of `fixed`
        frames.append(frame.assign(task=task, steps=steps))
    return (
        pandas.concat(frames).set_index(["name", "task", "steps", "seed"]).sort_index()
    )


def study_frame(name):
    """The part of a record that compares schedules, parts and changes."""
    frame = frame_of(name).xs(STEPS, level="steps")
    return frame[frame.index.isin(SEEDS, level="seed")]


def spread(values):
    """Mean ± standard deviation, as text."""
    return f"{values.mean():.1f} ± {values.std():.1f}"


def interval(values):
    """Mean and its 95 % interval by Student's t, as text."""
    values = values.dropna()
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return (
        f"{values.mean():+.1f} [{values.mean() - half:.1f}, {values.mean() + half:.1f}]"
    )


def median_cost(runs):
    """FLOPs to 99 % of what `pt` ends with, over those that `pt` needs, as text."""
    median = runs["to 99 %"].fillna(float("inf")).median() / 100
    return "never" if math.isinf(median) else f"{median:.2f}"


def markdown(title, rows):
    """A table of texts, one dictionary a row, with a title."""
    frame = pandas.DataFrame(rows).fillna("")
    lines = [f"{title}\n", f"| {' | '.join(frame.columns)} |"]
    lines.append("| --- " * len(frame.columns) + "|")
    for row in frame.itertuples(index=False):
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


# ====== Tables ========================================================================


def minus_pt(frame, scores):
    """Scores minus those of `pt` on validation, for each task and seed of both."""
    return (scores - frame.validation["pt"]).dropna()


def default_table():
    """`pt` and `cr` of the default command, and of one with twice the updates."""
    frame = frame_of("study").xs("reviews", level="task")
    rows = []
    for steps, seeds in [
        (STEPS, range(8)),
        (STEPS, range(8, 32)),
        (2 * STEPS, LONG),
    ]:
        chosen = frame.xs(steps, level="steps")
        chosen = chosen[chosen.index.isin(seeds, level="seed")]
        for name in ["pt", "cr"]:
            runs = chosen.loc[name]
            row = {
                "": f"`{name}`, {steps} updates, seeds {seeds[0]} to {seeds[-1]}",
                "dev": spread(runs.dev),
                "validation": spread(runs.validation),
                "worst": f"{runs.validation.min():.1f}",
                "FLOPs": f"{runs.flops.mean() / 100:.3f}",
                "seconds": f"{runs.seconds.mean() / 100:.2f}",
                "to 99 %": median_cost(runs),
            }
            if name == "cr":
                row["`pt`, same FLOPs"] = spread(runs["pt, same flops"])
                row["gain [95 %]"] = interval(runs.gain)
                row["validation minus `pt`"] = interval(
                    minus_pt(chosen, runs.validation)
                )
            rows.append(row)
    return markdown("## The default command", rows)


def paper_table(heading, names, records):
    """The paper's Table 1 or 2 on our models: means over all tasks and seeds."""
    rows = []
    for name in names:
        row = {"": f"`{name}`", "FLOPs": ""}
        for title, frame in records.items():
            runs = frame.loc[name]
            row["FLOPs"] = f"{runs.flops.mean() / 100:.2f}"
            row[f"{title}: minus `pt`"] = interval(minus_pt(frame, runs.validation))
            if name in GROWING:
                row[f"{title}: gain"] = interval(runs.gain)
            else:
                whole = interval(minus_pt(frame, runs.whole))
                row[f"{title}: its prompt on the full model, minus `pt`"] = whole
        score, flops, *gain = PAPER[name]
        row |= {"paper: minus PT": f"{score:+.1f}", "paper: FLOPs": f"{flops:.2f}"}
        if gain:
            row["paper: gain"] = f"{gain[0]:+.2f}"
        rows.append(row)
    return markdown(heading, rows)


def by_task(title, frame):
    """Everything about each schedule and change, task by task."""
    rows = []
    for name in ["pt", *GROWING, *CHANGES, *FIXED]:
        for task, runs in frame.loc[name].groupby("task"):
            row = {
                "": f"`{name}`" if name not in CHANGES else f"`cr`, {name}",
                "task": task,
                "seeds": str(len(runs)),
                "dev": spread(runs.dev),
                "validation": spread(runs.validation),
                "FLOPs": f"{runs.flops.mean() / 100:.3f}",
            }
            if name in FIXED:
                row["prompt on the whole model"] = spread(runs.whole)
            elif name != "pt":
                row["gain [95 %]"] = interval(runs.gain)
                row["to 99 %"] = median_cost(runs)
            rows.append(row)
    return markdown(f"## {title}", rows)


def changes_table(records):
    """What is left of `cr` if one thing is otherwise: dev scores in pairs."""
    rows = []
    for name in [*CHANGES, "`pt` with the FLOPs of `cr`"]:
        row = {"": name}
        for title, frame in records.items():
            cr = frame.loc["cr"]
            dev = cr["pt, same flops"] if name not in CHANGES else frame.loc[name].dev
            row[f"{title}: minus `cr`"] = interval(dev - cr.dev)
        rows.append(row)
    return markdown("## One change", rows)


def cosine_table():
    """How alike prompts are as vectors."""
    found = {title: load(name)["cosines"] for title, name in MODELS.items()}
    rows = []
    for other in found["shipped"]:
        row = {"cosine with `pt`": other}
        rows.append(row | {title: f"{found[title][other]:.3f}" for title in found})
    return markdown("## Are prompts alike?", rows)


def speed_table(name):
    """A record of bench.py: every number that it has."""
    record = load(name)
    found = [f"## {name}.json\n"]
    frame = pandas.DataFrame(record["rows"])
    keys = ["part", "shape", "precision"]
    for names, rows in frame.groupby(keys, sort=False):
        text = rows.drop(columns=keys).dropna(axis=1, how="all")
        for column in text.select_dtypes("number"):
            text[column] = text[column].map("{:.4g}".format).replace("nan", "")
        found.append(markdown(", ".join(names), text.to_dict("records")))
    return "\n".join(found)


# ====== Pictures ======================================================================


def curve(cells):
    """The mean of the best dev scores so far, over FLOPs: two lists of numbers."""
    flops = pandas.DataFrame([cell["flops"] for cell in cells]).mean()
    best = pandas.DataFrame([cell["dev"] for cell in cells]).cummax(axis=1).mean()
    return flops.to_list(), best.to_list()


def draw_curves(axes, cells, title):
    """`pt` and `cr`, a line where `cr` ends, and the gain there."""
    ends = {}
    for name, style in [("pt", "--"), ("cr", "-")]:
        chosen = [cell for cell in cells if cell["schedule"] == name]
        flops, best = curve(chosen)
        if name == "pt":
            whole = flops[-1]
        x = [value / whole for value in flops]
        axes.plot(
            x, best, style, color="black", lw=2, label=f"{name}, {best[-1]:.1f} %"
        )
        ends[name] = x, best
    x, y = ends["cr"][0][-1], ends["cr"][1][-1]
    below = fpt.at_first(
        [{"x": a, "y": b} for a, b in zip(*ends["pt"], strict=True)], "x", x, "y"
    )
    axes.axvline(x, color="0.6", lw=1, zorder=0)
    arrow = {"arrowstyle": "<->", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, y), (x, below), arrowprops=arrow)
    axes.set_title(f"{title}: gain {y - below:+.1f}", fontsize=10)
    axes.set(xlabel="training FLOPs, as a share of pt's", xlim=(0, 1.05))
    axes.legend(loc="lower right", frameon=False)


def cells_of(name, task, seeds):
    """The cells of a record with the usual number of updates and no change."""
    found = []
    for cell in load(name)["cells"]:
        same = cell["task"] == task and cell["steps"] == STEPS and not cell["change"]
        if same and cell["seed"] in seeds:
            found.append(cell)
    return found


def draw_default():
    """The seeds of the default command that chose nothing."""
    plot = Figure(figsize=(6, 3.8), layout="constrained")
    axes = plot.subplots()
    cells = cells_of("study", "reviews", range(8, 32))
    draw_curves(axes, cells, "python fpt.py, seeds 8 to 31")
    axes.set_ylabel("best dev score so far, %")
    return plot


def draw_study():
    """The three tasks on each model."""
    plot = Figure(figsize=(9, 6), layout="constrained")
    panels = plot.subplots(len(MODELS), len(TASKS), sharex=True)
    for row, (title, name) in zip(panels, MODELS.items(), strict=True):
        for axes, task in zip(row, TASKS, strict=True):
            cells = cells_of(name, task, SEEDS)
            draw_curves(axes, cells, f"{task}, {title}")
        row[0].set_ylabel("best dev score so far, %")
    return plot


def readme():
    """evidence/README.md, with the tables made anew."""
    records = {title: study_frame(name) for title, name in MODELS.items()}
    parts = [
        default_table(),
        paper_table("## Schedules", GROWING, records),
        paper_table("## Parts that never grow", FIXED, records),
        changes_table(records),
        cosine_table(),
    ]
    for title, frame in records.items():
        parts.append(by_task(f"{MODELS[title]}.json, the {title} model", frame))
    parts += [speed_table(name) for name in SPEEDS]
    head, _, _ = (HERE / "README.md").read_text(encoding="utf-8").partition(MARK)
    return head + MARK + "\n" + "\n".join(parts)


def main():
    (HERE / "README.md").write_text(readme(), encoding="utf-8")
    draw_default().savefig(HERE / "default.png", dpi=120)
    draw_study().savefig(HERE / "study.png", dpi=120)


if __name__ == "__main__":
    main()
