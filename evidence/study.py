"""The study behind the tutorial's tables, on a micro model: python evidence/study.py --out FOLDER

A cell is one run of `fpt.tune`: a task, a schedule, a seed, and at most one change to the method.
Cells that FOLDER has are kept, so a stopped study goes on. What they say together goes to
FOLDER/study.json; `--show study.json` prints the tables of one. All of it takes some three hours
on two cores; --part and --seed take less.

table     prompt tuning on fixed partial models (the paper's Table 1), and the presets (Table 2)
change    `cr` in half the updates, with one thing done otherwise, and without its partial stages
transfer  every prompt of the part table on every partial model, and their cosines
search    schedules, on tasks that are not reported elsewhere, seeds 0 to 2: what chose `fast`
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "micro")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

import fpt  # noqa: E402
import make  # noqa: E402

REPORTED, CHOOSING = ("slot", "present", "word", "told"), ("rte", "same")
SIZES = (0.25, 0.5, 0.75)
FIXED = ("pt", *(f"{size:g}x1:1" for size in SIZES), *(f"1x{size:g}:1" for size in SIZES),
         *(f"{size:g}x{size:g}:1" for size in SIZES))
PRESETS = ("ld", "fr", "cr", "fast")
SETTINGS = {"steps": 600, "eval_every": 20, "dev": 200, "limit": 500, "threads": 1,
            "device": "cpu"}
SHORT = 300  # updates of the part change: after 600 most tasks are solved, whatever one changes

# ====== One change at a time ======================================================================


def nested(total: int, keep: int) -> list[int]:
    """Each set contains the smaller ones: layers are added where the widest gap is."""
    kept = [0, total - 1][:keep]
    while len(kept) < keep:
        gaps = [(b - a, -a) for a, b in itertools.pairwise(kept)]
        width, start = max(gaps)
        kept = sorted([*kept, -start + width // 2])
    return kept


def first(total: int, keep: int) -> list[int]:
    """The lowest layers."""
    return list(range(keep))


def random_layers(seed: int):
    """Layer 0, which owns the position bias, and others drawn anew for each size."""
    def rule(total, keep):
        drawn = torch.randperm(total - 1, generator=fpt.rng(seed, "layers", keep)) + 1
        return sorted([0, *drawn[:keep - 1].tolist()])
    return rule


def by_output(model, prompt, batches):
    """Activation times the norm of what the neuron writes: its column of `wo`."""
    scores = SCORES(model, prompt, batches)
    return {side: [row * block.layer[-1].DenseReluDense.wo.weight.norm(dim=0) for row, block in
                   zip(rows, getattr(model, side).block)] for side, rows in scores.items()}


def at_random(model, prompt, batches):
    """Neurons in a random order, another for each prompt."""
    generator = fpt.rng(prompt.sum().item(), "neurons")
    return {side: [torch.rand(len(row), generator=generator) for row in rows]
            for side, rows in SCORES(model, prompt, batches).items()}


def at_growth(change):
    """`fpt.update`, with `change(optimizer, age)` before it: `age` updates since the growth."""
    seen = {"model": None, "age": 0, "grown": False}

    def update(partial, full, prompt, optimizer, *rest):
        if partial is not seen["model"]:
            seen.update(model=partial, age=0, grown=seen["model"] is not None)
        if seen["grown"]:
            change(optimizer, seen["age"])
        seen["age"] += 1
        UPDATE(partial, full, prompt, optimizer, *rest)
    return update


def reset(optimizer, age):
    """The optimiser forgets what it knows of the smaller model's gradients."""
    if age == 0:
        optimizer.state.clear()


def warm(optimizer, age):
    """The rate goes up over 20 updates."""
    optimizer.param_groups[0]["lr"] = fpt.Config.lr * min(1, (age + 1) / 20)


