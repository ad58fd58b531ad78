"""Train a diffusion path beside a frozen model, or a baseline it is compared with. One loop.

    python train.py                                            the embedded model, minutes
    python train.py --init_from=gpt2-xl --data=DIR             a real one; data by data/chat.py
    python train.py --init_from=resume --out_dir=out           go on after Ctrl-C, to the same bits
    python train.py --init_from=scratch --method=pretrain      make the embedded base again

`update_once` is all that training is; the objective itself is L2D.token_losses in diffusion.py
(paper Eq. 3). Read sample.py before and eval.py next.
"""

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from data.average import Average
from data.batches import IGNORE, Losses, collate, draw_rows
from data.checkpoint import copy_tokenizer, pick_device, read_json
from data.curriculum import Curriculum, growing_unroll
from data.families import ModelConfig
from data.hub import resolve
from data.interrupt import Interrupt
from data.log import Log, by_tenth
from data.path import TIME_DISTRIBUTIONS, L2DConfig
from data.presets import OBJECTIVES, PRESETS, fitting_preset
from data.state import read_state_meta, restore_state, write_state
from data.tasks import TASKS
from data.tiny.start import init_weights
from data.tiny.topics import LEVELS, Documents, Problems
from data.tokenizer import load_tokenizer
from data.tokens import TokenFiles
from diffusion import L2D
from model import LM, LoRA
from sample import Settings, answer_problems

METHODS = ("l2d", "pretrain", "lora", "full")
BETAS = (0.9, 0.95)        # of AdamW, as in the paper


# --- the command line -----------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    # the docstring above is the first page of --help, so it is printed as it stands
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    # what
    add("--method", default="l2d", choices=METHODS, help="what to train (default: l2d)")
    add("--init_from", default="tiny",
        help="model name, directory, `scratch` or `resume` (default: tiny)")
    add("--data", default="tiny", help="`tiny` or a directory made by data/chat.py (default: tiny)")
    add("--out_dir", default="out", help="where everything is written (default: out)")
    add("--cache_dir", help="where downloaded models are kept")
    add("--preset", choices=list(PRESETS),
        help="of all values without a default here (default: the one for this model and data)")
    # diffusion path
    add("--width", type=int, help="Z, width of the diffusion space")
    add("--cond_dim", type=int, help="S, width of the time embedding")
    add("--rank", type=int, default=32,
        help="of the LoRA, in the path and in --method=lora (default: 32)")
    add("--full_copies", action=switch, default=False,
        help="copy the path's matrices instead of LoRA")
    add("--time_distribution", default="uniform", choices=TIME_DISTRIBUTIONS,
        help="of the training times (default: uniform)")
    add("--own_reading", action=switch, help="the path has keys and values of its own")
    # objective
    add("--objective", choices=OBJECTIVES,
        help="paper: random times; refine: through its own steps; both: by turns")
    add("--unroll", type=int, help="most evaluations in a refined update")
    add("--backprop", type=int, help="how many of them, the last, have a gradient")
    add("--ema", type=float, help="of the weights that are saved; 0: the last ones")
    # optimisation
    add("--updates", type=int, help="optimizer updates in all")
    add("--batch_size", type=int, help="rows per forward pass")
    add("--accumulate", type=int, help="forward passes per update")
    add("--lr", type=float, help="highest learning rate")
    add("--min_lr", type=float, help="last learning rate")
    add("--warmup", type=int, help="updates of linear warm-up, before the linear decay")
    add("--weight_decay", type=float, help="on matrices only")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: 1)")
    add("--seed", type=int, default=42,
        help="of weights, data order, times and noise (default: 42)")
    # reports
    add("--eval_every", type=int, help="updates between validation and saving")
    add("--val_rows", type=int, help="rows of validation data")
    add("--report", type=int, default=64,
        help="problems of each kind to answer at the end (default: 64)")
    # machine
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of the frozen weights (default: bfloat16 on CUDA)")
    add("--compile", action=switch, default=False,
        help="torch.compile the objective; slower on a CPU, where it breaks into pieces")
    return parser


def parse(argv=None) -> argparse.Namespace:
    """Flags over the checkpoint's (where resuming) over the preset's. Raises ValueError."""
    parser = build_parser()
    args = parser.parse_args(argv)
    # a resumed run has the flags it was started with, but for those given anew: so the command
    # line is read once for the place of the state, and again over the flags found there
    resume = args.init_from == "resume"
    if resume:
        saved = read_state_meta(args.out_dir)["args"]
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        args.init_from = saved["init_from"]
    args.resume = resume
    args.preset = args.preset or fitting_preset(args.init_from, args.data, args.objective)
    for name, value in PRESETS[args.preset].items():
        # None says that nobody chose: 0 is a choice
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    return args


