"""Initialisation: the size of the first weights decides what is left of a signal after 20 layers.

Run:     uv run sprints/03_models_and_training_loops/01b_initialisation.py      (7 s on two cores)
Proves:  1. Xavier, Kaiming and nn.Linear's own initialisation, written by hand, draw PyTorch's very weights
         2. weights of deviation σ multiply the spread by σ·√D on the way forward, by σ·√H on the way back
         3. with ReLU it is σ·√(D/2) a layer, through 20 layers, forward and back, whatever σ is
         4. the right σ keeps activations and gradients within a factor of 10 of where they began; half of it
            leaves less than 1/10,000 of either; twice of it makes the gradient grow more than 5-fold
         5. from the right σ the 20 layers learn; from half of it the loss stays put, from twice it overflows
Shapes:  N samples, D inputs, H outputs
Writes:  results/03_models_and_training_loops/01b_initialisation.png
Note:    notes/01b_initialisation.md
"""

import math
from collections.abc import Callable
from itertools import pairwise

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

SHAPES = ((64, 512), (256, 256), (512, 64))  # D, H
LAYERS, WIDTH = 20, 256
STEPS, RATE = 100, 0.001


def xavier(D: int, H: int) -> float:
    """The standard deviation σ of the weights from D inputs to H outputs, for tanh."""
    return (2 / (D + H)) ** 0.5


def kaiming(D: int, H: int) -> float:
    """The same for ReLU, which silences half of the inputs."""
    return (2 / D) ** 0.5


def linear(D: int, H: int) -> float:
    """What nn.Linear does by itself: weights spread evenly between ±1/√D."""
    return (1 / (3 * D)) ** 0.5


def spread(x: Tensor) -> float:
    """The root mean square: the size of a typical number in x."""
    return x.detach().square().mean().sqrt().item()


def through(
    bend: Callable, weights: list[Tensor], x: Tensor, back: Tensor
) -> tuple[list[float], list[float]]:
    """Send x (N, D) forward through weights (H, D) each, and a gradient, `back` (N, H), from the end to x.

    Returns the spread of the activations, and of the gradients, before the first layer and after each.
    """
    h = [x.requires_grad_()]
    for w in weights:
        h.append(bend(h[-1] @ w.T))  # (N, D) @ (D, H) -> (N, H)
    return [spread(t) for t in h], [spread(t) for t in torch.autograd.grad(h[-1], h, back)]


