"""The value model and the networks as pure functions."""
from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import types
from qsharp_jax.models import networks, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.value import ValueConfig
from tests import tabular
from tests import test_transformer as helpers
from tests.test_transformer import FAMILIES, full_hidden, make_params, make_tokens, positions_of, quick_jit, TINY

TRUNCATED = ValueConfig(num_scores=3, layers=1, extra_layers=1, head_init='normal', head_bias=True)
KINDS = {
    'v': TRUNCATED,
    'q': dataclasses.replace(TRUNCATED, kind='q'),
    'v_restart': dataclasses.replace(TRUNCATED, extra_input='restart'),
    'v_lookahead': dataclasses.replace(TRUNCATED, init='reference', layers=None, extra_input='restart', lookahead=1),
}

kinds = pytest.mark.parametrize('value_config', KINDS.values(), ids=KINDS)


@functools.partial(quick_jit, static_argnums=(0, 1))
def start_jitted(value_config, config, reference_params):
    return value_lib.init_value_params(jax.random.key(3), value_config, reference_params, config)


def shaken(value_config, config=TINY):
    """Parameters of the right shapes in which the start is forgotten."""
    shapes = jax.eval_shape(
        lambda key: value_lib.init_value_params(key, value_config, make_params(config), config), jax.random.key(0))
    return helpers.shaken(shapes, seed=11)


def start(value_config, config=TINY, reference_params=None):
    reference_params = make_params(config) if reference_params is None else reference_params
    return start_jitted(value_config, config, reference_params)


@functools.partial(quick_jit, static_argnums=(0, 1))
def sequence_scores(config, value_config, params, tokens):
    """Scores of each token of plain sequences, without cache or packing.  # [B, T, K]"""
    length = tokens.shape[1]
    parents = jnp.broadcast_to(jnp.arange(length)[None] - 1, tokens.shape)
    return networks.value_scores(
        config, value_config, params, tokens, positions_of(tokens), transformer.causal_mask(length)[None], parents)


@kinds
@pytest.mark.parametrize('config', FAMILIES.values(), ids=FAMILIES)
def test_packed_candidates_equal_separate_forwards(config, value_config):
    if value_config.lookahead and not config.tied_embeddings:
        with pytest.raises(ValueError, match='only models with tied embeddings can look ahead'):
            value_lib.trunk_config(value_config, config)
        return
    params = shaken(value_config, config)
    # Scores of about one, to which the bounds below are absolute.
    params['head'] = jax.tree.map(lambda leaf: leaf / 4, params['head'])
    value = networks.value(config, value_config)
    score = quick_jit(value.score)
    tokens, candidates = make_tokens((3, 9)), make_tokens((3, 4), seed=8)
    length, rows = jnp.array([4, 2, 3]), jnp.arange(3)
    cache = quick_jit(functools.partial(value.prefill, start=0))(params, tokens[:, :4], length, value.init_cache(3, 10))
    for _ in range(3):
        scores, cache = score(params, tabular.block_after(tokens[rows, length], candidates), length, cache)
        for slot in range(4):
            # One plain sequence a row, with this candidate as its next token; what follows it cannot matter.
            alone = tokens.at[rows, length + 1].set(candidates[:, slot])
            expected = sequence_scores(config, value_config, params, alone)
            np.testing.assert_allclose(scores.candidates[:, slot], expected[rows, length + 1], atol=1e-5, rtol=0)
            if value.scores_root:
                np.testing.assert_allclose(scores.roots[:, 0], expected[rows, length], atol=1e-5, rtol=0)
        assert value.scores_root or np.all(np.isnan(scores.roots))
        length = length + 1


