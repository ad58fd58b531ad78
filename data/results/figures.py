"""Every picture of the project: as text, and as PNG by matplotlib.

    python -m data.results.figures levels eval.json     accuracy by level and evaluations
    python -m data.results.figures nfe eval.json        evaluations of the adaptive solvers by level
    python -m data.results.figures trace trace.html     the predictions of one token over t
    python -m data.results.figures log log.jsonl        loss and learning rate of a training run
    python -m data.results.figures tenths log.jsonl     its validation loss by tenth of t
    python -m data.results.figures mask                 the attention mask of the path in training

eval.py writes eval.json, `sample.py --trace --html trace.html` the page of a trace, train.py
log.jsonl. Nothing here runs a model.
"""

import argparse
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

from data.results.records import read_lines
from data.results.statistics import mean, only, unique
from data.system.command import choices, command, given_flags, has_colours, refuse_idle
from data.system.disk import (
    appearing, check_absent, check_writable, decode, parse_json, read_bytes, read_json)

WIDTH = 81      # columns of a text picture
SHADES = (27, 33, 39, 49, 82, 190, 220, 208, 196)      # of a 256-colour terminal, blue to red


# --- text -----------------------------------------------------------------------------------------

def draw_points(points, low: float, high: float) -> str:
    """Numbers as one line of text: o for one in a column, 2 to 9 for several, + for more."""
    last = WIDTH - 1
    places = (round((point - low) / (high - low) * last) for point in points)
    # a point outside is drawn at the border
    counts = Counter(min(last, max(0, place)) for place in places)
    marks = " o23456789+"
    return "".join(marks[min(counts[place], 10)] for place in range(WIDTH)).rstrip()


