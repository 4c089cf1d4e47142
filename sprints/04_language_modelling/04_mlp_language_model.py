"""A network that sees the last K characters: embedded, side by side, through one hidden layer.

Run:     uv run sprints/04_language_modelling/04_mlp_language_model.py
         (25 s on two cores; 9 s with --steps 450)
Proves:  1. a loop over positions, a product with one-hot windows and the lab's model agree, gradients too
         2. what follows position t is changed by the last K characters, each of them, and by nothing else
         3. a text read in pieces, with the state handed on, gives the logits of one reading
         4. the lab's training is the loop written here: the same loss at every step
         5. with one character in view the network comes within 2% of the bigram table, which it cannot beat
         6. twice the context, a lower held-out loss: from 1 to 2 characters, and from 2 to 4
Shapes:  B windows of T positions, K characters in view, E numbers per character, H hidden units, V characters
Writes:  results/04_language_modelling/04_mlp_language_model.png,
         results/04_language_modelling/04_mlp_language_model.json
Note:    notes/04_mlp_language_model.md
"""

import itertools
import math

from lab.corpus import Corpus, load
from lab.fit import fit
from lab.ladder import first_mistake, nats_per_character, rung
from lab.lesson import Lesson, run
from lab.mlp import WindowMLP
from lab.ngram import NGram

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, H, B, T, RATE = 16, 256, 4, 64, 4e-3
CONTEXTS = 1, 2, 4, 8, 16


def logits_by_loop(model: WindowMLP, ids: list[int]) -> Tensor:
    """Position by position: look up the last K characters, put the vectors side by side. -> (T, V)."""
    rows, padded = [], [len(model.embedding.weight) - 1] * (model.K - 1) + ids
    for t in range(len(ids)):
        window = torch.cat([model.embedding.weight[number] for number in padded[t : t + model.K]])  # (K·E,)
        hidden = (model.hidden.weight @ window + model.hidden.bias).clamp(min=0)  # (H,)
        rows.append(model.output.weight @ hidden + model.output.bias)
    return torch.stack(rows)


def logits_by_product(model: WindowMLP, ids: Tensor) -> Tensor:
    """All positions at once; a lookup is a product with a one-hot vector. (T,) -> (T, V)."""
    table = model.embedding.weight  # (V + 1, E)
    padded = F.pad(ids, (model.K - 1, 0), value=len(table) - 1)  # (K - 1 + T,)
    windows = F.one_hot(padded, len(table)).to(table.dtype).unfold(0, model.K, 1).mT  # (T, K, V + 1)
    return model.output(model.hidden((windows @ table).flatten(1)).relu())  # (T, K, E) -> (T, K·E) -> (T, V)


