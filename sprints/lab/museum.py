"""The bug museum that closes each sprint: mistakes that run, return the right shapes, and are wrong.

An exhibit is a class. Its docstring names the mistake; `wrong` makes it, `right` is the same with the
one-line repair; `symptom` says what a person would see; `passes` is the check that tells the two apart.
`show` proves about all of them that the shapes give nothing away, that the check catches the wrong one, and
that the right one passes it. So every exhibit is also a proof that the check can fail.

Derived in: –
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from lab.lesson import Lesson

from torch import Tensor

Outcome = Tensor | Sequence[Tensor]
Variant = Callable[[], Outcome]

CLAIMS = (
    "every wrong version returns what the right one returns, in shape and dtype",
    "the named check catches every wrong version",
    "every right version passes the same check",
)


class Exhibit(ABC):
    """The name of the mistake."""

    check: str  # what the check holds the code to
    repair: str  # the line that puts it right

    @abstractmethod
    def wrong(self) -> Outcome:
        """The mistake, as people make it."""

    @abstractmethod
    def right(self) -> Outcome:
        """The same, repaired."""

    @abstractmethod
    def symptom(self, wrong: Outcome, right: Outcome) -> str:
        """What a person would see, or would have to compare to see anything."""

    @abstractmethod
    def passes(self, variant: Variant) -> bool:
        """The check; `variant` is self.wrong or self.right."""


class Twin(Exhibit):
    """An exhibit with both versions in one method, to show how little lies between them."""

    look: str  # where one looks

    @abstractmethod
    def made(self, wrong: bool) -> Outcome:
        """Either version."""

    @abstractmethod
    def seen(self, made: Outcome) -> str:
        """What one sees of it there."""

    def begin(self) -> None:
        """What both versions begin with, such as the same random numbers."""

    def wrong(self) -> Outcome:
        self.begin()
        return self.made(wrong=True)

    def right(self) -> Outcome:
        self.begin()
        return self.made(wrong=False)

    def symptom(self, wrong: Outcome, right: Outcome) -> str:
        return f"{self.look} {self.seen(wrong)}   (right: {self.seen(right)})"


def show(lesson: Lesson, exhibits: Sequence[type[Exhibit]]) -> None:
    """Show every exhibit; prove claims 1, 2 and 3 of the lesson, which must be CLAIMS."""
    if tuple(lesson.claims.values())[:3] != CLAIMS:
        raise ValueError(f"the claims of a bug museum begin with {CLAIMS}")
    alike, caught, passed = [], [], []
    for exhibit in (kind() for kind in exhibits):
        lesson.heading((type(exhibit).__doc__ or "").strip().rstrip("."))
        wrong, right = exhibit.wrong(), exhibit.right()
        alike.append(_shapes(wrong) == _shapes(right))
        print(f"    symptom  {exhibit.symptom(wrong, right)}")
        caught.append(not exhibit.passes(exhibit.wrong))
        passed.append(exhibit.passes(exhibit.right))
        verdict = f"wrong {'✗' if caught[-1] else '✓'} right {'✓' if passed[-1] else '✗'}"
        print(f"    check    {exhibit.check}: {verdict}")
        print(f"    repair   {exhibit.repair}")
    print()
    for number, held in enumerate((alike, caught, passed), start=1):
        lesson.proves(number, all(held), f"{sum(held)} of {len(exhibits)}")


def _shapes(outcome: Outcome) -> list[tuple]:
    parts = [outcome] if isinstance(outcome, Tensor) else outcome
    return [(tuple(part.shape), part.dtype) for part in parts]
