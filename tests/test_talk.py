"""A conversation (data/text/talk.py): kept keys and values, commands, Ctrl-C, a real terminal."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import sample
from conftest import GPT2, LLAMA, ROOT, exit_status, make_l2d
from data.flags.sample import check_flags
from data.results.page import again
from data.system.command import each_line, given_flags
from data.text import chat, talk
from data.text.answer import Answer, Live, Stop, messages_of
from solvers import ADAPTIVE
from test_chat import QWEN, ByteTokenizer

CONFIG = {**LLAMA, "vocab_size": 300, "max_position_embeddings": 256}
KINDS = {"path": {}, "own keys": dict(own_kv=True), "guidance": dict(classes=3)}


class Bytes(ByteTokenizer):
    """Any ids have a text, and every text its ids."""
    stop_ids = [258]

    def encode(self, text, special=False):
        return list(text.encode("latin-1"))

    def decode(self, ids):
        return bytes(id for id in ids if id < 256).decode("latin-1")

    def token_bytes(self, id):
        return self.decode([id]).encode("latin-1")


def start(model, *flags, generate=sample.generate) -> talk.Talk:
    flags = ["--chat=qwen", "--steps=2", "--max_new_tokens=6", *flags]
    parser = sample.build_parser()
    args = parser.parse_args(flags)
    given = given_flags(parser, flags)
    check_flags(args, given, ADAPTIVE)
    settings = sample.Settings(steps=args.steps, max_new_tokens=args.max_new_tokens)
    return talk.Talk(model, Bytes(QWEN), settings, args, given, parser, generate)


def count_read(lm, monkeypatch) -> list:
    """The number of tokens of every reading of the frozen model, from now on."""
    lengths = []
    read = lm.read

    def counted(ids, *more, **options):
        lengths.append(ids.shape[1])
        return read(ids, *more, **options)
    monkeypatch.setattr(lm, "read", counted)
    return lengths


def fresh(one: talk.Talk, generate=sample.generate):
    """The last answer, made again without anything that was kept."""
    *before, (question, _) = one.turns.turns
    settings, class_ids = one.check(one.asked)
    ids = one.turns.encode(question, before, one.positions - settings.max_new_tokens + 1)
    answer, = generate(one.model, [ids], settings, one.stop, class_ids, [one.asked.seed])
    return answer.ids


# --- kept keys and values -------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_same_with_what_was_kept_as_without(kind, monkeypatch):
    one = start(make_l2d(CONFIG, **KINDS[kind]))
    lengths = count_read(one.model.lm, monkeypatch)
    lines = ["one", "two", "/steps 0", "three", "/steps 3", "/again", "/seed 4", "/again", "/reset",
             "four", "five"]
    if kind == "guidance":
        lines[1:1] = ["/class 1", "/guidance 2.5"]
        lines += ["/guidance 1", "/class none", "/again"]
    for line in lines:
        lengths.clear()
        one.act(line)
        read = list(lengths)
        if read:
            assert one.turns.turns[-1][1].ids == fresh(one)
            # but for the first of a conversation, or of a reader, a turn reads what is new
            assert line in ("one", "three") or read[0] < 50
    assert len(one.turns.turns) == 2 and one.args.label is None


def test_the_oldest_turns_go_where_there_is_no_room(capsys):
    one = start(make_l2d({**GPT2, "vocab_size": 300, "n_positions": 256}))
    for number in range(6):
        one.act(f"question {number} " + "x" * 20)
        assert one.turns.turns[-1][1].ids == fresh(one)
    assert "turns are left out" in capsys.readouterr().out
    assert len(one.turns.turns) == 6 and one.turns.first > 1
    first = one.turns.first
    with pytest.raises(ValueError, match="shorten the prompt"):
        one.act("x" * 300)
    assert len(one.turns.turns) == 6 and one.turns.first == first


# --- Ctrl-C ---------------------------------------------------------------------------------------

def test_ctrl_c_keeps_the_beginning_of_an_answer(capsys):
    """Wherever it comes: between the layers of a reading, whose keys are then half written."""
    one = start(make_l2d(CONFIG, own_kv=True))
    one.act("one")
    whole = list(one.turns.turns)
    block = one.model.lm.blocks[1]
    calls = []

    def stopped(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
    hook = block.register_forward_pre_hook(stopped)
    with pytest.raises(KeyboardInterrupt):
        one.act("two")
    hook.remove()
    (question, answer), = one.turns.turns[1:]
    assert one.turns.turns[:1] == whole and question == "two" and len(answer.ids) == 3
    assert "3 tokens" in capsys.readouterr().out
    one.act("three")
    assert one.turns.turns[-1][1].ids == fresh(one)


@pytest.mark.parametrize("events, seen", [
    (["a", KeyboardInterrupt, "b", EOFError], "ab"),
    (["a", KeyboardInterrupt, KeyboardInterrupt, "b"], "a"),
    (["stop", KeyboardInterrupt, "b"], ""),
    (["stop", "bad", KeyboardInterrupt, "b", EOFError], "b"),
    (["stop", "stop", "b"], ""),
    ([EOFError], ""),
])
def test_two_in_a_row_end_a_conversation(events, seen, monkeypatch, capsys):
    events = iter(events)
    done = []

    def line(sign):
        event = next(events)
        if not isinstance(event, str):
            raise event
        return event

    def act(line):
        if line == "stop":
            raise KeyboardInterrupt
        if line == "bad":
            raise ValueError("one\nline")
        done.append(line)
    monkeypatch.setattr("builtins.input", line)
    each_line(act)
    assert "".join(done) == seen
    assert capsys.readouterr().err in ("", "one\\nline\n")


# --- the command ----------------------------------------------------------------------------------

@pytest.fixture
def script(monkeypatch, capsys):
    def script(*lines, flags=("--talk",)):
        """(exit status, output, errors) of sample.py with these lines on standard input."""
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        status = exit_status(sample.main, [*flags, "--device=cpu"])
        return status, *capsys.readouterr()
    return script


def test_lines_from_a_pipe_are_continued(script, tmp_path):
    conversation, page = tmp_path / "c.jsonl", tmp_path / "p.html"
    status, out, err = script(
        "(7*8)+15?", "/steps", "/steps 2", "", "/again", "/frozen", f"/trace {page}", "12+30?",
        f"/save {conversation}", f"/save {conversation}", "/help")
    lines = out.splitlines()
    assert status == 0 and "> " not in out and "\033" not in out
    assert "NFE (9.0 per token)" in lines[1] and lines[2:4] == ["steps 8", "steps 2"]
    assert "NFE (3.0 per token)" in lines[5] and " 0 NFE (0.0 per token)" in lines[7]
    assert "is there already" in err and len(err.splitlines()) == 1
    # of the question asked again, the last answer
    rows = [json.loads(line) for line in conversation.read_text().splitlines()]
    assert rows == [{"text": "(7*8)+15?" + lines[4]}, {"text": "12+30?" + lines[9]}]
    text = page.read_text()
    assert "&#x27;(7*8)+15?&#x27; /steps &#x27;/steps 2&#x27; /again /frozen &#x27;/trace p.htm" in text
    assert "| python sample.py --talk --device cpu" in text


@pytest.mark.parametrize("line, words", [
    ("/step 3", "/step is unknown; /help"), ("/steps x", "argument --steps: invalid int value"),
    ("/steps -1", "steps = -1 is out of range"), ("/solver rk5", "argument --solver: invalid"),
    ("/temperature 1e-9", "temperature = 1e-09"), ("/guidance 2", "guidance needs a class"),
    ("/class nothing", "--class 'nothing' is not supported"), ("/seed -1", "seed = -1"),
    ("/max_new_tokens 100000", "max_new_tokens = 100000"), ("/again", "/again needs an answer"),
    ("/trace x.html", "/trace needs an answer"), ("/", "/ is unknown"),
])
def test_what_cannot_be_set_is_one_line_and_loses_nothing(line, words, script):
    status, out, err = script(line, "/steps", "/solver", "/seed", "/class")
    assert status == 0 and words in err and len(err.splitlines()) == 1
    assert out.splitlines()[-4:] == ["steps 8", "solver euler", "seed 0", "class None"]


@pytest.mark.parametrize("flags, words", [
    (["--talk", "--prompt=x"], "--talk would do nothing"),
    (["--talk", "--num_samples=2"], "--num_samples would do nothing"),
    (["--talk", "--trace"], "--trace would do nothing: it needs a prompt; in a conversation"),
    (["--talk", "--max_new_tokens=100000"], "max_new_tokens = 100000 is out of range"),
    (["--chat"], "this model has no chat format; allowed: --talk"),
    (["--chat=llama3"], "needs the special token"),
])
def test_flags_of_no_use_in_a_conversation_are_refused(flags, words, script):
    status, _, err = script("1+1?", flags=flags)
    assert status == 2 and words in err and len(err.splitlines()) == 1


def test_a_saved_conversation_can_be_trained_on(tmp_path):
    one = start(make_l2d(CONFIG))
    one.act("one")
    one.act("two")
    one.act(f"/save {tmp_path / 'c.jsonl'}")
    messages, *_ = chat.parse_row((tmp_path / "c.jsonl").read_bytes())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "two"


def test_turns_become_messages_that_a_format_can_write():
    stop = Stop(tokenizer=Bytes(QWEN))
    turns = [("2+2?", Answer(stop, list(b" 4"))), ("?", Answer(stop, list(b" \n")))]
    assert messages_of(turns) == [{"role": "user", "content": "2+2?"},
                                  {"role": "assistant", "content": "4"}]


def test_half_a_character_at_the_end_of_an_answer_is_shown(capsys):
    live = Live("> ", Bytes(QWEN))
    batch = SimpleNamespace(answers=[Answer(Stop({258}))])
    for token in (ord("a"), 0xC3, 258):
        live(batch, [0], 1.0, None, [token])
    live.end()
    assert capsys.readouterr().out == "> a\ufffd\n"


def test_the_command_of_a_page_types_the_lines_once_more():
    args = sample.build_parser().parse_args(["--html=a/b.html"])
    assert again(args, {"chat": "auto"}, "two", ["/seed 3", "it's", "two"]) == (
        "printf '%s\\n' '/seed 3' 'it'\"'\"'s' two '/trace b.html' | python sample.py --chat auto")


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal of POSIX")
def test_in_a_terminal():
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    child = subprocess.Popen(
        [sys.executable, "-c", spawn, sys.executable, "sample.py", "--talk", "--device=cpu"],
        cwd=ROOT, env=environment | {"TERM": "xterm"}, bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def seen_until(mark: bytes) -> bytes:
        seen = b""
        while not seen.endswith(mark):
            seen += child.stdout.read(1) or pytest.fail(str(seen))
        return seen
    with child:
        seen_until(b"> ")
        child.stdin.write(b"1+1?\n")
        # the cost is pale
        assert b"\033[2m" in seen_until(b" s\033[0m\r\n> ")
        child.stdin.write(b"/steps 1000000\n")
        seen_until(b"\r\n> ")
        child.stdin.write(b"1+1?\n")
        seen_until(b"1+1?\r\n")
        child.stdin.write(b"\x03")
        assert b"Ctrl-C once more" in seen_until(b"\r\n> ")
        child.stdin.write(b"\x04")
        assert child.wait() == 0
