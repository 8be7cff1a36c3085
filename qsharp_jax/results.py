"""Which policies are evaluated when, and their rows of results.jsonl."""
from __future__ import annotations

from collections.abc import Collection, Sequence
import dataclasses
import functools
import math
from pathlib import Path
import subprocess
from typing import Any

import jax
import numpy as np

from qsharp_jax import estimators, evaluate, first_reference, ranking
from qsharp_jax.categorical import METHODS
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
      sweep_splits: those on which every eta is evaluated; on the others it is the chosen one.
      examples: number of prompts of each split; 0 for all.
      samples: answers a prompt.
      etas: KL coefficients.
      methods: any of `categorical.METHODS`.
      temperatures: of the reference, the sampler's own first.
      each_iteration: whether all methods are evaluated after every iteration, or Q# alone after the first.
    """

    splits: tuple[str, ...]
    select_split: str
    sweep_splits: tuple[str, ...]
    examples: dict[str, int]
    samples: int
    etas: tuple[float, ...]
    methods: tuple[str, ...]
    temperatures: tuple[float, ...]
    each_iteration: bool


def plan_of(config: Any) -> Plan:
    """Returns the plan in a config."""
    evaluation = config.eval
    own = float(config.sampling.temperature)
    examples = {evaluation.select_split: evaluation.select_examples, evaluation.split: evaluation.examples}
    splits = tuple(dict.fromkeys(split for split in (evaluation.select_split, evaluation.split) if split))
    return Plan(
        splits=splits, select_split=evaluation.select_split,
        sweep_splits=splits if evaluation.every_eta else splits[:1], examples=examples, samples=evaluation.samples,
        etas=tuple(sorted({float(config.eta), *map(float, evaluation.etas)})), methods=tuple(evaluation.methods),
        temperatures=tuple(dict.fromkeys([own, *map(float, evaluation.reference_temperatures)])),
        each_iteration=bool(evaluation.each_iteration))


def needs_cd_network(config: Any, iteration: int, methods: Collection[str] = ()) -> bool:
    """Returns whether CD or VAS is evaluated after an iteration with a value network of its own.

    Args:
      config: of the run.
      iteration: the one meant.
      methods: that are evaluated; none for those of the config.
    """
    return (config.eval.cd_network == 'own' and not {'cd', 'vas'}.isdisjoint(methods or config.eval.methods)
            and (iteration == 1 or bool(config.eval.each_iteration)))


def policies(plan: Plan, iteration: int, methods: Collection[str] = METHODS) -> list[list[Evaluated]]:
    """Returns the policies that are evaluated after an iteration, those that decode together in one list.

    Iteration 0 is the reference, at the sampler's temperature and sharpened. Unless the plan says otherwise, CD, VAS
    and FUDGE are evaluated on the first iteration's network alone, which has seen the reference's own data only, as
    those methods do. CD comes first: others are compared with it. Of the plan's methods, those among `methods` are
    meant.
    """
    if iteration == 0:
        return [[Evaluated('reference', 0, math.inf, temperature) for temperature in plan.temperatures]]
    groups = []
    for method in sorted(plan.methods, key=lambda method: method != 'cd'):
        if method in methods and (method == 'qsharp' or iteration == 1 or plan.each_iteration):
            # FUDGE's weight does not depend on eta.
            etas = plan.etas[:1] if method == 'fudge' else plan.etas
            groups.append([Evaluated(method, iteration, eta, plan.temperatures[0]) for eta in etas])
    return groups


class Evaluation:
    """Evaluates iterations one after the other, and compares each policy with those before it."""

    def __init__(self, parts: Experiment, plan: Plan, of_run: bool = True) -> None:
        """
        Args:
          parts: the run.
          plan: what is measured.
          of_run: whether this is the evaluation that the run's config asks for, whose rows take the place of earlier
            ones and say which eta is chosen; rows of any other join those that are there.
        """
        self._parts, self._plan, self._of_run = parts, plan, of_run
        self._answers: dict[tuple[str, Evaluated], list[Row]] = {}
        # The chosen policy of a method and split: its row, which says what it was compared with.
        self._chosen: dict[tuple[str, str], Evaluated] = {}
        self._results = ResultsFile(parts.workdir / 'results.jsonl')

    def run(self, iteration: int, values: Params, cd_values: Params = None,
            methods: Collection[str] = METHODS) -> None:
        """Adds the rows of every policy of an iteration to results.jsonl.

        The eta with the best pass@1 on the selection split, of equals the weakest guidance, is marked in the rows of
        every split (`selected`).

        Args:
          iteration: 0 for the reference, else that of the value network.
          values: parameters of that network; None for iteration 0.
          cd_values: of the network that CD and VAS are guided by, if they have their own.
          methods: that are meant, of those of the plan.
        """
        plan = self._plan
        for group in policies(plan, iteration, methods):
            method = group[0].method
            own = method in ('cd', 'vas') and cd_values is not None
            best: float | None = None
            for split in plan.splits:
                chosen = float(self._parts.config.eta) if best is None else best
                asked = [evaluated for evaluated in group
                         if split in plan.sweep_splits or not evaluated.guided or evaluated.eta == chosen]
                self._answer(asked, cd_values if own else values, split)
                if split == plan.select_split:
                    chosen = best = self._best(group, split)
                for evaluated in asked:
                    # The reference's is that of the sampler's own temperature; FUDGE has one only.
                    if evaluated == group[0] if method in ('reference', 'fudge') else evaluated.eta == chosen:
                        self._chosen[method, split] = evaluated
                self._results.add([self._row(evaluated, split) for evaluated in asked], replace=self._of_run)

    def rank(self, iteration: int, values: Params) -> None:
        """Scores answers by a value network, and adds what best-of-k and weighted votes earn to results.jsonl.

        These are the answers, on the evaluated split, of the reference at the sampler's temperature and of each method
        at its chosen eta.

        Args:
          iteration: that the network is of.
          values: its parameters.
        """
        split, chosen, rows = self._chosen_answers()
        if chosen:
            scores = ranking.end_values(self._parts, iteration, values, self._parts.prompts(split), rows)
            for row, score in zip(rows, scores, strict=True):
                row['score'] = float(score)
            self._results.add([self._row(evaluated, split, scored_by=iteration) for evaluated in chosen])

    def compare_first(self, iteration: int) -> None:
        """Adds the KL to the reference that a borrowed network was fitted for to results.jsonl, for the same answers.

        Args:
          iteration: of the network.
        """
        split, chosen, rows = self._chosen_answers()
        if chosen:
            ratios = first_reference.log_ratios(self._parts, iteration, self._parts.prompts(split), rows)
            for row, ratio in zip(rows, ratios, strict=True):
                row[evaluate.TO_FIRST] = row['kl'] + float(ratio)
            self._results.add([self._row(evaluated, split) for evaluated in chosen])

    def _chosen_answers(self) -> tuple[str, list[Evaluated], list[Row]]:
        """Returns the evaluated split, the policies that `rank` means, and their answers."""
        split = self._parts.config.eval.split
        chosen = [evaluated for (_, where), evaluated in self._chosen.items() if where == split]
        return split, chosen, [row for evaluated in chosen for row in self._answers[split, evaluated]]

    def beside(self, parts: Experiment) -> Evaluation:
        """Returns the evaluation of networks in another work directory, which are compared with the reference here.

        Args:
          parts: the experiment there, of the same reference.
        """
        other = Evaluation(parts, self._plan)
        other._answers.update({key: rows for key, rows in self._answers.items() if key[1].method == 'reference'})
        return other

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
        plan = self._plan
        if parts is None:
            # Its directories and how it is read go with a network.
            parts = self._parts.for_cd if group[0].method in ('cd', 'vas') else self._parts
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

    def _best(self, group: Sequence[Evaluated], split: str) -> float:
        """Returns the eta with the best pass@1, of equals the largest."""
        low = self._parts.distribution.v_min
        return max((estimators.mean_and_se(evaluate.by_example(self._answers[split, evaluated], low)['reward'])[0],
                    evaluated.eta) for evaluated in group)[1]

    def _row(self, evaluated: Evaluated, split: str, scored_by: int | None = None) -> Row:
        parts, plan = self._parts, self._plan
        low, high = parts.distribution.v_min, parts.distribution.v_max
        seed = int(parts.config.seed)
        own = self._answers[split, evaluated]
        row = {**evaluated.key, 'split': split, **evaluate.summarise(own, parts.config.eval.maj_k, low, high, seed),
               'scored_by': scored_by, 'commit': commit(), 'devices': jax.device_count(), 'seed': seed}
        others = {
            # At the same sampling settings.
            'reference': Evaluated('reference', 0, math.inf, plan.temperatures[0]),
            'previous': dataclasses.replace(evaluated, iteration=evaluated.iteration - 1),
        }
        if ('cd', split) in self._chosen:
            others['cd'] = self._chosen['cd', split]
        for name, other in others.items():
            if other != evaluated and evaluated.method != 'reference' and (split, other) in self._answers:
                found = evaluate.compare(own, self._answers[split, other], low, f'{seed} {split}')
                row.update({f'difference_to_{name}{part}': value for part, value in found.items()})
        row['selected'] = self._of_run and self._chosen.get((evaluated.method, split)) == evaluated
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
