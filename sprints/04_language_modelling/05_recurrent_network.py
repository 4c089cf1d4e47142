"""A recurrent network: one vector, rewritten at every character, is all that it remembers of a text.

Run:     uv run sprints/04_language_modelling/05_recurrent_network.py
         (30 s on two cores; 10 s with --steps 40)
Proves:  1. an RNN and a GRU as loops over time equal nn.RNN and nn.GRU in every state and every gradient
         2. these loops are the lab's model, and a text read in pieces gives the logits of one reading
         3. where W is ρ times a rotation, a gradient k steps back is ρᵏ as long; with tanh never longer
         4. as PyTorch builds them, RNN and GRU keep less than 0.7 of a gradient per step, whatever the
            distance; a GRU whose update gate is biased by 4 keeps over 0.95
         5. gradients cut every C steps lack the terms that cross a cut and no others; no output changes
         6. after as many steps the GRU predicts better than the RNN, and both better than a trigram table
         7. the GRU predicts worse if it forgets the document every 50 characters
Shapes:  B texts of T characters, E numbers per character, H hidden units, V characters, N weights in W
Writes:  results/04_language_modelling/05_recurrent_network.png,
         results/04_language_modelling/05_recurrent_network.json
Note:    notes/05_recurrent_network.md
"""

import math
from collections.abc import Callable

from lab.corpus import load
from lab.fit import fit
from lab.ladder import nats_per_character, rung
from lab.lesson import Lesson, run
from lab.ngram import NGram
from lab.recurrent import RecurrentLM

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPES = ((1, 1, 1, 1), (2, 7, 3, 5), (3, 4, 6, 2))  # B, T, E, H
E, H, B, T, RATE = 32, 192, 16, 64, 1e-2
LONGER = 2.5  # so many steps of the RNN take as long as one of the GRU
WIDTH, DISTANCE, PIECE = 64, 100, 50  # hidden units and steps of the gradients looked at; characters
Step = Callable[[list[Tensor], Tensor, Tensor], Tensor]


def linear(weights: list[Tensor], x: Tensor, h: Tensor) -> Tensor:
    """What the character says and what the memory says, added: x (B, E), h (B, H) -> (B, H)."""
    U, W, b, c = weights  # (H, E), (H, H), (H,), (H,)
    return x @ U.T + b + h @ W.T + c


def elman(weights: list[Tensor], x: Tensor, h: Tensor) -> Tensor:
    """One step of an RNN: x (B, E), h (B, H) -> the next h (B, H)."""
    return linear(weights, x, h).tanh()


def gru(weights: list[Tensor], x: Tensor, h: Tensor) -> Tensor:
    """One step of a GRU, with three of everything: reset gate, update gate, new state. -> (B, H)."""
    U, W, b, c = weights  # (3·H, E), (3·H, H), (3·H,), (3·H,)
    x_reset, x_update, x_new = (x @ U.T + b).chunk(3, dim=-1)  # (B, 3·H) -> three of (B, H)
    h_reset, h_update, h_new = (h @ W.T + c).chunk(3, dim=-1)
    r = (x_reset + h_reset).sigmoid()  # how much of the memory the new state may see
    z = (x_update + h_update).sigmoid()  # how much of the memory stays as it is
    n = (x_new + r * h_new).tanh()  # as in cuDNN: r comes after the product with W
    return (1 - z) * n + z * h


CELLS = {"RNN": (elman, nn.RNN), "GRU": (gru, nn.GRU)}


def unroll(step: Step, weights: list[Tensor], x: Tensor, h: Tensor) -> Tensor:
    """The same step at every character: x (B, T, E), first h (B, H) -> all states (B, T, H)."""
    states = []
    for t in range(x.shape[1]):
        h = step(weights, x[:, t], h)
        states.append(h)
    return torch.stack(states, dim=1)


