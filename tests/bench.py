"""The effect of each saving, as ratios of median times within one run. A benchmark, not a test.

    python tests/bench.py
    python tests/bench.py --init_from=out --batch_size 16 --context 128 512 --repeats 30
    python tests/bench.py --parts llama --words 128256

The part `llama` stands beside the transformers package where that is installed.
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
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import sample  # noqa: E402
from data.checkpoints.families import ModelConfig  # noqa: E402
from data.parts.draws import RowDraws  # noqa: E402
from data.parts.kv_cache import KVCache  # noqa: E402
from data.parts.layout import lay_out  # noqa: E402
from data.parts.positions import Packed  # noqa: E402
from data.tasks import TASKS  # noqa: E402
from data.training.batches import IGNORE, Batch, CachedStates, find_targets  # noqa: E402
from data.training.evaluations import draw  # noqa: E402
from data.training.memory import recompute, saved_bytes  # noqa: E402
from diffusion import L2D, L2DConfig, VelocityField, paper_losses, refined_losses  # noqa: E402
from model import LM  # noqa: E402
from sample import Settings, generate, load_model  # noqa: E402

try:
    import transformers
except ImportError:
    transformers = None


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


def paired_ms(works: dict, repeats: int) -> dict:
    """Median CPU time of every work in milliseconds, all by turns: what slows one slows all."""
    times = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(1000 * (time.process_time() - start))
    # the first round does not count
    return {name: statistics.median(some[1:]) for name, some in times.items()}


def print_time(name: str, ms: float, first: float, more: str = ""):
    """A line of a table: milliseconds, and their ratio to the first line's."""
    print(f"  {name:38} {ms:8.2f} ms  {ms / first:6.2f}{more}")


