"""Answers of several policies to the same questions, graded, and what they amount to.

All policies that share a value network and a kind of offset are decoded in one batch, whatever their eta and
temperature. The noise of a sample depends on its question and number alone, so differences between policies are
paired. Finished blocks of questions are kept on disk: a run that was killed goes on behind the last one.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import json
import math
from pathlib import Path
import time
from typing import Any

import numpy as np

from qsharp_jax import decoding, estimators, ledger, progress, rewards
from qsharp_jax import units as units_lib
from qsharp_jax.categorical import METHODS
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.experiment import Experiment, grade
from qsharp_jax.metrics import replace_text
from qsharp_jax.queue import Drawn, Queue
from qsharp_jax.types import Params

Row = dict[str, Any]
Divergence = Callable[[Prompts, Drawn], np.ndarray]  # KL of each answer, nats  # [N]

TO_FIRST = 'kl_to_first_reference'

_FORMAT = 3  # of the blocks' rows


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A policy to evaluate.

    Attributes:
      method: 'reference', one of `categorical.METHODS`, or one of those that train the policy itself.
      iteration: of the value network; 0 where none guides.
      eta: KL coefficient; inf where nothing guides.
      temperature: of the sampler; 0 is greedy.
      network: names the weights of a policy that was trained itself; '' for others.
    """

    method: str
    iteration: int
    eta: float
    temperature: float
    network: str = ''

    @property
    def guided(self) -> bool:
        """Whether a value network is needed."""
        return self.method in METHODS

    @property
    def key(self) -> Row:
        """What identifies its rows in results.jsonl, together with the split."""
        return {'method': self.method, 'iteration': self.iteration, 'eta': self.eta, 'temperature': self.temperature}


def samples_of(experiment: Experiment, prompts: Prompts, which: Sequence[int] | np.ndarray,
               policies: Sequence[Evaluated], value_params: Params, split: str, samples: int, batch_rows: int,
               block_examples: int, divergence: Divergence | None = None) -> list[Row]:
    """Returns one graded row per (example, sample, policy), reading finished blocks back instead of redoing them.

    Args:
      experiment: the run.
      prompts: of the split.
      which: row numbers of `prompts` to answer.
      policies: of one method, so that they decode together.
      value_params: of the value network; None where none guides.
      split: name, for files and messages.
      samples: answers per example and policy.
      batch_rows: answers decoded at once.
      block_examples: examples per block.
      divergence: the KL of each answer to the real reference, where `experiment` has a trained policy in its place.
    """
    method, iteration = policies[0].method, policies[0].iteration
    if any((p.method, p.iteration, p.network) != (method, iteration, policies[0].network) for p in policies):
        raise ValueError('policies that decode together must share one method, iteration and network.')
    name = f'{method}_{iteration}' if iteration else method
    # The directory names everything the rows depend on, so a changed evaluation never reads another's blocks.
    identity = json.dumps([_FORMAT, [p.key for p in policies], samples, batch_rows, block_examples,
                           [int(i) for i in which], policies[0].network or experiment.value_digest(iteration)],
                          default=str)
    directory = experiment.workdir / 'samples' / split / f'{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}'
    directory.mkdir(parents=True, exist_ok=True)
    how = experiment.guidance(method) if policies[0].guided else decoding.Guidance()
    queue: Queue | None = None
    rows: list[Row] = []
    drawn = sum(1 if policy.temperature == 0 else samples for policy in policies)  # answers to each question
    total = len(which) * drawn
    with progress.bar(f'evaluate {name.replace("_", " ")} on {split}', total=total, unit='answers') as bar:
        for number, first in enumerate(range(0, len(which), block_examples)):
            path = directory / f'block_{number:05d}.jsonl'
            chosen = which[first:first + block_examples]
            if path.exists():
                done = _read_block(experiment, prompts, path, chosen, len(policies), samples)
                bar.update(len(chosen) * drawn)
            else:
                # Made for the first block that is missing: rows and their caches take memory.
                queue = queue or experiment.queue(
                    how, experiment.decoding_params(value_params),
                    decoding.Answering(experiment.config.sampling.max_new_tokens), prompts, batch_rows,
                    experiment.config.seed)
                done = _answer(experiment, prompts, policies, split, queue, chosen, samples,
                               lambda count, occupancy: bar.update(count, occupancy=occupancy), divergence)
                done.sort(key=lambda row: (row['policy'], row['id'], row['sample']))
                _write(path, done)
            rows += done
    return rows


