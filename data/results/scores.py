"""Scores of a benchmark's records: accuracy, cost, pass@k, and the search among several answers.

A record is a line of records.jsonl (records.py); a row of the table is a column of eval.py at
one temperature. A search chooses one of several answers to a problem without its label: by a
majority vote, or by the highest log p under the frozen model.
"""

from data.results.statistics import mean, pass_at_k, wilson
from data.results.tables import percent

RULES = ("strict", "flexible")


# --- one answer a problem -------------------------------------------------------------------------

def summary(records: list, grades: list) -> dict:
    """One row: records of single answers, and the verdict of each, in the same order."""
    n = len(records)
    row = {"n": n}
    for rule in RULES:
        right = sum(grade[rule] for grade in grades)
        row[rule] = right / n
        row[f"{rule}_interval"] = wilson(right, n)
    for name in ("tokens", "cut", "prompt_tokens"):
        row[name] = mean(record[name] for record in records)
    for name in ("fewer_shots", "shortened", "seconds"):
        row[name] = sum(record[name] for record in records)
    row["nfe_per_token"] = nfe_per_token(records)
    tokens = sum(record["tokens"] for record in records)
    row["tokens_per_second"] = tokens / max(row["seconds"], 1e-9)
    # multiple choice by probability
    if "first_letter" in records[0]:
        row["first_draw"] = mean(r["first_letter"] == r["reference"] for r in records)
        row["mass"] = mean(r["mass"] for r in records)
        row["agreement"] = mean(r["agreement"] for r in records)
    return row


def nfe_per_token(records: list) -> float:
    tokens = sum(record["tokens"] for record in records)
    return sum(record["nfe"] for record in records) / max(1, tokens)


def read_letters(names: list, p) -> dict:
    """The answer to one question by probability; p (n, letters), a row per draw of the noise."""
    # p̂(y|c) = (1/n) Σ p_i(y): of probabilities, not of their logs
    mean_p = p.mean(0)
    best = int(mean_p.argmax())
    return {"output": names[best], "tokens": 1, "cut": False, "choices": "letters",
            "score": float(mean_p[best].clamp_min(1e-30).log()),
            "p": [round(value, 6) for value in mean_p.tolist()],
            "first_letter": names[int(p[0].argmax())], "mass": float(mean_p.sum()),
            "agreement": float((p.argmax(-1) == best).float().mean())}


# --- search among several answers -----------------------------------------------------------------

def parse_search(text: str) -> tuple:
    """("vote" or "best", k). Raises ValueError for any other text."""
    how, _, k = text.partition(":")
    if how not in ("vote", "best") or not k.isdecimal() or not 1 <= int(k) < 1000:
        raise ValueError(f"--search {text!r} is unknown; allowed: vote:K or best:K, such as vote:8")
    return how, int(k)


def vote(answers: list, scores: list, equal) -> int:
    """The place of the most frequent answer (Wang et al. 2023), ties to the higher score.

    answers  extracted answers, None where there is none; equal: (answer, answer) -> bool
    """
    groups = []
    for place, answer in enumerate(answers):
        if answer is None:
            continue
        group = next((g for g in groups if equal(answers[g[0]], answer)), [])
        if not group:
            groups.append(group)
        group.append(place)
    # no votes: the first answer stays
    best = max(groups, key=lambda group: (len(group), max(scores[i] for i in group)), default=[0])
    return max(best, key=lambda place: scores[place])


def likeliest(answers: list, scores: list, plausible: list) -> int:
    """The place of the highest mean log p; for code, of an answer that compiles, if any does."""
    return max(range(len(answers)), key=lambda place: (plausible[place], scores[place]))


def search(task, problem, records: list, how: str) -> int:
    """The place of the record that a search chooses for one problem; labels are not used."""
    texts = [record["output"] for record in records]
    scores = [record["score"] for record in records]
    # of equal answers the first is chosen, so a search among one answer changes nothing
    if how == "vote":
        return vote([task.extract(problem, text) for text in texts], scores, task.equal)
    return likeliest(texts, scores, [task.plausible(problem, text) for text in texts])


def searched(task, problems: dict, column: dict, how: str, k: int) -> dict:
    """One row: every problem answered k times, and one of the answers chosen.

    column: problem id -> its records. The row's "oracle" is the upper bound of any search: the
    share of problems with a right answer among the k.
    """
    answers = {id: records[:k] for id, records in column.items()}
    chosen, spent = [], []
    for id, some in answers.items():
        chosen.append(some[search(task, problems[id], some, how)])
        # the cost of all k answers
        cost = {name: sum(record[name] for record in some) for name in ("tokens", "nfe", "seconds")}
        spent.append({**some[0], **cost})
    oracle = {rule: mean(any(record[rule] for record in some) for some in answers.values())
              for rule in RULES}
    return {**summary(spent, chosen), "search": f"{how}:{k}", "oracle": oracle}


