"""The shape of the project itself: which file may import which, and commands that still exist."""

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
from data.flags import train as train_flags

ROOT = Path(sample.__file__).parent
# Every arrow points down: a file may import what stands on a later line, or its own wing.
ORDER = """
experiments
eval
train
sample
diffusion
model
tasks training flags
text
parts
checkpoints results
system tiny
"""
LEVELS = {name: level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}
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


def home(name: str) -> str:
    """The wing of a module below data/, or the script itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "data" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_arrow_points_down(path):
    mine = home(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, line in imports(parse(path)):
        theirs = home(name)
        where = f"{path}:{line} imports {name}"
        if mine == "solvers":
            assert theirs not in LEVELS, where
        elif theirs == "solvers":
            # the scripts alone
            assert LEVELS[mine] < LEVELS["tasks"], where
        elif theirs in LEVELS and theirs != mine:
            assert LEVELS[mine] < LEVELS[theirs], where


def test_the_wings_are_those_of_the_map():
    wings = {path.name for path in (ROOT / "data").iterdir() if list(path.glob("*.py"))}
    assert wings == LEVELS.keys() - {"eval", "train", "sample", "diffusion", "model"}
    assert not list((ROOT / "data").glob("*.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "data").rglob("__init__.py")),
                         ids=lambda path: path.parent.name)
def test_a_wing_says_what_its_files_are_for(path):
    docstring = ast.get_docstring(parse(path))
    for file in path.parent.glob("*.py"):
        assert file.stem.startswith("__") or re.search(rf"\b{file.stem}\b", docstring), file


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


def test_the_equations_of_the_readme_are_lines_of_the_code():
    code = (ROOT / "diffusion.py").read_text(encoding="utf-8").splitlines()
    table = README.split("## The equations")[1].split("\n## ")[0]
    lines = re.findall(r"^\|.*\| `([^`]+)` \|$", table, re.M)
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
