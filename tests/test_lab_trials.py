"""The protocol of sprint 11."""

from dataclasses import replace

from lab import BadInput
from lab.tokenizer import END
from lab.trials import SETTINGS, Recipe, Trial, characters, for_tuning, interval, student, table, trial

import numpy as np
import pytest
import torch
from torch import nn


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (30, 2.045)])
def test_student_as_in_every_table(n, t):
    assert student(n) == pytest.approx(t, abs=6e-4)


def test_an_interval_is_that_of_the_mean():
    low, high = interval(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], dtype=torch.float64))
    torch.testing.assert_close((low + high) / 2, torch.tensor([2.0, 5.0], dtype=torch.float64))
    assert (high - low)[0].item() == pytest.approx(2 * 4.3027 / 3**0.5, rel=1e-3)
    assert (high - low)[1] == 0


@pytest.mark.parametrize("text", ["stories", "one line of a file. " * 500, "Ωμέγα 🦉 世界\n" * 997])
def test_the_tuning_text_is_the_end_of_the_training_part(tmp_path, text):
    data = text
    if text != "stories":
        data = tmp_path / "text.txt"
        data.write_text(text, "utf-8")
    whole = characters(str(data), 0)
    tuning, end = for_tuning(whole), whole.tokenizer.special[END]
    kept = np.concatenate([[*document[1:].tolist(), end] for document in tuning.held_out])
    assert np.array_equal(np.concatenate([tuning.train, kept]), whole.train)
    assert 0.04 < len(kept) / len(whole.train) < 0.06
    assert all(document[0] == end and end not in document[1:] for document in tuning.held_out)
    written = "".join(whole.tokenizer.decode(document[1:].tolist()) for document in tuning.held_out)
    assert tuning.characters == len(written)
    assert "\ufffd" not in written  # no character is cut
    assert tuning.bytes == len(kept) - len(tuning.held_out)


def test_a_text_that_is_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("short", "utf-8")
    with pytest.raises(BadInput, match="too few"):
        characters(str(tmp_path / "short.txt"), 0)


def test_a_trial_is_that_of_its_recipe():
    class Guess(nn.Module):
        """The same chance for each token, whatever it learns."""

        def __init__(self, V: int, T: int) -> None:
            super().__init__()
            self.settings, self.nothing = {"V": V, "T": T}, nn.Parameter(torch.zeros(()))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.nothing * torch.zeros(*ids.shape, self.settings["V"])

    text = characters("stories", 0)
    found = trial(Recipe("guess", Guess, replace(SETTINGS, steps=2)), text, torch.device("cpu"), 0)
    tokens = sum(len(document) - 1 for document in text.held_out)
    assert found.nats == pytest.approx(np.log(257) * tokens / text.characters, rel=1e-5)
    assert not found.model.training


def test_a_table_compares_seed_by_seed():
    base, other = ([Trial(nats, 1.0, nn.Identity()) for nats in values] for values in ((1, 2, 3), (2, 3, 4)))
    lines = table({"base": base, "one nat worse": other})
    assert "2.0000 ± 1.0000" in lines[1]
    assert "+1.0000   +1.0000 to +1.0000" in lines[2]
