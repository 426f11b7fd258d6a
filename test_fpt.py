"""python -m pytest -q        all tests of fpt.py and its documents: offline, a minute

The tests compare with values worked out by hand, or with something that fpt.py does not
contain: stock transformers models, PEFT, PyTorch's FLOP counter, a loop without tricks.
The three promises come first, then tiny models and tasks, then fpt.py by its sections.
"""

import copy
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Read by the imports below. What this machine has cached cannot help a test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import datasets
import peft
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from pytest import approx, fixture, raises
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fpt
from fpt import (
    TASKS,
    Example,
    SoftPrompt,
    Task,
    evaluate,
    hub_examples,
    load_model,
    load_prompt,
    load_task,
    main,
    parse_schedule,
    partial_t5,
    save_prompt,
    step_flops,
)

ROOT = Path(__file__).resolve().parent
P = 3  # vectors of a prompt
START = torch.randn(P, 16, generator=torch.Generator().manual_seed(4))

# What our own calls get wrong is blamed on the module that they land in. The last two
# are calls of PEFT and of transformers' Trainer.
CALLED = "(fpt|transformers|torchmetrics|datasets|pandas)[.]?.*"
pytestmark = [
    pytest.mark.filterwarnings(f"error::DeprecationWarning:{CALLED}"),
    pytest.mark.filterwarnings(f"error::FutureWarning:{CALLED}"),
    pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|pin_memory)"),
]
parametrize = pytest.mark.parametrize

# ====== The three promises ============================================================


def test_a_partial_model_has_the_shapes_that_were_asked_for():
    partial = partial_t5(tiny(), depth=0.5, width=0.25, scores=random_scores())

    for stack in [partial.encoder, partial.decoder]:
        assert len(stack.block) == 3
        for block in stack.block:
            assert ffn(block).wi_0.weight.shape == (8, 16)
            assert ffn(block).wi_1.weight.shape == (8, 16)
            assert ffn(block).wo.weight.shape == (16, 8)


def test_one_prompt_and_one_optimiser_go_through_every_stage():
    _, prompt, optimizer = state = start()
    weight = prompt.weight
    layers = []

    def gradient(partial, prompt, batch):
        assert prompt.weight is weight
        layers.append(len(partial.encoder.block))
        return fpt.gradient(partial, prompt, batch)

    for run in train("cr", state, steps=10, gradient=gradient):
        assert optimizer.state[weight]["step"] == run.step

    assert layers == [2, 2, 3, 3, 5, 5, 6, 6, 6, 6]
    assert not weight.equal(START)


