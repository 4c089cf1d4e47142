"""lab.influence: it finds what can change what, and says so where its two ways differ."""

from lab.attention import attend, causal_mask, padding_mask
from lab.influence import draw, influence, rows

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

DISAGREE = -1


@pytest.fixture
def x():
    """Two texts of five places (2, 5, 4)."""
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def look(x, mask=None, source=None):
    """Attention of one head, without weights of its own."""
    source = x if source is None else source
    return attend(x[:, None], source[:, None], source[:, None], mask)[:, 0]


def two(block):
    return torch.block_diag(block, block).long()


def test_vectors(x):
    full = torch.ones(5, 5)
    assert torch.equal(influence(look, x), two(full))
    assert torch.equal(influence(lambda x: look(x, causal_mask(5)), x), two(full.tril()))
    assert torch.equal(influence(lambda x: x * 2, x), two(full.tril().triu()))
    assert torch.equal(influence(lambda x: x.roll(1, dims=1), x), two(torch.eye(5).roll(1, 0)))
    assert torch.equal(influence(lambda x: torch.ones_like(x), x), two(0 * full))
    assert torch.equal(influence(lambda x: x[:, :2], x), two(torch.eye(5)[:2]))  # fewer outputs than inputs


def test_tokens():
    torch.manual_seed(0)
    letters = nn.Embedding(7, 4, dtype=torch.float64)
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 2, 6, 0]])
    lower = two(torch.ones(5, 5).tril())
    assert torch.equal(influence(lambda ids: look(letters(ids), causal_mask(5)), ids), lower)
    targets = ids.flip(0)
    of_source, of_target = influence(lambda s, t: look(letters(t), None, letters(s)), ids, targets)
    assert torch.equal(of_source, two(torch.ones(5, 5)))
    assert torch.equal(of_target, two(torch.eye(5)))


def test_two_inputs_and_padding(x):
    source, lengths = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).double(), [3, 2]
    there = padding_mask(torch.tensor(lengths), 3)[:, None]  # (B, 1, 1, S)
    of_x, of_source = influence(lambda x, source: look(x, there, source), x, source)
    assert torch.equal(of_x, two(torch.eye(5)))
    columns = [torch.ones(5, 3), torch.tensor([[1.0, 1, 0]]).expand(5, 3)]
    assert torch.equal(of_source, torch.block_diag(*columns).long())


def test_a_place_with_nothing_to_look_at(x):
    mask = causal_mask(5)
    mask[2] = False
    expected = torch.ones(5, 5).tril()
    expected[2] = 0
    assert torch.equal(influence(lambda x: look(x, mask), x), two(expected))


@pytest.mark.parametrize("mask", [~causal_mask(5), causal_mask(5).roll(1, 1), causal_mask(6)[1:, :5], None])
def test_no_wrong_mask_is_lower_triangular(x, mask):
    assert not torch.equal(influence(lambda x: look(x, mask), x), two(torch.ones(5, 5).tril()))


def test_a_leak_between_texts(x):
    leaks = influence(lambda x: x + x.mean(0), x)
    assert torch.equal(leaks, torch.eye(5).repeat(2, 2).long())
    norm = nn.BatchNorm1d(4, dtype=torch.float64)  # in training it looks at every place of every text
    norm.eval()
    assert torch.equal(influence(lambda x: norm(x.mT).mT, x), two(torch.eye(5)))
    norm.train()
    assert influence(lambda x: norm(x.mT).mT, x).all()


@pytest.mark.parametrize(
    "one_sided",
    [
        lambda x: x.roll(1, dims=1).detach(),  # a value without a slope
        lambda x: x.roll(1, dims=1) - x.roll(1, dims=1).detach(),  # a slope without a value
        lambda x: x.roll(1, dims=1).round(),  # nothing but steps
    ],
)
def test_disagreement(x, one_sided):
    expected = two(torch.eye(5) + DISAGREE * torch.eye(5).roll(1, 0))
    assert torch.equal(influence(lambda x: x + one_sided(x), x), expected)


def test_rounding_is_no_disagreement(x):
    """A slope too small to change a sum in any bit."""
    assert torch.equal(influence(lambda x: x + 1e-30 * x.roll(1, dims=1), x), two(torch.eye(5)))


def test_what_cannot_be_asked(x):
    with pytest.raises(ValueError, match="dropout"):
        influence(nn.Dropout(0.5), x)
    with pytest.raises(ValueError, match="alike"):
        influence(nn.Embedding(3, 4), torch.ones(1, 5, dtype=torch.long))


def test_it_leaves_no_trace(x):
    kept, state = x.clone(), torch.get_rng_state()
    influence(look, x)
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert not nn.modules.module._global_forward_hooks


def test_pictures():
    matrix = torch.tensor([[1, 0], [-1, 1]])
    assert rows(matrix) == ["■ ·", "? ■"]
    figure, axes = plt.subplots()
    draw(axes, matrix, "title", inputs="source", outputs="target")
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "title",
        "source position",
        "target position",
    )
    plt.close(figure)
