"""Positions as vectors, to be added to those of the tokens.

Vaswani et al. 2017, *Attention Is All You Need*, section 3.5.

Derived in: 05_embeddings_and_positions/03_sinusoidal_positions
"""

import torch
from torch import Tensor


def sinusoids(T: int, C: int) -> Tensor:
    """sin(t·ωᵢ) and cos(t·ωᵢ) side by side, ωᵢ = 10000^(-2i/C), for positions 0 to T - 1: (T, C), C even."""
    frequencies = 10_000 ** -(torch.arange(0, C, 2, dtype=torch.float64) / C)  # (C/2,)
    angles = torch.arange(T)[:, None] * frequencies  # (T, C/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()  # (T, C/2, 2) -> (T, C)
