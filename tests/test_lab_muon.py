"""lab.muon: equal to torch.optim.Muon; for all but matrices of blocks equal to AdamW; saved and resumed."""

from functools import partial

from lab import checkpoint
from lab.gpt import GPT
from lab.muon import Muon, muon, orthogonalise
from lab.stream import Stream
from lab.training import Settings, Training, adamw, learning_rate

import numpy as np
import pytest
import torch
from torch import nn

CPU, STEPS = torch.device("cpu"), 6
TOKENS = np.random.default_rng(0).integers(0, 50, 997).astype(np.uint16)
SHAPES = [(5, 5), (7, 4), (3, 11), (1, 6), (6, 1), (7, 4), (32, 33), (16, 64), (64, 16)]


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(V=50, T=16, C=16, H=2, L=2)


def training(optimizer=muon, **settings) -> Training:
    torch.set_num_threads(1)
    settings = Settings(**{"B": 8, "steps": STEPS} | settings)
    return Training(model(), Stream(TOKENS, 16, 0), settings, CPU, optimizer=optimizer)


def weights(job: Training) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in job.model.parameters()])


@pytest.mark.parametrize(("momentum", "decay"), [(0.95, 0.1), (0.5, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_equals_torch(momentum, decay, precision):
    """Theirs computes in bfloat16, whose numbers lie 1/128 apart."""
    draw = torch.Generator().manual_seed(1)
    ours = [torch.randn(shape, generator=draw) for shape in SHAPES]
    theirs = [weight.clone() for weight in ours]
    group = {"params": ours, "lr": 0.1, "momentum": momentum, "weight_decay": decay}
    pair = (
        Muon([group], torch.optim.AdamW([torch.zeros(1)]), precision),
        torch.optim.Muon(theirs, lr=0.1, momentum=momentum, weight_decay=decay),
    )
    for _ in range(8):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=draw)
        for optimizer in pair:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("shape", [(1, 1), (9, 4), (4, 9), (3, 8, 5), (2, 2, 5, 8)])
def test_orthogonal(shape):
    draw = torch.Generator().manual_seed(0)
    found = orthogonalise(torch.randn(shape, generator=draw, dtype=torch.float64))
    assert found.shape == shape
    values = torch.linalg.svdvals(found)
    assert 0.68 < values.min() <= values.max() < 1.21


def test_no_gradient_is_no_step():
    weight = torch.ones(3, 4)
    group = {"params": [weight], "lr": 0.1, "momentum": 0.95, "weight_decay": 0.0}
    optimizer = Muon([group], torch.optim.AdamW([torch.zeros(1)]), torch.float32)
    optimizer.step()
    weight.grad = torch.zeros(3, 4)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3, 4))


class TestWhatGoesWhere:
    def test_groups(self):
        net = model()
        net.blocks.append(nn.Embedding(3, 4))
        optimizer = muon(net, Settings(B=1, steps=1, rate=0.1, decay=0.25), scale=3)
        matrices, embeddings, vectors = optimizer.param_groups
        assert len(matrices["params"]) == 2 * 6
        assert {id(weight) for weight in embeddings["params"]} == {
            id(layer.weight) for layer in (net.tokens, net.places, net.blocks[-1])
        }
        assert all(weight.ndim < 2 for weight in vectors["params"])
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25, 0.0]
        assert matrices["lr"] == pytest.approx(0.3)

    def test_the_rest_is_adamw(self):
        """Embeddings, biases and norms take the very steps of AdamW; the matrices do not."""
        nets = [model(), model()]
        settings = Settings(B=1, steps=1, rate=0.01)
        pair = muon(nets[0], settings), adamw(nets[1], settings)
        draw = torch.Generator().manual_seed(0)
        for _ in range(3):
            for a, b in zip(*(net.parameters() for net in nets), strict=True):
                a.grad = torch.randn(a.shape, generator=draw)
                b.grad = a.grad.clone()
            for optimizer in pair:
                optimizer.step()
        matrices = {id(weight) for weight in pair[0].param_groups[0]["params"]}
        for a, b in zip(*(net.parameters() for net in nets), strict=True):
            assert torch.equal(a, b) == (id(a) not in matrices)

    def test_rates(self):
        job = training(partial(muon, scale=3))
        for step, _ in enumerate(job.run()):
            rate = learning_rate(step, STEPS, 3e-3, 0.1)
            assert [group["lr"] for group in job.optimizer.param_groups] == [3 * rate, rate, rate]


class TestResuming:
    def test_twice_the_same(self):
        first, again = training(), training()
        assert list(first.run()) == list(again.run())
        assert torch.equal(weights(first), weights(again))

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("stop", [1, 3, STEPS])
    def test_to_the_bit(self, stop, precision, tmp_path):
        whole, job = (training(precision=precision) for _ in range(2))
        for _ in whole.run():
            if whole.done == stop:
                checkpoint.save(tmp_path / "a", whole.state())
        job.restore(checkpoint.load(tmp_path / "a"))
        list(job.run())
        assert job.losses == whole.losses
        assert torch.equal(weights(job), weights(whole))
