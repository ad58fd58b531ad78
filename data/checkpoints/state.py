"""The state of a training on disk, from which it resumes to the bit: out_dir/state.safetensors.

Flags and progress are in the file's metadata; the tensors are weights/NAME, the moments of AdamW
step/NAME, exp_avg/NAME and exp_avg_sq/NAME (absent before the first update), and average/NAME, the
EMA. The randomness of an update follows from its number, so no generator is saved. It is one file,
so that a kill at any moment leaves a complete state.
"""

import json
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from data.checkpoints.weights import check_finite, digest_of
from data.system import processes, sharding
from data.system.disk import (
    check_absent, open_safetensors, parse_json, present, remove, write_safetensors)

# The files of a training; any of them in a directory is the sign of an earlier one.
RESULTS = ("state.safetensors", "path.json", "path.safetensors", "config.json",
           "model.safetensors", "model.safetensors.index.json")
BEST = "best-"          # a directory with one of the best paths: best-UPDATE
# The metadata of a state and their types.
FACTS = {"args": dict, "update": int, "position": int, "frozen": (str, type(None)),
         "facts": dict, "history": list, "kept": list, "asked_again": (list, type(None)),
         "digest": str}


# --- a directory of one run -----------------------------------------------------------------------

def check_out_dir(out_dir, source: Path, overwrite: bool):
    """Raise ValueError if a new run would replace an earlier one or the model in `source`."""
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
    """Remove an earlier run, but not the cached states of data/training/frozen.py."""
    # without a state nothing says which of the best paths were the run's
    with suppress(ValueError):
        for update in read_state_meta(out_dir)["kept"]:
            remove_best(out_dir, update)
    for name in (*RESULTS, "log.jsonl"):
        remove(out_dir / name)


def out_of_patience(history: list, patience: int) -> str:
    """Why to stop: `patience` validations have passed since the best. "" to go on; 0: never.

    history: [update, loss] of every validation
    """
    if not patience or not history:
        return ""
    best = min(range(len(history)), key=lambda index: history[index][1])
    since = len(history) - 1 - best
    if since < patience:
        return ""
    update, loss = history[best]
    return (f"; stopped early by --patience={patience}: none of the last {since} validations was "
            f"better than that after update {update} ({loss:g})")


# --- the best paths -------------------------------------------------------------------------------

def best_updates(history: list, keep: int) -> list:
    """The updates of the `keep` lowest validation losses."""
    return [update for update, _ in sorted(history, key=lambda entry: entry[1])[:keep]]


def updates_to_list(out_dir, kept: list, history: list, keep: int) -> list:
    """What the state lists before keep_best acts: the paths that are there or will be.

    kept: the updates whose paths this run has written
    """
    # a directory that the run has not written is the user's
    new = [update for update in best_updates(history, keep)
           if update in kept or not (Path(out_dir) / f"{BEST}{update}").exists()]
    return sorted({*kept, *new})


def keep_best(out_dir, kept: list, history: list, keep: int, update: int, save) -> list:
    """Keep the `keep` paths of the lowest validation losses; returns the updates of those kept.

    kept: those that the state lists; save(directory) writes the path of `update`
    """
    best = best_updates(history, keep)
    if update in best and update in kept:
        save(Path(out_dir) / f"{BEST}{update}")
    for other in kept:
        if other not in best:
            remove_best(out_dir, other)
    return [update for update in kept if update in best]


def remove_best(out_dir, update: int):
    """Remove the path of an update, and its directory unless the user has laid something there."""
    folder = Path(out_dir) / f"{BEST}{update}"
    if folder.is_symlink():
        return
    for name in ("path.json", "path.safetensors"):
        remove(folder / name)
    with suppress(OSError):
        folder.rmdir()


# --- the state ------------------------------------------------------------------------------------

def named_tensors(trainable: dict, optimizer, ema: dict) -> dict:
    """Name in the file -> tensor; trainable, ema: name -> tensor."""
    tensors = {}
    for name, p in trainable.items():
        tensors[f"weights/{name}"] = p
        for moment, value in optimizer.state[p].items():
            tensors[f"{moment}/{name}"] = value
    for name, value in ema.items():
        tensors[f"average/{name}"] = value
    return tensors


