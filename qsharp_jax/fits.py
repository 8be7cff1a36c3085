"""Does a run fit TPUs that are not there, and how fast could it be: its programs compiled for them, in numbers."""
from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from qsharp_jax import describe, programs, sharding, units
from qsharp_jax.experiment import Experiment
from qsharp_jax.models import value as value_lib
from qsharp_jax.programs import Compiled, Sizes, TooLarge
from qsharp_jax.topology import Topology

_GIBI = 2 ** 30
_NAME = 44  # characters of what a line is about
_COLUMNS = ('arguments', 'of it caches', 'temporaries', 'new outputs', 'outputs in place', 'at most', 'compiled in')
_ATTEMPTS = 4  # programs compiled in search of the largest batch
_RESERVED = 2 ** 28  # bytes that the compiler keeps of each device's memory; one that does not fit says it exactly


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a program does on one device.

    Attributes:
      flops: arithmetic operations.
      bytes: read and written by each of its instructions, as XLA counts them: several times what passes between the
        device and its memory, for copies to and from the memory on the chip are counted like others.
    """

    flops: float
    bytes: float

    def plus(self, other: Cost, times: float) -> Cost:
        """Returns this cost and another one, so many times."""
        return Cost(self.flops + times * other.flops, self.bytes + times * other.bytes)


def least_seconds(flops: float, moved: float, topology: Topology) -> tuple[float, str]:
    """Returns the least time that a device can take, and whether arithmetic or memory is the reason.

    Args:
      flops: arithmetic operations.
      moved: bytes that must pass between the device and its memory.
      topology: what the device is.
    """
    arithmetic, memory = flops / topology.flops, moved / topology.bandwidth
    return (arithmetic, 'arithmetic') if arithmetic > memory else (memory, 'memory')


def report(parts: Experiment, topology: Topology) -> Iterator[str]:
    """Yields lines: memory, work and least time of prefill, decode step and fit step, and the largest batch that fits.

    Each comes as soon as it is known; all of them take minutes.

    Args:
      parts: an outline whose mesh is of the topology's devices.
      topology: what they are.
    """
    sizes = sizes_of(parts)
    reference, value = parts.reference_config, value_lib.trunk_config(parts.value_config, parts.value_shape)
    memory = topology.generation.memory / topology.generation.cores
    held, trained = _bytes(programs.reference_params(parts)), _bytes(parts.value_target)
    yield (f'topology    {topology.name}: {parts.mesh.size} devices, each with {memory / _GIBI:g} GiB, '
           f'{topology.flops / 1e12:g} TFLOP/s (bfloat16) and {topology.bandwidth / 1e9:g} GB/s')
    yield 'mesh        ' + ', '.join(f'{axis}={size}' for axis, size in parts.mesh.shape.items())
    yield (f'layers      reference {reference.layers}, {_how(reference.scan_layers)}; value {value.layers}, '
           f'{_how(value.scan_layers)}')
    yield (f'parameters  reference {held / _GIBI:.2f} GiB a device ({jnp.dtype(reference.param_dtype).name}), value '
           f'{trained / _GIBI:.2f} GiB ({jnp.dtype(value.param_dtype).name})')
    yield f'\n{"memory of a device, GiB":<{_NAME}} ' + '  '.join(_COLUMNS)
    first = decoding_programs(parts, sizes)
    name = f'decode, {sizes.rows} rows x {sizes.width + sizes.buffer} slots'
    moved = dict.fromkeys(('prefill', 'decode step', 'fit step'), math.nan)  # every argument and what is new once
    if isinstance(first, TooLarge):
        yield _refused(name, first)
    else:
        start, decode = first
        caches = _bytes(sharding.abstract(
            _caches(start.executable.out_info), _caches(start.executable.output_shardings)))
        moved['prefill'] = start.memory.arguments + start.memory.outputs
        moved['decode step'] = decode.memory.arguments
        yield _row(f'prefill, {sizes.prompts} prompts x {sizes.width} tokens', start, 0)
        yield _row(name, decode, caches)
    name = f'fit, {sizes.fit_rows} rows x {sizes.fit_length} tokens in {sizes.accumulate} part(s)'
    try:
        fitted = programs.compile_(lambda: programs.update(parts, sizes, parts.config.fit.frozen_layers))
        moved['fit step'] = fitted.memory.arguments + fitted.memory.outputs
        yield _row(name, fitted, 0)
        yield f'  the frozen reference is held beside it: at most {(fitted.memory.peak + held) / _GIBI:.2f}'
    except TooLarge as error:
        yield _refused(name, error)
    yield f'\n{"work of a device":<{_NAME}}     TFLOP  GB it must move  GB by XLA\'s count  at least'
    for name, cost in costs(parts, sizes):
        least, reason = least_seconds(cost.flops, moved[name], topology)
        yield (f'{name:<{_NAME}} {cost.flops / 1e12:9.4f}  {moved[name] / 1e9:15.2f}  {cost.bytes / 1e9:17.2f}  '
               f'{1e3 * least:.2f} ms, by {reason}')
    best = largest_batch(parts, sizes, memory - _RESERVED, first)
    yield (f'\nlargest batch: {best} rows decoded at once compiled within memory' if best else
           '\nno batch that was tried fits: take more devices, or split the parameters over more of them.')


def sizes_of(parts: Experiment) -> Sizes:
    """Returns the shapes that a run's config leads to; its longest prompts are those of the task, or as configured."""
    config, buffer = parts.config, parts.rollout.buffer
    _, _, width = describe.training_prompts(parts)
    rows = config.collect.batch_rows
    length = config.fit.prompts_per_row * (width + config.fit.samples_per_row * buffer)
    return Sizes(rows=rows, prompts=prompts_among(parts, rows), width=width, buffer=buffer,
                 fit_rows=config.fit.batch_size, fit_length=units.round_up(length, 16),
                 accumulate=config.fit.accumulate)


