"""A headless Chromium, steered over WebDriver's HTTP with the standard library alone.

    with open_browser(tmp_path) as browser:
        browser.open("file:///.../trace.html")
        browser.script("return document.title")

Needs Debian's packages chromium and chromium-driver; `MISSING` says so where they are not there.
The commands are those of https://www.w3.org/TR/webdriver2, and Chromium's own for two things that
the standard lacks: the console, and what the system prefers.
"""

import base64
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from contextlib import contextmanager

DRIVER = shutil.which("chromedriver")
MISSING = "no chromedriver here; apt-get install chromium chromium-driver"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
]
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Space": " ", "Right": "\ue014", "Left": "\ue012",
        "Home": "\ue011", "End": "\ue010"}
# of localhost no proxy is asked
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def open_browser(folder):
    """Yield a Browser whose profile is in `folder`, and end it."""
    process = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        # it chooses a free port, and says which
        found = (re.search(r"on port (\d+)\.", line) for line in process.stdout)
        port = next(match[1] for match in found if match)
        browser = Browser(f"http://localhost:{port}", folder)
        yield browser
        browser.ask("DELETE", "")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


class Browser:
    """One session: every method is one command, or a few."""

    def __init__(self, root: str, folder):
        self.root = f"{root}/session"
        wanted = {
            "goog:chromeOptions": {"args": [*FLAGS, f"--user-data-dir={folder}"]},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.root += "/" + session["sessionId"]

    def ask(self, method: str, path: str, content: dict | None = None):
        """One command; returns its value. Raises RuntimeError with what the driver says."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.root + path, data, method=method)
        try:
            with OPENER.open(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, url: str):
        self.ask("POST", "/url", {"url": url})

    def script(self, text: str, *args):
        """The value that a script returns."""
        return self.ask("POST", "/execute/sync", {"script": text, "args": args})

    def click(self, selector: str):
        """A real click in the middle of an element, which must be in sight and on top."""
        using = {"using": "css selector", "value": selector}
        (element,) = self.ask("POST", "/element", using).values()
        self.ask("POST", f"/element/{element}/click", {})

    def press(self, *names: str):
        """Keys, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": KEYS[name]}
                   for name in names for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions",
                 {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def console(self) -> list:
        """What the console has said since the last call."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]

    def chrome(self, command: str, **params):
        """A command of Chromium's DevTools."""
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def prefer(self, scheme: str):
        """light or dark, as a system would say."""
        wanted = [{"name": "prefers-color-scheme", "value": scheme}]
        self.chrome("Emulation.setEmulatedMedia", features=wanted)

    def width(self, pixels: int):
        self.chrome("Emulation.setDeviceMetricsOverride",
                    width=pixels, height=900, deviceScaleFactor=1, mobile=pixels < 600)

    def picture(self) -> bytes:
        """A PNG of the whole page."""
        shot = self.chrome("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])
