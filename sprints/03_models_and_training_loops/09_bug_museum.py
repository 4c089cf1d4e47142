"""The bug museum: mistakes in training and in judging a model that raise no error, and what finds each.

Run:     uv run sprints/03_models_and_training_loops/09_bug_museum.py      (7 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
Shapes:  N samples, B samples in a batch, F features, H hidden numbers, C classes
Note:    notes/09_bug_museum.md
"""

from collections.abc import Callable

from lab.lesson import Lesson, run
from lab.museum import Outcome, Twin, Variant, show

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

Loss = Callable[[Tensor, Tensor], Tensor]
N, B, F, H, C = 100, 32, 10, 32, 3
RATE, EPOCHS, SEEDS, WORLDS, FEW = 0.2, 50, 5, 100, 40


class Network(nn.Module):
    """Two layers with dropout between them: (…, F) -> scores (…, C). `listed`: the first in a plain list."""

    def __init__(self, listed: bool = False) -> None:
        super().__init__()
        first = [nn.Linear(F, H)]
        self.hidden = first if listed else nn.ModuleList(first)
        self.dropout, self.scores = nn.Dropout(0.5), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.dropout(self.hidden[0](x).relu()))


def samples(seed: int) -> tuple[Tensor, Tensor]:
    """A cloud of points about a place of its own for each class, class after class: x (N, F), y (N,)."""
    draw, y = torch.Generator().manual_seed(seed), torch.arange(N, device="cpu") * C // N
    x = torch.randn(N, F, generator=draw, device="cpu") + 2 * one_hot(y, F)
    return x.to(torch.get_default_device()), y.to(torch.get_default_device())


