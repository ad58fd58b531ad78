"""diffusion.py: the claims of the method, on small random models of every family.

The frozen model's bits at the start, the formulas written out, independent positions, the
objective. The velocity is in test_velocity.py; files and defaults are in test_path_files.py; the
sampler with a perfect network and the random draws are in test_oracle.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from conftest import (
    assert_same, drawn, generator, generators, make_batch, make_ids, make_l2d, make_lm, p_value,
    path_logits)
from data.checkpoints.families import ModelConfig
from data.parts.draws import RowDraws, draw_times, drop_classes, row_generator
from data.parts.lora import LoRA
from data.parts.positions import Packed, rope_inv_freq
from data.training.batches import IGNORE
from data.training.memory import recompute
from diffusion import L2D, L2DConfig, paper_losses, refined_losses
from model import LM


def noisy(l2d, ids, t, seed=3):
    """(x_t, t) of the shapes that path_logits(l2d, ids, x_t, t) takes; t a number or a tensor."""
    noise = torch.randn(*ids.shape, l2d.config.width, generator=generator(seed))
    if isinstance(t, float):
        t = torch.full(ids.shape, t)
    return l2d.config.sigma * noise, t


# --- where it starts: the frozen model, bit for bit -----------------------------------------------

VARIANTS = [
    dict(rank=4),
    dict(rank=None),
    dict(rank=4, classes=3),
    dict(rank=None, classes=3),
    dict(rank=4, start="frozen"),
    dict(rank=None, start="frozen", self_conditioning=True),
    dict(rank=None, start="frozen", own_kv=True),
    dict(rank=4, start="frozen", without="estimate", own_kv=True),
    dict(rank=4, start="frozen", without="difference", own_kv=True),
    dict(rank=4, classes=3, start="frozen", self_conditioning=True, own_kv=True),
]


@pytest.mark.parametrize("options", VARIANTS)
@torch.no_grad()
def test_logits_are_the_frozen_models_at_t_zero_and_before_training(family, options):
    ids = make_ids()
    classes = torch.tensor([0, 2, 3]) if "classes" in options else None
    fresh = make_l2d(family, perturb=0, **options)
    for t in (0.0, 0.3, torch.rand(ids.shape), 1.0):
        assert torch.equal(path_logits(fresh, ids, *noisy(fresh, ids, t), classes), fresh.lm(ids))
    trained = make_l2d(family, **options)
    frozen = trained.lm(ids)
    assert torch.equal(path_logits(trained, ids, *noisy(trained, ids, 0.0), classes), frozen)
    changed = path_logits(trained, ids, *noisy(trained, ids, 0.5), classes) - frozen
    assert changed.abs().amax(-1).min() > 1e-2


@torch.no_grad()
def test_t_zero_is_exact_where_two_equal_products_round_differently():
    """As they may on a GPU: g(e(t)) − g(e(0)) alone would leave a residue."""
    l2d = make_l2d()
    ids = make_ids()
    calls = []

    def disturb(module, args, out):
        calls.append(1)
        return out * (1 + 1e-3 * len(calls))

    l2d.time_gate.register_forward_hook(disturb)
    assert torch.equal(path_logits(l2d, ids, *noisy(l2d, ids, 0.0)), l2d.lm(ids))
    assert len(calls) == 2


@torch.no_grad()
def test_bfloat16_base_starts_at_its_own_logits_and_the_path_stays_float32(family):
    lm = make_lm(family).bfloat16()
    l2d = L2D(lm, L2DConfig(width=16, cond_dim=24, rank=4))
    ids = make_ids()
    assert {p.dtype for p in l2d.path_parameters().values()} == {torch.float32}
    assert torch.equal(path_logits(l2d, ids, *noisy(l2d, ids, 0.5)), lm(ids))
    l2d.time_gate[2].weight += 0.2
    assert torch.equal(path_logits(l2d, ids, *noisy(l2d, ids, 0.0)), lm(ids))
    assert not torch.equal(path_logits(l2d, ids, *noisy(l2d, ids, 0.5)), lm(ids))


@torch.no_grad()
def test_bfloat16_base_and_the_frozen_start(family):
    lm = make_lm(family).bfloat16()
    l2d = L2D(lm, L2DConfig(width=16, cond_dim=24, rank=4, start="frozen", own_kv=True))
    ids = make_ids()
    assert torch.equal(path_logits(l2d, ids, *noisy(l2d, ids, 0.5)), lm(ids))


def test_the_frozen_start_teaches_the_lora_of_every_layer_at_once(family):
    l2d = make_l2d(family, perturb=0, start="frozen", own_kv=True).train()
    batch = make_batch(make_ids(), make_ids(seed=1))
    mean_loss(l2d, drawn(l2d, batch, generators(3))).backward()
    found = reached(l2d)
    corrections = {name for name, _ in l2d.path_parameters().items() if name.endswith(".B")}
    assert corrections <= found
    # A waits for B, and the layers before a last layer at zero wait for that
    assert not any(name.endswith(".A") for name in found)
    assert "time_gate.2.weight" not in found


@torch.no_grad()
def test_the_frozen_start_reads_the_least_squares_estimate_of_the_token():
    l2d = make_l2d(start="frozen")
    ids = make_ids()
    seen = []
    l2d.from_z.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    for t in (1e-6, 0.4, 1.0):
        x_t, times = noisy(l2d, ids, t)
        path_logits(l2d, ids, x_t, times)
        # cov(x_1, x_t) / var(x_t), per coordinate of unit variance
        expected = x_t * t / ((1 - t) ** 2 * l2d.config.sigma ** 2 + t ** 2)
        torch.testing.assert_close(seen.pop(), expected, atol=1e-6, rtol=1e-5)


def test_own_keys_and_values_are_trained_as_sampling_reads_them(family):
    """At t = 0, in both."""
    l2d, ids = make_l2d(family, own_kv=True), make_ids()
    trained = l2d.read(ids)
    with torch.no_grad():
        sampled = l2d.read(ids)
    assert trained.keys[0].requires_grad
    for name in ("keys", "values"):
        torch.testing.assert_close(getattr(trained, name), getattr(sampled, name))


@torch.no_grad()
def test_states_at_some_positions_are_those_of_all(family):
    """As sequences of one token each, in rows and in copies: the same logits as all at once."""
    l2d = make_l2d(family, start="frozen", own_kv=True, classes=3)
    ids = make_ids()
    states = l2d.read(ids)
    x_t = torch.randn(*ids.shape, 16, generator=generator())
    index = torch.tensor([2, 0, 2]), torch.tensor([4, 9, 0])
    some = states.at(index).alone()
    labels = torch.tensor([1, 0, 2])
    at_once = l2d.predict(x_t, 0.3, labels, states)
    alone = l2d.predict(x_t[index][:, None], 0.3, labels[index[0]], some)
    torch.testing.assert_close(alone[:, 0], at_once[index], atol=1e-4, rtol=1e-4)
    part = torch.tensor([2, 0])
    rows = l2d.predict(x_t[index][part, None], 0.3, labels[index[0]][part], some.rows(part))
    torch.testing.assert_close(rows, alone[part], atol=1e-4, rtol=1e-4)
    # fewer positions than rows, in two copies
    both = l2d.predict(x_t[index][part, None].repeat(2, 1, 1), 0.3,
                       labels[index[0]][part].repeat(2), some.rows(part).copies(2))
    torch.testing.assert_close(both, alone[part].repeat(2, 1, 1), atol=1e-4, rtol=1e-4)
    twice = l2d.predict(x_t[index][:, None].repeat(2, 1, 1), 0.3, labels[index[0]].repeat(2),
                        some.copies(2))
    torch.testing.assert_close(twice, alone.repeat(2, 1, 1), atol=1e-4, rtol=1e-4)


def reached(l2d) -> set:
    """Names of the parameters that a gradient has reached."""
    return {name for name, p in l2d.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("rank", [4, None])
def test_only_the_path_learns_and_at_first_only_the_time_gate(family, rank):
    l2d = make_l2d(family, perturb=0, rank=rank, classes=2).train()
    classes = torch.tensor([0, 1, 2])
    assert not l2d.lm.training
    assert not any(p.requires_grad for p in l2d.lm.parameters())
    batch = make_batch(make_ids(), make_ids(seed=1), classes)
    mean_loss(l2d, drawn(l2d, batch, generators(3))).backward()
    assert reached(l2d) == {"time_gate.2.weight"}
    with torch.no_grad():
        for p in l2d.path_parameters().values():
            p += 0.1 * torch.randn(p.shape)
    batch = make_batch(make_ids(), make_ids(seed=1), classes)
    mean_loss(l2d, drawn(l2d, batch, generators(3))).backward()
    assert reached(l2d) == set(l2d.path_parameters())


# --- the network, against its formulas written out for one position ------------------------------

def two_layers(net, x):
    x = F.silu(net[0].weight @ x + net[0].bias)
    return F.linear(x, net[2].weight, net[2].bias)


def affine(module, x):
    if not isinstance(module, LoRA):
        return F.linear(x, module.weight, module.bias)
    frozen = module.frozen
    weight = frozen.weight + 32 / 4 * (module.A @ module.B).T
    return F.linear(x, weight, frozen.bias)


def normalised(norm, x, scale=0.0, shift=0.0):
    if not norm.rms:
        x = x - x.mean()
        shift = shift + norm.bias
    n = x / (x.square().mean() + norm.eps).sqrt()
    return (norm.weight + scale) * n + shift


def attention(lm, q, keys, values, position):
    """One query vector over the keys and values (G, S, D) up to its own position."""
    config = lm.config
    found = []
    for head, v in enumerate(q.view(config.heads, config.head_dim)):
        if lm.embed_positions is None:
            angles = position * rope_inv_freq(lm.config)
            cos, sin = angles.cos(), angles.sin()
            a, b = v.chunk(2)
            v = torch.cat((a * cos - b * sin, b * cos + a * sin))
        group = head * config.kv_heads // config.heads
        scores = keys[group, :position + 1] @ v / math.sqrt(config.head_dim)
        found.append(scores.softmax(0) @ values[group, :position + 1])
    return torch.cat(found)


def mlp(net, n):
    up = affine(net.up, n)
    if net.gate is None:
        return affine(net.down, net.act(up))
    return affine(net.down, net.act(affine(net.gate, n)) * up)


def embedded(l2d, t, class_id):
    omega = 10000 ** (-torch.arange(128) / 128)
    sinusoid = torch.cat(((omega * t).cos(), (omega * t).sin()))
    return two_layers(l2d.time, sinusoid) + l2d.class_embedding.weight[class_id]


def logits_by_hand(l2d, states, position, x_t, t, class_id):
    """The paper's section 3: one position of a batch of one, no broadcasting, no shortcuts."""
    lm = l2d.lm
    e = embedded(l2d, t, class_id)
    e_0 = embedded(l2d, 0, class_id)
    variance = (1 - t) ** 2 * l2d.config.sigma ** 2 + t ** 2
    h = two_layers(l2d.from_z, x_t / math.sqrt(variance))
    if lm.embed_positions is not None:
        h = h + lm.embed_positions.weight[position]
    for i, (block, frozen) in enumerate(zip(l2d.blocks, lm.blocks)):
        a1, s1, g1, a2, s2, g2 = two_layers(block.modulation, e).view(6, -1)
        q = affine(block.q, normalised(frozen.norm_attn, h, a1, s1))
        found = attention(lm, q, states.keys[i][0], states.values[i][0], position)
        h = h + g1 * affine(block.o, found)
        h = h + g2 * mlp(block.mlp, normalised(frozen.norm_mlp, h, a2, s2))
    w_d = two_layers(l2d.time_gate, e) - two_layers(l2d.time_gate, e_0)
    return lm.head.weight @ normalised(lm.ln_f, states.hidden[0, position] + w_d * h)


