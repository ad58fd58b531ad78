"""Train a diffusion path beside a frozen model, or a baseline it is compared with. One loop.

    python train.py                                            the embedded model, minutes
    python train.py --init_from=gpt2-xl --data=DIR             a real one; data by data/text/chat.py
    python train.py --init_from=resume --out_dir=out           go on after Ctrl-C, to the same bits
    python train.py --init_from=scratch --method=pretrain      make the embedded base again

`update_once` is all that training is; the objective itself is L2D.token_losses in diffusion.py
(paper Eq. 3). Read sample.py before and eval.py next.
"""

import argparse
import functools
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from data.system.command import command # first: from here on Ctrl-C is one line

import torch
import torch.nn as nn

from data.checkpoints.families import ModelConfig
from data.checkpoints.hub import resolve
from data.checkpoints.path import L2DConfig
from data.checkpoints.state import (
    check_out_dir, clear, keep_best, out_of_patience, restore_state, write_state)
from data.checkpoints.weights import copy_tokenizer, pick_device
from data.flags.train import parse
from data.parts.lora import LoRA, merge_linear, replace_linears
from data.parts.positions import check_length
from data.system import processes, sharding
from data.system.disk import claimed, read_json, remove
from data.system.processes import Interrupt
from data.tasks import TASKS
from data.text.tokenizer import load_tokenizer
from data.text.tokens import TokenFiles
from data.tiny.topics import Documents, LEVELS, Problems
from data.training.optimizer import EMA, build_optimizer, init_weights, learning_rate
from data.training.batches import Batch, Losses
from data.training.curriculum import Curriculum, growing_unroll
from data.training.frozen import NAMES, cache_states
from data.training.loader import Loader
from data.training.log import Log, by_tenth, tenth_sums
from diffusion import L2D
from model import LM
from sample import Settings, answer_problems

PLANNED = 3                # updates that --plan measures


# --- what is trained, on what ---------------------------------------------------------------------

def load_data(args, tokenizer):
    """(train, val) data sets, whose rows are as data/training/batches.py says."""
    # of one's own: any text, prepared once by data/text/chat.py
    if args.data != "tiny":
        return [TokenFiles(args.data, split, tokenizer) for split in ("train", "val")]
    # the base reads whole documents, a finetuning answers problems
    kind = Documents if args.method == "pretrain" else Problems
    return kind(tokenizer, "train"), kind(tokenizer, "val")


def build_model(args, classes: int):
    """(module to train, fingerprint of what stays frozen beside it): an L2D, or the LM itself."""
    # the only use of the global generator: torch fills new layers from it
    torch.manual_seed(args.seed)
    device = processes.card(args.device)
    device, dtype = pick_device(device, args.dtype and getattr(torch, args.dtype))
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
                           own_kv=args.own_kv)
        l2d = L2D(lm, config)
        return l2d, l2d.base_sha256
    if args.method != "lora":
        return lm, None
    # before the correction is added: hashed is what lies on disk
    frozen = lm.requires_grad_(False).fingerprint()
    replace_linears(lm, nn.Linear, lambda linear: LoRA(linear, args.rank, alpha=args.rank))
    return lm, frozen


def token_losses(model, batch: Batch, backprop: int = 0) -> Losses:
    """Of every token that counts (N,): L2D's, by its own steps where `backprop`; cross-entropy."""
    if isinstance(model, L2D):
        return model.refined_losses(batch, backprop) if backprop else model.token_losses(batch)
    targets = batch.targets
    # weights stay float32; on CUDA the arithmetic need not
    device = batch.ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.read(batch.ids, batch.documents).hidden
        losses = -model.log_p(hidden[targets.index], targets.y)
        return Losses(losses, losses, None, targets.hops)


# --- one update -----------------------------------------------------------------------------------

def refinement(args, update: int | None = None) -> tuple:
    """The most evaluations in an update, and how many have a gradient; (0, 0): the paper's one.

    update  None stands for the whole training: that is what is validated
    """
    turn = args.objective == "both" and update is not None and update % 2 == 0
    paper = args.objective == "paper" or turn
    if paper or args.method != "l2d":
        return 0, 0
    unroll = args.unroll
    if args.data != "tiny" and update is not None:
        # nobody says how hard a row is
        unroll = growing_unroll(update, args.updates, unroll)
    return unroll, args.backprop


