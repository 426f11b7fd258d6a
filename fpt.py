"""FPT, Fast Prompt Tuning by progressive training, in one file.

    python fpt.py                             # offline, 2 minutes: film reviews
    python fpt.py --model t5-base --task rte  # FPT with the paper's settings, for a GPU
    python fpt.py --model t5-base --task rte --schedule pt cr --seed 0 1 2  # compared
    python fpt.py --task FOLDER --schedule 0.5x0.5:0.4,1x1:0.6 --steps 2000  # your own
    python fpt.py --resume runs/FOLDER        # goes on after a stop

Prompt tuning (PT) learns a *soft prompt*: P vectors in front of the input embeddings of
a frozen T5. Few numbers are trained, yet every update runs the whole model forward and
backward. FPT (Huang et al., Findings of EMNLP 2022, arXiv 2211.06840) makes the early
updates cheap: it trains the prompt first on a *partial* model, a T5 with layers dropped
and FFN neurons removed. That model grows in stages to the full one, and the same prompt
is carried through all of them.

    in the paper                         here
    partial PLM, layer dropping (LD)     kept_layers, partial_t5
    FFN reduction (FR), or both (CR)     neuron_scores, narrow_ffn, partial_t5
    progressive training                 SCHEDULES, stage_at, train
    FLOPs                                step_flops
    prompt tuning (PT), the baseline     the schedule "pt": one stage, the full model
    "Improve"                            gain, in compare

A schedule is worth its trouble if its *gain*, interval and all, is above zero. The gain
is its best dev score minus PT's, read where PT has spent as many FLOPs. Ending near PT
with fewer FLOPs proves nothing, since PT stopped early may do as well. tutorial.md
reports what was measured and when FPT fails. (t5-base saw RTE in its own pre-training:
its score there shows that a run works, not what a prompt can learn.)

To use FPT in code of your own, copy sections 1 to 5. They take tensors, numbers and
modules, and know nothing of tasks, settings or processes. Sections 6 to 9 are the
program around them. Where a line differs on purpose from the authors' code
(github.com/thunlp/FastPromptTuning), a note begins with "Official:".

Glossary
    B, P, T, S  examples in a batch; prompt vectors; source and target tokens, padded
    d, d_ff, V  size of an embedding (d_model); neurons of an FFN; vocabulary size
    FFN         a layer's feed-forward network; neuron j is row j of wi, column j of wo
    depth       share of the layers that a partial model keeps
    width       share of the d_ff neurons that each of these layers keeps
    stage       a depth, a width, and the share of all updates that are made there
    update      one step of the optimiser on one batch; the first is update 1
    prompt      a SoftPrompt where it is trained, or its tensor [P, d] where that stands
"""

import argparse
import copy
import functools
import io
import itertools
import json
import math
import os
import sys
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import regex
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.optimization import Adafactor

# ====== 1 Partial models ==============================================================

T5_KINDS = ("t5", "mt5")  # all versions of T5, Flan, mT5, ByT5


def round_half_up(number):
    """The nearest integer. The 1e-6 is for 0.29 * 50, in floats a hair below 14.5."""
    return math.floor(number + 0.5 + 1e-6)


def kept_layers(total, keep):
    """Indices of the layers that layer dropping keeps: 3 of 12 layers are [0, 5, 11].

    They are spread evenly. Layer 0 always stays: it alone owns T5's relative position
    bias, which it hands on to the others. Without it a T5 still runs without error, but
    it is blind to word order. If two or more are kept, so is the last one.

    Raises ValueError unless 1 <= keep <= total.
    Official: the same rule, with a division by zero for keep=1.
    """
    if not 1 <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} layers")
    if keep == 1:
        return [0]
    gap, longer = divmod(total - 1, keep - 1)  # this many gaps are one longer
    gaps = [gap] * (keep - 1 - longer) + [gap + 1] * longer  # for 3 of 12: [5, 6]
    return list(itertools.accumulate(gaps, initial=0))


@torch.no_grad()
def neuron_scores(model, prompt, batches):
    """Mean absolute activation of every FFN neuron, by which FFN reduction ranks them.

    The activation is what enters `wo`: relu(wi x), or gelu(wi_0 x) * wi_1 x in gated
    T5s. It is averaged over an example's unmasked positions, the prompt's among them,
    and then over examples, so that a long one counts no more than a short one.

    Args:
        model: the full T5ForConditionalGeneration, in eval mode.
        prompt: a tensor [P, d]. The paper uses the initial one.
        batches: a few dicts of input_ids [B, T], attention_mask [B, T] and labels
            [B, S], on the model's device. Labels are -100 where they are padded.
    Returns:
        {"encoder": [Tensor[d_ff], ...], "decoder": [...]}, one per layer, on the CPU.
    Official: uses *validation* examples. Pass train examples instead.
    """
    totals = {"encoder": [], "decoder": []}  # a tensor [d_ff] for each layer
    masks = {}  # [B, positions] for each side, set below before each forward pass
    hooks = []
    examples = 0

    def listen(side, wo):
        total = torch.zeros(wo.in_features, device=model.device)

        def add(module, inputs):  # PyTorch calls it whenever `wo` is run
            activation = inputs[0].abs().float()  # [B, positions, d_ff]
            mask = masks[side].unsqueeze(-1)  # [B, positions, 1]
            mean = (activation * mask).sum(1) / mask.sum(1).clamp(min=1)  # [B, d_ff]
            total.add_(mean.sum(0))

        totals[side].append(total)
        hooks.append(wo.register_forward_pre_hook(add))

    for side in totals:
        for block in getattr(model, side).block:
            listen(side, block.layer[-1].DenseReluDense.wo)
    soft_prompt = SoftPrompt(prompt).to(model.device)  # see section 4
    try:
        for batch in batches:
            labels = batch["labels"]
            embeds, masks["encoder"] = soft_prompt(model, batch)
            masks["decoder"] = labels != -100
            # Run for the hooks alone.
            token_losses(model, masks["encoder"], labels, inputs_embeds=embeds)
            examples += len(labels)
    finally:
        for hook in hooks:
            hook.remove()
    return {side: [total.cpu() / examples for total in totals[side]] for side in totals}


def narrow_ffn(ffn, scores, width):
    """Keep a share `width` of the neurons of an FFN, the best by their scores [d_ff].

    The FFN is changed in place, and its old matrices are left as they were. Neurons
    stay in order, and those kept at a small width are also kept at a larger one.
    Raises ValueError if the scores have another length, or if a layer of the FFN is no
    plain nn.Linear.
    """
    if len(scores) != ffn.wo.in_features:
        raise ValueError("these scores belong to a model with another d_ff")
    count = max(1, round_half_up(width * len(scores)))
    ranking = scores.argsort(descending=True, stable=True)
    keep = ranking[:count].sort().values.to(ffn.wo.weight.device)
    for name, linear in ffn.named_children():
        if not name.startswith("w"):  # only wi (or wi_0 and wi_1) and wo have neurons
            continue
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name} is a {type(linear)}, not a plain nn.Linear")
        if name == "wo":
            weight = linear.weight[:, keep]  # [d, count]
            linear.in_features = count
        else:
            weight = linear.weight[keep]  # [count, d]
            linear.out_features = count
        linear.weight = nn.Parameter(weight, requires_grad=False)


