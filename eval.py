"""Accuracy against compute, always beside the frozen model under the same decoding.

    python eval.py                          the table, printed and written to eval.json
    python eval.py --problems 400 --steps 1 2 4 8 16 32 --solvers euler midpoint dopri5 --plot
    python eval.py --task gsm8k --init_from=DIR --data_dir=DIR --steps 8 --solvers midpoint
    python eval.py --regrade out-gsm8k/records.jsonl --out again.jsonl

For every kind of problem of the embedded task: accuracy with its 95 % Wilson interval for the
frozen model, for each number of steps of the fixed solvers and for the adaptive one, greedy and at
temperature 1; network evaluations (NFE), seconds and arithmetic per token; what adaptive ways spend
on each level; what extra steps fixed and broke, and how sure they are; what guidance changed. For a
benchmark: every answer on a line as it comes, and their table. No task is known here: they are in
data/tasks/. Read sample.py first.
"""

import argparse
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# first: from here on Ctrl-C is one line
from data.system.command import command, given_flags

import torch
from tqdm import tqdm

from data.checkpoints.weights import fingerprint
from data.flags.eval import check_idle, check_numbers, eval_flags, fill_defaults
from data.parts.draws import RowDraws
from data.results.records import Records, provenance, regrade
from data.results.figures import import_pyplot, plot_accuracy
from data.results.flops import flops_per_token
from data.results.scores import parse_search, print_scores, read_letters, rows
from data.results.statistics import calibration, changes, mean, wilson
from data.results.tables import (
    effort, print_accuracy, print_calibration, print_changes, print_effort, print_guidance)
from data.system.disk import check_absent, check_writable, claimed, write_json
from data.tasks import TASKS
from data.tasks.grading import Grader
from data.tasks.prompting import Asked, ask_all, letter_tokens
from data.tasks.sandbox import NOTICE
from data.text.answer import Stop
from data.training.batches import Batch, collate
from diffusion import ESTIMATES, L2D, VelocityField
from sample import Settings, answer_problems, generate, load_model, next_p
from solvers import ADAPTIVE, FIXED, SOLVERS, odeint

BATCH = 128        # problems at a time, where tokens are forced


# --- the parts of the table -----------------------------------------------------------------------

@dataclass
class Column:
    """A way to find tokens, and what it is called in the table."""
    name: str
    kind: str            # "frozen", "fixed" or "adaptive"
    settings: Settings


def columns_to_compare(args, temperature: float) -> list:
    """The frozen model, then every fixed solver at every number of steps, then the adaptive one."""
    columns = [Column("frozen", "frozen", Settings(steps=0, temperature=temperature))]
    for solver in args.solvers:
        common = {"solver": solver, "temperature": temperature, "estimate": args.estimate,
                  "rtol": args.rtol, "atol": args.rtol}
        # it chooses its steps itself, so it stands once and not once for every number of them
        if solver in ADAPTIVE:
            columns.append(Column(solver, "adaptive", Settings(**common)))
            continue
        # the frozen model stands there already
        for steps in filter(None, args.steps):
            columns.append(Column(f"{solver} {steps}", "fixed", Settings(steps=steps, **common)))
    return columns + stopped_column(args, columns)


def stopped_column(args, columns: list) -> list:
    """The fixed way with the most steps once more, ended where the guess has stood."""
    fixed = [column for column in columns if column.kind == "fixed"]
    if not fixed or not args.stop_unchanged:
        return []
    longest = max(fixed, key=lambda column: column.settings.steps)
    settings = replace(longest.settings, stop_unchanged=args.stop_unchanged)
    return [Column(f"{longest.name} stop {args.stop_unchanged}", "adaptive", settings)]


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
        "right": right,
        "n": n,
        "accuracy": right / n,
        "low": low,
        "high": high,
        "nfe_per_token": nfe,
        "nfe_first": mean(answer.nfe[0] for answer in answers),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_token": flops_per_token(model, nfe, length, settings),
    }


