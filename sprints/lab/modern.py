"""A GPT put together from any parts: what is built today in place of GPT-2's, one part at a time.

    def block(C: int) -> EncoderBlock:                       # no biases, norms without weights
        attention, work = MultiHeadAttention(C, 4, bias=False), FeedForward(C, 4 * C, SquaredReLU, bias=False)
        return EncoderBlock(PreNorm(attention, plain_norm(C)), PreNorm(work, plain_norm(C)))

    model = Decoder(V, T, C, [block(C) for _ in range(2)], plain_norm(C), places=nn.Embedding(T, C))
    logits = model(ids)                                      # (B, T) -> (B, T, V), as lab.gpt.GPT's

Derived in: 11_modern_transformer/02_norms_and_biases
"""

from collections.abc import Iterable

from lab import gpt
from lab.transformer import EncoderBlock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """GPT-2's way from tokens to logits, through blocks that are given.

    blocks    each (B, T, C) -> (B, T, C), called with causal=True and a cache of its own
    norm      of what leaves the last block
    places    a vector for each place, added to the token's; None if attention itself tells places apart
    """

    def __init__(
        self,
        V: int,
        T: int,
        C: int,
        blocks: Iterable[EncoderBlock],
        norm: nn.Module,
        places: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.places, self.norm = nn.Embedding(V, C), places, norm
        self.blocks = nn.ModuleList(blocks)
        self.settings = {"V": V, "T": T, "C": C, "L": len(self.blocks)}

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        """ids (B, T) -> logits (B, T, V) for the token that follows each; cache as in lab.gpt.GPT."""
        before = cache.length if cache else 0
        x = self.tokens(ids)  # (B, T, C)
        if self.places is not None:
            x = x + self.places.weight[before : before + ids.shape[1]]
        for index, block in enumerate(self.blocks):
            x = block(x, causal=True, cache=cache.blocks[index] if cache else None)
        if cache:
            cache.length = before + ids.shape[1]
        return F.linear(self.norm(x), self.tokens.weight)  # (B, T, C) @ (C, V) -> (B, T, V)


# ── Norms, and first weights (lesson 02) ──────────────────────────────────────────────────────────────────


def plain_norm(C: int) -> nn.LayerNorm:
    """LayerNorm without weights: x less its mean, divided by its spread."""
    return nn.LayerNorm(C, elementwise_affine=False, bias=False)


def initialise(model: nn.Module, std: float, zero_outputs: bool = False) -> None:
    """As GPT-2's; with `zero_outputs`, what writes into the residual stream begins at zero."""
    gpt.initialise(model, std)
    if zero_outputs:
        for layer in gpt.outputs(model):
            nn.init.zeros_(layer.weight)


# ── Positions inside attention (lesson 03) ────────────────────────────────────────────────────────────────


class Rotary(nn.Module):
    """Turns each pair of numbers by an angle in proportion to the place (Su et al. 2021, eq. 34).

    Number i is paired with number i + D / 2. What queries and keys say of each other depends on how far
    apart they are, not on where. For MultiHeadAttention's `prepare`.
    """

    def __init__(self, D: int, T: int, base: float = 10_000.0) -> None:
        super().__init__()
        angles = torch.arange(T)[:, None] * base ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # (T, D / 2)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, q: Tensor, k: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """q (B, H, T, D), k (B, groups, T, D), the first at place `before` -> the same shapes."""
        here = slice(before, before + q.shape[-2])
        cos, sin = self.cos[here].to(q.dtype), self.sin[here].to(q.dtype)  # (T, D / 2)
        return self.turn(q, cos, sin), self.turn(k, cos, sin)

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)  # (B, H, T, D / 2) each
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Alibi(nn.Module):
    """Takes a head's slope times the distance from each score (Press et al. 2022). For `prepare`.

    The slope times a key's place is added instead, by one number more in queries and keys: what a query's own
    place adds is the same for all its keys, and softmax does not see it.
    """

    def __init__(self, H: int) -> None:
        super().__init__()
        slopes = 2.0 ** (-8 * torch.arange(1, H + 1) / H)
        self.register_buffer("slopes", slopes[:, None, None], persistent=False)  # (H, 1, 1)

    def forward(self, q: Tensor, k: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """q (B, H, T, D), k (B, H, T, D), the first at place `before` -> one number more in each."""
        scale = (q.shape[-1] + 1) ** 0.5  # attention divides by it
        places = torch.arange(before, before + k.shape[-2], device=k.device, dtype=k.dtype)[:, None]  # (T, 1)
        stretch = scale / q.shape[-1] ** 0.5
        slopes = (self.slopes.to(q.dtype) * scale).expand(*q.shape[:-1], 1)
        return torch.cat([q * stretch, slopes], -1), torch.cat([k, places.expand(*k.shape[:-1], 1)], -1)


class QueryKeyNorm(nn.Module):
    """Queries and keys of one length, so that no score runs away (Henry et al. 2020). For `prepare`.

    then    what else is done to them after it, such as Rotary
    """

    def __init__(self, then: nn.Module | None = None) -> None:
        super().__init__()
        self.then = then

    def forward(self, q: Tensor, k: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """The same shapes; each vector's mean square is 1."""
        q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
        return self.then(q, k, before) if self.then else (q, k)


# ── Feed-forward (lesson 04) ──────────────────────────────────────────────────────────────────────────────


class SquaredReLU(nn.Module):
    """max(0, x)² (So et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()
