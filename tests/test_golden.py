"""Agreement with recorded outputs of the authors' code on a tiny random Llama.

Runs where NANOL2D_SHARED names a folder that holds golden/golden_llama_lora.safetensors and .json:

    NANOL2D_SHARED=DIR python -m pytest tests/test_golden.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import make_batch, path_logits
from safetensors.torch import load_file

from data.checkpoints.families import ModelConfig, weight_map
from data.training.batches import IGNORE
from diffusion import L2D, L2DConfig, VelocityField, paper_losses
from model import LM
from solvers import odeint

FOLDER = Path(os.environ.get("NANOL2D_SHARED", "nowhere")) / "golden"
pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="NANOL2D_SHARED names no folder with golden outputs")
# Relative to the largest value. Where t is small, theirs are 5.0e-5 from float64 arithmetic and
# ours, by the processor, 2.7e-5 to 3.6e-5.
BOUND = 9e-5

# Ours -> theirs, for what is trained.
NAMES = {
    "to_z": "flow_token_embedder.embedder.layers_module.0",
    "from_z.0": "flow_to_lm_encoder.embedder.layers_module.0",
    "from_z.2": "flow_to_lm_encoder.embedder.layers_module.2",
    "time.0": "timestep_embedder.mlp.0",
    "time.2": "timestep_embedder.mlp.2",
    "time_gate.0": "modulation_head.mlp.0",
    "time_gate.2": "modulation_head.mlp.2",
}
PARTS = {
    "q": "self_attn.flow_q_proj",
    "o": "self_attn.flow_o_proj",
    "mlp.gate": "mlp.flow_gate_proj",
    "mlp.up": "mlp.flow_up_proj",
    "mlp.down": "mlp.flow_down_proj",
    "modulation.0": "modulation_head.mlp.0",
    "modulation.2": "modulation_head.mlp.2",
}


def their_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in NAMES:
        return f"model.{NAMES[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{PARTS[part]}.{kind}"


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "golden_llama_lora.safetensors")


@pytest.fixture(scope="module")
def l2d(golden):
    """Our model with their weights."""
    meta = json.loads((FOLDER / "golden_llama_lora.json").read_text(encoding="utf-8"))
    lm = LM(ModelConfig.from_hf({"model_type": "llama", **meta["base_config"]}))
    ours = dict(lm.named_parameters())
    with torch.no_grad():
        for theirs, names, _ in weight_map(lm.config.family, lm.config.layers, ours):
            ours[names[0]].copy_(golden[theirs])
        model = L2D(lm, L2DConfig(width=16, cond_dim=32, sigma=64.0))
        for name, p in model.path_parameters().items():
            p.copy_(golden[their_name(name)])
    return model.eval()


def close(ours, theirs):
    assert ours.shape == theirs.shape
    worst = float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())
    assert worst <= BOUND, worst


@torch.no_grad()
def test_base_and_vocabulary(l2d, golden):
    close(l2d.lm(golden["golden.input_ids"]), golden["golden.base.logits"])
    close(l2d.vocabulary(), golden["golden.vocab_table"])


@pytest.mark.parametrize("case", ["t0", "t0.1", "t0.5", "t0.9", "t0.999", "t1", "perpos"])
@torch.no_grad()
def test_forward(l2d, golden, case):
    x_t, t = golden[f"golden.fwd.{case}.x_t"], golden[f"golden.fwd.{case}.timesteps"]
    logits = path_logits(l2d, golden["golden.input_ids"], x_t, t)
    close(logits, golden[f"golden.fwd.{case}.logits"])


@torch.no_grad()
def test_left_padding(l2d, golden):
    """Row 1 begins with padding; what stands there is not compared."""
    documents = golden["golden.leftpad.attention_mask"].long()
    seen = documents.bool()
    x_t, t = golden["golden.fwd.perpos.x_t"], golden["golden.fwd.perpos.timesteps"]
    states = l2d.lm.read(golden["golden.input_ids"], documents)
    logits = l2d.lm.logits(l2d.last_hidden(x_t, t, l2d.modulation(t), states))
    close(l2d.lm.logits(states.hidden)[seen], golden["golden.leftpad.base_logits"][seen])
    close(logits[seen], golden["golden.leftpad.logits"][seen])


def test_loss_and_every_gradient(l2d, golden):
    targets = golden["golden.labels_shifted"]
    l2d.zero_grad()
    losses, *_ = paper_losses(l2d, make_batch(
        golden["golden.input_ids"], targets, t=golden["golden.train.timesteps"],
        noise=golden["golden.train.noise_unit"]))
    close(losses.detach(), golden["golden.train.per_token_loss"][targets != IGNORE])
    losses.mean().backward()
    for name, p in l2d.path_parameters().items():
        theirs = golden.get(f"golden.train.grad/{their_name(name)}")
        assert theirs is not None, name
        close(p.grad, theirs)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("case, estimate, temperature", [
    ("argmax", "argmax", 1.0), ("avg1", "average", 1.0), ("avg0.3", "average", 0.3)])
@torch.no_grad()
def test_velocity(l2d, golden, t, case, estimate, temperature):
    states = l2d.lm.read(golden["golden.input_ids"])
    velocity = VelocityField(l2d, states, estimate, temperature)
    x_t = golden[f"golden.vel.t{t}.x_t"].float()
    close(velocity(t, x_t)[0], golden[f"golden.vel.t{t}.{case}"])


SOLVES = [
    ("euler.argmax", "euler", "argmax"),
    ("euler.avg1", "euler", "average"),
    ("midpoint.argmax", "midpoint", "argmax"),
    ("midpoint.avg1", "midpoint", "average"),
    *[(f"midpoint.argmax.n{n}", "midpoint", "argmax") for n in (2, 3, 5, 8, 16)],
]


@pytest.mark.parametrize("case, solver, estimate", SOLVES)
@torch.no_grad()
def test_trajectory_and_final_logits(l2d, golden, case, solver, estimate):
    theirs = golden[f"golden.ode.last.{case}.trajectory"]
    states = l2d.lm.read(golden["golden.input_ids"]).last()
    velocity = VelocityField(l2d, states, estimate)
    points = []
    solution = odeint(velocity, golden["golden.ode.x_init_last"], solver, len(theirs) - 1,
                      watch=lambda rows, t, x, prediction: points.append(x))
    # the first evaluation of every interval is at a point of the grid
    starts = points[::1 if solver == "euler" else 2]
    close(torch.stack([*starts, solution.x]), theirs)
    close(velocity.final_logits(solution.x), golden[f"golden.ode.last.{case}.final_logits"])