@pytest.mark.parametrize("rank", [4, None])
@torch.no_grad()
def test_network_equals_its_formulas_written_out(family, rank):
    l2d = make_l2d(family, rank=rank, classes=2)
    ids = make_ids(1, 7)
    x_t, t = noisy(l2d, ids, torch.rand(1, 7))
    logits = path_logits(l2d, ids, x_t, t, torch.tensor([1]))
    states = l2d.lm.read(ids)
    frozen = l2d.lm.logits(states.hidden)
    for k in (0, 3, 6):
        expected = logits_by_hand(l2d, states, k, x_t[0, k], float(t[0, k]), 1)
        # the path's part is hundreds of times the tolerance
        assert float((expected - frozen[0, k]).abs().max()) > 0.3
        torch.testing.assert_close(logits[0, k], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rank", [4, None])
@torch.no_grad()
def test_a_fresh_path_has_the_frozen_matrices_and_closed_gates(family, rank):
    l2d = make_l2d(family, perturb=0, rank=rank)
    for block, frozen in zip(l2d.blocks, l2d.lm.blocks):
        pairs = [(block.q, frozen.q), (block.o, frozen.o)]
        for name in ("gate", "up", "down"):
            if getattr(frozen.mlp, name) is not None:
                pairs.append((getattr(block.mlp, name), getattr(frozen.mlp, name)))
        for ours, theirs in pairs:
            x = torch.randn(5, theirs.in_features)
            assert torch.equal(ours(x), theirs(x))
        assert not block.modulation(torch.randn(5, 24)).any()
    assert not l2d.time_gate(torch.randn(5, 24)).any()


LLAMA_1B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "tie_word_embeddings": True,
}
LLAMA_8B = {
    **LLAMA_1B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "head_dim": 128, "tie_word_embeddings": False,
}
QWEN_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
GPT2_XL = {
    "model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25,
    "n_positions": 1024,
}


