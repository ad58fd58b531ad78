"""States: all that the diffusion path reads of the frozen model, for all tokens or for some.

model.py computes them, once a token; the path reads them at every evaluation.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class FrozenStates:
    """What the frozen model computed for some tokens: all that the diffusion path reads.

    hidden        (B, T, C) last hidden state of these tokens, before the final norm
    keys, values  L tensors (B, G, S, D) of all tokens so far, keys already rotated
    positions     (B or 1, T) of these tokens, each document counted from 0
    mask          (B or 1, 1, T, S) True where a token may attend, or None: plain causal;
                  or the borders of packed documents
    cos_sin       (B or 1, 2, T, D/2) of their rotary angles, or None
    inputs        (B, T, C) their embeddings
    index         rows and columns, two tensors (N,), if only these N of the tokens are to be
                  predicted from: then hidden and inputs are (N, C) and positions (N,), or (N, 1, C)
                  and (N, 1); the keys are those of all tokens
    size          (B, T), where there is an index
    """
    hidden: torch.Tensor
    keys: tuple
    values: tuple
    positions: torch.Tensor
    mask: torch.Tensor | tuple | None
    cos_sin: torch.Tensor | None
    inputs: torch.Tensor
    index: tuple | None = None
    size: tuple | None = None

    def at(self, index) -> "FrozenStates":
        """The same for N of the tokens; all of them stay to be attended to.

        Few tokens of packed documents are N sequences of one token, without an index.
        """
        size = self.hidden.shape[:2]
        some = replace(self, hidden=self.hidden[index], inputs=self.inputs[index],
                       positions=self.positions.expand(size)[index], index=index, size=size)
        if isinstance(self.mask, tuple) and len(some.hidden):
            return some.gathered()
        return some

    def gathered(self) -> "FrozenStates":
        """The tokens at the index of packed documents, each behind a copy of its document's keys.

        With an index every place of every document attends. Of many tokens the copies would be
        more than twice the keys, and the index stays.
        """
        longest = int(self.positions.max()) + 1
        if len(self.positions) * longest > 2 * self.size.numel():
            return self
        rows, columns = (places[:, None] for places in self.index)      # (N, 1)
        # the token itself is the last: this many places before it, 0 at the end
        back = torch.arange(longest, device=rows.device).flip(0)        # (S,)
        columns = (columns - back).clamp_min(0)                         # (N, S)

        def copied(x):
            # (B, G, T, D) -> (N, G, S, D)
            return x.transpose(1, 2)[rows, columns].transpose(1, 2)

        cos_sin = self.cos_sin
        if cos_sin is not None:
            # (B, 2, T, D/2) -> (N, 2, 1, D/2)
            cos_sin = cos_sin.transpose(1, 2)[self.index].unsqueeze(2)
        return replace(
            self,
            keys=tuple(map(copied, self.keys)),
            values=tuple(map(copied, self.values)),
            mask=(back <= self.positions[:, None])[:, None, None],      # (N, 1, 1, S)
            cos_sin=cos_sin,
            index=None,
            size=None,
        )

    def alone(self) -> "FrozenStates":
        """The N tokens of an index as N sequences of one token each."""
        return replace(self, hidden=self.hidden[:, None], inputs=self.inputs[:, None],
                       positions=self.positions[:, None])

    def last(self) -> "FrozenStates":
        """The same for the last token of every sequence, from which decoding goes on."""
        mask, cos_sin = self.mask, self.cos_sin
        return replace(
            self,
            hidden=self.hidden[:, -1:],
            positions=self.positions[:, -1:],
            mask=None if mask is None else mask[:, :, -1:],
            cos_sin=None if cos_sin is None else cos_sin[:, :, -1:],
            inputs=self.inputs[:, -1:],
        )

    def rows(self, index) -> "FrozenStates":
        """The same for some sequences of the batch, index (n,)."""
        def pick(x):
            # a single row stands for all of them
            return x if x is None or len(x) != len(self.hidden) else x[index]

        if self.index:
            return replace(self, hidden=self.hidden[index], inputs=self.inputs[index],
                           positions=self.positions[index],
                           index=tuple(places[index] for places in self.index))
        return FrozenStates(
            hidden=self.hidden[index],
            keys=tuple(k[index] for k in self.keys),
            values=tuple(v[index] for v in self.values),
            positions=pick(self.positions),
            mask=pick(self.mask),
            cos_sin=pick(self.cos_sin),
            inputs=self.inputs[index],
        )

    def copies(self, count: int) -> "FrozenStates":
        """The tokens `count` times over, (count·B, T), before the same keys: no key is copied."""
        rows, tokens = self.size or self.hidden.shape[:2]
        # with an index they are as many as it has places, and of the text there are `rows`
        n = len(self.hidden)

        def repeat(x, rows):
            # a single row stands for all of them
            return x if x is None or len(x) != rows else torch.cat([x] * count)

        index = self.index
        if index:
            shifted = [index[0] + copy * rows for copy in range(count)]
            index = torch.cat(shifted), index[1].repeat(count)
        mask = self.mask
        if tokens > 1:
            # causal in every copy, which attention does not know by itself
            if mask is None:
                mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
                mask = mask.to(self.hidden.device)
            mask = torch.cat([mask] * count, dim=2)
        return replace(
            self,
            hidden=repeat(self.hidden, n),
            positions=repeat(self.positions, n),
            mask=mask,
            cos_sin=repeat(self.cos_sin, rows),
            inputs=repeat(self.inputs, n),
            index=index,
            size=self.size and (count * rows, tokens),
        )
