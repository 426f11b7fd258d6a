"""python -m pytest -q        every test of fpt.py and of its documents; offline, about a minute

The tests assert values worked out by hand, or equality with something that fpt.py does not contain:
stock transformers models, PEFT, PyTorch's FLOP counter, a brute-force loop. Sections follow fpt.py.
"""

import ast, copy, importlib.metadata, importlib.util, inspect, json, math, os  # noqa: E401
import random, re, shlex, shutil, signal, subprocess, sys, tempfile, time, types  # noqa: E401
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so these two come first
_EMPTY_CACHE = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = _EMPTY_CACHE.name  # nothing that this machine has cached can help a test
os.environ["OMP_NUM_THREADS"] = "1"  # on matrices this small a second thread only slows the first
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a child of a fork could not use it; one test asks for it

import peft, pytest, tokenizers, torch, transformers  # noqa: E401, E402
from packaging.requirements import Requirement  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import fpt  # noqa: E402

ROOT = Path(__file__).parent
KINDS = ("v1.0", "v1.1", "mt5")  # ReLU and tied head; gated GELU and untied head; the same as mT5
SIDES = ("encoder", "decoder")
LAYERS, D, INNER, D_FF, VOCAB, P = 6, 16, 12, 32, 64, 3  # INNER: heads * d_kv, not d_model
WORDS = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "yes", "no"] + [f"w{i:02}" for i in range(50)]
YES_NO = fpt.Task(labels=("yes", "no"))
TEXT = fpt.Task(max_target=6)
pytestmark = pytest.mark.filterwarnings(*(  # our own calls' are blamed on what we call
    f"error::{kind}:(fpt|transformers|accelerate|torchmetrics|datasets|sklearn|pandas)[.]?.*"
    for kind in ("DeprecationWarning", "FutureWarning")), "ignore:.*(is_gradient_check|pin_mem)")

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
        settings = getattr(transformers, name + "Config")(
            **sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        model = getattr(transformers, name + "ForConditionalGeneration")(settings)
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
    source, target = torch.tensor([[7, 5, 2], [4, 2, 3]])
    return {"inputs_embeds": torch.randn(3, 7, D, generator=generator),
            "attention_mask": (torch.arange(7) < source[:, None]).long(),
            "labels": torch.randint(3, VOCAB, (3, 4), generator=generator).masked_fill(
                torch.arange(4) >= target[:, None], -100)}


def logits(model):
    return model(**inputs()).logits


def generate(model, **how):
    """Token ids of 8 forced steps: an early end of sequence would hide a broken cache."""
    batch = {name: rows for name, rows in inputs().items() if name != "labels"}
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
    return [(" ".join(f"w{i:02}" for i in row), ("no" if row[0] % 2 else "yes",)) for row in rows]


def config(**changes):
    """Settings of a small run; keyword arguments are flags."""
    settings = {"steps": 20, "batch": 4, "prompt_length": P, "eval_every": 5,
                "device": "cpu", "model": "tiny", "task": "tiny"}
    return types.SimpleNamespace(**vars(fpt.parse_args(["--task", "tiny"])) | settings | changes)


def encoded(tokenizer, model, prompt, text):
    """One source, alone and unpadded, behind its prompt: what a batch of one gives the model."""
    ids = torch.tensor([tokenizer(text).input_ids])
    return torch.cat([prompt[None], model.shared(ids)], dim=1)


def write_task(folder, train=40, validation=12, **spec):
    folder.mkdir(parents=True)
    spec = {"labels": ["yes", "no"], "prefix": "<extra_id_0>", **spec}
    (folder / "task.json").write_text(json.dumps(spec))
    for name, rows in ("train", examples(train, 1)), ("validation", examples(validation, 2)):
        lines = [json.dumps({"source": source, "target": target}) for source, (target,) in rows]
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
    settings = f"--steps 10 --batch 4 --eval-every 4 --prompt-length {P} --device cpu".split()
    return ["--model", str(here / "model"), "--task", str(here / "task"), "--out", str(out),
            *settings, *map(str, more)]


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
    (24, 6): [0, 4, 8, 13, 18, 23], (24, 18): [*range(12), 13, 15, 17, 19, 21, 23],
    (12, 3): [0, 5, 11], (12, 6): [0, 2, 4, 6, 8, 11], (12, 9): [0, 1, 2, 3, 4, 5, 7, 9, 11],
    (8, 2): [0, 7], (8, 4): [0, 2, 4, 7], (8, 6): [0, 1, 2, 3, 5, 7], (5, 1): [0], (1, 1): [0]}


def test_kept_layers_by_the_official_table_and_how_many_a_share_is():
    assert {which: fpt.kept_layers(*which) for which in EVEN} == EVEN
    for total, keep in ((total, keep) for total in range(2, 30) for keep in range(2, total + 1)):
        layers = fpt.kept_layers(total, keep)
        gaps = [b - a for a, b in zip(layers, layers[1:])]
        assert len(layers) == keep and layers[0] == 0 and layers[-1] == total - 1
        assert gaps == sorted(gaps) and gaps[-1] - gaps[0] <= 1 <= gaps[0]
    for total, keep in (6, 0), (6, 7), (6, -1), (0, 0), (0, 1):
        with pytest.raises(ValueError):
            fpt.kept_layers(total, keep)
    counts = {(50, 0.29): 15, (50, 0.001): 1, (6, 0.25): 2, (6, 0.24): 1}  # 0.29 * 50 < 14.5
    assert {which: fpt.share_of(*which) for which in counts} == counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("depth", "width", "encoder", "decoder"), [
    (1, 1, [*range(6)], [*range(6)]), (0.25, 1, [0, 5], [0, 5]), (0.5, 1, [0, 2, 5], [*range(6)]),
    (0.5, 0.3, [0, 2, 5], [0, 2, 5])])
def test_a_partial_model_equals_a_stock_model_built_small(kind, depth, width, encoder, decoder):
    """In loss, gradient and texts: bit for bit, but where neurons of the stock one are silenced."""
    model, scores, found = tiny(kind), random_scores(), []
    partial = fpt.partial_t5(model, depth, width, scores, decoder=encoder == decoder)
    stock = smaller(model, kind, encoder, decoder)  # fpt.py never touched this one
    for side, kept in zip(SIDES, (encoder, decoder) if width < 1 else ()):
        for block, layer in zip(getattr(stock, side).block, kept):
            loud = scores[side][layer] >= scores[side][layer].sort().values[-10]  # 9.6 of 32
            ffn(block).wo.register_forward_pre_hook(lambda _, args, loud=loud: (args[0] * loud,))
    for net in partial, stock:
        batch = inputs()
        batch["inputs_embeds"].requires_grad_()
        out = net(**batch)
        out.loss.backward()
        found.append((out.logits, out.loss, batch["inputs_embeds"].grad))
    torch.testing.assert_close(*found, rtol=0, atol=0 if width == 1 else 1e-5)
    assert type(partial) is type(stock) and (depth == 1) == torch.allclose(
        found[0][0], logits(model), atol=0.1)
    for how in {}, {"num_beams": 3}, {"use_cache": False}:
        assert torch.equal(generate(partial, **how), generate(stock, **how))


def rows_of(prompt, embeddings):
    return [int((embeddings == row).all(1).nonzero()) for row in prompt]


def test_kept_neurons_are_in_order_and_wider_sets_contain_narrower_ones():
    model = tiny("v1.0")
    full, ties = ffn(model.decoder.block[3]), {side: [torch.arange(D_FF) % 5] * 6 for side in SIDES}
    for scores, narrower in (random_scores(), set()), (ties, set()):
        for width in 0.25, 0.5, 0.75:
            kept = ffn(fpt.partial_t5(model, 1, width, scores).decoder.block[3])
            rows = rows_of(kept.wi.weight, full.wi.weight)
            loudest = scores["decoder"][3].argsort(descending=True, stable=True)
            assert rows == sorted(loudest[:int(width * D_FF)].tolist())
            assert torch.equal(kept.wo.weight, full.wo.weight[:, rows]) and narrower < set(rows)
            assert kept.wo.in_features == kept.wi.out_features == len(rows)
            narrower = set(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_only_narrowed_ffns_are_new_and_shrink_and_come_back_is_the_identity(kind):
    model = tiny(kind)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    state = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    before, settings = logits(model), model.config.to_dict()
    for depth, width, decoder in (0.5, 1, True), (0.5, 0.25, True), (0.5, 0.25, False):
        partial = fpt.partial_t5(model, depth, width, random_scores(), decoder)
        new = {name: p for name, p in partial.named_parameters()
               if p.data_ptr() not in [address for address, _ in state.values()]}
        assert all(re.search(r"\.DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight$", n) for n in new)
        numbers = 0 if width == 1 else (3 + 3 * decoder) * (2 if kind == "v1.0" else 3) * 8 * D
        assert sum(p.numel() for p in new.values()) == numbers
        assert not any(p.requires_grad for p in new.values())
        assert (partial.decoder is model.decoder) is (not decoder)
        assert partial.lm_head.weight is model.lm_head.weight  # tied to the embeddings or not
        assert (partial.lm_head.weight is partial.shared.weight) is (kind == "v1.0")
        gradient_of(partial, inputs()["labels"])
        generate(partial)
        assert torch.equal(logits(model), before)  # both can be used in turn
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert list(model.state_dict()) == list(state) and model.config.to_dict() == settings
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name][0] and torch.equal(tensor, state[name][1])


