"""Pre-norm or post-norm: where the norm stands decides how deep and how fast a transformer can be trained.

Run:     uv run sprints/07_transformer_block/06_pre_norm_or_post_norm.py
         (23 s on two cores; 10 s with --steps 30)
Proves:  1. both orders by hand are the lab's PreNorm and PostNorm, values and gradients
         2. the influence matrix of blocks of either order, and of the attention in them, is the causal mask
         3. post-norm's stream has spread 1 after every block; pre-norm's grows like √depth, and one norm at
            the end brings it back to 1
         4. at the start the last block's gradient is as large at 32 blocks as at 2 with post-norm; with
            pre-norm it is less than half, as it falls by as much as the stream grows
         5. pre-norm of 2, 4 and 8 blocks learns at rates of 0.002, 0.006 and 0.02: a loss below 0.5; none of
            them learns at 0.2, above 1
         6. post-norm learns at 0.006 with 2 blocks, below 0.5, and not with 8, above 1; with 8 it stays at
            chance, above 1.9, at all higher rates
         7. warm-up alone lets 8 blocks of post-norm learn at 0.006: a loss below 1
Shapes:  B texts, T places, C width, V letters, H heads, L blocks
Writes:  results/07_transformer_block/06_pre_norm_or_post_norm.png,
         results/07_transformer_block/06_pre_norm_or_post_norm.json
Note:    notes/06_pre_norm_or_post_norm.md
"""

import math
from functools import partial

from lab.attention import MultiHeadAttention, causal_mask
from lab.influence import influence, rows
from lab.lesson import Lesson, run
from lab.transformer import EncoderBlock, FeedForward, PostNorm, PreNorm

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

B, T, C, V, H = 32, 8, 32, 8, 2
DEPTHS, RATES = (2, 4, 8), (0.002, 0.006, 0.02, 0.06, 0.2)
AT_START, MODELS = (2, 8, 32), 12  # depths, and how many new models of each are averaged
CHANCE = math.log(V)
SHAPES = ((2, 3, 4), (1, 7, 6), (3, 1, 8))  # B, T, C, for comparisons


def norm(x: Tensor) -> Tensor:
    """Mean 0 and spread 1 at each place, as a new nn.LayerNorm does: (B, T, C) -> (B, T, C)."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def post_norm(x: Tensor, sublayer: nn.Module, **options: object) -> Tensor:
    """Vaswani et al. 2017: add, then normalise the sum. The way to the end leads through every norm."""
    return norm(x + sublayer(x, **options))


def pre_norm(x: Tensor, sublayer: nn.Module, **options: object) -> Tensor:
    """Normalise a copy for the sublayer, then add. The stream itself meets no norm."""
    return x + sublayer(norm(x), **options)


ORDERS = {"pre-norm": (pre_norm, PreNorm), "post-norm": (post_norm, PostNorm)}


class Model(nn.Module):
    """Letters, L blocks that look back, letters."""

    def __init__(self, residual: type[PreNorm], L: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(V, C), nn.Parameter(torch.randn(T, C))
        self.blocks = nn.ModuleList(
            EncoderBlock(
                residual(MultiHeadAttention(C, H), nn.LayerNorm(C)),
                residual(FeedForward(C, 4 * C), nn.LayerNorm(C)),
            )
            for _ in range(L)
        )
        self.last = nn.LayerNorm(C) if residual is PreNorm else nn.Identity()
        self.output = nn.Linear(C, V)
        for weight in self.blocks.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)  # as Xiong et al. do

    def through(self, x: Tensor) -> list[Tensor]:
        """What flows out of each block: (B, T, C) -> L times (B, T, C)."""
        stream = [x]
        for block in self.blocks:
            stream.append(block(stream[-1], causal=True))
        return stream[1:]

    def stream(self, ids: Tensor) -> list[Tensor]:
        """(B, T) -> L times (B, T, C)."""
        return self.through(self.letters(ids) + self.places)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, V)."""
        return self.output(self.last(self.stream(ids)[-1]))


