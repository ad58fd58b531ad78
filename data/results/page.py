"""The trace of an answer as a page: `sample.py --trace --html trace.html`.

One file for any browser; it downloads nothing. trace.html beside this file is its form, with style
and script (read it next); build_page fills it in. Prompts and tokens may be any text, malicious
text included: they enter the page as text only, never as elements or as script.
"""

import base64
import hashlib
import html
import json
import shlex
from pathlib import Path
from string import Template

from data.system.command import flag_words
from data.system.disk import appearing

FORM = Path(__file__).with_name("trace.html")
JOINERS = "\u200c\u200d"        # invisible, but part of emoji and of Persian words
# flags that do not change a single answer, or that `again` writes itself
LEFT_OUT = ("prompt", "prompt_file", "num_samples", "batch_size", "cache_dir", "html", "overwrite")
PATHS = ("init_from", "base")


def write_page(args, given: dict, prompt: str, answer, tokenizer, typed=None):
    """Write the page of one answer to args.html, whole or not at all; arguments of build_page."""
    page = build_page(args, given, prompt, answer, tokenizer, typed)
    with appearing(args.html) as part:
        part.write_text(page, encoding="utf-8", newline="\n")


def build_page(args, given: dict, prompt: str, answer, tokenizer, typed=None) -> str:
    """The page as text: the same bytes for the same answer.

    args, given  the flags of sample.py: all of them, and those given on the command line
    answer       an Answer with the Trace of every token
    typed        the lines of a conversation, up to the answer
    """
    form = FORM.read_text(encoding="utf-8")
    # the page's policy names its own script by checksum, so that no other script runs
    script = form.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tokens = trace_data(answer, tokenizer)
    data = json.dumps({"first": args.trace_token, "tokens": tokens})
    lines = JOINERS + "\n\t"
    # substitute makes one pass, so a `$` in a prompt is left alone
    return Template(form).substitute(
        script_hash=f"sha256-{digest}",
        title=html.escape(escaped(prompt, JOINERS)[:60]),
        prompt=html.escape(escaped(prompt, lines)),
        answer=html.escape(escaped(answer.text, lines)),
        tokens=buttons(tokens),
        settings=settings(args, answer),
        command=html.escape(again(args, given, prompt, typed)),
        # JSON without `<` cannot end its element
        data=data.replace("<", "\\u003c"),
    )


def trace_data(answer, tokenizer) -> list:
    """Each token as the script shows it; a prediction is [t, word, p, kind].

    kind is "frozen" (the prediction at t = 0), "evaluation", "rejected" (an evaluation of a step
    that the solver rejected) or "final" (the evaluation that gives the token).
    """
    words = [word(tokenizer.token_bytes(token)) for token in answer.ids]
    # the stop token is not part of the answer, but it costs evaluations
    if len(words) < len(answer.nfe):
        words.append("<stop>")
    tokens = []
    for text, nfe, trace in zip(words, answer.nfe, answer.traces):
        count = len(trace.predictions)
        kinds = ["evaluation" if accepted else "rejected" for accepted in trace.accepted]
        kinds[0] = "frozen"
        kinds[-1] = "final"
        note = f"{count} evaluations, {kinds.count('rejected')} of rejected steps; {nfe} NFE"
        if nfe > count:
            note += " (two for each evaluation with guidance)"
        # by --stop_unchanged or --max_nfe
        if trace.reached < 1:
            note += f"; the solver stopped at t = {trace.reached:.4f}"
        predictions = [[t, word(tokenizer.token_bytes(token)), p, kind]
                       for (t, token, p), kind in zip(trace.predictions, kinds)]
        tokens.append({"word": text, "nfe": nfe, "note": note, "predictions": predictions})
    return tokens


# --- text -----------------------------------------------------------------------------------------

def escaped(text: str, keep: str = "") -> str:
    """Text with control characters and invisible marks, except `keep`, as escapes such as \\x07.

    Python and $'...' of the shell read these escapes.
    """
    def escape(c):
        code = ord(c)
        if code < 0x80:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return "".join(c if c.isprintable() or c in keep else escape(c) for c in text)


def word(content: bytes) -> str:
    """The bytes of a token in one line; part of a character as escaped bytes."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in content)
    # spaces between letters are visible, spaces alone are not
    if text.strip(" ") == "":
        text = text.replace(" ", "␣")
    return escaped(text.replace("\n", "↵").replace("\t", "⇥"), JOINERS)


# --- the parts of the page ------------------------------------------------------------------------

def buttons(tokens: list) -> str:
    """A button for every token: its word and its cost, which also chooses the colour."""
    costs = [token["nfe"] for token in tokens]
    low, high = min(costs), max(costs)
    lines = []
    for place, (token, nfe) in enumerate(zip(tokens, costs)):
        text = html.escape(token["word"])
        share = 100 * (nfe - low) // max(1, high - low)
        lines.append(
            f'<button role="tab" id="token-{place}" aria-controls="panel" style="--cost: {share}%" '
            f'aria-label="token {place}: {text}, {nfe} NFE">'
            f'<span class="word">{text}</span><small>{nfe}</small></button>')
        # a new line where the answer has one
        if "↵" in text:
            lines.append("<br>")
    return "\n".join(lines)


def settings(args, answer) -> str:
    """The settings and the total cost, as the rows of a description list."""
    solver = f"{args.solver}, {args.steps} steps"
    if args.solver == "dopri5":
        solver = f"dopri5, adaptive steps, rtol {args.rtol:g}, atol {args.atol:g}"
    total, count = sum(answer.nfe), len(answer.nfe)
    rows = {
        "model": short(args.init_from),
        "solver": solver,
        "temperature": f"{args.temperature:g}" if args.temperature else "0 (greedy)",
        "seed": str(args.seed),
        "cost": f"{total} NFE for {count} tokens, {total / count:.1f} per token",
    }
    return "\n".join(f"<dt>{name}</dt><dd>{html.escape(escaped(value, JOINERS))}</dd>"
                     for name, value in rows.items())


def short(name: str) -> str:
    """A model's name as given; of an absolute path, which is private, the last part."""
    path = Path(name)
    return f"…/{path.name}" if path.is_absolute() else name


# --- the command ----------------------------------------------------------------------------------

def again(args, given: dict, prompt: str, typed=None) -> str:
    """The command that makes this answer and this page again; typed: as of build_page."""
    words = ["python", "sample.py"]
    for name, value in given.items():
        if name not in LEFT_OUT:
            words += flag_words(name, short(value) if name in PATHS else value)
    if typed:
        lines = [*typed, f"/trace {Path(args.html).name}"]
        return f"printf '%s\\n' {' '.join(map(quoted, lines))} | {' '.join(map(quoted, words))}"
    # the page shows the first of several prompts; its seed is the first too
    words += flag_words("html", Path(args.html).name) + flag_words("prompt", prompt)
    return " ".join(map(quoted, words))


def quoted(text: str) -> str:
    """A word for the shell, in printable characters."""
    if escaped(text, "\n\t") == text:
        return shlex.quote(text)
    # $'...' reads escapes, so its own two signs are escaped first
    return "$'" + escaped(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"
