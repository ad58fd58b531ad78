"""Accuracy against compute, always beside the frozen model under the same decoding.

    python eval.py                          the table, printed and written to eval.json
    python eval.py --problems 400 --steps 1 2 4 8 16 32 --solvers euler midpoint dopri5 --plot
    python eval.py --task gsm8k --init_from=DIR --data_dir=DIR --steps 8 --solvers midpoint
    python eval.py --task text --init_from=DIR --data=DATA --steps 1 4
    python eval.py --regrade out-gsm8k/records.jsonl --out again.jsonl

The embedded topics: accuracy with its 95 % Wilson interval, NFE, seconds and arithmetic a token of
the frozen model, fixed and adaptive solvers; tokens that more steps fixed and broke; calibration;
guidance. A benchmark: every answer on a line as it comes, and their table. Held-out text: nats per
token that counts. First the two loops, then what they call. The tasks are in data/tasks/.
"""

import argparse
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# first: from here on Ctrl-C is one line
from data.system.command import command, given_flags

import torch
from tqdm import tqdm

from data.checkpoints.path import class_number
from data.checkpoints.weights import fingerprint
from data.flags.eval import check_flags, check_regrade, eval_flags, fill_defaults
from data.results.figures import new_figure, plot_accuracy
from data.results.flops import flops_per_token
from data.results.records import Records, identity, provenance, regrade
from data.results.scores import parse_search, print_scores, read_letters, rows
from data.results.statistics import calibration, changes, mean, ratio, wilson
from data.results.tables import (
    effort, print_accuracy, print_calibration, print_changes, print_effort, print_guidance,
    print_text)
from data.system.disk import check_absent, claimed, claimed_file, write_json
from data.tasks import TASKS
from data.tasks.grading import Grader
from data.tasks.prompting import Prompts, letter_tokens, write_prompts
from data.tasks.sandbox import NOTICE
from data.text.answer import Score, Stop
from data.training.batches import collate
from diffusion import ESTIMATES, L2D
from sample import (
    Settings, answer_problems, forced_log_p, generate, knows_classes, load_model, next_p)
from solvers import ADAPTIVE, FIXED, SOLVERS

BATCH = 128        # problems at a time, where tokens are forced


@dataclass
class Column:
    """A way to find tokens, and its name in the table."""
    name: str
    kind: str            # "frozen", "fixed" or "adaptive"
    settings: Settings


# --- the two loops --------------------------------------------------------------------------------

def accuracy_table(model, tokenizer, task, problems: dict, columns: list, seed: int, records: list):
    """The embedded topics: add a record for every group of problems and column to `records`."""
    temperatures = dict.fromkeys(column.settings.temperature for column in columns)
    # all jobs in one list, so that the bar knows their number
    jobs = [(group, column) for temperature in temperatures for group in problems
            for column in columns if column.settings.temperature == temperature]
    for group, column in tqdm(jobs, disable=None, desc="accuracy"):
        records.append({
            "group": task.title(group), "topic": group[0], "level": group[1],
            "unseen": group in task.unseen, "temperature": column.settings.temperature,
            "column": column.name, "kind": column.kind,
            "settings": asdict(column.settings),
            **measure(model, tokenizer, task, problems[group], column.settings, seed),
        })


def answer_questions(bench: "Bench", columns: list):
    """A benchmark: answer, grade and write down whatever is not in the records yet.

    Raises KeyboardInterrupt that says what has been written.
    """
    records, questions = bench.records, bench.asked.questions
    jobs = [(column, records.missing(column.name, column.settings.temperature,
                                     questions, bench.samples(column))) for column in columns]
    left = sum(len(mine) for _, mine in jobs)
    total = len(questions) * sum(map(bench.samples, columns))
    answer = choose_letters if bench.by_letters else write_answers
    try:
        with tqdm(total=total, initial=total - left, disable=None, desc=bench.task.name) as bar:
            for column, mine in jobs:
                settings = replace(column.settings, max_new_tokens=bench.asked.max_new_tokens)
                for at in range(0, len(mine), bench.batch_size):
                    batch = mine[at:at + bench.batch_size]
                    # from the problem itself: neither its place nor its neighbours change its noise
                    seeds = [zlib.crc32(question.problem["id"].encode()) + bench.seed + sample
                             for question, sample in batch]
                    class_ids = None if bench.class_id is None else [bench.class_id] * len(batch)
                    start = time.perf_counter()
                    answers = answer(bench, settings, [question for question, _ in batch], seeds,
                                     class_ids)
                    seconds = (time.perf_counter() - start) / len(batch)
                    for (question, sample), found in zip(batch, answers):
                        record = {"benchmark": bench.task.name, "column": column.name,
                                  "temperature": settings.temperature, "sample": sample,
                                  **question.facts, **found, "seconds": seconds}
                        records.add({**record, **bench.grader(record)})
                    bar.update(len(batch))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {len(records.found)} answers are in {records.path}, "
                                "the same command goes on") from None


