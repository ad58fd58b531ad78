"""A user's prompts, and answers: their tokens, their cost in evaluations, and where they end.

Benchmarks cut answers at strings such as "\\n\\nQuestion:", which may be tokenised in many ways, so
strings are searched for in the decoded text. sample.py fills an Answer token by token; a *watcher*
sees every evaluation and every token:

    watch(batch, rows, t, logits)                      an evaluation: logits (n, 1, V) of these rows
    watch(batch, rows, 1.0, logits, tokens, solution)  a token of every row was chosen from these
"""

import codecs
import json
import re
import sys
import time
from dataclasses import dataclass, field

import torch

from data.system.command import quiet
from data.system.disk import appearing, decode, read_bytes
from data.text.formats import encode_chat, recognise, resolve_style


# --- prompts --------------------------------------------------------------------------------------

def read_prompts(given: list, file: str | None) -> list:
    """The prompts of a file, one a line, or else those given, of which `-` is standard input."""
    if file:
        # only a line feed ends a line, no other separator of Unicode
        lines = decode(read_bytes(file), file).replace("\r\n", "\n").split("\n")
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompt_file {file} has no prompt; allowed: one prompt a line")
        return prompts
    if given.count("-") > 1:
        raise ValueError("--prompt - was given twice; standard input can be read only once")
    if "-" in given:
        # the bytes, whatever encoding Python expects of the terminal
        stream = getattr(sys.stdin, "buffer", None)
        text = decode(stream.read(), "standard input") if stream else sys.stdin.read()
        text = text.replace("\r\n", "\n").rstrip("\n")
        return [text if prompt == "-" else prompt for prompt in given]
    return given


def encode_prompts(texts: list, tokenizer, style: str | None) -> list:
    """Token ids that a model continues; with a chat style, as the user's first turn."""
    if not style:
        return [tokenizer.encode_start(text) for text in texts]
    if tokenizer.template is None and style == "auto":
        name, _ = resolve_style(style, tokenizer)
        print(f"note: the model has no chat template; by its special tokens the format is {name}",
              file=sys.stderr)
    return [encode_chat([{"role": "user", "content": text}], tokenizer, style) for text in texts]


class Turns:
    """A conversation in a chat format; without one, every question is a text to continue."""

    def __init__(self, tokenizer, chat: str | None):
        """chat: of encode_prompts; None: the model's own format, if it has one that we know."""
        self.tokenizer = tokenizer
        self.style = chat or recognise(tokenizer.template)[0]
        if chat == "auto" and resolve_style(chat, tokenizer)[0] == "plain":
            raise ValueError("--chat without a prompt: this model has no chat format; allowed: "
                             "--talk, to continue lines, or --chat plain, questions and answers")
        # at once, for the note on a format that only the special tokens tell, and for its errors
        encode_prompts(["?"], tokenizer, self.style)
        self.reset()

    def reset(self):
        self.turns = []         # (question, Answer)
        self.first = 0          # the first turn for which there was room

    def encode(self, question: str, turns: list, room: int) -> list:
        """Token ids of some turns and a question, at most `room`: the oldest turns are left out."""
        if not self.style:
            return self.tokenizer.encode_start(question)
        for first in range(self.first, len(turns) + 1):
            messages = [*messages_of(turns[first:]), {"role": "user", "content": question}]
            ids = encode_chat(messages, self.tokenizer, self.style)
            if len(ids) <= room:
                if first > self.first:
                    print(quiet(f"the first {first} turns are left out: no room in the model"))
                    self.first = first
                break
        return ids

    def save(self, path: str):
        """Write the conversation as lines of JSON for data/text/chat.py."""
        rows = [{"messages": messages_of(self.turns)}]
        if not self.style:
            rows = [{"text": question + answer.text} for question, answer in self.turns]
        with appearing(path) as part:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            part.write_text(text, encoding="utf-8", newline="\n")


