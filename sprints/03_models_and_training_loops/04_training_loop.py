"""The training loop: shuffled batches, a validation after every epoch, and one look at the test set.

Run:     uv run sprints/03_models_and_training_loops/04_training_loop.py
         (20 s on two cores; 9 s with --steps 2)
Proves:  1. before the first step the loss is within 3% of ln 10
         2. the loop takes the steps of one without loader, module and optimiser, weight for weight
         3. the same seed gives the same losses and weights twice, bit for bit; another seed gives others
         4. evaluation gives the same in batches of any size, and leaves weights and random state alone
         5. an epoch shows each training image once, in a new order; validation images are never among them
         6. no test image is read before the last step, and each is read once after it
         7. the network reads at least 97% of MNIST's test digits right, 94% of rendered ones
Shapes:  N samples, B samples in a batch, D pixels, H hidden neurons, V digits
Writes:  results/03_models_and_training_loops/04_training_loop.png
         results/03_models_and_training_loops/04_training_loop.json
Note:    notes/04_training_loop.md
"""

import math
from collections.abc import Iterable

from lab import digits
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, Dataset, Subset, random_split

D, H, V = 28 * 28, 256, 10
B, RATE, DROPOUT, EPOCHS = 128, 2e-3, 0.2, 8


class Digits(Dataset):
    """Images (N, 1, 28, 28) and labels (N,); keeps a list of which samples were read, in order."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.seen = images, labels, []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        return self.images[index], self.labels[index]


def network() -> nn.Sequential:
    """Images (B, 1, 28, 28) -> logits (B, V)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(D, H), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(H, V))


def plain_loop(weights: list[Tensor], batches: Iterable[tuple[Tensor, Tensor]], rate: float) -> list[Tensor]:
    """One step of gradient descent for each batch, with nothing but tensors: the weights at the end."""
    for x, y in batches:
        weights = w1, b1, w2, b2 = [w.detach().requires_grad_() for w in weights]
        hidden = (x.flatten(1) @ w1.T + b1).clamp(min=0)  # (B, D) @ (D, H) -> (B, H)
        logits = F.dropout(hidden, DROPOUT) @ w2.T + b2  # (B, H) @ (H, V) -> (B, V)
        loss = (logits.logsumexp(1) - logits[range(len(y)), y]).mean()  # −ln of the label's probability
        gradients = torch.autograd.grad(loss, weights)
        weights = [w - rate * g for w, g in zip(weights, gradients, strict=True)]
    return weights


def train(model: nn.Module, batches: Iterable, optimizer: Optimizer, device: torch.device) -> float:
    """One epoch, one step for each batch. Returns the mean loss, every image as it was when shown."""
    model.train()  # dropout on: the evaluation before this switched it off
    total, count = 0.0, 0
    for x, y in batches:
        x, y = x.to(device), y.to(device)  # (B, 1, 28, 28) and (B,)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y)  # a number: the tensor would keep the graph of its batch alive
        count += len(y)
    return total / count


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, device: torch.device, size: int = 1_000) -> tuple[float, float]:
    """Mean loss and accuracy over all of the data; nothing is learned."""
    model.eval()  # dropout off
    total, right = 0.0, 0
    for x, y in DataLoader(data, size, generator=Generator()):  # without its own, a loader uses torch's
        logits, y = model(x.to(device)), y.to(device)  # (B, V) and (B,)
        total += F.cross_entropy(logits, y, reduction="sum").item()  # sums: the last batch may be short
        right += (logits.argmax(1) == y).sum().item()
    return total / len(data), right / len(data)


def fit(
    lesson: Lesson, training: Dataset, validation: Dataset, seed: int, epochs: int
) -> tuple[nn.Module, list[dict]]:
    """A network trained on one dataset and judged on the other after every epoch, and its history."""
    torch.manual_seed(seed)  # for weights and dropout
    model, history = network().to(lesson.device), []
    optimizer = Adam(model.parameters(), lr=RATE)
    loader = DataLoader(training, B, shuffle=True, generator=Generator().manual_seed(seed))
    for epoch in range(1, epochs + 1):
        loss = train(model, lesson.progress(loader, f"epoch {epoch}"), optimizer, lesson.device)
        validation_loss, accuracy = evaluate(model, validation, lesson.device)
        history.append({"training": loss, "validation": validation_loss, "accuracy": accuracy})
    return model, history


