"""Scaled dot-product attention: each query takes a mean of all values, weighted by how well their keys match.

Run:     uv run sprints/06_attention/01_scaled_dot_product.py      (5 s on two cores)
Proves:  1. a loop over queries, one batched product and PyTorch's kernel agree, gradients too, per dtype
         2. influence by hand, by changing one position and by gradient, is what lab.influence finds
         3. each output has a query of its own, and sees all keys and values: a diagonal, two full matrices
         4. scores of random vectors spread like √D, and like 1 once divided by √D
         5. divided, the weights keep their entropy at every width; undivided, they and their slope collapse
         6. the sharper the scores, the nearer the mean comes to a look-up, and in the limit it is a dict's
Shapes:  B batch, H heads, T queries, S keys, D width of a head
Writes:  results/06_attention/01_scaled_dot_product.png
Note:    notes/01_scaled_dot_product.md
"""

import math
from collections.abc import Callable

from lab.influence import influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((1, 1, 1, 1, 1), (1, 2, 3, 5, 4), (2, 1, 7, 3, 9), (3, 2, 1, 6, 5))  # B, H, T, S, D
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
PLACES = ((4, 6, 3), (5, 2, 7), (3, 3, 1))  # T, S, D
WIDTHS, KEYS = (4, 16, 64, 256, 1024), 64
LEGS = {"snake": 0, "hen": 2, "cat": 4, "bee": 6, "spider": 8}
SHARPNESS = (0, 3, 10, 30, 100, 10**5)


def attention_by_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula read aloud, one query at a time: q (T, D), k and v (S, D) -> (T, D)."""
    output = []
    for query in q:
        scores = [query @ key / math.sqrt(len(key)) for key in k]  # S numbers
        weights = [score.exp() for score in scores]
        output.append(sum(w * value for w, value in zip(weights, v, strict=True)) / sum(weights))
    return torch.stack(output)


def every_head_by_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The loop for each head of each text: (B, H, T, D) and twice (B, H, S, D) -> (B, H, T, D)."""
    heads = zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True)  # (B, H, T, D) -> (B·H, T, D)
    return torch.stack([attention_by_loop(*head) for head in heads]).view_as(q)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All queries at once: softmax(q kᵀ / √D) v. q (…, T, D), k and v (…, S, D) -> (…, T, D)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (…, T, S)
    return scores.softmax(-1) @ v


def influence_by_hand(
    function: Callable[..., Tensor], inputs: list[Tensor], number: int, draw: torch.Generator
) -> Tensor:
    """Which positions of one input can change which outputs: (T, S) of 1, 0, or -1 where two ways differ."""
    before, given, changed = function(*inputs), inputs[number], []
    for s in range(len(given)):
        other = given.clone()
        other[s] = torch.randn(given[s].shape, generator=draw).to(given)  # one position, something else
        after = function(*inputs[:number], other, *inputs[number + 1 :])
        changed.append((after != before).any(-1))  # (T,): which outputs differ in any bit
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    output = output @ torch.randn(output.shape[-1], generator=draw).to(output)  # (T, D) -> (T,)
    slopes = [
        torch.autograd.grad(mixed, leaves[number], retain_graph=True, materialize_grads=True)[0]
        for mixed in output
    ]
    steep = torch.stack([(slope != 0).any(-1) for slope in slopes])  # (T, S)
    changed = torch.stack(changed, dim=1)  # S columns (T,) -> (T, S)
    return torch.where(changed == steep, changed.long(), -1).cpu()


