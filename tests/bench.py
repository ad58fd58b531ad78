"""The effect of each saving, as ratios of median times within one run. A benchmark, not a test.

    python tests/bench.py
    python tests/bench.py --init_from=out --batch_size 16 --context 128 512 --repeats 30
    python tests/bench.py --parts llama --words 128256

The part `llama` stands beside the transformers package where that is installed.
"""

import argparse
import copy
import dataclasses
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

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


def print_times(repeats: int, device, title: str, works: dict, notes: dict | None = None) -> dict:
    """A table of works, all by turns, so that what slows one slows all; returns their medians.

    A line has the median time in milliseconds, and the time's ratio to the first work's in the same
    round: median, least and largest. The time is that of the CPU on a single thread, which other
    processes hardly change, else that of the wall.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    # on Windows the clock of the CPU ticks 64 times a second
    clock = time.process_time if alone and sys.platform != "win32" else time.perf_counter
    times = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (clock() - start))
    print(f"{title}: ms, ratio to the first")
    medians = {}
    # the first round does not count
    times = {name: some[1:] for name, some in times.items()}
    first, *_ = times.values()
    for name, some in times.items():
        ratios = [ms / base for ms, base in zip(some, first)]
        medians[name] = statistics.median(some)
        print(f"  {name:38} {medians[name]:9.2f}  {statistics.median(ratios):5.2f} "
              f"[{min(ratios):.2f}, {max(ratios):.2f}]{(notes or {}).get(name, '')}")
    return medians


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


def evaluation_table(model, batch: int, context: int, compare):
    """One evaluation of the path, and its time without each saving."""
    newest = Newest(model, batch, context)
    unmerged = L2D(model.lm, model.config).eval()
    unmerged.load_state_dict(model.state_dict())

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
        "an evaluation of the path": newest.evaluate,
        "the frozen model's own next token": decode,
        "with V computed again": fresh_vocabulary,
        "with the modulation computed again": fresh_modulation,
        "with the LoRA not merged": Newest(unmerged, batch, context).evaluate,
    }
    if model.config.classes:
        classes = torch.zeros(batch, dtype=torch.long, device=newest.ids.device)
        works["guided, two copies in one batch"] = lambda: newest.evaluate(
            class_ids=classes, guidance=2.0)
        works["guided, one copy after the other"] = apart
    compare(f"batch {batch}, context {context}", works)


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


def options_table(lm, config, batch: int, context: int, compare):
    """The cost of our departures beside the paper's path: in sampling and in training."""
    ids, targets = random_ids(lm, 2, batch, context + 1)
    # as in a graded answer, the last tokens count
    targets[:, :-8] = IGNORE
    models = {name: L2D(lm, dataclasses.replace(config, **options)).eval()
              for name, options in OPTIONS.items()}
    newest = {}
    for name, model in models.items():
        model.merge_lora()
        newest[name] = Newest(model, batch, context)
    shape = f"batch {batch}, context {context}"
    compare(f"an evaluation, {shape}", {name: one.evaluate for name, one in newest.items()})
    compare(f"a token read, {shape}",
            {name: lambda one=one: one.read(one.model) for name, one in newest.items()})

    @torch.enable_grad()
    def update(model, objective, unroll):
        objective(model, drawn(model, ids, targets, unroll)).values.mean().backward()

    for title, objective, unroll in (("paper", paper_losses, 0), ("refined", refined_losses, 8)):
        compare(f"an update, {title}, {shape}, 8 tokens of a row counted", {
            name: lambda model=model: update(model.train(), objective, unroll)
            for name, model in models.items()})


