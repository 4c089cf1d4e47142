"""Norms without weights, layers without biases, outputs that begin at zero: what GPT-2 can do without.

Run:     uv run sprints/11_modern_transformer/02_norms_and_biases.py
         (40 s on two cores; 14 s with --steps 30)
Proves:  1. RMSNorm of what is centred is LayerNorm, values and gradients; of what is not it is something else
         2. a GPT-2 of any weights, but for its last norm's, is a model of RMSNorms without weights, with the
            same logits: what is added to the residual stream is centred, and a norm's weights go into the
            matrices behind it
         3. a bias of the keys changes no logit and has no gradient; a bias of the values is one of the output
         4. with outputs of zero a model of any depth begins as its embedding and its norm alone; its outputs
            and embeddings have gradients at the first step, its other matrices at the second
         5. without the weights of its norms and without its biases the model loses at most 0.15 nats a
            character more, on the mean of five seeds
         6. with outputs that begin at zero it then loses at least 0.05 nats less, on the mean of five seeds
Shapes:  B texts, T places, C numbers at each; V tokens
Writes:  results/11_modern_transformer/02_norms_and_biases.png,
         results/11_modern_transformer/02_norms_and_biases.json
Note:    notes/02_norms_and_biases.md
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from lab.attention import MultiHeadAttention
from lab.gpt import GPT, outputs
from lab.lesson import Lesson, run
from lab.modern import Decoder, initialise, plain_norm
from lab.transformer import EncoderBlock, FeedForward, PreNorm
from lab.trials import SEEDS, SETTINGS, Recipe, Trial, characters, table, trial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

SHAPES = ((1, 1, 4), (2, 3, 7), (3, 5, 33))  # B, T, C
GELU = partial(nn.GELU, approximate="tanh")


# ── Norms ─────────────────────────────────────────────────────────────────────────────────────────────────


def layer_norm(x: Tensor) -> Tensor:
    """x less its mean, divided by the root of its mean square: (B, T, C) -> (B, T, C)."""
    return rms_norm(x - x.mean(-1, keepdim=True))


def rms_norm(x: Tensor) -> Tensor:
    """x divided by the root of its mean square: (B, T, C) -> (B, T, C)."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, above: Tensor) -> list[Tensor]:
    """f(x), and what comes back through it from `above`."""
    x = x.clone().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, x, above)]


def rms(C: int) -> nn.RMSNorm:
    return nn.RMSNorm(C, eps=1e-5, elementwise_affine=False)


@torch.no_grad()
def without_weights(model: GPT) -> Decoder:
    """The same function with norms that have no weights and take away no mean, but for the last.

    What is normalised is a sum: of embeddings, and of what each sublayer adds. If all of these are centred,
    so is their sum, and RMSNorm is LayerNorm. A norm's own weights γ and β go into the matrices behind it:
    W (γ x + β) + b = (W γ) x + (W β + b).
    """
    s = model.settings
    blocks = [block(s["C"], s["H"], rms) for _ in range(s["L"])]
    plain = Decoder(s["V"], s["T"], s["C"], blocks, rms(s["C"]), nn.Embedding(s["T"], s["C"]))
    plain.to(model.tokens.weight).load_state_dict(model.state_dict(), strict=False)
    for module in (plain.tokens, plain.places):
        module.weight -= module.weight.mean(1, keepdim=True)  # (V, C), (T, C)
    for old, new in zip(model.blocks, plain.blocks, strict=True):
        for part, readers, writer in (
            ("attention", ("query", "key", "value"), "output"),
            ("feed_forward", ("0",), "2"),
        ):
            norm, inside = getattr(old, part).norm, getattr(new, part).sublayer
            for name in readers:
                layer = getattr(inside, name)
                layer.bias += layer.weight @ norm.bias  # (out, C) @ (C,)
                layer.weight *= norm.weight  # (out, C) * (C,)
            layer = getattr(inside, writer)
            layer.weight -= layer.weight.mean(0)  # (C, in): each column is centred
            layer.bias -= layer.bias.mean()
    return plain


# ── Models ────────────────────────────────────────────────────────────────────────────────────────────────


def block(C: int, H: int, norm: Callable[[int], nn.Module], bias: bool = True) -> EncoderBlock:
    attention, work = MultiHeadAttention(C, H, bias=bias), FeedForward(C, 4 * C, GELU, bias)
    return EncoderBlock(PreNorm(attention, norm(C)), PreNorm(work, norm(C)))


def build(V: int, T: int, norm: Callable[[int], nn.Module], bias: bool, zero: bool = False) -> Decoder:
    """A model of the baseline's size."""
    model = Decoder(V, T, 64, [block(64, 2, norm, bias) for _ in range(2)], norm(64), nn.Embedding(T, 64))
    initialise(model, std=0.1, zero_outputs=zero)
    return model


