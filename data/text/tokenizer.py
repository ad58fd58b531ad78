r"""Text to token ids and back, for every model that this project loads.

All supported models (GPT-2, Llama 3, Qwen 2 and 2.5, SmolLM) use byte-level byte-pair encoding: a
regular expression cuts the text into pieces; inside a piece, the two neighbours that form the token
with the lowest rank are merged until no pair forms a token. `tiktoken` does the merging; vocab.py
reads its tables from the files beside the weights.

Read next: `formats.py`, which turns conversations into ids. Try it on a model's directory:

    python -m data.text.tokenizer data/tiny "Once upon a time"
"""

import argparse
import functools
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import tiktoken

from data.system.command import command
from data.system.disk import present
from data.text.vocab import (
    READERS, beginning_id, chat_template, end_ids, read_files, special_tokens)

# The splitting regex overflows its stack on some hundred thousand spaces in a row.
LONGEST_RUN = 25_000
LONG_RUN = re.compile(r"(?<!\s)\s{%d,}" % LONGEST_RUN)

# Bytes that occur in hardly any text: control characters, and first bytes of characters beyond
# U+3FFFF or of none. SmolLM's vocabulary lacks some of them; like its own tokenizer, we drop them.
RARE = {*range(9), 11, 12, *range(14, 32), 127, 0xC0, 0xC1, *range(0xF1, 0x100)}

# One character of each kind that a split pattern may omit (none is changed by NFC).
PROBE = "Aa 7\u00bd_'s!+\t\r\n\x00 \u00e9\u4f60\u0301\u200b\U0001f600\ue000  "


# --- encode and decode ----------------------------------------------------------------------------

