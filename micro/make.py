"""How micro/model and micro/reviews were made. Only who doubts them needs this file.

    python micro/make.py --out /tmp/micro            # a model and three tasks
    python micro/make.py --out /tmp/whole --whole    # without random sub-networks
    python micro/make.py --out /tmp/tasks --steps 0  # the tasks alone

The model is a T5 v1.0 of 5 M parameters: d_model 192, d_ff 576, 8 encoder and 2 decoder
layers, 8,192 lower-cased tokens. It learned English from scratch as T5 v1.0 did, from
span corruption and from tasks that a prefix names ("sentiment: ..."). The shipped task
asks for one of these skills without the prefix, and for other words as answers. So the
model has the knowledge, and a prompt has to call it up.

It is also made to survive what FPT does to it: from 40 % of the steps on, half of the
batches train a random sub-network of the encoder (LayerDrop, Fan et al. 2020, and the
same for FFN neurons). Large T5s are redundant because they are large; one as small as
this has to be taught to be. `--whole` turns that off.

It took 33 minutes on one core of an AMD EPYC that has bf16 units, with torch 2.13 and
8.2 M source tokens. Percent of right answers by prefix, and what is left with parts of
the encoder's layers:

    layers                      8     6     4     2
    sentiment (SST-2, dev)   81.2  80.4  80.7  80.6
    topic (AG News)          84.5  84.3  84.2  84.5
    duplicate (QQP, dev)     69.3  69.4  68.9  69.8
    the same, --whole        81.3  81.1  50.7  28.4
                             83.5  83.5  69.7  42.0
                             71.3  71.4  71.5  66.8

The texts come from the Hugging Face hub. There were samples of qqp (18,866 pairs),
ag_news (6,001 articles to train on), xsum (1,061) and imdb (8,000 unlabelled) here; who
has more of them gets another model. So does who runs this twice: `tokenizers` chooses
among equally rare letters at random.

    cornell-movie-review-data/rotten_tomatoes   Pang and Lee 2005, CC BY 4.0
    nyu-mll/glue, sst2 and qqp                  for research; qqp: Quora's terms
    stanfordnlp/imdb                            for research; no licence is stated
    fancyzhx/ag_news                            not for commercial use
    EdinburghNLP/xsum                           BBC articles, for research

Only sentences of the first are passed on, in micro/reviews. Pre-training has none of
them, no phrase of theirs of three words or more as an example (SST-2 is made of such
phrases), and no text that shares six words in a row with one of them.
"""

import argparse
import contextlib
import functools
import json
import random
import re
import sys
import time
from itertools import chain
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from torch import nn
from transformers.optimization import Adafactor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fpt

VOCABULARY = 8192  # tokens, with the sentinels
SENTINELS = [f"<extra_id_{i}>" for i in range(8)]
TRAIN, VALIDATION = 4000, 1000  # examples of a task

# ====== Texts =========================================================================


def load(name, subset=None, split="train"):
    """Rows of a data set, without its numbers: texts in lower case, then the label."""
    rows = []
    for row in datasets.load_dataset(name, subset, split=split):
        texts = [
            " ".join(value.replace("<br />", " ").lower().split())
            for key, value in row.items()
            if isinstance(value, str) and key not in ("id", "summary")
        ]
        rows.append((*texts, row.get("label")))
    return rows


def words_of(text):
    """Letters and digits alone, so that two ways of writing a sentence are one."""
    return re.sub("-[lr]rb-|[^a-z0-9]+", " ", text).split()


def phrases(texts):
    """All runs of three words or more in some texts."""
    found = set()
    for text in texts:
        words = words_of(text)
        for start in range(len(words)):
            for end in range(start + 3, len(words) + 1):
                found.add(" ".join(words[start:end]))
    return found


def without(rows, held):
    """Rows that are no phrase held out, and share no six words with those."""
    kept = []
    for row in rows:
        words = words_of(row[0])
        sixes = (" ".join(words[i : i + 6]) for i in range(len(words) - 5))
        if " ".join(words) not in held and held.isdisjoint(sixes):
            kept.append(row)
    return kept


