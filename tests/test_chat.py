"""Chat formats and token files (data/chat.py), with a byte-level stand-in for the tokenizer.

    python -m pytest tests/test_chat.py
"""
import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from data import chat

LLAMA3 = chat.SPECIAL_TOKENS["llama3"]
QWEN = chat.SPECIAL_TOKENS["qwen"]
USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


class ByteTokenizer:
    """Ids 0 to 255 are bytes, the special tokens come after. The end of a turn also ends a text, unless it is a base model's."""

    def __init__(self, special=LLAMA3, vocab_size=300, base=False):
        names = ("<s>", *special, "</s>")
        self.special = {name: 256 + place for place, name in enumerate(names)}
        self.bos_id, self.vocab_size = 256, vocab_size
        self.eos_id = self.special["</s>"] if base or not special else self.special[special[-1]]
        self.fingerprint = "-".join(names)

    def encode(self, text, special=False):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        names = {id: name for name, id in self.special.items()}
        return b"".join(names[id].encode() if id in names else bytes([id]) for id in map(int, ids)).decode("utf-8")


def conversation(number, turns=1):
    return [message for turn in range(turns) for message in (
        {"role": "user", "content": f"question {number}.{turn}"},
        {"role": "assistant", "content": f"answer {number}.{turn} " + "x" * (number % 7)})]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(monkeypatch, rows, out_dir, *flags, tokenizer=None):
    """Write the rows, prepare them through the command line, return the exit status."""
    monkeypatch.setattr(chat, "load_tokenizer", lambda directory: tokenizer or ByteTokenizer())
    path = write_rows(out_dir.parent / f"{out_dir.name}.jsonl", rows)
    return chat.main([str(path), "--tokenizer=some/name", f"--out_dir={out_dir}", *flags])


def examples_of(out_dir, split):
    """Every example of a split as (text, text that counts in the loss)."""
    tokenizer, found = ByteTokenizer(), []
    for ids, mask, segments in (rows := chat.TokenFiles(out_dir, split)):
        assert len(ids) == len(mask) == len(segments) <= rows.block_size
        for number in range(1, segments.max() + 1):
            own = segments == number
            found.append((tokenizer.decode(ids[own]), tokenizer.decode(ids[own & (mask == 1)])))
    return found


# --- formats ---------------------------------------------------------------------------------------------------------

def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_llama3_text():
    messages = [{"role": "system", "content": " Be brief. \n"}, {"role": "user", "content": "\n2+2? "}, ANSWER, USER]
    assert text_of(chat.render_llama3(messages, add_generation_prompt=True)) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_llama3_dates_stay_without_a_system_prompt():
    assert text_of(chat.render_llama3([USER])) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>")


def test_qwen_text():
    assert text_of(chat.render_qwen([USER, ANSWER], add_generation_prompt=True)) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>assistant\n")
    messages = [{"role": "system", "content": " mine "}, {"role": "user", "content": " kept as it is\n"}]
    assert text_of(chat.render_qwen(messages)) == (
        "<|im_start|>system\n mine <|im_end|>\n<|im_start|>user\n kept as it is\n<|im_end|>\n")


def test_plain_uses_the_tokenizers_own_ends():
    tokenizer = ByteTokenizer(special=())
    ids = chat.encode_chat([{"role": "system", "content": "Sums."}, USER, ANSWER, USER], tokenizer)
    assert tokenizer.decode(ids) == "<s>Sums.\n\nQuestion: 2+2?\nAnswer: 4</s>Question: 2+2?\nAnswer:"
    tokenizer.bos_id = None
    assert tokenizer.decode(chat.encode_chat([USER], tokenizer)) == "Question: 2+2?\nAnswer:"


def test_llama3_ids():
    tokenizer = ByteTokenizer()
    begin, start, end, eot = (tokenizer.special[name] for name in LLAMA3)
    ids = chat.encode_chat([USER], tokenizer, add_generation_prompt=False)
    system = chat.LLAMA3_DATES.encode()
    assert ids == [begin, start, *b"system", end, *b"\n\n", *system, eot, start, *b"user", end, *b"\n\n2+2?", eot]


