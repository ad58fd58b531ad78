"""model.py and data/checkpoint.py: the same logits however the text is cut, exact files, agreement with others, refusals.

    python -m pytest tests/test_model.py

Where transformers is installed, its networks are the reference. With NANOL2D_SHARED set to a folder that holds
data/weights, so are the stored logits of two trained models.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model
from conftest import FAMILIES, GPT2, LLAMA, LLAMA_SCALED, QWEN, make_ids, make_lm
from data import checkpoint
from data.checkpoint import read_json, write_json
from data.families import ModelConfig
from model import LM, KVCache, positions_and_mask, rope_inv_freq
from train import init_weights



def close(ours, reference, bound=1e-5):
    """No logit differs by more than `bound` of the largest, and the next token is the same everywhere."""
    assert float((ours - reference).abs().max()) <= bound * float(reference.abs().max())
    assert torch.equal(ours.argmax(-1), reference.argmax(-1))


def decode(lm, ids, documents=None, pieces=(1,)):
    """Logits (B, T, V) as decoding computes them: through the cache, in pieces of these lengths.

    The last length is repeated.
    """
    cache, logits, start = KVCache(lm.config.layers), [], 0
    while start < ids.shape[1]:
        length = pieces[min(len(logits), len(pieces) - 1)]
        part = slice(start, start + length)
        some = None if documents is None else documents[:, part]
        logits.append(lm.logits(lm.read(ids[:, part], some, cache).hidden))
        start = part.stop
    return torch.cat(logits, dim=1)


# --- the same logits however the text is cut --------------------------------------------------------------------------

@pytest.mark.parametrize("pieces", [(1,), (7, 1), (5, 3, 1, 4)])
def test_cached_equals_uncached(family, pieces):
    lm, ids = make_lm(family), make_ids(3, 40)
    with torch.no_grad():
        close(decode(lm, ids, pieces=pieces), lm(ids))


def test_a_left_padded_batch_equals_each_prompt_alone(family):
    """Prefill and five cached tokens. What stands on the padding does not matter, so it is random here."""
    lm, ids, padding = make_lm(family), make_ids(4, 17), (0, 3, 7, 11)
    documents = torch.ones_like(ids)
    for row, length in enumerate(padding):
        documents[row, :length] = 0
    with torch.no_grad():
        for logits in (lm(ids, documents), decode(lm, ids, documents, pieces=(12, 1))):
            for row, length in enumerate(padding):
                close(logits[row, length:], lm(ids[row:row + 1, length:])[0])


def test_packed_examples_do_not_see_each_other(family):
    lm, ids, documents = make_lm(family), make_ids(2, 16), torch.tensor([[0] * 2 + [1] * 6 + [2] * 8] * 2)
    with torch.no_grad():
        packed = lm(ids, documents)
        close(packed[:, 2:8], lm(ids[:, 2:8]))
        close(packed[:, 8:], lm(ids[:, 8:]))
        changed = torch.where(documents == 1, (ids + 1) % 258, ids)
        assert torch.equal(lm(changed, documents)[:, 8:], packed[:, 8:])
        assert float((lm(ids)[:, 8:] - packed[:, 8:]).abs().max()) > 0.1     # they would see each other otherwise


def test_no_token_changes_what_comes_before_it(family):
    lm, ids = make_lm(family), make_ids(2, 12)
    with torch.no_grad():
        before = lm(ids)
        for k in range(12):
            changed = ids.clone()
            changed[:, k] = (ids[:, k] + 1) % 258
            after = lm(changed)
            assert torch.equal(after[:, :k], before[:, :k])
            assert bool((after[:, k:] != before[:, k:]).any(dim=-1).all())


def test_a_cache_goes_on_with_some_of_its_rows(family):
    lm, ids, cache = make_lm(family), make_ids(3, 10), KVCache(2)
    documents = torch.ones(3, 10, dtype=torch.long)
    documents[1, :4] = 0
    rows = torch.tensor([1, 2])
    with torch.no_grad():
        whole = lm(ids, documents)
        reading = lm.read(ids[:, :8], documents[:, :8], cache).last()
        close(lm.logits(reading.hidden), whole[:, 7:8])
        close(lm.logits(reading.rows(rows).hidden), whole[rows, 7:8])
        cache.keep(rows)
        reading = lm.read(ids[rows, 8:9], documents[rows, 8:9], cache)
        close(lm.logits(reading.hidden), whole[rows, 8:9])


def test_a_cache_grows_without_changing_anything(monkeypatch):
    """Four tokens at first, so that it grows three times; the buffers hold what torch.cat would."""
    monkeypatch.setattr(model, "MIN_ROOM", 2)
    lm, ids, cache = make_lm(), make_ids(2, 21), KVCache(2)
    rooms = []
    with torch.no_grad():
        for k in range(21):
            reading = lm.read(ids[:, k:k + 1], cache=cache)
            rooms.append(cache.keys[0].shape[2])
        whole = lm.read(ids)
    assert sorted(set(rooms)) == [4, 10, 22] and cache.length == 21
    for layer in range(2):
        torch.testing.assert_close(reading.keys[layer], whole.keys[layer], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(reading.values[layer], whole.values[layer], atol=1e-5, rtol=1e-4)


def test_what_was_read_cannot_be_changed():
    reading = make_lm().read(make_ids())
    with pytest.raises(dataclasses.FrozenInstanceError):
        reading.hidden = None
    one = reading.last()
    assert one.hidden.shape[1] == one.positions.shape[1] == 1
    assert torch.equal(one.hidden, reading.hidden[:, -1:])


def test_positions_and_mask_are_those_of_the_worked_example():
    lines = [line.split() for line in positions_and_mask.__doc__.splitlines()]
    drawn = [line[1:] if line[:1] == ["mask"] else line for line in lines]
    rows = [line[:6] for line in drawn if len(line) >= 6 and set(line[:6]) <= set(".x")]
    documents, expected = ([int(word) for word in line[1:7]] for name in ("documents", "positions")
                           for line in lines if line[:1] == [name] and line[1:2] == ["0"])
    positions, mask = positions_and_mask(6, 0, torch.tensor([documents]), "cpu")
    assert positions[0].tolist() == expected and len(rows) == 6
    assert mask[0, 0].tolist() == [[word == "x" for word in row] for row in rows]
    # the newest two of them alone, as in decoding
    some_positions, some_mask = positions_and_mask(2, 4, torch.tensor([documents]), "cpu")
    assert torch.equal(some_positions, positions[:, 4:])
    assert torch.equal(some_mask, mask[:, :, 4:])


def test_without_documents_only_a_piece_in_the_middle_needs_a_mask():
    assert positions_and_mask(4, 0, None, "cpu")[1] is None
    assert positions_and_mask(1, 7, None, "cpu")[1] is None
    positions, mask = positions_and_mask(2, 3, None, "cpu")
    assert positions.tolist() == [[3, 4]]
    assert mask[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


def test_log_p_in_pieces_is_that_of_plain_autograd(family, monkeypatch):
    """Values, and the gradients of hidden state, final norm and head, all weighted unevenly."""
    lm, ids, weights = make_lm(family), make_ids(2, 12), torch.rand(24)
    hidden = lm.read(ids).hidden.detach().flatten(0, 1).requires_grad_()
    inputs = [hidden, lm.head.weight, lm.ln_f.weight]
    expected = -F.cross_entropy(lm.logits(hidden), ids.flatten(), reduction="none")
    gradients = torch.autograd.grad((weights * expected).sum(), inputs)
    for logits in (1 << 26, 5 * 258):       # at once; five positions at a time: 5 + 5 + 5 + 5 + 4
        monkeypatch.setattr("data.log_p.LOGITS", logits)
        found = lm.log_p(hidden, ids.flatten())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        ours = torch.autograd.grad((weights * found).sum(), inputs)
        for a, b in zip(ours, gradients):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_no_piece_holds_more_logits_than_allowed(monkeypatch):
    monkeypatch.setattr("data.log_p.LOGITS", 5 * 258)
    sizes = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: sizes.append(len(x)) or plain(x, *rest))
    make_lm().log_p(torch.randn(24, 32), torch.arange(24))
    assert sizes == [5, 5, 5, 5, 4]


def test_llama3_scaling_leaves_fast_frequencies_and_slows_the_others():
    plain = rope_inv_freq(ModelConfig.from_hf({**LLAMA_SCALED, "rope_scaling": None}))
    scaled = rope_inv_freq(ModelConfig.from_hf(LLAMA_SCALED))
    newer = {**LLAMA_SCALED, "rope_scaling": None, "rope_theta": None, "rope_parameters": {**LLAMA_SCALED["rope_scaling"], "rope_theta": 10000.0}}
    assert torch.equal(rope_inv_freq(ModelConfig.from_hf(newer)), scaled)
    turns = 32 * plain / (2 * torch.pi)                  # full turns in the original 32 positions; the limits are 1 and 4
    assert torch.equal(scaled[turns > 4], plain[turns > 4]) and bool((turns > 4).any())
    assert torch.allclose(scaled[turns < 1], plain[turns < 1] / 8) and bool((turns < 1).any())
    between = (turns > 1) & (turns < 4)
    assert bool(((scaled < plain) & (scaled > plain / 8))[between].all()) and bool(between.any())


def test_initialisation_repeats_and_starts_near_a_uniform_guess(family):
    lms = [LM(ModelConfig.from_hf(family)) for _ in range(3)]
    for lm, seed in zip(lms, (0, 0, 1)):
        init_weights(lm, torch.Generator().manual_seed(seed))
    assert lms[0].fingerprint() == lms[1].fingerprint() != lms[2].fingerprint()
    with torch.no_grad():
        losses = F.cross_entropy(lms[0](make_ids(4, 16)).flatten(0, 1), make_ids(4, 16, seed=1).flatten())
    assert float(losses) == pytest.approx(5.553, abs=0.05)                   # ln 258


def by_hand(lm, ids):
    """Logits (T, V) of one text ids (T,) from the textbook's formulas in float64: head by head, rotation as complex numbers."""
    w, c, T = {name: p.double() for name, p in lm.named_parameters()}, lm.config, len(ids)
    learned = c.model_type == "gpt2"
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
    gelu = lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3)))

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True) if learned else x
        return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() + w.get(f"{name}.bias", 0)

    def rotated(x):
        x = x.unflatten(-1, (-1, 2, c.head_dim // 2))                                    # (T, heads, 2, D/2)
        angles = torch.arange(T)[:, None] * c.rope["rope_theta"] ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)
        return torch.complex(x[:, :, 0], x[:, :, 1]) * torch.polar(torch.ones_like(angles), 0 * angles if learned else angles)[:, None]

    x = w["embed.weight"][ids] + (w["embed_positions.weight"][:T] if learned else 0)
    for i in range(c.layers):
        block, n = f"blocks.{i}", norm(x, f"blocks.{i}.norm_attn")
        q, k = rotated(linear(n, f"{block}.q")), rotated(linear(n, f"{block}.k"))
        v, outputs = linear(n, f"{block}.v").unflatten(-1, (-1, c.head_dim)), []
        for head in range(c.heads):
            group = head // (c.heads // c.kv_heads)
            scores = (q[:, head] @ k[:, group].conj().T).real / c.head_dim ** 0.5        # Re(q·k̄) is the real dot product
            outputs.append(scores.masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf).softmax(-1) @ v[:, group])
        x = x + linear(torch.cat(outputs, -1), f"{block}.o")
        n = norm(x, f"{block}.norm_mlp")
        up = linear(n, f"{block}.mlp.up")
        x = x + linear(gelu(up) if learned else F.silu(linear(n, f"{block}.mlp.gate")) * up, f"{block}.mlp.down")
    return norm(x, "ln_f") @ w.get("head.weight", w["embed.weight"]).T


