"""The tables that eval.py prints, from the records that it writes to eval.json.

A record is a cell of the accuracy table. Pictures of the same records are in figures.py.
"""

from data.results.statistics import mean, only, rank_correlation, unique

COSTS = (       # rows below the accuracies: name, key, unit, format
    ("NFE/token", "nfe_per_token", 1, ".1f"),
    ("MFLOP/token", "flops_per_token", 1e6, ".2f"),
    ("tokens/s", "tokens_per_second", 1, ".0f"),
)


def percent(accuracy: float, low: float, high: float) -> str:
    """An accuracy and its interval in %, 16 columns wide."""
    return f"{100 * accuracy:5.1f} [{100 * low:3.0f},{100 * high:4.0f}]"


def cell(record: dict) -> str:
    return percent(record["accuracy"], record["low"], record["high"])


def print_accuracy(records: list):
    """A block per temperature: a row per group, a column per setting, then what a column costs."""
    for temperature in unique(r["temperature"] for r in records):
        block = only(records, temperature=temperature)
        columns = unique(r["column"] for r in block)
        decoding = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        print(f"\naccuracy in %, 95 % interval, {block[0]['n']} test problems a row, {decoding}")
        print(" " * 12 + "".join(f"{name:>18}" for name in columns))
        for group in unique(r["group"] for r in block):
            cells = [cell(r) for r in only(block, group=group)]
            print(f"{group:12}" + "".join(f"{text:>18}" for text in cells))
        # the mean over the trained levels of a topic, where there are several
        for topic in unique(r["topic"] for r in block):
            trained = only(block, topic=topic, unseen=False)
            levels = len(unique(r["group"] for r in trained))
            if levels > 1:
                name = f"{topic} 1-{levels}"
                means = column_means(trained, columns, "accuracy")
                print(f"{name:12}" + "".join(f"{100 * value:>18.1f}" for value in means))
        # nearly the same in every row, so one line for all of them
        for name, key, unit, form in COSTS:
            means = column_means(block, columns, key)
            print(f"{name:12}" + "".join(f"{value / unit:>18{form}}" for value in means))


def print_text(rows: list):
    """A line for every column of held-out text."""
    first = rows[0]
    print(f"\n{first['tokens']:,} tokens of {first['examples']:,} held-out examples; nats per "
          "token, 95 % interval over examples; p: of the right token")
    print(f"{'':14}{'T':>5}{'nats':>26}{'less than frozen':>28}{'p':>8}{'entropy':>9}"
          f"{'NFE/token':>11}{'seconds':>9}")
    for row in rows:
        nats, gain = ("{:.4f} [{:.4f}, {:.4f}]".format(*row[key]) for key in ("nats", "gain"))
        print(f"{row['column']:14}{row['settings']['temperature']:>5.4g}{nats:>26}{gain:>28}"
              f"{row['p'][0]:8.4f}{row['entropy']:9.4f}{row['nfe_per_token']:11.1f}"
              f"{row['seconds']:9.1f}")


def column_means(records: list, columns: list, key: str) -> list:
    return [mean(r[key] for r in only(records, column=column)) for column in columns]


def effort(records: list) -> list:
    """NFE by level and their rank correlation, for every adaptive column of a topic.

    Topics of fewer than three levels are left out.
    """
    found = []
    adaptive = only(records, kind="adaptive")
    for row in unique((r["temperature"], r["column"], r["topic"]) for r in adaptive):
        what = dict(zip(("temperature", "column", "topic"), row))
        cells = only(adaptive, **what)
        levels = [r["level"] for r in cells]
        nfe = [r["nfe_first"] for r in cells]
        if len(cells) >= 3:
            found.append({**what, "levels": levels, "nfe_first": nfe,
                          "rank_correlation": rank_correlation(levels, nfe)})
    return found


def print_effort(records: list):
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
        before = {0: "frozen", 1: "1 step"}.get(r["from"], f"{r['from']} steps")
        print(f"  {before:>8} -> {r['to']:3} steps   "
              f"fixed {r['fixed']:5}   broken {r['broken']:5}")


def print_calibration(records: list):
    """Accuracy and confidence of the frozen model, and of the path with one or several noises."""
    if not records:
        return
    print("\ncalibration on the same tokens: of those predicted with probability p, "
          "is a share p correct?")
    for r in records:
        name = "frozen" if not r["steps"] else f"{r['solver']} {r['steps']}, {r['draws']} noises"
        print(f"  {name:20} accuracy {100 * r['accuracy']:5.1f} %   "
              f"confidence {100 * r['confidence']:5.1f} %   "
              f"calibration error {100 * r['ece']:4.1f} %")


def print_guidance(records: list):
    if not records:
        return
    print("\nguidance (euler, 8 steps): accuracy in %, 95 % interval; "
          "w = 0: without the class, w = 1: with the class")
    for group in unique(r["group"] for r in records):
        cells = [f"w = {r['guidance']:g}: {cell(r)}" for r in only(records, group=group)]
        print(f"{group}  " + "   ".join(cells))