def update_once(model, optimizer, batches: list, clip: float, objective=token_losses,
                curriculum: Curriculum | None = None):
    """One step of the optimizer on all batches together. Returns loss, gradient norm and tokens."""
    # counted before the first backward pass, because every batch is divided by all of them
    targets = sum(len(batch.targets.y) for batch in batches)
    tokens = int(processes.total(torch.tensor(targets)))
    if not tokens:
        raise ValueError("no token of the update's rows counts, so there is nothing to learn; "
                         "prepare the data again")
    total = learned = 0.0
    for batch in batches:
        losses = objective(model, batch)
        # every token of the update weighs the same, however the update is cut into batches
        loss = losses.values.sum() / tokens
        loss.backward()
        # on the device still: to read it here would make a GPU wait for every batch
        total += loss.detach()
        if curriculum:
            learned += curriculum.count(losses.hops, losses.last)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    processes.sum_gradients(trained)
    # 0 switches it off, as everywhere
    norm = nn.utils.clip_grad_norm_(trained, clip or math.inf)
    total, norm = float(processes.total(total)), float(sharding.whole(norm))
    # before the step: what the weights are now can still be saved
    if not math.isfinite(total + norm):
        raise FloatingPointError(f"the loss is {total:g}, the norm of its gradient {norm:g}")
    optimizer.step()
    # dropped and not zeroed: the next backward pass writes them anew
    optimizer.zero_grad(set_to_none=True)
    if curriculum:
        curriculum.note(*processes.total(learned).tolist())
    return total, norm, tokens


@torch.no_grad()
def validate(model, batches: list, backprop: int) -> dict:
    """Mean loss over all tokens that count, and for the path its mean in each tenth of t."""
    model.eval()
    sums = torch.zeros(2, 10, dtype=torch.float64)
    for batch in batches:
        losses = token_losses(model, batch, backprop)
        sums += tenth_sums(losses.last, losses.t)
    model.train()
    sums = processes.total(sums)
    # of tokens, not of batches: the last batch may be short
    loss, count = sums.sum(1).tolist()
    result = {"val_loss": round(loss / count, 4)}
    if not math.isfinite(result["val_loss"]):
        raise FloatingPointError(f"the validation loss is {result['val_loss']:g}")
    if losses.t is not None:
        result["by_tenth"] = by_tenth(sums)
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
    loader: Loader
    curriculum: Curriculum
    average: EMA
    update: int = 0            # updates done
    history: list = field(default_factory=list)     # [update, validation loss] of every one

    @property
    def position(self) -> int:
        """Rows read."""
        return self.update * self.args.batch_size * self.args.accumulate

    @property
    def lm(self) -> LM:
        return self.model.lm if isinstance(self.model, L2D) else self.model

    @property
    def facts(self) -> dict:
        """What must be the same where the run goes on, beside the frozen weights."""
        data = "tiny" if self.args.data == "tiny" else self.data.fingerprint
        return {"data": data, "config": self.lm.config.numbers,
                "tokenizer": self.tokenizer.fingerprint}

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
    if args.data != "tiny":
        longest = max(data.longest, val.longest)
        check_length(lm.config, longest, "prepare the data with a smaller --block_size")
    processes.check_shares(args, len(val))
    if args.cache_frozen:
        data, val = cache_states(args, model, [data, val])
    processes.same_start(p for p in model.parameters() if p.requires_grad)
    model.checkpointing = args.checkpointing
    if args.shard and processes.count() > 1:
        sharding.shard(lm, model.blocks if isinstance(model, L2D) else None)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(trainable, args)
    run = Run(args, model, frozen, tokenizer, data, val, trainable, optimizer,
              build_loader(args, model, data), Curriculum(max(LEVELS["chains"])),
              EMA(trainable, args.ema))
    if args.resume:
        meta = restore_state(run, run.facts)
        run.update = meta["update"]
        run.curriculum.restore(meta["curriculum"])
        run.history = meta["history"]
        processes.saved.append(f"update {run.update} is still there; {go_on(run)}")
        if run.position != meta["position"]:
            raise ValueError(f"--batch_size {args.batch_size} times --accumulate "
                             f"{args.accumulate} are not the rows per update that this run had; "
                             "their product must stay")
    return run


