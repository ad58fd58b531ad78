"""sample.py from the shell: prompts, classes, traces, and one line for every bad input."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest

from conftest import exit_status, make_l2d, save_base
from data.tasks import TASKS
from data.tiny.topics import CLASSES
from sample import Settings, main


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a random path of the five topics, `path`, and its frozen model, `base`."""
    root = tmp_path_factory.mktemp("models")
    l2d = make_l2d(classes=5, class_names=list(CLASSES))
    l2d.lm.directory = str(save_base(root / "base"))
    l2d.save(root / "path")
    return root


@pytest.fixture
def run(saved, capsys, monkeypatch):
    """Call main as the shell would: (exit status, standard output, standard error)."""
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*words, init_from="path"):
        common = [f"--init_from={saved / init_from}", "--device=cpu", "--max_new_tokens=4",
                  "--steps=2"]
        status = exit_status(main, [*common, *words])
        return (status, *capsys.readouterr())

    return call


def answers_in(text):
    return re.findall(r"^   answer  (.*)$", text, re.M)


def without_speed(text):
    """All lines but the last, which has the tokens per second."""
    return text.splitlines()[:-1]


def test_prompts_are_answered(run):
    status, alone, error = run("--prompt", "ab")
    assert (status, error) == (0, "")
    assert alone.startswith("'ab'\n   answer  ")
    assert "\n   4 tokens, 12 NFE (3.0 per token)\n   frozen  " in alone
    assert re.search(r"^4 tokens, 12 NFE \(3\.0 per token\), \d+ tokens/s, euler, steps 2$",
                     alone, re.M)
    status, both, _ = run("--prompt", "ab", "--prompt", "7*8=", "--batch_size", "1", "--no-frozen")
    assert status == 0
    assert "frozen" not in both
    assert answers_in(both)[0] == answers_in(alone)[0]
    assert both.count("   4 tokens, 12 NFE (3.0 per token)\n") == 2
    assert "8 tokens, 24 NFE (3.0 per token)" in both


def test_a_base_that_moved_is_named_with_base(run, saved, tmp_path):
    expected = run("--prompt", "ab")[1]
    shutil.copytree(saved / "path", saved / "lonely")
    meta = json.loads((saved / "lonely" / "path.json").read_text(encoding="utf-8"))
    meta["base"] = str(tmp_path / "gone")
    (saved / "lonely" / "path.json").write_text(json.dumps(meta), encoding="utf-8")
    status, _, error = run("--prompt", "ab", init_from="lonely")
    assert status == 2
    assert error.count("\n") == 1
    assert "gone" in error
    found = run("--prompt", "ab", f"--base={saved / 'base'}", init_from="lonely")[1]
    assert without_speed(found) == without_speed(expected)


def test_prompts_come_from_a_file_or_standard_input(run, tmp_path, monkeypatch):
    expected = run("--prompt", "ab", "--prompt", "7*8=")[1]
    path = tmp_path / "prompts.txt"
    path.write_text("ab\n\n7*8=\n", encoding="utf-8")
    status, out, _ = run("--prompt_file", str(path))
    assert status == 0
    assert without_speed(out) == without_speed(expected)
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    status, out, _ = run("--prompt", "-")
    assert status == 0
    assert without_speed(out) == without_speed(run("--prompt", "ab")[1])


def test_the_seed_of_every_sample_gives_it_again(run):
    sampled = ["--prompt", "ab", "--temperature", "1"]
    _, three, _ = run(*sampled, "--num_samples", "3", "--batch_size", "2")
    assert len(set(answers_in(three))) > 1
    _, last, _ = run(*sampled, "--seed", "2")
    assert answers_in(three)[2] == answers_in(last)[0]


def test_class_by_name_or_number(run):
    named, numbered, other, none = (
        answers_in(run("--prompt", "ab", *words)[1])
        for words in (["--class", "sort"], ["--class", "2"], ["--class", "4"], []))
    assert named == numbered
    assert named not in (other, none)
    status, out, _ = run("--prompt", "ab", "--class", "sort", "--guidance", "2")
    assert status == 0
    assert "24 NFE (6.0 per token)" in out


