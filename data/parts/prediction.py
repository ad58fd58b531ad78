"""A prediction as one evaluation hands it on to the next: of all words, or the likeliest alone.

With k words a gather replaces the product with a matrix of V rows, in training and in sampling
alike. diffusion.py reads it as vectors: of the tokens, and of the diffusion vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.parts.log_p import likeliest, log_p


@dataclass(frozen=True)
class Prediction:
    """Logits (..., k) of the words at ids (..., k), or without ids those of all, (..., V)."""
    logits: torch.Tensor
    ids: torch.Tensor | None = None

    @classmethod
    def of(cls, logits, words: int | None) -> "Prediction":
        """The `words` likeliest by the logits (..., V) of all; None: all of them."""
        if words is None:
            return cls(logits)
        return cls(*logits.topk(min(words, logits.shape[-1])))

    def at(self, index) -> "Prediction":
        """Of some of the positions."""
        return Prediction(self.logits[index], None if self.ids is None else self.ids[index])

    def join(self, others: "Prediction") -> "Prediction":
        """Of these positions and then others, read in the same way."""
        ids = None if self.ids is None else torch.cat((self.ids, others.ids))
        return Prediction(torch.cat((self.logits, others.logits)), ids)

    def mean(self, table):
        """Σ_y p_y·table_y of a table (V, width): (..., width)."""
        p = self.logits.float().softmax(-1).to(table.dtype)             # (..., k)
        if self.ids is None:
            return p @ table
        rows = F.embedding_bag(self.ids.flatten(0, -2), table, mode="sum",
                               per_sample_weights=p.flatten(0, -2))
        return rows.view(*p.shape[:-1], -1)

    def mean_of(self, vectors):
        """The same of the rows vectors(ids), computed for the words that occur alone."""
        ids, place = self.ids.unique(return_inverse=True)
        return Prediction(self.logits, place).mean(vectors(ids))

    def p_of(self, y):
        """p (N, 1) of tokens y (N,); 0 where one is not among the words."""
        p = self.logits.softmax(-1)                                     # (N, k)
        if self.ids is None:
            return p.gather(1, y[:, None])
        return (p * (self.ids == y[:, None])).sum(1, keepdim=True)


def predict_after(lm, hidden, words: int | None, y=None) -> tuple:
    """(Prediction of the tokens after hidden (N, C), −log p (N,) of the tokens y (N,) or None).

    Without y there is no gradient.
    """
    if words is None:
        logits = lm.logits(hidden).float()                              # (N, V)
        loss = None if y is None else F.cross_entropy(logits, y, reduction="none")
        return Prediction(logits), loss
    n, head = lm.ln_f(hidden), lm.head.weight
    words = min(words, len(head))
    if y is None:
        return Prediction(*likeliest(n, head, words)), None
    found, *_, logits, ids = log_p(n, head, y, torch.is_grad_enabled(), words=words)
    return Prediction(logits, ids), -found