def partial_t5(model, depth, width, scores=None, decoder=True):
    """A T5 with a share `depth` of the layers of `model`, and `width` of the neurons.

    Every tensor it keeps is shared with `model`, which stays as it is; only narrowed
    FFN matrices take new memory. Nothing compensates for the missing parts: a dropped
    layer simply passes its input through. Loss, cache and `generate` work as usual.
    Never move or cast a partial model: that changes the full one as well.

    Args:
        model: a frozen T5ForConditionalGeneration or MT5ForConditionalGeneration.
        depth, width: in (0, 1]; numbers of layers and neurons are rounded half up.
        scores: of `neuron_scores` for this model; needed where width < 1.
        decoder: False leaves it whole, as the paper does for classification.
    Raises:
        ValueError: a share outside (0, 1], scores missing or of another model, an FFN
            that `narrow_ffn` refuses, or a model of another kind. (umt5 is refused
            since each of its layers has a position bias.)
    """
    if model.config.model_type not in T5_KINDS:
        raise ValueError(f"a model of type {model.config.model_type} is no T5 or mT5")
    if not (0 < depth <= 1 and 0 < width <= 1) or (width < 1 and scores is None):
        raise ValueError(
            f"depth {depth}, width {width} must be in (0, 1]; width < 1 needs scores"
        )
    # deepcopy skips what is in its memo, its second argument. All parameters are there,
    # so modules are copied and tensors are shared.
    shared = {id(tensor): tensor for tensor in model.parameters()}
    partial = copy.deepcopy(model, shared)
    for side in ["encoder", "decoder"] if decoder else ["encoder"]:
        stack = getattr(partial, side)
        total = len(stack.block)
        kept = kept_layers(total, max(1, round_half_up(depth * total)))
        if width < 1:
            for i in kept:  # as the full model counts, like the scores
                ffn = stack.block[i].layer[-1].DenseReluDense
                narrow_ffn(ffn, scores[side][i], width)
        stack.block = nn.ModuleList(stack.block[i] for i in kept)
    return partial


# ====== 2 Schedule ====================================================================


@dataclass
class Stage:
    """A partial model, and the share of all updates that are made on it."""

    depth: float
    width: float
    share: float


# Depth x width : share of the updates. Of 30,000 updates, 6,000 are made in each of the
# first three stages of `cr`, and 12,000 on the full model.
PRESETS = {
    "pt": "1x1:1",  # prompt tuning, the baseline
    "ld": "0.25x1:0.2, 0.5x1:0.2, 0.75x1:0.2, 1x1:0.4",  # layer dropping
    "fr": "1x0.25:0.2, 1x0.5:0.2, 1x0.75:0.2, 1x1:0.4",  # FFN reduction
    "cr": "0.25x0.25:0.2, 0.5x0.5:0.2, 0.75x0.75:0.2, 1x1:0.4",  # both
}


def parse_schedule(text):
    """The stages of a preset, or of a text in its notation: "0.5x0.25:0.3,1x1:0.7".

    A single partial stage, "0.25x1:1", never grows, as in the paper's Table 1.
    Raises ValueError if a number cannot be read or is outside (0, 1], or if the shares
    do not add up to 1.
    """
    error = ValueError(
        f"schedule {text!r} is none of {', '.join(PRESETS)}, nor stages like "
        "0.5x0.25:0.3,1x1:0.7: depth x width : share, with shares adding up to 1"
    )
    stages = []
    for part in PRESETS.get(text, text).split(","):
        size, _, share = part.partition(":")
        depth, _, width = size.partition("x")
        try:
            numbers = [float(depth), float(width), float(share)]
        except ValueError:
            raise error from None
        if not all(0 < number <= 1 for number in numbers):
            raise error
        stages.append(Stage(*numbers))
    if abs(sum(stage.share for stage in stages) - 1) > 1e-6:
        raise error
    return stages


SCHEDULES = {name: parse_schedule(name) for name in PRESETS}


def stage_at(schedule, step, steps):
    """Index of the stage in which update `step` of 1 to `steps` is made.

    The model grows after the last update of a stage: of 30,000, update 6,000 is still
    made in the first stage of `cr`.
    Official: the same, but a run resumed in its last stage uses the smallest model.
    """
    end = 0.0
    for index, stage in enumerate(schedule):
        end += stage.share
        if step <= round_half_up(end * steps):
            return index
    return len(schedule) - 1  # if rounding has left an update over


# ====== 3 Cost ========================================================================


def step_flops(model, batch, source, target, backward=True):
    """FLOPs of the matrix products of one update; a multiply-add is two.

    An update costs about two forward passes, not three as in ordinary training. On the
    way back, a linear layer makes one product for the gradient of its input. The other
    one, for the gradient of its weights, is never made, since they are frozen. Only the
    two products of an attention cost twice their forward: both of their inputs depend
    on the prompt.

    Args:
        model: a T5, whole or partial.
        batch, source, target: B, P+T and S, as they are padded.
        backward: False counts the forward pass alone.
    Equal to torch.utils.flop_counter.FlopCounterMode under eager attention.
    Official: counts the linear layers of a forward pass at 512 positions.
    """

    def weights(module):
        layers = [x for x in module.modules() if isinstance(x, nn.Linear)]
        return sum(layer.weight.numel() for layer in layers)

    per_source = 2 * batch * source  # FLOPs of a weight that meets all source positions
    per_target = 2 * batch * target
    forward_flops = per_target * weights(model.lm_head)
    backward_flops = forward_flops
    for block in model.encoder.block:
        linear = per_source * weights(block)
        # Queries by keys, all by all. Attention weights by values cost the same.
        product = per_source * source * block.layer[0].SelfAttention.inner_dim
        forward_flops += linear + 2 * product
        backward_flops += linear + 4 * product
    for index, block in enumerate(model.decoder.block):
        attention, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
        # Cross-attention: keys and values of the whole source, the output. And the FFN.
        linear = per_source * (weights(cross.k) + weights(cross.v))
        linear += per_target * (weights(cross.o) + weights(block.layer[2]))
        cross_product = per_target * source * cross.inner_dim
        forward_flops += linear + 2 * cross_product
        # Backward costs four such products. Three are counted here: for keys, attention
        # weights and values. The fourth, for queries, is below, except in layer 0.
        backward_flops += linear + 3 * cross_product
        # Self-attention, and cross-attention's queries. In layer 0 they come before the
        # decoder has met the prompt, so no gradient is passed on to them.
        linear = per_target * (weights(attention) + weights(cross.q))
        product = per_target * target * attention.inner_dim
        forward_flops += linear + 2 * product
        if index > 0:
            backward_flops += linear + 4 * product + cross_product
    return forward_flops + backward_flops if backward else forward_flops


