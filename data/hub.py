"""Fetch a model's files from the Hugging Face hub, with nothing but the standard library.

A model is a folder that holds config.json, the tokenizer's files and weights in safetensors. A HEAD request per file tells its
size, its checksum and the commit; then the files are downloaded from that one commit, checked, and kept in a cache. Weights
that are only there as pickle are refused, since loading a pickle can run any code. Read next: model.py, which loads the folder.

    python -m data.hub gpt2          # downloads 0.5 GB on the first call, prints the folder on every call
"""
import argparse
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import sleep, time
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

MODELS: dict[str, str] = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
}
OPTIONAL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
MARKER = "complete.json"  # written last: a folder without it is not whole

TIMEOUT = 30  # seconds without a byte after which a server counts as stalled
RETRIES = 5  # failures in a row, each without a new byte
BACKOFF = 1.0  # seconds before the first retry, doubled before each further one
LONGEST_WAIT = 300  # seconds; a server that asks for more is not waited for
CHUNK = 1 << 20  # bytes


class HubError(OSError):
    """A download that cannot succeed; the message is one line that names the remedy."""


class _Temporary(Exception):
    """A failure that may pass: `_retry` tries again, after `wait` seconds if the server stated a time."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class RemoteFile(NamedTuple):
    name: str
    url: str
    commit: str
    size: int  # bytes
    etag: str  # 64 hex digits: sha256 of the content; 40: git's sha1 of it

    @property
    def part(self):
        # With the checksum in its name, half a file of one version is never continued with another's second half.
        return f"{self.name}.{self.etag[:16]}.part"


# --- from a name to a folder ----------------------------------------------------------------------

def resolve(name_or_dir: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return the folder of a model: a directory as it is, "tiny" (comes with this repository), or a name in MODELS (fetched).

    Raises ValueError for another name, FileNotFoundError when data/tiny is gone, and what `fetch_model` raises.
    """
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name))
    if name and folder.is_dir():
        return folder
    if name == "tiny":
        tiny = Path(__file__).resolve().parent / "tiny"
        if not tiny.is_dir():
            raise FileNotFoundError(f"{tiny} is missing although it belongs to this repository: run git checkout data/tiny")
        return tiny
    if name in MODELS:
        return fetch_model(MODELS[name], cache_dir)
    raise ValueError(f"unknown model {name!r}: give an existing directory, tiny, or one of {', '.join(MODELS)}")


def fetch_model(repo: str, cache_dir: str | Path | None = None, revision: str = "main") -> Path:
    """Return the folder with all files of a hub model, after downloading what is missing; a whole folder needs no network.

    repo: "owner/name" on the hub.  revision: branch, tag or commit; a branch is not followed after its first download.
    cache_dir: defaults to the environment variable NANOL2D_CACHE, then to ~/.cache/nanol2d.
    HF_TOKEN holds the access token for gated models, HF_ENDPOINT another address of the hub (a mirror).
    Raises ValueError for a malformed argument, HubError (an OSError) when the model cannot be had.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII):
        raise ValueError(f"malformed repo {repo!r}: expected owner/name, such as openai-community/gpt2")
    if not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII):
        raise ValueError(f"malformed revision {revision!r}: expected a branch, a tag or a commit, such as main")
    root = Path(cache_dir or os.environ.get("NANOL2D_CACHE") or "~/.cache/nanol2d").expanduser()
    folder = root / repo / revision.replace("/", "--")
    if _is_complete(folder):
        return folder
    files = _plan(repo, revision)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock")):
            if not _is_complete(folder):  # another process may have fetched it while this one waited
                _download(files, folder)
    except HubError:
        raise
    except OSError as error:  # of the network only HubError is left at this point, so it is the disk
        raise HubError(_disk_line(folder, error.strerror, sum(file.size for file in files))) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: what arrived is kept in {folder}, the same command resumes from there") from None
    return folder


def _is_complete(folder):
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))["sizes"]
        return all(_size(folder / name) == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _disk_line(folder, problem, needed):
    return (f"cannot download to {folder}: {problem}; {needed:,} bytes are needed there: "
            "make room, or choose another place with --cache_dir or the environment variable NANOL2D_CACHE")


@contextmanager
def _lock(path):
    """Hold `path` as a lock: the processes of one run ask for the same model, and two must not write one file."""
    with open(path, "a", encoding="utf-8") as handle:
        if not _try_lock(handle):
            tqdm.write(f"waiting for another process that downloads to {path.parent}", file=sys.stderr)
            while not _try_lock(handle):
                sleep(1)
        yield  # closing the file releases the lock, also when the process dies


def _try_lock(handle):
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # some network disks have no locks: one process at a time is then up to the user
    return True


# --- which files there are ------------------------------------------------------------------------

def _plan(repo, revision):
    """Return the RemoteFiles of a model, all of one commit, config.json last: without it no loader takes the folder."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise ValueError(f"malformed HF_ENDPOINT {endpoint!r}: expected https://host")
    root = f"{endpoint}/{repo}/resolve/"
    config = _look(root + quote(revision, safe="") + "/config.json")
    if config is None:
        raise HubError(f"no config.json in {endpoint}/{repo} at revision {revision}: check both names there")
    # The branch may move while we download, its commit cannot.
    base = root + config.commit + "/"
    found = [file for file in map(_look, (base + name for name in OPTIONAL)) if file]
    names = {file.name for file in found}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise HubError(f"no tokenizer in {endpoint}/{repo}: neither tokenizer.json nor vocab.json with merges.txt is there")
    return found + _plan_weights(base) + [config._replace(url=base + "config.json")]


