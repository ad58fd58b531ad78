"""Every picture of the project, each with one thing to say: in text, and as PNG by matplotlib.

    python -m data.results.figures levels eval.json   harder problems need more evaluations
    python -m data.results.figures nfe eval.json   and adaptive ways spend them there
    python -m data.results.figures curves eval.json   accuracy of every row of a results file
    python -m data.results.figures ways a.json b.json   several ways to train, side by side
    python -m data.results.figures trace trace.html   one token's guesses on the way from noise
    python -m data.results.figures mask   what a noisy token may look at
    python -m data.results.figures log out/log.jsonl   loss and learning rate of a training
    python -m data.results.figures tenths out/log.jsonl   its validation loss by time

Pictures are made from numbers that somebody else has measured; nothing here runs a model.
"""

import argparse
import math
import os
import re
import sys
from pathlib import Path

from data.results.statistics import mean, only, unique
from data.system.command import command
from data.system.disk import appearing, check_absent, check_writable, decode, parse_json, read_json

WIDTH = 81      # columns of a text picture


def draw_points(points, low: float, high: float) -> str:
    """Numbers as one line of text: o for one, 2 to 9 for several in a column, + for more."""
    last = WIDTH - 1
    counts = [0] * WIDTH
    for point in points:
        place = round((point - low) / (high - low) * last)
        # what lies outside is drawn at the border
        place = min(last, max(0, place))
        counts[place] += 1
    marks = " o23456789+"
    line = "".join(marks[min(count, 10)] for count in counts)
    return line.rstrip()


SHADES = (27, 33, 39, 49, 82, 190, 220, 208, 196)      # of a 256-colour terminal, blue to red


def coloured(pieces, costs) -> str:
    """Tokens on a background from blue (cheap) to red (dear), or followed by their NFE."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return " ".join(f"{piece!r}:{cost}" for piece, cost in zip(pieces, costs))
    low = min(costs)
    high = max(costs)
    spread = max(1, high - low)
    text = ""
    for piece, cost in zip(pieces, costs):
        place = (len(SHADES) - 1) * (cost - low) // spread
        shade = SHADES[place]
        text += f"\033[48;5;{shade}m\033[38;5;16m{piece}\033[0m"
    return f"{text}   NFE from {low} (blue) to {high} (red)"


def trace_text(answer, tokenizer, token: int) -> str:
    """The NFE of every token of an answer, and the guesses that led to one of them.

    Raises ValueError for a token that the answer does not have.
    """
    pieces = [tokenizer.decode([i]) for i in answer.ids]
    if len(pieces) < len(answer.nfe):
        pieces.append("<stop>")
    if not 0 <= token < len(answer.nfe):
        raise ValueError(f"--trace_token {token} is out of range; this answer has "
                         f"{len(answer.nfe)} tokens, allowed: 0 to {len(answer.nfe) - 1}")
    lines = [
        f"   tokens: {coloured(pieces, answer.nfe)}",
        f"   token {token} ({pieces[token]!r}), prediction at every evaluation:",
    ]
    for t, prediction, p in answer.traces[token].predictions:
        lines.append(f"     t = {t:.4f}  {tokenizer.decode([prediction])!r:8} p = {p:.3f}")
    return "\n".join(lines)


def import_pyplot():
    """matplotlib, which only pictures need. Raises ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed; "
                         "pip install matplotlib") from None
    matplotlib.use("Agg")       # files only: no window is needed, nor a screen
    import matplotlib.pyplot as plt
    return plt


def plot_accuracy(records: list, path: Path):
    """Accuracy against NFE per token, a line per group, a panel per temperature.

    records: the "accuracy" entries of eval.json. The frozen model stands at NFE 0, then the steps
    of the first fixed solver.
    """
    plt = import_pyplot()
    temperatures = unique(r["temperature"] for r in records)
    size = (6 * len(temperatures), 4)
    figure, axes = plt.subplots(1, len(temperatures), figsize=size, sharey=True, squeeze=False)
    for axis, temperature in zip(axes[0], temperatures):
        panel = only(records, temperature=temperature)
        shown = of_first_solver(panel)
        groups = unique(r["group"] for r in shown)
        for place, group in enumerate(groups):
            line = by_nfe(only(shown, group=group))
            colour = plt.cm.viridis(place / len(groups))
            draw_curve(axis, line, group, colour)
        title = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        axis.set(xlabel="NFE per token (0: frozen model)", xscale="symlog", title=title)
    axes[0][0].set(ylabel="accuracy")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def of_first_solver(records: list) -> list:
    """The frozen model and the fixed steps of the first solver that has such."""
    frozen = only(records, kind="frozen")
    fixed = only(records, kind="fixed")
    solvers = [r["settings"]["solver"] for r in fixed]
    return frozen + [r for r, solver in zip(fixed, solvers) if solver == solvers[0]]