def test_what_partial_t5_refuses():
    def refuse(says, model, *how):
        with pytest.raises(ValueError, match=says):
            fpt.partial_t5(model, *how)
    for other in transformers.UMT5Config(), transformers.BartConfig():
        refuse(f"{other.model_type}.*T5", types.SimpleNamespace(config=other), 0.5, 1)
    model = tiny()
    for depth, width in (0, 1), (1, 0), (1.01, 1), (1, 1.5), (1, -0.5), (math.nan, 1):
        refuse(r"\(0, 1\]", model, depth, width, random_scores())
    refuse("needs scores", model, 1, 0.5)
    narrow = fpt.partial_t5(model, 1, 0.5, random_scores())
    scores = fpt.neuron_scores(narrow, torch.zeros(P, D), score_batches())
    refuse("scores", model, 1, 0.5, scores)


def score_batches():
    """Two padded batches, of 3 and of 2 examples: a mean of batch means would be wrong."""
    lengths = ((6, 3), (4, 1), (9, 2)), ((3, 4), (5, 2))  # of source and target
    return [fpt.collate([(range(n, 2 * n), range(20, 20 + m)) for n, m in row]) for row in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_neuron_scores_by_brute_force_find_the_loud_neuron(kind):
    """Each example alone, without padding, its FFN recomputed from the FFN's input."""
    model, prompt = tiny(kind), torch.randn(P, D, generator=torch.Generator().manual_seed(4))
    planted = ffn(model.encoder.block[3])
    (planted.wi if kind == "v1.0" else planted.wi_1).weight[7] *= 100
    scores = fpt.neuron_scores(model, prompt, score_batches())
    assert scores["encoder"][3].argmax() == 7 and [*map(len, scores.values())] == [6, 6]
    assert not any(module._forward_pre_hooks for module in model.modules())  # none left behind
    blocks = {(side, i): ffn(getattr(model, side).block[i]) for side in SIDES for i in range(6)}
    inputs_of, expected = {}, dict.fromkeys(blocks, 0)
    for key, net in blocks.items():
        net.register_forward_pre_hook(lambda _, args, key=key: inputs_of.update({key: args[0][0]}))
    for ids, labels, mask in (row for batch in score_batches() for row in zip(*batch.values())):
        embeds = torch.cat([prompt, model.shared(ids[mask == 1])])[None]
        model(inputs_embeds=embeds, labels=labels[labels != -100][None])
        for key, net in blocks.items():
            x = inputs_of[key]  # [positions, d]
            activation = (torch.relu(net.wi(x)) if kind == "v1.0" else torch.nn.functional.gelu(
                net.wi_0(x), approximate="tanh") * net.wi_1(x))  # [positions, d_ff]
            expected[key] = expected[key] + activation.abs().mean(0) / 5
    for (side, i), mean in expected.items():
        torch.testing.assert_close(scores[side][i], mean, rtol=1e-4, atol=1e-6)


# ====== 2 Schedule ================================================================================


def test_schedules_as_text_and_when_models_grow():
    growth = [*zip((0.25, 0.5, 0.75, 1), (0.2, 0.2, 0.2, 0.4))]
    for text, stages in {
            "pt": ((1, 1, 1),), "ld": tuple((size, 1, share) for size, share in growth),
            "fr": tuple((1, size, share) for size, share in growth),
            "cr": tuple((size, size, share) for size, share in growth),
            " 0.5x.25:.3 , 1x1.0:0.7": ((0.5, 0.25, 0.3), (1, 1, 0.7)),
            "0.25x1:1": ((0.25, 1, 1),),  # and shares whose sum in floating point is not 1:
            "1x1:0.1,1x1:0.2,1x1:0.7": ((1, 1, 0.1), (1, 1, 0.2), (1, 1, 0.7))}.items():
        assert fpt.parse_schedule(text) == stages
    for text in ("", "CR", "0.5x0.5", "0.5:1", "1x1:1,", "axb:c", "1x1:1.2.3", "1x1x1:1", "-1x1:1",
                 "0x1:1", "1x1.5:1", "nanx1:1", "1x1:0,1x1:1", "1x1:0.3,1x1:0.6", "1x1:1,1x1:0.6"):
        with pytest.raises(ValueError, match=f"schedule {re.escape(repr(text))} .*adding up to 1"):
            fpt.parse_schedule(text)
    grown, ends = fpt.SCHEDULES["cr"], {1: 0, 6000: 0, 6001: 1, 18000: 2, 18001: 3, 30000: 3}
    assert {step: fpt.stage_at(grown, step, 30_000) for step in ends} == ends
    halves = fpt.parse_schedule("1x1:0.15,1x1:0.35,1x1:0.5")  # of 10: 1.5 rounds up to 2, then 5
    for schedule, stages in ((grown, [0, 1, 2, 3, 3]), (halves, [0] * 2 + [1] * 3 + [2] * 5),
                             (grown, [2])):  # 0.2 and 0.4 of an update round to 0, and 0.6 to 1
        assert [fpt.stage_at(schedule, i + 1, len(stages)) for i in range(len(stages))] == stages


# ====== 3 Cost ====================================================================================

HEADS = {"d_kv": 12, "num_heads": 2, "dropout_rate": 0.0}  # absorbed for 6 target tokens at most


def gradient_of(model, labels, padded=True, backward=True):
    """-> the losses of `labels` [B, S], and the gradient of their sum for 11 input vectors."""
    embeds = torch.randn(len(labels), 11, D, generator=torch.Generator().manual_seed(5))
    embeds.requires_grad_()
    mask = torch.ones(len(labels), 11, dtype=torch.long)
    mask[0, 7:] = 0 if padded else 1
    losses = fpt.token_losses(model, mask, labels, inputs_embeds=embeds)
    if backward:
        losses.sum().backward()
    return (losses, embeds.grad)[:1 + backward]


@pytest.mark.parametrize(("kind", "depth", "width", "decoder"), [
    ("v1.0", 0.5, 0.25, True), ("v1.1", 1, 1, True), ("mt5", 0.5, 0.5, False)])
def test_step_flops_equal_the_counter_and_checkpointing_changes_no_bit(kind, depth, width, decoder):
    flops, found, sizes = {}, {}, {**HEADS, "num_layers": 2, "num_decoder_layers": 2}
    for checkpointing in False, True:
        model = tiny(kind, **sizes)
        model.set_attn_implementation("eager")  # of others the counter misses attention products
        if checkpointing:
            model.activation_checkpointing_enable()
            model.disable_input_require_grads()
            model.train()
        plain = fpt.partial_t5(model, depth, width, random_scores(), decoder)
        for form, target in ("plain", 6), (fpt.absorbed, 6), (fpt.absorbed, 7):  # 7: left as it is
            runs, labels = plain if form == "plain" else form(plain), torch.arange(2 * target)
            for backward in True, False:
                with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
                    losses = gradient_of(runs, labels.view(2, target), backward=backward)
                cost, key = fpt.step_flops(runs, 2, 11, target, backward), (form, target, backward)
                assert cost == counter.get_total_flops()
                if checkpointing:
                    assert all(map(torch.equal, losses, found[key]))
                    assert (cost > 1.4 * flops[key]) is backward  # every layer runs once more
                flops[key], found[key] = cost, losses
    assert flops[fpt.absorbed, 6, True] < flops["plain", 6, True]


@pytest.mark.parametrize(("kind", "attention"), [*zip(KINDS, ("sdpa", "eager", "sdpa"))])
def test_absorbed_attention_is_the_same_function_and_uses_the_cache(kind, attention):
    model, calls = tiny(kind, **HEADS), []
    model.set_attn_implementation(attention)
    for target, padded in (1, True), (3, False), (6, True), (7, True), (7, False):
        labels = torch.randint(3, VOCAB, (4, target))
        labels[1, 1:] = -100
        for plain in model, fpt.partial_t5(model, 0.5, 0.5, random_scores(), decoder=False):
            expected, found = (gradient_of(m, labels, padded) for m in (plain, fpt.absorbed(plain)))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert (target < 7) == (not torch.equal(found[1], expected[1]))  # 7: their own code
    assert not any(isinstance(m, fpt.AbsorbedAttention) for m in model.modules())
    expected = generate(model, num_beams=3)
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.k.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(generate(fpt.absorbed(model), num_beams=3), expected)
    assert len(calls) == LAYERS  # keys once for a source, not once for each of 8 tokens


def test_the_papers_flops_of_t5_large():
    """Tables 1 and 2: linear layers at 512 source tokens; the decoder is whole at length 5."""
    with torch.device("meta"):  # shapes alone: 0.8 billion parameters would not fit a test
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=1024, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu"))
    scores, targets = {side: [torch.arange(2816)] * 24 for side in SIDES}, (5, 5, 200, 200, 512)

    def linears(depth, width, target):  # less the products of attention, by hand
        partial = fpt.partial_t5(model, depth, width, scores, target > 5)
        encoder, decoder = len(partial.encoder.block), len(partial.decoder.block)
        products = 4 * 1024 * (encoder * 512 * 512 + decoder * target * (target + 512))
        return fpt.step_flops(partial, 1, 512, target, backward=False) - products
    assert round(linears(1, 1, 10) / 2e9, 1) == 187.5  # GMAC
    for name, printed, total in (("ld", (30, 54, 77, 100), 72), ("fr", (58, 72, 86, 100), 83),
                                 ("cr", (20, 40, 66, 100), 65)):
        costs = [20 * sum(linears(*size, target) / linears(1, 1, target) for target in targets)
                 for *size, _ in fpt.SCHEDULES[name]]
        assert costs == pytest.approx(printed, abs=1)  # the paper's target lengths are not printed
        assert round(0.2 * sum(costs[:3]) + 0.4 * costs[3]) == total


# ====== 4 Soft prompt =============================================================================


def test_initial_prompts_and_one_in_front_of_bf16(tmp_path):
    embeddings = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(8))

    def draw(how, length, seed=0, *more):
        return fpt.init_prompt(how, length, embeddings, torch.Generator().manual_seed(seed), *more)
    uniform = draw("uniform", 500)
    assert uniform.shape == (500, D) and -0.25 <= uniform.min() < -0.24  # 1 / sqrt(16)
    assert 0.24 < uniform.max() <= 0.25 and abs(uniform.mean()) < 0.01
    vocab = rows_of(draw("vocab", 17, 0, (), 20), embeddings)
    assert sorted(vocab) == list(range(3, 20))  # every common one once, no special token
    labels = rows_of(draw("labels", 6, 0, (9, 40, 9), 20), embeddings)
    assert labels[:2] == [9, 40] and len(set(labels)) == 6 and set(labels[2:]) <= set(range(3, 20))
    for how in "uniform", "vocab", "labels":
        assert torch.equal(draw(how, 5), draw(how, 5)) and not draw(how, 5).equal(draw(how, 5, 1))
    fpt.save_prompt(tmp_path, uniform[:, :8], "any")
    for how, error in ("zeros", OSError), (str(tmp_path), ValueError):  # no folder; another width
        with pytest.raises(error, match=how):
            draw(how, 3)
    start, mask = uniform[:P].bfloat16(), torch.zeros(3, 7)
    soft, embeds = fpt.SoftPrompt(start), inputs()["inputs_embeds"].bfloat16()
    out, longer = soft(embeds, mask)
    assert out.dtype == embeds.dtype and out.equal(torch.cat([start.expand(3, P, D), embeds], 1))
    assert torch.equal(longer, torch.cat([mask[:, :P] + 1, mask], 1))
    out.float().sum().backward()
    assert torch.equal(soft.weight.grad, torch.full((P, D), 3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_prompt_and_computes_the_same(kind, tmp_path):
    model, prompt, batch = tiny(kind), torch.randn(P, D) * 3, inputs()
    for saved in prompt + 1, prompt:  # the second over the first
        fpt.save_prompt(tmp_path, saved, "any")
        assert torch.equal(fpt.load_prompt(tmp_path), saved)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    ids, given = torch.randint(3, VOCAB, (3, 7)) * batch["attention_mask"], batch["attention_mask"]
    embeds, mask = fpt.SoftPrompt(prompt)(model.shared(ids), given)
    ours = model(inputs_embeds=embeds, attention_mask=mask, labels=batch["labels"]).logits
    out, bare = (net(input_ids=ids, attention_mask=given, labels=batch["labels"]).logits
                 for net in (theirs, model))
    assert torch.equal(out, ours) and not torch.allclose(out, bare, atol=0.01)  # nor ignored
    how = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    assert torch.equal(theirs.generate(input_ids=ids, attention_mask=given, **how),
                       model.generate(inputs_embeds=embeds, attention_mask=mask, **how))


def test_pefts_own_prompt_loads_without_its_decoder_half_and_what_is_none_does_not(tmp_path):
    theirs = peft.get_peft_model(tiny(), peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
    theirs.save_pretrained(tmp_path / "whole")
    whole = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(fpt.load_prompt(tmp_path / "whole"), whole[:4]) and len(whole) == 8
    peft.get_peft_model(tiny(), peft.LoraConfig()).save_pretrained(tmp_path / "lora")
    fpt.save_prompt(tmp_path / "nan", torch.full((P, D), math.nan), "x")
    theirs.save_pretrained(tmp_path / "old", safe_serialization=False)
    for name in "none", "lora", "nan", "old":
        with pytest.raises((OSError, ValueError), match=name.replace("old", "adapter_model.bin")):
            fpt.load_prompt(tmp_path / name)


# ====== 5 Train ===================================================================================


@pytest.fixture
def training(tokenizer, monkeypatch):
    """-> run(): `fpt.train` on a tiny task, and what it did."""
    def size(model):  # layers and neurons of the encoder, and of the decoder
        blocks = model.encoder.block, model.decoder.block
        return [(len(block), ffn(block[0]).wo.in_features) for block in blocks]

    def run(schedule="cr", model=None, seed=0, steps=20, every=5, rows=examples(20, 3),
            dev=(), lr=0.3, parts=1, start=None):
        seen, dev = types.SimpleNamespace(trained=[], judged=[], states=[]), list(dev)
        model, original = model or tiny(), fpt.gradient

        def gradient(partial, *rest):
            seen.trained.append(size(partial))
            assert rest[2:] == (parts,)
            return original(partial, *rest)

        def judge(final, prompt):
            seen.judged.append(size(final))
            return dev.pop(0) if dev else fpt.evaluate(
                final, prompt, tokenizer, YES_NO, examples(4, 9), config())[0]
        seen.start = fpt.init_prompt("vocab", P, model.shared.weight, fpt.rng(seed))
        seen.run, weight, moments = copy.deepcopy(start) or (fpt.new_run(), seen.start, None)
        prompt = fpt.SoftPrompt(weight)
        seen.weight, seen.optimizer = prompt.weight, fpt.adafactor(prompt, lr)
        seen.optimizer.load_state_dict(moments or seen.optimizer.state_dict())
        seen.batch_at = fpt.batches(
            rows, lambda chosen: fpt.encode(tokenizer, YES_NO, 99, chosen), seed, 4)
        with monkeypatch.context() as patch:
            patch.setattr(fpt, "gradient", gradient)
            for run in fpt.train(model, prompt, seen.optimizer, fpt.parse_schedule(schedule),
                                 seen.batch_at, judge, seen.run, steps, every, random_scores(),
                                 decoder=False, parts=parts):
                seen.states.append(copy.deepcopy(
                    (run, seen.weight.detach(), seen.optimizer.state_dict())))
        assert prompt.weight is seen.weight
        return seen
    return run


@pytest.mark.parametrize(("kind", "schedule", "stages"), [
    ("v1.0", "cr", [(2, 8), (3, 16), (5, 24), (6, 32)]), ("v1.1", "0.5x0.25:1", [(3, 8)] * 4),
    ("mt5", "ld", [(2, 32), (3, 32), (5, 32), (6, 32)])])
def test_one_prompt_goes_through_every_stage_and_all_is_counted(kind, schedule, stages, training):
    model = tiny(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = training(schedule, model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert (seen.weight - seen.start).abs().min() > 0
    # Growth after updates 4, 8 and 12 of 20. The decoder stays whole, as asked.
    sizes = [[stage, (6, 32)] for i, stage in enumerate(stages) for _ in range((4, 4, 4, 8)[i])]
    assert seen.trained == sizes and seen.judged == [sizes[-1]] * 4  # on the final model
    [(weight, moments)] = seen.optimizer.state.items()
    assert weight is seen.weight and moments["step"] == 20  # one state, through every growth
    assert seen.run["full_steps"] == sizes.count([(6, 32), (6, 32)]) and seen.run["seconds"] > 0
    flops, pt, stages = 0, 0, fpt.parse_schedule(schedule)
    for step in range(1, 21):  # every batch as it was padded
        batch, stage = seen.batch_at(step), fpt.stage_at(stages, step, 20)
        shape = 4, P + batch["input_ids"].shape[1], batch["labels"].shape[1]
        partial = fpt.partial_t5(model, *stages[stage][:2], random_scores(), False)
        flops, pt = flops + fpt.step_flops(partial, *shape), pt + fpt.step_flops(model, *shape)
        if step % 5 == 0:
            assert [seen.run["log"][step // 5 - 1][key] for key in (
                "step", "stage", "flops", "pt_flops")] == [step, stage + 1, flops, pt]


def test_pt_is_prompt_tuning_as_peft_does_it(training):
    """The baseline of every comparison, against a loop over PEFT's own model."""
    seen = training("pt", steps=6, parts=2)
    moved = seen.states[0][1] - seen.start  # by the paper's rate, whatever the gradient's scale
    assert moved.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.02)
    theirs = peft.get_peft_model(tiny(), peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1)).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data.copy_(seen.start)
    optimizer = transformers.optimization.Adafactor(
        [weight], lr=0.3, scale_parameter=False, relative_step=False, weight_decay=1e-5)
    for step in range(1, 7):
        optimizer.zero_grad()
        theirs(**seen.batch_at(step), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    torch.testing.assert_close(weight, seen.weight, rtol=1e-4, atol=1e-4)


def test_token_losses_and_accumulated_parts_are_the_stock_loss(tokenizer):
    """Whatever the lengths of the targets: a mean of means would not."""
    model, rows = tiny(), [("w01 " * i, ("w02 " * i,)) for i in range(1, 6)]
    batch, prompt = fpt.collate(fpt.encode(tokenizer, TEXT, 99, rows)), fpt.SoftPrompt(
        model.shared.weight[:P])
    embeds, mask = prompt(model.shared(batch["input_ids"]), batch["attention_mask"])
    stock = model(inputs_embeds=embeds, attention_mask=mask, labels=batch["labels"])
    shown, real = batch["labels"].clamp(min=0), batch["labels"] != -100
    by_hand = -stock.logits.softmax(2).gather(2, shown[..., None])[..., 0].log() * real
    losses = fpt.token_losses(model, mask, batch["labels"], inputs_embeds=embeds)
    torch.testing.assert_close(losses, by_hand, rtol=1e-4, atol=1e-6)
    stock.loss.backward()
    for parts in 1, 2, 5:
        own = fpt.SoftPrompt(prompt.weight)
        loss = fpt.gradient(model, own, batch, parts)
        torch.testing.assert_close(loss, stock.loss.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(own.weight.grad, prompt.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_run_resumed_anywhere_ends_in_the_same_bytes_and_another_seed_does_not(training):
    def values(run):
        return {**run, "seconds": 0, "best": (*run["best"][:2], run["best"][2].tolist())}
    small = tiny(num_layers=4, num_decoder_layers=2)
    whole, other = training(model=small), training(model=small, seed=1)
    assert not torch.equal(whole.start, other.start) and not torch.equal(whole.weight, other.weight)
    for step in 0, 1, 4, 7, 13, 20:  # 0: from the start
        again = training(model=small, start=whole.states[step - 1] if step else None)
        assert torch.equal(again.weight, whole.weight) and again.trained == whole.trained[step:]
        assert values(again.run) == values(whole.run)


def test_the_best_prompt_is_the_later_of_equals_and_the_logged_loss_a_mean(training):
    scores = [{"em": em, "f1": 100 - i} for i, em in enumerate((10, 30, 30, 20))]  # em alone counts
    seen, each = (training("pt", steps=7, every=every, dev=dev, rows=examples(4, 3))
                  for every, dev in ((2, scores), (1, scores * 2)))
    (dev, step, prompt), log = seen.run["best"], seen.run["log"]
    assert (dev, step) == (scores[2], 6) and torch.equal(prompt, seen.states[5][1])
    assert [(row["step"], row["dev"], row["best"]) for row in log] == [*zip(
        (2, 4, 6, 7), scores, (10, 30, 30, 30))]  # the last update is evaluated, too
    loss = [row["loss"] for row in each.run["log"]]
    assert [row["loss"] for row in log] == pytest.approx(
        [(loss[0] + loss[1]) / 2, (loss[2] + loss[3]) / 2, (loss[4] + loss[5]) / 2, loss[6]])
    assert loss[6] < 0.9 * loss[0], loss  # one batch, fitted better and better


@pytest.mark.parametrize(("bad", "step"), [("gradient", 3), ("clip_grad_norm_", 3), ("rate", 1)])
def test_a_number_that_is_not_finite_stops_the_run(bad, step, training, monkeypatch):
    """The loss alone, the norm alone, and a rate that is too high."""
    calls, place = [], fpt if bad == "gradient" else torch.nn.utils
    if bad != "rate":
        original = getattr(place, bad)
        monkeypatch.setattr(place, bad, lambda *how: calls.append(1) or original(*how) * (
            math.nan if len(calls) == step else 1))
    with pytest.raises(FloatingPointError, match=rf"update {step}\b"):
        training("pt", lr=1e39 if bad == "rate" else 0.3)


def test_train_can_be_copied():
    tree = ast.parse((ROOT / "fpt.py").read_text())
    own = {node.name: node for node in tree.body if hasattr(node, "name")}
    reached, found = set(), {"train"}
    while found:
        reached |= found
        found = {node.id for name in found for node in ast.walk(own[name])
                 if isinstance(node, ast.Name) and node.id in own} - reached
    assert {"gradient", "kept_layers", "SoftPrompt"} < reached and len(reached) <= 25
    assert own["train"].end_lineno - own["train"].lineno < 50


# ====== Answers to exercises of tutorial.md =======================================================


def test_exercise_1_without_layer_0_a_t5_reads_a_bag_of_words():
    """The order of the source changes nothing but the order of the vectors it becomes."""
    model, order = tiny(), torch.tensor([3, 0, 5, 1, 4, 2])
    source = torch.randn(1, 6, D, generator=torch.Generator().manual_seed(0))
    headless = fpt.replaced(model, "encoder.block", torch.nn.ModuleList(model.encoder.block[1:]))
    for net, same in (headless, True), (model, False):
        straight, mixed = (net.encoder(inputs_embeds=x).last_hidden_state
                           for x in (source, source[:, order]))
        assert torch.allclose(straight[:, order], mixed, atol=1e-5 if same else 1e-2) is same


def test_exercise_2_layers_that_a_growth_takes_away():
    for total, gone in (12, [[5], [6, 8], []]), (24, [[13], [12, 14, 16, 18, 20], []]):
        sets = [{*fpt.kept_layers(total, total * i // 4)} for i in (1, 2, 3, 4)]
        assert [sorted(small - large) for small, large in zip(sets, sets[1:])] == gone


def test_exercise_3_shares_of_equal_cost():
    """Every stage of `cr` on t5-base spends the same: shares as one over the cost of an update."""
    with torch.device("meta"):  # shapes alone
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=768, d_ff=3072, num_layers=12, num_heads=12))
    scores = {side: [torch.arange(3072)] * 12 for side in SIDES}
    costs = [fpt.step_flops(fpt.absorbed(fpt.partial_t5(model, size, size, scores, False)),
                            32, 102, 6) for size in (0.25, 0.5, 0.75, 1)]
    total = sum(1 / cost for cost in costs)
    assert [round(1 / cost / total, 2) for cost in costs] == [0.48, 0.26, 0.16, 0.1]
    assert round(4 / total / costs[3], 2) == 0.42  # FLOPs over pt's


# ====== 6 Tasks and data ==========================================================================

SUPER, MICRO = "aps/super_glue", ROOT / "micro"
LABELLED = {  # columns of the source, the text of label 0, 1, ...
    "mnli": ("hypothesis premise", "entailment neutral contradiction"),
    "qqp": ("question1 question2", "not_duplicate is_duplicate"),
    "rte": ("sentence1 sentence2", "entailment not_entailment"),
    "sst2": ("sentence", "negative positive"), "boolq": ("question passage", "False True"),
    "mrpc": ("sentence1 sentence2", "not_equivalent equivalent"),
    "cb": ("hypothesis premise", "entailment contradiction neutral"),
    "copa": ("choice1 choice2 premise question", "choice1 choice2"),
    "wic": ("word sentence1 sentence2", "False True")}
METRIC_OF = {"qqp": "binary_f1", "mrpc": "binary_f1", "cb": "macro_f1", "xsum": "rouge_l"}


@pytest.mark.parametrize("name", LABELLED)
def test_rows_of_classification_tasks(name, monkeypatch):
    def load_dataset(*which, revision=None):
        calls.append((*which, revision))
        if len(calls) == 1:
            raise RuntimeError("Dataset scripts are no longer supported, but found glue.py")
        return {"train": rows, split: rows[-1:], "test": [], "validation_mismatched": []}
    (columns, labels), calls = LABELLED[name], []
    row = {"idx": 7, "start1": 0, **{column: "{%s}" % column for column in columns.split()}}
    rows = [{**row, "label": i} for i in range(len(labels.split()))]
    split = "validation_matched" if name == "mnli" else "validation"
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task, train, validation = fpt.load_hub(name)
    source = " ".join(f"{column}: {{{column}}}" for column in columns.split())
    assert train == [(source, (label,)) for label in labels.split()]
    assert validation == train[-1:] and task.metric == METRIC_OF.get(name, "accuracy")
    repository = SUPER if name in ("boolq", "cb", "copa", "wic") else "nyu-mll/glue"
    assert calls == [(repository, name, how) for how in (None, "refs/convert/parquet")]
    with pytest.raises((ValueError, LookupError)):  # an unlabelled row; not "the last label"
        fpt.hub_examples(task, {**row, "label": -1})


@pytest.mark.parametrize(("name", "repository", "row", "source", "learned"), [
    ("record", SUPER, {  # a full stop ends what has none; every distinct answer is learned
        "passage": "A\n@highlight\nB!\n@highlight\n'C'\n@highlight\n\"D\"\n@highlight\nE",
        "query": "Q", "entities": ["E", "F G"], "answers": ["F G", "F G", "E"], "idx": 7},
     "query: Q entities: E, F G passage: A. B! 'C' \"D\" E.", [("F G", "E"), ("E", "F G")]),
    *(("squad2", "rajpurkar/squad_v2", {"context": "C", "question": "Q", "answers": {"text": text}},
       "question: Q context: C", found) for text, found in (
           (["a b", "a", "a b"], [("a b", "a")]), ([], [("no answer",)]))),
    ("xsum", "EdinburghNLP/xsum", {"document": "D\nE", "summary": "S"}, "D\nE", [("S",)])])
def test_rows_of_text_tasks(name, repository, row, source, learned):
    task = fpt.TASKS[name]
    assert (task.hub, task.labels, task.metric) == (repository, (), METRIC_OF.get(name, "squad"))
    assert fpt.hub_examples(task, row) == [(source, answers) for answers in learned]
    assert fpt.TASKS.keys() - LABELLED.keys() == {"record", "squad2", "xsum"}


def test_dev_is_carved_by_source_and_limit_is_a_sample(tmp_path):
    folder = str(write_task(tmp_path / "task", validation=30))
    rows = [(source, (target,)) for source, _ in examples(40, 1) for target in ("yes", "no")]
    lines = [json.dumps({"source": source, "target": target}) for source, (target,) in rows]
    Path(folder, "train.jsonl").write_text("\n".join(lines), "utf-8-sig")  # each source twice
    task, train, dev, validation = fpt.load_data(folder, dev=6)
    held = {source for source, _ in dev}
    assert len(dev) == len(held) == 6 and set(dev) < set(rows)
    assert train == [row for row in rows if row[0] not in held] and train[:2] == rows[:2]
    assert validation == examples(30, 2) and task == fpt.Task(labels=("yes", "no"))
    assert len(fpt.load_data(folder, dev=500)[2]) == 8  # a fifth at most
    *others, sample = limited = fpt.load_data(folder, 6, limit=10)
    assert limited == fpt.load_data(folder, 6, limit=10) and others == [task, train, dev]
    assert len(set(sample)) == 10 and set(validation[:10]) != set(sample) < set(validation)


@pytest.mark.parametrize(("name", "content", "says"), [
    ("task.json", "[]", ""), ("task.json", '{"labls": ["a"]}', ".*labls"),
    ("task.json", '{"metric": "bleu"}', ".*rouge_l"), ("train.jsonl", "", ""),
    ("train.jsonl", '{"source": "s", "target": "yes"}\nrubbish\n', ", line 2.*rubbish"),
    ("train.jsonl", "\udcff", ""), ("validation.jsonl", "{}\n\udcff", ""),  # bytes, but not UTF-8
    ("validation.jsonl", '{"source": " ", "target": "yes"}', ", line 1.*empty"),
    ("validation.jsonl", '{"source": "s", "target": []}', ", line 1.*empty"),
    ("train.jsonl", '{"source": "s", "target": ["yes", "no"]}', ", line 1.*'no'.* is not one"),
    ("validation.jsonl", '{"source": "s", "target": "maybe"}', ", line 1.*maybe.*yes.*no")])
def test_a_bad_task_folder_names_file_and_line(name, content, says, tmp_path):
    (write_task(tmp_path / "task") / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=name + says):
        fpt.load_data(str(tmp_path / "task"), 5)


def test_encode_and_collate_cut_pad_and_mask(tokenizer):
    rows, word = [("w01 w02 w03 w04", ("yes w07",)), ("w05", ("no",))], WORDS.index
    batch = fpt.collate(fpt.encode(tokenizer, TEXT._replace(max_target=3), 3, rows))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[word("w01"), word("w02"), 1], [word("w05"), 1, 0]],  # 1 ends a text
        "labels": [[3, word("yes"), 1], [3, word("no"), 1]], "attention_mask": [[1] * 3, [1, 1, 0]]}
    task = fpt.Task("", ("yes", "no yes"), max_target=2, prefix="")
    batch = fpt.collate(fpt.encode(tokenizer, task, 9, [("w01", ("yes",)), ("w01", ("no yes",))]))
    yes, no_yes = [word("yes"), 1], [word("no"), word("yes"), 1]  # labels are not cut
    assert batch["labels"].tolist() == [[*yes, -100], no_yes]
    assert fpt.label_ids(tokenizer, task) == [yes, no_yes]


def drawn(count, updates, size=4, pool=3, seed=0):
    """The batches of these updates; an example's tokens are its number, as often as it is long."""
    batch_at = fpt.batches(range(1, count + 1), lambda rows: [
        ([i] * (i * 7 % 19 + 1), [1]) for i in rows], seed, size, pool)
    return [batch_at(update)["input_ids"] for update in updates]


@pytest.mark.parametrize(("count", "size", "pool"), [(41, 4, 3), (43, 4, 5), (12, 4, 6), (7, 4, 3)])
def test_batches_are_pure_and_no_example_comes_twice_in_a_pass(count, size, pool):
    per_pass, order = count // size, list(range(1, 1 + 6 * (count // size)))
    whole = [batch[:, 0].tolist() for batch in drawn(count, order, size, pool)]
    assert [batch[:, 0].tolist() for batch in drawn(count, order, size, pool, seed=1)] != whole
    used = [frozenset(sum(whole[i:i + per_pass], [])) for i in range(0, len(whole), per_pass)]
    assert {len(one) for one in used} == {per_pass * size}
    assert (len(set(used)) > 1) is (count % size > 0)  # what is left out differs
    random.Random(0).shuffle(order)
    for update, batch in zip(order, drawn(count, order, size, pool)):
        assert batch[:, 0].tolist() == whole[update - 1]  # whatever came before
    pooled, plain = (drawn(400, range(1, 101), pool=pool) for pool in (50, 1))
    assert sum((batch == 0).sum() for batch in pooled) < 0.2 * sum((b == 0).sum() for b in plain)


def test_load_model_freezes_casts_and_refuses_what_is_not_whole_or_no_t5(here, tmp_path):
    folder = shutil.copytree(here / "model", tmp_path / "model")
    for precision, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        model, _ = fpt.load_model(str(folder), "cpu", precision)
        assert (model.config._attn_implementation == "eager") is (precision == "bf16")  # on a CPU
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training or getattr(m, "p", 0) for m in model.modules())  # no dropout
        for name, tensor in tiny().state_dict().items():  # the untied head among them
            torch.testing.assert_close(model.state_dict()[name], tensor.to(dtype), rtol=0, atol=0)
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(ValueError, match="see tokenizer"):  # transformers makes one up
        fpt.load_model(str(bare), "cpu", "fp32")
    whole, settings = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    final, resized = "decoder.final_layer_norm.weight", {  # what a resize of embeddings does
        "lm_head.weight": whole["shared.weight"].clone()}
    for says, changes, weights in [
            (final, {}, {name: whole[name] for name in whole if name != final}),
            ("do not fit.*DenseRelu", {"d_ff": D_FF + 1}, whole), ("head", {}, whole | resized),
            ("umt5", {"model_type": "umt5"}, whole), ("bart", {"model_type": "bart"}, whole)]:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(json.loads(settings) | changes))
        with pytest.raises((ValueError, RuntimeError), match=says):
            fpt.load_model(str(folder), "cpu", "fp32")


def test_what_is_remarked_before_the_first_update(tokenizer, capsys):
    yes, no = ("yes",), ("no",)
    for task, train, validation, remarks in [
            (YES_NO, [("w01", yes), ("w03", no)], [("w05", no)], ""),
            (YES_NO, [("w01", yes), ("w02 w02", yes)], [("zebra", yes), ("w01", yes)],
             "1 .*cut.*w02 w02.*\n.*1 .*unkn.*zebra.*\n.*1 .*in train.*w01.*\n.*1 .*train.*no.*"),
            (TEXT, [("w01", ("w02 " * 5,)), ("no", ("no\nno",))], [], "1 .*cut.*\n.*1 .*changes.*"),
            (fpt.Task(metric="squad"), [("w01", ("W02-", "no"))], [("w03", ("a", "w02."))],
             r"2 .*unkn.*\n.*2 answers.* squad .*\('a', ''\)")]:
        fpt.remark(task, train, [("w04", yes)], validation, tokenizer, 2)
        assert re.fullmatch("warning: " * bool(remarks) + remarks, capsys.readouterr().out.strip())


# ====== 7 Evaluate ================================================================================


def test_metrics_by_hand():
    def scores_of(metric, *pairs, labels=()):
        return fpt.METRICS[metric]([text for text, _ in pairs],
                                   [("s", answers) for _, answers in pairs], labels)
    pairs = ("a", ("a",)), ("b", ("a",)), ("a", ("a",)), ("b", ("b",))
    assert scores_of("accuracy", *pairs, (" c", ("b", "c"))) == {"accuracy": 80}
    binary = scores_of("binary_f1", *pairs, labels=("a", "b"))  # precision 1/2, recall 1
    assert binary == {"accuracy": 75, "f1 of b": pytest.approx(100 * 2 / 3)}
    # Macro, as sklearn's default: "c" never occurs and does not count. Of "a": P 1, R 2/3.
    macro = scores_of("macro_f1", *pairs, labels=("a", "b", "c"))
    assert macro == {"accuracy": 75, "f1": pytest.approx(100 * (0.8 + 2 / 3) / 2)}
    squad = [  # prediction, answers, exact match, token F1; articles and case do not count
        ("The cat!", ("cat",), 1, 1), ("black cat", ("a cat", "dog"), 0, 2 / 3),
        ("dog", ("a cat", "dog"), 1, 1), ("a b c d", ("c d e",), 0, 4 / 6), ("", ("cat",), 0, 0),
        ("no answer", ("no answer",), 1, 1), ("answer", ("no answer",), 0, 0),
        ("no answer", ("answer",), 0, 0), ("no answer", (".",), 1, 1),
        ("no answer", ("interventionism", ".", "interventionism"), 0, 0)]
    for *pair, em, overlap in squad:
        assert [*scores_of("squad", pair).values()] == pytest.approx([100 * em, 100 * overlap])
    for *pairs, expected in [
            (("w x y z", ("w y z v",)), 75), (("w x", ("w x y z",)), 200 / 3),  # P 1, R 1/2
            (("w x", ("y z", "w x")), 100), (("cats", ("cat",)), 0), (("", ("cat",)), 0),
            (("Кошка, на крыше", ("кошка на крыше",)), 100), (("собака", ("кошка",)), 0),
            (("राम की किताब", ("राम का कतब",)), 100 / 3), (("snake_case", ("snake case",)), 100),
            (("w x", ("w x",)), ("cat", ("dog",)), 50)]:
        assert scores_of("rouge_l", *pairs) == {"rouge_l": pytest.approx(expected)}, pairs


@torch.no_grad()
def test_rank_classification_equals_separate_full_forwards(tokenizer):
    model, prompt = tiny(), fpt.SoftPrompt(tiny(seed=1).shared.weight[:P])
    task = fpt.Task("", ("yes", "no", "w07 w08"))  # of different lengths: a sum, not a mean
    rows, expected = [(source, ("yes",)) for source, _ in examples(12, 5)], []
    for source, _ in rows:
        embeds = encoded(tokenizer, model, prompt.weight, source)
        losses = [model(inputs_embeds=embeds, labels=torch.tensor([ids])).loss.item() * len(ids)
                  for ids in fpt.label_ids(tokenizer, task)]
        expected.append(task.labels[losses.index(min(losses))])
    assert len(set(expected)) > 1  # or the test would prove little
    for size, start in (1, 0), (5, 0), (5, 4):  # another split has another score
        share = 100 * expected[start:].count("yes") / (12 - start)
        assert fpt.evaluate(model, prompt, tokenizer, task, rows[start:], config(batch=size)) == (
            {"accuracy": pytest.approx(share)}, expected[start:])  # not as sorted by length


@torch.no_grad()
def test_text_is_generated_greedily_whatever_the_model_folder_says(here, tokenizer, tmp_path):
    """The likeliest token after the likeliest token, each by a forward pass over all of them."""
    stock, prompt = tiny(), fpt.SoftPrompt(tiny(seed=1).shared.weight[:P])
    folder, rows, expected = shutil.copytree(here / "model", tmp_path / "m"), examples(7, 6), []
    for name, changes in ("config.json", {"return_dict": False}), (
            "generation_config.json", {"num_beams": 4, "no_repeat_ngram_size": 1}):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | changes))
    model, _ = fpt.load_model(str(folder), "cpu", "fp32")
    for source, _ in rows:
        embeds, ids = encoded(tokenizer, stock, prompt.weight, source), [0]
        while len(ids) <= TEXT.max_target and ids[-1] != 1:
            logits = stock(inputs_embeds=embeds, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert len(set(expected)) > 1 and any(  # and some repeat a word
        len(set(text.split())) < len(text.split()) for text in expected)
    assert fpt.evaluate(model, prompt, tokenizer, TEXT, rows, config(batch=3))[1] == expected


# ====== 8 Record, compare, and main ===============================================================

COMMAND_FILES = sorted(["comparison.png", "settings.json", *(
    f"{name}-seed{seed}/{file}" for name in ("pt", "cr") for seed in (0, 1) for file in (
        "log.jsonl", "predictions.jsonl", "prompt/adapter_config.json",
        "prompt/adapter_model.safetensors", "results.json"))])


def contents(out):
    """The files of a command; what may differ between two of the same settings is left out."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
             if path.is_file()}
    return {name: content if Path(name).name not in ("settings.json", "results.json") else {
        **json.loads(content), "out": "", "seconds": 0} for name, content in found.items()}


@pytest.fixture(scope="module")
def ended(here, tmp_path_factory):
    """`pt` and `cr` by one command: folder, results, and prompt and batch of every update."""
    out, updates, original = tmp_path_factory.mktemp("runs") / "new" / "out", [], fpt.gradient

    def gradient(model, prompt, batch, parts):
        updates.append((prompt.weight.detach().clone(), batch["input_ids"].tolist()))
        assert "AbsorbedAttention" in str(model.decoder)  # where it pays: in fp32 on a CPU
        return original(model, prompt, batch, parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fpt, "gradient", gradient)
        results = fpt.main(flags(here, out, "--schedule", "pt", "cr", "--seed", 0, 1))
    return types.SimpleNamespace(out=out, results=results, updates=updates)


def test_a_run_leaves_its_files_and_they_agree_with_each_other(ended, here, tokenizer):
    assert list(contents(ended.out)) == COMMAND_FILES  # no state, and no draft of a write
    task, _, dev, rows = fpt.load_data(str(here / "task"), 500)
    for result, name in zip(ended.results, ["pt-seed0", "cr-seed0", "pt-seed1", "cr-seed1"]):
        folder, log, plain = ended.out / name, result["log"], result["schedule"] == "pt"
        assert json.loads((folder / "results.json").read_text()) == result
        assert list(map(json.loads, (folder / "log.jsonl").read_text().splitlines())) == log
        assert [(row["step"], row["stage"]) for row in log] == (
            [(4, 1), (8, 1), (10, 1)] if plain else [(4, 2), (8, 4), (10, 4)])
        assert (result["flops"] == result["pt_flops"]) is plain
        # The scores once more: from the saved prompt on a stock model, and from the predictions.
        prompt = fpt.SoftPrompt(fpt.load_prompt(folder / "prompt"))
        scores, texts = fpt.evaluate(tiny(), prompt, tokenizer, task, rows, config())
        assert fpt.evaluate(tiny(), prompt, tokenizer, task, dev, config())[0] == result["dev"]
        assert list(map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())) == [
            [source, list(answers), text] for (source, answers), text in zip(rows, texts)]
        right = sum(text == answer for text, (_, [answer]) in zip(texts, rows))
        assert result["validation"] == scores == {"accuracy": pytest.approx(100 * right / 12)}
    # Schedules of a seed share the start and the data order.
    runs = [ended.updates[i:i + 10] for i in (0, 10, 20, 30)]
    starts, orders = [run[0][0] for run in runs], [[batch for _, batch in run] for run in runs]
    assert torch.equal(*starts[:2]) and torch.equal(*starts[2:]) and not torch.equal(*starts[1:3])
    assert orders[0] == orders[1] != orders[2] == orders[3]


def test_bf16_text_a_saved_start_and_nothing_deprecated(here, ended, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(transformers.logging.get_logger(), "handlers", [caplog.handler])
    monkeypatch.setattr(transformers.logging, "set_verbosity_error",  # which `load_model` calls
                        transformers.logging.set_verbosity_warning)
    transformers.utils.logging.warning_once.cache_clear()
    start, folder = ended.out / "cr-seed0" / "prompt", write_task(tmp_path / "text", labels=[])
    more = "--steps 1 --precision bf16 --checkpointing --accumulate 2 --schedule 0.5x1:1".split()
    fpt.main(flags(here, tmp_path / "out", "--task", folder, "--init", start, *more))
    assert not [row for row in caplog.records if "deprecat" in row.getMessage().lower()]
    moved = fpt.load_prompt(tmp_path / "out/0.5x1_1-seed0/prompt") - fpt.load_prompt(start)
    assert moved.pow(2).mean().sqrt().item() == pytest.approx(0.3, rel=0.01)  # one step from there


def fake_run(schedule, seed, best, flops, seconds=1.0, full_steps=4):
    """The results of a run of 10 updates with an evaluation every 2."""
    return {"schedule": schedule, "seed": seed, "dev": {"accuracy": best[-1], "f1": 0}, "log": [
        {"step": 2 * k, "best": dev, "flops": used} for k, (dev, used) in enumerate(
            zip(best, flops, strict=True), 1)], "validation": {"accuracy": best[-1] - 1},
            "flops": flops[-1], "seconds": seconds, "full_steps": full_steps}


def test_a_comparison_by_hand():
    """Of pt at 71 FLOPs the next evaluation is at 80, with 90; at 77: at 88, and 90. Four updates
    on the full model: what pt has after update 4. 99 % of where pt ends are 99 and 97.02."""
    runs = [fake_run("pt", 0, [50, 60, 90, 90, 100], [20, 40, 60, 80, 100], 8.0, 10),
            fake_run("cr", 0, [50, 55, 70, 98, 99], [11, 21, 31, 51, 71], 6.0),
            fake_run("pt", 1, [50, 70, 70, 90, 98], [22, 44, 66, 88, 110], full_steps=10),
            fake_run("cr", 1, [50, 55, 60, 99, 99], [12, 23, 34, 56, 77])]
    frame = fpt.compare(runs)
    assert frame.loc["cr"].to_dict("list") == {
        "dev": [99, 99], "validation": [98, 98], "flops": [71, pytest.approx(70)],
        "seconds": [75, 100], "pt, same flops": [90, 90], "gain": [9, 9],
        "full alone": [60, 70], "to 99 %": [71, pytest.approx(100 * 56 / 110)]}
    assert frame.loc["pt", ["gain", "full alone"]].values.tolist() == [[0, 100], [0, 98]]
    dear = fake_run("fr", 0, [50, 51, 52, 53, 54], [1, 2, 3, 4, 101], full_steps=0)
    costs = fpt.compare([runs[0], dear]).loc["fr"]  # pt has no more to spend, fr gets nowhere
    assert costs[["pt, same flops", "gain", "full alone", "to 99 %"]].isna().all()
    assert list(fpt.compare([dear])) == ["dev", "validation"] and "54.0" in fpt.table([dear])
    pt, cr = fpt.figure(runs).axes[0].lines
    assert pt.get_xdata().tolist() == [21, 42, 63, 84, 105] and "cr" in cr.get_label()
    assert cr.get_ydata().tolist() == [50, 55, 65, 98.5, 99]
    assert "9.0 ± 0.0" in fpt.table(runs) and "[" not in fpt.table(runs)
    # Gains of 9, 9 and 12: t(0.975, 2) is 4.303, and the standard error of their mean is 1.
    runs += [fake_run("pt", 2, [50, 60, 87, 87, 97], [20, 40, 60, 80, 100]), {**runs[1], "seed": 2}]
    assert "10.0 ± 1.7 [5.7, 14.3]" in fpt.table(runs)


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """-> refused(flags): the line that `main` ends with. capfd: libraries must be silent too."""
    def run(*arguments):
        before, _ = contents(tmp_path), capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            fpt.main(arguments)
        assert stop.value.code == 2 and contents(tmp_path) == before
        return one_line(capfd.readouterr().err)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # closed: nothing answers there
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize(("more", "says"), [
    ("--steps many", "--steps.*many"), ("--schedul pt", "--schedul"), ("--task rte", "nyu-mll"),
    ("--task nope", "unknown task 'nope'.*rte"), ("--model no/such", "offline"),
    ("--schedule nope", "'nope'.*pt, ld, fr, cr"), ("--precision fp16", "fp32 or bf16.*overflow"),
    ("--device cuda:99", "CUDA|NVIDIA"), ("--device abacus", "abacus"), ("--batch 33", "--batch"),
    ("--accumulate 5", "--batch.*parts"), ("--init wide", "wide.*width"), ("--init none", "none"),
    ("--task alike", "hm.*eh.*same tokens"), ("--out wide", "wide"), ("--model wide", "wide"),
    ("--resume none", "none"), ("--init pointer", "[Hh]eader")])
def test_a_bad_flag(more, says, refused, here, tmp_path):
    for name, width in ("wide", D + 1), ("pointer", D):
        fpt.save_prompt(name, torch.zeros(P, width), "another")
    Path("pointer/adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec")
    write_task(tmp_path / "alike", labels=["yes", "no", "hm", "eh"])  # both <unk>
    assert re.search(says, refused(*flags(here, "out", *more.split())))


def test_a_stopped_command_goes_on_to_the_same_bytes(ended, here, tmp_path, monkeypatch, capfd,
                                                     refused, tokenizer):
    out, original, data = tmp_path / "out", fpt.gradient, fpt.load_data(str(here / "task"), 500)
    arguments = flags(here, out, "--schedule", "pt", "cr", "--seed", 0, 1)
    for number, update, step in (signal.SIGTERM, 13, 3), (signal.SIGINT, 1, 4):
        calls, _ = [], monkeypatch.setattr(fpt, "SIGNALS", [])
        monkeypatch.setattr(fpt, "gradient", lambda *how: (
            calls.append(1), fpt.SIGNALS.extend([number] * (len(calls) == update)),
            original(*how))[-1])
        with pytest.raises(SystemExit, match=str(128 + number)):
            fpt.main(arguments)
        assert f"--resume {out}" in one_line(capfd.readouterr().err)
        assert torch.load(out / "cr-seed0" / "state.pt", weights_only=True)["run"]["step"] == step
        arguments = ["--resume", str(out)]
    assert re.search("another lr$", refused(*arguments, "--lr", "0.1"))
    other = {"load_model": (tiny(seed=1), tokenizer), "load_data": (*data[:3], data[3][::-1])}
    for name in other:
        with monkeypatch.context() as patch:
            patch.setattr(fpt, name, lambda *_: other[name])
            assert "another model or data" in refused(*arguments)
    monkeypatch.setattr(fpt, "SIGNALS", [])
    assert len(fpt.main(arguments)) == 4 and contents(out) == contents(ended.out)


def test_killed_at_any_instant_a_command_ends_in_the_same_bytes(ended, here, tmp_path):
    """Behind each kind of write, and five times at random: an alarm is handled by nobody."""
    def live(seconds, write):
        if child := os.fork():
            return os.waitpid(child, 0)
        replace, count = os.replace, iter(range(write - 1, -1, -1))
        os.replace = lambda *paths: (
            replace(*paths), next(count, 1) or os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            fpt.main(arguments)
        finally:
            os._exit(0)
    draw, expected = random.Random(0), {
        name: content for name, content in contents(ended.out).items() if "cr-seed0" in name}
    for write in 1, 2, 3, 6, 7, 8, 9, 0:
        out = tmp_path / str(write)
        for kill in *range(1 if write else 5), None:
            arguments = ["--resume", str(out)]
            if not (out / "settings.json").exists():
                shutil.rmtree(out, ignore_errors=True)
                arguments = flags(here, out, "--schedule", "cr")
            live(*((0, 0) if kill is None else (0 if write else draw.uniform(0.05, 0.5), write)))
        assert {**contents(out), "settings.json": 0} == {**expected, "settings.json": 0}, write


def test_sigterm_ends_the_program_with_143(here, tmp_path):
    with subprocess.Popen(
            [sys.executable, ROOT / "fpt.py", *flags(here, "out", "--steps", 9999)], cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as program:
        while not (tmp_path / "out/cr-seed0/state.pt").exists() and program.poll() is None:
            time.sleep(0.1)
        program.terminate()
        assert "--resume out" in one_line(program.communicate(timeout=60)[1])
    assert program.returncode == 143


def test_two_processes_make_the_run_of_one(here, tmp_path):
    """Batches of 5 and 12 validation examples are no multiples of 2; rank 0 alone is heard."""
    more = "--schedule 0.5x0.5:0.4,1x1:0.6 --steps 3 --eval-every 1 --batch 5".split()
    [one] = fpt.main(flags(here, tmp_path / "one", *more))
    done = python("-m", "torch.distributed.run", "--nproc_per_node", 2, ROOT / "fpt.py",
                  *flags(here, "two", *more), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("always the most") == 1, done.stderr
    assert list(contents(tmp_path / "two")) == list(contents(tmp_path / "one"))
    two = json.loads(next((tmp_path / "two").rglob("results.json")).read_text())
    for mine, theirs in zip(one["log"], two["log"], strict=True):  # a loss tells the prompt before
        assert mine == {**theirs, "loss": pytest.approx(theirs["loss"], rel=1e-5)}


def test_the_default_command_and_help(tmp_path):
    done = python(ROOT / "fpt.py", *"--steps 8 --eval-every 4 --dev 40 --limit 40".split(),
                  cwd=tmp_path, HF_HUB_OFFLINE=None, HF_ENDPOINT="http://127.0.0.1:9",
                  CUDA_VISIBLE_DEVICES=None)
    assert done.returncode == 0 and "does not answer" not in done.stdout, done.stderr
    [out] = (tmp_path / "runs").iterdir()
    assert list(contents(out)) == COMMAND_FILES and "pt, same flops" in done.stdout
    # Help, and a mistyped flag, answer before torch is imported.
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    how = {"cwd": tmp_path, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = python(ROOT / "fpt.py", "--help", **how)
    assert (done.returncode, done.stderr) == (0, "") and "--max-source" in done.stdout
    assert "--modle" in one_line(python(ROOT / "fpt.py", "--modle", "t5-base", **how).stderr)


def test_import_is_light_and_a_dead_hub_is_not_waited_for(tmp_path):
    code = """import sys, fpt
assert not {"transformers", "datasets", "huggingface_hub", "sklearn", "torchmetrics", "matplotlib",
            "pandas", "scipy"} & set(sys.modules)
fpt.main(["--model", "t5-base", "--task", "rte", "--device", "cpu", "--out", "out"])"""
    done = python("-c", code, cwd=tmp_path, HF_HUB_OFFLINE=None, HF_ENDPOINT="http://127.0.0.1:9",
                  HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2 and "nyu-mll/glue" in one_line(done.stderr)  # waiting is said there
    assert "does not answer" in done.stdout and not (tmp_path / "out").exists()


def test_the_micro_task_and_what_the_micro_model_knows_of_it(tmp_path):
    """Entailed: each content word of the second sentence is in the first, or is the kind of one
    that is. The model knows that, in the whole and in parts; asked this way it does not say so."""
    make, (task, train, validation) = script(MICRO / "make.py"), fpt.load_folder(
        MICRO / "entailment")
    for source, (answer,) in train + validation:
        first, second = (set(part.split()) - set("a an in the".split()) for part in
                         source.removeprefix("sentence1: ").split(" sentence2: "))
        implied = first | {make.KIND[word] for word in first if word in make.KIND}
        assert (second <= implied) is (answer == "yes"), source
    model, tokenizer = fpt.load_model(str(MICRO / "model"), "cpu", "fp32")
    assert {*make.VOCABULARY} == {*tokenizer.get_vocab()}
    for depth in 0.25, 0.5, 1:
        part = fpt.partial_t5(model, depth, 1, decoder=False)
        assert make.exact(part, tokenizer, make.entailment) > 95
    scores, _ = fpt.evaluate(model, fpt.SoftPrompt(torch.zeros(0, 64)), tokenizer, task,
                             validation[:300], config(batch=32))
    assert scores["accuracy"] < 65  # half of the answers are yes
    make.main(["--out", str(tmp_path / "made"), "--steps", "3"])
    for name, content in contents(MICRO / "entailment").items():
        assert (tmp_path / "made/entailment" / name).read_bytes() == content, name


# ====== The documents say what the code does ======================================================

DOCUMENTS = ("README.md", "tutorial.md")
SCRIPTS = ("micro/make.py", "evidence/bench.py", "evidence/study.py")


def document(name):
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name):
    """[(info, text)] of the fenced blocks."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", document(name), flags=re.M | re.S)
    assert 2 * len(found) == document(name).count("```"), "a fence is not closed"
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_snippets_are_verbatim(name):
    for info, text in fences(name):
        assert info in ("python", "python recipe", "sh", "text"), info
        assert info != "python" or f"\n{text}" in document("fpt.py"), text  # whole lines


@pytest.mark.parametrize("name", ["fpt.py", *DOCUMENTS])
def test_commands_parse(name):
    text = fpt.__doc__ if name == "fpt.py" else document(name)
    assert re.search(r"python fpt\.py\s", text)
    for command in re.findall(r"(?:python|torchrun[^`\n]*?) fpt\.py\b([^`\n]*)", text):
        args = fpt.parse_args(shlex.split(command, comments=True))
        assert args.task in (*fpt.TASKS, "FOLDER", str(fpt.MICRO / "entailment")), command
        assert [fpt.parse_schedule(schedule) for schedule in args.schedule]
    for path, command in re.findall(r"python (evidence/\w+\.py)([^`\n]*)", text):
        script(ROOT / path).make_parser().parse_args(shlex.split(command, comments=True))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_flags_and_links_in_the_text_exist(name):
    prose = re.sub(r"^```.*?^```$", "", document(name), flags=re.M | re.S)
    used = set(re.findall(r"`(\w+)\(", prose))
    used |= set(re.findall(r"`(\w+)`", prose.partition("| copy |")[2].partition("\n\n")[0]))
    assert all(hasattr(fpt, each) or each == "len" for each in used), used
    flags = {"--" + key.replace("_", "-") for key in vars(fpt.parse_args([]))}
    flags |= {"--tasks", "--whole", "--with-requirements"}  # of micro/make.py, and of uv
    assert set(re.findall(r"(?<=[` ])--[a-z][\w-]*", prose)) <= flags
    links = re.findall(r"\]\((?!https?:)(.+?)\)", prose) + re.findall(r"^\* `(\S+)`: ", prose, re.M)
    assert links and all((ROOT / path).exists() for path in links), links
    words, tables = {"tutorial.md": (4500, 10), "README.md": (350, 1)}[name]
    assert len(re.findall(r"\S*\w\S*", prose)) <= words
    assert len(re.findall(r"^\|[ -]*---", prose, re.M)) <= tables


def test_the_tutorial_follows_the_file_and_shows_the_loop_once():
    text, loop = document("tutorial.md"), inspect.getsource(fpt.train)
    banners = re.findall(r"^# =+ ((?:\d |Extra).+?) =+$", document("fpt.py"), re.M)
    headings = re.findall(r"^## ((?:\d |Extra).+)$", text, re.M)
    assert headings == banners and [line[0] for line in banners] == list("12345678E")
    assert loop in text.partition("\n## 5 Train\n")[2].partition("\n## ")[0]
    assert not re.search(r"for (step|batch) in|\.step\(\)", text.replace(loop, ""))
    method = document("fpt.py").partition("# ====== 1 ")[2].partition("# ====== 6 ")[0]
    assert all(name in text for name in re.findall(r"^(?:def|class) (\w+)", method, re.M))


def test_the_recipe_for_a_trainer_grows_the_model_and_leaves_what_peft_loads(tmp_path, monkeypatch):
    """As it is printed, on five labels: stages seen, the adapter, a score above chance, 20 %."""
    make, sizes, partial = script(MICRO / "make.py"), [], fpt.partial_t5
    [recipe] = [text for info, text in fences("tutorial.md") if info == "python recipe"]
    make.write_task(tmp_path / "FOLDER", make.unasked(make.slot, 4000), make.UNASKED[make.slot])
    for printed, used in ("google/flan-t5-base", str(MICRO / "model")), ("30_000", "100"):
        assert recipe.count(printed) == 1 and recipe.count("\n") <= 45
        recipe = recipe.replace(printed, used)
    monkeypatch.setattr(fpt, "partial_t5", lambda model, depth, width, *how: sizes.append(
        (depth, width, how[1])) or partial(model, depth, width, *how))
    monkeypatch.chdir(tmp_path)
    exec(recipe, names := {})
    assert sizes == [(*stage[:2], False) for stage in fpt.SCHEDULES["cr"]]
    model, tokenizer = fpt.load_model(str(MICRO / "model"), "cpu", "fp32")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), "prompt").prompt_encoder
    assert torch.equal(theirs["default"].embedding.weight, names["prompt"])
    task, _, validation = fpt.load_folder(Path("FOLDER"))
    scores, _ = fpt.evaluate(model, fpt.SoftPrompt(fpt.load_prompt("prompt")), tokenizer, task,
                             validation[:200], config(batch=32))
    assert scores["accuracy"] > 40


