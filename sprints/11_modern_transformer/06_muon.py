"""Muon: a step for a matrix as a whole, the same length in all its directions; AdamW for what is no matrix.

Run:     uv run sprints/11_modern_transformer/06_muon.py
         (40 s on two cores; 14 s with --steps 40)
Proves:  1. five steps of Newton–Schulz, by hand and by the lab, are a polynomial of the singular values, and
            leave the singular vectors as they are
         2. it takes any singular value from 1/500 of the matrix's length upwards to between 0.68 and 1.21,
            and so those of random and of ill-conditioned matrices
         3. Muon by hand takes the steps of the lab's and of torch.optim.Muon, which computes in bfloat16
         4. a gradient 1,000 times as large gives the same step; the outputs of a layer move alike at widths
            16, 64 and 256, and with AdamW in proportion to the width
         5. of an embedding, a token that is a hundredth as frequent takes a hundredth of the step with Muon,
            the whole of it with AdamW
         6. with Muon for the matrices of the blocks the baseline loses over 0.3 nats less on what is held
            out, on five seeds of five
         7. Muon's best rate of three is the same at widths 32, 64 and 128; AdamW's best at width 32 costs
            over 0.05 nats at width 128
Shapes:  matrices of M rows and N columns, layers of width C; a batch of B windows
Writes:  results/11_modern_transformer/06_muon.png,
         results/11_modern_transformer/06_muon.json
Note:    notes/06_muon.md
"""

from dataclasses import replace
from functools import partial

from lab.gpt import GPT, initialise
from lab.lesson import Lesson, run
from lab.muon import COEFFICIENTS, Muon, muon, orthogonalise
from lab.stream import Stream, TokenText
from lab.training import Settings
from lab.trials import SETTINGS, Recipe, characters, for_tuning, gpt2, table, trial, trials

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

SHAPES = ((5, 5), (7, 4), (3, 11), (1, 6), (7, 4), (64, 256))
WIDTHS, RATES = (32, 64, 128), {"AdamW": (0.1, 0.3, 1.0), "Muon": (1.0, 4.0, 16.0)}  # as multiples of AdamW's


# ── All singular values to one ────────────────────────────────────────────────────────────────────────────


def polynomial(s: Tensor, steps: int = 5) -> Tensor:
    """What becomes of singular values from 0 to 1, each by itself."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


def slowly(G: Tensor) -> Tensor:
    """By its singular values: (M, N) -> (M, N)."""
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)  # (M, R), (R,), (R, N)
    return U * polynomial(S / S.square().sum().sqrt()) @ Vt


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """The same by products alone, as X Xᵀ X is U S³ Vᵀ: (M, N) -> (M, N)."""
    (a, b, c), X = COEFFICIENTS, G / G.square().sum().sqrt()
    for _ in range(steps):
        X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
    return X


def by_hand(
    p: Tensor, g: Tensor, memory: dict, lr: float, momentum: float = 0.95, decay: float = 0.1
) -> Tensor:
    """As in 03/03: a matrix, its gradient and what was remembered of it give the next matrix."""
    memory["m"] = momentum * memory.get("m", 0) + (1 - momentum) * g
    ahead = momentum * memory["m"] + (1 - momentum) * g  # Nesterov's
    M, N = p.shape
    return (1 - lr * decay) * p - lr * max(1, M / N) ** 0.5 * newton_schulz(ahead)


def matrix(M: int, N: int, condition: float, draw: torch.Generator) -> Tensor:
    """Singular values from 1 down to 1 / condition, singular vectors by chance: (M, N)."""
    U, _, Vt = torch.linalg.svd(torch.randn(M, N, generator=draw, dtype=torch.float64), full_matrices=False)
    return U * torch.logspace(0, -1, min(M, N), condition, dtype=torch.float64) @ Vt


def steps_of(optimizer: torch.optim.Optimizer, weights: list[Tensor], gradients: list[list[Tensor]]) -> list:
    """The weights after a step along each row of gradients."""
    for row in gradients:
        for weight, gradient in zip(weights, row, strict=True):
            weight.grad = gradient.to(weight)
        optimizer.step()
    return [weight.detach() for weight in weights]


def lab_muon(weights: list[Tensor], lr: float, decay: float) -> Muon:
    """The lab's, for matrices alone, in float64."""
    group = {"params": weights, "lr": lr, "momentum": 0.95, "weight_decay": decay}
    return Muon([group], torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), torch.float64)


def first_step(name: str, G: Tensor) -> Tensor:
    """From zero, at a rate of 0.01: (M, N) -> (M, N)."""
    weights = [torch.zeros_like(G)]
    adamw = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.0)
    optimizer = adamw if name == "AdamW" else lab_muon(weights, 0.01, 0.0)
    return steps_of(optimizer, weights, [[G]])[0]


