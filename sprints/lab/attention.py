"""Multi-head attention, for one sequence that looks at itself or for one that looks at another.

    attention = MultiHeadAttention(C, H)
    y = attention(x, causal=True)                               # x (B, T, C) -> y (B, T, C)
    y = attention(x, padding_mask(lengths, T))                  # nobody looks at padding
    y = attention(x, padding_mask(lengths, S), source=source)   # source (B, S, C)

**In every mask here True means look**, as in F.scaled_dot_product_attention. (In nn.MultiheadAttention True
means hide.) A query that may look at nothing gets the zero vector as its mean.

Derived in: 06_attention/04_multi_head_attention
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def causal_mask(T: int, S: int | None = None, device: torch.device | None = None) -> Tensor:
    """T queries, the last of S places, look at themselves and back: (T, S). Without S they are all places."""
    S = T if S is None else S
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def padding_mask(lengths: Tensor, S: int) -> Tensor:
    """Everyone looks at the first `lengths` places, not at the padding behind: (B,) -> (B, 1, S)."""
    return (torch.arange(S, device=lengths.device) < lengths[:, None])[:, None]  # (B, S) -> (B, 1, S)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) over the keys (Vaswani et al. 2017, eq. 1), 0 where a query may not look.

    q (…, T, D), k (…, S, D), mask broadcastable to (…, T, S) -> (…, T, S). attend() is faster.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is None:
        return scores.softmax(-1)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)  # a row of -inf has NaN


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """attention_weights(q, k, mask) @ v by PyTorch's fused kernels.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D)
    causal    queries look at no later place than their own, the last query being at the last key
    k and v   may have fewer heads than q, each for a group of neighbouring heads of q (Ainslie et al. 2023)
    """
    T, S = q.shape[-2], k.shape[-2]
    grouped = q.shape[-3] != k.shape[-3]
    if causal and mask is None and T == S <= 512 and not grouped and q.dtype == torch.bfloat16 and q.is_cpu:
        # The fused kernel saves memory, but on a CPU it takes four times as long as this.
        hidden = q.new_full((T, T), -torch.inf).triu(1)
        scores = torch.baddbmm(hidden, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=1 / math.sqrt(q.shape[-1]))
        return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])  # (B·H, T, D) -> (B, H, T, D)
    if causal and mask is None and T == S:  # the kernels' own: it puts the first query at the first key
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if causal and T > 1:
        earlier = causal_mask(T, S, q.device)
        mask = earlier if mask is None else mask & earlier
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    blind = ~mask.any(-1, keepdim=True)  # kernels differ in what they give for a row with nothing to look at
    return F.scaled_dot_product_attention(q, k, v, mask | blind, enable_gqa=grouped).masked_fill(blind, 0)


class MultiHeadAttention(nn.Module):
    """H heads of width D = C / H (Vaswani et al. 2017, section 3.2.2).

    C         width of the sequence that looks
    groups    heads of keys and values, a divisor of H: H for a pair for each head, 1 for one pair for all
    source    width of the sequence that is looked at, C if not given
    bias      whether the four projections have one
    prepare   changes queries and keys before they meet, such as lab.modern.Rotary does: prepare(q, k, before)
              gets (B, H, T, D) and (B, groups, T, D), the first at place `before`, and returns both
    """

    def __init__(
        self,
        C: int,
        H: int,
        *,
        groups: int | None = None,
        source: int | None = None,
        bias: bool = True,
        prepare: nn.Module | None = None,
    ) -> None:
        super().__init__()
        groups, source = H if groups is None else groups, source or C
        if C % H or groups < 1 or H % groups:
            raise ValueError(f"{C} numbers cannot be shared by {H} heads in {groups} groups")
        self.D = C // H
        self.query = nn.Linear(C, C, bias=bias)
        self.key = nn.Linear(source, groups * self.D, bias=bias)
        self.value = nn.Linear(source, groups * self.D, bias=bias)
        self.output = nn.Linear(C, C, bias=bias)
        self.prepare = prepare

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H·D) -> (B, H, T, D)."""
        return x.unflatten(-1, (-1, self.D)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        source: Tensor | None = None,
        causal: bool = False,
        cache=None,
    ) -> Tensor:
        """x (B, T, C) looks at source (B, S, source), or at itself -> (B, T, C).

        mask     True means look: (T, S), for each text (B, 1, S) or (B, T, S), for each head (B, H, T, S)
        causal   no query looks past its own place, either
        cache    cache(k, v) keeps new keys and values (B, groups, S, D) and returns all so far; asked at
                 every call, so that a source given twice is kept twice
        """
        source = x if source is None else source
        q, k, v = self.heads(self.query(x)), self.heads(self.key(source)), self.heads(self.value(source))
        if self.prepare is not None:
            q, k = self.prepare(q, k, cache.length if cache is not None else 0)
        if cache is not None:
            k, v = cache(k, v)
        mixed = attend(q, k, v, _for_heads(mask), causal=causal)  # (B, H, T, D)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)

    def weights(
        self, x: Tensor, mask: Tensor | None = None, *, source: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """How much each head looks where in forward(…): (B, H, T, S)."""
        source = x if source is None else source
        q, k = self.heads(self.query(x)), self.heads(self.key(source))
        if self.prepare is not None:
            q, k = self.prepare(q, k, 0)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, groups, S, D) -> (B, H, S, D)
        mask = _for_heads(mask)
        if causal:
            earlier = causal_mask(q.shape[-2], k.shape[-2], q.device)
            mask = earlier if mask is None else mask & earlier
        return attention_weights(q, k, mask)

    @torch.no_grad()
    def copy(self, theirs: nn.MultiheadAttention) -> "MultiHeadAttention":
        """Take over the weights of PyTorch's own, which keeps query, key and value in one matrix (3C, C).

        ValueError if it has another number of heads, or does what this module does not.
        """
        plain = theirs.in_proj_weight is not None and theirs.in_proj_bias is not None
        if not plain or theirs.head_dim != self.D or theirs.bias_k is not None or theirs.add_zero_attn:
            raise ValueError(f"no copy of {theirs}: as many heads, biases, and nothing beyond are needed")
        ours = self.query, self.key, self.value
        for layer, weight, bias in zip(
            ours, theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        self.output.load_state_dict(theirs.out_proj.state_dict())
        return self


def _for_heads(mask: Tensor | None) -> Tensor | None:
    """A mask for each text (B, T, S) is one for each of its heads: (B, 1, T, S)."""
    return mask[:, None] if mask is not None and mask.ndim == 3 else mask
