"""diffusion.VelocityField: from logits to a velocity, guidance, and what is kept while sampling."""

import pytest
import torch
from conftest import make_ids, make_l2d

from diffusion import TABLE, VelocityField
from model import LoRA


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def whole_logits(l2d, ids, x, t, classes=None):
    """The last position's logits by the forward pass over the whole text; t a float or (B,)."""
    before = torch.zeros(len(ids), ids.shape[1] - 1, x.shape[-1])
    times = torch.zeros(ids.shape) + torch.as_tensor(t).view(-1, 1)
    return l2d(ids, torch.cat((before, x), dim=1), times, classes)[:, -1:]


# --- the velocity -------------------------------------------------------------------------------------

@pytest.mark.parametrize("estimate, temperature", [
    ("argmax", 1.0), ("average", 1.0), ("average", 0.5), ("average", "1-t")])
@torch.no_grad()
def test_velocity_is_the_way_to_the_estimate_over_the_time_left(family, estimate, temperature):
    l2d, ids = make_l2d(family, perturb=0.05), make_ids()
    x, times = torch.randn(3, 1, 16), torch.tensor([0.1, 0.5, 0.9])
    field = VelocityField(l2d, l2d.lm.read(ids).last(), estimate, temperature)
    together = field(times, x)[0]
    some = field.rows(torch.tensor([1]))
    for i, t in enumerate(times.tolist()):
        logits = whole_logits(l2d, ids, x, t)
        p = (logits / (1 - t if temperature == "1-t" else temperature)).softmax(-1)
        guess = p @ l2d.vocabulary()
        if estimate == "argmax":
            guess = l2d.vocabulary()[logits.argmax(-1)]
        expected = (guess - x) / (1 - t)
        velocity, seen = field(t, x)
        close(velocity, expected)
        close(seen, logits)
        close(together[i], expected[i])
        close(some(t, x[1:2])[0], expected[1:2])


def test_a_field_cannot_be_changed():
    l2d = make_l2d()
    field = VelocityField(l2d, l2d.lm.read(make_ids()).last())
    with pytest.raises(AttributeError):
        field.guidance = 2.0


# --- guidance -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [0.4, torch.tensor([0.2, 0.5, 0.8])])
@torch.no_grad()
def test_guidance_mixes_the_two_velocities_of_one_call(family, t):
    l2d, ids, classes = make_l2d(family, classes=3), make_ids(), torch.tensor([0, 1, 2])
    reading, x, sizes = l2d.lm.read(ids).last(), torch.randn(3, 1, 16), []
    l2d.lm.ln_f.register_forward_hook(lambda module, args, out: sizes.append(len(out)))

    def velocity(class_ids, weight, cost):
        field = VelocityField(l2d, reading, "average", class_ids=class_ids, guidance=weight)
        sizes.clear()
        result = field(t, x)[0]
        assert field.cost == cost and sizes == [3 * cost]      # one batch, of twice the size
        return result

    conditional, unconditional = velocity(classes, 1, 1), velocity(None, 1, 1)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    assert torch.equal(velocity(classes, 0, 1), unconditional)
    assert torch.equal(velocity(torch.full((3,), 3), 1, 1), unconditional)
    for w in (2, 0.5, -1):
        close(velocity(classes, w, 2), w * conditional + (1 - w) * unconditional)
    remaining = 1 - torch.as_tensor(t).view(-1, 1, 1)
    p = whole_logits(l2d, ids, x, t, classes).softmax(-1)
    close(conditional, (p @ l2d.vocabulary() - x) / remaining)


@torch.no_grad()
def test_final_logits_are_guided_like_the_velocity():
    l2d, classes, x = make_l2d(classes=3), torch.tensor([0, 1, 2]), torch.randn(3, 1, 16)
    reading = l2d.lm.read(make_ids()).last()

    def logits(w):
        return VelocityField(l2d, reading, class_ids=classes, guidance=w).logits(x)

    close(logits(2), 2 * logits(1) - logits(0))
    assert not torch.allclose(logits(1), logits(0), atol=1e-2)


@torch.no_grad()
def test_some_sequences_of_a_guided_field_are_those_of_the_whole():
    l2d, classes, x = make_l2d(classes=3), torch.tensor([0, 1, 2]), torch.randn(3, 1, 16)
    reading = l2d.lm.read(make_ids()).last()
    field = VelocityField(l2d, reading, "average", class_ids=classes, guidance=2.0)
    index = torch.tensor([2, 0])
    close(field.rows(index)(0.3, x[index])[0], field(0.3, x)[0][index])


# --- what is kept while sampling ----------------------------------------------------------------------

@torch.no_grad()
def test_modulation_looked_up_is_modulation_computed():
    l2d, classes = make_l2d(classes=3, perturb=0.05), torch.tensor([2, 0, 3])
    for class_ids, known in ((classes, classes), (None, torch.full((3,), 3))):
        for t in (0.0, 0.35, 1.0):
            expected = l2d.modulation(torch.full((3, 1), t), known[:, None])
            for times in (t, torch.full((3,), t)):
                found = l2d.modulation_at(times, class_ids)
                for a, b in zip((*found.blocks, found.w_d), (*expected.blocks, expected.w_d)):
                    torch.testing.assert_close(a.expand_as(b), b, atol=1e-6, rtol=1e-6)
    times = torch.tensor([0.1, 0.2, 0.3])
    found, expected = l2d.modulation_at(times, classes), l2d.modulation(times, classes)
    close(found.w_d[:, 0], expected.w_d)
    close(found.blocks[1][:, 0], expected.blocks[1])


@torch.no_grad()
def test_the_table_of_times_is_bounded_and_forgotten(monkeypatch):
    l2d = make_l2d()
    made = []
    original = l2d.modulation
    monkeypatch.setattr(l2d, "modulation", lambda t, *rest: made.append(1) or original(t, *rest))
    for _ in range(2):
        l2d.modulation_at(0.5, None)
    assert len(made) == 1
    for i in range(TABLE + 10):
        l2d.modulation_at(i / 1000, None)
    assert len(l2d.kept_modulation) == TABLE and 0.5 not in l2d.kept_modulation
    for forget in (l2d.train, l2d.eval):
        l2d.modulation_at(0.25, None)
        forget()
        assert l2d.kept_modulation == {} and l2d.kept_vocabulary is None


@torch.no_grad()
def test_folded_lora_says_the_same_and_the_frozen_matrices_stay(family):
    l2d, ids = make_l2d(family, perturb=0.05), make_ids()
    x, frozen = torch.randn(3, 1, 16), l2d.lm.fingerprint()
    reading = l2d.lm.read(ids).last()
    apart = VelocityField(l2d, reading).logits(x)
    adapters = [module for module in l2d.blocks.modules() if isinstance(module, LoRA)]
    l2d.fold_lora()
    assert all(adapter.folded is not None for adapter in adapters)
    close(VelocityField(l2d, reading).logits(x), apart)
    # the claim at t = 0 does not hang on how the products are ordered
    assert torch.equal(VelocityField(l2d, reading)(0.0, x)[1], l2d.lm.logits(reading.hidden))
    assert l2d.lm.fingerprint() == frozen
    for adapter in adapters:
        adapter.B += 1.0
    l2d.train()
    assert all(adapter.folded is None for adapter in adapters)
    assert not torch.allclose(VelocityField(l2d.eval(), reading).logits(x), apart, atol=1e-2)
