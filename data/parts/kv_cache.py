"""KV cache: keys and values of all tokens so far, in buffers with room for more.

model.py appends to it, sample.py has one for each batch.
"""

import torch

MIN_ROOM = 64       # a new cache has room for twice as many tokens


class KVCache:
    """A buffer (B, G, room, D) of keys and one of values per layer, `length` places filled.

    A layer is any number: those of the path's own keys and values follow those of the model.
    documents  (B, length), or None where every row is one document
    """

    def __init__(self):
        self.keys = {}
        self.values = {}
        self.documents = None
        self.length = 0

    def extend(self, documents, tokens: int):
        """Count new tokens and append their documents (B, T).

        Returns those of all tokens, (B, S), or None.
        """
        self.length += tokens
        if documents is not None and self.documents is not None:
            documents = torch.cat((self.documents, documents), dim=1)
        self.documents = documents
        return documents

    def append(self, layer: int, k, v) -> list:
        """Write keys and values (B, G, T, D) of new tokens; returns those of all, (B, G, S, D)."""
        start = self.length - k.shape[2]
        filled = []
        for buffers, new in ((self.keys, k), (self.values, v)):
            old = buffers.get(layer)
            if old is None or self.length > old.shape[2]:
                # twice as long: over a whole text a token is then moved about once
                batch, heads, _, width = new.shape
                longer = new.new_empty(batch, heads, 2 * max(self.length, MIN_ROOM), width)
                if old is not None:
                    longer[:, :, :start] = old[:, :, :start]
                buffers[layer] = longer
            buffers[layer][:, :, start:self.length] = new
            filled.append(buffers[layer][:, :, :self.length])
        return filled

    def spread(self, shifts: list, documents):
        """From one row to several, each the same tokens moved to the right by its shift.

        documents  (B, length) of the new rows, padding included, or None
        """
        for buffers in (self.keys, self.values):
            for layer, buffer in buffers.items():
                rows = buffer.new_zeros(len(shifts), *buffer.shape[1:])
                for row, shift in enumerate(shifts):
                    rows[row, :, shift:self.length] = buffer[0, :, :max(0, self.length - shift)]
                buffers[layer] = rows
        self.documents = documents

    def keep(self, index):
        """Drop all sequences of the batch but those at index (n,)."""
        for buffers in (self.keys, self.values):
            for layer, buffer in buffers.items():
                buffers[layer] = buffer[index]
        if self.documents is not None:
            self.documents = self.documents[index]
