"""Weights and config.json on disk: exact files, agreement with others, refusals.

Where transformers is installed, its networks are the reference. With NANOL2D_SHARED set to a folder
that holds data/weights, so are the stored logits of two trained models.
"""


import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GPT2, LLAMA, LLAMA_SCALED, QWEN, SCALING, make_ids, make_lm
from data.checkpoints import weights as checkpoint
from data.checkpoints.families import ModelConfig
from data.parts.kv_cache import KVCache
from data.system import disk
from data.system.disk import read_json, write_json
from model import LM


def load(directory, dtype=torch.float32) -> LM:
    return LM.from_pretrained(str(directory), dtype, "cpu")


def saved(directory, config=LLAMA):
    lm = make_lm(config)
    lm.save_pretrained(directory)
    return lm


def same(a, b):
    """Same names, types and bits."""
    a = dict(a.named_parameters())
    b = dict(b.named_parameters())
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def weights(directory):
    return directory / "model.safetensors"


def tensors_of(path):
    """Copies: what load_file returns keeps the file open, and Windows lets nobody replace it."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def change_file(directory, change):
    """Rewrite model.safetensors with the tensors that `change` returns."""
    path = weights(directory)
    save_file(change(tensors_of(path)), path, {"format": "pt"})


def shard(directory):
    """model.safetensors in two shards with an index, written by hand; returns its weight map."""
    tensors = tensors_of(weights(directory))
    place = {}
    for i, name in enumerate(sorted(tensors)):
        place[name] = f"model-0000{1 + i % 2}-of-00002.safetensors"
    for file in set(place.values()):
        some = {name: tensors[name] for name in place if place[name] == file}
        save_file(some, directory / file)
    weights(directory).unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    write_json(index, directory / "model.safetensors.index.json")
    return place


# --- files ----------------------------------------------------------------------------------------

def test_what_is_saved_is_loaded_to_the_bit(family, tmp_path):
    lm = saved(tmp_path, family)
    again = load(tmp_path)
    same(again, lm)
    assert again.config == lm.config
    assert not again.training
    assert read_json(tmp_path / "config.json") == family
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("config, activation, eps, tied, mlp_width", [
    (LLAMA, "silu", 1e-6, False, 48),
    (QWEN, "silu", 1e-6, False, 48),
    (GPT2, "gelu_new", 1e-5, True, 128),
])
def test_what_a_config_leaves_out_is_what_its_family_means(
        config, activation, eps, tied, mlp_width):
    optional = ("hidden_act", "activation_function", "rms_norm_eps", "layer_norm_epsilon",
                "tie_word_embeddings", "rope_theta", "num_key_value_heads")
    short = {key: value for key, value in config.items() if key not in optional}
    found = ModelConfig.from_hf(short)
    assert (found.activation, found.norm_eps, found.tied) == (activation, eps, tied)
    assert (found.kv_heads, found.head_dim, found.mlp_width) == (4, 8, mlp_width)
    assert found.rope["rope_theta"] == 10000.0


def test_bfloat16_loading_rounds_the_weights(family, tmp_path):
    lm = saved(tmp_path, family)
    same(load(tmp_path, torch.bfloat16), lm.to(torch.bfloat16))


def test_shards_copied_in_pieces_equal_the_single_file(family, tmp_path, monkeypatch):
    """Pieces of three rows end inside q, k and v of GPT-2's fused and transposed matrix."""
    lm = saved(tmp_path, family)
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 4 * 32 * 3)
    same(load(tmp_path), lm)
    shard(tmp_path)
    same(load(tmp_path), lm)


@pytest.mark.parametrize("config, prefix, buffer", [
    (GPT2, "", "h.1.attn.bias"),
    (GPT2, "transformer.", "h.1.attn.masked_bias"),
    (LLAMA, "", "model.layers.0.self_attn.rotary_emb.inv_freq"),
])
def test_names_come_with_and_without_prefix_and_with_old_buffers(config, prefix, buffer, tmp_path):
    lm = saved(tmp_path, config)
    change_file(tmp_path, lambda tensors: {
        prefix + name: tensor for name, tensor in {**tensors, buffer: torch.ones(4)}.items()})
    same(load(tmp_path), lm)


def test_gpt2_files_hold_transposed_matrices_and_queries_keys_values_in_one(tmp_path):
    block = saved(tmp_path, GPT2).blocks[1]
    tensors = tensors_of(weights(tmp_path))
    alone = {"attn.c_proj": block.o, "mlp.c_fc": block.mlp.up, "mlp.c_proj": block.mlp.down}
    for name, linear in alone.items():
        assert torch.equal(tensors[f"h.1.{name}.weight"], linear.weight.T)
        assert torch.equal(tensors[f"h.1.{name}.bias"], linear.bias)
    for part, linear in enumerate((block.q, block.k, block.v)):
        columns = slice(32 * part, 32 * part + 32)
        assert torch.equal(tensors["h.1.attn.c_attn.weight"][:, columns], linear.weight.T)
        assert torch.equal(tensors["h.1.attn.c_attn.bias"][columns], linear.bias)


