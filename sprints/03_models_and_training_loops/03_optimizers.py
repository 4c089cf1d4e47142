"""Optimisers: six rules that turn gradients into steps, and why decaying the weights depends on the rule.

Run:     uv run sprints/03_models_and_training_loops/03_optimizers.py      (7 s on two cores)
Proves:  1. by hand, all six take the 200 steps of torch.optim on a network, with weight decay too
         2. momentum's step is a weighted sum of all gradients so far, Adam's a mean over a root mean square
         3. in a valley 100 times as steep across, SGD at its best rate is left far behind by momentum
         4. turn the valley, and the paths of SGD, momentum and Nesterov turn with it; the others do not
         5. under SGD, decoupled weight decay and an L2 penalty in the loss are one and the same
         6. under Adam, decoupled decay shrinks all weights alike, L2 hardly those with large gradients
Shapes:  N points, F features, D hidden units; P parameters of the network in one row; T steps
Writes:  results/03_models_and_training_loops/03_optimizers.png
Note:    notes/03_optimizers.md
"""

from collections.abc import Callable
from functools import partial

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
from torch import Tensor

N, F, D, STEPS, DECAY = 64, 3, 8, 200, 0.1

# All of one shape: parameters, their gradients and what was remembered about them give the next parameters.


def sgd(p: Tensor, g: Tensor, memory: dict, lr: float) -> Tensor:
    return p - lr * g


def momentum(p: Tensor, g: Tensor, memory: dict, lr: float, momentum: float = 0.9) -> Tensor:
    memory["v"] = momentum * memory.get("v", 0) + g
    return p - lr * memory["v"]


def nesterov(p: Tensor, g: Tensor, memory: dict, lr: float, momentum: float = 0.9) -> Tensor:
    memory["v"] = momentum * memory.get("v", 0) + g
    return p - lr * (g + momentum * memory["v"])  # one step further: the v of the next step, if g stays


def rmsprop(p: Tensor, g: Tensor, memory: dict, lr: float, alpha: float = 0.99, eps: float = 1e-8) -> Tensor:
    memory["s"] = alpha * memory.get("s", 0) + (1 - alpha) * g**2
    return p - lr * g / (memory["s"].sqrt() + eps)


def adam(p: Tensor, g: Tensor, memory: dict, lr: float, betas=(0.9, 0.999), eps: float = 1e-8) -> Tensor:
    memory["t"] = memory.get("t", 0) + 1
    memory["m"] = betas[0] * memory.get("m", 0) + (1 - betas[0]) * g
    memory["s"] = betas[1] * memory.get("s", 0) + (1 - betas[1]) * g**2
    mean, square = (memory[name] / (1 - beta ** memory["t"]) for name, beta in zip("ms", betas, strict=True))
    return p - lr * mean / (square.sqrt() + eps)


def l2(rule: Callable) -> Callable:
    """With decay in the gradient: weight_decay·p is the derivative of weight_decay/2·p²."""
    return lambda p, g, memory, weight_decay=0.0, **rest: rule(p, g + weight_decay * p, memory, **rest)


def decoupled(rule: Callable) -> Callable:
    """With decay beside the gradient: shrink the parameters, then step."""
    return lambda p, g, memory, lr, weight_decay=0.01, **rest: rule(
        p * (1 - lr * weight_decay), g, memory, lr, **rest
    )


adamw = decoupled(adam)
RULES = {  # by hand, PyTorch's own, rate on the network, rate in the valley, constants far from the defaults
    "SGD": (l2(sgd), torch.optim.SGD, 0.1, 2 / 101, {}),
    "momentum": (l2(momentum), partial(torch.optim.SGD, momentum=0.9), 0.03, 1 / 100, {"momentum": 0.5}),
    "Nesterov": (
        l2(nesterov), partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.03, 1 / 100, {"momentum": 0.5},
    ),
    "RMSProp": (l2(rmsprop), torch.optim.RMSprop, 0.01, 0.1, {"alpha": 0.8, "eps": 1e-3}),
    "Adam": (l2(adam), torch.optim.Adam, 0.03, 0.3, {"betas": (0.7, 0.9), "eps": 1e-3}),
    "AdamW": (adamw, torch.optim.AdamW, 0.03, 0.3, {"betas": (0.7, 0.9), "eps": 1e-3}),
}  # fmt: skip


