"""python -m pytest -q        every test of fpt.py and of its documents: offline, a minute

The tests compare with values worked out by hand, or with something that fpt.py does not
contain: stock transformers models, PEFT, PyTorch's FLOP counter, a loop without tricks.
The three promises come first, then tiny models and tasks, then fpt.py by its sections.
"""

import copy
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

# Before the imports that read them. What this machine has cached cannot help a test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import fpt

ROOT = Path(__file__).resolve().parent
LAYERS, D, D_FF, VOCAB, P = 6, 16, 32, 64, 3  # sizes of a tiny T5, vectors of its prompt

# What is deprecated is blamed on the module that our call lands in.
CALLED = "(fpt|transformers|accelerate|torchmetrics|datasets|pandas)[.]?.*"
pytestmark = [
    pytest.mark.filterwarnings(f"error::DeprecationWarning:{CALLED}"),
    pytest.mark.filterwarnings(f"error::FutureWarning:{CALLED}"),
]

# ====== The three promises ============================================================


def test_a_partial_model_has_the_shapes_that_were_asked_for():
    model = tiny()

    partial = fpt.partial_t5(model, depth=0.5, width=0.25, scores=random_scores())

    assert len(partial.encoder.block) == 3
    assert len(partial.decoder.block) == 3
    for block in [*partial.encoder.block, *partial.decoder.block]:
        assert ffn(block).wi_0.weight.shape == (8, 16)
        assert ffn(block).wi_1.weight.shape == (8, 16)
        assert ffn(block).wo.weight.shape == (16, 8)


def test_one_prompt_and_one_optimiser_go_through_every_stage():
    prompt = fpt.SoftPrompt(torch.zeros(P, D))
    weight = prompt.weight
    optimizer = fpt.adafactor(prompt, lr=0.3)
    layers = []

    def gradient(partial, prompt, batch):
        assert prompt.weight is weight
        layers.append(len(partial.encoder.block))
        return fpt.gradient(partial, prompt, batch)

    for run in fpt.train(
        tiny(),
        prompt,
        optimizer,
        fpt.SCHEDULES["cr"],
        fpt.batches(some_task().train, 4, "cpu", seed=0),
        lambda model, prompt: 0.0,
        steps=5,
        eval_every=5,
        run=fpt.Run(),
        scores=random_scores(),
        gradient=gradient,
    ):
        assert optimizer.state[weight]["step"] == run.step

    assert layers == [2, 3, 5, 6, 6]
    assert list(optimizer.state) == [weight]
    assert weight.abs().min() > 0


def test_the_command_tunes_a_prompt_and_leaves_its_files(here, tmp_path):
    fpt.save_prompt(tmp_path / "start", torch.zeros(P, D), "any")

    [result] = fpt.main(flags(here, tmp_path / "out", "--init", tmp_path / "start"))

    assert 0 <= result["validation"] <= 100
    assert fpt.load_prompt(tmp_path / "out/cr-seed0/prompt").abs().min() > 0
    assert list(contents(tmp_path / "out")) == [
        "cr-seed0/log.jsonl",
        "cr-seed0/predictions.jsonl",
        "cr-seed0/prompt/adapter_config.json",
        "cr-seed0/prompt/adapter_model.safetensors",
        "cr-seed0/results.json",
        "settings.json",
    ]


# ====== Tiny models, a tokenizer and a task, made here ================================

KINDS = ["v1.0", "v1.1", "mt5"]  # ReLU and tied head; gated and untied; the same as mT5
WORDS = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "yes", "no"]
WORDS += [f"w{i:02}" for i in range(50)]