def through_attention(model: Model, x: Tensor) -> Tensor:
    """What the attention of the first block adds to the stream: (B, T, C) -> (B, T, C)."""
    added = []
    attention = model.blocks[0].attention.sublayer
    hook = attention.register_forward_hook(lambda module, inputs, output: added.append(output))
    model.through(x)
    hook.remove()
    return added[0]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Name the letter before: logits (B, T, V), (B, T) -> the mean over all places that have one."""
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten())


def train(lesson: Lesson, residual: type[PreNorm], L: int, warm_up: int = 1) -> list[float]:
    """The loss after training at each of RATES, side by side: every rate has a copy of the same weights.

    Every batch is new, so that the mean of the last ten losses is one on unseen texts.
    """
    draw = torch.Generator().manual_seed(lesson.seed)
    torch.manual_seed(lesson.seed)
    model = Model(residual, L).to(lesson.device)
    names, weights = zip(*model.named_parameters(), strict=True)
    sizes = [weight.numel() for weight in weights]
    copies = [parameters_to_vector(weights).detach().requires_grad_() for _ in RATES]  # all weights in a row
    groups = [{"params": copy, "lr": rate} for copy, rate in zip(copies, RATES, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warm_up))

    def loss_with(copy: Tensor, ids: Tensor) -> Tensor:
        parts = [part.view_as(weight) for part, weight in zip(copy.split(sizes), weights, strict=True)]
        return loss_of(functional_call(model, dict(zip(names, parts, strict=True)), ids), ids)

    history = []
    for _ in lesson.progress(range(lesson.steps), f"{residual.__name__}, {L} blocks"):
        ids = torch.randint(V, (B, T), generator=draw).to(lesson.device)
        with sdpa_kernel(SDPBackend.MATH):  # the one that can be vectorised over copies
            losses = torch.vmap(loss_with, (0, None))(torch.stack(copies), ids)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        history.append(losses.detach())
    return torch.stack(history[-10:]).mean(0).tolist()


def at_start(lesson: Lesson, residual: type[PreNorm], L: int) -> tuple[list[float], float, float]:
    """Means over new models, each asked about one place of one text.

    The spread of the stream after each block, what it is after the last norm, and the size of the gradient of
    the last block's last matrix.
    """
    draw = torch.Generator().manual_seed(lesson.seed)
    torch.manual_seed(lesson.seed)
    found = []
    for _ in range(MODELS):
        model, ids = Model(residual, L).to(lesson.device), torch.randint(V, (1, T), generator=draw)
        x = model.stream(ids.to(lesson.device))
        end = model.last(x[-1])  # (1, T, C)
        F.cross_entropy(model.output(end)[:, -1], ids[:, -2].to(lesson.device)).backward()
        slope = model.blocks[-1].feed_forward.sublayer[-1].weight.grad.norm()
        found.append([*(part.std(correction=0).item() for part in (*x, end)), slope.item()])
    *spreads, end, slope = torch.tensor(found).mean(0).tolist()
    return spreads, end, slope


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    lesson.heading("Two orders of the same three things")
    ours, theirs = [], []
    for by_hand, residual in ORDERS.values():
        for shape in SHAPES:
            width = shape[-1]
            for sublayer, options in (
                (MultiHeadAttention(width, H), {"causal": True}),
                (FeedForward(width, 5), {}),
            ):
                lab = residual(sublayer, nn.LayerNorm(width)).double().to(lesson.float64_device)
                x, slope = randn(*shape).requires_grad_(), randn(*shape)
                results = by_hand(x, sublayer, **options), lab(x, **options)
                for found, result in zip((ours, theirs), results, strict=True):
                    inputs = [x, *sublayer.parameters()]
                    found += [result, *torch.autograd.grad(result, inputs, slope)]
    lesson.proves_equal(1, ours, theirs)

    lesson.heading("Who sees whom, through two blocks")
    looks = []
    for _, residual in ORDERS.values():
        torch.manual_seed(lesson.seed)
        model = Model(residual, 2).double().to(lesson.float64_device)
        for function in (lambda x, model=model: model.through(x)[-1], partial(through_attention, model)):
            looks.append(influence(function, randn(1, T, C)))
    for lines in zip(*map(rows, looks[::2]), strict=True):
        print("      ".join(lines))
    lesson.proves_equal(2, looks, [causal_mask(T).long()] * 4)

    lesson.heading("At the start: spread of the stream, and gradient of the last block")
    spread, end, slope = {}, {}, {}
    for name, (_, residual) in ORDERS.items():
        for L in AT_START:
            spread[name, L], end[name, L], slope[name, L] = at_start(lesson, residual, L)
            last, gradient = spread[name, L][-1], slope[name, L]
            print(f"{name:9} {L:2} blocks   spread {last:.2f}   gradient {gradient:.2f}", end="   ")
            print(f"product {gradient * last:.2f}   spread after the last norm {end[name, L]:.2f}")
    pre, post = ([slope[name, L] for L in AT_START] for name in ORDERS)
    product = [gradient * spread["pre-norm", L][-1] for gradient, L in zip(pre, AT_START, strict=True)]
    growth = spread["pre-norm", 32][-1] / spread["pre-norm", 8][-1]
    off = max(abs(one - 1) for one in (*spread["post-norm", 32], *end.values()))
    held = off < 1e-3 and 1.5 < growth < 2.6
    lesson.proves(3, held, f"four times the depth, {growth:.2f} times the spread")
    held = max(post) < 1.4 * min(post) and max(product) < 1.5 * min(product) and pre[-1] < 0.5 * pre[0]
    lesson.proves(4, held, f"{post[-1] / post[0]:.2f} and {pre[-1] / pre[0]:.2f} times")

    lesson.heading(f"Loss after {lesson.steps} steps: chance {CHANCE:.2f}, best possible 0")
    print(f"{'learning rate':26}", *(f"{rate:6}" for rate in RATES))
    losses = {(name, L): train(lesson, residual, L) for name, (_, residual) in ORDERS.items() for L in DEPTHS}
    losses["post-norm + warm-up", 8] = train(lesson, PostNorm, 8, warm_up=math.ceil(lesson.steps / 2))
    for (name, L), reached in losses.items():
        print(f"{name:19} {L} blocks", *(f"{loss:6.2f}" for loss in reached))
    worst = max(loss for L in DEPTHS for loss in losses["pre-norm", L][:3])
    best = min(losses["pre-norm", L][-1] for L in DEPTHS)
    held = worst < 0.5 and best > 1
    lesson.proves(5, held, f"{worst:.2f} at most, {best:.2f} at least", full_run=True)
    shallow, (_, deep, *deeper) = losses["post-norm", 2][1], losses["post-norm", 8]
    held = shallow < 0.5 and deep > 1 and min(deeper) > 1.9
    lesson.proves(6, held, f"{shallow:.2f}, {deep:.2f}, and {min(deeper):.2f} or more", full_run=True)
    warm = losses["post-norm + warm-up", 8][1]
    lesson.proves(7, warm < 1, f"{warm:.2f}", full_run=True)
    lesson.measured(
        rates=RATES, losses={f"{name}, {L} blocks": reached for (name, L), reached in losses.items()}
    )

    figure, axes = plt.subplots(1, 3, figsize=(6.4, 3.4), layout="constrained", width_ratios=(4, 4, 3))
    for panel, order in zip(axes[:2], ORDERS, strict=True):
        chosen = {(name, L): reached for (name, L), reached in losses.items() if name.startswith(order)}
        panel.imshow(list(chosen.values()), vmin=0, vmax=CHANCE, cmap="cividis_r", aspect="auto")
        for row, reached in enumerate(chosen.values()):
            for column, loss in enumerate(reached):
                colour = "white" if loss > 1 else "black"
                panel.text(column, row, f"{loss:.1f}", ha="center", va="center", color=colour)
        panel.set_xticks(range(len(RATES)), RATES, rotation=45, fontsize="small")
        names = [f"{L}, warm" if "warm" in name else str(L) for name, L in chosen]
        panel.set_yticks(range(len(chosen)), names, rotation=90, va="center", fontsize="small")
        panel.set(xlabel="learning rate", ylabel="blocks", title=f"{order}: loss")
    for name in ORDERS:
        axes[2].plot(AT_START, [slope[name, L] for L in AT_START], "o-", label=name)
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(AT_START, AT_START)
    axes[2].set(xlabel="blocks", ylabel="gradient of the last block", ylim=(0, 3.2), title="at the start")
    axes[2].legend(loc="upper center", fontsize="small")
    figure.suptitle(f"Post-norm stays at chance ({CHANCE:.1f}) where pre-norm learns", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, steps=100)
