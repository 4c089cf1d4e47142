"""Counting: what a GPT is made of, what a token costs and what memory it takes, from five whole numbers.

Run:     uv run sprints/08_gpt/03_counting_parameters.py      (7 s on two cores)
Proves:  1. VC + TC numbers embed, 12C² + 13C are in each block, 2C in the last norm, and none anywhere else
         2. GPT-2's four sizes have 124,439,808, 354,823,168, 774,030,080 and 1,557,611,200
         3. to read T tokens takes 2TN + 4LT²C operations, N = 12LC² + VC, and the way back twice as many
         4. so training costs 6N + 12LTC a token: the rule of 6N says too little, by T / (6C + V/2L) of it
         5. weights, gradients and AdamW's two moments are 16 bytes a number, AdamW's clock 4 a tensor
         6. for the way back L(16C + H + 4) + 2C + V + 2 numbers of each token are kept, and 16 bytes of ids
         7. a cache keeps 2LC numbers a token and changes no logit, and token t takes 2N + 4LtC operations
Shapes:  V tokens, T places, C numbers each, H heads, L blocks; B texts
Writes:  results/08_gpt/03_counting_parameters.png
Note:    notes/03_counting_parameters.md
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lab.attention import MultiHeadAttention
from lab.gpt import GPT, SIZES
from lab.lesson import Lesson, run
from lab.transformer import FeedForward

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode


class Size(NamedTuple):
    """What a GPT is built from: GPT(*size)."""

    V: int
    T: int
    C: int
    H: int
    L: int


GPT2 = {name: Size(V=50_257, T=1_024, **size) for name, size in SIZES.items()}
PUBLISHED = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
SMALL = Size(V=5, T=3, C=4, H=2, L=1), Size(11, 32, 24, 3, 2), Size(300, 32, 16, 1, 3)
STORIES = Size(V=1_024, T=192, C=128, H=4, L=2)  # about what sprint 9 trains
LONG = GPT2["gpt2"]._replace(T=8_192)
NAMES = {
    SMALL[0]: "by hand",
    STORIES: "stories",
    **{size: name for name, size in GPT2.items()},
    LONG: "gpt2, long",
}
FLOAT = 4  # bytes


# ── Formulas ──────────────────────────────────────────────────────────────────────────────────────────────


def parameters(size: Size) -> dict[str, int]:
    V, T, C, _, L = size
    return {
        "tokens": V * C,
        "places": T * C,
        "attention": L * (4 * C**2 + 4 * C),  # four matrices with a bias each
        "feed-forward": L * (8 * C**2 + 5 * C),  # C to 4C and back
        "norms": (2 * L + 1) * 2 * C,  # a scale and a shift, twice in each block and once behind them
    }


def multiplied(size: Size) -> int:
    """N: a token is multiplied by these numbers. Embedding it is a look-up; scoring it takes that matrix."""
    return 12 * size.L * size.C**2 + size.V * size.C


def reading(size: Size, T: int) -> int:
    """Operations to read T tokens: each number of N multiplies and adds; scores and means do so T·C times."""
    return 2 * T * multiplied(size) + 4 * size.L * T**2 * size.C


def writing(size: Size, t: int) -> int:
    """Operations for token number t, counted from 1, when what came before is in a cache."""
    return 2 * multiplied(size) + 4 * size.L * t * size.C


def kept(size: Size) -> dict[str, int]:
    """Numbers of each token that wait for the way back."""
    V, _, C, H, L = size
    return {
        "attention": L * (6 * C + H + 2),  # into norm and projections; q, k, v; means; sums of weights; norm
        "feed-forward": L * (10 * C + 2),  # into norm, first layer, GELU (4C) and second layer (4C); norm
        "loss": 2 * C + V + 2,  # into norm and last matrix; log-probabilities; norm's mean and spread
    }


# ── The real thing ────────────────────────────────────────────────────────────────────────────────────────


def on_meta(size: Size) -> GPT:
    """A model of shapes without numbers: it takes no memory and computes nothing, but can be counted."""
    with torch.device("meta"):
        return GPT(*size)


def found_in(model: GPT) -> dict[str, int]:
    """The parameters of a model by the kind of module they are in."""

    def count(kind: type[nn.Module]) -> int:
        inside = [module for module in model.modules() if isinstance(module, kind)]
        return sum(weight.numel() for module in inside for weight in module.parameters())

    kinds = {"attention": MultiHeadAttention, "feed-forward": FeedForward, "norms": nn.LayerNorm}
    embeddings = {"tokens": model.tokens.weight.numel(), "places": model.places.weight.numel()}
    return embeddings | {name: count(kind) for name, kind in kinds.items()}


def loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """Both (B, T)."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())  # (B·T, V), (B·T,)


