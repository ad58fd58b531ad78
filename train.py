"""Train a diffusion path beside a frozen model, or a baseline to compare it with. One loop.

    python train.py                                            the embedded model, minutes
    python train.py --init_from=gpt2-xl --data=DIR             a real one; data by data/text/chat.py
    python train.py --init_from=resume --out_dir=out           go on after Ctrl-C, to the same bits
    python train.py --init_from=scratch --method=pretrain      make the embedded base again

First the update, which is all that training is, then the loop around it, then what both need. The
objectives themselves are in diffusion.py (paper Eq. 3). Read sample.py before and eval.py next.
"""

import argparse
import functools
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.system.command import command      # first: from here on Ctrl-C is one line

import torch
import torch.nn as nn

from data.checkpoints.families import ModelConfig
from data.checkpoints.hub import resolve
from data.checkpoints.path import L2DConfig
from data.checkpoints.state import (
    check_out_dir, clear, keep_best, out_of_patience, restore_state, updates_to_list, write_state)
from data.checkpoints.weights import copy_tokenizer, pick_device, read_config
from data.flags.train import parse
from data.parts.lora import LoRA, merge_linear, replace_linears
from data.parts.positions import check_length
from data.system import processes, sharding
from data.system.disk import claimed, remove
from data.system.processes import Interrupt
from data.tasks import TASKS
from data.text.tokenizer import load_tokenizer
from data.text.tokens import TokenFiles
from data.tiny.topics import Documents, Problems
from data.training.batches import Batch, Losses, collate
from data.training.evaluations import draw, find_asked_again, unroll_of
from data.training.frozen import NAMES, cache_states
from data.training.loader import Loader
from data.training.log import Log, by_tenth, tenth_sums
from data.training.memory import recompute, saved_bytes
from data.training.optimizer import EMA, build_optimizer, init_weights, learning_rate
from diffusion import L2D, paper_losses, refined_losses
from model import LM
from sample import Settings, answer_problems


PROBED = 64               # rows that show which classes are asked again


# --- one update -----------------------------------------------------------------------------------

