"""Fetch a model's files from the Hugging Face hub, with nothing but the standard library.

A model is a directory with config.json, the tokenizer's files and weights in safetensors. A HEAD
request per file returns its size, its checksum and the commit; then the files are downloaded from
that one commit, checked, and stored in a cache. Read next: model.py, which loads the directory.

    python -m data.checkpoints.hub gpt2      # 0.5 GB on the first call; prints the directory
"""

import argparse
import errno
import hashlib
import os
import re
import shutil
import ssl
import sys
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from data.system.command import command
from data.system.disk import cache_root, flush, read_json, try_lock, write_json

REPOS = """
openai-community/gpt2 openai-community/gpt2-medium
openai-community/gpt2-large openai-community/gpt2-xl
meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct
meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct
meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct
Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-0.5B-Instruct Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-1.5B-Instruct
Qwen/Qwen2.5-3B Qwen/Qwen2.5-3B-Instruct Qwen/Qwen2.5-7B Qwen/Qwen2.5-7B-Instruct
HuggingFaceTB/SmolLM2-135M HuggingFaceTB/SmolLM2-135M-Instruct
HuggingFaceTB/SmolLM2-360M HuggingFaceTB/SmolLM2-360M-Instruct
HuggingFaceTB/SmolLM2-1.7B HuggingFaceTB/SmolLM2-1.7B-Instruct
""".split()
# A short name is the name on the hub in lower case, without its owner: llama-3.2-1b.
MODELS = {repo.partition("/")[2].lower(): repo for repo in REPOS}
REPO = r"\w[\w.-]*/\w[\w.-]*"        # owner/name
# No model has all of these; those that exist may be needed.
OPTIONAL = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "chat_template.jinja")
FETCHED = (".safetensors", ".safetensors.index.json", ".part")      # ends of further names
MARKER = "complete.json"             # written last: a directory without it is incomplete
TIMEOUT = 30            # seconds without a byte
RETRIES = 5             # failures in a row, each without a new byte
BACKOFF = 1.0           # seconds before the first retry, doubled before each further one
LONGEST_WAIT = 300      # seconds; a server that demands more ends the download
CHUNK = 1 << 20         # bytes


class HubError(OSError):
    """A download that cannot succeed; the message is one line that names the remedy."""


class TryAgain(Exception):
    """A failure that may pass; `wait`: seconds that the server demands, or None."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class RemoteFile(NamedTuple):
    """The hub's statement about a file."""
    name: str
    url: str
    commit: str
    size: int     # bytes
    etag: str     # 64 hex digits: sha256 of the content; 40: git's sha1 of it

    @property
    def part(self) -> str:
        """The name of the incomplete file."""
        # with the checksum, so that half a file of one version is not continued with another's
        return f"{self.name}.{self.etag[:16]}.part"


# --- from a name to a directory -------------------------------------------------------------------

def resolve(name_or_dir: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return the directory of a model, after downloading its missing files.

    name_or_dir  a directory, "tiny" (part of this repository), a name in MODELS, or owner/name on
                 the hub

    A complete download needs no network and is not updated.
    Environment: HF_TOKEN, access token for gated models; HF_ENDPOINT, another address of the hub (a
    mirror); HF_HUB_OFFLINE=1, no network.
    Raises ValueError for an unknown name or one with two meanings, HubError if the download fails.
    """
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name))
    tiny = Path(__file__).resolve().parents[1] / "tiny"
    # "" would be the current directory
    if name and folder.is_dir():
        if name in MODELS or (name == "tiny" and folder.resolve() != tiny):
            raise ValueError(f"{name!r} is the name of a model and of a directory here: write "
                             f"./{name} for the directory, or rename it")
        return folder
    if name == "tiny":
        return tiny
    repo = MODELS.get(name, name)
    # a name that begins with a directory here was meant as a path
    if not re.fullmatch(REPO, repo, re.ASCII) or (repo == name and folder.parent.exists()):
        raise ValueError(f"unknown model {name!r}: give an existing directory, tiny, "
                         f"or one of {', '.join(MODELS)}, or owner/name on the hub")
    folder = cache_root(cache_dir) / repo / "main"
    if is_complete(folder):
        return folder
    if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "on", "yes", "true"):
        raise HubError(f"HF_HUB_OFFLINE is set, but {repo} is not complete in {folder}; "
                       "unset it once to fetch the model, or use --init_from=<directory>")
    fetch_files(plan(repo), folder)
    return folder


def check_not_a_model(directory: str):
    """Raise ValueError for an output directory with the name of a model."""
    if directory == "tiny" or directory in MODELS:
        raise ValueError(f"--out_dir {directory} is the name of a model; choose another one, "
                         f"such as ./{directory}-out")


def fetch_files(files: list, folder: Path):
    """Download files of known size and checksum to a directory. Raises HubError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # several processes of one run need the same model
        with open(folder.with_name(f"{folder.name}.lock"), "a", encoding="utf-8") as lock:
            if not try_lock(lock):
                print(f"waiting for another process that downloads to {folder}", file=sys.stderr)
                while not try_lock(lock):
                    sleep(1)
            # the other process may have fetched everything
            if not is_complete(folder):
                download_all(files, folder)
    except HubError:
        raise
    # network errors are HubErrors here, so this is one of the disk
    except OSError as error:
        total = sum(file.size for file in files)
        raise HubError(f"cannot download {total:,} bytes to {folder}: {error.strerror}; make room, "
                       "or choose another place with --cache_dir or the environment variable "
                       "NANOL2D_CACHE") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: the bytes received are in {folder}, "
                                "the same command resumes from there") from None


