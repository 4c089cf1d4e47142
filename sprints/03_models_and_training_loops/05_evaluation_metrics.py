"""Evaluation metrics: what a classifier gets wrong, how sure it is of it, and how far to trust the score.

Run:     uv run sprints/03_models_and_training_loops/05_evaluation_metrics.py      (9 s on two cores)
Proves:  1. precision, recall and F1 read off the confusion matrix equal counts made one sample at a time
         2. pooled over classes all three are the accuracy; mean recall is the accuracy of equal classes
         3. top-k accuracy equals a loop; it is the accuracy for k = 1 and 100% for k = V
         4. the calibration error equals a loop over the bins
         5. on labels drawn from the network's own probabilities it is less than half as large
         6. where 1 image in 100 counts, a constant beats a useful detector in accuracy, not in recall or F1
         7. the bootstrap interval equals a loop's; on 91% to 98% of samples it holds the true accuracy
Shapes:  N samples, V classes, S bins, R resamples
Writes:  results/03_models_and_training_loops/05_evaluation_metrics.png
Note:    notes/05_evaluation_metrics.md
"""

from lab import digits
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

V, S, R, REPEATS = 10, 10, 500, 1_000
IMAGES, STEPS, RATE = 2_000, 150, 1e-2
SHAPES = ((2, 2), (7, 3), (60, 4), (100, 12))  # N, V


