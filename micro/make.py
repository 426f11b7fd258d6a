"""Make what micro/ ships: a small T5 and a task for it.

    python micro/make.py                           # both, in 6 to 10 minutes
    python micro/make.py --out /tmp/whole --whole  # without random sub-networks
    python micro/make.py --out /tmp/short --steps 500
    python micro/make.py --tasks /tmp/tasks        # five more tasks, and no model

The model is a T5 of 0.53 M parameters (d_model 64, d_ff 256, 8 encoder and 2 decoder
layers) for a made-up English of a hundred words. It is pre-trained as T5 v1.0 was, on
span corruption and on eight tasks that are named by a prefix. Entailment is one of
them, answered "entailment" or "not_entailment". The shipped task, micro/entailment,
asks it without the prefix and for the answers "yes" and "no", which answer another
question in pre-training. So the model has the knowledge, and a prompt has to call it
up. That is the situation of prompt tuning, small enough for a laptop.

It is not a model of language, and no evidence about large models. It is also made to
survive what FPT does to it: from 40 % of the steps on, each batch trains a random
sub-network of the encoder (LayerDrop, Fan et al. 2020, with a rate drawn anew for each
batch, and the same for FFN neurons). Large T5s are redundant because they are large.
One as small as this is redundant only if it is trained to be. `--whole` turns that off.

The same seed gives the same bytes on one machine with one version of torch.
"""

import argparse
import contextlib
import functools
import json
import random
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fpt

HERE = Path(__file__).resolve().parent

# ====== The language ==================================================================

# A word implies its kind: a dog is an animal, who runs moves, and the park is outdoors.
NOUNS = {
    "animal": "dog cat horse cow bird",
    "person": "man woman boy girl king",
    "vehicle": "car bus train ship bike",
    "toy": "ball doll drum kite robot",
}
VERBS = {
    "moves": "runs walks swims flies jumps",
    "sounds": "sings shouts barks whistles roars",
    "rests": "sleeps sits waits lies stands",
}
PLACES = {
    "outdoors": "park beach forest field street",
    "indoors": "kitchen hall attic office shop",
}
ADJECTIVES = "red blue green black white old young big small wet"
KINDS = {"noun": NOUNS, "verb": VERBS, "place": PLACES}
SLOTS = ["adjective", "noun", "verb", "place"]  # in the order of a sentence
WORDS = {"adjective": ADJECTIVES.split()}  # of each slot
KIND = {}  # of each word
for name, kinds in KINDS.items():
    WORDS[name] = " ".join(kinds.values()).split()
    for title, words in kinds.items():
        KIND |= dict.fromkeys(words.split(), title)


def anything(rng):
    """A meaning: a dictionary with a word for every slot."""
    return {slot: rng.choice(WORDS[slot]) for slot in SLOTS}


def weaker(meaning, rng):
    """A meaning that follows: words may become kinds; adjective and place may go."""
    follows = {}
    for slot, word in meaning.items():
        choices = [word]
        if slot != "adjective":
            choices.append(KIND[word])
        if slot in ("adjective", "place"):
            choices.append(None)
        chosen = rng.choice(choices)
        if chosen:
            follows[slot] = chosen
    return follows


def implied(rng):
    """A meaning, and one that follows from it."""
    meaning = anything(rng)
    return meaning, weaker(meaning, rng)


def broken(meaning, rng):
    """The meaning with another word, or another kind, in one slot; and that slot."""
    slot = rng.choice(list(meaning))
    alike = WORDS[slot]
    if meaning[slot] in KINDS.get(slot, ()):
        alike = KINDS[slot]
    others = [word for word in alike if word != meaning[slot]]
    return {**meaning, slot: rng.choice(others)}, slot


def text(meaning):
    """A sentence: "a red dog runs in the park" or, weaker, "an animal moves"."""
    words = [meaning[slot] for slot in ("adjective", "noun") if slot in meaning]
    article = "an" if words[0][0] in "aeiou" else "a"
    words = [article, *words, meaning["verb"]]
    place = meaning.get("place")
    if place in WORDS["place"]:
        words += ["in", "the"]
    if place:
        words.append(place)
    return " ".join(words)


def pair(first, second):
    """Two meanings as the source of a task on two sentences, in the form of RTE's."""
    return f"sentence1: {text(first)} sentence2: {text(second)}"


# ====== Pre-training: span corruption, and eight tasks with a prefix ==================
# Each function draws an example: source and target.

SENTINELS = [f"<extra_id_{i}>" for i in range(10)]


def spans(rng):
    """Span corruption of one sentence, or of two of which the second follows."""
    meaning = anything(rng)
    sentence = text(meaning)
    if rng.random() >= 0.3:
        sentence = pair(meaning, weaker(meaning, rng))
    words = sentence.split()
    source, target = [], []
    left = iter(SENTINELS)
    masked = False  # whether the word before was: spans do not touch
    while words:
        length = rng.choice((1, 2))
        # A span adds two or three words to the target, and there are ten sentinels.
        masked = rng.random() < 0.15 and not masked and len(target) < 28
        if masked:
            sentinel = next(left)
            source.append(sentinel)
            target += [sentinel, *words[:length]]
            words = words[length:]
        else:
            source.append(words.pop(0))
    if not target:
        return spans(rng)
    return " ".join(source), " ".join(target)


