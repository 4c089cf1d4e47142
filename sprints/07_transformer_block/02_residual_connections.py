"""Residual connections: layers add to a stream instead of replacing it, so signal and gradient get through.

Run:     uv run sprints/07_transformer_block/02_residual_connections.py      (9 s on two cores)
Proves:  1. 64 plain layers lose the gradient or, with weights that keep its size, what tells inputs apart;
            layers that add lose neither
         2. additions as large as the stream make it grow √2-fold a layer; cut by √L they end it at √e, made
            from a normalised copy at √(1 + L); the gradient grows alike on its way back
         3. the Jacobian of L layers that add is a sum over 2^L paths: each layer is taken or gone around
         4. after training, 64 plain layers of nn.Linear's spread are still at ln 3, those that keep sizes get
            under 90 % right, and the weights that stayed at ln 3 get 97 % right if their layers add
         5. the final stream is what entered plus every layer's addition; the logits are a sum over layers
         6. with a layer go its addition and what later layers read from it; without any one of the 64, 90 %
            stay right in the median, without any one of 8 plain layers under 60 %
         7. only attention moves anything between places, and what padding holds stays where it is; layers
            that look one back reach 0 to L back if they add, L back and nothing else if they do not
Shapes:  N samples, C numbers in the stream, B texts, T places
Writes:  results/07_transformer_block/02_residual_connections.png
Note:    notes/02_residual_connections.md
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

from lab.attention import MultiHeadAttention, causal_mask, padding_mask
from lab.influence import influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev

L, C, STEPS = 64, 64, 80  # layers; numbers in the stream, half as many in training; steps of training


def by_linear(C: int) -> tuple[float, float]:
    """The deviations of a layer's two matrices as nn.Linear would draw them: they shrink what enters."""
    return (1 / (3 * C)) ** 0.5, (1 / (3 * C)) ** 0.5


def keeping(C: int) -> tuple[float, float]:
    """Those with which a layer's output is as large as its input; ReLU asks for the 2."""
    return (2 / C) ** 0.5, (1 / C) ** 0.5


def cut(C: int) -> tuple[float, float]:
    """The same, and the output cut by √L: 1/√(2L) for L blocks of two layers each, as in GPT-2."""
    return (2 / C) ** 0.5, (1 / (C * L)) ** 0.5


