"""The two kinds of tokenizers in GGUF files, rebuilt: byte-level BPE, and the BPE of SentencePiece.

Control tokens written in a text become their ids; so do user-defined ones, as the original has it.
"""
from __future__ import annotations

from collections.abc import Sequence
import re

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

# How Llama 3 and Qwen cut text before the merges; they differ in how many digits stay together.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r'|\s+(?!\S)|\s+')
# The same by the name that GGUF gives it.
PRE_TOKENIZERS = {
    'smollm': lambda: pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]),
    'gpt-2': lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    'llama-bpe': lambda: _split(_WORDS % r'\p{N}{1,3}'),
    'qwen2': lambda: _split(_WORDS % r'\p{N}'),
}
# Those that take a word that is a token whole, whatever the merges say; whose texts begin with BOS unless the file says
# otherwise; and that compose characters first.
IGNORE_MERGES = BOS_FIRST = frozenset({'llama-bpe'})
COMPOSED = frozenset({'qwen2'})
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of the format
WHOLE = (CONTROL, USER_DEFINED)  # those that a text holds as they are written
SPACE = '▁'  # what SentencePiece writes for a blank


def byte_level(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE.

    Args:
      tokens: by id.
      types: of each.
      merges: pairs of tokens with a blank between them, the first applied first.
      pre: how text is cut before, one of `PRE_TOKENIZERS`.

    Raises:
      ValueError: `pre` is not known.
    """
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f'tokenizer.ggml.pre is {pre!r}; allowed: {", ".join(PRE_TOKENIZERS)}.')
    pairs = [(first, second) for first, second in (merge.split(' ') for merge in merges)]
    backend = tokenizers.Tokenizer(models.BPE(
        vocab=_ids(tokens, types), merges=pairs, ignore_merges=pre in IGNORE_MERGES))
    if pre in COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_whole(token) for token in _of(tokens, types, CONTROL)])
    backend.add_tokens([_whole(token) for token in _of(tokens, types, USER_DEFINED)])
    return backend


def sentence_pieces(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float],
                    space_prefix: bool) -> tokenizers.Tokenizer:
    """Returns the BPE that gives the ids of SentencePiece's.

    SentencePiece joins, of all neighbours that make a piece together, those whose piece has the highest score; of
    equals the leftmost ones. That is a BPE whose merges are all splits of a piece into two, in the order of their
    pieces' scores. User-defined pieces are cut out of the text first, the longest at each place, and never joined.

    Args:
      tokens: by id.
      types: of each.
      scores: of each.
      space_prefix: whether a text begins with a blank that nobody wrote (SentencePiece's add_dummy_prefix). It also
        stands behind every control token in a text.

    Raises:
      ValueError: the ids would not be the same; in words.
    """
    ids = _ids(tokens, types)
    pieces = {token: score for token, kind, score in zip(tokens, types, scores) if kind == NORMAL}
    user_defined = _of(tokens, types, USER_DEFINED)
    if user_defined and space_prefix:
        raise _inexact(f'texts begin with a blank, and {user_defined[0]!r} is a user-defined piece')
    missing = {_byte(byte) for byte in range(256)} - set(_of(tokens, types, BYTE))
    if missing:
        raise _inexact(f'it lacks the byte piece {min(missing)}')
    # A piece around a user-defined one is never made.
    inside = re.compile('|'.join(re.escape(token.replace(' ', SPACE)) for token in user_defined) or r'(?!)')
    made = {piece: score for piece, score in pieces.items() if len(piece) > 1 and not inside.search(piece)}
    parts = set(pieces)
    for char in sorted(set().union(*made) - parts):
        if ord(char) >= 128:
            raise _inexact(f'it has pieces with {char!r}, which is no piece')
        ids[char] = ids.pop(_byte(ord(char)))  # a character of one byte: the same id by its other name
        parts.add(char)
    for token in _of(tokens, types, UNUSED):
        if token in parts or _splits(token, parts):
            raise _inexact(f'its piece {token!r} is joined from others and then taken apart again')
    # Splits of one piece have one score, and here an order. The tests look for a text that would tell, and find none.
    merges: list[tuple[str, str]] = []
    of_score: dict[float, str] = {}
    for piece, score in sorted(made.items(), key=lambda entry: -entry[1]):
        splits = _splits(piece, parts)
        merges += splits
        if splits and of_score.setdefault(score, piece) != piece:
            raise _inexact(f'{of_score[score]!r} and {piece!r} have the same score')
    unknown = next(iter(_of(tokens, types, UNKNOWN)), None)
    backend = tokenizers.Tokenizer(models.BPE(
        vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    blank = normalizers.Replace(' ', SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), blank]) if space_prefix else blank
    backend.decoder = decoders.Sequence([
        decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse(),
        *[decoders.Strip(' ', 1, 0)] * space_prefix])
    backend.add_special_tokens([_whole(token) for kind in (UNKNOWN, CONTROL) for token in _of(tokens, types, kind)])
    # Found after blanks are replaced: runs of blanks are among them.
    backend.add_tokens([AddedToken(token, normalized=True) for token in user_defined])
    return backend


def _ids(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    # What is unused fills ids that no token has, at the end and in between.
    return {token: index for index, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}


def _of(tokens: Sequence[str], types: Sequence[int], wanted: int) -> list[str]:
    return [token for token, kind in zip(tokens, types) if kind == wanted]


def _byte(byte: int) -> str:
    return f'<0x{byte:02X}>'


def _splits(piece: str, parts: set[str]) -> list[tuple[str, str]]:
    """Returns all pairs of parts that make a piece, those with the longest first part first."""
    return [(piece[:place], piece[place:]) for place in range(len(piece) - 1, 0, -1)
            if piece[:place] in parts and piece[place:] in parts]


def _inexact(why: str) -> ValueError:
    return ValueError(f'this SentencePiece tokenizer would not give the same ids here: {why}. Give the Hugging Face '
                      'folder of the model instead.')


def _split(pattern: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _whole(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)
