"""Which policies are evaluated when, and their rows of results.jsonl."""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import math
from pathlib import Path
import subprocess
from typing import Any

import jax
import numpy as np

from qsharp_jax import evaluate
from qsharp_jax.evaluate import Divergence, Evaluated, Row
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import ResultsFile
from qsharp_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
      splits: names, the one that eta is chosen on first.
      select_split: the one that eta is chosen on; '' where `eta` of the config is taken as it is.
      examples: number of prompts of each split; 0 for all.
      samples: answers a prompt.
      etas: KL coefficients.
      methods: any of 'qsharp', 'cd', 'fudge'.
      temperatures: of the reference, the sampler's own first.
    """

    splits: tuple[str, ...]
    select_split: str
    examples: dict[str, int]
    samples: int
    etas: tuple[float, ...]
    methods: tuple[str, ...]
    temperatures: tuple[float, ...]


def plan_of(config: Any) -> Plan:
    """Returns the plan in a config."""
    evaluation = config.eval
    own = float(config.sampling.temperature)
    examples = {evaluation.select_split: evaluation.select_examples, evaluation.split: evaluation.examples}
    return Plan(
        splits=tuple(dict.fromkeys(split for split in (evaluation.select_split, evaluation.split) if split)),
        select_split=evaluation.select_split, examples=examples, samples=evaluation.samples,
        etas=tuple(sorted({float(config.eta), *map(float, evaluation.etas)})), methods=tuple(evaluation.methods),
        temperatures=tuple(dict.fromkeys([own, *map(float, evaluation.reference_temperatures)])))


def policies(plan: Plan, iteration: int) -> list[list[Evaluated]]:
    """Returns the policies that are evaluated after an iteration, those that decode together in one list.

    Iteration 0 is the reference, at the sampler's temperature and sharpened. CD and FUDGE are evaluated on the first
    iteration's network alone, which has seen the reference's own data only, as those methods do.
    """
    if iteration == 0:
        return [[Evaluated('reference', 0, math.inf, temperature) for temperature in plan.temperatures]]
    groups = []
    for method in plan.methods:
        if method == 'qsharp' or iteration == 1:
            # FUDGE's weight does not depend on eta.
            etas = plan.etas[:1] if method == 'fudge' else plan.etas
            groups.append([Evaluated(method, iteration, eta, plan.temperatures[0]) for eta in etas])
    return groups


class Evaluation:
    """Evaluates iterations one after the other, and compares each policy with those before it."""

    def __init__(self, parts: Experiment, plan: Plan) -> None:
        self._parts, self._plan = parts, plan
        self._answers: dict[tuple[str, Evaluated], list[Row]] = {}
        self._results = ResultsFile(parts.workdir / 'results.jsonl')

    def run(self, iteration: int, values: Params, record: bool = True) -> None:
        """Adds the rows of every policy of an iteration to results.jsonl.

        The eta with the best pass@1 on the selection split, of equals the weakest guidance, is marked in the rows of
        every split (`selected`).

        Args:
          iteration: 0 for the reference, else that of the value network.
          values: parameters of that network; None for iteration 0.
          record: False to draw the answers for comparisons only, and leave results.jsonl as it is.
        """
        plan = self._plan
        for group in policies(plan, iteration):
            best: float | None = None
            for split in plan.splits:
                self._answer(group, values, split)
                rows = [self._row(evaluated, split) for evaluated in group]
                if split == plan.select_split:
                    best = max(rows, key=lambda row: (row['pass@1'], row['eta']))['eta']
                for row in rows:
                    row['selected'] = row['eta'] == (float(self._parts.config.eta) if best is None else best)
                if record:
                    self._results.add(rows)

    def run_policy(self, policy: Evaluated, parts: Experiment, divergence: Divergence, about: Row) -> None:
        """Adds the rows of a policy that was trained itself to results.jsonl.

        Args:
          policy: what it is.
          parts: the experiment with that policy in the place of its reference.
          divergence: of its answers to the real reference.
          about: more that its rows say.
        """
        self._results.add([{**self.measure(policy, parts, divergence, split), 'selected': True, **about}
                           for split in self._plan.splits])

    def measure(self, policy: Evaluated, parts: Experiment, divergence: Divergence, split: str) -> Row:
        """Returns the row of such a policy on one split, and leaves results.jsonl as it is. See `run_policy`."""
        self._answer([policy], None, split, parts, divergence)
        return self._row(policy, split)

    def _answer(self, group: Sequence[Evaluated], values: Params, split: str, parts: Experiment | None = None,
                divergence: Divergence | None = None) -> None:
        parts, plan = parts or self._parts, self._plan
        prompts = parts.prompts(split)
        wanted = plan.examples[split]
        if wanted > len(prompts):
            raise ValueError(f'{wanted} examples of the split {split!r} are to be evaluated, but it has '
                             f'{len(prompts)}: lower the number, or enlarge the split.')
        evaluation = parts.config.eval
        rows = evaluate.samples_of(parts, prompts, np.arange(wanted or len(prompts)), group, values, split,
                                   plan.samples, evaluation.batch_rows, evaluation.block_examples, divergence)
        for number, evaluated in enumerate(group):
            self._answers[split, evaluated] = [row for row in rows if row['policy'] == number]

    def _row(self, evaluated: Evaluated, split: str) -> Row:
        parts, plan = self._parts, self._plan
        low, high = parts.distribution.v_min, parts.distribution.v_max
        own = self._answers[split, evaluated]
        row = {**evaluated.key, 'split': split, **evaluate.summarise(own, parts.config.eval.maj_k, low, high),
               'commit': commit(), 'devices': jax.device_count(), 'seed': int(parts.config.seed)}
        before = {
            # At the same sampling settings.
            'gain': Evaluated('reference', 0, math.inf, plan.temperatures[0]),
            'gain_on_previous': dataclasses.replace(evaluated, iteration=evaluated.iteration - 1),
        }
        for name, other in before.items():
            if evaluated.method != 'reference' and (split, other) in self._answers:
                row[name], row[f'{name}_se'] = evaluate.compare(own, self._answers[split, other], low)
        return row


@functools.cache
def commit() -> str:
    """Returns the version of the code that runs, with '+' if files were changed since; '' outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        head = subprocess.run(['git', 'rev-parse', '--short=12', 'HEAD'], cwd=root, capture_output=True, text=True)
        changed = subprocess.run(['git', 'status', '--porcelain', '--untracked-files=no'], cwd=root,
                                 capture_output=True, text=True)
    except OSError:
        return ''
    return head.stdout.strip() + ('+' if changed.stdout.strip() else '') if head.returncode == 0 else ''
