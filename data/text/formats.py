"""The chat formats: how each model family writes a conversation down, and its ids.

Which format a model speaks stands in its own directory, as a chat template: it is recognised word
by word (`recognise`), or the model is not asked in any. A conversation becomes a list of pieces
(`render_*`), the pieces become ids (`encode_pieces`), and sample.py takes all steps at once
(`encode_chat`). The same pieces say which words the assistant has to produce itself, the only ones
that count in training (L2D paper, Section 4).

Read tokenizer.py before, chat.py next: there whole files of conversations become
training examples.
"""

import hashlib
from functools import lru_cache, partial
from itertools import groupby
from typing import NamedTuple


class Piece(NamedTuple):
    """A stretch of a written-down conversation."""
    text: str
    special: bool = False    # one special token, looked up by name; words never become one
    response: bool = False   # what the assistant itself has to produce: all that the loss counts


# What each format needs; the last one ends a turn.
SPECIAL_TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama3.0": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "deepseek": ("<｜User｜>", "<｜Assistant｜>"),
    "deepseek-think": ("<｜User｜>", "<｜Assistant｜>"),
    "plain": (),
}
# The official Llama template prints the day it is run; a fixed day makes runs repeatable.
LLAMA3_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# System prompts that a template takes where a conversation has none; one that holds another, first.
SYSTEM_PROMPTS = (
    QWEN_SYSTEM,
    "You are a helpful assistant.",                                             # Qwen2
    "Please reason step by step, and put your final answer within \\boxed{}.",   # Qwen2.5-Math
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",     # SmolLM2
)
# sha256, its first half, of the templates that we can write, each without its system prompt.
TEMPLATES = {
    "93c0e9aa3629bbd7": "llama3",            # Llama 3.1 and 3.3
    "d82792f95932f1c9": "llama3",            # Llama 3.2
    "ba03a121d097859c": "llama3.0",
    "b48c47f644389271": "llama3.0",          # its first version: always ready for an answer
    "6c14865bcd87b706": "qwen",              # Qwen2.5, Qwen2.5-Math
    "bf0c34b1af07f37d": "qwen",              # Qwen2, SmolLM2
    "8abe492707968059": "qwen",              # Qwen2, as an older library saves it
    "153280e3ff55d19d": "qwen",              # SmolLM: no system prompt unless there is one
    "b6835114b7303ddd": "deepseek",          # DeepSeek-R1-Distill, its first version
    "56a1447ad31926fd": "deepseek-think",    # the one that opens the thought itself
}


# --- from a conversation to pieces ----------------------------------------------------------------

