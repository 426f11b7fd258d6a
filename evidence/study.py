"""The study behind the tutorial's tables, on a micro model: python evidence/study.py --out FOLDER

A cell is one run of `fpt.main`: a task, a schedule, a seed, and at most one change to the method.
Cells that FOLDER has are kept, so a stopped study goes on. What they say together goes to
FOLDER/study.json. All of it takes some three hours on two cores; --part and --seed take less.

table     prompt tuning on fixed partial models (the paper's Table 1), and the presets (Table 2)
change    `cr` in half the updates, with one thing done otherwise, and without its partial stages
transfer  every prompt of the part table on every partial model, and their cosines
search    schedules, on tasks that are not reported elsewhere, seeds 0 to 2: what chose `fast`

--show study.json prints the tables of a record, --draw FOLDER the figures of two.
"""

import argparse, collections, contextlib, itertools, json, math  # noqa: E401
import multiprocessing, re, shutil, sys, zlib  # noqa: E401
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "micro")]

import pandas, torch  # noqa: E401, E402
from matplotlib.figure import Figure  # noqa: E402
from scipy import stats  # noqa: E402

import fpt, make  # noqa: E401, E402

PARTS = ("table", "change", "transfer", "search")
REPORTED, CHOOSING = ("slot", "present", "word", "told"), ("entailment", "same")
FIXED = ("pt", "0.25x1:1", "0.5x1:1", "0.75x1:1", "1x0.25:1", "1x0.5:1", "1x0.75:1",
         "0.25x0.25:1", "0.5x0.5:1", "0.75x0.75:1")
COMPOUND, PRESETS = [*FIXED[-3:], "pt"], ["ld", "fr", "cr", "fast"]
SEARCH = ("pt", "ld", "fr", "cr", *(f"{small:g}x{small:g}:{share:g},1x1:{1 - share:g}"
                                    for small in (0.25, 0.5) for share in (0.6, 0.8, 0.9)),
          "0.25x0.25:0.4,0.5x0.5:0.4,1x1:0.2", "0.25x0.25:0.3,0.5x0.5:0.3,0.75x0.75:0.2,1x1:0.2",
          "0.25x0.25:0.3,0.5x0.5:0.3,0.75x0.75:0.3,1x1:0.1")

# ====== One change at a time ======================================================================

SCORES, TRAIN = fpt.neuron_scores, fpt.train


