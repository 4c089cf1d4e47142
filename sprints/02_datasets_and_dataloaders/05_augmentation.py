"""Augmentation: a digit turned a little is the same digit, so a few hundred images go a long way.

Run:     uv run sprints/02_datasets_and_dataloaders/05_augmentation.py      (14 s on two cores)
Proves:  1. a loop over the pixels, one matrix per image, and RandomRotation turn digits alike
         2. one matrix per image scales and shifts like RandomAffine too
         3. RandomErasing blackens one box and leaves every other pixel as it was
         4. v2 turns a whole batch by one angle; one matrix per image turns each image by its own
         5. a training set that augments is new at every reading; a test set that does not stays as it is
         6. training on turned digits gains on turned test digits: in every pair, by over 3 times the spread
         7. half a turn changes the label: such a 6 is called 9 more often than 6, such a 9 rather 6 than 9
Shapes:  N images of 1 × 28 × 28
Writes:  results/02_datasets_and_dataloaders/05_augmentation.png,
         results/02_datasets_and_dataloaders/05_augmentation.json
Note:    notes/05_augmentation.md
"""

import itertools
import math

from lab import digits
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import MNIST
from torchvision.transforms import v2

IMAGES, TESTS, LIMIT, PAIRS = 300, 1_000, 45, 5
SMOOTH = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": None}  # the default takes the nearest pixel


def turn_slowly(image: Tensor, degrees: float) -> Tensor:
    """Turn one image counter-clockwise: every new pixel asks where it comes from. (28, 28) -> (28, 28)."""
    turned, middle = torch.zeros_like(image), (len(image) - 1) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for row, column in itertools.product(range(len(image)), repeat=2):
        right, down = column - middle, row - middle
        x, y = middle + cos * right - sin * down, middle + sin * right + cos * down  # turned back
        left, top = math.floor(x), math.floor(y)
        for i, j in itertools.product((top, top + 1), (left, left + 1)):  # the four pixels around that place
            if 0 <= i < len(image) and 0 <= j < len(image):  # outside, all is black
                turned[row, column] += (1 - abs(y - i)) * (1 - abs(x - j)) * image[i, j]
    return turned


