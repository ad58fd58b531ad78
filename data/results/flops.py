"""Arithmetic of drawing a token: multiply-adds, counted twice, by hand. eval.py prints them.

Whatever is looked up or computed once is not counted; what is, is said at each function. `lm` is an
LM of model.py, `model` an LM or an L2D of diffusion.py, `settings` those of sample.py.
"""


def matrix_flops(*modules) -> int:
    """Multiply-adds, counted twice, of one vector through every matrix of these modules."""
    # by identity: a head that is tied to the embedding is one matrix
    matrices = {id(p): p for module in modules for p in module.parameters() if p.dim() == 2}
    return 2 * sum(p.numel() for p in matrices.values())


def frozen_flops(lm, length: int) -> int:
    """One token through the frozen model after `length` others, without the head."""
    return matrix_flops(*lm.blocks) + attention_flops(lm.config, length)


def attention_flops(config, length: int) -> int:
    # q·kᵀ and p·v: each a product and a sum for every token, head and channel
    return 4 * config.layers * length * config.heads * config.head_dim


def evaluation_flops(model, length: int, settings) -> int:
    """One evaluation of the diffusion path after `length` tokens, the head included."""
    lm = model.lm
    config = lm.config
    total = attention_flops(config, length) + matrix_flops(model.from_z, lm.head)
    for block in model.blocks:
        # keys and values are there already: the path multiplies neither K nor V
        total += used_flops(block.q, block.o, block.mlp)
    if model.config.self_conditioning:
        # the guess is read: p @ E touches all of the vocabulary
        total += 2 * config.vocab_size * config.hidden_size + matrix_flops(model.from_prediction)
    # p @ V as well, argmax a single row
    if settings.estimate == "average":
        total += 2 * config.vocab_size * model.config.width
    return total


def used_flops(*modules) -> int:
    """Of matrices of the path: one product with the sum W + BA where it is folded, else three."""
    total = matrix_flops(*modules)
    for module in modules:
        for part in module.modules():
            # of a LoRA, where it has been folded
            if getattr(part, "merged", None) is not None:
                total -= 2 * (part.A.numel() + part.B.numel())
    return total


def own_kv_flops(model, length: int) -> int:
    """One token through the path's own layers, where it keeps keys and values of its own."""
    if not model.config.own_kv:
        return 0
    products = sum(used_flops(*block.children()) for block in model.blocks)
    # the modulation is looked up
    products -= sum(matrix_flops(block.modulation) for block in model.blocks)
    return products + attention_flops(model.lm.config, length)


def flops_per_token(model, nfe: float, length: int, settings) -> float:
    """To draw one token after `length` others: the tokens read, and `nfe` evaluations.

    What depends on the time alone is looked up, V is made once: neither is counted. The evaluation
    at t = 0 needs the head alone; with guidance there are two of them.
    """
    lm = getattr(model, "lm", model)
    frozen = frozen_flops(lm, length)
    if not settings.steps:
        return frozen + matrix_flops(lm.head)
    read = frozen + own_kv_flops(model, length)
    at_zero = matrix_flops(lm.head)
    return read + at_zero + (nfe - 1) * evaluation_flops(model, length, settings)
