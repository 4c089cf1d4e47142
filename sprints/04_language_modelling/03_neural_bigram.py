"""A neural bigram: one matrix of logits, trained by gradient descent, becomes the table of counts.

Run:     uv run sprints/04_language_modelling/03_neural_bigram.py      (6 s on two cores)
Proves:  1. a row of an embedding is a one-hot vector times its matrix: same values, same gradient
         2. the loss over every pair of the text needs only the V² counts: same value, same gradient
         3. the gradient is share · (softmax - frequency), and 0 at the logarithms of the frequencies
         4. the loss is convex: it lies below its chords; its Hessian diag(p) - ppᵀ has no eigenvalue < 0
         5. pseudo-counts α are a penalty of -α/N · Σ ln p: same value and gradient, up to the scale
         6. from three starts training ends at the counts' frequencies, and with α at the smoothed ones
         7. batches of windows end above that loss, never below: SGD by < 0.05 nats, Adam by < 0.01
Shapes:  V different characters, N pairs of neighbours; the table is (V, V): what follows (column) what (row)
Writes:  results/04_language_modelling/03_neural_bigram.png
         results/04_language_modelling/03_neural_bigram.json
Note:    notes/03_neural_bigram.md
"""

import functools
import time
from collections.abc import Callable, Iterable

from lab.corpus import Corpus, load
from lab.ladder import nats_per_character
from lab.lesson import Lesson, run
from lab.ngram import NGram

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((1, 2, 1), (5, 3, 4), (40, 7, 2), (6, 11, 11))  # characters looked up, rows, columns
STARTS = {"zeros": 0.0, "N(0, 1)": 1.0, "N(0, 3²)": 3.0}
RATES = {
    "SGD": (100.0, 0.05),
    "Adam": (0.1, 0.01),
}  # learning rate on windows; how near it must come, in nats
ALPHA, PART, B, T = 1.0, 2**16, 32, 32


def bigram(W: Tensor, ids: Tensor, state: None = None) -> tuple[Tensor, None]:
    """A language model in one matrix, whose rows are the logits of what follows: (B, T) -> (B, T, V)."""
    return F.embedding(ids, W), state