def check(args):
    """Refuse numbers out of range and methods that cannot work. Raises ValueError with one line."""
    at_least = {
        1: ("width", "cond_dim", "rank", "batch_size", "accumulate", "eval_every", "val_rows",
            "unroll", "backprop"),
        0: ("updates", "lr", "min_lr", "warmup", "weight_decay", "report", "clip", "ema"),
    }
    # not `value < least`, or a number that is none would pass
    for least, names in at_least.items():
        for name in names:
            value = getattr(args, name)
            if not value >= least:
                raise ValueError(f"--{name} {value} is out of range; allowed: {least} or more")
    if not args.ema < 1:
        raise ValueError(f"--ema {args.ema} is out of range; allowed: 0 to 1, without 1")
    if args.init_from == "scratch" and args.method != "pretrain":
        raise ValueError(f"--method {args.method} needs a pretrained model; "
                         "allowed with --init_from=scratch: pretrain")


# --- what is trained, on what ---------------------------------------------------------------------

def load_data(args, tokenizer):
    """(train, val) data sets, whose rows are as data/batches.py says."""
    # of one's own: any text, prepared once by data/chat.py
    if args.data != "tiny":
        return [TokenFiles(args.data, split, tokenizer) for split in ("train", "val")]
    # the base reads whole documents, a finetuning answers problems
    kind = Documents if args.method == "pretrain" else Problems
    return kind(tokenizer, "train"), kind(tokenizer, "val")


def build_model(args, classes: int):
    """(module to train, fingerprint of what stays frozen beside it): an L2D, or the LM itself."""
    # the only use of the global generator: torch fills new layers from it
    torch.manual_seed(args.seed)
    device, dtype = pick_device(args.device, args.dtype and getattr(torch, args.dtype))
    if args.init_from == "scratch":
        lm = LM(ModelConfig.from_hf(read_json(source_directory(args) / "config.json")))
        # on the CPU, so that every device starts from the same weights
        init_weights(lm, torch.Generator().manual_seed(args.seed))
        return lm.to(device), None
    if args.method != "l2d":
        dtype = torch.float32       # weights that are trained themselves need all their bits
    lm = LM.from_pretrained(args.init_from, dtype, device, args.cache_dir)
    if args.method == "l2d":
        rank = None if args.full_copies else args.rank
        config = L2DConfig(args.width, args.cond_dim, rank=rank, classes=classes,
                           time_distribution=args.time_distribution,
                           self_conditioning=args.objective != "paper",
                           own_reading=args.own_reading)
        l2d = L2D(lm, config)
        return l2d, l2d.base_sha256
    if args.method != "lora":
        return lm, None
    # before the correction is added: hashed is what lies on disk
    frozen = lm.requires_grad_(False).fingerprint()
    replace_linears(lm, nn.Linear, lambda linear: LoRA(linear, args.rank, alpha=args.rank))
    return lm, frozen


def replace_linears(lm: LM, kind, convert):
    """Put convert(matrix) in the place of every matrix of every block, if it is of this kind."""
    for block in lm.blocks:
        for owner in (block, block.mlp):
            # a list, since the loop replaces what it walks over
            for name, module in list(owner.named_children()):
                if isinstance(module, kind):
                    setattr(owner, name, convert(module))


@torch.no_grad()
def merge_linear(adapted: LoRA) -> nn.Linear:
    """The frozen matrix with its correction added for good."""
    adapted.frozen.weight.copy_(adapted.sum())
    return adapted.frozen


