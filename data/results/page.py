"""A page that shows what every token of an answer cost: `sample.py --trace --html trace.html`.

One file for any browser, which fetches nothing. Its form is trace.html (style and script
included: read it next); here the form is filled in. Prompts and tokens may be any text, also text
that was written to harm: none of it ever stands in the page as anything but text.
"""

import base64
import hashlib
import html
import json
import shlex
from pathlib import Path
from string import Template

from data.system.disk import appearing

FORM = Path(__file__).with_name("trace.html")
LEVELS = 5                      # colours of tokens, the classes cost-0 to cost-4 of the form
JOINERS = "\u200c\u200d"        # invisible, but emoji and Persian are spelled with them
# flags that change nothing in one answer, or that `again` writes itself
LEFT_OUT = ("prompt", "prompt_file", "num_samples", "batch_size", "cache_dir", "html", "overwrite")
PATHS = ("init_from", "base")


def write_page(args, given: dict, prompt: str, answer, tokenizer):
    """Write the page of one answer to args.html, whole or not at all.

    args, given  the flags of sample.py: all of them, and those that stood on the command line
    answer       with the Trace of every token

    Raises OSError where it cannot be written.
    """
    page = build_page(args, given, prompt, answer, tokenizer)
    with appearing(args.html) as part:
        part.write_text(page, encoding="utf-8", newline="\n")


def build_page(args, given: dict, prompt: str, answer, tokenizer) -> str:
    """The page as text: the same bytes for the same answer."""
    form = FORM.read_text(encoding="utf-8")
    words = words_of(answer, tokenizer)
    shades = levels(answer.nfe)
    # one pass: a `$` in a prompt is not looked at again
    return Template(form).substitute(
        script_hash=script_hash(form),
        title=html.escape(visible(prompt, keep="")[:60]),
        prompt=html.escape(visible(prompt)),
        answer=html.escape(visible(answer.text)),
        legend=legend(answer.nfe, shades),
        tokens=buttons(words, answer.nfe, shades),
        facts=facts(args, answer),
        command=html.escape(again(args, given, prompt)),
        data=embedded(trace_data(args.trace_token, words, answer, tokenizer)),
    )


