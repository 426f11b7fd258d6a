"""The runs behind the tables: python evidence/study.py --out FOLDER --tasks FOLDER

A cell is one run of `fpt.main`: a task, a schedule, a seed, a number of updates, and at
most one change to the method. The record, study.json in --out, has a line for each and
is written anew after every cell. Cells that it has are not run again, so a stopped
study goes on, and so does a record of evidence/ that is copied there. `micro/make.py`
makes the tasks, and other models.

default    the default command with 32 seeds, and with 8 of them twice the updates
schedules  three tasks, `pt` and the schedules that grow (the paper's Table 2)
fixed      the same tasks on parts of the model that never grow (its Table 1), and what
           their prompts are worth on the whole model
changes    `cr` with layers or neurons at random
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import re
import shutil
import sys
from concurrent import futures
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fpt
from evidence import bench

PARTS = ["default", "schedules", "fixed", "changes"]
TASKS = ["reviews", "news", "duplicates"]
GROWING = ["ld", "fr", "cr"]
CHANGES = ["layers at random", "neurons at random"]
FIXED = ["0.25x1", "0.5x1", "1x0.25", "1x0.5", "0.25x0.25", "0.5x0.5"]
STEPS = fpt.MICRO_RUN["steps"]
# Seeds 0 to 7 chose the settings. To go on with the study, make the last two longer.
LONG = range(8, 16)  # seeds of `default` with twice the updates
SEEDS = range(8, 12)  # of the other parts
FIXED_SEEDS = SEEDS[:3]  # of `fixed`


@dataclass(frozen=True)
class Cell:
    """One run; `change` is empty if nothing is changed."""

    task: str
    schedule: str
    seed: int
    change: str = ""
    steps: int = STEPS

    def folder(self, out):
        """Where its command writes."""
        name = f"{self.change} {self.schedule} {self.steps} {self.seed}".strip()
        return out / "runs" / self.task / re.sub("[: ]", "-", name)

    def prompt(self, out):
        """The chosen prompt [P, d]."""
        [folder] = self.folder(out).glob("*/prompt")
        return fpt.load_prompt(folder)


KEYS = [field.name for field in fields(Cell)]


def cells(parts):
    """The cells of some parts, all that belongs to a seed together."""
    found = []
    for seed in [*LONG, *range(8), *range(16, 32)]:
        if "default" in parts:
            for steps in [STEPS, 2 * STEPS] if seed in LONG else [STEPS]:
                for schedule in ["pt", "cr"]:
                    found.append(Cell("reviews", schedule, seed, steps=steps))
        if seed in SEEDS:
            for task in TASKS:
                found += study_cells(parts, task, seed)
    return list(dict.fromkeys(found))  # `default` and `schedules` share some


def study_cells(parts, task, seed):
    """The cells of a task and a seed of all parts but `default`."""
    found = []
    if "schedules" in parts:
        for schedule in ["pt", *GROWING]:
            found.append(Cell(task, schedule, seed))
    if "changes" in parts:
        for change in CHANGES:
            found.append(Cell(task, "cr", seed, change))
    if "fixed" in parts and seed in FIXED_SEEDS:
        for size in FIXED:
            found.append(Cell(task, f"{size}:1", seed))
    return found


def random_layers(seed, total, keep):
    """Layer 0, which owns the position bias, and others at random."""
    generator = fpt.rng(seed, "layers", keep)
    drawn = torch.randperm(total - 1, generator=generator) + 1
    return sorted([0, *drawn[: keep - 1].tolist()])


def random_scores(seed, model, prompt, batches):
    """Scores that put the neurons in a random order."""
    generator = fpt.rng(seed, "neurons")
    scores = {}
    for side in ["encoder", "decoder"]:
        scores[side] = []
        for _ in getattr(model, side).block:
            scores[side].append(torch.rand(model.config.d_ff, generator=generator))
    return scores


def changed(cell):
    """A context in which fpt.py does one thing otherwise."""
    if cell.change == "layers at random":
        other = functools.partial(random_layers, cell.seed)
        return mock.patch.object(fpt, "kept_layers", other)
    if cell.change == "neurons at random":
        other = functools.partial(random_scores, cell.seed)
        return mock.patch.object(fpt, "neuron_scores", other)
    return contextlib.nullcontext()


def run_cell(args, cell):
    """Train, and return what the record keeps of it."""
    folder = cell.folder(args.out)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    flags = {"steps": cell.steps, "threads": 1, "device": "cpu"}
    flags = {**fpt.MICRO_RUN, **flags, "model": args.model, "out": folder}
    flags |= {"schedule": cell.schedule, "seed": cell.seed}
    flags["task"] = args.tasks / cell.task
    command = [f"--{key.replace('_', '-')}={flags[key]}" for key in flags]
    with changed(cell), contextlib.redirect_stdout(io.StringIO()):
        fpt.main(command)
    [path] = folder.glob("*/results.json")
    run = json.loads(path.read_text())
    kept = {**vars(cell), "validation": run["validation"], "flops": []}
    kept |= {"dev": [], "seconds": round(run["seconds"], 2)}
    for row in run["log"]:
        kept["dev"].append(row["dev"])
        kept["flops"].append(row["flops"])
    if cell.schedule.endswith(":1"):
        kept["on the whole"] = on_the_whole(args.out, cell)
    return kept


def on_the_whole(out, cell):
    """The validation score of a cell's prompt on the whole model."""
    settings = fpt.parse_args(["--resume", str(cell.folder(out))])
    with contextlib.redirect_stdout(io.StringIO()):
        model, task, _ = fpt.prepare(settings)
    prompt = fpt.SoftPrompt(cell.prompt(out))
    score, _ = fpt.evaluate(model, prompt, task, task.validation)
    return score