@functools.cache
def by_loss(seed, window: int = 10, least: float = 0.05):
    """`stage_at` and `update` for stages that end when their training loss stops falling.

    That is when the mean loss of ten updates is not 5 % below the lowest before it; at the latest
    where the schedule says. It costs nothing: the dev part is not asked.
    """
    seen = {"stage": 0, "losses": []}

    def stage_at(schedule, step, steps):
        if step == 1:
            seen.update(stage=0, losses=[])
        means = [mean(seen["losses"][i:i + window]) for i in range(0, len(seen["losses"]), window)]
        full = len(seen["losses"]) % window == 0 and len(means) > 1
        late = len(seen["losses"]) >= schedule[seen["stage"]].share * steps
        if seen["stage"] < len(schedule) - 1 and (
                late or full and means[-1] > (1 - least) * min(means[:-1])):
            seen.update(stage=seen["stage"] + 1, losses=[])
        return seen["stage"]

    def update(partial, full, prompt, optimizer, batch, config, run, folder):
        UPDATE(partial, full, prompt, optimizer, batch, config, run, folder)
        seen["losses"].append(run.losses[-1])
    return stage_at, update


SCORES, UPDATE = fpt.neuron_scores, fpt.update
CHANGES = {  # name: (what of fpt is replaced, from the seed; settings; schedule)
    "none": ({}, {}, "cr"),
    "layers nested": ({"kept_layers": lambda seed: nested}, {}, "cr"),
    "layers first": ({"kept_layers": lambda seed: first}, {}, "cr"),
    "layers random": ({"kept_layers": random_layers}, {}, "cr"),
    "neurons by output": ({"neuron_scores": lambda seed: by_output}, {}, "cr"),
    "neurons random": ({"neuron_scores": lambda seed: at_random}, {}, "cr"),
    "scored on 8": ({}, {"score_examples": 8}, "cr"),
    "scored on 512": ({}, {"score_examples": 512}, "cr"),
    "two stages": ({}, {}, "0.5x0.5:0.6,1x1:0.4"),
    "eight stages": ({}, {}, ",".join(f"{k / 8:g}x{k / 8:g}:{0.6 / 7 if k < 8 else 0.4:.9f}"
                                      for k in range(1, 9))),
    "shares 10 10 10 70": ({}, {}, "0.25x0.25:0.1,0.5x0.5:0.1,0.75x0.75:0.1,1x1:0.7"),
    "shares 30 30 30 10": ({}, {}, "0.25x0.25:0.3,0.5x0.5:0.3,0.75x0.75:0.3,1x1:0.1"),
    "grown by its loss": ({"stage_at": lambda seed: by_loss(seed)[0],
                           "update": lambda seed: by_loss(seed)[1]}, {}, "cr"),
    "optimiser reset": ({"update": lambda seed: at_growth(reset)}, {}, "cr"),
    "warm-up": ({"update": lambda seed: at_growth(warm)}, {}, "cr"),
    "start vocab": ({}, {"init": "vocab"}, "cr"),
    "start labels": ({}, {"init": "labels"}, "cr"),
    "length 5": ({}, {"prompt_length": 5}, "cr"),
    "length 50": ({}, {"prompt_length": 50}, "cr"),
    "pt": ({}, {}, "pt"),
    "pt, the FLOPs of cr": ({}, {"steps": 191}, "pt"),  # 0.637 of 300
    "pt, the full updates alone": ({}, {"steps": 120}, "pt"),  # 0.4 of 300
    "pt, start vocab": ({}, {"init": "vocab"}, "pt"),
    "pt, start labels": ({}, {"init": "labels"}, "pt"),
    "pt, length 5": ({}, {"prompt_length": 5}, "pt"),
    "pt, length 50": ({}, {"prompt_length": 50}, "pt"),
}

STARTS = [name for name in CHANGES if name.startswith(("pt, start", "pt, length"))]

# ====== Cells =====================================================================================


def cells(parts, seeds) -> list[tuple[str, str, str, int]]:
    """(task, schedule, change, seed), the most telling first."""
    found = []
    for seed in seeds:
        if "table" in parts:
            found += [(task, schedule, "", seed) for task in REPORTED
                      for schedule in (*FIXED, *PRESETS)]
        if "change" in parts:
            found += [(task, schedule, name, seed) for task in REPORTED
                      for name, (_, _, schedule) in CHANGES.items()]
        if "search" in parts and seed < 3:
            found += [(task, schedule, "", seed) for task in CHOOSING for schedule in SEARCH]
    return found


