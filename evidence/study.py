"""The study behind the tables, on micro models: python evidence/study.py --out FOLDER

A cell is one run of `fpt.main`: a task, a schedule, a seed, and at most one change to
the method. Cells that FOLDER has are kept, so a stopped study goes on. All of them
together become FOLDER/study.json, with a line for each. --part and --seed run less.

default   the default command, and the same with one thing done otherwise
table     prompt tuning on fixed partial models (the paper's Table 1), and schedules (2)
change    `cr` in half the updates, with one thing done otherwise
transfer  the prompts of the part table on each other's models, and their cosines

--show prints the tables of a record. --tables writes evidence/README.md and the
pictures anew, from the records beside it.
"""

import argparse
import collections
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import re
import shutil
import sys
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pandas
import torch
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fpt
from evidence import bench
from micro import make

HERE = Path(__file__).resolve().parent
PARTS = ["default", "table", "change", "transfer"]
REPORTED = ["slot", "present", "word", "told"]  # tasks of micro/make.py
FIXED = [
    "pt",
    "0.25x1:1",
    "0.5x1:1",
    "0.75x1:1",
    "1x0.25:1",
    "1x0.5:1",
    "1x0.75:1",
    "0.25x0.25:1",
    "0.5x0.5:1",
    "0.75x0.75:1",
]
SCHEDULES = ["ld", "fr", "cr", "fast"]
FAST = "0.25x0.25:0.4,0.5x0.5:0.4,1x1:0.2"  # found on micro models, for them
MOST = ["pt", "cr", "fast"]  # of these, all seeds; of the rest the first five

# ====== One change at a time ==========================================================

TRAIN = fpt.train


def random_layers(seed, total, keep):
    """Layer 0, which owns the position bias, and others at random."""
    generator = fpt.rng(seed, "layers", keep)
    drawn = torch.randperm(total - 1, generator=generator) + 1
    return sorted([0, *drawn[: keep - 1].tolist()])


def random_neurons(model, prompt, batches):
    """Scores that put the neurons in a random order, another one for each prompt."""
    generator = fpt.rng(prompt.sum().item(), "neurons")
    scores = {}
    for side in ["encoder", "decoder"]:
        scores[side] = []
        for _ in getattr(model, side).block:
            scores[side].append(torch.rand(model.config.d_ff, generator=generator))
    return scores


def forgetful(model, prompt, optimizer, schedule, *args, **settings):
    """`fpt.train` with an optimiser that forgets the smaller model at each growth."""
    steps = settings["steps"]
    for run in TRAIN(model, prompt, optimizer, schedule, *args, **settings):
        yield run
        stage = fpt.stage_at(schedule, run.step, steps)
        if fpt.stage_at(schedule, run.step + 1, steps) > stage:
            optimizer.state.clear()


def slowed(model, prompt, optimizer, *args, **settings):
    """`fpt.train` with a third of the rate in the last 40 % of the updates."""
    for run in TRAIN(model, prompt, optimizer, *args, **settings):
        yield run
        if run.step >= 0.6 * settings["steps"]:
            optimizer.param_groups[0]["lr"] = 0.1


def replaced(change, seed):
    """What of fpt.py a change replaces, by name."""
    if change == "layers random":
        return {"kept_layers": functools.partial(random_layers, seed)}
    if change == "neurons random":
        return {"neuron_scores": random_neurons}
    if change == "optimiser reset":
        return {"train": forgetful}
    if change.endswith("rate / 3 at the end"):
        return {"train": slowed}
    if change.endswith("shuffled batches"):  # not sorted by length
        return {"batches": functools.partial(fpt.batches, pool=1)}
    return {}


@dataclass
class Change:
    """A run of the part change, and the one that it is compared with."""

    schedule: str = "cr"
    base: str = "none"
    updates: float = 1.0  # a share of those of the others
    length: int = 20  # of the prompt


