"""The table of differences between model families: the one file that a new family touches.

Nothing else in the project knows GPT-2 from Llama or Qwen 2.5. A family is what its config.json
calls things, what an absent key means there, and where its files keep each matrix. `ModelConfig`
is what we make of a config.json. Read model.py for what the parts are; run alone this file prints
where the tensors of a model are found:

    python -m data.checkpoints.families
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
# What an absent key means: the defaults of the configuration classes in transformers.
LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
QWEN2_DEFAULTS = {**LLAMA_DEFAULTS, "max_position_embeddings": 32768}
MISTRAL_DEFAULTS = {
    **LLAMA_DEFAULTS,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
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
        return check_value(name, value, KINDS[key])


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
        defaults=QWEN2_DEFAULTS,
    ),
    # without its window, which is checked below
    "mistral": Family(
        LLAMA_MAP,
        ignored=("rotary_emb.inv_freq",),
        defaults=MISTRAL_DEFAULTS,
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
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
# A config.json that sets one of these otherwise describes another network.
REQUIRED = {
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_sliding_window": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
}
LLAMA3_ROPE = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# What a value may be: a type, and the range of a number, both ends allowed.
SIZE = (int, 1, 10**8)
POSITIVE = ((int, float), 1e-30, 1e30)
SWITCH = (bool, False, True)
KINDS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "intermediate_size": SIZE,
    "max_position_embeddings": SIZE,
    "rms_norm_eps": ((int, float), 0, 1),
    "rope_theta": POSITIVE,
    "hidden_act": (str, "", "\uffff"),
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": SWITCH,
}


def check_value(name: str, value, kind: tuple):
    """Return a value of config.json. Raises ValueError for another type or out of range."""
    types, low, high = kind
    # to Python True is an integer, to whoever wrote the file it is not
    right = isinstance(value, types) and isinstance(value, bool) == (types is bool)
    if not right or not low <= value <= high:
        types = types if isinstance(types, tuple) else (types,)
        names = " or ".join(one.__name__ for one in types)
        limits = "" if str in types or bool in types else f" from {low:g} to {high:g}"
        raise ValueError(f"config.json: {name} = {str(value)[:60]!r} is not valid; "
                         f"allowed: {names}{limits}")
    return value


def choices(received, allowed, what: str):
    """Raise ValueError in the project's one form unless `received` is among `allowed`."""
    # a list or another thing that JSON can hold is in no table
    if not isinstance(received, (str, int, float)) or received not in allowed:
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

    @property
    def numbers(self) -> dict:
        """All that shapes what the model computes, as JSON can hold it."""
        return {name: value for name, value in vars(self).items() if name != "raw"}

    @classmethod
    def from_hf(cls, raw: dict) -> "ModelConfig":
        """From a config.json. Raises ValueError for anything that we would have to guess."""
        family = FAMILIES[choices(raw.get("model_type"), FAMILIES, "model_type")]
        check_network(raw)
        read = partial(family.read, raw)
        width = read("hidden_size")
        heads = read("num_attention_heads")
        # only GPT-2 leaves the MLP's width out, and then it is four times the model's
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
        config.check_heads()
        config.check_window()
        return config

    def check_heads(self):
        """Raise ValueError where the heads cannot be cut as config.json says."""
        if self.heads % self.kv_heads:
            raise ValueError(f"config.json: {self.heads} heads cannot share "
                             f"{self.kv_heads} key/value heads evenly")
        if self.family.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"config.json: head_dim = {self.head_dim} is odd; "
                             "rotary positions turn pairs")
        if self.family.positions == "learned" and self.heads * self.head_dim != self.hidden_size:
            raise ValueError(f"config.json: a width of {self.hidden_size} cannot be cut into "
                             f"{self.heads} heads")

    def check_window(self):
        """Raise ValueError for a Mistral whose attention is cut to a window that would act."""
        # an absent window is one of 4,096 tokens, null is none
        window = self.raw.get("sliding_window", 4096)
        if self.model_type != "mistral" or window is None:
            return
        if check_value("sliding_window", window, SIZE) < self.max_positions:
            raise ValueError(f"config.json: a sliding window of {window} tokens is not supported; "
                             "allowed: null, or one that is never reached")

    def check_depth(self, tensors):
        """Raise ValueError for more layers than tensors: they would take for ever to build."""
        if self.layers > len(tensors):
            raise ValueError(f"config.json asks for {self.layers:,} layers, but the weights are "
                             f"{len(tensors):,} tensors; use the config.json that came with them")


def check_network(raw: dict):
    """Raise ValueError for a config.json that describes another network than we build."""
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", "") if isinstance(raw[key], dict) else ""
            raise ValueError(f"config.json: the weights are quantised ({key} {str(method)[:30]}); "
                             "use the checkpoint in bfloat16 or float32")
    for key, expected in REQUIRED.items():
        if raw.get(key) is not None:
            choices(raw[key], [expected], f"config.json: {key} =")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError("config.json: layer_types other than full_attention are not supported")


def read_rope(raw: dict, theta: float) -> dict:
    """The rotary settings of a config.json, which two generations of files call differently.

    Raises ValueError where both are there and differ: nobody says which one is meant.
    """
    both = [raw.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(rope, dict) for rope in both):
        raise ValueError("config.json: rope_parameters and rope_scaling must be objects or null")
    if "rope_theta" in raw and raw["rope_theta"] is not None:
        both.append({"rope_theta": theta})
    rope = {}
    for part in both:
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            if rope.setdefault(key, value) != value:
                raise ValueError(f"config.json gives two values for {key}: {str(rope[key])[:40]} "
                                 f"and {str(value)[:40]}; keep the right one")
    kind = choices(rope.get("rope_type", "default"), ["default", "llama3"], "rope type")
    used = ("rope_theta", *LLAMA3_ROPE) if kind == "llama3" else ("rope_theta",)
    rope = {"rope_theta": theta, **rope, "rope_type": kind}
    wrong = set(rope) ^ {*used, "rope_type"}
    # some files say that all of a head is turned, as it is here
    if rope.get("partial_rotary_factor") == 1:
        wrong.remove("partial_rotary_factor")
    if wrong:
        raise ValueError(f"config.json: the {kind} rope lacks, or does not know, "
                         f"{', '.join(sorted(wrong))}")
    for key in used:
        check_value(key, rope[key], POSITIVE)
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError("config.json: high_freq_factor must be more than low_freq_factor")
    return rope


def main():
    for name, family in FAMILIES.items():
        print(f"{name}: {family.norm} norm, {family.positions} positions")
        for theirs, ours in family.weights.items():
            print(f"   {family.prefix + theirs:48} {', '.join(ours)}")


if __name__ == "__main__":
    main()
