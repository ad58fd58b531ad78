"""AdamW and its learning rate. train.py makes a step with them; read that next."""

import torch

BETAS = (0.9, 0.95)        # as in the paper


def build_optimizer(trainable: dict, args):
    """AdamW; matrices decay, biases and norms do not."""
    # decay pulls towards zero, which is where a matrix may be but not the scale of a norm
    matrices = [p for p in trainable.values() if p.dim() >= 2]
    vectors = [p for p in trainable.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, fused=True)


def learning_rate(update: int, args) -> float:
    """Linear warm-up, then linear decay from lr to min_lr at the last update."""
    if update < args.warmup:
        return args.lr * (update + 1) / args.warmup
    # a run as long as its warm-up has no decay to divide by
    progress = (update - args.warmup) / max(1, args.updates - args.warmup)
    return args.lr + progress * (args.min_lr - args.lr)
