"""Text to token ids and back: byte-level BPE rebuilt from GGUF metadata, and closed vocabularies.

Prompts are tokenised once, in one place, and answers live as ids; nothing is ever decoded and encoded again.
"""
from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
import hashlib
import json
import re
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

# How each family cuts text before the merges, by the name that GGUF gives it.
PRE_TOKENIZERS = {
    'smollm': lambda: pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]),
}
# Control tokens that end a text whatever the metadata name as its end: a model may have learned several.
END_TOKENS = frozenset({'<|endoftext|>', '<|im_end|>', '<|eot_id|>', '<|end_of_text|>', '</s>'})
CONTROL, USER_DEFINED = 3, 4  # token types of the GGUF format


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      vocab_size: number of ids.
      eos_ids: every id that ends a text.
      bos_id: the id that begins a text, or None. Never added on its own.
      fingerprint: hash of everything that ids depend on.
    """

    vocab_size: int
    eos_ids: frozenset[int]
    bos_id: int | None
    fingerprint: str

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; none is added. A control token written in the text becomes its id."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, control tokens written out."""

    @abc.abstractmethod
    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the ids of a conversation up to where the assistant's next turn begins.

        Args:
          messages: turns with 'role' and 'content'.
        """

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of each id alone; a part of a character of several bytes is a replacement mark."""
        return [self.decode([token]) for token in ids]

    def single_token(self, text: str) -> int:
        """Returns the id of a text that is exactly one token.

        Raises:
          ValueError: if it is none or several.
        """
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f'{text!r} must be exactly one token, but is {len(ids)}: {self.pieces(ids)}.')
        return ids[0]


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding with a chat template."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_ids: frozenset[int], bos_id: int | None,
                 eos_id: int, chat_template: str | None) -> None:
        self.backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids = eos_ids
        self.bos_id = bos_id
        self.fingerprint = _fingerprint(json.loads(backend.to_str()))
        self._names = {'bos_token': '' if bos_id is None else backend.id_to_token(bos_id),
                       'eos_token': backend.id_to_token(eos_id)}
        self._template = None if chat_template is None else _environment().from_string(chat_template)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(token) for token in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f'Token ids must be in 0 .. {self.vocab_size - 1}; got {min(ids)} .. '
                             f'{max(ids)}.')
        return self.backend.decode(ids, skip_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Returns the text of a conversation up to where the assistant's next turn begins."""
        if self._template is None:
            raise ValueError('This tokenizer has no chat template. Set task.chat to False.')
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._names)
        except jinja2.TemplateError as error:
            raise ValueError(f'The chat template refuses these messages: {error}') from error

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode(self.render_chat(messages))


class VocabularyTokenizer(Tokenizer):
    """A closed list of tokens. Text is read from the left, always taking the longest token.

    Where the list has numbers of several digits, numbers are read whole: '123' is never '12' and '3'. A `joint` is
    a text that stands between two numbers and needs no token: it is left out of the ids and put back by `decode`.
    """

    def __init__(self, tokens: Sequence[str], eos: str, joint: str = '') -> None:
        if len(set(tokens)) != len(tokens) or '' in tokens:
            raise ValueError('The tokens of a vocabulary must be distinct and not empty.')
        if eos not in tokens:
            raise ValueError(f'The end token {eos!r} is not in the vocabulary.')
        self.tokens = tuple(tokens)
        self.vocab_size = len(self.tokens)
        self.eos_ids = frozenset({self.tokens.index(eos)})
        self.bos_id = None
        self.fingerprint = _fingerprint([self.tokens, eos, joint])
        self._joint = joint
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        whole_numbers = any(re.fullmatch(r'\d{2,}', token) for token in self.tokens)
        pieces = [re.escape(token) + (r'(?!\d)' if whole_numbers and token[-1].isdigit() else '')
                  for token in sorted(self.tokens, key=len, reverse=True)]
        self._pattern = re.compile('|'.join(pieces))
        self._unknown = re.compile(r'\d+|\w+|.', re.DOTALL)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`.

        Raises:
          ValueError: naming the first piece that is not in the vocabulary.
        """
        ids, place = [], 0
        while place < len(text):
            match = self._pattern.match(text, place)
            if match is None:
                unknown = self._unknown.match(text, place)
                piece = unknown.group() if unknown else text[place:]
                raise ValueError(f'{piece!r} at character {place} of {text!r} is not in the vocabulary of '
                                 f'{self.vocab_size} tokens.')
            ids.append(self._ids[match.group()])
            place = match.end()
            after = place + len(self._joint)
            if self._joint and match.group().isdigit() and text[place:after] == self._joint and \
                    text[after:after + 1].isdigit():
                place = after
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f'Token ids must be in 0 .. {self.vocab_size - 1}; got {token}.')
        pieces = [self.tokens[token] for token in ids]
        return ''.join(piece + (self._joint if piece.isdigit() and following.isdigit() else '')
                       for piece, following in zip(pieces, [*pieces[1:], '']))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        raise ValueError('A closed vocabulary has no chat template. Set task.chat to False.')


def from_vocabulary(tokens: Sequence[str], eos: str, joint: str = '') -> VocabularyTokenizer:
    """Returns the tokenizer of a closed vocabulary; ids are places in `tokens`, `eos` is one of them.

    Without a `joint`, two numbers without anything between them cannot be told from one when they are read back.
    """
    return VocabularyTokenizer(tokens, eos, joint)


def from_gguf(metadata: Mapping[str, Any]) -> BPETokenizer:
    """Returns the tokenizer that the metadata of a GGUF file describe.

    Raises:
      ValueError: if a key is missing, or the kind of tokenizer is not known.
    """
    def read(key: str) -> Any:
        if f'tokenizer.{key}' not in metadata:
            raise ValueError(f"The GGUF metadata lacks 'tokenizer.{key}': the file has no tokenizer.")
        return metadata[f'tokenizer.{key}']

    kind, pre = read('ggml.model'), read('ggml.pre')
    if kind != 'gpt2':
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; allowed: 'gpt2' (byte-level BPE).")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f'tokenizer.ggml.pre is {pre!r}; allowed: {", ".join(PRE_TOKENIZERS)}.')
    tokens, types = read('ggml.tokens'), read('ggml.token_type')
    merges = [tuple(merge.split(' ')) for merge in read('ggml.merges')]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    backend.add_special_tokens([_whole(token) for token in control])
    backend.add_tokens([_whole(token) for token, kind in zip(tokens, types) if kind == USER_DEFINED])
    eos_id = read('ggml.eos_token_id')
    ends = {vocabulary[token] for token in control if token in END_TOKENS}
    return BPETokenizer(
        backend, frozenset(ends | {eos_id}), bos_id=metadata.get('tokenizer.ggml.bos_token_id'),
        eos_id=eos_id, chat_template=metadata.get('tokenizer.chat_template'))


def _whole(token: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, normalized=False, special=True)


def _environment() -> jinja2.Environment:
    """Returns the environment chat templates are written for: sandboxed, as they come with the weights."""
    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.globals['raise_exception'] = refuse
    environment.filters['tojson'] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