def messages_of(turns: list) -> list:
    """The messages of turns whose answers are not empty, which no format could write."""
    # a format without turns of its own puts a blank before the answer
    return [{"role": role, "content": content}
            for question, answer in turns if answer.text.strip()
            for role, content in (("user", question),
                                  ("assistant", answer.text.removeprefix(" ")))]


# --- answers --------------------------------------------------------------------------------------

def cut(text: str, stops) -> str:
    """Text up to the first of some strings."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[:min(ends)] if ends else text


def without_thoughts(text: str) -> str:
    """A text without its <think>...</think>; behind a thought that does not end is no answer.

    Some models write <thinking> or <thought>.
    """
    text = re.sub(r"(?is)<(think|thinking|thought)>.*?(?:</\1>|$)", "", text)
    # the format may have opened the thought in the prompt
    return re.split(r"(?i)</(?:think|thinking|thought)>", text)[-1]


@dataclass
class Stop:
    """Where answers end: at token ids, or at strings in the decoded text."""
    ids: set = field(default_factory=set)
    strings: list = field(default_factory=list)
    tokenizer: object = None

    @classmethod
    def of(cls, tokenizer, texts=()) -> "Stop":
        """The model's own ends and further texts, which may name special tokens.

        Raises ValueError for an empty text, at which every answer would end at once.
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
        """Has a stop string just been completed?"""
        # a token is at least a byte long, so a string of n bytes lies within the last n tokens
        longest = max(len(string.encode()) for string in self.strings)
        tail = self.tokenizer.decode(ids[-longest:])
        return any(string in tail for string in self.strings)

    def text(self, ids) -> str:
        """The decoded answer up to the first stop string; "" without a tokenizer."""
        return cut(self.tokenizer.decode(ids), self.strings) if self.tokenizer else ""


@dataclass
class Answer:
    """ids: the new tokens, without the stop token; nfe: evaluations for every token drawn."""
    stop: Stop = field(default_factory=Stop, repr=False, compare=False)
    ids: list = field(default_factory=list)
    nfe: list = field(default_factory=list)
    calls: int = field(default=0, compare=False)  # of the network, in which these were made
    stopped: bool = False                # it ended before max_new_tokens
    unfinished: int = 0                  # tokens whose ODE reached max_nfe before t = 1
    log_p: list = field(default_factory=list)     # of every token, under the frozen model
    right: bool = False                  # where it was graded
    traces: list = field(default_factory=list)    # a Trace of every token

    @property
    def text(self) -> str:
        return self.stop.text(self.ids)

    @property
    def score(self) -> float:
        """Mean log p of its tokens under the frozen model, if a `Score` watched."""
        return sum(self.log_p) / max(1, len(self.log_p))

    @property
    def mark(self) -> str:
        return "right" if self.right else "wrong"


def spent(answers: list, seconds: float | None = None) -> str:
    """Tokens, NFE and speed of answers; calls, where several evaluations are made in one."""
    tokens = sum(len(answer.nfe) for answer in answers)
    nfe = sum(sum(answer.nfe) for answer in answers)
    calls = sum(answer.calls for answer in answers)
    unfinished = sum(answer.unfinished for answer in answers)
    line = f"{tokens} tokens, {nfe} NFE ({nfe / tokens:.1f} per token)"
    if calls < nfe:
        line += f" in {calls} calls"
    # an ODE that was cut short may have given another token: say so
    if unfinished:
        line += f", {unfinished} stopped at max_nfe"
    return line if seconds is None else f"{line}, {tokens / seconds:.0f} tokens/s"


# --- watchers -------------------------------------------------------------------------------------