def test_what_is_quoted_is_in_the_evidence_and_that_follows_from_the_records():
    study, evidence = script(ROOT / "evidence/study.py"), document("evidence/README.md")
    assert study.readme() == evidence
    pt, cr = study.of_default(study.compared(study.load("default")["cells"]), range(8, 32)).iloc
    stopped, evidence = cr["pt, same flops"], " ".join(evidence.split())
    assert f"by chance | {pt.dev} | {stopped} | {cr.dev} |" in document("README.md")
    assert (f"pt {pt.dev}, cr {cr.dev} with 0.64 of its FLOPs, and pt stopped at 0.70 of them "
            f"{stopped}.") in " ".join(fpt.__doc__.split())
    for name in (*DOCUMENTS, "fpt.py"):  # all that has an interval or a spread
        found = re.findall(r"[-+]?\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]|\d+\.\d ± \d+\.\d",
                           " ".join(document(name).split()))
        assert found and all(each in evidence for each in found), found
    measured = document("tutorial.md").partition("\n## What we")[2].partition("\n## ")[0]
    assert all(" ".join(row.split()) in evidence for row in re.findall(r"^\|.*\|$", measured, re.M))


def test_the_readme_is_tested_as_it_says():
    command = document(".ci/run").splitlines()[-1]
    assert document("README.md").count("\n") <= 45
    assert command == "python -m pytest -q" and __doc__.startswith(command)
    assert "\npip install -q -r requirements.txt\n" in document(".ci/run")
    for run in (command, "python fpt.py"):  # one line that does everything on a fresh machine
        assert ("sh", f"pip install -r requirements.txt && {run}\n") in fences("README.md")


