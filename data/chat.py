"""Conversations: the chat formats, their way into token files, and the dataset that training reads.

In the order of the file: how each model family writes a conversation down (`render_*`), how the answers in it
become training examples (paper Section 4: loss on the assistant's turns only), how a JSONL file becomes
memory-mapped arrays (`main`), and how these are read (`TokenFiles`). Read data/tokenizer.py before, train.py after.

    python -m data.chat gsm8k.jsonl --tokenizer=tokenizers/llama3 --out_dir=data/gsm8k

A row holds `messages` (a list of role and content, perhaps with a `category`), or `prompt` and `response`,
or `question` and `answer`, or plain `text`.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from array import array
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.tokenizer import load_tokenizer

VERSION = 1
SPLITS = ("train", "val")
ARRAYS = ("ids", "mask", "examples", "rows")
# The paper trains on reasoning and code: these categories of smol-magpie-ultra are left out.
PAPER_DROPPED_CATEGORIES = ("advice-seeking", "brainstorming", "creative-writing", "editing", "planning",
                            "role-playing")

# --- the formats ----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A stretch of a written-down conversation."""
    text: str
    special: bool = False   # one special token, looked up by name; the words of a message never become one
    response: bool = False  # what the assistant itself has to produce: the only part that counts in the loss


# What each format needs. The official Llama template prints the day it is run; a fixed day makes runs repeatable.
SPECIAL_TOKENS = {"llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                  "qwen": ("<|im_start|>", "<|im_end|>"),
                  "plain": ()}
