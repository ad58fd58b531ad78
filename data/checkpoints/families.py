"""The table of differences between model families: the one file that a new family changes.

Nothing else in the project distinguishes GPT-2 from Llama or Qwen 2.5. A family is: the names of
its settings in config.json, the values of absent settings, and the names of its matrices in the
files. `ModelConfig` is our form of a config.json. Run alone it prints the names of all tensors:

    python -m data.checkpoints.families
"""

from dataclasses import dataclass, field
from functools import partial

import torch.nn.functional as F

from data.system.command import check_range, choices, command

# Theirs -> ours; `{i}` is the layer. Several names on the right are one fused matrix.
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
# The values of absent settings: the defaults of transformers.
LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Family:
    """The differences of one `model_type`."""
    weights: dict
    norm: str = "rms"              # "rms" or "layer"
    positions: str = "rotary"      # "rotary" or "learned"
    gated: bool = True             # SwiGLU (gate, up, down) or plain (up, down)
    biases: tuple = ()             # of "qkv", "o", "mlp": a bias whatever config.json says
    transposed: tuple = ()         # modules stored (in, out): GPT-2's Conv1D
    prefix: str = ""               # some files put this before every name
    ignored: tuple = ("rotary_emb.inv_freq",)       # buffers in old checkpoints
    keys: dict = field(default_factory=dict)        # names of settings that differ from Llama's
    defaults: dict = field(default_factory=LLAMA_DEFAULTS.copy)

    def read(self, raw: dict, key: str, default=None):
        """The value of `key` in a config.json, under the family's own name for it.

        Raises ValueError for a value out of range, and for an absent one without a default.
        """
        name = self.keys.get(key, key)
        value = raw.get(name)
        if value is None:
            value = self.defaults.get(key, default)
        if value is None:
            raise ValueError(f"config.json has no {name!r}, which model_type "
                             f"{raw['model_type']!r} needs")
        if key in RANGES:
            check_range(f"config.json: {name}", value, *RANGES[key])
        return value


FAMILIES = {
    "llama": Family(LLAMA_MAP),
    "qwen2": Family(
        LLAMA_MAP,
        biases=("qkv",),
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 32768},
    ),
    # without its attention window, see ModelConfig.check
    "mistral": Family(
        LLAMA_MAP,
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8},
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
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={"rms_norm_eps": 1e-5, "hidden_act": "gelu_new", "tie_word_embeddings": True},
    ),
}


def weight_map(family: Family, layers: int, ours):
    """(name in the file, names of our parameters, stored transposed?) for every tensor of a model.

    ours: the names of our parameters. A tied head is not one of them, so it has no entry.
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
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
# A config.json with other values describes another network.
REQUIRED = {
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_sliding_window": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# (low, high, kind) of check_range
POSITIVE = (1e-30, 1e30)
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
RANGES = {
    **dict.fromkeys(SIZES, (1, 10**8, int)),
    **dict.fromkeys(SWITCHES, (False, True, bool)),
    "rms_norm_eps": (0, 1),
    "rope_theta": POSITIVE,
}


@dataclass
class ModelConfig:
    """The settings of one model. `raw` is its config.json, which saving writes unchanged."""
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

    @property
    def numbers(self) -> dict:
        """All settings on which the computation depends, in a form for JSON."""
        return {name: value for name, value in vars(self).items() if name != "raw"}

    @classmethod
    def from_hf(cls, raw: dict) -> "ModelConfig":
        """From a config.json. Raises ValueError for settings that are unknown or not supported."""
        family = FAMILIES[choices(raw.get("model_type"), FAMILIES, "model_type")]
        for key in ("quantization_config", "compression_config"):
            if raw.get(key):
                raise ValueError(f"config.json: the weights are quantised ({key} "
                                 f"{str(raw[key])[:40]}); use those in bfloat16 or float32")
        read = partial(family.read, raw)
        width = read("hidden_size")
        heads = read("num_attention_heads")
        # GPT-2's MLP is four times as wide as the model if its width is absent
        mlp_default = None if family.gated else 4 * width
        attention_bias = read("attention_bias", False)
        config = cls(
            model_type=raw["model_type"],
            vocab_size=read("vocab_size"),
            hidden_size=width,
            layers=read("num_hidden_layers"),
            heads=heads,
            kv_heads=read("num_key_value_heads", heads),
            head_dim=read("head_dim", max(1, width // heads)),
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
        config.check()
        return config

    def check(self):
        """Raise ValueError for a config.json that describes a network which we do not build."""
        for key, expected in REQUIRED.items():
            if self.raw.get(key) is not None:
                choices(self.raw[key], [expected], f"config.json: {key} =")
        layer_types = self.raw.get("layer_types") or []
        if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
            raise ValueError("config.json: layer_types other than full_attention are not supported")
        if self.heads % self.kv_heads:
            raise ValueError(f"config.json: {self.heads} heads cannot share "
                             f"{self.kv_heads} key/value heads evenly")
        if self.family.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"config.json: head_dim = {self.head_dim} is odd; "
                             "rotary positions rotate pairs")
        if self.family.positions == "learned" and self.heads * self.head_dim != self.hidden_size:
            raise ValueError(f"config.json: a width of {self.hidden_size} cannot be divided into "
                             f"{self.heads} heads")
        # Mistral's default is a window of 4,096 tokens; one of all positions has no effect
        window = self.raw.get("sliding_window", 4096)
        if self.model_type == "mistral" and window is not None:
            check_range("config.json: sliding_window (null: none)", window, self.max_positions,
                        10**8, int)

    def check_depth(self, tensors):
        """Raise ValueError for more layers than tensors, which would take for ever to build."""
        if self.layers > len(tensors):
            raise ValueError(f"config.json has {self.layers:,} layers, but the weights are only "
                             f"{len(tensors):,} tensors; use the config.json that came with them")


def read_rope(raw: dict, theta: float) -> dict:
    """The rotary settings of a config.json, which has two names for them, an old and a new one.

    Raises ValueError if both are present with different values.
    """
    parts = [raw.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("config.json: rope_parameters and rope_scaling must be objects or null")
    if raw.get("rope_theta") is not None:
        parts.append({"rope_theta": theta})
    rope = {}
    for part in parts:
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            if rope.setdefault(key, value) != value:
                raise ValueError(f"config.json gives two values for {key}: {str(rope[key])[:40]} "
                                 f"and {str(value)[:40]}; keep the right one")
    kind = choices(rope.get("rope_type", "default"), ["default", "llama3"], "rope type")
    used = ("rope_theta", *LLAMA3_ROPE) if kind == "llama3" else ("rope_theta",)
    rope = {"rope_theta": theta, **rope, "rope_type": kind}
    wrong = set(rope) ^ {*used, "rope_type"}
    # some files state that the whole head is rotated, as it is here
    if rope.get("partial_rotary_factor") == 1:
        wrong.remove("partial_rotary_factor")
    if wrong:
        raise ValueError(f"config.json: missing or unknown settings of the {kind} rope: "
                         f"{', '.join(sorted(wrong))}")
    for key in used:
        check_range(f"config.json: {key}", rope[key], *POSITIVE)
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError("config.json: high_freq_factor must be more than low_freq_factor")
    return rope


@command("data.checkpoints.families")
def main(argv=None):
    for name, family in FAMILIES.items():
        print(f"{name}: {family.norm} norm, {family.positions} positions")
        for theirs, ours in family.weights.items():
            print(f"   {family.prefix + theirs:48} {', '.join(ours)}")


if __name__ == "__main__":
    main()
