"""From conversations to training examples: JSONL files in, token files out.

A conversation gives one example per answer of the assistant, and only the answer counts in the loss
(L2D paper, Section 4). Read formats.py before, which formats a conversation; read
data/text/tokens.py next, which writes the examples to the disk.

    python -m data.text.chat gsm8k.jsonl --tokenizer=tokenizers/llama3 --out_dir=data/gsm8k

A row holds `messages` (a list of role and content, and weight 0 for an answer not to be learned),
or `prompt` and `response`, or `question` and `answer`, or plain `text`; perhaps a `system` prompt,
a `category`, by which rows can be dropped, and a `class`, a name or an integer, towards which
guidance can push (sample.py --class). The report names all other columns.
"""

import argparse
import hashlib
import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.checkpoints.families import ModelConfig
from data.parts.draws import check_seed
from data.system.command import check_range, command
from data.system.disk import (
    MARKS, PART, check_regular, claimed, naming, parse_json, read_json, remove,
    sha256_of)
from data.text.formats import (
    EMPTY, RENDER, check_messages, encode_chat, encode_pieces, render_text, resolve_style)
from data.text.tokenizer import load_tokenizer
from data.text.tokens import SPLITS, VERSION, RawSplit, TokenFiles, install, write_split

# all names for work with conversations, in one place
__all__ = ["TokenFiles", "encode_chat", "encode_examples", "load_tokenizer", "main"]
LONGEST_BLOCK = 2048        # unless the model has fewer positions

# The paper trains on reasoning and code: these categories of smol-magpie-ultra are left out.
PAPER_DROPPED_CATEGORIES = (
    "advice-seeking", "brainstorming", "creative-writing", "editing", "planning", "role-playing")
# Columns of a row that say how its conversation begins.
SYSTEM = ("system", "system_prompt")
# Columns without which an answer may be no answer to its question: never left out in silence.
MEANING = (*SYSTEM, "choices", "context", "document", "documents", "function_call", "functions",
           "history", "image", "images", "input", "instruction", "instructions", "options",
           "passage", "reasoning", "reasoning_content", "thinking", "tool_calls", "tools")


# --- from a row to examples -----------------------------------------------------------------------

def parse_row(line):
    """A line of JSON to (messages or a text, category, class's name or None, columns left out).

    Raises ValueError for another row.
    """
    row = parse_json(line, "the line")
    if not isinstance(row, dict):
        row = {}
    # null: a column of another source, in a table made of several
    row = {name: value for name, value in row.items() if value is not None}
    names = []
    for column in ("category", "class"):
        name = row.get(column)
        # by type: to Python True is an integer
        if type(name) is int:
            name = str(name)
        # an empty category is none; an empty class would be a mistake
        known = isinstance(name, str) and (name.strip() or column == "category")
        if name is not None and not known:
            raise ValueError(f"has {column} {repr(name)[:60]}; allowed: a name, or an integer")
        names.append(name)
    conversation, read = find_conversation(row)
    words = conversation
    if not isinstance(conversation, str):
        for name in SYSTEM:
            if row.get(name) not in EMPTY:
                conversation = begin(conversation, row[name], name)
        words = "\n".join(message["content"] for message in conversation)
    return conversation, *names, check_columns(row, read, words)


def find_conversation(row: dict) -> tuple:
    """(messages or a text, the columns that it stands in)."""
    if "messages" in row:
        return check_messages(row["messages"]), ["messages"]
    for question, answer in (("prompt", "response"), ("question", "answer")):
        if question in row and answer in row:
            messages = [{"role": "user", "content": row[question]},
                        {"role": "assistant", "content": row[answer]}]
            return check_messages(messages), [question, answer]
    text = row.get("text")
    # white space alone teaches nothing
    if isinstance(text, str) and text.strip():
        return text, ["text"]
    raise ValueError("needs messages, or prompt and response, or question and answer, or text")


def begin(messages: list, system, column: str) -> list:
    """The messages with the system prompt of a column before them, if it is not there yet."""
    first = check_messages([{"role": "system", "content": system}])
    if messages[0]["role"] != "system":
        return first + messages
    if messages[0] != first[0]:
        raise ValueError(f"has two system prompts, one in column {column!r}; leave one out")
    return messages


def check_columns(row: dict, read, words: str) -> list:
    """The columns that are left out, besides those that are read.

    Raises ValueError for one of MEANING, unless it repeats a part of the words that are read.
    """
    others = [name for name, value in row.items()
              if name not in (*read, "category", "class") and value not in EMPTY]
    for name in others:
        value = row[name]
        repeats = isinstance(value, str) and value in words
        if name.lower() in MEANING and not repeats:
            raise ValueError(f"has a column {name!r}, which is not read; write it into "
                             f"{' or '.join(read)}, or remove the column")
    return [name for name in others if name.lower() not in MEANING]


