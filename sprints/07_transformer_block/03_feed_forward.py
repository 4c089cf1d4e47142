"""The feed-forward network: each position is worked on by itself, by a memory of keys and values.

Run:     uv run sprints/07_transformer_block/03_feed_forward.py      (7 s on two cores)
Proves:  1. a loop over positions, a product, a 1×1 convolution and nn.Sequential agree, gradients too
         2. ReLU, both GELUs and SiLU by hand are PyTorch's, slopes too; the GELUs lie up to 0.000473 apart
         3. SwiGLU by hand is the lab's, gradients too; of hidden width 8C/3 it has the weights and takes the
            FLOPs of the plain network of 4C
         4. of a block's 12C² weights 8C² are the network's, and of its FLOPs the share 4C / (6C + T)
         5. a position sees itself alone; a convolution of width 3 would show it its neighbours
         6. the output is a sum over hidden units of activation × value; one unit written by hand gives one
            input a new output and leaves the others alone, until it is removed
         7. trained on 1,024 random facts, each doubling of the hidden width from 8 to 64 holds at least 1.3
            times as many; without an activation, widths beyond C hold no more
Shapes:  B texts, T positions, C numbers at each, F hidden units, N facts
Writes:  results/07_transformer_block/03_feed_forward.png, results/07_transformer_block/03_feed_forward.json
Note:    notes/03_feed_forward.md
"""

import math
from collections.abc import Callable
from functools import partial

from lab.attention import MultiHeadAttention
from lab.influence import draw as draw_influence
from lab.influence import influence, rows
from lab.lesson import Lesson, run
from lab.transformer import EncoderBlock, FeedForward, PreNorm, SwiGLU

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (3, 7, 4, 16), (1, 9, 6, 2))  # B, T, C, F
N, OBJECTS, WIDTHS = 1_024, 16, (8, 16, 32, 64, 128)  # each fact is one of so many objects
PLAIN = ("0.weight", "0.bias", "2.weight", "2.bias")  # what nn.Sequential calls W₁ b₁ W₂ b₂
GATED = ("gate.weight", "up.weight", "down.weight")  # what SwiGLU calls W V U


