"""FPT: Fast Prompt Tuning by progressive training, in one file.

    python fpt.py                             # offline, two minutes: pt against cr on a micro T5
    python fpt.py --model t5-base --task rte  # FPT: schedule cr, the paper's 30,000 updates
    python fpt.py --model t5-base --task rte --schedule pt cr --seed 0 1 2  # and a comparison
    python fpt.py --model PATH/TO/T5 --task FOLDER --schedule 0.5x0.5:0.4,1x1:0.6 --steps 2000
    python fpt.py --resume runs/FOLDER        # after a stop of any kind: on, to the same bytes

Prompt tuning (PT, Lester et al. 2021) learns P vectors in front of the input embeddings of a
frozen T5. Few parameters, but every update runs the whole model forward and backward. FPT (Huang
et al., Findings of EMNLP 2022, arXiv 2211.06840) makes the early updates cheap: the prompt is
trained first on a *partial* T5, with layers dropped and FFN neurons removed, that grows in stages
to the full model. The same prompt is carried ("recycled") through every growth.

    the paper                              here
    partial PLM: layer dropping (LD)       kept_layers, partial_t5
    FFN reduction (FR), compound (CR)      neuron_scores, partial_t5
    progressive training                   Stage, SCHEDULES, stage_at, train
    FLOPs (there: forward, linear layers)  step_flops
    prompt tuning (PT)                     SoftPrompt, init_prompt
    "Improve": PT at the same FLOPs        compare

Measured with the first command and seeds 0 to 15, on a micro T5 made to survive layer dropping
(evidence/micro.json; dev accuracy in %): pt 96.8, cr 98.6 with 0.64 of its FLOPs, and pt stopped
at the FLOPs of cr 90.3. No pretrained T5 has been run yet. Where it gains less: tutorial.md.

What this is not: a library of tuning methods (PEFT is; the prompts saved here load there), a way
to tune weights, or for models other than T5s. Lines that differ on purpose from the authors' code
(thunlp/FastPromptTuning) are marked "Official:"; tutorial.md collects them in one table.

Glossary
    B        examples in a batch
    P        vectors in the soft prompt (20 in the paper)
    T        tokens of the source, padded to the longest of the batch
    S        tokens of the target, likewise
    d, V     d_model, the width of the vectors between layers; tokens of the vocabulary
    d_ff     neurons of a feed-forward network (FFN): neuron j is row j of wi and column j of wo
    L, C     layers ("blocks") of the encoder or of the decoder; labels of a task
    depth    share of the L layers that a partial model keeps (Table 1: "Enc/Dec layers")
    width    share of the d_ff neurons that each layer keeps  (Table 1: "FFN dim")
    stage    a depth, a width, and the share of all updates spent there
    update   one optimiser step on one batch, counted from 1
"""

import argparse
import atexit
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

# ====== Config ====================================================================================


class UserError(Exception):
    """Something the user can mend: `main` prints it as one line and exits with code 2."""


class Stopped(KeyboardInterrupt):
    """SIGINT (2) or SIGTERM (15): `main` exits with 128 more, as a shell would say it."""


def flag(default, text):
    """A field of `Config`; `text` is the help of its flag."""
    return dataclasses.field(default=default, metadata={"help": text})


_MICRO = Path(__file__).parent / "micro"  # the offline default: a model and a task like any other


@dataclasses.dataclass
class Config:
    """Every knob: its flag, its default (batch, updates, rate, P are the paper's), its help."""

    model: str = flag(str(_MICRO / "model"), "hub id or folder: T5 v1.0, v1.1, LM-adapted, Flan, "
                      "mT5 or ByT5")
    task: str = flag(str(_MICRO / "rte"), "a name of the task table, or a folder (task.json, "
                     "train.jsonl, validation.jsonl)")
    schedule: tuple = flag(("cr",), "pt, ld, fr, cr, fast, or depthxwidth:share,...; several run "
                           "in turn")
    seed: tuple = flag((0,), "of the data order and the initial prompt; several run in turn")
    steps: int = flag(30_000, "updates; the stages scale with it")
    batch: int = flag(32, "examples per update")
    prompt_length: int = flag(20, "P, vectors in the soft prompt")
    init: str = flag("uniform", "uniform, vocab, labels, or the folder of a saved prompt")
    lr: float = flag(0.3, "constant learning rate of Adafactor")
    eval_every: int = flag(500, "updates between evaluations on the dev part")
    dev: int = flag(500, "examples carved from train to choose the prompt; a fifth at most")
    limit: int = flag(0, "validation examples to report on; 0 means all")
    score_examples: int = flag(64, "train examples that score the FFN neurons")
    max_source: int = flag(492, "source tokens kept; with 20 prompt vectors the paper's 512")
    precision: str = flag("fp32", "fp32 or bf16")
    accumulate: int = flag(1, "parts that each process cuts its share of a batch into, for memory")
    checkpointing: bool = flag(False, "keep only the inputs of layers, and run them twice")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = flag(0, "CPU threads; 0 means torch's choice. Another number rounds otherwise")
    save_seconds: int = flag(60, "between checkpoints; 0 makes one after every update")
    out: str = flag("runs/TIME", "new folder for what this command writes")
    resume: str = flag("", "folder of a command that was stopped: go on, with the settings there")


def make_parser() -> argparse.ArgumentParser:
    """The flags of `Config`; one that cannot be read is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser("fpt.py", allow_abbrev=False, description=(
        "Tune a soft prompt for a frozen T5 by Fast Prompt Tuning: on a model that grows. Without "
        "flags: pt against cr, offline. A task folder may suggest other defaults (task.json)."))
    parser.error = lambda text: parser.exit(2, f"fpt.py: error: {text[:600]}; see --help\n")
    for field in dataclasses.fields(Config):
        several = isinstance(field.default, tuple)
        value = field.default[0] if several else field.default
        kind = {"action": "store_true"} if value is False else {
            "type": type(value), "nargs": "+" if several else None}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **kind,
                            help=f"{field.metadata['help']} (default: {value})")
    return parser


if __name__ == "__main__":
    for number in signal.SIGINT, signal.SIGTERM:  # until `main` listens, and when it has ended
        signal.signal(number, lambda number, _: os._exit(128 + number))
    make_parser().parse_args()  # --help and a mistyped flag answer at once: torch imports slowly

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# ====== 1 Partial models ==========================================================================


def kept_layers(total: int, keep: int) -> list[int]:
    """Indices of the layers that layer dropping keeps, evenly: kept_layers(12, 3) is [0, 5, 11].

    The first and the last layer stay, and gaps differ by at most one, the larger ones at the top.
    keep=1 gives [0]: layer 0 alone owns T5's relative position bias, and without it the model runs
    on, silently wrong. Sets of growing stages are not nested: 24 -> 12 lacks layer 13 of 24 -> 6.
    Raises ValueError unless 1 <= keep <= total.
    Official: `evenly_select_layers`, the same rule; it divides by zero for keep=1.
    """
    if not 1 <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} layers")
    if keep == 1:
        return [0]
    gap, longer = divmod(total - 1, keep - 1)  # the last `longer` of the keep-1 gaps are gap+1
    return [i * gap + max(0, i - (keep - 1 - longer)) for i in range(keep)]


def check_t5(config) -> None:
    """Raise ValueError unless a model with this config has the layout that is relied on below.

    umt5 looks alike and is refused: every layer of it has a position bias of its own, and
    transformers 5 scales its logits against its checkpoints.
    """
    if config.model_type not in ("t5", "mt5"):
        raise ValueError(f"a model of type {config.model_type}; FPT here is for T5 "
                         "(t5, v1.1, LM-adapted, Flan, mT5 or ByT5 checkpoints)")


def check_layout(model) -> None:
    """Raise ValueError unless transformers builds T5 from the parts that this file relies on."""
    import transformers

    def weights(module, *names):
        return [getattr(module, name).weight.shape for name in names]

    try:
        for side in "encoder", "decoder":
            for block in getattr(model, side).block:
                attention, ffn = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
                cross = block.layer[1].EncDecAttention if side == "decoder" else attention
                weights(ffn, "wo", *({"wi"} & set(ffn._modules) or ("wi_0", "wi_1")))
                for part in attention, cross:
                    weights(part, "q", "k", "v", "o")
                    assert part.n_heads * part.key_value_proj_dim == part.q.out_features
        weights(model, "shared", "lm_head")
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except (AttributeError, IndexError, AssertionError, ImportError) as error:
        raise ValueError(f"transformers {transformers.__version__} builds T5 otherwise than 5.2 to "
                         f"5.23, for which this was written: {error!r}") from None
    # It hooks the layers of each model that is asked for hidden states. Now, and once: a layer
    # that models share would be hooked, and counted, for each of them.
    maybe_install_capturing_hooks(model)


@torch.no_grad()
def neuron_scores(model, prompt: Tensor, batches) -> dict[str, list[Tensor]]:
    """Mean absolute activation of every FFN neuron, by which FFN reduction ranks them.

    The activation is the input of `wo`: relu(wi x) in T5 v1.0, gelu(wi_0 x) * wi_1 x in gated T5s.
    It is averaged over an example's unmasked positions, the prompt's too, and then over examples.

    Args:
        model: a T5ForConditionalGeneration in eval mode (dropout would blur the scores).
        prompt: [P, d]; the paper uses the initial one.
        batches: dicts of input_ids [B, T], attention_mask [B, T], labels [B, S] (-100 is masked).
    Returns:
        {"encoder": [Tensor[d_ff], ...], "decoder": [...]}, one fp32 tensor a layer, for this model.
    Raises ValueError without batches.
    Official: scores 1,000 examples of the *validation* split; give it train examples.
    """
    soft_prompt, mask, totals, count, hooks = SoftPrompt(prompt), {}, {}, 0, []

    def add(side, layer, activation):  # [B, positions, d_ff]; summed at once: L of them are large
        weight = mask[side].unsqueeze(-1).float()  # [B, positions, 1]
        mean = (activation.abs().float() * weight).sum(1) / weight.sum(1).clamp(min=1)  # [B, d_ff]
        totals[side, layer] = totals.get((side, layer), 0) + mean.sum(0)

    sides = {side: getattr(model, side).block for side in ("encoder", "decoder")}
    try:
        for side, blocks in sides.items():
            for layer, block in enumerate(blocks):
                hooks.append(block.layer[-1].DenseReluDense.wo.register_forward_pre_hook(
                    lambda _, inputs, side=side, layer=layer: add(side, layer, inputs[0])))
        for batch in batches:
            embeds = model.get_input_embeddings()(batch["input_ids"])  # [B, T, d]
            embeds, mask["encoder"] = soft_prompt(embeds, batch["attention_mask"])  # [B, P+T, d]
            mask["decoder"] = batch["labels"] != -100  # [B, S]
            model(inputs_embeds=embeds, attention_mask=mask["encoder"], labels=batch["labels"],
                  use_cache=False)
            count += len(embeds)
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise ValueError("no batches to score neurons on")
    return {side: [totals[side, i] / count for i in range(len(sides[side]))] for side in sides}


def view(module):
    """A copy of a module with the same tensors, and a table of children of its own to change."""
    if "forward" in vars(module):  # it would run the children of the original, whatever is changed
        raise ValueError("a layer is checkpointed, or hooked by accelerate: cut it before that")
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


def partial_t5(model, depth: float, width: float, scores=None, decoder: bool = True):
    """A T5 with a share `depth` of the layers and a share `width` of the FFN neurons of `model`.

    Of the same class (forward, loss, cache, `generate`), it shares every kept tensor with `model`;
    only narrowed FFN matrices are new memory. Both work in turn. Move, cast or save `model` alone.

    Args:
        depth, width: in (0, 1]; numbers of layers and neurons round half up, to at least one.
        scores: of `neuron_scores`, needed if width < 1; each layer keeps its top neurons, in order.
        decoder: False leaves it whole, as the paper does where targets are short labels.
    Raises ValueError for a share outside (0, 1], scores that are missing or of another model, or a
    `model` that is not a T5.
    """
    check_t5(model.config)
    check_layout(model)
    if not (0 < depth <= 1 and 0 < width <= 1) or (width < 1 and scores is None):
        raise ValueError(f"depth {depth}, width {width}: must be in (0, 1]; width < 1 needs scores")

    def part(share, total):  # 1e-9: in floating point 0.29 * 50 is 14.499999999999998
        return max(1, math.floor(share * total + 0.5 + 1e-9))

    def narrowed(block, ranking):
        keep = ranking.argsort(descending=True, stable=True)[:part(width, len(ranking))]  # nested
        block = view(block)
        block.layer = view(block.layer)
        block.layer[-1] = view(block.layer[-1])
        ffn = block.layer[-1].DenseReluDense = view(block.layer[-1].DenseReluDense)
        for name in {"wi", "wi_0", "wi_1", "wo"} & set(ffn._modules):  # T5 has no biases
            weight = getattr(ffn, name).weight.data.index_select(int(name == "wo"), keep.sort()[0])
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)  # [k, d]; wo: [d, k]
            setattr(ffn, name, linear)
        return block

    partial = view(model)
    for side in ("encoder", "decoder") if decoder else ("encoder",):
        stack = view(getattr(model, side))
        neurons = [block.layer[-1].DenseReluDense.wo.weight.shape[1] for block in stack.block]
        if width < 1 and [len(row) for row in scores[side]] != neurons:
            raise ValueError(f"the {side}'s scores are of another model than this")
        kept = kept_layers(len(stack.block), part(depth, len(stack.block)))
        stack.block = nn.ModuleList(stack.block[i] if width == 1 else
                                    narrowed(stack.block[i], scores[side][i]) for i in kept)
        setattr(partial, side, stack)
    return partial


# ====== 2 Schedule ================================================================================


class Stage(NamedTuple):
    """A partial model, and the share of all updates that run on it."""

    depth: float
    width: float
    share: float


# 6,000 x 3 and 12,000 of 30,000 updates. By the paper's count they give Table 2's FLOPs of T5-LARGE
# (72, 83, 65 %) and of XL with FR (84 %); XL's LD and CR (86, 74 %) need shares nobody published.
_GROWTH = ((0.25, 0.2), (0.5, 0.2), (0.75, 0.2), (1.0, 0.4))
SCHEDULES = {
    "pt": (Stage(1.0, 1.0, 1.0),),  # plain prompt tuning
    "ld": tuple(Stage(size, 1.0, share) for size, share in _GROWTH),  # layer dropping
    "fr": tuple(Stage(1.0, size, share) for size, share in _GROWTH),  # FFN reduction
    "cr": tuple(Stage(size, size, share) for size, share in _GROWTH),  # compound reduction: both
    # Not the paper's: found on the micro model, for it (tutorial.md, "A faster schedule").
    "fast": (Stage(0.25, 0.25, 0.4), Stage(0.5, 0.5, 0.4), Stage(1.0, 1.0, 0.2)),
}


def parse_schedule(text: str) -> tuple[Stage, ...]:
    """A preset's name, or stages: "0.5x0.25:0.3,1x1:0.7" is depth x width : share of the updates.

    A single partial stage ("0.25x1:1") is a row of the paper's Table 1. Raises ValueError with the
    reason if a part cannot be read, a number is outside (0, 1], or the shares do not add up to 1.
    """
    if text in SCHEDULES:
        return SCHEDULES[text]
    stages = []
    for part in text.split(","):
        numbers = re.fullmatch(r"\s*([\d.]+)x([\d.]+):([\d.]+)\s*", part)
        try:
            stages.append(Stage(*map(float, numbers.groups())))
        except (AttributeError, ValueError):
            raise ValueError(f"schedule {text!r}: {part!r} is none of {', '.join(SCHEDULES)}, nor "
                             "depthxwidth:share, as in 0.5x0.25:0.3,1x1:0.7") from None
        if not all(0 < number <= 1 for number in stages[-1]):
            raise ValueError(f"schedule {text!r}: the numbers of {part!r} must be in (0, 1]")
    total = sum(stage.share for stage in stages)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"schedule {text!r}: the shares add up to {total:g}, not 1")
    return tuple(stages)


def stage_at(schedule, step: int, steps: int) -> int:
    """Index of the stage that update `step` (1 to steps) runs in.

    Growth follows the boundary update, as in the official code: of 30,000, update 6,000 is the last
    of stage 0. Boundaries round half up, so a run of few updates may skip a stage.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"update {step} is outside 1..{steps}")
    share = 0.0
    for index, stage in enumerate(schedule[:-1]):
        share += stage.share
        if step <= math.floor(share * steps + 0.5 + 1e-6):
            return index
    return len(schedule) - 1