@pytest.mark.parametrize("config", [LLAMA, QWEN, GPT2], ids=["llama", "qwen2", "gpt2"])
def test_logits_follow_the_textbook(config):
    lm, ids = make_lm(config), make_ids(1, 40)[0]
    with torch.no_grad():
        close(lm(ids[None])[0], by_hand(lm, ids).float())


# --- files ------------------------------------------------------------------------------------------------------------

def load(directory, dtype=torch.float32) -> LM:
    return LM.from_pretrained(str(directory), dtype, "cpu")


def saved(directory, config=LLAMA):
    lm = make_lm(config)
    lm.save_pretrained(directory)
    return lm


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def tensors_of(path):
    """Copies: what load_file returns keeps the file open, and Windows then lets nobody replace it."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def change_file(directory, change):
    """Rewrite model.safetensors with the tensors that `change` returns."""
    save_file(change(tensors_of(directory / "model.safetensors")), directory / "model.safetensors", {"format": "pt"})


def shard(directory):
    """model.safetensors in two shards with an index, written by hand; returns the index."""
    tensors = tensors_of(directory / "model.safetensors")
    place = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in place if place[name] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    write_json({"metadata": {"total_size": 0}, "weight_map": place}, directory / "model.safetensors.index.json")
    return place


def test_what_is_saved_is_loaded_to_the_bit(family, tmp_path):
    lm = saved(tmp_path, family)
    again = load(tmp_path)
    same(again, lm)
    assert again.config == lm.config and read_json(tmp_path / "config.json") == family and not again.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_bfloat16_loading_rounds_the_weights(family, tmp_path):
    lm = saved(tmp_path, family)
    same(load(tmp_path, torch.bfloat16), lm.to(torch.bfloat16))


def test_shards_equal_the_single_file(family, tmp_path):
    lm = saved(tmp_path, family)
    shard(tmp_path)
    same(load(tmp_path), lm)


def test_large_tensors_are_copied_in_pieces(family, tmp_path, monkeypatch):
    """Pieces of three rows: they end inside q, k and v of GPT-2's fused matrix and inside its transposed ones."""
    lm = saved(tmp_path, family)
    monkeypatch.setattr("data.checkpoint.CHUNK_BYTES", 4 * 32 * 3)
    same(load(tmp_path), lm)