# from the models' config.json; millions of trained parameters for rank 32 and Z = 256
@pytest.mark.parametrize("config, millions", [
    pytest.param(LLAMA_1B, 73.3, id="llama-3.2-1b"),
    pytest.param(LLAMA_8B, 281.0, id="llama-3.1-8b"),
    pytest.param(QWEN_7B, 233.0, id="qwen2.5-7b"),
    pytest.param(GPT2_XL, 157.5, id="gpt2-xl"),
])
def test_trainable_sizes_of_the_published_models(config, millions):
    with torch.device("meta"):
        l2d = L2D(LM(ModelConfig.from_hf(config)), L2DConfig())
    trained = sum(p.numel() for p in l2d.path_parameters().values())
    assert round(trained / 1e6, 1) == millions
    assert trained == sum(p.numel() for p in l2d.parameters() if p.requires_grad)


# --- independent positions ------------------------------------------------------------------------

@torch.no_grad()
def test_a_noisy_token_changes_its_own_position_only(family):
    l2d = make_l2d(family)
    ids = make_ids()
    x_t, t = noisy(l2d, ids, 0.6)
    logits = path_logits(l2d, ids, x_t, t)
    k = 4
    other_x = x_t.clone()
    other_x[:, k] = 0.1
    other_t = t.clone()
    other_t[:, k] = 0.9
    for other in (path_logits(l2d, ids, other_x, t), path_logits(l2d, ids, x_t, other_t)):
        differs = (other != logits).any(-1)
        assert differs[:, k].all()
        assert int(differs.sum()) == len(ids)


