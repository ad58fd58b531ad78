"""Untrusted programs: what they may do, what is refused, and that nothing of them is left."""

import os
import select
import subprocess
import sys
import tempfile
import threading
from types import SimpleNamespace

import pytest

from data.tasks import sandbox, sandbox_child
from data.tasks.sandbox import run, run_all

POSIX = os.name == "posix"
SHORT = 0.5     # seconds, for programs that never end


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """A temporary directory of our own, to see what is left in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def canary(temp):
    """A folder beside the sandbox with one file that no program may change."""
    folder = temp / "canary"
    folder.mkdir()
    (folder / "file").write_text("alive")
    os.chmod(folder / "file", 0o640)
    yield folder
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "alive"
    if POSIX:
        assert (folder / "file").stat().st_mode & 0o777 == 0o640


# --- right programs -------------------------------------------------------------------------------

RIGHT = {
    "nothing": "",
    "tests": "def f(x):\n    return x + 1\nassert f(1) == 2\n",
    "modules": "import random, hashlib, re, uuid, logging, doctest, asyncio, typing",
    "coroutines": "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x\n"
                  "async def g():\n    return await asyncio.gather(f(1), asyncio.to_thread(int))\n"
                  "assert asyncio.run(g()) == [1, 0]",
    "debugger": "import pdb\npdb.Pdb()",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)",
    "numpy": "import numpy\nassert numpy.linalg.inv(numpy.eye(9)).sum() == 9",
    "threads": "import threading as t\na = t.Thread(target=int)\na.start()\na.join()",
    "parallel imports": "import multiprocessing.pool, multiprocessing.managers, asyncio",
    "null device": "import os\nopen(os.devnull, 'w').write('x')",
    "database": "import sqlite3\nsqlite3.connect(':memory:').execute('create table t (x)')",
    "reading": "import sys\nopen(sys.executable, 'rb').read(10)",
    "end of input": "import sys\nassert sys.stdin.read() == ''",
    "flood": "import sys\nprint('x' * 10**7)\nprint('x' * 10**7, file=sys.stderr)",
    "catches": "try:\n    import socket\n    socket.socket()\nexcept Exception:\n    pass",
    "no main part": "if __name__ == '__main__':\n    assert False",
    "long": "x = 1\n" * 50_000,
    "not only letters": "assert '\N{SNOWMAN}' == chr(0x2603)",
    "no arguments": "import sys\nassert len(sys.argv) == 1",
}


@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT)
def test_right_programs_pass(program):
    assert run(program) == "passed"


def test_a_program_may_change_its_own_folder(temp):
    program = """
import os, pathlib, shutil, tempfile
os.makedirs("a/b/c")
pathlib.Path("a/b/x").write_text("1")
os.rename("a/b/x", "a/y")
os.chdir("a")
assert os.listdir(".") == ["b", "y"] or os.listdir(".") == ["y", "b"]
os.chdir("..")
shutil.rmtree("a")
with tempfile.TemporaryDirectory() as folder:
    open(folder + "/x", "w").write("1")
os.mkdir("left")
open("left/x", "w").write("1")
os.chmod("left", 0)
"""
    assert run(program) == "passed"
    assert list(temp.iterdir()) == []


@pytest.mark.skipif(not POSIX, reason="Windows opens no folder")
def test_a_program_may_write_by_its_own_open_folder():
    program = """
