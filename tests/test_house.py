"""The shape of the project itself: which file may import which, and commands that still exist.

python -m pytest tests/test_house.py
"""

import ast
import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

import eval as eval_script
import sample
from data import train_flags

ROOT = Path(sample.__file__).parent
# Every arrow points down: a file may import those after it. solvers.py stands alone.
ORDER = ["harness", "eval", "train", "sample", "diffusion", "model", "data"]
SOURCES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "data").rglob("*.py"))
PARSERS = {"train.py": train_flags, "sample.py": sample, "eval.py": eval_script}


def imports(tree) -> list:
    """(name, line) of every module imported anywhere below a node."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            found.append((node.module, node.lineno))
            # `from data import log` names a file too
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def parse(path: Path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_arrow_points_down(path):
    mine = path.relative_to(ROOT).with_suffix("").parts[0]
    # commands above all others: nobody imports them
    if path.stem == "harness" or path.parent.name == "experiments":
        mine = "harness"
    for name, line in imports(parse(path)):
        theirs = name.split(".")[0]
        if mine == "solvers":
            assert theirs not in ORDER, f"{path}:{line}"
        elif theirs == "solvers":
            assert mine != "data", f"{path}:{line}"
        elif theirs in ORDER and theirs != mine:
            assert ORDER.index(mine) < ORDER.index(theirs), f"{path}:{line} imports {name}"


def test_no_two_files_of_data_import_each_other():
    """Following the arrows from any file never leads back to it."""
    arrows = {}
    for path in (ROOT / "data").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        arrows[name.removesuffix(".__init__")] = {theirs for theirs, _ in imports(parse(path))}

    def reach(name, seen):
        for theirs in arrows.get(name, ()):
            if theirs in arrows and theirs not in seen:
                seen.add(theirs)
                reach(theirs, seen)
        return seen

    circles = [name for name in arrows if name in reach(name, set())]
    assert not circles


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_inside_a_function_but_matplotlib(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = {name.split(".")[0] for name, _ in imports(node)}
            assert names <= {"matplotlib"}, f"{path}: {node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_at_most_500_lines_of_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 500
    assert max(map(len, lines), default=0) <= 100


# --- the pages ------------------------------------------------------------------------------------

PAGES = [ROOT / name for name in (
    "README.md", "CONTRIBUTING.md", "data/README.md", "data/RESULTS.md", "data/tiny/README.md")]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS[PAGES[0]]
LINE = re.compile(r"^(?:python|torchrun --nproc_per_node=\d+) (?!-c).+$", re.M)
COMMANDS = sorted({command for text in TEXTS.values() for command in LINE.findall(text)})


def test_the_pages_have_commands():
    """Or the test below would have nothing to check."""
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_pages_exist(command):
    words = shlex.split(command.removeprefix("torchrun"), comments=True)[1:]
    if words[0] == "-m":
        module = ROOT / words[1].replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
        return
    assert (ROOT / words[0]).exists()
    if words[0] in PARSERS:
        # an unknown flag or a value that is not allowed would end here
        PARSERS[words[0]].build_parser().parse_args(words[1:])


def test_the_pages_are_short_enough_to_be_read():
    assert len(README.splitlines()) <= 220
    assert len(TEXTS[ROOT / "CONTRIBUTING.md"].splitlines()) <= 40


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_line_counts_and_links_are_true(path):
    text = TEXTS[path]
    for name, link, lines in re.findall(r"^\| \[([^]]+)\]\(([^)]+)\) \| (\d+) \|", text, re.M):
        found = (path.parent / link).read_text(encoding="utf-8").splitlines()
        assert len(found) == int(lines), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (path.parent / link).exists(), link


def test_every_file_stands_in_a_table():
    """A reader who wonders what a file is for finds one line about it."""
    tables = README + TEXTS[ROOT / "data" / "README.md"]
    for path in SOURCES + sorted((ROOT / "tests").glob("*.py")):
        name = str(path.relative_to(ROOT).as_posix())
        assert path.stem.startswith("__") or f"| [{name}](" in tables, name


def test_the_equations_of_the_readme_are_lines_of_the_code():
    code = (ROOT / "diffusion.py").read_text(encoding="utf-8").splitlines()
    lines = re.findall(r"^\|.*\| `([^`]+)` \|$", README[:README.index("## Two commands")], re.M)
    assert len(lines) == 6
    for line in lines:
        # its shapes may stand behind it
        assert any(code_line.strip().startswith(line) for code_line in code), line


CHAPTERS = re.findall(r"^\| \[.*\| `python ([^`]+)` \| `([^`]+)`", README, re.M)


@pytest.mark.parametrize("command, seen", CHAPTERS)
def test_a_chapter_run_alone_shows_what_the_readme_and_its_docstring_say(command, seen):
    assert len(CHAPTERS) >= 4
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True,
                          text=True, encoding="utf-8", check=True)
    assert seen in done.stdout
    name = command.removeprefix("-m ").removesuffix(".py").replace(".", "/")
    docstring = ast.get_docstring(parse(ROOT / f"{name}.py"))
    # below the command, as far in as it is
    _, _, after = docstring.partition(f"    python {command}\n")
    promised = list(takewhile(str.strip, after.splitlines()))
    assert promised
    for line in promised:
        assert line.removeprefix("    ").strip() in done.stdout, line
