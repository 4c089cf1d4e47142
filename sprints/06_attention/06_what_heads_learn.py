"""What heads learn: two layers learn to continue a text that repeats, and two kinds of head do it together.

Run:     uv run sprints/06_attention/06_what_heads_learn.py      (12 s on two cores)
Proves:  1. a layer adds what each of its heads writes: head by head gives the model's logits and gradients
         2. the places that followed a letter's earlier occurrences: a loop and all pairs at once agree
         3. the trained model looks only back: its influence matrix is lower triangular
         4. two layers have a loss below 0.3 on the second copy, block lengths left out of training included;
            one layer stays above 2 (ln V is 3.26)
         5. layer 2 holds an induction head, score above 0.9, and layer 1 a previous-token head, above 0.7
         6. without the induction head the loss is above ln V; without all previous-token heads it is above 3,
            and the induction head's score below 0.3; without layer 1's head that is least of one, below 0.5
         7. the page shows the model's own weights, each to the percent
Shapes:  B texts, T places, C width, H heads of a layer, D = C / H, V letters
Writes:  results/06_attention/06_what_heads_learn.png, results/06_attention/06_what_heads_learn.json and
         results/06_attention/06_what_heads_learn.html, a page to point at
Note:    notes/06_what_heads_learn.md
"""

import copy
import math
from string import ascii_uppercase

from lab.attention import MultiHeadAttention, causal_mask
from lab.attention_page import Example, page, read
from lab.influence import influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, C, B = 26, 64, 32
HEADS = (4, 1)  # layer 1 has 4 heads of width 16, layer 2 a single one of width 64
UNSEEN = (12, 13, 14)  # lengths of a block that training leaves out
LENGTHS = tuple(L for L in range(6, 21) if L not in UNSEEN)
T = 2 * max(LENGTHS)
TITLE = "Where does each head look?"
TEXT = (
    "Point at a letter of the second copy: the head of layer 2 looks at the letter that followed it in "
    "the first copy, which is the answer. It can find that place because heads of layer 1 look one back, "
    "so that every place knows which letter came before it."
)


class AttentionOnly(nn.Module):
    """Layers of attention, each adding to the vectors that it reads. No feed-forward network anywhere."""

    def __init__(self, heads: tuple[int, ...]) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        self.layers = nn.ModuleList(MultiHeadAttention(C, H, bias=False) for H in heads)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in heads)  # keep numbers in range (sprint 7)
        self.last_norm, self.to_logits = nn.LayerNorm(C), nn.Linear(C, V, bias=False)

    def stream(self, ids: Tensor) -> Tensor:
        """What the first layer reads: (B, T) -> (B, T, C)."""
        return self.letters(ids) + self.places.weight[: ids.shape[1]]

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, V)."""
        x = self.stream(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), causal=True)
        return self.to_logits(self.last_norm(x))


def head_by_head(model: AttentionOnly, ids: Tensor, without: tuple = ()) -> tuple[Tensor, dict]:
    """The model, one head after the other, and without some: logits (B, T, V), {head: its weights (B, T, T)}.

    A head is named by its layer and its number, both from 1.
    """
    x, seen = model.stream(ids), {}
    for number, (norm, layer) in enumerate(zip(model.norms, model.layers, strict=True), start=1):
        y = norm(x)
        weights, v = layer.weights(y, causal=True), layer.heads(layer.value(y))  # (B, H, T, T), (B, H, T, D)
        back = layer.output.weight.split(layer.D, dim=1)  # H matrices (C, D): each head's way to the stream
        for h, out in enumerate(back):
            seen[number, h + 1] = weights[:, h]
            if (number, h + 1) not in without:
                x = x + weights[:, h] @ v[:, h] @ out.T  # (B, T, T) (B, T, D) (D, C) -> (B, T, C)
    return model.to_logits(model.last_norm(x)), seen


def texts(count: int, lengths: tuple[int, ...], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A block of L different letters, over and over: (count, T), and each text's L (count, 1)."""
    L = torch.tensor(lengths)[torch.randint(len(lengths), (count, 1), generator=draw)]
    blocks = torch.rand(count, V, generator=draw).argsort(1)  # (count, V): the letters in random order
    return blocks.gather(1, torch.arange(T) % L), L


def follows_by_loop(ids: Tensor) -> Tensor:
    """Whether s is the place after an earlier occurrence of the letter at t: (B, T) -> (B, T, T)."""
    found = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool)
    for b, text in enumerate(ids.tolist()):
        for t, letter in enumerate(text):
            for s in range(t):
                if text[s] == letter:
                    found[b, t, s + 1] = True
    return found


def follows(ids: Tensor) -> Tensor:
    """The same, all pairs at once."""
    earlier = (ids[:, :, None] == ids[:, None, :]).tril(-1)  # (B, T, T): the same letter, before t
    return F.pad(earlier, (1, 0))[..., :-1]  # and one place on