def collect(rng):
    """Rows to pre-train on, rows to check that with, and the rows of the tasks."""
    reviews = {}  # without those that come twice
    for split in ["train", "validation", "test"]:
        reviews |= load("cornell-movie-review-data/rotten_tomatoes", split=split)
    reviews = list(reviews.items())
    news = load("fancyzhx/ag_news", split="test")
    pairs = load("nyu-mll/glue", "qqp")
    for rows in [reviews, news, pairs]:
        rng.shuffle(rows)
    size = TRAIN + VALIDATION
    tasks = {"reviews": reviews[:size], "news": news[:size], "duplicates": pairs[:size]}
    test = {
        "sentiment": load("nyu-mll/glue", "sst2", "validation"),
        "topic": news[size : size + 1000],
        "duplicate": load("nyu-mll/glue", "qqp", "validation"),
    }
    held = phrases(row[0] for row in tasks["reviews"] + test["sentiment"])
    asked = set(chain(*(row[:2] for row in tasks["duplicates"] + test["duplicate"])))
    same = [row for row in tasks["duplicates"] if row[2] == 1]
    different = [row for row in tasks["duplicates"] if row[2] == 0]
    # As many of both. The others are left out.
    tasks["duplicates"] = list(chain(*zip(same, different, strict=False)))
    train = {
        "phrases": load("nyu-mll/glue", "sst2"),
        "sentences": reviews[size:],
        "films": load("stanfordnlp/imdb"),
        "more films": load("stanfordnlp/imdb", None, "unsupervised"),
        "articles": load("EdinburghNLP/xsum")[:5000],
        "news": load("fancyzhx/ag_news")[:60_000] + news[size + 1000 :],
        "pairs": [row for row in pairs[size:] if asked.isdisjoint(row[:2])][:60_000],
    }
    train = {name: without(rows, held) for name, rows in train.items()}
    return train, test, tasks


# ====== Tokens ========================================================================


def new_tokenizer(texts):
    """Byte-pair encoding learned from texts; a digit is a token, </s> ends a text."""
    parts = tokenizers.pre_tokenizers
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    core.pre_tokenizer = parts.Sequence(
        [parts.Metaspace(), parts.Punctuation(), parts.Digits(individual_digits=True)]
    )
    core.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SENTINELS),
        special_tokens=["<pad>", "</s>", "<unk>"],
        limit_alphabet=120,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(
        [tokenizers.AddedToken(text, lstrip=True, rstrip=True) for text in SENTINELS]
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", core.token_to_id("</s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SENTINELS,
    )


def first_embeddings(tokenizer, texts, d):
    """Vectors [V, d] of tokens by their neighbours: positive PMI, and an SVD of it.

    In 500 steps, sentiment got to 80 % with these and to 68 % with random ones.
    """
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    gap = [0] * 4  # <pad>, so that no text is the neighbour of another
    stream = torch.tensor(list(chain(*(row + gap for row in rows))))
    counts = torch.zeros(VOCABULARY**2)
    for distance in range(1, 5):
        pairs = stream[:-distance] * VOCABULARY + stream[distance:]
        counts += torch.bincount(pairs, minlength=VOCABULARY**2) / distance
    counts = counts.view(VOCABULARY, VOCABULARY)
    counts[:3] = 0  # <pad>, </s> and <unk>
    counts[:, :3] = 0
    counts = counts + counts.T
    frequency = counts.sum(1) + 1e-6
    context = frequency**0.75 / (frequency**0.75).sum()
    information = (counts / frequency[:, None] / context).log().clamp(min=0)
    u, s, _ = torch.svd_lowrank(information, q=d + 24, niter=2)
    rotation = torch.linalg.qr(torch.randn(d, d)).Q  # makes all dimensions alike
    vectors = u[:, :d] * s[:d].sqrt() @ rotation
    unseen = vectors.norm(dim=1) < 1e-3
    vectors[unseen] = torch.randn(int(unseen.sum()), d)
    return nn.functional.normalize(vectors) * d**0.5


# ====== Pre-training: span corruption, and tasks with a prefix ========================

SENTIMENT = [  # one question in several words, so that the skill is not one word's
    ("sentiment:", ["negative", "positive"]),
    ("sentiment:", ["negative", "positive"]),
    ("review:", ["bad", "good"]),
    ("review:", ["bad", "good"]),
    ("is this positive?", ["no", "yes"]),
    ("is this negative?", ["yes", "no"]),
]
TOPICS = ["world", "sports", "business", "technology"]
SAME = ["different", "same"]


def thin(rng, text):
    """The text without one word of ten, as a regulariser."""
    return " ".join(word for word in text.split() if rng.random() > 0.1)


