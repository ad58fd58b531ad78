"""Several processes, one training: torchrun starts them, and each takes its share of the rows.

    torchrun --nproc_per_node=4 train.py --init_from=gpt2-xl --data=DIR

Tokens, losses and gradients are summed over all processes, so that every one makes the step that a
single process would have made. Where a model does not fit one card, `shard` divides its weights
among them (PyTorch's FSDP2). With one process nothing here does anything. train.py calls it all;
read that next.
"""

import os
import signal
import socket
import sys
import threading
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from data.command import visible

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
    if args.shard and rows % count():
        raise ValueError(f"{rows} validation rows (--val_rows {args.val_rows}, {val_rows} in the "
                         f"data); allowed with --shard and {count()} processes: a multiple")


# --- sums -----------------------------------------------------------------------------------------

def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, on the device of `values`."""
    if count() == 1:
        return values
    # NCCL sums on cards, gloo elsewhere
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    moved = values.to(device)
    dist.all_reduce(moved)
    return moved.to(values.device)


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
        dist.broadcast(p.detach(), 0)


# --- weights divided among the processes ----------------------------------------------------------

def shard(lm, path_blocks=None):
    """Divide the weights of every layer, one layer whole at a time; what is trained in a frozen
    model, and what reads it, stays whole.

    path_blocks  the layers of a diffusion path: each works with the weights of its frozen one
    """
    mesh = init_device_mesh(lm.embed.weight.device.type, (count(),))
    # a layer gives back its keys and values, which nobody changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    trained = {p for p in lm.parameters() if p.requires_grad}
    frozen = not lm.embed.weight.requires_grad
    for layer, block in enumerate(lm.blocks):
        if path_blocks is None:
            fully_shard(block, mesh=mesh, reshard_after_forward=True,
                        ignored_params=trained if frozen else None)
        else:
            shard_pair(block, path_blocks[layer], mesh)
    if not frozen:
        # embedding, final norm and head: they stay whole from the reading to the loss
        fully_shard(lm, mesh=mesh)
        register_fsdp_forward_method(lm, "read")
    for module in lm.modules():
        if isinstance(module, FSDPModule):
            # sums, as everywhere here, and no means
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def shard_pair(block, path_block, mesh):
    """A frozen layer and the path's beside it, which takes the frozen one's weights along."""
    path_block.frozen = block
    trained = {p for p in path_block.parameters() if p.requires_grad}
    fully_shard(path_block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    register_fsdp_forward_method(path_block, "read")
    # the frozen layer reads before the path does, without a gradient
    block.register_forward_pre_hook(lambda *_: path_block.unshard() and None)
    block.register_forward_hook(lambda *_: path_block.reshard())


def gather(lm):
    """All weights whole again on every process, to be saved."""
    for module in lm.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a divided tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole one, if `like` is divided."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


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
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, store=dist.PrefixStore("sums", store), rank=rank,
                            world_size=size)
    when_told_to_end(lambda: end(store, f"{name}: {LOST}; {saved[-1]}"))
    output = sys.stdout, sys.stderr
    if rank:
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