# ====== 3 Cost ====================================================================================


class AbsorbedAttention(nn.Module):
    """T5's cross-attention without keys and values of the source: cheaper for a few target tokens.

    A score is q . (W_k h), a key for each of T source vectors h in each layer. It is also
    (W_k' q) . h, a longer query for each of S target tokens. In the same way the values: W_v comes
    after the weighted mean. The same function, for a long source with about S / d_kv of the FLOPs
    of the forward pass, and nothing of length T to keep for the backward pass. Where that does not
    pay: the original attention.
    Not in the paper; in inference known as weight absorption (DeepSeek-V2).
    """

    def __init__(self, attention):
        super().__init__()
        self.attention = attention  # a T5Attention; its weights are shared

    def pays(self, target: int) -> bool:
        """For a label. Nearer to d_kv the gain in FLOPs is eaten up by the smaller products."""
        return 2 * target <= self.attention.key_value_proj_dim

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None,
                past_key_values=None, **kwargs):
        """hidden_states [B, S, d], key_value_states [B, P+T, d] -> ([B, S, d], None, None)."""
        own, (batch, target, _) = self.attention, hidden_states.shape
        if past_key_values is not None or not self.pays(target):  # `generate` keeps its keys
            return own(hidden_states, mask=mask, key_value_states=key_value_states,
                       position_bias=position_bias, past_key_values=past_key_values, **kwargs)
        heads = own.n_heads, own.key_value_proj_dim
        keys, values = (linear.weight.view(*heads, -1) for linear in (own.k, own.v))  # [H, d_kv, d]
        query = own.q(hidden_states).view(batch, target, *heads)  # [B, S, H, d_kv]
        query = torch.einsum("bshk,hkd->bshd", query, keys).flatten(1, 2)  # [B, S*H, d]
        scores = query @ key_value_states.mT  # [B, S*H, P+T]
        if mask is not None:  # [B, 1, 1 or S, P+T], of booleans or to be added, by version
            row = mask[:, 0, :1]  # [B, 1, P+T]: padding, alike for every target token
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~row, lowest) if row.dtype == torch.bool else scores + row
        weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
        mean = (weights @ key_value_states).view(batch, target, heads[0], -1)  # [B, S, H, d]
        out = torch.einsum("bshd,hkd->bshk", mean, values).flatten(2)  # [B, S, H*d_kv]
        return own.o(out), position_bias, None


def absorbed(model):
    """A view of a T5 whose cross-attention makes no keys and values where targets are short."""
    model, blocks = view(model), []
    model.decoder = view(model.decoder)
    for block in map(view, model.decoder.block):
        block.layer = view(block.layer)
        cross = block.layer[1] = view(block.layer[1])
        cross.EncDecAttention = AbsorbedAttention(cross.EncDecAttention)
        blocks.append(block)
    model.decoder.block = nn.ModuleList(blocks)
    return model


def checkpointed(model):
    """A view of a T5 whose layers keep their input alone, and run again in the backward pass.

    transformers' own switch works in train mode only, and turns dropout on with it.
    """
    from torch.utils.checkpoint import checkpoint

    def rerun(block):
        clone = view(block)
        clone.forward = functools.partial(checkpoint, block, use_reentrant=False,
                                          preserve_rng_state=False)  # nothing is random
        return clone

    model = view(model)
    for side in ("encoder", "decoder"):
        stack = view(getattr(model, side))
        stack.block = nn.ModuleList(map(rerun, stack.block))
        setattr(model, side, stack)
    return model


def step_flops(model, batch: int, source: int, target: int, backward: bool = True) -> int:
    """Exact matmul FLOPs (2 per multiply-add) of one prompt-tuning update of this (partial) model.

    `source` is P+T and `target` is S, both padded. The backward pass goes to the prompt *through
    frozen weights*: a linear layer costs its forward once more (dX, no dW), the two products of
    attention cost theirs twice. An update is 2.0 to 2.1 forwards, by length; the usual factor 3 of
    training overstates prompt tuning by 43 to 50 %. With backward=False: the forward pass alone.
    Equal to torch.utils.flop_counter.FlopCounterMode under eager attention.
    Official: the linear layers of a forward pass at 512 tokens, no attention products.
    """
    forward = gradient = 0

    def linear(positions, *layers):
        return 2 * batch * positions * sum(layer.weight.numel() for layer in layers)

    def products(attention, queries, keys):  # Q K^T and A V
        return 4 * batch * queries * keys * attention.q.out_features

    def ffn(block, positions):
        layers = block.layer[-1].DenseReluDense.children()
        return linear(positions, *(layer for layer in layers if isinstance(layer, nn.Linear)))

    for block in model.encoder.block:
        own = block.layer[0].SelfAttention
        once = linear(source, own.q, own.k, own.v, own.o) + ffn(block, source)
        twice = products(own, source, source)
        forward += once + twice
        gradient += once + 2 * twice
    for index, block in enumerate(model.decoder.block):
        own, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
        short = isinstance(cross, AbsorbedAttention) and cross.pays(target)
        cross = getattr(cross, "attention", cross)
        queries = linear(target, own.q, own.k, own.v, own.o, cross.q)
        once = linear(target, cross.o) + ffn(block, target)
        if short:
            queries += linear(target, cross.k)
            once += linear(target, cross.v)
            twice = 4 * batch * target * source * cross.n_heads * cross.v.in_features
        else:  # keys and values of the whole source in every layer: what a whole decoder costs
            once += linear(source, cross.k, cross.v)
            twice = products(cross, target, source)
        forward += queries + products(own, target, target) + once + twice
        gradient += once + 2 * twice
        if index == 0:  # before its first cross-attention the decoder has not met the prompt
            gradient -= twice // 2
        else:
            gradient += queries + 2 * products(own, target, target)
    head = linear(target, model.lm_head)
    return forward + head + (gradient + head if backward else 0)


def rerun_flops(model, batch: int, source: int, target: int) -> int:
    """What `checkpointed` adds to `step_flops`: every layer again, up to its last product.

    No gradient needs the output of `wo`, and torch stops there; the head is not run again.
    """
    def last(stack, positions):
        return positions * sum(block.layer[-1].DenseReluDense.wo.weight.numel()
                               for block in stack.block)

    spared = (last(model.encoder, source) + last(model.decoder, target)
              + target * model.lm_head.weight.numel())
    return step_flops(model, batch, source, target, backward=False) - 2 * batch * spared


# ====== 4 Soft prompt =============================================================================


class SoftPrompt(nn.Module):
    """P trainable vectors in front of the input embeddings: all that FPT trains.

    The parameter is fp32 whatever the model is; a bf16 prompt would round its updates away.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())  # [P, d]

    def forward(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Input embeddings [B, T, d] and mask [B, T] -> [B, P+T, d] and [B, P+T]."""
        # Cast first: torch.cat would promote the whole residual stream of a bf16 model to fp32.
        prompt = self.weight.to(embeds.dtype).expand(len(embeds), -1, -1)  # [B, P, d]
        ones = mask.new_ones(len(mask), len(self.weight))  # [B, P]
        return torch.cat([prompt, embeds], dim=1), torch.cat([ones, mask], dim=1)


