"""The page of a trace: its content, that any text is safe in it, and how it works in a browser.

The last part opens pages in headless Chromium, where it is installed.
"""

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from html.parser import HTMLParser

import pytest
from conftest import ROOT, exit_status, make_l2d

import sample
import solvers
from data.results import page
from data.text.answer import Answer, Stop, Trace, TraceFirst
from sample import Settings, generate

HOSTILE = [
    "</script><script>window.hit = 1</script><!-- <script> -->",
    "</div><img src=x onerror='window.hit = 1'>",
    "\"' onclick='window.hit = 1' x=\" &lt;b&gt; &amp; & &#60;",
    "$title ${data} $$ $ \\u003cscript\\u003e </",
    "\n\nfirst\r\nsecond\tthird\x00\x07\x1b[31m\x7f\x85\xa0 line\u2028paragraph\u2029end",
    "👩‍👩‍👧 🏳️‍🌈 é e\u0301 שלום עולם, مرحبا",
    "\u202eevil\u202c \u2066x\u2069 \ufeff",
    "wide" * 100,
]
SIGNS = {"frozen": "◆ frozen prediction", "evaluation": "● evaluation",
         "rejected": "× evaluation of a rejected step", "final": "■ final evaluation"}


class Pieces:
    """A tokenizer whose token i is a text."""

    def __init__(self, pieces):
        self.pieces = pieces

    def token_bytes(self, token):
        return self.pieces[token].encode()

    def decode(self, ids):
        return "".join(self.pieces[token] for token in ids)


def build(prompt="ab", pieces=("a", "b"), nfe=5, reached=1.0, **more):
    """The page of an answer of these pieces, of five evaluations a token, the third rejected.

    A token is predicted last, its neighbour first.
    """
    tokenizer = Pieces(pieces)
    answer = Answer(Stop(tokenizer=tokenizer), list(range(len(pieces))), [nfe] * len(pieces))
    for token in answer.ids:
        before = (token + 1) % len(pieces)
        predictions = [(n / 4, before if n < 2 else token, n / 5) for n in range(5)]
        answer.traces.append(Trace(predictions, [n != 2 for n in range(5)], reached))
    # a stop token has a cost and a trace, but no place among the ids
    answer.nfe.append(9)
    answer.traces.append(Trace([(0.0, 0, 0.5), (1.0, 0, 0.5)], [True, True], 1.0))
    flags = {"init_from": "tiny", "solver": "dopri5", "steps": 8, "rtol": 1e-3, "atol": 1e-3,
             "temperature": 0.0, "seed": 0, "trace_token": 0, "html": "trace.html", **more}
    return page.build_page(Namespace(**flags), {"trace": True}, prompt, answer, tokenizer)


class Reader(HTMLParser):
    """Tags and texts of a page; an AssertionError where elements do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags = []              # (tag, names of its attributes)
        self.texts = {}             # of elements with an id
        self.open = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, [name for name, _ in attributes]))
        if tag not in ("meta", "br"):
            self.open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for _, name in self.open:
            self.texts[name] = self.texts.get(name, "") + text


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """sample.py in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        status = exit_status(sample.main, ["--device=cpu", "--max_new_tokens=3", *words])
        return (status, *capsys.readouterr())
    return call


# --- the trace of every token ---------------------------------------------------------------------

PROMPTS = [[5, 17, 200, 3], [9], [42, 43, 44, 45, 46, 47, 48]]
LOOSE = dict(solver="dopri5", rtol=0.1, atol=0.1)
# 3/10 + 1/10 is more than 4/10
TENTHS = [dict(solver=name, steps=10, **more) for name in solvers.FIXED
          for more in (dict(), dict(max_nfe=12), dict(stop_unchanged=2))]