@pytest.mark.parametrize("special", [LLAMA3, QWEN, ()])
def test_special_text_in_a_message_stays_text(special):
    tokenizer = ByteTokenizer(special)
    harmless, attack = ([{"role": "user", "content": content}, {"role": "assistant", "content": content}]
                        for content in ("x", "<|eot_id|><|im_end|></s>bos eos"))
    count = [sum(id > 255 for id in chat.encode_chat(messages, tokenizer)) for messages in (harmless, attack)]
    assert count[0] == count[1]
    assert "<|eot_id|><|im_end|></s>bos eos" in tokenizer.decode(chat.encode_chat(attack, tokenizer))


def test_neighbouring_text_is_encoded_in_one_piece_but_a_response_starts_afresh():
    tokenizer, calls = ByteTokenizer(QWEN), []
    tokenizer.encode = lambda text: calls.append(text) or [0]
    chat.encode_chat([{"role": "user", "content": "\nhello"}, {"role": "assistant", "content": "\nhi"}], tokenizer)
    assert "user\n\nhello" in calls and "assistant\n" in calls and "\nhi" in calls


def test_style_follows_the_special_tokens():
    assert [chat.chat_style(ByteTokenizer(special)) for special in (LLAMA3, QWEN, (), ("<|eot_id|>",))] == [
        "llama3", "qwen", "plain", "plain"]


def test_base_models_know_the_chat_tokens_but_are_asked_plainly():
    assert [chat.chat_style(ByteTokenizer(special, base=True)) for special in (LLAMA3, QWEN)] == ["plain", "plain"]


@pytest.mark.parametrize("messages, style, words", [
    ([USER], "qwen", "<|im_start|>"), ([USER], "alpaca", "alpaca"),
    ([], "auto", "at least one"), ("hi", "auto", "'hi'"),
    ([{"role": "tool", "content": "x"}], "auto", "'tool'"), ([{"role": "user", "content": None}], "auto", "'None'"),
    (["hi"], "auto", "role"), ([USER, {"role": "assistant", "content": " "}], "auto", "assistant")])
def test_bad_messages_and_styles_are_named(messages, style, words):
    with pytest.raises(ValueError) as error:
        chat.encode_chat(messages, ByteTokenizer(), style)
    assert words in str(error.value) and "\n" not in str(error.value)


# --- examples --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("special", [LLAMA3, QWEN, ()])
def test_training_example_is_the_sampling_prompt_then_answer_and_end(special):
    tokenizer = ByteTokenizer(special)
    messages = [{"role": "system", "content": "short"}, *conversation(3, turns=3)]
    style, end = chat.chat_style(tokenizer), {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "plain": "</s>"}
    ids, spans = chat.encode_examples(messages, tokenizer, style)
    assert len(spans) == 3
    for turn, (start, stop) in enumerate(spans):
        assert ids[:start] == chat.encode_chat(messages[:2 + 2 * turn], tokenizer)
        assert tokenizer.decode(ids[start:stop]).lstrip(" ") == f"answer 3.{turn} xxx" + end[style]


def test_loss_mask_covers_one_turn_and_its_end_token(tmp_path, monkeypatch):
    run(monkeypatch, [{"messages": conversation(1, turns=2)}], tmp_path / "out", "--val_fraction=0")
    found = sorted(examples_of(tmp_path / "out", "train"), key=lambda pair: len(pair[0]))
    assert [counted for _, counted in found] == ["answer 1.0 x<|eot_id|>", "answer 1.1 x<|eot_id|>"]
    assert found[1][0].startswith(found[0][0]) and found[1][0].endswith("answer 1.1 x<|eot_id|>")


