"""Accuracy against compute, always beside the frozen model under the same decoding.

    python eval.py                          the table, printed and written to eval.json
    python eval.py --problems 400 --steps 1 2 4 8 16 32 --solvers euler midpoint dopri5 --plot

For every kind of problem of a task: accuracy with its 95 % Wilson interval for the frozen model,
for each number of steps of the fixed solvers and for the adaptive one, greedy and at temperature 1;
network evaluations (NFE), seconds and arithmetic per token; what adaptive ways spend on each level;
what extra steps fixed and broke, and how sure they are; what guidance changed. No task is known
here: they are in data/tasks/. Read sample.py first.
"""

import argparse
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# first: from here on Ctrl-C is one line
from data.command import command, given_flags, refuse_idle

import torch
from tqdm import tqdm

from data.batches import IGNORE, collate
from data.disk import check_absent, check_writable, write_json
from data.draws import check_seed, draw_noise_each
from data.figures import import_pyplot, plot_accuracy
from data.statistics import calibration, mean, wilson
from data.tables import (
    effort, print_accuracy, print_calibration, print_changes, print_effort, print_guidance)
from data.tasks import TASKS
from diffusion import ESTIMATES, L2D, VelocityField
from model import LoRA
from sample import Settings, answer_problems, load_model
from solvers import ADAPTIVE, FIXED, SOLVERS, odeint


BATCH = 128        # problems at a time, where tokens are forced


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
    total = attention_flops(config, length) + matrix_flops(model.from_z, lm.head)
    for block in model.blocks:
        # keys and values are there already: the path multiplies neither K nor V
        total += used_flops(block.q, block.o, block.mlp)
    if model.config.self_conditioning:
        # the guess is read: p @ E touches all of the vocabulary
        total += 2 * config.vocab_size * config.hidden_size + matrix_flops(model.from_guess)
    # p @ V as well, argmax a single row
    if settings.estimate == "average":
        total += 2 * config.vocab_size * model.config.width
    return total


def used_flops(*modules) -> int:
    """Of matrices of the path: one product with the sum W + BA where it is folded, else three."""
    total = matrix_flops(*modules)
    for module in modules:
        for part in module.modules():
            if isinstance(part, LoRA) and part.folded is not None:
                total -= 2 * (part.A.numel() + part.B.numel())
    return total


def reading_flops(model: L2D, length: int) -> int:
    """One token through the path's own layers, where it keeps keys and values of its own."""
    if not model.config.own_reading:
        return 0
    products = sum(used_flops(*block.children()) for block in model.blocks)
    # the modulation is looked up
    products -= sum(matrix_flops(block.modulation) for block in model.blocks)
    return products + attention_flops(model.lm.config, length)


def flops_per_token(model, nfe: float, length: int, settings: Settings) -> float:
    """To draw one token after `length` others: the tokens read, and `nfe` evaluations.

    What depends on the time alone is looked up, V is made once: neither is counted. The evaluation
    at t = 0 needs the head alone; with guidance there are two of them.
    """
    lm = model.lm if isinstance(model, L2D) else model
    frozen = frozen_flops(lm, length)
    if not settings.steps:
        return frozen + matrix_flops(lm.head)
    read = frozen + reading_flops(model, length)
    at_zero = matrix_flops(lm.head)
    return read + at_zero + (nfe - 1) * evaluation_flops(model, length, settings)


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
            "far": group in task.far,
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
    where: tuple

    @property
    def config(self):
        return self.model.config

    def vocabulary(self):
        return self.model.vocabulary()

    def guess(self, x_t, t, class_ids, reading, before=None):
        """As L2D.guess: logits (N, 1, V), x_t (N, 1, Z); the reading is that of the batch."""
        lm = self.model.lm
        if t == 0:
            return lm.logits(reading.hidden[self.where]).float()[:, None]
        kept = self.model.time_table.at(t, class_ids)
        modulation = kept._replace(blocks=[m[:, 0] for m in kept.blocks], w_d=kept.w_d[:, 0])
        time = torch.tensor([t], device=x_t.device)
        before = None if before is None else before[:, 0]
        hidden = self.model.denoise(x_t[:, 0], time, modulation, reading, before, self.where)
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
        batch = collate(rows, next(model.parameters()).device)
        where = (batch["targets"] != IGNORE).nonzero(as_tuple=True)
        if settings.steps:
            p = solved(model, batch, where, settings, seed + at, draws)
        else:
            p = model.lm(batch["ids"])[where].softmax(-1)
        confidence, token = p.max(-1)                                   # (N,)
        confidences.append(confidence)
        rights.append(token == batch["targets"][where])
    return torch.cat(confidences), torch.cat(rights)


