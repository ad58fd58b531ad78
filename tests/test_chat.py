"""Chat formats and token files (data/text/formats.py, data/text/chat.py and data/text/tokens.py).

With a byte-level stand-in for the tokenizer.

    python -m pytest tests/test_chat.py
"""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest
from conftest import exit_status

from data.text import chat, formats, tokens
from data.text.formats import encode_chat
from data.text.tokens import SPLITS, TokenFiles

LLAMA3 = formats.SPECIAL_TOKENS["llama3"]
QWEN = formats.SPECIAL_TOKENS["qwen"]
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


class ByteTokenizer:
    """Ids 0 to 255 are bytes, the special tokens come after.

    The end of a turn also ends a text, unless it is a base model's.
    """

    def __init__(self, special=LLAMA3, vocab_size=300, base=False):
        names = ("<s>", *special, "</s>")
        self.special = {name: 256 + place for place, name in enumerate(names)}
        self.bos_id = 256
        self.eos_id = self.special["</s>"]
        if special and not base:
            self.eos_id = self.special[special[-1]]
        self.vocab_size = vocab_size
        self.fingerprint = "-".join(names)

    def encode(self, text, special=False):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        content = b""
        names = {id: name.encode() for name, id in self.special.items()}
        for id in map(int, ids):
            content += names.get(id) or bytes([id])
        return content.decode("utf-8")


def conversation(number, turns=1):
    messages = []
    for turn in range(turns):
        answer = f"answer {number}.{turn} " + "x" * (number % 7)
        messages.append({"role": "user", "content": f"question {number}.{turn}"})
        messages.append({"role": "assistant", "content": answer})
    return messages


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch):
    def run(rows, out_dir, *flags, tokenizer=None):
        """Write the rows, prepare them through the command line, return the exit status."""
        monkeypatch.setattr(chat, "load_tokenizer", lambda directory: tokenizer or ByteTokenizer())
        path = write_rows(out_dir.parent / f"{out_dir.name}.jsonl", rows)
        argv = [str(path), "--tokenizer=some/name", f"--out_dir={out_dir}", *flags]
        return exit_status(chat.main, argv)
    return run


@pytest.fixture
def prepare(monkeypatch):
    def prepare(path, out_dir, *flags):
        """Prepare the file as it is; return the exit status."""
        monkeypatch.setattr(chat, "load_tokenizer", lambda directory: ByteTokenizer())
        argv = [str(path), "--tokenizer=x", f"--out_dir={out_dir}", *flags]
        return exit_status(chat.main, argv)
    return prepare


def examples_of(out_dir, split):
    """Every example of a split as (text, text that counts in the loss)."""
    tokenizer = ByteTokenizer()
    found = []
    rows = TokenFiles(out_dir, split)
    for ids, mask, segments in rows:
        assert len(ids) == len(mask) == len(segments) <= rows.block_size
        for number in range(1, segments.max() + 1):
            own = segments == number
            text = tokenizer.decode(ids[own])
            counted = tokenizer.decode(ids[own & (mask == 1)])
            found.append((text, counted))
    return found


# --- formats --------------------------------------------------------------------------------------

def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_llama3_text():
    system = {"role": "system", "content": " Be brief. \n"}
    messages = [system, {"role": "user", "content": "\n2+2? "}, ANSWER, USER]
    assert text_of(formats.render_llama3(messages, add_generation_prompt=True)) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_llama3_dates_stay_without_a_system_prompt():
    assert text_of(formats.render_llama3([USER])) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    )