@torch.enable_grad()
def training_table(model, rows: int, length: int, compare):
    """One update of the path, its time without each saving, its parts."""
    ids, targets = random_ids(model, 2, rows, length)
    # as in chat data, where only the answers count
    half = targets.clone()
    half[:, ::2] = IGNORE
    trained = list(model.path_parameters().values())
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)

    def update(targets=targets):
        mean_loss(model, ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def read():
        with torch.no_grad():
            model.read(ids)

    def backward():
        mean_loss(model, ids, targets).backward()
        model.zero_grad(set_to_none=True)

    model.train()
    medians = compare(f"an update of the path on {rows} rows of {length} tokens", {
        "the update": update,
        "half of the tokens counted": lambda: update(half),
        "full finetuning of the same model": full_update(model.lm, ids, targets),
        # each of these contains the one before
        "of it, the frozen model's states": read,
        "states, the path and its loss": lambda: mean_loss(model, ids, targets),
        "all but the optimizer": backward,
    })
    print(f"  {1000 * rows * length / medians['the update']:.0f} tokens/s")
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
def savings_table(model, rows: int, length: int, compare):
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
    learn, notes = {}, {}
    for name, (objective, batch) in works.items():
        try:
            size, _ = saved_bytes(lambda: objective(model, batch.to(ids.device)))
        except RuntimeError as error:
            # torch.compile without a compiler
            print(f"  {name:38} not here: {str(error).strip().splitlines()[0]}")
            continue
        notes[name] = f"  {size / 1e6:8.1f} MB"

        def forward_backward(objective=objective, batch=batch):
            objective(model, batch.to(ids.device)).values.mean().backward()
            model.zero_grad(set_to_none=True)

        learn[name] = forward_backward
    compare(f"forward and backward on {rows} rows of {length} tokens, and memory for backward",
            learn, notes)
    model.eval()
    model.merge_lora(True)


def nfe_of(texts: list) -> float:
    """NFE a token of several Answers."""
    return sum(sum(text.nfe) for text in texts) / sum(len(text.nfe) for text in texts)


def texts_table(model, rows: int, compare):
    """Whole texts by several solvers, against the frozen model's."""
    prompts = random_ids(model, rows, 8).tolist()
    works, notes = {}, {}
    for steps, solver in ((0, "euler"), (1, "euler"), (8, "euler"), (32, "euler"), (1, "dopri5")):
        # on random prompts the predictions may change at every evaluation, and no step be accepted
        settings = Settings(steps=steps, solver=solver, max_new_tokens=16, max_nfe=100)
        name = f"{solver} {steps}" if steps else "frozen"
        works[name] = functools.partial(generate, model, prompts, settings)
        notes[name] = f"  NFE {nfe_of(works[name]()):6.1f}"
    compare(f"generate 16 tokens, batch {rows}", works, notes)


def ahead_table(device, compare):
    """Many evaluations in one call, on the embedded path by the paper's objective, one by one."""
    model, tokenizer = load_model("data/tiny/paper", device=device)
    task = TASKS["tiny"]
    problems = [task.problem(group, 0) for group in task.groups]
    prompts = [tokenizer.encode_start(problem.prompt) for problem in problems]
    ahead = sample.Ahead
    # without times it is never ahead
    kinds = {"one by one": lambda f, times: ahead(f, []), "ahead": ahead}

    def answer(kind, settings):
        sample.Ahead = kinds[kind]
        return [generate(model, [ids], settings)[0] for ids in prompts]

    for solver, steps in (("euler", 8), ("midpoint", 7), ("midpoint", 63), ("dopri5", 8)):
        settings = Settings(steps=steps, solver=solver, max_new_tokens=8)
        works = {kind: functools.partial(answer, kind, settings) for kind in kinds}
        found = {kind: work() for kind, work in works.items()}
        notes = {}
        for kind, texts in found.items():
            calls = sum(text.calls for text in texts) / sum(len(text.nfe) for text in texts)
            same = [text.ids for text in texts] == [text.ids for text in found["one by one"]]
            notes[kind] = f"  NFE {nfe_of(texts):6.1f}  calls {calls:6.1f}  same tokens: {same}"
        compare(f"{solver} {steps}", works, notes)
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


def llama_table(words: int, batch: int, context: int, compare):
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
    compare(f"random Llama, {words} words, batch {batch}, context {context}", works)


@torch.enable_grad()
def llama_updates(words: int, compare):
    """Updates of a path beside it, and of all its weights: time, and memory for backward."""
    lm = random_llama(words)
    ids, every = torch.randint(words, (2, 4, 256), generator=torch.Generator().manual_seed(0))
    half = every.clone()
    half[:, :128] = IGNORE
    works, notes = {}, {}
    for name, options, objective, unroll, targets in (
            ("update, paper", {}, paper_losses, 0, half),
            ("update, paper, all counted", {}, paper_losses, 0, every),
            ("update, refined, all words", BOTH, refined_losses, 8, half),
            ("update, refined, 32 words", {**BOTH, "prediction_words": 32}, refined_losses, 8,
             half)):
        model = L2D(lm, L2DConfig(**options)).train()

        def forward(model=model, objective=objective, unroll=unroll, targets=targets):
            return objective(model, drawn(model, ids, targets, unroll)).values.mean()

        works[name] = lambda forward=forward: forward().backward()
        notes[name] = f"  {saved_bytes(forward)[0] / 1e6:8.1f} MB"
    compare(f"random Llama, {words} words, 4 rows of 256 tokens, half counted, memory for backward",
            works, notes)
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
    compare("the same, 4 rows of 64 tokens", works)


def start_table(repeats: int):
    """CPU time of a first answer without steps, a process each; no such clock on Windows."""
    sample_py = Path(sample.__file__)
    for name, words in (("import torch", ["-c", "import torch"]),
                        ("sample.py --steps 0", [sample_py, "--steps", "0", "--prompt", "1+1?"])):
        seconds = []
        for _ in range(repeats + 1):
            before = os.times()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            seconds.append(after.children_user - before.children_user
                           + after.children_system - before.children_system)
        print(f"  {name:38} {statistics.median(seconds[1:]):9.2f} s  "
              f"[{min(seconds[1:]):.2f}, {max(seconds[1:]):.2f}]")


PARTS = ("start", "evaluations", "llama", "options", "updates", "savings", "texts", "ahead")


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

    compare = functools.partial(print_times, args.repeats, device)
    if "start" in args.parts:
        start_table(min(args.repeats, 5))
    if "evaluations" in args.parts:
        for batch in args.batch_size:
            for context in args.context:
                evaluation_table(model, batch, context, compare)
    if "llama" in args.parts:
        for batch, context in ((1, 128), (8, 128), (8, 2048)):
            llama_table(args.words, batch, context, compare)
        llama_updates(args.words, functools.partial(print_times, min(args.repeats, 5), device))
    if "options" in args.parts:
        options_table(lm, model.config, 8, 64, compare)
    # these two are of the paper's objective, without a prediction to read
    config = dataclasses.replace(model.config, self_conditioning=False, asked_again=None,
                                 prediction_words=None)
    without = L2D(lm, config).eval()
    if "updates" in args.parts:
        training_table(without, *args.train, compare)
    if "savings" in args.parts:
        savings_table(without, *args.train, compare)
    if "texts" in args.parts:
        texts_table(model, args.batch_size[0], compare)
    if "ahead" in args.parts:
        ahead_table(args.device, compare)


if __name__ == "__main__":
    main()
