r"""Vocabularies as they are published: from the files beside the weights to a tokenizer's tables.

All supported models (GPT-2, Llama 3, Qwen 2 and 2.5) use byte-level byte-pair encoding, but each
writes its vocabulary down in another form. A reader here brings a form to one: ranks {bytes: id},
the regular expression that splits text, and whether text is normalised to NFC first. Further files
name the special tokens. Nothing is guessed: a vocabulary that cannot be reproduced exactly is
refused.

Read next: data/text/tokenizer.py, which encodes and decodes with these tables.
"""

import base64
import json
from pathlib import Path

from data.system.disk import decode, parse_json, present

# GPT-2: English contractions, words and digit runs of any length, each taking one leading space;
# then the rest.
GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+"
    r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
# Llama 3: a word may start with any one sign, digits go in groups of up to three, line ends stay
# with what precedes.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 2 and 2.5: as Llama 3, but every digit stands alone.
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# SmolLM: as GPT-2 between the digits, each of which stands alone. To what precedes it a digit is
# the end of the text, so it takes no space and the last of several spaces is not kept for it.
SMOLLM_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)

# Which pattern belongs to a `vocab.json`, which holds none itself.
PATTERNS = {
    # by tokenizer_class, of tokenizer_config.json
    "GPT2Tokenizer": GPT2_PATTERN,
    "Qwen2Tokenizer": QWEN2_PATTERN,
    # by model_type, of config.json
    "gpt2": GPT2_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "llama": LLAMA3_PATTERN,
}

# Llama 3.1 to 3.3; the other ids from 128000 to 128255 are reserved, and in 3.0 so are 128004,
# 128008 and 128010.
LLAMA3_NAMED = {
    128000: "<|begin_of_text|>",
    128001: "<|end_of_text|>",
    128004: "<|finetune_right_pad_id|>",
    128006: "<|start_header_id|>",
    128007: "<|end_header_id|>",
    128008: "<|eom_id|>",
    128009: "<|eot_id|>",
    128010: "<|python_tag|>",
}

# Any of these ends an answer where the vocabulary has it. The first one present ends a text if no
# file names one.
KNOWN_STOPS = ["<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"]


# --- the files ------------------------------------------------------------------------------------

def read_files(source: Path) -> dict:
    """The JSON files beside `source`, name without suffix -> content."""
    names = [
        "tokenizer_config",
        "special_tokens_map",
        "added_tokens",
        "generation_config",
        "config",
    ]
    files = {name: read_beside(source, f"{name}.json") for name in names}
    # tokenizer.json is large: beside a tokenizer.model it is read only if nothing else names the
    # special tokens.
    named = files["tokenizer_config"].get("added_tokens_decoder")
    if source.name == "tokenizer.model" and named:
        files["tokenizer"] = {}
    else:
        files["tokenizer"] = read_beside(source, "tokenizer.json")
    return files


def read_beside(source: Path, name: str) -> dict:
    """The object in a JSON file; {} if there is no such file."""
    path = source.with_name(name)
    if not present(path):
        return {}
    content = parse_json(path.read_bytes(), name)
    if not isinstance(content, dict):
        raise ValueError(f"{name} does not hold a JSON object")
    return content


def chat_template(source: Path, files) -> str | None:
    """The template of conversations, in one of the three places where files have kept it."""
    path = source.with_name("chat_template.jinja")
    if present(path):
        return decode(path.read_bytes(), path.name)
    stated = read_beside(source, "chat_template.json") or files["tokenizer_config"]
    template = stated.get("chat_template")
    # several of them, by name: the first question is put in the default one
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template is not a text")
    return template


# --- special tokens -------------------------------------------------------------------------------

def special_tokens(files) -> dict:
    """Text -> id of every added token, from every file that gives both."""
    special = {}
    for token, id in added_tokens(files):
        text = token["content"]
        # no file is more right than another: that they disagree shows that one of them is foreign
        if special.setdefault(text, id) != id:
            raise ValueError(f"two files give {text!r} different ids: {special[text]} and {id}")
    return special


def added_tokens(files):
    """(what a file says of an added token, its id) for every one of every file."""
    for id, token in files["tokenizer_config"].get("added_tokens_decoder", {}).items():
        # JSON knows no numbers as keys
        yield token, int(id)
    for token in files["tokenizer"].get("added_tokens", []):
        yield token, token["id"]
    for text, id in files["added_tokens"].items():
        yield {"content": text}, id


def words_of_text(files) -> set:
    """The added tokens that are no control tokens: they are read in any text, whoever wrote it.

    Qwen2.5's <tool_call> is one. Raises ValueError for one that also takes in what surrounds it.
    """
    words = set()
    for token, _ in added_tokens(files):
        if token.get("special", True):
            continue
        for option in ("lstrip", "rstrip", "single_word"):
            if token.get(option):
                raise ValueError(f"added token {token['content']!r} with {option} "
                                 "is not supported")
        words.add(token["content"])
    return words


