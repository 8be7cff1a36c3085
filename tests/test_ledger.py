"""What answers cost, against XLA's own count, brute force over every token, and the decoder."""
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import categorical, decoding, ledger
from qsharp_jax.models import networks, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.types import Policy
from tests import tabular

# Wide enough that products outweigh norms and rotations, which are not counted.
WIDE = TransformerConfig(vocab_size=2000, width=256, layers=2, heads=8, kv_heads=2, head_dim=48, mlp_width=640,
                         max_positions=2048)
SHAPES = {
    'grouped': WIDE,
    'plain': dataclasses.replace(WIDE, kv_heads=8, gated=False, activation='gelu_tanh'),
    'untied': dataclasses.replace(WIDE, tied_embeddings=False, layers=3),
}


def xla_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()['flops']


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('slots', (32, 1024))
def test_a_reference_step_counts_as_xla_does(shape, slots):
    config, batch = SHAPES[shape], 4
    reference = networks.reference(config)
    cache = jax.eval_shape(lambda: reference.init_cache(batch, slots))
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    expected = xla_flops(reference.step, transformer.param_shapes(config), row, row, cache)
    # The step works on every slot, whatever is in it, and on the token itself.
    assert ledger.reference_cost(config).flops(batch, slots + 1, batch) == pytest.approx(expected, rel=0.03)


AHEAD = ValueConfig(num_scores=11, init='reference', extra_layers=1, extra_input='restart', lookahead=2)
V_TYPE = ValueConfig(num_scores=11, layers=1, extra_layers=1)


@pytest.mark.parametrize(
    'value_config', (V_TYPE, dataclasses.replace(V_TYPE, kind='q'), AHEAD), ids=('v', 'q', 'ahead'))
def test_a_value_step_counts_as_xla_does(value_config):
    batch, slots, candidates = 4, 256, 6
    value = networks.value(WIDE, value_config)
    params = jax.eval_shape(lambda: value_lib.init_value_params(
        jax.random.key(0), value_config, transformer.init_params(jax.random.key(0), WIDE), WIDE))
    cache = jax.eval_shape(lambda: value.init_cache(batch, slots))
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    block = jax.eval_shape(tabular.block_after, row, jax.ShapeDtypeStruct((batch, candidates), jnp.int32))
    expected = xla_flops(value.score, params, block, row, cache)  # of the largest pass that it chooses from
    tokens = 1 + candidates if value_config.kind == 'v' else 1
    cost = ledger.value_cost(WIDE, value_config, candidates)
    assert cost.flops(batch * tokens, slots + tokens, batch * tokens) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize('tied', (True, False))
def test_weights_are_the_parameters_that_a_pass_reads(tied):
    config = dataclasses.replace(WIDE, tied_embeddings=tied, param_dtype=jnp.bfloat16)
    params = transformer.init_params(jax.random.key(0), config)
    table = params['embedding'].nbytes
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert ledger.reference_cost(config).weights == everything - (0 if tied else table)
    cache = transformer.init_cache(config, 1, 10)
    assert ledger.reference_cost(config).cached == sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) / 10
    # A trunk never reads its table whole.
    trunk = ledger.value_cost(config, ValueConfig(num_scores=1, layers=2), 5).weights
    assert trunk == everything - table - (0 if tied else params['head'].nbytes)
    if tied:  # a look ahead reads it, and the layers once more
        both = [ledger.value_cost(config, dataclasses.replace(AHEAD, lookahead=number), 5).weights for number in (1, 2)]
        layers = sum(leaf.nbytes for name in ('layers_0', 'layers_1') for leaf in jax.tree.leaves(params[name]))
        assert both[1] - both[0] == layers + table


def test_layers_with_a_window_see_no_more_than_it():
    cost = ledger.reference_cost(dataclasses.replace(WIDE, layer_windows=(0, 16)))
    assert cost.flops(1, 100, 0) - cost.flops(1, 16, 0) == pytest.approx(cost.pair * 84)


