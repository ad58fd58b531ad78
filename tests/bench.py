"""What each saving is worth, as ratios of medians within one run. Nothing here can pass or fail.

    python tests/bench.py
    python tests/bench.py --init_from=out --batch_size 16 --context 128 512 --repeats 30
"""

import argparse
import copy
import dataclasses
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from data.parts.draws import RowDraws  # noqa: E402
from data.parts.kv_cache import KVCache  # noqa: E402
from data.parts.positions import Packed  # noqa: E402
from data.training.batches import IGNORE, Batch, CachedStates, find_targets  # noqa: E402
from data.training.memory import recompute, saved_bytes  # noqa: E402
from diffusion import (  # noqa: E402
    L2D, VelocityField, draw, paper_losses, refined_losses)
from sample import Settings, generate, load_model  # noqa: E402


def median_ms(work, repeats: int, device) -> float:
    """Median wall time of work() in milliseconds, after two runs that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def evaluation_table(model, batch: int, context: int, timed):
    """One evaluation of the path, and what it would take without each saving."""
    lm, device = model.lm, next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.config.vocab_size, (batch, context + 1), generator=generator).to(device)
    cache = KVCache()
    model.read(ids[:, :-1], cache=cache)
    states = model.read(ids[:, -1:], cache=cache)
    x = torch.randn(batch, 1, model.config.width, generator=generator).to(device)
    field = VelocityField(model, states)
    prediction = lm.logits(states.hidden).float()

    def decode():
        cache.length = context      # the newest token is read again, in its place
        lm.logits(lm.read(ids[:, -1:], cache=cache).hidden)

    def fresh_vocabulary():
        model.cached_vocabulary = None
        field(0.5, x, prediction)

    def fresh_modulation():
        model.time_table.cached.clear()
        field(0.5, x, prediction)

    def guided():
        VelocityField(model, states, class_ids=classes, guidance=2.0)(0.5, x, prediction)

    def apart():
        VelocityField(model, states, class_ids=classes)(0.5, x, prediction)
        VelocityField(model, states)(0.5, x, prediction)

    evaluation = timed(lambda: field(0.5, x, prediction))
    print(f"batch {batch}, context {context}: one evaluation of the path {evaluation:.3f} ms; "
          "below: what it takes instead, and the ratio")
    works = [("the frozen model's own next token", decode), ("with V made again", fresh_vocabulary),
             ("with the modulation made again", fresh_modulation)]
    if model.config.classes:
        classes = torch.zeros(batch, dtype=torch.long, device=device)
        works.append(("guided, two lines in one batch", guided))
        works.append(("guided, one after the other", apart))
    for name, work in works:
        ms = timed(work)
        print(f"  {name:38} {ms:8.3f} ms  {ms / evaluation:6.2f}")
    model.merge_lora(False)
    ms = timed(lambda: field(0.5, x, prediction))
    model.merge_lora(True)
    print(f"  {'with the LoRA not merged':38} {ms:8.3f} ms  {ms / evaluation:6.2f}")


def drawn(model, ids, targets, unroll=0, hops=None, documents=None):
    """A batch with all that is random in it, as train.py makes one."""
    cpu = targets.cpu()
    batch = Batch(ids.cpu(), documents, find_targets(cpu, None, hops))
    generators = [torch.Generator().manual_seed(row) for row in range(len(ids))]
    draws = RowDraws.of(batch.targets.index[0], generators)
    return draw(model.config, batch, draws, unroll).to(ids.device)


def mean_loss(model, ids, targets):
    return paper_losses(model, drawn(model, ids, targets)).values.mean()


OPTIONS = {
    "the paper's path": {},
    "reads its own guess": {"self_conditioning": True},
    "own keys and values": {"own_kv": True},
    "both": {"self_conditioning": True, "own_kv": True},
}


def options_table(lm, config, batch: int, context: int, timed):
    """What our two departures cost beside the paper's path: to sample, to train."""
    device = lm.embed.weight.device
    generator = torch.Generator().manual_seed(0)
    size = (batch, context + 1)
    ids, targets = torch.randint(lm.config.vocab_size, (2, *size), generator=generator).to(device)
    # as in a graded answer, the last tokens count
    targets[:, :-8] = IGNORE
    hops = torch.full((batch,), 6)
    first = None
    print(f"batch {batch}, context {context}, 8 tokens of a row counted: ms, and times the first")
    print(" " * 24 + "".join(f"{name:>20}" for name in
                             ("an evaluation", "a token read", "update, paper", "update, refined")))
    for name, options in OPTIONS.items():
        model = L2D(lm, dataclasses.replace(config, **options)).eval()
        model.merge_lora()
        cache = KVCache()
        model.read(ids[:, :-1], cache=cache)
        states = model.read(ids[:, -1:], cache=cache)
        x = torch.randn(batch, 1, config.width, generator=generator).to(device)
        prediction = lm.logits(states.hidden).float()
        field = VelocityField(model, states)

        def read():
            cache.length = context      # the newest token is read again, in its place
            model.read(ids[:, -1:], cache=cache)

        def update(objective, unroll=0):
            with torch.enable_grad():
                objective(drawn(model, ids, targets, unroll, hops)).values.mean().backward()

        found = [timed(lambda: field(0.5, x, prediction)), timed(read)]
        model.train()
        found.append(timed(lambda: update(model.token_losses)))
        found.append(timed(lambda: update(model.refined_losses, unroll=8)))
        first = first or found
        print(f"  {name:22}" + "".join(f"{ms:12.2f} {ms / base:6.2f}×"
                                       for ms, base in zip(found, first)))


