"""Ids that no token has, in the middle of a vocabulary: every law is that of the vocabulary without them."""
from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import categorical, chat, decoding, experiment, guidance
from qsharp_jax.data import tokenizers
from qsharp_jax.decoding.candidates import score_candidates
from qsharp_jax.models import networks, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.types import Policy
from tests import small_tokenizers, tabular, test_pairs, tiny

SHAPE = transformer.TransformerConfig(
    vocab_size=40, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=24, max_positions=32)
SIZE, HOLES = 36, (0, 3, 4, 17, 29)  # four more rows pad the model's vocabulary
REAL = np.array([token for token in range(SIZE) if token not in HOLES])
COMPACT = dataclasses.replace(SHAPE, vocab_size=len(REAL))
BERNOULLI = categorical.make('bernoulli', 0.0, 1.0)
# Every kind of row: guided or not, greedy or not, cut by rank, by mass, by both.
ROWS = list(itertools.product((np.inf, 0.1), (0.0, 0.7, 1.3), (0, 5, len(REAL) + 2), (1.0, 0.9, 0.3)))
ETAS, TEMPERATURES, TOP_K, TOP_P = (np.array(column) for column in zip(*ROWS))
LENGTH, EOS = 5, (6,)


def params_of(kind):
    """Both networks' parameters. What the reference says of ids without a token would drown all others."""
    base = jax.tree.map(lambda leaf: 2 * leaf, transformer.init_params(jax.random.key(0), SHAPE))
    value_config = ValueConfig(num_scores=1, kind=kind, init='reference', head_init='normal')
    value = value_lib.init_value_params(jax.random.key(1), value_config, base, SHAPE)
    value['head']['kernel'] = 5 * value['head']['kernel']
    reference = {**base, 'embedding': (1.6 * base['embedding']).at[np.array([*HOLES, *range(SIZE, 40)])].mul(50)}
    return value_config, reference, value


def compacted(params):
    """The same without the rows of ids that no token has."""
    return jax.tree.map(lambda leaf: leaf[REAL] if leaf.shape[0] == SHAPE.vocab_size else leaf, params)


def answered(reference, value, params, prompts, eos, **guided):
    policy = Policy(eta=ETAS.astype(np.float32), temperature=TEMPERATURES.astype(np.float32),
                    top_k=TOP_K.astype(np.int32), top_p=TOP_P.astype(np.float32),
                    reference_temperature=np.where(TEMPERATURES > 0, TEMPERATURES, 1.0).astype(np.float32))
    number = np.arange(len(ROWS), dtype=np.int32)
    how = decoding.Guidance(value, BERNOULLI, **guided)
    state = decoding.start(reference, value, *params, prompts, np.array([3, 3], np.int32), number % 2,
                           decoding.unit_keys(0, 0, 'evaluate', number, number), np.full(len(ROWS), LENGTH), LENGTH)
    return decoding.decode(reference, how, *params, policy, state, eos)


def by_inversion(keys, log_probs):
    """A draw that does not depend on where tokens of no mass stand; `guidance.sample` has its noise by place."""
    uniform = jax.vmap(jax.random.uniform)(keys)
    return jnp.argmax(jnp.cumsum(jnp.exp(log_probs), axis=-1) > uniform[:, None], axis=-1).astype(jnp.int32)


CASES = [('v', 'paper', 'zero', 6), ('q', 'paper', 'mean', 6), ('v', 'paper', 'soft_bellman', 6),
         ('v', 'after_sampler', 'remove', 6), ('v', 'paper', 'min', len(REAL) + 3)]


@pytest.mark.parametrize('kind, order, outside, candidates', CASES)
def test_answers_and_kl_are_those_of_a_vocabulary_without_the_holes(monkeypatch, kind, order, outside, candidates):
    monkeypatch.setattr(guidance, 'sample', by_inversion)
    value_config, reference, value = params_of(kind)
    guided = {'order': order, 'outside': outside, 'candidates': candidates}
    prompts = np.array([[5, 8, 2], [30, 9, 1]], np.int32)
    found = answered(networks.reference(SHAPE, SIZE, HOLES), networks.value(SHAPE, value_config), (reference, value),
                     prompts, EOS, **guided)
    place = {int(token): index for index, token in enumerate(REAL)}
    expected = answered(
        networks.reference(COMPACT), networks.value(COMPACT, value_config), (compacted(reference), compacted(value)),
        np.vectorize(place.get)(prompts).astype(np.int32), (place[EOS[0]],), **guided)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(found.ended, expected.ended)
    written = np.arange(LENGTH) < np.asarray(found.count)[:, None]
    assert len(np.unique(np.asarray(found.tokens)[written])) > 10
    np.testing.assert_array_equal(np.asarray(found.tokens)[written], REAL[np.asarray(expected.tokens)][written])
    np.testing.assert_allclose(found.values, expected.values, atol=1e-5)
    assert np.all(np.isfinite(found.kl)) and np.max(found.kl) > 1
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-4, atol=1e-5)


def test_the_sampler_draws_no_hole():
    value_config, reference, value = params_of('v')
    params, prompts = (reference, value), np.array([[5, 8, 2], [30, 9, 1]], np.int32)
    networks_of_all = networks.reference(SHAPE, SIZE), networks.value(SHAPE, value_config)
    seen = np.asarray(answered(*networks_of_all, params, prompts, ()).tokens)
    assert np.isin(seen, HOLES).any()
    found = answered(networks.reference(SHAPE, SIZE, HOLES), networks_of_all[1], params, prompts, ())
    assert not np.isin(found.tokens, HOLES).any() and np.all(np.isfinite(found.kl))