def walk(rule: Callable, p: Tensor, loss: Callable, steps: int = STEPS) -> Tensor:
    """All parameters after every step of a rule by hand, the start included: (steps + 1, P)."""
    path, memory = [p], {}
    for t in range(steps):
        p = p.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(p, t), p)
        p = rule(p.detach(), g, memory)
        path.append(p)
    return torch.stack(path)


def walk_torch(make: Callable, p: Tensor, loss: Callable, steps: int = STEPS) -> Tensor:
    """The same with one of PyTorch's optimisers: (steps + 1, P)."""
    path, p = [p], p.clone().requires_grad_()
    optimizer = make([p])
    for t in range(steps):
        optimizer.zero_grad()
        loss(p, t).backward()
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def network_loss(x: Tensor, y: Tensor, p: Tensor, t: int | None) -> Tensor:
    """Mean squared error of a network with all its parameters in p (P,), on the batch of step t or on all."""
    rows = slice(None) if t is None else slice(t % 4 * N // 4, (t % 4 + 1) * N // 4)
    w, b, v = p.split([F * D, D, D])
    return ((x[rows] @ w.view(F, D) + b).tanh() @ v - y[rows]).square().mean()  # (F·D,) -> (F, D)


def weighted_mean(gradients: Tensor, beta: float) -> tuple[Tensor, float]:
    """Of gradients (T, P), one that is k steps old counting beta^k: (P,), and the sum of these weights."""
    weights = [beta ** (len(gradients) - 1 - t) for t in range(len(gradients))]
    return sum(w * g for w, g in zip(weights, gradients, strict=True)) / sum(weights), sum(weights)


def valley(turn: Tensor, p: Tensor, t: int) -> Tensor:
    """½(x² + 100 y²) around (4, 1), all of it turned about the origin by turn (2, 2)."""
    return (turn.T @ p - p.new_tensor([4, 1])).square() @ p.new_tensor([1, 100]) / 2


def picture(paths: dict[str, list[Tensor]]) -> plt.Figure:
    """One panel per rule: its path in the straight valley, and that in the turned one, turned back."""
    figure, panels = plt.subplots(2, 3, figsize=(6, 3.4), layout="constrained", sharex=True, sharey=True)
    figure.suptitle("Turn the valley: the upper three paths turn with it", fontsize="medium")
    x, y = torch.linspace(-0.5, 5.5, 80), torch.linspace(-1, 3, 80)
    height = ((x - 4) ** 2 + 100 * (y[:, None] - 1) ** 2) / 2  # (80, 80): a row per y
    for axes, (name, (straight, turned)) in zip(panels.flat, paths.items(), strict=True):
        axes.contour(x, y, height.sqrt(), levels=5, colors="C3", linewidths=0.5)
        axes.plot(*straight.T.cpu(), linewidth=2.5, label="straight valley")
        axes.plot(*turned.T.cpu(), linewidth=1, label="turned by 45°, its path turned back")
        axes.plot(4, 1, "k*", markersize=8)
        axes.set_title(name, fontsize="medium")
    for axes in panels[1]:
        axes.set_xlabel("along the valley")
    for axes in panels[:, 0]:
        axes.set_ylabel("across")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small"
    )
    return figure


