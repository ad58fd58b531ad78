"""Prompts as a user gives them: on the command line, in a file, on standard input; as token ids."""

import sys
from pathlib import Path

from data.formats import encode_chat


def read_prompts(given: list, file: str | None) -> list:
    """Texts from a file, one a line, or else those given, of which `-` is standard input.

    Raises ValueError for a file without a prompt.
    """
    if file:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        # an empty line asks nothing
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompt_file {file} has no prompt; "
                             "allowed: one prompt a line")
        return prompts
    return [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in given]


def encode_prompt(text: str, tokenizer, chat: bool) -> list:
    """Token ids that a model continues; in its chat format, as a user's first turn."""
    if chat:
        return encode_chat([{"role": "user", "content": text}], tokenizer)
    return tokenizer.encode_start(text)
