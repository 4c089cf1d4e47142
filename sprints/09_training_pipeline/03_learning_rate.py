"""The learning rate: how long a step may be, how that changes on the way, and what a batch has to do with it.

Run:     uv run sprints/09_training_pipeline/03_learning_rate.py      (14 s on two cores)
Proves:  1. warm-up, cosine and range test by hand give the rates of the lab and of PyTorch's schedulers
         2. clipping by hand equals clip_grad_norm_: all gradients as one arrow, shortened and not turned
         3. one gradient 1,000 times too long costs a training over 0.5 nats, and with clipping under 0.05
         4. a batch's gradient lies off that of all windows by a distance that falls as 1/√B
         5. the best step along it gains over twice as much with 4 windows as with 1, and with 64 windows
            over half of what it gains with all
         6. a tenth of the rate at which one range test turns trains within 15 % of the best of a sweep
         7. at rates of 0.03 to 0.07 a warm-up saves over 0.1 nats on average; on noisy batches a cosine ends
            lower than a constant rate, each at the better of two
Shapes:  N windows of T tokens, of which a batch has B; P parameters of the model in one row
Writes:  results/09_training_pipeline/03_learning_rate.png
Note:    notes/03_learning_rate.md
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

from lab import stories
from lab.gpt import GPT, initialise
from lab.lesson import Lesson, run
from lab.stream import Stream
from lab.tokenizer import END, Tokenizer
from lab.training import Settings, adamw, learning_rate

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, LRScheduler, SequentialLR

V, T, C, H, L, B = 512, 32, 32, 2, 1, 16
N, SIZES, LENGTHS = 128, (1, 4, 16, 64), [2.0**-k for k in range(1, 7)]  # windows, batches, rates of a step
STEPS, SPIKE, LOW, HIGH, SWEEP = 100, 50, 1e-4, 3.0, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
HIGH_RATES = (0.03, 0.05, 0.07)
FEW, LONG, CHOICE = 2, 500, (5e-3, 1e-2)  # noisy batches, more steps, and rates to choose from


def by_hand(steps: int, rate: float, warmup: float) -> list[float]:
    """Up a straight line; then the shadow of a point that goes half round a circle at an even pace."""
    rise = max(1, round(warmup * steps))
    rates, x, y, turn = [rate * (step + 1) / rise for step in range(rise)], 1.0, 0.0, math.pi / (steps - rise)
    while len(rates) < steps:
        rates.append(rate * (1 + x) / 2)
        x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    return rates


def constant(steps: int, rate: float, warmup: float = 0.1) -> list[float]:
    """Up the same line, and then no change."""
    return [rate * min(1.0, (step + 1) / max(1, warmup * steps)) for step in range(steps)]


def range_test(steps: int) -> list[float]:
    """From LOW to HIGH, each rate the same multiple of the one before."""
    return [LOW * (HIGH / LOW) ** (step / (steps - 1)) for step in range(steps)]


def torch_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> LRScheduler:
    rise = max(1, round(warmup * steps))
    up = LinearLR(optimizer, start_factor=1 / rise, total_iters=max(1, rise - 1))
    return SequentialLR(optimizer, [up, CosineAnnealingLR(optimizer, steps - rise)], [rise])


def used(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    """The rate that an optimiser under a scheduler finds at each step."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def clip(gradients: list[Tensor], longest: float) -> tuple[list[Tensor], Tensor]:
    """Gradients as one arrow no longer than `longest`, and how long it was: √ of the sum of all squares."""
    length = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    return [gradient * (longest / (length + 1e-6)).clamp(max=1) for gradient in gradients], length


def build(seed: int, device: torch.device) -> GPT:
    torch.manual_seed(seed)
    model = GPT(V=V, T=T, C=C, H=H, L=L)
    initialise(model, std=0.1)
    return model.to(device)