def score(weights: Tensor, wanted: Tensor, where: Tensor) -> float:
    """The weight on the wanted places, a mean over the places `where`: (B, T, T) twice, (B, T)."""
    return (weights * wanted).sum(-1)[where].mean().item()


def train(lesson: Lesson, heads: tuple[int, ...]) -> AttentionOnly:
    """Trained to foretell every next letter, in the first copy too, where that is a matter of luck."""
    draw = torch.Generator().manual_seed(lesson.seed)
    torch.manual_seed(lesson.seed)
    model = AttentionOnly(heads).to(lesson.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=lesson.steps, pct_start=0.1)
    for _ in lesson.progress(range(lesson.steps), f"{len(heads)} layers"):
        ids = texts(B, LENGTHS, draw)[0].to(lesson.device)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def second_copy(L: Tensor) -> Tensor:
    """The places whose next letter belongs to the second copy, so that it can be known: (B, 1) -> (B, T)."""
    t = torch.arange(T)
    return (t >= L) & (t < 2 * L - 1)


def judge(model: AttentionOnly, ids: Tensor, L: Tensor, without: tuple = ()) -> tuple[float, float]:
    """Loss and accuracy on the second copy: (B, T), (B, 1)."""
    logits, _ = head_by_head(model, ids, without)  # (B, T, V)
    where = second_copy(L)[:, :-1].to(ids.device)
    logits, targets = logits[:, :-1][where], ids[:, 1:][where]  # (N, V), (N,)
    right = (logits.argmax(-1) == targets).double().mean().item()
    return F.cross_entropy(logits, targets).item(), right


def scores(weights: dict, ids: Tensor, L: Tensor) -> dict:
    """For each head how much it looks one back, and at what followed last time: {head: (float, float)}."""
    t = torch.arange(T)
    one_back = torch.ones(T - 1, dtype=torch.bool).diag(-1)  # (T, T)
    first_copy = (t > 0) & (t < L)  # (B, T)
    return {
        head: (score(w, one_back, first_copy), score(w, follows(ids), second_copy(L)))
        for head, w in weights.items()
    }


def name(head: tuple[int, int]) -> str:
    return f"layer {head[0]}, head {head[1]}"