def confusion(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Row: the true class; column: the predicted one; entry: how many samples. (N,), (N,) -> (V, V)."""
    pairs = labels * classes + predictions  # (N,): a number of its own for each pair of classes
    return pairs.bincount(minlength=classes**2).view(classes, classes)  # (V·V,) -> (V, V)


def scores(table: Tensor) -> Tensor:
    """Precision, recall and F1 of every class, 0 where they would be 0/0: (V, V) -> (3, V)."""
    hits, called, there = table.diag(), table.sum(0), table.sum(1)  # each (V,)
    divisors = torch.stack([called, there, (called + there) / 2])  # (3, V)
    return hits / divisors.double().clamp(min=0.5)


def pooled(table: Tensor) -> list[float]:
    """Precision, recall and F1 from the counts of all classes together (micro): (V, V) -> 3 numbers."""
    called, there, hits = (n.sum().item() for n in (table.sum(0), table.sum(1), table.diag()))
    return [hits / called, hits / there, 2 * hits / (called + there)]


def scores_by_loop(labels: list[int], predictions: list[int], c: int) -> list[float]:
    """Precision, recall and F1 of one class by their definitions, sample by sample."""
    hits = false_alarms = misses = 0
    for label, prediction in zip(labels, predictions, strict=True):
        hits += label == c and prediction == c
        false_alarms += label != c and prediction == c
        misses += label == c and prediction != c
    if hits == 0:
        return [0.0, 0.0, 0.0]
    precision, recall = hits / (hits + false_alarms), hits / (hits + misses)
    return [precision, recall, 2 / (1 / precision + 1 / recall)]  # F1: the harmonic mean


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """The share of samples whose label is among the k highest logits; (N, V), (N,)."""
    return (logits.topk(k).indices == labels[:, None]).any(1).double().mean().item()  # (N, k) -> (N,)


def top_k_by_loop(logits: list[list[float]], labels: list[int], k: int) -> float:
    found = 0
    for row, label in zip(logits, labels, strict=True):
        found += label in sorted(range(len(row)), key=row.__getitem__, reverse=True)[:k]
    return found / len(labels)


def reliability(confidence: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of S bins of confidence: its share of the samples, mean confidence, accuracy; all (S,)."""
    edges = torch.linspace(0, 1, S + 1, dtype=torch.float64)
    bins = torch.bucketize(confidence, edges) - 1  # (N,): bin s holds edges[s] < confidence <= edges[s + 1]
    count = bins.bincount(minlength=S)
    sure, correct = (bins.bincount(values.double(), minlength=S) for values in (confidence, right))
    return count.double() / len(bins), sure / count.clamp(min=1), correct / count.clamp(min=1)


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """The mean distance of confidence and accuracy, bin by bin: the expected calibration error."""
    share, sure, correct = reliability(confidence, right)
    return (share * (sure - correct).abs()).sum().item()


def calibration_error_by_loop(confidence: list[float], right: list[bool]) -> float:
    total = 0.0
    for low, high in ((s / S, (s + 1) / S) for s in range(S)):
        members = [(c, r) for c, r in zip(confidence, right, strict=True) if low < c <= high]
        total += abs(sum(c for c, _ in members) - sum(r for _, r in members))
    return total / len(right)


def bootstrap(right: Tensor, draw: Generator) -> tuple[float, float]:
    """The middle 95% of the accuracies of R samples drawn, with replacement, from this one (N,)."""
    again = torch.randint(len(right), (R, len(right)), generator=draw)  # (R, N): indices
    low, high = right.double()[again].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low.item(), high.item()


def bootstrap_by_loop(right: list[bool], draw: Generator) -> tuple[float, float]:
    means = []
    for _ in range(R):
        again = torch.randint(len(right), (len(right),), generator=draw).tolist()
        means.append(sum(right[i] for i in again) / len(right))
    means.sort()
    places = [0.025 * (R - 1), 0.975 * (R - 1)]  # between two of the sorted means: in proportion
    low, high = (means[int(p)] + (p % 1) * (means[int(p) + 1] - means[int(p)]) for p in places)
    return low, high


def train(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A small network, trained on few images until it is very sure of them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, V)).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def picture(images: Tensor, labels: Tensor, predictions: Tensor, confidence: Tensor) -> plt.Figure:
    """The reliability diagram, and the nine mistakes that the network is surest of."""
    figure = plt.figure(figsize=(6, 3.4), layout="constrained")
    figure.suptitle(
        "The network is right less often than it is sure; its nine surest mistakes", size="medium"
    )
    grid = figure.add_gridspec(3, 6)
    left = figure.add_subplot(grid[:, :3])
    _, _, accuracy = reliability(confidence, predictions == labels)
    left.bar((torch.arange(S) + 0.5) / S, accuracy, 1 / S, edgecolor="white")
    left.plot([0, 1], [0, 1], "k--")
    left.set(xlabel="confidence (dashed: as sure as right)", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    wrong = (predictions != labels).nonzero().flatten()
    surest = wrong[confidence[wrong].argsort(descending=True)[:9]].tolist()
    for place, i in enumerate(surest):
        panel = figure.add_subplot(grid[place // 3, 3 + place % 3])
        panel.imshow(images[i, 0], "gray_r")
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"{labels[i]}, called {predictions[i]}", size="small")
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a network, threads wait for each other longer than they compute
    draw = Generator().manual_seed(lesson.seed)
    root = digits.find(lesson.data)

    lesson.heading(f"A small network, trained on {IMAGES:,} digits")
    images, labels = digits.tensors(root, train=True, device=lesson.device)
    some = torch.randperm(len(images), generator=draw)[:IMAGES].to(lesson.device)
    model = train(images[some], labels[some], lesson.seed)
    images, labels = digits.tensors(root, train=False, device=lesson.device)
    with torch.no_grad():
        logits = model(images).cpu().double()  # (N, V); all the rest is counting, on the CPU
    images, labels = images.cpu(), labels.cpu()
    predictions, probabilities = logits.argmax(1), logits.softmax(1)  # (N,) and (N, V)
    confidence, right = probabilities.amax(1), predictions == labels  # each (N,)
    accuracy = right.double().mean().item()
    print(f"{right.sum():,} of {len(right):,} test digits right: accuracy {accuracy:.1%}, chance 10%")

    lesson.heading("Row: what it is. Column: what it is called")
    table = confusion(labels, predictions, V)
    print(" " * 3 + "".join(f"{c:5}" for c in range(V)) + "  precision   recall       F1")
    for c, (row, line) in enumerate(zip(table.tolist(), scores(table).T.tolist(), strict=True)):
        print(f"{c:3}" + "".join(f"{n:5}" for n in row) + "  " + "".join(f"{x:9.1%}" for x in line))
    for name, line in (("mean", scores(table).mean(1).tolist()), ("pooled", pooled(table))):
        print(f"{name:>53}  " + "".join(f"{x:9.1%}" for x in line))
    cases = [(labels, logits)]
    for n, classes in SHAPES:  # every class is there, but not every class need be predicted
        y = torch.cat([torch.arange(classes), torch.randint(classes, (n,), generator=draw)])
        cases.append((y, torch.randn(len(y), classes, generator=draw, dtype=torch.float64)))
    tables, slow, plain, balanced = [], [], [], []
    for y, z in cases:
        tables.append(confusion(y, z.argmax(1), z.shape[1]))
        slow.append([scores_by_loop(y.tolist(), z.argmax(1).tolist(), c) for c in range(z.shape[1])])
        hit, weight = (z.argmax(1) == y).double(), 1 / y.bincount()[y].double()  # (N,): a class weighs 1
        plain.append([hit.mean().item()] * 3)
        balanced.append(((hit * weight).sum() / weight.sum()).item())
    lesson.proves_equal(1, [scores(t).T.tolist() for t in tables], slow)
    recalls = [scores(t)[1].mean().item() for t in tables]
    lesson.proves_equal(2, [[pooled(t) for t in tables], recalls], [plain, balanced])

    lesson.heading("Second guesses")
    print("   ".join(f"top {k} {top_k(logits, labels, k):.1%}" for k in (1, 2, 3, 5)))
    ours, slow = [], []
    for y, z in cases:
        ours += [top_k(z, y, k) for k in range(1, z.shape[1] + 1)]
        slow += [top_k_by_loop(z.tolist(), y.tolist(), k) for k in range(1, z.shape[1] + 1)]
    ends = [top_k(logits, labels, 1), top_k(logits, labels, V)]
    lesson.proves_equal(3, [ours, ends], [slow, [accuracy, 1.0]])

    lesson.heading("Is it as right as it is sure?")
    found, tests = calibration_error(confidence, right), [(confidence, right)]
    for n, _ in SHAPES:
        tests.append(
            (torch.rand(n, generator=draw, dtype=torch.float64), torch.rand(n, generator=draw) < 0.5)
        )
    ours = [calibration_error(c, r) for c, r in tests]
    lesson.proves_equal(4, ours, [calibration_error_by_loop(c.tolist(), r.tolist()) for c, r in tests])
    drawn = torch.multinomial(probabilities, 20, replacement=True, generator=draw)  # (N, 20)
    own = sum(calibration_error(confidence, predictions == column) for column in drawn.T) / 20
    print(f"mean confidence {confidence.mean():.1%}, accuracy {accuracy:.1%}, calibration error {found:.1%}")
    lesson.proves(5, own < found / 2, f"{own:.1%} on drawn labels, {found:.1%} on the real ones")

    lesson.heading("One in a hundred is an 8: find them")
    others = (labels != 8).nonzero().flatten()
    rare = torch.cat([others, (labels == 8).nonzero().flatten()[: len(others) // 99]])
    there = (labels[rare] == 8).long()
    detectors = {"always no": torch.zeros_like(there), "p(8) > 10%": (probabilities[rare, 8] > 0.1).long()}
    results = []
    for name, alarm in detectors.items():
        both = confusion(there, alarm, 2)
        share, recall, f1 = pooled(both)[0], scores(both)[1].mean().item(), scores(both)[2, 1].item()
        print(f"{name:10}   accuracy {share:.1%}   mean recall {recall:.1%}   F1 of the 8s {f1:.1%}")
        results.append((share, recall, f1))
    constant, detector = results
    held = constant[0] > detector[0] and constant[1] + 0.2 < detector[1] and constant[2] + 0.1 < detector[2]
    lesson.proves(6, held, f"{len(rare):,} images, {there.sum()} of them an 8")

    lesson.heading("How far to trust an accuracy")
    few = right[torch.randint(len(right), (200,), generator=draw)]
    pairs = [(few[:n], seed) for seed, n in enumerate((1, 7, 60, 200))]
    ours = [bootstrap(part, Generator().manual_seed(seed)) for part, seed in pairs]
    slow = [bootstrap_by_loop(part.tolist(), Generator().manual_seed(seed)) for part, seed in pairs]
    lesson.proves_equal(7, ours, slow)
    holds = 0
    for _ in lesson.progress(range(REPEATS), "samples"):
        low, high = bootstrap(right[torch.randint(len(right), (200,), generator=draw)], draw)
        holds += low <= accuracy <= high
    print(f"on the last sample of 200 the interval is {low:.1%} to {high:.1%}, the truth {accuracy:.1%}")
    lesson.proves(7, 0.91 <= holds / REPEATS <= 0.98, f"{holds:,} of {REPEATS:,} samples of 200")
    lesson.save(picture(images, labels, predictions, confidence))


if __name__ == "__main__":
    run(main, data="digits")
