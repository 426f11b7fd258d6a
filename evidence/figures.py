"""The figures of the tutorial: python evidence/figures.py --out FOLDER

schedule.png  what `cr` runs: which of 12 layers, how many neurons, for how many updates
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

import fpt  # noqa: E402


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser("figures.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="(%(default)s)")
    schedule().savefig(parser.parse_args().out / "schedule.png", dpi=150)