def _write(path: Path, rows: Sequence[Row]) -> None:
    replace_text(path, ''.join(json.dumps(row) + '\n' for row in rows))


def _read_block(experiment: Experiment, prompts: Prompts, path: Path, which: Sequence[int] | np.ndarray, policies: int,
                samples: int) -> list[Row]:
    """Returns the rows of a finished block, with new rewards and votes if the reward's code has changed since."""
    try:
        rows: list[Row] = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        old = [row for row in rows if row['reward_digest'] != experiment.reward.digest]
        found = sorted((row['policy'], row['id'], row['sample'], row['prompt']) for row in rows)
        wanted = sorted((policy, int(prompts.ids[index]), sample, prompts.texts[index])
                        for policy in range(policies) for index in which for sample in range(samples))
        if found != wanted:
            raise ValueError('its rows are not the answers to the questions that the split has now')
    except (ValueError, KeyError) as error:
        raise ValueError(f'{path} is damaged ({type(error).__name__}: {error}). Delete it: the same command then makes '
                         'it again. If the files of the questions were changed, bring them back.') from error
    if old:
        place = {int(example): index for index, example in enumerate(prompts.ids)}
        earned = grade(experiment, prompts, np.array([place[row['id']] for row in old]), [row['text'] for row in old])
        for row, reward in zip(old, earned, strict=True):
            row.update(reward=_number(reward), reward_digest=experiment.reward.digest)
    if old or any('vote' not in row for row in rows):  # blocks of earlier versions have no votes
        _vote(experiment, rows)
        _write(path, rows)
    return rows


