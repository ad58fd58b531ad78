"""A model's weights on disk: every tensor accounted for, mapped into memory, never unpickled.

`load_weights` fills a model of any family by its weight map (families.py), from a single file
or from shards. Everything here is plumbing; read model.py for what the tensors mean.

    python -c "from model import LM; LM.from_pretrained('tiny')"
"""

import hashlib
import math
import shutil
import sys
from pathlib import Path

import torch

from data.checkpoints.families import choices, weight_map
from data.system.disk import open_safetensors, present, read_json, write_json, write_safetensors

HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
# How the tensors end that only quantised checkpoints have.
QUANTISED = (
    ".qweight", ".qzeros", ".scales", ".weight_scale", ".weight_scale_inv", ".weight_packed",
    ".SCB", ".absmax", ".quant_map")
# Weights are copied out of the memory map in pieces of this size, so that pages can be let go.
CHUNK_BYTES = 1 << 26
TOKENIZER_FILES = (
    "tokenizer*", "chat_template*", "vocab*", "merges.txt", "encoder.json", "added_tokens.json",
    "special_tokens_map.json", "generation_config.json")


# --- a model's weights ----------------------------------------------------------------------------

def read_config(directory: Path) -> dict:
    """config.json of a model's directory. Raises ValueError for another kind of directory."""
    if present(directory / "adapter_config.json"):
        raise ValueError(f"{directory} holds a PEFT adapter (adapter_config.json); "
                         "merge it into its base first")
    if present(directory / "config.json"):
        return read_json(directory / "config.json")
    if present(directory / "path.json"):
        raise ValueError(f"{directory} holds a diffusion path and no model; give its base, or "
                         f"train on with --init_from=resume --out_dir={directory}")
    raise ValueError(f"{directory}/config.json does not exist; a model directory holds "
                     "config.json, model.safetensors and a tokenizer")


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, single or sharded."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if present(single):
        # as everywhere: the whole file wins, but shards beside it may be what was meant
        if present(index):
            read_index(index)
            print(f"note: {directory} holds model.safetensors and {index.name}: "
                  "the former is loaded, the shards are not", file=sys.stderr)
        return {name: single for name in open_safetensors(single).keys()}
    if present(index):
        return sharded_files(index)
    if list(directory.glob("pytorch_model*.bin")):
        raise ValueError(f"{directory} has only pytorch_model.bin, a pickle that can run code "
                         "when it is read; convert it to model.safetensors first")
    raise ValueError(f"{directory} has no model.safetensors (nor {index.name}); "
                     "copy or download the weights")


def read_index(index: Path) -> dict:
    """Tensor name -> file name. Raises ValueError for an index of another form."""
    names = read_json(index).get("weight_map")
    known = isinstance(names, dict) and all(isinstance(file, str) for file in names.values())
    if not names or not known:
        raise ValueError(f"{index} has no weight_map of file names; download it again, or delete "
                         "it if model.safetensors is whole")
    return names


def sharded_files(index: Path) -> dict[str, Path]:
    names = read_index(index)
    # the name alone: an index must not point out of its directory
    files = {name: index.parent / Path(file).name for name, file in names.items()}
    for path in sorted(set(files.values())):
        if not present(path):
            raise ValueError(f"{path} is missing although {index.name} names it; "
                             "download this shard again")
        stated = {name for name, file in files.items() if file == path}
        wrong = stated ^ set(open_safetensors(path).keys())
        if wrong:
            raise ValueError(f"{path} does not hold what {index.name} says: {count_names(wrong)}; "
                             "download this shard and the index again")
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
    # the number of a card, where there are several
    count = torch.cuda.device_count() if device.startswith("cuda") else 1
    allowed = here + [f"{device.split(':')[0]}:{n}" for n in range(count)]
    choices(device, allowed, "--device")
    if dtype is None:
        half = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if half else torch.float32
    return device, dtype


def plan_weights(model, files: dict, directory: Path) -> dict:
    """Name in the files -> (names of our parameters, stored transposed?), every tensor checked.

    The model may be on the meta device: nothing is read yet, names, shapes and types are compared.
    """
    config = model.config
    family = config.family
    ours = dict(model.named_parameters())
    prefix = ""
    if family.prefix and any(name.startswith(family.prefix) for name in files):
        prefix = family.prefix
    plan = {}
    for theirs, names, transposed in weight_map(family, config.layers, ours):
        # the head stands outside of what the prefix names
        name = theirs if theirs.startswith("lm_head") else prefix + theirs
        plan[name] = (names, transposed)
    check_names(plan, files, config, directory)
    if config.tied and HEAD in files:
        embedding = next(name for name, (names, _) in plan.items() if names == ["embed.weight"])
        check_tied_head(files, embedding)
    for name, (names, transposed) in plan.items():
        check_tensor(files[name], name, [ours[n].shape for n in names], transposed)
    return plan


