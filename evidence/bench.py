"""What prompt tuning costs, here and now: python evidence/bench.py --out FILE.json

Offline, on random weights of the true shapes: nothing can be learned, but cost does not depend on
that. Within one run the contenders take turns; each number is the median of --rounds turns.

speed   examples per second over an epoch of RTE's lengths, of PEFT's prompt tuning in a plain loop:
        every input padded to 512, as in the official code; shuffled batches; batches grouped by
        length, as by transformers' Trainer; and of fpt.py: `pt` and `cr`, each with T5's own and
        with absorbed cross-attention. The same model, optimiser, targets, no dropout.
stages  seconds of each schedule beside its FLOPs, FLOP/s over those of a large matrix product that
        is measured beside them; what it costs to grow, to score neurons, to evaluate
memory  peaks of ways to train; on a CPU each in a process of its own
"""

import argparse, copy, functools, json, os, platform  # noqa: E401
import re, resource, statistics, subprocess, sys, time  # noqa: E401
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy, pandas, torch  # noqa: E401, E402
from transformers import T5Config, T5ForConditionalGeneration  # noqa: E402
from transformers.trainer_pt_utils import get_length_grouped_indices  # noqa: E402

import fpt  # noqa: E402

SHAPES = {  # the published configurations; their weights are random here
    "t5-small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "v1.1-xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32,
                "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# Percentiles of the tokens of RTE's train examples as "sentence1: ... sentence2: ...". The tail has
# more of them: it is the longest of a shuffled batch that pads the others.
PERCENT = (0, 5, 10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 95, 97, 98, 99, 99.5, 99.8, 100)
RTE = (17, 35, 40, 48, 54, 60, 66, 73, 86, 100, 119, 138, 154, 177, 191, 208, 223, 231, 256, 313)
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
KINDS, TARGET, MEAN = ("sdpa", "eager"), 6, 82  # tokens of RTE's targets and sources
PARTS, FULL = ("speed", "stages", "memory"), (1.0, 1.0)
WAYS = ("pt", "cr", "PEFT", "pt, 4 parts", "pt, checkpointing")


def make_parser():
    parser = argparse.ArgumentParser("bench.py", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"bench.py: error: {text}; see --help\n")
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=["t5-small", "t5-base"], help="of the model")
    add("--precision", nargs="+", choices=PRECISIONS, default=[*PRECISIONS], help="of its weights")
    add("--attention", nargs="+", choices=KINDS, default=[*KINDS], help="sdpa: torch's own")
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="of the measurements")
    add("--batch", type=int, default=32, help="examples per update")
    add("--prompt-length", type=int, default=20, help="P")
    add("--rounds", type=int, default=3, help="turns of each contender")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--out", default="", help="new json file for the numbers")
    add("--child", choices=WAYS, help=argparse.SUPPRESS)  # of the part memory
    return parser


# ====== Contenders ================================================================================


def build(shape: str, precision: str, device):
    """A T5 of this shape with random weights, frozen, without dropout."""
    config = T5Config(**{"vocab_size": 32128, "decoder_start_token_id": 0, "dropout_rate": 0.0,
                         "dtype": PRECISIONS[precision], **SHAPES[shape]})
    torch.manual_seed(0)
    with torch.device(device):
        model = T5ForConditionalGeneration._from_config(config)
    return model.eval().requires_grad_(False)


def random_batch(size: int, length: int) -> dict:
    """Random examples of this length; one padded position makes a mask, as usual."""
    draw = functools.partial(torch.randint, 3, 32000, generator=fpt.rng("examples"))
    rows = [[[*draw((count - 1,)).tolist(), 1] for count in (length, TARGET)] for _ in range(size)]
    rows[0][0].pop()
    return fpt.collate(rows)


def epochs(batch: int) -> dict[str, list[int]]:
    """Padded lengths of the batches of an epoch as RTE's: shuffled, Trainer's groups, fpt.py's."""
    lengths = numpy.interp(numpy.arange(1984) / 19.83, PERCENT, RTE).round().astype(int)
    torch.manual_seed(0)
    orders = {"shuffled": torch.randperm(len(lengths)).numpy(),
              "grouped": numpy.array(get_length_grouped_indices(lengths.tolist(), batch))}
    count = len(lengths) // batch
    batch_at = fpt.batches([([0] * length, [1]) for length in lengths], list, 0, batch)
    return {name: lengths[order[:count * batch]].reshape(count, batch).max(1).tolist()
            for name, order in orders.items()} | {
        "ours": [batch_at(step)["input_ids"].shape[1] for step in range(1, count + 1)]}


