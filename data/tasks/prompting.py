"""A benchmark's problems as token ids: in turns or as a text, with as many shots as fit.

No problem is left out: a prompt that is too long gets fewer shots, and where even the question
alone is too long, its beginning is cut, as in lm-evaluation-harness. eval.py counts both.
"""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from data.tasks.files import find_folder
from data.text.formats import Piece, check_messages, encode_pieces, resolve_style


@dataclass
class Question:
    """A problem and its prompt; `facts` is the part of its records that is known beforehand."""
    problem: dict
    ids: list
    text: str
    facts: dict


@dataclass
class Prompts:
    """All questions of a benchmark; `about` is the common part of its records."""
    problems: list         # all that were loaded, shots among them
    questions: list
    style: str
    max_new_tokens: int
    about: dict


def write_prompts(task, tokenizer, max_positions: int, data_dir: str | None, style: str | None,
                  shots: int | None, max_new_tokens: int | None, limit: int | None,
                  show: int) -> Prompts:
    """Read a benchmark's files and write its prompts; None: the default of the task.

    limit, show     number of problems, and of prompts to print, the first ones
    Raises ValueError where there is no problem, or no room for a prompt.
    """
    folder = find_folder(task.folder, data_dir)
    problems = task.load(folder)
    style = choose_style(style, tokenizer)
    shots = task.shots[style] if shots is None else shots
    tokens = max_new_tokens or task.max_new_tokens
    # the last token of an answer is not read
    room = max_positions - tokens + 1
    if room < 1:
        raise ValueError(f"--max_new_tokens {tokens} leaves no room for a prompt; this model has "
                         f"{max_positions} positions")
    scored = task.scored(problems, shots, style)[:limit]
    if not scored:
        raise ValueError(f"{folder} has no problem to score; use the files as published")
    # records are told apart by their ids
    for name, count in Counter(problem["id"] for problem in scored).items():
        if count > 1:
            raise ValueError(f"{folder} has {count} problems with the id {name[:60]!r}; "
                             "use the files as published")
    questions = []
    for problem in tqdm(scored, disable=None, desc="prompts"):
        examples = task.examples(problems, problem, shots, style)
        for count in range(len(examples), -1, -1):
            ids, text = encode(task.prompt(problem, examples[:count], style), tokenizer)
            if len(ids) <= room:
                break
        # equal in two records if their prompts are, and if all that grading reads is
        facts = {"id": problem["id"], **task.short(problem), "prompt": digest(text),
                 "problem": digest(json.dumps(problem, default=str)),
                 "prompt_tokens": len(ids), "fewer_shots": count < len(examples),
                 "shortened": len(ids) > room}
        questions.append(Question(problem, ids[-room:], text, facts))
    for question in questions[:show]:
        print(f"--- {question.problem['id']}\n{question.text}\n---")
    if note := task.note(problems):
        print(note, file=sys.stderr)
    about = {"benchmark": task.name, "style": style, "shots": shots, "max_new_tokens": tokens}
    return Prompts(problems, questions, style, tokens, about)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choose_style(style: str | None, tokenizer) -> str:
    """The style given, else "chat" if the model has a format of its own, else "plain".

    Raises ValueError for "chat" with a template that we cannot write, or without one.
    """
    if style == "plain":
        return style
    try:
        name, _ = resolve_style("auto", tokenizer)
    except ValueError as error:
        if style:
            raise
        print(f"note: prompts are plain, since {error}", file=sys.stderr)
        return "plain"
    if style == "chat" and name == "plain":
        raise ValueError("--style chat: this model has no chat format; allowed: --style plain")
    return "plain" if name == "plain" else "chat"


def encode(prompt, tokenizer) -> tuple:
    """(ids, text) of a plain text, or of messages in the model's own format."""
    if isinstance(prompt, str):
        return tokenizer.encode_start(prompt), prompt
    _, render = resolve_style("auto", tokenizer)
    # the model continues a last turn of the assistant
    begun = [Piece(turn["content"], response=True)
             for turn in prompt[-1:] if turn["role"] == "assistant"]
    turns = prompt[:-1] if begun else prompt
    pieces = [*render(check_messages(turns), True), *begun]
    ids, _ = encode_pieces(pieces, tokenizer)
    return ids, "".join(piece.text for piece in pieces)


def letter_tokens(letters: list, tokenizer, style: str) -> list:
    """The token id of each letter: with a space behind a plain `Answer:`, without in a turn.

    Raises ValueError where a letter is not one token: its probability would mean something else.
    """
    before = " " if style == "plain" else ""
    ids = [tokenizer.encode(before + letter) for letter in letters]
    long = [letter for letter, tokens in zip(letters, ids) if len(tokens) != 1]
    if long:
        raise ValueError(f"{before + long[0]!r} is not one token of this model; "
                         "use --choices generate")
    return [tokens[0] for tokens in ids]
