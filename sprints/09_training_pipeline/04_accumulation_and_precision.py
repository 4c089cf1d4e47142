"""Accumulation and precision: a batch in parts, numbers of 16 bits, and what is lost with either.

Run:     uv run sprints/09_training_pipeline/04_accumulation_and_precision.py      (8 s on two cores)
Proves:  1. gradients of parts, each over the tokens of the whole batch, add up to the gradient of the batch;
            the lab's training in 1, 2 and 4 parts ends at the same weights
         2. undivided, K parts give K times the gradient, and AdamW hides it; a mean of K means counts each
            token of a part of n, out of N tokens, N/(K·n) times
         3. sign, exponent and mantissa give the value of every bfloat16 and float16, and of a million float32
         4. bfloat16 is float32 rounded to its upper half; a weight loses updates of less than half a unit in
            the last place, and no larger ones
         5. autocast equals casting by hand: products in bfloat16; weights, gradients and loss in float32
         6. float16 turns gradients to 0 that a scaled loss keeps, until the scale is too large
         7. bfloat16's products err 1,000 times as much; under autocast a training still ends within 1 % of
            float32, and with bfloat16 weights at a low rate over 0.05 nats above it
Shapes:  B windows of T tokens in K parts, V different ones; F features, D hidden numbers
Writes:  results/09_training_pipeline/04_accumulation_and_precision.png
Note:    notes/04_accumulation_and_precision.md
"""

from collections.abc import Iterable
from copy import deepcopy

from lab import stories
from lab.gpt import GPT, initialise
from lab.lesson import Lesson, run
from lab.stream import Pieces, Stream
from lab.tokenizer import END, Tokenizer
from lab.training import Settings, Training, adamw
from lab.transformer import EncoderBlock

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

V, T = 512, 32
FORMATS = {torch.float32: (8, 23), torch.bfloat16: (8, 7), torch.float16: (5, 10)}  # exponent, mantissa
RUNS = ((16, 100, 1e-2), (4, 300, 1e-3))  # windows, steps, learning rate


def loss_of(model: nn.Module, part: Iterable[Tensor], reduction: str = "mean") -> Tensor:
    """Of the tokens whose target is not -100, which marks padding: two (B, T) -> ()."""
    inputs, targets = part
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction=reduction)  # (B·T, V)


def gradients(model: nn.Module, losses: Iterable[Tensor]) -> list[Tensor]:
    """A backward pass for each of the losses, one after the other; .grad adds up by itself."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return [weight.grad.clone() for weight in model.parameters()]


def accumulated(model: nn.Module, parts: list) -> list[Tensor]:
    """What the whole batch would give: the sum of each part over the number of tokens in all of them."""
    N = sum((targets >= 0).sum() for _, targets in parts)
    return gradients(model, (loss_of(model, part, "sum") / N for part in parts))


def in_parts(batch: Iterable[Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T) -> the same of each part, (size, T)."""
    return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))


