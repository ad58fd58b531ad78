"""What a benchmark's records add up to: accuracy, cost, pass@k, what a search among answers gains.

A record is a line of records.jsonl (records.py); a row of the table is a column of eval.py at
one temperature. Token search chooses one of several answers to a problem without knowing which is
right: by a vote, or by what the frozen model finds likeliest. eval.py prints what is made here.
"""

from data.results.statistics import mean, pass_at_k, wilson

RULES = ("strict", "flexible")


# --- one way to answer ----------------------------------------------------------------------------

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
    tokens = sum(record["tokens"] for record in records)
    evaluations = sum(record["nfe"] for record in records)
    row["nfe_per_token"] = evaluations / max(1, tokens)
    row["tokens_per_second"] = tokens / max(row["seconds"], 1e-9)
    if "first_letter" in records[0]:
        row.update(letters_summary(records))
    return row


def letters_summary(records: list) -> dict:
    """What is said of multiple choice by probability, beside accuracy."""
    return {
        "first_draw": mean(r["first_letter"] == r["reference"] for r in records),
        "mass": mean(r["mass"] for r in records),
        "agreement": mean(r["agreement"] for r in records),
    }


def by_column(records: list) -> dict:
    """(column, temperature) -> problem id -> its records, the samples in order."""
    table = {}
    for record in sorted(records, key=lambda record: record["sample"]):
        column = table.setdefault((record["column"], record["temperature"]), {})
        column.setdefault(record["id"], []).append(record)
    return table


def read_letters(names: list, p) -> dict:
    """What p (n, letters), a row for each draw of the noise, says of one question."""
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
    """("vote" or "best", k). Raises ValueError for anything else."""
    how, _, k = text.partition(":")
    if how not in ("vote", "best") or not k.isdecimal() or not 1 <= int(k) < 1000:
        raise ValueError(f"--search {text!r} is unknown; allowed: vote:K or best:K, "
                         "such as vote:8")
    return how, int(k)


def vote(answers: list, scores: list, equal) -> int:
    """The place of the commonest answer (Wang et al. 2023), ties to the higher score.

    answers  extracted ones, None where there is none; equal: are two of them the same answer?
    """
    groups = []
    for place, answer in enumerate(answers):
        if answer is None:
            continue
        home = next((g for g in groups if equal(answers[g[0]], answer)), None)
        if home is None:
            groups.append([place])
        else:
            home.append(place)
    # nobody votes: there is nothing but the first
    if not groups:
        return 0
    best = max(groups, key=lambda group: (len(group), max(scores[i] for i in group)))
    return max(best, key=lambda place: scores[place])


def likeliest(answers: list, scores: list, plausible: list) -> int:
    """The place of the highest mean log p, of code among what compiles."""
    return max(range(len(answers)), key=lambda place: (plausible[place], scores[place]))


def search(task, problem, records: list, how: str) -> int:
    """Which of the records of one problem is its answer; labels are not looked at."""
    texts = [record["output"] for record in records]
    scores = [record["score"] for record in records]
    # two answers alike are the first of them, so that one answer is no search at all
    if how == "vote":
        return vote([task.extract(problem, text) for text in texts], scores, task.equal)
    plausible = [task.plausible(problem, text) for text in texts]
    return likeliest(texts, scores, plausible)


def searched(task, problems: dict, column: dict, how: str, k: int) -> dict:
    """One row: every problem answered k times, and one of the answers chosen."""
    chosen, spent = [], []
    for id, records in column.items():
        some = records[:k]
        chosen.append(some[search(task, problems[id], some, how)])
        # what all of them cost
        cost = {name: sum(record[name] for record in some)
                for name in ("tokens", "nfe", "seconds")}
        spent.append({**some[0], **cost})
    return {**summary(spent, chosen), "search": f"{how}:{k}", "oracle": oracle(column, k)}


def oracle(column: dict, k: int) -> dict:
    """The ceiling of any search: is one of k answers right?"""
    found = {}
    for rule in RULES:
        found[rule] = mean(any(record[rule] for record in records[:k])
                           for records in column.values())
    return found


# --- several samples of code ----------------------------------------------------------------------

def pass_table(column: dict) -> dict:
    """k -> rule -> pass@k, the mean over problems, for every k that the samples allow."""
    found = {}
    n = min(map(len, column.values()))
    for k in (1, 5, 10):
        if k <= n:
            found[k] = {rule: mean(pass_of(records, rule, k) for records in column.values())
                        for rule in RULES}
    return found


def pass_of(records: list, rule: str, k: int) -> float:
    """pass@k of one problem."""
    right = sum(record[rule] for record in records)
    return pass_at_k(len(records), right, k)


def rows(task, problems: dict, records: list, searches: list) -> list:
    """The table: every column alone (its first sample), then what searches make of it."""
    table = []
    for (name, temperature), column in by_column(records).items():
        where = {"column": name, "temperature": temperature}
        first = [some[0] for some in column.values()]
        alone = {**where, **summary(first, first), "search": ""}
        if task.kind == "code":
            alone["pass"] = pass_table(column)
        table.append(alone)
        # where chance has no part there is one answer, and nothing to choose from
        for how, k in searches:
            if k > min(map(len, column.values())):
                continue
            table.append({**where, **searched(task, problems, column, how, k)})
    return table


# --- printed --------------------------------------------------------------------------------------

def print_scores(table: list, about: dict):
    """A line for every row; what is the same in all of them above."""
    print(f"\n{about['benchmark']}, {table[0]['n']} problems, {about['style']} prompts, "
          f"{about['shots']} shots, at most {about['max_new_tokens']} tokens, "
          f"seed {about['seed']}; accuracy in %, 95 % interval")
    print(f"{'':26}{'strict':>18}{'flexible':>18}{'cut':>8}{'tokens':>9}{'NFE/tok':>9}"
          f"{'GFLOP/tok':>11}{'tok/s':>8}")
    for row in table:
        temperature = f" T={row['temperature']:g}" if row["temperature"] else ""
        name = f"{row['column']}{temperature} {row['search']}"
        print(f"{name:26}{percent(row, 'strict')}{percent(row, 'flexible')}"
              f"{100 * row['cut']:7.1f}%{row['tokens']:9.1f}{row['nfe_per_token']:9.1f}"
              f"{row['flops_per_token'] / 1e9:11.3f}{row['tokens_per_second']:8.1f}")
        print_more(row)
    counted = {name: max(row[name] for row in table) for name in ("fewer_shots", "shortened")}
    if any(counted.values()):
        print(f"{counted['fewer_shots']} prompts had fewer shots to fit, "
              f"{counted['shortened']} of them were cut besides")


def percent(row: dict, rule: str) -> str:
    low, high = row[f"{rule}_interval"]
    return f"{100 * row[rule]:8.1f} [{100 * low:3.0f},{100 * high:4.0f}]"


def print_more(row: dict):
    """What only some rows have."""
    if "oracle" in row:
        print(f"{'':26}one of them right: strict {100 * row['oracle']['strict']:.1f}, "
              f"flexible {100 * row['oracle']['flexible']:.1f}")
    if "first_draw" in row:
        print(f"{'':26}one draw alone {100 * row['first_draw']:.1f}; "
              f"probability on letters {row['mass']:.3f}; draws that agree "
              f"{100 * row['agreement']:.0f} %")
    for k, found in row.get("pass", {}).items():
        print(f"{'':26}pass@{k}: strict {100 * found['strict']:.1f}, "
              f"flexible {100 * found['flexible']:.1f}")


