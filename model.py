"""The frozen language model: one decoder-only Transformer for GPT-2, Llama 3 and Qwen 2.5, weights read by hand.

`FAMILIES` is the table of differences and the weight map; nothing else in the project knows one family from another.
Read solvers.py and diffusion.py first: they are the method. Here is what it is built on (L2D paper, section 3.1).

Shapes, in every file: B batch, T tokens (queries), S tokens (keys), C hidden width, H heads, G key/value heads,
D head width, L layers, V vocabulary, Z width of the diffusion space.

    python -c "from model import LM; print(LM.from_pretrained('tiny').config)"
"""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.checkpoint import load_weights, read_json, write_json, write_safetensors

LOGITS = 1 << 26   # most logits held at once while training: with 128,256 words, 523 positions

# theirs -> ours. A tuple on the right: one fused matrix that we split; `{i}` is the layer.
LLAMA_MAP = {
    "model.embed_tokens": ("embed",), "model.norm": ("norm_f",), "lm_head": ("head",),
    "model.layers.{i}.input_layernorm": ("blocks.{i}.norm_attn",),
    "model.layers.{i}.self_attn.q_proj": ("blocks.{i}.q",), "model.layers.{i}.self_attn.k_proj": ("blocks.{i}.k",),
    "model.layers.{i}.self_attn.v_proj": ("blocks.{i}.v",), "model.layers.{i}.self_attn.o_proj": ("blocks.{i}.o",),
    "model.layers.{i}.post_attention_layernorm": ("blocks.{i}.norm_mlp",),
    "model.layers.{i}.mlp.gate_proj": ("blocks.{i}.mlp.gate",), "model.layers.{i}.mlp.up_proj": ("blocks.{i}.mlp.up",),
    "model.layers.{i}.mlp.down_proj": ("blocks.{i}.mlp.down",),
}
GPT2_MAP = {
    "wte": ("embed",), "wpe": ("embed_positions",), "ln_f": ("norm_f",), "lm_head": ("head",),
    "h.{i}.ln_1": ("blocks.{i}.norm_attn",), "h.{i}.ln_2": ("blocks.{i}.norm_mlp",),
    "h.{i}.attn.c_attn": ("blocks.{i}.q", "blocks.{i}.k", "blocks.{i}.v"), "h.{i}.attn.c_proj": ("blocks.{i}.o",),
    "h.{i}.mlp.c_fc": ("blocks.{i}.mlp.up",), "h.{i}.mlp.c_proj": ("blocks.{i}.mlp.down",),
}


@dataclass(frozen=True)
class Family:
    """What sets one `model_type` apart. `hf` renames the keys of config.json that its authors call otherwise."""
    weights: dict
    norm: str = "rms"              # "rms" or "layer"
    positions: str = "rotary"      # "rotary" or "learned"
    gated: bool = True             # SwiGLU (gate, up, down) or plain (up, down)
    qkv_bias: bool = False
    tied: bool = False             # what a missing `tie_word_embeddings` means
    transposed: tuple = ()         # modules stored (in, out): GPT-2's Conv1D
    prefix: str = ""               # some files put this before every name
    ignored: tuple = ()            # buffers that old checkpoints carry
    hf: dict = field(default_factory=dict)


GPT2_KEYS = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
             "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon"}
FAMILIES = {
    "llama": Family(LLAMA_MAP, ignored=("rotary_emb.inv_freq",)),
    "qwen2": Family(LLAMA_MAP, qkv_bias=True, ignored=("rotary_emb.inv_freq",)),
    "gpt2": Family(GPT2_MAP, norm="layer", positions="learned", gated=False, tied=True, prefix="transformer.",
                   transposed=("c_attn", "c_proj", "c_fc"), ignored=("attn.bias", "attn.masked_bias"), hf=GPT2_KEYS),
}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
               "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
REFUSED = {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "use_sliding_window": False,
           "add_cross_attention": False}   # a config that sets one of these otherwise describes another network


