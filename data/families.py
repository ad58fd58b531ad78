"""The table of differences between model families: the one file that a new family touches.

Nothing else in the project knows GPT-2 from Llama or Qwen 2.5. A family is what its config.json
calls things, what an absent key means there, and where its files keep each matrix. `ModelConfig`
is what we make of a config.json. Read model.py for what the parts are; run alone this file prints
where the tensors of a model are found:

    python -m data.families
"""

from dataclasses import dataclass, field
from functools import partial

import torch.nn.functional as F

# Theirs -> ours; `{i}` is the layer. Several names on the right: one fused matrix that we split.
LLAMA_MAP = {
    "model.embed_tokens": ("embed",),
    "model.layers.{i}.input_layernorm": ("blocks.{i}.norm_attn",),
    "model.layers.{i}.self_attn.q_proj": ("blocks.{i}.q",),
    "model.layers.{i}.self_attn.k_proj": ("blocks.{i}.k",),
    "model.layers.{i}.self_attn.v_proj": ("blocks.{i}.v",),
    "model.layers.{i}.self_attn.o_proj": ("blocks.{i}.o",),
    "model.layers.{i}.post_attention_layernorm": ("blocks.{i}.norm_mlp",),
    "model.layers.{i}.mlp.gate_proj": ("blocks.{i}.mlp.gate",),
    "model.layers.{i}.mlp.up_proj": ("blocks.{i}.mlp.up",),
    "model.layers.{i}.mlp.down_proj": ("blocks.{i}.mlp.down",),
    "model.norm": ("ln_f",),
    "lm_head": ("head",),
}
GPT2_MAP = {
    "wte": ("embed",),
    "wpe": ("embed_positions",),
    "h.{i}.ln_1": ("blocks.{i}.norm_attn",),
    "h.{i}.attn.c_attn": ("blocks.{i}.q", "blocks.{i}.k", "blocks.{i}.v"),
    "h.{i}.attn.c_proj": ("blocks.{i}.o",),
    "h.{i}.ln_2": ("blocks.{i}.norm_mlp",),
    "h.{i}.mlp.c_fc": ("blocks.{i}.mlp.up",),
    "h.{i}.mlp.c_proj": ("blocks.{i}.mlp.down",),
    "ln_f": ("ln_f",),
    "lm_head": ("head",),
}
# What GPT-2's config.json calls the things that the others agree on.
GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
GPT2_DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "hidden_act": "gelu_new",
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Family:
    """What sets one `model_type` apart."""
    weights: dict
    norm: str = "rms"              # "rms" or "layer"
    positions: str = "rotary"      # "rotary" or "learned"
    gated: bool = True             # SwiGLU (gate, up, down) or plain (up, down)
    biases: tuple = ()             # of "qkv", "o", "mlp": a bias whatever config.json says
    transposed: tuple = ()         # modules stored (in, out): GPT-2's Conv1D
    prefix: str = ""               # some files put this before every name
    ignored: tuple = ()            # buffers that old checkpoints carry
    keys: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)

    def read(self, raw: dict, key: str, default=None):
        """The value of `key` in a config.json, under the family's own name for it.

        Raises ValueError where it is absent and nobody says what that means.
        """
        name = self.keys.get(key, key)
        value = raw.get(name)
        if value is None:
            value = self.defaults.get(key, default)
        if value is None:
            raise ValueError(
                f"config.json has no {name!r}, which model_type {raw['model_type']!r} needs")
        return value


FAMILIES = {
    "llama": Family(
        LLAMA_MAP,
        ignored=("rotary_emb.inv_freq",),
        defaults=LLAMA_DEFAULTS,
    ),
    "qwen2": Family(
        LLAMA_MAP,
        biases=("qkv",),
        ignored=("rotary_emb.inv_freq",),
        defaults=LLAMA_DEFAULTS,
    ),
    "gpt2": Family(
        GPT2_MAP,
        norm="layer",
        positions="learned",
        gated=False,
        biases=("qkv", "o", "mlp"),
        transposed=("c_attn", "c_proj", "c_fc"),
        prefix="transformer.",
        ignored=("attn.bias", "attn.masked_bias"),
        keys=GPT2_KEYS,
        defaults=GPT2_DEFAULTS,
    ),
}


def weight_map(family: Family, layers: int, ours):
    """(name in the file, names of our parameters, stored transposed?) for every tensor of a model.

    ours: the names of our parameters. A tied head is not among them, so it has no entry.
    """
    for theirs, modules in family.weights.items():
        for layer in range(layers if "{i}" in theirs else 1):
            for kind in ("weight", "bias"):
                names = [f"{module.format(i=layer)}.{kind}" for module in modules]
                if names[0] in ours:
                    transposed = kind == "weight" and theirs.endswith(family.transposed)
                    yield f"{theirs.format(i=layer)}.{kind}", names, transposed


# --- config.json ----------------------------------------------------------------------------------

gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
# A config.json that sets one of these otherwise describes another network.
REQUIRED = {
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_sliding_window": False,
    "add_cross_attention": False,
}
LLAMA3_ROPE = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def choices(received, allowed, what: str):
    """Raise ValueError in the project's one form unless `received` is among `allowed`."""
    if received not in allowed:
        names = ", ".join(map(str, allowed))
        raise ValueError(f"{what} {received!r} is not supported; allowed: {names}")
    return received


@dataclass
class ModelConfig:
    """The numbers of one model. `raw` is its config.json, written back unchanged when saving."""
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
    tied: bool             # the head is the input embedding
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
        """From a config.json. Raises ValueError for anything that we would have to guess."""
        family = FAMILIES[choices(raw.get("model_type"), FAMILIES, "model_type")]
        for key, expected in REQUIRED.items():
            choices(raw.get(key, expected), [expected], f"config.json: {key} =")
        read = partial(family.read, raw)
        width = read("hidden_size")
        heads = read("num_attention_heads")
        # only GPT-2 leaves the MLP's width out, and then it is four times the model's
        mlp_default = None if family.gated else 4 * width
        attention_bias = read("attention_bias", False)
        return cls(
            model_type=raw["model_type"],
            vocab_size=read("vocab_size"),
            hidden_size=width,
            layers=read("num_hidden_layers"),
            heads=heads,
            kv_heads=read("num_key_value_heads", heads),
            head_dim=read("head_dim", width // heads),
            mlp_width=read("intermediate_size", mlp_default),
            max_positions=read("max_position_embeddings"),
            norm_eps=read("rms_norm_eps"),
            activation=choices(read("hidden_act"), ACTIVATIONS, "activation"),
            tied=read("tie_word_embeddings"),
            qkv_bias="qkv" in family.biases or attention_bias,
            o_bias="o" in family.biases or attention_bias,
            mlp_bias="mlp" in family.biases or read("mlp_bias", False),
            rope=read_rope(raw, read("rope_theta", 10000.0)),
            raw=raw,
        )


def read_rope(raw: dict, theta: float) -> dict:
    """The rotary settings of a config.json, which two generations of files call differently."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    choices(kind, ["default", "llama3"], "rope type")
    absent = [key for key in LLAMA3_ROPE if key not in rope]
    if kind == "llama3" and absent:
        raise ValueError(f"config.json: the llama3 rope scaling has no {', '.join(absent)}")
    return {"rope_theta": theta, **rope, "rope_type": kind}


def main():
    for name, family in FAMILIES.items():
        print(f"{name}: {family.norm} norm, {family.positions} positions")
        for theirs, ours in family.weights.items():
            print(f"   {family.prefix + theirs:48} {', '.join(ours)}")


if __name__ == "__main__":
    main()
