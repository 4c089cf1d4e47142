"""Seeing embeddings: two maps of many dimensions, PCA and t-SNE, and what can be read from them.

Run:     uv run sprints/05_embeddings_and_positions/02_seeing_embeddings.py      (6 s on two cores)
Proves:  1. components from singular values, from the covariance and from torch.pca_lowrank agree up to sign
         2. what k components miss is the variance of all others, for every k
         3. bisection gives every point the perplexity that was asked for
         4. the divergence in loops and as matrices agree, and its gradient by formula is that of autograd
         5. descent brings the divergence of words and of digits to less than half of the start's
         6. on t-SNE's map more of the five nearest are of a kind than on PCA's: words by 3 points, digits 15
         7. clusters 10 times as far apart or as wide come out alike, and noise comes out in clumps
Shapes:  N points of F features, k components
Writes:  results/05_embeddings_and_positions/02_seeing_embeddings.png
Note:    notes/02_seeing_embeddings.md
"""

import itertools
import math
from collections import Counter

from lab import digits
from lab.lesson import Lesson, run
from lab.stories import write
from lab.words import CATEGORY, word_vectors

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((5, 2), (40, 7), (9, 30))
KINDS = [kind for kind, _ in Counter(CATEGORY.values()).most_common(10)]  # the largest categories
PERPLEXITY, STEPS, RATE, MOMENTUM = 15, 400, 50.0, 0.8
EARLY, EXAGGERATION = 100, 4  # during the first steps, attraction is so many times as strong


def principal_components(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, F) -> the points on their own axes, widest first (N, k), those axes (F, k), the variances (k,).

    x = U·S·Vᵀ with orthonormal columns in U and V, so V turns the points without changing any distance.
    """
    U, S, Vt = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)  # (N, k), (k,), (k, F)
    return U * S, Vt.T, S**2 / (len(x) - 1)


def plane(x: Tensor) -> Tensor:
    """The first two coordinates: (N, F) -> (N, 2)."""
    return principal_components(x)[0][:, :2]


def squared_distances(x: Tensor) -> Tensor:
    """|a − b|² = |a|² + |b|² − 2a·b for every pair: (N, F) -> (N, N)."""
    products = x @ x.T
    lengths = products.diagonal()
    return (lengths[:, None] + lengths - 2 * products).clamp(min=0)


def neighbourhoods(x: Tensor, perplexity: float) -> Tensor:
    """p(j|i): whom point i would pick as a neighbour, a Gaussian around it (equation 1). (N, F) -> (N, N).

    The narrower the Gaussian, the fewer it can pick from. Bisection finds the width at which their effective
    number, e to the entropy, is the perplexity.
    """
    distances = squared_distances(x)
    distances = (distances / distances.mean()).fill_diagonal_(math.inf)  # nobody is a neighbour of their own
    low, high = (torch.full_like(x[:, :1], end) for end in (-20.0, 20.0))  # (N, 1): log of 1 / 2σ²
    for _ in range(50):
        middle = (low + high) / 2
        p = (-distances * middle.exp()).softmax(dim=1)
        too_many = -torch.special.xlogy(p, p).sum(dim=1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return p


def closeness(y: Tensor) -> Tensor:
    """1 / (1 + distance²) on the map, its tails heavier than a Gaussian's: (N, 2) -> (N, N)."""
    near = 1 / (1 + squared_distances(y))
    return near * (1 - torch.eye(len(y), dtype=y.dtype, device=y.device))


def divergence_by_loop(p: list[list[float]], y: list[list[float]]) -> float:
    """KL(P‖Q) = Σ p log (p / q), with q from equation 4."""
    pairs = list(itertools.permutations(range(len(y)), 2))
    near = {(i, j): 1 / (1 + math.dist(y[i], y[j]) ** 2) for i, j in pairs}
    return sum(p[i][j] * math.log(p[i][j] / (near[i, j] / sum(near.values()))) for i, j in pairs)


def divergence(p: Tensor, y: Tensor) -> Tensor:
    """The same as matrices; −log q = log (1 + distance²) + log Σ closeness. (N, N), (N, 2) -> ()."""
    surprise = squared_distances(y).log1p() + closeness(y).sum().log()
    return (torch.special.xlogy(p, p) + p * surprise).sum()


def slope(p: Tensor, y: Tensor) -> Tensor:
    """Its gradient, 4 Σⱼ (pᵢⱼ − qᵢⱼ)(yᵢ − yⱼ) / (1 + |yᵢ − yⱼ|²) (equation 5): (N, N), (N, 2) -> (N, 2)."""
    near = closeness(y)
    pull = (p - near / near.sum()) * near  # (N, N): attraction where positive
    return 4 * (pull.sum(dim=1, keepdim=True) * y - pull @ y)


