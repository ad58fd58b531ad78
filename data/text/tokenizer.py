r"""Text to token ids and back, for every model this project loads.

All supported models (GPT-2, Llama 3, Qwen 2 and 2.5) use byte-level byte-pair encoding: text is cut
into pieces by a regular expression, and inside a piece the two neighbours that form the token with
the lowest rank are merged until nothing merges any more. `tiktoken` does the merging; its tables
come from vocab.py, which reads whatever files lie beside the weights. Nothing is downloaded.

Read next: `formats.py`, which turns conversations into ids. Try it on a model's directory:

    python -m data.text.tokenizer data/tiny "Once upon a time"
"""

import argparse
import codecs
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
    READERS, beginning_id, chat_template, end_ids, read_files, special_tokens, words_of_text)

# The splitting regex overflows its stack on runs of some hundred thousand spaces, so such runs are
# cut first.
LONGEST_RUN = 25_000
LONG_RUN = re.compile(r"(?<!\s)\s{%d,}" % LONGEST_RUN)

# Bytes that texts have hardly ever: control characters, and what begins a character beyond U+3FFFF
# or none. SmolLM's vocabulary lacks some of them; they are dropped, as its own tokenizer does.
RARE = {*range(9), 11, 12, *range(14, 32), 127, 0xC0, 0xC1, *range(0xF1, 0x100)}

# One character of each kind a split pattern may forget (all of it unchanged by NFC).
PROBE = "Aa 7\u00bd_'s!+\t\r\n\x00 \u00e9\u4f60\u0301\u200b\U0001f600\ue000  "


# --- encode and decode ----------------------------------------------------------------------------

class Tokenizer:
    """One vocabulary: `encode` text to ids, `decode` ids to text. Made by `load_tokenizer`.

    vocab_size  highest id + 1 (ids may have gaps)
    special     special token text -> id
    bos_id      id to put before a text, None where the model expects none
    eos_id      end of a text
    stop_ids    every id that ends an answer
    template    of conversations, as the model's directory has it, or None
    """

    def __init__(self, ranks, special, pattern, nfc=False, words=()):
        self.special = dict(special)
        # those that are one id in any text, as they were in the model's training
        self.words = sorted(set(words) & set(special))
        self.pattern = pattern
        self.nfc = nfc
        # what the vocabulary does not tell: load_tokenizer finds it in other files
        self.bos_id = None
        self.eos_id = None
        self.stop_ids = set()
        self.template = None
        self._ranks = ranks
        self._bytes = self._bytes_of_ids()
        self.vocab_size = max(self._bytes) + 1
        # tiktoken knows no special tokens here: text of a user must never become one by itself
        self._dropped = self._ids_of_missing_bytes()
        complete = {**ranks, **{bytes([byte]): id for id, byte in self._dropped.items()}}
        self._bpe = tiktoken.Encoding(
            "local", pat_str=pattern, mergeable_ranks=complete, special_tokens={})
        self._special_pattern = pattern_of_names(self.special)
        self._words_pattern = pattern_of_names(self.words)
        # tiktoken silently drops what the pattern does not match.
        probe = "".join(c for c in PROBE if ord(c) not in self._dropped.values())
        if self.decode(self.encode(probe)) != probe:
            raise ValueError(f"the split pattern {pattern!r} does not cover every text")

    def _bytes_of_ids(self) -> dict:
        """id -> bytes, special tokens included; ValueError if the vocabulary contradicts itself."""
        table = {id: token for token, id in self._ranks.items()}
        if len(table) < len(self._ranks):
            raise ValueError("two tokens of the vocabulary share one id")
        for text, id in self.special.items():
            # the same token may be listed twice, as an ordinary one and as a special one
            if table.setdefault(id, text.encode()) != text.encode():
                raise ValueError(f"id {id} is both {table[id]!r} and the special token {text!r}")
        return table

    def _ids_of_missing_bytes(self) -> dict:
        """id beyond the vocabulary -> byte, for every byte that the vocabulary lacks.

        Raises ValueError for one that texts have: there would be text that no ids stand for.
        """
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ranks]
        needed = [byte for byte in missing if byte not in RARE]
        if needed:
            raise ValueError(f"the vocabulary has no token for byte {needed[0]} "
                             f"({len(missing)} of 256 bytes missing)")
        # merged last, if it came to that
        return {self.vocab_size + place: byte for place, byte in enumerate(missing)}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without a beginning-of-text token.

        special: True turns the text of special tokens into their ids; only for text the program
        wrote itself. With False (anything a user or a data set wrote) "<|eot_id|>" is spelled in
        ordinary tokens. Added tokens that control nothing, `words`, are one id either way.
        Raises ValueError if `text` holds half of a surrogate pair, which has no UTF-8 form.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise ValueError(f"text has a lone surrogate U+{code:04X} at character {error.start}; "
                             "read the file with encoding='utf-8'") from None
        names = self._special_pattern if special else self._words_pattern
        if names is None:
            return self._encode_ordinary(text)
        ids = []
        # Splitting on a group alternates ordinary text (even places) and special tokens (odd ones).
        for place, part in enumerate(names.split(text)):
            if place % 2:
                ids.append(self.special[part])
            else:
                ids += self._encode_ordinary(part)
        return ids

    def encode_start(self, text: str) -> list[int]:
        """Ids of `text` as the start of a document: `bos_id` first, if the model expects one."""
        ids = self.encode(text)
        if self.bos_id is None:
            return ids
        return [self.bos_id] + ids

    def _encode_ordinary(self, text) -> list[int]:
        # only between special tokens: an accent after one would otherwise merge with its last sign
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        ids = []
        for chunk in _chunks(text):
            ids += self._bpe.encode_ordinary(chunk)
        if self._dropped:
            ids = [id for id in ids if id not in self._dropped]
        return ids

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token."""
        # Embeddings may be padded, so a model can write an id without a token: it reads as U+FFFD.
        return self._bytes.get(int(id), "\ufffd".encode())

    def decode(self, ids) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, special tokens their names."""
        # joined first: a character may be spread over several tokens
        content = b"".join(map(self.token_bytes, ids))
        return content.decode("utf-8", errors="replace")

    def stream(self) -> "Stream":
        """A fresh incremental decoder."""
        return Stream(self)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any token, special token, pattern, first or last id."""
        # sorted, since two files may list one vocabulary in two orders
        tokens = sorted((id, token.hex()) for token, id in self._ranks.items())
        content = [tokens, sorted(self.special.items()), self.words, self.pattern, self.nfc,
                   self.bos_id, self.eos_id]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def pattern_of_names(names):
    """What finds special tokens in a text, or None where there are none."""
    if not names:
        return None
    # Longest first, so that a special token is never read as a shorter one that it begins with.
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    # a group, so that `split` keeps what it splits at
    return re.compile("(" + "|".join(longest_first) + ")")


def _chunks(text):
    """The text in one piece, or cut inside runs of white space too long for the splitting regex."""
    start = 0
    for run in LONG_RUN.finditer(text):
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


class Stream:
    """Decodes one id at a time, for text that is shown while it is written.

    stream(id) returns the text completed by this id (perhaps none), never half a character;
    stream.flush() returns what is left at the end. All of it joined equals `decode` of all ids.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        # keeps the bytes of an unfinished character until the rest arrives
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


