"""FPT: Fast Prompt Tuning by progressive training, in one file.

    python fpt.py                             # offline, two minutes: pt against cr on a micro T5
    python fpt.py --model t5-base --task rte  # FPT: schedule cr, the paper's 30,000 updates
    python fpt.py --model t5-base --task rte --schedule pt cr --seed 0 1 2  # and a comparison
    python fpt.py --model PATH/TO/T5 --task FOLDER --schedule 0.5x0.5:0.4,1x1:0.6 --steps 2000
    python fpt.py --resume runs/FOLDER        # after a stop of any kind: on, to the same prompt

Prompt tuning (PT, Lester et al. 2021) learns P vectors in front of the input embeddings of a
frozen T5. Few parameters, but every update runs the whole model forward and backward. FPT (Huang
et al., Findings of EMNLP 2022, arXiv 2211.06840) makes the early updates cheap: the prompt is
trained first on a *partial* T5, with layers dropped and FFN neurons removed (where answers are
labels, in the encoder alone), that grows in stages to the full model. The same prompt is carried
("recycled") through every growth.

    the paper                              here
    partial PLM: layer dropping (LD)       kept_layers, partial_t5
    FFN reduction (FR), compound (CR)      neuron_scores, narrowed, partial_t5
    progressive training                   SCHEDULES, stage_at, train
    FLOPs (there: forward, linear layers)  step_flops
    prompt tuning (PT)                     SoftPrompt, init_prompt, gradient
    "Improve": PT at the same FLOPs        compare

Measured with the first command and seeds 8 to 31, on a micro T5 made to survive layer dropping
(evidence/README.md; dev accuracy in %, mean ± standard deviation): pt 95.4 ± 4.4, cr 95.9 ± 6.7
with 0.64 of its FLOPs, and pt stopped at 0.70 of them 86.0 ± 7.5. No pretrained T5 has been run
yet. Where FPT fails: tutorial.md.

What this is not: a library of tuning methods (PEFT is; the prompts saved here load there), a way
to tune weights, or for models other than T5s. Lines that differ on purpose from the authors' code
(thunlp/FastPromptTuning) are marked "Official:"; tutorial.md collects them in one table.

To use FPT elsewhere, copy sections 1 to 5: the method, and `train`, its loop. They know nothing of
settings, tasks or files (but for a prompt's). The rest is the program around them, and last a
cheaper cross-attention, which the program takes where it pays: in fp32 on a CPU.

Glossary
    B        examples in a batch
    P        vectors in the soft prompt (20 in the paper)
    T        tokens of the source, padded to the longest of the batch
    S        tokens of the target, likewise
    d, V     d_model, the width of the vectors between layers; tokens of the vocabulary
    d_ff     neurons of a feed-forward network (FFN): neuron j is row j of wi and column j of wo
    L, C     layers ("blocks") of the encoder or of the decoder; labels of a task
    H, d_kv  heads of an attention, and the width of one
    b, i, k  examples in a part of a batch; indices
    depth    share of the L layers that a partial model keeps (Table 1: "Enc/Dec layers")
    width    share of the d_ff neurons that each layer keeps  (Table 1: "FFN dim")
    stage    a depth, a width, and the share of all updates spent there
    update   one optimiser step on one batch, counted from 1
"""

import argparse, copy, functools, itertools, json, math, os, re  # noqa: E401
import signal, statistics, sys, time, unicodedata, urllib.request, zlib  # noqa: E401
from pathlib import Path
from typing import NamedTuple

# ====== Settings ==================================================================================

MICRO = Path(__file__).resolve().parent / "micro"  # a model and a task like any other, but small
# What `python fpt.py` alone runs on them: offline, in two minutes. The command's own flags win.
MICRO_RUN = {"schedule": ["pt", "cr"], "seed": [0, 1], "steps": 400, "eval_every": 40, "dev": 250,
             "threads": 1}
