"""MNIST transforms: what turns a picture into the tensor that a network is trained on.

Run:     uv run sprints/02_datasets_and_dataloaders/03_mnist_transforms.py      (12 s on two cores)
Proves:  1. ToImage with ToDtype(scale=True), the older ToTensor and a loop over pixels make the same tensor
         2. one streaming pass finds the mean and deviation of two passes, however the batches are cut
         3. once 4,096 is added to every pixel, float32 sums of squares lose the deviation, streaming keeps it
         4. Normalize, in v2 and in v1, is (x − mean) / deviation, channel by channel
         5. Compose applies its steps in order, to one image as to a whole batch
         6. normalised with its own statistics, the training set has mean 0 and deviation 1
Shapes:  N images, C channels (1 for digits, 3 for colour)
Writes:  results/02_datasets_and_dataloaders/03_mnist_transforms.png
Note:    notes/03_mnist_transforms.md
"""

from collections.abc import Iterable, Sequence

from lab import digits
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import MNIST
from torchvision.transforms import v2


def to_tensor(image: Image.Image) -> Tensor:
    """Pixel by pixel, from bytes to fractions: an image, C bands -> (C, height, width) from 0 to 1."""
    bands, rows, columns = image.split(), range(image.height), range(image.width)
    return torch.tensor([[[band.getpixel((x, y)) / 255 for x in columns] for y in rows] for band in bands])