@dataclass
class Trace:
    """The predictions of one token on the way from noise.

    predictions  (t, token id, p) at every evaluation, in order
    accepted     for each of them: was its step accepted?
    reached      the t that the steps reached; from there x went straight on to t = 1
    """
    predictions: list = field(default_factory=list)
    accepted: list = field(default_factory=list)
    reached: float = 0.0

    def judge(self, reached: float, rejected: int):
        """After the ODE is solved: mark the predictions made in its `rejected` steps."""
        self.reached = reached
        # a fixed solver rejects nothing, and its rounded times are too coarse for what follows
        if not rejected:
            return
        # after a rejected step t decreases: evaluations beyond a later t were rejected
        earliest = reached
        for place in reversed(range(len(self.predictions))):
            t = self.predictions[place][0]
            self.accepted[place] = t <= earliest
            earliest = min(earliest, t)


class TraceFirst:
    """A watcher: a Trace of every token of the first answer."""

    def __init__(self):
        self.answer = None
        self.trace = Trace()

    def __call__(self, batch, rows, t, logits, tokens=None, solution=None):
        self.answer = self.answer or batch.answers[0]
        # finished answers leave the batch; the adaptive solver moves some of the others
        if batch.answers[0] is not self.answer or rows[0] != 0:
            return
        if solution is not None:
            self.trace.judge(float(solution.t[0]), int(solution.rejected[0]))
        p, token = logits[0, 0].softmax(-1).max(-1)
        first = t if isinstance(t, float) else float(t[0])
        self.trace.predictions.append((first, int(token), float(p)))
        self.trace.accepted.append(True)
        if tokens is not None:
            self.answer.traces.append(self.trace)
            self.trace = Trace()


class Score:
    """A watcher: log p of every token under the frozen model `lm`, however it was found."""

    def __init__(self, lm):
        self.lm = lm

    def __call__(self, batch, rows, t, logits, tokens=None, solution=None):
        if tokens is None:
            return
        # without a solution the logits are the frozen model's own
        if solution is not None:
            logits = self.lm.logits(batch.states.hidden).float()
        index = torch.tensor(tokens, device=logits.device)[:, None]
        found = logits[:, 0].log_softmax(-1).gather(1, index)[:, 0]
        for answer, log_p in zip(batch.answers, found.tolist()):
            answer.log_p.append(log_p)


class Live:
    """A watcher: shows a single answer token by token, a character of several when it is whole.

    head: printed before
    """

    def __init__(self, head: str, tokenizer):
        self.tokenizer = tokenizer
        # holds the bytes of an incomplete character until the others arrive
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(head, end="", flush=True)

    def __call__(self, batch, rows, t, logits, tokens=None, solution=None):
        if tokens and tokens[0] not in batch.answers[0].stop.ids:
            content = self.tokenizer.token_bytes(tokens[0])
            print(self.decoder.decode(content), end="", flush=True)

    def end(self):
        print(self.decoder.decode(b"", final=True))


class Turn:
    """A watcher of the one answer of a turn: shows and traces it, and notes what the cache holds.

    answer  so far, None before its first token
    read    the number of tokens that are whole in the cache, whenever Ctrl-C comes
    """

    def __init__(self, tokenizer, read: int, show: bool, trace: bool):
        self.answer = None
        self.read = read
        self.start = time.time()
        self.live = Live("", tokenizer) if show else None
        self.watchers = [TraceFirst()] if trace else []
        self.watchers += [self.live] if show else []

    def __call__(self, batch, rows, t, logits, tokens=None, solution=None):
        for watcher in self.watchers:
            watcher(batch, rows, t, logits, tokens, solution)
        if tokens:
            self.answer = batch.answers[0]
            # all before this token has been read, and of the token itself nothing
            self.read = batch.cache.length

    @property
    def ids(self) -> list:
        return self.answer.ids if self.answer else []

    def end(self):
        """Print what is left of the answer, and what it cost."""
        if not self.answer or not self.answer.nfe:
            return
        if self.live:
            self.live.end()
        else:
            print(self.answer.text)
        line = spent([self.answer])
        if not self.answer.stopped:
            line += ", not ended"
        print(quiet(f"{line}, {time.time() - self.start:.1f} s"))