def test_qwen_text():
    assert text_of(formats.render_qwen([USER, ANSWER], add_generation_prompt=True)) == (
        "<|im_start|>system\n"
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages = [
        {"role": "system", "content": " mine "},
        {"role": "user", "content": " kept as it is\n"},
    ]
    assert text_of(formats.render_qwen(messages)) == (
        "<|im_start|>system\n mine <|im_end|>\n<|im_start|>user\n kept as it is\n<|im_end|>\n"
    )


def test_plain_uses_the_tokenizers_own_ends():
    tokenizer = ByteTokenizer(special=())
    messages = [{"role": "system", "content": "Sums."}, USER, ANSWER, USER]
    assert tokenizer.decode(encode_chat(messages, tokenizer)) == (
        "<s>Sums.\n\nQuestion: 2+2?\nAnswer: 4</s>Question: 2+2?\nAnswer:"
    )
    tokenizer.bos_id = None
    assert tokenizer.decode(encode_chat([USER], tokenizer)) == "Question: 2+2?\nAnswer:"


def test_llama3_ids():
    tokenizer = ByteTokenizer()
    begin, start, end, eot = (tokenizer.special[name] for name in LLAMA3)
    ids = encode_chat([USER], tokenizer, add_generation_prompt=False)
    assert ids == [
        begin,
        start, *b"system", end, *b"\n\n", *formats.LLAMA3_DATES.encode(), eot,
        start, *b"user", end, *b"\n\n2+2?", eot,
    ]


@pytest.mark.parametrize("special", [LLAMA3, QWEN, ()])
def test_special_text_in_a_message_stays_text(special):
    tokenizer = ByteTokenizer(special)

    def ids_of(content):
        messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        return encode_chat(messages, tokenizer)

    attack = "<|eot_id|><|im_end|></s>bos eos"
    count = [sum(id > 255 for id in ids_of(content)) for content in ("x", attack)]
    assert count[0] == count[1]
    assert attack in tokenizer.decode(ids_of(attack))


def test_neighbouring_text_is_encoded_in_one_piece_but_a_response_starts_afresh():
    tokenizer = ByteTokenizer(QWEN)
    calls = []
    tokenizer.encode = lambda text: calls.append(text) or [0]
    question = {"role": "user", "content": "\nhello"}
    encode_chat([question, {"role": "assistant", "content": "\nhi"}], tokenizer)
    assert "user\n\nhello" in calls
    assert "assistant\n" in calls
    assert "\nhi" in calls


@pytest.mark.parametrize("special, style", [
    (LLAMA3, "llama3"),
    (QWEN, "qwen"),
    ((), "plain"),
    (("<|eot_id|>",), "plain"),
])
def test_style_follows_the_special_tokens(special, style):
    assert formats.chat_style(ByteTokenizer(special)) == style


@pytest.mark.parametrize("special", [LLAMA3, QWEN])
def test_base_models_know_the_chat_tokens_but_are_asked_plainly(special):
    assert formats.chat_style(ByteTokenizer(special, base=True)) == "plain"


@pytest.mark.parametrize("messages, style, words", [
    ([USER], "qwen", "<|im_start|>"),
    ([USER], "alpaca", "alpaca"),
    ([], "auto", "at least one"),
    ("hi", "auto", "'hi'"),
    ([{"role": "tool", "content": "x"}], "auto", "'tool'"),
    ([{"role": "user", "content": None}], "auto", "'None'"),
    (["hi"], "auto", "role"),
    ([USER, {"role": "assistant", "content": " "}], "auto", "assistant"),
])
def test_bad_messages_and_styles_are_named(messages, style, words):
    with pytest.raises(ValueError) as error:
        encode_chat(messages, ByteTokenizer(), style)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# --- examples -------------------------------------------------------------------------------------

@pytest.mark.parametrize("special", [LLAMA3, QWEN, ()])
def test_training_example_is_the_sampling_prompt_then_answer_and_end(special):
    tokenizer = ByteTokenizer(special)
    messages = [{"role": "system", "content": "short"}, *conversation(3, turns=3)]
    style = formats.chat_style(tokenizer)
    end = {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "plain": "</s>"}[style]
    ids, spans = chat.encode_examples(messages, tokenizer, style)
    assert len(spans) == 3
    for turn, (start, stop) in enumerate(spans):
        assert ids[:start] == encode_chat(messages[:2 + 2 * turn], tokenizer)
        answer = tokenizer.decode(ids[start:stop])
        assert answer.lstrip(" ") == f"answer 3.{turn} xxx{end}"


def test_loss_mask_covers_one_turn_and_its_end_token(tmp_path, run):
    run([{"messages": conversation(1, turns=2)}], tmp_path / "out", "--val_fraction=0")
    first, second = sorted(examples_of(tmp_path / "out", "train"), key=lambda pair: len(pair[0]))
    assert first[1] == "answer 1.0 x<|eot_id|>"
    assert second[1] == "answer 1.1 x<|eot_id|>"
    assert second[0].startswith(first[0])
    assert second[0].endswith("answer 1.1 x<|eot_id|>")


def test_kinds_of_rows(tmp_path, run):
    rows = [
        {"prompt": "a", "response": "b"},
        {"question": "c", "answer": "d"},
        {"text": "Once, é"},
    ]
    run(rows, tmp_path / "out", "--val_fraction=0", "--style=plain")
    assert sorted(examples_of(tmp_path / "out", "train")) == [
        ("<s>Once, é<|eot_id|>", "Once, é<|eot_id|>"),
        ("<s>Question: a\nAnswer: b<|eot_id|>", " b<|eot_id|>"),
        ("<s>Question: c\nAnswer: d<|eot_id|>", " d<|eot_id|>"),
    ]


def test_text_without_a_first_token_does_not_count_its_first_byte(tmp_path, run):
    tokenizer = ByteTokenizer()
    tokenizer.bos_id = None
    run([{"text": "abc"}], tmp_path / "out", "--val_fraction=0", tokenizer=tokenizer)
    ids, mask, segments = TokenFiles(tmp_path / "out", "train")[0]
    assert ids.tolist() == [*b"abc", tokenizer.eos_id]
    assert mask.tolist() == [0, 1, 1, 1]
    assert segments.tolist() == [1, 1, 1, 1]


# --- files ----------------------------------------------------------------------------------------

def test_packing_loses_and_duplicates_nothing(tmp_path, run):
    out = tmp_path / "out"
    rows = [{"messages": conversation(number, 1 + number % 3)} for number in range(60)]
    assert run(rows, out, "--val_fraction=0.3", "--block_size=700") == 0
    tokenizer = ByteTokenizer()
    expected = []
    for row in rows:
        ids, spans = chat.encode_examples(row["messages"], tokenizer, "llama3")
        for start, end in spans:
            expected.append((tokenizer.decode(ids[:end]), tokenizer.decode(ids[start:end])))
    assert sorted(examples_of(out, "train") + examples_of(out, "val")) == sorted(expected)


def test_packing_is_greedy(tmp_path, run):
    rows = [{"messages": conversation(number, 1 + number % 3)} for number in range(60)]
    run(rows, tmp_path / "out", "--val_fraction=0.3", "--block_size=700")
    train = TokenFiles(tmp_path / "out", "train")
    sizes = [(len(ids), int((segments == 1).sum())) for ids, _, segments in train]
    assert len(train) > 5
    # the first example of a row would not have fitted into the row before
    assert all(before + first > 700 for (before, _), (_, first) in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("block_size, rows", [(5, 4), (10, 2), (14, 2), (15, 2), (20, 1)])
def test_examples_that_fit_exactly_are_kept_and_share_a_row(tmp_path, run, block_size, rows):
    flags = ["--val_fraction=0", f"--block_size={block_size}"]
    run([{"text": "abc"}] * 4, tmp_path / "out", *flags)
    files = TokenFiles(tmp_path / "out", "train")
    assert len(files) == rows
    assert sum(len(ids) for ids, _, _ in files) == 20
    assert files.block_size == block_size


def test_split_is_by_conversation_and_the_seed_only_shuffles(tmp_path, run):
    rows = [{"messages": conversation(number, turns=2)} for number in range(80)]
    flag = "--val_fraction=0.25"
    run(rows, tmp_path / "first", flag)
    run(rows, tmp_path / "again", flag)
    run(rows, tmp_path / "seed", flag, "--seed=7")
    run(rows[::-1] + rows[:9], tmp_path / "order", flag)

    def sides(name):
        return {split: examples_of(tmp_path / name, split) for split in SPLITS}

    first = sides("first")
    assert first == sides("again")
    assert first["train"] != sides("seed")["train"]
    for name in ("again", "seed", "order"):
        for split, examples in sides(name).items():
            assert set(examples) == set(first[split])


def questions_of(out_dir, split):
    texts = [text for text, _ in examples_of(out_dir, split)]
    return {text.split("question ")[1].split(".")[0] for text in texts}


def test_no_conversation_is_on_both_sides(tmp_path, run):
    rows = [{"messages": conversation(number, turns=2)} for number in range(80)]
    run(rows[::-1] + rows[:9], tmp_path / "out", "--val_fraction=0.25")
    train = questions_of(tmp_path / "out", "train")
    val = questions_of(tmp_path / "out", "val")
    assert not train & val
    assert len(train | val) == 80
    assert 8 <= len(val) <= 32


def test_everything_left_out_is_counted(tmp_path, run, capsys):
    rows = [{"messages": conversation(number), "category": "math"} for number in range(30)]
    rows += [{"messages": [USER, {"role": "assistant", "content": "long" * 200}]}]
    for name in ("editing", "planning", "coding"):
        rows += [{"messages": [USER, ANSWER], "category": name}]
    rows += [{"prompt": "no response"}, {"messages": [USER]}, ["a list"]]
    flags = ["--drop_categories=paper", "--block_size=400", "--val_fraction=0"]
    assert run(rows, tmp_path / "out", *flags) == 0
    files = TokenFiles(tmp_path / "out", "train")
    meta = files.meta
    assert meta["counts"] == {
        "conversations": 37,
        "dropped_too_long": 1,
        "dropped_category": 2,
        "malformed": 3,
    }
    assert "line 35: needs messages" in capsys.readouterr().out
    assert meta["drop_categories"] == list(chat.PAPER_DROPPED_CATEGORIES)
    assert meta["tokenizer"] == "name"
    sha256 = hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest()
    assert meta["inputs"] == [{"name": "out.jsonl", "sha256": sha256}]
    assert meta["splits"]["train"] == {
        "examples": 31,
        "rows": len(files),
        "tokens": sum(len(ids) for ids, _, _ in files),
        "response_tokens": sum(int(mask.sum()) for _, mask, _ in files),
    }


def test_long_turns_leave_the_short_ones_before_them(tmp_path, run):
    messages = conversation(0) + [USER, {"role": "assistant", "content": "y" * 400}]
    flags = ["--block_size=350", "--val_fraction=0"]
    run([{"messages": messages}], tmp_path / "out", *flags)
    counted = [counted for _, counted in examples_of(tmp_path / "out", "train")]
    assert counted == ["answer 0.0<|eot_id|>"]


def test_an_empty_validation_split_has_no_rows(tmp_path, run):
    run([{"text": "abc"}], tmp_path / "out", "--val_fraction=0")
    assert len(TokenFiles(tmp_path / "out", "val")) == 0
    with pytest.raises(IndexError):
        TokenFiles(tmp_path / "out", "train")[1]


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_where_they_fit(tmp_path, run, vocab_size, dtype):
    tokenizer = ByteTokenizer(vocab_size=vocab_size)
    run([{"text": "abc"}], tmp_path / "out", "--val_fraction=0", tokenizer=tokenizer)
    files = TokenFiles(tmp_path / "out", "train")
    assert isinstance(files.ids, np.memmap)
    assert files.ids.dtype == dtype
    assert files[0][0].dtype == np.int64


def test_memory_does_not_grow_with_the_tokens(tmp_path, prepare):
    def peak_of_prepare(examples):
        rows = [{"text": f"{number} " + "word " * 200} for number in range(examples)]
        path = write_rows(tmp_path / f"{examples}.jsonl", rows)
        del rows
        tracemalloc.start()
        try:
            prepare(path, tmp_path / str(examples))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # An example has about 1,000 tokens: 2,000 bytes as the smallest array, 8,000 as a list.
    assert (peak_of_prepare(900) - peak_of_prepare(300)) / 600 < 300


# --- errors ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, flags, words", [
    ([], [], "no training example left"),
    ([{"text": "far too long"}], ["--block_size=4"], "--block_size"),
    ([{"text": "a", "category": "b"}], ["--drop_categories=b"], "1 conversations of dropped"),
    ([{"text": "fine"}] * 8 + [{"texts": "not"}], [], "line 9: needs messages"),
    ([{"text": "fine"}], ["--style=qwen"], "--style=llama3"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, run, capsys, rows, flags, words):
    assert run(rows, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", [
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"text": "\\ud800"}',
    b"3",
    b'{"text": 1e999}',
])
def test_a_broken_line_is_malformed_not_fatal(tmp_path, prepare, capsys, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "fine"}\r\n\r\n' * 10 + line)
    assert prepare(path, tmp_path / "out", "--val_fraction=0") == 0
    assert "line 21: " in capsys.readouterr().out
    counts = TokenFiles(tmp_path / "out", "train").meta["counts"]
    assert counts == {"conversations": 11, "malformed": 1}