CHANGES = {
    "none": Change(),
    "layers random": Change(),
    "neurons random": Change(),
    "optimiser reset": Change(),
    "length 5": Change(length=5),
    "length 50": Change(length=50),
    "pt": Change("pt"),
    "pt, the FLOPs of cr": Change("pt", updates=0.648),  # measured, on these tasks
    "pt, length 5": Change("pt", base="pt", length=5),
    "pt, length 50": Change("pt", base="pt", length=50),
}
DEFAULT = [  # of the part default
    "pt, rate / 3 at the end",
    "cr, rate / 3 at the end",
    "pt, shuffled batches",
    "cr, shuffled batches",
]

# ====== Cells =========================================================================


@dataclass
class Cell:
    """One run; `change` is empty if nothing is changed."""

    task: str
    schedule: str
    change: str
    seed: int

    def folder(self, out):
        """Where its command writes."""
        name = f"{self.change or 'as is'} {self.schedule} {self.seed}"
        return out / "runs" / self.task / re.sub("[:, /]+", "_", name)

    def prompt(self, out):
        """The chosen prompt [P, d]."""
        [folder] = self.folder(out).glob("*/prompt")
        return fpt.load_prompt(folder)


def cells(parts, seeds):
    """The cells of some parts, those with the first seeds first."""
    found = []
    if "default" in parts:
        for seed in seeds:
            changes = DEFAULT if 8 <= seed < 24 else []
            found.append(Cell("entailment", "pt", "", seed))
            found.append(Cell("entailment", "cr", "", seed))
            for change in changes:
                found.append(Cell("entailment", change[:2], change, seed))
    for seed, task in itertools.product(seeds, REPORTED):
        few = seed not in seeds[:5]
        if "table" in parts or "transfer" in parts:
            for schedule in MOST if few else FIXED + SCHEDULES:
                found.append(Cell(task, schedule, "", seed))
        if "change" in parts and not few:
            for name, change in CHANGES.items():
                found.append(Cell(task, change.schedule, name, seed))
    return found


def run_cell(args, cell):
    """Train, unless that was done before, and return what the study keeps of it."""
    folder = cell.folder(args.out)
    change = CHANGES.get(cell.change, Change())
    schedule = FAST if cell.schedule == "fast" else cell.schedule
    flags = {"out": folder, "schedule": schedule, "seed": cell.seed}
    if cell.task != "entailment":  # which is that of the default command
        updates = change.updates / 2 if cell.change else 1
        flags |= {
            "model": args.model,
            "task": args.out / "tasks" / cell.task,
            "steps": round(args.steps * updates),
            "eval-every": args.eval_every,
            "prompt-length": change.length,
            "dev": 200,
            "limit": 500,
            "device": "cpu",
            "threads": 1,
        }
    if not list(folder.glob("*/results.json")):
        shutil.rmtree(folder, ignore_errors=True)
        command = [f"--{name}={value}" for name, value in flags.items()]
        changed = mock.patch.dict(vars(fpt), replaced(cell.change, cell.seed))
        with changed, contextlib.redirect_stdout(io.StringIO()):
            fpt.main(command)
    [path] = folder.glob("*/results.json")
    run = json.loads(path.read_text())
    kept = dict(vars(cell))
    for key in ["dev", "step", "flops"]:
        kept[key] = [row[key] for row in run["log"]]
    kept["validation"] = run["validation"]
    kept["seconds"] = round(run["seconds"], 2)
    return kept


def transfer(args, cell):
    """The prompts of all fixed models on each of them, for a cell's task and seed."""
    settings = fpt.parse_args(["--resume", str(cell.folder(args.out))])
    model, task, _ = fpt.prepare(settings)
    # The scores of `fpt.tune`.
    seed, generator = f"scores {cell.seed}", fpt.rng(cell.seed, "prompt")
    start = fpt.init_prompt("uniform", 20, model.shared.weight, generator)
    drawn = fpt.batches(task, settings.batch, model.device, seed, pool=1)
    scores = fpt.neuron_scores(model, start, [next(drawn), next(drawn)])
    matrix = [[] for _ in FIXED]
    for name in FIXED:
        [stage] = fpt.parse_schedule(name)
        part = fpt.partial_t5(model, stage.depth, stage.width, scores, decoder=False)
        for row, trained_on in zip(matrix, FIXED, strict=True):
            other = replace(cell, schedule=trained_on)
            prompt = fpt.SoftPrompt(other.prompt(args.out))
            score, _ = fpt.evaluate(part, prompt, task, task.validation)
            row.append(score)
    found = {"task": cell.task, "seed": cell.seed}
    return found | {"models": FIXED, "validation": matrix}


