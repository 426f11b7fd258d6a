"""The study behind the tutorial's tables, on micro models: python evidence/study.py --out FOLDER

A cell is one run of `fpt.main`: a task, a schedule, a seed, and at most one change to the method.
Cells that FOLDER has are kept, so a stopped study goes on. What they say together goes to
FOLDER/study.json, a line a run. --part and --seed run less of it.

default   the default command, and the same with one thing done otherwise
table     prompt tuning on fixed partial models (the paper's Table 1), and the presets (Table 2)
change    `cr` in half the updates, with one thing done otherwise, and without its partial stages
transfer  every prompt of the part table on every partial model, and their cosines

--show prints the tables of a record; --tables writes evidence/README.md and the pictures anew, from
the records beside it. Minutes are those of the updates, on one core, others busy beside it.
"""

import argparse, collections, contextlib, itertools, json, math  # noqa: E401
import multiprocessing, re, shutil, sys  # noqa: E401
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "micro"), str(ROOT / "evidence")]

import pandas, torch  # noqa: E401, E402
from matplotlib.figure import Figure  # noqa: E402
from scipy import stats  # noqa: E402

import bench, fpt, make  # noqa: E401, E402

PARTS = ("default", "table", "change", "transfer")
REPORTED = ("slot", "present", "word", "told")
FIXED = ("pt", "0.25x1:1", "0.5x1:1", "0.75x1:1", "1x0.25:1", "1x0.5:1", "1x0.75:1",
         "0.25x0.25:1", "0.5x0.5:1", "0.75x0.75:1")
COMPOUND, PRESETS = [*FIXED[-3:], "pt"], ["ld", "fr", "cr", "fast"]
MOST = ("pt", "cr", "fast")  # of these, all seeds; of the rest the first five

# ====== One change at a time ======================================================================

BATCHES, SCORES, TRAIN = fpt.batches, fpt.neuron_scores, fpt.train


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


def slowed(*args, **more):
    """`fpt.train` with a third of the rate in the last 40 % of the updates: the last stage of `cr`.
    """
    optimizer, steps = args[2], args[7]
    for run in TRAIN(*args, **more):
        yield run
        if run["step"] >= 0.6 * steps:
            optimizer.param_groups[0]["lr"] = 0.1


def shuffled(examples, encode, seed, size, pool=1):
    """`fpt.batches` without sorting by length."""
    return BATCHES(examples, encode, seed, size, pool=1)


class Change(NamedTuple):
    """A schedule, its share of the updates, flags, and what of fpt is replaced, from the seed."""

    schedule: str = "cr"
    share: float = 1.0
    flags: tuple[str, ...] = ()
    replaced: Callable = lambda seed: {}


CHANGES = {
    "none": Change(),
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
DEFAULT = {f"{name}, {what}": Change(name, replaced=lambda seed, how=how: how)  # on its task
           for what, how in (("rate / 3 at the end", {"train": slowed}),
                             ("shuffled batches", {"batches": shuffled})) for name in ("pt", "cr")}

# ====== Cells =====================================================================================


def cells(parts, seeds) -> list[tuple[str, str, str, int]]:
    """(task, schedule, change, seed), the most telling first."""
    plain = [(name, "") for name in (*FIXED, *PRESETS) if {"table", "transfer"} & set(parts)]
    changed = [(change.schedule, name) for name, change in CHANGES.items() if "change" in parts]
    default = [("pt", ""), ("cr", "")] + [(row.schedule, name) for name, row in DEFAULT.items()]
    found = [("entailment", *kind, seed) for seed in seeds if "default" in parts
             for kind in default if not kind[1] or seed in range(8, 24)]
    return found + [(task, *kind, seed) for seed in seeds for task in REPORTED
                    for kind in plain + changed
                    if kind in [(name, "") for name in MOST] or seed in seeds[:5]]


def place(out: Path, task, schedule, change, seed) -> Path:
    """The folder of a cell's command."""
    return out / "runs" / task / re.sub("[:, /]+", "_", f"{change or 'as is'} {schedule} {seed}")


def run_cell(args, cell) -> dict:
    """Train, unless it was done before. -> what the study keeps of it."""
    task, schedule, name, seed = cell
    change, folder = (CHANGES | DEFAULT).get(name, Change()), place(args.out, *cell)
    command = ["--schedule", schedule, "--seed", str(seed), "--out", str(folder), *change.flags]
    if task != "entailment":  # which is the default command
        steps = round(args.steps / 2 * change.share) if name else args.steps
        command += ["--model", str(args.model), "--task", str(args.out / "tasks" / task), "--steps",
                    str(steps), "--eval-every", str(args.eval_every), "--dev", "200",
                    "--limit", "500", "--threads", "1", "--device", "cpu"]
    if not list(folder.glob("*/results.json")):
        shutil.rmtree(folder, ignore_errors=True)  # a change does not know what came before a stop
        with mock.patch.dict(vars(fpt), change.replaced(seed)), contextlib.redirect_stdout(None):
            fpt.main(command)
    [path] = folder.glob("*/results.json")
    run = json.loads(path.read_text())
    dev = [fpt.main_score(row["dev"]) for row in run["log"]]
    kept = {key: [row[key] for row in run["log"]] for key in ("step", "flops")}
    return {"task": task, "schedule": schedule, "change": name, "seed": seed, "dev": dev, **kept,
            "validation": fpt.main_score(run["validation"]), "full_updates": run["full_steps"],
            "seconds": round(run["seconds"], 2)}


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
        for key in itertools.product(REPORTED, COMPOUND, args.seed[:5])}
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
    ["paper: labels", "paper: minus PT", "paper: FLOPs", "paper: Improve"]).replace("-", "")


