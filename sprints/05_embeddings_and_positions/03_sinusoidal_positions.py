"""Sinusoidal positions: a clock with many hands, and where they point tells which position it is.

Run:     uv run sprints/05_embeddings_and_positions/03_sinusoidal_positions.py      (7 s on two cores)
Proves:  1. the formula in a loop, an outer product, a complex exponential and the lab give the same matrix
         2. the wavelengths counted on the columns are 2π·10000^(2i/D): from 2π to one step short of 10000·2π
         3. one matrix R(k), made of k alone, moves every position k places on; for random vectors none does
         4. R(k) is a rotation, and shifts add up: R(j)·R(k) = R(j + k)
         5. the product of two positions is Σ cos(ωᵢ·distance): it knows their distance and nothing else
         6. at distances k of 1 to 1000 likeness is 1 − (γ + ln k) / ln 10000, within 0.06 for D = 512
         7. adding is concatenating and projecting both halves alike: the scores are a sum of four tables
Shapes:  T positions, D width
Writes:  results/05_embeddings_and_positions/03_sinusoidal_positions.png
Note:    notes/03_sinusoidal_positions.md
"""

import math
from itertools import product

from lab.lesson import Lesson, run
from lab.positions import sinusoids

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

BASE = 10_000.0
SHAPES = ((1, 2), (7, 6), (50, 64), (130, 10))
SHIFTS = (1, 2, 7, 100, 1_500)