def columns_to_compare(steps: list, solvers: list, temperature: float, estimate: dict, rtol: float,
                       stop_unchanged: int, weights: list) -> list:
    """The frozen model, every fixed solver at every number of steps, and the adaptive columns.

    estimate  of the clean point: fields of Settings
    weights   of guidance: the solvers' columns stand once for each
    """
    frozen = Column("frozen", "frozen", Settings(steps=0, temperature=temperature))
    columns = []
    for solver in solvers:
        common = {"solver": solver, "temperature": temperature, "rtol": rtol, "atol": rtol,
                  **estimate}
        # it chooses its steps itself, so it stands once and not once for every number of them
        if solver in ADAPTIVE:
            columns.append(Column(solver, "adaptive", Settings(**common)))
            continue
        # the frozen model stands there already
        for count in filter(None, steps):
            columns.append(Column(f"{solver} {count}", "fixed", Settings(steps=count, **common)))
    fixed = [column for column in columns if column.kind == "fixed"]
    if fixed and stop_unchanged:
        # the most steps once more, ended where the prediction no longer changes
        longest = max(fixed, key=lambda column: column.settings.steps)
        settings = replace(longest.settings, stop_unchanged=stop_unchanged)
        columns.append(Column(f"{longest.name} stop {stop_unchanged}", "adaptive", settings))
    guided = [Column(column.name if weight == 1 else f"{column.name} w {weight:.15g}", column.kind,
                     replace(column.settings, guidance=weight))
              for weight in weights for column in columns]
    return [frozen, *guided]


# --- the embedded topics --------------------------------------------------------------------------

def measure(model, tokenizer, task, problems: list, settings: Settings, seed: int) -> dict:
    """One cell: accuracy, interval, NFE, seconds and arithmetic per token."""
    # wall time of the whole job, prompts included: what a user waits for
    start = time.perf_counter()
    answers = answer_problems(model, tokenizer, task, problems, settings, seed)
    seconds = time.perf_counter() - start
    n = len(problems)
    right = sum(answer.right for answer in answers)
    tokens = sum(len(answer.nfe) for answer in answers)
    # the stop token was paid for too
    nfe = mean(nfe for answer in answers for nfe in answer.nfe)
    low, high = wilson(right, n)
    # a token stands behind the prompt and, on average, half of the answer
    prompts = sum(len(task.prompt(problem, tokenizer)) for problem in problems)
    length = round(prompts / n + tokens / n / 2)
    return {
        "right": right, "n": n, "accuracy": right / n, "low": low, "high": high,
        "nfe_per_token": nfe, "nfe_first": mean(answer.nfe[0] for answer in answers),
        "seconds": seconds, "tokens_per_second": tokens / seconds,
        "flops_per_token": flops_per_token(model, nfe, length, settings),
    }


@torch.no_grad()
def forced_tokens(model, tokenizer, task, problems: list, settings: Settings, seed: int,
                  draws: int = 1):
    """(p of the likeliest token, is it right?) for every token of the right answers, (N,) each.

    draws  noises for each token; the probabilities that they lead to are averaged
    """
    confidences, rights = [], []
    for at in range(0, len(problems), BATCH):
        # the right tokens are given, so one early mistake does not spoil all that follows
        references = [task.reference(one, tokenizer) for one in problems[at:at + BATCH]]
        if not knows_classes(model, task):
            references = [row[:3] for row in references]
        batch = collate(references).to(next(model.parameters()).device)
        seeds = [seed + at + row for row in range(len(references))]
        log_p, _ = forced_log_p(model, batch, settings, seeds, draws)
        confidence, token = log_p.max(-1)                               # (N,)
        confidences.append(confidence.exp())
        rights.append(token == batch.targets.y)
    return torch.cat(confidences), torch.cat(rights)


