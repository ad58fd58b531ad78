"""Arithmetic per token, counted from shapes: a multiply-add is two operations. eval.py prints it.

Table look-ups and values computed once are not counted. `lm` is an LM of model.py, `model` an LM or
an L2D of diffusion.py, `settings` the Settings of sample.py.
"""


def matrix_flops(*modules) -> int:
    """Operations of one vector through every matrix of these modules."""
    # by identity: a head that is tied to the embedding is one matrix
    matrices = {id(p): p for module in modules for p in module.parameters() if p.dim() == 2}
    return 2 * sum(p.numel() for p in matrices.values())


def attention_flops(config, length: int) -> int:
    """q·kᵀ and p·v of one token over `length` others, in all layers."""
    return 4 * config.layers * length * config.heads * config.head_dim


def frozen_flops(lm, length: int) -> int:
    """One token through the frozen model after `length` others, without the head."""
    return matrix_flops(*lm.blocks) + attention_flops(lm.config, length)


def path_flops(*modules) -> int:
    """Matrices of the path: one product with W + BA where LoRA is merged, otherwise three."""
    total = matrix_flops(*modules)
    for module in modules:
        for part in module.modules():
            if getattr(part, "merged", None) is not None:
                total -= 2 * (part.A.numel() + part.B.numel())
    return total


def evaluation_flops(model, length: int, settings) -> int:
    """One evaluation of the path after `length` tokens, including the head."""
    lm = model.lm
    config = lm.config
    total = attention_flops(config, length) + matrix_flops(model.from_z, lm.head)
    for block in model.blocks:
        # keys and values are cached, but with self_kv those of the own place
        own = (block.k, block.v) if model.config.self_kv else ()
        total += path_flops(block.q, block.o, block.mlp, *own)
    if model.config.self_conditioning:
        total += matrix_flops(model.from_prediction)
        # p @ E of the previous prediction; of a few words it is a look-up
        if model.config.prediction_words is None:
            total += 2 * config.vocab_size * config.hidden_size
    # p @ V; argmax looks up one row instead
    if settings.estimate == "average":
        total += 2 * config.vocab_size * model.config.width
    return total


def own_kv_flops(model, length: int) -> int:
    """One token through the path's layers for its own keys and values; 0 without own_kv."""
    if not model.config.own_kv:
        return 0
    # without the modulation, a table look-up; of the last layer, keys and values alone
    *others, last = model.blocks
    products = path_flops(last.k, last.v) + sum(
        path_flops(block.q, block.k, block.v, block.o, block.mlp) for block in others)
    config = model.lm.config
    return products + attention_flops(config, length) * len(others) // config.layers


def flops_per_token(model, nfe: float, length: int, settings) -> float:
    """One token after `length` others: reading a token, and `nfe` evaluations.

    The evaluation at t = 0 needs the head alone; guidance by another weight than 0 and 1 makes two
    of them.
    """
    lm = model.lm
    frozen = frozen_flops(lm, length)
    head = matrix_flops(lm.head)
    if not settings.steps:
        return frozen + head
    read = frozen + own_kv_flops(model, length)
    first = 1 if settings.guidance in (0, 1) else 2
    return read + first * head + (nfe - first) * evaluation_flops(model, length, settings)