def by_nfe(records: list) -> list:
    return sorted(records, key=lambda r: r["nfe_per_token"])


def plot_ways(results: dict, topic: str, path: Path):
    """Left: greedy accuracy on a topic against NFE, a line per way. Right: NFE by level.

    results: name -> the "accuracy" entries of eval.json. Accuracy is the mean over the levels that
    were trained on. A model without a path is one height, whatever the evaluations.
    """
    plt = import_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, records in results.items():
        some = greedy(records, topic)
        line = mean_curve(only(some, unseen=False))
        if len(line) == 1:
            left.axhline(line[0][1], linestyle="--", color=f"C{len(left.lines)}", label=name)
        else:
            left.plot(*zip(*line), marker="o", color=f"C{len(left.lines)}", label=name)
        draw_efforts(right, some, f"{name}, ")
    left.set(xlabel="evaluations of the path per token (0: frozen model)", xscale="symlog",
             ylabel="accuracy", title=f"{topic}: mean over the levels, greedy")
    left.set_xlim(left=-0.1)
    right.set(xlabel="level", ylabel="evaluations", title="what a problem is worth")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def draw_efforts(axis, records: list, prefix: str = ""):
    """NFE by level, a line per adaptive way."""
    adaptive = only(records, kind="adaptive")
    for column in unique(r["column"] for r in adaptive):
        cells = only(adaptive, column=column)
        levels = [r["level"] for r in cells]
        nfe = [r["nfe_first"] for r in cells]
        axis.plot(levels, nfe, marker="o", label=f"{prefix}{column}")


def mean_curve(records: list) -> list:
    """(NFE, mean accuracy) of the frozen model and of the first fixed solver, by NFE."""
    shown = of_first_solver(records)
    points = []
    for column in unique(r["column"] for r in shown):
        cells = only(shown, column=column)
        nfe = mean(r["nfe_per_token"] for r in cells)
        accuracy = mean(r["accuracy"] for r in cells)
        points.append((nfe, accuracy))
    return sorted(points)


def draw_curve(axis, line, label: str, colour):
    """One curve with its intervals."""
    x = [r["nfe_per_token"] for r in line]
    y = [r["accuracy"] for r in line]
    # matplotlib wants the lengths of the two halves, and none that rounding has made negative
    below = [max(0.0, r["accuracy"] - r["low"]) for r in line]
    above = [max(0.0, r["high"] - r["accuracy"]) for r in line]
    axis.errorbar(x, y, [below, above], marker="o", label=label, color=colour)


def save(figure, path: Path):
    """The picture appears whole, or the old one stays."""
    with appearing(path) as part:
        figure.savefig(part, dpi=150, format="png")
    # pyplot keeps every figure until it is told
    import_pyplot().close(figure)


def greedy(records: list, topic: str) -> list:
    """The results on a topic at temperature 0."""
    return only(records, topic=topic, temperature=0)


def read_accuracy(path: Path) -> list:
    """The accuracies in what eval.py wrote. Raises ValueError for another file."""
    records = read_json(path).get("accuracy")
    wanted = {"group", "topic", "level", "unseen", "temperature", "column", "kind", "settings",
              "accuracy", "low", "high", "nfe_per_token", "nfe_first"}
    whole = isinstance(records, list) and all(
        isinstance(r, dict) and wanted <= r.keys() for r in records)
    if not records or not whole:
        raise ValueError(f"{path} was not written by eval.py: it lacks the accuracies")
    return records


# --- a training -----------------------------------------------------------------------------------

def read_log(path: Path) -> list:
    """The updates and validations in a log.jsonl. Raises ValueError for another file."""
    entries = []
    for number, line in enumerate(decode(path.read_bytes(), path).split("\n"), 1):
        entry = parse_json(line, f"line {number} of {path}") if line.strip() else {}
        if not isinstance(entry, dict):
            raise ValueError(f"line {number} of {path} was not written by train.py")
        entries.append(entry)
    updates = [entry for entry in entries if is_number(entry.get("update"))]
    if not any(is_number(entry.get("loss")) for entry in updates):
        raise ValueError(f"{path} holds no update; allowed: the log.jsonl of a training")
    return updates


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def points(entries: list, name: str) -> tuple:
    """(updates, values) of everything that has this number; what was done twice counts once."""
    found = {entry["update"]: entry[name] for entry in entries if is_number(entry.get(name))}
    return sorted(found), [found[update] for update in sorted(found)]