class Tokenizer:
    """One vocabulary: `encode` text to ids, `decode` ids to text. Made by `load_tokenizer`.

    vocab_size  highest id + 1 (ids may have gaps)
    special     special token text -> id
    words       special tokens that are one id in any text, as they were in the model's training
    bos_id      id to put before a text, None where the model expects none
    eos_id      id that ends a text
    stop_ids    every id that ends an answer
    template    chat template of the model's directory, or None

    Raises ValueError for a vocabulary that contradicts itself or cannot encode every text.
    """

    def __init__(self, ranks, special, pattern, nfc=False, words=()):
        self.special = dict(special)
        self.words = sorted(words)
        self.pattern = pattern
        self.nfc = nfc
        # load_tokenizer reads these four from other files
        self.bos_id = None
        self.eos_id = None
        self.stop_ids = set()
        self.template = None

        self._ranks = ranks
        self._bytes = {id: token for token, id in ranks.items()}
        if len(self._bytes) < len(ranks):
            raise ValueError("two tokens of the vocabulary share one id")
        for text, id in self.special.items():
            # a token may be listed twice, as an ordinary and as a special one
            token = self._bytes.setdefault(id, text.encode())
            if token != text.encode():
                raise ValueError(f"id {id} is both {token!r} and the special token {text!r}")
        self.vocab_size = max(self._bytes) + 1

        # tiktoken needs all 256 bytes. Missing ones get ids beyond the vocabulary, the last ranks
        # to be merged; `_encode_ordinary` drops these ids.
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        needed = [byte for byte in missing if byte not in RARE]
        if needed:
            raise ValueError(f"the vocabulary has no token for byte {needed[0]} "
                             f"({len(missing)} of 256 bytes missing)")
        added = {bytes([byte]): self.vocab_size + n for n, byte in enumerate(missing)}
        # without special tokens: a user's text must never become one
        self._bpe = tiktoken.Encoding(
            "local", pat_str=pattern, mergeable_ranks={**ranks, **added}, special_tokens={})
        self._special_pattern = pattern_of_names(self.special)
        self._words_pattern = pattern_of_names(self.words)
        # tiktoken drops in silence what the pattern does not match
        probe = "".join(character for character in PROBE if ord(character) not in missing)
        if self.decode(self.encode(probe)) != probe:
            raise ValueError(f"the split pattern {pattern!r} does not cover every text")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without a beginning-of-text token.

        special: True turns the names of special tokens into their ids; only for text that the
        program wrote itself. With False, "<|eot_id|>" is ordinary characters. `words` are one id in
        both cases. Raises ValueError for half of a surrogate pair, which has no UTF-8 form.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise ValueError(f"text has a lone surrogate U+{code:04X} at character {error.start}; "
                             "read the file with encoding='utf-8'") from None
        names = self._special_pattern if special else self._words_pattern
        ids = []
        # splitting at a group alternates ordinary text (even places) and special tokens (odd ones)
        for place, part in enumerate(names.split(text)):
            ids += [self.special[part]] if place % 2 else self._encode_ordinary(part)
        return ids

    def encode_start(self, text: str) -> list[int]:
        """Ids of `text` as the start of a document: `bos_id` first, if the model expects one."""
        start = [] if self.bos_id is None else [self.bos_id]
        return start + self.encode(text)

    def _encode_ordinary(self, text) -> list[int]:
        # only between special tokens: an accent after one would combine with its last character
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        cuts = []
        for run in LONG_RUN.finditer(text):
            cuts += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
        ids = []
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            ids += self._bpe.encode_ordinary(text[start:end])
        return [id for id in ids if id < self.vocab_size]

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token; U+FFFD for an id without one, as in a padded embedding."""
        return self._bytes.get(int(id), "\ufffd".encode())

    def decode(self, ids) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, special tokens their names."""
        # joined first: a character may be spread over several tokens
        content = b"".join(map(self.token_bytes, ids))
        return content.decode("utf-8", errors="replace")

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that depend on all tokens, the pattern, and the first and last id."""
        # sorted, since two files may list one vocabulary in two orders
        tokens = sorted((id, token.hex()) for token, id in self._ranks.items())
        content = [tokens, sorted(self.special.items()), self.words, self.pattern, self.nfc,
                   self.bos_id, self.eos_id]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def pattern_of_names(names):
    """A pattern that matches any of these special tokens; none, if there are no names."""
    # longest first: a special token must not be read as a shorter one that it begins with
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    # a group, so that `split` returns the special tokens too; (?!) matches nothing
    return re.compile("(" + ("|".join(longest_first) or "(?!)") + ")")


# --- from a directory -----------------------------------------------------------------------------

def load_tokenizer(directory, vocab_rows: int | None = None) -> Tokenizer:
    """Build the tokenizer from the files in a model's directory, in the first form of READERS.

    vocab_rows: rows of the model's embedding; a tokenizer with higher ids is refused.
    Raises FileNotFoundError if there is none, ValueError (one line) if it cannot be reproduced
    exactly.
    """
    sources = (Path(directory, name) for name in READERS)
    source = next(filter(present, sources), None)
    if source is None:
        raise FileNotFoundError(f"no tokenizer in {directory}: looked for tokenizer.model, "
                                "tokenizer.json, vocab.json + merges.txt, encoder.json + vocab.bpe")
    try:
        files = read_files(source)
        special, words = special_tokens(files)
        ranks, pattern, nfc = READERS[source.name](source, files, special)
        # a pattern in the config takes precedence over the one inferred from the form
        pattern = files["tokenizer_config"].get("pat_str", pattern)
        tokenizer = Tokenizer(ranks, special, pattern, nfc, words)
        tokenizer.template = chat_template(source, files)
        # tokenizer.model is the form of Llama 3, which always begins a text
        always = source.name == "tokenizer.model"
        tokenizer.bos_id = beginning_id(files, special, always)
        tokenizer.eos_id, tokenizer.stop_ids = end_ids(files, special)
        # an id without a row would be an index error, deep inside the model
        if vocab_rows is not None and tokenizer.vocab_size > vocab_rows:
            raise ValueError(f"the vocabulary has {tokenizer.vocab_size} ids but the model's "
                             f"embedding has {vocab_rows} rows; use the tokenizer that came with "
                             "the weights")
    # a value of another form in a file raises one of these
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{source}: this file or one beside it has an unexpected form: "
                         f"{error!r}") from error
    except ValueError as error:
        # tiktoken describes an invalid regular expression in several lines
        message = str(error).partition("\n")[0]
        raise ValueError(f"{source}: {message}") from error
    return tokenizer


# --- command line ---------------------------------------------------------------------------------

@command("data.text.tokenizer")
def main(argv=None):
    parser = argparse.ArgumentParser(description="Show how a model's tokenizer cuts a text.")
    parser.add_argument("directory", help="directory of the tokenizer's files")
    parser.add_argument("text", help="text to encode")
    parser.add_argument(
        "--special", action=argparse.BooleanOptionalAction, default=False,
        help="names of special tokens inside the text as those tokens")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.directory)
    print(f"ids {tokenizer.vocab_size}  special {len(tokenizer.special)}  "
          f"bos {tokenizer.bos_id}  eos {tokenizer.eos_id}  stop {sorted(tokenizer.stop_ids)}  "
          f"fingerprint {tokenizer.fingerprint}")
    for id in tokenizer.encode(args.text, special=args.special):
        # as bytes: a token may be half a character
        print(f"{id:>8}  {tokenizer.token_bytes(id)!r}")


if __name__ == "__main__":
    main()
