"""Text to token ids and back: byte-pair encodings of published models, and closed vocabularies.

Prompts are tokenised once, in one place, and answers live as ids; nothing is ever decoded and encoded again.
"""
from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
import hashlib
import json
from pathlib import Path
import re
from typing import Any

import jinja2
import tokenizers
from tokenizers import processors

from qsharp_jax.data import chat_templates, gguf_tokenizers

# Tokens that end a text whatever the metadata name as its end: a model may have learned several.
END_TOKENS = frozenset({
    '<|endoftext|>', '<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|end_of_text|>', '</s>', '<end_of_turn>'})


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      vocab_size: one more than the greatest id.
      holes: ids below it that no token has.
      eos_ids: every id that ends a text.
      bos_id: the id that begins a text, or None.
      bos_first: whether a plain prompt begins with `bos_id`; a chat template writes it itself where it is wanted.
      fingerprint: hash of everything that ids depend on.
    """

    vocab_size: int
    holes: tuple[int, ...] = ()
    eos_ids: frozenset[int]
    bos_id: int | None
    bos_first: bool = False
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

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text that a model goes on from: `encode`, and BOS in front, once, if it wants one."""
        ids = self.encode(text)
        if self.bos_first and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

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
    """Byte-pair encoding, or whatever else `tokenizers` reads from a tokenizer.json, with a chat template."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_ids: frozenset[int], bos_id: int | None,
                 names: Mapping[str, str], chat_template: str | None, bos_first: bool = False) -> None:
        """`names` are the texts of special tokens as a template knows them, such as 'eos_token'."""
        self.backend = backend
        ids = set(backend.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(ids) + 1
        self.holes = tuple(sorted(set(range(self.vocab_size)) - ids))
        self.eos_ids = eos_ids
        self.bos_id = bos_id
        self.bos_first = bos_first
        self.chat_template = chat_template
        self.names = dict(names)
        self.content = json.loads(backend.to_str())
        self.fingerprint = _fingerprint(self.content)
        self._template = None if chat_template is None else chat_templates.compiled(chat_template)

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
            return self._template.render(messages=messages, add_generation_prompt=True, **self.names)
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


class UnknownTokenizer(Tokenizer):
    """Stands for the tokenizer of a model of which only the sizes are known. It has ids, and no texts for them."""

    bos_id = None
    fingerprint = ''

    def __init__(self, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids

    def encode(self, text: str) -> list[int]:
        raise ValueError(f'{text!r} cannot be encoded: the model is described without its tokenizer.')

    def decode(self, ids: Sequence[int]) -> str:
        raise ValueError('there are no texts: the model is described without its tokenizer.')

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        raise ValueError('there is no chat template: the model is described without its tokenizer.')

    def single_token(self, text: str) -> int:
        return 0  # some id: which one changes no shape


def from_config(path: Path, vocab_size: int) -> UnknownTokenizer:
    """Returns what stands for the tokenizer of a model of which there is nothing but this config.json."""
    ends = _read_json(path).get('eos_token_id', 0)
    return UnknownTokenizer(vocab_size, frozenset(ends if isinstance(ends, list) else [ends]))


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

    tokens, types, model = read('ggml.tokens'), read('ggml.token_type'), read('ggml.model')
    if model == 'gpt2':
        pre = read('ggml.pre')
        backend = gguf_tokenizers.byte_level(tokens, types, read('ggml.merges'), pre)
        bos_first = pre in gguf_tokenizers.BOS_FIRST
    elif model == 'llama':
        if metadata.get('tokenizer.ggml.remove_extra_whitespaces') or \
                metadata.get('tokenizer.ggml.precompiled_charsmap'):
            raise ValueError('the SentencePiece tokenizer of this GGUF file changes texts before it reads them, which '
                             'is not supported: give the Hugging Face folder of the model instead.')
        backend = gguf_tokenizers.sentence_pieces(
            tokens, types, read('ggml.scores'), bool(metadata.get('tokenizer.ggml.add_space_prefix', True)))
        bos_first = True
    else:
        raise ValueError(f"tokenizer.ggml.model is {model!r}; allowed: 'gpt2' (byte-level BPE), 'llama' (BPE of "
                         'SentencePiece). Give the Hugging Face folder of the model instead.')
    if metadata.get('tokenizer.ggml.add_eos_token'):
        raise ValueError('tokenizer.ggml.add_eos_token is True: every text would end with an end token; only BOS in '
                         'front is supported.')
    eos_id, bos_id = read('ggml.eos_token_id'), metadata.get('tokenizer.ggml.bos_token_id')
    ends = {index for index, (token, kind) in enumerate(zip(tokens, types))
            if token in END_TOKENS and kind in gguf_tokenizers.WHOLE} | {eos_id}
    ends |= {metadata[f'tokenizer.ggml.{name}'] for name in ('eot_token_id', 'eom_token_id')
             if f'tokenizer.ggml.{name}' in metadata}
    bos_first = bool(metadata.get('tokenizer.ggml.add_bos_token', bos_first)) and bos_id is not None
    names = {'bos_token': '' if bos_id is None else tokens[bos_id], 'eos_token': tokens[eos_id]}
    if bos_first:
        backend.post_processor = processors.TemplateProcessing(
            single=f'{tokens[bos_id]} $A', special_tokens=[(tokens[bos_id], bos_id)])
    return BPETokenizer(backend, frozenset(ends), bos_id, names, metadata.get('tokenizer.chat_template'), bos_first)


def from_folder(path: Path) -> BPETokenizer:
    """Returns the tokenizer of a Hugging Face folder: tokenizer.json, with what the files beside it say.

    A text ends at the tokenizer's end token and at every `eos_token_id` of generation_config.json, or of config.json
    where there is none. A plain prompt begins with BOS if tokenizer.json puts it there.

    Raises:
      ValueError: a file is missing or damaged, or tokenizer.json adds other tokens than BOS to a text.
    """
    file = path / 'tokenizer.json'
    if not file.is_file():
        raise ValueError(f'{path} has no tokenizer.json; other files of tokenizers are not read. Load it with '
                         'transformers.AutoTokenizer and save it with save_pretrained.')
    try:
        backend = _backend(file.read_text(encoding='utf-8'))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f'{file} is damaged, or newer than the package tokenizers: {error}') from error
    backend.no_truncation()
    backend.no_padding()
    said = {**_read_json(path / 'special_tokens_map.json'), **_read_json(path / 'tokenizer_config.json')}
    names = {name: entry['content'] if isinstance(entry, Mapping) else entry for name, entry in said.items()
             if name.endswith('_token') and isinstance(entry, (str, Mapping))}
    ids = {name: backend.token_to_id(text) for name, text in names.items()}
    unknown = [name for name in ('bos_token', 'eos_token') if name in names and ids[name] is None]
    if unknown:
        raise ValueError(f'{path}: tokenizer_config.json names {names[unknown[0]]!r} as {unknown[0]}, and '
                         'tokenizer.json has no such token.')
    generation = path / 'generation_config.json'
    ends = _read_json(generation if generation.is_file() else path / 'config.json').get('eos_token_id')
    eos_ids = {int(end) for end in ends} if isinstance(ends, list) else set() if ends is None else {int(ends)}
    eos_ids |= {token for name, token in ids.items() if name == 'eos_token' and token is not None}
    added, bos_id = backend.encode('', add_special_tokens=True).ids, ids.get('bos_token')
    if added and (len(added) > 1 or bos_id not in (None, added[0])):
        raise ValueError(f'{file} adds {[backend.id_to_token(token) for token in added]} to a text; only BOS in front '
                         'is supported.')
    return BPETokenizer(backend, frozenset(eos_ids), added[0] if added else bos_id, {'bos_token': '', **names},
                        _chat_template(path, said), bos_first=bool(added))


def _backend(text: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a tokenizer.json, each of its tokens with the id that the file says."""
    backend, content = tokenizers.Tokenizer.from_str(text), json.loads(text)
    # Where the vocabulary has holes, the library numbers the tokens added to it anew. Those inside it keep their ids.
    added = {entry['content']: entry['id'] for entry in content.get('added_tokens') or []}
    if any(backend.token_to_id(token) != index for token, index in added.items()):
        content['model']['vocab'].update(added)
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    return backend


def _chat_template(path: Path, said: Mapping[str, Any]) -> str | None:
    """Returns the default chat template of a folder: its own file, or one in tokenizer_config.json."""
    file = path / 'chat_template.jinja'
    if file.is_file():
        return file.read_text(encoding='utf-8')
    template = said.get('chat_template')
    if isinstance(template, list):  # several, by name
        template = {entry['name']: entry['template'] for entry in template}.get('default')
    return template


def _read_json(path: Path) -> dict[str, Any]:
    """Returns what a file of a folder holds; nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is damaged: it is no JSON ({error}).') from error
    if not isinstance(found, dict):
        raise ValueError(f'{path} is damaged: it holds no JSON object.')
    return found


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