def train(times: float, lesson: Lesson) -> list[float]:
    """Gradient descent on |x₀| + x₁ from `times` Kaiming: the loss at each step. Answering 0 would cost 1."""
    draw = torch.Generator().manual_seed(lesson.seed)
    x = torch.randn(64, 8, generator=draw)  # (N, D)
    y = x[:, :1].abs() + x[:, 1:2]  # (N, 1)
    x, y = x.to(lesson.device), ((y - y.mean()) / y.std(correction=0)).to(lesson.device)
    sizes, losses = [8] + [WIDTH // 2] * (LAYERS - 1) + [1], []
    weights = [
        (times * kaiming(D, H) * torch.randn(H, D, generator=draw)).to(lesson.device).requires_grad_()
        for D, H in pairwise(sizes)
    ]
    for _ in lesson.progress(range(STEPS)):
        h = x
        for w in weights[:-1]:
            h = torch.relu(h @ w.T)
        loss = (h @ weights[-1].T - y).square().mean()
        losses.append(loss.item())
        with torch.no_grad():
            for w, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                w -= RATE * gradient
    return losses


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # the matrices are so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(lesson.device)

    lesson.heading("First weights: 48 inputs, 64 outputs")
    D, H = 48, 64

    def fill(init: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(lesson.seed)
        return init(torch.empty(H, D)).detach()

    by_hand = [sigma(D, H) * fill(Tensor.normal_) for sigma in (xavier, kaiming)]
    by_hand += [linear(D, H) * 3**0.5 * fill(lambda w: w.uniform_(-1, 1))]  # ±1 has deviation 1/√3
    by_torch = [fill(nn.init.xavier_normal_), fill(lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))]
    by_torch += [fill(lambda w: nn.Linear(D, H).weight)]
    for sigma, weight in zip((xavier, kaiming, linear), by_torch, strict=True):
        print(f"{sigma.__name__:7}   σ {sigma(D, H):.3f}   measured {weight.std():.3f}")
    lesson.proves_equal(1, by_hand, by_torch)

    lesson.heading("One layer with Xavier's σ: forward | back, measured (formula)")
    off = []
    for D, H in SHAPES:
        sigma = xavier(D, H)
        h, back = through(lambda h: h, [sigma * normal(H, D)], normal(128, D), normal(128, H))
        a, b = h[1] / h[0], back[0] / back[1]
        off += [a / (sigma * D**0.5) - 1, b / (sigma * H**0.5) - 1]
        print(f"D {D:3}, H {H:3}   × {a:.2f} ({sigma * D**0.5:.2f}) | × {b:.2f} ({sigma * H**0.5:.2f})")
    worst = max(map(abs, off))
    lesson.proves(2, worst < 0.05, f"within {worst:.1%}")

    lesson.heading(f"{LAYERS} layers of width {WIDTH}: activations forward | gradients back")
    starts = [("tanh", f"{times:g} × Xavier", times * xavier(WIDTH, WIDTH)) for times in (0.5, 1, 2)]
    starts += [("relu", f"{times:3} × Kaiming", times * kaiming(WIDTH, WIDTH)) for times in (0.5, 1, 2)]
    starts += [("relu", "Xavier", xavier(WIDTH, WIDTH)), ("relu", "nn.Linear", linear(WIDTH, WIDTH))]
    curves, grown, off = [], [], []
    for bend, _, sigma in starts:
        weights = [sigma * normal(WIDTH, WIDTH) for _ in range(LAYERS)]
        h, back = through(getattr(torch, bend), weights, normal(128, WIDTH), normal(128, WIDTH))
        curves.append((h, back))
        grown.append((h[-1] / h[0], back[0] / back[-1]))
    for (bend, name, sigma), (a, b) in zip(starts, grown, strict=True):
        told, formula = f"{bend} {name:12}  × {a:.1e} | × {b:.1e}", sigma * (WIDTH / 2) ** 0.5
        if bend == "relu":
            a_layer = [total ** (1 / LAYERS) for total in (a, b)]
            off += [measured / formula - 1 for measured in a_layer]
            told += f"   a layer × {a_layer[0]:.2f} | × {a_layer[1]:.2f} ({formula:.2f})"
        print(told)
    worst = max(map(abs, off))
    lesson.proves(3, worst < 0.1, f"within {worst:.1%}")
    half, right, twice = (grown[i] + grown[i + 3] for i in range(3))  # tanh and ReLU: forward, back
    kept = min(right) > 0.1 and max(right) < 10
    told = f"{min(right):.2f} to {max(right):.2f}; {max(half):.1e}; {min(twice[1::2]):.0f}-fold"
    lesson.proves(4, kept and max(half) < 1e-4 and min(twice[1::2]) > 5, told)

    lesson.heading(f"Do {LAYERS} ReLU layers learn? {STEPS} steps; answering 0 costs 1")
    half, right, twice = (train(times, lesson) for times in (0.5, 1, 2))
    for times, losses in ((0.5, half), (1, right), (2, twice)):
        told = f"loss {losses[0]:9.4g}, after a step {losses[1]:6.4g}, in the end {losses[-1]:6.4g}"
        print(f"{times:3} × Kaiming   {told}")
    held = abs(half[-1] - half[0]) < 1e-3 and right[-1] < 0.5 and not math.isfinite(twice[-1])
    lesson.proves(5, held, f"{right[-1]:.2f}, {half[-1]:.2f}, {twice[-1]}")

    figure, panels = plt.subplots(1, 2, figsize=(6.6, 3.4), layout="constrained", sharey=True)
    names = "half of it", "Xavier, Kaiming", "twice of it"
    for (bend, name, _), (h, back) in zip(starts, curves, strict=True):
        if (bend, name) != ("relu", "Xavier"):
            panel = panels[int(bend == "relu")]
            (line,) = panel.semilogy(h)
            panel.semilogy(back, "--", color=line.get_color())
    panels[0].legend(panels[0].lines[::2], names, title="σ", loc="upper right", fontsize="small")
    panels[1].annotate("nn.Linear's own", (10, 3e-8), color=line.get_color(), ha="center")
    for panel, title in zip(panels, ("tanh", "ReLU"), strict=True):
        panel.set(xlabel="layer", xticks=range(0, LAYERS + 1, 5), title=title)
    panels[0].set(ylabel="spread: activations —, gradients - -")
    figure.suptitle("Only the right σ lets signals and gradients through 20 layers", fontsize="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
