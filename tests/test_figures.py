"""Pictures: as text, and by matplotlib where it is installed."""

import json
import sys

import pytest
from conftest import exit_status

import eval as evaluation
from data.checkpoints.hub import resolve
from data.results import figures
from data.text.answer import Answer, Trace
from data.text.tokenizer import load_tokenizer

COLUMNS = [("frozen", "frozen", 0), ("euler 2", "fixed", 3), ("dopri5", "adaptive", 2)]


def fake_results(path, columns):
    """An eval.json of two trained levels of chains and one that was not trained."""
    records = []
    for level in (1, 2, 3):
        for name, kind, nfe in columns:
            records.append({
                "group": f"chains {level}", "topic": "chains", "level": level, "unseen": level == 3,
                "temperature": 0.0, "column": name, "kind": kind, "settings": {"solver": "euler"},
                "accuracy": 1.0 if nfe >= level else 0.0, "low": 0.0, "high": 0.9999999,
                "nfe_per_token": nfe, "nfe_first": nfe + level,
            })
    path.write_text(json.dumps({"accuracy": records}), encoding="utf-8")
    return records


def fake_page(path, predictions):
    trace = {"first": 0, "tokens": [{"word": "a", "nfe": 2, "predictions": predictions}]}
    data = f'<script type="application/json" id="data">{json.dumps(trace)}</script>'
    path.write_text(f"<p></p>{data}<p></p>", encoding="utf-8")


# --- text -----------------------------------------------------------------------------------------

def test_points_are_counted_and_those_outside_are_at_the_border():
    line = figures.draw_points([-9, 0, 0, 0, 5], low=-5, high=5)
    assert line[0] == "o" and line[40] == "3" and line[80] == "o"
    assert figures.draw_points([0] * 12, -5, 5).strip() == "+"


def test_a_trace_names_the_tokens_it_could_show():
    tokenizer = load_tokenizer(resolve("tiny"))
    traces = [Trace(), Trace(predictions=[(0.5, 65, 0.25)])]
    answer = Answer(ids=tokenizer.encode("ab"), nfe=[3, 4], traces=traces)
    text = figures.trace_text(answer, tokenizer, 1)
    assert "'a':3 'b':4" in text and "t = 0.5000" in text
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        figures.trace_text(answer, tokenizer, 2)


def test_a_terminal_gets_colours_unless_it_refuses_them(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = figures.coloured(["a", "b"], [3, 9])
    assert "\033[48;5;27m" in text and "\033[48;5;196m" in text and "NFE from 3 (blue)" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert figures.coloured(["a", "b"], [3, 9]) == "'a':3 'b':9"


# --- matplotlib -----------------------------------------------------------------------------------

def test_plot_without_matplotlib_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(
        evaluation, "accuracy_table", lambda *_: pytest.fail("the work was done before the check"))
    assert exit_status(evaluation.main, ["--plot"]) == 2
    assert ("--plot needs matplotlib, which is not installed; pip install matplotlib"
            in capsys.readouterr().err)


def test_levels_are_drawn_to_scale_with_a_line_at_the_end_of_training(tmp_path):
    pytest.importorskip("matplotlib")
    columns = [*COLUMNS, ("euler 16", "fixed", 17), ("heun 16", "fixed", 33)]
    records = fake_results(tmp_path / "eval.json", columns)
    for record in records:
        record["settings"] = {"solver": record["column"].split()[0]}
    axis = figures.new_figure(8, 4).subplots()
    figures.draw_levels(axis, records)
    squares = axis.collections[0]
    # of the frozen model and of the first fixed solver
    cells = [(nfe, level) for nfe in (0, 3, 17) for level in (1, 2, 3)]
    assert sorted(map(tuple, squares.get_offsets().tolist())) == cells
    assert sorted(squares.get_array().tolist()) == [0] * 3 + [100] * 6
    assert axis.get_ylabel() == "hops" and axis.lines[0].get_ydata() == [2.5, 2.5]


def test_evaluations_are_drawn_by_level_for_adaptive_solvers_alone(tmp_path):
    pytest.importorskip("matplotlib")
    axis = figures.new_figure(8, 4).subplots()
    figures.draw_nfe(axis, fake_results(tmp_path / "eval.json", COLUMNS))
    line, border = axis.lines
    assert line.get_xydata().tolist() == [[1, 3], [2, 4], [3, 5]]
    assert border.get_xdata() == [2.5, 2.5]


def test_every_kind_of_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    records = fake_results(tmp_path / "path.json", COLUMNS)
    # a word with dollar signs is no formula
    fake_page(tmp_path / "trace.html", [[0.0, "$\\x$", 0.5, "frozen"], [0.5, "b", 0.2, "rejected"],
                                        [0.4, "b", 0.3, "evaluation"], [1.0, "b", 0.9, "final"]])
    for kind, names in {"trace": ["trace.html"], "levels": ["path.json"], "nfe": ["path.json"],
                        "mask": []}.items():
        out = tmp_path / f"{kind}.png"
        files = [str(tmp_path / name) for name in names]
        assert exit_status(figures.main, [kind, *files, f"--out={out}"]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
    # of eval.py --plot; a model without a path has no adaptive solver
    for some in (records, [record for record in records if record["kind"] == "frozen"]):
        figures.plot_accuracy(some, tmp_path / "eval.png")
        assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "eval.png").unlink()
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("words, message", [
    (["nfe", "lora.json"], "no greedy adaptive results on this topic in this file; make them with"),
    (["levels", "path.json", "--topic=math"], "no greedy results on math in this file; allowed: c"),
    (["mask", "path.json"], "mask takes no file, not 1"),
    (["nfe", "path.json", "lora.json"], "nfe takes one file, eval.json (from python eval.py)"),
    (["levels"], "levels takes one file, eval.json (from python eval.py), not 0"),
    ([], "picture '' is not supported; allowed: levels, nfe, trace, log, tenths, mask"),
    (["log"], "log takes one file, log.jsonl (from python train.py), not 0"),
    (["trace", "old.html"], "old.html has an unexpected form; make it with: python sample.py"),
    (["trace", "path.json"], "path.json has an unexpected form; make it with: python sample.py"),
    (["levels", "empty.json"], "empty.json has an unexpected form; make it with: python eval.py"),
    (["levels", "half.json"], "half.json has an unexpected form; make it with: python eval.py"),
])
def test_a_picture_of_something_else_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    fake_results(tmp_path / "path.json", COLUMNS)
    fake_results(tmp_path / "lora.json", COLUMNS[:1])
    fake_page(tmp_path / "old.html", [[0.0, 3, 0.5, True]])
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "half.json").write_text('{"accuracy": [{"topic": "chains", "temperature": 0}]}')
    assert exit_status(figures.main, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.glob("*.png"))


def test_the_picture_of_a_training_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "log.jsonl"
    lines = [{"args": {}}, {"update": 0, "val_loss": 2.0},
             {"update": 1, "val_loss": 2.0, "by_tenth": [2.0, None, *range(8)]},
             *({"update": n, "loss": 2 / n, "lr": 0.1} for n in range(1, 30))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind in ("log", "tenths"):
        assert exit_status(figures.main, [kind, str(path)]) == 0
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    # an update that was repeated after a resume counts once
    assert figures.points([*lines, {"update": 3, "loss": 9.0}], "loss")[1][2] == 9.0
    for content in ("", "[1]\n", "{\n", '{"update": 1}\n', '{"update": 1, "loss": "x"}\n'):
        path.write_text(content)
        assert exit_status(figures.main, ["log", str(path), "--overwrite"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