def smooth(values: list, width: int = 20) -> list:
    """The mean of the last `width`, for the eye."""
    return [mean(values[max(0, i - width + 1):i + 1]) for i in range(len(values))]


def plot_log(entries: list, path: Path):
    """Loss, its running mean and the validation's above; the learning rate below."""
    pyplot = import_pyplot()
    figure, (above, below) = pyplot.subplots(
        2, sharex=True, figsize=(7, 5), height_ratios=[3, 1], layout="constrained")
    updates, losses = points(entries, "loss")
    above.plot(updates, losses, color="0.8", label="each update")
    above.plot(updates, smooth(losses), color="C0", label="mean of 20")
    above.plot(*points(entries, "val_loss"), "o-", color="C1", label="validation")
    above.set_ylabel("loss")
    above.legend()
    below.plot(*points(entries, "lr"), color="C2")
    below.set_ylabel("learning rate")
    below.set_xlabel("update")
    save(figure, path)


def plot_tenths(entries: list, path: Path):
    """What was learned at which time: the validation loss in each tenth of t, a line a look."""
    pyplot = import_pyplot()
    looks = [entry for entry in entries if isinstance(entry.get("by_tenth"), list)]
    if not looks:
        raise ValueError("this log holds no loss by tenth of t; allowed: the log.jsonl of a path")
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    middles = [(tenth + 0.5) / 10 for tenth in range(10)]
    for place, look in enumerate(looks):
        colour = pyplot.cm.viridis(place / len(looks))
        # a tenth may be empty
        losses = [math.nan if loss is None else loss for loss in look["by_tenth"]]
        axis.plot(middles, losses, "o-", color=colour, label=f"update {look['update']}")
    axis.set(xlabel="t (0: noise, 1: the token)", ylabel="validation loss", xlim=(0, 1),
             title="what was learned at which time")
    axis.legend(fontsize=8)
    save(figure, path)


# --- difficulty -----------------------------------------------------------------------------------

def plot_levels(records: list, topic: str, path: Path):
    """Greedy accuracy of one topic, a row per level, a column per number of evaluations."""
    pyplot = import_pyplot()
    some = greedy(records, topic)
    levels = unique(r["level"] for r in some)
    if not levels:
        raise ValueError(f"no greedy results on {topic} in this file; "
                         f"allowed: {', '.join(unique(r['topic'] for r in records))}")
    rows = [by_nfe(of_first_solver(only(some, level=level))) for level in levels]
    figure, axis = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    accuracies = [[100 * r["accuracy"] for r in row] for row in rows]
    shown = axis.imshow(accuracies, cmap="viridis", vmin=0, vmax=100, aspect="auto", origin="lower")
    axis.set_xticks(range(len(rows[0])), [f"{r['nfe_per_token']:.0f}" for r in rows[0]])
    axis.set_yticks(range(len(levels)), levels)
    axis.set(xlabel="evaluations of the path per token (0: the frozen model)", ylabel="level",
             title=f"{topic}: harder problems need more evaluations")
    figure.colorbar(shown, label="right, in %")
    save(figure, path)


def plot_nfe(records: list, topic: str, path: Path):
    """Evaluations of an answer's first token by level, a line per adaptive way."""
    pyplot = import_pyplot()
    some = greedy(records, topic)
    if not only(some, kind="adaptive"):
        raise ValueError(f"no greedy adaptive results on {topic} in this file; "
                         "measure with --solvers dopri5 or --stop_unchanged 2")
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    draw_efforts(axis, some)
    axis.set(xlabel="level", ylabel="evaluations, mean", ylim=(0, None),
             title=f"{topic}: adaptive ways spend more on harder problems")
    axis.legend(fontsize=8)
    save(figure, path)


# --- the method -----------------------------------------------------------------------------------