def _plan_weights(base):
    page = base.split("/resolve/")[0]
    if whole := _look(base + "model.safetensors"):
        return [whole]
    if index := _look(base + "model.safetensors.index.json"):
        shards = [(name, _look(base + name)) for name in _shard_names(index)]
        if absent := [name for name, shard in shards if shard is None]:
            raise HubError(f"{absent[0]}, which {index.name} names, is not in {page}: the model is incomplete on the hub")
        return [index] + [shard for _, shard in shards]
    if _look(base + "pytorch_model.bin") or _look(base + "pytorch_model.bin.index.json"):
        raise HubError(f"{page} has its weights only as pytorch_model.bin, a pickle, which can run code when loaded: refused; "
                       "choose a model with safetensors, or convert it yourself and use --init_from=<directory>")
    raise HubError(f"no model.safetensors in {page}: choose a model with safetensors")


def _shard_names(index):
    """Read the shards' names from the index; each must be a plain file name, or it could point out of the cache."""
    def read():
        with _open(index.url) as answer:
            content = b"".join(_body(answer, index.size))
        if _checksum([content], index) != index.etag:
            raise _Temporary(f"{index.name} arrived damaged")
        return content

    try:
        names = sorted(set(json.loads(_retry(read))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HubError(f"{index.url} is not an index of shards: expected JSON with a weight_map") from None
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(name), re.ASCII):
            raise HubError(f"{index.url} names the shard {name!r}: refused, expected a plain file name that ends in .safetensors")
    return names


def _look(url):
    """Return the RemoteFile at `url`, or None where the hub has no such file."""
    with _retry(lambda: _open(url, method="HEAD", accept=(404,))) as answer:
        headers, status = answer.headers, answer.status
    if status == 404:
        return None
    # A large file lies elsewhere: then X-Linked-* describe the file, and the plain headers only the redirect to it.
    size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    commit = headers.get("X-Repo-Commit") or ""
    if not (size.isdigit() and re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", etag) and re.fullmatch("[0-9a-f]{40}", commit)):
        raise HubError(f"{url} comes without size, checksum or commit: HF_ENDPOINT must be the hub or a full mirror of it")
    return RemoteFile(url.rpartition("/")[2], url, commit, int(size), etag)


# --- download -------------------------------------------------------------------------------------

def _download(files, folder):
    """Bring `files` into `folder`, keeping what is already there and right, then declare the folder whole."""
    # Whatever an older attempt left of another commit goes, and config.json always, so that half a model cannot be loaded.
    keep = {name for file in files for name in (file.name, file.part)} - {"config.json"}
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()
    missing = [file for file in files if not _matches(folder / file.name, file)]
    needed = sum(file.size - _size(folder / file.part) for file in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(_disk_line(folder, f"only {free:,} bytes are free", needed))
    total = sum(file.size for file in files)
    done = total - sum(file.size for file in missing)
    with tqdm(total=total, initial=done, unit="B", unit_scale=True) as bar:
        for file in missing:
            bar.set_description(file.name)
            _fetch_file(file, folder, bar)
    marker = {"commit": files[0].commit, "sizes": {file.name: file.size for file in files}}
    (folder / "marker.part").write_text(json.dumps(marker, indent=1), encoding="utf-8")
    os.replace(folder / "marker.part", folder / MARKER)


def _fetch_file(file, folder, bar):
    """Download one file under its .part name, resuming what is there; only checked bytes get the real name."""
    part, start = folder / file.part, bar.n

    def attempt():
        bar.update(start + _size(part) - bar.n)
        if _size(part) < file.size or not part.exists():
            _receive(file, part, bar)
        if not _matches(part, file):
            part.unlink()
            raise _Temporary(f"{file.name} arrived damaged: its checksum is not the one that the hub states")

    _retry(attempt, progress=lambda: _size(part))
    os.replace(part, folder / file.name)


def _receive(file, part, bar):
    have = _size(part)
    with _open(file.url, start=have, accept=(416,)) as answer:
        if answer.status == 416:
            part.unlink()
            raise _Temporary(f"{file.name} cannot be resumed from byte {have:,}, so it starts over")
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:  # a server without ranges sends the whole file again
            bar.update(-have)
            have = 0
        with open(part, "ab" if resumed else "wb", buffering=CHUNK) as out:
            for block in _body(answer, file.size - have):
                out.write(block)
                bar.update(len(block))
    if _size(part) < file.size:
        raise _Temporary(f"the connection closed after {_size(part):,} of the {file.size:,} bytes of {file.name}")


def _matches(path, file):
    if not path.is_file() or _size(path) != file.size:
        return False
    with open(path, "rb") as stream:
        return _checksum(iter(lambda: stream.read(CHUNK), b""), file) == file.etag


def _checksum(blocks, file):
    # Git names a small file by the sha1 of a header and the content, a large one (LFS) by the sha256 of the content alone.
    digest = hashlib.sha256() if len(file.etag) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


# --- HTTP -----------------------------------------------------------------------------------------

class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None  # `_open` follows redirects itself: urllib's own way would hand the token to the other host


def _open(url, method="GET", start=0, accept=()):
    """Return the open answer of `url` from byte `start` on; a status in `accept` is an answer too, any other is raised.

    A HEAD ends at the hub's redirect to another host, because the facts about the file are in that redirect's headers.
    """
    opener, token, here = build_opener(_NoRedirect), _token(), url
    headers = {"User-Agent": "nanoL2D"} | ({"Range": f"bytes={start}-"} if start else {})
    for _ in range(10):
        request = Request(here, headers=headers, method=method)
        if token and _origin(here) == _origin(url):
            request.add_header("Authorization", f"Bearer {token}")
        try:
            return opener.open(request, timeout=TIMEOUT)
        except HTTPError as answer:
            if answer.code in accept:
                return answer
            if answer.code not in (301, 302, 303, 307, 308):
                with answer:
                    raise _failure(answer, url, here) from None
            target = urljoin(here, answer.headers.get("Location", ""))
            if method == "HEAD" and _origin(target) != _origin(url):
                return answer
            answer.close()
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(error, here) from None
        if not target.startswith(("https://", "http://")):
            break
        here = target
    raise HubError(f"{url} redirects without end or to no web address: check HF_ENDPOINT")


def _origin(url):
    return urlsplit(url)[:2]  # scheme and host with port


def _token():
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise ValueError("HF_TOKEN contains a character that no token has: copy it again from the hub's settings")
    return token


def _body(answer, limit):
    """Yield at most `limit` bytes in blocks; a lost connection is raised as such, never to be taken for a full disk."""
    while limit > 0:
        try:
            block = answer.read1(min(CHUNK, limit))
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(error, answer.url) from None
        if not block:
            return
        limit -= len(block)
        yield block


def _unreachable(error, url):
    host, reason = urlsplit(url).netloc, getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return HubError(f"the certificate of {host} cannot be verified ({reason.verify_message}): point the environment variable "
                        "SSL_CERT_FILE to your system's certificates")
    return _Temporary(f"could not reach {host} ({reason})")


def _failure(answer, url, here):
    """Turn an HTTP error into one line; `url` is what we asked for, `here` where its redirects led."""
    code, page, host = answer.code, url.split("/resolve/")[0], urlsplit(here).netloc
    if code == 429 or code >= 500:
        return _Temporary(f"{host} answered HTTP {code}", _stated_wait(answer))
    if code not in (401, 403) or _origin(here) != _origin(url):  # another host knows nothing of licences and tokens
        return HubError(f"{host} answered HTTP {code} ({answer.reason}) for {url}: check the name and HF_ENDPOINT")
    settings = "{}://{}/settings/tokens".format(*_origin(url))
    if _token():
        return HubError(f"HF_TOKEN was refused for {page} (HTTP {code}): accept the licence on that page with the token's own "
                        f"account, and check at {settings} that the token is valid and may read gated models")
    return HubError(f"{page} is gated, private or does not exist (HTTP {code}): accept its licence on that page, "
                    f"then set HF_TOKEN to a token from {settings}")


def _stated_wait(answer):
    """Seconds that a busy server asks for: Retry-After, a number or a date, or what the hub writes into RateLimit."""
    text = answer.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    with suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    reset = re.search(r";\s*t=(\d+)", answer.headers.get("RateLimit", ""))
    return float(reset[1]) if reset and answer.code == 429 else None


def _retry(action, progress=lambda: 0):
    """Return action(); after a temporary failure wait and try again, up to RETRIES times in a row without progress (bytes)."""
    failures, best = 0, progress()
    while True:
        try:
            return action()
        except _Temporary as failure:
            reached = progress()
            # Only bytes beyond the best so far count, or a file that always arrives damaged would be fetched for ever.
            failures, best = (1, reached) if reached > best else (failures + 1, best)
            wait = BACKOFF * 2 ** (failures - 1) if failure.wait is None else failure.wait
            if failures > RETRIES or wait > LONGEST_WAIT:
                advice = f"wait {wait:.0f} s" if wait > LONGEST_WAIT else f"given up after {RETRIES} retries"
                raise HubError(f"{failure}: {advice}; the same command resumes, and --init_from=<directory> works offline") from None
            tqdm.write(f"{failure}: trying again in {wait:.0f} s ({failures} of {RETRIES})", file=sys.stderr)
            sleep(wait)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Download a model from the Hugging Face hub and print its folder.")
    parser.add_argument("model", help="short name: " + ", ".join(MODELS))
    parser.add_argument("--cache_dir", help="where models are kept (default: NANOL2D_CACHE, then ~/.cache/nanol2d)")
    args = parser.parse_args(argv)
    try:
        print(resolve(args.model, args.cache_dir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
