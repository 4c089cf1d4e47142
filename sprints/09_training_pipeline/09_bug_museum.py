"""The bug museum: mistakes in a training loop that train all the same, and what finds each of them.

Run:     uv run sprints/09_training_pipeline/09_bug_museum.py      (6 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
         4. AdamW hides gradients four times too large: its losses stay within 1 % of the right ones, while
            those of plain gradient descent do not
Shapes:  B windows of T tokens, V different ones, C width; N numbers in all weights
Writes:  results/09_training_pipeline/09_bug_museum.png
Note:    notes/09_bug_museum.md
"""

import copy
import math
from collections.abc import Callable

from lab import stories
from lab.gpt import GPT, initialise
from lab.lesson import Lesson, run
from lab.museum import Outcome, Twin, Variant, show
from lab.stream import Stream
from lab.tokenizer import Tokenizer
from lab.training import learning_rate

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, V, C, H, L = 8, 16, 300, 32, 2, 1
PARTS, STEPS, RATE = 4, 60, 3e-3
SMALL = 100  # tokens of a text that is read to its end, in windows of 8


def mean_loss(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of all targets that are not -100: (B, T) both -> a single number."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())  # (B·T, V), (B·T,)


def gradients(model: GPT) -> Tensor:
    """All of them, one behind the other: (N,)."""
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


class Case(Twin):
    """What the exhibits have in common."""

    fresh: GPT  # in float64, with its first weights
    stream: Stream

    def begin(self) -> None:
        self.model = copy.deepcopy(self.fresh)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(B, T), (B, T)."""
        device = self.model.tokens.weight.device
        inputs, targets = self.stream.batch(step * B, B)
        return inputs.to(device), targets.to(device)

    def train(self, steps: int, kind: Callable, backward: Callable[[Tensor, Tensor], None]) -> Tensor:
        """The loss of each batch before its step: (steps,)."""
        optimizer, losses = kind(self.model.parameters()), []
        for step in range(steps):
            inputs, targets = self.batch(step)
            with torch.no_grad():
                losses.append(mean_loss(self.model, inputs, targets))
            backward(inputs, targets)
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses)


def adamw(weights) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=RATE)


class Parts(Case):
    """What the exhibits have in common that work on a batch in parts."""

    look = f"loss after {STEPS} steps with AdamW:"
    check = "the gradient is that of the whole batch"
    backward: Callable[..., None]  # gradients of a batch, part by part: inputs and targets (B, T), wrong
    optimizer = staticmethod(adamw)

    def made(self, wrong: bool) -> Outcome:
        """The gradient of the first batch, and the losses: (N,), (STEPS,)."""
        self.backward(*self.batch(0), wrong)
        gradient = gradients(self.model)
        self.model.zero_grad()
        return [gradient, self.train(STEPS, self.optimizer, lambda x, y: self.backward(x, y, wrong))]

    def seen(self, made: Outcome) -> str:
        return f"{made[1][-10:].mean():.3f}"

    def passes(self, variant: Variant) -> bool:
        gradient, whole = variant()[0], copy.deepcopy(self.fresh)
        mean_loss(whole, *self.batch(0)).backward()
        return torch.allclose(gradient, gradients(whole), rtol=1e-9, atol=1e-12)


class PartsAdded(Parts):
    """Parts of a batch whose means are added up"""

    repair = "(loss / PARTS).backward()"

    def backward(self, inputs: Tensor, targets: Tensor, wrong: bool) -> None:
        for part in zip(inputs.chunk(PARTS), targets.chunk(PARTS), strict=True):
            loss = mean_loss(self.model, *part)
            (loss if wrong else loss / PARTS).backward()


class PartsAlike(Parts):
    """Parts with different numbers of targets, which count the same"""

    repair = "loss of a part, summed, by the targets of the whole batch"

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Texts of 2, 4, … 16 tokens: behind their ends are no targets."""
        inputs, targets = super().batch(step)
        there = torch.arange(T, device=inputs.device) < 2 + 2 * torch.arange(B, device=inputs.device)[:, None]
        return inputs, targets.where(there, -100)

    def backward(self, inputs: Tensor, targets: Tensor, wrong: bool) -> None:
        every = (targets >= 0).sum().item()
        for part in zip(inputs.chunk(PARTS), targets.chunk(PARTS), strict=True):
            share = 1 / PARTS if wrong else (part[1] >= 0).sum().item() / every
            (share * mean_loss(self.model, *part)).backward()


class TensorByTensor(Case):
    """Gradients cut to length 1 tensor by tensor"""

    look = "length, and cosine with the gradient before:"
    check = "all together no longer than 1, in the direction they had"
    repair = "clip_grad_norm_(model.parameters(), 1.0)   once, for all"

    def made(self, wrong: bool) -> Tensor:
        """The gradient of the first batch, cut: (N,)."""
        (100 * mean_loss(self.model, *self.batch(0))).backward()  # a spike
        self.before = gradients(self.model)
        for weights in (
            [[weight] for weight in self.model.parameters()] if wrong else [self.model.parameters()]
        ):
            nn.utils.clip_grad_norm_(weights, 1.0)
        return gradients(self.model)

    def judged(self, made: Tensor) -> tuple[float, float]:
        return made.norm().item(), F.cosine_similarity(made, self.before, dim=0).item()

    def seen(self, made: Tensor) -> str:
        return "{:.2f} {:.2f}".format(*self.judged(made))

    def passes(self, variant: Variant) -> bool:
        length, cosine = self.judged(variant())
        return length < 1 + 1e-6 and cosine > 1 - 1e-9


class NothingAtFirst(Case):
    """A warm-up that begins at 0"""

    look = "rates of the first steps:"
    check = "the first step changes the weights"
    repair = "rate * (step + 1) / rise"

    def made(self, wrong: bool) -> Outcome:
        """The rates, and how far the first step moves: (STEPS,), ()."""
        steps = torch.arange(STEPS)
        rates = [learning_rate(step, STEPS, RATE, 0.1) for step in steps.tolist()]
        if wrong:
            rises = round(0.1 * STEPS)
            rates = [RATE * step / rises if step < rises else rate for step, rate in enumerate(rates)]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rates[0])
        mean_loss(self.model, *self.batch(0)).backward()
        optimizer.step()
        pairs = zip(self.model.parameters(), self.fresh.parameters(), strict=True)
        moved = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        return [torch.tensor(rates), torch.tensor(moved)]

    def seen(self, made: Outcome) -> str:
        return " ".join(f"{rate:.4f}" for rate in made[0][:4])

    def passes(self, variant: Variant) -> bool:
        return variant()[1].item() > 0


