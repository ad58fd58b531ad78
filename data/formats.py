"""The chat formats: how each model family writes a conversation down, and its ids.

A conversation becomes a list of pieces (`render_*`), the pieces become ids (`encode_pieces`), and
sample.py takes both steps at once (`encode_chat`). The same pieces say which words the assistant
has to produce itself, the only ones that count in training (L2D paper, Section 4).

Read data/tokenizer.py before, data/chat.py next: there whole files of conversations become
training examples.
"""

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
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "plain": (),
}
# The official Llama template prints the day it is run; a fixed day makes runs repeatable.
LLAMA3_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


# --- from a conversation to pieces ----------------------------------------------------------------

def split_system(messages, default):
    """The system prompt (or the default) and the messages after it."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return default, messages


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
    for message in messages:
        # like the official template, which trims every content
        turns.append((message["role"], message["content"].strip()))

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


def render_qwen(messages: list[dict], add_generation_prompt: bool = False) -> list[Piece]:
    """The format of Qwen 2.5 Instruct; the contents stay exactly as they are."""
    system, messages = split_system(messages, default=QWEN_SYSTEM)
    turns = [("system", system)]
    turns += [(message["role"], message["content"]) for message in messages]

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


RENDER = {"llama3": render_llama3, "qwen": render_qwen, "plain": render_plain}


# --- which format ---------------------------------------------------------------------------------

def chat_style(tokenizer) -> str:
    """"llama3", "qwen" or "plain": the format whose end of turn is the tokenizer's end of text."""
    for style, names in SPECIAL_TOKENS.items():
        known = names and all(name in tokenizer.special for name in names)
        # Base models of both families know the chat tokens too but end a text otherwise: they were
        # not taught to chat, so they are asked plainly.
        if known and tokenizer.special[names[-1]] == tokenizer.eos_id:
            return style
    return "plain"


def resolve_style(style, tokenizer) -> str:
    """The format to use; ValueError if it does not exist or the tokenizer cannot write it."""
    if style == "auto":
        return chat_style(tokenizer)
    if style not in RENDER:
        raise ValueError(f"chat style {style!r} is none of auto, {', '.join(RENDER)}")
    missing = [name for name in SPECIAL_TOKENS[style] if name not in tokenizer.special]
    if missing:
        raise ValueError(f"chat style {style!r} needs the special token {missing[0]}, "
                         f"which this tokenizer lacks; use --style={chat_style(tokenizer)}")
    return style


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

    style: "llama3", "qwen", "plain", or "auto" for chat_style(tokenizer).
    Raises ValueError for an unknown style, a special token that the tokenizer lacks, or malformed
    messages.
    """
    render = RENDER[resolve_style(style, tokenizer)]
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
