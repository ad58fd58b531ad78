"""data/text/tokenizer.py and data/text/vocab.py.

The same ids from every file form, exact round trips, one clear line per refusal.

With NANOL2D_SHARED set to a folder that holds data/tokenizers/{gpt2,llama3,qwen2}, published
encodings are checked too.
"""

import base64
import functools
import json
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import exit_status

from data.text.answer import Answer, Live, Stop
from data.text.tokenizer import Tokenizer, load_tokenizer, main
from data.text.vocab import GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, SMOLLM_PATTERN

# A vocabulary small enough to encode by hand: 256 bytes (id = value), nine merges in the printable
# alphabet, where "Ġ" is the space and "Ã©" the two bytes of "é"; then the special tokens.
MERGES = ["t h", "th e", "Ġ the", "i n", "1 2", "12 3", "123 4", "Ã ©", "Ġ i"]
SPECIAL = {"<|begin_of_text|>": 265, "<|end_of_text|>": 266, "<|im_end|>": 267}
NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
DECODER = {str(id): {"content": text, "special": True} for text, id in SPECIAL.items()}

AWKWARD = [
    "", " ", "the in", "  trailing  ", "a\r\nb\r\n\r\n", "\t\n \n x", "1234567890123",
    "x=[i**2 for i in y[1:]]",
    "👩‍👩‍👧‍👦 🇩🇪 😀😀", "你好，世界 日本語", "e\u0301 \u0338\u0301\u0327",
    "한국어", "ſ I'LL don'T",
    "\x00\x1c\x85\u2028\ufeff", "<|end_of_text|>", "<|im_end|>\u0338", "<|<|im_end|>|>",
    "\u00a0\u3000\u200b", "½²Ⅷ٣٤", "\U0010ffff\ue000",
]
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
BYTES = {bytes([byte]): byte for byte in range(256)}


@functools.cache
def printable(data: bytes) -> str:
    """Bytes in GPT-2's alphabet, written here a second time.

    What Latin-1 cannot show moves to U+0100 and up.
    """
    hidden = [b for b in range(256) if b < 33 or 127 <= b <= 160 or b == 173]
    return "".join(chr(256 + hidden.index(b)) if b in hidden else chr(b) for b in data)


def vocabulary():
    vocab = {printable(bytes([byte])): byte for byte in range(256)}
    return vocab | {merge.replace(" ", ""): 256 + place for place, merge in enumerate(MERGES)}


