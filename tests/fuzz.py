"""Damage every kind of file that the project reads, and check how its commands end.

    python tests/fuzz.py                                    every file, about half a minute
    python tests/fuzz.py --only path.json --mutations 200 --show

Allowed ends:

    same       exit status 0 and the answer of the undamaged files: the damage had no effect
    refused    exit status 2 and one line
    stated     another answer, with a note on standard error, or from a file in which every content
               has a meaning: a user's text, or a result. Tensors and tokens have a digest
Faults:

    silent     another answer without a note
    untidy     another exit status, or more than one line
    traceback  an unexpected error
    hang       no end within 20 seconds

The same seed repeats the same mutations. Needs SIGALRM, so not for Windows. tests/test_disk.py and
its neighbours hold the faults found so far, one by one; this program searches for the next.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.numpy
from conftest import LLAMA, make_l2d, make_lm
from test_checkpoint import shard
from test_formats import SMOLLM
from test_tokenizer import NAMES, SPECIAL, save_form
from tqdm import tqdm

import eval as evaluation
import sample
import train
from data.results import figures
from data.results.records import read_lines
from data.system.disk import sha256_of
from data.text import chat
from data.text.tokenizer import load_tokenizer

try:
    import matplotlib
except ImportError:
    matplotlib = None

LIMIT = 20              # seconds
MEMORY = 16 << 30       # bytes: a number in a file must not allocate all memory
ENDS = ("same", "refused", "stated", "silent", "untidy", "traceback", "hang")
FAULTS = ENDS[3:]
HUB = "openai-community/gpt2/main"
CONFIG = {**LLAMA, "vocab_size": 300}
RECORDS = "out/records.jsonl"
os.environ["HF_HUB_OFFLINE"] = "1"

ASK = "'--prompt=the in' --max_new_tokens=3 --device=cpu"
PATH = "--init_from=WORK/path --base=WORK/base --steps=2 --no-frozen"
READ = f"{PATH} {ASK}"
# folder: a command that reads it, the files that are its answer ("": what it prints), and the files
# to damage, with + after those in which every content has a meaning
TARGETS = {
    "json": (sample, READ, "", "base/config.json base/model.safetensors base/tokenizer.json "
             "base/tokenizer_config.json base/generation_config.json+ path/path.json "
             "path/path.safetensors"),
    "tiktoken": (sample, READ, "", "base/tokenizer.model base/tokenizer_config.json"),
    "vocab": (sample, READ, "", "base/vocab.json base/merges.txt base/tokenizer_config.json"),
    "encoder": (sample, READ, "", "base/encoder.json base/vocab.bpe"),
    "shards": (sample, READ, "", "base/model.safetensors.index.json "
               "base/model-00001-of-00002.safetensors"),
    "chat": (sample, f"--init_from=WORK/base --chat --steps=0 {ASK}", "",
             "base/tokenizer_config.json"),
    "hub": (sample, f"--init_from=gpt2 --cache_dir=WORK --steps=0 {ASK}", "",
            f"{HUB}/complete.json {HUB}/tokenizer.json"),
    "prompts": (sample, f"{PATH} --prompt_file=WORK/prompts.txt --max_new_tokens=3 --device=cpu",
                "", "prompts.txt+"),
    "texts": (chat, "WORK/rows.jsonl --tokenizer=WORK/base --out_dir=WORK/out --val_fraction=0.2",
              "out/*.npy", "rows.jsonl+"),
    "results": (figures, "levels WORK/eval.json", "*.png", "eval.json+"),
    "bench": (evaluation, "--task=gsm8k --init_from=WORK/base --data_dir=WORK --out=WORK/out "
              "--max_new_tokens=2 --shots=0 --device=cpu", RECORDS,
              f"gsm8k/test.jsonl+ gsm8k/train.jsonl {RECORDS}+"),
    "train": (train, "--init_from=resume --out_dir=WORK/out --updates=4", "out/path.safetensors",
              "out/state.safetensors out/log.jsonl data/meta.json data/train.ids.npy "
              "data/train.mask.npy data/train.examples.npy data/train.rows.npy"),
}


# --- the undamaged files: small models, paths, a training, data, results --------------------------

def write_rows(path: Path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build_base(directory: Path, form: str):
    """A random model with a tokenizer of this form."""
    save_form(directory, form)
    make_lm(CONFIG).save_pretrained(directory)
    write_rows(directory / "generation_config.json", {"eos_token_id": [266, 267]})


def build(root: Path):
    for form in ("tiktoken", "json", "vocab", "encoder"):
        build_base(root / form / "base", form)
        make_l2d(CONFIG).save(root / form / "path", updates=1,
                              tokenizer=load_tokenizer(root / form / "base").fingerprint)
    for folder in ("shards", "chat", "prompts", "texts", "bench", "train"):
        shutil.copytree(root / "json", root / folder)
    shard(root / "shards" / "base")
    # a tokenizer with a chat template
    tokenizer = root / "chat" / "base" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    added = {"id": len(SPECIAL) + 265, "content": "<|im_start|>", "special": True}
    content["added_tokens"].append(added)
    tokenizer.write_text(json.dumps(content))
    write_rows(tokenizer.with_name("tokenizer_config.json"), {**NAMES, "chat_template": SMOLLM})
    # what a download leaves
    shutil.copytree(root / "json" / "base", root / "hub" / HUB)
    files = list((root / "hub" / HUB).iterdir())
    write_rows(root / "hub" / HUB / "complete.json", {
        "commit": "c", "sizes": {path.name: path.stat().st_size for path in files},
        "etags": {path.name: sha256_of(path) for path in files}})
    # texts, prompts, a benchmark with the records of a run, a table of eval.py
    write_rows(root / "texts" / "rows.jsonl",
               *[{"question": f"the {i} in", "answer": f"{i} the {i * i}"} for i in range(40)],
               *[{"text": f"the text {i}", "messages": None} for i in range(10)])
    (root / "prompts" / "prompts.txt").write_text("the in\n\u00e9 1234\n", encoding="utf-8")
    for split in ("test", "train"):
        write_rows(root / "bench" / "gsm8k" / f"{split}.jsonl",
                   *[{"question": f"the {i}?", "answer": f"{i} #### {i}"} for i in range(3)])
    call(root, "bench")
    record = {"group": "chains    1", "topic": "chains", "level": 1, "unseen": False,
              "temperature": 0.0, "low": 0.2, "high": 0.8, "nfe_first": [3, 3]}
    columns = [("frozen", "frozen", 0, "euler"), ("euler 2", "fixed", 2, "euler"),
               ("euler 4", "fixed", 4, "euler"), ("dopri5", "adaptive", 1, "dopri5")]
    write_rows(root / "results" / "eval.json", {"accuracy": [
        {**record, "column": column, "kind": kind, "settings": {"steps": steps, "solver": solver},
         "accuracy": 0.5 + 0.1 * place, "nfe_per_token": 2.0 * place}
        for place, (column, kind, steps, solver) in enumerate(columns)]})
    # a training
    work = root / "train"
    chat.main([str(root / "texts" / "rows.jsonl"), f"--tokenizer={work / 'base'}",
               f"--out_dir={work / 'data'}", "--val_fraction=0.2"])
    train.main([f"--init_from={work / 'base'}", f"--data={work / 'data'}",
                f"--out_dir={work / 'out'}", "--updates=2", "--batch_size=2",
                "--width=8", "--cond_dim=8", "--rank=2", "--device=cpu"])


def call(root: Path, folder: str) -> list:
    """Run the command of a folder; returns the content of its answer's files."""
    script, words, files, _ = TARGETS[folder]
    work = root / folder
    script.main(shlex.split(words.replace("WORK", str(work))))
    if files == RECORDS:
        # without the times
        return [(line.get("id"), line.get("output"), line.get("strict"))
                for line in read_lines(work / RECORDS)]
    return [path.read_bytes() for path in sorted(work.glob(files))] if files else []