def train(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss = cross_entropy, late: bool = False
) -> list[Tensor]:
    """Descent with a rate that falls along a cosine; losses and rates of all steps. `late`: per epoch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS * len(x.split(B)))
    losses, rates = [], []
    for _ in range(EPOCHS):
        for batch in torch.randperm(N).split(B):
            rates.append(schedule.get_last_lr()[0])
            now = loss(model(x[batch]), y[batch])
            optimiser.zero_grad()
            now.backward()
            optimiser.step()
            losses.append(now.detach())
            if not late:
                schedule.step()
        if late:
            schedule.step()
    return [torch.stack(losses), torch.tensor(rates)]


class Case(Twin):
    """What the exhibits have in common."""

    seed: int
    x: Tensor  # (N, F)
    y: Tensor  # (N,)

    def begin(self) -> None:
        torch.manual_seed(self.seed)


class SoftmaxTwice(Case):
    """Softmax before cross-entropy, which applies it too"""

    look = "mean loss of the last epoch"
    check = "its gradient with respect to the scores is p - y, over N"
    repair = "cross_entropy(scores, y)"

    def made(self, wrong: bool) -> Outcome:
        def loss(scores: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(scores.softmax(-1) if wrong else scores, y)

        scores = torch.randn(N, C, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(scores, self.y), scores)
        losses, _ = train(nn.Linear(F, C), self.x, self.y, loss)
        return [losses, gradient, scores]

    def seen(self, made: Outcome) -> str:
        return f"{made[0][-4:].mean():.2f}"

    def passes(self, variant: Variant) -> bool:
        _, gradient, scores = variant()
        return torch.allclose(gradient, (scores.softmax(-1) - one_hot(self.y, C)) / N, atol=1e-6)


class NotHandedOver(Case):
    """Weights that the optimiser never got: a layer in a plain list"""

    look = "mean loss of the last epoch"
    check = "training moves every weight"
    repair = "self.hidden = nn.ModuleList(first)"

    def made(self, wrong: bool) -> Outcome:
        model = Network(listed=wrong)
        weights = [model.hidden[0].weight, model.scores.weight]
        before = [weight.detach().clone() for weight in weights]
        losses, _ = train(model, self.x, self.y)
        return [losses, *(weight.detach() - old for weight, old in zip(weights, before, strict=True))]

    def seen(self, made: Outcome) -> str:
        return f"{made[0][-4:].mean():.2f}"

    def passes(self, variant: Variant) -> bool:
        return all(moved.any().item() for moved in variant()[1:])


class SteppedPerEpoch(Case):
    """A schedule of batches stepped once per epoch"""

    look = "first and last learning rate"
    check = "the last rate is below a hundredth of the first"
    repair = "schedule.step() inside the loop over batches"

    def made(self, wrong: bool) -> Outcome:
        return train(nn.Linear(F, C), self.x, self.y, late=wrong)

    def seen(self, made: Outcome) -> str:
        return f"{made[1][0]:.4f} {made[1][-1]:.4f}"

    def passes(self, variant: Variant) -> bool:
        _, rates = variant()
        return (rates[-1] < rates[0] / 100).item()


class GraphKept(Case):
    """A loss sum that keeps every graph"""

    look = "sum of an epoch's losses, and operations still on record behind it"
    check = "the sum needs no gradient"
    repair = "total = total + loss.detach()   or loss.item()"

    def made(self, wrong: bool) -> Outcome:
        model, total = Network(), torch.zeros(())
        for inputs, targets in zip(self.x.split(B), self.y.split(B), strict=True):
            loss = cross_entropy(model(inputs), targets)
            total = total + (loss if wrong else loss.detach())
        return total

    def seen(self, made: Outcome) -> str:
        found, unseen = set(), [made.grad_fn]
        while unseen:
            node = unseen.pop()
            if node and node not in found:
                found.add(node)
                unseen += [parent for parent, _ in node.next_functions]
        return f"{made.item():.2f} {len(found)}"

    def passes(self, variant: Variant) -> bool:
        return not variant().requires_grad


class MeanOfMeans(Case):
    """The mean of batch means, with a short last batch"""

    look = "loss of the data set"
    check = "batches of any size give the same loss"
    repair = "(means * sizes).sum() / N"
    size = B

    def made(self, wrong: bool) -> Outcome:
        model = Network().eval()
        parts = zip(self.x.split(self.size), self.y.split(self.size), strict=True)
        means, sizes = zip(*((cross_entropy(model(x), y).detach(), len(x)) for x, y in parts), strict=True)
        means, sizes = torch.stack(means), torch.tensor(sizes)
        return means.mean() if wrong else (means * sizes).sum() / N

    def seen(self, made: Outcome) -> str:
        return f"{made:.4f}"

    def passes(self, variant: Variant) -> bool:
        losses = []
        for self.size in (N, B):
            losses.append(variant())
        return torch.allclose(*losses, atol=1e-5)


class EvalForgotten(Case):
    """Eval mode forgotten"""

    look = "accuracy after training"
    check = "two evaluations give the same scores"
    repair = "model.eval()"

    def made(self, wrong: bool) -> Outcome:
        model = Network()
        train(model, self.x, self.y)
        model.train(wrong)
        return [model(self.x).detach(), model(self.x).detach()]

    def seen(self, made: Outcome) -> str:
        return f"{(made[0].argmax(-1) == self.y).float().mean():.0%}"

    def passes(self, variant: Variant) -> bool:
        return torch.equal(*variant())


class ChosenOnTest(Case):
    """Early stopping, and the seed that wins, by the test set"""

    look = "accuracy reported where every label is a coin toss"
    check = "other test labels leave the choice as it is"
    repair = "best = validation.argmax()   and then the test score there"
    flip = 0

    def made(self, wrong: bool) -> Outcome:
        x, toss = (
            torch.randn(3, WORLDS, FEW, F),
            torch.randint(2, (3, WORLDS, FEW)),
        )  # training, validation, test
        toss[2] ^= self.flip
        scores = []
        for _ in range(SEEDS):
            w = torch.randn(WORLDS, F, 1)
            for _ in range(EPOCHS):
                p = (x @ w).sigmoid().squeeze(-1)  # (3, WORLDS, FEW, 1) -> (3, WORLDS, FEW)
                w = w - RATE * x[0].mT @ (p - toss)[0, ..., None]  # logistic regression: (WORLDS, F, 1)
                scores.append(((p > 0.5) == toss).float().mean(-1))  # (3, WORLDS)
        _, validation, test = torch.stack(scores, dim=-1)  # 3 × (WORLDS, SEEDS·EPOCHS)
        best = (test if wrong else validation).argmax(-1, keepdim=True)  # (WORLDS, 1)
        return [test.gather(-1, best), best]

    def seen(self, made: Outcome) -> str:
        return f"{made[0].mean():.0%}"

    def passes(self, variant: Variant) -> bool:
        before, self.flip = variant()[1], 1 - self.flip
        return torch.equal(variant()[1], before)


def main(lesson: Lesson) -> None:
    torch.set_default_device(lesson.device)
    torch.set_num_threads(1)
    Case.seed = lesson.seed
    Case.x, Case.y = samples(lesson.seed)
    cases = [
        SoftmaxTwice,
        NotHandedOver,
        SteppedPerEpoch,
        GraphKept,
        MeanOfMeans,
        EvalForgotten,
        ChosenOnTest,
    ]
    show(lesson, cases)


if __name__ == "__main__":
    run(main)
