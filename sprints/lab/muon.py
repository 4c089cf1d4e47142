"""Muon: momentum for matrices, all of whose singular values are made one; AdamW for whatever is no matrix.

    optimizer = muon(model, Settings(B=8, steps=250, rate=1e-2))
    Training(model, stream, settings, device, optimizer=muon)
    Training(model, stream, settings, device, optimizer=partial(muon, scale=2))

Derived in: 11_modern_transformer/06_muon
"""

from collections import defaultdict
from collections.abc import Iterable

from lab.training import Settings, adamw

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: small singular values grow fast
SMALLEST = 1e-7  # matrices shorter than this are not stretched to length 1


def orthogonalise(matrices: Tensor, steps: int = 5, coefficients: tuple = COEFFICIENTS) -> Tensor:
    """The same singular vectors, the singular values all near one (Newton–Schulz): (…, M, N) -> (…, M, N)."""
    a, b, c = coefficients
    x = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST)  # singular values of at most 1
    for _ in range(steps):
        square = x @ x.mT  # (…, M, M), the smaller of the two
        x = a * x + (b * square + c * square @ square) @ x
    return x if matrices.shape[-2] <= matrices.shape[-1] else x.mT


class Muon(torch.optim.Optimizer):
    """Groups with a momentum are matrices (…, M, N) for Muon; the others are those of an AdamW.

    The conventions are those of torch.optim.Muon. Matrices of one shape are worked on together, in the
    precision that is given.
    """

    def __init__(self, matrices: Iterable[dict], others: torch.optim.AdamW, precision: torch.dtype) -> None:
        self.others, self.precision = others, precision
        super().__init__([*matrices, *others.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.others.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self.others.state = self.state  # one state for both, to be saved and loaded as usual
        self.others.step()
        for group in self.param_groups:
            if "momentum" in group:
                self._step(group)

    def _step(self, group: dict) -> None:
        alike = defaultdict(list)  # weights and their updates, by shape
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            mean = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
            alike[weight.shape].append((weight, weight.grad.lerp(mean, group["momentum"])))
        for shape, pairs in alike.items():
            weights, updates = zip(*pairs, strict=True)
            updates = orthogonalise(torch.stack(updates).to(self.precision)).to(weights[0].dtype)
            rate = group["lr"] * max(1, shape[-2] / shape[-1]) ** 0.5
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def muon(model: nn.Module, settings: Settings, scale: float = 4.0, momentum: float = 0.95) -> Muon:
    """Muon for the matrices of the model's blocks, at `scale` times the rate; AdamW for all else."""
    matrices = [
        weight
        for module in model.blocks.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.ndim > 1
    ]
    others, mine = adamw(model, settings), {id(weight) for weight in matrices}
    for group in others.param_groups:
        group["params"] = [weight for weight in group["params"] if id(weight) not in mine]
    group = {"params": matrices, "lr": settings.rate * scale, "scale": scale, "momentum": momentum}
    precision = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    return Muon([group | {"weight_decay": settings.decay}], others, precision)
