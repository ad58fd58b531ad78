"""Chat formats: the text and the ids of a conversation, for each model family.

A model's directory holds a chat template. `recognise` knows the templates of these formats word by
word; a model with another template is refused. A conversation becomes a list of pieces
(`render_*`), and the pieces become ids (`encode_pieces`). The pieces also mark the assistant's own
words, which alone count in training (L2D paper, Section 4).

Read tokenizer.py before; read chat.py next, which turns files of conversations into training
examples.
"""

import hashlib
import re
from functools import partial
from itertools import groupby
from typing import NamedTuple

from data.system.command import choices


class Piece(NamedTuple):
    """A part of a formatted conversation."""
    text: str
    special: bool = False    # the name of one special token; ordinary text never becomes one
    response: bool = False   # text of the assistant: the loss counts only this


# The special tokens of each format; the last one ends a turn.
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK_TOKENS = ("<｜User｜>", "<｜Assistant｜>")
SPECIAL_TOKENS = {
    "llama3": LLAMA3_TOKENS,
    "llama3.0": LLAMA3_TOKENS,
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "deepseek": DEEPSEEK_TOKENS,
    "deepseek-think": DEEPSEEK_TOKENS,
    "plain": (),
    "raw": (),
}
# The official Llama template prints the day it is run; a fixed day makes runs repeatable.
LLAMA3_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
EMPTY = (None, "", [], {})      # values that say nothing, of a key of a message or a row
# Default system prompts of the templates; one that contains another comes first.
SYSTEM_PROMPTS = (
    QWEN_SYSTEM,
    "You are a helpful assistant.",                                             # Qwen2
    "Please reason step by step, and put your final answer within \\boxed{}.",   # Qwen2.5-Math
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",     # SmolLM2
)
# First 16 hex digits of the sha256 of each known template, without its system prompt.
TEMPLATES = {
    "93c0e9aa3629bbd7": "llama3",            # Llama 3.1 and 3.3
    "d82792f95932f1c9": "llama3",            # Llama 3.2
    "ba03a121d097859c": "llama3.0",
    "b48c47f644389271": "llama3.0",          # its first version: always begins an answer
    "6c14865bcd87b706": "qwen",              # Qwen2.5, Qwen2.5-Math
    "bf0c34b1af07f37d": "qwen",              # Qwen2, SmolLM2
    "8abe492707968059": "qwen",              # Qwen2, as an older library saves it
    "153280e3ff55d19d": "qwen",              # SmolLM: no default system prompt
    "b6835114b7303ddd": "deepseek",          # DeepSeek-R1-Distill, its first version
    "56a1447ad31926fd": "deepseek-think",    # the later one, which opens the thought
}


# --- from a conversation to pieces ----------------------------------------------------------------

def chat_turns(turns, header, end, after, add_generation_prompt) -> list[Piece]:
    """Turns (role, content): each a header, its content, the token `end`, and a text after it."""
    if add_generation_prompt:
        turns = [*turns, ("assistant", None)]
    pieces = []
    for role, content in turns:
        # splitting at a group alternates ordinary text and special tokens
        parts = enumerate(re.split(r"(<\|.+?\|>)", header.format(role=role)))
        pieces += [Piece(part, special=place % 2 == 1) for place, part in parts if part]
        if content is not None:
            answer = role == "assistant"
            pieces.append(Piece(content, response=answer))
            # the end counts too: a model has to learn when to stop
            pieces.append(Piece(end, special=True, response=answer))
            # the model stops before this
            pieces += [Piece(after)] if after else []
    return pieces


def render_llama3(messages: list[dict], add_generation_prompt: bool = False,
                  dates: str = LLAMA3_DATES) -> list[Piece]:
    """The format of Llama 3 Instruct.

    dates  first lines of the system turn, which then always exists; "": as in Llama 3.0, without
    """
    # trimmed as in the official templates
    turns = [(message["role"], message["content"].strip()) for message in messages]
    if dates:
        if turns[0][0] != "system":
            turns.insert(0, ("system", ""))
        turns[0] = ("system", dates + turns[0][1])
    header = "<|start_header_id|>{role}<|end_header_id|>\n\n"
    pieces = chat_turns(turns, header, "<|eot_id|>", "", add_generation_prompt)
    return [Piece("<|begin_of_text|>", special=True), *pieces]


def render_qwen(messages: list[dict], add_generation_prompt: bool = False,
                system: str = QWEN_SYSTEM) -> list[Piece]:
    """ChatML, the format of Qwen and SmolLM; contents are not trimmed.

    system  system prompt of a conversation that has none; "": no system turn
    """
    turns = [(message["role"], message["content"]) for message in messages]
    if system and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    return chat_turns(turns, "<|im_start|>{role}\n", "<|im_end|>", "\n", add_generation_prompt)


def render_deepseek(messages: list[dict], add_generation_prompt: bool = False,
                    think: bool = False) -> list[Piece]:
    """The format of DeepSeek-R1-Distill; think: open the thought of the next answer."""
    systems = [message["content"] for message in messages if message["role"] == "system"]
    pieces = [Piece("bos", special=True), Piece(systems[-1] if systems else "")]
    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            pieces += [Piece("<｜User｜>", special=True), Piece(content)]
        if message["role"] == "assistant":
            # an earlier answer is repeated without its thought
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
    """Questions and answers for base models (GPT-2), which have no chat format.

    The special pieces "bos" and "eos" stand for the tokenizer's bos_id and eos_id.
    """
    pieces = [Piece("bos", special=True)]
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            # these vocabularies hold " word", so a prompt that ends in " " leads to unusual tokens
            pieces += [
                Piece("Answer:"),
                Piece(" " + content, response=True),
                Piece("eos", special=True, response=True),
            ]
        elif message["role"] == "user":
            pieces.append(Piece(f"Question: {content}\n"))
        elif content:
            pieces.append(Piece(content + "\n\n"))
    if add_generation_prompt:
        pieces.append(Piece("Answer:"))
    return pieces


