"""Convolution: one small filter, used at every place of the image, and a network of them that reads digits.

Run:     uv run sprints/03_models_and_training_loops/06_convolutional_network.py
         (35 s on two cores; 9 s with --steps 100)
Proves:  1. convolution as loops over all places, as one matrix product, and as nn.Conv2d: the same values
         2. their gradients for images, filters and biases are the same too
         3. the pixels that a unit sees, found by gradient, fill the square that the formula predicts
         4. an image moved by 4 pixels, the network's stride, moves its last maps by one unit
         5. moving every image of a batch its own way, all at once, equals moving one after the other
         6. the network reads at least 99.0% of the test digits, MNIST's or rendered
         7. it errs less than a dense network of 3 times its size; on MNIST, at most half as often
Shapes:  N images, C channels in, O channels out, Y × X pixels, windows of K × L pixels, I × J places
Writes:  results/03_models_and_training_loops/06_convolutional_network.png,
         results/03_models_and_training_loops/06_convolutional_network.json
Note:    notes/06_convolutional_network.md
"""

import itertools
import time
from collections.abc import Iterator

from lab import digits
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

BATCH, PEAK, SHIFT = 250, 0.01, 2
CASES = (  # N, C, O, (Y, X), (K, L), stride, padding
    (1, 1, 1, (3, 3), (2, 2), 1, 0),
    (2, 3, 4, (5, 6), (3, 3), 1, 1),
    (3, 2, 3, (7, 4), (3, 2), 2, 0),
    (1, 4, 2, (6, 9), (1, 5), 3, 2),
)