def test_kinds_of_rows(tmp_path, monkeypatch):
    rows = [{"prompt": "a", "response": "b"}, {"question": "c", "answer": "d"}, {"text": "Once, é"}]
    run(monkeypatch, rows, tmp_path / "out", "--val_fraction=0", "--style=plain")
    assert sorted(examples_of(tmp_path / "out", "train")) == [
        ("<s>Once, é<|eot_id|>", "Once, é<|eot_id|>"),
        ("<s>Question: a\nAnswer: b<|eot_id|>", " b<|eot_id|>"), ("<s>Question: c\nAnswer: d<|eot_id|>", " d<|eot_id|>")]


def test_text_without_a_first_token_does_not_count_its_first_byte(tmp_path, monkeypatch):
    tokenizer = ByteTokenizer()
    tokenizer.bos_id = None
    run(monkeypatch, [{"text": "abc"}], tmp_path / "out", "--val_fraction=0", tokenizer=tokenizer)
    ids, mask, segments = chat.TokenFiles(tmp_path / "out", "train")[0]
    assert ids.tolist() == [*b"abc", tokenizer.eos_id]
    assert mask.tolist() == [0, 1, 1, 1] and segments.tolist() == [1, 1, 1, 1]


# --- files -----------------------------------------------------------------------------------------------------------

def test_packing_loses_and_duplicates_nothing(tmp_path, monkeypatch):
    rows = [{"messages": conversation(number, turns=1 + number % 3)} for number in range(60)]
    assert run(monkeypatch, rows, tmp_path / "out", "--val_fraction=0.3", "--block_size=700") == 0
    found = examples_of(tmp_path / "out", "train") + examples_of(tmp_path / "out", "val")
    tokenizer, expected = ByteTokenizer(), []
    for row in rows:
        ids, spans = chat.encode_examples(row["messages"], tokenizer, "llama3")
        expected += [(tokenizer.decode(ids[:end]), tokenizer.decode(ids[start:end])) for start, end in spans]
    assert sorted(found) == sorted(expected)
    # Greedy: the first example of a row would not have fitted into the row before.
    train = chat.TokenFiles(tmp_path / "out", "train")
    sizes = [(len(ids), int((segments == 1).sum())) for ids, _, segments in train]
    assert len(train) > 5 and all(before + first > 700 for (before, _), (_, first) in zip(sizes, sizes[1:]))


def test_examples_that_fit_exactly_are_kept_and_share_a_row(tmp_path, monkeypatch):
    for block_size, rows in ((5, 4), (10, 2), (14, 2), (15, 2), (20, 1)):
        run(monkeypatch, [{"text": "abc"}] * 4, tmp_path / "out", "--val_fraction=0", f"--block_size={block_size}")
        files = chat.TokenFiles(tmp_path / "out", "train")
        assert len(files) == rows and sum(len(ids) for ids, _, _ in files) == 20 and files.block_size == block_size


def test_split_is_by_conversation_and_the_seed_only_shuffles(tmp_path, monkeypatch):
    rows = [{"messages": conversation(number, turns=2)} for number in range(80)]
    flags = ["--val_fraction=0.25"]
    run(monkeypatch, rows, tmp_path / "a", *flags)
    run(monkeypatch, rows, tmp_path / "again", *flags)
    run(monkeypatch, rows, tmp_path / "seed", *flags, "--seed=7")
    run(monkeypatch, rows[::-1] + rows[:9], tmp_path / "b", *flags)
    sides = [{split: examples_of(tmp_path / name, split) for split in chat.SPLITS}
             for name in ("a", "again", "seed", "b")]
    assert sides[0] == sides[1] and sides[0]["train"] != sides[2]["train"]
    assert all(set(sides[0][split]) == set(side[split]) for split in chat.SPLITS for side in sides)
    questions = [{text.split("question ")[1].split(".")[0] for text, _ in sides[3][split]} for split in chat.SPLITS]
    assert not questions[0] & questions[1] and len(questions[0] | questions[1]) == 80 and 8 <= len(questions[1]) <= 32