def make_problems(task, args) -> dict:
    """The test problems of every group that was asked for, made once for all tables."""
    groups = [group for group in task.groups if not args.topics or group[0] in args.topics]
    return {group: [task.problem(group, i, args.seed) for i in range(args.problems)]
            for group in groups}


def accuracy_table(model, tokenizer, task, problems: dict, args, records: list):
    """Add a record for every group of problems, temperature and column to `records`."""
    # all jobs in one list, so that the bar knows how many there are
    jobs = [(temperature, group, column) for temperature in args.temperatures
            for group in problems for column in columns_to_compare(args, temperature)]
    for temperature, group, column in tqdm(jobs, disable=None, desc="accuracy"):
        cell = measure(
            model, tokenizer, task, problems[group], column.settings, args.seed)
        records.append({
            "group": task.title(group),
            "topic": group[0],
            "level": group[1],
            "unseen": group in task.unseen,
            "temperature": temperature,
            "column": column.name,
            "kind": column.kind,
            "settings": asdict(column.settings),
            **cell,
        })


@dataclass
class AtPositions:
    """A path at N positions of a batch, `where`, each of them a sequence of one token."""
    model: L2D
    index: tuple

    @property
    def config(self):
        return self.model.config

    def vocabulary(self):
        return self.model.vocabulary()

    def predict(self, x_t, t, class_ids, states, before=None):
        """As L2D.guess: logits (N, 1, V), x_t (N, 1, Z); the reading is that of the batch."""
        lm = self.model.lm
        if t == 0:
            return lm.logits(states.hidden[self.index]).float()[:, None]
        kept = self.model.time_table.at(t, class_ids)
        modulation = kept._replace(blocks=[m[:, 0] for m in kept.blocks], w_d=kept.w_d[:, 0])
        time = torch.tensor([t], device=x_t.device)
        before = None if before is None else before[:, 0]
        hidden = self.model.last_hidden(x_t[:, 0], time, modulation, states, before, self.index)
        return lm.logits(hidden).float()[:, None]


@torch.no_grad()
def forced_tokens(model, tokenizer, task, problems: list, settings: Settings, seed: int,
                  draws: int = 1):
    """(p of the likeliest token, is it right?) for every token of the right answers, (N,) each.

    draws  noises for each token; the probabilities that they lead to are averaged
    """
    confidences, rights = [], []
    for at in range(0, len(problems), BATCH):
        # the right tokens are given, so one early mistake does not spoil all that follows
        rows = [task.reference(problem, tokenizer) for problem in problems[at:at + BATCH]]
        batch = collate(rows).to(next(model.parameters()).device)
        targets = batch.targets
        if settings.steps:
            p = solved(model, batch, settings, seed + at, draws)
        else:
            p = model.lm(batch.ids)[targets.index].softmax(-1)
        confidence, token = p.max(-1)                                   # (N,)
        confidences.append(confidence)
        rights.append(token == targets.y)
    return torch.cat(confidences), torch.cat(rights)


def solved(model, batch: Batch, settings: Settings, seed: int, draws: int):
    """p (N, V) at the end of an ODE at every position that counts, the mean over noises."""
    targets = batch.targets
    counts = targets.index[0].bincount(minlength=len(batch.ids)).tolist()
    noises = RowDraws(counts, [torch.Generator().manual_seed(seed + i) for i in range(len(counts))])
    velocity = VelocityField(
        AtPositions(model, targets.index), model.read(batch.ids), settings.estimate,
        class_ids=targets.class_ids if model.config.classes else None,
        generators=[torch.Generator().manual_seed(seed + i) for i in range(len(targets.y))])
    total = 0.0
    for _ in range(draws):
        noise = noises.normal(model.config.width).to(batch.ids.device)
        x_0 = model.config.sigma * noise[:, None]                       # (N, 1, Z)
        solution = odeint(velocity, x_0, settings.solver, settings.steps)
        total = total + velocity.logits(solution.x, solution.prediction)[:, 0].softmax(-1)
    return total / draws


