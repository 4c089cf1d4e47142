"""Layer normalisation: each place is brought to one size by itself, and no place hears of another.

Run:     uv run sprints/07_transformer_block/01_layer_norm.py      (5 s on two cores)
Proves:  1. LayerNorm and RMSNorm in a loop, as tensors and PyTorch's own agree, with all gradients
         2. the backward derived by hand gives PyTorch's gradients in float64, float32 and bfloat16
         3. LayerNorm is blind to shift and positive scale, RMSNorm to scale alone; so the gradient is
            orthogonal to x, LayerNorm's to 1 as well, and c times the input gets 1/c of it
         4. ε in the root makes s/√(s² + ε) of spread s, and of a constant place its bias, with finite
            gradients; ε added to the root makes another number, and NaN of the gradient
         5. LayerNorm divides by C, not C - 1; nn.RMSNorm's own ε is another in float64 than in float32
         6. no place sees another through LayerNorm or RMSNorm; through BatchNorm in training each sees all,
            in other texts and ahead in its own
         7. BatchNorm's result for a text hangs on the other texts, on the amount of padding and on train() or
            eval(), LayerNorm's on none of them
Shapes:  B texts, T places, C numbers at each
Writes:  results/07_transformer_block/01_layer_norm.png
Note:    notes/01_layer_norm.md
"""

from collections.abc import Callable
from functools import partial

from lab.influence import draw as draw_influence
from lab.influence import influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPES = ((1, 1, 5), (2, 3, 7), (3, 5, 33), (2, 1, 64))  # B, T, C
EPS = 1e-5
T = 3  # places of a text, where only one length is needed


def layer_norm_by_loop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One place after the other: (B, T, C), (C,), (C,) -> (B, T, C)."""
    output = []
    for place in x.flatten(0, 1):  # (B, T, C) -> (B·T, C)
        centre = sum(place) / len(place)
        variance = sum((number - centre) ** 2 for number in place) / len(place)
        spread = (variance + EPS) ** 0.5
        output.append(torch.stack([(number - centre) / spread for number in place]) * weight + bias)
    return torch.stack(output).view(x.shape)  # (B·T, C) -> (B, T, C)


def rms_norm_by_loop(x: Tensor, weight: Tensor) -> Tensor:
    """One place after the other: (B, T, C), (C,) -> (B, T, C)."""
    output = []
    for place in x.flatten(0, 1):  # (B, T, C) -> (B·T, C)
        size = (sum(number**2 for number in place) / len(place) + EPS) ** 0.5
        output.append(torch.stack([number / size for number in place]) * weight)
    return torch.stack(output).view(x.shape)  # (B·T, C) -> (B, T, C)


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def layer_norm(x: Tensor, weight: Tensor | float = 1, bias: Tensor | float = 0, eps: float = EPS) -> Tensor:
    """All places at once: (B, T, C) -> (B, T, C)."""
    centred = x - mean(x)
    return centred / (mean(centred.square()) + eps).sqrt() * weight + bias


def rms_norm(x: Tensor, weight: Tensor | float = 1, eps: float = EPS) -> Tensor:
    """Without the mean, and without a bias: (B, T, C) -> (B, T, C)."""
    return x / (mean(x.square()) + eps).sqrt() * weight


def with_epsilon_added(x: Tensor) -> Tensor:
    """A LayerNorm with ε in the wrong place: (B, T, C) -> (B, T, C)."""
    centred = x - mean(x)
    return centred / (mean(centred.square()).sqrt() + EPS)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What LayerNorm does to each place, done to each of the C numbers: (B, T, C) -> (B, T, C)."""
    centred = x - x.mean((0, 1))
    return centred / (centred.square().mean((0, 1)) + EPS).sqrt() * weight + bias


