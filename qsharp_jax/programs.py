"""The programs that a run spends its time in, compiled from shapes alone for the devices of its mesh.

They are the run's own functions with the run's own shardings; only the arrays are missing.
"""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from qsharp_jax import decoding, fit, hlo, learner, policy_fit, queue, rollout, sharding
from qsharp_jax.baselines import policies
from qsharp_jax.data.packing import FitBatch
from qsharp_jax.experiment import Experiment
from qsharp_jax.models import transformer
from qsharp_jax.types import Params, Policy

_UNITS = {'': 1, 'K': 2 ** 10, 'M': 2 ** 20, 'G': 2 ** 30, 'T': 2 ** 40}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of what a run works on at once.

    Attributes:
      rows: answers decoded together, B.
      prompts: that are prefilled together.
      width: tokens of the longest prompt, P.
      buffer: tokens of the longest answer, T.
      fit_rows: rows of a gradient step, over all its parts.
      fit_length: tokens of such a row.
      accumulate: parts of a gradient step.
    """

    rows: int
    prompts: int
    width: int
    buffer: int
    fit_rows: int
    fit_length: int
    accumulate: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a program takes on each device, in bytes.

    Attributes:
      arguments: what it is given; on the device before and after, unless it is aliased.
      outputs: what it returns.
      aliased: the part of the outputs that is written where an argument was.
      temporaries: what it needs besides while it runs, counted without the room of arguments that are done with.
      code: its instructions.
      peak: the most that is taken at once, by the compiler's own account.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      memory: what it takes.
      seconds: that lowering and compiling took.
      executable: what XLA made.
    """

    memory: Memory
    seconds: float
    executable: jax.stages.Compiled

    @property
    def program(self) -> hlo.Program:
        """Its instructions."""
        return hlo.Program(self.executable.as_text() or '')


