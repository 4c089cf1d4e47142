"""lab.stream: a text as a file of tokens, the windows and pieces read of it, and what is held out."""

import math
from collections import Counter
from itertools import pairwise

from lab import BadInput, corpus, stories, stream
from lab.gpt import GPT
from lab.tokenizer import END, Tokenizer

import numpy as np
import pytest
import torch

SIZES = [(1, 1), (1, 4), (5, 7), (8, 8), (64, 8), (65, 8), (1_000, 33), (997, 1)]  # S tokens, windows of T


class Numbers:
    """A tokenizer as far as write_tokens asks: each character is its code point."""

    def __init__(self, V: int) -> None:
        self.V, self.special = V, {END: V - 1}

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))


@pytest.fixture(scope="module")
def tales(tmp_path_factory) -> stream.TokenText:
    return stream.prepare("stories", 7, 400, tmp_path_factory.mktemp("tales"), characters=50_000)


def decoded(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(tokens.tolist())


# ── The file ──────────────────────────────────────────────────────────────────────────────────────────────


def test_stories_come_back_out_of_their_tokens(tales):
    written = [story.text for story in stories.write(7, 50_000)]
    assert decoded(tales.train, tales.tokenizer) == "".join(text + END for text in written)
    held_out = [tales.tokenizer.decode(document[1:].tolist()) for document in tales.held_out]
    assert held_out == [story.text for story in stories.write("held out 7", corpus.HELD_OUT)]
    assert all(document[0] == tales.tokenizer.special[END] for document in tales.held_out)
    assert (tales.characters, tales.bytes) == (sum(map(len, held_out)), len("".join(held_out).encode()))
    nats = sum(stories.parse(text).nats for text in held_out)
    assert math.isclose(tales.floor, nats / tales.characters)
    assert set(written).isdisjoint(held_out)


@pytest.mark.parametrize("script", ["abc \n", "Ünïcode, ", "こんにちは世界。", "👩‍🚀🧵 ", "a"])
def test_any_text_comes_back_out_of_its_tokens(tmp_path, script):
    text = (script * 6_007)[:6_007]
    (tmp_path / "text").write_text(text, encoding="utf-8", newline="")
    found = stream.prepare(str(tmp_path / "text"), 0, 300, tmp_path)
    (held_out,) = found.held_out
    train = decoded(found.train, found.tokenizer).removesuffix(END)
    assert train + found.tokenizer.decode(held_out[1:].tolist()) == text
    assert (len(train), found.characters, found.floor) == (5_406, 601, None)
    assert found.bytes == len(text[5_406:].encode())


def test_a_tokenizer_that_is_given_is_kept(tales, tmp_path):
    again = stream.prepare("stories", 7, 10_000, tmp_path, tales.tokenizer, characters=50_000)
    assert again.tokenizer is tales.tokenizer
    assert np.array_equal(again.train, tales.train)


@pytest.mark.parametrize(("V", "bytes_each"), [(2**16, 2), (2**16 + 1, 4), (2**17, 4)])
def test_a_token_takes_as_few_bytes_as_it_can(tmp_path, V, bytes_each):
    tokens = stream.write_tokens(tmp_path / "tokens", ["a\uffff"[: 1 + (V > 2**16)], ""], Numbers(V))
    assert (tmp_path / "tokens").stat().st_size == len(tokens) * bytes_each
    assert tokens.tolist() == [97, *[0xFFFF] * (V > 2**16), V - 1, V - 1]
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_what_cannot_be_used(tmp_path):
    with pytest.raises(BadInput, match="cannot write"):
        stream.write_tokens(tmp_path / "missing" / "tokens", ["a"], Numbers(300))
    for text, message in ((" \n", "is empty"), ("too short", "too few"), (None, "cannot read")):
        if text:
            (tmp_path / "text").write_text(text, encoding="utf-8")
        with pytest.raises(BadInput, match=message):
            stream.prepare(str(tmp_path / ("text" if text else "nothing")), 0, 300, tmp_path)


# ── Windows ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("S", "T"), SIZES)
def test_windows_follow_the_ring(S, T):
    inputs, targets = stream.Stream(np.arange(S), T, 3).batch(0, 20)
    assert inputs.shape == targets.shape == (20, T)
    assert inputs.dtype == targets.dtype == torch.int64
    assert targets.equal((inputs + 1) % S)
    assert inputs[:, 1:].equal(targets[:, :-1])


@pytest.mark.parametrize(("S", "T"), [size for size in SIZES if size[0] >= size[1]])
def test_a_round_has_each_token_once(S, T):
    tokens = stream.Stream(np.arange(S), T, 3)
    for round_ in range(5):
        _, targets = tokens.batch(round_ * tokens.per_round, tokens.per_round)
        counts = targets.flatten().bincount(minlength=S)
        assert counts.max() == 1
        assert (counts == 0).sum() == S % T


@pytest.mark.parametrize(("S", "T"), SIZES)
def test_a_window_depends_on_seed_and_number_alone(S, T):
    whole = torch.cat(stream.Stream(np.arange(S), T, 3).batch(0, 40), dim=1)
    for B in (1, 7, 40):
        tokens = stream.Stream(np.arange(S), T, 3)
        for first in reversed(range(0, 40, B)):  # in any order
            batch = torch.cat(tokens.batch(first, min(B, 40 - first)), dim=1)
            assert batch.equal(whole[first : first + B])
    if S > 100:
        assert not whole.equal(torch.cat(stream.Stream(np.arange(S), T, 4).batch(0, 40), dim=1))


# ── Pieces ────────────────────────────────────────────────────────────────────────────────────────────────


def documents(lengths: list[int]) -> np.ndarray:
    """Documents of so many tokens, all different, and a 0 after each."""
    tokens = iter(range(1, sum(lengths) + 1))
    return np.array([token for length in lengths for token in [*(next(tokens) for _ in range(length)), 0]])


def unpadded(inputs: torch.Tensor, targets: torch.Tensor) -> list[list[int]]:
    """Each piece: the token before it, and its own."""
    pieces = []
    for row, wanted in zip(inputs, targets, strict=True):
        real = wanted != -100
        assert not (real[1:] & ~real[:-1]).any()  # the padding comes last
        assert row[real][1:].equal(wanted[real][:-1])
        pieces.append([row[0].item(), *wanted[real].tolist()])
    return pieces


LENGTHS = [[3], [0], [4, 0, 9, 1], [25], [7] * 30, [1, 40, 2, 19, 20, 21]]


@pytest.mark.parametrize("T", [1, 4, 20])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pieces_are_the_documents(lengths, T):
    tokens = documents(lengths)
    cut = stream.Pieces(tokens, 0, T, 3)
    first = 0
    for number in range(4):
        count = len(cut.round(number))
        inputs, targets = cut.batch(first, count)
        first += count
        assert inputs.shape == targets.shape
        assert targets.shape[1] <= T
        pieces = unpadded(inputs, targets)
        assert all(len(piece) > 1 for piece in pieces)
        assert not any(0 in piece[1:-1] for piece in pieces)  # a document's end is a piece's end
        assert Counter(token for piece in pieces for token in piece[1:]) == Counter(tokens.tolist())
        assert {pair for piece in pieces for pair in pairwise(piece)} <= {*pairwise([0, *tokens.tolist()])}
        whole = [piece for piece in pieces if piece[0] == 0 and piece[-1] == 0]
        assert len(whole) >= sum(length < T for length in lengths)  # what fits is not cut


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_piece_depends_on_seed_and_number_alone(lengths):
    tokens, T = documents(lengths), 4
    whole = unpadded(*stream.Pieces(tokens, 0, T, 3).batch(0, 60))
    for B in (1, 7):
        cut = stream.Pieces(tokens, 0, T, 3)
        for first in reversed(range(0, 60, B)):
            assert unpadded(*cut.batch(first, min(B, 60 - first))) == whole[first : first + B]


def test_a_long_document_is_cut_elsewhere_each_round():
    cut = stream.Pieces(documents([100]), 0, 10, 3)
    firsts = {int(cut.round(number).min(axis=0)[1]) for number in range(100)}
    assert firsts == set(range(1, 11))


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("B", [1, 5, 32])
@pytest.mark.parametrize("T", [3, 16])
def test_losses_are_those_of_each_window_read_alone(T, B):
    torch.manual_seed(0)
    model = GPT(V=40, T=16, C=8, H=2, L=1).eval()
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(40, (length,), generator=draw) for length in (2, 4, 17, 16, 40, 2)]
    alone = []
    for text in texts:
        for start in range(0, len(text) - 1, T):
            window = text[start : start + T + 1]
            chances = model(window[None, :-1])[0].log_softmax(-1)
            alone += [-chances[t, token].item() for t, token in enumerate(window[1:])]
    found = stream.losses(model, texts, T, B)
    torch.testing.assert_close(found, torch.tensor(alone), atol=1e-5, rtol=1e-5)
    assert not found.requires_grad


def test_evaluate_sums_over_the_held_out_part(tales):
    torch.manual_seed(0)
    model = GPT(V=tales.tokenizer.V, T=300, C=8, H=2, L=1).eval()
    total = stream.evaluate(model, tales, 300)
    tokens = sum(len(document) - 1 for document in tales.held_out)
    assert math.isclose(total, stream.losses(model, tales.held_out, 300).double().sum().item(), rel_tol=1e-6)
    assert abs(total / tokens / math.log(tales.tokenizer.V) - 1) < 0.05  # it has learned nothing yet
