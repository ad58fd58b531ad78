"""Finetuning of a real model: a path beside a LoRA of as many parameters and the frozen model.

    python -m data.experiments.finetune --init_from=DIR     hours on a CPU; repeats no finished part
    python -m data.experiments.finetune --init_from=DIR --sweep 3e-4 1e-3 3e-3 --updates 24

Every training question is a turn, its answer the reply. Runs train.py and eval.py, by the commands
that a reader would type. The accuracy of the base at the task should be neither that of chance nor
100 %: for a small instruction-tuned model that is sums (data/tasks/sums.py).
"""

import hashlib
import json
from pathlib import Path

from data.experiments.headline import run, train_once
from data.flags.train import parse
from data.results.records import read_lines
from data.system.command import check_range, command, flag_parser, given_flags, refuse_idle
from data.system.disk import appearing, present, read_json, sha256_of, write_json
from data.tasks import TASKS
from data.tasks.files import find_folder
from data.tasks.task import of_split
from solvers import FIXED, SOLVERS

# of two values of a flag the later one counts
FROZEN = ["--method=l2d", "--start=frozen", "--objective=paper", "--own_kv", "--new_lr=0.1",
          "--lr=1e-3"]
REFINE = [*FROZEN, "--objective=refine", "--unroll=8"]
# A rank of LoRA is 305,280 parameters of SmolLM2-135M: 128 are as many as the path's 39.1 M. The
# rates of lora and frozen are the best of --sweep on sums; those of full and paper were not swept.
METHODS = {
    "lora": ["--method=lora", "--rank=128", "--lr=1e-3"],
    "full": ["--method=full", "--lr=1e-4"],
    "paper": ["--method=l2d", "--start=paper", "--objective=paper", "--lr=1e-3"],
    "frozen": FROZEN,
    "refine": REFINE,
    # for answers that the model finds when it is asked again, such as the ends of chains
    "self_kv": [*REFINE, "--no-own_kv", "--self_kv", "--lr=7e-4"],
    # the frozen start without one of its parts
    "no_difference": [*FROZEN, "--without=difference"],
    "no_estimate": [*FROZEN, "--without=estimate"],
    "no_own_kv": [*FROZEN, "--no-own_kv"],
    "no_groups": [*FROZEN, "--new_lr=1"],
}


def conversations(task, folder: Path) -> str:
    """The training questions and their answers: lines of JSON."""
    return "".join(json.dumps(task.conversation(problem)) + "\n"
                   for problem in of_split(task.load(folder), "train"))


def show_losses(out_dir: Path, methods: list):
    """Held-out loss at the start, at the end, and in each tenth of t."""
    for method in methods:
        entries = read_lines(out_dir / method / "log.jsonl")
        validations = [entry for entry in entries if "val_loss" in entry]
        first, last = validations[0], validations[-1]
        seconds = [entry["seconds"] for entry in entries if "seconds" in entry]
        print(f"{method:14} held-out loss {first['val_loss']:.3f} -> {last['val_loss']:.3f}, "
              f"{seconds[-1]:.0f} s; by tenth of t {last.get('by_tenth', '-')}")


def check(args, given: dict, task, answers: bool):
    """Refuse numbers out of range, and flags that would do nothing. Raises ValueError.

    answers  are there any, measured by eval.py?
    """
    check_range("--limit", args.limit, 1)
    check_range("--steps", min(args.steps), 1)
    path = any("--method=l2d" in METHODS[method] for method in args.methods)
    refuse_idle(given, [
        (("data_dir",), task.folder, "a task that is read from files"),
        (("limit", "steps", "solvers"), answers, "answers, which --sweep and ARC leave out"),
        (("steps", "solvers"), path, "a method that trains a path"),
        (("steps",), set(args.solvers) & set(FIXED), "a fixed solver"),
        (("dtype",), args.methods != ["full"], "another method than full"),
    ])


