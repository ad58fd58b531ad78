"""Token files: the training examples on disk, and the data set that training reads.

A split is four arrays or five, memory-mapped, so that it may be larger than the memory:

    ids       the tokens of all examples, one after another
    mask      1 where a token is to be predicted
    examples  start of each example in the two arrays above, and the end of the last one
    rows      number of the first example of each row, and the number of examples
    classes   class of each example, for guidance; only where the data have classes

Examples are packed: a row takes as many as fit, to save padding. Read chat.py before, which makes
the examples; read data/training/batches.py next.
"""

import hashlib
import os
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.checkpoints.path import check_class_names
from data.system.command import choices
from data.system.disk import check_regular, flush, parse_json, read_bytes, sha256_of

VERSION = 1
SPLITS = ("train", "val")
ARRAYS = ("ids", "mask", "examples", "rows")


# --- writing: in input order to a raw file, then from there in shuffled order ---------------------

class RawSplit:
    """The examples of one split in input order: tokens in a file, three numbers each in memory."""

    def __init__(self, path: Path, dtype):
        self.path = path
        self.dtype = np.dtype(dtype)
        # length, response start and class of every example, 8 bytes each
        self.numbers = array("q")
        self.file = open(path, "wb")

    def add(self, ids, start: int, class_id: int):
        """One example: `ids`, an array of our dtype; those from `start` on are the response.

        class_id: -1 for none
        """
        self.file.write(ids.tobytes())
        self.numbers.extend((len(ids), start, class_id))


def pack(lengths, block_size: int):
    """The first example of each row, and the number of examples; consecutive ones share a row."""
    rows = []
    # the first example opens a row like any other that does not fit
    room = 0
    for index, length in enumerate(lengths.tolist()):
        if length > room:
            rows.append(index)
            room = block_size
        room -= length
    return np.array(rows + [len(lengths)], dtype=np.int64)


def write_split(raw: RawSplit, target: Path, block_size: int, seed: int, classes: int) -> dict:
    """Shuffle and pack `raw`, whose file is closed, into target.KIND.npy; returns the counts.

    classes: their number in both splits together
    """
    lengths, starts, class_ids = np.array(raw.numbers, np.int64).reshape(-1, 3).T
    size = raw.dtype.itemsize
    # positions in the raw file, which is in input order
    offsets = (np.cumsum(lengths) - lengths) * size
    total = int(lengths.sum())
    # shuffled before packing, so that neighbours in the input do not share a row
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = pack(lengths[order], block_size)
    # example i is borders[i]:borders[i + 1]
    borders = np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64)
    np.save(f"{target}.examples.npy", borders)
    np.save(f"{target}.rows.npy", rows)
    if classes:
        # the id behind the last means no class
        class_ids[class_ids < 0] = classes
        np.save(f"{target}.classes.npy", class_ids[order].astype(np.min_scalar_type(classes)))
    with (
        open(raw.path, "rb") as file,
        open_npy(f"{target}.ids.npy", raw.dtype, total) as ids,
        open_npy(f"{target}.mask.npy", np.uint8, total) as mask,
    ):
        for index in tqdm(order, desc=target.name, disable=None):
            length = int(lengths[index])
            start = int(starts[index])
            file.seek(offsets[index])
            ids.write(file.read(length * size))
            # zeros for the context, ones for the response
            mask.write(bytes(start) + b"\x01" * (length - start))
    return {
        "examples": len(lengths),
        "rows": len(rows) - 1,
        "tokens": total,
        "response_tokens": total - int(starts.sum()),
    }


def open_npy(path, dtype, count: int):
    """A .npy file, open behind its header: `count` numbers are then appended piece by piece."""
    # np.save needs the array in memory; writing to a mapping of a full disk kills the process
    file = open(path, "wb")
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file


def install(folder: Path, out_dir: Path):
    """Move the finished files into place."""
    # meta.json is removed first and moved last, so files of an interrupted run cannot be read
    (out_dir / "meta.json").unlink(missing_ok=True)
    # the new data may have no classes
    for split in SPLITS:
        (out_dir / f"{split}.classes.npy").unlink(missing_ok=True)
    for path in [*folder.glob("*.npy"), folder / "meta.json"]:
        flush(path)
        os.replace(path, out_dir / path.name)
    flush(out_dir)


# --- reading --------------------------------------------------------------------------------------

def map_array(path: Path):
    """A list of whole numbers in a file, memory-mapped. Raises OSError or ValueError."""
    check_regular(path)
    try:
        numbers = np.load(path, mmap_mode="r")
    except OSError:
        raise
    # numpy's errors on a damaged header are of many types
    except Exception:
        raise ValueError(f"{path.name} is truncated or not a .npy file") from None
    if numbers.ndim != 1 or numbers.dtype.kind not in "ui":
        raise ValueError(f"{path.name} is not a list of whole numbers")
    return numbers


