"""Several processes, one training: torchrun starts them, and each computes its share of the rows.

    torchrun --nproc_per_node=4 train.py --init_from=gpt2-xl --data=DIR

Tokens, losses and gradients are summed over all processes, so that all of them take the step that a
single process would have taken. With one process nothing here has an effect. Read next:
sharding.py, for a model that does not fit one GPU.
"""

import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager

import torch
import torch.distributed as dist

from data.system.command import visible

LOST = "another process of this training has ended, or torchrun has been stopped"
saved = ["nothing was saved yet"]       # the last entry ends the message about a lost process


def number() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows: list) -> list:
    """The rows of this process."""
    return rows[number()::count()]


def check_shares(batch_size: int, accumulate: int, val_rows: int, held: int, shard: bool):
    """Raise ValueError unless the rows can be divided evenly among the processes.

    held: validation rows in the data, of which val_rows are used
    """
    rows = batch_size * accumulate
    if rows % count():
        raise ValueError(f"--batch_size {batch_size} times --accumulate {accumulate} are "
                         f"{rows} rows an update; allowed with {count()} processes: a multiple")
    rows = min(val_rows, held)
    # divided weights are gathered by all processes at once, so all need as many batches
    if rows < count() or (shard and rows % count()):
        raise ValueError(f"{rows} validation rows (--val_rows {val_rows}, {held} in the data); "
                         f"allowed with {count()} processes: at least as many, and with "
                         "--shard a multiple")


# --- sums -----------------------------------------------------------------------------------------

def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, on the device of `values`."""
    if count() == 1:
        return values
    moved = values.to(exchange_device())
    dist.all_reduce(moved)
    return moved.to(values.device)


def exchange_device() -> str:
    """The device on which tensors can be exchanged: NCCL needs a GPU, gloo the CPU."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def sum_gradients(parameters):
    """Replace every gradient by the sum over all processes."""
    # those of divided weights, DTensors, are sums already
    gradients = [p.grad for p in parameters
                 if p.grad is not None and not hasattr(p, "placements")]
    if count() == 1 or not gradients:
        return
    # one long vector: a message per tensor would spend most of its time waiting
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    parts = total(flat).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def most_evaluations(number: int, block) -> int:
    """The largest number of any process, if the weights of `block` are divided among them.

    Processes gather weights together, so all must use them equally often.
    """
    # FSDPModule has this method; to import the class would take a second
    if not hasattr(block, "unshard"):
        return number
    found = torch.tensor(number, device=exchange_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def any_of(wish: bool) -> bool:
    """Is `wish` true in any process?"""
    return bool(total(torch.tensor(int(wish))))


def same_start(parameters):
    """Give every process the weights of the first one, whose GPU has drawn its own."""
    if count() == 1:
        return
    for p in parameters:
        moved = p.detach().to(exchange_device())
        dist.broadcast(moved, 0)
        p.data.copy_(moved)


# --- from start to end ----------------------------------------------------------------------------

def card(device: str | None) -> str | None:
    """The device of this process: a GPU of its own, where there are several."""
    if count() > 1 and torch.cuda.is_available() and device in (None, "cuda"):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def together(name: str):
    """Around a command: join the processes of torchrun, if it has started this one.

    Only the first process prints. After an error in any of them, all end with one line.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # the store in which torchrun exchanges messages between the processes
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, store=dist.PrefixStore("sums", store), rank=rank,
                            world_size=size)
    on_sigterm(lambda: end(store, f"{name}: {LOST}; {saved[-1]}"))
    output = sys.stdout, sys.stderr
    if number():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
        dist.destroy_process_group()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        end(store, f"{name}: {error}")
    except RuntimeError as error:
        # the words of a sum that another process has left
        if any(word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL")):
            end(store, f"{name}: {LOST}; {saved[-1]}")
        sys.stdout, sys.stderr = output
        raise


def end(store, line: str):
    """Exit at once, even from a sum that waits; the first process to end prints the reason."""
    try:
        first = store.add("ended", 1) == 1
    except RuntimeError:
        # without torchrun the first process holds the store, and it has ended
        first = True
    if first:
        print(visible(line), file=sys.__stderr__, flush=True)
    os._exit(2)


def on_sigterm(act):
    """Call `act` on SIGTERM, which torchrun sends where another process has died.

    This process may be waiting for that one inside a sum, where only other threads run Python.
    """
    received, sent = socket.socketpair()
    sent.setblocking(False)
    signal.set_wakeup_fd(sent.fileno())
    signal.signal(signal.SIGTERM, lambda *_: None)

    def listen():
        # the reference to `sent` keeps it open
        while sent and received.recv(1)[0] != signal.SIGTERM:
            pass
        act()

    threading.Thread(target=listen, daemon=True).start()


# --- Ctrl-C between two updates -------------------------------------------------------------------

class Interrupt:
    """Ctrl-C ends the run after the present update, so that the saved state is complete.

    A second one kills it, but not under torchrun, which repeats the signal to every process and
    kills them itself.
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