def test_requirements_are_bounded_with_a_reason_each_and_met_here():
    for line in re.findall(r"^[^#\n].*", document("requirements.txt"), re.M):
        requirement = Requirement(line.partition(" #")[0].strip())
        assert {bound.operator for bound in requirement.specifier} == {">=", "<"}, line
        assert len(line.partition(" # ")[2].split()) >= 2, f"no reason: {line}"
        assert requirement.specifier.contains(
            importlib.metadata.version(requirement.name), prereleases=True), line


@pytest.mark.parametrize("path", ["fpt.py", "test_fpt.py", *SCRIPTS])
def test_style(path):
    assert not [line for line in document(path).splitlines() if len(line) > 100 or re.search(
        r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", line)]
    assert not [node.name for node in ast.walk(ast.parse(document(path)))
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50]


def test_fpt_is_small_and_explained():
    text, told, named = document("fpt.py"), set(), (ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, *named)) and ast.get_docstring(node):
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = dict(enumerate(text.splitlines(), 1))
    code = {i for i in lines if lines[i].strip() and lines[i].lstrip()[0] != "#"} - told
    told |= {i for i in lines if re.search(r"(^|\s)# ", lines[i])}
    assert len(lines) <= 1150 and len(code) <= 650 and len(told) >= 0.6 * len(code)
    assert all(node.name[0] == "_" or ast.get_docstring(node) for node in ast.parse(text).body
               if isinstance(node, named))
