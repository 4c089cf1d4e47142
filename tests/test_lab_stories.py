"""lab.stories: one derivation for each story, exact information, and mistakes found where they are."""

import hashlib
import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lab import stories
from lab.stories import GRAMMAR, PRONOUNS, WORDS, Grammar, Mistake, Story, parse, write

import pytest

CATEGORY = {word: category for category, words in WORDS.items() for word in words}
SMALL = Grammar(
    {
        "note": {"<who> <news>\n": 3, "Nobody came.\n": 1},
        "who": ["{a=name} met {b=name}.", "{a=name} was alone.", "It was the {home=place} of {a=name}."],
        "news": {
            "They ate {b.his} {food=food}. <news>": 2,  # not for those who met nobody
            "{a.He} slept.{last:=a}<who_slept>": 1.5,
            "So {a.he} left the {home}. <news>": 1,
            "{b} sang.{last:=b}<who_slept>": 0.5,
        },
        "who_slept": [" Who? {last}.", ""],
    },
    {"name": ["Mia", "Ben", "Nora"], "place": ["mill", "castle"], "food": ["pear", "soup"]},
)
# "" begins with everything, so SMALL cannot be parsed; its entropy is exact all the same


@pytest.fixture(scope="module")
def told() -> list[Story]:
    return [story for seed in (0, 1, 2, 2**32 + 7) for story in write(seed, 300_000)]


class Guided:
    """A hand for Grammar.walk: makes the choices it is given, then the first ones; notes the others."""

    def __init__(self, guide: tuple[int, ...]) -> None:
        self.guide, self.text, self.made, self.others = guide, "", (), []

    @property
    def position(self) -> int:
        return len(self.text)

    def choose(self, options, weights, lead) -> int:
        number = self.guide[len(self.made)] if len(self.made) < len(self.guide) else 0
        if len(self.made) >= len(self.guide):
            self.others += [(*self.made, other) for other in range(1, len(options))]
        self.made += (number,)
        return number

    def say(self, words, fact) -> None:
        self.text += words


def every_story(grammar: Grammar) -> Iterator[Story]:
    """All derivations of a grammar."""
    guides = [()]
    while guides:
        hand = Guided(guides.pop())
        yield grammar.walk(hand)
        guides += hand.others


class Completing(Guided):
    """A hand that tells a story which begins with a given text. LookupError if there is none."""

    def __init__(self, beginning: str) -> None:
        super().__init__(())
        self.beginning = beginning

    def choose(self, options, weights, lead) -> int:
        rest = self.beginning[len(self.text) :]
        begins = ["".join(words for words, _ in lead(option)) for option in options]
        fitting = [n for n, words in enumerate(begins) if words.startswith(rest) or rest.startswith(words)]
        return fitting[0]

    def say(self, words, fact) -> None:
        super().say(words, fact)
        if not (self.beginning.startswith(self.text) or self.text.startswith(self.beginning)):
            raise LookupError


def begins_a_story(text: str) -> bool:
    """By the definition: there is a story that begins so, and here it is."""
    try:
        story = GRAMMAR.walk(Completing(text))
    except LookupError:
        return False
    return story.text.startswith(text) and parse(story.text).text == story.text


def check_found(text: str, damaged: int) -> Mistake:
    """The parser finds a mistake in a text that is a story up to `damaged`, and exactly where it is."""
    with pytest.raises(Mistake) as caught:
        parse(text)
    mistake = caught.value
    assert mistake.position >= damaged
    assert begins_a_story(text[: mistake.position])
    assert not begins_a_story(text[: mistake.position + 1])
    assert all(begins_a_story(text[: mistake.position] + expected) for expected in mistake.expected)
    assert str(mistake).startswith(f"character {mistake.position}: ")
    assert "\n" not in str(mistake)
    assert len(str(mistake)) < 300
    return mistake


def replaced(story: Story, mention: stories.Mention, other: str) -> str:
    """The text with another word in this place."""
    return story.text[: mention.position] + other + story.text[mention.position + len(mention.text) :]


