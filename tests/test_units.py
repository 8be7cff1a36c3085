"""Units of work: each exactly once, and the shapes of their prompts."""
from __future__ import annotations

import itertools

import numpy as np
import pytest

from qsharp_jax import units
from qsharp_jax.data.prompts import Prompts

TOKENS = [[5], [1, 2, 3], [7, 7], [4, 3, 2, 1], [9, 9, 9], [6, 5]]
PROMPTS = Prompts(np.array([10, 13, 11, 40, 25, 12]), TOKENS, [str(tokens) for tokens in TOKENS], {})


@pytest.mark.parametrize('samples, policies', ((1, 1), (3, 1), (2, 3), (1, 2)))
@pytest.mark.parametrize('which', ((0, 1, 2, 3, 4, 5), (4, 1, 3), (2,), ()))
def test_every_unit_comes_once_example_by_example(which, samples, policies):
    found = units.units(which, samples, policies)
    assert list(zip(found.index.tolist(), found.samples.tolist(), found.policies.tolist())) == list(
        itertools.product(which, range(samples), range(policies)))


@pytest.mark.parametrize('longest', (1, 7, 8, 9, 100, 513))
@pytest.mark.parametrize('shared', (0, 5, 90))
def test_widths_are_few_and_the_last_holds_every_prompt(longest, shared):
    longest += shared
    found = units.widths(longest, shared)
    assert found == sorted(set(found)) and len(found) <= 3
    assert found[-1] == units.round_up(longest, 8) and all(width > shared and width % 8 == 0 for width in found)
    # No prompt takes more than twice its room, or little room.
    assert all(large - shared <= 2 * (small + 1 - shared) + 8 for small, large in zip(found, found[1:]))


@pytest.mark.parametrize('rows, per_example, shards, expected', (
    (64, 1, 1, 8), (64, 4, 1, 2), (64, 64, 1, 1), (4, 1, 1, 1), (64, 1, 8, 8), (64, 64, 8, 8), (1024, 8, 8, 16)))
def test_prompts_that_wait_take_an_eighth_of_the_rows_at_most_or_one_a_device(rows, per_example, shards, expected):
    assert units.prefilled_prompts(rows, per_example, shards) == expected


def test_the_width_holds_every_prompt():
    assert units.prompt_width(PROMPTS) == 8
    longer = Prompts(np.array([0, 1, 2]), [[1], [1] * 17, [1]], ['', '', ''], {})
    assert units.prompt_width(longer) == 24
    assert [units.round_up(number, 8) for number in (0, 1, 8, 9)] == [0, 8, 8, 16]
