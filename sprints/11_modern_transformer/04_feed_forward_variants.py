"""GELU, SwiGLU, squared ReLU: three feed-forward networks of one price, two of which can multiply.

Run:     uv run sprints/11_modern_transformer/04_feed_forward_variants.py
         (42 s on two cores; 14 s with --steps 20)
Proves:  1. one unit after the other, slopes written out, all three are the lab's: values and all gradients
         2. SwiGLU of width 8C/3 has the weights and multiply-adds of the other two, of width 4C; rounded to a
            whole width it is off by C of 8C² at most, and by up to 1.25 % as LLaMA rounds
         3. f(x) + f(-x) is a product of linear functions for SwiGLU and squared ReLU, exactly, and keeps the
            parallelogram law; GELU's is off by more than 5 %
         4. three times the input makes nine times the output: squared ReLU's at any size, SwiGLU's where it
            is small or large; there it makes three times GELU's
         5. at 0 the slope of ReLU jumps by 1, those of squared ReLU, GELU and SiLU do not; squared ReLU's
            second derivative jumps by 2
         6. hidden numbers that are exactly 0 can be left out; after training these are over half of squared
            ReLU's, and under 2 % of the others'
         7. under the same budget SwiGLU loses less than GELU on five seeds of five, 0.06 nats a character on
            average at least; squared ReLU loses less on the mean of five
Shapes:  B texts, T places, C numbers at each, F hidden units; V tokens
Writes:  results/11_modern_transformer/04_feed_forward_variants.png,
         results/11_modern_transformer/04_feed_forward_variants.json
Note:    notes/04_feed_forward_variants.md
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from lab.attention import MultiHeadAttention
from lab.lesson import Lesson, run
from lab.modern import Decoder, QueryKeyNorm, Rotary, SquaredReLU, initialise, plain_norm
from lab.transformer import EncoderBlock, FeedForward, PreNorm, SwiGLU
from lab.trials import SEEDS, SETTINGS, Recipe, Trial, characters, table, trial

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SHAPES = ((1, 1, 1), (3, 5, 7), (2, 6, 16))  # T, C, F
LLAMA = {4096: 1.0078125, 5120: 1.0125}  # C with 7 and 13 billion weights, and what its rounding makes of 8C²
GELU = partial(nn.GELU, approximate="tanh")  # GPT-2's


# ── A hidden unit: what comes in -> its activation, and the slope for each number that came in ────────────


def gelu(a: float) -> tuple[float, ...]:
    c = math.sqrt(2 / math.pi)
    t = math.tanh(c * (a + 0.044715 * a**3))
    return a * (1 + t) / 2, (1 + t) / 2 + a * (1 - t**2) / 2 * c * (1 + 3 * 0.044715 * a**2)


def squared_relu(a: float) -> tuple[float, ...]:
    return max(a, 0.0) ** 2, 2 * max(a, 0.0)


def swiglu(a: float, b: float) -> tuple[float, ...]:
    """a decides how far the unit opens, b is what comes through."""
    open_ = 1 / (1 + math.exp(-a))
    return a * open_ * b, (open_ + a * open_ * (1 - open_)) * b, a * open_


class Kind(NamedTuple):
    unit: Callable[..., tuple[float, ...]]
    network: Callable[[int, int], nn.Module]  # C, F -> (…, C) -> (…, C), without biases
    matrices: int  # of C × F numbers each


KINDS = {
    "GELU": Kind(gelu, partial(FeedForward, activation=GELU, bias=False), 2),
    "SwiGLU": Kind(swiglu, SwiGLU, 3),
    "squared ReLU": Kind(squared_relu, partial(FeedForward, activation=SquaredReLU, bias=False), 2),
}


def by_unit(unit: Callable[..., tuple[float, ...]], matrices: list[Tensor], x: Tensor, above: Tensor) -> list:
    """The network's output, and the gradients of x and of all matrices for what comes back from `above`.

    matrices: one or two that read (F, C), and one that writes (C, F); x and above (T, C)
    """
    *readers, writer = matrices
    y, back, *gradients = (torch.zeros_like(part) for part in (x, x, *matrices))
    for t, place in enumerate(x):
        for i, value in enumerate(writer.T):
            activation, *slopes = unit(*[(reader[i] @ place).item() for reader in readers])
            y[t] += activation * value
            gradients[-1][:, i] += activation * above[t]
            wanted = above[t] @ value  # how much more of this unit
            for reader, gradient, slope in zip(readers, gradients[:-1], slopes, strict=True):
                back[t] += wanted * slope * reader[i]
                gradient[i] += wanted * slope * place
    return [y, back, *gradients]


# ── Price, and what a network can be ──────────────────────────────────────────────────────────────────────


def hidden(C: int, matrices: int) -> int:
    """The width that 8C² weights are enough for: 4C with two matrices, 8C/3 with three."""
    return round(8 * C / matrices)


def llama_hidden(C: int) -> int:
    """8C/3 without what is behind the point, and up to the next multiple of 256."""
    return math.ceil((8 * C // 3) / 256) * 256


def price(network: Callable[[int, int], nn.Module], C: int, width: int) -> tuple[int, int]:
    """Weights, and multiply-adds for each place, of the real module: counted by shape, not computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module = network(C, width)
        module(torch.zeros(1, C))
    return sum(weight.numel() for weight in module.parameters()), counter.get_total_flops() // 2


