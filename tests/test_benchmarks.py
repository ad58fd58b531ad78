"""Benchmarks: files, prompts, verdicts, records, search (data/tasks/, eval.py).

With NANOL2D_SHARED set to a folder that holds benchmarks/ and data/datasets/, published verdicts
and rendered prompts are compared too.
"""

import itertools
import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from conftest import LLAMA, exit_status, make_lm
from data.checkpoints.families import ModelConfig
from data.experiments import finetune, headline
from data.flags import train as train_flags
from data.parts.lora import LoRA, replace_linears
from data.results import records, scores
from data.tasks import TASKS, code, files
from data.tasks.gsm8k import GSM8K
from data.tasks.letters import find_letter
from data.tasks.mmlu import MMLU, MMLUPro, MMLUProSteps
from data.tasks.prompting import choose_style, letter_tokens, write_prompts
from data.text.answer import Score
from data.text.formats import render_llama3
from data.text.tokenizer import load_tokenizer
from diffusion import L2D, L2DConfig
from model import LM
from sample import Settings, generate, load_model
from test_tokenizer import MERGES, NAMES, save, tokenizer_json, vocabulary

ROWS = 8


# --- a small model, and files in the published forms ----------------------------------------------

def write_jsonl(path: Path, rows: list):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count in (("test", ROWS), ("train", 6)):
        write_jsonl(root / "gsm8k" / f"{split}.jsonl", [
            {"question": f"the {i} in?", "answer": f"{i} and 1\n#### {i + 1}"}
            for i in range(count)])
    write_jsonl(root / "math500" / "test.jsonl", [
        {"problem": f"the {i}", "solution": rf"it is $\boxed{{{i}}}$.", "answer": str(i)}
        for i in range(ROWS)])
    for split, count in (("test", 3), ("dev", 5)):
        folder = root / "mmlu" / split
        folder.mkdir(parents=True)
        for subject in ("the_one", "two"):
            lines = [f'" the {i}, in? ",a,"b, c",d,e,{"ABCD"[i % 4]}\n' for i in range(count)]
            (folder / f"{subject}_{split}.csv").write_text("".join(lines))
    write_jsonl(root / "mmlu_pro" / "test.jsonl", [
        {"question_id": 70 + i, "question": f"the {i}?", "options": ["a", " b", "c"],
         "answer": "ABC"[i % 3], "answer_index": i % 3, "cot_content": "", "category": "law"}
        for i in range(ROWS)])
    for split in ("Test", "Train"):
        write_jsonl(root / "arc" / "ARC-Easy" / f"ARC-Easy-{split}.jsonl", [
            {"id": f"M_{i}", "answerKey": "2", "question": {"stem": f"the {i}?", "choices": [
                {"text": text, "label": label} for label, text in zip("123", "abc")]}}
            for i in range(4)])
    return root


def build_models(root: Path, template: str | None = None) -> tuple:
    """(a model's directory, a path's), with the chat template of a Qwen format if one is given."""
    # letters behind a blank are one token, as in real vocabularies
    letters = [f"Ġ{letter}" for letter in "ABCDEFGHIJ"]
    merges = [*MERGES, *(f"Ġ {letter[1]}" for letter in letters)]
    vocab = {**vocabulary(), **{letter: 268 + place for place, letter in enumerate(letters)}}
    content = tokenizer_json(vocab=vocab, merges=merges)
    names = dict(NAMES)
    if template:
        content["added_tokens"].append({"id": 290, "content": "<|im_start|>", "special": True})
        names["chat_template"] = template
    save(root / "base", tokenizer_json=content, tokenizer_config_json=names)
    config = {**LLAMA, "vocab_size": 300, "max_position_embeddings": 512}
    make_lm(config).save_pretrained(root / "base")
    torch.manual_seed(0)
    l2d = L2D(LM.from_pretrained(root / "base", device="cpu"), L2DConfig(16, 24, rank=4))
    with torch.no_grad():
        for p in l2d.path_parameters().values():
            p += 0.2 * torch.randn(p.shape)
    l2d.save(root / "path", tokenizer=load_tokenizer(root / "base").fingerprint, updates=1)
    return root / "base", root / "path"