def kept(model: nn.Module, part: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, the weights themselves not counted."""
    weights, found = {weight.data_ptr() for weight in model.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, part)  # its memory is not used again before all is counted
    return sum(size for place, size in found.items() if place not in weights)


def row(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def adam_step(model: nn.Module, given: list[Tensor]) -> Tensor:
    """How far the first step of AdamW would move each weight with these gradients, in one row."""
    moved = deepcopy(model)
    for weight, gradient in zip(moved.parameters(), given, strict=True):
        weight.grad = gradient
    adamw(moved, Settings(B=1, steps=1)).step()
    return row(moved.parameters()) - row(model.parameters())


def share_off(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def decode(bits: Tensor, exponent: int, mantissa: int) -> Tensor:
    """The value of whole numbers read as floats, as IEEE 754 defines it; NaN where it is no number."""
    bits = bits.long() & (1 << (1 + exponent + mantissa)) - 1  # no longer negative
    sign, bias = 1 - 2 * (bits >> exponent + mantissa).double(), 2 ** (exponent - 1) - 1
    e, m = bits >> mantissa & (1 << exponent) - 1, (bits & (1 << mantissa) - 1).double() / 2**mantissa
    value = torch.ldexp(torch.where(e == 0, m, 1 + m), e.clamp(min=1) - bias)  # e = 0: no hidden 1
    return sign * torch.where(e == 2**exponent - 1, torch.where(m == 0, torch.inf, torch.nan), value)


def limits(exponent: int, mantissa: int) -> list[float]:
    """The largest number, the least with a hidden 1, the least of all, the unit in the last place of 1."""
    bias, unit = 2 ** (exponent - 1) - 1, 2.0**-mantissa
    return [(2 - unit) * 2.0**bias, 2.0 ** (1 - bias), unit * 2.0 ** (1 - bias), unit]


def upper_half(x: Tensor) -> Tensor:
    """float32 -> bfloat16 in whole numbers: to the nearest, and half-way to the even one."""
    bits = x.view(torch.int32).long()
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).to(torch.int16).view(torch.bfloat16)


def mixed(x: Tensor, weights: list[Tensor], targets: Tensor) -> Tensor:
    """Two layers as autocast computes them: what is multiplied is cast, the loss is not. (B, F) -> ()."""
    w1, b1, w2, b2 = (weight.to(torch.bfloat16) for weight in weights)
    hidden = F.gelu(F.linear(x.to(torch.bfloat16), w1, b1))  # (B, D)
    return F.cross_entropy(F.linear(hidden, w2, b2).float(), targets)


def dtypes(model: GPT, batch: list[Tensor]) -> dict[str, set[torch.dtype]]:
    """What a step of training under bfloat16 autocast computes and keeps, in which types."""
    found = {name: set() for name in ("linear layers", "norms", "residual stream")}
    for name, kind in zip(found, (nn.Linear, nn.LayerNorm, EncoderBlock), strict=True):
        for module in (module for module in model.modules() if isinstance(module, kind)):
            module.register_forward_hook(lambda _, __, y, name=name: found[name].add(y.dtype))
    with torch.autocast(batch[0].device.type, torch.bfloat16):
        loss = loss_of(model, batch)
    loss.backward()
    optimizer = adamw(model, Settings(B=1, steps=1))
    optimizer.step()
    found |= {"loss": {loss.dtype}, "weights": {weight.dtype for weight in model.parameters()}}
    found["gradients"] = {weight.grad.dtype for weight in model.parameters()}
    return found | {"AdamW's means": {state["exp_avg"].dtype for state in optimizer.state.values()}}


def build(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(V=V, T=T, C=32, H=2, L=1)
    initialise(model, std=0.1)
    return model


def picture(curves: dict[str, list[float]], rate: float) -> Figure:
    """How far apart the numbers of each format lie, and a training in each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    figure.suptitle("bfloat16 reaches as far as float32, in steps 65,536 times as coarse", fontsize="medium")
    for dtype, (exponent, mantissa) in FORMATS.items():
        largest, normal, least, unit = limits(exponent, mantissa)
        left.loglog([least, normal, largest], [1, unit, unit], label=str(dtype)[6:])
    left.set(xlabel="number", ylabel="distance to the next, as a share", xticks=[1e-40, 1e-20, 1, 1e20])
    for (name, curve), style in zip(curves.items(), ("-", ":", "-"), strict=True):
        right.plot(range(5, len(curve), 10), torch.tensor(curve).view(-1, 10).mean(-1), style, label=name)
    right.set(xlabel=f"optimiser step, rate {rate}", ylabel="loss")
    left.legend(loc=(0.45, 0.12)), right.legend()
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw, device, exact = torch.Generator().manual_seed(lesson.seed), lesson.device, lesson.float64_device
    documents = [story.text for story in stories.write(lesson.seed, 200_000)]
    tokenizer = Tokenizer.learn(documents, V)
    tokens = np.array([t for text in documents for t in (*tokenizer.encode(text), tokenizer.special[END])])
    stream, rest = (Stream(part, T, lesson.seed) for part in np.split(tokens, [len(tokens) * 9 // 10]))
    pieces = Pieces(stream.tokens, tokenizer.special[END], T, lesson.seed)  # not all equally long

    lesson.heading("12 windows in parts")
    model, batch = build(lesson.seed).to(exact, torch.float64), [x.to(exact) for x in stream.batch(0, 12)]
    whole, ours, theirs, ends = gradients(model, [loss_of(model, batch)]), [], [], []
    for sizes in ([12], [4, 4, 4], [7, 4, 1]):
        parts = in_parts(batch, sizes)
        ours, theirs = [*ours, accumulated(model, parts)], [*theirs, whole]
        print(
            f"parts of {sizes!s:10} keep for backward", *(f"{kept(model, part):,}" for part in parts), "bytes"
        )
    for K in (1, 2, 4):
        settings, model64 = Settings(B=4, steps=3, accumulate=K), build(lesson.seed).double()
        ends.append([*Training(model64, pieces, settings, exact).run(), *model64.parameters()])
    lesson.proves_equal(1, [ours, ends[1], ends[2]], [theirs, ends[0], ends[0]])

    lesson.heading("Two mistakes, in 3 parts")
    parts, K, targets = in_parts(batch, [4, 4, 4]), 3, batch[1].clone()
    undivided = gradients(model, (loss_of(model, part) for part in parts))
    apart = share_off(adam_step(model, undivided), adam_step(model, whole))
    print(f"not divided by {K}: {K} times the gradient, AdamW's first step differs by {apart:.2%}")
    for window, real in enumerate((32, 32, 32, 32, 8, 8, 8, 8, 2, 2, 2, 2)):
        targets[window, real:] = -100  # padding after a text of so many tokens
    parts = in_parts((batch[0], targets), [4, 4, 4])
    counts = [(wanted >= 0).sum().item() for _, wanted in parts]
    times = [sum(counts) / (K * n) for n in counts]  # N / (K·n)
    means = gradients(model, (loss_of(model, part) / K for part in parts))
    sums = (loss_of(model, part, "sum") / sum(counts) for part in parts)
    weighted = gradients(model, (w * part for w, part in zip(times, sums, strict=True)))
    right = gradients(model, [loss_of(model, (batch[0], targets))])
    off = share_off(row(means), row(right))
    print(
        f"{counts} tokens: a mean of means counts each", *(f"{w:.2f}" for w in times), f"times: {off:.0%} off"
    )
    ours, theirs = [undivided, means], [[K * gradient for gradient in whole], weighted]
    lesson.proves_equal(2, [*ours, accumulated(model, parts)], [*theirs, right])
    lesson.proves(2, apart < 0.02 and off > 0.2, "only the gradient shows it")

    lesson.heading("What the bits say")
    ours, theirs, found, known = [], [], [], []
    print("         exponent  mantissa       largest hidden 1 from      smallest     unit of 1")
    for dtype, (exponent, mantissa) in FORMATS.items():
        size = 1 << (1 + exponent + mantissa)
        kind = torch.int16 if size == 2**16 else torch.int32
        bits = torch.arange(size) if size == 2**16 else torch.randint(size, (1_000_000,), generator=draw)
        bits = torch.where(bits < size // 2, bits, bits - size).to(kind)
        pair = decode(bits, exponent, mantissa), bits.view(dtype).double()
        ours, theirs = ([*all, x.nan_to_num(0.3)] for all, x in zip((ours, theirs), pair, strict=True))
        info, least = torch.finfo(dtype), torch.ones(1, dtype=kind).view(dtype).item()
        found, known = [*found, limits(exponent, mantissa)], [*known, [info.max, info.tiny, least, info.eps]]
        print(f"{str(dtype)[6:]:8}{exponent:9}{mantissa:10}", *(f"{number:13.4g}" for number in found[-1]))
    lesson.proves_equal(3, [*ours, found], [*theirs, known], tolerance=0.0)

    lesson.heading("bfloat16 weights lose small updates")
    x = torch.randn(1_000_000, generator=draw) * 10.0 ** torch.randint(-30, 30, (1_000_000,), generator=draw)
    ours, theirs = (half.view(torch.int16) for half in (upper_half(x), x.to(torch.bfloat16)))
    weights = torch.arange(2**13, 2**14 + 2**13, dtype=torch.int16).view(torch.bfloat16)
    unit = 2.0 ** (weights.double().log2().floor() - 7)  # in the last place of each
    updates = [(unit * share).to(torch.bfloat16).to(device) for share in (127 / 256, 129 / 256)]
    lost = [(weights.to(device) + update == weights.to(device)).float().mean().item() for update in updates]
    narrow, wide = torch.ones((), dtype=torch.bfloat16), torch.ones(())
    for _ in range(900):
        narrow, wide = narrow - 0.001, wide - 0.001
    print(f"900 updates of -0.001 leave a 1 in bfloat16 at {narrow:.3f}, and one in float32 at {wide:.3f}")
    lesson.proves_equal(4, [ours, lost], [theirs, [1.0, 0.0]])

    lesson.heading("Autocast")
    ours, theirs = [], []
    for B, features, D, classes in ((1, 3, 5, 2), (7, 33, 17, 10), (64, 48, 128, 11)):
        net = nn.Sequential(nn.Linear(features, D), nn.GELU(), nn.Linear(D, classes)).to(device)
        x = torch.randn(B, features, generator=draw).to(device)
        y = torch.randint(classes, (B,), generator=draw).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            theirs.append(F.cross_entropy(net(x), y))
        ours.append(mixed(x, list(net.parameters()), y))
        for losses in (ours, theirs):
            losses += torch.autograd.grad(losses[-1], net.parameters())
    lesson.proves_equal(5, ours, theirs, tolerance=1e-6)
    types = dtypes(build(lesson.seed).to(device), [x.to(device) for x in stream.batch(0, 12)])
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{str(dtype)[6:]:9}", ", ".join(name for name, found in types.items() if found == {dtype}))
    del types["norms"]  # one way or the other, as the device prefers
    held = types.pop("linear layers") == {torch.bfloat16} and set.union(*types.values()) == {torch.float32}
    lesson.proves(5, held, "the same in a GPT")

    lesson.heading("float16 and a scaled loss")
    model = build(lesson.seed)
    list(Training(model, stream, Settings(*RUNS[0]), device).run())
    batch = [x.to(device) for x in stream.batch(5_000, 16)]
    true, errors, zeros = row(gradients(model, [loss_of(model, batch)])), [], []
    for power in (0, 12, 24):
        with torch.autocast(device.type, torch.float16):
            logits = model(batch[0])  # (B, T, V)
            logits.retain_grad()
            loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        errors.append(share_off(row(gradients(model, [loss * 2**power])) / 2**power, true))
        zeros.append((logits.grad == 0).float().mean().item())
        shown = f"{zeros[-1]:5.1%} of the logits' gradients are 0"
        print(f"loss × 2^{power:<2}   {shown}, those of the weights {errors[-1]:.2%} off")
    lesson.proves(6, zeros[0] > 0.05 > 0.01 > zeros[1] and errors[1] < 0.8 * errors[0] and not errors[2] < 1)

    lesson.heading("What it costs in the end")
    a, b = (torch.randn(256, 256, generator=draw) for _ in range(2))
    products = [(a.to(device, dtype) @ b.to(device, dtype)).cpu().double() for dtype in FORMATS]
    wrong = [share_off(product, a.double() @ b.double()) for product in products]
    print("a product of 256 × 256 is off by {:.1e}, in bfloat16 {:.1e}, in float16 {:.1e}".format(*wrong))
    held_out, ends, curves = [x.to(device) for x in rest.batch(0, 128)], {}, {}
    for B, steps, rate in RUNS:
        told = []
        for name in ("float32", "autocast", "bfloat16 weights"):
            model = build(lesson.seed).to(torch.bfloat16 if "weights" in name else torch.float32)
            precision = "bfloat16" if name == "autocast" else "float32"
            training = Training(model, stream, Settings(B, steps, rate, precision=precision), device)
            curves[name] = list(training.run())
            ends[rate, name] = loss_of(model.float(), held_out).item()
            told.append(f"{name} {ends[rate, name]:.3f} in {training.seconds:.1f} s")
        print(f"held out, at a rate of {rate:g}:", "   ".join(told))
    same = max(abs(ends[rate, "autocast"] / ends[rate, "float32"] - 1) for *_, rate in RUNS)
    more, worse = wrong[1] / wrong[0], ends[1e-3, "bfloat16 weights"] - ends[1e-3, "float32"]
    held = more > 1000 and same < 0.01 and worse > 0.05
    lesson.proves(7, held, f"{more:,.0f} times, {same:.2%} and {worse:.2f} nats")
    lesson.save(picture(curves, rate))


if __name__ == "__main__":
    run(main)