def cosines(args):
    """Cosines of chosen prompts, flattened, with the one of `pt`: means over all pairs.

    The first ones, of partial models, have the start and the batches of that `pt`.
    """
    found = collections.defaultdict(list)

    def add(title, cell, pt):
        if cell != pt:
            prompt = cell.prompt(args.out).flatten()
            weight = pt.prompt(args.out).flatten()
            cosine = torch.cosine_similarity(prompt, weight, dim=0)
            found[title].append(cosine.item())

    seeds = args.seed[:5]
    for task, seed in itertools.product(REPORTED, seeds):
        pt = Cell(task, "pt", "", seed)
        for schedule in FIXED[-3:]:
            add(f"`{schedule}`, same seed", replace(pt, schedule=schedule), pt)
        for other in seeds:
            add("`pt`, other seed", replace(pt, seed=other), pt)
        for other in REPORTED:
            add("`pt`, other task", replace(pt, task=other), pt)
    size = pt.prompt(args.out).numel()
    drawn = torch.randn(2, 100, size, generator=fpt.rng("random prompts"))
    found["random"] = torch.cosine_similarity(*drawn, dim=1).tolist()
    return {title: sum(values) / len(values) for title, values in found.items()}


# ====== Tables ========================================================================

# T5-LARGE in the paper's Tables 1 and 2, less its own PT: on MNLI and QQP (labels, as
# here: the decoder stays whole), on all five tasks; FLOPs over those of PT; "Improve".
PAPER = """
schedule     labels  minus PT  FLOPs  Improve
pt                -         -   1.00        -
0.25x1:1      -17.3     -25.7   0.30        -
0.5x1:1       -14.4     -20.3   0.54        -
0.75x1:1       -2.9      -8.8   0.77        -
1x0.25:1       -5.0      -8.4   0.58        -
1x0.5:1        -2.1      -3.3   0.72        -
1x0.75:1       -0.8      -1.1   0.86        -
0.25x0.25:1   -16.2     -25.5   0.20        -
0.5x0.5:1     -15.2     -23.1   0.40        -
0.75x0.75:1    -3.2      -9.2   0.66        -
ld             -0.5      -0.6   0.72    +0.11
fr             +0.1      +0.0   0.83    +0.49
cr             -0.9      -0.6   0.65    +0.38
fast              -         -      -        -
"""


def paper():
    """What the paper measured, as text."""
    lines = [re.split("  +", line) for line in PAPER.strip().splitlines()]
    frame = pandas.DataFrame(lines[1:], columns=lines[0]).set_index("schedule")
    return frame.replace("-", "").add_prefix("paper: ")


def as_result(cell):
    """A cell as `fpt.main` returns a run; a change is what the run is named by.

    Of the last 40 % of the updates it also has `begun`, the dev score before them, and
    `jumps`, how far their dev scores are from those before on average.
    """
    log = pandas.DataFrame({key: cell[key] for key in ["step", "dev", "flops"]})
    log["best"] = log.dev.cummax()
    late = log.dev[log.step >= 0.6 * log.step.max()]
    return cell | {
        "schedule": cell["change"] or cell["schedule"],
        "log": log.to_dict("records"),
        "best_dev": log.best.max(),
        "flops": log.flops.max(),
        "begun": late.iloc[0],
        "jumps": late.diff().abs().mean(),
    }


def compared(cells):
    """The rows of `fpt.compare`, task by task; their index is name, task and seed."""
    frames = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        runs = [as_result(cell) for cell in cells if cell["task"] == task]
        frame = fpt.compare(runs)
        for key in ["task", "seed", "begun", "jumps"]:
            frame[key] = [run[key] for run in runs]
        frames.append(frame)
    frame = pandas.concat(frames).rename_axis("name")
    return frame.set_index(["task", "seed"], append=True)


