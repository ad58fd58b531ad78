"""The tables that eval.py prints, from the records that it writes to eval.json.

Nothing here measures; a record is a cell. Pictures of the same records are in figures.py.
"""

from data.results.statistics import mean, only, rank_correlation, unique

COSTS = (       # rows below the accuracies: name, key, unit, format
    ("NFE/token", "nfe_per_token", 1, ".1f"),
    ("MFLOP/token", "flops_per_token", 1e6, ".2f"),
    ("tokens/s", "tokens_per_second", 1, ".0f"),
)


def percent(cell) -> str:
    accuracy, low, high = (100 * cell[key] for key in ("accuracy", "low", "high"))
    return f"{accuracy:5.1f} [{low:3.0f},{high:4.0f}]"


def print_accuracy(records: list):
    """A block per temperature: a row per group, a column per way, then what each column costs."""
    for temperature in unique(r["temperature"] for r in records):
        block = only(records, temperature=temperature)
        columns = unique(r["column"] for r in block)
        decoding = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        print(f"\naccuracy in %, 95 % interval, {block[0]['n']} test problems a row, {decoding}")
        print(" " * 12 + "".join(f"{name:>18}" for name in columns))
        for group in unique(r["group"] for r in block):
            cells = [percent(r) for r in only(block, group=group)]
            print(f"{group:12}" + "".join(f"{cell:>18}" for cell in cells))
        for topic in unique(r["topic"] for r in block):
            print_mean(topic, only(block, topic=topic), columns)
        # the same in every row but for its length, so one line for all of them
        for name, key, unit, form in COSTS:
            means = column_means(block, columns, key)
            print(f"{name:12}" + "".join(f"{value / unit:>18{form}}" for value in means))


def column_means(records: list, columns: list, key: str) -> list:
    return [mean(r[key] for r in only(records, column=column)) for column in columns]


def print_mean(topic: str, records: list, columns: list):
    """One row: the mean over the levels of a topic that were trained on."""
    trained = only(records, unseen=False)
    levels = len(unique(r["group"] for r in trained))
    if levels < 2:
        return
    name = f"{topic} 1-{levels}"
    means = column_means(trained, columns, "accuracy")
    print(f"{name:12}" + "".join(f"{100 * value:>18.1f}" for value in means))


def effort(records: list) -> list:
    """For every adaptive way and topic of three levels or more: NFE by level, rank correlation."""
    found = []
    names = ("temperature", "column", "topic")
    adaptive = only(records, kind="adaptive")
    for values in unique(tuple(r[name] for name in names) for r in adaptive):
        what = dict(zip(names, values))
        cells = only(adaptive, **what)
        if len(cells) < 3:
            continue
        levels = [r["level"] for r in cells]
        nfe = [r["nfe_first"] for r in cells]
        correlation = rank_correlation(levels, nfe)
        found.append({**what, "levels": levels, "nfe_first": nfe, "rank_correlation": correlation})
    return found


def print_effort(records: list):
    """What adaptive ways spend on the first token of an answer, level by level."""
    if not records:
        return
    print("\nNFE of an answer's first token by level, and its rank correlation with the level")
    for r in records:
        rho = "  -  " if r["rank_correlation"] is None else f"{r['rank_correlation']:5.2f}"
        name = f"{r['topic']}, {r['column']}, temperature {r['temperature']:g}"
        print(f"  {name:42} {rho}   " + " ".join(f"{value:5.1f}" for value in r["nfe_first"]))


def print_changes(records: list):
    if not records:
        return
    print(f"\ntokens of the reference answers ({records[0]['tokens']} of them, "
          f"{records[0]['solver']}): fixed = wrong before, right after")
    for r in records:
        before = "frozen"
        if r["from"]:
            before = f"{r['from']} step" if r["from"] == 1 else f"{r['from']} steps"
        print(f"  {before:>8} -> {r['to']:3} steps   "
              f"fixed {r['fixed']:5}   broken {r['broken']:5}")


def print_calibration(records: list):
    """How sure and how right: the frozen model, and the path with one noise or several."""
    if not records:
        return
    print("\nthe same tokens: is what is believed with probability p right p of the time?")
    for r in records:
        name = "frozen" if not r["steps"] else f"{r['solver']} {r['steps']}, {r['draws']} noises"
        print(f"  {name:20} accuracy {100 * r['accuracy']:5.1f} %   "
              f"confidence {100 * r['confidence']:5.1f} %   "
              f"calibration error {100 * r['ece']:4.1f} %")


def print_guidance(records: list):
    if not records:
        return
    print("\nguidance (euler, 8 steps): accuracy in %, 95 % interval; "
          "w = 0 does not see the class, w = 1 does")
    for group in unique(r["group"] for r in records):
        cells = [f"w = {r['guidance']:g}: {percent(r)}" for r in only(records, group=group)]
        print(f"{group}  " + "   ".join(cells))