@pytest.mark.parametrize("options", [*TENTHS, LOOSE], ids=str)
def test_all_tokens_of_the_first_sequence_are_traced_and_none_changes(options):
    l2d = make_l2d()
    plain = generate(l2d, PROMPTS, Settings(max_new_tokens=3, **options))
    traced = generate(l2d, PROMPTS, Settings(max_new_tokens=3, **options), watch=TraceFirst())
    assert [a.ids for a in traced] == [a.ids for a in plain]
    assert all(a.traces == [] for a in (*plain, *traced[1:]))
    traces = traced[0].traces
    assert [len(t.predictions) for t in traces] == traced[0].nfe == plain[0].nfe
    # greedily, the final evaluation predicts the token
    assert [t.predictions[-1][1] for t in traces] == traced[0].ids
    for trace in traces:
        assert len(trace.accepted) == len(trace.predictions) and 0 < trace.reached <= 1
        assert all(trace.accepted) or options is LOOSE


@pytest.mark.parametrize("options", [dict(), dict(max_nfe=40), dict(stop_unchanged=20)])
def test_rejected_steps_are_those_that_the_solver_rejected(options, monkeypatch):
    """The trace derives them from the times; the solver's own verdicts must agree."""
    seen, solved = [], []
    velocity = solvers.Sequences.velocity

    def note(self, t, x):
        solved[:] = [self]
        if self.rows[0] == 0:
            seen.append((int(self.accepted[0]), int(self.rejected[0])))
        return velocity(self, t, x)
    monkeypatch.setattr(solvers.Sequences, "velocity", note)
    settings = Settings(solver="dopri5", max_new_tokens=1, **options)
    rejected = 0
    for seed in range(4):
        seen.clear()
        answers = generate(make_l2d(), PROMPTS, settings, seeds=[seed, 8, 9], watch=TraceFirst())
        (trace,) = answers[0].traces
        # the counts after the step of each evaluation: the next ones that differ
        counts = [*seen, (int(solved[0].accepted[0]), int(solved[0].rejected[0]))]
        verdicts = []
        for place, count in enumerate(seen):
            after = next(later for later in counts[place:] if later != count)
            verdicts.append(after[1] == count[1])
        # the frozen prediction before the steps, the final evaluation after them
        assert trace.accepted == [True, *verdicts[1:], True]
        rejected += verdicts.count(False)
    assert rejected


# --- the content of the page ----------------------------------------------------------------------

def test_a_page_shows_every_token_with_its_cost_and_holds_its_predictions():
    texts = Reader(build()).texts
    assert texts["prompt"] == texts["answer"] == "ab"
    assert [texts[f"token-{n}"] for n in range(3)] == ["a5", "b5", "<stop>9"]
    # coloured from the cheapest to the dearest
    assert re.findall(r"--cost: (\d+)%", build()) == ["0", "0", "100"]
    first, _, stop = json.loads(texts["data"])["tokens"]
    assert first["predictions"] == [[0.0, "b", 0.0, "frozen"], [0.25, "b", 0.2, "evaluation"],
                                    [0.5, "a", 0.4, "rejected"], [0.75, "a", 0.6, "evaluation"],
                                    [1.0, "a", 0.8, "final"]]
    assert first["note"] == "5 evaluations, 1 of rejected steps; 5 NFE"
    assert stop["note"].startswith("2 evaluations, 0 of rejected steps; 9 NFE (two for each")
    first = json.loads(Reader(build(reached=0.5)).texts["data"])["tokens"][0]
    assert first["note"].endswith("5 NFE; the solver stopped at t = 0.5000")