def unchanged(record):
    """The cells of a record without a change."""
    return [cell for cell in record["cells"] if not cell["change"]]


def per_task(frame, key):
    """A column, grouped by name: rows for seeds, columns for tasks and their mean."""
    wide = frame[key].unstack("task")[frame.index.unique("task")]
    return wide.assign(mean=wide.mean(axis=1, skipna=False)).groupby("name")


def spread(values):
    """Mean ± standard deviation over seeds, as text."""
    return f"{values.mean():.1f} ± {values.std():.1f}"


def pooled(values):
    """Mean and 95 % interval (Student's t) over all pairs of a task and a seed."""
    values = values.dropna()  # pairs that both have run
    if not values.any():  # a run less itself
        return ""
    mean = values.mean()
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return f"{mean:+.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def differences(scores, bases):
    """Scores less those of their bases, in pairs; {name: base} -> {name: text}."""
    return {name: pooled(scores[name] - scores[base]) for name, base in bases.items()}


def costs_of(frame):
    """FLOPs over those of `pt`, as text."""
    return (frame.flops.groupby("name").mean() / 100).map("{:.3f}".format)


def table(frame, bases):
    """Validation by task and of their mean; that less the bases', in pairs; FLOPs."""
    text = per_task(frame, "validation").agg(spread).loc[list(bases)]
    text["minus base [95 %]"] = differences(frame.validation, bases)
    text["FLOPs"] = costs_of(frame)
    return text


def of_default(frame, seeds):
    """`pt` and `cr` of the default command, for some of its seeds."""
    frame = frame[frame.index.isin(seeds, level="seed")]
    rows = frame.fillna({"to 99 %": math.inf}).groupby("name")
    text = rows[["dev", "validation", "pt, same flops"]].agg(spread)
    text["worst"] = rows.validation.min().map("{:.1f}".format)
    text["gain [95 %]"] = rows.gain.agg(pooled)
    text["flops"] = costs_of(frame)
    text["seconds"] = (rows.seconds.mean() / 100).map("{:.2f}".format)
    text["to 99 %"] = (rows["to 99 %"].median() / 100).map("{:.2f}".format)
    text.loc["pt", "pt, same flops"] = ""
    text = text.loc[["pt", "cr"]]
    return text.rename(index=lambda name: f"`{name}`, seeds {seeds[0]} to {seeds[-1]}")


def under_95(scores):
    """How many scores are, as text."""
    return f"{(scores < 95).sum()} of {len(scores)}"


def of_changes(frame):
    """The changes to the default command, and the same seeds of the unchanged one."""
    bases = {name: name[:2] for name in ["pt", "cr", *DEFAULT]}
    seeds = frame.loc[DEFAULT[0]].index.unique("seed")
    frame = frame[frame.index.isin(seeds, level="seed")]
    rows = frame.groupby("name")
    text = rows[["validation"]].agg(spread).loc[list(bases)]
    text["worst"] = rows.validation.min().map(str)
    text["under 95"] = rows.validation.agg(under_95)
    text["minus unchanged [95 %]"] = differences(frame.validation, bases)
    text["jumps"] = rows.jumps.mean().map("{:.1f}".format)
    text["FLOPs"] = costs_of(frame)
    return text


def gains(frame):
    """Dev scores of schedules over `pt` at the same FLOPs."""
    text = per_task(frame, "gain").mean().map("{:+.1f}".format).loc[SCHEDULES]
    text["mean"] = frame.gain.groupby("name").agg(pooled)
    text["paper: Improve"] = paper()["paper: Improve"]
    text["`pt`, same FLOPs"] = per_task(frame, "pt, same flops")["mean"].agg(spread)
    return text


def goals(frame):
    """FLOPs to 99 % of the last score of `pt`, over those of `pt`: medians."""
    found = per_task(frame.fillna(math.inf), "to 99 %").median() / 100
    return found.map("{:.2f}".format).replace("inf", "never").loc[SCHEDULES]