def loss_of(model: GPT, windows: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over the tokens of all windows: two (B, T) -> ()."""
    inputs, targets = windows
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())  # (B·T, V), (B·T,) -> ()


def train(
    model: GPT, stream: Stream, rates: Iterable[float], B: int, longest: float = math.inf, spike: float = 1.0
) -> list[float]:
    """A step of AdamW at each rate; the loss of step SPIKE is multiplied by `spike`. Returns the losses."""
    losses, weights = [], list(model.parameters())
    optimizer, device = adamw(model, Settings(B=B, steps=0)), weights[0].device
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, [part.to(device) for part in stream.batch(step * B, B)])
        (loss * (spike if step == SPIKE else 1.0)).backward()
        nn.utils.clip_grad_norm_(weights, longest)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def row(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in one row: (P,)."""
    return torch.cat([tensor.flatten() for tensor in tensors])


@torch.no_grad()
def gains(model: GPT, windows: tuple[Tensor, Tensor], steps: Iterable[Tensor]) -> float:
    """By how much steps (P,) from where the model is lower the loss, on average. The model stays there."""
    weights = list(model.parameters())
    start, before, after = row(weights), loss_of(model, windows), []
    for step in steps:
        nn.utils.vector_to_parameters(start - step, weights)
        after.append(loss_of(model, windows))
    nn.utils.vector_to_parameters(start, weights)
    return (before - torch.stack(after).mean()).item()


def picture(smooth: Tensor, sweep: dict, best: list[float], scale: float, curves: dict) -> Figure:
    """The range test and the trainings, what a batch is good for, and a spike."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(6, 3.4), layout="constrained")
    figure.suptitle(
        "A rate in between is best, more windows add less, clipping disarms a spike", fontsize="medium"
    )
    left.semilogx(range_test(STEPS)[2:-2], smooth, label="range test")
    left.semilogx(*zip(*sorted(sweep.items()), strict=True), "o", label="trainings")
    left.set(xlabel="learning rate", ylabel="loss", ylim=(1, 7))
    middle.loglog((*SIZES, N), best, "o-", color="C1")
    middle.axvline(scale, color="0.4", linestyle="--")
    middle.text(scale, best[0], "noise as long \nas gradient ", ha="right", va="bottom", fontsize="x-small")
    middle.set(xlabel="windows in the batch, B", ylabel="nats that the best step gains", yticks=(0.01, 0.03))
    middle.set_yticks([], minor=True)
    middle.yaxis.set_major_formatter("{x:g}")
    for (name, losses), style in zip(curves.items(), ("-", "-", ":"), strict=True):
        right.plot(losses, style, label=name)
    right.set(xlabel="step", ylabel="loss", ylim=(2, 7))
    for axes in (left, right):
        axes.legend(fontsize="x-small")
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.device

    lesson.heading("The schedule, three ways")
    ours, theirs, labs = [], [], []
    for steps, warmup in ((10, 0.1), (57, 0.2), (300, 0.1), (40, 0.0)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.003)
        ours.append(by_hand(steps, 0.003, warmup))
        labs.append([learning_rate(step, steps, 0.003, warmup) for step in range(steps)])
        theirs.append(used(optimizer, torch_schedule(optimizer, steps, warmup), steps))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LOW)
    growing = used(optimizer, ExponentialLR(optimizer, (HIGH / LOW) ** (1 / (STEPS - 1))), STEPS)
    for name, steps in (("step of 300", range(300)), ("rate", ours[2])):
        print(f"{name:12}", *(f"{steps[step]:8.5g}" for step in (0, 14, 29, 30, 165, 299)))
    lesson.proves_equal(1, [ours, ours, range_test(STEPS)], [labs, theirs, growing])

    lesson.heading("Gradients that are too long")
    ours, theirs, turned = [], [], []
    for longest in (0.1, 1.0, 1e3):
        parts = [nn.Parameter(torch.zeros(shape, device=device)) for shape in ((3, 4), (5,), (2, 1, 3), ())]
        for part in parts:
            part.grad = torch.randn(part.shape, generator=draw).to(device)
        before = row(part.grad for part in parts)
        short, length = clip([part.grad for part in parts], longest)
        ours += [*short, length]
        length = nn.utils.clip_grad_norm_(parts, longest)  # changes the gradients themselves
        theirs += [*(part.grad for part in parts), length]
        turned.append(1 - F.cosine_similarity(row(part.grad for part in parts), before, dim=0).item())
        print(f"longest {longest:6g}   length {before.norm():.3f} -> {row(short).norm():.3f}")
    lesson.proves_equal(2, [*ours, turned], [*theirs, [0.0] * 3], tolerance=1e-5)

    documents = [story.text for story in stories.write(lesson.seed, 200_000)]
    tokenizer = Tokenizer.learn(documents, V)
    tokens = np.array([t for text in documents for t in (*tokenizer.encode(text), tokenizer.special[END])])
    stream, rest = (Stream(part, T, lesson.seed) for part in np.split(tokens, [len(tokens) * 9 // 10]))
    held_out = [part.to(device) for part in rest.batch(0, N)]

    def ends(rates: Iterable[float], B: int = B, **how: float) -> tuple[float, list[float], GPT]:
        """A new model, trained: its loss on the held-out windows, the losses on the way, and itself."""
        model = build(lesson.seed, device)
        losses = train(model, stream, rates, B, **how)
        with torch.no_grad():
            return loss_of(model, held_out).item(), losses, model

    kinds, spiked = {"no spike": {}, "a spike": {"spike": 1e3}, "clipped": {"spike": 1e3, "longest": 1.0}}, {}
    for name, how in kinds.items():
        spiked[name] = ends([1e-2] * STEPS, **how)
        shown = "  ".join(f"{loss:.2f}" for loss in spiked[name][1][SPIKE - 1 : SPIKE + 19 : 3])
        print(f"{name:9} from step {SPIKE}: {shown}   held out {spiked[name][0]:.3f}")
    worse, clipped = (spiked[name][0] - spiked["no spike"][0] for name in ("a spike", "clipped"))
    lesson.proves(3, worse > 0.5 and clipped < 0.05, f"{worse:+.2f} and {clipped:+.3f} nats")

    lesson.heading(f"What a batch knows of the whole, here {N} windows, after {STEPS} steps")
    model = spiked["no spike"][2]
    inputs, targets = whole = [part.to(device) for part in stream.batch(STEPS * B, N)]
    losses = (loss_of(model, (inputs[n : n + 1], targets[n : n + 1])) for n in range(N))  # of each window
    rows = torch.stack([row(torch.autograd.grad(loss, model.parameters())) for loss in losses])  # (N, P)
    true = row(torch.autograd.grad(loss_of(model, whole), model.parameters()))  # (P,)
    lesson.proves_equal(4, rows.mean(0), true)
    spread = (rows - true).square().sum(-1).mean().item()  # of one window: the trace of the covariance
    scale = spread / true.square().sum().item()  # windows at which the noise is as long as the gradient
    print(f"length of the true gradient {true.norm():.3f}; as long as the noise of {scale:.0f} windows")
    off, best = [], []
    for size in (*SIZES, N):
        drawn = torch.randint(N, (200, size), generator=draw).to(device)
        batches = F.one_hot(drawn, N).float().mean(1) @ rows  # (200, size, N) -> (200, N) @ (N, P)
        batches = true[None] if size == N else batches  # (200, P), or all windows once
        off.append((batches - true).square().sum(-1).mean().sqrt().item())
        tried = batches[: max(4, 24 // size)]
        best.append(max(gains(model, whole, length * tried) for length in LENGTHS))
        law = f"{(spread / size) ** 0.5:.3f} by 1/√B" if size < N else "all of them"
        print(f"B {size:3}   off by {off[-1]:.3f}, {law}   the best step gains {best[-1]:.4f} nats")
    scaled = [distance * size**0.5 / spread**0.5 for distance, size in zip(off[:-1], SIZES, strict=True)]
    lesson.proves(4, max(abs(s - 1) for s in scaled) < 0.1, f"off by {max(abs(s - 1) for s in scaled):.1%}")
    few, most = best[1] / best[0], best[-2] / best[-1]
    lesson.proves(5, best[0] > 0 and few > 2 and most > 0.5, f"{few:.1f} times as much, and {most:.0%}")

    lesson.heading(f"A range test of {STEPS} steps, and trainings of as many with warm-up")
    model = build(lesson.seed, device)
    losses = torch.tensor(train(model, stream, range_test(STEPS), B))
    smooth = losses.unfold(0, 5, 1).mean(-1)  # (STEPS - 4,): each of 5 losses, around their middle
    turn = range_test(STEPS)[smooth.argmin() + 2]
    print(f"its loss falls to {smooth.min():.2f} at a rate of {turn:.3f}")

    sweep = {rate: ends(constant(STEPS, rate))[0] for rate in (*SWEEP, turn / 10)}
    print("   ".join(f"{rate:.2g}: {loss:.2f}" for rate, loss in sweep.items()))
    *others, named = sweep.values()
    lesson.proves(
        6, named < 1.15 * min(others), f"{named:.2f} nats at {turn / 10:.2g}, {min(others):.2f} at best"
    )

    lesson.heading(f"Warm-up, {STEPS} steps of {B} windows; cosine, {LONG} steps of {FEW}")

    def compare(rates: tuple[float, ...], B: int, rows: dict[str, Callable]) -> list[list[float]]:
        """A training for each rate and kind of schedule: the losses that they end at."""
        print(" " * 15, "  ".join(f"rate {rate:5g}" for rate in rates))
        found = []
        for name, schedule in rows.items():
            found.append([ends(schedule(rate), B)[0] for rate in rates])
            print(f"{name:15}", "  ".join(f"{loss:10.2f}" for loss in found[-1]))
        return found

    kinds = {f"warm-up of {w * STEPS:2.0f}": partial(constant, STEPS, warmup=w) for w in (0.0, 0.3)}
    at_once, warm = compare(HIGH_RATES, B, kinds)
    saved = sum(a - b for a, b in zip(at_once, warm, strict=True)) / len(warm)
    kinds = {"constant": partial(constant, LONG), "cosine": partial(by_hand, LONG, warmup=0.1)}
    steady, falling = compare(CHOICE, FEW, kinds)
    fallen = min(steady) - min(falling)
    lesson.proves(7, saved > 0.1 and fallen > 0, f"{saved:.2f} nats saved, and {fallen:.2f}")
    curves = {name: losses for name, (_, losses, _) in spiked.items()}
    lesson.save(picture(smooth, sweep, best, scale, curves))


if __name__ == "__main__":
    run(main)