# What may differ when a command goes on (--resume): how it computes and where, not what.
FREE = {"accumulate", "device", "threads", "out", "resume", "versions"}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line as settings; what cannot be read is one line on stderr and exit code 2.

    Defaults of batch, steps, rate, P and lengths are the paper's. --resume takes the settings of
    its folder, and other flags than those in `FREE` must agree with them (`open_folder`).
    """
    parser = argparse.ArgumentParser("fpt.py", allow_abbrev=False, description=__doc__[:62],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"fpt.py: error: {text}; see --help\n")
    add = parser.add_argument
    add("--model", default=str(MICRO / "model"), help="hub id or folder of a T5, mT5 or ByT5")
    add("--task", default=str(MICRO / "entailment"), help="name in the task table, or a folder")
    add("--schedule", nargs="+", default=["cr"], help="pt, ld, fr, cr, fast or 0.5x0.5:0.4,1x1:0.6")
    add("--seed", nargs="+", type=int, default=[0], help="of data order and start; several run too")
    add("--steps", type=int, default=30_000, help="updates; the stages scale with it")
    add("--batch", type=int, default=32, help="examples per update")
    add("--prompt-length", type=int, default=20, help="P, vectors in the soft prompt")
    add("--init", default="uniform", help="uniform, vocab, labels, or the folder of a saved prompt")
    add("--lr", type=float, default=0.3, help="constant learning rate of Adafactor")
    add("--eval-every", type=int, default=500, help="updates between evaluations, which save, too")
    add("--dev", type=int, default=500, help="train examples, a fifth at most, to choose a prompt")
    add("--limit", type=int, default=0, help="validation examples to report on; 0 means all")
    add("--max-source", type=int, default=492, help="source tokens kept; with P the paper's 512")
    add("--precision", default="fp32", help="fp32 or bf16")
    add("--accumulate", type=int, default=1, help="parts that a batch is cut into, for memory")
    add("--checkpointing", action="store_true", help="run every layer twice, for memory")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--threads", type=int, default=0, help="of the CPU; 0: torch's choice. It moves rounding")
    add("--out", default="runs/TIME", help="new folder for what this command writes")
    add("--resume", default="", help="folder of a command that was stopped: go on from there")
    config = parser.parse_args(argv)
    saved = Path(config.resume, "settings.json")
    if config.resume and saved.exists():
        parser.set_defaults(**json.loads(saved.read_text("utf-8")))
    elif Path(config.task).resolve() == MICRO / "entailment":
        parser.set_defaults(**MICRO_RUN)
    config = parser.parse_args(argv)
    if config.precision not in ("fp32", "bf16"):
        parser.error("--precision is fp32 or bf16; in fp16 T5's activations overflow")
    return config


if __name__ == "__main__":
    parse_args()  # --help and a mistyped flag answer at once: torch imports slowly

import safetensors, torch  # noqa: E401, E402
from accelerate import PartialState, utils  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# ====== 1 Partial models ==========================================================================


def kept_layers(total: int, keep: int) -> list[int]:
    """Indices of the layers that layer dropping keeps, evenly: kept_layers(12, 3) is [0, 5, 11].

    Layer 0 always stays: it alone owns T5's relative position bias, and without it the model runs
    on, silently wrong. From two layers on the last one stays too, and gaps differ by at most one,
    the larger ones at the top. Sets of growing stages are not nested: of 24 layers, 13 is among the
    6 but not among the 12. Raises ValueError unless 1 <= keep <= total.
    Official: `evenly_select_layers`, the same rule; it divides by zero for keep=1.
    """
    if not 1 <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} layers")
    # Between `keep` layers are keep-1 gaps; the last `longer` of them are wider by one: 11 = 5 + 6.
    gap, longer = divmod(total - 1, max(1, keep - 1))
    return [i * gap + max(0, i - (keep - 1 - longer)) for i in range(keep)]


@torch.no_grad()
def neuron_scores(model, prompt: Tensor, batches) -> dict[str, list[Tensor]]:
    """Mean absolute activation of every FFN neuron, by which FFN reduction ranks them.

    The activation is the input of `wo`: relu(wi x) in T5 v1.0, gelu(wi_0 x) * wi_1 x in gated T5s.
    It is averaged over an example's unmasked positions, the prompt's too, and then over examples,
    so that a long example counts as much as a short one. What a neuron writes, its column of `wo`,
    is ignored, as in the paper.

    Args:
        model: the full T5ForConditionalGeneration, without dropout (it would blur the scores).
        prompt: [P, d]; the paper uses the initial one.
        batches: dicts of input_ids [B, T], attention_mask [B, T], labels [B, S] (-100 is masked).
    Returns:
        {"encoder": [Tensor[d_ff], ...], "decoder": [...]}, one fp32 tensor a layer, for this model.
    Official: scores 1,000 examples of the *validation* split; give it train examples.
    """
    sides = {"encoder": model.encoder.block, "decoder": model.decoder.block}
    side_of = {block.layer[-1].DenseReluDense.wo: side for side in sides for block in sides[side]}
    soft_prompt, mask, count = SoftPrompt(prompt).to(model.device), {}, 0
    totals = dict.fromkeys(side_of, 0.0)

    def add(wo, inputs):  # [B, positions, d_ff]; summed at once: those of all layers are large
        weight = mask[side_of[wo]].unsqueeze(-1).float()  # [B, positions, 1]
        mean = (inputs[0].abs().float() * weight).sum(1) / weight.sum(1).clamp(min=1)  # [B, d_ff]
        totals[wo] = totals[wo] + mean.sum(0)

    hooks = [wo.register_forward_pre_hook(add) for wo in side_of]
    for batch in batches:
        batch = {name: rows.to(model.device) for name, rows in batch.items()}
        embeds = model.shared(batch["input_ids"])  # [B, T, d]
        embeds, mask["encoder"] = soft_prompt(embeds, batch["attention_mask"])  # [B, P+T, d]
        mask["decoder"] = batch["labels"] != -100  # [B, S]
        token_losses(model, mask["encoder"], batch["labels"], inputs_embeds=embeds)  # calls `add`
        count += len(embeds)
    for hook in hooks:
        hook.remove()
    return {side: [totals[wo] / count for wo in side_of if side_of[wo] == side] for side in sides}


def replaced(module, path: str, child):
    """A view of a module in which `child` stands at a dotted path: replaced(t5, "lm_head", mine).

    Only the modules on the path are copied, without their tensors: all weights are shared, and the
    module itself is left as it is. (`copy.copy` alone would share the table of children as well.)
    """
    name, _, rest = path.partition(".")
    view = copy.copy(module)
    view._modules = dict(module._modules)
    view._modules[name] = replaced(module._modules[name], rest, child) if rest else child
    return view


def share_of(total: int, share: float) -> int:
    """How many of `total` layers or neurons a share is: rounded half up, one at least."""
    return max(1, math.floor(share * total + 0.5 + 1e-9))  # in floats 0.29 * 50 is below 14.5


def narrowed(block, scores: Tensor, width: float):
    """A view of a T5 layer with a share `width` of its FFN neurons: those with the top scores.

    scores: [d_ff]. The neurons stay in order, and a wider set contains a narrower one (of equal
    scores, the first go in).
    """
    ffn = f"layer.{len(block.layer) - 1}.DenseReluDense"  # behind one or two attentions
    if len(scores) != block.get_submodule(ffn).wo.weight.shape[1]:
        raise ValueError("the scores are of a model with another d_ff")
    ranking = scores.argsort(descending=True, stable=True).to(next(block.parameters()).device)
    keep = ranking[:share_of(len(scores), width)].sort().values  # [k]
    for name, linear in block.get_submodule(ffn).named_children():
        if isinstance(linear, nn.Linear):  # rows of wi or wi_0, wi_1: [k, d]; columns of wo: [d, k]
            weight = linear.weight.data.index_select(1 if name == "wo" else 0, keep)
            # T5 has no biases. "meta": nothing is allocated for weights that are replaced at once.
            small = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            small.weight = nn.Parameter(weight, requires_grad=False)
            block = replaced(block, f"{ffn}.{name}", small)
    return block


def check_t5(config) -> None:
    """Raise ValueError unless a model with this config is laid out as the code here relies on.

    umt5 looks alike and is refused: every layer of it has a position bias of its own, and
    transformers 5 scales its logits against its checkpoints.
    """
    if config.model_type not in ("t5", "mt5"):
        raise ValueError(f"a model of type {config.model_type}: FPT here is for T5, mT5 and ByT5")


def partial_t5(model, depth: float, width: float, scores=None, decoder: bool = True):
    """A T5 with a share `depth` of the layers and a share `width` of the FFN neurons of `model`.

    Of the same class (forward, loss, cache, `generate`), it shares every kept tensor with `model`;
    only narrowed FFN matrices are new memory. Nothing makes up for what is missing: a dropped layer
    passes the residual stream on. They may run in turn; move, cast or save only `model`.

    Args:
        depth, width: in (0, 1]; numbers of layers and neurons round half up, to at least one.
        scores: of `neuron_scores`, needed if width < 1; each layer keeps its top neurons.
        decoder: False leaves it whole, as the paper does where targets are short labels.
    Raises ValueError for a share outside (0, 1], missing scores, those of another d_ff, or a
    `model` that is not a T5.
    """
    check_t5(model.config)
    if not (0 < depth <= 1 and 0 < width <= 1) or (width < 1 and scores is None):
        raise ValueError(f"depth {depth}, width {width}: must be in (0, 1]; width < 1 needs scores")
    partial = model
    for side in ("encoder", "decoder") if decoder else ("encoder",):
        blocks = getattr(model, side).block
        kept = kept_layers(len(blocks), share_of(len(blocks), depth))
        layers = [blocks[i] if width == 1 else narrowed(blocks[i], scores[side][i], width)
                  for i in kept]
        partial = replaced(partial, f"{side}.block", nn.ModuleList(layers))
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
    "fast": (Stage(0.25, 0.25, 0.4), Stage(0.5, 0.5, 0.4), Stage(1.0, 1.0, 0.2))}


def parse_schedule(text: str) -> tuple[Stage, ...]:
    """A preset's name, or stages: "0.5x0.25:0.3,1x1:0.7" is depth x width : share of the updates.

    A single partial stage ("0.25x1:1") is a row of the paper's Table 1. Raises ValueError if a part
    cannot be read, a number is outside (0, 1], or the shares do not add up to 1.
    """
    if text in SCHEDULES:
        return SCHEDULES[text]
    try:
        stages = tuple(Stage(*map(float, re.split("[x:]", part))) for part in text.split(","))
    except (TypeError, ValueError):
        stages = ()
    inside = all(0 < number <= 1 for stage in stages for number in stage)
    if not inside or abs(sum(stage.share for stage in stages) - 1) > 1e-6:
        raise ValueError(f"schedule {text!r} is none of {', '.join(SCHEDULES)}, nor stages like "
                         "0.5x0.25:0.3,1x1:0.7: depth x width : share, all shares adding up to 1")
    return stages


def stage_at(schedule, step: int, steps: int) -> int:
    """Index of the stage that update `step` (1 to steps) runs in.

    Growth follows the boundary update, as in the official code: of 30,000, update 6,000 is the last
    of stage 0. Boundaries round half up, so a run of few updates may skip a stage.
    Official: resumed behind its last growth, a run falls back to the smallest model.
    """
    # 1e-6: shares add up to 0.6000000000000001, or a little less.
    shares = itertools.accumulate(stage.share for stage in schedule[:-1])
    return sum(step > math.floor(share * steps + 0.5 + 1e-6) for share in shares)


# ====== 3 Cost ====================================================================================


def step_flops(model, batch: int, source: int, target: int, backward: bool = True) -> int:
    """Exact matmul FLOPs (2 per multiply-add) of one prompt-tuning update of this (partial) model.

    `source` is P+T and `target` is S, both padded. The backward pass goes to the prompt *through
    frozen weights*: a linear layer costs its forward once more (dX, no dW), the two products of
    attention cost theirs twice. An update is 2.0 to 2.1 forwards, by length; the usual factor 3 of
    training overstates prompt tuning by 43 to 50 %. With backward=False: the forward pass alone.
    Equal to torch.utils.flop_counter.FlopCounterMode under eager attention, also for `absorbed`
    models and with transformers' checkpointing (which works in train mode).
    Official: the linear layers of a forward pass at 512 tokens, no attention products.
    """
    def linear(positions, *modules):
        layers = (layer for module in modules for layer in module.modules())
        weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
        return 2 * batch * positions * weights

    costs = [(linear(target, model.lm_head), 1)]  # forward, and how many times that in backward
    for block in model.encoder.block:
        scores = 2 * batch * source * source * block.layer[0].SelfAttention.inner_dim  # Q K^T; A V
        costs += [(linear(source, block), 1), (2 * scores, 2)]
    for index, block in enumerate(model.decoder.block):
        met = int(index > 0)  # before its first cross-attention the decoder has not met the prompt
        own, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
        scores = 2 * batch * target * target * own.inner_dim
        costs += [(linear(target, own), met), (2 * scores, 2 * met)]
        if target <= getattr(cross, "longest", 0):  # an `AbsorbedAttention` (the last section)
            cross = cross.attention
            scores = 2 * batch * target * source * cross.n_heads * cross.d_model
            costs += [(linear(target, cross.q, cross.k), met), (linear(target, cross.v), 1)]
        else:  # keys and values of the whole source in every layer: what a whole decoder costs
            cross = getattr(cross, "attention", cross)
            scores = 2 * batch * target * source * cross.inner_dim
            costs += [(linear(target, cross.q), met), (linear(source, cross.k, cross.v), 1)]
        # Q K^T: always dK, and dQ if the queries depend on the prompt. A V: dA and dV.
        costs += [(scores, 1 + met), (scores, 2), (linear(target, cross.o, block.layer[2]), 1)]
    forward = sum(cost for cost, _ in costs)
    total = forward + sum(cost * times for cost, times in costs) * backward
    if backward and model.training and model.encoder.block[0].gradient_checkpointing:
        total += forward - costs[0][0]  # layers run again, up to `wo`: nobody needs its output
        for stack, positions in (model.encoder, source), (model.decoder, target):
            total -= linear(positions, *(row.layer[-1].DenseReluDense.wo for row in stack.block))
    return total


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


def token_losses(model, mask: Tensor, labels: Tensor, **source) -> Tensor:
    """Negative log-likelihood [B, S], fp32, of the target tokens; 0 where labels [B, S] are -100.

    `source` is inputs_embeds [B, P+T, d], or encoder_outputs; `mask` [B, P+T] is theirs. The loss
    that transformers computes in a bf16 model is itself rounded to three digits.
    """
    target = model.prepare_decoder_input_ids_from_labels(labels)  # [B, S], shifted to the right
    logits = model(attention_mask=mask, decoder_input_ids=target, use_cache=False, **source).logits
    flat = logits.flatten(0, 1).float()  # [B*S, V]
    return nn.functional.cross_entropy(flat, labels.flatten(), reduction="none").view_as(labels)


def init_prompt(how: str, length: int, embeddings: Tensor, generator, first_ids=(), common=5000):
    """An initial prompt [P, d] from the embedding matrix [V, d].

    uniform: U(-1/sqrt(d), 1/sqrt(d)), the paper's. vocab: rows of `length` different tokens, drawn
    from the `common` most frequent (T5's vocabulary is sorted so; 0-2 are pad, eos, unk), or all if
    there are fewer. labels: the rows of `first_ids`, then as vocab (Lester et al. 2021). Else `how`
    is the folder of a saved prompt; ValueError if that is of another length or width.
    `generator` (CPU) is the prompt's own, so every schedule of a seed starts from the same prompt.
    Official: the partial model draws random numbers before the prompt does, so starts differ.
    """
    if how == "uniform":
        bound = embeddings.shape[1] ** -0.5
        return torch.empty(length, embeddings.shape[1]).uniform_(-bound, bound, generator=generator)
    if how in ("vocab", "labels"):
        drawn = torch.randperm(min(common, len(embeddings)) - 3, generator=generator) + 3
        ids = dict.fromkeys([*(first_ids if how == "labels" else ()), *drawn.tolist()])
        return embeddings[list(ids)[:length]].detach().float().cpu()
    prompt = load_prompt(how)
    if prompt.shape != (length, embeddings.shape[1]):
        raise ValueError(f"the prompt in {how} has another length (--prompt-length) or width")
    return prompt


def save_prompt(folder, prompt: Tensor, model_name: str) -> None:
    """Write a prompt [P, d] as PEFT's prompt tuning; `PeftModel.from_pretrained` loads it."""
    from safetensors.torch import save_file

    # Without task_type PEFT loads the folder and ignores the prompt. Its default number of
    # submodules for a T5, 2, wants another [P, d], for the decoder, which no forward pass uses.
    adapter = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "inference_mode": True,
               "num_transformer_submodules": 1, "base_model_name_or_path": model_name,
               "num_virtual_tokens": len(prompt), "token_dim": prompt.shape[1]}
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensor = prompt.detach().float().cpu().contiguous()
    save_file({"prompt_embeddings": tensor}, Path(folder, "adapter_model.safetensors"))
    Path(folder, "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")


