"""diffusion.VelocityField: from logits to a velocity, guidance, and the caches of sampling."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_same, make_ids, make_l2d, path_logits
from data.parts.layout import lay_out
from data.parts.lora import LoRA
from data.parts.modulation import MOST
from diffusion import VelocityField


def close(a, b):
    """Within a thousandth; the path changes logits and velocities by several units."""
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def whole_logits(l2d, ids, x, t, classes=None):
    """The last position's logits by the forward pass over the whole text; t a float or (B,)."""
    before = torch.zeros(len(ids), ids.shape[1] - 1, x.shape[-1])
    times = torch.zeros(ids.shape) + torch.as_tensor(t).view(-1, 1)
    return path_logits(l2d, ids, torch.cat((before, x), dim=1), times, classes)[:, -1:]


# --- the velocity ---------------------------------------------------------------------------------

def clean_point(l2d, logits, t, estimate, temperature):
    """x̂ by its definition."""
    V = l2d.vocabulary()
    if estimate == "argmax":
        return V[logits.argmax(-1)]
    if temperature == "1-t":
        temperature = 1 - t
    return (logits / temperature).softmax(-1) @ V


@pytest.mark.parametrize("estimate, temperature", [
    ("argmax", 1.0),
    ("average", 1.0),
    ("average", 0.5),
    ("average", "1-t"),
])
@torch.no_grad()
def test_velocity_is_the_way_to_the_estimate_over_the_time_left(family, estimate, temperature):
    l2d = make_l2d(family)
    ids = make_ids()
    x = torch.randn(3, 1, 16)
    times = torch.tensor([0.1, 0.5, 0.9])
    field = VelocityField(l2d, l2d.lm.read(ids).last(), estimate, temperature)
    together, _ = field(times, x)
    second = field.rows(torch.tensor([1]))
    for i, t in enumerate(times.tolist()):
        logits = whole_logits(l2d, ids, x, t)
        expected = (clean_point(l2d, logits, t, estimate, temperature) - x) / (1 - t)
        velocity, prediction = field(t, x)
        close(velocity, expected)
        close(prediction, logits)
        # the same with a time for every sequence, and alone
        close(together[i], expected[i])
        close(second(t, x[1:2])[0], expected[1:2])


# --- guidance -------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [0.4, torch.tensor([0.2, 0.5, 0.8])])
@torch.no_grad()
def test_guidance_mixes_the_two_velocities_of_one_call(family, t):
    l2d = make_l2d(family, classes=3)
    ids = make_ids()
    classes = torch.tensor([0, 1, 2])
    x = torch.randn(3, 1, 16)
    states = l2d.lm.read(ids).last()
    sizes = []
    l2d.lm.ln_f.register_forward_hook(lambda module, args, out: sizes.append(len(out)))

    def velocity(class_ids, weight, cost):
        field = VelocityField(l2d, states, "average", class_ids=class_ids, guidance=weight)
        sizes.clear()
        result, _ = field(t, x)
        assert field.guided_inputs[0] == cost
        assert sizes == [3 * cost]      # one call of the network, with twice the batch
        return result

    conditional = velocity(classes, 1, cost=1)
    unconditional = velocity(None, 1, cost=1)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    assert torch.equal(velocity(classes, 0, cost=1), unconditional)
    assert torch.equal(velocity(torch.full((3,), 3), 1, cost=1), unconditional)
    for w in (2, 0.5, -1):
        expected = w * conditional + (1 - w) * unconditional
        close(velocity(classes, w, cost=2), expected)
    # the conditional one against its definition
    remaining = 1 - torch.as_tensor(t).view(-1, 1, 1)
    p = whole_logits(l2d, ids, x, t, classes).softmax(-1)
    close(conditional, (p @ l2d.vocabulary() - x) / remaining)


def guided_field(w, estimate="argmax"):
    l2d = make_l2d(classes=3)
    states = l2d.lm.read(make_ids()).last()
    classes = torch.tensor([0, 1, 2])
    return VelocityField(l2d, states, estimate, class_ids=classes, guidance=w)


