"""Accuracy against compute, always beside the frozen model under the same decoding.

    python eval.py                          the table, printed and written to eval.json
    python eval.py --problems 400 --steps 1 2 4 8 16 32 --solvers euler midpoint dopri5 --plot

For every kind of problem of a task: accuracy with its 95 % Wilson interval for the frozen model,
for each number of steps of the fixed solvers and for the adaptive one, greedy and at temperature 1;
network evaluations (NFE), seconds and arithmetic per token; what extra steps fixed and broke; what
guidance changed. No task is known here: they are in data/tasks/. Read sample.py first.
"""

import argparse
import math
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.batches import IGNORE, collate
from data.checkpoint import write_json
from data.figures import import_pyplot, plot_accuracy
from data.tasks import TASKS
from diffusion import ESTIMATES, L2D, VelocityField
from sample import Settings, answer_problems, load_model
from solvers import ADAPTIVE, FIXED, SOLVERS, odeint


def wilson(right: int, n: int) -> tuple:
    """95 % interval of a proportion (Wilson 1927): inside [0, 1], and true near its ends."""
    # p ± z·√(p(1−p)/n), the usual one, has no width at all where every answer is right
    z = 1.959964
    p = right / n
    # (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    middle = p + z ** 2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z ** 2 / (4 * n ** 2))
    whole = 1 + z ** 2 / n
    return (middle - half) / whole, (middle + half) / whole


# --- arithmetic -----------------------------------------------------------------------------------

def matrix_flops(*modules) -> int:
    """Multiply-adds, counted twice, of one vector through every matrix of these modules."""
    # by identity: a head that is tied to the embedding is one matrix
    matrices = {id(p): p for module in modules for p in module.parameters() if p.dim() == 2}
    return 2 * sum(p.numel() for p in matrices.values())


def frozen_flops(lm, length: int) -> int:
    """One token through the frozen model after `length` others, without the head."""
    return matrix_flops(*lm.blocks) + attention_flops(lm.config, length)


def attention_flops(config, length: int) -> int:
    # q·kᵀ and p·v: each a product and a sum for every token, head and channel
    return 4 * config.layers * length * config.heads * config.head_dim


def evaluation_flops(model: L2D, length: int, settings: Settings) -> int:
    """One evaluation of the diffusion path after `length` tokens, the head included."""
    lm = model.lm
    config = lm.config
    # keys and values are the frozen model's: the path multiplies neither K nor V
    total = attention_flops(config, length) + matrix_flops(model.from_z, lm.head)
    for block in model.blocks:
        total += matrix_flops(block.q, block.o, block.mlp)
        if model.config.rank and block.q.folded is not None:
            # one product with the sum instead of W, A and B
            total -= lora_flops(block)
    # p @ V touches all of the vocabulary, argmax a single row
    if settings.estimate == "average":
        total += 2 * config.vocab_size * model.config.width
    return total


def lora_flops(block) -> int:
    """What A and B of one layer cost where they are not folded."""
    return 2 * sum(p.numel() for name, p in block.named_parameters() if name[-2:] in (".A", ".B"))


def flops_per_token(model, nfe: float, length: int, settings: Settings) -> float:
    """To draw one token after `length` others: one frozen pass and `nfe` evaluations.

    What depends on the time alone is looked up, V is made once: neither is counted.
    """
    lm = model.lm if isinstance(model, L2D) else model
    frozen = frozen_flops(lm, length)
    if not settings.steps:
        return frozen + matrix_flops(lm.head)
    return frozen + nfe * evaluation_flops(model, length, settings)


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
        for steps in args.steps:
            columns.append(Column(f"{solver} {steps}", "fixed", Settings(steps=steps, **common)))
    return columns


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
    nfe = sum(sum(answer.nfe) for answer in answers) / tokens
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
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_token": flops_per_token(model, nfe, length, settings),
    }


def make_problems(task, args) -> dict:
    """The test problems of every group that was asked for, made once for all tables."""
    groups = [group for group in task.groups if not args.topics or group[0] in args.topics]
    return {group: [task.problem(group, i, args.seed) for i in range(args.problems)]
            for group in groups}