import os, shutil
os.makedirs("a/b")
a = os.open("a", os.O_RDONLY)
b = os.open("b", os.O_RDONLY, dir_fd=a)
os.close(os.open("x", os.O_WRONLY | os.O_CREAT, dir_fd=b))
assert [files for *_, files, _ in os.fwalk("a")] == [[], ["x"]]
shutil.rmtree("a")
"""
    assert run(program) == "passed"


def test_a_thread_left_running_is_not_waited_for(temp):
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()"
    # waiting for it would time out
    assert run(program) == "passed"
    assert list(temp.iterdir()) == []


# --- wrong programs, and tricks -------------------------------------------------------------------

WRONG = {
    "assert": ("assert 1 == 2", "AssertionError"),
    "syntax": ("return x +", "SyntaxError"),
    "input": ("input()", "EOFError"),
    "zero byte": ("x = '\0'", ""),
    "half a character": ("x = '\ud800'", ""),
    "own error, many lines": ("raise ValueError('a\\nb')", "ValueError: a b"),
    "error that cannot be shown": ("class E(Exception):\n    __str__ = None\nraise E", ""),
    "exit": ("import sys\nsys.exit(0)", "SystemExit"),
    "hard exit": ("import os\nos._exit(0)", "exit code 0"),
    "base exception": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "exit from a thread": (
        "import os, threading, time\n"
        "threading.Thread(target=os._exit, args=[0]).start()\ntime.sleep(9)", "exit code 0"),
    "abort": ("import os\nos.abort()", "exit code"),
    "closes every file": ("import os\nos.closerange(0, 100)", ""),
    "guesses the password": (
        "import os\nfor n in range(3, 9):\n"
        "    try:\n        os.write(n, b'f' * 32)\n    except OSError:\n        pass", ""),
    "deep": ("def f():\n    f()\nf()", "RecursionError"),
    "our files": ("import data", "ModuleNotFoundError"),
}


@pytest.mark.parametrize("program, reason", WRONG.values(), ids=WRONG)
def test_wrong_programs_fail_and_say_why(program, reason):
    verdict = run(program)
    assert verdict.startswith("failed: ")
    assert reason in verdict
    assert "\n" not in verdict and len(verdict) < 500


@pytest.mark.parametrize("program", [
    "while True:\n    pass",
    "import time\ntime.sleep(60)",
    "while True:\n    try:\n        while True:\n            pass\n"
    "    except BaseException:\n        pass",
], ids=["loop", "sleep", "swallows everything"])
def test_endless_programs_time_out(program, temp):
    assert run(program, SHORT) == "timed out"
    assert list(temp.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to this limit")
@pytest.mark.parametrize("program", ["x = [0] * 10**10", "x = b'0'\nwhile True:\n    x += x"])
def test_memory_has_a_limit(program):
    assert run(program) == "failed: MemoryError"


@pytest.mark.skipif(not POSIX, reason="Windows has no such limit")
def test_files_have_a_limit():
    assert run("open('x', 'wb').write(b'0' * 10**8)").startswith("failed: OSError")


def test_folders_cannot_be_nested_so_deep_that_they_stay(temp):
    program = "import os\nwhile True:\n    os.mkdir('d' * 50)\n    os.chdir('d' * 50)"
    assert "outside" in run(program)
    assert list(temp.iterdir()) == []


# --- what is refused ------------------------------------------------------------------------------

REFUSED = {
    "socket": "import socket\nsocket.socket()",
    "connection": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)",
    "name": "import socket\nsocket.gethostbyname('localhost')",
    "subprocess": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
    "system": "import os\nos.system('exit')",
    "popen": "import os\nos.popen('exit')",
    "kill": "import os\nos.kill(os.getppid(), 9)",
    "library": "import ctypes\nctypes.CDLL(None)",
    "library of python": "import ctypes\nctypes.pythonapi.Py_GetVersion",
}
REFUSED_ON_POSIX = {
    "fork": "import os\nos.fork()",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "other name": "import posix\nposix.system('exit')",
    "group": "import os\nos.killpg(0, 9)",
    "processes": "import multiprocessing as m\nm.get_context('fork').Process(target=int).start()",
    "silent start": "import _posixsubprocess\n_posixsubprocess.fork_exec()",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "started again": "import sys\ndel sys.modules['_posixsubprocess']\nimport _posixsubprocess",
    "interpreter": "import sys\nsys.modules.pop('_xxsubinterpreters', 0)\n"
                   "sys.modules.pop('_interpreters', 0)\n"
                   "try:\n    import _interpreters as i\n"
                   "except ImportError:\n    import _xxsubinterpreters as i\ni.create()",
    "interpreter for tests": "import _testcapi\n_testcapi.run_in_subinterp('')",
    "tcl": "import tkinter\ntkinter.Tcl().eval('exec true')",
    "signal to a process": "import os\nos.pidfd_open(os.getppid())",
    "address of a local socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('x')",
    "shared memory": "from multiprocessing import shared_memory",
}


if POSIX:
    REFUSED.update(REFUSED_ON_POSIX)


@pytest.mark.parametrize("program", REFUSED.values(), ids=REFUSED)
def test_network_and_processes_are_refused(program):
    verdict = run(program)
    assert verdict.startswith(("failed: PermissionError", "failed: ImportError",
                               "failed: ModuleNotFoundError"))


OUTSIDE = {
    "write": "open(FILE, 'w')",
    "append": "open(FILE, 'a')",
    "update": "open(FILE, 'r+')",
    "new": "open(FOLDER + '/new', 'x')",
    "bytes": "open(os.fsencode(FILE), 'w')",
    "beside": "open('../canary/file', 'w')",
    "descriptor": "os.open(FILE, os.O_WRONLY)",
    "truncate": "os.truncate(FILE, 0)",
    "remove": "os.remove(FILE)",
    "tree": "shutil.rmtree(FOLDER)",
    "rename": "os.rename(FILE, 'mine')",
    "replace": "open('mine', 'w').close()\nos.replace('mine', FILE)",
    "mode": "os.chmod(FILE, 0)",
    "time": "os.utime(FILE)",
    "folder": "os.mkdir(FOLDER + '/new')",
    "go there": "os.chdir(FOLDER)",
    "link": "os.symlink(FOLDER, 'mine')\nopen('mine/file', 'w')",
    "hard link": "os.link(FILE, 'mine')\nopen('mine', 'w')",
    "database": "sqlite3.connect(FOLDER + '/new')",
    "address of a database": "sqlite3.connect(f'file:{FOLDER}/new', uri=True)",
}
OUTSIDE_ON_POSIX = {
    "open folder": "os.remove('file', dir_fd=os.open(FOLDER, os.O_RDONLY))",
    "file in an open folder":
        "os.open('new', os.O_CREAT | os.O_WRONLY, dir_fd=os.open(FOLDER, os.O_RDONLY))",
    "above an open folder": "top = os.open('.', os.O_RDONLY)\nos.mkdir('a')\nos.chdir('a')\n"
                            "os.open('../canary', os.O_RDONLY, dir_fd=top)",
    "listed function": "next((f for f in os.supports_dir_fd if f.__name__ == 'mkfifo'), os.mkfifo)"
                       "(FOLDER + '/new')",
    "mode of an open file": "os.fchmod(os.open(FILE, os.O_RDONLY), 0)",
    "go to an open folder": "os.fchdir(os.open(FOLDER, os.O_RDONLY))",
    "pipe": "os.mkfifo(FOLDER + '/new')",
}
HEAD = """import os, shutil, sqlite3
FOLDER = {folder!r}
FILE = os.path.join(FOLDER, "file")
assert os.path.exists(FILE)
"""


if POSIX:
    OUTSIDE.update(OUTSIDE_ON_POSIX)


@pytest.mark.parametrize("line", OUTSIDE.values(), ids=OUTSIDE)
def test_nothing_is_changed_outside(line, canary):
    # Windows needs a privilege to make a link: refused as well
    verdict = run(HEAD.format(folder=str(canary)) + line)
    assert verdict.startswith(("failed: PermissionError", "failed: OSError"))


def test_a_refusal_that_is_caught_has_still_refused(canary):
    program = HEAD.format(folder=str(canary)) + (
        "try:\n    os.remove(FILE)\nexcept OSError:\n    pass\n")
    assert run(program) == "passed"


# --- our side -------------------------------------------------------------------------------------

def test_no_variables_of_ours_reach_the_program(monkeypatch):
    monkeypatch.setenv("SECRET_PASSWORD", "x")
    assert run("import os\nassert 'SECRET_PASSWORD' not in os.environ") == "passed"


def test_nothing_of_the_child_is_among_the_globals():
    assert run("assert list(globals()) == ['__builtins__']") == "passed"


def test_many_programs_keep_their_order_and_processors(monkeypatch):
    most = max(1, (os.cpu_count() or 2) - 1)
    running = []
    seen = []
    lock = threading.Lock()

    def watched(program, seconds):
        with lock:
            running.append(program)
            seen.append(len(running))
        verdict = run(program, seconds)
        with lock:
            running.remove(program)
        return verdict

    monkeypatch.setattr(sandbox, "run", watched)
    programs = [f"assert {number} % 3" for number in range(7)]
    verdicts = run_all(programs, seconds=3)
    assert [verdict == "passed" for verdict in verdicts] == [bool(n % 3) for n in range(7)]
    assert max(seen) <= most
    assert run_all([]) == []


def test_ctrl_c_ends_the_child_and_removes_its_folder(temp, monkeypatch):
    children = []
    start = sandbox.start

    def interrupt(size):
        raise KeyboardInterrupt

    def interrupted(folder, seconds):
        child = start(folder, seconds)
        child.stdout.close()
        # Ctrl-C while its output is read
        child.stdout = SimpleNamespace(read1=interrupt, close=lambda: None)
        children.append(child)
        return child

    monkeypatch.setattr(sandbox, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("import time\ntime.sleep(60)")
    # it has been waited for, so it is gone
    assert children[0].returncode is not None
    assert list(temp.iterdir()) == []


@pytest.mark.skipif(not POSIX, reason="process groups of POSIX")
def test_what_a_process_has_started_ends_with_it():
    """Should a program start one all the same: the guard refuses it first."""
    program = ("import subprocess, sys, time\n"
               "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
               "print('started', flush=True)\ntime.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                             start_new_session=True)
    assert child.stdout.readline() == b"started\n"
    sandbox.kill(child)
    child.wait()
    # the other one has the pipe too, which ends only when both have ended
    ended, _, _ = select.select([child.stdout], [], [], 30)
    assert ended
    child.stdout.close()


@pytest.mark.skipif(not POSIX, reason="limits of POSIX")
@pytest.mark.parametrize("hard, seconds, expected", [(3, 1000, 3), (100, 10, 12)])
def test_a_limit_never_goes_above_the_present_one(hard, seconds, expected, monkeypatch):
    found = {}
    resource = sandbox_child.resource
    monkeypatch.setattr(sandbox_child.signal, "alarm", lambda seconds: None)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", found.__setitem__)
    sandbox_child.limit_resources(seconds)
    assert found[resource.RLIMIT_CPU] == (expected, expected)
    assert found[resource.RLIMIT_AS] == (hard, hard)
