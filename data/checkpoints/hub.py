"""Fetch a model's files from the Hugging Face hub, with nothing but the standard library.

A model is a folder that holds config.json, the tokenizer's files and weights in safetensors. A HEAD
request per file tells its size, its checksum and the commit; then the files are downloaded from
that one commit, checked, and kept in a cache. Weights that are only there as pickle are refused,
since loading a pickle can run any code.

How a server is asked is in data/checkpoints/web.py. Read next: model.py, which loads the folder.

    python -m data.checkpoints.hub gpt2      # 0.5 GB on the first call; prints the folder
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import sleep
from typing import NamedTuple
from urllib.parse import quote

from tqdm import tqdm

from data.checkpoints.web import CHUNK, HubError, Temporary, body, open_url, retry
from data.system.command import command
from data.system.disk import cache_root, flush, parse_json, read_json, try_lock, write_json

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
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-360m-instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "smollm2-1.7b-instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}
# No model has all of these, but what is there may be needed.
OPTIONAL = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Written last: a folder without it is not whole.
MARKER = "complete.json"
REPO = r"\w[\w.-]*/\w[\w.-]*"        # owner/name


class RemoteFile(NamedTuple):
    """What the hub states about a file."""
    name: str
    url: str
    commit: str
    size: int     # bytes
    etag: str     # 64 hex digits: sha256 of the content; 40: git's sha1 of it

    @property
    def part(self):
        """The file's name while it is not whole."""
        # With the checksum in its name, half a file of one version is never continued with
        # another's second half.
        return f"{self.name}.{self.etag[:16]}.part"


# --- from a name to a folder ----------------------------------------------------------------------

def resolve(name_or_dir: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return the folder of a model.

    name_or_dir: a directory as it is, "tiny" (comes with this repository), a name in MODELS or a
    full one of the hub, owner/name (both fetched).
    Raises ValueError for another name, or one that could be two things; FileNotFoundError when
    data/tiny is gone, and what `fetch_model` raises.
    """
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name))
    known = name == "tiny" or name in MODELS
    # "" would be the current one
    if name and folder.is_dir():
        if known and not (name == "tiny" and folder.samefile(_tiny())):
            raise ValueError(f"{name!r} is the name of a model and of a directory here: write "
                             f"./{name} for the directory, or rename it")
        return folder
    if name == "tiny":
        return _tiny()
    if name in MODELS:
        return fetch_model(MODELS[name], cache_dir)
    # what begins like a path on this disk was meant as one
    if re.fullmatch(REPO, name, re.ASCII) and not folder.parent.exists():
        return fetch_model(name, cache_dir)
    raise ValueError(f"unknown model {name!r}: give an existing directory, tiny, "
                     f"or one of {', '.join(MODELS)}, or owner/name on the hub")


def check_not_a_model(directory: str):
    """Raise ValueError for a name that would then mean two things."""
    if directory == "tiny" or directory in MODELS:
        raise ValueError(f"--out_dir {directory} is the name of a model; choose another one, "
                         f"such as ./{directory}-out")


def _tiny() -> Path:
    tiny = Path(__file__).resolve().parents[1] / "tiny"
    if not tiny.is_dir():
        raise FileNotFoundError(f"{tiny} is missing although it belongs to this repository: "
                                "run git checkout data/tiny")
    return tiny


def fetch_model(
    repo: str,
    cache_dir: str | Path | None = None,
    revision: str = "main",
) -> Path:
    """Return the folder with all files of a hub model, after downloading what is missing.

    repo       "owner/name" on the hub
    cache_dir  defaults to the environment variable NANOL2D_CACHE, then to ~/.cache/nanol2d
    revision   branch, tag or commit; a branch is not followed after its first download

    A whole folder needs no network. HF_TOKEN holds the access token for gated models, HF_ENDPOINT
    another address of the hub (a mirror).
    Raises ValueError for a malformed argument, HubError (an OSError) when the model cannot be had.
    """
    folder = _cache_folder(repo, cache_dir, revision)
    if _is_complete(folder):
        return folder
    if _offline():
        raise HubError(f"HF_HUB_OFFLINE is set, and {repo} is not whole in {folder}; "
                       "fetch it once without, or use --init_from=<directory>")
    fetch_files(_plan(repo, revision), folder)
    return folder


def fetch_files(files: list, folder: Path):
    """Bring files whose checksums are known into a folder. Raises HubError in one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock")):
            # another process may have fetched it while this one waited
            if not _is_complete(folder):
                _download(files, folder)
    except HubError:
        raise
    except OSError as error:
        # of the network only HubError is left at this point, so it is the disk
        needed = sum(file.size for file in files)
        raise HubError(_disk_line(folder, error.strerror, needed)) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: what arrived is kept in {folder}, "
                                "the same command resumes from there") from None


