"""Loss functions: five of them from their definitions, and how to write them so that no logit breaks them.

Run:     uv run sprints/03_models_and_training_loops/02_loss_functions.py      (6 s on two cores)
Proves:  1. five losses, by definition, in a stable form and in PyTorch: same values, same gradients
         2. at logits of ±10,000 the stable forms still equal PyTorch's, in value and gradient
         3. at those logits the definitions of all but squared error return inf or nan
         4. the gradient by the logits is p − y over the number averaged: binary, cross-entropy, smoothed, KL
         5. equal logits cost ln C, whatever the labels; a fresh network starts within 20% of that
         6. cross-entropy is KL plus the entropy of the targets, which it reaches where p = y
         7. out of a confident mistake, cross-entropy needs less than a tenth of squared error's steps
Shapes:  N samples, C classes
Writes:  results/03_models_and_training_loops/02_loss_functions.png
Note:    notes/02_loss_functions.md
"""

import math
from collections.abc import Callable

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPES = ((1, 2), (3, 5), (8, 1), (4, 17))  # N, C
SMOOTHING = 0.1
EXTREME = [[1e4, 0, -1e4, 1], [-1e4, -1e4, -1e4, -1e4], [1e4, 9999, 1e4, -3], [0, 0, 0, 0], [2, -1e4, 5, 9e3]]
Loss = Callable[[Tensor, Tensor], Tensor]


# By definition, one sample at a time. z (N, C): logits; y (N, C): what they should predict.


def squared_error_defined(z: Tensor, y: Tensor) -> Tensor:
    return torch.stack([(a - b) ** 2 for a, b in zip(z.flatten(), y.flatten(), strict=True)]).mean()


def binary_defined(z: Tensor, y: Tensor) -> Tensor:
    p = 1 / (1 + torch.exp(-z))  # sigmoid: each logit is a question of its own, p the probability of a yes
    pairs = zip(p.flatten(), y.flatten(), strict=True)
    return torch.stack([-b * torch.log(a) - (1 - b) * torch.log(1 - a) for a, b in pairs]).mean()


def cross_entropy_defined(z: Tensor, y: Tensor) -> Tensor:
    losses = []
    for logits, targets in zip(z, y, strict=True):
        p = torch.exp(logits) / torch.exp(logits).sum()  # softmax: one question with C answers
        losses.append(sum(-b * torch.log(a) for a, b in zip(p, targets, strict=True) if b > 0))
    return torch.stack(losses).mean()


def kl_defined(z: Tensor, y: Tensor) -> Tensor:
    losses = []
    for logits, targets in zip(z, y, strict=True):
        p = torch.exp(logits) / torch.exp(logits).sum()
        losses.append(sum(b * torch.log(b / a) for a, b in zip(p, targets, strict=True) if b > 0))
    return torch.stack(losses).mean()


# For use: all at once, and without ever computing a number that is too large or a logarithm of 0.


def log_sum_exp(z: Tensor) -> Tensor:
    """ln Σ exp z over the last dimension: (…, C) -> (…, 1). Taking out the maximum leaves exponents ≤ 0."""
    top = z.detach().amax(-1, keepdim=True)
    return top + (z - top).exp().sum(-1, keepdim=True).log()  # the sum is at least exp 0 = 1