def encode_examples(conversation, tokenizer, render):
    """(ids, spans): a span (start, end) for each answer of the assistant.

    Its example is ids[:end], of which only ids[start:end] count. render: one of formats.RENDER.
    """
    if isinstance(conversation, str):
        render = render_text
    ids, mask = encode_pieces(render(conversation), tokenizer)
    # a response is a run of ones; its borders are where the mask changes
    borders = np.flatnonzero(np.diff(mask, prepend=0, append=0))
    spans = borders.reshape(-1, 2).tolist()
    if not isinstance(conversation, str):
        # an answer of weight 0 stays in the text, but is not learned
        answers = [message for message in conversation if message["role"] == "assistant"]
        spans = [span for span, answer in zip(spans, answers) if answer.get("weight", 1)]
    if not spans:
        raise ValueError("holds no assistant turn to learn from")
    return ids, spans


def split_of(conversation, val_fraction: float) -> str:
    """The split of a conversation, "train" or "val"."""
    # by its words alone: a conversation that occurs twice cannot be in both splits
    digest = hashlib.sha256(json.dumps(conversation).encode()).digest()
    # eight bytes are practically uniform over [0, 2^64)
    number = int.from_bytes(digest[:8], "big")
    return "val" if number < val_fraction * 2**64 else "train"


# --- from files to examples -----------------------------------------------------------------------

def read_lines(paths, digests: list):
    """Yield (place, line) of all lines that are not blank; append each file's sha256 to digests.

    Raises ValueError for a file with the byte order mark of another encoding than UTF-8.
    """
    for path in paths:
        check_regular(path)
    total = sum(os.path.getsize(path) for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="encode", disable=None) as progress:
        for path in paths:
            digest = hashlib.sha256()
            # bytes, so that an error in UTF-8 is an error of one line
            with open(path, "rb") as file:
                start = file.read(4)
                coding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
                if not coding.startswith("utf-8"):
                    raise ValueError(f"{path} is in {coding.upper()}; save it as UTF-8")
                file.seek(0)
                for number, line in enumerate(file, start=1):
                    digest.update(line)
                    progress.update(len(line))
                    if line.strip():
                        yield f"{path}, line {number}", line
            digests.append({"name": Path(path).name, "sha256": digest.hexdigest()})


def encode_lines(lines, tokenizer, render, raw, block_size, val_fraction, drop_categories):
    """Encode (place, line) pairs into `raw`, a RawSplit per split.

    Returns the counts, the first error, the names of the classes, in order of appearance, and those
    of the columns that are left out.
    Raises ValueError if more than a tenth of the lines is malformed or no example is left.
    """
    counts = Counter()
    first_malformed = None
    # name -> number
    classes = {}
    left_out = set()
    for place, line in lines:
        counts["conversations"] += 1
        try:
            conversation, category, label, others = parse_row(line)
            left_out.update(others)
            if category in drop_categories:
                counts["dropped_category"] += 1
                continue
            ids, spans = encode_examples(conversation, tokenizer, render)
        # large data sets hold a few malformed rows
        except ValueError as error:
            counts["malformed"] += 1
            first_malformed = first_malformed or f"{place}: {error}"
            continue
        split = raw[split_of(conversation, val_fraction)]
        # one array for all turns: the later ones begin with the same ids
        ids = np.array(ids, dtype=split.dtype)
        for start, end in spans:
            # dropped and not cut: a cut answer would teach to stop in the middle
            if end > block_size:
                counts["dropped_too_long"] += 1
                continue
            class_id = -1 if label is None else classes.setdefault(label, len(classes))
            split.add(ids[:end], start, class_id)

    # many malformed rows: the file is of another kind, or damaged
    if counts["malformed"] > counts["conversations"] / 10:
        raise ValueError(f"{counts['malformed']} of {counts['conversations']} rows are malformed, "
                         f"the first being {first_malformed}")
    if not raw["train"].numbers:
        raise ValueError(f"no training example left of {counts['conversations']} conversations: "
                         f"{counts['dropped_too_long']} examples are longer than --block_size, "
                         f"{counts['dropped_category']} conversations of dropped categories, "
                         f"{len(raw['val'].numbers) // 3} examples held out by --val_fraction")
    return counts, first_malformed, list(classes), sorted(left_out)


# --- command line ---------------------------------------------------------------------------------