def random_ids(model, *size):
    """Token ids on the model's device."""
    lm = model.lm
    ids = torch.randint(lm.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    return ids.to(lm.embed.weight.device)


class Newest:
    """The state of sampling: a cache of `context` tokens and one more, a field, its inputs."""

    def __init__(self, model: L2D, batch: int, context: int):
        self.model = model
        self.ids = random_ids(model, batch, context + 1)
        self.cache = KVCache()
        model.read(self.ids[:, :-1], cache=self.cache)
        self.states = model.read(self.ids[:, -1:], cache=self.cache)
        self.x = torch.randn(batch, 1, model.config.width).to(self.ids.device)
        self.prediction = model.lm.logits(self.states.hidden).float()

    def read(self, reader):
        """Read the newest token again, in its place."""
        self.cache.length = self.ids.shape[1] - 1
        return reader.read(self.ids[:, -1:], cache=self.cache)

    def evaluate(self, t=0.5, **options):
        VelocityField(self.model, self.states, **options)(t, self.x, self.prediction)


def evaluation_table(model, batch: int, context: int, timed):
    """One evaluation of the path, and its time without each saving."""
    newest = Newest(model, batch, context)

    def decode():
        model.lm.logits(newest.read(model.lm).hidden)

    def fresh_vocabulary():
        model.cached_vocabulary = None
        newest.evaluate()

    def fresh_modulation():
        model.time_table.cached.clear()
        newest.evaluate()

    def apart():
        newest.evaluate(class_ids=classes)
        newest.evaluate()

    works = {
        "the frozen model's own next token": decode,
        "with V computed again": fresh_vocabulary,
        "with the modulation computed again": fresh_modulation,
    }
    if model.config.classes:
        classes = torch.zeros(batch, dtype=torch.long, device=newest.ids.device)
        works["guided, two copies in one batch"] = lambda: newest.evaluate(
            class_ids=classes, guidance=2.0)
        works["guided, one copy after the other"] = apart
    first = timed(newest.evaluate)
    print(f"batch {batch}, context {context}: one evaluation of the path {first:.3f} ms; "
          "below: other times, and their ratio to it")
    for name, work in works.items():
        print_time(name, timed(work), first)
    model.merge_lora(False)
    print_time("with the LoRA not merged", timed(newest.evaluate), first)
    model.merge_lora(True)


def drawn(model, ids, targets, unroll=0, documents=None):
    """A batch with all that is random in it, as train.py makes one."""
    batch = Batch(ids.cpu(), documents, find_targets(targets.cpu()))
    generators = [torch.Generator().manual_seed(row) for row in range(len(ids))]
    draws = RowDraws.of(batch.targets.index[0], generators)
    return draw(model.config, batch, draws, unroll).to(ids.device)


def mean_loss(model, ids, targets):
    return paper_losses(model, drawn(model, ids, targets)).values.mean()


PAPER = {"start": "paper", "self_conditioning": False, "own_kv": False, "asked_again": None}
BOTH = {"start": "frozen", "self_conditioning": True, "own_kv": True}
OPTIONS = {
    "the paper's path": PAPER,
    "frozen start": {**PAPER, "start": "frozen"},
    "self-conditioning": {**PAPER, "start": "frozen", "self_conditioning": True},
    "own keys and values": {**PAPER, "start": "frozen", "own_kv": True},
    "both": {**PAPER, **BOTH},
    "both, 32 words": {**PAPER, **BOTH, "prediction_words": 32},
}


def options_table(lm, config, batch: int, context: int, timed):
    """The cost of our departures beside the paper's path: in sampling and in training."""
    ids, targets = random_ids(lm, 2, batch, context + 1)
    # as in a graded answer, the last tokens count
    targets[:, :-8] = IGNORE
    first = None
    print(f"batch {batch}, context {context}, 8 tokens of a row counted: ms, ratio to the first")
    print(" " * 24 + "".join(f"{name:>20}" for name in
                             ("an evaluation", "a token read", "update, paper", "update, refined")))
    for name, options in OPTIONS.items():
        model = L2D(lm, dataclasses.replace(config, **options)).eval()
        model.merge_lora()
        newest = Newest(model, batch, context)

        @torch.enable_grad()
        def update(objective, unroll=0):
            batch = drawn(model, ids, targets, unroll)
            objective(model, batch).values.mean().backward()

        found = [timed(newest.evaluate), timed(lambda: newest.read(model))]
        model.train()
        found.append(timed(lambda: update(paper_losses)))
        found.append(timed(lambda: update(refined_losses, unroll=8)))
        first = first or found
        print(f"  {name:22}" + "".join(f"{ms:12.2f} {ms / base:6.2f}×"
                                       for ms, base in zip(found, first)))


@torch.enable_grad()
def training_table(model, rows: int, length: int, timed):
    """One update of the path, its time without each saving, its parts, its share of the peak."""
    ids, targets = random_ids(model, 2, rows, length)
    # as in chat data, where only the answers count
    half = targets.clone()
    half[:, ::2] = IGNORE
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
        # the method of the class again
        del model.lm.log_p

    def frozen():
        with torch.no_grad():
            model.lm.log_p(model.lm.read(ids).hidden.flatten(0, 1), targets.flatten())

    def read():
        with torch.no_grad():
            model.read(ids)

    def backward():
        mean_loss(model, ids, targets).backward()
        model.zero_grad(set_to_none=True)

    model.train()
    whole = timed(update)
    print(f"one update of the path on {rows} rows of {length} tokens: {whole:.1f} ms, "
          f"{1000 * rows * length / whole:.0f} tokens/s; below: other times, and their ratio to it")
    works = {
        "half of the tokens counted": lambda: update(half),
        "AdamW not fused": lambda: update(optimizer=plain),
        "logits saved by autograd": with_plain_head,
        "the frozen model's loss, no gradient": frozen,
        "full finetuning of the same model": full_update(model.lm, ids, targets),
    }
    for name, work in works.items():
        print_time(name, timed(work), whole)
    # each of these contains the one before
    states, objective, gradient = map(timed, (
        read, lambda: mean_loss(model, ids, targets), backward))
    parts = {"the frozen model's states": states, "the path and its loss": objective - states,
             "backward": gradient - objective, "the optimizer": whole - gradient}
    for name, ms in parts.items():
        print(f"    of it, {name:30} {ms:8.1f} ms  {100 * ms / whole:5.0f} %")
    with FlopCounterMode(display=False) as counter:
        update()
    rate = counter.get_total_flops() / whole / 1e6
    a = torch.randn(1536, 1536, device=ids.device)
    best = 2 * 1536 ** 3 / timed(lambda: a @ a) / 1e6
    print(f"    {rate:.1f} GFLOP/s, {100 * rate / best:.0f} % of the {best:.1f} of a large matrix "
          "product here")
    # training has dropped the caches of sampling
    model.eval()
    model.merge_lora(True)


def full_update(lm, ids, targets):
    """An update of a copy whose weights are all trained."""
    copied = copy.deepcopy(lm).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-9, fused=True)

    def update():
        hidden = copied.read(ids).hidden.flatten(0, 1)
        (-copied.log_p(hidden, targets.flatten())).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return update


