"""Make what micro/ ships, model and task. Only who doubts the shipped model needs it.

    python micro/make.py                           # micro/model, micro/entailment; 6 to 10 minutes
    python micro/make.py --out /tmp/whole --whole  # the same without random sub-networks
    python micro/make.py --out /tmp/short --steps 500
    python micro/make.py --tasks /tmp/tasks        # five more tasks, in seconds, and no model

What it is: a T5 of d_model 64, d_ff 256, 8 encoder and 2 decoder layers, 0.53 M parameters, for a
made-up English of a hundred words. It is pre-trained as T5 v1.0 was, on span corruption and on
eight tasks named by a prefix. Entailment is one of them, answered "entailment" or "not_entailment".
The task that is shipped, micro/entailment, asks it without the prefix and for the answers "yes" and
"no", which in pre-training answer another question. The model has the knowledge, and a prompt has
to call it up: the situation of prompt tuning, small enough for a laptop.

What it is not: a model of language, or evidence about large models. And it is made to survive what
FPT does to it: from 40 % of the steps on, a batch trains a random sub-network of the encoder
(LayerDrop, Fan et al. 2020, with a rate drawn anew for each batch, and the same for FFN neurons).
Large T5s are redundant because they are large; one this small is only if it is trained to be.
`--whole` turns it off.

The same seed gives the same bytes on one machine with one version of torch; one thread does it all.
"""

import argparse
import contextlib
import json
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fpt  # noqa: E402  for the accuracy of partial models

# ====== The language ==============================================================================

# A word implies its kind: who sees a dog sees an animal, who runs moves, the park is outdoors.
KINDS = {
    "noun": {"animal": "dog cat horse cow bird", "person": "man woman boy girl king",
             "vehicle": "car bus train ship bike", "toy": "ball doll drum kite robot"},
    "verb": {"moves": "runs walks swims flies jumps", "sounds": "sings shouts barks whistles roars",
             "rests": "sleeps sits waits lies stands"},
    "place": {"outdoors": "park beach forest field street",
              "indoors": "kitchen hall attic office shop"},
}
KIND = {word: kind for kinds in KINDS.values() for kind, words in kinds.items()
        for word in words.split()}
WORDS = {slot: [word for words in kinds.values() for word in words.split()]
         for slot, kinds in KINDS.items()}
WORDS["adjective"] = "red blue green black white old young big small wet".split()
SLOTS = ("adjective", "noun", "verb", "place")  # in the order of a sentence


def anything(rng) -> dict[str, str]:
    """A meaning: a word for every slot."""
    return {slot: rng.choice(WORDS[slot]) for slot in SLOTS}


def weaker(meaning, rng) -> dict[str, str]:
    """What follows from a meaning: a word stays or becomes its kind; adjective or place may go."""
    follows = {}
    for slot, word in meaning.items():
        choices = {"adjective": [word, None], "place": [word, KIND.get(word), None]}
        follows[slot] = rng.choice(choices.get(slot, [word, KIND.get(word)]))
    return {slot: word for slot, word in follows.items() if word}


def implied(rng) -> tuple[dict[str, str], dict[str, str]]:
    """A meaning, and one that follows from it."""
    meaning = anything(rng)
    return meaning, weaker(meaning, rng)


def broken(meaning, rng) -> tuple[dict[str, str], str]:
    """The meaning with one word or kind replaced by another, and the slot where."""
    slot = rng.choice(list(meaning))
    kinds = KINDS.get(slot, {})
    others = [word for word in (kinds if meaning[slot] in kinds else WORDS[slot])
              if word != meaning[slot]]
    return {**meaning, slot: rng.choice(others)}, slot


def text(meaning) -> str:
    """A meaning as a sentence: "a red dog runs in the park" or, weaker, "an animal moves"."""
    words = [meaning[slot] for slot in ("adjective", "noun") if slot in meaning]
    words = ["an" if words[0][0] in "aeiou" else "a", *words, meaning["verb"]]
    if "place" in meaning:
        words += ["in", "the"] * (meaning["place"] in WORDS["place"]) + [meaning["place"]]
    return " ".join(words)


def pair(first, second) -> str:
    """Two meanings as the source of a task on two sentences, in the form of RTE's."""
    return f"sentence1: {text(first)} sentence2: {text(second)}"


# ====== Pre-training: span corruption, and eight tasks with a prefix ==============================


def spans(rng):
    """Span corruption, on one sentence or on two of which the second follows from the first."""
    meaning = anything(rng)
    words = (text(meaning) if rng.random() < 0.3 else pair(meaning, weaker(meaning, rng))).split()
    source, target, masked = [], [], False
    while words:
        length = rng.choice((1, 2))
        if rng.random() < 0.15 and not masked and len(target) < 3 * SENTINELS - 2:
            sentinel = f"<extra_id_{sum(word.startswith('<') for word in target)}>"
            source, target = [*source, sentinel], [*target, sentinel, *words[:length]]
            words, masked = words[length:], True
        else:
            source, words, masked = [*source, words[0]], words[1:], False
    return (" ".join(source), " ".join(target)) if target else spans(rng)


