"""The flags of sample.py, and which of them cannot act together: those are refused, not ignored."""

import argparse

from data.parts.draws import check_seed
from data.system.command import add_model_flags, flag_parser, refuse_idle
from data.text.formats import RENDER


def sample_flags(description, default, solvers, adaptive, estimates) -> argparse.ArgumentParser:
    """default: the Settings of sample.py, one home for every default; the rest: names."""
    parser = flag_parser("sample.py", description)
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    # model and prompts
    add("--init_from", default="tiny",
        help="model name, or directory of a model or of a trained path (default: tiny)")
    add("--base", help="the frozen model, if it is no longer where the path was trained")
    add("--prompt", action="append", default=[],
        help="text to continue, `-` for standard input; may be repeated (default: test problems)")
    add("--prompt_file", help="file with one prompt a line")
    add("--chat", nargs="?", const="auto", choices=["auto", *RENDER],
        help="ask in the model's own chat format, or in another: " + ", ".join(RENDER))
    add("--class", dest="label", help="class for guidance, by name or number")
    add("--stop", action="append", default=[],
        help="further text that ends an answer and is left out of it; may be repeated")
    add("--num_samples", type=int, default=1, help="answers per prompt (default: 1)")
    add("--batch_size", type=int, default=32, help="sequences at a time (default: 32)")
    add("--frozen", action=switch, default=True, help="show the frozen model's greedy answer too")
    add("--seed", type=int, default=0, help="of noise and samples (default: 0)")
    # how a token is found
    add("--steps", type=int, default=default.steps,
        help="intervals of a fixed solver; 0: the frozen model (default: %(default)s)")
    add("--solver", default=default.solver, choices=list(solvers),
        help=f"{', '.join(adaptive)} is adaptive (default: %(default)s)")
    add("--rtol", type=float, default=default.rtol,
        help="relative tolerance of dopri5 (default: %(default)s)")
    add("--atol", type=float, default=default.atol,
        help="absolute tolerance of dopri5 (default: %(default)s)")
    add("--stop_unchanged", type=int,
        help="a guess that has stood for so many evaluations is final (default: never)")
    add("--max_nfe", type=int, help="most evaluations in one token's ODE (default: no limit)")
    add("--estimate", default=default.estimate, choices=estimates,
        help="of the clean point (default: %(default)s)")
    add("--estimate_temperature", default=1.0, type=estimate_temperature,
        help="a number or 1-t (default: 1)")
    add("--temperature", type=float, default=default.temperature,
        help="of the token; 0 is greedy (default: 0)")
    add("--top_k", type=int, help="sample among the k likeliest tokens")
    add("--top_p", type=float, help="sample among the likeliest that reach this probability")
    add("--guidance", type=float, default=default.guidance,
        help="w of paper Eq. 7; 1 is conditional (default: 1)")
    add("--max_new_tokens", type=int, default=default.max_new_tokens,
        help="longest answer, in tokens (default: %(default)s)")
    # display and machine
    add("--trace", action=switch, default=False,
        help="show the NFE of every token and the guesses of one")
    add("--trace_token", type=int, default=0, help="which token's guesses to show (default: 0)")
    add("--html", help="write the trace of the first answer as a page, such as trace.html")
    add("--overwrite", action="store_true", help="replace the page of an earlier run")
    add_model_flags(add)
    return parser


def estimate_temperature(text: str):
    """A number or 1-t."""
    if text == "1-t":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 1-t") from None


def check_flags(args, given: dict, adaptive):
    """Refuse what would otherwise be ignored or fail later. Raises ValueError with one line."""
    for name in ("num_samples", "batch_size"):
        value = getattr(args, name)
        if value < 1:
            raise ValueError(f"--{name} {value} is out of range; allowed: 1 or more")
    check_seed(args.seed)
    if args.prompt and args.prompt_file:
        raise ValueError("--prompt and --prompt_file were both given; allowed: one of them")
    prompted = bool(args.prompt or args.prompt_file)
    adapts = args.solver in adaptive
    # the dest of --class
    given = {"class" if name == "label" else name for name in given}
    random = args.steps > 0 or args.temperature > 0
    refuse_idle(given, [
        (("chat", "class", "stop", "num_samples", "batch_size", "frozen", "html", "trace"),
         prompted, "--prompt or --prompt_file"),
        (("solver", "rtol", "atol", "max_nfe", "stop_unchanged", "estimate",
          "estimate_temperature", "guidance", "class", "trace"), args.steps > 0,
         "a diffusion path, --steps of 1 or more"),
        (("steps",), args.steps == 0 or not adapts, "a fixed solver; dopri5 takes its own steps"),
        (("rtol", "atol"), adapts, "--solver dopri5"),
        (("estimate_temperature",), args.estimate != "argmax", "--estimate sample or average"),
        (("top_k", "top_p"), args.temperature > 0, "--temperature of more than 0"),
        (("num_samples",), random or args.num_samples == 1, "--temperature of more than 0"),
        (("trace_token", "html"), args.trace, "--trace"),
        (("overwrite",), args.html is not None, "--html"),
        (("guidance",), args.label is not None or args.guidance == 1, "a topic, --class"),
    ])
