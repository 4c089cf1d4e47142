"""lab.museum: an exhibit that does not teach what it says breaks a claim."""

import types

from lab.museum import CLAIMS, Exhibit, show

import pytest
import torch


class Halved(Exhibit):
    """A mean that is half of what it should be."""

    check = "the mean of ones is one"
    repair = "divide once"

    def wrong(self):
        return torch.ones(3).mean() / 2

    def right(self):
        return torch.ones(3).mean()

    def symptom(self, wrong, right):
        return f"{wrong:.1f} (right: {right:.1f})"

    def passes(self, variant):
        return variant().item() == 1


class Harmless(Halved):
    """Nothing is wrong here."""

    def wrong(self):
        return self.right()


class Hopeless(Halved):
    """The repair does not repair."""

    def right(self):
        return self.wrong()


class Misshapen(Halved):
    """Its dtype gives it away."""

    def wrong(self):
        return torch.tensor(0.5, dtype=torch.float64)


@pytest.fixture
def verdicts():
    """verdicts(exhibits): which of the three claims held."""

    def verdicts(*exhibits):
        held = {}
        claims = dict(enumerate(CLAIMS, start=1))
        lesson = types.SimpleNamespace(
            claims=claims, heading=print, proves=lambda number, truth, _: held.update({number: truth})
        )
        show(lesson, exhibits)
        return held

    return verdicts


def test_a_good_exhibit(verdicts, capsys):
    assert verdicts(Halved) == {1: True, 2: True, 3: True}
    assert "the mean of ones is one: wrong ✗ right ✓" in capsys.readouterr().out


@pytest.mark.parametrize(("exhibit", "broken"), [(Misshapen, 1), (Harmless, 2), (Hopeless, 3)])
def test_a_bad_exhibit(verdicts, exhibit, broken):
    assert verdicts(Halved, exhibit)[broken] is False


def test_the_claims_of_a_museum_are_fixed():
    with pytest.raises(ValueError, match="claims of a bug museum"):
        show(types.SimpleNamespace(claims={1: "something else"}), [Halved])
