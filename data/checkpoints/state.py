"""A training's state on disk, all that the next update depends on: out_dir/state.safetensors.

Flags and progress stand in the file's metadata; the tensors are named weights/NAME, the moments of
AdamW beside them (step/NAME, exp_avg/NAME, exp_avg_sq/NAME; none before the first update). What is
random in an update follows from its number, so no generator is kept. One file, so that a kill at
any moment leaves a state that is whole. train.py says when.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from data.checkpoints.weights import check_finite
from data.system import processes, sharding
from data.system.disk import (
    check_absent, open_safetensors, parse_json, present, remove, write_safetensors)

MOMENTS = ("step", "exp_avg", "exp_avg_sq")     # of AdamW
# What a training leaves in its directory; any of them means that there was one.
RESULTS = ("state.safetensors", "path.json", "path.safetensors", "config.json",
           "model.safetensors", "model.safetensors.index.json")
BEST = "best-"          # before the number of an update: one of the best paths
# What the metadata of a state holds, beside the flags.
FACTS = {"args": dict, "update": int, "position": int, "frozen": (str, type(None)),
         "curriculum": list, "facts": dict, "history": list}


# --- a directory of one run -----------------------------------------------------------------------

def check_out_dir(out_dir, source: Path, overwrite: bool):
    """Raise ValueError where a new run would replace what an earlier one or a model has left."""
    out_dir = Path(out_dir)
    if out_dir.exists() and source.exists() and out_dir.samefile(source):
        raise ValueError(f"--out_dir {out_dir} is the directory of the model that is trained from; "
                         "choose another one")
    if present(out_dir / "state.safetensors") and not overwrite:
        raise ValueError(f"{out_dir} holds an earlier run; go on with: python train.py "
                         f"--init_from=resume --out_dir={out_dir}, choose another --out_dir, "
                         "or say --overwrite")
    for name in RESULTS:
        check_absent(out_dir / name, overwrite)


def clear(out_dir: Path):
    """Remove an earlier run, so that no file of it is taken for one of the next.

    What data/training/frozen.py keeps stays: it is new, or of the same model.
    """
    for name in (*RESULTS, "log.jsonl"):
        remove(out_dir / name)
    for path in out_dir.glob(f"{BEST}*"):
        remove(path)


def best_updates(history: list, count: int) -> set:
    """The updates of the lowest validation losses; history: [update, loss] of every one."""
    return {update for update, _ in sorted(history, key=lambda entry: entry[1])[:count]}


def out_of_patience(history: list, patience: int) -> bool:
    """Have so many validations passed since the best one? 0 never runs out."""
    if not patience or not history:
        return False
    best = min(range(len(history)), key=lambda place: history[place][1])
    return len(history) - 1 - best >= patience


def keep_best(run, save):
    """Of all validated paths the best stay in directories of their own; save(directory)."""
    out_dir = Path(run.args.out_dir)
    best = best_updates(run.history, run.args.keep)
    if run.update in best:
        save(out_dir / f"{BEST}{run.update}")
    names = {f"{BEST}{update}" for update in best}
    for path in out_dir.glob(f"{BEST}*"):
        if path.name not in names:
            remove(path)


# --- the state ------------------------------------------------------------------------------------

def write_state(out_dir, trainable: dict, optimizer, meta: dict, average: dict):
    """trainable, average: name -> tensor; meta: flags and progress, anything that JSON can hold.

    Raises ValueError for weights that are not finite: the last good state stays.
    """
    path = Path(out_dir) / "state.safetensors"
    tensors = {}
    for name, p in trainable.items():
        tensors[f"weights/{name}"] = p
        for moment, value in optimizer.state[p].items():
            tensors[f"{moment}/{name}"] = value
    for name, value in average.items():
        tensors[f"average/{name}"] = value
    for name, value in tensors.items():
        # all processes have a part of what is divided, and one of them writes
        value = sharding.whole(value.detach())
        check_finite(name, value, "this run")
        tensors[name] = value.cpu().contiguous()
    if processes.number():
        return
    write_safetensors(tensors, path, {"state": json.dumps(meta)})


def read_state_meta(out_dir) -> dict:
    """Flags and progress of the last saved state. Raises ValueError where there is none."""
    path = Path(out_dir) / "state.safetensors"
    if not present(path):
        raise ValueError(f"{path} does not exist, so there is nothing to resume; "
                         f"start one with train.py --out_dir={out_dir}")
    found = open_safetensors(path).metadata() or {}
    meta = parse_json(found.get("state", "null"), f"the metadata of {path}")
    if not isinstance(meta, dict):
        meta = {}
    for name, kind in FACTS.items():
        if name not in meta or not isinstance(meta[name], kind):
            raise ValueError(f"{path} is not a training state of this project and version "
                             f"(no {name}); start anew with another --out_dir")
    for entry in meta["history"]:
        if not isinstance(entry, list) or [type(value) for value in entry] != [int, float]:
            raise ValueError(f"{path} holds a history of another form ({str(entry)[:40]}); "
                             "start anew with another --out_dir")
    return meta


def read_state(out_dir):
    """(tensors, metadata) of the last saved state. Raises ValueError where there is none."""
    meta = read_state_meta(out_dir)
    return load_file(Path(out_dir) / "state.safetensors"), meta


@torch.no_grad()
def restore_state(run, facts: dict) -> dict:
    """Put a saved state back into a Run of train.py and return its meta.

    Raises ValueError where its tensors are others, or where it was trained beside something else
    than what `facts` and the fingerprint of the frozen weights say.
    """
    path = Path(run.args.out_dir) / "state.safetensors"
    tensors, meta = read_state(run.args.out_dir)
    check_facts(run.args, {**meta["facts"], "weights": meta["frozen"]},
                {**facts, "weights": run.frozen})
    begun = meta["update"] > 0
    check_tensors(path, tensors, expected_tensors(run, begun))
    for name, p in run.trainable.items():
        p.copy_(sharding.divided(tensors[f"weights/{name}"], p))
        if begun:
            run.optimizer.state[p] = restore_moments(tensors, name, p)
    for name, value in run.average.tensors.items():
        value.copy_(sharding.divided(tensors[f"average/{name}"], value))
    return meta


def restore_moments(tensors: dict, name: str, p) -> dict:
    # copies: load_file maps the file, which the next save replaces
    moments = {moment: tensors[f"{moment}/{name}"].to(p.device, copy=True) for moment in MOMENTS}
    # the number of steps is the same everywhere
    return {moment: value if moment == "step" else sharding.divided(value, p)
            for moment, value in moments.items()}


def check_facts(args, stated: dict, found: dict):
    """Raise ValueError where what a state was trained beside has changed since."""
    for name, value in found.items():
        if stated.get(name) != value:
            raise ValueError(f"{args.out_dir} was trained beside other {name} than there are now "
                             f"(model {args.init_from}, data {args.data}); put the right ones "
                             "back, or start anew with another --out_dir")


def expected_tensors(run, begun: bool) -> dict:
    """Name -> shape of all that a state holds, its moments only after the first update."""
    expected = {}
    for name, p in run.trainable.items():
        expected[f"weights/{name}"] = tuple(p.shape)
        if begun:
            for moment in MOMENTS:
                expected[f"{moment}/{name}"] = () if moment == "step" else tuple(p.shape)
    for name, value in run.average.tensors.items():
        expected[f"average/{name}"] = tuple(value.shape)
    return expected


def check_tensors(path: Path, tensors: dict, expected: dict):
    """Raise ValueError unless these are the tensors, and all their values finite."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted({name for name, _ in shapes.items() ^ expected.items()})
    if wrong:
        raise ValueError(f"{path} does not fit: {len(wrong)} tensors, "
                         f"first {wrong[0]}; resume with the flags it was made with")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path} does not fit: {name} is of type {tensor.dtype}; "
                             "start anew with another --out_dir")
        check_finite(name, tensor, path)