def token_tables(model, tokenizer, task, problems: dict, args) -> tuple:
    """(what more steps fixed and broke, calibration), token by token of the right answers."""
    # one batch of everything: the counts are of tokens, whatever problem they are of
    everything = [problem for some in problems.values() for problem in some]
    solver = next((name for name in args.solvers if name in FIXED), "euler")
    steps = sorted(set(args.steps))
    right, calibrated = {}, []
    # with one noise each number of steps, and with several the largest
    ways = [(0, 1), *((n, 1) for n in steps)]
    if args.draws > 1:
        ways.append((steps[-1], args.draws))
    for n, draws in ways:
        settings = Settings(steps=n, solver=solver, estimate=args.estimate)
        confidence, found = forced_tokens(
            model, tokenizer, task, everything, settings, args.seed, draws)
        right.setdefault(n, found)
        calibrated.append({"solver": solver, "steps": n, "draws": draws,
                           **calibration(confidence.tolist(), found.tolist())})
    # against the frozen model, and against the fewest steps: is it the path or the steps?
    pairs = [(0, n) for n in steps] + [(steps[0], n) for n in steps[1:]]
    broken = [{"from": a, "to": b, "solver": solver, **changes(right[a], right[b])}
              for a, b in pairs]
    return broken, calibrated


def guidance_table(model, tokenizer, task, problems: dict, args) -> list:
    """Accuracy for several weights, on the problems where only the class says what to do."""
    records = []
    for group, some in problems.items():
        # elsewhere the prompt has said it already, and no weight could help
        if group[0] not in task.guided:
            continue
        for weight in args.guidance:
            # the class is known to every one of them, only the weight differs
            settings = Settings(steps=8, guidance=weight, estimate=args.estimate)
            cell = measure(model, tokenizer, task, some, settings, args.seed)
            records.append({"group": task.title(group), "guidance": weight, **cell})
    return records


# --- benchmarks -----------------------------------------------------------------------------------

@dataclass
class Bench:
    """A benchmark under way: its questions, what was answered, and who grades it."""
    model: L2D
    tokenizer: object
    task: object
    args: argparse.Namespace
    asked: Asked
    records: Records
    grader: Grader

    def samples(self, column: Column) -> int:
        """Answers to each problem; without any chance in them one is all."""
        if not column.settings.steps and not column.settings.temperature:
            return 1
        return max([self.args.samples, *(k for _, k in map(parse_search, self.args.search))])


def benchmark(model, tokenizer, task, args):
    """Every problem in every column, a line each as they come; then the table."""
    config = getattr(model, "lm", model).config
    asked = ask_all(task, tokenizer, args, config.max_positions)
    about = {**asked.about, "model": fingerprint(model), "tokenizer": tokenizer.fingerprint,
             "draws": args.draws, "choices": args.choices, "seed": args.seed,
             "estimate": args.estimate, "rtol": args.rtol}
    grader = Grader(args.data_dir, args.allow_code_execution, args.code_seconds)
    grader.problems[task.name] = {one["id"]: one for one in asked.problems}
    if task.kind == "code":
        grader.check_references(task, [question.problem for question in asked.questions])
    out = Path(args.out)
    with claimed(out):
        start = time.time()
        records = Records(out / "records.jsonl", about, args.overwrite)
        bench = Bench(model, tokenizer, task, args, asked, records, grader)
        columns = [column for temperature in args.temperatures
                   for column in columns_to_compare(args, temperature)]
        answer_all(bench, columns)
        table = benchmark_table(bench, columns)
        print_scores(table, about)
        write_json({**provenance(model, args, start), "about": about, "rows": table},
                   out / "summary.json")
    print(f"\nrecords and summary are in {out}")


def answer_all(bench: Bench, columns: list):
    """Whatever is not in the records yet. Raises KeyboardInterrupt that says what is kept."""
    questions = bench.asked.questions
    jobs = [(column, bench.records.missing(column.name, column.settings.temperature,
                                           questions, bench.samples(column)))
            for column in columns]
    left = sum(len(mine) for _, mine in jobs)
    total = len(questions) * sum(map(bench.samples, columns))
    try:
        with tqdm(total=total, initial=total - left, disable=None, desc=bench.task.name) as bar:
            for column, mine in jobs:
                fill_column(bench, column, mine, bar)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {len(bench.records.found)} answers are in "
                                f"{bench.records.path}, the same command goes on") from None


