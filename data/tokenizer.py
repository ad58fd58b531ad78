r"""Text to token ids and back, for every model this project loads.

All supported models (GPT-2, Llama 3, Qwen 2 and 2.5) use byte-level byte-pair encoding: text is cut into pieces by a
regular expression, and inside a piece the two neighbours that form the token with the lowest rank are merged until
nothing merges any more. `tiktoken` does the merging; this file builds its tables from whatever files lie beside the
weights. Nothing is downloaded and nothing is guessed: a vocabulary that cannot be reproduced exactly is refused.

Read next: `data/chat.py`, which turns conversations into ids. Try it on a model's directory:

    python -m data.tokenizer data/tiny "Once upon a time"
"""
import argparse
import base64
import codecs
import functools
import hashlib
import json
import re
import sys
import unicodedata
from pathlib import Path

import tiktoken

# GPT-2: English contractions, words and digit runs of any length, each taking one leading space; then the rest.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3: a word may start with any one sign, digits go in groups of up to three, line ends stay with what precedes.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Qwen 2 and 2.5: as Llama 3, but every digit stands alone.
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

# Which pattern belongs to a `vocab.json`, by tokenizer_class (tokenizer_config.json) or model_type (config.json).
PATTERNS = {"GPT2Tokenizer": GPT2_PATTERN, "Qwen2Tokenizer": QWEN2_PATTERN,
            "gpt2": GPT2_PATTERN, "qwen2": QWEN2_PATTERN, "llama": LLAMA3_PATTERN}

# Llama 3.1 to 3.3 (3.0 calls 128004, 128008 and 128010 reserved); the other ids up to 128255 are reserved.
LLAMA3_NAMED = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128004: "<|finetune_right_pad_id|>",
                128006: "<|start_header_id|>", 128007: "<|end_header_id|>", 128008: "<|eom_id|>",
                128009: "<|eot_id|>", 128010: "<|python_tag|>"}

# Any of these ends an answer where the vocabulary has it. The first one present ends a text if no file names one.
KNOWN_STOPS = ["<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"]

# The splitting regex overflows its stack on runs of some hundred thousand spaces, so such runs are cut first.
LONGEST_RUN = 25_000
LONG_RUN = re.compile(r"(?<!\s)\s{%d,}" % LONGEST_RUN)

# One character of each kind a split pattern may forget (all of it unchanged by NFC).
PROBE = "Aa 7\u00bd_'s!+\t\r\n\x00 \u00e9\u4f60\u0301\u200b\U0001f600\ue000  "