def markdown(title, text):
    """A table of texts with a title."""
    head = ["", *text.columns]
    lines = [title, ""]
    for row in [head, ["---"] * len(head), *text.itertuples()]:
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def default_tables(cells):
    """What the part default shows."""
    frame = compared(cells)
    seen = frame.index.unique("seed")
    rows = []
    for seeds in [range(8), range(8, 32)]:  # that chose things, and that did not
        if seen.isin(seeds).any():
            rows.append(of_default(frame, seeds))
    found = [markdown("`python fpt.py`", pandas.concat(rows))]
    if DEFAULT[0] in frame.index:
        title = "The same with one thing done otherwise"
        found.append(markdown(title, of_changes(frame)))
    return found


def part_tables(cells):
    """What the part table shows."""
    frame = compared(cells)
    beside = paper().drop(columns="paper: Improve")
    fixed = table(frame, dict.fromkeys(FIXED, "pt")).join(beside)
    growing = table(frame, dict.fromkeys(["pt", *SCHEDULES], "pt")).join(beside)
    return [
        markdown("Fixed partial models", fixed),
        markdown("Schedules", growing),
        markdown("Gain over `pt` stopped early", gains(frame)),
        markdown("FLOPs to 99 % of the score of `pt`", goals(frame)),
    ]


def transfer_tables(record):
    """What the part transfer shows: means of tasks and seeds."""
    parts = [pandas.DataFrame(row["validation"]) for row in record["transfer"]]
    matrix = (sum(parts) / len(parts)).map("{:.1f}".format)
    matrix = matrix.set_axis(FIXED, axis=0).set_axis(FIXED, axis=1)
    cosine = pandas.DataFrame(record["cosines"], ["cosine"]).map("{:.3f}".format)
    return [
        markdown("Prompts (rows) on models", matrix),
        markdown("Cosine with the prompt of `pt`", cosine),
    ]


def tables(record):
    """All that a record has cells for, as Markdown."""
    default, plain, changed = [], [], []
    for cell in record["cells"]:
        if cell["task"] == "entailment":
            default.append(cell)
        elif not cell["change"]:
            plain.append(cell)
        elif cell["change"] in CHANGES:
            changed.append(cell)
    found = []
    if default:
        found += default_tables(default)
    if plain:
        found += part_tables(plain)
    if changed:
        bases = {name: change.base for name, change in CHANGES.items()}
        found.append(markdown("One change", table(compared(changed), bases)))
    if "transfer" in record:
        found += transfer_tables(record)
    return "\n".join(found)


def summary(records):
    """The paper's Tables 1 and 2 on several models: means of the four tasks."""
    names = [name for name in FIXED if re.search(r"0\.2|0\.5", name)] + SCHEDULES
    text = pandas.DataFrame(index=names)
    for title, record in records.items():
        frame = compared(unchanged(record))
        bases = dict.fromkeys(names, "pt")
        text[f"{title}: minus `pt`"] = differences(frame.validation, bases)
        gain = frame.gain.groupby("name").agg(pooled)
        text[f"{title}: gain"] = gain[SCHEDULES]  # the others are scored on a part
    text["FLOPs"] = costs_of(frame)
    text = text.fillna("").join(paper()[["paper: minus PT", "paper: Improve"]])
    return text.rename(index="`{}`".format)


def late(records):
    """Runs of `cr` with a low dev score when the full model began, and others.

    And how many of both ended low, five points under `pt`. The tasks are those with two
    answers: half of them are right by chance.
    """
    found = {}
    for title, record in records.items():
        cells = [cell for cell in unchanged(record) if cell["task"] != "slot"]
        frame = compared(cells)
        low = frame.begun["cr"] < 65
        failed = frame.validation["cr"] < frame.validation["pt"] - 5
        found[title] = {
            "under 65": low.sum(),
            "under 65: of these end low": (low & failed).sum(),
            "others": (~low).sum(),
            "others: of these end low": (~low & failed).sum(),
        }
    return pandas.DataFrame(found).T.map(str)


