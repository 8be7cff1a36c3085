"""Does a run fit TPUs that are not there, and how fast could it be: its programs compiled for them, in numbers."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from qsharp_jax import describe, estimates, programs, queue, sharding, units
from qsharp_jax.data import packing
from qsharp_jax.experiment import Experiment
from qsharp_jax.models import value as value_lib
from qsharp_jax.programs import Compiled, Decoding, Sizes, TooLarge
from qsharp_jax.topology import Topology

_GIBI = 2 ** 30
_NAME = 44  # characters of what a line is about
_COLUMNS = ('arguments', 'of it caches', 'temporaries', 'new outputs', 'outputs in place', 'at most', 'compiled in')
_ATTEMPTS = 4  # programs compiled in search of the largest batch
_STEP, _ALONE, _FIT = 'decode step', 'decode step by the reference alone', 'fit step'
_RESERVED = 2 ** 28  # bytes that the compiler keeps of each device's memory; one that does not fit says it exactly


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
    held = programs.bytes_per_device(programs.reference_params(parts))
    trained = programs.bytes_per_device(parts.value_target)
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
    work = []
    if isinstance(first, TooLarge):
        yield _refused(name, first)
    else:
        yield _row(f'prefill, {sizes.prompts} prompts x {sizes.width} tokens', first.prefill, 0)
        yield _row(f'refill, {queue.turnover(sizes.rows)} rows', first.refill, first.caches)
        yield _row(name, first.advance, first.caches)
        work += [('prefill', first.prefill.program.run(), first.prefill, first.prefill.memory.outputs),
                 (_STEP, first.advance.program.step(), first.advance, 0)]
        alone = programs.decoding_programs(parts, sizes, guided=False)
        yield _row('the same by the reference alone', alone.advance, alone.caches)
        work.append((_ALONE, alone.advance.program.step(), alone.advance, 0))
    name = f'fit, {sizes.fit_rows} rows x {sizes.fit_length} tokens in {sizes.accumulate} part(s)'
    try:
        fitted = programs.compile_(lambda: programs.update(parts, sizes))
        yield _row(name, fitted, 0)
        yield f'  the frozen reference is held beside it: at most {(fitted.memory.peak + held) / _GIBI:.2f}'
        work.append((_FIT, fitted.program.run(), fitted, fitted.memory.outputs))
    except TooLarge as error:
        yield _refused(name, error)
    for method in parts.config.baselines.methods:
        name = f'{method}, {parts.config.baselines.batch_size} answers or pairs'
        try:
            fitted = programs.compile_(lambda: programs.policy_update(parts, method, sizes))
            yield _row(name, fitted, 0)
            work.append((f'{method} step', fitted.program.run(), fitted, fitted.memory.outputs))
        except TooLarge as error:
            yield _refused(name, error)
    yield (f'\n{"work of a device":<{_NAME}}     TFLOP  of it again  GB it must move  GB it moves  GB by XLA\'s count  '
           'at least')
    seconds = {}
    for name, run, compiled, new in work:
        least, reason = least_seconds(run.flops, run.bytes, topology)
        seconds[name] = least
        used = (run.flops - run.again) / least / topology.flops
        counted = (compiled.executable.cost_analysis() or {})['bytes accessed']
        yield (f'{name:<{_NAME}} {run.flops / 1e12:9.4f}  {run.again / 1e12:11.4f}  '
               f'{(compiled.memory.arguments + new) / 1e9:15.2f}  {run.bytes / 1e9:11.2f}  {counted / 1e9:17.2f}  '
               f'{1e3 * least:.2f} ms, by {reason}: {used:.0%} of the peak')
    if {_STEP, _ALONE, _FIT} <= seconds.keys():
        yield f'\n{hours(parts, sizes, seconds)}'
    best = largest_batch(parts, sizes, memory - _RESERVED, first)
    yield (f'\nlargest batch: {best} rows decoded at once compiled within memory' if best else
           '\nno batch that was tried fits: take more devices, or split the parameters over more of them.')


def hours(parts: Experiment, sizes: Sizes, seconds: Mapping[str, float]) -> str:
    """Returns a sentence on the hours of a whole run of Q# and CD, from the least times of its programs.

    Every answer is counted as long as it may be, every row as at work all the time, and every gradient step at its
    largest. Prefills are left out, and so are grading, compiling and what passes between host and devices.

    Args:
      parts: an outline.
      sizes: of its programs.
      seconds: of each, at least.
    """
    config, drawn = parts.config, estimates.answers(parts)
    if not all(estimates.asked(parts).values()) or not (drawn.once or config.value.run):
        return ('hours of the whole run are not known before the questions are here, or config.collect.examples, '
                'config.eval.examples and config.eval.select_examples say how many there are.')
    longest = config.sampling.max_new_tokens
    # A roll-in is cut in its middle, on average; then a roll-out has what is left, or a length of its own.
    again = 1.0 if config.collect.budget == 'fresh' else 0.5
    first, later = (longest * (1 + again if parts.rollout(iteration).cut == 'uniform' else 1) for iteration in (1, 2))
    collecting = (drawn.once * first * seconds[_ALONE]
                  + (drawn.collected - drawn.once) * later * seconds[_STEP]) / sizes.rows
    evaluating = (drawn.unguided * seconds[_ALONE] + drawn.guided * seconds[_STEP]) * longest / sizes.rows
    steps = (drawn.fitted * config.fit.epochs * len(config.fit.learning_rate_factors)
             / (config.fit.batch_size * config.fit.samples_per_row))
    phases = {'collecting': collecting, 'fitting': steps * seconds[_FIT], 'evaluating': evaluating}
    return ('hours of the whole run at these times, were all answers as long as they may be: '
            + ', '.join(f'{name} {each / 3600:.1f}' for name, each in phases.items())
            + f'; together {sum(phases.values()) / 3600:.1f}. Decoding shorter answers takes as much less.')


def sizes_of(parts: Experiment) -> Sizes:
    """Returns the shapes that a run's config leads to; its longest prompts are those of the task, or as configured."""
    config, buffer = parts.config, parts.rollout().buffer
    _, _, width = describe.training_prompts(parts)
    rows = config.collect.batch_rows
    # The most that answers can take. Shorter ones are laid into fewer rows.
    most = np.full((config.fit.batch_size, 1), width + config.fit.samples_per_row * buffer)
    fit_rows, fit_length = packing.lay_out(
        most, 0, packing.ROUND_TO, sharding.batch_shards(parts.mesh) * config.fit.accumulate)
    return Sizes(rows=rows, prompts=prefilled_prompts(parts, rows), width=width, buffer=buffer,
                 fit_rows=len(fit_rows), fit_length=fit_length, accumulate=config.fit.accumulate)


