"""From conversations to training examples: JSONL files in, token files out.

A conversation gives one example per answer of the assistant, and only the answer counts in the loss
(L2D paper, Section 4). How a conversation is written down is in formats.py, read it before;
how the examples lie on the disk is in data/text/tokens.py, read it next.

    python -m data.text.chat gsm8k.jsonl --tokenizer=tokenizers/llama3 --out_dir=data/gsm8k

A row holds `messages` (a list of role and content, perhaps with a `category`), or `prompt` and
`response`, or `question` and `answer`, or plain `text`.
"""

import argparse
import hashlib
import json
import os
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.checkpoints.families import ModelConfig
from data.parts.draws import check_seed
from data.system.command import command
from data.system.disk import MARKS, PART, claimed, parse_json, read_json, remove
from data.text.formats import (
    RENDER, check_messages, encode_chat, encode_pieces, render_text, resolve_style)
from data.text.tokenizer import load_tokenizer
from data.text.tokens import (
    SPLITS, VERSION, RawSplit, TokenFiles, install, token_dtype, write_split)

# what is about conversations, from one place
__all__ = ["TokenFiles", "encode_chat", "encode_examples", "main", "prepare"]
LONGEST_BLOCK = 2048        # unless the model has fewer positions

# The paper trains on reasoning and code: these categories of smol-magpie-ultra are left out.
PAPER_DROPPED_CATEGORIES = (
    "advice-seeking",
    "brainstorming",
    "creative-writing",
    "editing",
    "planning",
    "role-playing",
)


# --- from a row to examples -----------------------------------------------------------------------

def parse_row(line):
    """A line of JSON to (conversation, category).

    A conversation is a list of messages, or a text; ValueError if the row is neither.
    """
    row = parse_json(line, "the line")
    if not isinstance(row, dict):
        row = {}
    return row_conversation(row), row.get("category")


def row_conversation(row: dict):
    """The messages or the text of a row, whichever way it tells them."""
    # tables of several sources have all columns, and null where a source had none
    row = {name: value for name, value in row.items() if value is not None}
    if "messages" in row:
        return check_messages(row["messages"])
    for question, answer in (("prompt", "response"), ("question", "answer")):
        if question in row and answer in row:
            return check_messages([
                {"role": "user", "content": row[question]},
                {"role": "assistant", "content": row[answer]},
            ])
    text = row.get("text")
    # white space alone is nothing to learn from
    if isinstance(text, str) and text.strip():
        return text
    raise ValueError("needs messages, or prompt and response, or question and answer, or text")


def encode_examples(conversation, tokenizer, style):
    """One example per assistant turn: (ids, spans), spans a list of (start, end) of the responses.

    The example of a span is ids[:end], everything before the turn being context; only
    ids[start:end] count.
    """
    if isinstance(conversation, str):
        pieces = render_text(conversation)
    else:
        _, render = resolve_style(style, tokenizer)
        pieces = render(conversation)
    ids, mask = encode_pieces(pieces, tokenizer)
    # A response is a run of ones; its borders are where the mask changes.
    borders = np.flatnonzero(np.diff(mask, prepend=0, append=0))
    spans = borders.reshape(-1, 2).tolist()
    if not spans:
        raise ValueError("holds no assistant turn to learn from")
    return ids, spans


def split_of(conversation, val_fraction) -> str:
    """Which side a conversation is on."""
    # Decided by its words alone, and so never by the file, the order or the seed: one that occurs
    # twice cannot be trained on and validated with.
    digest = hashlib.sha256(json.dumps(conversation).encode()).digest()
    # eight bytes are as good as uniform over [0, 2^64)
    number = int.from_bytes(digest[:8], "big")
    if number < val_fraction * 2**64:
        return "val"
    return "train"


# --- from files to examples -----------------------------------------------------------------------