def benchmark_table(bench: Bench, columns: list) -> list:
    """What was asked for now, though there may be records of more."""
    ids = {question.problem["id"] for question in bench.asked.questions}
    asked_for = {(one.name, one.settings.temperature): one for one in columns}
    asked = [record for (*where, id, sample), record in bench.records.found.items()
             if tuple(where) in asked_for and id in ids
             and sample < bench.samples(asked_for[tuple(where)])]
    searches = [parse_search(how) for how in bench.args.search]
    table = rows(bench.task, bench.grader.problems[bench.task.name], asked, searches)
    for row in table:
        length = round(row["prompt_tokens"] + row["tokens"] / 2)
        settings = asked_for[row["column"], row["temperature"]].settings
        row["flops_per_token"] = flops_per_token(
            bench.model, row["nfe_per_token"], length, settings)
    return table


def fill_column(bench: Bench, column: Column, jobs: list, bar):
    """Answer (question, sample) pairs, grade and write down each."""
    settings = replace(column.settings, max_new_tokens=bench.asked.max_new_tokens, score=True)
    by_letters = bench.task.kind == "letters" and bench.args.choices == "letters"
    answer = choose_letters if by_letters else write_answers
    for at in range(0, len(jobs), bench.args.batch_size):
        batch = jobs[at:at + bench.args.batch_size]
        # from the problem itself: neither its place nor its neighbours change its noise
        seeds = [zlib.crc32(question.problem["id"].encode()) + bench.args.seed + sample
                 for question, sample in batch]
        start = time.perf_counter()
        found = answer(bench, settings, [question for question, _ in batch], seeds)
        seconds = (time.perf_counter() - start) / len(batch)
        for (question, sample), some in zip(batch, found):
            record = {"benchmark": bench.task.name, "column": column.name,
                      "temperature": settings.temperature, "sample": sample,
                      **question.facts, **some, "seconds": seconds}
            bench.records.add({**record, **bench.grader(record)})
        bar.update(len(batch))


def write_answers(bench: Bench, settings: Settings, questions: list, seeds: list) -> list:
    """An answer in words to every question, and what it cost."""
    stop = Stop.of(bench.tokenizer, bench.task.stops[bench.asked.style])
    prompts = [question.ids for question in questions]
    answers = generate(bench.model, prompts, settings, stop, seeds=seeds)
    return [{"output": answer.text, "tokens": len(answer.nfe), "nfe": sum(answer.nfe),
             "cut": not answer.stopped, "score": answer.score} for answer in answers]


def choose_letters(bench: Bench, settings: Settings, questions: list, seeds: list) -> list:
    """The likeliest letter of each question, its probability a mean over draws of the noise."""
    prompts = [question.ids for question in questions]
    p, nfe = next_p(bench.model, prompts, settings, seeds, bench.args.draws)
    found = []
    for row, question in enumerate(questions):
        names = bench.task.options(question.problem)
        ids = letter_tokens(names, bench.tokenizer, bench.asked.style)
        found.append({**read_letters(names, p[:, row, ids]), "nfe": nfe[row]})
    return found


# --- the command line -----------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    """See data/flags/eval.py."""
    return eval_flags(__doc__, TASKS, Settings(), SOLVERS, ESTIMATES)


def check(args, task, given: dict):
    """Refuse what would fail after the work, or leave nothing to measure. Raises ValueError."""
    check_numbers(args)
    asked = {"adaptive": set(args.solvers) & set(ADAPTIVE), "fixed": set(args.solvers) & set(FIXED)}
    check_idle(args, given, task, asked)
    # every setting is refused or taken now, not when its turn comes
    for temperature in args.temperatures:
        columns_to_compare(args, temperature)
    for how in args.search:
        parse_search(how)
    if args.task == "tiny":
        check_tiny(args, task)
    elif task.kind == "code" and not args.allow_code_execution:
        raise ValueError(f"--task {args.task} runs what the model writes, which needs "
                         f"--allow_code_execution; {NOTICE}")