def normalise(x: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Each channel with its own mean and deviation: (C, height, width), C, C -> (C, height, width)."""
    return torch.stack([(channel - m) / d for channel, m, d in zip(x, mean, deviation, strict=True)])


def two_passes(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation by definition: all batches for the mean, all again for the distances from it."""
    count = sum(batch.numel() for batch in batches)
    mean = sum(batch.sum() for batch in batches) / count
    return mean, (sum((batch - mean).square().sum() for batch in batches) / count).sqrt()


def streaming(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation in one pass: each batch is merged into what is known, then forgotten."""
    count, mean, squares = 0, 0.0, 0.0  # squares: the sum of (x − mean)² so far
    for batch in batches:
        n, center = batch.numel(), batch.mean()
        shift = center - mean
        squares += (batch - center).square().sum() + shift**2 * (count * n / (count + n))
        mean += shift * (n / (count + n))
        count += n
    return mean, (squares / count).sqrt()


def sums_of_squares(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """One pass with √(E[x²] − E[x]²): right on paper, and unsafe in floating point."""
    count, total, squares = 0, 0.0, 0.0
    for batch in batches:
        count, total, squares = count + batch.numel(), total + batch.sum(), squares + batch.square().sum()
    return total / count, (squares / count - (total / count) ** 2).sqrt()


def before_and_after(before: Tensor, after: Tensor) -> plt.Figure:
    """The same batch twice, (8, 28, 28) each, on one scale of greys; beside it, where its numbers lie."""
    figure, axes = plt.subplots(2, 2, figsize=(6, 3.4), width_ratios=(3, 2), layout="constrained")
    for (left, right), batch, name in zip(axes, (before, after), ("before", "after"), strict=True):
        sheet = batch.unflatten(0, (2, 4)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # (2·28, 4·28)
        left.imshow(sheet, cmap="gray", vmin=after.min(), vmax=after.max())
        left.set(xticks=[], yticks=[], ylabel=name)
        right.hist(batch.flatten(), bins=40, range=(after.min().item(), after.max().item()))
        right.axvline(batch.mean(), color="black", linestyle="--")
        right.set(yscale="log", ylim=(1, 2e4), ylabel="pixels", xlabel="value (dashed: the mean)")
    figure.suptitle("Normalising keeps the picture, centres its numbers and stretches them", size="medium")
    return figure


def main(lesson: Lesson) -> None:
    root = digits.find(lesson.data)

    lesson.heading("From an image to a tensor")
    train = MNIST(root, train=True)
    image, label = train[0]
    print(f"train[0] is a PIL image of {image.size} pixels, mode {image.mode}, and the label {label}")
    as_image, as_float = v2.ToImage(), v2.ToDtype(torch.float32, scale=True)
    for name, x in (("ToImage", as_image(image)), ("ToDtype, scale", as_float(as_image(image)))):
        print(f"after {name:14}   {tuple(x.shape)} {x.dtype}, from {x.min():.0f} to {x.max():.3g}")
    draw = torch.Generator().manual_seed(lesson.seed)
    chosen = torch.randperm(len(train), generator=draw)[:500].tolist()
    colour = torch.randint(256, (5, 7, 3), generator=draw, dtype=torch.uint8)
    images = [train[i][0] for i in chosen] + [Image.fromarray(colour.numpy())]
    by_hand = [to_tensor(image) for image in images]
    new, old = [as_float(as_image(image)) for image in images], [v1.ToTensor()(image) for image in images]
    lesson.proves_equal(1, [by_hand, by_hand], [new, old])

    lesson.heading("Mean and deviation in one pass")
    small = [torch.tensor([2.0, 4.0]), torch.tensor([9.0])]
    print("batches (2, 4) and (9): mean {:.3f}, deviation {:.3f}".format(*streaming(iter(small))))
    pixels = train.data.to(lesson.float64_device, torch.float64).div_(255)  # (N, 28, 28)
    mean, deviation = (number.item() for number in streaming(iter(pixels.split(1_000))))
    print(f"{pixels.numel():,} pixels: mean {mean:.4f}, deviation {deviation:.4f}")
    # an iterator can be walked through only once: a second pass would find nothing
    found = [(mean, deviation), *(streaming(iter(pixels.split(size))) for size in (64, 7_777))]
    expected = [torch.std_mean(pixels, correction=0)[::-1], *[two_passes(pixels.split(1_000))] * 2]
    lesson.proves_equal(2, found, expected)
    if train.targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]:  # the digits that MNIST begins with
        lesson.proves(2, f"{mean:.4f} {deviation:.4f}" == "0.1307 0.3081", "on MNIST 0.1307 and 0.3081")

    lesson.heading("The formula that loses the deviation")
    near = []
    for offset in (0, 4_096):
        batches = (pixels.to(lesson.device, torch.float32) + offset).split(1_000)
        pair = [way(iter(batches))[1].item() for way in (sums_of_squares, streaming)]
        near += [abs(number - deviation) < 0.01 * deviation for number in pair]
        print("pixels + {:5,}: deviation by sums of squares {:.4f}, streaming {:.4f}".format(offset, *pair))
    lesson.proves(3, near == [True, True, False, True], f"it is {deviation:.4f} both times")

    lesson.heading("Normalize, and Compose")
    settings = [([mean], [deviation])] * len(chosen) + [([0.2, 0.5, 0.7], [0.1, 0.3, 2.0])]
    by_hand = [normalise(x, *setting) for x, setting in zip(new, settings, strict=True)]
    theirs = [[kind.Normalize(*s)(x) for x, s in zip(new, settings, strict=True)] for kind in (v1, v2)]
    lesson.proves_equal(4, [by_hand, by_hand], theirs)
    pipeline = v2.Compose([as_image, as_float, v2.Normalize([mean], [deviation])])
    ready = MNIST(root, train=True, transform=pipeline)
    one_by_one, at_once = [ready[i][0] for i in chosen], pipeline(train.data[chosen, None])  # (N, 1, 28, 28)
    lesson.proves_equal(5, [by_hand[:-1], torch.stack(by_hand[:-1])], [one_by_one, at_once])

    lesson.heading("The whole training set")
    whole, unseen = train.data[:, None], MNIST(root, train=False).data[:, None]  # (N, 1, 28, 28)
    borrowed = v2.Compose([as_float, v2.Normalize([0.1307], [0.3081])])
    stages = {
        "as it was": (as_float, whole),
        "normalised": (pipeline, whole),
        "with MNIST's 0.1307 and 0.3081": (borrowed, whole),
        "test set, training statistics": (pipeline, unseen),
    }
    for name, (transform, x) in stages.items():
        mean, deviation = streaming(transform(batch).double() for batch in x.split(1_000))
        print(f"{name:30}   mean {mean:+z.4f}   deviation {deviation:.4f}")
        if name == "normalised":
            lesson.proves(6, abs(mean) < 1e-5 and abs(deviation - 1) < 1e-5, "both within 1e-05")

    lesson.save(before_and_after(train.data[:8] / 255, next(iter(DataLoader(ready, batch_size=8)))[0][:, 0]))


if __name__ == "__main__":
    run(main, data="digits")