SEARCH = ("pt", "ld", "fr", "cr", *(f"{small:g}x{small:g}:{share:g},1x1:{1 - share:g}"
                                    for small in (0.25, 0.5) for share in (0.6, 0.8, 0.9)),
          "0.25x0.25:0.4,0.5x0.5:0.4,1x1:0.2", "0.25x0.25:0.3,0.5x0.5:0.3,0.75x0.75:0.2,1x1:0.2",
          "0.25x0.25:0.3,0.5x0.5:0.3,0.75x0.75:0.3,1x1:0.1")


def place(out: Path, task, schedule, change, seed) -> Path:
    """The folder of a cell's run."""
    return out / "runs" / task / fpt.run_name(f"{change.replace(' ', '-') or 'as-is'},{schedule}",
                                              seed)


def task_folder(out: Path, task: str) -> str:
    return str(ROOT / "micro" / "rte" if task == "rte" else out / "tasks" / task)


def run_cell(job) -> dict:
    """Train, unless it was done before. -> what the study keeps of it."""
    out, (task, schedule, change, seed) = job
    torch.set_num_threads(1)
    replaced, settings, _ = CHANGES.get(change, ({}, {}, ""))
    settings = {"steps": SHORT, **settings} if change else {}
    folder = place(out, task, schedule, change, seed)
    if not (folder / "results.json").exists():
        if replaced and folder.exists():  # a change does not know what it did before a stop
            shutil.rmtree(folder)
        config = fpt.Config(**{**SETTINGS, **settings, "task": task_folder(out, task)})
        data = fpt.load_data(config.task, config.dev, config.limit)
        model, tokenizer = fpt.load_model(config.model, torch.device("cpu"), "fp32")
        folder.mkdir(parents=True, exist_ok=True)
        usual = {name: getattr(fpt, name) for name in replaced}
        try:
            for name, make_it in replaced.items():
                setattr(fpt, name, make_it(seed))
            with contextlib.redirect_stdout(io.StringIO()):
                fpt.tune(model, tokenizer, schedule, data, config, seed, folder)
        finally:
            for name, function in usual.items():
                setattr(fpt, name, function)
    run = fpt.read_run(folder)
    keep = {key: [row[key] for row in run["curve"]] for key in ("step", "best")}
    keep["flops"] = [round(row["flops"] / 1e6) for row in run["curve"]]  # in millions
    return {"task": task, "schedule": schedule, "change": change, "seed": seed, **keep,
            "validation": fpt.main_score(run["validation"]),
            "seconds": round(run["train_seconds"], 1), "full_updates": run["full_updates"]}


def transfer(job) -> dict:
    """The chosen prompts of the fixed models of a task and a seed, each on every one of them."""
    out, (task, seed) = job
    torch.set_num_threads(1)
    config = fpt.Config(**{**SETTINGS, "task": task_folder(out, task)})
    data = fpt.load_data(config.task, config.dev, config.limit)
    model, tokenizer = fpt.load_model(config.model, torch.device("cpu"), "fp32")
    start = fpt.start_prompt(model, tokenizer, data.task, config, seed)
    scores, _ = fpt.score_on_train(model, tokenizer, fpt.SoftPrompt(start), data, config, seed)
    matrix, last = [], {}
    models = [fpt.absorbed(fpt.partial_t5(model, *fpt.parse_schedule(name)[0][:2], scores, False))
              for name in FIXED]
    for schedule in FIXED:
        folder = place(out, task, schedule, "", seed)
        prompt = fpt.SoftPrompt(fpt.load_prompt(folder / "prompt"))
        last[schedule] = fpt.load_prompt(folder / "prompt-last").flatten().tolist()
        matrix.append([])
        for partial in models:
            found, _ = fpt.evaluate(partial, prompt, tokenizer, data.task, data.validation, config)
            matrix[-1].append(fpt.main_score(found))
    return {"task": task, "seed": seed, "models": FIXED, "validation": matrix, "last": last}


