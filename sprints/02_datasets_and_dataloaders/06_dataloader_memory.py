"""What workers really hold: pages shared and pages copied, files mapped and files read, batches made ahead.

Run:     uv run sprints/02_datasets_and_dataloaders/06_dataloader_memory.py      (11 s on two cores)
Proves:  1. taking an item from a list writes into the item; reading a tensor changes none of its bytes
         2. reading an epoch leaves a worker with a copy of a list's memory, and next to none of a tensor's
         3. a spawned worker is sent the whole of a list or an array, and a mere handle of a tensor
         4. a memory-mapped file holds what the same file holds when it is read
         5. a record of a memory-mapped file comes into memory without the rest of the file
         6. when one batch is taken, the workers make prefetch_factor × num_workers more, then wait
Shapes:  N records of L bytes, B of them in a batch
Writes:  results/02_datasets_and_dataloaders/06_dataloader_memory.png
Note:    notes/06_dataloader_memory.md
"""

import ctypes
import gc
import multiprocessing
import re
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

N, L, B = 40_000, 1_000, 1_000
ITEM = (3, 32, 32)  # of float32: what Watched makes, in batches of 8
KERNEL = Path("/proc/self/smaps_rollup")  # what Linux says about the memory of the process that reads it
FORKS = KERNEL.exists() and "fork" in multiprocessing.get_all_start_methods()


def memory(field: str) -> float:
    """A figure of the kernel's about this process in MB: Rss is in memory, Private_Dirty its own and written.

    Where no kernel tells: what Python and NumPy have allocated since tracemalloc was started.
    """
    if not KERNEL.exists():
        return tracemalloc.get_traced_memory()[0] / 1e6
    return int(re.search(rf"^{field}:\s+(\d+) kB", KERNEL.read_text(), re.MULTILINE)[1]) * 1024 / 1e6


def growth(read: Callable[[], object]) -> float:
    """The MB that come into memory when something is read and kept."""
    before, _kept = memory("Rss"), read()
    return memory("Rss") - before


def weigh(batch: Sequence[Sequence[int]]) -> tuple[int, float]:
    """A collate_fn, so it runs in the worker: read every record, then weigh the process."""
    return sum(int(record[0]) for record in batch), memory("Private_Dirty")


def epoch(records: Sequence[Sequence[int]]) -> tuple[int, float, float]:
    """One worker reads all records: a sum over them, and the MB of its own before and after."""
    if not FORKS:  # a spawned worker starts with nothing, and then holds what it is sent
        return weigh(records)[0], 0.0, len(ForkingPickler.dumps(records)) / 1e6
    batches = [range(0), *(range(start, start + B) for start in range(0, N, B))]  # the first one is empty
    forked = {"num_workers": 1, "multiprocessing_context": "fork"}
    sums, own = zip(*DataLoader(records, batch_sampler=batches, collate_fn=weigh, **forked), strict=True)
    return sum(sums), own[0], own[-1]


class Watched(Dataset):
    """Items that are marked in shared memory when they are made, whichever process makes them."""

    def __init__(self) -> None:
        self.made = torch.zeros(1_000, dtype=torch.uint8).share_memory_()

    def __getitem__(self, index: int) -> Tensor:
        self.made[index] = 1
        return torch.zeros(ITEM)


def made_ahead(workers: int, factor: int) -> float:
    """Take one batch and no more: how many others are made by the time when nothing happens any longer."""
    watched, until = Watched(), time.monotonic() + 30
    how = {"multiprocessing_context": "fork" if FORKS else "spawn", "prefetch_factor": factor}
    with warnings.catch_warnings(action="ignore"):  # more workers than cores: slow, and counted just the same
        batches = iter(DataLoader(watched, 8, sampler=range(1_000), num_workers=workers, **how))
    next(batches)
    while watched.made.sum() < 8 * (1 + workers * factor) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)  # enough to make another one, had it been ordered
    return watched.made.sum().item() / 8 - 1


