"""What is trained beside Q#, counted by hand."""
from __future__ import annotations

from pathlib import Path

import pytest

from qsharp_jax import baseline_estimates, estimates
from tests import tiny

# 48 answers to learn from, six batches of them; 24 questions, 8 validation questions with 2 answers each.
SETTINGS = {'baselines__batch_size': 8, 'baselines__answers': 41, 'baselines__epochs': 2.5,
            'baselines__curve_examples': 4, 'baselines__right': 'answer', 'baselines__grpo__samples': 4,
            'baselines__grpo__batches': 2, 'baselines__grpo__passes': 3,
            'baselines__reinforce__learning_rates': '1e-3,1e-2',
            'baselines__grpo__learning_rates': '1e-3', 'baselines__dpo__learning_rates': '1e-3,1e-2,1e-1'}
VALIDATION, TEST = 16, 20


@pytest.mark.parametrize('methods, on_pairs, expected', [
    ('', False, (0, 0, 0, 0, 0)),
    # A right answer is the task's.
    ('', True, (24, 24, 0, 24, 0)),
    # Two rates, each with 48 answers, drawn and learned from (1 + 3), and a curve of 4 points (rounds 1, 2, 4 and 6).
    ('reinforce', False, (0, 2 * (48 + 16), 2 * VALIDATION + TEST, 2 * (48 * 4 + 16) + 2 * (2 * VALIDATION + TEST), 2)),
    # Three rounds of 16, each passed over three times with the reference, and once by the policy that drew.
    ('grpo', False, (0, 48 + 12, VALIDATION + TEST, 48 * (1 + 3 * 4 + 1) + 12 + 2 * (VALIDATION + TEST), 1)),
    # With one batch and one pass as well: six rounds of 8.
    ('grpo of one step', False, (0, 48 + 16, VALIDATION + TEST, 48 * (1 + 4 + 1) + 16 + 2 * (VALIDATION + TEST), 1)),
    # 2.5 passes over 24 pairs are 8 batches of 8, two texts each.
    ('dpo', False, (24, 24 + 3 * 20, 3 * VALIDATION + TEST,
                    24 + 3 * (2 * 64 * 4 + 20) + 2 * (3 * VALIDATION + TEST), 3)),
])
def test_counted_by_hand(data: Path, methods: str, on_pairs: bool, expected: tuple[int, ...]) -> None:
    name, single, _ = methods.partition(' of one step')
    changes = {'baselines__grpo__batches': 1, 'baselines__grpo__passes': 1} if single else {}
    config = tiny.config(data, **{**SETTINGS, **changes}, baselines__methods=name, baselines__value_on_pairs=on_pairs)
    assert baseline_estimates.count(config, 24, {'validation': VALIDATION, 'test': TEST}) == expected


@pytest.mark.usefixtures('one_device')
def test_pre_training_and_the_value_network_on_pairs_are_counted(data: Path, tmp_path: Path) -> None:
    def most(**changes: object) -> estimates.Bounds:
        return estimates.bounds(tiny.config(data, **changes), tmp_path, False)

    plain, longer, pairs = most(), most(reference__pretrain__steps=5), most(baselines__value_on_pairs=True)
    # One step more: 16 texts of up to 32 + 8 tokens, forward and backward; a token takes at least its 2 * 16 * 32 * 3
    # operations in the perceptron.
    assert longer.flops - plain.flops > 3 * 16 * 40 * 2 * 16 * 32 * 3
    assert pairs.networks == 3 * plain.networks / 2
    assert pairs.evaluated - plain.evaluated == 2 * 2 * 16 * 2  # two methods at two eta, on two splits of 8 questions
    swept = most(fit__learning_rate_factors='0.5,1,2')  # which reads D three times as often
    assert swept.disk > plain.disk and swept.networks == plain.networks
    read = most(fit__epochs=6)
    assert swept.flops == pytest.approx(read.flops)
    assert pairs.pairs == 24 and pairs.flops > plain.flops and pairs.disk > plain.disk
