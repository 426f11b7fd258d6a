"""What prompt tuning costs here and now: python evidence/bench.py --out FILE.json

It runs offline, on random weights of the true shapes: they cannot learn, but cost what
trained ones do. The contenders take turns, and each number is a median of --rounds.

speed   examples per second over an epoch of RTE's lengths, of PEFT's prompt tuning in a
        plain loop and of fpt.py's `pt` and `cr`. PEFT's inputs are padded to 512 as in
        the official code, or come in shuffled batches, or in batches grouped by
        length, as from transformers' Trainer. All else is the same.
stages  seconds of each schedule beside its FLOPs, its rate of FLOPs over that of a
        large matrix product, and what growing, scoring and evaluating cost
memory  the peaks of several ways to train, each in a process of its own
"""

import argparse
import copy
import functools
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import time
from concurrent import futures
from pathlib import Path

import numpy
import pandas
import torch
import transformers
from transformers.trainer_pt_utils import get_length_grouped_indices

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fpt

SHAPES = {  # the published configurations
    "t5-small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "v1.1-xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
}
SHAPES["v1.1-xl"] |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# Percentiles, and how many tokens RTE's train examples have there. They are closer in
# the tail, since the longest example of a shuffled batch pads the others.
RTE = """
 0  5 10 20 30 40 50 60 70  75  80  85  90  95  97  98  99 99.5 99.8 100
17 35 40 48 54 60 66 73 86 100 119 138 154 177 191 208 223  231  256 313
"""
TARGET, MEAN, LONGEST = 6, 82, 313  # tokens of RTE's targets and sources
LENGTHS = [24, 120, LONGEST]  # at which the part speed takes the time
WAYS = ["pt", "cr", "PEFT", "pt, 4 parts"]  # of the part memory
FULL = (1.0, 1.0)


def make_parser():
    parser = argparse.ArgumentParser("bench.py", description=__doc__.partition("\n")[0])
    parts, precisions = ["memory", "speed", "stages"], ["fp32", "bf16"]
    add = functools.partial(parser.add_argument, nargs="+")
    add("--shape", choices=SHAPES, default=["t5-small", "t5-base"], help="of the model")
    add("--precision", choices=precisions, default=precisions, help="of its weights")
    add("--part", choices=parts, default=parts, help="of the measurements")
    parser.add_argument("--batch", type=int, default=32, help="examples in an update")
    parser.add_argument("--prompt-length", type=int, default=20, help="P")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: torch's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--out", type=Path, help="new json file for the numbers")
    return parser


# ====== Contenders ====================================================================