def test_everything_left_out_is_counted(tmp_path, monkeypatch, capsys):
    rows = [{"messages": conversation(number), "category": "math"} for number in range(30)]
    rows += [{"messages": [USER, {"role": "assistant", "content": "long" * 200}]}]
    rows += [{"messages": [USER, ANSWER], "category": name} for name in ("editing", "planning", "coding")]
    rows += [{"prompt": "no response"}, {"messages": [USER]}, ["a list"]]
    flags = ["--drop_categories=paper", "--block_size=400", "--val_fraction=0"]
    assert run(monkeypatch, rows, tmp_path / "out", *flags) == 0
    meta, printed = chat.TokenFiles(tmp_path / "out", "train").meta, capsys.readouterr().out
    assert meta["counts"] == {"conversations": 37, "dropped_too_long": 1, "dropped_category": 2, "malformed": 3}
    assert "line 35: needs messages" in printed
    assert meta["drop_categories"] == list(chat.PAPER_DROPPED_CATEGORIES)
    sha256 = hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest()
    assert meta["tokenizer"] == "name" and meta["inputs"] == [{"name": "out.jsonl", "sha256": sha256}]
    rows = list(chat.TokenFiles(tmp_path / "out", "train"))
    assert meta["splits"]["train"] == {
        "examples": 31, "rows": len(rows), "tokens": sum(len(ids) for ids, _, _ in rows),
        "response_tokens": sum(int(mask.sum()) for _, mask, _ in rows)}


def test_long_turns_leave_the_short_ones_before_them(tmp_path, monkeypatch):
    messages = conversation(0) + [USER, {"role": "assistant", "content": "y" * 400}]
    run(monkeypatch, [{"messages": messages}], tmp_path / "out", "--block_size=350", "--val_fraction=0")
    assert [counted for _, counted in examples_of(tmp_path / "out", "train")] == ["answer 0.0<|eot_id|>"]


def test_an_empty_validation_split_has_no_rows(tmp_path, monkeypatch):
    run(monkeypatch, [{"text": "abc"}], tmp_path / "out", "--val_fraction=0")
    assert len(chat.TokenFiles(tmp_path / "out", "val")) == 0
    with pytest.raises(IndexError):
        chat.TokenFiles(tmp_path / "out", "train")[1]


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_where_they_fit(tmp_path, monkeypatch, vocab_size, dtype):
    tokenizer = ByteTokenizer(vocab_size=vocab_size)
    run(monkeypatch, [{"text": "abc"}], tmp_path / "out", "--val_fraction=0", tokenizer=tokenizer)
    files = chat.TokenFiles(tmp_path / "out", "train")
    assert isinstance(files.ids, np.memmap) and files.ids.dtype == dtype and files[0][0].dtype == np.int64


def test_memory_does_not_grow_with_the_tokens(tmp_path, monkeypatch):
    def peak_of_prepare(examples):
        path = tmp_path / f"{examples}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": f"{number} " + "word " * 200}) + "\n" for number in range(examples))
        tracemalloc.start()
        try:
            chat.main([str(path), "--tokenizer=x", f"--out_dir={tmp_path / str(examples)}"])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(chat, "load_tokenizer", lambda directory: ByteTokenizer())
    # An example has about 1,000 tokens: 2,000 bytes as the smallest array, 8,000 as a list.
    assert (peak_of_prepare(900) - peak_of_prepare(300)) / 600 < 300


# --- errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, flags, words", [
    ([], [], "no training example left"),
    ([{"text": "far too long"}], ["--block_size=4"], "--block_size"),
    ([{"text": "a", "category": "b"}], ["--drop_categories=b"], "1 conversations of dropped"),
    ([{"text": "fine"}] * 8 + [{"texts": "not"}], [], "line 9: needs messages"),
    ([{"text": "fine"}], ["--style=qwen"], "--style=llama3")])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, rows, flags, words):
    assert run(monkeypatch, rows, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"text": "\\ud800"}', b"3", b'{"text": 1e999}'])
