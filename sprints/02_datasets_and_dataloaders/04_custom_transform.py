"""A custom transform: a random shift of your own that composes, repeats and travels to worker processes.

Run:     uv run sprints/02_datasets_and_dataloaders/04_custom_transform.py      (11 s on two cores)
Proves:  1. a padded slice, a loop over pixels and torchvision's affine shift an image alike
         2. from one seed, class and module make the same images, and the global random state stays as it was
         3. each of the (2P + 1)² shifts by up to P pixels is drawn equally often
         4. the module moves an image and its mask together, and leaves the label alone
         5. shift then Normalize equals Normalize then shift, if the fill is normalised too
         6. a copy made by pickle, from bytes alone, goes on with the same shifts; a lambda is refused
         7. seeded by seed, epoch and index, an image is the same in 0 and in 2 workers, and new in each epoch
Shapes:  N images, C channels, P pixels at most
Writes:  results/02_datasets_and_dataloaders/04_custom_transform.png
Note:    notes/04_custom_transform.md
"""

import pickle
from collections import Counter
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

from lab import digits
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.datasets import MNIST
from torchvision.transforms import v2

P = 4


def shift_by_loop(image: Tensor, down: int, right: int, fill: float) -> Tensor:
    """Pixel by pixel: what leaves is lost, what enters is `fill`. (…, height, width) -> the same shape."""
    height, width = image.shape[-2:]
    moved = torch.full_like(image, fill)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                moved[..., row, column] = image[..., row - down, column - right]
    return moved


def shift(image: Tensor, down: int, right: int, fill: float) -> Tensor:
    """A frame of `fill` around the image, and a window into it: (…, height, width) -> the same shape."""
    (height, width), frame = image.shape[-2:], max(abs(down), abs(right))
    padded = F.pad(image, [frame] * 4, value=fill)  # (…, frame + height + frame, frame + width + frame)
    top, left = frame - down, frame - right
    return padded[..., top : top + height, left : left + width]


def draw_shift(pixels: int, generator: torch.Generator) -> tuple[int, int]:
    """(down, right), each from -pixels to +pixels."""
    return tuple(torch.randint(-pixels, pixels + 1, (2,), generator=generator).tolist())


class Generator(torch.Generator):
    """Travels as the bytes of its state; torch's own sends a tensor, which a spawned worker cannot open."""

    def __reduce__(self) -> tuple:
        return revive, (self.get_state().numpy().tobytes(),)


def revive(state: bytes) -> Generator:
    """The generator whose state this is, in the process that received it."""
    generator = Generator()
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


class RandomShift:
    """A transform is anything that can be called with an image: (…, height, width) -> the same shape."""

    def __init__(self, pixels: int, generator: torch.Generator, fill: float = 0.0) -> None:
        self.pixels, self.generator, self.fill = pixels, generator, fill

    def __call__(self, image: Tensor) -> Tensor:
        return shift(image, *draw_shift(self.pixels, self.generator), self.fill)


class RandomShiftModule(v2.Transform):
    """The same as an nn.Module of torchvision's kind: one draw for all that belongs to a sample."""

    def __init__(self, pixels: int, generator: torch.Generator, fill: float = 0.0) -> None:
        super().__init__()
        self.pixels, self.generator, self.fill = pixels, generator, fill

    def make_params(self, flat_inputs: list) -> dict[str, int]:
        return dict(zip(("down", "right"), draw_shift(self.pixels, self.generator), strict=True))

    def transform(self, inpt: Tensor, params: dict[str, int]) -> Tensor:
        fill = 0 if isinstance(inpt, tv_tensors.Mask) else self.fill  # no ink enters a mask
        return tv_tensors.wrap(shift(inpt, **params, fill=fill), like=inpt)


@dataclass
class Repeatable(Dataset):
    """Digits whose transform draws from a generator that is seeded afresh for every image."""

    images: Dataset
    transform: v2.Transform
    generator: torch.Generator  # the one that the transform draws from
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        mixed = np.random.SeedSequence((self.seed, self.epoch, i)).generate_state(1)  # three numbers to one
        self.generator.manual_seed(int(mixed[0]))
        image, label = self.images[i]
        return self.transform(image), label