LLAMA3_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def split_system(messages, default):
    """The system prompt (or the default) and the messages after it."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return default, messages


def render_llama3(messages: list[dict], add_generation_prompt: bool = False) -> list[Piece]:
    """The format of Llama 3.1 and 3.2 Instruct; like the official template it trims every content."""
    system, messages = split_system(messages, default="")
    turns = [("system", LLAMA3_DATES + system.strip())]
    turns += [(message["role"], message["content"].strip()) for message in messages]

    def header(role):
        return [Piece("<|start_header_id|>", special=True), Piece(role),
                Piece("<|end_header_id|>", special=True), Piece("\n\n")]

    pieces = [Piece("<|begin_of_text|>", special=True)]
    for role, content in turns:
        answer = role == "assistant"
        pieces += header(role) + [Piece(content, response=answer), Piece("<|eot_id|>", special=True, response=answer)]
    return pieces + header("assistant") if add_generation_prompt else pieces


def render_qwen(messages: list[dict], add_generation_prompt: bool = False) -> list[Piece]:
    """The format of Qwen 2.5 Instruct; the contents stay exactly as they are."""
    system, messages = split_system(messages, default=QWEN_SYSTEM)
    turns = [("system", system)] + [(message["role"], message["content"]) for message in messages]

    pieces = []
    for role, content in turns:
        answer = role == "assistant"
        pieces += [Piece("<|im_start|>", special=True), Piece(role + "\n"), Piece(content, response=answer),
                   Piece("<|im_end|>", special=True, response=answer), Piece("\n")]
    if add_generation_prompt:
        pieces += [Piece("<|im_start|>", special=True), Piece("assistant\n")]
    return pieces


def render_plain(messages: list[dict], add_generation_prompt: bool = False) -> list[Piece]:
    """Questions and answers for base models (GPT-2), which know no chat format.

    The special pieces "bos" and "eos" stand for the tokenizer's own first and last token, whatever they are called.
    """
    system, messages = split_system(messages, default="")
    pieces = [Piece("bos", special=True)] + ([Piece(system + "\n\n")] if system else [])
    for message in messages:
        if message["role"] == "assistant":
            # The space belongs to the answer: these vocabularies hold " word", and a prompt ending in " " derails them.
            pieces += [Piece("Answer:"), Piece(" " + message["content"], response=True),
                       Piece("eos", special=True, response=True)]
        else:
            pieces += [Piece(f"Question: {message['content']}\n")]
    return pieces + [Piece("Answer:")] if add_generation_prompt else pieces


def render_text(text):
    """A document: the first token has nothing before it to be predicted from, all others count."""
    return [Piece("bos", special=True), Piece(text, response=True), Piece("eos", special=True, response=True)]


RENDER = {"llama3": render_llama3, "qwen": render_qwen, "plain": render_plain}


def chat_style(tokenizer) -> str:
    """"llama3", "qwen" or "plain": the format whose end of turn is the tokenizer's end of text.

    Base models of both families know the chat tokens too but end a text otherwise: they were not taught to chat, so "plain".
    """
    ends = {style: names[-1] for style, names in SPECIAL_TOKENS.items() if names and all(name in tokenizer.special for name in names)}
    return next((style for style, end in ends.items() if tokenizer.special[end] == tokenizer.eos_id), "plain")


def resolve_style(style, tokenizer):
    """The format to use; ValueError if it does not exist or the tokenizer cannot write it."""
    if style == "auto":
        return chat_style(tokenizer)
    if style not in RENDER:
        raise ValueError(f"chat style {style!r} is none of auto, {', '.join(RENDER)}")
    missing = [name for name in SPECIAL_TOKENS[style] if name not in tokenizer.special]
    if missing:
        raise ValueError(f"chat style {style!r} needs the special token {missing[0]}, which this tokenizer lacks; "
                         f"use --style={chat_style(tokenizer)}")
    return style


def encode_pieces(pieces, tokenizer):
    """Pieces to (ids, mask), two lists of equal length; mask is 1 where a token belongs to a response."""
    ids, mask = [], []
    # Neighbours of one kind are encoded together, because a vocabulary may hold a token across their border. A
    # response starts afresh: so it does when it is generated.
    for (special, response), run in groupby(pieces, key=lambda piece: (piece.special, piece.response)):
        texts = [piece.text for piece in run]
        new = special_ids(texts, tokenizer) if special else tokenizer.encode("".join(texts))
        ids += new
        mask += [int(response)] * len(new)
    if mask:
        mask[0] = 0
    return ids, mask


def special_ids(names, tokenizer):
    """The ids of special pieces; "bos" is left out where the model expects nothing before a text."""
    ends = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    ids = [ends[name] if name in ends else tokenizer.special[name] for name in names]
    return [id for id in ids if id is not None]


def check_messages(messages) -> list[dict]:
    """The messages, reduced to role and content; ValueError if the formats cannot write them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list with at least one message, not {str(messages)[:60]!r}")
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"role must be system, user or assistant, not {str(role)[:60]!r}")
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise ValueError(f"content of a message from {role} must be text, not {str(content)[:60]!r}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def encode_chat(messages: list[dict], tokenizer, style: str = "auto", add_generation_prompt: bool = True) -> list[int]:
    """A conversation as token ids, ready for the assistant's next turn if `add_generation_prompt`.

    style: "llama3", "qwen", "plain", or "auto" for chat_style(tokenizer).
    Raises ValueError for an unknown style, a special token that the tokenizer lacks, or malformed messages.
    """
    render = RENDER[resolve_style(style, tokenizer)]
    return encode_pieces(render(check_messages(messages), add_generation_prompt), tokenizer)[0]


# --- from rows to examples ------------------------------------------------------------------------


def parse_row(line):
    """A line of JSON to (conversation, category): a list of messages or a text; ValueError if it is neither."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    row = row if isinstance(row, dict) else {}
    if "messages" in row:
        return check_messages(row["messages"]), row.get("category")
    for question, answer in (("prompt", "response"), ("question", "answer")):
        if question in row and answer in row:
            pair = [{"role": "user", "content": row[question]}, {"role": "assistant", "content": row[answer]}]
            return check_messages(pair), row.get("category")
    if isinstance(row.get("text"), str) and row["text"].strip():
        return row["text"], row.get("category")
    raise ValueError("needs messages, or prompt and response, or question and answer, or text")


def encode_examples(conversation, tokenizer, style):
    """One example per assistant turn: (ids, spans), spans a list of (start, end) of the responses in ids.

    The example of a span is ids[:end], everything before the turn being context; only ids[start:end] count.
    """
    pieces = render_text(conversation) if isinstance(conversation, str) else RENDER[style](conversation)
    ids, mask = encode_pieces(pieces, tokenizer)
    # A response is a run of ones; its borders are where the mask changes.
    spans = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2).tolist()
    if not spans:
        raise ValueError("holds no assistant turn to learn from")
    return ids, spans


def split_of(conversation, val_fraction):
    """Which side a conversation is on: decided by its words alone, so never by the file, the order or the seed."""
    digest = hashlib.sha256(json.dumps(conversation).encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


# --- from examples to files: encode in input order to raw files, then copy from there in shuffled order 


def read_lines(paths, digests):
    """Yield (place, line) of all lines that are not blank; fills digests with the SHA-256 of each file."""
    total = sum(os.path.getsize(path) for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="encode", disable=None) as progress:
        for path in paths:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    digest.update(line)
                    progress.update(len(line))
                    if line.strip():
                        yield f"{path}, line {number}", line
            digests.append({"name": Path(path).name, "sha256": digest.hexdigest()})


def encode_files(args, tokenizer, style, folder):
    """Append the tokens of every example to folder/SPLIT.raw.

    Only two numbers per example stay in memory. Returns (counts, first malformed row, inputs, spans), where
    spans[split] is an array [examples, 2] of length and response start, in tokens.
    """
    counts, first_malformed, inputs = Counter(), None, []
    spans = {split: array("q") for split in SPLITS}
    with ExitStack() as stack:
        raw = {split: stack.enter_context(open(folder / f"{split}.raw", "wb")) for split in SPLITS}
        for place, line in read_lines(args.inputs, inputs):
            counts["conversations"] += 1
            try:
                conversation, category = parse_row(line)
                if category in args.drop_categories:
                    counts["dropped_category"] += 1
                    continue
                ids, responses = encode_examples(conversation, tokenizer, style)
            except ValueError as error:
                counts["malformed"] += 1
                first_malformed = first_malformed or f"{place}: {error}"
                continue
            split, ids = split_of(conversation, args.val_fraction), np.array(ids, dtype=token_dtype(tokenizer))
            for start, end in responses:
                if end > args.block_size:
                    counts["dropped_too_long"] += 1
                    continue
                raw[split].write(ids[:end].tobytes())
                spans[split].extend((end, start))
    return counts, first_malformed, inputs, {split: np.array(spans[split], np.int64).reshape(-1, 2) for split in SPLITS}


def token_dtype(tokenizer):
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def pack(lengths, block_size):
    """The first example of each row, rows filled greedily with consecutive examples; the last entry closes the list."""
    rows, room = [], 0
    for index, length in enumerate(lengths.tolist()):
        if length > room:
            rows.append(index)
            room = block_size
        room -= length
    return np.array(rows + [len(lengths)], dtype=np.int64)


def open_npy(path, dtype, count):
    """A .npy file for `count` numbers, header written: numbers are appended, so memory stays small."""
    file = open(path, "wb")
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file


def write_split(split, spans, dtype, args, folder):
    """Shuffle and pack the examples of folder/SPLIT.raw into the four arrays; returns the split's counts."""
    order = np.random.default_rng(args.seed).permutation(len(spans))
    lengths, starts = spans[order].T
    offsets = (np.cumsum(spans[:, 0]) - spans[:, 0])[order] * np.dtype(dtype).itemsize
    total, rows = int(lengths.sum()), pack(lengths, args.block_size)
    np.save(folder / f"{split}.examples.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / f"{split}.rows.npy", rows)
    with (open(folder / f"{split}.raw", "rb") as raw, open_npy(folder / f"{split}.ids.npy", dtype, total) as ids,
          open_npy(folder / f"{split}.mask.npy", np.uint8, total) as mask):
        for offset, length, start in tqdm(zip(offsets, lengths, starts), total=len(order), desc=split, disable=None):
            raw.seek(offset)
            ids.write(raw.read(length * np.dtype(dtype).itemsize))
            mask.write(bytes(int(start)) + b"\x01" * int(length - start))
    return {"examples": len(spans), "rows": len(rows) - 1,
            "tokens": total, "response_tokens": total - int(starts.sum())}


def install(folder, out_dir):
    """Move the finished files into place."""
    # meta.json goes first and comes last: a run that dies between two moves leaves nothing that looks complete.
    (out_dir / "meta.json").unlink(missing_ok=True)
    for name in [f"{split}.{kind}.npy" for split in SPLITS for kind in ARRAYS] + ["meta.json"]:
        os.replace(folder / name, out_dir / name)


def prepare(args, tokenizer) -> dict:
    """Turn args.inputs into token files in args.out_dir (flags: see main) and return what meta.json holds.

    Raises ValueError if more than a tenth of the rows is malformed or no example is left, OSError from the disk.
    Until everything is written, the directory stays as it was.
    """
    style, out_dir = resolve_style(args.style, tokenizer), Path(args.out_dir)
    new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=out_dir, prefix="unfinished-") as folder:
            folder = Path(folder)
            counts, first_malformed, inputs, spans = encode_files(args, tokenizer, style, folder)
            check_counts(counts, first_malformed, len(spans["train"]))
            splits = {split: write_split(split, spans[split], token_dtype(tokenizer), args, folder) for split in SPLITS}
            meta = {"version": VERSION, "tokenizer": Path(args.tokenizer).name, "fingerprint": tokenizer.fingerprint,
                    "style": style, "block_size": args.block_size, "seed": args.seed, "val_fraction": args.val_fraction,
                    "drop_categories": list(args.drop_categories), "inputs": inputs, "splits": splits,
                    "counts": dict(counts), "first_malformed": first_malformed}
            (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            install(folder, out_dir)
    except BaseException:
        with suppress(OSError):
            if new:
                out_dir.rmdir()
        raise
    return meta


def check_counts(counts, first_malformed, examples):
    """ValueError if the input is not what the user thinks it is."""
    read, malformed = counts["conversations"], counts["malformed"]
    if malformed > read / 10:
        raise ValueError(f"{malformed} of {read} rows are malformed, the first being {first_malformed}")
    if not examples:
        raise ValueError(f"no training example left of {read} conversations: {counts['dropped_too_long']} examples are "
                         f"longer than --block_size, {counts['dropped_category']} conversations of dropped categories")


def report(meta) -> str:
    """What happened, as aligned lines."""
    counts, splits = Counter(meta["counts"]), [meta["splits"][split] for split in SPLITS]
    table = [("conversations read", f"{counts['conversations']:,}"),
             ("malformed", f"{counts['malformed']:,}"),
             ("dropped by category", f"{counts['dropped_category']:,}"),
             ("examples too long", f"{counts['dropped_too_long']:,}"),
             ("", *SPLITS)]
    table += [(name.replace("_", " "), *(f"{split[name]:,}" for split in splits)) for name in splits[0]]
    fills = [split["tokens"] / max(1, split["rows"] * meta["block_size"]) for split in splits]
    table += [("mean fill of a row", *(f"{fill:.1%}" for fill in fills))]
    lines = [f"{name:<20}" + "".join(f"{cell:>15}" for cell in cells) for name, *cells in table]
    return "\n".join(lines + ([f"first malformed: {meta['first_malformed']}"] if meta["first_malformed"] else []))


# --- reading --------------------------------------------------------------------------------------


class TokenFiles:
    """The rows of one prepared split, memory-mapped. `meta` holds meta.json, `block_size` the longest possible row.

    directory: what `python -m data.chat` wrote. split: "train" or "val" (which may have no rows).
    tokenizer: if given, must be the one the files were written with.
    Raises FileNotFoundError or ValueError, in one line, if files are missing, damaged or of another tokenizer.
    """

    def __init__(self, directory: str, split: str, tokenizer=None):
        directory = Path(directory)
        repair = f"prepare it with: python -m data.chat INPUT.jsonl --tokenizer=TOKENIZER --out_dir={directory}"
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        try:
            self.meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
            loaded = [np.load(directory / f"{split}.{kind}.npy", mmap_mode="r") for kind in ARRAYS]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"no token file {error.filename}; {repair}") from None
        except (ValueError, EOFError) as error:
            raise ValueError(f"damaged token files in {directory} ({error}); {repair}") from None
        if (version := self.meta.get("version")) != VERSION:
            raise ValueError(f"token files in {directory} are of version {version}, not {VERSION}; {repair}")
        if tokenizer is not None and tokenizer.fingerprint != self.meta["fingerprint"]:
            raise ValueError(f"token files in {directory} are of another tokenizer, {self.meta['tokenizer']}; {repair}")
        self.ids, self.mask, self.examples, self.rows = loaded
        self.block_size, counts = self.meta["block_size"], self.meta["splits"][split]
        expected = [counts["tokens"], counts["tokens"], counts["examples"] + 1, counts["rows"] + 1]
        if (lengths := [len(part) for part in loaded]) != expected:
            raise ValueError(f"damaged token files in {directory} (lengths {lengths}, not {expected}); {repair}")

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int64, mask uint8, segments int64), each [tokens <= block_size].

        mask is 1 where the token is to be predicted; segments number the examples of the row from 1 (0 is left for
        padding), and no token may see one of another segment. Raises IndexError outside 0 .. len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        borders = self.examples[self.rows[index]:self.rows[index + 1] + 1]
        span = slice(borders[0], borders[-1])
        segments = np.repeat(np.arange(1, len(borders), dtype=np.int64), np.diff(borders))
        return self.ids[span].astype(np.int64), np.array(self.mask[span]), segments