def write_state(out_dir, trainable: dict, optimizer, meta: dict, ema: dict):
    """Save a training; meta: flags and progress. Raises ValueError for values not finite."""
    tensors = {}
    for name, value in named_tensors(trainable, optimizer, ema).items():
        # every process has a part of a divided tensor, and one process writes the file
        value = sharding.whole(value.detach())
        check_finite(name, value, "this run", "the last good state stays; try a lower --lr")
        tensors[name] = value.cpu().contiguous()
    if processes.number() == 0:
        path = Path(out_dir) / "state.safetensors"
        digest = digest_of(tensors, meta)
        # nothing is new before the first update of a resumed run, unless a flag is
        if present(path) and read_state_meta(out_dir)["digest"] == digest:
            return
        write_safetensors(tensors, path, {"state": json.dumps({**meta, "digest": digest})})


def read_state_meta(out_dir) -> dict:
    """Flags and progress of the saved state. Raises ValueError if it is missing or invalid."""
    path = Path(out_dir) / "state.safetensors"
    if not present(path):
        raise ValueError(f"{path} does not exist, so there is nothing to resume; "
                         f"start one with train.py --out_dir={out_dir}")
    found = open_safetensors(path).metadata() or {}
    meta = parse_json(found.get("state", "null"), f"the metadata of {path}")
    for name, kind in FACTS.items():
        if not isinstance(meta, dict) or name not in meta or not isinstance(meta[name], kind):
            raise ValueError(f"{path} is not a training state of this project and version "
                             f"(no {name}); start anew with another --out_dir")
    for entry in meta["history"]:
        if not isinstance(entry, list) or [type(value) for value in entry] != [int, float]:
            raise ValueError(f"{path} holds an invalid history ({str(entry)[:40]}); "
                             "start anew with another --out_dir")
    if any(type(update) is not int for update in meta["kept"]):
        raise ValueError(f"{path} holds an invalid list of kept paths ({str(meta['kept'])[:40]}); "
                         "start anew with another --out_dir")
    return meta


def read_state(out_dir):
    """(tensors, metadata) of the saved state. Raises ValueError if it is missing or invalid."""
    meta = read_state_meta(out_dir)
    return load_file(Path(out_dir) / "state.safetensors"), meta


@torch.no_grad()
def restore_state(out_dir, trainable: dict, optimizer, facts: dict, ema: dict) -> dict:
    """Copy a saved state into parameters, optimizer and averages; returns its metadata.

    Raises ValueError if one of `facts` (name -> identity of the data, config, tokenizer or frozen
    weights) has changed, and for tensors of other names, shapes or types, or not finite.
    """
    path = Path(out_dir) / "state.safetensors"
    tensors, meta = read_state(out_dir)
    stated = {**meta["facts"], "weights": meta["frozen"]}
    for name, value in facts.items():
        if stated.get(name) != value:
            raise ValueError(f"{name} has changed since the training in {out_dir} "
                             f"(model {meta['args'].get('init_from')}, data "
                             f"{meta['args'].get('data')}); restore it, or start anew with "
                             "another --out_dir")
    if meta["update"] > 0:
        for p in trainable.values():
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p)}
    ours = named_tensors(trainable, optimizer, ema)
    shapes, expected = ({(name, tensor.shape) for name, tensor in found.items()}
                        for found in (tensors, ours))
    wrong = sorted({name for name, _ in shapes ^ expected})
    if wrong:
        raise ValueError(f"{path} does not fit: {len(wrong)} tensors, "
                         f"first {wrong[0]}; resume with the flags it was made with")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path} does not fit: {name} is of type {tensor.dtype}; "
                             "start anew with another --out_dir")
        check_finite(name, tensor, path, "start anew with another --out_dir")
    if meta.pop("digest") != digest_of(tensors, meta):
        raise ValueError(f"{path} is damaged: it holds something else than was saved; "
                         "copy it again, or start anew with another --out_dir")
    for name, tensor in tensors.items():
        ours[name].copy_(sharding.divided(tensor, ours[name]))
    return meta
