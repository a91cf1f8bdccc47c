"""
Every picture of the project, by matplotlib, to PNG. Nothing is imported from here but by a flag:

    python eval.py --curves=out/a,out/b        runs over their steps                  curves.png
    torchrun eval.py --picture                 policies side by side, axis by axis    eval.png
    python -m ablations.steer --sweep=safety --picture       the front along a stated weight
    python -m ablations.league_table --picture=league.png    the league of rules
    python -m ablations.league_front --picture=front.png     its front, by weightings
    python -m assets.pictures                  the logs of assets/real: curves.png

In all of them the learned score and the true one of one axis (or of one run) share a colour: solid
and dashed lines, filled and hollow points. Colours differ in lightness, too, so that they can be
told apart in grey.
"""
import glob
import json
import math
import os

from mogrpo import die, read_jsonl, require, say

try:
    import matplotlib
except ImportError:
    die("pictures need matplotlib: pip install matplotlib")
matplotlib.use("Agg")  # to a file, without a screen
from matplotlib import pyplot

COLORS = ["#16264c", "#a93226", "#4aa96c", "#e0a100", "#7fb2e5", "#8e5aa8", "#8a8a8a", "#5b3a1e"]
MARKERS = dict(zip(COLORS, "os^DvPX*"))
pyplot.rcParams.update({
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
})

def color(i):
    return COLORS[i % len(COLORS)]

def save(figure, path):
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    say(f"drawn: {path}")

def label_ends(plot, ends):
    """Write names of lines at their right ends, pushed apart where they would overlap -> the texts.
    `ends` are (height, name, color)."""
    bottom, top = plot.get_ylim()
    gap = 0.065 * (top - bottom)
    height = top + gap
    texts = []
    for y, name, of in sorted(ends, reverse=True):
        height = min(y, height - gap)
        texts.append(plot.text(1.02, height, name, color=of, va="center",
                               transform=plot.get_yaxis_transform()))
    return texts

# --------------------------------------------------------------------------------------------------
# Runs over their steps

def read_run(path):
    """A run's flags but for seed and out_dir, and {metric: ([steps], [values])}."""
    try:
        with open(f"{path}/config.json", encoding="utf-8") as f:
            flags = json.load(f)
    except (OSError, ValueError) as e:
        die(f"--curves: {path} is no run of mogrpo.py: {e}")
    for name in ("seed", "out_dir"):
        flags.pop(name, None)
    return flags, read_series(f"{path}/metrics.jsonl")

def read_series(path):
    series = {}
    for _, row in read_jsonl(path):
        for name, value in row.items():
            if value is not None:
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series

def runs_of_one_kind(paths):
    """Runs that differ in the seed alone are one kind -> {name: [series of each seed]}, named by
    the flags in which the kinds differ."""
    runs = [read_run(path) for path in paths]
    kinds = {}
    for flags, series in runs:
        kinds.setdefault(json.dumps(flags), []).append(series)
    first, _ = runs[0]
    differ = [name for name in first if len({json.dumps(flags.get(name)) for flags, _ in runs}) > 1]
    named = {}
    for (text, seeds), path in zip(kinds.items(), paths):
        flags = json.loads(text)
        name = " ".join(f"{flag}={flags.get(flag) or 'default'}" for flag in differ)
        named[name or os.path.basename(os.path.normpath(path))] = seeds
    return named

def line(plot, seeds, metric, of, true=False, faint=False):
    """Mean over seeds and a band from the lowest to the highest -> its last value, or None."""
    known = [series[metric] for series in seeds if metric in series]
    if not known:
        return None
    steps = known[0][0]
    for other, _ in known:
        steps = [step for step in steps if step in set(other)]
    rows = []
    for own_steps, values in known:
        at = dict(zip(own_steps, values))
        rows.append([at[step] for step in steps])
    columns = list(zip(*rows))
    means = [sum(column) / len(column) for column in columns]
    if faint:
        plot.plot(steps, means, color=of, linewidth=0.7, alpha=0.35)
        return None
    dashes = "--" if true else "-"
    if len(steps) == 2:
        dashes = ""  # before and after: nobody knows what was between
    markers = len(steps) < 40  # evaluations, not every step
    plot.plot(steps, means, color=of, linewidth=1.8, linestyle=dashes, markersize=5,
              marker=MARKERS[of] if markers else None, markerfacecolor="white" if true else of)
    if len(rows) > 1 and dashes:
        lows = [min(column) for column in columns]
        highs = [max(column) for column in columns]
        plot.fill_between(steps, lows, highs, color=of, alpha=0.08 if true else 0.16, linewidth=0)
    return means[-1]