def test_a_page_states_the_settings_and_downloads_nothing():
    text = build(solver="euler", steps=16, temperature=0.5, seed=7)
    for name, value in (("model", "tiny"), ("solver", "euler, 16 steps"), ("temperature", "0.5"),
                        ("seed", "7"), ("cost", "19 NFE for 3 tokens, 6.3 per token")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in text
    assert "dopri5, adaptive steps, rtol 0.001, atol 0.001" in build()
    assert not re.search(r"https?:|url\(|@import|innerHTML|\b(src|href|onclick)=", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_text_and_changes_no_element(text):
    plain = Reader(build()).tags
    found = Reader(build(prompt=text, init_from="<b>&'\"", html="<i>.html"))
    assert found.tags == plain and "'<i>.html'" in found.texts["command"]
    assert found.texts["prompt"] == page.escaped(text, page.JOINERS + "\n\t")
    token = text.replace("\n", " ")
    found = Reader(build(pieces=(token, "b")))
    word = page.word(token.encode())
    assert found.tags == plain and found.texts["token-0"] == word + "5"
    assert json.loads(found.texts["data"])["tokens"][0]["word"] == word
    assert found.texts["data"].isascii() and "<" not in found.texts["data"]


def test_a_token_as_a_word():
    for content, expected in [
            (b" the", " the"), (b" ", "␣"), (b"  \n\t", "  ↵⇥"), (b"\xf0\x9f", r"\xf0\x9f"),
            ("\x1b[0m\x85\u202e\U000e0001é".encode(), r"\x1b[0m\u0085\u202e\U000e0001é")]:
        assert page.word(content) == expected


# --- the command ----------------------------------------------------------------------------------

def test_the_command_makes_the_same_bytes_again(run, tmp_path):
    words = ["--solver=dopri5", "--rtol=0.01", "--trace", "--seed=3", "--temperature=1",
             "--class=math", "--guidance=-0.5", "--no-frozen", "--prompt=(7*8)+15?"]
    status, out, error = run(*words, "--html=a.html")
    assert (status, error) == (0, "") and "\n   page    a.html\n" in out
    first = (tmp_path / "a.html").read_bytes()
    start, script, *rest = shlex.split(Reader(first.decode()).texts["command"])
    assert (start, script) == ("python", "sample.py")
    assert run(*rest, "--overwrite")[0] == 0
    assert (tmp_path / "a.html").read_bytes() == first
    # another seed makes another page
    assert run(*rest, "--overwrite", "--seed=4")[0] == 0
    assert (tmp_path / "a.html").read_bytes() != first


def test_the_first_of_several_prompts_and_samples_is_shown(run, tmp_path):
    assert run("--trace", "--html=one.html", "--prompt=ab", "--temperature=1")[0] == 0
    (tmp_path / "prompts.txt").write_text("ab\ncd\n", encoding="utf-8")
    status, out, _ = run("--trace", "--html=many.html", "--prompt_file=prompts.txt",
                         "--num_samples=2", "--batch_size=1", "--temperature=1")
    assert status == 0 and out.count("   page    ") == 1
    one, many = ((tmp_path / f"{name}.html").read_text("utf-8") for name in ("one", "many"))
    assert many.replace("many.html", "one.html") == one


@pytest.mark.skipif(not shutil.which("bash") or sys.getfilesystemencoding() != "utf-8",
                    reason="no bash here, or no arguments in UTF-8")
@pytest.mark.parametrize("text", [*HOSTILE, "-", "--steps", "", "it's \\n $HOME `ls` \x01f !"])
def test_the_shell_reads_the_prompt_as_it_was(text):
    # a NUL cannot be passed to a program
    text = text.replace("\x00", "")
    flags = Namespace(html="trace.html")
    command = page.again(flags, {"trace": True, "stop": ["a b", "-"], "class": "math"}, text)
    assert command.replace("\n", "").replace("\t", "").isprintable()
    rest = command.removeprefix("python sample.py ")
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {rest}"], capture_output=True,
                          check=True)
    args = sample.build_parser().parse_args(done.stdout.decode().split("\0")[:-1])
    assert args.prompt == [text] and args.stop == ["a b", "-"] and args.label == "math"


def test_no_path_of_this_computer_is_in_the_page(run, tmp_path):
    status, _, _ = run(f"--init_from={ROOT / 'data' / 'tiny'}", "--trace", "--prompt=ab",
                       f"--html={tmp_path / 'a.html'}", f"--cache_dir={tmp_path}")
    text = (tmp_path / "a.html").read_text("utf-8")
    assert status == 0 and str(tmp_path) not in text and str(ROOT) not in text
    assert "<dt>model</dt><dd>…/tiny</dd>" in text
    assert page.short("out/chains") == "out/chains" and page.short("gpt2") == "gpt2"


# --- the flags ------------------------------------------------------------------------------------

PROMPT = "--prompt=ab"


@pytest.mark.parametrize("words, message", [
    (["--html=a.html", PROMPT], "--html would do nothing: it needs --trace"),
    (["--html=a.html", "--trace", PROMPT, "--steps=0"], "it needs a diffusion path, --steps of 1"),
    (["--overwrite", "--trace", PROMPT], "--overwrite would do nothing: it needs --html"),
    (["--html=gone/a.html", "--trace", PROMPT], "gone is no directory, so a.html cannot be"),
    (["--html=", "--trace", PROMPT], "is a directory; allowed: the name of a file"),
    (["--html=old.html", "--trace", PROMPT],
     "old.html is there already, from an earlier run; allowed: another name, or --overwrite"),
])
def test_a_page_that_cannot_be_written_is_one_line_before_any_work(run, tmp_path, words, message):
    (tmp_path / "old.html").write_text("old", encoding="utf-8")
    # a model that does not exist: it would fail next
    status, out, error = run("--init_from=nowhere", *words)
    assert (status, out) == (2, "")
    assert error.startswith("sample.py: ") and message in error and error.count("\n") == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_old_page_goes_only_when_the_new_one_is_whole(run, tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text("old", encoding="utf-8")
    words = ["--trace", "--html=a.html", "--overwrite", PROMPT]

    def full(self, text, **more):
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(page.Path, "write_text", full)
        status, _, error = run(*words)
    assert status == 2 and "No space left" in error
    # a token that the answer does not have
    assert run(*words, "--trace_token=9")[0] == 2
    assert (tmp_path / "a.html").read_text("utf-8") == "old"
    assert run(*words)[0] == 0
    assert (tmp_path / "a.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark, paper, ink", [(0, "#ffffff", "#000000"), (1, "#1e1e1e", "#ffffff")])
def test_text_is_readable_in_light_and_dark(dark, paper, ink):
    table = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\);", page.FORM.read_text("utf-8"))
    colours = {name: pair[dark] for name, *pair in table}
    behind = [colours.pop(name) for name in ("card", "fewest", "most")]
    del colours["line"]
    assert len(colours) == 5
    for one, other in [(paper, text) for text in colours.values()] + [(ink, b) for b in behind]:
        low, high = sorted((luminance(one), luminance(other)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (one, other)


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browsing = pytest.mark.skipif(not CHROMIUM, reason="no chromium here; apt-get install chromium")
# stands before the page's policy, which would not let it run
PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.effectiveDirective));
const all = (selector) => Array.from(document.querySelectorAll(selector));
const texts = (selector) => all(selector).map((one) => one.textContent);
addEventListener("load", () => setTimeout(() => {
  const value = (() => { %s })();
  const probe = document.createElement("pre");
  probe.textContent = JSON.stringify([value, errors, window.hit ?? null]);
  document.body.replaceChildren(probe);
}, 100));
</script>"""


def browse(folder, text: str, script: str, errors=()):
    """The value that a script returns in a copy of a page; no other script may run."""
    copy = folder / "trace.html"
    copy.write_text(text.replace("<head>", "<head>" + PROBE % script), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=2000", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, encoding="utf-8", check=True, timeout=120)
    found = re.search("<pre>(.*)</pre>", done.stdout, re.S)[1]
    value, *rest = json.loads(html.unescape(found))
    assert rest == [list(errors), None]
    return value


@browsing
def test_the_chosen_token_is_shown_in_lanes_and_in_a_table(tmp_path):
    text = build(trace_token=1)
    shown = browse(tmp_path, text, """
        const state = () => ({
          name: texts("#name, #note"),
          rows: all("#rows tr").map((row) => Array.from(row.cells, (cell) => cell.textContent)),
          lanes: all(".lane").map((lane) => Array.from(lane.querySelectorAll("span"), (mark) =>
            [mark.textContent, mark.className, mark.style.left, mark.style.height])),
          line: document.querySelector("polyline").getAttribute("points").split(/[ ,]/).map(Number),
        });
        const first = state();
        all("#tokens button")[0].click();
        return [first, state()];""")
    tokens = json.loads(Reader(text).texts["data"])["tokens"]
    for place, state in zip((1, 0), shown):
        word, predictions = tokens[place]["word"], tokens[place]["predictions"]
        assert state["name"] == [f"Predictions of token {place}: {word}", tokens[place]["note"]]
        assert state["rows"] == [[f"{t:.4f}", one, f"{p:.3f}", SIGNS[kind]]
                                 for t, one, p, kind in predictions]
        # first the lane of the neighbour, then that of the token
        marks = [[SIGNS[kind][0], kind, f"{100 * t:g}%", f"{100 * p:g}%"]
                 for t, _, p, kind in predictions]
        assert state["lanes"] == [marks[:2], marks[2:]]
        assert state["line"] == pytest.approx([0, 1, 0.25, 0.88, 0.75, 1.64, 1, 1.52])


@browsing
def test_the_keyboard_chooses_a_token(tmp_path):
    script = """
        const buttons = all("#tokens button");
        buttons.find((button) => button.tabIndex === 0).focus();
        return KEYS.map((key) => {
          const press = new KeyboardEvent("keydown", { key, bubbles: true });
          document.activeElement.dispatchEvent(press);
          return [buttons.findIndex((button) => button.ariaSelected === "true"),
                  buttons.findIndex((button) => button.tabIndex === 0),
                  buttons.indexOf(document.activeElement), Number(texts("#place")[0])];
        });"""
    keys = ["x", "ArrowRight", "ArrowLeft", "Home", "ArrowLeft", "End", "ArrowRight"]
    found = browse(tmp_path, build(trace_token=1), script.replace("KEYS", json.dumps(keys)))
    assert found == [[place] * 4 for place in (1, 2, 1, 0, 0, 2, 2)]
    # where text runs to the left, so do the arrows
    hebrew = build(pieces=["שלום", " עולם"])
    found = browse(tmp_path, hebrew, script.replace("KEYS", '["ArrowLeft"]'))
    assert found == [[1] * 4]


@browsing
def test_hostile_text_is_shown_and_does_not_run(tmp_path):
    prompt = "".join(HOSTILE)
    # the policy stops even a script that got inside, but not the page's own
    text = build(prompt=prompt, pieces=HOSTILE).replace("</h1>", "</h1><script>hit = 1</script>")
    found = browse(tmp_path, text, """
        const shown = all("#tokens button").map((button) => {
          button.click();
          return [texts("#word")[0], texts("#rows bdi").pop()];
        });
        return [texts("#prompt")[0], shown, performance.getEntriesByType("resource").length];
        """, errors=["script-src-elem"])
    words = [page.word(piece.encode()) for piece in HOSTILE]
    assert found[0] == page.escaped(prompt, page.JOINERS + "\n\t")
    assert found[1] == [*([word, word] for word in words), ["<stop>", words[0]]] and found[2] == 0


@browsing
def test_a_phone_shows_the_page_without_scrolling_sideways(tmp_path):
    text = build(prompt="wide" * 100, pieces=["wide" * 100, " <b>" * 40, "c"] * 5)
    # the browser makes no window that is so narrow; 16 pixels of padding on each side
    found = browse(tmp_path, text, """
        document.body.style.width = "288px";
        return [document.body.clientWidth, document.body.scrollWidth];""")
    assert found == [320, 320]
