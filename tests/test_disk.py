"""Files that appear whole, and a directory that one run owns."""

import os
import subprocess
import sys

import pytest
import torch

import train
from conftest import exit_status
from data.checkpoints import hub, state
from data.results.records import Records, read_lines
from data.system import disk
from data.tasks.files import read_file
from data.text import chat
from data.text.answer import read_prompts
from data.text.tokens import map_array

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no modes and few links")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write(path, text):
    with disk.appearing(path) as part:
        part.write_text(text)


# --- written whole --------------------------------------------------------------------------------

def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write(path, "old")
    with pytest.raises(RuntimeError), disk.appearing(path) as part:
        part.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_disk_keeps_the_file_and_then_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(disk, "flush", lambda path: done.append(path.name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    write(tmp_path / "a.json", "new")
    assert done == ["a.json", "rename", tmp_path.name]


@POSIX
def test_a_link_stays_one(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


@POSIX
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask_whatever_library_writes(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path / "a.json", "x")
        disk.write_safetensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


@POSIX
def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path):
    code = ("import os, signal; from data.system.disk import appearing\n"
            f"with appearing({str(tmp_path / 'a.json')!r}) as part:\n"
            "    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.json.part"]
    with disk.claimed(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match="cannot write .*a.json .No space left.*make room"):
        with disk.appearing(path):
            raise OSError(28, "No space left on device")
    # the reader of a pipe that has gone is another end
    with pytest.raises(BrokenPipeError), disk.naming(path):
        raise BrokenPipeError(32, "Broken pipe")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_noticed_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="is a directory; allowed: the name of a file"):
        disk.check_writable(tmp_path)
    with pytest.raises(OSError, match="is no directory, so a.json cannot be written there"):
        disk.check_writable(tmp_path / "none" / "a.json")

    def refuse(dir):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"cannot write to .* \(Permission denied\)"):
        disk.check_writable(tmp_path / "a.json")


# --- read without trust ---------------------------------------------------------------------------

@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_an_editor_marks_is_read(coding):
    assert disk.decode("é 1".encode(coding), "a.txt") == "é 1"


@pytest.mark.parametrize("content, words", [
    (b"\xe9", "a.json is not text in UTF-8 (unexpected end of data at byte 0); save it as UTF-8"),
    (b"{", "a.json is not valid JSON"),
    (b"[" * 100_000 + b"]" * 100_000, "a.json is not valid JSON"),
    (b"[" + b"1" * 5000 + b"]", "a.json "),
    (b"[1]", "a.json holds no JSON object"),
])
def test_damaged_json_is_one_line(content, words, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        disk.read_json(tmp_path / "a.json")
    assert words in str(error.value) and "\n" not in str(error.value)


@POSIX
def test_a_link_to_nothing_is_not_taken_for_no_file(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    assert not disk.present(path)
    path.symlink_to("blob")
    with pytest.raises(ValueError, match="is a link to nothing"):
        disk.present(path)


@POSIX
def test_a_pipe_is_refused_before_it_is_read_or_written(tmp_path):
    """Reading one would wait for ever, and so would writing."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    readers = (disk.present, disk.read_bytes, disk.read_json, disk.open_safetensors, read_lines,
               disk.sha256_of, map_array, lambda path: read_prompts([], str(path)),
               lambda path: list(chat.read_lines([path], [])), lambda path: read_file(path))
    writers = (disk.check_writable, lambda path: disk.check_absent(path, True),
               lambda path: disk.write_json({}, path), lambda path: Records(path, {}, True),
               lambda path: disk.claimed_file(path, True).__enter__())
    for read in readers + writers:
        with pytest.raises(ValueError, match="pipe is a pipe or a device; allowed: a file"):
            read(pipe)
    with pytest.raises(ValueError, match="is a pipe or a device"):
        disk.check_regular("/dev/zero")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c"])
def test_a_prompt_ends_at_a_line_feed_and_nowhere_else(separator, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a{separator}b\r\n\nc\n".encode("utf-8-sig"))
    assert read_prompts([], str(path)) == [f"a{separator}b", "c"]
    # all of standard input is one prompt
    with open(path, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert read_prompts(["-"], None) == [f"a{separator}b\n\nc"]


# --- a directory of one run -----------------------------------------------------------------------

def test_two_runs_cannot_have_one_directory(tmp_path):
    with disk.claimed(tmp_path):
        with pytest.raises(ValueError, match="another process is writing to .* another --out_dir"):
            with disk.claimed(tmp_path):
                pass
    with disk.claimed(tmp_path):
        pass


def test_a_folder_of_the_users_own_stays_whatever_its_name(tmp_path):
    (tmp_path / "notes.part").mkdir()
    (tmp_path / "notes.part" / "mine.txt").write_text("mine")
    with disk.claimed(tmp_path):
        pass
    assert (tmp_path / "notes.part" / "mine.txt").read_text() == "mine"


@POSIX
def test_a_lock_that_its_last_holder_has_removed_protects_nothing(tmp_path, monkeypatch):
    original = disk.try_lock

    def late(handle):
        """Between opening and locking another process writes its file, and goes."""
        os.unlink(handle.name)
        return original(handle)

    monkeypatch.setattr(disk, "try_lock", late)
    with pytest.raises(ValueError, match="another process has just written"):
        with disk.claimed_file(tmp_path / "eval.json", overwrite=True):
            pass


def test_two_commands_cannot_have_one_file(tmp_path):
    path = tmp_path / "eval.json"
    with disk.claimed_file(path, overwrite=True):
        with pytest.raises(ValueError, match="another process is writing to .* another --out$"):
            with disk.claimed_file(path, overwrite=True):
                pass
        path.write_text("{}")
    # the lock has gone, the file stays
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="is there already"), disk.claimed_file(path, False):
        pass


def test_a_new_directory_goes_again_if_nothing_was_written(tmp_path):
    with pytest.raises(RuntimeError), disk.claimed(tmp_path / "out"):
        raise RuntimeError
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", state.RESULTS)
def test_what_an_earlier_run_left_is_not_replaced_without_being_asked(name, tmp_path):
    out, source = tmp_path / "out", tmp_path / "base"
    out.mkdir()
    (out / name).write_text("earlier")
    with pytest.raises(ValueError, match="--overwrite"):
        state.check_out_dir(out, source, overwrite=False)
    state.check_out_dir(out, source, overwrite=True)
    state.clear(out)
    state.check_out_dir(out, source, overwrite=False)


def test_a_run_never_writes_over_the_model_that_it_trains(tmp_path):
    with pytest.raises(ValueError, match="is the directory of the model that is trained from"):
        state.check_out_dir(tmp_path / "..", tmp_path.parent, overwrite=True)


def test_a_run_does_not_take_the_name_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "tiny"):
        with pytest.raises(ValueError, match="is the name of a model; choose another one"):
            hub.check_not_a_model(name)
        assert exit_status(train.main, [f"--out_dir={name}", "--updates=0"]) == 2
    hub.check_not_a_model("out/gpt2")
    assert not list(tmp_path.iterdir())


def test_results_are_not_replaced_without_being_asked(tmp_path, capsys):
    import eval
    path = tmp_path / "eval.json"
    path.write_text("{}")
    flags = [f"--out={path}", "--problems=1", "--device=cpu"]
    assert exit_status(eval.main, flags) == 2
    assert "is there already, from an earlier run; allowed: another name" in capsys.readouterr().err
    assert path.read_text() == "{}"