def nested(total: int, keep: int) -> list[int]:
    """Each set contains the smaller ones: layers are added where the widest gap is."""
    kept = [0, total - 1][:keep]
    while len(kept) < keep:
        width, start = max((b - a, -a) for a, b in itertools.pairwise(kept))
        kept = sorted([*kept, -start + width // 2])
    return kept


def random_layers(seed: int, total: int, keep: int) -> list[int]:
    """Layer 0, which owns the position bias, and others drawn anew for each seed and size."""
    drawn = torch.randperm(total - 1, generator=fpt.rng(seed, "layers", keep)) + 1
    return sorted([0, *drawn[:keep - 1].tolist()])


def random_neurons(model, prompt, batches):
    """Neurons in a random order, another for each prompt."""
    generator = fpt.rng(prompt.sum().item(), "neurons")
    return {side: [torch.rand(len(row), generator=generator) for row in rows]
            for side, rows in SCORES(model, prompt, batches).items()}


def forgetful(*args, **more):
    """`fpt.train` with an optimiser that forgets, at each growth, the smaller model's gradients."""
    optimizer, schedule, steps = args[2], args[3], args[7]
    for run in TRAIN(*args, **more):
        yield run
        stage, coming = (fpt.stage_at(schedule, run["step"] + i, steps) for i in (0, 1))
        if coming > stage:
            optimizer.state.clear()


class Change(NamedTuple):
    """A schedule, its share of the updates, flags, and what of fpt is replaced, from the seed."""

    schedule: str = "cr"
    share: float = 1.0
    flags: tuple[str, ...] = ()
    replaced: Callable = lambda seed: {}


CHANGES = {
    "none": Change(),
    "layers nested": Change(replaced=lambda seed: {"kept_layers": nested}),
    "layers random": Change(replaced=lambda seed: {"kept_layers": partial(random_layers, seed)}),
    "neurons random": Change(replaced=lambda seed: {"neuron_scores": random_neurons}),
    "optimiser reset": Change(replaced=lambda seed: {"train": forgetful}),
    "start labels": Change(flags=("--init", "labels")),
    **{f"length {P}": Change(flags=("--prompt-length", P)) for P in ("5", "50")},
    "pt": Change("pt"),
    "pt, the FLOPs of cr": Change("pt", 0.637),  # measured, on these tasks
    "pt, the full updates alone": Change("pt", 0.4),
    "pt, start labels": Change("pt", flags=("--init", "labels")),
    **{f"pt, length {P}": Change("pt", flags=("--prompt-length", P)) for P in ("5", "50")},
}

# ====== Cells =====================================================================================


def cells(parts, seeds) -> list[tuple[str, str, str, int]]:
    """(task, schedule, change, seed), the most telling first."""
    plain = [(name, "") for name in (*FIXED, *PRESETS) if {"table", "transfer"} & set(parts)]
    changed = [(change.schedule, name) for name, change in CHANGES.items() if "change" in parts]
    return [(task, *kind, seed) for seed in seeds for kinds, tasks in (
        (plain, REPORTED), (changed, REPORTED),
        ([(name, "") for name in SEARCH if "search" in parts and seed < 3], CHOOSING))
        for task in tasks for kind in kinds]


def place(out: Path, task, schedule, change, seed) -> Path:
    """The folder of a cell's command."""
    return out / "runs" / task / re.sub("[:, ]+", "_", f"{change or 'as is'} {schedule} {seed}")


def run_cell(args, cell) -> dict:
    """Train, unless it was done before. -> what the study keeps of it."""
    task, schedule, name, seed = cell
    change, folder = CHANGES.get(name, Change()), place(args.out, *cell)
    tasks = ROOT / "micro" if task == "entailment" else args.out / "tasks"
    steps = round(args.steps / 2 * change.share) if name else args.steps
    if not list(folder.glob("*/results.json")):
        shutil.rmtree(folder, ignore_errors=True)  # a change does not know what came before a stop
        with mock.patch.dict(vars(fpt), change.replaced(seed)), contextlib.redirect_stdout(None):
            fpt.main(["--model", str(args.model), "--task", str(tasks / task), "--out", str(folder),
                      "--schedule", schedule, "--seed", str(seed), "--steps", str(steps),
                      "--eval-every", str(args.eval_every), "--dev", "200", "--limit", "500",
                      "--threads", "1", "--device", "cpu", *change.flags])
    [path] = folder.glob("*/results.json")
    run = json.loads(path.read_text())
    kept = {key: [row[key] for row in run["log"]] for key in ("step", "best", "flops")}
    return {"task": task, "schedule": schedule, "change": name, "seed": seed, **kept,
            "validation": fpt.main_score(run["validation"]), "full_updates": run["full_steps"],
            "seconds": run["seconds"]}


def prompt_of(args, task, schedule, seed):
    """The chosen prompt [P, d] of a cell without a change."""
    return fpt.load_prompt(next(place(args.out, task, schedule, "", seed).glob("*/prompt")))


def transfer(args, task, seed) -> dict:
    """The chosen prompts of the fixed models of a task and a seed, each on every one of them."""
    config = fpt.parse_args(["--resume", str(place(args.out, task, "pt", "", seed))])
    model, tokenizer, (labels, train, _, validation), starts, _ = fpt.prepare(config)
    rows = fpt.batches(train, lambda part: fpt.encode(tokenizer, labels, config.max_source, part),
                       f"scores {seed}", config.batch, pool=1)  # as `fpt.tune` draws them
    scores = fpt.neuron_scores(model, starts[seed], [rows(1), rows(2)])
    matrix = [[] for _ in FIXED]
    for name in FIXED:
        part = fpt.partial_t5(model, *fpt.parse_schedule(name)[0][:2], scores, decoder=False)
        for row, trained_on in zip(matrix, FIXED):
            prompt = fpt.SoftPrompt(prompt_of(args, task, trained_on, seed))
            found, _ = fpt.evaluate(part, prompt, tokenizer, labels, validation, config)
            row.append(fpt.main_score(found))
    return {"task": task, "seed": seed, "models": FIXED, "validation": matrix}


def cosines(args) -> dict[str, float]:
    """Of chosen prompts, flattened, with that of `pt`, which shares their start and their batches:
    mean of tasks and seeds. Controls: `pt` of another seed, of another task, random prompts.
    """
    found, prompts = collections.defaultdict(list), {
        key: prompt_of(args, *key).flatten()
        for key in itertools.product(REPORTED, COMPOUND, args.seed)}
    for first, second in itertools.permutations(prompts, 2):
        same = "".join("=" if a == b else "x" for a, b in zip(first, second))  # task, model, seed
        title = {"=x=": f"`{first[1]}`, same seed", "==x": "`pt`, other seed",
                 "x==": "`pt`, other task"}.get(same)
        if title and second[1] == "pt":
            found[title].append(torch.cosine_similarity(prompts[first], prompts[second], dim=0))
    drawn = torch.randn(2, 100, len(prompts[first]), generator=fpt.rng("random prompts"))
    found["random"] = torch.cosine_similarity(*drawn, dim=1)
    return {title: sum(values).item() / len(values) for title, values in found.items()}


# ====== Tables ====================================================================================

# T5-LARGE in the paper's Tables 1 and 2, less its own PT: on MNLI and QQP (labels, as here: the
# decoder stays whole), on all five tasks; FLOPs over those of PT; of schedules "Improve" as well.
PAPER = pandas.DataFrame([row.split() for row in (
    "- - 1.00 -", "-17.3 -25.7 0.30 -", "-14.4 -20.3 0.54 -", "-2.9 -8.8 0.77 -",
    "-5.0 -8.4 0.58 -", "-2.1 -3.3 0.72 -", "-0.8 -1.1 0.86 -", "-16.2 -25.5 0.20 -",
    "-15.2 -23.1 0.40 -", "-3.2 -9.2 0.66 -", "-0.5 -0.6 0.72 +0.11", "+0.1 +0.0 0.83 +0.49",
    "-0.9 -0.6 0.65 +0.38", "- - - -")], [*FIXED, *PRESETS],
    ["paper: labels", "paper: five tasks", "paper: FLOPs", "paper's"]).replace("-", "")


def compared(record: dict, changes: bool = False, reported: bool = True) -> pandas.DataFrame:
    """The rows of `fpt.compare`, task by task; their index is name, task and seed."""
    runs, names = collections.defaultdict(list), ("name", "task", "seed")
    for cell in record["cells"]:
        if bool(cell["change"]) == changes and (cell["task"] in REPORTED) == reported:
            log = [dict(zip(("step", "flops", "best"), row))
                   for row in zip(cell["step"], cell["flops"], cell["best"])]
            runs[cell["task"]].append(cell | {
                "schedule": cell["change"] or cell["schedule"], "log": log,
                "dev": {"": log[-1]["best"]}, "validation": {"": cell["validation"]},
                "flops": log[-1]["flops"], "full_steps": cell["full_updates"]})
    return pandas.concat([fpt.compare(rows).set_index(pandas.MultiIndex.from_tuples(
        [(row["schedule"], row["task"], row["seed"]) for row in rows], names=names))
        for rows in runs.values()] or [pandas.DataFrame()])


def per_task(frame, key: str):
    """Of one column, groups by name: a row for each seed, columns for the tasks and their mean."""
    wide = frame[key].unstack("task")[frame.index.unique("task")]
    return wide.assign(mean=wide.mean(axis=1, skipna=False)).groupby("name")


def spread(values) -> str:
    """Mean ± standard deviation over seeds, as text; the deviation needs two of them."""
    return f"{values.mean():.1f} ± {values.std():.1f}".removesuffix(" ± nan")


def pooled(values) -> str:
    """Mean and 95 % interval (Student's t) over all pairs of a task and a seed."""
    bounds = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    return "{:+.1f} [{:.1f}, {:.1f}]".format(values.mean(), *bounds)


def goals(frame):
    """FLOPs to 99 % of the last score of `pt`, over those of `pt`: medians over seeds, as text."""
    found = per_task(frame.fillna(math.inf), "to 99 %").median() / 100
    return found.map("{:.2f}".format).replace("inf", "never")


def table(frame, names, base=lambda name: "pt"):
    """Validation by task and of their mean; that less the base's, in pairs; FLOPs over `pt`'s."""
    text, scores = per_task(frame, "validation").agg(spread).loc[[*names]], frame.validation
    text["less base [95 %]"] = [pooled(scores[name] - scores[base(name)]) if name != base(name)
                                else "" for name in names]
    text["FLOPs"] = (frame.flops.groupby("name").mean() / 100).map("{:.3f}".format)
    return text


def markdown(title: str, text) -> str:
    rows = ["", *text.columns], ["---"] * (1 + len(text.columns)), *text.itertuples()
    return "\n".join([title, "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def tables(record: dict) -> str:
    """All that the record has cells for, as Markdown."""
    plain, changed = compared(record), compared(record, changes=True)
    chosen, found = compared(record, reported=False), []
    if len(plain):
        schedules = table(plain, ["pt", *PRESETS])
        schedules["seconds"] = (plain.seconds.groupby("name").mean() / 100).map("{:.2f}".format)
        gains = per_task(plain, "gain").mean().map("{:+.1f}".format).loc[PRESETS]
        gains["mean"] = [pooled(plain.gain[name]) for name in PRESETS]
        gains["paper's"] = PAPER["paper's"]
        for title, key in (("`pt`, same FLOPs", "pt, same flops"), ("full alone", "full alone")):
            gains[title] = per_task(plain, key)["mean"].agg(spread)
        found += [markdown("Fixed partial models", table(plain, FIXED).join(PAPER.iloc[:, :3])),
                  markdown("Schedules", schedules.join(PAPER.iloc[:, :3])),
                  markdown("Gain over `pt` stopped early", gains),
                  markdown("FLOPs to 99 % of the score of `pt`", goals(plain).loc[PRESETS])]
    if len(changed):
        text = table(changed, CHANGES, lambda name: (
            "pt" if name.startswith("pt,") and CHANGES[name].flags else "none"))
        found.append(markdown("One change", text))
    if len(chosen):
        text = table(chosen, SEARCH).assign(**{"to 99 %": goals(chosen)["mean"]})
        found.append(markdown("Schedules on the choosing tasks", text))
    if "transfer" in record:
        matrix = transferred(record).loc[COMPOUND, COMPOUND].map("{:.1f}".format)
        cosine = alike(record["cosines"]).map("{:.3f}".format)
        found += [markdown("Prompts (rows) on models", matrix),
                  markdown("Cosine with the prompt of `pt`", cosine)]
    return "\n".join(found)


def transferred(record: dict) -> pandas.DataFrame:
    """Validation of the prompts of FIXED (rows) on each of them: mean of tasks and seeds."""
    rows = [pandas.DataFrame(row["validation"], FIXED, FIXED) for row in record["transfer"]]
    return sum(rows) / len(rows)


def alike(found: dict) -> pandas.DataFrame:
    """`cosines` as a row."""
    if "by_task" in found:  # a record of the former code, of last prompts
        rows = pandas.DataFrame(sum(found["by_task"].values(), []))
        means = rows.groupby(rows.schedules.map(" ".join)).mean(numeric_only=True)
        found = {f"`{name}`, same seed": means.same_seed[f"pt {name}"] for name in COMPOUND[:3]} | {
            "`pt`, other seed": means.other_seed["pt pt"], "`pt`, other task": found["other_task"],
            "random": means.other_seed["random"]}
    return pandas.DataFrame(found, ["cosine"])


# ====== Figures ===================================================================================

TITLES = {"study": "shipped model", "study-whole": "made without sub-networks"}


def draw_schedule(name: str = "cr", layers: int = 12):
    """A column for each stage, as wide as its share of the updates; dark is what runs."""
    plot = Figure(figsize=(7, 3.9), layout="constrained")
    axes, start = plot.subplots(), 0.0
    for depth, width, share in fpt.SCHEDULES[name]:
        kept = fpt.kept_layers(layers, fpt.share_of(layers, depth))
        for color, rows, part in ("0.9", range(layers), 1), ("0.25", kept, width):
            axes.barh([row + 0.5 for row in rows], (share - 0.024) * part, 0.76, start + 0.012,
                      color=color)
        axes.text(start + share / 2, layers + 0.25, ha="center",
                  s=f"{len(kept)} layers,\n{100 * width:g} % of d_ff")
        start += share
    axes.annotate("", (1, -1.1), (0, -1.1), arrowprops={"arrowstyle": "->"})
    axes.text(0.5, -1, "the same prompt, the same optimiser", ha="center", va="bottom")
    axes.set(xlim=(0, 1), ylim=(-1.6, layers + 2.2), xlabel="share of the updates", ylabel="layer")
    axes.set_yticks([0.5, layers - 0.5], [0, layers - 1])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return plot


def draw_curves(records: dict[str, dict]):
    """Best dev score so far against FLOPs, as a share of what `pt` spends: mean of tasks, seeds."""
    plot = Figure(figsize=(7, 3.4), layout="constrained")
    panels = plot.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, (title, record) in zip(panels, records.items()):
        cells = pandas.DataFrame(record["cells"]).query("change == '' and task in @REPORTED")
        cells = cells.set_index(["schedule", "task", "seed"])
        ends = cells.flops["pt"].str[-1]
        for name, color, line in ("pt", "black", "-"), ("cr", "0.35", "--"), ("fast", "0.1", ":"):
            flops, best = (pandas.DataFrame(cells[key][name].to_list(), cells.loc[name].index)
                           for key in ("flops", "best"))  # a row for each task and seed
            x, y = flops.div(ends, axis=0).mean().to_list(), best.mean().to_list()
            axes.plot(x, y, line, color=color, lw=2.2, marker="o", markevery=[-1],
                      label=f"{name}: {y[-1]:.1f}")
        axes.set(title=title, xlabel="training FLOPs (1: all of pt's)", xlim=(0, 1.03))
        axes.legend(loc="lower right", frameon=False)
    panels[0].set_ylabel("best dev score so far, %")
    return plot


def draw_transfer(records: dict[str, dict]):
    """A square for each pair: dark is a high validation score, and its number is in it."""
    plot = Figure(figsize=(5.6, 5.2 * len(records)), layout="constrained")
    places, names = range(len(FIXED)), [name.removesuffix(":1") for name in FIXED]
    panels = plot.subplots(len(records), squeeze=False)[:, 0]
    for axes, (title, record) in zip(panels, records.items()):
        found = transferred(record).to_numpy()
        axes.imshow(found, cmap="Greys", vmin=30, vmax=110)
        for i, j in itertools.product(places, places):
            axes.text(j, i, f"{found[i, j]:.0f}", ha="center", va="center", fontsize=9,
                      color="white" if found[i, j] > 75 else "black")
        axes.set_xticks(places, names, rotation=60)
        axes.set_yticks(places, names)
        axes.set(title=title, xlabel="... and used, untouched, on", ylabel="prompt trained on")
    return plot


def make_parser():
    parser = argparse.ArgumentParser("study.py", description=__doc__.splitlines()[0])
    what, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    what.add_argument("--out", type=Path, help="folder of the study")
    what.add_argument("--show", type=Path, help="print the tables of a study.json, run nothing")
    what.add_argument("--draw", type=Path, help="draw the figures of the tutorial to this folder")
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="(all)")
    add("--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(%(default)s)")
    add("--model", type=Path, default=ROOT / "micro" / "model", help="a micro model (the shipped)")
    add("--steps", type=int, default=600, help="updates; of the part change half (%(default)s)")
    add("--eval-every", type=int, default=20, help="(%(default)s)")
    add("--processes", type=int, default=2, help="(%(default)s)")
    return parser


def main(args) -> None:
    if args.show:
        print(tables(json.loads(args.show.read_text())))
        return
    if args.draw:
        records = {title: json.loads(Path(__file__).with_name(f"{name}.json").read_text())
                   for name, title in TITLES.items()}
        for name, plot in (("schedule", draw_schedule()), ("study", draw_curves(records)),
                           ("transfer", draw_transfer(records))):
            plot.savefig(args.draw / f"{name}.png", dpi=150)
        return
    make.main(["--tasks", str(args.out / "tasks")])  # the same bytes each time
    record = {"settings": {key: str(value) for key, value in vars(args).items()}, "cells": [],
              "model": zlib.crc32((args.model / "model.safetensors").read_bytes())}
    jobs, fork = cells(args.part, args.seed), multiprocessing.get_context("fork")
    with futures.ProcessPoolExecutor(args.processes, fork) as pool:
        rows = pool.map(run_cell, itertools.repeat(args), jobs)
        for number, (cell, row) in enumerate(zip(jobs, rows), 1):
            record["cells"].append(row)
            print(f"{number}/{len(jobs)}", *cell, row["validation"], flush=True)
        if "transfer" in args.part:
            pairs = zip(*itertools.product(REPORTED, args.seed))
            record["transfer"] = list(pool.map(transfer, itertools.repeat(args), *pairs))
            record["cosines"] = cosines(args)
    fpt.write(args.out / "study.json", [record])
    print(f"{tables(record)}\n{len(record['cells'])} cells: {args.out / 'study.json'}")


if __name__ == "__main__":
    main(make_parser().parse_args())