def write_code(folder: Path):
    """HumanEval's form; the second problem's tests accept anything that is a program."""
    rows = []
    for number, test in enumerate(("assert candidate(2) == 4", "pass")):
        rows.append({
            "task_id": f"HumanEval/{number}", "entry_point": "twice",
            "prompt": 'def twice(x):\n    """ the in """\n',
            "canonical_solution": "    return 2 * x\n",
            "test": f"def check(candidate):\n    {test}\n"})
    write_jsonl(folder / "HumanEval.jsonl", rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return build_models(tmp_path_factory.mktemp("models"))


def run_eval(model, data_dir, out, task, *more) -> int:
    """The exit status of eval.py."""
    return exit_status(evaluation.main, [
        f"--init_from={model}", f"--task={task}", f"--data_dir={data_dir}", f"--out={out}",
        "--device=cpu", *more])


def run(models, data_dir, out, task, *more, path=True):
    """The records and the table of eval.py."""
    assert run_eval(models[1] if path else models[0], data_dir, out, task, *more) == 0
    lines = records.read_lines(out / "records.jsonl")[1:]
    return lines, json.loads((out / "summary.json").read_text())["rows"]


def answers(lines) -> dict:
    """The records without their times."""
    return {records.key_of(line): (line["output"], line["nfe"], line["score"]) for line in lines}


def alike(a: dict, b: dict) -> bool:
    """Equal answers, and scores equal up to the rounding of batched products."""
    return a.keys() == b.keys() and all(
        a[key][:2] == b[key][:2] and a[key][2] == pytest.approx(b[key][2], abs=1e-4) for key in a)


GENERATE = ["--max_new_tokens=6", "--shots=1", "--steps=2", "--solvers=midpoint"]


# --- eval.py --------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["gsm8k", "math500"])
def test_every_problem_is_answered_by_the_frozen_model_and_the_path(
        task, models, data_dir, tmp_path, capsys):
    lines, rows = run(models, data_dir, tmp_path / "out", task, *GENERATE)
    assert {line["column"] for line in lines} == {"frozen", "midpoint 2"}
    assert len(lines) == 2 * ROWS and [row["n"] for row in rows] == [ROWS, ROWS]
    frozen, path = rows
    assert frozen["nfe_per_token"] == 0
    assert frozen["cut"] == sum(line["cut"] for line in lines if line["nfe"] == 0) / ROWS
    # two midpoint intervals are four evaluations, and a final one
    assert path["nfe_per_token"] == 5
    for line in lines:
        assert set(line) >= {"benchmark", "id", "output", "tokens", "nfe", "cut", "strict",
                             "flexible", "prompt", "reference", "seconds", "digest"}
    shown = capsys.readouterr().out
    assert "plain prompts, 1 shots, at most 6 tokens" in shown and "midpoint 2" in shown


def test_answers_depend_neither_on_the_batch_nor_on_the_order(models, data_dir, tmp_path):
    results = [answers(run(models, data_dir, tmp_path / str(size), "gsm8k", *GENERATE,
                           "--temperatures=1", f"--batch_size={size}")[0]) for size in (1, 3, 8)]
    for other in results[1:]:
        assert alike(results[0], other)


def test_a_killed_run_goes_on_where_it_was(models, data_dir, tmp_path, capsys):
    whole, _ = run(models, data_dir, tmp_path / "whole", "gsm8k", *GENERATE)
    run(models, data_dir, tmp_path / "parts", "gsm8k", *GENERATE, "--limit=3")
    path = tmp_path / "parts" / "records.jsonl"
    content = path.read_bytes()
    # killed while a line was being written
    path.write_bytes(content[:-40])
    parts, rows = run(models, data_dir, tmp_path / "parts", "gsm8k", *GENERATE)
    assert "is cut off and is left out" in capsys.readouterr().err
    assert alike(answers(parts), answers(whole)) and rows[0]["n"] == ROWS
    # and what is whole is not computed again
    before = path.read_bytes()
    run(models, data_dir, tmp_path / "parts", "gsm8k", *GENERATE)
    assert path.read_bytes() == before


def test_ctrl_c_keeps_what_was_answered_and_says_so(
        models, data_dir, tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **more)
    monkeypatch.setattr(evaluation, "generate", interrupted)
    assert run_eval(models[0], data_dir, tmp_path / "out", "gsm8k", "--max_new_tokens=2",
                    "--batch_size=2") == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "stopped; 4 answers are in" in last and "the same command goes on" in last
    assert len(records.read_lines(tmp_path / "out" / "records.jsonl")) == 5


@pytest.mark.parametrize("change", ["--shots=2", "--seed=1", "--max_new_tokens=5",
                                    "--estimate=average"])
def test_records_of_something_else_are_refused(change, models, data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    run(models, data_dir, out, "gsm8k", *GENERATE, "--limit=1")
    before = (out / "records.jsonl").read_bytes()
    assert run_eval(models[0], data_dir, out, "gsm8k", *GENERATE[:2], "--limit=1") == 2
    assert "holds records of another model" in capsys.readouterr().err
    assert run_eval(models[1], data_dir, out, "gsm8k", *GENERATE, "--limit=1", change) == 2
    err = capsys.readouterr().err
    assert "holds records of another" in err and "--overwrite" in err
    assert (out / "records.jsonl").read_bytes() == before
    run(models, data_dir, out, "gsm8k", *GENERATE, "--limit=1", change, "--overwrite")


@pytest.mark.parametrize("change, words", [
    ("question", "another gsm8k/test/0 than the data files hold now"),
    ("answer", "another gsm8k/test/0 than the data files hold now"),
    ("dtype", "holds records of another dtype"),
    ("config", "holds records of another config"),
    ("stops", "holds records of another stops"),
    ("record", "record 2 of .*records.jsonl was changed since it was written"),
])
def test_records_of_other_data_or_settings_are_refused(
        change, words, data_dir, tmp_path, capsys):
    base, _ = build_models(tmp_path)
    rows = [json.loads(line) for line in (data_dir / "gsm8k/test.jsonl").read_text().splitlines()]
    flags = ["--shots=0", "--max_new_tokens=2", "--limit=1"]
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", rows)
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", rows)
    assert run_eval(base, tmp_path, tmp_path / "out", "gsm8k", *flags) == 0
    path = tmp_path / "out" / "records.jsonl"
    if change == "record":
        path.write_text(path.read_text().replace('"flexible": false', '"flexible": true'))
    before = path.read_bytes()
    if change in rows[0]:
        # beside the id, which is only the number of the row
        rows[0][change] = "the 9 in? #### 9"
        write_jsonl(tmp_path / "gsm8k" / "test.jsonl", rows)
    elif change == "dtype":
        flags.append("--dtype=bfloat16")
    elif change == "config":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rope_theta": 300.0}))
    elif change == "stops":
        (base / "generation_config.json").write_text('{"eos_token_id": [265, 266]}')
    assert run_eval(base, tmp_path, tmp_path / "out", "gsm8k", *flags) == 2
    assert re.search(words + ".*choose another --out", capsys.readouterr().err)
    assert path.read_bytes() == before


def test_prompts_too_long_have_fewer_shots_and_no_problem_is_dropped(
        models, data_dir, tmp_path, capsys):
    lines, rows = run(models, data_dir, tmp_path / "out", "gsm8k", "--shots=6",
                      "--max_new_tokens=350", "--limit=2", path=False)
    assert rows[0]["fewer_shots"] == rows[0]["n"] == 2 and rows[0]["shortened"] == 0
    assert "2 prompts had fewer shots to fit" in capsys.readouterr().out
    assert all(line["prompt_tokens"] + 350 - 1 <= 512 for line in lines)


def test_of_a_question_without_room_the_end_is_read(models, data_dir):
    _, tokenizer = load_model(str(models[0]), device="cpu")
    task = TASKS["gsm8k"]
    prompts = write_prompts(task, tokenizer, 30, str(data_dir), "plain", 2, 10, 1, 0)
    question, = prompts.questions
    whole = tokenizer.encode_start(task.prompt(question.problem, [], "plain"))
    assert question.ids == whole[-21:] != whole
    assert question.facts["shortened"] and question.facts["fewer_shots"]


@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "arc_easy", "math500"])
def test_no_problem_that_is_scored_is_a_worked_example(name, data_dir):
    task = TASKS[name]
    problems = task.load(data_dir / task.folder)
    scored = task.scored(problems, 3, "plain")
    for problem in scored:
        shots = task.examples(problems, problem, 3, "plain")
        assert len(shots) == 3
        assert not {shot.get("id") for shot in shots} & {one["id"] for one in scored}
        assert all(shot.get("subject") == problem.get("subject") for shot in shots)