def warp(images: Tensor, degrees: Tensor, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    """Turn, scale and shift every image by amounts of its own: (N, 1, 28, 28) -> (N, 1, 28, 28).

    degrees (N,) counter-clockwise, scale (N, 1, 1), shift (N, 1, 2) right and down, 1 being half the width.
    """
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    back = torch.stack([cos, -sin, sin, cos], dim=-1).view(-1, 2, 2) / scale  # (N, 2, 2): result -> image
    offset = -(back * shift).sum(dim=-1, keepdim=True)  # (N, 2, 1)
    places = F.affine_grid(torch.cat([back, offset], dim=-1), images.shape, align_corners=False)
    return F.grid_sample(images, places, align_corners=False)  # (N, 28, 28, 2) places -> (N, 1, 28, 28)


def train(images: Tensor, labels: Tensor, limit: float, seed: int, steps: int) -> nn.Module:
    """A small network; every image of every batch is turned by an angle of its own, up to the limit."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10)).to(images.device)
    optimizer, draw = torch.optim.Adam(model.parameters(), lr=3e-3), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(images), (100,), generator=draw).to(images.device)
        degrees = limit * (2 * torch.rand(100, generator=draw) - 1).to(images.device)
        optimizer.zero_grad()
        F.cross_entropy(model(warp(images[batch], degrees)), labels[batch]).backward()
        optimizer.step()
    return model


def main(lesson: Lesson) -> None:
    draw, root = torch.Generator().manual_seed(lesson.seed), digits.find(lesson.data)
    plain = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    rotation, erasing = v2.RandomRotation(LIMIT, **SMOOTH), v2.RandomErasing(p=1)
    affine = v2.RandomAffine(LIMIT, translate=(0.2, 0.2), scale=(0.6, 1.2), **SMOOTH)
    training = MNIST(root, train=True, transform=v2.Compose([*plain, rotation]))
    testing = MNIST(root, train=False, transform=v2.Compose(plain))

    lesson.heading("Three augmentations, by hand")
    exact = (training.data[:4, None].double() / 255).to(lesson.float64_device)  # (4, 1, 28, 28)

    def apply(transform: v2.Transform, *names: str) -> tuple[Tensor, ...]:
        """What the transform makes of the four images, and these of the parameters that it drew."""
        drawn = [transform.make_params([image]) for image in exact]
        made = [transform.transform(image, each) for image, each in zip(exact, drawn, strict=True)]
        return torch.stack(made), *(exact.new_tensor([each[name] for each in drawn]) for name in names)

    made, degrees = apply(rotation, "angle")
    print("RandomRotation  degrees", *(f"{angle:8.1f}" for angle in degrees))
    slow = [turn_slowly(image[0], angle.item()) for image, angle in zip(exact, degrees, strict=True)]
    lesson.proves_equal(1, [torch.stack(slow)[:, None], warp(exact, degrees)], [made, made])
    made, degrees, scale, shift = apply(affine, "angle", "scale", "translate")
    print("RandomAffine    scale  ", *(f"{factor:8.2f}" for factor in scale))
    ours = warp(exact, -degrees, scale[:, None, None], shift[:, None] / 14)  # it counts angles clockwise
    lesson.proves_equal(2, ours, made)
    made, *box = apply(erasing, *"ijhw")
    print("RandomErasing   box    ", *(f"{h:5.0f}×{w:<2.0f}" for _, _, h, w in zip(*box, strict=True)))
    erased = exact.clone()
    for image, i, j, h, w in zip(erased, *torch.stack(box).int().tolist(), strict=True):
        image[:, i : i + h, j : j + w] = 0  # a view: this writes into `erased`
    lesson.proves_equal(3, erased, made)

    lesson.heading("Every image its own angle, and another one at every reading")
    copies = exact[:1].expand(8, -1, -1, -1).float().to(lesson.device)
    by_batch, by_image = rotation(copies), warp(copies, torch.linspace(-LIMIT, LIMIT, 8).to(lesson.device))
    different = [len(turned.cpu().unique(dim=0)) for turned in (by_batch, by_image)]
    print(f"8 copies of a digit, turned: {different[0]} image by v2, {different[1]} by one matrix each")
    lesson.proves(4, different == [1, 8])
    new = [sum(not torch.equal(data[i][0], data[i][0]) for i in range(100)) for data in (training, testing)]
    print(f"images that differ at a second reading: {new[0]}% for training, {new[1]}% for testing")
    lesson.proves(5, new == [100, 0])

    lesson.heading(f"{PAIRS} pairs of networks, {IMAGES} training images: one twin sees them turned")
    some, wheel = torch.randperm(len(testing), generator=draw)[:TESTS], torch.arange(-180.0, 181.0, 20.0)
    images, labels = (testing.data[some, None] / 255).to(lesson.device), testing.targets[some]
    random = LIMIT * (2 * torch.rand(TESTS, generator=draw) - 1)  # drawn once: one test for all networks
    turns = torch.cat([random[None], wheel[:, None].expand(-1, TESTS)]).to(lesson.device)  # (tests, N)
    tests = [warp(images, degrees) for degrees in turns]
    torch.set_num_threads(1)  # for so small a network, threads wait for each other longer than they compute
    called = torch.empty(PAIRS, 2, len(tests), TESTS)  # what each network calls each image of each test
    for pair in lesson.progress(range(PAIRS), "pairs"):
        some = torch.randperm(len(training), generator=draw)[:IMAGES]
        inputs, targets = (part[some].to(lesson.device) for part in (training.data, training.targets))
        for twin, limit in enumerate((0, LIMIT)):
            seed = lesson.seed * PAIRS + pair
            model = train(inputs[:, None] / 255, targets, limit, seed, lesson.steps)
            with torch.no_grad():
                called[pair, twin] = torch.stack([model(test).argmax(dim=-1) for test in tests])
    accuracy = (called == labels).float().mean(dim=-1)  # (pairs, 2, tests)
    turned, *curve = accuracy.mean(dim=0).T  # one (2,) per test
    print(f"accuracy (chance 10%)   upright   turned by up to {LIMIT}°")
    for twin, name in enumerate(("upright", "turned")):
        print(f"trained {name:15}{curve[len(wheel) // 2][twin]:7.1%}{turned[twin]:10.1%}")
    gains = accuracy[:, 1, 0] - accuracy[:, 0, 0]
    print("gain of each pair ", *(f"{gain:+8.1%}" for gain in gains))
    held = bool(gains.min() > 0 and gains.mean() > 3 * gains.std())
    lesson.proves(6, held, f"{gains.mean():+.1%}, spread {gains.std():.1%}", full_run=True)
    lesson.measured(images=IMAGES, degrees=LIMIT, gains=[round(gain, 4) for gain in gains.tolist()])

    lesson.heading("Half a turn, for the networks that never saw one")
    shares = {}
    for old, new in ((6, 9), (9, 6)):
        answers = called[:, 0, -1, labels == old]  # (pairs, N), at 180°
        shares[old] = [(answers == answer).float().mean() for answer in (new, old)]
        print(f"a {old} is called {new} in {shares[old][0]:.0%} of all cases, {old} in {shares[old][1]:.0%}")
    lesson.proves(7, all(new > old for new, old in shares.values()), full_run=True)

    shown = torch.stack([training.data[training.targets == digit][0] for digit in (2, 4, 6, 7, 9)])[:, None]
    rows = {type(f).__name__: [f(image) for image in shown] for f in (rotation, affine, erasing)}
    rows = {"as it is": shown, **rows, "half a turn": shown.rot90(2, (-2, -1)), "mirrored": shown.flip(-1)}
    sheet = torch.cat([torch.cat([*row], dim=-1)[0] for row in rows.values()])  # (6·28, 5·28)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    figure.suptitle("Trained on turned digits, a network reads digits turned further", size="medium")
    left.imshow(sheet, cmap="gray_r", interpolation="nearest")
    left.set(xticks=[], yticks=range(14, len(sheet), 28), yticklabels=rows)
    right.plot(wheel, torch.stack(curve), label=["trained upright", "trained turned"])
    right.axhline(0.1, color="gray", linestyle=":", label="chance")
    right.set(xlabel="test digits turned by (degrees)", xticks=range(-180, 181, 90))
    right.set(ylabel="accuracy", ylim=(0, 1.35), yticks=(0, 0.5, 1))
    right.legend(loc="upper center", fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, data="digits", steps=150)