def accuracy_table(model, tokenizer, task, problems: dict, args) -> list:
    """A record for every group of problems, temperature and column."""
    # all jobs in one list, so that the bar knows how many there are
    jobs = [(temperature, group, column) for temperature in args.temperatures
            for group in problems for column in columns_to_compare(args, temperature)]
    records = []
    for temperature, group, column in tqdm(jobs, disable=None, desc="accuracy"):
        cell = measure(
            model, tokenizer, task, problems[group], column.settings, args.seed)
        records.append({
            "group": task.title(group),
            "temperature": temperature,
            "column": column.name,
            "kind": column.kind,
            "settings": asdict(column.settings),
            **cell,
        })
    return records


@torch.no_grad()
def forced_tokens(model, tokenizer, task, problems: list, settings: Settings, seed: int):
    """Right or wrong, for every token of the right answers read up to it: bool (N,)."""
    # the right tokens are given, so one early mistake does not spoil all that follows
    rows = [task.reference(problem, tokenizer) for problem in problems]
    batch = collate(rows, next(model.parameters()).device)
    targets = batch["targets"]
    reading = model.lm.read(batch["ids"])
    if settings.steps:
        # every position has an ODE of its own, all of them run at once
        shape = (targets.shape[1], model.config.width)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(problems))]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        x_0 = model.config.sigma * noise.to(targets.device)             # (B, T, Z)
        class_ids = batch["class_ids"] if model.config.classes else None
        velocity = VelocityField(model, reading, settings.estimate, class_ids=class_ids,
                                 generators=generators)
        logits = velocity.logits(odeint(velocity, x_0, settings.solver, settings.steps).x)
    else:
        logits = model.lm.logits(reading.hidden)
    return (logits.argmax(-1) == targets)[targets != IGNORE]


def fixed_and_broken(model, tokenizer, task, problems: dict, args) -> list:
    """Token by token: what more steps turned from wrong to right, and from right to wrong."""
    # one batch of everything: the counts are of tokens, whatever problem they are of
    everything = [problem for some in problems.values() for problem in some]
    solver = next((name for name in args.solvers if name in FIXED), "euler")
    steps = sorted(set(args.steps))
    right = {}
    for n in (0, *steps):
        settings = Settings(steps=n, solver=solver, estimate=args.estimate)
        right[n] = forced_tokens(model, tokenizer, task, everything, settings, args.seed)
    # against the frozen model, and against the fewest steps: is it the path or the steps?
    pairs = [(0, n) for n in steps] + [(steps[0], n) for n in steps[1:]]
    return [{"from": a, "to": b, "solver": solver, **changes(right[a], right[b])}
            for a, b in pairs]


def changes(before, after) -> dict:
    """Counts of the tokens that changed sides."""
    return {
        "tokens": len(before),
        "fixed": int((~before & after).sum()),
        "broken": int((before & ~after).sum()),
    }


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


# --- output ---------------------------------------------------------------------------------------

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
    # dict.fromkeys: each once, in the order in which they came
    for temperature in dict.fromkeys(r["temperature"] for r in records):
        block = [r for r in records if r["temperature"] == temperature]
        columns = list(dict.fromkeys(r["column"] for r in block))
        decoding = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        print(f"\naccuracy in %, 95 % interval, {block[0]['n']} test problems a row, {decoding}")
        print(" " * 12 + "".join(f"{name:>16}" for name in columns))
        for group in dict.fromkeys(r["group"] for r in block):
            cells = [percent(r) for r in block if r["group"] == group]
            print(f"{group} " + "".join(f"{cell:>16}" for cell in cells))
        # the same in every row but for its length, so one line for all of them
        for name, key, unit, form in COSTS:
            means = [mean(r[key] for r in block if r["column"] == column) for column in columns]
            print(f"{name:12}" + "".join(f"{value / unit:>16{form}}" for value in means))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def print_changes(records: list):
    if not records:
        return
    print(f"\ntokens of the reference answers ({records[0]['tokens']} of them, "
          f"{records[0]['solver']}): fixed = wrong before, right after")
    for r in records:
        before = "frozen"
        if r["from"]:
            before = f"{r['from']} step" if r["from"] == 1 else f"{r['from']} steps"
        print(f"  {before:>7} -> {r['to']:3} steps   "
              f"fixed {r['fixed']:5}   broken {r['broken']:5}")


def print_guidance(records: list):
    if not records:
        return
    print("\nguidance (euler, 8 steps): accuracy in %, 95 % interval; "
          "w = 0 does not see the class, w = 1 does")
    for group in dict.fromkeys(r["group"] for r in records):
        cells = [f"w = {r['guidance']:g}: {percent(r)}" for r in records if r["group"] == group]
        print(f"{group}  " + "   ".join(cells))


