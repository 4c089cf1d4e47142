"""Tensors: numbers in a row in memory, and a few integers that say how to walk through them.

Run:     uv run sprints/01_setup_and_basics/01_tensors.py      (8 s on two cores)
Proves:  1. halving a step until 1 + step is 1 finds the eps of each float dtype; it counts exactly to 2/eps
         2. writing into a view changes the tensor it was made from, writing into a copy does not
         3. element [i, j, …] of a view lies in the storage at offset + i·stride[0] + j·stride[1] + …
         4. view(-1) is refused, and reshape(-1) copies, exactly where the strides do not chain
         5. broadcasting by hand gives torch's shapes, strides, values and refusals on 500 random pairs
         6. einsum, matmul and reductions equal plain loops
         7. NumPy and PyTorch write into the same memory; a trip to the device and back changes no bit
Shapes:  B batch, T positions, C channels, H hidden
Writes:  results/01_setup_and_basics/01_tensors.png
Note:    notes/01_tensors.md
"""

from collections.abc import Callable
from functools import reduce
from itertools import pairwise, product
from operator import mul

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 1, 1, 1, 2, 2, 3)  # what random shapes are drawn from; 1 is the size that stretches


def shares_memory(source: Tensor, other: Tensor) -> bool:
    """Whether `source` changes when one number of `other` does; both are left as they were."""
    before, first = source.clone(), (0,) * other.ndim
    other[first] += 1
    changed = not torch.equal(source, before)
    other[first] -= 1
    return changed


def attempt(function: Callable, *arguments: object) -> object:
    """What the call returns, or None where it is refused."""
    try:
        return function(*arguments)
    except (RuntimeError, ValueError):
        return None


def addresses(view: Tensor) -> Tensor:
    """Where each element lies in the storage: whole numbers, in the shape of the view."""
    indices = product(*map(range, view.shape))  # (0, 0), (0, 1), … in row order
    found = [view.storage_offset() + sum(map(mul, index, view.stride())) for index in indices]
    return torch.tensor(found, dtype=torch.long, device=view.device).view(view.shape)


def chains(view: Tensor) -> bool:
    """Whether one stride leads through it all: each is the size times the stride to its right."""
    steps = [(size, stride) for size, stride in zip(view.shape, view.stride(), strict=True) if size > 1]
    return all(stride == size * right for (_, stride), (size, right) in pairwise(steps))


def broadcast(*tensors: Tensor) -> list[Tensor]:
    """The tensors as views of one common shape; ValueError if there is none."""
    ndim = max(x.ndim for x in tensors)
    padded = [[1] * (ndim - x.ndim) + list(x.shape) for x in tensors]  # shapes are aligned on the right
    shape = []
    for sizes in zip(*padded, strict=True):
        wanted = set(sizes) - {1}
        if len(wanted) > 1:
            raise ValueError(f"sizes {sizes} differ, and neither is 1")
        shape.append(wanted.pop() if wanted else 1)
    stretched = []
    for sizes, x in zip(padded, tensors, strict=True):
        strides = [0] * (ndim - x.ndim) + list(x.stride())
        strides = [0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)]
        stretched.append(x.as_strided(shape, strides))  # stride 0: the walk stays where it is
    return stretched


def einsum(equation: str, *tensors: Tensor) -> Tensor:
    """For all values of all letters: multiply what the inputs hold there, add it to the output there."""
    inputs, output = equation.split("->")
    inputs, sizes = inputs.split(","), {}
    for letters, x in zip(inputs, tensors, strict=True):
        sizes |= dict(zip(letters, x.shape, strict=True))
    result = torch.zeros([sizes[letter] for letter in output], device=tensors[0].device)
    for index in product(*map(range, sizes.values())):
        at = dict(zip(sizes, index, strict=True))  # {"t": 0, "c": 2, …}
        factors = [x[tuple(map(at.get, letters))] for letters, x in zip(inputs, tensors, strict=True)]
        result[tuple(map(at.get, output))] += reduce(mul, factors)
    return result


