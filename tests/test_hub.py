"""data/checkpoints/hub.py against a real HTTP server on this machine.

It serves files as the hub does, and misbehaves on request.
"""

import hashlib
import json
import os
import random
import signal
import socket
import ssl
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.error import URLError

import pytest
from conftest import exit_status

from data.checkpoints import hub

# two commits
OLD = "a" * 40
NEW = "b" * 40
SMALL = {
    "config.json": b'{"n_layer": 1}',
    "tokenizer.json": b'{"model": {}}',
    "merges.txt": b"#version\na b\n",
}
WEIGHTS = random.Random(0).randbytes(300_000)
REPO = "openai-community/gpt2"


class FakeHub:
    """Serves `commits` from one port and large files from another.

    `faults[name]` are played, one per GET of that file, `head_faults[name]` one per HEAD.
    """

    def __init__(self):
        self.commits = {OLD: SMALL | {"model.safetensors": WEIGHTS}}
        self.branch = OLD
        self.moves_to = None        # the commit that the branch moves to after the next request
        self.faults = defaultdict(list)
        self.head_faults = defaultdict(list)
        self.headers = {}           # of the answers to faults
        self.ranges = True
        self.redirect = None        # another target for the redirect of large files
        self.needs_token = None
        self.hung_up = False        # did a stalled answer end on this side first?
        self.waits = []             # seconds that the client has slept
        self.log = []
        self.arrived = threading.Event()
        self.closing = threading.Event()
        self.hub = serve(Handler, fake=self, role="hub")
        self.cdn = serve(Handler, fake=self, role="cdn")
        self.url = f"http://127.0.0.1:{self.hub.server_port}"

    def close(self):
        self.closing.set()
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def gets(self, name):
        """The Range headers of the requests that reached a file's bytes."""
        return [entry["range"] for entry in self.log
                if entry["method"] == "GET" and entry["bytes"] and entry["name"] == name]


def serve(handler, **attributes):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), attributes))
    poll = {"poll_interval": 0.01}
    threading.Thread(target=server.serve_forever, kwargs=poll, daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        fake = self.fake
        *_, commit, name = self.path.split("/")
        # a request for bytes, and not for the place where they are
        direct = self.role == "cdn" or self.path.startswith("/api/resolve-cache/")
        token = self.headers.get("Authorization")
        fake.log.append({
            "role": self.role, "method": self.command, "path": self.path, "name": name,
            "bytes": direct, "range": self.headers.get("Range"), "token": token})
        faults = fake.faults if direct else {}
        faults = (fake.head_faults if self.command == "HEAD" else faults).get(name)
        fault = faults.pop(0) if faults else None
        if fault == "drop":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if isinstance(fault, int):
            return self.answer(fault, fake.headers, b"not the file")
        if fake.needs_token and self.role == "hub" and token != f"Bearer {fake.needs_token}":
            return self.answer(403 if token else 401)
        commit = fake.branch if commit == "main" else commit
        if name not in fake.commits.get(commit, {}):
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        self.file(name, fake.commits[commit][name], commit, direct, fault)
        if fake.moves_to:
            # a push arrives while the client is busy
            fake.branch, fake.moves_to = fake.moves_to, None

    def file(self, name, content, commit, direct, fault):
        large = name.endswith((".safetensors", ".bin"))
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content)
        if large:
            digest = hashlib.sha256(content)
        etag = f'"{digest.hexdigest()}"'
        facts = {"X-Repo-Commit": commit}
        if direct:
            return self.content(content, facts | {"ETag": etag}, fault)
        if not large:
            return self.answer(307, facts | {"Location": f"/api/resolve-cache/{commit}/{name}"})
        cdn = f"http://127.0.0.1:{self.fake.cdn.server_port}/signed/{commit}/{name}"
        self.answer(302, facts | {
            "X-Linked-Size": len(content), "X-Linked-Etag": etag, "ETag": '"of-the-redirect"',
            "Location": self.fake.redirect or cdn})

    def content(self, content, facts, fault):
        status, start = 200, 0
        if self.headers.get("Range") and self.fake.ranges:
            status, start = 206, int(self.headers["Range"][len("bytes="):-1])
            facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        part = content[start:] + (b"x" * 1000 if fault == "long" else b"")
        sent = len(part) // 2 if fault in ("truncate", "stall", "interrupt") else len(part)
        self.answer(status, facts, part, sent)
        if fault == "interrupt" and self.fake.arrived.wait(10):
            os.kill(os.getpid(), signal.SIGINT)
        if fault in ("stall", "interrupt"):
            self.fake.hung_up = not self.fake.closing.wait(10)

    def answer(self, status, headers={}, body=b"", sent=None):
        """`sent` bytes of the stated body."""
        self.send_response(status)
        for key, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])


