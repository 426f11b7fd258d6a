"""python -m pytest -q        every test of fpt.py and of its documents; offline, about two minutes

The tests assert values worked out by hand, or equality with something that fpt.py does not contain:
stock transformers models, PEFT, PyTorch's FLOP counter, a brute-force loop. Sections follow fpt.py.
"""

import ast
import builtins
import copy
import dataclasses
import errno
import http.server
import importlib.util
import itertools
import json
import math
import operator
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so these two come first
_EMPTY_CACHE = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = _EMPTY_CACHE.name  # nothing that this machine has cached can help a test
os.environ["OMP_NUM_THREADS"] = "1"  # on matrices this small a second thread only slows the first

import hypothesis  # noqa: E402
import hypothesis.strategies as st  # noqa: E402
import peft  # noqa: E402
import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.distributed.run import get_args_parser  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Stack  # noqa: E402

import fpt  # noqa: E402

ROOT = Path(__file__).parent
KINDS = ("v1.0", "v1.1", "mt5")  # ReLU and tied head; gated GELU and untied head; the same as mT5
SIDES = ("encoder", "decoder")
LAYERS, D, INNER, D_FF, VOCAB, P = 6, 16, 12, 32, 64, 3  # INNER: heads * d_kv, not d_model
WORDS = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "yes", "no"] + [f"w{i:02}" for i in range(50)]
YES_NO = fpt.Task("", ("yes", "no"))
TEXT = fpt.Task("", metric="em_f1", decoder=True, max_target=6)

# ====== Tiny models, a tokenizer and a task, made here ============================================


def tiny(kind="v1.1", seed=0, **changes):
    """A random T5 in eval mode. Half of it drops out if anything turns dropout on."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "d_model": D, "d_kv": 4, "num_heads": 3, "d_ff": D_FF,
             "num_layers": LAYERS, "num_decoder_layers": LAYERS, "dropout_rate": 0.5,
             "decoder_start_token_id": 0, **changes}
    if kind == "v1.0":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    else:
        name = {"v1.1": "T5", "mt5": "MT5"}[kind]
        model = getattr(transformers, name + "ForConditionalGeneration")(
            getattr(transformers, name + "Config")(**sizes, feed_forward_proj="gated-gelu",
                                                   tie_word_embeddings=False))
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, D))  # transformers 5 ties it
    return model.eval().requires_grad_(False)


def smaller(model, kind, encoder, decoder):
    """A stock model built small, with copies of these blocks of `model`."""
    small = tiny(kind, seed=1, num_layers=len(encoder), num_decoder_layers=len(decoder))
    state = {}
    for name, tensor in model.state_dict().items():
        side, _, layer, rest = (name.split(".", 3) + [""] * 3)[:4]
        keep = {"encoder": encoder, "decoder": decoder}.get(side, [])
        if ".block." not in name:
            state[name] = tensor
        elif int(layer) in keep:
            state[f"{side}.block.{keep.index(int(layer))}.{rest}"] = tensor
    small.load_state_dict(state)  # strict: nothing is missing, nothing left over
    small.config.num_layers = LAYERS  # transformers sizes the decoder's cache by it
    return small


def random_scores(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {side: [torch.rand(D_FF, generator=generator) for _ in range(LAYERS)] for side in SIDES}


def inputs(seed=2):
    """A padded batch: 3 sources of 7, 5 and 2 positions, 3 targets of 4, 2 and 3."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.tensor([7, 5, 2])
    target = torch.tensor([4, 2, 3])
    return {"inputs_embeds": torch.randn(3, 7, D, generator=generator),
            "attention_mask": (torch.arange(7) < source[:, None]).long(),
            "labels": torch.randint(3, VOCAB, (3, 4), generator=generator).masked_fill(
                torch.arange(4) >= target[:, None], -100)}


def logits(model):
    return model(**inputs()).logits


def generate(model, **how):
    """Token ids of 8 forced steps: an early end of sequence would hide a broken cache."""
    batch = inputs()
    del batch["labels"]
    return model.generate(**batch, do_sample=False, min_new_tokens=8, max_new_tokens=8, **how)


def ffn(block):
    return block.layer[-1].DenseReluDense


@pytest.fixture(scope="session")
def tokenizer():
    """A word is a token; <extra_id_0> is special, as in T5's own tokenizer."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(99))), "<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"])


def examples(count, seed=0):
    """Sources of 1 to 9 words; whether the first word's number is even is the answer."""
    draw = random.Random(seed)
    rows = [[draw.randrange(50) for _ in range(draw.randint(1, 9))] for _ in range(count)]
    return [fpt.Example(" ".join(f"w{i:02}" for i in row), target, (target,))
            for row in rows for target in ["no" if row[0] % 2 else "yes"]]


def config(**changes):
    return fpt.Config(**{"steps": 20, "batch": 4, "prompt_length": P, "eval_every": 5,
                         "score_examples": 8, "device": "cpu", "model": "tiny", **changes})


def encoded(tokenizer, model, prompt, text):
    """One source, alone and unpadded, behind its prompt: what a batch of one gives the model."""
    ids = torch.tensor([tokenizer(text).input_ids])
    return torch.cat([prompt[None], model.shared(ids)], dim=1)


