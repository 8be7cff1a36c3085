"""What a run takes at most, counted from its config and shapes, and how long that is at a rate that was measured."""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import math
from pathlib import Path
import statistics

import jax
import ml_collections

from qsharp_jax import describe, experiment, ledger, results, sharding
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.metrics import read_rows
from qsharp_jax.progress import duration

_TOKEN_BYTES = 45  # of an answer's token in samples/: its id, its piece and its value as JSON; about so many were seen
# Shapes in configs/models by a part of a source's name, in lower case.
_SHAPES = {'llama-3-8b': 'llama_3_8b', 'llama-3.1-8b': 'llama_3_8b', 'llama-3-70b': 'llama_3_70b',
           'llama-3.1-70b': 'llama_3_70b', 'llama-3.2-1b': 'llama_3.2_1b', 'llama-3.2-3b': 'llama_3.2_3b',
           'qwen2.5-7b': 'qwen_2.5_7b', 'qwen2.5-1.5b': 'qwen_2.5_1.5b'}
_ROOT = Path(__file__).resolve().parents[1]
_PASSES = 3  # of a gradient step: forward, and twice that backward


def measured_rate(workdirs: Sequence[Path]) -> float | None:
    """Returns FLOPs a second while answers were decoded in these runs, the median over policies; None before any was.

    The FLOPs are counted (`ledger`), the seconds measured, so that the rate is of this machine and these models.
    """
    rates = [row['flops_per_answer'] / row['seconds_per_answer'] for workdir in workdirs
             for row in read_rows(workdir / 'results.jsonl') if row['seconds_per_answer']]
    return statistics.median(rates) if rates else None


def seconds_taken(workdir: Path) -> float:
    """Returns the seconds that a run has taken so far, of all its phases."""
    path = workdir / 'timings.json'
    return float(sum(json.loads(path.read_text()).values())) if path.exists() else 0.0


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a run takes at most, from its start.

    Attributes:
      collected: answers to collect.
      evaluated: answers to evaluate.
      flops: of decoding and fitting.
      networks: bytes of finished value networks.
      disk: bytes of all that is kept.
    """

    collected: int
    evaluated: int
    flops: float
    networks: int
    disk: float


def of_run(config: ml_collections.ConfigDict, workdir: Path, rate: float | None, shares: bool) -> list[str]:
    """Returns sentences on answers, FLOPs, time and disk of a run, from its start.

    Args:
      config: of the run.
      workdir: of the run.
      rate: FLOPs a second; None where nothing was measured.
      shares: as in `bounds`.
    """
    try:
        most = bounds(config, workdir, shares)
    except ValueError as error:
        return [f'what it takes is not known before its models are here: {str(error).splitlines()[0]}']
    took = (f'{duration(most.flops / rate)} at the {rate / 1e9:,.3g} GFLOP/s that answers were decoded with here'
            if rate else 'time is told once a run of the plan has evaluated something')
    return [f'at most {most.collected:,} answers to collect and {most.evaluated:,} to evaluate, of '
            f'{config.sampling.max_new_tokens} tokens',
            f'at most {most.flops:.2e} FLOP: {took}',
            f'at most {most.disk / 2 ** 30:,.2f} GiB on disk, of which value networks {most.networks / 2 ** 30:,.2f}']


def bounds(config: ml_collections.ConfigDict, workdir: Path, shares: bool) -> Bounds:
    """Returns what a run takes at most: every answer as long as it may be, every candidate scored.

    Args:
      config: of the run.
      workdir: of the run.
      shares: whether the roll-outs of the first iteration and the reference's answers are another run's.

    Raises:
      ValueError: its models are neither here nor of a known shape.
    """
    parts = _outline(config, workdir)
    plan, longest = results.plan_of(config), config.sampling.max_new_tokens
    _, prompts, width = describe.training_prompts(parts)
    fits_here = not config.value.run
    once = fits_here * (config.collect.examples or prompts) * config.collect.samples  # answers of one iteration
    collected = (config.iterations - shares) * once
    own_cd = config.eval.cd_network == 'own' and fits_here
    fitted = (sum(range(1, config.iterations + 1)) + own_cd) * once  # each fit has all of D
    answers = {split: plan.samples * _examples(parts, plan, split) for split in plan.splits}
    guided = unguided = 0
    for iteration in range(config.iterations + 1):
        for group in results.policies(plan, iteration):
            if group[0].guided:
                guided += sum(number * (len(group) if split in plan.sweep_splits else 1)
                              for split, number in answers.items())
            else:
                unguided += len(group) * sum(answers.values())
    evaluated = guided + (0 if shares else unguided)
    reference = ledger.reference_cost(parts.reference_config)
    value = ledger.value_cost(parts.value_shape, parts.value_config, config.guidance.candidates)
    keys = width + longest / 2
    of_reference, of_value = float(reference.flops(1, keys, 1)), float(value.flops(1, keys, 1))
    # Roll-in and roll-out may both be as long as an answer may be; the first iteration's roll-ins are not guided.
    written = (2 * collected + evaluated) * longest
    by_value = (guided + (config.iterations - 1) * once) * longest * (1 + config.guidance.candidates)
    read = fitted * (width + longest) * config.fit.epochs
    # Each group of answers has its prompt once, and a prompt is prefilled once for all of its answers, at most.
    prefilled = (collected + evaluated) * width
    flops = (written + prefilled) * of_reference + (by_value + prefilled + _PASSES * read) * of_value
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.value_target))
    networks = (config.iterations + own_cd) * fits_here
    unfinished = 3 * config.checkpoint.keep * networks  # parameters and two moments
    return Bounds(collected, evaluated, flops, networks * weights,
                  (networks + unfinished) * weights + 8 * collected * longest + _TOKEN_BYTES * evaluated * longest)


def _outline(config: ml_collections.ConfigDict, workdir: Path) -> experiment.Experiment:
    """Returns the parts of a run, with shapes that are known here in place of models of the hub."""
    known = {}
    for section in ('reference', 'value'):
        source = config[section].source
        shape = next((file for name, file in _SHAPES.items() if name in source.lower()), None)
        if source.startswith('hf:') and shape:
            known[section] = str(_ROOT / 'configs' / 'models' / f'{shape}.json')
    if not known:
        return experiment.outline(config, workdir)
    planned = config.copy_and_resolve_references()
    for section, path in known.items():
        planned[section].source = path
    return experiment.outline(planned, workdir, sharding.make_mesh(data=-1, fsdp=1, tensor=1))


def _examples(parts: experiment.Experiment, plan: results.Plan, split: str) -> int:
    """Returns how many questions of a split are asked; 0 where all are and their number is not known yet."""
    return plan.examples[split] or prompts_lib.task_config(parts.config.task).size(split) or 0
