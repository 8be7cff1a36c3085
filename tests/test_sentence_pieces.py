"""The BPE of SentencePiece from GGUF metadata: by its law, and as the package itself does it."""
from __future__ import annotations

import functools
import io
import itertools
import re

import numpy as np
import pytest

from qsharp_jax.data import tokenizers
from qsharp_jax.models import pretrained
from tests import small_tokenizers, test_pretrained
from tests.small_tokenizers import TEXT, varied_texts

BYTES = [f'<0x{byte:02X}>' for byte in range(256)]
# As Gemma has them: turns, tags, and runs of white space.
USER_DEFINED = ['<start_of_turn>', '<end_of_turn>', '<table>', '[@BOS@]', *('\n' * count for count in range(1, 6)),
                *('▁' * count for count in range(2, 9))]
# Keywords of SentencePiece's trainer.
KINDS = {
    'llama': dict(add_dummy_prefix=True),
    'llama_digits': dict(add_dummy_prefix=True, split_digits=True, split_by_whitespace=False, pad_id=3),
    'gemma': dict(add_dummy_prefix=False, split_digits=True, user_defined_symbols=USER_DEFINED, pad_id=0, eos_id=1,
                  bos_id=2, unk_id=3, pad_piece='<pad>', eos_piece='<eos>', bos_piece='<bos>'),
    'plain': dict(add_dummy_prefix=False, split_by_whitespace=False, split_by_number=False, vocab_size=480),
}


@functools.cache
def trained(kind):
    """A small model of the package, and what a GGUF file says of it."""
    import sentencepiece
    model = io.BytesIO()
    # Texts with long words, white space and repetitions; other characters are left to the bytes.
    lines = TEXT.splitlines()
    texts = [*lines, *(line * 3 for line in lines), 'x' * 9 + '=' * 20, ' ' * 30 + 'x', '\t\ty\n\n']
    sentencepiece.SentencePieceTrainer.Train(**{
        'sentence_iterator': iter(texts), 'model_writer': model, 'model_type': 'bpe', 'vocab_size': 600,
        'byte_fallback': True, 'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False,
        'allow_whitespace_only_pieces': True, 'character_coverage': 0.99, 'hard_vocab_limit': False, 'minloglevel': 2,
        **KINDS[kind]})
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    own = KINDS[kind].get('user_defined_symbols', ())
    types = [2 if sp.IsUnknown(i) else 3 if sp.IsControl(i) else 6 if sp.IsByte(i) else
             4 if sp.IdToPiece(i) in own else 1 for i in range(sp.GetPieceSize())]
    return sp, {
        'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.pre': 'default',
        'tokenizer.ggml.tokens': [sp.IdToPiece(i) for i in range(sp.GetPieceSize())],
        'tokenizer.ggml.scores': [sp.GetScore(i) for i in range(sp.GetPieceSize())],
        'tokenizer.ggml.token_type': types, 'tokenizer.ggml.add_space_prefix': KINDS[kind]['add_dummy_prefix'],
        'tokenizer.ggml.bos_token_id': sp.bos_id(), 'tokenizer.ggml.eos_token_id': sp.eos_id()}


def texts_of():
    rng = np.random.default_rng(1)
    words = TEXT.split() + [' ', '  ', '\n', '\n\n\n', '\t', '   ', '▁', '▁▁', '<table>', '<end_of_turn>', '==', 'xxx']
    return varied_texts() + [''.join(rng.choice(words, size=rng.integers(1, 20))) for _ in range(300)] + [
        char * count for char in ' x=\n\tab7' for count in range(1, 30)] + ['a' * 2000, 'naïve 日本 ' * 200]


@pytest.mark.parity
@pytest.mark.parametrize('kind', KINDS)
def test_ids_and_texts_are_those_of_the_package(tmp_path, kind):
    sp, metadata = trained(kind)
    path = test_pretrained.write(
        tmp_path / 'a.gguf', test_pretrained.stored_tensors(test_pretrained.random_params()), tokenizer=metadata)
    ours = tokenizers.from_gguf(pretrained.open_checkpoint(path).metadata)
    control = [token for token, kind in zip(metadata['tokenizer.ggml.tokens'], metadata['tokenizer.ggml.token_type'])
               if kind in (2, 3)]
    cut = re.compile('(' + '|'.join(map(re.escape, control)) + ')')
    assert ours.vocab_size == sp.GetPieceSize() and ours.holes == () and ours.bos_first
    texts = texts_of()
    assert len(set(texts)) > 500
    for text in texts:
        parts = cut.split(text)  # the package itself reads no control token
        expected = list(itertools.chain(*(
            [sp.PieceToId(part)] if part in control else sp.EncodeAsIds(part) for part in parts)))
        assert ours.encode(text) == expected, text
        assert ours.encode_prompt(text) == ([] if expected[:1] == [sp.bos_id()] else [sp.bos_id()]) + expected
        if len(parts) == 1:
            assert ours.decode(expected) == sp.DecodeIds(expected) == text.replace('▁', ' ')
    used = {token for text in texts for token in ours.encode(text)}
    assert len(used & set(sp.PieceToId(BYTES))) > 20 and len(used) > 0.5 * sp.GetPieceSize() - 128


