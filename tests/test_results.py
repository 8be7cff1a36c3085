"""Which policies are evaluated when."""
from __future__ import annotations

import dataclasses
import math
from pathlib import Path
import types

import pytest

from configs import default
from qsharp_jax import results
from qsharp_jax.evaluate import Evaluated

PLAN = results.Plan(
    splits=('validation', 'test'), select_split='validation', sweep_splits=('validation', 'test'),
    examples={'validation': 4, 'test': 8}, samples=2, etas=(0.1, 0.5), methods=('qsharp', 'cd', 'fudge'),
    temperatures=(0.8, 1.0, 0.0), each_iteration=False)


def test_iteration_0_is_the_reference_at_each_temperature():
    assert results.policies(PLAN, 0) == [[
        Evaluated('reference', 0, math.inf, 0.8), Evaluated('reference', 0, math.inf, 1.0),
        Evaluated('reference', 0, math.inf, 0.0)]]
    assert not any(evaluated.guided for evaluated in results.policies(PLAN, 0)[0])


@pytest.mark.parametrize('iteration', (1, 2, 5))
def test_cd_and_fudge_are_of_the_first_iteration_only(iteration):
    groups = {group[0].method: group for group in results.policies(PLAN, iteration)}
    assert set(groups) == ({'qsharp', 'cd', 'fudge'} if iteration == 1 else {'qsharp'})
    for method, group in groups.items():
        # What decodes in one batch shares a network and a kind of offset, and the sampler its value is of.
        assert {(evaluated.method, evaluated.iteration, evaluated.temperature) for evaluated in group} == {
            (method, iteration, 0.8)}
        assert all(evaluated.guided for evaluated in group)
        # FUDGE's weight does not depend on eta.
        assert [evaluated.eta for evaluated in group] == ([0.1] if method == 'fudge' else [0.1, 0.5])


def test_cd_and_fudge_may_be_of_every_iteration():
    plan = dataclasses.replace(PLAN, each_iteration=True)
    for iteration in (1, 2, 5):
        groups = results.policies(plan, iteration)
        assert [group[0].method for group in groups] == ['cd', 'qsharp', 'fudge']
        assert {evaluated.iteration for group in groups for evaluated in group} == {iteration}
    config = default.get_config()
    config.eval.cd_network, config.eval.methods = 'own', ('cd', 'qsharp')
    assert [results.needs_cd_network(config, iteration) for iteration in (1, 2)] == [True, False]
    config.eval.each_iteration = True
    assert results.needs_cd_network(config, 2) and results.plan_of(config).each_iteration
    config.eval.methods = ('fudge', 'qsharp')
    assert not results.needs_cd_network(config, 1)


def test_policies_have_rows_of_their_own():
    keys = [tuple(evaluated.key.items()) for iteration in range(3)
            for group in results.policies(PLAN, iteration) for evaluated in group]
    assert len(set(keys)) == len(keys) == 3 + 5 + 2


def test_the_plan_of_a_config():
    config = default.get_config()
    with config.unlocked():
        config.eta, config.sampling.temperature = 0.2, 0.7
        config.eval.etas, config.eval.reference_temperatures = (0.5, 0.2, 0.5, 0.1), (1.0, 0.7)
        config.eval.select_split, config.eval.split = 'validation', 'test'
    plan = results.plan_of(config)
    assert plan.splits == plan.sweep_splits == ('validation', 'test')  # eta is chosen before it is used
    config.eval.every_eta = False
    assert results.plan_of(config).sweep_splits == ('validation',)
    assert plan.etas == (0.1, 0.2, 0.5)  # each once
    assert plan.temperatures == (0.7, 1.0)  # the sampler's own first, once
    config.eval.etas = (0.5,)
    assert results.plan_of(config).etas == (0.2, 0.5)  # the config's own is among them
    config.eval.select_split = ''
    assert results.plan_of(config).splits == ('test',)
    config.eval.select_split = 'test'
    assert results.plan_of(config).splits == ('test',)


def test_of_equal_etas_the_weakest_guidance_is_chosen(tmp_path: Path) -> None:
    evaluation = results.Evaluation(types.SimpleNamespace(
        workdir=tmp_path, distribution=types.SimpleNamespace(v_min=0.0)), PLAN)
    group = [Evaluated('qsharp', 1, eta, 0.8) for eta in (0.2, 0.4, 0.1)]

    def best(*rewards: float) -> float:
        for policy, reward in zip(group, rewards, strict=True):
            evaluation._answers['validation', policy] = [
                {'id': 0, 'sample': 0, 'reward': reward, 'kl': 0.0, 'text': '', 'vote': ''}]
        return evaluation._best(group, 'validation')

    assert best(0.5, 0.5, 0.5) == 0.4 and best(0.5, 0.5, 0.6) == 0.1 and best(0.5, 0.4, 0.5) == 0.2