class DataAnew(Case):
    """Resumed, with the data from their beginning"""

    look = "tokens that a round leaves out:"
    check = "a round uses each token once"
    repair = "first = step * B   the step, not the count since the start"

    def made(self, wrong: bool) -> Tensor:
        """The targets of a round that was stopped half way: (windows, 8)."""
        stream, half = Stream(np.arange(SMALL - SMALL % 8), 8, seed=0), SMALL // 8 // 2
        before, after = stream.batch(0, half)[1], stream.batch(0 if wrong else half, half)[1]
        return torch.cat([before, after])

    def seen(self, made: Tensor) -> str:
        return f"{SMALL - SMALL % 8 - len(made.unique())} of {SMALL - SMALL % 8}"

    def passes(self, variant: Variant) -> bool:
        return variant().unique().numel() == SMALL - SMALL % 8


class RanksAlike(Case):
    """Two processes that read the same half of a batch"""

    look = "tokens a step, and different ones:"
    check = "what the processes read together is the batch"
    repair = "inputs[rank::processes]"

    def made(self, wrong: bool) -> Tensor:
        """What each of the two reads: (2, B / 2, T)."""
        inputs, _ = self.stream.batch(0, B)
        return torch.stack([inputs[0::2], inputs[0::2] if wrong else inputs[1::2]])

    def seen(self, made: Tensor) -> str:
        return f"{made.numel()} {made.flatten(0, 1).unique(dim=0).numel()}"  # (2, B/2, T) -> (B, T)

    def passes(self, variant: Variant) -> bool:
        read, batch = variant().flatten(0, 1).tolist(), self.stream.batch(0, B)[0].tolist()  # (B, T) both
        return sorted(read) == sorted(batch)


class BestByReference(Case):
    """The best weights so far, kept without a copy"""

    look = "loss noted for the best, and loss of what was kept:"
    check = "what was kept has the loss that was noted"
    repair = "best = copy.deepcopy(model.state_dict())"

    def made(self, wrong: bool) -> Tensor:
        """The loss noted for the weights that were kept, and theirs: (2,)."""
        held_out, optimizer = self.batch(1_000), torch.optim.AdamW(self.model.parameters(), lr=0.03)
        noted, kept = math.inf, {}
        for _ in range(STEPS):  # one batch again and again: after a while the held-out loss rises
            mean_loss(self.model, *self.batch(0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                loss = mean_loss(self.model, *held_out).item()
            if loss < noted:
                state = self.model.state_dict()
                noted, kept = loss, state if wrong else copy.deepcopy(state)
        again = copy.deepcopy(self.model)
        again.load_state_dict(kept)
        with torch.no_grad():
            return torch.tensor([noted, mean_loss(again, *held_out).item()])

    def seen(self, made: Tensor) -> str:
        return "{:.3f} {:.3f}".format(*made.tolist())

    def passes(self, variant: Variant) -> bool:
        noted, found = variant().tolist()
        return math.isclose(noted, found, rel_tol=1e-6)


class PlainDescent(PartsAdded):
    """The first exhibit, with another optimiser."""

    optimizer = staticmethod(lambda weights: torch.optim.SGD(weights, lr=0.1))


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    told = [story.text for story in stories.write(lesson.seed, 50_000)]
    tokenizer = Tokenizer.learn(told, V)
    Case.stream = Stream(np.array([i for text in told for i in tokenizer.encode(text)]), T, lesson.seed)
    torch.manual_seed(lesson.seed)
    Case.fresh = GPT(tokenizer.V, T, C, H, L).to(lesson.float64_device).double()
    initialise(Case.fresh, std=0.1)
    several = [PartsAdded, PartsAlike, TensorByTensor, NothingAtFirst]
    show(lesson, [*several, DataAnew, RanksAlike, BestByReference])

    curves, apart = {}, {}
    for name, kind in {"AdamW": PartsAdded, "plain gradient descent": PlainDescent}.items():
        wrong, right = (made()[1].cpu() for made in (kind().wrong, kind().right))
        curves[name] = wrong / right - 1
        apart[name] = curves[name].abs().max().item()
    held = apart["AdamW"] < 0.01 < 0.03 < apart["plain gradient descent"]
    lesson.proves(4, held, "{:.2%} and {:.0%} apart at most".format(*apart.values()))

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(range(1, STEPS + 1), 100 * curve, label=name)
    axes.set(xlabel="optimiser step", ylabel="% above the right loss")
    axes.set(title="AdamW hides gradients four times too large")
    axes.legend()
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