def test_the_command_tunes_a_prompt_and_leaves_its_files(here, tmp_path):
    save_prompt(tmp_path / "start", START, "any")

    [result] = main(flags(here, tmp_path / "out", "--init", tmp_path / "start"))

    assert 0 <= result["validation"] <= 100
    assert not load_prompt(tmp_path / "out/cr-seed0/prompt").equal(START)
    assert {path.name for path in tmp_path.glob("out/**/*.*")} >= {
        "settings.json",
        "log.jsonl",
        "results.json",
        "predictions.jsonl",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


# ====== Tiny models, a tokenizer and a task, made here ================================

TOKENIZER = transformers.ByT5Tokenizer()  # a token is a byte; it needs no files
KINDS = ["v1.0", "v1.1", "mt5"]  # ReLU and tied head; gated and untied; the same as mT5


def tiny(kind="v1.1", seed=0, **changes):
    """A random, frozen T5. Half of it would drop out if anything turned dropout on."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 384,
        "d_model": 16,
        "d_kv": 4,
        "num_heads": 3,  # 3 heads of 4 are not d_model
        "d_ff": 32,
        "num_layers": 6,
        "num_decoder_layers": 6,
        "dropout_rate": 0.5,
        "decoder_start_token_id": 0,
        **changes,
    }
    if kind != "v1.0":
        sizes |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    family = "mt5" if kind == "mt5" else "t5"
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    if kind != "v1.0":  # transformers 5 ties the head of every new model
        model.lm_head.weight = torch.nn.Parameter(torch.randn(384, 16))
    return model.eval().requires_grad_(False)


def ffn(block):
    return block.layer[-1].DenseReluDense


def random_scores():
    generator = torch.Generator().manual_seed(5)
    encoder, decoder = torch.rand(2, 6, 32, generator=generator)
    return {"encoder": encoder, "decoder": decoder}


COLLATE = transformers.DataCollatorForSeq2Seq(TOKENIZER)
FIVE = []
for source, target in [(6, 3), (4, 1), (9, 2), (3, 4), (5, 2)]:  # numbers of tokens
    ids = list(range(6, 30))
    FIVE.append({"input_ids": ids[:source], "labels": ids[-target:]})
EIGHT = {"min_new_tokens": 8, "max_new_tokens": 8}  # an early end would hide much


def five():
    return COLLATE(FIVE)


def examples(first, last):
    """Sources of 1 to 10 letters and digits, all different."""
    rows = []
    for i in range(first, last):
        rows.append(Example("a" * (i % 9) + str(i), [("yes", "no")[i % 2]]))
    return rows


def some_task(train=None, max_source=99, **more):
    more = {"labels": ["yes", "no"], "dev": [], "validation": [], **more}
    task = Task(train=train or examples(0, 20), **more)
    fpt.encode(task, TOKENIZER, max_source)
    return task


def write_task(folder, labels=("yes", "no")):
    """40 train examples, each of them twice, and 11 of validation."""
    folder.mkdir()
    spec = {"labels": labels, "prefix": "<extra_id_0>"}
    (folder / "task.json").write_text(json.dumps(spec))
    train = examples(0, 40) + examples(0, 40)
    for name, rows in [("train", train), ("validation", examples(40, 51))]:
        lines = []
        for row in rows:
            line = {"source": row.source, "target": row.answers[0]}
            lines.append(json.dumps(line))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@fixture(scope="session")
def here(tmp_path_factory):
    """A folder with a tiny v1.1 model and a task, on which `main` runs."""
    folder = tmp_path_factory.mktemp("here")
    model = tiny()
    model.generation_config.num_beams = 4  # which nothing may heed
    save(model, folder / "model")
    write_task(folder / "task")
    return folder


def save(model, folder, **how):
    model.save_pretrained(folder, **how)
    TOKENIZER.save_pretrained(folder)


def flags(here, out, *more):
    """The flags of a small run; of two that are alike the later one counts."""
    settings = "--steps 10 --batch 4 --eval-every 4 --prompt-length 3 --device cpu"
    settings += f" --model {here}/model --task {here}/task --out {out}"
    return [*settings.split(), *map(str, more)]


def contents(out):
    """The files in a folder, but for those that hold seconds or the folder's name."""
    found = {}
    for path in sorted(out.rglob("*.*")):
        if path.name not in ("settings.json", "results.json", "state.pt"):
            found[path.relative_to(out)] = path.read_bytes()
    return found


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ====== 1 Partial models ==============================================================


@parametrize(
    "total, keep, layers",
    [  # what the official rule gives
        (24, 6, [0, 4, 8, 13, 18, 23]),
        (12, 3, [0, 5, 11]),
        (12, 6, [0, 2, 4, 6, 8, 11]),
        (8, 2, [0, 7]),
        (5, 1, [0]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_layers_are_kept_by_the_official_table(total, keep, layers):
    assert fpt.kept_layers(total, keep) == layers


@parametrize("keep", [0, 7])
def test_it_cannot_keep_no_layers_or_more_than_there_are(keep):
    with raises(ValueError, match=f"keep {keep} of 6"):
        fpt.kept_layers(6, keep)


def size(model):
    """Layers and neurons of the encoder."""
    blocks = model.encoder.block
    return len(blocks), ffn(blocks[0]).wo.in_features


def stock(kind, encoder, decoder):
    """A model built small from a config, with copies of these blocks of tiny(kind)."""
    model = tiny(kind)
    depths = {"num_layers": len(encoder), "num_decoder_layers": len(decoder)}
    small = tiny(kind, seed=1, **depths)
    small.load_state_dict(model.state_dict(), strict=False)  # all but the right blocks
    for side, kept in [("encoder", encoder), ("decoder", decoder)]:
        for place, index in enumerate(kept):
            block = getattr(model, side).block[index]
            getattr(small, side).block[place].load_state_dict(block.state_dict())
    small.config.num_layers = 6  # transformers sizes the decoder's cache by it
    return small


def assert_same_function(model, expected, atol=0):
    """In logits, loss, gradient, and in texts of eight tokens by beam search."""
    found = []
    for net in [model, expected]:
        batch = five()
        embeds = net.shared(batch.pop("input_ids")).requires_grad_()
        output = net(inputs_embeds=embeds, **batch)
        gradient = torch.autograd.grad(output.loss, embeds)
        found.append([output.logits, output.loss, *gradient])
    assert_close(*found, rtol=0, atol=atol)
    how = {**five(), **EIGHT, "num_beams": 3}
    del how["labels"]
    assert model.generate(**how).equal(expected.generate(**how))


@parametrize(
    "depth, decoder, kept",
    [
        (1, True, (range(6), range(6))),
        (0.25, True, ([0, 5], [0, 5])),
        (0.5, False, ([0, 2, 5], range(6))),
    ],
)
@parametrize("kind", KINDS)
def test_a_model_of_fewer_layers_is_a_stock_model(kind, depth, decoder, kept):
    partial = partial_t5(tiny(kind), depth, 1, decoder=decoder)

    assert_same_function(partial, stock(kind, *kept))


@parametrize("kind", KINDS)
def test_a_model_of_fewer_neurons_is_a_stock_model_with_silenced_ones(kind):
    scores = random_scores()
    kept = [0, 2, 5]
    silenced = stock(kind, kept, kept)
    for side in scores:
        for place, index in enumerate(kept):
            quiet = scores[side][index].argsort()[:22]  # 0.3 of 32 are 9.6: ten stay
            ffn(getattr(silenced, side).block[place]).wo.weight[:, quiet] = 0

    partial = partial_t5(tiny(kind), 0.5, 0.3, scores)

    assert_same_function(partial, silenced, atol=1e-5)


def test_all_tensors_are_shared_but_those_of_narrowed_ffns():
    model = tiny()
    shared = {id(tensor) for tensor in model.parameters()}

    partial = partial_t5(model, 0.1, 0.25, random_scores(), decoder=False)

    new = [name for name, x in partial.named_parameters() if id(x) not in shared]
    assert new == [
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
        "encoder.block.0.layer.1.DenseReluDense.wo.weight",
    ]


@parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind):
    model = tiny(kind)
    modules = list(model.named_modules())

    partial_t5(model, 0.5, 0.25, random_scores())

    assert list(model.named_modules()) == modules
    assert_same_function(model, tiny(kind))


def test_a_model_of_another_kind_is_refused():
    model = torch.nn.Module()
    model.config = transformers.UMT5Config()

    with raises(ValueError, match="umt5 is no T5"):
        partial_t5(model, 0.5, 1)


@parametrize("depth, width", [(0, 1), (1.01, 1), (1, math.nan), (1, 0.5)])
def test_shares_outside_0_and_1_and_width_without_scores_are_refused(depth, width):
    with raises(ValueError, match=r"\(0, 1\]; width < 1 needs scores"):
        partial_t5(tiny(), depth, width)


def test_an_ffn_of_other_layers_is_not_narrowed():
    class Quantised(torch.nn.Linear):
        pass

    model = tiny()
    ffn(model.encoder.block[0]).wo = Quantised(32, 16, bias=False)

    with raises(ValueError, match="wo.*Quantised.*not a plain nn.Linear"):
        partial_t5(model, 1, 0.5, random_scores())


def test_scores_of_another_model_are_refused():
    with raises(ValueError, match="scores belong to"):
        partial_t5(tiny(d_ff=8), 1, 0.5, random_scores())


def activations(model, prompt, row):
    """Mean absolute activation of each FFN for one example, alone and unpadded."""
    found = []

    def watch(net, args):
        [x] = args[0]  # [positions, d]
        if hasattr(net, "wi"):
            activation = net.act(net.wi(x))
        else:
            activation = net.act(net.wi_0(x)) * net.wi_1(x)
        found.append(activation.abs().mean(0))

    model = copy.deepcopy(model)
    for block in [*model.encoder.block, *model.decoder.block]:
        ffn(block).register_forward_pre_hook(watch)
    labels = torch.tensor([row["labels"]])
    model(inputs_embeds=alone(model, prompt, row), labels=labels)
    return torch.stack(found)  # [12, d_ff], the encoder's first


def alone(model, prompt, row):
    """One source, without padding, behind its prompt."""
    return torch.cat([prompt, model.shared(torch.tensor(row["input_ids"]))])[None]


@parametrize("kind", KINDS)
def test_neuron_scores_are_means_over_examples_each_taken_alone(kind):
    model = tiny(kind)

    scores = fpt.neuron_scores(model, START, [COLLATE(FIVE[:3]), COLLATE(FIVE[3:])])

    found = torch.stack(scores["encoder"] + scores["decoder"])
    expected = sum(activations(model, START, row) for row in FIVE) / 5
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


# ====== 2 Schedule ====================================================================


def test_a_schedule_is_read_from_text():
    stages = parse_schedule(" 0.5x.25:.3 , 1x1.0:0.7")

    assert stages == [fpt.Stage(0.5, 0.25, 0.3), fpt.Stage(1, 1, 0.7)]


def test_shares_whose_floating_point_sum_is_not_1_are_read():
    assert len(parse_schedule("1x1:.1,1x1:.2,1x1:.7")) == 3


@parametrize(
    "text",
    [
        "",
        "0.5:1",
        "1x1x1",
        "0.5:0.5x0.4",
        "0x1:1",
        "nanx1:1",
        "1x1:0,1x1:1",
        "1x1:0.3,1x1:0.6",
        "1x1:1,1x1:0.6",
    ],
)
def test_what_is_no_schedule_is_refused_with_the_notation(text):
    says = f"schedule {text!r} is none of pt, ld, fr, cr"

    with raises(ValueError, match=f"{re.escape(says)}.*adding up to 1"):
        parse_schedule(text)


@parametrize("step, stage", [(6000, 0), (6001, 1), (18000, 2), (18001, 3)])
def test_a_model_grows_behind_the_last_update_of_a_stage(step, stage):
    assert fpt.stage_at(fpt.SCHEDULES["cr"], step, 30_000) == stage


def test_boundaries_round_half_up():
    schedule = parse_schedule("1x1:.15,1x1:.35,1x1:.5")  # of 10 updates: 1.5, 5

    stages = [fpt.stage_at(schedule, step, 10) for step in range(1, 11)]

    assert stages == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]


# ====== 3 Cost ========================================================================


@parametrize("backward", [False, True])
@parametrize("depth, width", [(1, 1), (0.5, 0.25)])
@parametrize("kind", KINDS)
def test_step_flops_equal_pytorchs_counter(kind, depth, width, backward):
    model = tiny(kind)
    model.set_attn_implementation("eager")  # of others it misses attention products
    partial = partial_t5(model, depth, width, random_scores())
    embeds = torch.zeros(2, 11, 16, requires_grad=backward)
    labels = torch.ones(2, 6).long()

    with FlopCounterMode(display=False) as counter:
        loss = partial(inputs_embeds=embeds, labels=labels).loss
        if backward:
            loss.backward()

    assert step_flops(partial, 2, 11, 6, backward) == counter.get_total_flops()


def on_meta(**sizes):
    """A T5 of shapes alone: its numbers would not fit a test."""
    with torch.device("meta"):
        config = transformers.T5Config(**sizes)
        return transformers.T5ForConditionalGeneration(config)


def linear_flops(model, target):
    """What the paper counts: linear layers, forward, at 512 source positions."""
    flops = step_flops(model, 1, 512, target, backward=False)
    flops -= 4 * 1024 * 512 * 512 * len(model.encoder.block)
    return flops - 4 * 1024 * target * (target + 512) * len(model.decoder.block)


@parametrize(
    "name, printed, total",
    [
        ("ld", [30, 54, 77, 100], 72),
        ("fr", [58, 72, 86, 100], 83),
        ("cr", [20, 40, 66, 100], 65),
    ],
)
def test_stages_of_t5_large_cost_what_the_paper_prints(name, printed, total):
    gated = {"feed_forward_proj": "gated-gelu", "d_ff": 2816}
    model = on_meta(d_model=1024, num_layers=24, num_heads=16, **gated)
    scores = dict.fromkeys(random_scores(), [torch.arange(2816)] * 24)
    costs = []
    for stage in fpt.SCHEDULES[name]:
        cost = 0
        for target in [5, 5, 200, 200, 512]:  # of five tasks; the paper has no lengths
            decoder = target > 5  # it stays whole for short labels
            partial = partial_t5(model, stage.depth, stage.width, scores, decoder)
            cost += 20 * linear_flops(partial, target) / linear_flops(model, target)
        costs.append(cost)

    assert costs == approx(printed, abs=1)
    assert round(0.2 * sum(costs[:3]) + 0.4 * costs[3]) == total


# ====== 4 Soft prompt =================================================================


def test_a_prompt_stands_before_the_source_and_is_attended_to():
    model, batch = tiny(), five()

    embeds, mask = SoftPrompt(START)(model, batch)

    assert embeds[:, :P].equal(START.expand(5, P, 16))
    assert embeds[:, P:].equal(model.shared(batch["input_ids"]))
    assert mask.sum() == 5 * P + batch["attention_mask"].sum()


def test_a_prompt_is_fp32_and_gives_a_bf16_model_bf16():
    prompt = SoftPrompt(START.bfloat16())

    embeds, _ = prompt(tiny().bfloat16(), five())

    assert prompt.weight.dtype == torch.float32
    assert embeds.dtype == torch.bfloat16


def test_token_losses_add_up_to_those_of_each_example_alone():
    model, batch = tiny(), five()
    embeds, mask = SoftPrompt(START)(model, batch)

    losses = fpt.token_losses(model, mask, batch["labels"], inputs_embeds=embeds)

    for found, row in zip(losses, FIVE, strict=True):
        labels = torch.tensor([row["labels"]])
        output = model(inputs_embeds=alone(model, START, row), labels=labels)
        assert_close(found.sum(), output.loss * labels.numel())


def test_the_loss_of_a_bf16_model_is_fp32():
    loss, _ = fpt.gradient(tiny().bfloat16(), SoftPrompt(START), five())

    assert loss.dtype == torch.float32


def draw(how, length, embeddings, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return fpt.init_prompt(how, length, embeddings, generator)


def test_a_uniform_prompt_fills_the_papers_bounds():
    prompt = draw("uniform", 500, torch.zeros(64, 16))

    assert -0.25 <= prompt.min() < -0.24  # 1 / sqrt(16)
    assert 0.24 < prompt.max() <= 0.25


@parametrize("vocabulary, last", [(20, 20), (9000, 5000)])
def test_a_vocab_prompt_takes_frequent_tokens_once_and_no_special_one(vocabulary, last):
    numbered = torch.arange(vocabulary)[:, None]

    prompt = draw("vocab", last - 3, numbered)

    assert sorted(prompt[:, 0].tolist()) == list(range(3, last))


def test_more_vocab_vectors_than_tokens_are_refused():
    with raises(ValueError, match="62 vectors, but only 61"):
        draw("vocab", 62, torch.zeros(64, 16))


def peft_model(**how):
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, **how
    )
    model = peft.get_peft_model(tiny(), config).eval()
    return model, model.prompt_encoder["default"].embedding.weight


@parametrize("kind", KINDS)
def test_peft_loads_a_saved_prompt_and_computes_the_same(kind, tmp_path):
    model, batch = tiny(kind), five()
    embeds, mask = SoftPrompt(START)(model, batch)
    ours = {"inputs_embeds": embeds, "attention_mask": mask}

    save_prompt(tmp_path, START, "any")
    theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path).eval()

    logits = model(**ours, labels=batch["labels"]).logits
    assert theirs(**batch).logits.equal(logits)
    del batch["labels"]
    assert theirs.generate(**batch, **EIGHT).equal(model.generate(**ours, **EIGHT))


def test_pefts_own_prompt_loads_without_its_rows_for_the_decoder(tmp_path):
    theirs, weight = peft_model()
    theirs.save_pretrained(tmp_path)

    assert load_prompt(tmp_path).equal(weight[:P])


def test_what_is_no_prompt_does_not_load(tmp_path):
    lora = peft.get_peft_model(tiny(), peft.LoraConfig())
    lora.save_pretrained(tmp_path / "lora")
    save_prompt(tmp_path / "nan", START / 0, "any")

    for name in ["lora", "nan", "absent"]:
        with raises((ValueError, OSError), match=name):
            load_prompt(tmp_path / name)


# ====== 5 Train =======================================================================


def test_gradient_is_that_of_the_stock_loss():
    model, prompt, batch = tiny(), SoftPrompt(START), five()

    loss, grad = fpt.gradient(model, prompt, batch)

    embeds, mask = prompt(model, batch)
    labels = batch["labels"]
    stock = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    stock.loss.backward()
    assert_close(loss, stock.loss.detach())
    assert_close(grad, prompt.weight.grad)


@parametrize("parts", [1, 2, 5])
def test_parts_add_up_to_the_whole_whatever_the_lengths_of_targets(parts):
    model, prompt = tiny(), SoftPrompt(START)

    found = fpt.gradient_in_parts(model, prompt, five(), parts)

    assert_close(found, fpt.gradient(model, prompt, five()))


def start(lr=0.3):
    prompt = SoftPrompt(START)
    return fpt.Run(), prompt, fpt.adafactor(prompt, lr)


def train(schedule, state, **changes):
    """`fpt.train` of a tiny model on a tiny task, 20 updates."""
    run, prompt, optimizer = state
    how = {
        "model": tiny(),
        "dev_score": lambda model, prompt: prompt.weight.sum().item(),
        "steps": 20,
        "eval_every": 5,
        "scores": random_scores(),
        "decoder": False,
    }
    return fpt.train(
        prompt=prompt,
        optimizer=optimizer,
        schedule=parse_schedule(schedule),
        stream=fpt.batches(some_task(), 4, "cpu", 0, first_update=run.step + 1),
        run=run,
        **how | changes,
    )


def test_the_ledger_adds_up_every_batch_as_it_was_padded():
    model = tiny()
    half = partial_t5(model, 0.5, 0.5, random_scores(), decoder=False)

    *_, run = train("0.5x0.5:0.5,1x1:0.5", start(), steps=4)

    flops = pt_flops = 0
    batches = fpt.batches(some_task(), 4, "cpu", seed=0)
    for partial in [half, half, model, model]:
        batch = next(batches)
        shape = 4, P + batch["input_ids"].shape[1], batch["labels"].shape[1]
        flops += step_flops(partial, *shape)
        pt_flops += step_flops(model, *shape)
    assert (run.flops, run.pt_flops) == (flops, pt_flops)


def test_pt_is_prompt_tuning_as_peft_does_it():
    theirs, weight = peft_model(num_transformer_submodules=1)
    weight.data.copy_(START)
    how = {"scale_parameter": False, "relative_step": False, "weight_decay": 1e-5}
    optimizer = transformers.Adafactor([weight], lr=0.3, **how)
    batches = fpt.batches(some_task(), 4, "cpu", seed=0)
    for _ in range(6):
        optimizer.zero_grad()
        theirs(**next(batches), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weight, 1.0)
        optimizer.step()

    _, prompt, _ = state = start()
    *_, run = train("pt", state, steps=6)

    assert_close(prompt.weight, weight, rtol=1e-4, atol=1e-4)


@parametrize("step", [5, 10, 15])
def test_a_run_goes_on_from_any_evaluation_to_the_same_bytes(step):
    _, prompt, _ = state = start()
    for run in train("cr", state):
        if run.step == step:
            saved = copy.deepcopy(state)

    *_, again = train("cr", saved)

    assert saved[1].weight.equal(prompt.weight)
    assert again.best_prompt.equal(run.best_prompt)
    assert again.log == run.log


def test_the_best_prompt_on_the_final_model_is_the_later_of_equals():
    scores = [10.0, 30.0, 30.0, 20.0]
    judged = []

    def judge(model, prompt):
        assert size(model) == (6, 32)
        judged.append(prompt.weight.clone())
        return scores[len(judged) - 1]

    *_, run = train("cr", start(), dev_score=judge)

    assert [row["best"] for row in run.log] == [10, 30, 30, 30]
    assert run.best_prompt.equal(judged[2])


def test_a_logged_loss_is_the_mean_since_the_last_evaluation():
    losses = iter(torch.tensor([1.0, 3.0, 5.0]))

    def gradient(*how):
        return next(losses), torch.zeros(P, 16)

    *_, run = train("pt", start(), steps=3, eval_every=2, gradient=gradient)

    assert [row["loss"] for row in run.log] == [2, 5]


@parametrize("loss, slope", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(loss, slope):
    bad = torch.tensor(loss), torch.full_like(START, slope)

    with raises(FloatingPointError, match=r"update 5\b"):
        *_, run = train("pt", start(), gradient=lambda *how: bad)


@parametrize("first, same", [(0, False), (1, True)])
def test_exercise_1_without_layer_0_a_t5_reads_a_bag_of_words(first, same):
    """The order of the source changes nothing but the order of what comes out."""
    encoder = tiny().encoder
    encoder.block = torch.nn.ModuleList(encoder.block[first:])
    order = [3, 0, 5, 1, 4, 2]
    source = torch.randn(1, 6, 16)

    straight = encoder(inputs_embeds=source).last_hidden_state
    mixed = encoder(inputs_embeds=source[:, order]).last_hidden_state

    assert torch.allclose(straight[:, order], mixed, atol=1e-4) is same


@parametrize(
    "total, gone", [(12, [[5], [6, 8], []]), (24, [[13], [12, 14, 16, 18, 20], []])]
)
def test_exercise_2_layers_that_go_when_the_model_grows(total, gone):
    kept = [set(fpt.kept_layers(total, total * i // 4)) for i in range(1, 5)]

    assert [sorted(kept[i] - kept[i + 1]) for i in range(3)] == gone


def test_exercise_3_shares_of_equal_cost():
    """One over the cost of an update: then every stage of `cr` spends the same."""
    model = on_meta(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    scores = {"encoder": [torch.arange(3072)] * 12}

    inverse = []
    for share in [0.25, 0.5, 0.75, 1]:
        partial = partial_t5(model, share, share, scores, decoder=False)
        inverse.append(1 / step_flops(partial, 32, 102, 6))

    total = sum(inverse)
    assert [round(x / total, 2) for x in inverse] == [0.42, 0.27, 0.18, 0.13]
    assert round(4 * inverse[3] / total, 2) == 0.51  # FLOPs over pt's


# ====== 6 Tasks and data ==============================================================


@parametrize(
    "name, columns, labels",
    [
        ("mnli", "hypothesis premise", "entailment neutral contradiction"),
        ("qqp", "question1 question2", "not_duplicate is_duplicate"),
        ("rte", "sentence1 sentence2", "entailment not_entailment"),
        ("sst2", "sentence", "negative positive"),
        ("mrpc", "sentence1 sentence2", "not_equivalent equivalent"),
        ("boolq", "question passage", "False True"),
        ("cb", "hypothesis premise", "entailment contradiction neutral"),
        ("copa", "choice1 choice2 premise question", "choice1 choice2"),
        ("wic", "word sentence1 sentence2", "False True"),
    ],
)
def test_rows_of_labelled_tasks(name, columns, labels):
    columns = columns.split()
    row = {column: f"the {column}" for column in columns}

    for i, label in enumerate(labels.split()):
        [example] = hub_examples(TASKS[name], {**row, "label": i})
        assert example.answers[0] == label
        assert example.source == " ".join(
            f"{column}: the {column}" for column in columns
        )


def test_a_task_of_the_hub_is_loaded_by_its_name(monkeypatch):
    rows = [{"hypothesis": i, "premise": i, "label": i} for i in range(3)]

    def load_dataset(*which, revision=None):
        assert which == ("nyu-mll/glue", "mnli")
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported")
        return {"train": rows, "validation_matched": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("mnli", dev=1)

    assert (len(task.train), len(task.dev), len(task.validation)) == (2, 1, 3)


def test_a_row_without_a_label_is_refused():
    with raises(KeyError):
        hub_examples(TASKS["sst2"], {"sentence": "s", "label": -1})


@parametrize("texts, right", [(["a b", "a", "a b"], ["a b", "a"]), ([], ["no answer"])])
def test_the_first_answer_of_squad_is_learned_and_any_is_right(texts, right):
    row = {"context": "C", "question": "Q", "answers": {"text": texts}}

    [example] = hub_examples(TASKS["squad2"], row)

    assert example.source == "question: Q context: C"
    assert list(dict.fromkeys(example.answers)) == right


def test_every_answer_of_record_is_learned_and_its_passage_is_of_sentences():
    passage = "A\n@highlight\nB!\n@highlight\nC"
    row = {"passage": passage, "query": "Q", "entities": ["E", "F G"]}
    row["answers"] = ["F G", "F G", "E"]

    first, second = hub_examples(TASKS["record"], row)

    assert first.source == "query: Q entities: E, F G passage: A. B! C"
    assert (first.answers[0], second.answers[0]) == ("F G", "E")
    assert set(second.answers) == {"F G", "E"}


def test_a_summary_of_xsum_is_learned_from_its_document():
    [example] = hub_examples(TASKS["xsum"], {"document": "D\nE", "summary": "S"})

    assert (example.source, example.answers[0]) == ("D\nE", "S")


def test_dev_is_a_part_of_train_that_shares_no_source_with_it(here):
    task = load_task(f"{here}/task", dev=6)

    held = {row.source for row in task.dev}
    rows = examples(0, 40) + examples(0, 40)
    assert len(held) == len(task.dev) == 6
    assert task.train == [row for row in rows if row.source not in held]


def test_dev_is_a_fifth_of_train_at_most(here):
    task = load_task(f"{here}/task", dev=500)

    assert len(task.dev) == 8


def test_a_limit_takes_a_sample_of_validation(here):
    task = load_task(f"{here}/task", dev=6, limit=5)

    assert len(task.validation) == 5
    assert task.validation != examples(40, 45)


@parametrize(
    "name, content, says",
    [
        ("task.json", '{"labls": ["a"]}', ".*labls"),
        ("task.json", '{"metric": "bleu"}', ".*rouge_l"),
        ("task.json", '{"max_target": "64"}', ".*max_target"),
        ("task.json", '{"max_target": 0}', ".*max_target"),
        ("task.json", '{"labels": "no"}', ".*labels"),
        ("train.jsonl", "", ""),
        ("train.jsonl", "\udcff", ""),  # a byte, but not UTF-8
        ("train.jsonl", '{"source": "s", "target": "no"}\nx', ", line 2.*x"),
        ("train.jsonl", '{"source": "s", "target": ["no", "no"]}', ", .*not one"),
        ("validation.jsonl", '{"source": " ", "target": "no"}', ", line 1.*empty"),
        ("train.jsonl", '{"source": "\\ud800", "target": "no"}', ", line 1.*surrog"),
    ],
)
def test_a_bad_task_folder_names_file_and_line(name, content, says, tmp_path):
    folder = write_task(tmp_path / "task")
    (folder / name).write_text(content, errors="surrogateescape")

    with raises(ValueError, match=name + says):
        load_task(str(folder), dev=5)


def test_sources_and_texts_are_cut_and_still_end(capsys):
    row = Example("nonono", ["<unk>yes"])

    some_task(labels=(), train=[row], max_source=3, max_target=4)

    assert row.tokens["input_ids"] == [113, 114, 1]
    assert row.tokens["labels"] == [259, 2, 124, 1]  # the prefix comes first
    warnings = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in warnings] == ["max_target", "know", "decoded"]


def test_labels_are_not_cut():
    row = Example("a", ["no"])

    some_task(train=[row], prefix="", max_target=2)

    assert row.tokens["labels"] == [113, 114, 1]


def test_labels_of_the_same_tokens_are_refused():
    with raises(ValueError, match="'no' and 'no' are the same tokens"):
        some_task(labels=("no", "no"))


def drawn(count, updates, seed=0, first=1, pool=3):
    """Batches of 4; an example's tokens are its number, as often as it is long."""
    rows = []
    for i in range(1, count + 1):
        tokens = {"input_ids": [i] * (i * 7 % 19 + 1), "labels": [1]}
        rows.append(Example("", [], tokens))
    task = Task(train=rows, collate=COLLATE)
    stream = fpt.batches(task, 4, "cpu", seed, first, pool)
    return [next(stream)["input_ids"].tolist() for _ in range(updates)]


@parametrize("count, updates", [(40, 10), (7, 1)])
def test_no_example_comes_twice_in_a_pass(count, updates):
    for number in range(3):
        batches = drawn(count, updates, first=number * updates + 1)
        used = {row[0] for batch in batches for row in batch}
        assert len(used) == 4 * updates


def test_another_pass_leaves_out_others():
    first, *others = drawn(7, 6)

    assert any(batch != first for batch in others)


@parametrize("update", [2, 10, 11, 30])
def test_a_batch_depends_on_seed_and_update_alone(update):
    [found] = drawn(43, 1, first=update)

    assert found == drawn(43, 40)[update - 1]
    assert found not in drawn(43, 40, seed=1)


def test_batches_of_similar_lengths_are_padded_less():
    padding = {}
    for pool in [50, 1]:
        batches = drawn(400, 100, pool=pool)
        padding[pool] = sum(row.count(0) for batch in batches for row in batch)

    assert padding[50] < 0.2 * padding[1]


def test_sources_in_train_and_labels_without_examples_are_warned_of(tmp_path, capsys):
    folder = write_task(tmp_path / "task")
    for name in ["train", "validation"]:
        (folder / f"{name}.jsonl").write_text('{"source": "a", "target": "yes"}')

    load_task(str(folder), dev=1)

    warnings = capsys.readouterr().out
    assert re.fullmatch("warning: 1 .*in train.*\nwarning: .*'no'.*\n", warnings)


# ====== 7 Evaluate ====================================================================


@parametrize(
    "metric, labels, expected",
    [
        ("accuracy", ["a", "b"], 75),
        ("f1", ["a", "b"], 66.7),  # of "b" alone: precision 1/2, recall 1
        ("f1", ["a", "b", "c"], 73.3),  # and 80 of "a"; "c" does not occur
        ("exact_match", ["a", "b"], 75),
    ],
)
def test_labels_are_scored_as_by_hand(metric, labels, expected):
    rows = [Example("", [label]) for label in "aaab"]

    score = fpt.score(Task(labels=labels, metric=metric), list("abab"), rows)

    assert score == approx(expected, abs=0.1)


@parametrize(
    "metric, prediction, answers, expected",
    [
        ("accuracy", "b", ["a", "b"], 100),
        ("exact_match", "The cat!", ["cat"], 100),
        ("exact_match", "black cat", ["a cat", "dog"], 0),
        ("f1", "black cat", ["a cat", "dog"], 66.7),  # precision 1/2, recall 1
        ("rouge_l", "w x y z", ["w y z v"], 75),
        ("rouge_l", "w x", ["w x y z"], 66.7),  # precision 1, recall 1/2
        ("rouge_l", "w x", ["y z", "w x"], 100),
        ("rouge_l", "Кошка, на крыше", ["кошка на крыше"], 100),
        ("rouge_l", "राम की किताब", ["राम का कतब"], 33.3),
    ],
)
def test_a_text_is_scored_as_by_hand(metric, prediction, answers, expected):
    score = fpt.score(Task(metric=metric), [prediction], [Example("", answers)])

    assert score == approx(expected, abs=0.1)


def test_a_predicted_label_is_the_likeliest_by_separate_forwards():
    model = tiny()
    labels = ["a", "b", "cd"]  # of different lengths: a sum counts, not a mean
    task = some_task(labels=labels, prefix="")
    expected = []
    for row in task.train:
        losses = []
        for label in labels:
            ids = torch.tensor([TOKENIZER(label).input_ids])
            output = model(inputs_embeds=alone(model, START, row.tokens), labels=ids)
            losses.append(output.loss * ids.numel())
        expected.append(labels[losses.index(min(losses))])

    _, texts = evaluate(model, SoftPrompt(START), task, task.train)

    assert texts == expected
    assert len(set(texts)) > 1


def test_text_is_greedy_whatever_the_models_generation_config_says(here):
    model, _ = load_model(here / "model", "cpu", "fp32")
    task = some_task(labels=[], max_target=12)
    expected = []
    for row in task.train:
        source = alone(model, START, row.tokens)
        ids = [0]
        while len(ids) < 13 and ids[-1] != 1:
            target = torch.tensor([ids])
            logits = model(inputs_embeds=source, decoder_input_ids=target).logits
            ids.append(int(logits[0, -1].argmax()))
        expected += fpt.decode(task, [ids])

    _, texts = evaluate(model, SoftPrompt(START), task, task.train)

    assert texts == expected
    assert len(set(texts)) > 1


def test_a_decoded_text_loses_its_padding_end_and_prefix_alone():
    task = some_task(labels=[], prefix="so: ")

    ids = TOKENIZER("so: no<extra_id_1>").input_ids

    assert fpt.decode(task, [[0, *ids, 0]]) == ["no<extra_id_1>"]


# ====== 8 Record and compare ==========================================================


@fixture(scope="module")
def ended(here, tmp_path_factory):
    """The folder of a command that ran `pt` and `cr`."""
    out = tmp_path_factory.mktemp("ended") / "new" / "out"
    out.mkdir(parents=True)  # an empty folder is no obstacle
    main(flags(here, out, "--schedule", "pt", "cr"))
    return out


def test_the_files_of_a_run_agree_with_each_other(ended, here):
    folder = ended / "cr-seed0"
    task = load_task(f"{here}/task", dev=500)
    fpt.encode(task, TOKENIZER, 492)
    prompt = SoftPrompt(load_prompt(folder / "prompt"))

    validation, texts = evaluate(tiny(), prompt, task, task.validation)

    [run] = json_lines(folder / "results.json")
    assert run["validation"] == validation
    assert run["log"] == json_lines(folder / "log.jsonl")
    predictions = json_lines(folder / "predictions.jsonl")
    assert [text for _, _, text in predictions] == texts


def test_dev_chooses_and_validation_is_only_reported(here, tmp_path):
    task = write_task(tmp_path / "task")
    (task / "validation.jsonl").write_text('{"source": "a", "target": "no"}')

    [result] = main(flags(here, tmp_path / "out", "--task", task))

    assert result["validation"] in (0, 100)
    assert 0 < result["best_dev"] < 100  # where both labels are


def test_flops_include_the_scoring_of_64_examples(here, tmp_path):
    more = ["--schedule", "1x.5:1", "1x1:1", "--steps", 1, "--batch", 64]

    narrow, whole = main(flags(here, tmp_path / "out", *more))

    assert narrow["pt_flops"] == whole["flops"]
    assert narrow["flops"] > whole["flops"]  # a forward pass costs more than was saved


def test_a_schedule_that_never_grows_is_judged_on_its_partial_model(
    here, tmp_path, monkeypatch
):
    layers = []

    def spy(model, *how):
        layers.append(len(model.encoder.block))
        return evaluate(model, *how)

    monkeypatch.setattr(fpt, "evaluate", spy)
    main(flags(here, tmp_path / "out", "--schedule", "0.5x0.5:1"))

    assert layers == [3, 3, 3, 3]  # three times on dev, once on validation


def test_schedules_of_a_seed_share_the_start_and_the_batches(here, tmp_path):
    """A batch of all train examples: seeds differ in their start alone."""
    more = "--schedule pt 1x1:.5,.5x1:.5 --seed 0 1 --steps 4 --eval-every 1 --batch 64"

    results = main(flags(here, tmp_path / "out", *more.split()))

    first, same, second, same_again = [run["log"][1]["loss"] for run in results]
    assert first == same
    assert second == same_again != approx(first, rel=1e-3)


def fake_run(schedule, best, flops, seconds):
    """The results of a run with five evaluations."""
    log = []
    for step in range(5):
        log.append({"step": step, "best": best[step], "flops": flops[step]})
    return {
        "schedule": schedule,
        "seed": 0,
        "best_dev": best[-1],
        "validation": best[-1] - 1,
        "flops": flops[-1],
        "seconds": seconds,
        "log": log,
    }


PT = fake_run("pt", [50, 60, 90, 90, 100], [20, 40, 60, 80, 100], seconds=8)
CR = fake_run("cr", [50, 55, 70, 98, 99], [11, 21, 31, 51, 71], seconds=6)


def test_a_comparison_by_hand():
    row = fpt.compare([PT, CR]).loc["cr"]

    assert row.to_dict() == {
        "dev": 99,
        "validation": 98,
        "flops": 71,
        "seconds": 75,
        "pt, same flops": 90,  # at 80, the first evaluation from 71 on
        "gain": 9,
        "to 99 %": 71,  # for a score of 99, 71 FLOPs, and pt 100
    }


def test_what_there_is_not_is_nan_in_a_comparison():
    dear = {**PT, "schedule": "fr", "flops": 101, "log": PT["log"][:4]}

    row = fpt.compare([PT, dear]).loc["fr"]

    assert row[["pt, same flops", "gain", "to 99 %"]].isna().all()


def test_a_table_has_means_deviations_and_from_three_seeds_an_interval():
    runs = [PT, CR, {**PT, "seed": 1}, {**CR, "seed": 1}]
    third = [{**PT, "seed": 2}, {**CR, "seed": 2, "best_dev": 102}]

    assert "95 % of gain" not in fpt.table(runs)
    # Gains of 9, 9 and 12: t(0.975, 2) is 4.303, the standard error of their mean 1.
    text = fpt.table(runs + third)
    assert "10.0 ± 1.7" in text
    assert "± 4.3" in text


def test_a_table_hides_no_seed_without_a_gain():
    runs = []
    for seed in range(4):
        runs += [{**PT, "seed": seed}, {**CR, "seed": seed, "flops": 98 + seed}]

    pt, cr = fpt.table(runs).splitlines()[1:]

    assert pt.endswith("± 0.0")
    assert not cr.endswith("± 0.0")


def test_a_figure_has_a_line_for_each_schedule_seeds_averaged():
    _, cr = fpt.figure([PT, CR, {**PT, "schedule": "cr"}]).axes[0].lines

    assert cr.get_xdata().tolist() == [15.5, 30.5, 45.5, 65.5, 85.5]
    assert cr.get_ydata().tolist() == [50, 57.5, 80, 94, 99.5]


# ====== 9 Command line ================================================================


@parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_loaded_model_is_cast_frozen_and_without_dropout(here, precision, dtype):
    model, _ = load_model(here / "model", "cpu", precision)

    for name, tensor in tiny().state_dict().items():  # the untied head among them
        assert model.state_dict()[name].equal(tensor.to(dtype))
    assert not any(tensor.requires_grad for tensor in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.config.dropout_rate == 0


@parametrize(
    "config, lost, says",
    [
        ({}, "decoder.final_layer_norm.weight", "has no decoder.final_layer_norm"),
        ({"d_ff": 33}, "", "mismatch"),
        ({"model_type": "bart"}, "", "bart"),
    ],
)
def test_a_model_that_is_not_whole_or_no_t5_is_refused(config, lost, says, tmp_path):
    weights = tiny().state_dict()
    weights.pop(lost, None)
    save(tiny(), tmp_path, state_dict=weights)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))

    with raises((ValueError, RuntimeError), match=says):
        load_model(tmp_path, "cpu", "fp32")


def test_a_folder_with_an_adapter_is_no_model(tmp_path):
    save(tiny(), tmp_path)
    peft.get_peft_model(tiny(), peft.LoraConfig()).save_pretrained(tmp_path)

    with raises(ValueError, match="holds an adapter"):
        load_model(tmp_path, "cpu", "fp32")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)

    with raises(ValueError, match="tokenizer"):
        load_model(tmp_path, "cpu", "fp32")


def test_bf16_free_text_parts_and_a_saved_start_go_together(here, ended, tmp_path):
    start = ended / "cr-seed0/prompt"
    task = write_task(tmp_path / "text", labels=[])
    more = f"--steps 1 --precision bf16 --accumulate 2 --task {task} --init {start}"

    main(flags(here, tmp_path / "out", *more.split()))

    moved = load_prompt(tmp_path / "out/cr-seed0/prompt") - load_prompt(start)
    assert moved.square().mean() ** 0.5 == approx(0.3, rel=0.01)  # as the rate says


@parametrize(
    "more, says",
    [
        ("--steps many", "--steps.*many"),
        ("--schedule nope", "'nope'.*pt, ld, fr, cr"),
        ("--task rte", "nyu-mll"),
        ("--task nope", "unknown task 'nope'.*rte"),
        ("--model no/such", "offline.*no/such.*HF_HUB_OFFLINE.*FPT_TRACEBACK"),
        ("--precision fp16", "fp32 or bf16.*overflow"),
        ("--device cuda:99", "CUDA|NVIDIA"),
        ("--batch 65", "--batch"),
        ("--steps 0", "--steps has to be 1"),
        ("--max-source 0", "--max-source has to be 1"),
        ("--limit -3", "--limit has to be 0"),
        ("--lr nan", "--lr has to be a number above 0"),
        ("--accumulate 5", "--batch.*--accumulate"),
        ("--init wide", "wide is not 3 vectors"),
        ("--out wide", "wide"),
        ("--resume wide", "--resume takes wide/settings.json"),
    ],
)
def test_a_bad_flag_ends_in_one_line_and_writes_nothing(
    more, says, here, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    save_prompt("wide", torch.zeros(P, 17), "any")

    with raises(SystemExit, match="2"):
        main(flags(here, "out", *more.split()))

    assert re.fullmatch(f"fpt.py: error: .*({says}).*\n", capfd.readouterr().err)
    assert not Path("out").exists()


def test_a_damaged_state_is_named(ended, tmp_path, capfd):
    out = shutil.copytree(ended, tmp_path / "out")
    (out / "pt-seed0/state.pt").write_text("version https://git-lfs")

    with raises(SystemExit, match="2"):
        main(["--resume", str(out)])

    assert "pt-seed0/state.pt is damaged; delete it" in capfd.readouterr().err


def test_ctrl_c_while_the_model_loads_is_one_line(here, tmp_path, monkeypatch, capfd):
    def load_model(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fpt, "load_model", load_model)
    with raises(SystemExit, match="130"):
        main(flags(here, tmp_path / "out"))

    assert capfd.readouterr().err == "fpt.py: stopped\n"


def test_a_prompt_of_another_model_is_warned_of(here, tmp_path, capfd):
    save_prompt(tmp_path / "start", START, "t5-base")

    main(flags(here, tmp_path / "out", "--init", tmp_path / "start", "--steps", 1))

    assert "t5-base" in capfd.readouterr().out


def test_the_table_is_printed_whatever_the_figure_does(
    here, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(fpt, "figure", None)
    long = ",".join(["1x1:.01"] * 100)  # longer than the name of a file may be

    main(flags(here, tmp_path / "out", "--schedule", long, "pt", "--steps", 1))

    assert re.search("same flops(.*\n)+no figure: ", capfd.readouterr().out)


WRITES = [(os, "replace", number) for number in range(10, 18)]


@parametrize("module, name, number", [(fpt, "gradient", 17), *WRITES])
def test_a_command_stopped_anywhere_resumes_to_the_same_bytes(
    module, name, number, ended, here, tmp_path, monkeypatch, capfd
):
    """In an update of `cr`, or at any of its writes: 3 states, 3 logs, the results."""
    calls = itertools.count(1)
    whole = getattr(module, name)

    def stopped(*how):
        if next(calls) == number:
            raise KeyboardInterrupt
        return whole(*how)

    monkeypatch.setattr(module, name, stopped)
    out = tmp_path / "out"
    with raises(SystemExit, match="130"):
        main(flags(here, out, "--schedule", "pt", "cr"))
    assert f"--resume {out}" in capfd.readouterr().err
    main(["--resume", str(out)])

    assert contents(out) == contents(ended)


def test_two_processes_make_the_run_of_one(here, tmp_path):
    """Neither batches of 5 nor 11 validation examples can be halved."""
    more = ["--steps", 3, "--eval-every", 1, "--batch", 5, "--accumulate", 2]
    [one] = main(flags(here, tmp_path / "one", *more))

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "fpt.py", *flags(here, tmp_path / "two", *more)]
    how = {"cwd": tmp_path, "text": True, "capture_output": True}
    odd = {"MPLBACKEND": "of a notebook", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env={**os.environ, **odd}, **how)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train examples") == 1  # one of them speaks
    [two] = json_lines(tmp_path / "two/cr-seed0/results.json")
    for mine, theirs in zip(one["log"], two["log"], strict=True):
        assert mine == {**theirs, "loss": approx(theirs["loss"], rel=1e-5)}


def test_the_default_command_runs_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    main(["--steps", "2", "--dev", "40", "--limit", "40"])

    printed = capsys.readouterr().out
    assert "pt, same flops" in printed
    assert len(re.findall(r"gold: \w+ \| pt 0: \w+ \| cr 0: \w+", printed)) == 3
    assert list(tmp_path.glob("runs/*/comparison.png"))


@parametrize("start", ["none", "zeros", "uniform", "vocab"])
def test_the_shipped_model_needs_a_trained_prompt_for_the_shipped_task(start):
    model, tokenizer = load_model(fpt.MICRO / "model", "cpu", "fp32")
    task = load_task(fpt.MICRO / "reviews", dev=1, limit=300)
    task.train = task.train[:1]
    fpt.encode(task, tokenizer, 492)
    prompt = torch.zeros(0 if start == "none" else 20, model.config.d_model)
    if start in ("uniform", "vocab"):
        prompt = fpt.init_prompt(start, 20, model.shared.weight, fpt.rng(0))

    score, _ = evaluate(model, SoftPrompt(prompt), task, task.validation)

    assert score < 60


def test_every_flag_is_explained_in_the_help(capsys):
    with raises(SystemExit, match="0"):
        main(["--help"])

    printed = capsys.readouterr().out
    for name in fpt.SETTINGS:
        assert re.search(rf"^--{name.replace('_', '-')} +\w", printed, re.M)


# ====== The documents say what the code does ==========================================

DOCUMENTS = ["README.md", "tutorial.md"]


def document(name):
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name):
    """A document without its line breaks."""
    return " ".join(document(name).split())


def blocks(name):
    """Kind and text of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", document(name), re.M | re.S)


@parametrize("name", DOCUMENTS)
def test_snippets_are_verbatim(name):
    for kind, text in blocks(name):
        if kind == "python":
            assert f"\n{text}" in document("fpt.py")


def test_the_first_code_of_the_tutorial_is_an_excerpt_of_train():
    """All of its lines, in this order."""
    [excerpt] = [text for kind, text in blocks("tutorial.md") if "excerpt" in kind]
    lines = iter(inspect.getsource(fpt.train).splitlines())

    for line in excerpt.splitlines():
        assert line in lines, line


@parametrize("name", ["fpt.py", *DOCUMENTS])
def test_commands_parse(name):
    text = fpt.__doc__ if name == "fpt.py" else document(name)

    commands = re.findall(r"(?:python|torchrun[^`\n]*?) fpt\.py\b([^`\n]*)", text)

    assert commands
    for command in commands:
        if "--resume" not in command:
            args = fpt.parse_args(shlex.split(command, comments=True))
            assert list(map(parse_schedule, args.schedule))


@parametrize("name", DOCUMENTS)
def test_links_exist(name):
    links = re.findall(r"\]\((?!https?:)(.+?)\)", document(name))

    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_recipe_for_a_trainer_runs_as_it_is_printed(tmp_path, monkeypatch):
    [recipe] = [text for kind, text in blocks("tutorial.md") if kind == "python recipe"]
    for printed, used in [
        ("google/flan-t5-base", fpt.MICRO / "model"),
        ("30_000", 5),
        ("eval_steps=0.1", "eval_steps=0.5"),
        ("save_steps=0.1", "save_steps=0.5"),
        ("train_test_split(500", "train_test_split(50"),
    ]:
        assert printed in recipe
        recipe = recipe.replace(printed, str(used))
    lines = (fpt.MICRO / "reviews/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER/train.jsonl").write_text("".join(lines[:300]))
    seen = []

    def partial(model, depth, width, *how):
        seen.append((depth, width))
        return partial_t5(model, depth, width, *how)

    monkeypatch.setattr(fpt, "partial_t5", partial)
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})

    assert seen == [(0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1, 1)]
    assert len(load_prompt("prompt")) == 20


def test_the_loop_of_the_tutorial_needs_sections_1_to_5_and_its_imports_alone(
    here, tmp_path, monkeypatch
):
    [imports] = [text for kind, text in blocks("tutorial.md") if "imports" in kind]
    [loop] = [text for kind, text in blocks("tutorial.md") if "loop" in kind]
    source = document("fpt.py")
    method = source[source.index("# ====== 1 ") : source.index("# ====== 6 ")]
    task = load_task(here / "task", 4)
    fpt.encode(task, TOKENIZER, 492)
    batch = task.collate([row.tokens for row in task.train[:4]])
    names = {"model": tiny(), "loader": [batch], "dev_score": lambda *_: 0.0}
    assert "steps=30_000" in loop and "eval_every=500" in loop
    loop = loop.replace("30_000", "5").replace("500", "5")

    monkeypatch.chdir(tmp_path)
    exec(imports + method + loop, {"__name__": "__main__", **names})

    assert len(load_prompt("prompt")) == 20


@fixture(scope="module")
def tables():
    """What evidence/tables.py defines."""
    return runpy.run_path(str(ROOT / "evidence/tables.py"))


def test_the_tables_of_the_evidence_follow_from_its_records(tables):
    assert tables["readme"]() == document("evidence/README.md")


def test_what_the_tutorial_says_of_single_runs_follows_from_the_record(tables):
    text = prose("tutorial.md")
    runs = tables["frame_of"]("study").loc["cr", "reviews", tables["STEPS"]]
    runs = runs[runs.index >= 8]  # the seeds that chose nothing

    lost = runs.gain[runs.gain < 0]

    assert f"{len(lost)} of the {len(runs)} gains" in text
    assert f"the worst is {lost.min():.1f}" in text
    assert f"the worst `cr` run scores {runs.validation.min()} %" in text


def test_what_the_tutorial_says_of_an_eighth_follows_from_the_record(tables):
    cells = tables["cells_of"]("study", "reviews", range(8, 32))
    curves = {}
    for name in ["pt", "cr"]:
        chosen = [cell for cell in cells if cell["schedule"] == name]
        curves[name] = list(zip(*tables["curve"](chosen), strict=True))
    eighth = curves["pt"][-1][0] / 8

    def best(name):
        return max(score for flops, score in curves[name] if flops <= eighth)

    assert best("pt") < 50
    assert f"`cr` stands at {best('cr'):.0f} %" in prose("tutorial.md")


def test_the_case_where_a_part_learns_alone_follows_from_the_record(tables):
    frame = tables["study_frame"]("study").xs("reviews", level="task")
    part = frame.loc["0.25x0.25"]
    scores = [part.validation, part.whole]
    for name in ["cr", "pt"]:
        scores.append(frame.loc[name].validation[part.index])

    said = [f"{score.mean():.0f} %" for score in scores]

    [case] = [text for kind, text in blocks("tutorial.md") if "a quarter" in text]
    assert re.findall(r"\d+ %", case) == said


def test_cosines_follow_from_the_record():
    cosines = json.loads(document("evidence/study.json"))["cosines"]
    part, seed = cosines["`0.25x0.25:1`"], cosines["`pt`, another seed"]

    assert f"the cosine similarity is {part:.2f}" in prose("tutorial.md")
    assert f"with different seeds have {seed:.2f}" in prose("tutorial.md")


def test_hours_and_memory_follow_from_the_record():
    text = prose("tutorial.md")
    rows = json.loads(document("evidence/speed-gpu.json"))["rows"]
    ratios = []
    for shape in ["t5-base", "t5-large", "v1.1-xl"]:
        found = {
            (row["part"], row["way"]): row for row in rows if row["shape"] == shape
        }
        hours = 30_000 * 32 / found["speed", "fpt.py, pt"]["examples per second"] / 3600
        whole = found["memory", "pt"]["peak in MB"] / 1000
        parts = found["memory", "pt, 4 parts"]["peak in MB"] / 1000
        ratios.append(found["stages", "cr"]["seconds over pt"])

        assert f"| {hours:.1f} | {whole:.1f} GB | {parts:.1f} GB |" in text
    assert f"`cr` took {min(ratios):.2f} to {max(ratios):.2f} times as long" in text
    rows = json.loads(document("evidence/speed-cpu.json"))["rows"]
    [speed] = [
        row["examples per second"]
        for row in rows
        if row["shape"] == "t5-base" and row["way"] == "fpt.py, pt"
    ]
    days = 30_000 * 32 / speed / 86_400
    assert f"`pt` on t5-base takes {days:.1f} days" in text


@parametrize("name", DOCUMENTS)
def test_what_is_quoted_is_in_the_evidence(name):
    evidence = prose("evidence/README.md") + prose("evidence/made-up.md")
    text = re.sub("```text.*?```", "", prose(name))  # what is printed

    quoted = re.findall(r"[-+]?\d+\.\d \[[-\d., ]+\]|\d+\.\d ± \d+\.\d", text)

    assert quoted
    for number in quoted:
        assert number in evidence


def on_t5_base(stage):
    """t5-base, or a partial one, on the meta device."""
    model = on_meta(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    scores = {"encoder": [torch.arange(3072)] * 12}
    return partial_t5(model, stage.depth, stage.width, scores, decoder=False)


def test_the_example_of_the_tutorial_follows_from_the_code():
    text = prose("tutorial.md")
    models = [on_t5_base(stage) for stage in fpt.SCHEDULES["cr"]]
    flops = [step_flops(model, 32, 102, 6) for model in models]
    a, b, c, _ = [cost / flops[3] for cost in flops]

    for i, letter in enumerate("abc"):
        share = flops[i] / flops[3]
        row = f"| {i + 1} | {flops[i] / 1e12:.3f} | {letter} = {share:.2f} |"
        assert row in text
    cost = 0.2 * (a + b + c) + 0.4
    assert f"0.2 (a + b + c) + 0.4 = {cost:.2f} times" in text
    spent = f"{20 * a / cost:.0f} % after the first stage, {20 * (a + b) / cost:.0f} %"
    assert spent in text
    forward = step_flops(models[3], 32, 102, 6, backward=False)
    assert f"{flops[3] / forward:.2f} forward passes" in text
    layer = models[3].encoder.block[1]
    assert f"An encoder layer has {millions(layer)} million weights" in text
    assert f"The other {millions(ffn(layer))} million belong to the FFN" in text
    assert f"shrinks to {millions(ffn(models[0].encoder.block[1]))} million" in text
    keys_and_values = 12 * 2 * 32 * 102 * 2 * 768**2
    part = 100 * keys_and_values / forward
    assert f"This alone is {part:.0f} % of" in text
    half = step_flops(on_t5_base(fpt.Stage(0.5, 1, 1)), 32, 102, 6)
    decoder = 100 * (1 - 2 * (flops[3] - half) / flops[3])
    assert f"decoder and the output head cost {decoder - part:.0f} %" in text
    assert f"the encoder costs {100 * a - decoder:.0f} %" in text


def millions(module):
    return round(sum(weight.numel() for weight in module.parameters()) / 1e6, 1)


def test_requirements_are_bounded_and_met_here():
    for line in re.findall(r"^[^#\n]+", document("requirements.txt"), re.M):
        requirement = Requirement(line.strip())
        assert {bound.operator for bound in requirement.specifier} == {">=", "<"}
        assert importlib.metadata.version(requirement.name) in requirement.specifier
