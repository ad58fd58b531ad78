"""Files as they are in the world: written whole or not at all, read without trust, used by one run.

A file appears by write, fsync, rename: whoever reads sees the old one or the new one, also after a
power cut. What is read may be anything: damaged, of another program, marked by a Windows editor.
Everything here says in one line what is wrong and what to do. data/checkpoints/ builds on this.
"""

import codecs
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if os.name == "nt":
    import msvcrt
else:
    import fcntl

PART = ".part"          # behind the name of a file that is not whole yet
# What editors put before a text; the longer ones first, since one begins like another.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# --- written whole --------------------------------------------------------------------------------

@contextmanager
def appearing(path: str | Path):
    """Yield a place to write to: what stands there at the end becomes `path`, or nothing does."""
    # through a link, which stays one
    path = Path(os.path.realpath(path))
    # a device or a pipe has no old content to keep
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    # a folder, so that a library's own temporary files are swept away with it
    folder = Path(f"{path}{PART}")
    remove(folder)
    folder.mkdir()
    try:
        part = folder / path.name
        yield part
        # some libraries write for their owner alone: what the umask allows is what a folder got
        os.chmod(part, folder.stat().st_mode & 0o666)
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    finally:
        remove(folder)


def flush(path: Path):
    """Have the disk keep a file, or a folder's names, before anything else happens."""
    # Windows keeps the names by itself, and opens no folder
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path):
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(directory: Path):
    """Remove what killed runs left unfinished."""
    for path in directory.glob(f"*{PART}"):
        remove(path)


def write_json(content: dict, path: str | Path):
    text = json.dumps(content, indent=1) + "\n"
    with appearing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_safetensors(tensors: dict, path: str | Path, metadata: dict | None = None):
    """Raises OSError with one line where they cannot be written."""
    try:
        with appearing(path) as part:
            save_file(tensors, part, metadata)
    except SafetensorError as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(f"cannot write {path} ({error}); it needs {size:,} bytes: "
                      "make room or choose another directory") from None


def check_writable(path: str | Path):
    """Raise OSError where no file can be written: better now than after the work."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; allowed: the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no directory, so {path.name} cannot be written "
                                "there; make it first")
    try:
        # to ask for permissions is not enough: a disk may be mounted for reading only
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {path.parent} ({error.strerror}); "
                      "choose another place") from None


def check_absent(path: str | Path, overwrite: bool):
    """Raise ValueError for a file of an earlier run, unless it may go."""
    if Path(path).is_file() and not overwrite:
        raise ValueError(f"{path} is there already, from an earlier run; "
                         "allowed: another name, or --overwrite")


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Where downloads are kept: as asked, else NANOL2D_CACHE, else ~/.cache/nanol2d."""
    root = cache_dir or os.environ.get("NANOL2D_CACHE") or "~/.cache/nanol2d"
    return Path(root).expanduser()


# --- read without trust ---------------------------------------------------------------------------

def present(path: Path) -> bool:
    """Is this file there? Raises ValueError for a link to nothing: a file was meant to be."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to nothing; copy or download the file itself")
    return path.exists()


def decode(content: bytes, where) -> str:
    """Text in UTF-8, or in what its first bytes announce. Raises ValueError for anything else."""
    coding = next((coding for mark, coding in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(coding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8 ({error.reason} at byte {error.start}); "
                         "save it as UTF-8") from None


def parse_json(content: bytes | str, where):
    """Any JSON. Raises ValueError with one line."""
    try:
        return json.loads(content if isinstance(content, str) else decode(content, where))
    # brackets nested deeper than Python can follow are damage too
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); "
                         "copy or download it again") from None


def read_json(path: str | Path) -> dict:
    """Parse a JSON object. Raises ValueError with one line for a missing or damaged file."""
    try:
        content = parse_json(Path(path).read_bytes(), path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; copy or download it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; copy or download it again")
    return content


def open_safetensors(path: Path):
    """The file, mapped into memory. Raises ValueError where it is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); "
                         "download it again") from None


# --- used by one run at a time --------------------------------------------------------------------

@contextmanager
def held(directory: Path):
    """Keep a directory for this process. Raises ValueError while another one has it."""
    with open(directory / "lock", "a", encoding="utf-8") as handle:
        # closing the file releases the lock, also when the process dies
        if not try_lock(handle):
            raise ValueError(f"another process is writing to {directory}; "
                             "wait for it, or choose another --out_dir")
        yield


@contextmanager
def claimed(directory: Path):
    """Make a directory, if it is new, and keep it; it goes again if nothing was written to it."""
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with held(directory):
            sweep(directory)
            yield
    finally:
        if new and [path.name for path in directory.iterdir()] == ["lock"]:
            remove(directory)


def try_lock(handle) -> bool:
    """Lock an open file, if no other process has."""
    try:
        if os.name == "nt":
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # some network disks have no locks: one process at a time is then up to the user
        pass
    return True