@pytest.mark.parametrize("config, embedding", [
    (LLAMA, "model.embed_tokens.weight"),
    (GPT2, "wte.weight"),
])
def test_a_tied_head_is_the_embedding_and_another_one_is_refused(config, embedding, tmp_path):
    def with_head(change):
        return lambda tensors: {**tensors, "lm_head.weight": change(tensors[embedding].clone())}

    lm = saved(tmp_path, config)
    assert "lm_head.weight" not in tensors_of(weights(tmp_path))
    for change in (dict, with_head(lambda head: head)):
        change_file(tmp_path, change)
        again = load(tmp_path)
        same(again, lm)
        assert again.head.weight is again.embed.weight
    change_file(tmp_path, with_head(lambda head: head + 1))
    refused(tmp_path, "lm_head.weight that is not the embedding", "set it to false")


@torch.no_grad()
def test_fingerprint_is_of_the_weights_not_of_their_precision(family, tmp_path):
    lm = saved(tmp_path, family)
    original = lm.fingerprint()
    assert load(tmp_path).fingerprint() == original
    assert load(tmp_path, torch.bfloat16).fingerprint() == original
    for name, p in lm.named_parameters():
        last = p.view(-1)[-1]
        kept = last.clone()
        last += 0.5
        assert lm.fingerprint() != original, name
        last.copy_(kept)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise disk.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(disk, "save_file", full)
    message = r"cannot write .*w.safetensors \(I/O error: No space.*\); it needs 16 bytes: make"
    with pytest.raises(OSError, match=message):
        disk.write_safetensors({"a": torch.zeros(4)}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


# --- agreement with transformers ------------------------------------------------------------------

SIZES = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}
GPT2_SIZES = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
SCALED = {**SCALING, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
TIED = {**SIZES, "tie_word_embeddings": True}
UNTIED = {**SIZES, "tie_word_embeddings": False}
THEIRS = {
    "gpt2": ("GPT2", GPT2_SIZES),
    "gpt2 square": ("GPT2", {**GPT2_SIZES, "n_inner": 32, "layer_norm_epsilon": 0.1}),
    "llama tied": ("Llama", TIED),
    "llama biases": ("Llama", {**UNTIED, "attention_bias": True, "mlp_bias": True}),
    "llama scaled": ("Llama", {**UNTIED, "head_dim": 24, "rope_parameters": SCALED}),
    "llama scaled, tied": ("Llama", {**TIED, "head_dim": 16, "rope_parameters": SCALED}),
    "qwen2": ("Qwen2", {**UNTIED, "rms_norm_eps": 0.1}),
    "qwen2 tied": ("Qwen2", {**TIED, "rope_parameters": PLAIN}),
}
NORMS = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")


def their_model(name, directory):
    """A random network of the other library, saved where ours can read it.

    Weights and biases are large, so that mistakes show.
    """
    transformers = pytest.importorskip("transformers")
    family, sizes = THEIRS[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    theirs = getattr(transformers, kind)(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if key.endswith(NORMS):
                p.copy_(1 + 0.2 * noise)
            else:
                embedding = p.shape[0] in (258, 128)
                p.copy_((0.5 if embedding else 0.25) * noise)
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_logits_agree_with_transformers(name, tmp_path):
    theirs = their_model(name, tmp_path)
    ids = make_ids(3, 96)
    lm = load(tmp_path)
    ours = lm(ids)
    reference = theirs(input_ids=ids).logits
    assert float(reference.std()) > 1
    assert float((ours - reference).abs().max()) <= 1e-4
    assert torch.equal(ours.argmax(-1), reference.argmax(-1))
    # a batch padded on the left
    seen = torch.ones_like(ids)
    seen[1, :20] = 0
    seen[2, :71] = 0
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    reference = theirs(input_ids=ids, attention_mask=seen, position_ids=positions).logits
    reference = reference[seen == 1]
    ours = lm(ids, seen)[seen == 1]
    assert float((ours - reference).abs().max()) <= 1e-4
    assert torch.equal(ours.argmax(-1), reference.argmax(-1))


@pytest.mark.parametrize("name", ["stories260K", "babyllama_tok105"])
@torch.no_grad()
def test_trained_models_agree_with_their_stored_logits(name, shared):
    folder = shared / "data" / "weights" / name
    lm = load(folder / "hf")
    reference = load_file(folder / "reference.safetensors")
    ours = lm(reference["input_ids"][None])[0]
    assert float((ours - reference["logits"]).abs().max()) <= 5e-5
    # and greedy decoding through the cache goes the same way
    greedy = read_json(folder / "reference_greedy.json")
    ids = list(greedy["prompt_ids"])
    cache = KVCache()
    new = ids
    while len(ids) < len(greedy["greedy_ids"]):
        hidden = lm.read(torch.tensor([new]), cache=cache).hidden
        new = [int(lm.logits(hidden[:, -1]).argmax())]
        ids += new
    assert ids == greedy["greedy_ids"]


# --- refusals: one line each ----------------------------------------------------------------------

def refused(directory, *words):
    with pytest.raises(ValueError) as error:
        load(directory)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("config, change, message", [
    (LLAMA, {"model_type": "mamba"},
     "model_type 'mamba' is not supported; allowed: llama, qwen2, mistral, gpt2"),
    (LLAMA, {"hidden_act": "relu6"}, "activation 'relu6' is not supported; allowed: silu, swish"),
    (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0}},
     "rope type 'yarn' is not supported; allowed: default, llama3"),
    (QWEN, {"use_sliding_window": True},
     "config.json: use_sliding_window = True is not supported; allowed: False"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True},
     "scale_attn_by_inverse_layer_idx = True is not supported"),
    (LLAMA, {"hidden_size": None}, "config.json has no 'hidden_size', which model_type 'llama'"),
    (GPT2, {"n_embd": None}, "config.json has no 'n_embd', which model_type 'gpt2' needs"),
    (LLAMA_SCALED, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     "missing or unknown settings of the llama3 rope: high_freq_factor, low_freq_factor"),
    (LLAMA, {"intermediate_size": 50}, "has shape [48, 32], but config.json requires [50, 32]"),
    (GPT2, {"n_inner": 96}, "h.0.mlp.c_fc.weight in "),
    (LLAMA, {"num_hidden_layers": 1},
     "0 missing, 9 (model.layers.1.input_layernorm.weight, ...) left over"),
    (LLAMA, {"num_hidden_layers": 3},
     "9 (model.layers.2.input_layernorm.weight, ...) missing, 0 left over"),
    (LLAMA, {"tie_word_embeddings": False}, "1 (lm_head.weight) missing, 0 left over"),
    (QWEN, {"model_type": "llama"},
     "0 missing, 6 (model.layers.0.self_attn.k_proj.bias, ...) left over"),
    # the weights of another family
    (LLAMA, {**GPT2, "num_hidden_layers": None},
     "are not those of its config.json (model_type gpt2, 2 layers): 28 ("),
])
def test_configs_that_describe_another_network_are_refused(config, change, message, tmp_path):
    saved(tmp_path, config)
    content = {**config, **change}
    content = {key: value for key, value in content.items() if value is not None}
    write_json(content, tmp_path / "config.json")
    refused(tmp_path, message)


