"""Words that nobody knows, as they are probably meant: one letter missing, doubled or swapped.

An encoder reads a misspelt name as another name. What it is compared with is known, though: the
words of the edited queries, and those that the encoder has a token for.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

from transformers import PreTrainedTokenizerBase

from meg_kernels.texts import SPACED

SHORTEST = 3  # letters of a word; shorter ones are too much like each other
LONGEST = 24  # of more letters is hardly a word, and there is much that it may be like
SHORTEST_NAME = 5  # of one of the queries' words: many a short name is another one but for a letter
FEWEST_OF_SCRIPT = 0.01  # of the known words, for a vocabulary that knows a script
BEGINS = ("▁", "Ġ")
_WORD = re.compile(rf"[^\W\d_]{{{SHORTEST},}}")


class Vocabulary:
    """The words that a tokenizer has a token for.

    Args:
        tokens: of the tokenizer, with their numbers.

    Attributes:
        words: case-folded, with their numbers, which are low for frequent words.
        scripts: those that it has more than a few words of. In others every name is unknown, and
            many a name is another one but for a letter.
    """

    def __init__(self, tokens: Mapping[str, int]):
        # Some vocabularies mark where a word begins, and hold what is within one without a sign.
        marked = {word[1:]: n for word, n in tokens.items() if word[:1] in BEGINS}
        self.words = {
            word.casefold(): number
            for word, number in (marked or tokens).items()
            if len(word) >= SHORTEST and word.isalpha()
        }
        scripts = Counter(_script(word[0]) for word in self.words)
        fewest = FEWEST_OF_SCRIPT * len(self.words)
        self.scripts = {script for script, count in scripts.items() if count >= fewest}


@functools.lru_cache(maxsize=4)
def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The tokenizer's words, read once: some have hundreds of thousands."""
    return Vocabulary(tokenizer.get_vocab())


class Spelling:
    """Corrects words that differ by one letter from one that is known.

    Args:
        queries: whose words are known, and are what others are most likely meant for.
        vocabulary: whose words are known, too, the most frequent first.
    """

    def __init__(self, queries: Iterable[str], vocabulary: Vocabulary):
        self.own: dict[str, str] = {}
        for query in queries:
            for word in _WORD.findall(query):
                self.own.setdefault(word.casefold(), word)
        self.known, self._scripts = vocabulary.words, vocabulary.scripts
        self._letters = sorted({letter for word in self.own for letter in word})

    def corrected(self, text: str, own: bool = False) -> str:
        """The text with its unknown words as they are probably meant.

        Args:
            text: in which a word that is like no other stays as it is.
            own: correct to words of the queries only.

        >>> vocabulary = Vocabulary({"who": 0, "wrote": 1, "the": 2})
        >>> spelling = Spelling(["Who wrote Middlemarch?"], vocabulary)
        >>> spelling.corrected("Who wroet Midlemarch?")
        'Who wrote Middlemarch?'
        """
        return _WORD.sub(lambda found: self._meant(found[0], own), text)

    def _meant(self, word: str, own: bool) -> str:
        written = word.casefold()
        if written in self.own or written in self.known:
            return word
        if len(word) > LONGEST or not all(map(SPACED.match, word)):  # or no word at all
            return word
        if _script(written[0]) not in self._scripts:
            return word
        near = self._near(written)
        for other in near:
            if other in self.own and len(other) >= SHORTEST_NAME:
                return self.own[other]
        known = [] if own else [other for other in near if other in self.known]
        return min(known, key=self.known.__getitem__, default=word)

    def _near(self, word: str) -> list[str]:
        """What becomes of a word by one letter more, less, another, or two in another order."""
        parts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
        fewer = [before + rest[1:] for before, rest in parts if rest]
        swapped = [b + rest[1] + rest[0] + rest[2:] for b, rest in parts if len(rest) > 1]
        more = [before + one + rest for before, rest in parts for one in self._letters]
        other = [b + one + rest[1:] for b, rest in parts if rest for one in self._letters]
        return [*swapped, *fewer, *more, *other]


def _script(letter: str) -> str:
    """What a letter's name in Unicode begins with, such as LATIN."""
    return unicodedata.name(letter, "").partition(" ")[0]
