"""diffusion.py: the claims of the method on small random models of every family, and files on disk.

Bit for bit the frozen model where it starts, every position on its own, the formulas written out, velocity and guidance.
What the sampler does with a perfect network is in test_oracle.py.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_ids, make_l2d, make_lm
from safetensors.torch import load_file, save_file
from test_oracle import p_value

import train
from data.batches import IGNORE
from data.families import ModelConfig
from diffusion import L2D, L2DConfig, VelocityField, draw_times
from model import LM, LoRA
from sample import Settings


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- where it starts: the frozen model, bit for bit -------------------------------------------------------------------

def noisy(l2d, ids, t, seed=3):
    """(x_t, t) of the shapes that l2d(ids, x_t, t) takes; t a number or a tensor."""
    x = l2d.config.sigma * torch.randn(*ids.shape, l2d.config.width, generator=torch.Generator().manual_seed(seed))
    return x, torch.full(ids.shape, t) if isinstance(t, float) else t


VARIANTS = [dict(rank=4), dict(rank=None), dict(rank=4, classes=3), dict(rank=None, classes=3)]


@pytest.mark.parametrize("options", VARIANTS)
@torch.no_grad()
def test_logits_are_the_frozen_models_at_t_zero_and_before_training(family, options):
    ids, classes = make_ids(), torch.tensor([0, 2, 3]) if "classes" in options else None
    fresh = make_l2d(family, perturb=0, **options)
    for t in (0.0, 0.3, torch.rand(ids.shape), 1.0):
        assert torch.equal(fresh(ids, *noisy(fresh, ids, t), classes), fresh.lm(ids))
    trained = make_l2d(family, **options)
    assert torch.equal(trained(ids, *noisy(trained, ids, 0.0), classes), trained.lm(ids))
    changed = (trained(ids, *noisy(trained, ids, 0.5), classes) - trained.lm(ids)).abs().amax(-1)
    assert changed.min() > 1e-2


@torch.no_grad()
def test_t_zero_is_exact_where_two_equal_products_round_differently():
    """As they may on a GPU: g(e(t)) − g(e(0)) alone would leave a residue."""
    l2d, ids, calls = make_l2d(), make_ids(), []
    l2d.merge.register_forward_hook(lambda module, args, out: calls.append(1) or out * (1 + 1e-3 * len(calls)))
    assert torch.equal(l2d(ids, *noisy(l2d, ids, 0.0)), l2d.lm(ids)) and len(calls) == 2


@torch.no_grad()
def test_first_evaluation_of_the_sampler_sees_the_frozen_models_logits(family):
    l2d, ids = make_l2d(family), make_ids()
    reading = l2d.lm.read(ids).last()
    logits = VelocityField(l2d, reading)(0.0, torch.randn(3, 1, 16))[1]
    assert torch.equal(logits, l2d.lm.logits(reading.hidden))


@torch.no_grad()
def test_bfloat16_base_starts_at_its_own_logits_and_the_path_stays_float32(family):
    l2d, ids = L2D(make_lm(family).bfloat16(), L2DConfig(width=16, cond_dim=24, rank=4)), make_ids()
    assert {p.dtype for p in l2d.path_parameters().values()} == {torch.float32}
    assert torch.equal(l2d(ids, *noisy(l2d, ids, 0.5)), l2d.lm(ids))
    l2d.merge[2].weight += 0.2
    assert torch.equal(l2d(ids, *noisy(l2d, ids, 0.0)), l2d.lm(ids))
    assert not torch.equal(l2d(ids, *noisy(l2d, ids, 0.5)), l2d.lm(ids))


def test_only_the_path_learns_and_at_first_only_the_merge_weight(family):
    l2d, ids = make_l2d(family, perturb=0, classes=2).train(), make_ids()
    assert not l2d.lm.training and not any(p.requires_grad for p in l2d.lm.parameters())
    l2d.loss(ids, make_ids(seed=1), torch.tensor([0, 1, 2]), generator=torch.Generator().manual_seed(0)).backward()
    awake = lambda: {name for name, p in l2d.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert awake() == {"merge.2.weight"}
    with torch.no_grad():
        for p in l2d.path_parameters().values():
            p += 0.1 * torch.randn(p.shape)
    l2d.loss(ids, make_ids(seed=1), torch.tensor([0, 1, 2]), generator=torch.Generator().manual_seed(0)).backward()
    assert awake() == set(l2d.path_parameters())


# --- the network, against its formulas written out for one position --------------------------------------------------

def two_layers(net, x):
    x = F.silu(net[0].weight @ x + net[0].bias)
    return net[2].weight @ x + (0 if net[2].bias is None else net[2].bias)


def affine(module, x):
    if not isinstance(module, LoRA):
        return F.linear(x, module.weight, module.bias)
    frozen = module.frozen
    return F.linear(x, frozen.weight + 32 / 4 * (module.A @ module.B).T, frozen.bias)


def normalised(norm, x, scale, shift):
    centre = 0 if norm.rms else x.mean()
    n = (x - centre) / ((x - centre).square().mean() + norm.eps).sqrt()
    return (norm.weight + scale) * n + (0 if norm.rms else norm.bias) + shift


def attention(lm, q, keys, values, position):
    """One query vector over the keys and values (G, S, D) up to its own position."""
    config, out = lm.config, []
    for head, v in enumerate(q.view(config.heads, config.head_dim)):
        if lm.embed_positions is None:
            angles = position * lm.inv_freq
            a, b = v.chunk(2)
            v = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()))
        group = head * config.kv_heads // config.heads
        p = (keys[group, :position + 1] @ v / math.sqrt(config.head_dim)).softmax(0)
        out.append(p @ values[group, :position + 1])
    return torch.cat(out)


def logits_by_hand(l2d, context, position, x_t, t, class_id):
    """METHOD of the paper, section 3: one position of a batch of one, no broadcasting, no shortcuts."""
    lm, omega = l2d.lm, 10000 ** (-torch.arange(128) / 128)
    embed = lambda t: two_layers(l2d.time, torch.cat(((omega * t).cos(), (omega * t).sin()))) + l2d.class_embedding.weight[class_id]
    h = two_layers(l2d.from_z, x_t / math.sqrt((1 - t) ** 2 * l2d.config.sigma ** 2 + t ** 2))
    h = h if lm.embed_positions is None else h + lm.embed_positions.weight[position]
    for block, frozen, keys, values in zip(l2d.blocks, lm.blocks, context.keys, context.values):
        a1, s1, g1, a2, s2, g2 = two_layers(block.modulation, embed(t)).view(6, -1)
        q = affine(block.q, normalised(frozen.norm_attn, h, a1, s1))
        h = h + g1 * affine(block.o, attention(lm, q, keys[0], values[0], position))
        n, mlp, act = normalised(frozen.norm_mlp, h, a2, s2), block.mlp, frozen.mlp.act
        h = h + g2 * affine(mlp.down, act(affine(mlp.up, n)) if mlp.gate is None else act(affine(mlp.gate, n)) * affine(mlp.up, n))
    w_d = two_layers(l2d.merge, embed(t)) - two_layers(l2d.merge, embed(0))
    return lm.head.weight @ normalised(lm.ln_f, context.hidden[0, position] + w_d * h, 0, 0)


@pytest.mark.parametrize("rank", [4, None])
@torch.no_grad()
def test_network_equals_its_formulas_written_out(family, rank):
    l2d, ids = make_l2d(family, perturb=0.05, rank=rank, classes=2), make_ids(1, 7)
    x_t, t = noisy(l2d, ids, torch.rand(1, 7))
    logits, context = l2d(ids, x_t, t, torch.tensor([1])), l2d.lm.read(ids)
    for k in (0, 3, 6):
        torch.testing.assert_close(logits[0, k], logits_by_hand(l2d, context, k, x_t[0, k], float(t[0, k]), 1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_input_of_the_path_has_unit_variance_at_every_t():
    l2d, ids, seen = make_l2d(width=64), make_ids(16, 30), []
    l2d.from_z.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x_1, x_0 = l2d.vectors(make_ids(16, 30, seed=1)), noisy(l2d, ids, 0.0)[0]
    for t in (0.0, 0.5, 0.98, 1.0):
        l2d(ids, t * x_1 + (1 - t) * x_0, torch.full(ids.shape, t))
        assert float(seen[-1].square().mean()) == pytest.approx(1, abs=0.02)


SIZES = {   # from the models' config.json, and the trained millions for rank 32 and Z = 256
    "llama-3.2-1b": ({"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                      "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
                      "tie_word_embeddings": True}, 73.3),
    "llama-3.1-8b": ({"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}, 281.0),
    "qwen2.5-1.5b": ({"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                      "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 131072, "tie_word_embeddings": True}, 103.3),
    "qwen2.5-7b": ({"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072}, 233.0),
    "gpt2": ({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}, 20.0),
    "gpt2-xl": ({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024}, 157.5),
}


@pytest.mark.parametrize("name", SIZES)
def test_trainable_sizes_of_the_published_models(name):
    config, millions = SIZES[name]
    with torch.device("meta"):
        l2d = L2D(LM(ModelConfig.from_hf(config)), L2DConfig())
    trained = sum(p.numel() for p in l2d.path_parameters().values())
    assert round(trained / 1e6, 1) == millions
    assert trained == sum(p.numel() for p in l2d.parameters() if p.requires_grad)


def test_vocabulary_has_norm_sqrt_z_and_is_computed_once_while_sampling():
    l2d, ids = make_l2d(), make_ids()
    assert l2d.vectors(ids).requires_grad
    with torch.no_grad():
        V = l2d.vocabulary()
        torch.testing.assert_close(V.norm(dim=-1), torch.full((258,), math.sqrt(16)))
        torch.testing.assert_close(V, 4 * F.normalize(l2d.lm.embed.weight @ l2d.to_z.weight.T + l2d.to_z.bias, dim=-1))
        torch.testing.assert_close(l2d.vectors(ids), V[ids], atol=1e-6, rtol=0)
        assert l2d.vocabulary() is V
    for p in (l2d.to_z.weight, l2d.to_z.bias):      # after an update of either it is made again
        with torch.no_grad():
            p += 0.1 * torch.randn(p.shape)
        l2d.eval()
        before, V = V, l2d.vocabulary()
        assert V is not before and not torch.allclose(V, before)
        assert torch.equal(V, l2d.vectors(torch.arange(258)).detach())


# --- every position on its own ----------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_noisy_token_is_seen_at_its_own_position_only(family):
    l2d, ids, k = make_l2d(family), make_ids(), 4
    x_t, t = noisy(l2d, ids, 0.6)
    other_x, other_t = x_t.clone(), t.clone()
    other_x[:, k], other_t[:, k] = 0.1, 0.9
    for logits in (l2d(ids, other_x, t), l2d(ids, x_t, other_t)):
        differs = (logits != l2d(ids, x_t, t)).any(-1)
        assert differs[:, k].all() and int(differs.sum()) == len(ids)


@torch.no_grad()
def test_a_target_moves_the_loss_of_its_own_position_only(family):
    l2d, ids, targets, k = make_l2d(family), make_ids(), make_ids(seed=1), 4
    t, noise = torch.rand(ids.shape), torch.randn(*ids.shape, 16)
    other = targets.clone()
    other[:, k] = (other[:, k] + 1) % 258
    differs = (l2d.token_losses(ids, other, t=t, noise=noise)[0] != l2d.token_losses(ids, targets, t=t, noise=noise)[0]).view(ids.shape)
    assert differs[:, k].all() and int(differs.sum()) == len(ids)


@pytest.mark.parametrize("options", [{}, dict(classes=3), dict(rank=None, time_distribution="cosmap")])
def test_token_losses_are_those_of_the_whole_forward(family, options):
    """x_t = t·V_y + (1−t)·σ·noise, time drawn first, then noise, for every position; the path itself only where it counts."""
    l2d, ids, targets = make_l2d(family, perturb=0.05, **options), make_ids(), make_ids(seed=1)
    targets[torch.rand(ids.shape) < 0.5] = IGNORE
    classes = torch.tensor([0, 2, 3]) if "classes" in options else None
    losses, times = l2d.token_losses(ids, targets, classes, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    t, noise = draw_times(ids.shape, l2d.config.time_distribution, g), torch.randn(*ids.shape, 16, generator=g)
    x_t = t[..., None] * l2d.vectors(targets.clamp_min(0)) + (1 - t[..., None]) * l2d.config.sigma * noise
    expected = F.cross_entropy(l2d(ids, x_t, t, classes).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE)
    counts = targets.flatten() != IGNORE
    torch.testing.assert_close(losses, expected[counts], atol=1e-5, rtol=1e-5)
    assert torch.equal(times, t.flatten()[counts]) and len(times.unique()) == len(times)
    torch.testing.assert_close(l2d.loss(ids, targets, classes, t=t, noise=noise), losses.mean())


@torch.no_grad()
def test_packed_examples_have_the_losses_they_have_alone(family):
    l2d, ids, targets = make_l2d(family), make_ids(1, 10), make_ids(1, 10, seed=1)
    t, noise = torch.rand(1, 10), torch.randn(1, 10, 16)
    packed = l2d.token_losses(ids, targets, t=t, noise=noise, documents=torch.tensor([[1] * 4 + [2] * 6]))[0]
    alone = [l2d.token_losses(ids[:, s], targets[:, s], t=t[:, s], noise=noise[:, s])[0] for s in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_same_seed_same_loss_to_the_bit():
    l2d, ids, classes = make_l2d(classes=3).train(), make_ids(), torch.tensor([0, 1, 2])
    loss = lambda seed: l2d.loss(ids, make_ids(seed=1), classes, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(loss(0), loss(0)) and not torch.equal(loss(0), loss(1))


def test_nothing_to_learn_gives_empty_losses(family):
    """All targets IGNORE: no losses and no times, a sum of zero that can still be differentiated; only the mean is not a number."""
    l2d, ids = make_l2d(family), make_ids()
    losses, times = l2d.token_losses(ids, torch.full_like(ids, IGNORE), generator=torch.Generator().manual_seed(0))
    assert losses.shape == times.shape == (0,)
    losses.sum().backward()


def test_shapes_that_do_not_fit_are_refused():
    l2d, ids = make_l2d(), make_ids()
    x_t, t = noisy(l2d, ids, 0.5)
    for bad_x, bad_t in ((x_t[:, :-1], t), (x_t[..., :8], t), (x_t, t[:, :1]), (x_t, t[..., None]), (x_t[:, 0], t)):
        with pytest.raises(ValueError, match=r"x_t has shape .* and t .*; allowed: \(3, 10, 16\) and \(3, 10\)"):
            l2d(ids, bad_x, bad_t)


# --- times ------------------------------------------------------------------------------------------------------------

def test_uniform_times():
    t = draw_times((20000,), "uniform", torch.Generator().manual_seed(0))
    assert 0 <= t.min() and t.max() < 1
    assert p_value((t * 20).long().bincount(minlength=20), torch.full((20,), 1 / 20)) > 1e-3


def test_cosmap_times_follow_their_formula():
    """t = 1 − 1/(tan(πu/2) + 1) means P(t ≤ s) = 2/π·atan(s/(1 − s)); Kolmogorov's bound at 0.1 %."""
    t = draw_times((20000,), "cosmap", torch.Generator().manual_seed(0)).double().sort().values
    assert 0 <= t.min() and t.max() < 1
    cdf = 2 / math.pi * torch.atan(t / (1 - t))
    assert float((cdf - (torch.arange(20000) + 0.5) / 20000).abs().max()) < 1.95 / math.sqrt(20000)