# ====== 4 Soft prompt =================================================================


class SoftPrompt(nn.Module):
    """P vectors in front of the input embeddings: all that is trained.

    They are fp32 whatever the model is, since bf16 would round small updates away.
    """

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())  # [P, d]

    def forward(self, model, batch):
        """The prompt followed by a batch: embeddings [B, P+T, d] and mask [B, P+T].

        `batch` holds input_ids and attention_mask, both [B, T].
        """
        embeds = model.shared(batch["input_ids"])  # [B, T, d]
        mask = batch["attention_mask"]  # [B, T]
        # Without the cast, torch.cat would turn all of a bf16 model's states into fp32.
        prompt = self.weight.to(embeds.dtype).expand(len(embeds), -1, -1)  # [B, P, d]
        ones = mask.new_ones(prompt.shape[:2])  # [B, P]
        return torch.cat([prompt, embeds], dim=1), torch.cat([ones, mask], dim=1)


def token_losses(model, mask, labels, **inputs):
    """Negative log-likelihood [B, S] of the target tokens, in fp32; 0 where padded.

    labels are [B, S], -100 where padded. inputs is inputs_embeds=[B, P+T, d], or
    encoder_outputs=... (for evaluation), and mask [B, P+T] covers its positions.
    """
    shifted = model.prepare_decoder_input_ids_from_labels(labels)  # [B, S]
    output = model(
        attention_mask=mask, decoder_input_ids=shifted, use_cache=False, **inputs
    )
    # The loss that transformers returns for a bf16 model is rounded to three digits.
    logits = output.logits.flatten(0, 1).float()  # [B*S, V]
    losses = nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    return losses.view_as(labels)


def init_prompt(how, length, embeddings, generator):
    """An initial prompt [P, d], on the CPU, for a model with these embeddings [V, d].

    Args:
        how: "uniform" draws from U(-1/sqrt(d), 1/sqrt(d)), as the paper does. "vocab"
            takes the embeddings of `length` of the 5,000 most frequent tokens, which T5
            lists first. Anything else is the folder of a saved prompt.
        generator: of the CPU, for this draw alone, so that all schedules start alike.
    Raises ValueError if there are not enough tokens, or if the saved prompt has another
    shape.
    Official: other draws from the same generator come first, so starts differ.
    """
    d = embeddings.shape[1]
    if how == "uniform":
        bound = d**-0.5
        return torch.empty(length, d).uniform_(-bound, bound, generator=generator)
    if how == "vocab":
        frequent = min(5000, len(embeddings)) - 3  # without <pad>, </s> and <unk>
        if length > frequent:
            raise ValueError(f"{length} vectors, but only {frequent} tokens to take")
        ids = torch.randperm(frequent, generator=generator)[:length] + 3
        return embeddings[ids.to(embeddings.device)].float().cpu()
    prompt = load_prompt(how)
    if prompt.shape != (length, d):
        raise ValueError(f"the prompt in {how} is not {length} vectors of {d} numbers")
    return prompt


def save_prompt(folder, prompt, model_name):
    """Write a prompt [P, d] as PEFT does; `peft.PeftModel.from_pretrained` loads it."""
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",  # without it, PEFT ignores the prompt it loads
        "num_transformer_submodules": 1,  # else PEFT asks for P more, unused vectors
        "num_virtual_tokens": len(prompt),
        "base_model_name_or_path": model_name,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"prompt_embeddings": prompt.detach().float().cpu()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load_prompt(folder):
    """The prompt [P, d], fp32 on the CPU, in a folder of ours or of PEFT's own.

    Raises ValueError if it holds none, or one that is not finite, and what reading the
    files raises: FileNotFoundError, or what json and safetensors have.
    """
    config = json.loads(Path(folder, "adapter_config.json").read_text("utf-8"))
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    prompt = tensors.get("prompt_embeddings")
    if prompt is None or not prompt.isfinite().all():
        raise ValueError(f"{folder} holds no soft prompt, or one that is not finite")
    return prompt[: config.get("num_virtual_tokens")].float()  # PEFT ignores later rows


# ====== 5 Train =======================================================================


def adafactor(prompt, lr):
    """The paper's optimiser: it divides a gradient by the usual size of earlier ones.

    It caps the root mean square of a step at `lr`. Its memory stays when the model
    grows: for a while, gradients of the larger model are divided by the usual size of
    the smaller one's. If they are smaller, the steps are too small until the memory
    fades; if they are larger, the cap holds. At update t it remembers about t^0.8
    updates: a thousand at update 6,000.
    torch.optim.Adafactor does not fit: it decays lr and scales by the prompt's size.
    """
    return Adafactor(
        [prompt.weight],
        lr=lr,
        scale_parameter=False,
        relative_step=False,
        weight_decay=1e-5,
    )


def gradient(model, prompt, batch):
    """Forward and backward: the loss of a batch and its gradient for the prompt [P, d].

    The batch is on the model's device. There is no host synchronisation here.
    Official: the loss is the mean of the means of micro-batches.
    """
    labels = batch["labels"]  # [B, S]
    embeds, mask = prompt(model, batch)  # [B, P+T, d], [B, P+T]
    losses = token_losses(model, mask, labels, inputs_embeds=embeds)  # [B, S]
    loss = losses.sum() / (labels != -100).sum()
    (grad,) = torch.autograd.grad(loss, [prompt.weight])
    return loss.detach(), grad


def padded_shape(prompt, batch):
    """B, P+T and S of a batch behind a prompt [P, d], as `step_flops` takes them."""
    size, source = batch["input_ids"].shape
    return size, len(prompt) + source, batch["labels"].shape[1]


@dataclass
class Run:
    """The state of a run. With prompt and optimiser, it is enough to resume it."""

    step: int = 0  # updates made
    flops: int = 0  # what they cost; it may begin with the cost of scoring neurons
    pt_flops: int = 0  # what prompt tuning would pay for the same batches
    seconds: float = 0.0  # of the updates, without evaluations
    losses: list = field(default_factory=list)  # since the last evaluation
    log: list = field(default_factory=list)  # a row for each evaluation
    best_dev: float = -math.inf  # the best dev score so far
    best_prompt: Tensor = None  # the prompt [P, d] that reached it, the later on ties

    def record(self, index, prompt, loss, dev):
        """Note an evaluation; keep the prompt [P, d] if it ties or beats the best.

        Raises FloatingPointError if the loss or the prompt is not finite.
        """
        if not math.isfinite(loss) or not prompt.isfinite().all():
            raise FloatingPointError(
                f"not finite at update {self.step}: lower the learning rate"
            )
        if dev >= self.best_dev:
            self.best_dev = dev
            self.best_prompt = prompt.detach().clone()
        row = {"step": self.step, "stage": index + 1, "loss": loss, "dev": dev}
        self.log.append({**row, "best": self.best_dev, "flops": self.flops})
        self.losses = []


