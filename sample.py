"""From a prompt to text: for every token an ODE from noise to a token, or the frozen model alone.

    python sample.py --steps 8 --solver euler                       worked answers
    python sample.py --solver dopri5 --trace --prompt "(7*8)+15?"   what each token cost
    python sample.py --trace --html                                 the hardest chain as a page
    python sample.py --class sort --guidance 2 --prompt "gcab?"     pushed towards a topic
    python sample.py --talk                                         a conversation

`generate` is the sampling loop (paper Algorithm 1): the frozen model reads every token once, the
diffusion path runs once per evaluation. Read model.py before and train.py next.
"""

import argparse
import math
import time
import zlib
from dataclasses import dataclass, fields

from data.system.command import command      # first: from here on Ctrl-C is one line

import torch

from data.checkpoints.hub import resolve
from data.checkpoints.path import check_tokenizer, check_trained, class_number, read_path
from data.flags.sample import check_flags, sample_flags
from data.parts.draws import RowDraws, check_classes, draw_tokens, row_generator
from data.parts.kv_cache import KVCache
from data.parts.layout import lay_out
from data.parts.positions import check_length
from data.results.figures import trace_text
from data.results.page import write_page
from data.system.command import check_range, choices, each_line, given_flags
from data.system.disk import check_absent, check_writable, present
from data.tasks import TASKS
from data.text.answer import (
    Answer, Live, Stop, TraceFirst, encode_prompts, read_prompts, spent)
from data.text.talk import Talk
from data.text.tokenizer import load_tokenizer
from data.tiny.topics import LEVELS
from data.training.batches import Batch
from diffusion import ESTIMATES, L2D, VelocityField
from model import LM
from solvers import ADAPTIVE, SOLVERS, Ahead, odeint, times_of

COLDEST = 1e-5          # temperature: less would overflow, and is greedy in all but name
COMMON = 16             # tokens at the start of all prompts that are worth one separate read


# --- the sampling loop ----------------------------------------------------------------------------

@torch.no_grad()
def generate(model: L2D | LM, prompts: list, settings: "Settings", stop: Stop | None = None,
             class_ids=None, seeds=None, watch=None, cache: KVCache | None = None) -> list:
    """Continue every prompt, a list of token ids; returns an Answer each.

    class_ids, seeds: one integer per prompt. A seed fixes everything about its sequence, whatever
    else is in the batch, up to the rounding of batched matrix products. watch: see
    data/text/answer.py. cache: holds the start of the only prompt; afterwards all that was read.
    Raises ValueError for an empty prompt, for unknown classes, for steps > 0 with a model that has
    no diffusion path, for prompts and answers longer than the model's positions, or where the
    logits are not finite.
    """
    check_request(model, prompts, settings, class_ids)
    if not settings.steps:
        model = model.lm
    stop = stop or Stop()
    answers = [Answer(stop) for _ in prompts]
    # 1. The frozen model reads the prompts, once.
    batch = Decoding(model, prompts, answers, seeds or range(len(prompts)), class_ids, cache)
    for n in range(settings.max_new_tokens):
        # 2. Noise flows to the vector of the next token; the final evaluation makes logits of it.
        logits, nfe, solution = next_logits(batch, settings, watch)
        # 3. The token is chosen from the logits, as from any language model's.
        tokens = choose(logits[:, 0], settings, batch.generators).tolist()
        if watch:
            watch(batch, range(len(tokens)), 1.0, logits, tokens, solution)
        # 4. It is written down, and may be the last of its answer.
        running = []
        for row, (answer, token) in enumerate(zip(batch.answers, tokens)):
            answer.nfe.append(nfe[row])
            answer.calls += (solution and solution.calls) or nfe[row]
            if solution is not None and not solution.finished[row]:
                answer.unfinished += 1
            if token in stop.ids:
                answer.stopped = True
            else:
                answer.ids.append(token)
            if stop.strings and not answer.stopped:
                answer.stopped = stop.found(answer.ids)
            if not answer.stopped:
                running.append(row)
        # the last token need not be read: nothing follows it
        if not running or n == settings.max_new_tokens - 1:
            break
        # 5. Finished answers leave the batch, and the frozen model reads the others' tokens.
        batch.go_on(running, [tokens[row] for row in running])
    return answers