def load_prompt(folder) -> Tensor:
    """The prompt [P, d] of a PEFT prompt-tuning folder, ours or PEFT's own: fp32, on the CPU.

    Raises OSError or ValueError if the folder holds none, or one with NaN or infinite values.
    """
    from safetensors.torch import load_file

    adapter = json.loads(Path(folder, "adapter_config.json").read_text("utf-8"))
    if [*Path(folder).glob("adapter_model.*")] == [Path(folder, "adapter_model.bin")]:
        raise ValueError(f"{folder} has PEFT's old adapter_model.bin, a pickle: save it anew there")
    prompt = load_file(Path(folder, "adapter_model.safetensors")).get("prompt_embeddings")
    if prompt is None or not prompt.isfinite().all():
        raise ValueError(f"{folder} holds no soft prompt, or one with NaN or infinite values")
    return prompt[:adapter["num_virtual_tokens"]].float()  # no T5 ever sees PEFT's further rows


# ====== 5 Train ===================================================================================


def adafactor(prompt: SoftPrompt, lr: float):
    """The paper's optimiser: a step has RMS `lr` at most, whatever the scale of the gradients.

    torch.optim.Adafactor cannot express it: it scales by the parameter's RMS and decays the rate.
    """
    from transformers.optimization import Adafactor

    return Adafactor([prompt.weight], lr=lr, scale_parameter=False, relative_step=False,
                     warmup_init=False, weight_decay=1e-5)