@torch.no_grad()
def test_predictions_and_final_logits_are_guided_like_the_velocity():
    """Both copies go on from the guided prediction, and the token is chosen from such a one."""
    x = torch.randn(3, 1, 16)
    for logits in (lambda w: guided_field(w).final_logits(x), lambda w: guided_field(w)(0.5, x)[1]):
        conditional, unconditional = logits(1), logits(0)
        close(logits(2), 2 * conditional - unconditional)
        assert not torch.allclose(conditional, unconditional, atol=1e-2)


@pytest.mark.parametrize("t", [0.3, torch.tensor([0.2, 0.5, 0.8])])
@torch.no_grad()
def test_some_sequences_of_a_guided_field_are_those_of_the_whole(t):
    x = torch.randn(3, 1, 16)
    field = guided_field(2, "average")
    index = torch.tensor([2, 0])
    some_t = t[index] if torch.is_tensor(t) else t
    close(field.rows(index)(some_t, x[index])[0], field(t, x)[0][index])


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_copies_of_guidance_attend_to_the_same_keys_at_every_position(family, padded):
    """No key is copied for the second copy, and neither sees ahead or into the padding."""
    l2d, ids, classes = make_l2d(family, classes=3), make_ids(), torch.tensor([0, 1, 2])
    documents = torch.ones_like(ids)
    documents[1, :4] = 0
    whole = l2d.lm.read(ids, documents if padded else None)
    for states in (whole, whole.last()):
        both = states.copies(2)
        for mine, theirs in zip((*both.keys, *both.values), (*states.keys, *states.values)):
            assert mine is theirs
        x = torch.randn(3, states.hidden.shape[1], 16)

        def velocity(class_ids, w=1.0):
            field = VelocityField(l2d, states, "average", class_ids=class_ids, guidance=w)
            return field(0.5, x)[0]

        close(velocity(classes, 2.0), 2 * velocity(classes) - velocity(None))


# --- caches of sampling ---------------------------------------------------------------------------

def test_vocabulary_has_norm_sqrt_z_and_is_made_once_while_sampling():
    l2d = make_l2d()
    ids = make_ids()
    assert l2d.vectors(ids).requires_grad
    V = l2d.vocabulary()
    assert not V.requires_grad
    assert l2d.vocabulary() is V
    torch.testing.assert_close(V.norm(dim=-1), torch.full((258,), math.sqrt(16)))
    projected = l2d.lm.embed.weight @ l2d.to_z.weight.T + l2d.to_z.bias
    torch.testing.assert_close(V, 4 * F.normalize(projected, dim=-1).detach())
    torch.testing.assert_close(l2d.vectors(ids).detach(), V[ids], atol=1e-6, rtol=0)