def is_complete(folder: Path) -> bool:
    """Has every file the checksum that the hub has stated?"""
    try:
        marker = read_json(folder / MARKER)
        times = marker.get("times", {})
        for name, size in marker["sizes"].items():
            path = folder / name
            # hashing takes minutes: a file that nobody has written to since is the same
            same = size_of(path) == size and path.stat().st_mtime_ns == times.get(name)
            if not same and not matches(path, size, marker["etags"][name]):
                return False
        return True
    # a marker of another form: every file is checked again
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def verify(folder: Path):
    """Hash every file of a fetched model. Raises ValueError for the first that has changed."""
    marker = read_json(folder / MARKER)
    etags = marker.get("etags")
    if not isinstance(etags, dict) or etags.keys() != marker.get("sizes", {}).keys():
        raise ValueError(f"{folder / MARKER} states no checksums; delete it and fetch again")
    for name, etag in etags.items():
        if not matches(folder / name, size_of(folder / name), str(etag)):
            raise ValueError(f"{folder / name} does not have the hub's checksum; delete it and "
                             "fetch again")
        print(f"{etag}  {name}")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- the files of a model -------------------------------------------------------------------------

def plan(repo: str) -> list[RemoteFile]:
    """Return the files of a model, all of one commit."""
    page = f"{endpoint()}/{repo}"
    config = look_up(f"{page}/resolve/main/config.json")
    if config is None:
        raise HubError(f"no config.json in {page}: check the name there")
    # the branch may move during the download
    base = f"{page}/resolve/{config.commit}/"
    found = {name: look_up(base + name) for name in OPTIONAL}
    if not (found["tokenizer.json"] or (found["vocab.json"] and found["merges.txt"])):
        raise HubError(f"no tokenizer in {page}: neither tokenizer.json nor vocab.json "
                       "with merges.txt")
    files = [file for file in found.values() if file]
    single = look_up(f"{base}model.safetensors")
    index = single or look_up(f"{base}model.safetensors.index.json")
    if index is None:
        raise HubError(f"no model.safetensors in {page} (pytorch_model.bin is a pickle, which can "
                       "run code when loaded, and is refused): choose a model with safetensors, "
                       "or convert it yourself and use --init_from=<directory>")
    files.append(index)
    for name in [] if single else shard_names(index):
        shard = look_up(base + name)
        if shard is None:
            raise HubError(f"{name}, which {index.name} names, is not in {page}: "
                           "the model is incomplete on the hub")
        files.append(shard)
    # config.json comes last: without it no loader accepts the directory
    return [*files, config._replace(url=f"{base}config.json")]


def shard_names(index: RemoteFile) -> list[str]:
    """Download the index and return the names of the shards."""
    names = []
    with TemporaryDirectory() as scratch, suppress(ValueError, KeyError, AttributeError):
        path = Path(scratch) / index.name
        retry(partial(download, index, path))
        names = sorted(set(map(str, read_json(path)["weight_map"].values())))
    # a path could lead out of the cache
    plain = [re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII) for name in names]
    if not plain or not all(plain):
        raise HubError(f"{index.url} is not an index of shards: expected JSON with a weight_map to "
                       "plain file names that end in .safetensors")
    return names


def look_up(url: str) -> RemoteFile | None:
    """Return the hub's statement about a file, or None if it has no such file."""
    with retry(partial(open_url, url, method="HEAD", accept=(404, *range(300, 400)))) as answer:
        if answer.status == 404:
            return None
        file = stated_file(url, answer.headers)
    if file is None:
        raise HubError(f"{url} comes without size, checksum or commit: "
                       "HF_ENDPOINT must be the hub or a full mirror of it")
    return file


