"""A model's weights on disk: every tensor checked, mapped into memory, never unpickled.

`load_weights` fills a model of any family by its weight map (families.py), from one file or shards.

    python -c "from model import LM; LM.from_pretrained('tiny')"
"""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import torch

from data.checkpoints.families import weight_map
from data.system.command import choices
from data.system.disk import open_safetensors, present, read_json, write_json, write_safetensors

HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
# Endings of tensor names that only quantised checkpoints have.
QUANTISED = (
    ".qweight", ".qzeros", ".scales", ".weight_scale", ".weight_scale_inv", ".weight_packed",
    ".SCB", ".absmax", ".quant_map")
# Weights are copied from the memory map in pieces of this size, to limit the resident memory.
CHUNK_BYTES = 1 << 26
TOKENIZER_FILES = (
    "tokenizer*", "chat_template*", "vocab*", "merges.txt", "encoder.json", "added_tokens.json",
    "special_tokens_map.json", "generation_config.json")


# --- a model's weights ----------------------------------------------------------------------------

def read_config(directory: Path) -> dict:
    """config.json of a model directory. Raises ValueError for another kind of directory."""
    if present(directory / "adapter_config.json"):
        raise ValueError(f"{directory} holds a PEFT adapter (adapter_config.json); "
                         "merge it into its base first")
    if present(directory / "config.json"):
        return read_json(directory / "config.json")
    if present(directory / "path.json"):
        raise ValueError(f"{directory} holds a diffusion path and no model; give its base, or "
                         f"resume its training with --init_from=resume --out_dir={directory}")
    raise ValueError(f"{directory}/config.json does not exist; a model directory holds "
                     "config.json, model.safetensors and a tokenizer")


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, single or sharded."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    files = {}
    if present(index):
        files = read_json(index).get("weight_map")
        known = isinstance(files, dict) and all(isinstance(file, str) for file in files.values())
        if not files or not known:
            raise ValueError(f"{index} has no weight_map of file names; download it again, or "
                             "delete it if model.safetensors is whole")
    if present(single):
        # the user may have meant the shards
        if files:
            print(f"note: {directory} holds model.safetensors and {index.name}: "
                  "the former is loaded, the shards are not", file=sys.stderr)
        return {name: single for name in open_safetensors(single).keys()}
    if not files and list(directory.glob("pytorch_model*.bin")):
        raise ValueError(f"{directory} has only pytorch_model.bin, a pickle that can run code "
                         "when it is read; convert it to model.safetensors first")
    if not files:
        raise ValueError(f"{directory} has no model.safetensors (nor {index.name}); "
                         "copy or download the weights")
    # the name alone: an index must not lead out of its directory
    files = {name: directory / Path(file).name for name, file in files.items()}
    for path in sorted(set(files.values())):
        if not present(path):
            raise ValueError(f"{path} is missing although {index.name} names it; "
                             "download this shard again")
        wrong = {name for name, file in files.items() if file == path}
        wrong ^= set(open_safetensors(path).keys())
        if wrong:
            raise ValueError(f"the tensors of {path} differ from those in {index.name}: "
                             f"{count_names(wrong)}; download this shard and the index again")
    return files


def pick_device(device: str | None = None, dtype: torch.dtype | None = None):
    """(device, dtype): CUDA, else MPS, else CPU; bfloat16 where the GPU has it, else float32.

    Raises ValueError for a device that this machine lacks.
    """
    allowed = ["cpu", "cpu:0"]
    if torch.backends.mps.is_available():
        allowed = ["mps", "mps:0", *allowed]
    if torch.cuda.is_available():
        # cuda:1 is the second card
        cards = [f"cuda:{card}" for card in range(torch.cuda.device_count())]
        allowed = ["cuda", *cards, *allowed]
    device = choices(device or allowed[0], allowed, "--device")
    if dtype is None:
        half = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if half else torch.float32
    return device, dtype