def build_loader(args, model, data) -> Loader:
    draw = model.draw if isinstance(model, L2D) else None
    device = next(model.parameters()).device
    return Loader(data, args, device, draw, lambda update: refinement(args, update)[0])


def source_directory(args) -> Path:
    """Where the tokenizer is; a base from scratch has it, and its shape, from the embedded one."""
    name = "tiny" if args.init_from == "scratch" else args.init_from
    return resolve(name, args.cache_dir)


def save_state(run: Run):
    """All that the next update depends on, so that what follows is the same to the bit."""
    # where the state lies and that it is resumed are not the run's own
    args = {name: value for name, value in vars(run.args).items()
            if name not in ("resume", "out_dir", "overwrite")}
    meta = {"args": args, "update": run.update, "position": run.position, "frozen": run.frozen,
            "curriculum": run.curriculum.state, "facts": run.facts, "history": run.history}
    write_state(run.args.out_dir, run.trainable, run.optimizer, meta, run.average.tensors)
    processes.saved.append(f"update {run.update} is saved; {go_on(run)}")


def save_model(run: Run, directory=None):
    """What sample.py and eval.py read: the path alone, or a model directory."""
    out_dir = Path(directory or run.args.out_dir)
    if isinstance(run.model, L2D):
        run.model.save(out_dir, tokenizer=run.tokenizer.fingerprint, updates=run.update)
        return
    sharding.gather(run.model)
    if run.args.method == "lora":
        # merged, so that the directory is an ordinary model
        replace_linears(run.model, LoRA, merge_linear)
    if processes.number():
        return
    run.model.save_pretrained(out_dir)
    copy_tokenizer(source_directory(run.args), out_dir)


# --- the loop -------------------------------------------------------------------------------------

def train(args) -> dict:
    """Run the training that `args` describes; returns the last validation and this run's losses.

    Raises ValueError, after the last good state was saved, where a loss is not finite.
    """
    out_dir = Path(args.out_dir)
    if not args.resume:
        check_out_dir(out_dir, source_directory(args), args.overwrite)
    first = processes.number() == 0
    with claimed(out_dir) if first else nullcontext():
        run = set_up(args)
        if args.overwrite and first:
            clear(out_dir)
        try:
            return train_on(run)
        except RuntimeError as error:
            # of torch.compile's own: no C++ compiler, say
            if not args.compile or not type(error).__module__.startswith("torch._"):
                raise
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--compile does not work here ({reason}); go without it") from None
        except FloatingPointError as error:
            lr = learning_rate(run.update, args)
            raise ValueError(f"update {run.update}, learning rate {lr:g}: {error}; the last good "
                             f"state stays in {args.out_dir}: try a lower --lr, from there "
                             "(--init_from=resume) or anew") from None


def train_on(run: Run) -> dict:
    """The loop: updates, and between them validation and saving."""
    args = run.args
    announce(run)
    # dynamic: rows differ in length from batch to batch
    objective = torch.compile(token_losses, dynamic=True) if args.compile else token_losses
    log = Log(args.out_dir, run.update, args.updates, args.eval_every)
    log.write({"args": vars(args), "torch": torch.__version__})
    # only from here on is there anything worth saving
    interrupt = Interrupt()
    result = {}
    run.model.train()
    while True:
        # validation stands before the update, so that the first line is the untrained path's
        stopped = processes.any_of(interrupt.asked)
        last = run.update >= args.updates or stopped
        if last or run.update % args.eval_every == 0:
            with log.looking():
                # who pressed Ctrl-C does not want to wait for it
                if not stopped:
                    result = look(run, log)
                    last = last or out_of_patience(run.history, args.patience)
                # only what could be validated; a state just read need not be written again
                if last or run.update > log.first:
                    save_state(run)
                save_paths(run)
        if last:
            break
        log.add(run.update + 1, **one_update(run, objective))
        run.update += 1
    log.close()
    interrupt.restore()
    if stopped:
        print(f"stopped after update {run.update}; {go_on(run)}")
        raise SystemExit(130)
    # a whole model, and merging a LoRA ends its training: only when all is done
    run.average.put_in_place()
    if args.method != "l2d":
        save_model(run)
    for name in NAMES:
        # nobody reads on
        remove(Path(args.out_dir) / name)
    print(f"saved to {args.out_dir} after {log.seconds:.0f} s")
    return {**result, "losses": log.losses, "model": run.model, "tokenizer": run.tokenizer}