def split_system(messages, default):
    """The system prompt (or the default) and the messages after it."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return default, messages


def render_llama30(messages: list[dict], add_generation_prompt: bool = False) -> list[Piece]:
    """The format of Llama 3.0 Instruct: a system turn only where there is one."""
    return llama3_turns(trimmed(messages), add_generation_prompt)


def trimmed(messages: list[dict]) -> list[tuple]:
    """(role, content) of each, trimmed as in the official templates."""
    return [(message["role"], message["content"].strip()) for message in messages]


def llama3_header(role) -> list[Piece]:
    return [
        Piece("<|start_header_id|>", special=True),
        Piece(role),
        Piece("<|end_header_id|>", special=True),
        Piece("\n\n"),
    ]


def render_llama3(messages: list[dict], add_generation_prompt: bool = False) -> list[Piece]:
    """The format of Llama 3.1 and 3.2 Instruct."""
    system, messages = split_system(messages, default="")
    # there is always a system turn, if only for the dates
    turns = [("system", LLAMA3_DATES + system.strip())]
    return llama3_turns(turns + trimmed(messages), add_generation_prompt)


def llama3_turns(turns, add_generation_prompt: bool) -> list[Piece]:
    pieces = [Piece("<|begin_of_text|>", special=True)]
    for role, content in turns:
        answer = role == "assistant"
        pieces += llama3_header(role)
        pieces.append(Piece(content, response=answer))
        # the end counts too: a model has to say when it is done
        pieces.append(Piece("<|eot_id|>", special=True, response=answer))
    if add_generation_prompt:
        pieces += llama3_header("assistant")
    return pieces


def render_qwen(messages: list[dict], add_generation_prompt: bool = False,
                system: str = QWEN_SYSTEM) -> list[Piece]:
    """ChatML, the format of Qwen and SmolLM; the contents stay exactly as they are.

    system  the prompt where a conversation has none; "": no turn for it
    """
    turns = [(message["role"], message["content"]) for message in messages]
    if system and turns[0][0] != "system":
        turns.insert(0, ("system", system))

    pieces = []
    for role, content in turns:
        answer = role == "assistant"
        pieces += [
            Piece("<|im_start|>", special=True),
            Piece(role + "\n"),
            Piece(content, response=answer),
            Piece("<|im_end|>", special=True, response=answer),
            # of the format and not of the answer: a model has stopped before it comes here
            Piece("\n"),
        ]
    if add_generation_prompt:
        pieces += [Piece("<|im_start|>", special=True), Piece("assistant\n")]
    return pieces


def render_deepseek(messages: list[dict], add_generation_prompt: bool = False,
                    think: bool = False) -> list[Piece]:
    """The format of DeepSeek-R1-Distill; think: the answer begins with an opened thought."""
    systems = [message["content"] for message in messages if message["role"] == "system"]
    pieces = [Piece("bos", special=True), Piece(systems[-1] if systems else "")]
    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            pieces += [Piece("<｜User｜>", special=True), Piece(content)]
        if message["role"] == "assistant":
            # of an answer that was given the thought is not told again
            content = content.split("</think>")[-1]
            pieces += [
                Piece("<｜Assistant｜>", special=True),
                Piece(content, response=True),
                Piece("eos", special=True, response=True),
            ]
    if add_generation_prompt:
        pieces.append(Piece("<｜Assistant｜>", special=True))
        if think:
            pieces.append(Piece("<think>\n"))
    return pieces


def render_plain(messages: list[dict], add_generation_prompt: bool = False) -> list[Piece]:
    """Questions and answers for base models (GPT-2), which know no chat format.

    The special pieces "bos" and "eos" stand for the tokenizer's own first and last token, whatever
    they are called.
    """
    system, messages = split_system(messages, default="")
    pieces = [Piece("bos", special=True)]
    if system:
        pieces.append(Piece(system + "\n\n"))
    for message in messages:
        if message["role"] != "assistant":
            pieces.append(Piece(f"Question: {message['content']}\n"))
            continue
        pieces.append(Piece("Answer:"))
        # The space belongs to the answer: these vocabularies hold " word", and a prompt that ends
        # in " " derails them.
        pieces.append(Piece(" " + message["content"], response=True))
        pieces.append(Piece("eos", special=True, response=True))
    if add_generation_prompt:
        pieces.append(Piece("Answer:"))
    return pieces


def render_text(text) -> list[Piece]:
    """A document, which is no conversation: all of it is to be predicted."""
    return [
        Piece("bos", special=True),
        Piece(text, response=True),
        Piece("eos", special=True, response=True),
    ]


RENDER = {
    "llama3": render_llama3,
    "llama3.0": render_llama30,
    "qwen": render_qwen,
    "deepseek": render_deepseek,
    "deepseek-think": partial(render_deepseek, think=True),
    "plain": render_plain,
}


# --- which format ---------------------------------------------------------------------------------

@lru_cache
def recognise(template: str | None) -> tuple:
    """(style, system prompt) of a chat template; (None, "") for none, or one that is not known."""
    text = (template or "").strip()
    for system in SYSTEM_PROMPTS:
        # as it is written inside quotes
        quoted = system.replace("\\", "\\\\")
        if quoted in text:
            text = text.replace(quoted, "")
            break
    else:
        system = ""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return (TEMPLATES[digest], system) if digest in TEMPLATES else (None, "")


def chat_style(tokenizer) -> str:
    """The format of a model without a chat template: whose end of turn is its end of text."""
    for style in ("llama3", "qwen"):
        names = SPECIAL_TOKENS[style]
        known = all(name in tokenizer.special for name in names)
        # Base models of both families know the chat tokens too but end a text otherwise: they were
        # not taught to chat, so they are asked plainly.
        if known and tokenizer.special[names[-1]] == tokenizer.eos_id:
            return style
    return "plain"


def resolve_style(style: str, tokenizer) -> tuple:
    """(name, its render function) of the format to use; "auto": what the model's template says.

    Raises ValueError for an unknown format or template, or one that the tokenizer cannot write.
    """
    template = getattr(tokenizer, "template", None)
    theirs, system = recognise(template)
    if style == "auto":
        if template is not None and theirs is None:
            raise ValueError("this model's chat template is none that we can write; ask without a "
                             f"chat format, or name one: {', '.join(RENDER)}")
        style = theirs or chat_style(tokenizer)
    if style not in RENDER:
        raise ValueError(f"chat style {style!r} is none of auto, {', '.join(RENDER)}")
    missing = [name for name in SPECIAL_TOKENS[style] if name not in tokenizer.special]
    if missing:
        raise ValueError(f"chat style {style!r} needs the special token {missing[0]}, "
                         f"which this tokenizer lacks; use --style={chat_style(tokenizer)}")
    if style == theirs == "qwen":
        return style, partial(render_qwen, system=system)
    return style, RENDER[style]


# --- from pieces to ids ---------------------------------------------------------------------------

def piece_kind(piece) -> tuple[bool, bool]:
    return piece.special, piece.response


def encode_pieces(pieces, tokenizer) -> tuple[list, list]:
    """(ids, mask), two lists of equal length; mask is 1 where a token belongs to a response."""
    ids = []
    mask = []
    # Neighbours of one kind are encoded together, because a vocabulary may hold a token across
    # their border. A response starts afresh: so it does when it is generated.
    for (special, response), run in groupby(pieces, key=piece_kind):
        texts = [piece.text for piece in run]
        if special:
            new = special_ids(texts, tokenizer)
        else:
            new = tokenizer.encode("".join(texts))
        ids += new
        mask += [int(response)] * len(new)
    # the very first token has nothing before it that it could be predicted from
    if mask:
        mask[0] = 0
    return ids, mask


def special_ids(names, tokenizer) -> list:
    """The ids of special pieces."""
    ends = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    ids = []
    for name in names:
        if name in ends:
            ids.append(ends[name])
        else:
            ids.append(tokenizer.special[name])
    # "bos" is None where the model expects nothing before a text
    return [id for id in ids if id is not None]


# --- what sample.py calls -------------------------------------------------------------------------

def encode_chat(
    messages: list[dict],
    tokenizer,
    style: str = "auto",
    add_generation_prompt: bool = True,
) -> list[int]:
    """A conversation as ids, ready for the assistant's next turn if `add_generation_prompt`.

    style: a key of RENDER, or "auto" for what the model's own template says.
    Raises ValueError for an unknown style, a special token that the tokenizer lacks, or malformed
    messages.
    """
    _, render = resolve_style(style, tokenizer)
    pieces = render(check_messages(messages), add_generation_prompt)
    ids, _ = encode_pieces(pieces, tokenizer)
    return ids


def check_messages(messages) -> list[dict]:
    """The messages, reduced to role and content; ValueError if the formats cannot write them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message, "
                         f"not {str(messages)[:60]!r}")
    return [check_message(message) for message in messages]


def check_message(message) -> dict:
    role = None
    content = None
    if isinstance(message, dict):
        role = message.get("role")
        content = message.get("content")
    if role not in ("system", "user", "assistant"):
        # cut short: a data set may hold a whole book in the wrong place
        raise ValueError(f"role must be system, user or assistant, not {str(role)[:60]!r}")
    # an empty question can be asked, but from an empty answer there is nothing to learn
    empty = role == "assistant" and isinstance(content, str) and not content.strip()
    if empty or not isinstance(content, str):
        raise ValueError(f"content of a message from {role} must be text, "
                         f"not {str(content)[:60]!r}")
    # whatever else a data set says about a message, no format writes it down
    return {"role": role, "content": content}