def test_gpt2_names_come_with_and_without_prefix_and_with_old_buffers(tmp_path):
    lm, buffers = saved(tmp_path, GPT2), {"h.1.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    for prefix in ("", "transformer."):
        saved(tmp_path, GPT2)
        change_file(tmp_path, lambda tensors: {prefix + name: tensor for name, tensor in {**tensors, **buffers}.items()})
        same(load(tmp_path), lm)


def test_gpt2_files_hold_their_matrices_transposed_and_queries_keys_values_in_one(tmp_path):
    block, tensors = saved(tmp_path, GPT2).blocks[1], tensors_of(tmp_path / "model.safetensors")
    for name, linear in (("attn.c_proj", block.o), ("mlp.c_fc", block.mlp.up), ("mlp.c_proj", block.mlp.down)):
        assert torch.equal(tensors[f"h.1.{name}.weight"], linear.weight.T) and torch.equal(tensors[f"h.1.{name}.bias"], linear.bias)
    for part, linear in enumerate((block.q, block.k, block.v)):
        columns = slice(32 * part, 32 * part + 32)
        assert torch.equal(tensors["h.1.attn.c_attn.weight"][:, columns], linear.weight.T)
        assert torch.equal(tensors["h.1.attn.c_attn.bias"][columns], linear.bias)


def test_old_llama_buffers_are_ignored(tmp_path):
    lm = saved(tmp_path)
    change_file(tmp_path, lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    same(load(tmp_path), lm)


@pytest.mark.parametrize("config, embedding", [(LLAMA, "model.embed_tokens.weight"), (GPT2, "wte.weight")])
def test_a_tied_head_is_the_embedding_whether_or_not_the_file_has_one(config, embedding, tmp_path):
    lm = saved(tmp_path, config)
    assert "lm_head.weight" not in tensors_of(tmp_path / "model.safetensors")
    for change in (lambda tensors: tensors, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding].clone()}):
        change_file(tmp_path, change)
        again = load(tmp_path)
        same(again, lm)
        assert again.head.weight is again.embed.weight