def draw_axis(plot, seeds, axis, of):
    """Learned and true score of an axis; thin, the score on the training prompts at every step."""
    line(plot, seeds, f"score/{axis}", of, faint=True)
    line(plot, seeds, f"true/{axis}", of, true=True)
    return line(plot, seeds, f"eval/{axis}", of)

LEGEND = "held-out prompts: learned solid, true dashed and hollow; thin: training prompts"
OTHERS = dict(kl="KL to the reference", length="tokens a response", entropy="entropy, nats a token")

def curves(paths, out_dir):
    """curves.png. Of one kind of run: all axes together. Of several: a panel for each axis, in
    which they stand side by side. And KL, length and entropy."""
    named = runs_of_one_kind(paths)
    first = next(iter(named.values()))[0]
    axes = [name.removeprefix("score/") for name in first if name.startswith("score/")]
    require(axes, f"--curves: {paths[0]}/metrics.jsonl has no finished step")
    if len(named) == 1:
        figure = together(next(iter(named.values())), axes)
    else:
        figure = side_by_side(named, axes)
    os.makedirs(out_dir, exist_ok=True)
    save(figure, f"{out_dir}/curves.png")

def together(seeds, axes):
    figure = pyplot.figure(figsize=(10, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[2.2, 1])
    plot = figure.add_subplot(grid[0, :])
    ends = []
    for i, axis in enumerate(axes):
        y = draw_axis(plot, seeds, axis, color(i))
        ends.append((y or 0.0, axis, color(i)))
    label_ends(plot, ends)
    plot.set(ylabel="mean score", xlabel="step", title=LEGEND)
    plot.margins(x=0.01)
    for i, (metric, title) in enumerate(OTHERS.items()):
        plot = figure.add_subplot(grid[1, i])
        line(plot, seeds, metric, color(0))
        plot.set(title=title, xlabel="step")
    return figure

def side_by_side(named, axes):
    rows = math.ceil((len(axes) + len(OTHERS)) / 4)
    figure, plots = pyplot.subplots(rows, 4, figsize=(13, 3.2 * rows), layout="constrained")
    panels = [(axis, axis, draw_axis) for axis in axes]
    panels += [(metric, title, line) for metric, title in OTHERS.items()]
    for n, (metric, title, draw) in enumerate(panels):
        plot = plots.flat[n]
        ends = []
        for i, (name, seeds) in enumerate(named.items()):
            y = draw(plot, seeds, metric, color(i))
            ends.append((y or 0.0, name, color(i)))
        plot.set(title=title, xlabel="step")
        if n % 4 == 3:  # at the end of each row of panels, and where it ends early
            label_ends(plot, ends)
    for plot in plots.flat[len(panels):]:
        plot.axis("off")
    if len(panels) % 4 > 0:
        for text in label_ends(plots.flat[len(panels) - 1], ends):
            text.set_in_layout(False)  # beside it is an empty place
    figure.suptitle(LEGEND)
    return figure

# --------------------------------------------------------------------------------------------------
# Policies side by side

def table(path, rows):
    """eval.py's table {measure: {policy: dict of mean: (value, low, high)}}, axis by axis."""
    axes = [name for name in rows if name not in ("refuses", "tokens", "distinct-2")]
    axes = [name for name in axes if not name.startswith("true/")]
    require(axes, "--picture: nothing has scored the answers")
    policies = list(rows[axes[0]])
    width = len(policies) + 1  # one place stays free between axes
    figure, plot = pyplot.subplots(figsize=(2 + 0.62 * width * len(axes), 4.5))
    ticks = []
    for i, axis in enumerate(axes):
        for at, policy in enumerate(policies):
            ticks.append(i * width + at)
            for measure, shift, face in ((axis, -0.1, color(i)), (f"true/{axis}", 0.14, "white")):
                if measure in rows:
                    mean, low, high = rows[measure][policy]["mean"]
                    plot.errorbar(ticks[-1] + shift, mean, [[mean - low], [high - mean]],
                                  fmt=MARKERS[color(i)], color=color(i), markerfacecolor=face, markersize=8, capsize=3)
        plot.text(i * width + len(policies) / 2 - 0.5, 1.02, axis, color=color(i), ha="center",
                  transform=plot.get_xaxis_transform())
    plot.set_xticks(ticks, policies * len(axes), rotation=35, ha="right")
    plot.grid(axis="x", visible=False)
    plot.set_ylabel("mean score, 95 % interval\n(filled: learned, hollow: true)")
    save(figure, path)

def sweep(path, axis, points_of):
    """ablations/steer's {axis: [(stated share of the weight, mean, half its interval)]}."""
    figure, plot = pyplot.subplots(figsize=(8, 4.8))
    names = list(dict.fromkeys(name.removeprefix("true/") for name in points_of))
    ends = []
    for name, points in points_of.items():
        shares, means, halves = zip(*points)
        of = color(names.index(name.removeprefix("true/")))
        true = name.startswith("true/")
        plot.errorbar(shares, means, halves, color=of, linestyle="--" if true else "-",
                      marker=MARKERS[of], markerfacecolor="white" if true else of, capsize=2)
        if not true:
            ends.append((means[-1], name, of))
    label_ends(plot, ends)
    plot.set(xlabel=f"stated weight of {axis}", ylabel="mean score, 95 % interval",
             title="solid learned, dashed true")
    save(figure, path)

# --------------------------------------------------------------------------------------------------
# The league of rules

def league(path, rules, twists, average, compare):
    """ablations/league_table's measures, each a map of rules by twists: the darker, the lower. A
    triangle is a difference to `sum` that is shown; in brackets, one at another KL."""
    measures = dict(mean="mean of the true axes", worst="worst true axis")
    figure, plots = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for plot, (measure, title) in zip(plots, measures.items()):
        rows = [[average(measure, rule, twist) for twist in twists] for rule in rules]
        known = [value for row in rows for value in row if not math.isnan(value)]
        middle = (min(known) + max(known)) / 2
        plot.imshow(rows, cmap="Greys_r", vmin=min(known), vmax=max(known), aspect="auto")
        for y, rule in enumerate(rules):
            for x, twist in enumerate(twists):
                value = rows[y][x]
                if math.isnan(value):  # no run yet
                    continue
                gain, _, _, mark = compare(measure, rule, twist)
                arrow = "\u25b2" if gain > 0 else "\u25bc"
                text = {"": "", "*": f" {arrow}", "kl": f" ({arrow})"}[mark]
                plot.text(x, y, f"{value:.2f}{text}", ha="center", va="center",
                          color="white" if value < middle else "black")
        plot.set_xticks(range(len(twists)), twists, rotation=30, ha="right")
        plot.set_yticks(range(len(rules)), rules)
        plot.set_title(title)
        plot.grid(visible=False)
    figure.supxlabel("\u25b2 \u25bc better, worse than sum; in brackets at another KL", fontsize=12)
    save(figure, path)

def front(path, points_of):
    """ablations/league_front's {rule: [true scores of each weighting]}, two axes against two."""
    figure, plots = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    pairs = ("actionability", "safety"), ("politeness", "meaningfulness")
    for plot, (x, y) in zip(plots, pairs):
        for i, (rule, points) in enumerate(points_of.items()):
            across = [point[f"true/{x}"] for point in points]
            up = [point[f"true/{y}"] for point in points]
            plot.plot(across, up, MARKERS[color(i)], color=color(i), markersize=9,
                      markerfacecolor="none", markeredgewidth=1.8, label=rule)
            for number, place in enumerate(zip(across, up)):
                plot.annotate(number, place, (6, 5), textcoords="offset points", color=color(i),
                              fontsize=10)
        plot.set(xlabel=f"true {x}", ylabel=f"true {y}")
    plots[0].legend()
    save(figure, path)

# --------------------------------------------------------------------------------------------------
# The real runs

def logs(paths, path):
    """A panel for each metrics.jsonl: the mean score of each axis on the training prompts of every
    step, and at both ends that of the held-out ones."""
    figure, plots = pyplot.subplots(2, 4, figsize=(15, 6), layout="constrained", sharey=True)
    color_of = {}  # an axis has one in all panels
    for plot, log in zip(plots.flat, paths):
        for name, (steps, scores) in read_series(log).items():
            kind, _, axis = name.partition("/")
            if kind not in ("score", "eval"):
                continue
            of = color_of.setdefault(axis, color(len(color_of)))
            if kind == "score":
                plot.plot(steps, scores, color=of, marker=MARKERS[of], markersize=4, label=axis)
            else:
                plot.plot(steps, scores, MARKERS[of], color=of, markersize=9,
                          markerfacecolor="white")
        plot.set(title=os.path.basename(log).removesuffix(".jsonl"), xlabel="step")
        plot.legend(fontsize=9)
    for plot in plots.flat[len(paths):]:
        plot.axis("off")
    figure.suptitle("mean scores; lines: training prompts, hollow: held-out prompts")
    save(figure, path)


if __name__ == "__main__":
    logs(sorted(glob.glob("assets/real/*.jsonl")), "assets/real/curves.png")