def read_lines(paths, digests):
    """Yield (place, line) of all lines that are not blank.

    Fills digests with the SHA-256 of each file.
    """
    total = sum(os.path.getsize(path) for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="encode", disable=None) as progress:
        for path in paths:
            digest = hashlib.sha256()
            # bytes: what is not UTF-8 should cost its own line and not the whole file
            with open(path, "rb") as file:
                check_coding(path, file.read(4))
                file.seek(0)
                for number, line in enumerate(file, start=1):
                    # blank lines too: the digest is that of the file, as sha256sum prints it
                    digest.update(line)
                    progress.update(len(line))
                    if line.strip():
                        yield f"{path}, line {number}", line
            digests.append({"name": Path(path).name, "sha256": digest.hexdigest()})


def check_coding(path, start: bytes):
    """Raise ValueError for a file whose first bytes announce another coding than UTF-8."""
    coding = next((coding for mark, coding in MARKS if start.startswith(mark)), "utf-8")
    if not coding.startswith("utf-8"):
        raise ValueError(f"{path} is in {coding.upper()}; save it as UTF-8")


class Encoder:
    """Lines of JSON to examples in `raw`, a RawSplit per split; counts what it leaves out.

    Keeps no text itself, so the input may be larger than the memory.
    """

    def __init__(self, args, tokenizer, style, raw):
        self.args = args
        self.tokenizer = tokenizer
        self.style = style
        self.raw = raw
        self.counts = Counter()
        self.first_malformed = None

    def add(self, place, line):
        """One line, found at `place`."""
        self.counts["conversations"] += 1
        try:
            conversation, category = parse_row(line)
            if category in self.args.drop_categories:
                self.counts["dropped_category"] += 1
                return
            ids, spans = encode_examples(conversation, self.tokenizer, self.style)
        except ValueError as error:
            # large data sets hold a few broken rows; check_counts has the last word
            self.counts["malformed"] += 1
            self.first_malformed = self.first_malformed or f"{place}: {error}"
            return
        self.write(split_of(conversation, self.args.val_fraction), ids, spans)

    def write(self, split, ids, spans):
        raw = self.raw[split]
        # once for all turns: the later ones begin with the same ids
        ids = np.array(ids, dtype=raw.dtype)
        for start, end in spans:
            # left out and not cut: a cut answer would teach to stop in the middle
            if end > self.args.block_size:
                self.counts["dropped_too_long"] += 1
            else:
                raw.add(ids[:end], start)


def check_counts(counts, first_malformed, examples):
    """ValueError if the input is not what the user thinks it is."""
    read = counts["conversations"]
    malformed = counts["malformed"]
    # so many are no accident: it is another kind of file, or a damaged one
    if malformed > read / 10:
        raise ValueError(f"{malformed} of {read} rows are malformed, "
                         f"the first being {first_malformed}")
    if not examples:
        raise ValueError(f"no training example left of {read} conversations: "
                         f"{counts['dropped_too_long']} examples are longer than --block_size, "
                         f"{counts['dropped_category']} conversations of dropped categories")


# --- all of it ------------------------------------------------------------------------------------

def prepare(args, tokenizer) -> dict:
    """Turn args.inputs into token files in args.out_dir (flags: see main); returns meta.json.

    Raises ValueError if more than a tenth of the rows is malformed or no example is left, OSError
    from the disk. Until everything is written, the directory stays as it was.
    """
    style, _ = resolve_style(args.style, tokenizer)
    out_dir = Path(args.out_dir)
    # inside out_dir, and so on the same disk: to move the files there is only to rename them
    folder = out_dir / f"unfinished{PART}"
    with claimed(out_dir):
        folder.mkdir()
        try:
            meta = write_files(args, tokenizer, style, folder)
            if (out_dir / "meta.json").exists():
                print(f"replacing the data that was prepared in {out_dir} before")
            install(folder, out_dir)
        finally:
            remove(folder)
    return meta


def default_block(directory: str) -> int:
    """The longest row that the model has positions for, if a model is there at all."""
    with suppress(ValueError, OSError):
        config = ModelConfig.from_hf(read_json(Path(directory) / "config.json"))
        return min(LONGEST_BLOCK, config.max_positions)
    return LONGEST_BLOCK


