"""The frozen language model: one decoder-only Transformer for GPT-2, Llama 3 and Qwen 2.5.

The differences between the families stand in data/checkpoints/families.py. Read solvers.py and
diffusion.py first: they are the method. This file is what the method is built on (L2D paper,
section 3.1): `LM.read` runs the model over some tokens and returns `FrozenStates`, all that the
diffusion path reads. The path's own layers stand beside the model's.

Shapes, in every file: B batch, T tokens (queries), S tokens (keys), C hidden width, H heads, G
key/value heads, D head width, L layers, V vocabulary, Z width of the diffusion space.

    python model.py
    'g'  p = 0.999
    the same with a KV cache: True
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoints.families import ACTIVATIONS, ModelConfig
from data.checkpoints.hub import resolve
from data.checkpoints.path import L2DConfig
from data.checkpoints.weights import (
    fingerprint, load_weights, pick_device, plan_weights, read_config, save_weights, weight_files)
from data.parts.kv_cache import KVCache
from data.parts.log_p import log_p
from data.parts.lora import adapt
from data.parts.positions import positions_and_mask, rope_inv_freq, split_heads
from data.parts.states import FrozenStates
from data.text.tokenizer import load_tokenizer


# --- the layers -----------------------------------------------------------------------------------

class Norm(nn.Module):
    """RMSNorm or LayerNorm; the path passes scale a and shift s: (w + a)·norm(x) + b + s."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rms = config.family.norm == "rms"
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x, scale=0.0, shift=0.0):
        if self.rms:
            n = x.float()       # squares of bfloat16 numbers would lose too much
            mean_square = n.square().mean(-1, keepdim=True)
            # norm(x) = x / √(mean(x²) + ε)
            n = n * torch.rsqrt(mean_square + self.eps)
            n = n.to(x.dtype)
        else:
            n = F.layer_norm(x, x.shape[-1:], eps=self.eps)
            shift = shift + self.bias
        return (self.weight + scale) * n + shift


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)) with a gate, down(act(up(x))) without; of any three modules."""

    def __init__(self, gate, up, down, act):
        super().__init__()
        self.gate = gate
        self.up = up
        self.down = down
        self.act = act

    def forward(self, x):
        h = self.up(x)
        if self.gate is None:
            h = self.act(h)
        else:
            h = self.act(self.gate(x)) * h
        return self.down(h)


def attention(q, k, v, mask, cos_sin, own=()):
    """Queries q (B, T, H·D), not yet rotated, over keys and values (B, G, S, D): (B, T, H·D).

    The queries may be there several times over, (copies·B, T, H·D), see FrozenStates.copies: as
    further queries of the same sequence, they attend to one and the same keys.

    own  key and value (copies·B, T, G·D), not yet rotated, with which each query attends to its
         own place, if not with those in k and v
    """
    # the keys were rotated when they were computed, the queries are rotated here
    q = split_heads(q, k.shape[-1], cos_sin)                            # (B, H, T, D)
    own = [split_heads(x, k.shape[-1], angles) for x, angles in zip(own, (cos_sin, None))]
    if isinstance(mask, tuple):
        return attend_documents(q, k, v, mask, own).transpose(1, 2).flatten(2)
    copies, tokens = len(q) // len(k), q.shape[2]
    if copies > 1:
        # (B, heads, copies·T, D)
        q, *own = (torch.cat(x.chunk(copies), dim=2) for x in (q, *own))
    k = k.to(q.dtype)
    v = v.to(q.dtype)
    if own:
        k, v, mask = at_own_place(k, v, mask, own, tokens)
    # one query is the newest token: it may attend to everything there is
    causal = False
    if mask is None and tokens > 1:          # a branch: torch.compile wants a bool that it knows
        causal = True
    shape = q.shape
    if tokens == 1 and (mask is None or mask.shape[-2] == 1):
        # heads that share a key head become further queries of it: each key is read once
        q = q.reshape(len(k), k.shape[1], -1, k.shape[-1])              # (B, G, copies·H/G, D)
    # softmax(q·kᵀ / √D)·v
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=causal,
        enable_gqa=k.shape[1] != q.shape[1],      # several query heads share one key head
    ).reshape(shape)
    if copies > 1:
        out = torch.cat(out.chunk(copies, dim=2))                       # (copies·B, H, T, D)
    return out.transpose(1, 2).flatten(2)                               # (B, T, H·D)


def at_own_place(k, v, mask, own, tokens: int):
    """(k, v, mask) in which n queries attend to their own places by keys and values of their own.

    k, v    (..., S, D); own: two tensors (..., n, D) for the last `tokens` places, n/tokens times
    mask    as in `attention`; None: causal
    """
    n, size = own[0].shape[-2], k.shape[-2]
    if n == 1:
        # the newest token, whose place is the last
        return *(torch.cat((old[..., :-1, :], new), dim=-2) for old, new in zip((k, v), own)), mask
    before = torch.ones(tokens, size, dtype=torch.bool, device=k.device).tril(size - tokens - 1)
    before = before.repeat(n // tokens, 1)                              # (n, S)
    if mask is not None:
        before = before & mask                                          # (B, 1, n, S)
    alone = torch.eye(n, dtype=torch.bool, device=k.device).expand(*before.shape[:-1], n)
    mask = torch.cat((before, alone), dim=-1)                           # (..., n, S + n)
    return *(torch.cat((old, new), dim=-2) for old, new in zip((k, v), own)), mask


def attend_documents(q, k, v, borders, own=()):
    """Packed rows, (B, heads, T, D) each: every document attends to itself, none to another.

    With a mask all pairs of the row would be computed, and most of them thrown away.
    """
    shape = q.shape
    # the rows one behind the other, (heads, B·T, D)
    q, k, v, *own = (x.transpose(0, 1).flatten(1, 2)
                     for x in (q, k.to(q.dtype), v.to(q.dtype), *own))
    out = []
    for start, end in pairwise(borders):
        queries, keys, values, *ours = (x[:, start:end] for x in (q, k, v, *own))
        mask = None
        if ours:
            keys, values, mask = at_own_place(keys, values, None, ours, end - start)
        out.append(F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None, enable_gqa=len(k) != len(q)))
    out = torch.cat(out, dim=1)                                         # (H, B·T, D)
    return out.unflatten(1, (shape[0], shape[2])).transpose(0, 1)       # (B, H, T, D)


class Block(nn.Module):
    """One pre-norm layer of the frozen model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config.hidden_size
        f = config.mlp_width
        queries = config.heads * config.head_dim
        keys = config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.norm_attn = Norm(config)
        self.norm_mlp = Norm(config)
        self.q = nn.Linear(c, queries, bias=config.qkv_bias)
        self.k = nn.Linear(c, keys, bias=config.qkv_bias)
        self.v = nn.Linear(c, keys, bias=config.qkv_bias)
        self.o = nn.Linear(queries, c, bias=config.o_bias)
        gate = None
        if config.family.gated:
            gate = nn.Linear(c, f, bias=config.mlp_bias)
        up = nn.Linear(c, f, bias=config.mlp_bias)
        down = nn.Linear(f, c, bias=config.mlp_bias)
        self.mlp = MLP(gate, up, down, ACTIVATIONS[config.activation])

    def forward(self, x, mask, cos_sin, cache=None, layer=0):
        """(x, keys, values): the hidden state (B, T, C), and (B, G, S, D) of all tokens so far."""
        n = self.norm_attn(x)                                           # (B, T, C)
        k = split_heads(self.k(n), self.head_dim, cos_sin)              # (B, G, T, D)
        v = split_heads(self.v(n), self.head_dim)                       # (B, G, T, D)
        # k and v of the new tokens go in, those of all tokens come out
        if cache is not None:
            k, v = cache.append(layer, k, v)                            # (B, G, S, D)
        out = attention(self.q(n), k, v, mask, cos_sin)                 # (B, T, H·D)
        x = x + self.o(out)                                             # (B, T, C)
        x = x + self.mlp(self.norm_mlp(x))                              # (B, T, C)
        return x, k, v


