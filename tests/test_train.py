"""train.py: resuming to the bit, the trained weights, batches, the log, Ctrl-C, refusals."""

import json
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import eval as evaluation
import sample
import train
from conftest import ROOT, assert_same, exit_status, generator, make_ids, make_lm
from data.checkpoints.hub import resolve
from data.checkpoints.state import out_of_patience, read_state
from data.flags.train import PRESETS
from data.parts.lora import LoRA
from data.results.records import read_lines
from data.tasks import TASKS
from data.text import chat
from data.training.batches import Losses, collate
from data.training.loader import Loader
from data.training.optimizer import EMA
from diffusion import L2D, L2DConfig
from model import LM

FLAGS = {
    "batch_size": 4, "accumulate": 1, "width": 8, "cond_dim": 8, "rank": 2, "updates": 6,
    "warmup": 2, "lr": 0.01, "eval_every": 100, "val_rows": 8, "report": 0, "device": "cpu",
    "dtype": "float32",
}
OF_A_PATH = ("width", "cond_dim", "dtype")


def flags(**changes):
    """As words; other methods than l2d do without the flags of a path."""
    values = {**FLAGS, **changes}
    method = changes.get("method", "l2d")
    idle = () if method == "l2d" else OF_A_PATH
    if method in ("full", "pretrain"):
        idle += ("rank",)
    return [f"--{name}={value}" for name, value in values.items() if name not in idle]


def run(base, out, **changes):
    """Train from `base`; returns the result of train()."""
    return train.train(train.parse([f"--init_from={base}", f"--out_dir={out}", *flags(**changes)]))


def resume(out, *words):
    train.main(["--init_from=resume", f"--out_dir={out}", *words])


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def updates(out):
    """The log's entries of updates, without their time."""
    return [{key: value for key, value in entry.items() if key != "seconds"}
            for entry in log(out) if "loss" in entry]


def state(out, kind) -> dict:
    """Tensors of the saved state of one kind: weights, exp_avg, average; by parameter."""
    tensors = load_file(out / "state.safetensors")
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items()
            if name.startswith(f"{kind}/")}