def cosines(found: list[dict]) -> dict:
    """Of last prompts: `fpt.similarity` of each task, and the control that it cannot have."""
    runs = [{"task": row["task"], "seed": row["seed"], "schedule": name,
             "prompt": torch.tensor(prompt)}
            for row in found for name, prompt in row["last"].items()]
    plain = [run for run in runs if run["schedule"] == "pt"]
    other = [torch.cosine_similarity(a["prompt"], b["prompt"], dim=0).item()
             for a, b in itertools.combinations(plain, 2)
             if a["task"] != b["task"] and a["seed"] == b["seed"]]
    return {"other_task": mean(other), "by_task": {task: fpt.similarity(
        [run for run in runs if run["task"] == task]) for task in {run["task"] for run in runs}}}


# ====== Tables ====================================================================================

# T5-LARGE in the paper's Tables 1 and 2: MNLI, QQP (labels, as here: the decoder stays whole), the
# mean of its five tasks, FLOPs in percent; of schedules the column "Improve" as well.
PAPER = dict(zip((*FIXED, "ld", "fr", "cr"), (
    (86.07, 87.26, 71.51, 100), (60.34, 78.29, 45.78, 30), (63.90, 80.64, 51.24, 54),
    (81.41, 86.05, 62.76, 77), (78.18, 85.19, 63.08, 58), (82.62, 86.45, 68.19, 72),
    (84.93, 86.77, 70.41, 86), (62.53, 78.38, 46.00, 20), (64.09, 78.91, 48.45, 40),
    (80.63, 86.32, 62.30, 66), (85.72, 86.51, 70.92, 72, 0.11), (86.49, 87.11, 71.50, 83, 0.49),
    (85.13, 86.40, 70.87, 65, 0.38))))
OF_PAPER = "paper: labels", "paper: five tasks", "paper: FLOPs"


def paper(name: str) -> list[str]:
    """What the paper's PT loses: on MNLI and QQP, on five tasks; and the FLOPs of the row."""
    if name not in PAPER:
        return ["", "", ""]
    row, plain = PAPER[name], PAPER["pt"]
    lost = [f"{round(mean(row[part]) - mean(plain[part]), 1) + 0.0:+.1f}"  # 0.0: no "-0.0"
            for part in (slice(2), slice(2, 3))]
    return [*(lost if name != "pt" else ["", ""]), f"{row[3] / 100:.2f}"]


def compared(record: dict, tasks, changes: bool = False) -> dict[str, dict]:
    """{task: {schedule, or change: its row of `fpt.compare`}}, with the FLOPs to all of `pt`."""
    found = {}
    for task in tasks:
        runs = [{**cell, "schedule": cell["change"] or cell["schedule"],
                 "dev": {"accuracy": cell["best"][-1]}, "train_seconds": cell["seconds"],
                 "validation": {"accuracy": cell["validation"]}, "scored_on_full_model": None,
                 "curve": [dict(zip(("step", "flops", "best"), row)) for row in zip(
                     cell["step"], cell["flops"], cell["best"])]}
                for cell in record["cells"] if cell["task"] == task
                and bool(cell["change"]) == changes]
        groups = fpt.by_schedule(sorted(runs, key=lambda run: run["seed"]))
        seeds = [run["seed"] for run in groups.get("pt", [])]
        rows = fpt.compare([run for group in groups.values() for run in group
                            if [run["seed"] for run in group] == seeds])
        goal = fpt.mean_curve(groups["pt"], "best")[-1] if rows else 0
        own = fpt.flops_to(groups["pt"], goal) if rows else 0
        for row in rows:
            reached = fpt.flops_to(groups[row["schedule"]], goal)
            row["flops_to_all"] = reached and reached / own
        found[task] = {row["schedule"]: row for row in rows}
    return found


def over_tasks(found: dict, name: str, key: str) -> list[float]:
    """A value of each seed, as the mean over the tasks."""
    return [mean(values) for values in zip(*(rows[name][key] for rows in found.values()),
                                           strict=True)]


def pooled(found: dict, name: str, key: str, base: str | None = None) -> str:
    """Mean and 95 % interval over all pairs of a task and a seed; nothing for the base itself."""
    if name == base:
        return ""
    values = [value - (rows[base][key][i] if base else 0) for rows in found.values()
              for i, value in enumerate(rows[name][key])]
    bounds = fpt.interval(values)
    return f"{mean(values):+.1f}" + (f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else "")