@torch.no_grad()
def test_a_target_changes_the_loss_of_its_own_position_only(family):
    l2d = make_l2d(family)
    ids = make_ids()
    targets = make_ids(seed=1)
    given = dict(t=torch.rand(ids.shape), noise=torch.randn(*ids.shape, 16))
    k = 4
    other = targets.clone()
    other[:, k] = (other[:, k] + 1) % 258
    losses, *_ = paper_losses(l2d, make_batch(ids, targets, **given))
    others, *_ = paper_losses(l2d, make_batch(ids, other, **given))
    differs = (losses != others).view(ids.shape)
    assert differs[:, k].all()
    assert int(differs.sum()) == len(ids)


@torch.no_grad()
def test_packed_examples_have_the_losses_they_have_alone(family):
    l2d = make_l2d(family)
    ids = make_ids(1, 10)
    targets = make_ids(1, 10, seed=1)
    given = dict(t=torch.rand(1, 10), noise=torch.randn(1, 10, 16))
    documents = Packed.of(torch.tensor([[1] * 4 + [2] * 6]))
    packed, *_ = paper_losses(l2d, make_batch(ids, targets, documents=documents, **given))
    alone = []
    for s in (slice(0, 4), slice(4, 10)):
        part = {name: value[:, s] for name, value in given.items()}
        alone.append(paper_losses(l2d, make_batch(ids[:, s], targets[:, s], **part)).values)
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