@pytest.fixture
def fake(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "sleep", fake.waits.append)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    yield fake
    fake.close()


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) > 40
    return text


def assert_not_loadable(cache):
    """After a failure no folder claims to be whole.

    None has the config.json that every loader opens first.
    """
    names = {path.name for path in cache.rglob("*")}
    assert not names & {"complete.json", "config.json"}, names
    assert all(path.read_bytes() == WEIGHTS for path in cache.rglob("*.safetensors"))


def fails(fake, cache, match):
    with pytest.raises(hub.HubError, match=match) as error:
        hub.resolve(REPO, cache)
    assert_not_loadable(cache)
    return one_line(error)


def succeeds(cache, expected=SMALL | {"model.safetensors": WEIGHTS}):
    folder = hub.resolve(REPO, cache)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found.pop("complete.json")
    assert found == expected
    return folder


# --- the normal way -------------------------------------------------------------------------------

def test_fetches_what_is_there_and_the_second_call_asks_nothing(fake, tmp_path):
    folder = succeeds(tmp_path)
    assert folder == tmp_path / "openai-community" / "gpt2" / "main"
    asked = len(fake.log)
    assert hub.resolve(REPO, tmp_path) == folder
    assert len(fake.log) == asked


def index_of(weight_map):
    return json.dumps({"weight_map": weight_map}).encode()


def test_sharded_model(fake, tmp_path):
    first = "model-00001-of-00002.safetensors"
    second = "model-00002-of-00002.safetensors"
    shards = {first: WEIGHTS[:1000], second: WEIGHTS[1000:]}
    index = index_of({"a": first, "b": second, "c": first})
    fake.commits[OLD] = SMALL | shards | {"model.safetensors.index.json": index}
    fake.faults["model.safetensors.index.json"] = ["corrupt", "truncate"]
    succeeds(tmp_path, fake.commits[OLD])


def test_one_model_is_one_commit_even_if_the_branch_moves(fake, tmp_path):
    fake.commits[NEW] = {name: content + b" " for name, content in fake.commits[OLD].items()}
    fake.moves_to = NEW
    succeeds(tmp_path)
    # it did move after the first request
    assert fake.branch == NEW
    assert all("/main/" not in entry["path"] for entry in fake.log[1:])


def test_a_file_that_was_deleted_is_fetched_again_and_the_rest_kept(fake, tmp_path):
    folder = succeeds(tmp_path)
    (folder / "tokenizer.json").unlink()
    # the user's own, which was never fetched
    (folder / "notes.txt").write_text("mine")
    succeeds(tmp_path, {**SMALL, "model.safetensors": WEIGHTS, "notes.txt": b"mine"})
    assert len(fake.gets("model.safetensors")) == 1
    assert len(fake.gets("tokenizer.json")) == 2


def test_a_repair_that_fails_leaves_nothing_loadable(fake, tmp_path):
    (succeeds(tmp_path) / "model.safetensors").unlink()
    fake.faults["model.safetensors"] = [404]
    fails(fake, tmp_path, "HTTP 404")
    succeeds(tmp_path)