def both(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What is left of f for x and -x together."""
    return f(x) + f(-x)


def product(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """What both() should be: (…, C) -> (…, C)."""
    gated = name == "SwiGLU"
    return module.down(module.gate(x) * module.up(x)) if gated else module[2](module[0](x).square())


def off_parallelogram(q: Callable[[Tensor], Tensor], x: Tensor, z: Tensor) -> float:
    """How far q(x + z) + q(x - z) lies off 2 q(x) + 2 q(z), which it is if q is squares and products."""
    right = 2 * q(x) + 2 * q(z)
    return ((q(x + z) + q(x - z) - right).norm() / right.norm()).item()


def jumps(activation: nn.Module, below: Tensor, above: Tensor) -> list[float]:
    """How far the slope and the second derivative change from one number to the next."""
    slope = torch.func.grad(activation)
    return [(f(above) - f(below)).item() for f in (slope, torch.func.grad(slope))]


# ── Models ────────────────────────────────────────────────────────────────────────────────────────────────


def build(V: int, T: int, kind: Kind, C: int = 64, H: int = 2) -> Decoder:
    """What lessons 02 and 03 keep, and one of three feed-forward networks in it."""

    def block() -> EncoderBlock:
        attention = MultiHeadAttention(C, H, bias=False, prepare=QueryKeyNorm(Rotary(C // H, T)))
        work = kind.network(C, hidden(C, kind.matrices))
        return EncoderBlock(PreNorm(attention, plain_norm(C)), PreNorm(work, plain_norm(C)))

    model = Decoder(V, T, C, [block() for _ in range(2)], plain_norm(C))
    initialise(model, std=0.1, zero_outputs=True)
    return model


RECIPES = [Recipe(name, partial(build, kind=kind)) for name, kind in KINDS.items()]


@torch.no_grad()
def look_inside(model: Decoder, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each block the hidden numbers (B·T, F), the matrix that reads them (C, F), its output (B·T, C)."""
    found = []

    def look(writer: nn.Linear, read: tuple[Tensor], wrote: Tensor) -> None:
        found.append((read[0].flatten(0, 1), writer.weight, wrote.flatten(0, 1)))  # (B, T, …) -> (B·T, …)

    for block in model.blocks:
        [*block.feed_forward.sublayer.children()][-1].register_forward_hook(look)
    model(ids)  # for the last time
    return found


def without_zeros(units: Tensor, writer: Tensor) -> Tensor:
    """Each place takes the columns of its own units that are not 0: (N, F), (C, F) -> (N, C)."""
    return torch.stack([writer[:, own != 0] @ own[own != 0] for own in units])


def draw_kinds(found: dict[str, list[Trial]]) -> Figure:
    """What is left of a unit for a and -a together; what each recipe loses, a line for each seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    grid = torch.linspace(-3, 3, 121).tolist()
    for (name, kind), style in zip(KINDS.items(), ("-", "-", "--"), strict=True):
        curve = [sum(kind.unit(*[b] * (kind.matrices - 1))[0] for b in (a, -a)) for a in grid]
        left.plot(grid, curve, style, label=name)
    left.set(xlabel="a (and b = a)", ylabel="f(a) + f(-a)", title="Two of the three make a²")
    left.legend(loc="upper center", fontsize="small")
    for losses in zip(*found.values(), strict=True):
        right.plot([*found], [result.nats for result in losses], "o-", color="C3", alpha=0.6)
    right.set(xlabel="network", ylabel="nats per held-out character", xlim=(-0.3, len(found) - 0.7))
    right.set_title("SwiGLU loses less with every seed")
    return figure


# ── The claims ────────────────────────────────────────────────────────────────────────────────────────────


def networks(lesson: Lesson) -> None:
    """Claims 1 and 2."""
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device
    lesson.heading("One unit after the other; its activation and slopes if it reads 2, or 2 and 3")
    torch.manual_seed(lesson.seed)
    ours, theirs = [], []
    for T, C, width in SHAPES:
        x, above = torch.randn(2, T, C, generator=draw, dtype=torch.float64).to(device)
        for kind in KINDS.values():
            module = kind.network(C, width).to(device, torch.float64)
            inputs = [x.clone().requires_grad_(), *module.parameters()]
            y = module(inputs[0])
            theirs += [y, *torch.autograd.grad(y, inputs, above)]
            ours += by_unit(kind.unit, [weight.detach() for weight in module.parameters()], x, above)
    for name, kind in KINDS.items():
        print(f"{name:12}", *(f"{number:7.4f}" for number in kind.unit(*(2.0, 3.0)[: kind.matrices - 1])))
    lesson.proves_equal(1, ours, theirs)

    lesson.heading("The price: weights, and multiply-adds for each place")
    ours, expected = [], []
    for C in (63, 64, 65, *LLAMA):
        for name, kind in KINDS.items():
            ours.append(price(kind.network, C, hidden(C, kind.matrices)))
            off = (0, C, -C)[C % 3] if name == "SwiGLU" else 0  # a third of a unit is C weights
            expected.append([8 * C**2 + off] * 2)
        line = f"C {C:5,}   8C² {8 * C**2:11,}   SwiGLU {hidden(C, 3):6,}: {ours[-2][0] - 8 * C**2:+6,}"
        if C in LLAMA:
            ours.append(price(SwiGLU, C, llama_hidden(C))[0] / (8 * C**2))
            expected.append(LLAMA[C])
            line += f"   LLaMA {llama_hidden(C):6,}: {ours[-1] - 1:+.2%}"
        print(line)
    lesson.proves_equal(2, ours, expected)


def products(lesson: Lesson) -> None:
    """Claims 3 to 5."""
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device
    lesson.heading("f(x) + f(-x), and f of larger and larger x")
    torch.manual_seed(lesson.seed)
    x, z = 2 * torch.randn(2, 50, 16, generator=draw, dtype=torch.float64).to(device)
    ours, theirs, off, growth = [], [], {}, {}
    sizes = (1e-7, 1e-2, 1, 1e2, 1e7)
    print(f"{'':12}  off the law   |f(3x)| / |f(x)|", *(f"{f'at {size:g}':>8}" for size in sizes))
    for name, kind in KINDS.items():
        module = kind.network(16, hidden(16, kind.matrices)).to(device, torch.float64).requires_grad_(False)
        off[name] = off_parallelogram(partial(both, module), x, z)
        growth[name] = [(module(3 * s * x).norm() / module(s * x).norm()).item() for s in sizes]
        print(f"{name:12} {off[name]:12.1%} {'':18}", *(f"{g:8.3f}" for g in growth[name]))
        if name != "GELU":
            ours, theirs = [*ours, both(module, x)], [*theirs, product(name, module, x)]
    bends, *exact = off.values()
    held = all(map(torch.allclose, ours, theirs)) and bends > 0.05 and max(exact) < 1e-10
    lesson.proves(3, held, f"{bends:.1%}, the others within 1e-10")
    ends = [[growth[name][0], growth[name][-1]] for name in ("GELU", "SwiGLU")]
    wanted = [[3.0, 3.0], [9.0, 9.0], [9.0] * len(sizes)]
    lesson.proves_equal(4, [*ends, growth["squared ReLU"]], wanted, tolerance=1e-6)

    lesson.heading("Across 0")
    near = torch.tensor([-1e-9, 1e-9], dtype=torch.float64, device=device)
    activations = {"ReLU": nn.ReLU(), "squared ReLU": SquaredReLU(), "GELU": GELU(), "SiLU": nn.SiLU()}
    found = {name: jumps(activation, *near) for name, activation in activations.items()}
    for name, (slope, second) in found.items():
        print(f"{name:12}  the slope changes by {abs(slope):.3f}, the second derivative by {abs(second):.3f}")
    lesson.proves_equal(5, [*found.values()], [[1.0, 0.0], [0.0, 2.0], [0.0] * 2, [0.0] * 2], tolerance=1e-6)


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a model threads would only wait for each other
    if lesson.data != "stories":
        lesson.needs = "the stories"
    text, found, T = characters(lesson.data, lesson.seed), {r.name: [] for r in RECIPES}, RECIPES[0].T
    networks(lesson)
    products(lesson)
    lesson.heading("Trained with each: the same characters, the same seeds, the same price")
    runs = [(recipe, seed) for recipe in RECIPES for seed in SEEDS]
    for recipe, seed in lesson.progress(runs, "trials"):
        recipe = replace(recipe, settings=replace(SETTINGS, steps=lesson.steps))
        found[recipe.name].append(trial(recipe, text, lesson.device, seed))

    ids = torch.cat(text.held_out).unfold(0, T, T)[:32].to(lesson.device)  # (B, T)
    zeros, equal = {}, True
    for name, results in found.items():
        inside = [part for result in results for part in look_inside(result.model, ids)]
        zeros[name] = torch.stack([(units == 0).float().mean() for units, _, _ in inside]).mean().item()
        for units, writer, wrote in inside:
            equal &= torch.allclose(without_zeros(units[:50], writer), wrote[:50], rtol=1e-4, atol=1e-4)
        print(f"{name:12} {zeros[name]:6.1%} of the hidden numbers are 0")
    held = equal and zeros["squared ReLU"] > 0.5 and max(zeros["GELU"], zeros["SwiGLU"]) < 0.02
    lesson.proves(6, held, f"{zeros['squared ReLU']:.1%}")

    print(*table(found), sep="\n")
    base, gated, squared = (torch.tensor([result.nats for result in part]) for part in found.values())
    most, some = (base - gated).mean().item(), (base - squared).mean().item()
    held = bool((gated < base).all()) and most >= 0.06 and some > 0
    lesson.proves(7, held, f"{most:.3f} and {some:.3f} less", full_run=True)
    lesson.save(draw_kinds(found))
    nats = {name: [result.nats for result in part] for name, part in found.items()}
    lesson.measured(held_out=nats, zeros=zeros)


if __name__ == "__main__":
    run(main, data="stories", steps=SETTINGS.steps)