def train(
    model,  # the full T5, in eval mode, its weights frozen by requires_grad_(False)
    prompt,  # a SoftPrompt on the same device, trained in place
    optimizer,  # of `adafactor`, or another one for prompt.weight
    schedule,  # SCHEDULES["cr"], or another list of stages
    stream,  # an iterator over batches as in `neuron_scores`, from update run.step + 1
    dev_score,  # dev_score(model, prompt) -> a float, higher is better; no gradients
    *,
    steps,
    eval_every,
    run,  # Run(), or one to go on from; at the end run.best_prompt is the result
    scores=None,  # of `neuron_scores`
    decoder=True,  # as in `partial_t5`
    gradient=gradient,  # or a function that does the same in parts or processes
):
    """FPT: one prompt, one optimiser, a model that grows. Yields `run` every update."""
    final = partial_t5(model, schedule[-1].depth, schedule[-1].width, scores, decoder)
    pt_cost = functools.cache(functools.partial(step_flops, model))
    index = None
    started = time.perf_counter()
    for step in range(run.step + 1, steps + 1):
        # 1. Stage. The model grows; the prompt and the optimiser go on as they are.
        index_now = stage_at(schedule, step, steps)
        if index_now != index:
            index, stage = index_now, schedule[index_now]
            current = partial_t5(model, stage.depth, stage.width, scores, decoder)
            cost = functools.cache(functools.partial(step_flops, current))
        # 2. Batch: the same one for every schedule, so that results can be compared.
        batch = next(stream)
        # 3. Forward through the frozen partial model, and back to the prompt.
        loss, prompt.weight.grad = gradient(current, prompt, batch)
        # 4. Update, with the paper's clipping.
        nn.utils.clip_grad_norm_([prompt.weight], 1.0)
        optimizer.step()
        # 5. Ledger (FLOPs are cached for each shape).
        run.step = step
        run.losses.append(loss)
        shape = padded_shape(prompt.weight, batch)
        run.flops += cost(*shape)
        run.pt_flops += pt_cost(*shape)
        # 6. Evaluation, on the last stage's model. Official: on the current one.
        evaluated = step % eval_every == 0 or step == steps
        if evaluated:
            losses = torch.stack(run.losses).tolist()  # waits for the device
            run.seconds += time.perf_counter() - started
            mean_loss = sum(losses) / len(losses)
            run.record(index, prompt.weight, mean_loss, dev_score(final, prompt))
        yield run
        if evaluated:  # the clock restarts
            started = time.perf_counter()


# ====== 6 Tasks and data ==============================================================


@dataclass
class Example:
    """A source, the texts that answer it (the first is learned), and their tokens."""

    source: str
    answers: list[str]
    tokens: dict = None  # its input_ids and labels, lists of T and S numbers


@dataclass
class Task:
    """What a task is and, once it is loaded, its examples.

    With labels the answer is one of them, and the decoder stays whole, as in the paper.
    Without, it is free text, and the decoder is reduced as well.
    """

    template: str = ""  # of a source, filled with a row of the hub data set
    labels: tuple = ()  # verbalizer: the texts of label 0, 1, ...
    hub: str = ""  # the data set; for GLUE and SuperGLUE the task names the subset
    metric: str = "accuracy"  # one of METRICS
    max_target: int = 64  # tokens of free text that are learned, and generated at most
    prefix: str = "<extra_id_0>"  # of each target, as in T5's pre-training
    train: list = ()
    dev: list = ()  # held out from train by `load_task`; it chooses the prompt
    validation: list = ()  # only reported
    label_ids: list = ()  # the tokens of each label, by `encode`
    collate: object = None  # makes a padded batch of rows' tokens, by `encode`


METRICS = ("accuracy", "f1", "exact_match", "rouge_l")  # see `score`
GLUE = "nyu-mll/glue"  # full names: datasets 5 refuses the short ones
SUPER = "aps/super_glue"
NLI = "hypothesis: {hypothesis} premise: {premise}"
PAIR = "sentence1: {sentence1} sentence2: {sentence2}"
QUESTIONS = "question1: {question1} question2: {question2}"
RECORD = "query: {query} entities: {entities} passage: {passage}"
SQUAD = "question: {question} context: {context}"
BOOLQ = "question: {question} passage: {passage}"
COPA = "choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}"
TASKS = {
    "mnli": Task(NLI, ("entailment", "neutral", "contradiction"), GLUE),
    "qqp": Task(QUESTIONS, ("not_duplicate", "is_duplicate"), GLUE),
    "squad2": Task(SQUAD, (), "rajpurkar/squad_v2", "exact_match"),
    "record": Task(RECORD, (), SUPER, "exact_match"),
    "xsum": Task("{document}", (), "EdinburghNLP/xsum", "rouge_l", 128),
    # The paper's tasks end here. t5-base and the other models of T5 v1.0 saw these, and
    # most of those above, in their own pre-training: scores of theirs show that a run
    # works, not what a prompt can learn.
    "rte": Task(PAIR, ("entailment", "not_entailment"), GLUE),
    "sst2": Task("sentence: {sentence}", ("negative", "positive"), GLUE),
    "mrpc": Task(PAIR, ("not_equivalent", "equivalent"), GLUE),
    "boolq": Task(BOOLQ, ("False", "True"), SUPER),
    "cb": Task(NLI, ("entailment", "contradiction", "neutral"), SUPER),
    "copa": Task(COPA, ("choice1", "choice2"), SUPER),
    "wic": Task("word: {word} " + PAIR, ("False", "True"), SUPER),
}


