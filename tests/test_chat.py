"""Chat formats and token files (data/text/formats.py, data/text/chat.py and data/text/tokens.py).

With a byte-level tokenizer written here.
"""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest
from conftest import exit_status

from data.text import chat, formats, tokens
from data.text.formats import RENDER, encode_chat
from data.text.tokens import SPLITS, TokenFiles
from data.training.batches import collate

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
        self.eos_id = self.special["</s>" if base or not special else special[-1]]
        self.template = None
        self.vocab_size = vocab_size
        self.fingerprint = "-".join(names)

    def encode(self, text, special=False):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        names = {id: name.encode() for name, id in self.special.items()}
        return b"".join(names.get(id) or bytes([id]) for id in map(int, ids)).decode("utf-8")


def conversation(number, turns=1):
    messages = []
    for turn in range(turns):
        answer = f"answer {number}.{turn} " + "x" * (number % 7)
        messages.append({"role": "user", "content": f"question {number}.{turn}"})
        messages.append({"role": "assistant", "content": answer})
    return messages


@pytest.fixture
def run(monkeypatch):
    def run(rows, out_dir, *flags, tokenizer=None):
        """Prepare rows, the bytes of a file, or a missing file (None); return the exit status."""
        monkeypatch.setattr(chat, "load_tokenizer", lambda directory: tokenizer or ByteTokenizer())
        path = out_dir.parent / f"{out_dir.name}.jsonl"
        if isinstance(rows, list):
            rows = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if rows is not None:
            path.write_bytes(rows)
        argv = [str(path), "--tokenizer=some/name", f"--out_dir={out_dir}", *flags]
        return exit_status(chat.main, argv)
    return run


def examples_of(out_dir, split):
    """Every example of a split as (text, text that counts in the loss)."""
    tokenizer = ByteTokenizer()
    found = []
    rows = TokenFiles(out_dir, split)
    for ids, mask, documents in rows:
        assert len(ids) == len(mask) == len(documents) <= rows.block_size
        for number in range(1, documents.max() + 1):
            own = documents == number
            found.append((tokenizer.decode(ids[own]), tokenizer.decode(ids[own & (mask == 1)])))
    return found


# --- formats --------------------------------------------------------------------------------------