def gradient(model, prompt: SoftPrompt, batch: dict[str, Tensor], parts: int = 1) -> Tensor:
    """Forward and backward of one batch: leaves the gradient in `prompt`, returns the loss.

    The loss is the mean over the target tokens of the whole batch. So what each process makes of
    its rows, cut into `parts` to need less memory, adds up to what one computes in one part.
    Official: the mean of the means of micro-batches.
    """
    tokens, loss = (batch["labels"] != -100).sum().item(), torch.zeros((), device=model.device)
    world, rank = PartialState().num_processes, PartialState().process_index  # alone: 1 and 0
    for i in range(rank, world * parts, world):
        part = {name: rows[i::world * parts].to(model.device) for name, rows in batch.items()}
        # [b, T, d] -> [b, P+T, d] and [b, P+T], b: rows of this part
        embeds, mask = prompt(model.shared(part["input_ids"]), part["attention_mask"])
        part_loss = token_losses(model, mask, part["labels"], inputs_embeds=embeds).sum() / tokens
        part_loss.backward()
        loss += part_loss.detach()
    prompt.weight.grad = utils.reduce(prompt.weight.grad, "sum")  # over processes; t5-base: 60 kB
    return utils.reduce(loss, "sum")


def main_score(scores: dict[str, float]) -> float:
    """The first of some scores: the one that chooses the prompt."""
    return next(iter(scores.values()))


def padded_shape(prompt: Tensor, batch: dict[str, Tensor]) -> tuple[int, int, int]:
    """B, P+T and S of a batch behind a prompt [P, d], for `step_flops`."""
    return len(batch["labels"]), len(prompt) + batch["input_ids"].shape[1], batch["labels"].shape[1]


def new_run(flops: int = 0) -> dict:
    """How far a run has come: with prompt and optimiser's state, all that it goes on from.

    step: updates made; full_steps: of these on the full model. flops: what they cost, and what
    (the argument) scoring the neurons did; pt_flops: what plain prompt tuning pays for the same
    batches. seconds: of the updates. losses: since the last evaluation, which empties it. log: a
    row for each evaluation; its stages count from 1. best: (dev scores, update, prompt [P, d]) of
    the highest score, the later of equals.
    """
    return {"step": 0, "full_steps": 0, "flops": flops, "pt_flops": 0, "seconds": 0.0, "losses": [],
            "log": [], "best": ()}


