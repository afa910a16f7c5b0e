"""Read the King James text, split it by chapter, and group verses into passages."""

import dataclasses
import gzip
import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

# The source's abbreviations, in canonical order.
BOOKS = {
    "Ge": "Genesis",
    "Exo": "Exodus",
    "Lev": "Leviticus",
    "Num": "Numbers",
    "Deu": "Deuteronomy",
    "Josh": "Joshua",
    "Jdgs": "Judges",
    "Ruth": "Ruth",
    "1Sm": "1 Samuel",
    "2Sm": "2 Samuel",
    "1Ki": "1 Kings",
    "2Ki": "2 Kings",
    "1Chr": "1 Chronicles",
    "2Chr": "2 Chronicles",
    "Ezra": "Ezra",
    "Neh": "Nehemiah",
    "Est": "Esther",
    "Job": "Job",
    "Psa": "Psalms",
    "Prv": "Proverbs",
    "Eccl": "Ecclesiastes",
    "SSol": "Song of Solomon",
    "Isa": "Isaiah",
    "Jer": "Jeremiah",
    "Lam": "Lamentations",
    "Eze": "Ezekiel",
    "Dan": "Daniel",
    "Hos": "Hosea",
    "Joel": "Joel",
    "Amos": "Amos",
    "Obad": "Obadiah",
    "Jonah": "Jonah",
    "Mic": "Micah",
    "Nahum": "Nahum",
    "Hab": "Habakkuk",
    "Zep": "Zephaniah",
    "Hag": "Haggai",
    "Zec": "Zechariah",
    "Mal": "Malachi",
    "Mat": "Matthew",
    "Mark": "Mark",
    "Luke": "Luke",
    "John": "John",
    "Acts": "Acts",
    "Rom": "Romans",
    "1Cor": "1 Corinthians",
    "2Cor": "2 Corinthians",
    "Gal": "Galatians",
    "Eph": "Ephesians",
    "Phi": "Philippians",
    "Col": "Colossians",
    "1Th": "1 Thessalonians",
    "2Th": "2 Thessalonians",
    "1Tim": "1 Timothy",
    "2Tim": "2 Timothy",
    "Titus": "Titus",
    "Phmn": "Philemon",
    "Heb": "Hebrews",
    "Jas": "James",
    "1Pet": "1 Peter",
    "2Pet": "2 Peter",
    "1Jn": "1 John",
    "2Jn": "2 John",
    "3Jn": "3 John",
    "Jude": "Jude",
    "Rev": "Revelation",
}

EVAL_CHAPTERS_ONE_IN = 20
PASSAGE_CHARS = 560  # at most: under 256 tokens, so a short context cuts no passage
# Parallel books repeat whole verses; a shorter one ("And the LORD spake unto Moses,
# saying,") recurs as a formula and gives nothing away.
REPEATED_VERSE_CHARS = 60

_LINE = re.compile(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)")


@dataclasses.dataclass(frozen=True)
class Verse:
    """One verse: `book` is the full name, `text` has no reference in it."""

    book: str
    chapter: int
    number: int
    text: str


def read_verses(source: pathlib.Path) -> list[Verse]:
    """The verses of a gzipped text of lines such as `Ge1:1 In the beginning ...`.

    Raises:
        ValueError: a line is not of that form, or its book is unknown.
    """
    verses = []
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        for row, line in enumerate(lines, start=1):
            match = _LINE.fullmatch(line.strip())
            if match is None or match[1] not in BOOKS:
                raise ValueError(
                    f"{source}:{row}: {line.strip()!r} is not a verse; "
                    "a line should read like 'Ge1:1 In the beginning ...'"
                )
            book, chapter, number, text = match.groups()
            verses.append(Verse(BOOKS[book], int(chapter), int(number), text))
    return verses


def is_held_out(verse: Verse) -> bool:
    """Whether the verse's whole chapter is for evaluation, by a hash of its name."""
    digest = hashlib.sha256(f"{verse.book} {verse.chapter}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % EVAL_CHAPTERS_ONE_IN == 0


def split_chapters(
    verses: Iterable[Verse],
) -> tuple[list[list[Verse]], list[list[Verse]]]:
    """Runs of consecutive verses of one chapter, as (train, eval).

    An eval verse that also stands, word for word, in a training chapter is left out;
    its chapter then falls into two runs, so that a run is always consecutive text.
    """
    train: list[list[Verse]] = []
    held_out: list[list[Verse]] = []
    for chapter in _runs(verses):
        (held_out if is_held_out(chapter[0]) else train).append(chapter)
    seen = {verse.text for chapter in train for verse in chapter}
    kept = (
        verse
        for chapter in held_out
        for verse in chapter
        if len(verse.text) < REPEATED_VERSE_CHARS or verse.text not in seen
    )
    return train, list(_runs(kept))


def make_passages(run: Sequence[Verse]) -> Iterator[str]:
    """Group a run into passages of whole verses, a line each, up to PASSAGE_CHARS."""
    lines: list[str] = []
    for verse in run:
        if lines and sum(len(line) + 1 for line in lines) + len(verse.text) > (
            PASSAGE_CHARS
        ):
            yield "\n".join(lines)
            lines = []
        lines.append(verse.text)
    if lines:
        yield "\n".join(lines)


def _runs(verses: Iterable[Verse]) -> Iterator[list[Verse]]:
    run: list[Verse] = []
    for verse in verses:
        if run and (verse.book, verse.chapter, verse.number) != (
            run[-1].book,
            run[-1].chapter,
            run[-1].number + 1,
        ):
            yield run
            run = []
        run.append(verse)
    if run:
        yield run
