"""What a run takes at most, counted from its config and shapes, and how long that is at a rate that was measured."""
from __future__ import annotations

from collections.abc import Sequence
import json
import math
from pathlib import Path
import statistics

import jax
import ml_collections

from qsharp_jax import describe, experiment, ledger, results
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.metrics import read_rows
from qsharp_jax.progress import duration

_TOKEN_BYTES = 45  # of an answer's token in samples/: its id, its piece and its value as JSON; about so many were seen
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


def of_run(config: ml_collections.ConfigDict, workdir: Path, rate: float | None, shares: bool) -> list[str]:
    """Returns sentences on answers, FLOPs, time and disk of a run, from its start. All are upper bounds.

    Args:
      config: of the run.
      workdir: of the run.
      rate: FLOPs a second; None where nothing was measured.
      shares: whether the roll-outs of the first iteration and the reference's answers are another run's.
    """
    try:
        parts = experiment.outline(config, workdir)
    except ValueError as error:
        return [f'what it takes is not known before its models are here: {str(error).splitlines()[0]}']
    plan, most = results.plan_of(config), config.sampling.max_new_tokens
    _, prompts, width = describe.training_prompts(parts)
    asked = config.collect.examples or prompts
    passes = 0 if config.value.run else config.iterations - shares
    collected = passes * asked * config.collect.samples
    fitted = 0 if config.value.run else sum(range(1, config.iterations + 1)) * asked * config.collect.samples
    per_policy = plan.samples * sum(_examples(parts, plan, split) for split in plan.splits)
    groups = [policy for iteration in range(config.iterations + 1) for group in results.policies(plan, iteration)
              for policy in group]
    plain = 0 if shares else per_policy * sum(not policy.guided for policy in groups)
    guided = per_policy * sum(policy.guided for policy in groups)
    # Roll-in and roll-out may both be as long as an answer may be.
    tokens = {'collected': 2 * collected * most, 'answered': (plain + guided) * most}
    reference = ledger.reference_cost(parts.reference_config)
    value = ledger.value_cost(parts.value_shape, parts.value_config, config.guidance.candidates)
    keys = width + most / 2
    one, asked_of_value = float(reference.flops(1, keys, 1)), float(value.flops(1, keys, 1))
    guided_tokens = guided * most + max(collected - asked * config.collect.samples * (not shares), 0) * most
    flops = (sum(tokens.values()) * one + guided_tokens * (1 + config.guidance.candidates) * asked_of_value
             + _PASSES * config.fit.epochs * fitted * (width / config.fit.samples_per_row + most) * asked_of_value)
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.value_target))
    networks = 0 if config.value.run else config.iterations + (config.eval.cd_network == 'own')
    disk = (networks + 3 * config.checkpoint.keep * networks) * weights + 4 * tokens['collected'] + (
        _TOKEN_BYTES * tokens['answered'])
    took = (f'{duration(flops / rate)} at the {rate / 1e9:,.3g} GFLOP/s that answers were decoded with here' if rate
            else 'time is told once a run of the plan has evaluated something')
    return [f'at most {collected:,} answers to collect and {plain + guided:,} to evaluate, of {most} tokens',
            f'at most {flops:.2e} FLOP: {took}',
            f'at most {disk / 2 ** 30:,.2f} GiB on disk, of which value networks {networks * weights / 2 ** 30:,.2f}']


def _examples(parts: experiment.Experiment, plan: results.Plan, split: str) -> int:
    """Returns how many questions of a split are asked; 0 where all are and their number is not known yet."""
    return plan.examples[split] or prompts_lib.task_config(parts.config.task).size(split) or 0