def commit() -> str | None:
    """The commit that is checked out, + where files differ from it; None outside a checkout."""
    # a number without the code that made it cannot be repeated
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    # an archive without git, or a machine without it
    except (OSError, subprocess.CalledProcessError):
        return None


def circumstances(model, args, start: float) -> dict:
    """All that one needs to repeat a result or to doubt it."""
    return {
        "args": vars(args),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(next(model.parameters()).device),
        "seconds": round(time.time() - start, 1),
        "base_sha256": getattr(model, "lm", model).fingerprint(),
    }


# --- the command line -----------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    # what is measured
    add("--init_from", default="tiny",
        help="directory of a trained path or of a model, or tiny (default)")
    add("--base", help="the frozen model, if it is no longer where the path was trained")
    add("--task", default="tiny", choices=list(TASKS), help="default: tiny")
    add("--topics", nargs="+", help="some kinds of problems only (default: all)")
    add("--problems", type=int, default=200, help="test problems of each kind (default: 200)")
    # how tokens are found
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16],
        help="intervals of the fixed solvers (default: 1 2 4 8 16)")
    add("--solvers", nargs="+", default=["euler", "dopri5"], choices=list(SOLVERS),
        help="default: euler dopri5")
    add("--rtol", type=float, default=Settings().rtol,
        help="rtol and atol of dopri5 (default: %(default)s)")
    add("--estimate", default="argmax", choices=ESTIMATES,
        help="of the clean point (default: argmax)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0],
        help="of the token; 0 is greedy (default: 0 1)")
    add("--guidance", type=float, nargs="*", default=[0, 1, 1.5, 2, 3],
        help="weights to compare where the class matters (default: 0 1 1.5 2 3)")
    add("--seed", type=int, default=0, help="of problems and noise (default: 0)")
    # output and machine
    add("--out", default="eval.json", help="where the results are written (default: eval.json)")
    add("--plot", action=switch, default=False, help="draw them too, as a PNG beside the JSON")
    add("--fold_lora", action=switch, default=True,
        help="add the path's LoRA into copies of its matrices: faster, more memory")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen weights")
    add("--cache_dir", help="where downloaded models are kept")
    return parser


def check(args, task):
    """Refuse what would fail after the work, or leave nothing to measure. Raises ValueError."""
    # hours of work must not end with a missing package
    if args.plot:
        import_pyplot()
    for name, values in (("problems", [args.problems]), ("steps", args.steps)):
        if min(values) < 1:
            raise ValueError(f"--{name} {min(values)} is out of range; allowed: 1 or more "
                             "(the frozen model is always shown)")
    known = list(dict.fromkeys(group[0] for group in task.groups))
    for topic in args.topics or []:
        if topic not in known:
            raise ValueError(f"--topics {topic!r} is unknown; allowed: {', '.join(known)}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    task = TASKS[args.task]
    try:
        check(args, task)
        model, tokenizer = load_model(args.init_from, args.dtype, args.device, args.cache_dir,
                                      args.base, args.fold_lora)
        has_path = isinstance(model, L2D)
        if not has_path:      # a base, or one that --method=lora or full has finetuned
            print(f"{args.init_from} has no diffusion path: "
                  "only the model itself is scored, as `frozen`")
            args.solvers = []
        # loading is not counted
        start = time.time()
        problems = make_problems(task, args)
        accuracy = accuracy_table(model, tokenizer, task, problems, args)
        print_accuracy(accuracy)
        # token by token, with the right answer given
        broken = []
        if has_path:
            broken = fixed_and_broken(model, tokenizer, task, problems, args)
        print_changes(broken)
        guidance = []
        if has_path and model.config.classes:
            guidance = guidance_table(model, tokenizer, task, problems, args)
        print_guidance(guidance)
        # once and whole: a table that was cut off would be taken for a result
        write_json({**circumstances(model, args, start), "accuracy": accuracy,
                    "fixed_and_broken": broken, "guidance": guidance}, args.out)
        print(f"\nwritten to {args.out} after {time.time() - start:.0f} s")
        if args.plot:
            plot_accuracy(accuracy, Path(args.out).with_suffix(".png"))
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