def _vote(experiment: Experiment, rows: Sequence[Row]) -> None:
    """Writes into each row which class of answers it votes for, among those of its policy to its question."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row['policy'], row['id']), []).append(row)
    options = experiment.config.reward_options
    found = rewards.votes(experiment.reward, [[row['text'] for row in group] for group in groups.values()],
                          workers=options.workers, timeout_seconds=options.timeout_seconds)
    for group, names in zip(groups.values(), found, strict=True):
        for row, name in zip(group, names, strict=True):
            row['vote'] = name


def _number(value: float) -> float | None:
    """Returns a value as JSON has it: None for NaN."""
    return None if math.isnan(value) else float(value)


def _answer(experiment: Experiment, prompts: Prompts, policies: Sequence[Evaluated], split: str, queue: Queue,
            which: Sequence[int] | np.ndarray, samples: int, ended: Callable[[int, float], None],
            divergence: Divergence | None) -> list[Row]:
    """Returns the graded rows of one block.

    A greedy answer does not depend on its noise: it is drawn once, and is each of the samples.
    """
    greedy = [number for number, policy in enumerate(policies) if policy.temperature == 0]
    others = [number for number in range(len(policies)) if number not in greedy]
    rows: list[Row] = []
    for numbers, count in ((others, samples), (greedy, 1)):
        if numbers:
            own = _drawn(experiment, prompts, [policies[number] for number in numbers], split, queue, which, count,
                         ended, divergence)
            rows += [{**row, 'policy': numbers[row['policy']], 'sample': row['sample'] + more}
                     for row in own for more in range(0, samples, count)]
    _vote(experiment, rows)
    return rows


def _drawn(experiment: Experiment, prompts: Prompts, policies: Sequence[Evaluated], split: str, queue: Queue,
           which: Sequence[int] | np.ndarray, samples: int, ended: Callable[[int, float], None],
           divergence: Divergence | None) -> list[Row]:
    """Returns rows without votes, with the number of its policy among those given in each."""
    began = time.perf_counter()
    drawn = queue.draw(
        which, samples, experiment.policies([p.eta for p in policies], [p.temperature for p in policies]), ended)
    units, read = drawn.units, drawn.read
    work = _work(experiment, prompts, policies[0].guided, drawn)
    kl = read.kl if divergence is None else divergence(prompts, drawn)
    answers = [tokens[:count] for tokens, count in zip(read.tokens, read.count)]
    texts = [experiment.answer_text(answer) for answer in answers]
    earned = grade(experiment, prompts, units.index, texts)
    seconds = (time.perf_counter() - began) / len(answers)
    rows = []
    for i, answer in enumerate(answers):
        rows.append({
            'policy': int(units.policies[i]), **policies[units.policies[i]].key, 'split': split,
            'id': int(prompts.ids[units.index[i]]), 'sample': int(units.samples[i]),
            'prompt': prompts.texts[units.index[i]], 'text': texts[i], 'tokens': [int(t) for t in answer],
            'answer_tokens': experiment.tokenizer.pieces(answer),
            'values': [_number(v) for v in read.values[i, :read.count[i]]],
            'reward': _number(earned[i]), 'reward_digest': experiment.reward.digest,
            'kl': float(kl[i]), 'truncated': not read.ended[i], 'seconds': seconds,
            'occupancy': drawn.occupancy, **{name: float(amounts[i]) for name, amounts in work._asdict().items()},
        })
    return rows


def _work(experiment: Experiment, prompts: Prompts, guided: bool, drawn: Drawn) -> ledger.Work:
    """Returns what each answer of a block took; `guided`: a value network was asked."""
    index, read = drawn.units.index, drawn.read
    lengths = np.array([len(prompts.tokens[one]) for one in index])
    value = ledger.value_cost(
        experiment.value_shape, experiment.value_config, experiment.config.guidance.candidates) if guided else None
    return ledger.of_answers(
        ledger.reference_cost(experiment.reference_config), value, prompts=lengths,
        prefilled=ledger.prefilled_shares(lengths, index, units_lib.shared_prefix(prompts)), made=read.count,
        reference_made=read.reference_tokens, value_made=read.value_tokens, reference_passes=drawn.reference_passes,
        value_passes=drawn.value_passes)


def summarise(rows: Sequence[Row], k: int, v_min: float, v_max: float, seed: int) -> Row:
    """Returns the results of one policy on one split.

    Args:
      rows: its samples, the same number for each example; an abstained one (`reward` None) counts as `v_min`.
      k: of pass@k and maj@k, at most the number of samples.
      v_min: least reward.
      v_max: greatest reward; an answer is right if it earns it.
      seed: of the draws that break ties.

    Returns:
      the keys of a row of results.jsonl that are measured. `kl` is Σ over an answer's tokens of the full-vocabulary
      KL(policy ‖ reference at the temperature of the run's sampler), mean over answers, in nats; `kl_per_token`
      divides the total by the number of tokens. Standard errors are clustered by example. What answers cost
      (`ledger.Work`, and seconds) is given for each answer and for each right one: all of it over the right ones.
      Of k answers, `maj@k` is what the class with most of them earns; where a value network has scored them (`score`),
      `best_of_k` is what the one with the highest score earns, and `weighted_maj@k` what the class with the highest sum
      of scores above `v_min` does; otherwise these are None. Where answers have a `kl_to_first_reference`
      (`first_reference`), the row has their mean.
    """
    table = by_example(rows, v_min)
    earned, kl = table['reward'], table['kl']
    k = min(k, earned.shape[1])
    mean, error = estimators.mean_and_se(earned)
    at_k, at_k_error = estimators.pass_at_k(earned >= v_max, k)
    kl_mean, kl_error = estimators.mean_and_se(kl)
    to_first = {} if table[TO_FIRST] is None else dict(
        zip((TO_FIRST, f'{TO_FIRST}_se'), estimators.mean_and_se(table[TO_FIRST]), strict=True))
    chosen = _chosen(table, k, v_min, seed)
    return {
        'pass@1': mean, 'pass@1_se': error, 'pass@k': at_k, 'pass@k_se': at_k_error, **chosen, 'k': k,
        'kl': kl_mean, 'kl_se': kl_error, **to_first,
        'kl_per_token': float(kl.sum() / sum(len(row['tokens']) for row in rows)),
        'truncated': float(np.mean([row['truncated'] for row in rows])),
        'abstained': float(np.mean([row['reward'] is None for row in rows])),
        'tokens_per_answer': float(np.mean([len(row['tokens']) for row in rows])),
        'occupancy': float(np.mean([row['occupancy'] for row in rows])),
        'n_examples': int(earned.shape[0]), 'n_samples': int(earned.shape[1]),
        # A greedy answer is drawn once for all of its samples.
        'seconds': float(sum(row['seconds'] for row in rows if row['temperature'] > 0 or row['sample'] == 0)),
        **_costs(rows, int(np.sum(earned >= v_max))),
    }


def _chosen(table: dict[str, Any], k: int, v_min: float, seed: int) -> Row:
    """Returns what one of k answers earns that is chosen by votes, scores, or both, with standard errors."""
    earned, scores = table['reward'], table['score']
    found: dict[str, list[np.ndarray]] = {'maj@k': []}
    if scores is not None:
        found.update({'best_of_k': [], 'weighted_maj@k': []})
    # As many choices of k as there are answers for: more voters than k would be another metric.
    for first in range(0, earned.shape[1] - k + 1, k):
        part = slice(first, first + k)
        votes, texts = ([group[part] for group in table[name]] for name in ('vote', 'text'))
        addresses = [f'{seed} tie {example} {first}' for example in table['id']]
        found['maj@k'].append(estimators.majority(votes, earned[:, part], addresses, v_min))
        if scores is not None:
            found['best_of_k'].append(estimators.best_of(scores[:, part], earned[:, part], texts, addresses))
            found['weighted_maj@k'].append(
                estimators.majority(votes, earned[:, part], addresses, v_min, scores[:, part] - v_min))
    row: Row = {'best_of_k': None, 'best_of_k_se': None, 'weighted_maj@k': None, 'weighted_maj@k_se': None}
    for name, columns in found.items():
        row[name], row[f'{name}_se'] = estimators.mean_and_se(np.stack(columns, axis=1))
    return row


def _costs(rows: Sequence[Row], right: int) -> Row:
    """Returns the mean cost of an answer, and of a right one; NaN if none is right."""
    totals = {name: float(sum(row[name] for row in rows)) for name in (*ledger.Work._fields, 'seconds')}
    return {f'{name}_per_{what}': total / number if number else math.nan for name, total in totals.items()
            for what, number in (('answer', len(rows)), ('right_answer', right))}


def by_example(rows: Sequence[Row], v_min: float) -> dict[str, Any]:
    """Returns one policy's rows by id.

    {'id': [N], 'reward': [N, M], 'kl': [N, M], 'text' and 'vote': N lists of M, 'score' and 'kl_to_first_reference':
    [N, M], or None unless every row has one}.
    """
    grouped: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row['id'], row['sample'])):
        grouped.setdefault(row['id'], []).append(row)
    members = list(grouped.values())

    def found(name: str) -> np.ndarray | None:
        return np.array([[row[name] for row in group] for group in members], np.float64) if all(
            name in row for row in rows) else None

    return {
        'id': list(grouped),
        'reward': np.array([[v_min if row['reward'] is None else row['reward'] for row in group] for group in members]),
        'kl': np.array([[row['kl'] for row in group] for group in members]),
        'text': [[row['text'].strip() for row in group] for group in members],
        'vote': [[row['vote'] for row in group] for group in members],
        'score': found('score'), TO_FIRST: found(TO_FIRST),
    }


def compare(rows: Sequence[Row], baseline: Sequence[Row], v_min: float, address: str) -> dict[str, float]:
    """Returns mean reward of `rows` minus that of `baseline` on the same examples, and how sure that is.

    Args:
      rows: of one policy.
      baseline: of another.
      v_min: least reward.
      address: of the bootstrap's draws.

    Returns:
      the difference ('' is its name), its paired standard error ('_se'), and its 95 % interval by the paired bootstrap
      ('_low', '_high').
    """
    first, second = by_example(rows, v_min), by_example(baseline, v_min)
    if first['id'] != second['id']:
        raise ValueError('a paired comparison needs both policies on the same examples.')
    mean, error = estimators.paired_difference(first['reward'], second['reward'])
    low, high = estimators.bootstrap_interval(first['reward'], second['reward'], address)
    return {'': mean, '_se': error, '_low': low, '_high': high}
