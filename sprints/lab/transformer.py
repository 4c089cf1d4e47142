"""The blocks of a transformer, and the whole of it as in *Attention Is All You Need* (Vaswani et al. 2017).

A block is put together from its parts, so that another kind of part is another class and not a switch:

    block = EncoderBlock(
        PreNorm(MultiHeadAttention(C, H), nn.LayerNorm(C)), PreNorm(FeedForward(C, 4 * C), nn.LayerNorm(C))
    )
    y = block(x, mask)               # x (B, T, C), mask as in lab.attention: True means look -> (B, T, C)
    y = block(x, causal=True)        # the same block is a GPT's, if it looks only back

Derived in: 07_transformer_block/07_encoder_decoder
"""

import math
from collections.abc import Callable

from lab.attention import MultiHeadAttention
from lab.positions import sinusoids

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Sequential):
    """Each position by itself: C -> hidden -> C (Vaswani et al. 2017, eq. 2, with ReLU). Lesson 03."""

    def __init__(
        self, C: int, hidden: int, activation: Callable[[], nn.Module] = nn.GELU, bias: bool = True
    ) -> None:
        super().__init__(nn.Linear(C, hidden, bias), activation(), nn.Linear(hidden, C, bias))

    def copy(self, theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
        """Take over the weights of the feed-forward network in PyTorch's own layer."""
        self[0].load_state_dict(theirs.linear1.state_dict())
        self[2].load_state_dict(theirs.linear2.state_dict())


class SwiGLU(nn.Module):
    """(silu(x W) · x V) U: 3·C·hidden weights, no bias (Shazeer 2020, eq. 6). Derived in lesson 03."""

    def __init__(self, C: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(C, hidden, bias=False), nn.Linear(C, hidden, bias=False)
        self.down = nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, C)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PreNorm(nn.Module):
    """x + sublayer(norm(x)): what is added is made from a normalised copy (Xiong et al. 2020). Lesson 06."""

    def __init__(self, sublayer: nn.Module, norm: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.sublayer, self.norm, self.dropout = sublayer, norm, nn.Dropout(dropout)

    def forward(self, x: Tensor, *others: object, **options: object) -> Tensor:
        """(B, T, C) -> (B, T, C); whatever else is given goes to the sublayer."""
        return x + self.dropout(self.sublayer(self.norm(x), *others, **options))


class PostNorm(PreNorm):
    """norm(x + sublayer(x)): the sum itself is normalised each time (Vaswani et al. 2017). Lesson 06."""

    def forward(self, x: Tensor, *others: object, **options: object) -> Tensor:
        """(B, T, C) -> (B, T, C); whatever else is given goes to the sublayer."""
        return self.norm(x + self.dropout(self.sublayer(x, *others, **options)))


class EncoderBlock(nn.Module):
    """A sequence looks at itself, then each position is worked on alone. Derived in lesson 04."""

    def __init__(self, attention: PreNorm, feed_forward: PreNorm) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
        """x (B, T, C), mask and options as MultiHeadAttention takes them -> (B, T, C)."""
        return self.feed_forward(self.attention(x, mask, **options))

    def copy(self, theirs: nn.TransformerEncoderLayer) -> "EncoderBlock":
        """Take over the weights of PyTorch's own block."""
        self.attention.sublayer.copy(theirs.self_attn)
        self.feed_forward.sublayer.copy(theirs)
        for part, norm in zip((self.attention, self.feed_forward), (theirs.norm1, theirs.norm2), strict=True):
            part.norm.load_state_dict(norm.state_dict())
        return self


class DecoderBlock(nn.Module):
    """A sequence looks back at itself, then at a source; then each position alone. Derived in lesson 05."""

    def __init__(self, attention: PreNorm, cross_attention: PreNorm, feed_forward: PreNorm) -> None:
        super().__init__()
        self.attention, self.cross_attention = attention, cross_attention
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = True,
    ) -> Tensor:
        """x (B, T, C), source (B, S, C) -> (B, T, C).

        A `mask` of x, such as that of its padding, comes on top of the causal one, unless causal=False.
        """
        x = self.attention(x, mask, causal=causal)
        x = self.cross_attention(x, source_mask, source=source)
        return self.feed_forward(x)

    def copy(self, theirs: nn.TransformerDecoderLayer) -> "DecoderBlock":
        """Take over the weights of PyTorch's own block."""
        self.attention.sublayer.copy(theirs.self_attn)
        self.cross_attention.sublayer.copy(theirs.multihead_attn)
        self.feed_forward.sublayer.copy(theirs)
        parts, norms = (
            (self.attention, self.cross_attention, self.feed_forward),
            (theirs.norm1, theirs.norm2, theirs.norm3),
        )
        for part, norm in zip(parts, norms, strict=True):
            part.norm.load_state_dict(norm.state_dict())
        return self


class Transformer(nn.Module):
    """An encoder reads a source, a decoder writes a target: L blocks each, H heads, width C.

    V           tokens that source and target share; one matrix embeds them and scores them (section 3.4)
    longest     places, at most, in either sequence
    residual    PostNorm as in the paper, or PreNorm, which is normalised once more at the end of each half
    """

    def __init__(
        self, V: int, C: int, H: int, L: int, hidden: int, longest: int,
        residual: type[PreNorm] = PostNorm, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()

        def around(sublayer: nn.Module) -> PreNorm:
            return residual(sublayer, nn.LayerNorm(C), dropout)

        def attention() -> PreNorm:
            return around(MultiHeadAttention(C, H))

        def feed_forward() -> PreNorm:
            return around(FeedForward(C, hidden, nn.ReLU))

        self.embedding, self.dropout = nn.Embedding(V, C), nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderBlock(attention(), feed_forward()) for _ in range(L))
        self.decoder = nn.ModuleList(DecoderBlock(attention(), attention(), feed_forward()) for _ in range(L))
        last = nn.Identity if residual is PostNorm else nn.LayerNorm
        self.encoder_norm, self.decoder_norm = last(C), last(C)
        self.register_buffer("positions", sinusoids(longest, C), persistent=False)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(C))

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        return self.dropout(
            self.embedding(ids) * math.sqrt(self.embedding.embedding_dim) + self.positions[: ids.shape[1]]
        )

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """(B, S) -> (B, S, C); a source_mask (B, 1, S) is True where there is no padding."""
        x = self.embed(source)
        for block in self.encoder:
            x = block(x, source_mask)
        return self.encoder_norm(x)

    def decode(
        self,
        target: Tensor,
        encoded: Tensor,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = True,
    ) -> Tensor:
        """What follows each place of the target: (B, T), (B, S, C) -> logits (B, T, V)."""
        x = self.embed(target)
        for block in self.decoder:
            x = block(x, encoded, source_mask, mask, causal=causal)
        return self.decoder_norm(x) @ self.embedding.weight.T

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = True,
    ) -> Tensor:
        """(B, S), (B, T) -> logits (B, T, V). Masks as DecoderBlock takes them."""
        return self.decode(target, self.encode(source, source_mask), source_mask, mask, causal=causal)

    @torch.no_grad()
    def write(
        self,
        source: Tensor,
        begin: int,
        end: int,
        T: int,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = True,
    ) -> Tensor:
        """Free-running: `begin`, then T times the likeliest token; after `end` only `end`: (B, T)."""
        encoded, written = self.encode(source, source_mask), source.new_full((len(source), 1), begin)
        for t in range(1, T + 1):
            so_far = None if mask is None else mask[..., :t, :t]
            logits = self.decode(written, encoded, source_mask, so_far, causal=causal)[:, -1]  # (B, V)
            likeliest = logits.argmax(-1, keepdim=True).where(written[:, -1:] != end, end)  # (B, 1)
            written = torch.cat([written, likeliest], dim=1)
        return written[:, 1:]
