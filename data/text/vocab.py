r"""Vocabularies as they are published: from the files beside the weights to a tokenizer's tables.

Models publish their vocabularies in several forms. Each reader here returns the same three things:
ranks {bytes: id}, the regular expression that splits text, and whether text is first normalised to
NFC. Other files name the special tokens. A vocabulary that cannot be reproduced exactly is refused.

Read next: data/text/tokenizer.py, which encodes and decodes with these tables.
"""

import base64
import json
from pathlib import Path

from data.system.disk import decode, present, read_bytes, read_json

# GPT-2: English contractions, words and digit runs of any length, each taking one leading space;
# then the rest.
GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+"
    r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
# Llama 3: a word may start with any one sign, digits go in groups of up to three, line ends stay
# with the signs before them.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 2 and 2.5: as Llama 3, but every digit stands alone.
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# SmolLM: each digit stands alone; between digits as GPT-2. A text before a digit is split as if it
# ended there, so a digit takes no leading space, not even the last of several.
SMOLLM_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)

# The pattern of a `vocab.json`, which holds none itself.
PATTERNS = {
    # by tokenizer_class, of tokenizer_config.json
    "GPT2Tokenizer": GPT2_PATTERN,
    "Qwen2Tokenizer": QWEN2_PATTERN,
    # by model_type, of config.json
    "gpt2": GPT2_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "llama": LLAMA3_PATTERN,
}

# Llama 3.1 to 3.3; the other ids up to 128255 are reserved, in 3.0 also 128004, 128008 and 128010.
LLAMA3_NAMED = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|finetune_right_pad_id|>": 128004,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
}

# Each of these ends an answer; where no file names the token that ends a text, the first one does.
KNOWN_STOPS = ["<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"]


# --- the files ------------------------------------------------------------------------------------

def read_files(source: Path) -> dict:
    """The JSON files beside `source`, name without suffix -> content."""
    names = ["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config",
             "config"]
    files = {name: read_beside(source, f"{name}.json") for name in names}
    # it is large: beside a tokenizer.model it is read only for the special tokens
    listed = files["tokenizer_config"].get("added_tokens_decoder")
    unused = source.name == "tokenizer.model" and listed
    files["tokenizer"] = {} if unused else read_beside(source, "tokenizer.json")
    return files


def read_beside(source: Path, name: str) -> dict:
    """The object in a JSON file; {} if there is no such file."""
    path = source.with_name(name)
    return read_json(path) if present(path) else {}


def chat_template(source: Path, files) -> str | None:
    """The chat template, from one of the three places where models keep it."""
    path = source.with_name("chat_template.jinja")
    if present(path):
        return decode(path.read_bytes(), path.name)
    stated = read_beside(source, "chat_template.json") or files["tokenizer_config"]
    template = stated.get("chat_template")
    # several templates by name: the default one is used
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template is not a text")
    return template


# --- special tokens -------------------------------------------------------------------------------

def special_tokens(files) -> tuple[dict, set]:
    """Text -> id of every added token, and the added tokens that control nothing.

    The latter are one id in any text, such as Qwen2.5's <tool_call>. Raises ValueError if two files
    disagree, or if such a token also takes in the characters around it.
    """
    decoder = files["tokenizer_config"].get("added_tokens_decoder", {})
    # JSON has no numbers as keys
    added = [(token, int(id)) for id, token in decoder.items()]
    added += [(token, token["id"]) for token in files["tokenizer"].get("added_tokens", [])]
    added += [({"content": text}, id) for text, id in files["added_tokens"].items()]
    special = {}
    words = set()
    for token, id in added:
        text = token["content"]
        # no file has precedence: if they disagree, one of them belongs to another model
        if special.setdefault(text, id) != id:
            raise ValueError(f"two files give {text!r} different ids: {special[text]} and {id}")
        if token.get("special", True):
            continue
        words.add(text)
        for option in ("lstrip", "rstrip", "single_word"):
            if token.get(option):
                raise ValueError(f"added token {text!r} with {option} is not supported")
    return special, words