def test_shots_of_mmlu_pro_are_its_validation_rows_where_they_are(data_dir, tmp_path):
    for split in ("test", "validation"):
        shutil.copy(data_dir / "mmlu_pro" / "test.jsonl", tmp_path / f"{split}.jsonl")
    task = MMLUPro()
    problems = task.load(tmp_path)
    assert task.note(problems) is None
    assert len(task.scored(problems, 5, "plain")) == ROWS
    shots = task.examples(problems, problems[0], 5, "plain")
    assert [shot["id"] for shot in shots] == [f"mmlu_pro/validation/{70 + i}" for i in range(5)]


# --- letters --------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, count", [("mmlu", 6), ("arc_easy", 4), ("mmlu_pro", 3)])
def test_frozen_letters_are_the_softmax_behind_the_prompt(task, count, models, data_dir, tmp_path):
    lines, rows = run(models, data_dir, tmp_path / "out", task, path=False)
    assert len(lines) == count == rows[0]["n"]
    lm, tokenizer = load_model(str(models[0]), device="cpu")
    problems = TASKS[task].load(data_dir / TASKS[task].folder)
    by_id = {problem["id"]: problem for problem in problems}
    for line in lines:
        problem = by_id[line["id"]]
        shots = TASKS[task].examples(problems, problem, 5, "plain")
        prompt = TASKS[task].prompt(problem, shots, "plain")
        ids = torch.tensor([tokenizer.encode_start(prompt)])
        letters = letter_tokens(TASKS[task].options(problem), tokenizer, "plain")
        p = lm(ids)[0, -1].softmax(-1)[letters]
        assert line["p"] == pytest.approx(p.tolist(), abs=1e-5)
        assert line["output"] == "ABCDEFGHIJ"[int(p.argmax())]
        assert line["strict"] == line["flexible"] == (line["output"] == problem["answer"])


def test_letters_of_a_path_are_a_mean_over_draws(models, data_dir, tmp_path):
    flags = ["--steps=2", "--solvers=euler", "--limit=3"]
    one, _ = run(models, data_dir, tmp_path / "1", "mmlu", *flags, "--draws=1")
    many, rows = run(models, data_dir, tmp_path / "4", "mmlu", *flags, "--draws=4")
    for a, b in zip(one, many):
        assert a["first_letter"] == b["first_letter"]
        assert b["nfe"] == 4 * a["nfe"] and 0 <= b["mass"] <= 1 + 1e-5
    assert rows[1]["first_draw"] <= 1 and 0 < rows[1]["agreement"] <= 1


def test_an_answer_has_its_share_of_a_batch_and_stands_behind_half_of_itself(
        models, data_dir, tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count(0.0).__next__, time=time.time)
    monkeypatch.setattr(evaluation, "time", clock)
    monkeypatch.setattr(evaluation, "flops_per_token", lambda model, nfe, length, settings: length)
    lines, rows = run(models, data_dir, tmp_path / "out", "gsm8k", *GENERATE, "--limit=2",
                      "--batch_size=2")
    assert {line["seconds"] for line in lines} == {0.5}
    for row in rows:
        assert row["flops_per_token"] == round(row["prompt_tokens"] + row["tokens"] / 2)


def test_a_letter_that_is_not_one_token_is_refused():
    class Spelling:
        def encode(self, text):
            return [1] * len(text)
    assert letter_tokens(["A"], Spelling(), "chat") == [1]
    with pytest.raises(ValueError, match="' A' is not one token .* --choices generate"):
        letter_tokens(["A"], Spelling(), "plain")


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B.", "B"), ("(c) it is\nB", "B"), ("**D**", "D"), ("C) because A is not", "C"),
    ("The answer is (B).", "B"), ("the answer is b", "B"),
    ("answer is A. No, the answer is C", "C"),
    ("A dog barks, so the answer is a matter of taste", None), ("DNA is long", None),
    ("I think it is D", "D"), ("not (A), hence (B)", "B"), ("B or C", None), ("", None),
    (r"so $\boxed{C}$", "C"), (r"\boxed{\text{A}}", "A"), ("Answer: D", "D"), ("E", None),
    ("B\nQuestion: the answer is C", "B"), ("The answer is Boron", None), ("A: yes", "A"),
    # a letter alone, in either case and in quotes
    ("d", "D"), ("(d)", "D"), ("d.\nIt is so.", "D"), ('"c"', "C"), ("\u201cB\u201d", "B"),
    ("a dog", None), ('The answer is "b".', "B"), ("7\nso B", "B"), ("d</s>e", "D"),
    (r"$\boxed{\text{b}}$", "B"),
    # a label before a first line
    ("A. Not so fast.\nAnswer: B", "B"), ("Answer: 'c'", "C"), ("A.\nthe answer: (b)", "B"),
    ("Answer: A\nNo. Answer: B", "B"),
    # the options once more
    ("A. 3\nB. 4\nC. 5\nD. 6\n\nD. 6", "D"), ("A) 3\nB) 4\nC) 5\nD) 6\nAnswer: **B**", "B"),
    ("Choices:\n(a) 3\n(b) 4\n(c) 5\n\nI take (B).", "B"), ("A. 3\nB. 4\nC. 5\nD. 6", None),
    ("Question: which?\nA. 3\nB. 4\nAnswer: B", "B"),
    # thoughts
    ("<think>The answer is A.</think>\n\nB", "B"), ("It is A?</think>C", "C"),
    ("<think>the answer is A, or", None), ("B <think>the answer is A</think>", "B"),
    ("<Thinking>the answer is A</Thinking>D", "D"), ("I thought so: A</thought> C", "C"),
])
def test_the_letter_that_an_answer_means(text, letter):
    assert find_letter(text, 4) == letter