class TestWriting:
    def test_the_same_seed_writes_the_same(self):
        """On every machine, for ever: what is measured on these stories stays comparable."""
        text = "".join(story.text for story in write(0, 20_000))
        assert (
            hashlib.sha256(text.encode()).hexdigest()
            == "f56eb24780f527e4bf03aed161e3958143e8ad3c1780db0337eb63a1ba1bbd1b"
        )

    def test_another_seed_writes_other_stories(self, told):
        assert len({story.text for story in told}) == len(told)

    def test_as_many_characters_as_asked_for(self):
        for characters in (1, 1_000, 20_000):
            lengths = [len(story.text) for story in write(5, characters)]
            assert sum(lengths[:-1]) < characters <= sum(lengths)

    def test_plain_characters(self, told):
        text = "".join(story.text for story in told)
        assert len(set(text)) < 80
        assert text.isascii()
        assert "  " not in text
        assert text.count("\n\n") == len(told)
        assert text.count("\n") == 3 * len(told)

    def test_nothing_is_drawn_twice(self, told):
        for story in told:
            drawn = Counter(choice.option for choice in story.choices)
            assert set(drawn.values()) == {1}

    def test_facts_keep_to_their_words(self, told):
        for story in told:
            for mention in story.mentions:
                word = story.facts[mention.fact]
                assert story.text[mention.position :].startswith(mention.text)
                assert mention.text == word or mention.text.lower() in PRONOUNS[word]

    def test_options_are_taken_as_often_as_they_should(self):
        draw, chances, count = random.Random(3), Counter(), 20_000
        for story in every_story(SMALL):
            chances[story.text] += math.exp(-story.nats)
        counted = Counter(SMALL.tell(draw).text for _ in range(count))
        assert counted.keys() <= chances.keys()
        for text, chance in chances.items():
            assert abs(counted[text] / count - chance) < 5 * math.sqrt(chance * (1 - chance) / count)


class TestOneDerivation:
    def test_stories_parse_back_to_the_choices_that_wrote_them(self, told):
        for story in told:
            read = parse(story.text)
            assert read == story
            assert read.nats == story.nats

    def test_no_option_begins_with_another(self):
        class Careful(stories._Writer):
            def choose(self, options, weights, lead):
                begins = sorted("".join(words for words, _ in lead(option)) for option in options)
                for first, second in itertools.pairwise(begins):  # sorted: a prefix stands before its word
                    assert not second.startswith(first), (first, second)
                return super().choose(options, weights, lead)

        hand = random.Random(11)
        for _ in range(1_000):
            GRAMMAR.walk(Careful(hand))

    def test_words(self):
        assert sum(map(len, WORDS.values())) == len(CATEGORY)  # none is of two categories
        for words in WORDS.values():
            for first, second in itertools.pairwise(sorted(words)):
                assert not second.startswith(first)

    def test_an_ambiguous_grammar_is_refused(self):
        grammar = Grammar({"note": ["A {thing=thing}.", "A hat."]}, {"thing": ["hat", "bell"]})
        with pytest.raises(ValueError, match="ambiguous"):
            grammar.parse("A hat.")


class TestEntropy:
    def test_of_all_texts(self):
        told = list(every_story(SMALL))
        chances = [math.exp(-story.nats) for story in told]
        assert len(told) > 50
        assert math.isclose(sum(chances), 1)
        nats, length = SMALL.entropy()
        assert math.isclose(nats, sum(p * story.nats for p, story in zip(chances, told, strict=True)))
        assert math.isclose(length, sum(p * len(story.text) for p, story in zip(chances, told, strict=True)))

    def test_of_a_sample(self, told):
        for exact, values in zip(
            GRAMMAR.entropy(),
            ([story.nats for story in told], [len(story.text) for story in told]),
            strict=True,
        ):
            error = statistics.stdev(values) / math.sqrt(len(values))
            assert error < exact / 250
            assert abs(statistics.fmean(values) - exact) < 4 * error

    def test_of_a_fair_coin_and_a_loaded_one(self):
        for weights in ({"heads": 1, "tails": 1}, {"heads": 9, "tails": 1}):
            p = weights["heads"] / sum(weights.values())
            nats, length = Grammar({"toss": weights}, {}).entropy()
            assert math.isclose(nats, -p * math.log(p) - (1 - p) * math.log(1 - p))
            assert length == 5