def update_once(model, optimizer, batches: list, objective, clip: float):
    """One step of the optimizer on all batches together.

    objective  objective(model, batch) -> Losses
    clip       largest norm of the gradient; 0: any
    Returns loss, gradient norm and number of tokens that count.
    Raises FloatingPointError, before the step, where loss or gradient is not finite.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    # counted before the first backward pass, because every batch is divided by all of them
    counted = sum(len(batch.targets.y) for batch in batches)
    tokens = int(processes.total(torch.tensor(counted)))
    if not tokens:
        raise ValueError("no token of the update's rows counts, so there is nothing to learn; "
                         "prepare the data again")
    total = 0.0
    for batch in batches:
        losses = objective(model, batch)
        # every token of the update weighs the same, however the update is cut into batches
        loss = losses.values.sum() / tokens
        loss.backward()
        # on the device still: to read it here would make a GPU wait for every batch
        total += loss.detach()
    processes.sum_gradients(trained)
    # groups that learn at unlike rates have unlike gradients, so each kind is clipped on its own
    norms = []
    for share in {group["share"] for group in optimizer.param_groups}:
        some = [p for group in optimizer.param_groups if group["share"] == share
                for p in group["params"]]
        norms.append(sharding.whole(nn.utils.clip_grad_norm_(some, clip or math.inf)))
    total, norm = float(processes.total(total)), math.hypot(*map(float, norms))
    # before the step: the weights can still be saved
    if not math.isfinite(total + norm):
        raise FloatingPointError(f"the loss is {total:g}, the norm of its gradient {norm:g}")
    optimizer.step()
    # dropped and not zeroed: the next backward pass writes them anew
    optimizer.zero_grad(set_to_none=True)
    return total, norm, tokens


def token_losses(model, batch: Batch, backprop: int = 0) -> Losses:
    """Of every token that counts (N,): L2D's, by our own objective where `backprop`; or an LM's."""
    if isinstance(model, L2D):
        return refined_losses(model, batch, backprop) if backprop else paper_losses(model, batch)
    targets = batch.targets
    # weights stay float32; on CUDA the arithmetic need not
    device = batch.ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.read(batch.ids, batch.documents).hidden
        losses = -model.log_p(hidden[targets.index], targets.y)
        return Losses(losses, losses, None)


# --- the loop -------------------------------------------------------------------------------------

@dataclass
class Run:
    """A training under way. `frozen` is the fingerprint of the weights beside the trained ones."""
    args: argparse.Namespace
    model: nn.Module
    frozen: str | None
    tokenizer: object
    data: object
    val: object
    trainable: dict            # name -> parameter
    optimizer: torch.optim.Optimizer
    unroll_at: object          # unroll_at(update): most evaluations; 0: the paper's objective
    loader: Loader
    ema: EMA
    update: int = 0            # updates done
    history: list = field(default_factory=list)     # [update, validation loss] of every one
    kept: list = field(default_factory=list)        # updates of the best paths on disk

    @property
    def facts(self) -> dict:
        """What must be the same in a resumed run, beside the frozen weights."""
        data = "tiny" if self.args.data == "tiny" else self.data.fingerprint
        return {"data": data, "config": self.model.lm.config.numbers,
                "tokenizer": self.tokenizer.fingerprint}


def train_on(run: Run) -> dict:
    """Updates, and between them validation and saving; returns the last validation."""
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
            with log.pause():
                # Ctrl-C does not wait for it
                if not stopped:
                    result = validate(run)
                    log.show(result)
                    reason = "" if last else out_of_patience(run.history, args.patience)
                    last = last or bool(reason)
                # only what could be validated, and before the path: a run can always go on
                save_state(run)
                save_paths(run)
        if last:
            break
        numbers = one_update(run, objective)
        run.update += 1
        log.add(run.update, **numbers)
    log.close()
    interrupt.restore()
    if stopped:
        print(f"stopped after update {run.update}; {go_on(args.out_dir)}")
        raise SystemExit(130)
    # a whole model, and merging a LoRA ends its training: only at the end
    run.ema.put_in_place()
    if args.method != "l2d":
        save_model(run, args.out_dir)
    for name in NAMES if args.cache_frozen else ():
        remove(Path(args.out_dir) / name)
    print(f"saved to {args.out_dir} after {log.seconds:.0f} s{reason}")
    return {**result, "losses": log.losses, "model": run.model, "tokenizer": run.tokenizer}


def one_update(run: Run, objective) -> dict:
    """The next update, and its numbers."""
    args = run.args
    # from the number of the update alone, so it needs no place in the state
    lr = learning_rate(run.update, args.updates, args.warmup, args.lr, args.min_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["share"]
    batches = run.loader.update(run.update)
    backprop = args.backprop if run.unroll_at(run.update) else 0
    objective = functools.partial(objective, backprop=backprop)
    loss, norm, tokens = update_once(run.model, run.optimizer, batches, objective, args.clip)
    run.ema.follow()
    return {"loss": loss, "lr": lr, "norm": round(norm, 4), "tokens": tokens}


@torch.no_grad()
def validate(run: Run) -> dict:
    """Mean loss over all tokens that count, and for a path its mean in each tenth of t."""
    backprop = run.args.backprop if run.unroll_at(None) else 0
    sums = torch.zeros(2, 10, dtype=torch.float64)
    run.model.eval()
    with run.ema.in_place():
        for batch in run.loader.validation(run.val, run.args.val_rows):
            losses = token_losses(run.model, batch, backprop)
            sums += tenth_sums(losses.last, losses.t)
    run.model.train()
    sums = processes.total(sums)
    # of tokens, not of batches: the last batch may be short
    loss, count = sums.sum(1).tolist()
    result = {"update": run.update, "val_loss": round(loss / count, 4)}
    if not math.isfinite(result["val_loss"]):
        raise FloatingPointError(f"the validation loss is {result['val_loss']:g}")
    if losses.t is not None:
        result["by_tenth"] = by_tenth(sums)
    # a resumed run validates once more what it has saved
    if not run.history or run.history[-1][0] < run.update:
        run.history.append([run.update, result["val_loss"]])
    return result


# --- on disk --------------------------------------------------------------------------------------

def go_on(out_dir) -> str:
    return f"go on with: python train.py --init_from=resume --out_dir={out_dir}"


def save_state(run: Run):
    """All that the next update depends on, so that what follows is the same to the bit."""
    # these belong to this command, not to the run
    args = {name: value for name, value in vars(run.args).items()
            if name not in ("resume", "out_dir", "overwrite", "asked_again")}
    run.kept = updates_to_list(run.args.out_dir, run.kept, run.history, run.args.keep)
    meta = {"args": args, "update": run.update, "position": run.update * run.loader.rows,
            "frozen": run.frozen, "facts": run.facts, "history": run.history, "kept": run.kept,
            "asked_again": getattr(run.model.config, "asked_again", None)}
    write_state(run.args.out_dir, run.trainable, run.optimizer, meta, run.ema.tensors)
    processes.saved.append(f"update {run.update} is saved; {go_on(run.args.out_dir)}")


def save_paths(run: Run):
    """The path as it is, and the best so far: small, so it can be tried while training goes on."""
    if run.args.method != "l2d" or processes.number():
        return
    with run.ema.in_place():
        save_model(run, run.args.out_dir)
        if run.args.keep and run.history:
            run.kept = keep_best(run.args.out_dir, run.kept, run.history, run.args.keep,
                                 run.update, functools.partial(save_model, run))


def save_model(run: Run, out_dir):
    """What sample.py and eval.py read: the path alone, or a model directory."""
    out_dir = Path(out_dir)
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
    copy_tokenizer(source_directory(run.args.init_from, run.args.cache_dir), out_dir)


# --- what a run is made of ------------------------------------------------------------------------

def load_data(data: str, method: str, tokenizer):
    """(train, val) data sets, whose rows are as data/training/batches.py says.

    `classes` are the names of the rows' classes, () where they have none.
    """
    # of one's own: any text, prepared once by data/text/chat.py
    if data != "tiny":
        return [TokenFiles(data, split, tokenizer) for split in ("train", "val")]
    # the base reads whole documents, a finetuning answers problems
    kind = Documents if method == "pretrain" else Problems
    return kind(tokenizer, "train"), kind(tokenizer, "val")


def source_directory(init_from: str, cache_dir: str | None) -> Path:
    """Where the tokenizer is; a base from scratch has it, and its shape, from the embedded one."""
    return resolve("tiny" if init_from == "scratch" else init_from, cache_dir)


def build_model(args, config: ModelConfig, classes: tuple, val):
    """(module to train, fingerprint of the weights frozen beside it): an L2D, or the LM itself.

    config of the LM; classes: names of those that an L2D learns; val: rows of the same data
    """
    # the only use of the global generator: torch fills new layers from it
    torch.manual_seed(args.seed)
    device = processes.card(args.device)
    device, dtype = pick_device(device, args.dtype and getattr(torch, args.dtype))
    if args.init_from == "scratch":
        lm = LM(config)
        # on the CPU, so that every device starts from the same weights
        init_weights(lm, torch.Generator().manual_seed(args.seed))
        return lm.to(device), None
    if args.method in ("full", "pretrain"):
        dtype = torch.float32       # weights that are trained themselves need all their bits
    lm = LM.from_pretrained(args.init_from, dtype, device, args.cache_dir)
    if args.method == "l2d":
        rank = None if args.full_copies else args.rank
        words = args.prediction_words if args.self_conditioning else None
        shape = L2DConfig(args.width, args.cond_dim, rank=rank, classes=len(classes),
                          class_names=list(classes) or None, own_kv=args.own_kv,
                          self_kv=args.self_kv,
                          time_distribution=args.time_distribution, start=args.start,
                          self_conditioning=args.self_conditioning, without=args.without,
                          prediction_words=words or None, asked_again=args.asked_again)
        if args.objective != "paper" and args.asked_again is None:
            # which classes the objective asks again, the untrained path shows
            probe = L2D(lm, replace(shape, asked_again=list(range(len(classes) or 1))))
            rows = collate([val[i] for i in range(min(PROBED, len(val)))])
            shape.asked_again = find_asked_again(probe, rows.to(device), args.unroll)
        l2d = L2D(lm, shape)
        return l2d, l2d.base_sha256
    if args.method != "lora":
        return lm, None
    # before the correction is added: the hash is that of the file
    frozen = lm.requires_grad_(False).fingerprint()
    replace_linears(lm, nn.Linear, lambda linear: LoRA(linear, args.rank, alpha=args.rank))
    return lm, frozen


def set_up(args) -> Run:
    """Everything that the loop needs, from a saved state where resuming."""
    source = source_directory(args.init_from, args.cache_dir)
    config = ModelConfig.from_hf(read_config(source))
    tokenizer = load_tokenizer(source, config.vocab_size)
    data, val = load_data(args.data, args.method, tokenizer)
    # found now and not at the first validation
    if not len(val):
        raise ValueError(f"--data {args.data} has no validation rows; "
                         "prepare it again with a larger --val_fraction")
    if args.data != "tiny":
        longest = max(data.longest, val.longest)
        check_length(config, longest, "prepare the data with a smaller --block_size")
    processes.check_shares(args.batch_size, args.accumulate, args.val_rows, len(val), args.shard)
    model, frozen = build_model(args, config, data.classes, val)
    is_path = isinstance(model, L2D)
    if args.cache_frozen:
        data, val = cache_states(model, [data, val], args.val_rows, args.batch_size,
                                 Path(args.out_dir), args.plan)
    processes.same_start(p for p in model.parameters() if p.requires_grad)
    if args.checkpointing:
        recompute(model.blocks)
    if args.shard and processes.count() > 1:
        layers = [model.blocks] if is_path else []
        if is_path and model.config.asked_again:
            layers.append(model.untrained.blocks)
        sharding.shard(model.lm, *layers)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unroll_at = functools.partial(unroll_of, args.objective if is_path else "paper", args.unroll,
                                  is_path and model.config.asked_again, updates=args.updates)

    def draw_update(batch, draws, update):
        # no class is hidden in the validation
        return draw(model.config, batch, draws, unroll_at(update), hide=update is not None)

    loader = Loader(
        data, args.batch_size * args.accumulate, args.batch_size, args.seed,
        next(model.parameters()).device,
        draw_update if is_path else None,
        # under torch.compile borders that change would compile the model anew for every batch
        packed=not args.compile,
        ahead=args.updates)
    run = Run(args, model, frozen, tokenizer, data, val, trainable,
              build_optimizer(trainable, args.lr, args.weight_decay, args.new_lr if is_path else 1),
              unroll_at, loader, EMA(trainable, args.ema))
    if args.resume:
        resume(run)
    return run


def resume(run: Run):
    """Go on from the saved state. Raises ValueError where something else has changed since."""
    facts = {**run.facts, "weights": run.frozen}
    meta = restore_state(run.args.out_dir, run.trainable, run.optimizer, facts, run.ema.tensors)
    run.update, run.history, run.kept = (meta[name] for name in ("update", "history", "kept"))
    processes.saved.append(f"update {run.update} is still there; {go_on(run.args.out_dir)}")
    if run.update * run.loader.rows != meta["position"]:
        raise ValueError(f"--batch_size {run.args.batch_size} times --accumulate "
                         f"{run.args.accumulate} are not the rows per update that this run had; "
                         "their product must stay")


# --- commands -------------------------------------------------------------------------------------

def train(args) -> dict:
    """Run the training that `args` describes; returns the last validation and this run's losses.

    Raises ValueError, after the last good state was saved, where a loss is not finite.
    """
    out_dir = Path(args.out_dir)
    if not args.resume:
        source = source_directory(args.init_from, args.cache_dir)
        check_out_dir(out_dir, source, args.overwrite)
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
            lr = run.optimizer.param_groups[0]["lr"]
            raise ValueError(f"update {run.update}, learning rate {lr:g}: {error}; the last good "
                             f"state stays in {out_dir}: try a lower --lr, from there "
                             "(--init_from=resume) or anew") from None


def announce(run: Run):
    """What is about to happen, so that a mistake is seen before it has cost an hour."""
    args = run.args
    count = sum(p.numel() for p in run.trainable.values())
    print(f"{args.method} on {args.data}, from {args.init_from}: {count:,} trainable parameters, "
          f"{run.loader.device}, {run.model.lm.embed.weight.dtype}")
    print(f"preset {args.preset}: {args.updates - run.update:,} updates of {run.loader.rows} rows, "
          f"lr {args.lr:g}, validation every {args.eval_every}")


def plan(args, updates: int = 3):
    """What a training would take: arithmetic, and some updates, after one that warms up."""
    run = set_up(args)
    announce(run)
    run.model.train()
    sizes = []

    def objective(model, batch, backprop):
        size, losses = saved_bytes(lambda: token_losses(model, batch, backprop))
        sizes.append(size)
        return losses

    one_update(run, objective)
    trained = sum(p.numel() for p in run.trainable.values())
    frozen = sum(p.nbytes for p in run.model.parameters() if not p.requires_grad)
    # a weight, its gradient and two moments, of four bytes each
    print(f"memory: {frozen / 1e6:,.0f} MB frozen, {16 * trained / 1e6:,.0f} MB trained, "
          f"{max(sizes) / 1e6:,.0f} MB of activations of a batch for the backward pass")
    start = time.perf_counter()
    tokens = 0
    for run.update in range(1, 1 + updates):
        tokens += one_update(run, token_losses)["tokens"]
    each = (time.perf_counter() - start) / updates
    print(f"{tokens / updates:,.0f} counted tokens and {each:.2f} s an update, "
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