CHOICES = [{"label": label, "text": label} for label in "1234"]
PRO = {"question_id": 1, "question": "q", "options": ["a", "b"], "category": "law"}


@pytest.mark.parametrize("name, file, content, words", [
    ("mmlu", "test/a_test.csv", "q,1,2,3,4,0", "row 1 of .*a_test.csv has the answer '0'"),
    ("mmlu", "test/a_test.csv", "q,1,2,3,4,A\nq,1,2,3,4, B", "row 2 of .*allowed: A to D"),
    ("mmlu", "test/a_test.csv", "question,A,B,C,D,answer", "has the answer 'answer'"),
    ("mmlu", "test/a_test.csv", "q" * 140_000 + ",1,2,3,4,A", "a_test.csv is damaged .field larger"),
    ("mmlu_pro", "test.jsonl", {**PRO, "answer": "C"}, "line 1 of .*allowed: A to B"),
    ("mmlu_pro", "test.jsonl", {**PRO, "answer": "A", "options": []}, "has 0 options"),
    ("arc_easy", "ARC-Easy/ARC-Easy-Test.jsonl",
     {"id": "1", "answerKey": "0", "question": {"stem": "q", "choices": CHOICES}},
     "has the answerKey '0', but the labels"),
    ("arc_easy", "ARC-Easy/ARC-Easy-Test.jsonl",
     {"id": "1", "answerKey": "1", "question": {"stem": "q"}}, "has no question of a stem"),
    ("gsm8k", "test.jsonl", {"question": "q", "answer": "4"}, "without a number behind ####"),
    ("gsm8k", "test.jsonl", {"question": "q", "answer": "#### 4", "context": "c"},
     "line 1 of .* has a column 'context', which is not read"),
    ("math500", "test.jsonl", {"problem": "p", "solution": "s", "answer": " "}, "an empty answer"),
])
def test_a_row_that_no_answer_could_agree_with_is_refused(name, file, content, words, tmp_path):
    path = tmp_path / file
    write_jsonl(path, [content])
    if file.endswith(".csv"):
        path.write_text(content)
    with pytest.raises(ValueError, match=f"{words}.*; use the file as published"):
        TASKS[name].load(tmp_path)


def test_two_problems_of_one_id_are_refused(models, tmp_path, capsys):
    for name in ("test", "validation"):
        write_jsonl(tmp_path / "mmlu_pro" / f"{name}.jsonl", [{**PRO, "answer": "A"}] * 2)
    assert run_eval(models[0], tmp_path, tmp_path / "out", "mmlu_pro") == 2
    assert "has 2 problems with the id 'mmlu_pro/test/1'" in capsys.readouterr().err


def test_options_may_be_numbered_and_the_answer_is_their_letter(data_dir):
    assert {one["answer"] for one in TASKS["arc_easy"].load(data_dir / "arc")} == {"B"}


@pytest.mark.parametrize("text", ["d", "(d)", "d.", "D\n", "d</s>", "*d*\nB, perhaps?", "'D'"])
def test_a_fair_reading_is_right_where_the_strict_one_is(text):
    problem = {"options": list("wxyz"), "answer": "D"}
    assert MMLU().grade(problem, text) == {"strict": True, "flexible": True, "letter": "D"}


# --- verdicts -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, strict, flexible", [
    ("#### 18", True, True), ("#### 1,8", True, True), ("#### 18.", True, True),
    ("#### 18.0", False, False), ("so 18", False, True), ("$18.", False, True),
    ("#### 17\n#### 18", False, True), ("#### 18 of 20", True, False), ("", False, False),
    ("#### 18\nQuestion: 3", True, True), ("eighteen", False, False), ("####18", False, True),
    ("so <think>it is 18</think>", False, False), ("18 <think>or 17", False, True),
    ("so\nQuestion: #### 18", False, False),
])
def test_both_rules_of_gsm8k(text, strict, flexible):
    problem = {"answer": "9 * 2 = 18\n#### 18"}
    assert GSM8K().grade(problem, text) == {"strict": strict, "flexible": flexible}


def test_a_vote_takes_the_number_behind_the_sign_but_not_that_of_a_thought():
    assert GSM8K().extract({}, "#### 1,800 of 20") == "1800"
    assert GSM8K().extract({}, "<think>#### 3</think>so 7") == "7"


@pytest.mark.parametrize("name", ["gsm8k", "math500", "mmlu", "mmlu_pro", "mmlu_pro_cot",
                                  "arc_easy", "sums"])
def test_references_are_right_and_grading_is_idempotent(name, data_dir):
    task = TASKS[name]
    for problem in task.load(data_dir / task.folder):
        text = task.reference(problem)
        verdict = task.grade(problem, text)
        assert verdict["flexible"]
        for stop in task.stops["plain"]:
            assert task.grade(problem, text + stop + " 7") == verdict
        # also from a record alone
        assert task.grade(task.restore({**task.short(problem)}), text) == verdict


# --- prompts --------------------------------------------------------------------------------------

def test_texts_and_turns_of_gsm8k():
    shot, problem = {"question": "1+1?", "answer": "#### 2"}, {"question": "2+2?"}
    assert GSM8K().prompt(problem, [shot], "plain") == (
        "Question: 1+1?\nAnswer: #### 2\n\nQuestion: 2+2?\nAnswer:")
    assert [turn["content"] for turn in GSM8K().prompt(problem, [shot], "chat")] == [
        "1+1?", "#### 2", "2+2?"]


def test_texts_of_multiple_choice(data_dir):
    assert MMLU().load(data_dir / "mmlu")[1]["question"] == "the 1, in?"
    problem = {"subject": "the_one", "question": "1?", "options": ["a", "b", "c", "d"],
               "answer": "B", "category": "law"}
    assert MMLU().prompt(problem, [problem], "plain") == (
        "The following are multiple choice questions (with answers) about the one.\n\n"
        "1?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n1?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    assert MMLU().prompt(problem, [], "chat")[0]["content"] == (
        "Question:\n1?\nChoices:\nA. a\nB. b\nC. c\nD. d\n\nAnswer:")
    assert MMLUProSteps().prompt(problem, [], "plain").endswith(
        "\nAnswer: Let's think step by step.")


