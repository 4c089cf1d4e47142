"""Multi-head attention: H heads look at H places at once, for the price of one head.

Run:     uv run sprints/06_attention/04_multi_head_attention.py      (6 s on two cores)
Proves:  1. heads in a loop, by reshape and in nn.MultiheadAttention agree, gradients too, with every mask
         2. lab.attention agrees with them, for itself and another sequence, any mask, for each text and head
         3. grouped keys and values equal a loop, and full heads whose weights are repeated
         4. token by token, with a cache of keys and values, gives what one pass gives
         5. whatever H, 4C² + 4C parameters and 8BTC² + 4BT²C operations, counted; with groups fewer
         6. heads split by view alone see the future; split and transposed, just what the mask lets them see
         7. two heads pass on two letters at once; one head, however it splits its weight, misses half
Shapes:  B texts, T places that look at S places, C numbers each, H heads of D = C/H, G groups, V letters
Writes:  results/06_attention/04_multi_head_attention.png
Note:    notes/04_multi_head_attention.md
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

from lab.attention import MultiHeadAttention, causal_mask, padding_mask
from lab.influence import draw, influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SHAPES = ((1, 1, 1, 3, 3), (2, 5, 7, 12, 3), (3, 6, 4, 10, 1), (2, 3, 9, 8, 4))  # B, T, S, C, H
V = T = 6  # for two letters at once: as many letters as places
NEVER = -1e3  # a score whose weight is exactly 0


def look(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One head, or many beside each other: (…, T, D), (…, S, D) twice, mask (…, T, S) -> (…, T, D)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (…, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)  # True means look
    return scores.softmax(-1) @ v


def by_loop(theirs: nn.MultiheadAttention, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """One head after another, each with its own rows of the weights: (B, T, C), (B, S, C) -> (B, T, C)."""
    (Wq, Wk, Wv), (bq, bk, bv) = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)  # (C, C), (C,)
    D, y = theirs.head_dim, theirs.out_proj.bias
    for h in range(theirs.num_heads):
        its = slice(h * D, (h + 1) * D)
        q = x @ Wq[its].T + bq[its]  # (B, T, D)
        k = source @ Wk[its].T + bk[its]  # (B, S, D)
        v = source @ Wv[its].T + bv[its]  # (B, S, D)
        seen = look(q, k, v, None if mask is None else mask[:, h])  # (B, T, D)
        y = y + seen @ theirs.out_proj.weight[:, its].T  # (B, T, C): each head adds its part
    return y


def split(x: Tensor, H: int) -> Tensor:
    """The numbers of a place shared out to the heads: (B, T, C) -> (B, H, T, D)."""
    B, T, C = x.shape
    return x.view(B, T, H, C // H).transpose(1, 2)  # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)


def split_wrongly(x: Tensor, H: int) -> Tensor:
    """The same shape at once: (B, T, C) -> (B, H, T, D). But a head now gets a stretch of the text."""
    B, T, C = x.shape
    return x.view(B, H, T, C // H)


def by_reshape(
    theirs: nn.MultiheadAttention, x: Tensor, source: Tensor, mask: Tensor | None, split: Callable = split
) -> Tensor:
    """All heads in one product: (B, T, C), (B, S, C) -> (B, T, C)."""
    (Wq, Wk, Wv), (bq, bk, bv) = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    H = theirs.num_heads
    q, k, v = split(x @ Wq.T + bq, H), split(source @ Wk.T + bk, H), split(source @ Wv.T + bv, H)
    seen = look(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
    return theirs.out_proj(seen)


def by_pytorch(theirs: nn.MultiheadAttention, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """Its True means hide, and its masks for heads are (B·H, T, S)."""
    hidden = None if mask is None else ~mask.flatten(0, 1)  # (B, H, T, S) -> (B·H, T, S)
    return theirs(x, source, source, attn_mask=hidden, need_weights=False)[0]


def graded(y: Tensor, inputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """y and the gradients of inputs and parameters, asked for with slopes that differ from place to place."""
    slope = torch.linspace(-1, 1, y.numel()).to(y).view_as(y)
    return [y, *torch.autograd.grad(y, [*inputs, *parameters], slope)]


def as_pytorch_keeps_them(graded: list[Tensor]) -> list[Tensor]:
    """The gradients of query, key and value side by side, as in nn.MultiheadAttention: …, (3C, C), (3C,)."""
    *others, Wq, bq, Wk, bk, Wv, bv, Wo, bo = graded
    return [*others, torch.cat([Wq, Wk, Wv]), torch.cat([bq, bk, bv]), Wo, bo]


def may_look(lengths: list[int], T: int, causal: bool) -> Tensor:
    """The rule in words, place by place: inside the text, and not ahead. (B, T, S)."""
    return torch.tensor(
        [[[s < length and (s <= t or not causal) for s in range(T)] for t in range(T)] for length in lengths]
    )


class Cache:
    """All keys and values so far: (B, G, S, D) each."""

    kept: tuple[Tensor, ...] = ()

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept:
            k, v = torch.cat([self.kept[0], k], dim=2), torch.cat([self.kept[1], v], dim=2)
        self.kept = k, v
        return k, v


def token_by_token(model: MultiHeadAttention, x: Tensor, pieces: int | list[int] = 1) -> Tensor:
    """What a generating model does, new places only: (B, T, C) -> (B, T, C)."""
    cache = Cache()
    return torch.cat([model(piece, causal=True, cache=cache) for piece in x.split(pieces, dim=1)], dim=1)


def copying(scores: Tensor) -> MultiHeadAttention:
    """Heads that score places by a table and pass on the letter they find: scores (H, T, S), C = V + T."""
    H, C = len(scores), V + T
    model, D = MultiHeadAttention(C, H, bias=False).to(scores), C // H
    table = torch.zeros(H, D, C).to(scores)
    table[:, :T, V:] = scores.mT * math.sqrt(D)  # the query of place t is its row of scores
    place, letter = torch.zeros_like(table), torch.zeros_like(table)
    place[:, :T, V:] = letter[:, :V, :V] = torch.eye(T).to(scores)
    for layer, weight in ((model.query, table), (model.key, place), (model.value, letter)):
        layer.weight.data = weight.flatten(0, 1)  # (H, D, C) -> (C, C)
    model.output.weight.data = torch.eye(C).to(scores)
    return model


def missed(seen: Tensor, wanted: Tensor) -> float:
    """The share of the variance of wanted (N, F) that the best linear read-out of seen (N, C) gets wrong."""
    seen, wanted = seen - seen.mean(0), wanted - wanted.mean(0)
    return ((wanted - seen @ torch.linalg.pinv(seen) @ wanted).square().sum() / wanted.square().sum()).item()


def counted(model: nn.Module, *inputs: Tensor, **options) -> tuple[int, int]:
    """Parameters, and operations in one call."""
    with FlopCounterMode(display=False) as flops:
        model(*inputs, **options)
    return sum(parameter.numel() for parameter in model.parameters()), flops.get_total_flops()


def main(lesson: Lesson) -> None:
    generator, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()

    def models(C: int, H: int) -> tuple[nn.MultiheadAttention, MultiHeadAttention]:
        torch.manual_seed(lesson.seed)
        theirs = nn.MultiheadAttention(C, H, batch_first=True, dtype=torch.float64, device=device)
        nn.init.normal_(theirs.in_proj_bias), nn.init.normal_(theirs.out_proj.bias)  # zero by default
        return theirs, MultiHeadAttention(C, H).to(theirs.in_proj_weight).copy(theirs)

    lesson.heading("Heads, three ways, and a fourth")
    ours, slow, theirs, lab = [], [], [], []
    for B, T, S, C, H in SHAPES:
        x, source, (torchs, labs) = randn(B, T, C), randn(B, S, C), models(C, H)
        lengths = torch.randint(1, T + 1, (B,), generator=generator).tolist()
        rules = [may_look(lengths, T, True), may_look([T] * B, T, True), may_look(lengths, T, False)]
        masks = [rule.to(device)[:, None].expand(B, H, T, T) for rule in rules]
        any_mask = torch.rand(B, H, T, S, generator=generator).to(device) < 0.5
        any_mask[..., 0] = True  # so that nobody looks at nothing
        cases = [(x, mask) for mask in (None, *masks)] + [(source, None), (source, any_mask)]
        for looked_at, mask in cases:
            inputs = [x] if looked_at is x else [x, source]
            for found, way in ((slow, by_loop), (ours, by_reshape), (theirs, by_pytorch)):
                found += graded(way(torchs, x, looked_at, mask), inputs, torchs.parameters())
            y = labs(x, mask, source=looked_at)
            lab += as_pytorch_keeps_them(graded(y, inputs, labs.parameters()))
        print(f"B {B}  T {T}  S {S}  C {C:2}  H {H}  D {C // H}   {len(cases)} masks")
    lesson.proves_equal(1, [ours, ours], [slow, theirs])
    ends = torch.tensor([4, 2], device=device)
    lab += [causal_mask(6, device=device), padding_mask(ends, 6).expand(2, 6, 6)]
    ours += [may_look([6], 6, True)[0], may_look([4, 2], 6, False)]
    x, (torchs, labs), mask = randn(2, 6, 12), models(12, 3), may_look([4, 2], 6, True).to(device)
    seen = (labs.weights(x, mask) @ labs.heads(labs.value(x))).transpose(1, 2).flatten(2)  # (B, T, C)
    lab += [labs(x, padding_mask(ends, 6), causal=True), labs.output(seen), labs(x, causal=True)]
    ours += [by_reshape(torchs, x, x, mask[:, None])] * 2
    ours.append(by_reshape(torchs, x, x, may_look([6], 6, True).to(device)))
    lesson.proves_equal(2, lab, ours)
    mask[1, 3] = False  # this place may look at nothing
    y, *slopes = graded(labs(x, mask), [x], labs.parameters())
    finite = all(slope.isfinite().all() for slope in slopes)
    lesson.proves(2, torch.equal(y[1, 3], labs.output.bias) and finite, "nothing to look at: a mean of 0")

    lesson.heading("Grouped keys and values, and a cache")
    H, C = 6, 24
    found, slow, many, whole, steps = [], [], [], [], []
    for G in (1, 2, 3):
        x, few = randn(2, 9, C), MultiHeadAttention(C, H, groups=G).double().to(device)
        full, share = MultiHeadAttention(C, H).double().to(device), H // G
        weights = few.state_dict()
        for name in ("key.weight", "key.bias", "value.weight", "value.bias"):
            heads = weights[name].unflatten(0, (G, C // H))  # (G·D, …) -> (G, D, …)
            weights[name] = heads.repeat_interleave(share, dim=0).flatten(0, 1)  # (G, D, …) -> (H·D, …)
        full.load_state_dict(weights)
        q, k, v = split(few.query(x), H), split(few.key(x), G), split(few.value(x), G)
        mask = may_look([9], 9, True).to(device)
        one_by_one = [look(q[:, h], k[:, h // share], v[:, h // share], mask) for h in range(H)]
        slow += graded(few.output(torch.cat(one_by_one, dim=-1)), [x], few.parameters())
        found += graded(few(x, causal=True), [x], few.parameters())
        copied = graded(full(x, causal=True), [x], full.parameters())
        for i in range(4, 8):  # keys and values: a group's gradient is the sum over its copies
            copied[i] = copied[i].unflatten(0, (G, share, C // H)).sum(1).flatten(0, 1)
        many += copied
        whole += [few(x, causal=True)] * 2
        steps += [token_by_token(few, x, pieces) for pieces in (1, [4, 1, 3, 1])]
    lesson.proves_equal(3, [found, found], [slow, many])
    lesson.proves_equal(4, steps, whole)

    lesson.heading("The price")
    B, T, C, table = 2, 50, 48, []
    with torch.device("meta"):  # shapes without numbers: nothing is computed, everything is counted
        x = torch.empty(B, T, C)
        for H, G in ((1, 1), (4, 4), (12, 12), (12, 4), (12, 1)):
            kept = C // H * G  # numbers in a key
            formula = 2 * C * (C + 1) + 2 * kept * (C + 1), 4 * B * T * C * (C + kept) + 4 * B * T**2 * C
            price = counted(MultiHeadAttention(C, H, groups=G), x)
            table.append((price, formula))
            print(f"H {H:2}  groups {G:2}   {price[0]:6,} parameters {price[1]:10,} operations")
        torchs = nn.MultiheadAttention(C, 4, batch_first=True)
        formula = 4 * C**2 + 4 * C, 8 * B * T * C**2 + 4 * B * T**2 * C
        table.append((counted(torchs, x, x, x, need_weights=False), formula))
    lesson.proves_equal(5, *map(list, zip(*table, strict=True)))

    lesson.heading("Which places can change which, of two texts of 6 and 4")
    (x, source), (torchs, labs) = randn(2, 2, 6, 12).detach(), models(12, 3)
    seen, expected, places = [], [], torch.ones(6, 6, dtype=torch.long)
    for lengths, causal in product(([6, 6], [6, 4]), (False, True)):
        mask = may_look(lengths, 6, causal).to(device)[:, None]
        for way in (partial(by_reshape, torchs, mask=mask), lambda x, s, mask=mask: labs(x, mask, source=s)):
            seen.append(influence(way, x, source)[1])
        blocks = [(places.tril() if causal else places) * (torch.arange(6) < length) for length in lengths]
        expected += [torch.block_diag(*blocks)] * 2
    causal = may_look([6], 6, True).to(device)
    seen.append(influence(lambda x: token_by_token(labs, x), x[:1]))
    leaky = influence(lambda x: by_reshape(torchs, x, x, causal, split_wrongly), x[:1])
    print("causal, transposed      causal and padded      causal, split by view")
    for right, padded, wrong in zip(*map(rows, (seen[-1], seen[6][6:, 6:], leaky)), strict=True):
        print(f"{right}             {padded}            {wrong}")
    lesson.proves_equal(6, seen, [*expected, places.tril()])
    lesson.proves(6, (leaky.triu(1) == 1).any(), f"view alone: {leaky.triu(1).sum()} places seen too early")

    lesson.heading("Two letters at once, the previous and the first")
    back, first = torch.full((2, V, V), NEVER, dtype=torch.float64, device=device)
    back[range(V), [0, *range(V - 1)]] = first[:, 0] = 0
    texts = torch.randint(V, (V * V, V), generator=generator)
    texts[:, [0, -2]] = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # every pair once
    letters, stands = torch.eye(V).to(back)[texts.to(device)], torch.eye(V).to(back)
    x = torch.cat([letters, stands.expand_as(letters)], dim=-1)  # (N, T, V + T)
    wanted = torch.cat([letters[:, [0, *range(V - 1)]], letters[:, :1].expand_as(letters)], dim=-1)
    with torch.no_grad():
        two = copying(torch.stack([back, first]))(x)
        lesson.proves_equal(7, two, wanted)
        shares, lost = torch.linspace(0, 1, 11), []
        for share in shares:
            rule = torch.logaddexp(back + share.log(), first + (1 - share).log())
            lost.append(missed(copying(rule[None])(x)[:, -1], wanted[:, -1]))
        wandering = copying(rule[None])
        nn.init.normal_(wandering.query.weight), nn.init.normal_(wandering.key.weight)  # looks where it may
        lost.append(missed(wandering(x)[:, -1], wanted[:, -1]))
    print("one head's weight on the previous letter:", *(f"{share:.1f}" for share in shares))
    print(f"what the best read-out of it misses:     {min(lost[:-1]):.0%} … {max(lost[:-1]):.0%}")
    half = max(abs(share - 0.5) for share in lost[:-1]) < 1e-9 and lost[-1] > 0.5 - 1e-9
    lesson.proves(7, half, f"and with random queries and keys {lost[-1]:.0%}")

    figure, (right, wrong, lines) = plt.subplots(1, 3, figsize=(7, 3), layout="constrained")
    draw(right, seen[-1], "split and transposed")
    draw(wrong, leaky, "split by view alone")
    lines.plot(shares, lost[:-1], "o-")
    lines.axhline(missed(two[:, -1], wanted[:, -1]), color="C1")
    lines.text(0.5, 0.44, "one head", ha="center")
    lines.text(0.5, 0.03, "two heads", ha="center")
    lines.set(xlabel="weight on one letter", ylabel="share missed", title="two letters at once", box_aspect=1)
    figure.suptitle("Split rightly, no head sees the future, and two heads see more than one", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