def init_prompt(how: str, length: int, embeddings: Tensor, generator, first_ids=(), common=5000):
    """An initial prompt [P, d] from the embedding matrix [V, d].

    uniform: U(-1/sqrt(d), 1/sqrt(d)), the paper's. vocab: rows of `length` different tokens, drawn
    from the `common` most frequent (T5's vocabulary is sorted so; 0-2 are pad, eos, unk). labels:
    the rows of `first_ids`, then as vocab (Lester et al. 2021). ValueError if it cannot be made.
    `generator` (CPU) is the prompt's own, so every schedule of a seed starts from the same prompt.
    Official: the partial model draws random numbers before the prompt does, so starts differ.
    """
    if how == "uniform":
        bound = embeddings.shape[1] ** -0.5
        return torch.empty(length, embeddings.shape[1]).uniform_(-bound, bound, generator=generator)
    if how not in ("vocab", "labels"):
        raise ValueError(f"init {how!r} is none of uniform, vocab, labels")
    first = list(dict.fromkeys(first_ids)) if how == "labels" else []
    drawn = torch.randperm(min(common, len(embeddings)) - 3, generator=generator) + 3
    ids = (first + [i for i in drawn.tolist() if i not in first])[:length]
    if len(ids) < length:
        raise ValueError(f"a prompt of {length} vectors needs as many tokens; there are {len(ids)}")
    return embeddings[torch.tensor(ids, device=embeddings.device)].detach().float().cpu()


def save_prompt(folder, prompt: Tensor, model_name: str, trained_on: dict | None = None) -> None:
    """Write a prompt [P, d] as PEFT's prompt tuning; `PeftModel.from_pretrained` loads it.

    `trained_on` describes the model (`fingerprint`) and may hold more. PEFT does not read it.
    """
    from safetensors.torch import save

    if rank() == 0:
        Path(folder).mkdir(exist_ok=True)
    adapter = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",  # without it PEFT loads the folder and ignores the prompt
        "num_virtual_tokens": len(prompt),
        "num_transformer_submodules": 1,  # PEFT's default for T5, 2, wants another, unused [P, d]
        "token_dim": prompt.shape[1],
        "base_model_name_or_path": model_name,
        "inference_mode": True,
    }
    tensors = {"prompt_embeddings": prompt.detach().float().cpu().contiguous()}
    write(Path(folder) / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write(Path(folder) / "adapter_config.json", json.dumps(adapter, indent=2) + "\n")
    if trained_on:
        write(Path(folder) / "trained-on.json", json.dumps(trained_on, indent=2) + "\n")


def load_prompt(folder) -> Tensor:
    """The prompt [P, d] of a PEFT prompt-tuning folder, ours or PEFT's own: fp32, on the CPU.

    Raises ValueError if the folder holds none, or one with NaN or infinite values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [Path(folder) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    try:
        if not all(file.is_file() for file in files):  # a pipe would keep the reader waiting
            raise ValueError(f"it lacks {' or '.join(file.name for file in files)}")
        adapter = json.loads(files[0].read_text(encoding="utf-8"))
        prompt, length = load_file(files[1])["prompt_embeddings"], adapter["num_virtual_tokens"]
        if (adapter["peft_type"] != "PROMPT_TUNING" or type(length) is not int
                or not 0 < length <= len(prompt)):
            raise ValueError("its files do not describe one")
        if prompt.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"it is of {prompt.dtype}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no prompt saved by fpt.py or PEFT: {error}") from None
    prompt = prompt.float()
    if prompt.dim() != 2 or not prompt.isfinite().all():
        raise ValueError(f"the prompt in {folder} is no matrix, or has NaN or infinite values")
    return prompt[:length]  # rows beyond are PEFT's decoder prompt, which T5 never sees


# ====== 5 Tasks and data ==========================================================================


class Task(NamedTuple):
    """A task as data. Without `labels` it is free text, answered by `generate`."""

    source: str = ""  # template over the columns of a hub data set
    labels: tuple[str, ...] = ()  # verbalizer: the text of label 0, 1, ... in the data set's order
    metric: str = "accuracy"  # a name in METRICS
    decoder: bool = False  # does the decoder shrink too? Where targets are labels it costs little
    hub: tuple[str, str] = ("", "")  # repository and configuration
    validation: str = "validation"  # the split that is reported
    max_target: int = 64  # tokens of free text kept, and generated at most; labels stay whole
    prefix: str = "<extra_id_0>"  # how span-corruption targets begin; the official code keeps it
    flags: str = ""  # of the command line, as a task folder suggests them (`suggested_flags`)
    note: str = ""  # what to know about the results; printed below them


_GLUE, _SUPER = "nyu-mll/glue", "aps/super_glue"  # full ids: datasets 5 refuses the short ones
TASKS = {
    # The paper's five, with its templates and label words.
    "mnli": Task("hypothesis: {hypothesis} premise: {premise}",
                 ("entailment", "neutral", "contradiction"),
                 hub=(_GLUE, "mnli"), validation="validation_matched"),
    "qqp": Task("question1: {question1} question2: {question2}", ("not_duplicate", "is_duplicate"),
                "accuracy_f1", hub=(_GLUE, "qqp")),
    "squad2": Task("question: {question} context: {context}", metric="em_f1", decoder=True,
                   hub=("rajpurkar/squad_v2", "squad_v2")),
    "record": Task("query: {query} entities: {entities} passage: {passage}", metric="em_f1",
                   decoder=True, hub=(_SUPER, "record")),
    "xsum": Task("{document}", metric="rouge_l", decoder=True,
                 hub=("EdinburghNLP/xsum", "default"), max_target=128),
    # Not in the paper. t5-base and the other v1.0 models saw these (and most of the five) in their
    # own pre-training: their scores show that a run works, not what a prompt can learn.
    "rte": Task("sentence1: {sentence1} sentence2: {sentence2}", ("entailment", "not_entailment"),
                hub=(_GLUE, "rte")),
    "sst2": Task("sentence: {sentence}", ("negative", "positive"), hub=(_GLUE, "sst2")),
    "mrpc": Task("sentence1: {sentence1} sentence2: {sentence2}", ("not_equivalent", "equivalent"),
                 "accuracy_f1", hub=(_GLUE, "mrpc")),
    "boolq": Task("question: {question} passage: {passage}", ("False", "True"),
                  hub=(_SUPER, "boolq")),
    "cb": Task("hypothesis: {hypothesis} premise: {premise}",
               ("entailment", "contradiction", "neutral"), "accuracy_macro_f1", hub=(_SUPER, "cb")),
    "copa": Task("choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
                 ("choice1", "choice2"), hub=(_SUPER, "copa")),
    "wic": Task("word: {word} sentence1: {sentence1} sentence2: {sentence2}", ("False", "True"),
                hub=(_SUPER, "wic")),
}


class Example(NamedTuple):
    """An input, the text to learn, and every text that counts as right."""

    source: str
    target: str
    answers: tuple[str, ...]


class Data(NamedTuple):
    """A task and its examples; no source of `dev` is in `train`."""

    task: Task
    train: list[Example]
    dev: list[Example]
    validation: list[Example]


def load_data(name: str, dev: int, limit: int = 0) -> Data:
    """The task `name`, of the table or a folder; `dev` is carved from train, the same every time.

    Official: chooses the prompt, and the neurons, on the validation split that it reports.
    """
    task, train, validation = load_hub(TASKS[name]) if name in TASKS else load_folder(Path(name))
    sources = list(dict.fromkeys(example.source for example in train))  # ReCoRD repeats some
    if len(sources) < 10 or not validation:
        raise UserError(f"task {name}: {len(sources)} different train and {len(validation)} "
                        "validation examples are too few; it takes 10 and 1")
    order = torch.randperm(len(sources), generator=rng("dev")).tolist()
    held = {sources[i] for i in order[:min(dev, len(sources) // 5)]}
    return Data(task, [example for example in train if example.source not in held],
                list({e.source: e for e in train if e.source in held}.values()),
                validation[:limit or None])


def load_hub(task: Task):
    """-> task, train and validation examples, downloaded or cached by the `datasets` library."""
    import transformers  # noqa: F401  first, or datasets prints two lines to stdout
    import datasets

    what = f"data set {task.hub[0]} ({task.hub[1]})"
    datasets.disable_progress_bars()
    try:
        try:
            data = datasets.load_dataset(*task.hub)
        except RuntimeError:  # xsum may be a loading script there: refused, but not this branch
            data = datasets.load_dataset(*task.hub, revision="refs/convert/parquet")
    except Exception as error:  # the library's own are of many kinds
        raise UserError(hub_failure(what, error)) from None
    missing = {"train", task.validation} - set(data)
    if missing:
        raise UserError(f"{what} has no split {', '.join(missing)}")
    train, validation = ([hub_examples(task, row) for row in data[split]]
                         for split in ("train", task.validation))
    # ReCoRD trains on every distinct answer, as the official code; validation counts a row once.
    return task, [example for row in train for example in row], [row[0] for row in validation]


def hub_examples(task: Task, row: dict) -> list[Example]:
    """A row of a hub data set -> an example for each text that may be learned from it."""
    fields = {key: ", ".join(value) if isinstance(value, list) else value  # ReCoRD's entities
              for key, value in row.items() if "{%s}" % key in task.source}
    source = task.source.format(**fields).replace("\n@highlight\n", " ")  # ReCoRD's bullet points
    if task.labels:
        if not 0 <= row["label"] < len(task.labels):  # unlabelled splits carry -1, Python's "last"
            raise UserError(f"{task.hub[0]}: {row['label']} is no label of this task")
        answers = [task.labels[row["label"]]]
    elif "summary" in row:
        answers = [row["summary"]]
    else:  # an unanswerable question of SQuAD 2.0 has an empty list
        gold = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
        answers = list(dict.fromkeys(gold)) or ["no answer"]
    targets = answers if "entities" in row else answers[:1]
    return [Example(source, target, tuple(answers)) for target in targets]


def load_folder(folder: Path):
    """-> task, train and validation examples of a folder; UserError names the file and the line.

    task.json may set `labels`, `metric`, `decoder`, `prefix` (none by default), `max_target`,
    `flags` and `note`.
    Lines of train.jsonl and validation.jsonl are {"source": text, "target": text}; for free text a
    target may be a list: the first is learned, any is right.
    """
    def parse(name, convert, whole=False):
        path, found = folder / name, []
        text = read_text(path, folder)
        for number, line in enumerate([text] if whole else text.split("\n"), 1):
            try:
                if whole or line.strip():
                    found.append(convert(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {str(error)[:300]}") from None
        return found

    def example(row):
        source, target = (row.get("source"), row.get("target")) if isinstance(row, dict) else (0, 0)
        answers = tuple(target) if isinstance(target, list) else (target,)
        if not answers or not all(isinstance(x, str) and x.encode() and x.strip()  # no surrogates
                                  for x in (source, *answers)):
            raise ValueError('needs a text "source" and a "target", a text or a list of texts')
        if task.labels and target not in task.labels:
            raise ValueError(f"target {target!r} is none of the labels {', '.join(task.labels)}")
        return Example(source, answers[0], answers)

    [task] = parse("task.json", folder_task, whole=True)
    return task, parse("train.jsonl", example), parse("validation.jsonl", example)


def read_text(path: Path, folder: Path | None = None) -> str:
    """A text file; UserError if it cannot be read, is a pipe or a device, or not in `folder`."""
    try:
        if folder and folder.resolve() not in path.resolve().parents:  # it may come from anywhere
            raise UserError(f"{path} points outside its folder: put the file itself there")
        if path.exists() and not path.is_file():
            raise UserError(f"cannot read {path}: it is not a regular file")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # the last: links in a circle
        raise UserError(f"cannot read {path}: {error}") from None


def folder_task(spec: dict) -> Task:
    """The content of a task.json -> `Task`; raises ValueError naming the key."""
    kinds = {"labels": list, "metric": str, "decoder": bool, "prefix": str, "max_target": int,
             "flags": str, "note": str}
    if not isinstance(spec, dict):
        raise ValueError("must be an object: {...}")
    json.dumps(spec, ensure_ascii=False).encode()  # ValueError for half of a surrogate pair
    for key, value in spec.items():
        if type(value) is not kinds.get(key):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            raise ValueError(f"key {key!r} is unknown or of a wrong type; keys are {known}")
    labels = spec.get("labels", [])
    if len(labels) == 1 or not all(isinstance(label, str) and label.strip() for label in labels):
        raise ValueError("labels must be two texts or more; leave the key out for free text")
    usual = {"metric": "accuracy" if labels else "em_f1", "decoder": not labels, "prefix": ""}
    task = Task(**{**usual, **spec, "labels": tuple(labels)})
    if task.metric not in METRICS or task.metric.startswith("accuracy") != bool(labels):
        raise ValueError(f"metric {task.metric!r}: with labels it is accuracy, accuracy_f1 or "
                         "accuracy_macro_f1; without, em_f1 or rouge_l")
    if task.metric == "accuracy_f1" and len(labels) != 2:
        raise ValueError("accuracy_f1 is for two labels; use accuracy_macro_f1")
    if not 1 <= task.max_target <= 10**6:
        raise ValueError("max_target must be at least 1 and at most 1,000,000")
    return task


def hub_failure(what: str, error: Exception) -> str:
    """One line for a failed load: the libraries' own messages run over many and mislead."""
    chain, link = "", error
    while link is not None:
        chain, link = f"{chain} {type(link).__name__}: {link}", link.__cause__ or link.__context__
    if any(word in chain for word in ("sentencepiece", "tiktoken", "protobuf")):
        return f"{what}: its tokenizer needs two more packages: pip install sentencepiece protobuf"
    if "Weights only load failed" in chain:
        return f"{what}: its pickle holds more than weights, and could run anything: not loaded"
    if "custom code" in chain:
        return f"{what}: it brings code of its own, which is never run here"
    if any(word in chain for word in ("peer closed connection", "RemoteProtocolError",
                                      "IncompleteRead", "Consistency check failed")):
        return f"{what}: the download broke off, and what came is not used: run the command again"
    if any(word in chain for word in ("ConnectionError", "ConnectError", "LocalEntryNotFound",
                                      "OfflineMode", "couldn't connect")):
        return (f"{what}: not in the local cache, and the hub does not answer. Use folders for "
                "--model and --task, or connect once; then HF_HUB_OFFLINE=1 uses the cache alone")
    return f"{what}: {' '.join(str(error).split())[:300]}"


def ask_hub(config: Config) -> None:
    """Wait about 5 s for a sign of life of the hub; without one, use the local cache alone.

    The libraries retry for 24 to 48 s a file, even for files they have. They read HF_HUB_OFFLINE
    when they are imported, so this comes first.
    """
    import http.client
    import urllib.error
    import urllib.request

    local = os.path.isdir(config.model) and config.task not in TASKS  # as `load_data` decides
    if local or "HF_HUB_OFFLINE" in os.environ or "huggingface_hub" in sys.modules:
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # an error page is an answer too
    except (OSError, ValueError, http.client.HTTPException):
        os.environ["HF_HUB_OFFLINE"] = "1"
        print(f"{hub} does not answer: using the local cache alone")


def load_model(name: str, device, precision: str):
    """-> the model, frozen and in eval mode, and its tokenizer, by transformers' own code."""
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # no thread that has a bot convert
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()  # its warning on untied T5 heads advises wrongly
    transformers.logging.disable_progress_bar()
    # Named, because the default is the checkpoint's dtype. In fp16 T5's activations overflow.
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is raised here, in one line
            model, tokenizer, info = read_model(name, dtype)
        check_layout(model)
        check_loaded(model, tokenizer, info)
    except Exception as error:  # as above
        raise UserError(hub_failure(f"model {name}", error)) from None
    # eval() only turns dropout off, as the paper does; gradients reach the prompt all the same.
    return model.to(device).eval().requires_grad_(False), tokenizer


def read_model(name: str, dtype):
    """-> model, tokenizer, and what did not fit, as transformers tells it."""
    import transformers

    # Without trust_remote_code=False, transformers asks whether to run what a model brings.
    check_t5(transformers.AutoConfig.from_pretrained(name, trust_remote_code=False))
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    load = functools.partial(transformers.AutoModelForSeq2SeqLM.from_pretrained, name,
                             dtype=dtype, trust_remote_code=False, output_loading_info=True)
    try:
        model, info = load(use_safetensors=True)
    except OSError as error:
        if not re.search("no file named model.safetensors|cannot be loaded with", str(error)):
            raise
        model, info = load(use_safetensors=False)
        print(f"{name} has no safetensors; its pickle went through torch's weights-only loader")
    return model, tokenizer, info


def check_loaded(model, tokenizer, info: dict) -> None:
    """Raise ValueError for what transformers passes over: weights it drew at random or left out."""
    extra = sorted(map(str, info["unexpected_keys"]))
    wrong = [*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"]),
             *(key for key in extra if ".block." in key)]  # layers that the config leaves out
    if wrong:
        raise ValueError(f"config and weights do not fit: {len(wrong)} are missing, too many or of "
                         f"another size, {wrong[0]} among them")
    if extra:
        print(f"warning: the model has no place for {', '.join(extra)[:300]}")
    if max(tokenizer.get_vocab().values()) >= len(model.get_input_embeddings().weight):
        raise ValueError("its tokenizer has more tokens than the model has embeddings")
    if None in (model.config.decoder_start_token_id, model.config.pad_token_id):
        raise ValueError("its config lacks decoder_start_token_id or pad_token_id")


def label_ids(tokenizer, task: Task) -> list[list[int]]:
    """Token ids of each label's target, end of sequence included; UserError if two are alike."""
    ids = [tokenizer(task.prefix + label).input_ids for label in task.labels]
    for i, label in enumerate(task.labels):
        if ids[i] in ids[:i]:
            raise UserError(f"labels {task.labels[ids.index(ids[i])]!r} and {label!r} are the same "
                            "tokens for this model: choose other words")
    return ids


class Encoded(NamedTuple):
    """An example and its token ids, end of sequence included."""

    example: Example
    source: list[int]
    target: list[int]
    cut: bool = False  # was the source longer?


def encode(tokenizer, task: Task, config: Config, examples) -> list[Encoded]:
    """Examples -> token ids, cut at --max-source and, unless it is a label, at max_target."""
    def ids(texts, length):  # one token more than wanted shows what was longer
        rows = tokenizer(texts, truncation=length is not None, max_length=length and length + 1)
        return [(row[:length - 1] + row[-1:], True) if length and len(row) > length else
                (row, False) for row in rows.input_ids]

    sources = ids([e.source for e in examples], config.max_source)
    targets = ids([task.prefix + e.target for e in examples],
                  None if task.labels else task.max_target)
    return [Encoded(example, source, target, cut)
            for example, (source, cut), (target, _) in zip(examples, sources, targets)]


def collate(batch: list[Encoded], device: torch.device) -> dict[str, Tensor]:
    """-> input_ids and attention_mask [B, T], labels [B, S], padded to the longest.

    Official: pads every source to 492 tokens, whatever its length.
    """
    def pad(rows, value):
        rows = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)
        # From pinned memory a GPU fetches them while it computes; the CPU does not wait.
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else (
            rows.to(device))

    return {"input_ids": pad([e.source for e in batch], 0),  # 0 is T5's <pad>
            "attention_mask": pad([[1] * len(e.source) for e in batch], 0),
            "labels": pad([e.target for e in batch], -100)}  # -100: no loss there


