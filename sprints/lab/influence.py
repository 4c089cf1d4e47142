"""Which inputs can change which outputs: the one thing about a mask that no shape shows.

    looks = influence(attend, x)                     # x (1, S, C) -> looks (T, S)
    print("\\n".join(rows(looks)))                    # ■ where input s can change output t, · where it cannot
    draw(axes, looks, "a causal mask hides what comes later")

The matrix is found twice. Exactly: put something else at one position of the input and compare the whole
output with what it was, bit for bit. By gradient: ask of each output position which inputs have a derivative
that is more than rounding. Where the two differ the matrix says so, and equals none that anyone expects.

Derived in: 06_attention/01_scaled_dot_product
"""

from collections.abc import Callable
from itertools import product

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

NONE, SOME, DISAGREE = 0, 1, -1
MARKS = {NONE: "·", SOME: "■", DISAGREE: "?"}
ROUNDING = 8  # a derivative this many times smaller than rounding makes of the largest one is none
TRIES = 2  # other contents for each position, as one of them might leave an output as it was by accident


def influence(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 0) -> Tensor | tuple[Tensor, ...]:
    """Which positions of each input can change which positions of the output.

    function    takes the inputs, gives (B, T, …)
    inputs      vectors (B, S, …), or the numbers of tokens (B, S); as many as the function takes, such as a
                source and a target, or queries, keys and values; each may have an S of its own
    returns     for each input a matrix (B·T, B·S) of whole numbers: SOME, NONE, or DISAGREE where comparison
                and gradient differ; just the matrix if there is one input. Texts of a batch follow each
                other: a sound function has blocks on the diagonal, and the rest is a leak between texts.

    A token is exchanged for another that occurs in the input; its gradient is taken at the vectors that
    nn.Embedding returns for it. Ask trained networks in float64: in float32 a sum may lose a small weight.
    ValueError if the function is random, as with dropout that is switched on.
    """
    with torch.no_grad():
        before = function(*inputs)
        if not _same(before, function(*inputs)).all():
            raise ValueError("two calls with the same input differ: switch dropout off with .eval()")
        changed = _by_comparison(function, inputs, before, seed)
    with torch.enable_grad():
        steep = _by_gradient(function, inputs, seed)
    rounding = ROUNDING * torch.finfo(steep[0].dtype).eps * torch.cat(steep, dim=1).amax(1, keepdim=True)
    found = tuple(_agreed(exact, slope, rounding).cpu() for exact, slope in zip(changed, steep, strict=True))
    return found if len(found) > 1 else found[0]


def _agreed(changed: Tensor, slope: Tensor, rounding: Tensor) -> Tensor:
    """SOME where the output changed and has a slope, NONE where there is neither but for rounding."""
    found = torch.full(changed.shape, DISAGREE, device=changed.device)
    found[changed & (slope != 0)] = SOME
    found[~changed & (slope <= rounding)] = NONE
    return found


def rows(matrix: Tensor) -> list[str]:
    """A matrix (T, S) as T lines of text."""
    return [" ".join(MARKS[value] for value in row) for row in matrix.tolist()]


def draw(axes: Axes, matrix: Tensor, title: str = "", inputs: str = "input", outputs: str = "output") -> None:
    """A matrix (T, S) as a picture: filled where input s can change output t, orange for DISAGREE."""
    axes.imshow(matrix.numpy(), cmap=ListedColormap(["C1", "white", "C0"]), vmin=DISAGREE, vmax=SOME)
    T, S = matrix.shape
    axes.set_xticks([s - 0.5 for s in range(S + 1)], minor=True)
    axes.set_yticks([t - 0.5 for t in range(T + 1)], minor=True)
    axes.grid(which="minor", color="0.8", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel=f"{inputs} position", ylabel=f"{outputs} position")


def _positions(x: Tensor) -> Tensor:
    """One row of numbers for each position: (B, T, …) -> (B·T, numbers)."""
    return x.reshape(x.shape[0] * x.shape[1], -1)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Whether positions hold the same numbers, NaN being the same as NaN: (B, T, …) twice -> (B·T,)."""
    a, b = _positions(a), _positions(b)
    return ((a == b) | (a.isnan() & b.isnan())).all(1)


def _by_comparison(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], before: Tensor, seed: int
) -> list[Tensor]:
    """Exchange the content of one position, and see which outputs differ in any bit: (B·T, B·S) per input."""
    draw, found = torch.Generator("cpu").manual_seed(seed), []
    for number, given in enumerate(inputs):
        columns = []
        for b, s in product(*map(range, given.shape[:2])):  # one by one: equal shapes make for equal rounding
            changed = []
            for _ in range(TRIES):
                other = given.clone()
                other[b, s] = _another(given, (b, s), draw)
                after = function(*inputs[:number], other, *inputs[number + 1 :])
                changed.append(~_same(after, before))
            columns.append(torch.stack(changed).any(0))
        found.append(torch.stack(columns, dim=1))
    return found


def _another(given: Tensor, place: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Something else for one place: random numbers, or another token of those that occur."""
    if given.is_floating_point():
        return torch.randn(given.shape[2:], generator=draw, device="cpu").to(given)
    others = given[given != given[place]]
    if not len(others):
        raise ValueError("all tokens are alike, so that none can be exchanged for another")
    return others[torch.randint(len(others), (), generator=draw, device="cpu")]


def _by_gradient(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """How far a random mixture of one output's numbers depends on one input's: (B·T, B·S) per input."""
    inputs = [given.detach().clone() for given in inputs]
    leaves: list[list[Tensor]] = [[] for _ in inputs]  # what stands for each input where a gradient is taken
    for given, its in zip(inputs, leaves, strict=True):
        if given.is_floating_point():
            its.append(given.requires_grad_())

    def add_zeros(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        """To the vectors that an embedding returns for tokens, and remember the zeros."""
        for given, its in zip(inputs, leaves, strict=True):
            if isinstance(module, nn.Embedding) and arguments[0] is given:
                its.append(torch.zeros_like(output, requires_grad=True))
                output = output + its[-1]
        return output

    hook = nn.modules.module.register_module_forward_hook(add_zeros)
    try:
        output = _positions(function(*inputs))
    finally:
        hook.remove()
    draw = torch.Generator("cpu").manual_seed(seed)
    mixed = (output * torch.randn(output.shape, generator=draw, device="cpu").to(output)).sum(1)  # (B·T,)
    found = []
    for given, its in zip(inputs, leaves, strict=True):
        slopes = mixed.new_zeros(len(mixed), given.shape[0] * given.shape[1])
        for t, leaf in product(range(len(mixed)), its):
            if mixed.requires_grad:
                (slope,) = torch.autograd.grad(
                    mixed[t], leaf, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                slopes[t] = torch.maximum(slopes[t], _positions(slope).abs().amax(1))
        found.append(slopes)
    return found