def check_tiny(args, task):
    # hours of work must not end with a missing package, or at a disk that takes nothing
    if args.plot:
        import_pyplot()
    for path in outputs(args):
        check_absent(path, args.overwrite)
        check_writable(path)
    if not all(args.steps):
        raise ValueError("--steps 0 is out of range; allowed: 1 or more "
                         "(the frozen model is always shown)")
    known = list(dict.fromkeys(group[0] for group in task.groups))
    for topic in args.topics or []:
        if topic not in known:
            raise ValueError(f"--topics {topic!r} is unknown; allowed: {', '.join(known)}")
    for weight in args.guidance:
        Settings(guidance=weight)


def outputs(args) -> list:
    """The files that will be written."""
    out = Path(args.out)
    return [out, out.with_suffix(".png")] if args.plot else [out]


def measure_all(model, tokenizer, task, problems: dict, args) -> dict:
    """Every table, printed as it is measured."""
    accuracy = []
    try:
        accuracy_table(model, tokenizer, task, problems, args, accuracy)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(keep(accuracy, args)) from None
    print_accuracy(accuracy)
    spent = effort(accuracy)
    print_effort(spent)
    # token by token, with the right answer given
    broken, calibrated, guidance = [], [], []
    if isinstance(model, L2D):
        broken, calibrated = token_tables(model, tokenizer, task, problems, args)
    print_changes(broken)
    print_calibration(calibrated)
    if isinstance(model, L2D) and model.config.classes:
        guidance = guidance_table(model, tokenizer, task, problems, args)
    print_guidance(guidance)
    return {"accuracy": accuracy, "effort": spent, "fixed_and_broken": broken,
            "calibration": calibrated, "guidance": guidance}


def keep(accuracy: list, args) -> str:
    """Write the cells that were finished before Ctrl-C; returns what to tell the user."""
    if not accuracy:
        return "stopped before the first cell was finished"
    # under another name: it must not be taken for a whole table
    part = Path(args.out).with_suffix(".partial.json")
    write_json({"args": vars(args), "stopped": True, "accuracy": accuracy}, part)
    return f"stopped; the {len(accuracy)} finished cells are in {part}"


def tiny(model, tokenizer, task, args):
    """The tables of the embedded topics, and their file."""
    # loading is not counted
    start = time.time()
    problems = make_problems(task, args)
    tables = measure_all(model, tokenizer, task, problems, args)
    # once and whole: a table that was cut off would be taken for a result
    write_json({**provenance(model, args, start), **tables}, args.out)
    print(f"\nwritten to {args.out} after {time.time() - start:.0f} s")
    if args.plot:
        plot_accuracy(tables["accuracy"], Path(args.out).with_suffix(".png"))


def grade_again(args):
    """The verdicts of records once more; no model is needed."""
    if not args.out:
        raise ValueError("--regrade needs --out, the file to write")
    grader = Grader(args.data_dir, args.allow_code_execution, args.code_seconds)
    regrade(Path(args.regrade), Path(args.out), grader, args.overwrite)


@command("eval.py")
def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.regrade:
        return grade_again(args)
    task = TASKS[args.task]
    given = given_flags(build_parser(), argv)
    fill_defaults(args, given)
    check(args, task, given)
    model, tokenizer = load_model(args.init_from, args.dtype, args.device, args.cache_dir,
                                  args.base, args.merge_lora)
    if not isinstance(model, L2D):      # a base, or one that --method=lora or full has finetuned
        print(f"{args.init_from} has no diffusion path: "
              "only the model itself is scored, as `frozen`")
        args.solvers = []
    if args.task == "tiny":
        tiny(model, tokenizer, task, args)
    else:
        benchmark(model, tokenizer, task, args)


if __name__ == "__main__":
    main()
