"""lab.ngram: tables of counts, against a dictionary."""

import math
from collections import Counter

from lab import BadInput, corpus, ladder
from lab.ngram import NGram

import pytest
import torch

V, TEXT = 5, torch.randint(5, (400,), generator=torch.Generator().manual_seed(1))


def by_dictionary(n: int, smoothing: float, context: list[int]) -> list[float]:
    """The probabilities of the V characters after the last n - 1 of `context`."""
    text = TEXT.tolist()
    counts = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
    row = [counts[(*context[len(context) - n + 1 :], character)] + smoothing for character in range(V)]
    return [count / sum(row) for count in row]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("smoothing", [0.01, 1])
def test_probabilities_are_those_of_a_dictionary(n, smoothing):
    ids = torch.randint(V, (3, 11), generator=torch.Generator().manual_seed(2))
    logits, _ = NGram(TEXT, V, n, smoothing)(ids)
    slow = [
        [by_dictionary(n, smoothing, [row[0]] * n + row[: t + 1]) for t in range(len(row))]
        for row in ids.tolist()
    ]
    torch.testing.assert_close(logits.exp(), torch.tensor(slow))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_row_sums_to_one(n):
    model = NGram(TEXT, V, n, 0.3)
    assert model.counts.shape == model.table.shape == (V ** (n - 1), V)
    assert model.counts.sum() == len(TEXT) - n + 1
    torch.testing.assert_close(model.table.exp().sum(-1), torch.ones(V ** (n - 1)))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_in_pieces_as_in_one_pass(n):
    model, ids = NGram(TEXT, V, n, 0.3), TEXT[:60].view(4, 15)
    whole, last = model(ids)
    parts, state = [], None
    for piece in ids.split([1, 1, 2, 7, 4], dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(state, last)
    assert torch.equal(state, ids[:, 15 - (n - 1) :])


def test_without_smoothing():
    model = NGram(torch.tensor([0, 1, 0, 2, 0, 1]), 4, 2, 0)
    assert model.table[0].tolist() == pytest.approx([-math.inf, math.log(2 / 3), math.log(1 / 3), -math.inf])
    assert model.table[3].exp().tolist() == [0.25] * 4  # 3 never occurred, so nothing is known of it


def test_a_table_that_nobody_could_hold():
    with pytest.raises(BadInput, match="3-grams over 5000"):
        NGram(TEXT, 5_000, 3, 1)


def test_it_stands_on_the_ladder():
    tales = corpus.load("stories", 7, torch.device("cpu"))
    losses = [ladder.nats_per_character(NGram(tales.train, tales.V, n, 0.1), tales) for n in (1, 2, 3)]
    assert math.log(tales.V) > losses[0] > losses[1] > losses[2] > tales.floor
    told = ladder.tell(NGram(tales.train, tales.V, 3, 0.1), tales, 4, seed=0)
    assert all(set(text) <= set(tales.vocabulary) for text in told)
