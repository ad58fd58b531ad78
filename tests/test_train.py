"""train.py: resuming to the bit, what is trained and what is not, batches, the log, Ctrl-C, flags.

python -m pytest tests/test_train.py
"""

import functools
import json
import math
import signal
import subprocess
import sys
import time
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

import train
from conftest import LLAMA, make_ids, make_lm
from data.checkpoints.state import out_of_patience, read_state
from data.flags.train import PRESETS
from data.parts.lora import LoRA
from data.training.batches import Losses, collate
from data.training.loader import Loader
from data.training.optimizer import EMA
from diffusion import L2D, L2DConfig
from model import LM

ROOT = Path(train.__file__).parent
FLAGS = {
    "batch_size": 4,
    "accumulate": 1,
    "width": 8,
    "cond_dim": 8,
    "rank": 2,
    "updates": 6,
    "warmup": 2,
    "lr": 0.01,
    "eval_every": 100,
    "val_rows": 8,
    "report": 0,
    "device": "cpu",
    "dtype": "float32",
}


def flags(**changes):
    """As words; those that only a path has are left out for the other methods."""
    values, method = {**FLAGS, **changes}, changes.get("method", "l2d")
    idle = {"l2d": (), "lora": ("width", "cond_dim", "dtype")}
    idle = idle.get(method, ("width", "cond_dim", "dtype", "rank"))
    return [f"--{name}={value}" for name, value in values.items() if name not in idle]


def run(base, out, **changes):
    """Train from `base` and return what train() returns."""
    return train.train(train.parse([f"--init_from={base}", f"--out_dir={out}", *flags(**changes)]))