def beginning_id(files, special, always: bool):
    """Id to put before a text, or None. always: does the model expect one if no file says so?"""
    # Many files name a beginning token that their model never sees. The template of one text in
    # tokenizer.json ("single"; the others are for pairs) shows that it is used.
    processor = files["tokenizer"].get("post_processor") or {}
    steps = processor.get("processors", [processor])
    firsts = [step["single"][0] for step in steps if step.get("single")]
    used = [first["SpecialToken"]["id"] for first in firsts if "SpecialToken" in first]
    named = special[used[0]] if used else named_id(files, special, "bos_token")
    stated = files["tokenizer_config"].get("add_bos_token")
    if stated is None:
        stated = always or used
    if not stated:
        return None
    return special.get("<|begin_of_text|>") if named is None else named


def end_ids(files, special) -> tuple[int, set]:
    """Id that ends a text, and all ids that end an answer."""
    # the first one ends a text
    stops = [named_id(files, special, "eos_token")]
    for name in ("generation_config", "config"):
        ids = files[name].get("eos_token_id")
        stops += ids if isinstance(ids, list) else [ids]
    stops += [special.get(text) for text in KNOWN_STOPS]
    # a config.json often keeps the default id of a larger vocabulary, which is no special token
    stops = [id for id in stops if id in special.values()]
    if not stops:
        raise ValueError("no end-of-text token; name it as eos_token in tokenizer_config.json, "
                         "with its id in added_tokens_decoder")
    return stops[0], set(stops)


def named_id(files, special, name):
    """Id of the "bos_token" or "eos_token" that the files name, or None."""
    text = files["tokenizer_config"].get(name) or files["special_tokens_map"].get(name)
    # some files write an object that holds the text
    if isinstance(text, dict):
        text = text["content"]
    if text is not None and text not in special:
        raise ValueError(f"{name} is {text!r}, but no file gives this special token an id")
    return special.get(text)


# --- the forms of a vocabulary --------------------------------------------------------------------
#
# Each reader returns (ranks {bytes: id}, split pattern, whether to normalise to NFC), and adds the
# special tokens that only the vocabulary names to `special`.

