"""The DataLoader: it makes batches of a dataset, in the order you ask for, and can have workers fetch them.

Run:     uv run sprints/02_datasets_and_dataloaders/02_dataloader.py      (11 s on two cores)
Proves:  1. a loader by hand yields torch's batches in every epoch, shuffled or not, last one dropped or not
         2. a padded batch and its mask hold every ragged sample unchanged; the padding equals pad_sequence
         3. batches of like lengths visit every sample once, with less than half the padding
         4. two workers deliver the batches of none, in the same order, in every epoch
         5. a generator inside the dataset repeats itself in every worker, until worker_init_fn seeds it
         6. two workers wait for slow samples at the same time; for quick ones their start outweighs the epoch
         7. a spawned worker runs the script again, so the main guard must keep it from starting workers too
Shapes:  N samples, B samples in a batch, T numbers in the longest of them, D features
Writes:  results/02_datasets_and_dataloaders/02_dataloader.png
Note:    notes/02_dataloader.md
"""

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from random import Random

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, RandomSampler, get_worker_info

N, B, D, EPOCHS, NAP = 32, 4, 3, 4, 0.01  # NAP in seconds
SCRIPT = """from multiprocessing import get_context
if {guard}:
    worker = get_context("spawn").Process(target=print, args=["the worker ran"])
    worker.start()
    worker.join()
"""


def collate(samples: Sequence) -> Tensor | list[Tensor]:
    """B samples -> one batch: tensors and numbers are stacked to (B, …), tuples field by field."""
    if isinstance(samples[0], tuple):
        return [collate(field) for field in zip(*samples, strict=True)]
    return torch.stack([torch.as_tensor(sample) for sample in samples])  # (B, …)


@dataclass
class Loader:
    """What torch's DataLoader does with a map-style dataset and no workers."""

    dataset: Sequence
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    generator: Generator | None = None

    def seed(self) -> int:
        return int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))

    def __iter__(self) -> Iterator[Tensor | list[Tensor]]:
        self.seed()  # the seed of the workers is drawn even where there are none
        order = range(len(self.dataset))
        if self.shuffle:
            draw = self.generator or Generator().manual_seed(self.seed())
            order = torch.randperm(len(self.dataset), generator=draw).tolist()
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            if len(indices) == self.batch_size or not self.drop_last:
                yield collate([self.dataset[i] for i in indices])
        if self.shuffle:
            torch.randperm(len(order), generator=draw)  # torch draws an order once more, and drops it


