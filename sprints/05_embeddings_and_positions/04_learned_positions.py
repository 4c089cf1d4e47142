"""Learned positions: one row of a table per place, and a row that was never trained knows nothing.

Run:     uv run sprints/05_embeddings_and_positions/04_learned_positions.py      (8 s on two cores)
Proves:  1. adding row t is one-hot × table; row t gets the sum of the gradients at place t, unused rows 0
         2. past the table is an IndexError; a negative index or a short slice returns other rows silently
         3. asked for the token 3 back: learned and sinusoidal above 98 %, no positions below 30 %
         4. past the trained length the learned table falls below 15 %, where chance is 6 %
         5. texts of 32 that start anywhere in the table train every row: above 70 % past place 31
         6. untrained rows stay as drawn, bit for bit; AdamW's decay shrinks them by (1 − ηλ) a step
         7. neighbouring rows become alike if the answer is among the last 8 tokens, not if it is 3 back
Shapes:  B texts, T places, D width, V tokens
Writes:  results/05_embeddings_and_positions/04_learned_positions.png
Note:    notes/04_learned_positions.md
"""

import math
from collections.abc import Callable

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, T, B, V, D = 48, 32, 32, 16, 64  # a table of 48 rows, and texts of 32 tokens to train them


class Reader(nn.Module):
    """Tokens plus positions, then one layer of attention: each place takes a mean over those up to it."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), positions  # (ROWS, D): learned if a Parameter
        self.to_qkv, self.to_logits = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, V)

    def forward(self, ids: Tensor, start: int | Tensor = 0) -> Tensor:
        """Texts that begin at row `start` of the table, one for all or each its own, (B, 1): -> (B, T, V)."""
        places = start + torch.arange(ids.shape[1], device=ids.device)  # (T,) or (B, T)
        x = self.tokens(ids) + self.positions[places]  # (B, T, D) + (T, D) or (B, T, D)
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)  # (B, T, 3D) -> (B, T, D) each
        return self.to_logits(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def sinusoids(places: int) -> Tensor:
    """Lesson 03: (places, D)."""
    angles = torch.arange(places)[:, None] * 10_000 ** -(torch.arange(0, D, 2) / D)  # (places, D/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (places, D/2, 2) -> (places, D)


def train(lesson: Lesson, positions: Tensor, near: int = 3, far: int = 3, anywhere: bool = False) -> Reader:
    """Teach it to name the token that stood `near` to `far` places back; `anywhere` shifts each text."""
    draw = torch.Generator().manual_seed(lesson.seed)
    torch.manual_seed(lesson.seed)
    model = Reader(positions).to(lesson.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, lesson.steps)
    for _ in lesson.progress(range(lesson.steps)):
        ids = torch.randint(V, (B, T), generator=draw)
        source = torch.arange(T) - torch.randint(near, far + 1, (B, T), generator=draw)
        targets = ids.gather(1, source.clamp(min=0)).where(source >= 0, -100)  # -100: no such place, no loss
        starts = torch.randint(ROWS - T + 1 if anywhere else 1, (B, 1), generator=draw)
        logits = model(ids.to(lesson.device), starts.to(lesson.device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(lesson.device).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(lesson: Lesson, model: Reader) -> Tensor:
    """How often it names the token 3 back, at each place of new texts as long as the table: (ROWS,)."""
    ids = torch.randint(V, (1_000, ROWS), generator=torch.Generator().manual_seed(lesson.seed + 1))
    right = model(ids.to(lesson.device)).argmax(-1).cpu()[:, 3:] == ids[:, :-3]
    return F.pad(right.float().mean(0), (3, 0), value=math.nan)  # the first three have no answer


def alike(rows: Tensor) -> Tensor:
    """The cosine of the angle between every two of the trained rows: (ROWS, D) -> (T, T)."""
    directions = F.normalize(rows.detach().cpu()[:T], dim=-1)
    return directions @ directions.T


def answer(look: Callable[[], Tensor]) -> str:
    try:
        return f"shape {tuple(look().shape)}"
    except (IndexError, RuntimeError) as error:
        return type(error).__name__


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    drawn = 0.02 * torch.randn(ROWS, D, generator=torch.Generator().manual_seed(lesson.seed))  # as GPT-2

    lesson.heading("A table of positions")
    table, places = drawn.clone().requires_grad_(), torch.arange(T)
    arriving = torch.randn(B, T, D, generator=torch.Generator().manual_seed(lesson.seed))
    slow = torch.zeros_like(drawn)
    for text in arriving:
        for place, gradient in enumerate(text):
            slow[place] += gradient
    one_hot = F.one_hot(places, ROWS).float()  # (T, ROWS)
    ways = [table[:T], F.embedding(places, table), one_hot @ table]  # (T, D) each
    grads = [torch.autograd.grad(rows.expand(B, T, D), table, arriving)[0] for rows in ways]
    lesson.proves_equal(1, [*ways, *grads], [drawn[:T]] * 3 + [slow] * 3)
    lesson.proves(1, all(not grad[T:].any() for grad in grads), f"rows {T} to {ROWS - 1}: exactly 0")
    looks = {  # on the CPU: an accelerator may notice a wrong index late, or never
        "F.embedding, 48": lambda: F.embedding(torch.tensor([48]), drawn),
        "F.embedding, -1": lambda: F.embedding(torch.tensor([-1]), drawn),
        "table[[48]]": lambda: drawn[[48]],
        "table[[-1]]": lambda: drawn[[-1]],
        "table[40:56]": lambda: drawn[40:56],
        "16 tokens + table[40:56]": lambda: torch.zeros(16, D) + drawn[40:56],
    }
    for name, look in looks.items():
        print(f"{name:25} {answer(look)}")
    expected = ["IndexError"] * 3 + ["shape (1, 64)", "shape (8, 64)", "RuntimeError"]
    lesson.proves(2, [answer(look) for look in looks.values()] == expected)

    lesson.heading("The token that stood 3 back")
    learned, none = nn.Parameter(drawn.clone()), torch.zeros(ROWS, D, device=lesson.device)
    models = {
        "no positions": train(lesson, none),
        "sinusoidal": train(lesson, sinusoids(ROWS).to(lesson.device)),
        "learned": train(lesson, learned),
        "learned, anywhere": train(lesson, nn.Parameter(drawn.clone()), anywhere=True),
    }
    right = {name: accuracy(lesson, model) for name, model in models.items()}
    inside = {name: line[3:T].mean().item() for name, line in right.items()}
    past = {name: line[T:].mean().item() for name, line in right.items()}
    print(f"{'':18} places 3 to {T - 1}   {T} to {ROWS - 1}     (chance {1 / V:.1%})")
    for name in models:
        print(f"{name:18} {inside[name]:13.1%}   {past[name]:8.1%}")
    held = min(inside["learned"], inside["sinusoidal"]) > 0.98 and inside["no positions"] < 0.3
    lesson.proves(3, held, full_run=True)
    lesson.proves(4, past["learned"] < 0.15, f"{past['learned']:.1%}", full_run=True)
    lesson.proves(5, past["learned, anywhere"] > 0.7, f"{past['learned, anywhere']:.1%}", full_run=True)

    lesson.heading("Rows that no text reaches")
    after = models["learned"].positions.detach().cpu()
    moved = [(after - drawn)[rows].norm(dim=-1).mean() for rows in (slice(T), slice(T, ROWS))]
    print(f"moved by training: rows 0 to {T - 1} by {moved[0]:.2f}, the others by {moved[1]:.2f}")
    lesson.proves(6, torch.equal(after[T:], drawn[T:]) and not torch.equal(after[:T], drawn[:T]))
    optimizer = torch.optim.AdamW([table], lr=0.01, weight_decay=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        table[:T].square().sum().backward()
        optimizer.step()
    print(f"500 steps of AdamW, η 0.01, λ 0.1: {(1 - 0.001) ** 500:.3f} of an untrained row is left")
    lesson.proves_equal(6, table[T:], drawn[T:] * (1 - 0.01 * 0.1) ** 500)

    lesson.heading("Which rows become alike")
    blurred = train(lesson, nn.Parameter(drawn.clone()), near=1, far=8)
    tables = {"as drawn": drawn, "token 3 back": learned, "one of the last 8": blurred.positions}
    cosines = {name: alike(rows) for name, rows in tables.items()}
    for name, cosine in cosines.items():
        row = "  ".join(f"{cosine.diagonal(k).mean():+.2f}" for k in (1, 2, 4, 8, 16, 24))
        print(f"{name:18} rows 1, 2, 4, 8, 16, 24 apart   {row}")
    start, exact, near = (cosine.diagonal(1).mean().item() for cosine in cosines.values())
    lesson.proves(7, near > 0.6 and max(abs(start), abs(exact)) < 0.5, full_run=True)

    figure, (left, image) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained", width_ratios=(5, 4))
    for name, label in (("learned", "learned"), ("sinusoidal", "sinusoidal"), ("no positions", "none")):
        left.plot(right[name], label=label)
    left.axvline(T - 0.5, color="black", linestyle=":")
    left.text(T - 1.2, 0.68, "trained up to here", rotation=90, ha="right", va="center", size="small")
    left.set(xlabel="place", ylabel="share of right answers", title="the token 3 back", ylim=(0, 1.05))
    left.legend(loc="center left", bbox_to_anchor=(0.05, 0.62), fontsize="small")
    shown = image.imshow(cosines["one of the last 8"], cmap="PuOr_r", vmin=-1, vmax=1)
    image.set(xlabel="row", ylabel="row", title="cosine: one of the last 8")
    figure.colorbar(shown, ax=image, location="bottom", shrink=0.8)
    figure.suptitle("A learned row knows what its place was trained for, and no more", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, steps=250)
