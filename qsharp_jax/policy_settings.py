"""What a policy that is trained depends on, so that a finished one is never taken for another."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from qsharp_jax import checkpoint, pairs
from qsharp_jax.baselines import policies


def name_of(method: str, learning_rate: float) -> str:
    """Returns the name of a finished policy's directory below checkpoints/."""
    return f'policy_{method}_{learning_rate:g}'


def answers_of(config: ml_collections.ConfigDict, questions: int) -> int:
    """Returns how many answers a method that draws its own may have graded.

    Args:
      config: of the run.
      questions: for training.
    """
    collected = (config.collect.examples or questions) * config.collect.samples
    return int(config.baselines.answers or config.iterations * collected)


def settings_of(config: ml_collections.ConfigDict, method: str, learning_rate: float, questions: int) -> dict[str, Any]:
    """Returns what a policy depends on besides what no run may change.

    Args:
      config: of the run.
      method: of `baselines.policies.METHODS`.
      learning_rate: of the training.
      questions: for training.
    """
    baselines = config.baselines
    kind = policies.METHODS[method]
    common = ('batch_size', 'optimizer', 'weight_decay', 'clip_norm', 'warmup_share', 'schedule', 'end_share')
    own = {name: value for name, value in baselines[kind.section].items() if name != 'learning_rates'}
    data = ({name: baselines[name] for name in ('epochs', *pairs.SETTINGS)} if kind.pairs
            else {'answers': answers_of(config, questions)})
    return {'learning_rate': learning_rate, **{name: baselines[name] for name in common}, **own, **data}


def check(saved: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    """Raises ValueError if a policy was trained with other settings than now.

    Args:
      saved: from `settings_of`, when it was trained.
      now: from there.
      directory: of the policy.
    """
    differ = [f'{name} was {saved.get(name)!r}, now {value!r}' for name, value in now.items()
              if saved.get(name) != value]
    if differ:
        raise ValueError(f'{directory} was trained with other settings of config.baselines: {"; ".join(differ)}. Give '
                         'them back their values (answers are as many as Q# collects, unless config.baselines.answers '
                         'says how many), or delete that directory to train again.')


def check_finished(config: ml_collections.ConfigDict, workdir: Path, questions: int) -> None:
    """Raises ValueError if a policy that is finished was trained with other settings than the config has now.

    Args:
      config: of the run.
      workdir: of the run.
      questions: for training.
    """
    for method in config.baselines.methods:
        for rate in config.baselines[policies.METHODS[method].section].learning_rates:
            directory = workdir / 'checkpoints' / name_of(method, rate)
            if (directory / checkpoint.VALUE_FILE).exists():
                check(checkpoint.load_meta(directory)['settings'], settings_of(config, method, rate, questions),
                      directory)