def compared(cells: list[dict]) -> pandas.DataFrame:
    """The rows of `fpt.compare`, task by task; their index is name, task and seed. And of the last
    40 % of the updates: `begun`, the dev score before them, and `jumps`, how far dev scores are
    from those before, on average.
    """
    runs = collections.defaultdict(list)
    for cell in cells:
        best = itertools.accumulate(cell["dev"], max)
        log = [dict(zip(("step", "flops", "best"), row))
               for row in zip(cell["step"], cell["flops"], best)]
        late = [dev for step, dev in zip(cell["step"], cell["dev"])
                if step >= 0.6 * cell["step"][-1]]
        runs[cell["task"]].append(cell | {
            "schedule": cell["change"] or cell["schedule"], "log": log, "flops": log[-1]["flops"],
            "dev": {"": log[-1]["best"]}, "validation": {"": cell["validation"]},
            "full_steps": cell["full_updates"], "begun": late[0],
            "jumps": sum(abs(b - a) for a, b in itertools.pairwise(late)) / (len(late) - 1)})
    return pandas.concat([fpt.compare(rows).assign(**{
        key: [row[key] for row in rows] for key in ("begun", "jumps")}).set_index(
        pandas.MultiIndex.from_tuples([(row["schedule"], row["task"], row["seed"]) for row in rows],
                                      names=("name", "task", "seed"))) for rows in runs.values()])


def per_task(frame, key: str):
    """Of one column, groups by name: a row for each seed, columns for the tasks and their mean."""
    wide = frame[key].unstack("task")[frame.index.unique("task")]
    return wide.assign(mean=wide.mean(axis=1, skipna=False)).groupby("name")


def spread(values) -> str:
    """Mean ± standard deviation over seeds, as text."""
    return f"{values.mean():.1f} ± {values.std():.1f}"


def pooled(values) -> str:
    """Mean and 95 % interval (Student's t) over all pairs of a task and a seed."""
    values = values.dropna()  # pairs that both have run
    if not values.any():  # of a thing with itself
        return ""
    bounds = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    return "{:+.1f} [{:.1f}, {:.1f}]".format(values.mean(), *bounds)


def goals(frame):
    """FLOPs to 99 % of the last score of `pt`, over those of `pt`: medians over seeds, as text."""
    found = per_task(frame.fillna(math.inf), "to 99 %").median() / 100
    return found.map("{:.2f}".format).replace("inf", "never")


def table(frame, names, base=lambda name: "pt"):
    """Validation by task and of their mean; that less the base's, in pairs; FLOPs over `pt`'s."""
    text, scores = per_task(frame, "validation").agg(spread).loc[[*names]], frame.validation
    text["minus base [95 %]"] = [pooled(scores[name] - scores[base(name)]) if name != base(name)
                                 else "" for name in names]
    text["FLOPs"] = (frame.flops.groupby("name").mean() / 100).map("{:.3f}".format)
    return text