# ── Rates, widths ─────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def build(V: int, T: int, width: int) -> GPT:
    """The baseline, but for its width; the wider, the smaller the weights of its layers begin."""
    model = GPT(V=V, T=T, C=width, H=2, L=2)
    initialise(model, std=0.1)
    for weight in model.blocks.parameters():
        if weight.ndim > 1:
            weight *= (64 / width) ** 0.5
    return model


def gradient(text: TokenText, seed: int) -> Tensor:
    """Of a matrix of the baseline before its first step, of length 1: (4C, C)."""
    torch.manual_seed(seed)
    model = gpt2(text.tokenizer.V, 64)
    inputs, targets = Stream(text.train, 64, seed).batch(0, 8)  # (B, T) both
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()  # (B·T, V), (B·T,)
    G = model.blocks[0].feed_forward.sublayer[0].weight.grad
    return G / G.norm()


def adamw_apart(model: nn.Module, settings: Settings, scale: float) -> torch.optim.AdamW:
    """AdamW for all, with the matrices of the blocks at `scale` times the rate, as muon() has them."""
    matrices, *others = muon(model, settings, scale).param_groups
    del matrices["momentum"]
    return torch.optim.AdamW([matrices, *others], lr=settings.rate, betas=(0.9, settings.beta2), fused=True)


def beginning(text: TokenText, documents: int) -> TokenText:
    """The same text, with fewer documents held out."""
    kept = text.held_out[:documents]
    written = (text.tokenizer.decode(document[1:].tolist()) for document in kept)
    return replace(text, held_out=kept, characters=sum(map(len, written)))