def render_raw(messages: list[dict], add_generation_prompt: bool = False) -> list[Piece]:
    """Prompts and answers as they are written, and no end: " Rome" after "The capital of Italy is".
    """
    return [Piece("bos", special=True),
            *[Piece(message["content"], response=message["role"] == "assistant")
              for message in messages]]


def render_text(text) -> list[Piece]:
    """A document, not a conversation: all of it is to be predicted."""
    return [
        Piece("bos", special=True),
        Piece(text, response=True),
        Piece("eos", special=True, response=True),
    ]


RENDER = {
    "llama3": render_llama3,
    "llama3.0": partial(render_llama3, dates=""),
    "qwen": render_qwen,
    "deepseek": render_deepseek,
    "deepseek-think": partial(render_deepseek, think=True),
    "plain": render_plain,
    "raw": render_raw,
}


# --- which format ---------------------------------------------------------------------------------

def recognise(template: str | None) -> tuple:
    """(style, system prompt) of a chat template; (None, "") for an unknown one or None."""
    text = (template or "").strip()
    for system in (*SYSTEM_PROMPTS, ""):
        # as it is written inside quotes; "" is part of any text
        quoted = system.replace("\\", "\\\\")
        if quoted in text:
            break
    digest = hashlib.sha256(text.replace(quoted, "").encode()).hexdigest()[:16]
    return (TEMPLATES[digest], system) if digest in TEMPLATES else (None, "")


def chat_style(tokenizer) -> str:
    """The format of a model without a chat template, by its special tokens."""
    for style in ("llama3", "qwen"):
        names = SPECIAL_TOKENS[style]
        known = all(name in tokenizer.special for name in names)
        # Base models, which were not trained to chat, have the chat tokens too, but their end of
        # text is not the end of a turn.
        if known and tokenizer.special[names[-1]] == tokenizer.eos_id:
            return style
    return "plain"


def resolve_style(style: str, tokenizer) -> tuple:
    """(name, render function) of the format to use; "auto": that of the model's template.

    Raises ValueError for an unknown format or template, or if the tokenizer lacks a special token
    of the format.
    """
    theirs, system = recognise(tokenizer.template)
    if style == "auto":
        if tokenizer.template is not None and theirs is None:
            raise ValueError("this model's chat template is not supported; ask without a chat "
                             f"format, or name one: {', '.join(RENDER)}")
        style = theirs or chat_style(tokenizer)
    choices(style, RENDER, "chat style")
    missing = [name for name in SPECIAL_TOKENS[style] if name not in tokenizer.special]
    if missing:
        raise ValueError(f"chat style {style!r} needs the special token {missing[0]}, "
                         f"which this tokenizer lacks; use --style={chat_style(tokenizer)}")
    if style == theirs == "qwen":
        return style, partial(render_qwen, system=system)
    return style, RENDER[style]


# --- from pieces to ids ---------------------------------------------------------------------------

def encode_pieces(pieces, tokenizer) -> tuple[list, list]:
    """(ids, mask), two lists of equal length; mask is 1 where a token belongs to a response."""
    names = {**tokenizer.special, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    ids = []
    mask = []
    # Neighbours of one kind are encoded together, because a token may extend across their border.
    # A response is encoded separately, as it is generated.
    for (special, response), run in groupby(pieces, key=lambda piece: piece[1:]):
        texts = [piece.text for piece in run]
        if special:
            # "bos" is None where the model expects nothing before a text
            new = [names[text] for text in texts if names[text] is not None]
        else:
            new = tokenizer.encode("".join(texts))
        ids += new
        mask += [int(response)] * len(new)
    # nothing stands before the first token, so it cannot be predicted
    if mask:
        mask[0] = 0
    return ids, mask


def check_messages(messages) -> list[dict]:
    """The messages, reduced to role and content; ValueError if the formats cannot write them.

    An answer that is not to be learned keeps its weight of 0, for data/text/chat.py.
    """
    # errors quote 60 characters: a data set may hold a whole book in the wrong place
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message, "
                         f"not {str(messages)[:60]!r}")
    checked = []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"role must be system, user or assistant, not {str(role)[:60]!r}")
        # a user may send an empty message, but an empty answer teaches nothing
        empty = role == "assistant" and isinstance(content, str) and not content.strip()
        if empty or not isinstance(content, str):
            raise ValueError(f"content of a message from {role} must be text, "
                             f"not {str(content)[:60]!r}")
        # a call of a tool, a name, a thought: without it the answer would mean something else
        others = [key for key, value in message.items()
                  if key not in ("role", "content", "weight") and value not in EMPTY]
        if others:
            raise ValueError(f"a message from {role} has {str(others[0])[:60]!r}, which no format "
                             "here writes; allowed: role, content, and weight 0 or 1")
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise ValueError(f"a message from {role} has weight {str(weight)[:60]!r}; "
                             "allowed: 0 (not learned) or 1")
        checked.append({"role": role, "content": content})
        if weight == 0:
            checked[-1]["weight"] = 0
    return checked


def encode_chat(messages: list[dict], tokenizer, style: str = "auto",
                add_generation_prompt: bool = True) -> list[int]:
    """A conversation as ids, up to the assistant's next turn if `add_generation_prompt`.

    Raises ValueError as `resolve_style` and `check_messages` do.
    """
    _, render = resolve_style(style, tokenizer)
    pieces = render(check_messages(messages), add_generation_prompt)
    ids, _ = encode_pieces(pieces, tokenizer)
    return ids
