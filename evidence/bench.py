"""What prompt tuning costs, here and now: python evidence/bench.py --out bench.json

Offline, on random weights of the true shapes: nothing can be learned, but cost does not depend on
that. Within one run the contenders take turns; each number is the median of --rounds turns. Tables
go to the screen, all numbers to the json. t5-base on two CPU cores takes about half an hour.

throughput  examples per second of `fpt.py` (pt); of PEFT's prompt tuning with shuffled batches
            padded to their longest; and of the same with every input padded to 512, as the
            official code does. Same model, examples, optimiser; dropout off in all of them.
stages      seconds of every stage and schedule beside their FLOPs, FLOP/s as a share of those of
            the largest matrix product, measured beside it; growing, scoring, evaluating
memory      peaks of pt, of cr after each growth, and of PEFT, each in a process of its own
scaling     how seconds grow with batch, input length, prompt length and depth
overhead    of Python and framework in an update of the micro model
"""

import argparse, copy, functools, json, os, platform  # noqa: E401
import re, resource, statistics, subprocess, sys, time  # noqa: E401
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy, pandas, torch  # noqa: E401, E402
from transformers import T5Config, T5ForConditionalGeneration  # noqa: E402

import fpt  # noqa: E402

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
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
TARGET = 6  # tokens of "<extra_id_0>entailment</s>"
PARTS = ("throughput", "stages", "memory", "scaling", "overhead")


def make_parser():
    parser = argparse.ArgumentParser("bench.py", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"bench.py: error: {text}; see --help\n")
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=["t5-small", "t5-base"], help="of the model")
    add("--precision", nargs="+", choices=PRECISIONS, default=[*PRECISIONS], help="of its weights")
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="of the measurements")
    add("--batch", type=int, default=32, help="examples per update")
    add("--prompt-length", type=int, default=20, help="P")
    add("--rounds", type=int, default=5, help="turns of each contender")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--compile", action="store_true", help="torch.compile each stage's model")
    add("--out", default="", help="new json file for the numbers")
    add("--child", default="", help=argparse.SUPPRESS)  # of the part memory
    return parser


def build(shape: str, precision: str, device, layers: int = 0):
    """A T5 of this shape with random weights, frozen, without dropout."""
    config = T5Config(**{"vocab_size": 32128, "decoder_start_token_id": 0, "dropout_rate": 0.0,
                         "dtype": PRECISIONS[precision], **SHAPES[shape]})
    config.num_layers = config.num_decoder_layers = layers or config.num_layers
    torch.manual_seed(0)
    with torch.device(device):
        model = T5ForConditionalGeneration._from_config(config)
    return model.eval().requires_grad_(False)


def random_batch(lengths, vocabulary: int = 32000) -> dict:
    """Random examples with sources of these lengths; one padded position makes a mask, as usual."""
    draw = functools.partial(torch.randint, 3, vocabulary, generator=fpt.rng("examples"))
    rows = [[[*draw((count - 1,)).tolist(), 1] for count in (length, TARGET)] for length in lengths]
    rows[0][0].pop()
    return fpt.collate(rows)


def epoch_lengths(batch: int) -> tuple[list[int], list[int]]:
    """Padded lengths of the batches of an epoch as RTE's: fpt.py's, and those of a shuffle."""
    lengths = numpy.interp(numpy.arange(1984) / 19.83, PERCENT, RTE).round().astype(int)
    count = len(lengths) // batch
    batch_at = fpt.batches([([0] * length, [1]) for length in lengths], list, 0, batch)
    ours = [batch_at(step)["input_ids"].shape[1] for step in range(1, count + 1)]
    mixed = torch.randperm(len(lengths), generator=fpt.rng("shuffle"))[:count * batch]
    return ours, lengths[mixed.numpy()].reshape(count, batch).max(1).tolist()