def rng(*key):
    """A CPU generator that depends on `key` alone, so that no draw can shift another one."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def batches(examples, encode, seed: int, size: int, start: int = 1, pool: int = 200):
    """Yield the batch of update start, start+1, ...: each a pure function of (seed, update).

    `pool` batches at a time, or as many as a pass over the data has, are drawn from one shuffled
    pass after another, sorted by length and cut: little padding, a random mix, and no example left
    out. `encode` turns a list of examples into `Encoded`, when their pool is drawn.
    """
    step, n = start - 1, len(examples)
    pool = max(1, min(pool, n // size))  # of more than a pass, copies of an example would meet
    shuffled = functools.lru_cache(maxsize=2)(
        lambda epoch: torch.randperm(n, generator=rng(seed, "epoch", epoch)).tolist())
    while True:
        number = step // pool
        places = range(number * pool * size, (number + 1) * pool * size)  # in an endless pass
        drawn = encode([examples[shuffled(place // n)[place % n]] for place in places])
        drawn.sort(key=lambda row: len(row.source))  # by characters a quarter would be padding
        order = torch.randperm(pool, generator=rng(seed, "pool", number)).tolist()
        for k in order[step % pool:]:
            yield drawn[k * size:(k + 1) * size]
            step += 1


# ====== 6 Evaluate ================================================================================


def accuracy(predictions, examples, labels, f1=None) -> dict[str, float]:
    """Percent right; with f1="binary" also the F1 of label 1 (GLUE's for QQP), or "macro"."""
    gold = [example.target for example in examples]
    scores = {"accuracy": 100 * sum(map(str.__eq__, predictions, gold)) / len(gold)}
    if f1:
        from sklearn.metrics import f1_score

        which = {"pos_label": labels[1]} if f1 == "binary" else {"labels": labels}
        scores["f1"] = 100 * float(f1_score(gold, predictions, average=f1, **which,
                                            zero_division=0))  # a label that never occurs
    return scores


def em_f1(predictions, examples, labels) -> dict[str, float]:
    """SQuAD's exact match and token F1, normalised, best of the right answers, in percent.

    Official: raw equality of texts; its F1 is that of answerability.
    """
    from torchmetrics.functional.text import squad

    def blank(text):  # as in SQuAD 2.0's own script: no partial credit for half of "no answer"
        return "" if text.strip().lower() == "no answer" else text

    found = [{"prediction_text": blank(text), "id": str(i)} for i, text in enumerate(predictions)]
    gold = [{"answers": {"text": [blank(text) for text in example.answers]}, "id": str(i)}
            for i, example in enumerate(examples)]
    scores = squad(found, gold)
    return {"em": float(scores["exact_match"]), "f1": float(scores["f1"])}


def rouge_l(predictions, examples, labels) -> dict[str, float]:
    """ROUGE-L F-measure, without stemming, best of the right answers, in percent.

    Official: the summary-level variant, sentence by sentence.
    """
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(predictions, [list(example.answers) for example in examples],
                         accumulate="best", rouge_keys="rougeL")
    return {"rouge_l": 100 * float(scores["rougeL_fmeasure"])}


METRICS = {  # the first number of each chooses the prompt
    "accuracy": accuracy,
    "accuracy_f1": lambda *run: accuracy(*run, f1="binary"),
    "accuracy_macro_f1": lambda *run: accuracy(*run, f1="macro"),
    "em_f1": em_f1,
    "rouge_l": rouge_l,
}


@torch.no_grad()
def evaluate(model, prompt: SoftPrompt, tokenizer, task: Task, examples, config: Config):
    """-> scores in percent, the first of them the one that counts, and the predicted texts.

    Labels by rank classification: the label whose text is likeliest (a sum over its tokens). Free
    text by greedy decoding.
    Official: decodes labels as well, and compares texts; what counts is the mean of all metrics.
    """
    labels, rows = label_ids(tokenizer, task), encode(tokenizer, task, config, examples)
    order, predictions = sorted(range(len(rows)), key=lambda i: len(rows[i].source)), {}
    chunks = [order[i:i + config.batch] for i in range(0, len(order), config.batch)]
    for chosen in chunks[rank()::workers()]:
        batch = collate([rows[i] for i in chosen], model.device)
        embeds = model.get_input_embeddings()(batch["input_ids"])  # [B, T, d]
        embeds, mask = prompt(embeds, batch["attention_mask"])  # [B, P+T, d], [B, P+T]
        if task.labels:
            likelihood = label_likelihood(model, embeds, mask, labels)  # [B, C]
            if likelihood.isnan().any():  # argmax would take one for the largest
                raise UserError("the likelihood of a label is not a number: weights with NaN?")
            texts = [task.labels[i] for i in likelihood.argmax(1).tolist()]
        else:
            ids = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False,
                                 num_beams=1, max_new_tokens=task.max_target)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts = [text.strip().removeprefix(task.prefix.strip()).strip() for text in texts]
        predictions.update(zip(chosen, texts))
    for others in gathered(predictions):
        predictions.update(others)
    texts = [predictions[i] for i in range(len(rows))]
    return METRICS[task.metric](texts, examples, task.labels), texts