# ====== evidence/README.md ============================================================

STUDIES = ["default", "study", "study-whole"]
SPEEDS = ["speed-cpu", "speed-xeon", "speed-gpu"]
MARK = "<!-- From here on: python evidence/study.py --tables -->\n\n"


def load(name):
    """A record beside this file."""
    return json.loads((HERE / f"{name}.json").read_text())


def speeds(names):
    """Examples per second of all ways, over those of PEFT grouped by length."""
    columns = collections.defaultdict(dict)
    for record in map(load, names):
        machine = record["machine"]
        chip = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
        chip = chip.partition("(")[0].split()[-1]  # EPYC, Intel, H200
        for row in record["rows"]:
            if row["part"] == "speed" and "grouped" not in row["way"]:
                kind = f"{row['shape']}, {row['precision']}, {row['attention']}, {chip}"
                columns[kind][row["way"]] = f"{row['over PEFT grouped']:.2f}"
    return pandas.DataFrame(columns)


def costs(record):
    """A record of bench.py as Markdown."""
    found = []
    frame = pandas.DataFrame(record["rows"])
    keys = ["part", "shape", "precision"]
    for names, rows in frame.groupby(keys, sort=False):
        text = rows.set_index("way").drop(columns=keys).dropna(axis=1, how="all")
        for name in text.select_dtypes("number"):
            text[name] = text[name].map("{:.4g}".format).replace("nan", "")
        found.append(markdown(", ".join(names), text))
    return "\n".join(found)


def readme():
    """evidence/README.md, its end made anew from the records."""
    head, _, _ = (HERE / "README.md").read_text().partition(MARK)
    records = {name: load(name) for name in STUDIES}
    models = {"shipped": records["study"], "brittle": records["study-whole"]}
    low = "## Runs of `cr` by their dev score when the last stage begins"
    peft = "over PEFT grouped by length with the same attention"
    found = [
        f"## default.json\n\n{tables(records['default'])}",
        markdown("## Parts and schedules, both models", summary(models)),
        markdown(low, late(records)),
        markdown(f"## Speed on CPUs, {peft}", speeds(SPEEDS[:2])),
        markdown(f"## Speed on a GPU, {peft}", speeds(SPEEDS[2:])),
    ]
    for name in STUDIES[1:]:
        found.append(f"## {name}.json\n\n{tables(records[name])}")
    for name in SPEEDS:
        found.append(f"## {name}.json\n\n{costs(load(name))}")
    return head + MARK + "\n".join(found)


# ====== Figures =======================================================================


def draw_schedule():
    """`cr` on 12 layers: a column for each stage, as wide as its share.

    What runs is dark.
    """
    layers = 12
    plot = Figure(figsize=(7, 3.9), layout="constrained")
    axes = plot.subplots()
    start = 0.0
    for stage in fpt.SCHEDULES["cr"]:
        kept = fpt.kept_layers(layers, fpt.round_half_up(stage.depth * layers))
        left, wide = start + 0.012, stage.share - 0.024
        every = [row + 0.5 for row in range(layers)]
        axes.barh(every, wide, 0.76, left, color="0.9")
        dark = [row + 0.5 for row in kept]
        axes.barh(dark, wide * stage.width, 0.76, left, color="0.25")
        text = f"{len(kept)} layers,\n{100 * stage.width:g} % of d_ff"
        axes.text(start + stage.share / 2, layers + 0.25, text, ha="center")
        start += stage.share
    axes.annotate("", (1, -1.1), (0, -1.1), arrowprops={"arrowstyle": "->"})
    text = "the same prompt, the same optimiser"
    axes.text(0.5, -1, text, ha="center", va="bottom")
    axes.set(xlim=(0, 1), ylim=(-1.6, layers + 2.2))
    axes.set(xlabel="share of the updates", ylabel="layer")
    axes.set_yticks([0.5, layers - 0.5], [0, layers - 1])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return plot


