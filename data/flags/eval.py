"""The flags of eval.py, and which of them belong to the embedded topics or to benchmarks alone."""

import argparse

from data.parts.draws import check_seed
from data.results.scores import parse_search
from data.system.command import (
    add_estimate_flags, add_model_flags, check_range, choices, flag_parser, refuse_idle)

# flags of the embedded topics alone, and of benchmarks alone
TINY = ("topics", "problems", "plot")
BENCHMARK = ("data_dir", "shots", "style", "choices", "class", "samples", "search",
             "max_new_tokens", "show_prompts", "allow_code_execution", "code_seconds")
CODE_SECONDS = (0.1, 86_400)


def eval_flags(description, tasks, default, solvers, estimates) -> argparse.ArgumentParser:
    """default: the Settings of sample.py, one home for every default; the rest: names."""
    parser = flag_parser("eval.py", description)
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    # the measurement
    add("--init_from", default="tiny",
        help="directory of a trained path or of a model, or tiny (default)")
    add("--task", default="tiny", choices=list(tasks), help="default: tiny")
    add("--regrade", metavar="IN.jsonl", help="records to grade again, without a model")
    # how tokens are found
    add("--steps", type=int, nargs="+",
        help="intervals of the fixed solvers; 0, the frozen model, is always shown "
             "(default: 1 2 4 8 16, for benchmarks 8)")
    add("--solvers", "--solver", nargs="+", choices=list(solvers),
        help="ODE solvers (default: euler dopri5, for benchmarks euler)")
    add("--rtol", type=float, default=default.rtol,
        help="rtol and atol of dopri5 (default: %(default)s)")
    add_estimate_flags(add, estimates)
    add("--stop_unchanged", type=int,
        help="evaluations in a row with the same prediction after which a token's ODE stops, in a "
             "column of its own; 0: no such column (default: 2, for benchmarks 0)")
    add("--draws", type=int,
        help="noises whose probabilities are averaged: for the calibration (default: 4), "
             "or for the letters of multiple choice (default: 8)")
    add("--temperatures", type=float, nargs="+",
        help="temperatures for choosing the token; 0: greedy, not for text "
             "(default: 0 1, for benchmarks 0, for text 1)")
    add("--guidance", type=float, nargs="+",
        help="guidance weights to compare; on the embedded topics where the class matters "
             "(default: 0 1 1.5 2 3, for benchmarks 1)")
    add("--seed", type=int, default=0, help="seed of problems and noise (default: 0)")
    # the embedded topics
    add("--topics", nargs="+", help="tiny: topics to measure (default: all)")
    add("--problems", type=int, default=200,
        help="tiny: test problems of each kind (default: 200)")
    add("--plot", action=switch, default=False,
        help="tiny: the results as a picture too, a PNG beside the JSON")
    # held-out text
    add("--data", help="text: directory made by data/text/chat.py")
    # benchmarks
    add("--data_dir", help="benchmarks: directory of the published files (default: the cache of "
                           "data.tasks)")
    add("--limit", type=int,
        help="benchmarks, text: number of problems or examples, the first ones (default: all)")
    add("--shots", type=int, help="benchmarks: worked examples in a prompt (default: the task's)")
    add("--style", choices=("chat", "plain"),
        help="benchmarks: turns of the model's chat format, or one text "
             "(default: chat where the model has a format)")
    add("--choices", choices=("letters", "generate"), default="letters",
        help="multiple choice: the likeliest letter, or a generated text (default: letters)")
    add("--class", dest="label", help="benchmarks: class of all answers, by name or number")
    add("--samples", type=int, default=1, help="benchmarks: answers per problem, for pass@k")
    add("--search", nargs="+", default=[], metavar="HOW",
        help="benchmarks: vote:K, the commonest of K answers; best:K, the one that the frozen "
             "model finds likeliest")
    add("--max_new_tokens", type=int,
        help="benchmarks: longest answer, in tokens (default: the task's)")
    add("--batch_size", type=int, default=16, help="problems or examples at a time (default: 16)")
    add("--show_prompts", type=int, default=0,
        help="benchmarks: number of prompts to print, the first ones (default: 0)")
    add("--allow_code_execution", action=switch, default=False,
        help="benchmarks of code: run the model's programs, in a child process with limits")
    add("--code_seconds", type=float, default=3.0,
        help="benchmarks of code: time limit of each program, in seconds (default: 3)")
    # output and machine
    add("--out", help="file of the results (default: eval.json); for benchmarks a directory "
                      "(default: out-TASK)")
    add("--overwrite", action=switch, default=False, help="replace an earlier --out")
    add_model_flags(add)
    return parser


