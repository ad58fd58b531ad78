"""The flags of train.py, and presets: the values where its command line is silent.

A flag that is not given takes the value of the resumed run, else that of the preset. A flag that
would do nothing is refused, and one that cannot change in a resumed run.
"""

import argparse

from data.checkpoints.hub import check_not_a_model
from data.checkpoints.path import LARGEST, PARTS, STARTS, TIME_DISTRIBUTIONS
from data.checkpoints.state import read_state_meta
from data.parts.draws import check_seed
from data.system import processes
from data.system.command import check_range, flag_parser, flag_words, given_flags, refuse_idle

# --- presets: a flag always wins over them --------------------------------------------------------

# our own objective: at most `unroll` evaluations, the last `backprop` of them with a gradient
REFINEMENT = {"unroll": 12, "backprop": 3, "prediction_words": 32}
# the path of the paper, and the one from which a real model learns
PAPER = {"start": "paper", "new_lr": 1.0, "objective": "paper", "own_kv": False,
         "self_kv": False, "ema": 0.0, **REFINEMENT}
FROZEN = {**PAPER, "start": "frozen", "new_lr": 0.1, "own_kv": True}

# the embedded model is small and learns with large steps
EMBEDDED = {
    "width": 64, "cond_dim": 128, "batch_size": 64, "accumulate": 1,
    "lr": 2e-3, "min_lr": 0.0, "warmup": 50, "weight_decay": 0.01, "val_rows": 256,
}

TOPICS = {
    "width": 256, "cond_dim": 256, "updates": 1000, "batch_size": 16, "accumulate": 2,
    "min_lr": 0.0, "warmup": 50, "weight_decay": 0.01, "eval_every": 100, "val_rows": 64,
}
# the values of the paper, but for the rate
LONG = {
    "width": 256, "cond_dim": 256, "updates": 27_900, "batch_size": 4, "accumulate": 8,
    "min_lr": 1e-6, "warmup": 100, "weight_decay": 0.01, "eval_every": 500, "val_rows": 64,
}

PRESETS = {
    # the embedded model on the embedded topics, by our own objective
    "tiny": {
        **EMBEDDED, "updates": 2800, "eval_every": 700,
        **FROZEN, "objective": "refine", "ema": 0.98, "prediction_words": 0,
    },
    # the same by the paper's
    "tiny_paper": {**EMBEDDED, "updates": 2700, "eval_every": 450, **PAPER},
    # a base of our own, from random weights
    "scratch": {
        "width": 64, "cond_dim": 128, "updates": 3600, "batch_size": 32, "accumulate": 1,
        "lr": 3e-3, "min_lr": 0.0, "warmup": 100, "weight_decay": 0.1,
        "eval_every": 1000, "val_rows": 64, **PAPER,
    },
    # any other model on the embedded topics: short rows, soon learned
    "topics": {**TOPICS, "lr": 1e-3, **FROZEN},
    "topics_paper": {**TOPICS, "lr": 5e-4, **PAPER},
    # any model on data of one's own; the rate of the paper is for the paper's path
    "data": {**LONG, "lr": 1e-3, **FROZEN},
    "paper": {**LONG, "lr": 1e-4, **PAPER},
}


def fitting_preset(args) -> str:
    """The name of the preset for a method, model, data, objective and start."""
    # the embedded model learns with larger steps than any other should
    if args.init_from == "tiny":
        return "tiny_paper" if "paper" in (args.objective, args.start) else "tiny"
    if args.init_from == "scratch":
        return "scratch"
    # the rates of the frozen start are those of a path, and too high for a whole model
    paper = args.start == "paper" or args.method != "l2d"
    if args.data == "tiny":
        return "topics_paper" if paper else "topics"
    return "paper" if paper else "data"


# --- flags ----------------------------------------------------------------------------------------

