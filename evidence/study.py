"""The study behind the tutorial's tables, on the micro model: python evidence/study.py --out FOLDER

A cell is one run of `fpt.tune`: a task, a schedule, a seed, and at most one change to the method.
Cells that FOLDER has are kept, so a stopped study goes on. What they say together goes to
FOLDER/study.json. All of it takes some hours on two cores; --part and --seed take less.

table     prompt tuning on fixed partial models (the paper's Table 1), and the presets (Table 2)
change    `cr` with one thing done otherwise: layers, neurons, stages, optimiser, start, length
transfer  every prompt of the part table on every partial model, and their cosines
search    schedules, on tasks that are not reported elsewhere: what `fast` was chosen by
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

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
SETTINGS = {"steps": 600, "eval_every": 20, "dev": 200, "limit": 500, "threads": 1,
            "device": "cpu"}

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


SCORES, UPDATE = fpt.neuron_scores, fpt.update
CHANGES = {  # name: (what of fpt is replaced, from the seed; settings; schedule)
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
    "optimiser reset": ({"update": lambda seed: at_growth(reset)}, {}, "cr"),
    "warm-up": ({"update": lambda seed: at_growth(warm)}, {}, "cr"),
    "start vocab": ({}, {"init": "vocab"}, "cr"),
    "start labels": ({}, {"init": "labels"}, "cr"),
    "length 5": ({}, {"prompt_length": 5}, "cr"),
    "length 50": ({}, {"prompt_length": 50}, "cr"),
    **{f"pt, {name}": ({}, settings, "pt") for name, settings in {
        "start vocab": {"init": "vocab"}, "start labels": {"init": "labels"},
        "length 5": {"prompt_length": 5}, "length 50": {"prompt_length": 50}}.items()},
}

# ====== Cells =====================================================================================


def cells(parts, seeds) -> list[tuple[str, str, str, int]]:
    """(task, schedule, change, seed), the most telling first."""
    found = []
    for seed in seeds:
        if "table" in parts:
            found += [(task, schedule, "", seed) for task in REPORTED
                      for schedule in (*FIXED, "ld", "fr", "cr")]
        if "change" in parts:
            found += [(task, schedule, name, seed) for task in REPORTED
                      for name, (_, _, schedule) in CHANGES.items()]
        if "search" in parts:
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
    keep = {key: [row[key] for row in run["curve"]] for key in ("flops", "dev")}
    return {"task": task, "schedule": schedule, "change": change, "seed": seed, **keep,
            "validation": fpt.main_score(run["validation"]), "best_step": run["best_step"],
            "seconds": run["train_seconds"], "full_updates": run["full_updates"]}


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
    for schedule in FIXED:
        folder = place(out, task, schedule, "", seed)
        prompt = fpt.SoftPrompt(fpt.load_prompt(folder / "prompt"))
        last[schedule] = fpt.load_prompt(folder / "prompt-last").flatten().tolist()
        matrix.append([])
        for other in FIXED:
            depth, width, _ = fpt.parse_schedule(other)[0]
            partial = fpt.absorbed(fpt.partial_t5(model, depth, width, scores, decoder=False))
            found, _ = fpt.evaluate(partial, prompt, tokenizer, data.task, data.validation, config)
            matrix[-1].append(fpt.main_score(found))
    return {"task": task, "seed": seed, "models": FIXED, "validation": matrix, "last": last}


def cosines(found: list[dict]) -> dict:
    """Mean cosine of last prompts: same seed by pair of models; then the controls."""
    prompts = {(row["task"], row["seed"], name): torch.tensor(values)
               for row in found for name, values in row["last"].items()}

    def mean(pairs):
        pairs = [torch.cosine_similarity(prompts[a], prompts[b], dim=0).item() for a, b in pairs]
        return sum(pairs) / len(pairs) if pairs else None

    tasks, seeds = ({row[key] for row in found} for key in ("task", "seed"))
    of_models = [[mean([((task, seed, a), (task, seed, b)) for task in tasks for seed in seeds
                        if (task, seed, a) in prompts]) for b in FIXED] for a in FIXED]
    pairs = list(itertools.combinations([key for key in prompts if key[2] == "pt"], 2))
    drawn = torch.randn(2, 64 * 20, generator=fpt.rng("cosine"))
    return {"models": FIXED, "same_seed_and_task": of_models,
            "pt, other seed": mean([(a, b) for a, b in pairs if a[0] == b[0]]),
            "pt, other task": mean([(a, b) for a, b in pairs if a[0] != b[0] and a[1] == b[1]]),
            "random": torch.cosine_similarity(*drawn, dim=0).item()}


# ====== Tables ====================================================================================

# The paper's mean of five tasks for T5-LARGE: Table 1 for fixed models, Table 2 for schedules.
PAPER = dict(zip((*FIXED, "ld", "fr", "cr"), (
    71.51, 45.78, 51.24, 62.76, 63.08, 68.19, 70.41, 46.00, 48.45, 62.30, 70.92, 71.50, 70.87)))


def of(record: dict, **wanted) -> list[dict]:
    """The cells that match, by seed."""
    return sorted((cell for cell in record["cells"] if all(
        cell[key] == value for key, value in wanted.items())), key=lambda cell: cell["seed"])


def best(cell: dict) -> list[float]:
    """The highest dev score so far, at each evaluation."""
    return list(itertools.accumulate(cell["dev"], max))


def at(cell: dict, flops: float) -> float:
    """`best` at the first evaluation where a run has spent so much."""
    return next((score for score, used in zip(best(cell), cell["flops"]) if used >= flops),
                max(cell["dev"]))


def reach(cells: list[dict], goal: float) -> float | None:
    """FLOPs at which the mean over seeds of `best` reaches a goal; None if it never does."""
    means = zip(*(zip(best(cell), cell["flops"]) for cell in cells))
    return next((fpt.statistics.mean(flops for _, flops in row) for row in means
                 if fpt.statistics.mean(score for score, _ in row) >= goal), None)


def against(record: dict, schedule: str, change: str = "", base: str = "pt") -> dict:
    """A schedule beside `base` on every task: what the tables are made of."""
    found = {"validation": {}, "flops": [], "gain": [], "reach": {}}
    for task in dict.fromkeys(cell["task"] for cell in record["cells"]):
        plain = {cell["seed"]: cell for cell in of(record, task=task, schedule=base, change="")}
        cells = [cell for cell in of(record, task=task, schedule=schedule, change=change)
                 if cell["seed"] in plain]
        if not cells:
            continue
        plain = [plain[cell["seed"]] for cell in cells]
        found["validation"][task] = [cell["validation"] for cell in cells]
        found["flops"] += [cell["flops"][-1] / other["flops"][-1]
                           for cell, other in zip(cells, plain)]
        found["gain"] += [max(cell["dev"]) - at(other, cell["flops"][-1])
                          for cell, other in zip(cells, plain)]
        goal = 0.99 * fpt.statistics.mean(max(other["dev"]) for other in plain)
        needed = reach(cells, goal)
        found["reach"][task] = needed / reach(plain, goal) if needed else None
    return found


def line(record: dict, name: str, schedule: str, change: str = "", more=()) -> str:
    """A row of a table in Markdown."""
    found = against(record, schedule, change)
    if not found["flops"]:
        return f"| {name} | not run |"
    scores, gain = found["validation"].values(), found["gain"]
    bounds = fpt.interval(gain)
    return "| " + " | ".join([
        name, *map(fpt.spread, scores),
        f"{fpt.statistics.mean(map(fpt.statistics.mean, scores)):.1f}",
        *more, f"{fpt.statistics.mean(found['flops']):.3f}",
        f"{fpt.statistics.mean(gain):+.1f}" + (f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds
                                                else ""),
        ", ".join(f"{x:.2f}" if x else "never" for x in found["reach"].values())]) + " |"


def tables(record: dict) -> str:
    """As Markdown: fixed models and presets, changes to `cr`, the transfer of prompts."""
    tasks = list(dict.fromkeys(cell["task"] for cell in record["cells"]))
    head = " | ".join(tasks)
    rest = "FLOPs | gain over pt at these FLOPs | FLOPs to 99 % of pt, over pt's |"
    rule = "|---" * (len(tasks) + 5)
    text = [f"| schedule | {head} | mean | paper, T5-LARGE | {rest}", rule + "|---|"]
    text += [line(record, f"`{name}`", name, more=[f"{PAPER[name]:.2f}"]) for name in PAPER]
    text += ["", f"| change to `cr` | {head} | mean | {rest}", rule + "|",
             line(record, "none", "cr")]
    text += [line(record, name, schedule, name) for name, (_, _, schedule) in CHANGES.items()]
    if "transfer" in record:
        size = range(len(FIXED))
        means = [[fpt.statistics.mean(row["validation"][i][j] for row in record["transfer"])
                  for j in size] for i in size]
        text += ["", f"| trained on | {' | '.join(f'`{name}`' for name in FIXED)} |",
                 "|---" * (len(FIXED) + 1) + "|",
                 *(f"| `{name}` | {' | '.join(f'{x:.1f}' for x in row)} |"
                   for name, row in zip(FIXED, means))]
    return "\n".join(text)


def main(args) -> None:
    out, fork = args.out, multiprocessing.get_context("fork")
    make.main(["--tasks", str(out / "tasks")])  # the same bytes each time
    SETTINGS["model"] = str(args.model.resolve())
    record = {"settings": SETTINGS, "versions": fpt.versions(), "cells": []}
    with fork.Pool(args.processes) as pool:
        jobs = [(out, cell) for cell in cells(args.part, args.seed)]
        for number, row in enumerate(pool.imap(run_cell, jobs), 1):
            record["cells"].append(row)
            print(f"{number}/{len(jobs)}  {row['task']:<8} {row['schedule'][:24]:<24} "
                  f"{row['change']:<20} seed {row['seed']}  dev {max(row['dev']):5.1f}  "
                  f"validation {row['validation']:5.1f}", flush=True)
        if "transfer" in args.part:
            found = pool.map(transfer, [(out, pair) for pair in itertools.product(
                REPORTED, args.seed)], chunksize=1)
            record["cosines"] = cosines(found)
            record["transfer"] = [{k: v for k, v in row.items() if k != "last"} for row in found]
    fpt.write(out / "study.json", json.dumps(record))
    print(f"{tables(record)}\n\n{len(record['cells'])} cells: {out / 'study.json'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("study.py", description=__doc__.splitlines()[0])
    parser.error = lambda text: parser.exit(2, f"study.py: error: {text}; see --help\n")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--part", nargs="+", choices=("table", "change", "transfer", "search"),
                        default=["table", "change", "transfer", "search"], help="(default: all)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4],
                        help="(default: 0 1 2 3 4)")
    parser.add_argument("--model", type=Path, default=ROOT / "micro" / "model",
                        help="another micro model (default: the shipped one)")
    parser.add_argument("--processes", type=int, default=2, help="at a time (default: 2)")
    main(parser.parse_args())
