"""Token files: how training examples lie on the disk, and the data set that training reads.

A split is four arrays, memory-mapped, so that data larger than the memory can be trained on:

    ids       the tokens of all examples, one after another
    mask      1 where a token is to be predicted
    examples  where each example starts in the two above, and the end of the last
    rows      which example each row starts with, and the number of examples

Examples are packed: a row takes as many as fit, so little is wasted on padding. `RawSplit` takes
the examples in, `write_split` shuffles and packs them, `TokenFiles` reads the result. chat.py
makes the examples, read it before; read data/training/batches.py next.
"""

import hashlib
import os
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.system.disk import flush, parse_json

VERSION = 1
SPLITS = ("train", "val")
ARRAYS = ("ids", "mask", "examples", "rows")


# --- writing: in input order to a raw file, then from there in shuffled order ---------------------

def token_dtype(tokenizer):
    """Two bytes a token where they are enough."""
    if tokenizer.vocab_size <= 2**16:
        return np.uint16
    return np.uint32


class RawSplit:
    """The examples of one split, as they come: tokens in a file, two numbers each in memory."""

    def __init__(self, path: Path, dtype):
        self.path = path
        self.dtype = np.dtype(dtype)
        self.numbers = array("q")       # 8 bytes each, a list takes several times that
        self.file = open(path, "wb")

    def add(self, ids, start: int):
        """One example: `ids` of our dtype, of which those from `start` on are the response."""
        self.file.write(ids.tobytes())
        self.numbers.extend((len(ids), start))

    def close(self):
        self.file.close()

    @property
    def spans(self):
        """Length and response start of every example, (examples, 2)."""
        return np.array(self.numbers, np.int64).reshape(-1, 2)


def pack(lengths, block_size):
    """The first example of each row; the last entry closes the list.

    Rows are filled greedily with consecutive examples.
    """
    rows = []
    # none, so that the first example opens a row like any other that does not fit
    room = 0
    for index, length in enumerate(lengths.tolist()):
        if length > room:
            rows.append(index)
            room = block_size
        room -= length
    return np.array(rows + [len(lengths)], dtype=np.int64)


def write_split(raw: RawSplit, target: Path, args) -> dict:
    """Shuffle and pack `raw` into the four arrays target.KIND.npy; returns the split's counts."""
    spans = raw.spans
    # before packing, so that neighbours in the input do not end up in one row
    order = np.random.default_rng(args.seed).permutation(len(spans))
    lengths, starts = spans[order].T
    rows = pack(lengths, args.block_size)
    # one border more than examples, so that example i is borders[i]:borders[i + 1]
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(f"{target}.examples.npy", borders)
    np.save(f"{target}.rows.npy", rows)
    copy_examples(raw, order, target)
    total = int(lengths.sum())
    return {
        "examples": len(spans),
        "rows": len(rows) - 1,
        "tokens": total,
        "response_tokens": total - int(starts.sum()),
    }


def copy_examples(raw: RawSplit, order, target: Path):
    """Write target.ids.npy and target.mask.npy, an example at a time, in this order."""
    lengths, starts = raw.spans.T
    total = int(lengths.sum())
    size = raw.dtype.itemsize
    # the raw file is in input order, so these add up before anything is reordered
    offsets = (np.cumsum(lengths) - lengths) * size
    name = target.name      # the split, for whoever waits
    with (
        open(raw.path, "rb") as file,
        open_npy(f"{target}.ids.npy", raw.dtype, total) as ids,
        open_npy(f"{target}.mask.npy", np.uint8, total) as mask,
    ):
        for index in tqdm(order, desc=name, disable=None):
            length = int(lengths[index])
            start = int(starts[index])
            file.seek(offsets[index])
            ids.write(file.read(length * size))
            # zeros for the context, ones for the response
            mask.write(bytes(start) + b"\x01" * (length - start))


def open_npy(path, dtype, count):
    """A .npy file for `count` numbers, header written: they are appended, so memory stays small."""
    # np.save would want the whole array at once
    file = open(path, "wb")
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": (count,),
    }
    np.lib.format.write_array_header_1_0(file, header)
    return file


def install(folder: Path, out_dir: Path):
    """Move the finished files into place."""
    names = [f"{split}.{kind}.npy" for split in SPLITS for kind in ARRAYS]
    # meta.json goes first and comes last: a run that dies between two moves leaves nothing that
    # looks complete.
    (out_dir / "meta.json").unlink(missing_ok=True)
    for name in [*names, "meta.json"]:
        flush(folder / name)
        os.replace(folder / name, out_dir / name)
    flush(out_dir)


# --- reading --------------------------------------------------------------------------------------

def map_array(path: Path):
    """An array in a file, which the system reads where it is looked at. Raises ValueError."""
    try:
        return np.load(path, mmap_mode="r")
    except OSError:
        raise
    # the header is a piece of Python, and a damaged one fails in every way in which Python can
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path.name}: {reason}") from None


