"""Checkpoints on disk: JSON and safetensors, written then renamed, mapped, never unpickled.

`load_weights` fills a model of any family by its weight map (data/families.py), from a single file
or from shards. Everything here is plumbing; read model.py for what the tensors mean.

    python -c "from model import LM; LM.from_pretrained('tiny')"
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.families import choices, weight_map

# Weights are copied out of the memory map in pieces of this size, so that pages can be let go.
CHUNK_BYTES = 1 << 26
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "encoder.json", "generation_config.json")


# --- JSON and tensors, each appearing whole -------------------------------------------------------

def read_json(path: str | Path) -> dict:
    """Parse a JSON object. Raises ValueError with one line for a missing or damaged file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a model directory holds config.json, "
                         "model.safetensors and a tokenizer") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; copy or download it again")
    return content


def write_json(content: dict, path: str | Path):
    """Write-then-rename: a reader sees the old file or the new one, never half of it."""
    part = Path(f"{path}.part")
    text = json.dumps(content, indent=1) + "\n"
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        # gone already, unless the disk was full
        part.unlink(missing_ok=True)


def write_safetensors(tensors: dict, path: str | Path, metadata: dict | None = None):
    """The same for tensors. Raises OSError with one line where they cannot be written."""
    part = Path(f"{path}.part")
    try:
        save_file(tensors, part, metadata)
        os.replace(part, path)
    except SafetensorError as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(f"cannot write {path} ({error}); it needs {size:,} bytes: "
                      "make room or choose another directory") from None
    finally:
        part.unlink(missing_ok=True)


# --- a model's weights ----------------------------------------------------------------------------

def open_safetensors(path: Path):
    """The file, mapped into memory. Raises ValueError where it is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); "
                         "download it again") from None


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, single or sharded."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        return sharded_files(index)
    if single.exists():
        return {name: single for name in open_safetensors(single).keys()}
    if list(directory.glob("pytorch_model*.bin")):
        raise ValueError(f"{directory} has only pytorch_model.bin, a pickle that can run code "
                         "when it is read; convert it to model.safetensors first")
    raise ValueError(f"{directory} has no model.safetensors (nor {index.name}); "
                     "copy or download the weights")


def sharded_files(index: Path) -> dict[str, Path]:
    names = read_json(index).get("weight_map", {})
    if not names:
        raise ValueError(f"{index} has no weight_map; download it again")
    # the name alone: an index must not point out of its directory
    files = {name: index.parent / Path(file).name for name, file in names.items()}
    for path in sorted(set(files.values())):
        if not path.exists():
            raise ValueError(f"{path} is missing although {index.name} names it; "
                             "download this shard again")
    return files


def pick_device(device: str | None = None, dtype: torch.dtype | None = None):
    """(device, dtype): CUDA, else MPS, else CPU; bfloat16 where the GPU has it, else float32.

    Raises ValueError for a device that is not here.
    """
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    device = device or here[0]
    choices(device.split(":")[0], here, "--device")
    if dtype is None:
        half = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if half else torch.float32
    return device, dtype


def load_weights(model, directory: Path):
    """Fill the model from `directory`: names counted, shapes compared, values checked."""
    config = model.config
    family = config.family
    files = weight_files(directory)
    ours = dict(model.named_parameters())
    prefix = ""
    if family.prefix and any(name.startswith(family.prefix) for name in files):
        prefix = family.prefix
    wanted = {}
    for theirs, names, transposed in weight_map(family, config.layers, ours):
        # the head stands outside of what the prefix names
        name = theirs if theirs.startswith("lm_head") else prefix + theirs
        wanted[name] = ([ours[n].data for n in names], transposed)
    check_names(wanted, files, config, directory)
    for name, (targets, transposed) in wanted.items():
        copy_tensor(files[name], name, targets, transposed)


def save_weights(model, directory: Path):
    """The other way: write model.safetensors with the names and forms of the model's family."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    ours = dict(model.named_parameters())
    tensors = {}
    for theirs, names, transposed in weight_map(config.family, config.layers, ours):
        weight = torch.cat([ours[name].detach().cpu() for name in names])
        tensors[theirs] = (weight.T if transposed else weight).contiguous()
    write_safetensors(tensors, directory / "model.safetensors", {"format": "pt"})


def fingerprint(model) -> str:
    """sha256 of all weights as bfloat16: the same in whatever precision a model was loaded."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        # the final norm had another name when the first paths were saved, and those must still load
        digest.update(name.replace("ln_f.", "norm_f.").encode())
        values = p.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def check_names(wanted, files, config, directory):
    """Raise ValueError unless the files hold every tensor of the model, and no other one."""
    ignored = config.family.ignored
    if config.tied:
        ignored += ("lm_head.weight",)
    missing = sorted(wanted.keys() - files.keys())
    left_over = [name for name in files.keys() - wanted.keys() if not name.endswith(ignored)]
    if missing or left_over:
        raise ValueError(
            f"the weights in {directory} are not those of its config.json "
            f"(model_type {config.model_type}, {config.layers} layers): "
            f"{count_names(missing)} missing, {count_names(sorted(left_over))} left over")


def count_names(names) -> str:
    """How many, and the first of them."""
    if not names:
        return "0"
    more = ", ..." if len(names) > 1 else ""
    return f"{len(names)} ({names[0]}{more})"


def copy_tensor(path: Path, name: str, targets: list, transposed: bool):
    """Copy one tensor of the file into `targets`, which share its rows (or columns, if transposed).

    The file is mapped anew for every piece: pages of a map count as resident until it is closed.
    """
    shape = check_shape(path, name, targets, transposed)
    step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
    for row in range(0, shape[0], step):
        piece = open_safetensors(path).get_slice(name)[row:row + step]
        # the extremes are not finite if any value is not; 14 times as fast as isfinite().all()
        if not all(math.isfinite(extreme) for extreme in piece.aminmax()):
            raise ValueError(
                f"{name} in {path} holds values that are not finite; download it again")
        if transposed:
            copy_columns(targets, piece, row)
        else:
            copy_rows(targets, piece, row)


def check_shape(path, name, targets, transposed):
    """The tensor's shape. Raises ValueError unless it is the concatenation of `targets`."""
    file = open_safetensors(path)
    if name not in file.keys():
        raise ValueError(f"{path} lacks {name}, which model.safetensors.index.json says is there; "
                         "download this shard again")
    expected = list(targets[0].shape)
    expected[0] = sum(target.shape[0] for target in targets)
    if transposed:
        expected.reverse()
    shape = file.get_slice(name).get_shape()
    if shape != expected:
        raise ValueError(f"{name} in {path} has shape {shape}, but config.json asks for {expected};"
                         " use the config.json that came with the weights")
    return shape


def copy_rows(targets: list, piece, row: int):
    """Rows row, row + 1, ... of a tensor that is the concatenation of `targets`."""
    for target in targets:
        size = len(target)
        low = max(row, 0)
        high = min(row + len(piece), size)
        if low < high:
            target[low:high].copy_(piece[low - row:high - row])
        row -= size     # counted from the next target's first row


def copy_columns(targets: list, piece, row: int):
    """The same of a transposed tensor: a piece of its rows holds a few columns of every target."""
    sizes = [target.shape[0] for target in targets]
    for target, part in zip(targets, piece.split(sizes, dim=-1)):
        target.T[row:row + len(piece)].copy_(part)


def copy_tokenizer(source: Path, directory: Path):
    """Put the files of a tokenizer beside a finetuned model, so that its directory is complete."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.resolve().parent != directory.resolve():
                shutil.copy(path, directory)