def weights_on(html: str) -> list[Tensor]:
    """What a page shows, as shares: (T, T) for each head of each text, 0 where a place is hidden."""
    every = [rows for example in read(html) for rows in example["heads"].values()]
    return [
        torch.stack([F.pad(torch.tensor(row) / 100, (0, len(rows) - len(row))) for row in rows])
        for rows in every
    ]


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed + 1_000)  # other texts than those of the training

    lesson.heading("A layer, head by head")
    torch.manual_seed(lesson.seed)
    model = AttentionOnly((2, 4, 1)).double().to(lesson.float64_device)
    ours, theirs = [], []
    for shape in ((1, 1), (3, 7), (2, 13)):
        ids = torch.randint(V, shape, generator=draw).to(lesson.float64_device)
        slope = torch.randn(*shape, V, generator=draw, dtype=torch.float64).to(lesson.float64_device)
        for found, logits in ((ours, head_by_head(model, ids)[0]), (theirs, model(ids))):
            found += [logits, *torch.autograd.grad(logits, list(model.parameters()), slope)]
    lesson.proves_equal(1, ours, theirs)
    some = [torch.randint(5, shape, generator=draw) for shape in ((1, 1), (3, 7), (2, 31))]
    lesson.proves_equal(2, [follows(ids) for ids in some], [follows_by_loop(ids) for ids in some])

    model, single = train(lesson, HEADS), train(lesson, HEADS[:1])
    lesson.heading("Taught on blocks of letters that repeat")
    exact = copy.deepcopy(model).to(lesson.float64_device).double()
    text = torch.randperm(V, generator=draw)[:4].repeat(1, 2).to(lesson.float64_device)  # (1, 8)
    looks = influence(exact, text)
    print("4 letters, twice: which can change which answer", *rows(looks), sep="\n")
    lesson.proves_equal(3, looks, causal_mask(text.shape[1]).long())
    (ids, L), (new_ids, new_L) = texts(500, LENGTHS, draw), texts(500, UNSEEN, draw)
    there = ids.to(lesson.device)
    guess, (loss, right), (alone, alone_right) = math.log(V), judge(model, there, L), judge(single, there, L)
    new, new_right = judge(model, new_ids.to(lesson.device), new_L)
    print("                                   loss   accuracy, on the second copy")
    print(f"guessing                          {guess:5.3f}   {1 / V:6.1%}    (ln V)")
    print(f"one layer                         {alone:5.3f}   {alone_right:6.1%}")
    print(f"two layers                        {loss:5.3f}   {right:6.1%}")
    print(f"two layers, unseen block lengths  {new:5.3f}   {new_right:6.1%}")
    lesson.proves(4, max(loss, new) < 0.3 and alone > 2, full_run=True)

    lesson.heading("Where each head looks, and what is lost without it")
    weights = {head: w.cpu() for head, w in head_by_head(model, there)[1].items()}
    found = scores(weights, ids, L)
    even = causal_mask(T) / torch.arange(1, T + 1)[:, None]  # (T, T): as much weight on every place
    chance = scores({"even": even.expand(len(ids), T, T)}, ids, L)["even"]
    lost = {head: judge(model, there, L, (head,))[0] for head in found}
    print("                 one back   what followed   loss without it")
    for head, (back, after) in found.items():
        print(f"{name(head)}  {back:8.2f} {after:13.2f} {lost[head]:16.3f}")
    print(f"even weights     {chance[0]:8.2f} {chance[1]:13.2f}")
    first = [head for head in found if head[0] == 1]
    most, least = (choose(first, key=lambda head: found[head][0]) for choose in (max, min))
    induction = max(found, key=lambda head: found[head][1])
    held = induction[0] == 2 and found[induction][1] > 0.9 and found[most][0] > 0.7
    lesson.proves(5, held, f"even weights would score {chance[1]:.2f} and {chance[0]:.2f}", full_run=True)
    back = tuple(head for head in first if found[head][0] > 0.5)
    blind = judge(model, there, L, back)[0]
    weights = {induction: head_by_head(model, there, back)[1][induction].cpu()}
    lone = scores(weights, ids, L)[induction][1]
    print(f"without all that look one back with a score above 0.5 ({len(back)} heads): loss {blind:.3f},")
    print(f"and the induction head's score falls from {found[induction][1]:.2f} to {lone:.2f}")
    held = lost[induction] > guess and blind > 3 and lone < 0.3 and lost[least] < 0.5
    lesson.proves(6, held, full_run=True)

    lesson.heading("A page to point at")
    letters = torch.randperm(V, generator=draw).to(lesson.device)
    to_show = {
        "9 letters, twice": letters[:9].repeat(2),
        "13 letters, twice: a length not seen in training": letters[-13:].repeat(2),
        "20 letters, once: nothing to find": letters[:20],
    }
    looked = [head_by_head(model, text[None])[1] for text in to_show.values()]
    examples = [
        Example(what, [ascii_uppercase[i] for i in text], {name(head): w[0] for head, w in seen.items()})
        for (what, text), seen in zip(to_show.items(), looked, strict=True)
    ]
    html = page(TITLE, TEXT, examples)
    print(f"{len(html.encode()):,} bytes, {len(examples)} texts")
    truth = [w[0] for seen in looked for w in seen.values()]  # (T, T) each
    lesson.proves_equal(7, weights_on(html), truth, tolerance=0.005)
    lesson.save_file(".html", html.encode())
    lesson.measured(
        ln_V=guess, one_layer=alone, two_layers=loss, unseen_lengths=new,
        without={name(head): loss for head, loss in lost.items()}, without_previous_token_heads=blind,
        scores={name(head): pair for head, pair in found.items()},
    )  # fmt: skip

    figure, (bars, picture) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained", width_ratios=(4, 5))
    pairs = [*found.values(), chance]
    for shift, which, what in ((-0.2, 0, "one back"), (0.2, 1, "what followed last time")):
        places = [number + shift for number in range(len(pairs))]
        bars.barh(places, [pair[which] for pair in pairs], 0.4, label=what)
    bars.text(1.05, -1, "loss\nwithout", va="center", fontsize="small")
    for number, head in enumerate(found):
        bars.text(1.05, number, f"{lost[head]:.2f}", va="center", fontsize="small")
    bars.set_yticks(range(len(pairs)), [*(f"{layer}.{h}" for layer, h in found), "even"])
    bars.set(xlim=(0, 1.5), ylim=(len(pairs) - 0.4, -1.7), xlabel="weight on the place", ylabel="layer.head")
    bars.set_xticks([0, 0.5, 1])
    figure.legend(loc="outside lower left", ncols=2, fontsize="small")
    text = to_show["13 letters, twice: a length not seen in training"]
    picture.imshow(looked[1][induction][0].cpu(), cmap="Blues", vmin=0, vmax=1)
    ticks = [ascii_uppercase[i] for i in text]
    picture.set_xticks(range(len(ticks)), ticks, fontsize=6)
    picture.set_yticks(range(len(ticks)), ticks, fontsize=6)
    picture.set(xlabel="letter looked at", ylabel="letter that looks", title=name(induction))
    figure.suptitle("A head looks at what followed last time: without it the skill is gone", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, steps=400)