@pytest.mark.parity
@pytest.mark.parametrize('kind', KINDS)
def test_a_text_that_grows_token_by_token_never_changes(kind):
    sp, metadata = trained(kind)
    ours = tokenizers.from_gguf(metadata)
    for text in varied_texts()[:60]:
        if '\ufffd' in text or '<bos>' in text:
            continue
        ids, shown = sp.EncodeAsIds(text), ''
        for count in range(len(ids) + 1):
            now = ours.decode(ids[:count])
            if not now.endswith('\ufffd'):
                assert now.startswith(shown) and now == sp.DecodeIds(ids[:count])
                shown = now
        assert shown == text.replace('▁', ' ')


@pytest.mark.parity
def test_specials_and_conversations_of_gemma():
    sp, metadata = trained('gemma')
    metadata = {**metadata, 'tokenizer.chat_template': small_tokenizers.GEMMA_TEMPLATE}
    ours = tokenizers.from_gguf(metadata)
    assert ours.eos_ids == {sp.eos_id(), sp.PieceToId('<end_of_turn>')} and ours.bos_id == sp.bos_id()
    ids = ours.encode_chat(small_tokenizers.CHATS[2])
    text = ours.render_chat(small_tokenizers.CHATS[2])
    assert ids == [sp.bos_id(), *sp.EncodeAsIds(text.removeprefix('<bos>'))] and ours.decode(ids) == text
    assert ours.single_token('\n\n') == sp.PieceToId('\n\n') and ours.single_token('   ') == sp.PieceToId('▁▁▁')
    # Files write runs of blanks either way.
    blanks = [token.replace('▁', ' ') if kind == 4 else token for token, kind in zip(
        metadata['tokenizer.ggml.tokens'], metadata['tokenizer.ggml.token_type'])]
    other = tokenizers.from_gguf({**metadata, 'tokenizer.ggml.tokens': blanks})
    for text in texts_of():
        assert other.encode(text) == ours.encode(text) and other.decode(ours.encode(text)) == ours.decode(
            ours.encode(text))


@pytest.mark.parity
def test_what_is_written_is_the_same_tokenizer(tmp_path):
    for kind in ('llama', 'gemma'):
        ours = tokenizers.from_gguf(trained(kind)[1])
        folder = tmp_path / kind
        folder.mkdir()
        (folder / 'tokenizer.json').write_text(ours.backend.to_str(), encoding='utf-8')
        again = tokenizers.from_folder(folder)
        assert again.fingerprint == ours.fingerprint and again.bos_first
        for text in varied_texts():
            assert again.encode(text) == ours.encode(text)


def metadata_of(pieces, user_defined=(), prefix=False, scores=None, unused=(), missing=()):
    """Metadata with the pieces, best first."""
    listed = [('<unk>', 2, 0.0), ('<s>', 3, 0.0), ('</s>', 3, 0.0), *((token, 4, 0.0) for token in user_defined)]
    listed += [(token, 6, 0.0) for token in BYTES if token not in missing]
    listed += [(token, 1, -float(number) if scores is None else scores[number]) for number, token in enumerate(pieces)]
    listed += [(token, 5, -1e4) for token in unused]
    tokens, types, scored = (list(column) for column in zip(*listed))
    return {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': types,
            'tokenizer.ggml.scores': scored, 'tokenizer.ggml.add_space_prefix': prefix,
            'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.eos_token_id': 2}


def by_the_law(text, pieces, prefix):
    """Joins the neighbours whose piece has the highest score, of equals the leftmost, until none make a piece."""
    symbols = list('▁' * prefix + text.replace(' ', '▁'))
    rank = {piece: number for number, piece in enumerate(pieces)}
    while True:
        joined = [(rank.get(a + b, len(rank)), place) for place, (a, b) in enumerate(zip(symbols, symbols[1:]))]
        best, place = min(joined, default=(len(rank), 0))
        if best == len(rank):
            return symbols
        symbols[place:place + 2] = [symbols[place] + symbols[place + 1]]