class Decoding:
    """A batch of answers under way: the states after their newest tokens, generators, classes."""

    def __init__(self, model, prompts: list, answers: list, seeds, class_ids, cache=None):
        device = next(model.parameters()).device
        self.model = model
        self.answers = answers
        # on the CPU, whatever the device: a seed then means the same noise on every machine
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.class_ids = None
        if class_ids is not None:
            self.class_ids = torch.tensor(class_ids, device=device)
        self.cache = KVCache() if cache is None else cache
        # prompts end at the same column; padding on the left is document 0
        length = max(map(len, prompts))
        shifts = [length - len(prompt) for prompt in prompts]
        ids, documents = torch.zeros(2, len(prompts), length, dtype=torch.long, device=device)
        for row, (prompt, shift) in enumerate(zip(prompts, shifts)):
            ids[row, shift:] = torch.tensor(prompt)
            documents[row, shift:] = 1
        # what all prompts begin with, such as worked examples, is read once. The first and the
        # last in order differ where any two do; the last token of a prompt stays.
        low, high, most = min(prompts), max(prompts), min(map(len, prompts)) - 1
        common = next((i for i in range(most) if low[i] != high[i]), most)
        if len(prompts) == 1 or common < COMMON:
            # what is in the cache already
            common = self.cache.length
        # without padding the attention needs no mask
        before = after = None
        if any(shifts):
            before, after = documents[:, :common], documents[:, common:]
        if common > self.cache.length:
            model.read(torch.tensor([prompts[0][:common]], device=device), None, self.cache)
            # a shorter prompt begins further right, and has less of its start in the cache
            self.cache.spread(shifts, before)
        # the prompt's own next tokens are known: only the last place needs a prediction
        self.states = model.read(ids[:, common:], after, self.cache).last()

    def go_on(self, rows: list, tokens: list):
        """Go on with some rows, each with one more token."""
        if len(rows) < len(self.answers):
            index = torch.tensor(rows, device=self.states.hidden.device)
            self.answers = [self.answers[row] for row in rows]
            self.generators = [self.generators[row] for row in rows]
            if self.class_ids is not None:
                self.class_ids = self.class_ids[index]
            self.cache.keep(index)
        ids = torch.tensor(tokens, device=self.states.hidden.device)[:, None]
        # 1: padding, document 0, is on the left and must stay hidden
        documents = None if self.cache.documents is None else torch.ones_like(ids)
        self.states = self.model.read(ids, documents, self.cache)


def next_logits(batch: Decoding, settings: "Settings", watch=None) -> tuple:
    """(logits (B, 1, V) of every row's next token, NFE of each, solution of the ODEs or None)."""
    model, states = batch.model, batch.states
    solution = None
    if not settings.steps:
        # no path: the frozen model's own prediction
        logits = model.logits(states.hidden).float()
        nfe = [0] * len(batch.answers)
    else:
        velocity = VelocityField(
            model, states, settings.estimate, settings.estimate_temperature,
            batch.class_ids, settings.guidance, batch.generators)
        # drawn sequence by sequence, so that none depends on the number of the others
        noise = [torch.randn(1, model.config.width, generator=g) for g in batch.generators]
        # x_0 ~ N(0, σ²I)
        x_0 = model.config.sigma * torch.stack(noise).to(states.hidden.device)  # (B, 1, Z) float32
        seen = None
        if watch:
            def seen(rows, t, x, prediction):
                watch(batch, rows, t, prediction)
        logits, nfe, solution = solve(velocity, x_0, settings, seen)
        nfe = nfe.tolist()
    if not logits.isfinite().all():
        raise ValueError(f"the logits of token {len(batch.answers[0].nfe)} are not finite: are the "
                         "weights damaged, or --guidance too large?")
    return logits, nfe, solution