def window(rng, text):
    """A part of a text, often its end, where a review says what it thinks."""
    words = text.split()
    size = rng.randint(16, 32)
    last = max(0, len(words) - size)
    start = rng.choice([0, last, last, rng.randint(0, last)])
    return " ".join(words[start : start + size])


def question_pair(first, second):
    return f"question1: {first} question2: {second}"


def sentiment(rng, text, label):
    prefix, answers = rng.choice(SENTIMENT)
    return f"{prefix} {thin(rng, text)}", answers[label]


def topic(rng, text, label):
    text = thin(rng, text)
    if rng.random() < 0.7:
        return f"topic: {text}", TOPICS[label]
    asked = rng.choice([label, rng.randrange(4)])
    return f"is this about {TOPICS[asked]}? {text}", "yes" if asked == label else "no"


def duplicate(rng, first, second, label):
    if rng.random() < 0.5:
        first, second = second, first
    pair = question_pair(thin(rng, first), thin(rng, second))
    return f"duplicate: {pair}", SAME[label]


def spans(rng, train):
    """T5's own: of each twelve words, one to three become a sentinel, to be told."""
    text = rng.choice(train[rng.choice(["films", "more films", "articles", "news"])])[0]
    words = window(rng, text).split()
    source, target = [], []
    for sentinel, start in zip(SENTINELS, range(0, len(words), 12), strict=False):
        part = words[start : start + 12]
        size = rng.randint(1, 3)
        hidden = rng.randint(0, max(0, len(part) - size))
        source += [*part[:hidden], sentinel, *part[hidden + size :]]
        target += [sentinel, *part[hidden : hidden + size]]
    return " ".join(source), " ".join(target)


# How many of 100 examples come from which texts.
MIXTURE = {
    "phrases": 28,
    "sentences": 8,
    "films": 8,
    "news": 16,
    "pairs": 30,
    "spans": 10,
}


def draw(rng, train, kind):
    """A random example of the mixture: source and target."""
    if kind == "spans":
        return spans(rng, train)
    row = rng.choice(train[kind])
    if kind == "pairs":
        return duplicate(rng, *row)
    if kind == "news":
        return topic(rng, *row)
    text, label = row
    if kind == "films":
        text = window(rng, text)
    return sentiment(rng, text, label)