def fill_defaults(args):
    """Set the defaults that depend on the task."""
    if args.task == "tiny":
        defaults = {"steps": [1, 2, 4, 8, 16], "solvers": ["euler", "dopri5"],
                    "temperatures": [0.0, 1.0], "guidance": [0, 1, 1.5, 2, 3],
                    "stop_unchanged": 2, "draws": 4, "out": "eval.json"}
    elif args.task == "text":
        defaults = {"steps": [1, 2, 4, 8], "solvers": ["euler"], "temperatures": [1.0],
                    "guidance": [1], "stop_unchanged": 0, "draws": 4, "out": "eval-text.json"}
    else:
        # benchmarks take hours: one column
        defaults = {"steps": [8], "solvers": ["euler"], "temperatures": [0.0], "guidance": [1],
                    "stop_unchanged": 0, "draws": 8, "out": f"out-{args.task}"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    # what was asked for twice is measured once
    for name in ("steps", "solvers", "temperatures", "guidance", "topics", "search"):
        value = getattr(args, name)
        setattr(args, name, value and list(dict.fromkeys(value)))


def check_regrade(args, given: dict):
    """Refuse what grading again would ignore. Raises ValueError with one line."""
    if not args.out:
        raise ValueError("--regrade needs --out, the file to write")
    acts = {"regrade", "out", "overwrite", "data_dir", "allow_code_execution", "code_seconds"}
    refuse_idle(given, [(sorted(given.keys() - acts), False, "a model, without --regrade")])
    check_range("--code_seconds", args.code_seconds, *CODE_SECONDS)


def check_flags(args, given: dict, task, adaptive: bool, fixed: bool):
    """Refuse numbers out of range, and flags that would be ignored. Raises ValueError.

    adaptive, fixed  is there a solver of this kind?
    """
    tiny = args.task == "tiny"
    text = args.task == "text"
    at_least = {1: ("problems", "draws", "limit", "samples", "max_new_tokens", "batch_size"),
                0: ("stop_unchanged", "shots", "show_prompts")}
    for least, names in at_least.items():
        for name in names:
            if getattr(args, name) is not None:
                check_range(f"--{name}", getattr(args, name), least)
    # more is a mistake, which would take all memory or never end
    for name, most in (("problems", 10**6), ("draws", 10**6), ("samples", 10**4)):
        check_range(f"--{name}", getattr(args, name), 1, most)
    check_range("--code_seconds", args.code_seconds, *CODE_SECONDS)
    # the frozen model is always shown
    check_range("--steps", min(args.steps), 1 if tiny else 0)
    check_seed(args.seed)
    if text:
        check_range("--temperatures", min(args.temperatures), 0.01)
    if tiny:
        for topic in args.topics or []:
            choices(topic, dict(task.groups), "--topics")
    generated = not text and (task.kind != "letters" or args.choices == "generate")
    path = adaptive or max(args.steps) > 0
    random = path or (not text and max(args.temperatures) > 0)
    refuse_idle(given, [
        (TINY, tiny, "--task tiny"),
        (BENCHMARK, not tiny and not text, "--task with a benchmark"),
        (("limit", "batch_size"), not tiny, "--task with a benchmark, or text"),
        (("data",), text, "--task text"),
        (("class", "guidance", "solvers", "estimate", "draws", "merge_lora"), path,
         "a diffusion path, --steps of 1 or more"),
        (("guidance",), tiny or args.label is not None or set(args.guidance) == {1}, "--class"),
        (("guidance",), not tiny or not args.topics or set(args.topics) & set(task.guided),
         "a topic where the class matters, such as --topics strings"),
        # the calibration of the embedded topics has a fixed solver in any case
        (("steps",), tiny or fixed, "a fixed solver; dopri5 takes its own steps"),
        (("data_dir",), tiny or task.folder, "a benchmark that is read from files"),
        (("rtol",), adaptive, "--solvers dopri5"),
        (("estimate_temperature",), args.estimate != "argmax", "--estimate sample or average"),
        (("stop_unchanged",), (fixed and max(args.steps) > 0) or not args.stop_unchanged,
         "a fixed solver, --steps of 1 or more"),
        (("choices",), task.kind == "letters", "a task of multiple choice"),
        (("allow_code_execution", "code_seconds"), task.kind == "code", "a task of code"),
        (("max_new_tokens", "samples", "search"), generated,
         "generated answers, --choices generate"),
        (("temperatures",), generated or text, "generated answers, --choices generate"),
        (("samples", "search"), random, "--temperatures of more than 0, or --steps of 1 or more"),
        (("seed",), tiny or random, "--temperatures of more than 0, or --steps of 1 or more"),
        (("samples",), args.samples >= max([1, *(parse_search(how)[1] for how in args.search)]),
         "as many answers as --search takes"),
        (("draws",), tiny or text or not generated, "--choices letters"),
    ])
