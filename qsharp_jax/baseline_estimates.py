"""What the training of policies beside Q♯ takes at most, counted from a config."""
from __future__ import annotations

from collections.abc import Mapping
import math
from typing import NamedTuple

import ml_collections

from qsharp_jax import policy_fit, policy_settings
from qsharp_jax.baselines import policies

PASSES = 3  # of a gradient step: forward, and twice that backward


class Trained(NamedTuple):
    """What policies and pairs take at most.

    Attributes:
      pairs: of a right and a wrong answer, to draw.
      drawn: answers to draw, those that make the curves included; of pairs as many as there are if none is drawn in
        vain.
      evaluated: answers to evaluate.
      passes: of a prompt with an answer through a network of the reference's shape, but for decoding what is evaluated.
      networks: of that shape that are kept.
    """

    pairs: int = 0
    drawn: int = 0
    evaluated: int = 0
    passes: int = 0
    networks: int = 0


def count(config: ml_collections.ConfigDict, questions: int, answers: Mapping[str, int]) -> Trained:
    """Returns what `config.baselines` asks for; the value network on pairs is not among it.

    Args:
      config: of the run.
      questions: that an iteration asks.
      answers: that are evaluated of a policy, by split.
    """
    baselines, select = config.baselines, config.eval.select_split
    methods = {name: policies.METHODS[name] for name in baselines.methods}
    paired = baselines.value_on_pairs or any(method.pairs for method in methods.values())
    pairs = paired * questions
    # The right answer may be the task's own.
    drawn = passes = pairs * (2 if baselines.right == 'sampled' else 1)
    evaluated = networks = 0
    for name, method in methods.items():
        rates = len(baselines[method.section].learning_rates)
        step = PASSES + method.reference
        if method.pairs:
            rounds = math.ceil(baselines.epochs * pairs / baselines.batch_size)
            own, learned = 0, 2 * rounds * baselines.batch_size * step
        else:
            _, batches, turns = policy_fit.round_shape(baselines, name)
            graded = policy_settings.answers_of(config, questions)
            rounds = math.ceil(graded / (baselines.batch_size * batches))
            own = rounds * baselines.batch_size * batches
            # GRPO asks the policy that drew once more.
            learned = own * (turns * step + (name == 'grpo'))
        # After rounds 1, 2, 4, ... and the last.
        curve = min(baselines.curve_examples, answers.get(select, 0)) * (rounds.bit_length() + 1)
        # Every rate on the split that one is chosen on, and the chosen one on the others.
        asked = sum(answers.values()) + (rates - 1) * answers.get(select, 0)
        drawn += rates * (own + curve)
        # The KL of an answer takes a pass of the policy and one of the reference.
        passes += rates * (own + curve + learned) + 2 * asked
        evaluated += asked
        networks += rates
    return Trained(pairs, drawn, evaluated, passes, networks)