def without_key_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose keys change the output but get no gradient: a mistake that shows in no value."""
    return attention(q, k.detach(), v)


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)

    def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        device = lesson.float64_device if dtype == torch.float64 else lesson.device
        return torch.randn(shape, generator=draw).to(device, dtype)

    lesson.heading("One thing said three ways")
    for dtype in DTYPES:
        ours, slow, theirs = [], [], []
        for B, H, T, S, D in SHAPES:
            q, k, v = (randn(B, H, places, D, dtype=dtype).requires_grad_() for places in (T, S, S))
            slope = randn(B, H, T, D, dtype=dtype) / 8  # the size that a mean over 8 numbers sends back
            ways = {attention: ours, every_head_by_loop: slow, F.scaled_dot_product_attention: theirs}
            for way, found in ways.items():
                output = way(q, k, v)
                found += [output, *torch.autograd.grad(output, (q, k, v), slope)]
        furthest = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
        print(f"{str(dtype)[6:]:9} eps {torch.finfo(dtype).eps:.0e}   furthest from PyTorch {furthest:.0e}")
        lesson.proves_equal(1, [ours, ours], [slow, theirs])

    lesson.heading("Who can change what: queries, keys, values, and keys without a gradient")
    by_hand, by_lab, expected = [], [], []
    for T, S, D in PLACES:
        inputs = [randn(T, D), randn(S, D), randn(S, D)]
        for function in (attention, without_key_gradient):
            by_hand += [influence_by_hand(function, inputs, number, draw) for number in range(3)]
            by_lab += influence(function, *(x[None] for x in inputs))
        own, full = torch.eye(T).long(), torch.ones(T, S).long()
        expected += [own, full, full, own, -full, full]
    for line in zip(*(rows(by_lab[number]) for number in (0, 1, 2, 4)), strict=True):
        print("     ".join(line))
    lesson.proves_equal(2, by_hand, by_lab)
    lesson.proves_equal(3, by_lab, expected)

    lesson.heading("Why divide by √D")
    spread, (entropy, slope) = [], ({"divided by √D": [], "undivided": []} for _ in range(2))
    print(f"    D   spread     √D   entropy divided, undivided (ln {KEYS} = {math.log(KEYS):.2f})   slope")
    for D in WIDTHS:
        scores = randn(100, 20, D, dtype=torch.float32) @ randn(100, KEYS, D, dtype=torch.float32).mT
        spread.append(scores.std().item() / math.sqrt(D))
        for name, divided in (("divided by √D", scores / math.sqrt(D)), ("undivided", scores)):
            w = divided.softmax(-1)  # (100, 20, KEYS)
            entropy[name].append(torch.special.entr(w).sum(-1).mean().item())  # entr(w) = -w ln w
            slope[name].append((w * (1 - w)).sum(-1).mean().item())  # of each weight by its own score
        (a, b), (c, d) = ([part[name][-1] for name in entropy] for part in (entropy, slope))
        print(f"{D:5}   {scores.std():6.2f}  {math.sqrt(D):5.2f}   {a:15.2f} {b:10.2f} {c:23.2f} {d:5.2f}")
    off = max(abs(ratio - 1) for ratio in spread)
    lesson.proves(4, off < 0.05, f"within {off:.1%} at every width")
    flat = max(abs(nats - (math.log(KEYS) - 0.5)) for nats in entropy["divided by √D"])
    held = flat < 0.1 and entropy["undivided"][-1] < 0.3
    held = held and min(slope["divided by √D"]) > 0.9 and slope["undivided"][-1] < 0.15
    lesson.proves(5, held, f"ln {KEYS} - ½ within {flat:.2f} nats at every width")

    lesson.heading("A dictionary that can be differentiated")
    keys = F.normalize(randn(len(LEGS), 64), dim=-1)  # a direction for each animal
    legs = torch.tensor(list(LEGS.values())).to(keys)
    asked = dict(zip(LEGS, keys, strict=True))
    asked |= {"like a hen": asked["hen"] + randn(64) / 16, "hen or cat": asked["hen"] + asked["cat"]}
    queries, names = torch.stack(list(asked.values())), torch.eye(len(LEGS)).to(keys)
    weights = torch.stack([attention(sharp * queries, keys, names) for sharp in SHARPNESS])
    found = weights @ legs  # (sharpness, query, animal) -> (sharpness, query)
    print("sharpness ", "".join(f"{sharp:8}" for sharp in SHARPNESS), "      dict")
    for name, numbers in zip(asked, found.mT.tolist(), strict=True):
        soft, exact = "".join(f"{number:8.3f}" for number in numbers), LEGS.get(name, "KeyError")
        print(f"{name:10} {soft} {exact:>10}")
    own = weights.diagonal(dim1=1, dim2=2)  # (sharpness, animal): the weight of the animal asked for
    held = bool((own.diff(dim=0) >= 0).all()) and abs(found[-1, -1].item() - 3) < 1e-9
    lesson.proves(6, held, "more weight at every step; between two keys their mean, 3")
    wanted = [float(count) for count in [*LEGS.values(), LEGS["hen"]]]
    lesson.proves_equal(6, found[-1, :-1].tolist(), wanted, tolerance=0)

    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    for name, nats in entropy.items():
        left.semilogx(WIDTHS, nats, "o-", base=2, label=name)
    left.axhline(math.log(KEYS), color="black", linestyle=":", label=f"ln {KEYS}: all alike")
    left.set_xticks(WIDTHS, WIDTHS)
    left.set(xlabel="width of a head, D", ylabel="entropy of the weights in nats", ylim=(0, 6))
    left.set_title("Undivided, wide heads see one key")
    left.legend(loc="upper right", fontsize="small")
    sharpness = torch.logspace(-1, 3, 200, dtype=torch.float64)
    curves = [attention(sharp * queries[: len(LEGS)], keys, legs[:, None])[:, 0].cpu() for sharp in sharpness]
    right.semilogx(sharpness, torch.stack(curves))
    for name, count in LEGS.items():
        right.annotate(name, (sharpness[-1], count), (6, 0), textcoords="offset points", va="center")
    right.set(xlabel="sharpness", ylabel="legs found", title="Sharpened, a mean looks up")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