def token_tables(model, tokenizer, task, problems: list, solver: str, steps: list, estimate: dict,
                 draws: int, seed: int) -> tuple:
    """(tokens that more steps fixed and broke, calibration), of the right answers."""
    right, calibrated = {}, []
    # with one noise each number of steps, and with several the largest
    runs = [(0, 1), *((n, 1) for n in steps)]
    if draws > 1:
        runs.append((steps[-1], draws))
    for n, noises in runs:
        settings = Settings(steps=n, solver=solver, **estimate)
        confidence, found = forced_tokens(
            model, tokenizer, task, problems, settings, seed, noises)
        right.setdefault(n, found)
        calibrated.append({"solver": solver, "steps": n, "draws": noises,
                           **calibration(confidence.tolist(), found.tolist())})
    # against the frozen model, and against the fewest steps: is it the path or the steps?
    pairs = [(0, n) for n in steps] + [(steps[0], n) for n in steps[1:]]
    broken = [{"from": a, "to": b, "solver": solver, **changes(right[a], right[b])}
              for a, b in pairs]
    return broken, calibrated


def guidance_table(model, tokenizer, task, problems: dict, weights: list, estimate: dict,
                   seed: int) -> list:
    """Accuracy for several weights, on the problems where only the class says what to do."""
    records = []
    for group, some in problems.items():
        # elsewhere the prompt says it already, and no weight could help
        if group[0] not in task.guided:
            continue
        for weight in weights:
            # the class is known to every one of them, only the weight differs
            settings = Settings(steps=8, guidance=weight, **estimate)
            cell = measure(model, tokenizer, task, some, settings, seed)
            records.append({"group": task.title(group), "guidance": weight, **cell})
    return records


def measure_topics(model, tokenizer, task, args, columns: list):
    """Every table of the embedded topics, printed as it is measured, and their file."""
    # loading is not counted
    start = time.time()
    out = Path(args.out)
    problems = {group: [task.problem(group, i, args.seed) for i in range(args.problems)]
                for group in task.groups if not args.topics or group[0] in args.topics}
    accuracy = []
    try:
        accuracy_table(model, tokenizer, task, problems, columns, args.seed, accuracy)
    except KeyboardInterrupt:
        if not accuracy:
            raise KeyboardInterrupt("stopped before the first cell was finished") from None
        # under another name: it must not be taken for a whole table
        part = out.with_suffix(".partial.json")
        write_json({"args": vars(args), "stopped": True, "accuracy": accuracy}, part)
        raise KeyboardInterrupt(f"stopped; the {len(accuracy)} finished cells are in {part}"
                                ) from None
    print_accuracy(accuracy)
    spent = effort(accuracy)
    print_effort(spent)
    broken, calibrated, guidance = [], [], []
    if isinstance(model, L2D):
        # one batch of everything: the counts are of tokens, whatever problem they are of
        everything = [problem for some in problems.values() for problem in some]
        solver = next((name for name in args.solvers if name in FIXED), "euler")
        broken, calibrated = token_tables(
            model, tokenizer, task, everything, solver, sorted(set(args.steps)), estimate_of(args),
            args.draws, args.seed)
        if knows_classes(model, task):
            guidance = guidance_table(model, tokenizer, task, problems, args.guidance,
                                      estimate_of(args), args.seed)
    print_changes(broken)
    print_calibration(calibrated)
    print_guidance(guidance)
    # once and whole: a table that was cut off would be taken for a result
    write_json({**provenance(model, args, start), "accuracy": accuracy, "effort": spent,
                "fixed_and_broken": broken, "calibration": calibrated, "guidance": guidance}, out)
    print(f"\nwritten to {out} after {time.time() - start:.0f} s")
    if args.plot:
        plot_accuracy(accuracy, out.with_suffix(".png"))


# --- held-out text --------------------------------------------------------------------------------

def text_nats(model, rows: list, settings: Settings, temperatures: list, draws: int,
              batch_size: int, seed: int):
    """Sums over the counted tokens of a row: nats, p of the token, entropy, NFE, 1.

    (temperatures, 5, rows): the ODEs do not depend on the temperature, and are solved once.
    """
    found = torch.zeros(len(temperatures), 5, len(rows), dtype=torch.float64)
    # short ones first: a batch is as long as its longest row
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
    for at in tqdm(range(0, len(rows), batch_size), disable=None, desc="text"):
        numbers = order[at:at + batch_size]
        batch = collate([rows[number] for number in numbers]).to(next(model.parameters()).device)
        # from the row's number: neither its batch nor its neighbours change its noise
        seeds = [seed + number for number in numbers]
        logits, nfe = forced_log_p(model, batch, settings, seeds, draws)
        of_row = torch.tensor(numbers)[batch.targets.index[0].cpu()]    # (N,)
        for sums, temperature in zip(found, temperatures):
            log_p = (logits / temperature).log_softmax(-1)              # (N, V)
            nats = -log_p.gather(1, batch.targets.y[:, None])[:, 0]
            entropy = -(log_p.exp() * log_p).sum(-1)
            some = torch.stack((nats, (-nats).exp(), entropy, nfe, torch.ones_like(nats)))
            sums.index_add_(1, of_row, some.double().cpu())
    return found


