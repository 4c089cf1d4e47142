"""The written world: very short stories whose every word can be accounted for.

    for story in write(seed=0, characters=2_000):
        print(story.text, story.nats)          # what it says, and the information in it
    parse(text)                                # the Story that it is, or Mistake: where it first goes wrong

Someone has a treasure, takes it out, meets somebody, loses it, gets it back, and is asked about it. A story
is the result of choices: which sentence comes next, which name, which place. A choice among n equally likely
options carries log n nats, so a story carries the sum of -log p over its choices, and no model of these
stories can predict them with less, on average. That, per character, is *the floor*.

The grammar is a table of sentences (RULES) and of words (WORDS). In a sentence,

    <loss>         stands for one of the sentences under that name,
    {hero=name}    draws a name and remembers it as the hero's,
    {hero}         says it again; {hero.him} is the pronoun for it, {hero.His} has a capital,
    {keeper:=hero} says nothing: from here on the keeper is whoever is the hero now.

Two rules more: nothing is drawn twice in a story, neither a word nor a sentence; and a sentence that speaks
of something unknown (a gift, where none was given) cannot be chosen. Whatever can follow differs in its first
words, so a text tells which choices were made: each story has one derivation.

Derived in: –
"""

import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

SHE = ["Ada", "Clara", "Daisy", "Ella", "Frida", "Ida", "Lily", "Mia", "Nora", "Pearl", "Rosa", "Tess"]
HE = ["Ben", "Carl", "Emil", "Finn", "Gus", "Hugo", "Jack", "Leo", "Max", "Otto", "Paul", "Sam"]
FORMS = ("he", "him", "his")  # what a pronoun is called in a sentence, whoever it stands for
PRONOUNS = dict.fromkeys(SHE, ("she", "her", "her")) | dict.fromkeys(HE, FORMS)

WORDS = {
    "name": [*SHE, *HE],
    "kind": [
        "badger", "bear", "cat", "duck", "fox", "frog", "goat", "goose", "hare", "hedgehog", "mole", "mouse",
        "otter", "owl", "rabbit", "wolf",
    ],
    "nature": [
        "brave", "cheerful", "clever", "curious", "gentle", "grumpy", "lazy", "polite", "proud", "quiet",
        "shy", "sleepy", "tidy", "tiny",
    ],
    "colour": ["black", "blue", "brown", "green", "grey", "purple", "red", "silver", "white", "yellow"],
    "stuff": ["copper", "glass", "leather", "paper", "silk", "stone", "tin", "velvet", "wax", "wooden"],
    "thing": [
        "ball", "bell", "boat", "book", "button", "drum", "flute", "hat", "kite", "lamp", "map", "mirror",
        "puppet", "scarf", "spoon", "whistle",
    ],
    "place": [
        "bakery", "bridge", "castle", "church", "farm", "fountain", "harbour", "library", "market", "mill",
        "museum", "pond", "school", "station", "theatre", "tower",
    ],
    "weather": [
        "chilly", "cloudy", "foggy", "frosty", "misty", "rainy", "snowy", "stormy", "sunny", "windy",
    ],
    "time": ["afternoon", "day", "evening", "morning", "night"],
    "relative": [
        "aunt", "brother", "cousin", "father", "grandfather", "grandmother", "mother", "neighbour", "sister",
        "uncle",
    ],
    "manner": [
        "bravely", "crossly", "dreamily", "kindly", "loudly", "politely", "quickly", "slowly", "softly",
        "wisely",
    ],
    "doing": [
        "chasing", "counting", "dreaming of", "feeding", "hiding from", "looking for", "painting",
        "singing to", "talking to", "writing to",
    ],
    "them": [
        "bees", "birds", "boots", "carrots", "clouds", "kings", "leaves", "moths", "pirates", "shadows",
        "snails", "stones", "trees", "turnips",
    ],
    "near": ["behind", "beside", "in front of", "inside", "on top of", "under"],
    "object": [
        "barrel", "basket", "bathtub", "bench", "box", "bucket", "cupboard", "haystack", "ladder", "oven",
        "piano", "statue", "stove", "wheelbarrow",
    ],
    "state": [
        "broken", "damp", "forgotten", "hairy", "lonely", "mouldy", "rusty", "snoring", "surprised", "wet",
    ],
    "junk": [
        "biscuit", "candle", "clock", "fork", "ghost", "glove", "herring", "nail", "pigeon", "sock", "toad",
        "tooth",
    ],
    "quality": [
        "beautiful", "delicious", "fresh", "golden", "huge", "little", "ripe", "secret", "sticky", "warm",
    ],
    "gift": [
        "bun", "cake", "cheese", "crown", "hug", "jewel", "melon", "pear", "poem", "ribbon", "song", "story",
    ],
}  # fmt: skip

