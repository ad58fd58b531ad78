"""log p of the right tokens under a large vocabulary, in little memory.

With 128,256 words the logits of a few thousand positions fill gigabytes, and plain autograd keeps
them until the backward pass. Here they exist in pieces, and what the gradient needs of them is made
while they are there. model.py calls `log_p`; nothing else needs to be known of this file.
"""

import torch
import torch.nn.functional as F

LOGITS = 1 << 26   # most logits held at once: with 128,256 words, 523 positions


def log_p(n, head, targets):
    """log p (N,) float32 of targets (N,), the logits being n·headᵀ for n (N, C) and head (V, C)."""
    return HeadLogProbability.apply(n, head, targets)


class HeadLogProbability(torch.autograd.Function):
    """The gradient towards n is made in the forward pass: C numbers a position are kept, not V.

    A head that is trained itself needs the logits once more in the backward pass.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, n, head, targets):
        result = torch.empty(len(n), device=n.device)
        slope = torch.empty_like(n)                                     # (N, C) ∂ log p_y / ∂ n
        for piece in pieces(n, head):
            logits = F.linear(n[piece], head).float()                   # (size, V)
            y = targets[piece, None]                                    # (size, 1)
            chosen = logits.gather(1, y)                                # (size, 1)
            log_sum = logits.logsumexp(-1, keepdim=True)
            # log p_y = logit_y − log Σ exp(logits)
            result[piece] = (chosen - log_sum).squeeze(1)
            if ctx.needs_input_grad[0]:
                step = residual(logits, y).to(head.dtype)
                slope[piece] = step @ head
        ctx.save_for_backward(n, head, targets, slope)
        return result

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, gradient):
        n, head, targets, slope = ctx.saved_tensors
        gradient = gradient[:, None]                                    # (N, 1)
        to_n = (gradient * slope).to(n.dtype)
        to_head = None
        if ctx.needs_input_grad[1]:
            to_head = torch.zeros_like(head)
            for piece in pieces(n, head):
                logits = F.linear(n[piece], head).float()
                y = targets[piece, None]
                step = gradient[piece] * residual(logits, y)
                step = step.to(n.dtype)
                to_head += step.T @ n[piece]
        return to_n, to_head, None


def pieces(n, head):
    """Slices of the positions, each with at most LOGITS logits."""
    size = max(1, LOGITS // len(head))
    for at in range(0, len(n), size):
        yield slice(at, at + size)


def residual(logits, y):
    """∂ log p_y / ∂ logits = onehot(y) − p, (N, V), of logits (N, V) and tokens y (N, 1)."""
    minus_p = torch.softmax(logits, dim=-1).neg_()
    ones = torch.ones_like(minus_p[:, :1])
    return minus_p.scatter_add_(1, y, ones)