def token_losses(model, mask: Tensor, labels: Tensor, **source) -> Tensor:
    """Negative log-likelihood [B, S], fp32, of the target tokens; 0 where labels [B, S] are -100.

    `source` is inputs_embeds [B, P+T, d], or encoder_outputs; `mask` [B, P+T] is theirs. The loss
    that transformers computes in a bf16 model is itself rounded to three digits.
    """
    target = model.prepare_decoder_input_ids_from_labels(labels)  # [B, S], shifted to the right
    logits = model(attention_mask=mask, decoder_input_ids=target, use_cache=False, **source).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(),
                                         reduction="none")  # [B*S] from [B*S, V]
    return losses.view_as(labels)


def label_likelihood(model, embeds: Tensor, mask: Tensor, ids: list[list[int]]) -> Tensor:
    """Log-likelihood [B, C] of C labels' token ids; the source is encoded once for all of them."""
    from transformers.modeling_outputs import BaseModelOutput

    hidden = model.encoder(inputs_embeds=embeds, attention_mask=mask)[0]  # [B, P+T, d]
    likelihood = []
    for label in ids:  # one at a time: the logits of C labels at once are C times [B, S, V]
        labels = torch.tensor(label, device=embeds.device).expand(len(embeds), -1)  # [B, S]
        losses = token_losses(model, mask, labels, encoder_outputs=BaseModelOutput(hidden))
        likelihood.append(-losses.sum(1))  # [B]
    return torch.stack(likelihood, 1)


# ====== 7 Train ===================================================================================


@dataclasses.dataclass
class Progress:
    """How far a run has come: all that it goes on from, with the prompt and the optimiser's state.

    Which stage goes on follows from the update (`stage_at`).
    Official: resumes into the smallest model once the last growth is behind it.
    """

    origin: dict  # what it is a run of, model, data and settings: no other may go on
    step: int = 0  # updates made
    stage: int = 1  # of the last of them
    losses: list = dataclasses.field(default_factory=list)  # since the last evaluation
    log: list = dataclasses.field(default_factory=list)  # a row for each evaluation
    best: tuple | None = None  # prompt [P, d], dev scores, update
    scores: dict | None = None  # of `neuron_scores`
    cost: dict = dataclasses.field(default_factory=lambda: {
        "flops": 0, "scoring_flops": 0, "pt_flops": 0, "cut_sources": 0})
    seconds: dict = dataclasses.field(default_factory=lambda: {"train": 0.0, "eval": 0.0})


def train(model, tokenizer, prompt: SoftPrompt, schedule, data: Data, config: Config, seed, folder):
    """The method: one prompt, one optimiser, a model that grows. -> `Progress` and final model.

    Trains `prompt` in place, from the checkpoint in `folder` if there is one. `best` is at the
    highest dev score of the final model, the later of equals. The final model is the last stage's:
    the full one, or for a row of Table 1 a partial one. UserError at the update where a number is
    no longer finite.
    Official: scores each prompt on the partial model of its moment, and ranks them all together.
    """
    optimizer, stage, saved = adafactor(prompt, config.lr), None, time.perf_counter()
    run = begin(model, tokenizer, prompt, optimizer, schedule, data, config, seed, folder)

    def build(number):
        depth, width, _ = schedule[number]
        return absorbed(partial_t5(model, depth, width, run.scores, data.task.decoder))

    full, final, bar = absorbed(model), build(-1), progress(run.step, config.steps)
    ids = functools.partial(encode, tokenizer, data.task, config)
    try:
        if due(run, config):  # it was stopped in an evaluation
            measure(final, tokenizer, prompt, data, config, run, folder)
        for step, batch in zip(bar, batches(data.train, ids, seed, config.batch, run.step + 1)):
            now = stage_at(schedule, step, config.steps)
            if now != stage:  # growth: a larger model; the same prompt and optimiser state go on
                stage, partial = now, None  # frees what the old one had of its own
                partial = checkpointed(build(now)) if config.checkpointing else build(now)
            run.stage = now + 1
            with undisturbed():
                update(partial, full, prompt, optimizer, batch, config, run, folder)
            bar.set_postfix_str(f"stage {now + 1}/{len(schedule)}, loss {run.losses[-1]:.3f}, dev "
                                f"{shown(run.log[-1]['dev']) if run.log else '?'}, "
                                f"FLOPs {over_pt(run.cost):.2f} of pt", False)
            if due(run, config):
                measure(final, tokenizer, prompt, data, config, run, folder)
            if time.perf_counter() - saved >= config.save_seconds:
                save_checkpoint(folder, run, prompt, optimizer)
                saved = time.perf_counter()
    except KeyboardInterrupt:
        save_checkpoint(folder, run, prompt, optimizer)
        raise
    save_checkpoint(folder, run, prompt, optimizer)
    return run, final


def update(partial, full, prompt, optimizer, batch, config: Config, run: Progress, folder) -> None:
    """One update: the prompt and `run` have made it, or UserError and they have not."""
    start, before = time.perf_counter(), prompt.weight.detach().clone()
    shards = split(batch, workers(), config.accumulate)
    loss, norm = gradient(partial, prompt, shards)
    optimizer.step()
    optimizer.zero_grad()
    checked = torch.stack([loss, norm, prompt.weight.detach().abs().max()]).tolist()  # one wait
    if not all(map(math.isfinite, checked)):  # one NaN would spread to the whole prompt
        stop_nonfinite(before, run, batch, config, folder)
    run.step += 1
    run.losses.append(checked[0])
    run.cost["flops"] += update_flops(partial, prompt, shards, config)
    run.cost["pt_flops"] += update_flops(full, prompt, shards, config)  # pt on the same batch
    run.cost["cut_sources"] += sum(row.cut for row in batch)
    run.seconds["train"] += time.perf_counter() - start


def gradient(model, prompt: SoftPrompt, shards) -> tuple[Tensor, Tensor]:
    """Put the gradient of one update into `prompt`. -> the loss, and the norm before clipping to 1.

    The loss is the mean over the target tokens of the whole batch, so the parts of every process
    (`split`) add up to what one process computes in one part.
    """
    tokens = sum(len(row.target) for shard in shards for part in shard for row in part)
    loss = torch.zeros((), device=model.device)
    for part in shards[rank()]:
        batch = collate(part, model.device)
        embeds = model.get_input_embeddings()(batch["input_ids"])  # [B, T, d]
        embeds, mask = prompt(embeds, batch["attention_mask"])  # [B, P+T, d], [B, P+T]
        share = token_losses(model, mask, batch["labels"], inputs_embeds=embeds).sum() / tokens
        share.backward()
        loss += share.detach()
    for tensor in (prompt.weight.grad, loss) if workers() > 1 else ():
        torch.distributed.all_reduce(tensor)
    return loss, nn.utils.clip_grad_norm_([prompt.weight], 1.0)


def adafactor(prompt: SoftPrompt, lr: float):
    """The paper's optimiser: a step has RMS `lr` at most, whatever the scale of all gradients.

    torch.optim.Adafactor cannot express it: it scales by the parameter's RMS and decays the rate.
    """
    from transformers.optimization import Adafactor

    return Adafactor([prompt.weight], lr=lr, scale_parameter=False, relative_step=False,
                     warmup_init=False, weight_decay=1e-5)


def measure(final, tokenizer, prompt, data: Data, config: Config, run: Progress, folder) -> None:
    """Evaluate the prompt as it is now on the final model; keep it if it is the best. A log row."""
    start = time.perf_counter()
    dev, _ = evaluate(final, prompt, tokenizer, data.task, data.dev, config)
    with undisturbed():
        if run.best is None or main_score(dev) >= main_score(run.best[1]):
            run.best = prompt.weight.detach().clone(), dev, run.step
            save_prompt(folder / "prompt", run.best[0], config.model, run.origin)
        run.seconds["eval"] += time.perf_counter() - start
        run.log.append({"step": run.step, "stage": run.stage,
                        "loss": sum(run.losses) / len(run.losses), "dev": dev, **run.cost})
        run.losses = []
        record(run, folder)


def due(run: Progress, config: Config) -> bool:
    """Is an evaluation due after the last update, and not made yet?"""
    last = run.log[-1]["step"] if run.log else 0
    return run.step > last and (run.step % config.eval_every == 0 or run.step == config.steps)


def begin(model, tokenizer, prompt, optimizer, schedule, data, config, seed, folder) -> Progress:
    """A run as its checkpoint has it; without one a new run, with the neurons scored if need be."""
    origin = {**made_from(model, tokenizer, data, prompt.weight), "seed": seed,
              "settings": digest(fixed(config)), "schedule": [list(part) for part in schedule]}
    run = load_checkpoint(folder, prompt, optimizer, origin)
    if run is None:
        run = Progress(origin)
        if any(part.width < 1 for part in schedule):
            run.scores, run.cost["scoring_flops"] = score_on_train(
                model, tokenizer, prompt, data, config, seed)
    return run


def score_on_train(model, tokenizer, prompt, data: Data, config: Config, seed: int):
    """-> `neuron_scores` of train examples with the initial prompt, and their cost in FLOPs."""
    drawn = torch.randperm(len(data.train), generator=rng(seed, "scores"))[:config.score_examples]
    drawn = encode(tokenizer, data.task, config, [data.train[i] for i in drawn])
    drawn.sort(key=lambda row: len(row.source))
    parts = [drawn[i:i + config.batch] for i in range(0, len(drawn), config.batch)]
    scores = neuron_scores(model, prompt.weight, [collate(part, model.device) for part in parts])
    for tensor in sum(scores.values(), []) if workers() > 1 else ():
        torch.distributed.broadcast(tensor, 0)  # all must keep the same neurons, to the last tie
    return scores, sum(step_flops(model, *padded_shape(prompt, part), backward=False)
                       for part in parts)