# --- from a directory -----------------------------------------------------------------------------

def load_tokenizer(directory, vocab_rows: int | None = None) -> Tokenizer:
    """Build the tokenizer from the files in a model's directory.

    Looks for tokenizer.model (tiktoken lines), tokenizer.json, vocab.json + merges.txt,
    encoder.json + vocab.bpe, in this order.
    vocab_rows: rows of the model's embedding; a tokenizer with higher ids is refused.
    Raises FileNotFoundError if none is there, ValueError (one line) if the files cannot be
    reproduced exactly.
    """
    source = _find(Path(directory))
    try:
        tokenizer = _build(source)
        # an id without a row would be an index error, deep inside the model
        if vocab_rows is not None and tokenizer.vocab_size > vocab_rows:
            raise ValueError(f"the vocabulary has {tokenizer.vocab_size} ids but the model's "
                             f"embedding has {vocab_rows} rows; use the tokenizer that came with "
                             "the weights")
    # The readers take the files to be what their names promise; where one is not, it shows here.
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError,
            RecursionError) as error:
        raise ValueError(f"{source}: this file or one beside it has an unexpected form: "
                         f"{error!r}") from error
    except ValueError as error:
        # of a bad regular expression tiktoken tells in several lines
        message = str(error).partition("\n")[0]
        raise ValueError(f"{source}: {message}") from error
    return tokenizer


def _find(directory: Path) -> Path:
    for name in READERS:
        if present(directory / name):
            return directory / name
    raise FileNotFoundError(f"no tokenizer in {directory}: looked for tokenizer.model, "
                            "tokenizer.json, vocab.json + merges.txt, encoder.json + vocab.bpe")


def _build(source: Path) -> Tokenizer:
    files = read_files(source)
    special = special_tokens(files)
    read = READERS[source.name]
    ranks, pattern, nfc = read(source, files, special)
    # a config that spells the pattern out knows better than the reader's guess by the form
    pattern = files["tokenizer_config"].get("pat_str", pattern)
    tokenizer = Tokenizer(ranks, special, pattern, nfc, words_of_text(files))
    tokenizer.template = chat_template(source, files)
    # Llama 3, whose form this is, always begins a text
    used = source.name == "tokenizer.model"
    tokenizer.bos_id = beginning_id(files, special, used)
    tokenizer.eos_id, tokenizer.stop_ids = end_ids(files, special)
    return tokenizer


# --- command line ---------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(description="Show how a model's tokenizer cuts a text.")
    parser.add_argument("directory", help="directory with the tokenizer's files")
    parser.add_argument("text", help="text to encode")
    parser.add_argument(
        "--special", action=argparse.BooleanOptionalAction, default=False,
        help="read the names of special tokens inside the text as those tokens")
    return parser.parse_args(argv)


@command("data.text.tokenizer")
def main(argv=None):
    args = parse_args(argv)
    tokenizer = load_tokenizer(args.directory)
    ids = tokenizer.encode(args.text, special=args.special)
    print(f"ids {tokenizer.vocab_size}  special {len(tokenizer.special)}  "
          f"bos {tokenizer.bos_id}  eos {tokenizer.eos_id}  stop {sorted(tokenizer.stop_ids)}  "
          f"fingerprint {tokenizer.fingerprint}")
    for id in ids:
        # as bytes: a token may be half a character
        print(f"{id:>8}  {tokenizer.token_bytes(id)!r}")


if __name__ == "__main__":
    main()
