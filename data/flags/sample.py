"""The flags of sample.py, and which of them cannot act together: those are refused, not ignored."""

import argparse

from data.parts.draws import check_seed
from data.system.command import (
    add_estimate_flags, add_model_flags, check_range, flag_parser, refuse_idle)
from data.text.formats import RENDER


def sample_flags(description, default, solvers, adaptive, estimates) -> argparse.ArgumentParser:
    """default: the Settings of sample.py, one home for every default; the rest: names."""
    parser = flag_parser("sample.py", description)
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    # model and prompts
    add("--init_from", default="tiny",
        help="model name, or directory of a model or of a trained path (default: tiny)")
    add("--prompt", action="append", default=[],
        help="text to continue, `-` for standard input; may be repeated (default: test problems)")
    add("--prompt_file", help="file with one prompt a line")
    add("--chat", nargs="?", const="auto", choices=["auto", *RENDER],
        help="chat format of the prompts: the model's own, or one of " + ", ".join(RENDER))
    add("--talk", action="store_true", help="a conversation in the terminal (--chat alone, too)")
    add("--class", dest="label", help="class for guidance, by name or number")
    add("--stop", action="append", default=[],
        help="text that ends an answer and is left out of it; may be repeated")
    add("--num_samples", type=int, default=1, help="answers per prompt (default: 1)")
    add("--batch_size", type=int, default=32, help="sequences at a time (default: 32)")
    add("--frozen", action=switch, default=True, help="the frozen model's greedy answer too")
    add("--seed", type=int, default=0, help="seed of noise and samples (default: 0)")
    # how a token is found
    add("--steps", type=int, default=default.steps,
        help="intervals of a fixed solver; 0: the frozen model (default: %(default)s)")
    add("--solver", default=default.solver, choices=list(solvers),
        help=f"ODE solver; {', '.join(adaptive)} is adaptive (default: %(default)s)")
    add("--rtol", type=float, default=default.rtol,
        help="relative tolerance of dopri5 (default: %(default)s)")
    add("--atol", type=float, default=default.atol,
        help="absolute tolerance of dopri5 (default: %(default)s)")
    add("--stop_unchanged", type=int,
        help="evaluations in a row with the same prediction after which a token's ODE stops "
             "(default: never)")
    add("--max_nfe", type=int, help="most evaluations in one token's ODE (default: no limit)")
    add_estimate_flags(add, estimates)
    add("--temperature", type=float, default=default.temperature,
        help="temperature for choosing the token (0: greedy, the default)")
    add("--top_k", type=int, help="number of likeliest tokens to sample among")
    add("--top_p", type=float, help="probability that the likeliest tokens to sample among reach")
    add("--guidance", type=float, default=default.guidance,
        help="weight w of classifier-free guidance, paper Eq. 7; 1: conditional (default: 1)")
    add("--max_new_tokens", type=int, default=default.max_new_tokens,
        help="longest answer, in tokens (default: %(default)s)")
    # display and machine
    add("--trace", action=switch, default=False,
        help="NFE of every token and the predictions of one, of the first answer "
             "(without a prompt: of the hardest chain)")
    add("--trace_token", type=int, default=0, help="token whose predictions are shown (default: 0)")
    add("--html", nargs="?", const="trace.html",
        help="file for the trace as a page (without a name: trace.html)")
    add("--overwrite", action="store_true", help="replace the page of an earlier run")
    add_model_flags(add)
    return parser


def check_flags(args, given: dict, adaptive):
    """Refuse what would otherwise be ignored or fail later. Raises ValueError with one line."""
    check_range("--num_samples", args.num_samples, 1, 10**5)
    check_range("--batch_size", args.batch_size, 1)
    check_range("--trace_token", args.trace_token, 0)
    check_seed(args.seed)
    if args.prompt and args.prompt_file:
        raise ValueError("--prompt and --prompt_file were both given; allowed: one of them")
    prompted = bool(args.prompt or args.prompt_file)
    # --chat without a prompt is a conversation
    args.talk = args.talk or (args.chat is not None and not prompted)
    adapts = args.solver in adaptive
    random = args.steps > 0 or args.temperature > 0
    refuse_idle(given, [
        (("talk",), not prompted, "to ask for the prompts: no --prompt or --prompt_file"),
        (("class", "stop"), prompted or args.talk, "--prompt, --prompt_file or --talk"),
        (("num_samples", "batch_size", "frozen"), prompted, "--prompt or --prompt_file"),
        (("trace",), not args.talk, "a prompt; in a conversation: /trace FILE"),
        (("solver", "rtol", "atol", "max_nfe", "stop_unchanged", "estimate",
          "estimate_temperature", "guidance", "class", "trace", "merge_lora"), args.steps > 0,
         "a diffusion path, --steps of 1 or more"),
        (("steps",), args.steps == 0 or not adapts, "a fixed solver; dopri5 takes its own steps"),
        (("rtol", "atol"), adapts, "--solver dopri5"),
        (("estimate_temperature",), args.estimate != "argmax", "--estimate sample or average"),
        (("top_k", "top_p"), args.temperature > 0, "--temperature of more than 0"),
        (("num_samples",), random or args.num_samples == 1, "--temperature of more than 0"),
        (("seed",), random or not prompted, "--temperature of more than 0"),
        (("trace_token", "html"), args.trace, "--trace"),
        (("overwrite",), args.html is not None or args.talk, "--html or --talk"),
        (("guidance",), args.label is not None or args.guidance == 1, "a topic, --class"),
    ])