def positions_by_loop(T: int, D: int) -> Tensor:
    """The formula read aloud (Vaswani et al. 2017, section 3.5): (T, D)."""
    matrix = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for i in range(D // 2):
            angle = t / BASE ** (2 * i / D)
            matrix[t, 2 * i], matrix[t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return matrix


def angles(t: Tensor, D: int) -> Tensor:
    """Where the hands stand at positions t: hand i moves by ωᵢ = 10000^(-2i/D) a step. (…) -> (…, D/2)."""
    frequencies = BASE ** -(torch.arange(0, D, 2, dtype=t.dtype, device=t.device) / D)  # (D/2,)
    return t[..., None] * frequencies


def positions(t: Tensor, D: int) -> Tensor:
    """Sine and cosine of each hand, side by side: (T,) -> (T, D)."""
    turned = angles(t, D)
    return torch.stack([turned.sin(), turned.cos()], dim=-1).flatten(1)  # (T, D/2, 2) -> (T, D)


def wavelengths(matrix: Tensor) -> Tensor:
    """The mean distance between the upward zero crossings of each sine: (T, D) -> (D/2,)."""
    found = []
    for column in matrix[:, ::2].T:  # (T,)
        last = ((column[:-1] < 0) & (column[1:] >= 0)).nonzero().squeeze(1)  # the last position below zero
        crossings = last + column[last] / (column[last] - column[last + 1])  # on the line to the next one
        found.append((crossings[-1] - crossings[0]) / (len(crossings) - 1))
    return torch.stack(found)


def shift(k: Tensor, D: int) -> Tensor:
    """R(k): along its diagonal, a rotation by k·ωᵢ for each pair (sin, cos). () -> (D, D)."""
    sin, cos = angles(k, D).sin(), angles(k, D).cos()
    blocks = torch.stack([cos, sin, -sin, cos], dim=-1).unflatten(-1, (2, 2))  # (D/2, 4) -> (D/2, 2, 2)
    return torch.block_diag(*blocks)


def misfit(matrix: Tensor, k: int) -> float:
    """How far the best of all D × D matrices is from moving each row k rows on; 1 is no better than zeros."""
    before, after = matrix[:-k], matrix[k:]  # (T − k, D)
    best = torch.linalg.lstsq(before, after).solution  # (D, D)
    return ((before @ best - after).norm() / after.norm()).item()


def likeness(k: Tensor, D: int) -> Tensor:
    """The cosine of the angle between positions k apart, by the formula of claim 5: (…) -> (…)."""
    return angles(k, D).cos().mean(-1)  # (…, D/2) -> (…)


def logarithm(k: Tensor) -> Tensor:
    """What likeness comes to when the hands are many and 1 ≪ k ≪ 10000: (…) -> (…)."""
    return 1 - (np.euler_gamma + k.log()) / math.log(BASE)


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)
    t = torch.arange(50_000.0, dtype=torch.float64, device=lesson.float64_device)

    lesson.heading("The formula, three ways")
    ours = [positions(t[:T], D).cpu() for T, D in SHAPES]
    loops = [positions_by_loop(*shape) for shape in SHAPES]
    spirals = [torch.exp(1j * angles(t[:T], D)).cpu() for T, D in SHAPES]  # e^(iωt), (T, D/2)
    spirals = [torch.stack([z.imag, z.real], dim=-1).flatten(1) for z in spirals]  # (T, D/2, 2) -> (T, D)
    for place, row in enumerate(ours[1][:3]):
        print(f"D = 6, position {place}   " + "  ".join(f"{number:+.4f}" for number in row))
    finished = [sinusoids(*shape) for shape in SHAPES]  # float32, as a model adds them
    lesson.proves_equal(1, [ours, ours, finished], [loops, spirals, [loop.float() for loop in loops]])

    lesson.heading("Wavelengths")
    counted, step = wavelengths(positions(t, 16)), BASE ** (2 / 16)
    expected = [2 * math.pi * step**i for i in range(9)]
    print("counted at D = 16: ", "  ".join(f"{wavelength:,.1f}" for wavelength in counted))
    print(f"2π = {expected[0]:.1f}, each {step:.2f} times the last; next {BASE:.0f}·2π = {expected[8]:,.1f}")
    lesson.proves_equal(2, counted.tolist(), expected[:8], tolerance=1e-5)

    lesson.heading("A shift is a rotation")
    regular, random = positions(t[:2_000], 16), torch.randn(2_000, 16, generator=draw, dtype=t.dtype).to(t)
    misses = [[misfit(matrix, k) for k in SHIFTS] for matrix in (regular, random)]
    for name, row in zip(("sinusoids", "random vectors"), misses, strict=True):
        print(f"the best matrix for {name:14} misses by", "  ".join(f"{miss:.2f}" for miss in row))
    lesson.proves(3, max(misses[0]) < 1e-9 and min(misses[1]) > 0.9, f"k of {SHIFTS}")
    P, R = positions(t[:2_000], 64), {k: shift(t[k], 64) for k in SHIFTS}
    moved = [P[:-k] @ R[k].T for k in SHIFTS]  # (T − k, D): every position at once
    lesson.proves_equal(3, moved, [P[k:] for k in SHIFTS])
    sums = {j + k: R[j] @ R[k] for j, k in product(SHIFTS, repeat=2)}
    lesson.proves_equal(4, list(sums.values()), [shift(t[k], 64) for k in sums])
    upright = [torch.eye(64, dtype=t.dtype), 1.0]
    lesson.proves_equal(4, [[R[k].T @ R[k], R[k].det()] for k in SHIFTS], [upright] * len(SHIFTS))

    lesson.heading("How alike two positions are")
    distances = (t[:500, None] - t[:500]).abs()  # (T, T)
    lesson.proves_equal(5, P[:500] @ P[:500].T, 32 * likeness(distances, 64))
    for D in (64, 512):
        row = "  ".join(f"{likeness(t[k], D):+.2f}" for k in (0, 1, 10, 100, 1_000, 10_000))
        print(f"D = {D:3}, positions 0, 1, 10, …, 10000 apart   {row}")
    off = (likeness(t[1:1_001], 512) - logarithm(t[1:1_001])).abs().max().item()
    lesson.proves(6, off < 0.06, f"within {off:.3f}")

    lesson.heading("Added to the embeddings")
    W = torch.randn(2, 64, 64, generator=draw, dtype=t.dtype).to(t) / 8  # to queries, to keys
    words, P = torch.randn(20, 64, generator=draw, dtype=t.dtype).to(t), P[:20]  # as nn.Embedding starts

    def scores(a: Tensor, b: Tensor) -> Tensor:
        """Every token of a asks every token of b: (T, D), (T, D) -> (T, T)."""
        return (a @ W[0]) @ (b @ W[1]).T / math.sqrt(64)

    for name, size in (("spread 1", 1.0), ("spread 1/√D", 1 / 8)):
        pairs = product((("word", words * size), ("position", P)), repeat=2)
        row = (f"{a}·{b} {scores(x, y).std():.2f}" for (a, x), (b, y) in pairs)
        print(f"embeddings of {name:11}   " + "   ".join(row))
    four = sum(scores(x, y) for x, y in product((words, P), repeat=2))
    query, key = (torch.cat([words, P], dim=1) @ torch.cat([half, half]) for half in W)  # (T, 2D) -> (T, D)
    lesson.proves_equal(7, [scores(words + P, words + P)] * 2, [four, query @ key.T / math.sqrt(64)])

    figure, (image, curve) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    image.imshow(positions(t[:100], 64).T.cpu(), cmap="PuOr", aspect="auto", interpolation="nearest")
    image.set(xlabel="position", ylabel="dimension", title="purple +1, white 0, orange −1")
    k = torch.from_numpy(np.geomspace(1, 10_000, 600).round())
    for D, width in ((64, 1), (512, 2)):
        curve.semilogx(k, likeness(k, D), linewidth=width, label=f"D = {D}")
    curve.semilogx(k, logarithm(k), "k--", label="1 − (γ + ln k) / ln 10000")
    curve.set(xlabel="distance k", ylabel="likeness", ylim=(-0.4, 1.5))
    curve.legend(loc="upper right", fontsize="small")
    figure.suptitle("Two positions grow unlike with the logarithm of their distance", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