class Tokenizer:
    """One vocabulary: `encode` text to ids, `decode` ids to text. Made by `load_tokenizer`.

    vocab_size: highest id + 1 (ids may have gaps). special: special token text -> id. bos_id: id to put before a text,
    None where the model expects none. eos_id: end of a text. stop_ids: every id that ends an answer.
    """

    def __init__(self, ranks, special, pattern, nfc=False):
        self.special, self.pattern, self.nfc = dict(special), pattern, nfc
        self.bos_id, self.eos_id, self.stop_ids = None, None, set()
        self._ranks = ranks
        self._bytes = {id: token for token, id in ranks.items()}
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"the vocabulary has no token for byte {missing[0]} ({len(missing)} of 256 bytes missing)")
        if len(self._bytes) < len(ranks):
            raise ValueError("two tokens of the vocabulary share one id")
        for text, id in self.special.items():
            if self._bytes.setdefault(id, text.encode()) != text.encode():
                raise ValueError(f"id {id} is both {self._bytes[id]!r} and the special token {text!r}")
        self.vocab_size = max(self._bytes) + 1
        self._bpe = tiktoken.Encoding("local", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        # Longest first, so that a special token is never read as a shorter one that it begins with.
        names = sorted(map(re.escape, self.special), key=len, reverse=True)
        self._split_special = re.compile("(" + "|".join(names) + ")").split if names else lambda text: [text]
        # tiktoken silently drops what the pattern does not match.
        if self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError(f"the split pattern {pattern!r} does not cover every text")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without a beginning-of-text token.

        special: True turns the text of special tokens into their ids; only for text the program wrote itself. With
        False (anything a user or a data set wrote) "<|eot_id|>" is spelled in ordinary tokens.
        Raises ValueError if `text` holds half of a surrogate pair, which has no UTF-8 form.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
                             "read the file with encoding='utf-8'") from None
        parts = self._split_special(text) if special else [text]
        # Splitting on a captured group alternates ordinary text (even places) and special tokens (odd places).
        return [id for place, part in enumerate(parts)
                for id in ([self.special[part]] if place % 2 else self._encode_ordinary(part))]

    def encode_start(self, text: str) -> list[int]:
        """Ids of `text` as the beginning of a document: `bos_id` first, where the model expects one."""
        return [self.bos_id] * (self.bos_id is not None) + self.encode(text)

    def _encode_ordinary(self, text):
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return [id for chunk in _chunks(text) for id in self._bpe.encode_ordinary(chunk)]

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token. Embeddings may be padded: an id without a token reads as U+FFFD."""
        return self._bytes.get(int(id), "\ufffd".encode())

    def decode(self, ids) -> str:
        """Text of an iterable of ids; bytes that are not UTF-8 become U+FFFD, special tokens their names."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream(self) -> "Stream":
        """A fresh incremental decoder."""
        return Stream(self)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any token, special token, split pattern or normalisation."""
        tokens = sorted((id, token.hex()) for token, id in self._ranks.items())
        content = json.dumps([tokens, sorted(self.special.items()), self.pattern, self.nfc])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _chunks(text):
    """The text in one piece, or cut inside runs of white space that are too long for the splitting regex."""
    start = 0
    for run in LONG_RUN.finditer(text):
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


class Stream:
    """Decodes one id at a time: `stream(id)` returns the text completed by this id (perhaps none), never half a
    character; `stream.flush()` returns what is left at the end. All of it joined equals `decode` of all ids."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def load_tokenizer(directory, vocab_rows: int | None = None) -> Tokenizer:
    """Build the tokenizer from the files in a model's directory.

    Looks for tokenizer.model (tiktoken lines), tokenizer.json, vocab.json + merges.txt, encoder.json + vocab.bpe, in
    this order. vocab_rows: rows of the model's embedding; a tokenizer with higher ids is refused.
    Raises FileNotFoundError if none is there, ValueError (one line) if the files cannot be reproduced exactly.
    """
    directory = Path(directory)
    source = next((directory / name for name in READERS if (directory / name).exists()), None)
    if source is None:
        raise FileNotFoundError(f"no tokenizer in {directory}: looked for tokenizer.model, tokenizer.json, "
                                "vocab.json + merges.txt, encoder.json + vocab.bpe")
    try:
        tokenizer = _build(source)
        if vocab_rows is not None and tokenizer.vocab_size > vocab_rows:
            raise ValueError(f"the vocabulary has {tokenizer.vocab_size} ids but the model's embedding has "
                             f"{vocab_rows} rows; use the tokenizer that came with the weights")
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{source}: this file or one beside it has an unexpected form: {error!r}") from error
    except ValueError as error:
        message = str(error).partition("\n")[0]
        raise ValueError(f"{source}: {message}") from error
    return tokenizer


