"""What a run is, in words and numbers: for the start of a run, and for a dry run."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from qsharp_jax import categorical, sharding, units
from qsharp_jax import config as config_lib
from qsharp_jax.baselines import pretraining
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.data import tokenizers
from qsharp_jax.experiment import Experiment, value_config_of
from qsharp_jax.models import pretrained, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.transformer import TransformerConfig

_MOMENTS = 2  # that the optimizer keeps of each trained parameter


def run(parts: Experiment) -> str:
    """Returns a few lines on what is about to run."""
    prompts = parts.prompts('train')
    sizes = ', '.join(f'{axis}={size}' for axis, size in parts.mesh.shape.items())
    first = prompts.tokens[0]
    return '\n'.join([
        f'devices    {parts.mesh.size} ({jax.devices()[0].platform}), mesh {sizes}',
        f'reference  {parts.config.reference.source}: {_count(parts.reference_params)} parameters',
        f'value      {parts.value_config.kind}-type, {parts.distribution.kind} head, '
        f'{value_lib.trunk_config(parts.value_config, parts.reference_config).layers} layers',
        f'prompts    {len(prompts)} to train on, the first of {len(first)} tokens: {prompts.texts[0]!r}, '
        f'ids {first[:16]}{"…" if len(first) > 16 else ""}',
        f'reward     {parts.reward.spec}',
        f'workdir    {parts.workdir}',
    ])


def plan(config: ml_collections.ConfigDict) -> str:
    """Returns the whole config with parameter counts, shapes and memory, without loading or writing anything.

    Raises:
      ValueError: as a run would, for what can be known before it starts.
    """
    mesh = sharding.make_mesh(**config.mesh)
    shape, tokenizer = _shape(config)
    value = config.value
    distribution = categorical.make(value.head, value.v_min, value.v_max, value.num_atoms, value.projection,
                                    value.sigma)
    value_config = value_config_of(config, distribution)
    trunk = value_lib.trunk_config(value_config, shape)
    key = jax.eval_shape(lambda: jax.random.key(0))
    reference = jax.eval_shape(lambda key: transformer.init_params(key, shape), key)
    fitted = jax.eval_shape(
        lambda key, params: value_lib.init_value_params(key, value_config, params, shape), key, reference)
    for name, rows in (('collect.batch_rows', config.collect.batch_rows), ('eval.batch_rows', config.eval.batch_rows),
                       ('fit.batch_size', config.fit.batch_size)):
        sharding.check_divisible(rows, mesh, name)
    train = prompts_lib.load(config.task, 'train', tokenizer)
    width = units.prompt_width(train)
    slots = width + config.sampling.max_new_tokens * (2 if config.collect.budget == 'fresh' else 1)
    rows = max(config.collect.batch_rows, config.eval.batch_rows)
    shards = sharding.batch_shards(mesh)
    parameters = {
        'reference': sharding.bytes_per_device(mesh, transformer.logical_axes(shape), reference),
        'value': sharding.bytes_per_device(mesh, value_lib.logical_axes(value_config, shape), fitted),
    }
    memory = {
        'reference parameters': parameters['reference'],
        'value parameters': parameters['value'],
        'optimizer moments': _MOMENTS * parameters['value'],
        f'reference cache, {rows} rows x {slots} slots': _cache_bytes(shape, rows, slots) / shards,
        f'value cache, {rows} rows x {slots} slots': _cache_bytes(trunk, rows, slots) / shards,
    }
    examples = config.collect.examples or len(train)
    lines = [
        config_lib.to_json(config), '',
        f'devices              {mesh.size}, ' + ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items()),
        f'reference            {_count(reference)} parameters, {shape.layers} layers of width {shape.width}',
        f'value network        {_count(fitted)} parameters, {trunk.layers} layers, '
        f'{distribution.num_scores} score(s) a token',
        f'training prompts     {len(train)}, up to {width} tokens',
        f'collected a pass     {examples} prompts x {config.collect.samples} answers',
        f'decoded at once      {config.collect.batch_rows} rows (collect), {config.eval.batch_rows} rows (evaluate)',
        f'fitted a step        {config.fit.batch_size} rows of up to {config.fit.samples_per_row} answers',
        '', 'memory per device, activations not counted:',
        *(f'  {name:<44} {size / 2 ** 20:10.1f} MiB' for name, size in memory.items()),
        f'  {"together":<44} {sum(memory.values()) / 2 ** 20:10.1f} MiB',
    ]
    return '\n'.join(lines)


def _shape(config: ml_collections.ConfigDict) -> tuple[TransformerConfig, tokenizers.Tokenizer]:
    """Returns the reference's shape and tokenizer; a file's head is read, its weights are not."""
    if config.reference.source == 'pretrain':
        tokenizer = pretraining.tokenizer_of(config)
        return pretraining.model_shape(config.reference, tokenizer.vocab_size, config.task.max_prompt_tokens), tokenizer
    file = pretrained.open_gguf(config.reference.source)
    shape = dataclasses.replace(file.config, dtype=jnp.dtype(config.reference.dtype))
    return shape, tokenizers.from_gguf(file.metadata)


def _cache_bytes(config: TransformerConfig, rows: int, slots: int) -> float:
    cache = jax.eval_shape(lambda: transformer.init_cache(config, rows, slots))
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)))


def _count(tree: Any) -> str:
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    return f'{total / 1e6:.1f} M' if total < 1e9 else f'{total / 1e9:.2f} B'
