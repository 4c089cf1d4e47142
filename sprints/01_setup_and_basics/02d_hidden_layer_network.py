"""One hidden layer: a network that bends, trained by gradients written out by hand.

Run:     uv run sprints/01_setup_and_basics/02d_hidden_layer_network.py      (9 s on two cores)
Proves:  1. no line gets more than three of the four XOR points right, and two hidden neurons get all four
         2. the parameters can be counted by formula: H·(D + 1) + V·(H + 1)
         3. neuron by neuron, as two matrix products and as nn.Module: same outputs, same gradients
         4. backpropagation written out by hand equals autograd
         5. without the ReLU the two layers are one linear layer
         6. no line at all gets more than 80% of the unseen points right
         7. the trained network gets more than 95% of them right
Shapes:  N samples, D inputs, H hidden neurons, V outputs, P pairs of points
Writes:  results/01_setup_and_basics/02d_hidden_layer_network.png
         results/01_setup_and_basics/02d_hidden_layer_network.json
Note:    notes/02d_hidden_layer_network.md
"""

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

XOR = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]]), torch.tensor([[1.0], [1], [-1], [-1]])
SHAPES = ((1, 1, 1, 1), (5, 2, 3, 1), (7, 3, 4, 2), (6, 5, 2, 3))  # N, D, H, V
HIDDEN, RATE = 16, 0.1