LLAMA3_START = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_llama3_text():
    system = {"role": "system", "content": " Be brief. \n"}
    messages = [system, {"role": "user", "content": "\n2+2? "}, ANSWER, USER]
    turns = (
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    text = text_of(RENDER["llama3"](messages, add_generation_prompt=True))
    assert text == LLAMA3_START + "Be brief.<|eot_id|>" + turns
    # the dates stay without a system prompt; Llama 3.0 has none
    assert text_of(RENDER["llama3"](messages[1:], True)) == LLAMA3_START + "<|eot_id|>" + turns
    assert text_of(RENDER["llama3.0"](messages[1:], True)) == "<|begin_of_text|>" + turns


def test_qwen_text():
    assert text_of(RENDER["qwen"]([USER, ANSWER], add_generation_prompt=True)) == (
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
    assert text_of(RENDER["qwen"](messages)) == (
        "<|im_start|>system\n mine <|im_end|>\n<|im_start|>user\n kept as it is\n<|im_end|>\n"
    )


def test_deepseek_text_repeats_an_answer_without_its_thought():
    system = {"role": "system", "content": "Sums."}
    answer = {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"}
    text = "bosSums.<｜User｜>2+2?<｜Assistant｜>\n\n4eos<｜User｜>2+2?<｜Assistant｜>"
    messages = [system, USER, answer, USER]
    assert text_of(RENDER["deepseek"](messages, True)) == text
    assert text_of(RENDER["deepseek-think"](messages, True)) == text + "<think>\n"


def test_plain_uses_the_tokenizers_own_ends():
    tokenizer = ByteTokenizer(special=())
    messages = [{"role": "system", "content": "Sums."}, USER, ANSWER, USER]
    assert tokenizer.decode(encode_chat(messages, tokenizer)) == (
        "<s>Sums.\n\nQuestion: 2+2?\nAnswer: 4</s>Question: 2+2?\nAnswer:"
    )
    tokenizer.bos_id = None
    assert tokenizer.decode(encode_chat([USER], tokenizer)) == "Question: 2+2?\nAnswer:"


@pytest.mark.parametrize("special", [LLAMA3, QWEN, ()])
def test_special_text_in_a_message_stays_text(special):
    tokenizer = ByteTokenizer(special)

    def ids_of(content):
        messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        return encode_chat(messages, tokenizer)

    attack = "<|eot_id|><|im_end|></s>bos eos"
    count = [sum(id > 255 for id in ids_of(content)) for content in ("x", attack)]
    assert 0 < count[0] == count[1]
    assert attack in tokenizer.decode(ids_of(attack))


def test_neighbouring_text_is_encoded_in_one_piece_but_a_response_separately():
    tokenizer = ByteTokenizer(QWEN)
    calls = []
    tokenizer.encode = lambda text: calls.append(text) or [0]
    question = {"role": "user", "content": "\nhello"}
    encode_chat([question, {"role": "assistant", "content": "\nhi"}], tokenizer)
    assert {"user\n\nhello", "assistant\n", "\nhi"} <= set(calls)


@pytest.mark.parametrize("special, base, style", [
    (LLAMA3, False, "llama3"),
    (QWEN, False, "qwen"),
    ((), False, "plain"),
    (("<|eot_id|>",), False, "plain"),
    # base models have the chat tokens too
    (LLAMA3, True, "plain"),
    (QWEN, True, "plain"),
])
def test_style_follows_the_special_tokens(special, base, style):
    assert formats.resolve_style("auto", ByteTokenizer(special, base=base))[0] == style


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
    assert words in str(error.value) and "\n" not in str(error.value)


# --- examples -------------------------------------------------------------------------------------

@pytest.mark.parametrize("special, style, end", [
    (LLAMA3, "llama3", "<|eot_id|>"), (QWEN, "qwen", "<|im_end|>"), ((), "plain", "</s>")])
def test_training_example_is_the_sampling_prompt_then_answer_and_end(special, style, end):
    tokenizer = ByteTokenizer(special)
    messages = [{"role": "system", "content": "short"}, *conversation(3, turns=3)]
    ids, spans = chat.encode_examples(messages, tokenizer, RENDER[style])
    assert len(spans) == 3
    for turn, (start, stop) in enumerate(spans):
        assert ids[:start] == encode_chat(messages[:2 + 2 * turn], tokenizer)
        answer = tokenizer.decode(ids[start:stop])
        assert answer.lstrip(" ") == f"answer 3.{turn} xxx{end}"


def test_kinds_of_rows(tmp_path, run):
    rows = [
        {"messages": [USER, ANSWER, USER, ANSWER]},
        {"prompt": "a", "response": "b"},
        {"question": "c", "answer": "d", "messages": None},
        {"text": "Once, é"},
    ]
    run(rows, tmp_path / "out", "--val_fraction=0", "--style=plain")
    turn = "Question: 2+2?\nAnswer: 4<|eot_id|>"
    assert sorted(examples_of(tmp_path / "out", "train")) == [
        ("<s>Once, é<|eot_id|>", "Once, é<|eot_id|>"),
        ("<s>" + turn, " 4<|eot_id|>"),
        ("<s>" + turn + turn, " 4<|eot_id|>"),
        ("<s>Question: a\nAnswer: b<|eot_id|>", " b<|eot_id|>"),
        ("<s>Question: c\nAnswer: d<|eot_id|>", " d<|eot_id|>"),
    ]


def test_raw_rows_are_exactly_as_they_are_written(tmp_path, run):
    rows = [{"prompt": "The capital of Italy is", "response": " Rome"}]
    run(rows, tmp_path / "out", "--val_fraction=0", "--style=raw")
    assert examples_of(tmp_path / "out", "train") == [("<s>The capital of Italy is Rome", " Rome")]


def test_a_system_prompt_in_a_column_begins_the_conversation(tmp_path, run):
    system = {"role": "system", "content": "Be brief."}
    rows = [{"system": "Be brief.", "messages": [USER, ANSWER]},
            {"system_prompt": "Be brief.", "prompt": "2+2?", "response": "4"},
            {"system": "Be brief.", "messages": [system, USER, ANSWER]}]
    run(rows, tmp_path / "out", "--val_fraction=0", "--style=plain")
    text = "<s>Be brief.\n\nQuestion: 2+2?\nAnswer: 4<|eot_id|>"
    assert examples_of(tmp_path / "out", "train") == [(text, " 4<|eot_id|>")] * 3


def test_an_answer_of_weight_0_is_read_but_not_learned(tmp_path, run):
    rows = [{"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}]
    run(rows, tmp_path / "out", "--val_fraction=0", "--style=plain")
    turn = "Question: 2+2?\nAnswer: 4<|eot_id|>"
    assert examples_of(tmp_path / "out", "train") == [("<s>" + turn * 2, " 4<|eot_id|>")]


CALL = {"tool_calls": [{"function": {"name": "weather"}}]}


@pytest.mark.parametrize("row, words", [
    ({"messages": [USER, {**ANSWER, **CALL}]}, "has 'tool_calls', which no format here writes"),
    ({"messages": [USER, {**ANSWER, "train": False}]}, "has 'train', which no format"),
    ({"messages": [USER, {**ANSWER, "weight": 2}]}, "has weight '2'; allowed: 0 (not learned)"),
    ({"messages": [USER, ANSWER], "tools": ["weather"]}, "has a column 'tools', which is not read"),
    ({"prompt": "a", "response": "b", "context": "c"}, "write it into prompt or response"),
    ({"question": "a", "answer": "b", "Choices": ["b", "c"]}, "has a column 'Choices'"),
    ({"text": "a", "system": "b"}, "has a column 'system', which is not read"),
    ({"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ANSWER]},
     "has two system prompts"),
])
def test_nothing_that_changes_an_answer_is_left_out_in_silence(tmp_path, run, capsys, row, words):
    assert run([row], tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error and "out.jsonl, line 1: " in error


def test_columns_that_are_left_out_are_named(tmp_path, run, capsys):
    rows = [{"messages": [USER, {**ANSWER, **dict.fromkeys(CALL)}], "id": 3, "tools": [],
             "instruction": "2+2?", "source": "me"}]
    assert run(rows, tmp_path / "out", "--val_fraction=0") == 0
    assert "columns left out: id, source\n" in capsys.readouterr().out


def test_text_without_a_first_token_does_not_count_its_first_byte(tmp_path, run):
    tokenizer = ByteTokenizer()
    tokenizer.bos_id = None
    run([{"text": "abc"}], tmp_path / "out", "--val_fraction=0", tokenizer=tokenizer)
    ids, mask, documents = TokenFiles(tmp_path / "out", "train")[0]
    assert ids.tolist() == [*b"abc", tokenizer.eos_id]
    assert mask.tolist() == [0, 1, 1, 1]
    assert documents.tolist() == [1, 1, 1, 1]


# --- files ----------------------------------------------------------------------------------------

def test_packing_is_greedy_and_loses_and_duplicates_nothing(tmp_path, run):
    out = tmp_path / "out"
    rows = [{"messages": conversation(number, 1 + number % 3)} for number in range(60)]
    assert run(rows, out, "--val_fraction=0.3", "--block_size=700") == 0
    tokenizer = ByteTokenizer()
    expected = []
    for row in rows:
        ids, spans = chat.encode_examples(row["messages"], tokenizer, RENDER["llama3"])
        for start, end in spans:
            expected.append((tokenizer.decode(ids[:end]), tokenizer.decode(ids[start:end])))
    assert sorted(examples_of(out, "train") + examples_of(out, "val")) == sorted(expected)
    train = TokenFiles(out, "train")
    sizes = [(len(ids), int((documents == 1).sum())) for ids, _, documents in train]
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
    found = {}
    for name, these, flags in (
        ("first", rows, ()), ("again", rows, ()), ("seed", rows, ("--seed=7",)),
        ("order", rows[::-1] + rows[:9], ()),
    ):
        run(these, tmp_path / name, "--val_fraction=0.25", *flags)
        found[name] = {split: examples_of(tmp_path / name, split) for split in SPLITS}
    assert found["first"] == found["again"]
    assert found["first"]["train"] != found["seed"]["train"]
    for sides in found.values():
        for split in SPLITS:
            assert set(sides[split]) == set(found["first"][split])

    # no conversation is in both splits
    train, val = ({text.split("question ")[1].split(".")[0] for text, _ in found["order"][split]}
                  for split in SPLITS)
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
    # an empty validation split has no rows
    assert len(TokenFiles(tmp_path / "out", "val")) == 0
    with pytest.raises(IndexError):
        files[len(files)]


def test_long_turns_leave_the_short_ones_before_them(tmp_path, run):
    messages = conversation(0) + [USER, {"role": "assistant", "content": "y" * 400}]
    flags = ["--block_size=350", "--val_fraction=0"]
    run([{"messages": messages}], tmp_path / "out", *flags)
    counted = [counted for _, counted in examples_of(tmp_path / "out", "train")]
    assert counted == ["answer 0.0<|eot_id|>"]


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_where_they_fit(tmp_path, run, vocab_size, dtype):
    tokenizer = ByteTokenizer(vocab_size=vocab_size)
    run([{"text": "abc"}], tmp_path / "out", "--val_fraction=0", tokenizer=tokenizer)
    files = TokenFiles(tmp_path / "out", "train")
    assert isinstance(files.ids, np.memmap)
    assert files.ids.dtype == dtype
    assert files[0][0].dtype == np.int64


def test_memory_does_not_grow_with_the_tokens(tmp_path, run):
    def peak_of(count):
        line = json.dumps({"text": "word " * 200}).encode() + b"\n"
        content = line * count
        tracemalloc.start()
        try:
            run(content, tmp_path / str(count))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # An example has about 1,000 tokens: 2,000 bytes as the smallest array, 8,000 as a list.
    assert (peak_of(900) - peak_of(300)) / 600 < 300


# --- classes --------------------------------------------------------------------------------------

CLASSED = [{"text": "one", "class": "word"}, {"text": "12", "class": 7},
           {"text": "three", "class": "word"}, {"text": "none", "class": None}]


def test_every_token_has_the_class_of_its_example(tmp_path, run, capsys):
    """Numbered by their first appearance among what is kept; the id behind the last: no class."""
    rows = [{"text": "too long" * 9, "class": "dropped"}, *CLASSED]
    assert run(rows, tmp_path / "out", "--val_fraction=0", "--block_size=40") == 0
    assert "\nclasses: word, 7\n" in capsys.readouterr().out
    files = TokenFiles(tmp_path / "out", "train")
    assert files.classes == ("word", "7")
    (ids, mask, documents, classes), = files
    assert classes.dtype == np.int64
    tokenizer = ByteTokenizer()
    found = [(tokenizer.decode(ids[documents == number]), classes[documents == number])
             for number in range(1, 5)]
    expected = {"one": 0, "12": 1, "three": 0, "none": 2}
    for text, numbers in found:
        assert set(numbers) == {expected.pop(text[len("<s>"):-len("<|eot_id|>")])}
    assert not expected
    targets = collate([files[0], files[0]]).targets
    assert targets.class_ids.tolist() == 2 * classes[mask == 1].tolist()


def test_data_without_classes_leave_none_of_earlier_data(tmp_path, run):
    out = tmp_path / "out"
    run(CLASSED, out, "--val_fraction=0")
    assert {path.name for path in out.glob("*.classes.npy")} == {
        "train.classes.npy", "val.classes.npy"}
    assert TokenFiles(out, "val").classes == ("word", "7")
    run([{"text": "abc"}], out, "--val_fraction=0")
    assert not list(out.glob("*.classes.npy"))
    files = TokenFiles(out, "train")
    assert files.classes == () and len(files[0]) == 3


@pytest.mark.parametrize("column, value, shown", [
    ("class", True, "True"), ("class", 1.5, "1.5"), ("class", " ", "' '"), ("class", [], "[]"),
    ("class", {"a": 1}, "{'a': 1}"), ("category", ["planning"], "['planning']")])
def test_a_class_of_another_kind_is_malformed(tmp_path, run, capsys, value, shown, column):
    rows = [{"text": "fine", "category": ""}] * 10 + [{"text": "fine", column: value}]
    assert run(rows, tmp_path / "out", "--val_fraction=0") == 0
    expected = f"line 11: has {column} {shown}; allowed: a name, or an integer"
    assert expected in capsys.readouterr().out
    assert TokenFiles(tmp_path / "out", "train").classes == ()


@pytest.mark.parametrize("change, words", [
    (lambda a: a[:2], "lengths [22, 22, 5, 2, 2], not [22, 22, 5, 2, 4]"),
    (lambda a: a + 1, "a class outside 0 to 2"),
    (lambda a: a.astype(int) - 1, "a class outside 0 to 2"),
])
def test_damaged_classes_are_refused(tmp_path, run, change, words):
    out = tmp_path / "out"
    run(CLASSED, out, "--val_fraction=0")
    path = out / "train.classes.npy"
    np.save(path, change(np.load(path)))
    refusal(ValueError, words, out)
    path.unlink()
    refusal(FileNotFoundError, "train.classes.npy", out)


@pytest.mark.parametrize("names, words", [
    (["a", "a"], "class names ['a', 'a'] are not supported"),
    (["a", ""], "class names ['a', ''] are not supported"),
    ("ab", "class names 'ab' are not supported"),
    (None, "meta.json has an unexpected form"),
])
def test_damaged_names_of_classes_are_refused(out, names, words):
    path = out / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": names}))
    refusal(ValueError, words, out)


# --- errors ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, flags, words", [
    ([], [], "no training example left"),
    ([{"text": "far too long"}], ["--block_size=4"], "--block_size"),
    ([{"text": "a", "category": "b"}], ["--drop_categories=b"], "1 conversations of dropped"),
    ([{"text": "a"}], ["--val_fraction=0.999"], "1 examples held out by --val_fraction"),
    ([{"text": "fine"}] * 8 + [{"texts": "not"}], [], "line 9: needs messages"),
    ([{"text": "fine"}], ["--style=qwen"], "--style=llama3"),
    ('{"text": "fine"}'.encode("utf-16"), [], "is in UTF-16; save it as UTF-8"),
    (None, [], "bad.jsonl"),
    ([], ["--block_size=1"], "--block_size = 1 is out of range; allowed: 2 or more"),
    ([], ["--val_fraction=1"], "--val_fraction = 1.0 is out of range; allowed: 0 to 1, "),
    ([], ["--val_fraction=nan"], "--val_fraction = nan is out of range"),
    ([], ["--seed=-1"], "--seed = -1 is out of range"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, run, capsys, rows, flags, words):
    assert run(rows, tmp_path / "bad", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("line", [
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"text": "\\ud800"}',
    b"3",
    b'{"text": 1e999}',
])
def test_a_malformed_line_is_counted_not_fatal(tmp_path, run, capsys, line):
    rows = b"\xef\xbb\xbf" + b'{"text": "fine"}\r\n\r\n' * 10 + line
    assert run(rows, tmp_path / "out", "--val_fraction=0") == 0
    assert "line 21: " in capsys.readouterr().out
    counts = TokenFiles(tmp_path / "out", "train").meta["counts"]
    assert counts == {"conversations": 11, "malformed": 1}


def test_a_failure_in_the_middle_leaves_the_old_files_as_they_were(
    tmp_path, run, monkeypatch, capsys,
):
    def content():
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

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


def refusal(error, words, directory, tokenizer=None):
    with pytest.raises(error) as caught:
        TokenFiles(directory, "train", tokenizer)
    assert words in str(caught.value)
    assert "python -m data.text.chat" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def out(tmp_path, run):
    """A directory of token files."""
    run([{"text": "some text"}] * 3, tmp_path / "out", "--val_fraction=0")
    TokenFiles(tmp_path / "out", "train", ByteTokenizer())
    return tmp_path / "out"


def test_token_files_of_another_place_or_tokenizer_are_refused(out):
    refusal(FileNotFoundError, "no token file", out.parent / "elsewhere")
    refusal(FileNotFoundError, "no token file", out.parent / "out.jsonl")
    refusal(ValueError, "another tokenizer, name", out, tokenizer=ByteTokenizer(QWEN))
    with pytest.raises(ValueError, match="split 'test' is not supported; allowed: train, val"):
        TokenFiles(out, "test")


@pytest.mark.parametrize("kind, change, words", [
    ("ids", lambda a: a[:5], "lengths [5, 33, 4, 2], not [33, 33, 4, 2]"),
    ("ids", lambda a: a + 0.5, "train.ids.npy is not a list of whole numbers"),
    ("ids", lambda a: a[None], "train.ids.npy is not a list of whole numbers"),
    ("ids", lambda a: a + 44, "token id 304 is beyond the vocabulary"),
    ("ids", lambda a: -a.astype(int), "beyond the vocabulary"),
    ("mask", lambda a: a * 0, "a mask without a counted token"),
    ("mask", lambda a: a * 2, "not of zeros and ones"),
    ("examples", lambda a: a[::-1], "borders that do not rise"),
    ("rows", lambda a: a * 2, "borders that do not rise"),
])
def test_damaged_arrays_are_refused(out, kind, change, words):
    path = out / f"train.{kind}.npy"
    np.save(path, change(np.load(path)))
    refusal(ValueError, words, out, tokenizer=ByteTokenizer())


def test_truncated_arrays_are_refused(out):
    ids = out / "train.ids.npy"
    whole = ids.read_bytes()
    for damaged in (whole[:-2], whole[:20], b"", b"no array"):
        ids.write_bytes(damaged)
        refusal(ValueError, "train.ids.npy is truncated or not a .npy file", out)
    ids.unlink()
    refusal(FileNotFoundError, "train.ids.npy", out)


@pytest.mark.parametrize("change, words", [
    (lambda meta: meta | {"version": 0}, "version 0, not 1"),
    (lambda meta: meta | {"block_size": 3}, "a row longer than 3 tokens"),
    (lambda meta: {"version": 1}, "meta.json has an unexpected form"),
    (lambda meta: [], "meta.json has an unexpected form"),
])
def test_another_meta_json_is_refused(out, change, words):
    path = out / "meta.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refusal(ValueError, words, out)
    path.write_text("{")
    refusal(ValueError, "meta.json is not valid JSON", out)