# flags that a resumed run cannot change
OF_A_RUN = ("method", "preset", "width", "cond_dim", "rank", "full_copies", "time_distribution",
            "own_kv", "self_kv", "self_conditioning", "prediction_words", "start", "without",
            "new_lr", "objective", "seed")


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = flag_parser("train.py", description)
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    # what
    add("--method", default="l2d", choices=("l2d", "pretrain", "lora", "full"),
        help="weights to train (default: l2d)")
    add("--init_from", default="tiny",
        help="model name, directory, `scratch` or `resume` (default: tiny)")
    add("--data", default="tiny",
        help="`tiny` or a directory made by data/text/chat.py (default: tiny)")
    add("--out_dir", default="out", help="directory for everything that is written (default: out)")
    add("--overwrite", action=switch, default=False,
        help="remove the files of an earlier run in --out_dir")
    add("--cache_dir", help="directory of downloaded models")
    add("--preset", choices=list(PRESETS),
        help="set of all values without a default here (default: by model and data)")
    # diffusion path
    add("--width", type=int, help="Z, width of the diffusion space")
    add("--cond_dim", type=int, help="S, width of the time embedding")
    add("--rank", type=int, default=32,
        help="rank of the LoRA, in the path and in --method=lora (default: 32)")
    add("--full_copies", action=switch, default=False,
        help="full copies of the matrices in the path, instead of LoRA")
    add("--time_distribution", default="uniform", choices=TIME_DISTRIBUTIONS,
        help="distribution of the training times (default: uniform)")
    add("--own_kv", action=switch, help="own keys and values of the path")
    add("--self_kv", action=switch,
        help="key and value of the own place from the path, anew at every evaluation")
    add("--self_conditioning", action=switch,
        help="the path reads its own previous prediction (default: with our own objective)")
    add("--prediction_words", type=int,
        help="likeliest words of its prediction that the path reads; 0: all (default: 32, of the "
             "embedded model all)")
    add("--start", choices=STARTS,
        help="what the path computes at first: nothing (paper), or what the frozen model does")
    add("--without", choices=PARTS, help="part of --start=frozen to leave out, for an ablation")
    # objective
    add("--objective", choices=("paper", "refine", "both"),
        help="paper: random times; refine: the path's own steps; both: by turns")
    add("--unroll", type=int, help="most evaluations in a refined update")
    add("--backprop", type=int, help="number of evaluations, the last ones, with a gradient")
    add("--ema", type=float,
        help="decay of the average of the weights that is saved; 0: the last weights")
    # optimisation
    add("--updates", type=int, help="optimizer updates in all")
    add("--batch_size", type=int, help="rows per forward pass")
    add("--accumulate", type=int, help="forward passes per update")
    add("--lr", type=float, help="highest learning rate")
    add("--new_lr", type=float,
        help="share of --lr for the path's layers that stand on no frozen matrix; below 1 they are "
             "clipped on their own")
    add("--min_lr", type=float, help="last learning rate")
    add("--warmup", type=int, help="updates of linear warm-up, before the linear decay")
    add("--weight_decay", type=float, help="weight decay of matrices")
    add("--clip", type=float, default=1.0,
        help="largest norm of the gradient; 0: any (default: 1)")
    add("--seed", type=int, default=42,
        help="seed of weights, data order, times and noise (default: 42)")
    # reports
    add("--eval_every", type=int, help="updates between validation and saving")
    add("--val_rows", type=int, help="rows of validation data")
    add("--patience", type=int, default=0,
        help="validations without a better loss after which to stop; 0: never (default)")
    add("--keep", type=int, default=0,
        help="number of best paths to keep, in --out_dir/best-UPDATE (default: 0)")
    add("--report", type=int, default=64,
        help="problems of each kind to answer at the end (default: 64)")
    # machine
    add("--plan", action=switch, default=False,
        help="parameters, memory and time of the training, without it")
    add("--device", help="cuda, mps or cpu (default: the best available)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="precision of the frozen weights (default: bfloat16 on CUDA)")
    add("--shard", action=switch, default=False,
        help="weights divided among the processes of torchrun, for models larger than one card")
    add("--cache_frozen", action=switch, default=False,
        help="cache of the frozen model's states in --out_dir, for several epochs")
    add("--checkpointing", action=switch, default=False,
        help="activations computed again in the backward pass: less memory, more time")
    add("--compile", action=switch, default=False,
        help="torch.compile of the objective: the paper's is one graph, ours breaks into a few")
    return parser


def parse(argv=None, description: str | None = None) -> argparse.Namespace:
    """Flags over the checkpoint's (where resuming) over the preset's. Raises ValueError."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    given = given_flags(build_parser(), argv)
    # a resumed run has the flags it was started with, except those given anew: the command line
    # is parsed once for the directory of the state, and again over the saved flags
    resume = args.init_from == "resume"
    if resume:
        meta = read_state_meta(args.out_dir)
        saved = meta["args"]
        check_saved(saved, args.out_dir)
        for name in OF_A_RUN:
            if name in given and given[name] != saved.get(name):
                raise ValueError(f"--{name} {given[name]} cannot be changed in a run that goes on "
                                 f"(it has {saved.get(name)}); start anew with another --out_dir")
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        args.init_from = saved["init_from"]
        if args.updates is not None and args.updates < meta["update"]:
            raise ValueError(f"--updates {args.updates} are fewer than the {meta['update']} that "
                             f"the run in {args.out_dir} has made; allowed: as many or more")
    args.resume = resume
    # what the untrained path has shown
    args.asked_again = meta["asked_again"] if resume else None
    args.preset = args.preset or fitting_preset(args)
    for name, value in PRESETS[args.preset].items():
        # None: not chosen; 0 is a choice
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.self_conditioning is None:
        args.self_conditioning = args.objective != "paper"
    check(args, given)
    return args


def check_saved(saved: dict, out_dir):
    """Raise ValueError unless a command line could have given the flags of a state."""
    words = [word for name, value in saved.items() if value is not None
             for word in flag_words(name, value)]
    parser = build_parser()
    parser.exit_on_error = False
    try:
        args, unknown = parser.parse_known_args(words)
        read = vars(args)
        wrong = [name for name, value in saved.items() if read.get(name) != value] + unknown
    except (argparse.ArgumentError, SystemExit) as error:
        wrong = [str(error)]
    # every preset sets these
    wrong += [name for name in PRESETS["paper"] if saved.get(name) is None]
    if wrong:
        raise ValueError(f"{out_dir}/state.safetensors was not written by this version "
                         f"({wrong[0]}); start anew with another --out_dir")


def check(args, given: dict):
    """Refuse what cannot work or would be ignored. Raises ValueError with one line."""
    at_least = {
        1: ("width", "cond_dim", "rank", "batch_size", "accumulate", "eval_every", "val_rows",
            "unroll", "backprop"),
        0: ("updates", "lr", "min_lr", "warmup", "weight_decay", "report", "clip", "ema",
            "patience", "keep", "prediction_words"),
    }
    for least, names in at_least.items():
        for name in names:
            check_range(f"--{name}", getattr(args, name), least)
    # more is a mistake, which would take all memory or never end
    at_most = {
        1000: ("unroll", "backprop"),
        LARGEST: ("width", "cond_dim", "rank", "report", "prediction_words"),
        10**9: ("updates", "warmup", "eval_every", "val_rows", "patience", "keep"),
    }
    for most, names in at_most.items():
        for name in names:
            check_range(f"--{name}", getattr(args, name), 0, most)
    rows = args.batch_size * args.accumulate
    check_range("--batch_size times --accumulate", rows, 1, LARGEST)
    check_range("--new_lr", args.new_lr, 0, 1)
    if 0 < args.clip < 1e-6:
        raise ValueError(f"--clip = {args.clip} would leave nothing of the gradient; "
                         "allowed: 0 (any norm), or 1e-6 or more")
    if not args.ema < 1:
        raise ValueError(f"--ema = {args.ema} is out of range; allowed: 0 to 1, without 1")
    if args.cache_frozen and args.shard:
        raise ValueError("--cache_frozen and --shard exclude each other: one process computes the "
                         "states and needs the whole model for it; drop one of them")
    check_seed(args.seed)
    check_not_a_model(args.out_dir)
    if args.init_from == "scratch" and args.method != "pretrain":
        raise ValueError(f"--method {args.method} needs a pretrained model; "
                         "allowed with --init_from=scratch: pretrain")
    l2d = args.method == "l2d"
    # --report 0 is allowed everywhere: it asks for no report
    given = {name for name, value in given.items() if (name, value) != ("report", 0)}
    refuse_idle(given, [
        (("width", "cond_dim", "full_copies", "time_distribution", "own_kv", "self_kv",
          "self_conditioning", "prediction_words", "start", "without", "new_lr", "objective",
          "unroll", "backprop", "keep"), l2d, "--method=l2d"),
        (("prediction_words",), args.self_conditioning, "--self_conditioning"),
        (("self_conditioning",), args.objective == "paper" or args.self_conditioning,
         "--objective=paper: our own has it always"),
        (("dtype",), args.method in ("l2d", "lora"), "--method=l2d or lora"),
        (("without",), args.start == "frozen", "--start=frozen"),
        (("rank",), args.method == "lora" or (l2d and not args.full_copies),
         "--method=lora, or l2d without --full_copies"),
        (("unroll", "backprop"), args.objective != "paper", "--objective=refine or both"),
        (("time_distribution",), args.objective != "refine", "--objective=paper or both"),
        (("report",), l2d and args.data == "tiny", "--method=l2d and --data=tiny"),
        (("cache_frozen",), l2d and args.data != "tiny", "--method=l2d and --data=DIR"),
        (("shard",), processes.count() > 1, "several processes (torchrun)"),
        (("overwrite",), not args.resume, "a new run"),
    ])
