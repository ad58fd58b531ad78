"""Damage every file that the project reads, one at a time, and look at how its commands end.

    python tests/fuzz.py                                    every file, about half a minute
    python tests/fuzz.py --only path.json --mutations 200 --show

Good ends:

    same       exit status 0 and the answer of the undamaged files: the damage did not matter
    refused    exit status 2 and one line
    stated     another answer, with a note on the error stream, or from a file in which every content
               means something: a user's text, or a number among a training's numbers
Faults:

    silent     another answer without a word
    untidy     another exit status, or more than one line
    traceback  an error that nobody expected
    hang       no end within 20 seconds

One seed repeats the same mutations. Needs an alarm, so not on Windows. tests/test_disk.py and its
neighbours hold the faults that were found, one by one; this looks for the next.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from conftest import LLAMA, make_lm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_formats import SMOLLM
from test_tokenizer import NAMES, SPECIAL, save_form
from tqdm import tqdm

import eval as evaluation
import sample
import train
from data.results import figures
from data.results.records import read_lines
from data.text import chat
from data.text.tokenizer import load_tokenizer
from diffusion import L2D, L2DConfig
from model import LM

LIMIT = 20              # seconds
MEMORY = 16 << 30       # bytes: a number in a file must not ask for all there is
ENDS = ("same", "refused", "stated", "silent", "untidy", "traceback", "hang")
FAULTS = ENDS[3:]


# --- what is damaged: small models, paths, a training, data, results -------------------------------

def build_base(directory: Path, form: str, seed=0):
    """A random model with a tokenizer of this form."""
    save_form(directory, form)
    make_lm({**LLAMA, "vocab_size": 300}, seed).save_pretrained(directory)
    ends = {"eos_token_id": [266, 267]}
    (directory / "generation_config.json").write_text(json.dumps(ends))


def build_path(directory: Path, base: Path):
    torch.manual_seed(0)
    l2d = L2D(LM.from_pretrained(base, device="cpu"), L2DConfig(16, 24, rank=4))
    with torch.no_grad():
        for p in l2d.path_parameters().values():
            p += 0.2 * torch.randn(p.shape)
    l2d.save(directory, tokenizer=load_tokenizer(base).fingerprint, updates=1)


def build_shards(directory: Path):
    """The same weights in two files and an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def build_conversations(path: Path):
    rows = [{"question": f"the {i} in", "answer": f"{i} the {i * i}"} for i in range(40)]
    rows += [{"text": f"the text {i}", "messages": None} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build_chat(directory: Path):
    build_base(directory, "json")
    content = json.loads((directory / "tokenizer.json").read_text())
    added = {"id": len(SPECIAL) + 265, "content": "<|im_start|>", "special": True}
    content["added_tokens"].append(added)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = {**NAMES, "chat_template": SMOLLM}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def build_cache(directory: Path):
    """What a download leaves."""
    folder = directory / "openai-community" / "gpt2" / "main"
    build_base(folder, "json")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "complete.json").write_text(json.dumps({"commit": "c", "sizes": sizes}))


def build_results(path: Path):
    """In the form of eval.py, numbers invented."""
    record = {"group": "chains    1", "topic": "chains", "level": 1, "unseen": False,
              "temperature": 0.0, "low": 0.2, "high": 0.8, "nfe_first": [3, 3]}
    columns = [("frozen", "frozen", {"steps": 0, "solver": "euler"}),
               ("euler 2", "fixed", {"steps": 2, "solver": "euler"}),
               ("euler 4", "fixed", {"steps": 4, "solver": "euler"}),
               ("dopri5", "adaptive", {"steps": 1, "solver": "dopri5"})]
    records = [
        {**record, "column": column, "kind": kind, "settings": settings,
         "accuracy": 0.5 + 0.1 * place, "nfe_per_token": 2.0 * place}
        for place, (column, kind, settings) in enumerate(columns)]
    path.write_text(json.dumps({"accuracy": records}))


