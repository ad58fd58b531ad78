"""From a prompt to text: for every token an ODE from noise to a token, or the frozen model alone.

    python sample.py --steps 8 --solver euler                       worked answers
    python sample.py --solver dopri5 --trace --prompt "(7*8)+15?"   what each token cost
    python sample.py --trace --html trace.html --prompt "gcab?"     the same as a page
    python sample.py --class sort --guidance 2 --prompt "gcab?"     pushed towards a topic
    python sample.py --steps 0 --prompt "(7*8)+15?"                 the frozen model

`generate` is the sampling loop (paper Algorithm 1): the frozen model reads every token once, the
diffusion path runs once per evaluation. Time runs from noise (t = 0) to data (t = 1). Read
diffusion.py before and train.py next.
"""

import argparse
import math
import time
import zlib
from dataclasses import dataclass, fields

from data.system.command import command, given_flags # first: from here on Ctrl-C is one line

import torch

from data.checkpoints.families import choices
from data.checkpoints.hub import resolve
from data.checkpoints.path import check_tokenizer, check_trained, read_path
from data.flags.sample import check_flags, sample_flags
from data.parts.draws import check_classes, draw_noise_each, draw_tokens
from data.parts.kv_cache import KVCache
from data.parts.positions import check_length
from data.results.figures import trace_text
from data.results.page import write_page
from data.system.disk import check_absent, check_writable, present
from data.tasks import TASKS
from data.text.answer import Answer, Live, Stop, Trace, encode_prompt, note_style, read_prompts
from data.text.tokenizer import load_tokenizer
from data.training.batches import common_start, left_pad
from diffusion import ESTIMATES, L2D, VelocityField
from model import LM
from solvers import ADAPTIVE, SOLVERS, odeint

COLDEST = 1e-5          # temperature: less would overflow, and is greedy in all but name
COMMON = 16             # tokens that are worth a reading of their own


# --- what is asked for ----------------------------------------------------------------------------

@dataclass
class Settings:
    """How tokens are found. `steps` are intervals of the fixed solvers; 0 is the frozen model."""
    steps: int = 8
    solver: str = "euler"
    rtol: float = 1e-3                   # of dopri5, which chooses its own steps
    atol: float = 1e-3
    stop_unchanged: int | None = None    # evaluations for which a guess must stand to be final
    max_nfe: int | None = None           # in one token's ODE, both lines of guidance counted
    estimate: str = "argmax"             # of the clean point, see diffusion.VelocityField
    estimate_temperature: float | str = 1.0
    temperature: float = 0.0             # of the token itself; 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    max_new_tokens: int = 64
    trace: bool = False                  # keep what the first sequence's tokens were taken for
    score: bool = False                  # keep every token's log p under the frozen model

    def __post_init__(self):
        choices(self.solver, SOLVERS, "solver")
        choices(self.estimate, ESTIMATES, "estimate")
        # checked here, so that a script that skips the command line is refused too
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            # infinity itself is no number of anything
            if value is not None and not (low <= value <= high and value < math.inf):
                allowed = f"{low} or more" if high == math.inf else f"{low} to {high}"
                raise ValueError(f"{name} = {value} is out of range; allowed: {allowed}")
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature = {self.temperature} is out of range; "
                             f"allowed: 0 (greedy), or {COLDEST} or more")
        if self.solver in ADAPTIVE and self.estimate == "sample":
            raise ValueError(f"estimate = sample makes a random field, to which {self.solver} "
                             "cannot adapt; allowed: argmax, average, or a fixed solver")
        # negative weights push away from the class, which is allowed
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance = {self.guidance} is out of range; "
                             "allowed: any finite number")
        temperature = self.estimate_temperature
        if temperature != "1-t" and not COLDEST <= temperature < math.inf:
            raise ValueError(f"estimate_temperature = {temperature} is out of range; "
                             f"allowed: {COLDEST} or more, or 1-t (argmax is its limit at 0)")


