"""Which question is in which split, and that no two splits share one."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
from pathlib import Path
import unicodedata

FILE = 'splits.json'
_NAMED = 3  # pairs that a message shows
_SHOWN = 80  # characters of a text in a message


@dataclasses.dataclass(frozen=True)
class Entry:
    """A question of a split.

    Attributes:
      id: of the example.
      place: 'file:line' it was read from.
      key: text that must not be in two splits.
    """

    id: int
    place: str
    key: str


def normalised(text: str) -> str:
    """Returns a text that is the same for texts that differ in white space, case or Unicode form alone.

    Signs stay: 'x^2 + 1' and 'x^2 - 1' are two questions.
    """
    return ''.join(unicodedata.normalize('NFKC', text).casefold().split())


def check(splits: Mapping[str, Sequence[Entry]], option: str = '') -> None:
    """Raises ValueError, naming both places, if two splits share a question, as it is or up to `normalised`.

    Args:
      splits: the questions of each.
      option: the key that allows files that are not the published ones, for the message; '' where any file is taken.
    """
    first: dict[str, tuple[str, Entry]] = {}
    shared = []
    for split, entries in splits.items():
        for entry in entries:
            before, other = first.setdefault(normalised(entry.key), (split, entry))
            if before != split:
                how = 'the same text' if entry.key == other.key else 'the same but for case and white space'
                shared.append(f'{other.place} ({before}) and {entry.place} ({split}), {how}: '
                              f'{entry.key.strip()[:_SHOWN]!r}')
    if shared:
        dots = '; …' if len(shared) > _NAMED else ''
        allowed = f', and set {option}=True, since the file is then no longer the published one' if option else ''
        raise ValueError(f'{len(shared)} questions are in two splits: {"; ".join(shared[:_NAMED])}{dots}. What is '
                         f'trained on must not be tested on: take them out of one of the files{allowed}.')


def write(path: Path, splits: Mapping[str, Sequence[Entry]], files: Mapping[str, Sequence[str]]) -> None:
    """Writes the ledger: of each file its digests, of each split the ids, places and a hash of the questions."""
    content = {
        'files': {name: list(digests) for name, digests in files.items()},
        'splits': {split: {
            'n': len(entries),
            'questions': hashlib.sha256('\n'.join(sorted(normalised(e.key) for e in entries)).encode()).hexdigest(),
            'ids': [entry.id for entry in entries],
            'places': [entry.place for entry in entries],
        } for split, entries in splits.items()},
    }
    path.write_text(json.dumps(content) + '\n', encoding='utf-8')
