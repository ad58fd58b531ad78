"""What stands in the page of a trace, that any text is safe in it, and how it works.

The second half opens pages in a real browser, where chromium and chromedriver are installed:

    python -m pytest tests/test_page.py
"""

import json
import os
import shlex
import shutil
import subprocess
from argparse import Namespace
from html.parser import HTMLParser

import pytest
import torch
from browser import DRIVER, MISSING, open_browser
from conftest import ROOT, exit_status, make_l2d

import sample
import solvers
from data.results import page
from data.text.answer import Answer, Stop, Trace
from sample import Settings, generate, load_model

# one that the path of data/tiny solves slowly: its first token costs 94, most of it in vain
CHAIN = "ii on cj ad fk ne pp ji mo ll gf dc ea hm bb kh;m"
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>window.hit = 1</script>",
    "</div><img src=x onerror='window.hit = 1'>",
    "<!-- <script> -->",
    "\"' onclick='window.hit = 1' x=\"",
    "&lt;b&gt; &amp; & &#60;",
    "$title ${data} $$ $",
    "\\u003cscript\\u003e </",
    "\n\nfirst\r\nsecond\tthird\x00\x07\x1b[31m\x7f\x85\xa0",
    "line\u2028paragraph\u2029end",
    "👩‍👩‍👧 🏳️‍🌈 é e\u0301",
    "שלום עולם, مرحبا",
    "\u202eevil\u202c \u2066x\u2069 \ufeff",
    "wide" * 100,
]


class Pieces:
    """A tokenizer whose token i is a text, or bytes."""

    def __init__(self, pieces):
        self.pieces = [p if isinstance(p, bytes) else p.encode() for p in pieces]

    def token_bytes(self, id):
        return self.pieces[id]

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def invented(pieces, costs=None):
    """(tokenizer, an answer of these pieces): every token is guessed last, and its neighbour first.

    Every third evaluation is of a rejected step.
    """
    tokenizer = Pieces(pieces)
    costs = costs or [5] * len(pieces)
    ids = list(range(len(pieces)))
    answer = Answer(ids=ids, nfe=costs, text=tokenizer.decode(ids))
    for token, cost in enumerate(costs):
        before = (token + 1) % len(pieces)
        predictions = [(n / (cost - 1), before if n < 2 else token, n / cost) for n in range(cost)]
        accepted = [n % 3 != 2 or n == cost - 1 for n in range(cost)]
        answer.traces.append(Trace(predictions, accepted, reached=1.0))
    return tokenizer, answer


def flags(**more):
    return Namespace(**{"init_from": "tiny", "solver": "dopri5", "steps": 8, "rtol": 1e-3,
                        "atol": 1e-3, "temperature": 0.0, "seed": 0, "trace_token": 0,
                        "html": "trace.html", **more})


def build(prompt="ab", pieces=("a", "b"), costs=None, **more):
    tokenizer, answer = invented(pieces, costs)
    return page.build_page(flags(**more), {"trace": True}, prompt, answer, tokenizer)


class Reader(HTMLParser):
    """Tags, ids and texts of a page; an AssertionError where elements do not close in order."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.tags = []              # (tag, names of its attributes)
        self.attributes = []        # (tag, all of them)
        self.texts = {}             # of elements with an id
        self.open = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names))
        self.tags.append((tag, names))
        self.attributes.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for _, name in self.open:
            if name:
                self.texts[name] = self.texts.get(name, "") + text

    def values(self, name):
        return [found[name] for _, found in self.attributes if name in found]


def data_of(text):
    return json.loads(Reader(text).texts["data"])


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def slow(tiny):
    """The answer to CHAIN, with rejected steps."""
    model, tokenizer = tiny
    settings = Settings(solver="dopri5", trace=True)
    prompt = tokenizer.encode_start(CHAIN)
    (answer,) = generate(model, [prompt], settings, Stop.of(tokenizer), seeds=[0])
    return answer


@pytest.fixture(scope="module")
def slow_page(tiny, slow):
    return page.build_page(flags(), {"trace": True}, CHAIN, slow, tiny[1])


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """sample.py in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        status = exit_status(sample.main, ["--device=cpu", "--max_new_tokens=3", *words])
        return (status, *capsys.readouterr())
    return call