def squared_error(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().mean()


def binary_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Yes and no are two classes with logits z and 0."""
    both = torch.stack([z, torch.zeros_like(z)], -1)  # (N, C, 2)
    return (log_sum_exp(both).squeeze(-1) - y * z).mean()


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return (y * (log_sum_exp(z) - z)).sum(-1).mean()  # ln p = z - log_sum_exp(z)


def kl(z: Tensor, y: Tensor) -> Tensor:
    return (torch.xlogy(y, y) + y * (log_sum_exp(z) - z)).sum(-1).mean()  # xlogy: 0·ln 0 = 0


def entropy(y: Tensor) -> Tensor:
    """What is left to pay when p = y: (N, C) -> a single number."""
    return -torch.xlogy(y, y).sum(-1).mean()


def slope(z: Tensor, y: Tensor) -> Tensor:
    """The gradient of cross-entropy, label smoothing and KL by the logits: (N, C) -> (N, C)."""
    p = (z - log_sum_exp(z)).exp()
    return (p - y) / len(z)


def binary_slope(z: Tensor, y: Tensor) -> Tensor:
    return (torch.sigmoid(z) - y) / z.numel()


def smooth(y: Tensor) -> Tensor:
    """Move a share SMOOTHING of each target (N, C) from the label to all classes evenly."""
    return (1 - SMOOTHING) * y + SMOOTHING / y.shape[-1]


LOSSES = {  # name: by definition, for use, PyTorch's
    "squared error": (squared_error_defined, squared_error, F.mse_loss),
    "binary": (binary_defined, binary_cross_entropy, F.binary_cross_entropy_with_logits),
    "cross-entropy": (cross_entropy_defined, cross_entropy, lambda z, y: F.cross_entropy(z, y.argmax(-1))),
    "smoothed": (
        cross_entropy_defined,
        cross_entropy,
        lambda z, y: F.cross_entropy(z, y.argmax(-1), label_smoothing=SMOOTHING),
    ),
    "KL": (kl_defined, kl, lambda z, y: F.kl_div(F.log_softmax(z, -1), y, reduction="batchmean")),
}


def targets(z: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """What each loss wants predicted, random, in the shape and type of z (N, C)."""
    N, C = z.shape
    numbers = torch.randn(N, C, generator=draw, dtype=torch.float64)
    labels = F.one_hot(torch.randint(C, (N,), generator=draw), C).double()  # (N,) -> (N, C)
    shares = numbers.relu() + labels
    shares = shares / shares.sum(-1, keepdim=True)  # probabilities, some of them 0
    wanted = numbers, numbers > 0, labels, smooth(labels), shares
    return {name: y.to(z.dtype).to(z.device) for name, y in zip(LOSSES, wanted, strict=True)}


def value_and_gradient(loss: Loss, z: Tensor, y: Tensor) -> list[Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z, y)
    return [value.detach(), *torch.autograd.grad(value, z)]


def three_ways(z: Tensor, y: dict[str, Tensor]) -> list[list[list[Tensor]]]:
    """By definition, for use, and by PyTorch: for each loss its value and its gradient."""
    return [[value_and_gradient(ways[i], z, y[name]) for name, ways in LOSSES.items()] for i in range(3)]


def error_of_probability(z: Tensor, y: Tensor) -> Tensor:
    return squared_error(torch.sigmoid(z), y)


def steps_to_recover(loss: Loss, start: float) -> int:
    """Steps of gradient descent, at rate 1, from a logit that says no until it says the right yes."""
    z, yes, steps = torch.tensor([[start]]), torch.ones(1, 1), 0
    while z < 0:
        z, steps = z - value_and_gradient(loss, z, yes)[1], steps + 1
    return steps


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)
    exact = {"dtype": torch.float64, "device": lesson.float64_device}

    lesson.heading("Five losses: definition, for use, PyTorch")
    trials, slopes, sums = [], [], []
    for shape in SHAPES:
        z = (2 * torch.randn(shape, generator=draw)).to(**exact)  # (N, C)
        y = targets(z, draw)
        trials.append(three_ways(z, y))
        slopes.append([binary_slope(z, y["binary"]), *(slope(z, y[name]) for name in list(LOSSES)[2:])])
        share = y["smoothed"]
        at_best = value_and_gradient(cross_entropy, share.log(), share)
        sums.append(
            ([cross_entropy(z, share), *at_best], [kl(z, share) + entropy(share), entropy(share), 0 * z])
        )
    for name, *ways in zip(LOSSES, *trials[-1], strict=True):
        print(f"{name:14}", *(f"{value:10.6f}" for value, _ in ways))
    defined, stable, by_torch = zip(*trials, strict=True)
    lesson.proves_equal(1, [defined, stable], [by_torch, by_torch])

    lesson.heading("The same at logits of ±10,000, in float32")
    trials = []
    for kind in (exact, {"dtype": torch.float32, "device": lesson.device}):
        z = torch.tensor(EXTREME, **kind)
        trials.append(three_ways(z, targets(z, draw)))
    for name, *ways in zip(LOSSES, *trials[-1], strict=True):
        print(f"{name:14}", *(f"{value:14,.1f}" for value, _ in ways))
    broken_defined, held, held_by_torch = zip(*trials, strict=True)
    lesson.proves_equal(2, held, held_by_torch)
    finite = [[value.isfinite().item() for value, _ in losses] for losses in broken_defined]
    lesson.proves(3, finite == [[True] + [False] * 4] * 2, "in float64 and in float32")
    no, line = torch.tensor([[0.0]]), torch.arange(-20.0, 31.0).view(-1, 1, 1)  # logits, each (N, C) = (1, 1)
    values = [binary_defined(z, no).item() for z in line]
    first = next(int(z) for z, value in zip(line, values, strict=True) if not math.isfinite(value))
    print(f"with the answer no, the definition of binary cross-entropy breaks at a logit of {first}")

    lesson.heading("The gradient of a sample: p − y")
    z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    for name, row in (("logits", z), ("p", z.softmax(-1)), ("y", y), ("p − y", slope(z, y))):
        print(f"{name:8}", *(f"{number:8.4f}" for number in row[0]))
    lesson.proves_equal(4, slopes, [[gradient for _, gradient in losses[1:]] for losses in by_torch])

    lesson.heading("Before any training")
    off = []
    for C in (2, 10, 1000):
        labels = F.one_hot(torch.randint(C, (2000,), generator=draw), C).float().to(lesson.device)  # (N, C)
        torch.manual_seed(lesson.seed)
        network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, C)).to(lesson.device)
        x = torch.randn(2000, 32, generator=draw).to(lesson.device)
        flat, fresh = (cross_entropy(z, labels).item() for z in (torch.full_like(labels, 3), network(x)))
        off.append((abs(flat / math.log(C) - 1), abs(fresh / math.log(C) - 1)))
        print(f"C {C:4}   ln C {math.log(C):.4f}   equal logits {flat:.4f}   fresh network {fresh:.4f}")
    exactly, nearly = map(max, zip(*off, strict=True))
    lesson.proves(5, exactly < 1e-5 and nearly < 0.2, f"the latter within {nearly:.1%}")

    lesson.heading("What a perfect model pays")
    label = F.one_hot(torch.tensor([3]), 10).double()
    floors = entropy(label).abs().item(), entropy(smooth(label)).item()
    print(f"C 10   plain labels {floors[0]:.4f}   smoothed by {SMOOTHING} {floors[1]:.4f}")
    lesson.proves_equal(6, *zip(*sums, strict=True))

    lesson.heading("From a logit of -6 to the right yes")
    quick, slow = (steps_to_recover(loss, -6.0) for loss in (binary_cross_entropy, error_of_probability))
    print(f"cross-entropy {quick} steps   squared error of the probability {slow} steps")
    lesson.proves(7, quick < slow / 10, f"{quick} against {slow}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(6.6, 3.2), layout="constrained")
    left.plot(line.flatten(), [binary_cross_entropy(z, no).item() for z in line], label="for use")
    left.plot(line.flatten(), values, "k.", markersize=4, label="by definition")
    left.set(xlabel="logit; the answer is no", ylabel="loss", title=f"The definition ends at {first}")
    left.legend(loc="upper left", fontsize="small")
    figure.suptitle(
        "Cross-entropy needs the stable form, and then pulls hardest where it is most wrong",
        fontsize="medium",
    )
    z, yes = torch.linspace(-8, 8, 161).view(-1, 1), torch.ones(161, 1)
    for loss, name in ((binary_cross_entropy, "cross-entropy"), (error_of_probability, "squared error")):
        right.plot(z, 161 * value_and_gradient(loss, z, yes)[1], label=name)
    right.set(
        xlabel="logit; the answer is yes",
        ylabel="slope",
        title="Squared error lets go",
    )
    right.legend(loc="lower right", fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
