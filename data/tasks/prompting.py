"""A benchmark's question as token ids: in turns or as a text, with as many shots as fit.

No problem is ever left out: where a prompt is too long it has fewer shots, and where even the bare
question is, its beginning is cut, as in lm-evaluation-harness. eval.py counts both.
"""

import hashlib
import sys
from dataclasses import dataclass

from tqdm import tqdm

from data.tasks.files import find_folder
from data.text.formats import Piece, check_messages, encode_pieces, resolve_style


@dataclass
class Question:
    """A problem as it is asked; `facts` is what a record says of it."""
    problem: dict
    ids: list
    text: str
    facts: dict


@dataclass
class Asked:
    """All questions of a benchmark; `about` is what every one of its records has in common."""
    problems: list         # all that were loaded
    questions: list
    style: str
    max_new_tokens: int
    about: dict


def ask_all(task, tokenizer, args, max_positions: int) -> Asked:
    """Read a benchmark's files and write its prompts. Raises ValueError where there are none."""
    folder = find_folder(task.folder, args.data_dir)
    problems = task.load(folder)
    style = choose_style(args.style, tokenizer)
    shots = task.shots[style] if args.shots is None else args.shots
    tokens = args.max_new_tokens or task.max_new_tokens
    # the last token of an answer is not read
    room = max_positions - tokens + 1
    if room < 1:
        raise ValueError(f"--max_new_tokens {tokens} leaves no room for a prompt; this model has "
                         f"{max_positions} positions")
    asker = Asker(task, problems, tokenizer, style, shots, room)
    scored = task.scored(problems, shots, style)[:args.limit]
    if not scored:
        raise ValueError(f"{folder} has no problem to ask; use the files as published")
    questions = [asker.ask(one) for one in tqdm(scored, disable=None, desc="prompts")]
    for question in questions[:args.show_prompts]:
        print(f"--- {question.problem['id']}\n{question.text}\n---")
    if task.note(problems):
        print(task.note(problems), file=sys.stderr)
    about = {"benchmark": task.name, "style": style, "shots": shots, "max_new_tokens": tokens}
    return Asked(problems, questions, style, tokens, about)


def choose_style(style: str | None, tokenizer) -> str:
    """ "chat" where the model has a format of its own, else "plain", unless one is asked for.

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


@dataclass
class Asker:
    """Writes the questions of a task; `room` is the longest prompt in tokens."""
    task: object
    problems: list         # all that were loaded, shots among them
    tokenizer: object
    style: str
    shots: int
    room: int

    def ask(self, problem: dict) -> Question:
        shots = self.task.examples(self.problems, problem, self.shots, self.style)
        for count in range(len(shots), -1, -1):
            ids, text = self.encode(self.task.prompt(problem, shots[:count], self.style))
            if len(ids) <= self.room:
                break
        facts = {"id": problem["id"], **self.task.short(problem), "prompt": digest(text),
                 "prompt_tokens": len(ids), "fewer_shots": count < len(shots),
                 "shortened": len(ids) > self.room}
        return Question(problem, ids[-self.room:], text, facts)

    def encode(self, prompt) -> tuple:
        """(ids, text) of messages or of a plain text."""
        if isinstance(prompt, str):
            return self.tokenizer.encode_start(prompt), prompt
        pieces = self.pieces(prompt)
        ids, _ = encode_pieces(pieces, self.tokenizer)
        return ids, "".join(piece.text for piece in pieces)

    def pieces(self, messages: list) -> list:
        """In the model's format; a last turn of the assistant is one that it goes on with."""
        _, render = resolve_style("auto", self.tokenizer)
        if messages[-1]["role"] != "assistant":
            return render(check_messages(messages), True)
        begun = Piece(messages[-1]["content"], response=True)
        return [*render(check_messages(messages[:-1]), True), begun]


def digest(text: str) -> str:
    """Two records of the same prompt have the same."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def letter_tokens(letters: list, tokenizer, style: str) -> list:
    """The token of each option: behind `Answer:` with a space, as a turn without.

    Raises ValueError where a letter is not one token: its probability would be another thing.
    """
    before = " " if style == "plain" else ""
    ids = [tokenizer.encode(before + letter) for letter in letters]
    long = [letter for letter, tokens in zip(letters, ids) if len(tokens) != 1]
    if long:
        raise ValueError(f"{before + long[0]!r} is not one token of this model; "
                         "use --choices generate")
    return [tokens[0] for tokens in ids]