# --- what is kept of every token ------------------------------------------------------------------

PROMPTS = [[5, 17, 200, 3], [9], [42, 43, 44, 45, 46, 47, 48]]
LOOSE = dict(solver="dopri5", rtol=0.1, atol=0.1)


@pytest.mark.parametrize("options", [dict(steps=3), dict(solver="heun", steps=10), LOOSE])
def test_all_tokens_of_the_first_sequence_are_traced_and_none_changes(options):
    l2d = make_l2d()
    plain = generate(l2d, PROMPTS, Settings(max_new_tokens=3, **options))
    traced = generate(l2d, PROMPTS, Settings(max_new_tokens=3, trace=True, **options))
    assert [a.ids for a in traced] == [a.ids for a in plain]
    assert [len(t.predictions) for t in traced[0].traces] == traced[0].nfe == plain[0].nfe
    assert all(a.traces == [] for a in (*plain, *traced[1:]))
    # greedily, the last look is the token
    assert [t.predictions[-1][1] for t in traced[0].traces] == traced[0].ids


@pytest.mark.parametrize("solver", solvers.FIXED)
def test_a_fixed_solver_rejects_nothing(solver):
    """Also where 3/10 + 1/10 is more than 4/10."""
    for options in (dict(), dict(max_nfe=12), dict(stop_unchanged=2)):
        settings = Settings(solver=solver, steps=10, max_new_tokens=2, trace=True, **options)
        (answer,) = generate(make_l2d(), PROMPTS[:1], settings)
        for trace in answer.traces:
            assert all(trace.accepted) and len(trace.accepted) == len(trace.predictions)
    assert 0 < trace.reached <= 1


@pytest.mark.parametrize("options", [dict(), dict(max_nfe=40), dict(stop_unchanged=20)])
def test_rejected_steps_are_those_that_the_solver_rejected(options, monkeypatch):
    """As the times tell it, and as the solver's own judgement does."""
    judged = []
    wasted = 0
    accept = solvers.AdaptiveRun.accept

    def note(self, rows, t, step, good, last):
        if rows[0] == 0:
            judged.extend([bool(good[0])] * (2 if last else 6))
        return accept(self, rows, t, step, good, last)
    monkeypatch.setattr(solvers.AdaptiveRun, "accept", note)
    settings = Settings(solver="dopri5", max_new_tokens=1, trace=True, **options)
    for seed in range(4):
        judged.clear()
        answers = generate(make_l2d(), PROMPTS, settings, seeds=[seed, 8, 9])
        (trace,) = answers[0].traces
        # around the steps stand the prediction at t = 0 and the last look
        assert trace.accepted == [True, *judged, True]
        wasted += judged.count(False)
    assert wasted


# --- what stands in the page ----------------------------------------------------------------------

def test_the_page_is_whole_and_well_formed(slow_page):
    found = Reader(slow_page)
    tags = [tag for tag, _ in found.tags]
    assert slow_page.startswith("<!DOCTYPE html>\n") and slow_page.endswith("</html>\n")
    assert [tags.count(tag) for tag in ("html", "title", "h1", "svg", "table", "script")] == [
        1, 1, 1, 1, 1, 2]
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    for name in ("aria-controls", "aria-labelledby"):
        assert found.values(name) and set(found.values(name)) <= set(ids)


def test_every_token_stands_there_with_its_cost(slow, slow_page):
    texts = Reader(slow_page).texts
    assert slow.nfe[0] > 60
    assert texts["prompt"] == CHAIN and texts["answer"] == slow.text == "p"
    assert texts["token-0"] == f"p{slow.nfe[0]}" and texts["token-1"] == f"<stop>{slow.nfe[1]}"
    assert "token-2" not in texts


def test_the_data_are_the_guesses(slow, slow_page, tiny):
    data = data_of(slow_page)
    assert [token["nfe"] for token in data["tokens"]] == slow.nfe
    for token, trace in zip(data["tokens"], slow.traces):
        assert [tuple(prediction[:3]) for prediction in token["predictions"]] == trace.predictions
        assert [prediction[3] for prediction in token["predictions"]] == trace.accepted
        assert token["reached"] == trace.reached == 1
        for _, id, _, _ in token["predictions"]:
            assert data["words"][str(id)] == tiny[1].decode([id])
    assert not all(slow.traces[0].accepted)