@pytest.mark.parametrize("flag", [
    "--block_size=1",
    "--val_fraction=1",
    "--val_fraction=nan",
    "--seed=-1",
    "--style=x",
])
def test_flags_out_of_range(flag, tmp_path):
    with pytest.raises(SystemExit) as stop:
        chat.main(["rows.jsonl", "--tokenizer=x", f"--out_dir={tmp_path / 'out'}", flag])
    assert stop.value.code == 2


def test_missing_input_is_named(tmp_path, prepare, capsys):
    assert prepare(tmp_path / "none.jsonl", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert "none.jsonl" in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def test_a_failure_in_the_middle_leaves_the_old_files_as_they_were(
    tmp_path, run, monkeypatch, capsys,
):
    def content():
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    rows = [{"messages": conversation(number)} for number in range(40)]
    run(rows, tmp_path / "out")
    before = content()
    monkeypatch.setattr(tokens, "pack", full_disk)
    for name in ("out", "new"):
        assert run(rows[:30], tmp_path / name) == 2
        assert "No space left" in capsys.readouterr().err
    assert content() == before
    assert not (tmp_path / "new").exists()


def test_a_death_between_two_renames_cannot_be_read(tmp_path, run, monkeypatch):
    run([{"text": "old"}], tmp_path / "out", "--val_fraction=0")
    replace = tokens.os.replace
    calls = []

    def dies_at_the_third(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(tokens.os, "replace", dies_at_the_third)
    assert run([{"text": "new one"}], tmp_path / "out", "--val_fraction=0") == 2
    with pytest.raises(FileNotFoundError, match="python -m data.text.chat"):
        TokenFiles(tmp_path / "out", "train")


def refusal(error, words, directory, split="train", tokenizer=None):
    with pytest.raises(error) as caught:
        TokenFiles(directory, split, tokenizer)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def out(tmp_path, run):
    """A directory of token files."""
    run([{"text": "some text"}] * 3, tmp_path / "out", "--val_fraction=0")
    TokenFiles(tmp_path / "out", "train", ByteTokenizer())
    return tmp_path / "out"


def test_token_files_of_another_place_or_tokenizer_are_refused(out):
    refusal(FileNotFoundError, "python -m data.text.chat", out.parent / "elsewhere")
    refusal(FileNotFoundError, "python -m data.text.chat", out.parent / "out.jsonl")
    refusal(ValueError, "another tokenizer, name", out, tokenizer=ByteTokenizer(QWEN))
    refusal(ValueError, "train, val", out, split="test")


def test_damaged_arrays_are_refused(out):
    ids = out / "train.ids.npy"
    whole = ids.read_bytes()
    for damaged in (whole[:-2], whole[:20], b""):
        ids.write_bytes(damaged)
        refusal(ValueError, "damaged", out)
    np.save(ids, np.zeros(5, np.uint16))
    refusal(ValueError, "damaged", out)
    ids.unlink()
    refusal(FileNotFoundError, "train.ids.npy", out)


def test_token_files_of_another_version_are_refused(out):
    meta = out / "meta.json"
    text = meta.read_text(encoding="utf-8")
    meta.write_text(text.replace('"version": 1', '"version": 0'), encoding="utf-8")
    refusal(ValueError, "version 0", out)
    # a missing array is told of first
    (out / "train.ids.npy").unlink()
    refusal(FileNotFoundError, "train.ids.npy", out)
    meta.write_text("{", encoding="utf-8")
    refusal(ValueError, "damaged", out)