@command("data.experiments.finetune")
def main(argv=None):
    parser = flag_parser("python -m data.experiments.finetune", __doc__)
    add = parser.add_argument
    add("--init_from", required=True, help="directory of an instruction-tuned model")
    add("--data_dir", help="folder of the benchmark's files; sums has none")
    add("--task", default="sums",
        choices=["sums", "hard_sums", "chains", "hops", "arc_easy", "arc_challenge", "gsm8k"])
    add("--methods", nargs="+", default=["lora", "paper", "frozen", "refine"],
        choices=list(METHODS), help="training methods (default: lora paper frozen refine)")
    add("--sweep", nargs="+", default=[], metavar="RATE",
        help="learning rates to try instead: held-out losses alone, no answers")
    add("--updates", type=int, default=150,
        help="updates of 4 rows each (default: 150, one epoch of sums)")
    add("--warmup", type=int, default=20, help="updates of warm-up (default: 20)")
    add("--eval_every", type=int, default=50, help="updates between validations (default: 50)")
    add("--limit", type=int, default=300, help="number of test questions (default: 300)")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8],
        help="steps of the fixed solvers of a path (default: 1 2 4 8)")
    add("--solvers", nargs="+", default=["euler"], choices=list(SOLVERS),
        help="ODE solvers of a path (default: euler)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="precision of the frozen weights in training and evaluation; full finetuning trains "
             "in float32 (default: chosen by train.py and eval.py)")
    add("--seed", type=int, default=42, help="seed of the training (default: 42)")
    add("--out_dir", default="out-finetune",
        help="folder of all results (default: out-finetune)")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    # options are compared as texts by the harness alone
    answers = not args.sweep and task.kind != "letters"
    check(args, given_flags(parser, argv), task, answers)

    out_dir = Path(args.out_dir).absolute()
    rows, data = out_dir / "train.jsonl", out_dir / "data"
    init_from = Path(args.init_from).absolute()
    precision = [f"--dtype={args.dtype}"] if args.dtype else []
    trainings = {}
    for method in args.methods:
        for rate in args.sweep or [None]:
            words = METHODS[method] + ([] if method == "full" else precision)
            words += [f"--lr={rate}"] if rate else []
            trainings[f"{method}-{rate}" if rate else method] = [
                *words, f"--init_from={init_from}", f"--data={data}", f"--seed={args.seed}",
                f"--updates={args.updates}", "--batch_size=4", "--accumulate=1",
                f"--warmup={args.warmup}", f"--eval_every={args.eval_every}", "--val_rows=48"]
    # before anything is written
    for words in trainings.values():
        parse(words)
    weights = init_from / "model.safetensors"
    before = sha256_of(weights)
    text = conversations(task, find_folder(task.folder, args.data_dir))
    # finished parts are not repeated, so they must be of the same questions and model
    made_of = {"task": args.task, "base": before,
               "questions": hashlib.sha256(text.encode()).hexdigest()}
    note = out_dir / "made_of.json"
    if present(note) and read_json(note) != made_of:
        raise ValueError(f"{out_dir} holds results of another task or model, or of other questions "
                         f"(see {note}); choose another --out_dir, or remove it")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(made_of, note)
    with appearing(rows) as part:
        part.write_text(text, encoding="utf-8")
    if not (data / "meta.json").exists():
        # a row holds several questions
        run("-m", "data.text.chat", rows, f"--tokenizer={init_from}", f"--out_dir={data}",
            "--block_size=256", "--val_fraction=0.1",
            *(["--style=raw"] if task.trained_style == "plain" else []))
    for name, words in trainings.items():
        train_once(out_dir / name, *words)
    for method in args.methods if answers else []:
        words = ["--temperatures", "0", "1", "--shots=0", f"--style={task.trained_style}",
                 f"--limit={args.limit}"]
        if args.data_dir:
            words.append(f"--data_dir={Path(args.data_dir).absolute()}")
        # with a path the frozen model is measured too
        if "--method=l2d" in METHODS[method]:
            words += ["--solvers", *args.solvers]
            if any(solver in FIXED for solver in args.solvers):
                words += ["--steps", *args.steps]
        # if records exist, eval.py continues them
        run("eval.py", f"--task={args.task}", f"--init_from={out_dir / method}",
            f"--out={out_dir / f'eval-{method}'}", *words, *precision)
    if task.kind == "letters":
        for name, words in trainings.items():
            steps = " --steps 4" if "--method=l2d" in words else ""
            print(f"accuracy: python -m data.experiments.harness --tasks {args.task} "
                  f"--init_from={out_dir / name}{steps}")
    show_losses(out_dir, list(trainings))
    after = sha256_of(weights)
    print("the base's file is the same before and after:", before == after, before)


if __name__ == "__main__":
    main()