def tiny(kind="v1.1", seed=0, **changes):
    """A random, frozen T5. Half of it would drop out if anything turned dropout on."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "d_model": D,
        "d_kv": 4,
        "num_heads": 3,  # 3 heads of 4 are not d_model
        "d_ff": D_FF,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "dropout_rate": 0.5,
        "decoder_start_token_id": 0,
        **changes,
    }
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    if kind == "mt5":
        config = transformers.MT5Config(**sizes, **gated)
        model = transformers.MT5ForConditionalGeneration(config)
    else:
        config = transformers.T5Config(**sizes, **(gated if kind == "v1.1" else {}))
        model = transformers.T5ForConditionalGeneration(config)
    if kind != "v1.0":  # transformers 5 ties the head of every new model
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, D))
    return model.eval().requires_grad_(False)


def ffn(block):
    return block.layer[-1].DenseReluDense


def random_scores():
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(2, LAYERS, D_FF, generator=generator)
    return {"encoder": list(scores[0]), "decoder": list(scores[1])}


def inputs():
    """A padded batch: 3 sources of 7, 5 and 2 positions, 3 targets of 4, 2 and 3."""
    generator = torch.Generator().manual_seed(2)
    return {
        "inputs_embeds": torch.randn(3, 7, D, generator=generator),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5]),
        "labels": torch.tensor([[9, 4, 30, 1], [7, 1, -100, -100], [50, 8, 1, -100]]),
    }


def new_tokenizer():
    """A word is a token; <extra_id_0> is special, as in T5's own tokenizer."""
    ids = {word: i for i, word in enumerate(WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"],
    )


TOKENIZER = new_tokenizer()


def examples(count, seed=0):
    """Sources of 1 to 9 words; the answer says whether the first word's number is even."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        numbers = [draw.randrange(50) for _ in range(draw.randint(1, 9))]
        source = " ".join(f"w{i:02}" for i in numbers)
        rows.append(fpt.Example(source, ["no" if numbers[0] % 2 else "yes"]))
    return rows


def some_task(labels=("yes", "no"), train=None, max_source=99, **more):
    task = fpt.Task(labels=labels, train=train or examples(20), **more)
    fpt.encode(task, TOKENIZER, max_source)
    return task


def example(source_ids, target_ids=(1,)):
    return fpt.Example("", [""], torch.tensor(source_ids), torch.tensor(target_ids))


def write_task(folder, labels=("yes", "no"), validation=12):
    folder.mkdir()
    spec = {"labels": labels, "prefix": "<extra_id_0>"}
    (folder / "task.json").write_text(json.dumps(spec))
    write_rows(folder / "train.jsonl", examples(40, seed=1))
    write_rows(folder / "validation.jsonl", examples(validation, seed=2))
    return folder


def write_rows(path, rows):
    lines = []
    for row in rows:
        lines.append(json.dumps({"source": row.source, "target": row.answers[0]}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def here(tmp_path_factory):
    """A folder with a tiny v1.1 model and a task, on which `main` runs."""
    folder = tmp_path_factory.mktemp("here")
    tiny("v1.1").save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    write_task(folder / "task")
    return folder


def flags(here, out, *more):
    """The flags of a small run; of two that are alike the later one counts."""
    settings = "--steps 10 --batch 4 --eval-every 4 --prompt-length 3 --device cpu"
    folders = ["--model", here / "model", "--task", here / "task", "--out", out]
    return [str(flag) for flag in [*settings.split(), *folders, *more]]


def contents(out):
    """The files of a command, less what two commands of the same settings differ in."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.name in ("settings.json", "results.json"):
            value = {**json.loads(path.read_text()), "out": "", "seconds": 0}
        elif path.is_file():
            value = path.read_bytes()
        else:
            continue
        found[path.relative_to(out).as_posix()] = value
    return found


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def python(*arguments, cwd, **environment):
    """A fresh interpreter, which does not stand in the repository."""
    command = [sys.executable, *[str(argument) for argument in arguments]]
    environment = {**os.environ, **environment}
    how = {"text": True, "capture_output": True, "timeout": 150}
    return subprocess.run(command, cwd=cwd, env=environment, **how)


def script(path):
    """A script of the repository, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ====== 1 Partial models ==============================================================


@pytest.mark.parametrize(
    ("total", "keep", "layers"),
    [  # what the official rule gives
        (24, 6, [0, 4, 8, 13, 18, 23]),
        (24, 18, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 21, 23]),
        (12, 3, [0, 5, 11]),
        (12, 6, [0, 2, 4, 6, 8, 11]),
        (12, 9, [0, 1, 2, 3, 4, 5, 7, 9, 11]),
        (8, 2, [0, 7]),
        (8, 4, [0, 2, 4, 7]),
        (8, 6, [0, 1, 2, 3, 5, 7]),
        (5, 1, [0]),
        (4, 4, [0, 1, 2, 3]),
        (1, 1, [0]),
    ],
)
def test_layers_are_kept_by_the_official_table(total, keep, layers):
    assert fpt.kept_layers(total, keep) == layers


@pytest.mark.parametrize(("total", "keep"), [(6, 0), (6, 7), (6, -1), (0, 0), (0, 1)])
def test_it_cannot_keep_no_layers_or_more_than_there_are(total, keep):
    with pytest.raises(ValueError, match=f"keep {keep} of {total}"):
        fpt.kept_layers(total, keep)


@pytest.mark.parametrize(
    ("depth", "width", "layers", "neurons"),
    [
        (0.25, 1, 2, 32),  # 1.5 rounds half up
        (0.24, 1, 1, 32),
        (0.01, 0.01, 1, 1),  # at least one
        (1, 0.29, 6, 9),  # 9.28
        (1, 0.328125, 6, 11),  # 10.5
    ],
)
def test_shares_round_half_up_to_at_least_one(depth, width, layers, neurons):
    partial = fpt.partial_t5(tiny(), depth, width, random_scores())

    assert sizes(partial) == [(layers, neurons), (layers, neurons)]


def sizes(model):
    """Layers and neurons of the encoder, and those of the decoder."""
    found = []
    for stack in [model.encoder, model.decoder]:
        found.append((len(stack.block), ffn(stack.block[0]).wo.in_features))
    return found


EVERY = [0, 1, 2, 3, 4, 5]


def stock(kind, encoder=EVERY, decoder=EVERY):
    """A model built small from a config, with copies of these blocks of tiny(kind)."""
    model = tiny(kind)
    depths = {"num_layers": len(encoder), "num_decoder_layers": len(decoder)}
    small = tiny(kind, seed=1, **depths)
    small.shared.load_state_dict(model.shared.state_dict())
    small.lm_head.load_state_dict(model.lm_head.state_dict())
    for name, kept in [("encoder", encoder), ("decoder", decoder)]:
        ours = getattr(small, name)
        theirs = getattr(model, name)
        ours.final_layer_norm.load_state_dict(theirs.final_layer_norm.state_dict())
        for block, index in zip(ours.block, kept, strict=True):
            block.load_state_dict(theirs.block[index].state_dict())
    small.config.num_layers = LAYERS  # transformers sizes the decoder's cache by it
    return small


def logits_loss_and_gradient(model):
    batch = inputs()
    embeds = batch["inputs_embeds"].requires_grad_()
    output = model(**batch)
    (gradient,) = torch.autograd.grad(output.loss, [embeds])
    return output.logits.detach(), output.loss.detach(), gradient


def generate(model, **how):
    """Eight tokens, forced: an early end would hide a broken cache."""
    batch = inputs()
    del batch["labels"]
    lengths = {"min_new_tokens": 8, "max_new_tokens": 8}
    return model.generate(**batch, **lengths, do_sample=False, **how)


dropped = pytest.mark.parametrize(
    ("depth", "decoder", "kept"),
    [
        (1, True, (EVERY, EVERY)),
        (0.25, True, ([0, 5], [0, 5])),
        (0.5, False, ([0, 2, 5], EVERY)),
    ],
)


@dropped
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_layers_compute_what_a_stock_model_does(kind, depth, decoder, kept):
    partial = fpt.partial_t5(tiny(kind), depth, 1, decoder=decoder)

    found = logits_loss_and_gradient(partial)

    expected = logits_loss_and_gradient(stock(kind, *kept))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert type(partial) is type(tiny(kind))


@dropped
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_layers_generate_what_a_stock_model_does(kind, depth, decoder, kept):
    partial = fpt.partial_t5(tiny(kind), depth, 1, decoder=decoder)
    small = stock(kind, *kept)

    for how in [{}, {"num_beams": 3}, {"use_cache": False}]:
        assert generate(partial, **how).equal(generate(small, **how))


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_neurons_are_a_stock_model_with_the_others_silenced(kind):
    scores = random_scores()
    silenced = stock(kind, [0, 2, 5], [0, 2, 5])
    for side in scores:
        for i, block in zip([0, 2, 5], getattr(silenced, side).block, strict=True):
            loud = scores[side][i].sort().values[-10:]  # 0.3 of 32 are 9.6
            ffn(block).wo.weight[:, scores[side][i] < loud[0]] = 0

    partial = fpt.partial_t5(tiny(kind), 0.5, 0.3, scores)

    found = logits_loss_and_gradient(partial)
    expected = logits_loss_and_gradient(silenced)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert generate(partial).equal(generate(silenced))


def test_kept_neurons_stay_in_order_and_the_first_of_equals_stay():
    model = tiny("v1.0")
    ties = {side: [torch.arange(D_FF) % 4] * LAYERS for side in ("encoder", "decoder")}

    partial = fpt.partial_t5(model, 1, 0.375, ties)  # 12: all eight 3s, and four 2s

    whole = ffn(model.decoder.block[4])
    kept = ffn(partial.decoder.block[4])
    rows = [2, 3, 6, 7, 10, 11, 14, 15, 19, 23, 27, 31]
    assert kept.wi.weight.equal(whole.wi.weight[rows])
    assert kept.wo.weight.equal(whole.wo.weight[:, rows])


@pytest.mark.parametrize("kind", KINDS)
def test_all_tensors_are_shared_but_those_of_narrowed_ffns(kind):
    model = tiny(kind)
    whole = {id(tensor) for tensor in model.parameters()}

    partial = fpt.partial_t5(model, 0.5, 0.25, random_scores(), decoder=False)

    new = []
    for name, tensor in partial.named_parameters():
        assert not tensor.requires_grad
        if id(tensor) not in whole:
            new.append(name)
    matrices = ["wi", "wo"] if kind == "v1.0" else ["wi_0", "wi_1", "wo"]
    place = "encoder.block.{}.layer.1.DenseReluDense.{}.weight"
    assert new == [place.format(i, name) for i in range(3) for name in matrices]
    assert partial.lm_head.weight is model.lm_head.weight


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind):
    model = tiny(kind)
    modules = list(model.named_modules())
    config = model.config.to_dict()

    partial = fpt.partial_t5(model, 0.5, 0.25, random_scores())
    logits_loss_and_gradient(partial)
    generate(partial)

    assert list(model.named_modules()) == modules
    assert model.config.to_dict() == config
    for name, tensor in tiny(kind).state_dict().items():
        assert model.state_dict()[name].equal(tensor)
    found = logits_loss_and_gradient(model)
    torch.testing.assert_close(found, logits_loss_and_gradient(tiny(kind)))


@pytest.mark.parametrize("config", [transformers.UMT5Config, transformers.BartConfig])
def test_a_model_of_another_kind_is_refused(config):
    model = types.SimpleNamespace(config=config())

    with pytest.raises(ValueError, match=f"{config.model_type}.*T5"):
        fpt.partial_t5(model, 0.5, 1)


@pytest.mark.parametrize(
    ("depth", "width"),
    [(0, 1), (1, 0), (1.01, 1), (1, 1.5), (1, -0.5), (math.nan, 1)],
)
def test_a_share_outside_0_and_1_is_refused(depth, width):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        fpt.partial_t5(tiny(), depth, width, random_scores())


def test_neurons_are_not_dropped_without_scores_or_by_those_of_another_model():
    model = tiny()
    scores = fpt.neuron_scores(tiny(d_ff=8), torch.zeros(P, D), [fpt.collate(FIVE, "cpu")])

    with pytest.raises(ValueError, match="needs scores"):
        fpt.partial_t5(model, 1, 0.5)
    with pytest.raises(ValueError, match="scores belong to"):
        fpt.partial_t5(model, 1, 0.5, scores)


FIVE = [
    example([6, 7, 8, 9, 10, 11], [20, 21, 22]),
    example([12, 13, 14, 15], [23]),
    example([16, 17, 18, 19, 20, 21, 22, 23, 24], [24, 25]),
    example([25, 26, 27], [26, 27, 28, 29]),
    example([28, 29, 30, 31, 32], [30, 31]),
]


def activations(model, prompt, row):
    """Mean absolute activation of each FFN for one example, alone and unpadded."""
    found = []

    def watch(net, args):
        x = args[0][0]  # [positions, d]
        if hasattr(net, "wi"):
            activation = torch.relu(net.wi(x))
        else:
            gate = torch.nn.functional.gelu(net.wi_0(x), approximate="tanh")
            activation = gate * net.wi_1(x)
        found.append(activation.abs().mean(0))

    model = copy.deepcopy(model)
    for block in [*model.encoder.block, *model.decoder.block]:
        ffn(block).register_forward_pre_hook(watch)
    embeds = torch.cat([prompt, model.shared(row.source_ids)])
    model(inputs_embeds=embeds[None], labels=row.target_ids[None])
    return torch.stack(found)  # [encoder and decoder layers, d_ff]


@pytest.mark.parametrize("kind", KINDS)
def test_neuron_scores_are_means_over_examples_each_taken_alone(kind):
    model = tiny(kind)
    prompt = torch.randn(P, D)
    batches = [fpt.collate(FIVE[:3], "cpu"), fpt.collate(FIVE[3:], "cpu")]

    scores = fpt.neuron_scores(model, prompt, batches)

    found = torch.stack(scores["encoder"] + scores["decoder"])
    expected = torch.stack([activations(model, prompt, row) for row in FIVE]).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_neuron_scores_leave_no_hooks_behind():
    model = tiny()

    fpt.neuron_scores(model, torch.zeros(P, D), [fpt.collate(FIVE, "cpu")])

    for module in model.modules():
        assert not module._forward_pre_hooks


# ====== 2 Schedule ====================================================================


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("pt", [(1, 1, 1)]),
        ("ld", [(0.25, 1, 0.2), (0.5, 1, 0.2), (0.75, 1, 0.2), (1, 1, 0.4)]),
        ("fr", [(1, 0.25, 0.2), (1, 0.5, 0.2), (1, 0.75, 0.2), (1, 1, 0.4)]),
        ("cr", [(0.25, 0.25, 0.2), (0.5, 0.5, 0.2), (0.75, 0.75, 0.2), (1, 1, 0.4)]),
        (" 0.5x.25:.3 , 1x1.0:0.7", [(0.5, 0.25, 0.3), (1, 1, 0.7)]),
        ("0.25x1:1", [(0.25, 1, 1)]),
        ("1x1:.1,1x1:.2,1x1:.7", [(1, 1, 0.1), (1, 1, 0.2), (1, 1, 0.7)]),  # 0.9999...
    ],
)
def test_a_schedule_is_a_preset_or_a_text(text, stages):
    assert fpt.parse_schedule(text) == [fpt.Stage(*stage) for stage in stages]
    assert fpt.SCHEDULES.get(text, fpt.parse_schedule(text)) == fpt.parse_schedule(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "CR",
        "0.5x0.5",
        "0.5:1",
        "1x1:1,",
        "axb:c",
        "1x1:1.2.3",
        "1x1x1",
        "1x1x1:1",
        "0.5:0.5x0.4",
        "-1x1:1",
        "0x1:1",
        "1x1.5:1",
        "nanx1:1",
        "1x1:0,1x1:1",
        "1x1:0.3,1x1:0.6",
        "1x1:1,1x1:0.6",
    ],
)
def test_what_is_no_schedule_is_refused_with_the_notation(text):
    says = f"schedule {text!r} is none of pt, ld, fr, cr"

    with pytest.raises(ValueError, match=f"{re.escape(says)}.*adding up to 1"):
        fpt.parse_schedule(text)


@pytest.mark.parametrize(
    ("step", "stage"), [(1, 0), (6000, 0), (6001, 1), (18000, 2), (18001, 3), (30000, 3)]
)
def test_a_model_grows_behind_the_last_update_of_a_stage(step, stage):
    assert fpt.stage_at(fpt.SCHEDULES["cr"], step, 30_000) == stage


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("cr", [0, 1, 2, 3, 3]),
        ("1x1:.15,1x1:.35,1x1:.5", [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]),  # 1.5 is 2
        ("cr", [2]),  # 0.2 and 0.4 of an update are none, 0.6 is one
    ],
)
def test_boundaries_round_half_up(text, stages):
    schedule = fpt.parse_schedule(text)
    steps = len(stages)

    found = [fpt.stage_at(schedule, step, steps) for step in range(1, steps + 1)]

    assert found == stages


# ====== 3 Cost ========================================================================


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("depth", "width", "decoder"), [(1, 1, True), (0.5, 0.25, True), (0.5, 0.5, False)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_step_flops_equal_pytorchs_counter(kind, depth, width, decoder, backward):
    model = tiny(kind, num_layers=2, num_decoder_layers=2)
    model.set_attn_implementation("eager")  # of others it misses attention products
    partial = fpt.partial_t5(model, depth, width, random_scores(), decoder)
    embeds = torch.zeros(2, 11, D, requires_grad=backward)
    labels = torch.ones(2, 6, dtype=torch.long)

    with FlopCounterMode(display=False) as counter:
        losses = fpt.token_losses(partial, None, labels, inputs_embeds=embeds)
        if backward:
            losses.sum().backward()

    counted = fpt.step_flops(partial, 2, 11, 6, backward)
    assert counted == counter.get_total_flops()


@pytest.fixture(scope="module")
def t5_large():
    with torch.device("meta"):  # shapes alone: 0.8 billion numbers would not fit a test
        config = transformers.T5Config(
            d_model=1024,
            d_ff=2816,
            num_layers=24,
            num_heads=16,
            feed_forward_proj="gated-gelu",
        )
        return transformers.T5ForConditionalGeneration(config)


def linear_flops(model, stage, target):
    """What the paper counts: linear layers, forward, at 512 source positions."""
    scores = [torch.arange(2816)] * 24
    scores = {"encoder": scores, "decoder": scores}
    decoder = target > 5  # it stays whole where targets are labels
    partial = fpt.partial_t5(model, stage.depth, stage.width, scores, decoder)
    flops = fpt.step_flops(partial, 1, 512, target, backward=False)
    flops -= 4 * 1024 * len(partial.encoder.block) * 512 * 512
    return flops - 4 * 1024 * len(partial.decoder.block) * target * (target + 512)


def test_t5_large_has_the_papers_187_billion_multiplications(t5_large):
    flops = linear_flops(t5_large, fpt.Stage(1, 1, 1), 10)

    assert round(flops / 2e9, 1) == 187.5


@pytest.mark.parametrize(
    ("name", "printed", "total"),
    [
        ("ld", [30, 54, 77, 100], 72),
        ("fr", [58, 72, 86, 100], 83),
        ("cr", [20, 40, 66, 100], 65),
    ],
)
def test_stages_cost_what_the_paper_prints(t5_large, name, printed, total):
    targets = [5, 5, 200, 200, 512]  # five tasks; the paper does not print their lengths
    costs = []
    for stage in fpt.SCHEDULES[name]:
        cost = 0
        for target in targets:
            whole = linear_flops(t5_large, fpt.Stage(1, 1, 1), target)
            cost += 20 * linear_flops(t5_large, stage, target) / whole
        costs.append(cost)

    assert costs == pytest.approx(printed, abs=1)
    assert round(0.2 * sum(costs[:3]) + 0.4 * costs[3]) == total


# ====== 4 Soft prompt =================================================================


def test_a_prompt_stands_before_the_source_and_is_attended_to():
    model = tiny()
    prompt = fpt.SoftPrompt(torch.ones(P, D))
    batch = fpt.collate([example([7, 8]), example([9])], "cpu")

    embeds, mask = prompt(model, batch)

    assert embeds.shape == (2, P + 2, D)
    assert embeds[:, :P].equal(torch.ones(2, P, D))
    assert embeds[:, P:].equal(model.shared(batch["input_ids"]))
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_a_prompt_is_fp32_and_gives_a_bf16_model_bf16():
    prompt = fpt.SoftPrompt(torch.ones(P, D, dtype=torch.bfloat16))

    embeds, _ = prompt(tiny().bfloat16(), fpt.collate([example([7])] * 2, "cpu"))
    embeds.float().sum().backward()

    assert embeds.dtype == torch.bfloat16
    assert prompt.weight.grad.equal(torch.full((P, D), 2.0))


def draw(how, length, seed=0, embeddings=None):
    if embeddings is None:
        embeddings = tiny().shared.weight
    return fpt.init_prompt(how, length, embeddings, torch.Generator().manual_seed(seed))


def test_a_uniform_prompt_fills_the_papers_bounds():
    prompt = draw("uniform", 500)

    assert prompt.shape == (500, D)
    assert -0.25 <= prompt.min() < -0.24  # 1 / sqrt(16)
    assert 0.24 < prompt.max() <= 0.25
    assert abs(prompt.mean()) < 0.01


def test_a_vocab_prompt_takes_each_token_once_and_no_special_one():
    embeddings = torch.arange(20.0)[:, None].expand(20, D)

    prompt = draw("vocab", 17, embeddings=embeddings)

    assert sorted(prompt[:, 0].tolist()) == list(range(3, 20))


def test_a_vocab_prompt_is_of_the_5000_first_tokens():
    embeddings = torch.arange(9000.0)[:, None]

    prompt = draw("vocab", 4997, embeddings=embeddings)

    assert prompt.max() == 4999


def test_more_vocab_vectors_than_tokens_are_refused():
    with pytest.raises(ValueError, match="62 vectors, but only 61"):
        draw("vocab", VOCAB - 2)


@pytest.mark.parametrize("how", ["uniform", "vocab"])
def test_a_start_depends_on_its_generator_alone(how):
    assert draw(how, 5).equal(draw(how, 5))
    assert not draw(how, 5).equal(draw(how, 5, seed=1))


def test_a_saved_prompt_starts_another_run_if_it_has_the_shape(tmp_path):
    prompt = torch.randn(P, D)
    fpt.save_prompt(tmp_path, prompt, "any")

    assert draw(str(tmp_path), P).equal(prompt)
    with pytest.raises(ValueError, match=f"{tmp_path} is not 4 vectors"):
        draw(str(tmp_path), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_a_saved_prompt_and_computes_the_same(kind, tmp_path):
    model = tiny(kind)
    prompt = torch.randn(P, D) * 3
    fpt.save_prompt(tmp_path, prompt, "any")
    batch = fpt.collate(FIVE, "cpu")
    embeds, mask = fpt.SoftPrompt(prompt)(model, batch)
    ours = {"inputs_embeds": embeds, "attention_mask": mask}

    theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path).eval()

    logits = theirs(**batch).logits
    assert logits.equal(model(**ours, labels=batch["labels"]).logits)
    assert not torch.allclose(logits, model(**batch).logits, atol=0.01)  # not ignored
    how = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    del batch["labels"]
    assert theirs.generate(**batch, **how).equal(model.generate(**ours, **how))


def test_pefts_own_prompt_loads_without_its_rows_for_the_decoder(tmp_path):
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(tiny(), config)
    theirs.save_pretrained(tmp_path)

    prompt = fpt.load_prompt(tmp_path)

    rows = theirs.prompt_encoder["default"].embedding.weight
    assert len(rows) == 8
    assert prompt.equal(rows[:4])


def test_what_is_no_prompt_does_not_load(tmp_path):
    lora = peft.get_peft_model(tiny(), peft.LoraConfig())
    lora.save_pretrained(tmp_path / "lora")
    fpt.save_prompt(tmp_path / "nan", torch.full((P, D), math.nan), "any")

    for name in ["lora", "nan"]:
        with pytest.raises(ValueError, match=f"{name} holds no soft prompt"):
            fpt.load_prompt(tmp_path / name)
    with pytest.raises(OSError, match="absent"):
        fpt.load_prompt(tmp_path / "absent")


# ====== 5 Train =======================================================================


def stock_loss(model, prompt, batch):
    embeds, mask = prompt(model, batch)
    return model(inputs_embeds=embeds, attention_mask=mask, labels=batch["labels"])


def test_token_losses_are_negative_log_likelihoods_and_0_where_padded():
    model = tiny()
    prompt = fpt.SoftPrompt(torch.randn(P, D))
    batch = fpt.collate(FIVE, "cpu")
    labels = batch["labels"]
    embeds, mask = prompt(model, batch)

    losses = fpt.token_losses(model, mask, labels, inputs_embeds=embeds)

    likelihoods = stock_loss(model, prompt, batch).logits.log_softmax(2)
    for row, targets in enumerate(labels.tolist()):
        for place, target in enumerate(targets):
            expected = 0 if target == -100 else -likelihoods[row, place, target].item()
            assert losses[row, place].item() == pytest.approx(expected, rel=1e-4)


def assert_stock_gradient(computed, model, prompt, batch):
    stock = stock_loss(model, prompt, batch).loss
    expected = torch.autograd.grad(stock, [prompt.weight])
    loss, grad = computed
    torch.testing.assert_close(loss, stock.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected[0], rtol=1e-4, atol=1e-6)


def test_gradient_is_that_of_the_stock_loss():
    model = tiny()
    prompt = fpt.SoftPrompt(torch.randn(P, D))
    batch = fpt.collate(FIVE, "cpu")

    computed = fpt.gradient(model, prompt, batch)

    assert_stock_gradient(computed, model, prompt, batch)
    assert prompt.weight.grad is None


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_add_up_to_the_whole_whatever_the_lengths_of_targets(parts):
    model = tiny()
    prompt = fpt.SoftPrompt(torch.randn(P, D))
    batch = fpt.collate(FIVE, "cpu")

    computed = fpt.gradient_in_parts(model, prompt, batch, parts)

    assert_stock_gradient(computed, model, prompt, batch)


START = torch.randn(P, D, generator=torch.Generator().manual_seed(4))


def train(model, schedule="cr", saved=None, lr=0.3, seed=0, evaluate=None, **changes):
    """`fpt.train` on a tiny task, and what it did."""
    seen = types.SimpleNamespace(trained=[], judged=[], states=[])
    rows = some_task().train
    run, weight, moments = saved or (fpt.Run(), START, None)
    seen.prompt = fpt.SoftPrompt(weight)
    seen.optimizer = fpt.adafactor(seen.prompt, lr)
    if moments:
        seen.optimizer.load_state_dict(moments)

    def gradient(partial, prompt, batch):
        seen.trained.append(sizes(partial))
        return fpt.gradient(partial, prompt, batch)

    def judge(final, prompt):
        seen.judged.append(sizes(final))
        return -stock_loss(final, prompt, fpt.collate(rows, "cpu")).loss.item()

    how = {"steps": 20, "eval_every": 5, "run": copy.deepcopy(run)}
    how |= {"scores": random_scores(), "decoder": False, "gradient": gradient}
    for seen.run in fpt.train(
        model,
        seen.prompt,
        seen.optimizer,
        fpt.parse_schedule(schedule),
        fpt.batches(rows, 4, "cpu", seed, first=run.step + 1),
        evaluate or judge,
        **{**how, **changes},
    ):
        state = seen.run, seen.prompt.weight.detach(), seen.optimizer.state_dict()
        seen.states.append(copy.deepcopy(state))
    return seen


@pytest.mark.parametrize(
    ("kind", "schedule", "encoders"),
    [
        ("v1.0", "cr", [(2, 8), (3, 16), (5, 24), (6, 32)]),
        ("v1.1", "0.5x0.25:1", [(3, 8), (3, 8), (3, 8), (3, 8)]),
        ("mt5", "ld", [(2, 32), (3, 32), (5, 32), (6, 32)]),
    ],
)
def test_updates_run_on_the_stages_model_and_evaluations_on_the_last(
    kind, schedule, encoders
):
    seen = train(tiny(kind), schedule)

    updates = [4, 4, 4, 8]
    expected = []
    for encoder, count in zip(encoders, updates, strict=True):
        expected += [[encoder, (6, 32)]] * count  # the decoder stays whole, as asked
    assert seen.trained == expected
    assert seen.judged == [expected[-1]] * 4


def test_the_ledger_adds_up_every_batch_as_it_was_padded():
    model = tiny()
    schedule = fpt.SCHEDULES["cr"]

    seen = train(model, "cr")

    batches = fpt.batches(some_task().train, 4, "cpu", seed=0)
    flops = pt_flops = 0
    ledger = []
    for step, batch in zip(range(1, 21), batches, strict=False):
        stage = schedule[(step - 1) // 4] if step <= 12 else schedule[3]
        size = stage.depth, stage.width
        partial = fpt.partial_t5(model, *size, random_scores(), decoder=False)
        shape = 4, P + batch["input_ids"].shape[1], batch["labels"].shape[1]
        flops += fpt.step_flops(partial, *shape)
        pt_flops += fpt.step_flops(model, *shape)
        if step % 5 == 0:
            ledger.append((step, flops, pt_flops))
    log = seen.run.log
    assert [(row["step"], row["flops"], row["pt_flops"]) for row in log] == ledger
    assert [row["stage"] for row in log] == [2, 3, 4, 4]


def test_the_weights_of_the_model_stay_as_they_are():
    model = tiny()

    train(model, "cr")

    for name, tensor in tiny().state_dict().items():
        assert model.state_dict()[name].equal(tensor)
    for tensor in model.parameters():
        assert tensor.grad is None


def test_the_first_step_is_as_long_as_the_rate_says():
    seen = train(tiny(), "pt", steps=1)

    moved = seen.prompt.weight - START
    assert moved.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.02)


def test_pt_is_prompt_tuning_as_peft_does_it():
    seen = train(tiny(), "pt", steps=6)

    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1
    )
    theirs = peft.get_peft_model(tiny(), config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data.copy_(START)
    how = {"scale_parameter": False, "relative_step": False, "weight_decay": 1e-5}
    optimizer = transformers.optimization.Adafactor([weight], lr=0.3, **how)
    batches = fpt.batches(some_task().train, 4, "cpu", seed=0)
    for batch in itertools.islice(batches, 6):
        optimizer.zero_grad()
        theirs(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    torch.testing.assert_close(weight, seen.prompt.weight, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def whole():
    return train(tiny(), "cr")


def values(run):
    return {**vars(run), "seconds": 0, "best_prompt": run.best_prompt.tolist()}


@pytest.mark.parametrize("step", [1, 4, 5, 7, 13, 20])
def test_a_run_resumed_after_any_update_ends_in_the_same_bytes(whole, step):
    again = train(tiny(), "cr", saved=whole.states[step - 1])

    assert again.prompt.weight.equal(whole.prompt.weight)
    assert again.trained == whole.trained[step:]
    if step < 20:
        assert values(again.run) == values(whole.run)


def test_another_seed_is_another_run(whole):
    other = train(tiny(), "cr", seed=1)

    assert not other.prompt.weight.equal(whole.prompt.weight)


def test_the_best_prompt_is_the_later_of_equals():
    scores = iter([10.0, 30.0, 30.0, 20.0])

    seen = train(tiny(), "pt", evaluate=lambda *_: next(scores), steps=7, eval_every=2)

    assert [row["step"] for row in seen.run.log] == [2, 4, 6, 7]  # the last one, too
    assert [row["best"] for row in seen.run.log] == [10, 30, 30, 30]
    assert (seen.run.best_dev, seen.run.best_step) == (30, 6)
    _, prompt, _ = seen.states[5]
    assert seen.run.best_prompt.equal(prompt)


def test_a_logged_loss_is_the_mean_since_the_last_evaluation():
    single = train(tiny(), "pt", steps=5, eval_every=1)

    seen = train(tiny(), "pt", steps=5, eval_every=2)

    losses = [row["loss"] for row in single.run.log]
    first, second, last = [row["loss"] for row in seen.run.log]
    assert first == pytest.approx((losses[0] + losses[1]) / 2)
    assert second == pytest.approx((losses[2] + losses[3]) / 2)
    assert last == pytest.approx(losses[4])


@pytest.mark.parametrize(("bad_loss", "bad_grad"), [(math.nan, 1), (1, math.inf)])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(bad_loss, bad_grad):
    def gradient(model, prompt, batch):
        loss, grad = fpt.gradient(model, prompt, batch)
        return loss * bad_loss, grad * bad_grad

    with pytest.raises(FloatingPointError, match=r"update 5\b"):
        train(tiny(), "pt", gradient=gradient)


def test_a_rate_that_is_much_too_high_stops_the_run():
    with pytest.raises(FloatingPointError, match=r"update 5\b.*lower --lr"):
        train(tiny(), "pt", lr=1e39)


# ====== Answers to the exercises of tutorial.md =======================================


@pytest.mark.parametrize("headless", [True, False])
def test_exercise_1_without_layer_0_a_t5_reads_a_bag_of_words(headless):
    """The order of the source changes nothing but the order of what comes out."""
    encoder = copy.deepcopy(tiny().encoder)
    if headless:
        encoder.block = torch.nn.ModuleList(encoder.block[1:])
    order = [3, 0, 5, 1, 4, 2]
    source = torch.randn(1, 6, D)

    straight = encoder(inputs_embeds=source).last_hidden_state
    mixed = encoder(inputs_embeds=source[:, order]).last_hidden_state

    assert torch.allclose(straight[:, order], mixed, atol=1e-4) is headless


@pytest.mark.parametrize(
    ("total", "gone"),
    [(12, [[5], [6, 8], []]), (24, [[13], [12, 14, 16, 18, 20], []])],
)
def test_exercise_2_layers_that_a_growth_takes_away(total, gone):
    kept = [set(fpt.kept_layers(total, total * i // 4)) for i in range(1, 5)]

    found = [sorted(kept[i] - kept[i + 1]) for i in range(3)]

    assert found == gone


def test_exercise_3_shares_of_equal_cost():
    """One over the cost of an update: then every stage of `cr` spends the same."""
    with torch.device("meta"):
        config = transformers.T5Config(
            d_model=768, d_ff=3072, num_layers=12, num_heads=12
        )
        model = transformers.T5ForConditionalGeneration(config)
    scores = {"encoder": [torch.arange(3072)] * 12}

    costs = []
    for size in [0.25, 0.5, 0.75, 1]:
        partial = fpt.partial_t5(model, size, size, scores, decoder=False)
        costs.append(fpt.step_flops(partial, 32, 102, 6))

    total = sum(1 / cost for cost in costs)
    assert [round(1 / cost / total, 2) for cost in costs] == [0.4, 0.28, 0.19, 0.14]
    assert round(4 / total / costs[3], 2) == 0.56  # FLOPs over pt's


# ====== 6 Tasks and data ==============================================================

GLUE, SUPER = "nyu-mll/glue", "aps/super_glue"


def load_from_hub(monkeypatch, name, hub, rows):
    """The task `name`, of which the hub has these train rows, and the last one twice."""

    def load_dataset(*which, revision):
        assert which == (hub, name if hub in (GLUE, SUPER) else None)
        splits = ["validation", "validation_matched", "validation_mismatched"]
        wanted = splits[name == "mnli"]
        return {**dict.fromkeys(splits, []), "train": rows, wanted: rows[-1:]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return fpt.load_task(name, dev=1)


@pytest.mark.parametrize(
    ("name", "hub", "columns", "labels"),
    [
        ("mnli", GLUE, "hypothesis premise", "entailment neutral contradiction"),
        ("qqp", GLUE, "question1 question2", "not_duplicate is_duplicate"),
        ("rte", GLUE, "sentence1 sentence2", "entailment not_entailment"),
        ("sst2", GLUE, "sentence", "negative positive"),
        ("mrpc", GLUE, "sentence1 sentence2", "not_equivalent equivalent"),
        ("boolq", SUPER, "question passage", "False True"),
        ("cb", SUPER, "hypothesis premise", "entailment contradiction neutral"),
        ("copa", SUPER, "choice1 choice2 premise question", "choice1 choice2"),
        ("wic", SUPER, "word sentence1 sentence2", "False True"),
    ],
)
def test_rows_of_labelled_tasks(name, hub, columns, labels, monkeypatch):
    columns = columns.split()
    rows, expected = [], []
    for i, label in enumerate(labels.split()):
        rows.append({column: f"{column} {i}" for column in columns} | {"label": i})
        source = " ".join([f"{column}: {column} {i}" for column in columns])
        expected.append((source, label))

    task = load_from_hub(monkeypatch, name, hub, rows)

    found = [(row.source, row.answers[0]) for row in [*task.train, *task.dev]]
    assert sorted(found) == expected
    [last] = task.validation
    assert (last.source, last.answers[0]) == expected[-1]


def test_a_row_without_a_label_is_refused(monkeypatch):
    with pytest.raises(KeyError):
        load_from_hub(monkeypatch, "sst2", GLUE, [{"sentence": "s", "label": -1}])


ENTITIES = {
    "passage": "A\n@highlight\nB!\n@highlight\n'C'\n@highlight\n\"D\"\n@highlight\nE",
    "query": "Q",
    "entities": ["E", "F G"],
    "answers": ["F G", "F G", "E"],
}
QUESTION = {"context": "C", "question": "Q"}


@pytest.mark.parametrize(
    ("name", "hub", "row", "source", "learned", "right"),
    [
        (
            "record",
            SUPER,
            ENTITIES,
            "query: Q entities: E, F G passage: A. B! 'C' \"D\" E.",
            ["F G", "E"],
            {"F G", "E"},
        ),
        (
            "squad2",
            "rajpurkar/squad_v2",
            {**QUESTION, "answers": {"text": ["a b", "a", "a b"]}},
            "question: Q context: C",
            ["a b"],
            {"a b", "a"},
        ),
        (
            "squad2",
            "rajpurkar/squad_v2",
            {**QUESTION, "answers": {"text": []}},
            "question: Q context: C",
            ["no answer"],
            {"no answer"},
        ),
        (
            "xsum",
            "EdinburghNLP/xsum",
            {"document": "D\nE", "summary": "S"},
            "D\nE",
            ["S"],
            {"S"},
        ),
    ],
)
def test_rows_of_text_tasks(name, hub, row, source, learned, right, monkeypatch):
    other = {**row, "query": "P", "question": "P", "document": "P"}

    task = load_from_hub(monkeypatch, name, hub, [row, other])

    rows = [x for x in [*task.train, *task.dev] if x.source == source]
    assert [x.answers[0] for x in rows][: len(learned)] == learned
    assert set(rows[0].answers) == right


def test_dev_is_a_part_of_train_that_shares_no_source_with_it(tmp_path):
    folder = write_task(tmp_path / "task")
    rows = examples(40, seed=1)
    write_rows(folder / "train.jsonl", rows + rows)  # each source twice

    task = fpt.load_task(str(folder), dev=6)

    held = {row.source for row in task.dev}
    assert len(task.dev) == len(held) == 6
    assert task.train == [row for row in rows + rows if row.source not in held]


def test_dev_is_a_fifth_of_train_at_most(here):
    assert len(fpt.load_task(str(here / "task"), dev=500).dev) == 8


def test_a_limit_takes_a_sample_of_validation(here):
    whole = fpt.load_task(str(here / "task"), dev=6).validation

    part = fpt.load_task(str(here / "task"), dev=6, limit=5).validation

    sources = [row.source for row in whole]
    assert len({row.source for row in part}) == 5
    assert all(row in whole for row in part)
    assert {row.source for row in part} != set(sources[:5])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("task.json", "[]", ""),
        ("task.json", '{"labls": ["a"]}', ".*labls"),
        ("task.json", '{"metric": "bleu"}', ".*rouge_l"),
        ("train.jsonl", "", ""),
        ("train.jsonl", "\udcff", ""),  # a byte, but not UTF-8
        (
            "train.jsonl",
            '{"source": "s", "target": "yes"}\nrubbish',
            ", line 2.*rubbish",
        ),
        ("train.jsonl", '{"source": "s", "target": ["yes", "no"]}', ", line 1.*not one"),
        ("validation.jsonl", '{"source": " ", "target": "yes"}', ", line 1.*empty"),
        ("validation.jsonl", '{"source": "s", "target": []}', ", line 1.*empty"),
        (
            "validation.jsonl",
            '{"source": "s", "target": "maybe"}',
            ", line 1.*maybe.*yes.*no",
        ),
    ],
)
def test_a_bad_task_folder_names_file_and_line(name, content, says, tmp_path):
    folder = write_task(tmp_path / "task")
    (folder / name).write_text(content, errors="surrogateescape")

    with pytest.raises(ValueError, match=name + says):
        fpt.load_task(str(folder), dev=5)


def test_sources_and_texts_are_cut_and_still_end():
    long, short = fpt.Example("no no no no", ["yes w00 w01"]), fpt.Example("yes", ["no"])

    some_task(labels=(), train=[long, short], max_source=3, max_target=3)

    assert long.source_ids.tolist() == [5, 5, 1]
    assert long.target_ids.tolist() == [3, 4, 1]  # the prefix comes first
    assert short.source_ids.tolist() == [4, 1]
    assert short.target_ids.tolist() == [3, 5, 1]


def test_labels_are_not_cut():
    row = fpt.Example("w00", ["no yes"])

    some_task(labels=("yes", "no yes"), train=[row], prefix="", max_target=2)

    assert row.target_ids.tolist() == [5, 4, 1]


def test_labels_of_the_same_tokens_are_refused():
    with pytest.raises(ValueError, match="hm.*eh.*same tokens"):
        some_task(labels=("hm", "eh"))


def test_a_batch_is_padded_to_its_longest_and_masked():
    batch = fpt.collate([example([7, 8, 1], [4, 1]), example([9, 1], [4, 5, 1])], "cpu")

    assert batch["input_ids"].tolist() == [[7, 8, 1], [9, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[4, 1, -100], [4, 5, 1]]


def drawn(count, updates, seed=0, pool=3, first=1):
    """Batches of 4; an example's tokens are its number, as often as it is long."""
    rows = [example([i] * (i * 7 % 19 + 1)) for i in range(1, count + 1)]
    stream = fpt.batches(rows, 4, "cpu", seed, first, pool)
    return [batch["input_ids"] for batch in itertools.islice(stream, updates)]


def numbers(batches):
    return [batch[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("count", [40, 43, 12, 7])
def test_no_example_comes_twice_in_a_pass(count):
    updates = count // 4

    found = torch.tensor(numbers(drawn(count, 3 * updates)))

    for used in found.view(3, -1):
        assert len(set(used.tolist())) == 4 * updates


def test_another_pass_leaves_out_others():
    passes = numbers(drawn(7, 6))

    assert len({frozenset(used) for used in passes}) > 1


@pytest.mark.parametrize("update", [2, 5, 10, 11, 14, 30])
def test_a_batch_depends_on_seed_and_update_alone(update):
    found = drawn(43, 2, first=update)

    assert numbers(found) == numbers(drawn(43, 40)[update - 1 : update + 1])
    assert numbers(found) != numbers(drawn(43, 2, first=update, seed=1))


def test_batches_of_similar_lengths_are_padded_less():
    padding = []

    for pool in [50, 1]:
        batches = drawn(400, 100, pool=pool)
        padding.append(sum((batch == 0).sum().item() for batch in batches))

    assert padding[0] < 0.2 * padding[1]


@pytest.mark.parametrize(
    ("train", "validation", "labels", "says"),
    [
        ([("w01", "yes"), ("w03", "no")], [("w05", "no")], ("yes", "no"), ""),
        ([("w01 w02", "yes"), ("w03", "no")], [], ("yes", "no"), "1 .*max-source.*cut"),
        ([("w01", "w02 w03 w04")], [], (), "1 .*max_target.*cut"),
        ([("w01", "zebra")], [], (), "1 .*does not know"),
        ([("w01", "w02")], [("w01", "w03")], (), "1 .*in train as well"),
        ([("w01", "yes")], [], ("yes", "no"), "no example of .*'no'"),
    ],
)
def test_what_lowers_the_meaning_of_scores_is_warned_of(
    train, validation, labels, says, capsys
):
    parts = {}
    for name, rows in [("train", train), ("validation", validation)]:
        parts[name] = [fpt.Example(source, [answer]) for source, answer in rows]
    task = some_task(labels, max_source=3, max_target=4, **parts)

    fpt.warn(task, 3)

    printed = capsys.readouterr().out
    assert re.fullmatch(f"warning: {says}.*\n" if says else "", printed)


# ====== 7 Evaluate ====================================================================


def scores_of(predictions, answers, **task):
    rows = [fpt.Example("", right) for right in answers]
    return fpt.score(fpt.Task(**task), predictions, rows)


def test_accuracy_is_the_share_of_texts_equal_to_any_answer():
    found = scores_of(["a", "b", "c", "D"], [["a"], ["a"], ["b", "c"], ["d"]])

    assert found == {"accuracy": 50}


def test_f1_of_two_labels_is_that_of_the_second():
    answers = [["a"], ["a"], ["a"], ["b"]]

    found = scores_of(["a", "b", "a", "b"], answers, labels=("a", "b"))

    # Of "b" the precision is 1/2, the recall 1.
    assert found == {"accuracy": 75, "f1": pytest.approx(100 * 2 / 3)}


def test_f1_of_more_labels_is_the_mean_over_those_that_occur():
    answers = [["a"], ["a"], ["a"], ["b"]]

    found = scores_of(["a", "b", "a", "b"], answers, labels=("a", "b", "c"))

    # Of "a" the precision is 1, the recall 2/3.
    assert found == {"accuracy": 75, "f1": pytest.approx(100 * (0.8 + 2 / 3) / 2)}


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [  # articles, case and punctuation do not count
        ("The cat!", ["cat"], 1, 1),
        ("black cat", ["a cat", "dog"], 0, 2 / 3),
        ("dog", ["a cat", "dog"], 1, 1),
        ("a b c d", ["c d e"], 0, 4 / 6),
        ("", ["cat"], 0, 0),
        ("no answer", ["no answer"], 1, 1),
        ("answer", ["no answer"], 0, 0),
        ("no answer", ["answer"], 0, 0),
    ],
)
def test_squad_by_hand(prediction, answers, exact, f1):
    found = scores_of([prediction], [answers], metric="squad")

    assert list(found.values()) == pytest.approx([100 * exact, 100 * f1])


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("w x y z", ["w y z v"], 75),
        ("w x", ["w x y z"], 200 / 3),  # precision 1, recall 1/2
        ("w x", ["y z", "w x"], 100),
        ("cats", ["cat"], 0),
        ("", ["cat"], 0),
        ("snake_case", ["snake case"], 100),
        ("Кошка, на крыше", ["кошка на крыше"], 100),
        ("собака", ["кошка"], 0),
        ("राम की किताब", ["राम का कतब"], 100 / 3),
    ],
)
def test_rouge_l_by_hand(prediction, answers, expected):
    found = scores_of([prediction], [answers], metric="rouge_l")

    assert found == {"rouge_l": pytest.approx(expected, abs=1e-4)}