def main(lesson: Lesson) -> None:
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device)

    lesson.heading("Six rules on a network")
    x, start = random(N, F), random(F * D + D + D)  # (P,)
    loss = partial(network_loss, x, x.prod(dim=1).tanh())
    ours, theirs = [], []
    print("           remembers   down p² at rate 0.05       200 steps on the network")
    for name, (rule, make, lr, _, other) in RULES.items():
        for constants in ({"lr": lr}, {"lr": lr, "weight_decay": DECAY, **other}):
            ours.append(walk(partial(rule, **constants), start, loss))
            theirs.append(walk_torch(partial(make, **constants), start, loss))
        memory = {}
        rule(start, start, memory, lr=lr)
        kept = sum(isinstance(value, Tensor) for value in memory.values())
        down = walk(partial(rule, lr=0.05), start.new_ones(1), lambda p, t: p.square().sum(), 2)[:, 0]
        before, after = (loss(p, None) for p in ours[-2][[0, -1]])
        print(f"{name:10} {kept}          ", " → ".join(f"{p:.4f}" for p in down), end="   ")
        print(f"loss {before:.3f} → {after:.3f}")
    lesson.proves_equal(1, ours, theirs)

    lesson.heading("What is remembered")
    ours, slow, zero = [], [], random(5) * 0
    for steps in (1, 2, 10, 50):
        gradients, memories = random(steps, 5), ({}, {})  # (T, P)
        for g in gradients:
            after = [momentum(zero, g, memories[0], lr=1), adam(zero, g, memories[1], lr=1)]
        (mean, weight), (square, _) = weighted_mean(gradients, 0.9), weighted_mean(gradients**2, 0.999)
        ours, slow = [*ours, *after], [*slow, -weight * mean, -mean / (square.sqrt() + 1e-8)]
        print(f"{steps:2} gradients   momentum's weights sum to {weight:5.2f}, Adam's to 1")
    lesson.proves_equal(2, ours, slow)

    lesson.heading("A valley, 100 times as steep across as along")
    cos = torch.tensor(0.5, dtype=torch.float64, device=device).sqrt()
    turn, zero = torch.stack([cos, -cos, cos, cos]).view(2, 2), start.new_zeros(2)  # 45°
    bottom, paths, left, apart = start.new_tensor([4, 1]), {}, {}, {}
    print("of the distance is left after 100 steps, and how far the turned path strays")
    for name, (rule, _, _, lr, _) in RULES.items():
        walks = [walk(partial(rule, lr=lr), zero, partial(valley, r), 100) for r in (turn @ turn.T, turn)]
        paths[name] = straight, turned = walks[0], walks[1] @ turn  # turned back
        left[name] = ((straight[-1] - bottom).norm() / bottom.norm()).item()
        apart[name] = (straight - turned).norm(dim=1).max().item()
        print(f"{name:9} rate {lr:.3f}   left {left[name]:7.3%}   strays {apart[name]:4.2f}")
    held = abs(left["SGD"] / (99 / 101) ** 100 - 1) < 1e-9 and left["momentum"] < left["SGD"] / 10
    lesson.proves(3, held, "SGD keeps (99/101)¹⁰⁰")
    equivariant = [stray < 1e-10 for stray in apart.values()]
    held = equivariant == 3 * [True] + 3 * [False] and min([*apart.values()][3:]) > 0.1
    lesson.proves(4, held, "three to rounding, three by more than 0.1")

    lesson.heading(f"Weight decay {DECAY}")
    penalty = walk(partial(sgd, lr=0.1), start, lambda p, t: loss(p, t) + DECAY / 2 * p.square().sum())
    apart = walk(partial(decoupled(sgd), lr=0.1, weight_decay=DECAY), start, loss)
    lesson.proves_equal(5, apart, penalty)
    sizes = start.new_tensor([0.01, 0.1, 1, 10])[:, None, None]  # of the gradients of four groups of weights
    noise = random(STEPS, 50).sign()  # (T, 50): no signal, only noise, and each weight has an opposite twin
    means = {}
    for name, rule in (("L2", l2(adam)), ("decoupled", adamw)):
        p, memory = torch.ones(4, 2, 50, dtype=sizes.dtype, device=device), {}
        for signs in noise:
            p = rule(p, sizes * torch.stack([signs, -signs]), memory, lr=0.01, weight_decay=DECAY)
        means[name] = p.mean(dim=(1, 2))  # (4,): in the mean of twins, noise cancels and decay remains
        print(f"Adam, {name:10} mean weight:", *(f"{mean:6.3f}" for mean in means[name]))
    lesson.proves_equal(6, means["decoupled"], torch.full_like(means["L2"], (1 - 0.01 * DECAY) ** STEPS))
    lesson.proves(6, bool(means["L2"][0] < 0.1 and means["L2"][-1] > 0.9), "L2: below 0.1 to above 0.9")
    lesson.save(picture(paths))


if __name__ == "__main__":
    run(main)
