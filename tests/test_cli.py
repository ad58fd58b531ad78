"""sample.py from the shell: prompts, classes, traces, and one line for every bad input."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, make_lm

from data.tasks import TASKS
from diffusion import L2D, L2DConfig
from model import LM
from sample import Settings, main

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"



@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """--init_from of a random path with five classes, beside a base with the embedded tokenizer."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    make_lm(LLAMA).save_pretrained(root / "base")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, root / "base")
    l2d = L2D(
        LM.from_pretrained(root / "base", device="cpu"),
        L2DConfig(width=16, cond_dim=24, rank=4, classes=5),
    )
    with torch.no_grad():
        for p in l2d.path_parameters().values():
            p += 0.2 * torch.randn(p.shape)
    l2d.save(root / "path")
    return root


@pytest.fixture
def run(saved, capsys, monkeypatch):
    """Call main as the shell would: (exit status, standard output, standard error)."""
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*words, init_from="path"):
        try:
            main(
                [
                    f"--init_from={saved / init_from}",
                    "--device=cpu",
                    "--max_new_tokens=4",
                    "--steps=2",
                    *words,
                ]
            )
            status = 0
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return call


def answers_in(text):
    return re.findall(r"^   answer  (.*)$", text, re.M)


def test_prompts_are_answered(run):
    status, alone, error = run("--prompt", "ab")
    assert (status, error) == (0, "")
    assert (
        alone.startswith("'ab'\n   answer  ") and "\n   NFE 12 for 4 tokens\n   frozen  " in alone
    )
    assert re.search(
        r"^4 tokens, 12 NFE \(3\.0 per token\), \d+ tokens/s, euler, steps 2$", alone, re.M
    )
    status, both, _ = run("--prompt", "ab", "--prompt", "7*8=", "--batch_size", "1", "--no-frozen")
    assert status == 0 and "frozen" not in both and answers_in(both)[0] == answers_in(alone)[0]
    assert both.count("NFE 12 for 4 tokens") == 2 and "8 tokens, 24 NFE (3.0 per token)" in both


def test_a_base_that_moved_is_named_with_base(run, saved, tmp_path):
    expected = run("--prompt", "ab")[1].splitlines()[:-1]
    shutil.copytree(saved / "path", saved / "lonely", dirs_exist_ok=True)
    meta = json.loads((saved / "lonely" / "path.json").read_text(encoding="utf-8"))
    (saved / "lonely" / "path.json").write_text(
        json.dumps({**meta, "base": str(tmp_path / "gone")}), encoding="utf-8"
    )
    status, _, error = run("--prompt", "ab", init_from="lonely")
    assert status == 2 and error.count("\n") == 1 and "gone" in error
    assert (
        run("--prompt", "ab", f"--base={saved / 'base'}", init_from="lonely")[1].splitlines()[:-1]
        == expected
    )


def test_prompts_come_from_a_file_or_standard_input(run, tmp_path, monkeypatch):
    expected = run("--prompt", "ab", "--prompt", "7*8=")[1].splitlines()[:-1]
    (tmp_path / "prompts.txt").write_text("ab\n\n7*8=\n", encoding="utf-8")
    status, out, _ = run("--prompt_file", str(tmp_path / "prompts.txt"))
    assert status == 0 and out.splitlines()[:-1] == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    status, out, _ = run("--prompt", "-")
    assert status == 0 and out.splitlines()[:-1] == run("--prompt", "ab")[1].splitlines()[:-1]


def test_samples_of_one_prompt_have_seeds_that_can_be_asked_for_again(run):
    _, three, _ = run(
        "--prompt", "ab", "--num_samples", "3", "--temperature", "1", "--batch_size", "2"
    )
    assert len(set(answers_in(three))) > 1
    _, last, _ = run("--prompt", "ab", "--seed", "2", "--temperature", "1")
    assert answers_in(three)[2] == answers_in(last)[0]


def test_class_by_name_or_number(run):
    named, numbered, other, none = (
        answers_in(run("--prompt", "ab", *words)[1])
        for words in (["--class", "sort"], ["--class", "2"], ["--class", "4"], [])
    )
    assert named == numbered and named != other and named != none
    status, out, _ = run("--prompt", "ab", "--class", "sort", "--guidance", "2")
    assert status == 0 and "24 NFE (6.0 per token)" in out