def updater(model, args, length: int = MEAN, parts: int = 1):
    """-> a function that makes one update of `fpt.py` on sources of `length` tokens."""
    prompt = fpt.SoftPrompt(torch.randn(args.prompt_length, model.config.d_model) * 0.3)
    optimizer = fpt.adafactor(prompt.to(model.device), 0.3)
    batch = random_batch(args.batch, length)

    def update():
        fpt.gradient(model, prompt, batch, parts)
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
    batch = random_batch(args.batch, length)

    def update():
        wrapped(**{name: rows.to(model.device) for name, rows in batch.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(prompt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return update


def sizes_of(model, names, view) -> dict:
    """{(depth, width): a view of the partial model} for every stage of these schedules."""
    scores = {side: [torch.rand(model.config.d_ff, device=model.device)] * len(stack.block)
              for side, stack in (("encoder", model.encoder), ("decoder", model.decoder))}
    return {size: view(fpt.partial_t5(model, *size, scores, decoder=False))
            for size in sorted({stage[:2] for name in names for stage in fpt.SCHEDULES[name]})}


def as_run(model):
    """As `fpt.prepare` has it run: in bf16 and on GPUs, T5's own cross-attention is faster."""
    pays = (model.device.type, model.dtype) == ("cpu", torch.float32)
    return fpt.absorbed(model) if pays else model


def mean_of(name: str, of_size: dict) -> float:
    """Of a schedule's updates, from what one costs on each size."""
    return sum(stage.share * of_size[stage[:2]] for stage in fpt.SCHEDULES[name])


# ====== Measurements ==============================================================================


def seconds(run, device) -> float:
    """Of one call; a GPU runs behind, so wait for it before reading a clock."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else int
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def alternate(contenders: dict, model, rounds: int) -> dict:
    """{(attention, ...): function} -> {(attention, ...): median seconds}, in turns."""
    found = {key: [] for key in contenders}
    for number in range(rounds + 1):
        for key, run in contenders.items():
            for part in model, model.encoder, model.decoder:  # each has a config of its own
                part.config._attn_implementation = key[0]
            found[key] += [seconds(run, model.device)] * (number > 0)  # the first is cold
    return {key: statistics.median(times) for key, times in found.items()}


def speed(model, args) -> list[dict]:
    """Examples per second over an epoch of RTE's lengths, for each kind of attention.

    Each contender is timed at three lengths; seconds are quadratic in between.
    """
    runs, lengths = {}, (24, 120, RTE[-1])
    views = {"": lambda part: part, ", absorbed": fpt.absorbed}
    sizes = {view: sizes_of(model, ["cr"], make) for view, make in views.items()}
    for attention in args.attention:
        for length in lengths:
            runs[attention, "PEFT", length] = peft_updater(model, args, length)
            for view, parts in sizes.items():
                for size, part in parts.items():
                    runs[attention, (view, size), length] = updater(part, args, length)
        runs[attention, "PEFT", 512] = peft_updater(model, args, 512 - args.prompt_length)
    spent, padded, rows = alternate(runs, model, args.rounds), epochs(args.batch), []
    for attention in args.attention:
        def mean(key, epoch):
            curve = numpy.polyfit(lengths, [spent[attention, key, n] for n in lengths], 2)
            return numpy.polyval(curve, padded[epoch]).mean().item()
        times = {"PEFT, padded to 512": spent[attention, "PEFT", 512],
                 "PEFT, shuffled": mean("PEFT", "shuffled"),
                 "PEFT, grouped by length": mean("PEFT", "grouped"),
                 **{f"fpt.py, {name}{view}": mean_of(
                     name, {size: mean((view, size), "ours") for size in parts})
                    for name in ("pt", "cr") for view, parts in sizes.items()}}
        rows += [{"attention": attention, "way": way, "examples per second": args.batch / time_,
                  "over PEFT shuffled": times["PEFT, shuffled"] / time_,
                  "over PEFT grouped": times["PEFT, grouped by length"] / time_}
                 for way, time_ in times.items()]
    return rows


def stages(model, args) -> list[dict]:
    """Schedules: seconds and FLOPs over those of `pt`; and what else a run spends, in updates."""
    schedules = ("pt", "ld", "fr", "cr", "fast")
    sizes, square = sizes_of(model, schedules, as_run), torch.randn(
        4096, 4096, device=model.device, dtype=model.dtype)
    products = 20 if model.device.type == "cuda" else 1  # one alone is too short for its clock
    prompt = fpt.SoftPrompt(torch.zeros(args.prompt_length, model.config.d_model)).to(model.device)
    batch = {key: rows.to(model.device) for key, rows in random_batch(args.batch, MEAN).items()}
    scores = fpt.neuron_scores(model, prompt.weight, [batch])

    @torch.no_grad()
    def evaluate():  # one batch with two labels, as `fpt.evaluate` does it
        embeds, mask = prompt(model.shared(batch["input_ids"]), batch["attention_mask"])
        source = model.encoder(inputs_embeds=embeds, attention_mask=mask)
        for _ in range(2):
            fpt.token_losses(sizes[FULL], mask, batch["labels"], encoder_outputs=source)
    others = {"product": lambda: [square @ square.T for _ in range(products)], "evaluate": evaluate,
              "score": lambda: fpt.neuron_scores(model, prompt.weight, [batch] * 2),
              "grow": lambda: [fpt.partial_t5(model, *stage[:2], scores, decoder=False)
                               for stage in fpt.SCHEDULES["cr"]]}
    flops = {size: fpt.step_flops(partial, args.batch, args.prompt_length + MEAN, TARGET)
             for size, partial in sizes.items()}
    rows = []
    for attention in args.attention:
        runs = {size: updater(partial, args) for size, partial in sizes.items()} | others
        spent = alternate({(attention, key): run for key, run in runs.items()}, model, args.rounds)
        spent = {key: time_ for (_, key), time_ in spent.items()}
        rate = products * 2 * 4096 ** 3 / spent["product"]
        rows += [{"attention": attention, "way": name,
                  "seconds over pt": mean_of(name, spent) / spent[FULL],
                  "FLOPs over pt": mean_of(name, flops) / flops[FULL],
                  "share of the matrix rate": mean_of(name, flops) / mean_of(name, spent) / rate}
                 for name in schedules]
        rest = (("evaluation of 500 examples", "evaluate", 500 / args.batch),
                ("three growths", "grow", 1), ("scoring", "score", 1))
        rows += [{"attention": attention, "way": what,
                  "updates of pt": spent[key] / spent[FULL] * times} for what, key, times in rest]
        rows[-1]["matrix TFLOP/s"] = rate / 1e12
    return rows


def peak(device) -> float:
    """Most memory used so far, in MB: of the process, or of the GPU's tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def child(way: str, shape: str, precision: str, args, device) -> float:
    """Peak memory of one way to train, through all stages; the last batches are RTE's longest."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model, scores, name = build(shape, precision, device), None, "cr" if way == "cr" else "pt"
    model.set_attn_implementation(args.attention[0])
    if name == "cr":
        scores = fpt.neuron_scores(model, torch.randn(args.prompt_length, model.config.d_model),
                                   [random_batch(args.batch, MEAN)] * 2)
    if "checkpointing" in way:  # as `fpt.prepare`
        model.activation_checkpointing_enable()
        model.disable_input_require_grads()
        model.train()
    for stage in fpt.SCHEDULES[name]:
        partial = update = None  # the old one's matrices go before there are new ones
        partial = as_run(fpt.partial_t5(model, *stage[:2], scores, decoder=False))
        for length in MEAN, RTE[-1]:
            update = peft_updater(model, args, length) if way == "PEFT" else updater(
                partial, args, length, 4 if "parts" in way else 1)
            update()
    return peak(device)


def memory(shape: str, precision: str, args, device) -> list[dict]:
    """Peaks of the ways to train, with the first kind of attention asked for."""
    found = {}
    for way in WAYS:
        if device.type == "cuda":
            found[way] = child(way, shape, precision, args, device)
            continue
        command = [sys.executable, __file__, "--child", way, "--shape", shape, "--precision",
                   precision, "--device", args.device, "--batch", str(args.batch), "--threads",
                   str(args.threads), "--attention", args.attention[0]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(done.stdout)
    return [{"attention": args.attention[0], "way": way, "peak in MB": round(value),
             "over pt": value / found["pt"]} for way, value in found.items()]


def machine(device) -> dict:
    """What a record was made on."""
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    name = re.search("model name.*: (.*)", f"{text}\nmodel name: {platform.machine()}")[1]
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": sys.modules["transformers"].__version__}


def write_record(path: Path, record: dict) -> None:
    """JSON with a line for each entry of a list, so that records can be read and compared."""
    lines = {key: "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list)
             else json.dumps(value) for key, value in record.items()}
    path.write_text("{" + ",\n".join(f'"{key}": {text}' for key, text in lines.items()) + "}\n")


def main(args) -> None:
    if args.batch < 4 or min(args.prompt_length, args.rounds) < 1 or args.threads < 0:
        make_parser().error("--batch must be at least 4, --prompt-length and --rounds 1")
    if args.out and Path(args.out).exists():
        make_parser().error(f"--out {args.out} exists, and nothing is overwritten: name another")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    best = str(fpt.PartialState().device)
    device = torch.zeros(1, device=args.device.replace("auto", best)).device
    if args.child:
        print(child(args.child, args.shape[0], args.precision[0], args, device))
        return
    start, record = time.perf_counter(), {"machine": machine(device), "minutes": 0, "rows": []}
    print(json.dumps(record["machine"]))
    for shape in args.shape:
        for precision in args.precision:
            for part in sorted(args.part):  # memory first, while this process is small
                rows = memory(shape, precision, args, device) if part == "memory" else (
                    {"speed": speed, "stages": stages}[part](build(shape, precision, device), args))
                print(f"\n{part}, {shape}, {precision}\n{pandas.DataFrame(rows).to_string()}",
                      flush=True)
                record["rows"] += [{"part": part, "shape": shape, "precision": precision, **{
                    key: float(f"{value:.4g}") if isinstance(value, float) else value
                    for key, value in row.items()}} for row in rows]
                record["minutes"] = round((time.perf_counter() - start) / 60, 1)
                if args.out:
                    write_record(Path(args.out), record)


if __name__ == "__main__":
    main(make_parser().parse_args())
