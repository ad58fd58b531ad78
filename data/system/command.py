"""What all commands have in common: how they end, and which of their flags were really given.

A mistake that a user can mend is one line on standard error and exit status 2, Ctrl-C one line and
130; a reader that goes away (`| head`) is no mistake. A character that the terminal lacks is
written as its escape. Imported first of all, so that Ctrl-C while torch is imported is quiet too.
"""

import argparse
import functools
import os
import sys


def command(name: str):
    """Decorator of a main(argv)."""
    def decorate(main):
        @functools.wraps(main)
        def run(argv=None):
            for stream in (sys.stdout, sys.stderr):
                # a captured stream may not know how
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
            except (ValueError, OSError) as error:
                fail(f"{name}: {error}", 2)
            except KeyboardInterrupt as stop:
                fail(f"{name}: {stop}" if str(stop) else f"{name}: stopped", 130)
        return run
    return decorate


def fail(line: str, status: int):
    print(visible(line), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        silence()
    raise SystemExit(status)


def silence():
    """Nothing more can be written: Python would complain once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def visible(text) -> str:
    """One line without commands to the terminal: a file's name may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def quiet_interrupt(kind, error, trace):
    """For what is interrupted before its main has begun."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped", file=sys.stderr)


sys.excepthook = quiet_interrupt


# --- flags ----------------------------------------------------------------------------------------

def flag_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the file's own text, as it is laid out there."""
    return argparse.ArgumentParser(
        prog=prog, usage=argparse.SUPPRESS, description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_flags(add):
    """Where and how a model that is not trained is loaded; add: a parser's add_argument."""
    add("--merge_lora", "--fold_lora", action=argparse.BooleanOptionalAction, default=True,
        help="add the path's LoRA into copies of its matrices: faster, more memory")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen weights")
    add("--cache_dir", help="where downloaded models are kept")


def given_flags(parser, argv) -> dict:
    """The flags that stand on the command line, whatever their defaults are."""
    names = vars(parser.parse_args(argv))
    # no value on a command line is None
    parser.set_defaults(**dict.fromkeys(names))
    args = vars(parser.parse_args(argv))
    return {name: value for name, value in args.items() if value is not None}


def refuse_idle(given, rules):
    """Raise ValueError for a flag that would do nothing: that is a misunderstanding.

    rules  (names, can they act?, what they need), the names without dashes
    """
    for names, acts, needed in rules:
        idle = [name for name in names if name in given]
        if idle and not acts:
            raise ValueError(f"--{idle[0]} would do nothing: it needs {needed}")
