"""From a prompt to text: for every token an ODE from noise to a token, or the frozen model alone with `--steps 0`.

    python sample.py --steps 8 --solver euler                     worked answers of the embedded model
    python sample.py --solver dopri5 --trace --prompt "(7*8)+15?"  what each token cost, and how one of them was found
    python sample.py --init_from=out --class sort --guidance 2 --prompt "gcab?"

`generate` is the sampling loop (paper Algorithm 1): the main path runs once per token, the diffusion path once per
evaluation. Time runs from noise (t = 0) to data (t = 1). Read diffusion.py before and eval.py next.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.hub import resolve
from data.tokenizer import load_tokenizer
from diffusion import ESTIMATES, L2D, Flow, draw, read_path_json
from model import LM, choices
from solvers import SOLVERS, odeint


@dataclass
class Settings:
    """How tokens are found. `steps` counts intervals of the fixed solvers, 0 is the frozen model; dopri5 goes by rtol, atol."""
    steps: int = 8
    solver: str = "euler"
    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int | None = None           # evaluations in one token's ODE, both networks of guidance counted
    estimate: str = "argmax"             # of the clean point, see diffusion.Flow
    estimate_temperature: float | str = 1.0
    temperature: float = 0.0             # of the token itself; 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    max_new_tokens: int = 64
    trace_token: int | None = None       # keep the guess at every evaluation of this token (of the first sequence)

    def __post_init__(self):
        choices(self.solver, SOLVERS, "solver")
        choices(self.estimate, ESTIMATES, "estimate")
        ranges = (("steps", 0, None), ("rtol", 1e-12, None), ("atol", 1e-12, None), ("max_nfe", 1, None), ("temperature", 0, None),
                  ("top_k", 1, None), ("top_p", 1e-6, 1), ("max_new_tokens", 1, None), ("trace_token", 0, None))
        for name, low, high in ranges:
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                raise ValueError(f"{name} = {value} is out of range; allowed: {low} {'or more' if high is None else f'to {high}'}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance = {self.guidance} is out of range; allowed: any finite number")
        if self.estimate_temperature != "1-t" and not self.estimate_temperature > 0:
            raise ValueError(f"estimate_temperature = {self.estimate_temperature} is out of range; allowed: more than 0, or 1-t")


@dataclass
class Answer:
    """ids: the new tokens, stop token left out; nfe: network evaluations of the path, one number per token drawn."""
    ids: list = field(default_factory=list)
    nfe: list = field(default_factory=list)
    stopped: bool = False                # a stop token came before max_new_tokens
    unfinished: int = 0                  # tokens whose ODE ran out of max_nfe
    guesses: list = field(default_factory=list)   # of the traced token: (t, token id, probability)


def left_pad(prompts, device):
    """Prompts of different lengths -> ids and segments (B, T), right-aligned; segments None where there is no padding."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=device)
    segments = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, None if segments.all() else segments