def goals(found: dict, name: str, key: str) -> list[str]:
    """FLOPs to a score, task by task, and their mean; "never" if one never gets there."""
    values = [rows[name][key] for rows in found.values()]
    values.append(None if None in values else mean(values))
    return [f"{value:.2f}" if value else "never" for value in values]


def scores(found: dict, name: str) -> list[str]:
    """Validation, task by task, and of the mean over the tasks."""
    return [fpt.spread(rows[name]["validation"]) for rows in found.values()] + [
        fpt.spread(over_tasks(found, name, "validation"))]


def share(found: dict, name: str, key: str = "flops") -> str:
    """FLOPs or seconds over those of `pt`."""
    return f"{mean(over_tasks(found, name, key)):.{3 if key == 'flops' else 2}f}"


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([title, ""] + ["| " + " | ".join(row) + " |" for row in (
        head, ["---"] * len(head), *rows)]) + "\n"


def table_1(record: dict) -> str:
    """Prompt tuning on fixed partial models, each scored on its own."""
    found = compared(record, REPORTED)
    known = [name for name in FIXED if all(name in rows for rows in found.values())]
    return markdown("Fixed partial models", [
        "depth x width", *found, "mean", "less `pt` [95 %]", "FLOPs", *OF_PAPER], [
        [f"`{name}`", *scores(found, name), pooled(found, name, "validation", "pt"),
         share(found, name), *paper(name)] for name in known])


def table_2(record: dict) -> str:
    """Schedules on the full model: what they reach, and what it costs beside `pt`."""
    found = compared(record, REPORTED)
    known = [name for name in PRESETS if all(name in rows for rows in found.values())]
    return "\n".join([markdown("Schedules", [
        "schedule", *found, "mean", "less `pt` [95 %]", "FLOPs", "seconds", *OF_PAPER], [
        [f"`{name}`", *scores(found, name), pooled(found, name, "validation", "pt"),
         share(found, name), share(found, name, "seconds"), *paper(name)]
        for name in ("pt", *known)]),
        markdown("Against `pt` stopped early", [
            "schedule", "`pt` at the same FLOPs", *(f"gain: {task}" for task in found),
            "mean gain [95 %]", "paper's", "full updates alone"], [
            [f"`{name}`", fpt.spread(over_tasks(found, name, "pt_equal_flops")),
             *(f"{mean(rows[name]['gain']):+.1f}" for rows in found.values()),
             pooled(found, name, "gain"), *(f"{x:+.2f}" for x in PAPER.get(name, [""] * 4)[4:]),
             *[""] * (name not in PAPER),
             fpt.spread(over_tasks(found, name, "pt_full_updates"))] for name in known]),
        markdown("FLOPs to 99 % of the score of `pt`, over those of `pt`; and to all of it", [
            "schedule", *found, "mean", "mean, to all of it"], [
            [f"`{name}`", *goals(found, name, "flops_to_pt"),
             goals(found, name, "flops_to_all")[-1]] for name in known])])


def table_changes(record: dict) -> str:
    """`cr` and `pt` with one thing done otherwise, in fewer updates."""
    found = compared(record, REPORTED, changes=True)
    return markdown("One change", ["change", *found, "mean", "less unchanged [95 %]", "FLOPs",
                                   "to 99 % of `pt`"], [
        [name, *scores(found, name),
         pooled(found, name, "validation", "pt" if name in STARTS else "none"),
         share(found, name), goals(found, name, "flops_to_pt")[-1]]
        for name in CHANGES if all(name in rows for rows in found.values())])


def table_search(record: dict) -> str:
    """Schedules on the choosing tasks."""
    found = compared(record, CHOOSING)
    return markdown("Schedules on the choosing tasks", [
        "schedule", *found, "mean", "FLOPs", *(f"99 % of `pt`: {task}" for task in found),
        "mean"], [
        [f"`{name}`", *scores(found, name), share(found, name),
         *goals(found, name, "flops_to_pt")]
        for name in SEARCH if all(name in rows for rows in found.values())])


COMPOUND = ("0.25x0.25:1", "0.5x0.5:1", "0.75x0.75:1", "pt")


def transferred(record: dict) -> list[list[float]]:
    """Validation of the prompts of each of FIXED (rows) on each of them: mean of tasks, seeds."""
    return [[mean(row["validation"][i][j] for row in record["transfer"])
             for j in range(len(FIXED))] for i in range(len(FIXED))]