def token_losses(model, batch: dict, generator, unroll: int = 0, backprop: int = 0) -> Losses:
    """Of every counted token (N,): L2D's, by its own steps where `unroll`, or cross-entropy."""
    if isinstance(model, L2D):
        # data may name classes that this path was made without
        if not model.config.classes:
            batch = {name: value for name, value in batch.items() if name != "class_ids"}
        if unroll:
            return model.refined_losses(
                generator=generator, unroll=unroll, backprop=backprop, **batch)
        return model.token_losses(generator=generator, **batch)
    where = (batch["targets"] != IGNORE).nonzero(as_tuple=True)
    # weights stay float32; on CUDA the arithmetic need not
    device = batch["ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.read(batch["ids"], batch.get("documents")).hidden
        losses = -model.log_p(hidden[where], batch["targets"][where])
        return Losses(losses, losses, None, where[0])


def build_optimizer(trainable: dict, args):
    """AdamW; matrices decay, biases and norms do not."""
    # decay pulls towards zero, which is where a matrix may be but not the scale of a norm
    matrices = [p for p in trainable.values() if p.dim() >= 2]
    vectors = [p for p in trainable.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, fused=True)


def learning_rate(update: int, args) -> float:
    """Linear warm-up, then linear decay from lr to min_lr at the last update."""
    if update < args.warmup:
        return args.lr * (update + 1) / args.warmup
    # a run as long as its warm-up has no decay to divide by
    progress = (update - args.warmup) / max(1, args.updates - args.warmup)
    return args.lr + progress * (args.min_lr - args.lr)


# --- one update -----------------------------------------------------------------------------------

def refinement(args, update: int | None = None) -> dict:
    """The most evaluations in an update, and how many have a gradient; {}: the paper's one.

    update  None stands for the whole training: that is what is validated
    """
    turn = args.objective == "both" and update is not None and update % 2 == 0
    paper = args.objective == "paper" or turn
    if paper or args.method != "l2d":
        return {}
    unroll = args.unroll
    if args.data != "tiny" and update is not None:
        # nobody says how hard a row is
        unroll = growing_unroll(update, args.updates, unroll)
    return {"unroll": unroll, "backprop": args.backprop}


def draw_batches(data, args, position: int, device) -> list:
    """The `accumulate` batches that start at row `position` of the endless, shuffled data."""
    rows = draw_rows(data, position, args.batch_size * args.accumulate, args.seed)
    starts = range(0, len(rows), args.batch_size)
    return [collate(rows[at:at + args.batch_size], device) for at in starts]


def update_once(model, optimizer, batches: list, generator, clip: float, objective=token_losses,
                curriculum: Curriculum | None = None):
    """One step of the optimizer on all batches together. Returns loss, gradient norm and tokens."""
    # counted before the first backward pass, because every batch is divided by all of them
    tokens = sum(int((batch["targets"] != IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        losses = objective(model, batch, generator)
        # every token of the update weighs the same, however the update is cut into batches
        loss = losses.values.sum() / tokens
        loss.backward()
        # on the device still: to read it here would make a GPU wait for every batch
        total += loss.detach()
        if curriculum:
            curriculum.note(batch["needs"][losses.rows], losses.last)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()
    # dropped and not zeroed: the next backward pass writes them anew
    optimizer.zero_grad(set_to_none=True)
    return float(total), float(norm), tokens


@torch.no_grad()
def validate(model, data, args, device) -> dict:
    """Mean loss over the first val_rows rows, and for the path its mean in each tenth of t."""
    generator = torch.Generator().manual_seed(0)     # the same times and noise every time
    losses, times = [], []
    count = min(args.val_rows, len(data))
    # no class is hidden, as when the path is used
    model.eval()
    how = refinement(args)
    for at in range(0, count, args.batch_size):
        rows = [data[i] for i in range(at, min(at + args.batch_size, count))]
        some = token_losses(model, collate(rows, device), generator, **how)
        losses.append(some.last)
        times.append(some.t)
    model.train()
    # of tokens, not of batches: the last batch may be short
    losses = torch.cat(losses)
    result = {"val_loss": round(float(losses.mean()), 4)}
    if times[0] is not None:
        result["by_tenth"] = by_tenth(losses, torch.cat(times))
    return result


# --- on disk --------------------------------------------------------------------------------------

@dataclass
class Run:
    """A training under way. What is frozen beside the model has the fingerprint `frozen`."""
    args: argparse.Namespace
    model: nn.Module
    frozen: str | None
    tokenizer: object
    data: object
    val: object
    trainable: dict
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    curriculum: Curriculum
    average: Average
    update: int = 0            # updates done

    @property
    def position(self) -> int:
        """Rows read."""
        return self.update * self.args.batch_size * self.args.accumulate

    @property
    def device(self):
        return next(iter(self.trainable.values())).device


def set_up(args) -> Run:
    """Everything that the loop needs, from a saved state where resuming."""
    classes = len(TASKS["tiny"].classes) if args.data == "tiny" else 0
    model, frozen = build_model(args, classes)
    lm = model.lm if isinstance(model, L2D) else model
    tokenizer = load_tokenizer(source_directory(args), lm.config.vocab_size)
    data, val = load_data(args, tokenizer)
    # found now and not at the first validation
    if not len(val):
        raise ValueError(f"--data {args.data} has no validation rows; "
                         "prepare it again with a larger --val_fraction")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = build_optimizer(trainable, args)
    run = Run(args, model, frozen, tokenizer, data, val, trainable, optimizer, generator,
              Curriculum(max(LEVELS["chains"])), Average(trainable, args.ema))
    if args.resume:
        meta = restore_state(
            args.out_dir, trainable, optimizer, generator, frozen, run.average.tensors)
        run.update = meta["update"]
        run.curriculum.restore(meta["curriculum"])
    return run


def source_directory(args) -> Path:
    """Where the tokenizer is; a base from scratch has it, and its shape, from the embedded one."""
    name = "tiny" if args.init_from == "scratch" else args.init_from
    return resolve(name, args.cache_dir)


def save_state(run: Run):
    """All that the next update depends on, so that what follows is the same to the bit."""
    # where the state lies and that it is resumed are not the run's own
    args = {name: value for name, value in vars(run.args).items()
            if name not in ("resume", "out_dir")}
    meta = {"args": args, "update": run.update, "position": run.position, "frozen": run.frozen,
            "curriculum": run.curriculum.state}
    write_state(run.args.out_dir, run.trainable, run.optimizer, run.generator, meta,
                run.average.tensors)


def save_model(run: Run):
    """What sample.py and eval.py read: the path alone, or a model directory."""
    out_dir = Path(run.args.out_dir)
    if isinstance(run.model, L2D):
        run.model.save(out_dir)
        return
    if run.args.method == "lora":
        # merged, so that the directory is an ordinary model
        replace_linears(run.model, LoRA, merge_linear)
    run.model.save_pretrained(out_dir)
    copy_tokenizer(source_directory(run.args), out_dir)


# --- the loop -------------------------------------------------------------------------------------

def train(args) -> dict:
    """Run the training that `args` describes; returns the last validation and this run's losses."""
    run = set_up(args)
    announce(run)
    # dynamic: rows differ in length from batch to batch
    objective = torch.compile(token_losses, dynamic=True) if args.compile else token_losses
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    log = Log(args.out_dir, run.update, args.updates)
    log.write({"args": vars(args), "torch": torch.__version__})
    # only from here on is there anything worth saving
    interrupt = Interrupt()
    result = {}
    run.model.train()
    while True:
        # validation stands before the update, so that the first line is the untrained path's
        last = run.update >= args.updates or interrupt.asked
        if last or run.update % args.eval_every == 0:
            # a state that was just read need not be written again
            if last or run.update > log.first:
                save_state(run)
            with run.average.in_place():
                # who pressed Ctrl-C does not want to wait for it
                if not interrupt.asked:
                    result = {"update": run.update,
                              **validate(run.model, run.val, args, run.device)}
                    log.show(result)
                # small, so it can be tried while the training goes on
                if args.method == "l2d":
                    save_model(run)
        if last:
            break
        # from the number of the update alone, so it needs no place in the state
        lr = learning_rate(run.update, args)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        how = refinement(args, run.update)
        curriculum = run.curriculum if how and args.data == "tiny" else None
        if curriculum:
            run.data.hardest = curriculum.hardest
        batches = draw_batches(run.data, args, run.position, run.device)
        loss, norm, tokens = update_once(
            run.model, run.optimizer, batches, run.generator, args.clip,
            functools.partial(objective, **how), curriculum)
        run.average.follow()
        run.update += 1
        log.add(run.update, loss, lr=lr, norm=round(norm, 4), tokens=tokens,
                **{"hardest": curriculum.hardest} if curriculum else {})
    log.close()
    interrupt.restore()
    if interrupt.asked:
        print(f"stopped after update {run.update}; go on with: "
              f"python train.py --init_from=resume --out_dir={args.out_dir}")
        raise SystemExit(130)
    # a whole model, and merging a LoRA ends its training: only when all is done
    run.average.put_in_place()
    if args.method != "l2d":
        save_model(run)
    print(f"saved to {args.out_dir} after {log.seconds:.0f} s")
    return {**result, "losses": log.losses, "model": run.model, "tokenizer": run.tokenizer}


def announce(run: Run):
    """What is about to happen, so that a mistake is seen before it has cost an hour."""
    args = run.args
    count = sum(p.numel() for p in run.trainable.values())
    lm = run.model.lm if isinstance(run.model, L2D) else run.model
    print(f"{args.method} on {args.data}, from {args.init_from}: {count:,} trainable parameters, "
          f"{run.device}, {lm.embed.weight.dtype}")
    rows = args.batch_size * args.accumulate
    print(f"preset {args.preset}: {args.updates - run.update:,} updates of {rows} rows, "
          f"lr {args.lr:g}, validation every {args.eval_every}")


def report(model, tokenizer, problems: int):
    """What the training changed: greedy answers of the frozen model and with the path."""
    task = TASKS["tiny"]
    model.eval()
    print(f"greedy accuracy on {problems} validation problems a row:  "
          "frozen  L2D (euler, 8 steps)")
    for group in task.groups:
        # validation problems: the test problems are eval.py's
        some = [task.problem(group, i, split="val") for i in range(problems)]
        scores = []
        for steps in (0, 8):
            answers = answer_problems(model, tokenizer, task, some, Settings(steps=steps))
            scores.append(sum(answer.right for answer in answers) / problems)
        print(f"  {task.title(group)}  {scores[0]:6.1%}  {scores[1]:6.1%}")


def main(argv=None):
    try:
        args = parse(argv)
        result = train(args)
        if args.method == "l2d" and args.data == "tiny" and args.report:
            report(result["model"], result["tokenizer"], args.report)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