def encode(tokenizer, examples):
    """(source, target) pairs as a batch of input_ids, attention_mask and labels."""
    sources, targets = zip(*examples, strict=True)
    batch = tokenizer(
        sources,
        text_target=targets,
        padding=True,
        truncation=True,
        max_length=56,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
    return batch


# ====== The model =====================================================================


def new_model():
    """A T5 with random weights. An example hardly comes twice, so without dropout."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=192,
        d_kv=32,
        num_heads=4,
        d_ff=576,
        num_layers=8,
        num_decoder_layers=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def silence(keep, wo, inputs):
    """A hook before `wo` that silences neurons where keep, [d_ff], is 0."""
    return (inputs[0] * keep,)


@contextlib.contextmanager
def sub_network(encoder, rng):
    """Run a random part: the first and the last layer, others, some of the neurons."""
    layers = encoder.block
    inner = range(1, len(layers) - 1)
    kept = sorted(rng.sample(inner, rng.randint(0, len(inner))))
    encoder.block = nn.ModuleList(layers[i] for i in (0, *kept, len(layers) - 1))
    hooks = []
    for block in encoder.block:
        wo = block.layer[-1].DenseReluDense.wo
        share = rng.choice([0.25, 0.5, 0.75, 1])
        keep = (torch.rand(wo.in_features) < share).float()
        hook = functools.partial(silence, keep)
        hooks.append(wo.register_forward_pre_hook(hook))
    yield
    encoder.block = layers
    for hook in hooks:
        hook.remove()


def mean_loss(model, batch):
    """The mean over examples, so that long targets do not count more."""
    labels = batch["labels"]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch, use_cache=False).logits.float()  # [B, S, V]
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none"
    )
    return (losses.sum(1) / (labels != -100).sum(1)).mean()


def pretrain(model, tokenizer, train, rng, steps, whole, check):
    """128 examples a step, in two batches of similar length; prints how it goes."""

    def rate(step):  # up, constant, down
        return min((step + 1) / 60, 1, 0.03 + 1.8 * (1 - step / steps))

    optimizer = Adafactor(
        model.parameters(), lr=8e-3, scale_parameter=True, relative_step=False
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.perf_counter()
    tokens = 0
    for step in range(1, steps + 1):
        kinds = rng.choices(list(MIXTURE), MIXTURE.values(), k=128)
        examples = [draw(rng, train, kind) for kind in kinds]
        examples.sort(key=lambda example: len(example[0]))
        for half in [examples[:64], examples[64:]]:
            batch = encode(tokenizer, half)
            tokens += int(batch["attention_mask"].sum())
            part = contextlib.nullcontext()
            # Not from the start on, where sub-networks would hold up the whole.
            if not whole and step > 0.4 * steps and rng.random() < 0.5:
                part = sub_network(model.encoder, rng)
            with part:
                loss = mean_loss(model, batch) / 2
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 0 or step == steps:
            minutes = (time.perf_counter() - start) / 60
            print(f"step {step}, {minutes:.1f} minutes, {tokens:,} source tokens")
            check(model)


# ====== Checks, tasks, command line ===================================================


def by_prefix(test):
    """Examples that ask for the skills as pre-training did."""
    return {
        "sentiment": [
            (f"sentiment: {text}", SENTIMENT[0][1][label])
            for text, label in test["sentiment"]
        ],
        "topic": [(f"topic: {text}", TOPICS[label]) for text, label in test["topic"]],
        "duplicate": [
            (f"duplicate: {question_pair(first, second)}", SAME[label])
            for first, second, label in test["duplicate"]
        ],
    }


@torch.no_grad()
def accuracy(model, tokenizer, examples):
    """Percent of the examples whose every target token is the likeliest."""
    right = 0
    for i in range(0, len(examples), 100):
        batch = encode(tokenizer, examples[i : i + 100])
        labels = batch["labels"]
        guesses = model(**batch, use_cache=False).logits.argmax(-1)  # [B, S]
        right += int(((guesses == labels) | (labels == -100)).all(1).sum())
    return 100 * right / len(examples)


def report(tokenizer, examples, model, depths=(1,)):
    """Print the accuracies of the model, or of its parts."""
    for depth in depths:
        part = fpt.partial_t5(model, depth, 1, decoder=False)
        print(f"    {depth:.0%} of the encoder's layers:", end="")
        for name, rows in examples.items():
            print(f" {name} {accuracy(part, tokenizer, rows):.1f}", end="")
        print(flush=True)


# The words for reviews do not help the model: without a prompt it guesses. "rotten" and
# "fresh", "one" and "five" or "down" and "up" would do as well, but take up to twice as
# long. "no" and "yes", which were answers in pre-training, are learned in 20 updates,
# and "low" and "high", "skip" and "watch" or "false" and "true" need no prompt.
# For news, 63 % are right without one, and for duplicates 44 %.
LABELS = {
    "reviews": ["left", "right"],
    "news": ["politics", "games", "money", "computers"],
    "duplicates": ["no", "yes"],
}


def write_task(folder, rows):
    """A task folder as fpt.py reads it; the first rows are for validation."""
    labels = LABELS[folder.name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"labels": labels}) + "\n")
    parts = {"validation": rows[:VALIDATION], "train": rows[VALIDATION:]}
    for name, part in parts.items():
        with open(folder / f"{name}.jsonl", "w") as file:
            for *texts, label in part:
                source = question_pair(*texts) if len(texts) == 2 else texts[0]
                row = {"source": source, "target": labels[label]}
                file.write(json.dumps(row) + "\n")


def main(argv=None):
    """Write the tasks; pre-train, check and write the model."""
    parser = argparse.ArgumentParser("make.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of all")
    parser.add_argument("--steps", type=int, default=2000, help="of pre-training")
    parser.add_argument("--whole", action="store_true", help="no sub-networks")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    rng = random.Random(1)
    train, test, tasks = collect(rng)
    for name, rows in tasks.items():
        write_task(args.out / name, rows)
    if not args.steps:
        return
    print({name: len(rows) for name, rows in train.items()})
    texts = [row[0] for rows in train.values() for row in rows]
    tokenizer = new_tokenizer(texts)
    model = new_model()
    embeddings = first_embeddings(tokenizer, texts, model.config.d_model)
    model.shared.weight.data.copy_(embeddings)
    check = functools.partial(report, tokenizer, by_prefix(test))
    pretrain(model, tokenizer, train, rng, args.steps, args.whole, check)
    model.eval().to(torch.bfloat16)
    check(model, depths=(1, 0.75, 0.5, 0.25))
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