def stated_file(url: str, headers) -> RemoteFile | None:
    """The statement in the headers of an answer, or None if it is not complete."""
    # large files are on another host: X-Linked-* describe them, the plain headers the redirect
    size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    etag = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
    etag = etag.removeprefix("W/").strip('"')
    commit = headers.get("X-Repo-Commit") or ""
    known = re.fullmatch(r"\d+ ([0-9a-f]{64}|[0-9a-f]{40}) [0-9a-f]{40}", f"{size} {etag} {commit}")
    return RemoteFile(url.rpartition("/")[2], url, commit, int(size), etag) if known else None


# --- download -------------------------------------------------------------------------------------

def download_all(files, folder):
    """Download the missing files, then mark the directory as complete."""
    # files of another commit, but none of the user's own; and config.json, without which no loader
    # accepts the directory
    wanted = {name for file in files for name in (file.name, file.part)} - {"config.json"}
    for path in folder.iterdir():
        fetched = path.name in (*OPTIONAL, "config.json", MARKER) or path.name.endswith(FETCHED)
        if fetched and path.name not in wanted:
            path.unlink()
    missing = [file for file in files
               if not matches(folder / file.name, file.size, file.etag)]
    needed = sum(file.size - size_of(folder / file.part) for file in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are missing, only {free:,} bytes are free")
    for file in missing:
        part = folder / file.part
        retry(partial(download, file, part), progress=partial(size_of, part))
        flush(part)
        os.replace(part, folder / file.name)
    write_json({
        "commit": files[0].commit,
        "sizes": {file.name: file.size for file in files},
        "etags": {file.name: file.etag for file in files},
        "times": {file.name: (folder / file.name).stat().st_mtime_ns for file in files},
    }, folder / MARKER)


def download(file: RemoteFile, part: Path):
    """Append the missing bytes to `part` and check the whole. Raises TryAgain."""
    have = size_of(part)
    # an empty file has all its bytes before it exists
    if have < file.size or not part.exists():
        with open_url(file.url, start=have, accept=(416,)) as answer:
            if answer.status == 416:
                part.unlink()
                raise TryAgain(f"{file.name} cannot be resumed from byte {have:,}: it starts over")
            # a server without ranges sends the whole file again
            if not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0
            bar = tqdm(desc=file.name, total=file.size, initial=have, unit="B", unit_scale=True)
            with bar, open(part, "ab" if have else "wb", buffering=CHUNK) as out:
                while have < file.size:
                    try:
                        # read1 returns what has arrived, so a slow download loses nothing
                        block = answer.read1(min(CHUNK, file.size - have))
                    except (OSError, HTTPException) as error:
                        # an OSError would be mistaken for one of the disk
                        raise failure(error, None, answer.url) from None
                    if not block:
                        raise TryAgain(f"the connection closed after {have:,} of the "
                                       f"{file.size:,} bytes of {file.name}")
                    out.write(block)
                    bar.update(len(block))
                    have += len(block)
    if not matches(part, file.size, file.etag):
        part.unlink()
        raise TryAgain(f"{file.name} arrived damaged: its checksum is not the hub's")


def matches(path: Path, size: int, etag: str) -> bool:
    """Has `path` the stated size and checksum?"""
    # the size first: it costs nothing and mostly decides
    if not path.is_file() or size_of(path) != size:
        return False
    # Git's checksum of a small file is the sha1 of a header and the content, of a large one (LFS)
    # the sha256 of the content.
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest() == etag


# --- one request ----------------------------------------------------------------------------------

class Redirects(HTTPRedirectHandler):
    """urllib's redirects, without the access token on other hosts. `url`: the last address."""

    # missing in Python 3.10
    http_error_308 = HTTPRedirectHandler.http_error_302

    def __init__(self, url):
        self.url = url

    def redirect_request(self, request, answer, code, message, headers, target):
        method = request.get_method()
        # a HEAD ends at the hub's redirect to the host of large files, which describes the file
        if method == "HEAD" and not at_hub(target) and stated_file(target, headers):
            return None
        self.url = target
        following = Request(target, headers=dict(request.headers), method=method)
        if not at_hub(target):
            following.remove_header("Authorization")
        return following


def open_url(url: str, method="GET", start=0, accept=()):
    """The open answer of `url` from byte `start` on; accept: further statuses that are answers.

    Raises TryAgain or HubError for any other.
    """
    request = Request(url, headers={"User-Agent": "nanoL2D"}, method=method)
    if start:
        request.add_header("Range", f"bytes={start}-")
    token = os.environ.get("HF_TOKEN", "").strip()
    # a line break would begin another header; the message must not repeat the token
    if not re.fullmatch("[!-~]*", token):
        raise ValueError("HF_TOKEN contains a character that no token has: "
                         "copy it again from the hub's settings")
    if token and at_hub(url):
        request.add_header("Authorization", f"Bearer {token}")
    redirects = Redirects(url)
    try:
        return build_opener(redirects).open(request, timeout=TIMEOUT)
    except (OSError, HTTPException) as error:
        # an HTTPError is an answer at the same time
        if isinstance(error, HTTPError) and error.code in accept:
            return error
        raise failure(error, request, redirects.url) from None


def endpoint() -> str:
    """Address of the hub. Raises ValueError for a malformed HF_ENDPOINT."""
    # a blank from copying is removed; one inside is a mistake
    address = os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co"
    address = address.rstrip("/")
    if not re.fullmatch("https?://[!-~]+", address):
        raise ValueError(f"malformed HF_ENDPOINT {address!r}: expected https://host")
    return address


def at_hub(url: str) -> bool:
    """Has `url` the hub's scheme, host and port?"""
    return urlsplit(url)[:2] == urlsplit(endpoint())[:2]


def failure(error, request: Request | None, here: str) -> Exception:
    """The exception for a request that has failed at the address `here`."""
    host = urlsplit(here).netloc
    if not isinstance(error, HTTPError):
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            return HubError(f"the certificate of {host} cannot be verified "
                            f"({reason.verify_message}): point the environment variable "
                            "SSL_CERT_FILE to your system's certificates")
        return TryAgain(f"could not reach {host} ({reason})")
    error.close()
    code = error.code
    if code == 429 or code >= 500:
        seconds = error.headers.get("Retry-After", "")
        if code == 429 and not seconds.isdigit():
            # the hub's own header, such as "resolvers";r=0;t=42
            seconds = error.headers.get("RateLimit", "").partition(";t=")[2]
        return TryAgain(f"{host} answered HTTP {code}", int(seconds) if seconds.isdigit() else None)
    # only the hub knows licences and tokens: another host has other reasons
    if code in (401, 403) and at_hub(here):
        page = request.full_url.split("/resolve/")[0]
        how = "with HF_TOKEN" if request.has_header("Authorization") else "without HF_TOKEN"
        return HubError(f"access to {page} was refused {how} (HTTP {code}): it is gated, private "
                        "or does not exist; accept its licence on that page, then set HF_TOKEN to "
                        "a token of the same account that may read gated models, from "
                        f"{endpoint()}/settings/tokens")
    reason = " ".join(str(error.reason).split())
    return HubError(f"{host} answered HTTP {code} ({reason}) for {request.full_url}: "
                    "check the name and HF_ENDPOINT")


def retry(action, progress=lambda: 0):
    """Return action(); after TryAgain wait and repeat it, up to RETRIES times without progress().

    progress() is the number of bytes on disk.
    """
    failures = 0
    best = progress()
    while True:
        try:
            return action()
        except TryAgain as reason:
            # beyond the best so far, or a file that always arrives damaged would never end
            failures = 1 if progress() > best else failures + 1
            best = max(best, progress())
            wait = BACKOFF * 2 ** (failures - 1) if reason.wait is None else reason.wait
            if wait > LONGEST_WAIT or failures > RETRIES:
                raise HubError(f"{reason}: given up after {failures - 1} retries (wait {wait:.0f} "
                               "s before the next); the same command resumes, and "
                               "--init_from=<directory> works offline") from None
            # standard output holds the directory alone
            print(f"{reason}: trying again in {wait:.0f} s ({failures} of {RETRIES})",
                  file=sys.stderr)
        sleep(wait)


# --- command line ---------------------------------------------------------------------------------

@command("data.checkpoints.hub")
def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Download a model from the Hugging Face hub and print its directory.")
    parser.add_argument("model", help="owner/name, or a short name: " + ", ".join(MODELS))
    parser.add_argument(
        "--cache_dir",
        help="directory of downloaded models (default: NANOL2D_CACHE, then ~/.cache/nanol2d)")
    parser.add_argument("--verify", action="store_true",
                        help="hash the files and compare with the hub's checksums")
    args = parser.parse_args(argv)
    folder = resolve(args.model, args.cache_dir)
    if args.verify:
        verify(folder)
    print(folder)


if __name__ == "__main__":
    main()
