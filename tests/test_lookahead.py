"""A trunk that looks ahead, against tokens of ids of their own for what it expects."""
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax.models import transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.value import ValueConfig
from tests.test_transformer import FAMILIES, full_hidden, make_params, make_tokens, positions_of, TINY
from tests.test_value import KINDS, start


@pytest.mark.parametrize('config', [
    TINY, FAMILIES['gpt2'], dataclasses.replace(FAMILIES['qwen3'], tied_embeddings=True),
    # A token looks ahead with what it sees itself, which in a window is one more than those behind it see.
    dataclasses.replace(FAMILIES['gemma3'], layer_windows=(), local_rope_base=0.0)],
    ids=['tiny', 'gpt2', 'qwen3', 'gemma3'])
def test_a_look_ahead_is_the_last_state_after_expected_tokens(config):
    """Each expected embedding as the token of an id of its own, behind the place that expects it."""
    reference_params, tokens = make_params(config), make_tokens((1, 5))
    small = reference_params['embedding']

    def surest(sharpness):
        reference_params['embedding'] = sharpness * small
        hidden = full_hidden(config, reference_params, tokens)
        return np.mean(np.max(jax.nn.softmax(transformer.logits(config, reference_params, hidden)), axis=-1))

    # So far apart that the expectation is neither one token nor the mean of all.
    assert any(0.3 < surest(sharpness) < 0.8 for sharpness in 1.5 ** np.arange(-8, 16))
    value_config = ValueConfig(num_scores=1, init='reference', extra_layers=1, extra_input='restart', lookahead=2)
    shape = value_lib.trunk_config(value_config, config)
    trunk = start(value_config, config, reference_params)['trunk']
    block = trunk[f'layers_{config.layers}']
    for part in (block['attention']['output'], block['mlp']['down']):
        part['kernel'] = jnp.zeros_like(part['kernel'])
    for name in ('final_norm', 'restart_token_norm'):
        trunk[name] = {key: jnp.full_like(leaf, (key == 'scale') - config.norm_offset)
                       for key, leaf in trunk[name].items()}
    got = np.asarray(full_hidden(shape, trunk, tokens))

    places, mask = 5, np.tril(np.ones((5, 5), bool))
    states = [np.asarray(full_hidden(config, reference_params, tokens))]
    for ahead in (1, 2):
        logits = transformer.logits(config, reference_params, jnp.asarray(states[-1]))
        expected = np.asarray(jax.nn.softmax(logits, axis=-1))[0] @ np.asarray(reference_params['embedding'])
        longer = {**reference_params, 'embedding': jnp.concatenate([reference_params['embedding'], expected])}
        both = jnp.concatenate([tokens, config.vocab_size + jnp.arange(places)[None]], axis=1)
        positions = jnp.concatenate([jnp.arange(places), jnp.arange(places) + ahead])[None]
        seen = np.block([[mask, np.zeros_like(mask)], [mask, np.zeros_like(mask)]])
        wide = dataclasses.replace(config, vocab_size=config.vocab_size + places)
        states.append(np.asarray(transformer.hidden_states(
            wide, longer, both, positions, jnp.asarray(seen)))[:, places:])
    token = np.asarray(reference_params['embedding'])[tokens] * config.embedding_scale

    def unit(x):
        if config.norm == 'layernorm':
            x = x - np.mean(x, axis=-1, keepdims=True)
        return x / np.sqrt(np.mean(x ** 2, axis=-1, keepdims=True) + config.norm_eps)

    if config.positions == 'learned':
        token = token + np.asarray(reference_params['position_embedding'])[:places]
    np.testing.assert_allclose(got, unit(sum(states) + unit(token)), atol=2e-5, rtol=2e-5)


def test_a_look_ahead_is_read_without_gradients_of_what_is_expected():
    value_config = dataclasses.replace(KINDS['v_lookahead'], head_init='normal')
    params, tokens = start(value_config), make_tokens((2, 6))

    def total(params):
        shape = value_lib.trunk_config(value_config, TINY)
        return jnp.sum(transformer.hidden_states(
            shape, params['trunk'], tokens, positions_of(tokens), transformer.causal_mask(6)) ** 3)

    grads = jax.grad(total)(params)['trunk']
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads['expectation_norm']))
    assert np.any(grads['restart_norm']['scale'] != 0)