def choices(received, allowed, what: str, hint: str = ""):
    """Raise ValueError in the project's one form unless `received` is among `allowed`."""
    if received not in allowed:
        raise ValueError(f"{what} {received!r} is not supported; allowed: {', '.join(map(str, allowed))}{hint}")
    return received


@dataclass
class ModelConfig:
    """The numbers of one model. `raw` is its config.json, kept so that saving writes back what was read."""
    model_type: str
    vocab_size: int        # V
    hidden_size: int       # C
    layers: int            # L
    heads: int             # H
    kv_heads: int          # G
    head_dim: int          # D
    mlp_width: int
    max_positions: int
    norm_eps: float
    activation: str
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rope: dict
    raw: dict = field(repr=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @classmethod
    def from_hf(cls, raw: dict) -> "ModelConfig":
        """From a config.json in Hugging Face layout. Raises ValueError for anything that we would have to guess."""
        family = FAMILIES[choices(raw.get("model_type"), FAMILIES, "model_type")]

        def get(key, default=None):
            value = raw.get(family.hf.get(key, key))
            if value is None and default is None:
                raise ValueError(f"config.json has no {family.hf.get(key, key)!r}, which model_type {raw['model_type']!r} needs")
            return default if value is None else value

        for key, expected in REFUSED.items():
            choices(raw.get(key, expected), [expected], f"config.json: {key} =")
        width, heads = get("hidden_size"), get("num_attention_heads")
        gpt2 = family.positions == "learned"   # GPT-2 has a bias on every matrix, the others say so themselves
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        choices(rope.get("rope_type", rope.get("type", "default")), ["default", "llama3"], "rope type")
        needs = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if "llama3" in rope.values() and (absent := [key for key in needs if key not in rope]):
            raise ValueError(f"config.json: the llama3 rope scaling has no {', '.join(absent)}")
        return cls(model_type=raw["model_type"], vocab_size=get("vocab_size"), hidden_size=width,
                   layers=get("num_hidden_layers"), heads=heads, kv_heads=get("num_key_value_heads", heads),
                   head_dim=get("head_dim", width // heads), mlp_width=get("intermediate_size", 4 * width if gpt2 else None),
                   max_positions=get("max_position_embeddings"), norm_eps=get("rms_norm_eps", 1e-5 if gpt2 else 1e-6),
                   activation=choices(get("hidden_act", "gelu_new" if gpt2 else "silu"), ACTIVATIONS, "activation"),
                   tied=get("tie_word_embeddings", family.tied),
                   qkv_bias=gpt2 or family.qkv_bias or get("attention_bias", False),
                   o_bias=gpt2 or get("attention_bias", False), mlp_bias=gpt2 or get("mlp_bias", False),
                   rope={"rope_theta": get("rope_theta", 10000.0), **rope}, raw=raw)


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each pair of coordinates, (D/2,) float32; Llama 3 slows the low ones down (its `rope_scaling`)."""
    # ω_i = θ^(−2i/D)
    omega = config.rope["rope_theta"] ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    rope = config.rope
    if rope.get("rope_type", rope.get("type")) == "llama3":
        turns = rope["original_max_position_embeddings"] * omega / (2 * math.pi)   # full turns in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)                # 0: divide by factor, 1: leave
        omega = keep * omega + (1 - keep) * omega / rope["factor"]
    return omega


def rotate(x, turns):
    """Rotary position embedding (Su et al. 2021) in the rotate-half layout: x (B, ·, T, D), turns (B, T, D/2, 2) cos and sin."""
    cos, sin = turns[:, None].unbind(-1)                                # (B, 1, T, D/2)
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Norm(nn.Module):
    """RMSNorm or LayerNorm. The diffusion path passes `scale` a and `shift` s: (w + a)·norm(x) + b + s."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rms, self.eps = config.family.norm == "rms", config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x, scale=0.0, shift=0.0):
        if self.rms:
            n = x.float()
            # norm(x) = x / √(mean(x²) + ε)
            n = (n * torch.rsqrt(n.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        else:
            n = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        shift = shift if self.bias is None else shift + self.bias
        return (self.weight + scale) * n + shift


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)) where there is a gate, down(act(up(x))) where not; built from any three modules."""

    def __init__(self, gate, up, down, act):
        super().__init__()
        self.gate, self.up, self.down, self.act = gate, up, down, act

    def forward(self, x):
        return self.down(self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm layer of the frozen path."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, f, d = config.hidden_size, config.mlp_width, config.head_dim
        self.norm_attn, self.norm_mlp = Norm(config), Norm(config)
        self.q = nn.Linear(c, config.heads * d, bias=config.qkv_bias)
        self.k = nn.Linear(c, config.kv_heads * d, bias=config.qkv_bias)
        self.v = nn.Linear(c, config.kv_heads * d, bias=config.qkv_bias)
        self.o = nn.Linear(config.heads * d, c, bias=config.o_bias)
        gate = nn.Linear(c, f, bias=config.mlp_bias) if config.family.gated else None
        self.mlp = MLP(gate, nn.Linear(c, f, bias=config.mlp_bias), nn.Linear(f, c, bias=config.mlp_bias),
                       ACTIVATIONS[config.activation])

    def forward(self, x, context):
        n = self.norm_attn(x)                                           # (B, T, C)
        layer = context.append(self.k(n), self.v(n))
        x = x + self.o(context.attend(layer, self.q(n)))                # (B, T, C)
        return x + self.mlp(self.norm_mlp(x))                           # (B, T, C)


@dataclass
class Context:
    """What the frozen path has computed: all that the diffusion path may look at. Also the key/value cache while decoding.

    keys, values  L tensors (B, G, S, D), keys already rotated
    positions     (B, T) of the current queries; each segment counts from 0
    turns         (B, T, D/2, 2) cos and sin of the current queries' rotary angles, or None
    mask          (B, 1, T, S) True where a query may look, or None: plain causal
    segments      (B, S) or None. Tokens see only their own segment: padding is 0, packed examples 1, 2, 3, ...
    hidden        (B, T, C) last hidden state, before the final norm
    """
    head_dim: int
    keys: list = field(default_factory=list)
    values: list = field(default_factory=list)
    positions: torch.Tensor | None = None
    turns: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    layer: int = 0

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)     # (B, T, H·D) -> (B, H, T, D)

    def append(self, k, v) -> int:
        """Add this layer's keys and values (B, T, G·D) of the current tokens; returns the layer's number."""
        k, v, layer = self.heads(k), self.heads(v), self.layer
        k = k if self.turns is None else rotate(k, self.turns)
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat((self.keys[layer], k), dim=2)  # (B, G, S, D)
            self.values[layer] = torch.cat((self.values[layer], v), dim=2)
        self.layer += 1
        return layer

    def attend(self, layer: int, q):
        """Causal attention of the queries q (B, T, H·D) to the frozen keys and values of `layer`."""
        q = self.heads(q)
        q = q if self.turns is None else rotate(q, self.turns)        # (B, H, T, D)
        k, v = self.keys[layer], self.values[layer]                     # (B, G, S, D)
        # softmax(q·kᵀ / √D)·v
        out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), self.mask, enable_gqa=k.shape[1] != q.shape[1],
                                             is_causal=self.mask is None and q.shape[2] > 1)
        return out.transpose(1, 2).flatten(2)                           # (B, T, H·D)

    def extend(self, ids, segments=None):
        """Positions and mask of the next tokens `ids` (B, T), after the ones already cached."""
        (batch, tokens), past = ids.shape, self.keys[0].shape[2] if self.keys else 0
        index = torch.arange(past + tokens, device=ids.device)
        mask, first, self.layer = index <= index[-tokens:, None], 0, 0  # (T, S)
        if segments is not None:
            segments = segments if self.segments is None else torch.cat((self.segments, segments), dim=1)
            starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
            first = (index * starts).cummax(dim=1).values               # (B, S) where each token's segment began
            mask = mask & (segments[:, -tokens:, None] == segments[:, None, :])
        trivial = segments is None and (past == 0 or tokens == 1)
        self.segments = segments                                        # (B, S)
        self.positions = (index - first).expand(batch, -1)[:, -tokens:]  # (B, T)
        self.mask = None if trivial else mask.expand(batch, tokens, -1)[:, None]

    def last(self) -> "Context":
        """Only the last token of every sequence remains current: what decoding goes on from."""
        tail = lambda x: None if x is None else x[:, -1:]
        self.hidden, self.positions, self.turns = tail(self.hidden), tail(self.positions), tail(self.turns)
        self.mask = None if self.mask is None else self.mask[:, :, -1:]
        return self

    def rows(self, index) -> "Context":
        """The same for some sequences of the batch only, index (n,)."""
        pick = lambda x: None if x is None else x[index]
        return Context(self.head_dim, [k[index] for k in self.keys], [v[index] for v in self.values], pick(self.positions),
                       pick(self.turns), pick(self.mask), pick(self.segments), pick(self.hidden), self.layer)


class LM(nn.Module):
    """A decoder-only Transformer. `lm(ids)` gives the logits; `lm.context(ids)` what the diffusion path needs."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.directory = config, None
        c, learned = config.hidden_size, config.family.positions == "learned"
        self.embed = nn.Embedding(config.vocab_size, c)
        self.embed_positions = nn.Embedding(config.max_positions, c) if learned else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_f = Norm(config)
        self.head = nn.Linear(c, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    @cached_property
    def frequencies(self):
        return rope_frequencies(self.config)

    def context(self, ids, segments=None, cache: Context | None = None) -> Context:
        """Run the blocks over ids (B, T) and keep what they computed.

        segments: (B, T) integers, see Context; None means that all tokens belong together. With `cache`, the tokens
        continue the ones in it, and the same object comes back, longer. Raises ValueError past the last learned position.
        """
        context = Context(self.config.head_dim) if cache is None else cache
        context.extend(ids, segments)
        x = self.embed(ids)                                             # (B, T, C)
        if self.embed_positions is None:
            angles = context.positions[..., None] * self.frequencies.to(ids.device)
            context.turns = torch.stack((angles.cos(), angles.sin()), dim=-1)
        else:
            x = x + self.position_rows(context.positions)
        for block in self.blocks:
            x = block(x, context)
        context.hidden = x
        return context

    def position_rows(self, positions):
        """Learned position embeddings (B, T, C), zero for rotary models: the diffusion path starts from them too."""
        if self.embed_positions is None:
            return 0.0
        if positions.numel() and positions.max() >= self.config.max_positions:
            raise ValueError(f"{int(positions.max()) + 1} tokens are too long for this model; allowed: {self.config.max_positions}")
        return self.embed_positions(positions)

    def logits(self, hidden):
        return self.head(self.norm_f(hidden))                           # (B, T, C) -> (B, T, V)

    def losses(self, hidden, targets):
        """Cross-entropy (N,) of targets (N,) after hidden (N, C), without ever holding more than LOGITS logits at once."""
        score = lambda h, y: F.cross_entropy(self.logits(h).float(), y, reduction="none")
        size = max(1, LOGITS // self.config.vocab_size)
        if len(targets) <= size:
            return score(hidden, targets)
        # a piece's logits are forgotten and computed again in the backward pass
        return torch.cat([checkpoint(score, h, y, use_reentrant=False) for h, y in zip(hidden.split(size), targets.split(size))])

    def forward(self, ids, segments=None):
        """Logits (B, T, V) of the next token at every position of ids (B, T)."""
        return self.logits(self.context(ids, segments).hidden)

    def init_weights(self, generator: torch.Generator) -> "LM":
        """GPT-2's initialisation: N(0, 0.02²), the matrices that write to the residual stream smaller by √(2L)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" in name:
                nn.init.ones_(p)
            else:
                residual = name.endswith((".o.weight", ".down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02, generator=generator)
        return self

    def fingerprint(self) -> str:
        """sha256 of all weights as bfloat16, so that a model has the same one in whatever precision it was loaded."""
        digest = hashlib.sha256()
        for name, p in sorted(self.named_parameters()):
            digest.update(name.encode())
            digest.update(p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(cls, name_or_dir: str, dtype: torch.dtype | None = None, device: str | None = None,
                        cache_dir: str | None = None) -> "LM":
        """Load a model by name or from a directory in Hugging Face layout.

        dtype and device are chosen by `pick_device` where None. Raises ValueError with one line that says what is missing,
        left over, misshapen, truncated or not a number.
        """
        from data.hub import resolve
        directory = resolve(str(name_or_dir), cache_dir)
        device, dtype = pick_device(device, dtype)
        with torch.device("meta"):
            model = cls(ModelConfig.from_hf(read_json(directory / "config.json")))
        model = model.to(dtype).to_empty(device=device)
        if model.config.tied:
            model.head.weight = model.embed.weight      # to_empty gave each its own
        load_weights(model, weight_map(model), directory)
        model.directory = str(Path(name_or_dir).resolve()) if Path(name_or_dir).is_dir() else str(name_or_dir)
        return model.eval()

    def save_pretrained(self, directory: str | Path):
        """Write config.json and model.safetensors in Hugging Face layout, each by write-then-rename."""
        directory, ours = Path(directory), dict(self.named_parameters())
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for theirs, names, transposed in weight_map(self):
            weight = torch.cat([ours[name].detach().cpu() for name in names])
            tensors[theirs] = (weight.T if transposed else weight).contiguous()
        write_safetensors(tensors, directory / "model.safetensors", {"format": "pt"})
        write_json(self.config.raw, directory / "config.json")


def pick_device(device: str | None = None, dtype: torch.dtype | None = None) -> tuple[str, torch.dtype]:
    """CUDA, else MPS, else CPU; bfloat16 where the GPU computes in it, else float32. Raises ValueError for what is not here."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    device = device or here[0]
    choices(device.split(":")[0], here, "--device")
    half = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return device, dtype or (torch.bfloat16 if half else torch.float32)


def weight_map(model: LM):
    """(name in the file, names of our parameters, stored transposed?) for every tensor of the model's family."""
    family, ours = model.config.family, dict(model.named_parameters())   # tied: the head has no entry of its own
    for layer in range(model.config.layers):
        for theirs, modules in family.weights.items():
            if layer and "{i}" not in theirs:
                continue
            for kind in ("weight", "bias"):
                names = [f"{module.format(i=layer)}.{kind}" for module in modules]
                if names[0] in ours:
                    transposed = kind == "weight" and theirs.endswith(family.transposed or ("\0",))
                    yield f"{theirs.format(i=layer)}.{kind}", names, transposed


class LoRA(nn.Module):
    """A frozen Linear plus a trainable low-rank correction (Hu et al. 2021); `merged` folds the correction in.

    A starts as N(0, 1)/r and B as zero, as in the L2D code, so that training starts from the frozen matrix.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__()
        self.frozen = (linear,)        # a tuple hides it from the module tree: it is saved and counted with its model only
        device = linear.weight.device
        a = torch.randn(linear.in_features, rank, generator=generator, device="cpu" if generator else device) / rank
        self.A, self.scale = nn.Parameter(a.to(device)), alpha / rank
        self.B = nn.Parameter(torch.zeros(rank, linear.out_features, device=device))

    def forward(self, x):
        # y = W·x + (α/r)·B·A·x
        return self.frozen[0](x) + self.scale * ((x @ self.A.to(x.dtype)) @ self.B.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        linear = self.frozen[0]
        linear.weight += self.scale * (self.A @ self.B).T.to(linear.weight.dtype)
        return linear


def map_linears(lm: LM, convert):
    """Replace every matrix of every block by `convert(matrix)`: how the LoRA baseline is put in and folded back."""
    for block in lm.blocks:
        for owner in (block, block.mlp):
            for name, module in list(owner.named_children()):
                if isinstance(module, (nn.Linear, LoRA)):
                    setattr(owner, name, convert(module))