def seconds(run, device) -> float:
    """Of one call; a GPU runs behind, so wait for it before reading a clock."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else int
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def alternate(contenders: dict, rounds: int, device) -> dict:
    """{name: function} -> {name: median seconds}, in turns; the first, cold, weighs little."""
    found = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            found[name].append(seconds(run, device))
    return {name: statistics.median(times) for name, times in found.items()}


def updater(model, args, batch: int = 0, length: int = 82, prompt_length: int = 0, parts: int = 1):
    """-> a function that makes one update of `fpt.py` on sources of `length` tokens."""
    weight = torch.randn(prompt_length or args.prompt_length, model.config.d_model) * 0.3
    prompt = fpt.SoftPrompt(weight).to(model.device)
    optimizer = fpt.adafactor(prompt, 0.3)
    rows = random_batch([length] * (batch or args.batch), min(32000, model.config.vocab_size))

    def update():
        fpt.gradient(model, prompt, rows, parts)
        optimizer.step()
        optimizer.zero_grad()
    return update


def peft_updater(model, args, length: int):
    """-> a function that makes one update as a loop over PEFT's prompt tuning would."""
    import peft

    wrapped = peft.get_peft_model(copy.copy(model), peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=args.prompt_length)).eval()
    [prompt] = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = fpt.adafactor(argparse.Namespace(weight=prompt), 0.3)
    batch = random_batch([length] * args.batch)

    def update():
        wrapped(**{name: rows.to(model.device) for name, rows in batch.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(prompt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return update


def throughput(model, args) -> dict:
    """Examples per second over an epoch of RTE's lengths.

    A contender is timed at a few of the lengths that its batches have, the rest is linear.
    """
    ours, theirs = map(sorted, epoch_lengths(args.batch))
    epochs = {"fpt.py": ours, "PEFT": theirs, "padded to 512": [512 - args.prompt_length]}
    make = dict.fromkeys(epochs, functools.partial(peft_updater, model, args))
    make["fpt.py"] = lambda length: updater(fpt.absorbed(model), args, length=length)
    lengths = {name: sorted({found[int(share * (len(found) - 1))] for share in (0, 0.5, 0.9, 1)})
               for name, found in epochs.items()}
    spent = alternate({(name, length): make[name](length)
                       for name in epochs for length in lengths[name]}, args.rounds, model.device)
    rates = {}
    for name, found in epochs.items():
        points = {length: spent[name, length] for length in lengths[name]}
        mean = numpy.interp(found, list(points), list(points.values())).mean().item()
        rates[name] = {"examples_per_second": args.batch / mean, "seconds_at_length": points}
    best = rates["fpt.py"]["examples_per_second"]
    for row in rates.values():
        row["fpt.py_is_faster_by"] = best / row["examples_per_second"]
    return rates


def stages(model, args) -> dict:
    """Seconds and FLOPs of every stage over those of `pt`, and what growing and scoring cost."""
    scores = {side: [torch.rand(model.config.d_ff, device=model.device)] * len(stack.block)
              for side, stack in (("encoder", model.encoder), ("decoder", model.decoder))}
    partials = {kind: fpt.absorbed(fpt.partial_t5(model, *kind, scores, decoder=False))
                for kind in sorted({stage[:2] for row in fpt.SCHEDULES.values() for stage in row})}
    flops = {kind: fpt.step_flops(partial, args.batch, args.prompt_length + 82, TARGET)
             for kind, partial in partials.items()}
    runs = {kind: updater(partial, args) for kind, partial in partials.items()}
    for kind, partial in partials.items() if args.compile else ():
        compiled = copy.copy(partial)
        compiled.forward = torch.compile(partial.forward)
        runs["compiled", *kind] = updater(compiled, args)
    square = torch.randn(4096, 4096, device=model.device, dtype=model.dtype)
    prompt = fpt.SoftPrompt(torch.zeros(args.prompt_length, model.config.d_model)).to(model.device)
    batch = {key: rows.to(model.device) for key, rows in random_batch([82] * args.batch).items()}

    @torch.no_grad()
    def evaluate():  # one batch with two labels, as `fpt.evaluate` does it
        embeds, mask = prompt(model.shared(batch["input_ids"]), batch["attention_mask"])
        source = model.encoder(inputs_embeds=embeds, attention_mask=mask)
        for _ in range(2):
            fpt.token_losses(partials[1.0, 1.0], mask, batch["labels"], encoder_outputs=source)

    spent = alternate({
        **runs, "product": lambda: square @ square.T, "evaluate": evaluate,
        "score": lambda: fpt.neuron_scores(model, prompt.weight, [batch] * 2),
        "grow": lambda: [fpt.partial_t5(model, *stage[:2], scores, decoder=False)
                         for stage in fpt.SCHEDULES["cr"]]}, args.rounds, model.device)
    rate, full = 2 * 4096 ** 3 / spent["product"], (1.0, 1.0)
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
    weights, lengths, name, peaks = peak(device), (60, 150, 313), args.child, []
    scores = partial = update = None
    if name == "cr":
        scores = fpt.neuron_scores(model, torch.randn(args.prompt_length, model.config.d_model),
                                   [random_batch([length] * args.batch) for length in (60, 100)])
    if "checkpointing" in name:  # as `fpt.prepare`
        model.activation_checkpointing_enable()
        model.disable_input_require_grads()
        model.train()
    for stage in fpt.SCHEDULES["cr" if name == "cr" else "pt"]:
        partial = update = None  # the old one's matrices go before there are new ones
        partial = fpt.absorbed(fpt.partial_t5(model, *stage[:2], scores, decoder=False))
        for length in lengths:
            update = peft_updater(model, args, length) if name == "PEFT" else updater(
                partial, args, length=length, parts=4 if "accumulate" in name else 1)
            update()
        peaks.append(peak(device))
    return {"weights": weights, "peaks": peaks}


def memory(shape: str, precision: str, args) -> dict:
    """Peaks of processes that each train in one way; their last batches are RTE's longest."""
    found = {}
    for name in ("pt", "cr", "PEFT", "pt accumulate 4", "pt checkpointing"):
        command = [sys.executable, __file__, "--child", name, "--shape", shape, "--precision",
                   precision, "--device", args.device, "--batch", str(args.batch),
                   "--prompt-length", str(args.prompt_length), "--threads", str(args.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout)
        found[name]["peak_over_pt"] = found[name]["peaks"][-1] / found["pt"]["peaks"][-1]
    return found


def scaling(precision: str, args, device) -> dict:
    """Seconds of an update of `pt` on t5-small, one knob at a time."""
    models = {n: fpt.absorbed(build("t5-small", precision, device, n)) for n in (6, 12, 24)}
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
    torch.set_num_threads(1)  # its matrices are too small for two
    device = torch.device("cpu")
    model = fpt.absorbed(fpt.load_model(str(fpt.MICRO / "model"), device, "fp32")[0])
    spent = alternate({"update": updater(model, args, length=20),
                       "nothing": updater(model, args, batch=1, length=2, prompt_length=1)},
                      10 * args.rounds, device)
    return {**spent, "share": spent["nothing"] / spent["update"]}


def machine(device) -> dict:
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    name = re.search("model name.*: (.*)", f"{text}\nmodel name: {platform.machine()}")[1]
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "torch": torch.__version__, "transformers": sys.modules["transformers"].__version__}


def main(args) -> None:
    if args.batch < 4 or min(args.prompt_length, args.rounds) < 1 or args.threads < 0:
        make_parser().error("--batch must be at least 4, --prompt-length and --rounds 1")
    if args.out and Path(args.out).exists():
        make_parser().error(f"--out {args.out} exists, and nothing is overwritten: name another")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    best = str(fpt.PartialState().device)
    device = torch.zeros(1, device=args.device.replace("auto", best)).device
    if args.child:
        print(json.dumps(child(args, device)))
        return
    record = {"settings": vars(args), "machine": machine(device), "results": {}}
    print(json.dumps(record["machine"]))

    def keep(title, result):
        record["results"][title] = result
        shown, rest = {"index": False, "float_format": "{:.4g}".format}, dict(result)
        table = pandas.DataFrame(rest.pop("stages", [])).dropna(axis=1)
        rest = pandas.json_normalize(rest, sep=" / ").T.reset_index()  # a path before each number
        print(f"\n{title}\n{table.to_string(**shown) if len(table) else ''}\n"
              f"{rest.to_string(header=False, **shown)}", flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(record, indent=1))

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
    main(make_parser().parse_args())