def test_cache_place(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOL2D_CACHE", str(tmp_path / "variable"))
    assert (tmp_path / "variable") in hub.resolve(REPO).parents
    assert (tmp_path / "flag") in hub.resolve(REPO, tmp_path / "flag").parents
    monkeypatch.delenv("NANOL2D_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert (tmp_path / ".cache" / "nanol2d") in hub.resolve(REPO).parents


def test_two_at_once_download_once(fake, tmp_path, monkeypatch):
    pause = threading.Event()
    monkeypatch.setattr(hub, "sleep", lambda seconds: pause.wait(0.01))
    threads = [threading.Thread(target=hub.resolve, args=(REPO, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    succeeds(tmp_path)
    assert fake.gets("model.safetensors") == [None]


# --- resuming -------------------------------------------------------------------------------------

HALF = "bytes=150000-"


@pytest.mark.parametrize("faults, ranges, expected", [
    (["truncate"], True, [None, HALF]),
    (["stall"], True, [None, HALF]),
    # a server without ranges sends the whole file again
    (["truncate", "truncate"], False, [None, HALF, HALF]),
    (["truncate", 416], True, [None, HALF, None]),
    # bytes beyond the stated size are not taken
    (["long"], True, [None]),
    # every new byte renews the retries
    (["truncate"] * 4, True, [None, HALF, *(f"bytes={n}-" for n in (225000, 262500, 281250))]),
])
def test_a_download_goes_on_with_the_rest(faults, ranges, expected, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    monkeypatch.setattr(hub, "RETRIES", 2)
    fake.ranges = ranges
    fake.faults["model.safetensors"] = list(faults)
    succeeds(tmp_path)
    assert fake.gets("model.safetensors") == expected
    # the client ended the stalled answer
    assert not fake.hung_up


def test_the_next_run_resumes_what_the_last_one_left(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "RETRIES", 0)
    fake.faults["model.safetensors"] = ["truncate"]
    assert "150,000 of the 300,000 bytes" in fails(fake, tmp_path, "closed after")
    succeeds(tmp_path)
    assert fake.gets("model.safetensors") == [None, HALF]


def test_a_file_that_always_arrives_damaged_is_not_fetched_for_ever(fake, tmp_path):
    # half of it looks like progress each time
    fake.faults["model.safetensors"] = ["truncate", "corrupt"] * 20
    fails(fake, tmp_path, "given up after 5 retries")


def test_half_a_file_of_another_version_is_not_resumed(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "RETRIES", 0)
    fake.faults["model.safetensors"] = ["truncate"]
    fails(fake, tmp_path, "closed after")
    fake.commits[NEW] = SMALL | {"model.safetensors": WEIGHTS[::-1]}
    fake.branch = NEW
    succeeds(tmp_path, fake.commits[NEW])
    assert fake.gets("model.safetensors") == [None, None]


@pytest.mark.skipif(
    sys.platform == "win32", reason="os.kill cannot send an interrupt to itself on Windows")
def test_interrupt_keeps_the_part_and_says_so(fake, tmp_path, monkeypatch, capsys):
    class Watched(hub.tqdm):
        def update(self, count):
            # the block is written by then
            if count > 1000:
                fake.arrived.set()
            return super().update(count)

    monkeypatch.setattr(hub, "tqdm", Watched)
    fake.faults["model.safetensors"] = ["interrupt"]
    assert exit_status(hub.main, ["gpt2", "--cache_dir", str(tmp_path)]) == 130
    assert "same command resumes" in capsys.readouterr().err.splitlines()[-1]
    assert_not_loadable(tmp_path)
    succeeds(tmp_path)
    begin = int(fake.gets("model.safetensors")[-1][len("bytes="):-1])
    assert 0 < begin <= 150_000


# --- what is checked ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_fetched_again_then_refused(fake, tmp_path, name):
    fake.faults[name] = ["corrupt"] * (hub.RETRIES + 1)
    assert name in fails(fake, tmp_path, "damaged")
    # neither the file nor its part
    assert not list(tmp_path.rglob(name + "*"))
    fake.faults[name] = ["corrupt"]
    succeeds(tmp_path)


@pytest.mark.parametrize("content", [
    b"[]", b"{}", b"<html>", b'{"weight_map": 1}', b'{"weight_map": {}}', index_of({"a": 3}),
    *(index_of({"a": name}) for name in (
        "../evil.safetensors", "/tmp/evil.safetensors", "a\\b.safetensors", ".safetensors",
        "run.py")),
])
def test_an_index_names_plain_files(fake, tmp_path, content):
    fake.commits[OLD] = SMALL | {"model.safetensors.index.json": content}
    fails(fake, tmp_path, "is not an index of shards: .* plain file names")
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("files, match", [
    ({}, "no config.json"),
    ({"config.json": b"{}"}, "no tokenizer"),
    (SMALL, "no model.safetensors"),
    (SMALL | {"pytorch_model.bin": b"pickle"}, "no model.safetensors .* a pickle, which can run"),
    (SMALL | {"model.safetensors.index.json": index_of({"a": "a.safetensors"})},
     "incomplete on the hub"),
])
def test_what_the_hub_must_have(fake, tmp_path, files, match):
    fake.commits[OLD] = files
    fails(fake, tmp_path, match)
    fetched = [entry["name"] for entry in fake.log if entry["method"] == "GET"]
    assert "pytorch_model.bin" not in fetched


def test_a_server_that_states_no_checksum_is_refused(fake, tmp_path):
    fake.branch = "no-commit"
    fake.commits["no-commit"] = SMALL
    fails(fake, tmp_path, "without size, checksum or commit")


# --- refusals and busy servers --------------------------------------------------------------------

def test_gated_model_without_and_with_a_refused_token(fake, tmp_path, monkeypatch):
    fake.needs_token = "good"
    line = fails(fake, tmp_path, "refused without HF_TOKEN .* gated, private or does not exist")
    assert f"{fake.url}/{REPO}" in line
    assert f"{fake.url}/settings/tokens" in line
    # asked once, no retry
    assert len(fake.log) == 1
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert "bad" not in fails(fake, tmp_path, "refused with HF_TOKEN")
    assert len(fake.log) == 2
    monkeypatch.setenv("HF_TOKEN", "good\n")
    succeeds(tmp_path)


def test_the_token_never_reaches_the_other_host(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fake.faults["model.safetensors"] = ["truncate", 500]
    succeeds(tmp_path)
    sent = {"hub": [], "cdn": []}
    for entry in fake.log:
        sent[entry["role"]].append(entry["token"])
    assert set(sent["hub"]) == {"Bearer secret"}
    assert sent["cdn"] == [None] * 3
    # nor does a host that was asked directly, as for the data of a benchmark
    url = f"http://127.0.0.1:{fake.cdn.server_port}/signed/{OLD}/merges.txt"
    size, digest = len(SMALL["merges.txt"]), hashlib.sha256(SMALL["merges.txt"]).hexdigest()
    hub.fetch_files([hub.RemoteFile("merges.txt", url, "x", size, digest)], tmp_path / "data")
    assert (fake.log[-1]["role"], fake.log[-1]["token"]) == ("cdn", None)


def test_a_refusal_by_the_other_host_does_not_speak_of_licences(fake, tmp_path):
    fake.faults["model.safetensors"] = [403]
    line = fails(fake, tmp_path, f"127.0.0.1:{fake.cdn.server_port} answered HTTP 403")
    assert "licence" not in line
    assert len(fake.gets("model.safetensors")) == 1


def test_a_redirect_to_a_local_file_is_refused(fake, tmp_path):
    fake.redirect = (tmp_path / "secret").as_uri()
    fails(fake, tmp_path / "cache", "Redirection to url 'file:.*is not allowed")


def test_a_token_with_a_line_break_is_refused_unsent(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "se\ncret")
    with pytest.raises(ValueError, match="HF_TOKEN contains") as error:
        hub.resolve(REPO, tmp_path)
    assert "cret" not in one_line(error)
    assert not fake.log


def test_errors_of_the_server_are_retried_with_growing_waits_then_one_line(fake, tmp_path):
    fake.head_faults["config.json"] = [500, "drop", 503]
    fake.faults["tokenizer.json"] = [502]
    fake.faults["model.safetensors"] = [500] * 20
    assert "given up after 5 retries" in fails(fake, tmp_path, "HTTP 500")
    assert len(fake.gets("model.safetensors")) == hub.RETRIES + 1
    assert fake.waits == [1, 2, 4, 1, 1, 2, 4, 8, 16]


@pytest.mark.parametrize("headers, expected", [
    ({"Retry-After": "7"}, 7),
    ({"RateLimit": '"resolvers";r=0;t=42'}, 42),
    ({}, 1),
    ({"Retry-After": "soon"}, 1),
])
def test_a_busy_server_is_given_the_time_it_asks_for(fake, tmp_path, headers, expected):
    fake.headers = headers
    fake.head_faults["config.json"] = [429]
    succeeds(tmp_path)
    assert fake.waits == [expected]


def test_a_server_that_asks_for_an_hour_is_not_waited_for(fake, tmp_path):
    fake.headers = {"Retry-After": "3600"}
    fake.faults["model.safetensors"] = [429]
    assert "wait 3600 s" in fails(fake, tmp_path, "HTTP 429")
    assert not fake.waits


def test_no_network(fake, tmp_path, monkeypatch):
    # bound but not listening: connections are refused
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")
        line = fails(fake, tmp_path, f"could not reach {host}")
    assert "--init_from=<directory> works offline" in line
    assert not list(tmp_path.rglob("*"))


def test_a_certificate_that_cannot_be_verified_is_not_asked_for_again(fake, tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = "self-signed certificate"
        raise URLError(error)

    monkeypatch.setattr(hub, "build_opener", lambda *handlers: SimpleNamespace(open=refuse))
    fails(fake, tmp_path, r"cannot be verified \(self-signed certificate\): .* SSL_CERT_FILE")
    assert not fake.waits


# --- the disk -------------------------------------------------------------------------------------

def test_too_little_room_is_noticed_before_the_download(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=299_999))
    total = sum(map(len, fake.commits[OLD].values()))
    line = fails(fake, tmp_path, f"{total:,} bytes are missing, only 299,999 bytes are free")
    assert "NANOL2D_CACHE" in line and str(tmp_path) in line
    assert not fake.gets("model.safetensors")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_disk_that_fills_up_during_the_download(fake, tmp_path):
    folder = tmp_path / REPO / "main"
    folder.mkdir(parents=True)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    (folder / f"model.safetensors.{digest[:16]}.part").symlink_to("/dev/full")
    fails(fake, tmp_path, "No space left on device.* --cache_dir")
    assert len(fake.gets("model.safetensors")) == 1


def test_a_cache_that_cannot_be_written(fake, tmp_path):
    (tmp_path / "file").write_text("in the way")
    fails(fake, tmp_path / "file", "cannot download .* bytes to .*: Not a directory.* --cache_dir")
    assert not fake.gets("model.safetensors")


# --- names and the command ------------------------------------------------------------------------

def test_a_directory_is_itself_unless_its_name_means_two_things(fake, tmp_path, monkeypatch):
    assert hub.resolve(tmp_path) == hub.resolve(str(tmp_path)) == tmp_path
    assert (hub.resolve("tiny") / "config.json").exists()
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="write ./gpt2 for the directory"):
        hub.resolve("gpt2")
    assert hub.resolve("./gpt2").samefile(tmp_path / "gpt2")


@pytest.mark.parametrize("name", [
    "gpt3", "", "data/gpt2", "no/such/folder", "../../no/such", "a/..", "../x/y"])
def test_unknown_names_are_refused_unsent_with_the_known_ones(fake, name):
    with pytest.raises(ValueError, match="existing directory, tiny, or one of gpt2, ") as error:
        hub.resolve(name)
    one_line(error)
    assert not fake.log


def test_command(fake, tmp_path, capsys):
    assert exit_status(hub.main, ["gpt2", "--cache_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / REPO / "main")
    assert exit_status(hub.main, ["gpt3"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("data.checkpoints.hub: unknown model 'gpt3'")
    assert shown.err.count("\n") == 1


# --- the environment and the cache are not trusted ------------------------------------------------

class Mirror(Handler):
    """Redirects every request to the hub, under another host's name."""

    def do_GET(self):
        self.tokens.append(self.headers.get("Authorization"))
        self.answer(self.status, {"Location": f"http://localhost:{self.behind}{self.path}"})


@pytest.mark.parametrize("status", [301, 308])
def test_a_mirror_may_redirect_to_another_host_which_never_sees_the_token(
        status, fake, tmp_path, monkeypatch):
    tokens = []
    server = serve(Mirror, status=status, behind=fake.hub.server_port, tokens=tokens)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    succeeds(tmp_path)
    server.shutdown()
    server.server_close()
    assert set(tokens) == {"Bearer hf_secret"}
    assert all(entry["token"] is None for entry in fake.log)


def test_a_blank_around_the_endpoint_is_no_part_of_it_and_one_inside_is_refused(
        fake, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1 :1")
    with pytest.raises(ValueError, match="malformed HF_ENDPOINT .* expected https://host"):
        hub.resolve(REPO, tmp_path)
    assert fake.waits == [] and fake.log == []
    monkeypatch.setenv("HF_ENDPOINT", f" {fake.url}/ \n")
    succeeds(tmp_path)


def test_offline_takes_what_is_there_and_never_asks(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE") as error:
        hub.resolve(REPO, tmp_path)
    assert one_line(error) and fake.log == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folder = succeeds(tmp_path)
    asked = len(fake.log)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.resolve(REPO, tmp_path) == folder and len(fake.log) == asked


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b'{"sizes": 3}', b'{"sizes": {"config.json": null}}', b"[" * 100_000])
def test_a_marker_of_another_form_says_nothing(content, fake, tmp_path):
    folder = succeeds(tmp_path)
    (folder / "complete.json").write_bytes(content)
    asked = len(fake.log)
    assert succeeds(tmp_path) == folder
    assert len(fake.log) > asked


def test_the_cache_is_known_by_the_hubs_checksums(fake, tmp_path, capsys):
    flags = [REPO, f"--cache_dir={tmp_path}", "--verify"]
    assert exit_status(hub.main, flags) == 0
    assert hashlib.sha256(WEIGHTS).hexdigest() in capsys.readouterr().out
    weights = next(tmp_path.rglob("model.safetensors"))
    # of the same length, so that only its hash tells
    other = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    weights.write_bytes(other)
    succeeds(tmp_path)
    # and of the same time, which only --verify tells
    before = weights.stat().st_mtime_ns
    weights.write_bytes(other)
    os.utime(weights, ns=(before, before))
    assert exit_status(hub.main, flags) == 2
    assert "does not have the hub's checksum" in capsys.readouterr().err
