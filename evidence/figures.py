"""The figures of the tutorial: python evidence/figures.py --out FOLDER

schedule.png  what `cr` runs: which of 12 layers, how many neurons, for how many updates
study.png     dev score against FLOPs of three schedules, on two micro models (study*.json)
transfer.png  the prompt of each partial model on each other one (study*.json)
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

import fpt  # noqa: E402
import study  # noqa: E402


def schedule(name: str = "cr", layers: int = 12):
    """A column for each stage, as wide as its share of the updates; a bar for each layer.

    Dark is what runs. The thin line below is the prompt, which goes through all of it.
    """
    plot = Figure(figsize=(7, 3.9), layout="constrained")
    axes, start, gap = plot.subplots(), 0.0, 0.012
    for stage in fpt.SCHEDULES[name]:
        kept = fpt.kept_layers(layers, max(1, round(stage.depth * layers)))
        room = stage.share - 2 * gap
        for layer in range(layers):
            axes.add_patch(Rectangle((start + gap, layer + 0.12), room, 0.76, color="0.9", lw=0))
            if layer in kept:
                axes.add_patch(Rectangle((start + gap, layer + 0.12), room * stage.width, 0.76,
                                         color="0.25", lw=0))
        text = f"{len(kept)} layers,\n{100 * stage.width:g} % of d_ff"
        axes.text(start + stage.share / 2, layers + 0.25, text, ha="center", fontsize=10)
        start += stage.share
        if start < 0.999:
            axes.axvline(start, color="0.5", lw=0.8, ls=":")
    axes.annotate("", (1, -1.1), (0, -1.1), arrowprops={"arrowstyle": "->", "lw": 1.6})
    axes.text(0.5, -1.0, "the same prompt, the same optimiser", ha="center", va="bottom",
              fontsize=10)
    axes.set(xlim=(0, 1), ylim=(-1.6, layers + 2.2), xlabel="share of the updates",
             ylabel="layer of the encoder", yticks=[0.5, layers - 0.5], yticklabels=[0, layers - 1],
             xticks=[0, 0.2, 0.4, 0.6, 1], xticklabels=["0", "20 %", "40 %", "60 %", "100 %"])
    for side in "top", "right", "left":
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    return plot


STYLES = {"pt": ("black", "-"), "cr": ("0.35", "--"), "fast": ("0.1", ":")}
MODELS = {"study": "shipped model", "study-whole": "made without sub-networks"}


def curves(records: dict[str, dict]):
    """Best dev score so far against FLOPs, as a share of what `pt` spends: mean of tasks, seeds."""
    plot = Figure(figsize=(7, 3.4), layout="constrained")
    panels = plot.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, (name, record) in zip(panels, records.items()):
        for schedule, (color, line) in STYLES.items():
            cells = [cell for cell in record["cells"] if cell["schedule"] == schedule
                     and cell["task"] in study.REPORTED and not cell["change"]]
            ends = {(cell["task"], cell["seed"]): cell["flops"][-1] for cell in record["cells"]
                    if cell["schedule"] == "pt" and not cell["change"]}
            spent = [[flops / ends[cell["task"], cell["seed"]] for flops in cell["flops"]]
                     for cell in cells]
            x, y = (list(map(mean, zip(*lists))) for lists in (
                spent, [cell["best"] for cell in cells]))
            axes.plot(x, y, line, color=color, lw=2.2, label=f"{schedule}: {y[-1]:.1f}")
            axes.plot(x[-1], y[-1], "o", color=color, ms=6)
        axes.set(title=MODELS[name], xlabel="training FLOPs (1: all of pt's)", xlim=(0, 1.03))
        axes.legend(loc="lower right", frameon=False, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    plot.axes[0].set_ylabel("best dev score so far, %")
    return plot


def transfer(records: dict[str, dict]):
    """A square for each pair: dark is a high validation score, and its number is in it."""
    names = ["full" if name == "pt" else name.removesuffix(":1") for name in study.FIXED]
    plot = Figure(figsize=(5.6, 5.2 * len(records)), layout="constrained")
    for axes, (name, record) in zip(plot.subplots(len(records), squeeze=False)[:, 0],
                                    records.items()):
        found = study.transferred(record)
        axes.imshow(found, cmap="Greys", vmin=30, vmax=110)
        for i, row in enumerate(found):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=9,
                          color="white" if value > 75 else "black",
                          weight="bold" if i == j else "normal")
        ticks = range(len(names))
        axes.set_xticks(ticks, names, rotation=60)
        axes.set_yticks(ticks, names)
        axes.set(title=MODELS[name], ylabel="prompt trained on (depth x width)",
                 xlabel="... and used, untouched, on")
    return plot


def main(args) -> None:
    records = {name: json.loads((args.records / f"{name}.json").read_text()) for name in MODELS}
    for name, figure in (("schedule", schedule()), ("study", curves(records)),
                         ("transfer", transfer(records))):
        figure.savefig(args.out / f"{name}.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("figures.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="(%(default)s)")
    parser.add_argument("--records", type=Path, default=HERE, help="(%(default)s)")
    main(parser.parse_args())