def curves(history: list[dict], untrained: tuple[float, float], test: tuple[float, float]) -> plt.Figure:
    """Losses and wrong answers, epoch by epoch."""
    training, validation, accuracy = ([row[key] for row in history] for key in history[0])
    epochs = range(len(history) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    figure.suptitle("The training loss ends below the loss on images held out", size="medium")
    left.plot(epochs[1:], training, label="training")
    left.plot(epochs, [untrained[0], *validation], label="validation")
    left.plot(epochs[-1], test[0], "k*", label="test, once")
    left.axhline(math.log(V), color="gray", linestyle=":")
    left.set(xlabel="epoch", ylabel="loss (dotted: ln 10)", yscale="log")
    right.plot(epochs, [100 - 100 * share for share in (untrained[1], *accuracy)], "C1", label="validation")
    right.plot(epochs[-1], 100 - 100 * test[1], "k*", label="test, once")
    right.set(xlabel="epoch", ylabel="wrong answers (%)", yscale="log")
    for panel in (left, right):
        panel.legend(loc="lower left", fontsize="small")
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a network, threads wait for each other longer than they compute
    root, cpu = digits.find(lesson.data), torch.device("cpu")  # the loop moves one batch at a time
    whole = Digits(*digits.tensors(root, train=True, device=cpu))
    split = Generator().manual_seed(lesson.seed)
    training, validation = random_split(whole, [11 / 12, 1 / 12], generator=split)
    some, few = Subset(whole, training.indices[:3_000]), Subset(whole, validation.indices[:777])
    print(f"from the training set: {len(training):,} to train on, {len(validation):,} to validate on")

    lesson.heading("Before the first step")
    torch.manual_seed(lesson.seed)
    untrained = loss, accuracy = evaluate(network().to(lesson.device), validation, lesson.device)
    print(f"loss {loss:.3f}, ln 10 {math.log(V):.3f}   accuracy {accuracy:.1%}, chance {1 / V:.0%}")
    lesson.proves(1, abs(loss / math.log(V) - 1) < 0.03, f"{loss / math.log(V) - 1:+.1%}")

    lesson.heading("The loop with its tools, and without")
    place = lesson.float64_device
    precise = [(x.double(), y) for x, y in some]
    loaders = [DataLoader(precise, B, shuffle=True, generator=Generator().manual_seed(1)) for _ in range(2)]
    model = network().to(place, torch.float64)
    start = [w.clone() for w in model.parameters()]
    evaluate(model, precise, place)
    torch.manual_seed(lesson.seed)  # for dropout
    train(model, loaders[0], SGD(model.parameters(), lr=0.1), place)
    torch.manual_seed(lesson.seed)
    by_hand = plain_loop(start, [(x.to(place), y.to(place)) for x, y in loaders[1]], rate=0.1)
    moved = max((end - begin).abs().max().item() for end, begin in zip(by_hand, start, strict=True))
    print(f"{len(loaders[0])} steps; the weight that went furthest moved by {moved:.3f}")
    lesson.proves_equal(2, list(model.parameters()), by_hand)

    lesson.heading("The same training again")
    runs = []
    for name, seed in (("another seed", lesson.seed + 1), ("a seed", lesson.seed), ("the same", lesson.seed)):
        model, history = fit(lesson, some, few, seed, epochs=2)
        runs.append((history, nn.utils.parameters_to_vector(model.parameters())))
        print(f"{name:12}   training losses {history[0]['training']!r}, {history[1]['training']!r}")
    (other, w_other), (one, w_one), (same, w_same) = runs
    lesson.proves(3, one == same and w_one.equal(w_same) and one != other and not w_one.equal(w_other))

    lesson.heading("Evaluation")
    before = [torch.get_rng_state(), *[w.clone() for w in model.parameters()]]
    found = [evaluate(model, few, lesson.device, size) for size in (1, 64, 777)]
    after = [torch.get_rng_state(), *model.parameters()]
    for size, pair in zip((1, 64, 777), found, strict=True):
        print("777 images in batches of {:3}   loss {:.6f}   accuracy {:.3%}".format(size, *pair))
    x, y = (part[few.indices].to(lesson.device) for part in (whole.images, whole.labels))
    logits = model.eval()(x)  # (N, V)
    at_once = F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).sum().item() / len(y)
    lesson.proves_equal(4, found, [at_once] * 3, tolerance=1e-5)
    lesson.proves_equal(4, after, before, tolerance=0)

    lesson.heading(f"Training for {lesson.steps} epochs")
    test = Digits(*digits.tensors(root, train=False, device=cpu))
    whole.seen.clear()
    model, history = fit(lesson, training, validation, lesson.seed, lesson.steps)
    for epoch, row in enumerate(history, start=1):
        line = "training loss {training:.3f}   validation loss {validation:.3f}, accuracy {accuracy:.1%}"
        print(f"epoch {epoch}  ", line.format(**row))
    shown, held = torch.tensor(whole.seen).view(lesson.steps, -1).split([len(training), len(validation)], 1)
    once = all(len(epoch.unique()) == len(training) for epoch in shown)
    reordered = len(shown.unique(dim=0)) == lesson.steps
    lesson.proves(5, once and reordered and not torch.isin(held, shown).any().item())

    lesson.heading("The test set, once")
    early = len(test.seen)
    loss, accuracy = evaluate(model, test, lesson.device)
    lesson.proves(6, early == 0 and sorted(test.seen) == list(range(len(test))), f"{len(test):,} readings")
    frequent = test.labels.bincount().max().item() / len(test)
    print(f"test loss {loss:.3f}, accuracy {accuracy:.1%}; always the most frequent digit {frequent:.1%}")
    lesson.proves(7, accuracy >= (0.97 if digits.is_mnist(root) else 0.94), f"{accuracy:.2%}", full_run=True)
    lesson.measured(hidden=H, batch=B, rate=RATE, dropout=DROPOUT, history=history)
    lesson.measured(test_loss=loss, test_accuracy=accuracy)
    lesson.save(curves(history, untrained, (loss, accuracy)))


if __name__ == "__main__":
    run(main, data="digits", steps=EPOCHS)
