"""Build fine-tuning rows: prompt/completion, conversations and preferences.

Each row draws its choices from a generator seeded by its verse's name, so a row does
not change when others are added or left out.
"""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests.embedded.passages import Verse

Run = Sequence[Verse]
SftRow = dict[str, str]
PreferenceRow = dict[str, str]
Conversation = dict[str, list[dict[str, str]]]

CONTINUE = "Continue this verse."
NEXT = "Give the next verse."
NAME = "Name the book."
SYSTEM = "You know the King James Bible by heart."

MIN_WORDS = 12  # of a verse that is cut into an opening and a continuation
MAX_CHARS = 230  # of one verse in a fine-tuning row: keeps a row under 160 tokens


def make_sft_rows(runs: Sequence[Run], limit: int) -> list[SftRow]:
    """At most `limit` rows {"prompt", "completion"} of three kinds of task.

    Of ten rows about four continue a verse, three give the next verse, and three name
    the book that two verses stand in.
    """
    rows = []
    for verse, following in _adjacent(runs):
        rng = _rng("sft", verse)
        task = rng.choices([CONTINUE, NEXT, NAME], weights=[4, 3, 3])[0]
        question, answer = _TASKS[task](verse, following, rng)
        # A continuation joins its opening in mid-line; other answers take a new line.
        separator = "" if task == CONTINUE else "\n"
        rows.append({"prompt": f"{task}\n{question}{separator}", "completion": answer})
    return _sample(rows, limit, "sft")


def make_conversations(runs: Sequence[Run], limit: int) -> list[Conversation]:
    """At most `limit` rows {"messages"}: two questions on one place, half with a system
    message."""
    rows: list[Conversation] = []
    for verse, following in _adjacent(runs):
        rng = _rng("messages", verse)
        messages = []
        if rng.random() < 0.5:
            messages.append({"role": "system", "content": SYSTEM})
        for task in rng.sample([CONTINUE, NEXT, NAME], k=2):
            question, answer = _TASKS[task](verse, following, rng)
            messages.append({"role": "user", "content": f"{task}\n{question}"})
            messages.append({"role": "assistant", "content": answer.strip()})
        rows.append({"messages": messages})
    return _sample(rows, limit, "messages")


def make_preference_rows(
    runs: Sequence[Run], word_counts: Mapping[str, int], limit: int
) -> list[PreferenceRow]:
    """At most `limit` rows {"prompt", "chosen", "rejected"}.

    The prompt is a verse and the opening of the next; `chosen` is how that one really
    goes on. `rejected` is, with equal chances, the same words out of order; the same
    with half of its words replaced by others of the same length, drawn as often as
    `word_counts` has them; a phrase of it said over and over; or the end of a verse of
    another book. All are about as long as `chosen`, so length decides nothing.
    """
    replacements = _words_by_length(word_counts)
    endings = [
        (verse.book, _cut(verse, _rng("preference", verse))[1])
        for _, verse in _adjacent(runs)
    ]
    rows = []
    for previous, verse in _adjacent(runs):
        rng = _rng("preference", verse)
        opening, chosen = _cut(verse, rng)
        kind = rng.randrange(4)
        if kind == 0:
            rejected = _shuffle_words(chosen, rng)
        elif kind == 1:
            rejected = _replace_words(chosen, replacements, rng)
        elif kind == 2:
            rejected = _repeat_phrase(chosen, rng)
        else:
            rejected = _unrelated_ending(chosen, verse.book, endings, rng)
        if rejected != chosen:
            prompt = f"{previous.text}\n{opening}"
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return _sample(rows, limit, "preference")


def count_words(runs: Sequence[Run]) -> Counter[str]:
    """How often each word stands in the runs, punctuation included."""
    return Counter(word for run in runs for verse in run for word in verse.text.split())


def _continue(verse: Verse, following: Verse, rng: random.Random) -> tuple[str, str]:
    return _cut(following, rng)


def _next(verse: Verse, following: Verse, rng: random.Random) -> tuple[str, str]:
    return verse.text, following.text


def _name(verse: Verse, following: Verse, rng: random.Random) -> tuple[str, str]:
    return f"{verse.text}\n{following.text}", verse.book


# Task -> (question, answer) from two adjacent verses.
_TASKS: dict[str, Callable[[Verse, Verse, random.Random], tuple[str, str]]] = {
    CONTINUE: _continue,
    NEXT: _next,
    NAME: _name,
}


def _adjacent(runs: Sequence[Run]) -> Iterator[tuple[Verse, Verse]]:
    """Verses and their successors, where both are of a length to build rows from."""
    for run in runs:
        for verse, following in itertools.pairwise(run):
            if (
                max(len(verse.text), len(following.text)) <= MAX_CHARS
                and len(following.text.split()) >= MIN_WORDS
            ):
                yield verse, following


def _rng(purpose: str, verse: Verse) -> random.Random:
    return random.Random(f"{purpose} {verse.book} {verse.chapter}:{verse.number}")


def _sample(rows: list[Any], limit: int, purpose: str) -> list[Any]:
    """`limit` of the rows, or all, in a random order that is the same each time."""
    return random.Random(purpose).sample(rows, k=min(limit, len(rows)))


def _cut(verse: Verse, rng: random.Random) -> tuple[str, str]:
    """Cut after four words or more, at most half: (opening, " continuation")."""
    words = verse.text.split()
    at = rng.randint(4, len(words) // 2)
    return " ".join(words[:at]), " " + " ".join(words[at:])


def _shuffle_words(text: str, rng: random.Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " " + " ".join(words)


def _words_by_length(
    counts: Mapping[str, int],
) -> dict[int, tuple[list[str], list[int]]]:
    """Words and their counts, for each length in characters."""
    by_length: dict[int, tuple[list[str], list[int]]] = defaultdict(lambda: ([], []))
    for word in sorted(counts):
        words, weights = by_length[len(word)]
        words.append(word)
        weights.append(counts[word])
    return dict(by_length)


def _replace_words(
    text: str,
    replacements: Mapping[int, tuple[list[str], list[int]]],
    rng: random.Random,
) -> str:
    words = text.split()
    for index in rng.sample(range(len(words)), k=(len(words) + 1) // 2):
        candidates, weights = replacements.get(len(words[index]), ([], []))
        if candidates:
            words[index] = rng.choices(candidates, weights)[0]
    return " " + " ".join(words)


def _repeat_phrase(text: str, rng: random.Random) -> str:
    """Two to four words of the text, repeated up to its number of characters."""
    words = text.split()
    size = rng.randint(2, 4)
    start = rng.randint(0, len(words) - size)
    phrase = words[start : start + size]
    repeated = ""
    index = 0
    while len(repeated) < len(text):
        repeated += " " + phrase[index % size]
        index += 1
    return repeated


def _unrelated_ending(
    text: str, book: str, endings: Sequence[tuple[str, str]], rng: random.Random
) -> str:
    """Of 64 endings of other books, the one whose length is nearest to the text's."""
    candidates = [
        ending for other, ending in rng.choices(endings, k=64) if other != book
    ]
    return min(candidates, key=lambda ending: abs(len(ending) - len(text)))
