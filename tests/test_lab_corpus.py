"""lab.corpus and lab.ladder: what all language models are trained on, and what they are asked."""

import json
import math

from lab import BadInput, corpus, ladder, stories

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tales() -> corpus.Corpus:
    return corpus.load("stories", 7, CPU)


class Knows:
    """A model that knows one text by heart: at its t-th character it expects the t-th of the text."""

    def __init__(self, ids: torch.Tensor, V: int, certainty: float) -> None:
        self.ids, self.V, self.certainty = ids, V, certainty

    def __call__(self, ids, state=None):
        start = 1 - corpus.LEAD if state is None else state
        expected = self.ids[torch.arange(start, start + ids.shape[1]).clamp(0, len(self.ids) - 1)]  # (T,)
        logits = self.certainty * torch.nn.functional.one_hot(expected, self.V).float()  # (T, V)
        return logits.expand(len(ids), -1, -1), start + ids.shape[1]


def test_stories_are_split_by_seed(tales):
    text, held_out = tales.decode(tales.train), [tales.decode(ids) for ids in tales.held_out]
    assert text == "".join(story.text for story in stories.write(7, corpus.TRAINING))
    assert len(text) >= corpus.TRAINING
    assert not any(document.strip() in text for document in held_out)
    assert all(document[: corpus.LEAD] == "\n\n" for document in held_out)
    told = [stories.parse(document[corpus.LEAD :]) for document in held_out]
    characters = sum(len(story.text) for story in told)
    assert characters >= corpus.HELD_OUT
    assert math.isclose(tales.floor, sum(story.nats for story in told) / characters)
    assert stories.write(8, 1)[0].text not in text


@pytest.mark.parametrize("seed", range(20))
def test_no_seed_holds_out_what_it_trains_on(seed):
    """Python's generator draws alike for some pairs of whole numbers, such as 2 and 2**32 + 2."""
    held_out = {story.text for story in stories.write(f"held out {seed}", 3_000)}
    assert held_out.isdisjoint(story.text for story in stories.write(seed, 3_000))


def test_batches_are_windows_of_the_training_text(tales):
    inputs, targets = tales.batch(5, 33, torch.Generator().manual_seed(1))
    assert inputs.shape == targets.shape == (5, 33)
    text = tales.decode(tales.train)
    for row, target in zip(inputs, targets, strict=True):
        assert tales.decode(torch.cat([row, target[-1:]])) in text
        assert torch.equal(row[1:], target[:-1])


def test_documents_are_the_held_out_text(tales):
    read = []
    for inputs, targets, mask in tales.documents(B=50):
        for row, target, real in zip(inputs, targets, mask, strict=True):
            read.append(tales.decode(target[real]))
            assert tales.decode(row[real]) == "\n" + read[-1][:-1]
    assert read == [tales.decode(document[corpus.LEAD :]) for document in tales.held_out]


def test_a_file_is_cut_in_two(tmp_path):
    text = "".join(chr(97 + (i * i) % 23) for i in range(20_007))
    (tmp_path / "text").write_text(text, encoding="utf-8")
    own = corpus.load(str(tmp_path / "text"), 0, CPU)
    held_out = "".join(own.decode(document[corpus.LEAD :]) for document in own.held_out)
    assert own.decode(own.train) + held_out == text
    assert len(own.train) == 18_006
    assert own.floor is None
    before = [document[: corpus.LEAD].tolist() for document in own.held_out]
    assert before == [ids[-corpus.LEAD :].tolist() for ids in (own.train, *own.held_out[:-1])]


@pytest.mark.parametrize("text", ["", "too short a text " * 100])
def test_a_file_that_is_no_corpus(tmp_path, text):
    (tmp_path / "text").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="text"):
        corpus.load(str(tmp_path / "text"), 0, CPU)


def test_nats_per_character_of_uniform_guessing(tales):
    uniform = ladder.nats_per_character(Knows(tales.train, tales.V, 0.0), tales)
    assert math.isclose(uniform, math.log(tales.V), rel_tol=1e-6)


def test_a_model_that_knows_a_story_tells_it(tales):
    story = stories.write(7, 1)[0].text
    told = ladder.tell(Knows(tales.train, tales.V, 50.0), tales, 3, seed=0)
    assert told == [story] * 3
    assert ladder.flawless(told) == 1
    assert ladder.flawless([story, story[:-1], story + "x", story.replace("the", "teh", 1), ""]) == 0.2


def test_a_rung_is_what_the_model_earns(tales):
    rung = ladder.rung("by heart", Knows(tales.train, tales.V, 50.0), tales, 0, 1.26, seed=0)
    assert rung["flawless"] == 1
    assert rung["corpus"] == "stories 7"
    assert rung["training_seconds"] == 1.3
    assert rung["nats_per_character"] > math.log(tales.V)  # sure of itself, and wrong about other stories
    assert ladder.is_rung(json.loads(json.dumps(rung)))
    for damage in ({"floor": "low"}, {"name": None}, {"flawless": [1]}):
        assert not ladder.is_rung({**rung, **damage})
    assert not ladder.is_rung([rung])
