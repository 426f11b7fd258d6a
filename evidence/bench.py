"""What prompt tuning costs, here and now: python evidence/bench.py --out bench.json

Offline, on random weights of the true shapes: nothing can be learned, but cost does not depend on
that. Within one run the contenders take turns; each number is the median of --rounds turns. Tables
go to the screen, all numbers to the json. t5-base on two CPU cores takes about half an hour.

1 throughput  examples per second of `fpt.py` (pt); of PEFT's prompt tuning with shuffled batches
              padded to their longest; and of the same with every input padded to 512, as the
              official code does. Same model, examples, optimiser; dropout off in all of them.
2 stages      seconds of every stage and schedule beside their FLOPs; growing, scoring, evaluating
3             (with 2) achieved FLOP/s, as a share of the largest matrix product measured beside it
4 memory      peaks of pt, of cr after each growth, and of PEFT, each in a process of its own
5 scaling     how seconds grow with batch, input length, prompt length and depth
6 overhead    of Python and framework in an update of the micro model
"""

import argparse
import bisect
import copy
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {  # the published configurations; their weights are random here
    "t5-small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "v1.1-xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32,
                "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5-3b": {"d_model": 1024, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "d_kv": 128},
}
# Percentiles of the tokens of RTE's train examples as "sentence1: ... sentence2: ...". The tail has
# more of them: it is the longest of a shuffled batch that pads the others.
PERCENT = (0, 5, 10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 95, 97, 98, 99, 99.5, 99.8, 100)
RTE = (17, 35, 40, 48, 54, 60, 66, 73, 86, 100, 119, 138, 154, 177, 191, 208, 223, 231, 256, 313)
TARGET = 6  # tokens of "<extra_id_0>entailment</s>"
PARTS = ("throughput", "stages", "memory", "scaling", "overhead")


def make_parser():
    parser = argparse.ArgumentParser("bench.py", allow_abbrev=False,
                                     description="Measure what prompt tuning costs, offline.")
    parser.error = lambda message: parser.exit(2, f"bench.py: error: {message}; see --help\n")
    for name, values, chosen in (("shape", SHAPES, ["t5-small", "t5-base"]),
                                 ("precision", ("fp32", "bf16"), ["fp32", "bf16"]),
                                 ("part", PARTS, list(PARTS))):
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=chosen,
                            help=f"of {', '.join(values)} (default: {' '.join(chosen)})")
    for name, value, text in (("batch", 32, "examples per update"), ("prompt-length", 20, "P"),
                              ("rounds", 5, "turns of each contender"),
                              ("threads", 0, "CPU threads; 0 means torch's choice")):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: {value})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--compile", action="store_true", help="torch.compile each stage's model")
    parser.add_argument("--out", default="", help="new json file for the numbers")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)  # of the part memory
    return parser


if __name__ == "__main__":
    ARGS = make_parser().parse_args()

import torch  # noqa: E402

import fpt  # noqa: E402


def build(shape: str, precision: str, device, layers: int = 0):
    """A T5 of this shape with random weights, frozen, without dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**{"vocab_size": 32128, "decoder_start_token_id": 0, **SHAPES[shape]})
    config.num_layers = config.num_decoder_layers = layers or config.num_layers
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = T5ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def rows(lengths, vocabulary: int = 32000) -> list:
    """Random examples with sources of these lengths."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    return [fpt.Encoded(None, draw(length - 1) + [1], draw(TARGET - 1) + [1])
            for length in lengths]


def epoch_lengths(batch: int) -> tuple[list[int], list[int]]:
    """Padded lengths of the batches of an epoch as RTE's: fpt.py's, and those of a shuffle."""
    lengths = [round(between(dict(zip(PERCENT, RTE)), 100 * i / 1983)) for i in range(1984)]
    examples = [fpt.Encoded(None, [0] * length, []) for length in lengths]
    count = len(lengths) // batch
    ours = [max(len(row.source) for row in rows)
            for rows, _ in zip(fpt.batches(examples, list, 0, batch), range(count))]
    mixed = torch.randperm(len(lengths), generator=fpt.rng("shuffle")).tolist()
    theirs = [max(lengths[i] for i in mixed[k * batch:(k + 1) * batch]) for k in range(count)]
    return ours, theirs


