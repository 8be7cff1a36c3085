"""The job: collect, aggregate, fit, guide, evaluate, report.

Every phase leaves its result in the work directory and is skipped when it is found there: the same command goes on
after a kill and ends with the same numbers.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import itertools
import json
import math
from pathlib import Path
import time
import warnings

import ml_collections

from qsharp_jax import baseline_runs, checkpoint, collect
from qsharp_jax import config as config_lib
from qsharp_jax import (config_rules, describe, experiment, first_reference, fit, fits, policy_settings, progress,
                        relabel, report, sharding)
from qsharp_jax import topology as topology_lib
from qsharp_jax.categorical import METHODS
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import read_rows, replace_text
from qsharp_jax.results import Evaluation, needs_cd_network, Plan, plan_of, policies
from qsharp_jax.types import Params

_NOTHING_YET = {'config.json', 'config.json.tmp', 'timings.json', 'timings.json.tmp'}


def run(config: ml_collections.ConfigDict, workdir: str | Path, dry_run: bool = False,
        topology: str = '', relabel_from: Path | None = None, relabel_iterations: int = 0) -> Path | None:
    """Runs an experiment to its end, or on from where it was killed, and returns the path of its report.

    Args:
      config: checked, from `config.load`.
      workdir: where everything the run makes is kept.
      dry_run: print what would run, and stop; the work directory is not touched.
      topology: of a dry run: TPUs to compile its programs for, such as 'v5e:4x4'; '' for none.
      relabel_from: work directory of a run of the same roll-outs, which are graded anew in place of being decoded.
      relabel_iterations: how many iterations of that run are taken; 0 for all.

    Raises:
      ValueError: a topology is given and it is no dry run, or there is no such topology; or as `relabel.adopt`.
    """
    directory = Path(workdir)
    if topology:
        if not dry_run:
            raise ValueError(f'--topology {topology} names devices that are only compiled for: add --dry_run.')
        chips = topology_lib.parse(topology)
        mesh = sharding.make_mesh(**config.mesh, devices=topology_lib.devices(chips))
        for line in fits.report(experiment.outline(config, directory, mesh), chips):
            print(line, flush=True)
        return None
    progress.set_seconds_between_lines(config.logging.progress_seconds)
    parts = experiment.outline(config, directory)
    if dry_run:
        print(describe.plan(parts))
        return None
    if relabel_from:
        relabel.check_source(config, relabel_from)  # before the work directory is this config's
    prepare(config, directory)
    print(describe.run(parts), flush=True)
    with timed(directory, 'reference'):
        parts = experiment.load(parts)
    # Now rather than after an iteration that was added.
    policy_settings.check_finished(config, directory, len(parts.prompts('train')))
    collect.check_questions(parts)
    ledger = prompts_lib.ledger_path(config.task)
    if ledger:
        replace_text(directory / ledger.name, ledger.read_text())
    if relabel_from:
        print(relabel.adopt(parts, relabel_from, relabel_iterations), flush=True)

    evaluation = Evaluation(parts, plan_of(config))
    values: Params = None
    networks = borrowed(parts) if config.value.run else []
    with timed(directory, 'evaluate 0'):
        evaluation.run(0, None)
    for iteration, values, own, methods in networks:
        with timed(directory, f'evaluate {iteration}'):
            evaluation.run(iteration, values, own, methods=methods)
    if networks:
        with timed(directory, 'compare references'):
            evaluation.compare_first(networks[-1][0])
        if config.eval.reward_model:
            with timed(directory, 'score answers'):
                evaluation.rank(networks[-1][0], networks[-1][1])
        return report.print_results(directory)
    cd_values: Params = None
    for iteration in range(1, config.iterations + 1):
        with timed(directory, f'collect {iteration}'):
            collect.collect_iteration(parts, iteration, values)
        with timed(directory, f'fit {iteration}'):
            values = fit.fit_iteration(parts, iteration, values)
        if needs_cd_network(config, iteration):
            with timed(directory, 'fit cd' if iteration == 1 else f'fit cd {iteration}'):
                cd_values = fit.fit_iteration(parts.for_cd, iteration, cd_values)
        else:
            cd_values = None
        with timed(directory, f'evaluate {iteration}'):
            evaluation.run(iteration, values, cd_values)
    if config.eval.reward_model:
        with timed(directory, 'score answers'):
            evaluation.rank(config.iterations, values)
    if config.baselines.value_on_pairs:
        with timed(directory, 'value on pairs'):
            baseline_runs.run_pairs(parts, evaluation)
    for method in config.baselines.methods:
        with timed(directory, f'train {method}'):
            baseline_runs.run_policy(parts, evaluation, method)
    return report.print_results(directory)


def borrowed(parts: Experiment) -> list[tuple[int, Params, Params, tuple[str, ...]]]:
    """Returns the networks of the run `value.run`, which guide another reference here, and the methods each is for.

    These are (iteration, the value network, CD's own or None, methods): the last for Q#, and before it, where it is
    another and other methods are evaluated, the one that they take (`eval.each_iteration`).

    Raises:
      ValueError: that run has finished none, or one of another tokenizer or shape.
    """
    source, config = Path(parts.config.value.run), parts.config
    finished = _finished(parts)
    if not finished:
        raise ValueError(f'value.run is {str(source)!r}, which holds no finished value network: name the work '
                         'directory of a run that has fitted one.')

    first_reference.outline(parts)  # refused now rather than when its answers are there
    last = max(finished)
    others = tuple(method for method in config.eval.methods if method != 'qsharp')
    values = _network(parts, last)
    of_others = last if config.eval.each_iteration else 1
    cd_values = _network(parts.for_cd, of_others) if needs_cd_network(config, of_others) else None
    if last == of_others or not others:
        return [(last, values, cd_values, METHODS)]
    return [(1, _network(parts, 1), cd_values, others), (last, values, None, ('qsharp',))]


def _finished(parts: Experiment) -> list[int]:
    """Returns the iterations of which there is a finished value network, increasing."""
    return sorted(int(path.parent.name.removeprefix('value_'))
                  for path in parts.value_dir(1).parent.glob(f'value_*/{checkpoint.VALUE_FILE}'))


def _network(parts: Experiment, iteration: int) -> Params:
    """Returns a finished network of the run `value.run`.

    Raises:
      ValueError: there is none of this iteration, or it is of another tokenizer or shape.
    """
    source, directory = parts.config.value.run, parts.value_dir(iteration)
    if not (directory / checkpoint.VALUE_FILE).exists():
        what = 'no network of CD\'s own' if parts.role == 'cd' else 'no value network'
        raise ValueError(f'value.run is {source!r}, which has {what} of iteration {iteration}: evaluate there what is '
                         'asked here (eval.methods, eval.each_iteration), or leave it out here; with '
                         "eval.cd_network 'shared' CD is guided by the network of Q#.")
    # Before its shapes, which may differ for the same reason.
    if checkpoint.load_meta(directory)['tokenizer'] != parts.tokenizer.fingerprint:
        raise ValueError(f'value.run is {source!r}, whose value network reads another tokenizer than the reference '
                         'here has: a value network guides policies of its own tokenizer only.')
    values, meta = checkpoint.restore_params(directory, parts.value_target)
    checkpoint.check_value_meta(meta, parts.value_meta(), allow_other=True)
    return values


def prepare(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Makes the work directory this config's, unless it holds a run that the config does not go on with.

    Raises:
      ValueError: the directory was written with another config, with the differences.
    """
    path = workdir / 'config.json'
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f'--workdir {workdir} is a file: name a directory.')
    # A run that was stopped before it made anything, by a config it could not work with perhaps, binds nobody.
    made = {file.name for file in workdir.iterdir()} - _NOTHING_YET if workdir.exists() else set()
    if made and path.exists():
        config_lib.check_resume(config_lib.from_json(path.read_text()), config)
    elif made:
        raise ValueError(f'--workdir {workdir} is not empty and holds no run (no config.json): choose another.')
    workdir.mkdir(parents=True, exist_ok=True)
    replace_text(path, config_lib.to_json(config) + '\n')