def _build(source):
    names = ["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "config"]
    files = {name: _read_json(source.with_name(f"{name}.json")) for name in names}
    is_tiktoken = source.name == "tokenizer.model"
    # tokenizer.json is large: beside a tokenizer.model it is read only if nothing else names the special tokens.
    enough = is_tiktoken and files["tokenizer_config"].get("added_tokens_decoder")
    files["tokenizer"] = {} if enough else _read_json(source.with_name("tokenizer.json"))
    special = _special_tokens(files)
    ranks, pattern, nfc = READERS[source.name](source, files, special)
    tokenizer = Tokenizer(ranks, special, files["tokenizer_config"].get("pat_str", pattern), nfc)
    tokenizer.bos_id = _bos_id(files, special, is_tiktoken)
    tokenizer.eos_id, tokenizer.stop_ids = _eos_and_stops(files, special)
    return tokenizer


def _read_json(path):
    """The object in a JSON file; {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name} does not hold a JSON object: {error}") from None


# --- special tokens -------------------------------------------------------------------------------

def _special_tokens(files):
    """Special token text -> id, from every file that gives both; files that disagree are refused."""
    pairs = [(token["content"], int(id))
             for id, token in files["tokenizer_config"].get("added_tokens_decoder", {}).items()]
    pairs += [(token["content"], token["id"]) for token in files["tokenizer"].get("added_tokens", [])]
    pairs += files["added_tokens"].items()
    special = {}
    for text, id in pairs:
        if special.setdefault(text, id) != id:
            raise ValueError(f"two files give {text!r} different ids: {special[text]} and {id}")
    return special


def _llama3_special_tokens():
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(256))
    return {LLAMA3_NAMED.get(id) or next(reserved): id for id in range(128000, 128256)}


def _bos_id(files, special, is_tiktoken):
    """Many files name a beginning token that their model never sees, so look for a sign that it is really used."""
    processor = files["tokenizer"].get("post_processor") or {}
    templates = [step["single"][0] for step in processor.get("processors", [processor]) if step.get("single")]
    first = next((item["SpecialToken"]["id"] for item in templates if "SpecialToken" in item), None)
    used = files["tokenizer_config"].get("add_bos_token")
    if used is None:
        used = is_tiktoken or first is not None
    named = _named_id(files, special, "bos_token") if first is None else special[first]
    if used and named is None:
        return special.get("<|begin_of_text|>")
    return named if used else None


def _eos_and_stops(files, special):
    listed = []
    for name in ("generation_config", "config"):
        ids = files[name].get("eos_token_id")
        listed += ids if isinstance(ids, list) else [ids]
    # A config.json often keeps the default id of a larger vocabulary; only special tokens can end a text.
    listed = [id for id in listed if id in special.values()]
    named = _named_id(files, special, "eos_token")
    known = [special[text] for text in KNOWN_STOPS if text in special]
    stops = ([] if named is None else [named]) + listed + known
    if not stops:
        raise ValueError("no end-of-text token; name it as eos_token in tokenizer_config.json, with its id in "
                         "added_tokens_decoder")
    return stops[0], set(stops)


def _named_id(files, special, name):
    """Id of the "bos_token" or "eos_token" that the files name (a string, or an object with "content"), or None."""
    text = files["tokenizer_config"].get(name) or files["special_tokens_map"].get(name)
    text = text["content"] if isinstance(text, dict) else text
    if text is not None and text not in special:
        raise ValueError(f"{name} is {text!r}, but no file gives this special token an id")
    return special.get(text)


# --- the forms of a vocabulary: each reader returns ranks {bytes: id}, split pattern, whether to normalise to NFC 

def _read_tiktoken(source, files, special):
    """Lines `base64-of-the-token rank`, the form of Llama 3. Ids may have gaps."""
    ranks = {}
    for number, line in enumerate(source.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number} is not `base64 rank`; a sentencepiece model (as of Llama 2) cannot be "
                             "used, take the Llama 3 file or a byte-level tokenizer.json") from None
    if not special and len(ranks) == 128000:
        special.update(_llama3_special_tokens())
    return ranks, LLAMA3_PATTERN, False


def _read_vocab_and_merges(source, files, special):
    """`vocab.json` + `merges.txt` (GPT-2, Qwen), or the same under the names GPT-2 was first published with."""
    merges_path = source.with_name("vocab.bpe" if source.name == "encoder.json" else "merges.txt")
    if not merges_path.exists():
        raise FileNotFoundError(f"no {merges_path.name} in {source.parent}: {source.name} cannot be used without it")
    vocab, lines = _read_json(source), merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines[lines[0].startswith("#version"):] if line]
    tokenizer_class = files["tokenizer_config"].get("tokenizer_class") or ""
    model_type = files["config"].get("model_type")
    pattern = PATTERNS.get(tokenizer_class.removesuffix("Fast")) or PATTERNS.get(model_type)
    # GPT-2's own files declare nothing, but only GPT-2 lists its end of text among the ordinary tokens.
    if pattern is None and model_type is None and "<|endoftext|>" in vocab:
        pattern = GPT2_PATTERN
    if pattern is None and "pat_str" not in files["tokenizer_config"]:
        raise ValueError(f"cannot tell how to split text: neither tokenizer_class {tokenizer_class!r} nor model_type "
                         f"{model_type!r} is one of {', '.join(PATTERNS)}; a tokenizer.json would tell")
    return _ranks(vocab, merges, special), pattern, pattern == QWEN2_PATTERN


def _read_tokenizer_json(source, files, special):
    """`tokenizer.json` of the tokenizers library, which also holds split pattern and normalisation."""
    content = files["tokenizer"]
    model = content["model"]
    if "merges" not in model:
        raise ValueError(f"a {model.get('type')} model is not supported, only byte-level BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"{option} {model[option]!r} is not supported")
    normalizers = {step["type"] for step in _steps(content.get("normalizer"), "normalizers")}
    if normalizers - {"NFC"}:
        raise ValueError(f"normalizer {', '.join(sorted(normalizers))} is not supported, only NFC")
    ranks = _ranks(model["vocab"], model["merges"], special, model.get("ignore_merges", False))
    return ranks, _json_pattern(content.get("pre_tokenizer")), bool(normalizers)


def _json_pattern(pre_tokenizer):
    patterns = []
    steps = _steps(pre_tokenizer, "pretokenizers")
    for step in steps:
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"]["Regex"])
        else:
            raise ValueError(f"pre-tokenizer {json.dumps(step)[:200]} is not supported")
    if len(patterns) != 1 or steps[-1]["type"] != "ByteLevel":
        raise ValueError("text must be split by one pattern and then by ByteLevel, not by "
                         f"{[step['type'] for step in steps]}")
    return patterns[0]


def _steps(node, children):
    """A normalizer or pre-tokenizer is missing, one step or a nested sequence; returns the flat list of steps."""
    if node is None or node["type"] != "Sequence":
        return [] if node is None else [node]
    return [step for child in node[children] for step in _steps(child, children)]


# In the order tried: tokenizer.json says everything by itself, so it comes before the pairs of files.
READERS = {"tokenizer.model": _read_tiktoken, "tokenizer.json": _read_tokenizer_json,
           "vocab.json": _read_vocab_and_merges, "encoder.json": _read_vocab_and_merges}


def _ranks(vocab, merges, special, ignore_merges=False):
    """Ranks {bytes: id} of a vocabulary written in GPT-2's printable alphabet; its special tokens go to `special`.

    tiktoken merges the pair whose result has the lowest id, a merge list the pair that stands first. They agree if the
    results' ids rise along the list (checked here) and each listed pair is what merging its own bytes leads to (so it
    is in every trained vocabulary). ignore_merges: a piece that is a token as a whole is never merged, as in tiktoken.
    """
    merged, last = set(), -1
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        text = "".join(pair)
        if len(pair) != 2 or not all(part in vocab for part in (*pair, text)):
            raise ValueError(f"merge {merge!r} is not two tokens that together make a third")
        if vocab[text] < last:
            raise ValueError(f"ids do not follow the order of merges: {merge!r} gives id {vocab[text]} after id {last}")
        last = vocab[text]
        merged.add(text)
    ranks = {}
    for text, id in vocab.items():
        is_special = text in special or text == "<|endoftext|>"
        if text in merged or text in BYTE_OF or (ignore_merges and not is_special):
            ranks[_to_bytes(text)] = id
        elif not is_special:
            raise ValueError(f"token {text!r} (id {id}) is neither a byte, nor made by a merge, nor named as a special "
                             "token in tokenizer_config.json or added_tokens.json")
        elif special.setdefault(text, id) != id:
            raise ValueError(f"two files give {text!r} different ids: {id} and {special[text]}")
    return ranks


def _byte_alphabet():
    """GPT-2 writes bytes as characters: visible Latin-1 ones as themselves, the others in order from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


def _to_bytes(text):
    try:
        return bytes(BYTE_OF[character] for character in text)
    except KeyError as error:
        raise ValueError(f"token {text!r} holds {error.args[0]!r}, which stands for no byte; only byte-level "
                         "vocabularies are supported") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Show how a model's tokenizer cuts a text.")
    parser.add_argument("directory", help="directory with the tokenizer's files")
    parser.add_argument("text", help="text to encode")
    parser.add_argument("--special", action=argparse.BooleanOptionalAction, default=False,
                        help="read the names of special tokens inside the text as those tokens")
    args = parser.parse_args(argv)
    try:
        tokenizer = load_tokenizer(args.directory)
        ids = tokenizer.encode(args.text, special=args.special)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"ids {tokenizer.vocab_size}  special {len(tokenizer.special)}  bos {tokenizer.bos_id}  "
          f"eos {tokenizer.eos_id}  stop {sorted(tokenizer.stop_ids)}  fingerprint {tokenizer.fingerprint}")
    for id in ids:
        print(f"{id:>8}  {tokenizer.token_bytes(id)!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
