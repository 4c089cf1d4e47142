"""The bug museum: seven mistakes between a file and a batch that raise no error, and what finds each of them.

Run:     uv run sprints/02_datasets_and_dataloaders/08_bug_museum.py      (11 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
Shapes:  N images of 1 × 28 × 28, T steps
Note:    notes/08_bug_museum.md
"""

import functools
import pickle

from lab import digits
from lab.lesson import Lesson, run
from lab.museum import Outcome, Twin, Variant, show

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision.datasets import MNIST
from torchvision.transforms import v2

N, T = 500, 8


class Images(Dataset):
    """Images (N, 1, 28, 28), each put through a transform when it is read."""

    def __init__(self, images: Tensor, transform: v2.Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


def noisy(random: np.random.Generator, image: Tensor) -> Tensor:
    """The image with normal noise of deviation 0.1 added to every pixel, as v2.GaussianNoise adds it."""
    return image + 0.1 * torch.from_numpy(random.standard_normal(image.shape, np.float32))


def centred(image: Tensor) -> Tensor:
    """From 0 … 1 to -0.5 … 0.5."""
    return image - 0.5


def class_means(images: Tensor, labels: Tensor) -> Tensor:
    """The mean image of every digit: (N, 1, 28, 28) and (N,) -> (10, 784)."""
    return torch.stack([images[labels == digit].flatten(1).mean(dim=0) for digit in range(10)])


def accuracy(means: Tensor, images: Tensor, labels: Tensor) -> str:
    """How many images (N, 1, 28, 28) lie nearest to the mean image of their own digit."""
    nearest = torch.cdist(images.flatten(1), means).argmin(dim=-1)  # (N, 784), (10, 784) -> (N, 10) -> (N,)
    return f"{(nearest == labels).float().mean():.0%}"


class Case(Twin):
    """What the exhibits have in common."""

    raw: Tensor  # training images (N, 1, 28, 28), bytes
    images: Tensor  # the same between 0 and 1
    labels: Tensor  # (N,)
    tests: Tensor  # test images (N, 1, 28, 28) between 0 and 1
    answers: Tensor  # (N,)


class Peeking(Case):
    """Statistics measured with the test set"""

    look = "mean and deviation of the training inputs"
    check = "other test images would leave the training inputs as they are"
    repair = "measured = images"

    def made(self, wrong: bool) -> Outcome:
        measured = torch.cat([self.images, self.tests]) if wrong else self.images
        return [(part - measured.mean()) / measured.std() for part in (self.images, self.tests)]

    def seen(self, made: Outcome) -> str:
        mean = round(made[0].mean().item(), 3) + 0.0  # no -0.000
        return f"{mean:.3f} {made[0].std():.3f}"

    def passes(self, variant: Variant) -> bool:
        before, self.tests = variant()[0], 1 - self.tests
        return torch.equal(variant()[0], before)


class AugmentedValidation(Case):
    """Validation images augmented like training images"""

    look = "validation accuracy of the nearest class mean"
    check = "two readings of the validation images are equal"
    repair = "transform = v2.Identity()   a second data set for the same indices"

    def made(self, wrong: bool) -> Outcome:
        transform = v2.RandomRotation(45) if wrong else v2.Identity()
        data, seed = Images(self.images, transform), torch.Generator().manual_seed(0)
        _, validation = random_split(data, (0.8, 0.2), seed)
        return [torch.stack(list(validation)), self.labels[validation.indices]]

    def seen(self, made: Outcome) -> str:
        return accuracy(class_means(self.tests, self.answers), *made)

    def passes(self, variant: Variant) -> bool:
        return torch.equal(variant()[0], variant()[0])


class SameNoise(Case):
    """The same random numbers in every worker"""

    look = "first pixel of each image"
    check = "no two images of an epoch get the same noise"
    repair = "transform = v2.GaussianNoise()   which draws from torch: the loader seeds it anew per worker"

    @staticmethod
    @functools.cache  # where workers are spawned, each pair takes seconds to start
    def made(wrong: bool) -> Outcome:
        copied = functools.partial(noisy, np.random.default_rng(torch.initial_seed()))
        transform = copied if wrong else v2.GaussianNoise(clip=False)
        return torch.cat(list(DataLoader(Images(torch.zeros(8, 1, 28, 28), transform), num_workers=2)))

    def seen(self, made: Outcome) -> str:
        return " ".join(f"{pixel:+.2f}" for pixel in made[:4, 0, 0, 0])

    def passes(self, variant: Variant) -> bool:
        return len(variant().unique(dim=0)) == 8


class ShuffledApart(Case):
    """Inputs shuffled apart from their labels"""

    look = "test accuracy of the nearest class mean"
    check = "every digit keeps its mean image"
    repair = "labels[order]"

    def made(self, wrong: bool) -> Outcome:
        order = torch.randperm(N)
        return [self.images[order], self.labels[torch.randperm(N) if wrong else order]]

    def seen(self, made: Outcome) -> str:
        return accuracy(class_means(*made), self.tests, self.answers)

    def passes(self, variant: Variant) -> bool:
        return torch.allclose(class_means(*variant()), class_means(self.images, self.labels), atol=1e-5)


class ScaledTwice(Case):
    """Scaled to 0 … 1 twice"""

    look = "mean and deviation"
    check = "the largest value is 1"
    repair = "no / 255 after scale=True"

    def made(self, wrong: bool) -> Outcome:
        images = v2.ToDtype(torch.float32, scale=True)(self.raw)
        return images / 255 if wrong else images

    def seen(self, made: Outcome) -> str:
        return f"{made.mean():.4f} {made.std():.4f}"

    def passes(self, variant: Variant) -> bool:
        return variant().max().item() == 1


class Unpicklable(Case):
    """A lambda that cannot be pickled"""

    look = "values, read without workers,"
    check = "the data set survives pickling, the way to a spawned worker"
    repair = "v2.Lambda(centred)   with a function at the top level of the file"
    spawned = False

    def made(self, wrong: bool) -> Outcome:
        data = Images(self.images, v2.Lambda((lambda image: image - 0.5) if wrong else centred))
        return torch.stack(list(pickle.loads(pickle.dumps(data)) if self.spawned else data))

    def seen(self, made: Outcome) -> str:
        return f"from {made.min():.1f} to {made.max():.1f}"

    def passes(self, variant: Variant) -> bool:
        self.spawned = True
        try:
            return variant().shape == self.images.shape
        except (pickle.PicklingError, AttributeError):  # which of the two depends on the version of Python
            return False


class LeakingWindows(Case):
    """Windows that leak across the split"""

    look = "held-out characters that stand in a training window"
    check = "no place in the text stands in both parts"
    repair = "cut the windows after the split"

    def made(self, wrong: bool) -> Outcome:
        text = torch.arange(1_000)  # every character names its place, so that we see where it goes
        training, held_out = (part.unfold(0, T, 1) for part in text.split((900, 100)))  # (893, T), (93, T)
        if wrong:
            windows = text.unfold(0, T, 1)[torch.randperm(1_000 - T + 1)]  # (993, T)
            training, held_out = windows[: len(training)], windows[-len(held_out) :]
        return [training, held_out]

    def seen(self, made: Outcome) -> str:
        return f"{torch.isin(made[1], made[0]).float().mean():.0%}"

    def passes(self, variant: Variant) -> bool:
        training, held_out = variant()
        return not torch.isin(held_out, training).any()


def main(lesson: Lesson) -> None:
    root, draw = digits.find(lesson.data), torch.Generator().manual_seed(lesson.seed)
    training, testing = MNIST(root, train=True), MNIST(root, train=False)
    here, there = (torch.randperm(len(data), generator=draw)[:N] for data in (training, testing))
    Case.raw, Case.labels, Case.answers = (
        training.data[here, None],
        training.targets[here],
        testing.targets[there],
    )
    Case.images, Case.tests = Case.raw / 255, testing.data[there, None] / 255
    cases = [Peeking, AugmentedValidation, SameNoise, ShuffledApart, ScaledTwice, Unpicklable, LeakingWindows]
    show(lesson, cases)


if __name__ == "__main__":
    run(main, data="digits")