def plot_mask(path: Path, words=("the", "cat", "sat", "on", "the", "mat")):
    """Which frozen keys each noisy token sees in training: a triangle, and no noisy token."""
    pyplot = import_pyplot()
    count = len(words)
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    # the frozen model's keys, then the path's own tokens
    seen = [[int(key <= query) for key in range(count)] + [0] * count for query in range(count)]
    axis.imshow(seen, cmap="Blues", vmin=0, vmax=1.4, aspect="equal")
    axis.set_xticks(range(2 * count), [*words, *(f"x{n + 2}" for n in range(count))])
    axis.set_yticks(range(count), [f"x{n + 2} after {word!r}" for n, word in enumerate(words)])
    for edge in range(2 * count):
        axis.axvline(edge + 0.5, color="0.4", linewidth=2 if edge == count - 1 else 0.2)
        axis.axhline(min(edge, count - 1) + 0.5, color="0.4", linewidth=0.2)
    axis.set(xlabel="keys: of the frozen model, and of the noisy tokens",
             ylabel="queries: noisy vectors of the next token",
             title="a noisy token sees its own past, and no other noisy token")
    save(figure, path)


# --- one token ------------------------------------------------------------------------------------

def read_trace(path: Path) -> dict:
    """What sample.py --trace --html wrote about its tokens. Raises ValueError for another page."""
    text = decode(path.read_bytes(), path)
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S)
    trace = parse_json(found[1], path) if found else None
    if not isinstance(trace, dict) or not {"first", "tokens", "words"} <= trace.keys():
        raise ValueError(f"{path} is no page of a trace; make one with: "
                         "python sample.py --trace --html trace.html --prompt ...")
    return trace


def plot_trace(trace: dict, path: Path):
    """The guesses of one token on the way from noise, in words above their probability."""
    pyplot = import_pyplot()
    token = trace["tokens"][trace["first"]]
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    kept = [prediction for prediction in token["predictions"] if prediction[3]]
    axis.plot([t for t, *_ in kept], [p for _, _, p, _ in kept], color="0.8", zorder=0)
    for t, prediction, p, accepted in token["predictions"]:
        axis.plot(t, p, "o" if accepted else "x", color="C0" if accepted else "0.6")
        # a step that was rejected led nowhere
        if accepted:
            axis.annotate(trace["words"][str(prediction)], (t, p), xytext=(0, 8), ha="center",
                          textcoords="offset points", family="monospace")
    axis.set(xlabel="t (0: noise, and the frozen model's answer; 1: the token)", xlim=(-0.03, 1.03),
             ylabel="probability", ylim=(0, 1.15),
             title=f"on the way to {token['word']!r}: a prediction at every evaluation")
    save(figure, path)


PICTURES = ("levels", "nfe", "curves", "ways", "trace", "mask", "log", "tenths")


def draw(args, out: Path):
    """One picture, from the files it is of. Raises ValueError for files of another kind."""
    files = [Path(name) for name in args.files]
    if (args.kind == "mask") == bool(files) or (args.kind != "ways" and len(files) > 1):
        raise ValueError(f"{args.kind} takes {'no' if args.kind == 'mask' else 'one'} file "
                         f"(ways takes several), not {len(files)}")
    if args.kind == "mask":
        return plot_mask(out)
    if args.kind == "trace":
        return plot_trace(read_trace(files[0]), out)
    if args.kind in ("log", "tenths"):
        plot = plot_log if args.kind == "log" else plot_tenths
        return plot(read_log(files[0]), out)
    results = {file.stem: read_accuracy(file) for file in files}
    first = results[files[0].stem]
    try:
        if args.kind == "ways":
            plot_ways(results, args.topic, out)
        elif args.kind == "curves":
            plot_accuracy(first, out)
        else:
            plot = plot_levels if args.kind == "levels" else plot_nfe
            plot(first, args.topic, out)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{', '.join(args.files)}: a record has an unexpected form: {error!r}")


@command("data.results.figures")
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=PICTURES)
    parser.add_argument("files", nargs="*", help="what eval.py, train.py or sample.py wrote")
    parser.add_argument("--topic", default="chains",
                        help="of levels, nfe and ways (default: chains)")
    parser.add_argument("--out", help="the picture (default: KIND.png beside the first file)")
    parser.add_argument("--overwrite", action="store_true", help="of an earlier picture")
    args = parser.parse_args(argv)
    folder = Path(args.files[0]).parent if args.files else Path()
    out = Path(args.out or folder / f"{args.kind}.png")
    check_absent(out, args.overwrite)
    check_writable(out)
    draw(args, out)
    print(out)


if __name__ == "__main__":
    main()