@pytest.mark.parametrize('prefix', [False, True])
def test_pieces_in_any_order_are_joined_by_the_law(prefix):
    rng = np.random.default_rng(0)
    for _ in range(60):
        alphabet = rng.choice(['ab', 'ab▁', 'aaab', 'abc'])
        longer = {''.join(rng.choice(list(alphabet), size=rng.integers(2, 6))) for _ in range(30)}
        pieces = list(rng.permutation(sorted({*alphabet, '▁', *longer})))
        tokenizer = tokenizers.from_gguf(metadata_of(pieces, prefix=prefix))
        for _ in range(60):
            text = ''.join(rng.choice(list(alphabet.replace('▁', ' ')), size=rng.integers(1, 40)))
            tokens = [tokenizer.backend.id_to_token(token) for token in tokenizer.encode(text)]
            assert tokens == by_the_law(text, pieces, prefix), (pieces, text)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_character_that_is_a_byte_alone_is_part_of_longer_pieces():
    tokenizer = tokenizers.from_gguf(metadata_of(['\t\t', 'a']))
    byte = 3 + ord('\t')
    assert tokenizer.encode('\t\t\ta') == [3 + 256, byte, 3 + 257]
    assert tokenizer.decode([byte]) == '\t' and tokenizer.holes == ()
    assert tokenizer.decode(tokenizer.encode('é\t')) == 'é\t'


def test_user_defined_pieces_are_whole_the_longest_first():
    tokenizer = tokenizers.from_gguf(metadata_of(['xa', 'x', 'a', 'xab', 'b', '▁'], user_defined=['ab', 'abb', '▁▁']))
    pieces = [tokenizer.backend.id_to_token(token) for token in tokenizer.encode('xabxabbxa  a')]
    assert pieces == ['x', 'ab', 'x', 'abb', 'xa', '▁▁', 'a']


def test_control_tokens_have_a_blank_behind_them_where_texts_begin_with_one():
    tokenizer = tokenizers.from_gguf(metadata_of(['▁a', '▁', 'a'], prefix=True))
    pieces = [tokenizer.backend.id_to_token(token) for token in tokenizer.encode_prompt('a</s>a a')]
    assert pieces == ['<s>', '▁a', '</s>', '▁a', '▁a']
    assert tokenizer.bos_first and tokenizer.eos_ids == {2}
    assert not tokenizers.from_gguf({**metadata_of(['a']), 'tokenizer.ggml.add_bos_token': False}).bos_first


def test_unused_pieces_are_holes():
    tokenizer = tokenizers.from_gguf(metadata_of(['a', 'b'], unused=['[PAD1]', '[PAD2]']))
    assert tokenizer.vocab_size == 3 + 256 + 2
    metadata = metadata_of(['a', 'b'])
    metadata['tokenizer.ggml.token_type'][0] = 5
    assert tokenizers.from_gguf(metadata).holes == (0,)


@pytest.mark.parametrize('changes, words', [
    (dict(user_defined=['<x>'], prefix=True), "texts begin with a blank, and '<x>' is a user-defined piece"),
    (dict(missing=['<0x41>']), 'it lacks the byte piece <0x41>'),
    (dict(pieces=['éa', 'a']), "it has pieces with 'é', which is no piece"),
    (dict(pieces=['ab', 'bc', 'a', 'b', 'c'], scores=[-1, -1, -2, -3, -4]), "'ab' and 'bc' have the same score"),
    (dict(pieces=['a', 'b'], unused=['ab']), "its piece 'ab' is joined from others and then taken apart"),
    (dict(pieces=['a', 'b'], unused=['b']), "its piece 'b' is joined from others"),
])
def test_what_would_not_be_exact_is_refused(changes, words):
    with pytest.raises(ValueError, match=f'would not give the same ids here: {words}.*Give the Hugging Face folder'):
        tokenizers.from_gguf(metadata_of(**{'pieces': ['a', 'b'], **changes}))


@pytest.mark.parametrize('change', [{'remove_extra_whitespaces': True}, {'precompiled_charsmap': [1, 2]}])
def test_texts_that_are_changed_first_are_refused(change):
    with pytest.raises(ValueError, match='changes texts before it reads them'):
        tokenizers.from_gguf({**metadata_of(['a']), **{f'tokenizer.ggml.{key}': said for key, said in change.items()}})