def test_largest_uniform_number_still_gives_a_time_below_one(monkeypatch):
    """torch.rand can return 1 − 2⁻²⁴, where tan(πu/2) is 10⁷ and rounding could reach 1."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, 1 - 2 ** -24))
    assert 0.9999 < float(draw_times((1,), "cosmap", torch.Generator())) < 1


def test_classes_the_path_was_not_made_with_are_refused():
    ids, bad = make_ids(), torch.tensor([0, 1, 4])
    for l2d, message in ((make_l2d(), "this path has no classes; allowed: None"), (make_l2d(classes=3), "out of range; allowed: 0 to 3")):
        for act in (lambda: l2d(ids, *noisy(l2d, ids, 0.5), bad), lambda: l2d.loss(ids, ids, bad, generator=torch.Generator().manual_seed(0))):
            with pytest.raises(ValueError, match=message):
                act()
    with pytest.raises(ValueError, match="out of range"):
        make_l2d(classes=3).loss(ids, ids, torch.tensor([0, -1, 1]), generator=torch.Generator().manual_seed(0))


def test_training_hides_some_classes_and_evaluation_none():
    l2d, classes = make_l2d(classes=3, class_dropout=0.2), torch.zeros(100, 200, dtype=torch.long)
    assert torch.equal(l2d.drop_classes(classes, torch.Generator()), classes)
    hidden = l2d.train().drop_classes(classes, torch.Generator().manual_seed(0))
    assert set(hidden.unique().tolist()) == {0, 3}
    assert p_value((hidden == 3).flatten().long().bincount(), torch.tensor([0.8, 0.2])) > 1e-3
    assert 0 < int((hidden == 3).sum(1).min())      # position by position: no sequence is hidden or shown whole


# --- on disk ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    l2d = make_l2d(classes=2)
    l2d.save(tmp_path)
    return l2d, tmp_path


@pytest.mark.parametrize("options", [*VARIANTS, dict(sigma=7.0, time_distribution="cosmap")])
@torch.no_grad()
def test_saving_and_loading_gives_the_same_path_to_the_bit(tmp_path, family, options):
    l2d, ids = make_l2d(family, **options), make_ids()
    l2d.save(tmp_path)
    again = L2D.load(tmp_path, make_lm(family))
    assert again.config == l2d.config and not again.training
    assert torch.equal(again(ids, *noisy(l2d, ids, 0.5)), l2d(ids, *noisy(l2d, ids, 0.5)))
    tensors = load_file(tmp_path / "path.safetensors")
    assert tensors.keys() == l2d.path_parameters().keys()
    assert all(torch.equal(tensors[name], p) for name, p in l2d.path_parameters().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["path.json", "path.safetensors"]


def test_path_finds_its_base_by_the_directory_it_names(tmp_path):
    make_lm().save_pretrained(tmp_path / "base")
    l2d = L2D(LM.from_pretrained(tmp_path / "base"), L2DConfig(width=16, cond_dim=24, rank=4))
    l2d.save(tmp_path / "path")
    again = L2D.load(tmp_path / "path")
    assert again.lm.fingerprint() == l2d.lm.fingerprint() and again.lm.directory == str(tmp_path / "base")


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_base_is_refused(saved):
    _, directory = saved
    other = make_lm(seed=1)
    other.directory = "elsewhere"
    with pytest.raises(ValueError, match=r"belongs to the base None \(sha256 \w+\), not to 'elsewhere' .*train.py --init_from=elsewhere") as error:
        L2D.load(directory, other)
    one_line(error)


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def drop_tensor(directory):
    tensors = load_file(directory / "path.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if name != "merge.2.weight"}
    save_file(tensors, directory / "path.safetensors")


DAMAGE = {
    "truncated": (lambda d: (d / "path.safetensors").write_bytes((d / "path.safetensors").read_bytes()[:-10]), "path.safetensors is truncated or not a safetensors file"),
    "no tensors": (lambda d: (d / "path.safetensors").unlink(), r"path.safetensors"),
    "no json": (lambda d: (d / "path.json").unlink(), r"path.json does not exist"),
    "half a json": (lambda d: (d / "path.json").write_text('{"config": {'), r"path.json is not valid JSON"),
    "no base": (lambda d: edit_json(d / "path.json", lambda c: c.pop("base")), "it has no 'base'"),
    "other width": (lambda d: edit_json(d / "path.json", lambda c: c["config"].update(width=8)), "does not fit path.json: 3 tensors differ, first from_z.0.weight"),
    "full copies": (lambda d: edit_json(d / "path.json", lambda c: c["config"].update(rank=None)), "does not fit path.json"),
    "no classes": (lambda d: edit_json(d / "path.json", lambda c: c["config"].update(classes=0)), "does not fit path.json: 1 tensors differ, first class_embedding"),
    "tensor missing": (drop_tensor, "does not fit path.json: 1 tensors differ, first merge.2.weight"),
    "bad option": (lambda d: edit_json(d / "path.json", lambda c: c["config"].update(time_distribution="late")), "time_distribution 'late' is not supported; allowed: uniform, cosmap"),
    "unknown option": (lambda d: edit_json(d / "path.json", lambda c: c["config"].update(depth=2)), "path.json"),
    "empty json": (lambda d: (d / "path.json").write_text("{}"), "path.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_path_is_refused_in_one_line(saved, damage):
    _, directory = saved
    act, message = DAMAGE[damage]
    act(directory)
    with pytest.raises(ValueError, match=message) as error:
        L2D.load(directory, make_lm())
    one_line(error)


@pytest.mark.parametrize("options, message", [(dict(width=0), "width = 0"), (dict(rank=0), "rank = 0"), (dict(classes=-1), "classes = -1"),
                                              (dict(cond_dim=0), "cond_dim = 0"), (dict(time_distribution="late"), "allowed: uniform, cosmap")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        L2DConfig(**options)


def test_defaults_are_the_papers_values():
    """One table: what somebody gets who says nothing, on data of their own."""
    config, paper, settings = L2DConfig(), train.PRESETS["paper"], Settings()
    flags = train.build_parser().parse_args([])
    table = [
        (config.width, 256), (config.cond_dim, 256), (config.sigma, 64.0), (config.rank, 32),
        (config.alpha, 32.0), (config.class_dropout, 0.2), (config.time_distribution, "uniform"),
        (paper["width"], 256), (paper["cond_dim"], 256), (paper["updates"], 27_900),
        (paper["batch_size"] * paper["accumulate"], 32), (paper["lr"], 1e-4),
        (paper["min_lr"], 1e-6), (paper["warmup"], 100), (paper["weight_decay"], 0.01),
        (train.BETAS, (0.9, 0.95)), (flags.clip, 1.0), (flags.seed, 42), (flags.rank, 32),
        (flags.time_distribution, "uniform"),
        (settings.guidance, 1.0), (settings.estimate, "argmax"), (settings.temperature, 0.0),
        (settings.rtol, 1e-3), (settings.atol, 1e-3),
    ]
    assert [found for found, _ in table] == [expected for _, expected in table]


def test_a_fresh_base_is_initialised_like_gpt2(family):
    """N(0, 0.02²), smaller by √(2L) where the residual stream is written to; norms 1, biases 0."""
    config = {**family, "num_hidden_layers": 8, "n_layer": 8}
    lm = LM(ModelConfig.from_hf(config))
    train.init_weights(lm, torch.Generator().manual_seed(0))
    for name, p in lm.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert bool((p == 1).all()), name
        else:
            residual = name.endswith((".o.weight", ".down.weight"))
            assert float(p.std()) == pytest.approx(0.005 if residual else 0.02, rel=0.15), name


def test_a_path_saved_under_older_names_still_loads(saved):
    l2d, directory = saved
    meta = json.loads((directory / "path.json").read_text(encoding="utf-8"))
    for new, old in (("cond_dim", "conditioning"), ("time_distribution", "schedule")):
        meta["config"][old] = meta["config"].pop(new)
    (directory / "path.json").write_text(json.dumps(meta), encoding="utf-8")
    assert L2D.load(directory, make_lm()).config == l2d.config


def test_noise_scale_follows_the_width():
    assert L2DConfig().sigma == 64 and L2DConfig(width=64).sigma == 32 and L2DConfig(sigma=3.0).sigma == 3