def write_task(folder, train=40, validation=12, **spec):
    """A task folder."""
    folder.mkdir(parents=True)
    spec = {"labels": ["yes", "no"], "prefix": "<extra_id_0>", **spec}
    (folder / "task.json").write_text(json.dumps(spec))
    for name, rows in ("train", examples(train, 1)), ("validation", examples(validation, 2)):
        lines = [json.dumps({"source": row.source, "target": row.target}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def here(tmp_path_factory, tokenizer):
    """Folders of a tiny v1.1 model and of a task, on which `main` runs."""
    folder = tmp_path_factory.mktemp("here")
    tiny("v1.1").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_task(folder / "task")
    return folder


def flags(here, out, *more):
    """The flags of a small run; a later flag replaces an earlier one."""
    settings = f"--steps 10 --batch 4 --eval-every 4 --prompt-length {P} --score-examples 8"
    return ["--model", str(here / "model"), "--task", str(here / "task"), "--out", str(out),
            "--device", "cpu", *settings.split(), *map(str, more)]


def python(*arguments, cwd, **environment):
    """A fresh interpreter. `cwd` is not the repository: nothing may depend on where one stands."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment,
                          text=True, capture_output=True, timeout=150)


def script(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_line(stderr):
    """What follows "fpt.py: error: ", having checked that it is all there is."""
    assert stderr.startswith("fpt.py: "), stderr
    assert stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    return stderr.removeprefix("fpt.py: error: ").strip()


# ====== 1 Partial models ==========================================================================

EVEN = {  # what the official rule gives
    (24, 6): [0, 4, 8, 13, 18, 23],
    (24, 12): [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23],
    (24, 18): [*range(12), 13, 15, 17, 19, 21, 23],
    (12, 3): [0, 5, 11], (12, 6): [0, 2, 4, 6, 8, 11], (12, 9): [0, 1, 2, 3, 4, 5, 7, 9, 11],
    (8, 2): [0, 7], (8, 4): [0, 2, 4, 7], (8, 6): [0, 1, 2, 3, 5, 7],
    (5, 5): [0, 1, 2, 3, 4], (5, 1): [0], (1, 1): [0], (2, 2): [0, 1]}


@pytest.mark.parametrize(("total", "keep"), EVEN)
def test_kept_layers_by_the_official_table(total, keep):
    assert fpt.kept_layers(total, keep) == EVEN[total, keep]


def test_kept_layers_keep_the_ends_and_are_even_everywhere():
    for total in range(2, 30):
        for keep in range(2, total + 1):
            layers = fpt.kept_layers(total, keep)
            gaps = [b - a for a, b in zip(layers, layers[1:])]
            assert len(layers) == keep and layers[0] == 0 and layers[-1] == total - 1
            assert gaps == sorted(gaps) and gaps[-1] - gaps[0] <= 1 and gaps[0] >= 1


@pytest.mark.parametrize(("total", "keep"), [(6, 0), (6, 7), (6, -1), (0, 0), (0, 1)])
def test_kept_layers_refuse_what_cannot_be_kept(total, keep):
    with pytest.raises(ValueError):
        fpt.kept_layers(total, keep)


@pytest.mark.parametrize(("depth", "kept"), [
    (0.25, [0, 5]), (0.5, [0, 2, 5]), (0.75, [0, 1, 2, 3, 5]), (0.01, [0]), (0.24, [0]),
    (1, [0, 1, 2, 3, 4, 5])])
def test_depth_rounds_half_up_and_block_0_stays(depth, kept):  # of 6: 1.5, 3, 4.5, 0.06, 1.44, 6
    model = tiny()
    partial = fpt.partial_t5(model, depth, 1)
    for side in SIDES:
        full = getattr(model, side).block
        assert [id(block) for block in getattr(partial, side).block] == [id(full[i]) for i in kept]
        attention = getattr(partial, side).block[0].layer[0].SelfAttention
        assert attention.has_relative_attention_bias and attention.relative_attention_bias


@pytest.mark.parametrize(("width", "d_ff", "neurons"), [
    (0.29, 50, 15), (0.25, 50, 13), (0.5, 50, 25), (0.001, 50, 1), (0.25, 30, 8), (0.75, 30, 23)])
def test_width_rounds_half_up(width, d_ff, neurons):  # in floating point 0.29 * 50 is below 14.5
    model = tiny(d_ff=d_ff, num_layers=1, num_decoder_layers=1)
    partial = fpt.partial_t5(model, 1, width, {side: [torch.rand(d_ff)] for side in SIDES})
    for side in SIDES:
        narrow = ffn(getattr(partial, side).block[0])
        assert narrow.wi_0.weight.shape == narrow.wi_1.weight.shape == (neurons, D)
        assert narrow.wo.weight.shape == (D, neurons)
        assert narrow.wo.in_features == narrow.wi_0.out_features == neurons


@pytest.mark.parametrize("kind", KINDS)
def test_with_nothing_dropped_it_is_the_stock_model_bit_for_bit(kind):
    model = tiny(kind)
    partial = fpt.partial_t5(model, 1, 1)
    assert type(partial) is type(model)
    stock = smaller(model, kind, list(range(6)), list(range(6)))  # fpt.py never touched this one
    assert torch.equal(logits(partial), logits(stock))
    assert torch.equal(generate(partial), generate(stock))
    assert all(a is b for a, b in zip(partial.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("depth", "decoder", "kept"), [
    (0.5, True, [0, 2, 5]), (0.25, True, [0, 5]), (0.5, False, [*range(6)])])
def test_dropped_layers_equal_a_real_smaller_model(kind, depth, decoder, kept):
    model = tiny(kind)
    partial = fpt.partial_t5(model, depth, 1, decoder=decoder)
    stock = smaller(model, kind, [0, 2, 5] if depth == 0.5 else [0, 5], kept)
    assert torch.equal(logits(partial), logits(stock))
    assert not torch.allclose(logits(partial), logits(model), atol=0.1)
    for how in {}, {"num_beams": 3}, {"use_cache": False}:
        assert torch.equal(generate(partial, **how), generate(stock, **how))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliced_ffn_equals_the_full_one_with_the_other_neurons_silenced(kind):
    model, scores = tiny(kind), random_scores()
    partial = fpt.partial_t5(model, 1, 0.3, scores)
    silenced = copy.deepcopy(model)
    for side in SIDES:
        for block, score in zip(getattr(silenced, side).block, scores[side]):
            top = score.argsort(descending=True)[:10]  # 0.3 of 32 is 9.6
            loud = torch.zeros(D_FF).index_fill(0, top, 1)
            ffn(block).wo.register_forward_pre_hook(lambda _, args, loud=loud: (args[0] * loud,))
    torch.testing.assert_close(logits(partial), logits(silenced), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(partial), logits(model), atol=0.1)


def test_the_kept_neurons_are_in_order_and_wider_sets_contain_narrower_ones():
    model, scores = tiny("v1.0"), random_scores()
    rows = {}
    for width in 0.25, 0.5, 0.75:
        kept = ffn(fpt.partial_t5(model, 1, width, scores).encoder.block[3]).wi.weight
        full = ffn(model.encoder.block[3]).wi.weight
        rows[width] = [int((full == row).all(1).nonzero()) for row in kept]
        loudest = scores["encoder"][3].argsort(descending=True)[:int(width * D_FF)]
        assert rows[width] == sorted(loudest.tolist())
    assert set(rows[0.25]) < set(rows[0.5]) < set(rows[0.75])


def test_neurons_that_are_alike_are_nested_too():  # of a ReLU T5 whole groups have a score of 0
    model, kept = tiny("v1.0"), []
    full = ffn(model.encoder.block[0]).wi.weight
    for width in 0.25, 0.5, 0.75:
        narrow = fpt.partial_t5(model, 1, width, {side: [torch.zeros(D_FF)] * 6 for side in SIDES})
        rows = ffn(narrow.encoder.block[0]).wi.weight
        kept.append({int((full == row).all(1).nonzero()) for row in rows})
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tensors_are_shared_and_only_narrowed_ffns_are_new(kind):
    model = tiny(kind)
    own = {p.data_ptr() for p in model.parameters()}
    for depth, width, decoder in (0.5, 1, True), (0.5, 0.25, True), (0.5, 0.25, False):
        partial = fpt.partial_t5(model, depth, width, random_scores(), decoder)
        new = {name: p for name, p in partial.named_parameters() if p.data_ptr() not in own}
        assert all(re.search(r"\.DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight$", n) for n in new)
        layers = 0 if width == 1 else 3 + 3 * decoder
        matrices = 2 if kind == "v1.0" else 3
        assert sum(p.numel() for p in new.values()) == layers * matrices * 8 * D
        assert not any(p.requires_grad for p in new.values())
        assert (partial.decoder is model.decoder) is (not decoder)


@pytest.mark.parametrize("kind", ["v1.1", "mt5"])
def test_an_untied_head_stays_untied(kind):  # a smaller model built from a config would lose it
    model = tiny(kind)
    head, shared = model.lm_head.weight.clone(), model.shared.weight.clone()
    partial = fpt.partial_t5(model, 0.5, 0.5, random_scores())
    generate(partial)
    assert partial.lm_head.weight is model.lm_head.weight is not model.shared.weight
    assert partial.encoder.embed_tokens.weight is partial.get_input_embeddings().weight
    assert torch.equal(partial.lm_head.weight, head) and torch.equal(partial.shared.weight, shared)


@pytest.mark.parametrize("kind", KINDS)
def test_shrink_and_come_back_is_the_identity(kind):
    model = tiny(kind)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    state = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    before, text, settings = logits(model), generate(model), model.config.to_dict()
    for depth, width, decoder in (0.25, 0.25, True), (0.5, 1, True), (1, 0.5, False):
        partial = fpt.partial_t5(model, depth, width, random_scores(), decoder)
        batch = inputs()
        batch["inputs_embeds"].requires_grad_()
        partial(**batch).loss.backward()
        generate(partial)
        assert torch.equal(logits(model), before)  # both can be used in turn
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    after = model.state_dict()
    assert list(after) == list(state) and model.config.to_dict() == settings
    for name, (address, tensor) in state.items():
        assert after[name].data_ptr() == address and torch.equal(after[name], tensor)
    assert torch.equal(generate(model), text)
    assert torch.equal(logits(fpt.partial_t5(model, 1, 1)), before)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradient_and_generation_of_a_compound_partial_model(kind):
    model, scores = tiny(kind), random_scores()
    partial = fpt.partial_t5(model, 0.5, 0.5, scores)
    stock = smaller(model, kind, [0, 2, 5], [0, 2, 5])  # the same, narrowed in place by hand
    for side in SIDES:
        for block, layer in zip(getattr(stock, side).block, [0, 2, 5]):
            keep = sorted(scores[side][layer].argsort(descending=True)[:16].tolist())
            for name, linear in ffn(block).named_children():
                if isinstance(linear, torch.nn.Linear):
                    weight = linear.weight[:, keep] if name == "wo" else linear.weight[keep]
                    linear.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    gradients = []
    for net in partial, stock:
        batch = inputs()
        batch["inputs_embeds"].requires_grad_()
        out = net(**batch)
        torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1), batch["labels"].flatten()))
        out.loss.backward()
        gradients.append(batch["inputs_embeds"].grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    assert torch.equal(generate(partial), generate(partial, use_cache=False))
    for how in {}, {"num_beams": 4}:
        assert torch.equal(generate(partial, **how), generate(stock, **how))
    assert not torch.equal(generate(partial), generate(model))


def test_hidden_states_are_those_of_the_model_that_ran():
    model = tiny()
    partial = fpt.partial_t5(model, 0.5, 0.5, random_scores())
    for net, layers in (model, 6), (partial, 3), (model, 6), (partial, 3):
        out = net(**inputs(), output_hidden_states=True)
        assert len(out.encoder_hidden_states) == len(out.decoder_hidden_states) == layers + 1


def no_t5(kind):
    sizes = {"vocab_size": 8, "d_model": 4, "decoder_start_token_id": 0}
    if kind == "umt5":
        return transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(
            **sizes, d_ff=4, d_kv=2, num_heads=2, num_layers=2))
    if kind == "bart":
        return transformers.BartForConditionalGeneration(transformers.BartConfig(
            **sizes, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=4, decoder_ffn_dim=4,
            encoder_attention_heads=2, decoder_attention_heads=2))
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=2))


@pytest.mark.parametrize("kind", ["umt5", "bart", "gpt2"])
def test_models_that_are_no_t5_are_refused(kind):
    with pytest.raises(ValueError, match=f"(?s){kind}.*T5"):
        fpt.partial_t5(no_t5(kind), 0.5, 1)


@pytest.mark.parametrize(("depth", "width"), [(0, 1), (1, 0), (1.01, 1), (1, -0.5), (math.nan, 1)])
def test_partial_t5_refuses_shares_outside_0_to_1(depth, width):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        fpt.partial_t5(tiny(), depth, width, random_scores())


def test_partial_t5_without_scores_cannot_narrow():
    with pytest.raises(ValueError, match="needs scores"):
        fpt.partial_t5(tiny(), 1, 0.5)


def test_partial_t5_refuses_scores_of_another_model():
    """Of a partial model they would name other neurons, and nothing else would show it."""
    model = tiny()
    for other in fpt.partial_t5(model, 0.5, 1), fpt.partial_t5(model, 1, 0.5, random_scores()):
        scores = fpt.neuron_scores(other, torch.zeros(P, D), score_batches())
        with pytest.raises(ValueError, match="of another model"):
            fpt.partial_t5(model, 1, 0.5, scores)


def test_a_checkpointed_layer_is_not_cut():
    """The cut would be passed over in silence: what runs is the layer that was wrapped."""
    model = fpt.checkpointed(tiny())
    for cut in (lambda: fpt.partial_t5(model, 1, 0.5, random_scores()),
                lambda: fpt.absorbed(model), lambda: fpt.checkpointed(model)):
        with pytest.raises(ValueError, match="cut it before"):
            cut()


def score_batches():
    """Two padded batches, of 3 and of 2 examples: a mean of batch means would be wrong."""
    generator = torch.Generator().manual_seed(3)
    for sources, targets in ([6, 4, 1], [3, 1, 2]), ([2, 5], [4, 2]):
        source, target = torch.tensor(sources)[:, None], torch.tensor(targets)[:, None]
        mask, beyond = torch.arange(max(sources)) < source, torch.arange(max(targets)) >= target
        ids, labels = (torch.randint(3, VOCAB, like.shape, generator=generator)
                       for like in (mask, beyond))
        yield {"input_ids": ids * mask, "attention_mask": mask.long(),
               "labels": labels.masked_fill(beyond, -100)}


@pytest.mark.parametrize("kind", KINDS)
def test_neuron_scores_by_brute_force(kind):
    """Each example alone, without padding, its FFN recomputed from the FFN's input."""
    model, prompt = tiny(kind), torch.randn(P, D, generator=torch.Generator().manual_seed(4))
    scores = fpt.neuron_scores(model, prompt, list(score_batches()))
    inputs_of = {}
    for side in SIDES:
        for i, block in enumerate(getattr(model, side).block):
            ffn(block).register_forward_pre_hook(
                lambda _, args, key=(side, i): inputs_of.update({key: args[0][0]}))
    expected, count = {}, 0
    for batch in score_batches():
        for ids, mask, labels in zip(*batch.values()):
            embeds = torch.cat([prompt, model.shared(ids[mask == 1])])[None]
            model(inputs_embeds=embeds, labels=labels[labels != -100][None])
            count += 1
            for (side, i), x in inputs_of.items():
                net = ffn(getattr(model, side).block[i])
                activation = (torch.relu(net.wi(x)) if kind == "v1.0" else torch.nn.functional.gelu(
                    net.wi_0(x), approximate="tanh") * net.wi_1(x))  # [positions, d_ff]
                expected[side, i] = expected.get((side, i), 0) + activation.abs().mean(0)
    assert count == 5
    assert {side: len(layers) for side, layers in scores.items()} == dict.fromkeys(SIDES, LAYERS)
    for (side, i), total in expected.items():
        assert scores[side][i].shape == (D_FF,) and scores[side][i].dtype == torch.float32
        torch.testing.assert_close(scores[side][i], total / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_loud_neuron_is_found_and_is_the_last_to_go(kind):
    model, prompt, planted = tiny(kind), torch.randn(P, D), {}
    for side in SIDES:
        for i, block in enumerate(getattr(model, side).block):
            before = fpt.neuron_scores(model, prompt, score_batches())[side][i]
            planted[side, i] = before.argsort()[D_FF * 3 // 4].item()  # one that fires
            weight = (ffn(block).wi if kind == "v1.0" else ffn(block).wi_1).weight
            weight[planted[side, i]] *= 1000
    scores = fpt.neuron_scores(model, prompt, score_batches())
    partial = fpt.partial_t5(model, 1, 1 / D_FF, scores)
    for (side, i), neuron in planted.items():
        assert scores[side][i].argmax() == neuron
        kept = ffn(getattr(partial, side).block[i]).wo.weight
        assert torch.equal(kept[:, 0], ffn(getattr(model, side).block[i]).wo.weight[:, neuron])


def test_neuron_scores_without_batches():
    with pytest.raises(ValueError, match="no batches"):
        fpt.neuron_scores(tiny(), torch.zeros(P, D), [])


def test_neuron_scores_leave_no_hook_and_no_graph_behind():
    model = tiny()
    scores = fpt.neuron_scores(model, torch.zeros(P, D, requires_grad=True), score_batches())
    assert not any(t.requires_grad for side in SIDES for t in scores[side])
    with pytest.raises(RuntimeError):  # a prompt of another width fails inside the forward pass
        fpt.neuron_scores(model, torch.zeros(P, D + 1), score_batches())
    assert not any(module._forward_pre_hooks or module._forward_hooks
                   for side in SIDES for module in getattr(model, side).block.modules())


# ====== 2 Schedule ================================================================================


def test_the_presets_are_the_papers():
    sizes, shares = (0.25, 0.5, 0.75, 1), (0.2, 0.2, 0.2, 0.4)
    assert fpt.SCHEDULES == {
        "pt": ((1, 1, 1),),
        "ld": tuple((size, 1, share) for size, share in zip(sizes, shares)),
        "fr": tuple((1, size, share) for size, share in zip(sizes, shares)),
        "cr": tuple((size, size, share) for size, share in zip(sizes, shares)),
        "fast": ((0.25, 0.25, 0.4), (0.5, 0.5, 0.4), (1, 1, 0.2))}  # but this one
    assert all(fpt.parse_schedule(name) == stages for name, stages in fpt.SCHEDULES.items())


@pytest.mark.parametrize(("text", "stages"), [
    ("0.5x0.25:0.3,1x1:0.7", ((0.5, 0.25, 0.3), (1, 1, 0.7))),
    (" 0.5x.25:.3 , 1x1.0:0.7", ((0.5, 0.25, 0.3), (1, 1, 0.7))),
    ("0.25x1:1", ((0.25, 1, 1),)),
    ("1x1:0.1,1x1:0.2,1x1:0.7", ((1, 1, 0.1), (1, 1, 0.2), (1, 1, 0.7)))])  # 0.1+0.2+0.7 is not 1.0
def test_schedules_as_text(text, stages):
    assert fpt.parse_schedule(text) == stages
    assert all(isinstance(stage, fpt.Stage) for stage in fpt.parse_schedule(text))


BAD_SCHEDULES = {"": "''", "CR": "'CR'", "0.5x0.5": "0.5x0.5", "0.5:1": "0.5:1", "1x1:1,": "''",
                 "axb:c": "axb:c", "1x1:1.2.3": "1.2.3", "-1x1:1": "-1x1:1",
                 "0x1:1": r"\(0, 1\]", "1x1.5:1": r"\(0, 1\]", "1x1:0,1x1:1": r"\(0, 1\]",
                 "0.5x0.5:0.3,1x1:0.6": "0.9, not 1", "0.5x0.5:0.6,1x1:0.6": "1.2, not 1"}


@pytest.mark.parametrize("text", BAD_SCHEDULES)
def test_schedules_that_cannot_be(text):
    with pytest.raises(ValueError, match=BAD_SCHEDULES[text]):
        fpt.parse_schedule(text)


def test_growth_follows_the_boundary_update():
    stages = fpt.SCHEDULES["cr"]
    ends = {1: 0, 6000: 0, 6001: 1, 12000: 1, 12001: 2, 18000: 2, 18001: 3, 30000: 3}
    assert {step: fpt.stage_at(stages, step, 30_000) for step in ends} == ends

    def whole_run(stages, steps):
        return [fpt.stage_at(stages, step, steps) for step in range(1, steps + 1)]

    assert whole_run(stages, 5) == [0, 1, 2, 3, 3]
    assert whole_run(stages, 20) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 8
    assert whole_run(stages, 1) == [2]  # 0.2 and 0.4 of an update round to 0, and 0.6 to 1
    assert whole_run(fpt.SCHEDULES["pt"], 7) == [0] * 7
    halves = fpt.parse_schedule("1x1:0.15,1x1:0.35,1x1:0.5")  # of 10: 1.5 rounds up to 2, then 5
    assert whole_run(halves, 10) == [0] * 2 + [1] * 3 + [2] * 5


@pytest.mark.parametrize("step", [0, -1, 101])
def test_stage_at_refuses_updates_outside_the_run(step):
    with pytest.raises(ValueError):
        fpt.stage_at(fpt.SCHEDULES["cr"], step, 100)


# ====== 3 Cost ====================================================================================


@pytest.mark.parametrize(("kind", "depth", "width", "decoder"), [
    ("v1.0", 1, 1, True), ("v1.0", 0.5, 0.25, True), ("v1.0", 0.25, 1, True), ("v1.1", 1, 1, True),
    ("v1.1", 0.5, 0.25, True), ("v1.1", 0.5, 0.25, False), ("v1.1", 1, 0.5, False),
    ("mt5", 0.5, 0.5, True)])
def test_step_flops_equal_the_counter(kind, depth, width, decoder):
    model = tiny(kind)
    model.set_attn_implementation("eager")  # of others the counter misses the attention products
    partial = fpt.partial_t5(model, depth, width, random_scores(), decoder)
    batch, source, target = 2, 11, 3
    embeds = torch.randn(batch, source, D, requires_grad=True)
    labels = torch.randint(3, VOCAB, (batch, target))
    with FlopCounterMode(display=False) as counter:
        loss = partial(inputs_embeds=embeds, labels=labels, use_cache=False).loss
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert fpt.step_flops(partial, batch, source, target, backward=False) == forward
    assert fpt.step_flops(partial, batch, source, target) == forward + counter.get_total_flops()


HEADS = {"d_kv": 12, "num_heads": 2}  # absorbed for targets of at most 6 tokens


def gradient_of(model, labels, padded=True):
    """-> the loss of `labels` [B, S], and its gradient with respect to 11 input vectors."""
    embeds = torch.randn(len(labels), 11, D, generator=torch.Generator().manual_seed(5))
    embeds.requires_grad_()
    mask = torch.ones(len(labels), 11, dtype=torch.long)
    if padded:
        mask[0, 7:] = 0
    losses = fpt.token_losses(model, mask, labels, inputs_embeds=embeds)
    losses.sum().backward()
    return losses, embeds.grad


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [True, False])
def test_absorbed_attention_is_the_same_function(kind, attention, padded):
    model = tiny(kind, **HEADS)
    if attention == "eager":
        model.set_attn_implementation("eager")
    for target in 1, 3, 6, 7:
        labels = torch.randint(3, VOCAB, (4, target))
        labels[1, 1:] = -100
        for plain in model, fpt.partial_t5(model, 0.5, 0.5, random_scores(), decoder=False):
            expected, found = (gradient_of(m, labels, padded) for m in (plain, fpt.absorbed(plain)))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert (target < 7) == (not torch.equal(found[1], expected[1]))  # 7: their own code
    assert not any(isinstance(m, fpt.AbsorbedAttention) for m in model.modules())


def test_an_absorbed_model_generates_the_same():
    model = tiny(**HEADS)
    embeds = torch.randn(2, 5, D)
    how = {"inputs_embeds": embeds, "attention_mask": torch.ones(2, 5, dtype=torch.long),
           "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**how), fpt.absorbed(model).generate(**how))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [3, 6, 7])
def test_flops_of_absorbed_and_of_checkpointed_models_equal_the_counter(kind, target):
    model = tiny(kind, **HEADS)
    model.set_attn_implementation("eager")
    plain = fpt.partial_t5(model, 0.5, 0.5, random_scores())
    partial = fpt.absorbed(plain)
    labels = torch.randint(3, VOCAB, (2, target))
    counts = []
    for runs in partial, fpt.checkpointed(partial):
        with FlopCounterMode(display=False) as counter:
            gradient_of(runs, labels)
        counts.append(counter.get_total_flops())
    shape = 2, 11, target
    assert counts[0] == fpt.step_flops(partial, *shape)
    assert counts[1] == counts[0] + fpt.rerun_flops(partial, *shape) > counts[0]
    assert (counts[0] < fpt.step_flops(plain, *shape)) == (target < 7)


def test_checkpointing_changes_no_bit_and_runs_every_layer_twice():
    model = fpt.absorbed(fpt.partial_t5(tiny(**HEADS), 0.5, 0.5, random_scores()))
    calls, labels = [], torch.randint(3, VOCAB, (4, 3))
    for side in SIDES:
        for block in getattr(model, side).block:
            block.layer[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradient_of(model, labels)
    assert len(calls) == 6  # three layers a side
    found = gradient_of(fpt.checkpointed(model), labels)
    assert len(calls) == 18
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_step_flops_by_hand():
    """One layer a side, v1.0, B=2, source 5, target 3; d 16, heads*d_kv 12, d_ff 32, V 64."""
    model = tiny("v1.0", num_layers=1, num_decoder_layers=1)
    s, t = 2 * 2 * 5, 2 * 2 * 3  # two FLOPs, for each position of each example
    projection, feed_forward, head = 16 * 12, 2 * 16 * 32, t * 16 * 64
    own, cross, self_ = 4 * 2 * 5 * 5 * 12, 4 * 2 * 3 * 5 * 12, 4 * 2 * 3 * 3 * 12  # Q K^T and A V
    encoder = s * (4 * projection + feed_forward)
    reached = s * 2 * projection + t * (projection + feed_forward)  # cross k, v; cross o, FFN
    forward = encoder + own + t * 5 * projection + self_ + cross + reached + head
    # Backward: dX of linears, two products for each of attention's two; in decoder block 0 nothing
    # before cross-attention depends on the prompt, nor do its queries (a quarter of its products).
    backward = encoder + 2 * own + reached + 2 * cross - cross // 2 + head
    assert (forward, backward) == (86_624, 77_360)
    assert fpt.step_flops(model, 2, 5, 3, backward=False) == forward
    assert fpt.step_flops(model, 2, 5, 3) == forward + backward


def test_the_papers_flops_of_t5_large():
    """Tables 1 and 2 count the linear layers of a forward pass over 512 source positions.

    Compared: `step_flops` of the forward pass less the attention products by hand, as a share of
    the full model's, averaged over the five tasks with the target lengths of its tasks; MNLI and
    QQP (length 5) keep the decoder whole. Table 2 is 20/20/20/40 % of the rows of Table 1.
    """
    sizes = {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24,
             "num_heads": 16}
    with torch.device("meta"):  # shapes alone: 0.8 billion parameters would not fit a test
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))
    scores = {side: [torch.arange(2816)] * 24 for side in SIDES}

    def linears(partial, target):
        encoder, decoder = len(partial.encoder.block), len(partial.decoder.block)
        products = 4 * 1024 * (encoder * 512 * 512 + decoder * target * (target + 512))
        return fpt.step_flops(partial, 1, 512, target, backward=False) - products

    def percent(depth, width):
        """Of the full model, for the five tasks: the mean of the ratios."""
        partials = [fpt.partial_t5(model, depth, width, scores, both) for both in (False, True)]
        ratios = [linears(partials[target > 5], target) / linears(model, target)
                  for target in (5, 5, 200, 200, 512)]
        return 100 * sum(ratios) / len(ratios)

    table1 = {name: [percent(*stage[:2]) for stage in fpt.SCHEDULES[name]]
              for name in ("ld", "fr", "cr")}
    assert round(linears(model, 10) / 2e9, 1) == 187.5  # GMAC
    table2 = {name: round(0.2 * sum(costs[:3]) + 0.4 * costs[3]) for name, costs in table1.items()}
    assert table2 == {"ld": 72, "fr": 83, "cr": 65}
    printed = {"ld": (30, 54, 77, 100), "fr": (58, 72, 86, 100), "cr": (20, 40, 66, 100)}
    for name, costs in table1.items():  # within a point: the paper's target lengths are not printed
        assert costs == pytest.approx(printed[name], abs=1)


# ====== 4 Soft prompt =============================================================================


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_prompt_goes_in_front(dtype):
    start = torch.randn(P, D).to(dtype)
    soft = fpt.SoftPrompt(start)
    assert [(n, p.dtype, tuple(p.shape)) for n, p in soft.named_parameters()] == [
        ("weight", torch.float32, (P, D))]
    batch = inputs()
    embeds, mask = batch["inputs_embeds"].to(dtype), batch["attention_mask"]
    out, longer = soft(embeds, mask)
    assert out.dtype == dtype and out.shape == (3, P + 7, D)
    assert all(torch.equal(row[:P], start) for row in out) and torch.equal(out[:, P:], embeds)
    assert longer[:, :P].eq(1).all() and torch.equal(longer[:, P:], mask)
    out.float().sum().backward()
    assert torch.equal(soft.weight.grad, torch.full((P, D), 3.0))
    with torch.no_grad():
        soft.weight += 1
    assert not torch.equal(start.float(), soft.weight)  # a copy: the source of a prompt is safe


def rows_of(prompt, embeddings):
    return [int((embeddings == row).all(1).nonzero()) for row in prompt]


def test_initial_prompts():
    embeddings = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(8))

    def draw(how, length, seed=0, *more):
        return fpt.init_prompt(how, length, embeddings, torch.Generator().manual_seed(seed), *more)

    uniform = draw("uniform", 500)
    assert uniform.shape == (500, D) and uniform.abs().max() <= 0.25  # 1 / sqrt(16)
    assert uniform.max() > 0.24 and uniform.min() < -0.24 and abs(uniform.mean()) < 0.01
    vocab = rows_of(draw("vocab", 17, 0, (), 20), embeddings)
    assert sorted(vocab) == list(range(3, 20))  # every common one once, no special token
    labels = rows_of(draw("labels", 6, 0, (9, 40, 9), 20), embeddings)
    assert labels[:2] == [9, 40] and len(set(labels)) == 6 and set(labels[2:]) <= set(range(3, 20))
    assert rows_of(draw("labels", 1, 0, (9, 40)), embeddings) == [9]
    for how in "uniform", "vocab", "labels":
        state = torch.get_rng_state()
        assert torch.equal(draw(how, 5), draw(how, 5))
        assert not torch.equal(draw(how, 5), draw(how, 5, 1))
        assert torch.equal(torch.get_rng_state(), state)  # its own generator, not the global one
    assert draw("vocab", 2).dtype == torch.float32
    with pytest.raises(ValueError, match="61"):
        draw("vocab", VOCAB)
    with pytest.raises(ValueError, match="'zeros'"):
        draw("zeros", 3)


def test_a_prompt_survives_saving(tmp_path):
    prompt = torch.randn(P, D) * 30
    fpt.save_prompt(tmp_path / "new", prompt, "t5-base")
    assert torch.equal(fpt.load_prompt(tmp_path / "new"), prompt)
    fpt.save_prompt(tmp_path / "new", prompt + 1, "t5-base")  # over the old one
    assert torch.equal(fpt.load_prompt(tmp_path / "new"), prompt + 1)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]
    fpt.save_prompt(tmp_path / "bf16", prompt.bfloat16(), "t5-base")
    assert fpt.load_prompt(tmp_path / "bf16").dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_prompt_and_computes_the_same(kind, tmp_path):
    model, prompt, batch = tiny(kind), torch.randn(P, D), inputs()
    fpt.save_prompt(tmp_path, prompt, "any")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    ids = torch.randint(3, VOCAB, (3, 7)) * batch["attention_mask"]  # a padded batch
    embeds, mask = fpt.SoftPrompt(prompt)(model.shared(ids), batch["attention_mask"])
    ours = model(inputs_embeds=embeds, attention_mask=mask, labels=batch["labels"])
    out = theirs(input_ids=ids, attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert torch.equal(out.logits, ours.logits) and torch.equal(out.loss, ours.loss)
    bare = model(input_ids=ids, attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert not torch.allclose(bare.logits, ours.logits, atol=0.01)  # the prompt was not ignored
    greedy = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    assert torch.equal(
        theirs.generate(input_ids=ids, attention_mask=batch["attention_mask"], **greedy),
        model.generate(inputs_embeds=embeds, attention_mask=mask, **greedy))


def test_a_prompt_saved_by_peft_loads_without_its_decoder_half(tmp_path):
    settings = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(tiny(), settings)
    whole = theirs.prompt_encoder["default"].embedding.weight
    theirs.save_pretrained(tmp_path)
    assert settings.num_transformer_submodules == 2 and whole.shape == (8, D)  # its default for T5
    assert torch.equal(fpt.load_prompt(tmp_path), whole[:4])


def test_load_prompt_refuses_what_is_no_prompt(tmp_path):
    def refused(match):
        with pytest.raises(ValueError, match=match):
            fpt.load_prompt(tmp_path)

    refused(re.escape(str(tmp_path)))  # an empty folder
    fpt.save_prompt(tmp_path, torch.full((P, D), math.nan), "x")
    refused("NaN")
    fpt.save_prompt(tmp_path, torch.zeros(P, D), "x")
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    for change in {"peft_type": "LORA"}, {"num_virtual_tokens": P + 1}, {"num_virtual_tokens": 0}:
        path.write_text(json.dumps({**good, **change}))
        refused("no prompt")
    path.write_text(json.dumps(good))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    refused("no prompt")


# ====== 5 Tasks and data ==========================================================================

# A row of each data set with its columns on the hub, and the example that it must become.
ROWS = {
    "rte": (("nyu-mll/glue", "rte"), {"sentence1": "A", "sentence2": "B", "idx": 7, "label": 1},
            "sentence1: A sentence2: B", "not_entailment"),
    "mnli": (("nyu-mll/glue", "mnli"), {"premise": "A", "hypothesis": "B", "idx": 7, "label": 2},
             "hypothesis: B premise: A", "contradiction"),
    "qqp": (("nyu-mll/glue", "qqp"), {"question1": "A", "question2": "B", "idx": 7, "label": 1},
            "question1: A question2: B", "is_duplicate"),
    "sst2": (("nyu-mll/glue", "sst2"), {"sentence": "A {B}", "idx": 7, "label": 1},
             "sentence: A {B}", "positive"),
    "mrpc": (("nyu-mll/glue", "mrpc"), {"sentence1": "A", "sentence2": "B", "idx": 7, "label": 0},
             "sentence1: A sentence2: B", "not_equivalent"),
    "boolq": (("aps/super_glue", "boolq"), {"question": "A", "passage": "B", "idx": 7, "label": 1},
              "question: A passage: B", "True"),
    "cb": (("aps/super_glue", "cb"), {"premise": "A", "hypothesis": "B", "idx": 7, "label": 2},
           "hypothesis: B premise: A", "neutral"),
    "copa": (("aps/super_glue", "copa"), {"premise": "A", "choice1": "B", "choice2": "C",
             "question": "cause", "idx": 7, "label": 0},
             "choice1: B choice2: C premise: A question: cause", "choice1"),
    "wic": (("aps/super_glue", "wic"), {"word": "W", "sentence1": "A", "sentence2": "B",
            "start1": 0, "start2": 1, "end1": 2, "end2": 3, "idx": 7, "label": 0},
            "word: W sentence1: A sentence2: B", "False"),
    "squad2": (("rajpurkar/squad_v2", "squad_v2"), {"id": "x", "title": "T", "context": "C",
               "question": "Q", "answers": {"text": ["a b", "a", "a b"], "answer_start": [1] * 3}},
               "question: Q context: C", "a b"),
    "record": (("aps/super_glue", "record"), {
               "passage": "One.\n@highlight\nTwo.\n@highlight\nThree.", "query": "by @placeholder",
               "entities": ["E", "F G"], "answers": ["F G", "F G", "E"], "entity_spans":
               {"text": [], "start": [], "end": []}, "idx": {"passage": 1, "query": 2}},
               "query: by @placeholder entities: E, F G passage: One. Two. Three.", "F G"),
    "xsum": (("EdinburghNLP/xsum", "default"), {"document": "D\nE", "summary": "S", "id": "1"},
             "D\nE", "S")}


def test_the_task_table_is_complete():
    assert set(fpt.TASKS) == set(ROWS)
    for name, task in fpt.TASKS.items():
        assert task.hub == ROWS[name][0] and task.metric in fpt.METRICS
        assert len(set(task.labels)) == len(task.labels) != 1 and all(task.labels)
        assert task.decoder is (name in ("squad2", "record", "xsum")) is (not task.labels)
        assert task.validation == ("validation_matched" if name == "mnli" else "validation")
    assert {name for name, task in fpt.TASKS.items() if "f1" in task.metric} == {
        "qqp", "mrpc", "cb", "squad2", "record"}


@pytest.mark.parametrize("name", ROWS)
def test_templates_and_labels_of_the_task_table(name):
    task, (_, row, source, target) = fpt.TASKS[name], ROWS[name]
    rows = fpt.hub_examples(task, row)
    assert (rows[0].source, rows[0].target) == (source, target)
    assert target in rows[0].answers
    if task.labels:  # every label round-trips: number -> text -> number
        for number, label in enumerate(task.labels):
            [example] = fpt.hub_examples(task, {**row, "label": number})
            assert example.target == label and example.answers == (label,)
            assert task.labels.index(example.target) == number
        with pytest.raises(fpt.UserError, match="-1"):  # an unlabelled split; not "the last label"
            fpt.hub_examples(task, {**row, "label": -1})
        with pytest.raises(fpt.UserError):
            fpt.hub_examples(task, {**row, "label": len(task.labels)})
    assert len(rows) == (2 if name == "record" else 1)


def test_answers_of_the_text_tasks():
    squad, record = (fpt.hub_examples(fpt.TASKS[name], ROWS[name][1])
                     for name in ("squad2", "record"))
    assert [(e.target, e.answers) for e in squad] == [("a b", ("a b", "a"))]
    # ReCoRD trains on each distinct answer, and each of them counts as right.
    assert [(e.target, e.answers) for e in record] == [("F G", ("F G", "E")), ("E", ("F G", "E"))]
    unanswerable = {**ROWS["squad2"][1], "answers": {"text": [], "answer_start": []}}
    [example] = fpt.hub_examples(fpt.TASKS["squad2"], unanswerable)
    assert example.target == "no answer" and example.answers == ("no answer",)


def fake_hub(monkeypatch, splits, script=False):
    """`datasets.load_dataset` as the hub would answer it; -> the calls that it gets."""
    import datasets

    calls = []

    def load_dataset(*name, **how):
        calls.append((name, how))
        if script and not how:
            raise RuntimeError("Dataset scripts are no longer supported, but found xsum.py")
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", ["mnli", "record", "xsum"])
def test_hub_data_sets_become_train_dev_and_validation(name, monkeypatch):
    hub, row, source, target = ROWS[name]
    column = re.search(r"{(\w+)}", fpt.TASKS[name].source)[1]
    splits = {"train": [{**row, column: f"{row[column]} {i}"} for i in range(20)],
              fpt.TASKS[name].validation: [row] * 4, "test": [{**row, "label": -1}]}
    calls = fake_hub(monkeypatch, splits, script=name == "xsum")
    data = fpt.load_data(name, dev=3, limit=2)
    assert len(data.validation) == 2 and len(data.dev) == 3
    assert len(data.train) == (34 if name == "record" else 17)  # two distinct answers a row
    assert not {row.source for row in data.train} & {row.source for row in data.dev}
    assert {(e.source, e.target) for e in data.validation} == {(source, target)}
    retried = [(hub, {"revision": "refs/convert/parquet"})] if name == "xsum" else []
    assert calls == [(hub, {}), *retried]


def test_a_hub_data_set_without_the_split_is_refused(monkeypatch):
    row = ROWS["mnli"][1]
    fake_hub(monkeypatch, {"train": [row] * 20, "validation": [row]})
    with pytest.raises(fpt.UserError, match="validation_matched"):
        fpt.load_data("mnli", 5)


def test_the_dev_part_is_carved_from_train_and_is_the_same_for_every_seed(tmp_path):
    folder = write_task(tmp_path / "task", train=40)
    rows = examples(40, 1)
    splits = []
    for seed in 0, 1:
        torch.manual_seed(seed)  # the program's seeds never come near, nor may the global one
        splits.append(fpt.load_data(str(folder), dev=6))
    assert splits[0] == splits[1]
    data = splits[0]
    assert len(data.dev) == 6 and sorted(data.dev + data.train) == sorted(rows)
    assert data.dev != rows[:6] and data.dev != rows[-6:]  # a random part, not an end of the file
    assert data.validation == examples(12, 2)
    assert fpt.load_data(str(folder), 6, limit=5).validation == examples(12, 2)[:5]
    assert len(fpt.load_data(str(folder), dev=500).dev) == 8  # a fifth at most


def test_a_text_task_folder(tmp_path):
    spec = {"metric": "rouge_l", "decoder": False, "max_target": 7, "prefix": "w01"}
    folder = write_task(tmp_path / "task", labels=[], **spec)
    line = json.dumps({"source": "s", "target": ["one", "two"]}) + "\n\n"  # blank lines are skipped
    (folder / "validation.jsonl").write_text(line)
    data = fpt.load_data(str(folder), 5)
    assert data.validation == [fpt.Example("s", "one", ("one", "two"))]
    assert data.task.labels == () and {key: getattr(data.task, key) for key in spec} == spec
    (folder / "task.json").write_text("{}")
    task = fpt.load_data(str(folder), 5).task
    assert (task.labels, task.metric, task.decoder, task.prefix) == ((), "em_f1", True, "")


def padded(tokenizer, rows, task, settings):
    """The batch that a model gets."""
    return fpt.collate(fpt.encode(tokenizer, task, settings, rows), torch.device("cpu"))


def test_encode_and_collate_truncate_pad_and_mask(tokenizer):
    rows = [fpt.Example("w01 w02 w03 w04", "yes", ("yes",)),
            fpt.Example("w05", "no w06", ("no w06",))]
    word = {word: i for i, word in enumerate(WORDS)}
    batch = padded(tokenizer, rows, TEXT, config(max_source=4))
    assert batch["input_ids"].tolist() == [  # 1 ends a sequence, 0 pads it
        [word["w01"], word["w02"], word["w03"], 1], [word["w05"], 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[3, word["yes"], 1, -100], [3, word["no"], word["w06"], 1]]
    batch = padded(tokenizer, rows, TEXT._replace(max_target=2, prefix=""), config())
    assert batch["labels"].tolist() == [[word["yes"], 1], [word["no"], 1]]


def test_label_ids_round_trip_and_are_distinct(tokenizer):
    task = fpt.Task("", ("yes", "no", "no yes"))
    ids = fpt.label_ids(tokenizer, task)
    assert [tokenizer.decode(label, skip_special_tokens=True) for label in ids] == list(task.labels)
    rows = [fpt.Example("w01", label, (label,)) for label in task.labels]
    learned = padded(tokenizer, rows, task, config())["labels"].tolist()
    assert [[i for i in row if i != -100] for row in learned] == ids  # nothing else is scored
    with pytest.raises(fpt.UserError, match="'maybe' and 'perhaps'"):  # both <unk>
        fpt.label_ids(tokenizer, fpt.Task("", ("yes", "maybe", "no", "perhaps")))


def take(count, rows, *arguments, **how):
    """The first batches, as examples; a word of a source is a token."""
    def split(rows):
        return [fpt.Encoded(row, row.source.split(), []) for row in rows]

    batches = zip(fpt.batches(rows, split, *arguments, **how), range(count))
    return [[row.example for row in batch] for batch, _ in batches]


def test_batches_are_a_pure_function_of_seed_and_update():
    rows = examples(37)
    whole = take(60, rows, 3, 4, pool=7)
    assert all(len(batch) == 4 for batch in whole)
    torch.manual_seed(99)
    for start in (1, 2, 7, 8, 23, 50):  # inside a pool, at its ends, in a later pass
        assert take(10, rows, 3, 4, start=start, pool=7) == whole[start - 1:start + 9]
    assert take(60, rows, 4, 4, pool=7) != whole
    assert take(5, rows, 0, 4) == take(70, rows, 0, 4)[:5] == take(5, rows, 0, 4, start=1)


@pytest.mark.parametrize(("count", "size", "pool", "updates"), [
    (40, 4, 5, 10), (40, 4, 5, 30), (12, 4, 6, 6), (6, 4, 3, 3), (3, 4, 3, 3), (35, 4, 5, 35)])
def test_batches_use_every_example_once_per_pass(count, size, pool, updates):
    rows = [fpt.Example(f"w{i:02}", "yes", ("yes",)) for i in range(count)]
    used = [row for batch in take(updates, rows, 0, size, pool=pool) for row in batch]
    assert len(used) % count == 0 and all(used.count(row) == len(used) // count for row in rows)


def test_every_pass_has_an_order_of_its_own():
    rows = [fpt.Example(f"w{i:02}", "yes", ("yes",)) for i in range(40)]  # of one length
    passes = [take(10, rows, 0, 4, start=start, pool=10) for start in (1, 11, 21)]
    mixes = [{frozenset(row.source for row in batch) for batch in batches} for batches in passes]
    assert not mixes[0] & mixes[1] and not mixes[1] & mixes[2]  # other neighbours each time


def test_an_example_meets_no_copy_of_itself():  # of a small task, a pool would be several passes
    rows = [fpt.Example("w " * i, "yes", ("yes",)) for i in range(1, 41)]
    assert all(len(set(batch)) == 4 for batch in take(40, rows, 0, 4))


def test_batches_reduce_padding_and_mix():
    rows = examples(400)

    def padding(batches):
        lengths = [[len(row.source) for row in batch] for batch in batches]
        return sum(len(batch) * max(batch) - sum(batch) for batch in lengths)

    sorted_pools = take(100, rows, 0, 4)
    plain = take(100, rows, 0, 4, pool=1)  # pools of one batch: nothing to sort by
    assert padding(sorted_pools) < 0.2 * padding(plain)
    longest = [max(len(row.source) for row in batch) for batch in sorted_pools[:50]]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


class Server(http.server.BaseHTTPRequestHandler):
    answer = b"HTTP/1.0 404 Not Found\r\n\r\n"

    def do_HEAD(self):
        self.wfile.write(self.answer)


class NoHub(Server):
    answer = b"220 mail.example.org ESMTP\r\n"


@pytest.mark.parametrize(("handler", "answers"), [(Server, True), (None, False), (NoHub, False)])
def test_the_hub_is_asked_once_and_not_waited_for(handler, answers, monkeypatch, here, capsys):
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    if handler:
        threading.Thread(target=server.handle_request, daemon=True).start()
    else:
        server.server_close()  # now the port is closed
    fpt.ask_hub(config(model=str(here / "model"), task=str(here / "task")))
    assert "HF_HUB_OFFLINE" not in os.environ  # all is local: nothing to ask
    fpt.ask_hub(config(model=str(here / "model"), task="rte"))
    assert os.environ.get("HF_HUB_OFFLINE") == (None if answers else "1")
    out, err = capsys.readouterr()
    assert ("does not answer" in out) is not answers and not err
    server.server_close()


def test_load_model_freezes_turns_dropout_off_and_casts(here):
    for precision, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        model, tokenizer = fpt.load_model(str(here / "model"), torch.device("cpu"), precision)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())
        assert torch.equal(model.lm_head.weight, tiny().lm_head.weight.to(dtype))  # still untied
        assert len(tokenizer) == len(WORDS)


# ====== 6 Evaluate ================================================================================


def answered(*pairs):
    """(prediction, answers) -> the arguments of a metric."""
    rows = [fpt.Example("s", answers[0], answers) for _, answers in pairs]
    return [text for text, _ in pairs], rows


def test_accuracy_and_f1_by_hand():
    predictions, rows = answered(("a", ("a",)), ("b", ("a",)), ("a", ("a",)), ("b", ("b",)))
    assert fpt.METRICS["accuracy"](predictions, rows, ("a", "b")) == {"accuracy": 75}
    binary = fpt.METRICS["accuracy_f1"](predictions, rows, ("a", "b"))  # of label 1: P 1/2, R 1
    assert binary == {"accuracy": 75, "f1": pytest.approx(100 * 2 / 3)}
    macro = fpt.METRICS["accuracy_macro_f1"](predictions, rows, ("a", "b", "c"))  # of a: P 1, R 2/3
    assert macro == {"accuracy": 75, "f1": pytest.approx(100 * (0.8 + 2 / 3 + 0) / 3)}
    assert fpt.METRICS["accuracy_f1"](["a"], rows[:1], ("a", "b")) == {"accuracy": 100, "f1": 0}


SQUAD = [  # prediction, answers, exact match, token F1
    ("The cat!", ("cat",), 1, 1),  # articles, case and punctuation do not count
    ("black cat", ("a cat", "dog"), 0, 2 / 3), ("dog", ("a cat", "dog"), 1, 1),
    ("a b c d", ("c d e",), 0, 4 / 6), ("", ("cat",), 0, 0),  # "a" is an article
    ("no answer", ("no answer",), 1, 1), ("answer", ("no answer",), 0, 0),
    ("no answer", ("answer",), 0, 0)]


@pytest.mark.parametrize("case", SQUAD)
def test_exact_match_and_token_f1_by_hand(case):
    prediction, answers, em, f1 = case
    scores = fpt.METRICS["em_f1"](*answered((prediction, answers)), ())
    assert scores == {"em": pytest.approx(100 * em), "f1": pytest.approx(100 * f1)}


def test_exact_match_and_token_f1_are_means():
    scores = fpt.METRICS["em_f1"](*answered(*(case[:2] for case in SQUAD)), ())
    assert scores["em"] == pytest.approx(100 * 3 / 8)
    assert scores["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1 + 2 / 3 + 1) / 8)


def test_rouge_l_by_hand():
    def rouge(*pairs):
        return fpt.METRICS["rouge_l"](*answered(*pairs), ())["rouge_l"]

    assert rouge(("w x y z", ("w y z v",))) == pytest.approx(75)  # w y z: P 3/4, R 3/4
    assert rouge(("w x", ("w x y z",))) == pytest.approx(100 * 2 / 3)  # P 1, R 1/2
    assert rouge(("w x", ("y z", "w x"))) == pytest.approx(100)  # the best of the answers
    assert rouge(("cats", ("cat",))) == 0  # no stemming
    assert rouge(("", ("cat",))) == 0
    assert rouge(("w x", ("w x",)), ("cat", ("dog",))) == pytest.approx(50)


@pytest.fixture(scope="module")
def judge():
    """A model and a prompt whose untrained predictions vary with the source."""
    return tiny(), fpt.SoftPrompt(torch.randn(P, D, generator=torch.Generator().manual_seed(1)))


def test_rank_classification_equals_separate_full_forwards(judge, tokenizer):
    model, prompt = judge
    task = fpt.Task("", ("yes", "no", "w07 w08"))  # of different lengths: a sum, not a mean
    rows = [example._replace(target="yes") for example in examples(12, 5)]
    likelihoods = []
    for row in rows:
        embeds = encoded(tokenizer, model, prompt.weight.detach(), row.source)
        losses = [model(inputs_embeds=embeds, labels=torch.tensor([ids])).loss * len(ids)
                  for ids in fpt.label_ids(tokenizer, task)]
        likelihoods.append(-torch.stack(losses))
    expected = [task.labels[i] for i in torch.stack(likelihoods).argmax(1).tolist()]
    assert len(set(expected)) > 1  # the test would prove little otherwise
    scores, predictions = fpt.evaluate(model, prompt, tokenizer, task, rows, config(batch=5))
    assert predictions == expected
    assert scores == {"accuracy": pytest.approx(100 * expected.count("yes") / 12)}
    batch = padded(tokenizer, rows, task, config())
    embeds, mask = prompt(model.shared(batch["input_ids"]), batch["attention_mask"])
    with torch.no_grad():
        ours = fpt.label_likelihood(model, embeds, mask, fpt.label_ids(tokenizer, task))
    torch.testing.assert_close(ours, torch.stack(likelihoods), rtol=1e-4, atol=1e-4)


def test_token_losses_by_hand():
    model, labels = tiny(), torch.tensor([[5, 9, 1], [7, 1, -100]])
    losses, _ = gradient_of(model, labels, padded=False)
    embeds = torch.randn(2, 11, D, generator=torch.Generator().manual_seed(5))
    start = torch.tensor([[0, 5, 9], [0, 7, 1]])  # shifted to the right behind the start token
    logits = model(inputs_embeds=embeds, decoder_input_ids=start).logits.log_softmax(-1)
    for example, token in (0, 0), (0, 1), (0, 2), (1, 0), (1, 1):
        by_hand = -logits[example, token, labels[example, token]]
        assert losses[example, token].item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert losses[1, 2] == 0 and losses.dtype == torch.float32


def test_losses_and_gradients_in_bf16_are_close_to_those_in_fp32():
    """On the trained micro model: the mean loss to a percent, the direction of the gradient."""
    found = {}
    for precision in "fp32", "bf16":
        model, tokenizer = fpt.load_model(fpt.Config.model, torch.device("cpu"), precision)
        data = fpt.load_data(fpt.Config.task, 10)
        rows = fpt.encode(tokenizer, data.task, config(), data.train[:64])
        prompt = fpt.SoftPrompt(model.shared.weight[:20])
        loss, _ = fpt.gradient(fpt.absorbed(model), prompt, [[rows]])
        scores, _ = fpt.evaluate(model, prompt, tokenizer, data.task, data.train[:200],
                                 config(batch=32))
        found[precision] = loss.item(), prompt.weight.grad.flatten(), scores["accuracy"]
    (loss, gradient, score), (other_loss, other_gradient, other_score) = found.values()
    assert other_loss == pytest.approx(loss, rel=0.01) and other_loss != loss
    assert torch.cosine_similarity(gradient, other_gradient, dim=0) > 0.99
    assert other_gradient.dtype == torch.float32 and abs(score - other_score) <= 2


def test_text_is_generated_greedily_from_prompt_and_source(judge, tokenizer):
    model, prompt = judge
    rows, expected = examples(7, 6), []
    for row in rows:
        embeds = encoded(tokenizer, model, prompt.weight.detach(), row.source)
        ids = model.generate(inputs_embeds=embeds, max_new_tokens=TEXT.max_target, do_sample=False)
        expected.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    assert len(set(expected)) > 1 and max(len(text.split()) for text in expected) > 1
    _, predictions = fpt.evaluate(model, prompt, tokenizer, TEXT, rows, config(batch=3))
    assert predictions == expected  # in the order of the rows, though batches are sorted by length


@pytest.mark.parametrize("task", [YES_NO, TEXT])
def test_two_splits_have_two_scores_whatever_the_batch_size(judge, tokenizer, task):
    rows = examples(6, 7)
    _, predictions = fpt.evaluate(*judge, tokenizer, task, rows, config())
    right = [row._replace(target=text, answers=(text,)) for row, text in zip(rows, predictions)]
    wrong = [row._replace(target="w00", answers=("w00",)) for row in rows[:2]]
    for size in 1, 5:
        for split, score in (right, 100), (wrong, 0), (right + wrong, 75), (wrong + right, 75):
            scores, _ = fpt.evaluate(*judge, tokenizer, task, split, config(batch=size))
            assert next(iter(scores.values())) == score


def test_a_prefix_that_is_no_special_token_is_no_part_of_the_answer(tokenizer):
    """task.json may set any prefix; a model that learned the task begins by writing it."""
    model, task, rows = tiny(), TEXT._replace(prefix="w01 "), [fpt.Example("w03", "w02", ("w02",))]
    learned = padded(tokenizer, rows, task, config())["labels"]
    model.generate = lambda **how: torch.cat([torch.zeros(1, 1, dtype=torch.long), learned], dim=1)
    prompt = fpt.SoftPrompt(torch.zeros(P, D))
    scores, _ = fpt.evaluate(model, prompt, tokenizer, task, rows, config())
    assert scores["em"] == 100


# ====== 7 Train ===================================================================================


@pytest.fixture
def training(tokenizer, tmp_path, monkeypatch):
    """-> run(): `fpt.train` on a tiny task, and what it did."""
    def run(schedule="cr", model=None, seed=0, data=None, folder="", length=P, **changes):
        folder = tmp_path / (folder or f"run{len(list(tmp_path.iterdir()))}")
        seen = types.SimpleNamespace(optimizers=[], encoders=[], judges=[], folder=folder)
        forward, adafactor = T5Stack.forward, fpt.adafactor

        def spy_forward(stack, *args, **how):
            if not stack.is_decoder:
                size = len(stack.block), ffn(stack.block[0]).wo.weight.shape[1]
                (seen.encoders if torch.is_grad_enabled() else seen.judges).append(size)
            return forward(stack, *args, **how)

        def spy_adafactor(*args):
            seen.optimizers.append(adafactor(*args))
            return seen.optimizers[-1]

        rows = examples(30, 3)
        data = data or fpt.Data(YES_NO, rows[:20], rows[20:24], rows[24:])
        model = model or tiny()
        seen.start = fpt.init_prompt("vocab", length, model.shared.weight, fpt.rng(seed))
        prompt = seen.prompt = fpt.SoftPrompt(seen.start)
        seen.weight = prompt.weight
        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(T5Stack, "forward", spy_forward)
            patch.setattr(fpt, "adafactor", spy_adafactor)
            seen.run, seen.judge = fpt.train(
                model, tokenizer, prompt, fpt.parse_schedule(schedule), data, config(**changes),
                seed, folder)
        seen.best, seen.log = seen.run.best, seen.run.log
        return seen
    return run


@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_only_the_prompt_changes_across_every_stage(kind, training):
    model = tiny(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = training("cr", model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert run.prompt.weight is run.weight and (run.weight - run.start).abs().min() > 0
    assert [name for name, _ in run.prompt.named_parameters()] == ["weight"]
    # Growth after updates 4, 8 and 12 of 20: 2, 3, 5, 6 of 6 layers and 8, 16, 24, 32 neurons.
    assert run.encoders == [(2, 8)] * 4 + [(3, 16)] * 4 + [(5, 24)] * 4 + [(6, 32)] * 8
    assert set(run.judges) == {(6, 32)}  # the neurons' scores and every dev score: the full model
    [optimizer] = run.optimizers
    [group] = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(run.weight)]
    assert optimizer.state[run.weight]["step"] == 20  # one state, through every growth
    assert [(row["step"], row["stage"]) for row in run.log] == [(5, 2), (10, 3), (15, 4), (20, 4)]


@pytest.mark.parametrize(("schedule", "stages"), [
    ("ld", [(2, 32), (3, 32), (5, 32), (6, 32)]), ("fr", [(6, 8), (6, 16), (6, 24), (6, 32)]),
    ("pt", [(6, 32)] * 4), ("0.5x0.25:1", [(3, 8)] * 4)])
def test_the_schedules_run_on_the_models_they_name(schedule, stages, training):
    run = training(schedule, eval_every=20)
    assert run.encoders == [stages[0]] * 4 + [stages[1]] * 4 + [stages[2]] * 4 + [stages[3]] * 8
    narrow = any(width < D_FF for _, width in stages)
    assert run.judges[2 if narrow else 0:] == [stages[-1]]  # 2 batches of 4 score the neurons
    assert len(run.judge.encoder.block) == stages[-1][0] and len(run.judge.decoder.block) == LAYERS


def test_the_optimiser_is_the_papers(training):
    run = training("pt", steps=1)
    [group] = run.optimizers[0].param_groups
    assert (group["lr"], group["scale_parameter"], group["relative_step"], group["warmup_init"],
            group["weight_decay"], group["beta1"]) == (0.3, False, False, False, 1e-5, None)
    rms = (run.weight - run.start).pow(2).mean().sqrt().item()
    assert rms == pytest.approx(0.3, rel=0.02)  # whatever the scale of the gradient


def test_pt_is_prompt_tuning_as_peft_does_it(training, tokenizer):
    """The baseline of every comparison, against a loop over PEFT's own model."""
    run, model = training("pt", steps=6), tiny()
    theirs = peft.get_peft_model(model, peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1)).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data.copy_(run.start)
    optimizer = transformers.optimization.Adafactor(
        [weight], lr=0.3, scale_parameter=False, relative_step=False, weight_decay=1e-5)
    for rows in take(6, examples(30, 3)[:20], 0, 4):
        optimizer.zero_grad()
        batch = padded(tokenizer, rows, YES_NO, config())
        theirs(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    torch.testing.assert_close(weight, run.weight, rtol=1e-4, atol=1e-4)


def test_the_ledger_counts_every_batch_as_it_was_padded(training, tokenizer):
    run, model, rows = training("cr", score_examples=20), tiny(), examples(30, 3)[:20]
    partials = [fpt.partial_t5(model, depth, width, random_scores(), False)
                for depth, width, _ in fpt.SCHEDULES["cr"]]
    flops = pt = 0
    for step, batch in enumerate(take(20, rows, 0, 4), 1):
        batch = padded(tokenizer, batch, YES_NO, config())
        shape = 4, P + batch["input_ids"].shape[1], batch["labels"].shape[1]
        flops += fpt.step_flops(partials[fpt.stage_at(fpt.SCHEDULES["cr"], step, 20)], *shape)
        pt += fpt.step_flops(model, *shape)
        if step % 5 == 0:
            row = run.log[step // 5 - 1]
            assert (row["flops"], row["pt_flops"]) == (flops, pt)
    lengths = sorted(len(row.source.split()) + 1 for row in rows)  # the scores: a forward pass each
    assert {row["scoring_flops"] for row in run.log} == {sum(
        fpt.step_flops(model, 4, P + lengths[i + 3], 3, backward=False) for i in range(0, 20, 4))}
    plain = training("pt").log[-1]
    assert (plain["flops"], plain["pt_flops"], plain["scoring_flops"]) == (pt, pt, 0)
    assert run.run.seconds["train"] > 0 and run.run.seconds["eval"] > 0


@pytest.mark.parametrize(("size", "processes", "parts"), [(32, 3, 4), (7, 2, 3), (4, 2, 2),
                                                         (5, 1, 5), (9, 1, 1)])
def test_a_batch_is_split_into_parts_without_loss(size, processes, parts):
    shards = fpt.split(list(range(size)), processes, parts)
    assert len(shards) == processes and all(len(shard) == parts for shard in shards)
    assert sorted(sum(sum(shards, []), [])) == list(range(size))
    sizes = [len(part) for shard in shards for part in shard]
    assert 1 <= min(sizes) and max(sizes) - min(sizes) <= 1
    assert fpt.split([1, 2, 3, 4, 5, 6, 7, 8], 2, 2) == [[[1, 3], [5, 7]], [[2, 4], [6, 8]]]


def test_accumulated_parts_equal_the_whole_batch(judge, tokenizer):
    """Whatever the lengths of their targets: a mean of means would not."""
    model, _ = judge
    rows = [fpt.Example("w01 " * i, "w02 " * i, ("",)) for i in range(1, 6)]
    rows, found = fpt.encode(tokenizer, TEXT, config(), rows), []
    for parts in 1, 2, 5:
        prompt = fpt.SoftPrompt(model.shared.weight[:P])
        loss, norm = fpt.gradient(model, prompt, fpt.split(rows, 1, parts))
        found.append((torch.tensor([loss, norm]), prompt.weight.grad))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)
    batch = fpt.collate(rows, torch.device("cpu"))
    embeds, mask = prompt(model.shared(batch["input_ids"]), batch["attention_mask"])
    stock = model(inputs_embeds=embeds, attention_mask=mask, labels=batch["labels"]).loss
    assert found[0][0][0].item() == pytest.approx(stock.item(), rel=1e-5)


def test_a_run_with_accumulation_and_checkpointing_is_the_same_run(training):
    plain, cut = training("cr", steps=4), training("cr", steps=4, accumulate=3, folder="cut")
    again = training("cr", steps=4, checkpointing=True, folder="again")
    torch.testing.assert_close(cut.weight, plain.weight, rtol=0, atol=1e-5)
    assert torch.equal(again.weight, plain.weight)
    assert again.log[-1]["flops"] > plain.log[-1]["flops"]  # what it costs is counted


def test_one_batch_is_overfitted(training):
    rows = examples(4, 3)  # two answers: the prompt must make the model look at the source
    data = fpt.Data(YES_NO._replace(prefix=""), rows, rows, rows)
    run = training("cr", data=data, length=10, steps=100, eval_every=10)
    losses = [row["loss"] for row in run.log]
    assert losses[-1] < 0.3 * losses[0]


def test_two_runs_are_equal_bit_for_bit_and_two_seeds_are_not(training):
    first, again = training("cr"), training("cr", folder="again")
    other = training("cr", seed=1, folder="other")
    assert torch.equal(first.weight, again.weight) and torch.equal(first.best[0], again.best[0])
    assert [row["loss"] for row in first.log] == [row["loss"] for row in again.log]
    assert not torch.equal(first.start, other.start) and not torch.equal(first.weight, other.weight)
    name = "prompt/adapter_model.safetensors"
    assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_the_best_prompt_is_the_later_of_equals(training, monkeypatch):
    dev, weights = [10, 30, 30, 20], []

    def scripted(model, prompt, *_):
        weights.append(prompt.weight.detach().clone())
        return {"em": dev[len(weights) - 1], "f1": 100 - len(weights)}, []  # only the first counts

    monkeypatch.setattr(fpt, "evaluate", scripted)
    run = training("pt")
    assert run.best[1:] == ({"em": 30, "f1": 97}, 15) and torch.equal(run.best[0], weights[2])
    assert torch.equal(fpt.load_prompt(run.folder / "prompt"), weights[2])
    assert [row["dev"]["em"] for row in run.log] == dev


def test_the_logged_loss_is_the_mean_since_the_last_evaluation(training):
    every = [row["loss"] for row in training("pt", steps=6, eval_every=1).log]
    run = training("pt", steps=6, eval_every=4)
    assert [row["step"] for row in run.log] == [4, 6]
    means = [sum(every[:4]) / 4, sum(every[4:]) / 2]
    assert [row["loss"] for row in run.log] == pytest.approx(means)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(bad, training, monkeypatch):
    """One example of train has a poisoned word; the run ends at the update where it comes up."""
    rows = [row for row in examples(30, 3) if "w49" not in row.source]
    rows, dev = rows[:20], rows[20:]
    rows[7] = rows[7]._replace(source="w49 " + rows[7].source)
    drawn = take(20, rows, 0, 4)
    step = 1 + [rows[7] in batch for batch in drawn].index(True)
    assert step > 1
    model, data = tiny(), fpt.Data(YES_NO, rows, dev, dev)
    if bad == "loss":
        model.shared.weight[WORDS.index("w49")] = math.nan
    else:  # the loss is finite, its gradient is not
        clip, norms = torch.nn.utils.clip_grad_norm_, [1.0] * (step - 1) + [math.nan]
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                            lambda *how: clip(*how) * norms.pop(0))
    with pytest.raises(fpt.UserError, match=rf"update {step}\b"):
        training("pt", model, data=data, folder="bad")
    monkeypatch.undo()
    good = training("pt", data=data, steps=step - 1)
    bad = good.folder.with_name("bad")
    batch = [json.loads(line) for line in (bad / "bad-batch.jsonl").read_text().splitlines()]
    assert [row["source"] for row in batch] == [row.source for row in drawn[step - 1]]
    assert torch.equal(fpt.load_prompt(bad / "prompt-last-good"), good.weight)


# ====== 8 Record, and the program =================================================================

PROMPT_FILES = ["adapter_config.json", "adapter_model.safetensors", "trained-on.json"]
COMMAND_FILES = [".lock", "command.json", "comparison.json", "comparison.png"]
RUN_FILES = sorted(["checkpoint.safetensors", "config.json", "log.jsonl", "predictions.jsonl",
                    "results.json", "seconds.json", *(
    f"{folder}/{name}" for folder in ("prompt", "prompt-last") for name in PROMPT_FILES)])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(here, tmp_path_factory):
    """`pt` and `cr` by one command, in this process: the folder, what main returned and printed."""
    out = tmp_path_factory.mktemp("runs") / "new" / "out"
    starts, orders, patch = [], [], pytest.MonkeyPatch()
    batches, adafactor = fpt.batches, fpt.adafactor

    def spy_batches(*arguments, **how):
        orders.append([])
        for batch in batches(*arguments, **how):
            orders[-1].append(batch)
            yield batch

    def spy_adafactor(prompt, *rest):
        starts.append(prompt.weight.detach().clone())
        return adafactor(prompt, *rest)

    text = tempfile.TemporaryFile("w+")
    patch.setattr(fpt, "batches", spy_batches)
    patch.setattr(fpt, "adafactor", spy_adafactor)
    patch.setattr(sys, "stdout", text)
    try:
        results = fpt.main(flags(here, out, "--schedule", "pt", "cr", "--seed", 0, 1))
    finally:
        patch.undo()
    text.seek(0)
    return types.SimpleNamespace(out=out, results=results, starts=starts, orders=orders,
                                 text=text.read())


def test_a_run_leaves_its_files_and_main_returns_what_they_say(run, here):
    names = ["pt-seed0", "cr-seed0", "pt-seed1", "cr-seed1"]
    assert sorted(path.name for path in run.out.iterdir()) == sorted(
        [*names, *COMMAND_FILES])
    for name, result in zip(names, run.results, strict=True):
        folder = run.out / name
        assert files(folder) == RUN_FILES  # and no draft of an atomic write
        assert json.loads((folder / "results.json").read_text()) == result
        settings = json.loads((folder / "config.json").read_text())
        schedule, seed = name.split("-seed")
        assert (settings["schedule"], settings["seed"]) == (schedule, int(seed))
        assert settings["stages"] == [list(stage) for stage in fpt.SCHEDULES[schedule]]
        assert (settings["steps"], settings["batch"], settings["lr"], settings["model"]) == (
            10, 4, 0.3, str(here / "model"))
        versions = settings["versions"]
        assert torch.__version__.startswith(versions["torch"])  # less "+cpu", perhaps
        assert versions["transformers"] == transformers.__version__
        log = read_jsonl(folder / "log.jsonl")
        assert [row["step"] for row in log] == [4, 8, 10]
        assert [row["stage"] for row in log] == ([1, 1, 1] if schedule == "pt" else [2, 4, 4])
        for key in "flops", "pt_flops", "scoring_flops", "cut_sources":
            assert [row[key] for row in log] == sorted(row[key] for row in log)
        best = max(log, key=lambda row: (row["dev"]["accuracy"], row["step"]))
        assert (result["best_step"], result["dev"]) == (best["step"], best["dev"])
        assert result["last_dev"] == log[-1]["dev"] and result["scored_on_full_model"] is True
        last = log[-1]
        assert result["flops_over_pt"] == (last["flops"] + last["scoring_flops"]) / last["pt_flops"]
        assert (result["flops_over_pt"] == 1) is (schedule == "pt")


def test_the_saved_prompt_earns_the_reported_scores(run, here, tokenizer):
    """Validation is scored with the chosen prompt, dev after the last update with the last one."""
    rows = examples(12, 2)  # as write_task draws them
    gold = [row.target for row in rows]
    for name, result in zip(["pt-seed0", "cr-seed0"], run.results):
        lines = read_jsonl(run.out / name / "predictions.jsonl")
        assert [(line["source"], line["answers"]) for line in lines] == [
            (row.source, list(row.answers)) for row in rows]
        predictions = [line["prediction"] for line in lines]
        share = 100 * sum(p == g for p, g in zip(predictions, gold)) / 12
        assert result["validation"] == {"accuracy": pytest.approx(share)}
        assert result["validation_examples"] == 12
        assert result["majority"] == pytest.approx(100 * max(map(gold.count, gold)) / 12)
        assert result["constant_predictions"] is (len(set(predictions)) == 1)
        model, task = tiny(), fpt.Task("", ("yes", "no"))
        data = fpt.load_data(str(here / "task"), dev=500)
        for saved, split, scores in (("prompt", rows, result["validation"]),
                                     ("prompt", data.dev, result["dev"]),
                                     ("prompt-last", data.dev, result["last_dev"])):
            prompt = fpt.SoftPrompt(fpt.load_prompt(run.out / name / saved))
            assert fpt.evaluate(model, prompt, tokenizer, task, split, config())[0] == scores


def test_schedules_of_a_seed_share_the_start_and_the_data_order(run):
    pt0, cr0, pt1, cr1 = run.starts
    assert torch.equal(pt0, cr0) and torch.equal(pt1, cr1) and not torch.equal(pt0, pt1)
    orders = [[[row.source for row in batch] for batch in order] for order in run.orders]
    assert orders[0] == orders[1] != orders[2] == orders[3] and len(orders[0]) == 10
    names = [run.out / f"{name}-seed0/prompt-last" for name in ("pt", "cr")]
    assert not torch.equal(*map(fpt.load_prompt, names))  # the models they ran on were not the same


def test_the_screen_says_how_to_use_the_prompt_and_it_is_true(run, here):
    lines = run.text.splitlines()
    start = next(i for i, line in enumerate(lines) if "PeftModel" in line)
    code = [line.strip() for line in lines[start:start + 3]]
    namespace = {}
    exec("\n".join(code), namespace)
    prompt = namespace["model"].prompt_encoder["default"].embedding.weight
    assert torch.equal(prompt, fpt.load_prompt(run.out / "cr-seed1" / "prompt"))
    for result in run.results:  # the majority share is beside every score
        assert f"{result['majority']:.2f}" in run.text


def test_constant_predictions_are_called_out_and_a_partial_end_is(here, tmp_path, capsys):
    folder = write_task(tmp_path / "task")
    line = json.dumps({"source": "w01 w02", "target": "no"})
    (folder / "validation.jsonl").write_text(f"{line}\n{line}\n")  # equal in, equal out
    [result] = fpt.main(flags(here, tmp_path / "out", "--schedule", "0.5x0.5:1", "--task", folder))
    assert (result["validation_examples"], result["majority"]) == (2, 100)
    assert result["constant_predictions"] is True
    assert result["scored_on_full_model"] is False and result["flops_over_pt"] < 1
    said = "".join(capsys.readouterr())
    assert "same text" in said and "full model" in said
    assert (tmp_path / "out" / "0.5x0.5_1-seed0").is_dir()


def test_bf16_free_text_and_a_prompt_to_start_from(here, run, tmp_path):
    folder = write_task(tmp_path / "text", labels=[], max_target=4)
    start = run.out / "cr-seed0" / "prompt"
    [result] = fpt.main(flags(here, tmp_path / "out", "--task", folder, "--schedule", "cr",
                              "--precision", "bf16", "--init", start, "--steps", 1))
    assert list(result["validation"]) == ["em", "f1"]
    moved = fpt.load_prompt(tmp_path / "out/cr-seed0/prompt-last") - fpt.load_prompt(start)
    assert moved.pow(2).mean().sqrt().item() == pytest.approx(0.3, rel=0.01)  # one step from there


@pytest.mark.parametrize("init", ["uniform", "vocab", "labels"])
def test_the_start_that_init_names(init, here, tmp_path):
    fpt.main(flags(here, tmp_path / "out", "--init", init, "--schedule", "pt", "--steps", 1,
                   "--lr", 1e-9))
    rows, shared = fpt.load_prompt(tmp_path / "out/pt-seed0/prompt"), tiny().shared.weight
    distance = (rows[:, None] - shared).norm(dim=-1)
    nearest = [WORDS[i] for i in distance.argmin(1).tolist()]
    if init == "uniform":
        assert rows.abs().max() <= 0.25 + 1e-6 and distance.min() > 0.5
    else:
        assert distance.min(1).values.max() < 1e-3 and len(set(nearest)) == P
        assert (nearest[:2] == ["yes", "no"]) is (init == "labels")


def test_writes_are_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    fpt.write(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: 1 / 0)  # the machine stops before the last step
        with pytest.raises(ZeroDivisionError):
            fpt.write(path, "new, and longer")
    assert path.read_text() == "old"
    fpt.write(path, b"new")
    assert path.read_bytes() == b"new" and files(tmp_path) == ["file"]


# ====== Bad input: one line on stderr, exit code 2, nothing written ===============================


@pytest.fixture
def refused(here, tmp_path, capfd):
    """-> refused(flags): the line that `main` ends with. capfd: libraries must be silent too."""
    def run(*more, out=tmp_path / "out"):
        before = out.exists()
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            fpt.main(flags(here, out, *more))
        assert stop.value.code == 2 and out.exists() is before
        return one_line(capfd.readouterr().err)
    return run


BAD_FLAGS = [  # flags, what the line must say
    ("--nope 1", "--nope"), ("--steps many", "--steps.*many"), ("--schedul pt", "--schedul"),
    ("--model no/such-model", "no/such-model"), ("--task nope", "unknown task 'nope'.*rte.*folder"),
    ("--task rte", "nyu-mll/glue.*HF_HUB_OFFLINE=1"),
    ("--model t5-base", "t5-base.*HF_HUB_OFFLINE=1"),
    ("--schedule nope", "'nope'.*pt, ld, fr, cr"), ("--schedule pt 0.5x1:0.5", "0.5, not 1"),
    ("--schedule pt pt", "twice"), ("--seed 1 1", "twice"),
    ("--precision fp16", "fp32 or bf16.*overflow"), ("--precision int8", "fp32 or bf16"),
    ("--device cuda:99", "cuda:99"), ("--device abacus", "abacus"), ("--device meta", "meta"),
    ("--init nope", "nope"), ("--prompt-length 99 --init vocab", "99"),
    ("--limit -1", "--limit.*at least 0"), ("--lr 0", "--lr"), ("--lr nan", "--lr"),
    ("--lr inf", "--lr"), *((f"--{name} 0", f"--{name}.*at least 1") for name in (
        "steps", "batch", "dev", "eval-every", "prompt-length", "score-examples", "max-source")),
    ("--threads -1", "--threads.*at least 0")]


@pytest.mark.parametrize(("more", "says"), BAD_FLAGS)
def test_a_bad_flag(more, says, refused):
    line = refused(*more.split())
    assert re.search(says, line), line


BAD_FILES = [  # files of a task folder (None: removed), the file and line to name, the reason
    ({"task.json": None, "train.jsonl": None, "validation.jsonl": None}, "task.json", ""),
    *(({name: None}, name, "") for name in ("train.jsonl", "validation.jsonl")),
    *(({"task.json": text}, "task.json", why) for text, why in [
        ("{", ""), ("[]", "object"), ('{"labls": ["a", "b"]}', "labls"),
        ('{"labels": "yes no"}', "labels"), ('{"labels": ["yes"]}', "two"),
        ('{"labels": ["yes", 1]}', "labels"), ('{"max_target": 0}', "max_target"),
        ('{"labels": ["yes", "no"], "metric": "rouge_l"}', "rouge_l"),
        ('{"metric": "accuracy"}', "accuracy"),
        ('{"labels": ["yes", "no", "w01"], "metric": "accuracy_f1"}', "accuracy_f1")]),  # binary
    ({"train.jsonl": ""}, "task", "0 different"),
    ({"validation.jsonl": "\n"}, "task", "0 validation"),
    *(({"train.jsonl": text}, f"train.jsonl, line {line}", why) for text, line, why in [
        ("{}\n" * 20, 1, "source"), ('{"source": "s", "target": "yes"}\nrubbish\n', 2, ""),
        ('{"source": "s", "target": "yes"}\n\n["s", "yes"]\n', 3, "source"),
        ('{"source": "", "target": "yes"}\n', 1, "source"),
        ('{"source": "s", "target": 1}\n', 1, "target"),
        ('{"source": "s", "target": []}\n', 1, "target")]),
    ({"train.jsonl": b"\xff\xfe\n"}, "train.jsonl", ""),
    *(({"validation.jsonl": '{"source": "s", "target": %s}' % target}, "validation.jsonl, line 1",
       "yes, no") for target in ('"maybe"', '["yes"]')),  # none of the labels
    ({"task.json": '{"labels": ["yes", "no", "hm", "eh"]}'}, "", "'hm' and 'eh'")]  # both are <unk>


@pytest.mark.parametrize(("changes", "where", "why"), BAD_FILES)
def test_a_bad_task_folder(changes, where, why, tmp_path, refused):
    folder = write_task(tmp_path / "task")
    for name, content in changes.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("--task", folder)
    assert where in line and why in line.replace(where, ""), line


@pytest.mark.parametrize("kind", ["umt5", "bart", "gpt2"])
def test_a_model_that_is_no_t5(kind, tmp_path, refused):
    no_t5(kind).config.save_pretrained(tmp_path / "model")
    line = refused("--model", tmp_path / "model")
    assert kind in line and "T5" in line


def test_a_folder_that_is_no_model(tmp_path, refused):
    assert str(tmp_path) in refused("--model", tmp_path)


@pytest.mark.parametrize(("part", "error", "says"), [
    ("Tokenizer", ValueError("`tiktoken` is required to read a `tiktoken` file.\nInstall it"),
     "pip install sentencepiece protobuf"),
    ("Tokenizer", ImportError("\nT5Converter requires the protobuf library but it was not found"),
     "pip install sentencepiece protobuf"),
    ("Config", OSError("org/x is not a local folder and is not a valid model identifier\nlisted"),
     "org/x is not a local folder"),
    ("Config", OSError("We couldn't connect to 'https://huggingface.co' to load\nthe files"),
     "HF_HUB_OFFLINE=1"),
    ("ModelForSeq2SeqLM", RuntimeError("weights cut short\nin the middle"), "cut short in the")])
def test_what_the_libraries_say_in_many_lines(part, error, says, monkeypatch, refused):
    """Messages that they were seen to give, raised where they raise them."""
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(getattr(transformers, "Auto" + part), "from_pretrained", fail)
    assert says in refused()


def test_weights_cut_short(here, tmp_path, refused):
    shutil.copytree(here / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(tmp_path / "model") in refused("--model", tmp_path / "model")


def test_a_prompt_of_another_width_and_folders_without_one(tmp_path, refused):
    fpt.save_prompt(tmp_path / "wide", torch.zeros(P, D + 1), "another")
    (tmp_path / "empty").mkdir()
    for folder, says in ("wide", "17.*16"), ("empty", "no prompt"), ("none", "no prompt"):
        line = refused("--init", tmp_path / folder)
        assert re.search(says, line) and str(tmp_path / folder) in line


def test_init_labels_without_labels(tmp_path, refused):
    folder = write_task(tmp_path / "text", labels=[])
    assert "labels" in refused("--task", folder, "--init", "labels")


def test_nothing_is_overwritten(run, tmp_path, refused):
    before = {name: (run.out / name).read_bytes() for name in files(run.out)}
    (tmp_path / "file").write_text("mine")
    for out in run.out, tmp_path / "file":
        assert str(out) in refused(out=out)
    assert {name: (run.out / name).read_bytes() for name in files(run.out)} == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_that_is_not_finite_ends_the_program(here, tmp_path, capfd):
    model, folder = tiny(), tmp_path / "model"
    model.shared.weight[:] = math.nan
    shutil.copytree(here / "model", folder)
    model.save_pretrained(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        fpt.main(flags(here, tmp_path / "out", "--model", folder, "--schedule", "pt"))
    line = one_line(capfd.readouterr().err)
    assert stop.value.code == 2 and "update 1:" in line and "--lr" in line
    assert {"pt-seed0/bad-batch.jsonl", "pt-seed0/prompt-last-good/adapter_config.json"} <= set(
        files(tmp_path / "out"))


# ====== The comparison of runs ====================================================================


def fake_run(folder, schedule, seed, devs, flops, prompt=(1.0, 0.0), scoring=0, seconds=1.0):
    """The files of a run of 10 updates with an evaluation every 2, as `tune` writes them."""
    stages = fpt.parse_schedule(schedule)
    folder = folder / f"{schedule}-seed{seed}"
    folder.mkdir(parents=True)
    log = [{"step": 2 * k, "stage": fpt.stage_at(stages, 2 * k, 10) + 1, "flops": used,
            "scoring_flops": scoring, "dev": {"accuracy": dev}}
           for k, (dev, used) in enumerate(zip(devs, flops, strict=True), 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "config.json").write_text(json.dumps({"schedule": schedule, "steps": 10}))
    (folder / "results.json").write_text(json.dumps({
        "schedule": schedule, "seed": seed, "dev": {"accuracy": max(devs)}, "best_step": 2,
        "validation": {"accuracy": max(devs) - 1}, "flops_over_pt": 1,
        "scored_on_full_model": stages[-1][:2] == (1, 1)}))
    (folder / "seconds.json").write_text(json.dumps({"train": seconds, "eval": 1.0}))
    fpt.save_prompt(folder / "prompt-last", torch.tensor([prompt]), "tiny")
    return folder


@pytest.fixture
def fakes(tmp_path):
    """Two seeds of pt and of a schedule that runs updates 1-6 on a half and 7-10 on the whole."""
    grow = "0.5x1:0.6,1x1:0.4"
    return [
        fake_run(tmp_path, "pt", 0, [50, 60, 90, 80, 100], [20, 40, 60, 80, 100], seconds=8.0),
        fake_run(tmp_path, grow, 0, [50, 55, 70, 98, 99], [10, 20, 30, 50, 70], (1.0, 1.0), 1, 6.0),
        fake_run(tmp_path, "pt", 1, [50, 70, 60, 90, 98], [22, 44, 66, 88, 110], (0.0, 2.0)),
        fake_run(tmp_path, grow, 1, [50, 55, 60, 99, 97], [11, 22, 33, 55, 76], (-3.0, 3.0), 1)]


def test_a_comparison_by_hand(fakes):
    pt, cr = fpt.compare([fpt.read_run(folder) for folder in fakes])
    assert (pt["schedule"], pt["seeds"], cr["seeds"]) == ("pt", [0, 1], [0, 1])
    assert (pt["dev"], cr["dev"]) == ([100, 98], [99, 99])
    assert (pt["validation"], cr["validation"]) == ([99, 97], [98, 98])
    assert cr["flops"] == [71 / 100, 77 / 110] and pt["flops"] == [1, 1]
    assert cr["seconds"] == [6 / 8, 1]
    # Of pt at 71 FLOPs the next evaluation is at 80, the best until then 90; at 77: 88, and 90.
    assert cr["pt_equal_flops"] == [90, 90] and cr["gain"] == [9, 9] and pt["gain"] == [0, 0]
    # Four updates on the full model: what pt has after update 4.
    assert (cr["full_updates"], pt["full_updates"]) == (4, 10)
    assert cr["pt_full_updates"] == [60, 70] and pt["pt_full_updates"] == [100, 98]
    # The mean of pt ends at 99 and passes 98.01 at its last evaluation, 105 FLOPs. The mean of the
    # other, best so far, is 98.5 at its fourth: (51 + 56) / 2 FLOPs.
    assert (pt["flops_to_pt"], cr["flops_to_pt"]) == (1, pytest.approx(53.5 / 105))


def test_a_schedule_that_never_reaches_pt_and_one_without_it(fakes, tmp_path):
    row = fake_run(tmp_path / "row", "0.5x1:1", 0, [50, 51, 52, 53, 54], [1, 2, 3, 4, 5])
    runs = [fpt.read_run(folder) for folder in (fakes[0], row)]
    never = fpt.compare(runs)[1]
    assert never["flops_to_pt"] is None and never["full_updates"] == 0
    assert never["pt_full_updates"] is None
    dear = fake_run(tmp_path / "dear", "fr", 0, [50, 51, 52, 53, 100], [1, 2, 3, 4, 101])
    more = fpt.compare([runs[0], fpt.read_run(dear)])[1]  # pt has no more to spend
    assert more["pt_equal_flops"] is more["gain"] is None and more["flops"] == [1.01]
    assert fpt.against_pt(more)[2:4] == [None, None]
    assert fpt.against_pt(never)[2:] == ["50.0", "+4.0", None, "never"]
    text = fpt.tables(runs, fpt.compare(runs), fpt.similarity(runs))
    assert re.search(r"^0\.5x1:1\*  .*never$", text, flags=re.M) and "pt*" not in text
    [alone] = fpt.compare(runs[1:])
    assert "flops" not in alone and alone["dev"] == [54]
    assert len(fpt.figure(runs[1:], [alone]).axes[0].lines) > 0


def test_similarity_by_hand(fakes):
    rows = fpt.similarity([fpt.read_run(folder) for folder in fakes])
    assert [row["schedules"] for row in rows] == [
        ["pt", "pt"], ["pt", "0.5x1:0.6,1x1:0.4"], ["0.5x1:0.6,1x1:0.4"] * 2, ["random"]]
    half = math.sqrt(0.5)  # the cosine of 45 degrees
    assert [row["same_seed"] for row in rows] == [None, pytest.approx(half), None, None]
    assert [row["other_seed"] for row in rows][:3] == [
        pytest.approx(0), pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6)]
    assert abs(rows[3]["other_seed"]) < 1


def test_random_prompts_are_orthogonal_where_they_are_long():
    runs = [{"schedule": "pt", "seed": seed, "prompt": torch.ones(1280)} for seed in (0, 1)]
    same, random_ones = fpt.similarity(runs)  # one seed each way: pt with itself
    assert same["other_seed"] == pytest.approx(1)
    assert abs(random_ones["other_seed"]) < 4 / math.sqrt(1280 * 100)  # 100 pairs, 4 deviations


def test_intervals_and_spreads_by_hand():
    assert fpt.interval([1.0]) is None and fpt.spread([1.0]) == "1.0"
    # Two values: t(0.975, 1) is tan(0.475 pi) = 12.706, and the standard error half their distance.
    assert fpt.interval([1.0, 3.0]) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)
    assert fpt.interval([5.0, 5.0]) == (5, 5)
    assert fpt.spread([1.0, 3.0], 2) == "2.00 ± 1.41"


def test_the_figure_draws_what_the_logs_say(fakes):
    runs = [fpt.read_run(folder) for folder in fakes]
    axes = fpt.figure(runs, fpt.compare(runs)).axes[0]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert ([20 / 105, 40 / 105, 60 / 105, 80 / 105, 100 / 105], [50, 60, 90, 80, 100]) in lines
    thick = [line for line in lines if line[1] == [50, 55, 65, 98.5, 99]]  # means, best so far
    assert thick and thick[0][0] == pytest.approx([11.5 / 105, 22 / 105, 32.5 / 105, 53.5 / 105,
                                                   74 / 105])
    rings = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(ring.get_ydata()) for ring in rings if len(ring.get_ydata())] == [[65]]
    assert {"pt 99.0", " pt 90.0"} <= {text.get_text() for text in axes.texts}


def test_the_comparison_holds_what_the_run_folders_hold(run):
    found = json.loads((run.out / "comparison.json").read_text())
    assert found["settings"] == json.loads((run.out / "pt-seed0/config.json").read_text())
    for curve, folder in zip(found["curves"], ["pt-seed0", "cr-seed0", "pt-seed1", "cr-seed1"]):
        assert curve["dev"] == [row["dev"]["accuracy"]
                                for row in read_jsonl(run.out / folder / "log.jsonl")]
    assert (run.out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    pt, cr = found["schedules"]
    for row in pt, cr:
        runs = [json.loads((run.out / f"{row['schedule']}-seed{seed}" / "results.json").read_text())
                for seed in row["seeds"]]
        assert row["seeds"] == [0, 1]
        for key in "dev", "validation":
            assert row[key] == [result[key]["accuracy"] for result in runs]
        assert row["flops"] == pytest.approx([result["flops_over_pt"] for result in runs])
    for seed, equal, alone in zip((0, 1), cr["pt_equal_flops"], cr["pt_full_updates"]):
        log = read_jsonl(run.out / f"pt-seed{seed}" / "log.jsonl")  # evaluations at 4, 8, 10
        assert alone == log[0]["dev"]["accuracy"]  # four updates of the full model
        assert equal == max(row["dev"]["accuracy"] for row in log[:2 if cr["flops"][seed] <= 0.8
                                                                   else 3])
    prompts = {(name, seed): fpt.load_prompt(run.out / f"{name}-seed{seed}/prompt-last").flatten()
               for name in ("pt", "cr") for seed in (0, 1)}
    [row] = [row for row in found["cosines"] if row["schedules"] == ["pt", "cr"]]
    for key, seeds in ("same_seed", [(0, 0), (1, 1)]), ("other_seed", [(0, 1), (1, 0)]):
        cosines = [(prompts["pt", a] @ prompts["cr", b]
                    / prompts["pt", a].norm() / prompts["cr", b].norm()).item() for a, b in seeds]
        assert row[key] == pytest.approx(sum(cosines) / 2, abs=1e-6)
    for text in "comparison.png", "full updates", "gain over it", "other seed":
        assert text in run.text


# ====== The offline default =======================================================================

MICRO = ROOT / "micro"


@pytest.fixture(scope="module")
def make():
    """micro/make.py as a module."""
    return script(MICRO / "make.py")


def micro_rows(split):
    return [(row["source"], row["target"]) for row in read_jsonl(MICRO / "rte" / f"{split}.jsonl")]


def test_the_default_command_without_flags_of_its_own(tmp_path):
    """A few steps of `python fpt.py`, from another folder, where the hub cannot be reached."""
    done = python(ROOT / "fpt.py", "--steps", 8, "--eval-every", 4, "--dev", 40, "--limit", 40,
                  cwd=tmp_path, HF_HUB_OFFLINE=None, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    [out] = (tmp_path / "runs").iterdir()
    names = {path.name for path in out.iterdir()}
    assert names == {"pt-seed0", "cr-seed0", "pt-seed1", "cr-seed1", *COMMAND_FILES}
    assert str(Path("runs") / out.name / "comparison.png") in done.stdout
    assert "does not answer" not in done.stdout and "gain over it" in done.stdout
    assert "pre-trained with LayerDrop" in done.stdout.split("Figure: ")[1]
    settings = json.loads((out / "cr-seed1" / "config.json").read_text())
    assert (settings["steps"], settings["threads"], settings["prompt_length"]) == (8, 1, 20)
    assert settings["model"] == str(MICRO / "model")


def test_flags_of_a_task_folder_give_way_to_those_of_the_command(tmp_path, monkeypatch):
    folder = write_task(tmp_path / "task", flags="--steps 7 --schedule pt fr --seed 3 4")
    settings = fpt.parse_args(["--task", str(folder), "--schedule", "ld"])
    assert (settings.steps, settings.schedule, settings.seed) == (7, ["ld"], [3, 4])
    shutil.copytree(folder, tmp_path / "rte")
    monkeypatch.chdir(tmp_path)  # a name of the table is that task, whatever folder is at hand
    assert fpt.parse_args(["--task", "rte"]).steps == 30_000
    assert fpt.parse_args([]).schedule == ["pt", "cr"]  # the offline default


@pytest.mark.parametrize(("suggested", "says"), [
    ("--out /tmp", "may not set --out"), ("--model=evil/model", "may not set --model"),
    ("--init x", "may not set --init"), ("-h", "may not set -h"), ("--help", "may not set --help"),
    ("--steps 5 --seed", "task.json, flags: .*--seed"), ("--task rte", "may not set --task"),
    ("--steps many", "task.json, flags: .*--steps.*many"), ("stray", "task.json, flags: .*stray"),
    (5, "'flags'.*wrong type")])
def test_flags_that_a_task_folder_may_not_suggest(suggested, says, tmp_path, refused):
    line = refused("--task", write_task(tmp_path / "task", flags=suggested))
    assert re.search(says, line), line


def test_the_micro_model_has_the_vocabulary_of_make_and_is_small(make):
    model, tokenizer = fpt.load_model(str(MICRO / "model"), torch.device("cpu"), "fp32")
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == make.VOCABULARY
    assert model.shared.weight.shape == (len(make.VOCABULARY), 64)
    assert sum(path.stat().st_size for path in (MICRO / "model").iterdir()) <= 2.5e6
    unknown = {word for split in ("train", "validation") for row in micro_rows(split)
               for word in " ".join(row).split()} - set(make.VOCABULARY)
    assert not unknown
    text = "sentence1: a red dog runs in the park <extra_id_9>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text + " </s>"


def test_the_micro_task_is_large_enough_and_its_splits_do_not_overlap():
    train, validation = micro_rows("train"), micro_rows("validation")
    assert len(train) >= 4000 and len(validation) >= 1000
    sources = [source for source, _ in train + validation]
    assert len(set(sources)) == len(sources)
    for rows in train, validation:
        assert 0.45 < sum(target == "yes" for _, target in rows) / len(rows) < 0.55


def test_the_labels_of_the_micro_task_by_the_words_alone(make):
    """Entailed: each content word of the second sentence is in the first, or is the kind of one
    that is. What `make` knows of slots and order is not used."""
    for split in "train", "validation":
        for source, target in micro_rows(split):
            first, second = (set(part.split()) - set("a an in the".split()) for part in
                             source.removeprefix("sentence1: ").split(" sentence2: "))
            implied = first | {make.KIND[word] for word in first if word in make.KIND}
            assert (second <= implied) is (target == "yes"), source


def test_the_micro_model_knows_entailment_and_not_the_shipped_question(make):
    """What a prompt has to call up is there, in the whole and in parts; unprompted it is not."""
    model, tokenizer = fpt.load_model(str(MICRO / "model"), torch.device("cpu"), "fp32")
    assert make.exact(model, tokenizer, make.entailment) > 98
    for depth in 0.25, 0.5, 0.75:
        part = fpt.partial_t5(model, depth, 1, decoder=False)
        assert make.exact(part, tokenizer, make.entailment) > 95
    data = fpt.load_data(str(MICRO / "rte"), dev=500, limit=300)
    nothing = fpt.SoftPrompt(torch.zeros(0, 64))
    scores, _ = fpt.evaluate(model, nothing, tokenizer, data.task, data.validation, config())
    assert scores["accuracy"] < 65


def test_make_is_deterministic_and_makes_what_is_shipped(make, tmp_path, capsys):
    for name in "first", "second":
        make.main(["--out", str(tmp_path / name), "--steps", "3"])
    assert files(tmp_path / "first") == files(tmp_path / "second")
    for name in files(tmp_path / "first"):
        first = (tmp_path / "first" / name).read_bytes()
        assert first == (tmp_path / "second" / name).read_bytes()
        if name.startswith("rte/"):  # the model's files depend on steps and versions
            assert first == (MICRO / name).read_bytes(), name
    assert "entailment with 25% of the encoder" in capsys.readouterr().out


@pytest.mark.parametrize("settings", ["--steps 500", "--seed 2", "--whole", "--steps 0 --out x"])
def test_make_does_not_replace_what_is_shipped_by_something_else(settings, make, capsys):
    before = (MICRO / "model" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        make.main(settings.split())
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("usage: make.py")
    assert (MICRO / "model" / "model.safetensors").read_bytes() == before


# ====== Nothing lost ==============================================================================


def checkpoint(folder):
    """What a checkpoint holds, without its seconds."""
    tensors, facts = fpt.unsealed((folder / "checkpoint.safetensors").read_bytes())
    return ({name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
            {**facts, "seconds": None})


def assert_same_run(one, two, but=("config.json",)):
    """Of two folders; config.json tells where each is."""
    assert files(one) == files(two) and checkpoint(one) == checkpoint(two)
    for name in set(files(one)) - {"checkpoint.safetensors", "seconds.json", *but}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.fixture
def at(monkeypatch):
    """-> at(step, do): `do()` comes in the middle of this update of the next run."""
    def plan(step, do):
        calls, original = [], fpt.gradient

        def gradient(*how):
            calls.append(1)
            if len(calls) == step:
                do()
            return original(*how)
        monkeypatch.setattr(fpt, "gradient", gradient)
    return plan


@pytest.mark.parametrize("stop", [1, 4, 7, 13, 20, "evaluation"])
def test_a_stopped_run_goes_on_to_the_same_bytes_at_its_stage(stop, training, monkeypatch):
    """Growth follows updates 4, 8, 12. After 13 the official code would begin with 2 layers."""
    whole, calls = training("cr", folder="whole"), []
    name = "evaluate" if stop == "evaluation" else "update"
    original = getattr(fpt, name)

    def interrupted(*how):
        calls.append(1)
        if len(calls) == 2 and stop == "evaluation":
            raise KeyboardInterrupt
        found = original(*how)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fpt, name, interrupted)
        training("cr", folder="cut")
    done = 10 if stop == "evaluation" else stop
    assert checkpoint(whole.folder.with_name("cut"))[1]["step"] == done
    run = training("cr", folder="cut")
    assert run.encoders == whole.encoders[done:] and torch.equal(run.weight, whole.weight)
    assert run.log == whole.log and torch.equal(run.best[0], whole.best[0])
    assert_same_run(run.folder, whole.folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_update_save_and_say_how_to_go_on(number, run, here, tmp_path, at, capfd,
                                                             monkeypatch):
    at(13, lambda: signal.raise_signal(number))  # update 3 of the second run
    out = tmp_path / "with space"
    with pytest.raises(SystemExit) as stop:
        fpt.main(flags(here, out, "--schedule", "pt", "cr", "--seed", 0, 1))
    line = one_line(capfd.readouterr().err)
    assert stop.value.code == 128 + number and number.name in line
    assert checkpoint(out / "cr-seed0")[1]["step"] == 3 and not (out / "pt-seed1").exists()
    monkeypatch.undo()
    command = shlex.split(line.split("To go on: ")[1])
    assert command[0] == "python" and command[1] == os.path.abspath(sys.argv[0])
    results = fpt.main(command[2:])
    text = capfd.readouterr().out
    assert results == run.results and "finished before" in text and "gain over it" in text
    for name in "pt-seed0", "cr-seed0", "pt-seed1", "cr-seed1":
        assert_same_run(out / name, run.out / name)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["pt-seed0", "cr-seed0", "pt-seed1", "cr-seed1", *COMMAND_FILES])


def test_a_signal_before_there_is_a_folder(here, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fpt, "load_model", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        fpt.main(flags(here, tmp_path / "out"))
    assert stop.value.code == 143
    assert one_line(capfd.readouterr().err) == "fpt.py: stopped by SIGTERM"


def test_killed_at_any_instant_a_command_ends_in_the_same_bytes(tmp_path):
    """A few of the kills of evidence/kill.py, in writes and at growths too."""
    done = python(ROOT / "evidence/kill.py", "--kills", 6, "--seed", 1, "--out", "kills.json",
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "kills.json").read_text())
    assert min(record["kills"].values()) >= 1 and sum(record["kills"].values()) >= 6
    assert record["different_files"] == [] and record["files_compared"] == 23


def fails(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))
    return fail


FAULTS = {  # what happens in update 6, what the line says
    "disk full": (lambda out: setattr(os, "fsync", fails(errno.ENOSPC)),
                  "checkpoint.safetensors: No space left"),
    "folder removed": (shutil.rmtree, "No such file"),
    "read-only": (lambda out: setattr(os, "replace", fails(errno.EROFS)), "Read-only file system")}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_happens_to_a_disk_is_one_line_and_loses_nothing(fault, run, here, tmp_path, at, capfd,
                                                              monkeypatch):
    do, says = FAULTS[fault]
    out = tmp_path / "out"
    monkeypatch.setattr(os, "replace", os.replace)  # to be undone below
    monkeypatch.setattr(os, "fsync", os.fsync)
    at(6, lambda: do(out))
    with pytest.raises(SystemExit) as stop:
        fpt.main(flags(here, out, "--schedule", "pt", "--save-seconds", 0))
    line = one_line(capfd.readouterr().err)
    assert stop.value.code == 2 and says in line and "--resume" in line and str(out) in line
    monkeypatch.undo()
    if fault == "folder removed":
        assert not out.exists()
    else:
        assert checkpoint(out / "pt-seed0")[1]["step"] == 5
        assert not list(out.rglob("*.tmp"))
        fpt.main(["--resume", str(out)])
        assert_same_run(out / "pt-seed0", run.out / "pt-seed0")


def test_two_commands_do_not_share_a_folder(here, tmp_path, at, capfd):
    lines, out = [], tmp_path / "out"

    def again():
        for other in flags(here, out), ["--resume", str(out / "pt-seed0")]:
            with pytest.raises(SystemExit) as stop:
                fpt.main(other)
            lines.append((stop.value.code, one_line(capfd.readouterr().err)))

    at(3, again)
    fpt.main(flags(here, out, "--schedule", "pt"))
    assert [code for code, _ in lines] == [2, 2]
    assert "is not empty" in lines[0][1] and "in use by another" in lines[1][1]
    assert files(out / "pt-seed0") == RUN_FILES


def test_a_clock_that_jumps_changes_nothing(run, here, tmp_path, monkeypatch):
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 4e9))
    fpt.main(flags(here, tmp_path / "out", "--schedule", "pt"))
    assert_same_run(tmp_path / "out" / "pt-seed0", run.out / "pt-seed0")
    seconds = json.loads((tmp_path / "out/pt-seed0/seconds.json").read_text())
    assert 0 < seconds["train"] < 60 and 0 < seconds["eval"] < 60


def test_a_step_that_makes_the_prompt_infinite_is_not_made(run, here, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        fpt.main(flags(here, tmp_path / "out", "--schedule", "pt", "--lr", "1e39"))
    assert stop.value.code == 2 and "update 1:" in one_line(capfd.readouterr().err)
    kept = fpt.load_prompt(tmp_path / "out" / "pt-seed0" / "prompt-last-good")
    assert torch.equal(kept, run.starts[0])


def test_what_resume_refuses(run, here, tmp_path, capfd):
    """Other settings, another task, no folder, a damaged file: one line, and nothing changes."""
    out = tmp_path / "out"
    shutil.copytree(here, tmp_path / "here")
    fpt.main(flags(tmp_path / "here", out, "--schedule", "cr"))
    (out / "cr-seed0" / "results.json").unlink()
    train = tmp_path / "here" / "task" / "train.jsonl"
    file, command = out / "cr-seed0" / "checkpoint.safetensors", out / "command.json"
    bytes_, text, rows = file.read_bytes(), command.read_text(), train.read_text()

    def refuse(says, *more, resume=out):
        before = {name: (out / name).read_bytes() for name in files(out)}
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            fpt.main(["--resume", str(resume), *more])
        assert stop.value.code == 2 and re.search(says, one_line(capfd.readouterr().err))
        assert {name: (out / name).read_bytes() for name in files(out)} == before

    refuse("not --lr", "--lr", "0.1")
    refuse("command.json", resume=tmp_path / "none")
    refuse("command.json", resume=tmp_path)
    for wrong in "{", "[]", '{"steps": "many"}', '{"nope": 1}', "[" * 99999:
        command.write_text(wrong)
        refuse("command.json")
    command.write_text(text)
    train.write_text(rows + '{"source": "w01 w02 w01 w02", "target": "no"}\n')
    refuse("another data: it cannot go on")
    train.write_text(rows)
    middle = len(bytes_) // 2
    for damaged in (b"", bytes_[:-1], bytes_[:middle], bytes_ + b"0", pickle.dumps({"prompt": 1}),
                    bytes_[:middle] + bytes([bytes_[middle] ^ 1]) + bytes_[middle + 1:]):
        file.write_bytes(damaged)
        refuse("checkpoint.*no whole")
    file.write_bytes(bytes_)
    fpt.main(["--resume", str(out), "--threads", "1"])
    assert_same_run(out / "cr-seed0", run.out / "cr-seed0", (  # they name the model's folder
        "config.json", "results.json", *(f"{part}/adapter_config.json" for part in (
            "prompt", "prompt-last"))))


# ====== Nothing trusted ===========================================================================


class Planted:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def test_a_planted_pickle_is_never_loaded(here, tmp_path, refused):
    canary, model = tmp_path / "canary", tmp_path / "model"
    pickle.loads(pickle.dumps(Planted(canary)))
    canary.unlink()  # it would have worked
    shutil.copytree(here / "model", model)
    (model / "model.safetensors").unlink()
    torch.save({"shared.weight": Planted(canary)}, model / "pytorch_model.bin")
    assert "more than weights" in refused("--model", model)
    fpt.save_prompt(tmp_path / "prompt", torch.zeros(P, D), "x")
    weights = tmp_path / "prompt" / "adapter_model.safetensors"
    for name in "adapter_model.safetensors", "adapter_model.bin":
        weights.unlink(missing_ok=True)
        (tmp_path / "prompt" / name).write_bytes(pickle.dumps(Planted(canary)))
        assert "no prompt" in refused("--init", tmp_path / "prompt")
    assert not canary.exists()


def test_weights_that_are_a_pickle_of_weights_load_and_it_is_said(here, tmp_path, run, capfd):
    shutil.copytree(here / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), tmp_path / "model" / "pytorch_model.bin")
    model, _ = fpt.load_model(str(tmp_path / "model"), torch.device("cpu"), "fp32")
    assert "weights-only loader" in capfd.readouterr().out
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize("kind", ["t5", "special"])
def test_code_that_a_model_brings_is_not_run(kind, here, tmp_path, refused):
    model, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(here / "model", model)
    for name, classes in (
            ("config.json", {"AutoConfig": "own.A", "AutoModelForSeq2SeqLM": "own.B"}),
            ("tokenizer_config.json", {"AutoTokenizer": ["own.C", "own.C"]})):
        spec = json.loads((model / name).read_text())
        spec["auto_map"] = classes
        if name == "config.json":
            spec["model_type"] = kind
        (model / name).write_text(json.dumps(spec))
    (model / "own.py").write_text(f"open({str(canary)!r}, 'w')")
    if kind == "special":
        assert "code of its own" in refused("--model", model)
    else:
        fpt.load_model(str(model), torch.device("cpu"), "fp32")
    assert not canary.exists()


def test_a_task_folder_cannot_point_outside_itself(tmp_path, refused):
    folder = write_task(tmp_path / "task")
    outside = tmp_path / "secret.jsonl"
    (folder / "train.jsonl").rename(outside)
    (folder / "train.jsonl").symlink_to(outside)
    assert "points outside" in refused("--task", folder)
    (folder / "train.jsonl").unlink()
    outside.rename(folder / "inside.jsonl")
    (folder / "train.jsonl").symlink_to("inside.jsonl")
    assert len(fpt.load_data(str(folder), 10).train) > 10


@pytest.mark.parametrize(("change", "says"), [
    ("missing", "1 are missing.*wo.weight"), ("more layers", "block.6"),
    ("fewer layers", "block.5"), ("wider", "do not fit|size"),
    ("no start", "decoder_start_token_id")])
def test_weights_that_do_not_fit_are_not_made_up(change, says, here, tmp_path, refused):
    """transformers draws what is missing at random and passes over the rest."""
    shutil.copytree(here / "model", tmp_path / "model")
    file, spec = tmp_path / "model/model.safetensors", tmp_path / "model/config.json"
    weights, settings = safetensors.torch.load_file(file), json.loads(spec.read_text())
    if change == "missing":
        del weights["encoder.block.2.layer.1.DenseReluDense.wo.weight"]
    else:
        settings.update({
            "more layers": {"num_layers": 7}, "fewer layers": {"num_layers": 5},
            "wider": {"d_ff": 33}, "no start": {"decoder_start_token_id": None}}[change])
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    spec.write_text(json.dumps(settings))
    assert re.search(says, refused("--model", tmp_path / "model"))


def test_settings_model_and_start_cannot_change_between_stop_and_resume(here, tmp_path, at, capfd):
    """Two schedules; the second is stopped, the first is finished, a third would follow."""
    shutil.copytree(here, tmp_path / "here")
    out, weights = tmp_path / "out", tmp_path / "here/model/model.safetensors"
    at(13, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        fpt.main(flags(tmp_path / "here", out, "--schedule", "pt", "cr", "fr"))
    command = json.loads((out / "command.json").read_text())

    def refuse(says):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            fpt.main(["--resume", str(out)])
        assert stop.value.code == 2 and re.search(says, one_line(capfd.readouterr().err))

    for change, says in (({"lr": 0.1}, "another lr"), ({"steps": 12}, "another steps"),
                         ({"prompt_length": 2}, "another start"), ({"seed": []}, "'seed'"),
                         ({"schedule": [[1]]}, "'schedule'"), ({"seed": [1.5]}, "'seed'")):
        (out / "command.json").write_text(json.dumps({**command, **change}))
        refuse(says)
    (out / "command.json").write_text(json.dumps({**command, "lr": 0.1, "schedule": ["cr"]}))
    refuse("checkpoint.*another settings")
    (out / "command.json").write_text(json.dumps(command))
    before, tensors = weights.read_bytes(), safetensors.torch.load_file(weights)
    tensors["decoder.block.5.layer.2.DenseReluDense.wo.weight"] *= -1
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    refuse("another weights: it cannot go on")
    weights.write_bytes(before)
    assert [result["schedule"] for result in fpt.main(["--resume", str(out)])] == ["pt", "cr", "fr"]


def test_nothing_is_written_through_a_link(run, here, tmp_path, refused, capfd):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    out.mkdir()
    (out / "command.json.tmp").symlink_to(victim)
    assert "not empty" in refused(out=out)
    resumed = tmp_path / "resumed"
    shutil.copytree(run.out, resumed)
    (resumed / "cr-seed0" / "results.json").unlink()
    (resumed / "cr-seed0" / "results.json.tmp").symlink_to(victim)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        fpt.main(["--resume", str(resumed)])
    assert "symbolic link" in one_line(capfd.readouterr().err)
    fpt.write(resumed / "cr-seed0" / "results.json", "new")  # nor by the function alone
    assert victim.read_text() == "precious"


def test_a_command_does_not_write_inside_another(run, refused):
    assert "another command" in refused(out=run.out / "cr-seed2")


@pytest.mark.parametrize(("name", "content", "says"), [
    ("train.jsonl", r'{"source": "a \ud800", "target": "yes"}', "train.jsonl, line 1.*surrogates"),
    ("task.json", r'{"labels": ["yes", "no \ud800"]}', "task.json, line 1.*surrogates"),
    ("task.json", '{"max_target": 1%s}' % ("0" * 30), "max_target"),
    ("task.json", "loop", "task.json"), ("task.json", "pipe", "regular file"),
    ("validation.jsonl", "pipe", "regular file"), ("task.json", "/dev/zero", "outside")])
def test_strange_files_of_a_task(name, content, says, tmp_path, refused):
    path = write_task(tmp_path / "task") / name
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content in ("loop", "/dev/zero"):
        path.symlink_to(path if content == "loop" else content)
    else:
        path.write_text(content)
    assert re.search(says, refused("--task", tmp_path / "task"))


def test_a_prompt_of_another_model_is_refused_or_warned_of(here, run, tmp_path, refused, capfd):
    """By family, by tokenizer, by weights; and where nobody wrote down what it was trained on."""
    prompt = tmp_path / "prompt"
    shutil.copytree(run.out / "pt-seed0" / "prompt", prompt)
    known = json.loads((prompt / "trained-on.json").read_text())
    for key in "family", "tokenizer":
        (prompt / "trained-on.json").write_text(json.dumps({**known, key: "other"}))
        assert re.search(f"another {key}.*other", refused("--init", prompt))
    model, tokenizer = fpt.load_model(str(here / "model"), torch.device("cpu"), "bf16")
    assert fpt.fingerprint(model, tokenizer).items() <= known.items()  # in either precision
    settings = config(init=str(prompt), model="this")
    for content, says in ((known, ""), ({**known, "weights": "other"}, "other weights"),
                          (None, "does not say")):
        if content is None:
            (prompt / "trained-on.json").unlink()
        else:
            (prompt / "trained-on.json").write_text(json.dumps(content))
        capfd.readouterr()
        fpt.check_origin(settings, model, tokenizer)
        assert (says in capfd.readouterr().out) if says else not capfd.readouterr().out


def test_sources_that_are_cut_are_counted_and_told(here, tmp_path, tokenizer, capfd):
    texts = ["w01 " * length for length in (3, 4, 5, 9)]
    rows = fpt.encode(tokenizer, YES_NO, config(max_source=5), [
        fpt.Example(text, "yes", ("yes",)) for text in texts])
    assert [row.cut for row in rows] == [False, False, True, True]
    cut = tokenizer(texts, truncation=True, max_length=5).input_ids  # as the tokenizer cuts
    assert [row.source for row in rows] == cut
    [result] = fpt.main(flags(here, tmp_path / "out", "--schedule", "pt", "--max-source", 5))
    validation = read_jsonl(here / "task" / "validation.jsonl")
    longer = sum(len(row["source"].split()) > 4 for row in validation)
    assert result["cut_sources"] == longer > 0
    assert f"{longer} of {len(validation)} sources were longer" in capfd.readouterr().out
    assert read_jsonl(tmp_path / "out/pt-seed0/log.jsonl")[-1]["cut_sources"] > 0


def test_a_t5_of_another_layout_names_the_versions():
    model = tiny()
    model.decoder.block[3].layer[1].EncDecAttention.k = torch.nn.Identity()
    with pytest.raises(ValueError, match=f"{transformers.__version__} builds T5 other.*weight"):
        fpt.partial_t5(model, 0.5, 1)


# ====== Bad input by the thousand (FPT_EXAMPLES=1000 for more) ====================================

EXAMPLES = int(os.environ.get("FPT_EXAMPLES", 25))
by_the_thousand = hypothesis.settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 25, database=None,
    suppress_health_check=list(hypothesis.HealthCheck))
integers, sampled = st.integers(0, 10**6), st.sampled_from


@st.composite
def damaged(draw, content: bytes):
    """A file of this content after an accident: cut, flipped, filled, doubled, emptied, mixed."""
    kind = draw(sampled(["cut", "flip", "insert", "replace", "double", "empty", "whole", "long"]))
    place = draw(integers) % max(1, len(content))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ (1 << draw(integers) % 8)]) + (
            content[place + 1:])
    if kind in ("insert", "replace"):
        more = draw(st.binary(max_size=9) | sampled([
            b"NaN", b"null", b"[" * 99999, b"\xff\xfe", b"\x00", b'"a": 1, "a": 2', b"1e999",
            b"-1", b"\n", b"{}", '"\u20ac"'.encode(), b"true", b'{"source": 1}', b"9" * 5000]))
        return content[:place] + more + content[place + len(more) * (kind == "replace"):]
    return {"cut": content[:place], "double": content * 2, "empty": b"", "whole": content,
            "long": content[:place] + b"w01 " * 2_500_000 + content[place:]}[kind]


def works_or_one_line(arguments, folder, capfd):
    """Does `main` return, or end with one line and code 2? Files in `folder` stay as they are."""
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    capfd.readouterr()
    try:
        fpt.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        assert stop.code == 2
        error = capfd.readouterr().err
        one_line(error)
        assert len(error) < 1500, error
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


@pytest.fixture
def untrained(monkeypatch):
    """`main` without its last part: all is read and checked, nothing is trained."""
    monkeypatch.setattr(fpt, "tune", lambda *_: {})
    monkeypatch.setattr(fpt, "report", lambda *_: None)


@by_the_thousand
@hypothesis.given(st.text(max_size=40) | st.lists(st.tuples(
    *3 * [st.floats() | sampled([0.25, 0.5, 1, "", "x", "1.1.1"])]), max_size=60).map(
    lambda stages: ",".join("{}x{}:{}".format(*stage) for stage in stages)))
def test_any_text_is_a_schedule_or_a_reason(text):
    try:
        stages = fpt.parse_schedule(text)
    except ValueError as error:
        assert "schedule" in str(error)
    else:
        assert sum(stage.share for stage in stages) == pytest.approx(1)
        assert all(0 < number <= 1 for stage in stages for number in stage)
        assert fpt.stage_at(stages, 7, 7) == len(stages) - 1
        assert len(fpt.run_name(text, 10**9)) < 200


@by_the_thousand
@hypothesis.given(data=st.data())
def test_any_task_folder_works_or_is_one_line(data, untrained, here, tmp_path_factory, capfd):
    folder = write_task(tmp_path_factory.mktemp("any") / "task")
    name = data.draw(sampled(["task.json", "train.jsonl", "validation.jsonl"]))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(damaged(content)))
    works_or_one_line(flags(here, folder.with_name("out"), "--task", folder), folder, capfd)


@by_the_thousand
@hypothesis.given(data=st.data())
def test_any_prompt_folder_works_or_is_one_line(data, untrained, here, run, tmp_path_factory,
                                                capfd):
    folder = tmp_path_factory.mktemp("prompt") / "prompt"
    shutil.copytree(run.out / "pt-seed0" / "prompt", folder)
    name = data.draw(sampled(PROMPT_FILES))
    if data.draw(st.booleans()):
        (folder / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    else:  # whole files with strange content
        tensor = data.draw(sampled([
            torch.zeros(P, D, dtype=torch.int64), torch.zeros(P, D, dtype=torch.float16),
            torch.full((P, D), 1e39, dtype=torch.float64), torch.zeros(0, D), torch.zeros(P, 0),
            torch.zeros(P * D), torch.zeros(1, P, D), torch.zeros(P, D, dtype=torch.bool),
            torch.full((P, D), math.nan), torch.zeros(P, D, dtype=torch.complex64),
            torch.full((P, D), 3e38)]))
        (folder / PROMPT_FILES[1]).write_bytes(safetensors.torch.save(
            {data.draw(sampled(["prompt_embeddings", "other"])): tensor}))
    works_or_one_line(flags(here, folder.with_name("out"), "--init", folder), folder, capfd)


ODD = st.text(max_size=8) | sampled([
    "", "0", "-1", "pt", "cr", "nan", "inf", "1e400", "x" * 5000, "/", ".", "..", "~", "\0", "rte",
    "bf16", "fp32", "1x1:1", "0.5x1:1", "\u20ac", "--seed", "-h ", "0x10", "vocab", "labels"])
VALUES = {int: st.integers(0, 50) | st.integers(1, 9) | st.integers(-10**20, 10**20) | ODD,
          str: ODD, float: st.floats() | ODD, bool: st.just("")}


@st.composite
def a_flag(draw):
    """A flag with a value of its type, or not quite. Where to write and compute is not varied."""
    field = draw(sampled([field for field in dataclasses.fields(fpt.Config)
                          if field.name not in ("out", "resume", "device")]))
    default = field.default[0] if isinstance(field.default, tuple) else field.default
    value = draw(VALUES[type(default)])
    return [f"--{field.name.replace('_', '-')}", *([value] if value != "" else [])]


@by_the_thousand
@hypothesis.given(st.lists(a_flag(), min_size=1, max_size=3))
def test_any_flags_work_or_are_one_line(untrained, here, tmp_path_factory, capfd, more):
    out = tmp_path_factory.mktemp("flags") / "out"
    threads = torch.get_num_threads()
    works_or_one_line([*flags(here, out, "--steps", 1), *itertools.chain(*more)], here, capfd)
    torch.set_num_threads(threads)


@by_the_thousand
@hypothesis.given(data=st.data())
def test_any_damage_to_a_finished_command_is_one_line_or_none(data, run, here, tmp_path_factory,
                                                              capfd, monkeypatch):
    picture = types.SimpleNamespace(savefig=lambda *_, **__: None)
    monkeypatch.setattr(fpt, "figure", lambda *_: picture)  # half a second each
    out = tmp_path_factory.mktemp("run") / "out"
    shutil.copytree(run.out, out)
    for name in "comparison.json", "comparison.png":
        (out / name).unlink()
    monkeypatch.setattr(fpt, "write", lambda *_: None)
    name = data.draw(sampled(["command.json", "pt-seed0/results.json", "cr-seed1/config.json",
                              "cr-seed0/log.jsonl", "cr-seed0/seconds.json"]))
    content = (out / name).read_bytes()
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    else:  # one value is another
        line = json.loads(content.splitlines()[0] if name.endswith("l") else content)
        line[data.draw(sampled(sorted(line)))] = data.draw(sampled([
            None, [], {}, [5], [[1]], [{}], "x", 0, -1, 10**12, 1.5, math.nan, True, {"a": None}]))
        content = json.dumps(line).encode()
    (out / name).write_bytes(content)
    works_or_one_line(["--resume", out], out, capfd)


# ====== In processes of their own =================================================================


def test_a_run_from_the_command_line_repeats_the_one_above_bit_for_bit(run, here, tmp_path):
    done = python(ROOT / "fpt.py", *flags(here, "out", "--schedule", "cr"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out" / "cr-seed0") == RUN_FILES
    mine, theirs = tmp_path / "out/cr-seed0", run.out / "cr-seed0"
    results = [json.loads((folder / "results.json").read_text()) for folder in (mine, theirs)]
    assert results[0] == results[1]
    for name in "prompt/adapter_model", "prompt-last/adapter_model":
        assert len({(f / f"{name}.safetensors").read_bytes() for f in (mine, theirs)}) == 1
    assert "Error importing" not in done.stdout  # what datasets prints if it is imported first


def test_two_processes_make_the_run_of_one(here, tmp_path):
    """Over every growth; batches of 5 and 12 validation examples are no multiples of 2."""
    more = ("--schedule 0.5x0.5:0.3,0.75x1:0.3,1x1:0.4 --steps 3 --batch 5 --eval-every 2 "
            "--score-examples 7").split()
    for count in 1, 2:
        done = python("-m", "torch.distributed.run", "--nproc_per_node", count, ROOT / "fpt.py",
                      *flags(here, count, *more), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("validation accuracy") == 1  # rank 0 alone is heard
    one, two = (next((tmp_path / count).glob("*-seed0")) for count in "12")
    assert files(one) == files(two) == RUN_FILES
    torch.testing.assert_close(fpt.load_prompt(two / "prompt-last"),
                               fpt.load_prompt(one / "prompt-last"), rtol=0, atol=1e-5)
    assert (one / "predictions.jsonl").read_text() == (two / "predictions.jsonl").read_text()
    for a, b in zip(read_jsonl(one / "log.jsonl"), read_jsonl(two / "log.jsonl"), strict=True):
        assert (a["step"], a["stage"], a["dev"]) == (b["step"], b["stage"], b["dev"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert b["flops"] <= a["flops"]  # shards are padded to their own longest


def test_one_of_two_processes_killed_and_the_run_goes_on_in_one(here, tmp_path, monkeypatch):
    """The other ends with a message, well within a minute; the last checkpoint is whole."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               str(ROOT / "fpt.py"), *flags(here, tmp_path / "out", "--schedule", "cr", "--steps",
                                            4000, "--eval-every", 1000, "--save-seconds", 0)]
    with open(tmp_path / "errors", "w+") as errors:
        torchrun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        saved, deadline = tmp_path / "out/cr-seed0/checkpoint.safetensors", time.monotonic() + 60
        while not saved.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True)
        start, [_, victim] = time.monotonic(), sorted(map(int, workers.stdout.split()))
        os.kill(victim, signal.SIGKILL)
        assert torchrun.wait(60) != 0 and time.monotonic() - start < 60
        errors.seek(0)
        text = errors.read()
    assert re.search(r"fpt\.py: .*(another process of this run has ended|stopped by SIGTERM).*"
                     r"torchrun --nproc_per_node=2 .*fpt\.py --resume", text), text
    _, facts = checkpoint(saved.parent)
    assert 0 < facts["step"] < 4000
    with pytest.raises(SystemExit) as stop:  # one process goes on from there, and is stopped
        gradient = fpt.gradient
        monkeypatch.setattr(fpt, "gradient", lambda *how: (
            signal.raise_signal(signal.SIGTERM), gradient(*how))[1])
        fpt.main(["--resume", str(tmp_path / "out")])
    assert stop.value.code == 143 and checkpoint(saved.parent)[1]["step"] == facts["step"] + 1


def test_processes_that_would_get_nothing_are_refused(refused, monkeypatch):
    assert "--batch 4" in refused("--accumulate", 5) and "need 5" in refused("--accumulate", 5)
    monkeypatch.setattr(fpt, "workers", lambda: 3)
    monkeypatch.setattr(fpt, "join", lambda device: None)
    assert "3 processes with --accumulate 2 need 6" in refused("--accumulate", 2)


def test_the_benchmark_writes_what_it_measured_and_refuses_in_one_line(tmp_path):
    bench, out = ROOT / "evidence" / "bench.py", tmp_path / "bench.json"
    command = bench, "--part", "overhead", "--rounds", "1", "--out", out
    done = python(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [(title, result)] = json.loads(out.read_text())["results"].items()
    assert title in done.stdout and 0 < result["nothing"] and result["share"] == (
        result["nothing"] / result["update"])
    before = out.read_bytes()
    for wrong in command, (bench, "--shape", "t5"), (bench, "--batch", "0"):
        done = python(*wrong, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert out.read_bytes() == before


def test_odd_moments_and_closed_streams(tmp_path):
    """A signal while torch is imported; then a run with nowhere to print."""
    (tmp_path / "torch.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    start = subprocess.Popen([sys.executable, ROOT / "fpt.py"], cwd=tmp_path, text=True,
                             env={**os.environ, "PYTHONPATH": str(tmp_path)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert start.stdout.readline() == "here\n"
    start.send_signal(signal.SIGINT)
    assert start.communicate(timeout=30) == ("", "") and start.returncode == 130
    done = subprocess.run(f"{sys.executable} {ROOT / 'fpt.py'} --device abacus >&-", shell=True,
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "abacus" in one_line(done.stderr)


def test_the_study_changes_what_it_says():
    study = script(ROOT / "evidence" / "study.py")
    for total in 8, 24:
        sets = [set(study.nested(total, keep)) for keep in range(1, total + 1)]
        assert all(small < large for small, large in zip(sets, sets[1:]))
        assert all({0, total - 1} <= kept for kept in sets[1:]) and sets[0] == {0}
        drawn = study.random_layers(3)(total, total // 2)
        assert len(set(drawn)) == total // 2 and drawn == sorted(drawn) and drawn[0] == 0
        assert drawn == study.random_layers(3)(total, total // 2) != study.random_layers(4)(
            total, total // 2)
    cells = study.cells(("table", "change", "search"), [0, 1])
    assert len(set(cells)) == len(cells)
    assert all(fpt.parse_schedule(schedule) for _, schedule, _, _ in cells)
    assert not {task for task, schedule, change, _ in cells
                if schedule in study.SEARCH[4:] and not change} & set(study.REPORTED)
    names = {study.place(Path("out"), *cell) for cell in cells}
    assert len(names) == len(cells) and max(len(path.name) for path in names) < 200


def test_what_the_study_changes_at_a_growth(monkeypatch):
    """Updates 1, 2 on one model, 3, 4 on the next: the optimiser is changed from the third on."""
    study, prompt, models = script(ROOT / "evidence" / "study.py"), fpt.SoftPrompt(
        torch.ones(P, D)), [object(), object()]
    optimizer, rates, sizes = fpt.adafactor(prompt, 0.3), [], []
    monkeypatch.setattr(study, "UPDATE", lambda *_: (
        rates.append(optimizer.param_groups[0]["lr"]), sizes.append(len(optimizer.state))))
    for change in study.warm, study.reset:
        optimizer.state[prompt.weight] = {"step": 1}
        update = study.at_growth(change)
        for number in 0, 0, 1, 1:
            update(models[number], None, prompt, optimizer)
    assert rates[:4] == pytest.approx([0.3, 0.3, 0.3 / 20, 0.6 / 20])
    assert sizes[4:] == [1, 1, 0, 0]


def test_the_drawing_of_the_schedule():
    axes = script(ROOT / "evidence" / "figures.py").schedule().axes[0]
    dark = [bar for bar in axes.patches if bar.get_facecolor()[0] < 0.5]
    assert len(axes.patches) - len(dark) == 4 * 12 and len(dark) == 3 + 6 + 9 + 12
    layers = [round(bar.get_y() - 0.12) for bar in dark]
    assert layers[:3] == [0, 5, 11] and layers[-12:] == list(range(12))
    widths = [round(bar.get_width(), 3) for bar in dark]
    assert widths[0] == pytest.approx((0.2 - 0.024) / 4) and widths[-1] == pytest.approx(0.376)


def test_a_stage_of_the_study_ends_when_its_loss_stops_falling(monkeypatch):
    """Windows of 2: 1.0, 0.9 fall, 0.88 is less than 5 % below; the next ends at its share, 4."""
    study = script(ROOT / "evidence" / "study.py")
    stage_at, update = study.by_loss(0, window=2)
    losses = iter([1, 1, 0.9, 0.9, 0.88, 0.88] + [0.5, 0.5, 0.4, 0.4] + [0.3] * 4)
    run, stages = types.SimpleNamespace(losses=[0]), []
    monkeypatch.setattr(study, "UPDATE", lambda *_: run.losses.append(next(losses)))
    schedule = [fpt.Stage(0.25, 1, 0.5), fpt.Stage(0.5, 1, 4 / 14), fpt.Stage(1, 1, 3 / 14)]
    for step in range(1, 15):
        stages.append(stage_at(schedule, step, 14))
        update(None, None, None, None, None, None, run, None)
    assert stages == [0] * 6 + [1] * 4 + [2] * 4
    assert stage_at(schedule, 1, 14) == 0  # another run


def cell(task, schedule, seed, best, flops, change=""):
    """A cell of the study, of which the last `best` is the validation score as well."""
    return {"task": task, "schedule": schedule, "change": change, "seed": seed, "best": best,
            "flops": flops, "step": [10 * (i + 1) for i in range(len(best))], "seconds": flops[-1],
            "validation": best[-1], "full_updates": 20}


def test_a_table_of_the_study_by_hand():
    """Two tasks, one seed. `pt` at the FLOPs of `cr` (30) has 90 and 80; after 20 updates too."""
    study = script(ROOT / "evidence" / "study.py")
    cells = [cell("slot", "pt", 0, [50, 90, 90, 100], [10, 20, 30, 40]),
             cell("slot", "cr", 0, [60, 99, 99, 99], [5, 10, 20, 30]),
             cell("told", "pt", 0, [70, 80, 80, 80], [10, 20, 30, 40]),
             cell("told", "cr", 0, [60, 60, 60, 90], [5, 10, 20, 30]),
             cell("slot", "pt", 0, [10, 20], [10, 20], "pt"),
             cell("slot", "cr", 0, [10, 40], [10, 15], "none"),
             cell("slot", "cr", 0, [10, 30], [10, 15], "warm-up"),
             cell("rte", "ld", 0, [1], [1])]
    study.REPORTED = ("slot", "told")
    first = study.compared({"cells": cells}, study.REPORTED)
    assert first["slot"]["cr"]["flops_to_pt"] == 10 / 40 and not first["slot"]["cr"]["flops_to_all"]
    assert first["told"]["cr"]["flops_to_all"] == 30 / 20
    text = study.table_2({"cells": cells})
    assert ("| `cr` | 99.0 | 90.0 | 94.5 | +4.5 [-65.4, 74.4] | 0.750 | 0.75 | -0.9 | -0.6 | 0.65 |"
            in text)
    assert "| `cr` | 85.0 | +9.0 | +10.0 | +9.5 [3.1, 15.9] | +0.38 | 85.0 |" in text
    assert "| `cr` | 0.25 | 1.50 | 0.88 | never |" in text
    study.REPORTED = ("slot",)
    text = study.table_changes({"cells": cells})
    assert "| warm-up | 30.0 | 30.0 | -10.0 | 0.750 |" in text
    assert "| none | 40.0 | 40.0 |  | 0.750 |" in text and "| pt | 20.0 | 20.0 | -20.0 |" in text


def test_the_drawings_of_the_study():
    """Two tasks: the mean of 100 and 80 at the end of `pt`; a square for each pair of models."""
    figures = script(ROOT / "evidence" / "figures.py")
    cells = [cell(task, schedule, 0, best, flops) for task, schedule, best, flops in (
        ("slot", "pt", [50, 100], [10, 20]), ("told", "pt", [60, 80], [20, 40]),
        ("slot", "cr", [70, 90], [5, 10]), ("told", "cr", [70, 92], [5, 10]),
        ("slot", "fast", [70, 90], [5, 10]), ("told", "fast", [70, 90], [5, 10]))]
    matrix = [[10 * i + j for j in range(10)] for i in range(10)]
    record = {"cells": cells, "transfer": [{"validation": matrix}]}
    [axes] = figures.curves({"study": record}).axes
    lines = {line.get_label(): [list(map(float, axis)) for axis in line.get_data()]
             for line in axes.lines}
    assert lines["pt: 90.0"] == [[0.5, 1], [55, 90]] and lines["cr: 91.0"][0] == [0.1875, 0.375]
    [axes] = figures.transfer({"study": record}).axes
    assert [text.get_text() for text in axes.texts] == [str(value) for value in range(100)]


@pytest.mark.parametrize("name", ["study", "study-whole"])
def test_the_tables_of_the_study_are_in_the_tutorial(name):
    """All that the record has, line by line, and in the order of the record."""
    study, text = script(ROOT / "evidence" / "study.py"), document("tutorial.md")
    shown = study.tables(evidence(name))
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(rows) > 40 and not [row for row in rows if row not in text]


def test_help_and_a_mistyped_flag_answer_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = python(ROOT / "fpt.py", "--help", cwd=tmp_path, PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    for field in dataclasses.fields(fpt.Config):
        default = field.default[0] if isinstance(field.default, tuple) else field.default
        assert f"--{field.name.replace('_', '-')}" in done.stdout
        assert f"(default: {default})" in " ".join(done.stdout.split())
    done = python(ROOT / "fpt.py", "--modle", "t5-base", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2 and "--modle" in one_line(done.stderr) and not done.stdout


def test_import_is_cheap_and_without_network_a_hub_name_is_refused(tmp_path):
    """One process, as imports take most of it. Port 9 is closed: nothing answers there."""
    code = """import sys, fpt
heavy = {"transformers", "datasets", "huggingface_hub", "sklearn", "torchmetrics", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
fpt.main(["--model", "t5-base", "--task", "rte", "--device", "cpu", "--out", "out"])"""
    done = python("-c", code, cwd=tmp_path, HF_HUB_OFFLINE=None, HF_ENDPOINT="http://127.0.0.1:9",
                  HF_HOME=str(tmp_path / "cache"))
    line = one_line(done.stderr)
    assert done.returncode == 2 and "nyu-mll/glue" in line and "HF_HUB_OFFLINE=1" in line
    assert not (tmp_path / "out").exists()


class Said:
    """What a record of the study says of a schedule, as the text writes it."""

    def __init__(self, name):
        self.study = script(ROOT / "evidence" / "study.py")
        self.found = self.study.compared(evidence(name), self.study.REPORTED)

    def score(self, name):  # less that of `pt`, as "+1.6 [-0.4, 3.6]"
        return self.study.pooled(self.found, name, "validation", "pt")

    def points(self, name):  # of it the number alone, and the interval
        return self.score(name).split()[0].lstrip("+-")

    def interval(self, name):
        return self.score(name).split(" ", 1)[1]

    def gain(self, name):
        return self.study.pooled(self.found, name, "gain")[1:]

    def on(self, task):
        return f"{sum(self.found[task]['cr']['gain']) / 5:+.1f}"

    def flops(self, name, to_pt=False):
        return (self.study.goals(self.found, name, "flops_to_pt")[-1] if to_pt else
                self.study.share(self.found, name))


def test_what_the_text_says_of_the_study():
    """Sentences of the tutorial, with the numbers of the records put in."""
    shipped, whole, text = Said("study"), Said("study-whole"), " ".join(
        document("tutorial.md").split())
    small, deep, wide = "0.25x0.25:1", "0.25x1:1", "1x0.25:1"
    paper = {name: shipped.study.paper(name)[0].lstrip("-") for name in (small, deep, wide)}
    alone = [mean_of(said.study.over_tasks(said.found, "cr", "pt_full_updates"))
             for said in (shipped, whole)]
    ends = [mean_of(said.study.over_tasks(said.found, "cr", "dev")) for said in (shipped, whole)]
    for sentence in (
            f"with {shipped.flops(small)} of the FLOPs, is {shipped.points(small)} points *above* "
            f"it {shipped.interval(small)}",
            f"A quarter of both loses {whole.points(small)} points (the paper's loses "
            f"{paper[small]}), a quarter of the layers {whole.points(deep)} ({paper[deep]}), a "
            f"quarter of the neurons {whole.points(wide)} ({paper[wide]})",
            f"about as good as `pt`: {shipped.score('cr')} on the shipped model, "
            f"{whole.score('cr')} on *whole*",
            f"gains {shipped.gain('cr')} on the shipped model, *nearly all of it on one task*, "
            f"`word` ({shipped.on('word')}), and {whole.gain('cr')} on *whole*, nearly all on "
            f"`told` ({whole.on('told')})",
            "The full updates alone would have {:.1f} and {:.1f}; the partial stages add {:.1f} "
            "and {:.1f} points".format(*alone, *map(operator.sub, ends, alone)),
            f"99 % of `pt` with {shipped.flops('fast', True)} of the FLOPs that `pt` needs",
            f"it costs {shipped.flops('fast')} of `pt`, ends {shipped.points('fast')} points above "
            f"it {shipped.interval('fast')}, and {shipped.gain('fast')} above `pt` stopped at the "
            f"same FLOPs; `cr` needs {shipped.flops('cr', True)}.",
            f"It gains {whole.gain('fast')} over `pt` stopped at the same FLOPs, but ends "
            f"{whole.points('fast')} points below `pt` {whole.interval('fast')}",
            f"is `ld`, with {whole.flops('ld', True)}."):
        assert sentence in text, sentence
    for rows in shipped.found.values():  # no task more than a point below `pt`
        assert mean_of(rows["fast"]["validation"]) > mean_of(rows["pt"]["validation"]) - 1


def test_what_the_text_says_of_transfer():
    study, text = script(ROOT / "evidence" / "study.py"), " ".join(
        document("tutorial.md").split())
    shipped, whole = evidence("study"), evidence("study-whole")
    up, down, seeds = [], [], []
    for record in shipped, whole:
        matrix, full = study.transferred(record), study.FIXED.index("pt")
        up += [f"{matrix[study.FIXED.index(name)][full]:.1f}" for name in study.COMPOUND[:3]]
        down.append(f"{matrix[full][study.FIXED.index('0.25x0.25:1')]:.1f}")
        seeds.append(f"{study.cosine(record, ['pt', 'pt'], 'other_seed'):.3f}")
    for sentence in (
            "have {}, {} and {} % on the shipped model, and {}, {} and {} on *whole*".format(*up),
            "on the quarter has {} and {}".format(*down), "({} and {})".format(*seeds),
            "a prompt of the quarter has {} % on the full model, one of the half {}".format(*up)):
        assert sentence in text, sentence


def test_what_the_text_says_of_the_changes():
    study, text = script(ROOT / "evidence" / "study.py"), " ".join(
        document("tutorial.md").split())
    found = study.compared(evidence("study"), study.REPORTED, changes=True)

    def less(name, base="none"):
        return re.findall(r"-?[\d.]+", study.pooled(found, name, "validation", base))

    at_flops, alone = (less(f"pt, the {what}") for what in ("FLOPs of cr", "full updates alone"))
    words, short = (less(f"pt, {what}", "pt")[0] for what in ("start labels", "length 5"))
    random_layers, cheaper = less("layers random"), less("shares 30 30 30 10")
    assert words == short
    for sentence in (
            f"ends {at_flops[0][1:]} points below it [{at_flops[2][1:]}, {at_flops[1][1:]}]",
            f"the full updates alone {alone[0][1:]} [{alone[2][1:]}, {alone[1][1:]}], on "
            "validation",
            f"50 vectors cost {less('length 50')[0][1:]} points in `cr` and "
            f"{less('pt, length 50', 'pt')[0][1:]} in `pt`",
            f"at random change {random_layers[0]} [{random_layers[1]}, {random_layers[2]}]",
            f"30/30/30/10 costs {study.share(found, 'shares 30 30 30 10')} instead of "
            f"{study.share(found, 'none')}, for {cheaper[0]} [{cheaper[1]}, {cheaper[2]}]",
            f"instead of 20 cost {study.share(found, 'length 5')}, and lose nothing",
            f"`pt` gains {words} points from a start at the label words"):
        assert sentence in text, sentence


def mean_of(values):
    return sum(values) / len(values)


def test_what_the_readme_says_of_the_study():
    shipped, whole, text = Said("study"), Said("study-whole"), " ".join(
        document("README.md").split())
    gain, low, high = re.findall(r"-?[\d.]+", shipped.gain("cr"))
    assert f"on four more tasks {gain} points above ({low} to {high};" in text
    assert f"99 % of prompt tuning's score with {shipped.flops('fast', True)} of the FLOPs" in text
    gain, low, high = re.findall(r"-?[\d.]+", whole.gain("cr"))
    assert f"`cr` is {gain} above ({low} to {high})" in text
    gains = evidence("micro-other")["schedules"][1]["gain"]
    low, high = fpt.interval(gains)
    assert f"the gain is {mean_of(gains):.1f} ({low:.1f} to {high:.1f})" in text


# ====== Answers to the exercises of tutorial.md ===================================================


def test_exercise_1_without_layer_0_a_t5_reads_a_bag_of_words():
    """The order of the source changes nothing but the order of the vectors it becomes."""
    model, source = tiny(), torch.randn(1, 6, D, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 5, 1, 4, 2])

    def differs(encoder):
        straight, mixed = (encoder(inputs_embeds=x).last_hidden_state
                           for x in (source, source[:, order]))
        return (straight[:, order] - mixed).abs().max().item()

    headless = fpt.view(model.encoder)
    headless.block = torch.nn.ModuleList(model.encoder.block[1:])
    assert differs(headless) < 1e-5 < 1e-2 < differs(model.encoder)


def test_exercise_2_nested_layers():
    """Of 12: each set holds the one before. By the paper's rule 5 goes at 6, 10 comes never."""
    nested = script(ROOT / "evidence" / "study.py").nested
    assert [nested(12, keep) for keep in (3, 6, 9)] == [
        [0, 5, 11], [0, 2, 3, 5, 8, 11], [0, 1, 2, 3, 5, 6, 8, 9, 11]]
    three, six, nine = (set(fpt.kept_layers(12, keep)) for keep in (3, 6, 9))
    assert three - six == {5} and six - nine == {6, 8}


@pytest.mark.parametrize("kind", KINDS)
def test_exercise_3_neurons_by_what_they_write(kind):
    """Ten times the column of wo: ten times the score. A row of wi: the same, by the activation."""
    study, model, prompt = script(ROOT / "evidence" / "study.py"), tiny(kind), torch.randn(P, D)
    plain = fpt.neuron_scores(model, prompt, list(score_batches()))["encoder"][0]
    before = study.by_output(model, prompt, list(score_batches()))["encoder"][0]
    column = ffn(model.encoder.block[0]).wo.weight[:, 3]
    assert before[3].item() == pytest.approx(plain[3].item() * column.square().sum().sqrt().item())
    column *= 10
    after = study.by_output(model, prompt, list(score_batches()))["encoder"][0]
    assert (after / before).tolist() == pytest.approx([10 if j == 3 else 1 for j in range(D_FF)])
    net = ffn(model.encoder.block[0])
    (net.wi if kind == "v1.0" else net.wi_1).weight[5] *= 10
    more = study.by_output(model, prompt, list(score_batches()))["encoder"][0]
    assert (more / after)[5].item() == pytest.approx(10)


def test_exercise_4_shares_of_equal_cost():
    """Every stage of `cr` on t5-base spends the same: shares as one over the cost of an update."""
    with torch.device("meta"):  # shapes alone
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=768, d_ff=3072, num_layers=12, num_heads=12))
    scores = {side: [torch.arange(3072)] * 12 for side in SIDES}
    costs = [fpt.step_flops(fpt.absorbed(fpt.partial_t5(model, size, size, scores, False)),
                            32, 102, 6) for size in (0.25, 0.5, 0.75, 1)]
    shares = [1 / cost / sum(1 / other for other in costs) for cost in costs]
    assert [round(share, 2) for share in shares] == [0.48, 0.26, 0.16, 0.1]
    assert round(sum(map(operator.mul, shares, costs)) / costs[3], 2) == 0.42  # FLOPs over pt's
    fast = sum(0.4 * cost for cost in costs[:2]) + 0.2 * costs[3]  # as the tutorial says
    assert f"{fast / costs[3]:.2f} of `pt`'s FLOPs on t5-base" in " ".join(
        document("tutorial.md").split())


def test_exercise_5_a_growth_that_grows_nothing(here, tmp_path):
    """The same prompt to the last bit, at the same cost: all differences are 0, all ratios 1."""
    same = "1x1:0.5,1x1:0.5"
    fpt.main(flags(here, tmp_path / "out", "--schedule", "pt", same))
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["schedules"]
    [pt, two] = found
    assert two["flops"] == [1] and two["gain"] == [0] and two["dev"] == pt["dev"]
    assert two["full_updates"] == 10 and two["pt_full_updates"] == pt["dev"]
    one, other = (fpt.load_prompt(tmp_path / "out" / fpt.run_name(name, 0) / "prompt-last")
                  for name in ("pt", same))
    assert torch.equal(one, other)


# ====== The documents say what the code does ======================================================

FPT = (ROOT / "fpt.py").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "tutorial.md")
PLUMBING = """UserError Stopped flag parse_args resumed Config Task Example Data
load_data load_hub hub_examples load_folder folder_task hub_failure ask_hub
load_model read_model digest fingerprint label_ids collate rng batches accuracy
em_f1 rouge_l evaluate token_losses begin due update measure split gradient
update_flops together workers rank gathered join adafactor padded_shape
score_on_train stop_nonfinite main_score over_pt stopping undisturbed handling
progress write save_checkpoint load_checkpoint sealed unsealed checksum jsonl
Encoded encode shown record tune found read_json read_text finished check_loaded
write_settings tell start_prompt check_origin versions read_run by_schedule
mean_curve flops_to stopped compare similarity interval spread report tables against_pt
figure make_parser suggested_flags check check_layout Progress pick_device claim
run_name in_one_line run introduce main fixed unfit made_from settings""".split()
# Public, but not the method: the tutorial need not mention these.


def document(name):
    """Text of a document; a missing one fails, it does not skip."""
    assert (ROOT / name).is_file(), f"{name} is missing"
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name):
    """[(info, text)] of the fenced blocks."""
    text = document(name)
    assert text.count("\n```") % 2 == 0, "a fence is not closed"
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.M | re.S)


def prose(name):
    return re.sub(r"^```.*?^```$", "", document(name), flags=re.M | re.S)


def contains(lines, snippet):
    """Is the snippet a contiguous run of these lines, up to a common indentation?"""
    snippet = textwrap.dedent(snippet).rstrip("\n")
    count = snippet.count("\n") + 1
    return any(textwrap.dedent("\n".join(lines[i:i + count])) == snippet
               for i in range(len(lines) - count + 1))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_snippets_are_verbatim(name, capsys):
    public = {key: value for key, value in vars(fpt).items() if key[0] != "_"}
    namespace = {"torch": torch, **public}
    blocks = fences(name)
    for i, (info, text) in enumerate(blocks):
        if info == "python":
            assert contains(FPT.splitlines(), text), f"not in fpt.py:\n{text}"
        elif info == "python sketch":
            ast.parse(text)
        elif info == "python run":
            capsys.readouterr()
            exec(compile(text, name, "exec"), namespace)
            if i + 1 < len(blocks) and blocks[i + 1][0] == "text":  # the output that the text shows
                assert capsys.readouterr().out == blocks[i + 1][1]
        else:
            assert info in ("sh", "text", "json", "bibtex"), f"a fence of unknown kind: {info!r}"


def test_the_verbatim_check_can_fail():
    lines = ["    a = 1", "    if a:", "        b = 2", "c = 3"]
    assert all(contains(lines, text) for text in ("if a:\n    b = 2\n", "a = 1\n", "c = 3"))
    assert not any(contains(lines, text) for text in ("a = 1\nb = 2\n", "a = 1  # nicer\n"))


def test_commands_parse():
    texts = {"fpt.py": fpt.__doc__, **{name: document(name) for name in DOCUMENTS}}
    for name, text in texts.items():
        commands = re.findall(r"python fpt\.py\b[^`\n]*", text)
        assert commands, f"{name} shows no command"
        for command in commands:
            assert not command.rstrip().endswith("\\"), command
            arguments = shlex.split(command, comments=True)[2:]
            if "--resume" in arguments:  # of a folder that is not here
                assert fpt.make_parser().parse_args(arguments).resume
                continue
            settings = fpt.parse_args(arguments)
            assert [fpt.parse_schedule(schedule) for schedule in settings.schedule]
            assert (settings.task in fpt.TASKS or settings.task.isupper()  # FOLDER
                    or settings.task in (fpt.Config.task, "micro/rte")), command
            assert settings.precision in ("fp32", "bf16")
        for command in re.findall(r"torchrun [^`\n]*", text):
            of_torchrun, _, ours = command.partition(" fpt.py ")
            get_args_parser().parse_args([*shlex.split(of_torchrun)[1:], "fpt.py"])
            assert fpt.parse_args(shlex.split(ours, comments=True)).task in fpt.TASKS
        for path, command in re.findall(r"python (evidence/(?:bench|study)\.py)([^`\n]*)", text):
            script(ROOT / path).make_parser().parse_args(shlex.split(command, comments=True))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_in_the_text_exist(name):
    text = prose(name)
    known = [vars(fpt), vars(builtins), vars(torch)]
    for called in re.findall(r"`(\w+)\(", text):
        assert any(called in names for names in known), f"`{called}(` does not exist"
    for field in re.findall(r"`Config\.(\w+)", text):
        assert field in {field.name for field in dataclasses.fields(fpt.Config)}, f"Config.{field}"
    options = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(fpt.Config)}
    for option in re.findall(r"`(--[\w-]+)", text):
        assert option in options, option


def evidence(name):
    return json.loads((ROOT / "evidence" / f"{name}.json").read_text())


def cells(row):
    """A schedule of a record as a row of the tutorial's tables."""
    found = [fpt.spread(row["dev"]), fpt.spread(row["validation"]), *fpt.against_pt(row)]
    return " | ".join(cell or "" for cell in found)


@pytest.mark.parametrize("name", ["micro", "micro-long", "micro-whole",
                                  "micro-whole-long", "micro-other"])
def test_quoted_results_are_those_of_the_record(name):
    for row in evidence(name)["schedules"]:
        assert f"| `{row['schedule']}` | {cells(row)} |" in document("tutorial.md")


@pytest.mark.parametrize("name", ["base-fp32", "base-bf16", "small"])
def test_quoted_costs_are_those_of_the_records(name):
    results, text = evidence(f"bench-cpu-{name}")["results"], document("tutorial.md")
    for name, found in results.items():
        if name.startswith("throughput"):
            ours, peft_, padded_ = (row["examples_per_second"] for row in found.values())
            assert (f"| {name.split(', ')[1]} | {ours:.2f} | {peft_:.2f} | {padded_:.2f} | "
                    f"{ours / peft_:.2f} | {ours / padded_:.1f} |") in text
        elif name.startswith("stages"):
            for schedule in "ld", "fr", "cr":
                row = found["schedules"][schedule]
                start = f"| `{schedule}` | {row['flops_over_pt']:.3f} | "
                [line] = [line for line in text.splitlines() if line.startswith(start)]
                assert f"| {row['seconds_over_pt']:.3f} |" in line
            for row in found["stages"]:
                assert f"| {row['seconds_over_pt']:.3f} | {row['share_of_product']:.2f} |" in text
        elif name.startswith("memory"):
            for kind, row in found.items():
                cells = f"{row['peaks'][-1] / 1000:.1f} | {row['peak_over_pt']:.2f} |"
                assert re.search(rf"\| {kind} \|.* {re.escape(cells)}", text)


def test_quoted_kills_are_those_of_the_record():
    record, text = evidence("kills"), " ".join(document("tutorial.md").split())
    kills = record["kills"]
    assert (f"killed {sum(kills.values()) - kills['signal']} processes ({kills['instant']} at a "
            f"random instant, {kills['write']} inside a write, {kills['boundary']} at a growth) "
            f"and stopped {kills['signal']} by") in text
    assert f"All {record['commands']} commands," in text and record["different_files"] == []
    assert f"the same {record['files_compared']} files" in text


def test_the_readme_and_the_tutorial_say_what_the_record_of_the_default_says():
    record = evidence("micro")
    tutorial, readme = (" ".join(document(name).split()) for name in ("tutorial.md", "README.md"))
    pt, cr = record["schedules"]
    means = [sum(scores) / 16 for scores in (pt["dev"], cr["dev"], cr["flops"],
                                             cr["pt_equal_flops"])]
    said = "pt {:.1f}, cr {:.1f} with {:.2f} of its FLOPs, and pt stopped at the FLOPs of cr {:.1f}"
    assert said.format(*means) in " ".join(fpt.__doc__.split())
    two = [sum(scores[:2]) / 2 for scores in (cr["dev"], pt["dev"], cr["pt_equal_flops"])]
    assert "`cr` {:.1f}, `pt` {:.1f}, and `pt` stopped at the FLOPs of `cr` {:.1f}".format(
        *two) in tutorial
    assert f"{min(pt['dev']):.1f} at worst); all of `cr` are at {min(cr['dev']):.1f}" in tutorial
    assert f"by chance | {fpt.spread(pt['dev'])} | {fpt.spread(cr['dev'])} |" in readme
    assert f"| training FLOPs | 1 | {sum(cr['flops']) / len(cr['flops']):.3f} |" in readme
    assert f"FLOPs of FPT | {fpt.spread(cr['pt_equal_flops'])} | |" in readme
    for half in cr["gain"][:8], cr["gain"][8:]:
        low, high = fpt.interval(half)
        assert f"{sum(half) / 8:.1f} [{low:.1f}, {high:.1f}]" in tutorial
    assert f"{sum(cr['gain'][8:]) / 8:.1f} points above" in readme
    for key in "dev", "validation":  # cr less pt, by seed
        low, high = fpt.interval([a - b for a, b in zip(cr[key], pt[key])])
        mean = (sum(cr[key]) - sum(pt[key])) / 16
        assert re.search(rf"\+{mean:.1f},( 95 % interval)? {low:.1f} to {high:.1f}", tutorial)


def test_what_the_offline_default_was_required_to_show():
    """The shipped record, not a new run: score within a point, cost, gain and speed over 16 seeds;
    and the gain on the seeds that nothing was chosen by."""
    pt, cr = evidence("micro")["schedules"]
    mean = {key: sum(cr[key]) / 16 for key in ("dev", "flops", "pt_full_updates")}
    assert cr["seeds"] == pt["seeds"] == list(range(16))
    assert mean["dev"] > sum(pt["dev"]) / 16 - 1 and mean["flops"] <= 0.7
    assert fpt.interval(cr["gain"])[0] > 0 and fpt.interval(cr["gain"][8:])[0] > 0
    assert cr["flops_to_pt"] <= 0.7 and mean["pt_full_updates"] < mean["dev"] - 20


def definitions():
    """The functions and classes of fpt.py at module level."""
    return [node for node in ast.parse(FPT).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def test_tutorial_follows_the_file():
    banners = re.findall(r"^# =*\s*(\d+ [^=\n]+?)\s*=*$", FPT, flags=re.M)
    assert [int(banner.split()[0]) for banner in banners] == list(range(1, 9))
    headings = re.findall(r"^##+ (.+)$", document("tutorial.md"), flags=re.M)
    assert [heading for heading in headings if heading in banners] == banners
    names = {node.name for node in definitions() if node.name[0] != "_"}
    assert not set(PLUMBING) - names, "PLUMBING lists what fpt.py lacks"
    missing = names - set(PLUMBING) - set(re.findall(r"\w+", document("tutorial.md")))
    assert not missing, f"the tutorial does not mention {missing}"


def test_the_readme_is_tested_as_it_says():
    [command] = {line for info, text in fences("README.md") if info == "sh"
                 for line in text.splitlines() if "pytest" in line}
    assert command in document(".ci/run").splitlines() and os.access(ROOT / ".ci/run", os.X_OK)
    assert __doc__.startswith(command)
    assert "requirements.txt" in document(".ci/run") and "venv" in document(".ci/run")
    readme = document("README.md")
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)  # links, and the list of files
    paths += re.findall(r"^\* `(.+?)`:", readme, flags=re.M)
    assert paths and all((ROOT / path).exists() for path in paths), paths


def imported(nodes):
    """Names of the packages that these nodes of a syntax tree import."""
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
             for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {name.split(".")[0] for name in names}


def test_requirements_are_bounded_with_a_reason_each_and_met_here():
    from importlib.metadata import version
    from packaging.requirements import Requirement

    lines = [line for line in document("requirements.txt").splitlines() if line and line[0] != "#"]
    for line in lines:
        wanted, _, reason = line.partition(" # ")
        requirement = Requirement(wanted.strip())
        assert {bound.operator for bound in requirement.specifier} == {">=", "<"}, line
        assert len(reason.split()) >= 2, f"no reason: {line}"
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), line
    listed = {re.match(r"[\w-]+", line)[0] for line in lines}
    come_along = {"tokenizers", "packaging", "fpt"}  # with transformers, with pytest, here
    for name in "fpt.py", "test_fpt.py", "micro/make.py":
        used = {"scikit-learn" if package == "sklearn" else package
                for package in imported(ast.walk(ast.parse(document(name))))}
        assert used - sys.stdlib_module_names - come_along <= listed


@pytest.mark.parametrize("name", ["fpt.py", "test_fpt.py", "micro/make.py", "evidence/bench.py",
                                  "evidence/kill.py", "evidence/study.py",
                                  "evidence/figures.py"])
def test_style(name):
    text = document(name)
    assert not [f"{i}: {line}" for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text.replace(r"(TODO|FIXME|XXX)", ""))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} is longer than 50 lines"


def test_public_functions_say_what_they_do_and_imports_are_light():
    for node in definitions():
        assert node.name[0] == "_" or ast.get_docstring(node), f"{node.name} has no docstring"
    assert imported(ast.parse(FPT).body) - sys.stdlib_module_names == {"torch"}  # module level