def test_the_work_of_a_batch_token_by_token():
    # Two prompts, of five and three tokens, the first two alike; three answers, one of them to the second.
    rows, prompts, made = np.array([0, 0, 1]), np.array([5, 5, 3]), np.array([4, 1, 2])
    candidates = 3
    value_config = ValueConfig(num_scores=1, layers=1)
    reference, value = ledger.reference_cost(WIDE), ledger.value_cost(WIDE, value_config, candidates)
    shares = ledger.prefilled_shares(prompts, rows, shared=2)
    # All but the last token of each prompt: 2 shared, 2 of the first, none of the second.
    np.testing.assert_allclose(shares, [2 / 3 + 1, 2 / 3 + 1, 2 / 3])
    work = ledger.of_answers(reference, value, prompts=prompts, prefilled=shares, made=made,
                             reference_made=made, value_made=made * (1 + candidates), reference_passes=5,
                             value_passes=5)
    for row in range(3):
        one = shares[row] / (prompts[row] - 1)  # of the tokens of its prompt
        flops = sum(one * network.flops(1, seen, 0) for network in (reference, value)
                    for seen in range(1, prompts[row]))
        for answered in range(made[row]):
            seen = prompts[row] + answered
            flops += reference.flops(1, seen, 1) + (1 + candidates) * value.flops(1, seen, 1)
        assert work.flops[row] == pytest.approx(flops)
        assert work.reference_tokens[row] == pytest.approx(shares[row] + made[row])
        assert work.value_tokens[row] == pytest.approx(shares[row] + made[row] * 4)
    weights = 5 * (reference.weights + value.weights)  # the prefill and four tokens
    slots = sum(prompt + answered + 1 for prompt, count in zip(prompts, made) for answered in range(count))
    assert work.bytes.sum() == pytest.approx(weights + (reference.cached + value.cached) * (shares.sum() + slots))
    alone = ledger.of_answers(reference, None, prompts=prompts, prefilled=shares, made=made, reference_made=made,
                              value_made=made, reference_passes=5, value_passes=5)
    assert not alone.value_tokens.any() and np.all(alone.flops < work.flops) and np.all(alone.bytes < work.bytes)


@pytest.mark.parametrize('kind', ('v', 'q'))
@pytest.mark.parametrize('guided', (True, False))
def test_the_decoder_counts_what_it_gives_the_value_network(guided, kind):
    config = TransformerConfig(vocab_size=13, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_width=8,
                               max_positions=32)
    value_config = ValueConfig(num_scores=1, kind=kind, layers=1, head_init='normal')
    params = transformer.init_params(jax.random.key(0), config)
    values = value_lib.init_value_params(jax.random.key(1), value_config, params, config)
    how = decoding.Guidance(networks.value(config, value_config), categorical.make('bernoulli', 0, 1, 2, 'nearest', 1.),
                            candidates=13) if guided else decoding.Guidance()
    reference, limit = networks.reference(config), jnp.array([3, 0, 7])
    rows = jnp.zeros(3, jnp.int32)
    state = decoding.start(
        reference, how.value, params, values, jnp.array([[1, 2, 3]]), jnp.array([3]), rows,
        decoding.unit_keys(0, 0, 'evaluate', rows, jnp.arange(3)), limit, 7)
    policy = Policy(*(jnp.full(3, number) for number in (0.1, 1.0)), jnp.zeros(3, jnp.int32), jnp.ones(3), jnp.ones(3))
    again = how if how.value is None else dataclasses.replace(how, value=dataclasses.replace(how.value, keep=None))
    again = decoding.decode(reference, again, params, values, policy, jax.tree.map(jnp.copy, state), ())
    state = decoding.decode(reference, how, params, values, policy, state, ())
    np.testing.assert_array_equal(again.value_tokens, limit * (0 if not guided else 14 if kind == 'v' else 1))
    # All tokens are candidates here: each chosen one has been read, but for the last of the prompt.
    read = 13 * limit + (limit > 0) if guided and kind == 'v' else again.value_tokens
    np.testing.assert_array_equal(state.value_tokens, read)
    np.testing.assert_array_equal(state.tokens, again.tokens)
    np.testing.assert_allclose(state.values, again.values, atol=1e-6)
