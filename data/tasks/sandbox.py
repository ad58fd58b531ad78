"""Run untrusted programs, each in its own process with limits.

    run("assert 1 + 1 == 2")        "passed"
    run_all(programs, seconds=3)    the same for many, a few at a time

This side starts the process, waits, and removes all that is left; the limits themselves are in
data/tasks/sandbox_child.py: read that next, then data/tasks/code.py, which makes the programs.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

NOTICE = ("Programs run with limits on time, memory, files, network and processes: that stops "
          "accidents, but not an attacker: for programs you distrust use a container.")
CHILD = Path(__file__).with_name("sandbox_child.py")
START = 1.0             # seconds that Python may need to start, on top of the program's own
LONGEST_REPLY = 1000    # bytes


def run(program: str, seconds: float = 3.0) -> str:
    """"passed", "timed out", or "failed: " and a reason in one line."""
    # An exit code of 0 proves nothing, since a program may exit before its tests. The proof is this
    # password: the child reads it behind the last test and sends it back.
    nonce = secrets.token_hex(16).encode()
    source = program.encode("utf-8", "surrogatepass")

    # a program may leave files that cannot be deleted, which is not its error
    with tempfile.TemporaryDirectory(prefix="nanol2d-run-", ignore_cleanup_errors=True) as folder:
        deadline = time.monotonic() + seconds + START
        child = start(folder, seconds)
        killer = threading.Timer(deadline - time.monotonic(), kill, [child])
        killer.daemon = True
        killer.start()
        try:
            # the child may end before it has read everything
            with contextlib.suppress(OSError), child.stdin:
                child.stdin.write(len(source).to_bytes(8, "big") + source + nonce)
            # until it replies, ends or is killed
            reply = child.stdout.read1(LONGEST_REPLY)
        finally:
            # Also after Ctrl-C. The order matters: after `wait` the number of the process may
            # belong to another, so the killer must have ended by then.
            killer.cancel()
            killer.join()
            kill(child)
            child.wait()
            child.stdout.close()
        late = time.monotonic() >= deadline

    if reply == nonce:
        return "passed"
    if reply:
        return "failed: " + reply.decode("utf-8", "replace")
    # the system may have ended it for its processor time
    if late or (os.name != "nt" and child.returncode == -signal.SIGXCPU):
        return "timed out"
    return f"failed: ended before the last test with exit code {child.returncode}"


def run_all(programs: list, seconds: float = 3.0) -> list:
    """The verdict on each program, in their order."""
    # one processor is left to the rest of the machine: programs that wait for it run out of time
    workers = max(1, (os.cpu_count() or 2) - 1)
    # threads are enough, since all they do is wait for processes
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(partial(run, seconds=seconds), programs))


def start(folder: str, seconds: float):
    """The child, in a process group of its own, which can be killed as one."""
    # No other variables: they may hold passwords. Numerical libraries would reserve memory for a
    # thread on each processor, more than the limit.
    variables = {"TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if os.name == "nt":
        # without it Windows finds no random numbers, and Python does not start
        variables["SYSTEMROOT"] = os.environ.get("SYSTEMROOT", "")
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    else:
        group = {"start_new_session": True}
    return subprocess.Popen(
        # isolated: neither this folder nor the user's own packages can be imported
        [sys.executable, "-I", "-X", "utf8", str(CHILD), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=variables,
        **group,
    )


def kill(child):
    """End the child and all processes that it may have started."""
    if os.name == "nt":
        if child.poll() is None:
            command = ["taskkill", "/F", "/T", "/PID", str(child.pid)]
            subprocess.run(command, capture_output=True)
        return
    # a group whose only process has just ended is an error on some systems
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