@torch.enable_grad()
def savings_table(model, rows: int, length: int, timed):
    """Packed rows, cached states, recomputing, compiling: time and memory."""
    ids, targets = random_ids(model, 2, rows, length)
    # as in chat data, where only the answers count
    targets[:, ::2] = IGNORE
    model.train()
    # four documents in each row
    numbers = (torch.arange(length) * 4 // length + 1).repeat(rows, 1)
    plain = drawn(model, ids, targets)
    states = model.lm.read(ids)
    cached = CachedStates(states.hidden, states.keys, states.values)

    def recomputed(_, batch):
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
        "cached states of the frozen model": (
            paper_losses, dataclasses.replace(plain, cached=cached)),
        "--checkpointing": (recomputed, plain),
        "--compile": (torch.compile(paper_losses, dynamic=True), plain),
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
        print_time(name, ms, first, f"  {size / 1e6:8.1f} MB")
    print_time("times and noise, drawn an update ahead",
               timed(lambda: drawn(model, ids, targets)), first)
    model.eval()
    model.merge_lora(True)


def texts_table(model, rows: int, timed):
    """Whole texts by several solvers, against the frozen model's."""
    prompts = random_ids(model, rows, 8).tolist()
    frozen = None
    for steps, solver in ((0, "euler"), (1, "euler"), (8, "euler"), (32, "euler"), (1, "dopri5")):
        # on random prompts the predictions may change at every evaluation, and no step be accepted
        settings = Settings(steps=steps, solver=solver, max_new_tokens=16, max_nfe=100)
        answers = generate(model, prompts, settings)
        nfe = sum(sum(a.nfe) for a in answers) / sum(len(a.nfe) for a in answers)
        ms = timed(lambda: generate(model, prompts, settings))
        frozen = frozen or ms
        name = f"{solver} {steps}" if steps else "frozen"
        print_time(f"generate 16 tokens, {name}", ms, frozen, f"  NFE {nfe:6.1f}")


def ahead_table(device, timed):
    """Many evaluations in one call, on the embedded path by the paper's objective, one by one."""
    model, tokenizer = load_model("data/tiny/paper", device=device)
    task = TASKS["tiny"]
    problems = [task.problem(group, 0) for group in task.groups]
    prompts = [tokenizer.encode_start(problem.prompt) for problem in problems]
    calls = [0]
    predict = model.predict

    def counted(*args):
        calls[0] += 1
        return predict(*args)

    model.predict = counted
    ahead = sample.Ahead
    for solver, steps in (("euler", 8), ("midpoint", 7), ("midpoint", 63), ("dopri5", 8)):
        settings = Settings(steps=steps, solver=solver, max_new_tokens=8)
        first = alone = None
        for name, times_of in (("evaluations one by one", None), ("ahead", sample.times_of)):
            # without times it is never ahead
            sample.Ahead = ahead if times_of else lambda f, times: ahead(f, [])
            calls[0] = 0
            texts = [generate(model, [ids], settings)[0] for ids in prompts]
            tokens = sum(len(text.nfe) for text in texts)
            each = calls[0] / tokens
            nfe = sum(sum(text.nfe) for text in texts) / tokens
            ms = timed(lambda: [generate(model, [ids], settings) for ids in prompts])
            first, alone = first or ms, alone or texts
            same = sum(a == b for one, other in zip(texts, alone)
                       for a, b in zip(one.ids, other.ids))
            print_time(f"{solver} {steps}, {name}", ms, first,
                       f"  NFE {nfe:6.1f}  calls {each:6.1f}  same tokens {same}")
        sample.Ahead = ahead


LLAMA = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def random_llama(words: int) -> LM:
    lm = LM(ModelConfig.from_hf({**LLAMA, "vocab_size": words}))
    for p in lm.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.04)
    return lm.eval()


def transformers_llama(words: int):
    """The same model of the transformers package with other weights; None where it is missing."""
    if transformers is None:
        return None
    shape = {name: value for name, value in LLAMA.items() if name != "model_type"}
    config = transformers.LlamaConfig(vocab_size=words, **shape)
    return transformers.LlamaForCausalLM(config).eval()