def solved(model, batch: dict, where, settings: Settings, seed: int, draws: int):
    """p (N, V) at the end of an ODE at every position `where`, the mean over `draws` noises."""
    reading = model.read(batch["ids"])
    class_ids = batch["class_ids"][where[0]] if model.config.classes else None
    shape = (batch["ids"].shape[1], model.config.width)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(batch["ids"]))]
    velocity = VelocityField(
        AtPositions(model, where), reading, settings.estimate, class_ids=class_ids,
        generators=[torch.Generator().manual_seed(seed + i) for i in range(len(where[0]))])
    total = 0.0
    for _ in range(draws):
        noise = draw_noise_each(shape, generators)
        x_0 = model.config.sigma * noise.to(reading.hidden.device)[where]   # (N, Z)
        solution = odeint(velocity, x_0[:, None], settings.solver, settings.steps)
        total = total + velocity.logits(solution.x, solution.guess)[:, 0].softmax(-1)
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
    add("--stop_unchanged", type=int, default=2,
        help="evaluations after which a guess that stood is final, in a column of its own; "
             "0: no such column (default: 2)")
    add("--draws", type=int, default=4,
        help="noises whose probabilities are averaged for the calibration (default: 4)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0],
        help="of the token; 0 is greedy (default: 0 1)")
    add("--guidance", type=float, nargs="*", default=[0, 1, 1.5, 2, 3],
        help="weights to compare where the class matters (default: 0 1 1.5 2 3)")
    add("--seed", type=int, default=0, help="of problems and noise (default: 0)")
    # output and machine
    add("--out", default="eval.json", help="where the results are written (default: eval.json)")
    add("--plot", action=switch, default=False, help="draw them too, as a PNG beside the JSON")
    add("--overwrite", action=switch, default=False, help="of an earlier --out")
    add("--fold_lora", action=switch, default=True,
        help="add the path's LoRA into copies of its matrices: faster, more memory")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen weights")
    add("--cache_dir", help="where downloaded models are kept")
    return parser


def check(args, task, given: dict):
    """Refuse what would fail after the work, or leave nothing to measure. Raises ValueError."""
    # hours of work must not end with a missing package, or at a disk that takes nothing
    if args.plot:
        import_pyplot()
    for path in outputs(args):
        check_absent(path, args.overwrite)
        check_writable(path)
    for name in ("problems", "steps", "draws"):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if min(values) < 1:
            raise ValueError(f"--{name} {min(values)} is out of range; allowed: 1 or more "
                             "(the frozen model is always shown)")
    if args.stop_unchanged < 0:
        raise ValueError(f"--stop_unchanged {args.stop_unchanged} is out of range; "
                         "allowed: 0 or more")
    check_seed(args.seed)
    known = list(dict.fromkeys(group[0] for group in task.groups))
    for topic in args.topics or []:
        if topic not in known:
            raise ValueError(f"--topics {topic!r} is unknown; allowed: {', '.join(known)}")
    refuse_idle(given, [
        (("rtol",), set(args.solvers) & set(ADAPTIVE), "--solvers dopri5"),
        (("stop_unchanged",), set(args.solvers) & set(FIXED) or not args.stop_unchanged,
         "a fixed solver"),
    ])
    # every setting is refused or taken now, not when its turn comes
    for temperature in args.temperatures:
        columns_to_compare(args, temperature)
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


@command("eval.py")
def main(argv=None):
    args = build_parser().parse_args(argv)
    task = TASKS[args.task]
    check(args, task, given_flags(build_parser(), argv))
    model, tokenizer = load_model(args.init_from, args.dtype, args.device, args.cache_dir,
                                  args.base, args.fold_lora)
    if not isinstance(model, L2D):      # a base, or one that --method=lora or full has finetuned
        print(f"{args.init_from} has no diffusion path: "
              "only the model itself is scored, as `frozen`")
        args.solvers = []
    # loading is not counted
    start = time.time()
    problems = make_problems(task, args)
    tables = measure_all(model, tokenizer, task, problems, args)
    # once and whole: a table that was cut off would be taken for a result
    write_json({**circumstances(model, args, start), **tables}, args.out)
    print(f"\nwritten to {args.out} after {time.time() - start:.0f} s")
    if args.plot:
        plot_accuracy(tables["accuracy"], Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
