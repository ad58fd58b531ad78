"""Shared by the tests: a clean environment, small random models of every family, comparisons."""

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The user's settings of hubs, caches, proxies and languages must not reach the tests.
for name in list(os.environ):
    if name.startswith(("HF_", "NANOL2D_CACHE", "LC_", "LANG")) or name.lower().endswith("_proxy"):
        del os.environ[name]
# also for every process that a test starts; on small matrices more threads only wait
os.environ.update(LC_ALL="C.UTF-8", PYTHONUTF8="1", OMP_NUM_THREADS="1")

from data.checkpoints.families import ModelConfig  # noqa: E402
from data.parts.draws import RowDraws  # noqa: E402
from data.training.batches import Batch, find_targets  # noqa: E402
from data.training.evaluations import draw  # noqa: E402
from diffusion import L2D, L2DConfig  # noqa: E402
from model import LM  # noqa: E402

torch.set_num_threads(1)

LLAMA = {
    "model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": True,
}
QWEN = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": False, "rope_theta": 1e6}
GPT2 = {
    "model_type": "gpt2", "vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA_SCALED = {**LLAMA, "head_dim": 16, "tie_word_embeddings": False, "rope_scaling": SCALING}
FAMILIES = {"llama": LLAMA, "llama_scaled": LLAMA_SCALED, "qwen2": QWEN, "gpt2": GPT2}
# token ids, of different lengths
PROMPTS = [[5, 17, 200, 3], [9], [42, 43, 44, 45, 46, 47, 48], [100, 9]]


def make_lm(config=LLAMA, seed=0) -> LM:
    """Random weights so large that every part matters, biases and norms included."""
    lm = LM(ModelConfig.from_hf(config))
    g = generator(seed)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            is_norm = ("norm" in name or "ln_f" in name) and name.endswith("weight")
            if is_norm:
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_((0.5 if "embed" in name else 0.2) * noise)
    return lm.eval()


def make_l2d(config=LLAMA, seed=0, perturb=0.2, **options) -> L2D:
    """A path whose every tensor is moved from its start by `perturb`: it changes the logits."""
    torch.manual_seed(seed)
    options = {"width": 16, "cond_dim": 24, "rank": 4, **options}
    if {"own_kv", "self_kv", "self_conditioning"} & set(options):
        # the paper's start has none of them
        options["start"] = "frozen"
    l2d = L2D(make_lm(config, seed), L2DConfig(**options))
    g = generator(seed + 1)
    with torch.no_grad():
        for p in l2d.path_parameters().values():
            p += perturb * torch.randn(p.shape, generator=g)
    return l2d.eval()


def make_ids(batch=3, length=10, seed=0, vocab=258):
    return torch.randint(vocab, (batch, length), generator=generator(seed))


def make_batch(ids, next_ids, class_ids=None, documents=None, t=None, noise=None):
    """A batch for an objective; t (B, T) and noise (B, T, Z) where they are not drawn."""
    if class_ids is not None:
        class_ids = class_ids[:, None].expand_as(next_ids)
    targets = find_targets(next_ids, class_ids)
    if t is not None:
        targets = replace(targets, t=t[targets.index], noise=noise[targets.index])
    return Batch(ids, documents, targets)


def drawn(l2d, batch, generators, unroll=0, hide=True):
    """A batch with all that is random in it, as train.py makes one; unroll 0: the paper's."""
    return draw(l2d.config, batch, RowDraws.of(batch.targets.index[0], generators), unroll, hide)


def path_logits(l2d, ids, x_t, t, class_ids=None):
    """f(x_t, t, c), (B, T, V), at every position: x_t (B, T, Z), t (B, T), class_ids (B,)."""
    if class_ids is not None:
        class_ids = class_ids[:, None].expand_as(ids)
    modulation = l2d.modulation(t, class_ids)
    return l2d.lm.logits(l2d.last_hidden(x_t, t, modulation, l2d.read(ids)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generators(count, seed=0):
    return [generator(seed + i) for i in range(count)]


def p_value(counts, p) -> float:
    """Of Pearson's χ² test that `counts` were drawn from the distribution p."""
    expected = p.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    half_freedom = torch.tensor((len(p) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, statistic / 2))


def assert_same(found: dict, expected: dict):
    """The same tensors under the same names, to the bit."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def exit_status(main, argv) -> int:
    """The exit status of a command."""
    try:
        main(argv)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def save_base(directory: Path) -> Path:
    """A small random model with the embedded tokenizer."""
    make_lm().save_pretrained(directory)
    for path in (ROOT / "data" / "tiny").glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory


@pytest.fixture
def shared() -> Path:
    """The folder of published data that is no part of the project."""
    if "NANOL2D_SHARED" not in os.environ:
        pytest.skip("NANOL2D_SHARED is not set")
    return Path(os.environ["NANOL2D_SHARED"])


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_ctrl_c():
    """Training handles the signal itself; afterwards the default handler is back."""
    # a shell that starts the tests in the background ignores it, and the tests inherit that
    handler = signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    yield
    signal.signal(signal.SIGINT, handler)