def test_fingerprint_is_of_the_weights_not_of_their_precision(family, tmp_path):
    lm = saved(tmp_path, family)
    assert load(tmp_path).fingerprint() == load(tmp_path, torch.bfloat16).fingerprint() == lm.fingerprint()
    for name, p in lm.named_parameters():
        kept = p.flatten()[-1].item()
        with torch.no_grad():
            p.view(-1)[-1] = kept + 0.5
            assert lm.fingerprint() != load(tmp_path).fingerprint(), name
            p.view(-1)[-1] = kept


# --- agreement with transformers --------------------------------------------------------------------------------------

SIZES = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32, "rope_theta": 10000.0}
THEIRS = {
    "gpt2": ("GPT2", dict(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "gpt2 square": ("GPT2", dict(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=128, n_inner=32, layer_norm_epsilon=0.1)),
    "llama tied": ("Llama", dict(SIZES, tie_word_embeddings=True)),
    "llama untied, biases": ("Llama", dict(SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "llama scaled": ("Llama", dict(SIZES, tie_word_embeddings=False, head_dim=24, rope_parameters=SCALING)),
    "llama scaled, tied": ("Llama", dict(SIZES, tie_word_embeddings=True, head_dim=16, rope_parameters=SCALING)),
    "qwen2": ("Qwen2", dict(SIZES, tie_word_embeddings=False, rms_norm_eps=0.1)),
    "qwen2 tied": ("Qwen2", dict(SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
}


def their_model(name, directory):
    """A random network of the other library, saved where ours can read it; large weights and biases, so that mistakes show."""
    transformers = pytest.importorskip("transformers")
    family, sizes = THEIRS[name]
    theirs = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes)).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = key.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
            p.copy_(1 + 0.2 * noise if norm else (0.5 if p.shape[0] in (258, 128) else 0.25) * noise)
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.parametrize("name", THEIRS)
def test_logits_agree_with_transformers(name, tmp_path):
    theirs, ids = their_model(name, tmp_path), make_ids(3, 96)
    lm = load(tmp_path)
    with torch.no_grad():
        ours, reference = lm(ids), theirs(input_ids=ids).logits
        assert float(reference.std()) > 1 and float((ours - reference).abs().max()) <= 1e-4
        assert torch.equal(ours.argmax(-1), reference.argmax(-1))
        # a batch padded on the left
        seen = torch.ones_like(ids)
        seen[1, :20], seen[2, :71] = 0, 0
        reference = theirs(input_ids=ids, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp_min(0)).logits
        ours = lm(ids, seen)
    assert float((ours - reference)[seen == 1].abs().max()) <= 1e-4
    assert torch.equal(ours.argmax(-1)[seen == 1], reference.argmax(-1)[seen == 1])


def interleaved(weight, width):
    """Rows of q or k in the other order that rotary embeddings know: neighbours turn together."""
    return weight.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2).contiguous()


@pytest.mark.parametrize("name, suffix, spoil", [
    ("gpt2", "attn.c_proj.weight", lambda weight: weight.T.contiguous()),
    ("gpt2 square", "mlp.c_fc.weight", lambda weight: weight.T.contiguous()),
    ("gpt2 square", "mlp.c_proj.weight", lambda weight: weight.T.contiguous()),
    ("gpt2", "attn.c_attn.weight", lambda weight: weight.roll(32, dims=1)),                 # q, k, v -> v, q, k
    ("gpt2", "attn.c_attn.bias", torch.zeros_like),
    ("llama tied", ("q_proj.weight", "k_proj.weight"), lambda weight: interleaved(weight, 8)),
    ("llama tied", "k_proj.weight", lambda weight: weight.roll(8, dims=0)),                 # another head's keys
    ("qwen2", ("q_proj.bias", "k_proj.bias", "v_proj.bias"), torch.zeros_like),
])
def test_the_comparison_has_teeth(name, suffix, spoil, tmp_path):
    theirs, ids = their_model(name, tmp_path), make_ids(3, 96)
    change_file(tmp_path, lambda tensors: {key: spoil(t) if key.endswith(suffix) else t for key, t in tensors.items()})
    with torch.no_grad():
        assert float((load(tmp_path)(ids) - theirs(input_ids=ids).logits).abs().max()) > 1


@pytest.mark.parametrize("name", ["stories260K", "babyllama_tok105"])
def test_trained_models_agree_with_their_stored_logits(name):
    if "NANOL2D_SHARED" not in os.environ:
        pytest.skip("NANOL2D_SHARED is not set")
    folder = Path(os.environ["NANOL2D_SHARED"]) / "data" / "weights" / name
    lm, reference, greedy = load(folder / "hf"), load_file(folder / "reference.safetensors"), read_json(folder / "reference_greedy.json")
    with torch.no_grad():
        assert float((lm(reference["input_ids"][None])[0] - reference["logits"]).abs().max()) <= 5e-5
        ids, context = list(greedy["prompt_ids"]), None
        while len(ids) < len(greedy["greedy_ids"]):
            context = lm.read(torch.tensor([ids if context is None else ids[-1:]]), cache=context)
            ids.append(int(lm.logits(context.hidden[:, -1]).argmax()))
    assert ids == greedy["greedy_ids"]


# --- refusals: one line each ------------------------------------------------------------------------------------------

def refused(directory, *words):
    with pytest.raises(ValueError) as error:
        load(directory)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("config, change, message", [
    (LLAMA, {"model_type": "mamba"}, "model_type 'mamba' is not supported; allowed: llama, qwen2, gpt2"),
    (LLAMA, {"model_type": None}, "model_type None is not supported; allowed: llama, qwen2, gpt2"),
    (LLAMA, {"hidden_act": "relu6"}, "activation 'relu6' is not supported; allowed: silu, gelu"),
    (GPT2, {"activation_function": "tanh"}, "activation 'tanh' is not supported"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported; allowed: default, llama3"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported; allowed: default, llama3"),
    (QWEN, {"use_sliding_window": True}, "config.json: use_sliding_window = True is not supported; allowed: False"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
    (LLAMA, {"hidden_size": None}, "config.json has no 'hidden_size', which model_type 'llama' needs"),
    (GPT2, {"n_embd": None}, "config.json has no 'n_embd', which model_type 'gpt2' needs"),
    (LLAMA_SCALED, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    (LLAMA, {"intermediate_size": 50}, "has shape [48, 32], but config.json asks for [50, 32]"),
    (GPT2, {"n_inner": 96}, "h.0.mlp.c_fc.weight in "),
    (LLAMA, {"num_key_value_heads": 4}, "self_attn.k_proj.weight in "),
    (LLAMA, {"num_hidden_layers": 1}, "0 missing, 9 (model.layers.1.input_layernorm.weight, ...) left over"),
    (LLAMA, {"num_hidden_layers": 3}, "9 (model.layers.2.input_layernorm.weight, ...) missing, 0 left over"),
    (LLAMA, {"tie_word_embeddings": False}, "1 (lm_head.weight) missing, 0 left over"),
    (QWEN, {"model_type": "llama"}, "0 missing, 6 (model.layers.0.self_attn.k_proj.bias, ...) left over"),
])
def test_configs_that_describe_another_network_are_refused(config, change, message, tmp_path):
    saved(tmp_path, config)
    content = {key: value for key, value in {**config, **change}.items() if value is not None}
    write_json(content, tmp_path / "config.json")
    refused(tmp_path, message)


def test_weights_of_another_family_are_refused(tmp_path):
    saved(tmp_path, LLAMA)
    write_json(GPT2, tmp_path / "config.json")
    refused(tmp_path, "the weights in", "are not those of its config.json (model_type gpt2, 2 layers): 28 (", "20 (")


@pytest.mark.parametrize("content, message", [
    (None, "config.json does not exist; a model directory holds config.json, model.safetensors and a tokenizer"),
    (b"{", "config.json is not valid JSON"),
    (b"\xff\xfe{", "config.json is not valid JSON"),
    (b"[1, 2]", "config.json"),
])
def test_a_damaged_config_is_refused(content, message, tmp_path):
    saved(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, message)


def test_missing_weights_are_refused_and_pickles_never_read(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "has no model.safetensors (nor model.safetensors.index.json); copy or download the weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    refused(tmp_path, "has only pytorch_model.bin, a pickle that can run code when it is read")


@pytest.mark.parametrize("cut", [lambda data: data[:len(data) // 2], lambda data: data[:100], lambda data: b"", lambda data: b"<html>" * 99])
def test_damaged_weights_are_refused(cut, tmp_path):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(cut(path.read_bytes()))
    refused(tmp_path, "is truncated or not a safetensors file", "download it again")


def test_damaged_shards_are_refused(tmp_path):
    saved(tmp_path)
    place, index = shard(tmp_path), tmp_path / "model.safetensors.index.json"
    name, file = next(iter(place.items()))
    other = {key: tensor for key, tensor in tensors_of(tmp_path / file).items() if key != name}
    save_file(other, tmp_path / file)
    refused(tmp_path, name, file)
    (tmp_path / file).unlink()
    refused(tmp_path, f"{file} is missing although model.safetensors.index.json names it; download this shard again")
    write_json({}, index)
    refused(tmp_path, index.name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(family, value, tmp_path):
    saved(tmp_path, family)
    name = list(tensors_of(tmp_path / "model.safetensors"))[-1]
    change_file(tmp_path, lambda tensors: {**tensors, name: tensors[name].index_fill(0, torch.tensor([5]), value)})
    refused(tmp_path, f"{name} in ", "holds values that are not finite; download it again")


def test_text_beyond_gpt2s_positions_is_refused_and_counted_without_its_padding():
    lm = make_lm(GPT2)
    with pytest.raises(ValueError, match="65 tokens are too long for this model; allowed: 64"):
        lm(make_ids(1, 65))
    with torch.no_grad():
        cache = KVCache(2)
        lm.read(make_ids(1, 64), cache=cache)
        with pytest.raises(ValueError, match="65 tokens are too long for this model; allowed: 64"):
            lm.read(make_ids(1, 1), cache=cache)
        assert lm(make_ids(1, 70), torch.tensor([[0] * 6 + [1] * 64])).isfinite().all()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        open(path, "wb").write(b"half")
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*w.safetensors \(I/O error: No space left.*\); it needs 16 bytes: make room"):
        checkpoint.write_safetensors({"a": torch.zeros(4)}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())