def pad(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """B samples (T₁,) (T₂,) … -> values (B, T), zero where a sample is over, and mask (B, T), True before."""
    lengths = torch.tensor([len(sample) for sample in samples])  # (B,)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (T,) < (B, 1) -> (B, T)
    values = torch.zeros(mask.shape)
    values[mask] = torch.cat(list(samples))  # the True places row by row, sample after sample
    return values, mask


class Sensor(Dataset):
    """N noisy readings (index, noise, when asked for, when ready); `nap` stands for a slow disk."""

    def __init__(self, nap: float) -> None:
        self.nap, self.draw = nap, Random(0)  # a torch.Generator cannot go to a spawned worker on Linux

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        asked = time.perf_counter()
        if self.nap:
            time.sleep(self.nap)
        return index, self.draw.random(), asked, time.perf_counter()


def seed_worker(worker: int) -> None:
    """Runs in each worker before its first sample; torch has drawn a seed for each, which we pass on."""
    info = get_worker_info()
    info.dataset.draw.seed(info.seed)


def together(epoch: Sequence) -> int:
    """How many samples of an epoch were on their way while another one was."""
    spans = [span for _, _, asked, ready in epoch for span in zip(asked, ready, strict=True)]
    return sum(sum(asked < end and start < ready for start, end in spans) > 1 for asked, ready in spans)


def main(lesson: Lesson) -> None:
    warnings.filterwarnings("ignore", "This DataLoader will create")  # the same two workers on a single core
    draw = Generator().manual_seed(lesson.seed)

    lesson.heading("Batches")
    ours, theirs = [], []
    samples = [(torch.randn(D, generator=draw), label) for label in range(11)]
    for n, size, shuffle, drop, given in product((1, 8, 11), (1, 4, 5), *[(False, True)] * 3):
        for kind, epochs in ((Loader, ours), (DataLoader, theirs)):
            torch.manual_seed(lesson.seed)
            seeded = Generator().manual_seed(lesson.seed) if given else None
            loader = kind(samples[:n], size, shuffle=shuffle, drop_last=drop, generator=seeded)
            epochs.append([list(loader) for _ in range(EPOCHS)])
        if (n, size, given) == (11, 4, True):
            labels = [batch[1].tolist() for batch in ours[-1][0]]
            print(f"11 samples, shuffle={shuffle!s:5} drop_last={drop!s:5}  {labels}")
    lesson.proves_equal(1, ours, theirs, tolerance=0)

    lesson.heading("Samples of different lengths")
    values, mask = pad([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])])
    print(f"values {values.tolist()}\nmask   {mask.int().tolist()}")
    print(f"mean of the second: {values[1].mean():.2f}, of its real numbers {values[1][mask[1]].mean():.2f}")
    lengths = torch.randint(1, 41, (N,), generator=draw)
    ragged = [torch.randn(n, generator=draw) for n in lengths.tolist()]
    pin = lesson.device.type == "cuda"  # only CUDA copies faster from pinned memory; elsewhere torch warns
    in_order = list(DataLoader(ragged, B, collate_fn=pad, pin_memory=pin))
    kept = [row[mask] for batch in in_order for row, mask in zip(*batch, strict=True)]
    by_torch = [pad_sequence(ragged[start : start + B], batch_first=True) for start in range(0, N, B)]
    lesson.proves_equal(2, [kept, [values for values, _ in in_order]], [ragged, by_torch], tolerance=0)
    by_length = lengths.argsort().view(-1, B)  # (N,) -> (N/B, B)
    batches = by_length[torch.randperm(len(by_length), generator=draw)].tolist()
    alike = list(DataLoader(ragged, batch_sampler=batches, collate_fn=pad, pin_memory=pin))
    seen = [mask.to(lesson.device, non_blocking=pin).sum(1) for _, mask in alike]  # (B,) lengths per batch
    once = sorted(torch.cat(seen).tolist()) == sorted(lengths.tolist())
    sizes = [sum(mask.numel() for _, mask in loaded) for loaded in (in_order, alike)]
    before, after = (1 - lengths.sum().item() / size for size in sizes)
    print(f"copied to {lesson.device.type} with pin_memory={pin}")
    lesson.proves(3, once and after < before / 2, f"{after:.0%} of all numbers, in file order {before:.0%}")

    lesson.heading("Workers")
    orders, noises, first, later, last = [], [], [], [], []
    for nap, workers, init in ((0, 0, None), (0, 2, None), (NAP, 0, None), (NAP, 2, seed_worker)):
        sampler = RandomSampler(range(N), generator=Generator().manual_seed(lesson.seed))
        options = {"num_workers": workers, "worker_init_fn": init, "persistent_workers": workers > 0}
        loader = DataLoader(Sensor(nap), B, sampler=sampler, **options)
        epochs, clock = [], [time.perf_counter()]
        for _ in range(EPOCHS):
            epochs.append([[field.tolist() for field in batch] for batch in loader])
            clock.append(time.perf_counter())
        orders.append([[batch[0] for batch in epoch] for epoch in epochs])
        noises.append(len({noise for batch in epochs[0] for noise in batch[1]}))
        took = [1000 * (end - start) for start, end in pairwise(clock)]
        first, later, last = [*first, took[0]], [*later, min(took[1:])], [*last, epochs[-1]]
        name = f"{'slow' if nap else 'quick'} samples, {workers} workers"
        print(f"{name:24} first epoch {took[0]:6.1f} ms   later {later[-1]:6.1f} ms   {noises[-1]} noises")
    lesson.proves_equal(4, [orders[1], orders[3]], [orders[0], orders[2]])
    lesson.proves(5, noises == [N, N // 2, N, N], f"{noises[1]} of {N} noises, then {noises[3]} of {N}")
    alone, two = together(last[2]), together(last[3])
    held = alone == 0 < two and first[1] > later[0]
    lesson.proves(6, held, f"{two} of {N} slow samples while another was fetched, {alone} without workers")

    lesson.heading("The main guard")
    said = []
    with tempfile.TemporaryDirectory() as folder:
        for guard in ("True", '__name__ == "__main__"'):
            script = Path(folder, "script.py")
            script.write_text(SCRIPT.format(guard=guard), encoding="utf-8")
            ran = subprocess.run([sys.executable, script], capture_output=True, text=True)
            error = " ".join(ran.stderr.split()).partition("Error: ")[2].partition(" before")[0]
            said.append(ran.stdout.strip() or error)
            print(f"if {guard + ':':25} {said[-1]}")
    lesson.proves(7, said == ["An attempt has been made to start a new process", "the worker ran"])

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for row, epoch in (("no workers", last[2]), ("worker {}", last[3])):
        origin = min(min(batch[2]) for batch in epoch)
        for k, (_, _, asked, ready) in enumerate(epoch):
            start, end = 1000 * (min(asked) - origin), 1000 * (max(ready) - origin)
            bar = axes.barh(row.format(k % 2), end - start, left=start, color=f"C{k % 2}", edgecolor="w")
            axes.bar_label(bar, [k], label_type="center")
    axes.set(xlabel="milliseconds", title="Two workers take the batches in turn, and wait at the same time")
    axes.invert_yaxis()
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
