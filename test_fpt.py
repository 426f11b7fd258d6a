"""python -m pytest -q        every test of fpt.py and of its documents; offline, about a minute

The tests assert values worked out by hand, or equality with something that fpt.py does not contain:
stock transformers models, PEFT, PyTorch's FLOP counter, a brute-force loop. Sections follow fpt.py.
"""

import ast
import copy
import importlib.util
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so these two come first
_EMPTY_CACHE = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = _EMPTY_CACHE.name  # nothing that this machine has cached can help a test
os.environ["OMP_NUM_THREADS"] = "1"  # on matrices this small a second thread only slows the first

import peft  # noqa: E402
import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Stack  # noqa: E402

import fpt  # noqa: E402

ROOT = Path(__file__).parent
KINDS = ("v1.0", "v1.1", "mt5")  # ReLU and tied head; gated GELU and untied head; the same as mT5
SIDES = ("encoder", "decoder")
LAYERS, D, INNER, D_FF, VOCAB, P = 6, 16, 12, 32, 64, 3  # INNER: heads * d_kv, not d_model
WORDS = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "yes", "no"] + [f"w{i:02}" for i in range(50)]
YES_NO = fpt.Task(labels=("yes", "no"))
TEXT = fpt.Task(max_target=6)

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
    return [(" ".join(f"w{i:02}" for i in row), ("no" if row[0] % 2 else "yes",)) for row in rows]


def config(**changes):
    """Settings of a small run; keyword arguments are flags."""
    settings = {"steps": 20, "batch": 4, "prompt_length": P, "eval_every": 5, "score_examples": 8,
                "device": "cpu", "model": "tiny", "task": "tiny"}
    return types.SimpleNamespace(**{**vars(fpt.parse_args(["--task", "tiny"])), **settings, **changes})


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