@kinds
@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.usefixtures('passes_of_every_size')
def test_rows_of_a_block_have_any_number_of_real_tokens(scan, value_config):
    """Several chosen tokens at once, and candidates behind any of them, in passes of every budget."""
    if scan:
        value_config = dataclasses.replace(value_config, extra_input='stream', lookahead=0)
    config = dataclasses.replace(TINY, scan_layers=scan)
    params = shaken(value_config, config)
    value, plain = networks.value(config, value_config), TINY
    score, separate = quick_jit(value.score), dict(params)
    separate['trunk'] = transformer.separate_layers(
        params['trunk'], value_lib.trunk_config(value_config, config))
    rng, rows = np.random.default_rng(0), 6
    tokens, length = make_tokens((rows, 16)), np.array([5, 1, 3, 2, 4, 1])
    cache = quick_jit(functools.partial(value.prefill, start=0))(
        params, tokens[:, :5], jnp.asarray(length), value.init_cache(rows, 16))
    for most in (3, 2, 1):
        for share in (0.0, 0.1, 0.3, 0.6, 1.0):
            known = rng.integers(0, most + 1, rows) if share < 1 else np.full(rows, most)
            if share == 0.0:
                known[:] = 0
            block = types.ValueBlock(
                roots=jnp.asarray(np.take_along_axis(np.asarray(tokens), length[:, None] + np.arange(most), axis=1)),
                known=jnp.asarray(known), candidates=make_tokens((rows, 5), seed=8),
                parents=jnp.asarray(rng.integers(-value.scores_root, np.maximum(known, 1)[:, None], (rows, 5))),
                wanted=jnp.asarray((rng.random((rows, 5)) < share) & ((known > 0) | value.scores_root)[:, None]))
            parents = np.where(known[:, None] > 0, block.parents, -1)
            block = block.replace(parents=jnp.asarray(parents))
            scores, new = score(params, block, jnp.asarray(length), cache)
            for slot in range(5):
                place = length + parents[:, slot] + 1
                alone = tokens.at[np.arange(rows), place].set(block.candidates[:, slot])
                expected = np.asarray(sequence_scores(plain, value_config, separate, alone))[np.arange(rows), place]
                np.testing.assert_allclose(
                    np.where(block.wanted[:, slot, None], scores.candidates[:, slot], expected), expected,
                    atol=1e-5, rtol=0)
            expected = np.asarray(sequence_scores(plain, value_config, separate, tokens))
            for number in range(most if value.scores_root else 0):
                true = expected[np.arange(rows), length + number]
                found = np.where((number < known)[:, None], scores.roots[:, number], true)
                np.testing.assert_allclose(found, true, atol=1e-5, rtol=0)
        cache, length = new, length + known  # the last: every root was real
        if value.keep is not None:  # a candidate behind the last root goes in without another pass, in some rows
            which = np.argmax(parents == known[:, None] - 1, axis=1)
            there = (parents[np.arange(rows), which] == known - 1) & (np.arange(rows) != most)
            assert 0 < there.sum() < rows
            cache = quick_jit(value.keep)(cache, scores.read, *map(jnp.asarray, (which, length, there)))
            kept = np.where(there, block.candidates[np.arange(rows), which], tokens[np.arange(rows), length])
            tokens, length = tokens.at[np.arange(rows), length].set(kept), length + there
    assert (value.keep is None) == (scan or value_config.kind == 'q')


def test_a_block_without_real_tokens_runs_no_layer():
    value = networks.value(TINY, TRUNCATED)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), shaken(TRUNCATED))
    block = types.ValueBlock(*(jnp.zeros(shape, jnp.int32) for shape in ((4, 2), (4,), (4, 3), (4, 3))),
                             jnp.zeros((4, 3), bool))
    scores, cache = jax.jit(value.score)(params, block, jnp.ones(4, jnp.int32), value.init_cache(4, 8))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((scores, cache)))


@kinds
def test_candidates_may_come_in_chunks_of_any_order(value_config):
    params = shaken(value_config)
    value = networks.value(TINY, value_config)
    score = quick_jit(value.score)
    tokens, candidates, length = make_tokens((2, 4)), make_tokens((2, 6), seed=8), jnp.array([3, 2])
    cache = quick_jit(functools.partial(value.prefill, start=0))(params, tokens[:, :3], length, value.init_cache(2, 6))
    whole, _ = score(params, tabular.block_after(tokens[:, 3], candidates), length, cache)
    first, cache = score(params, tabular.block_after(tokens[:, 3], candidates[:, 3:]), length, cache)
    second, _ = score(params, tabular.block_after(tokens[:, 3], candidates[:, :3]), length, cache)
    parts = jnp.concatenate([second.candidates, first.candidates], axis=1)
    np.testing.assert_allclose(whole.candidates, parts, atol=1e-5, rtol=0)


