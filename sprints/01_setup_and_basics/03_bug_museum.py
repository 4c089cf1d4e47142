"""The bug museum: seven mistakes with tensors and gradients that raise no error, and what finds each of them.

Run:     uv run sprints/01_setup_and_basics/03_bug_museum.py      (5 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
Shapes:  N samples, C classes, T steps
Note:    notes/03_bug_museum.md
"""

from collections.abc import Callable

from lab.lesson import Lesson, run
from lab.museum import Exhibit, Outcome, Variant, show

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
RATE, STEPS = 0.1, 100


def samples() -> tuple[Tensor, Tensor]:
    """Points scattered about the line y = 3x + 1: x (N,), y (N,)."""
    draw = torch.Generator().manual_seed(torch.initial_seed())
    x, noise = torch.randn(2, 60, generator=draw, device="cpu").to(torch.get_default_device())
    return x, 3 * x + 1 + noise


def error(w: Tensor, flat: bool = False) -> Tensor:
    """Mean squared error of the line w[0]·x + w[1]: (2,) -> a single number."""
    x, y = samples()
    prediction = w[0] * x[:, None] + w[1]  # (N, 1)
    return (prediction - (y if flat else y[:, None])).square().mean()  # flat: (N, 1) - (N,) -> (N, N)


def penalised(w: Tensor, detached: bool = False) -> Tensor:
    """The error plus a penalty on large weights: (2,) -> a single number."""
    penalty = w.square().sum()
    return error(w) + (penalty.item() if detached else penalty)


def descend(loss: Loss, zero: bool = True, copy: bool = True, rebind: bool = False) -> list[Tensor]:
    """Gradient descent: a summary (4,), the last weights (2,), each step's weights (T, 2) and losses (T,)."""
    w, kept, losses = torch.zeros(2, requires_grad=True), [], []
    for _ in range(STEPS):
        now = loss(w)
        now.backward()
        losses.append(now.detach())
        kept.append(w.detach().clone() if copy else w.detach())
        if rebind:
            w = w - RATE * w.grad
            w.retain_grad()  # w is no leaf any more, so its gradient would not be kept
        else:
            with torch.no_grad():
                w -= RATE * w.grad
        if zero:
            w.grad = None
    return [torch.stack([losses[0], losses[-1], *w.detach()]), w, torch.stack(kept), torch.stack(losses)]


def surprise(in_place: bool) -> list[Tensor]:
    """-log p[0] with p a softmax by hand: the gradient of the scores (C,), and p (C,)."""
    scores = torch.arange(3.0).requires_grad_()
    p = scores.exp()
    if in_place:
        p.data /= p.data.sum()
    else:
        p = p / p.sum()
    (-p[0].log()).backward()
    return [scores.grad, p.detach()]


def centre(means: Tensor) -> list[Tensor]:
    """Writes the mean of each class into means (C,) and subtracts it; the means that remain (C,)."""
    y = samples()[1].view(-1, len(means))  # (N,) -> (N / C, C): every third sample is of the same class
    for c in range(len(means)):
        means[c] = y[:, c].mean()
    return [(y - means).mean(0)]


def nudged(f: Loss, w: Tensor, step: float = 1e-2) -> Tensor:
    """The gradient of f by central differences, as in 02a, with a step for float32: (N,) -> (N,)."""
    return torch.stack([(f(w + nudge) - f(w - nudge)) / (2 * step) for nudge in step * torch.eye(len(w))])


class Case(Exhibit):
    """What a person sees is the first tensor that comes back."""

    seen = "first loss, last, slope, offset"
    right = staticmethod(lambda: descend(error))

    def symptom(self, wrong: Outcome, right: Outcome) -> str:
        wrong, right = ([round(number, 2) + 0.0 for number in part[0].tolist()] for part in (wrong, right))
        return f"{self.seen} {wrong}   (right: {right})"


class NeverZeroed(Case):
    """Gradients never zeroed"""

    check = "a step is -RATE times the gradient of that step alone"
    repair = "w.grad = None"
    wrong = staticmethod(lambda: descend(error, zero=False))

    def passes(self, variant: Variant) -> bool:
        kept = variant()[2]
        return torch.allclose(kept[6] - kept[5], -RATE * nudged(error, kept[5]), atol=1e-3)


class Broadcast(Case):
    """(N, 1) against (N,) in a loss"""

    check = "the slope is that of least squares in closed form"
    repair = "prediction - y[:, None]"
    wrong = staticmethod(lambda: descend(lambda w: error(w, flat=True)))

    def passes(self, variant: Variant) -> bool:
        x, y = (part - part.mean() for part in samples())
        return torch.allclose(variant()[1][0], (x * y).sum() / x.square().sum(), atol=1e-2)


class ViewKept(Case):
    """A view where a copy was meant"""

    check = "the weights kept at each step give the loss noted there"
    repair = "kept.append(w.detach().clone())"
    seen = "slope and offset kept before the first step"
    wrong = staticmethod(lambda: descend(error, copy=False))

    def symptom(self, wrong: Outcome, right: Outcome) -> str:
        return super().symptom([wrong[2][0]], [right[2][0]])

    def passes(self, variant: Variant) -> bool:
        _, _, kept, losses = variant()
        return torch.allclose(torch.stack([error(w) for w in kept]), losses, atol=1e-4)


class Rebound(Case):
    """An update outside no_grad"""

    check = "the trained weights are a leaf, with no graph behind them"
    repair = "with torch.no_grad(): w -= RATE * w.grad"
    wrong = staticmethod(lambda: descend(error, rebind=True))

    def passes(self, variant: Variant) -> bool:
        return variant()[1].is_leaf


class DetachedPenalty(Case):
    """A detached branch: .item() in the loss"""

    check = "at the end, nudging the weights does not lower the loss"
    repair = "error(w) + penalty"
    wrong = staticmethod(lambda: descend(lambda w: penalised(w, detached=True)))
    right = staticmethod(lambda: descend(penalised))

    def passes(self, variant: Variant) -> bool:
        return nudged(penalised, variant()[1].detach()).abs().max().item() < 0.1


class ChangedInPlace(Case):
    """In-place change of what backward needs, hidden by .data"""

    seen = "gradient of the scores"
    check = "the gradient equals central differences"
    repair = "p = p / p.sum()"
    wrong = staticmethod(lambda: surprise(in_place=True))
    right = staticmethod(lambda: surprise(in_place=False))

    def passes(self, variant: Variant) -> bool:
        slow = nudged(lambda scores: -scores.log_softmax(0)[0], torch.arange(3.0))
        return torch.allclose(variant()[0], slow, atol=1e-2)


class IntegerBuffer(Case):
    """Means written into a tensor of integers"""

    seen = "class means after centring"
    check = "every class has mean 0 after centring"
    repair = "means = torch.tensor([0.0, 0.0, 0.0])"
    wrong = staticmethod(lambda: centre(torch.tensor([0, 0, 0])))
    right = staticmethod(lambda: centre(torch.tensor([0.0, 0.0, 0.0])))

    def passes(self, variant: Variant) -> bool:
        return variant()[0].abs().max().item() < 1e-4


def main(lesson: Lesson) -> None:
    torch.set_default_device(lesson.device)
    show(lesson, [NeverZeroed, Broadcast, ViewKept, ChangedInPlace, Rebound, IntegerBuffer, DetachedPenalty])


if __name__ == "__main__":
    run(main)