# --- the same layer in the diffusion path ---------------------------------------------------------

def two_layers(inside: int, middle: int, outside: int, bias=True, zero=False) -> nn.Sequential:
    """Linear, SiLU, Linear; `zero` starts the last layer at zero: at first it adds nothing."""
    first = nn.Linear(inside, middle)
    last = nn.Linear(middle, outside, bias=bias)
    if zero:
        for p in last.parameters():
            nn.init.zeros_(p)
    return nn.Sequential(first, nn.SiLU(), last)


class PathBlock(nn.Module):
    """A layer of the path: its own queries and MLP, the frozen layer's norms, keys and values.

    By its config it has keys and values of its own too (`own_kv`), or those of a token's own place
    change with the path's hidden state at every evaluation (`self_kv`).
    """

    def __init__(self, frozen: Block, config: L2DConfig):
        super().__init__()
        self.head_dim = frozen.head_dim
        rank, alpha = config.rank, config.alpha
        self.q = adapt(frozen.q, rank, alpha)
        self.o = adapt(frozen.o, rank, alpha)
        self.self_kv = config.self_kv
        self.k = self.v = None
        if config.own_kv or config.self_kv:
            self.k = adapt(frozen.k, rank, alpha)
            self.v = adapt(frozen.v, rank, alpha)
        self.mlp = MLP(
            adapt(frozen.mlp.gate, rank, alpha),
            adapt(frozen.mlp.up, rank, alpha),
            adapt(frozen.mlp.down, rank, alpha),
            frozen.mlp.act,
        )
        # zero at first: nothing is scaled or shifted, and the gates are closed
        width = frozen.q.in_features
        self.modulation = two_layers(config.cond_dim, config.cond_dim, 6 * width, zero=True)
        if config.start == "frozen":
            # open: the layer begins as a copy of the frozen one
            gates = self.modulation[-1].bias.view(6, width)
            for gate in (2, 5):
                nn.init.ones_(gates[gate])

    def forward(self, h, modulation, frozen, states: FrozenStates, kv=None, cache=None, layer=0,
                last=False):
        """(h, keys, values): h one layer further, and what its queries attended to.

        h       (B, T, C), one vector for every token of the states, or (N, C) or (N, 1, C) for
                some of them
        frozen  the same layer of the language model
        kv      keys and values (B, G, S, D) to attend to. None: the layer computes its own from
                h (B, T, C), and they go into the cache, if there is one, as number `layer`
        last    of the layers that compute their own: no layer reads its h, which stays
        """
        a1, s1, g1, a2, s2, g2 = modulation.chunk(6, dim=-1)
        n = frozen.norm_attn(h, a1, s1)                                 # (..., C)
        own = []
        if kv is None:
            kv = (split_heads(self.k(n), self.head_dim, states.cos_sin),
                  split_heads(self.v(n), self.head_dim))
            if cache is not None:
                kv = cache.append(layer, *kv)
            if last:
                return h, *kv
        elif self.self_kv:
            own = [self.k(n), self.v(n)]                                # (..., G·D)
        mine = [self.q(n), *own]                                        # (..., H·D)
        index = states.index
        if index:
            # N queries go to their places among B·T and are taken out again. The empty places cost
            # a little attention; a copy of the keys for each query would cost N·S of memory.
            mine = [x.new_zeros(*states.size, x.shape[-1]).index_put(index, x.flatten(0, -2))
                    for x in mine]
        elif n.dim() == 2:
            mine = [x[:, None] for x in mine]       # N sequences of one token
        q, *own = mine
        out = attention(q, *kv, states.mask, states.cos_sin, own)
        if index:
            out = out[index]
        out = out.view(*h.shape[:-1], out.shape[-1])
        # h ← h + g1·O(attention(Q((w + a1)·norm(h) + s1), K, V))
        h = h + g1 * self.o(out)
        # h ← h + g2·MLP((w + a2)·norm(h) + s2)
        h = h + g2 * self.mlp(frozen.norm_mlp(h, a2, s2))
        return h, *kv