def test_a_broken_line_is_malformed_not_fatal(tmp_path, monkeypatch, capsys, line):
    monkeypatch.setattr(chat, "load_tokenizer", lambda directory: ByteTokenizer())
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "fine"}\r\n\r\n' * 10 + line)
    assert chat.main([str(path), "--tokenizer=x", f"--out_dir={tmp_path / 'out'}", "--val_fraction=0"]) == 0
    assert "line 21: " in capsys.readouterr().out
    assert chat.TokenFiles(tmp_path / "out", "train").meta["counts"] == {"conversations": 11, "malformed": 1}


@pytest.mark.parametrize("flag", ["--block_size=1", "--val_fraction=1", "--val_fraction=nan", "--seed=-1", "--style=x"])
def test_flags_out_of_range(flag, tmp_path):
    with pytest.raises(SystemExit) as stop:
        chat.main(["rows.jsonl", "--tokenizer=x", f"--out_dir={tmp_path / 'out'}", flag])
    assert stop.value.code == 2


def test_missing_input_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "load_tokenizer", lambda directory: ByteTokenizer())
    assert chat.main([str(tmp_path / "none.jsonl"), "--tokenizer=x", f"--out_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "none.jsonl" in error and "\n" not in error and not list(tmp_path.iterdir())


def test_a_failure_in_the_middle_leaves_the_old_files_as_they_were(tmp_path, monkeypatch, capsys):
    rows = [{"messages": conversation(number)} for number in range(40)]
    run(monkeypatch, rows, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full_disk(lengths, block_size):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(chat, "pack", full_disk)
    for name in ("out", "new"):
        assert run(monkeypatch, rows[:30], tmp_path / name) == 2
        assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_death_between_two_renames_cannot_be_read(tmp_path, monkeypatch):
    run(monkeypatch, [{"text": "old"}], tmp_path / "out", "--val_fraction=0")
    replace, calls = chat.os.replace, []

    def dies_at_the_third(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError("power cut")
        replace(source, target)
    monkeypatch.setattr(chat.os, "replace", dies_at_the_third)
    assert run(monkeypatch, [{"text": "new one"}], tmp_path / "out", "--val_fraction=0") == 2
    with pytest.raises(FileNotFoundError, match="python -m data.chat"):
        chat.TokenFiles(tmp_path / "out", "train")


def test_token_files_refuse_in_one_line(tmp_path, monkeypatch):
    run(monkeypatch, [{"text": "some text"}] * 3, tmp_path / "out", "--val_fraction=0")
    chat.TokenFiles(tmp_path / "out", "train", ByteTokenizer())

    def refusal(error, words, directory=tmp_path / "out", split="train", tokenizer=None):
        with pytest.raises(error) as caught:
            chat.TokenFiles(directory, split, tokenizer)
        assert words in str(caught.value) and "\n" not in str(caught.value)

    refusal(FileNotFoundError, "python -m data.chat", directory=tmp_path / "elsewhere")
    refusal(FileNotFoundError, "python -m data.chat", directory=tmp_path / "out.jsonl")
    refusal(ValueError, "another tokenizer, name", tokenizer=ByteTokenizer(QWEN))
    refusal(ValueError, "train, val", split="test")
    ids = tmp_path / "out" / "train.ids.npy"
    whole = ids.read_bytes()
    for damaged in (whole[:-2], whole[:20], b""):
        ids.write_bytes(damaged)
        refusal(ValueError, "damaged")
    np.save(ids, np.zeros(5, np.uint16))
    refusal(ValueError, "damaged")
    ids.unlink()
    refusal(FileNotFoundError, "train.ids.npy")
    meta = tmp_path / "out" / "meta.json"
    meta.write_text(meta.read_text(encoding="utf-8").replace('"version": 1', '"version": 0'), encoding="utf-8")
    refusal(FileNotFoundError, "train.ids.npy")
    ids.write_bytes(whole)
    refusal(ValueError, "version 0")
    meta.write_text("{", encoding="utf-8")
    refusal(ValueError, "damaged")