def measure_text(model, tokenizer, task, args, columns: list):
    """Nats of the tokens that count, a row for every column, each beside the frozen model's."""
    start = time.time()
    rows = task.rows(args.data, tokenizer, args.limit)
    if not knows_classes(model, task):
        rows = [row[:3] for row in rows]
    table, solved, frozen = [], {}, {}
    for column in columns:
        temperature = column.settings.temperature
        if column.name not in solved:
            begun = time.perf_counter()
            found = text_nats(model, rows, column.settings, args.temperatures, args.draws,
                              args.batch_size, args.seed)
            solved[column.name] = time.perf_counter() - begun, dict(zip(args.temperatures, found))
        seconds, sums = solved[column.name]     # of all temperatures together
        nats, p, entropy, nfe, counts = sums[temperature]
        # of every temperature the frozen model is the first
        gain = frozen.setdefault(temperature, nats) - nats
        table.append({"column": column.name, "settings": asdict(column.settings),
                      "examples": len(rows), "tokens": int(counts.sum()),
                      "nats": ratio(nats, counts), "gain": ratio(gain, counts),
                      "p": ratio(p, counts), "entropy": float(entropy.sum() / counts.sum()),
                      "nfe_per_token": float(nfe.sum() / counts.sum()), "seconds": seconds})
    print_text(table)
    write_json({**provenance(model, args, start), "text": table}, Path(args.out))
    print(f"\nwritten to {args.out} after {time.time() - start:.0f} s")


# --- benchmarks -----------------------------------------------------------------------------------

@dataclass
class Bench:
    """A benchmark under way: its questions, its answers so far, and their grader."""
    model: L2D
    tokenizer: object
    task: object
    asked: Prompts
    records: Records
    grader: Grader
    searches: list       # (how, k), see parse_search
    answers: int         # to each problem
    by_letters: bool     # the likeliest letter, without a text
    class_id: int | None    # of all answers
    draws: int           # noises for a letter
    batch_size: int
    seed: int

    def samples(self, column: Column) -> int:
        """Answers to each problem; without chance one is all."""
        if not column.settings.steps and not column.settings.temperature:
            return 1
        return max([self.answers, *(k for _, k in self.searches)])


def write_answers(bench: Bench, settings: Settings, questions: list, seeds: list,
                  class_ids) -> list:
    """An answer in words to every question, and its cost."""
    stop = Stop.of(bench.tokenizer, bench.task.stops[bench.asked.style])
    prompts = [question.ids for question in questions]
    score = Score(bench.model.lm)
    answers = generate(bench.model, prompts, settings, stop, class_ids, seeds, score)
    return [{"output": answer.text, "tokens": len(answer.nfe), "nfe": sum(answer.nfe),
             "cut": not answer.stopped, "score": answer.score} for answer in answers]


def choose_letters(bench: Bench, settings: Settings, questions: list, seeds: list,
                   class_ids) -> list:
    """The likeliest letter of each question, its probability a mean over draws of the noise."""
    prompts = [question.ids for question in questions]
    p, nfe = next_p(bench.model, prompts, settings, seeds, bench.draws, class_ids)
    found = []
    for row, question in enumerate(questions):
        names = bench.task.options(question.problem)
        ids = letter_tokens(names, bench.tokenizer, bench.asked.style)
        found.append({**read_letters(names, p[:, row, ids]), "nfe": nfe[row]})
    return found


def score_rows(bench: Bench, columns: list) -> list:
    """The table of the columns and questions of this command; there may be records of more."""
    ids = {question.problem["id"] for question in bench.asked.questions}
    asked_for = {(one.name, one.settings.temperature): one for one in columns}
    asked = [record for (*where, id, sample), record in bench.records.found.items()
             if tuple(where) in asked_for and id in ids
             and sample < bench.samples(asked_for[tuple(where)])]
    table = rows(bench.task, bench.grader.problems[bench.task.name], asked, bench.searches)
    for row in table:
        length = round(row["prompt_tokens"] + row["tokens"] / 2)
        settings = asked_for[row["column"], row["temperature"]].settings
        row["flops_per_token"] = flops_per_token(
            bench.model, row["nfe_per_token"], length, settings)
    return table