def picture(values: dict[str, Tensor], found: dict) -> Figure:
    """Singular values before and after; what each rate loses at each width."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    s = torch.logspace(-4, 0, 400)
    left.semilogx(s, polynomial(s), label="any")
    for (name, before), style in zip(values.items(), ("o", "x"), strict=True):
        left.semilogx(before, polynomial(before), style, markersize=4, label=name)
    left.set(xlabel="singular value / length", ylabel="after five steps", xlim=(1e-4, 2))
    left.set_title("All directions, one length")
    left.legend(fontsize="x-small", loc="lower right")
    for (name, rows), style in zip(found.items(), ("s:", "o-"), strict=True):
        for colour, (width, losses) in enumerate(rows.items()):
            rates = [SETTINGS.rate * rate for rate in RATES[name]]
            right.semilogx(rates, losses, style, color=f"C{colour}", label=f"{name}, width {width}")
    right.set(xlabel="rate of the matrices", ylabel="nats per character", title="One rate for all widths")
    right.legend(fontsize="xx-small")
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a model threads would only wait for each other
    draw, device, exact = torch.Generator().manual_seed(lesson.seed), lesson.device, lesson.float64_device

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(exact)

    if lesson.data != "stories":
        lesson.needs = "the stories"  # another text may want another rate
    text = characters(lesson.data, lesson.seed)
    tuning, settings = for_tuning(text), replace(SETTINGS, steps=lesson.steps)

    lesson.heading("Five steps of Newton–Schulz")
    some = torch.tensor([0.0002, 0.002, 0.02, 0.2, 1.0])
    for steps in (0, 1, 3, 5):
        values = "  ".join(f"{value:6.4f}" for value in polynomial(some, steps).tolist())
        print(f"singular values after {steps} steps   {values}")
    gradients = [random(*shape) for shape in SHAPES]
    slow = [slowly(G) for G in gradients]
    lesson.proves_equal(1, [newton_schulz(G) for G in gradients], slow, tolerance=1e-8)
    together = torch.stack([gradients[1], gradients[4]])  # (2, 7, 4)
    batch = orthogonalise(together.unflatten(0, (2, 1))).flatten(0, 1)  # (2, 1, 7, 4) -> (2, 7, 4)
    lesson.proves_equal(1, [*map(orthogonalise, gradients), *batch], [*slow, slow[1], slow[4]], 1e-8)
    any_ = polynomial(torch.linspace(0.002, 1, 100_000, dtype=torch.float64))
    ill = [matrix(64, N, 100, draw).to(exact) for N in (64, 256)]
    after = torch.cat([torch.linalg.svdvals(orthogonalise(G)) for G in (random(64, 256), *ill)])
    low, high = torch.cat([any_, after.cpu()]).aminmax()
    lesson.proves(2, bool(low > 0.68 and high < 1.21), f"{low:.3f} to {high:.3f}")

    before = torch.linalg.svdvals(gradient(tuning, lesson.seed))  # (C,)
    for steps in (0, 5):
        share = polynomial(before, steps).square().cumsum(0)
        most = (share < 0.9 * share[-1]).sum() + 1
        print(
            f"a gradient after {steps} steps: nine tenths of its square in {most} of {len(share)} directions"
        )

    lesson.heading("Muon")
    start = [random(*shape) for shape in SHAPES]
    gradients = [[random(*shape) for shape in SHAPES] for _ in range(10)]
    ours, memories = start, [{} for _ in SHAPES]
    for row in gradients:
        ours = [by_hand(*one, lr=0.1) for one in zip(ours, row, memories, strict=True)]
    weights = [p.clone() for p in start]
    lesson.proves_equal(3, steps_of(lab_muon(weights, 0.1, 0.1), weights, gradients), ours, tolerance=1e-8)
    weights = [p.float().to(device) for p in start]
    theirs = steps_of(torch.optim.Muon(weights, lr=0.1, weight_decay=0.1), weights, gradients)
    lesson.proves_equal(3, [p.float() for p in ours], theirs, tolerance=2e-2)

    moved, louder = {"Muon": [], "AdamW": []}, []
    for width in (16, 64, 256):
        x, d = random(width).sign(), random(width).sign()  # one token, and what its outputs should do
        for name, changes in moved.items():
            changes.append((first_step(name, d.outer(x)) @ x).square().mean().sqrt().item())
        louder.append((first_step("Muon", 1000 * d.outer(x)) @ x).square().mean().sqrt().item())
    for name, changes in moved.items():
        print(f"at widths 16, 64, 256 {name:5} changes outputs by", *(f"{change:7.4f}" for change in changes))
    alike, wider = [moved["Muon"][0]] * 3, [moved["AdamW"][0] * factor for factor in (1, 4, 16)]
    lesson.proves_equal(4, [*louder, *moved["Muon"], *moved["AdamW"]], [*alike, *alike, *wider], 1e-6)
    ids = torch.tensor([0] * 100 + [1] + [2, 3, 4] * 20, device=exact)  # (161,): the tokens of a text
    wish = random(161, 16)  # what each would have changed in its row of the embedding
    wish[:101] = wish[0]  # token 1 the same as token 0
    G = wish.new_zeros(5, 16).index_add(0, ids, wish)  # the embedding's gradient
    steps = [first_step(name, G) for name in moved]
    ratios = [(step[1].norm() / step[0].norm()).item() for step in steps]
    lesson.proves_equal(5, ratios, [0.01, 1.0], tolerance=1e-4)

    lesson.heading(f"A rate for the matrices, {settings.steps // 4} steps of 4 windows, on the tuning text")
    short, part = replace(settings, B=4, steps=max(1, settings.steps // 4)), beginning(tuning, 10)
    found, best = {}, {}
    for name, make in (("AdamW", adamw_apart), ("Muon", muon)):
        print(f"{name:14}", "   ".join(f"× {rate:<6g}" for rate in RATES[name]))
        found[name] = {}
        for width in lesson.progress(WIDTHS, name):
            recipes = [
                Recipe("", partial(build, width=width), short, optimizer=partial(make, scale=rate))
                for rate in RATES[name]
            ]
            losses = [trial(recipe, part, device, lesson.seed).nats for recipe in recipes]
            found[name][width] = losses
            best[name, width] = min(range(3), key=losses.__getitem__)
            print(f"width {width:4}    ", "   ".join(f"{nats:8.4f}" for nats in losses))
    chosen = RATES["Muon"][best["Muon", 64]]

    lesson.heading(
        f"Muon at {chosen:g} times the rate, {settings.steps} steps of {settings.B} windows, held out"
    )
    base = Recipe("AdamW", settings=settings)
    ours = replace(base, name="Muon and AdamW", optimizer=partial(muon, scale=chosen))
    ended = {}
    for recipe in lesson.progress((base, ours), "recipes"):
        ended[recipe.name] = trials(recipe, text, device)
    print(*table(ended), sep="\n")
    less = [a.nats - b.nats for a, b in zip(*ended.values(), strict=True)]
    lesson.proves(6, min(less) > 0.3, f"by {min(less):.2f} to {max(less):.2f}", full_run=True)
    wide = found["AdamW"][128]
    cost = wide[best["AdamW", 32]] - min(wide)
    same = len({best["Muon", width] for width in WIDTHS}) == 1
    lesson.proves(7, same and cost > 0.05, f"Muon × {chosen:g}; AdamW {cost:.2f} nats", full_run=True)
    values = {"a gradient": before, "ill-conditioned": torch.linalg.svdvals(ill[0] / ill[0].norm())}
    lesson.save(picture({name: s.cpu() for name, s in values.items()}, found))
    nats = {name: [result.nats for result in results] for name, results in ended.items()}
    lesson.measured(held_out=nats, rates=RATES, tuning=found, chosen=chosen, floor=text.floor)


if __name__ == "__main__":
    run(main, data="stories", steps=SETTINGS.steps)
