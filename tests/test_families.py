"""What a directory says of its network is all used or refused (data/checkpoints/)."""

import pytest
import torch

from conftest import GPT2, LLAMA, LLAMA_SCALED, QWEN, SCALING, make_ids, make_lm
from data.checkpoints.families import RANGES, ModelConfig
from data.checkpoints.weights import pick_device
from data.parts.positions import check_length, warn
from data.text.chat import default_block
from test_checkpoint import change_file, load, refused, saved, shard, write_json


def refused_config(raw, *words):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(raw)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- names and forms of other writers -------------------------------------------------------------

@pytest.mark.parametrize("config, key, spellings", [
    (GPT2, "activation_function", ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")),
    (LLAMA, "hidden_act", ("silu", "swish")),
])
def test_one_activation_has_several_names(config, key, spellings):
    ids = make_ids()
    with torch.no_grad():
        logits = [make_lm({**config, key: name})(ids) for name in spellings]
    for other in logits[1:]:
        assert torch.allclose(logits[0], other, atol=1e-5)


def test_a_rotary_config_may_leave_out_its_positions():
    raw = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    assert ModelConfig.from_hf(raw).max_positions > 0


@pytest.mark.parametrize("window", [None, 64, 4096])
def test_a_mistral_window_that_never_acts_is_none(window):
    raw = {**LLAMA, "model_type": "mistral", "max_position_embeddings": 64}
    ModelConfig.from_hf({**raw, "sliding_window": window})
    refused_config({**raw, "sliding_window": 63}, "sliding_window (null: none) = 63", "64 to")


# --- two statements that differ -------------------------------------------------------------------

def test_rope_settings_of_both_generations_are_one_or_refused():
    ropes = {"rope_scaling": SCALING, "rope_parameters": {**SCALING, "rope_theta": 10000.0}}
    both = ModelConfig.from_hf({**LLAMA_SCALED, **ropes})
    assert both.rope == ModelConfig.from_hf(LLAMA_SCALED).rope
    other = {**SCALING, "factor": 32.0}
    refused_config({**LLAMA_SCALED, "rope_parameters": other}, "two values for factor")
    yarn = {"rope_type": "yarn", "factor": 4.0}
    refused_config({**LLAMA_SCALED, "rope_parameters": yarn}, "two values for rope_type")
    refused_config({**LLAMA, "rope_parameters": yarn}, "rope type 'yarn' is not supported")


def test_a_whole_file_wins_over_shards_with_a_note(tmp_path, capsys):
    lm = saved(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    shard(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    for path in tmp_path.glob("model-*"):
        path.unlink()
    assert torch.equal(load(tmp_path).embed.weight, lm.embed.weight)
    assert "the former is loaded, the shards are not" in capsys.readouterr().err


# --- weights that are none ------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_another_type_are_refused(dtype, tmp_path):
    saved(tmp_path)
    change_file(tmp_path, lambda tensors: {name: tensor.to(dtype) if "proj" in name else tensor
                                           for name, tensor in tensors.items()})
    refused(tmp_path, "is of type", "is it quantised? allowed: F64, F32, F16, BF16")


@pytest.mark.parametrize("suffix", ["qweight", "SCB"])
def test_quantised_checkpoints_are_named_as_such(suffix, tmp_path):
    saved(tmp_path)
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    change_file(tmp_path, lambda tensors: {**tensors, name: torch.ones(2)})
    refused(tmp_path, "are quantised", suffix, "bfloat16 or float32")


@pytest.mark.parametrize("stated", [{"quant_method": "gptq"}, [1], "x"])
def test_a_config_that_says_quantised_is_believed(stated):
    refused_config({**LLAMA, "quantization_config": stated}, "the weights are quantised")


# --- values of config.json ------------------------------------------------------------------------

@pytest.mark.parametrize("key", RANGES)
@pytest.mark.parametrize("value", ["32", [], {}, -1, 1e40, float("nan")])
def test_a_value_of_another_type_or_range_names_its_key(key, value):
    refused_config({**LLAMA, key: value}, f"config.json: {key} = ")


@pytest.mark.parametrize("key, value", [
    ("hidden_size", 32.0), ("hidden_size", True), ("rope_theta", True), ("rope_theta", 0),
    ("tie_word_embeddings", 1)])
def test_a_number_is_no_switch_and_a_size_no_fraction(key, value):
    refused_config({**LLAMA, key: value}, f"config.json: {key} = ")


def test_more_layers_than_tensors_are_refused_at_once(tmp_path):
    saved(tmp_path)
    write_json({**LLAMA, "num_hidden_layers": 1_000_000}, tmp_path / "config.json")
    refused(tmp_path, "1,000,000 layers", "use the config.json that came with them")


def test_a_model_type_of_another_kind_is_refused():
    for value in ([], {}, None, 3):
        refused_config({**LLAMA, "model_type": value}, "model_type")


# --- limits ---------------------------------------------------------------------------------------

def test_learned_positions_are_a_limit_and_rotary_ones_a_warning(capsys):
    warn.cache_clear()
    gpt2 = ModelConfig.from_hf(GPT2)
    check_length(gpt2, 64, "shorten it")
    with pytest.raises(ValueError, match="65 tokens are too long .* allowed: 64; shorten it"):
        check_length(gpt2, 65, "shorten it")
    rotary = ModelConfig.from_hf({**QWEN, "max_position_embeddings": 64})
    for _ in range(3):
        check_length(rotary, 65, "shorten it")
    assert capsys.readouterr().err.count("warning: 65 tokens") == 1


@pytest.mark.parametrize("device", ["cpu:x", "gpu", "cuda:99", "cpu:1"])
def test_devices_that_are_not_here_are_refused(device):
    with pytest.raises(ValueError, match="--device '.*' is not supported; allowed: "):
        pick_device(device)


def test_the_default_block_of_training_data_fits_the_model(tmp_path):
    saved(tmp_path, GPT2)
    assert default_block(str(tmp_path)) == GPT2["n_positions"]