# --- mutations: each takes the content and returns (its name, the damaged content) ----------------

def mutate(path: Path, rng) -> str:
    """Damage a file in one of many ways; returns which."""
    kinds = {
        ".json": [damage_json] * 4,
        ".jsonl": [damage_json] * 4,
        ".safetensors": [damage_header] * 3 + [damage_arrays] * 2,
        ".npy": [damage_arrays] * 4,
    }.get(path.suffix, [])
    damage = rng.choice([*kinds, damage_bytes, damage_bytes, replace])
    name, content = damage(path.read_bytes(), rng)
    path.unlink()
    if name == "a directory":
        path.mkdir()
    elif name == "a link to itself":
        path.symlink_to(path)
    elif name != "gone":
        path.write_bytes(content)
    return name


def damage_bytes(content, rng):
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 1, 4, 50]))
    some = content[start:end]
    name, new = rng.choice([
        ("lost", b""), ("repeated", some * 2), ("zeroed", bytes(len(some))),
        ("changed", rng.randbytes(len(some))), ("added", some + rng.randbytes(3)),
        ("a bit", bytes([some[0] ^ 1 << rng.randrange(8)]) + some[1:]),
    ])
    return f"bytes {name} at {start}", content[:start] + new + content[end:]


def replace(content, rng):
    text = content.decode("utf-8", errors="replace")
    return rng.choice([
        ("gone", None), ("a directory", None), ("a link to itself", None), ("empty", b""),
        ("cut", content[:rng.randrange(len(content))]), ("doubled", content * 2),
        ("marked", b"\xef\xbb\xbf" + content), ("utf-16", text.encode("utf-16")),
        ("html", b"<html>404</html>"), ("white space", b" \n\t"),
    ])