@torch.enable_grad()
def training_table(model, rows: int, length: int, timed):
    """One update of the path, and what it would take without each saving."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    size = (rows, length)
    vocab_size = model.lm.config.vocab_size
    ids, targets = torch.randint(vocab_size, (2, *size), generator=generator).to(device)
    half = targets.clone()
    half[:, ::2] = IGNORE           # as in chat data, where only the answers count
    trained = list(model.path_parameters().values())
    fused, plain = (torch.optim.AdamW(trained, lr=1e-9, fused=on) for on in (True, False))

    def update(targets=targets, optimizer=fused):
        mean_loss(model, ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def with_plain_head():
        model.lm.log_p = lambda hidden, y: -F.cross_entropy(
            model.lm.logits(hidden).float(), y, reduction="none")
        update()
        del model.lm.log_p          # what stood in the way of the class's own

    def frozen():
        with torch.no_grad():
            model.lm.log_p(model.lm.read(ids).hidden.flatten(0, 1), targets.flatten())

    model.train()
    whole = timed(update)
    print(f"one update of the path on {rows} rows of {length} tokens: {whole:.1f} ms, "
          f"{1000 * rows * length / whole:.0f} tokens/s; below: what it takes instead")
    works = [("half of the tokens counted", lambda: update(half)),
             ("AdamW not fused", lambda: update(optimizer=plain)),
             ("logits kept by autograd", with_plain_head),
             ("the frozen model's loss, no gradient", frozen)]
    for name, work in works:
        ms = timed(work)
        print(f"  {name:38} {ms:8.1f} ms  {ms / whole:6.2f}")
    print_parts(model, ids, targets, whole, update, timed)
    # to train has dropped all that was kept to sample
    model.eval()
    model.merge_lora(True)


def print_parts(model, ids, targets, whole: float, update, timed):
    """Where the time of an update goes, and how close its arithmetic is to the machine's best."""

    def read():
        with torch.no_grad():
            model.read(ids)

    def forward():
        return mean_loss(model, ids, targets)

    def backward():
        forward().backward()
        model.zero_grad(set_to_none=True)

    # each holds the one before
    states, objective, gradient = map(timed, (read, forward, backward))
    parts = {"the frozen model reads": states, "the path and its loss": objective - states,
             "backward": gradient - objective, "the optimizer": whole - gradient}
    for name, ms in parts.items():
        print(f"    of it, {name:30} {ms:8.1f} ms  {100 * ms / whole:5.0f} %")
    with FlopCounterMode(display=False) as counter:
        update()
    rate = counter.get_total_flops() / whole / 1e6
    best = peak(ids.device, timed)
    print(f"    {rate:.1f} GFLOP/s, {100 * rate / best:.0f} % of the {best:.1f} of a large matrix "
          "product here")
    ms = timed(full_update(model.lm, ids, targets))
    print(f"  {'full finetuning of the same model':38} {ms:8.1f} ms  {ms / whole:6.2f}")


