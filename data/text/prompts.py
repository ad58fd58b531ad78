"""Prompts as a user gives them: on the command line, in a file, on standard input; as token ids."""

import sys
from pathlib import Path

from data.system.disk import decode
from data.text.formats import encode_chat, resolve_style


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