def solve(velocity: VelocityField, x_0, settings: "Settings", watch=None) -> tuple:
    """(logits (B, T, V) at the end of the ODEs, NFE (B,) of each, their solution)."""
    # the solver counts calls; a guided call evaluates the network twice
    cost, *_ = velocity.guided_inputs
    budget = settings.max_nfe and max(1, settings.max_nfe // cost)
    grid = settings.solver, settings.steps, settings.rtol, settings.atol
    ahead = None
    # one sequence whose velocity is constant while its best candidate stays
    constant = cost == 1 and settings.estimate == "argmax"
    if len(x_0) == 1 and constant and not velocity.l2d.config.self_conditioning:
        ahead = Ahead(velocity, [*times_of(*grid), 1.0])
    solution = odeint(ahead or velocity, x_0, *grid, budget, settings.stop_unchanged, watch)
    if ahead:
        _, logits = ahead(1.0, solution.x)
        solution.calls = ahead.calls
    else:
        logits = velocity.final_logits(solution.x, solution.prediction)
    return logits, (solution.nfe + 1) * cost, solution


def choose(logits, settings: "Settings", generators):
    """Token ids (B,) from logits (B, V): greedy, or a sample within top_k and top_p."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    p = (logits / settings.temperature).softmax(-1)
    # stable, or equal probabilities would be cut differently on every machine
    ordered, order = p.sort(descending=True, stable=True)
    if settings.top_k is not None:
        ordered[:, settings.top_k:] = 0
    if settings.top_p is not None:
        # the fewest tokens that together reach top_p: those before which it is not reached
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= settings.top_p, 0)
    places = draw_tokens(ordered[:, None], generators)                  # (B, 1)
    return order.gather(1, places)[:, 0]


# --- settings -------------------------------------------------------------------------------------

@dataclass
class Settings:
    """How tokens are found. `steps` are intervals of the fixed solvers; 0 is the frozen model."""
    steps: int = 8
    solver: str = "euler"
    rtol: float = 1e-3                   # of dopri5, which chooses its own steps
    atol: float = 1e-3
    stop_unchanged: int | None = None    # evaluations without change after which a token stops
    max_nfe: int | None = None           # in one token's ODE, both copies of guidance counted
    estimate: str = "argmax"             # of the clean point, see diffusion.VelocityField
    estimate_temperature: float | str = 1.0
    temperature: float = 0.0             # of the token itself; 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0                # any finite number: negative weights push away
    max_new_tokens: int = 64

    def __post_init__(self):
        choices(self.solver, SOLVERS, "solver")
        choices(self.estimate, ESTIMATES, "estimate")
        for name, limits in RANGES.items():
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, *limits)
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature = {self.temperature} is out of range; "
                             f"allowed: 0 (greedy), or {COLDEST} or more")
        if self.solver in ADAPTIVE and self.estimate == "sample":
            raise ValueError(f"estimate = sample makes a random velocity, to which {self.solver} "
                             "cannot adapt; allowed: argmax, average, or a fixed solver")
        temperature = self.estimate_temperature
        if temperature != "1-t" and not COLDEST <= temperature < math.inf:
            raise ValueError(f"estimate_temperature = {temperature} is out of range; "
                             f"allowed: {COLDEST} or more, or 1-t (argmax is its limit at 0)")


# larger numbers would overflow, or never end
RANGES = {
    "steps": (0, 10**6),
    "rtol": (1e-12, 1e6),
    "atol": (1e-12, 1e6),
    "stop_unchanged": (1, 10**9),
    "max_nfe": (1, 10**9),
    "temperature": (0, 1e6),
    "top_k": (1, 10**9),
    "top_p": (1e-6, 1),
    "guidance": (-1e6, 1e6),
    "max_new_tokens": (1, 10**9),
}


def check_request(model, prompts: list, settings: Settings, class_ids=None):
    """Raise ValueError for a request that `generate` cannot fulfil, before any work."""
    lm = model.lm
    if settings.steps and lm is model:
        raise ValueError("this model has no diffusion path, so --steps must be 0; "
                         "make one with train.py")
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty; give at least one token")
    longest = max(map(len, prompts))
    room = lm.config.max_positions - longest + 1
    remedy = f"shorten the prompt of {longest}"
    if room > 0:
        remedy += f", or take --max_new_tokens {room} or less"
    # the last token of an answer is not read
    check_length(lm.config, longest + settings.max_new_tokens - 1, remedy)
    if class_ids is not None and settings.steps:
        check_classes(torch.tensor(class_ids), model.config.classes)


# --- many problems --------------------------------------------------------------------------------

def answer_problems(model, tokenizer, task, problems: list, settings: Settings, seed: int = 0,
                    batch_size: int = 128) -> list:
    """An answer to every problem of a task, graded: Answers whose `right` is set.

    Each problem has a noise of its own, whatever stands beside it.
    """
    stop = Stop.of(tokenizer)
    answers = []
    for at in range(0, len(problems), batch_size):
        batch = problems[at:at + batch_size]
        prompts = [task.prompt(problem, tokenizer) for problem in batch]
        # from the problem itself: neither its place nor its neighbours change its noise
        seeds = [zlib.crc32(task.key(problem).encode()) + seed for problem in batch]
        class_ids = None
        # a path with other classes, or none, gets no class
        if knows_classes(model, task):
            class_ids = [task.class_id(problem) for problem in batch]
        answers += generate(model, prompts, settings, stop, class_ids, seeds)
    for problem, answer in zip(problems, answers):
        answer.right = task.grade(problem, answer.text, answer.stopped)
    return answers


def knows_classes(model, task) -> bool:
    """Was the path trained with just the classes of the task?"""
    return isinstance(model, L2D) and model.config.class_names == list(task.classes)


@torch.no_grad()
def next_p(model, prompts: list, settings: Settings, seeds: list, draws: int,
           class_ids=None) -> tuple:
    """(p (n, B, V) of the next token for every draw of the noise, the NFE of each prompt).

    class_ids: one integer per prompt, as in `generate`
    """
    if not settings.steps:
        # without noise every draw is the same
        model, draws = model.lm, 1
    batch = Decoding(model, prompts, [Answer() for _ in prompts], seeds, class_ids)
    found, costs = [], []
    for _ in range(draws):
        logits, nfe, _ = next_logits(batch, settings)
        found.append(logits[:, 0].softmax(-1))
        costs.append(nfe)
    return torch.stack(found), [sum(cost) for cost in zip(*costs)]


@torch.no_grad()
def forced_log_p(model, batch: Batch, settings: Settings, seeds: list, draws: int) -> tuple:
    """(log p (N, V) at every position of a batch that counts, the NFE of each).

    The tokens before are those of the text. seeds: one a row; p is the mean over `draws` noises.
    """
    targets = batch.targets
    states = model.read(batch.ids, batch.documents).at(targets.index)
    if not settings.steps:
        log_p = model.lm.logits(states.hidden).float().log_softmax(-1)
        return log_p, torch.zeros_like(targets.y)
    rows, places = (index.cpu() for index in targets.index)             # (N,) each
    noises = RowDraws.of(rows, [torch.Generator().manual_seed(seed) for seed in seeds])
    # by its place in its row: neither the batch nor other rows change it
    generators = [row_generator(seeds[i], k) for i, k in zip(rows.tolist(), places.tolist())]
    velocity = VelocityField(
        model, states.alone(), settings.estimate, settings.estimate_temperature,
        targets.class_ids, settings.guidance, generators)
    # of the sum of p over the draws; added one by one, since (N, V) may be large
    log_sum, nfe = torch.tensor(-math.inf), 0
    for _ in range(draws):
        noise = noises.normal(model.config.width).to(batch.ids.device)
        x_0 = model.config.sigma * noise[:, None]                       # (N, 1, Z)
        logits, cost, _ = solve(velocity, x_0, settings)
        log_sum = torch.logaddexp(log_sum, logits[:, 0].log_softmax(-1))
        nfe = nfe + cost
    return log_sum - math.log(draws), nfe


def load_model(init_from: str, dtype: str | None = None, device: str | None = None,
               cache_dir: str | None = None, base: str | None = None, merge: bool = True):
    """(L2D or LM, tokenizer) from a name or directory, with its diffusion path where it holds one.

    base   directory of the path's frozen model, if path.json names another
    merge  add the LoRA into copies of the path's matrices, and lay out the frozen model's
    """
    directory = resolve(init_from, cache_dir)
    dtype = dtype and getattr(torch, dtype)
    # a path's directory holds the path alone; path.json names the model beside which it belongs
    if present(directory / "path.json"):
        meta = read_path(directory)
        check_trained(meta, directory)
        base = base or meta["base"]
        lm = LM.from_pretrained(base, dtype, device, cache_dir)
        model = L2D.load(directory, lay_out(lm) if merge else lm)
        model.merge_lora(merge)
        tokenizer = load_tokenizer(resolve(base, cache_dir), model.lm.config.vocab_size)
        check_tokenizer(meta, tokenizer, directory)
        return model, tokenizer
    if base:
        raise ValueError(f"--base would do nothing: {directory} holds no diffusion path")
    model = lay_out(LM.from_pretrained(init_from, dtype, device, cache_dir))
    return model, load_tokenizer(directory, model.config.vocab_size)


# --- what is printed ------------------------------------------------------------------------------

def worked_answers(model, tokenizer, settings: Settings, seed: int) -> tuple:
    """A test problem of every kind, answered by the frozen model and as `settings` say.

    Returns our answers and the seconds they took.
    """
    task = TASKS["tiny"]
    problems = [task.problem(group, seed) for group in task.groups]
    # under the same decoding, or the comparison would say nothing
    frozen = answer_problems(model, tokenizer, task, problems, Settings(steps=0))
    start = time.time()
    ours = answer_problems(model, tokenizer, task, problems, settings)
    seconds = time.time() - start
    for problem, before, after in zip(problems, frozen, ours):
        print(task.describe(problem))
        print(f"   frozen  {before.mark}  {before.text!r}")
        print(f"   L2D     {after.mark}  {after.text!r}   NFE {sum(after.nfe)}")
    return ours, seconds


def prompted_answers(model, tokenizer, settings: Settings, args, given: dict) -> tuple:
    """Print num_samples answers to every prompt; returns them all and the seconds they took."""
    label = None if args.label is None else class_number(args.label, model.config)
    stop = Stop.of(tokenizer, args.stop)
    texts = [text for text in read_prompts(args.prompt, args.prompt_file)
             for _ in range(args.num_samples)]
    prompts = encode_prompts(texts, tokenizer, args.chat)
    # all of them, and not batch by batch
    check_request(model, prompts, settings)
    # one answer alone is shown as it comes, unless its end may have to be taken back
    live = None
    if len(prompts) == 1 and not stop.strings:
        live = Live(f"{texts[0]!r}\n   answer  ", tokenizer)
    watchers = [one for one in (live, args.trace and TraceFirst()) if one]

    def watch(*event):
        for watcher in watchers:
            watcher(*event)

    answers, seconds = [], 0.0
    for at in range(0, len(prompts), args.batch_size):
        some = slice(at, at + args.batch_size)
        # samples of one prompt have the seeds seed, seed + 1, ..., so each can be drawn again
        seeds = [args.seed + place % args.num_samples for place in range(len(prompts))[some]]
        labels = None if label is None else [label] * len(seeds)
        start = time.time()
        new = generate(model, prompts[some], settings, stop, labels, seeds,
                       watch if watchers else None)
        seconds += time.time() - start
        frozen = [None] * len(new)
        if args.frozen:
            # the frozen model's own best answers, with whatever settings the path answers
            greedy = Settings(steps=0, max_new_tokens=settings.max_new_tokens)
            frozen = generate(model, prompts[some], greedy, stop)
        if live:
            live.end()
        for text, answer, before in zip(texts[some], new, frozen):
            if not live:
                print(f"{text!r}\n   answer  {answer.text}")
            print(f"   {spent([answer])}")
            if before:
                print(f"   frozen  {before.text}")
            if answer.traces:
                print(trace_text(answer, tokenizer, args.trace_token))
        answers += new
    if args.html is not None:
        write_page(args, given, texts[0], answers[0], tokenizer)
        print(f"   page    {args.html}")
    return answers, seconds


# --- the command line -----------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    """See data/flags/sample.py."""
    return sample_flags(__doc__, Settings(), SOLVERS, ADAPTIVE, ESTIMATES)


@command("sample.py")
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    known = vars(args)
    settings = Settings(**{f.name: known[f.name] for f in fields(Settings) if f.name in known})
    given = given_flags(parser, argv)
    check_flags(args, given, ADAPTIVE)
    if args.html is not None:
        check_absent(args.html, args.overwrite)
        check_writable(args.html)
    model, tokenizer = load_model(args.init_from, args.dtype, args.device, args.cache_dir,
                                  args.base, args.merge_lora)
    if args.talk:
        return each_line(Talk(model, tokenizer, settings, args, given, parser, generate).act)
    if args.trace and not (args.prompt or args.prompt_file):
        # the hardest chain that was trained
        args.prompt = [TASKS["tiny"].problem(("chains", max(LEVELS["chains"])), args.seed).prompt]
    if args.prompt or args.prompt_file:
        answers, seconds = prompted_answers(model, tokenizer, settings, args, given)
    else:
        answers, seconds = worked_answers(model, tokenizer, settings, args.seed)
    steps = "" if settings.solver in ADAPTIVE else f", steps {settings.steps}"
    print(f"{spent(answers, seconds)}, {settings.solver}{steps}")


if __name__ == "__main__":
    main()