def tsne(x: Tensor, perplexity: float = PERPLEXITY) -> tuple[Tensor, list[float]]:
    """A map on which close points are close: (N, F) -> (N, 2), and the divergence before and after."""
    p = neighbourhoods(x, perplexity)
    p = (p + p.T) / (2 * len(x))  # a neighbour is one who picks or is picked; all pairs sum to 1
    y = plane(x)
    y = y / y[:, 0].std() * 1e-4  # so close together that only attraction counts
    before, velocity = divergence(p, y).item(), torch.zeros_like(y)
    for step in range(STEPS):
        exaggerated = p * EXAGGERATION if step < EARLY else p
        velocity = MOMENTUM * velocity - RATE * slope(exaggerated, y)
        y = y + velocity
    return y, [before, divergence(p, y).item()]


def of_a_kind(x: Tensor, labels: Tensor) -> float:
    """The share of everybody's five nearest points that bear their label: (N, F), (N,)."""
    nearest = squared_distances(x).fill_diagonal_(math.inf).topk(5, largest=False).indices  # (N, 5)
    return (labels[nearest] == labels[:, None]).float().mean().item()


def gap_and_widths(x: Tensor) -> tuple[float, float]:
    """Two clusters, the halves of x: how many widths their centres lie apart, and the ratio of the widths."""
    halves = x.chunk(2)
    first, second = ((half - half.mean(dim=0)).norm(dim=1).mean() for half in halves)
    gap = (halves[0].mean(dim=0) - halves[1].mean(dim=0)).norm()
    return (2 * gap / (first + second)).item(), (second / first).item()


def largest_clump(x: Tensor) -> float:
    """The share of points in the largest clump, linking all closer than three typical nearest neighbours."""
    distances = squared_distances(x).sqrt()
    typical = distances.clone().fill_diagonal_(math.inf).amin(dim=1).median()
    linked = (distances < 3 * typical).to(x.dtype)
    for _ in range(8):  # friends of friends: each product doubles the number of steps
        linked = (linked @ linked > 0).to(x.dtype)
    return linked.mean(dim=1).max().item()