def table_transfer(record: dict) -> str:
    """The part of `transferred` that `cr` is made of; and how alike these prompts are."""
    found = transferred(record)
    return "\n".join([markdown("A prompt of one model on another", [
        "trained on", *(f"on `{name}`" for name in COMPOUND)], [
        [f"`{name}`", *(f"{found[FIXED.index(name)][FIXED.index(other)]:.1f}"
                        for other in COMPOUND)] for name in COMPOUND]),
        markdown("Cosine with the last prompt of `pt`", [
            *(f"`{name}`, same seed" for name in COMPOUND[:3]), "`pt`, other seed",
            "`pt`, other task", "random"], [
            [f"{value:.3f}" for value in (
                *(cosine(record, ["pt", name], "same_seed") for name in COMPOUND[:3]),
                cosine(record, ["pt", "pt"], "other_seed"), record["cosines"]["other_task"],
                cosine(record, ["random"], "other_seed"))]])])


def cosine(record: dict, schedules: list[str], which: str) -> float:
    """A row of `fpt.similarity`, as the mean over the tasks."""
    return mean(row[which] for rows in record["cosines"]["by_task"].values() for row in rows
                if row["schedules"] == schedules)


def tables(record: dict) -> str:
    """All that the record has cells for, as Markdown."""
    makers = {table_1: (REPORTED, False), table_2: (REPORTED, False),
              table_changes: (REPORTED, True), table_search: (CHOOSING, False)}
    text = [maker(record) for maker, (tasks, changes) in makers.items()
            if all(compared(record, tasks, changes).values())]
    if "transfer" in record:
        text.append(table_transfer(record))
    return "\n".join(text)


def make_parser():
    """The flags."""
    parser = argparse.ArgumentParser("study.py", description=__doc__.splitlines()[0])
    parser.error = lambda text: parser.exit(2, f"study.py: error: {text}; see --help\n")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder of the study")
    what.add_argument("--show", type=Path, help="print the tables of a study.json, run nothing")
    parser.add_argument("--part", nargs="+", choices=("table", "change", "transfer", "search"),
                        default=["table", "change", "transfer", "search"], help="(default: all)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4],
                        help="(default: 0 1 2 3 4)")
    parser.add_argument("--model", type=Path, default=ROOT / "micro" / "model",
                        help="another micro model (default: the shipped one)")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"],
                        help="updates of the parts table and search (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=SETTINGS["eval_every"],
                        help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="at a time (default: 2)")
    return parser


def main(args) -> None:
    if args.show:
        print(tables(json.loads(args.show.read_text())))
        return
    out, fork = args.out, multiprocessing.get_context("fork")
    make.main(["--tasks", str(out / "tasks")])  # the same bytes each time
    SETTINGS.update(model=str(args.model.resolve()), steps=args.steps, eval_every=args.eval_every)
    model = fpt.fingerprint(*fpt.load_model(SETTINGS["model"], torch.device("cpu"), "fp32"))
    record = {"settings": {**SETTINGS, "model": model["weights"]}, "versions": fpt.versions(),
              "cells": []}
    with fork.Pool(args.processes) as pool:
        jobs = [(out, cell) for cell in cells(args.part, args.seed)]
        for number, row in enumerate(pool.imap(run_cell, jobs), 1):
            record["cells"].append(row)
            print(f"{number}/{len(jobs)}  {row['task']:<8} {row['schedule'][:24]:<24} "
                  f"{row['change']:<20} seed {row['seed']}  dev {row['best'][-1]:5.1f}  "
                  f"validation {row['validation']:5.1f}", flush=True)
        if "transfer" in args.part:
            found = pool.map(transfer, [(out, pair) for pair in itertools.product(
                REPORTED, args.seed)], chunksize=1)
            record["cosines"] = cosines(found)
            record["transfer"] = [{k: v for k, v in row.items() if k != "last"} for row in found]
    fpt.write(out / "study.json", json.dumps(record))
    print(f"{tables(record)}\n{len(record['cells'])} cells: {out / 'study.json'}")


if __name__ == "__main__":
    main(make_parser().parse_args())