def alone(model, prompt, row):
    """One source, without padding, behind its prompt."""
    return torch.cat([prompt.weight, model.shared(row.source_ids)])[None]


def test_a_predicted_label_is_the_likeliest_by_separate_forwards():
    model = tiny()
    prompt = fpt.SoftPrompt(tiny(seed=1).shared.weight[:P])
    labels = ("yes", "no", "w07 w08")  # of different lengths: a sum, not a mean
    task = some_task(labels, train=examples(12, seed=5), prefix="")
    expected = []
    for row in task.train:
        losses = []
        for label in labels:
            ids = torch.tensor([TOKENIZER(label).input_ids])
            output = model(inputs_embeds=alone(model, prompt, row), labels=ids)
            losses.append(output.loss.item() * ids.numel())
        expected.append(labels[losses.index(min(losses))])

    scores, texts = fpt.evaluate(model, prompt, task, task.train)

    assert texts == expected
    assert len(set(expected)) > 1
    right = sum(row.answers == [text] for row, text in zip(task.train, texts, strict=True))
    assert scores["accuracy"] == pytest.approx(100 * right / 12)


def test_text_is_greedy_whatever_the_models_generation_config_says(here, tmp_path):
    folder = shutil.copytree(here / "model", tmp_path / "model")
    path = folder / "generation_config.json"
    other = {"num_beams": 4, "no_repeat_ngram_size": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    model, _ = fpt.load_model(str(folder), "cpu", "fp32")
    prompt = fpt.SoftPrompt(tiny(seed=1).shared.weight[:P])
    task = some_task((), train=examples(7, seed=6), max_target=6)
    expected = []
    for row in task.train:
        embeds, ids = alone(model, prompt, row), [0]
        while len(ids) <= 6 and ids[-1] != 1:
            output = tiny()(inputs_embeds=embeds, decoder_input_ids=torch.tensor([ids]))
            ids.append(output.logits[0, -1].argmax().item())
        expected.append(TOKENIZER.decode(ids, skip_special_tokens=True).strip())

    _, texts = fpt.evaluate(model, prompt, task, task.train)

    assert texts == expected
    assert any(len(set(text.split())) < len(text.split()) for text in expected)


# ====== 8 Record and compare ==========================================================


@pytest.fixture(scope="module")
def ended(here, tmp_path_factory):
    """`pt` and `cr` with two seeds, by one command: its folder and its results."""
    out = tmp_path_factory.mktemp("ended") / "new" / "out"
    results = fpt.main(flags(here, out, "--schedule", "pt", "cr", "--seed", 0, 1))
    return out, results


def test_runs_come_in_turn_each_in_its_folder(ended):
    out, results = ended

    runs = [(run["schedule"], run["seed"]) for run in results]

    assert runs == [("pt", 0), ("cr", 0), ("pt", 1), ("cr", 1)]
    for run, (schedule, seed) in zip(results, runs, strict=True):
        assert json_lines(out / f"{schedule}-seed{seed}/results.json") == [run]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_files_of_a_run_agree_with_each_other(ended, here):
    out, results = ended
    task = fpt.load_task(str(here / "task"), dev=500)
    fpt.encode(task, TOKENIZER, 492)

    prompt = fpt.SoftPrompt(fpt.load_prompt(out / "cr-seed0/prompt"))
    scores, texts = fpt.evaluate(tiny(), prompt, task, task.validation)
    dev, _ = fpt.evaluate(tiny(), prompt, task, task.dev)

    run = results[1]
    assert json_lines(out / "cr-seed0/log.jsonl") == run["log"]
    assert (run["scores"], run["best_dev"]) == (scores, dev["accuracy"])
    predictions = json_lines(out / "cr-seed0/predictions.jsonl")
    for row, text, line in zip(task.validation, texts, predictions, strict=True):
        assert line == [row.source, row.answers, text]


def test_scoring_neurons_is_counted(ended):
    _, (pt, cr, *_) = ended

    assert pt["flops"] == pt["pt_flops"] == cr["pt_flops"]
    assert cr["log"][0]["flops"] > 0


def test_schedules_of_a_seed_share_the_start_and_the_batches(here, tmp_path):
    more = "--schedule pt 1x1:0.5,0.5x1:0.5 --seed 0 1 --steps 4 --eval-every 1".split()

    results = fpt.main(flags(here, tmp_path / "out", *more))

    losses = []
    for run in results:
        losses.append([row["loss"] for row in run["log"]][:2])
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    assert losses[0] != losses[2]


def fake_run(schedule, seed, best, flops, seconds=1.0):
    """The results of a run of 10 updates with an evaluation every 2."""
    log = []
    for i in range(5):
        log.append({"step": 2 * i + 2, "best": best[i], "flops": flops[i]})
    return {
        "schedule": schedule,
        "seed": seed,
        "best_dev": best[-1],
        "validation": best[-1] - 1,
        "flops": flops[-1],
        "seconds": seconds,
        "log": log,
    }


PT = fake_run("pt", 0, [50, 60, 90, 90, 100], [20, 40, 60, 80, 100], seconds=8.0)
CR = fake_run("cr", 0, [50, 55, 70, 98, 99], [11, 21, 31, 51, 71], seconds=6.0)


def test_a_comparison_by_hand():
    row = fpt.compare([PT, CR]).loc["cr"]

    assert row.to_dict() == {
        "dev": 99,
        "validation": 98,
        "flops": 71,
        "seconds": 75,
        "pt, same flops": 90,  # at 80, the first evaluation from 71 on
        "gain": 9,
        "to 99 %": 71,  # pt ends at 100; it needs 100 FLOPs for 99, and cr 71
    }
    assert fpt.compare([PT, CR]).loc["pt", "gain"] == 0


def test_what_there_is_not_is_nan_in_a_comparison():
    dear = fake_run("fr", 0, [50, 51, 52, 53, 54], [1, 2, 3, 4, 101])

    row = fpt.compare([PT, dear]).loc["fr"]

    assert row[["pt, same flops", "gain", "to 99 %"]].isna().all()
    assert list(fpt.compare([dear])) == ["dev", "validation"]


def test_a_table_has_means_deviations_and_from_three_seeds_an_interval():
    runs = [PT, CR, {**PT, "seed": 1}, {**CR, "seed": 1}]
    third = fake_run("pt", 2, [50, 60, 87, 87, 97], [20, 40, 60, 80, 100])

    two = fpt.table(runs)
    three = fpt.table([*runs, third, {**CR, "seed": 2}])

    assert "9.0 ± 0.0" in two
    assert "95 % of gain" not in two
    # Gains of 9, 9 and 12: t(0.975, 2) is 4.303, the standard error of their mean 1.
    assert "10.0 ± 1.7" in three
    assert "± 4.3" in three


def test_a_figure_has_a_line_for_each_schedule_seeds_averaged():
    other = fake_run("cr", 1, [50, 55, 60, 99, 99], [12, 23, 34, 56, 77])

    pt, cr = fpt.figure([PT, CR, other]).axes[0].lines

    assert pt.get_xdata().tolist() == [20, 40, 60, 80, 100]
    assert cr.get_xdata().tolist() == [11.5, 22, 32.5, 53.5, 74]
    assert cr.get_ydata().tolist() == [50, 55, 65, 98.5, 99]
    assert (pt.get_label(), cr.get_label()) == ("pt", "cr")


# ====== 9 Command line ================================================================


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_loaded_model_is_cast_frozen_and_without_dropout(here, precision, dtype):
    model, _ = fpt.load_model(str(here / "model"), "cpu", precision)

    for name, tensor in tiny().state_dict().items():  # the untied head among them
        assert model.state_dict()[name].equal(tensor.to(dtype))
    assert not any(tensor.requires_grad for tensor in model.parameters())
    for module in model.modules():
        assert not module.training
        assert getattr(module, "p", 0) == 0


@pytest.mark.parametrize(
    ("config", "lost", "says"),
    [
        ({}, "decoder.final_layer_norm.weight", "no decoder.final_layer_norm.weight"),
        ({}, "lm_head.weight", "head"),
        ({"d_ff": D_FF + 1}, None, "size|shape|mismatch"),
        ({"model_type": "umt5"}, None, "umt5"),
        ({"model_type": "bart"}, None, "bart"),
    ],
)
def test_a_model_that_is_not_whole_or_no_t5_is_refused(
    here, tmp_path, config, lost, says
):
    folder = shutil.copytree(here / "model", tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    weights = load_file(folder / "model.safetensors")
    weights.pop(lost, None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises((ValueError, RuntimeError), match=says):
        fpt.load_model(str(folder), "cpu", "fp32")


def test_a_head_that_was_overwritten_by_the_embeddings_is_refused(here, tmp_path):
    folder = shutil.copytree(here / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["shared.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match="head .* overwritten"):
        fpt.load_model(str(folder), "cpu", "fp32")


def test_a_model_without_a_tokenizer_is_refused(here, tmp_path):
    absent = shutil.ignore_patterns("token*")
    folder = shutil.copytree(here / "model", tmp_path / "model", ignore=absent)

    with pytest.raises(ValueError, match="tokenizer"):
        fpt.load_model(str(folder), "cpu", "fp32")


def test_bf16_free_text_parts_and_a_saved_start_go_together(here, ended, tmp_path):
    start = ended[0] / "cr-seed0/prompt"
    folder = write_task(tmp_path / "text", labels=[])
    more = "--steps 1 --precision bf16 --accumulate 2 --schedule 0.5x1:1".split()

    fpt.main(flags(here, tmp_path / "out", "--task", folder, "--init", start, *more))

    prompt = fpt.load_prompt(tmp_path / "out/0.5x1_1-seed0/prompt")
    moved = prompt - fpt.load_prompt(start)
    assert moved.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--steps many", "--steps.*many"),
        ("--schedul pt", "--schedul"),
        ("--schedule nope", "'nope'.*pt, ld, fr, cr"),
        ("--task rte", "nyu-mll"),
        ("--task nope", "unknown task 'nope'.*rte"),
        ("--task alike", "hm.*eh.*same tokens"),
        ("--model no/such", "no/such"),
        ("--model wide", "wide"),
        ("--precision fp16", "fp32 or bf16.*overflow"),
        ("--device cuda:99", "CUDA|NVIDIA"),
        ("--device abacus", "abacus"),
        ("--batch 33", "--batch"),
        ("--accumulate 5", "--batch.*parts"),
        ("--init wide", "wide is not 3 vectors"),
        ("--init none", "none"),
        ("--init pointer", "[Hh]eader"),
        ("--out wide", "wide"),
        ("--resume none", "none"),
    ],
)
def test_a_bad_flag_ends_in_one_line_and_writes_nothing(
    more, says, here, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    fpt.save_prompt("wide", torch.zeros(P, D + 1), "any")
    fpt.save_prompt("pointer", torch.zeros(P, D), "any")
    Path("pointer/adapter_model.safetensors").write_text("version https://git-lfs")
    write_task(tmp_path / "alike", labels=["yes", "no", "hm", "eh"])
    before = contents(tmp_path)

    with pytest.raises(SystemExit) as stop:
        fpt.main(flags(here, "out", *more.split()))

    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert re.fullmatch(f"fpt.py: error: .*({says}).*\n", error)
    assert contents(tmp_path) == before


def test_a_command_stopped_twice_resumes_to_the_same_bytes(
    ended, here, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    gradient = fpt.gradient
    left = [13, 1]  # the updates, counted from each start, that are stopped

    def stopped(*how):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return gradient(*how)

    arguments = flags(here, out, "--schedule", "pt", "cr", "--seed", 0, 1)
    monkeypatch.setattr(fpt, "gradient", stopped)
    while left:
        with pytest.raises(SystemExit, match="130"):
            fpt.main(arguments)
        assert f"--resume {out}" in capsys.readouterr().out
        arguments = ["--resume", str(out)]
        left.pop(0)
    monkeypatch.undo()
    fpt.main(arguments)

    assert contents(out) == contents(ended[0])


@pytest.mark.parametrize("write", [2, 3, 5, 8, 9])
def test_a_command_killed_at_a_write_resumes_to_the_same_bytes(
    ended, here, tmp_path, monkeypatch, write
):
    """Of 9: the settings, log and state of 3 evaluations, predictions, results."""
    out = tmp_path / "out"
    replace = os.replace
    writes = itertools.count(1)

    def killed(*paths):
        if next(writes) == write:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit, match="130"):
        fpt.main(flags(here, out))
    monkeypatch.undo()
    fpt.main(["--resume", str(out)])

    found = {name: value for name, value in contents(ended[0]).items() if "cr-seed0" in name}
    assert {name: value for name, value in contents(out).items() if "cr-seed0" in name} == found


def test_two_processes_make_the_run_of_one(here, tmp_path):
    """Neither batches of 5 nor 11 validation examples can be halved."""
    task = write_task(tmp_path / "task", validation=11)
    more = "--schedule 0.5x0.5:0.4,1x1:0.6 --steps 3 --eval-every 1 --batch 5".split()
    more += ["--task", task]
    [one] = fpt.main(flags(here, tmp_path / "one", *more))

    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, ROOT / "fpt.py"]
    done = python(*torchrun, *flags(here, "two", *more), cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train examples") == 1  # one of them speaks
    assert list(contents(tmp_path / "two")) == list(contents(tmp_path / "one"))
    [two] = json_lines(next((tmp_path / "two").rglob("results.json")))
    for mine, theirs in zip(one["log"], two["log"], strict=True):
        assert mine == {**theirs, "loss": pytest.approx(theirs["loss"], rel=1e-5)}


def test_the_default_command_runs_offline(tmp_path):
    dead = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    more = "--steps 8 --eval-every 4 --dev 40 --limit 40".split()

    done = python(ROOT / "fpt.py", *more, cwd=tmp_path, **dead)

    assert done.returncode == 0, done.stderr
    assert "pt, same flops" in done.stdout
    [out] = (tmp_path / "runs").iterdir()
    assert (out / "comparison.png").exists()


def test_every_flag_is_explained_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        fpt.main(["--help"])

    printed = capsys.readouterr().out
    for name in fpt.SETTINGS:
        assert re.search(rf"^ *--{name.replace('_', '-')} +\w", printed, re.M)


# ====== The documents say what the code does ==========================================

DOCUMENTS = ["README.md", "tutorial.md"]


def document(name):
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name):
    """Kind and text of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", document(name), re.M | re.S)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_snippets_are_verbatim(name):
    for kind, text in fences(name):
        assert kind in ("python", "python recipe", "sh", "text", "json")
        if kind == "python":
            assert f"\n{text}" in document("fpt.py")


@pytest.mark.parametrize("name", ["fpt.py", *DOCUMENTS])
def test_commands_parse(name):
    text = fpt.__doc__ if name == "fpt.py" else document(name)

    commands = re.findall(r"(?:python|torchrun[^`\n]*?) fpt\.py\b([^`\n]*)", text)

    assert commands
    for command in commands:
        if "--resume" not in command:
            args = fpt.parse_args(shlex.split(command, comments=True))
            assert Path(args.task).name in [*fpt.TASKS, "FOLDER", "entailment"]
            assert [fpt.parse_schedule(schedule) for schedule in args.schedule]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_exist(name):
    links = re.findall(r"\]\((?!https?:)(.+?)\)", document(name))

    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_recipe_for_a_trainer_runs_as_it_is_printed(tmp_path, monkeypatch):
    """On five labels: every stage is seen, and the prompt scores above chance, 20 %."""
    make = script("micro/make.py")
    rows, labels = make.unasked(make.slot, 4000), make.UNASKED[make.slot]
    make.write_task(tmp_path / "FOLDER", rows, labels)
    [recipe] = [text for kind, text in fences("tutorial.md") if kind == "python recipe"]
    for printed, used in [
        ("google/flan-t5-base", str(fpt.MICRO / "model")),
        ("30_000", "100"),
    ]:
        assert recipe.count(printed) == 1
        recipe = recipe.replace(printed, used)
    seen = []
    partial_t5 = fpt.partial_t5

    def partial(model, depth, width, scores, decoder):
        seen.append((depth, width, decoder))
        return partial_t5(model, depth, width, scores, decoder)

    monkeypatch.setattr(fpt, "partial_t5", partial)
    monkeypatch.chdir(tmp_path)

    exec(recipe, {})

    sizes = [(stage.depth, stage.width, False) for stage in fpt.SCHEDULES["cr"]]
    assert seen == sizes
    model, tokenizer = fpt.load_model(str(fpt.MICRO / "model"), "cpu", "fp32")
    task = fpt.load_task("FOLDER", dev=10, limit=200)
    fpt.encode(task, tokenizer, 492)
    prompt = fpt.SoftPrompt(fpt.load_prompt("prompt"))
    scores, _ = fpt.evaluate(model, prompt, task, task.validation)
    assert scores["accuracy"] > 40


def test_the_readme_is_tested_as_it_says():
    command = document(".ci/run").splitlines()[-1]

    assert command == "python -m pytest -q"
    assert __doc__.startswith(command)
    for run in [command, "python fpt.py"]:
        line = f"pip install -r requirements.txt && {run}\n"
        assert ("sh", line) in fences("README.md")


def test_requirements_are_bounded_and_met_here():
    lines = re.findall(r"^[^#\n]+", document("requirements.txt"), re.M)

    assert lines
    for line in lines:
        requirement = Requirement(line.strip())
        version = importlib.metadata.version(requirement.name)
        assert {bound.operator for bound in requirement.specifier} == {">=", "<"}
        assert requirement.specifier.contains(version, prereleases=True), line
