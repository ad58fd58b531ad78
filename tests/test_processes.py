"""Several processes, one training: the same losses as with one, resumed by any number of them.

Each process is started afresh by a server that has no threads, and sums by gloo on the CPU; the
last test is torchrun's own.
"""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from data.checkpoints.state import read_state
from data.system import processes, sharding
from diffusion import L2D
from test_train import ROOT, flags, updates

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin",
    reason="gloo on the loopback device needs Linux")
DEADLINE = 240       # seconds, for all processes of a training together


@functools.cache
def starter():
    """A fork of this process would have its threads' locks, held for ever."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    return context


def work(rank, size, port, out, argv, prepare):
    """One process of torchrun, as it would be started."""
    for stream in (1, 2):
        file = os.open(f"{out}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8")
    torch.set_num_threads(1)
    # gloo would look for the address of this host by its name, and some name servers never answer
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
                      TORCHELASTIC_USE_AGENT_STORE="True")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare:
        prepare(rank)
    try:
        train.main([*argv, f"--out_dir={out}"])
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code or 0)


def start(size, out, *argv, prepare=None) -> list:
    # torchrun keeps it too, so it outlives any of the processes
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = [starter().Process(target=work, args=(rank, size, store.port, out, argv, prepare))
               for rank in range(size)]
    for member in members:
        member.start()
        member.store = store
    return members


def wait(members) -> list:
    """Their exit statuses; -9 for one that did not end in time."""
    deadline = time.monotonic() + DEADLINE
    for member in members:
        member.join(max(0, deadline - time.monotonic()))
    for member in members:
        member.kill()
        member.join()
    return [member.exitcode for member in members]


def together(size, out, *argv, prepare=None) -> list:
    return wait(start(size, out, *argv, prepare=prepare))


def said(out, rank, stream) -> str:
    with open(f"{out}.{rank}.{stream}", encoding="utf-8") as file:
        return file.read()


def losses(out) -> list:
    return [entry["loss"] for entry in updates(out)]


def agree(found, expected):
    assert len(found) == len(expected) > 0
    # the log rounds to five digits behind the point
    assert found == pytest.approx(expected, rel=1e-5, abs=1.1e-5)


# --- the same training ----------------------------------------------------------------------------

WAYS = [
    ({"updates": 20}, (1, 2, 4)),
    ({"preset": "tiny", "unroll": 4, "ema": 0.9, "updates": 6}, (1, 4)),
    ({"method": "lora", "updates": 3}, (1, 2)),
    ({"method": "full", "updates": 3}, (1, 4)),
]


@pytest.mark.parametrize("options, sizes", WAYS)
def test_losses_are_the_same_with_any_number_of_processes(options, sizes, base, tmp_path):
    options = {"lr": 2e-3, "eval_every": 10, **options}
    splits = {1: (8, 1), 2: (2, 4), 4: (1, 8)}
    for size in sizes:
        batch_size, accumulate = splits[size]
        words = flags(**options, batch_size=batch_size, accumulate=accumulate)
        assert together(size, tmp_path / str(size), f"--init_from={base}", *words) == [0] * size
    alone = losses(tmp_path / "1")
    looks = {size: read_state(tmp_path / str(size))[1]["history"] for size in sizes}
    for size in sizes[1:]:
        agree(losses(tmp_path / str(size)), alone)
        assert [look for _, look in looks[size]] == pytest.approx(
            [look for _, look in looks[1]], abs=2e-4)
        # one process speaks, and one writes
        assert "saved to" in said(tmp_path / str(size), 0, 1)
        assert not any(said(tmp_path / str(size), rank, 1) for rank in range(1, size))


def draw_other_weights(rank):
    """As a GPU of its own would: only the first process has the weights of a run alone."""
    seed = torch.manual_seed
    torch.manual_seed = lambda number: seed(number + rank)


@pytest.mark.parametrize("method", ["l2d", "lora"])
def test_every_process_starts_from_the_weights_of_the_first(method, base, tmp_path):
    words = [f"--init_from={base}", *flags(method=method, updates=3, batch_size=2, accumulate=2)]
    for size in (1, 2):
        assert together(size, tmp_path / str(size), *words,
                        prepare=draw_other_weights) == [0] * size
    agree(losses(tmp_path / "2"), losses(tmp_path / "1"))


def test_a_run_is_resumed_by_another_number_of_processes(base, tmp_path):
    options = {"batch_size": 2, "accumulate": 2, "lr": 2e-3}
    together(1, tmp_path / "one", f"--init_from={base}", *flags(**options, updates=6))
    together(2, tmp_path / "many", f"--init_from={base}", *flags(**options, updates=3))
    for size, until in ((4, 4), (1, 6)):
        assert together(size, tmp_path / "many", "--init_from=resume",
                        f"--updates={until}") == [0] * size
    # a learning rate that falls to the end of each part would be another run's
    agree(losses(tmp_path / "many")[:3], losses(tmp_path / "one")[:3])
    assert read_state(tmp_path / "many")[1]["update"] == 6
    assert "generator" not in load_file(tmp_path / "many" / "state.safetensors")


def count_parts(rank):
    """What part of a matrix does this process hold?"""
    shard = sharding.shard

    def counted(lm, *args):
        shard(lm, *args)
        matrix = lm.blocks[0].q
        matrix = getattr(matrix, "frozen", matrix).weight
        print("PART", matrix.to_local().shape[0] / matrix.shape[0])

    sharding.shard = counted


@pytest.mark.parametrize("options", [
    {"method": "full", "accumulate": 2},
    {"method": "lora"},
    {"updates": 4},
    {"preset": "tiny", "unroll": 12, "ema": 0.9},
])
def test_divided_weights_give_the_same_losses_and_files(options, base, tmp_path):
    options = {"batch_size": 4, "lr": 2e-3, "updates": 6, "eval_every": 3, **options}
    words = [f"--init_from={base}", *flags(**options)]
    assert together(2, tmp_path / "whole", *words) == [0, 0]

    assert together(2, tmp_path / "parts", *words, "--shard", prepare=count_parts) == [0, 0], \
        said(tmp_path / "parts", 0, 2)
    assert "PART 0.5" in said(tmp_path / "parts", 0, 1)
    agree(losses(tmp_path / "parts"), losses(tmp_path / "whole"))
    # Adam would hide gradients that are all too small
    parts, whole = ([entry["norm"] for entry in updates(tmp_path / run)]
                    for run in ("parts", "whole"))
    assert parts == pytest.approx(whole, rel=1e-2)
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) == 2
    for name in names:
        whole, parts = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        for key in whole:
            assert whole[key].shape == parts[key].shape
            if not key.startswith(("exp_avg", "step")):
                torch.testing.assert_close(parts[key], whole[key], atol=1e-3, rtol=1e-2)
    if options.get("method") == "full":
        for run in ("whole", "parts"):
            assert together(2, tmp_path / run, "--init_from=resume", "--updates=7") == [0, 0]
        agree(losses(tmp_path / "parts")[-1:], losses(tmp_path / "whole")[-1:])
    # and one process goes on with what two had divided
    assert together(1, tmp_path / "parts", "--init_from=resume", "--updates=8") == [0]


# --- ends -----------------------------------------------------------------------------------------

def die_later(rank):
    step = train.one_update

    def one_update(run, *args):
        if rank == 1 and run.update == 5:
            os._exit(9)
        return step(run, *args)

    train.one_update = one_update


def test_a_process_that_dies_ends_the_run_with_one_line(base, tmp_path):
    out = tmp_path / "out"
    assert together(2, out, f"--init_from={base}", *flags(eval_every=2, updates=50),
                    prepare=die_later) == [2, 9]
    lines = [line for line in said(out, 0, 2).splitlines() if line.startswith("train.py:")]
    assert len(lines) == 1 and said(out, 0, 2).count("Traceback") == 0
    assert "another process of this training has ended" in lines[0]
    assert f"update 4 is saved; go on with: python train.py --init_from=resume --out_dir={out}" \
        in lines[0]
    assert read_state(out)[1]["update"] == 4
    assert together(1, out, "--init_from=resume", "--updates=6") == [0]


def test_ctrl_c_in_any_process_ends_all_after_the_same_update(base, tmp_path):
    out = tmp_path / "out"
    members = start(2, out, f"--init_from={base}", *flags(updates=100_000))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "state.safetensors").exists():
        log = out / "log.jsonl"
        if log.exists() and log.read_text(encoding="utf-8").count('"loss"') > 2:
            break
        time.sleep(0.05)
    os.kill(members[1].pid, signal.SIGINT)
    assert wait(members) == [130, 130]
    done = read_state(out)[1]["update"]
    assert f"stopped after update {done}; go on with" in said(out, 0, 1)
    assert len(updates(out)) == done and not said(out, 1, 1)


@pytest.mark.parametrize("count, kills", [(1, True), (2, False)])
def test_a_second_ctrl_c_kills_a_process_that_is_alone(count, kills, monkeypatch):
    """Under torchrun, which repeats the signal, all of them are one."""
    monkeypatch.setattr(processes, "count", lambda: count)
    before = signal.getsignal(signal.SIGINT)
    interrupt = processes.Interrupt()
    try:
        interrupt(signal.SIGINT, None)
        assert interrupt.asked
        assert signal.getsignal(signal.SIGINT) is (before if kills else interrupt)
    finally:
        interrupt.restore()


@pytest.mark.parametrize("words, message", [
    (["--batch_size=3"], "allowed with 2 processes: a multiple"),
    (["--lr=-1"], "--lr = -1.0 is out of range"),
    (["--val_rows=7", "--shard"], "7 validation rows (--val_rows 7, "),
    (["--val_rows=1"], "allowed with 2 processes: at least as many, and with --shard a multiple"),
])
def test_a_mistake_is_one_line_of_one_process(words, message, base, tmp_path):
    out = tmp_path / "out"
    assert together(2, out, f"--init_from={base}", *flags(), *words) == [2, 2]
    lines = [line for rank in (0, 1) for line in said(out, rank, 2).splitlines()]
    assert len(lines) == 1 and lines[0].startswith("train.py: ") and message in lines[0]
    assert not out.exists()


def test_one_process_has_nothing_to_divide(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([f"--init_from={base}", f"--out_dir={tmp_path / 'out'}", "--shard"])
    assert "--shard would do nothing" in capsys.readouterr().err
    assert processes.count() == 1 and processes.share([1, 2]) == [1, 2]


def test_torchrun_starts_it(base, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         str(ROOT / "train.py"), f"--init_from={base}", f"--out_dir={out}", *flags(updates=2)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1
    assert L2D.load(out, device="cpu")
    assert json.loads((out / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