def draw_maps(data: dict[str, tuple[Tensor, Tensor]], maps: dict[str, Tensor]) -> plt.Figure:
    """Above PCA, below t-SNE, a column for each data set."""
    figure, panels = plt.subplots(2, 3, figsize=(6, 4.2), layout="constrained")
    for (name, (x, labels)), column in zip(data.items(), panels.T, strict=True):
        for view, points, axes in zip(("PCA", "t-SNE"), (plane(x), maps[name]), column, strict=True):
            for label in range(labels.max() + 1):
                group, style = points[labels == label].cpu(), {"s": 4}
                if (name, view) == ("digits", "t-SNE"):
                    style = {"s": 18, "marker": f"${label}$"}
                if (name, view) == ("words", "t-SNE"):
                    top = group[:, 0].mean(), group[:, 1].max() + 0.4
                    axes.text(*top, KINDS[label], ha="center", size="small")
                axes.scatter(*group.T, linewidth=0, **style)
            axes.set(xticks=[], yticks=[], title=f"{name}, {view}")
    panels[1, 0].margins(0.15)  # room for the names
    figure.suptitle("t-SNE keeps neighbours together, and makes clumps of noise", size="medium")
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # the matrices are so small that threads would only wait for each other
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(device)

    images, classes = digits.tensors(digits.find(lesson.data), train=True, device=device)
    some = torch.randperm(len(images), generator=draw)[:300].to(device)
    text = "".join(story.text for story in write(lesson.seed, 300_000))
    words, vectors = word_vectors(text, seed=lesson.seed, device=lesson.device)
    rows = [row for row, word in enumerate(words) if CATEGORY.get(word) in KINDS]
    kinds = torch.tensor([KINDS.index(CATEGORY[words[row]]) for row in rows]).to(device)
    data = {  # of a word vector only the direction, as the lesson before compared angles
        "words": (F.normalize(vectors[rows], dim=1).to(device).double(), kinds),
        "digits": (images[some].flatten(1).double(), classes[some]),  # (N, 1, 28, 28) -> (N, F)
    }

    lesson.heading("PCA")
    ours, theirs, misses = [], [], []
    for N, features in SHAPES:
        x = random(N, features) * torch.linspace(1, 3, features).to(device)
        placed, axes, variances = principal_components(x)
        k = min(N - 1, features)  # centred, N points span no more than N − 1 dimensions
        powers, turned = (found.flip(-1) for found in torch.linalg.eigh(torch.cov(x.T)))  # widest first
        _, S, V = torch.pca_lowrank(x, q=min(N, features))
        for spread, directions in ((powers, turned), (S**2 / (N - 1), V)):
            signs = (axes[:, :k] * directions[:, :k]).sum(dim=0).sign()  # (k,): v and −v are the same axis
            ours.append([variances[:k], axes[:, :k] * signs])
            theirs.append([spread[:k], directions[:, :k]])
        for kept in range(k + 1):
            back = placed[:, :kept] @ axes[:, :kept].T + x.mean(dim=0)  # (N, kept) -> (N, F)
            misses.append([(x - back).square().sum() / (N - 1), variances[kept:].sum()])
    lesson.proves_equal(1, ours, theirs, tolerance=1e-8)
    lesson.proves_equal(2, *zip(*misses, strict=True))
    for name, (x, _) in data.items():
        variances = principal_components(x)[2]
        shares = "".join(f"{variances[:k].sum() / variances.sum():7.0%}" for k in (1, 2, 5, 20))
        print(f"{name:7}{tuple(x.shape)!s:11}   share of the variance in 1, 2, 5, 20 components {shares}")

    lesson.heading("t-SNE")
    p = {perplexity: neighbourhoods(data["words"][0], perplexity) for perplexity in (2, PERPLEXITY, 60)}
    ours = [torch.distributions.Categorical(rows).entropy().exp() for rows in p.values()]
    lesson.proves_equal(3, ours, [torch.full_like(ours[0], perplexity) for perplexity in p], tolerance=1e-8)
    p, y = random(12, 12).exp().fill_diagonal_(0), random(12, 2).requires_grad_()
    p = (p + p.T) / (2 * p.sum())
    loss = divergence(p, y)
    (expected,) = torch.autograd.grad(loss, y)
    y = y.detach()
    lesson.proves_equal(4, [loss.item(), slope(p, y)], [divergence_by_loop(p.tolist(), y.tolist()), expected])

    maps, losses = {}, {}
    for name, (x, _) in data.items():
        maps[name], losses[name] = tsne(x)
    noise = random(200, 10)
    maps["noise"], losses["noise"] = tsne(noise, perplexity=3)
    for name, (before, after) in losses.items():
        print(f"{name:7}{len(maps[name])} points   divergence {before:.3f}, after {STEPS} steps {after:.3f}")
    lesson.proves(5, all(losses[name][1] < losses[name][0] / 2 for name in data))

    lesson.heading("What to read from a map: neighbours")
    print(f"{'':10}{'chance':>10}{'all axes':>10}{'PCA':>10}{'t-SNE':>10}")
    won = []
    for name, (x, labels) in data.items():
        chance = ((labels.bincount()[labels] - 1) / (len(x) - 1.0)).mean().item()
        full, flat, map_ = (of_a_kind(points, labels) for points in (x, plane(x), maps[name]))
        print(f"{name:10}{chance:10.1%}{full:10.1%}{flat:10.1%}{map_:10.1%}")
        won.append(map_ - flat)
    lesson.proves(6, won[0] >= 0.03 and won[1] >= 0.15, f"{100 * won[0]:.0f} and {100 * won[1]:.0f}")

    lesson.heading("What not to read from it: distances, sizes, clusters")
    x, second = random(100, 10), torch.arange(100).to(device)[:, None] >= 50  # (N, F), (N, 1)
    aside = F.one_hot(torch.tensor(0), 10).to(x)  # (F,)
    clusters = {
        "two clusters": x + 20 * second * aside,
        "10 times as far": x + 200 * second * aside,
        "10 times as wide": x * (1 + 9 * second) + 200 * second * aside,
    }
    print(f"{'gap, ratio of widths':22}{'all axes':>16}{'PCA':>16}{'t-SNE':>16}")
    found = []
    for name, points in clusters.items():
        row = [gap_and_widths(view) for view in (points, plane(points), tsne(points)[0])]
        print(f"{name:22}" + "".join(f"{gap:10.1f}{ratio:6.1f}" for gap, ratio in row))
        found.append(row)
    (near, _), (far, _), (_, ratio) = (row[2] for row in found)
    clumps = [largest_clump(view) for view in (noise, plane(noise), maps["noise"])]
    print("largest clump of noise" + "".join(f"{clump:16.0%}" for clump in clumps))
    alike = max(far / near, near / far, ratio, 1 / ratio) < 1.5
    measured = f"{far / near:.2f} times as far, {ratio:.2f} times as wide, largest clump {clumps[2]:.0%}"
    lesson.proves(7, alike and clumps[2] < 0.25 and min(clumps[:2]) > 0.5, measured)

    data["noise"] = noise, torch.zeros(len(noise), dtype=torch.int64, device=device)
    lesson.save(draw_maps(data, maps))


if __name__ == "__main__":
    run(main, data="digits")