RECIPES = (
    Recipe("GPT-2", partial(build, norm=nn.LayerNorm, bias=True)),
    Recipe("no weights in norms, no biases", partial(build, norm=plain_norm, bias=False)),
    Recipe("… and outputs of zero", partial(build, norm=plain_norm, bias=False, zero=True)),
)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean nats of ids (B, T + 1) behind the first: ()."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def draw_seeds(found: dict[str, list[Trial]]) -> Figure:
    """What each recipe loses, a line for each seed."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    names = [name.replace(", ", ",\n").replace("outputs", "\noutputs") for name in found]
    for pair in zip(*found.values(), strict=True):
        axes.plot(names, [result.nats for result in pair], "o-", color="C0", alpha=0.6)
    axes.set(xlabel="recipe", ylabel="nats per held-out character", xlim=(-0.3, len(names) - 0.7))
    axes.set_title("Outputs that begin at zero help with every seed")
    return figure


def norms_and_biases(lesson: Lesson) -> None:
    """Claims 1 to 3."""
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device
    lesson.heading("Two norms")
    ours, theirs, apart = [], [], []
    for shape in SHAPES:
        x, above = torch.randn(2, *shape, generator=draw, dtype=torch.float64).to(device) + 1
        centred, C = x - x.mean(-1, keepdim=True), shape[-1]
        ours += with_gradient(layer_norm, x, above) + with_gradient(rms_norm, x, above) + [rms_norm(centred)]
        theirs += with_gradient(plain_norm(C), x, above) + with_gradient(rms(C), x, above) + [layer_norm(x)]
        apart.append((rms_norm(x) - layer_norm(x)).abs().max().item())
        print(f"(B, T, C) = {shape!s:11}  mean {x[0, 0].mean():+.2f}   they differ by up to {apart[-1]:.2f}")
    equal = all(map(partial(torch.allclose, rtol=1e-10, atol=1e-10), ours, theirs))
    lesson.proves(1, equal and min(apart) > 0.1, f"{len(ours)} tensors within 1e-10")

    lesson.heading("A GPT-2, and the same without weights in its norms")
    torch.manual_seed(lesson.seed)
    ids, logits, plain_logits, models = torch.randint(29, (3, 11), generator=draw).to(device), [], [], []
    for L in (1, 2, 5):
        model = GPT(V=29, T=11, C=24, H=3, L=L)
        for weight in model.parameters():
            nn.init.normal_(weight, 0.1, 0.5)  # biases and the norms' weights too
        nn.init.ones_(model.norm.weight), nn.init.zeros_(model.norm.bias)  # see the note
        models.append(model.to(device, torch.float64))
        plain = without_weights(model)
        logits.append(model(ids)), plain_logits.append(plain(ids))
        counts = (sum(weight.numel() for weight in m.parameters()) for m in (model, plain))
        print("L = {}: {:6,} weights, {:6,} without those of the norms".format(L, *counts))
    lesson.proves_equal(2, plain_logits, logits)

    lesson.heading("Biases that do nothing, and biases that do what another does")
    held, moved = True, []
    for model, before in zip(models, logits, strict=True):
        F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1).flatten()).backward()
        for b in model.blocks:
            attention = b.attention.sublayer
            key, value, output = attention.key.bias, attention.value.bias, attention.output.bias
            held &= key.grad.abs().max().item() < 1e-12 < value.grad.abs().max().item()
            with torch.no_grad():
                output += attention.output.weight @ value  # (C, C) @ (C,)
                key += torch.randn(key.shape, generator=draw, dtype=key.dtype).to(device)
                value.zero_()
        moved.append((model(ids) - before).abs().max().item())
    lesson.proves(3, held and max(moved) < 1e-10, f"logits move by {max(moved):.1e}")


def zeros(lesson: Lesson) -> None:
    """Claim 4."""
    lesson.heading("Outputs of zero")
    draw, held = torch.Generator().manual_seed(lesson.seed), True
    ids = torch.randint(29, (3, 12), generator=draw).to(lesson.device)
    for L in (1, 3):
        torch.manual_seed(lesson.seed)
        blocks = [block(24, 3, plain_norm, bias=False) for _ in range(L)]
        model = Decoder(29, 11, 24, blocks, plain_norm(24), nn.Embedding(11, 24)).to(lesson.device)
        initialise(model, std=0.1, zero_outputs=True)
        alone = F.linear(
            model.norm(model.tokens(ids[:, :-1]) + model.places.weight), model.tokens.weight
        )  # (B, T, V)
        held &= torch.equal(model(ids[:, :-1]), alone)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        writers = [layer.weight for layer in outputs(model)]
        early = {id(weight) for weight in (*writers, model.tokens.weight, model.places.weight)}
        for step in (1, 2):
            optimizer.zero_grad()
            loss_of(model, ids).backward()
            moving = {id(weight) for weight in model.parameters() if weight.grad.abs().max() > 0}
            print(f"L = {L}, step {step}: {len(moving):2} of {6 * L + 2:2} matrices have a gradient")
            held &= moving == early if step == 1 else len(moving) == 6 * L + 2
            optimizer.step()
    lesson.proves(4, held)


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a model threads would only wait for each other
    if lesson.data != "stories":
        lesson.needs = "the stories"
    text, found = characters(lesson.data, lesson.seed), {recipe.name: [] for recipe in RECIPES}
    norms_and_biases(lesson)
    zeros(lesson)
    lesson.heading("Measured: the same characters to learn from, the same seeds")
    runs = [(recipe, seed) for recipe in RECIPES for seed in SEEDS]
    for recipe, seed in lesson.progress(runs, "trials"):
        recipe = replace(recipe, settings=replace(SETTINGS, steps=lesson.steps))
        found[recipe.name].append(trial(recipe, text, lesson.device, seed))
    print(*table(found), sep="\n")
    base, without, zero = (torch.tensor([result.nats for result in part]) for part in found.values())
    cost, gain = (without - base).mean().item(), without - zero
    print(f"outputs of zero against the recipe before: {-gain.mean():+.4f}")
    lesson.proves(5, cost <= 0.15, f"{cost:+.3f}", full_run=True)
    better = f"{gain.mean():.3f} less, on {int((gain > 0).sum())} seeds of {len(SEEDS)}"
    lesson.proves(6, gain.mean().item() >= 0.05, better, full_run=True)
    lesson.save(draw_seeds(found))
    lesson.measured(held_out={name: [r.nats for r in part] for name, part in found.items()})


if __name__ == "__main__":
    run(main, data="stories", steps=SETTINGS.steps)
