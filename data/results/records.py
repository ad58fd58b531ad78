"""The records of a benchmark on disk: a line of JSON for every answer, written when it is made.

The first line describes the run; a run continues only records of the same description. Every
further line has `benchmark`, `id` and `output`, the cost, and the verdicts. `python eval.py
--regrade records.jsonl --out again.jsonl` grades them again, without a model.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.system.disk import (
    appearing, check_regular, claimed_file, decode, naming, parse_json, read_bytes,
    whole_characters)

ROOT = Path(__file__).resolve().parents[2]
# the fields of every record, and those of multiple choice by probability
FORM = {
    **dict.fromkeys(("benchmark", "column", "id", "output", "prompt"), str),
    **dict.fromkeys(("temperature", "score", "seconds"), float),
    **dict.fromkeys(("sample", "tokens", "nfe", "prompt_tokens"), int),
    **dict.fromkeys(("cut", "strict", "flexible", "fewer_shots", "shortened"), bool),
}
LETTERS = {"first_letter": str, "mass": float, "agreement": float}


def check_record(record: dict, where: str):
    """Raise ValueError for a line that eval.py has not written."""
    form = {**FORM, **LETTERS} if record.get("choices") == "letters" else FORM
    for name, kind in form.items():
        value = record.get(name)
        # by type, since in Python a bool is an int too; an int may stand for a float
        good = type(value) is kind or (type(value) is int and kind is float)
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{where} has {name} = {str(value)[:40]!r}, which eval.py does not "
                             "write; remove the line, or choose another --out")
    if record.get("digest") != digest_of(record):
        raise ValueError(f"{where} was changed since it was written; remove the line, or choose "
                         "another --out")


def digest_of(record: dict) -> str:
    """Of all that a record says, in few characters."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def key_of(record: dict) -> tuple:
    """The identity of an answer within a run."""
    return tuple(record.get(name) for name in ("column", "temperature", "id", "sample"))


class Records:
    """The lines of a file; answers that it holds already are not made again."""

    def __init__(self, path: Path, about: dict, overwrite: bool):
        """Raises ValueError for records of another description, or for damaged lines."""
        self.path = path
        self.found = {}         # key_of -> record
        check_regular(path)
        if overwrite:
            path.unlink(missing_ok=True)
        if not path.exists():
            self.write({"about": about})
            return
        lines = read_lines(path)
        stated = lines[0].get("about") if lines else None
        if not isinstance(stated, dict):
            raise ValueError(f"{path} does not begin with a description of its records; "
                             "choose another --out, or add --overwrite")
        for name, value in about.items():
            if stated.get(name) != value:
                raise ValueError(f"{path} holds records of another {name} ({stated.get(name)}, "
                                 f"not {value}); choose another --out, or add --overwrite")
        for number, line in enumerate(lines[1:], 2):
            check_record(line, f"record {number} of {path}")
            self.found[key_of(line)] = line
        # without the incomplete line of a killed run
        with appearing(path) as part:
            part.write_text("".join(map(line_of, lines)), encoding="utf-8")

    def check(self, questions: list):
        """Raise ValueError for an answer to another question than the data files hold now."""
        facts = {question.problem["id"]: question.facts for question in questions}
        for record in self.found.values():
            for name, value in facts.get(record["id"], {}).items():
                # as the file gives it back
                if record.get(name) != json.loads(json.dumps(value)):
                    raise ValueError(f"{self.path} has an answer to another {record['id']} than "
                                     f"the data files hold now (its {name} differs); choose "
                                     "another --out, or add --overwrite")

    def write(self, record: dict):
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line_of(record))
            file.flush()
            os.fsync(file.fileno())

    def add(self, record: dict):
        record = {**record, "digest": digest_of(record)}
        self.found[key_of(record)] = record
        self.write(record)

    def missing(self, column: str, temperature: float, questions: list, samples: int) -> list:
        """(question, sample) of the answers that are not in the file."""
        jobs = [(question, sample) for question in questions for sample in range(samples)
                if (column, temperature, question.problem["id"], sample) not in self.found]
        # neighbours share the longest common prefix, which is read once
        return sorted(jobs, key=lambda job: job[0].ids)


def line_of(record: dict) -> str:
    # half a surrogate pair has no UTF-8: then every character beyond ASCII is an escape
    plain = not whole_characters(record)
    return json.dumps(record, ensure_ascii=plain) + "\n"


def read_lines(path: Path) -> list:
    """The objects of a file of JSON lines, without an incomplete last line of a killed run.

    Raises ValueError for any other line that is not an object.
    """
    lines = decode(read_bytes(path), path).split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            record = parse_json(line, where)
            if not isinstance(record, dict):
                raise ValueError(f"{where} is no record; remove it, or choose another file")
        except ValueError:
            # a complete line ends with a line feed, so it is never the last of `lines`
            if number < len(lines) or not found:
                raise
            print(f"note: the last line of {path} is cut off and is left out", file=sys.stderr)
        else:
            if not whole_characters(record):
                print(f"note: {where} holds half a character, which stays an escape",
                      file=sys.stderr)
            found.append(record)
    return found


def regrade(source: Path, out: Path, grade, overwrite: bool):
    """Write every line of `source` with new verdicts; grade: record -> dict of verdicts."""
    with claimed_file(out, overwrite):
        lines = read_lines(source)
        if not lines:
            raise ValueError(f"{source} has no line; allowed: records of eval.py, or lines with "
                             "benchmark, id and output")
        # the first line of eval.py is a description
        graded = [line if "about" in line else {**line, **grade(line)} for line in lines]
        for line in graded:
            if "digest" in line:
                line["digest"] = digest_of(line)
        with appearing(out) as part:
            part.write_text("".join(map(line_of, graded)), encoding="utf-8")


# --- provenance -----------------------------------------------------------------------------------

def commit() -> str | None:
    """The commit that is checked out, + where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # not a checkout, or git is not installed
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def identity(model, tokenizer) -> dict:
    """What an answer depends on beside the weights: settings, precision, stop tokens."""
    path = None if model is model.lm else vars(model.config)
    settings = json.dumps([model.lm.config.numbers, path], sort_keys=True)
    return {"config": hashlib.sha256(settings.encode()).hexdigest(),
            "dtype": str(model.lm.embed.weight.dtype), "tokenizer": tokenizer.fingerprint,
            "stops": sorted(tokenizer.stop_ids)}


def provenance(model, args, start: float) -> dict:
    """What is needed to repeat a result; start: time.time() at its beginning."""
    return {
        "args": vars(args),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(next(model.parameters()).device),
        "seconds": round(time.time() - start, 1),
        "base_sha256": model.lm.fingerprint(),
    }
