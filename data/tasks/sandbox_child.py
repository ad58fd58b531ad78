"""The process that runs one untrusted program and reports whether it reaches its end.

data/tasks/sandbox.py starts this file, a process for each program, and reads the one line of its
reply; read that first. Nothing else imports or starts it.

The order in `main` matters: it reads its input first, then gives up its rights, and only then runs
the program, which cannot get them back by the functions of Python.

What it does not keep from a program that looks for a way out: reading any file; making a second
copy of a built-in module by _imp, whose functions are not the ones taken away here; changing its
memory by a damaged object; files that a library written in C opens by itself, such as ATTACH of
SQLite or a lock of multiprocessing in shared memory. On Windows, where a pair of sockets is made
over the network, asyncio is refused too.
"""

import contextlib
import math
import os
import signal
import sys
from pathlib import PurePath

# Sockets within the machine, which asyncio makes a pair of.
try:
    from _socket import AF_UNIX as LOCAL
except ImportError:
    LOCAL = None
# Imported though not used: ctypes loads a library when it is imported, which the guard refuses.
# Without this line the program could import neither ctypes nor numpy, which needs it.
try:
    import ctypes  # noqa: F401
except ImportError:
    ctypes = None

# These exist on some systems only.
try:
    import fcntl
    import resource

    import _posixsubprocess
    import posix
except ImportError:
    resource = None

MEMORY = 2**30          # bytes of address space; macOS ignores it
LONGEST_FILE = 16 * 2**20
LONGEST_PATH = 500      # characters: folders nested deeper are hard to delete again
LONGEST_REASON = 300

# Audit events that are always refused, by their prefix; sockets: see make_guard.
REFUSED = (
    "socket.", "subprocess.", "ctypes.", "winreg.", "syslog.",
    "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "pty.", "signal.pthread_kill", "_winapi.CreateProcess", "_winapi.OpenProcess",
    # the superuser could raise limits again
    "resource.setrlimit", "resource.prlimit",
    # writing through a link changes its target; no problem needs links, owners or attributes
    "os.link", "os.symlink", "os.chflags", "os.chown", "os.removexattr", "os.setxattr",
)
# Audit events that change files: (the argument that is a path, the one that holds the folder it is
# relative to, or None).
CHANGES = {
    "open": [(0, None)],
    "os.chdir": [(0, None)],
    "os.chmod": [(0, 2)],
    "os.mkdir": [(0, 2)],
    "os.remove": [(0, 1)],
    "os.rename": [(0, 2), (1, 3)],
    "os.rmdir": [(0, 1)],
    "os.truncate": [(0, None)],
    "os.utime": [(0, 3)],
    "sqlite3.connect": [(0, None)],
}
# Events whose path may be a number: a file that was checked when it was opened.
NUMBERS_ALLOWED = ("open", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Modules that change files or shared memory in C without an audit event, or start a program or an
# interpreter, in which this guard would not be.
SILENT = ("_dbm", "_gdbm", "_posixshmem", "readline", "_tkinter", "_interpreters",
          "_xxsubinterpreters", "_testcapi", "_testinternalcapi")
# Modules without some of their functions, see below: a second import would bring these back.
REDUCED = ("posix", "_posixsubprocess")


# --- before the program ---------------------------------------------------------------------------

def read(source: int, size: int) -> bytes:
    """Exactly `size` bytes: all behind them stays in the pipe."""
    content = b""
    while len(content) < size:
        part = os.read(source, size - len(content))
        if not part:
            # the parent has ended
            os._exit(1)
        content += part
    return content


def limit_resources(seconds: float):
    """Limit time, memory and files by the system, where it can."""
    if resource is None:
        return
    # both a little later than the parent acts: they matter if it has ended
    last = math.ceil(seconds) + 2
    signal.alarm(last)
    for kind, most in ((resource.RLIMIT_CPU, last), (resource.RLIMIT_AS, MEMORY),
                       (resource.RLIMIT_FSIZE, LONGEST_FILE), (resource.RLIMIT_CORE, 0)):
        # the present limit may be lower, and cannot be raised
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        # macOS refuses some limits; the time limit of the parent holds in any case
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))