@contextlib.contextmanager
def timed(workdir: Path, phase: str) -> Iterator[None]:
    """Adds the seconds that a phase takes to timings.json; a resumed phase adds to what it took before."""
    path = workdir / 'timings.json'
    began = time.perf_counter()
    try:
        yield
    finally:
        timings = _timings(path)
        timings[phase] = timings.get(phase, 0.0) + time.perf_counter() - began
        replace_text(path, json.dumps(timings, indent=1) + '\n')


def _timings(path: Path) -> dict[str, float]:
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except ValueError as error:
        warnings.warn(f'{path} cannot be read ({error}): times are counted anew.', stacklevel=2)
        return {}


def config_of(workdir: Path) -> ml_collections.ConfigDict:
    """Returns the config of a run; ValueError if there is none."""
    path = workdir / 'config.json'
    if not path.exists():
        raise ValueError(f'--workdir {workdir} holds no run: it has no config.json.')
    return config_lib.from_json(path.read_text())


def open_run(workdir: Path, iteration: int = 0) -> tuple[Experiment, int, Params]:
    """Returns a run's parts, and a finished value network of it with the iteration that it is of.

    Args:
      workdir: of the run.
      iteration: whose network; 0 for the last finished one.

    Raises:
      ValueError: there is no run, or no such network.
    """
    config = config_of(workdir)
    parts = experiment.outline(config, workdir)
    # Before the reference: it would be pre-trained here if the run has not come so far.
    finished = _finished(parts)
    if not finished or (iteration and iteration not in finished):
        have = f'has finished {", ".join(map(str, finished))}' if finished else 'has finished none yet'
        raise ValueError(f'there is no value network of iteration {iteration or 1} in {workdir}: the run {have}.')
    chosen = iteration or finished[-1]
    parts = experiment.load(parts)
    values, meta = checkpoint.restore_params(parts.value_dir(chosen), parts.value_target)
    checkpoint.check_value_meta(meta, parts.value_meta(), allow_other=bool(config.value.run))
    return parts, chosen, values