def _cache_folder(repo, cache_dir, revision) -> Path:
    """Where a model is kept; ValueError for a malformed name."""
    # both names become part of a path and of an address, so neither may lead anywhere else
    if not re.fullmatch(REPO, repo, re.ASCII):
        raise ValueError(f"malformed repo {repo!r}: expected owner/name, "
                         "such as openai-community/gpt2")
    if not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII):
        raise ValueError(f"malformed revision {revision!r}: expected a branch, a tag or a commit, "
                         "such as main")
    # a branch may have a slash in its name, and must not become two folders
    return cache_root(cache_dir) / repo / revision.replace("/", "--")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "on", "yes", "true")


def _is_complete(folder) -> bool:
    try:
        sizes = read_json(folder / MARKER)["sizes"]
        # a file that somebody deleted or cut is noticed; to hash them all would take minutes
        return all(_size(folder / name) == size for name, size in sizes.items())
    # a marker of another form says nothing: what is there is looked at again
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def verify(folder: Path):
    """Hash every file of a fetched model. Raises ValueError for the first that has changed."""
    marker = read_json(folder / MARKER)
    etags = marker.get("etags") or {}
    if not isinstance(etags, dict) or etags.keys() != marker.get("sizes", {}).keys():
        raise ValueError(f"{folder / MARKER} states no checksums; delete it and fetch again")
    for name, etag in etags.items():
        file = RemoteFile(name, "", "", _size(folder / name), str(etag))
        if not _matches(folder / name, file):
            raise ValueError(f"{folder / name} is not what the hub stated; delete it and "
                             "fetch again")
        print(f"{etag}  {name}")


def _size(path) -> int:
    if not path.exists():
        return 0
    return path.stat().st_size


def _disk_line(folder, problem, needed) -> str:
    return (f"cannot download to {folder}: {problem}; {needed:,} bytes are needed there: "
            "make room, or choose another place with --cache_dir "
            "or the environment variable NANOL2D_CACHE")


@contextmanager
def _lock(path):
    """Hold `path` as a lock.

    The processes of one run ask for the same model, and two must not write one file.
    """
    with open(path, "a", encoding="utf-8") as handle:
        if not try_lock(handle):
            tqdm.write(f"waiting for another process that downloads to {path.parent}",
                       file=sys.stderr)
            while not try_lock(handle):
                sleep(1)
        # closing the file releases the lock, also when the process dies
        yield


# --- which files there are ------------------------------------------------------------------------

def _plan(repo, revision) -> list[RemoteFile]:
    """Return the files of a model, all of one commit."""
    page = f"{_endpoint()}/{repo}"
    config = _look(f"{page}/resolve/{quote(revision, safe='')}/config.json")
    if config is None:
        raise HubError(f"no config.json in {page} at revision {revision}: check both names there")
    # The branch may move while we download, its commit cannot.
    base = f"{page}/resolve/{config.commit}/"
    files = []
    for name in OPTIONAL:
        file = _look(base + name)
        if file:
            files.append(file)
    names = {file.name for file in files}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise HubError(f"no tokenizer in {page}: neither tokenizer.json nor vocab.json "
                       "with merges.txt is there")
    files += _plan_weights(page, base)
    # config.json comes last: without it no loader takes the folder
    files.append(config._replace(url=base + "config.json"))
    return files


