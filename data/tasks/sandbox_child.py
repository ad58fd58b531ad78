"""The process that runs one strange program and says whether it came to its end.

data/tasks/sandbox.py starts this file, each program its own process, and reads the one line it
says; read that first. Nothing else imports or starts it.

The order in `main` is the point: first it takes what it needs, then it locks itself in, then it
runs the program. A lock that the program could open with its own key would be none.
"""

import math
import os
import signal
import sys
from pathlib import PurePath

# Imported though not used: at its own import it loads a library, which the guard forbids. Without
# this line nobody could import it later, and neither numpy, which needs it.
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

MEMORY = 2**30          # bytes of address space; macOS takes no notice
LONGEST_FILE = 16 * 2**20
LONGEST_PATH = 500      # characters: folders nested deeper are hard to delete again
LONGEST_REASON = 300

# Events that Python announces to an audit hook, by how they begin: never allowed.
REFUSED = (
    "socket.", "subprocess.", "ctypes.", "winreg.", "syslog.",
    "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "pty.", "signal.pthread_kill", "_winapi.CreateProcess", "_winapi.OpenProcess",
    # the superuser could raise limits again
    "resource.setrlimit", "resource.prlimit",
)
# Events that change files: which arguments are paths, and where each may be relative to (or None).
CHANGES = {
    "open": [(0, None)],
    "os.chdir": [(0, None)],
    "os.chflags": [(0, None)],
    "os.chmod": [(0, 2)],
    "os.chown": [(0, 3)],
    # what a link leads to is as good as the link, so both ends have to be inside
    "os.link": [(0, 2), (1, 3)],
    "os.mkdir": [(0, 2)],
    "os.remove": [(0, 1)],
    "os.removexattr": [(0, None)],
    "os.rename": [(0, 2), (1, 3)],
    "os.rmdir": [(0, 1)],
    "os.setxattr": [(0, None)],
    "os.symlink": [(0, None), (1, 2)],
    "os.truncate": [(0, None)],
    "os.utime": [(0, 3)],
    "shutil.rmtree": [(0, None)],
    "sqlite3.connect": [(0, None)],
}
# A number instead of a path is a file that was opened before, and checked then.
NUMBERS_ALLOWED = ("open", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Modules that change files or shared memory in C and announce nothing.
SILENT = ("_dbm", "_gdbm", "_posixshmem")


# --- what is taken first --------------------------------------------------------------------------

def private_pipes() -> tuple:
    """(where the parent writes, where it reads), moved away from standard input and output."""
    source = os.dup(0)
    verdict = os.dup(1)
    # the program reads an end of file, and may print as much as it likes: no pipe gets full
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return source, verdict


def read(source: int, size: int) -> bytes:
    """Exactly so many bytes: what stands behind them stays in the pipe."""
    content = b""
    while len(content) < size:
        part = os.read(source, size - len(content))
        if not part:
            # the parent has gone
            os._exit(1)
        content += part
    return content


# --- what locks it in -----------------------------------------------------------------------------

def limit(kind: int, most: int):
    """Lower a limit of the system, which may already be lower."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    try:
        resource.setrlimit(kind, (most, most))
    except (OSError, ValueError):
        # macOS knows some limits by name only; the time limit of the parent holds in any case
        pass


def limit_resources(seconds: float):
    if resource is None:
        return
    # both a little later than the parent acts: they matter where it has died
    last = math.ceil(seconds) + 2
    signal.alarm(last)
    limit(resource.RLIMIT_CPU, last)
    limit(resource.RLIMIT_AS, MEMORY)
    limit(resource.RLIMIT_FSIZE, LONGEST_FILE)
    limit(resource.RLIMIT_CORE, 0)


def refuse(*_, what: str = "this", **__):
    # an OSError, so that a program that can live without goes on
    raise PermissionError(f"{what} is not allowed here")


def lock_silent_doors():
    """Take away the few things that an audit hook would not notice."""
    for name in SILENT:
        # to import it now raises ImportError, for which the standard library is prepared
        sys.modules[name] = None
    if resource is None:
        return
    # multiprocessing starts processes with this
    _posixsubprocess.fork_exec = refuse
    for module in (os, posix):
        module.mkfifo = refuse
        module.mknod = refuse


def only_reads(mode, flags) -> bool:
    """Of a file that is opened: two ways to say it, either may be missing."""
    writing = set(mode or "") & set("wax+")
    return not writing and not (flags or 0) & WRITING


def directory_of(number) -> str:
    """The folder that a relative path starts from: the current one, or an open one."""
    if number is None or number < 0:
        return os.getcwd()
    if sys.platform == "darwin":
        content = fcntl.fcntl(number, fcntl.F_GETPATH, bytes(1024))
        return os.fsdecode(content.rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{number}")


def is_inside(folder: str, path, directory) -> bool:
    """Whether a path, all links followed, leads to the folder or below."""
    path = os.fsdecode(path)
    if path == os.devnull:
        return True
    # sqlite reads this as an address
    if path.startswith("file:"):
        return False
    real = os.path.realpath(os.path.join(directory_of(directory), path))
    real = os.path.normcase(real)
    short = len(real) < len(folder) + LONGEST_PATH
    return short and PurePath(real).is_relative_to(folder)


def make_guard(folder: str):
    """An audit hook that lets a program change nothing outside the folder.

    It sees each event whatever name it was called by, and Python has no way to take it off again.
    """
    def guard(event, args):
        if event.startswith(REFUSED):
            refuse(what=event)
        if event == "open" and only_reads(*args[1:3]):
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
    """Why a program does not come to its end, in one line; "" if it does."""
    try:
        # Nothing of this file among its globals, not even a name: as in the published graders, a
        # part behind `if __name__ == "__main__"` does not run.
        exec(compile(program, "program", "exec"), {})
    # all of them, also SystemExit: whoever leaves before the end has not passed
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        return " ".join(reason.split())[:LONGEST_REASON].rstrip(": ")
    return ""


def main():
    seconds = float(sys.argv.pop())
    source, verdict = private_pipes()
    size = int.from_bytes(read(source, 8), "big")
    program = read(source, size).decode("utf-8", "surrogatepass")

    limit_resources(seconds)
    lock_silent_doors()
    folder = os.path.normcase(os.path.realpath(os.getcwd()))
    sys.addaudithook(make_guard(folder))

    answer = failure(program).encode("utf-8", "replace")
    if not answer:
        # Only now is the password read: while the program ran, it stood in no variable.
        answer = read(source, 32)
    os.write(verdict, answer)
    # not sys.exit, which would wait for threads that the program has left running
    os._exit(0)


if __name__ == "__main__":
    main()
