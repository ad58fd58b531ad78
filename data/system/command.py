"""What all commands share: how they end, and how values and flags are checked.

A mistake that a user can mend ends with one line on standard error and exit status 2, Ctrl-C with
one line and 130, a closed pipe (`| head`) with 0. A character that the terminal lacks is written
as its escape. Import this file first: then Ctrl-C during the import of torch is one line too.
"""

import argparse
import functools
import math
import os
import sys
from contextlib import suppress


def command(name: str):
    """Decorator of a main(argv)."""
    def decorate(main):
        @functools.wraps(main)
        def run(argv=None):
            for stream in (sys.stdout, sys.stderr):
                # a captured stream may lack the method
                if hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="backslashreplace")
            try:
                result = main(argv)
                # a full disk behind `> file` shows here
                sys.stdout.flush()
                return result
            except BrokenPipeError:
                silence()
                raise SystemExit(0)
            except UnicodeEncodeError as error:
                near = error.object[max(0, error.start - 20):error.start + 20]
                fail(f"{name}: the text {near!r} holds half a character, which has no UTF-8; "
                     "remove it", 2)
            except (ValueError, OSError) as error:
                fail(f"{name}: {error}", 2)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                fail(f"{name}: not enough memory ({str(error).strip()[:80]}); "
                     "take a smaller model, batch or number", 2)
            except KeyboardInterrupt as stop:
                fail(f"{name}: {stop}" if str(stop) else f"{name}: stopped", 130)
        return run
    return decorate


def out_of_memory(error) -> bool:
    """Is this Python's, or torch's for a GPU or the CPU? torch is not imported yet."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def fail(line: str, status: int):
    """Print one line and leave with this exit status."""
    print(visible(line), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        silence()
    raise SystemExit(status)


def silence():
    """Discard further output: Python would report the closed pipe again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def visible(text) -> str:
    """One line without commands to the terminal: a file's name may contain any character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def quiet_interrupt(kind, error, trace):
    """Ctrl-C before main has begun is one line; other errors keep their traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped", file=sys.stderr)


sys.excepthook = quiet_interrupt

# a shell's `>&-`, services and pythonw close the standard streams; each takes its own number again
for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, stream) is None:
        setattr(sys, stream, open(os.devnull, mode, encoding="utf-8"))


def each_line(act):
    """Call `act` with every line of standard input; what goes wrong in one is said in one line.

    Ctrl-C ends what `act` does; twice in a row, or at the end of the input, this returns.
    """
    sign = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    stopped = False     # by a Ctrl-C just before
    # the second Ctrl-C may come at any place
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            try:
                act(input(sign).rstrip("\r"))
                stopped = False
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                stopped = False
                print(visible(error), file=sys.stderr)
            except KeyboardInterrupt:
                if stopped:
                    break
                stopped = True
                print(quiet("\nstopped; Ctrl-C once more, or Ctrl-D, ends"))


def quiet(text: str) -> str:
    """Text to print, pale on a terminal without NO_COLOR."""
    return f"\033[2m{text}\033[0m" if has_colours() else text


def has_colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


# --- values ---------------------------------------------------------------------------------------

def check_range(name: str, value, low, high=math.inf, kind: type = float):
    """Return `value`, a finite number from low to high, both included.

    kind  float: any number, int: integers alone, bool: True or False
    Raises ValueError for another number or type.
    """
    types = (int, float) if kind is float else kind
    # to Python True is an integer
    right_type = isinstance(value, types) and isinstance(value, bool) == (kind is bool)
    if right_type and low <= value <= high and value != math.inf:
        return value
    allowed = f"{low} or more" if high == math.inf else f"{low} to {high}"
    if kind is int:
        allowed += ", an integer"
    raise ValueError(f"{name} = {repr(value)[:60]} is out of range; allowed: {allowed}")


def choices(received, allowed, what: str):
    """Return `received`. Raises ValueError unless it is among `allowed`."""
    # a list, which a file may hold, is in no table
    if not isinstance(received, (str, int, float)) or received not in allowed:
        names = ", ".join(map(str, allowed))
        raise ValueError(f"{what} {received!r} is not supported; allowed: {names}")
    return received


# --- flags ----------------------------------------------------------------------------------------

def flag_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of the file, in its own layout."""
    return argparse.ArgumentParser(
        prog=prog, usage=argparse.SUPPRESS, description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_flags(add):
    """The flags of loading a model; add: the add_argument of a parser."""
    add("--base", help="directory of the path's frozen model, if it has moved since training")
    add("--merge_lora", "--fold_lora", action=argparse.BooleanOptionalAction, default=True,
        help="copies of matrices for sampling, of the head and with the LoRA added: faster, more "
             "memory")
    add("--device", help="cuda, mps or cpu (default: the best available)")
    add("--dtype", choices=("float32", "bfloat16"), help="type of the frozen weights")
    add("--cache_dir", help="directory of downloaded models")


def add_estimate_flags(add, estimates):
    """How the clean point follows from the logits; add: the add_argument of a parser."""
    add("--estimate", default="argmax", choices=estimates,
        help="estimate of the clean point from the logits (default: argmax)")
    add("--estimate_temperature", default=1.0, type=estimate_temperature,
        help="temperature of that estimate, a number or 1-t (default: 1)")


def estimate_temperature(text: str):
    """A number or 1-t."""
    if text == "1-t":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 1-t") from None


def given_flags(parser, argv) -> dict:
    """The flags that stand on the command line, by their names there.

    Afterwards the parser has no default values.
    """
    names = vars(parser.parse_args(argv))
    # no value on a command line is None
    parser.set_defaults(**dict.fromkeys(names))
    args = vars(parser.parse_args(argv))
    # the dest of --class: Python has the word for itself
    return {"class" if name == "label" else name: value
            for name, value in args.items() if value is not None}


def flag_words(name: str, value) -> list:
    """The words of a flag on the command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [word for one in value for word in flag_words(name, one)]
    # a value that begins with a dash would be read as a flag
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def refuse_idle(given, rules):
    """Raise ValueError for a flag without effect.

    rules  (names without dashes, do they have an effect?, what they need)
    """
    for names, acts, needed in rules:
        idle = [name for name in names if name in given]
        if idle and not acts:
            raise ValueError(f"--{idle[0]} would do nothing: it needs {needed}")