def test_the_legend_names_the_costs_of_every_colour_in_use():
    costs = [21, 22, 40, 60, 80, 121]
    shades = page.levels(costs)
    assert shades == [0, 0, 0, 1, 2, 4]
    text = build(pieces="abcdef", costs=costs)
    for shade, words in ((0, "21 to 40"), (1, "60"), (2, "80"), (4, "121")):
        assert f'<span class="sample cost-{shade}"></span> {words}</li>' in text
    assert "sample cost-3" not in text
    assert page.levels([9, 9]) == [0, 0] and page.levels([1, 2]) == [0, 2]


def test_nothing_is_fetched_from_anywhere(slow_page):
    names = {name for _, found in Reader(slow_page).tags for name in found}
    assert not names & {"src", "href", "srcset", "action", "style", "onclick"}
    for word in ("http:", "https:", "url(", "@import", "import(", "fetch(", "innerHTML"):
        assert word not in slow_page
    assert "default-src 'none'" in slow_page


def test_it_says_how_it_was_made():
    found = Reader(build(solver="euler", steps=16, temperature=0.5, seed=7))
    text = build(solver="euler", steps=16, temperature=0.5, seed=7)
    for name, value in (("model", "tiny"), ("solver", "euler, 16 steps"), ("temperature", "0.5"),
                        ("seed", "7"), ("cost", "10 NFE for 2 tokens, 5.0 per token")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in text
    assert found.texts["command"] == "python sample.py --trace --html trace.html --prompt ab"
    assert "dopri5, steps of its own, rtol 0.001, atol 0.001" in build()


# --- any text -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", HOSTILE)
def test_any_prompt_is_text_and_changes_no_element(text):
    plain = Reader(build())
    found = Reader(build(prompt=text))
    assert found.tags == plain.tags
    assert found.texts["prompt"] == page.visible(text)
    # the rest is printable, and so are most prompts from the start
    assert page.visible(text).replace("\n", "").replace("\t", "").isprintable() or "👩" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_any_token_is_text_and_changes_no_element(text):
    text = text.replace("\n", " ")
    plain = Reader(build(pieces=("a", "b")))
    made = build(pieces=(text, "b"))
    found = Reader(made)
    assert found.tags == plain.tags
    word = page.word(text.encode())
    assert found.texts["token-0"] == word + "5"
    assert data_of(made)["words"]["0"] == data_of(made)["tokens"][0]["word"] == word
    data = found.texts["data"]
    assert data.isascii() and not set(data) & set("<>&\u2028\u2029")


def test_a_model_name_and_the_file_are_text_too():
    plain = Reader(build())
    found = Reader(build(init_from="<b>&'\"", html="<i>.html"))
    assert found.tags == plain.tags and "'<i>.html'" in found.texts["command"]


@pytest.mark.parametrize("content, expected", [
    (b" the", " the"),
    (b" ", "␣"),
    (b"a b", "a b"),
    (b"  \n", "  ↵"),
    (b"\t", "⇥"),
    (b"\xf0\x9f", r"\xf0\x9f"),
    (b"\x1b[0m", r"\x1b[0m"),
    ("\u202e".encode(), r"\u202e"),
    ("\U000e0001".encode(), r"\U000e0001"),
    ("é".encode(), "é"),
])
def test_tokens_in_words(content, expected):
    assert page.word(content) == expected


# --- how to make it again -------------------------------------------------------------------------

def test_the_command_makes_the_same_bytes_again(run, tmp_path):
    words = ["--solver=dopri5", "--rtol=0.01", "--trace", "--seed=3", "--temperature=1",
             "--class=math", "--guidance=-0.5", "--no-frozen", "--prompt=(7*8)+15?"]
    status, out, error = run(*words, "--html=a.html")
    assert (status, error) == (0, "") and "\n   page    a.html\n" in out
    first = (tmp_path / "a.html").read_bytes()
    command = Reader(first.decode()).texts["command"]
    start, script, *rest = shlex.split(command)
    assert (start, script) == ("python", "sample.py")
    assert run(*rest, "--overwrite")[0] == 0
    assert (tmp_path / "a.html").read_bytes() == first
    # and another seed makes another page
    assert run(*rest, "--overwrite", "--seed=4")[0] == 0
    assert (tmp_path / "a.html").read_bytes() != first


def test_of_several_prompts_and_samples_the_first_is_shown(run, tmp_path):
    assert run("--trace", "--html=one.html", "--prompt=ab", "--temperature=1")[0] == 0
    (tmp_path / "prompts.txt").write_text("ab\ncd\n", encoding="utf-8")
    status, out, _ = run("--trace", "--html=many.html", "--prompt_file=prompts.txt",
                         "--num_samples=2", "--batch_size=1", "--temperature=1")
    assert status == 0 and out.count("   page    ") == 1
    one, many = ((tmp_path / f"{name}.html").read_text("utf-8") for name in ("one", "many"))
    assert many.replace("many.html", "one.html") == one


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here to read the command")
@pytest.mark.parametrize("text", [*HOSTILE, "-", "--steps", "", "it's \\n $HOME `ls` \x01f !"])
def test_the_shell_reads_the_prompt_as_it_was(text):
    # no shell can hand over a NUL
    text = text.replace("\x00", "")
    command = page.again(flags(), {"trace": True, "stop": ["a b", "-"], "label": "math"}, text)
    assert command.replace("\n", "").replace("\t", "").isprintable()
    rest = command.removeprefix("python sample.py ")
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {rest}"], capture_output=True,
                          env={**os.environ, "LC_ALL": "C.UTF-8"}, check=True)
    args = sample.build_parser().parse_args(done.stdout.decode().split("\0")[:-1])
    assert args.prompt == [text] and args.stop == ["a b", "-"] and args.label == "math"