def llama3_special_tokens() -> dict:
    """Those of a tokenizer.model that came without any other file."""
    special = {}
    reserved = 0
    for id in range(128000, 128256):
        text = LLAMA3_NAMED.get(id)
        # the reserved ones are counted by themselves, not by their ids
        if text is None:
            text = f"<|reserved_special_token_{reserved}|>"
            reserved += 1
        special[text] = id
    return special


def beginning_id(files, special, used: bool):
    """Id to put before a text, or None. used: whether the model sees one if no file says so."""
    # Many files name a beginning token that their model never sees, so look for a sign that it is
    # really used.
    first = template_start(files)
    if first is None:
        named = named_id(files, special, "bos_token")
    else:
        named = special[first]
    stated = files["tokenizer_config"].get("add_bos_token")
    if stated is None:
        stated = used or first is not None
    if not stated:
        return None
    if named is None:
        return special.get("<|begin_of_text|>")
    return named


def template_start(files):
    """The special token that tokenizer.json puts before a text, or None."""
    processor = files["tokenizer"].get("post_processor") or {}
    steps = processor.get("processors", [processor])
    # "single" is the template of one text, the others are for pairs of texts
    starts = [step["single"][0] for step in steps if step.get("single")]
    for item in starts:
        if "SpecialToken" in item:
            return item["SpecialToken"]["id"]
    return None


def end_ids(files, special) -> tuple[int, set]:
    """Id that ends a text, and all ids that end an answer."""
    listed = []
    for name in ("generation_config", "config"):
        ids = files[name].get("eos_token_id")
        if not isinstance(ids, list):
            ids = [ids]
        # A config.json often keeps the default id of a larger vocabulary; only special tokens can
        # end a text.
        listed += [id for id in ids if id in special.values()]

    # the first of all is what ends a text, so whatever a file calls by that name comes first
    stops = []
    named = named_id(files, special, "eos_token")
    if named is not None:
        stops.append(named)
    stops += listed
    stops += [special[text] for text in KNOWN_STOPS if text in special]
    if not stops:
        raise ValueError("no end-of-text token; name it as eos_token in tokenizer_config.json, "
                         "with its id in added_tokens_decoder")
    return stops[0], set(stops)


def named_id(files, special, name):
    """Id of the "bos_token" or "eos_token" that the files name, or None."""
    text = files["tokenizer_config"].get(name) or files["special_tokens_map"].get(name)
    # some files write an object, with the text in it
    if isinstance(text, dict):
        text = text["content"]
    if text is not None and text not in special:
        raise ValueError(f"{name} is {text!r}, but no file gives this special token an id")
    return special.get(text)


# --- the forms of a vocabulary --------------------------------------------------------------------
#
# Each reader returns (ranks {bytes: id}, split pattern, whether to normalise to NFC), and adds to
# `special` what the vocabulary itself tells of special tokens.

