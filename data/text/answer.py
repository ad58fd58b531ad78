"""An answer: its tokens, what they cost, and where it ends, at a token or at a string.

Benchmarks cut answers at strings such as "\\n\\nQuestion:", which a vocabulary may break into
tokens in many ways, so strings are looked for in the decoded text. sample.py asks at every token.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from data.system.disk import decode
from data.text.formats import encode_chat, resolve_style


def cut(text: str, stops) -> str:
    """Text up to the first of some strings: grading twice is then grading once."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[:min(ends)] if ends else text


@dataclass
class Stop:
    """Token ids, and strings; the tokenizer finds the strings and puts answers into words."""
    ids: set = field(default_factory=set)
    strings: list = field(default_factory=list)
    tokenizer: object = None

    @classmethod
    def of(cls, tokenizer, texts=()) -> "Stop":
        """The model's own ends and further texts, which may name special tokens.

        Raises ValueError for an empty text: every answer would end before it began.
        """
        stop = cls(set(tokenizer.stop_ids), [], tokenizer)
        for text in texts:
            if not text:
                raise ValueError("--stop is empty; allowed: a text of at least one character")
            if text in tokenizer.special:
                stop.ids.add(tokenizer.special[text])
            else:
                stop.strings.append(text)
        return stop

    def found(self, ids) -> bool:
        """Has a stop string just been completed? Only the tail of the text is decoded."""
        if not self.strings:
            return False
        # a token is at least a byte long, so a string of n bytes lies within the last n tokens
        longest = max(len(string.encode()) for string in self.strings)
        tail = self.tokenizer.decode(ids[-longest:])
        return any(string in tail for string in self.strings)

    def text(self, ids) -> str:
        """The answer in words, up to the first stop string; "" without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return cut(self.tokenizer.decode(ids), self.strings)


@dataclass
class Trace:
    """What one token was taken for on its way: the watcher of its ODE, in a batch's first row.

    guesses   (t, token id, p) at every evaluation, in the order in which they were made
    accepted  for each of them: was its step accepted?
    reached   the t that steps led to; from there it went straight on to 1
    """
    predictions: list = field(default_factory=list)
    accepted: list = field(default_factory=list)
    reached: float = 0.0

    def __call__(self, rows, t, x, logits):
        """Note the likeliest token and how sure it is; called as solvers.odeint calls `watch`."""
        # the adaptive solver moves some sequences and not others
        if rows[0] != 0:
            return
        p, token = logits[0, 0].softmax(-1).max(-1)
        first = t if isinstance(t, float) else float(t[0])
        self.predictions.append((first, int(token), float(p)))
        self.accepted.append(True)

    def judge(self, reached: float, rejected: int):
        """Once the ODE is solved: which guesses were made in one of its `rejected` steps?"""
        self.reached = reached
        # a fixed solver rejects nothing, and its times are rounded, too coarse for what follows
        if not rejected:
            return
        # after a rejected step time goes back: whatever lies beyond a later moment led nowhere
        earliest = reached
        for place in reversed(range(len(self.predictions))):
            t = self.predictions[place][0]
            self.accepted[place] = t <= earliest
            earliest = min(earliest, t)


@dataclass
class Answer:
    """ids: the new tokens, without the stop token; nfe: evaluations for every token drawn."""
    ids: list = field(default_factory=list)
    nfe: list = field(default_factory=list)
    text: str = ""
    stopped: bool = False                # it ended by itself, before max_new_tokens
    unfinished: int = 0                  # tokens whose ODE ran out of max_nfe
    log_p: list = field(default_factory=list)     # of every token, under the frozen model
    right: bool = False                  # where it was graded
    traces: list = field(default_factory=list)    # where asked: the Trace of every token drawn

    @property
    def score(self) -> float:
        """Mean log p of its tokens under the frozen model, where they were kept."""
        return sum(self.log_p) / max(1, len(self.log_p))

    @property
    def mark(self) -> str:
        return "right" if self.right else "wrong"

    def add(self, token: int, nfe: int, finished: bool, stop: Stop):
        """Write down one more token, or that there are no more."""
        self.nfe.append(nfe)
        if not finished:
            self.unfinished += 1
        if token in stop.ids:
            self.stopped = True
            return
        self.ids.append(token)
        self.stopped = stop.found(self.ids)


class Live:
    """Shows an answer while it is written, a character of several tokens when it is whole."""

    def __init__(self, prompt: str, tokenizer):
        self.stream = tokenizer.stream()
        print(f"{prompt!r}\n   answer  ", end="", flush=True)

    def __call__(self, number: int, token: int):
        """As `generate` calls on_token."""
        print(self.stream(token), end="", flush=True)

    def end(self):
        print(self.stream.flush())


# --- prompts as a user gives them: flags, a file, standard input ----------------------------------

def read_prompts(given: list, file: str | None) -> list:
    """Texts from a file, one a line, or else those given, of which `-` is standard input.

    Raises ValueError for a file without a prompt.
    """
    if file:
        # a line ends at a line feed, and at nothing else that Unicode calls a separator
        lines = decode(Path(file).read_bytes(), file).replace("\r\n", "\n").split("\n")
        # an empty line asks nothing
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompt_file {file} has no prompt; "
                             "allowed: one prompt a line")
        return prompts
    if given.count("-") > 1:
        raise ValueError("--prompt - stands twice; standard input can be read only once")
    return [read_stdin() if prompt == "-" else prompt for prompt in given]


def read_stdin() -> str:
    # the bytes themselves, whatever coding the terminal is thought to have
    stream = getattr(sys.stdin, "buffer", None)
    text = decode(stream.read(), "standard input") if stream else sys.stdin.read()
    return text.replace("\r\n", "\n").rstrip("\n")


def note_style(tokenizer, style: str):
    """Say on standard error where no chat template told the format."""
    if tokenizer.template is None and style == "auto":
        name, _ = resolve_style(style, tokenizer)
        print(f"note: the model has no chat template; by its special tokens the format is {name}",
              file=sys.stderr)


def encode_prompt(text: str, tokenizer, style: str | None) -> list:
    """Token ids that a model continues; in a chat format, if asked, as a user's first turn."""
    if style:
        return encode_chat([{"role": "user", "content": text}], tokenizer, style)
    return tokenizer.encode_start(text)
