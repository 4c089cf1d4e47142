"""Datasets: two small classes make samples of a file, by index or as a stream; one permutation splits them.

Run:     uv run sprints/02_datasets_and_dataloaders/01_custom_dataset.py      (8 s on two cores)
Proves:  1. every line of the file comes back as a sample, unchanged, at its index
         2. the dataset answers every index as a list does: -1 is the last, one outside is an IndexError
         3. that IndexError ends a for loop, which runs on and on where indices wrap around
         4. a stream yields the same samples in the same order, in every epoch
         5. with two workers a stream yields every sample twice, unless each worker takes only its share
         6. our split equals random_split for the same seed; its parts share no sample and miss none
Shapes:  N samples, F features of a sample, B samples in a batch
Writes:  results/02_datasets_and_dataloaders/01_custom_dataset.png
Note:    notes/01_custom_dataset.md
"""

import csv
import tempfile
import warnings
from collections import namedtuple
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
from torch import Generator
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info, random_split

N, B = 24, 4
SKIES = ("sun", "rain", "fog, then sun")  # a comma inside a field: why the csv module does the splitting
Sample = namedtuple("Sample", ("day", "features", "label"))  # features (F,), label: an index into SKIES


def lines(path: Path) -> Iterator[list[str]]:
    """The lines of the file below its header, one at a time, each as a list of fields."""
    with open(path, encoding="utf-8", newline="") as file:  # newline="": the csv module ends lines itself
        yield from islice(csv.reader(file), 1, None)


def parse(line: list[str]) -> Sample:
    day, sky, *numbers = line
    return Sample(int(day), torch.tensor([float(x) for x in numbers]), SKIES.index(sky))


class Diary(Dataset):
    """Map-style: it knows its length, and makes any sample when asked for it by index."""

    def __init__(self, path: Path) -> None:
        self.lines = list(lines(path))

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} in a dataset of {len(self)} samples")
        return parse(self.lines[index % len(self)])  # -1 % N is N - 1


class WrappedDiary(Diary):
    def __getitem__(self, index: int) -> Sample:
        return parse(self.lines[index % len(self)])  # the check is missing: every index gets an answer


class Stream(IterableDataset):
    """Iterable: samples in the order of the file, which is opened anew for each epoch and by each worker."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Sample]:
        return map(parse, lines(self.path))


class SharedStream(Stream):
    """The same, shared out: of W workers, number w takes lines w, w + W, w + 2W …"""

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()  # None where there are no workers
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(parse, islice(lines(self.path), first, None, step))


def answer(samples: Sequence[Sample], index: int) -> int | str:
    """What samples[index] gives: its day, or the name of the error."""
    try:
        return samples[index].day
    except IndexError as error:
        return type(error).__name__


def split(lengths: Sequence[int], draw: Generator) -> list[list[int]]:
    """Shuffle all indices once, then cut: lengths that sum to N -> the indices of each part."""
    order = torch.randperm(sum(lengths), generator=draw).tolist()
    return [order[end - n : end] for n, end in zip(lengths, accumulate(lengths), strict=True)]


def main(lesson: Lesson) -> None:
    warnings.filterwarnings("ignore", "This DataLoader will create")  # the same two workers on a single core
    draw = Generator().manual_seed(lesson.seed)
    features = torch.randint(300, (N, 2), generator=draw) / 10
    labels = torch.randint(len(SKIES), (N,), generator=draw).tolist()
    written = list(map(Sample, range(N), features, labels))
    figure, axes = plt.subplots(1, 3, figsize=(6, 3.4), layout="constrained", sharey=True)
    figure.suptitle("Two workers read a stream twice, unless they share it", fontsize="medium")

    with tempfile.TemporaryDirectory() as folder:
        lesson.heading("A file becomes samples")
        with open(path := Path(folder, "diary.csv"), "w", encoding="utf-8", newline="") as file:
            table = [[s.day, SKIES[s.label], *(f"{x:.1f}" for x in s.features)] for s in written]
            csv.writer(file).writerows([("day", "sky", "temperature", "wind"), *table])
        diary, stream, shared = Diary(path), Stream(path), SharedStream(path)
        print(*path.read_text(encoding="utf-8").splitlines()[:3], f"diary[1] = {diary[1]}", sep="\n")
        lesson.proves_equal(1, [diary[i] for i in range(len(diary))], written, tolerance=0)

        lesson.heading("Indices")
        ours, theirs = ([answer(samples, i) for i in range(-2 * N, 2 * N)] for samples in (diary, written))
        print(*(f"diary[{i}] {answer(diary, i)}" for i in (0, -1, -N, N, -N - 1)), sep="   ")
        lesson.proves(2, ours == theirs, f"{len(ours)} indices, {ours.count('IndexError')} of them outside")
        counts = [sum(1 for _ in islice(samples, 100 * N)) for samples in (diary, WrappedDiary(path))]
        lesson.proves(3, counts == [N, 100 * N], f"over after {counts[0]}, not over after {counts[1]:,}")

        lesson.heading("A stream")
        lesson.proves_equal(4, [list(stream), list(stream)], [written, written], tolerance=0)
        times, ways = [], (("alone", stream, 0), ("two workers", stream, 2), ("shared by two", shared, 2))
        for (name, dataset, workers), panel in zip(ways, axes, strict=True):
            days = torch.cat([batch.day for batch in DataLoader(dataset, B, num_workers=workers)]).tolist()
            times.append({days.count(day) for day in range(N)})
            print(f"{name:13}   {len(days)} samples, each day", *times[-1], f"×   {days[:10]} …")
            colours = [f"C{workers and place // B % workers}" for place in range(len(days))]
            panel.scatter(range(len(days)), days, s=8, c=colours)
            panel.set(title=name, xlabel="place of arrival", ylabel="day")
        lesson.proves(5, times == [{1}, {2}, {1}])

    lesson.heading("Training and validation")
    days = [sample.day for sample in Subset(diary, split((18, 6), Generator().manual_seed(lesson.seed))[1])]
    print(f"18 days for training, {len(days)} for validation: {days}")
    ours, theirs = [], []
    for lengths in ((24,), (18, 6), (12, 5, 6), (700, 200, 100)):
        parts, whole = split(lengths, Generator().manual_seed(lesson.seed)), range(sum(lengths))
        by_torch = random_split(whole, lengths, Generator().manual_seed(lesson.seed))
        ours += [parts, sorted(index for part in parts for index in part)]
        theirs += [[part.indices for part in by_torch], list(whole)]
    lesson.proves_equal(6, ours, theirs)
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