def load_weights(model, plan: dict, files: dict):
    """Fill the model, whose memory is there by now; values are checked on their way."""
    ours = dict(model.named_parameters())
    for name, (names, transposed) in plan.items():
        copy_tensor(files[name], name, [ours[n].data for n in names], transposed)


def save_weights(model, directory: Path):
    """The other way: model.safetensors with the family's names and forms, then config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    ours = dict(model.named_parameters())
    tensors = {}
    for theirs, names, transposed in weight_map(config.family, config.layers, ours):
        weight = torch.cat([ours[name].detach().cpu() for name in names])
        tensors[theirs] = (weight.T if transposed else weight).contiguous()
    write_safetensors(tensors, directory / "model.safetensors", {"format": "pt"})
    write_json(config.raw, directory / "config.json")


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
        ignored += (HEAD,)
    missing = sorted(wanted.keys() - files.keys())
    left_over = [name for name in files.keys() - wanted.keys() if not name.endswith(ignored)]
    quantised = [name for name in left_over if name.endswith(QUANTISED)]
    if quantised:
        raise ValueError(f"the weights in {directory} are quantised ({quantised[0]}); "
                         "use the checkpoint in bfloat16 or float32")
    if missing or left_over:
        raise ValueError(
            f"the weights in {directory} are not those of its config.json "
            f"(model_type {config.model_type}, {config.layers} layers): "
            f"{count_names(missing)} missing, {count_names(left_over)} left over")


def check_tied_head(files: dict, embedding: str):
    """Raise ValueError where a model that should have no head of its own has another one."""
    head = open_safetensors(files[HEAD]).get_slice(HEAD)
    embed = open_safetensors(files[embedding]).get_slice(embedding)
    same = head.get_shape() == embed.get_shape() and head.get_dtype() == embed.get_dtype()
    rows = 1 + CHUNK_BYTES // (4 * math.prod(embed.get_shape()[1:]))
    for row in range(0, embed.get_shape()[0], rows):
        # a file may well hold the embedding twice
        same = same and torch.equal(head[row:row + rows], embed[row:row + rows])
    if not same:
        raise ValueError(f"{files[HEAD]} holds a {HEAD} that is not the embedding, but config.json "
                         'says "tie_word_embeddings": true; set it to false to use this head')


def count_names(names) -> str:
    """How many, and the first of them."""
    if not names:
        return "0"
    more = ", ..." if len(names) > 1 else ""
    return f"{len(names)} ({min(names)}{more})"


def check_tensor(path, name, shapes: list, transposed):
    """Raise ValueError unless a tensor is the floating-point concatenation of these shapes."""
    stored = open_safetensors(path).get_slice(name)
    if stored.get_dtype() not in FLOATS:
        raise ValueError(f"{name} in {path} is of type {stored.get_dtype()}: is it quantised? "
                         f"allowed: {', '.join(FLOATS)}")
    expected = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
    if transposed:
        expected.reverse()
    shape = stored.get_shape()
    if shape != expected:
        raise ValueError(f"{name} in {path} has shape {shape}, but config.json asks for {expected};"
                         " use the config.json that came with the weights")


def copy_tensor(path: Path, name: str, targets: list, transposed: bool):
    """Copy one tensor of the file into `targets`, which share its rows (or columns, if transposed).

    The file is mapped anew for every piece: pages of a map count as resident until it is closed.
    """
    shape = open_safetensors(path).get_slice(name).get_shape()
    step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
    for row in range(0, shape[0], step):
        piece = open_safetensors(path).get_slice(name)[row:row + step]
        check_finite(name, piece, path)
        if transposed:
            copy_columns(targets, piece, row)
        else:
            copy_rows(targets, piece, row)


def check_finite(name: str, tensor, path):
    """Raise ValueError for a value that is not a number, or none that is finite."""
    # the extremes are not finite if any value is not; 14 times as fast as isfinite().all()
    if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        raise ValueError(f"{name} in {path} holds values that are not finite; "
                         "download it again")


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