def of_default(frame, seeds) -> pandas.DataFrame:
    """`pt` and `cr` of the default command, for some of its seeds."""
    part, text = frame[frame.index.get_level_values("seed").isin(seeds)].groupby("name"), {}
    for key in ("dev", "validation", "pt, same flops", "full alone"):
        text[key] = part[key].agg(spread)
    text["worst"] = part.validation.min().map("{:.1f}".format)
    text["gain [95 %]"] = part.gain.agg(pooled)
    for key, how in ("flops", "{:.3f}"), ("seconds", "{:.2f}"):
        text[key] = (part[key].mean() / 100).map(how.format)
    text["to 99 %"] = (part["to 99 %"].agg(lambda goal: goal.fillna(math.inf).median()) / 100).map(
        "{:.2f}".format)
    text = pandas.DataFrame(text).loc[["pt", "cr"]]
    text.loc["pt", ["pt, same flops", "full alone"]] = ""
    return text.rename(index=lambda name: f"`{name}`, seeds {seeds[0]} to {seeds[-1]}")


def of_changes(frame) -> pandas.DataFrame:
    """The changes to the default command, beside the same seeds of the unchanged one."""
    names = ["pt", "cr", *DEFAULT]
    seeds = frame.loc[names[-1]].index.unique("seed")
    frame = frame[frame.index.get_level_values("seed").isin(seeds)]
    part, scores = frame.groupby("name"), frame.validation
    return pandas.DataFrame({
        "validation": part.validation.agg(spread), "worst": part.validation.min().map(str),
        "under 95": part.validation.agg(lambda score: f"{(score < 95).sum()} of {len(score)}"),
        "minus unchanged [95 %]": {name: pooled(scores[name] - scores[name.partition(",")[0]])
                                   if name in DEFAULT else "" for name in names},
        "jumps": part.jumps.mean().map("{:.1f}".format),
        "FLOPs": (part.flops.mean() / 100).map("{:.3f}".format)}).loc[names]