class TokenFiles:
    """The rows of one prepared split, memory-mapped.

    directory: what data/text/chat.py wrote. split: "train" or "val" (which may have no rows).
    tokenizer: if given, must be the one the files were written with.
    `meta` holds meta.json, `block_size` the longest possible row.
    Raises FileNotFoundError or ValueError, in one line, if files are missing, damaged or of another
    tokenizer.
    """

    def __init__(self, directory: str, split: str, tokenizer=None):
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        self.directory = Path(directory)
        arrays = self.load(split)
        try:
            self.check_origin(tokenizer)
            self.block_size = self.meta["block_size"]
            self.check_lengths(split, arrays)
            self.ids, self.mask, self.examples, self.rows = arrays
            self.check_values(tokenizer)
        # meta.json of another program, or by another hand
        except (KeyError, TypeError, AttributeError) as error:
            raise self.damaged(f"meta.json has an unexpected form: {error!r}") from None

    @property
    def repair(self) -> str:
        """What every refusal ends with."""
        return ("prepare it with: python -m data.text.chat INPUT.jsonl --tokenizer=TOKENIZER "
                f"--out_dir={self.directory}")

    def damaged(self, reason) -> ValueError:
        return ValueError(f"damaged token files in {self.directory} ({reason}); {self.repair}")

    def load(self, split) -> list:
        try:
            content = (self.directory / "meta.json").read_bytes()
            self.meta = parse_json(content, "meta.json")
            # changes with the inputs, which it lists, and with every flag
            self.fingerprint = hashlib.sha256(content).hexdigest()
            paths = [self.directory / f"{split}.{kind}.npy" for kind in ARRAYS]
            return [map_array(path) for path in paths]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"no token file {error.filename}; {self.repair}") from None
        except ValueError as error:
            raise self.damaged(error) from None

    def check_origin(self, tokenizer):
        version = self.meta.get("version")
        if version != VERSION:
            raise ValueError(f"token files in {self.directory} are of version {version}, "
                             f"not {VERSION}; {self.repair}")
        # ids of another vocabulary would train without complaint, on nonsense
        if tokenizer is not None and tokenizer.fingerprint != self.meta["fingerprint"]:
            raise ValueError(f"token files in {self.directory} are of another tokenizer, "
                             f"{self.meta['tokenizer']}; {self.repair}")

    def check_lengths(self, split, arrays):
        """The arrays are of the stated lengths, and of whole numbers."""
        for kind, part in zip(ARRAYS, arrays):
            if part.ndim != 1 or part.dtype.kind not in "ui":
                raise self.damaged(f"{split}.{kind}.npy holds no list of whole numbers")
        counts = self.meta["splits"][split]
        expected = [
            counts["tokens"],
            counts["tokens"],
            counts["examples"] + 1,
            counts["rows"] + 1,
        ]
        lengths = [len(part) for part in arrays]
        # files of two preparations, mixed up by hand, can still be read as arrays
        if lengths != expected:
            raise self.damaged(f"lengths {lengths}, not {expected}")

    def check_values(self, tokenizer):
        """Borders rise from the first to the last token, and every token is one.

        All of the files is read once: an index out of range would be an error far from its cause.
        """
        for borders, end in ((self.examples, len(self.ids)), (self.rows, len(self.examples) - 1)):
            borders = borders.astype(np.int64)
            if borders[0] != 0 or borders[-1] != end or (np.diff(borders) < 1).any():
                raise self.damaged("borders that do not rise")
        if not len(self):
            return
        if self.lengths.max() > self.block_size:
            raise self.damaged(f"a row longer than {self.block_size} tokens")
        if self.mask.min() < 0 or self.mask.max() != 1:
            raise self.damaged("a mask without a counted token, or not of zeros and ones")
        largest = int(self.ids.max())
        if self.ids.min() < 0 or (tokenizer is not None and largest >= tokenizer.vocab_size):
            raise self.damaged(f"token id {largest} is beyond the vocabulary")

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row."""
        return np.diff(self.examples[self.rows].astype(np.int64))

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(np.diff(self.examples).max()) if len(self) else 0

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int64, mask uint8, documents int64), each [tokens <= block_size].

        mask is 1 where the token is to be predicted; documents number the examples of the row from
        1 (0 is left for padding), and no token may see one of another document.
        Raises IndexError outside 0 .. len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first = self.rows[index]
        last = self.rows[index + 1]
        # with the border that closes the last example
        borders = self.examples[first:last + 1]
        span = slice(borders[0], borders[-1])
        numbers = np.arange(1, len(borders), dtype=np.int64)
        documents = np.repeat(numbers, np.diff(borders))
        # copies, since what is mapped cannot be written to, and torch warns of such arrays
        return self.ids[span].astype(np.int64), np.array(self.mask[span]), documents
