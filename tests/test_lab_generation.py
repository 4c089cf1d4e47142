"""lab.generation: filters against slow versions, and what is written against a model without a cache."""

import gc
import itertools
import math
import weakref

from lab.generation import (
    Sampler,
    beam_search,
    cache_for,
    context_start,
    for_writing,
    generate,
    greedy,
    min_p,
    repetition_penalty,
    stream,
    temperature,
    top_k,
    top_p,
)
from lab.gpt import GPT, initialise

import pytest
import torch

NONE = torch.zeros(1, 0, dtype=torch.long)


@pytest.fixture(params=range(2), autouse=True)
def in_float64(request):
    """Every test on two seeds, in double precision, without gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(request.param)
    with torch.no_grad():
        yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def small(**changes: int) -> GPT:
    """A model with weights so large that every token matters."""
    model = GPT(**{"V": 23, "T": 16, "C": 12, "H": 3, "L": 2} | changes)
    initialise(model, std=0.5)
    return model.eval()


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(23, (length,)).tolist() for length in lengths]


def alone(model: GPT, prompt: list[int], most: int, end: int | None = None) -> list[int]:
    """Greedy, one text, no cache; a full context is begun anew with its last half."""
    ids, start, room = list(prompt), 0, model.settings["T"]
    for _ in range(most):
        while len(ids) - start > room:
            start += room // 2 + 1
        ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


# ── What to choose ────────────────────────────────────────────────────────────────────────────────────────


def stays_top_p(chances: list[float], p: float) -> list[bool]:
    left = []
    for token in sorted(range(len(chances)), key=lambda token: -chances[token]):
        if not left or sum(chances[token] for token in left) < p:
            left.append(token)
    return [token in left for token in range(len(chances))]


SLOW = {
    top_k: lambda chances, k: [sum(other > chance for other in chances) < k for chance in chances],
    top_p: stays_top_p,
    min_p: lambda chances, p: [chance >= p * max(chances) for chance in chances],
}
CUTS = [(top_k, k) for k in (1, 2, 5, 99)] + [
    (cut, p) for cut in (top_p, min_p) for p in (0.01, 0.35, 0.8, 1.0)
]


@pytest.mark.parametrize(("cut", "setting"), CUTS)
@pytest.mark.parametrize("V", [1, 2, 3, 17])
def test_cuts_equal_slow_ones(cut, setting, V):
    some = torch.randn(6, V) * 3
    tied = torch.randint(3, (6, V)).double()
    for logits in (some, tied, some.masked_fill(torch.rand(6, V).argsort(1) > V // 2, -torch.inf)):
        given = logits.clone()
        ours = cut(setting)(logits, NONE)
        for row, before, after in zip(logits.softmax(-1).tolist(), logits, ours, strict=True):
            stays = torch.tensor(SLOW[cut](row, setting)) & before.isfinite()
            assert (after.isfinite() == stays).all()
            assert (after[stays] == before[stays]).all()
        assert torch.equal(logits, given), "the logits themselves are changed"


def test_of_tied_tokens_the_first_stay():
    logits = torch.zeros(2, 10)
    assert top_p(0.35)(logits, NONE).isfinite().tolist() == [[True] * 4 + [False] * 6] * 2
    assert top_k(3)(logits, NONE).isfinite().all()  # ties stay together
    assert greedy(logits, NONE).tolist() == [0, 0]


def test_p_1_leaves_every_token_of_a_large_vocabulary():
    logits = torch.randn(2, 50_257, dtype=torch.float32) * 4
    assert torch.equal(top_p(1.0)(logits, NONE), logits)


def test_what_is_left_is_never_nothing():
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    for cut, setting in (*CUTS, (top_p, 0.0), (min_p, 0.0)):
        assert cut(setting)(logits, NONE).argmax() == 0
        assert cut(setting)(logits, NONE)[0, 0] == 0


def test_temperature():
    logits = torch.randn(3, 9)
    chances = logits.softmax(-1) ** (1 / 0.7)
    torch.testing.assert_close(temperature(0.7)(logits, NONE).softmax(-1), chances / chances.sum(-1, True))
    for T in (0, -1.0):
        with pytest.raises(ValueError, match="greedy"):
            temperature(T)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty(penalty):
    logits, ids = torch.randn(4, 7), torch.randint(7, (4, 5))
    wanted = logits.clone()
    for row, said in enumerate(ids.tolist()):
        for token in set(said):
            wanted[row, token] *= penalty if wanted[row, token] < 0 else 1 / penalty
    torch.testing.assert_close(repetition_penalty(penalty)(logits, ids), wanted)


def test_sampler_draws_what_the_filters_leave():
    logits, N = torch.randn(1, 8), 20_000
    filters = [temperature(1.5), top_p(0.8)]
    chances = top_p(0.8)(logits / 1.5, NONE).softmax(-1)[0]
    drawn = Sampler(torch.Generator().manual_seed(1), filters)(logits.expand(N, -1), NONE)
    counts = torch.bincount(drawn, minlength=8)
    assert (counts[chances == 0] == 0).all()
    assert ((counts / N - chances).abs() < 6 * (chances * (1 - chances) / N).sqrt() + 1e-9).all()


def test_sampler_gives_filters_the_text_so_far_and_depends_on_its_generator_alone():
    seen = []

    def remember(logits, ids):
        seen.append(ids.tolist())
        return logits

    model, [prompt] = small(), prompts(4)
    texts = [
        generate(model, [prompt], Sampler(torch.Generator().manual_seed(seed), [remember]), 6)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert seen[5] == [prompt + texts[0][0][:5]]


# ── Nothing twice ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pieces", [[16], [1] * 16, [3, 1, 7, 5], [15, 1], [1, 15]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"L": 1, "H": 1}, {"L": 3, "C": 8, "H": 4}], ids=str)
def test_cached_logits_are_the_same(pieces, changes):
    model, ids = small(**changes), torch.randint(23, (3, 16))
    cache = cache_for(model)
    found = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, model(ids), rtol=1e-10, atol=1e-10)
    assert cache.length == 16
    assert sum(kept.nbytes for block in cache.blocks for kept in (block.keys, block.values)) == (
        2 * model.settings["L"] * model.settings["C"] * 16 * 3 * 8
    )
    with pytest.raises(ValueError, match="places for only 16"):
        model(ids[:, :1], cache)


@pytest.mark.parametrize("rows", [[2, 0], [1], [0, 0, 2, 1, 1], []], ids=str)
def test_selected_rows_go_on(rows):
    model, ids = small(), torch.randint(23, (3, 9))
    cache, rows = cache_for(model), torch.tensor(rows, dtype=torch.long)
    model(ids[:, :5], cache)
    cache.select(rows)
    torch.testing.assert_close(model(ids[rows, 5:], cache), model(ids)[rows, 5:], rtol=1e-10, atol=1e-10)


def test_a_cache_is_gone_with_its_last_reference():
    """Not only when the garbage collector comes round, as by then an accelerator may be full."""
    model = small()
    gc.disable()
    try:
        cache = cache_for(model)
        model(torch.zeros(1, 3, dtype=torch.long), cache)
        keys = weakref.ref(cache.blocks[0].keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("room", [1, 2, 3, 7, 16])
def test_context_start(room):
    start = 0
    for T in range(1, 5 * room + 3):
        if T - start > room:
            start = T - (room + 1) // 2  # the last half
        assert context_start(T, room) == start


@pytest.mark.parametrize("lengths", [(5,), (1, 9, 4), (3, 3, 3), (20, 2, 16, 17), (40, 1)], ids=str)
@pytest.mark.parametrize("most", [1, 2, 30])
def test_every_row_writes_what_it_would_alone(lengths, most):
    model, texts = small(), prompts(*lengths)
    end = alone(model, texts[-1], 7)[-1]
    for stop in (None, end):
        expected = [alone(model, text, most, stop) for text in texts]
        assert generate(model, texts, greedy, most, stop) == expected
        assert generate(model, texts[-1:], greedy, most, stop) == expected[-1:]


def test_a_context_of_one():
    model, texts = small(T=1), prompts(1, 3)
    assert generate(model, texts, greedy, 5) == [alone(model, text, 5) for text in texts]


def test_stream_says_which_rows_go_on():
    model, texts = small(), prompts(2, 5, 2)
    written = [[], [], []]
    for rows, tokens in stream(model, texts, greedy, most=6):
        assert len(rows) == len(tokens) > 0
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            written[row].append(token)
    assert written == [alone(model, text, 6) for text in texts]
    endless = stream(model, texts[:1], greedy)
    assert [next(endless)[1].item() for _ in range(40)] == alone(model, texts[0], 40)
    assert torch.is_grad_enabled() is False
    with torch.enable_grad():
        next(endless)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_no_token_is_read_twice_and_none_after_the_end():
    model, texts, read = small(), prompts(3, 1, 7), []
    end = alone(model, texts[0], 3)[-1]
    model.tokens.register_forward_hook(lambda module, given, out: read.append(given[0].numel()))
    written = generate(model, texts, greedy, 8, end)
    assert sum(read) == sum(map(len, texts + written)) - len(texts)  # the last token of each is not read


def test_a_copy_for_writing_is_the_same_model():
    model, ids, texts = small(), torch.randint(23, (3, 16)), prompts(3, 1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    faster = for_writing(model)
    torch.testing.assert_close(faster(ids), model(ids), rtol=1e-12, atol=1e-12)
    assert generate(faster, texts, greedy, 30) == generate(model, texts, greedy, 30)
    for found in (model.state_dict(), faster.state_dict()):
        torch.testing.assert_close(dict(found), before, rtol=0, atol=0)
    for weight, other in zip(model.parameters(), faster.parameters(), strict=True):
        assert weight.is_contiguous()
        assert weight.requires_grad
        assert weight.data_ptr() != other.data_ptr()
    model.load_state_dict(faster.state_dict())


def test_nothing_to_write():
    model, texts = small(), prompts(3, 5)
    assert generate(model, [], greedy, 5) == []
    assert generate(model, texts, greedy, 0) == generate(model, texts, greedy, -3) == [[], []]
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], greedy, 5)


# ── Beam search ───────────────────────────────────────────────────────────────────────────────────────────


def log_probability(model: GPT, prompt: list[int], text: tuple[int, ...]) -> float:
    chances = model(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    return sum(row[token].item() for row, token in zip(chances, text, strict=True))


@pytest.mark.parametrize("end", [None, 0, 2])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_wide_beam_finds_every_text(end, most):
    model, prompt = small(V=3), [1, 2]
    texts = {
        text[: text.index(end) + 1] if end in text else text
        for text in itertools.product(range(3), repeat=most)
    }
    wanted = sorted(((log_probability(model, prompt, text), list(text)) for text in texts), reverse=True)
    found = beam_search(model, prompt, 3**most, most, end)
    assert [text for _, text in found] == [text for _, text in wanted]
    assert all(math.isclose(a, b, abs_tol=1e-10) for (a, _), (b, _) in zip(found, wanted, strict=True))
    assert beam_search(model, prompt, 2, most, end)[0][0] <= wanted[0][0] + 1e-12


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_narrow_beam_equals_a_slow_one(width):
    model, prompt = small(V=7), [3]
    beams = [(0.0, ())]
    for _ in range(6):
        longer = [(*text, token) for _, text in beams for token in range(7)]
        beams = sorted(((log_probability(model, prompt, text), text) for text in longer), reverse=True)[
            :width
        ]
    found = beam_search(model, prompt, width, 6)
    assert [tuple(text) for _, text in found] == [text for _, text in beams]
    if width == 1:
        assert [found[0][1]] == generate(model, [prompt], greedy, 6)


def test_beams_of_nothing():
    assert beam_search(small(), [1], 3, 0) == [(0.0, [])]


# ── Hugging Face ──────────────────────────────────────────────────────────────────────────────────────────


def test_filters_are_hugging_faces():
    theirs = pytest.importorskip("transformers", reason="uv run --with transformers pytest -k generation")
    logits, ids = torch.randn(5, 40) * 2, torch.randint(40, (5, 9))
    pairs = [
        (temperature(0.7), theirs.TemperatureLogitsWarper(0.7)),
        (top_k(7), theirs.TopKLogitsWarper(7)),
        (top_p(0.83), theirs.TopPLogitsWarper(0.83)),
        (min_p(0.07), theirs.MinPLogitsWarper(0.07)),
        (repetition_penalty(1.3), theirs.RepetitionPenaltyLogitsProcessor(1.3)),
    ]
    for ours, wanted in pairs:
        torch.testing.assert_close(ours(logits, ids), wanted(ids, logits.clone()))