def _endpoint() -> str:
    # a blank from copying is no part of it, and an address with one inside is none
    endpoint = os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co"
    endpoint = endpoint.rstrip("/")
    if not re.fullmatch("https?://[!-~]+", endpoint):
        raise ValueError(f"malformed HF_ENDPOINT {endpoint!r}: expected https://host")
    return endpoint


def _plan_weights(page, base) -> list[RemoteFile]:
    whole = _look(base + "model.safetensors")
    if whole:
        return [whole]
    # large models come in shards, with an index of them
    index = _look(base + "model.safetensors.index.json")
    if index:
        return [index] + _plan_shards(index, page, base)
    # one look more, only to tell the user why
    if _look(base + "pytorch_model.bin") or _look(base + "pytorch_model.bin.index.json"):
        raise HubError(f"{page} has its weights only as pytorch_model.bin, a pickle, which can "
                       "run code when loaded: refused; choose a model with safetensors, or "
                       "convert it yourself and use --init_from=<directory>")
    raise HubError(f"no model.safetensors in {page}: choose a model with safetensors")


def _plan_shards(index, page, base) -> list[RemoteFile]:
    shards = []
    absent = []
    for name in _shard_names(index):
        shard = _look(base + name)
        if shard is None:
            absent.append(name)
        shards.append(shard)
    if absent:
        raise HubError(f"{absent[0]}, which {index.name} names, is not in {page}: "
                       "the model is incomplete on the hub")
    return shards


def _shard_names(index) -> list[str]:
    """Read the shards' names from the index."""
    try:
        content = parse_json(retry(partial(_read_index, index)), index.name)
        names = sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HubError(f"{index.url} is not an index of shards: "
                       "expected JSON with a weight_map") from None
    for name in names:
        # each must be a plain file name, or it could point out of the cache
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(name), re.ASCII):
            raise HubError(f"{index.url} names the shard {name!r}: refused, "
                           "expected a plain file name that ends in .safetensors")
    return names


def _read_index(index) -> bytes:
    with open_url(index.url) as answer:
        content = b"".join(body(answer, index.size))
    if _checksum([content], index) != index.etag:
        raise Temporary(f"{index.name} arrived damaged")
    return content


def _look(url) -> RemoteFile | None:
    """Return the file at `url`, or None where the hub has no such file."""
    with retry(partial(open_url, url, method="HEAD", accept=(404,), enough=_states)) as answer:
        if answer.status == 404:
            return None
        facts = _facts(answer.headers)
    # nothing is taken unchecked, so a server that says less is of no use
    if facts is None:
        raise HubError(f"{url} comes without size, checksum or commit: "
                       "HF_ENDPOINT must be the hub or a full mirror of it")
    return RemoteFile(url.rpartition("/")[2], url, *facts)


def _facts(headers):
    """(commit, size, etag) of a file, or None where the headers do not state them all."""
    # A large file lies elsewhere: then X-Linked-* describe the file, and the plain headers only the
    # redirect to it.
    size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    etag = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
    etag = etag.removeprefix("W/").strip('"')
    commit = headers.get("X-Repo-Commit") or ""
    known = (
        size.isdigit()
        and re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", etag)
        and re.fullmatch("[0-9a-f]{40}", commit)
    )
    return (commit, int(size), etag) if known else None


def _states(headers) -> bool:
    """Is a redirect the answer itself? A mirror's to the hub carries no facts of the file."""
    return _facts(headers) is not None


# --- download -------------------------------------------------------------------------------------

