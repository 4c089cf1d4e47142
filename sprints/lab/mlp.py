"""A feed-forward language model: the last K characters, embedded, side by side, through one hidden layer.

Bengio, Ducharme, Vincent and Jauvin, *A Neural Probabilistic Language Model*, JMLR 2003, section 2.

Derived in: 04_language_modelling/04_mlp_language_model
"""

import torch
from torch import Tensor, nn


class WindowMLP(nn.Module):
    """V characters, K of them in view, each embedded in E numbers; H hidden units."""

    def __init__(self, V: int, K: int, E: int, H: int) -> None:
        super().__init__()
        self.K = K
        self.embedding = nn.Embedding(V + 1, E)  # the last one stands for nothing: no character at all
        self.hidden = nn.Linear(K * E, H)
        self.output = nn.Linear(H, V)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids (B, T) -> logits (B, T, V); the state is the K - 1 characters before them, (B, K - 1)."""
        if state is None:
            state = ids.new_full((len(ids), self.K - 1), self.embedding.num_embeddings - 1)
        seen = torch.cat([state, ids], dim=1)  # (B, K - 1 + T)
        vectors = self.embedding(seen).unfold(1, self.K, 1)  # (B, K - 1 + T, E) -> (B, T, E, K)
        hidden = self.hidden(vectors.mT.flatten(2)).relu()  # (B, T, E, K) -> (B, T, K·E) -> (B, T, H)
        return self.output(hidden), seen[:, ids.shape[1] :]  # the last K - 1 of what was seen
