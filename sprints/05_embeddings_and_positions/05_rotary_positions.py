"""Rotary positions: turn query and key by their positions, and their score sees only how far apart they are.

Run:     uv run sprints/05_embeddings_and_positions/05_rotary_positions.py      (7 s on two cores)
Proves:  1. 2×2 rotations in a loop equal complex products (pairs) and real ones (halves), gradients too
         2. a turn changes no length, and its gradient is the turn back; central differences agree
         3. every pair scores as if only the query were turned, by their distance, wherever the text starts
         4. the two layouts are permutations: permuted weights score the same, others only at distance 0
         5. a query in one layout and a key in the other: the scores depend on where the text starts
         6. turned values turn the output when the text moves by k, by R(k); plain values leave it alone
         7. ALiBi in a loop, as slope × key position and as a mask for PyTorch's attention: equal outputs
Shapes:  B batch, H heads, T queries, S keys, C channels, D width of a head
Writes:  results/05_embeddings_and_positions/05_rotary_positions.png
Note:    notes/05_rotary_positions.md
"""

import math
from collections.abc import Callable
from itertools import product

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 10_000.0
SHAPES = ((1, 1, 1, 2), (1, 2, 5, 8), (2, 1, 7, 6))  # B, H, T, D
STARTS = (0, 1, 30, 500, 10_000, -64)