def stop_after(monkeypatch, count, argv):
    """Train, with Ctrl-C during update number `count`."""
    update = train.one_update

    def interrupt_and_update(run, *args):
        if run.update == count - 1:
            signal.raise_signal(signal.SIGINT)
        return update(run, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(train, "one_update", interrupt_and_update)
        train.train(train.parse(argv))


# --- resuming -------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {"method": "l2d", "accumulate": 2},
    {"method": "pretrain"},
    {"method": "lora"},
    {"method": "full", "accumulate": 2},
    {"preset": "tiny", "objective": "refine", "ema": 0.9, "unroll": 4},
    {"preset": "tiny", "objective": "both", "ema": 0.9, "unroll": 4},
], ids=lambda options: options.get("method") or options["objective"])
def test_three_and_three_resumed_updates_equal_six_to_the_bit(options, base, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(base, whole, **options)
    stop_after(monkeypatch, 3, [f"--init_from={base}", f"--out_dir={parts}", *flags(**options)])
    assert len(updates(parts)) == 3
    resume(parts)
    (expected, meta), (found, again) = read_state(whole), read_state(parts)
    assert_same(found, expected)
    kinds = {"weights", "exp_avg", "exp_avg_sq", "step"}
    if "ema" in options:
        kinds.add("average")
    assert {name.split("/")[0] for name in expected} == kinds
    assert meta["update"] == 6
    assert meta["position"] == 24 * options.get("accumulate", 1)
    assert updates(parts) == updates(whole)
    assert [entry["update"] for entry in updates(whole)] == [1, 2, 3, 4, 5, 6]


def test_resuming_takes_the_flags_of_the_run_and_the_new_ones(base, tmp_path):
    out = tmp_path / "out"
    run(base, out, updates=2, seed=7, min_lr=0.002)
    args = train.parse(["--init_from=resume", f"--out_dir={out}", "--updates=3"])
    assert args.resume
    assert args.init_from == str(base)
    assert (args.updates, args.seed, args.min_lr, args.width) == (3, 7, 0.002, 8)
    train.train(args)
    assert [entry["update"] for entry in updates(out)] == [1, 2, 3]


@pytest.mark.skipif(not sys.platform.startswith("linux"),
                    reason="only Linux shows which files are mapped into memory")
def test_a_resumed_run_no_longer_maps_the_file_that_it_replaces(base, tmp_path, monkeypatch):
    """Windows replaces no file that is still mapped, so a resumed run could never save there."""
    out, mapped = tmp_path / "out", []
    run(base, out, updates=1)
    write = train.write_state

    def observe(*args):
        mapped.append(str(out) in Path("/proc/self/maps").read_text())
        write(*args)

    monkeypatch.setattr(train, "write_state", observe)
    resume(out, "--updates=2")
    assert mapped == [False]


def test_validation_changes_nothing_that_is_trained(base, tmp_path):
    for every in (1, 100):
        run(base, tmp_path / str(every), eval_every=every)
    often, once = (load_file(tmp_path / name / "state.safetensors") for name in ("1", "100"))
    assert_same(often, once)
    assert sum("val_loss" in entry for entry in log(tmp_path / "1")) == 7


# --- what is trained ------------------------------------------------------------------------------

def test_gradient_reaches_the_whole_path_within_five_updates_and_never_the_base(base, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    model = run(base, tmp_path / "out", updates=5)["model"]
    moments = state(tmp_path / "out", "exp_avg")
    assert moments.keys() == model.path_parameters().keys()
    assert [name for name, value in moments.items() if not value.any()] == []
    assert_same(dict(model.lm.named_parameters()), dict(make_lm().named_parameters()))
    for p in model.lm.parameters():
        assert p.grad is None
        assert not p.requires_grad
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("ema, kind", [(0, "weights"), (0.9, "average")])
def test_the_saved_path_has_the_last_weights_or_their_average(ema, kind, base, tmp_path):
    model = run(base, tmp_path / "out", preset="tiny", unroll=4, ema=ema)["model"]
    saved = L2D.load(tmp_path / "out", device="cpu").path_parameters()
    assert_same(saved, model.path_parameters())
    assert_same(saved, state(tmp_path / "out", kind))
    # the state has the weights themselves, with which a resumed run goes on
    last = state(tmp_path / "out", "weights")["to_z.weight"]
    assert torch.equal(saved["to_z.weight"], last) == (not ema)


def test_lora_trains_beside_the_base_and_is_merged_when_saved(base, tmp_path):
    before = (base / "model.safetensors").read_bytes()
    model = run(base, tmp_path / "out", method="lora")["model"]
    assert (base / "model.safetensors").read_bytes() == before
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed == [name for name in old if name.endswith("_proj.weight")]
    assert len(changed) == 14
    for name in changed:
        assert torch.linalg.matrix_rank(new[name] - old[name], rtol=1e-3) <= 2
    again = LM.from_pretrained(str(tmp_path / "out"), torch.float32, "cpu")
    assert torch.equal(again(make_ids()), model(make_ids()))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "lock", "log.jsonl", "model.safetensors", "state.safetensors",
        "tokenizer.model", "tokenizer_config.json"}


def test_a_lora_adds_its_product_unscaled_whatever_its_rank(base, tmp_path):
    words = [f"--init_from={base}", f"--out_dir={tmp_path / 'out'}", *flags(method="lora", rank=4)]
    model = train.set_up(train.parse(words)).model
    adapters = [module for module in model.modules() if isinstance(module, LoRA)]
    assert {(adapter.A.shape[1], adapter.scale) for adapter in adapters} == {(4, 1.0)}


def test_no_row_of_any_update_has_the_times_of_another(base, tmp_path):
    made = train.set_up(train.parse([f"--init_from={base}", f"--out_dir={tmp_path / 'out'}",
                                     *flags()]))
    times = torch.cat([batch.targets.t for update in range(4)
                       for batch in made.loader.update(update)])
    assert len(times.unique()) == len(times) > 20


@pytest.mark.parametrize("method, dtype", [("full", torch.float32), ("lora", torch.bfloat16)])
def test_weights_that_are_trained_themselves_are_float32(
    method, dtype, base, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "pick_device",
                        lambda device, dtype: ("cpu", dtype or torch.bfloat16))
    words = [f"--init_from={base}", f"--out_dir={tmp_path / 'out'}", *flags(method=method)]
    assert train.set_up(train.parse(words)).model.embed.weight.dtype == dtype


def test_a_class_is_hidden_in_training_and_never_in_the_validation(base, tmp_path):
    made = train.set_up(train.parse([f"--init_from={base}", f"--out_dir={tmp_path / 'out'}",
                                     *flags()]))
    made.model.config.class_dropout = 1.0
    hidden = made.model.config.classes
    for batches, all_of_them in ((made.loader.update(0), True),
                                 (made.loader.validation(made.val, 4), False)):
        for batch in batches:
            assert bool((batch.targets.class_ids == hidden).all()) == all_of_them
            assert bool((batch.targets.class_ids == hidden).any()) == all_of_them


@torch.no_grad()
def test_a_merged_model_equals_the_adapted_one(family):
    lm, ids = make_lm(family), make_ids()
    plain = lm(ids)
    train.replace_linears(lm, nn.Linear, lambda linear: LoRA(linear, 4, alpha=8.0))
    # B starts at zero
    assert torch.equal(lm(ids), plain)
    adapters = [module for module in lm.modules() if isinstance(module, LoRA)]
    assert len(adapters) == 2 * (6 if lm.config.model_type == "gpt2" else 7)
    for i, adapter in enumerate(adapters):
        adapter.B.normal_(std=0.1, generator=generator(i))
    adapted = lm(ids)
    train.replace_linears(lm, LoRA, train.merge_linear)
    assert not any(isinstance(module, LoRA) for module in lm.modules())
    assert float((adapted - plain).abs().max()) > 0.1
    assert float((lm(ids) - adapted).abs().max()) <= 1e-5 * float(adapted.abs().max())


def test_a_correction_is_merged_in_float32():
    lm = make_lm().to(torch.bfloat16)
    train.replace_linears(lm, nn.Linear, lambda linear: LoRA(linear, 4, alpha=4.0))
    train.replace_linears(lm, LoRA, train.merge_linear)
    assert lm.blocks[0].q.weight.dtype == torch.float32


@pytest.mark.parametrize("method", ["full", "pretrain"])
def test_full_training_changes_every_weight(method, base, tmp_path):
    run(base, tmp_path / "out", method=method)
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert not any(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("method", ["l2d", "lora", "full"])
def test_one_batch_is_learned_by_heart(method, base):
    """Sixty updates on the same rows, times and noise leave a twentieth of the loss.

    Measured: a five-hundredth and less.
    """
    shape = {"rank": 8, "width": 16, "cond_dim": 32}
    args = train.parse([f"--init_from={base}", *flags(method=method, **shape)])
    model, _ = train.build_model(args, None, (), None)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = train.build_optimizer(trainable, 0.02, 0.0)
    batch, = loader(rows(4, 12), model).update(0)
    losses = []
    for _ in range(60):
        loss = train.token_losses(model, batch).values.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 20


# --- optimizer and schedule -----------------------------------------------------------------------

def test_two_batches_of_four_teach_the_same_as_one_of_eight(base, tmp_path):
    """Every token weighs the same. Rows differ in length, so a mean of means would not do.

    After one update the first moment is a tenth of the gradient.
    """
    for size, accumulate in ((8, 1), (4, 2), (1, 8)):
        model = run(base, tmp_path / str(size), method="full", batch_size=size,
                    accumulate=accumulate, updates=1, clip=1e9)["model"]
        assert all(p.grad is None for p in model.parameters())
    expected, (one,) = state(tmp_path / "8", "exp_avg"), updates(tmp_path / "8")
    for size in ("4", "1"):
        found, (other,) = state(tmp_path / size, "exp_avg"), updates(tmp_path / size)
        for name, moment in expected.items():
            worst = float((found[name] - moment).abs().max())
            assert worst <= 1e-5 * float(moment.abs().max()), name
        assert other["tokens"] == one["tokens"]
        assert other["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert other["norm"] == pytest.approx(one["norm"], rel=1e-4)


@pytest.mark.parametrize("clip", [0, 1])
def test_a_gradient_that_is_not_finite_is_no_step(clip):
    """The derivative of √p is infinite at 0, where its value is 0."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = train.build_optimizer({"blocks.p": p}, 0.1, 0.0)
    batch, = [collate([([1, 2], [0, 1], [1, 1])])]

    def objective(model, batch):
        return Losses(p.sqrt(), p.sqrt(), None)

    with pytest.raises(FloatingPointError, match="the loss is 0, the norm of its gradient inf"):
        train.update_once(None, optimizer, [batch], objective, clip)
    assert p.item() == 0


def test_the_gradient_is_clipped(base, tmp_path):
    run(base, tmp_path / "out", method="full", updates=1, clip=0.5)
    moments = [moment.flatten() for moment in state(tmp_path / "out", "exp_avg").values()]
    # the norm in the log is that before clipping
    assert updates(tmp_path / "out")[0]["norm"] > 1
    # 1 − β₁ = 0.1
    assert float(torch.cat(moments).norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_new_layers_learn_at_a_share_of_the_rate_and_are_clipped_on_their_own(base, tmp_path):
    words = ["--start=frozen", "--own_kv", "--new_lr=0.25", "--rank=4", "--ema=0"]
    words += flags(updates=1, clip=1e-3, warmup=0, lr=0.01)
    train.train(train.parse([f"--init_from={base}", f"--out_dir={tmp_path / 'out'}", *words]))
    moments = state(tmp_path / "out", "exp_avg")
    adapted = {name for name in moments if name.endswith((".A", ".B"))}
    assert adapted and adapted < moments.keys()
    for names in (adapted, moments.keys() - adapted):
        norm = torch.cat([moments[name].flatten() for name in names]).norm()
        # 1 − β₁ = 0.1
        assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-3)
    # the first step of AdamW is the rate itself, where there is a gradient
    path = load_file(tmp_path / "out" / "path.safetensors")
    assert float(path["blocks.0.q.B"].abs().max()) == pytest.approx(0.01, rel=1e-2)
    assert float(path["from_z.2.weight"].abs().max()) == pytest.approx(0.0025, rel=1e-2)


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_learning_rate_rises_and_falls_in_straight_lines(warmup):
    rates = [train.learning_rate(update, 10, warmup, 1.0, 0.1) for update in range(11)]
    assert rates[:warmup] == [(i + 1) / warmup for i in range(warmup)]
    assert rates[warmup] == 1.0
    assert rates[10] == pytest.approx(0.1)
    falls = [a - b for a, b in zip(rates[warmup:], rates[warmup + 1:])]
    assert falls == pytest.approx([0.9 / (10 - warmup)] * len(falls))


def test_matrices_decay_and_biases_and_norms_do_not():
    l2d = L2D(make_lm(), L2DConfig(8, 8, rank=2, classes=5))
    everything = {**l2d.path_parameters(), **dict(make_lm().named_parameters())}
    optimizer = train.build_optimizer(everything, 0.1, 0.5)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    before = {name: p.detach().clone() for name, p in everything.items()}
    for p in everything.values():
        p.requires_grad_().grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in everything.items():
        vector = name.endswith("bias") or "norm" in name or "ln_f" in name
        assert torch.allclose(p, before[name] * (1 if vector else 0.95), atol=1e-7), name


# --- batches --------------------------------------------------------------------------------------

def rows(count, length, spread=5):
    """Rows (ids, mask, documents) of different lengths; the first token is the row's number.

    The first third is the prompt.
    """
    result = []
    for i in range(count):
        size = length - i % spread
        ids = [i, *make_ids(1, size - 1, seed=i)[0].tolist()]
        mask = (torch.arange(size) >= size // 3).long()
        result.append((ids, mask, torch.ones(size, dtype=torch.long)))
    return result


def loader(data, model=None, batch_size=4, accumulate=1, seed=5):
    """As train.py makes one for data of one's own."""
    draw = None
    if isinstance(model, L2D):
        def draw(batch, draws, update):
            return train.draw(model.config, batch, draws)
    return Loader(data, batch_size * accumulate, batch_size, seed, "cpu", draw, ahead=9)


def row_numbers(data, update, seed=5):
    """The numbers of the rows in the two batches of an update."""
    batches = loader(data, batch_size=3, accumulate=2, seed=seed).update(update)
    assert [len(batch.ids) for batch in batches] == [3, 3]
    return [row for batch in batches for row in batch.ids[:, 0].tolist()]


def test_every_row_comes_once_an_epoch_and_in_another_order_in_the_next():
    # of one length, so that they stay in the order they are drawn in
    data = rows(10, 12, spread=1)
    seen = [row for update in range(5) for row in row_numbers(data, update)]
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(10)) not in epochs
    # the rows of an update depend on its number and the seed alone
    assert row_numbers(data, 3) == seen[18:24]
    assert row_numbers(data, 0) == seen[0:6]
    assert row_numbers(data, 0, seed=6) != seen[0:6]


def test_a_batch_made_ahead_equals_one_made_when_needed():
    data, l2d = rows(10, 12), L2D(make_lm(), L2DConfig(8, 8, rank=2))
    ahead = loader(data, l2d)
    for update in (0, 1, 2, 7, 8):
        (batch,), (alone,) = ahead.update(update), loader(data, l2d).update(update)
        assert torch.equal(batch.ids, alone.ids)
        assert torch.equal(batch.targets.noise, alone.targets.noise)
    assert not ahead.coming


def test_rows_of_like_length_come_together():
    batches = loader(rows(6, 12, spread=6), batch_size=2, accumulate=3).update(0)
    assert [batch.ids.shape[1] for batch in batches] == [7, 9, 11]
    assert sorted(row for batch in batches for row in batch.ids[:, 0].tolist()) == list(range(6))


def test_targets_are_the_next_tokens_of_the_response():
    batch = collate([([7, 8, 9, 10], [0, 0, 1, 1], [1, 1, 1, 1], 3), ([5, 6], [0, 1], [1, 1], 0)])
    assert batch.ids.tolist() == [[7, 8, 9], [5, 6, 0]]
    assert batch.documents is None
    targets = batch.targets
    assert [place.tolist() for place in targets.index] == [[0, 0, 1], [1, 2, 0]]
    assert targets.y.tolist() == [9, 10, 6]
    assert targets.class_ids.tolist() == [3, 3, 0]
    assert targets.again is None
    # or a class for every token
    batch = collate([([7, 8, 9, 10], [0, 1, 0, 1], [1, 1, 2, 2], [5, 6, 7, 8]),
                     ([5, 6], [0, 1], [1, 1], [1, 2])])
    assert batch.targets.class_ids.tolist() == [6, 8, 2]


def test_packed_rows_keep_their_documents():
    batch = collate(
        [([1, 2, 3, 4, 5], [0, 1, 0, 1, 1], [1, 1, 2, 2, 2]), ([1, 2, 3], [0, 1, 1], [1, 1, 1])])
    assert batch.documents.numbers.tolist() == [[1, 1, 2, 2], [1, 1, 1, 0]]
    assert batch.documents.borders == (0, 2, 4, 7, 8)
    assert [place.tolist() for place in batch.targets.index] == [[0, 0, 0, 1, 1], [0, 2, 3, 0, 1]]
    assert batch.targets.y.tolist() == [2, 4, 5, 2, 3]
    assert batch.targets.class_ids is None


@torch.no_grad()
def test_padding_and_neighbours_change_no_loss():
    lm, (a, b, c) = make_lm(), rows(3, 9)

    def losses(*some):
        return train.token_losses(lm, collate(some)).values

    packed = [torch.cat([torch.as_tensor(part) for part in parts]) for parts in zip(a[:2], b[:2])]
    documents = torch.tensor([1] * len(a[0]) + [2] * len(b[0]))
    alone = [losses(row) for row in (a, b, c)]
    ids = torch.tensor(a[0])
    counted = len(ids) - len(ids) // 3
    logits = lm(ids[None])[0, -counted - 1:-1]
    by_hand = F.cross_entropy(logits, ids[-counted:], reduction="none")
    assert torch.allclose(alone[0], by_hand, atol=1e-5)
    for found in (losses(a, b, c), losses((*packed, documents), c)):
        assert torch.allclose(found, torch.cat(alone), atol=1e-5)


# --- reports --------------------------------------------------------------------------------------

def validated(model, data, count=100, ema=None):
    """train.validate of a model without any training."""
    args = Namespace(val_rows=count, backprop=0)
    return train.validate(SimpleNamespace(
        args=args, model=model, val=data, loader=loader([], model), unroll_at=lambda update: 0,
        ema=ema or EMA({}, 0.0), update=0, history=[]))


def test_validation_reports_the_mean_loss_of_every_tenth_of_t(monkeypatch):
    """Losses made of t itself: 10·t in the first batch, and 1 more in the second.

    t = 1 belongs to the last tenth; the losses are those of the last evaluations, by the average.
    """
    times, calls = (torch.arange(20) + 0.5) / 20, []
    times[-1] = 1.0

    def losses(model, batch, backprop):
        calls.append((len(batch.ids), model.training, model.weight.item()))
        last = 10 * times + len(calls) - 1
        return Losses(last + 5, last, times)

    monkeypatch.setattr(train, "token_losses", losses)
    model = nn.Linear(1, 1)
    ema = EMA(dict(model.named_parameters()), 0.5)
    ema.tensors["weight"].fill_(7.0)
    result = validated(model, rows(9, 8), 7, ema)
    assert calls == [(4, False, 7.0), (3, False, 7.0)]
    assert model.training and model.weight.item() != 7.0
    assert result["by_tenth"] == pytest.approx([i + 1 for i in range(9)] + [10.125], abs=1e-3)
    assert result["val_loss"] == pytest.approx(float(10 * times.mean()) + 0.5, abs=1e-3)


@torch.no_grad()
def test_validation_is_the_plain_loss_of_a_language_model_and_repeats():
    lm, data = make_lm(), rows(9, 12)
    losses = [train.token_losses(lm, collate([row])).values for row in data]
    expected = pytest.approx(float(torch.cat(losses).mean()), abs=1e-3)
    assert validated(lm, data) == {"update": 0, "val_loss": expected}
    # a path before its training changes nothing
    l2d = L2D(lm, L2DConfig(8, 8, rank=2))
    first = validated(l2d, data)
    assert first == validated(l2d, data)
    assert first["val_loss"] == expected
    # the noise is the same for every seed of the training
    noises = [loader([], l2d, seed=seed).validation(data, 4)[0].targets.noise for seed in (1, 2)]
    assert torch.equal(*noises)


def test_the_log_has_flags_losses_and_rates_and_the_terminal_every_validation(
    base, tmp_path, capsys
):
    out = tmp_path / "out"
    result = run(base, out, eval_every=3, warmup=4)
    first, *entries = log(out)
    assert first["args"]["lr"] == 0.01
    assert first["args"]["seed"] == 42
    assert first["torch"] == torch.__version__
    assert [entry["loss"] for entry in updates(out)] == pytest.approx(result["losses"], abs=1e-5)
    rates = [entry["lr"] for entry in updates(out)]
    assert rates[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    for entry in updates(out):
        assert all(math.isfinite(entry[key]) for key in ("loss", "lr", "norm", "tokens"))
    validations = [entry for entry in entries if "val_loss" in entry]
    assert [entry["update"] for entry in validations] == [0, 3, 6]
    shown = capsys.readouterr().out
    for entry in validations:
        assert len(entry["by_tenth"]) == 10
        assert f"update      {entry['update']}/6" in shown
        assert f"val {entry['val_loss']:6.3f}" in shown


def test_the_plan_comes_before_and_the_pace_after_ten_updates(base, tmp_path, capsys):
    run(base, tmp_path / "out", updates=12)
    text = capsys.readouterr().out
    plan = text.index("preset topics: 12 updates of 4 rows, lr 0.01, validation every 100")
    assert plan < text.index("at the pace of the first 10 updates:")
    assert "min left" in text
    run(base, tmp_path / "short", updates=9)
    assert "at the pace" not in capsys.readouterr().out


# --- Ctrl-C and refusals --------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform == "win32",
                    reason="Windows cannot send Ctrl-C to one process alone")
def test_ctrl_c_saves_and_names_the_command_that_goes_on(base, tmp_path):
    out = tmp_path / "out"
    words = [f"--init_from={base}", f"--out_dir={out}", *flags(updates=100_000, eval_every=3)]
    with subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        # up to the line of the second validation; a process that fails ends its output
        for line in process.stdout:
            if line.startswith("update      3/"):
                process.send_signal(signal.SIGINT)
                break
        after = process.stdout.read()
    assert process.returncode == 130, after
    done = read_state(out)[1]["update"]
    assert len(updates(out)) == done >= 3
    assert "Traceback" not in after
    assert (f"stopped after update {done}; go on with: python train.py --init_from=resume "
            f"--out_dir={out}") in after
    resume(out, f"--updates={done + 2}")
    assert read_state(out)[1]["update"] == done + 2
    assert L2D.load(out, device="cpu")


def refused(capsys, *argv):
    """Exit status 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("train.py: "), lines
    return lines[0]


@pytest.mark.parametrize("argv, message", [
    (["--method=lora", "--init_from=scratch"],
     "--method lora needs a pretrained model; allowed with --init_from=scratch: pretrain"),
    (["--init_from=gpt3"], "unknown model 'gpt3': give an existing directory, tiny, or one of"),
    (["--init_from=resume"], "state.safetensors does not exist, so there is nothing to resume; "
                             "start one with train.py --out_dir="),
    (["--lr=-1"], "--lr = -1.0 is out of range; allowed: 0 or more"),
    (["--warmup=-5"], "--warmup = -5 is out of range; allowed: 0 or more"),
    (["--clip=-1"], "--clip = -1.0 is out of range; allowed: 0 or more"),
    (["--batch_size=0"], "--batch_size = 0 is out of range; allowed: 1 or more"),
    (["--rank=0"], "--rank = 0 is out of range; allowed: 1 or more"),
    (["--unroll=0"], "--unroll = 0 is out of range; allowed: 1 or more"),
    (["--backprop=0"], "--backprop = 0 is out of range; allowed: 1 or more"),
    (["--ema=1"], "--ema = 1.0 is out of range; allowed: 0 to 1, without 1"),
    (["--warmup=1" + "0" * 400], "is out of range; allowed: 0 to 1000000000"),
    (["--batch_size=1000", "--accumulate=1000"],
     "--batch_size times --accumulate = 1000000 is out of range; allowed: 1 to 65536"),
    (["--unroll=9999"], "--unroll = 9999 is out of range; allowed: 0 to 1000"),
    (["--clip=1e-9"], "--clip = 1e-09 would leave nothing of the gradient"),
    (["--device=gpu"], "gpu"),
])
def test_bad_flags_are_refused_in_one_line(argv, message, capsys, tmp_path):
    assert message in refused(capsys, "--updates=0", *argv, f"--out_dir={tmp_path / 'out'}")
    assert list(tmp_path.iterdir()) == []


def test_missing_data_and_missing_tokenizer_are_refused_in_one_line(base, capsys, tmp_path):
    out = f"--out_dir={tmp_path / 'out'}"
    message = refused(capsys, f"--init_from={base}", f"--data={tmp_path / 'none'}", out)
    assert "no token file" in message
    assert "python -m data.text.chat" in message
    (base / "tokenizer.model").unlink()
    assert str(base) in refused(capsys, f"--init_from={base}", out)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_training_state_is_refused_in_one_line(capsys, tmp_path):
    path = tmp_path / "state.safetensors"
    words = ["--init_from=resume", f"--out_dir={tmp_path}"]
    save_file({"weights/a": torch.ones(2)}, path)
    assert "is not a training state of this project and version" in refused(capsys, *words)
    path.write_bytes(b"{}")
    assert "is truncated or not a safetensors file" in refused(capsys, *words)


def test_resuming_another_training_or_on_another_base_is_refused(base, capsys, tmp_path):
    out = tmp_path / "out"
    run(base, out, updates=1)
    words = ["--init_from=resume", f"--out_dir={out}"]
    before = (out / "state.safetensors").read_bytes()
    assert "--updates 0 are fewer than the 1 that" in refused(capsys, *words, "--updates=0")
    for flag in ("--width=16", "--method=full", "--rank=4"):
        assert "cannot be changed in a run that goes on" in refused(capsys, *words, flag)
    make_lm(seed=1).save_pretrained(base)
    assert str(base) in refused(capsys, *words, "--updates=2")
    assert (out / "state.safetensors").read_bytes() == before


def test_data_without_validation_rows_is_refused_in_one_line(base, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda *_: (rows(8, 12), []))
    assert "has no validation rows" in refused(
        capsys, f"--init_from={base}", f"--out_dir={tmp_path / 'out'}", *flags())


def test_a_compiler_that_does_not_work_is_one_line(base, tmp_path, capsys, monkeypatch):
    def fails(*args, **options):
        raise torch._dynamo.exc.TorchDynamoException("no compiler here\nand more")

    monkeypatch.setattr(train.torch, "compile", lambda objective, **options: fails)
    message = refused(capsys, f"--init_from={base}", f"--out_dir={tmp_path / 'out'}", "--compile",
                      *flags(updates=1))
    assert message == "train.py: --compile does not work here (no compiler here); go without it"


# --- presets, when to stop, what to save, a plan --------------------------------------------------

@pytest.mark.parametrize("flags, preset, updates", [
    ([], "tiny", 2800),
    (["--objective=paper"], "tiny_paper", 2700),
    (["--init_from=scratch", "--method=pretrain"], "scratch", 3600),
    (["--init_from=gpt2"], "topics", 1000),
    (["--init_from=gpt2", "--start=paper"], "topics_paper", 1000),
    (["--init_from=gpt2", "--data=somewhere"], "data", 27_900),
    (["--init_from=gpt2", "--data=somewhere", "--start=paper"], "paper", 27_900),
    (["--init_from=gpt2", "--data=somewhere", "--method=full"], "paper", 27_900),
    (["--init_from=tiny", "--data=somewhere"], "tiny", 2800),
    (["--init_from=gpt2", "--preset=paper", "--updates=5"], "paper", 5),
])
def test_the_preset_fits_model_and_data(flags, preset, updates):
    args = train.parse(flags)
    assert (args.preset, args.updates) == (preset, updates)
    assert args.lr == PRESETS[preset]["lr"]


@pytest.mark.parametrize("losses, patience, over", [
    ([3.0, 2.0, 1.0], 1, False),
    ([3.0, 1.0, 2.0], 1, True),
    ([3.0, 1.0, 2.0], 2, False),
    ([1.0, 3.0, 2.0], 2, True),
    ([1.0, 3.0, 2.0], 0, False),
    ([], 1, False),
])
def test_patience_counts_validations_since_the_best(losses, patience, over):
    history = [[10 * place, loss] for place, loss in enumerate(losses)]
    reason = out_of_patience(history, patience)
    assert bool(reason) == over
    if over:
        assert f"--patience={patience}: none of the last " in reason and "(1)" in reason


def test_a_run_without_progress_stops_early_says_so_and_stays_stopped(base, tmp_path, capsys):
    out = tmp_path / "out"
    # with a learning rate of zero no validation is better than the first
    run(base, out, updates=50, lr=0, eval_every=2, patience=3)
    meta = read_state(out)[1]
    assert meta["update"] == 6
    assert [update for update, _ in meta["history"]] == [0, 2, 4, 6]
    reason = " s; stopped early by --patience=3: none of the last 3 validations was better than "
    assert f"{reason}that after update 0 (" in capsys.readouterr().out
    resume(out)
    assert read_state(out)[1]["update"] == 6
    assert f"{reason}that after update 0 (" in capsys.readouterr().out
    # as many updates as were asked for are no early end
    resume(out, "--updates=6")
    assert "early" not in capsys.readouterr().out


def test_the_best_paths_are_saved_until_a_new_run_replaces_them(base, tmp_path):
    out = tmp_path / "out"
    run(base, out, updates=8, eval_every=2, keep=2)
    history = read_state(out)[1]["history"]
    best = sorted(history, key=lambda entry: entry[1])[:2]
    found = {path.name for path in out.glob("best-*")}
    assert found == {f"best-{update}" for update, _ in best}
    for name in found - {"best-0"}:
        assert L2D.load(out / name, device="cpu")
    train.main([f"--init_from={base}", f"--out_dir={out}", "--overwrite", *flags(updates=1)])
    assert not list(out.glob("best-*"))


def test_keep_and_overwrite_remove_what_the_state_lists_and_nothing_else(base, tmp_path):
    out = tmp_path / "out"
    run(base, out, updates=2, eval_every=1, keep=1)
    (kept, _), = [entry for entry in read_state(out)[1]["history"]
                  if (out / f"best-{entry[0]}").exists()]
    mine = [f"best-{kept}/notes.txt", "best-settings.txt", "best-3/notes.txt", "best-0-copy/a",
            "notes.part/a", "a.part", "frozen-train.bin"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    # a resumed run goes on with the list
    resume(out, "--updates=8")
    history = read_state(out)[1]["history"]
    best = min(history, key=lambda entry: entry[1])[0]
    assert best not in (kept, 3) and L2D.load(out / f"best-{best}", device="cpu")
    assert not (out / f"best-{kept}" / "path.json").exists()
    assert {(out / name).read_text() for name in mine} == {"mine"}
    train.main([f"--init_from={base}", f"--out_dir={out}", "--overwrite", *flags(updates=1)])
    assert not (out / f"best-{best}").exists()
    assert {(out / name).read_text() for name in mine} == {"mine"}


def test_a_run_killed_before_its_first_update_goes_on(base, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "one_update", kill)
        run(base, out)
    assert (out / "path.json").exists()
    resume(out)
    run(base, tmp_path / "whole")
    assert_same(state(out, "weights"), state(tmp_path / "whole", "weights"))


@pytest.mark.parametrize("method", ["l2d", "lora"])
def test_a_plan_trains_nothing_and_writes_nothing(method, base, tmp_path, capsys):
    out = tmp_path / "out"
    train.main([f"--init_from={base}", f"--out_dir={out}", "--plan", *flags(method=method)])
    shown = capsys.readouterr().out
    for words in ("trainable parameters", "MB frozen", "min in all"):
        assert words in shown
    assert not out.exists()


# --- cached states of the frozen model ------------------------------------------------------------

class Rows(list):
    """As data.text.tokens has them, with a fingerprint."""
    fingerprint = "rows"
    classes = ()

    @property
    def lengths(self):
        return np.array([len(row[0]) for row in self])

    @property
    def longest(self):
        return self.lengths.max()


@pytest.fixture
def packed_rows(monkeypatch):
    """Rows of two documents each, in place of data from a directory."""
    def packed(count, seed):
        found = Rows()
        for row, (ids, mask, _) in enumerate(rows(count, 14)):
            numbers = (torch.arange(len(ids)) > 4 + row % 3).long() + 1
            found.append(([seed, *ids[1:]], mask, numbers))
        return found

    monkeypatch.setattr(train, "load_data", lambda *_: (packed(8, 1), packed(4, 2)))


@pytest.mark.parametrize("more", [[], ["--start=frozen", "--objective=refine", "--own_kv", "--unroll=3"]])
def test_cached_states_teach_the_same_as_computed_ones(more, base, tmp_path, packed_rows):
    cached, computed = tmp_path / "cached", tmp_path / "computed"
    words = [f"--init_from={base}", "--data=rows", *flags(accumulate=2), *more]
    train.main([*words, f"--out_dir={computed}"])
    train.main([*words, f"--out_dir={cached}", "--cache_frozen"])
    for kind, error in (("loss", 2e-5), ("val_loss", 2e-4)):
        found, expected = ([entry[kind] for entry in log(out) if kind in entry]
                           for out in (cached, computed))
        assert len(found) > 1
        assert found == pytest.approx(expected, abs=error)
    first = updates(cached)
    # derived from other files, so removed at the end
    assert not list(cached.glob("frozen*"))
    # over an earlier run: the files made for the new one stay
    train.main([*words, f"--out_dir={cached}", "--cache_frozen", "--overwrite"])
    assert updates(cached) == first


def test_states_are_cached_when_a_run_stops_and_used_when_it_goes_on(
    base, tmp_path, packed_rows, monkeypatch, capsys
):
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = [f"--init_from={base}", "--data=rows", "--cache_frozen", *flags()]
    train.main([*words, f"--out_dir={whole}"])
    stop_after(monkeypatch, 3, [*words, f"--out_dir={out}"])
    train_file, val_file = (out / f"frozen-{split}.bin" for split in ("train", "val"))
    assert train_file.stat().st_size > val_file.stat().st_size > 0
    assert "caching the frozen model's states of" in capsys.readouterr().out
    resume(out)
    assert "caching" not in capsys.readouterr().out
    assert updates(out) == updates(whole)


@pytest.mark.parametrize("change", ["content", "config", "a full disk"])
def test_cached_states_of_something_else_are_made_again(
    change, base, tmp_path, packed_rows, monkeypatch, capsys
):
    out = tmp_path / "out"
    words = [f"--init_from={base}", "--data=rows", "--cache_frozen", *flags()]
    stop_after(monkeypatch, 3, [*words, f"--out_dir={out}"])
    if change == "content":
        (out / "frozen-val.bin").write_bytes(bytes((out / "frozen-val.bin").stat().st_size))
    else:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rope_theta": 300.0}))
    (out / "state.safetensors").unlink()
    capsys.readouterr()
    words += ["--overwrite", f"--out_dir={out}"]
    if change == "a full disk":
        def full(file, *_):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr("data.training.frozen.collate", full)
        line = refused(capsys, *words)
        assert line.endswith("frozen-train.bin (No space left on device); make room, or choose "
                             "another place")
        return
    train.main(words)
    assert capsys.readouterr().out.count("caching") == (1 if change == "content" else 2)
    train.main([*words[:2], *flags(), f"--out_dir={tmp_path / 'plain'}"])
    assert [entry["loss"] for entry in updates(out)] == pytest.approx(
        [entry["loss"] for entry in updates(tmp_path / "plain")], abs=2e-5)


def test_the_room_for_cached_states_is_planned_and_checked(
    base, tmp_path, packed_rows, monkeypatch, capsys
):
    out = f"--out_dir={tmp_path / 'out'}"
    words = [f"--init_from={base}", "--data=rows", "--cache_frozen", *flags(), out]
    train.main([*words, "--plan"])
    assert "--cache_frozen: 0.0 GB" in capsys.readouterr().out
    monkeypatch.setattr("data.training.frozen.shutil.disk_usage", lambda path: Namespace(free=10))
    assert "--cache_frozen needs 0.0 GB" in refused(capsys, *words)
    assert "--cache_frozen would do nothing" in refused(
        capsys, f"--init_from={base}", "--cache_frozen", out)
    assert not (tmp_path / "out").exists()


# --- classes of one's own -------------------------------------------------------------------------

def test_a_class_of_ones_own_says_which_answer_is_right(tmp_path, capsys):
    """From rows with a class to guided answers, and to a benchmark; the prompts say nothing."""
    # the first class has the number of the second as its name
    lines = [json.dumps({"text": f"{number} = ?\nAnswer:{letter * 9}", "class": label}) + "\n"
             for number in range(20) for letter, label in (("a", 1), ("b", "second"))]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    data, out = tmp_path / "data", tmp_path / "out"
    chat.main([str(tmp_path / "rows.jsonl"), f"--tokenizer={resolve('tiny')}", f"--out_dir={data}",
               "--val_fraction=0.2", "--block_size=100"])
    train.main(["--init_from=tiny", f"--data={data}", f"--out_dir={out}", "--cache_frozen",
                *flags(width=16, cond_dim=16, rank=4, updates=60, lr=0.01), "--ema=0", "--objective=paper"])

    def answered(*words):
        capsys.readouterr()
        status = exit_status(sample.main, [
            f"--init_from={out}", "--prompt=3 = ?\nAnswer:", "--device=cpu", "--no-frozen",
            "--max_new_tokens=1", *words])
        return status, *capsys.readouterr()

    for name, answer in (("1", "a"), ("0", "a"), ("second", "b")):
        status, shown, _ = answered(f"--class={name}", "--guidance=2")
        assert status == 0
        # two copies of nine evaluations
        assert f"   answer  {answer}\n   1 tokens, 18 NFE (18.0 per token)\n" in shown
    status, _, error = answered("--class=third")
    assert status == 2
    assert "--class 'third' is not supported; allowed: 1, second, 0\n" in error

    words = [f"--init_from={out}", "--task=sums", "--limit=4", "--shots=0", "--steps=2",
             "--max_new_tokens=1", "--device=cpu", f"--out={tmp_path / 'sums'}"]
    evaluation.main([*words, "--class=second", "--guidance", "1", "2"])
    rows = json.loads((tmp_path / "sums" / "summary.json").read_text())["rows"]
    assert [(row["column"], row["nfe_per_token"]) for row in rows] == [
        ("frozen", 0), ("euler 2", 3), ("euler 2 w 2", 6)]
    lines = read_lines(tmp_path / "sums" / "records.jsonl")[1:]
    outputs = {line["output"] for line in lines if line["column"] == "euler 2 w 2"}
    # the prompts are of another kind
    assert "b" in outputs and "a" not in outputs
    # held-out text is read with its classes
    evaluation.main([f"--init_from={out}", "--task=text", f"--data={data}", "--steps=2",
                     "--draws=1", "--device=cpu", f"--out={tmp_path / 'text.json'}"])
    _, path = json.loads((tmp_path / "text.json").read_text())["text"]
    model, tokenizer = sample.load_model(str(out), device="cpu")
    rows = TASKS["text"].rows(str(data), tokenizer, None)
    known, unknown = (
        evaluation.text_nats(model, some, sample.Settings(steps=2), [1.0], 1, 16, 0)[0]
        for some in (rows, [row[:3] for row in rows]))
    assert path["nats"][0] == pytest.approx(float(known[0].sum() / known[-1].sum()))
    assert known[0].sum() < unknown[0].sum()
    # what was answered in one class is not taken for another
    capsys.readouterr()
    assert exit_status(evaluation.main, [*words, "--class=1"]) == 2
    assert "holds records of another class (1, not 0)" in capsys.readouterr().err
