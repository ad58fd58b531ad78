"""A conversation in the terminal: every line is a turn, and lines that begin with / are these.

    /steps 16, /solver dopri5, /temperature 0.7, /guidance 2, /class sort, /seed 1,
    /max_new_tokens 99        how the next answers are made; without a value: how they are made now
    /class none               without a class again
    /again, /frozen           the last question once more; to the frozen model, and not kept
    /trace FILE, /save FILE   the last answer as a page; the conversation for data.text.chat
    /reset, /help             a new conversation; this text

Ctrl-C stops an answer, whose beginning stays; twice in a row, or Ctrl-D, it ends the conversation.
"""

from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from os.path import commonprefix

with suppress(ImportError):
    import readline     # noqa: F401: gives `input` a history

from data.checkpoints.path import class_number
from data.parts.draws import check_seed
from data.parts.kv_cache import KVCache
from data.results.page import write_page
from data.system.command import check_range, quiet
from data.system.disk import check_absent, check_writable
from data.text.answer import Stop, Turn, Turns

SETTINGS = ("steps", "solver", "temperature", "guidance", "class", "seed", "max_new_tokens")
LONGEST = 512       # tokens of an answer in a chat format, unless --max_new_tokens is given


class Talk:
    """A conversation. settings, args, given, parser, generate: of sample.py, its loop the last."""

    def __init__(self, model, tokenizer, settings, args, given: dict, parser, generate):
        self.model, self.tokenizer, self.generate = model, tokenizer, generate
        self.settings, self.args, self.given, self.parser = settings, args, given, parser
        self.positions = model.lm.config.max_positions
        self.stop = Stop.of(tokenizer, args.stop)
        self.turns = Turns(tokenizer, args.chat)
        self.lines = []         # as they were typed, for the command on a page
        self.asked = None       # the args of the last answer
        self.read = {}          # by the path or not -> (KV cache, the ids in it)
        if self.turns.style and "max_new_tokens" not in given:
            args.max_new_tokens = min(LONGEST, self.positions // 2)
        self.check(args)

    def check(self, args) -> tuple:
        """(Settings, class ids or None) of args; ValueError where they allow no answer."""
        check_seed(args.seed)
        check_range("max_new_tokens", args.max_new_tokens, 1, self.positions - 1)
        if args.steps and self.model.lm is self.model:
            raise ValueError("this model has no diffusion path; allowed: --steps 0, or /steps 0")
        if args.guidance != 1 and args.label is None:
            raise ValueError("guidance needs a class, so first --class, or /class NAME")
        class_ids = args.label and [class_number(args.label, self.model.config)]
        names = vars(self.settings).keys() & SETTINGS
        return replace(self.settings, **{name: vars(args)[name] for name in names}), class_ids

    def act(self, line: str):
        """Answer a line, or do what one with / says."""
        name, value = [*line[1:].split(maxsplit=1), "", ""][:2]
        if not line.strip():
            return
        if name not in ("trace", "save"):
            self.lines.append(line)
        if not line.startswith("/"):
            self.answer(line, self.turns.turns)
        elif name in SETTINGS:
            # the parser of the flags itself says what it refuses, in one line
            with suppress(SystemExit):
                new = vars(self.parser.parse_args([f"--{name}={value}"] if value else [])).items()
                args = Namespace(**vars(self.args) | {key: v for key, v in new if v is not None})
                if (name, value) == ("class", "none"):
                    args.label = None
                self.check(args)
                self.args = args
            print(quiet(f"{name} {vars(self.args)['label' if name == 'class' else name]}"))
        elif name == "reset":
            self.turns.reset()
        elif name == "help":
            print(__doc__)
        elif name not in ("again", "frozen", "trace", "save"):
            raise ValueError(f"/{name} is unknown; /help shows what is allowed")
        elif not self.turns.turns:
            raise ValueError(f"/{name} needs an answer; first ask a question")
        elif name in ("again", "frozen"):
            *before, (question, _) = self.turns.turns
            self.answer(question, before, name == "frozen")
        else:
            check_absent(value, self.args.overwrite)
            check_writable(value)
            (self.turns.save if name == "save" else self.trace)(value)
            print(quiet(f"written: {value}"))

    def trace(self, path: str):
        question, answer = self.turns.turns[-1]
        if not answer.traces:
            raise ValueError("/trace needs an answer of the path; allowed: steps 1 or more")
        args = Namespace(**vars(self.asked) | {"html": path})
        write_page(args, self.given, question, answer, self.tokenizer, self.lines)

    def answer(self, question: str, before: list, frozen: bool = False):
        """Print the answer to a question behind some turns; one of the frozen model is not kept."""
        args = Namespace(**vars(self.args) | {"steps": 0}) if frozen else self.args
        settings, class_ids = self.check(args)
        ids = self.turns.encode(question, before, self.positions - settings.max_new_tokens + 1)
        cache, held = self.read.pop(args.steps > 0, (KVCache(), []))
        # the last token is read again, since its hidden state is not in the cache
        cache.length = min(len(commonprefix([held, ids])), len(ids) - 1)
        turn = Turn(self.tokenizer, cache.length, not self.stop.strings, args.steps > 0)
        try:
            self.generate(self.model, [ids], settings, self.stop, class_ids, [args.seed], turn,
                          cache)
        # behind a Ctrl-C too: the beginning of an answer stays
        finally:
            cache.length = turn.read
            self.read[args.steps > 0] = cache, (ids + turn.ids)[:turn.read]
            turn.end()
            if turn.answer and not frozen:
                self.turns.turns, self.asked = [*before, (question, turn.answer)], args
