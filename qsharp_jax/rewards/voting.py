"""Which answers are one: the classes that a majority is counted over."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import itertools
import logging

from qsharp_jax.rewards import processes
from qsharp_jax.rewards.registry import Reward

Pair = tuple[str, str]

_logger = logging.getLogger(__name__)


def votes(reward: Reward, completions: Sequence[Sequence[str]], *, workers: int,
          timeout_seconds: float) -> list[list[str]]:
    """Returns the name of the class that each completion votes for, one of its answers; '' if it comes to no answer.

    Answers are one where the reward's own equivalence says so, or else where their texts are equal. Of answers that
    are all alike to the first of a class, though not to each other, the first decides: equivalence of texts is not
    always transitive. Names and classes do not depend on the order of completions.

    Args:
      reward: from `load`.
      completions: to each of several questions; only those to one question are compared.
      workers: processes that compare, as in `scoring.score`.
      timeout_seconds: for one pair; a pair that takes longer is not one.
    """
    term = reward.terms[reward.voting].registered
    answers = [[(term.final_answer(text) or '').strip() for text in texts] for texts in completions]
    different = [sorted({answer for answer in own if answer}, key=lambda answer: (len(answer), answer))
                 for own in answers]
    same: dict[Pair, bool] = {}
    if term.equivalent is not None:
        pairs = dict.fromkeys(pair for own in different for pair in itertools.combinations(own, 2))
        told = {pair: term.settled(*pair) for pair in pairs}
        unknown = [pair for pair, verdict in told.items() if verdict is None]
        same = {**{pair: bool(verdict) for pair, verdict in told.items()},
                **_compare(reward, unknown, workers, timeout_seconds)}
    return [[names[answer] if answer else '' for answer in own]
            for own, names in zip(answers, [_classes(own, same) for own in different], strict=True)]


def _classes(answers: Sequence[str], same: Mapping[Pair, bool]) -> dict[str, str]:
    """Returns the first member of each answer's class; pairs that are not known are not one."""
    firsts: list[str] = []
    names = {}
    for answer in answers:
        name = next((first for first in firsts if (first, answer) in same and same[first, answer]), None)
        if name is None:
            firsts.append(answer)
        names[answer] = answer if name is None else name
    return names


def _compare(reward: Reward, pairs: Sequence[Pair], workers: int, timeout_seconds: float) -> dict[Pair, bool]:
    registered = reward.terms[reward.voting].registered
    if workers == 0 and not registered.in_workers:
        assert registered.equivalent is not None
        return {pair: bool(registered.equivalent(*pair)) for pair in pairs}
    if not pairs:
        return {}
    outcomes = processes.run(reward, max(workers, 1), _same, [(reward.spec, *pair) for pair in pairs], timeout_seconds)
    failed = [pairs[number] for number in sorted((*outcomes.late, *outcomes.dead))]
    if failed:
        _logger.warning('reward %r: %d of %d pairs of answers took longer than %g s or killed their workers, and count '
                        'as different; the first is %r.', reward.spec, len(failed), len(pairs), timeout_seconds,
                        tuple(text[:100] for text in failed[0]))
    return {pair: bool(same) for pair, same in zip(pairs, outcomes.values, strict=True)}


def _same(spec: str, first: str, second: str) -> bool:
    reward = processes.reward_of_worker(spec)
    equivalent = reward.terms[reward.voting].registered.equivalent
    assert equivalent is not None
    return bool(equivalent(first, second))
