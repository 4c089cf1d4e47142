"""Check the setup: what is here, whether it calculates correctly, and what to do where it is not right.

Run:     uv run sprints/01_setup_and_basics/00_check_setup.py      (8 s on two cores)
Proves:  1. each thing that can be wrong gets one piece of advice, and a sound machine gets none
         2. every device multiplies to within √D·eps of a float64 sum of outer products, in every dtype
         3. every device gives the product and the gradients that plain loops give
         4. the same seed gives the same numbers again on every device, another seed gives others
         5. a figure is drawn without a screen, and comes back from the results folder dot for dot
Shapes:  A (N, D) times B (D, H) is (N, H)
Note:    notes/00_check_setup.md
"""

import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

NEEDED = {"torch": (2, 11), "torchvision": (0, 26), "numpy": (2, 0), "matplotlib": (3, 10), "tqdm": (4, 67)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, D, H = 300, 400, 500


@dataclass(frozen=True)
class Machine:
    """What the advice depends on; as it stands here, all is well."""

    versions: tuple[tuple[str, tuple[int, int]], ...] = tuple(NEEDED.items())
    devices: tuple[str, ...] = ("cuda", "cpu")
    cores: int = 2
    threads: int = 2  # that PyTorch uses for one operation
    free: float = 10  # GB on the disk where results go


FAULTS = [
    *(replace(Machine(), versions=((name, (0, 1)),)) for name in NEEDED),
    replace(Machine(), devices=("cpu",)),
    replace(Machine(), threads=1),
    replace(Machine(), free=0.5),
]


def advice(machine: Machine) -> list[str]:
    """What to do, one line for each thing that is not right."""
    old = [name for name, found in machine.versions if found < NEEDED[name]]
    checks = [(True, f"{name} is too old: `uv run` starts lessons with the right one") for name in old]
    checks += [
        (
            machine.devices == ("cpu",),
            "no GPU: fine here (if you have an NVIDIA one, see what `nvidia-smi` says)",
        ),
        (machine.threads < min(machine.cores, 2), "one thread for all cores: unset OMP_NUM_THREADS"),
        (machine.free < 1, "under 1 GB free: make room, or put results on another disk with --results"),
    ]
    return [what for wrong, what in checks if wrong]


def outer_products(a: Tensor, b: Tensor) -> Tensor:
    """A·B as a sum of D outer products, so that no matrix multiplication has a part in it: -> (N, H)."""
    result = a.new_zeros(a.shape[0], b.shape[1])
    for column, row in zip(a.T, b, strict=True):
        result.addr_(column, row)  # += column[:, None] * row
    return result


def loops(a: list, b: list) -> list:
    """A·B as in a school book: every row of A with every column of B, number by number."""
    columns = list(zip(*b, strict=True))
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in a]


def best_seconds(a: Tensor, b: Tensor) -> float:
    """The fastest of five products; a GPU is waited for, as it returns before it has finished."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        if a.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    devices = tuple(name for name in there if there[name])

    lesson.heading("What is here")
    installed = {name: version(name) for name in NEEDED}
    print(f"Python {platform.python_version()} on {platform.platform(terse=True)}, {platform.machine()}")
    print("   ".join(f"{name} {number}" for name, number in installed.items()))
    print(f"devices {', '.join(devices)}; lessons here take {lesson.device.type}")
    cores, threads = os.cpu_count(), torch.get_num_threads()
    free = shutil.disk_usage(lesson.results).free / 1e9
    print(f"{cores} cores, {threads} threads; {free:.0f} GB free for results")

    lesson.heading("What to do")
    numbers = tuple((name, tuple(map(int, text.split(".")[:2]))) for name, text in installed.items())
    for line in advice(Machine(numbers, devices, cores, threads, free)) or ["nothing, all is well"]:
        print(f"- {line}")
    answers = [tuple(advice(fault)) for fault in FAULTS]
    different = {lines for lines in answers if len(lines) == 1}
    held = advice(Machine()) == [] and len(different) == len(FAULTS)
    lesson.proves(1, held, f"{len(FAULTS)} faults, {len(different)} different answers")

    lesson.heading(f"The same product everywhere: ({N}, {D}) times ({D}, {H})")
    a, b = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((N, D), (D, H)))
    shares = []
    for device in devices:
        for dtype in DTYPES if device != "mps" else DTYPES[1:]:  # MPS has no float64
            ours, theirs = a.to(dtype).to(device), b.to(dtype).to(device)
            exact = outer_products(ours.cpu().double(), theirs.cpu().double())  # of the rounded inputs
            error = ((ours @ theirs).cpu().double() - exact).norm() / exact.norm()
            allowed = D**0.5 * torch.finfo(dtype).eps
            shares.append(error.item() / allowed)
            speed = 2 * N * D * H / best_seconds(ours, theirs) / 1e9
            print(f"{device:4} {dtype!s:14} error {error:.1e}, allowed {allowed:.1e}   {speed:.1f} GFLOP/s")
    held = all(share < 1 for share in shares)  # NaN is not below 1
    lesson.proves(2, held, f"{len(shares)} products, at most {max(shares):.0%} of what is allowed")

    ours, slow = [], []
    for device in devices:
        for n, d, h in ((1, 1, 1), (3, 5, 2), (7, 1, 4), (2, 17, 9)):
            a, b = torch.randn(n, d, generator=draw), torch.randn(d, h, generator=draw)
            left, right = a.to(device).requires_grad_(), b.to(device).requires_grad_()
            weight = torch.randn(n, h, generator=draw)
            product = left @ right
            (weight.to(device) * product).sum().backward()
            ours += [product, left.grad, right.grad]
            pairs = (a, b), (weight, b.T), (a.T, weight)  # d/dA = W·Bᵀ, d/dB = Aᵀ·W
            slow += [torch.tensor(loops(x.tolist(), y.tolist())) for x, y in pairs]
    lesson.proves_equal(3, ours, slow)

    lesson.heading("Seeds")
    again, others = [], []
    for device in devices:
        seeds = (lesson.seed, lesson.seed, lesson.seed + 1)
        seeded = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        first, second, third = (torch.rand(1000, generator=source, device=device) for source in seeded)
        print(f"{device:4} {[round(x, 4) for x in first[:3].tolist()]}")
        again.append(torch.equal(first, second))
        others.append(not torch.equal(first, third))
    lesson.proves(4, all(again + others), "1,000 numbers on each")

    lesson.heading("The results folder")
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.plot([0, 1], [0, 1])
    figure.canvas.draw()
    drawn = torch.from_numpy(np.array(figure.canvas.buffer_rgba()))  # (height, width, 4)
    with tempfile.TemporaryDirectory(dir=lesson.results) as folder:
        file = Path(folder, "proof.png")
        figure.savefig(file, dpi="figure")
        found = torch.from_numpy(plt.imread(file) * 255).round().byte()
    print(f"a figure of {drawn.shape[1]} × {drawn.shape[0]} dots went there and back")
    lesson.proves_equal(5, found, drawn)


if __name__ == "__main__":
    run(main)