VALUES = [None, True, False, 0, 1, -1, 2, 1.5, -0.5, 1e30, 1e-30, 10**40, 2**31, 2**63, "", "x",
          "1", "\u2028\x1b[31m", [], [1], [[]], {}, {"a": 1}, float("nan"), float("inf")]


def damage_json(content, rng):
    """One value is removed, replaced, nested, or gets a neighbour."""
    try:
        lines = [json.loads(content)]
    except ValueError:
        lines = [json.loads(line) for line in content.splitlines()]
    owner, key = rng.choice(list(places(rng.choice(lines))))
    how = rng.choice(["removed", "replaced", "replaced", "replaced", "added", "nested"])
    value = rng.choice(VALUES)
    if how == "removed":
        del owner[key]
    elif how == "replaced":
        owner[key] = value
    elif how == "added" and isinstance(owner, dict):
        owner[f"{key}_"] = value
    else:
        owner[key] = "DEEP"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    text = text.replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
    return f"{key} {how}: {str(value)[:20]}", text.encode()


def places(tree):
    """(owner, key) of every value in a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def damage_header(content, rng):
    """The JSON at the beginning of a safetensors file; its stated length is right."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    how, header = damage_json(content[8:end], rng)
    return f"header: {how}", struct.pack("<Q", len(header)) + header + content[end:]