def entailment(rng):
    """Does the second sentence follow from the first?"""
    meaning, follows = implied(rng)
    answer = "entailment"
    if rng.random() >= 0.5:
        follows, _ = broken(follows, rng)
        answer = "not_entailment"
    return "entailment " + pair(meaning, follows), answer


def wrong(rng):
    """Which slot of the second sentence keeps it from following?"""
    meaning, follows = implied(rng)
    slot = "none"
    if rng.random() >= 0.2:
        follows, slot = broken(follows, rng)
    return "wrong " + pair(meaning, follows), slot


def general(rng):
    """Say it with kinds alone."""
    meaning = anything(rng)
    target = {slot: KIND[meaning[slot]] for slot in KINDS}
    return f"general sentence1: {text(meaning)}", text(target)


def second(rng):
    """Copy the second sentence."""
    meaning, follows = implied(rng)
    return "second " + pair(meaning, follows), text(follows)


def ask(rng):
    """What is the noun, verb, place or adjective of the first sentence?"""
    meaning = anything(rng)
    slot = rng.choice(SLOTS)
    return f"{slot} " + pair(meaning, weaker(meaning, rng)), meaning[slot]


def shared(rng):
    """Which words do the two sentences share?"""
    meaning, follows = implied(rng)
    words = [word for slot, word in follows.items() if word == meaning[slot]]
    return "shared " + pair(meaning, follows), " ".join(words) or "none"


def find(rng):
    """Is this word in the sentence?"""
    meaning = anything(rng)
    slot = rng.choice(SLOTS)
    word = meaning[slot]
    if rng.random() >= 0.5:
        word = rng.choice(WORDS[slot])
    answer = "present" if word == meaning[slot] else "absent"
    return f"find word: {word} sentence1: {text(meaning)}", answer


def kind(rng):
    """Is this word of this kind? The only task that is answered yes or no."""
    word = rng.choice(list(KIND))
    right = KIND[word]
    [alike] = [kinds for kinds in KINDS.values() if right in kinds]
    said_right = rng.random() < 0.5
    other = rng.choice([title for title in alike if title != right])
    if said_right:
        return f"kind word: {word} word: {right}", "yes"
    return f"kind word: {word} word: {other}", "no"


MIXTURE = {  # examples of each task, of 25
    spans: 4,
    entailment: 8,
    wrong: 4,
    general: 2,
    second: 1,
    ask: 2,
    shared: 2,
    find: 1,
    kind: 1,
}
MARKS = "a an in the sentence1: sentence2: word: yes no present absent none"
TASKS = "not_entailment entailment wrong general second shared find kind"
VOCABULARY = ["<pad>", "</s>", "<unk>", *MARKS.split(), *TASKS.split(), *SLOTS]
VOCABULARY += [*WORDS["adjective"], *KIND, *dict.fromkeys(KIND.values()), *SENTINELS]

# ====== The model =====================================================================


