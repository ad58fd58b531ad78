"""data/system/command.py: how commands end, values out of range, flags without effect."""

import math
import os
import shlex
import subprocess
import sys

import pytest
import torch

import eval as evaluation
import sample
import train
from conftest import exit_status
from data.system import command as command_file
from data.system.command import command, visible

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# --- how a command ends ---------------------------------------------------------------------------

@pytest.mark.parametrize("error, status, line", [
    (ValueError("this is wrong"), 2, "it: this is wrong"),
    (ValueError("named\nby \x1b[2J"), 2, "it: named\\nby \\x1b[2J"),
    (OSError("no room"), 2, "it: no room"),
    (UnicodeEncodeError("utf-8", "a\ud83db", 1, 2, "surrogates not allowed"), 2,
     "it: the text 'a\\ud83db' holds half a character, which has no UTF-8; remove it"),
    (KeyboardInterrupt(), 130, "it: stopped"),
    (KeyboardInterrupt("half is kept"), 130, "it: half is kept"),
    (BrokenPipeError(), 0, ""),
])
def test_every_end_has_its_status_and_at_most_one_line(error, status, line, capsys, monkeypatch):
    # what it would do to the stream of all further tests
    monkeypatch.setattr("data.system.command.silence", lambda: None)

    @command("it")
    def main(argv):
        raise error
    assert exit_status(main, []) == status
    assert capsys.readouterr().err.strip() == line


def test_an_unexpected_error_keeps_its_traceback():
    @command("it")
    def main(argv):
        raise TypeError("a mistake of ours")
    with pytest.raises(TypeError):
        main([])


@pytest.mark.parametrize("text, shown", [
    ("a\x1b[31mb", "a\\x1b[31mb"), ("a\nb", "a\\nb"), ("é你", "é你"), ("\u202e", "\\u202e"),
])
def test_a_name_cannot_command_the_terminal(text, shown):
    assert visible(text) == shown


def python(*words, **more):
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


@pytest.mark.parametrize("words", [
    ("sample.py", "--prompt=(7*8)+15?", "--steps=2", "--device=cpu"),
    ("-m", "data.text.tokenizer", "data/tiny", "x" * 20_000),
])
def test_a_closed_pipe_is_no_error(words):
    process = python(*words)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("words, status", [
    (["--steps=0", "--no-frozen", "--max_new_tokens=1", "--prompt=1"], 0),
    (["--steps=-3"], 2),
    (["--steps=0", "--no-frozen", "--max_new_tokens=1", "--prompt=-"], 0),
])
def test_closed_streams_are_no_error(words, status):
    line = shlex.join([sys.executable, "sample.py", "--device=cpu", *words])
    done = subprocess.run(["sh", "-c", f"{line} <&- >&-"], cwd=ROOT, stderr=subprocess.PIPE,
                          text=True)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (status > 0)


def test_a_memory_that_is_too_small_is_one_line(capsys):
    @command("it")
    def main(argv):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert exit_status(main, []) == 2
    assert capsys.readouterr().err.startswith("it: not enough memory (")


@pytest.mark.skipif(sys.getfilesystemencoding() == "ascii",
                    reason="a prompt on the command line needs a file system encoding other than "
                           "ASCII")