def entailment(rng):
    """Does the second sentence follow from the first?"""
    meaning, follows = implied(rng)
    if rng.random() < 0.5:
        return "entailment " + pair(meaning, follows), "entailment"
    return "entailment " + pair(meaning, broken(follows, rng)[0]), "not_entailment"


def wrong(rng):
    """Which slot of the second sentence keeps it from following?"""
    meaning, follows = implied(rng)
    if rng.random() < 0.2:
        return "wrong " + pair(meaning, follows), "none"
    follows, slot = broken(follows, rng)
    return "wrong " + pair(meaning, follows), slot


def general(rng):
    """Say it with kinds alone."""
    meaning = anything(rng)
    return ("general sentence1: " + text(meaning),
            text({slot: KIND[meaning[slot]] for slot in KINDS}))


def second(rng):
    """Copy the second sentence."""
    meaning, follows = implied(rng)
    return "second " + pair(meaning, follows), text(follows)


def ask(rng):
    """The noun, verb, place or adjective of the first sentence."""
    meaning, which = anything(rng), rng.choice(SLOTS)
    return f"{which} " + pair(meaning, weaker(meaning, rng)), meaning[which]


def shared(rng):
    """The words that the two sentences share."""
    meaning, follows = implied(rng)
    words = [word for slot, word in follows.items() if word == meaning[slot]]
    return "shared " + pair(meaning, follows), " ".join(words) or "none"


def find(rng):
    """Is this word in the sentence?"""
    meaning, which = anything(rng), rng.choice(SLOTS)
    word = meaning[which] if rng.random() < 0.5 else rng.choice(WORDS[which])
    return (f"find word: {word} sentence1: {text(meaning)}",
            "present" if word == meaning[which] else "absent")


def kind(rng):
    """Is this word of this kind? The only task that is answered yes or no."""
    word = rng.choice(list(KIND))
    kinds = next(kinds for kinds in KINDS.values() if KIND[word] in kinds)
    right = rng.random() < 0.5
    other = rng.choice([kind for kind in kinds if kind != KIND[word]])
    return f"kind word: {word} word: {KIND[word] if right else other}", "yes" if right else "no"


MIXTURE = {spans: 4, entailment: 8, wrong: 4, general: 2, second: 1, ask: 2, shared: 2, find: 1,
           kind: 1}  # examples of each, of 25
SENTINELS = 10
VOCABULARY = ["<pad>", "</s>", "<unk>", *dict.fromkeys([
    *"a an in the sentence1: sentence2: word: yes no present absent none".split(),
    "not_entailment", *(task.__name__ for task in MIXTURE if task not in (spans, ask)), *SLOTS,
    *WORDS["adjective"], *KIND, *KIND.values()]), *(f"<extra_id_{i}>" for i in range(SENTINELS))]

# ====== The model =================================================================================


def new_model():
    """A T5 with random weights. No dropout: every batch is new, there is nothing to overfit."""
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=len(VOCABULARY), d_model=64, d_kv=16, num_heads=4, d_ff=256, num_layers=8,
        num_decoder_layers=2, dropout_rate=0.0, decoder_start_token_id=0))


def new_tokenizer():
    """A word is a token, and </s> ends a text. `AutoTokenizer` loads it."""
    import tokenizers

    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", VOCABULARY.index("</s>"))])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=VOCABULARY[-SENTINELS:])


@contextlib.contextmanager
def thinned(encoder, rng):
    """For one batch: a random number of random layers between the first and the last; in each of
    them a random quarter to all of the FFN neurons, the others silenced."""
    layers, hooks = encoder.block, []
    inner = range(1, len(layers) - 1)
    kept = sorted(rng.sample(inner, rng.randint(0, len(inner))))
    encoder.block = nn.ModuleList(layers[i] for i in (0, *kept, len(layers) - 1))
    for block in encoder.block:
        wo = block.layer[-1].DenseReluDense.wo
        keep = torch.zeros(wo.in_features)
        count = rng.randint(wo.in_features // 4, wo.in_features)
        keep[rng.sample(range(wo.in_features), count)] = 1
        hooks.append(wo.register_forward_pre_hook(lambda _, x, keep=keep: (x[0] * keep,)))
    try:
        yield
    finally:
        encoder.block = layers
        for hook in hooks:
            hook.remove()


def encode(tokenizer, examples) -> dict[str, torch.Tensor]:
    """(source, target) pairs -> input_ids, attention_mask [B, T] and labels [B, S]."""
    sources, targets = (tokenizer(list(texts), padding=True, return_tensors="pt")
                        for texts in zip(*examples))
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    return {**sources, "labels": labels}


def pretrain(model, tokenizer, steps: int, seed: int, whole: bool) -> None:
    """AdamW on fresh examples of the mixture, 64 a step; prints how well each task is done."""
    rng = random.Random(seed)
    tasks, weights = list(MIXTURE), list(MIXTURE.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / 300, 1, 0.02 + 1.6 * (1 - step / steps)))  # up, constant, down
    start = time.perf_counter()
    for step in range(1, steps + 1):
        batch = encode(tokenizer, [task(rng) for task in rng.choices(tasks, weights, k=64)])
        # Sub-networks come once the whole has begun to learn: from the start they hold it up.
        thin = not whole and step > 0.4 * steps
        with thinned(model.encoder, rng) if thin else contextlib.nullcontext():
            logits = model(**batch, use_cache=False).logits  # [B, S, V]
        labels = batch["labels"]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = (loss.sum(1) / (labels != -100).sum(1)).mean()  # long targets do not count more
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 500 == 0 or step == steps:
            print(f"step {step}, {time.perf_counter() - start:.0f} s: " + ", ".join(
                f"{task.__name__} {exact(model, tokenizer, task):.1f}" for task in tasks),
                flush=True)