def _download(files, folder):
    """Bring `files` into `folder`, then declare the folder whole."""
    _clean(files, folder)
    # what is already there and right is kept
    missing = [file for file in files if not _matches(folder / file.name, file)]
    needed = sum(file.size - _size(folder / file.part) for file in missing)
    free = shutil.disk_usage(folder).free
    # better now than after an hour
    if needed > free:
        raise HubError(_disk_line(folder, f"only {free:,} bytes are free", needed))
    total = sum(file.size for file in files)
    done = total - sum(file.size for file in missing)
    with tqdm(total=total, initial=done, unit="B", unit_scale=True) as bar:
        for file in missing:
            bar.set_description(file.name)
            _fetch_file(file, folder, bar)
    _declare_whole(files, folder)


def _clean(files, folder):
    """Remove what an older attempt left of another commit."""
    keep = {name for file in files for name in (file.name, file.part)}
    # config.json goes in any case, so that half a model cannot be loaded
    keep.discard("config.json")
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()


def _declare_whole(files, folder):
    write_json({
        "commit": files[0].commit,
        "sizes": {file.name: file.size for file in files},
        "etags": {file.name: file.etag for file in files},
    }, folder / MARKER)


def _fetch_file(file, folder, bar):
    """Download one file; only checked bytes get the real name."""
    part = folder / file.part
    start = bar.n

    def attempt():
        # back to what the disk holds, which may be less than the last attempt had shown
        bar.update(start + _size(part) - bar.n)
        # an empty file has all its bytes before it exists
        if _size(part) < file.size or not part.exists():
            _receive(file, part, bar)
        if not _matches(part, file):
            # no telling which byte is wrong
            part.unlink()
            raise Temporary(f"{file.name} arrived damaged: "
                            "its checksum is not the one that the hub states")

    retry(attempt, progress=partial(_size, part))
    flush(part)
    os.replace(part, folder / file.name)


def _receive(file, part, bar):
    """Add to `part` what it lacks."""
    have = _size(part)
    with open_url(file.url, start=have, accept=(416,)) as answer:
        if answer.status == 416:
            part.unlink()
            raise Temporary(f"{file.name} cannot be resumed from byte {have:,}, "
                            "so it starts over")
        mode = "ab"
        content_range = answer.headers.get("Content-Range", "")
        if answer.status != 206 or not content_range.startswith(f"bytes {have}-"):
            # a server without ranges sends the whole file again
            mode = "wb"
            bar.update(-have)
            have = 0
        with open(part, mode, buffering=CHUNK) as out:
            # a server that sends more than it stated is not listened to
            for block in body(answer, file.size - have):
                out.write(block)
                bar.update(len(block))
    if _size(part) < file.size:
        raise Temporary(f"the connection closed after {_size(part):,} of the {file.size:,} bytes "
                        f"of {file.name}")


def _matches(path, file) -> bool:
    # the size first: it costs nothing, and mostly tells already
    if not path.is_file() or _size(path) != file.size:
        return False
    with open(path, "rb") as stream:
        blocks = iter(partial(stream.read, CHUNK), b"")
        return _checksum(blocks, file) == file.etag


def _checksum(blocks, file) -> str:
    # Git names a small file by the sha1 of a header and the content, a large one (LFS) by the
    # sha256 of the content alone.
    if len(file.etag) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % file.size)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


# --- command line ---------------------------------------------------------------------------------

@command("data.checkpoints.hub")
def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Download a model from the Hugging Face hub and print its folder.")
    parser.add_argument("model", help="owner/name, or a short name: " + ", ".join(MODELS))
    parser.add_argument(
        "--cache_dir",
        help="where models are kept (default: NANOL2D_CACHE, then ~/.cache/nanol2d)")
    parser.add_argument("--verify", action="store_true",
                        help="hash the files and compare with what the hub stated")
    args = parser.parse_args(argv)
    folder = resolve(args.model, args.cache_dir)
    if args.verify:
        verify(folder)
    print(folder)


if __name__ == "__main__":
    main()