def build(shape, precision, device):
    """A T5 of this shape with random weights, frozen, without dropout."""
    config = transformers.T5Config(
        vocab_size=32128,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.T5ForConditionalGeneration._from_config(config)
    return model.eval().requires_grad_(False)


def random_batch(size, length, device):
    """Random examples of this length; one padded position makes a mask, as usual."""
    draw = functools.partial(torch.randint, 3, 32000, generator=fpt.rng("examples"))
    batch = {"input_ids": draw((size, length)), "labels": draw((size, TARGET))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, -1] = 0
    return {name: rows.to(device) for name, rows in batch.items()}


def epochs(size):
    """Padded lengths of an epoch's batches: shuffled, Trainer's groups, fpt.py's."""
    percentiles, tokens = numpy.loadtxt(RTE.strip().splitlines())
    lengths = numpy.interp(numpy.arange(1984) / 19.83, percentiles, tokens)
    lengths = lengths.round().astype(int)
    count = len(lengths) // size
    torch.manual_seed(0)
    shuffled = torch.randperm(len(lengths)).numpy()
    grouped = numpy.array(get_length_grouped_indices(lengths.tolist(), size))
    padded = []
    for order in (shuffled, grouped):
        cut = lengths[order[: count * size]].reshape(count, size)
        padded.append(cut.max(axis=1))
    examples = []
    for length in lengths:
        examples.append(fpt.Example("", [], {"input_ids": [3] * length, "labels": [1]}))
    collate = transformers.DataCollatorForSeq2Seq(transformers.ByT5Tokenizer())
    task = fpt.Task(train=examples, collate=collate)
    batches = itertools.islice(fpt.batches(task, size, "cpu", seed=0), count)
    ours = [batch["input_ids"].shape[1] for batch in batches]
    return *padded, ours


def updater(model, args, length=MEAN, parts=1):
    """A function that makes one update of fpt.py on sources of `length` tokens."""
    start = torch.randn(args.prompt_length, model.config.d_model) * 0.3
    prompt = fpt.SoftPrompt(start).to(model.device)
    optimizer = fpt.adafactor(prompt, 0.3)
    batch = random_batch(args.batch, length, model.device)

    def update():
        _, prompt.weight.grad = fpt.gradient_in_parts(model, prompt, batch, parts)
        torch.nn.utils.clip_grad_norm_([prompt.weight], 1.0)
        optimizer.step()

    return update


def peft_updater(model, args, length):
    """A function that makes one update as a loop over PEFT's prompt tuning would."""
    import peft

    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=args.prompt_length
    )
    wrapped = peft.get_peft_model(copy.copy(model), config).eval()
    [weight] = [weight for weight in wrapped.parameters() if weight.requires_grad]
    optimizer = fpt.adafactor(argparse.Namespace(weight=weight), 0.3)
    batch = random_batch(args.batch, length, model.device)

    def update():
        wrapped(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def sizes_of(model, names):
    """The partial models of these schedules, by depth and width."""
    scores = {"encoder": [torch.rand(model.config.d_ff)] * model.config.num_layers}
    sizes = {}
    for stage in itertools.chain.from_iterable(fpt.SCHEDULES[name] for name in names):
        size = (stage.depth, stage.width)
        sizes[size] = fpt.partial_t5(model, *size, scores, decoder=False)
    return sizes


def mean_of(name, of_size):
    """Of a schedule's updates, from what one costs on each size."""
    total = 0
    for stage in fpt.SCHEDULES[name]:
        total += stage.share * of_size[stage.depth, stage.width]
    return total


# ====== Measurements ==================================================================


def seconds(run, device):
    """Of one call; a GPU runs behind, so wait for it before reading a clock."""
    wait = functools.partial(torch.accelerator.synchronize, device)
    if device.type == "cpu":
        wait = int
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def alternate(contenders, device, rounds):
    """The median seconds of each of these functions, which take turns."""
    found = {key: [] for key in contenders}
    for number in range(rounds + 1):
        for key, run in contenders.items():
            spent = seconds(run, device)
            if number > 0:  # the first is cold
                found[key].append(spent)
    return {key: statistics.median(times) for key, times in found.items()}


def speed(model, args):
    """Examples per second over an epoch, from the seconds at three lengths.

    In between they are quadratic.
    """
    sizes = sizes_of(model, ["cr"])
    longest = 512 - args.prompt_length
    contenders = {("PEFT", longest): peft_updater(model, args, longest)}
    for length in LENGTHS:
        contenders["PEFT", length] = peft_updater(model, args, length)
        for size, partial in sizes.items():
            contenders[size, length] = updater(partial, args, length)
    spent = alternate(contenders, model.device, args.rounds)

    def mean(contender, padded):
        at_lengths = [spent[contender, length] for length in LENGTHS]
        curve = numpy.polyfit(LENGTHS, at_lengths, 2)
        return numpy.polyval(curve, padded).mean().item()

    shuffled, grouped, ours = epochs(args.batch)
    of_size = {size: mean(size, ours) for size in sizes}
    times = {
        "PEFT, padded to 512": spent["PEFT", longest],
        "PEFT, shuffled": mean("PEFT", shuffled),
        "PEFT, grouped by length": mean("PEFT", grouped),
        "fpt.py, pt": of_size[FULL],
        "fpt.py, cr": mean_of("cr", of_size),
    }
    rows = []
    for way, time_ in times.items():
        row = {"way": way, "examples per second": args.batch / time_}
        row["over PEFT shuffled"] = times["PEFT, shuffled"] / time_
        row["over PEFT grouped"] = times["PEFT, grouped by length"] / time_
        rows.append(row)
    return rows


def matrix_rate(model, rounds):
    """FLOP/s of a large matrix product where and as the model computes."""
    square = torch.randn(4096, 4096, device=model.device, dtype=model.dtype)
    products = 1 if model.device.type == "cpu" else 20  # a GPU's clock is too coarse

    def multiply():
        for _ in range(products):
            torch.mm(square, square)

    spent = alternate({"multiply": multiply}, model.device, rounds)
    return products * 2 * 4096**3 / spent["multiply"]


def other_costs(model, args):
    """What a run spends besides updates, as functions."""
    start = torch.zeros(args.prompt_length, model.config.d_model)
    prompt = fpt.SoftPrompt(start).to(model.device)
    batch = random_batch(args.batch, MEAN, model.device)
    evaluated = random_batch(fpt.EVALUATION_BATCH, MEAN, model.device)
    scores = fpt.neuron_scores(model, start, [batch])

    @torch.no_grad()
    def evaluate():  # with two labels, as `fpt.likeliest_labels`
        labels = evaluated["labels"]
        embeds, mask = prompt(model, evaluated)
        source = model.encoder(inputs_embeds=embeds, attention_mask=mask)
        for _ in range(2):
            fpt.token_losses(model, mask, labels, encoder_outputs=source)

    def score():
        fpt.neuron_scores(model, start, [batch, batch])

    def grow():
        for stage in fpt.SCHEDULES["cr"][1:]:
            fpt.partial_t5(model, stage.depth, stage.width, scores, decoder=False)

    return {"evaluate": evaluate, "score": score, "grow": grow}


def stages(model, args):
    """Schedules: seconds and FLOPs over those of `pt`; and what else a run spends."""
    sizes = sizes_of(model, fpt.SCHEDULES)
    runs = other_costs(model, args)
    flops = {}
    for size, partial in sizes.items():
        runs[size] = updater(partial, args)
        source = args.prompt_length + MEAN
        flops[size] = fpt.step_flops(partial, args.batch, source, TARGET)
    spent = alternate(runs, model.device, args.rounds)
    rate = matrix_rate(model, args.rounds)
    rows = []
    for name in fpt.SCHEDULES:
        time_, cost = mean_of(name, spent), mean_of(name, flops)
        row = {"way": name, "seconds over pt": time_ / spent[FULL]}
        row["FLOPs over pt"] = cost / flops[FULL]
        row["share of the matrix rate"] = cost / time_ / rate
        rows.append(row)
    updates = {
        "evaluation of 500 examples": 500 / fpt.EVALUATION_BATCH * spent["evaluate"],
        "three growths": spent["grow"],
        "scoring": spent["score"],
    }
    for way, time_ in updates.items():
        rows.append({"way": way, "updates of pt": time_ / spent[FULL]})
    rows[-1]["matrix TFLOP/s"] = rate / 1e12
    return rows


def peak(way, shape, precision, args):
    """Most memory, in MB, that one way to train has used after all its stages.

    Each of them ends in a batch of RTE's longest.
    """
    torch.set_num_threads(args.threads)
    model = build(shape, precision, args.device)
    schedule = "cr" if way == "cr" else "pt"
    scores = None
    if schedule == "cr":
        prompt = torch.zeros(args.prompt_length, model.config.d_model)
        batch = random_batch(args.batch, MEAN, model.device)
        scores = fpt.neuron_scores(model, prompt, [batch] * 2)
    for stage in fpt.SCHEDULES[schedule]:
        size = (stage.depth, stage.width)
        partial = fpt.partial_t5(model, *size, scores, decoder=False)
        for length in (MEAN, LONGEST):
            if way == "PEFT":
                update = peft_updater(model, args, length)
            else:
                update = updater(partial, args, length, 4 if "parts" in way else 1)
            update()
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def memory(shape, precision, args):
    """Peaks of the ways to train."""
    spawn = multiprocessing.get_context("spawn")
    peaks = {}
    for way in WAYS:
        with futures.ProcessPoolExecutor(1, spawn) as pool:
            peaks[way] = pool.submit(peak, way, shape, precision, args).result()
    rows = []
    for way, value in peaks.items():
        row = {"way": way, "peak in MB": round(value), "over pt": value / peaks["pt"]}
        rows.append(row)
    return rows


def machine(device):
    """What a record was made on."""
    cpu = platform.machine()
    if sys.platform == "linux":
        found = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    name = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_record(path, record):
    """JSON with a line for each entry of a list, so that records can be read."""
    parts = []
    for key, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        parts.append(f'"{key}": {text}')
    path.write_text("{" + ",\n".join(parts) + "}\n")


def main(args):
    if args.out and args.out.exists():
        sys.exit(f"bench.py: {args.out} exists, and nothing is overwritten")
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    if args.device == "auto":
        args.device = torch.accelerator.current_accelerator() or "cpu"
    args.device = torch.device(args.device)
    start = time.perf_counter()
    record = {"machine": machine(args.device), "minutes": 0, "rows": []}
    print(json.dumps(record["machine"]))
    # Memory first, while this process is small: its peak is inherited by its children.
    jobs = itertools.product(sorted(args.part), args.shape, args.precision)
    for part, shape, precision in jobs:
        if part == "memory":
            rows = memory(shape, precision, args)
        elif part == "speed":
            rows = speed(build(shape, precision, args.device), args)
        else:
            rows = stages(build(shape, precision, args.device), args)
        print(f"\n{part}, {shape}, {precision}\n{pandas.DataFrame(rows).to_string()}")
        for row in rows:
            kept = {"part": part, "shape": shape, "precision": precision}
            kept["attention"] = "sdpa"  # transformers' default
            for key, value in row.items():
                is_float = isinstance(value, float)
                kept[key] = float(f"{value:.4g}") if is_float else value
            record["rows"].append(kept)
        record["minutes"] = round((time.perf_counter() - start) / 60, 1)
        if args.out:
            write_record(args.out, record)


if __name__ == "__main__":
    main(make_parser().parse_args())
