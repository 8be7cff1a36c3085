"""KL to the reference that a borrowed value network was fitted for, against all answers that there are."""
from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import first_reference, sharding
from qsharp_jax.models import networks, transformer
from qsharp_jax.models.transformer import TransformerConfig

END, LONGEST, TEMPERATURE = 0, 3, 0.7
HOLE = 2  # an id that no token has
SHAPE = TransformerConfig(vocab_size=6, width=8, layers=1, heads=2, kv_heads=2, head_dim=4, mlp_width=16,
                          max_positions=16)
VOCAB = 5  # the last id is padding of the model's


def every_answer() -> list[tuple[int, ...]]:
    """All answers of at most three tokens, the last of them the end unless they were cut short."""
    tokens = [token for token in range(VOCAB) if token not in (END, HOLE)]
    ended = [(*middle, END) for size in range(LONGEST) for middle in itertools.product(tokens, repeat=size)]
    return ended + list(itertools.product(tokens, repeat=LONGEST))


@pytest.fixture(scope='module')
def two() -> tuple[Any, Any]:
    params = [transformer.init_params(jax.random.key(seed), SHAPE) for seed in (0, 1)]
    return tuple(jax.tree.map(lambda leaf: 1.5 * leaf if leaf.ndim > 1 else leaf, one) for one in params)


@pytest.fixture(scope='module')
def prompts() -> Any:
    return SimpleNamespace(ids=np.array([7, 4]), tokens=[(3, 1, 4), (1,)])


def log_probs(params: Any, prompts: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    run = SimpleNamespace(
        tokenizer=SimpleNamespace(vocab_size=VOCAB, holes=(HOLE,)), mesh=sharding.make_mesh(),
        config=SimpleNamespace(sampling=SimpleNamespace(temperature=TEMPERATURE)))
    return first_reference._log_probs(run, SHAPE, params, prompts, rows)


def steps(params: Any, sequence: tuple[int, ...]) -> np.ndarray:
    """Law of the token after these, one sequence at a time.  # [VOCAB]"""
    logits = np.asarray(networks.text_logits(SHAPE, params, jnp.asarray([[*sequence, 0]])))[0, -1, :VOCAB]
    odds = np.exp(logits.astype(np.float64) / TEMPERATURE)
    odds[HOLE] = 0
    return odds / odds.sum()


@pytest.mark.parametrize('example, prompt', [(7, (3, 1, 4)), (4, (1,))])
def test_log_probabilities_are_of_answers_and_of_all_of_them(
        two: tuple[Any, Any], prompts: Any, example: int, prompt: tuple[int, ...]) -> None:
    answers = every_answer()
    found = log_probs(two[0], prompts, [{'id': example, 'tokens': list(answer)} for answer in answers])
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-5)
    for answer, one in list(zip(answers, found, strict=True))[::5]:
        each = [steps(two[0], (*prompt, *answer[:place]))[token] for place, token in enumerate(answer)]
        assert one == pytest.approx(np.log(each).sum(), abs=1e-5)


def test_the_mean_over_answers_of_a_third_policy_is_its_kl_to_the_first(two: tuple[Any, Any], prompts: Any) -> None:
    """The guided policy moves the law of each step of p by an offset; its KL to q is found in two ways."""
    answers, prompt = every_answer(), (3, 1, 4)
    rows = [{'id': 7, 'tokens': list(answer)} for answer in answers]
    ratios = log_probs(two[0], prompts, rows) - log_probs(two[1], prompts, rows)
    offsets = 2 * np.random.default_rng(0).normal(size=VOCAB)
    to_p = to_q = mixed = 0.0
    for answer, ratio in zip(answers, ratios, strict=True):
        chance = log_pi_q = kl = 0.0
        for place, token in enumerate(answer):
            p, q = (steps(params, (*prompt, *answer[:place])) for params in two)
            pi = p * np.exp(offsets) / np.sum(p * np.exp(offsets))
            there = pi > 0
            kl += np.sum(pi[there] * np.log(pi[there] / p[there]))
            log_pi_q += np.log(pi[token] / q[token])
            chance += np.log(pi[token])
        to_p += np.exp(chance) * kl
        to_q += np.exp(chance) * log_pi_q
        mixed += np.exp(chance) * (kl + ratio)
    assert abs(to_q - to_p) > 1e-2
    assert mixed == pytest.approx(to_q, abs=1e-5)