# --- refusals -------------------------------------------------------------------------------------

def refuse(*_, what: str = "this", **__):
    # an OSError, so that a program that handles it continues
    raise PermissionError(f"{what} is not allowed here")


def remove_silent_functions():
    """Take away the few functions that cause no audit event."""
    if resource is None:
        return
    # multiprocessing starts processes with this
    _posixsubprocess.fork_exec = refuse
    # Python lists what it was before
    os.supports_dir_fd -= {os.mkfifo, os.mknod}
    for module in (os, posix):
        for name in ("mkfifo", "mknod", "pidfd_open"):
            setattr(module, name, refuse)


def is_inside(folder: str, path, directory) -> bool:
    """Does a path, all links followed, lead to the folder or below?

    directory   number of the open folder that the path is relative to; None or -1: the current one
    """
    path = os.fsdecode(path)
    if path == os.devnull:
        return True
    # sqlite reads this as an address
    if path.startswith("file:"):
        return False
    if directory is None or directory < 0:
        start = os.getcwd()
    elif sys.platform == "darwin":
        start = os.fsdecode(fcntl.fcntl(directory, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    else:
        start = os.readlink(f"/proc/self/fd/{directory}")
    real = os.path.normcase(os.path.realpath(os.path.join(start, path)))
    return len(real) < len(folder) + LONGEST_PATH and PurePath(real).is_relative_to(folder)


def make_guard(folder: str):
    """An audit hook that lets a program change nothing outside the folder.

    It sees every event, by whichever name a function is called, and Python cannot remove it.
    """
    def guard(event, args):
        # a pair of sockets within the process, as asyncio needs it, reaches nothing: connect,
        # bind and send to an address are events of their own
        pair = event == "socket.__new__" and args[1] == LOCAL
        if event.startswith(REFUSED) and not pair:
            refuse(what=event)
        if event == "import" and args[0] in SILENT + REDUCED:
            # which the standard library handles
            raise ImportError(f"{args[0]} is not available here")
        if event == "open":
            # opened for reading alone: of mode and flags one may be missing
            path, mode, flags = args
            reads = not set(mode or "") & set("wax+") and not (flags or 0) & WRITING
            # os.open, which has no mode, does not say which open folder its path is relative to:
            # no folder outside may be opened, and no path may lead upwards
            if mode is None and not isinstance(path, int):
                path = os.fsdecode(path)
                if not os.path.isabs(path) and os.pardir in PurePath(path).parts:
                    refuse(what="os.open upwards")
                reads = reads and not os.path.isdir(path)
            if reads:
                return
        for position, start in CHANGES.get(event, ()):
            path = args[position]
            if isinstance(path, int):
                allowed = event in NUMBERS_ALLOWED
            else:
                directory = None if start is None else args[start]
                allowed = is_inside(folder, path, directory)
            if not allowed:
                refuse(what=f"{event} outside the folder")

    return guard


# --- the run --------------------------------------------------------------------------------------

def failure(program: str) -> str:
    """Why a program does not reach its end, in one line; "" if it does."""
    try:
        # No globals of this file, not even a name: as in the published graders, a part behind
        # `if __name__ == "__main__"` does not run.
        exec(compile(program, "program", "exec"), {})
    # SystemExit too: a program that exits before its end has not passed
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        return " ".join(reason.split())[:LONGEST_REASON].rstrip(": ")
    return ""


def main():
    seconds = float(sys.argv.pop())
    # The pipes from and to the parent move away from standard input and output: the program reads
    # an end of file, and may print as much as it likes, since no pipe gets full.
    source = os.dup(0)
    verdict = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    size = int.from_bytes(read(source, 8), "big")
    program = read(source, size).decode("utf-8", "surrogatepass")

    limit_resources(seconds)
    remove_silent_functions()
    folder = os.path.normcase(os.path.realpath(os.getcwd()))
    sys.addaudithook(make_guard(folder))

    answer = failure(program).encode("utf-8", "replace")
    if not answer:
        # The password is read only now: while the program ran, it was in no variable.
        answer = read(source, 32)
    os.write(verdict, answer)
    # not sys.exit, which would wait for threads of the program
    os._exit(0)


if __name__ == "__main__":
    main()
