"""Asking the hub's servers: redirects, the access token, failures that pass and failures that stay.

hub.py knows which files make a model, this file only how one address is asked, with nothing but
the standard library. `open_url` asks once, `retry` asks again where that may help. All that can
go wrong ends as a `HubError`, one line that names the remedy. Read data/checkpoints/hub.py next.
"""

import http.client
import os
import re
import ssl
import sys
from contextlib import suppress
from email.utils import parsedate_to_datetime
from time import sleep, time
from urllib.error import HTTPError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

TIMEOUT = 30            # seconds without a byte after which a server counts as stalled
RETRIES = 5             # failures in a row, each without a new byte
BACKOFF = 1.0           # seconds before the first retry, doubled before each further one
LONGEST_WAIT = 300      # seconds; a server that asks for more is not waited for
CHUNK = 1 << 20         # bytes
REDIRECTS = (301, 302, 303, 307, 308)


class HubError(OSError):
    """A download that cannot succeed; the message is one line that names the remedy."""


class Temporary(Exception):
    """A failure that may pass: `retry` tries again, after `wait` seconds if the server said so."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


# --- one address ----------------------------------------------------------------------------------

class NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *args):
        # `open_url` follows redirects itself: urllib's way would hand the token to the other host
        return None


def open_url(url, method="GET", start=0, accept=(), enough=None):
    """Return the open answer of `url` from byte `start` on.

    A status in `accept` is an answer too, any other but success is raised. A HEAD ends at the hub's
    redirect to another host if its headers are `enough`: they state the facts about the file.
    """
    here = url
    for _ in range(10):
        answer = ask(make_request(url, here, method, start), here)
        if 200 <= answer.status < 300 or answer.status in accept:
            return answer
        if answer.status not in REDIRECTS:
            with answer:
                raise failure_of(answer, url, here)
        target = urljoin(here, answer.headers.get("Location", ""))
        if method == "HEAD" and origin(target) != origin(url) and enough(answer.headers):
            return answer
        answer.close()
        # urllib would open file:// as well, so a server could have us read our own disk
        if not target.startswith(("https://", "http://")):
            break
        here = target
    raise HubError(f"{url} redirects without end or to no web address: check HF_ENDPOINT")


def make_request(url, here, method, start):
    """What to send to `here`, where the redirects of `url` have led."""
    request = Request(here, headers={"User-Agent": "nanoL2D"}, method=method)
    if start:
        request.add_header("Range", f"bytes={start}-")
    token = access_token()
    # the other host, where large files lie, has its own signature in the address
    if token and origin(here) == origin(url):
        request.add_header("Authorization", f"Bearer {token}")
    return request


def ask(request, here):
    """The server's answer, whatever its status."""
    try:
        return build_opener(NoRedirect).open(request, timeout=TIMEOUT)
    except HTTPError as answer:
        # an error to urllib, to us an answer like any other
        return answer
    except (OSError, http.client.HTTPException) as error:
        raise unreachable(error, here) from None


def body(answer, limit):
    """Yield at most `limit` bytes in blocks."""
    while limit > 0:
        try:
            # read1 returns what has arrived: a slow download shows, and keeps, every bit of it
            block = answer.read1(min(CHUNK, limit))
        except (OSError, http.client.HTTPException) as error:
            # raised as what it is: an OSError would be taken for a full disk
            raise unreachable(error, answer.url) from None
        if not block:
            return
        limit -= len(block)
        yield block


def origin(url):
    """Scheme and host with port."""
    return urlsplit(url)[:2]


def access_token() -> str:
    token = os.environ.get("HF_TOKEN", "").strip()
    # a line break in it would end the header and begin another; the message must not repeat it
    if not re.fullmatch("[!-~]*", token):
        raise ValueError("HF_TOKEN contains a character that no token has: "
                         "copy it again from the hub's settings")
    return token


# --- what went wrong ------------------------------------------------------------------------------

def unreachable(error, url):
    """A connection that failed, as an exception to raise."""
    host = urlsplit(url).netloc
    # urllib wraps what happened, http.client does not
    reason = getattr(error, "reason", error)
    # no certificate gets better by waiting
    if isinstance(reason, ssl.SSLCertVerificationError):
        return HubError(f"the certificate of {host} cannot be verified "
                        f"({reason.verify_message}): point the environment variable "
                        "SSL_CERT_FILE to your system's certificates")
    return Temporary(f"could not reach {host} ({reason})")


def failure_of(answer, url, here):
    """An HTTP error, as an exception to raise; `here` is where the redirects of `url` led."""
    code = answer.code
    host = urlsplit(here).netloc
    if code == 429 or code >= 500:
        return Temporary(f"{host} answered HTTP {code}", stated_wait(answer))
    # only the hub knows of licences and tokens: another host refuses for reasons of its own
    if code in (401, 403) and origin(here) == origin(url):
        return refusal(code, url)
    return HubError(f"{host} answered HTTP {code} ({answer.reason}) for {url}: "
                    "check the name and HF_ENDPOINT")


def refusal(code, url):
    """The hub wants to know who asks, or knows and refuses."""
    page = url.split("/resolve/")[0]
    settings = "{}://{}/settings/tokens".format(*origin(url))
    if access_token():
        return HubError(f"HF_TOKEN was refused for {page} (HTTP {code}): accept the licence on "
                        f"that page with the token's own account, and check at {settings} that "
                        "the token is valid and may read gated models")
    # the hub does not tell strangers which of the three it is
    return HubError(f"{page} is gated, private or does not exist (HTTP {code}): accept its "
                    f"licence on that page, then set HF_TOKEN to a token from {settings}")


def stated_wait(answer):
    """Seconds that a busy server asks for, or None."""
    # the standard header, a number or a date
    text = answer.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    with suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    # the hub's own, such as "resolvers";r=0;t=42
    reset = re.search(r";\s*t=(\d+)", answer.headers.get("RateLimit", ""))
    if reset and answer.code == 429:
        return float(reset[1])
    return None


# --- once more ------------------------------------------------------------------------------------

def no_progress():
    """For an action that leaves nothing behind when it fails."""
    return 0


def retry(action, progress=no_progress):
    """Return action(); after a temporary failure wait and try again.

    Up to RETRIES times in a row without progress(), a number of bytes.
    """
    failures = 0
    best = progress()
    while True:
        try:
            return action()
        except Temporary as failure:
            reached = progress()
            # Only bytes beyond the best so far count, or a file that always arrives damaged would
            # be fetched for ever.
            if reached > best:
                best = reached
                failures = 0
            failures += 1
            wait_or_give_up(failure, failures)


def wait_or_give_up(failure, failures):
    wait = failure.wait
    if wait is None:
        wait = BACKOFF * 2 ** (failures - 1)
    advice = ""
    if wait > LONGEST_WAIT:
        advice = f"wait {wait:.0f} s"
    elif failures > RETRIES:
        advice = f"given up after {RETRIES} retries"
    if advice:
        raise HubError(f"{failure}: {advice}; the same command resumes, "
                       "and --init_from=<directory> works offline") from None
    # on stderr: what the command prints on stdout is the folder alone
    tqdm.write(f"{failure}: trying again in {wait:.0f} s ({failures} of {RETRIES})",
               file=sys.stderr)
    sleep(wait)