def operations(compute: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


def there_and_back(model: GPT, B: int) -> tuple[int, int]:
    """Operations that PyTorch counts for B texts of T tokens."""
    ids = torch.empty(B, model.settings["T"], dtype=torch.long, device="meta")
    found = []
    there = operations(lambda: found.append(loss(model, ids, ids)))
    return there, operations(found[0].backward)


def kept_by(model: GPT, ids: Tensor, targets: Tensor) -> int:
    """Bytes that autograd puts aside, beside the model's own: every piece of memory once."""
    pieces = {}

    def note(tensor: Tensor) -> Tensor:
        pieces[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss(model, ids, targets)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(pieces[place] for place in pieces.keys() - own)


class Cache:
    """The keys and values of all tokens so far, as lab.gpt asks for them. Lesson 10/02 makes it fast."""

    def __init__(self, L: int) -> None:
        self.length, self.pairs = 0, [()] * L
        self.blocks = [lambda k, v, block=block: self.add(block, k, v) for block in range(L)]

    def add(self, block: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (B, H, 1, D) behind the others: (B, H, t, D)."""
        before = self.pairs[block] or [part[:, :, :0] for part in new]
        self.pairs[block] = tuple(torch.cat(parts, dim=2) for parts in zip(before, new, strict=True))
        return self.pairs[block]

    def bytes(self) -> int:
        return sum(part.nbytes for pair in self.pairs for part in pair)


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)

    lesson.heading("Parameters")
    models = {size: on_meta(size) for size in (*SMALL, *NAMES)}
    everything = {size: sum(w.numel() for w in model.parameters()) for size, model in models.items()}
    print(f"{'':11}", *(f"{part:>13}" for part in parameters(STORIES)), f"{'together':>13}")
    for size, name in NAMES.items():
        print(f"{name:11}", *(f"{n:13,}" for n in (*parameters(size).values(), everything[size])))
    ours = [[*parameters(size).values(), sum(parameters(size).values())] for size in models]
    theirs = [[*found_in(model).values(), everything[size]] for size, model in models.items()]
    lesson.proves_equal(1, ours, theirs)
    lesson.proves_equal(2, [everything[size] for size in GPT2.values()], PUBLISHED)

    lesson.heading("Operations for each token")
    ours, theirs, missing, by_formula = [], [], [], []
    for size in (*SMALL, STORIES, GPT2["gpt2"], GPT2["gpt2-xl"], LONG):
        B, rule = 1 + size.L % 3, 6 * multiplied(size)
        there, back = there_and_back(models[size], B)
        theirs += [there, back]
        ours += [B * reading(size, size.T), 2 * B * reading(size, size.T)]
        each = (there + back) // (B * size.T)
        missing.append(each / rule - 1)
        by_formula.append(size.T / (6 * size.C + size.V / (2 * size.L)))
        cost = f"training {each:14,}   6N {rule:13,}, too little by {missing[-1]:6.1%}"
        print(f"{NAMES.get(size, 'small'):11} T {size.T:5,}   reading {there // (B * size.T):13,}   {cost}")
    lesson.proves_equal(3, ours, theirs)
    lesson.proves_equal(4, missing, by_formula)

    lesson.heading("Memory for training")
    ours, theirs, beside = [], [], []
    for size in SMALL:
        torch.manual_seed(lesson.seed)
        model, B = GPT(*size), 3
        ids, targets = torch.randint(size.V, (2, B, size.T), generator=draw)  # (B, T) each
        device = lesson.float64_device  # MPS has no kernel that goes back without T² weights
        aside = kept_by(model.to(device), ids.to(device), targets.to(device))
        beside.append(abs(aside - B * size.T * (FLOAT * sum(kept(size).values()) + 16)))

        model = model.to(lesson.device)
        optimiser = torch.optim.AdamW(model.parameters())
        loss(model, ids.to(lesson.device), targets.to(lesson.device)).backward()
        optimiser.step()
        weights, n = list(model.parameters()), sum(parameters(size).values())
        state = [part for weight in weights for part in optimiser.state[weight].values()]
        slopes = [weight.grad for weight in weights]
        theirs += [sum(part.nbytes for part in parts) for parts in (weights, slopes, state)]
        ours += [FLOAT * n, FLOAT * n, 2 * FLOAT * n + FLOAT * len(weights)]
    lesson.proves_equal(5, ours, theirs)
    few = 4 if device.type == "cpu" else 256  # how many targets there are; CUDA: what its dropout would need
    lesson.proves(6, max(beside) <= few, f"and {max(beside)} bytes besides")
    fixed = {name: 4 * FLOAT * everything[size] for name, size in GPT2.items()}
    texts = {name: size.T * (FLOAT * sum(kept(size).values()) + 16) for name, size in GPT2.items()}
    for name in GPT2:
        print(f"{name:11} {fixed[name] / 1e9:6.2f} GB, and {texts[name] / 1e9:5.2f} GB for each text")

    lesson.heading("Memory for writing, and what it saves")
    ours, theirs = [], []
    for size in SMALL:
        torch.manual_seed(lesson.seed)
        model, B = GPT(*size).to(lesson.device), 2
        ids = torch.randint(size.V, (B, size.T), generator=draw)
        cache, counted = Cache(size.L), Cache(size.L)
        with torch.no_grad():
            tokens = ids.to(lesson.device).split(1, dim=1)  # T times (B, 1)
            ours.append(torch.cat([model(token, cache=cache) for token in tokens], dim=1))  # (B, T, V)
            theirs.append(model(ids.to(lesson.device)))
            for token in ids[:1].to("meta").split(1, dim=1):
                ours.append(operations(partial(models[size], token, cache=counted)))
        theirs += [writing(size, t) for t in range(1, size.T + 1)]
        ours.append(cache.bytes())
        theirs.append(B * size.T * 2 * size.L * size.C * FLOAT)
    lesson.proves_equal(7, ours, theirs)
    for name, size in GPT2.items():
        cached, plain = (sum(f(size, t + 1) for t in range(size.T)) for f in (writing, reading))
        memory = 2 * size.L * size.C * FLOAT
        said = f"{memory:7,} bytes a token, {size.T * memory / 1e6:5.1f} MB in all"
        print(f"{name:11} {said}, for 1/{plain / cached:.0f} of the operations")

    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained", sharey=True)
    shares, memories = [], []
    for size in GPT2.values():
        tokens, places, *inside, _ = parameters(size).values()
        shares.append([100 * part / everything[size] for part in (tokens + places, *inside)])
        n, waiting = everything[size], (8 * size.T * part for part in kept(size).values())
        memories.append([FLOAT * part / 1e9 for part in (n, n, 2 * n, *waiting)])
    share_names = "embeddings", "attention", "feed-forward"
    names = "weights", "gradients", "moments", *(f"kept: {part}" for part in kept(STORIES))
    for axes, rows, parts in ((left, shares, share_names), (right, memories, names)):
        for k, part in enumerate(parts):
            axes.barh(list(GPT2), [row[k] for row in rows], left=[sum(row[:k]) for row in rows], label=part)
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, fontsize="small", frameon=False)
    left.set_xlabel("% of the parameters")
    right.set_xlabel("GB to train on 8 texts at once")
    figure.suptitle("What waits for the way back outweighs the weights", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