def by_loop(x: Tensor, t: Tensor, partners: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """Pair by pair, the 2×2 rotation by t·ωᵢ (Su et al. 2021, eqs. 14 and 15): (T, D), (T,) -> (T, D)."""
    rows = []
    for row, position in zip(x, t, strict=True):
        D = len(row)
        turned = [None] * D
        for i in range(D // 2):
            (a, b), angle = partners(i, D), position / BASE ** (2 * i / D)
            turned[a] = angle.cos() * row[a] - angle.sin() * row[b]
            turned[b] = angle.sin() * row[a] + angle.cos() * row[b]
        rows.append(torch.stack(turned))
    return torch.stack(rows)


def angles(t: Tensor, D: int) -> Tensor:
    """t·ωᵢ with ωᵢ = 10000^(-2i/D): (…) -> (…, D/2)."""
    return t[..., None] * BASE ** -(torch.arange(0, D, 2, dtype=t.dtype, device=t.device) / D)


def in_pairs(x: Tensor, t: Tensor) -> Tensor:
    """Neighbours are partners, (0, 1), (2, 3) …, as in the paper and GPT-J: (…, T, D), (T,) -> (…, T, D)."""
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # (…, T, D) -> (…, T, D/2, 2) -> (…, T, D/2)
    turned = numbers * torch.exp(1j * angles(t, x.shape[-1]))
    return torch.view_as_real(turned).flatten(-2)  # (…, T, D/2) -> (…, T, D/2, 2) -> (…, T, D)


def in_halves(x: Tensor, t: Tensor) -> Tensor:
    """The first half meets the second, (0, D/2) …, as in GPT-NeoX: (…, T, D), (T,) -> (…, T, D)."""
    cos, sin = angles(t, x.shape[-1]).cos(), angles(t, x.shape[-1]).sin()  # (T, D/2)
    a, b = x.chunk(2, dim=-1)  # (…, T, D) -> (…, T, D/2) twice
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


LAYOUTS = {  # name: turn, and which two dimensions form pair i
    "pairs": (in_pairs, lambda i, D: (2 * i, 2 * i + 1)),
    "halves": (in_halves, lambda i, D: (i, i + D // 2)),
}


def scores(q: Tensor, k: Tensor, t: Tensor, turn_query=in_pairs, turn_key=in_pairs) -> Tensor:
    """Queries and keys that stand at t, each turned in its layout: (T, D), (T, D), (T,) -> (T, S)."""
    return turn_query(q, t) @ turn_key(k, t).T / math.sqrt(q.shape[-1])


def difference(a: Tensor, b: Tensor) -> float:
    """How far a is from b, as a share of the size of b; about 1.4 where they have nothing in common."""
    return ((a - b).norm() / b.norm()).item()


def alibi_by_loop(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Causal attention where each step back costs a head its slope (Press et al. 2022): (H, T, D) each."""
    output = torch.zeros_like(v)
    for h, slope in enumerate(slopes):
        for t, query in enumerate(q[h]):
            row = [query @ k[h, s] / math.sqrt(len(query)) - slope * (t - s) for s in range(t + 1)]
            output[h, t] = torch.stack(row).softmax(0) @ v[h, : t + 1]
    return output


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    t = torch.arange(40, dtype=torch.float64, device=lesson.float64_device)  # positions
    x, W = randn(40, 64), randn(3, 64, 64) / 8  # (T, C), and projections to queries, keys, values: (3, D, C)
    q, k, v = x @ W.mT  # (3, T, D)

    lesson.heading("One rotation, three ways")
    for place, (a, b) in enumerate(in_pairs(torch.tensor([[1.0, 0.0]]).to(t), t[:4])):
        print(f"(1, 0) at position {place} becomes ({a:+.3f}, {b:+.3f})")
    ours, slow, kept, expected, checks = [], [], [], [], []
    for shape, (turn, partners) in product(SHAPES, LAYOUTS.values()):
        z, slope, at = randn(*shape).requires_grad_(), randn(*shape), 3 + t[: shape[2]]
        loop = torch.stack([by_loop(rows, at, partners) for rows in z.flatten(0, 1)])  # (B·H, T, D)
        for found, y in ((ours, turn(z, at)), (slow, loop.view(shape))):  # -> (B, H, T, D)
            found += [y, *torch.autograd.grad(y, z, slope)]
        kept += [ours[-2].norm(dim=-1), ours[-1]]
        expected += [z.norm(dim=-1), turn(slope, -at)]
        checks.append(torch.autograd.gradcheck(turn, (z, at), raise_exception=False))
    lesson.proves_equal(1, ours, slow)
    lesson.proves_equal(2, kept, expected)
    lesson.proves(2, all(checks), f"gradcheck, {len(checks)} times")

    lesson.heading("Scores and distance")
    apart = t[:, None] - t  # (T, S)
    ours, theirs = [], []
    for turn, _ in LAYOUTS.values():
        ours += [scores(q, k, start + t, turn, turn) for start in STARTS]
        theirs += [(turn(q[:, None], apart) * k).sum(-1) / 8] * len(STARTS)  # (T, S, D) -> (T, S)
    hands = angles(t, 64), angles(500 + t, 64)
    words = [x + torch.cat([hand.sin(), hand.cos()], dim=-1) for hand in hands]  # (T, C)
    added = [(word @ W[0].T) @ (word @ W[1].T).T for word in words]  # (T, S)
    changes = difference(ours[3], ours[0]), difference(*added)
    print("text moved by 500, scores change by: turned {:.2f}, sinusoids added {:.2f}".format(*changes))
    lesson.proves_equal(3, ours, theirs)

    lesson.heading("Two layouts")
    own, foreign = scores(q, k, t), scores(q, k, t, in_halves, in_halves)
    order = [*range(0, 64, 2), *range(1, 64, 2)]
    permuted = x @ W[:2, order].mT  # the rows of both projections change places: (2, T, D)
    lesson.proves_equal(4, scores(*permuted, t, in_halves, in_halves), own)
    off = [difference(foreign.diagonal(-far), own.diagonal(-far)) for far in range(20)]
    print("weights for pairs, run in halves, 0, 1, 2, … apart:", "  ".join(f"{one:.2f}" for one in off[:7]))
    least, most = min(off[1:]), max(off[1:])
    lesson.proves(4, off[0] < 1e-10 and least > 0.1, f"up to 19 apart, off by {least:.2f} to {most:.2f}")
    held = []
    for (a, (turn, _)), (b, (other, _)) in product(LAYOUTS.items(), repeat=2):
        here, *there = (scores(q, k, start + t, turn, other) for start in (0, 1, 30, 500))
        changes = [difference(moved, here) for moved in there]
        row = "  ".join(f"{change:.2f}" for change in changes)
        print(f"query in {a:6}  key in {b:6}  moved by 1, 30, 500:  {row}")
        held.append(max(changes) < 1e-10 if a == b else changes[-1] > 0.5)
    lesson.proves(5, all(held), "in one and the same they do not")

    lesson.heading("Values")
    now, later = scores(q, k, t).softmax(-1), scores(q, k, 500 + t).softmax(-1)  # (T, S)
    turned, moved = now @ in_pairs(v, t), later @ in_pairs(v, 500 + t)  # (T, D)
    changes = difference(later @ v, now @ v), difference(moved, turned)
    print("text moved by 500, the output changes by: plain values {:.2f}, turned {:.2f}".format(*changes))
    lesson.proves_equal(6, [later @ v, moved], [now @ v, in_pairs(turned, torch.full_like(t, 500))])

    lesson.heading("ALiBi, and how scores change with distance")
    q, k, v = randn(3, 8, 12, 64)  # (H, T, D)
    slopes = 0.5 ** torch.arange(1, 9).to(t)  # 1/2, 1/4, … 1/256: (H,)
    at, hidden = t[:12], torch.full((12, 12), -torch.inf).to(t).triu(1)  # hidden: the keys that come later
    by_key = q @ k.mT / 8 + slopes[:, None, None] * at + hidden  # a constant more per row than −slope·(t − s)
    mask = hidden - slopes[:, None, None] * (at[:, None] - at)  # (H, T, S)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    lesson.proves_equal(7, [by_key.softmax(-1) @ v, theirs], [alibi_by_loop(q, k, v, slopes)] * 2)
    far = torch.tensor([0, 1, 10, 100, 1_000]).to(t)
    query, key = randn(2, 2_000, 1, 64)
    rows = {"distance": far, "turned, key like query: mean": 8 * angles(far, 64).cos().mean(-1)}
    rows["turned, random keys: spread"] = (in_pairs(query, far) * key).sum(-1).std(0) / 8
    rows |= {"ALiBi, slope 1/2": 0 - slopes[0] * far, "ALiBi, slope 1/256": 0 - slopes[7] * far}
    for name, row in rows.items():
        print(f"{name:30}" + "".join(f"{value:10.4g}" for value in row))

    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    steps, query, key = torch.arange(61).to(t), q[0, :1], k[0, :1]  # (1, D): the same two everywhere
    for name, (turn, _) in LAYOUTS.items():
        line = (in_pairs(query, 5 + steps) * turn(key, steps)).sum(-1) / 8
        left.plot(steps.cpu(), line.cpu(), label=f"key in {name}")
    left.set(xlabel="position of the key", ylabel="score", title="a query in pairs, 5 further on")
    left.margins(y=0.3)
    right.plot(steps.cpu(), 8 * angles(steps, 64).cos().mean(-1).cpu() - 8, label="turned")
    for h in (3, 5, 8):
        right.plot(steps.cpu(), -steps.cpu() / 2**h, label=f"ALiBi, 1/{2**h}")
    right.set(xlabel="distance", ylabel="change of score", title="key like query (turned: mean)")
    left.legend(loc="upper left", fontsize="small")
    right.legend(loc="lower left", fontsize="small")
    figure.suptitle("Turned alike, a score knows the distance; in mixed layouts it does not", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
