"""Several processes, one training: torchrun starts them, and each takes its share of the rows.

    torchrun --nproc_per_node=4 train.py --init_from=gpt2-xl --data=DIR

Tokens, losses and gradients are summed over all processes, so that every one makes the step that a
single process would have made. With one process nothing here does anything. Read sharding.py
next, for a model that does not fit one card; train.py calls it all.
"""

import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from data.system.command import visible

LOST = "another process of this training has ended, or torchrun was told to end"
saved = ["nothing was saved yet"]       # what a line about an end should say; the last one counts


def number() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows: list) -> list:
    """Those that are this process's."""
    return rows[number()::count()]


def check_shares(args, val_rows: int):
    """Raise ValueError where the rows do not come out even among the processes."""
    rows = args.batch_size * args.accumulate
    if rows % count():
        raise ValueError(f"--batch_size {args.batch_size} times --accumulate {args.accumulate} are "
                         f"{rows} rows an update; allowed with {count()} processes: a multiple")
    rows = min(args.val_rows, val_rows)
    # divided weights are gathered by all processes at once, so all need as many batches
    if rows < count() or (args.shard and rows % count()):
        raise ValueError(f"{rows} validation rows (--val_rows {args.val_rows}, {val_rows} in the "
                         f"data); allowed with {count()} processes: at least as many, and with "
                         "--shard a multiple")


# --- sums -----------------------------------------------------------------------------------------

def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, on the device of `values`."""
    if count() == 1:
        return values
    moved = values.to(meeting_place())
    dist.all_reduce(moved)
    return moved.to(values.device)


def meeting_place() -> str:
    """Where tensors can be exchanged: NCCL knows cards only, gloo the CPU."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def sum_gradients(parameters):
    """Every gradient becomes the sum over all processes; of divided weights it is already."""
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if not gradients:
        return
    # one long vector: a message for every tensor would wait longer than it travels
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    parts = total(flat).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def any_of(wish: bool) -> bool:
    """Does any process wish it? So that all end after the same update."""
    return bool(total(torch.tensor(int(wish))))


def same_start(parameters):
    """All begin with the first one's weights, whatever their cards have drawn."""
    if count() == 1:
        return
    for p in parameters:
        moved = p.detach().to(meeting_place())
        dist.broadcast(moved, 0)
        p.data.copy_(moved)


# --- from start to end ----------------------------------------------------------------------------

def card(device: str | None) -> str | None:
    """The device of this process: each has a card of its own, where there are any."""
    if count() > 1 and torch.cuda.is_available() and device in (None, "cuda"):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def together(name: str):
    """Around a command: joins the processes that torchrun has started, if it has.

    Only the first one prints. Where one makes a mistake or dies, one line says so, and all end.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store = join()
    when_told_to_end(lambda: end(store, f"{name}: {LOST}; {saved[-1]}"))
    output = sys.stdout, sys.stderr
    if number():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
        dist.destroy_process_group()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        end(store, f"{name}: {error}")
    except RuntimeError as error:
        if is_lost(error):
            end(store, f"{name}: {LOST}; {saved[-1]}")
        sys.stdout, sys.stderr = output
        raise


def join():
    """Returns the store in which torchrun keeps what the processes tell one another."""
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, store=dist.PrefixStore("sums", store), rank=rank,
                            world_size=size)
    return store


def end(store, line: str):
    """Leave at once, whatever the others wait for; whoever comes first says why."""
    try:
        first = store.add("ended", 1) == 1
    except RuntimeError:
        # without torchrun it lies with the first process, which has ended then
        first = True
    if first:
        print(visible(line), file=sys.__stderr__, flush=True)
    os._exit(2)


def when_told_to_end(act):
    """torchrun sends SIGTERM where another process has died. This one may be waiting for that one
    inside a sum, where no Python runs but that of another thread.
    """
    heard, said = socket.socketpair()
    said.setblocking(False)
    signal.set_wakeup_fd(said.fileno())
    signal.signal(signal.SIGTERM, lambda *_: None)

    def listen():
        # `said` is named so that it stays open as long as this thread
        while said and heard.recv(1)[0] != signal.SIGTERM:
            pass
        act()

    threading.Thread(target=listen, daemon=True).start()


def is_lost(error: RuntimeError) -> bool:
    """Does this error say that another process has ended?"""
    return any(word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL"))


# --- Ctrl-C between two updates -------------------------------------------------------------------

class Interrupt:
    """Ctrl-C ends the run after the update under way, so that what is saved is whole.

    A second one kills it, unless torchrun is there to do so: it passes on what each process has
    heard already.
    """

    def __init__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self)

    def __call__(self, *_):
        self.asked = True
        if count() == 1:
            self.restore()

    def restore(self):
        signal.signal(signal.SIGINT, self.before)
