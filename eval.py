"""Accuracy against compute on the embedded topics, always beside the frozen model under the same decoding.

    python eval.py                          the table, printed and written to eval.json
    python eval.py --problems 400 --steps 1 2 4 8 16 32 --solvers euler midpoint rk4 dopri5 --plot

For every topic and level: accuracy with its 95 % Wilson interval for the frozen model, for each number of steps of the
fixed solvers and for the adaptive one, greedy and at temperature 1; network evaluations (NFE), seconds and arithmetic
per token; what extra steps fixed and broke; what guidance changed. Read sample.py first.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.checkpoint import write_json
from data.tiny.topics import CLASSES, LEVELS, encode_problem, final_answer, make_problem
from diffusion import IGNORE, L2D, Flow
from sample import Settings, generate, load_model
from solvers import FIXED, SOLVERS, odeint
from train import collate


@dataclass
class Answered:
    text: str
    right: bool
    nfe: list        # per token


def answer_problems(model, tokenizer, problems, settings: Settings, seed: int = 0, batch_size: int = 128) -> list:
    """Generate an answer to every problem and grade it: exact match of the final answer. Each problem has its own seed."""
    result = []
    classes = isinstance(model, L2D) and model.config.classes == len(CLASSES)
    for at in range(0, len(problems), batch_size):
        batch = problems[at:at + batch_size]
        answers = generate(model, [tokenizer.encode_start(p.prompt) for p in batch], settings, tokenizer.stop_ids,
                           [CLASSES.index(p.label) for p in batch] if classes else None,
                           [zlib.crc32(p.prompt.encode()) + seed for p in batch])
        for problem, answer in zip(batch, answers):
            text = tokenizer.decode(answer.ids)
            result.append(Answered(text, answer.stopped and final_answer(text) == problem.answer, answer.nfe))
    return result


def wilson(right: int, n: int) -> tuple:
    """95 % interval of a proportion (Wilson 1927): stays inside [0, 1] and holds near its ends."""
    z, p = 1.959964, right / n
    # (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def flops_per_token(model, nfe: float, length: int, settings: Settings) -> float:
    """Multiply-adds, counted twice, to draw one token after `length` others: one frozen pass and `nfe` evaluations."""
    lm = model.lm if isinstance(model, L2D) else model
    config = lm.config
    matrices = lambda module: 2 * sum(p.numel() for p in module.parameters() if p.dim() == 2)
    head = 2 * config.vocab_size * config.hidden_size
    attention = 4 * config.layers * length * config.heads * config.head_dim
    frozen = sum(matrices(block) for block in lm.blocks) + attention
    if not settings.steps:
        return frozen + head
    own = sum(matrices(block) - matrices(block.modulation) for block in model.blocks)        # LoRA, or full copies
    kept = sum(matrices(block) - matrices(block.k) - matrices(block.v) for block in lm.blocks) if model.config.rank else 0
    average = 2 * config.vocab_size * model.config.width * (settings.estimate == "average")
    each = own + kept + matrices(model.from_z) + attention + head + average
    if settings.solver == "dopri5":      # its times are never the same twice, so the modulation is computed each time
        each += sum(matrices(block.modulation) for block in model.blocks) + 2 * matrices(model.time) + 2 * matrices(model.merge)
    return frozen + nfe * each


# --- the parts of the table -------------------------------------------------------------------------------------------

def measure(model, tokenizer, problems, settings: Settings, seed: int) -> dict:
    """One cell: accuracy, interval, NFE, seconds and arithmetic per token."""
    start = time.perf_counter()
    answers = answer_problems(model, tokenizer, problems, settings, seed)
    seconds, tokens = time.perf_counter() - start, sum(len(a.nfe) for a in answers)
    right, nfe = sum(a.right for a in answers), sum(sum(a.nfe) for a in answers) / tokens
    low, high = wilson(right, len(problems))
    length = sum(len(tokenizer.encode_start(p.prompt)) for p in problems) / len(problems) + tokens / len(problems) / 2
    flops = flops_per_token(model, nfe, round(length), settings)
    return {"right": right, "n": len(problems), "accuracy": right / len(problems), "low": low, "high": high,
            "nfe_per_token": nfe, "seconds": seconds, "tokens_per_second": tokens / seconds, "flops_per_token": flops}


def settings_to_compare(args, temperature: float) -> dict:
    """Column name -> Settings: the frozen model, then every solver at every number of steps, then the adaptive one."""
    common = dict(temperature=temperature, estimate=args.estimate, rtol=args.rtol, atol=args.rtol)
    columns = {"frozen": Settings(steps=0, temperature=temperature)}
    for solver in args.solvers:
        if solver in FIXED:
            columns |= {f"{solver} {steps}": Settings(steps=steps, solver=solver, **common) for steps in args.steps}
        else:
            columns[solver] = Settings(solver=solver, **common)
    return columns


def accuracy_table(model, tokenizer, args) -> list:
    """Records of every topic, level, temperature and column."""
    rows, records = [(topic, level) for topic in args.topics for level in LEVELS[topic]], []
    jobs = [(topic, level, temperature, name, settings) for temperature in args.temperatures for topic, level in rows
            for name, settings in settings_to_compare(args, temperature).items()]
    for topic, level, temperature, name, settings in tqdm(jobs, disable=None, desc="accuracy"):
        problems = [make_problem("test", i, args.seed, topic, level) for i in range(args.problems)]
        cell = measure(model, tokenizer, problems, settings, args.seed)
        records.append({"topic": topic, "level": level, "temperature": temperature, "column": name,
                        "settings": asdict(settings), **cell})
    return records


@torch.no_grad()
def forced_tokens(model, tokenizer, problems, settings: Settings, seed: int):
    """Right or wrong, for every token of the reference answers read up to it: a bool tensor (N,)."""
    batch = collate([encode_problem(problem, tokenizer) for problem in problems], next(model.parameters()).device)
    context, targets = model.lm.context(batch["ids"]), batch["targets"]
    if not settings.steps:
        logits = model.lm.logits(context.hidden)
    else:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(problems))]
        x_0 = model.config.sigma * torch.stack([torch.randn(targets.shape[1], model.config.width, generator=g) for g in generators])
        classes = batch["class_ids"] if model.config.classes else None
        flow = Flow(model, context, settings.estimate, class_ids=classes, generators=generators)
        logits = flow.logits(odeint(flow, x_0.to(targets.device), settings.solver, settings.steps).x)
    return (logits.argmax(-1) == targets)[targets != IGNORE]


def fixed_and_broken(model, tokenizer, args) -> list:
    """Token by token on the reference answers: what more steps turned from wrong to right, and from right to wrong."""
    problems = [make_problem("test", i, args.seed, topic, level)
                for topic in args.topics for level in LEVELS[topic] for i in range(args.problems)]
    solver = next((s for s in args.solvers if s in FIXED), "euler")
    steps = sorted(set(args.steps))
    right = {n: forced_tokens(model, tokenizer, problems, Settings(steps=n, solver=solver, estimate=args.estimate), args.seed)
             for n in (0, *steps)}
    compare = lambda a, b: {"from": a, "to": b, "tokens": len(right[a]), "fixed": int((~right[a] & right[b]).sum()),
                            "broken": int((right[a] & ~right[b]).sum()), "solver": solver}
    return [compare(0, n) for n in steps] + [compare(steps[0], n) for n in steps[1:]]


def guidance_table(model, tokenizer, args) -> list:
    """Accuracy on the strings, whose prompts do not say what to do, for several guidance weights."""
    records = []
    for level in LEVELS["strings"]:
        problems = [make_problem("test", i, args.seed, "strings", level) for i in range(args.problems)]
        for weight in args.guidance:
            settings = Settings(steps=8, guidance=weight, estimate=args.estimate)
            records.append({"level": level, "guidance": weight, **measure(model, tokenizer, problems, settings, args.seed)})
    return records


# --- output -----------------------------------------------------------------------------------------------------------

def percent(cell) -> str:
    return f"{100 * cell['accuracy']:5.1f} [{100 * cell['low']:3.0f},{100 * cell['high']:4.0f}]"


def print_accuracy(records):
    """One block per temperature: a row per topic and level, a column per way to find the tokens, then the cost of each column."""
    for temperature in dict.fromkeys(r["temperature"] for r in records):
        block = [r for r in records if r["temperature"] == temperature]
        columns = list(dict.fromkeys(r["column"] for r in block))
        decoding = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        print(f"\naccuracy in %, 95 % interval, {block[0]['n']} test problems a row, {decoding}")
        print(f"{'':12}" + "".join(f"{name:>16}" for name in columns))
        for topic, level in dict.fromkeys((r["topic"], r["level"]) for r in block):
            cells = {r["column"]: r for r in block if (r["topic"], r["level"]) == (topic, level)}
            print(f"{topic:9} {level} " + "".join(f"{percent(cells[name]):>16}" for name in columns))
        for name, key, unit, form in (("NFE/token", "nfe_per_token", 1, ".1f"), ("MFLOP/token", "flops_per_token", 1e6, ".2f"),
                                      ("tokens/s", "tokens_per_second", 1, ".0f")):
            mean = lambda column: sum(r[key] for r in block if r["column"] == column) / sum(r["column"] == column for r in block)
            print(f"{name:12}" + "".join(f"{mean(column) / unit:>16{form}}" for column in columns))


def print_rest(fixed, guidance):
    if fixed:
        print(f"\ntokens of the reference answers ({fixed[0]['tokens']} of them, {fixed[0]['solver']}): "
              "fixed = wrong before, right after")
        for r in fixed:
            before = "frozen" if r["from"] == 0 else f"{r['from']} step{'s' * (r['from'] > 1)}"
            print(f"  {before:>7} -> {r['to']:3} steps   fixed {r['fixed']:5}   broken {r['broken']:5}")
    if guidance:
        print("\nguidance on strings (euler, 8 steps): accuracy in %, 95 % interval; w = 0 does not see the class, w = 1 does")
        for level in dict.fromkeys(r["level"] for r in guidance):
            row = [f"w = {r['guidance']:g}: {percent(r)}" for r in guidance if r["level"] == level]
            print(f"  level {level}  " + "   ".join(row))


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot(records, path: Path):
    """Accuracy against NFE per token, one line per topic and level: the frozen model at NFE 0, then the first fixed solver."""
    plt = import_pyplot()
    fixed = next((r["settings"]["solver"] for r in records if r["column"].split()[0] in FIXED), None)
    temperatures = list(dict.fromkeys(r["temperature"] for r in records))
    figure, axes = plt.subplots(1, len(temperatures), figsize=(6 * len(temperatures), 4), sharey=True, squeeze=False)
    for axis, temperature in zip(axes[0], temperatures):
        for topic, level in dict.fromkeys((r["topic"], r["level"]) for r in records):
            line = [r for r in records if (r["topic"], r["level"], r["temperature"]) == (topic, level, temperature)
                    and r["column"].split()[0] in ("frozen", fixed)]
            line.sort(key=lambda r: r["nfe_per_token"])
            errors = [[r["accuracy"] - r["low"] for r in line], [r["high"] - r["accuracy"] for r in line]]
            axis.errorbar([r["nfe_per_token"] for r in line], [r["accuracy"] for r in line], errors, marker="o",
                          label=f"{topic} {level}")
        axis.set(xlabel="NFE per token (0: frozen model)", ylabel="accuracy", xscale="symlog",
                 title="greedy" if temperature == 0 else f"temperature {temperature:g}")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=150)
    part.replace(path)


def commit() -> str | None:
    """The commit that is checked out, with + where files differ from it; None outside a checkout."""
    git = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                                        check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init_from", default="tiny", help="directory of a trained path or of a model, or tiny (default)")
    add("--base", help="the frozen model, if it is no longer where the path was trained")
    add("--topics", nargs="+", default=list(LEVELS), choices=list(LEVELS), help="default: all")
    add("--problems", type=int, default=200, help="test problems per topic and level (default: 200)")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="intervals of the fixed solvers (default: 1 2 4 8 16)")
    add("--solvers", nargs="+", default=["euler", "dopri5"], choices=SOLVERS, help="default: euler dopri5")
    add("--rtol", type=float, default=Settings().rtol, help="rtol and atol of dopri5 (default: %(default)s)")
    add("--estimate", default="argmax", choices=("argmax", "sample", "average"), help="of the clean point (default: argmax)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="of the token; 0 is greedy (default: 0 1)")
    add("--guidance", type=float, nargs="*", default=[0, 1, 1.5, 2, 3], help="weights to compare on strings (default: 0 1 1.5 2 3)")
    add("--seed", type=int, default=0, help="of problems and noise (default: 0)")
    add("--out", default="eval.json", help="where the results are written (default: eval.json)")
    add("--plot", action=argparse.BooleanOptionalAction, default=False, help="draw them too, as a PNG beside the JSON")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen weights")
    add("--cache_dir", help="where downloaded models are kept")
    return parser


def check(args, model):
    if args.plot:
        import_pyplot()     # before the work, not after it
    if not isinstance(model, L2D):      # a base, or one that --method=lora or full has finetuned
        print(f"{args.init_from} has no diffusion path: only the model itself is scored, as `frozen`")
        args.solvers, args.guidance = [], []
    for name, values, least in (("problems", [args.problems], 1), ("steps", args.steps, 1)):
        if min(values) < least:
            raise ValueError(f"--{name} {min(values)} is out of range; allowed: {least} or more (the frozen model is always shown)")


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        model, tokenizer = load_model(args.init_from, args.dtype, args.device, args.cache_dir, args.base)
        check(args, model)
        start = time.time()
        accuracy = accuracy_table(model, tokenizer, args)
        print_accuracy(accuracy)
        classes = isinstance(model, L2D) and model.config.classes
        fixed = fixed_and_broken(model, tokenizer, args) if isinstance(model, L2D) else []
        guidance = guidance_table(model, tokenizer, args) if "strings" in args.topics and classes else []
        print_rest(fixed, guidance)
        write_json({"args": vars(args), "commit": commit(), "torch": torch.__version__, "python": platform.python_version(),
                    "machine": platform.platform(), "threads": torch.get_num_threads(),
                    "device": str(next(model.parameters()).device), "seconds": round(time.time() - start, 1),
                    "base_sha256": getattr(model, "lm", model).fingerprint(), "accuracy": accuracy, "fixed_and_broken": fixed, "guidance": guidance},
                   args.out)
        print(f"\nwritten to {args.out} after {time.time() - start:.0f} s")
        if args.plot:
            plot(accuracy, Path(args.out).with_suffix(".png"))
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
