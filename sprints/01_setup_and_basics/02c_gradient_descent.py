"""Gradient descent: a line fitted by walking downhill, and the size of step at which the walk flies apart.

Run:     uv run sprints/01_setup_and_basics/02c_gradient_descent.py      (10 s on two cores)
Proves:  1. the gradient and the Hessian written out by hand equal autograd's
         2. descent by hand and by autograd with torch.optim.SGD take the same steps
         3. both end at the line that the normal equations and torch.linalg.lstsq give in closed form
         4. each step multiplies the error along each eigenvector of the Hessian by 1 - rate·λ
         5. at 0.98 times the limit 2/λmax descent converges on each of ten data sets
         6. at 1.02 times the limit it diverges on each of them
         7. with standardised x one step of rate 1/λ is enough
Shapes:  N points, F = 2 features each: x itself and a constant 1; theta (F,) holds slope and intercept
Writes:  results/01_setup_and_basics/02c_gradient_descent.png
         results/01_setup_and_basics/02c_gradient_descent.json
Note:    notes/02c_gradient_descent.md
"""

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
from torch import Tensor

STEPS = 400
SLOW, GOOD, TOO_FAST = 0.1, 0.8, 1.05  # as shares of the limit


def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of a line: theta (F,), x (N, F), y (N,) -> a single number."""
    return (x @ theta - y).square().mean()


def gradient_by_hand(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of the loss by theta: (F,)."""
    return 2 / len(y) * x.T @ (x @ theta - y)


def hessian_by_hand(x: Tensor) -> Tensor:
    """The gradient of the gradient: (F, F). It is the same at every theta, so the loss is a parabola."""
    return 2 / len(x) * x.T @ x


def closed_form(x: Tensor, y: Tensor) -> Tensor:
    """The theta (F,) at which the gradient is zero: the normal equations xᵀx θ = xᵀy."""
    return torch.linalg.solve(x.T @ x, x.T @ y)


def limit(x: Tensor) -> float:
    """The rate at which a step along the steepest direction lands as far on the other side: 2/λmax."""
    return 2 / torch.linalg.eigvalsh(hessian_by_hand(x))[-1].item()


def descend(theta: Tensor, x: Tensor, y: Tensor, rate: float, steps: int) -> Tensor:
    """Every theta on the way, the first included: (steps + 1, F)."""
    path = [theta]
    for _ in range(steps):
        path.append(path[-1] - rate * gradient_by_hand(path[-1], x, y))
    return torch.stack(path)