def log(out):
    return [
        json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def updates(out):
    """What the log says of every update, without the clock."""
    return [
        {key: value for key, value in entry.items() if key != "seconds"}
        for entry in log(out)
        if "loss" in entry
    ]


def ctrl_c_after(monkeypatch, count):
    """Send ourselves SIGINT while update number `count` is under way."""
    update, calls = train.one_update, []

    def interrupt_and_update(*args):
        calls.append(1)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(train, "one_update", interrupt_and_update)


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, accumulate",
    [("l2d", 1), ("l2d", 2), ("pretrain", 1), ("pretrain", 2), ("lora", 1), ("full", 2)],
)
def test_three_and_three_resumed_updates_equal_six_to_the_bit(
    method, accumulate, base, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(base, whole, method=method, accumulate=accumulate)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        ctrl_c_after(patch, 3)
        run(base, parts, method=method, accumulate=accumulate)
    assert len(updates(parts)) == 3
    train.main(["--init_from=resume", f"--out_dir={parts}"])
    (expected, meta), (found, _) = read_state(whole), read_state(parts)
    assert {name.split("/")[0] for name in expected} == {
        "weights",
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    assert meta["update"] == 6 and meta["position"] == 24 * accumulate
    assert expected.keys() == found.keys() and all(
        torch.equal(expected[name], found[name]) for name in expected
    )
    assert updates(parts) == updates(whole) and [entry["update"] for entry in updates(whole)] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize("objective", ["refine", "both"])
def test_so_do_those_of_our_own_objective_with_their_average_and_curriculum(
    objective, base, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"preset": "tiny", "objective": objective, "ema": 0.9, "unroll": 4}
    run(base, whole, **options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        ctrl_c_after(patch, 3)
        run(base, parts, **options)
    train.main(["--init_from=resume", f"--out_dir={parts}"])
    (expected, meta), (found, again) = read_state(whole), read_state(parts)
    assert any(name.startswith("average/") for name in expected)
    assert meta["curriculum"] == again["curriculum"] and meta["curriculum"][1] >= 0
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert updates(parts) == updates(whole) and len(updates(whole)) == 6
    # saved is the average, and resumed are the weights
    path = load_file(whole / "path.safetensors")
    assert all(torch.equal(path[name], expected[f"average/{name}"]) for name in path)
    assert not torch.equal(path["to_z.weight"], expected["weights/to_z.weight"])


def test_resuming_takes_the_flags_of_the_run_and_those_given_anew(base, tmp_path):
    run(base, tmp_path / "out", updates=2, seed=7, min_lr=0.002)
    args = train.parse(["--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--updates=3"])
    assert (args.updates, args.seed, args.min_lr, args.width, args.resume) == (
        3,
        7,
        0.002,
        8,
        True,
    ) and args.init_from == str(base)
    assert [entry["update"] for entry in updates(tmp_path / "out")] == [1, 2]
    train.train(args)
    assert [entry["update"] for entry in updates(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="only Linux shows which files are mapped into memory",
)
def test_a_resumed_run_has_let_go_of_the_file_that_it_will_replace(base, tmp_path, monkeypatch):
    """Windows replaces no file that is still mapped, so a resumed run could never save there."""
    mapped, write, out = [], train.write_state, tmp_path / "out"
    run(base, out, updates=1)
    monkeypatch.setattr(
        train,
        "write_state",
        lambda *args: mapped.append(str(out) in Path("/proc/self/maps").read_text())
        or write(*args),
    )
    train.main(["--init_from=resume", f"--out_dir={out}", "--updates=2"])
    assert mapped == [False]


def test_looking_at_the_validation_data_changes_nothing(base, tmp_path):
    for every in (1, 100):
        run(base, tmp_path / str(every), eval_every=every)
    often, once = (load_file(tmp_path / name / "state.safetensors") for name in ("1", "100"))
    assert all(torch.equal(often[name], once[name]) for name in once)
    assert sum("val_loss" in entry for entry in log(tmp_path / "1")) == 7


# --- what is trained ------------------------------------------------------------------------------


def test_gradient_reaches_the_whole_path_within_five_updates_and_never_the_base(base, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    model = run(base, tmp_path / "out", updates=5)["model"]
    moments = {
        name: value
        for name, value in load_file(tmp_path / "out" / "state.safetensors").items()
        if name.startswith("exp_avg/")
    }
    assert moments.keys() == {f"exp_avg/{name}" for name in model.path_parameters()}
    assert [name for name, value in moments.items() if not value.any()] == []
    original = dict(make_lm().named_parameters())
    for name, p in model.lm.named_parameters():
        assert torch.equal(p, original[name]) and p.grad is None and not p.requires_grad
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_the_saved_path_is_the_trained_one(base, tmp_path):
    model = run(base, tmp_path / "out")["model"]
    again, tensors = L2D.load(tmp_path / "out", device="cpu"), load_file(
        tmp_path / "out" / "state.safetensors"
    )
    for name, p in model.path_parameters().items():
        assert torch.equal(again.path_parameters()[name], p) and torch.equal(
            tensors[f"weights/{name}"], p
        )


def test_lora_trains_beside_the_base_and_is_merged_when_saved(base, tmp_path):
    before = (base / "model.safetensors").read_bytes()
    model = run(base, tmp_path / "out", method="lora")["model"]
    assert (base / "model.safetensors").read_bytes() == before
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    matrices = {name for name in old if name.endswith("_proj.weight")}
    assert {name for name in old if not torch.equal(old[name], new[name])} == matrices and len(
        matrices
    ) == 14
    assert all(torch.linalg.matrix_rank(new[name] - old[name], rtol=1e-3) <= 2 for name in matrices)
    again = LM.from_pretrained(str(tmp_path / "out"), torch.float32, "cpu")
    assert torch.equal(again(make_ids()), model(make_ids()))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "lock",
        "log.jsonl",
        "model.safetensors",
        "state.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_a_merged_model_equals_the_adapted_one(family):
    lm, ids = make_lm(family), make_ids()
    with torch.no_grad():
        plain = lm(ids)
        train.replace_linears(lm, nn.Linear, lambda linear: LoRA(linear, 4, alpha=8.0))
        assert torch.equal(lm(ids), plain)  # B starts at zero
        adapters = [module for module in lm.modules() if isinstance(module, LoRA)]
        for i, adapter in enumerate(adapters):
            adapter.B.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
        adapted = lm(ids)
        train.replace_linears(lm, LoRA, train.merge_linear)
        merged = lm(ids)
    assert len(adapters) == 2 * (6 if lm.config.model_type == "gpt2" else 7)
    assert not any(isinstance(module, LoRA) for module in lm.modules())
    assert float((adapted - plain).abs().max()) > 0.1
    assert float((merged - adapted).abs().max()) <= 1e-5 * float(adapted.abs().max())


@pytest.mark.parametrize("method", ["full", "pretrain"])
def test_full_training_changes_every_weight(method, base, tmp_path):
    run(base, tmp_path / "out", method=method)
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    assert old.keys() == new.keys() and not any(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("method", ["l2d", "lora", "full"])
def test_one_batch_is_learned_by_heart(method, base):
    """Sixty updates on the same rows, times and noise leave a twentieth of the loss.

    Measured: a five-hundredth and less.
    """
    args = Namespace(
        **{**FLAGS, "lr": 0.02, "weight_decay": 0.0, "rank": 8, "width": 16, "cond_dim": 32},
        method=method,
        init_from=str(base),
        seed=0,
        cache_dir=None,
        full_copies=False,
        time_distribution="uniform",
        objective="paper",
        own_kv=False,
    )
    model, _ = train.build_model(args, classes=0)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = train.build_optimizer(trainable, 0.02, 0.0), []
    for _ in range(60):
        (batch,) = loader(rows(4, 12), model).update(0)
        loss = train.token_losses(model, batch).values.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 20


# --- optimizer and schedule -----------------------------------------------------------------------


def test_two_batches_of_four_teach_the_same_as_one_of_eight(base, tmp_path):
    """Rows differ in length, so a mean of means would be another gradient.

    After one update the moment is the gradient.
    """
    for size, accumulate in ((8, 1), (4, 2), (1, 8)):
        run(
            base,
            tmp_path / str(size),
            method="full",
            batch_size=size,
            accumulate=accumulate,
            updates=1,
            clip=1e9,
        )
    expected = load_file(tmp_path / "8" / "state.safetensors")
    for size in ("4", "1"):
        found = load_file(tmp_path / size / "state.safetensors")
        for name in expected:
            if name.startswith("exp_avg/"):
                assert float((found[name] - expected[name]).abs().max()) <= 1e-5 * float(
                    expected[name].abs().max()
                ), name
        assert updates(tmp_path / size)[0]["tokens"] == updates(tmp_path / "8")[0]["tokens"]
        assert updates(tmp_path / size)[0]["loss"] == pytest.approx(
            updates(tmp_path / "8")[0]["loss"], abs=2e-5
        )


def test_the_gradient_is_clipped(base, tmp_path):
    run(base, tmp_path / "out", method="full", updates=1, clip=0.5)
    moments = [
        value.flatten()
        for name, value in load_file(tmp_path / "out" / "state.safetensors").items()
        if name.startswith("exp_avg/")
    ]
    assert updates(tmp_path / "out")[0]["norm"] > 1  # before clipping
    assert float(torch.cat(moments).norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)  # β₁ = 0.9


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_learning_rate_rises_and_falls_in_straight_lines(warmup):
    rates = [train.learning_rate(update, 10, warmup, 1.0, 0.1) for update in range(11)]
    assert rates[:warmup] == [(i + 1) / warmup for i in range(warmup)]
    assert rates[warmup] == 1.0 and rates[10] == pytest.approx(0.1)
    falls = [a - b for a, b in zip(rates[warmup:], rates[warmup + 1 :])]
    assert falls == pytest.approx([0.9 / (10 - warmup)] * len(falls))


def test_matrices_decay_and_biases_and_norms_do_not():
    l2d = L2D(make_lm(), L2DConfig(8, 8, rank=2, classes=5))
    everything = {**l2d.path_parameters(), **dict(make_lm(LLAMA).named_parameters())}
    optimizer = train.build_optimizer(everything, 0.1, 0.5)
    before = {name: p.detach().clone() for name, p in everything.items()}
    for p in everything.values():
        p.requires_grad_().grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in everything.items():
        vector = name.endswith("bias") or "norm" in name or "ln_f" in name
        assert torch.allclose(p, before[name] * (1 if vector else 0.95), atol=1e-7), name


# --- batches --------------------------------------------------------------------------------------


def rows(count, length, spread=5):
    """Rows (ids, mask, documents) of different lengths; no two rows begin alike.

    The first third is the prompt.
    """
    result = []
    for i in range(count):
        size = length - i % spread
        mask = torch.arange(size) >= size // 3
        result.append(
            (
                [i, *make_ids(1, size - 1, seed=i)[0].tolist()],
                mask.long(),
                torch.ones(size, dtype=torch.long),
            )
        )
    return result


def loader(data, model=None, batch_size=4, accumulate=1, seed=5):
    """Of batches of four rows, as train.py has one for data of one's own."""
    draw = None
    if isinstance(model, L2D):
        def draw(batch, draws, update):
            return train.draw(model.config, batch, draws)
    return Loader(data, batch_size * accumulate, batch_size, seed, "cpu", draw, ahead=9)


def drawn(data, update, seed=5):
    """The first tokens of the rows in the two batches of an update, which tell the rows apart."""
    batches = loader(data, batch_size=3, accumulate=2, seed=seed).update(update)
    assert [len(batch.ids) for batch in batches] == [3, 3]
    return [row for batch in batches for row in batch.ids[:, 0].tolist()]


def test_every_row_is_seen_once_an_epoch_and_in_another_order_in_the_next():
    # of one length, so that they stay in the order they are drawn in
    data = rows(10, 12, spread=1)
    seen = [row for update in range(5) for row in drawn(data, update)]
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and list(range(10)) not in epochs
    # what comes in an update depends on nothing else
    assert drawn(data, 3) == seen[18:24]
    assert drawn(data, 0) == seen[0:6]
    assert drawn(data, 0, seed=6) != seen[0:6]


def test_what_is_made_ahead_is_what_would_be_made_then():
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
    targets = batch.targets
    assert [place.tolist() for place in targets.index] == [[0, 0, 1], [1, 2, 0]]
    assert targets.y.tolist() == [9, 10, 6] and targets.class_ids.tolist() == [3, 3, 0]
    assert batch.documents is None and targets.hops is None


def test_packed_rows_keep_their_documents():
    batch = collate(
        [([1, 2, 3, 4, 5], [0, 1, 0, 1, 1], [1, 1, 2, 2, 2]), ([1, 2, 3], [0, 1, 1], [1, 1, 1])])
    assert batch.documents.numbers.tolist() == [[1, 1, 2, 2], [1, 1, 1, 0]]
    assert batch.documents.borders == (0, 2, 4, 7, 8)
    assert [place.tolist() for place in batch.targets.index] == [[0, 0, 0, 1, 1], [0, 2, 3, 0, 1]]
    assert batch.targets.y.tolist() == [2, 4, 5, 2, 3] and batch.targets.class_ids is None


def test_padding_and_neighbours_change_no_loss():
    lm, (a, b, c) = make_lm(), rows(3, 9)
    packed = [torch.cat([torch.as_tensor(part) for part in parts]) for parts in zip(a[:2], b[:2])]
    packed.append(
        torch.repeat_interleave(torch.tensor([1, 2]), torch.tensor([len(a[0]), len(b[0])]))
    )
    with torch.no_grad():
        alone = [train.token_losses(lm, collate([row]))[0] for row in (a, b, c)]
        padded = train.token_losses(lm, collate([a, b, c]))[0]
        together = train.token_losses(lm, collate([packed, c]))[0]
        count = len(a[0]) - len(a[0]) // 3
        by_hand = F.cross_entropy(
            lm(torch.tensor([a[0]]))[0, -count - 1 : -1],
            torch.tensor(a[0][-count:]),
            reduction="none",
        )
    assert torch.allclose(alone[0], by_hand, atol=1e-5)
    for losses in (padded, together):
        assert torch.allclose(losses, torch.cat(alone), atol=1e-5)


# --- reports --------------------------------------------------------------------------------------


def validated(model, data, count=100):
    """What train.validate says of a model that no training has touched."""
    args = Namespace(val_rows=count, backprop=0)
    return train.validate(SimpleNamespace(
        args=args, model=model, val=data, loader=loader([], model), unroll_at=lambda update: 0,
        average=EMA({}, 0.0), update=0, history=[]))


def test_validation_reports_the_mean_loss_of_every_tenth_of_t(monkeypatch):
    """Losses made of t itself: 10·t in the first batch, and 1 more in the second.

    t = 1 belongs to the last tenth.
    """
    times, calls = (torch.arange(20) + 0.5) / 20, []
    times[-1] = 1.0

    def losses(model, batch, backprop):
        calls.append((len(batch.ids), model.training))
        values = 10 * times + len(calls) - 1
        return Losses(values, values, times, None)

    monkeypatch.setattr(train, "token_losses", losses)
    model = nn.Linear(1, 1)
    result = validated(model, rows(9, 8), 7)
    assert calls == [(4, False), (3, False)] and model.training
    assert result["by_tenth"] == pytest.approx([i + 1 for i in range(9)] + [10.125], abs=1e-3)
    assert result["val_loss"] == pytest.approx(float(10 * times.mean()) + 0.5, abs=1e-3)


def test_validation_is_the_plain_loss_of_a_language_model_and_repeats(base):
    lm, data = make_lm(), rows(9, 12)
    with torch.no_grad():
        expected = torch.cat(
            [train.token_losses(lm, collate([row]))[0] for row in data]
        ).mean()
    assert validated(lm, data) == {
        "update": 0, "val_loss": pytest.approx(float(expected), abs=1e-3)}
    l2d = L2D(lm, L2DConfig(8, 8, rank=2))
    first, second = (validated(l2d, data) for _ in range(2))
    assert first == second and first["val_loss"] == pytest.approx(
        float(expected), abs=1e-3
    )  # a fresh path changes nothing


def test_the_log_is_json_lines_that_hold_flags_and_losses(base, tmp_path, capsys):
    result = run(base, tmp_path / "out", eval_every=3)
    entries = log(tmp_path / "out")
    assert (
        entries[0]["args"]["lr"] == 0.01
        and entries[0]["args"]["seed"] == 42
        and entries[0]["torch"] == torch.__version__
    )
    assert [entry["loss"] for entry in updates(tmp_path / "out")] == pytest.approx(
        result["losses"], abs=1e-5
    )
    assert all(
        math.isfinite(entry[key])
        for entry in updates(tmp_path / "out")
        for key in ("loss", "lr", "norm", "tokens")
    )
    checks = [entry for entry in entries if "val_loss" in entry]
    assert [entry["update"] for entry in checks] == [0, 3, 6] and all(
        len(entry["by_tenth"]) == 10 for entry in checks
    )
    shown = capsys.readouterr().out
    assert all(
        f"update      {entry['update']}/6" in shown and f"val {entry['val_loss']:6.3f}" in shown
        for entry in checks
    )


# --- Ctrl-C and refusals --------------------------------------------------------------------------


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process alone"
)
def test_ctrl_c_saves_and_says_how_to_go_on(base, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train.py"),
            f"--init_from={base}",
            f"--out_dir={out}",
            *flags(updates=100_000),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        deadline = time.monotonic() + 60
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and not (out.exists() and len(updates_so_far(out)) >= 3)
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    done = read_state(out)[1]["update"]
    assert "Traceback" not in stderr and len(updates(out)) == done >= 3
    assert (
        f"stopped after update {done}; go on with: python train.py --init_from=resume "
        f"--out_dir={out}"
        in stdout
    )
    train.main(["--init_from=resume", f"--out_dir={out}", f"--updates={done + 2}"])
    assert read_state(out)[1]["update"] == done + 2 and L2D.load(out, device="cpu")


def updates_so_far(out):
    path = out / "log.jsonl"
    return (
        [line for line in path.read_text(encoding="utf-8").splitlines() if '"loss"' in line]
        if path.exists()
        else []
    )


def refused(capsys, *argv):
    """Exit status 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("train.py: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--method=lora", "--init_from=scratch"],
            "--method lora needs a pretrained model; allowed with --init_from=scratch: pretrain",
        ),
        (["--init_from=scratch"], "--method l2d needs a pretrained model"),
        (["--init_from=gpt3"], "unknown model 'gpt3': give an existing directory, tiny, or one of"),
        (
            ["--init_from=resume"],
            "state.safetensors does not exist, so there is nothing to resume; "
            "start one with train.py --out_dir=",
        ),
        (["--lr=-1"], "--lr = -1.0 is out of range; allowed: 0 or more"),
        (["--batch_size=0"], "--batch_size = 0 is out of range; allowed: 1 or more"),
        (["--rank=0"], "--rank = 0 is out of range; allowed: 1 or more"),
        (["--clip=-1"], "--clip = -1.0 is out of range"),
        (["--ema=1"], "--ema = 1.0 is out of range; allowed: 0 to 1, without 1"),
        (["--unroll=0"], "--unroll = 0 is out of range; allowed: 1 or more"),
        (["--backprop=0"], "--backprop = 0 is out of range; allowed: 1 or more"),
        (["--device=gpu"], "gpu"),
        (["--warmup=-5"], "--warmup = -5 is out of range; allowed: 0 or more"),
    ],
)
def test_bad_flags_are_refused_in_one_line(argv, message, capsys, tmp_path):
    assert message in refused(capsys, *argv, f"--out_dir={tmp_path / 'out'}")
    assert list(tmp_path.iterdir()) == []


def test_missing_data_and_missing_tokenizer_are_refused_in_one_line(base, capsys, tmp_path):
    out = f"--out_dir={tmp_path / 'out'}"
    message = refused(capsys, f"--init_from={base}", f"--data={tmp_path / 'none'}", out)
    assert "no token file" in message and "python -m data.text.chat" in message
    (base / "tokenizer.model").unlink()
    assert str(base) in refused(capsys, f"--init_from={base}", out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"weights/a": torch.ones(2)},
            "is not a training state of this project and version",
        ),
        (b"{}", "is truncated or not a safetensors file"),
    ],
)
def test_states_of_something_else_are_refused_in_one_line(content, message, capsys, tmp_path):
    path = tmp_path / "state.safetensors"
    save_file(content, path) if isinstance(content, dict) else path.write_bytes(content)
    assert message in refused(capsys, "--init_from=resume", f"--out_dir={tmp_path}")


@pytest.mark.parametrize("flag", ["--width=16", "--method=full", "--rank=4"])
def test_resuming_something_else_than_was_trained_is_refused_in_one_line(
    flag, base, capsys, tmp_path
):
    run(base, tmp_path / "out", updates=1)
    before = (tmp_path / "out" / "state.safetensors").read_bytes()
    assert "cannot be changed in a run that goes on" in refused(
        capsys, "--init_from=resume", f"--out_dir={tmp_path / 'out'}", flag
    )
    assert (tmp_path / "out" / "state.safetensors").read_bytes() == before


def test_resuming_on_another_base_is_refused_in_one_line(base, capsys, tmp_path):
    run(base, tmp_path / "out", updates=1)
    make_lm(seed=1).save_pretrained(base)
    assert str(base) in refused(
        capsys, "--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--updates=2"
    )


def test_data_without_validation_rows_is_refused_in_one_line(base, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda *_: (rows(8, 12), []))
    assert "valid" in refused(
        capsys, f"--init_from={base}", f"--out_dir={tmp_path / 'out'}", *flags()
    )


def test_a_compiler_that_does_not_work_is_one_line(base, tmp_path, capsys, monkeypatch):
    def fails(*args, **options):
        raise torch._dynamo.exc.TorchDynamoException("no compiler here\nand more")

    monkeypatch.setattr(train.torch, "compile", lambda objective, **options: fails)
    message = refused(capsys, f"--init_from={base}", f"--out_dir={tmp_path / 'out'}", "--compile",
                      *flags(updates=1))
    assert message == "train.py: --compile does not work here (no compiler here); go without it"


# --- presets and one update -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, preset, updates",
    [
        ([], "tiny", 1900),
        (["--objective=paper"], "tiny_paper", 2700),
        (["--init_from=scratch", "--method=pretrain"], "scratch", 3600),
        (["--init_from=gpt2"], "topics", 1000),
        (["--init_from=gpt2", "--data=somewhere"], "paper", 27_900),
        (["--init_from=tiny", "--data=somewhere"], "tiny", 1900),
        (["--init_from=gpt2", "--preset=paper", "--updates=5"], "paper", 5),
    ],
)
def test_the_preset_fits_model_and_data(flags, preset, updates):
    args = train.parse(flags)
    assert (args.preset, args.updates) == (preset, updates)
    assert args.lr == PRESETS[preset]["lr"]


def test_the_plan_is_said_before_and_the_pace_after_ten_updates(base, tmp_path, capsys):
    run(base, tmp_path / "out", updates=12)
    text = capsys.readouterr().out
    assert "preset topics: 12 updates of 4 rows, lr 0.01, validation every 100" in text
    assert "at the pace of the first 10 updates:" in text and "min left" in text
    assert text.index("preset topics") < text.index("at the pace")
    run(base, tmp_path / "short", updates=9)
    assert "at the pace" not in capsys.readouterr().out


def test_the_optimizer_has_the_papers_betas_and_warms_up(base, tmp_path):
    run(base, tmp_path / "out", warmup=4)
    assert [entry["lr"] for entry in updates(tmp_path / "out")][:5] == pytest.approx(
        [0.0025, 0.005, 0.0075, 0.01, 0.01]
    )
    optimizer = train.build_optimizer({"w": nn.Parameter(torch.ones(2, 2))}, 1.0, 0.0)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_one_update_on_two_batches_is_one_update_on_both_together():
    """Every token weighs the same: the rows differ in length, so a mean of means would not do."""
    states = []
    for sizes in ([4], [2, 2], [3, 1]):
        lm, some = make_lm(), rows(4, 12)
        optimizer = train.build_optimizer(dict(lm.named_parameters()), 0.01, 0.0)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        batches = [collate(some[at : at + size]) for at, size in zip(starts, sizes)]
        loss, norm, tokens, _ = train.update_once(
            lm, optimizer, batches, train.token_losses, clip=1.0)
        states.append((loss, norm, tokens, lm))
    for loss, norm, tokens, lm in states[1:]:
        assert loss == pytest.approx(states[0][0], rel=1e-5) and tokens == states[0][2]
        assert norm == pytest.approx(states[0][1], rel=1e-4)
        assert all(p.grad is None for p in lm.parameters())
    assert not torch.equal(states[0][3].head.weight, make_lm().head.weight)


# --- when to stop, what to keep, what it would take -----------------------------------------------


@pytest.mark.parametrize(
    "losses, patience, over",
    [
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 1.0, 2.0], 1, True),
        ([3.0, 1.0, 2.0], 2, False),
        ([1.0, 3.0, 2.0], 2, True),
        ([1.0, 3.0, 2.0], 0, False),
        ([], 1, False),
    ],
)
def test_patience_counts_validations_since_the_best(losses, patience, over):
    history = [[10 * place, loss] for place, loss in enumerate(losses)]
    assert out_of_patience(history, patience) == over


def test_a_run_without_progress_stops_early_and_stays_stopped(base, tmp_path):
    out = tmp_path / "out"
    # the first validation cannot get better with a learning rate of zero
    run(base, out, updates=50, lr=0, eval_every=2, patience=3)
    meta = read_state(out)[1]
    assert meta["update"] == 6 and [update for update, _ in meta["history"]] == [0, 2, 4, 6]
    train.main(["--init_from=resume", f"--out_dir={out}"])
    assert read_state(out)[1]["update"] == 6


def test_the_best_paths_are_kept_and_each_can_be_sampled(base, tmp_path):
    out = tmp_path / "out"
    run(base, out, updates=8, eval_every=2, keep=2)
    history = read_state(out)[1]["history"]
    best = sorted(history, key=lambda entry: entry[1])[:2]
    found = {path.name for path in out.glob("best-*")}
    assert found == {f"best-{update}" for update, _ in best}
    for name in found:
        if name != "best-0":
            assert L2D.load(out / name, device="cpu")
    # a new run takes them away
    train.train(train.parse([f"--init_from={base}", f"--out_dir={out}", "--overwrite",
                             *flags(updates=1)]))
    assert not list(out.glob("best-*"))


@pytest.mark.parametrize("method", ["l2d", "lora"])
def test_a_plan_trains_nothing_and_writes_nothing(method, base, tmp_path, capsys):
    out = tmp_path / "out"
    train.main([f"--init_from={base}", f"--out_dir={out}", "--plan", *flags(method=method)])
    said = capsys.readouterr().out
    assert "trainable parameters" in said and "MB frozen" in said and "min in all" in said
    assert not out.exists()


# --- cached states of the frozen model ------------------------------------------------------------


class Rows(list):
    """As data.text.tokens has them, with a fingerprint."""
    fingerprint = "rows"

    @property
    def lengths(self):
        return np.array([len(row[0]) for row in self])

    @property
    def longest(self):
        return max(len(row[0]) for row in self)


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


@pytest.mark.parametrize("options", [{}, {"objective": "refine", "own_kv": True, "unroll": 3}])
def test_cached_states_teach_what_computed_ones_teach(options, base, tmp_path, packed_rows):
    own = ["--own_kv"] if options.pop("own_kv", False) else []
    words = [f"--init_from={base}", "--data=rows", *flags(**options, accumulate=2), *own]
    for name, more in (("read", []), ("kept", ["--cache_frozen"])):
        train.train(train.parse([*words, f"--out_dir={tmp_path / name}", *more]))
    found, expected = (updates(tmp_path / name) for name in ("kept", "read"))
    for entry, other in zip(found, expected, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], abs=2e-5)
    looks = [[entry["val_loss"] for entry in log(tmp_path / name) if "val_loss" in entry]
             for name in ("kept", "read")]
    assert len(looks[0]) > 1 and looks[0] == pytest.approx(looks[1], abs=2e-4)
    # derived from other files, so it goes when nobody needs it any more
    assert not list((tmp_path / "kept").glob("frozen*"))
    # over an earlier run: what was made for this one stays
    train.train(train.parse([*words, f"--out_dir={tmp_path / 'kept'}", "--cache_frozen",
                             "--overwrite"]))
    assert [entry["loss"] for entry in updates(tmp_path / "kept")] == [
        entry["loss"] for entry in found]


def test_states_are_cached_when_a_run_stops_and_used_when_it_goes_on(
    base, tmp_path, packed_rows, monkeypatch, capsys
):
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = [f"--init_from={base}", "--data=rows", "--cache_frozen", *flags()]
    train.train(train.parse([*words, f"--out_dir={whole}"]))
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        ctrl_c_after(patch, 3)
        train.train(train.parse([*words, f"--out_dir={out}"]))
    before = [(out / f"frozen-{split}.bin").stat() for split in ("train", "val")]
    assert "caching the frozen model's states of" in capsys.readouterr().out
    train.main(["--init_from=resume", f"--out_dir={out}"])
    assert "caching" not in capsys.readouterr().out
    assert before[0].st_size > before[1].st_size > 0
    assert updates(out) == updates(whole)
    # it is no secret how large it is going to be
    train.main([*words, f"--out_dir={tmp_path / 'plan'}", "--plan"])
    assert "--cache_frozen: 0.0 GB" in capsys.readouterr().out
    assert not (tmp_path / "plan").exists()


def test_a_disk_without_room_is_said_before(base, tmp_path, packed_rows, monkeypatch, capsys):
    monkeypatch.setattr("data.training.frozen.shutil.disk_usage", lambda path: Namespace(free=10))
    message = refused(capsys, f"--init_from={base}", "--data=rows", "--cache_frozen", *flags(),
                      f"--out_dir={tmp_path / 'out'}")
    assert "--cache_frozen needs 0.0 GB" in message and not (tmp_path / "out").exists()
    assert "--cache_frozen would do nothing" in refused(
        capsys, f"--init_from={base}", "--cache_frozen", f"--out_dir={tmp_path / 'out'}")