def pass_table(column: dict) -> dict:
    """k -> rule -> pass@k, the mean over problems, for every k of 1, 5, 10 with enough samples."""
    table = {}
    for k in (1, 5, 10):
        if k <= min(map(len, column.values())):
            table[k] = {rule: mean(pass_at_k(len(some), sum(record[rule] for record in some), k)
                                   for some in column.values()) for rule in RULES}
    return table


def kind_table(kinds, records: list) -> dict:
    """kind of problem -> its number of problems, accuracy and NFE a token."""
    table = {}
    for kind in kinds:
        # of "chains/test/3/17", three hops
        some = [record for record in records if record["id"].split("/")[2] == kind]
        if some:
            table[kind] = {"n": len(some), "strict": mean(record["strict"] for record in some),
                           "nfe_per_token": nfe_per_token(some)}
    return table


def rows(task, problems: dict, records: list, searches: list) -> list:
    """The table: every column alone, by its first sample, then the result of each search.

    problems: id -> problem; searches: pairs of parse_search
    """
    # (column, temperature) -> problem id -> its records
    columns = {}
    for record in sorted(records, key=lambda record: record["sample"]):
        column = columns.setdefault((record["column"], record["temperature"]), {})
        column.setdefault(record["id"], []).append(record)
    table = []
    for (name, temperature), column in columns.items():
        where = {"column": name, "temperature": temperature}
        first = [some[0] for some in column.values()]
        alone = {**where, **summary(first, first), "search": "",
                 "kinds": kind_table(task.kinds, first)}
        if task.kind == "code":
            alone["pass"] = pass_table(column)
        table.append(alone)
        for how, k in searches:
            # a deterministic column has one answer, so nothing to choose from
            if k <= min(map(len, column.values())):
                table.append({**where, **searched(task, problems, column, how, k)})
    return table


# --- printed --------------------------------------------------------------------------------------

def title(row: dict) -> str:
    temperature = f" T={row['temperature']:g}" if row["temperature"] else ""
    return f"{row['column']}{temperature} {row['search']}"


def print_scores(table: list, about: dict):
    """A line for every row; above them what all rows share. about: as in records.jsonl."""
    print(f"\n{about['benchmark']}, {table[0]['n']} problems, {about['style']} prompts, "
          f"{about['shots']} shots, at most {about['max_new_tokens']} tokens, "
          f"seed {about['seed']}; accuracy in %, 95 % interval")
    indent = " " * 26
    print(f"{indent}{'strict':>18}{'flexible':>18}{'cut':>8}{'tokens':>9}{'NFE/tok':>9}"
          f"{'GFLOP/tok':>11}{'tok/s':>8}")
    for row in table:
        strict, flexible = (percent(row[rule], *row[f"{rule}_interval"]) for rule in RULES)
        print(f"{title(row):26}{strict:>19}{flexible:>19}"
              f"{row['cut']:8.1%}{row['tokens']:9.1f}{row['nfe_per_token']:9.1f}"
              f"{row['flops_per_token'] / 1e9:11.3f}{row['tokens_per_second']:8.1f}")
        # further accuracies of both rules
        both = {f"pass@{k}": found for k, found in row.get("pass", {}).items()}
        if "oracle" in row:
            both["one of them right"] = row["oracle"]
        for name, found in both.items():
            print(f"{indent}{name}: strict {100 * found['strict']:.1f}, "
                  f"flexible {100 * found['flexible']:.1f}")
        if "first_draw" in row:
            print(f"{indent}one draw alone {100 * row['first_draw']:.1f}; "
                  f"probability on letters {row['mass']:.3f}; draws that agree "
                  f"{100 * row['agreement']:.0f} %")
    fewer, shortened = (max(row[name] for row in table) for name in ("fewer_shots", "shortened"))
    if fewer or shortened:
        print(f"{fewer} prompts had fewer shots to fit, {shortened} of them were cut as well")
    print_kinds([row for row in table if row.get("kinds")])


def print_kinds(table: list):
    """For every column its accuracy on each kind of problem, and its NFE where they differ."""
    if not table:
        return
    width = max(7, *(len(kind) + 2 for kind in table[0]["kinds"]))
    print("\nby kind: strict in %, in brackets NFE a token where kinds differ\n" + " " * 26
          + "".join(f"{kind:>{width}}" for kind in table[0]["kinds"]))
    for row in table:
        cells = row["kinds"].values()
        print(f"{title(row):26}"
              + "".join(f"{100 * cell['strict']:{width}.1f}" for cell in cells))
        spent = [f"({cell['nfe_per_token']:.1f})" for cell in cells]
        if len(set(spent)) > 1:
            print(" " * 26 + "".join(f"{nfe:>{width}}" for nfe in spent))