RULES = {
    "story": [
        "<opening> <treasure> <outing> <meeting> <wish> <loss> <hunt> <end>\n<question> <question>\n\n",
    ],
    "opening": [
        "There was once a {hero.nature=nature} {hero.kind=kind} called {hero=name}.",
        "This is the story of {hero=name}, a {hero.nature=nature} {hero.kind=kind}.",
        "In a house by the {home=place} lived {hero=name}, a {hero.nature=nature} {hero.kind=kind}.",
        "Do you know {hero=name}, the {hero.nature=nature} {hero.kind=kind} from the {home=place}?",
        "Everyone at the {home=place} knew the {hero.nature=nature} {hero.kind=kind} {hero=name}.",
    ],
    "treasure": [
        "{hero.He} had a {colour=colour} {stuff=stuff} {thing=thing}.",
        "{hero.He} owned a {colour=colour} {stuff=stuff} {thing=thing} and nothing else.",
        "{hero.He} loved {hero.his} {colour=colour} {stuff=stuff} {thing=thing} more than cake.",
        "{hero.His} {relative=relative} gave {hero.him} a {colour=colour} {stuff=stuff} {thing=thing}.",
        "From {hero.his} {relative=relative} {hero.he} got a {colour=colour} {stuff=stuff} {thing=thing}.",
    ],
    "outing": [
        "One {weather=weather} {time=time} {hero.he} took it to the {first=place}.",
        "On a {weather=weather} {time=time} {hero.he} went to the {first=place} with it.",
        "It was a {weather=weather} {time=time}, and {hero.he} carried it to the {first=place}.",
        "\"What a {weather=weather} {time=time}!\" said {hero}, and ran to the {first=place}.",
    ],
    "meeting": [
        "There {hero.he} met {friend=name} the {friend.kind=kind}, who was {doing=doing} {them=them}.",
        "Who was {doing=doing} {them=them} there? It was {friend=name} the {friend.kind=kind}.",
        "A {friend.nature=nature} {friend.kind=kind} called {friend=name} was {doing=doing} {them=them}.",
        "Nobody was there but {friend=name} the {friend.kind=kind}, {doing=doing} {them=them}.",
    ],
    "wish": [
        "\"May I hold the {thing}?\" asked {friend}. <answer>",
        "\"How {colour} it is!\" said {friend}. <answer>",
        "{friend} wanted the {thing} at once. <answer>",
        "{friend} had never seen such a {thing}. <answer>",
    ],
    "answer": [
        "\"You may have it for a while,\" said {hero} {manner=manner}.",
        "\"Be careful,\" said {hero} {manner=manner}.",
        "{hero} only smiled.",
        "{hero} nodded {manner=manner}.",
        "\"Let us share it,\" said {hero} {manner=manner}.",
    ],
    "loss": [
        "But then the wind took the {thing}.",
        "Then both fell asleep, and when they woke up the {thing} was gone.",
        "Soon they were dancing, and nobody looked after the {thing}. It was gone.",
        "A {thief=nature} {thief.kind=kind} snatched the {thing} and ran away.",
        "After lunch {hero} could not find the {thing}.",
    ],
    "hunt": [
        "They looked {near.a=near} the {object.a=object}, but found a {state.a=state} {junk.a=junk}. <hunt>",
        "{hero} searched the {place.a=place}: only a {state.b=state} {junk.b=junk}. <hunt>",
        "\"It must be {near.b=near} the {object.b=object},\" said {friend}. It was not. <hunt>",
        "Nobody at the {place.b=place} had seen it. <hunt>",
        "In the end {finder=name} the {finder.kind=kind} found it <there>{helper:=finder} <thanks>",
        "\"Is this yours?\" asked {finder=name} the {finder.kind=kind}."
        " It had been <there>{helper:=finder} <thanks>",
        "At last {friend} saw it <there>{finder:=friend}{helper:=friend} <thanks>",
        "At last {hero} saw it <there>{finder:=hero} <joy>",
    ],
    "there": ["{near=near} the {object=object} at the {where=place}."],
    "thanks": [
        "{hero} thanked {helper.him} with a {quality=quality} {gift=gift}.",
        "For this {helper} got a {quality=quality} {gift=gift}.",
        "\"Thank you, {helper}!\" said {hero}, and gave {helper.him} a {quality=quality} {gift=gift}.",
    ],
    "joy": [
        "{hero} laughed and danced.",
        "How happy {hero.he} was!",
        "\"Hooray!\" shouted {hero}.",
    ],
    "end": [
        "Every {later=time} {hero} took the {thing} out and polished it.{keeper:=hero}",
        "From then on {hero} kept the {thing} in a box.{keeper:=hero}",
        "And because {friend} liked the {thing} so much, {hero} let {friend.him} keep it.{keeper:=friend}",
        "Since that {time} the {thing} has hung over the bed of {friend}.{keeper:=friend}",
        "But {helper} looked so sad that {hero} gave {helper.him} the {colour} {stuff} {thing}."
        "{keeper:=helper}",
    ],
    "question": [
        "Who found the {thing}? {finder} did.",
        "Where was the {thing}? It was {near} the {object} at the {where}.",
        "Who has the {thing} now? {keeper} has.",
        "What is the {thing} like? It is a {colour} {stuff} {thing}.",
        "What did {helper} get? A {quality} {gift}.",
        "What was {friend} doing? {friend.He} was {doing} {them}.",
        "What is {hero}? A {hero.nature} {hero.kind}.",
        "Which animal is {friend}? The {friend.kind}.",
        "Where is the home of {hero}? At the {home}.",
        "Who gave {hero} the {thing}? {hero.His} {relative} did.",
    ],
}  # fmt: skip