def random_tensor(draw: torch.Generator) -> Tensor:
    """Up to four dimensions, turned around so that its strides are not those of a fresh tensor."""
    ndim = int(torch.randint(5, (), generator=draw))
    shape = [SIZES[i] for i in torch.randint(len(SIZES), (ndim,), generator=draw)]
    return torch.rand(shape, generator=draw).permute(list(reversed(range(ndim))))


def picture() -> Figure:
    """Five tensors over one storage of six numbers: the address of each element, and the walk."""
    x = torch.arange(6).view(2, 3)
    views = {"x": x, "x.T": x.T, "x[:, ::2]": x[:, ::2]}
    views |= {"row × 3": x[0].expand(3, 3), "column × 3": x[:, :1].expand(2, 3)}
    figure, axes = plt.subplots(2, 5, figsize=(6, 3.4), layout="constrained")
    for (name, view), (grid, path) in zip(views.items(), axes.T, strict=True):
        found, (down, right) = addresses(view), view.stride()
        grid.imshow(found, vmin=-4, vmax=5)
        for (i, j), address in np.ndenumerate(found):
            grid.text(j, i, str(address), ha="center", va="center")
        grid.set(xlim=(-0.5, 2.5), ylim=(2.5, -0.5), xticks=[], yticks=[], xlabel=name)
        grid.set_title(f"+{right} →", fontsize="small")
        grid.set_ylabel(f"+{down}\n↓", fontsize="small", rotation=0, ha="right", va="center")
        grid.spines[:].set_visible(False)
        path.plot(found.flatten(), color="grey", zorder=1)
        path.scatter(range(view.numel()), found.flatten(), c=found.flatten(), vmin=-4, vmax=5)
        path.set(xlabel="element", ylabel="address", xlim=(-1, 9), ylim=(-1, 6), yticks=range(6))
        path.label_outer()
    figure.suptitle("One storage, five ways through it: stride 0 reads a number again", size="medium")
    return figure