class LayerNormByHand(torch.autograd.Function):
    """The backward of layer_norm as the note derives it; below float32 it computes in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = (wide.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
        n = (wide - mean(wide)) * r
        ctx.save_for_backward(n, r, weight)
        return (n * weight + bias).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        n, r, weight = ctx.saved_tensors
        dy = dy.to(n.dtype)  # autograd brings what is returned to the dtype of the inputs
        dn = dy * weight
        return r * (dn - mean(dn) - n * mean(dn * n)), (dy * n).sum((0, 1)), dy.sum((0, 1))


class RMSNormByHand(torch.autograd.Function):
    """The same without the mean."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = (mean(wide.square()) + EPS).rsqrt()
        ctx.save_for_backward(wide * r, r, weight)
        return (wide * r * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        n, r, weight = ctx.saved_tensors
        dy = dy.to(n.dtype)
        dn = dy * weight
        return r * (dn - n * mean(dn * n)), (dy * n).sum((0, 1))


def with_gradients(norm: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """What a norm makes of its inputs, and their gradients when that of its output is dy."""
    inputs = [given.detach().requires_grad_() for given in inputs]
    y = norm(*inputs)
    return [y, *torch.autograd.grad(y, inputs, dy)]


def both(layer: Callable, rms: Callable, case: list[Tensor]) -> list[Tensor]:
    """Values and gradients of both norms for x (B, T, C), weight (C,), bias (C,), dy (B, T, C)."""
    x, weight, bias, dy = case
    return with_gradients(layer, [x, weight, bias], dy) + with_gradients(rms, [x, weight], dy)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


class BatchNorm(nn.BatchNorm1d):
    """PyTorch's own, which wants the C numbers second."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return super().forward(x.mT).mT  # (B, T, C) -> (B, C, T) -> (B, T, C)


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)
    wide = {"dtype": torch.float64, "device": lesson.float64_device}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    lesson.heading("Two norms of -1, -1, 7, 7: mean 3, spread around it 4, root mean square 5")
    x, dy = torch.tensor([[[[-1, -1, 7, 7]]], [[[1, 0, 0, 0]]]], **wide)  # (B, T, C) each
    for name, norm in (("LayerNorm", layer_norm), ("RMSNorm", rms_norm)):
        y, dx = (" ".join(f"{a:z6.3f}" for a in part.flatten()) for part in with_gradients(norm, [x], dy))
        print(f"{name:9}  {y}   gradient of the first number {dx}")
    cases = [[randn(B, T, C) + 1, randn(C), randn(C), randn(B, T, C)] for B, T, C in SHAPES]
    ours = [both(layer_norm, rms_norm, case) for case in cases]
    slow = [both(layer_norm_by_loop, rms_norm_by_loop, case) for case in cases]
    theirs = [both(torch_layer_norm, torch_rms_norm, case) for case in cases]
    lesson.proves_equal(1, [ours, ours], [slow, theirs])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        device = lesson.float64_device if dtype == torch.float64 else lesson.device
        given = [[part.to(device, dtype) for part in case] for case in cases]
        ours = [both(LayerNormByHand.apply, RMSNormByHand.apply, case) for case in given]
        theirs = [both(torch_layer_norm, torch_rms_norm, case) for case in given]
        lesson.proves_equal(2, ours, theirs, tolerance)

    lesson.heading("What they are blind to (ε = 0), and the size of the gradient at x/100, x and 100 x")
    (x, _, _, dy), scale, shift = cases[2], randn(3, 5, 1).exp(), randn(3, 5, 1)
    blind = {"LayerNorm": partial(layer_norm, eps=0), "RMSNorm": partial(rms_norm, eps=0)}
    ours, theirs, slopes = [blind["LayerNorm"](scale * x + shift)], [blind["LayerNorm"](x)], {}
    for name, norm in blind.items():
        moved = [difference(norm(other), norm(x)) for other in (scale * x, x + shift)]
        sized = [with_gradients(norm, [c * x], dy)[1] for c in (0.01, 1, 100)]
        sizes = " ".join(f"{slope.norm():8.3f}" for slope in sized)
        print(f"{name:9}  scaled: off by {moved[0]:.3f}, shifted: {moved[1]:.3f}   gradient {sizes}")
        slopes[name] = slope = sized[1]
        along_x = (slope * x).sum(-1)  # (B, T, C) -> (B, T)
        ours += [norm(scale * x), along_x, sized[0] * 0.01, sized[2] * 100]
        theirs += [norm(x), torch.zeros_like(along_x), slope, slope]
    along_1, rms_along_1 = (slope.sum(-1) for slope in slopes.values())  # (B, T) each
    lesson.proves_equal(3, [*ours, along_1], [*theirs, torch.zeros_like(along_1)])
    told = f"RMSNorm is not blind to a shift: {moved[1]:.2f}; gradient along 1: {rms_along_1.norm():.2f}"
    lesson.proves(3, moved[1] > 0.1 and rms_along_1.norm().item() > 0.1, told)

    lesson.heading("Where ε stands, and what the variance is divided by")
    signs = torch.tensor([[[1, -1, 1, -1, 1, -1]]], **wide)  # (B, T, C), of spread 1
    ours, theirs = [], []
    for s in (0.01, EPS**0.5, EPS):
        x = s * signs
        inside, outside = layer_norm(x), with_epsilon_added(x)
        print(f"spread {s:7.5f} becomes {inside.max():.4f}, or {outside.max():.4f} with ε added to the root")
        ours += [inside, inside, outside]
        theirs += [torch_layer_norm(x, None, None), x / (s * s + EPS) ** 0.5, x / (s + EPS)]
    constant, bias, dy = torch.full_like(signs, 3), randn(6), randn(1, 1, 6)
    y, dx = with_gradients(lambda x: layer_norm(x, 1, bias), [constant], dy)
    _, dx_outside = with_gradients(with_epsilon_added, [constant], dy)
    lesson.proves_equal(4, [*ours, y[0, 0], dx], [*theirs, bias, (dy - mean(dy)) / EPS**0.5])
    told = f"at a constant place up to {dx.abs().max():.0f}, or {dx_outside.max()}"
    lesson.proves(4, dx_outside.isnan().all(), told)
    x, C = cases[2][0], SHAPES[2][-1]
    unbiased = (x - mean(x)) / x.std(-1, keepdim=True)  # std() divides by C - 1 if not told otherwise
    ours, theirs = [unbiased], [F.layer_norm(x, (C,), eps=0) * ((C - 1) / C) ** 0.5]
    made = []
    for dtype, device in ((torch.float64, lesson.float64_device), (torch.float32, lesson.device)):
        eps = torch.finfo(dtype).eps
        x = torch.full((1, 4), eps**0.5, dtype=dtype, device=device)
        y = nn.RMSNorm(4, dtype=dtype, device=device)(x)
        made.append(f"{y[0, 0]:.4f} of {eps**0.5:.1e} in {str(dtype)[6:]} (ε {eps:.1e})")
        ours, theirs = [*ours, y], [*theirs, torch.full_like(y, 0.5**0.5)]  # s/√(s² + ε) where s² is ε
    print(f"nn.RMSNorm makes {' and '.join(made)}")
    lesson.proves_equal(5, ours, theirs)

    lesson.heading("Which place can change which: 2 texts of 3 places")
    x, by_torch = randn(2, T, 5), BatchNorm(5, **wide)
    looks = {
        "LayerNorm": influence(layer_norm, x),
        "RMSNorm": influence(rms_norm, x),
        "BatchNorm, train()": influence(by_torch, x),
        "BatchNorm, eval()": influence(by_torch.eval(), x),
    }
    print("   ".join(f"{name:18}" for name in looks).rstrip())
    for lines in zip(*map(rows, looks.values()), strict=True):
        print("   ".join(f"{line:18}" for line in lines).rstrip())
    alone = torch.eye(2 * T, dtype=torch.long)
    lesson.proves_equal(6, list(looks.values()), [alone, alone, torch.ones_like(alone), alone])

    lesson.heading("How far the answer for a text moves, as a share of its size")
    x, weight, bias, dy = cases[2]
    counted = BatchNorm(33, **wide)
    counted(x)  # in training it also keeps a running mean and variance; eval() uses these
    ours, theirs = (
        with_gradients(norm, [x, weight, bias], dy)
        for norm in (batch_norm, lambda x, *both: F.batch_norm(x.mT, None, None, *both, training=True).mT)
    )
    ours += [0.1 * x.mean((0, 1)), 0.9 + 0.1 * x.var((0, 1))]  # and this variance divides by B·T - 1
    theirs += [counted.running_mean, counted.running_var]
    mine, these, those = randn(2, T, 16), randn(3, T, 16), randn(3, T, 16)
    batches = [randn(4, T, 16) for _ in range(100)]
    print("           beside other texts   padded by 10 places, not 1   eval(), not train()")
    moved = {}
    for name, norm in (("LayerNorm", nn.LayerNorm(16, **wide)), ("BatchNorm", BatchNorm(16, **wide))):
        beside = [norm(torch.cat([mine, others]))[:2] for others in (these, those)]
        padded = [norm(F.pad(mine, (0, 0, 0, places)))[:, :T] for places in (10, 1)]
        for batch in batches:
            norm(batch)
        modes = [norm.train()(mine), norm.eval()(mine)]
        first, second, third = moved[name] = [difference(*pair) for pair in (beside, padded, modes)]
        print(f"{name}  {first:18.3f}   {second:26.3f}   {third:19.3f}")
    lesson.proves_equal(7, [*ours, moved["LayerNorm"]], [*theirs, [0.0, 0.0, 0.0]])
    lesson.proves(7, min(moved["BatchNorm"]) > 0.05, "BatchNorm's by more than a twentieth of its size")

    figure, panels = plt.subplots(1, 3, figsize=(6.6, 3), layout="constrained", sharey=True)
    for axes, name in zip(panels, ("LayerNorm", "BatchNorm, train()", "BatchNorm, eval()"), strict=True):
        draw_influence(axes, looks[name], name)
        axes.axhline(T - 0.5, color="black", linewidth=1)  # between the two texts
        axes.axvline(T - 0.5, color="black", linewidth=1)
        axes.label_outer()
    title = "In training, BatchNorm shows each place all others: other texts, and the future"
    figure.suptitle(title, size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
