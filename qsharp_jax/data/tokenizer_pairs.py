"""Whether two networks mean the same tokens by the same ids, as one that guides another must."""
from __future__ import annotations

from collections.abc import Collection, Mapping
import warnings

from qsharp_jax.data.tokenizers import BPETokenizer, Tokenizer

_NAMED = 20  # ids that a warning shows

# Id -> the token of the one and of the other tokenizer, None where it has none.
Differences = Mapping[int, tuple[str | None, str | None]]


def compare(reference: Tokenizer, value: Tokenizer) -> Differences:
    """Returns the special tokens that are not the same in both; everything else must be.

    What an unused id is called does not matter: models of one vocabulary may differ in the names of their reserved
    tokens, and in how far their vocabularies are padded.

    Args:
      reference: of the reference, which makes all ids.
      value: of the checkpoint that the value network is started from.

    Raises:
      ValueError: an ordinary token or a merge differs; with the first id or merge.
    """
    if not isinstance(reference, BPETokenizer) or not isinstance(value, BPETokenizer):
        raise ValueError(f'the tokenizers of reference and value.source are of different kinds, '
                         f'{type(reference).__name__} and {type(value).__name__}: a value network must read the '
                         "reference's ids.")
    kinds = [tokenizer.content['model'].get('type') for tokenizer in (reference, value)]
    if kinds[0] != kinds[1]:
        raise ValueError(f'the tokenizers of reference and value.source are of different kinds, {kinds[0]} and '
                         f"{kinds[1]}: a value network must read the reference's ids.")
    added = [{entry['id'] for entry in tokenizer.content['added_tokens']} for tokenizer in (reference, value)]
    tokens = [{token: text for text, token in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
              for tokenizer in (reference, value)]
    found = _different(tokens[0], tokens[1], added[0], added[1])
    first, second = (_merges(tokenizer) for tokenizer in (reference, value))
    if first != second:
        rank = next((rank for rank, pair in enumerate(zip(first, second)) if pair[0] != pair[1]),
                    min(len(first), len(second)))
        merges = [repr(merges[rank]) if rank < len(merges) else 'none' for merges in (first, second)]
        raise ValueError(f'the tokenizers of reference and value.source differ in merge {rank}: {merges[0]} and '
                         f"{merges[1]}. Choose a value.source with the reference's tokenizer.")
    return found


def check_used(differences: Differences, used: Collection[int], where: str) -> None:
    """Raises ValueError if an id that matters is among the differences.

    Args:
      differences: from `compare`.
      used: ids that prompts hold or that end answers.
      where: they are used, for the message.
    """
    wrong = sorted(set(differences) & set(used))
    if wrong:
        first, second = differences[wrong[0]]
        raise ValueError(f'the tokenizers of reference and value.source differ in id {wrong[0]}, {first!r} and '
                         f'{second!r}, which {where} ({len(wrong)} such ids). Choose a value.source with the '
                         "reference's tokenizer.")


def warn(differences: Differences) -> None:
    """Warns of differences that nothing uses, with their ids."""
    if differences:
        listed = [f'{token} ({first!r}, {second!r})' for token, (first, second) in sorted(differences.items())]
        dots = f' and {len(listed) - _NAMED} more' if len(listed) > _NAMED else ''
        warnings.warn(f'the tokenizers of reference and value.source differ in {len(listed)} special tokens, none of '
                      f'which is used here: {", ".join(listed[:_NAMED])}{dots}.', stacklevel=2)


def _different(
    first: Mapping[int, str], second: Mapping[int, str], first_added: set[int], second_added: set[int],
) -> Differences:
    found = {}
    for token in sorted(first.keys() | second.keys()):
        pair = first.get(token), second.get(token)
        if pair[0] == pair[1]:
            continue
        if all(text is None or token in added for text, added in zip(pair, (first_added, second_added))):
            found[token] = pair
        else:
            raise ValueError(f'the tokenizers of reference and value.source differ in id {token}: {pair[0]!r} and '
                             f"{pair[1]!r}. Choose a value.source with the reference's tokenizer.")
    return found


def _merges(tokenizer: BPETokenizer) -> list[tuple[str, ...]]:
    # Older files write a merge as one text.
    return [tuple(merge.split(' ')) if isinstance(merge, str) else tuple(merge)
            for merge in tokenizer.content['model'].get('merges', [])]