def read_tiktoken(source, files, special):
    """Lines `base64-of-the-token rank`, the form of Llama 3. Ids may have gaps."""
    ranks = {}
    for number, line in enumerate(read_bytes(source).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            # Llama 2 has a file of the same name in another form
            raise ValueError(f"line {number} is not `base64 rank`; a sentencepiece model (as of "
                             "Llama 2) cannot be used, take the Llama 3 file or a byte-level "
                             "tokenizer.json") from None
    # this size, without any other file: Llama 3 as it was first published
    if not special and len(ranks) == 128000:
        special.update(LLAMA3_NAMED)
        reserved = set(range(128000, 128256)) - set(LLAMA3_NAMED.values())
        # their names count the reserved tokens only
        for number, id in enumerate(sorted(reserved)):
            special[f"<|reserved_special_token_{number}|>"] = id
    return ranks, LLAMA3_PATTERN, False


def read_vocab_and_merges(source, files, special):
    """`vocab.json` + `merges.txt` (GPT-2, Qwen), or the names GPT-2 was first published with."""
    name = "vocab.bpe" if source.name == "encoder.json" else "merges.txt"
    merges_path = source.with_name(name)
    if not present(merges_path):
        raise FileNotFoundError(f"no {name} in {source.parent}: {source.name} "
                                "cannot be used without it")
    vocab = read_beside(source, source.name)
    lines = decode(merges_path.read_bytes(), name).replace("\r\n", "\n").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [line for line in lines if line]

    # these files hold no pattern: other files name the family
    config = files["tokenizer_config"]
    tokenizer_class = config.get("tokenizer_class") or ""
    model_type = files["config"].get("model_type")
    pattern = PATTERNS.get(tokenizer_class.removesuffix("Fast")) or PATTERNS.get(model_type)
    # GPT-2's own files do not, but only GPT-2 lists its end of text among the ordinary tokens
    if pattern is None and model_type is None and "<|endoftext|>" in vocab:
        pattern = GPT2_PATTERN
    if pattern is None and "pat_str" not in config:
        raise ValueError(f"cannot tell how to split text: neither tokenizer_class "
                         f"{tokenizer_class!r} nor model_type {model_type!r} is one of "
                         f"{', '.join(PATTERNS)}; a tokenizer.json would tell")
    # of these families only Qwen normalises
    return ranks_of(vocab, merges, special), pattern, pattern == QWEN2_PATTERN


def read_tokenizer_json(source, files, special):
    """`tokenizer.json` of the tokenizers library, which also holds pattern and normalisation."""
    content = files["tokenizer"]
    model = content["model"]
    # the library has other kinds of models, and options of this kind, that this project lacks
    if "merges" not in model:
        raise ValueError(f"a {model.get('type')} model is not supported, only byte-level BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"{option} {model[option]!r} is not supported")
    normalizers = {step["type"] for step in flat_steps(content.get("normalizer"), "normalizers")}
    if normalizers - {"NFC"}:
        raise ValueError(f"normalizer {', '.join(sorted(normalizers))} is not supported, only NFC")
    ranks = ranks_of(model["vocab"], model["merges"], special, model.get("ignore_merges", False))
    pattern = pattern_of_steps(flat_steps(content.get("pre_tokenizer"), "pretokenizers"))
    return ranks, pattern, bool(normalizers)


def pattern_of_steps(steps) -> str:
    """The one pattern by which the steps of a pre-tokenizer split."""
    kinds = [step["type"] for step in steps]
    first, last = (steps[0], steps[-1]) if steps else ({}, {})
    # ByteLevel turns bytes into characters, and also splits unless use_regex is false
    splits = last.get("use_regex", True)
    if not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and splits:
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and splits and first.get("individual_digits"):
            return SMOLLM_PATTERN
        if kinds == ["Split", "ByteLevel"] and not splits:
            if first["behavior"] == "Isolated" and not first["invert"]:
                return first["pattern"]["Regex"]
    raise ValueError(f"pre-tokenizer {json.dumps(steps)[:200]} is not supported; allowed: ByteLevel"
                     " alone or after individual Digits, or one isolated Split before ByteLevel "
                     "with use_regex false")


def flat_steps(node, children) -> list:
    """The steps of a normalizer or pre-tokenizer: none, one, or a sequence, which may be nested."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for child in node[children] for step in flat_steps(child, children)]


# In the order tried: tokenizer.json is complete by itself, so it comes before the pairs.
READERS = {
    "tokenizer.model": read_tiktoken,
    "tokenizer.json": read_tokenizer_json,
    "vocab.json": read_vocab_and_merges,
    "encoder.json": read_vocab_and_merges,
}


# --- from merges to ranks -------------------------------------------------------------------------

# Character -> byte, as GPT-2 writes bytes so that every token can be printed: visible Latin-1
# characters as themselves, the others in order from U+0100.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = sorted(set(range(256)) - set(VISIBLE))
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(0x100 + place): byte for place, byte in enumerate(HIDDEN)}


def ranks_of(vocab, merges, special, ignore_merges=False) -> dict:
    """Ranks {bytes: id} of a vocabulary in GPT-2's alphabet; its special tokens go to `special`.

    ignore_merges: a piece that is a token as a whole is never merged, as in tiktoken.
    Raises ValueError if the merges and the ids disagree on the order.
    """
    # tiktoken merges the pair whose result has the lowest id, a merge list the pair that stands
    # first. They agree if the results' ids rise along the list, and each listed pair is what
    # merging its own bytes leads to (so it is in every trained vocabulary).
    merged = set()
    last = -1
    for merge in merges:
        # newer files write a pair as a list, older ones as a text
        pair = merge.split(" ") if isinstance(merge, str) else merge
        text = "".join(pair)
        if len(pair) != 2 or not all(part in vocab for part in (*pair, text)):
            raise ValueError(f"merge {merge!r} is not two tokens that together make a third")
        if vocab[text] < last:
            raise ValueError(f"ids do not follow the order of merges: {merge!r} gives "
                             f"id {vocab[text]} after id {last}")
        last = vocab[text]
        merged.add(text)
    ranks = {}
    for text, id in vocab.items():
        # GPT-2 names its only special token in no other file
        is_special = text in special or text == "<|endoftext|>"
        if text in merged or text in BYTE_OF or (ignore_merges and not is_special):
            try:
                token = bytes(BYTE_OF[character] for character in text)
            except KeyError as error:
                raise ValueError(f"token {text!r} holds {error.args[0]!r}, which stands for no "
                                 "byte; only byte-level vocabularies are supported") from None
            ranks[token] = id
        elif not is_special:
            # no text would be encoded with it, so this vocabulary follows a rule not known here
            raise ValueError(f"token {text!r} (id {id}) is neither a byte, nor made by a merge, "
                             "nor named as a special token in tokenizer_config.json or "
                             "added_tokens.json")
        elif special.setdefault(text, id) != id:
            raise ValueError(f"two files give {text!r} different ids: {id} and {special[text]}")
    return ranks