def map_file(lesson: Lesson, path: Path) -> None:
    """Claims 4 and 5. A function of its own, because Windows deletes no file while something maps it."""
    mapped = np.memmap(path, np.uint8, "c", shape=(N, L))  # "c": what is written to it never reaches the file
    from_file = torch.from_file(str(path), size=N * L, dtype=torch.uint8).view(N, L)  # (N·L,) -> (N, L)
    tracemalloc.start()
    one, whole = growth(lambda: mapped[N // 2].sum()), growth(lambda: np.fromfile(path, np.uint8))
    tracemalloc.stop()
    read = np.fromfile(path, np.uint8).reshape(N, L)  # (N·L,) -> (N, L)
    lesson.proves_equal(4, [mapped[::39], from_file[::39]], [read[::39], read[::39]])
    print(f"a record of the map, with the pages around it: {one:.1f} MB; the file read: {whole:.1f} MB")
    lesson.proves(5, one < whole / 4)


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)
    tensor = torch.randint(256, (N, L), generator=draw, dtype=torch.uint8)
    array = tensor.numpy().copy()
    listed = [record.tobytes() for record in array]
    size = array.nbytes / 1e6
    print(f"{N:,} records of {L:,} bytes, {size:.0f} MB: as a list, as an array, as a tensor")

    lesson.heading("To read a list is to write")
    address, length = id(listed[7]), object.__basicsize__  # an object begins with its reference count
    idle, image = ctypes.string_at(address, length), tensor.clone()
    taken, total = listed[7], weigh(tensor)[0]
    held = ctypes.string_at(address, length)
    print(f"a record of {len(taken):,} bytes begins with {idle.hex()}")
    print(f"while someone holds it, with      {held.hex()}")
    lesson.proves(1, idle != held and tensor.equal(image))

    lesson.heading("MB that a worker has to itself")
    print("workers are", "forked, weighed by the kernel" if FORKS else "spawned, here is what they are sent")
    gc.freeze()  # or else a collection in the worker could write into every object it got from its parent
    kinds = {"list": listed, "array": array, "tensor": tensor}
    totals, before, after = zip(*(epoch(records) for records in kinds.values()), strict=True)
    for kind, had, has in zip(kinds, before, after, strict=True):
        print(f"{kind:8} before the epoch {had:5.1f}   after it {has:5.1f}   gained {has - had:5.1f}")
    copied, _, shared = (has - had for had, has in zip(before, after, strict=True))
    lesson.proves(2, copied > size / 2 and shared < size / 4 and totals == (total,) * 3)

    lesson.heading("Bytes sent to a spawned worker")
    parts = listed[:B], array[:B], tensor[:B].clone()
    sent = dict(zip(kinds, (len(ForkingPickler.dumps(part)) for part in parts), strict=True))
    print(f"for {B * L:,} bytes of records:", sent)
    lesson.proves(3, min(sent["list"], sent["array"]) > B * L > 100 * sent["tensor"])

    lesson.heading("Memory-mapped files")
    with tempfile.TemporaryDirectory() as folder:
        array.tofile(path := Path(folder, "records.bin"))
        map_file(lesson, path)

    lesson.heading("Batches made ahead")
    settings = (1, 2), (1, 5), (2, 3)
    ahead = [made_ahead(*setting) for setting in settings]
    for (workers, factor), count in zip(settings, ahead, strict=True):
        cost = f"{int(count * 8 * torch.zeros(ITEM).nbytes):,} bytes"
        print(f"num_workers {workers}, prefetch_factor {factor}: {count:.0f} batches ahead, {cost}")
    lesson.proves_equal(6, ahead, [float(workers * factor) for workers, factor in settings])

    lesson.heading("Pinned memory")
    pin = lesson.device.type == "cuda"  # no other device copies from pinned memory
    batch = next(iter(DataLoader(tensor[:B], batch_size=B, pin_memory=pin)))
    moved = batch.to(lesson.device, non_blocking=pin)
    print(f"pinned: {batch.is_pinned()}, equal on {lesson.device.type}: {moved.cpu().equal(tensor[:B])}")

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for shift, (when, heights) in enumerate((("before", before), ("after", after))):
        bars = axes.bar([x + 0.4 * shift - 0.2 for x in range(3)], heights, 0.38)
        axes.bar_label(bars, [f"{when}\n{height:.0f}" for height in heights], fontsize="small")
    axes.axhline(size, color="k", linewidth=0.8, linestyle="--")
    axes.text(1.5, 1.03 * size, f"the data: {size:.0f} MB", ha="center")
    axes.set(xticks=range(3), xticklabels=kinds, ylim=(0, 1.7 * size), ylabel="MB a worker has to itself")
    axes.set_title("After one epoch the worker has a list of its own; the tensor stays shared")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