def go_on(run: Run) -> str:
    return f"go on with: python train.py --init_from=resume --out_dir={run.args.out_dir}"


def one_update(run: Run, objective) -> dict:
    """The next one, and its numbers."""
    args = run.args
    # from the number of the update alone, so it needs no place in the state
    lr = learning_rate(run.update, args)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    unroll, backprop = refinement(args, run.update)
    curriculum = run.curriculum if unroll and args.data == "tiny" else None
    if curriculum:
        run.data.hardest = curriculum.hardest
    loss, norm, tokens = update_once(
        run.model, run.optimizer, run.loader.update(run.update), args.clip,
        functools.partial(objective, backprop=backprop), curriculum)
    run.average.follow()
    numbers = {"loss": loss, "lr": lr, "norm": round(norm, 4), "tokens": tokens}
    return {**numbers, "hardest": curriculum.hardest} if curriculum else numbers


def look(run: Run, log: Log) -> dict:
    """Validate, and remember it."""
    with run.average.in_place():
        batches = run.loader.validation(run.val)
        result = {"update": run.update, **validate(run.model, batches, refinement(run.args)[1])}
    # a resumed run looks again at what it has saved
    if not run.history or run.history[-1][0] < run.update:
        run.history.append([run.update, result["val_loss"]])
    log.show(result)
    return result


def save_paths(run: Run):
    """The path as it is, and the best so far: small, so it can be tried while training goes on."""
    if run.args.method != "l2d" or processes.number():
        return
    with run.average.in_place():
        save_model(run)
        if run.args.keep and run.history:
            keep_best(run, functools.partial(save_model, run))


def announce(run: Run):
    """What is about to happen, so that a mistake is seen before it has cost an hour."""
    args = run.args
    count = sum(p.numel() for p in run.trainable.values())
    print(f"{args.method} on {args.data}, from {args.init_from}: {count:,} trainable parameters, "
          f"{run.device}, {run.lm.embed.weight.dtype}")
    rows = args.batch_size * args.accumulate
    print(f"preset {args.preset}: {args.updates - run.update:,} updates of {rows} rows, "
          f"lr {args.lr:g}, validation every {args.eval_every}")


def plan(args):
    """What a training would take: arithmetic, and some updates that nobody keeps."""
    run = set_up(args)
    announce(run)
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in run.trainable.values())
    held = sum(p.numel() * p.element_size() for p in frozen)
    # a weight, its gradient and two moments, of four bytes each
    print(f"memory: {held / 1e6:,.0f} MB frozen, {16 * trained / 1e6:,.0f} MB of what is trained, "
          "activations beside them")
    run.model.train()
    tokens, start = 0, 0.0
    for number in range(1 + PLANNED):
        # the first one warms up
        if number == 1:
            tokens, start = 0, time.perf_counter()
        tokens += one_update(run, token_losses)["tokens"]
        run.update += 1
    each = (time.perf_counter() - start) / PLANNED
    print(f"{tokens / PLANNED:,.0f} counted tokens and {each:.2f} s an update, "
          f"{args.updates * each / 60:,.0f} min in all, validation beside them")


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


@command("train.py")
def main(argv=None):
    with processes.together("train.py"):
        args = parse(argv, __doc__)
        if args.plan:
            return plan(args)
        result = train(args)
        if args.method == "l2d" and args.data == "tiny" and args.report:
            report(result["model"], result["tokenizer"], args.report)


if __name__ == "__main__":
    main()