def plan_weights(model, files: dict, directory: Path) -> dict:
    """Name in the files -> (names of our parameters, stored transposed?) for every tensor.

    Only names, shapes and types are read, so the model may be on the meta device.
    Raises ValueError for tensors that are missing, left over, or of another shape or type.
    """
    config = model.config
    family = config.family
    ours = dict(model.named_parameters())
    prefix = family.prefix if any(name.startswith(family.prefix) for name in files) else ""
    plan = {}
    for theirs, names, transposed in weight_map(family, config.layers, ours):
        # the head has no prefix
        name = theirs if theirs == HEAD else prefix + theirs
        plan[name] = (names, transposed)
    check_names(plan, files, config, directory)
    if config.tied and HEAD in files:
        embedding = next(name for name, (names, _) in plan.items() if names == ["embed.weight"])
        check_tied_head(files, embedding)
    for name, (names, transposed) in plan.items():
        path = files[name]
        stored = open_safetensors(path).get_slice(name)
        if stored.get_dtype() not in FLOATS:
            raise ValueError(f"{name} in {path} is of type {stored.get_dtype()}: is it quantised? "
                             f"allowed: {', '.join(FLOATS)}")
        # one matrix of the file may hold several of ours, one below the other
        expected = [sum(len(ours[n]) for n in names), *ours[names[0]].shape[1:]]
        if transposed:
            expected.reverse()
        if stored.get_shape() != expected:
            raise ValueError(f"{name} in {path} has shape {stored.get_shape()}, but config.json "
                             f"requires {expected}; use the config.json that came with the weights")
    return plan


def load_weights(model, plan: dict, files: dict):
    """Copy the files into the model. Raises ValueError for values that are not finite."""
    ours = dict(model.named_parameters())
    for name, (names, transposed) in plan.items():
        # the first row of this target in the matrix of the file, or column if transposed
        start = 0
        for target in (ours[n].data for n in names):
            size = len(target)
            target = target.T if transposed else target
            rows = max(1, CHUNK_BYTES // (4 * math.prod(target.shape[1:])))
            for row in range(0, len(target), rows):
                # opened anew, since the pages of a map count as resident until it is closed
                stored = open_safetensors(files[name]).get_slice(name)
                end = min(row + rows, len(target))
                if transposed:
                    piece = stored[row:end, start:start + size]
                else:
                    piece = stored[start + row:start + end]
                check_finite(name, piece, files[name], "download it again")
                target[row:end].copy_(piece)
            start += size


def save_weights(model, directory: Path):
    """Write model.safetensors with the family's names and shapes, then config.json."""
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
    """sha256 of all weights as bfloat16, so that it does not depend on the dtype of loading."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        # the final norm's name when the first paths were saved, which must go on loading
        digest.update(name.replace("ln_f.", "norm_f.").encode())
        values = p.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of(tensors: dict, meta: dict | None = None) -> str:
    """sha256 of names, types, shapes and values; tensors: name -> tensor on the CPU.

    meta  what else belongs to them, in a form for JSON
    """
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_names(wanted, files, config, directory):
    """Raise ValueError unless the files hold every tensor of the model and no other."""
    ignored = config.family.ignored + ((HEAD,) if config.tied else ())
    missing = wanted.keys() - files.keys()
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
    """Raise ValueError if the file of a model with a tied head holds a different head."""
    head = open_safetensors(files[HEAD]).get_slice(HEAD)
    embed = open_safetensors(files[embedding]).get_slice(embedding)
    same = head.get_shape() == embed.get_shape() and head.get_dtype() == embed.get_dtype()
    rows = 1 + CHUNK_BYTES // (4 * math.prod(embed.get_shape()[1:]))
    for row in range(0, embed.get_shape()[0], rows):
        # a copy of the embedding is allowed
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


def check_finite(name: str, tensor, path, remedy: str):
    """Raise ValueError for NaN and infinity; remedy: the end of the message."""
    # the extremes are not finite if any value is not; 14 times as fast as isfinite().all()
    if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        raise ValueError(f"{name} in {path} holds values that are not finite; {remedy}")


def copy_tokenizer(source: Path, directory: Path):
    """Copy the files of a tokenizer into the directory of a finetuned model."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.resolve().parent != directory.resolve():
                shutil.copy(path, directory)
