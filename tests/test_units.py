"""Units of work: each exactly once, in batches of one shape."""
from __future__ import annotations

import itertools

import numpy as np
import pytest

from qsharp_jax import units
from qsharp_jax.data.prompts import Prompts

TOKENS = [[5], [1, 2, 3], [7, 7], [4, 3, 2, 1], [9, 9, 9], [6, 5]]
PROMPTS = Prompts(np.array([10, 13, 11, 40, 25, 12]), TOKENS, [str(tokens) for tokens in TOKENS], {})


@pytest.mark.parametrize('samples, policies, batch_rows', (
    (1, 1, 1), (1, 1, 4), (3, 1, 4), (2, 3, 4), (2, 2, 5), (4, 2, 8), (1, 2, 64), (5, 1, 2)))
@pytest.mark.parametrize('which', ((0, 1, 2, 3, 4, 5), (4, 1, 3), (2,)))
def test_every_unit_comes_once_with_its_own_prompt(which, samples, policies, batch_rows):
    width = units.prompt_width(PROMPTS)
    met = []
    shapes = set()
    batches = list(units.batches(PROMPTS, which, samples, policies, batch_rows, width))
    for batch in batches:
        drawn = batch.units
        shapes.add(tuple(np.shape(field) for field in (*drawn, batch.policies, batch.index)))
        np.testing.assert_array_equal(drawn.real, np.arange(batch_rows) < batch.real)
        assert (drawn.lengths >= 1).all()  # prefill needs a token, also of a prompt that no row reads
        for row in range(batch_rows):
            prompt = drawn.prompts[drawn.rows[row]]
            length = drawn.lengths[drawn.rows[row]]
            index = batch.index[row]
            assert prompt[:length].tolist() == TOKENS[index] and not prompt[length:].any()
            assert drawn.examples[row] == PROMPTS.ids[index]
            if row < batch.real:
                met.append((index, drawn.samples[row], batch.policies[row]))
    # Example by example, so that rows share their prompts.
    assert met == list(itertools.product(which, range(samples), range(policies)))
    assert len(shapes) == 1
    assert all(batch.real == batch_rows for batch in batches[:-1]) and batches[-1].real > 0


def test_prompts_are_held_once():
    batch = next(units.batches(PROMPTS, range(6), 4, 2, 8, 8))
    assert batch.units.prompts.shape[0] == 2  # one that all eight rows answer, one to spare for a later batch
    assert set(batch.units.rows.tolist()) == {0}


def test_no_prompts_make_no_batch():
    assert not list(units.batches(PROMPTS, (), 4, 2, 8, 8))


def test_the_width_holds_every_prompt():
    assert units.prompt_width(PROMPTS) == 8
    longer = Prompts(np.array([0, 1, 2]), [[1], [1] * 17, [1]], ['', '', ''], {})
    assert units.prompt_width(longer) == 24
    assert [units.round_up(number, 8) for number in (0, 1, 8, 9)] == [0, 8, 8, 16]