def loss_of_text(W: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of -ln p over all N pairs of neighbours, PART at a time, and its gradient: (), (V, V)."""
    losses, gradients, N = [], [], len(ids) - 1
    for part in torch.arange(N, device=ids.device).split(PART):
        logits, _ = bigram(W, ids[part])  # (PART, V)
        losses.append(F.cross_entropy(logits, ids[part + 1], reduction="sum") / N)
        gradients += torch.autograd.grad(losses[-1], W)
    return sum(losses), sum(gradients)


def loss_of_counts(W: Tensor, counts: Tensor) -> Tensor:
    """The same mean from how often each pair occurs: (…, V, V) -> (…)."""
    return -(counts * W.log_softmax(-1)).sum((-2, -1)) / counts.sum((-2, -1))


def loss_of_windows(W: Tensor, corpus: Corpus, draw: torch.Generator) -> Tensor:
    """The mean over B random windows of T characters, as larger models are trained."""
    inputs, targets = corpus.batch(B, T, draw)
    logits, _ = bigram(W, inputs)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B·T, V), (B·T,) -> ()


def frequencies(counts: Tensor) -> Tensor:
    """Each row of the counts over its sum; all alike after a character that never occurred: (V, V)."""
    total = counts.sum(-1, keepdim=True)  # (V, 1)
    return torch.where(total > 0, counts / total, 1 / len(counts))


def slope(W: Tensor, counts: Tensor) -> Tensor:
    """The gradient of loss_of_counts by hand: each row's share of the text, times what p has too much."""
    share = counts.sum(-1, keepdim=True) / counts.sum()  # (V, 1)
    return share * (W.softmax(-1) - frequencies(counts))


def value_and_gradient(f: Callable[[Tensor], Tensor], W: Tensor) -> list[Tensor]:
    W = W.detach().requires_grad_()
    value = f(W)
    return [value.detach(), *torch.autograd.grad(value, W)]


def train(optimizer: torch.optim.Optimizer, loss: Callable, watch: Callable, steps: Iterable) -> Tensor:
    """Descend loss(W) at a rate that falls along a cosine: watch(W) before each step and at the end."""
    (W,), watched = optimizer.param_groups[0]["params"], []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    for _ in steps:
        watched.append(watch(W.detach()))
        optimizer.zero_grad()
        loss(W).backward()
        optimizer.step()
        schedule.step()
    return torch.stack([*watched, watch(W.detach())]).cpu()


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # matrices so small that threads would only wait for each other
    corpus, draw = load(lesson.data, lesson.seed, lesson.device), torch.Generator().manual_seed(lesson.seed)
    V, place = corpus.V, lesson.float64_device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(place)

    lesson.heading("Looking up is multiplying")
    ours, theirs = [], []
    for looked_up, rows, columns in SHAPES:
        some = torch.randint(rows, (looked_up,), generator=draw).to(place)
        W, pull = normal(rows, columns), normal(looked_up, columns)  # a gradient needs a number: Σ pull · row
        one_hot = torch.stack([torch.arange(rows, device=place) == number for number in some]).double()
        theirs.append(value_and_gradient(lambda W, x=one_hot, pull=pull: (x @ W * pull).sum(), W))
        ours.append(value_and_gradient(lambda W, x=some, pull=pull: (F.embedding(x, W) * pull).sum(), W))
        ours[-1].append(F.embedding(some, W))
        theirs[-1].append(one_hot @ W)
    print(f"one-hot {tuple(one_hot.shape)} times {tuple(W.shape)}, or row {some.tolist()} of it")
    lesson.proves_equal(1, ours, theirs)

    lesson.heading("A text is its counts")
    ids = corpus.train.to(place)
    counts = NGram(ids, V, 2, smoothing=0).counts.double()  # (V, V)
    W, N = normal(V, V).requires_grad_(), counts.sum()
    start = time.perf_counter()
    by_text = loss_of_text(W, ids)
    middle = time.perf_counter()
    by_counts = value_and_gradient(lambda W: loss_of_counts(W, counts), W)
    end = time.perf_counter()
    print(f"{int(N):9,} pairs  {by_text[0]:.6f} nats, with the gradient in {middle - start:.4f} s")
    print(f"{V * V:9,} counts {by_counts[0]:.6f} nats, with the gradient in {end - middle:.4f} s")
    lesson.proves_equal(2, by_counts, list(by_text))

    lesson.heading("Where the loss is least")
    q, smoothed, zero = frequencies(counts), frequencies(counts + ALPHA), torch.zeros_like(counts)
    _, there = value_and_gradient(lambda W: loss_of_counts(W, counts + ALPHA), smoothed.log())
    lesson.proves_equal(3, [slope(W, counts), slope(q.log(), counts), there], [by_counts[1], zero, zero])
    t = torch.rand(100, 1, 1, generator=draw, dtype=torch.float64).to(place)
    left, right = normal(2, 100, V, V)
    between = loss_of_counts(t * left + (1 - t) * right, counts)  # (100,)
    chord = t.flatten() * loss_of_counts(left, counts) + (1 - t.flatten()) * loss_of_counts(right, counts)
    row = counts.sum(-1).argmax()
    w, p = W[row].detach(), W[row].detach().softmax(-1)  # (V,) each
    hessian = torch.autograd.functional.hessian(lambda w: loss_of_counts(w[None], counts[row][None]), w)
    lesson.proves_equal(4, hessian, p.diag() - p.outer(p))
    held = (between < chord).all() and torch.linalg.eigvalsh(hessian).min() > -1e-12
    lesson.proves(4, held, f"100 chords, on average {(chord - between).mean():.3f} above the loss")

    lesson.heading("Smoothing as a penalty")

    def penalised(W: Tensor) -> Tensor:
        return loss_of_counts(W, counts) - ALPHA / N * W.log_softmax(-1).sum()

    whole = (N + ALPHA * V**2) / N  # the pseudo-counts are counted too
    theirs = value_and_gradient(lambda W: whole * loss_of_counts(W, counts + ALPHA), W)
    lesson.proves_equal(5, value_and_gradient(penalised, W), theirs)

    lesson.heading(f"{lesson.steps} steps over all counts")
    targets, optima = torch.stack([counts, counts + ALPHA]), torch.stack([q, smoothed])  # (2, V, V) each
    least = -torch.xlogy(targets, optima).sum((-2, -1)) / targets.sum((-2, -1))  # (2,)
    starts = torch.stack([spread * normal(V, V) for spread in STARTS.values()])  # (3, V, V)
    tables = starts[:, None].repeat(1, 2, 1, 1).requires_grad_()  # (3, 2, V, V): each for both targets
    curve = train(
        torch.optim.Adam([tables], lr=0.5, betas=(0.9, 0.9)),
        lambda W: loss_of_counts(W, targets).sum(),
        lambda W: loss_of_counts(W, targets) - least,
        lesson.progress(range(lesson.steps), "counts"),
    )  # (steps + 1, 3, 2): nats above the least
    off = (tables.detach().softmax(-1) - optima)[..., counts.sum(-1) > 0, :].abs().amax((-2, -1)).cpu()
    print(f"least loss {least[0]:.4f}")
    for name, losses, far in zip(STARTS, curve[..., 0].unbind(1), off[:, 0], strict=True):
        print(f"{name:9} {losses[0]:.4f} above -> {losses[-1]:.0e}, furthest probability {far:.0e}")
    held = bool(curve[-1].abs().max() < 1e-5 and off.max() < 1e-4)
    lesson.proves(6, held, "losses within 1e-05, probabilities within 1e-04", full_run=True)

    lesson.heading(f"{lesson.steps} batches of {B} windows of {T} characters")
    curves = {"all counts, Adam": curve[:, 0, 0]}
    found = {
        "all alike": 0 * q,
        f"counted, α = {ALPHA:g}": smoothed.log(),
        f"trained, α = {ALPHA:g}": tables[0, 1].detach(),
    }
    near = True
    for name, (rate, bound) in RATES.items():
        W = torch.zeros(V, V, device=lesson.device, requires_grad=True)
        curve = train(
            getattr(torch.optim, name)([W], lr=rate),
            functools.partial(loss_of_windows, corpus=corpus, draw=draw),
            lambda W: loss_of_counts(W.to(place).double(), counts) - least[0],
            lesson.progress(range(lesson.steps), name),
        )  # (steps + 1,)
        near = near and bool(curve.min() > 0 and curve[-1] < bound)
        curves[f"windows, {name}"], found[f"windows, {name}"] = curve, W.detach()
    print("                 training   held out")
    for name, W in found.items():
        training = loss_of_counts(W.to(place).double(), counts).item()
        held_out = nats_per_character(functools.partial(bigram, W.float().to(lesson.device)), corpus)
        print(f"{name:15} {training:9.4f} {held_out:10.4f}")
        lesson.measured(**{name: {"training": training, "held_out": held_out}})
    gaps = ", ".join(f"{name} {curve[-1]:.4f}" for name, curve in curves.items())
    lesson.proves(7, near, f"above the least: {gaps}", full_run=True)

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(curve, label=name)
    axes.set(xlabel="step", ylabel="nats above the counted table", yscale="log")
    axes.set_title("Training ends at the table of counts, windows a little above")
    axes.legend(loc="lower left")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, data="stories", steps=1000)
