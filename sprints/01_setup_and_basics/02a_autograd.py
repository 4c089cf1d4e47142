"""Autograd: PyTorch records what you compute, and walks back through it to get exact derivatives.

Run:     uv run sprints/01_setup_and_basics/02a_autograd.py      (9 s on two cores)
Proves:  1. the gradient from backward() equals central differences
         2. the graph leads from the result back to every leaf that asked for a gradient, and to no other
         3. backward() adds to .grad: without zeroing, three calls leave three times the gradient
         4. no gradient passes through detach(), and no graph is recorded under no_grad()
         5. differentiating the derivative gives the second derivative
         6. the Jacobian, one backward pass per output, equals the closed form and torch.func.jacrev
Shapes:  N numbers, M outputs
Writes:  results/01_setup_and_basics/02a_autograd.png
Note:    notes/02a_autograd.md
"""

from collections.abc import Callable

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
from torch import Tensor

SHAPES = ((1,), (3,), (2, 5), (3, 1, 4))


def central_differences(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """The derivative as a school book defines it: nudge one number up and down and see what f does.

    Two calls of f per number in x; the error is about step². Returns the shape of x.
    """
    gradient = torch.empty_like(x)
    for i in range(x.numel()):
        nudge = torch.zeros_like(x)
        nudge.view(-1)[i] = step
        gradient.view(-1)[i] = (f(x + nudge) - f(x - nudge)) / (2 * step)
    return gradient


def landscape(x: Tensor) -> Tensor:
    """Something with many kinds of operation in it: (…, N) -> a single number."""
    return (x.sin() * x.square()).sum() + x.logsumexp(-1).sum() - (x[..., :1] * x).tanh().mean()


def leaves(result: Tensor) -> set[int]:
    """Walk the recorded graph backwards; the ids of the leaf tensors at its ends."""
    found, unseen = set(), [result.grad_fn]
    while unseen:
        node = unseen.pop()
        if hasattr(node, "variable"):  # AccumulateGrad: the place where .grad of a leaf is written
            found.add(id(node.variable))
        unseen += [parent for parent, _ in node.next_functions if parent is not None]
    return found


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Row m is the gradient of output m: (N,) -> (M, N)."""
    x = x.detach().requires_grad_()
    y = f(x)  # (M,)
    return torch.stack([torch.autograd.grad(output, x, retain_graph=True)[0] for output in y])


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)

    lesson.heading("A gradient, two ways")
    ours, slow = [], []
    for shape in SHAPES:
        x = torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device).requires_grad_()
        landscape(x).backward()
        with torch.no_grad():
            ours, slow = [*ours, x.grad], [*slow, central_differences(landscape, x)]
        first = f"backward {ours[-1].flatten()[0]:+.6f}   nudged {slow[-1].flatten()[0]:+.6f}"
        print(f"x of shape {shape!s:9}   first number: {first}")
    lesson.proves_equal(1, ours, slow, tolerance=1e-7)

    lesson.heading("The graph behind a number")
    w, b, x = torch.tensor([[2.0], [1.0], [3.0]], device=lesson.device)  # three tensors of shape (1,)
    w.requires_grad_(), b.requires_grad_()
    y = (w * x + b).square()
    print(f"w {w.item():.0f}, b {b.item():.0f}, x {x.item():.0f}   y = (w·x + b)² = {y.item():.0f}")
    print(f"y was made by {y.grad_fn.name()}, from {y.grad_fn.next_functions[0][0].name()}")
    found = leaves(y)
    print(f"leaves reached: w {id(w) in found}, b {id(b) in found}, x {id(x) in found}")
    lesson.proves(2, found == {id(w), id(b)}, "w and b, not x")

    lesson.heading(".grad adds up")
    for call in range(1, 4):
        y.backward(retain_graph=True)
        print(f"after call {call}   w.grad {w.grad.item():3.0f}   b.grad {b.grad.item():3.0f}")
    by_hand = 2 * (w * x + b).detach() * x  # dy/dw = 2(w·x + b)·x
    lesson.proves_equal(3, w.grad, 3 * by_hand)
    w.grad = None  # what optimizer.zero_grad() does
    y.backward()
    lesson.proves_equal(3, w.grad, by_hand)

    lesson.heading("Stopping the gradient")
    a = torch.tensor(3.0, device=lesson.device, requires_grad=True)
    (a * a.detach()).backward()  # the second factor counts as a constant
    with torch.no_grad():
        silent = a * a
    print(f"d(a·a)/da = {2 * a.item():.0f}   with one factor detached {a.grad.item():.0f}")
    held = a.grad.item() == a.item() and silent.grad_fn is None and not silent.requires_grad
    lesson.proves(4, held, "half the derivative, and no graph")

    lesson.heading("Derivatives of derivatives")
    x = torch.linspace(-2, 2, 161, dtype=torch.float64, device=lesson.float64_device, requires_grad=True)
    f = torch.sin(x**2)
    (first,) = torch.autograd.grad(f.sum(), x, create_graph=True)  # (161,): still a graph, so we can go on
    (second,) = torch.autograd.grad(first.sum(), x)
    with torch.no_grad():
        lesson.proves_equal(5, second, 2 * torch.cos(x**2) - 4 * x**2 * torch.sin(x**2))

    lesson.heading("Many outputs")

    def polar(point: Tensor) -> Tensor:
        radius, angle = point
        return torch.stack([radius * angle.cos(), radius * angle.sin()])

    at = torch.tensor([2.0, 0.5], dtype=torch.float64, device=lesson.float64_device)
    ours, (radius, angle) = jacobian(polar, at), at
    print("d(x, y) / d(radius, angle):", [[round(entry, 3) for entry in row] for row in ours.tolist()])
    rows = [[angle.cos(), -radius * angle.sin()], [angle.sin(), radius * angle.cos()]]
    closed = torch.stack([torch.stack(row) for row in rows])
    lesson.proves_equal(6, [ours, ours], [closed, torch.func.jacrev(polar)(at)])

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    numbers = x.detach().cpu()
    for values, name in ((f, "f = sin x²"), (first, "f′ by autograd"), (second, "f″ by autograd")):
        axes.plot(numbers, values.detach().cpu(), label=name)
    slopes = central_differences(lambda v: torch.sin(v**2).sum(), x.detach()).cpu()
    axes.plot(numbers[::8], slopes[::8], "k.", label="f′ by central differences")
    axes.set(xlabel="x", ylabel="value", title="The slopes found by nudging lie on autograd's curve")
    axes.legend(loc="lower center", fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