def write_files(args, tokenizer, style, folder: Path) -> dict:
    """Everything that belongs into out_dir, written to `folder`; returns what meta.json holds."""
    inputs = []
    raw = {}
    # the raw files are closed, and so complete, before anything is read from them
    with ExitStack() as stack:
        for split in SPLITS:
            raw[split] = RawSplit(folder / f"{split}.raw", token_dtype(tokenizer))
            stack.callback(raw[split].close)
        encoder = Encoder(args, tokenizer, style, raw)
        for place, line in read_lines(args.inputs, inputs):
            encoder.add(place, line)
    check_counts(encoder.counts, encoder.first_malformed, len(raw["train"].spans))

    meta = {
        "version": VERSION,
        # the name is for people (where it lay on this machine helps nobody), the other is checked
        "tokenizer": Path(args.tokenizer).name,
        "fingerprint": tokenizer.fingerprint,
        "style": style,
        "block_size": args.block_size,
        "seed": args.seed,
        "val_fraction": args.val_fraction,
        "drop_categories": list(args.drop_categories),
        "inputs": inputs,
        "splits": {split: write_split(raw[split], folder / split, args) for split in SPLITS},
        "counts": dict(encoder.counts),
        "first_malformed": encoder.first_malformed,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def report(meta) -> str:
    """What happened, as aligned lines."""
    # a Counter, since meta.json leaves out what never occurred
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
        numbers = [f"{split[name]:,}" for split in splits]
        table.append((name.replace("_", " "), *numbers))
    # what is missing to 100 % is padding, which costs time and teaches nothing
    fills = [mean_fill(split, meta["block_size"]) for split in splits]
    table.append(("mean fill of a row", *fills))

    lines = []
    for name, *cells in table:
        lines.append(f"{name:<20}" + "".join(f"{cell:>15}" for cell in cells))
    if meta["first_malformed"]:
        lines.append(f"first malformed: {meta['first_malformed']}")
    return "\n".join(lines)


def mean_fill(split, block_size) -> str:
    # a validation split may have no rows
    room = max(1, split["rows"] * block_size)
    return f"{split['tokens'] / room:.1%}"


# --- command line ---------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m data.text.chat", description="JSONL conversations to token files")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT.jsonl", help="one JSON row a line")
    add("--tokenizer", required=True, help="tokenizer, as data/text/tokenizer.py loads it")
    add("--out_dir", required=True, help="directory of the token files")
    add("--block_size", type=int,
        help=f"longest row, in tokens; what is longer is dropped (default: {LONGEST_BLOCK}, "
             "or the model's positions where they are fewer)")
    add("--val_fraction", type=float, default=0.01,
        help="share of conversations held out, below 1")
    add("--style", default="auto", choices=["auto", *RENDER],
        help="auto: what the model's own chat template says")
    add("--drop_categories", default="", help="names joined by commas, or paper for the paper's")
    add("--seed", type=int, default=0,
        help="order of the examples (the split does not depend on it)")
    args = parser.parse_args(argv)

    if args.block_size is None:
        args.block_size = default_block(args.tokenizer)
    check_seed(args.seed)
    # "not ... <" also catches nan, which compares as False with everything
    if args.block_size < 2 or not 0 <= args.val_fraction < 1:
        raise ValueError("need block_size >= 2 and 0 <= val_fraction < 1, "
                         f"got {args.block_size} and {args.val_fraction}")
    args.drop_categories = parse_categories(args.drop_categories)
    return args


def parse_categories(text) -> tuple:
    names = [name.strip() for name in text.split(",") if name.strip()]
    # alone only: among others it may be the name of a category
    if names == ["paper"]:
        return PAPER_DROPPED_CATEGORIES
    return tuple(names)


@command("data.text.chat")
def main(argv=None):
    args = parse_args(argv)
    meta = prepare(args, load_tokenizer(args.tokenizer))
    print(report(meta))


if __name__ == "__main__":
    main()