def benchmark(model, tokenizer, task, args, columns: list):
    """Every problem in every column, a line each as they come; then the table."""
    class_id = None if args.label is None else class_number(args.label, model.config)
    asked = write_prompts(
        task, tokenizer, model.lm.config.max_positions, args.data_dir, args.style, args.shots,
        args.max_new_tokens, args.limit, args.show_prompts)
    about = {**asked.about, "model": fingerprint(model), **identity(model, tokenizer),
             "draws": args.draws, "choices": args.choices, "seed": args.seed,
             **estimate_of(args), "rtol": args.rtol, "class": class_id,
             "merge_lora": args.merge_lora,
             "code_seconds": args.code_seconds if task.kind == "code" else None}
    grader = Grader(args.data_dir, args.allow_code_execution, args.code_seconds)
    grader.problems[task.name] = {one["id"]: one for one in asked.problems}
    if task.kind == "code":
        task.check_references([question.problem for question in asked.questions],
                              args.code_seconds)
    out = Path(args.out)
    with claimed(out, "--out"):
        start = time.time()
        records = Records(out / "records.jsonl", about, args.overwrite)
        records.check(asked.questions)
        by_letters = task.kind == "letters" and args.choices == "letters"
        bench = Bench(model, tokenizer, task, asked, records, grader,
                      [parse_search(how) for how in args.search], args.samples, by_letters,
                      class_id, args.draws, args.batch_size, args.seed)
        answer_questions(bench, columns)
        table = score_rows(bench, columns)
        print_scores(table, about)
        write_json({**provenance(model, args, start), "about": about, "rows": table},
                   out / "summary.json")
    print(f"\nrecords and summary are in {out}")


# --- the command line -----------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    """See data/flags/eval.py."""
    return eval_flags(__doc__, TASKS, Settings(), SOLVERS, ESTIMATES)


def estimate_of(args) -> dict:
    return {"estimate": args.estimate, "estimate_temperature": args.estimate_temperature}


def check(args, task, given: dict):
    """Refuse what would fail after the work, or leave nothing to measure. Raises ValueError."""
    check_flags(args, given, task, bool(set(args.solvers) & set(ADAPTIVE)),
                bool(set(args.solvers) & set(FIXED)))
    for weight in args.guidance:
        Settings(guidance=weight)
    if task.kind == "code" and not args.allow_code_execution:
        raise ValueError(f"--task {args.task} runs what the model writes, which needs "
                         f"--allow_code_execution; {NOTICE}")
    if args.plot:       # hours of work must not end with a missing package
        new_figure()
        check_absent(Path(args.out).with_suffix(".png"), args.overwrite)


@command("eval.py")
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    given = given_flags(parser, argv)
    if args.regrade:
        check_regrade(args, given)
        grader = Grader(args.data_dir, args.allow_code_execution, args.code_seconds)
        return regrade(Path(args.regrade), Path(args.out), grader, args.overwrite)
    task = TASKS[args.task]
    fill_defaults(args)
    check(args, task, given)

    # a benchmark holds its directory once there is something to answer
    one_file = args.task in ("tiny", "text")
    with claimed_file(args.out, args.overwrite) if one_file else nullcontext():
        measure_task(args, task)


def measure_task(args, task):
    """Load the model, and measure every column of it."""
    # the embedded topics have a table of their own for it
    weights = [1.0] if args.task == "tiny" else args.guidance

    def columns_of(solvers: list) -> list:
        return [column for temperature in args.temperatures for column in columns_to_compare(
            args.steps, solvers, temperature, estimate_of(args), args.rtol, args.stop_unchanged,
            weights)]

    # every setting is refused or taken now, not when its turn comes
    columns = columns_of(args.solvers)
    model, tokenizer = load_model(args.init_from, args.dtype, args.device, args.cache_dir,
                                  args.base, args.merge_lora)
    if not isinstance(model, L2D):      # a base, or one that --method=lora or full has finetuned
        print(f"{args.init_from} has no diffusion path: "
              "only the model itself is scored, as `frozen`")
        columns = columns_of([])
    if args.task == "tiny":
        measure_topics(model, tokenizer, task, args, columns)
    elif args.task == "text":
        measure_text(model, tokenizer, task, args, columns)
    else:
        benchmark(model, tokenizer, task, args, columns)


if __name__ == "__main__":
    main()