def markdown(title: str, text) -> str:
    rows = ["", *text.columns], ["---"] * (1 + len(text.columns)), *text.itertuples()
    return "\n".join([title, "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def tables(record: dict) -> str:
    """All that a record has cells for, as Markdown."""
    cells, found = record["cells"], []
    default = [cell for cell in cells if cell["task"] == "entailment"]
    plain, changed = ([cell for cell in cells if cell["task"] in REPORTED and bool(
        cell["change"]) == changes] for changes in (False, True))
    if default:
        frame = compared(default)
        halves = [of_default(frame, seeds) for seeds in (range(8), range(8, 32))]
        found += [markdown("`python fpt.py`, seeds that chose things and seeds that did not",
                           pandas.concat(halves)),
                  markdown("The same with one thing done otherwise", of_changes(frame))]
    if plain:
        frame = compared(plain)
        schedules = table(frame, ["pt", *PRESETS])
        gains = per_task(frame, "gain").mean().map("{:+.1f}".format).loc[PRESETS]
        gains["mean"] = [pooled(frame.gain[name]) for name in PRESETS]
        gains["paper: Improve"] = PAPER["paper: Improve"]
        for title, key in (("`pt`, same FLOPs", "pt, same flops"), ("full alone", "full alone")):
            gains[title] = per_task(frame, key)["mean"].agg(spread)
        found += [markdown("Fixed partial models", table(frame, FIXED).join(PAPER.iloc[:, :3])),
                  markdown("Schedules", schedules.join(PAPER.iloc[:, :3])),
                  markdown("Gain over `pt` stopped early", gains),
                  markdown("FLOPs to 99 % of the score of `pt`", goals(frame).loc[PRESETS])]
    if changed:
        found.append(markdown("One change", table(compared(changed), CHANGES, lambda name: (
            "pt" if name.startswith("pt,") and CHANGES[name].flags else "none"))))
    if "transfer" in record:
        matrix = transferred(record).map("{:.1f}".format)
        cosine = pandas.DataFrame(record["cosines"], ["cosine"]).map("{:.3f}".format)
        found += [markdown("Prompts (rows) on models", matrix),
                  markdown("Cosine with the prompt of `pt`", cosine)]
    return "\n".join(found)


def summary(records: dict[str, dict]) -> pandas.DataFrame:
    """The paper's Tables 1 and 2 on several models: means of the four tasks, in pairs less `pt`."""
    found = {}
    for title, record in records.items():
        frame = compared([cell for cell in record["cells"] if not cell["change"]])
        for key, values in (("minus `pt`", frame.validation - frame.validation["pt"]),
                            ("gain", frame.gain)):
            found[f"{title}: {key}"] = values.groupby("name").agg(pooled)
    found["FLOPs"] = (frame.flops.groupby("name").mean() / 100).map("{:.3f}".format)
    fixed = [name for name in FIXED if re.search(r"0\.2|0\.5", name)]
    text = pandas.DataFrame(found).loc[[*fixed, *PRESETS]].join(
        PAPER[["paper: minus PT", "paper: Improve"]])
    text.loc[fixed, [f"{title}: gain" for title in records]] = ""  # scored on a part
    return text.rename(index="`{}`".format)


def late(records: dict[str, dict]) -> pandas.DataFrame:
    """Runs of `cr` by the dev score with which the full model begins: how many, and how many of
    them end five points under `pt`. On tasks with two answers: half of them are right by chance.
    """
    found = {}
    for title, record in records.items():
        frame = compared([cell for cell in record["cells"]
                          if not cell["change"] and cell["task"] != "slot"])
        low, failed = frame.begun["cr"] < 65, frame.validation["cr"] < frame.validation["pt"] - 5
        found[title] = {f"{what}{end}": str(count) for what, rows in (
            ("under 65", low), ("others", ~low)) for end, count in (
            ("", rows.sum()), (": of these end low", (rows & failed).sum()))}
    return pandas.DataFrame(found).T


def transferred(record: dict) -> pandas.DataFrame:
    """Validation of the prompts of FIXED (rows) on each of them: mean of tasks and seeds."""
    rows = [pandas.DataFrame(row["validation"], FIXED, FIXED) for row in record["transfer"]]
    return sum(rows) / len(rows)


# ====== evidence/README.md ========================================================================

RECORDS = {  # what each shows, and the command that made it
    "default": ("the default command, 32 seeds, and two changes to it",
                "study.py --out runs/default --part default --seed {0..31}"),
    "study": ("four more tasks: parts of the model, schedules, one change at a time",
              "study.py --out runs/study --part table change transfer"),
    "study-whole": ("the first two of these on a model made without sub-networks",
                    "study.py --out runs/study-whole --part table transfer --model "
                    "runs/whole/model --steps 300 --eval-every 10"),
    "speed-cpu": ("what an update costs on two cores of a CPU, in fp32; t5-small: speed alone",
                  "bench.py --precision fp32 --attention sdpa --rounds 2"),
    "speed-xeon": ("on eight of a CPU with bf16 units; fp32: one turn, sdpa alone",
                   "bench.py --shape t5-base --part speed --threads 8 --rounds 2"),
    "speed-gpu": ("on a GPU; its host was busy, so the smaller models vary by a third", "bench.py "
                  "--shape t5-base t5-large v1.1-xl --precision bf16 --attention sdpa --rounds 5")}
MARK = "<!-- From here on: python evidence/study.py --tables -->"


def load(name: str) -> dict:
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text())


def speeds(records) -> pandas.DataFrame:
    """Examples per second of all ways, over those of PEFT's batches grouped by length."""
    rows = []
    for record in records:
        made_on = record["machine"]["device"].replace("cpu", record["machine"]["cpu"])
        rows += [{"way": row["way"], "text": f"{row['over PEFT grouped']:.2f}", "on": ", ".join((
            row["shape"], row["precision"], row["attention"], made_on.split("(")[0].split()[-1]))}
            for row in record["rows"] if row["part"] == "speed" and "grouped" not in row["way"]]
    found = pandas.DataFrame(rows).pivot(index="way", columns="on", values="text").fillna("")
    return found[[*dict.fromkeys(row["on"] for row in rows)]].loc[
        [*dict.fromkeys(row["way"] for row in rows)]]


def costs(record: dict) -> str:
    """A record of bench.py as Markdown."""
    found, frame = [], pandas.DataFrame(record["rows"])
    for names, rows in frame.groupby(["part", "shape", "precision"], sort=False):
        text = rows.set_index("way").drop(columns=["part", "shape", "precision"])
        text = text.dropna(axis=1, how="all").map(lambda value: value if isinstance(
            value, str) else "" if math.isnan(value) else f"{value:.4g}")
        found.append(markdown(", ".join(names), text))
    return "\n".join(found)


def readme() -> str:
    """evidence/README.md, its end made anew from the records."""
    found, rows, records = [], {}, {name: load(name) for name in RECORDS}
    for name, (what, command) in RECORDS.items():
        record = records[name]
        made_on = "; ".join(f"{key} {value}" for key, value in record["machine"].items())
        rows[f"`{name}.json`"] = [what, f"`python evidence/{command}`", str(record["minutes"]),
                                  made_on]
        found.append(f"## {name}.json\n\n" + (costs if "rows" in record else tables)(record))
    text = pandas.DataFrame(rows.values(), rows, ["what it shows", "made by", "minutes", "machine"])
    head = Path(__file__).with_name("README.md").read_text().partition(MARK)[0]
    both = summary({"shipped": records["study"], "brittle": records["study-whole"]})
    begun = late({name: records[name] for name in ("default", "study", "study-whole")})
    found[1:1] = [
        markdown("## Parts and schedules, both models", both),
        markdown("## Runs of `cr` by their dev score when the last stage begins", begun),
        *(markdown(f"## Speed on {where}, over PEFT grouped by length with the same attention",
                   speeds([records[name] for name in names]))
          for where, names in (("CPUs", ("speed-cpu", "speed-xeon")), ("a GPU", ["speed-gpu"])))]
    return "\n".join([head + MARK, markdown("", text), *found])


# ====== Figures ===================================================================================


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


def draw_curves(records: dict[str, dict], names):
    """Best dev score so far against FLOPs, as a share of what `pt` spends: mean of tasks, seeds."""
    plot = Figure(figsize=(1.2 + 2.4 * len(records), 3.4), layout="constrained")
    panels = plot.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, (title, record) in zip(panels, records.items()):
        cells = pandas.DataFrame(record["cells"]).query("change == ''")
        cells = cells.set_index(["schedule", "task", "seed"])
        ends = cells.flops["pt"].str[-1]
        for name, color, line in zip(names, ("black", "0.35", "0.1"), ("-", "--", ":")):
            flops, dev = (pandas.DataFrame(cells[key][name].to_list(), cells.loc[name].index)
                          for key in ("flops", "dev"))  # a row for each task and seed
            x, y = flops.div(ends, axis=0).mean().to_list(), dev.cummax(axis=1).mean().to_list()
            axes.plot(x, y, line, color=color, lw=2.2, marker="o", markevery=[-1],
                      label=f"{name}: {y[-1]:.1f}")
        axes.set(title=title, xlabel="training FLOPs (1: all of pt's)", xlim=(0, 1.03))
        axes.legend(loc="lower right", frameon=False)
    panels[0].set_ylabel("best dev score so far, %")
    return plot


def make_parser():
    parser = argparse.ArgumentParser("study.py", description=__doc__.splitlines()[0])
    what, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    what.add_argument("--out", type=Path, help="folder of the study")
    what.add_argument("--show", type=Path, help="print the tables of a study.json, run nothing")
    what.add_argument("--tables", action="store_true", help="write README.md and pictures anew")
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="(all)")
    add("--seed", type=int, nargs="+", default=[*range(8)], help="(%(default)s)")
    add("--model", type=Path, default=ROOT / "micro" / "model", help="a micro model (the shipped)")
    add("--steps", type=int, default=600, help="updates; of the part change half (%(default)s)")
    add("--eval-every", type=int, default=20, help="(%(default)s)")
    add("--processes", type=int, default=2, help="(%(default)s)")
    return parser