@torch.no_grad()
def exact(model, tokenizer, task, count: int = 500) -> float:
    """Percent of fresh examples of a task whose every target token is the likeliest one."""
    rng = random.Random("exact")
    batch = encode(tokenizer, [task(rng) for _ in range(count)])
    labels = batch["labels"]
    right = (model(**batch, use_cache=False).logits.argmax(-1) == labels) | (labels == -100)
    return 100 * right.all(1).float().mean().item()


# ====== The task that the model was never asked ===================================================


def without_prefix(count: int) -> list[tuple[str, str]]:
    """Different examples of entailment with the answers yes and no, half of them each."""
    rng, found = random.Random("rte"), {}  # a seed like any other: with it the rows are the shipped
    while len(found) < count:
        (meaning, follows), answer = implied(rng), ("yes", "no")[len(found) % 2]
        if answer == "no":
            follows = broken(follows, rng)[0]
        found.setdefault(pair(meaning, follows), answer)
    rows = list(found.items())
    rng.shuffle(rows)
    return rows


# More of them, for evidence/study.py: no prefix, and words that answered something else or nothing.


def same(rng):
    """Do the sentences name the same noun? yes or no."""
    meaning, follows = implied(rng)
    others = [word for word in WORDS["noun"] if word != meaning["noun"]]
    answer, noun = rng.choice([("yes", meaning["noun"]), ("no", rng.choice(others))])
    return pair(meaning, {**follows, "noun": noun}), answer


def slot(rng):
    """Which slot of the second sentence keeps it from following? noun, ..., place or none."""
    source, answer = wrong(rng)
    return source.removeprefix("wrong "), answer


def present(rng):
    """Does the second sentence follow? present or absent."""
    source, answer = entailment(rng)
    return (source.removeprefix("entailment "),
            {"entailment": "present", "not_entailment": "absent"}[answer])


def word(rng):
    """Is this word in the sentence? yes or no."""
    source, answer = find(rng)
    return source.removeprefix("find "), {"present": "yes", "absent": "no"}[answer]


def told(rng):
    """Does the second sentence say where? present or absent."""
    meaning, follows = implied(rng)
    return pair(meaning, follows), "present" if "place" in follows else "absent"


UNASKED = {same: ["yes", "no"], slot: [*SLOTS, "none"], present: ["present", "absent"],
           word: ["yes", "no"], told: ["present", "absent"]}


def unasked(task, count: int) -> list[tuple[str, str]]:
    """Different examples of a task."""
    rng, found = random.Random(task.__name__), {}
    while len(found) < count:
        found.setdefault(*task(rng))
    return list(found.items())


def write_task(folder: Path, rows, labels) -> None:
    """A task folder as fpt.py reads it; the first 1,000 rows are for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"labels": labels}, indent=2) + "\n")
    for name, part in ("validation", rows[:1000]), ("train", rows[1000:]):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"source": source, "target": target}) + "\n" for source, target in part))


def main(argv=None) -> None:
    """Write the task, pre-train the model, write it, and tell how well its parts do."""
    parser = argparse.ArgumentParser("make.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of both (%(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="of pre-training (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and examples (%(default)s)")
    parser.add_argument("--whole", action="store_true", help="no random sub-networks")
    parser.add_argument("--tasks", type=Path, help="write only more tasks, to this folder")
    args = parser.parse_args(argv)
    if args.tasks:
        for task, labels in UNASKED.items():
            write_task(args.tasks / task.__name__, unasked(task, 6000), labels)
        return
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if args.out.resolve() == HERE and args != parser.parse_args([]):
        parser.error("with other settings than the shipped ones, name another folder with --out")
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the sum of two threads depends on how they share the work
    torch.manual_seed(args.seed)
    write_task(args.out / "entailment", without_prefix(6000), ["yes", "no"])
    model, tokenizer = new_model(), new_tokenizer()
    pretrain(model, tokenizer, args.steps, args.seed, args.whole)
    model.eval().save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    for depth in (1, 0.75, 0.5, 0.25):
        part = fpt.partial_t5(model, depth, 1, decoder=False)
        right = exact(part, tokenizer, entailment)
        print(f"entailment with {depth:.0%} of the encoder's layers: {right:.1f}")


if __name__ == "__main__":
    main()