def test_trace_shows_the_cost_of_tokens_and_the_predictions_of_one(run):
    status, out, _ = run("--prompt", "ab", "--trace", "--trace_token", "1")
    assert status == 0
    assert "\033" not in out
    assert len(re.findall(r"'?:3\b", re.search(r"   tokens: (.*)", out)[1])) == 4
    assert re.search(r"^   token 1 \(.*\), prediction at every evaluation:$", out, re.M)
    times = re.findall(r"^     t = (0\.\d{4})  .* p = [01]\.\d{3}$", out, re.M)
    assert times[:2] == ["0.0000", "0.5000"]


def test_without_prompts_one_problem_of_every_kind_is_worked(run):
    status, out, _ = run("--steps", "1")
    groups = TASKS["tiny"].groups
    assert status == 0
    assert out.count("   L2D     ") == out.count("   frozen  ") == len(groups)
    for topic, level in groups:
        assert f"{topic}, level {level}: " in out


def test_a_trace_without_a_prompt_is_of_the_hardest_chain(run):
    status, out, _ = run("--trace")
    hardest = TASKS["tiny"].problem(("chains", 8), 0)
    assert status == 0 and out.startswith(f"{hardest.prompt!r}\n   answer  ")
    assert "prediction at every evaluation:" in out


def test_an_answer_imports_no_package_that_takes_seconds():
    """PyTorch's FSDP, its compiler and sympy: half of the CPU time of a first answer."""
    program = ("import sys, sample; sample.main(['--steps=1', '--prompt=ab']); "
               "print([name for name in ('torch.distributed.fsdp', 'torch.distributed.tensor', "
               "'torch._dynamo', 'sympy') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_model_without_a_path_answers_with_no_steps(run):
    status, out, _ = run("--prompt", "ab", "--steps", "0", init_from="base")
    assert status == 0
    assert answers_in(out) == re.findall(r"^   frozen  (.*)$", out, re.M)
    assert "0 NFE" in out


@pytest.mark.parametrize("words, init_from, message", [
    ("", "base", "this model has no diffusion path, so --steps must be 0"),
    ("", "nowhere", "unknown model .*nowhere'"),
    ("--prompt_file some.txt", "path", "--prompt and --prompt_file were both given"),
    ("--class poems", "path", "--class 'poems' is not supported; allowed: chains, math, sort"),
    ("--class 5", "path", "--class '5' is not supported"),
    ("--stop=", "path", "--stop is empty; allowed: a text of at least one"),
    ("--num_samples 0", "path", "--num_samples = 0 is out of range"),
    ("--batch_size 0", "path", "--batch_size = 0 is out of range"),
    ("--steps -1", "path", "steps = -1 is out of range"),
    ("--estimate_temperature 0", "path", "estimate_temperature = 0.0"),
    ("--trace --trace_token 9", "path", "--trace_token = 9 is out of range"),
    ("--trace --trace_token -1", "path", "--trace_token = -1 is out of range"),
])
def test_bad_input_is_one_line_and_exit_status_2(run, words, init_from, message):
    status, _, error = run("--prompt", "ab", *words.split(), init_from=init_from)
    assert status == 2
    assert re.fullmatch(rf"sample.py: .*{message}.*\n", error), error


def test_bad_input_files_are_one_line_and_exit_status_2(run, saved, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    shutil.copytree(saved / "path", tmp_path / "torn")
    (tmp_path / "torn" / "path.safetensors").write_bytes(b"half")
    for words, init_from, name in (
        (["--prompt_file", "nowhere.txt"], "path", "nowhere.txt"),
        (["--prompt_file", str(tmp_path)], "path", tmp_path.name),
        (["--prompt_file", str(tmp_path / "empty.txt")], "path", ""),
        (["--prompt_file", str(tmp_path / "latin.txt")], "path", "latin.txt"),
        (["--prompt", "ab"], tmp_path / "torn", "torn"),
    ):
        status, _, error = run(*words, init_from=init_from)
        assert status == 2
        assert re.fullmatch(rf"sample.py: .*{name}.*\n", error), error


@pytest.mark.parametrize("words", [
    ["--solver", "rk5"], ["--estimate_temperature", "warm"], ["--nonsense"]])
def test_words_that_the_parser_does_not_know_end_with_exit_status_2(run, words):
    status, _, error = run("--prompt", "ab", *words)
    assert status == 2
    assert words[0] in error.splitlines()[-1]


def test_help_names_every_setting(run):
    status, out, _ = run("--help")
    assert status == 0
    for name in Settings.__dataclass_fields__:
        assert f"--{name} " in out