def build_benchmark(folder: Path):
    folder.mkdir()
    for split in ("test", "train"):
        rows = [{"question": f"the {i}?", "answer": f"{i} #### {i}"} for i in range(3)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def build(root: Path):
    for form in ("tiktoken", "json", "vocab", "encoder"):
        build_base(root / form / "base", form)
        build_path(root / form / "path", root / form / "base")
    shutil.copytree(root / "json", root / "shards")
    build_shards(root / "shards" / "base")
    build_chat(root / "chat" / "base")
    build_cache(root / "hub")
    for name in ("texts", "results", "prompts"):
        (root / name).mkdir()
    build_conversations(root / "texts" / "rows.jsonl")
    build_results(root / "results" / "eval.json")
    shutil.copytree(root / "json", root / "prompts", dirs_exist_ok=True)
    (root / "prompts" / "prompts.txt").write_text("the in\n\u00e9 1234\n", encoding="utf-8")
    shutil.copytree(root / "json" / "base", root / "bench" / "base")
    build_benchmark(root / "bench" / "gsm8k")
    evaluate(root / "bench")
    shutil.copytree(root / "json" / "base", root / "train" / "base")
    prepare_data(root / "texts" / "rows.jsonl", root / "train" / "base", root / "train" / "data")
    train.main([f"--init_from={root / 'train' / 'base'}", f"--data={root / 'train' / 'data'}",
                f"--out_dir={root / 'train' / 'out'}", "--updates=2", "--batch_size=2",
                "--width=8", "--cond_dim=8", "--rank=2", "--device=cpu"])


# --- what reads it --------------------------------------------------------------------------------

def answer(work: Path, prompt="--prompt=the in"):
    sample.main([f"--init_from={work / 'path'}", f"--base={work / 'base'}", prompt,
                 "--steps=2", "--max_new_tokens=3", "--device=cpu", "--no-frozen"])


def answer_prompts(work: Path):
    answer(work, f"--prompt_file={work / 'prompts.txt'}")


def answer_chat(work: Path):
    sample.main([f"--init_from={work / 'base'}", "--prompt=the in", "--chat", "--steps=0",
                 "--max_new_tokens=3", "--device=cpu"])


def answer_from_hub(work: Path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    sample.main(["--init_from=gpt2", f"--cache_dir={work}", "--prompt=the in", "--steps=0",
                 "--max_new_tokens=3", "--device=cpu"])


def resume(work: Path):
    # what it prints has the clock in it
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(["--init_from=resume", f"--out_dir={work / 'out'}", "--updates=4"])
    print(content_of(work / "out", "path.safetensors"))


def prepare_data(rows: Path, tokenizer: Path, out: Path):
    chat.main([str(rows), f"--tokenizer={tokenizer}", f"--out_dir={out}", "--val_fraction=0.2"])


def prepare(work: Path):
    prepare_data(work / "rows.jsonl", work.parent / "json" / "base", work / "out")
    print(content_of(work / "out", "*.npy"))


def evaluate(work: Path):
    # the table has the clock in it
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.main(["--task=gsm8k", f"--init_from={work / 'base'}", f"--data_dir={work}",
                         f"--out={work / 'out'}", "--max_new_tokens=2", "--shots=0",
                         "--device=cpu"])
    lines = read_lines(work / "out" / "records.jsonl")
    print([(line.get("id"), line.get("output"), line.get("strict")) for line in lines])


def draw(work: Path):
    figures.main(["levels", str(work / "eval.json")])
    print(content_of(work, "*.png"))


def content_of(directory: Path, pattern: str) -> str:
    return " ".join(hashlib.sha256(path.read_bytes()).hexdigest()[:12]
                    for path in sorted(directory.glob(pattern)))


HUB = "openai-community/gpt2/main"
# (folder, file in it, who reads it, whether every content of it means something)
TARGETS = [
    ("json", "base/config.json", answer, False),
    ("json", "base/model.safetensors", answer, False),
    ("json", "base/tokenizer.json", answer, False),
    ("json", "base/tokenizer_config.json", answer, False),
    ("json", "base/generation_config.json", answer, True),
    ("json", "path/path.json", answer, False),
    ("json", "path/path.safetensors", answer, True),
    ("tiktoken", "base/tokenizer.model", answer, False),
    ("tiktoken", "base/tokenizer_config.json", answer, False),
    ("vocab", "base/vocab.json", answer, False),
    ("vocab", "base/merges.txt", answer, False),
    ("vocab", "base/tokenizer_config.json", answer, False),
    ("encoder", "base/encoder.json", answer, False),
    ("encoder", "base/vocab.bpe", answer, False),
    ("shards", "base/model.safetensors.index.json", answer, False),
    ("shards", "base/model-00001-of-00002.safetensors", answer, False),
    ("chat", "base/tokenizer_config.json", answer_chat, False),
    ("hub", f"{HUB}/complete.json", answer_from_hub, False),
    ("hub", f"{HUB}/tokenizer.json", answer_from_hub, False),
    ("prompts", "prompts.txt", answer_prompts, True),
    ("texts", "rows.jsonl", prepare, True),
    ("results", "eval.json", draw, True),
    ("bench", "gsm8k/test.jsonl", evaluate, True),
    ("bench", "gsm8k/train.jsonl", evaluate, False),
    ("bench", "out/records.jsonl", evaluate, True),
    ("train", "out/state.safetensors", resume, True),
    ("train", "out/log.jsonl", resume, False),
    ("train", "data/meta.json", resume, False),
    ("train", "data/train.ids.npy", resume, True),
    ("train", "data/train.mask.npy", resume, True),
    ("train", "data/train.examples.npy", resume, True),
    ("train", "data/train.rows.npy", resume, True),
]


# --- mutations ------------------------------------------------------------------------------------

def mutate(path: Path, rng):
    """Damage a file in one of many ways; returns in which."""
    content = path.read_bytes()
    kinds = [damage_bytes, damage_bytes, replace_file]
    if path.suffix in (".json", ".jsonl"):
        kinds = [damage_json] * 4 + kinds
    if path.suffix == ".safetensors":
        kinds = [damage_header] * 3 + [damage_values] * 2 + kinds
    if path.suffix == ".npy":
        kinds = [damage_array] * 4 + kinds
    return rng.choice(kinds)(path, content, rng)


def damage_bytes(path, content, rng):
    """A stretch is lost, repeated, zeroed, changed or put in."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 1, 4, 50]))
    middle, name = rng.choice([
        (b"", "bytes lost"), (content[start:end] * 2, "bytes repeated"),
        (bytes(end - start), "bytes zeroed"), (rng.randbytes(end - start), "bytes changed"),
        (content[start:end] + rng.randbytes(3), "bytes put in"),
        (bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1:end], "a bit"),
    ])
    path.write_bytes(content[:start] + middle + content[end:])
    return f"{name} at {start}"


def replace_file(path, content, rng):
    """It is another, or none."""
    name = rng.choice(["gone", "a directory", "empty", "cut", "longer", "marked", "utf-16", "html",
                       "white space", "a link to itself"])
    path.unlink()
    text = content.decode("utf-8", errors="replace")
    if name == "a directory":
        path.mkdir()
    elif name == "a link to itself":
        path.symlink_to(path)
    elif name != "gone":
        path.write_bytes({
            "empty": b"", "cut": content[:rng.randrange(len(content))], "longer": content * 2,
            "marked": b"\xef\xbb\xbf" + content, "utf-16": text.encode("utf-16"),
            "html": b"<html>404</html>", "white space": b" \n\t",
        }[name])
    return name


VALUES = [None, True, False, 0, 1, -1, 2, 1.5, -0.5, 1e30, 1e-30, 10**40, 2**31, 2**63, "", "x",
          "1", "\u2028\x1b[31m", [], [1], [[]], {}, {"a": 1}, float("nan"), float("inf")]


def damage_json(path, content, rng):
    """One node is removed, replaced, doubled, renamed or nested."""
    lines = path.suffix == ".jsonl"
    parts = content.decode().splitlines() if lines else [content.decode()]
    row = rng.randrange(len(parts))
    tree = json.loads(parts[row])
    *where, last = rng.choice(nodes(tree))
    owner = tree
    for key in where:
        owner = owner[key]
    how = rng.choice(["removed", "replaced", "replaced", "replaced", "added", "nested"])
    value = rng.choice(VALUES)
    if how == "removed":
        del owner[last]
    elif how == "replaced":
        owner[last] = value
    elif how == "added" and isinstance(owner, dict):
        owner[f"{last}_"] = value
    else:
        owner[last] = "DEEP"
    text = json.dumps(tree).replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
    parts[row] = text
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return f"{'.'.join(map(str, [*where, last]))} {how} {str(value)[:20] if how != 'removed' else ''}"


def nodes(tree, path=()):
    """The place of every value but the whole."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        found += nodes(value, (*path, key)) if isinstance(value, (dict, list)) else [(*path, key)]
    return found


def damage_header(path, content, rng):
    """The JSON at the beginning of a safetensors file, its length set right."""
    size = struct.unpack("<Q", content[:8])[0]
    header = path.with_suffix(".json.tmp")
    header.write_bytes(content[8:8 + size])
    how = damage_json(header, header.read_bytes(), rng)
    new = header.read_bytes()
    header.unlink()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size:])
    return f"header: {how}"