# --- the model ------------------------------------------------------------------------------------

def embedding(rows: int, width: int) -> nn.Embedding:
    """An unfilled table: to draw its start, on the meta device, imports all of torch._dynamo."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class LM(nn.Module):
    """A decoder-only Transformer. `lm(ids)` gives logits; `lm.read(ids)` what the path needs."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.directory = None
        self.inv_freq = None           # made when it is first needed
        c = config.hidden_size
        self.embed = embedding(config.vocab_size, c)
        # GPT-2 has a table of positions; the others rotate queries and keys instead
        self.embed_positions = None
        if config.family.positions == "learned":
            self.embed_positions = embedding(config.max_positions, c)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = Norm(config)
        self.head = nn.Linear(c, config.vocab_size, bias=False)
        self.head_copy = None          # its matrix laid out for sampling, see data/parts/layout.py
        self.tie()

    @property
    def lm(self) -> "LM":
        """Itself: `model.lm` is the frozen model, with a path beside it or without."""
        return self

    def tie(self):
        """Small models score a token by the vector that they read it as."""
        if self.config.tied:
            self.head.weight = self.embed.weight

    def read(self, ids, documents=None, cache: KVCache | None = None, cached=None) -> FrozenStates:
        """Run the blocks over ids (B, T); returns what they computed.

        documents  (B, T) integers: a token attends to its own document only, padding is document
                   0; a Packed, only without a cache; None: no borders
        cache      the tokens follow those in it, and are in it afterwards
        cached     hidden, keys and values of these tokens, if the blocks have computed them before

        Raises ValueError past the last learned position.
        """
        tokens = ids.shape[1]
        past = 0
        if cache is not None:
            past = cache.length
            documents = cache.extend(documents, tokens)
        positions, mask = positions_and_mask(tokens, past, documents, ids.device)
        inputs = self.embed(ids)                                        # (B, T, C)
        cos_sin = None
        if self.embed_positions is None:
            if self.inv_freq is None:
                self.inv_freq = rope_inv_freq(self.config)
            angles = positions[..., None] * self.inv_freq.to(ids.device)
            # rotated by in all layers, and in the path
            cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1)  # (B, 2, T, D/2)
        elif int(positions.max()) >= self.config.max_positions:
            # an index beyond the table would be an error far from its cause
            raise ValueError(f"{int(positions.max()) + 1} tokens are too long for this model; "
                             f"allowed: {self.config.max_positions}")
        if cached is not None:
            return FrozenStates(*cached, positions, mask, cos_sin, inputs)
        x = self.add_positions(inputs, positions)
        # every layer's keys and values are returned: the path attends to them, layer by layer
        keys = []
        values = []
        for layer, block in enumerate(self.blocks):
            x, k, v = block(x, mask, cos_sin, cache, layer)
            keys.append(k)
            values.append(v)
        return FrozenStates(x, tuple(keys), tuple(values), positions, mask, cos_sin, inputs)

    def add_positions(self, x, positions):
        """x (..., C) plus learned embeddings of its positions, if the model has such."""
        if self.embed_positions is None:
            return x
        return x + self.embed_positions(positions)

    def logits(self, hidden):
        head = self.head.weight if self.head_copy is None else self.head_copy
        return F.linear(self.ln_f(hidden), head)                        # (..., C) -> (..., V)

    def log_p(self, hidden, y):
        """log p (N,) float32 of tokens y (N,) after hidden (N, C), by the same logits."""
        n, head = self.ln_f(hidden), self.head.weight
        head_learns = torch.is_grad_enabled() and head.requires_grad
        learning = head_learns or (torch.is_grad_enabled() and n.requires_grad)
        return log_p(n, head, y, learning, head_learns)[0]

    def forward(self, ids, documents=None):
        """Logits (B, T, V) of the next token at every position of ids (B, T)."""
        return self.logits(self.read(ids, documents).hidden)

    # --- weights ---

    def fingerprint(self) -> str:
        """sha256 of all weights, see data.checkpoints.weights."""
        return fingerprint(self)

    @classmethod
    def from_pretrained(cls, name_or_dir: str, dtype: torch.dtype | None = None,
                        device: str | None = None, cache_dir: str | None = None) -> "LM":
        """Load a model by name or from a directory in Hugging Face layout.

        `pick_device` chooses where dtype and device are None. Raises ValueError with one line:
        what is missing, left over, misshapen, truncated or not a number.
        """
        directory = resolve(str(name_or_dir), cache_dir)
        device, dtype = pick_device(device, dtype)
        config = ModelConfig.from_hf(read_config(directory))
        files = weight_files(directory)
        config.check_depth(files)
        with torch.device("meta"):      # no memory yet: the weights are read straight into place
            model = cls(config)
        plan = plan_weights(model, files, directory)
        # Module.to_empty would import sympy
        memory = {name: torch.empty(p.shape, dtype=dtype, device=device)
                  for name, p in model.named_parameters()}
        model.load_state_dict(memory, strict=False, assign=True)
        model.tie()                     # the head has the embedding's memory
        load_weights(model, plan, files)
        # absolute, or the path would lose its base as soon as one works elsewhere
        source = Path(name_or_dir)
        model.directory = str(source.resolve() if source.is_dir() else name_or_dir)
        return model.eval()

    def save_pretrained(self, directory: str | Path):
        """Write config.json and model.safetensors in Hugging Face layout, each appearing whole."""
        save_weights(self, Path(directory))


# --- run alone ------------------------------------------------------------------------------------

@torch.no_grad()
def main():
    """The embedded model reads a map and a start, and says where one step leads."""
    lm = LM.from_pretrained("tiny", torch.float32, "cpu")
    tokenizer = load_tokenizer(resolve("tiny"), lm.config.vocab_size)
    ids = torch.tensor([tokenizer.encode_start("kb cc pp ln mm ad hg np ja fm eo df;h")])
    at_once = lm(ids)[:, -1].softmax(-1)
    for p, token in zip(*(found[0].tolist() for found in at_once.topk(3))):
        print(f"{tokenizer.decode([token])!r}  p = {p:.3f}")
    cache = KVCache()
    for token in ids.split(1, dim=1):
        states = lm.read(token, cache=cache)
    one_by_one = lm.logits(states.hidden)[:, -1].softmax(-1)
    print("the same with a KV cache:", torch.allclose(one_by_one, at_once, atol=1e-5))


if __name__ == "__main__":
    main()