def evaluate_checkpoint(workdir: Path, etas: Sequence[float], split: str, iteration: int, methods: Sequence[str],
                        examples: int, samples: int) -> None:
    """Evaluates a finished value network, adds the rows to results.jsonl, and prints the results.

    No row that is there is replaced, and the etas that the run has chosen stay.

    Args:
      workdir: of the run.
      etas: KL coefficients.
      split: of the task.
      iteration: as in `open_run`.
      methods: any of `categorical.METHODS`; others than 'qsharp' only of iteration 1.
      examples: prompts of the split; 0 for as many as the run evaluates of it.
      samples: answers a prompt; 0 for as many as the run draws.

    Raises:
      ValueError: there is no such network, method or eta, they do not fit the run's guidance, or results.jsonl has
        one of these policies already, of another number of answers.
    """
    if not etas or not all(0 < eta < math.inf for eta in etas):
        raise ValueError(f'--etas is {list(etas)}; every eta must be above 0 and finite (without guidance there is the '
                         'reference).')
    if not methods or set(methods) - set(METHODS):
        raise ValueError(f'--methods is {",".join(methods)!r}; it must be any of {", ".join(METHODS)}.')
    for name, number in (('examples', examples), ('samples', samples)):
        if number < 0:
            raise ValueError(f'--{name} is {number}; it must be 0 (as the run does) or more.')
    workdir = Path(workdir)
    asked = config_of(workdir)
    asked.eval.methods = tuple(methods)
    config_rules.check_values(config_lib.flatten(asked))
    parts, chosen, values = open_run(workdir, iteration)
    usual = plan_of(parts.config)
    if chosen != 1 and set(methods) - {'qsharp'} and not usual.each_iteration:
        raise ValueError(f'--methods {",".join(methods)} of iteration {chosen}: CD, VAS and FUDGE are evaluated on the '
                         'network of iteration 1 only, since later data are not the reference\'s own; unless '
                         'eval.each_iteration of the run is True.')
    plan = dataclasses.replace(
        usual, splits=(split,), select_split='', sweep_splits=(split,), etas=tuple(sorted(set(etas))),
        methods=tuple(methods), examples={split: examples or usual.examples.get(split, 0)},
        samples=samples or usual.samples, temperatures=usual.temperatures[:1])
    _check_new(parts, plan, chosen)
    evaluation = Evaluation(parts, plan, of_run=False)
    evaluation.run(0, None)
    cd_values: Params = None
    if needs_cd_network(parts.config, chosen, methods):
        if parts.config.value.run:
            cd_values = _network(parts.for_cd, chosen)
        else:
            for k in range(1, chosen + 1):  # each may start from the one before
                cd_values = fit.fit_iteration(parts.for_cd, k, cd_values)
    evaluation.run(chosen, values, cd_values)
    report.print_results(workdir)


def _check_new(parts: Experiment, plan: Plan, iteration: int) -> None:
    """Raises ValueError if results.jsonl has a policy of the plan, of another number of questions or answers."""
    [split] = plan.splits
    size = plan.examples[split] or len(parts.prompts(split)), plan.samples
    for row in read_rows(parts.workdir / 'results.jsonl'):
        for policy in itertools.chain.from_iterable(policies(plan, iteration)):
            there = row['n_examples'], row['n_samples']
            if there != size and (row['method'], row['iteration'], row['eta'], row['temperature'], row['split']) == (
                    policy.method, iteration, policy.eta, policy.temperature, split):
                raise ValueError(
                    f'results.jsonl has {policy.method} of iteration {iteration} at eta {policy.eta:g} on the {split} '
                    f'split already, of {there[0]} questions with {there[1]} answers each, and this would be '
                    f'{size[0]} with {size[1]}. Give other --etas, or --examples {there[0]} --samples {there[1]}; for '
                    'more of all policies, go on with the run and other eval.examples or eval.samples.')