def test_characters_that_the_terminal_lacks_are_written_as_escapes():
    process = python("sample.py", "--prompt=2² – 你?", "--steps=0", "--device=cpu",
                     "--max_new_tokens=1", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert "2\\xb2 \\u2013 \\u4f60?" in out


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process alone")
@pytest.mark.parametrize("wait_for", ["import", "work"])
def test_ctrl_c_in_eval_is_one_line_at_any_moment(wait_for, tmp_path):
    # a signal to itself: while torch is imported, or while problems are answered
    lines = {
        "import": "import sys, os, signal, data.system.command\n"
                  "sys.modules['torch'] = None\n"
                  "os.kill(os.getpid(), signal.SIGINT)",
        "work": "import os, signal, sample, eval\n"
                "choose = sample.choose\n"
                "sample.choose = lambda *a: os.kill(os.getpid(), signal.SIGINT) or choose(*a)\n"
                f"eval.main(['--problems=2', '--device=cpu', '--out={tmp_path / 'eval.json'}'])",
    }
    process = python("-c", lines[wait_for])
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and "stopped" in err


# --- values and flags -----------------------------------------------------------------------------

@pytest.mark.parametrize("value, low, high, kind", [
    (0, 0, 5, float), (5, 0, 5, int), (0.5, 0, math.inf, float), (True, False, True, bool),
    (10**400, 0, math.inf, int),
])
def test_a_value_in_range_is_returned(value, low, high, kind):
    assert command_file.check_range("x", value, low, high, kind) is value


@pytest.mark.parametrize("value, low, high, kind, allowed", [
    (-1, 0, math.inf, float, "0 or more"), (5.1, 0, 5, float, "0 to 5"),
    (math.nan, 0, 5, float, "0 to 5"), (math.inf, 0, math.inf, float, "0 or more"),
    (2.5, 1, 5, int, "1 to 5, an integer"), (True, 0, 5, int, "0 to 5, an integer"),
    (True, 0, 5, float, "0 to 5"), (1, False, True, bool, "False to True"),
    ("1", 0, 5, float, "0 to 5"), ([], 0, 5, int, "0 to 5, an integer"),
])
def test_another_value_or_type_is_refused(value, low, high, kind, allowed):
    with pytest.raises(ValueError) as error:
        command_file.check_range("x", value, low, high, kind)
    assert str(error.value) == f"x = {value!r} is out of range; allowed: {allowed}"


@pytest.mark.parametrize("words, idle", [
    (["--talk", "--prompt=x"], "talk"),
    (["--stop=x"], "stop"),
    (["--class=sums"], "class"),
    (["--trace", "--steps=0"], "trace"),
    (["--prompt=x", "--steps=0", "--max_nfe=3"], "max_nfe"),
    (["--prompt=x", "--steps=0", "--solver=midpoint"], "solver"),
    (["--prompt=x", "--steps=0", "--guidance=2"], "guidance"),
    (["--prompt=x", "--guidance=2"], "guidance"),
    (["--prompt=x", "--solver=dopri5", "--steps=3"], "steps"),
    (["--prompt=x", "--solver=euler", "--rtol=0.1"], "rtol"),
    (["--prompt=x", "--estimate_temperature=2"], "estimate_temperature"),
    (["--prompt=x", "--top_k=5"], "top_k"),
    (["--prompt=x", "--top_p=0.5"], "top_p"),
    (["--prompt=x", "--steps=0", "--num_samples=2"], "num_samples"),
    (["--prompt=x", "--trace_token=1"], "trace_token"),
    (["--prompt=x", "--steps=0", "--no-merge_lora"], "merge_lora"),
])
def test_sample_refuses_flags_that_would_do_nothing(words, idle, capsys):
    assert exit_status(sample.main, [*words, "--device=cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sample.py: --{idle} would do nothing: it needs ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("words, idle", [
    (["--method=lora", "--width=8"], "width"),
    (["--method=full", "--rank=8"], "rank"),
    (["--full_copies", "--rank=8"], "rank"),
    (["--objective=paper", "--unroll=2"], "unroll"),
    (["--objective=paper", "--prediction_words=8"], "prediction_words"),
    (["--objective=refine", "--time_distribution=cosmap"], "time_distribution"),
    (["--method=pretrain", "--report=5"], "report"),
    (["--init_from=resume", "--overwrite"], "overwrite"),
])
def test_train_refuses_flags_that_would_do_nothing(words, idle, capsys, tmp_path):
    # a run to resume must be there first
    out = tmp_path / "out"
    if words[0] == "--init_from=resume":
        small = ["--updates=1", "--width=8", "--cond_dim=8", "--rank=2", "--batch_size=2",
                 "--val_rows=2", "--report=0"]
        train.main([*small, f"--out_dir={out}", "--device=cpu"])
    assert exit_status(train.main, [*words, f"--out_dir={out}"]) == 2
    assert f"--{idle} would do nothing: it needs " in capsys.readouterr().err


@pytest.mark.parametrize("words, idle", [
    (["--guidance", "2", "--topics", "chains"], "guidance"),
    (["--task=sums", "--solvers=dopri5", "--steps=3"], "steps"),
    (["--task=sums", "--steps=0", "--solvers=euler"], "solvers"),
    (["--task=sums", "--steps=0", "--estimate=average"], "estimate"),
    (["--task=sums", "--steps=0", "--no-merge_lora"], "merge_lora"),
    (["--task=sums", "--steps=0", "--stop_unchanged=2"], "stop_unchanged"),
    (["--task=sums", "--steps=0", "--samples=4"], "samples"),
    (["--task=sums", "--steps=0", "--search", "vote:4"], "search"),
    (["--task=sums", "--samples=2", "--search", "vote:4"], "samples"),
    (["--task=mmlu", "--steps=0", "--draws=4"], "draws"),
    (["--regrade=x", "--out=y", "--task=sums"], "task"),
    (["--regrade=x", "--out=y", "--class=a"], "class"),
])
def test_eval_refuses_flags_that_would_do_nothing(words, idle, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_status(evaluation.main, [*words]) == 2
    assert f"--{idle} would do nothing: it needs " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words, message", [
    (["--code_seconds=1e30", "--task=humaneval", "--allow_code_execution"],
     "code_seconds = 1e+30 is out of range; allowed: 0.1 to 86400"),
    (["--regrade=x", "--out=y", "--code_seconds=nan"], "code_seconds = nan"),
    (["--problems=9999999"], "problems = 9999999 is out of range; allowed: 1 to 1000000"),
    (["--steps=9999999"], "steps = 9999999 is out of range"),
])
def test_numbers_that_never_end_are_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_status(evaluation.main, words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--seed=-1"], "seed"),
    (["--seed=99999999999999999999"], "seed"),
    (["--device=cpu:x"], "--device 'cpu:x' is not supported; allowed: "),
    (["--temperature=1e-40"], "temperature"),
    (["--temperature=nan"], "temperature"),
    (["--guidance=1e38", "--class=0"], "guidance"),
    (["--estimate=sample", "--estimate_temperature=1e-40"], "temperature"),
    (["--solver=dopri5", "--estimate=sample"], "cannot adapt"),
])
def test_numbers_that_overflow_and_devices_that_are_not_there_are_refused(words, message, capsys):
    assert exit_status(sample.main, ["--prompt=x", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