def new_model():
    """A T5 with random weights. Every batch is new, so it needs no dropout."""
    config = transformers.T5Config(
        vocab_size=len(VOCABULARY),
        d_model=64,
        d_kv=16,
        num_heads=4,
        d_ff=256,
        num_layers=8,
        num_decoder_layers=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def new_tokenizer():
    """A word is a token, and </s> ends a text. `AutoTokenizer` loads it."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SENTINELS,
    )


def silence(keep, wo, inputs):
    """A hook before `wo` that silences neurons where keep, [d_ff], is 0."""
    return (inputs[0] * keep,)


@contextlib.contextmanager
def thinned(encoder, rng):
    """Run a random sub-network of the encoder.

    The first and the last layer stay, and a random number of the others. In each of
    them a random quarter to all of the FFN neurons stay; the rest are silenced.
    """
    layers = encoder.block
    inner = range(1, len(layers) - 1)
    kept = sorted(rng.sample(inner, rng.randint(0, len(inner))))
    encoder.block = nn.ModuleList(layers[i] for i in (0, *kept, len(layers) - 1))
    hooks = []
    for block in encoder.block:
        wo = block.layer[-1].DenseReluDense.wo
        count = rng.randint(wo.in_features // 4, wo.in_features)
        keep = torch.zeros(wo.in_features)
        keep[rng.sample(range(wo.in_features), count)] = 1
        hook = functools.partial(silence, keep)
        hooks.append(wo.register_forward_pre_hook(hook))
    yield
    encoder.block = layers
    for hook in hooks:
        hook.remove()


def encode(tokenizer, examples):
    """(source, target) pairs as a batch of input_ids, attention_mask and labels."""
    sources = tokenizer([row[0] for row in examples], padding=True, return_tensors="pt")
    targets = tokenizer([row[1] for row in examples], padding=True, return_tensors="pt")
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    return {**sources, "labels": labels}


def pretrain(model, tokenizer, steps, seed, whole):
    """AdamW on fresh examples of the mixture, 64 a step; prints how it goes."""

    def rate(step):  # up, constant, down
        return min((step + 1) / 300, 1, 0.02 + 1.6 * (1 - step / steps))

    rng = random.Random(seed)
    tasks, weights = list(MIXTURE), list(MIXTURE.values())
    how = {"lr": 2e-3, "betas": (0.9, 0.98), "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(model.parameters(), **how)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        drawn = rng.choices(tasks, weights, k=64)
        batch = encode(tokenizer, [task(rng) for task in drawn])
        sub_network = contextlib.nullcontext()
        # Not from the start on, where sub-networks would hold up the whole.
        if not whole and step > 0.4 * steps:
            sub_network = thinned(model.encoder, rng)
        with sub_network:
            logits = model(**batch, use_cache=False).logits.transpose(1, 2)  # [B, V, S]
        labels = batch["labels"]
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        # A mean of means: long targets do not count more.
        loss = (loss.sum(1) / (labels != -100).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 500 == 0 or step == steps:
            print(f"step {step}, {time.perf_counter() - start:.0f} s")
            for task in tasks:
                print(f"    {task.__name__} {exact(model, tokenizer, task):.1f}")


@torch.no_grad()
def exact(model, tokenizer, task, count=500):
    """Percent of fresh examples of a task whose every target token is the likeliest."""
    rng = random.Random("exact")
    batch = encode(tokenizer, [task(rng) for _ in range(count)])
    labels = batch["labels"]
    guesses = model(**batch, use_cache=False).logits.argmax(-1)  # [B, S]
    right = (guesses == labels) | (labels == -100)
    return 100 * right.all(1).float().mean().item()


# ====== The task that the model was never asked =======================================


def without_prefix(count):
    """Different examples of entailment, half of them answered yes and half no."""
    rng = random.Random("rte")  # with this seed the rows are the shipped ones
    found = {}
    while len(found) < count:
        meaning, follows = implied(rng)
        answer = "yes"
        if len(found) % 2:
            follows, _ = broken(follows, rng)
            answer = "no"
        found.setdefault(pair(meaning, follows), answer)
    rows = list(found.items())
    rng.shuffle(rows)
    return rows


# ====== More of them, for evidence/study.py ===========================================
# They have no prefix, and their answers meant something else in pre-training.


def same(rng):
    """Do the sentences name the same noun?"""
    meaning, follows = implied(rng)
    others = [word for word in WORDS["noun"] if word != meaning["noun"]]
    choices = [("yes", meaning["noun"]), ("no", rng.choice(others))]
    answer, noun = rng.choice(choices)
    return pair(meaning, {**follows, "noun": noun}), answer


def slot(rng):
    """Which slot of the second sentence keeps it from following?"""
    source, answer = wrong(rng)
    return source.removeprefix("wrong "), answer


def present(rng):
    """Does the second sentence follow? Here present means yes, and absent no."""
    source, answer = entailment(rng)
    said = "present" if answer == "entailment" else "absent"
    return source.removeprefix("entailment "), said


def word(rng):
    """Is this word in the sentence?"""
    source, answer = find(rng)
    said = "yes" if answer == "present" else "no"
    return source.removeprefix("find "), said


def told(rng):
    """Does the second sentence say where?"""
    meaning, follows = implied(rng)
    said = "present" if "place" in follows else "absent"
    return pair(meaning, follows), said


UNASKED = {
    same: ["yes", "no"],
    slot: [*SLOTS, "none"],
    present: ["present", "absent"],
    word: ["yes", "no"],
    told: ["present", "absent"],
}


def unasked(task, count):
    """Different examples of a task."""
    rng = random.Random(task.__name__)
    found = {}
    while len(found) < count:
        source, target = task(rng)
        found.setdefault(source, target)
    return list(found.items())


def write_task(folder, rows, labels):
    """A task folder as fpt.py reads it; the first 1,000 rows are for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = json.dumps({"labels": labels}, indent=2)
    (folder / "task.json").write_text(spec + "\n")
    for name, part in [("validation", rows[:1000]), ("train", rows[1000:])]:
        with open(folder / f"{name}.jsonl", "w") as file:
            for source, target in part:
                line = json.dumps({"source": source, "target": target})
                file.write(line + "\n")


def main(argv=None):
    """Write the task, pre-train and write the model, and say how well its parts do."""
    parser = argparse.ArgumentParser("make.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of both")
    parser.add_argument("--steps", type=int, default=6000, help="of pre-training")
    parser.add_argument("--seed", type=int, default=1, help="of weights and examples")
    parser.add_argument("--whole", action="store_true", help="no sub-networks")
    parser.add_argument("--tasks", type=Path, help="write only more tasks, to here")
    args = parser.parse_args(argv)
    if args.tasks:
        for task, labels in UNASKED.items():
            write_task(args.tasks / task.__name__, unasked(task, 6000), labels)
        return
    if args.out.resolve() == HERE and args != parser.parse_args([]):
        parser.error("other settings than the shipped ones need another --out")
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the sum of two would depend on how they share the work
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