@pytest.mark.parametrize("content, message", [
    (None, "config.json does not exist; a model directory holds config.json, "
           "model.safetensors and a tokenizer"),
    (b"{", "config.json is not valid JSON"),
    (b"\xff\xfe{", "config.json is not text in UTF-8"),
    (b"[1, 2]", "config.json holds no JSON object"),
])
def test_a_damaged_config_is_refused(content, message, tmp_path):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(tmp_path, message)


def test_missing_weights_are_refused_and_pickles_never_read(tmp_path):
    saved(tmp_path)
    weights(tmp_path).unlink()
    refused(tmp_path, "has no model.safetensors (nor model.safetensors.index.json); "
                      "copy or download the weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    refused(tmp_path, "has only pytorch_model.bin, a pickle that can run code when it is read")


@pytest.mark.parametrize("change", [
    lambda content: content[:len(content) // 2], lambda content: content[:100],
    lambda content: b"", lambda content: b"<html>" * 99,
])
def test_damaged_weights_are_refused(change, tmp_path):
    saved(tmp_path)
    weights(tmp_path).write_bytes(change(weights(tmp_path).read_bytes()))
    refused(tmp_path, "is truncated or not a safetensors file", "download it again")


def test_weights_of_whole_numbers_are_refused(tmp_path):
    saved(tmp_path)
    change_file(tmp_path, lambda tensors: {name: x.to(torch.int8) for name, x in tensors.items()})
    refused(tmp_path, "is of type I8: is it quantised? allowed: F64, F32, F16, BF16")


def test_an_index_does_not_lead_out_of_its_directory(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    saved(inside)
    place = shard(inside)
    outside.mkdir()
    for file in set(place.values()):
        (inside / file).rename(outside / file)
    index = inside / "model.safetensors.index.json"
    write_json({"weight_map": {name: f"../outside/{file}" for name, file in place.items()}}, index)
    refused(inside, "is missing although model.safetensors.index.json names it")


def test_damaged_shards_are_refused(tmp_path):
    saved(tmp_path)
    place = shard(tmp_path)
    name, file = next(iter(place.items()))
    path = tmp_path / file
    # a tensor is not in the shard that should hold it
    others = tensors_of(path)
    del others[name]
    save_file(others, path)
    refused(tmp_path, name, file)
    # the shard is not there
    path.unlink()
    refused(tmp_path, f"{file} is missing although model.safetensors.index.json names it; "
                      "download this shard again")
    # the index is empty
    index = tmp_path / "model.safetensors.index.json"
    write_json({}, index)
    refused(tmp_path, index.name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(family, value, tmp_path):
    saved(tmp_path, family)
    name = list(tensors_of(weights(tmp_path)))[-1]

    def change(tensors):
        tensors[name][5] = value
        return tensors

    change_file(tmp_path, change)
    refused(tmp_path, f"{name} in ", "holds values that are not finite; download it again")