def same_modulation(found, expected):
    for a, b in zip((*found.blocks, found.w_d), (*expected.blocks, expected.w_d)):
        torch.testing.assert_close(a.expand_as(b), b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("t", [[0.0] * 3, [0.35] * 3, [1.0] * 3, [0.1, 0.2, 0.3]])
@torch.no_grad()
def test_modulation_looked_up_is_modulation_computed(t):
    l2d = make_l2d(classes=3, perturb=0.05)
    times = torch.tensor(t)
    classes = torch.tensor([2, 0, 3])
    none = torch.full((3,), 3)
    for class_ids, known in ((classes, classes), (None, none)):
        expected = l2d.modulation(times[:, None], known[:, None])
        same_modulation(l2d.time_table.at(times, class_ids), expected)
        if len(set(t)) == 1:
            same_modulation(l2d.time_table.at(t[0], class_ids), expected)


@torch.no_grad()
def test_modulation_is_made_once_for_each_time(monkeypatch):
    l2d = make_l2d(classes=3)
    made = []
    original = l2d.modulation

    def modulation(t, class_ids):
        made.append(t.unique().tolist())
        return original(t, class_ids)

    monkeypatch.setattr(l2d, "modulation", modulation)
    for _ in range(2):
        l2d.time_table.at(0.5, None)
        l2d.time_table.at(torch.tensor([0.5, 0.25, 0.5]), torch.tensor([0, 1, 2]))
        # all that are missing in one call
        l2d.time_table.at(torch.tensor([0.1, 0.5, 0.3, 0.1]), None)
    assert made == [[0.5], [0.25], [0.10000000149011612, 0.30000001192092896]]


@torch.no_grad()
def test_the_table_of_times_is_bounded():
    l2d = make_l2d()
    times = [i / 1000 for i in range(MOST + 10)]
    for t in times:
        l2d.time_table.at(t, None)
    # without the oldest
    assert list(l2d.time_table.cached) == times[10:]
    # more at once than it holds
    many = torch.rand(MOST + 3)
    same_modulation(l2d.time_table.at(many, None), l2d.modulation(many[:, None]))
    assert len(l2d.time_table.cached) == MOST


@torch.no_grad()
def test_all_caches_are_dropped_when_the_mode_is_set():
    l2d = make_l2d()
    for set_mode in (l2d.train, l2d.eval):
        l2d.time_table.at(0.25, None)
        l2d.vocabulary()
        set_mode()
        assert l2d.time_table.cached == {}
        assert l2d.cached_vocabulary is None


# --- merged matrices ------------------------------------------------------------------------------

def adapters(l2d):
    return [module for module in l2d.blocks.modules() if isinstance(module, LoRA)]


@torch.no_grad()
def test_merged_lora_gives_the_same_logits_and_the_frozen_matrices_stay(family):
    l2d = make_l2d(family)
    frozen = {name: p.clone() for name, p in l2d.lm.named_parameters()}
    states = l2d.lm.read(make_ids()).last()
    field = VelocityField(l2d, states)
    x = torch.randn(3, 1, 16)
    apart = field.final_logits(x)
    l2d.merge_lora()
    assert all(adapter.merged is not None for adapter in adapters(l2d))
    close(field.final_logits(x), apart)
    # at t = 0 still the frozen model's bits
    assert torch.equal(field(0.0, x)[1], l2d.lm.logits(states.hidden))
    assert_same(dict(l2d.lm.named_parameters()), frozen)


@torch.no_grad()
def test_what_is_laid_out_for_sampling_computes_the_same(family):
    l2d = make_l2d(family)
    ids, x = make_ids(), torch.randn(3, 1, 16)
    frozen = {name: p.clone() for name, p in l2d.lm.named_parameters()}
    before = VelocityField(l2d, l2d.read(ids).last()).final_logits(x)
    lay_out(l2d.lm)
    l2d.merge_lora()
    states = l2d.read(ids).last()
    field = VelocityField(l2d, states)
    close(field.final_logits(x), before)
    assert torch.equal(field(0.0, x)[1], l2d.lm.logits(states.hidden))
    # input by input in memory, all but what is looked up
    inner = [p for name, p in l2d.lm.blocks.named_parameters() if p.dim() == 2]
    for matrix in [*inner, l2d.lm.head_copy, *(adapter.merged for adapter in adapters(l2d))]:
        assert matrix.T.is_contiguous()
    assert l2d.lm.embed.weight.is_contiguous()
    # a head that is not looked up is there once
    tied = l2d.lm.config.tied
    assert tied != (l2d.lm.head_copy.data_ptr() == l2d.lm.head.weight.data_ptr())
    assert_same(dict(l2d.lm.named_parameters()), frozen)
    assert l2d.lm.fingerprint() == make_l2d(family).lm.fingerprint()


@torch.no_grad()
def test_merging_is_undone_by_training(family):
    l2d = make_l2d(family)
    field = VelocityField(l2d, l2d.lm.read(make_ids()).last())
    x = torch.randn(3, 1, 16)
    apart = field.final_logits(x)
    l2d.merge_lora()
    l2d.train()
    assert all(adapter.merged is None for adapter in adapters(l2d))
    assert torch.equal(field.final_logits(x), apart)
    # merged matrices do not see a change of the LoRA; after train() it acts
    l2d.merge_lora()
    for adapter in adapters(l2d):
        adapter.B += 1.0
    close(field.final_logits(x), apart)
    l2d.train()
    assert not torch.allclose(field.final_logits(x), apart, atol=1e-2)