def load_task(name, dev, limit=0):
    """The task of this name, from the table or a folder, with its examples.

    `dev` of them, a fifth at most but one at least, are held out from train: by their
    sources, and the same every time. A limit > 0 keeps that many validation examples,
    at random, since files may be sorted. Warns if train contains validation
    sources or lacks a label. Raises ValueError for a folder that cannot be used, and
    what the `datasets` library raises.
    Official: chooses prompts and neurons on the split that it reports.
    """
    if name in TASKS:
        task = load_hub(name)
    elif os.path.isdir(name):
        task = load_folder(Path(name))
    else:
        raise ValueError(f"unknown task {name!r}: use a folder or {', '.join(TASKS)}")
    shuffled = functools.partial(
        sorted, key=lambda row: zlib.crc32(row.source.encode())
    )
    sources = {row.source: row for row in shuffled(task.train)}
    known = sum(row.source in sources for row in task.validation)
    if known:
        print(f"warning: {known} sources of validation are in train as well")
    missing = set(task.labels) - {row.answers[0] for row in task.train}
    if missing:
        print(f"warning: {len(missing)} labels are not in train: {sorted(missing)[:9]}")
    count = max(1, min(dev, len(sources) // 5))
    task.dev = [sources.pop(source) for source in list(sources)[:count]]
    task.train = [row for row in task.train if row.source in sources]
    if limit:
        task.validation = shuffled(task.validation)[:limit]
    return task


def load_hub(name):
    """A task of the table, downloaded or from the cache of the `datasets` library."""
    import datasets  # after transformers: before it, it prints two lines of its own

    task = TASKS[name]
    subset = name if "glue" in task.hub else None
    try:
        splits = datasets.load_dataset(task.hub, subset)
    except RuntimeError:  # a loading script, as XSum's may be; this branch has its rows
        branch = "refs/convert/parquet"
        splits = datasets.load_dataset(task.hub, subset, revision=branch)
    train = []
    for row in splits["train"]:
        train += hub_examples(task, row)
    rows = splits["validation_matched" if name == "mnli" else "validation"]
    validation = [hub_examples(task, row)[0] for row in rows]
    return replace(task, train=train, validation=validation)


def hub_examples(task, row):
    """A row of a hub data set as an example for each answer that is learned from it.

    That is one, except for ReCoRD: the official code learns every answer to a query.
    """
    if task.labels:
        # A row without a label has -1, which a tuple would take for the last label.
        answers = [dict(enumerate(task.labels))[row["label"]]]
    elif "summary" in row:  # XSum
        answers = [row["summary"]]
    elif "entities" in row:  # ReCoRD
        answers = list(dict.fromkeys(row["answers"]))
        # The passage ends in bullet points. Those without a full stop get one.
        passage = regex.sub(r"(?<=[.?!\"'])\n@highlight\n", " ", row["passage"])
        passage = passage.replace("\n@highlight\n", ". ")
        row = {**row, "entities": ", ".join(row["entities"]), "passage": passage}
    else:  # SQuAD 2.0
        answers = row["answers"]["text"] or ["no answer"]
    source = task.template.format(**row)
    learned = answers if "entities" in row else answers[:1]
    return [Example(source, [text, *answers]) for text in learned]


def load_folder(folder):
    """A task of your own: task.json, train.jsonl and validation.jsonl in a folder.

    task.json holds an object that may set labels, metric, max_target and prefix (none
    by default). A line of the others is {"source": text, "target": text}. Without
    labels a target may be a list: its first text is learned, and any is right. Raises
    ValueError, with file and line, for what cannot be used.
    """
    place = folder / "task.json"
    spec = {"labels": [], "metric": "accuracy", "max_target": 64, "prefix": ""}
    examples = {"train": [], "validation": []}
    try:
        given = json.loads(place.read_text("utf-8-sig"))
        for key, value in given.items():
            if type(value) is not type(spec[key]) or (
                key == "max_target" and value < 1
            ):
                raise ValueError(
                    f"{key} cannot be {value!r}; a default is {spec[key]!r}"
                )
        task = Task(**spec | given)
        if task.metric not in METRICS:
            raise ValueError(f"metric is one of {METRICS}")
        for name, rows in examples.items():
            lines = (folder / f"{name}.jsonl").read_bytes().rstrip().split(b"\n")
            for number, line in enumerate(lines, 1):
                place = f"{folder}/{name}.jsonl, line {number}, {line[:80]}"
                row = json.loads(line)
                target = row["target"]
                answers = target if isinstance(target, list) else [target]
                texts = [text.strip() for text in [row["source"], *answers]]
                if len(texts) < 2 or "" in texts:
                    raise ValueError("source or target is empty")
                "".join(texts).encode()  # fails where half a surrogate pair is
                if task.labels and texts[1:] not in [[label] for label in task.labels]:
                    raise ValueError(f"target {target!r} is not one of {task.labels}")
                rows.append(Example(row["source"], texts[1:]))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from None
    return replace(task, **examples)


def encode(task, tokenizer, max_source):
    """Give all examples their tokens, at most max_source and task.max_target of them.

    Says how many fill that space, or have tokens that the model does not know. Labels
    are not cut, or two might become one. ValueError if two are the same tokens anyway.
    """
    from transformers import DataCollatorForSeq2Seq

    task.collate = DataCollatorForSeq2Seq(tokenizer)  # Official: pads all to 492 tokens
    task.label_ids = []
    for label in task.labels:
        ids = tokenizer(task.prefix + label).input_ids
        if ids in task.label_ids:
            twin = task.labels[task.label_ids.index(ids)]
            raise ValueError(f"labels {twin!r} and {label!r} are the same tokens")
        task.label_ids.append(ids)
    longest = 512 if task.labels else task.max_target
    full = unknown = changed = 0
    examples = [*task.train, *task.dev, *task.validation]
    for start in range(0, len(examples), 1000):  # all at once would take much memory
        part = examples[start : start + 1000]
        texts = [example.source for example in part]
        sources = tokenizer(texts, truncation=True, max_length=max_source).input_ids
        texts = [task.prefix + example.answers[0] for example in part]
        targets = tokenizer(texts, truncation=True, max_length=longest).input_ids
        for example, source, target, text in zip(
            part, sources, targets, decode(task, targets), strict=True
        ):
            example.tokens = {"input_ids": source, "labels": target}
            full += len(source) == max_source or len(target) == longest
            unknown += tokenizer.unk_token_id in source + target
            changed += text != example.answers[0].strip()
    for count, what in [
        (full, "fill --max-source or max_target"),
        (unknown, "have tokens that this model does not know"),
        (changed, "have a target that is not the same when decoded"),
    ]:
        if count:
            print(f"warning: {count} of {len(examples)} examples {what}")


def source_length(example):
    """The number of tokens of an example's source."""
    return len(example.tokens["input_ids"])


def rng(*key):
    """A generator that depends on this key alone, so that no draw can shift another."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def batches(task, size, device, seed, first_update=1, pool=200):
    """Yield the train batches of a seed from update `first_update` on, without end.

    A batch depends on seed and update alone, so all schedules of a seed see the same
    batches, and a run can be resumed. A pass over the examples is shuffled and cut into
    pools of `pool` batches. Each pool is sorted by length, for little padding, and its
    batches are shuffled. No example comes twice in a pass; those that do not fill a
    batch at its end are left out of it.
    """
    per_pass = len(task.train) // size
    for number in itertools.count((first_update - 1) // per_pass):
        order = torch.randperm(len(task.train), generator=rng(seed, "pass", number))
        pass_batches = []
        for part in order[: per_pass * size].split(pool * size):
            rows = [task.train[i] for i in part]
            rows.sort(key=source_length)
            generator = rng(seed, "pool", number, len(pass_batches))
            for i in torch.randperm(len(rows) // size, generator=generator):
                pass_batches.append(rows[i * size : (i + 1) * size])
        skipped = max(0, first_update - 1 - number * per_pass)
        for rows in pass_batches[skipped:]:
            yield task.collate([row.tokens for row in rows]).to(device)


# ====== 7 Evaluate ====================================================================

RANK = int(os.environ.get("RANK", 0))  # of this process among those of torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # their number
EVALUATION_BATCH = 128  # examples: more than in an update, for lack of a backward pass


def score(task, predictions, examples):
    """The score of some predicted texts by task.metric, in percent.

    accuracy: equal to a right answer. f1: for labels, of the second of two (as in GLUE)
    or the mean of those that occur; for free text that of SQuAD's script, as is
    exact_match, both of the best answer. rouge_l: the F-measure, likewise, for words of
    any script.
    Official: EM of raw texts, the summary-level ROUGE-L.
    """
    from torchmetrics import functional

    answers = [example.answers for example in examples]
    if task.metric == "rouge_l":
        scores = functional.text.rouge_score(
            predictions,
            answers,
            normalizer=str.lower,
            tokenizer=regex.compile(r"[\p{L}\p{M}\p{N}]+").findall,
            rouge_keys="rougeL",
        )
        return 100 * scores["rougeL_fmeasure"].item()
    if task.metric == "accuracy":
        pairs = zip(predictions, answers, strict=True)
        return 100 * sum(text in right for text, right in pairs) / len(answers)
    if task.labels and task.metric == "f1":
        count = len(task.labels)
        f1 = functional.f1_score(
            torch.tensor([task.labels.index(text) for text in predictions]),
            torch.tensor([task.labels.index(right[0]) for right in answers]),
            task="binary" if count == 2 else "multiclass",
            num_classes=count,
            average="macro",
        )
        return 100 * f1.item()
    found = [{"id": i, "prediction_text": text} for i, text in enumerate(predictions)]
    gold = [{"id": i, "answers": {"text": texts}} for i, texts in enumerate(answers)]
    return functional.text.squad(found, gold)[task.metric].item()


@torch.no_grad()
def evaluate(model, prompt, task, examples):
    """The score of encoded examples in percent, and the predicted texts.

    Labels are predicted by rank classification: the label whose text is likeliest, with
    the log-likelihoods of its tokens added up. Free text is decoded greedily.
    Official: decodes labels as well, and compares texts.
    """
    order = sorted(range(len(examples)), key=lambda i: source_length(examples[i]))
    own = order[RANK::WORLD]
    texts = {}
    for start in range(0, len(own), EVALUATION_BATCH):
        chosen = own[start : start + EVALUATION_BATCH]
        batch = task.collate([examples[i].tokens for i in chosen]).to(model.device)
        embeds, mask = prompt(model, batch)  # [B, P+T, d], [B, P+T]
        if task.labels:
            found = likeliest_labels(model, embeds, mask, task)
        else:
            ids = model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=task.max_target,
            )
            found = decode(task, ids)
        texts |= zip(chosen, found, strict=True)
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, texts)
        for part in parts:
            texts |= part
    predictions = [texts[i] for i in range(len(examples))]
    return score(task, predictions, examples), predictions


def decode(task, rows):
    """Rows of token ids as texts, without <pad>, </s> and the prefix of targets.

    Other special tokens stay: they may be part of an answer.
    """
    texts = task.collate.tokenizer.batch_decode(rows)
    texts = [regex.sub("<pad>|</s>", "", text).strip() for text in texts]
    return [text.removeprefix(task.prefix.strip()).strip() for text in texts]


def likeliest_labels(model, embeds, mask, task):
    """The label with the smallest loss for each of B sources behind a prompt."""
    encoded = model.encoder(inputs_embeds=embeds, attention_mask=mask)
    losses = []
    for ids in task.label_ids:  # one at a time, to save memory
        target = mask.new_tensor(ids).expand(len(mask), -1)  # [B, S]
        loss = token_losses(model, mask, target, encoder_outputs=encoded)  # [B, S]
        losses.append(loss.sum(1))
    best = torch.stack(losses).argmin(0)  # [B]
    return [task.labels[i] for i in best]


# ====== 8 Record and compare ==========================================================


def write_lines(path, rows):
    """Write JSON, a line for each row, in one piece: a stop leaves the old file."""
    path.parent.mkdir(exist_ok=True)
    draft = path.with_name("draft")
    draft.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    os.replace(draft, path)


def at_first(log, key, least, wanted):
    """What is `wanted` at the first evaluation with that much of `key`; NaN if none."""
    for row in log:
        if row[key] >= least:
            return row[wanted]
    return math.nan


def compare(results):
    """A pandas DataFrame with a row for each run: scores, and costs beside `pt`'s.

    dev, validation: scores of the chosen prompt. flops, seconds: of training (and flops
    of scoring the neurons), in percent of the `pt` run with the same seed. pt, same
    flops: the dev score of that run when it had spent as many FLOPs, or at the
    evaluation just after. gain: dev minus that, the paper's "Improve". to 99 %: FLOPs
    until the best dev score is 99 % of what `pt` ends with, in percent of what `pt`
    needs. NaN where that is never reached.
    """
    import pandas

    pt_runs = {run["seed"]: run for run in results if run["schedule"] == "pt"}
    rows = []
    for run in results:
        row = {"dev": run["best_dev"], "validation": run["validation"]}
        rows.append(row)
        pt = pt_runs.get(run["seed"])
        if pt:
            goal = 0.99 * pt["best_dev"]
            pt_spent = at_first(pt["log"], "best", goal, "flops")
            row["flops"] = 100 * run["flops"] / pt["flops"]
            row["seconds"] = 100 * run["seconds"] / pt["seconds"]
            row["pt, same flops"] = at_first(pt["log"], "flops", run["flops"], "best")
            row["gain"] = row["dev"] - row["pt, same flops"]
            row["to 99 %"] = (
                100 * at_first(run["log"], "best", goal, "flops") / pt_spent
            )
    return pandas.DataFrame(rows, index=[run["schedule"] for run in results])


def table(results):
    """`compare` as text: mean ± standard deviation over seeds.

    With three or more seeds, also the 95 % interval of the mean gain (Student's t).
    """
    from scipy import stats

    frame = compare(results)
    groups = frame.groupby(level=0, sort=False)
    cells = groups.agg(
        lambda x: f"{x.mean(skipna=False):.1f} ± {x.std(skipna=False):.1f}"
    )
    if "gain" in frame and groups.size().min() > 2:
        half = stats.t.ppf(0.975, groups.size() - 1) * groups.gain.agg(stats.sem)
        cells["95 % of gain"] = half.map("± {:.1f}".format)
    return cells.to_string().replace(" ± nan", "      ")


def samples(results, examples):
    """The first of these examples, and what each run predicts, as text."""
    lines = []
    for i in range(len(results[0]["samples"])):
        example = examples[i]
        lines.append(f"\n{example.source[:300]}\n    gold: {example.answers[0]}")
        for run in results:
            lines[-1] += f" | {run['schedule']} {run['seed']}: {run['samples'][i]}"
    return "\n".join(lines)


def figure(results):
    """A matplotlib Figure: best dev score over training FLOPs, mean of the seeds."""
    import pandas
    from matplotlib.figure import Figure

    plot = Figure(layout="constrained")
    axes = plot.subplots()
    styles = itertools.cycle(["--", "-", "-.", ":"])  # told apart in grey
    logs = [
        pandas.DataFrame(run["log"]).assign(name=run["schedule"]) for run in results
    ]
    for name, rows in pandas.concat(logs).groupby("name", sort=False):
        mean = rows.groupby("step").mean(numeric_only=True)
        axes.plot(mean.flops, mean.best, next(styles), color="black", label=name)
    axes.set(xlabel="training FLOPs", ylabel="best dev score so far, mean over seeds")
    axes.legend()
    return plot


# ====== 9 Command line ================================================================

MICRO = Path(__file__).resolve().parent / "micro"  # a small model and a task for it
HELP = """Fast Prompt Tuning of a T5, with the paper's settings unless others are given.

--model          hub id or folder of a T5, mT5 or ByT5 (without it, a micro T5)
--task           name in TASKS, or a folder of your own (without it, micro/)
--schedule       pt ld fr cr, or such as 0.5x0.5:0.4,1x1:0.6; several in turn (cr)
--seed           of the initial prompt and of the data order; several in turn (0)
--steps          updates (30000)
--batch          examples in an update (32)
--prompt-length  vectors of the soft prompt (20)
--init           uniform (the default), vocab, or the folder of a saved prompt
--lr             learning rate, constant (0.3)
--eval-every     updates between evaluations (500)
--dev            train examples that choose the prompt, a fifth at most (500)
--limit          validation examples to report on (all)
--max-source     source tokens that are kept (492)
--precision      fp32 (the default) or bf16
--accumulate     parts that a batch is cut into, to save memory (1)
--device         cpu, cuda, cuda:1, mps (the accelerator, if there is one)
--threads        of the CPU (torch's choice)
--out            new folder for the results (runs/ with date and time)
--resume         folder of a stopped command, to go on with its settings

Without --task: pt and cr, seeds 0 and 1, 160 updates, --eval-every 16 and --dev 250, if
nothing else is given.
"""
SETTINGS = {  # the flags and their defaults, which are the paper's
    "model": str(MICRO / "model"),
    "task": str(MICRO / "reviews"),
    "schedule": ["cr"],
    "seed": [0],
    "steps": 30_000,
    "batch": 32,
    "prompt_length": 20,
    "init": "uniform",
    "lr": 0.3,
    "eval_every": 500,
    "dev": 500,
    "limit": 0,
    "max_source": 492,
    "precision": "fp32",
    "accumulate": 1,
    "device": "auto",
    "threads": 0,
    "out": "",
    "resume": "",
}
MICRO_RUN = {  # what `python fpt.py` alone does, in two minutes
    "schedule": ["pt", "cr"],
    "seed": [0, 1],
    "steps": 160,
    "eval_every": 16,
    "dev": 250,
}
# Paths and hardware: nothing that changes a result, but for rounding.
ALLOWED_WITH_RESUME = "resume model task device threads accumulate"


def fail(text, code=2):
    """End the program with one line on stderr."""
    print(f"fpt.py: {text}", file=sys.stderr)
    raise SystemExit(code) from None


def parse_args(argv=None):
    """The command line as settings; a mistake is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = lambda text: fail(f"error: {text}; see --help")
    for name, default in SETTINGS.items():
        several = isinstance(default, list)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default[0] if several else default),
            nargs="+" if several else None,
            help=argparse.SUPPRESS,
        )
    given = vars(parser.parse_args(argv))
    settings = SETTINGS | {"out": time.strftime(f"runs/%Y-%m-%d_%H%M%S_{os.getpid()}")}
    if "resume" in given:
        saved = Path(given["resume"], "settings.json")
        if given.keys() - ALLOWED_WITH_RESUME.split() or not saved.exists():
            parser.error(f"--resume takes {saved}, and only {ALLOWED_WITH_RESUME}")
        settings |= json.loads(saved.read_text("utf-8")) | {"out": given["resume"]}
    elif "task" not in given:
        settings |= MICRO_RUN
    settings |= given
    for name, value in settings.items():
        least = 0 if name in ("limit", "threads") else 1
        if isinstance(value, int) and value < least:
            parser.error(f"--{name.replace('_', '-')} has to be {least} or more")
    if not 0 < settings["lr"] < math.inf:
        parser.error("--lr has to be a number above 0")
    if settings["precision"] not in ("fp32", "bf16"):
        parser.error("--precision is fp32 or bf16; in fp16 T5's activations overflow")
    return argparse.Namespace(**settings)


def load_model(name, device, precision):
    """A T5, frozen and without dropout as in the paper, and its tokenizer.

    Raises ValueError for a model of another kind and for files that do not fit each
    other, and what transformers raises.
    """
    import transformers

    if Path(name, "adapter_config.json").exists():
        raise ValueError(
            f"{name} holds an adapter: merge it, or pass a prompt by --init"
        )
    transformers.logging.set_verbosity_error()  # its advice on untied heads is wrong
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(name, dropout_rate=0.0)
    if config.model_type not in T5_KINDS:
        raise ValueError(f"{name} is of type {config.model_type}: no T5 or mT5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        name,
        config=config,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        output_loading_info=True,
    )
    # transformers silently draws missing weights and invents a missing tokenizer.
    if info["missing_keys"]:
        raise ValueError(f"{name} has no {min(info['missing_keys'])}")
    if not config.vocab_size / 2 < len(tokenizer) <= config.vocab_size:
        raise ValueError(f"the tokenizer of {name} is absent, or another model's")
    # Greedy decoding, whatever the model's own generation_config.json says.
    model.generation_config = transformers.GenerationConfig.from_model_config(config)
    return model.to(device).eval().requires_grad_(False), tokenizer


def gradient_in_parts(model, prompt, batch, parts):
    """`gradient` in parts, to save memory: each process computes some, one at a time.

    A part counts by its share of the target tokens, so they add up to the whole.
    """
    loss, grad = 0.0, 0.0
    tokens = (batch["labels"] != -100).sum()
    for i in range(RANK, parts * WORLD, WORLD):
        part = {name: rows[i :: parts * WORLD] for name, rows in batch.items()}
        share = (part["labels"] != -100).sum() / tokens
        part_loss, part_grad = gradient(model, prompt, part)
        loss += share * part_loss
        grad += share * part_grad
    if WORLD > 1:
        dist.all_reduce(loss)
        dist.all_reduce(grad)
    return loss, grad


def prepare(settings):
    """Load the model and the task of the settings, and make the folder of the results.

    Raises what the libraries raise, and ValueError for what does not go together.
    """
    for text in settings.schedule:
        parse_schedule(text)
    if WORLD > 1:
        dist.init_process_group()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = settings.device.replace("auto", "cpu")
    if settings.device == "auto" and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    task = load_task(settings.task, settings.dev, settings.limit)
    if not WORLD * settings.accumulate <= settings.batch <= len(task.train):
        raise ValueError("--batch: from processes x --accumulate to the train examples")
    model, tokenizer = load_model(settings.model, device, settings.precision)
    encode(task, tokenizer, settings.max_source)
    start = settings.init, settings.prompt_length, model.shared.weight
    init_prompt(*start, rng())  # fails early
    adapter = Path(settings.init, "adapter_config.json")
    if adapter.exists() and json.dumps(settings.model) not in adapter.read_text():
        print(f"warning: {adapter} is not of {settings.model}: {adapter.read_text()}")
    out = Path(settings.out)
    if RANK == 0 and not settings.resume:
        # Fails unless the folder is empty: nothing is overwritten.
        out.mkdir(parents=True, exist_ok=not any(out.glob("*")))
        write_lines(out / "settings.json", [vars(settings)])
    return model, task, out


def tune(model, task, settings, name, seed, folder):
    """Train, or go on from the folder's state -> the Run, the model of its prompt."""
    schedule = parse_schedule(name)
    draw = functools.partial(batches, task, settings.batch, model.device)
    embeddings, generator = model.shared.weight, rng(seed, "prompt")
    initial = init_prompt(settings.init, settings.prompt_length, embeddings, generator)
    run, prompt, scores = Run(), SoftPrompt(initial).to(model.device), None
    if any(stage.width < 1 for stage in schedule):
        stream = draw(f"scores {seed}", pool=1)  # not sorted by length: a fair sample
        sample = list(itertools.islice(stream, math.ceil(64 / settings.batch)))
        scores = neuron_scores(model, initial, sample)
        run.flops = sum(
            step_flops(model, *padded_shape(initial, x), False) for x in sample
        )
    optimizer = adafactor(prompt, settings.lr)
    saved = folder / "state.pt"
    if saved.exists():
        try:
            state = torch.load(saved, model.device, weights_only=True)
        except Exception:
            fail(f"error: {saved} is damaged; delete it, and that run starts anew")
        run = Run(**state["run"])
        prompt.load_state_dict(state["prompt"])
        optimizer.load_state_dict(state["optimizer"])
    updates = train(
        model,
        prompt,
        optimizer,
        schedule,
        draw(seed, first_update=run.step + 1),
        lambda final, prompt: evaluate(final, prompt, task, task.dev)[0],
        steps=settings.steps,
        eval_every=settings.eval_every,
        run=run,
        scores=scores,
        decoder=not task.labels,
        gradient=functools.partial(gradient_in_parts, parts=settings.accumulate),
    )
    total = settings.steps - run.step
    for _ in tqdm(updates, total=total, file=sys.stdout, disable=None):
        if not run.losses and RANK == 0:  # there was an evaluation: save the state
            tqdm.write(f"update {run.step}, dev {run.log[-1]['dev']:.2f}")
            write_lines(folder / "log.jsonl", run.log)  # first, so that no row is lost
            state = {"run": vars(run), "prompt": prompt.state_dict()}
            state["optimizer"] = optimizer.state_dict()
            torch.save(state, folder / "draft")
            os.replace(folder / "draft", saved)  # whole or not at all
    last = schedule[-1]
    return run, partial_t5(model, last.depth, last.width, scores, not task.labels)


def report(run, final, task, folder, **about):
    """Score the prompt on validation, write it and the results, and return those."""
    best = SoftPrompt(run.best_prompt)
    validation, texts = evaluate(final, best, task, task.validation)
    print(f"validation {validation:.2f}, FLOPs {run.flops / run.pt_flops:.3f} of pt's")
    results = {**about, **vars(run), "validation": validation, "best_prompt": None}
    results["samples"] = texts[:3]
    if RANK == 0:
        save_prompt(folder / "prompt", run.best_prompt, final.name_or_path)
        rows = [
            [example.source, example.answers, text]
            for example, text in zip(task.validation, texts, strict=True)
        ]
        write_lines(folder / "predictions.jsonl", rows)
        write_lines(folder / "results.json", [results])
    return results


def main(argv=None):
    """Run every schedule with every seed on one loaded model; return the results."""
    settings = parse_args(argv)
    os.environ["MPLBACKEND"] = "Agg"  # that of a notebook works nowhere else
    if RANK > 0:
        sys.stdout = io.StringIO()  # the first process speaks for all
    try:
        model, task, out = prepare(settings)
    except KeyboardInterrupt:
        fail("stopped", 130)
    except Exception as error:  # loaders raise what they like
        if "FPT_TRACEBACK" in os.environ:
            raise
        fail(
            f"error: {type(error).__name__}: {' '.join(str(error).split())[:600]} "
            f"(model {settings.model}, task {settings.task}, init {settings.init}. "
            "Without network: HF_HUB_OFFLINE=1; for pointers: git lfs pull; "
            "to see the traceback: FPT_TRACEBACK=1)"
        )
    print(f"{len(task.train)} train examples, on {model.device}; results in {out}")
    results = []
    try:
        for seed, name in itertools.product(
            dict.fromkeys(settings.seed),  # once, whatever is given twice
            dict.fromkeys(settings.schedule),
        ):
            print(f"\n{name}, seed {seed}")
            slug = regex.sub("[:, ]+", "_", name)
            if len(slug) > 99:  # a file system may refuse it
                slug = zlib.crc32(slug.encode())
            folder = out / f"{slug}-seed{seed}"
            run, final = tune(model, task, settings, name, seed, folder)
            results.append(report(run, final, task, folder, schedule=name, seed=seed))
    except KeyboardInterrupt:
        fail(f"stopped. Go on with: python fpt.py --resume {out}", 130)
    if len(results) > 1 and RANK == 0:
        print(f"\nIn percent, means ± standard deviations over seeds {settings.seed}")
        print(table(results))
        print(samples(results, task.validation))
        try:
            figure(results).savefig(out / "comparison.png", dpi=150)
        except Exception as error:  # the numbers are what counts
            print(f"no figure: {error}")
    return results


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may not have all letters
    main()
    if WORLD > 1:
        dist.destroy_process_group()