@torch.enable_grad()
def savings_table(model, rows: int, length: int, timed):
    """Packed rows, what is kept of the frozen model, recomputing, compiling; time and memory."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.lm.config.vocab_size
    ids, targets = torch.randint(vocab_size, (2, rows, length), generator=generator).to(device)
    # as in chat data, where only the answers count
    targets[:, ::2] = IGNORE
    model.train()
    # four documents in each row
    numbers = (torch.arange(length) * 4 // length + 1).repeat(rows, 1)
    plain = drawn(model, ids, targets)
    states = model.lm.read(ids)
    cached = CachedStates(states.hidden, states.keys, states.values)
    compiled = torch.compile(paper_losses, dynamic=True)

    def again(_, batch):
        forwards = [block.forward for block in model.blocks]
        recompute(model.blocks)
        losses = paper_losses(model, batch)
        for block, forward in zip(model.blocks, forwards):
            block.forward = forward
        return losses

    works = {
        "one document, half of it counted": (paper_losses, plain),
        "four documents by their borders": (
            paper_losses, drawn(model, ids, targets, documents=Packed.of(numbers))),
        "four documents by a mask": (
            paper_losses, drawn(model, ids, targets, documents=numbers)),
        "what the frozen model makes is kept": (
            paper_losses, dataclasses.replace(plain, cached=cached)),
        "--checkpointing": (again, plain),
        "--compile": (compiled, plain),
    }
    print(f"forward and backward on {rows} rows of {length} tokens; memory for backward:")
    first = None
    for name, (objective, batch) in works.items():
        def learn():
            objective(model, batch.to(ids.device)).values.mean().backward()
            model.zero_grad(set_to_none=True)

        try:
            ms = timed(learn)
        except RuntimeError as error:
            # torch.compile without a compiler
            print(f"  {name:38} not here: {str(error).strip().splitlines()[0]}")
            continue
        first = first or ms
        size, _ = saved_bytes(lambda: objective(model, batch.to(ids.device)))
        print(f"  {name:38} {ms:8.1f} ms  {ms / first:6.2f}  {size / 1e6:8.1f} MB")
    ms = timed(lambda: drawn(model, ids, targets))
    print(f"  {'times and noise, made an update ahead':38} {ms:8.1f} ms  {ms / first:6.2f}")
    model.eval()
    model.merge_lora(True)


def peak(device, timed, size: int = 1536) -> float:
    """GFLOP/s of a product of two square matrices."""
    a = torch.randn(size, size, device=device)
    return 2 * size ** 3 / timed(lambda: a @ a) / 1e6


def full_update(lm, ids, targets):
    """An update of a copy whose weights are all trained."""
    copied = copy.deepcopy(lm).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-9, fused=True)
    index = (targets != IGNORE).nonzero(as_tuple=True)

    def update():
        hidden = copied.read(ids).hidden[index]
        (-copied.log_p(hidden, targets[index])).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return update


def texts_table(model, rows: int, timed):
    """Whole texts by several solvers, against the frozen model's."""
    lm = model.lm
    ids = torch.randint(lm.config.vocab_size, (rows, 8),
                        generator=torch.Generator().manual_seed(0))
    prompts = ids.tolist()
    speed = {}
    for steps, solver in ((0, "euler"), (1, "euler"), (8, "euler"), (32, "euler"), (1, "dopri5")):
        # on these random prompts a path that reads its guess may never settle
        settings = Settings(steps=steps, solver=solver, max_new_tokens=16, max_nfe=100)
        answers = generate(model, prompts, settings, seeds=range(len(prompts)))
        nfe = sum(sum(a.nfe) for a in answers) / sum(len(a.nfe) for a in answers)
        seeds = range(len(prompts))
        speed[steps, solver] = timed(lambda: generate(model, prompts, settings, seeds=seeds))
        name = f"{solver} {steps}"
        if not steps:
            name = "frozen"
        ms = speed[steps, solver]
        print(f"generate 16 tokens, {name:9} NFE {nfe:6.1f}  {ms:9.1f} ms  "
              f"{ms / speed[0, 'euler']:6.2f} times the frozen model")


PARTS = ("evaluations", "options", "updates", "savings", "texts")


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", default="tiny")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[64, 1024, 2048],
                        help="tokens before the one that is drawn")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--train", type=int, nargs=2, default=[32, 64],
                        help="rows and tokens of an update (default: 32 64)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(args.init_from, device=args.device)
    lm, device = model.lm, next(model.parameters()).device
    print(f"{platform.platform()}, {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, medians of {args.repeats}")

    def timed(work):
        return median_ms(work, args.repeats, device)

    if "evaluations" in args.parts:
        for batch in args.batch_size:
            for context in args.context:
                evaluation_table(model, batch, context, timed)
    if "options" in args.parts:
        options_table(lm, model.config, 8, 64, timed)
    if "updates" in args.parts:
        training_table(model, *args.train, timed)
    if "savings" in args.parts:
        savings_table(model, *args.train, timed)
    if "texts" in args.parts:
        texts_table(model, args.batch_size[0], timed)


if __name__ == "__main__":
    main()
