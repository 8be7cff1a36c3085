"""No program holds the scores of every token for every entry of the vocabulary at once."""
from __future__ import annotations

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import categorical, decoding, fit, guidance, learner
from qsharp_jax.data.packing import FitBatch
from qsharp_jax.models import networks, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.optimizers import OptimizerConfig
from qsharp_jax.types import Policy

BATCH, LENGTH = 8, 24
VOCAB = 2048  # whole blocks of those that `guidance.sample` draws first: it fills up others, by less than one block
SHAPE = TransformerConfig(
    vocab_size=VOCAB, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=16, max_positions=64)


def arrays(jaxpr):
    """The shape of everything that a program computes, in its loops, branches and functions as well."""
    for equation in jaxpr.eqns:
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(part):
                yield from arrays(getattr(part, 'jaxpr', part))
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, 'shape'))


def is_program(node):
    return hasattr(node, 'eqns')


def largest(function, *arguments):
    """The number of entries of the largest array that a program computes."""
    return max(int(np.prod(shape)) for shape in arrays(jax.make_jaxpr(function)(*arguments).jaxpr))


def abstract(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def value_params(config, shape=SHAPE):
    def make(key):
        return value_lib.init_value_params(key, config, transformer.init_params(key, shape), shape)

    return jax.eval_shape(make, jax.random.key(0))


def batch():
    whole, real = abstract((BATCH, LENGTH), jnp.int32), abstract((BATCH, LENGTH))
    return FitBatch(tokens=whole, ends=whole, positions=whole, parents=whole, examples=whole, answer_positions=whole,
                    rewards=real, weights=real)


@pytest.mark.parametrize('kind', ['v', 'q'])
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('changes', [{}, {'remat': True}, {'scan_layers': True}])
def test_a_fit_holds_no_scores_of_all_tokens_for_the_whole_vocabulary(kind, accumulate, changes):
    shape = dataclasses.replace(SHAPE, **changes)
    distribution = categorical.make('categorical', 0.0, 1.0, num_atoms=3)
    value_config = ValueConfig(num_scores=3, kind=kind, layers=2)
    scores = fit.scores_fn(types.SimpleNamespace(value_shape=shape, value_config=value_config))
    optimizer = OptimizerConfig(learning_rate=1e-3)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
                          value_params(value_config, shape))
    state = learner.abstract_state(params, optimizer)
    update = learner.make_update(scores, distribution, optimizer, state, accumulate)
    assert largest(update, state, batch()) < BATCH // accumulate * LENGTH * VOCAB
    predict = learner.make_predict(scores, distribution, (0.1,))
    assert largest(predict, params, batch()) < BATCH * LENGTH * VOCAB


def policy():
    rows = abstract((BATCH,))
    return Policy(eta=rows, temperature=rows, top_k=abstract((BATCH,), jnp.int32), top_p=rows,
                  reference_temperature=rows)


@pytest.mark.parametrize('order', ['paper', 'after_sampler'])
@pytest.mark.parametrize('kind', ['v', 'q', None])
@pytest.mark.usefixtures('passes_of_every_size')
def test_decoding_holds_scores_of_one_token_alone(order, kind):
    reference, params = networks.reference(SHAPE), transformer.param_shapes(SHAPE)
    how, values = decoding.Guidance(order=order), None
    if kind:
        config = ValueConfig(num_scores=1, kind=kind, layers=2)
        how = decoding.Guidance(value=networks.value(SHAPE, config), distribution=categorical.make('bernoulli', 0, 1),
                                candidates=5, order=order)
        values = value_params(config)
    start = functools.partial(decoding.start, reference, how.value, buffer=LENGTH)
    whole = abstract((BATCH,), jnp.int32)
    arguments = (params, values, abstract((BATCH, LENGTH), jnp.int32), whole, whole,
                 jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH)), whole)
    assert largest(start, *arguments) < BATCH * VOCAB  # prefill needs no scores at all
    state = jax.eval_shape(start, *arguments)
    decode = functools.partial(decoding.decode, reference, how, eos_ids=(1,))
    assert largest(decode, params, values, policy(), state) == BATCH * VOCAB


def test_a_divergence_holds_nothing_beyond_the_laws_it_is_given():
    laws = abstract((BATCH, VOCAB))
    assert largest(guidance.kl_divergence, laws, laws) == BATCH * VOCAB


@pytest.mark.parametrize('changes', [{}, {'remat': True}, {'scan_layers': True}])
def test_such_scores_are_found_wherever_they_are(changes):
    shape = dataclasses.replace(SHAPE, **changes)
    whole = abstract((BATCH, LENGTH), jnp.int32)

    def loss(params, tokens):
        mask = transformer.causal_mask(LENGTH)
        return jax.nn.logsumexp(networks.reference_logits(shape, params, tokens, tokens, mask), axis=-1).sum()

    def looped(params, tokens):
        return jax.lax.while_loop(lambda total: total < 0, lambda total: jax.jit(jax.checkpoint(loss))(params, tokens),
                                  0.0)

    params = transformer.param_shapes(shape)
    for function in (loss, jax.grad(loss), looped):
        assert largest(function, params, whole) >= BATCH * LENGTH * VOCAB


@pytest.mark.parametrize('order', guidance.ORDERS)
def test_no_step_sorts_the_vocabulary(order):
    """XLA makes a full sort of the k best, sixty times dearer, where it sees that a part of them is asked for."""
    config = ValueConfig(num_scores=1, layers=1)
    how = decoding.Guidance(value=networks.value(SHAPE, config), distribution=categorical.make('bernoulli', 0, 1),
                            candidates=20, order=order)
    whole = abstract((BATCH,), jnp.int32)
    params, values = transformer.param_shapes(SHAPE), value_params(config)
    state = jax.eval_shape(
        functools.partial(decoding.start, networks.reference(SHAPE), how.value, buffer=LENGTH), params, values,
        abstract((BATCH, LENGTH), jnp.int32), whole, whole,
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH)), whole)
    program = decoding.decode.lower(networks.reference(SHAPE), how, params, values, policy(), state, (1,)).compile()
    sorted_lengths = [int(length) for shape in re.findall(r'= \(?(\w+\[[\d,]*\])\S* .*\bsort\(', program.as_text())
                      for length in re.findall(r'(\d+)\]', shape)]
    assert sorted_lengths and max(sorted_lengths) < VOCAB