# --- command line ---------------------------------------------------------------------------------


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m data.chat", description="JSONL conversations to token files")
    parser.add_argument("inputs", nargs="+", metavar="INPUT.jsonl", help="one JSON row a line")
    parser.add_argument("--tokenizer", required=True, help="tokenizer, as data/tokenizer.py loads it")
    parser.add_argument("--out_dir", required=True, help="directory of the token files")
    parser.add_argument("--block_size", type=int, default=2048, help="longest row, in tokens (drops what is longer)")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="share of conversations held out, below 1")
    parser.add_argument("--style", default="auto", choices=["auto", *RENDER],
                        help="auto: what the tokenizer has special tokens for")
    parser.add_argument("--drop_categories", default="", help="names joined by commas, or paper for the paper's")
    parser.add_argument("--seed", type=int, default=0, help="order of the examples (the split does not depend on it)")
    args = parser.parse_args(argv)
    if args.block_size < 2 or not 0 <= args.val_fraction < 1 or args.seed < 0:
        parser.error(f"need block_size >= 2, 0 <= val_fraction < 1 and seed >= 0, "
                     f"got {args.block_size}, {args.val_fraction} and {args.seed}")
    names = [name.strip() for name in args.drop_categories.split(",") if name.strip()]
    args.drop_categories = PAPER_DROPPED_CATEGORIES if names == ["paper"] else tuple(names)
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        meta = prepare(args, load_tokenizer(args.tokenizer))
    except (OSError, ValueError) as error:
        print(f"data.chat: {error}", file=sys.stderr)
        return 2
    print(report(meta))
    return 0


if __name__ == "__main__":
    sys.exit(main())