def main(args) -> None:
    if args.show:
        print(tables(json.loads(args.show.read_text())))
        return
    if args.tables:
        here = Path(__file__).parent
        (here / "README.md").write_text(readme())
        studies = {"shipped": load("study"), "brittle": load("study-whole")}
        default = load("default")
        default["cells"] = [cell for cell in default["cells"] if cell["seed"] >= 8]
        default = {"the default command, seeds 8 to 31": default}
        for name, plot in {"schedule": draw_schedule(), "default": draw_curves(default, MOST[:2]),
                           "study": draw_curves(studies, MOST)}.items():
            plot.savefig(here / f"{name}.png", dpi=120)
        return
    make.main(["--tasks", str(args.out / "tasks")])  # the same bytes each time
    record = {"machine": bench.machine(torch.device("cpu")), "minutes": 0, "cells": []}
    jobs, fork = cells(args.part, args.seed), multiprocessing.get_context("fork")
    with futures.ProcessPoolExecutor(args.processes, fork) as pool:
        rows = pool.map(run_cell, itertools.repeat(args), jobs)
        for number, (cell, row) in enumerate(zip(jobs, rows), 1):
            record["cells"].append(row)
            print(f"{number}/{len(jobs)}", *cell, row["validation"], flush=True)
        if "transfer" in args.part:
            pairs = zip(*itertools.product(REPORTED, args.seed[:5]))
            record["transfer"] = list(pool.map(transfer, itertools.repeat(args), *pairs))
            record["cosines"] = cosines(args)
    record["minutes"] = round(sum(cell["seconds"] for cell in record["cells"]) / 60)
    bench.write_record(args.out / "study.json", record)
    print(f"{tables(record)}\n{len(record['cells'])} cells: {args.out / 'study.json'}")


if __name__ == "__main__":
    main(make_parser().parse_args())
