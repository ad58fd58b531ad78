"""A training's state on disk, all that the next update depends on: out_dir/state.safetensors.

Flags and progress stand in the file's metadata; the tensors are named weights/NAME, the moments of
AdamW beside them (step/NAME, exp_avg/NAME, exp_avg_sq/NAME), and the generator. One file, so that a
kill at any moment leaves a state that is whole. train.py says when.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from data.checkpoint import open_safetensors, write_safetensors

MOMENTS = ("step", "exp_avg", "exp_avg_sq")     # of AdamW


def write_state(out_dir, trainable: dict, optimizer, generator, meta: dict, average: dict):
    """trainable, average: name -> tensor; meta: flags and progress, anything that JSON can hold."""
    tensors = {"generator": generator.get_state()}
    for name, p in trainable.items():
        tensors[f"weights/{name}"] = p.detach().cpu().contiguous()
        for moment, value in optimizer.state[p].items():
            tensors[f"{moment}/{name}"] = value.detach().cpu().contiguous()
    for name, value in average.items():
        tensors[f"average/{name}"] = value.cpu()
    path = Path(out_dir) / "state.safetensors"
    write_safetensors(tensors, path, {"state": json.dumps(meta)})


def read_state_meta(out_dir) -> dict:
    """Flags and progress of the last saved state. Raises ValueError where there is none."""
    path = Path(out_dir) / "state.safetensors"
    if not path.exists():
        raise ValueError(f"{path} does not exist, so there is nothing to resume; "
                         f"start one with train.py --out_dir={out_dir}")
    meta = open_safetensors(path).metadata()
    if not meta or "state" not in meta:
        raise ValueError(f"{path} is not a training state of this project; "
                         "start anew with another --out_dir")
    return json.loads(meta["state"])


def read_state(out_dir):
    """(tensors, metadata) of the last saved state. Raises ValueError where there is none."""
    meta = read_state_meta(out_dir)
    return load_file(Path(out_dir) / "state.safetensors"), meta


@torch.no_grad()
def restore_state(out_dir, trainable: dict, optimizer, generator, frozen, average: dict) -> dict:
    """Put a saved state back and return its meta.

    Raises ValueError where its tensors are others, or where it was trained beside other frozen
    weights than those of the fingerprint `frozen`.
    """
    tensors, meta = read_state(out_dir)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [name for name, p in trainable.items() if shapes.get(f"weights/{name}") != p.shape]
    if wrong:
        raise ValueError(f"{out_dir}/state.safetensors does not fit: {len(wrong)} tensors, "
                         f"first {wrong[0]}; resume with the flags it was made with")
    if meta["frozen"] != frozen:
        raise ValueError(
            f"{out_dir}/state.safetensors was trained beside other frozen weights than "
            f"{meta['args']['init_from']} now holds; put those back, "
            "or start anew with another --out_dir")
    for name, p in trainable.items():
        p.copy_(tensors[f"weights/{name}"])
        # copies: load_file maps the file, which the next save replaces
        optimizer.state[p] = {
            moment: tensors[f"{moment}/{name}"].to(p.device, copy=True) for moment in MOMENTS}
    for name, value in average.items():
        value.copy_(tensors[f"average/{name}"])
    generator.set_state(tensors["generator"])
    return meta