def damage_values(path, content, rng):
    """One tensor: not a number, another type, another number, another shape, renamed, gone."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    how = rng.choice(["nan", "inf", "type", "shape", "renamed", "gone", "more"])
    if how in ("nan", "inf") and tensor.is_floating_point():
        tensor.view(-1)[rng.randrange(tensor.numel())] = float(how)
    elif how == "type":
        tensors[name] = tensor.to(rng.choice([torch.int8, torch.float64, torch.bool]))
    elif how == "shape":
        tensors[name] = tensor.reshape(1, -1)
    elif how == "more":
        tensors[f"{name}.scales"] = torch.ones(1)
    else:
        value = tensors.pop(name)
        if how == "renamed":
            tensors[f"{name}x"] = value
    save_file(tensors, path, metadata)
    return f"{name}: {how}"


def damage_array(path, content, rng):
    """Another type, shape or order, or one number changed."""
    array = np.load(path)
    how = rng.choice(["float", "object", "two columns", "shorter", "negative", "large", "swapped",
                      "signed", "empty"])
    new = {
        "float": array.astype(np.float32), "object": array.astype(object),
        "two columns": np.stack([array, array]), "shorter": array[:-1],
        "negative": array.astype(np.int64), "large": array.astype(np.uint64),
        "swapped": array.astype(array.dtype.newbyteorder()), "signed": array.astype(np.int64),
        "empty": array[:0],
    }[how].copy()
    if how in ("negative", "large"):
        new[rng.randrange(len(new))] = -1 if how == "negative" else 2**63
    np.save(path, new, allow_pickle=True)
    return how


# --- how a command ends ---------------------------------------------------------------------------

class Hang(BaseException):
    """No end within the limit."""


def alarm(number, frame):
    raise Hang


def end_of(reader, work: Path):
    """(how it ended, its output, its errors), how: 0, 2 or the name of a fault."""
    out, error = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            reader(work)
        end = 0
    except SystemExit as stop:
        lines = error.getvalue().splitlines()
        end = 2 if stop.code == 2 and len(lines) == 1 else "untidy"
    except Hang:
        end = "hang"
    except BaseException:
        end = "traceback"
        error.write(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    # the clock is no part of an answer
    printed = re.sub(r"[\d.]+ (tokens/s|s\b|ms/update|min left)", "", out.getvalue())
    return end, printed, error.getvalue()


def judge(end, printed, noted, expected, every_content) -> str:
    if end == 2:
        return "refused"
    if end != 0:
        return end
    if printed == expected:
        return "same"
    return "stated" if every_content or noted else "silent"


def fuzz_file(root: Path, target, mutations: int, seed: int, show: bool) -> Counter:
    """Mutations of one file, each of the undamaged one."""
    folder, name, reader, every_content = target
    work = root / "work" / folder
    clean = root / "clean" / folder
    restore(clean, work)
    end, expected, error = end_of(reader, work)
    if end != 0:
        raise ValueError(f"{folder}/{name}: the undamaged files end with {end}: {error}")
    counts = Counter()
    for number in range(mutations):
        restore(clean, work)
        rng = random.Random(f"{seed} {folder} {name} {number}")
        how = mutate(work / name, rng)
        end, printed, error = end_of(reader, work)
        kind = judge(end, printed, "note:" in error, expected, every_content)
        counts[kind] += 1
        if kind in FAULTS or show:
            tqdm.write(f"{kind:9} {folder}/{name}, mutation {number}: {how}")
            tqdm.write(f"          {error.strip()[-2000 if kind == 'traceback' else -300:]}")
    return counts


def restore(clean: Path, work: Path):
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(clean, work)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=25, help="of each file (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files with this in their name")
    parser.add_argument("--show", action="store_true", help="every end, not only the faults")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    total = Counter()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        # built where it is read, since a training keeps the names of its directories
        with contextlib.redirect_stdout(io.StringIO()):
            build(root / "work")
        shutil.copytree(root / "work", root / "clean")
        targets = [t for t in TARGETS if args.only in f"{t[0]}/{t[1]}"]
        for target in tqdm(targets, desc="files", disable=None):
            counts = fuzz_file(root, target, args.mutations, args.seed, args.show)
            rows.append((f"{target[0]}/{target[1]}", counts))
            total.update(counts)
    print(f"{'file':50}" + "".join(f"{end:>10}" for end in ENDS))
    for name, counts in [*rows, ("all", total)]:
        print(f"{name[-50:]:50}" + "".join(f"{counts[end]:10}" for end in ENDS))
    sys.exit(any(total[fault] for fault in FAULTS))


if __name__ == "__main__":
    main()
