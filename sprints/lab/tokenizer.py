"""Byte-level byte-pair encoding, as in GPT-2, for use: words counted once, pair counts kept up to date.

    tokenizer = Tokenizer.learn(text, 1024)
    ids = tokenizer.encode("any text, or any bytes")     # a list of token numbers
    tokenizer.decode(ids)                                # the text again
    tokenizer.save(folder)                               # GPT-2's vocab.json and merges.txt

Derived in: 08_gpt/01_byte_pair_encoding
"""

import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path

from lab import BadInput
from lab.lesson import read_text, write_whole

CONTROLS = "\x1c\x1d\x1e\x1f"
END = "<|endoftext|>"  # GPT-2's only special token: it stands between documents
NONE = -1  # where no token begins
Pair = tuple[int, int]


def split(text: str) -> list[str]:
    r"""The words of a text, which no token crosses, as GPT-2 cuts it (Radford et al. 2019, section 2.2).

    "It's 3 o'clock  now" -> "It", "'s", " 3", " o", "'", "clock", " ", " now"; joined, they are the text.

    GPT-2:  's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    Python's re knows neither \p{L}, letters, nor \p{N}, numbers. Its \w is both and the underscore; its \d is
    the decimal digits, so the other numbers that the text has (², ½, Ⅷ) are listed. Its \s has four control
    characters that are no white space to GPT-2.
    """
    strange = [c for c in sorted(set(text)) if not c.isascii() or c in CONTROLS]
    numbers = "".join(c for c in strange if unicodedata.category(c) in ("Nl", "No"))
    controls = "".join(c for c in strange if c in CONTROLS)
    letter, number, space = rf"[^\W\d_{numbers}]", rf"[\d{numbers}]", rf"[^\S{controls}]"
    other = rf"(?:[^\s\w{numbers}]|[_{controls}])"
    end = rf"(?!{letter}|{number}|{other})"
    return re.findall(
        rf"'(?:[stmd]|re|ve|ll)| ?{letter}+| ?{number}+| ?{other}+|{space}+{end}|{space}+", text
    )