def neuron_by_neuron(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """One layer as it is drawn, each neuron a weighted sum of its inputs plus a bias: (N, D) -> (N, H)."""
    rows = [[(weights * sample).sum() + bias for weights, bias in zip(w, b, strict=True)] for sample in x]
    return torch.stack([torch.stack(row) for row in rows])


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All neurons at once: weighted sums a (N, H), hidden values h (N, H) and outputs z (N, V)."""
    a = x @ w1.T + b1  # (N, D) @ (D, H) -> (N, H)
    h = a.clamp(min=0)  # ReLU: what is negative becomes 0
    return a, h, h @ w2.T + b2  # (N, H) @ (H, V) -> (N, V)


def backward(x: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> list[Tensor]:
    """The gradient of the mean of (z - y)² for each parameter, in its shape; y is (N, V). No autograd."""
    a, h, z = forward(x, w1, b1, w2, b2)
    dz = 2 * (z - y) / z.numel()  # (N, V)
    dw2 = dz.T @ h  # (V, N) @ (N, H) -> (V, H)
    db2 = dz.sum(0)  # (N, V) -> (V,)
    dh = dz @ w2  # (N, V) @ (V, H) -> (N, H)
    da = dh * (a > 0)  # a silent neuron passes nothing back
    dw1 = da.T @ x  # (H, N) @ (N, D) -> (H, D)
    db1 = da.sum(0)  # (N, H) -> (H,)
    return [dw1, db1, dw2, db2]


class Network(nn.Module):
    """The same with PyTorch's parts: (N, D) -> (N, V)."""

    def __init__(self, D: int, H: int, V: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(D, H)
        self.output = nn.Linear(H, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.relu(self.hidden(x)))


def most_right_by_a_line(x: Tensor, y: Tensor) -> int:
    """How many of N points a line gets right at most; x (N, 2), y (N, 1) with entries ±1.

    Any line can be shifted and turned until it runs through two of the points, and on the way no other point
    changes sides. So we try the line through every pair, both ways round, and count what lies on it as right.
    """
    pairs = torch.triu_indices(len(x), len(x), offset=1).to(x.device)  # (2, P)
    start, end = x[pairs]  # each (P, 2)
    normals = (end - start).flip(1) * torch.tensor([-1, 1], device=x.device)  # (P, 2), at right angles
    sides = normals @ x.T - (normals * start).sum(1, keepdim=True)  # (P, 2) @ (2, N) -> (P, N)
    sides = sides.scatter(1, pairs.T, 0) * y.T  # 0 on the line, positive where right, negative where wrong
    return len(x) - int(torch.minimum((sides < 0).sum(1), (sides > 0).sum(1)).min())


def quadrants(draw: torch.Generator, N: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """XOR spread over a square: N / 4 points in each corner, (N, 2), and their targets, (N, 1)."""
    corners, y = (part.repeat(N // 4, 1) for part in XOR)  # (4, 2) -> (N, 2), (4, 1) -> (N, 1)
    x = corners * (0.2 + 0.8 * torch.rand(corners.shape, generator=draw))  # a gap of 0.2 beside the axes
    return x.to(device), y.to(device)


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)

    lesson.heading("Four points that no line can part")
    x, y = (part.to(lesson.device) for part in XOR)
    weights = [[1.0, 1], [-1, -1]], [0.0, 0], [[1.0, 1]], [-1.0]
    _, h, z = forward(x, *(torch.tensor(w, device=lesson.device) for w in weights))
    for point, hidden, output, target in zip(*(t.tolist() for t in (x, h, z, y)), strict=True):
        print(f"x {point!s:12}   hidden {hidden}   output {output[0]:+.0f}   target {target[0]:+.0f}")
    by_line = most_right_by_a_line(x, y)
    lesson.proves(1, by_line == 3 and z.equal(y), f"a line {by_line} of 4, the network 4 of 4")

    lesson.heading("One network, written three times")
    counts, ways, by_hand, two_layers, one_layer = [], [], [], [], []
    for N, D, H, V in SHAPES:
        torch.manual_seed(lesson.seed)
        network = Network(D, H, V).to(lesson.float64_device, torch.float64)
        weights = w1, b1, w2, b2 = list(network.parameters())
        counts.append(sum(w.numel() for w in weights))
        print(f"D {D}, H {H}, V {V}: {counts[-1]:2} parameters in {[tuple(w.shape) for w in weights]}")
        x, y = (torch.randn(N, F, generator=draw, dtype=torch.float64).to(b1.device) for F in (D, V))
        loop = neuron_by_neuron(torch.relu(neuron_by_neuron(x, w1, b1)), w2, b2)
        outputs = loop, forward(x, *weights)[-1], network(x)  # each (N, V)
        ways.append([[z, *torch.autograd.grad((z - y).square().mean(), weights)] for z in outputs])
        by_hand.append(backward(x, y, *weights))
        two_layers.append(network.output(network.hidden(x)))
        one_layer.append(x @ (w2 @ w1).T + (w2 @ b1 + b2))  # (N, D) @ (D, V) + (V,) -> (N, V)
    lesson.proves_equal(2, counts, [H * (D + 1) + V * (H + 1) for _, D, H, V in SHAPES])
    slow, fast, module = zip(*ways, strict=True)
    lesson.proves_equal(3, [fast, module], [slow, slow])
    lesson.proves_equal(4, by_hand, [gradients for _, *gradients in module])
    lesson.proves_equal(5, two_layers, one_layer)

    lesson.heading("XOR spread over a square: 400 points to train on, 200 unseen ones to judge by")
    (x, y), (x_new, y_new) = quadrants(draw, 400, lesson.device), quadrants(draw, 200, lesson.device)
    by_line = most_right_by_a_line(x_new.cpu().double(), y_new.cpu()) / len(x_new)
    lesson.proves(6, by_line <= 0.8, f"the best of 19,900 lines {by_line:.1%}")

    ticks = torch.linspace(-1, 1, 160)
    grid = torch.cartesian_prod(ticks, ticks).flip(1).to(lesson.device)  # (S·S, 2), row by row
    torch.manual_seed(lesson.seed)
    weights = [w.detach() for w in Network(2, HIDDEN, 1).to(lesson.device).parameters()]
    pictures = {}
    for step in lesson.progress(range(lesson.steps + 1)):
        if step in (0, lesson.steps // 25, lesson.steps // 5, lesson.steps):
            pictures[step] = forward(grid, *weights)[-1].sign().view(160, 160).cpu()  # (S·S, 1) -> (S, S)
            loss = (forward(x, *weights)[-1] - y).square().mean().item()
            right = forward(x_new, *weights)[-1].sign().eq(y_new).float().mean().item()
            print(f"step {step:3}   loss {loss:.3f}   unseen points right {right:.1%}")
        weights = [w - RATE * g for w, g in zip(weights, backward(x, y, *weights), strict=True)]
    lesson.proves(7, right > 0.95, f"{right:.1%}; a line at most {by_line:.1%}", full_run=True)
    lesson.measured(hidden=HIDDEN, rate=RATE, loss=loss, right=right, best_line=by_line)

    figure, axes = plt.subplots(1, len(pictures), figsize=(6.6, 2.4), layout="constrained", sharey=True)
    for panel, (step, sign) in zip(axes, pictures.items(), strict=True):
        panel.imshow(sign.numpy(), "PuOr", vmin=-2, vmax=2, origin="lower", extent=(-1, 1, -1, 1))
        panel.scatter(*x_new.T.cpu(), c=y_new.cpu(), cmap="PuOr", s=4)
        panel.set(xlabel="x₁", ylabel="" if step else "x₂", title=f"step {step}")
    figure.suptitle("The boundary bends until it parts the points; no line can")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, steps=500)