# ── Sentences, taken apart ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Symbol:
    """<hunt>: one of the sentences under this name."""

    name: str


@dataclass(frozen=True)
class New:
    """{hero=name}: a word of a category, drawn and remembered as a fact."""

    fact: str
    category: str


@dataclass(frozen=True)
class Known:
    """{hero} or {hero.him}: a fact said again, by its word or a pronoun."""

    fact: str
    form: str


@dataclass(frozen=True)
class Same:
    """{keeper:=hero}: one fact takes the word of another; nothing is said."""

    fact: str
    other: str


Part = str | Symbol | New | Known | Same


@dataclass(frozen=True)
class Sentence:
    """One of the options under a symbol."""

    text: str
    weight: float

    def __str__(self) -> str:
        return self.text

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        return tuple(map(_part, filter(None, re.split(r"(<\w+>|{[^}]+})", self.text))))

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """The facts that must be known before."""
        needed, known = set(), set()
        for part in self.parts:
            if isinstance(part, Known | Same):
                needed |= {part.fact if isinstance(part, Known) else part.other} - known
            if isinstance(part, New | Same):
                known.add(part.fact)
        return frozenset(needed)


def _part(text: str) -> Part:
    if text[0] == "<":
        return Symbol(text[1:-1])
    if text[0] != "{":
        return text
    if ":=" in text:
        return Same(*text[1:-1].split(":="))
    if "=" in text:
        return New(*text[1:-1].split("="))
    fact, _, form = text[1:-1].rpartition(".")
    return Known(fact, form) if form.lower() in FORMS else Known(text[1:-1], "")


def said(word: str, form: str) -> str:
    """A word itself (form ""), or its pronoun: said("Mia", "Him") is "Her"."""
    if not form:
        return word
    pronoun = PRONOUNS[word][FORMS.index(form.lower())]
    return pronoun.capitalize() if form[0].isupper() else pronoun


# ── Stories ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Choice:
    """One choice of a story: at which character, under which name, among what, which one, how likely."""

    position: int
    name: str
    option: str
    probability: float


@dataclass(frozen=True)
class Mention:
    """One place where a story says a fact, for the first time or again: which characters, which fact."""

    position: int
    text: str
    fact: str


@dataclass(frozen=True)
class Story:
    """A text of the grammar with the choices that wrote it, the facts it tells of and where it says them."""

    text: str
    choices: tuple[Choice, ...]
    facts: dict[str, str]
    mentions: tuple[Mention, ...]

    @property
    def nats(self) -> float:
        """Its information: the sum of -log p over its choices."""
        return -sum(math.log(choice.probability) for choice in self.choices)