def reach(step: Step, weights: list[Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """The gradient of the last state along `direction` (B, H): how long is it at the input k steps back?

    x (B, T, E) -> (T,), the geometric mean over the B texts, for k = 0, 1, …
    """
    x = x.detach().requires_grad_()
    last = unroll(step, weights, x, torch.zeros_like(direction))[:, -1]  # (B, H)
    (gradient,) = torch.autograd.grad((last * direction).sum(), x)  # (B, T, E)
    return gradient.norm(dim=-1).log().mean(dim=0).exp().flip(0)  # (B, T) -> (T,)


def terms(model: RecurrentLM, step: Step, ids: Tensor, targets: Tensor) -> Tensor:
    """Entry t, s: what the use of W at s contributes to the gradient of the loss at t. (T,) -> (T, T, N)."""
    U, W, b, c = model.recurrent.parameters()
    uses = [W.detach().clone().requires_grad_() for _ in ids]  # one copy of W for each step
    h, rows = torch.zeros(1, model.output.in_features).to(W), []
    for t, number in enumerate(ids):
        h = step([U, uses[t], b, c], model.embedding(number)[None], h)  # (1, H)
        loss = F.cross_entropy(model.output(h), targets[t : t + 1])
        parts = torch.autograd.grad(loss, uses, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.stack(parts).flatten(1))  # (T, …) -> (T, N)
    return torch.stack(rows)


def truncated(model: RecurrentLM, ids: Tensor, targets: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Truncated backpropagation: every C steps the state goes on, the gradient does not.

    (T,), (T,) -> the T losses, and the gradient of W (N,).
    """
    model.zero_grad()
    state, losses = None, []
    for piece, following in zip(ids.split(C), targets.split(C), strict=True):
        logits, state = model(piece[None], state)  # (1, C, V)
        state = state.detach()  # the cut
        losses.append(F.cross_entropy(logits[0], following, reduction="none"))
        losses[-1].sum().backward()
    return torch.cat(losses), model.recurrent.weight_hh_l0.grad.flatten()


def main(lesson: Lesson) -> None:
    corpus, draw = load(lesson.data, lesson.seed, lesson.device), torch.Generator().manual_seed(lesson.seed)
    torch.set_num_threads(1)  # a step is over before a second thread has woken up

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    lesson.heading("A loop over time")
    ours, theirs = [], []
    for b, t, e, h in SHAPES:
        for name, (step, cell) in CELLS.items():
            x, first, upstream = normal(b, t, e), normal(b, h), normal(b, t, h)
            module = cell(e, h, batch_first=True).to(x)  # its device and its float64
            weights = [*module.parameters()]
            inputs = [x.requires_grad_(), first.requires_grad_(), *weights]
            ways = unroll(step, weights, x, first), module(x, first[None])[0]  # (B, T, H) each
            for way, values in zip(ways, (ours, theirs), strict=True):
                values += [way, *torch.autograd.grad((way * upstream).sum(), inputs)]
            numbers = sum(weight.numel() for weight in weights)
            print(f"{name}   x {(b, t, e)} -> states {tuple(ways[0].shape)}   {numbers:3} weights")
    lesson.proves_equal(1, ours, theirs)

    ids, targets = corpus.train[:13].to(lesson.float64_device).unfold(0, 12, 1)  # (T,), (T,)
    exact = [(step, RecurrentLM(corpus.V, 3, 5, cell).to(x)) for step, cell in CELLS.values()]
    ours, theirs = [], []
    for step, model in exact:
        x, whole = model.embedding(ids)[None], model(ids[None])[0]  # (1, T, E), (1, T, V)
        states = unroll(step, [*model.recurrent.parameters()], x, torch.zeros(1, 5).to(x))  # (1, T, H)
        state, pieces = None, []
        for piece in ids[None].split([1, 4, 7], dim=1):
            logits, state = model(piece, state)
            pieces.append(logits)
        ours, theirs = [*ours, model.output(states), torch.cat(pieces, dim=1)], [*theirs, whole, whole]
    lesson.proves_equal(2, ours, theirs)

    lesson.heading("How far back a gradient reaches")
    x, direction = normal(B, DISTANCE + 1, WIDTH), F.normalize(normal(B, WIDTH), dim=-1)
    rotation, none = torch.linalg.qr(normal(WIDTH, WIDTH))[0], torch.zeros(WIDTH).to(x)
    k, lines, shorter = torch.arange(DISTANCE + 1).to(x), {}, []
    for rho in (0.9, 1.0, 1.1, 3.0):
        weights = [torch.eye(WIDTH).to(x), rho * rotation, none, none]
        lines[rho], bent = (reach(step, weights, 0.1 * x, direction) for step in (linear, elman))
        shorter.append(bool((bent <= lines[rho]).all()))
        print(f"ρ = {rho}   {DISTANCE} steps back: linear {lines[rho][-1]:.1e}   tanh {bent[-1]:.1e}")
    lesson.proves_equal(3, [*lines.values()], [rho**k for rho in lines])
    lesson.proves(3, all(shorter), "at every distance")

    weights = {name: [*cell(E, WIDTH).to(x).parameters()] for name, (_, cell) in CELLS.items()}
    biased = torch.zeros(3 * WIDTH).to(x)
    biased[WIDTH : 2 * WIDTH] = 4  # the update gate: σ(4) = 0.98
    U, W, b, c = weights["GRU"]
    weights["GRU, biased"] = [U, W, b + biased, c]
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    rates, straight, k = {}, [], k.cpu()
    for name, numbers in weights.items():
        lengths = reach(CELLS[name[:3]][0], numbers, x[..., :E], direction).cpu()  # (T,)
        logs = (lengths / lengths[0]).log()
        slope, _ = np.polyfit(k, logs, 1)  # of the straight line that fits best
        rates[name] = math.exp(slope)
        straight.append(-np.corrcoef(k, logs)[0, 1])  # 1 where the length falls exponentially
        axes.plot(k, logs.exp(), linewidth=2)
        print(f"{name:11}   {DISTANCE} steps back {logs[-1].exp():.1e}   {rates[name]:.3f} per step")
    fading = max(rates["RNN"], rates["GRU"]) < 0.7 and min(straight[:2]) > 0.999  # the first two: as built
    measured = f"{rates['RNN']:.2f}, {rates['GRU']:.2f} and {rates['GRU, biased']:.2f}"
    lesson.proves(4, fading and rates["GRU, biased"] > 0.95, measured)
    for rho in (0.9, 1.1):
        axes.plot(k, lines[rho].cpu(), "k--", linewidth=1)
    for at, height, name in (
        (22, 1e-10, "RNN"),
        (46, 1e-8, "GRU"),
        (62, 1e-2, "GRU, update gate biased by 4"),
        (62, 1e-5, "linear, ρ = 0.9"),
        (50, 1e4, "linear, ρ = 1.1"),
    ):
        axes.text(at, height, name, fontsize="small")
    axes.set(yscale="log", ylim=(1e-12, 1e6), xlabel="steps back k", ylabel="length of the gradient")
    axes.set_title("A gradient that is multiplied at every step fades or explodes")
    lesson.save(figure)

    lesson.heading("Cutting the gradient")
    ours, theirs = [], []
    for step, model in exact:
        share = terms(model, step, ids, targets)  # (T, T, N)
        loss = F.cross_entropy(model(ids[None])[0][0], targets, reduction="none")  # (T,)
        (full,) = torch.autograd.grad(loss.sum(), model.recurrent.weight_hh_l0)
        for C in (1, 2, 5, 12):
            piece = torch.arange(len(ids)) // C  # (T,): which piece a step is in
            crossing = share[piece[:, None] != piece].sum(dim=0)  # (T, T, N) -> (N,)
            losses, gradient = truncated(model, ids, targets, C)
            ours, theirs = [*ours, losses, gradient], [*theirs, loss, full.flatten() - crossing]
            if step is gru:
                length = crossing.norm() / full.norm()
                print(f"GRU cut every {C:2} steps: what is lacking is {length:5.1%} as long as the gradient")
    lesson.proves_equal(5, ours, theirs)

    lesson.heading("Training")
    rungs = []
    for name, steps in (("RNN", lesson.steps), ("RNN", round(LONGER * lesson.steps)), ("GRU", lesson.steps)):
        torch.manual_seed(lesson.seed)
        model = RecurrentLM(corpus.V, E, H, CELLS[name][1]).to(lesson.device)
        _, seconds = fit(model, corpus, lesson, B=B, T=T, rate=RATE, steps=steps)
        count = sum(weight.numel() for weight in model.parameters())
        rungs.append(rung(name, model, corpus, count, seconds, lesson.seed))
        nats = rungs[-1]["nats_per_character"]
        print(f"{name}: {count:7,} weights, {steps:5,} steps in {seconds:4.1f} s   held out {nats:.4f}")

    def forgetful(ids: Tensor, state: None = None) -> tuple[Tensor, None]:
        """The GRU, but its state is lost every PIECE characters."""
        return torch.cat([model(piece)[0] for piece in ids.split(PIECE, dim=1)], dim=1), None

    forgotten = nats_per_character(forgetful, corpus)
    table = nats_per_character(NGram(corpus.train, corpus.V, n=3, smoothing=0.1), corpus)
    floor = f"   floor {corpus.floor:.4f}" if corpus.floor else ""
    print(f"GRU, its state lost every {PIECE}: held out {forgotten:.4f}")
    print(f"trigram table:                held out {table:.4f}{floor}")
    rnn, _, whole = (rung["nats_per_character"] for rung in rungs)
    lesson.proves(6, whole < rnn < table, f"{whole:.3f} < {rnn:.3f} < {table:.3f}", full_run=True)
    lesson.proves(7, forgotten > 1.01 * whole, f"by {forgotten / whole - 1:.0%}", full_run=True)
    lesson.measured(rungs=rungs[1:], as_many_steps=rnn, forgetful=forgotten, trigrams=table)  # equal time


if __name__ == "__main__":
    run(main, data="stories", steps=400)