# --- the objective --------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    dict(),
    dict(classes=3),
    dict(rank=None, time_distribution="cosmap"),
])
def test_token_losses_are_those_of_the_whole_forward(family, options):
    """x_t = t·V_y + (1−t)·σ·noise; a row's times are drawn first, then its noise.

    The path itself is evaluated only where a target counts.
    """
    l2d = make_l2d(family, perturb=0.1, **options)
    ids = make_ids()
    targets = make_ids(seed=1)
    targets[torch.rand(ids.shape) < 0.5] = IGNORE
    classes = torch.tensor([0, 2, 3]) if "classes" in options else None
    batch = drawn(l2d, make_batch(ids, targets, classes), generators(3, 5), hide=False)
    losses, _, times = paper_losses(l2d, batch)

    t = torch.zeros(ids.shape)
    noise = torch.zeros(*ids.shape, 16)
    counts = targets != IGNORE
    for row, g in enumerate(generators(3, 5)):
        here = int(counts[row].sum())
        draws = RowDraws([here], [g])
        t[row, counts[row]] = draw_times(draws, l2d.config.time_distribution)
        noise[row, counts[row]] = torch.randn(here, 16, generator=g)
    x_1 = l2d.vectors(targets.clamp_min(0))
    x_t = t[..., None] * x_1 + (1 - t[..., None]) * l2d.config.sigma * noise
    logits = path_logits(l2d, ids, x_t, t, classes)
    expected = F.cross_entropy(logits[counts], targets[counts], reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(times, t[counts])
    assert len(times.unique()) == len(times)


def test_rows_of_neighbouring_seeds_do_not_share_their_noise():
    first = [float(torch.rand(1, generator=row_generator(seed, number)))
             for seed in range(8) for number in range(8)]
    assert len(set(first)) == 64


@pytest.mark.parametrize("unroll", [0, 4])
def test_the_draws_of_a_row_depend_on_the_row_alone(unroll):
    """So times, noise and hidden classes are the same in any batch and process."""
    l2d = make_l2d(classes=3).train()
    targets = make_ids(4, 9).masked_fill(torch.rand(4, 9) < 0.4, IGNORE)
    classes = torch.tensor([0, 1, 2, 0])

    def of(rows, length):
        some = targets[rows, :length]
        batch = make_batch(some, some, classes[rows])
        return drawn(l2d, batch, [row_generator(7, 20 + row) for row in rows], unroll).targets

    together = of([3, 0, 2, 1], 9)
    for place, row in enumerate([3, 0, 2, 1]):
        length = int((targets[row] != IGNORE).nonzero().max()) + 1
        alone = of([row], length)
        here = together.at(together.index[0] == place)
        for name in ("y", "t", "noise", "class_ids"):
            assert torch.equal(getattr(alone, name), getattr(here, name)), name
    assert not torch.equal(of([0], 9).noise[0], of([1], 9).noise[0])


def test_the_gradient_also_goes_through_the_vector_of_the_target():
    """So W of Eq. 5 learns, and from nothing else."""
    l2d = make_l2d(perturb=0.05)
    given = dict(t=torch.rand(3, 10), noise=torch.randn(3, 10, 16))
    mean_loss(l2d, make_batch(make_ids(), make_ids(seed=1), **given)).backward()
    assert l2d.to_z.weight.grad.abs().max() > 1e-6
    # where x_t is noise alone, there is no vector in it
    l2d.zero_grad()
    given["t"] = torch.zeros(3, 10)
    mean_loss(l2d, make_batch(make_ids(), make_ids(seed=1), **given)).backward()
    assert not l2d.to_z.weight.grad.any()


def mean_loss(l2d, batch):
    return paper_losses(l2d, batch).values.mean()


def test_without_targets_there_are_no_losses():
    """All targets IGNORE: no losses, no times, and a sum of zero that can be differentiated."""
    l2d = make_l2d()
    ids = make_ids()
    batch = drawn(l2d, make_batch(ids, torch.full_like(ids, IGNORE)), generators(3))
    losses, _, times = paper_losses(l2d, batch)
    assert losses.shape == times.shape == (0,)
    losses.sum().backward()


def gradients(l2d, batch, objective=paper_losses):
    l2d.zero_grad()
    losses = objective(l2d, batch).values
    losses.mean().backward()
    found = {name: p.grad for name, p in l2d.path_parameters().items() if p.grad is not None}
    return losses.detach(), found


def three_documents():
    """Two rows with padding, three documents in the first."""
    ids, targets = make_ids(2, 12), make_ids(2, 12, seed=1)
    numbers = torch.tensor([[1] * 3 + [2] * 4 + [3] * 5, [1] * 6 + [2] * 2 + [0] * 4])
    return ids, targets.masked_fill(numbers == 0, IGNORE), numbers


@pytest.mark.parametrize("options", [{}, {"own_kv": True, "self_conditioning": True},
                                     {"self_kv": True, "self_conditioning": True}])
def test_documents_by_their_borders_teach_the_same_as_by_a_mask(family, options):
    l2d = make_l2d(family, perturb=0.05, **options)
    ids, targets, numbers = three_documents()
    batches = [drawn(l2d, make_batch(ids, targets, documents=documents), generators(2))
               for documents in (numbers, Packed.of(numbers))]
    assert batches[1].documents.borders == (0, 3, 7, 12, 18, 20, 24)
    (dense, expected), (parts, found) = (gradients(l2d, batch) for batch in batches)
    torch.testing.assert_close(parts, dense, atol=1e-5, rtol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        difference = (gradient - expected[name]).abs().max()
        assert difference <= 1e-5 + 1e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("options", [{}, {"own_kv": True}, {"self_kv": True}])
@pytest.mark.parametrize("objective, unroll", [(paper_losses, 0), (refined_losses, 5)])
def test_few_tokens_of_documents_are_sequences_before_copies_of_keys(
    family, options, objective, unroll
):
    l2d = make_l2d(family, perturb=0.05, self_conditioning=True, classes=2,
                   asked_again=[0], **options)
    ids, targets, numbers = three_documents()
    # the last tokens of four of the five documents
    few = torch.full_like(targets, IGNORE)
    for place in ((0, 6), (0, 11), (1, 5), (1, 7)):
        few[place] = targets[place]
    batches = [drawn(l2d, make_batch(ids, few, torch.tensor([0, 1]), documents), generators(2),
                     unroll=unroll)
               for documents in (numbers, Packed.of(numbers))]
    with torch.no_grad():
        scattered, alone = (l2d.read(batch.ids, batch.documents).at(batch.targets.index)
                            for batch in batches)
    assert scattered.keys[0].shape[0] == 2 and scattered.index
    assert alone.keys[0].shape[0] == 4 and alone.keys[0].shape[2] == 6 and alone.index is None
    (dense, expected), (found, gradient) = (gradients(l2d, batch, objective) for batch in batches)
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=1e-4)
    for name, wanted in expected.items():
        difference = (gradient[name] - wanted).abs().max()
        assert difference <= 1e-4 + 1e-2 * wanted.abs().max(), name


@pytest.mark.parametrize("options", [{}, {"own_kv": True, "self_conditioning": True}])
def test_checkpointing_changes_no_gradient(family, options):
    l2d = make_l2d(family, **options)
    batch = drawn(l2d, make_batch(*three_documents()[:2]), generators(2))
    losses, expected = gradients(l2d, batch)
    recompute(l2d.blocks)
    again, found = gradients(l2d, batch)
    assert torch.equal(again, losses)
    assert_same(found, expected)


@pytest.mark.parametrize("options", [
    {}, {"own_kv": True, "self_conditioning": True},
    {"self_conditioning": True, "prediction_words": 4},
])
def test_the_objective_is_one_graph_whatever_the_shapes(options):
    """torch.compile neither breaks the graph nor compiles it again."""
    torch._dynamo.reset()
    l2d = make_l2d(**options)
    graphs = CompileCounter()
    compiled = torch.compile(paper_losses, dynamic=True, fullgraph=True, backend=graphs)
    for seed in range(3):
        targets = make_ids(2 + seed, 7 + seed, seed=seed)
        targets[:, :seed + 1] = IGNORE
        batch = drawn(l2d, make_batch(make_ids(2 + seed, 7 + seed), targets),
                      generators(2 + seed, seed))
        # without the compiler first: the rotary angles are cached from then on
        expected = paper_losses(l2d, batch).values
        torch.testing.assert_close(compiled(l2d, batch).values, expected)
    assert graphs.frame_count == 1


# --- classes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes, given, message", [
    (0, [0, 1, 4], "this path has no classes; allowed: None"),
    (3, [0, 1, 4], "out of range; allowed: 0 to 3"),
    (3, [0, -1, 1], "out of range; allowed: 0 to 3"),
])
def test_classes_that_the_path_does_not_have_are_refused(classes, given, message):
    l2d = make_l2d(classes=classes)
    ids = make_ids()
    with pytest.raises(ValueError, match=message):
        drawn(l2d, make_batch(ids, ids, torch.tensor(given)), generators(3))


def test_a_share_of_the_classes_is_dropped_position_by_position():
    classes = make_ids(1, 100 * 200, vocab=3)[0]
    found = drop_classes(classes, 0.2, 3, RowDraws([200] * 100, generators(100)))
    dropped = found == 3
    assert torch.equal(found[~dropped], classes[~dropped])
    assert p_value(dropped.long().bincount(), torch.tensor([0.8, 0.2])) > 1e-3
    # no sequence is hidden or shown whole
    per_row = dropped.view(100, 200).sum(1)
    assert 0 < int(per_row.min())
    assert int(per_row.max()) < 100


def test_the_objective_drops_classes():
    """So the embedding of no class learns too, though no row has it."""
    l2d = make_l2d(classes=3)
    batch = make_batch(make_ids(), make_ids(seed=1), torch.tensor([0, 1, 2]))
    for hide in (False, True):
        l2d.zero_grad()
        mean_loss(l2d, drawn(l2d, batch, generators(3), hide=hide)).backward()
        assert bool(l2d.class_embedding.weight.grad[3].any()) == hide