def train(model, prompt, optimizer, schedule, batch_at, evaluate, run, steps, eval_every,
          scores=None, decoder=True, parts=1):
    """FPT: one prompt, one optimiser, a model that grows. Yields `run` after each update.

    model: the full one, `.eval().requires_grad_(False)`. schedule: SCHEDULES["cr"], or another
    list of stages. run: a `new_run()`, or a saved one to go on from. batch_at(step): a batch as
    `neuron_scores` takes them. evaluate(model, prompt): a dict of dev scores, without gradients;
    the first counts, higher is better. scores, decoder: for `partial_t5`. Trains `prompt` in
    place; run["best"] has the one to keep. FloatingPointError if a number is not finite.
    """
    final, stage = partial_t5(model, *schedule[-1][:2], scores, decoder), None
    for step in range(run["step"] + 1, steps + 1):
        start = time.perf_counter()
        # 1. Stage. Growth: a larger model; the prompt and the optimiser's state go on as they are.
        if stage_at(schedule, step, steps) != stage:
            stage, partial = stage_at(schedule, step, steps), None  # frees the old one's own FFNs
            partial = partial_t5(model, *schedule[stage][:2], scores, decoder)
        # 2. Batch. Like the initial prompt, the same for every schedule of a seed.
        batch = batch_at(step)  # input_ids [B, T], attention_mask [B, T], labels [B, S]
        # 3. Forward through the frozen partial model, and back through it to the prompt.
        loss = gradient(partial, prompt, batch, parts)
        # 4. Update. The clipping is the paper's. One NaN would spread to the whole prompt: stop.
        norm = nn.utils.clip_grad_norm_([prompt.weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not torch.stack([loss, norm, prompt.weight.detach().abs().max()]).isfinite().all():
            raise FloatingPointError(f"update {step}: loss, gradient or prompt is not finite")
        # 5. Ledger. What this update cost, and what plain prompt tuning pays for the batch.
        run["flops"] += step_flops(partial, *padded_shape(prompt.weight, batch))
        run["pt_flops"] += step_flops(model, *padded_shape(prompt.weight, batch))
        run["losses"].append(loss.item())
        run["seconds"] += time.perf_counter() - start
        run["full_steps"] += schedule[stage][:2] == (1, 1)
        run["step"] = step
        # 6. Evaluation, on the final model, whatever trains. Official: on that of the moment.
        if step % eval_every == 0 or step == steps:
            dev, loss = evaluate(final, prompt), sum(run["losses"]) / len(run["losses"])
            if not run["best"] or main_score(dev) >= main_score(run["best"][0]):
                run["best"] = dev, step, prompt.weight.detach().clone()
            run["log"].append({key: run[key] for key in ("step", "flops", "pt_flops")} | {
                "stage": stage + 1, "loss": loss, "dev": dev, "best": main_score(run["best"][0])})
            run["losses"] = []
        yield run


# ====== 6 Tasks and data ==========================================================================


class Task(NamedTuple):
    """A task as data. Without `labels` it is free text: `generate` answers, and the decoder shrinks
    too. For labels it stays whole, as in the paper.
    """

    columns: str = ""  # of a hub data set; the source is "column: text column: text"; XSum: bare
    labels: tuple[str, ...] = ()  # verbalizer: the text of label 0, 1, ... in the data set's order
    hub: str = ""  # repository; the name of the task is the configuration
    metric: str = "accuracy"  # a name in METRICS
    max_target: int = 64  # tokens of free text kept, and generated at most; labels stay whole
    prefix: str = "<extra_id_0>"  # how span-corruption targets begin; the official code keeps it


GLUE, SUPER = "nyu-mll/glue", "aps/super_glue"  # full names: datasets 5 refuses the short ones
TASKS = {
    "mnli": Task("hypothesis premise", ("entailment", "neutral", "contradiction"), GLUE),
    "qqp": Task("question1 question2", ("not_duplicate", "is_duplicate"), GLUE, "binary_f1"),
    "squad2": Task("question context", (), "rajpurkar/squad_v2", "squad"),
    "record": Task("query entities passage", (), SUPER, "squad"),
    "xsum": Task("document", (), "EdinburghNLP/xsum", "rouge_l", max_target=128),
    # The paper's end here. t5-base and the other v1.0 models saw these (and most of the five) in
    # their own pre-training: their scores show that a run works, not what a prompt can learn.
    "rte": Task("sentence1 sentence2", ("entailment", "not_entailment"), GLUE),
    "sst2": Task("sentence", ("negative", "positive"), GLUE),
    "mrpc": Task("sentence1 sentence2", ("not_equivalent", "equivalent"), GLUE, "binary_f1"),
    "boolq": Task("question passage", ("False", "True"), SUPER),
    "cb": Task("hypothesis premise", ("entailment", "contradiction", "neutral"), SUPER, "macro_f1"),
    "copa": Task("choice1 choice2 premise question", ("choice1", "choice2"), SUPER),
    "wic": Task("word sentence1 sentence2", ("False", "True"), SUPER)}


def load_data(name: str, dev: int, limit: int = 0):
    """The task `name`, of the table or a folder -> `Task`, train, dev and validation examples.

    An example is a source and the texts that count as right; the first of these is learned.
    `dev` of them are carved from train by their sources, the same every time. `limit` > 0 keeps as
    many of validation, drawn at random: a file may be sorted. ValueError for what cannot be used.
    Official: chooses the prompt, and the neurons, on the validation split that it reports.
    """
    if name not in TASKS and not os.path.isdir(name):
        raise ValueError(f"unknown task {name!r}: use a folder, or {', '.join(TASKS)}")
    task, train, validation = load_hub(name) if name in TASKS else load_folder(Path(name))
    mixed = functools.partial(sorted, key=lambda row: zlib.crc32(row[0].encode()))  # any order
    sources = dict(mixed(train))  # ReCoRD repeats some
    held = dict(itertools.islice(sources.items(), max(1, min(dev, len(sources) // 5))))
    train = [(source, answers) for source, answers in train if source not in held]
    return task, train, [*held.items()], mixed(validation)[:limit] if limit else validation


def load_hub(name: str):
    """-> task, train and validation examples, downloaded or cached by the `datasets` library."""
    import datasets

    task, config = TASKS[name], name if "glue" in TASKS[name].hub else None
    try:
        data = datasets.load_dataset(task.hub, config)
    except RuntimeError:  # xsum may be a loading script there: refused, but not this branch
        data = datasets.load_dataset(task.hub, config, revision="refs/convert/parquet")
    train = [example for row in data["train"] for example in hub_examples(task, row)]
    validation = data["validation_matched" if name == "mnli" else "validation"]
    return task, train, [hub_examples(task, row)[0] for row in validation]


def hub_examples(task: Task, row: dict) -> list[tuple[str, tuple[str, ...]]]:
    """A row of a hub data set -> an example for each text that may be learned from it.

    More than one for ReCoRD alone: the official code trains on every distinct answer of a query.
    """
    texts = {name: row[name] for name in task.columns.split()}
    if task.labels:
        answers = [dict(enumerate(task.labels))[row["label"]]]  # KeyError for -1: unlabelled
    elif "summary" in row:
        return [(row["document"], (row["summary"],))]
    elif "entities" in row:
        answers, texts["entities"] = row["answers"], ", ".join(row["entities"])
        stops = re.sub(r"(?<![.?!\"'])(?=\n@highlight\n|\Z)", ".", row["passage"])  # bullet points
        texts["passage"] = stops.replace("\n@highlight\n", " ")
    else:
        answers = row["answers"]["text"] or ["no answer"]  # SQuAD 2.0
    source = " ".join(f"{name}: {text}" for name, text in texts.items())
    learned = dict.fromkeys(answers if "entities" in row else answers[:1])
    return [(source, tuple(dict.fromkeys([text, *answers]))) for text in learned]


def load_folder(folder: Path):
    """-> task, train and validation examples of a folder; ValueError names the file and the line.

    task.json may set `labels`, `metric`, `prefix` (none by default) and `max_target`. Lines of
    train.jsonl and validation.jsonl are {"source": text, "target": text}; for free text a target
    may be a list: the first is learned, any is right.
    """
    clean = functools.partial(unicodedata.normalize, "NFC")  # é in one way; TypeError for a number
    place = folder / "task.json"
    splits = {folder / f"{name}.jsonl": [] for name in ("train", "validation")}
    try:
        found = json.loads(place.read_text("utf-8-sig"))  # -sig: Excel and Notepad mark the start
        task = Task(**{"prefix": "", **found, "labels": tuple(map(clean, found.get("labels", ())))})
        if task.metric not in METRICS or (task.metric == "binary_f1" and len(task.labels) != 2):
            raise ValueError(f"metric is one of {', '.join(METRICS)}; binary_f1 needs two labels")
        for path, examples in splits.items():
            place = path
            for number, line in enumerate(path.read_text("utf-8-sig").strip().split("\n"), 1):
                place = f"{path}, line {number}, {line[:80]!r}"
                row = json.loads(line)
                answers = row["target"] if isinstance(row["target"], list) else [row["target"]]
                source, *answers = map(clean, (row["source"], *answers))
                if not answers or not all(text.strip() for text in (source, *answers)):
                    raise ValueError("source or target is empty")
                if task.labels and (*answers,) not in zip(task.labels):
                    raise ValueError(f"target {answers} is not one of the labels {task.labels}")
                examples.append((source, tuple(answers)))
    except (ValueError, TypeError, LookupError, AttributeError) as why:
        raise ValueError(f"{place}: {type(why).__name__}: {why}; one JSON object a line") from None
    return task, *splits.values()


def load_model(name: str, device, precision: str):
    """-> the model, frozen and in eval mode, and its tokenizer, by transformers' own code."""
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # a thread would ask a bot
    import transformers

    transformers.logging.set_verbosity_error()  # its warning on untied T5 heads advises wrongly
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(  # no dropout, as in the paper
        name, trust_remote_code=False, dropout_rate=0.0, return_dict=True)
    check_t5(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        name, config=config, output_loading_info=True, ignore_mismatched_sizes=True,  # see below
        # On a CPU in bf16 torch's sdpa is the slower one; for long sources it needs less memory.
        attn_implementation="eager" if (str(device), precision) == ("cpu", "bf16") else "sdpa",
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32)  # the default: the file's
    fits = config.vocab_size / 2 < len(tokenizer) <= config.vocab_size
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *(() if fits else ["tokenizer"])]
    if wrong:  # transformers draws such weights at random, and makes up a tokenizer that is absent
        raise ValueError(f"config, weights and tokenizer of {name} do not fit: see {wrong[0]}")
    if config.is_gated_act and model.lm_head.weight.equal(model.shared.weight):
        raise ValueError(f"the head of {name} is its embeddings: a resize overwrote it; reload it")
    ids = {key: value for key, value in vars(config).items() if key.endswith("_token_id")}
    model.generation_config = transformers.GenerationConfig(**ids)  # greedy, whatever its file says
    return model.to(device).eval().requires_grad_(False), tokenizer


def label_ids(tokenizer, task: Task) -> list[list[int]]:
    """Token ids of each label's target, end of sequence included; ValueError if two are alike."""
    ids = [tokenizer(task.prefix + label).input_ids for label in task.labels]
    if any(ids.count(row) > 1 for row in ids):
        raise ValueError(f"two of {task.labels} are the same tokens for this model: reword them")
    return ids


def encode(tokenizer, task: Task, max_source: int, examples) -> list[tuple[list, list]]:
    """Examples -> (source, target) as token ids with their end of sequence, cut to the maxima.

    Labels are never cut, or two of them might become one.
    """
    sources = tokenizer([source for source, _ in examples], truncation=True, max_length=max_source)
    targets = tokenizer([task.prefix + answers[0] for _, answers in examples],
                        truncation=not task.labels, max_length=task.max_target)
    return list(zip(sources.input_ids, targets.input_ids))


def collate(rows) -> dict[str, Tensor]:
    """(source, target) ids -> input_ids and attention_mask [B, T], labels [B, S], padded to the
    longest. Official: pads every source to 492 tokens, whatever its length.
    """
    sources, targets = ([torch.tensor(ids) for ids in side] for side in zip(*rows))
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)  # with 0, T5's <pad>
    return {"input_ids": pad(sources), "labels": pad(targets, padding_value=-100),  # no loss there
            "attention_mask": pad([torch.ones_like(source) for source in sources])}


def rng(*key):
    """A CPU generator that depends on `key` alone, so that no draw can shift another one."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def batches(examples, encode, seed: int, size: int, pool: int = 200):
    """-> a function: number of an update, from 1 -> its batch. Pure in (seed, update).

    Each pass over the examples is shuffled and cut into pools of `pool` batches; a pool is sorted
    by length and cut into batches, which come in random order: little padding, and no example twice
    in a pass. What does not fill a batch at its end is left out. `encode` turns a pool into ids.
    Labels that go with length are uneven within batches; shuffled ones (pool=1) cost more padding.
    """
    per_pass = len(examples) // size

    @functools.lru_cache(maxsize=1)
    def drawn(number, first):  # of a pass, the pool that begins with its batch `first`
        order = torch.randperm(len(examples), generator=rng(seed, "pass", number))
        chosen = order[first * size:min(first + pool, per_pass) * size]
        rows = sorted(encode([examples[i] for i in chosen]), key=lambda row: len(row[0]))
        mixed = torch.randperm(len(rows) // size, generator=rng(seed, "pool", number, first))
        return [rows[k * size:(k + 1) * size] for k in mixed]

    def batch_at(step):
        number, place = divmod(step - 1, per_pass)
        return collate(drawn(number, place - place % pool)[place % pool])
    return batch_at


def remark(task: Task, train, dev, validation, tokenizer, max_source: int) -> None:
    """Say, before the first update, what makes the scores mean less than they seem to."""
    rows = [(*row, tokenizer(row[0]).input_ids, tokenizer(task.prefix + row[1][0]).input_ids)
            for row in (*train[::len(train) // 1000 + 1], *dev, *validation)]
    long, unknown = math.inf if task.labels else task.max_target, tokenizer.unk_token_id
    compared = {"squad": squad_text, "rouge_l": rouge_text}.get(task.metric, str.strip)
    known, first = {*dict(train), *dict(dev)}, {"": ""}  # the first answer that is compared as this
    pairs = [(word, first.setdefault(compared(word), word)) for row in rows for word in row[1]]
    for what, found in {
            "are cut": [row for row in rows if len(row[2]) > max_source or len(row[3]) > long],
            "have unknown tokens, or a target that the tokenizer changes": [row for row in rows if (
                unknown in row[2] + row[3] or row[1][0].strip() not in tokenizer.decode(row[3]))],
            f"answers are empty, or the same as another, to the metric {task.metric}": [
                pair for pair in pairs if pair[0] != pair[1]],
            "validation sources are in train": [row for row in validation if row[0] in known],
            "labels are not in train": [*{*task.labels} - {row[1][0] for row in train}]}.items():
        if found:
            print(f"warning: {len(found)} {what} ({len(rows)} examples seen): {str(found[0])[:99]}")


# ====== 7 Evaluate ================================================================================


def accuracy(predictions, examples, labels) -> dict[str, float]:
    """Percent of texts that are a right answer, but for white space around."""
    right = [text.strip() in map(str.strip, row[1]) for text, row in zip(predictions, examples)]
    return {"accuracy": 100 * sum(right) / len(right)}


def f1(average: str, predictions, examples, labels) -> dict[str, float]:
    """Accuracy, and F1 in percent: "binary", of the second label (GLUE's for QQP), or "macro"."""
    from sklearn.metrics import f1_score

    label = {"pos_label": labels[1]} if average == "binary" else {}
    gold = [answers[0] for _, answers in examples]
    score = 100 * f1_score(gold, predictions, average=average, zero_division=0, **label)
    return accuracy(predictions, examples, labels) | {" of ".join(["f1", *label.values()]): score}


def squad_text(text: str) -> str:
    """What SQuAD's script compares: the words, without case, ASCII punctuation and articles."""
    bare = re.sub(r"[!-/:-@[-`{-~]", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def squad(predictions, examples, labels) -> dict[str, float]:
    """SQuAD 2.0's exact match and token F1, best of the right answers, in percent.

    As in its script: "no answer" is no words, and right answers without a word do not count.
    Official: raw equality of texts; its F1 is that of answerability.
    """
    from torchmetrics.functional.text import squad as score

    def texts(answers):
        return [text for text in map(squad_text, answers) if text not in ("", "no answer")] or [""]

    found = [{"prediction_text": texts([text])[0], "id": i} for i, text in enumerate(predictions)]
    gold = [{"answers": {"text": texts(row[1])}, "id": i} for i, row in enumerate(examples)]
    return {key: float(value) for key, value in score(found, gold).items()}


def rouge_text(text: str) -> str:
    """What ROUGE compares: words of letters, marks, numbers of any script. As in the rouge-score
    package, accented Latin letters are blanks: not for French or German. Chinese is one word.
    """
    kept = (char if unicodedata.category(char)[0] in "LMN" else " " for char in text.lower())
    return " ".join(re.sub("[\u00aa-\u024f]", " ", "".join(kept)).split())


def rouge_l(predictions, examples, labels) -> dict[str, float]:
    """ROUGE-L F-measure, without stemming, best of the right answers, in percent.

    Official: the summary-level variant, sentence by sentence.
    """
    from torchmetrics.functional.text import rouge_score

    gold = [list(answers) for _, answers in examples]
    scores = rouge_score(predictions, gold, "best", rouge_keys="rougeL", normalizer=rouge_text)
    return {"rouge_l": 100 * float(scores["rougeL_fmeasure"])}


METRICS = {"accuracy": accuracy, "binary_f1": functools.partial(f1, "binary"), "squad": squad,
           "macro_f1": functools.partial(f1, "macro"), "rouge_l": rouge_l}


@torch.no_grad()
def evaluate(model, prompt: SoftPrompt, tokenizer, task: Task, examples, config):
    """-> scores in percent, the first of them the one that counts, and the predicted texts.

    Labels by rank classification: the label whose text is likeliest (a sum over its tokens). Free
    text by greedy decoding. Under torchrun each process predicts a part.
    Official: decodes labels as well, and compares texts; what counts is the mean of all metrics.
    """
    labels, rows = label_ids(tokenizer, task), encode(tokenizer, task, config.max_source, examples)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # little padding
    chunks, found = [order[i:i + config.batch] for i in range(0, len(order), config.batch)], []
    for chosen in chunks[PartialState().process_index::PartialState().num_processes]:
        batch = collate([rows[i] for i in chosen])
        embeds = model.shared(batch["input_ids"].to(model.device))  # [B, T, d]
        embeds, mask = prompt(embeds, batch["attention_mask"].to(model.device))  # [B, P+T, d]
        if task.labels:  # one at a time: the logits of C labels at once are C times [B, S, V]
            source = model.encoder(inputs_embeds=embeds, attention_mask=mask)  # [B, P+T, d], once
            losses = [token_losses(model, mask, mask.new_tensor([ids] * len(chosen)),
                                   encoder_outputs=source).sum(1) for ids in labels]  # C of [B]
            texts = [task.labels[i] for i in torch.stack(losses).argmin(0).tolist()]
        else:
            ids = model.generate(inputs_embeds=embeds, attention_mask=mask,
                                 max_new_tokens=task.max_target)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts = [text.strip().removeprefix(task.prefix.strip()).strip() for text in texts]
        found += zip(chosen, texts)
    predictions = [text for _, text in sorted(utils.gather_object(found))]
    return METRICS[task.metric](predictions, examples, task.labels), predictions


# ====== 8 Record and compare ======================================================================

SIGNALS = []  # Ctrl-C or SIGTERM, as they came


def note(number, _) -> None:
    """Handle a signal: `tune` looks for it after each update. The second one ends at once."""
    SIGNALS.append(number)
    signal.signal(number, signal.default_int_handler)


def write(path: Path, rows) -> None:
    """JSON, a line a row; the whole file or nothing: a reader sees the old content or the new."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(draft, path)


def tune(model, tokenizer, data, config, name: str, seed: int, start: Tensor, folder: Path):
    """Train one schedule on one seed, from the prompt `start` [P, d] or the state in the folder.

    -> how it ended (`new_run`), validation scores of the best prompt, predictions. The state is
    written at each evaluation, and at the update at which a signal has come to any process; that
    raises KeyboardInterrupt.
    """
    from tqdm import tqdm

    (task, examples, dev, validation), schedule, scores = data, parse_schedule(name), None
    ids, run = functools.partial(encode, tokenizer, task, config.max_source), new_run()
    if any(stage.width < 1 for stage in schedule):
        drawn = batches(examples, ids, f"scores {seed}", config.batch, pool=1)  # 1: of all lengths
        parts = [drawn(i + 1) for i in range(math.ceil(64 / config.batch))]
        run = new_run(sum(step_flops(model, *padded_shape(start, part), False) for part in parts))
        scores = utils.broadcast(neuron_scores(model, start, parts))  # ties are broken alike
    prompt = SoftPrompt(start).to(model.device)
    optimizer = adafactor(prompt, config.lr)
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", model.device, weights_only=True)
        run, prompt.weight.data = state["run"], state["prompt"]
        optimizer.load_state_dict(state["optimizer"])
    loop = train(
        model, prompt, optimizer, schedule, batches(examples, ids, seed, config.batch),
        lambda final, prompt: evaluate(final, prompt, tokenizer, task, dev, config)[0],
        run, config.steps, config.eval_every, scores, not task.labels, config.accumulate)
    for run in tqdm(loop, total=config.steps, initial=run["step"], file=sys.stdout, disable=None):
        stop = utils.reduce(torch.tensor(len(SIGNALS), device=model.device), "sum").item()
        if not run["losses"]:  # there was an evaluation
            tqdm.write("update {step} stage {stage} loss {loss:.4f} {dev}".format(**run["log"][-1]))
        if (stop or not run["losses"]) and PartialState().is_main_process:
            write(folder / "log.jsonl", run["log"])  # before the state, that it cannot lack a row
            state = {"run": run, "prompt": prompt.weight.data, "optimizer": optimizer.state_dict()}
            torch.save(state, folder / "state.tmp")
            os.replace(folder / "state.tmp", folder / "state.pt")
        if stop:
            raise KeyboardInterrupt
    final = partial_t5(model, *schedule[-1][:2], scores, not task.labels)
    found = evaluate(final, SoftPrompt(run["best"][2]), tokenizer, task, validation, config)
    return {"schedule": name, "seed": seed, **run}, *found


def conclude(run, scores, texts, task: Task, validation, config, folder: Path) -> dict:
    """Print and keep what `tune` returned, and say what makes it mean less than it seems to."""
    dev, best_step, best = run.pop("best")
    common = statistics.mode(answers[0] for _, answers in validation)
    usual = main_score(METRICS[task.metric]([common] * len(texts), validation, task.labels))
    print(f"validation {scores}, with the prompt of update {best_step}; always the most frequent "
          f"answer: {usual:.2f}. Training FLOPs: {run['flops'] / run['pt_flops']:.3f} of pt")
    if len(set(texts)) == 1 and main_score(scores) <= usual < 100:
        print("warning: every prediction is the same text; nothing has been learned")
    run |= {"dev": dev, "best_step": best_step, "validation": scores}
    if PartialState().is_main_process:
        save_prompt(folder / "prompt", best, config.model)
        write(folder / "predictions.jsonl", ((*row, text) for row, text in zip(validation, texts)))
        write(folder / "results.json", [run])
        (folder / "state.pt").unlink()
    return run


def compare(runs: list[dict]):
    """A row for each run, a pandas DataFrame: scores, and costs beside those of `pt`, in percent.

    dev, validation: scores of the chosen prompt. flops, seconds: of training, over those of the
    `pt` of its seed. pt, same flops: what that `pt` has where this run's FLOPs end, or at the
    evaluation just behind; gain: dev less that, the paper's column "Improve". full alone: what `pt`
    has after as many updates as this run makes on the full model. to 99 %: FLOPs until the best dev
    score is 99 % of what `pt` ends with, over those of `pt`. NaN where there is no such thing.
    """
    import pandas

    def at(run, wanted, key, least):  # the first evaluation at which `key` is that much
        return next((row[wanted] for row in run["log"] if row[key] >= least), math.nan)

    rows, plain = [], {run["seed"]: run for run in runs if run["schedule"] == "pt"}
    for run in runs:
        rows.append({key: main_score(run[key]) for key in ("dev", "validation")})
        if run["seed"] in plain:
            pt, row = plain[run["seed"]], rows[-1]
            row |= {key: 100 * run[key] / pt[key] for key in ("flops", "seconds")}
            row["pt, same flops"] = at(pt, "best", "flops", run["flops"])
            row["gain"] = row["dev"] - row["pt, same flops"]
            row["full alone"] = at(pt, "best", "step", run["full_steps"] or math.inf)
            own, its = (at(one, "flops", "best", 0.99 * pt["log"][-1]["best"]) for one in (run, pt))
            row["to 99 %"] = 100 * own / its
    return pandas.DataFrame(rows, index=[run["schedule"] for run in runs])


def table(runs: list[dict]) -> str:
    """`compare` as text: mean ± standard deviation over seeds, NaN if it is that for one of them;
    from three seeds on the 95 % interval of the gain (Student's t).
    """
    from scipy import stats

    groups = compare(runs).groupby(level=0, sort=False)
    cells = groups.agg(lambda row: f"{row.mean(skipna=False):.1f} ± {row.std(skipna=False):.1f}")
    for name, gain in groups["gain"] if "gain" in cells else ():
        if len(gain) > 2 and gain.notna().all() and name != "pt":
            bounds = stats.t.interval(0.95, len(gain) - 1, gain.mean(), stats.sem(gain))
            cells.loc[name, "gain"] += " [{:.1f}, {:.1f}]".format(*bounds)
    return cells.to_string().replace(" ± nan", "      ")


def figure(runs: list[dict]):
    """Best dev score so far against training FLOPs, means over seeds, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    plot = Figure(layout="constrained")
    axes = plot.subplots(subplot_kw={"xlabel": "training FLOPs", "ylabel": "best dev score so far"})
    names = dict.fromkeys(run["schedule"] for run in runs)
    for name, style in zip(names, itertools.cycle(("--", "-", "-.", ":"))):  # told apart in grey
        curves = [[(row["flops"], row["best"]) for row in run["log"]]
                  for run in runs if run["schedule"] == name]  # [seeds, evaluations, 2]
        axes.plot(*torch.tensor(curves).double().mean(0).T, style, color="black", label=name)
    axes.legend(loc="lower right", title="means over seeds")
    return plot


# ====== main ======================================================================================


def ask_hub() -> None:
    """Wait 5 s for a sign of life of the hub; without one, use the local cache alone.

    The libraries retry for 24 to 48 s a file, even for files they have. They read HF_HUB_OFFLINE
    when they are imported, so this comes first.
    """
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
    except OSError as error:
        if not hasattr(error, "code"):  # an error page is an answer too
            os.environ["HF_HUB_OFFLINE"] = "1"
            print("The hub does not answer: HF_HUB_OFFLINE=1 from here on, cache and folders only")


def open_folder(config, model, data) -> Path:
    """The folder of this command, with its settings. ValueError if --resume is of another; OSError
    if a new one is there already: nothing is overwritten.
    """
    weights = [row.flatten()[::row.numel() // 64 + 1].tolist() for row in model.parameters()]
    settings = {**vars(config), "model or data": zlib.crc32(repr((weights, data)).encode()),
                "versions": [torch.__version__, sys.modules["transformers"].__version__]}
    if config.resume:
        saved = json.loads(Path(config.resume, "settings.json").read_text("utf-8"))
        other = [key for key in saved.keys() - FREE if settings[key] != saved[key]]
        if other:
            raise ValueError(f"--resume: {config.resume} was begun with another {', '.join(other)}")
        return Path(config.resume)
    out = Path(config.out.replace("TIME", time.strftime("%Y-%m-%d_%H%M%S")))
    if PartialState().is_main_process:
        out.mkdir(parents=True)
        write(out / "settings.json", [settings])
    return utils.gather_object([out])[0]  # of the first process: clocks differ


def prepare(config):
    """-> model, tokenizer, data, {seed: initial prompt}, folder. What the user can mend is a
    ValueError, an OSError, or what torch raises for an absent device.
    """
    # torchrun starts one process for each GPU, or as many as one likes on a CPU. There, without
    # cpu=True, accelerate would take each of them for a run of its own. Only the first is heard.
    state = PartialState(cpu=config.device == "cpu" or not torch.accelerator.is_available())
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")
    # A device that is not there, and a schedule that cannot be read, fail here.
    device = torch.zeros(1, device=config.device.replace("auto", str(state.device))).device
    torch.set_num_threads(config.threads or torch.get_num_threads())
    list(map(parse_schedule, config.schedule))
    if config.task in TASKS or not os.path.isdir(config.model):
        ask_hub()
    data = load_data(config.task, config.dev, config.limit)  # before the model: it fails sooner
    if not 1 <= state.num_processes * config.accumulate <= config.batch <= len(data[1]):
        raise ValueError("--batch must be at most the train examples, at least processes x parts")
    model, tokenizer = load_model(config.model, device, config.precision)
    # The tokens of the label words alone; ValueError if two labels have the same.
    words = sum((ids[:-1] for ids in label_ids(tokenizer, data[0]._replace(prefix=""))), [])
    starts = {seed: init_prompt(config.init, config.prompt_length, model.shared.weight,
                                rng(seed, "prompt"), words) for seed in config.seed}
    if config.checkpointing:
        model.activation_checkpointing_enable()
        model.disable_input_require_grads()  # the embeddings' gradient is nobody's
        model.train()  # it works in train mode alone; there is no dropout (`load_model`)
    # Absorption pays in fp32 on a CPU. In bf16 products are cheap, and it costs more than it saves.
    view = absorbed(model) if (device.type, model.dtype) == ("cpu", torch.float32) else model
    return view, tokenizer, data, starts, open_folder(config, model, data)


def main(argv=None) -> list[dict]:
    """Run every schedule and seed of the command on one loaded model. -> their results

    What the user can mend is one line on stderr and exit code 2; a signal ends with 130 or 143.
    """
    config, runs = parse_args(argv), []
    try:
        model, tokenizer, data, starts, out = prepare(config)
    except (OSError, ValueError, RuntimeError, AssertionError, safetensors.SafetensorError) as why:
        print(f"fpt.py: error: {' '.join(str(why).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{config.model} on {model.device}, {config.task}: {len(data[1])} train examples; {out}")
    remark(*data, tokenizer, config.max_source)
    try:
        for seed, name in itertools.product(*map(dict.fromkeys, (config.seed, config.schedule))):
            folder = out / f"{re.sub('[:,]', '_', name)}-seed{seed}"
            folder.mkdir(exist_ok=True)
            print(f"\n{name}, seed {seed}")
            if (folder / "results.json").exists():
                runs.append(json.loads((folder / "results.json").read_text("utf-8")))
                (folder / "state.pt").unlink(missing_ok=True)  # a kill may have come before that
            else:
                ended = tune(model, tokenizer, data, config, name, seed, starts[seed], folder)
                runs.append(conclude(*ended, data[0], data[3], config, folder))
    except KeyboardInterrupt:
        print(f"fpt.py: stopped. To go on: --resume {out}, and no other flags", file=sys.stderr)
        raise SystemExit(128 + (SIGNALS or [signal.SIGINT])[0]) from None
    if len(runs) > 1 and PartialState().is_main_process:
        figure(runs).savefig(out / "comparison.png", dpi=150)
        print(f"\nMean ± standard deviation over seeds {config.seed}, in percent\n{table(runs)}\n"
              f"\nFigure: {out / 'comparison.png'}")
    return runs


# ====== Extra: a cheaper cross-attention ==========================================================


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
        # Tokens of the longest target: nearer to d_kv, smaller products eat up the gain in FLOPs.
        self.longest = attention.key_value_proj_dim // 2

    def forward(self, hidden_states, mask=None, key_value_states=None, **how):
        """hidden_states [B, S, d], key_value_states [B, P+T, d] -> ([B, S, d], bias, None)."""
        own, target = self.attention, hidden_states.shape[1]
        if how.get("cache") is not None or target > self.longest:  # `generate` caches its keys
            return own(hidden_states, mask=mask, key_value_states=key_value_states, **how)
        heads = own.n_heads, own.key_value_proj_dim
        keys, values = own.k.weight.view(*heads, -1), own.v.weight.view(*heads, -1)  # [H, d_kv, d]
        query = own.q(hidden_states).unflatten(2, heads)  # [B, S, H, d_kv]
        query = torch.einsum("bshk,hkd->bshd", query, keys).flatten(1, 2)  # [B, S*H, d]
        padding = None if mask is None else mask[:, 0, :1]  # [B, 1, P+T], alike for all queries
        mean = nn.functional.scaled_dot_product_attention(
            query, key_value_states, key_value_states, padding, scale=1.0)  # [B, S*H, d]
        mean = torch.einsum("bshd,hkd->bshk", mean.unflatten(1, (target, -1)), values)
        return own.o(mean.flatten(2)), how.get("position_bias"), None  # of [B, S, H*d_kv]


def absorbed(model):
    """A view of a T5 whose cross-attention makes no keys and values where targets are short."""
    for i, block in enumerate(model.decoder.block):
        cross = AbsorbedAttention(block.layer[1].EncDecAttention)
        model = replaced(model, f"decoder.block.{i}.layer.1.EncDecAttention", cross)
    return model


if __name__ == "__main__":
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, note)
    main()
