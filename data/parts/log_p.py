"""log p of the right tokens under a large vocabulary, in little memory.

With 128,256 words the logits of a few thousand positions fill gigabytes, and plain autograd keeps
them until the backward pass. Here they exist piece by piece, and the gradient is computed together
with each piece. model.py calls `log_p` and `likeliest`, the functions for other files.
"""

import torch
import torch.nn.functional as F

LOGITS = 1 << 26   # most logits held at once: with 128,256 words, 523 positions


# one operator, so that torch.compile does not look inside: its loop depends on N
@torch.library.custom_op("nanol2d::log_p", mutates_args=())
def log_p(n: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, learning: bool,
          head_learns: bool = False, words: int = 0) -> tuple[
              torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p (N,) float32 of targets (N,), the logits being n·headᵀ for n (N, C), head (V, C).

    The second result is ∂ log p / ∂ n (N, C), empty unless `learning`: the backward pass keeps C
    numbers a position, not V. The third is ∂ log p / ∂ logits (N, V), if the head learns too and
    all fits into one piece. The others are the `words` largest logits and their ids, (N, words),
    for a head that is not trained.
    """
    result = torch.empty(len(n), device=n.device)
    slope = torch.empty_like(n if learning else n[:0])
    best = result.new_empty(len(n), words)
    ids = targets.new_empty(len(n), words)
    size = max(1, LOGITS // len(head))
    whole = result.new_empty(0)
    for at in range(0, len(n), size):
        piece = slice(at, at + size)
        logits = F.linear(n[piece], head).float()                       # (size, V)
        y = targets[piece, None]                                        # (size, 1)
        chosen = logits.gather(1, y)                                    # (size, 1)
        log_sum = logits.logsumexp(-1, keepdim=True)
        # log p_y = logit_y − log Σ exp(logits)
        result[piece] = (chosen - log_sum).squeeze(1)
        if learning:
            to_logits = residual(logits, y)
            slope[piece] = to_logits.to(head.dtype) @ head
            if head_learns and len(n) <= size:
                whole = to_logits
        if words:
            best[piece], ids[piece] = logits.topk(words)
    return result, slope, whole, best, ids


@log_p.register_fake
def shapes(n, head, targets, learning, head_learns=False, words=0):
    result = n.new_empty(n.shape[0], dtype=torch.float32)
    best = result.new_empty(n.shape[0], words)
    slope = torch.empty_like(n if learning else n[:0])
    whole = result.new_empty(0)
    if learning and head_learns and n.shape[0] <= max(1, LOGITS // len(head)):
        whole = result.new_empty(n.shape[0], len(head))
    return result, slope, whole, best, best.to(targets.dtype)


@torch.library.custom_op("nanol2d::head_gradient", mutates_args=())
def head_gradient(gradient: torch.Tensor, n: torch.Tensor, head: torch.Tensor,
                  targets: torch.Tensor) -> torch.Tensor:
    """(V, C): the gradient of a head that learns too, piece by piece from logits made again."""
    result = torch.zeros_like(head)
    size = max(1, LOGITS // len(head))
    for at in range(0, len(n), size):
        piece = slice(at, at + size)
        logits = F.linear(n[piece], head).float()
        step = gradient[piece] * residual(logits, targets[piece, None])
        result += step.to(n.dtype).T @ n[piece]
    return result


@head_gradient.register_fake
def head_shape(gradient, n, head, targets):
    return torch.empty_like(head)


def keep(ctx, inputs, output):
    n, head, targets, *_ = inputs
    _, slope, whole, _, ids = output
    ctx.save_for_backward(n, head, targets, slope, whole, ids)


def backward(ctx, gradient, _, __, to_best, ___):
    n, head, targets, slope, whole, ids = ctx.saved_tensors
    gradient = gradient[:, None]                                        # (N, 1)
    to_n = to_head = None
    if ctx.needs_input_grad[0]:
        to_n = (gradient * slope).to(n.dtype)
        if ids.numel():
            # Σ_y ∂/∂logit_y · head_y
            to_n = to_n + F.embedding_bag(ids, head, mode="sum",
                                          per_sample_weights=to_best.to(head.dtype))
    if ctx.needs_input_grad[1] and len(whole):
        to_head = (gradient * whole).to(n.dtype).T @ n
    elif ctx.needs_input_grad[1]:
        to_head = head_gradient(gradient, n, head, targets)
    return to_n, to_head, None, None, None, None


log_p.register_autograd(backward, setup_context=keep)


def residual(logits, y):
    """∂ log p_y / ∂ logits = onehot(y) − p, (N, V), of logits (N, V) and tokens y (N, 1)."""
    minus_p = torch.softmax(logits, dim=-1).neg_()
    ones = torch.ones_like(minus_p[:, :1])
    return minus_p.scatter_add_(1, y, ones)


@torch.library.custom_op("nanol2d::likeliest", mutates_args=())
def likeliest(n: torch.Tensor, head: torch.Tensor,
              words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `words` largest logits of n (N, C), and their ids, (N, words) each; no gradient."""
    pieces = n.split(max(1, LOGITS // len(head)))
    found = [F.linear(piece, head).float().topk(words) for piece in pieces]
    best, ids = (torch.cat(parts) for parts in zip(*found))
    return best, ids


@likeliest.register_fake
def likeliest_shapes(n, head, words):
    best = n.new_empty(n.shape[0], words, dtype=torch.float32)
    return best, best.long()
