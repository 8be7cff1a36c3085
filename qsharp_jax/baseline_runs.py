"""The methods beside Q#: each is trained at every learning rate, the best is chosen, and its rows join the results."""
from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from qsharp_jax import checkpoint, fit, pairs, policy_fit
from qsharp_jax.baselines import policies
from qsharp_jax.evaluate import Evaluated
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import read_rows, replace_text, ResultsFile
from qsharp_jax.results import Evaluation, needs_cd_network
from qsharp_jax.types import Params

PAIRS = '_pairs'  # ends the names of methods whose value network was fitted to pairs


def run_policy(parts: Experiment, evaluation: Evaluation, method: str) -> None:
    """Trains a policy at each learning rate and evaluates the one that is best on eval.select_split.

    Its rows say which rate that was (`learning_rate`), what each rate reached (`sweep`), and how many answers were
    graded in the training of one (`answers`).

    Args:
      parts: the run, loaded.
      evaluation: of the run, in which the reference has been evaluated.
      method: of `baselines.policies.METHODS`.
    """
    config = parts.config
    rates = config.baselines[policies.METHODS[method].section].learning_rates
    sweep: dict[float, float] = {}
    for rate in rates:
        trained = policy_fit.train(parts, method, rate)
        if len(rates) == 1:
            break
        answering = _answering(parts, method, trained)
        sweep[rate] = evaluation.measure(*answering, config.eval.select_split)['pass@1']
    # Of equals the smaller rate, which stays nearer to the reference.
    best = max(sorted(sweep), key=lambda rate: sweep[rate]) if sweep else rates[0]
    trained = policy_fit.train(parts, method, best)
    # Before its rows, by which a run is known to be done.
    replace_text(_chosen_path(parts.workdir, method), json.dumps({'directory': trained.name, 'learning_rate': best}))
    evaluation.run_policy(*_answering(parts, method, trained), {
        'learning_rate': best, 'sweep': {f'{rate:g}': reached for rate, reached in sweep.items()},
        'answers': trained.answers})


def run_pairs(parts: Experiment, evaluation: Evaluation) -> None:
    """Fits a value network to pairs of right and wrong answers, and adds the rows of what it guides to the results.

    Args:
      parts: the run, loaded.
      evaluation: of the run, in which the reference has been evaluated.
    """
    side = pairs.beside(parts)
    _, graded = pairs.read(parts)
    values = fit.fit_iteration(side, 1, None)
    cd_values = fit.fit_iteration(side.for_cd, 1, None) if needs_cd_network(parts.config, 1) else None
    evaluation.beside(side).run(1, values, cd_values)
    rows = read_rows(side.workdir / 'results.jsonl')
    ResultsFile(parts.workdir / 'results.jsonl').add(
        [{**row, 'method': row['method'] + PAIRS, 'answers': graded} for row in rows])


def chosen_policies(parts: Experiment) -> dict[str, Params]:
    """Returns the parameters of each finished policy by its method, of the learning rate that was chosen."""
    found = {}
    for method in policies.METHODS:
        path = _chosen_path(parts.workdir, method)
        if path.exists():
            directory = path.parent / json.loads(path.read_text())['directory']
            found[method] = checkpoint.restore_params(directory, policy_fit.float32_start(parts))[0]
    return found


def _answering(parts: Experiment, method: str, trained: policy_fit.Trained) -> tuple[Evaluated, Experiment, Any]:
    """Returns a policy to evaluate, the experiment whose reference it is, and what its KL to the real one is."""
    temperature = float(parts.config.sampling.temperature)
    evaluated = Evaluated(method, 0, math.inf, temperature, network=trained.digest)
    sampled = parts.policies([math.inf], [temperature])
    return (evaluated, dataclasses.replace(parts, reference_params=trained.params, reference_digest=trained.digest),
            policy_fit.make_divergence(parts, trained.params, sampled))


def _chosen_path(workdir: Path, method: str) -> Path:
    return workdir / 'checkpoints' / f'policy_{method}.json'