def split(batch: list, processes: int, parts: int) -> list[list[list]]:
    """A batch -> for each process its parts. None is empty if the batch has one example for each.

    Processes take turns, so that each has long and short ones; parts are of similar length.
    """
    shards = [batch[i::processes] for i in range(processes)]
    return [[shard[len(shard) * i // parts:len(shard) * (i + 1) // parts] for i in range(parts)]
            for shard in shards]


def padded_shape(prompt: SoftPrompt, rows: list[Encoded]) -> tuple[int, int, int]:
    """B, P+T and S of these rows as `collate` pads them, for `step_flops`."""
    return (len(rows), len(prompt.weight) + max(len(row.source) for row in rows),
            max(len(row.target) for row in rows))


def update_flops(model, prompt: SoftPrompt, shards, config: Config) -> int:
    """FLOPs of all parts of all processes, each as it is padded."""
    shapes = [padded_shape(prompt, part) for shard in shards for part in shard]
    again = sum(rerun_flops(model, *shape) for shape in shapes) if config.checkpointing else 0
    return sum(step_flops(model, *shape) for shape in shapes) + again


def over_pt(cost: dict) -> float:
    """FLOPs so far, scoring included, over those of plain prompt tuning on the same batches."""
    return (cost["flops"] + cost["scoring_flops"]) / cost["pt_flops"]


def main_score(scores: dict[str, float]) -> float:
    """The first score, the one that chooses the prompt."""
    return next(iter(scores.values()))


def stop_nonfinite(prompt: Tensor, run: Progress, rows: list[Encoded], config: Config, folder):
    """Keep the prompt of the last good update and the batch to blame, and end the run."""
    batch, kept = folder / "bad-batch.jsonl", folder / "prompt-last-good"
    write(batch, jsonl(row.example._asdict() for row in rows))
    save_prompt(kept, prompt, config.model, run.origin)
    raise UserError(f"update {run.step + 1}: the loss, its gradient or the prompt is not finite. "
                    f"Batch: {batch}; last good prompt: {kept}. Usual causes: --lr too high, or "
                    "weights with NaN")


# ====== 8 Record ==================================================================================


def progress(done: int, steps: int):
    """done+1..steps, with a bar and the time left on stderr if that is a terminal."""
    from tqdm import tqdm

    return tqdm(range(done + 1, steps + 1), initial=done, total=steps, unit="update",
                disable=rank() > 0 or None, dynamic_ncols=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a reader sees the old content or the new, never a part.

    Makes no folder: one that is gone was taken away, with all that belongs to this file.
    """
    if rank():
        return
    draft = path.with_name(path.name + ".tmp")
    try:
        draft.unlink(missing_ok=True)
        with open(draft, "xb") as file:  # x: not through a link that somebody left here
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:  # fsync's names no file
        with contextlib.suppress(OSError):
            draft.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def digest(value) -> str:
    """A short text that differs where values differ."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def fingerprint(model, tokenizer) -> dict[str, str]:
    """What tells whether a prompt belongs to a model, in either precision and under any name."""
    parts = [weight.detach().flatten()[::max(1, weight.numel() // 64)].bfloat16().float().tolist()
             for weight in model.parameters()]  # 64 numbers of each, or up to 127
    probe = tokenizer("A fox, 12.5 (naïve)\n<extra_id_0> word").input_ids  # how it cuts and ends
    return {"family": f"{model.config.model_type} {model.config.feed_forward_proj}",
            "tokenizer": digest((sorted(tokenizer.get_vocab().items(), key=str), probe)),
            "weights": digest(parts)}


def made_from(model, tokenizer, data: Data, start: Tensor) -> dict[str, str]:
    """What must be the same when a command goes on: model, tokenizer, data, initial prompt."""
    return {**fingerprint(model, tokenizer), "data": digest(data), "start": digest(start.tolist())}


def save_checkpoint(folder: Path, run: Progress, prompt: SoftPrompt, optimizer) -> None:
    """All of a run at this moment as one file, without pickle; its facts end in their checksum."""
    best, scores = run.best or (None, None, None), run.scores or {}
    state = optimizer.state[prompt.weight]
    tensors = {"prompt": prompt.weight, "best": best[0],
               **{f"optimizer.{name}": value for name, value in state.items()},
               **{f"{side}.{i}": row for side in scores for i, row in enumerate(scores[side])}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
               if isinstance(tensor, Tensor)}
    facts = {**vars(run), "best": best[1:], "scores": None, "optimizer": {
        name: value for name, value in state.items() if not isinstance(value, Tensor)}}
    write(folder / "checkpoint.safetensors", sealed(tensors, facts))


def load_checkpoint(folder: Path, prompt: SoftPrompt, optimizer, origin) -> Progress | None:
    """Put prompt and optimiser where a checkpoint has them; None if there is none.

    UserError if it is damaged, or of a run of another `origin`.
    """
    path = folder / "checkpoint.safetensors"
    content = gathered(path.read_bytes() if rank() == 0 and path.is_file() else None)[0]
    if content is None:
        return None
    device, state, scores = prompt.weight.device, {}, {}
    try:
        tensors, facts = unsealed(content)
        changed = [key for key in origin if origin[key] != facts["origin"].get(key)]
        if changed:
            raise ValueError(f"it is of a run with another {', '.join(changed)}")
        prompt.weight.data.copy_(tensors.pop("prompt"))
        best, state = tensors.pop("best", None), facts.pop("optimizer")
        for name, tensor in tensors.items():
            kind, key = name.split(".")
            if kind == "optimizer":
                state[key] = tensor
            else:
                scores.setdefault(kind, {})[int(key)] = tensor.to(device)
        if state:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
        facts["best"] = None if best is None else (best.to(device), *facts["best"])
        facts["scores"] = {side: [rows[i] for i in range(len(rows))]
                           for side, rows in scores.items()} or None
        return Progress(**facts)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"cannot go on from {path}: {error}; without this file the run begins anew"
                        ) from None


def sealed(tensors: dict[str, Tensor], facts: dict) -> bytes:
    """Tensors and facts as a safetensors file that shows if one bit of it is changed."""
    from safetensors.torch import save

    text = json.dumps(facts)
    return save(tensors, {"facts": text + checksum(tensors, text)})  # two keys have no fixed order


def unsealed(content: bytes) -> tuple[dict[str, Tensor], dict]:
    """The opposite of `sealed`; ValueError if the file is cut or changed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        size = int.from_bytes(content[:8], "little")
        text = json.loads(content[8:8 + size])["__metadata__"]["facts"]
        tensors = load(content)
        if checksum(tensors, text[:-64]) != text[-64:]:
            raise ValueError("its checksum is not that of its content")
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no whole checkpoint ({str(error)[:200]})") from None
    return tensors, json.loads(text[:-64])


def checksum(tensors: dict[str, Tensor], text: str) -> str:
    """64 letters that depend on every bit."""
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def jsonl(rows) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def shown(scores: dict[str, float]) -> str:
    """Scores as text."""
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def record(run: Progress, folder: Path) -> None:
    """The newest evaluation: a line of log.jsonl and on the screen. Seconds have their own file."""
    from tqdm import tqdm

    write(folder / "log.jsonl", jsonl(run.log))
    write(folder / "seconds.json", json.dumps(run.seconds))
    row = run.log[-1]
    tqdm.write(f"update {row['step']:>6}  stage {row['stage']}  loss {row['loss']:.4f}  dev "
               f"{shown(row['dev'])}  FLOPs {over_pt(row):.3f} of pt  "
               f"training {run.seconds['train']:.1f} s  evaluation {run.seconds['eval']:.1f} s")


def tune(model, tokenizer, name: str, data: Data, config: Config, seed: int, folder: Path) -> dict:
    """One schedule, one seed: train, report on validation, fill the folder. -> results.

    Goes on with what the folder holds; a run with results has ended and returns them.
    """
    schedule, (results, before) = parse_schedule(name), found(folder)
    print(f"\n{name}, seed {seed}: " + ", ".join(
        f"{s.depth:g}x{s.width:g} for {s.share:.0%}" for s in schedule) + " of the updates")
    if results:
        differ = [key for key, value in fixed(config).items() if before[key] != value]
        if differ:
            raise UserError(f"{folder} was finished with another {', '.join(differ)}")
        print(f"finished before: {folder}")
        return results
    prompt = SoftPrompt(start_prompt(model, tokenizer, data.task, config, seed)).to(model.device)
    if before is None:
        write_settings(folder, config, name, seed, schedule, prompt)
    elif before.get("versions") != versions():
        print(f"warning: begun with {before.get('versions')}; others may round otherwise")
    run, final = train(model, tokenizer, prompt, schedule, data, config, seed, folder)
    save_prompt(folder / "prompt-last", prompt.weight, config.model, run.origin)
    prompt.weight.data.copy_(run.best[0])
    scores, texts = evaluate(final, prompt, tokenizer, data.task, data.validation, config)
    [(common, _)] = collections.Counter(e.target for e in data.validation).most_common(1)
    majority = METRICS[data.task.metric]([common] * len(texts), data.validation, data.task.labels)
    rows = encode(tokenizer, data.task, config, data.validation)
    results = {
        "model": config.model, "task": config.task, "schedule": name, "seed": seed,
        "steps": config.steps, "best_step": run.best[2], "dev": run.best[1],
        "last_dev": run.log[-1]["dev"], "validation": scores, "validation_examples": len(texts),
        "majority": main_score(majority), "constant_predictions": len(set(texts)) == 1 < len(texts),
        "scored_on_full_model": schedule[-1][:2] == (1, 1), "flops_over_pt": over_pt(run.cost),
        "cut_sources": sum(row.cut for row in rows),
        **{key: value for key, value in run.cost.items() if key.endswith("flops")}}
    write(folder / "predictions.jsonl", jsonl(
        {"source": example.source, "answers": example.answers, "prediction": text}
        for example, text in zip(data.validation, texts)))
    write(folder / "results.json", json.dumps(results, indent=2))
    tell(results)
    return results


def found(folder: Path) -> tuple[dict | None, dict | None]:
    """Results and settings of a run that was here before, as rank 0 finds them."""
    files = [None, None]
    for i, name in enumerate(("results.json", "config.json")):
        if rank() == 0 and (folder / name).exists():
            files[i] = read_json(folder / name)
    if files[0] and not set(fixed(Config())) <= set(files[1] or ()):
        raise UserError(f"{folder / 'config.json'} does not hold the settings of the run")
    return gathered(tuple(files))[0]


def read_json(path: Path) -> dict:
    """The object in a file; UserError if there is none."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it holds no object")
    return content


def write_settings(folder: Path, config: Config, name, seed, schedule, prompt) -> None:
    """A folder for a new run, and its config.json."""
    if rank() == 0:
        folder.mkdir(exist_ok=True)
    run = {**settings(config), "schedule": name, "seed": seed, "prompt_length": len(prompt.weight)}
    write(folder / "config.json", json.dumps(
        {**run, "stages": schedule, "device": str(prompt.weight.device), "versions": versions()},
        indent=2))


def tell(results: dict) -> None:
    """Validation scores on the screen, and what makes them mean less than they say."""
    count = results["validation_examples"]
    print(f"validation {shown(results['validation'])}  ({count} examples, prompt of update "
          f"{results['best_step']}; always the most frequent answer: {results['majority']:.2f})")
    if results["constant_predictions"]:
        print("warning: every prediction is the same text; nothing has been learned")
    if results["cut_sources"]:
        print(f"warning: {results['cut_sources']} of {count} sources were longer than --max-source "
              "and cut")
    if not results["scored_on_full_model"]:
        print("note: this schedule does not reach the full model; the scores are its last stage's")


def start_prompt(model, tokenizer, task: Task, config: Config, seed: int) -> Tensor:
    """The initial prompt [P, d] that --init names; UserError if model or task do not allow it."""
    embeddings = model.get_input_embeddings().weight  # [V, d]
    words = [tokenizer(label, add_special_tokens=False).input_ids for label in task.labels]
    try:
        if config.init == "labels" and not words:
            raise ValueError("--init labels is for tasks with labels; use vocab")
        if config.init in ("uniform", "vocab", "labels"):
            return init_prompt(config.init, config.prompt_length, embeddings, rng(seed, "prompt"),
                               sum(words, []), common=min(5000, len(tokenizer)))
        prompt = load_prompt(config.init)
    except ValueError as error:
        raise UserError(str(error)) from None
    if len(prompt) > 10**4:
        raise UserError(f"the prompt in {config.init} has {len(prompt)} vectors; 10,000 at most")
    if prompt.shape[1] != embeddings.shape[1]:
        raise UserError(f"the prompt in {config.init} is {prompt.shape[1]} wide and {config.model} "
                        f"{embeddings.shape[1]}: it was trained for another model")
    return prompt


def check_origin(config: Config, model, tokenizer) -> None:
    """Refuse a prompt of another family or tokenizer; warn if other weights, or nobody knows."""
    path = Path(config.init) / "trained-on.json"
    if config.init in ("uniform", "vocab", "labels"):
        return
    if not path.exists():  # PEFT's own
        print(f"warning: {path.parent} does not say which model its prompt was trained on; with "
              f"another than {config.model} it means nothing")
        return
    then, now = read_json(path), fingerprint(model, tokenizer)
    for key in "family", "tokenizer":
        if then.get(key) != now[key]:
            raise UserError(f"the prompt in {path.parent} was trained on a model of another {key} "
                            f"({then.get(key)}) than {config.model} ({now[key]})")
    if then.get("weights") != now["weights"]:
        print(f"warning: the prompt in {path.parent} was trained on other weights than those of "
              f"{config.model}")


def versions() -> dict[str, str]:
    """Of what can change a number."""
    from importlib.metadata import version

    names = "torch", "transformers", "tokenizers", "datasets", "torchmetrics", "scikit-learn"
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def read_run(folder: Path) -> dict:
    """A finished run as its folder tells it: results, settings, the last prompt, and the curve.

    `curve` has a row per evaluation: update, stage, FLOPs so far (scoring included), dev score, and
    `best`, the highest dev score so far: that of the prompt that a run stopped here would keep.
    """
    with finished(folder):
        config, results, seconds = (read_json(folder / name) for name in (
            "config.json", "results.json", "seconds.json"))
        log = [json.loads(line) for line in read_text(folder / "log.jsonl").splitlines()]
        scores = [main_score(row["dev"]) for row in log]
        curve = [{"step": row["step"], "stage": row["stage"], "dev": score, "best": best,
                  "flops": row["flops"] + row["scoring_flops"]}
                 for row, score, best in zip(log, scores, itertools.accumulate(scores, max))]
        schedule, steps = parse_schedule(config["schedule"]), config["steps"]
        whole = (schedule[stage_at(schedule, step, steps)][:2] == (1, 1)
                 for step in range(1, steps + 1))
        return {**results, "train_seconds": seconds["train"], "curve": curve,
                "prompt": load_prompt(folder / "prompt-last").flatten(),
                "full_updates": sum(whole), "settings": config}


@contextlib.contextmanager
def finished(folder: Path):
    """UserError for whatever fails in this block because files were edited or damaged."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            StopIteration) as error:
        raise UserError(f"the files in {folder} are not those of finished runs: {error!r}"
                        ) from None


def by_schedule(runs: list[dict]) -> dict[str, list[dict]]:
    """{schedule: its runs, in the order of the seeds}."""
    return {name: [run for run in runs if run["schedule"] == name]
            for name in dict.fromkeys(run["schedule"] for run in runs)}


def mean_curve(runs: list[dict], key: str) -> list[float]:
    """A column of the curves, evaluation by evaluation, as the mean over the seeds."""
    return [statistics.mean(row[key] for row in rows)
            for rows in zip(*(run["curve"] for run in runs))]


def flops_to(runs: list[dict], goal: float) -> float | None:
    """FLOPs at which the mean over the seeds of the best dev score reaches a goal, if it does."""
    pairs = zip(mean_curve(runs, "flops"), mean_curve(runs, "best"), strict=True)
    return next((flops for flops, score in pairs if score >= goal), None)


def stopped(run: dict, key: str, limit: float) -> float:
    """Best dev score of a run that stops at the first evaluation where `key` reaches `limit`."""
    return next(row["best"] for row in run["curve"] if row[key] >= limit)


def compare(runs: list[dict]) -> list[dict]:
    """A row per schedule: its scores, seed by seed, and what they cost beside those of `pt`.

    Scores are dev scores of the chosen prompts. Where `pt` ran with the same seeds:
    flops, seconds: of training, over those of `pt`.
    pt_equal_flops: `pt` stopped at the FLOPs of this run, or at most one evaluation later; `gain`
        is the score of this run less that, the paper's column "Improve". None if this run costs
        more than `pt`.
    pt_full_updates: `pt` stopped after as many updates as this run makes on the full model: what
        these would reach alone, without the partial stages before them. None if it makes none.
    flops_to_pt: FLOPs at which the mean over seeds reaches 99 % of the final mean of `pt`, over
        those that `pt` needs for it; None if it never does.
    """
    groups, rows = by_schedule(runs), []
    plain = groups.get("pt")
    goal = plain and 0.99 * mean_curve(plain, "best")[-1]
    for name, group in groups.items():
        dev = [main_score(run["dev"]) for run in group]
        row = {"schedule": name, "seeds": [run["seed"] for run in group], "dev": dev,
               "validation": [main_score(run["validation"]) for run in group],
               "full_updates": group[0]["full_updates"],
               "scored_on_full_model": group[0]["scored_on_full_model"]}
        if plain:
            ends, pt_ends = ([run["curve"][-1]["flops"] for run in runs] for runs in (group, plain))
            spent, reached = list(zip(ends, pt_ends, strict=True)), flops_to(group, goal)
            row |= {
                "flops": [end / pt_end for end, pt_end in spent],
                "seconds": [run["train_seconds"] / pt["train_seconds"]
                            for run, pt in zip(group, plain)],
                "pt_equal_flops": None, "gain": None, "pt_full_updates": None,
                "flops_to_pt": reached and reached / flops_to(plain, goal)}
            if all(end <= pt_end for end, pt_end in spent):
                equal = [stopped(pt, "flops", end) for pt, end in zip(plain, ends)]
                row |= {"pt_equal_flops": equal, "gain": [a - b for a, b in zip(dev, equal)]}
            if row["full_updates"]:
                row["pt_full_updates"] = [stopped(pt, "step", row["full_updates"]) for pt in plain]
        rows.append(row)
    return rows


def similarity(runs: list[dict]) -> list[dict]:
    """Mean cosine of final prompts, flattened: of each schedule with the first and with itself.

    same_seed: same start and same batches. What makes it mean something are the controls:
    other_seed, and the last row, random prompts of the same shape.
    """
    def cosine(pairs):
        found = [nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
        return statistics.mean(found) if found else None

    def pairs(first, second, same):
        return [(a["prompt"], b["prompt"]) for a in runs for b in runs
                if (a["schedule"], b["schedule"]) == (first, second) and a is not b
                and (a["seed"] == b["seed"]) is same]

    names = list(by_schedule(runs))
    rows = [{"schedules": [first, second], "same_seed": cosine(pairs(first, second, True)),
             "other_seed": cosine(pairs(first, second, False))}
            for second in names for first in names if first in (names[0], second)]
    drawn = torch.randn(2, 100, len(runs[0]["prompt"]), generator=rng("random prompts"))
    rows.append({"schedules": ["random"], "same_seed": None, "other_seed": cosine(zip(*drawn))})
    return [row for row in rows if row["same_seed"] is not None or row["other_seed"] is not None]


def interval(values: list[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean (Student's t); None for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds, as text; the deviation needs two of them."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def report(folders: list[Path], out: Path) -> None:
    """The comparison of finished runs: tables on the screen, comparison.json and comparison.png."""
    runs = [read_run(folder) for folder in folders]
    with finished(out):
        rows, cosines = compare(runs), similarity(runs)
        curves = [{"schedule": run["schedule"], "seed": run["seed"], **{
            key: [row[key] for row in run["curve"]] for key in run["curve"][0]}} for run in runs]
        picture, text = io.BytesIO(), tables(runs, rows, cosines)
        figure(runs, rows).savefig(picture, dpi=150)
    write(out / "comparison.json", json.dumps({
        "settings": runs[0]["settings"], "schedules": rows, "cosines": cosines, "curves": curves}))
    write(out / "comparison.png", picture.getvalue())
    print(text)
    print(f"\nFigure: {out / 'comparison.png'}; its numbers: comparison.json; every run: {out}")


def tables(runs: list[dict], rows: list[dict], cosines: list[dict]) -> str:
    """Every run; the means over seeds, as `compare` returns them; the cosines of `similarity`."""
    from tabulate import tabulate

    each = tabulate(
        [[run["schedule"], run["seed"], main_score(run["dev"]), main_score(run["validation"]),
          run["best_step"], run["flops_over_pt"], run["train_seconds"]] for run in runs],
        ["schedule", "seed", "dev", "validation", "chosen at", "FLOPs / pt's", "seconds"],
        floatfmt=("", "", ".1f", ".1f", "", ".3f", ".1f"))
    means = tabulate(
        [[row["schedule"] + "*" * (not row["scored_on_full_model"]), spread(row["dev"]),
          spread(row["validation"]), *(against_pt(row) if "flops" in row else [])] for row in rows],
        ["schedule", "dev", "validation", "FLOPs\n/ pt's", "seconds\n/ pt's",
         "pt at the\nsame FLOPs", "gain over it\n[95 % interval]", "full updates\nalone",
         "FLOPs to 99 %\nof pt, / pt's"][:9 if "flops" in rows[0] else 3],
        disable_numparse=True, missingval="-")
    pairs = tabulate([[" and ".join(row["schedules"]), row["same_seed"], row["other_seed"]]
                      for row in cosines], ["of", "same seed", "other seed"], floatfmt=".3f",
                     missingval="-")
    return (f"\nEvery run\n{each}\n\nMean ± standard deviation over seeds "
            "(*: scored on its partial model, not on the full one)\n"
            f"{means}\n\nCosine of final prompts\n{pairs}")


def against_pt(row: dict) -> list[str | None]:
    """The cells of a row of `compare` that set it beside `pt`."""
    cells = [f"{statistics.mean(row['flops']):.3f}", spread(row["seconds"], 2), None, None, None,
             f"{row['flops_to_pt']:.2f}" if row["flops_to_pt"] else "never"]
    if row["schedule"] != "pt" and row["gain"]:
        bounds = interval(row["gain"])
        cells[2:4] = spread(row["pt_equal_flops"]), f"{statistics.mean(row['gain']):+.1f}" + (
            f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else "")
    if row["schedule"] != "pt" and row["full_updates"]:
        cells[4] = spread(row["pt_full_updates"])
    return cells


def figure(runs: list[dict], rows: list[dict]):
    """Dev score against cumulative training FLOPs, as a matplotlib Figure that is legible in grey.

    `rows` are those of `compare`. Thick: the best score so far, mean over seeds; thin: each seed as
    it was measured. A ring marks the last evaluation of a stage, a dotted line the gain over `pt`
    at the FLOPs of a schedule.
    """
    from matplotlib.figure import Figure

    plot, groups, ends = Figure(figsize=(7, 4.8), layout="constrained"), by_schedule(runs), {}
    axes, unit = plot.subplots(), mean_curve(groups["pt"], "flops")[-1] if "pt" in groups else 1
    for i, (name, group) in enumerate(groups.items()):
        color = ("0.5", "0", "0.3", "0.65")[(i + i // 4) % 4]  # 16 looks, told apart without colour
        look = {"color": color, "linestyle": ("--", "-", "-.", ":")[i % 4]}
        for run in group:
            axes.plot([row["flops"] / unit for row in run["curve"]],
                      [row["dev"] for row in run["curve"]], **look, linewidth=0.6, alpha=0.5)
        x, y = [flops / unit for flops in mean_curve(group, "flops")], mean_curve(group, "best")
        label = f"{name}{'' if group[0]['scored_on_full_model'] else '*'}, best so far"
        axes.plot(x, y, **look, linewidth=2.4, label=f"{label} (n = {len(group)})")
        stages = [row["stage"] for row in group[0]["curve"]]
        grown = [k for k in range(len(x) - 1) if stages[k] != stages[k + 1]]
        axes.plot([x[k] for k in grown], [y[k] for k in grown], "o", color=color,
                  markerfacecolor="white", zorder=3, label="the next stage begins" if grown else "")
        axes.annotate(f"{name} {y[-1]:.1f}", (x[-1], y[-1]), va="bottom", ha="right")
        ends[name] = x[-1], y[-1]
    for row in rows:
        if row["schedule"] != "pt" and row.get("gain"):
            (x, y), other = ends[row["schedule"]], statistics.mean(row["pt_equal_flops"])
            axes.plot([x, x], [other, y], ":", color="black", label="gain over pt, same FLOPs")
            axes.annotate(f" pt {other:.1f}", (x, other), va="top")
    axes.plot([], [], color="black", linewidth=0.6, label="thin: one seed")
    axes.set(xlabel="training FLOPs" + (" (1: all of pt's)" if "pt" in groups else ""),
             ylabel="dev score of the full model" + (
                 ", %" if all(run["scored_on_full_model"] for run in runs) else " (*: partial), %"))
    handles, labels = axes.get_legend_handles_labels()
    legend = dict(zip(labels, handles))  # a label once
    plot.legend(legend.values(), legend, frameon=False, loc="outside lower center", ncols=2)
    return plot


# ====== main ======================================================================================


def parse_args(argv=None) -> Config:
    """Flags -> `Config`. Those that a task folder suggests come first, so the command's win."""
    parser, given = make_parser(), sys.argv[1:] if argv is None else argv
    chosen = parser.parse_args(given)
    if any(word.split("=")[0] == "--resume" for word in given):
        parser.set_defaults(**dict.fromkeys(vars(chosen)))
        given = vars(parser.parse_args(given))
        return resumed(chosen.resume, {key: given[key] for key in given if given[key] is not None})
    suggested = [] if chosen.task in TASKS else suggested_flags(Path(chosen.task))
    refuse = parser.error  # what was given has just been read, so what fails now was suggested
    parser.error = lambda message: refuse(f"{Path(chosen.task) / 'task.json'}, flags: {message}")
    for name in suggested:
        if re.match("-+[a-zA-Z]", name) and name.split("=")[0] not in SUGGESTIBLE:
            parser.error(f"may not set {name}")
    return Config(**vars(parser.parse_args([*suggested, *given])))


# What may be said beside --resume: how to compute, not what.
RESUMABLE = ("device", "threads", "accumulate", "checkpointing", "save_seconds")


def resumed(name: str, given: dict) -> Config:
    """The settings of a stopped command in folder `name`, or one level above it."""
    wrong = set(given) - {"resume", *RESUMABLE}
    if wrong:
        raise UserError(f"--resume goes on with the settings of its folder; of others only "
                        f"{', '.join('--' + flag.replace('_', '-') for flag in RESUMABLE)} are "
                        f"possible, not --{min(wrong).replace('_', '-')}")
    folder = Path(os.path.abspath(name))
    if not (folder / "command.json").exists() and (folder.parent / "command.json").exists():
        folder = folder.parent  # the folder of one of its runs
    saved = {key: tuple(value) if isinstance(value, list) else value
             for key, value in read_json(folder / "command.json").items() if key != "origin"}
    for key, value in saved.items():
        usual = getattr(Config, key, None)
        kinds = {type(item) for item in value} if type(value) is tuple else set()
        if type(value) is not type(usual) or type(usual) is tuple and kinds != {type(usual[0])}:
            raise UserError(f"{folder / 'command.json'}: {key!r} is no setting of this fpt.py")
    return dataclasses.replace(Config(**saved), **{**given, "resume": name, "out": str(folder)})


# What a task folder may decide: how its prompt is trained, and nothing outside of that.
SUGGESTIBLE = ("--schedule", "--seed", "--steps", "--batch", "--prompt-length", "--lr",
               "--eval-every", "--dev", "--score-examples", "--max-source", "--threads")


def suggested_flags(folder: Path) -> list[str]:
    """The "flags" of a task.json; none if there are none or, as `load_folder` will say, no file."""
    try:
        return json.loads(read_text(folder / "task.json", folder))["flags"].split()
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def check(config: Config) -> None:
    """Refuse what is known to fail before anything is loaded; raises UserError."""
    for name, value in vars(config).items():
        least = 0 if name in ("limit", "threads", "save_seconds") else 1
        most = {"batch": 10**5, "prompt_length": 10**4, "threads": 10**3}.get(name, 10**9)
        if type(value) is int and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least} and at most "
                            f"{most}, not {value}")
    if config.batch < workers() * config.accumulate:
        raise UserError(f"--batch {config.batch}: {workers()} processes with --accumulate "
                        f"{config.accumulate} need {workers() * config.accumulate} at least")
    if any(letter < " " for letter in config.out):
        raise UserError("--out has a control character")
    if not 0 < config.lr < math.inf:
        raise UserError(f"--lr must be a positive number, not {config.lr}")
    if config.precision not in ("fp32", "bf16"):
        why = "; T5's activations overflow in fp16" if config.precision == "fp16" else ""
        raise UserError(f"--precision is fp32 or bf16, not {config.precision}{why}")
    if config.task not in TASKS and not os.path.isdir(config.task):
        raise UserError(f"unknown task {config.task!r}: use {', '.join(TASKS)}, or a folder with "
                        "task.json, train.jsonl and validation.jsonl")
    if any(len(set(values)) < len(values) for values in (config.schedule, config.seed)):
        raise UserError("--schedule or --seed names the same run twice")
    try:
        for schedule in config.schedule:
            parse_schedule(schedule)
        if config.init not in ("uniform", "vocab", "labels"):
            load_prompt(config.init)
    except ValueError as error:
        raise UserError(str(error)) from None


def pick_device(name: str):
    """The torch device that --device names; UserError if this machine lacks it."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device is auto, cpu, cuda, cuda:N or mps, not {name}")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).item()
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not on this machine; use auto or cpu") from None
    return torch.device(name)


def settings(config: Config) -> dict:
    """What is written down: all but where, which the place itself tells."""
    return {key: value for key, value in vars(config).items() if key not in ("out", "resume")}


def fixed(config: Config) -> dict:
    """The settings of every run that decide about its results; what they name is in its origin."""
    return {key: value for key, value in settings(config).items() if key not in (
        "model", "task", "init", "schedule", "seed", "prompt_length", *RESUMABLE)}


def claim(config: Config, origin: dict, hold: contextlib.ExitStack) -> Path:
    """The folder for this command's runs, for this process alone until `hold` is closed.

    UserError if another process has it; if it is in use, or, for --resume, of another `origin` or
    with links in it, which might lead anywhere; or if it cannot be written.
    """
    import filelock

    out, problem = Path(config.out), ""
    if not config.resume and (out.parent / "command.json").exists():
        raise UserError(f"folder {out} is inside the folder of another command: name another")
    if rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            problem = unfit(config, origin, out)  # before there is a lock in it, and after
            if not problem:
                hold.enter_context(filelock.FileLock(out / ".lock", timeout=0))
                problem = unfit(config, origin, out)
            if not problem and not config.resume:
                write(out / "command.json", json.dumps(
                    {**settings(config), "origin": origin}, indent=2))
        except filelock.Timeout:
            problem = "is in use by another fpt.py"
        except OSError as error:
            problem = f"cannot be written: {error.strerror}"
    problem = gathered(problem)[0]
    if problem:
        raise UserError(f"folder {out} {problem}")
    return out


def unfit(config: Config, origin: dict, out: Path) -> str:
    """Why a command cannot write to this folder; nothing if it can."""
    names = set(os.listdir(out))
    if not config.resume:
        if names - {".lock"} and names != {".lock", "command.json.tmp"}:  # killed before it began
            return "is not empty, and nothing is overwritten: name another"
        return ""
    links = [path for path in out.rglob("*") if path.is_symlink()]
    if links:
        return f"has a symbolic link, {links[0]}: nothing is written where that may lead"
    before = read_json(out / "command.json").get("origin")
    before = before if isinstance(before, dict) else {}
    changed = [key for key in origin if before.get(key) != origin[key]]
    return f"is of a command with another {', '.join(changed)}: it cannot go on" if changed else ""


def run_name(schedule: str, seed: int) -> str:
    """Of a run's folder; schedules of many stages are longer than a name may be."""
    short = schedule if len(schedule) < 100 else f"{schedule[:80]}_{digest(schedule)}"
    return f"{re.sub('[:,]', '_', short)}-seed{seed}"


@contextlib.contextmanager
def stopping():
    """SIGINT and SIGTERM raise `Stopped` in this block."""
    def stop(number, _):
        raise Stopped(number)

    with handling(stop):
        yield


@contextlib.contextmanager
def undisturbed():
    """SIGINT and SIGTERM wait until this block is done: an update is made whole or not at all."""
    waiting = []
    try:
        with handling(lambda number, _: waiting.append(number)):
            yield
    except UserError:  # told first
        waiting.clear()
        raise
    finally:
        for number in waiting[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def handling(handler):
    """Signals are for the main thread alone; in another one this does nothing."""
    main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    old = [(number, signal.signal(number, handler)) for number in signals]
    try:
        yield
    finally:
        for number, usual in old:
            signal.signal(number, usual)


@contextlib.contextmanager
def in_one_line(out: Path | None = None):
    """What ends a command from outside becomes one line, with the command that goes on in `out`."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", f"--nproc_per_node={processes}"] if processes else ["python"]
    folder = os.path.abspath(out or ".")
    again = shlex.join([*launcher, os.path.abspath(sys.argv[0]), f"--resume={folder}"])
    hint = f". To go on: {again}" if out else ""
    try:
        yield
    except KeyboardInterrupt as stop:
        number, *text = stop.args or (signal.SIGINT,)
        text = text or [f"stopped by {signal.Signals(number).name}{hint}"]
        raise Stopped(number, *text) from None
    except OSError as error:
        raise UserError(f"{error.filename or 'input or output'}: {error.strerror or error}{hint}"
                        ) from None
    except (RuntimeError, MemoryError) as error:  # torch's are RuntimeErrors, and of many kinds
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate" in str(error):
            raise UserError("out of memory; --accumulate 2 and --checkpointing need less"
                            f"{hint}") from None
        if workers() > 1 and re.search("gloo|nccl|connection|socket", str(error), re.I):
            raise UserError(f"another process of this run has ended{hint}") from None
        raise


def main(argv=None) -> list[dict]:
    """Run every schedule and seed of the command on one loaded model; returns what it wrote."""
    try:
        with in_one_line(), stopping(), contextlib.ExitStack() as hold:
            return run(parse_args(argv), hold)
    except UserError as error:
        line = " ".join(str(error).splitlines())
        line = line if len(line) < 1000 else f"{line[:600]} ... {line[-300:]}"
        print(f"fpt.py: error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stop:
        if rank() == 0:
            print(f"fpt.py: {stop.args[1]}", file=sys.stderr)
        raise SystemExit(128 + stop.args[0]) from None


def run(config: Config, hold: contextlib.ExitStack) -> list[dict]:
    """What `main` does, with exceptions for what goes wrong; `hold` keeps the folder's lock."""
    device = pick_device(config.device)
    join(device)
    check(config)
    if config.out == Config.out:  # clocks differ
        config.out = gathered(time.strftime("runs/%Y-%m-%d_%H%M%S"))[0]
    for name in "model", "task", "init":  # --resume may be said elsewhere
        if os.path.isdir(getattr(config, name)) and getattr(config, name) not in TASKS:
            setattr(config, name, os.path.abspath(getattr(config, name)))
    if config.threads:
        torch.set_num_threads(config.threads)
    ask_hub(config)
    data = load_data(config.task, config.dev, config.limit)  # first: offline it fails sooner
    model, tokenizer = load_model(config.model, device, config.precision)
    label_ids(tokenizer, data.task)  # this and the next two: to refuse before a folder is made
    start = start_prompt(model, tokenizer, data.task, config, seed=0)
    check_origin(config, model, tokenizer)
    out = claim(config, made_from(model, tokenizer, data, start), hold)
    introduce(config, data, device)
    folders = {out / run_name(name, seed): (name, seed)
               for seed in config.seed for name in config.schedule}
    with in_one_line(out):
        results = [tune(model, tokenizer, name, data, config, seed, folder)
                   for folder, (name, seed) in folders.items()]
        if len(results) > 1 and rank() == 0:
            report(list(folders), out)
    if data.task.note:
        print(f"\nNote of {config.task}: {data.task.note}")
    if results[-1].get("scored_on_full_model"):  # elsewhere its prompt would meet another model
        print("\nTo use the best prompt of the last run:\n"
              "    from peft import PeftModel; from transformers import AutoModelForSeq2SeqLM\n"
              f"    model = AutoModelForSeq2SeqLM.from_pretrained({config.model!r})\n"
              "    model = PeftModel.from_pretrained("
              f"model, {str(list(folders)[-1] / 'prompt')!r})")
    return results


def introduce(config: Config, data: Data, device) -> None:
    """What is about to run, on the screen."""
    if data.task.flags and not config.resume:
        print(f"{config.task} suggests, unless told otherwise: {data.task.flags}")
    several = f" in {workers()} processes" if workers() > 1 else ""
    print(f"{config.model} on {device} in {config.precision}{several}; {config.task}: "
          f"{len(data.train)} train, {len(data.dev)} dev, {len(data.validation)} validation "
          f"examples; {'goes on in' if config.resume else 'writes'} {config.out}")


# One of many processes, under torchrun: each has a part of every batch and of every evaluation. A
# prompt is 60 kB for t5-base, so torch's DistributedDataParallel, made anew at each growth, would
# add nothing to one all_reduce.


def together() -> bool:
    """Has this process joined others?"""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def workers() -> int:
    """The number of processes; 1 without torchrun."""
    return torch.distributed.get_world_size() if together() else 1


def rank() -> int:
    """The number of this process among `workers`; 0 prints and writes."""
    return torch.distributed.get_rank() if together() else 0


def gathered(value) -> list:
    """`value` of every process."""
    values = [value] * workers()
    if workers() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def join(device) -> None:
    """Meet the other processes, if torchrun started this one; only the first is heard."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not together():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(torch.distributed.destroy_process_group)
        if rank():
            sys.stdout = open(os.devnull, "w")


if __name__ == "__main__":
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # an ascii terminal has no ±
    main()
