"""Files that appear whole, files that are checked when read, and directories of one run.

A file appears by write, fsync, rename: a reader sees the old one or the new one, also after a power
cut. A file to be read may be damaged, of another program, or marked by a Windows editor. Every
error is one line that says what is wrong and how to repair it.
"""

import codecs
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if os.name == "nt":
    import msvcrt
else:
    import fcntl

PART = ".part"          # after the name of an incomplete file
# Byte order marks; the longer ones first, since UTF-32's begins with UTF-16's.
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
    """Yield a path to write to; without an error, the file there becomes `path` at the end."""
    # a link stays one: the file behind it is replaced
    path = Path(os.path.realpath(path))
    check_regular(path)
    # a folder, so that a library's own temporary files are removed with it
    folder = Path(f"{path}{PART}")
    sweep(folder)
    folder.mkdir()
    try:
        with naming(path):
            part = folder / path.name
            yield part
            # some libraries write for the owner alone
            os.chmod(part, folder.stat().st_mode & 0o666)
            flush(part)
            os.replace(part, path)
            flush(path.parent)
    finally:
        remove(folder)


@contextmanager
def naming(path: str | Path):
    """Around writing: an error of the system names the file, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or isinstance(error, BrokenPipeError):
            raise
        raise OSError(f"cannot write {path} ({error.strerror or error}); "
                      "make room, or choose another place") from None


def sweep(folder: Path):
    """Remove the folder of a killed `appearing`; one with other files in it is the user's own."""
    if folder.is_symlink() or not folder.is_dir():
        return
    name = folder.name.removesuffix(PART)
    # .tmp: a temporary file of safetensors
    if all(path.is_file() and (path.name == name or path.name.startswith(".tmp"))
           for path in folder.iterdir()):
        remove(folder)


def flush(path: Path):
    """Write a file, or the names in a folder, from the system's cache to the disk."""
    # Windows writes the names by itself, and opens no folder
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path):
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(content: dict, path: str | Path):
    text = json.dumps(content, indent=1) + "\n"
    with appearing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_safetensors(tensors: dict, path: str | Path, metadata: dict | None = None):
    """Raises OSError if the file cannot be written."""
    try:
        with appearing(path) as part:
            save_file(tensors, part, metadata)
    except SafetensorError as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(f"cannot write {path} ({error}); it needs {size:,} bytes: "
                      "make room or choose another directory") from None


def check_writable(path: str | Path):
    """Raise OSError or ValueError, before the work, if a file cannot be written there."""
    path = Path(os.path.realpath(path))
    check_regular(path)
    if path.is_dir():
        raise OSError(f"{path} is a directory; allowed: the name of a file")
    if not path.parent.is_dir():
        raise OSError(f"{path.parent} is no directory, so {path.name} cannot be written there; "
                      "make it first")
    try:
        # permissions do not tell: a disk may be mounted read-only
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {path.parent} ({error.strerror}); "
                      "choose another place") from None


def check_absent(path: str | Path, overwrite: bool):
    """Raise ValueError for a file of an earlier run, unless it may be overwritten; for a pipe."""
    check_regular(path)
    if Path(path).is_file() and not overwrite:
        raise ValueError(f"{path} is there already, from an earlier run; "
                         "allowed: another name, or --overwrite")


@contextmanager
def claimed_file(path: str | Path, overwrite: bool):
    """Hold a file that this process writes later; the lock beside it is removed again.

    Raises OSError or ValueError, before the work, where it cannot be written, is of an earlier run
    and may not be overwritten, or is held by another process.
    """
    check_writable(path)
    real = Path(os.path.realpath(path))
    lock = real.with_name(f".{real.name}.lock")
    with locked(lock, path, "--out") as handle:
        # its last holder may have removed it since
        if not lock.exists() or not os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
            raise ValueError(f"another process has just written {path}; choose another --out")
        try:
            check_absent(path, overwrite)
            yield
        finally:
            # Windows removes no open file
            with suppress(OSError):
                lock.unlink()


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Directory of downloads: `cache_dir`, else NANOL2D_CACHE, else ~/.cache/nanol2d."""
    root = cache_dir or os.environ.get("NANOL2D_CACHE") or "~/.cache/nanol2d"
    return Path(root).expanduser()


# --- checked when read ----------------------------------------------------------------------------

def present(path: Path) -> bool:
    """Does this file exist? Raises ValueError for a link to nothing, since one was intended.

    And for a pipe or a device.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to nothing; copy or download the file itself")
    check_regular(path)
    return path.exists()


def check_regular(path: str | Path):
    """Raise ValueError for a pipe or a device, at which reading or writing might never end."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device; allowed: a file")


def read_bytes(path: str | Path) -> bytes:
    check_regular(path)
    return Path(path).read_bytes()


def sha256_of(path: Path) -> str:
    """The digest of a file's content, however large it is."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 16):
            digest.update(block)
    return digest.hexdigest()


def decode(content: bytes, where) -> str:
    """Text in UTF-8, or in the encoding of its byte order mark. Raises ValueError for others."""
    coding = next((coding for mark, coding in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(coding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8 ({error.reason} at byte {error.start}); "
                         "save it as UTF-8") from None


def parse_json(content: bytes | str, where):
    """Any JSON value. Raises ValueError that names the file `where`."""
    text = content if isinstance(content, str) else decode(content, where)
    try:
        return json.loads(text)
    # RecursionError: too many nested brackets
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); "
                         "copy or download it again") from None


def whole_characters(value) -> bool:
    """Has every text in a JSON value a form in UTF-8? Half a surrogate pair has none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: str | Path) -> dict:
    """Parse a JSON object. Raises ValueError for a missing or damaged file."""
    try:
        content = parse_json(read_bytes(path), path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; copy or download it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; copy or download it again")
    return content


def open_safetensors(path: Path):
    """The file, mapped into memory. Raises ValueError for a damaged or missing one."""
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); "
                         "download it again") from None


# --- directories of one run -----------------------------------------------------------------------

@contextmanager
def claimed(directory: Path, flag: str = "--out_dir"):
    """Hold a directory for this process; a new one is removed again if nothing was written to it.

    flag  that names the directory
    Raises ValueError while another process holds it.
    """
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with locked(directory / "lock", directory, flag):
            # of killed runs
            for path in directory.glob(f"*{PART}"):
                sweep(path)
            yield
    finally:
        if new and [path.name for path in directory.iterdir()] == ["lock"]:
            remove(directory)


@contextmanager
def locked(lock: Path, target: str | Path, flag: str):
    """Hold a lock, a file; target: what it protects, the value of `flag`."""
    check_regular(lock)
    with open(lock, "a", encoding="utf-8") as handle:
        if not try_lock(handle):
            raise ValueError(f"another process is writing to {target}; "
                             f"wait for it, or choose another {flag}")
        yield handle


def try_lock(handle) -> bool:
    """Lock an open file until it is closed or the process dies; False if another has locked it."""
    try:
        if os.name == "nt":
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # some network disks have no locks: there the user is responsible
        pass
    return True