def coloured(pieces, costs) -> str:
    """Tokens on a background from blue (low NFE) to red (high NFE), or followed by their NFE."""
    if not has_colours():
        return " ".join(f"{piece!r}:{cost}" for piece, cost in zip(pieces, costs))
    low, high = min(costs), max(costs)
    text = ""
    for piece, cost in zip(pieces, costs):
        shade = SHADES[(len(SHADES) - 1) * (cost - low) // max(1, high - low)]
        text += f"\033[48;5;{shade}m\033[38;5;16m{piece}\033[0m"
    return f"{text}   NFE from {low} (blue) to {high} (red)"


def trace_text(answer, tokenizer, token: int) -> str:
    """The NFE of every token of an answer, and the predictions of one of them.

    Raises ValueError for a token that the answer does not have.
    """
    pieces = [tokenizer.decode([i]) for i in answer.ids]
    if len(pieces) < len(answer.nfe):
        pieces.append("<stop>")
    if not 0 <= token < len(pieces):
        raise ValueError(f"--trace_token = {token} is out of range; this answer has "
                         f"{len(pieces)} tokens, allowed: 0 to {len(pieces) - 1}")
    lines = [
        f"   tokens: {coloured(pieces, answer.nfe)}",
        f"   token {token} ({pieces[token]!r}), prediction at every evaluation:",
    ]
    for t, prediction, p in answer.traces[token].predictions:
        lines.append(f"     t = {t:.4f}  {tokenizer.decode([prediction])!r:8} p = {p:.3f}")
    return "\n".join(lines)


# --- matplotlib -----------------------------------------------------------------------------------

def new_figure(width: float = 8, height: float = 4.5):
    """An empty figure, in inches. Raises ValueError where matplotlib is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed; "
                         "pip install matplotlib") from None
    # without pyplot: no window or screen is needed, and no figure stays in memory
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path):
    """Write the whole picture, or keep the old file."""
    with appearing(path) as part:
        figure.savefig(part, dpi=150, format="png")


# --- accuracy and evaluations ---------------------------------------------------------------------

def read_cells(path: Path, topic: str) -> list:
    """The greedy records on a topic in an eval.json. Raises ValueError where there are none."""
    records = read_json(path)["accuracy"]
    cells = only(records, topic=topic, temperature=0)
    if not cells:
        raise ValueError(f"no greedy results on {topic} in this file; "
                         f"allowed: {', '.join(unique(r['topic'] for r in records))}")
    return cells


def draw_levels(axis, cells: list):
    """Accuracy of the frozen model and of the first fixed solver: a row per level, NFE to scale.

    cells: the records of one topic at one temperature.
    """
    fixed = only(cells, kind="fixed")
    solver = fixed[0]["settings"]["solver"] if fixed else "no solver"
    shown = only(cells, kind="frozen") + [r for r in fixed if r["settings"]["solver"] == solver]
    nfe = [r["nfe_per_token"] for r in shown]
    levels = [r["level"] for r in shown]
    accuracy = [100 * r["accuracy"] for r in shown]
    squares = axis.scatter(nfe, levels, c=accuracy, vmin=0, vmax=100, marker="s", s=170)
    axis.figure.colorbar(squares, label="accuracy in %")
    axis.set_xticks(unique(nfe), [f"{value:g}" for value in unique(nfe)])
    axis.set_yticks(unique(levels))
    level = level_name(cells)
    axis.set(xlabel=f"evaluations for each token, {solver} (0: frozen model)", ylabel=level,
             title=f"{cells[0]['topic']}: accuracy by {level} and evaluations")
    for border in trained_borders(cells):
        axis.axhline(border, color="black", linestyle="--", linewidth=1)
        # beside the last column
        axis.annotate("not trained", (1, border), (5, 4), rotation=90,
                      xycoords=axis.get_yaxis_transform(), textcoords="offset points")


def draw_nfe(axis, cells: list):
    """Evaluations for the first token of an answer by level, a line per adaptive solver."""
    adaptive = only(cells, kind="adaptive")
    if not adaptive:
        raise ValueError("no greedy adaptive results on this topic in this file; "
                         "make them with: python eval.py --solvers euler dopri5")
    for column in unique(r["column"] for r in adaptive):
        line = only(adaptive, column=column)
        axis.plot([r["level"] for r in line], [r["nfe_first"] for r in line], "o-", label=column)
    axis.set_xticks(unique(r["level"] for r in adaptive))
    axis.set(xlabel=level_name(cells), ylabel="evaluations for the first token, mean",
             ylim=(0, None), title=f"{cells[0]['topic']}: evaluations of adaptive solvers")
    axis.legend()
    for border in trained_borders(cells):
        axis.axvline(border, color="black", linestyle="--", linewidth=1)
        axis.annotate("not trained", (border, 1), (5, 0), textcoords="offset points")


def level_name(cells: list) -> str:
    return "hops" if cells[0]["topic"] == "chains" else "level"


def trained_borders(cells: list) -> list:
    """The place between the levels that were trained and harder ones; [] without harder ones."""
    trained = [r["level"] for r in cells if not r["unseen"]]
    return [max(trained) + 0.5] if 0 < len(trained) < len(cells) else []


def plot_accuracy(records: list, path: Path):
    """The picture of eval.py --plot: levels, and beside them the adaptive solvers, if any.

    records: the "accuracy" entries of eval.json. Shown are the first topic and temperature.
    """
    first = records[0]
    cells = only(records, topic=first["topic"], temperature=first["temperature"])
    panels = [draw_levels, draw_nfe] if only(cells, kind="adaptive") else [draw_levels]
    figure = new_figure(8 * len(panels), 4.8)
    temperature = first["temperature"]
    figure.suptitle(f"temperature {temperature:g}" if temperature else "greedy")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, draw in zip(axes, panels):
        draw(axis, cells)
    save(figure, path)


# --- one token ------------------------------------------------------------------------------------

# sign, colour and name of each kind of prediction in page.trace_data
MARKS = {
    "frozen": ("D", "C4", "frozen prediction"),
    "evaluation": ("o", "C0", "evaluation"),
    "rejected": ("x", "C3", "evaluation of a rejected step"),
    "final": ("s", "C2", "final evaluation"),
}


def read_trace(path: Path) -> list:
    """The predictions of the token that a page shows first: [t, word, p, kind] each."""
    text = decode(read_bytes(path), path)
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S)
    trace = parse_json(found[1], path)
    return trace["tokens"][trace["first"]]["predictions"]


def draw_trace(figure, predictions: list):
    """The predictions of one token over t: a lane for each word, in a lane p upwards."""
    words = unique(word for _, word, _, _ in predictions)
    figure.set_figheight(1.5 + 0.45 * len(words))
    axis = figure.subplots()
    # the first word is the highest lane; a factor of 0.7 leaves room between lanes
    floor = {word: len(words) - 1 - place for place, word in enumerate(words)}
    points = [(t, floor[word], floor[word] + 0.7 * p, kind) for t, word, p, kind in predictions]
    line = [(t, top) for t, _, top, kind in points if kind != "rejected"]
    axis.plot(*zip(*line), ":", color="0.5", zorder=0)
    axis.hlines(range(len(words)), -0.02, 1.02, colors="0.8", linewidth=0.8, zorder=0)
    for kind in unique(kind for *_, kind in predictions):
        sign, colour, name = MARKS[kind]
        t, low, top, _ = zip(*(point for point in points if point[3] == kind))
        axis.vlines(t, low, top, colors=colour, linewidth=1)
        axis.plot(t, top, sign, color=colour, label=name)
    # dollar signs in a word do not make it a formula
    axis.set_yticks([floor[word] + 0.35 for word in words], words, family="monospace",
                    parse_math=False)
    axis.tick_params(axis="y", length=0)
    axis.set(xlabel="t (0: noise, 1: token)", xlim=(-0.02, 1.02), ylim=(-0.1, len(words)))
    axis.set_ylabel("prediction; height: probability", labelpad=10)
    axis.spines[["left", "top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)


# --- a training run -------------------------------------------------------------------------------

def read_log(path: Path) -> list:
    """The updates and validations in a log.jsonl. Raises ValueError where there is no update."""
    entries = read_lines(path)
    if not any("update" in entry and "loss" in entry for entry in entries):
        raise ValueError(f"{path} holds no update; make it with: python train.py")
    return entries


def points(entries: list, name: str) -> tuple:
    """(updates, values) of a number; of an update that was repeated after a resume, the last."""
    found = {entry["update"]: entry[name] for entry in entries if name in entry}
    return sorted(found), [found[update] for update in sorted(found)]


def draw_log(figure, entries: list):
    """Training loss, its running mean and validation loss above; the learning rate below."""
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    updates, losses = points(entries, "loss")
    running = [mean(losses[max(0, i - 19):i + 1]) for i in range(len(losses))]
    above.plot(updates, losses, color="0.8", label="each update")
    above.plot(updates, running, color="C0", label="mean of 20")
    above.plot(*points(entries, "val_loss"), "o-", color="C1", label="validation")
    above.set_ylabel("loss")
    above.legend()
    below.plot(*points(entries, "lr"), color="C2")
    below.set(xlabel="update", ylabel="learning rate")


def draw_tenths(figure, entries: list):
    """The validation loss in each tenth of t, a line per validation."""
    validations = [entry for entry in entries if "by_tenth" in entry]
    if not validations:
        raise ValueError("this log holds no loss by tenth of t; allowed: the log.jsonl of a path")
    from matplotlib import colormaps
    axis = figure.subplots()
    middles = [(tenth + 0.5) / 10 for tenth in range(10)]
    for place, entry in enumerate(validations):
        # a tenth may be empty
        losses = [math.nan if loss is None else loss for loss in entry["by_tenth"]]
        colour = colormaps["viridis"](place / len(validations))
        axis.plot(middles, losses, "o-", color=colour, label=f"update {entry['update']}")
    axis.set(xlabel="t (0: noise, 1: token)", ylabel="validation loss", xlim=(0, 1))
    axis.legend(fontsize=8)


# --- the method -----------------------------------------------------------------------------------

def draw_mask(figure):
    """The keys that each noisy token attends to in training: frozen ones, before its position."""
    tokens = ("the", "cat", "sat", "on", "the", "mat", ".")
    count = len(tokens) - 1
    axis = figure.subplots()
    attended = [[int(key <= query) for key in range(count)] + [0] * count
                for query in range(count)]
    # the token at position n + 1 is predicted from position n
    names = [f"{token}\n{place}" for place, token in enumerate(tokens, 1)]
    axis.pcolormesh(attended, cmap="Blues", vmin=0, vmax=1.4, edgecolors="0.7", linewidth=0.5)
    axis.invert_yaxis()
    axis.axvline(count, color="black")
    axis.set_xticks([n + 0.5 for n in range(2 * count)], names[:count] + names[1:])
    axis.set_yticks([n + 0.5 for n in range(count)],
                    [name.replace("\n", "  ") for name in names[1:]])
    axis.tick_params(length=0)
    axis.set(xlabel="key: token and position", ylabel="query: noisy token and position")
    axis.set_title("keys of the frozen model", loc="left")
    axis.set_title("keys of noisy tokens: none is attended to", loc="right")


# --- the command line -----------------------------------------------------------------------------

MAKERS = {
    "eval.json": "python eval.py",
    "trace.html": "python sample.py --trace --html trace.html --prompt ...",
    "log.jsonl": "python train.py",
}
# the file that a picture shows, if any, and the function that draws it
PICTURES = {
    "levels": ("eval.json", draw_levels),
    "nfe": ("eval.json", draw_nfe),
    "trace": ("trace.html", draw_trace),
    "log": ("log.jsonl", draw_log),
    "tenths": ("log.jsonl", draw_tenths),
    "mask": (None, draw_mask),
}


@command("data.results.figures")
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", default="", help="name of the picture")
    parser.add_argument("files", nargs="*", metavar="file", help="its file")
    parser.add_argument("--topic", default="chains",
                        help="topic of levels and nfe (default: chains)")
    parser.add_argument("--out", help="name of the picture's file (default: KIND.png beside FILE)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier picture")
    args = parser.parse_args(argv)
    name, draw = PICTURES[choices(args.kind, PICTURES, "picture")]
    refuse_idle(given_flags(parser, argv), [(("topic",), name == "eval.json", "levels or nfe")])
    if len(args.files) != (1 if name else 0):
        wanted = f"one file, {name} (from {MAKERS[name]})" if name else "no file"
        raise ValueError(f"{args.kind} takes {wanted}, not {len(args.files)}")
    file = Path(args.files[0]) if name else None
    out = Path(args.out or (file.parent if name else Path()) / f"{args.kind}.png")
    check_absent(out, args.overwrite)
    check_writable(out)
    figure = new_figure()
    try:
        if name == "eval.json":
            draw(figure.subplots(), read_cells(file, args.topic))
        elif name == "trace.html":
            draw(figure, read_trace(file))
        elif name == "log.jsonl":
            draw(figure, read_log(file))
        else:
            draw(figure)
        save(figure, out)
    # the file may be of another program
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError):
        raise ValueError(f"{file} has an unexpected form; make it with: {MAKERS[name]}") from None
    print(out)


if __name__ == "__main__":
    main()