def main(lesson: Lesson) -> None:
    draw = torch.Generator().manual_seed(lesson.seed)

    lesson.heading("Creation and dtypes")
    whole, real = torch.tensor([1, 2]), torch.full((2,), 0.5)
    print(f"tensor([1, 2]) {whole.dtype}   full((2,), 0.5) {real.dtype}   sum {(whole + real).dtype}")
    ours, theirs = [], []
    for dtype in FLOATS:
        one = eps = torch.ones((), dtype=dtype, device=lesson.float64_device)
        while one + eps / 2 != one:
            eps = eps / 2
        last = 2 / eps
        ours += [eps.item(), (last - 1 != last).item(), (last + 1 == last).item()]
        theirs += [torch.finfo(dtype).eps, True, True]
        print(f"{dtype!s:14} {dtype.itemsize} bytes   eps {eps:.2e}   counts to {int(last):,}")
    lesson.proves_equal(1, ours, theirs, tolerance=0.0)

    lesson.heading("Views and copies of x = arange(24).view(4, 6)")
    storage = torch.arange(24.0).to(lesson.device)
    x = storage.view(4, 6)  # (24,) -> (4, 6)
    views = {"x[1]": x[1], "x[:, 1::2]": x[:, 1::2], "x[:, 1:4]": x[:, 1:4], "x.T": x.T}
    views["x[1].expand(3, 6)"] = x[1].expand(3, 6)  # (6,) -> (3, 6)
    views["x[:, 2:3].squeeze(1)"] = x[:, 2:3].squeeze(1)  # (4, 1) -> (4,)
    views["x.view(2, 2, 6).permute(2, 0, 1)"] = x.view(2, 2, 6).permute(2, 0, 1)  # -> (6, 2, 2)
    copies = {"x[[2, 0]]": x[[2, 0]], "x[x > 9]": x[x > 9], "x.T.clone()": x.T.clone()}
    copies["x.T.contiguous()"] = x.T.contiguous()
    shared, chained, flat, same = [], [], [], []
    for name, tensor in (views | copies).items():
        shared.append(shares_memory(x, tensor))
        chained.append(chains(tensor))
        flat.append(attempt(tensor.view, -1) is not None)
        same.append(shares_memory(tensor, tensor.reshape(-1)))
        kind, answer = "view" if shared[-1] else "copy", "works" if flat[-1] else "refused"
        walk = f"{tuple(tensor.shape)!s:10}strides {tensor.stride()!s:11}offset {tensor.storage_offset()}"
        print(f"{name:33}{kind}  {walk}  view(-1) {answer}")
    expected = [True] * len(views) + [False] * len(copies)
    lesson.proves(2, shared == expected, f"{len(views)} views, {len(copies)} copies")
    lesson.proves_equal(3, list(views.values()), [storage[addresses(view)] for view in views.values()])
    lesson.proves_equal(4, [chained, chained], [flat, same])

    lesson.heading("Broadcasting")
    column, row = torch.tensor([[10.0], [20.0]]), torch.tensor([1.0, 2.0, 3.0])
    for x, stretched in zip((column, row), torch.broadcast_tensors(column, row), strict=True):
        print(f"{list(x.shape)!s:7} stretched to {list(stretched.shape)} with strides {stretched.stride()}")
    print(f"their sum is {(column + row).tolist()}")
    ours, theirs = [], []
    for _ in range(500):
        pair = [random_tensor(draw).to(lesson.device) for _ in range(2)]
        for answers, stretch in ((ours, broadcast), (theirs, torch.broadcast_tensors)):
            stretched = attempt(stretch, *pair) or []
            answers.append([*stretched, *map(addresses, stretched)])
    print(f"500 random pairs: {500 - ours.count([])} fit, {ours.count([])} are refused")
    lesson.proves_equal(5, ours, theirs)

    lesson.heading("Products and reductions")
    x, w = (torch.randn(shape, generator=draw).to(lesson.device) for shape in ((2, 3, 4), (4, 5)))
    sums = {"tc,ch->th": (x[0], w), "btc,ch->bth": (x, w), "btc,bsc->bts": (x, x), "tc->ct": (x[0],)}
    sums |= {"t,h->th": (w[0], w[1]), "tt->t": (w[:, :4],), "tc->t": (x[0],), "tc->": (x[0],)}
    ours = [einsum(equation, *factors) for equation, factors in sums.items()]
    theirs = [torch.einsum(equation, *factors) for equation, factors in sums.items()]
    print("   ".join(f"{e} {list(y.shape)}" for e, y in zip(sums, ours, strict=True)))
    total, largest = reduce(torch.add, x.unbind(-1)), reduce(torch.maximum, x.unbind(-1))  # (B, T) each
    ours += [ours[1], ours[6], total, total[..., None] / 4, largest]
    theirs += [x @ w, x[0].sum(1), x.sum(-1), x.mean(-1, keepdim=True), x.amax(-1)]
    lesson.proves_equal(6, ours, theirs)

    lesson.heading("NumPy and devices")
    array = np.zeros(3)
    tensor, copied = torch.from_numpy(array), torch.tensor(array)
    array[0], tensor[1] = 1, 2
    tensor.numpy()[2] = 3
    print(f"array {array.tolist()}   from_numpy() {tensor.tolist()}   tensor() {copied.tolist()}")
    there = x.cpu().to(lesson.device, copy=True)
    same = there.to(lesson.device) is there
    trip = "only the CPU here" if lesson.device.type == "cpu" else f"cpu -> {there.device.type} -> cpu"
    print(f"{trip}; to() where a tensor already is returns the tensor itself: {same}")
    trips = [[*array.tolist(), *tensor.tolist()], there.cpu()]
    lesson.proves_equal(7, trips, [[1.0, 2.0, 3.0] * 2, x.cpu()], tolerance=0.0)
    lesson.save(picture())


if __name__ == "__main__":
    run(main)
