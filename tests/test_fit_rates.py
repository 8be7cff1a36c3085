"""A fit at several learning rates keeps the network of the least held-out loss, however often it is stopped."""
from __future__ import annotations

import json
from pathlib import Path
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from qsharp_jax import checkpoint, collect, experiment, fit, learner, train
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import read_rows
from tests import tiny

RATES = {'0.01', '1e-06', '0.3'}


class Killed(Exception):
    """Stands for the end of a process."""


def collected(data: Path, workdir: Path) -> Experiment:
    config = tiny.config(data, iterations=1, fit__learning_rate=0.01, fit__learning_rate_factors='1,1e-4,30',
                         fit__heldout_fraction=0.25)
    train.prepare(config, workdir)
    parts = experiment.load(experiment.outline(config, workdir))
    collect.collect_iteration(parts, 1, None)
    return parts


@pytest.fixture(scope='module')
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A run whose fit is finished without a stop."""
    parts = collected(data, tmp_path_factory.mktemp('rates') / 'straight')
    fit.fit_iteration(parts, 1, None)
    return parts


def test_the_rate_of_the_least_heldout_loss_is_kept(straight: Experiment) -> None:
    about = json.loads((straight.workdir / 'calibration' / 'iteration_1.json').read_text())
    assert set(about['sweep']) == RATES
    assert about['loss'] == min(about['sweep'].values()) == about['sweep'][f'{about["learning_rate"]:g}']
    last = {row['stage']: row['heldout_loss'] for row in read_rows(straight.workdir / 'metrics.jsonl')
            if 'heldout_loss' in row}
    assert last == {f'fit_1_{rate}': loss for rate, loss in about['sweep'].items()}
    assert len(set(last.values())) == 3
    state = learner.init(straight.init_value_params(), fit.optimizer_config(straight.config.fit, 1.0, 2))
    best = checkpoint.Checkpoints(straight.workdir / 'checkpoints' / f'fit_1_{about["learning_rate"]:g}')
    kept, _ = checkpoint.restore_params(straight.value_dir(1), straight.value_target)
    found = best.restore_latest(state)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, kept, found[0].params)


def test_a_rate_that_diverges_is_passed_over_and_several_need_not_all_end(
        straight: Experiment, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {'iterations': 1, 'fit__learning_rate': 0.01, 'fit__heldout_fraction': 0.25, 'logging__every_steps': 4}

    def parts(factors: str) -> Experiment:
        config = tiny.config(data, **keys, fit__learning_rate_factors=factors)
        workdir = tmp_path / factors
        train.prepare(config, workdir)
        shutil.copytree(straight.workdir / 'dataset', workdir / 'dataset', dirs_exist_ok=True)
        return experiment.load(experiment.outline(config, workdir))

    for _ in range(2):  # the second reads it back
        fit.fit_iteration(parts('1,1e40'), 1, None)
    meta = checkpoint.load_meta(tmp_path / '1,1e40' / 'checkpoints' / 'value_1')
    assert meta['learning_rate'] == 0.01 and meta['sweep']['0.01'] > 0 and meta['sweep']['1e+38'] is None
    assert 'the loss of fit_1_1e+38 is nan' in caplog.text
    # No checkpoint is of such numbers.
    state = learner.init(straight.init_value_params(), fit.optimizer_config(straight.config.fit, 1.0, 2))
    kept = checkpoint.Checkpoints(tmp_path / '1,1e40' / 'checkpoints' / 'fit_1_1e+38').restore_latest(state)
    assert kept is None or int(kept[0].step) < 4
    with pytest.raises(ValueError, match='the loss of fit_1 is nan .* new --workdir with --relabel_from='):
        fit.fit_iteration(parts('1e40'), 1, None)


@pytest.mark.parametrize('module, name, call', [
    (learner, 'init', 2), (learner, 'init', 3), (checkpoint, 'save_params', 1)])
def test_a_stop_between_rates_changes_nothing(straight: Experiment, data: Path, tmp_path: Path, module: Any, name: str,
                                              call: int) -> None:
    parts, real, calls = collected(data, tmp_path / 'killed'), getattr(module, name), []

    def dies(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, dies)
        fit.fit_iteration(parts, 1, None)
    fit.fit_iteration(parts, 1, None)
    for file in ('calibration/iteration_1.json', 'checkpoints/value_1/value.json', 'metrics.jsonl'):
        assert (parts.workdir / file).read_text() == (straight.workdir / file).read_text()
