"""Positions of tokens, and which of them attend to which: pure functions, without any weights.

Rotary angles (Su et al. 2021) and their slower form in Llama 3, and the attention mask of padded
and packed rows, with a worked example. model.py uses all of it; read that next.
"""

import math
import sys
from dataclasses import dataclass
from functools import lru_cache

import torch

from data.checkpoints.families import ModelConfig


def check_length(config: ModelConfig, longest: int, remedy: str):
    """Raise ValueError for tokens past the last learned position.

    A rotary model goes on past the positions of its training, with one warning.
    """
    most = config.max_positions
    if longest <= most:
        return
    line = f"{longest} tokens are too long for this model; allowed: {most}"
    if config.family.positions == "learned":
        raise ValueError(f"{line}; {remedy}")
    warn(f"warning: {line} (max_position_embeddings); expect nonsense beyond")


@lru_cache
def warn(line: str):
    """Print a line once, however many texts are too long."""
    print(line, file=sys.stderr)


def rope_inv_freq(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each pair of coordinates, (D/2,) float32."""
    rope = config.rope
    # ω_i = θ^(−2i/D)
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    inv_freq = rope["rope_theta"] ** -exponents
    if rope["rope_type"] != "llama3":
        return inv_freq
    # Llama 3 was first trained on short texts; pairs without a full turn there are slowed down
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # 1: unchanged, 0: slowed down, between them a mixture
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    slow = inv_freq / rope["factor"]
    return keep * inv_freq + (1 - keep) * slow


def split_heads(x, head_dim: int, cos_sin=None):
    """(B, T, heads·D) -> (B, heads, T, D), rotated by position (Su et al. 2021).

    cos_sin  (B or 1, 2, T, D/2) of the angles; None for values, and where positions are learned
    """
    x = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)                 # (B, heads, T, D)
    if cos_sin is None:
        return x
    cos, sin = cos_sin[:, :, None].unbind(1)                            # (B, 1, T, D/2)
    x1, x2 = x.float().chunk(2, dim=-1)                                 # (B, heads, T, D/2)
    # a coordinate of each half makes a pair, a point in the plane that rotates
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return torch.cat((y1, y2), dim=-1).to(x.dtype)


@dataclass(frozen=True)
class Packed:
    """Several documents in each row of a training batch.

    numbers  (B, T) the document of every token; padding on the right is document 0
    borders  where each document starts, the rows being one behind the other, and the end
    """
    numbers: torch.Tensor
    borders: tuple

    @classmethod
    def of(cls, numbers) -> "Packed":
        new = torch.ones_like(numbers, dtype=torch.bool)
        new[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        starts = new.flatten().nonzero()[:, 0].tolist()
        return cls(numbers, (*starts, numbers.numel()))

    def to(self, device) -> "Packed":
        return Packed(self.numbers.to(device, non_blocking=True), self.borders)


def positions_and_mask(tokens: int, past: int, documents, device):
    """Positions of the newest `tokens` of past + tokens, and the keys that each attends to.

    documents  (B, past + tokens) the document of every token, or None where a row is one document;
               of a Packed the borders are returned in place of a mask
    Returns positions (B or 1, tokens), counted from 0 in every document, and the mask
    (B or 1, 1, tokens, past + tokens), or None where plain causal attention is meant.

    One token of padding (document 0) and two documents, all new:

        documents   0 1 1 1 2 2
        positions   0 0 1 2 0 1
        mask        x . . . . .      a token attends to its document, up to itself
                    . x . . . .
                    . x x . . .
                    . x x x . .
                    . . . . x .
                    . . . . x x
    """
    index = torch.arange(past + tokens, device=device)                  # (S,)
    new = index[past:, None]                                            # (T, 1)
    mask = index <= new                                                 # (T, S)
    if documents is None:
        positions = index[None, past:]                                  # (1, T)
        # one new token attends to everything, and attention has a square causal mask of its own
        if past == 0 or tokens == 1:
            return positions, None
        return positions, mask[None, None]
    if isinstance(documents, Packed):
        return document_positions(documents.numbers, index), documents.borders
    same = documents[:, past:, None] == documents[:, None, :]           # (B, T, S)
    return document_positions(documents, index)[:, past:], (mask & same)[:, None]


def document_positions(documents, index):
    """(B, S) of tokens at `index` (S,), counted from 0 in every document."""
    starts = torch.zeros_like(documents)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    # a token counts from the last place where the document changed
    return index - (index * starts).cummax(dim=1).values