def cosines(args):
    """Cosines of prompts with that of `pt`: of parts, with the same start and batches,
    and two controls. Means over tasks and seeds.

    A record that is gone on with has no prompts: the runs that lack theirs are made
    again, which gives the same ones on one machine.
    """
    found = {}

    def add(title, cell, pt):
        prompts = []
        for one in [cell, pt]:
            if not list(one.folder(args.out).glob("*/prompt")):
                run_cell(args, one)
            prompts.append(one.prompt(args.out).flatten())
        cosine = torch.cosine_similarity(*prompts, dim=0)
        found.setdefault(title, []).append(cosine.item())

    for i, task in enumerate(TASKS):
        for j, seed in enumerate(FIXED_SEEDS):
            pt = Cell(task, "pt", seed)
            for size in FIXED:
                add(f"`{size}:1`", replace(pt, schedule=f"{size}:1"), pt)
            add("`pt`, another seed", replace(pt, seed=FIXED_SEEDS[j - 1]), pt)
            add("`pt`, another task", replace(pt, task=TASKS[i - 1]), pt)
    return {title: sum(values) / len(values) for title, values in found.items()}


def main():
    parser = argparse.ArgumentParser("study.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--tasks", type=Path, required=True, help="of micro/make.py")
    parser.add_argument("--model", type=Path, default=fpt.MICRO / "model")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    path = args.out / "study.json"
    machine = bench.machine(torch.device("cpu"))
    record = {"machine": machine, "minutes": 0, "cells": []}
    if path.exists():
        record = json.loads(path.read_text())
    done = {Cell(**{key: row[key] for key in KEYS}) for row in record["cells"]}
    jobs = [cell for cell in cells(args.part) if cell not in done]
    fork = multiprocessing.get_context("fork")
    with futures.ProcessPoolExecutor(args.processes, fork) as pool:
        for row in pool.map(functools.partial(run_cell, args), jobs):
            record["cells"].append(row)
            record["minutes"] += row["seconds"] / 60
            bench.write_record(path, record)
            print(f"{len(record['cells']) - len(done)} of {len(jobs)}: {row}")
    if "fixed" in args.part and "schedules" in args.part:
        record["cosines"] = cosines(args)
        bench.write_record(path, record)


if __name__ == "__main__":
    main()