def llama_table(words: int, batch: int, context: int, repeats: int):
    """Sampling from a random Llama: each saving, against a decode step by another package."""
    stored = random_llama(words)
    lm = lay_out(copy.deepcopy(stored))

    def newest(lm, **options):
        model = L2D(lm, L2DConfig(**options)).eval()
        model.merge_lora()
        return Newest(model, batch, context)

    first = newest(stored)
    for adapter in first.model.blocks.modules():
        if getattr(adapter, "merged", None) is not None:
            adapter.merged = adapter.merged.contiguous()
    paper, everything = newest(lm), newest(lm, **BOTH)
    few = newest(lm, **BOTH, prediction_words=32)
    works = {
        "a decode step, as stored": lambda: first.model.lm.logits(
            first.read(first.model.lm).hidden),
        "a decode step": lambda: lm.logits(paper.read(lm).hidden),
        "an evaluation, paper, as stored": first.evaluate,
        "an evaluation, paper": paper.evaluate,
        "the same at times of its own": lambda: paper.evaluate(torch.rand(batch)),
        "an evaluation, reads all words": everything.evaluate,
        "an evaluation, reads 32 words": few.evaluate,
    }
    theirs = transformers_llama(words)
    if theirs:
        ids = first.ids
        cache = transformers.DynamicCache()
        theirs(ids[:, :-1], past_key_values=cache, use_cache=True)

        def step():
            cache.crop(context)
            theirs(ids[:, -1:], past_key_values=cache, use_cache=True)

        works = {"a decode step of transformers": step, **works}
    print(f"random Llama, {words} words, batch {batch}, context {context}: "
          "CPU ms, ratio to the first")
    print_paired(works, repeats)


def print_paired(works: dict, repeats: int):
    found = paired_ms(works, repeats)
    for name, ms in found.items():
        print_time(name, ms, next(iter(found.values())))


@torch.enable_grad()
def llama_updates(words: int, repeats: int):
    """Updates of a path beside it, and of all its weights: time, and memory for backward."""
    lm = random_llama(words)
    ids, targets = torch.randint(words, (2, 4, 256), generator=torch.Generator().manual_seed(0))
    targets[:, :128] = IGNORE
    works, sizes = {}, {}
    for name, options, objective, unroll in (
            ("update, paper", {}, paper_losses, 0),
            ("update, refined, all words", BOTH, refined_losses, 8),
            ("update, refined, 32 words", {**BOTH, "prediction_words": 32}, refined_losses, 8)):
        model = L2D(lm, L2DConfig(**options)).train()

        def forward(model=model, objective=objective, unroll=unroll):
            return objective(model, drawn(model, ids, targets, unroll)).values.mean()

        works[name] = lambda forward=forward: forward().backward()
        sizes[name], _ = saved_bytes(forward)
    print(f"random Llama, {words} words, 4 rows of 256 tokens, half counted: CPU ms, ratio; "
          + ", ".join(f"{size / 1e6:.0f}" for size in sizes.values()) + " MB for backward")
    print_paired(works, repeats)
    works = {"all weights": full_update(lm, ids[:, :64], ids[:, 1:65])}
    theirs = transformers_llama(words)
    if theirs:
        def update():
            logits = theirs(ids[:, :64]).logits.float().flatten(0, 1)
            F.cross_entropy(logits, ids[:, 1:65].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-9, fused=True)
        works = {"all weights, transformers": update, **works}
    print_paired(works, repeats)


PARTS = ("evaluations", "llama", "options", "updates", "savings", "texts", "ahead")


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", default="tiny", help="model name or directory")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[64, 1024, 2048],
                        help="number of tokens before the newest one")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--train", type=int, nargs=2, default=[32, 64],
                        help="rows and tokens of an update (default: 32 64)")
    parser.add_argument("--words", type=int, default=32_000, help="of the random Llama")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    model, _ = load_model(args.init_from, device=args.device)
    lm, device = model.lm, next(model.parameters()).device
    print(f"{platform.platform()}, {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, medians of {args.repeats}")

    def timed(work):
        return median_ms(work, args.repeats, device)

    if "evaluations" in args.parts:
        for batch in args.batch_size:
            for context in args.context:
                evaluation_table(model, batch, context, timed)
    if "llama" in args.parts:
        for batch, context in ((1, 128), (8, 128), (8, 2048)):
            llama_table(args.words, batch, context, args.repeats)
        llama_updates(args.words, min(args.repeats, 5))
    if "options" in args.parts:
        options_table(lm, model.config, 8, 64, timed)
    # these two are of the paper's objective, without a prediction to read
    config = dataclasses.replace(model.config, self_conditioning=False, asked_again=None,
                                 prediction_words=None)
    without = L2D(lm, config).eval()
    if "updates" in args.parts:
        training_table(without, *args.train, timed)
    if "savings" in args.parts:
        savings_table(without, *args.train, timed)
    if "texts" in args.parts:
        texts_table(model, args.batch_size[0], timed)
    if "ahead" in args.parts:
        ahead_table(args.device, timed)


if __name__ == "__main__":
    main()