def test_shots_of_mmlu_pro_without_its_validation_rows_are_not_scored(data_dir):
    task = MMLUPro()
    problems = task.load(data_dir / "mmlu_pro")
    assert "not comparable" in task.note(problems)
    shots = task.examples(problems, problems[0], 5, "chat")
    scored = task.scored(problems, 5, "chat")
    assert len(shots) == 5 and len(scored) == ROWS - 5
    assert not {one["id"] for one in shots} & {one["id"] for one in scored}


def test_style_follows_the_chat_template(models):
    tokenizer = load_tokenizer(models[0])
    assert choose_style(None, tokenizer) == choose_style("plain", tokenizer) == "plain"
    with pytest.raises(ValueError, match="this model has no chat format"):
        choose_style("chat", tokenizer)


# --- search ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("answers, points, place", [
    (["3", "4", "4"], [0.0, -2.0, -1.0], 2),         # the majority, its best
    (["3", "4"], [-1.0, -2.0], 0), (["3", "4"], [-2.0, -1.0], 1),      # ties to the higher score
    ([None, "4", None], [0.0, -9.0, 0.0], 1),        # no answer is no vote
    ([None, None], [-1.0, 0.0], 0), (["3"], [0.0], 0),
])
def test_votes(answers, points, place):
    assert scores.vote(answers, points, str.__eq__) == place


def test_the_likeliest_plausible_answer():
    assert scores.likeliest(["a", "b", "c"], [-3.0, -1.0, -2.0], [True] * 3) == 1
    assert scores.likeliest(["a", "b", "c"], [-3.0, -1.0, -2.0], [True, False, True]) == 2


@pytest.mark.parametrize("text", ["vote", "vote:0", "vote:x", "beam:3", "best:-1", "best:1.5"])
def test_unknown_searches_are_refused(text):
    with pytest.raises(ValueError, match="allowed: vote:K or best:K"):
        scores.parse_search(text)


def test_one_answer_is_no_search_to_the_bit(models, data_dir, tmp_path):
    flags = [*GENERATE, "--temperatures=1", "--limit=4"]
    plain, alone = run(models, data_dir, tmp_path / "a", "gsm8k", *flags)
    lines, rows = run(models, data_dir, tmp_path / "b", "gsm8k", *flags, "--search", "vote:1",
                      "best:1", "vote:3")
    first = [line for line in lines if line["sample"] == 0]
    assert answers(first) == answers(plain) and len(lines) == 3 * len(plain)
    by_search = {(row["column"], row["search"]): row for row in rows}
    for column in ("frozen", "midpoint 2"):
        for how in ("vote:1", "best:1"):
            for key in ("strict", "flexible", "tokens", "nfe_per_token"):
                assert by_search[column, how][key] == by_search[column, ""][key]
        # three answers cost what three answers cost
        total = sum(line["tokens"] for line in lines if line["column"] == column)
        assert by_search[column, "vote:3"]["tokens"] == pytest.approx(total / 4)
        assert by_search[column, "vote:3"]["oracle"]["strict"] >= by_search[column, ""]["strict"]


def test_samples_of_a_problem_have_noises_of_their_own(models, data_dir, tmp_path):
    """Or pass@k, votes and best:K would be of copies."""
    lines, _ = run(models, data_dir, tmp_path / "out", "gsm8k", *GENERATE, "--temperatures=1",
                   "--limit=3", "--search", "vote:3")
    by_problem = {}
    for line in lines:
        by_problem.setdefault((line["column"], line["id"]), set()).add(line["output"])
    assert len(by_problem) == 6
    assert all(len(outputs) == 3 for outputs in by_problem.values())


@pytest.mark.parametrize("steps", [0, 2])
@torch.no_grad()
def test_every_answer_is_scored_by_the_frozen_model(steps, models):
    """Token by token, whatever the text that they spell."""
    model, _ = load_model(str(models[1]), device="cpu")
    prompt = [5, 17, 200, 3]
    settings = Settings(steps=steps, max_new_tokens=5, temperature=1.0)
    answer, = generate(model, [prompt], settings, seeds=[3], watch=Score(model.lm))
    log_p = model.lm(torch.tensor([prompt + answer.ids])).log_softmax(-1)[0, len(prompt) - 1:-1]
    expected = log_p.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    assert answer.log_p == pytest.approx(expected.tolist(), abs=1e-4)
    assert answer.score == pytest.approx(float(expected.mean()), abs=1e-4)


def test_a_search_costs_all_of_its_answers():
    def record(sample, score):
        return {"id": "x", "sample": sample, "output": "#### 2", "score": score, "strict": True,
                "flexible": True, "tokens": 10 + sample, "nfe": 100 * (1 + sample), "cut": False,
                "prompt_tokens": 4, "fewer_shots": False, "shortened": False, "seconds": 1.5}
    column = {"x": [record(0, -2.0), record(1, -1.0), record(2, 0.0)]}
    for how in ("vote", "best"):
        row = scores.searched(GSM8K(), {"x": {"answer": "#### 2"}}, column, how, 2)
        assert (row["tokens"], row["seconds"]) == (21, 3.0)
        assert row["nfe_per_token"] == pytest.approx(300 / 21)


def test_letters_are_chosen_by_the_mean_of_p_and_not_of_its_logarithm():
    # the geometric mean of B is larger
    p = torch.tensor([[0.9, 0.1], [0.01, 0.2]])
    found = scores.read_letters(["A", "B"], p)
    assert found["output"] == "A" and found["p"] == pytest.approx([0.455, 0.15])
    assert found["agreement"] == 0.5 and found["first_letter"] == "A"
    assert found["mass"] == pytest.approx(0.605)


