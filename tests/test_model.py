"""model.py: the same logits in any pieces of the text, the textbook's formulas, log p in pieces.

Files are in test_checkpoint.py.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import GPT2, LLAMA, LLAMA_SCALED, QWEN, SCALING, generator, make_ids, make_lm
from data.checkpoints.families import ModelConfig
from data.parts import kv_cache
from data.parts.kv_cache import KVCache
from data.parts.log_p import head_gradient
from data.parts.positions import rope_inv_freq
from data.training.optimizer import init_weights
from model import LM, positions_and_mask


def close(ours, reference, bound=1e-5):
    """No logit differs by more than `bound` of the largest; everywhere the same token follows."""
    worst = float((ours - reference).abs().max())
    assert worst <= bound * float(reference.abs().max())
    assert torch.equal(ours.argmax(-1), reference.argmax(-1))


def decode(lm, ids, documents=None, pieces=(1,)):
    """Logits (B, T, V) as decoding computes them: through the cache, in pieces of these lengths.

    The last length is repeated.
    """
    cache = KVCache()
    logits = []
    start = 0
    while start < ids.shape[1]:
        length = pieces[min(len(logits), len(pieces) - 1)]
        part = slice(start, start + length)
        some = None if documents is None else documents[:, part]
        states = lm.read(ids[:, part], some, cache)
        logits.append(lm.logits(states.hidden))
        start = part.stop
    return torch.cat(logits, dim=1)


# --- the same logits in any pieces of the text ----------------------------------------------------

@pytest.mark.parametrize("pieces", [(1,), (7, 1), (5, 3, 1, 4)])
@torch.no_grad()
def test_cached_equals_uncached(family, pieces):
    lm = make_lm(family)
    ids = make_ids(3, 40)
    close(decode(lm, ids, pieces=pieces), lm(ids))


@torch.no_grad()
def test_a_left_padded_batch_equals_each_prompt_alone(family):
    """Prefill and five cached tokens; the tokens of the padding are random."""
    lm = make_lm(family)
    ids = make_ids(4, 17)
    padding = (0, 3, 7, 11)
    documents = torch.ones_like(ids)
    for row, length in enumerate(padding):
        documents[row, :length] = 0
    whole = lm(ids, documents)
    cached = decode(lm, ids, documents, pieces=(12, 1))
    for row, length in enumerate(padding):
        alone = lm(ids[row:row + 1, length:])[0]
        close(whole[row, length:], alone)
        close(cached[row, length:], alone)


@torch.no_grad()
def test_packed_examples_do_not_attend_to_each_other(family):
    lm = make_lm(family)
    ids = make_ids(2, 16)
    documents = torch.tensor([[0] * 2 + [1] * 6 + [2] * 8] * 2)
    packed = lm(ids, documents)
    close(packed[:, 2:8], lm(ids[:, 2:8]))
    close(packed[:, 8:], lm(ids[:, 8:]))
    changed = torch.where(documents == 1, (ids + 1) % 258, ids)
    assert torch.equal(lm(changed, documents)[:, 8:], packed[:, 8:])
    # without documents they attend to each other
    assert float((lm(ids)[:, 8:] - packed[:, 8:]).abs().max()) > 0.1


@pytest.mark.parametrize("pieces", [(1,), (3, 1), (7, 2)])
@torch.no_grad()
def test_packed_examples_may_be_read_in_pieces(family, pieces):
    """Also where a piece ends inside a document, and with other borders in every row."""
    lm = make_lm(family)
    ids = make_ids(2, 16)
    documents = torch.tensor([[0] * 2 + [1] * 6 + [2] * 8, [1] * 5 + [2] * 2 + [3] * 9])
    found = decode(lm, ids, documents, pieces)
    close(found[documents > 0], lm(ids, documents)[documents > 0])


@torch.no_grad()
def test_a_token_changes_no_logits_before_it(family):
    lm = make_lm(family)
    ids = make_ids(2, 12)
    before = lm(ids)
    for k in range(12):
        changed = ids.clone()
        changed[:, k] = (ids[:, k] + 1) % 258
        differs = (lm(changed) != before).any(dim=-1)
        assert not differs[:, :k].any()
        assert differs[:, k:].all()


@torch.no_grad()
def test_a_cache_goes_on_with_some_of_its_rows(family):
    lm = make_lm(family)
    ids = make_ids(3, 10)
    documents = torch.ones(3, 10, dtype=torch.long)
    documents[1, :4] = 0
    rows = torch.tensor([2, 1])
    whole = lm(ids, documents)
    cache = KVCache()
    states = lm.read(ids[:, :8], documents[:, :8], cache).last()
    close(lm.logits(states.hidden), whole[:, 7:8])
    close(lm.logits(states.rows(rows).hidden), whole[rows, 7:8])
    cache.keep(rows)
    states = lm.read(ids[rows, 8:9], documents[rows, 8:9], cache)
    close(lm.logits(states.hidden), whole[rows, 8:9])


# --- the cache ------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_growing_cache_changes_no_keys_and_values(monkeypatch):
    """Room for four tokens at first."""
    monkeypatch.setattr(kv_cache, "MIN_ROOM", 2)
    lm = make_lm()
    ids = make_ids(2, 21)
    cache = KVCache()
    rooms = []
    for k in range(21):
        states = lm.read(ids[:, k:k + 1], cache=cache)
        rooms.append(cache.keys[0].shape[2])
    assert cache.length == 21
    assert sorted(set(rooms)) == [4, 10, 22]
    whole = lm.read(ids)
    for layer in range(2):
        for ours, theirs in ((states.keys, whole.keys), (states.values, whole.values)):
            torch.testing.assert_close(ours[layer], theirs[layer], atol=1e-5, rtol=1e-4)


# --- the frozen states ----------------------------------------------------------------------------

def test_states_cannot_be_changed():
    states = make_lm().read(make_ids())
    for name in ("hidden", "keys", "values", "positions", "mask", "cos_sin"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(states, name, None)
    # nor can one layer be replaced
    assert isinstance(states.keys, tuple)
    assert isinstance(states.values, tuple)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_the_last_token_and_some_rows_of_states(family, packed):
    lm = make_lm(family)
    ids = make_ids(3, 8)
    documents = torch.tensor([[1] * 5 + [2] * 3, [1] * 2 + [2] * 6, [0] * 3 + [1] * 5])
    states = lm.read(ids, documents if packed else None)
    index = torch.tensor([2, 0, 2])
    for some in (states.last().rows(index), states.rows(index).last()):
        assert torch.equal(some.hidden, states.hidden[index, -1:])
        assert torch.equal(some.keys[1], states.keys[1][index])
        assert torch.equal(some.values[0], states.values[0][index])
        expected = states.positions.expand(3, 8)[index, -1:]
        assert torch.equal(some.positions.expand(3, 1), expected)
        if packed:
            assert torch.equal(some.mask, states.mask[index, :, -1:])
        else:
            # the same for all rows, so only one is stored
            assert some.mask is None
            assert len(some.positions) == 1
        if states.cos_sin is not None:
            expected = states.cos_sin.expand(3, -1, -1, -1)[index, :, -1:]
            assert torch.equal(some.cos_sin.expand(3, -1, -1, -1), expected)


DOCUMENTS = [0, 1, 1, 1, 2, 2]
POSITIONS = [0, 0, 1, 2, 0, 1]
MASK = [
    "x . . . . .",
    ". x . . . .",
    ". x x . . .",
    ". x x x . .",
    ". . . . x .",
    ". . . . x x",
]


def test_positions_and_mask_are_those_of_the_worked_example():
    text = " ".join(positions_and_mask.__doc__.split())
    for name, values in (("documents", DOCUMENTS), ("positions", POSITIONS)):
        assert f"{name} {' '.join(map(str, values))}" in text
    for row in MASK:
        assert row in positions_and_mask.__doc__
    documents = torch.tensor([DOCUMENTS])
    positions, mask = positions_and_mask(6, 0, documents, "cpu")
    assert positions.tolist() == [POSITIONS]
    assert mask[0, 0].tolist() == [[place == "x" for place in row.split()] for row in MASK]
    # the newest two tokens alone, as in decoding
    some_positions, some_mask = positions_and_mask(2, 4, documents, "cpu")
    assert torch.equal(some_positions, positions[:, 4:])
    assert torch.equal(some_mask, mask[:, :, 4:])


def test_without_documents_only_a_piece_in_the_middle_needs_a_mask():
    assert positions_and_mask(4, 0, None, "cpu")[1] is None
    assert positions_and_mask(1, 7, None, "cpu")[1] is None
    positions, mask = positions_and_mask(2, 3, None, "cpu")
    assert positions.tolist() == [[3, 4]]
    assert mask[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


def test_text_beyond_gpt2s_positions_is_refused_and_counted_without_its_padding():
    lm = make_lm(GPT2)
    message = "65 tokens are too long for this model; allowed: 64"
    with pytest.raises(ValueError, match=message):
        lm(make_ids(1, 65))
    with torch.no_grad():
        cache = KVCache()
        lm.read(make_ids(1, 64), cache=cache)
        with pytest.raises(ValueError, match=message):
            lm.read(make_ids(1, 1), cache=cache)
        documents = torch.tensor([[0] * 6 + [1] * 64])
        assert lm(make_ids(1, 70), documents).isfinite().all()


# --- log p ----------------------------------------------------------------------------------------

# all at once; five positions at a time: 5 + 5 + 5 + 5 + 4
@pytest.mark.parametrize("logits", [1 << 26, 5 * 258, 1])
def test_log_p_in_pieces_is_that_of_plain_autograd(family, logits, monkeypatch):
    """Values, and the gradients of hidden state, final norm and head, all weighted unevenly."""
    monkeypatch.setattr("data.parts.log_p.LOGITS", logits)
    lm = make_lm(family)
    ids = make_ids(2, 12)
    targets = make_ids(2, 12, seed=1).flatten()
    weights = torch.rand(24, generator=generator(2))
    hidden = lm.read(ids).hidden.detach().flatten(0, 1).requires_grad_()
    inputs = [hidden, lm.head.weight, lm.ln_f.weight]
    expected = -F.cross_entropy(lm.logits(hidden), targets, reduction="none")
    found = lm.log_p(hidden, targets)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    theirs = torch.autograd.grad((weights * expected).sum(), inputs)
    ours = torch.autograd.grad((weights * found).sum(), inputs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trained", ["hidden", "head"])
def test_log_p_where_only_one_of_the_two_is_trained(trained, monkeypatch):
    monkeypatch.setattr("data.parts.log_p.LOGITS", 5 * 258)
    lm = make_lm().requires_grad_(False)
    hidden = torch.randn(24, 32, generator=generator())
    targets = make_ids(1, 24)[0]
    one = hidden if trained == "hidden" else lm.head.weight
    one.requires_grad_()
    expected, = torch.autograd.grad(-F.cross_entropy(lm.logits(hidden), targets), one)
    found, = torch.autograd.grad(lm.log_p(hidden, targets).mean(), one)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_log_p_of_a_bfloat16_model_is_float32():
    lm = make_lm().bfloat16()
    hidden = torch.randn(24, 32, dtype=torch.bfloat16, requires_grad=True)
    targets = make_ids(1, 24)[0]
    found = lm.log_p(hidden, targets)
    assert found.dtype == torch.float32
    # the logits have eight bits; their sum of exponentials has not
    expected = -F.cross_entropy(lm.logits(hidden).float(), targets, reduction="none")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.fixture
def sizes(monkeypatch):
    """The number of rows of every product with the head, in their order."""
    sizes = []
    plain = F.linear

    def counted(x, *rest):
        sizes.append(len(x))
        return plain(x, *rest)

    monkeypatch.setattr(F, "linear", counted)
    return sizes


def test_no_piece_holds_more_logits_than_allowed(monkeypatch, sizes):
    monkeypatch.setattr("data.parts.log_p.LOGITS", 5 * 258)
    make_lm().log_p(torch.randn(24, 32), torch.arange(24))
    assert sizes == [5, 5, 5, 5, 4]


def test_of_one_piece_the_logits_are_made_once_and_the_gradient_is_the_same(sizes):
    lm = make_lm()
    hidden, targets = torch.randn(24, 32), torch.arange(24)
    weights = torch.rand(24, generator=generator(2))
    (weights * lm.log_p(hidden, targets)).sum().backward()
    assert sizes == [24]
    again = head_gradient(weights[:, None], lm.ln_f(hidden), lm.head.weight, targets)
    assert sizes == [24, 24]
    assert torch.equal(lm.head.weight.grad, again)


# --- frequencies and fresh weights ----------------------------------------------------------------

def inv_freq(**changes):
    return rope_inv_freq(ModelConfig.from_hf({**LLAMA_SCALED, **changes}))


def test_llama3_scaling_leaves_fast_frequencies_and_slows_the_others():
    plain = inv_freq(rope_scaling=None)
    scaled = inv_freq()
    # periods in the original 32 positions; the limits are 1 and 4
    turns = 32 * plain / (2 * torch.pi)
    fast = turns > 4
    slow = turns < 1
    between = ~fast & ~slow
    assert fast.any() and slow.any() and between.any()
    assert torch.equal(scaled[fast], plain[fast])
    assert torch.allclose(scaled[slow], plain[slow] / 8)
    # linear in the number of periods between the limits
    part = (turns - 1) / 3
    expected = part * plain + (1 - part) * plain / 8
    assert torch.allclose(scaled[between], expected[between])


def test_newer_files_have_another_name_for_the_scaling():
    parameters = {**SCALING, "rope_theta": 10000.0}
    newer = inv_freq(rope_scaling=None, rope_theta=None, rope_parameters=parameters)
    assert torch.equal(newer, inv_freq())


def fresh_lm(config, seed):
    lm = LM(ModelConfig.from_hf(config))
    init_weights(lm, generator(seed))
    return lm


@torch.no_grad()
def test_initialisation_repeats_and_starts_near_the_uniform_distribution(family):
    lm = fresh_lm(family, 0)
    assert lm.fingerprint() == fresh_lm(family, 0).fingerprint()
    assert lm.fingerprint() != fresh_lm(family, 1).fingerprint()
    logits = lm(make_ids(4, 16)).flatten(0, 1)
    loss = F.cross_entropy(logits, make_ids(4, 16, seed=1).flatten())
    assert float(loss) == pytest.approx(math.log(258), abs=0.05)


@torch.no_grad()
def test_a_fresh_base_is_initialised_like_gpt2(family):
    """N(0, 0.02²), smaller by √(2L) where the residual stream is written to; norms 1, biases 0."""
    lm = fresh_lm({**family, "num_hidden_layers": 8, "n_layer": 8}, 0)
    residual = 0
    for name, p in lm.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        elif name.endswith((".o.weight", ".down.weight")):
            residual += 1
            assert float(p.std()) == pytest.approx(0.02 / 4, rel=0.15), name
        else:
            assert float(p.std()) == pytest.approx(0.02, rel=0.15), name
    assert residual == 2 * 8


# --- the textbook ---------------------------------------------------------------------------------

class Textbook:
    """The network by the textbook's formulas in float64, for one text.

    Head by head, and with rotations as products of complex numbers.
    """

    def __init__(self, lm):
        self.config = lm.config
        self.learned = lm.config.model_type == "gpt2"
        self.w = {name: p.double() for name, p in lm.named_parameters()}

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def norm(self, x, name):
        if self.learned:
            x = x - x.mean(-1, keepdim=True)
        size = (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        return self.w[f"{name}.weight"] * x / size + self.w.get(f"{name}.bias", 0)

    def rotated(self, x):
        """(T, heads·D) -> complex (T, heads, D/2), rotated unless positions are learned."""
        width = self.config.head_dim
        x = x.unflatten(-1, (-1, 2, width // 2))
        pairs = torch.complex(x[:, :, 0], x[:, :, 1])
        if self.learned:
            return pairs
        exponents = -torch.arange(0, width, 2).double() / width
        angles = torch.arange(len(x))[:, None] * self.config.rope["rope_theta"] ** exponents
        return pairs * torch.polar(torch.ones_like(angles), angles)[:, None]

    def attention(self, n, block):
        c = self.config
        later = torch.ones(len(n), len(n)).triu(1) > 0
        q = self.rotated(self.linear(n, f"{block}.q"))
        k = self.rotated(self.linear(n, f"{block}.k"))
        v = self.linear(n, f"{block}.v").unflatten(-1, (-1, c.head_dim))
        found = []
        for head in range(c.heads):
            group = head // (c.heads // c.kv_heads)
            # Re(q·k̄) is the real dot product
            scores = (q[:, head] @ k[:, group].conj().T).real / math.sqrt(c.head_dim)
            p = scores.masked_fill(later, -torch.inf).softmax(-1)
            found.append(p @ v[:, group])
        return self.linear(torch.cat(found, -1), f"{block}.o")

    def mlp(self, n, block):
        up = self.linear(n, f"{block}.mlp.up")
        if self.learned:
            inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up ** 3)
            h = 0.5 * up * (1 + inner.tanh())
        else:
            h = F.silu(self.linear(n, f"{block}.mlp.gate")) * up
        return self.linear(h, f"{block}.mlp.down")

    def logits(self, ids):
        x = self.w["embed.weight"][ids]
        if self.learned:
            x = x + self.w["embed_positions.weight"][:len(ids)]
        for i in range(self.config.layers):
            block = f"blocks.{i}"
            x = x + self.attention(self.norm(x, f"{block}.norm_attn"), block)
            x = x + self.mlp(self.norm(x, f"{block}.norm_mlp"), block)
        head = self.w.get("head.weight", self.w["embed.weight"])
        return self.norm(x, "ln_f") @ head.T


@pytest.mark.parametrize("config", [LLAMA, QWEN, GPT2], ids=["llama", "qwen2", "gpt2"])
@torch.no_grad()
def test_logits_follow_the_textbook(config):
    lm = make_lm(config)
    ids = make_ids(1, 40)[0]
    close(lm(ids[None])[0], Textbook(lm).logits(ids).float())
