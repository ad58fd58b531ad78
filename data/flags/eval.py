"""The flags of eval.py, and which of them belong to the embedded topics or to benchmarks alone."""

import argparse

from data.parts.draws import check_seed
from data.system.command import add_model_flags, flag_parser, refuse_idle

# Only the tables of the embedded topics know these, and only benchmarks those.
TINY = ("topics", "problems", "guidance", "plot")
BENCHMARK = ("data_dir", "limit", "shots", "style", "choices", "samples", "search",
             "max_new_tokens", "batch_size", "show_prompts", "allow_code_execution",
             "code_seconds")


def eval_flags(description, tasks, default, solvers, estimates) -> argparse.ArgumentParser:
    """default: the Settings of sample.py, one home for every default; the rest: names."""
    parser = flag_parser("eval.py", description)
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    # what is measured
    add("--init_from", default="tiny",
        help="directory of a trained path or of a model, or tiny (default)")
    add("--base", help="the frozen model, if it is no longer where the path was trained")
    add("--task", default="tiny", choices=list(tasks), help="default: tiny")
    add("--regrade", metavar="IN.jsonl", help="grade these records again, without a model")
    # how tokens are found
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16],
        help="intervals of the fixed solvers; 0, the frozen model, is always shown "
             "(default: 1 2 4 8 16, for benchmarks 8)")
    add("--solvers", "--solver", nargs="+", default=["euler", "dopri5"], choices=list(solvers),
        help="default: euler dopri5, for benchmarks euler")
    add("--rtol", type=float, default=default.rtol,
        help="rtol and atol of dopri5 (default: %(default)s)")
    add("--estimate", default="argmax", choices=estimates,
        help="of the clean point (default: argmax)")
    add("--stop_unchanged", type=int,
        help="evaluations after which a guess that stood is final, in a column of its own; "
             "0: no such column (default: 2, for benchmarks 0)")
    add("--draws", type=int,
        help="noises whose probabilities are averaged: for the calibration (default: 4), "
             "or for the letters of multiple choice (default: 8)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0],
        help="of the token; 0 is greedy (default: 0 1, for benchmarks 0)")
    add("--seed", type=int, default=0, help="of problems and noise (default: 0)")
    add_tiny_flags(add, switch)
    add_benchmark_flags(add, switch)
    # output and machine
    add("--out", help="where the results are written (default: eval.json; for benchmarks a "
                      "directory, out-TASK)")
    add("--overwrite", action=switch, default=False, help="of an earlier --out")
    add_model_flags(add)
    return parser


def add_tiny_flags(add, switch):
    add("--topics", nargs="+", help="tiny: some kinds of problems only (default: all)")
    add("--problems", type=int, default=200,
        help="tiny: test problems of each kind (default: 200)")
    add("--guidance", type=float, nargs="*", default=[0, 1, 1.5, 2, 3],
        help="tiny: weights to compare where the class matters (default: 0 1 1.5 2 3)")
    add("--plot", action=switch, default=False,
        help="tiny: draw the results too, as a PNG beside the JSON")


def add_benchmark_flags(add, switch):
    add("--data_dir", help="benchmarks: the published files (default: what data.tasks has got)")
    add("--limit", type=int, help="benchmarks: the first problems only (default: all)")
    add("--shots", type=int, help="benchmarks: worked examples in a prompt (default: the task's)")
    add("--style", choices=("chat", "plain"),
        help="benchmarks: turns of the model's chat format, or one text "
             "(default: chat where the model has a format)")
    add("--choices", choices=("letters", "generate"), default="letters",
        help="multiple choice: the likeliest letter, or a generated text (default: letters)")
    add("--samples", type=int, default=1, help="benchmarks: answers per problem, for pass@k")
    add("--search", nargs="+", default=[], metavar="HOW",
        help="benchmarks: vote:K, the commonest of K answers; best:K, the one that the frozen "
             "model finds likeliest")
    add("--max_new_tokens", type=int, help="benchmarks: longest answer (default: the task's)")
    add("--batch_size", type=int, default=16, help="benchmarks: problems at a time (default: 16)")
    add("--show_prompts", type=int, default=0, help="benchmarks: print the first so many prompts")
    add("--allow_code_execution", action=switch, default=False,
        help="benchmarks of code: run what the model wrote, in a child process with limits")
    add("--code_seconds", type=float, default=3.0,
        help="benchmarks of code: limit of each program (default: 3)")


def fill_defaults(args, given: dict):
    """What depends on the task: whoever reads args afterwards finds the values that hold."""
    tiny = args.task == "tiny"
    # benchmarks take hours: one way, unless more are asked for
    for name, value in (("temperatures", [0.0]), ("steps", [8]), ("solvers", ["euler"])):
        if not tiny and name not in given:
            setattr(args, name, value)
    if args.stop_unchanged is None:
        args.stop_unchanged = 2 if tiny else 0
    if args.draws is None:
        args.draws = 4 if tiny else 8
    if args.out is None:
        args.out = "eval.json" if tiny else f"out-{args.task}"


def check_numbers(args):
    """Refuse what is out of range. Raises ValueError with one line."""
    at_least = {1: ("problems", "draws", "limit", "samples", "max_new_tokens", "batch_size"),
                0: ("stop_unchanged", "shots", "show_prompts"), 0.1: ("code_seconds",)}
    for least, names in at_least.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not least <= value < 1e9:
                raise ValueError(f"--{name} {value} is out of range; allowed: {least} or more")
    if min(args.steps) < 0:
        raise ValueError(f"--steps {min(args.steps)} is out of range; allowed: 0 or more")
    check_seed(args.seed)


def check_idle(args, given: dict, task, solvers: dict):
    """Refuse what would otherwise be ignored. solvers: "fixed" and "adaptive" -> asked for?"""
    tiny = args.task == "tiny"
    generated = task.kind != "letters" or args.choices == "generate"
    refuse_idle(given, [
        (TINY, tiny, "--task tiny"),
        (BENCHMARK, not tiny, "--task with a benchmark"),
        (("data_dir",), tiny or task.folder, "a benchmark that is read from files"),
        (("rtol",), solvers["adaptive"], "--solvers dopri5"),
        (("stop_unchanged",), solvers["fixed"] or not args.stop_unchanged, "a fixed solver"),
        (("choices",), task.kind == "letters", "a task of multiple choice"),
        (("allow_code_execution", "code_seconds"), task.kind == "code", "a task of code"),
        (("max_new_tokens", "samples", "search", "temperatures"), generated,
         "generated answers, --choices generate"),
        (("draws",), tiny or not generated, "--choices letters"),
    ])
