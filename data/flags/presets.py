"""What train.py does where the command line is silent: a set of values for each kind of training.

A flag always wins over them. train.py reads them; read that next.
"""

OBJECTIVES = ("paper", "refine", "both")

# refinement goes through at most `unroll` evaluations, the last `backprop` of them with a gradient
REFINEMENT = {"unroll": 12, "backprop": 3}
# the path of the paper, and nothing beside it
PAPER = {"objective": "paper", "own_reading": False, "ema": 0.0, **REFINEMENT}

# the embedded model is small and learns with large steps
EMBEDDED = {
    "width": 64, "cond_dim": 128, "batch_size": 64, "accumulate": 1,
    "lr": 2e-3, "min_lr": 0.0, "warmup": 50, "weight_decay": 0.01, "val_rows": 256,
}

PRESETS = {
    # the embedded model on the embedded topics, by our own objective
    "tiny": {
        **EMBEDDED, "updates": 1900, "eval_every": 475,
        "objective": "refine", "own_reading": True, "ema": 0.98, **REFINEMENT,
    },
    # the same by the paper's
    "tiny_paper": {**EMBEDDED, "updates": 2700, "eval_every": 450, **PAPER},
    # a base of our own from nothing
    "scratch": {
        "width": 64, "cond_dim": 128, "updates": 3600, "batch_size": 32, "accumulate": 1,
        "lr": 3e-3, "min_lr": 0.0, "warmup": 100, "weight_decay": 0.1,
        "eval_every": 1000, "val_rows": 64, **PAPER,
    },
    # any other model on the embedded topics: short rows, soon learned
    "topics": {
        "width": 256, "cond_dim": 256, "updates": 1000, "batch_size": 16, "accumulate": 2,
        "lr": 5e-4, "min_lr": 0.0, "warmup": 50, "weight_decay": 0.01,
        "eval_every": 100, "val_rows": 64, **PAPER,
    },
    # any model on data of one's own: the values of the paper
    "paper": {
        "width": 256, "cond_dim": 256, "updates": 27_900, "batch_size": 4, "accumulate": 8,
        "lr": 1e-4, "min_lr": 1e-6, "warmup": 100, "weight_decay": 0.01,
        "eval_every": 500, "val_rows": 64, **PAPER,
    },
}


def fitting_preset(init_from: str, data: str, objective: str | None) -> str:
    """The name of the preset for what was asked."""
    # no other model should learn with steps as large as the embedded one
    if init_from == "tiny":
        return "tiny_paper" if objective == "paper" else "tiny"
    if init_from == "scratch":
        return "scratch"
    return "topics" if data == "tiny" else "paper"