def script_hash(form: str) -> str:
    """What the page's policy allows: its own script by checksum, so that no other would run."""
    script = form.split("<script>")[1].split("</script>")[0]
    digest = hashlib.sha256(script.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


# --- text, made safe ------------------------------------------------------------------------------

def visible(text: str, keep: str = "\n\t") -> str:
    """Text whose control characters and invisible marks are spelled out, such as \\x07."""
    keep += JOINERS
    return "".join(c if c.isprintable() or c in keep else spelled(c) for c in text)


def spelled(c: str) -> str:
    """A character as an escape that Python and the shell's $'...' both know."""
    code = ord(c)
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def word(content: bytes) -> str:
    """The bytes of a token in one line; of half a character, its bytes."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in content)
    # a space between letters is seen, one alone is not
    if text.strip(" ") == "":
        text = text.replace(" ", "␣")
    return visible(text.replace("\n", "↵").replace("\t", "⇥"), keep="")


def words_of(answer, tokenizer) -> list:
    """Every token of an answer as one word, its end included."""
    words = [word(tokenizer.token_bytes(token)) for token in answer.ids]
    # what ended the answer is no part of its text, but was paid for
    if len(words) < len(answer.nfe):
        words.append("<stop>")
    return words


def embedded(content) -> str:
    """JSON that may stand inside a page: nothing in it can end its element or begin another."""
    # ASCII only: U+2028 and U+2029 are escapes already
    text = json.dumps(content)
    for c in "<>&":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text


# --- the parts of the page ------------------------------------------------------------------------

def trace_data(first: int, words: list, answer, tokenizer) -> dict:
    """What the script shows: first the token `first`; guesses are [t, token id, p, accepted]."""
    tokens = []
    for text, nfe, trace in zip(words, answer.nfe, answer.traces):
        predictions = [[*one, good] for one, good in zip(trace.predictions, trace.accepted)]
        tokens.append({"word": text, "nfe": nfe, "reached": trace.reached,
                       "predictions": predictions})
    ids = sorted({prediction[1] for token in tokens for prediction in token["predictions"]})
    names = {token: word(tokenizer.token_bytes(token)) for token in ids}
    return {"first": first, "tokens": tokens, "words": names}


def levels(costs: list) -> list:
    """The colour of every cost, from 0 (the cheapest) up to LEVELS - 1."""
    low = min(costs)
    span = max(costs) - low + 1
    return [(cost - low) * LEVELS // span for cost in costs]


def legend(costs: list, shades: list) -> str:
    """A sample of every colour in use, with the costs it stands for."""
    lines = []
    for shade in sorted(set(shades)):
        mine = [cost for cost, its in zip(costs, shades) if its == shade]
        low, high = min(mine), max(mine)
        text = f"{low}" if low == high else f"{low} to {high}"
        lines.append(f'<li><span class="sample cost-{shade}"></span> {text}</li>')
    return "\n".join(lines)


def buttons(words: list, costs: list, shades: list) -> str:
    """A button for every token: the word, below it its cost."""
    lines = []
    for place, (text, cost, shade) in enumerate(zip(words, costs, shades)):
        safe = html.escape(text)
        lines.append(
            f'<button type="button" role="tab" id="token-{place}" class="cost-{shade}" '
            f'aria-controls="panel" aria-selected="false" tabindex="-1" '
            f'aria-label="token {place}: {safe}, NFE {cost}">'
            f'<span class="word">{safe}</span><span class="nfe">{cost}</span></button>')
        # the answer's own lines, as far as tokens show them
        if "↵" in text:
            lines.append("<br>")
    return "\n".join(lines)


def facts(args, answer) -> str:
    """How the answer was made, as the rows of a description list."""
    solver = f"{args.solver}, {args.steps} steps"
    if args.solver == "dopri5":
        solver = f"dopri5, steps of its own, rtol {args.rtol:g}, atol {args.atol:g}"
    total = sum(answer.nfe)
    count = len(answer.nfe)
    rows = {
        "model": short(args.init_from),
        "solver": solver,
        "temperature": f"{args.temperature:g}" if args.temperature else "0 (greedy)",
        "seed": args.seed,
        "cost": f"{total} NFE for {count} tokens, {total / count:.1f} per token",
    }
    return "\n".join(f"<dt>{name}</dt><dd>{html.escape(visible(str(value)))}</dd>"
                     for name, value in rows.items())


# --- how to make it again -------------------------------------------------------------------------

def short(name: str) -> str:
    """A model's name as it was given; of a folder's whole path, which is private, the last part."""
    path = Path(name)
    return f"…/{path.name}" if path.is_absolute() else name


def again(args, given: dict, prompt: str) -> str:
    """The command that makes this answer, and this page, again."""
    words = ["python", "sample.py"]
    for name, value in given.items():
        if name not in LEFT_OUT:
            words += flag(name, short(value) if name in PATHS else value)
    # whatever prompts there were, the first is the one that is shown, and its seed is the first
    words += flag("html", Path(args.html).name) + flag("prompt", prompt)
    return " ".join(map(quoted, words))


def flag(name: str, value) -> list:
    """A flag as it is typed: the words on the command line."""
    name = "class" if name == "label" else name
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [part for one in value for part in flag(name, one)]
    # what begins with a dash would be taken for a flag of its own
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def quoted(text: str) -> str:
    """A word for the shell, in what it prints as."""
    if visible(text) == text and not any(c in text for c in JOINERS):
        return shlex.quote(text)
    # $'...' knows escapes, so its own two signs are escaped first
    safe = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else spelled(c) for c in safe) + "'"
