"""Every picture of the project: in text, and as PNG where matplotlib is installed.

    python -m data.figures eval.json            the curves of eval.py's results, as eval.png
    python -m data.figures refine.json paper.json lora.json --out compare.png
                                                several ways to train, side by side
    python -m data.figures log out/log.jsonl    loss and learning rate of a training

Pictures are made from numbers that somebody else has measured; nothing here runs a model.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from data.command import command
from data.disk import appearing, check_absent, check_writable, decode, parse_json, read_json
from data.statistics import mean, unique

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
    if token >= len(answer.nfe):
        raise ValueError(f"--trace_token {token} is out of range; this answer has "
                         f"{len(answer.nfe)} tokens, allowed: 0 to {len(answer.nfe) - 1}")
    lines = [
        f"   tokens: {coloured(pieces, answer.nfe)}",
        f"   token {token} ({pieces[token]!r}), guess at every evaluation:",
    ]
    for t, guess, p in answer.guesses:
        lines.append(f"     t = {t:.4f}  {tokenizer.decode([guess])!r:8} p = {p:.3f}")
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
        panel = [r for r in records if r["temperature"] == temperature]
        shown = of_first_solver(panel)
        groups = unique(r["group"] for r in shown)
        for place, group in enumerate(groups):
            line = [r for r in shown if r["group"] == group]
            colour = plt.cm.viridis(place / len(groups))
            draw_curve(axis, sorted(line, key=lambda r: r["nfe_per_token"]), group, colour)
        title = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        axis.set(xlabel="NFE per token (0: frozen model)", xscale="symlog", title=title)
    axes[0][0].set(ylabel="accuracy")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def of_first_solver(records: list) -> list:
    """The frozen model and the fixed steps of the first solver that has such."""
    solver = next((r["settings"]["solver"] for r in records if r["kind"] == "fixed"), None)
    return [r for r in records if r["kind"] == "frozen"
            or (r["kind"] == "fixed" and r["settings"]["solver"] == solver)]


def plot_ways(results: dict, topic: str, path: Path):
    """Left: greedy accuracy on a topic against NFE, a line per way. Right: NFE by level.

    results: name -> the "accuracy" entries of eval.json. Accuracy is the mean over the levels that
    were trained on. A model without a path is one height, whatever the evaluations.
    """
    plt = import_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, records in results.items():
        some = [r for r in records if r["topic"] == topic and r["temperature"] == 0]
        line = mean_curve([r for r in some if not r["far"]])
        if len(line) == 1:
            left.axhline(line[0][1], linestyle="--", color=f"C{len(left.lines)}", label=name)
        else:
            left.plot(*zip(*line), marker="o", color=f"C{len(left.lines)}", label=name)
        for column in unique(r["column"] for r in some if r["kind"] == "adaptive"):
            cells = [r for r in some if r["column"] == column]
            levels = [r["level"] for r in cells]
            right.plot(levels, [r["nfe_first"] for r in cells], marker="o",
                       label=f"{name}, {column}")
    left.set(xlabel="evaluations of the path per token (0: frozen model)", xscale="symlog",
             ylabel="accuracy", title=f"{topic}: mean over the levels, greedy")
    left.set_xlim(left=-0.1)
    right.set(xlabel="level", ylabel="evaluations", title="what a problem is worth")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def mean_curve(records: list) -> list:
    """(NFE, mean accuracy) of the frozen model and of the first fixed solver, by NFE."""
    shown = of_first_solver(records)
    points = []
    for column in unique(r["column"] for r in shown):
        cells = [r for r in shown if r["column"] == column]
        points.append((mean(r["nfe_per_token"] for r in cells),
                       mean(r["accuracy"] for r in cells)))
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


def read_accuracy(path: Path) -> list:
    """The accuracies in what eval.py wrote. Raises ValueError for another file."""
    records = read_json(path).get("accuracy")
    wanted = {"group", "topic", "level", "far", "temperature", "column", "kind", "settings",
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
    pyplot.close(figure)


@command("data.figures")
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+",
                        help="what eval.py wrote, of several one picture; or `log` and a log.jsonl")
    parser.add_argument("--topic", default="chains",
                        help="of a picture of several files (default: chains)")
    parser.add_argument("--out", help="the picture (default: beside the first file)")
    parser.add_argument("--overwrite", action="store_true", help="of an earlier picture")
    args = parser.parse_args(argv)
    training = args.results[0] == "log" and len(args.results) == 2
    out = Path(args.out or Path(args.results[-1 if training else 0]).with_suffix(".png"))
    check_absent(out, args.overwrite)
    check_writable(out)
    if training:
        plot_log(read_log(Path(args.results[1])), out)
        return print(out)
    results = {Path(name).stem: read_accuracy(Path(name)) for name in args.results}
    try:
        if len(results) == 1:
            plot_accuracy(*results.values(), out)
        else:
            plot_ways(results, args.topic, out)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{', '.join(args.results)}: a record has an unexpected form: {error!r}")
    print(out)


if __name__ == "__main__":
    main()