class TooLarge(Exception):
    """A program does not fit the memory of a device.

    Attributes:
      needed: what it would take, in bytes; infinite if the compiler does not say.
      available: what there is for programs, in bytes; NaN if the compiler does not say.
    """

    def __init__(self, text: str) -> None:
        """`text` is what the compiler said."""
        super().__init__(text)
        found = re.search(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm', text)
        self.needed = float(found[1]) * _UNITS[found[2]] if found else math.inf
        self.available = float(found[3]) * _UNITS[found[4]] if found else math.nan


def compile_(lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    """Returns a program compiled.

    Args:
      lower: traces it, as `jax.jit(f).lower` does.

    Raises:
      TooLarge: it does not fit.
    """
    began = time.perf_counter()
    try:
        executable = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise TooLarge(str(error)) from error
    found: Any = executable.memory_analysis()
    memory = Memory(
        arguments=found.argument_size_in_bytes, outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes, temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes, peak=found.peak_memory_in_bytes)
    return Compiled(memory, time.perf_counter() - began, executable)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The programs of a queue of collected answers.

    Attributes:
      prefill: `decoding.prefill`, of the prompts from which rows are filled.
      refill: `decoding.refill`, which puts one into some rows' caches.
      advance: `decoding.advance`, the loop over steps.
      caches: bytes of the rows' caches on one device.
    """

    prefill: Compiled
    refill: Compiled
    advance: Compiled
    caches: int


def decoding_programs(parts: Experiment, sizes: Sizes, guided: bool = True) -> Decoding:
    """Returns the programs that answers are collected with, compiled.

    Raises:
      TooLarge: one of them does not fit.
    """
    split, whole = sharding.batch_sharding(parts.mesh), sharding.replicated(parts.mesh)
    task = rollout.RollingOut(parts.rollout())
    how = parts.guidance(parts.config.guidance.offset) if guided else decoding.Guidance()
    networks = parts.reference, how.value, reference_params(parts), parts.decoding_target if guided else None
    vacant = compile_(lambda: decoding.vacant.lower(
        *networks, task, sizes.width + sizes.buffer, _array((sizes.rows,), jnp.int32, split)))
    pool = _results(vacant)
    prefill = compile_(lambda: decoding.prefill.lower(
        *networks, None, _array((sizes.prompts, sizes.width), jnp.int32, split),
        _array((sizes.prompts,), jnp.int32, split), 0))
    keys = jax.eval_shape(lambda: jax.random.key_data(decoding.stage_keys(0, 0)))
    numbers, some = (_array((queue.turnover(sizes.rows),), kind, whole) for kind in (jnp.int32, jnp.float32))
    orders = decoding.Orders(
        rows=numbers, sources=numbers, examples=numbers, samples=numbers,
        policy=Policy(eta=some, temperature=some, top_k=numbers, top_p=some, reference_temperature=some))
    refill = compile_(lambda: decoding.refill.lower(
        pool, _results(prefill), _array(keys.shape, keys.dtype, whole), orders, task))
    advance = compile_(lambda: decoding.advance.lower(
        parts.reference, how, *networks[2:], pool, parts.eos_ids, task, _array((), jnp.int32, whole)))
    caches = bytes_per_device((pool.state.reference_cache, pool.state.value_cache))
    return Decoding(prefill, refill, advance, caches)


def _results(compiled: Compiled) -> Any:
    """Returns the results of a program as jax.ShapeDtypeStructs with shardings."""
    return sharding.abstract(compiled.executable.out_info, compiled.executable.output_shardings)


def bytes_per_device(tree: object) -> int:
    """Returns the memory of jax.ShapeDtypeStructs with shardings on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def update(parts: Experiment, sizes: Sizes) -> jax.stages.Lowered:
    """Returns one gradient step of the fit."""
    optimizer = fit.optimizer_config(parts.config.fit, parts.config.fit.learning_rate,
                                     parts.config.fit.warmup_steps + 1)
    state = learner.abstract_state(parts.value_target, optimizer)

    def array(dtype: Any) -> Any:
        return _array((sizes.fit_rows, sizes.fit_length), dtype, sharding.batch_sharding(parts.mesh))

    whole, real = array(jnp.int32), array(jnp.float32)
    batch = FitBatch(tokens=whole, ends=whole, positions=whole, parents=whole, examples=whole, answer_positions=whole,
                     rewards=real, weights=real)
    step = learner.make_update(fit.scores_fn(parts), parts.distribution, optimizer, state, sizes.accumulate)
    return step.lower(state, batch)


def policy_update(parts: Experiment, method: str, sizes: Sizes) -> jax.stages.Lowered:
    """Returns one gradient step of a policy that is trained itself.

    Args:
      parts: an outline.
      method: of `baselines.policies.METHODS`.
      sizes: of the prompts and answers.
    """
    baselines, split = parts.config.baselines, sharding.batch_sharding(parts.mesh)
    start = jax.tree.map(lambda leaf: _array(leaf.shape, jnp.float32, leaf.sharding), reference_params(parts))
    optimizer = policy_fit.optimizer_config(baselines, baselines[policies.METHODS[method].section].learning_rates[0], 2)
    state = learner.abstract_state(start, optimizer)
    texts = baselines.batch_size, 2 if policies.METHODS[method].pairs else 1, sizes.width + sizes.buffer
    batch = policies.Batch(
        tokens=_array(texts, jnp.int32, split), weights=_array(texts, jnp.float32, split),
        advantages=_array(texts[:1], jnp.float32, split),
        drawn=_array((*texts[:2], texts[2] - 1), jnp.float32, split))
    asked = reference_params(parts) if policies.METHODS[method].reference else None
    return policy_fit.make_update(parts, method, optimizer, state).lower(state, asked, batch)


def reference_params(parts: Experiment) -> Params:
    """The reference's parameters as jax.ShapeDtypeStructs with shardings."""
    shape = parts.reference_config
    return sharding.abstract(transformer.param_shapes(shape), transformer.param_shardings(shape, parts.mesh))


def _array(shape: tuple[int, ...], dtype: Any, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
