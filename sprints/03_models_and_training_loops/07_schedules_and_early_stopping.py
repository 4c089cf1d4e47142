"""Schedules and early stopping: a learning rate that changes on the way, and a training that knows its end.

Run:     uv run sprints/03_models_and_training_loops/07_schedules_and_early_stopping.py
         (20 s on two cores; 9 s with --steps 2)
Proves:  1. warm-up, cosine and one-cycle by hand give the rate of torch's schedulers at every step
         2. one-cycle moves momentum and Adam's first beta against the rate, as OneCycleLR does
         3. early stopping ends, and keeps, the epochs that a search through the whole curve names
         4. a stopped network is PATIENCE epochs past its best and holds that epoch's weights bit for bit
         5. no image is in two of the training, validation and test sets
         6. at a good rate cosine decay lowers the test loss; at ten times that rate, with warm-up before it,
            it beats a constant rate by 5 points of accuracy or more
         7. with a fifth of the labels wrong, the stopped network beats its twin on each of five samples
Shapes:  N images; a schedule maps step t of T to a share of the peak rate; --steps counts epochs
Writes:  results/03_models_and_training_loops/07_schedules_and_early_stopping.png
         results/03_models_and_training_loops/07_schedules_and_early_stopping.json
Note:    notes/07_schedules_and_early_stopping.md
"""

import itertools
import math
from collections.abc import Callable

from lab import digits
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

SAMPLES, TRAINING, VALIDATION, BATCH = 5, 500, 200, 25  # 20 batches an epoch
GOOD, TOO_HIGH, PATIENCE = 0.005, 0.05, 5


def warm_up(t: float, steps: float, start: float = 0.1) -> float:
    """From `start` to 1 in a straight line."""
    return start + (1 - start) * t / steps


def cosine(t: float, steps: float, start: float = 1.0, end: float = 0.0) -> float:
    """From `start` to `end` along half a wave: slow, fast, slow."""
    return end + (start - end) * (1 + math.cos(math.pi * t / steps)) / 2


def warm_up_then_cosine(t: int, steps: int) -> float:
    """A tenth of the steps up, the others down."""
    warm = steps // 10
    return warm_up(t, warm) if t < warm else cosine(t - warm, steps - warm)


def one_cycle(t: int, steps: int, start: float, middle: float, end: float) -> float:
    """Two half waves: `start` to `middle` in three tenths of the steps, then to `end` at the last one."""
    turn = 0.3 * steps - 1
    return cosine(t, turn, start, middle) if t <= turn else cosine(t - turn, steps - 1 - turn, middle, end)


