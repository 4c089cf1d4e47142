"""Autograd from scratch: an engine of about 50 lines that finds the gradients that PyTorch finds.

Run:     uv run sprints/01_setup_and_basics/02b_autograd_from_scratch.py      (8 s on two cores)
Proves:  1. a number that is used twice receives both contributions: the sum over its paths to the result
         2. in 400 random expressions the value and its gradient equal PyTorch's
         3. a second backward() adds the same gradient again, as PyTorch's does
         4. a chain of 30,000 operations, too deep for recursion, has PyTorch's value and gradient
Writes:  results/01_setup_and_basics/02b_autograd_from_scratch.png
Note:    notes/02b_autograd_from_scratch.md
"""

import math
from collections import defaultdict
from collections.abc import Callable

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch


def function(f: Callable[[float], float], slope: Callable[[float], float]) -> Callable[["Value"], "Value"]:
    """An operation on one value, made of a function of a number and the derivative of that function."""
    return lambda x: Value(f(x.data), (x, slope(x.data)))


class Value:
    """A number, with an arrow from each number that it was made from: (parent, slope = derivative by it)."""

    def __init__(self, data: float, *arrows: tuple["Value", float]) -> None:
        self.data, self.arrows, self.grad = data, arrows, 0.0
        self.depth = 1 + max((parent.depth for parent, _ in arrows), default=0)

    def __add__(self, other: "Value | float") -> "Value":
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, 1.0), (other, 1.0))

    def __mul__(self, other: "Value | float") -> "Value":
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other.data), (other, self.data))

    def __pow__(self, k: float) -> "Value":
        return Value(self.data**k, (self, k * self.data ** (k - 1)))

    exp = function(math.exp, math.exp)
    log = function(math.log, lambda x: 1 / x)
    tanh = function(math.tanh, lambda x: 1 - math.tanh(x) ** 2)
    relu = function(lambda x: max(x, 0.0), lambda x: float(x > 0))

    def graph(self) -> list["Value"]:
        """This value and every one behind it, deepest first: each comes before all that it was made from."""
        found, unseen = {self: True}, [self]
        while unseen:
            new = [parent for parent, _ in unseen.pop().arrows if parent not in found]
            found.update(dict.fromkeys(new))
            unseen += new
        return sorted(found, key=lambda value: value.depth, reverse=True)

    def backward(self) -> None:
        """Add to the .grad of each value in the graph the derivative of this value by that one."""
        arrived = defaultdict(float, {self: 1.0})
        for value in self.graph():  # all that was made from it came before, so its gradient is complete
            value.grad += arrived[value]
            for parent, slope in value.arrows:
                arrived[parent] += slope * arrived[value]


def paths(result: Value, start: Value) -> list[float]:
    """The chain rule taken literally: for each path between the two, the product of the slopes along it."""
    if result is start:
        return [1.0]
    return [slope * rest for parent, slope in result.arrows for rest in paths(parent, start)]


def expression(x: list, seed: int) -> Value | torch.Tensor:
    """Twelve random steps; each takes the newest value and any value, so that many are used again."""
    draw, values = torch.Generator().manual_seed(seed), [*x]
    for _ in range(12):
        a, b = values[-1], values[torch.randint(len(values), (), generator=draw)]
        bent = (a**2 + 1).log() + b * -2, b * a.tanh().exp(), a.relu() + b**3 * (b**2 + 1) ** -1
        values.append((a + b, a * b.tanh(), *bent)[torch.randint(5, (), generator=draw)])
    return values[-1]


def chain(x: list, steps: int) -> Value | torch.Tensor:
    """One number, again and again; a step is three operations and uses the number twice."""
    y = x[0]
    for _ in range(steps):
        y = y + y.tanh() * 1e-4
    return y


def both(lesson: Lesson, f: Callable, x: list[float], how: int) -> tuple[list[float], list[float]]:
    """f(x, how), its gradient after one backward(), and after two: by our engine, and by PyTorch."""
    ours = [Value(number) for number in x]
    theirs = torch.tensor(x, dtype=torch.float64, device=lesson.float64_device, requires_grad=True)
    y, z = f(ours, how), f([*theirs], how)
    found = [y.data], [z.item()]
    for _ in range(2):
        y.backward(), z.backward(retain_graph=True)
        found[0].extend(value.grad for value in ours), found[1].extend(theirs.grad.tolist())
    return found


def picture(graph: dict[Value, tuple[str, float]]) -> plt.Figure:
    """Each value with its name, at its depth and a height, and its arrows with their slopes."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.set(xlim=(0.6, 5.4), ylim=(-0.2, 1.2), title="Each arrow sends back slope × the gradient at its tip")
    axes.axis("off")
    boxes, frame = {}, {"boxstyle": "round", "facecolor": "white", "edgecolor": "C0"}
    for value, (name, y) in graph.items():
        text = f"{name}\nvalue {value.data:g}\ngrad {value.grad:g}"
        boxes[value] = axes.text(value.depth, y, text, ha="center", va="center", bbox=frame).get_bbox_patch()
        for parent, slope in value.arrows:
            x, low = parent.depth, graph[parent][1]
            arrow = {"arrowstyle": "->", "patchA": boxes[parent], "patchB": boxes[value]}
            axes.annotate("", (value.depth, y), (x, low), arrowprops=arrow)
            side = "center" if y == low else "right" if y > low else "left"
            middle = (x + value.depth) / 2, (low + y) / 2 + 0.01
            axes.text(*middle, f"{slope:g}", ha=side, va="bottom", color="C4")
    return figure


def main(lesson: Lesson) -> None:
    lesson.heading("A number used twice")
    a, b, start = Value(4.0), Value(2.0), Value(0.5)
    product, inverse = a * b, b**-1
    total = product + a
    square = total**2
    y, end = square * inverse, chain([start], 12)
    y.backward(), end.backward()
    for name, x in (("a", a), ("b", b)):
        print(f"{name} = {x.data:g}   dy/d{name} = {x.grad:g}, along its paths {paths(y, x)}")
    arrows = sum(len(value.arrows) for value in end.graph())
    print(f"12 reuses in a row: {len(paths(end, start)):,} paths, but only {arrows} arrows")
    pairs = ((y, a), (y, b), (end, start))
    lesson.proves_equal(1, [x.grad for _, x in pairs], [sum(paths(*pair)) for pair in pairs])

    lesson.heading("Against PyTorch")
    numbers = torch.randn(400, 3, generator=torch.Generator().manual_seed(lesson.seed)).tolist()
    pairs = [both(lesson, expression, x, seed) for seed, x in enumerate(numbers, 400 * lesson.seed)]
    deep = both(lesson, chain, [0.5], 10_000)
    for name, (ours, theirs) in (("an expression", pairs[1]), ("the deep chain", deep)):
        print(
            f"{name:14}   y {ours[0]:.5f}   dy/dx₁ {ours[1]:.5f}   PyTorch {theirs[0]:.5f}, {theirs[1]:.5f}"
        )
    lesson.proves_equal(2, [ours[:4] for ours, _ in pairs], [theirs[:4] for _, theirs in pairs])
    lesson.proves_equal(3, [ours[4:] for ours, _ in pairs], [theirs[4:] for _, theirs in pairs])
    lesson.proves_equal(4, *deep)

    names = {a: ("a", 1), b: ("b", 0), product: ("a·b", 0.5), inverse: ("1/b", 0)}
    names |= {total: ("a·b + a", 1), square: ("(a·b + a)²", 1), y: ("y", 0.5)}
    lesson.save(picture(names))


if __name__ == "__main__":
    run(main)
