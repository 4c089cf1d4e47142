"""Tables of n-grams: how often each character followed each n - 1 others, as a language model.

    model = NGram(corpus.train, corpus.V, n=3, smoothing=0.1)
    logits, state = model(ids)                    # (B, T) -> log-probabilities (B, T, V)

Its state is the last n - 1 characters. Where nothing came before, the first character is taken to stand there
again: before a story that is a newline, so nothing but newlines.

Source: Chen and Goodman 1999, An Empirical Study of Smoothing Techniques for Language Modeling, section 2.1.

Derived in: 04_language_modelling/01_next_character
"""

from lab import BadInput

import torch
from torch import Tensor

LARGEST = 2**25  # entries of a table; 54 characters allow n = 4


class NGram:
    """
    counts  (V^(n-1), V) how often each character came after each n - 1 characters, read as a number to base V
    table   (V^(n-1), V) the log-probabilities: `smoothing` is added to every count; a row without any
            count, smoothed or not, is uniform
    """

    def __init__(self, ids: Tensor, V: int, n: int, smoothing: float) -> None:
        if V**n > LARGEST:
            raise BadInput(f"a table of {n}-grams over {V} different characters has {V**n:,} entries")
        self.n = n
        self.base = torch.tensor([V**place for place in reversed(range(n))], device=ids.device)  # (n,)
        ngrams = ids.unfold(0, n, 1)  # (S,) -> (S - n + 1, n), a view
        self.counts = torch.bincount((ngrams * self.base).sum(-1), minlength=V**n).view(-1, V)
        smoothed = self.counts + float(smoothing)
        total = smoothed.sum(-1, keepdim=True)  # (V^(n-1), 1)
        self.table = torch.where(total > 0, smoothed / total, 1 / V).log()

    def __call__(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T) -> logits (B, T, V) for the next characters, and the last n - 1 characters (B, n - 1)."""
        before = ids[:, :1].expand(-1, self.n - 1) if state is None else state  # (B, n - 1)
        known = torch.cat([before, ids], dim=1)  # (B, n - 1 + T)
        contexts = known.unfold(1, self.n - 1, 1)[:, 1:]  # (B, T, n - 1): up to and with each character
        rows = (contexts * self.base[1:]).sum(-1)  # (B, T)
        return self.table[rows], known[:, ids.shape[1] :]