SCHEDULES = {  # step t of T -> share of the peak rate, momentum
    "constant": lambda t, T: (1.0, 0.9),
    "cosine": lambda t, T: (cosine(t, T), 0.9),
    "warm-up, cosine": lambda t, T: (warm_up_then_cosine(t, T), 0.9),
    "one-cycle": lambda t, T: (one_cycle(t, T, 1 / 25, 1.0, 1 / 250_000), one_cycle(t, T, 0.95, 0.85, 0.95)),
}
TORCH = {  # PyTorch's own: an optimiser and T -> scheduler
    "cosine": lambda adam, T: CosineAnnealingLR(adam, T),
    "warm-up, cosine": lambda adam, T: SequentialLR(
        adam, [LinearLR(adam, 0.1, total_iters=T // 10), CosineAnnealingLR(adam, T - T // 10)], [T // 10]
    ),
    "one-cycle": lambda adam, T: OneCycleLR(adam, max_lr=1.0, total_steps=T),
}


def used_by_torch(make: Callable, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    """The rate and the momentum that an optimiser under a scheduler finds at each step: (T, 2)."""
    scheduler, (group,), found = make(optimizer, steps), optimizer.param_groups, []
    for _ in range(steps):
        found.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
        optimizer.step()
        scheduler.step()  # once, after the optimiser's step
    return torch.tensor(found, dtype=torch.float64)


class EarlyStopping:
    """Keeps a copy of the weights of the best epoch, and says when that is `patience` epochs ago."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.model, self.patience = model, patience
        self.epoch = self.best_epoch = 0
        self.lowest, self.best_weights = math.inf, {}

    def stop(self, loss: float) -> bool:
        """To be asked after every epoch, with its loss on the validation set."""
        self.epoch += 1
        if loss < self.lowest:
            self.lowest, self.best_epoch = loss, self.epoch
            self.best_weights = {name: w.clone() for name, w in self.model.state_dict().items()}
        return self.epoch - self.best_epoch >= self.patience


def search(curve: list[float], patience: int) -> tuple[int, int]:
    """The epoch to stop after and the best one by then, from the whole curve. Epochs count from 1."""
    for end in range(1, len(curve) + 1):
        best = curve.index(min(curve[:end])) + 1
        if end - best == patience:
            break
    return end, best


def train(training: tuple, validation: tuple, depth: int, seed: int, schedule: str, peak: float, epochs: int,
          patience: int) -> tuple[nn.Module, list, list]:  # fmt: skip
    """Adam under a schedule, to the last epoch or until early stopping, which restores the best weights.

    Returns the network, its training and validation loss after each epoch, and its weights after each epoch.
    """
    (x, y), draw, losses, weights = training, torch.Generator().manual_seed(seed), [], []
    torch.manual_seed(seed)
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), *hidden, nn.Linear(64, 10)).to(
        x.device
    )
    optimizer, stopping = torch.optim.Adam(model.parameters(), fused=True), EarlyStopping(model, patience)
    (group,), steps = optimizer.param_groups, epochs * TRAINING // BATCH
    for epoch in range(epochs):
        for t, batch in enumerate(
            torch.randperm(TRAINING, generator=draw).split(BATCH), epoch * steps // epochs
        ):
            share, momentum = SCHEDULES[schedule](t, steps)
            group["lr"], group["betas"] = peak * share, (momentum, 0.999)
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        losses.append([measure(model, *part)[0] for part in (training, validation)])
        weights.append([p.detach().clone() for p in model.parameters()])
        if stopping.stop(losses[-1][1]):
            model.load_state_dict(stopping.best_weights)
            break
    return model, losses, weights


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = model(images)  # (N, 10)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=-1) == labels).float().mean().item()


def spoil(labels: Tensor, draw: torch.Generator) -> Tensor:
    """The first fifth of the labels replaced by wrong ones."""
    shift = torch.randint(1, 10, labels.shape, generator=draw)
    shift[len(labels) // 5 :] = 0
    return (labels + shift.to(labels.device)) % 10


def picture(results: dict, losses: Tensor, best: int) -> plt.Figure:
    """The schedules, what they come to, and one training with a fifth of the labels wrong."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(6, 3.4), layout="constrained")
    figure.suptitle("A schedule forgives a high rate; early stopping keeps the best epoch", fontsize="medium")
    for i, (name, schedule) in enumerate(SCHEDULES.items()):
        left.plot([schedule(t, 300)[0] for t in range(300)], label=name)
        for x, peak in enumerate((GOOD, TOO_HIGH)):
            middle.plot(
                [x + 0.15 * i - 0.22] * SAMPLES, results[peak, name][:, 1], "o", color=f"C{i}", markersize=4
            )
    left.set(xlabel="step", ylabel="share of the peak rate")
    middle.set(xlabel="peak rate", ylabel="test accuracy", xlim=(-0.5, 1.5), ylim=(0, 1))
    middle.set_xticks((0, 1), (GOOD, TOO_HIGH))
    right.plot(range(1, len(losses) + 1), losses[:, 0], "C5")
    right.plot(range(1, len(losses) + 1), losses[:, 1], "C6")
    right.axvline(best, color="gray", linestyle=":")
    right.text(len(losses), losses[-1, 1], "validation", ha="right", va="bottom", fontsize="small")
    right.text(len(losses), losses[-1, 0], "training", ha="right", va="bottom", fontsize="small")
    right.set(xlabel="epoch", ylabel="loss, wrong labels", ylim=(0, 1.1 * losses.max()))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a network, threads wait for each other longer than they compute
    draw, root = torch.Generator().manual_seed(lesson.seed), digits.find(lesson.data)

    lesson.heading("Schedules by hand")
    ours, theirs = [], []
    for steps, name in itertools.product((10, 57, 300), TORCH):
        parameter = [nn.Parameter(torch.zeros(1))]
        for optimizer in (
            torch.optim.SGD(parameter, lr=1.0, momentum=0.9),
            torch.optim.Adam(parameter, lr=1.0),
        ):
            theirs.append(used_by_torch(TORCH[name], optimizer, steps))
            ours.append(torch.tensor([SCHEDULES[name](t, steps) for t in range(steps)], dtype=torch.float64))
    shown = (0, 15, 29, 89, 150, 299)
    print("step of 300      ", *(f"{t:7}" for t in shown))
    for name, schedule in SCHEDULES.items():
        print(f"{name:17}", *(f"{schedule(t, 300)[0]:7.4f}" for t in shown))
    for claim in (1, 2):  # rate and momentum
        lesson.proves_equal(
            claim, [each[:, claim - 1] for each in ours], [each[:, claim - 1] for each in theirs]
        )

    lesson.heading("When to stop")
    ours, slow = [], []
    for number in range(300):
        curve = torch.randint(20, (30,), generator=draw).tolist()  # with ties
        model, patience = nn.Linear(1, 1), number % 6 + 1
        stopping = EarlyStopping(model, patience)
        for epoch, loss in enumerate(curve, start=1):
            nn.init.constant_(model.bias, epoch)  # so that the weights tell their epoch
            if stopping.stop(loss):
                break
        ours.append((epoch, int(stopping.best_weights["bias"])))
        slow.append(search(curve, patience))
    lesson.proves_equal(3, ours, slow)

    lesson.heading(f"{SAMPLES} times: train on {TRAINING} images, validate on {VALIDATION} others")
    all_images, all_labels = digits.tensors(root, train=True, device=lesson.device)
    trained, splits, held = {}, [], []
    for sample in lesson.progress(range(SAMPLES), "samples"):
        seed = SAMPLES * lesson.seed + sample
        chosen = torch.randperm(len(all_images), generator=draw)[: TRAINING + VALIDATION].to(lesson.device)
        parts = chosen.split([TRAINING, VALIDATION])  # both out of the training set
        right = [(all_images[part], all_labels[part]) for part in parts]
        wrong = [(images, spoil(labels, draw)) for images, labels in right]
        splits.append([images for images, _ in right])
        for peak, name in itertools.product((GOOD, TOO_HIGH), SCHEDULES):
            trained[peak, name, sample] = train(*right, 3, seed, name, peak, lesson.steps, lesson.steps)
        for labels, data in (("right", right), ("wrong", wrong)):
            for how, epochs, patience in (
                ("to the end", 2 * lesson.steps, math.inf),
                ("stopped", 100, PATIENCE),
            ):
                trained[labels, how, sample] = train(*data, 1, seed, "constant", 0.002, epochs, patience)
            model, losses, weights = trained[labels, "stopped", sample]
            best = min(range(len(losses)), key=lambda epoch: losses[epoch][1])
            same = map(torch.equal, model.parameters(), weights[best])
            held.append(len(losses) == best + 1 + PATIENCE and all(same))
    lesson.proves(4, all(held), f"{len(held)} networks")

    lesson.heading("The test set, once")
    test = digits.tensors(root, train=False, device=lesson.device)
    seen = [
        [{image.numpy().tobytes() for image in part.cpu()} for part in (*split, test[0])] for split in splits
    ]
    lesson.proves(5, all(a.isdisjoint(b) for sets in seen for a, b in itertools.combinations(sets, 2)))
    results = {  # (samples, 2): test loss and accuracy
        key: torch.tensor([measure(trained[*key, sample][0], *test) for sample in range(SAMPLES)])
        for key in dict.fromkeys(key[:2] for key in trained)
    }

    def told(key: tuple) -> str:
        loss, accuracy = results[key].T
        return f"{accuracy.mean():6.1%} ± {accuracy.std():5.1%}   loss {loss.mean():.2f}"

    print(f"accuracy (chance 10%)   rate {GOOD}                    rate {TOO_HIGH}")
    for name in SCHEDULES:
        print(f"{name:20} {told((GOOD, name))}    {told((TOO_HIGH, name))}")
    lower = results[GOOD, "constant"].mean(dim=0)[0] - results[GOOD, "cosine"].mean(dim=0)[0]
    higher = (
        results[TOO_HIGH, "warm-up, cosine"].mean(dim=0)[1] - results[TOO_HIGH, "constant"].mean(dim=0)[1]
    )
    held = bool(lower > 0 and higher > 0.05)
    lesson.proves(6, held, f"loss lower by {lower:.2f}, accuracy higher by {higher:.1%}", full_run=True)
    for labels, how in itertools.product(("right", "wrong"), ("to the end", "stopped")):
        epochs = sum(len(trained[labels, how, sample][1]) for sample in range(SAMPLES)) / SAMPLES
        print(f"{labels} labels, {how:10}   {told((labels, how))}   {epochs:4.1f} epochs")
    gain = (results["wrong", "stopped"] - results["wrong", "to the end"])[:, 1]
    lesson.proves(7, bool(gain.min() > 0), f"by {gain.min():.1%} to {gain.max():.1%}", full_run=True)
    means = {" ".join(map(str, key)): round(value[:, 1].mean().item(), 4) for key, value in results.items()}
    lesson.measured(accuracy=means)
    losses = torch.tensor(trained["wrong", "to the end", 0][1])  # (epochs, 2)
    lesson.save(picture(results, losses, len(trained["wrong", "stopped", 0][1]) - PATIENCE))


if __name__ == "__main__":
    run(main, data="digits", steps=15)
