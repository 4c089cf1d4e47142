"""lab.attention: against slow versions and against PyTorch, with masks of every shape."""

import math
from itertools import product

from lab.attention import MultiHeadAttention, attend, attention_weights, causal_mask, padding_mask

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SHAPES = [(1, 1, 1, 4, 1), (2, 5, 5, 12, 3), (3, 4, 7, 8, 8), (1, 6, 2, 15, 5)]  # B, T, S, C, H
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.fixture
def randn():
    """randn(*shape): the same numbers in every run."""
    draw = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])


def slow(q, k, v, mask):
    """One query after another; one that may look at nothing gets zeros."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, t in product(*map(range, q.shape[:3])):
        seen = mask[b, h, t]
        weights = (k[b, h, seen] @ q[b, h, t] / math.sqrt(q.shape[-1])).exp()
        if seen.any():
            y[b, h, t] = weights / weights.sum() @ v[b, h, seen]
    return y


def masks(B, H, T, S):
    """Every kind, from None to one for each head, some of which leave queries nothing to look at."""
    any_mask = torch.rand(B, H, T, S, generator=torch.Generator().manual_seed(1)) < 0.5
    shorter = padding_mask(torch.arange(B) + 1, S)[:, None]
    return [None, any_mask, any_mask[:, :1], any_mask[0, 0], any_mask[:1, :, :1], shorter, any_mask & False]


@pytest.mark.parametrize(("B", "T", "S", "C", "H"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_attend_equals_a_loop(randn, B, T, S, C, H, causal):
    q, k, v = randn(B, H, T, C // H), randn(B, H, S, C // H), randn(B, H, S, C // H)
    for mask in masks(B, H, T, S):
        rule = torch.ones(B, H, T, S, dtype=torch.bool) if mask is None else mask.expand(B, H, T, S)
        if causal:
            rule = rule & causal_mask(T, S)
        close(attend(q, k, v, mask, causal=causal), slow(q, k, v, rule))
        close(attention_weights(q, k, rule) @ v, slow(q, k, v, rule))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("B", "T", "S", "C", "H"), SHAPES)
def test_equals_pytorch(randn, B, T, S, C, H, dtype):
    theirs = nn.MultiheadAttention(C, H, batch_first=True, dtype=dtype)
    ours = MultiHeadAttention(C, H).to(dtype).copy(theirs)
    x, source = (randn(B, n, C).to(dtype).requires_grad_() for n in (T, S))
    lengths = torch.arange(B) % S + 1
    padding = padding_mask(lengths, S)
    hidden = torch.arange(S) >= lengths[:, None]  # (B, S): True means hide
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    cases = [
        (ours(x, source=source), theirs(x, source, source, need_weights=False)),
        (
            ours(x, padding, source=source),
            theirs(x, source, source, key_padding_mask=hidden, need_weights=False),
        ),
        (ours(x, causal=True), theirs(x, x, x, attn_mask=later, need_weights=False)),
        (ours(x, causal_mask(T)), theirs(x, x, x, attn_mask=later, need_weights=False)),
    ]
    for y, (expected, _) in cases:
        close(y, expected)
        if dtype != torch.bfloat16:  # its gradients are sums of many rounded numbers
            close(*(torch.autograd.grad(result.square().sum(), x)[0] for result in (y, expected)))
    _, expected = theirs(x, source, source, key_padding_mask=hidden, average_attn_weights=False)
    close(ours.weights(x, padding, source=source), expected)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_equal_repeated_heads(randn, groups):
    q, k, v = randn(2, 6, 5, 4), randn(2, groups, 7, 4), randn(2, groups, 7, 4)
    repeated = [part.repeat_interleave(6 // groups, dim=1) for part in (k, v)]
    for mask in masks(2, 6, 5, 7):
        close(attend(q, k, v, mask), attend(q, *repeated, mask))
    model = MultiHeadAttention(24, 6, groups=groups).double()
    assert sum(p.numel() for p in model.parameters()) == 2 * 24 * 25 + 2 * groups * 4 * 25
    x = randn(2, 5, 24)
    values = model.heads(model.value(x)).repeat_interleave(6 // groups, dim=1)
    by_weights = (model.weights(x, causal=True) @ values).transpose(1, 2).flatten(2)
    close(model(x, causal=True), model.output(by_weights))


@pytest.mark.parametrize(("B", "H", "T", "D"), [(1, 1, 1, 4), (2, 3, 7, 8), (3, 2, 170, 16), (1, 1, 513, 8)])
def test_in_bfloat16_as_in_float64_but_for_rounding(B, H, T, D):
    """On a CPU by other operations up to 512 places, from there on by the fused kernel."""
    draw = torch.Generator().manual_seed(T)
    parts = [torch.randn(B, T, H, D, generator=draw).transpose(1, 2).bfloat16() for _ in range(4)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v = (part.to(dtype).requires_grad_() for part in parts[:3])
        mixed = attend(q, k, v, causal=True)  # (B, H, T, D)
        found.append([mixed, *torch.autograd.grad(mixed, [q, k, v], parts[3].to(dtype))])
    for rounded, exact in zip(*found, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded.double() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("pieces", [1, 3, [5, 1, 2]])
def test_with_a_cache_as_in_one_pass(randn, groups, pieces):
    model, kept = MultiHeadAttention(12, 4, groups=groups).double(), []

    def cache(k, v):
        kept.append((k, v))
        return [torch.cat(parts, dim=2) for parts in zip(*kept, strict=True)]

    x, place = randn(2, 8, 12), 0
    there = padding_mask(torch.tensor([8, 6]), 8)
    for mask in (None, there):
        parts, place = [], 0
        kept.clear()
        for piece in x.split(pieces, dim=1):
            place += piece.shape[1]
            parts.append(model(piece, mask if mask is None else mask[..., :place], causal=True, cache=cache))
        close(torch.cat(parts, dim=1), model(x, mask, causal=True))


def test_nothing_to_look_at(randn):
    model, x = MultiHeadAttention(8, 2).double(), randn(2, 3, 8).requires_grad_()
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    mask[1, 2] = False
    y, weights = model(x, mask), model.weights(x, mask)
    assert torch.equal(y[1, 2], model.output.bias)
    assert not weights[1, :, 2].any()
    slopes = torch.autograd.grad(y.square().sum() + weights.square().sum(), [x, *model.parameters()])
    assert all(slope.isfinite().all() for slope in slopes)


def test_masks():
    assert causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert padding_mask(torch.tensor([2, 0]), 3).tolist() == [[[True, True, False]], [[False] * 3]]


def test_bias_and_width_of_the_source(randn):
    model = MultiHeadAttention(12, 3, source=5, bias=False).double()
    assert all(parameter.ndim == 2 for parameter in model.parameters())
    x, source = randn(2, 4, 12), randn(2, 6, 5)
    q, k, v = (model.heads(part) for part in (model.query(x), model.key(source), model.value(source)))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    close(model(x, source=source), model.output(mixed))


@pytest.mark.parametrize(("C", "H", "groups"), [(10, 3, None), (12, 4, 3), (12, 4, 8)])
def test_numbers_that_cannot_be_shared(C, H, groups):
    with pytest.raises(ValueError, match="cannot be shared"):
        MultiHeadAttention(C, H, groups=groups)


@pytest.mark.parametrize(
    "theirs",
    [
        nn.MultiheadAttention(8, 4),
        nn.MultiheadAttention(8, 2, bias=False),
        nn.MultiheadAttention(8, 2, kdim=4),
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
        nn.MultiheadAttention(8, 2, add_zero_attn=True),
    ],
)
def test_what_cannot_be_copied(theirs):
    with pytest.raises(ValueError, match="no copy of"):
        MultiHeadAttention(8, 2).copy(theirs)