def draw_curves(records, names):
    """Best dev score so far against FLOPs, of which 1 is what `pt` spends.

    Means of tasks and seeds, for some schedules, with a panel for each record.
    """
    plot = Figure(figsize=(1.2 + 2.4 * len(records), 3.4), layout="constrained")
    panels = plot.subplots(1, len(records), sharey=True, squeeze=False)[0]
    colors, styles = {"cr": "0.35", "fast": "0.1"}, {"cr": "--", "fast": ":"}
    for axes, title in zip(panels, records, strict=True):
        cells = pandas.DataFrame(unchanged(records[title]))
        cells = cells.set_index(["schedule", "task", "seed"])
        ends = cells.flops["pt"].str[-1]
        for name in names:
            rows = cells.loc[name]  # one for each task and seed
            flops = pandas.DataFrame(rows.flops.to_list(), rows.index)
            dev = pandas.DataFrame(rows.dev.to_list(), rows.index)
            x = flops.div(ends, axis=0).mean().to_list()
            y = dev.cummax(axis=1).mean().to_list()
            how = {"color": colors.get(name, "black"), "ls": styles.get(name, "-")}
            how |= {"lw": 2.2, "marker": "o", "markevery": [-1]}
            axes.plot(x, y, **how, label=f"{name}: {y[-1]:.1f}")
        axes.set(title=title, xlabel="training FLOPs (1: all of pt's)", xlim=(0, 1.03))
        axes.legend(loc="lower right", frameon=False)
    panels[0].set_ylabel("best dev score so far, %")
    return plot


def write_tables():
    """Write evidence/README.md and the pictures anew."""
    (HERE / "README.md").write_text(readme())
    default = load("default")
    default["cells"] = [cell for cell in default["cells"] if cell["seed"] >= 8]
    default = {"the default command, seeds 8 to 31": default}
    studies = {"shipped": load("study"), "brittle": load("study-whole")}
    draw_schedule().savefig(HERE / "schedule.png", dpi=120)
    draw_curves(default, ["pt", "cr"]).savefig(HERE / "default.png", dpi=120)
    draw_curves(studies, MOST).savefig(HERE / "study.png", dpi=120)


# ====== Command line ==================================================================


def make_parser():
    parser = argparse.ArgumentParser("study.py", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder of the study")
    what.add_argument("--show", type=Path, help="print the tables of a study.json")
    what.add_argument("--tables", action="store_true", help="write README.md anew")
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="(all)")
    add("--seed", type=int, nargs="+", default=list(range(8)), help="(0 to 7)")
    add("--model", type=Path, default=fpt.MICRO / "model", help="(the shipped one)")
    add("--steps", type=int, default=600, help="updates; half in the part change (600)")
    add("--eval-every", type=int, default=20, help="(20)")
    add("--processes", type=int, default=2, help="(2)")
    return parser


def run(args):
    """Run all cells that are asked for, and write the record of them."""
    make.main(["--tasks", str(args.out / "tasks")])  # the same bytes each time
    machine = bench.machine(torch.device("cpu"))
    record = {"machine": machine, "minutes": 0, "cells": []}
    jobs = cells(args.part, args.seed)
    fork = multiprocessing.get_context("fork")
    with futures.ProcessPoolExecutor(args.processes, fork) as pool:
        for row in pool.map(functools.partial(run_cell, args), jobs):
            record["cells"].append(row)
            print(f"{len(record['cells'])}/{len(jobs)}", json.dumps(row), flush=True)
        if "transfer" in args.part:
            pairs = itertools.product(REPORTED, args.seed[:5])
            of_pt = [Cell(task, "pt", "", seed) for task, seed in pairs]
            rows = pool.map(functools.partial(transfer, args), of_pt)
            record["transfer"] = list(rows)
            record["cosines"] = cosines(args)
    seconds = sum(cell["seconds"] for cell in record["cells"])
    record["minutes"] = round(seconds / 60)
    bench.write_record(args.out / "study.json", record)
    print(tables(record))


def main(args):
    if args.show:
        print(tables(json.loads(args.show.read_text())))
    elif args.tables:
        write_tables()
    else:
        run(args)


if __name__ == "__main__":
    main(make_parser().parse_args())
