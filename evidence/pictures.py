"""The drawings of the tutorial that show no measurement: python evidence/pictures.py"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fpt

HERE = Path(__file__).resolve().parent
LAYERS, D_FF = 12, 3072  # of t5-base
DARK, FAINT = "0.25", "0.85"
ARROW = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0}


def box(axes, x, y, width, height, color, text="", edge="none"):
    """A rectangle with a text in its middle; with an edge, the text is black."""
    style = {"facecolor": color, "edgecolor": edge}
    axes.add_patch(Rectangle((x, y), width, height, **style))
    middle = x + width / 2, y + height / 2
    letters = "white" if edge == "none" else "black"
    axes.text(*middle, text, ha="center", va="center", color=letters, fontsize=8)


def layers_of(stage):
    """The layers that a stage keeps."""
    return fpt.kept_layers(LAYERS, fpt.round_half_up(stage.depth * LAYERS))


def draw_stage(axes, x, stage, following):
    """One partial model: its encoder's layers, and the whole decoder above them."""
    kept, after = layers_of(stage), layers_of(following)
    for layer in range(LAYERS):
        runs = layer in kept
        box(axes, x, layer, 1.1, 0.76, "0.5" if runs else FAINT)
        box(axes, x + 1.2, layer, 2.4, 0.76, FAINT)
        if runs:
            box(axes, x + 1.2, layer, 2.4 * stage.width, 0.76, DARK)
        if layer in kept and layer not in after:
            axes.text(x + 3.7, layer + 0.36, "leaves", va="center", fontsize=8)
    box(axes, x, LAYERS + 0.7, 3.6, 1.4, "white", "decoder, whole", "black")
    title = f"{stage.share:.0%} of the updates\n{len(kept)} layers\n"
    title += f"{round(stage.width * D_FF):,} neurons each"
    axes.text(x + 1.8, LAYERS + 2.5, title, ha="center", fontsize=8.5)


def draw_schedule():
    """`cr` on t5-base, where the answers are labels."""
    plot = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = plot.subplots()
    stages = fpt.SCHEDULES["cr"]
    for index, stage in enumerate(stages):
        following = stages[min(index + 1, len(stages) - 1)]
        draw_stage(axes, 5.4 * index, stage, following)
    right = 5.4 * len(stages) - 1.8
    for y, text in [(-1.5, "one soft prompt"), (-3, "one optimiser")]:
        box(axes, 0, y, right, 1, "white", f"{text}, all the way through", "black")
        axes.annotate("", (right + 0.9, y + 0.5), (right, y + 0.5), arrowprops=ARROW)
    for layer in [0, LAYERS - 1]:
        axes.text(-0.3, layer + 0.36, f"layer {layer}", ha="right", va="center")
    axes.text(0.55, LAYERS + 0.05, "attention", ha="center", fontsize=8)
    axes.text(2.4, LAYERS + 0.05, "FFN", ha="center", fontsize=8)
    axes.set(xlim=(-2.4, right + 1.2), ylim=(-3.2, LAYERS + 5))
    axes.axis("off")
    return plot


def draw_neuron():
    """Neuron j: a row of `wi`, what comes out of it, and a column of `wo`."""
    plot = Figure(figsize=(7, 2.9), layout="constrained")
    axes = plot.subplots()
    row, left = 5, 12.2  # the height of row j, and where wo begins
    box(axes, 0, 0, 2.4, 8, FAINT)
    box(axes, 0, row, 2.4, 0.5, DARK, "row j")
    axes.text(1.2, 8.3, "wi [d_ff, d]", ha="center")
    axes.annotate("", (4, row + 0.25), (2.5, row + 0.25), arrowprops=ARROW)
    axes.text(4.2, row + 0.25, "activation j at each position", va="center")
    axes.text(4.2, row - 0.75, "its mean absolute value is the score", va="center")
    axes.annotate("", (12.1, row + 0.25), (10.3, row + 0.25), arrowprops=ARROW)
    box(axes, left, 2.8, 8, 2.4, FAINT)
    box(axes, left + 4.6, 2.8, 0.5, 2.4, DARK)
    axes.text(left + 4.85, 2.1, "column j", ha="center")
    axes.text(left + 4, 5.6, "wo [d, d_ff]", ha="center")
    axes.set(xlim=(-0.2, 20.6), ylim=(-0.2, 9.2))
    axes.axis("off")
    return plot


def draw_gain():
    """How a gain is read off two curves: a sketch with the paper's numbers for `cr`."""
    plot = Figure(figsize=(6, 3.6), layout="constrained")
    axes = plot.subplots()
    flops = [i / 100 for i in range(5, 101)]
    pt = [71.51 - 1.02 * (1 - x) / 0.35 - 16 * max(0, 0.65 - x) ** 2 for x in flops]
    axes.plot(flops, pt, "--", color="black", lw=2, label="pt")
    cr = [70.87 - 9 * (0.65 - x) ** 2 for x in flops if x <= 0.65]
    axes.plot(flops[: len(cr)], cr, "-", color="black", lw=2, label="cr")
    axes.axvline(0.65, color="0.6", lw=1, zorder=0)
    arrow = {**ARROW, "arrowstyle": "<->"}
    axes.annotate("", (0.65, 70.87), (0.65, 70.49), arrowprops=arrow)
    axes.text(0.63, 71.0, "cr ends: 70.87", ha="right")
    axes.text(0.67, 70.05, "pt stopped here: 70.49\ngain: 0.38", va="center")
    axes.text(0.99, 71.55, "pt ends: 71.51", ha="right", va="bottom")
    axes.set(xlabel="training FLOPs, as a share of pt's", ylabel="mean score")
    axes.set(ylim=(68, 72), xlim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return plot


def main():
    draw_schedule().savefig(HERE / "schedule.png", dpi=140)
    draw_neuron().savefig(HERE / "neuron.png", dpi=140)
    draw_gain().savefig(HERE / "gain.png", dpi=140)


if __name__ == "__main__":
    main()