def test_reference_step_equals_full_forward():
    params, reference = make_params(TINY), networks.reference(TINY)
    tokens, length, rows = make_tokens((3, 9)), jnp.array([1, 4, 3]), jnp.arange(3)
    mask, step = transformer.causal_mask(9), quick_jit(reference.step)
    expected = np.asarray(networks.reference_logits(TINY, params, tokens, positions_of(tokens), mask))
    prefill = quick_jit(functools.partial(reference.prefill, start=0))
    cache = prefill(params, tokens[:, :4], length, reference.init_cache(3, 9))
    for _ in range(4):
        logits, cache = step(params, tokens[rows, length], length, cache)
        assert logits.dtype == jnp.float32
        assert logits.shape == (3, reference.vocab_size)
        np.testing.assert_allclose(logits, expected[rows, length], atol=1e-5, rtol=1e-5)
        length = length + 1


@kinds
def test_fresh_value_is_constant(value_config):
    zero = dataclasses.replace(value_config, head_init='zero')
    assert np.all(sequence_scores(TINY, zero, start(zero), make_tokens((2, 6))) == 0)


@pytest.mark.parametrize('config', FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize('extra', [0, 2])
def test_truncated_trunk_is_the_first_layers_of_the_reference(config, extra):
    reference_params, tokens = make_params(config), make_tokens((2, 6))
    value_config = ValueConfig(num_scores=1, layers=1, extra_layers=extra)
    trunk = value_lib.trunk_config(value_config, config)
    assert trunk.layers == 1 + extra
    got = full_hidden(trunk, start(value_config, config, reference_params)['trunk'], tokens)
    short = {name: part for name, part in reference_params.items() if name != 'layers_1'}
    first = dataclasses.replace(config, layers=1, layer_windows=config.layer_windows[:1])
    expected = full_hidden(first, short, tokens)
    np.testing.assert_array_equal(got, expected)


def test_restarted_layers_read_the_norms_of_prediction_and_token():
    reference_params, tokens = make_params(TINY), make_tokens((2, 6))
    value_config = ValueConfig(num_scores=1, layers=1, extra_layers=1, extra_input='restart')
    trunk = start(value_config, TINY, reference_params)['trunk']
    trunk['restart_token_norm'] = {'scale': jnp.linspace(-1.0, 2.0, TINY.width)}
    block = trunk['layers_1']
    for part in (block['attention']['output'], block['mlp']['down']):
        assert np.any(part['kernel'] != 0)
        part['kernel'] = jnp.zeros_like(part['kernel'])  # so that what it reads is what comes out

    def norm(x, scale):
        return x / np.sqrt(np.mean(x ** 2, axis=-1, keepdims=True) + TINY.norm_eps) * scale

    short = {name: part for name, part in reference_params.items() if name != 'layers_1'}
    prediction = np.asarray(full_hidden(dataclasses.replace(TINY, layers=1), short, tokens))
    token = norm(np.asarray(reference_params['embedding'])[tokens], np.asarray(trunk['restart_token_norm']['scale']))
    expected = norm(prediction + token, np.asarray(reference_params['final_norm']['scale']))
    got = full_hidden(value_lib.trunk_config(value_config, TINY), trunk, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_extra_layers_learn():
    value_config = ValueConfig(num_scores=1, layers=1, extra_layers=1, head_init='normal')
    params, tokens = start(value_config), make_tokens((2, 6))

    def total(params):
        return jnp.sum(networks.value_scores(
            TINY, value_config, params, tokens, positions_of(tokens), transformer.causal_mask(6)[None], tokens))

    gradient = quick_jit(jax.grad(total))(params)['trunk']['layers_1']
    for part in (gradient['attention']['output'], gradient['mlp']['down']):
        assert np.abs(part['kernel']).max() > 0


@pytest.mark.parametrize('init, same', [('reference', True), ('pretrained', True), ('scratch', False)])
def test_whole_and_scratch_trunks(init, same):
    reference_params, tokens = make_params(TINY), make_tokens((2, 6))
    value_config = ValueConfig(num_scores=1, init=init, layers=None if same else 2)
    trunk = start(value_config, TINY, reference_params)['trunk']
    assert jax.tree.structure(trunk) == jax.tree.structure(reference_params)
    got = full_hidden(value_lib.trunk_config(value_config, TINY), trunk, tokens)
    assert np.array_equal(got, full_hidden(TINY, reference_params, tokens)) == same


def test_copies_share_no_memory_with_the_reference():
    config = dataclasses.replace(TINY, layers=1)
    reference_params, value_config = make_params(config), ValueConfig(num_scores=1, init='reference')
    trunk = value_lib.init_value_params(jax.random.key(0), value_config, reference_params, config)['trunk']
    for copied, original in zip(jax.tree.leaves(trunk), jax.tree.leaves(reference_params)):
        assert copied.unsafe_buffer_pointer() != original.unsafe_buffer_pointer()


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'qwen3'])
def test_language_model_head_scores_are_the_logits(name):
    config = FAMILIES[name]
    reference_params, tokens = make_params(config), make_tokens((2, 6))
    value_config = ValueConfig(num_scores=2, kind='q', init='reference', head_init='lm_head')
    scores = sequence_scores(config, value_config, start(value_config, config, reference_params), tokens)
    logits = networks.reference_logits(
        config, reference_params, tokens, positions_of(tokens), transformer.causal_mask(6))
    for place in range(1, 6):
        expected = np.take_along_axis(np.asarray(logits[:, place - 1]), np.asarray(tokens[:, place:place + 1]), axis=1)
        np.testing.assert_allclose(scores[:, place], np.repeat(expected, 2, axis=1), atol=1e-5, rtol=1e-5)