class Tokenizer:
    """
    tokens    the bytes of each token; its number is its place here. V of them
    merges    pairs of numbers, in the order in which they were learned
    special   tokens that stand for no bytes of a text, and their numbers; encode() never gives one
    """

    def __init__(self, tokens: list[bytes], merges: list[Pair], special: dict[str, int]) -> None:
        self.tokens, self.merges, self.special = tokens, merges, special
        number = {token: i for i, token in enumerate(tokens) if i not in special.values()}
        self._byte = [number[bytes([byte])] for byte in range(256)]
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._made = [number[tokens[a] + tokens[b]] for a, b in merges]
        self._known = _Words(self._encode_word)

    @property
    def V(self) -> int:
        return len(self.tokens)

    # ── Learning ──────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def learn(cls, text: str | Iterable[str], V: int, special: Iterable[str] = (END,)) -> "Tokenizer":
        """V tokens: 256 bytes, what the pairs that occur most often merge into, and the special ones.

        The text may come in documents, which no word crosses.

        Of pairs that occur equally often the first in the text is merged (as in minbpe). There are fewer
        tokens where the text has no more pairs. ValueError if V has no room for the bytes, if the text has no
        UTF-8 (half a surrogate), or if a special token's name would be written like another token.
        """
        special = list(special)
        if len(special) + 256 > V:
            raise ValueError(f"{V} tokens are too few: 256 bytes and {len(special)} special ones are needed")
        tokens = [bytes([byte]) for byte in range(256)]
        documents = [text] if isinstance(text, str) else text
        merges = _learn(Counter(chain.from_iterable(map(split, documents))), tokens, V - len(special))
        if taken := set(special) & set(map(_printable, tokens)):
            raise ValueError(f"{sorted(taken)}: special tokens that the files could not tell from others")
        numbers = {name: len(tokens) + i for i, name in enumerate(special)}
        return cls(tokens + [name.encode() for name in special], merges, numbers)

    # ── Use ───────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, text: str | bytes) -> list[int]:
        """The numbers of a text, or of any bytes. ValueError for a str that has no UTF-8 (half a surrogate).

        Text that reads like a special token is text: "<|endoftext|>" becomes several plain tokens.
        """
        if isinstance(text, str):
            text.encode()  # raises what the docstring says
        else:
            text = text.decode(errors="surrogateescape")
        known = self._known
        return [number for word in split(text) for number in known[word]]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What the tokens stand for, exactly; special ones read as their names."""
        tokens = self.tokens
        return b"".join([tokens[number] for number in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text; where tokens were cut in the middle of a character stands �."""
        return self.decode_bytes(ids).decode(errors="replace")

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Merge the pair that was learned first, leftmost first, until no pair is known.

        Pairs wait in a heap, so that a word of a million bytes takes n log n steps and not n².
        """
        ids = [self._byte[byte] for byte in word.encode(errors="surrogateescape")]
        rank, n = self._rank, len(ids)
        heap = [(rank[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in rank]
        if not heap:
            return tuple(ids)
        heapq.heapify(heap)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        while heap:
            merge, i = heapq.heappop(heap)
            j = after[i]
            if j == n or (ids[i], ids[j]) != self.merges[merge]:
                continue  # one of the two has become part of another token since
            ids[i], ids[j] = self._made[merge], NONE
            after[i] = k = after[j]
            if k < n:
                before[k] = i
                if (new := rank.get((ids[i], ids[k]))) is not None:
                    heapq.heappush(heap, (new, i))
            if (h := before[i]) >= 0 and (new := rank.get((ids[h], ids[i]))) is not None:
                heapq.heappush(heap, (new, h))
        return tuple([number for number in ids if number != NONE])

    # ── Files ─────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, folder: Path) -> None:
        """GPT-2's two files: vocab.json (token -> number) and merges.txt (a pair a line). BadInput."""
        names = [_printable(token) for token in self.tokens]
        for name, number in self.special.items():
            names[number] = name
        vocabulary = {name: number for number, name in enumerate(names)}
        merges = ["#version: 0.2", *(f"{names[a]} {names[b]}" for a, b in self.merges)]
        write_whole(folder / "vocab.json", json.dumps(vocabulary).encode())
        write_whole(folder / "merges.txt", ("\n".join(merges) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """From vocab.json and merges.txt, GPT-2's own or ours. BadInput if they are missing or foreign."""
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        try:
            number = json.loads(read_text(vocab))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{vocab} is not JSON ({error})") from error
        numbers = list(number.values()) if isinstance(number, dict) else [None]
        if any(type(n) is not int for n in numbers) or sorted(numbers) != list(range(len(numbers))):
            raise BadInput(f"{vocab} does not number its tokens 0, 1, 2 …")
        lines = read_text(merges).removesuffix("\n").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version") :]]
        plain = set(PRINTABLE.values()) | {"".join(pair) for pair in pairs}
        for pair in pairs:
            if len(pair) != 2 or "" in pair or not plain.issuperset(pair):
                raise BadInput(f"{merges}: {' '.join(pair)!r} is no pair of tokens")
        if missing := plain - number.keys():
            raise BadInput(f"{vocab} lacks {len(missing)} of the tokens that {merges.name} makes")
        byte = {printable: bytes([value]) for value, printable in PRINTABLE.items()}
        names = sorted(number, key=number.__getitem__)
        tokens = [
            b"".join(byte[c] for c in name) if name in plain else name.encode(errors="surrogatepass")
            for name in names
        ]
        special = {name: number[name] for name in names if name not in plain}
        return cls(tokens, [(number[a], number[b]) for a, b in pairs], special)


def _printable_bytes() -> dict[int, str]:
    """GPT-2 writes each byte as one visible character: Latin-1 where that is one, else U+0100 and on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}


PRINTABLE = _printable_bytes()


def _printable(token: bytes) -> str:
    return "".join(PRINTABLE[byte] for byte in token)


class _Words(dict):
    """word -> its numbers, worked out when it is first asked for."""

    def __init__(self, encode) -> None:
        self._encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        self[word] = numbers = self._encode(word)
        return numbers


def _learn(words: Counter, tokens: list[bytes], V: int) -> list[Pair]:
    """Append merged tokens until there are V; return the merges.

    The trick is to do only what changes. The different words stand one after the other, each once, with how
    often it occurs. `where` says at which places a pair begins, so that a merge visits no others; a heap
    knows the best pair. Once in the heap, a pair can only lose places, so that an entry that is out of date
    is found when it comes up, put right, and put back.
    """
    ids: list[int] = []  # the token that begins at each place; NONE inside a token, and behind each word
    times: list[int] = []  # how often the word of each place occurs
    for word, often in words.items():
        ids += *word.encode(), NONE
        times += [often] * (len(ids) - len(times))
    after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))  # places of the neighbours
    count: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, deque[int]] = defaultdict(deque)  # ascending; places that a pair has lost stay in it
    found: set[Pair] = set()  # pairs that are not in the heap yet

    def add(left: int, right: int, place: int) -> None:
        count[left, right] += times[place]
        where[left, right].append(place)
        found.add((left, right))

    def entry(pair: Pair) -> tuple[int, int, Pair]:
        """The heap's smallest is the pair that occurs most often, and of several the first in the text."""
        (a, b), places = pair, where[pair]
        while ids[places[0]] != a or ids[after[places[0]]] != b:
            places.popleft()
        return -count[pair], places[0], pair

    for place, (left, right) in enumerate(pairwise(ids)):
        if left != NONE != right:
            add(left, right, place)
    heap, merges = [entry(pair) for pair in found], []
    heapq.heapify(heap)
    while heap and len(tokens) < V:
        pair = heap[0][-1]
        if not count[pair]:
            heapq.heappop(heap)
        elif (now := entry(pair)) != heap[0]:
            heapq.heapreplace(heap, now)
        else:
            heapq.heappop(heap)
            (a, b), new = pair, len(tokens)
            found.clear()
            merges.append(pair)
            tokens.append(tokens[a] + tokens[b])
            for i in where.pop(pair):
                j = after[i]
                if ids[i] != a or ids[j] != b:
                    continue
                h, k = before[i], after[j]
                ids[i], ids[j] = new, NONE
                after[i], before[k] = k, i
                if (left := ids[h]) != NONE:
                    count[left, a] -= times[i]
                    add(left, new, h)
                if (right := ids[k]) != NONE:
                    count[b, right] -= times[i]
                    add(new, right, i)
            del count[pair]
            for pair in found:
                if count[pair]:
                    heapq.heappush(heap, entry(pair))
    return merges