RANGES = {
    "steps": (0, math.inf),
    "rtol": (1e-12, math.inf),
    "atol": (1e-12, math.inf),
    "stop_unchanged": (1, math.inf),
    "max_nfe": (1, math.inf),
    "temperature": (0, math.inf),
    "top_k": (1, math.inf),
    "top_p": (1e-6, 1),
    "max_new_tokens": (1, math.inf),
}


# --- the sampling loop ----------------------------------------------------------------------------

class Batch:
    """The sequences still being written: what was read of each, its generator, its class."""

    def __init__(self, model, prompts: list, seeds, class_ids):
        device = next(model.parameters()).device
        self.model = model
        self.numbers = list(range(len(prompts)))      # which prompt every row belongs to
        # on the CPU, whatever the device: a seed then means the same noise on every machine
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.class_ids = None
        if class_ids is not None:
            self.class_ids = torch.tensor(class_ids, device=device)
        self.cache = KVCache()
        ids, documents = left_pad(prompts, device)
        ids, documents = self.read_common(prompts, ids, documents)
        # the prompt's own next tokens are known: only the last place asks for one
        self.states = model.read(ids, documents, self.cache).last()

    def read_common(self, prompts: list, ids, documents) -> tuple:
        """Read what all prompts begin with, such as worked examples, once; returns what is left."""
        common = common_start(prompts)
        if len(prompts) == 1 or common < COMMON:
            return ids, documents
        start = torch.tensor([prompts[0][:common]], device=ids.device)
        self.model.read(start, None, self.cache)
        # where a prompt is shorter it begins further right, and has less of its start in the cache
        shifts = [ids.shape[1] - len(prompt) for prompt in prompts]
        if documents is None:
            self.cache.spread(shifts, None)
            return ids[:, common:], None
        self.cache.spread(shifts, documents[:, :common])
        return ids[:, common:], documents[:, common:]

    def keep(self, rows: list):
        """Go on with some rows only."""
        if len(rows) == len(self.numbers):
            return
        # finished sequences would only be computed in vain
        index = torch.tensor(rows, device=self.states.hidden.device)
        self.numbers = [self.numbers[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        if self.class_ids is not None:
            self.class_ids = self.class_ids[index]
        self.cache.keep(index)

    def read(self, tokens: list):
        """Read one more token of every row."""
        ids = torch.tensor(tokens, device=self.states.hidden.device)[:, None]
        # 1: padding, document 0, is on the left and must stay hidden
        documents = None if self.cache.documents is None else torch.ones_like(ids)
        self.states = self.model.read(ids, documents, self.cache)


@torch.no_grad()
def generate(model: L2D | LM, prompts: list, settings: Settings, stop: Stop | None = None,
             class_ids=None, seeds=None, on_token=None) -> list:
    """Continue every prompt, a list of token ids; returns one Answer each.

    class_ids, seeds: one integer per prompt. A seed fixes everything about its sequence, whatever
    else is in the batch, up to the rounding of batched matrix products. on_token(sequence number,
    token id) is called as tokens come. Raises ValueError for an empty prompt, for unknown classes,
    for steps > 0 with a model that has no diffusion path, for prompts and answers longer than the
    model's positions, or where the logits are not finite.
    """
    model = check_request(model, prompts, settings, class_ids)
    stop = stop or Stop()
    answers = [Answer() for _ in prompts]
    # 1. The frozen model reads the prompts, once.
    batch = Batch(model, prompts, seeds or range(len(prompts)), class_ids)
    for n in range(settings.max_new_tokens):
        # 2. Noise flows to the vector of the next token; a last look makes logits of it.
        trace = None
        if settings.trace and batch.numbers[0] == 0:
            trace = Trace()
            answers[0].traces.append(trace)
        logits, nfe, finished = next_logits(model, batch, settings, trace)
        check_logits(logits, batch, answers)
        # 3. The token is chosen from the logits, as from any language model's.
        tokens = choose(logits, settings, batch.generators).tolist()
        # 4. It is written down, and may be the last of its answer.
        going_on = []
        log_p = frozen_log_p(model, batch, settings, logits, tokens) if settings.score else []
        for row, number in enumerate(batch.numbers):
            answer = answers[number]
            answer.log_p += log_p[row:row + 1]
            answer.add(tokens[row], nfe[row], finished[row], stop)
            # the end of an answer is no part of it
            if on_token and tokens[row] not in stop.ids:
                on_token(number, tokens[row])
            if not answer.stopped:
                going_on.append(row)
        # the last token need not be read: nothing follows it
        if not going_on or n == settings.max_new_tokens - 1:
            break
        # 5. Finished answers leave the batch, and the frozen model reads the others' tokens.
        batch.keep(going_on)
        batch.read([tokens[row] for row in going_on])
    # at the end, since a character may be made of several tokens
    for answer in answers:
        answer.text = stop.text(answer.ids)
    return answers


def check_request(model, prompts, settings, class_ids):
    """The model that is needed: for no steps the frozen one, if it can do what is asked."""
    lm = model.lm if isinstance(model, L2D) else model
    if settings.steps and lm is model:
        raise ValueError("this model has no diffusion path, so --steps must be 0; "
                         "make one with train.py")
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty; give at least one token")
    check_lengths(lm, prompts, settings)
    if class_ids is not None and settings.steps:
        check_classes(torch.tensor(class_ids), model.config.classes)
    return model if settings.steps else lm


def check_lengths(lm, prompts: list, settings: Settings):
    """Compare the longest prompt and its answer with the model's positions, before any work."""
    longest = max(map(len, prompts))
    # the last token of an answer is not read
    end = longest + settings.max_new_tokens - 1
    room = lm.config.max_positions - longest + 1
    remedy = f"shorten the prompt of {longest}"
    if room > 0:
        remedy += f", or take --max_new_tokens {room} or less"
    check_length(lm.config, end, remedy)


def check_logits(logits, batch: Batch, answers: list):
    """Raise ValueError where there is nothing to choose from."""
    if logits.isfinite().all():
        return
    number = batch.numbers[0]
    raise ValueError(f"the logits of token {len(answers[number].nfe)} are not finite: are the "
                     "weights damaged, or --guidance too large?")


def next_logits(model, batch: Batch, settings: Settings, trace: Trace | None = None):
    """(logits (B, V), NFE, finished?) of every row's next token, the last two as lists."""
    rows = len(batch.numbers)
    # no path: what the frozen model says is its answer
    if not settings.steps:
        logits = model.logits(batch.states.hidden)
        return logits[:, 0].float(), [0] * rows, [True] * rows
    velocity = VelocityField(
        model, batch.states, settings.estimate, settings.estimate_temperature,
        batch.class_ids, settings.guidance, batch.generators)
    # drawn sequence by sequence, so that none depends on how many others there are
    shape = (1, model.config.width)
    noise = draw_noise_each(shape, batch.generators)
    # x_0 ~ N(0, σ²I)
    x_0 = model.config.sigma * noise.to(batch.states.hidden.device)    # (B, 1, Z) float32
    # the solver counts calls; a guided call evaluates the network twice
    budget = settings.max_nfe and max(1, settings.max_nfe // velocity.cost)
    solution = odeint(velocity, x_0, settings.solver, settings.steps,
                      settings.rtol, settings.atol, budget, settings.stop_unchanged, trace)
    logits = velocity.logits(solution.x, solution.prediction)
    if trace:
        trace.judge(float(solution.t[0]), int(solution.rejected[0]))
        # the last look costs an evaluation like any other, and is shown like any other
        trace(torch.arange(rows), 1.0, solution.x, logits)
    nfe = (solution.nfe + 1) * velocity.cost
    return logits[:, 0], nfe.tolist(), solution.finished.tolist()


@torch.no_grad()
def next_p(model, prompts: list, settings: Settings, seeds: list, draws: int) -> tuple:
    """(p (n, B, V) of the next token for every draw of the noise, the NFE of each prompt)."""
    model = model if settings.steps else getattr(model, "lm", model)
    batch = Batch(model, prompts, seeds, None)
    found, costs = [], []
    # without noise every draw is the same
    for _ in range(draws if settings.steps else 1):
        logits, nfe, _ = next_logits(model, batch, settings)
        found.append(logits.softmax(-1))
        costs.append(nfe)
    return torch.stack(found), [sum(cost) for cost in zip(*costs)]


def frozen_log_p(model, batch: Batch, settings: Settings, logits, tokens: list) -> list:
    """log p of every row's token under the frozen model, whatever way it was found."""
    # without steps its logits (B, V) are what the token was chosen from
    if settings.steps:
        logits = model.lm.logits(batch.states.hidden)[:, 0].float()
    index = torch.tensor(tokens, device=logits.device)[:, None]
    return logits.log_softmax(-1).gather(1, index)[:, 0].tolist()


def choose(logits, settings: Settings, generators):
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


def answer_problems(model, tokenizer, task, problems: list, settings: Settings, seed: int = 0,
                    batch_size: int = 128) -> list:
    """An answer to every problem of a task, graded: Answers whose `right` is set.

    Each problem has a noise of its own, whatever stands beside it.
    """
    stop = Stop.of(tokenizer)
    knows_classes = isinstance(model, L2D) and model.config.classes == len(task.classes)
    answers = []
    for at in range(0, len(problems), batch_size):
        batch = problems[at:at + batch_size]
        prompts = [task.prompt(problem, tokenizer) for problem in batch]
        # from the problem itself: neither its place nor its neighbours change its noise
        seeds = [zlib.crc32(task.key(problem).encode()) + seed for problem in batch]
        class_ids = None
        # a path made for other topics is asked without a class
        if knows_classes:
            class_ids = [task.class_id(problem) for problem in batch]
        answers += generate(model, prompts, settings, stop, class_ids, seeds)
    for problem, answer in zip(problems, answers):
        answer.right = task.grade(problem, answer.text, answer.stopped)
    return answers


def load_model(init_from: str, dtype: str | None = None, device: str | None = None,
               cache_dir: str | None = None, base: str | None = None, merge: bool = True):
    """(L2D or LM, tokenizer) from a name or directory, with its diffusion path where it holds one.

    base  where the path's frozen model is, if no longer where path.json says
    fold  add the LoRA into copies of the path's matrices
    """
    directory = resolve(init_from, cache_dir)
    dtype = dtype and getattr(torch, dtype)
    # a path's directory holds the path alone; path.json says beside which model it belongs
    if present(directory / "path.json"):
        meta = read_path(directory)
        check_trained(meta, directory)
        base = base or meta["base"]
        model = L2D.load(directory, LM.from_pretrained(base, dtype, device, cache_dir))
        model.merge_lora(merge)
        tokenizer = load_tokenizer(resolve(base, cache_dir), model.lm.config.vocab_size)
        check_tokenizer(meta, tokenizer, directory)
        return model, tokenizer
    if base:
        raise ValueError(f"--base would do nothing: {directory} holds no diffusion path")
    model = LM.from_pretrained(init_from, dtype, device, cache_dir)
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
    label = read_label(model, args.label)
    stop = Stop.of(tokenizer, args.stop)
    texts, prompts = read_asked(tokenizer, args)
    # all of them, and not batch by batch
    check_lengths(getattr(model, "lm", model), prompts, settings)
    # one answer alone is shown as it comes, unless its end may have to be taken back
    live = Live(texts[0], tokenizer) if len(prompts) == 1 and not stop.strings else None
    answers = []
    seconds = 0.0
    for at in range(0, len(prompts), args.batch_size):
        some = slice(at, at + args.batch_size)
        batch = prompts[some]
        # samples of one prompt have the seeds seed, seed + 1, ..., so each can be asked for again
        seeds = [args.seed + place % args.num_samples for place in range(len(prompts))[some]]
        labels = None if label is None else [label] * len(batch)
        start = time.time()
        new = generate(model, batch, settings, stop, labels, seeds, live)
        seconds += time.time() - start
        if live:
            live.end()
        frozen = frozen_answers(model, batch, settings, stop) if args.frozen else [None] * len(new)
        for place, (text, answer, before) in enumerate(zip(texts[some], new, frozen), at):
            if not live:
                print(f"{text!r}\n   answer  {answer.text}")
            show_answer(answer, before)
            if place == 0:
                show_trace(text, answer, tokenizer, args, given)
        answers += new
    return answers, seconds


def read_asked(tokenizer, args) -> tuple:
    """(texts, prompts): each as often as it is to be answered, and as token ids."""
    asked = read_prompts(args.prompt, args.prompt_file)
    if args.chat:
        note_style(tokenizer, args.chat)
    texts = [text for text in asked for _ in range(args.num_samples)]
    return texts, [encode_prompt(text, tokenizer, args.chat) for text in texts]


def read_label(model, name: str | None) -> int | None:
    """The number of a class. Raises ValueError for one that the model does not have."""
    if name is None:
        return None
    classes = model.config.classes if isinstance(model, L2D) else 0
    return TASKS["tiny"].class_number(name, classes)


def frozen_answers(model, prompts: list, settings: Settings, stop: Stop) -> list:
    """The frozen model's own best answers, whatever was asked of ours."""
    greedy = Settings(steps=0, max_new_tokens=settings.max_new_tokens)
    return generate(model, prompts, greedy, stop)


def show_answer(answer: Answer, frozen: Answer | None):
    """What an answer cost, and what the frozen model says."""
    cost = f"   NFE {sum(answer.nfe)} for {len(answer.nfe)} tokens"
    # a token whose ODE was cut short is another answer than was asked for: it must be seen
    if answer.unfinished:
        cost += f", {answer.unfinished} tokens stopped at max_nfe"
    print(cost)
    if frozen:
        print(f"   frozen  {frozen.text}")


def show_trace(text: str, answer: Answer, tokenizer, args, given: dict):
    """How an answer came about, as text and as a page."""
    if args.trace:
        print(trace_text(answer, tokenizer, args.trace_token))
    if args.html is not None:
        write_page(args, given, text, answer, tokenizer)
        print(f"   page    {args.html}")


# --- the command line -----------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    """See data/flags/sample.py."""
    return sample_flags(__doc__, Settings(), SOLVERS, ADAPTIVE, ESTIMATES)


def read_settings(args) -> Settings:
    known = vars(args)
    return Settings(**{f.name: known[f.name] for f in fields(Settings) if f.name in known})


@command("sample.py")
def main(argv=None):
    args = build_parser().parse_args(argv)
    settings = read_settings(args)
    given = given_flags(build_parser(), argv)
    check_flags(args, given, ADAPTIVE)
    if args.html is not None:
        check_absent(args.html, args.overwrite)
        check_writable(args.html)
    model, tokenizer = load_model(args.init_from, args.dtype, args.device, args.cache_dir,
                                  args.base, args.merge_lora)
    if args.prompt or args.prompt_file:
        answers, seconds = prompted_answers(model, tokenizer, settings, args, given)
    else:
        answers, seconds = worked_answers(model, tokenizer, settings, args.seed)
    tokens = sum(len(answer.nfe) for answer in answers)
    nfe = sum(sum(answer.nfe) for answer in answers)
    print(f"{tokens} tokens, {nfe} NFE ({nfe / tokens:.1f} per token), "
          f"{tokens / seconds:.0f} tokens/s, {settings.solver}, steps {settings.steps}")


if __name__ == "__main__":
    main()