def test_key_decides_what_is_fresh_and_nothing_else():
    reference_params = make_params(TINY)
    value_config = ValueConfig(num_scores=2, layers=1, extra_layers=1, head_init='normal')
    draw = quick_jit(lambda key: value_lib.init_value_params(key, value_config, reference_params, TINY))
    first, again, other = (draw(jax.random.key(seed)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(np.testing.assert_array_equal, first['trunk']['layers_0'], other['trunk']['layers_0'])
    for fresh in (lambda params: params['trunk']['layers_1']['mlp']['up']['kernel'],
                  lambda params: params['head']['kernel']):
        assert np.all(fresh(first) != fresh(other))


@kinds
def test_logical_axes_name_every_dimension(value_config):
    axes = value_lib.logical_axes(value_config, TINY)

    def check(leaf, axis):
        assert len(axis) == leaf.ndim

    jax.tree.map(check, start(value_config), axes)
    assert axes['head']['kernel'][-1] == 'embed'
    assert ('vocab' in axes['head']['kernel']) == (value_config.kind == 'q')


@pytest.mark.parametrize('change, words', [
    ({'kind': 'x'}, 'allowed: v, q'),
    ({'init': 'copy'}, 'allowed: truncate, reference, pretrained, scratch'),
    ({'head_init': 'ones'}, 'allowed: zero, normal, lm_head'),
    ({'num_scores': 0}, 'num_scores is 0'),
    ({'extra_layers': -1}, 'extra_layers is -1'),
    ({'layers': None}, "init 'truncate' needs at least 1"),
    ({'init': 'scratch', 'layers': 0}, "init 'scratch' needs at least 1"),
    ({'init': 'reference'}, 'copies every layer'),
    ({'extra_input': 'both'}, 'allowed: stream, restart'),
    ({'extra_input': 'restart', 'extra_layers': 0}, 'nothing to read it'),
    ({'extra_input': 'restart', 'lookahead': 1}, 'needs every layer of a language model'),
    ({'init': 'reference', 'layers': None, 'lookahead': 1}, 'layers that read it'),
    ({'head_init': 'lm_head'}, "needs kind 'q'"),
])
def test_impossible_starts_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TRUNCATED, **change)


@pytest.mark.parametrize('change', [
    {}, {'init': 'pretrained', 'layers': None}, {'init': 'scratch', 'kind': 'q', 'head_init': 'lm_head'},
    {'kind': 'q', 'head_init': 'lm_head'}])
@pytest.mark.parametrize('config', [TINY, FAMILIES['qwen3']])
def test_only_what_is_copied_is_needed(config, change):
    value_config = dataclasses.replace(ValueConfig(num_scores=2, layers=1), **change)
    whole = make_params(config)
    needed = {name: part for name, part in whole.items() if value_lib.is_copied(value_config, config, (name,))}
    expected = start(value_config, config, whole)
    jax.tree.map(np.testing.assert_array_equal, start(value_config, config, needed), expected)
    for name in needed:
        with pytest.raises(KeyError, match=name):
            start(value_config, config, {key: part for key, part in needed.items() if key != name})


def test_capped_logits_have_no_linear_head():
    with pytest.raises(ValueError, match="'lm_head', but this model caps its logits at 5"):
        value_lib.trunk_config(
            ValueConfig(num_scores=1, init='reference', kind='q', head_init='lm_head'), FAMILIES['gemma3'])


def test_ids_that_pad_the_vocabulary_have_no_logit():
    params, reference = make_params(TINY), networks.reference(TINY, vocab_size=33)
    whole, token, length = networks.reference(TINY), jnp.array([3, 5]), jnp.array([0, 0])
    cut, _ = quick_jit(reference.step)(params, token, length, reference.init_cache(2, 4))
    full, _ = quick_jit(whole.step)(params, token, length, whole.init_cache(2, 4))
    assert reference.vocab_size == 33
    np.testing.assert_array_equal(cut, full[:, :33])
    with pytest.raises(ValueError, match='vocab_size is 41, but the model has 40'):
        networks.reference(TINY, vocab_size=41)


def test_more_layers_than_the_reference_has_are_refused():
    with pytest.raises(ValueError, match='layers is 3, but the reference has 2'):
        networks.value(TINY, ValueConfig(num_scores=1, layers=3))


def test_caches_are_written_in_place():
    """In the loop over steps XLA copies no cache, which would cost more than what attention reads of it."""
    reference, params = networks.reference(TINY), make_params(TINY)
    start = (jnp.int32(0), make_tokens((4,)), jnp.arange(4) + 2, reference.init_cache(4, 11))

    def write(params, state):
        def step(state):
            count, token, length, cache = state
            logits, cache = reference.step(params, token, length, cache)
            return count + 1, jnp.argmax(logits, axis=-1).astype(jnp.int32), length + 1, cache
        return jax.lax.while_loop(lambda state: state[0] < 5, step, state)

    program = jax.jit(write, donate_argnums=1).lower(params, start).compile().as_text()
    keys = start[3].keys[0].shape
    assert f'f32[{",".join(map(str, keys))}]' in program
    for shape in (keys, start[3].values[0].shape):
        assert not re.findall(rf'f32\[{",".join(map(str, shape))}\]\S* copy\(', program)


@kinds
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'qwen3'])
def test_parameters_to_decode_with_give_the_same_scores(name, value_config):
    config = dataclasses.replace(FAMILIES[name], dtype=jnp.bfloat16, tied_embeddings=True)
    params = shaken(value_config, config)
    fewer = value_lib.decoding_params(params, value_config, config)
    value = networks.value(config, value_config)
    tokens, lengths, candidates = make_tokens((3, 9)), jnp.array([9, 4, 1]), make_tokens((3, 4), seed=8)

    @quick_jit
    def scored(params):
        cache = value.prefill(params, tokens, lengths, value.init_cache(3, 16), 0)
        return value.score(params, tabular.block_after(tokens[:, 0], candidates), lengths, cache)

    jax.tree.map(np.testing.assert_array_equal, scored(params), scored(fewer))
    halves = {str(leaf.dtype) for leaf in jax.tree.leaves(fewer['trunk'])}
    assert halves == {'bfloat16', 'float32'} and fewer['head'] is params['head']
    kept = [path for path, leaf in jax.tree_util.tree_leaves_with_path(fewer['trunk']) if leaf.dtype == jnp.float32]
    assert all('norm' in jax.tree_util.keystr(path) for path in kept)
    same = value_lib.decoding_params(params, value_config, dataclasses.replace(config, dtype=jnp.float32))
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params)))