@pytest.mark.parametrize('order', guidance.ORDERS)
def test_no_hole_is_scored_where_candidates_are_more_than_tokens(order):
    logits = np.arange(11, dtype=np.float32) - 20
    logits[[2, 10]] = -np.inf
    one = np.ones(1, np.float32)
    policy = Policy(eta=one, temperature=one, top_k=np.zeros(1, np.int32), top_p=one, reference_temperature=one)
    fakes = tabular.dyadic_reference(11), tabular.dyadic_value()
    zero = np.zeros(1, np.int32)
    state = decoding.start(*fakes, None, None, np.array([[3]], np.int32), zero + 1, zero,
                           decoding.unit_keys(0, 0, 'evaluate', zero, zero), zero + 1, 1)
    how = decoding.Guidance(fakes[1], BERNOULLI, candidates=10, order=order)
    scored, *_ = score_candidates(how, None, state, policy, jnp.asarray(logits[None, None]), state.pending[:, None],
                                  state.active[:, None])
    np.testing.assert_array_equal(scored.mask[0], np.isfinite(logits))


def test_nothing_is_computed_where_there_is_no_hole():
    programs = []
    for holes in ((), (SIZE, SIZE + 2), HOLES):
        reference = networks.reference(SHAPE, SIZE, holes)
        zero = jnp.zeros(1, jnp.int32)
        programs.append(str(jax.make_jaxpr(reference.step)(params_of('v')[1], zero, zero, reference.init_cache(1, 4))))
    assert programs[0] == programs[1] and 'inf' not in programs[0] and 'inf' in programs[2].replace(programs[0], '')
    with pytest.raises(ValueError, match='none of the 2 ids has a token'):
        networks.reference(SHAPE, 2, (0, 1))


def content_with_holes():
    """A tokenizer.json in which two ids among the ordinary tokens and two before the added ones have no token."""
    content = json.loads(small_tokenizers.trained('llama3'))
    vocab = content['model']['vocab']
    content['model']['vocab'] = {text: index + 2 * (index >= 300) for text, index in vocab.items()}
    for entry in content['added_tokens']:
        entry['id'] += 4
    bos = content['post_processor']['special_tokens'][small_tokenizers.BOS['llama3']]
    bos['ids'] = [token + 4 for token in bos['ids']]
    return content, (300, 301, len(vocab) + 2, len(vocab) + 3)


def test_tokens_of_a_file_keep_their_ids(tmp_path):
    content, holes = content_with_holes()
    whole = tokenizers.from_folder(small_tokenizers.write(tmp_path / 'whole', 'llama3'))
    tokenizer = tokenizers.from_folder(small_tokenizers.write(tmp_path / 'a', 'llama3', content=json.dumps(content)))
    assert whole.holes == () and tokenizer.holes == holes and tokenizer.vocab_size == whole.vocab_size + 4
    ordinary = len(json.loads(small_tokenizers.trained('llama3'))['model']['vocab'])
    for text in small_tokenizers.varied_texts():
        ids = whole.encode(text)
        moved = [token + 2 * (token >= 300) + 2 * (token >= ordinary) for token in ids]
        assert tokenizer.encode(text) == moved and tokenizer.decode(moved) == whole.decode(ids)
    # What is written of it says the same.
    again = small_tokenizers.write(tmp_path / 'b', 'llama3', content=json.dumps(tokenizer.content))
    assert tokenizers.from_folder(again).fingerprint == tokenizer.fingerprint


def test_unused_tokens_of_a_gguf_file_are_holes():
    metadata = small_tokenizers.gguf_metadata('qwen2')
    plain = tokenizers.from_gguf(metadata)
    for key, filler in (('tokens', ['[PAD300]', '[PAD301]']), ('token_type', [5, 5])):
        listed = metadata[f'tokenizer.ggml.{key}']
        metadata[f'tokenizer.ggml.{key}'] = listed[:300] + filler + listed[300:]
    metadata['tokenizer.ggml.eos_token_id'] += 2
    tokenizer = tokenizers.from_gguf(metadata)
    assert plain.holes == () and tokenizer.holes == (300, 301)
    ids = plain.encode('[PAD300]<|im_end|> naïve')
    assert tokenizer.encode('[PAD300]<|im_end|> naïve') == [token + 2 * (token >= 300) for token in ids]


@pytest.mark.filterwarnings('ignore:the tokenizers of reference and value.source differ')
def test_a_run_and_a_talk_see_real_ids_only(tmp_path: Path) -> None:
    content, holes = content_with_holes()
    config = dataclasses.replace(test_pairs.REFERENCE, vocab_size=test_pairs.IDS + 9)
    folder = test_pairs.write(tmp_path / 'model', config, 0, json.dumps(content))
    generation = folder / 'generation_config.json'
    generation.write_text(json.dumps({'eos_token_id': []}))
    with tiny.devices(1):
        changes = {'value__init': 'reference', 'value__source': ''}
        parts = experiment.outline(test_pairs.config_of((folder, folder), tmp_path, **changes), tmp_path / 'run')
        talk = chat.load(str(folder), None, None, 1.0, 1.0, 4, 'float32', False)
        for reference in (parts.reference, talk.reference):
            assert reference.vocab_size == test_pairs.IDS + 4
            logits, _ = reference.step(talk.params, jnp.array([5]), jnp.array([0]), reference.init_cache(1, 4))
            assert tuple(np.flatnonzero(np.isneginf(logits[0]))) == holes
        most = parts.reference.vocab_size - len(holes)
        with pytest.raises(ValueError, match=f'but the vocabulary has {most} tokens'):
            experiment.outline(test_pairs.config_of(
                (folder, folder), tmp_path, **changes, guidance__candidates=most + 1), tmp_path / 'run')