def convolve_slowly(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """Every filter at every place of every image: (N, C, Y, X), (O, C, K, L), (O,) -> (N, O, I, J)."""
    (N, _, Y, X), (O, _, K, L) = images.shape, weight.shape
    padded = F.pad(images, (padding,) * 4)  # a border of zeros: (N, C, Y + 2·padding, X + 2·padding)
    result = images.new_zeros(N, O, (Y + 2 * padding - K) // stride + 1, (X + 2 * padding - L) // stride + 1)
    for n, o, i, j in itertools.product(*map(range, result.shape)):
        window = padded[n, :, i * stride : i * stride + K, j * stride : j * stride + L]  # (C, K, L)
        result[n, o, i, j] = (weight[o] * window).sum() + bias[o]
    return result


def gradients_slowly(
    images: Tensor, weight: Tensor, stride: int, padding: int, above: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same loops backwards. `above` is the gradient of the result, (N, O, I, J)."""
    (_, _, Y, X), (_, _, K, L), padded = images.shape, weight.shape, F.pad(images, (padding,) * 4)
    for_padded, for_weight = torch.zeros_like(padded), torch.zeros_like(weight)
    for n, o, i, j in itertools.product(*map(range, above.shape)):
        window = n, slice(None), slice(i * stride, i * stride + K), slice(j * stride, j * stride + L)
        for_padded[window] += above[n, o, i, j] * weight[o]  # windows overlap: a pixel collects from each
        for_weight[o] += above[n, o, i, j] * padded[window]  # a filter collects from every place
    return for_padded[:, :, padding : padding + Y, padding : padding + X], for_weight, above.sum((0, 2, 3))


def windows(images: Tensor, size: tuple[int, int], stride: int, padding: int) -> Tensor:
    """All windows of that size, as a view of the pixels: (N, C, Y, X) -> (N, C, I, J, K, L)."""
    padded = F.pad(images, (padding,) * 4)
    return padded.unfold(2, size[0], stride).unfold(3, size[1], stride)


def convolve(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """All windows as the rows of one matrix, all filters as the columns of another. Shapes as above."""
    rows = windows(images, weight.shape[2:], stride, padding).permute(0, 2, 3, 1, 4, 5)  # (N, I, J, C, K, L)
    result = rows.flatten(3) @ weight.flatten(1).T + bias  # (N, I, J, C·K·L) @ (C·K·L, O) -> (N, I, J, O)
    return result.permute(0, 3, 1, 2)  # (N, O, I, J)


def receptive_field(layers: nn.Sequential) -> tuple[int, int]:
    """By formula: the side of the square that a unit sees, and the pixels from one unit to the next."""
    field, jump = 1, 1
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            kernel, stride = int(np.max(layer.kernel_size)), int(np.max(layer.stride))  # 2 or (2, 2)
            field, jump = field + (kernel - 1) * jump, jump * stride
    return field, jump


def seen(layers: nn.Sequential, images: Tensor) -> Tensor:
    """By gradient: which pixels the unit in the middle depends on in any of the images, (Y, X) of bool."""
    images = images.clone().requires_grad_()
    maps = layers(images)  # (N, O, I, J)
    maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].sum().backward()
    return (images.grad.abs() > 1e-12).any(dim=0)[0]  # above the rounding of any way to convolve


def shift(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Every image moved its own way by up to SHIFT pixels: (N, 1, 28, 28), (N,), (N,) -> (N, 1, 28, 28)."""
    moved = windows(images, images.shape[2:], 1, SHIFT)  # (N, 1, 5, 5, 28, 28): each image moved in 25 ways
    return moved[torch.arange(len(images), device=images.device), :, SHIFT - down, SHIFT - right]


def network() -> nn.Sequential:
    """Four convolutions. Taking maxima over 2 × 2 halves the maps and pays for twice the channels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU()),  # (N, 16, 14, 14)
        *(nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()),  # (N, 32, 7, 7)
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),  # (N, 64, 7, 7)
        *(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),  # (N, 64, 5, 5)
        *(nn.Flatten(), nn.Linear(64 * 5 * 5, 10)),  # (N, 1600) -> (N, 10)
    )


def dense() -> nn.Sequential:
    """The baseline: every hidden unit has a weight of its own for every pixel."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 10)
    )


def train(lesson: Lesson, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """AdamW, the one-cycle schedule, shifted images. Returns the mean loss of the last tenth of the steps."""
    draw, losses = torch.Generator().manual_seed(lesson.seed), []
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=lesson.steps, pct_start=0.2)

    def batches() -> Iterator[Tensor]:
        while True:  # epoch after epoch, each in an order of its own
            yield from torch.randperm(len(images), generator=draw).split(BATCH)

    for _, batch in zip(lesson.progress(range(lesson.steps), "steps"), batches(), strict=False):
        moves = torch.randint(-SHIFT, SHIFT + 1, (2, len(batch)), generator=draw).to(images.device)
        batch = batch.to(images.device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(shift(images[batch], *moves)), labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, lesson.steps // 10) :]).mean().item()


def errors(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model gets wrong."""
    model.eval()  # batch normalisation now uses the means and spreads that it gathered in training
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(dim=-1) for part in images.split(1_000)])
    return (answers != labels).float().mean().item()


def sheet(tiles: Tensor) -> Tensor:
    """Sixteen pictures in two rows, each scaled by its own largest value: (16, Y, X) -> one picture."""
    tiles = tiles.detach().cpu() / tiles.detach().cpu().abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    tiles = F.pad(tiles, (1,) * 4, value=torch.nan)  # (16, Y + 2, X + 2): an empty frame around each
    return torch.cat([torch.cat([*row], dim=1) for row in tiles.view(2, 8, *tiles.shape[1:])])


def portrait(model: nn.Sequential, image: Tensor) -> Figure:
    """One digit (1, 28, 28), the first filters, their maps, and some of the last maps."""
    figure, axes = plt.subplot_mosaic("da;db;dc", figsize=(6, 3.4), width_ratios=(2, 3), layout="constrained")
    figure.suptitle("A filter answers to its pattern wherever the digit has it", size="medium")
    with torch.no_grad():
        first, last = model[:4](image[None])[0], model[:14](image[None])[0]  # (16, 14, 14), (64, 5, 5)
    axes["d"].imshow(image[0].cpu(), cmap="gray_r")
    for corner, side in ((10.5, 5), (7.5, 10), (3.5, 20)):
        axes["d"].add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor="C1", linewidth=2))
    axes["d"].set_xlabel("a unit sees 5 × 5 pixels, then 10,\nthen 20, at last the whole digit")
    rows = (
        ("a", model[0].weight[:, 0], "PuOr", -1, "the 16 filters (purple +, orange −)"),
        ("b", first, "gray_r", 0, "their maps of this digit, halved"),
        ("c", last[:16], "gray_r", 0, "16 of the 64 last maps"),
    )
    for name, tiles, colours, least, title in rows:
        axes[name].imshow(sheet(tiles), cmap=colours, vmin=least, vmax=1)
        axes[name].set_title(title)
    for each in axes.values():
        each.set(xticks=[], yticks=[])
    return figure


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    lesson.heading("One convolution, three ways")
    values, gradients = ([], [], []), ([], [], [])
    for N, C, O, pixels, kernel, stride, padding in CASES:
        parts = [random(N, C, *pixels), random(O, C, *kernel), random(O)]
        images, weight, bias = (part.requires_grad_() for part in parts)
        layer = nn.Conv2d(C, O, kernel, stride, padding)
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        above = random(*layer(images).shape)
        with torch.no_grad():
            values[0].append(convolve_slowly(images, weight, bias, stride, padding))
            gradients[0].extend(gradients_slowly(images, weight, stride, padding, above))
        values[1].append(convolve(images, weight, bias, stride, padding))
        gradients[1].extend(torch.autograd.grad(values[1][-1], parts, above))
        values[2].append(layer(images))
        gradients[2].extend(torch.autograd.grad(values[2][-1], [images, layer.weight, layer.bias], above))
        print(f"{(N, C, *pixels)!s:12}  {O} filters of {kernel}, stride {stride}, padding {padding}", end="")
        print(f"  ->  {tuple(above.shape)}")
    lesson.proves_equal(1, values[:2], [values[2]] * 2)
    lesson.proves_equal(2, gradients[:2], [gradients[2]] * 2)

    lesson.heading("What a unit sees")
    torch.manual_seed(lesson.seed)
    model = network().to(lesson.float64_device, torch.float64).eval()  # eval: nothing shared across a batch
    stacks = [model[: i + 1] for i, part in enumerate(model) if isinstance(part, nn.Conv2d | nn.MaxPool2d)]
    odd = nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.Conv2d(2, 2, 5, 3), nn.Conv2d(2, 2, 2))
    pictures, measured, formula = random(32, 1, 48, 48), [], []
    for layers in [*stacks, odd.to(pictures)]:
        mask, (field, jump) = seen(layers, pictures), receptive_field(layers)
        height, width = (mask.any(dim=axis).sum().item() for axis in (1, 0))
        measured.append([height, width, mask.sum().item()])
        formula.append([field, field, field**2])
        name = "three odd ones" if layers is odd else f"up to {type(layers[-1]).__name__}"
        print(f"{name:15}   by gradient {height:2} × {width:<2}   by formula {field:2}   one unit per {jump}")
    lesson.proves_equal(3, measured, formula)
    before, after = (model[:14](pictures[:8, :, a:b, a:b]) for a, b in ((4, 48), (0, 44)))  # (8, 64, 9, 9)
    lesson.proves_equal(4, after[..., 3:-2, 3:-2], before[..., 2:-3, 2:-3])  # units that see no border

    lesson.heading("Shifting a batch")
    root = digits.find(lesson.data)
    images, labels = digits.tensors(root, train=True, device=lesson.device)
    moves = torch.randint(-SHIFT, SHIFT + 1, (2, 100), generator=draw)
    padded = F.pad(images[:100], (SHIFT,) * 4)  # (100, 1, 32, 32)
    rolled = [image.roll(move, (1, 2)) for image, move in zip(padded, moves.T.tolist(), strict=True)]
    one_by_one = torch.stack(rolled)[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT]
    lesson.proves_equal(5, shift(images[:100], *moves.to(lesson.device)), one_by_one)

    lesson.heading(f"{lesson.steps:,} steps of {BATCH} images each")
    tests, answers = digits.tensors(root, train=False, device=lesson.device)
    print("                parameters   loss at the end   test errors (chance 90%)")
    wrong, sizes = [], []
    for name, build in (("dense", dense), ("convolutional", network)):
        torch.manual_seed(lesson.seed)
        model, started = build().to(lesson.device, memory_format=torch.channels_last), time.perf_counter()
        loss = train(lesson, model, images, labels)
        seconds = time.perf_counter() - started
        wrong.append(errors(model, tests, answers))
        sizes.append(sum(part.numel() for part in model.parameters()))
        print(f"{name:13}{sizes[-1]:13,}{loss:18.3f}{wrong[-1]:15.2%}      {seconds:.1f} s")
    (baseline, error), share = wrong, 0.5 if digits.is_mnist(root) else 1.0
    lesson.proves(6, error <= 0.01, f"{1 - error:.2%}", full_run=True)
    held = error < share * baseline and sizes[0] > 3 * sizes[1]
    lesson.proves(7, held, f"{error:.2%} against {baseline:.2%}", full_run=True)
    lesson.measured(batch=BATCH, peak_rate=PEAK, accuracy=round(1 - error, 4), dense=round(1 - baseline, 4))
    lesson.save(portrait(model, tests[answers == 3][0]))


if __name__ == "__main__":
    run(main, data="digits", steps=1_000)