def damage_arrays(content, rng):
    """One array has another type, shape, number or name, or is missing."""
    alone = content.startswith(b"\x93NUMPY")
    arrays = {"array": np.load(io.BytesIO(content))} if alone else safetensors.numpy.load(content)
    name = rng.choice(sorted(arrays))
    array = np.atleast_1d(arrays.pop(name))
    real, signed, unsigned = (array.astype(kind) for kind in (np.float32, np.int64, np.uint64))
    row = rng.randrange(array.size)
    real.flat[row], signed.flat[row] = rng.choice([np.nan, np.inf]), -1
    unsigned.flat[row] = 2**63
    how, array = rng.choice([
        ("not finite", real), ("negative", signed), ("huge", unsigned),
        ("float64", array.astype(np.float64)), ("int8", array.astype(np.int8)),
        ("bool", array.astype(bool)), ("swapped", array.astype(array.dtype.newbyteorder())),
        ("empty", array[:0]), ("shorter", array[:-1]), ("twice", np.stack([array, array])),
        *([("object", array.astype(object))] if alone else [("gone", None), ("renamed", array)]),
    ])
    if alone:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        return how, file.getvalue()
    if array is not None:
        arrays[f"{name}x" if how == "renamed" else name] = array
    header, _ = json.JSONDecoder().raw_decode(content[8:].decode(errors="replace"))
    metadata = header.get("__metadata__")
    return f"{name}: {how}", safetensors.numpy.save(arrays, metadata)


# --- how a command ends ---------------------------------------------------------------------------

class Hang(BaseException):
    """No end within the limit. Not an OSError, which a command would report as its own."""


def alarm(number, frame):
    raise Hang


def end_of(root: Path, folder: str):
    """(0, 2 or the name of a fault, the answer, the errors)."""
    out, error = io.StringIO(), io.StringIO()
    answer = None
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            answer = call(root, folder)
        end = 0
    except SystemExit as stop:
        end = 2 if stop.code == 2 and len(error.getvalue().splitlines()) == 1 else "untidy"
    except Hang:
        end = "hang"
    except BaseException:
        end = "traceback"
        error.write(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    # times are no part of an answer
    printed = re.sub(r"[\d.]+ (tokens/s|s\b|ms/update|min left)", "", out.getvalue())
    return end, answer or printed, error.getvalue()


def fuzz_file(root: Path, folder: str, name: str, args) -> Counter:
    """Mutations of one file of a folder, each of the undamaged one."""
    every_content = name.endswith("+")
    name = name.removesuffix("+")
    work = root / "work" / folder
    counts = Counter()
    # number 0 is undamaged
    for number in range(1 + args.mutations):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root / "clean" / folder, work)
        how = "nothing"
        if number > 0:
            how = mutate(work / name, random.Random(f"{args.seed} {folder} {name} {number}"))
        end, answer, error = end_of(work.parent, folder)
        if number == 0:
            if end != 0:
                raise ValueError(f"{folder}/{name}: the undamaged files end with {end}: {error}")
            expected = answer
            continue
        kind = {0: "silent", 2: "refused"}.get(end, end)
        if end == 0 and answer == expected:
            kind = "same"
        elif end == 0 and (every_content or "note:" in error):
            kind = "stated"
        counts[kind] += 1
        if kind in FAULTS or args.show:
            tqdm.write(f"{kind:9} {folder}/{name}, mutation {number}: {how}")
            tqdm.write(f"          {error.strip()[-2000 if kind == 'traceback' else -300:]}")
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=25, help="of each file (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files with this in their name")
    parser.add_argument("--show", action="store_true", help="every end, not only the faults")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        # built in the place where it is read, since a training stores the names of its directories
        with contextlib.redirect_stdout(io.StringIO()):
            build(root / "work")
        shutil.copytree(root / "work", root / "clean")
        targets = [(folder, name) for folder, (*_, names) in TARGETS.items()
                   for name in names.split() if args.only in f"{folder}/{name}"]
        for folder, name in tqdm(targets, desc="files", disable=None):
            if folder == "results" and matplotlib is None:
                tqdm.write(f"skipped   {folder}/{name}: its reader needs matplotlib")
                continue
            rows[f"{folder}/{name}"] = fuzz_file(root, folder, name, args)
    rows["all"] = sum(rows.values(), Counter())
    print(f"{'file':50}" + "".join(f"{end:>10}" for end in ENDS))
    for name, counts in rows.items():
        print(f"{name[-50:]:50}" + "".join(f"{counts[end]:10}" for end in ENDS))
    sys.exit(any(rows["all"][fault] for fault in FAULTS))


if __name__ == "__main__":
    main()