def read_tiktoken(source, files, special):
    """Lines `base64-of-the-token rank`, the form of Llama 3. Ids may have gaps."""
    ranks = {}
    for number, line in enumerate(source.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            # Llama 2 has a file of the same name and quite another content
            raise ValueError(f"line {number} is not `base64 rank`; a sentencepiece model (as of "
                             "Llama 2) cannot be used, take the Llama 3 file or a byte-level "
                             "tokenizer.json") from None
    # the size tells that it is Llama 3's, published as this one file
    if not special and len(ranks) == 128000:
        special.update(llama3_special_tokens())
    return ranks, LLAMA3_PATTERN, False


def read_vocab_and_merges(source, files, special):
    """`vocab.json` + `merges.txt` (GPT-2, Qwen), or the names GPT-2 was first published with."""
    merges_path = source.with_name("merges.txt")
    if source.name == "encoder.json":
        merges_path = source.with_name("vocab.bpe")
    if not present(merges_path):
        raise FileNotFoundError(f"no {merges_path.name} in {source.parent}: {source.name} "
                                "cannot be used without it")
    vocab = read_beside(source, source.name)
    lines = decode(merges_path.read_bytes(), merges_path.name).replace("\r\n", "\n").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [line for line in lines if line]
    pattern = pattern_of_vocab(vocab, files)
    ranks = ranks_of(vocab, merges, special)
    # Qwen's is the only one of them that normalises
    return ranks, pattern, pattern == QWEN2_PATTERN


def pattern_of_vocab(vocab, files):
    """The split pattern, by the names in other files; None where the config spells it out."""
    tokenizer_class = files["tokenizer_config"].get("tokenizer_class") or ""
    model_type = files["config"].get("model_type")
    pattern = PATTERNS.get(tokenizer_class.removesuffix("Fast")) or PATTERNS.get(model_type)
    # GPT-2's own files declare nothing, but only GPT-2 lists its end of text among the ordinary
    # tokens.
    if pattern is None and model_type is None and "<|endoftext|>" in vocab:
        pattern = GPT2_PATTERN
    if pattern is None and "pat_str" not in files["tokenizer_config"]:
        raise ValueError(f"cannot tell how to split text: neither tokenizer_class "
                         f"{tokenizer_class!r} nor model_type {model_type!r} is one of "
                         f"{', '.join(PATTERNS)}; a tokenizer.json would tell")
    return pattern


def read_tokenizer_json(source, files, special):
    """`tokenizer.json` of the tokenizers library, which also holds pattern and normalisation."""
    content = files["tokenizer"]
    model = content["model"]
    # the library knows other kinds of models, and options of this kind that we do not
    if "merges" not in model:
        raise ValueError(f"a {model.get('type')} model is not supported, only byte-level BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"{option} {model[option]!r} is not supported")
    normalizers = {step["type"] for step in flat_steps(content.get("normalizer"), "normalizers")}
    if normalizers - {"NFC"}:
        raise ValueError(f"normalizer {', '.join(sorted(normalizers))} is not supported, only NFC")
    ignore_merges = model.get("ignore_merges", False)
    ranks = ranks_of(model["vocab"], model["merges"], special, ignore_merges)
    return ranks, pattern_of_steps(content.get("pre_tokenizer")), bool(normalizers)


def pattern_of_steps(pre_tokenizer) -> str:
    """The one pattern that a pre-tokenizer splits by."""
    patterns = []
    steps = flat_steps(pre_tokenizer, "pretokenizers")
    digits = bool(steps) and steps[0]["type"] == "Digits" and steps[0].get("individual_digits")
    for step in steps[1:] if digits else steps:
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            # ByteLevel turns bytes into characters, and splits too unless it is told not to
            if step.get("use_regex", True):
                patterns.append(SMOLLM_PATTERN if digits else GPT2_PATTERN)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"]["Regex"])
        else:
            raise ValueError(f"pre-tokenizer {json.dumps(step)[:200]} is not supported")
    if len(patterns) != 1 or steps[-1]["type"] != "ByteLevel":
        raise ValueError("text must be split by one pattern and then by ByteLevel, not by "
                         f"{[step['type'] for step in steps]}")
    if digits and patterns != [SMOLLM_PATTERN]:
        raise ValueError("Digits before another pattern than ByteLevel's is not supported")
    return patterns[0]


def flat_steps(node, children) -> list:
    """The steps of a normalizer or pre-tokenizer: none, one, or a sequence, which may be nested."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for child in node[children] for step in flat_steps(child, children)]


# In the order tried: tokenizer.json says everything by itself, so it comes before the pairs.
READERS = {
    "tokenizer.model": read_tiktoken,
    "tokenizer.json": read_tokenizer_json,
    "vocab.json": read_vocab_and_merges,
    "encoder.json": read_vocab_and_merges,
}


# --- from merges to ranks -------------------------------------------------------------------------

def ranks_of(vocab, merges, special, ignore_merges=False) -> dict:
    """Ranks {bytes: id} of a vocabulary written in GPT-2's printable alphabet.

    Its special tokens go to `special`.
    ignore_merges: a piece that is a token as a whole is never merged, as in tiktoken.
    """
    merged = merge_results(vocab, merges)
    ranks = {}
    for text, id in vocab.items():
        # GPT-2 names its only special token nowhere else
        is_special = text in special or text == "<|endoftext|>"
        if text in merged or text in BYTE_OF or (ignore_merges and not is_special):
            ranks[to_bytes(text)] = id
        elif not is_special:
            # no text would ever be encoded with it, so something about this vocabulary is not
            # understood
            raise ValueError(f"token {text!r} (id {id}) is neither a byte, nor made by a merge, "
                             "nor named as a special token in tokenizer_config.json or "
                             "added_tokens.json")
        elif special.setdefault(text, id) != id:
            raise ValueError(f"two files give {text!r} different ids: {id} and {special[text]}")
    return ranks


def merge_results(vocab, merges) -> set:
    """The tokens that merges make; ValueError if the list and the ids tell of different orders.

    tiktoken merges the pair whose result has the lowest id, a merge list the pair that stands
    first. They agree if the results' ids rise along the list (checked here) and each listed pair is
    what merging its own bytes leads to (so it is in every trained vocabulary).
    """
    merged = set()
    last = -1
    for merge in merges:
        # newer files write a pair as a list, older ones as a text
        pair = merge
        if isinstance(merge, str):
            pair = merge.split(" ")
        text = "".join(pair)
        if len(pair) != 2 or not all(part in vocab for part in (*pair, text)):
            raise ValueError(f"merge {merge!r} is not two tokens that together make a third")
        if vocab[text] < last:
            raise ValueError(f"ids do not follow the order of merges: {merge!r} gives "
                             f"id {vocab[text]} after id {last}")
        last = vocab[text]
        merged.add(text)
    return merged


def byte_alphabet() -> dict:
    """Character -> byte, as GPT-2 writes bytes so that every token can be printed."""
    # visible Latin-1 characters as themselves, the others in order from U+0100
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    alphabet = {chr(byte): byte for byte in visible}
    for place, byte in enumerate(hidden):
        alphabet[chr(0x100 + place)] = byte
    return alphabet


BYTE_OF = byte_alphabet()


def to_bytes(text) -> bytes:
    try:
        return bytes(BYTE_OF[character] for character in text)
    except KeyError as error:
        raise ValueError(f"token {text!r} holds {error.args[0]!r}, which stands for no byte; "
                         "only byte-level vocabularies are supported") from None