def test_no_place_on_this_computer_is_told(run, tmp_path):
    model = ROOT / "data" / "tiny"
    status, _, _ = run(f"--init_from={model}", "--trace", f"--html={tmp_path / 'a.html'}",
                       "--prompt=ab", f"--cache_dir={tmp_path}")
    text = (tmp_path / "a.html").read_text("utf-8")
    assert status == 0 and str(tmp_path) not in text and str(ROOT) not in text
    assert "<dt>model</dt><dd>…/tiny</dd>" in text
    assert page.short("out/chains") == "out/chains" and page.short("gpt2") == "gpt2"


# --- the flags ------------------------------------------------------------------------------------

PROMPT = "--prompt=ab"


@pytest.mark.parametrize("words, message", [
    (["--html=a.html", PROMPT], "--html would do nothing: it needs --trace"),
    (["--html=a.html"], "--html would do nothing: it needs --prompt or --prompt_file"),
    (["--html=a.html", "--trace"], "--html would do nothing: it needs --prompt or --prompt_file"),
    (["--html=a.html", "--trace", PROMPT, "--steps=0"], "it needs a diffusion path, --steps of 1"),
    (["--overwrite", "--trace", PROMPT], "--overwrite would do nothing: it needs --html"),
    (["--html=gone/a.html", "--trace", PROMPT], "gone is no directory, so a.html cannot be"),
    (["--html=.", "--trace", PROMPT], "is a directory; allowed: the name of a file"),
    (["--html=", "--trace", PROMPT], "is a directory; allowed: the name of a file"),
    (["--html=old.html", "--trace", PROMPT],
     "old.html is there already, from an earlier run; allowed: another name, or --overwrite"),
])
def test_what_cannot_be_written_is_one_line_before_any_work(run, tmp_path, words, message):
    (tmp_path / "old.html").write_text("old", encoding="utf-8")
    # a model that does not exist: it would be the next thing to fail
    status, out, error = run("--init_from=nowhere", *words)
    assert (status, out) == (2, "")
    assert error.startswith("sample.py: ") and message in error and error.count("\n") == 1
    assert (tmp_path / "old.html").read_text("utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]


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
    assert (tmp_path / "a.html").read_text("utf-8") == "old"
    assert run(*words)[0] == 0
    assert (tmp_path / "a.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_a_token_that_is_not_there_is_refused_before_a_page_is_written(run, tmp_path):
    status, _, error = run("--trace", "--html=a.html", PROMPT, "--trace_token=9")
    assert status == 2 and "--trace_token 9 is out of range" in error
    assert not (tmp_path / "a.html").exists()


# --- in a browser ---------------------------------------------------------------------------------

browsing = pytest.mark.skipif(DRIVER is None, reason=MISSING)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(started, tmp_path):
    """The browser, with `show`: opens a page from disk; no test may leave a word in the console."""
    def show(text):
        (tmp_path / "trace.html").write_text(text, encoding="utf-8")
        started.open((tmp_path / "trace.html").as_uri())
    started.show = show
    started.width(1000)
    yield started
    assert started.console() == []


def text_of(browser, selector):
    return browser.script("return document.querySelector(arguments[0]).textContent", selector)


def table(browser):
    return browser.script("return Array.from(document.querySelectorAll('#rows tr'), "
                          "(row) => Array.from(row.cells, (cell) => cell.textContent))")


def expected_table(trace, word):
    """What the table should say, from the answer itself."""
    kinds = ["● accepted" if good else "× rejected" for good in trace.accepted]
    kinds[0], kinds[-1] = "◆ frozen", "■ last look"
    return [[f"{t:.4f}", f"‘{word([id])}’", f"{p:.3f}", kind]
            for (t, id, p), kind in zip(trace.predictions, kinds)]


def chosen(browser):
    """The places of the token that is shown, and of the one with the focus."""
    return browser.script(
        "const all = Array.from(document.querySelectorAll('#tokens button'));"
        "return [all.findIndex((one) => one.ariaSelected === 'true'),"
        "        all.indexOf(document.activeElement)]")


@browsing
def test_a_click_shows_the_guesses_of_a_token(browser, slow, slow_page, tiny):
    browser.show(slow_page)
    word = tiny[1].decode
    # the one asked for with --trace_token is shown from the start
    assert text_of(browser, "#name") == "Token 0: ‘p’"
    assert table(browser) == expected_table(slow.traces[0], word)
    browser.click("#token-1")
    assert text_of(browser, "#name") == "Token 1: ‘<stop>’" and chosen(browser)[0] == 1
    assert table(browser) == expected_table(slow.traces[1], word)
    browser.click("#token-0")
    assert table(browser) == expected_table(slow.traces[0], word)
    t, frozen, p = slow.traces[0].predictions[0]
    wasted = slow.traces[0].accepted.count(False)
    summary = text_of(browser, "#summary")
    assert t == 0 and f"frozen model‘{word([frozen])}’, p = {p:.3f} (the prediction at t = 0)" in summary
    assert f"evaluations{slow.nfe[0]}, {wasted} in rejected steps" in summary


@browsing
def test_the_picture_has_a_mark_for_every_evaluation(browser, slow, slow_page):
    browser.show(slow_page)
    trace = slow.traces[0]
    count = lambda selector: browser.script(
        "return document.querySelectorAll('#picture ' + arguments[0]).length", selector)
    wasted = trace.accepted.count(False)
    assert [count(f".{kind} .mark") for kind in ("frozen", "accepted", "rejected", "last")] == [
        1, len(trace.predictions) - wasted - 2, wasted, 1]
    # a form of their own, not only a colour
    assert count(".rejected path") == wasted and count(".accepted path") == 0
    assert count("tspan") == len({id for _, id, _ in trace.predictions})
    # t grows to the right, from border to border
    places = browser.script("return Array.from(document.querySelectorAll('#picture .stem'), "
                            "(stem) => Number(stem.getAttribute('x1')))")
    width = browser.script("return document.getElementById('picture').clientWidth")
    wanted = [10 + t * (width - 20) for t, _, _ in trace.predictions]
    assert places == pytest.approx(wanted, abs=0.01)


@browsing
def test_the_keyboard_alone_does_the_same(browser):
    browser.show(build(pieces="abcd", trace_token=1))
    browser.press("Tab")
    assert chosen(browser) == [1, 1]
    browser.press("Right")
    assert chosen(browser) == [1, 2]
    browser.press("Enter")
    assert chosen(browser) == [2, 2] and text_of(browser, "#name") == "Token 2: ‘c’"
    browser.press("Left", "Space")
    assert chosen(browser) == [1, 1] and text_of(browser, "#name") == "Token 1: ‘b’"
    browser.press("Home", "Left", "Enter")
    assert chosen(browser) == [0, 0]
    browser.press("End", "Right", "Enter")
    assert chosen(browser) == [3, 3]
    reachable = browser.script("return Array.from(document.querySelectorAll('#tokens button'), "
                               "(button) => button.tabIndex)")
    assert reachable == [-1, -1, -1, 0]
    # one Tab leads from the tokens to what they show
    browser.press("Tab")
    assert browser.script("return document.activeElement.id") == "panel"


@browsing
def test_where_text_runs_to_the_left_so_do_the_arrows(browser):
    browser.show(build(pieces=["שלום", " עולם"]))
    browser.press("Tab", "Left", "Enter")
    assert chosen(browser) == [1, 1]
    x = [browser.script("return document.getElementById(arguments[0]).getBoundingClientRect().x",
                        f"token-{place}") for place in (0, 1)]
    assert x[0] > x[1]


@browsing
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_runs_nothing(browser, text):
    browser.show(build(prompt=text, pieces=(text, "b", "<script>window.hit = 1</script>")))
    assert text_of(browser, "#prompt") == page.visible(text)
    assert text_of(browser, "#name") == f"Token 0: ‘{page.word(text.encode())}’"
    assert table(browser)[-1][1] == f"‘{page.word(text.encode())}’"
    browser.click("#token-2")
    assert text_of(browser, "#name").endswith("‘<script>window.hit = 1</script>’")
    assert browser.script("return window.hit") is None
    assert browser.script("return document.scripts.length") == 2


@browsing
def test_even_a_script_that_came_in_would_not_run(browser):
    browser.show(build().replace("<main>", "<main><script>window.hit = 1</script>"))
    assert browser.script("return window.hit") is None
    (line,) = browser.console()
    assert "Content Security Policy" in line
    # the page's own script is not hindered
    assert text_of(browser, "#name") == "Token 0: ‘a’"


# every text and mark that is seen: (what, its colour, the colour behind it)
SEEN = """
function solid(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
}
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  if (!box.width || element.closest("script, noscript")) continue;
  const own = Array.from(element.childNodes).some(
    (node) => node.nodeType === 3 && node.textContent.trim());
  const drawn = element.closest("svg");
  const name = element.tagName + "." + element.getAttribute("class");
  if (own) found.push(["text " + name, drawn ? style.fill : style.color, solid(element)]);
  if (drawn && element.matches(".mark")) found.push(["mark " + name, style.fill, solid(element)]);
}
return found;
"""


def luminance(colour: str) -> float:
    """Of `rgb(r, g, b)`, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@browsing
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser, scheme):
    # a token of every colour
    browser.prefer(scheme)
    browser.show(build(pieces="abcdef", costs=[21, 40, 60, 80, 100, 121]))
    seen = browser.script(SEEN)
    assert len({behind for _, _, behind in seen}) == 7
    assert sum(what.startswith("mark") for what, _, _ in seen) == 21
    for what, colour, behind in seen:
        needed = 4.5 if what.startswith("text") else 3
        assert contrast(colour, behind) >= needed, what
    paper = browser.script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.1) == (scheme == "dark")


@browsing
@pytest.mark.parametrize("width", [320, 400])
def test_a_phone_shows_it_without_scrolling_sideways(browser, width):
    browser.width(width)
    browser.show(build(prompt="wide" * 100, pieces=["wide" * 100, " <b>" * 40, "c"] * 5))
    assert browser.script("return document.documentElement.scrollWidth") == width
    browser.click("#token-2")
    size = browser.script("return document.getElementById('picture').getBBox().width")
    assert 0.8 * width < size < width


@browsing
def test_the_picture_follows_the_window(browser, slow_page):
    browser.show(slow_page)
    before = browser.script("return document.getElementById('picture').getBBox().width")
    browser.width(500)
    after = browser.script("return new Promise((done) => requestAnimationFrame(() => "
                           "done(document.getElementById('picture').getBBox().width)))")
    assert before > 700 and after < 500
