"""LoRA, low-rank corrections of frozen matrices (Hu et al. 2021): in the path, and its baseline.

model.py builds the path's layers with `adapt`; for --method=lora train.py replaces every matrix of
a model by a LoRA, and merges it before saving.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.parts.layout import by_inputs


class LoRA(nn.Module):
    """A frozen Linear plus a trainable low-rank correction (Hu et al. 2021).

    A starts as N(0, 1)/r and B as zero, as in the L2D code: training starts from the frozen matrix.
    """

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float):
        super().__init__()
        device = frozen.weight.device
        self.frozen = frozen
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.randn(frozen.in_features, rank, device=device) / rank)
        self.B = nn.Parameter(torch.zeros(rank, frozen.out_features, device=device))
        self.merged = None             # W + (α/r)·BA, while sampling

    def forward(self, x):
        if self.merged is not None:
            return F.linear(x, self.merged, self.frozen.bias)
        low = x @ self.A.to(x.dtype)                                    # (..., r)
        correction = low @ self.B.to(x.dtype)
        # y = W·x + (α/r)·B·A·x
        return self.frozen(x) + self.scale * correction

    @torch.no_grad()
    def sum(self):
        """W + (α/r)·BA, in the frozen matrix's own type."""
        correction = self.scale * (self.A @ self.B).T
        return self.frozen.weight + correction.to(self.frozen.weight.dtype)


def merge_lora(module: nn.Module, on: bool):
    """Merge every LoRA in a module into a copy of its matrix, or undo that.

    One product instead of three, for the memory of the copy.
    """
    for inside in module.modules():
        if isinstance(inside, LoRA):
            inside.merged = by_inputs(inside.sum()) if on else None


def adapt(frozen: nn.Linear | None, rank: int | None, alpha: float):
    """A trainable matrix in place of a frozen one: that one plus LoRA, or a full copy."""
    # GPT-2 has no gate
    if frozen is None:
        return None
    if rank is not None:
        return LoRA(frozen, rank, alpha)
    copy = nn.Linear(frozen.in_features, frozen.out_features, bias=frozen.bias is not None,
                     device=frozen.weight.device)
    # the path starts as the frozen layer
    copy.load_state_dict(frozen.state_dict())
    return copy


# --- a whole model at once ------------------------------------------------------------------------

def replace_linears(lm, kind, convert):
    """Replace every matrix of this kind in every block by convert(matrix)."""
    for block in lm.blocks:
        for owner in (block, block.mlp):
            # a list, since the loop replaces modules
            for name, module in list(owner.named_children()):
                if isinstance(module, kind):
                    setattr(owner, name, convert(module))


@torch.no_grad()
def merge_linear(adapted: LoRA) -> nn.Linear:
    """The frozen matrix with its correction added for good, in float32: bfloat16 loses bits."""
    adapted.frozen.float()
    adapted.frozen.weight.copy_(adapted.sum())
    return adapted.frozen