class Layer(nn.Module):
    """Two matrices and a ReLU between them, at each place alone: (…, C) -> (…, C)."""

    def __init__(self, C: int, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
        nn.init.normal_(self.first.weight, std=first)
        nn.init.normal_(self.second.weight, std=second)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def plain(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """The layer's output takes the place of its input: (…, C) -> (…, C)."""
    return f(x)


def add(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """A residual connection, the layer only says what to add: (…, C) -> (…, C)."""
    return x + f(x)


def add_normalised(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """The layer reads a normalised copy, the stream itself stays as it is: (…, C) -> (…, C)."""
    return x + f(F.rms_norm(x, x.shape[-1:]))


def through(x: Tensor, layers: Iterable[Callable], join: Callable) -> list[Tensor]:
    """The stream as it enters the first layer, and after each: (…, C) -> L + 1 times (…, C)."""
    stream = [x]
    for layer in layers:
        stream.append(join(stream[-1], layer))
    return stream


def spread(x: Tensor) -> float:
    """The root mean square: the size of a typical number in x."""
    return x.detach().square().mean().sqrt().item()


def likeness(x: Tensor) -> float:
    """The mean cosine between different samples, 1 if all point the same way: (N, C) -> a number."""
    x = x.detach() / x.detach().norm(dim=-1, keepdim=True)
    return ((x @ x.T).sum() - len(x)).item() / (len(x) * (len(x) - 1))


def sum_over_paths(jacobians: list[Tensor]) -> Tensor:
    """Take each layer or go around it, in all 2^L ways, and add up the products: L times (C, C) -> (C, C)."""
    total = torch.zeros_like(jacobians[0])
    for taken in product((False, True), repeat=len(jacobians)):
        path = torch.eye(len(total)).to(total)  # around all layers: the gradient as it is
        for jacobian, through in zip(jacobians, taken, strict=True):
            path = jacobian @ path if through else path
        total += path
    return total


class Deep(nn.Module):
    """Points to classes, through layers that are joined in one of the ways above: (N, 2) -> (N, 3)."""

    def __init__(self, depth: int, join: Callable, deviations: Callable) -> None:
        super().__init__()
        self.enter, self.leave, self.join = nn.Linear(2, C // 2), nn.Linear(C // 2, 3), join
        self.layers = nn.ModuleList(Layer(C // 2, *deviations(C // 2)) for _ in range(depth))

    def forward(self, points: Tensor, removed: int | None = None) -> Tensor:
        x = self.enter(points)
        for number, layer in enumerate(self.layers):
            x = x if number == removed else self.join(x, layer)
        return self.leave(x)


def spiral(N: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on three arms that wind around each other once, and the arm of each: (N, 2), (N,)."""
    radius, arm = torch.rand(N, generator=draw), torch.randint(3, (N,), generator=draw)
    angle = 2 * math.pi * (radius + arm / 3) + 0.1 * torch.randn(N, generator=draw)
    return 2 * torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1), arm


def train(lesson: Lesson, depth: int, join: Callable, deviations: Callable) -> tuple[Deep, float]:
    """A trained network, and its last loss on the 256 points that it was trained on."""
    torch.manual_seed(lesson.seed)
    model = Deep(depth, join, deviations).to(lesson.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, foreach=True)
    points, arm = (part.to(lesson.device) for part in spiral(256, torch.Generator().manual_seed(lesson.seed)))
    for _ in lesson.progress(range(STEPS)):
        loss = F.cross_entropy(model(points), arm)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, loss.item()


def overhear(model: Deep, points: Tensor, removed: int | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits (N, 3), the final stream (N, C), and what entered it and what each layer gave: (N, C) each."""
    heard = []

    def listen(module: nn.Module, given: tuple, output: Tensor) -> None:
        heard.append(given[0] if module is model.leave else output)

    hooks = [part.register_forward_hook(listen) for part in (model.enter, *model.layers, model.leave)]
    with torch.no_grad():
        logits = model(points, removed)
    for hook in hooks:
        hook.remove()
    *parts, final = heard
    return logits, final, parts


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)
    wide = {"dtype": torch.float64, "device": lesson.float64_device}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    lesson.heading(f"What {L} new layers do to signal and gradient")
    print("layer                             signal      gradient    (formula)   likeness")
    kinds = {
        "f(x), nn.Linear's spread": (plain, by_linear, 18 ** (-L / 2)),  # a layer: √(1/3 · 1/2 · 1/3)
        "x + f(x), nn.Linear's spread": (add, by_linear, (1 + 1 / 18) ** (L / 2)),
        "f(x)": (plain, keeping, 1),
        "x + f(x)": (add, keeping, 2 ** (L / 2)),
        "x + f(x), cut by √L": (add, cut, (1 + 1 / L) ** (L / 2)),
        "x + f(norm(x))": (add_normalised, keeping, (1 + L) ** 0.5),
    }
    x, back = randn(32, C), randn(32, C)  # (N, C): what enters, and the gradient at the end
    curves, grown, alike = {}, {}, {}
    for name, (join, deviations, formula) in kinds.items():
        torch.manual_seed(lesson.seed)
        layers = [Layer(C, *deviations(C)).to(**wide) for _ in range(L)]
        stream = through(x.clone().requires_grad_(), layers, join)
        signal = [spread(h) for h in stream]
        gradient = [spread(g) for g in torch.autograd.grad(stream[-1], stream, back)]
        curves[name], alike[name] = (signal, gradient), likeness(stream[-1])
        there, here = grown[name] = signal[-1] / signal[0], gradient[0] / gradient[-1]
        print(f"{name:29} × {there:9.2e}   × {here:9.2e}  ({formula:.2e})   {alike[name]:8.3f}")
    small, small_added, sized, doubled, mended, normal = kinds
    lost = grown[small][1] < 1e-30 and grown[sized][1] > 1e-3 and alike[sized] > 0.95
    kept = [(grown[name][1], alike[name]) for name in (small_added, mended, normal)]
    gradients, apart = zip(*kept, strict=True)
    told = f"the gradient grows {max(gradients):.0f}-fold at most, likeness {max(apart):.2f}"
    lesson.proves(1, lost and min(gradients) > 0.1 and max(gradients) < 20 and max(apart) < 0.9, told)
    off_a_layer = max(abs((total / kinds[doubled][2]) ** (1 / L) - 1) for total in grown[doubled])
    off = max(abs(total / kinds[name][2] - 1) for name in (mended, normal) for total in grown[name])
    lesson.proves(2, off_a_layer < 0.05 and off < 0.3, f"{off_a_layer:.1%} a layer off, {off:.0%} in all")

    lesson.heading("Paths around the layers and through them")
    ours, theirs = [], []
    for depth in (1, 2, 5):
        layers = [Layer(7, *keeping(7)).to(**wide) for _ in range(depth)]
        linear = [partial(F.linear, weight=randn(7, 7)) for _ in range(depth)]
        for functions in (linear, layers):
            stream = through(randn(7), functions, add)
            jacobians = [jacrev(f)(reaches) for f, reaches in zip(functions, stream[:-1], strict=True)]
            ours.append(sum_over_paths(jacobians))  # (C, C)
            theirs.append(jacrev(lambda x, f=functions: through(x, f, add)[-1])(stream[0]))
    print(f"5 layers: {2**5} paths, of them through 0, 1, 2 … layers:", *(math.comb(5, k) for k in range(6)))
    lesson.proves_equal(3, ours, theirs)

    lesson.heading(f"{STEPS} steps of training on a spiral of 3 arms (chance: loss {math.log(3):.3f}, 33 %)")
    points, arm = (part.to(lesson.device) for part in spiral(1_000, draw))

    def right(model: Deep, removed: int | None = None) -> float:
        with torch.no_grad():
            return (model(points, removed).argmax(-1) == arm).float().mean().item()

    trained = {}
    for name, depth, join, deviations in (
        (small, L, plain, by_linear),
        (sized, L, plain, keeping),
        (small_added, L, add, by_linear),
        (sized, 8, plain, keeping),
    ):
        model, loss = train(lesson, depth, join, deviations)
        trained[name, depth] = model, loss, right(model)
        print(f"{depth:2} layers  {name:28}   loss {loss:.3f}   {right(model):5.1%} of new points right")
    (_, stuck, _), (_, _, slow), (model, _, learnt), (shallow, _, _) = trained.values()
    lesson.proves(4, abs(stuck - math.log(3)) < 0.05 and slow < 0.9 and learnt > 0.97)

    lesson.heading("The stream as a bus, and what a layer is worth")
    missed = [[right(net, k) for k in range(len(net.layers))] for net in (model, shallow)]
    model, points = model.to(**wide), points.to(**wide)
    logits, final, parts = overhear(model, points)
    weight, bias = model.leave.weight.detach(), model.leave.bias.detach()
    summed = sum(part @ weight.T for part in parts) + bias  # (N, C) @ (C, 3) -> (N, 3), layer by layer
    lesson.proves_equal(5, [sum(parts), summed], [final, logits])
    ours, theirs = [], []
    for k in (0, 31, L - 1):
        less, _, others = overhear(model, points, removed=k)
        later = sum(parts[k + 2 :], 0 * final) - sum(others[k + 1 :], 0 * final)  # parts[0] is what entered
        own, read = parts[k + 1] @ weight.T, later @ weight.T  # (N, 3)
        print(f"layer {k:2}   its own logits {spread(own):.2f}   read from it later {spread(read):.2f}")
        ours += [*others[: k + 1], own + read]
        theirs += [*parts[: k + 1], logits - less]
    lesson.proves_equal(6, ours, theirs)
    deep_median, shallow_median = (torch.tensor(shares).median().item() for shares in missed)
    told = f"{deep_median:.1%}, at worst {min(missed[0]):.1%}; {shallow_median:.1%}"
    lesson.proves(6, deep_median > 0.9 and shallow_median < 0.6, told)

    lesson.heading("Which place can change which: 3 layers")
    T, x = 6, randn(1, 6, 8)  # (B, T, C)
    layers = [Layer(8, *keeping(8)).to(**wide) for _ in range(3)]
    attentions = [MultiHeadAttention(8, 2).to(**wide) for _ in layers]
    causal = causal_mask(T, device=x.device)
    padded = causal & padding_mask(torch.tensor([4], device=x.device), T)  # (T, S) & (B, 1, S) -> (B, T, S)
    back = [lambda x, f=f: f(F.pad(x, (0, 0, 1, -1))) for f in layers]  # place t gets what stood at t - 1
    looks = {}
    for name, join, functions in (
        ("no attention", add, layers),
        ("causal alone", plain, [partial(attentions[0], mask=causal)]),
        ("causal", add, [partial(f, mask=causal) for f in attentions] + layers),
        ("padded", add, [partial(f, mask=padded) for f in attentions] + layers),
        ("one back", add, back),
        ("…, plain", plain, back),
    ):
        looks[name] = influence(lambda x, f=functions, join=join: through(x, f, join)[-1], x)
    print("   ".join(f"{name:12}" for name in looks).rstrip())
    for lines in zip(*map(rows, looks.values()), strict=True):
        print("   ".join(f"{line:12}" for line in lines).rstrip())
    past, own = torch.ones(T, T, dtype=torch.long).tril(), torch.eye(T, dtype=torch.long)
    real = (torch.arange(T) < 4).long()  # 1 where there is no padding
    added, moved = [past, past * real + own * (1 - real), past.triu(-3)], past.tril(-3).triu(-3)
    lesson.proves_equal(7, list(looks.values()), [own, past, *added, moved])

    figure, (depths, removals) = plt.subplots(1, 2, figsize=(6.6, 3.7), layout="constrained")
    for name in (small, sized, doubled, normal, mended):
        signal, gradient = curves[name]
        (line,) = depths.semilogy(signal, label=name)
        depths.semilogy(gradient, "--", color=line.get_color())
    depths.set(xlabel="layer", ylabel="spread: signal —, gradient - -", title=f"{L} new layers")
    removals.plot(missed[0], ".", label=f"{L} layers that add")
    removals.plot(missed[1], ".", label="8 plain layers")
    removals.axhline(1 / 3, color="black", linestyle=":", label="chance")
    removals.legend(loc="center right", fontsize="small")
    removals.set(xlabel="removed layer", ylabel="share right", title="after training", ylim=(0, 1.05))
    figure.legend(handles=depths.lines[::2], loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle("Layers that add let signals through, and no layer is the only way", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