def prompts_among(parts: Experiment, rows: int) -> int:
    """Returns how many distinct prompts a batch of collected answers has, as `units.batches` lays them out."""
    return math.ceil(rows / parts.config.collect.samples) + 1


def decoding_programs(parts: Experiment, sizes: Sizes) -> tuple[Compiled, Compiled] | TooLarge:
    """Returns prefill and decode; or why one of them cannot be."""
    try:
        start = programs.compile_(lambda: programs.prefill(parts, sizes))
        return start, programs.compile_(lambda: programs.decode(parts, sizes, start))
    except TooLarge as error:
        return error


def costs(parts: Experiment, sizes: Sizes) -> Iterator[tuple[str, Cost]]:
    """Yields what prefill, one decode step and one gradient step do.

    The compiler counts the body of a loop once. That is right for the loop over steps; layers and parts of a gradient
    are counted instead in programs with one and with two of them, none in a loop: every further one costs as much.
    """
    networks = parts.reference_config.layers, value_lib.trunk_config(
        parts.value_config, parts.value_shape).layers - parts.value_config.extra_layers

    @functools.cache
    def decoding(reference: int, value: int) -> tuple[Cost, Cost]:
        short = programs.with_layers(parts, reference, value)
        start = programs.compile_(lambda: programs.prefill(short, sizes))
        return _cost(start), _cost(programs.compile_(lambda: programs.decode(short, sizes, start)))

    frozen = parts.config.fit.frozen_layers
    least = (min(frozen, 1), 1 if frozen < networks[1] else 0)

    def fitting(accumulate: int, frozen: int, trained: int) -> Cost:
        short = programs.with_layers(parts, 1, frozen + trained)
        rows = accumulate * (sizes.fit_rows // sizes.accumulate)
        part = dataclasses.replace(sizes, fit_rows=rows, accumulate=accumulate)
        return _cost(programs.compile_(lambda: programs.update(short, part, frozen, unroll=True)))

    def fitted(accumulate: int) -> Cost:
        return extrapolate(functools.partial(fitting, accumulate), least, (frozen, networks[1] - frozen))

    yield 'prefill', extrapolate(lambda *n: decoding(*n)[0], (1, 1), networks)
    yield 'decode step', extrapolate(lambda *n: decoding(*n)[1], (1, 1), networks)
    yield 'fit step', extrapolate(fitted, (1,), (sizes.accumulate,))


def extrapolate(measure: Callable[..., Cost], few: tuple[int, ...], many: tuple[int, ...]) -> Cost:
    """Returns the cost of `many` of each kind of part, of which every further one costs the same.

    Args:
      measure: the cost of so many of each kind.
      few: of each kind the fewest that can be measured.
      many: of each kind how many there are.
    """
    total = base = measure(*few)
    for kind, (start, end) in enumerate(zip(few, many, strict=True)):
        if end > start:
            more = measure(*(count + (other == kind) for other, count in enumerate(few)))
            total = total.plus(more.plus(base, -1), end - start)
    return total


def largest_batch(parts: Experiment, sizes: Sizes, memory: float,
                  found: tuple[Compiled, Compiled] | TooLarge) -> int:
    """Returns the most rows for which prefill and decode were compiled within memory; 0 if there are none.

    Memory grows in proportion to rows, so a few programs lead to it.

    Args:
      parts: an outline.
      sizes: whose rows were tried first.
      memory: of a device, in bytes.
      found: what became of them.
    """
    step = sharding.batch_shards(parts.mesh)
    rows, tried = sizes.rows, Tried({}, set(), memory)
    for attempt in range(_ATTEMPTS):
        if attempt:
            found = decoding_programs(parts, dataclasses.replace(sizes, rows=rows, prompts=prompts_among(parts, rows)))
        tried.add(rows, found)
        guess = tried.next_rows(step)
        if guess in tried.taken or guess == 0:
            break
        rows = guess
    return max(tried.fitting, default=0)


@dataclasses.dataclass
class Tried:
    """Numbers of rows that were compiled for.

    Attributes:
      taken: memory that each needs, in bytes.
      fitting: those that there is enough of it for.
      memory: how much there is.
    """

    taken: dict[int, float]
    fitting: set[int]
    memory: float

    def add(self, rows: int, found: tuple[Compiled, Compiled] | TooLarge) -> None:
        """Notes what became of the programs for so many rows."""
        if isinstance(found, TooLarge):
            self.taken[rows] = found.needed
            self.memory = self.memory if math.isnan(found.available) else found.available
        else:
            self.taken[rows] = max(program.memory.peak for program in found)
            self.fitting.add(rows)

    def next_rows(self, step: int) -> int:
        """Returns the multiple of `step` to try next; one that was tried if there is nothing better, 0 likewise."""
        most, too_many = max(self.fitting, default=0), min(self.taken.keys() - self.fitting, default=None)
        if len(self.taken) == 1:
            guess = 2 * most if most else (too_many or 0) // 2
        else:
            low, high = sorted(sorted(self.taken, key=lambda rows: abs(self.taken[rows] - self.memory))[:2])
            slope = (self.taken[high] - self.taken[low]) / (high - low)
            # A little less: close to the limit the compiler begins to trade memory for work.
            guess = int(low + 0.99 * (self.memory - self.taken[low]) / slope) if slope > 0 else 2 * high
        guess = guess // step * step
        if too_many is not None and guess >= too_many:
            guess = (most + too_many) // 2 // step * step
        return max(guess, most)


def _cost(compiled: Compiled) -> Cost:
    found = compiled.executable.cost_analysis() or {}
    return Cost(found['flops'], found['bytes accessed'])


def _caches(state: object) -> object:
    return getattr(state, 'reference_cache'), getattr(state, 'value_cache')


def _bytes(tree: object) -> int:
    """Returns the memory of jax.ShapeDtypeStructs with shardings on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def _how(scanned: bool) -> str:
    return 'scanned' if scanned else 'one by one'


def _row(name: str, compiled: Compiled, caches: float) -> str:
    memory = compiled.memory
    sizes = memory.arguments, caches, memory.temporaries, memory.outputs - memory.aliased, memory.aliased, memory.peak
    columns = [f'{size / _GIBI:{len(title)}.2f}' for size, title in zip(sizes, _COLUMNS)]
    return f'{name:<{_NAME}} ' + '  '.join([*columns, f'{compiled.seconds:{len(_COLUMNS[-1]) - 2}.1f} s'])


def _refused(name: str, error: TooLarge) -> str:
    return f'{name:<{_NAME}} does not fit: {error.needed / _GIBI:.2f} GiB of {error.available / _GIBI:.2f}'