class TokenFiles:
    """The rows of one split that data/text/chat.py has prepared in `directory`, memory-mapped.

    tokenizer: if given, must be the one that wrote the files.
    `meta` is the content of meta.json, `block_size` the longest possible row, `classes` the
    names of the classes; `fingerprint` changes with any input and flag.
    Raises FileNotFoundError or ValueError, in one line, if files are missing, damaged or of another
    tokenizer.
    """

    def __init__(self, directory: str, split: str, tokenizer=None):
        choices(split, SPLITS, "split")
        folder = Path(directory)
        refused = f"cannot use the token files in {folder}"
        repair = ("prepare them with: python -m data.text.chat INPUT.jsonl --tokenizer=TOKENIZER "
                  f"--out_dir={folder}")
        try:
            # meta.json lists every flag and the digests of the inputs
            content = read_bytes(folder / "meta.json")
            self.fingerprint = hashlib.sha256(content).hexdigest()
            self.meta = parse_json(content, "meta.json")
            arrays = [map_array(folder / f"{split}.{kind}.npy") for kind in ARRAYS]
            self.ids, self.mask, self.examples, self.rows = arrays
            names = self.meta["classes"]
            check_class_names(names, len(names))
            self.classes = tuple(names)
            self.class_ids = map_array(folder / f"{split}.classes.npy") if names else None
            self.check(split, tokenizer)
            for name, digest in self.meta["digests"].items():
                if name.startswith(f"{split}.") and sha256_of(folder / name) != digest:
                    raise ValueError(f"{name} is damaged, or of another preparation")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"no token file {error.filename}; {repair}") from None
        # a meta.json of another program, or edited by hand
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{refused}: meta.json has an unexpected form: {error!r}; "
                             f"{repair}") from None
        except ValueError as error:
            raise ValueError(f"{refused}: {error}; {repair}") from None

    def check(self, split, tokenizer):
        """Raise ValueError unless meta.json and the values of all arrays fit each other.

        Reads the files once: an index out of range would be an error far from its cause.
        """
        if self.meta["version"] != VERSION:
            raise ValueError(f"they have version {self.meta['version']}, not {VERSION}")
        # training on ids of another vocabulary would run without an error
        if tokenizer is not None and tokenizer.fingerprint != self.meta["fingerprint"]:
            raise ValueError(f"they are of another tokenizer, {self.meta['tokenizer']}")
        self.block_size = self.meta["block_size"]
        counts = self.meta["splits"][split]
        examples = counts["examples"]
        expected = [counts["tokens"], counts["tokens"], examples + 1, counts["rows"] + 1]
        lengths = [len(part) for part in (self.ids, self.mask, self.examples, self.rows)]
        if self.classes:
            expected.append(examples)
            lengths.append(len(self.class_ids))
        # files of two preparations, mixed by hand, can still be read as arrays
        if lengths != expected:
            raise ValueError(f"lengths {lengths}, not {expected}")
        for borders, end in ((self.examples, len(self.ids)), (self.rows, len(self.examples) - 1)):
            borders = borders.astype(np.int64)
            if borders[0] != 0 or borders[-1] != end or (np.diff(borders) < 1).any():
                raise ValueError("borders that do not rise")
        if not len(self):
            return
        if self.lengths.max() > self.block_size:
            raise ValueError(f"a row longer than {self.block_size} tokens")
        if self.mask.min() < 0 or self.mask.max() != 1:
            raise ValueError("a mask without a counted token, or not of zeros and ones")
        largest = int(self.ids.max())
        if self.ids.min() < 0 or (tokenizer is not None and largest >= tokenizer.vocab_size):
            raise ValueError(f"token id {largest} is beyond the vocabulary")
        # the largest means no class
        classes = len(self.classes)
        if classes and not 0 <= self.class_ids.min() <= self.class_ids.max() <= classes:
            raise ValueError(f"a class outside 0 to {classes}")

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

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """(ids int64, mask uint8, documents int64), each (T,) with T <= block_size.

        mask is 1 where the token is to be predicted; documents number the examples of the row from
        1. Data with classes add those of the tokens, int64 (T,); len(classes) means no class.
        Raises IndexError outside 0 .. len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.part(self.rows[index], self.rows[index + 1])

    def part(self, first: int, last: int) -> tuple[np.ndarray, ...]:
        """Some examples as a row, of the same form."""
        # with the border that closes the last example
        borders = self.examples[first:last + 1]
        span = slice(borders[0], borders[-1])
        numbers = np.arange(1, len(borders), dtype=np.int64)
        documents = np.repeat(numbers, np.diff(borders))
        # copies: torch warns of arrays that cannot be written to
        row = self.ids[span].astype(np.int64), np.array(self.mask[span]), documents
        if not self.classes:
            return row
        class_ids = self.class_ids[first:last].astype(np.int64)
        return *row, np.repeat(class_ids, np.diff(borders))