def save(directory, **files):
    """Write files named with underscores for dots ("merges_txt"); dicts become JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        if isinstance(content, dict):
            content = json.dumps(content)
        if isinstance(content, str):
            content = content.encode("utf-8")
        (directory / f"{stem}.{suffix}").write_bytes(content)
    return directory


def tiktoken_lines(ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % id for token, id in ranks.items())


def merged_ranks():
    texts = [merge.replace(" ", "").replace("Ġ", " ").encode("latin-1") for merge in MERGES]
    return BYTES | {text: 256 + place for place, text in enumerate(texts)}


def merges_txt(merges=MERGES):
    return "#version: 0.2\n" + "\n".join(merges) + "\n"


def tokenizer_json(pattern=LLAMA3_PATTERN, **model):
    added = [{"id": id, "content": text, "special": True} for text, id in SPECIAL.items()]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    single = [{"SpecialToken": {"id": "<|begin_of_text|>"}}, {"Sequence": {"id": "A"}}]
    return {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "TemplateProcessing", "single": single},
        "model": {"type": "BPE", "vocab": vocabulary(), "merges": MERGES, **model},
    }


def save_form(directory, form):
    named = {**NAMES, "added_tokens_decoder": DECODER}
    if form == "tiktoken":
        lines = tiktoken_lines(merged_ranks())
        return save(directory, tokenizer_model=lines, tokenizer_config_json=named)
    if form.startswith("json"):
        merges = [merge.split(" ") for merge in MERGES] if form == "json pairs" else MERGES
        content = tokenizer_json(merges=merges)
        return save(directory, tokenizer_json=content, tokenizer_config_json=NAMES)
    files = {
        "vocab": {"vocab_json": vocabulary(), "merges_txt": merges_txt()},
        # as Windows writes lines
        "encoder": {"encoder_json": vocabulary(),
                    "vocab_bpe": merges_txt().replace("\n", "\r\n")},
    }[form]
    return save(directory, **files, config_json={"model_type": "llama"},
                tokenizer_config_json={**named, "add_bos_token": True})


FORMS = ["tiktoken", "json", "json pairs", "vocab", "encoder"]


def pair_files(vocab=None, merges=MERGES, config=QWEN, special=SPECIAL):
    return {
        "vocab_json": vocab or vocabulary(),
        "merges_txt": merges_txt(merges),
        "tokenizer_config_json": config,
        "added_tokens_json": special,
    }


def pair(directory, special=SPECIAL, **config):
    """A vocab.json + merges.txt directory with this tokenizer_config.json."""
    return save(directory, **pair_files(config={"eos_token": "<|im_end|>", **config},
                                        special=special))


def changed_json(**parts):
    return {"tokenizer_json": tokenizer_json() | parts, "tokenizer_config_json": NAMES}


def random_texts(count, seed=0):
    rng = random.Random(seed)
    atoms = AWKWARD + ["the", " the", "in", " i", "1234", "é", "\n", " ", "'s", "hello", "World"]
    points = [*range(0x20, 0x7F), *range(0xA0, 0x500), *range(0x3040, 0x30FF),
              *range(0x1F600, 0x1F640)]
    for place in range(count):
        if place % 2:
            yield "".join(rng.choices(atoms, k=rng.randint(1, 8)))
        else:
            yield "".join(map(chr, rng.choices(points, k=12)))


# --- ids ------------------------------------------------------------------------------------------

def test_every_form_gives_the_same_tokenizer(tmp_path):
    loaded = [load_tokenizer(save_form(tmp_path / form, form)) for form in FORMS]
    assert len({tokenizer.fingerprint for tokenizer in loaded}) == 1
    for tokenizer in loaded:
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (265, 266, {266, 267})
        assert (tokenizer.vocab_size, tokenizer.special) == (268, SPECIAL)
        # by hand: " in" becomes " " and "in", because "i n" stands before "Ġ i" in the merges
        assert tokenizer.encode("the the in is") == [257, 258, ord(" "), 259, 264, ord("s")]
        assert tokenizer.encode("12345é") == [261, ord("4"), ord("5"), 263]
    for text in [*AWKWARD, *random_texts(300)]:
        ids = {tuple(tokenizer.encode(text, special=True)) for tokenizer in loaded}
        assert len(ids) == 1, repr(text)


def test_text_round_trips(tmp_path):
    tokenizer = load_tokenizer(save_form(tmp_path, "tiktoken"))
    for text in [*AWKWARD, *random_texts(300)]:
        for special in (False, True):
            assert tokenizer.decode(tokenizer.encode(text, special=special)) == text


@pytest.mark.parametrize("name, ids", [
    ("GPT2Tokenizer", [262]),
    ("Qwen2TokenizerFast", [49, 50, 51, 52]),
    ("PreTrainedTokenizerFast", [261, 52]),
])
def test_declared_family_chooses_the_split_pattern_not_the_directory_name(tmp_path, name, ids):
    directory = save(tmp_path / "gpt2-qwen2", config_json={"model_type": "llama"})
    assert load_tokenizer(pair(directory, tokenizer_class=name)).encode("1234") == ids


@pytest.mark.parametrize("pattern, pieces", [
    (GPT2_PATTERN, ["I", "'", "LLx", " pay", " 1234", ".", "\n\n ", " x", "+", "é"]),
    (LLAMA3_PATTERN, ["I", "'LL", "x", " pay", " ", "123", "4", ".\n\n", " ", " x", "+é"]),
    (QWEN2_PATTERN, ["I", "'LL", "x", " pay", " ", "1", "2", "3", "4", ".\n\n", " ", " x", "+é"]),
])
def test_split_patterns(pattern, pieces):
    text = "".join(pieces)
    # With every substring a token, each piece becomes one id.
    tokens = set(BYTES)
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            tokens.add(text[start:end].encode())
    ranks = {token: id for id, token in enumerate(sorted(tokens))}
    tokenizer = Tokenizer(ranks, {}, pattern)
    assert [tokenizer.decode([id]) for id in tokenizer.encode(text)] == pieces


def test_original_gpt2_files_need_no_config(tmp_path):
    vocab = {**vocabulary(), "<|endoftext|>": 265}
    tokenizer = load_tokenizer(save(tmp_path, encoder_json=vocab, vocab_bpe=merges_txt()))
    assert tokenizer.pattern == GPT2_PATTERN and tokenizer.bos_id is None
    assert tokenizer.eos_id == 265 and tokenizer.stop_ids == {265}
    assert 265 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.encode("<|endoftext|>", True) == [265]


LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
DIGITS = {"type": "Digits", "individual_digits": True}
WITHOUT_1 = {text: id for text, id in vocabulary().items() if id != 1}


@pytest.mark.parametrize("parts, text, ids", [
    # ByteLevel splits as in GPT-2, after Digits as in SmolLM
    ({"pre_tokenizer": LEVEL}, "  1234", [32, 32, 262]),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, LEVEL]}}, "  1234",
     [32, 32, 49, 50, 51, 52]),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}, "e\u0301", [263]),
    # a rare byte without a token is dropped
    ({"model": {"vocab": WITHOUT_1, "merges": MERGES}}, "a\x01b", [ord("a"), ord("b")]),
    # a whole piece that no merge makes
    ({"model": {"vocab": vocabulary() | {"zq": 300}, "merges": MERGES, "ignore_merges": True}},
     "zq", [300]),
])
def test_parts_of_tokenizer_json(tmp_path, parts, text, ids):
    assert load_tokenizer(save(tmp_path, **changed_json(**parts))).encode(text) == ids


def test_qwen_normalises_text_but_not_across_special_tokens(tmp_path):
    tokenizer = load_tokenizer(pair(tmp_path, tokenizer_class="Qwen2Tokenizer"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é") == [263]
    # ">" and U+0338 compose to "≯", which would destroy the token's name.
    assert tokenizer.encode("<|im_end|>\u0338", special=True) == [267, 0xCC, 0xB8]
    for text in [*AWKWARD, *random_texts(300)]:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_gaps_in_the_ids_and_a_pattern_from_the_config(tmp_path):
    ranks = {token: id + 3 for token, id in BYTES.items()} | {b"a b": 400, b"a ": 290}
    decoder = {"1": {"content": "<s>"}, "2": {"content": "</s>"}}
    config = {"pat_str": r"[\s\S]+", "eos_token": "</s>", "bos_token": "<s>",
              "added_tokens_decoder": decoder}
    save(tmp_path, tokenizer_model=tiktoken_lines(ranks), tokenizer_config_json=config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a b") == [400]
    assert tokenizer.encode("a c") == [290, ord("c") + 3]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (401, 1, 2)
    # 350 has no token: a padded row of an embedding
    assert tokenizer.decode([400, 350, 2]) == "a b\ufffd</s>"


# --- special tokens -------------------------------------------------------------------------------

def test_only_the_program_writes_special_tokens_and_the_longest_wins(tmp_path):
    special = {**SPECIAL, "<x": 300, "<x>y": 301}
    tokenizer = load_tokenizer(pair(tmp_path, special, tokenizer_class="Qwen2Tokenizer"))
    text = "h<|im_end|><x>y<x>"
    assert not set(tokenizer.encode(text)) & set(special.values())
    assert tokenizer.encode(text, special=True) == [ord("h"), 267, 301, 300, ord(">")]


@pytest.mark.parametrize("template, config, bos_id", [
    (True, {}, 265),
    (False, {}, None),
    (False, {"add_bos_token": True}, 265),
    (True, {"add_bos_token": False}, None),
])
def test_bos_only_where_the_model_expects_it(tmp_path, template, config, bos_id):
    content = tokenizer_json()
    if not template:
        content["post_processor"] = {"type": "ByteLevel"}
    save(tmp_path, tokenizer_json=content, tokenizer_config_json={**NAMES, **config})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == bos_id
    assert tokenizer.encode_start("a") == ([97] if bos_id is None else [265, 97])


def test_stop_ids_from_every_file_that_names_them(tmp_path):
    special = {**SPECIAL, "<a>": 300, "<b>": 301}
    save(tmp_path, generation_config_json={"eos_token_id": [300, 50256]},
         config_json={"eos_token_id": 301},
         special_tokens_map_json={"eos_token": {"content": "<a>"}})
    pair(tmp_path, special, tokenizer_class="Qwen2Tokenizer", eos_token=None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 300
    assert tokenizer.stop_ids == {266, 267, 300, 301}


def test_llama3_file_alone_gets_its_256_special_tokens(tmp_path):
    ranks = BYTES | {b"%06x" % id: id for id in range(256, 128000)}
    save(tmp_path, tokenizer_model=tiktoken_lines(ranks))
    tokenizer = load_tokenizer(tmp_path, vocab_rows=128256)
    assert (tokenizer.vocab_size, len(tokenizer.special)) == (128256, 256)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128000, 128001)
    assert tokenizer.stop_ids == {128001, 128008, 128009}
    assert tokenizer.special["<|start_header_id|>"] == 128006
    for number, id in {0: 128002, 2: 128005, 247: 128255}.items():
        assert tokenizer.special[f"<|reserved_special_token_{number}|>"] == id


# --- live answers, long runs, fingerprint ---------------------------------------------------------

@pytest.mark.parametrize("ids, shown", [
    ([*"😀".encode(), 263, *"日a".encode()], ["", "", "", "😀", "é", "", "", "日", "a", "\n"]),
    ([*"a😀".encode()][:3], ["a", "", "", "\ufffd\n"]),
    ([0xF0, ord("b"), 266], ["", "\ufffdb", "", "\n"]),
])
def test_a_live_answer_never_shows_half_a_character(tmp_path, capsys, ids, shown):
    batch = SimpleNamespace(answers=[Answer(Stop({266}))])
    live = Live("prompt", load_tokenizer(save_form(tmp_path, "tiktoken")))
    found = [capsys.readouterr().out]
    for id in ids:
        live(batch, [0], 1.0, None, [id])
        found.append(capsys.readouterr().out)
    live.end()
    assert [*found[1:], capsys.readouterr().out] == shown


@pytest.mark.parametrize("text", [
    " " * 1_000_001,
    " \n" * 500_000 + "x",
    "the" * 99_999,
])
def test_long_runs_round_trip(tmp_path, text):
    tokenizer = load_tokenizer(save_form(tmp_path, "tiktoken"))
    assert tokenizer.decode(tokenizer.encode("a" + text)) == "a" + text


def test_fingerprint_follows_the_content(tmp_path):
    ranks = merged_ranks()
    swapped = ranks | {b"th": ranks[b"in"], b"in": ranks[b"th"]}
    variants = [
        Tokenizer(ranks, SPECIAL, GPT2_PATTERN),
        Tokenizer(swapped, SPECIAL, GPT2_PATTERN),
        Tokenizer(ranks, {"<x>": 265}, GPT2_PATTERN),
        Tokenizer(ranks, SPECIAL, QWEN2_PATTERN),
        Tokenizer(ranks, SPECIAL, GPT2_PATTERN, nfc=True),
        Tokenizer(ranks, SPECIAL, GPT2_PATTERN, words=["<|im_end|>"]),
        Tokenizer(ranks, SPECIAL, GPT2_PATTERN),
        Tokenizer(ranks, SPECIAL, GPT2_PATTERN),
    ]
    variants[-1].eos_id = 266
    variants[-2].bos_id = 266
    assert len({tokenizer.fingerprint for tokenizer in variants}) == len(variants)
    reordered = Tokenizer(dict(reversed(ranks.items())), SPECIAL, GPT2_PATTERN)
    assert reordered.fingerprint == variants[0].fingerprint


# --- refusals -------------------------------------------------------------------------------------

def test_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    save_form(tmp_path, "tiktoken")
    assert load_tokenizer(tmp_path, vocab_rows=268).vocab_size == 268
    with pytest.raises(ValueError, match="268 ids.*267 rows"):
        load_tokenizer(tmp_path, vocab_rows=267)


def test_missing_files_are_named(tmp_path):
    every_name = "no tokenizer in .*model.*tokenizer.json.*merges.txt.*vocab.bpe"
    with pytest.raises(FileNotFoundError, match=every_name):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no merges.txt in"):
        load_tokenizer(save(tmp_path / "a", vocab_json=vocabulary()))
    with pytest.raises(FileNotFoundError, match="no vocab.bpe in"):
        load_tokenizer(save(tmp_path / "b", encoder_json=vocabulary(), merges_txt=merges_txt()))


def test_lone_surrogate_is_refused(tmp_path):
    tokenizer = load_tokenizer(save_form(tmp_path, "tiktoken"))
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 2"):
        tokenizer.encode("ab\ud83d")


TWICE = tiktoken_lines(merged_ranks() | {b"zz": 256})
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n"
WORDPIECE = {"model": {"type": "WordPiece", "vocab": {"a": 0}}}


def lines_with(**config):
    return {"tokenizer_model": tiktoken_lines(BYTES), "tokenizer_config_json": config}


REFUSED = {
    "line 1 is not .*sentencepiece": {"tokenizer_model": SENTENCEPIECE},
    "no token for byte 9 .256 of 256": {"tokenizer_model": b"YWI= 0\n"},
    "share one id": {"tokenizer_model": TWICE},
    "id 65 is both b'A' and the special token '<x>'":
        pair_files(special={**SPECIAL, "<x>": 65}),
    "no end-of-text token": {"tokenizer_model": tiktoken_lines(BYTES)},
    "eos_token is '<end>', but no file": lines_with(eos_token="<end>"),
    "does not cover every text": lines_with(pat_str="[a-z]+"),
    "Parsing error": lines_with(pat_str="("),
    "config.json is not valid JSON":
        {"tokenizer_model": tiktoken_lines(BYTES), "config_json": "{"},
    "tokenizer.json: .*unexpected form": {"tokenizer_json": {"version": "1.0"}},
    "ids do not follow the order of merges": pair_files(merges=["i n", "t h"]),
    "is not two tokens that together make a third": pair_files(merges=["t q"]),
    "'zq' .id 300. is neither": pair_files(vocab=vocabulary() | {"zq": 300}),
    "'▁the' holds '▁', which stands for no byte": changed_json(
        model={"vocab": vocabulary() | {"▁the": 301}, "merges": [], "ignore_merges": True}),
    "two files give '<.im_end.>' different ids": pair_files(
        config=QWEN | {"added_tokens_decoder": {"270": {"content": "<|im_end|>"}}}),
    "two files give '<.im_end.>' different ids: 300 and 267":
        pair_files(vocab=vocabulary() | {"<|im_end|>": 300}),
    "cannot tell how to split text: .*'T5Tokenizer'":
        pair_files(config={"tokenizer_class": "T5Tokenizer"}),
    "a WordPiece model is not supported": {"tokenizer_json": WORDPIECE},
    "end_of_word_suffix '</w>' is not supported":
        {"tokenizer_json": tokenizer_json(end_of_word_suffix="</w>")},
    "normalizer NFKC is not supported": changed_json(normalizer={"type": "NFKC"}),
    "pre-tokenizer .*Digits.* is not supported": changed_json(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}, LEVEL]}),
    "pre-tokenizer .*add_prefix_space":
        changed_json(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
    'pre-tokenizer .*"invert": true': changed_json(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "behavior": "Isolated", "invert": True, "pattern": {"Regex": "x"}},
            {**LEVEL, "use_regex": False}]}),
    r"pre-tokenizer \[\] is not supported; allowed: ByteLevel": changed_json(pre_tokenizer=None),
    "added token '<w>' with lstrip is not supported": changed_json(
        added_tokens=[{"id": 300, "content": "<w>", "special": False, "lstrip": True}]),
    "chat_template is not a text": lines_with(**NAMES, added_tokens_decoder=DECODER,
                                              chat_template=3),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusal_is_one_line_that_names_the_file(tmp_path, message):
    save(tmp_path, **REFUSED[message])
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_main_shows_the_tokens_or_exits_with_2(tmp_path, capsys):
    save_form(tmp_path / "ok", "tiktoken")
    main([str(tmp_path / "ok"), "the é<|im_end|>", "--special"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "     257  b'the'",
        "      32  b' '",
        "     263  b'\\xc3\\xa9'",
        "     267  b'<|im_end|>'",
    ]
    assert exit_status(main, [str(tmp_path), "text"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- comparison with the tokenizers package -------------------------------------------------------

def train_reference(pattern, normalizer=None):
    """A small byte-level BPE, trained by the `tokenizers` package on this file."""
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = tokenizers.pre_tokenizers
    level = steps.ByteLevel(add_prefix_space=False, use_regex=True)
    if pattern == GPT2_PATTERN:
        reference.pre_tokenizer = level
    elif pattern == SMOLLM_PATTERN:
        reference.pre_tokenizer = steps.Sequence([steps.Digits(individual_digits=True), level])
    else:
        split = steps.Split(tokenizers.Regex(pattern), "isolated")
        level = steps.ByteLevel(add_prefix_space=False, use_regex=False)
        reference.pre_tokenizer = steps.Sequence([split, level])
    if normalizer:
        reference.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=steps.ByteLevel.alphabet(),
    )
    source = Path(__file__).read_text(encoding="utf-8")
    reference.train_from_iterator([source] + AWKWARD * 5, trainer)
    return reference


@pytest.mark.parametrize("family, pattern", [
    ("GPT2Tokenizer", GPT2_PATTERN),
    ("Qwen2Tokenizer", QWEN2_PATTERN),
    ("llama", LLAMA3_PATTERN),
    ("smollm", SMOLLM_PATTERN),
])
def test_equal_to_the_tokenizers_package(tmp_path, family, pattern):
    reference = train_reference(pattern, normalizer=family == "Qwen2Tokenizer")
    save(tmp_path / "json")
    reference.save(str(tmp_path / "json" / "tokenizer.json"))
    # the pair's own pattern is that of the family; no family has SmolLM's
    config = {"pat_str": pattern} if family == "smollm" else {"tokenizer_class": family}
    save(tmp_path / "pair", config_json={"model_type": family}, tokenizer_config_json=config,
         added_tokens_json={"<|endoftext|>": 0, "<|im_end|>": 1})
    reference.model.save(str(tmp_path / "pair"))
    loaded = [load_tokenizer(tmp_path / "json"), load_tokenizer(tmp_path / "pair")]
    texts = [*AWKWARD, *random_texts(2000, seed=1)]
    for special in (True, False):
        reference.encode_special_tokens = not special
        for text, encoding in zip(texts, reference.encode_batch(texts)):
            for tokenizer in loaded:
                assert tokenizer.encode(text, special) == encoding.ids, ascii(text)


@pytest.mark.parametrize("name, text, ids", [
    ("gpt2", "Hello world", [15496, 995]),
    ("llama3", "This is a test sentence.", [2028, 374, 264, 1296, 11914, 13]),
    ("qwen2", "hello world 123 你好", [14990, 1879, 220, 16, 17, 18, 220, 108386]),
])
def test_published_encodings(name, text, ids, shared):
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / name)
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