def test_the_score_is_the_mean_log_p_under_the_frozen_model(models, data_dir, tmp_path):
    lines, _ = run(models, data_dir, tmp_path / "out", "gsm8k", *GENERATE, "--limit=2")
    lm, tokenizer = load_model(str(models[0]), device="cpu")
    task = GSM8K()
    problems = task.load(data_dir / "gsm8k")
    for line in lines:
        problem = next(one for one in problems if one["id"] == line["id"])
        shots = task.examples(problems, problem, 1, "plain")
        start = tokenizer.encode_start(task.prompt(problem, shots, "plain"))
        new = tokenizer.encode(line["output"])
        # only texts that are spelled as they were written
        if len(new) != line["tokens"]:
            continue
        log_p = lm(torch.tensor([start + new])).log_softmax(-1)[0, len(start) - 1:-1]
        expected = log_p.gather(1, torch.tensor(new)[:, None]).mean()
        assert line["score"] == pytest.approx(float(expected), abs=1e-4)


# --- code -----------------------------------------------------------------------------------------

def test_code_is_run_and_pass_at_k_comes_with_n(models, data_dir, tmp_path, capsys):
    write_code(data_dir / "humaneval")
    lines, rows = run(models, data_dir, tmp_path / "out", "humaneval", "--shots=0",
                      "--max_new_tokens=2", "--temperatures=1", "--samples=5", "--style=plain",
                      "--allow_code_execution", path=False)
    assert len(lines) == 10 and all(line["result"] in ("passed", "failed") for line in lines)
    found = rows[0]["pass"]
    assert set(found) == {"1", "5"}
    # of any sample, and of at least one in five
    first = sum(line["strict"] for line in lines) / 10
    assert found["1"]["strict"] == pytest.approx(first) and found["5"]["strict"] >= first
    assert "pass@5" in capsys.readouterr().out
    # a command that asks for fewer has its own table, whatever the records hold
    _, rows = run(models, data_dir, tmp_path / "out", "humaneval", "--shots=0",
                  "--max_new_tokens=2", "--temperatures=1", "--samples=2", "--style=plain",
                  "--allow_code_execution", path=False)
    assert set(rows[0]["pass"]) == {"1"}


def test_a_machine_that_fails_the_references_reports_nothing(
        models, data_dir, tmp_path, capsys, monkeypatch):
    write_code(data_dir / "humaneval")
    monkeypatch.setattr(code, "run_all", lambda programs, _: ["passed", "timed out"])
    assert run_eval(models[0], data_dir, tmp_path / "out", "humaneval",
                    "--allow_code_execution") == 2
    err = capsys.readouterr().err
    assert "1 reference solutions of humaneval fail on this machine, first HumanEval/1" in err
    assert not (tmp_path / "out").exists()


# --- graded again ---------------------------------------------------------------------------------

def test_records_graded_again_are_the_same(models, data_dir, tmp_path):
    run(models, data_dir, tmp_path / "out", "gsm8k", *GENERATE)
    source, again = tmp_path / "out" / "records.jsonl", tmp_path / "again.jsonl"
    # without files: a record has all that its grading needs
    words = [f"--regrade={source}", f"--out={again}"]
    assert exit_status(evaluation.main, words) == 0
    assert again.read_bytes() == source.read_bytes()
    # with other verdicts it has another digest
    about, line, *_ = records.read_lines(source)
    write_jsonl(source, [about, {**line, "output": "#### " + line["reference"].split("#### ")[-1]}])
    assert exit_status(evaluation.main, [*words, "--overwrite"]) == 0
    line = records.read_lines(again)[1]
    assert line["strict"] and line["digest"] == records.digest_of(line)


def test_lines_of_another_program_are_graded(data_dir, tmp_path):
    lines = [{"benchmark": "gsm8k", "id": "gsm8k/test/1", "output": "#### 2", "note": "kept"},
             {"benchmark": "math", "id": "math500/3", "output": "it is 3"},
             {"benchmark": "mmlu", "id": "mmlu/test/two/1", "output": "B."},
             {"benchmark": "pass_at_k", "id": "x", "output": {"n": 10, "c": 3, "k": 5}}]
    write_jsonl(tmp_path / "in.jsonl", lines)
    words = [f"--regrade={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}",
             f"--data_dir={data_dir}"]
    assert exit_status(evaluation.main, words) == 0
    found = records.read_lines(tmp_path / "out.jsonl")
    assert found[0] == {**lines[0], "strict": True, "flexible": True}
    assert found[1] == {**lines[1], "strict": False, "flexible": True}
    assert found[2] == {**lines[2], "strict": True, "flexible": True, "letter": "B"}
    assert found[3]["pass_at_k"] == pytest.approx(1 - 21 / 252)


def test_half_a_character_is_graded_and_said_with_its_line(tmp_path, capsys):
    """As tools write that cut a text between the halves of a surrogate pair."""
    lines = [{"benchmark": "gsm8k", "id": f"gsm8k/test/{i}", "output": f"\U0001f600 #### {i}",
              "reference": f"#### {i}"} for i in range(3)]
    lines[1]["output"] = "\ud83d #### 1"
    write_jsonl(tmp_path / "in.jsonl", lines)
    words = [f"--regrade={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}"]
    assert exit_status(evaluation.main, words) == 0
    assert "note: line 2 of " in capsys.readouterr().err
    found = records.read_lines(tmp_path / "out.jsonl")
    assert found == [{**line, "strict": True, "flexible": True} for line in lines]