class Mistake(ValueError):
    """Where a text stops being a story: no story begins with text[: position + 1]."""

    def __init__(self, text: str, position: int, expected: Iterable[str], fact: str = "") -> None:
        self.position, self.expected, self.fact = position, tuple(expected), fact
        word = max(text.rfind(" ", 0, position), text.rfind("\n", 0, position)) + 1  # show all of it
        found = repr(text[word : position + 16]) if position < len(text) else "the end"
        wanted = [repr(text[word:position] + option[:16]) for option in self.expected[:3]]
        wanted += [f"{len(self.expected) - 3} more"] * (len(self.expected) > 3)
        known = f" (the {fact.replace('.', chr(39) + 's ')})" if fact else ""
        super().__init__(f"character {position}: {found} in place of {' or '.join(wanted)}{known}")


class Grammar:
    """Sentences under their symbols, the first of which is where a story starts, and words by category."""

    def __init__(self, rules: dict[str, list[str] | dict[str, float]], words: dict[str, list[str]]) -> None:
        weighted = {name: dict.fromkeys(r, 1.0) if isinstance(r, list) else r for name, r in rules.items()}
        self.rules = {name: [Sentence(*option) for option in r.items()] for name, r in weighted.items()}
        self.words, self.start = words, Symbol(next(iter(rules)))

    def tell(self, draw: random.Random) -> Story:
        """Write a story."""
        return self.walk(_Writer(draw))

    def parse(self, text: str) -> Story:
        """Read a story: find the choices that wrote it. Mistake where none explains the text."""
        reader = _Reader(text)
        story = self.walk(reader)
        if reader.position < len(text):
            raise Mistake(text, reader.position, ["the end"])
        return story

    def walk(self, hand: "_Writer | _Reader") -> Story:
        """The one path through the grammar, for all; `hand` makes the choices and says the words."""
        facts: dict[str, str] = {}
        choices: list[Choice] = []
        mentions: list[Mention] = []
        used: set[tuple[str, str | Sentence]] = set()
        todo: list[Part] = [self.start]

        def choose(name: str, group: str, options: list, weights: list[float], lead: Callable) -> Any:
            position, number = hand.position, hand.choose(options, weights, lead)
            choices.append(Choice(position, name, str(options[number]), weights[number] / sum(weights)))
            used.add((group, options[number]))
            return options[number]

        def say(words: str, fact: str) -> None:
            mentions.append(Mention(hand.position, words, fact))
            hand.say(words, fact)

        while todo:
            match todo.pop():
                case str(words):
                    hand.say(words, "")
                case Known(fact, form):
                    say(said(facts[fact], form), fact)
                case Same(fact, other):
                    facts[fact] = facts[other]
                case New(fact, category):
                    words = [word for word in self.words[category] if (category, word) not in used]
                    weights, lead = [1.0] * len(words), functools.partial(_word, fact)
                    facts[fact] = choose(fact, category, words, weights, lead)
                    say(facts[fact], fact)
                case Symbol(name):
                    options = self._open(name, facts.keys(), used)
                    lead = functools.partial(_lead, facts)
                    sentence = choose(name, name, options, [option.weight for option in options], lead)
                    todo.extend(reversed(sentence.parts))
        return Story(hand.text, tuple(choices), facts, tuple(mentions))

    def entropy(self) -> tuple[float, float]:
        """A story's mean information in nats and its mean length in characters, both exact.

        Summed over all ways a story can go. What happens next never depends on which word was drawn, only on
        how many are left, so the words of a category need not be told apart.
        """

        @functools.cache
        def reach(todo: tuple[Part, ...]) -> frozenset[str]:
            """The symbols, facts and categories that can still come up; all others can be forgotten."""
            names: set[str] = set()
            parts = list(todo)
            while parts:
                part = parts.pop()
                if isinstance(part, Symbol) and part.name not in names:
                    parts += (inner for option in self.rules[part.name] for inner in option.parts)
                names |= set(() if isinstance(part, str) else vars(part).values())
            return frozenset(names)

        def go_on(todo: tuple[Part, ...], known: frozenset, used: frozenset) -> tuple[float, float]:
            names = reach(todo)
            known, used = (frozenset(pair for pair in pairs if pair[0] in names) for pairs in (known, used))
            return rest(todo, known, used)

        @functools.cache
        def rest(todo: tuple[Part, ...], known: frozenset, used: frozenset) -> tuple[float, float]:
            """Nats and characters to come; known facts with their categories, used options by name."""
            if not todo:
                return 0.0, 0.0
            part, todo = todo[0], todo[1:]
            categories = dict(known)
            length = nats = 0.0
            match part:
                case str(words):
                    length, after = len(words), go_on(todo, known, used)
                case Known(fact, form):
                    length = self._mean_length(categories[fact], form)
                    after = go_on(todo, known, used)
                case Same(fact, other):
                    after = go_on(todo, known | {(fact, categories[other])}, used)
                case New(fact, category):
                    drawn = sum(name == category for name, _ in used)
                    nats = math.log(len(self.words[category]) - drawn)
                    length = self._mean_length(category, "")
                    after = go_on(todo, known | {(fact, category)}, used | {(category, drawn)})
                case Symbol(name):
                    options = self._open(name, categories.keys(), used)
                    total, after = sum(option.weight for option in options), (0.0, 0.0)
                    for option in options:
                        p = option.weight / total
                        ways = go_on(option.parts + todo, known, used | {(name, option)})
                        after = after[0] + p * (ways[0] - math.log(p)), after[1] + p * ways[1]
            return nats + after[0], length + after[1]

        return rest((self.start,), frozenset(), frozenset())

    def _open(self, symbol: str, known: Collection[str], used: Collection) -> list[Sentence]:
        """The sentences that can be chosen now."""
        return [o for o in self.rules[symbol] if o.needs <= known and (symbol, o) not in used]

    def _mean_length(self, category: str, form: str) -> float:
        return sum(len(said(word, form)) for word in self.words[category]) / len(self.words[category])