def prefilled_prompts(parts: Experiment, rows: int) -> int:
    """Returns how many prompts of collected answers are prefilled together."""
    return units.prefilled_prompts(rows, parts.config.collect.samples, sharding.batch_shards(parts.mesh))


def decoding_programs(parts: Experiment, sizes: Sizes) -> Decoding | TooLarge:
    """Returns the programs of guided answers; or why one of them cannot be."""
    try:
        return programs.decoding_programs(parts, sizes)
    except TooLarge as error:
        return error


def largest_batch(parts: Experiment, sizes: Sizes, memory: float,
                  found: Decoding | TooLarge) -> int:
    """Returns the most rows for which the programs of answers were compiled within memory; 0 if there are none.

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
            more = dataclasses.replace(sizes, rows=rows, prompts=prefilled_prompts(parts, rows))
            found = decoding_programs(parts, more)
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

    def add(self, rows: int, found: Decoding | TooLarge) -> None:
        """Notes what became of the programs for so many rows."""
        if isinstance(found, TooLarge):
            self.taken[rows] = found.needed
            self.memory = self.memory if math.isnan(found.available) else found.available
        else:
            # Beside a prefill the rows lie in memory.
            self.taken[rows] = max(found.prefill.memory.peak + found.caches, found.refill.memory.peak,
                                   found.advance.memory.peak)
            if self.taken[rows] <= self.memory:
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


def _how(scanned: bool) -> str:
    return 'scanned' if scanned else 'one by one'


def _row(name: str, compiled: Compiled, caches: float) -> str:
    memory = compiled.memory
    sizes = memory.arguments, caches, memory.temporaries, memory.outputs - memory.aliased, memory.aliased, memory.peak
    columns = [f'{size / _GIBI:{len(title)}.2f}' for size, title in zip(sizes, _COLUMNS)]
    return f'{name:<{_NAME}} ' + '  '.join([*columns, f'{compiled.seconds:{len(_COLUMNS[-1]) - 2}.1f} s'])


def _refused(name: str, error: TooLarge) -> str:
    if math.isinf(error.needed):  # the compiler has other words, which may say how much
        return f'{name:<{_NAME}} does not fit: {str(error).splitlines()[0]}'
    return f'{name:<{_NAME}} does not fit: {error.needed / _GIBI:.2f} GiB of {error.available / _GIBI:.2f}'
