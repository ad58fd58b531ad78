"""Checkpoints on disk: JSON and safetensors, written then renamed, read by memory map, never unpickled.

`load_weights` fills a model of any family from its `weight_map` (model.py), single file or sharded.
Everything here is plumbing; read model.py for what the tensors mean.

    python -c "from model import LM; LM.from_pretrained('tiny')"
"""

import json
import math
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CHUNK_BYTES = 1 << 26   # weights are copied out of the memory map in pieces of this size, so that pages can be let go


def read_json(path: str | Path) -> dict:
    """Parse a JSON object. Raises ValueError with one line for a missing or damaged file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a model directory holds config.json, model.safetensors and a tokenizer") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; copy or download it again")
    return content


def write_json(content: dict, path: str | Path):
    """Write-then-rename: a reader sees the old file or the new one, never half of it."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_safetensors(tensors: dict, path: str | Path, metadata: dict | None = None):
    """The same for tensors. Raises OSError with one line where they cannot be written, a full disk for instance."""
    try:
        save_file(tensors, f"{path}.part", metadata)
        os.replace(f"{path}.part", path)
    except SafetensorError as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(f"cannot write {path} ({error}); it needs {size:,} bytes: make room or choose another directory") from None
    finally:
        Path(f"{path}.part").unlink(missing_ok=True)


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, single or sharded."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        files = {name: directory / Path(file).name for name, file in read_json(index).get("weight_map", {}).items()}
        if not files:
            raise ValueError(f"{index} has no weight_map; download it again")
    elif single.exists():
        files = {name: single for name in open_safetensors(single).keys()}
    elif list(directory.glob("pytorch_model*.bin")):
        raise ValueError(f"{directory} has only pytorch_model.bin, a pickle that can run code when it is read; "
                         "convert it to model.safetensors first")
    else:
        raise ValueError(f"{directory} has no model.safetensors (nor model.safetensors.index.json); copy or download the weights")
    for path in sorted(set(files.values())):
        if not path.exists():
            raise ValueError(f"{path} is missing although {index.name} names it; download this shard again")
    return files


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); download it again") from None


def load_weights(model, weight_map, directory: Path):
    """Fill the model from the files of `directory`: names counted, shapes compared, values checked."""
    family, files = model.config.family, weight_files(directory)
    prefix = family.prefix if family.prefix and any(name.startswith(family.prefix) for name in files) else ""
    wanted = {(name if name.startswith("lm_head") else prefix + name): rest for name, *rest in weight_map}
    ignored = family.ignored + (("lm_head.weight",) if model.config.tied else ())
    missing = sorted(wanted.keys() - files.keys())
    left_over = sorted(name for name in files.keys() - wanted.keys() if not name.endswith(ignored))
    if missing or left_over:
        say = lambda names: f"{len(names)}" + (f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else "")
        raise ValueError(f"the weights in {directory} are not those of its config.json (model_type {model.config.model_type}, "
                         f"{model.config.layers} layers): {say(missing)} missing, {say(left_over)} left over")
    ours = dict(model.named_parameters())
    for theirs, (names, transposed) in wanted.items():
        copy_tensor(files[theirs], theirs, [ours[name].data for name in names], transposed)


def copy_tensor(path: Path, name: str, targets: list, transposed: bool):
    """Copy one tensor of the file into `targets`, which share its rows (its columns, where it is stored transposed).

    The file is mapped anew for every CHUNK_BYTES: pages of a map count as resident memory until it is closed.
    """
    views = [target.T if transposed else target for target in targets]
    sizes = [target.shape[0] for target in targets]
    expected = list(views[0].shape)
    expected[-1 if transposed else 0] = sum(sizes)
    file = open_safetensors(path)
    if name not in file.keys():
        raise ValueError(f"{path} lacks {name}, which model.safetensors.index.json says is there; download this shard again")
    shape = file.get_slice(name).get_shape()
    if shape != expected:
        raise ValueError(f"{name} in {path} has shape {shape}, but config.json asks for {expected}; "
                         "use the config.json that came with the weights")
    step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
    for row in range(0, shape[0], step):
        piece = open_safetensors(path).get_slice(name)[row:row + step]
        if not all(math.isfinite(extreme) for extreme in piece.aminmax()):    # 14 times as fast as isfinite().all()
            raise ValueError(f"{name} in {path} holds values that are not finite; download it again")
        if transposed:
            for view, part in zip(views, piece.split(sizes, dim=-1)):
                view[row:row + step].copy_(part)
        else:
            copy_rows(views, sizes, piece, row)


def copy_rows(views: list, sizes: list, piece, row: int):
    """Rows row, row + 1, ... of a tensor that is the concatenation of `views`."""
    for view, size in zip(views, sizes):
        low, high = max(row, 0), min(row + len(piece), size)
        if low < high:
            view[low:high].copy_(piece[low - row:high - row])
        row -= size