@pytest.mark.parametrize("line, words", [
    ({"benchmark": "chess", "id": "x", "output": ""}, "benchmark 'chess' is not supported"),
    ({"benchmark": "gsm8k", "id": "gsm8k/test/1"}, "a record of gsm8k has no output"),
    ({"benchmark": "gsm8k", "id": "gsm8k/test/999", "output": ""}, "gsm8k has no problem"),
    ({"benchmark": "mbpp", "id": "mbpp/0", "output": "", "reference": ""}, "no data of mbpp"),
    ({"benchmark": "pass_at_k", "id": "x", "output": {"n": 1}}, "whole numbers n, c and k"),
    ([1], "is no record"),
])
def test_lines_that_cannot_be_graded_are_one_line(line, words, data_dir, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", [line, line])
    flags = [f"--regrade={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}",
             f"--data_dir={data_dir}", "--allow_code_execution"]
    assert exit_status(evaluation.main, flags) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


# --- files ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, message", [
    (["--task=gsm8k", "--data_dir=DIR/none"], "get it with: python -m data.tasks get gsm8k"),
    (["--task=mmlu", "--data_dir=DIR/none"], "unpack https://"),
    (["--task=gsm9k"], "invalid choice"),
    (["--task=gsm8k", "--data_dir=DIR", "--topics", "math"], "--topics would do nothing"),
    (["--task=tiny", "--shots=2"], "--shots would do nothing"),
    (["--task=mmlu", "--data_dir=DIR", "--search", "vote:3"], "--search would do nothing"),
    (["--task=sums", "--choices=letters"], "--choices would do nothing"),
    (["--task=sums", "--data_dir=DIR"], "--data_dir would do nothing"),
    (["--task=tiny", "--class=sort"], "--class would do nothing: it needs --task with a bench"),
    (["--task=sums", "--class=a", "--steps=0"], "--class would do nothing: it needs a diffusion"),
    (["--task=sums", "--guidance", "1", "2"], "--guidance would do nothing: it needs --class"),
    (["--task=sums", "--class=a"], "--class a: this model has no classes; allowed: no --class"),
    (["--task=gsm8k", "--data_dir=DIR", "--limit=0"], "--limit = 0 is out of range"),
    (["--task=humaneval", "--data_dir=DIR"],
     "needs --allow_code_execution; Programs run with limits on time, memory, files, network and "
     "processes: that stops accidents, but not an attacker: for programs you distrust use a cont"),
    (["--task=gsm8k", "--data_dir=DIR", "--max_new_tokens=600"], "leaves no room for a prompt"),
])
def test_bad_input_is_one_line_and_leaves_nothing(
        words, message, models, data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOL2D_CACHE", str(tmp_path / "cache"))
    words = [word.replace("DIR", str(data_dir)) for word in words]
    flags = [f"--init_from={models[0]}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    assert exit_status(evaluation.main, [*flags, *words]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, words", [
    ('{"question": "1"}\n', "line 1 of .* has no answer of the right type"),
    ('{"question": "1", "answer": 3}\n', "line 1 of .* has no answer of the right type"),
    ("[1]\n", "line 1 of .* has no question"), ("{\n", "line 1 of .* is not valid JSON"),
    ('{"question": "\\ud83d", "answer": ""}\n', "line 1 of .* holds half a character"),
])
def test_rows_of_another_form_are_refused(content, words, tmp_path):
    for split in ("test", "train"):
        (tmp_path / f"{split}.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        GSM8K().load(tmp_path)


def test_get_fetches_and_checks_what_was_published(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("NANOL2D_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "fetch_files", lambda some, folder: seen.append((some, folder)))
    assert files.fetch("gsm8k") == tmp_path / "datasets" / "gsm8k"
    (some, folder), = seen
    assert [file.name for file in some] == ["test.jsonl", "train.jsonl"]
    assert all(len(file.etag) == 64 and file.size > 0 for file in some)
    with pytest.raises(ValueError, match="by hand: unpack https://"):
        files.fetch("mmlu")


# --- published verdicts and prompts ---------------------------------------------------------------

@pytest.mark.parametrize("name", ["gsm8k", "math", "mmlu", "mmlu_pro", "humaneval", "mbpp",
                                  "pass_at_k"])
def test_golden_verdicts(name, shared, tmp_path):
    # some of the programs try to change this folder
    canary = Path(tempfile.gettempdir()) / "nanol2d_canary"
    canary.mkdir(exist_ok=True)
    (canary / "file").write_text("alive")
    source = shared / "benchmarks" / "golden" / f"{name}.jsonl"
    words = [f"--regrade={source}", f"--out={tmp_path / 'out.jsonl'}",
             f"--data_dir={shared / 'data' / 'datasets'}", "--allow_code_execution"]
    assert exit_status(evaluation.main, words) == 0
    for line in records.read_lines(tmp_path / "out.jsonl"):
        expected = line["expected"]
        if name == "pass_at_k":
            expected = {"pass_at_k": expected and pytest.approx(expected)}
        if line.get("firm", True):
            assert {key: line[key] for key in expected} == expected, line
    assert [path.name for path in canary.iterdir()] == ["file"]
    assert (canary / "file").read_text() == "alive"


def rendered(prompt) -> str:
    """A plain prompt, or messages in Llama's format."""
    if isinstance(prompt, str):
        return prompt
    # a last turn of the assistant is continued
    begun = prompt.pop()["content"] if prompt[-1]["role"] == "assistant" else ""
    return "".join(piece.text for piece in render_llama3(prompt, True)) + begun


@pytest.mark.parametrize("file, task, number", [
    ("l2d_gsm8k_0", "gsm8k", 0), ("l2d_gsm8k_1", "gsm8k", 1),
    ("lm_eval_minerva_math500_0", "math500", 0), ("lm_eval_minerva_math500_1", "math500", 1),
    ("l2d_mmlu_abstract_algebra_0", "mmlu", "abstract_algebra/0"),
    ("l2d_mmlu_high_school_biology_0", "mmlu", "high_school_biology/0"),
    ("lm_eval_mmlu_abstract_algebra_0", "mmlu", "abstract_algebra/0"),
    ("lm_eval_mmlu_high_school_biology_0", "mmlu", "high_school_biology/0"),
    ("lm_eval_humaneval_0shot_0", "humaneval", 0), ("lm_eval_humaneval_0shot_1", "humaneval", 1),
    ("l2d_instructhumaneval_5", "humaneval", 5), ("l2d_instructhumaneval_6", "humaneval", 6),
    ("lm_eval_mbpp_0", "mbpp", 11), ("lm_eval_mbpp_1", "mbpp", 12),
    ("l2d_mbpp_11", "mbpp", 11), ("l2d_mbpp_12", "mbpp", 12),
])
def test_golden_prompts(file, task, number, shared):
    task = TASKS[task]
    style = "chat" if file.startswith("l2d") else "plain"
    problems = task.load(shared / "data" / "datasets" / task.name)
    scored = task.scored(problems, task.shots[style], style)
    problem = next(one for one in scored if one["id"].endswith(f"/{number}"))
    shots = task.examples(problems, problem, task.shots[style], style)
    text = (shared / "benchmarks" / "prompts" / f"{file}.txt").read_bytes().decode()
    assert rendered(task.prompt(problem, shots, style)) == text


def test_golden_text_of_gsm8k(shared):
    """The harness draws its shots, so they are read from the text."""
    text = (shared / "benchmarks" / "prompts" / "lm_eval_gsm8k_0.txt").read_text()
    problems = GSM8K().load(shared / "data" / "datasets" / "gsm8k")
    by_question = {one["question"]: one for one in problems}
    shots = [by_question[found] for found in re.findall("Question: (.*)\nAnswer: ", text)]
    assert GSM8K().prompt(problems[0], shots, "plain") == text


def test_golden_prompts_of_mmlu_pro(shared):
    """Their shots are test rows; those of the harness have stand-ins for the worked texts."""
    folder = shared / "benchmarks" / "prompts"
    problems = MMLUPro().load(shared / "data" / "datasets" / "mmlu_pro")

    def named(text, question, options):
        return next(one for one in problems if one["question"].strip() == question.strip()
                    and MMLUPro().lines(one) == options)
    questions = re.compile("Question:\n((?:.|\n)*?)\n(?:Options|Choices):\n((?:[A-J]\\. .*\n?)+)")
    for path in sorted(folder.glob("*mmlu_pro*STANDIN*.txt")):
        text = path.read_text()
        found = [named(text, question, re.sub("<.*", "", options).strip("\n"))
                 for question, options in questions.findall(text)]
        worked = "A: Let's think step by step. (STAND-IN reasoning; the real validation rows " \
                 "have a worked text here.) The answer is ({})."
        shots = [{**one, "cot_content": worked.format(one["answer"])} for one in found[:-1]]
        if path.name.startswith("lm_eval"):
            assert MMLUProSteps().prompt(found[-1], shots, "plain") == text
        else:
            assert rendered(MMLUPro().prompt(found[-1], shots, "chat")) == text


# --- the finetune in one command ------------------------------------------------------------------

def test_the_lora_of_the_finetune_has_as_many_parameters_as_its_paths():
    """Of SmolLM2-135M, by shapes alone."""
    config = ModelConfig.from_hf({
        **LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3})

    def trained(words):
        args = train_flags.parse(["--init_from=DIR", "--data=DIR", *words])
        with torch.device("meta"):
            model = LM(config).requires_grad_(False)
            if args.method == "l2d":
                model = L2D(model, L2DConfig(args.width, args.cond_dim, rank=args.rank,
                                             own_kv=args.own_kv, start=args.start))
            else:
                replace_linears(model, torch.nn.Linear,
                                lambda linear: LoRA(linear, args.rank, args.rank))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    lora = trained(finetune.METHODS["lora"])
    for name in ("paper", "frozen"):
        assert trained(finetune.METHODS[name]) == pytest.approx(lora, rel=0.05), name


@pytest.fixture
def commands(monkeypatch) -> list:
    """The commands that a finetune would run; a training leaves a log."""
    commands = []

    def note(*words):
        commands.append([str(word) for word in words])
        out = next((word for word in commands[-1] if word.startswith("--out_dir=")), None)
        if out:
            folder = Path(out.partition("=")[2])
            folder.mkdir()
            entries = [{"update": 0, "val_loss": 2.0, "by_tenth": [2.0] * 10},
                       {"update": 1, "loss": 1.0, "seconds": 3.0},
                       {"update": 1, "val_loss": 1.5, "by_tenth": [1.5] * 10}]
            (folder / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    monkeypatch.setattr(finetune, "run", note)
    monkeypatch.setattr(headline, "run", note)
    return commands


def test_a_finetune_on_arc_is_of_the_options_texts_and_names_the_harness(
        models, data_dir, tmp_path, commands, capsys):
    flags = [f"--init_from={models[0]}", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'o'}",
             "--task=arc_easy", "--methods", "lora"]
    assert exit_status(finetune.main, [*flags, "--limit=3"]) == 2
    assert "--limit would do nothing" in capsys.readouterr().err
    assert exit_status(finetune.main, flags) == 0
    assert [words[0] for words in commands] == ["-m", "train.py"]
    assert "--style=raw" in commands[0]
    rows = [json.loads(line) for line in (tmp_path / "o" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert rows[0] == {"prompt": "Question: the 0?\nAnswer:", "response": " b"}
    assert "data.experiments.harness --tasks arc_easy" in capsys.readouterr().out


def test_a_finetune_trains_and_measures_each_method_once(
        models, data_dir, tmp_path, commands, monkeypatch, capsys):
    flags = [f"--init_from={models[0]}", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'o'}",
             "--updates=3", "--task=gsm8k", "--methods", "frozen", "lora"]
    assert exit_status(finetune.main, flags) == 0
    assert [words[0] for words in commands] == ["-m", "train.py", "train.py", "eval.py", "eval.py"]
    assert "--method=l2d" in commands[1] and "--method=lora" in commands[2]
    text = capsys.readouterr().out
    assert "the same before and after: True" in text
    assert "lora           held-out loss 2.000 -> 1.500, 3 s" in text
    rows = [json.loads(line) for line in (tmp_path / "o" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
    assert rows[0]["messages"][1]["content"] == "0 and 1\n#### 1"
    # a finished method is not trained again
    commands.clear()
    (tmp_path / "o" / "data" / "meta.json").write_text("{}")
    assert exit_status(finetune.main, flags) == 0
    assert [words[0] for words in commands] == ["eval.py", "eval.py"]
    # nor taken for one with other flags or questions
    assert exit_status(finetune.main, [*flags, "--updates=4"]) == 2
    assert "was trained with other flags" in capsys.readouterr().err
    monkeypatch.setattr(finetune, "conversations", lambda *_: "")
    assert exit_status(finetune.main, flags) == 2
    assert "holds results of another task or model, or of other questions" in capsys.readouterr().err
