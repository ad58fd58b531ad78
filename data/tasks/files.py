"""The data of benchmarks: files in the form in which they were published, read as they are.

    python -m data.tasks get gsm8k             into the cache, where eval.py finds it
    python eval.py --task gsm8k --data_dir DIR

DIR holds a folder of the benchmark's name, or is it. What a task makes of the rows stands in its
own file, data/tasks/gsm8k.py for one; read that next.
"""

import csv
import gzip
import io
from pathlib import Path

from data.checkpoints.hub import RemoteFile, fetch_files
from data.system.disk import cache_root, decode, parse_json, present

# Where they were published, with the sha256 of what was published.
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
# What comes as an archive, or in a form that none of our packages reads.
BY_HAND = {
    "mmlu": "unpack https://people.eecs.berkeley.edu/~hendrycks/data.tar to DIR/mmlu, which then "
            "holds dev/ and test/",
    "mmlu_pro": "write the rows of TIGER-Lab/MMLU-Pro on the hub as DIR/mmlu_pro/test.jsonl and "
                "validation.jsonl",
    "arc": "unpack https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip to DIR/arc, "
           "which then holds ARC-Easy/ and ARC-Challenge/",
}


def cache_folder() -> Path:
    return cache_root() / "datasets"


def find_folder(name: str, data_dir: str | None) -> Path:
    """Where a benchmark's files are. Raises ValueError that says how to get them."""
    root = Path(data_dir).expanduser() if data_dir else cache_folder()
    if not name or (root / name).is_dir():      # no name: nothing will be read
        return root / name
    # the folder of the benchmark itself
    if data_dir and root.is_dir() and root.name == name:
        return root
    raise ValueError(f"no data of {name} in {root}; {how_to_get(name)}")


def how_to_get(name: str) -> str:
    if name in PUBLISHED:
        return f"get it with: python -m data.tasks get {name}, or give --data_dir=DIR"
    return f"{BY_HAND[name]}, and give --data_dir=DIR"


def fetch(name: str) -> Path:
    """Download a benchmark into the cache. Raises ValueError for one that has to come by hand."""
    if name not in PUBLISHED:
        raise ValueError(f"{name} cannot be fetched as it was published; by hand: "
                         f"{how_to_get(name)}")
    files = [RemoteFile(url.rpartition("/")[2], url, "published", size, digest)
             for url, size, digest in PUBLISHED[name]]
    folder = cache_folder() / name
    fetch_files(files, folder)
    return folder


# --- rows -----------------------------------------------------------------------------------------

def read_file(path: Path) -> str:
    """The text of a file, or of the same file with .gz behind its name.

    Raises FileNotFoundError, or ValueError for a damaged one.
    """
    packed = path.with_name(path.name + ".gz")
    if present(path):
        return decode(path.read_bytes(), path)
    if present(packed):
        try:
            return decode(gzip.decompress(packed.read_bytes()), packed)
        except (OSError, EOFError) as error:
            raise ValueError(f"{packed} is damaged ({error}); get it again") from None
    raise FileNotFoundError(f"{path} does not exist, packed (.gz) or not; {path.parent} must hold "
                            "the files as published")


def read_jsonl(path: Path, needed: dict) -> list:
    """The objects of a file of JSON lines; needed: key -> the type of its value."""
    rows = []
    for number, line in enumerate(read_file(path).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"line {number} of {path}")
        for key, kind in needed.items():
            if not isinstance(row, dict) or not is_of(row.get(key), kind):
                raise ValueError(f"line {number} of {path} has no {key} of the right type; "
                                 "use the file as published")
        rows.append(row)
    return rows


def is_of(value, kind: type) -> bool:
    """A list is one of texts here."""
    if kind is list:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return isinstance(value, kind)


def read_csv(path: Path, columns: int) -> list:
    """The rows of a file of comma-separated values without a header."""
    rows = list(csv.reader(io.StringIO(read_file(path), newline="")))
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise ValueError(f"row {number} of {path} has {len(row)} columns, not {columns}; "
                             "use the file as published")
    return rows