def main(lesson: Lesson) -> None:
    train = MNIST(digits.find(lesson.data), train=True)
    to_float = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images = to_float(train.data[:50, None]).to(lesson.device)  # (N, 28, 28) -> (N, 1, 28, 28)
    draw, *alike = [Generator().manual_seed(lesson.seed) for _ in range(7)]

    lesson.heading("A shift, three ways")
    print("[1 2 3 4] moved 1 to the right:", shift(torch.tensor([[1, 2, 3, 4]]), 0, 1, fill=0).tolist()[0])
    ours, theirs = [], []
    for shape in ((1, 28, 28), (3, 5, 7), (2, 1, 9, 4)) * 8:
        x, (down, right) = torch.rand(shape, generator=draw).to(lesson.device), draw_shift(6, draw)
        affine = v2.functional.affine(x, angle=0, translate=[right, down], scale=1, shear=[0, 0], fill=0.5)
        ours.append(shift(x, down, right, fill=0.5))
        theirs.append((shift_by_loop(x, down, right, fill=0.5), affine))
    lesson.proves_equal(1, [(x, x) for x in ours], theirs)

    lesson.heading("A class and a module")
    before = torch.get_rng_state()
    of_class, of_module = RandomShift(P, alike[0], fill=0.25), RandomShiftModule(P, alike[1], fill=0.25)
    print(f"the module prints as {of_module}")
    lesson.proves_equal(2, [of_class(x) for x in images], [of_module(x) for x in images])
    lesson.proves(2, torch.equal(before, torch.get_rng_state()), "global state untouched")
    kinds = (2 * P + 1) ** 2
    counts = Counter(draw_shift(P, draw) for _ in range(200 * kinds))  # each 200 times, give or take √200
    off = max(abs(count - 200) for count in counts.values())
    lesson.proves(3, len(counts) == kinds and off < 85, f"{len(counts)} shifts, each drawn 200 ± {off} times")
    together = []
    for x in images:
        moved, mask, label = of_module(tv_tensors.Image(x), tv_tensors.Mask(x > 0.5), 7)
        together.append(torch.equal(moved > 0.5, mask) and label == 7)
    lesson.proves(4, all(together), f"{sum(together)} of {len(images)} samples")

    lesson.heading("Among other transforms")
    centre = v2.Normalize([0.5], [0.5])  # 0 to 1 becomes -1 to 1, so the background becomes -1
    early = v2.Compose([to_float, RandomShiftModule(P, alike[2]), centre])
    late = v2.Compose([to_float, centre, RandomShiftModule(P, alike[3], fill=-1.0)])
    grey = v2.Compose([to_float, centre, RandomShiftModule(P, alike[4], fill=0.0)])
    first, second, third = ([way(train[i][0]) for i in range(50)] for way in (early, late, grey))
    by_hand = [(shift(x, *draw_shift(P, alike[5]), fill=0.0) - 0.5) / 0.5 for x in images]
    lesson.proves_equal(5, [by_hand, by_hand], [first, second])

    lesson.heading("Into another process")
    copies = [pickle.loads(pickle.dumps(early)) for _ in range(2)]
    onwards = [[way(train[i][0]) for i in range(50)] for way in (early, *copies)]
    lesson.proves_equal(6, onwards[1:], onwards[:1] * 2)
    parcel = bytes(ForkingPickler.dumps(early))  # what a spawned worker is sent
    lesson.proves(6, b"torch.multiprocessing" not in parcel, f"{len(parcel):,} bytes, no shared memory")
    try:
        lesson.proves(6, not pickle.dumps(v2.Lambda(lambda x: shift(x, 1, 1, 0.0))))
    except (AttributeError, pickle.PicklingError) as refused:
        lesson.proves(6, "lambda" in str(refused), "the lambda refused")
    data = Repeatable(Subset(train, range(64)), early, alike[2], lesson.seed)
    alone, helped, later = [], [], []
    for data.epoch, workers, batches in ((0, 0, alone), (0, 2, helped), (1, 0, later)):
        batches += [x for x, _ in DataLoader(data, batch_size=16, num_workers=workers)]
    lesson.proves_equal(7, helped, alone)
    new = (torch.cat(later) != torch.cat(alone)).flatten(1).any(1).sum().item()
    lesson.proves(7, new > 48, f"{new} of {len(data)} images differ in the next epoch")

    figure, axes = plt.subplots(figsize=(6, 2.9), layout="constrained")
    rows = [[centre(x) for x in images.cpu()], first, third]
    sheet = torch.cat([torch.cat([x[0] for x in row[:7]], dim=1) for row in rows])  # (3·28, 7·28)
    axes.imshow(sheet, cmap="gray", interpolation="nearest")
    names = ["as it is", "shift,\nthen Normalize", "Normalize,\nthen shift\nwith fill 0"]
    axes.set(xticks=[], yticks=[14, 42, 70], yticklabels=names, title="After Normalize, a fill of 0 is grey")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, data="digits")
