"""The trained story model under results/ is what its numbers say."""

import json
import re
from bisect import bisect_right

from lab import ladder
from lab.stories import WORDS, write
from lab.stream import evaluate, prepare
from lab.tokenizer import END
from lab.training import load_model, tell

import course
import pytest
import torch

LESSON = course.ROOT / "results" / "09_training_pipeline" / "02_train_gpt"
MODEL = LESSON.with_suffix(".model")


@pytest.fixture(scope="module")
def kept():
    return load_model(MODEL, torch.device("cpu"))


@pytest.fixture(scope="module")
def facts():
    return json.loads(LESSON.with_suffix(".json").read_text("utf-8"))


def test_is_small_and_of_the_run_that_is_told_of(kept, facts):
    model, tokenizer, said = kept
    (rung,) = facts["rungs"]
    assert MODEL.stat().st_size <= 4_000_000
    assert rung | {"steps": facts["steps"], "told": said["told"]} == said
    assert sum(weight.numel() for weight in model.parameters()) == rung["parameters"]
    assert model.settings["V"] == tokenizer.V


def test_loses_on_held_out_stories_what_it_says(kept, facts, tmp_path):
    model, tokenizer, said = kept
    text = prepare("stories", facts["seed"], tokenizer.V, tmp_path, tokenizer, characters=1)
    nats = evaluate(model, text, model.settings["T"]) / text.characters
    assert text.name == said["corpus"]
    assert text.floor == pytest.approx(said["floor"], rel=1e-9)
    assert nats == pytest.approx(said["nats_per_character"], rel=1e-3)
    assert text.floor < nats < 1.15 * text.floor


def test_tells_stories_as_it_says(kept, facts):
    """Exactly the same ones where rounding is the same; else, as they are drawn, ones as good."""
    model, tokenizer, said = kept
    told = tell(model, tokenizer, said["told"], facts["seed"])
    far = ladder.rung_of("", "", None, 0.0, told, 0, 0.0)
    assert far["faultless_characters"] == pytest.approx(said["faultless_characters"], rel=0.15)
    assert far["flawless"] == pytest.approx(said["flawless"], abs=0.05)


def test_has_not_learned_that_nothing_is_drawn_twice(kept):
    """The chances of places that a story has named, where another one is to be drawn: what the note says."""
    model, tokenizer, _ = kept
    tokens = {place: tokenizer.encode(f" {place}") for place in WORDS["place"]}
    assert all(len(ids) == 1 for ids in tokens.values())
    named, new, there = [], [], []
    for story in write(777, 120_000):
        ids = [tokenizer.special[END], *tokenizer.encode(story.text)]
        starts = [len(tokenizer.decode(ids[1:end])) for end in range(1, len(ids))]
        with torch.no_grad():
            chances = model(torch.tensor([ids]))[0].softmax(-1)  # (T, V)
        drawn = [choice for choice in story.choices if choice.option in tokens]
        for number, choice in enumerate(drawn[1:], 1):
            here = chances[bisect_right(starts, choice.position) - 1]  # (V,)
            had = {before.option for before in drawn[:number]}
            each = {place: here[token].item() for place, (token,) in tokens.items()}
            named += [each[place] for place in had]
            new += [each[place] for place in each.keys() - had]
            there.append(sum(each[place] for place in had))
    assert len(there) > 300
    assert 0.9 < (sum(named) / len(named)) / (sum(new) / len(new)) < 1.1
    assert 0.08 < sum(there) / len(there) < 0.13


def test_the_note_tells_of_it(facts):
    note = (course.ROOT / "sprints/09_training_pipeline/notes/02_train_gpt.md").read_text("utf-8")
    (rung,) = facts["rungs"]
    above = rung["nats_per_character"] / rung["floor"] - 1
    assert f"That is {above:.1%} above the floor." in note
    assert f"go {rung['faultless_characters']:.0f} characters on average" in note
    found = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", note, flags=re.MULTILINE)
    reports = {report["step"]: report for report in facts["reports"]}
    assert len(found) > 3
    for step, training, held_out, times in found:
        report = reports[int(step.replace(",", ""))]
        assert float(training) == round(report["training_nats_per_token"], 3)
        assert float(held_out) == round(report["held_out_nats_per_character"], 4)
        assert float(times) == round(report["held_out_nats_per_character"] / rung["floor"], 2)