def synchronize(device):
    """A GPU runs behind; wait for it before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run, device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def alternate(contenders: dict, rounds: int, device) -> dict:
    """{name: function} -> {name: median seconds}, in turns; the first, cold, weighs little."""
    found = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            found[name].append(seconds(run, device))
    return {name: statistics.median(times) for name, times in found.items()}


def updater(model, args, batch: int = 0, length: int = 82, prompt_length: int = 0):
    """-> a function that makes one update of `fpt.py` on sources of `length` tokens."""
    weight = torch.randn(prompt_length or args.prompt_length, model.config.d_model) * 0.3
    prompt = fpt.SoftPrompt(weight).to(model.device)
    optimizer = fpt.adafactor(prompt, 0.3)
    part = rows([length] * (batch or args.batch), min(32000, model.config.vocab_size))
    part[0].source.pop()  # one padded position: a mask is made, as in a real batch

    def update():
        fpt.gradient(model, prompt, [[part]])
        optimizer.step()
        optimizer.zero_grad()
    return update


def peft_updater(model, args, length: int):
    """-> a function that makes one update as a loop over PEFT's prompt tuning would."""
    import peft

    wrapped = peft.get_peft_model(copy.copy(model), peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=args.prompt_length)).eval()
    prompt = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = fpt.adafactor(argparse.Namespace(weight=prompt[0]), 0.3)
    part = rows([length] * args.batch)
    part[0].source.pop()

    def update():
        wrapped(**fpt.collate(part, model.device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(prompt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return update


def between(points: dict[float, float], at: float) -> float:
    """The value at `at`: linear between the points, and beyond the last two."""
    known = sorted(points)
    if len(known) == 1:
        return points[known[0]]
    place = min(max(bisect.bisect(known, at), 1), len(known) - 1)
    low, high = known[place - 1:place + 1]
    share = (at - low) / (high - low)
    return points[low] + share * (points[high] - points[low])


def throughput(model, args) -> dict:
    """Examples per second over an epoch of RTE's lengths.

    A contender is timed at a few of the lengths that its batches have, the rest is linear.
    """
    ours, theirs = (sorted(lengths) for lengths in epoch_lengths(args.batch))
    epochs = {"fpt.py": ours, "PEFT": theirs, "padded to 512": [512 - args.prompt_length]}
    loop = functools.partial(peft_updater, model, args)
    make = {"fpt.py": lambda length: updater(fpt.absorbed(model), args, length=length),
            "PEFT": loop, "padded to 512": loop}
    lengths = {name: sorted({found[int(share * (len(found) - 1))] for share in (0, 0.5, 0.95)})
               for name, found in epochs.items()}
    spent = alternate({(name, length): make[name](length)
                       for name in epochs for length in lengths[name]}, args.rounds, model.device)
    result = {}
    for name, found in epochs.items():
        points = {length: spent[name, length] for length in lengths[name]}
        mean = statistics.mean(between(points, length) for length in found)
        result[name] = {"examples_per_second": args.batch / mean, "seconds_at_length": points}
    best = result["fpt.py"]["examples_per_second"]
    return {name: {**row, "fpt.py_is_faster_by": best / row["examples_per_second"]}
            for name, row in result.items()}


def product(model):
    """-> a function that multiplies two 4096 x 4096 matrices of the model's precision; FLOPs."""
    a, b = (torch.randn(4096, 4096, device=model.device, dtype=model.dtype) for _ in range(2))
    return lambda: a @ b.T, 2 * 4096 ** 3


def stages(model, args) -> dict:
    """Seconds and FLOPs of every stage over those of `pt`, and what growing and scoring cost."""
    width = model.config.d_ff
    scores = {side: [torch.rand(width, device=model.device)] * len(getattr(model, side).block)
              for side in ("encoder", "decoder")}
    kinds = {stage[:2] for schedule in fpt.SCHEDULES.values() for stage in schedule}
    partials = {kind: fpt.absorbed(fpt.partial_t5(model, *kind, scores, decoder=False))
                for kind in sorted(kinds)}
    shape = args.batch, args.prompt_length + 82, TARGET
    flops = {kind: fpt.step_flops(partial, *shape) for kind, partial in partials.items()}
    runs = {kind: updater(partial, args) for kind, partial in partials.items()}
    if args.compile:
        for kind, partial in partials.items():
            compiled = copy.copy(partial)
            compiled.forward = torch.compile(partial.forward)
            runs["compiled", *kind] = updater(compiled, args)
    multiply, product_flops = product(model)
    prompt, part = fpt.SoftPrompt(torch.zeros(args.prompt_length, model.config.d_model)), rows(
        [82] * args.batch)
    prompt, batch = prompt.to(model.device), fpt.collate(part, model.device)
    absorbed = fpt.absorbed(model)

    @torch.no_grad()
    def evaluate():  # one batch with two labels
        embeds, mask = prompt(model.shared(batch["input_ids"]), batch["attention_mask"])
        fpt.label_likelihood(absorbed, embeds, mask, [part[0].target, part[1].target])

    spent = alternate({
        **runs, "product": multiply, "evaluate": evaluate,
        "score": lambda: fpt.neuron_scores(model, prompt.weight, [batch] * 2),
        "grow": lambda: [fpt.partial_t5(model, *stage[:2], scores, decoder=False)
                         for stage in fpt.SCHEDULES["cr"]]}, args.rounds, model.device)
    return summary(spent, flops, product_flops / spent["product"], args)


def summary(spent: dict, flops: dict, rate: float, args) -> dict:
    full = (1.0, 1.0)
    each = [{"depth": kind[0], "width": kind[1], "seconds": spent[kind],
             "seconds_over_pt": spent[kind] / spent[full], "flops_over_pt": count / flops[full],
             "flops_per_second": count / spent[kind],
             "share_of_product": count / spent[kind] / rate,
             "compiled_seconds": spent.get(("compiled", *kind))} for kind, count in flops.items()]
    totals = {name: {key: sum(stage.share * values[stage[:2]] for stage in schedule) / values[full]
                     for key, values in (("seconds_over_pt", spent), ("flops_over_pt", flops))}
              for name, schedule in fpt.SCHEDULES.items()}
    training = 3000 * spent[full] * totals["cr"]["seconds_over_pt"]
    return {"stages": each, "schedules": totals, "product_flops_per_second": rate,
            "growing_seconds": spent["grow"], "scoring_seconds": spent["score"],
            "growing_and_scoring_over_3000_updates": (spent["grow"] + spent["score"]) / training,
            "evaluation_of_500_in_updates": 500 / args.batch * spent["evaluate"] / spent[full]}


def peak(device) -> float:
    """Most memory used so far, in MB: of the process, or of the GPU's tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def child(args, device) -> dict:
    """Peak memory of one way to train, after each stage: as `fpt.train` does it."""
    model = build(args.shape[0], args.precision[0], device)
    weights, lengths = peak(device), (60, 150, 313)
    if args.child == "PEFT":
        for length in lengths:
            peft_updater(model, args, length)()
        return {"weights": weights, "peaks": [peak(device)]}
    prompt = fpt.SoftPrompt(torch.randn(args.prompt_length, model.config.d_model) * 0.3).to(device)
    name, peaks, scores, optimizer = args.child, [], None, fpt.adafactor(prompt, 0.3)
    if name == "cr":
        batches = [fpt.collate(rows([length] * args.batch), device) for length in (60, 100)]
        scores = fpt.neuron_scores(model, prompt.weight, batches)
    for stage in fpt.SCHEDULES["cr" if name == "cr" else "pt"]:
        partial = None
        partial = fpt.absorbed(fpt.partial_t5(model, *stage[:2], scores, decoder=False))
        runner = fpt.checkpointed(partial) if "checkpointing" in name else partial
        parts = 4 if "accumulate" in name else 1
        for length in lengths:
            fpt.gradient(runner, prompt, fpt.split(rows([length] * args.batch), 1, parts))
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(peak(device))
    return {"weights": weights, "peaks": peaks}


def memory(shape: str, precision: str, args) -> dict:
    """Peaks of processes that each train in one way; their last batches are RTE's longest."""
    def measure(name):
        command = [sys.executable, __file__, "--child", name, "--shape", shape, "--precision",
                   precision, "--device", args.device, "--batch", str(args.batch),
                   "--prompt-length", str(args.prompt_length), "--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise fpt.UserError(f"memory of {name}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout)

    found = {name: measure(name) for name in (
        "pt", "cr", "PEFT", "pt accumulate 4", "pt checkpointing")}
    for row in found.values():
        row["peak_over_pt"] = row["peaks"][-1] / found["pt"]["peaks"][-1]
    return found


def scaling(precision: str, args, device) -> dict:
    """Seconds of an update of `pt` on t5-small, one knob at a time."""
    models = {layers: fpt.absorbed(build("t5-small", precision, device, layers))
              for layers in (6, 12, 24)}
    runs = {("batch", n): updater(models[6], args, batch=n) for n in (8, 16, 32, 64)}
    runs |= {("source tokens", n): updater(models[6], args, length=n) for n in (32, 82, 256, 492)}
    runs |= {("prompt length", n): updater(models[6], args, prompt_length=n) for n in (5, 20, 100)}
    runs |= {("layers", n): updater(model, args) for n, model in models.items()}
    spent, found = alternate(runs, args.rounds, device), {}
    for (knob, value), time_ in spent.items():
        found.setdefault(knob, {})[value] = time_
    return found


def overhead(args) -> dict:
    """An update of the micro model beside one that has next to nothing to compute."""
    torch.set_num_threads(1)  # of the default task; its matrices are too small for two
    model, _ = fpt.load_model(str(ROOT / "micro" / "model"), torch.device("cpu"), "fp32")
    model = fpt.absorbed(model)
    spent = alternate({"update": updater(model, args, length=20),
                       "nothing": updater(model, args, batch=1, length=2, prompt_length=1)},
                      10 * args.rounds, torch.device("cpu"))
    return {**spent, "share": spent["nothing"] / spent["update"]}


def machine(device) -> dict:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            **fpt.versions()}


def show(title: str, result) -> None:
    """A result as text: nested names become a path in front of each number."""
    def lines(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from lines(inner, (*path, str(key)))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            from tabulate import tabulate

            yield "\n" + tabulate([{k: v for k, v in row.items() if v is not None}
                                   for row in value], headers="keys", floatfmt=".4g") + "\n"
        else:
            numbers = value if isinstance(value, list) else [value]
            yield f"{' / '.join(path):<60} {' '.join(f'{number:.4g}' for number in numbers)}"

    print(f"\n{title}\n" + "\n".join(lines(result, ())), flush=True)


def main(args) -> None:
    if args.batch < 4 or min(args.prompt_length, args.rounds) < 1 or args.threads < 0:
        raise fpt.UserError("--batch must be at least 4, --prompt-length and --rounds 1")
    if args.out and Path(args.out).exists():
        raise fpt.UserError(f"--out {args.out} exists, and nothing is overwritten: name another")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = fpt.pick_device(args.device)
    if args.child:
        print(json.dumps(child(args, device)))
        return
    record = {"settings": vars(args), "machine": machine(device), "results": {}}
    print(json.dumps(record["machine"]))

    def keep(title, result):
        show(title, result)
        record["results"][title] = result
        if args.out:
            fpt.write(Path(args.out), json.dumps(record, indent=1))

    for shape in args.shape:
        for precision in args.precision:
            title = f"{shape} {precision}"
            if "memory" in args.part:  # first: this process holds little yet
                keep(f"memory, {title}, MB", memory(shape, precision, args))
            model = build(shape, precision, device)
            if "throughput" in args.part:
                keep(f"throughput, {title}", throughput(model, args))
            if "stages" in args.part:
                keep(f"stages, {title}", stages(model, args))
            del model
    for precision in args.precision if "scaling" in args.part else ():
        keep(f"scaling, t5-small {precision}, seconds", scaling(precision, args, device))
    if "overhead" in args.part:
        keep("overhead, micro model, seconds", overhead(args))


if __name__ == "__main__":
    try:
        main(ARGS)
    except (fpt.UserError, torch.OutOfMemoryError) as error:
        print(f"bench.py: error: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from None
