"""A recurrent language model: what it remembers of a text is one vector, rewritten at every character.

Elman, *Finding Structure in Time*, Cognitive Science 1990 (nn.RNN); Cho et al., *Learning Phrase
Representations using RNN Encoder-Decoder*, EMNLP 2014, section 2.3 (nn.GRU).

Derived in: 04_language_modelling/05_recurrent_network
"""

from torch import Tensor, nn


class RecurrentLM(nn.Module):
    """V characters, each embedded in E numbers; H hidden units; `cell` is nn.RNN or nn.GRU."""

    def __init__(self, V: int, E: int, H: int, cell: type[nn.RNN] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, E)
        self.recurrent = cell(E, H, batch_first=True)
        self.output = nn.Linear(H, V)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids (B, T) -> logits (B, T, V); the state is the last hidden state, (1, B, H), zeros for None."""
        hidden, state = self.recurrent(self.embedding(ids), state)  # (B, T, E) -> (B, T, H), (1, B, H)
        return self.output(hidden), state