def descend_by_autograd(theta: Tensor, x: Tensor, y: Tensor, rate: float, steps: int) -> Tensor:
    """The same, written as every training loop is: (steps + 1, F)."""
    theta, path = theta.clone().requires_grad_(), [theta]
    optimizer = torch.optim.SGD([theta], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(theta, x, y).backward()
        optimizer.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


def points(draw: torch.Generator, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """n noisy points on y = 2x - 1: features (N, F) and y (N,)."""
    x, noise = torch.randn(2, n, generator=draw, dtype=torch.float64).to(device)
    x = 1 + 1.2 * x
    return torch.stack([x, torch.ones_like(x)], dim=1), 2 * x - 1 + 0.5 * noise


def growth(theta: Tensor, x: Tensor, y: Tensor, share: float, steps: int) -> float:
    """The distance from the best line after descent at a share of the limit, over the distance before."""
    path = descend(theta, x, y, share * limit(x), steps)
    before, after = (path[[0, -1]] - closed_form(x, y)).norm(dim=1).tolist()
    return after / before


def picture(x: Tensor, y: Tensor, start: Tensor) -> plt.Figure:
    """The walks at three rates over the lines of equal loss."""
    figure, panels = plt.subplots(1, 3, figsize=(6, 3.4), layout="constrained", sharey=True)
    figure.suptitle("Small steps crawl, good ones arrive, steps above the limit climb", fontsize="medium")
    slopes, intercepts = torch.linspace(-1, 5, 80), torch.linspace(-4, 2, 80)
    thetas = torch.cartesian_prod(intercepts, slopes).flip(1).double()  # (6400, F)
    heights = torch.stack([loss(theta, x.cpu(), y.cpu()) for theta in thetas]).reshape(80, 80)
    for axes, share in zip(panels, (SLOW, GOOD, TOO_FAST), strict=True):
        axes.contour(slopes, intercepts, heights.sqrt(), levels=5, colors="C3", linewidths=0.6)
        axes.plot(*descend(start, x, y, share * limit(x), 12).T.cpu(), "o-", markersize=3, linewidth=1)
        axes.plot(*closed_form(x, y).cpu(), "k*", markersize=9)
        axes.set(xlim=(-1, 5), ylim=(-4, 2), xlabel="slope", title=f"{share:g} × limit")
    panels[0].set_ylabel("intercept")
    return figure


def main(lesson: Lesson) -> None:
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device

    lesson.heading("Four points by hand")
    x = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [2.0, 1.0], [2.0, 1.0]], dtype=torch.float64, device=device)
    y, start = 2 * x[:, 0] - 1, x.new_zeros(2)
    print(f"Hessian {hessian_by_hand(x).tolist()}   limit {limit(x):.4f}")
    for step, (slope, intercept) in enumerate(descend(start, x, y, 0.3, 3)):
        print(f"step {step} at rate 0.3   slope {slope:.3f}   intercept {intercept:+.3f}")
    sets = [points(draw, n, device) for n in (2, 7, 40)]
    ours = [part for x, y in sets for part in (gradient_by_hand(start, x, y), hessian_by_hand(x))]
    autograd = torch.func.grad(loss), torch.func.jacrev(torch.func.grad(loss))
    theirs = [derivative(start, x, y) for x, y in sets for derivative in autograd]
    lesson.proves_equal(1, ours, theirs)

    lesson.heading("One line, three ways")
    x, y = sets[-1]
    rate, best = GOOD * limit(x), closed_form(x, y)
    by_hand, by_autograd = (walk(start, x, y, rate, lesson.steps) for walk in (descend, descend_by_autograd))
    for name, theta in (("by hand", by_hand[-1]), ("by autograd", by_autograd[-1]), ("closed form", best)):
        print(f"{name:12} slope {theta[0]:.6f}   intercept {theta[1]:+.6f}   loss {loss(theta, x, y):.6f}")
    lesson.proves_equal(2, by_hand, by_autograd)
    lstsq = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]  # (N, F), (N, 1) -> (F, 1) -> (F,)
    apart = torch.stack([by_hand[-1] - best, by_autograd[-1] - best, lstsq - best]).abs().max().item()
    lesson.proves(3, apart < 1e-9, f"{apart:.0e} apart", full_run=True)

    lesson.heading("How large may a step be?")
    eigenvalues, eigenvectors = torch.linalg.eigh(hessian_by_hand(x))  # (F,), (F, F): one per column
    errors, predicted = [], []
    for share in (SLOW, GOOD, TOO_FAST):
        path = descend(start, x, y, share * limit(x), 50)
        factors = 1 - share * limit(x) * eigenvalues  # (F,)
        errors.append((path - best) @ eigenvectors)  # (51, F): how far off along each eigenvector
        predicted.append(torch.stack([errors[-1][0] * factors**t for t in range(51)]))
        (flat, steep), far = factors.tolist(), growth(start, x, y, share, 50)
        print(f"{share:4.2f} × limit   factors {flat:+.3f}, {steep:+.3f}   error × {far:.1e} in 50 steps")
    lesson.proves_equal(4, errors, predicted)
    sets = [points(draw, 40, device) for _ in range(10)]
    below, above = ([growth(start, x, y, share, STEPS) for x, y in sets] for share in (0.98, 1.02))
    lesson.proves(5, max(below) < 1e-3, f"the error shrinks to {max(below):.0e} or less in {STEPS} steps")
    lesson.proves(6, min(above) > 1e3, f"the error grows {min(above):.0e} times or more")

    lesson.heading("Standardised x")
    scaled = torch.stack([(x[:, 0] - x[:, 0].mean()) / x[:, 0].std(correction=0), x[:, 1]], dim=1)  # (N, F)
    for name, inputs in (("as drawn", x), ("standardised", scaled)):
        flat, steep = torch.linalg.eigvalsh(hessian_by_hand(inputs)).tolist()
        print(f"x {name:12}   eigenvalues {flat:.3f}, {steep:.3f}   limit {limit(inputs):.3f}")
    lesson.proves_equal(7, descend(start, scaled, y, limit(scaled) / 2, 1)[-1], closed_form(scaled, y))
    lesson.measured(limit=limit(x), rate=rate, loss=loss(by_hand[-1], x, y).item())
    lesson.save(picture(x, y, start))


if __name__ == "__main__":
    run(main, steps=STEPS)