def training_by_hand(model: nn.Module, corpus: Corpus, seed: int, steps: int) -> list[float]:
    """The loop of lab.fit, with its learning rate written out."""
    optimizer, draw, losses = torch.optim.AdamW(model.parameters()), torch.Generator().manual_seed(seed), []
    rise = 0.1 * steps - 1
    for step in range(steps):
        if step <= rise:
            start, end, done = RATE / 25, RATE, step / rise
        else:
            start, end, done = RATE, RATE / 250_000, (step - rise) / (steps - 1 - rise)
        optimizer.param_groups[0]["lr"] = end + (start - end) / 2 * (1 + math.cos(math.pi * done))
        inputs, targets = corpus.batch(B, T, draw)  # the target of a position is the character after it
        log_p = model(inputs)[0].log_softmax(dim=-1)  # (B, T, V)
        loss = -log_p.gather(-1, targets.unsqueeze(-1)).mean()  # (B, T, 1) -> ()
        optimizer.zero_grad()
        loss.backward()
        length = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        for parameter in model.parameters():
            parameter.grad *= (1 / length).clamp(max=1)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(lesson: Lesson) -> None:
    corpus = load(lesson.data, lesson.seed, lesson.device)
    V = corpus.V

    def build(K: int) -> WindowMLP:
        torch.manual_seed(lesson.seed)
        return WindowMLP(V, K, E, H).to(lesson.device)

    lesson.heading("One window at a time, and all at once")
    exact = WindowMLP(V, 5, 3, 31).double().to(lesson.float64_device)
    ids = corpus.train[:24].to(lesson.float64_device)  # (T,)
    ways = logits_by_loop(exact, ids.tolist()), logits_by_product(exact, ids), exact(ids[None])[0][0]
    weights = [*exact.parameters()]
    values = [[way, *torch.autograd.grad(way.square().sum(), weights)] for way in ways]
    print(f"K = {exact.K}: {tuple(ids.shape)} characters -> logits {tuple(ways[-1].shape)}")
    lesson.proves_equal(1, [values[0], values[1]], [values[2], values[2]])

    changed = torch.zeros(len(ids), len(ids), dtype=torch.bool)  # (T, T): output t, input i
    for i in range(len(ids)):
        other = ids.clone()
        other[i] = (ids[i] + 1) % V
        changed[:, i] = (exact(other[None])[0][0] != ways[-1]).any(dim=-1).cpu()
    distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))  # (T, T): t - i
    print(f"one changed character changes {changed.sum(0).max()} of {len(ids)} outputs: its own and the next")
    lesson.proves(2, changed.equal((distance >= 0) & (distance < exact.K)))
    state, pieces = None, []
    for piece in ids[None].split([1, 2, 9, 12], dim=1):
        logits, state = exact(piece, state)
        pieces.append(logits[0])
    lesson.proves_equal(3, torch.cat(pieces), ways[-1])

    lesson.heading("Training")
    ours = training_by_hand(build(4), corpus, lesson.seed, 30)
    theirs, _ = fit(build(4), corpus, lesson, B=B, T=T, rate=RATE, steps=30)
    print(f"loss {ours[0]:.3f} at the start (ln V = {math.log(V):.3f}), {ours[-1]:.3f} after 30 steps")
    lesson.proves_equal(4, torch.tensor(ours), torch.tensor(theirs), tolerance=1e-4)

    lesson.heading("Context against loss, after a short training and after a longer one")
    table = nats_per_character(NGram(corpus.train, V, n=2, smoothing=0.1), corpus)
    short, long = lesson.steps // 15, lesson.steps // 3
    losses = {short: {}, long: {}}  # steps -> K -> held-out nats per character
    for K, steps in itertools.product(CONTEXTS, losses):
        model = build(K)
        fit(model, corpus, lesson, B=B, T=T, rate=RATE, steps=steps)
        losses[steps][K] = nats_per_character(model, corpus)
    print(f"K        {short:6,} steps {long:6,} steps")
    for K in CONTEXTS:
        print(f"{K:2}  {losses[short][K]:15.4f} {losses[long][K]:12.4f}")
    print(f"a bigram table {table:17.4f}")
    apart = losses[long][1] / table - 1
    lesson.proves(5, -0.001 < apart < 0.02, f"{apart:+.2%}", full_run=True)
    gains = [losses[long][2 * K] / losses[long][K] - 1 for K in (1, 2)]
    lesson.proves(6, max(gains) < 0, f"{gains[0]:+.0%}, {gains[1]:+.0%}", full_run=True)

    lesson.heading(f"A rung of the ladder: {lesson.steps:,} steps with K = {K}")
    model = build(K)
    _, seconds = fit(model, corpus, lesson, B=B, T=T, rate=RATE)
    parameters = sum(p.numel() for p in model.parameters())
    step = rung(f"MLP, {K} characters", model, corpus, parameters, seconds, lesson.seed)
    lesson.measured(losses=losses, rungs=[step])
    print(
        f"held out {step['nats_per_character']:.4f}; a story, up to its first mistake and a little further:"
    )
    print(f"  {step['sample'][: (first_mistake(step['sample']) or 0) + 30]!r}")

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for steps, curve in losses.items():
        axes.plot(curve.keys(), curve.values(), "o-", label=f"after {steps:,} steps")
    axes.axhline(table, color="C2", linestyle="--", label="bigram table")
    if corpus.floor:
        axes.axhline(corpus.floor, color="gray", linestyle=":", label="floor")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="K, characters in view", xticks=CONTEXTS, xticklabels=CONTEXTS)
    axes.set(ylabel="held-out nats per character", ylim=(0, None))
    axes.set_title("More characters in view lower the loss, given the training to use them")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.92), ncols=2, fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, data="stories", steps=3_600)