class TestMistakes:
    def test_one_character(self, told):
        draw = random.Random(1)
        letters = sorted({character for story in told[:20] for character in story.text})
        for story in draw.sample(told, 120):
            place = draw.randrange(len(story.text))
            letter = draw.choice([other for other in letters if other != story.text[place]])
            check_found(story.text[:place] + letter + story.text[place + 1 :], place)

    def test_one_character_more_or_less(self, told):
        draw = random.Random(2)
        for story in draw.sample(told, 40):
            place = draw.randrange(len(story.text) - 2)
            before, after = story.text[:place], story.text[place:]
            check_found(before + "#" + after, place)
            shorter = before + after[1:]
            departs = next(t for t in range(place, len(shorter)) if shorter[t] != story.text[t])
            check_found(shorter, departs)

    def test_a_fact_that_is_contradicted(self, told):
        """One word for another of its category, where the story says it again."""
        draw, named, wrong = random.Random(3), 0, {"he": "she", "him": "her", "his": "her"}
        wrong |= {"she": "he", "her": "his"}
        for story in told[:12]:
            known = set()
            for mention in story.mentions:
                word = story.facts[mention.fact]
                if word in known:
                    others = sorted(set(WORDS[CATEGORY[word]]) - {word})
                    other = draw.choice(others) if mention.text == word else wrong[mention.text.lower()]
                    mistake = check_found(replaced(story, mention, other), mention.position)
                    named += mistake.fact == mention.fact
                known.add(word)
        assert named > 150

    @pytest.mark.parametrize(
        ("question", "fact"),
        [
            ("Who found the ", "finder"),
            ("Who has the ", "keeper"),
            ("Where was the ", "near"),
            ("Which animal is ", "friend.kind"),
            ("Where is the home of ", "home"),
        ],
    )
    def test_the_message_names_the_fact(self, told, question, fact):
        story = next(story for story in told if question in story.text)
        mention = [mention for mention in story.mentions if mention.fact == fact][-1]
        assert mention.position > story.text.index(question)
        other = next(word for word in WORDS[CATEGORY[mention.text]] if word[0] != mention.text[0])
        mistake = check_found(replaced(story, mention, other), mention.position)
        assert mistake.position == mention.position
        assert mistake.fact == fact
        assert str(mistake).endswith(f"(the {fact.replace('.', chr(39) + 's ')})")
        assert repr(mention.text) in str(mistake)

    def test_cut_off_anywhere(self, told):
        """And what is expected there is all that can follow, and nothing else."""
        story, letters = told[0], sorted(set(told[0].text + told[1].text))
        for length in range(len(story.text)):
            with pytest.raises(Mistake, match="the end in place of") as caught:
                parse(story.text[:length])
            assert caught.value.position == length
            expected = {word[0] for word in caught.value.expected}
            if length % 20 == 0:
                assert {c for c in letters if begins_a_story(story.text[:length] + c)} == expected & {
                    *letters
                }

    def test_text_after_the_end(self, told):
        for more in ("\n", " ", "And then", told[1].text):
            with pytest.raises(Mistake, match="in place of 'the end'") as caught:
                parse(told[0].text + more)
            assert caught.value.position == len(told[0].text)

    def test_no_story_at_all(self):
        for text, position in (("", 0), ("\n", 0), ("Once upon a time", 0), ("\0", 0), ("Ein Märchen", 1)):
            with pytest.raises(Mistake) as caught:
                parse(text)
            assert caught.value.position == position


def test_the_story_in_the_readme_is_one():
    page = Path(__file__).parents[1] / "sprints" / "04_language_modelling" / "README.md"
    lines = [line[2:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("> ")]
    assert parse("\n".join(lines) + "\n\n").text