def report(meta) -> str:
    """The counts of meta.json, as aligned lines."""
    # a Counter, since meta.json omits zeros
    counts = Counter(meta["counts"])
    splits = [meta["splits"][split] for split in SPLITS]
    table = [
        ("chat format", meta["style"]),
        ("conversations read", f"{counts['conversations']:,}"),
        ("malformed", f"{counts['malformed']:,}"),
        ("dropped by category", f"{counts['dropped_category']:,}"),
        ("examples too long", f"{counts['dropped_too_long']:,}"),
        ("", *SPLITS),
    ]
    for name in splits[0]:
        table.append((name.replace("_", " "), *[f"{split[name]:,}" for split in splits]))
    # the rest is padding, which costs time and teaches nothing; a validation split may have no rows
    rooms = [max(1, split["rows"] * meta["block_size"]) for split in splits]
    fills = [f"{split['tokens'] / room:.1%}" for split, room in zip(splits, rooms)]
    table.append(("mean fill of a row", *fills))
    lines = [f"{name:<20}" + "".join(f"{cell:>15}" for cell in cells) for name, *cells in table]
    if meta["classes"]:
        lines.append(f"classes: {', '.join(meta['classes'])}")
    if meta["left_out"]:
        lines.append(f"columns left out: {', '.join(meta['left_out'])}")
    if meta["first_malformed"]:
        lines.append(f"first malformed: {meta['first_malformed']}")
    return "\n".join(lines)


def default_block(directory: str) -> int:
    """LONGEST_BLOCK, or the positions of the model in the directory if they are fewer."""
    with suppress(ValueError, OSError):
        config = ModelConfig.from_hf(read_json(Path(directory) / "config.json"))
        return min(LONGEST_BLOCK, config.max_positions)
    return LONGEST_BLOCK


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m data.text.chat", description="JSONL conversations to token files")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT.jsonl", help="files of one JSON row a line")
    add("--tokenizer", required=True, help="directory of the tokenizer's files")
    add("--out_dir", required=True, help="directory of the token files")
    add("--block_size", type=int,
        help=f"longest row, in tokens; longer examples are dropped (default: {LONGEST_BLOCK}, "
             "or the model's positions if they are fewer)")
    add("--val_fraction", type=float, default=0.01,
        help="share of conversations for validation, below 1")
    add("--style", default="auto", choices=["auto", *RENDER],
        help="chat format (auto: that of the model's own chat template)")
    add("--drop_categories", default="",
        help="categories to drop, separated by commas (paper: those that the paper drops)")
    add("--seed", type=int, default=0,
        help="seed for the order of the examples (the split does not depend on it)")
    args = parser.parse_args(argv)

    if args.block_size is None:
        args.block_size = default_block(args.tokenizer)
    check_seed(args.seed)
    check_range("--block_size", args.block_size, 2)
    # also refuses nan, which compares as False with everything
    if not 0 <= args.val_fraction < 1:
        raise ValueError(f"--val_fraction = {args.val_fraction} is out of range; "
                         "allowed: 0 to 1, without 1")
    names = [name.strip() for name in args.drop_categories.split(",") if name.strip()]
    # "paper" among other names is a category
    args.drop_categories = PAPER_DROPPED_CATEGORIES if names == ["paper"] else tuple(names)
    return args


@command("data.text.chat")
def main(argv=None):
    args = parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    style, render = resolve_style(args.style, tokenizer)
    # two bytes a token if they are enough
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    out_dir = Path(args.out_dir)
    # inside out_dir, so on its disk: a finished file is only renamed, and until then the old stay
    folder = out_dir / f"unfinished{PART}"
    inputs = []
    with claimed(out_dir), naming(out_dir):
        # of a killed run
        remove(folder)
        folder.mkdir()
        try:
            raw = {split: RawSplit(folder / f"{split}.raw", dtype) for split in SPLITS}
            # the raw files are closed, so complete, before they are read
            with raw["train"].file, raw["val"].file:
                counts, first_malformed, classes, left_out = encode_lines(
                    read_lines(args.inputs, inputs), tokenizer, render, raw, args.block_size,
                    args.val_fraction, args.drop_categories)
            splits = {split: write_split(raw[split], folder / split, args.block_size, args.seed,
                                         len(classes))
                      for split in SPLITS}
            meta = {
                "version": VERSION,
                "tokenizer": Path(args.tokenizer).name,
                "fingerprint": tokenizer.fingerprint,
                "style": style,
                "block_size": args.block_size,
                "seed": args.seed,
                "val_fraction": args.val_fraction,
                "drop_categories": list(args.drop_categories),
                "classes": classes,
                "inputs": inputs,
                "splits": splits,
                "digests": {path.name: sha256_of(path) for path in sorted(folder.glob("*.npy"))},
                "counts": dict(counts),
                "first_malformed": first_malformed,
                "left_out": left_out,
            }
            (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            if (out_dir / "meta.json").exists():
                print(f"replacing the data that was prepared in {out_dir} before")
            install(folder, out_dir)
        finally:
            remove(folder)
    print(report(meta))


if __name__ == "__main__":
    main()