def test_trace_shows_the_cost_of_tokens_and_the_guesses_of_one(run):
    status, out, _ = run("--prompt", "ab", "--trace", "--trace_token", "1")
    assert status == 0 and "\033" not in out
    assert len(re.findall(r"'?:3\b", re.search(r"   tokens: (.*)", out)[1])) == 4
    assert re.search(r"^   token 1 \(.*\), prediction at every evaluation:$", out, re.M)
    assert re.findall(r"^     t = (0\.\d{4})  .* p = [01]\.\d{3}$", out, re.M)[:2] == [
        "0.0000",
        "0.5000",
    ]


def test_without_prompts_one_problem_of_every_kind_is_worked(run):
    status, out, _ = run("--steps", "1")
    groups = TASKS["tiny"].groups
    assert status == 0 and out.count("   L2D     ") == out.count("   frozen  ") == len(groups)
    assert all(f"{topic}, level {level}: " in out for topic, level in groups)


def test_a_model_without_a_path_answers_with_no_steps(run, saved):
    status, out, _ = run("--prompt", "ab", "--steps", "0", init_from="base")
    frozen = re.search(r"^   frozen  (.*)$", out, re.M)[1]
    assert status == 0 and answers_in(out) == [frozen] and "0 NFE" in out


BAD = {
    "no path": (
        ["--prompt", "ab"],
        "base",
        "this model has no diffusion path, so --steps must be 0",
    ),
    "no model": (["--prompt", "ab"], "nowhere", "unknown model .*nowhere'"),
    "no prompt file": (["--prompt_file", "nowhere.txt"], "path", "nowhere.txt"),
    "directory as prompt file": (["--prompt_file", str(TINY)], "path", "tiny"),
    "class": (
        ["--prompt", "ab", "--class", "poems"],
        "path",
        "--class 'poems' is not supported; allowed: chains, math, sort",
    ),
    "class number": (["--prompt", "ab", "--class", "5"], "path", "--class '5' is not supported"),
    "class without classes": (
        ["--prompt", "ab", "--class", "0", "--steps", "0"],
        "base",
        "--class would do nothing: it needs a diffusion path",
    ),
    "guidance without class": (["--prompt", "ab", "--guidance", "2"], "path", "--class"),
    "stop": (
        ["--prompt", "ab", "--stop", ""],
        "path",
        "--stop is empty; allowed: a text of at least one",
    ),
    "num_samples": (
        ["--prompt", "ab", "--num_samples", "0"],
        "path",
        "--num_samples = 0 is out of range",
    ),
    "batch_size": (
        ["--prompt", "ab", "--batch_size", "0"],
        "path",
        "--batch_size = 0 is out of range",
    ),
    "steps": (["--prompt", "ab", "--steps", "-1"], "path", "steps = -1 is out of range"),
    "top_p": (["--prompt", "ab", "--top_p", "2"], "path", "top_p = 2.0 is out of range"),
    "estimate temperature": (
        ["--prompt", "ab", "--estimate_temperature", "0"],
        "path",
        "estimate_temperature = 0.0",
    ),
    "trace token": (
        ["--prompt", "ab", "--trace", "--trace_token", "9"],
        "path",
        "--trace_token = 9 is out of range",
    ),
    "negative trace token": (
        ["--prompt", "ab", "--trace", "--trace_token", "-1"],
        "path",
        "trace_token",
    ),
    "device": (["--prompt", "ab", "--device", "abacus"], "path", "abacus"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_status_2(run, case):
    words, init_from, message = BAD[case]
    status, _, error = run(*words, init_from=init_from)
    assert status == 2 and re.fullmatch(rf"sample.py: .*{message}.*\n", error), error


def test_bad_input_files_are_one_line_and_exit_status_2(run, saved, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    shutil.copytree(saved / "path", tmp_path / "torn")
    (tmp_path / "torn" / "path.safetensors").write_bytes(b"half")
    for words, init_from in (
        (["--prompt_file", str(tmp_path / "empty.txt")], "path"),
        (["--prompt_file", str(tmp_path / "latin.txt")], "path"),
        (["--prompt", "ab"], tmp_path / "torn"),
    ):
        status, _, error = run(*words, init_from=init_from)
        assert status == 2 and re.fullmatch(r"sample.py: .+\n", error), error


@pytest.mark.parametrize(
    "words",
    [
        ["--solver", "rk5"],
        ["--estimate_temperature", "warm"],
        ["--temperature", "warm"],
        ["--nonsense"],
    ],
)
def test_words_the_parser_does_not_know_end_with_exit_status_2(run, words):
    status, _, error = run("--prompt", "ab", *words)
    assert status == 2 and words[0] in error.splitlines()[-1]


def test_help_names_every_setting(run):
    status, out, _ = run("--help")
    assert status == 0 and all(
        f"--{name} " in out for name in Settings.__dataclass_fields__ if name != "score")