@dataclass
class _Writer:
    """Chooses at random."""

    draw: random.Random
    text: str = ""

    @property
    def position(self) -> int:
        return len(self.text)

    def choose(self, options: list, weights: list[float], lead: Callable) -> int:
        mark = self.draw.random() * sum(weights)
        *reached, _ = itertools.accumulate(weights)
        return sum(mark >= edge for edge in reached)

    def say(self, words: str, fact: str) -> None:
        self.text += words


Lead = list[tuple[str, str]]  # words, and the fact that they repeat or ""


@dataclass
class _Reader:
    """Chooses what the text has chosen."""

    text: str
    position: int = 0

    def choose(self, options: list, weights: list[float], lead: Callable[[object], Lead]) -> int:
        leads = [lead(option) for option in options]
        fitting = [n for n, words in enumerate(leads) if self._fits(words) is None]
        if len(fitting) > 1:
            raise ValueError(f"the grammar is ambiguous: {[options[n] for n in fitting]} begin alike")
        if not fitting:
            self._stop(leads)
        return fitting[0]

    def say(self, words: str, fact: str) -> None:
        if self._fits([(words, fact)]):
            self._stop([[(words, fact)]])
        self.position += len(words)

    def _fits(self, lead: Lead) -> tuple[int, str, str] | None:
        """None, or where the text departs from the lead, what would have followed, which fact it repeats."""
        start = self.position
        for words, fact in lead:
            if not self.text.startswith(words, start):
                pairs = zip(words, self.text[start:], strict=False)
                same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
                return start + same, words[same:], fact
            start += len(words)
        return None

    def _stop(self, leads: list[Lead]) -> NoReturn:
        departures = [self._fits(lead) for lead in leads]
        position = max(position for position, _, _ in departures)
        last = [(words, fact) for at, words, fact in departures if at == position]
        raise Mistake(self.text, position, [w for w, _ in last], last[0][1] if len(last) == 1 else "")


def _word(fact: str, word: str) -> Lead:
    return [(word, fact)]


def _lead(facts: dict[str, str], sentence: Sentence) -> Lead:
    """How a sentence begins, up to its first choice."""
    lead, facts = [], dict(facts)
    for part in sentence.parts:
        match part:
            case str(words):
                lead.append((words, ""))
            case Known(fact, form):
                lead.append((said(facts[fact], form), fact))
            case Same(fact, other):
                facts[fact] = facts[other]
            case _:
                break
    return lead


GRAMMAR = Grammar(RULES, WORDS)


def write(seed: int | str, characters: int = 1_000_000) -> list[Story]:
    """Stories until there are so many characters; the same for the same seed, on every machine."""
    draw, stories, written = random.Random(seed), [], 0
    while written < characters:
        stories.append(GRAMMAR.tell(draw))
        written += len(stories[-1].text)
    return stories


def parse(text: str) -> Story:
    """The story that a text is, with the choices that wrote it. Mistake: where it first goes wrong."""
    return GRAMMAR.parse(text)
