"""The data of benchmarks: files as published, read without conversion.

    python -m data.tasks get gsm8k             into the cache, where eval.py finds it
    python eval.py --task gsm8k --data_dir DIR

DIR holds a folder of the benchmark's name, or is that folder. Each task has a file of its own that
makes problems of the rows; read data/tasks/gsm8k.py next.
"""

import csv
import gzip
import io
import zlib
from pathlib import Path

from data.checkpoints.hub import RemoteFile, fetch_files
from data.system.disk import cache_root, decode, parse_json, present, whole_characters
from data.text.chat import check_columns

# Address, size in bytes and sha256 of each file as published.
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
PUBLISHED = {
    "gsm8k": [
        (GSM8K + "test.jsonl", 749_738,
         "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
        (GSM8K + "train.jsonl", 4_166_206,
         "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    ],
    "math500": [
        ("https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl", 446_564,
         "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
    ],
    "humaneval": [
        ("https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
         44_877, "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"),
    ],
    "mbpp": [
        ("https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl",
         563_743, "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"),
    ],
}
# Archives, and formats that none of our packages reads.
BY_HAND = {
    "mmlu": "unpack https://people.eecs.berkeley.edu/~hendrycks/data.tar to DIR/mmlu, which then "
            "holds dev/ and test/",
    "mmlu_pro": "write the rows of TIGER-Lab/MMLU-Pro on the hub as DIR/mmlu_pro/test.jsonl and "
                "validation.jsonl",
    "arc": "unpack https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip to DIR/arc, "
           "which then holds ARC-Easy/ and ARC-Challenge/",
}


def find_folder(name: str, data_dir: str | None) -> Path:
    """The folder of a benchmark's files. Raises ValueError that says how to get them."""
    root = Path(data_dir).expanduser() if data_dir else cache_root() / "datasets"
    if not name or (root / name).is_dir():      # no name: the task has no files
        return root / name
    # the folder of the benchmark itself
    if data_dir and root.is_dir() and root.name == name:
        return root
    how = BY_HAND.get(name, f"get it with: python -m data.tasks get {name}")
    raise ValueError(f"no data of {name} in {root}; {how}; "
                     "--data_dir=DIR names the folder that holds it")


def fetch(name: str) -> Path:
    """Download a benchmark into the cache. Raises ValueError for one of BY_HAND."""
    if name in BY_HAND:
        raise ValueError(f"{name} cannot be fetched; by hand: {BY_HAND[name]}; --data_dir=DIR "
                         "names the folder that holds it")
    files = [RemoteFile(url.rpartition("/")[2], url, "published", size, digest)
             for url, size, digest in PUBLISHED[name]]
    folder = cache_root() / "datasets" / name
    fetch_files(files, folder)
    return folder


# --- rows -----------------------------------------------------------------------------------------

def read_file(path: Path) -> str:
    """The text of a file, or of the same file packed, with .gz behind its name.

    Raises FileNotFoundError, or ValueError for a damaged one.
    """
    packed = path.with_name(path.name + ".gz")
    if present(path):
        return decode(path.read_bytes(), path)
    if present(packed):
        try:
            return decode(gzip.decompress(packed.read_bytes()), packed)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{packed} is damaged ({error}); get it again") from None
    raise FileNotFoundError(f"{path} does not exist, packed (.gz) or not; {path.parent} must hold "
                            "the files as published")


def read_jsonl(path: Path, needed: dict, check=None) -> list:
    """The objects of a file of JSON lines; needed: key -> type of its value (list: of texts).

    check   called with every object, it raises ValueError for one that the task cannot use
    Raises FileNotFoundError, or ValueError for a line of another form.
    """
    rows = []
    for number, line in enumerate(read_file(path).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"line {number} of {path}")
        if not whole_characters(row):
            raise ValueError(f"line {number} of {path} holds half a character (of a surrogate "
                             "pair); use the file as published")
        for key, kind in needed.items():
            value = row.get(key) if isinstance(row, dict) else None
            texts = value if kind is list and isinstance(value, list) else []
            if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"line {number} of {path} has no {key} of the right type; "
                                 "use the file as published")
        words = "\n".join(row[key] for key, kind in needed.items() if kind is str)
        check_row(f"line {number} of {path}", check_columns, row, needed, words)
        if check:
            check_row(f"line {number} of {path}", check, row)
        rows.append(row)
    return rows


def read_csv(path: Path, columns: int, check=None) -> list:
    """The rows of a file of comma-separated values without a header; check as of read_jsonl."""
    try:
        rows = list(csv.reader(io.StringIO(read_file(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{path} is damaged ({error}); use the file as published") from None
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise ValueError(f"row {number} of {path} has {len(row)} columns, not {columns}; "
                             "use the file as published")
        if check:
            check_row(f"row {number} of {path}", check, row)
    return rows


def check_row(place: str, check, *values):
    """Call a check; its ValueError gets the place of the row."""
    try:
        check(*values)
    except ValueError as error:
        raise ValueError(f"{place} {error}; use the file as published") from None