def choose(logits, settings: Settings, generators):
    """Token ids (B,) from logits (B, V): greedy, or a sample at `temperature` within top_k and top_p."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    p = (logits / settings.temperature).softmax(-1)
    ordered, order = p.sort(descending=True, stable=True)
    if settings.top_k is not None:
        ordered[:, settings.top_k:] = 0
    if settings.top_p is not None:       # the fewest tokens that together reach top_p, always at least one
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= settings.top_p, 0)
    places = draw(ordered[:, None], generators)                         # (B, 1)
    return order.gather(1, places)[:, 0]


def next_logits(flow: Flow, settings: Settings, generators):
    """Logits (B, V) of the next token: integrate its vector from noise, then look once more at t = 1."""
    l2d = flow.l2d
    noise = torch.stack([torch.randn(1, l2d.config.width, generator=g) for g in generators])
    x_0 = l2d.config.sigma * noise.to(flow.context.hidden.device)       # (B, 1, Z) float32
    budget = settings.max_nfe and max(1, settings.max_nfe // flow.cost)
    solution = odeint(flow, x_0, settings.solver, max(1, settings.steps), settings.rtol, settings.atol, budget)
    return flow.logits(solution.x)[:, 0], (solution.nfe + 1) * flow.cost, solution.finished


@torch.no_grad()
def generate(model: L2D | LM, prompts: list, settings: Settings, stop_ids=(), class_ids=None, seeds=None, on_token=None) -> list:
    """Continue every prompt (a list of token ids) until a stop token; returns one Answer each.

    class_ids, seeds: one integer per prompt. A seed fixes everything about its sequence, whatever else is in the batch, up to
    the rounding of batched matrix products. on_token(sequence number, token id) is called as tokens come.
    Raises ValueError for an empty prompt, or steps > 0 with a model that has no diffusion path.
    """
    lm = model.lm if isinstance(model, L2D) else model
    if settings.steps and lm is model:
        raise ValueError("this model has no diffusion path, so --steps must be 0; make one with train.py")
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty; give at least one token")
    device = next(lm.parameters()).device
    answers, alive = [Answer() for _ in prompts], list(range(len(prompts)))
    generators = [torch.Generator().manual_seed(seed) for seed in (seeds or alive)]
    if class_ids is not None:
        class_ids = torch.tensor(class_ids, device=device)
        if settings.steps:
            model.check_classes(class_ids)
    ids, segments = left_pad(prompts, device)
    context, flow = lm.context(ids, segments).last(), None
    for n in range(settings.max_new_tokens):
        if not settings.steps:
            logits, nfe, finished = lm.logits(context.hidden)[:, 0].float(), [0] * len(alive), [True] * len(alive)
        else:
            flow = flow or Flow(model, context, settings.estimate, settings.estimate_temperature, class_ids, settings.guidance)
            flow.set_context(context, class_ids, generators)
            flow.watch = answers[0].guesses if n == settings.trace_token and alive[0] == 0 else None
            logits, nfe, finished = next_logits(flow, settings, generators)
            nfe, finished = nfe.tolist(), finished.tolist()
        tokens = choose(logits, settings, generators).tolist()
        for sequence, token, cost, done in zip(alive, tokens, nfe, finished):
            answer = answers[sequence]
            answer.nfe.append(cost)
            answer.unfinished += not done
            answer.stopped = token in stop_ids
            if not answer.stopped:
                answer.ids.append(token)
                if on_token:
                    on_token(sequence, token)
        keep = [i for i, sequence in enumerate(alive) if not answers[sequence].stopped]
        if not keep or n == settings.max_new_tokens - 1:
            break
        if len(keep) < len(alive):       # finished sequences leave the batch
            alive, generators = [alive[i] for i in keep], [generators[i] for i in keep]
            index = torch.tensor(keep, device=device)
            context, class_ids = context.rows(index), None if class_ids is None else class_ids[index]
        step = torch.tensor([[tokens[i]] for i in keep], device=device)
        context = lm.context(step, None if context.segments is None else torch.ones_like(step), context)
    return answers


def load_model(init_from: str, dtype: str | None = None, device: str | None = None, cache_dir: str | None = None,
               base: str | None = None):
    """(L2D or LM, tokenizer) from a name or directory: with its diffusion path where the directory holds one.

    base: where the path's frozen model is, if no longer where path.json says.
    """
    directory, dtype = resolve(init_from, cache_dir), dtype and getattr(torch, dtype)
    if (directory / "path.json").exists():
        base = base or read_path_json(directory)["base"]
        model = L2D.load(directory, LM.from_pretrained(base, dtype, device, cache_dir))
        directory = resolve(base, cache_dir)
    else:
        model = LM.from_pretrained(init_from, dtype, device, cache_dir)
    lm = model.lm if isinstance(model, L2D) else model
    return model, load_tokenizer(directory, lm.config.vocab_size)


# --- what is printed --------------------------------------------------------------------------------------------------

def class_id(name: str | None, model) -> int | None:
    """A class by number, or by name for paths trained on the embedded topics."""
    if name is None:
        return None
    from data.tiny.topics import CLASSES
    count = model.config.classes if isinstance(model, L2D) else 0
    allowed = [*CLASSES, *map(str, range(count))] if count == len(CLASSES) else [*map(str, range(count))]
    if not count:
        raise ValueError(f"--class {name}: this model has no classes; allowed: no --class")
    choices(name, allowed, "--class")
    return CLASSES.index(name) if name in CLASSES else int(name)


def coloured(pieces, costs) -> str:
    """Tokens on a background from blue (cheap) to red (dear), or with their NFE behind them where there are no colours."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return " ".join(f"{piece!r}:{cost}" for piece, cost in zip(pieces, costs))
    low, high = min(costs), max(costs)
    shades = (27, 33, 39, 49, 82, 190, 220, 208, 196)
    shade = lambda cost: shades[(len(shades) - 1) * (cost - low) // max(1, high - low)]
    text = "".join(f"\033[48;5;{shade(cost)}m\033[38;5;16m{piece}\033[0m" for piece, cost in zip(pieces, costs))
    return f"{text}   NFE from {low} (blue) to {high} (red)"


def show_trace(answer: Answer, tokenizer, token: int):
    """The NFE of every token, and the guesses that led to one of them."""
    pieces = [tokenizer.decode([i]) for i in answer.ids] + ["<stop>"] * answer.stopped
    print("   tokens:", coloured(pieces, answer.nfe))
    if token >= len(answer.nfe):
        raise ValueError(f"--trace_token {token} is out of range; this answer has {len(answer.nfe)} tokens, "
                         f"allowed: 0 to {len(answer.nfe) - 1}")
    print(f"   token {token} ({pieces[token]!r}), guess at every evaluation:")
    for t, guess, p in answer.guesses:
        print(f"     t = {t:.4f}  {tokenizer.decode([guess])!r:8} p = {p:.3f}")


def worked_answers(model, tokenizer, settings: Settings, seed: int):
    """One test problem of every topic and level, answered greedily by the frozen model and as `settings` say."""
    from data.tiny.topics import LEVELS, make_problem
    from eval import answer_problems
    problems = [make_problem("test", seed, topic=topic, level=level) for topic, levels in LEVELS.items() for level in levels]
    frozen = answer_problems(model, tokenizer, problems, Settings(steps=0))
    start = time.time()
    ours = answer_problems(model, tokenizer, problems, settings) if settings.steps else frozen
    seconds = time.time() - start
    mark = lambda answered: "right" if answered.right else "wrong"
    for problem, before, after in zip(problems, frozen, ours):
        hint = f"   [class {problem.label}]" * (problem.topic == "strings")
        print(f"{problem.topic}, level {problem.level}: {problem.prompt}{hint}")
        print(f"   frozen  {mark(before)}  {before.text!r}")
        print(f"   L2D     {mark(after)}  {after.text!r}   NFE {sum(after.nfe)}")
    return sum(len(answered.nfe) for answered in ours), sum(sum(answered.nfe) for answered in ours), seconds


def read_prompts(args) -> list:
    """Prompts from --prompt, --prompt_file (one a line), or standard input (`--prompt -`)."""
    if args.prompt_file:
        lines = Path(args.prompt_file).read_text(encoding="utf-8").splitlines()
        if not any(line.strip() for line in lines):
            raise ValueError(f"--prompt_file {args.prompt_file} has no prompt; allowed: one prompt a line")
        return [line for line in lines if line.strip()]
    return [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in args.prompt or []]


def encode_prompt(text: str, tokenizer, chat: bool) -> list:
    if chat:
        from data.chat import encode_chat
        return encode_chat([{"role": "user", "content": text}], tokenizer)
    return tokenizer.encode_start(text)


def answer_prompts(model, tokenizer, settings: Settings, args):
    """Print the frozen model's greedy answer and num_samples answers of our own for every prompt."""
    stop_ids = tokenizer.stop_ids | {stop_id(text, tokenizer) for text in args.stop}
    label, tokens, nfe, seconds = class_id(args.label, model), 0, 0, 0.0
    texts = [text for text in read_prompts(args) for _ in range(args.num_samples)]
    prompts = [encode_prompt(text, tokenizer, args.chat) for text in texts]
    for at in range(0, len(prompts), args.batch_size):
        batch = prompts[at:at + args.batch_size]
        seeds = [args.seed + (at + i) % args.num_samples for i in range(len(batch))]
        greedy = Settings(steps=0, max_new_tokens=settings.max_new_tokens)
        frozen = generate(model, batch, greedy, stop_ids) if args.frozen else None
        start, stream = time.time(), tokenizer.stream()
        alone = len(prompts) == 1
        if alone:
            print(f"{texts[0]!r}\n   answer  ", end="")
        show = (lambda _, token: print(stream(token), end="", flush=True)) if alone else None
        answers = generate(model, batch, settings, stop_ids, None if label is None else [label] * len(batch), seeds, show)
        seconds += time.time() - start
        if alone:
            print(stream.flush())
        for i, answer in enumerate(answers):
            if not alone:
                print(f"{texts[at + i]!r}\n   answer  {tokenizer.decode(answer.ids)}")
            short = f", {answer.unfinished} tokens stopped at max_nfe" * bool(answer.unfinished)
            print(f"   NFE {sum(answer.nfe)} for {len(answer.nfe)} tokens{short}")
            if frozen:
                print(f"   frozen  {tokenizer.decode(frozen[i].ids)}")
            if args.trace and at + i == 0:
                show_trace(answer, tokenizer, args.trace_token)
        tokens, nfe = tokens + sum(len(a.nfe) for a in answers), nfe + sum(sum(a.nfe) for a in answers)
    return tokens, nfe, seconds


def stop_id(text: str, tokenizer) -> int:
    ids = tokenizer.encode(text, special=True)
    if len(ids) != 1:
        raise ValueError(f"--stop {text!r} is {len(ids)} tokens; allowed: texts that are one token")
    return ids[0]


def build_parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # model and prompts
    add("--init_from", default="tiny", help="model name, or directory of a model or of a trained path (default: tiny)")
    add("--base", help="the frozen model, if it is no longer where the path was trained")
    add("--prompt", action="append", help="text to continue, `-` for standard input; may be repeated (default: test problems)")
    add("--prompt_file", help="file with one prompt a line")
    add("--chat", action=argparse.BooleanOptionalAction, default=False, help="put the prompt in the model's chat format")
    add("--class", dest="label", help="class for guidance, by name or number")
    add("--stop", action="append", default=[], help="further text, one token long, that ends an answer")
    add("--num_samples", type=int, default=1, help="answers per prompt (default: 1)")
    add("--batch_size", type=int, default=32, help="sequences at a time (default: 32)")
    add("--frozen", action=argparse.BooleanOptionalAction, default=True, help="show the frozen model's greedy answer too")
    add("--seed", type=int, default=0, help="of noise and samples (default: 0)")
    # how a token is found
    add("--steps", type=int, default=default.steps, help="intervals of a fixed solver; 0: the frozen model (default: %(default)s)")
    add("--solver", default=default.solver, choices=SOLVERS, help="dopri5 is adaptive (default: %(default)s)")
    add("--rtol", type=float, default=default.rtol, help="relative tolerance of dopri5 (default: %(default)s)")
    add("--atol", type=float, default=default.atol, help="absolute tolerance of dopri5 (default: %(default)s)")
    add("--max_nfe", type=int, help="most evaluations in one token's ODE (default: no limit)")
    add("--estimate", default=default.estimate, choices=ESTIMATES, help="of the clean point (default: %(default)s)")
    add("--estimate_temperature", default=1.0, type=estimate_temperature, help="a number or 1-t (default: 1)")
    add("--temperature", type=float, default=default.temperature, help="of the token; 0 is greedy (default: 0)")
    add("--top_k", type=int, help="sample among the k likeliest tokens")
    add("--top_p", type=float, help="sample among the likeliest tokens that reach this probability")
    add("--guidance", type=float, default=default.guidance, help="w of paper Eq. 7; 1 is conditional (default: 1)")
    add("--max_new_tokens", type=int, default=default.max_new_tokens, help="longest answer, in tokens (default: %(default)s)")
    # display and machine
    add("--trace", action=argparse.BooleanOptionalAction, default=False, help="show the NFE of every token and the guesses of one")
    add("--trace_token", type=int, default=0, help="which token's guesses to show (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen weights")
    add("--cache_dir", help="where downloaded models are kept")
    return parser


def check(args):
    """Refuse what would otherwise be ignored or fail later. Raises ValueError with one line."""
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is out of range; allowed: 1 or more")
    if not 0 <= args.seed < 1 << 32:
        raise ValueError(f"--seed {args.seed} is out of range; allowed: 0 to {(1 << 32) - 1}")
    prompted = args.prompt or args.prompt_file
    if not prompted and (args.label or args.trace or args.num_samples > 1):
        raise ValueError("--class, --trace and --num_samples go with a prompt; add --prompt or --prompt_file")
    if prompted and args.guidance != 1 and args.label is None:
        raise ValueError(f"--guidance {args.guidance:g} has nothing to push towards; add --class")


def estimate_temperature(text: str):
    """A number or 1-t."""
    try:
        return text if text == "1-t" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 1-t") from None


def main(argv=None):
    try:
        args = build_parser().parse_args(argv)
        check(args)
        names = set(Settings.__dataclass_fields__)
        settings = Settings(**{name: value for name, value in vars(args).items() if name in names})
        settings.trace_token = args.trace_token if args.trace else None
        model, tokenizer = load_model(args.init_from, args.dtype, args.device, args.cache_dir, args.base)
        if args.prompt or args.prompt_file:
            tokens, nfe, seconds = answer_prompts(model, tokenizer, settings, args)
        else:
            tokens, nfe, seconds = worked_answers(model, tokenizer, settings, args.seed)
        print(f"{tokens} tokens, {nfe} NFE ({nfe / tokens:.1f} per token), {tokens / seconds:.0f} tokens/s, "
              f"{settings.solver}, steps {settings.steps}")
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