def by_loop(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
    """One position after the other: (B, T, C), (F, C), (F,), (C, F), (C,) -> (B, T, C)."""
    output = [W2 @ relu(W1 @ position + b1) + b2 for position in x.flatten(0, 1)]  # (B, T, C) -> (B·T, C)
    return torch.stack(output).view(x.shape)  # (B·T, C) -> (B, T, C)


def network(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
    """All positions at once (Vaswani et al. 2017, eq. 2): (B, T, C) -> (B, T, C)."""
    return relu(x @ W1.T + b1) @ W2.T + b2  # (B, T, C) -> (B, T, F) -> (B, T, C)


def by_unit(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
    """One hidden unit after the other: how well does its key fit, and what is its value? (…, C) -> (…, C)."""
    output = b2.expand(x.shape)
    for key, threshold, value in zip(W1, b1, W2.T, strict=True):  # (C,), a number, (C,)
        output = output + relu(x @ key + threshold)[..., None] * value
    return output


def by_module(module: nn.Module, names: tuple[str, ...], x: Tensor, *weights: Tensor) -> Tensor:
    """A module with these weights in place of its own, so that gradients reach them."""
    return functional_call(module, dict(zip(names, weights, strict=True)), x)


class Convolution(nn.Sequential):
    """The network as a convolution over positions, its kernel `width` positions wide."""

    def __init__(self, C: int, hidden: int, width: int) -> None:
        first, second = nn.Conv1d(C, hidden, width, padding="same"), nn.Conv1d(hidden, C, 1)
        super().__init__(first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C). Conv1d wants positions last."""
        return super().forward(x.mT).mT  # (B, T, C) -> (B, C, T) -> (B, T, C)


def by_convolution(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
    """The matrices as kernels of width 1: (F, C) -> (F, C, 1)."""
    module = Convolution(W1.shape[1], W1.shape[0], width=1)
    return by_module(module, PLAIN, x, W1[..., None], b1, W2[..., None], b2)


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0)


def gelu(x: Tensor) -> Tensor:
    """x times the share Φ(x) of a normal distribution that lies below x."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_by_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def silu(x: Tensor) -> Tensor:
    """x times the logistic function of x."""
    return x / (1 + torch.exp(-x))


def swiglu(x: Tensor, W: Tensor, V: Tensor, U: Tensor) -> Tensor:
    """One product decides how far each unit opens, the other what comes through: (B, T, C) -> (B, T, C)."""
    return (silu(x @ W.T) * (x @ V.T)) @ U.T  # (B, T, C) -> (B, T, F) -> (B, T, C)


ACTIVATIONS = {
    "ReLU": (relu, F.relu),
    "GELU": (gelu, F.gelu),
    "GELU, tanh": (gelu_by_tanh, partial(F.gelu, approximate="tanh")),
    "SiLU": (silu, F.silu),
}


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    """The result, and the gradient of its product with `slope` for each input."""
    result = function(*inputs)
    return [result, *torch.autograd.grad(result, inputs, slope)]


def flops(module: nn.Module, T: int, C: int) -> int:
    """Additions and multiplications in the matrix products for one text: counted by shape, not computed."""
    with FlopCounterMode(display=False) as counter:
        module.to("meta")(torch.zeros(1, T, C, device="meta"))
    return counter.get_total_flops()


def weights(module: nn.Module) -> int:
    """The numbers in its matrices: without biases, and without the scales of norms."""
    return sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)


def write(parts: list[Tensor], x: Tensor, which: int, new: Tensor) -> list[Tensor]:
    """One unit more: x[which] (C,) gets the output `new` (C,), the other x (N, C) keep theirs.

    Along its own direction x[which] reaches further than the others, which are as long but point elsewhere.
    The threshold lies where the next one ends, and the key is scaled so that the activation is 1.
    """
    W1, b1, W2, b2 = parts
    reach = x @ x[which]  # (N,)
    first, second = reach.topk(2).values
    key, threshold = x[which] / (first - second), -second / (first - second)
    value = new - network(x[which], *parts)
    return [
        torch.cat([W1, key[None]]),
        torch.cat([b1, threshold[None]]),
        torch.cat([W2.T, value[None]]).T,
        b2,
    ]


def without(parts: list[Tensor], unit: int) -> list[Tensor]:
    """All units but one."""
    W1, b1, W2, b2 = parts
    kept = [other for other in range(len(b1)) if other != unit]
    return [W1[kept], b1[kept], W2[:, kept], b2]


def learn(lesson: Lesson, x: Tensor, facts: Tensor, hidden: int, activation: type[nn.Module]) -> float:
    """Train on all facts at once; how many it holds beyond those that guessing would get right."""
    torch.manual_seed(lesson.seed)
    model = FeedForward(OBJECTS, hidden, activation).to(lesson.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=lesson.steps, pct_start=0.1)
    for _ in lesson.progress(range(lesson.steps), f"hidden width {hidden}"):
        loss = F.cross_entropy(model(x), facts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = (model(x).argmax(-1) == facts).double().mean().item()
    return N * (right - 1 / OBJECTS) / (1 - 1 / OBJECTS)


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    lesson.heading("One network, five ways")
    ours, others = [], []
    for B, T, C, hidden in SHAPES:
        sizes = (B, T, C), (hidden, C), (hidden,), (C, hidden), (C,)
        inputs, slope = [randn(*size).requires_grad_() for size in sizes], randn(B, T, C)
        sequential = nn.Sequential(nn.Linear(C, hidden), nn.ReLU(), nn.Linear(hidden, C))
        modules = [
            partial(by_module, module, PLAIN) for module in (sequential, FeedForward(C, hidden, nn.ReLU))
        ]
        for way in (by_loop, by_convolution, *modules):
            ours += with_gradients(network, inputs, slope)
            others += with_gradients(way, inputs, slope)
    print("x {}   W₁ {}   b₁ {}   W₂ {}   b₂ {}".format(*sizes), f"  y {tuple(slope.shape)}")
    lesson.proves_equal(1, ours, others)

    lesson.heading("Between the two matrices: values at -2, -1, 0, 1, 2, each with its slope")
    grid = (torch.arange(-400, 401, dtype=torch.float64) / 100).to(lesson.float64_device).requires_grad_()
    curves, theirs, marks = {}, {}, range(200, 601, 100)
    for name, (by_hand, by_torch) in ACTIVATIONS.items():
        value, slope = curves[name] = with_gradients(by_hand, [grid], torch.ones_like(grid))
        theirs[name] = with_gradients(by_torch, [grid], torch.ones_like(grid))
        print(f"{name:10}", *(f" {value[i].item():6.3f} {slope[i].item():6.3f}" for i in marks))
    apart = (curves["GELU"][0] - curves["GELU, tanh"][0]).abs().max().item()
    lesson.proves_equal(2, [*curves.values(), round(apart, 6)], [*theirs.values(), 0.000473])

    lesson.heading("SwiGLU, and what the parts of a block weigh")
    ours, theirs = [], []
    for B, T, C, hidden in SHAPES:
        sizes = (B, T, C), (hidden, C), (hidden, C), (C, hidden)
        inputs, slope = [randn(*size).requires_grad_() for size in sizes], randn(B, T, C)
        ours += with_gradients(swiglu, inputs, slope)
        theirs += with_gradients(partial(by_module, SwiGLU(C, hidden), GATED), inputs, slope)
    C, T = 48, 8
    plain, gated, attention = FeedForward(C, 4 * C), SwiGLU(C, 8 * C // 3), MultiHeadAttention(C, 4)
    block = EncoderBlock(PreNorm(attention, nn.LayerNorm(C)), PreNorm(plain, nn.LayerNorm(C)))
    parts = {"network, 4C": plain, "SwiGLU, 8C/3": gated, "attention": attention, "block": block}
    for name, part in parts.items():
        per_position = f"{flops(part, T, C) / T:9,.0f} FLOPs per position at T = {T}"
        print(f"{name:13} {weights(part):6,} weights = {weights(part) / C**2:4.1f} C² {per_position}")
    counted = [(weights(part), flops(part, T, C)) for part in (plain, gated)]
    lesson.proves_equal(3, [*ours, *counted], [*theirs, *[(8 * C**2, 2 * T * 8 * C**2)] * 2])
    lengths = (1, 8, 96, 288)
    shares = [flops(plain, T, C) / flops(block, T, C) for T in lengths]
    print("of the FLOPs:", "   ".join(f"{s:.1%} at T = {T}" for s, T in zip(shares, lengths, strict=True)))
    expected = [8 * C**2, 12 * C**2, [4 * C / (6 * C + T) for T in lengths]]
    lesson.proves_equal(4, [weights(plain), weights(block), shares], expected)

    lesson.heading("Whom a position sees: the network, and a convolution of width 3")
    T, C = 4, 4
    torch.manual_seed(lesson.seed)
    modules = FeedForward(C, 4 * C), SwiGLU(C, 4 * C), Convolution(C, 4 * C, 1), Convolution(C, 4 * C, 3)
    looks = [influence(module.double().to(lesson.float64_device), randn(1, T, C)) for module in modules]
    for narrow, wide in zip(rows(looks[0]), rows(looks[3]), strict=True):
        print(f"{narrow}      {wide}")
    itself, three = torch.eye(T).long(), torch.ones(T, T).tril(1).triu(-1).long()
    lesson.proves_equal(5, looks, [itself, itself, itself, three])

    lesson.heading("A memory: keys, values, and a fact written in")
    C, hidden, which = 16, 64, 3
    x = F.layer_norm(randn(50, C), (C,))  # as a block hands them over: all of one length
    before = [part.detach().to(x) for part in FeedForward(C, hidden, nn.ReLU).parameters()]
    after = write(before, x, which, new := randn(C))
    told, edited = network(x, *before), network(x, *after)
    for name, output in (("wanted", new), ("after", edited[which])):
        print(f"{name:6} output {which} begins", *(f"{number:6.2f}" for number in output[:6].tolist()))
    moved = (edited - told).norm(dim=1).tolist()
    print(f"it moved by {moved.pop(which):.2f}, the other {len(moved)} by {max(moved):.2f} at most")
    ours = by_unit(x, *before), by_unit(x, *after), edited, network(x, *without(after, hidden))
    wanted = told.clone()
    wanted[which] = new
    lesson.proves_equal(6, ours, [told, edited, wanted, told])

    lesson.heading(f"{N:,} random facts, each one of {OBJECTS} objects: how many are held beyond guessing")
    subjects = torch.randn(N, OBJECTS, generator=draw).to(lesson.device)
    objects = torch.randint(OBJECTS, (N,), generator=draw).to(lesson.device)
    held = {
        name: [learn(lesson, subjects, objects, hidden, activation) for hidden in WIDTHS]
        for name, activation in (("ReLU", nn.ReLU), ("none", nn.Identity))
    }
    print(f"{'hidden width':16}", *(f"{hidden:5}" for hidden in WIDTHS))
    for name, counts in held.items():
        print(f"activation {name:5}", *(f"{count:5.0f}" for count in counts))
    per_number = [count / (33 * hidden + 16) for count, hidden in zip(held["ReLU"], WIDTHS, strict=True)]
    print(f"{'ReLU, per number':16}", *(f"{facts:5.2f}" for facts in per_number))
    growth = min(b / a for a, b in zip(held["ReLU"][:3], held["ReLU"][1:4], strict=True))
    flat = max(held["none"]) < 1.2 * held["none"][1]
    lesson.proves(7, growth >= 1.3 and flat, f"{growth:.2f} times", full_run=True)
    lesson.measured(hidden=WIDTHS, held=held)

    figure, axes = plt.subplots(2, 2, figsize=(6, 4.8), layout="constrained")
    (values, slopes), (picture, capacity) = axes
    for name, curve in curves.items():
        for plot, line in zip((values, slopes), curve, strict=True):
            style = ":" if name == "GELU, tanh" else "-"
            plot.plot(grid.detach().cpu(), line.detach().cpu(), style, label=name)
    values.set(xlabel="x", ylabel="value", title="Activations …", ylim=(-0.4, 2))
    slopes.set(xlabel="x", ylabel="slope", title="… and their gradients")
    slopes.legend(loc="lower right", fontsize="small")
    draw_influence(picture, looks[0], "A position sees itself alone")
    for name, counts in held.items():
        capacity.plot(WIDTHS, counts, "o-", label=f"activation: {name}")
    capacity.axhline(N, color="black", linestyle=":")
    capacity.set(xlabel="hidden width", ylabel="facts held", title="Each hidden unit holds some facts")
    capacity.set_xscale("log", base=2)
    capacity.set_xticks(WIDTHS, WIDTHS)
    capacity.legend(loc="upper left", bbox_to_anchor=(0, 0.88), fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, steps=300)
