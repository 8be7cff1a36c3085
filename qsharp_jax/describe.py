"""What a run is, in words and numbers: for the start of a run, and for a dry run."""
from __future__ import annotations

import math
from typing import Any

import jax

from qsharp_jax import config as config_lib
from qsharp_jax import sharding, units
from qsharp_jax.data import builders
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.data.tokenizers import UnknownTokenizer
from qsharp_jax.experiment import Experiment
from qsharp_jax.models import transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.types import Params

_COPIES = 3  # of the trained parameters' size: the optimizer's two moments, and the gradient


def run(parts: Experiment) -> str:
    """Returns a few lines on what is about to run.

    Args:
      parts: an outline.
    """
    prompts = parts.prompts('train')
    sizes = ', '.join(f'{axis}={size}' for axis, size in parts.mesh.shape.items())
    first = prompts.tokens[0]
    reference, fitted = _shapes(parts)
    layers = value_lib.trunk_config(parts.value_config, parts.value_shape).layers
    base = f', from {parts.config.value.source}' if parts.config.value.source else ''
    return '\n'.join([
        f'devices    {parts.mesh.size} ({jax.devices()[0].platform}), mesh {sizes}',
        f'reference  {parts.config.reference.source}: {_count(reference)} parameters',
        f'value      {parts.value_config.kind}-type, {parts.distribution.kind} head, {layers} layers: '
        f'{_count(fitted)} parameters{base}',
        f'prompts    {len(prompts)} to train on, the first of {len(first)} tokens: {prompts.texts[0]!r}, '
        f'ids {first[:16]}{"…" if len(first) > 16 else ""}',
        f'reward     {parts.reward.spec}',
        f'workdir    {parts.workdir}',
    ])


def plan(parts: Experiment) -> str:
    """Returns the whole config with parameter counts, shapes and memory. Nothing is loaded, made or written.

    Args:
      parts: an outline.
    """
    config, mesh, shape = parts.config, parts.mesh, parts.reference_config
    trunk = value_lib.trunk_config(parts.value_config, parts.value_shape)
    reference, fitted = _shapes(parts)
    made, prompts, width = training_prompts(parts)
    slots = width + parts.rollout().buffer
    rows = max(config.collect.batch_rows, config.eval.batch_rows)
    shards = sharding.batch_shards(mesh)
    parameters = {
        'reference': sharding.bytes_per_device(mesh, transformer.logical_axes(shape), reference),
        'value': sharding.bytes_per_device(mesh, parts.value_axes, fitted),
    }
    memory = {
        'reference parameters': parameters['reference'],
        'value parameters': parameters['value'],
        'optimizer moments, gradients': _COPIES * parameters['value'],
        f'reference cache, {rows} rows x {slots} slots': _cache_bytes(shape, rows, slots) / shards,
        f'value cache, {rows} rows x {slots} slots': _cache_bytes(trunk, rows, slots) / shards,
    }
    lines = [
        config_lib.to_json(config), '',
        f'devices              {mesh.size}, ' + ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items()),
        f'reference            {_count(reference)} parameters, {shape.layers} layers of width {shape.width}',
        f'value network        {_count(fitted)} parameters, {trunk.layers} layers, '
        f'{parts.distribution.num_scores} score(s) a token',
        f'training prompts     {prompts}, up to {width} tokens'
        + ('' if made else ' (as configured: the files of the task are not made yet)'),
        f'collected a pass     {config.collect.examples or prompts} prompts x {config.collect.samples} answers',
        f'decoded at once      {config.collect.batch_rows} rows (collect), {config.eval.batch_rows} rows (evaluate)',
        f'fitted a step        {config.fit.batch_size} prompts with up to {config.fit.samples_per_row} answers each',
        '', 'memory per device, activations not counted:',
        *(f'  {name:<44} {size / 2 ** 20:10.1f} MiB' for name, size in memory.items()),
        f'  {"together":<44} {sum(memory.values()) / 2 ** 20:10.1f} MiB',
    ]
    return '\n'.join(lines)


def training_prompts(parts: Experiment) -> tuple[bool, int, int]:
    """Returns whether the task's files are made, and how many training prompts there are of at most how many tokens.

    Files that are not there are not made: the config then says how many, as far as it knows (0 if it does not), and
    what their longest may be.
    """
    task = parts.config.task
    known = not isinstance(parts.tokenizer, UnknownTokenizer)
    config = prompts_lib.task_config(task)
    if known and builders.prepared(config, task.data_dir):
        train = parts.prompts('train')
        return True, len(train), units.prompt_width(train)
    return False, config.size('train') or 0, units.round_up(task.max_prompt_tokens, 8)


def _shapes(parts: Experiment) -> tuple[Params, Params]:
    """Returns the shapes of the reference's parameters and of the value network's."""
    return transformer.param_shapes(parts.reference_config), parts.value_target


def _cache_bytes(config: TransformerConfig, rows: int, slots: int) -> float:
    cache = jax.eval_shape(lambda: transformer.init_cache(config, rows, slots))
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)))


def _count(tree: Any) -> str:
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    return f'{total:,}' if total < 1e6 else f'{total / 1e6:.1f} M' if total < 1e9 else f'{total / 1e9:.2f} B'
