"""The runs of a table or figure of the paper: what is done, what is left and what it takes, and the doing of it."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import json
import math
from pathlib import Path
import shutil

import jax
import ml_collections

from qsharp_jax import baseline_runs, cli, commands
from qsharp_jax import config as config_lib
from qsharp_jax import estimates, experiment, plans, policy_settings, results, star_graph_records, train
from qsharp_jax.baselines import policies, pretraining
from qsharp_jax.categorical import METHODS
from qsharp_jax.config import Overrides
from qsharp_jax.evaluate import Evaluated, TO_FIRST
from qsharp_jax.metrics import read_rows
from qsharp_jax.plans import Job
from qsharp_jax.progress import duration
from qsharp_jax.report import publish
from qsharp_jax.report.comparison import Possible

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / 'docs' / 'results'  # with what the figure of star graphs was drawn from, by size
_POLICY = 'path/to/policy'  # where none is named


@dataclasses.dataclass(frozen=True)
class Planned:
    """A job with its place and configuration.

    Attributes:
      job: what it is.
      workdir: where it runs.
      config: checked and locked.
      overrides: that give this config, for a command line.
      shares: work directory that roll-outs are taken from; None for none.
    """

    job: Job
    workdir: Path
    config: ml_collections.ConfigDict
    overrides: Overrides
    shares: Path | None

    @property
    def command(self) -> str:
        """The command that does the same by hand."""
        flags = [f'--relabel_from={self.shares}', '--relabel_iterations=1'] if self.shares else []
        return commands.train(self.job.config, self.workdir, self.overrides, flags)

    @property
    def missing(self) -> list[str]:
        """Names of what is not in results.jsonl yet; none where the run is done."""
        if self.other_configuration:
            return ['what this configuration asks for']
        plan = results.plan_of(self.config)
        rows = [] if not (self.workdir / 'results.jsonl').exists() else read_rows(self.workdir / 'results.jsonl')
        there = {(row['method'], row['iteration'], row['eta'], row['temperature'], row['split']) for row in rows}
        chosen = {(row['method'], row['iteration'], row['split']) for row in rows if row['selected']}
        lacking = []
        for name, policy in self._evaluated(plan):
            eta = policy.eta if policy.guided else None
            swept = plan.sweep_splits if policy.guided else plan.splits
            wanted = [(name, policy.iteration, eta, policy.temperature, split) for split in swept]
            once = [(name, policy.iteration, split) for split in plan.splits if split not in swept]
            if not there.issuperset(wanted) or not chosen.issuperset(once):
                lacking.append(f'{name} {policy.iteration}')
        for method in [] if self.config.value.run else self.config.baselines.methods:
            rates = {f'{rate:g}' for rate in self.config.baselines[policies.METHODS[method].section].learning_rates}
            tried = [{f'{row["learning_rate"]:g}', *row['sweep']} for row in rows
                     if row['method'] == method and 'sweep' in row]
            if tried and not rates <= tried[0]:
                lacking.append(f'{method} at {", ".join(sorted(rates - tried[0], key=float))}')
        scored = any(row['scored_by'] is not None for row in rows if 'scored_by' in row)
        if self.config.eval.reward_model and not scored:
            lacking.append('scores of answers')
        if self.config.value.run and not any(TO_FIRST in row for row in rows):
            lacking.append('KL to the first reference')
        return list(dict.fromkeys(lacking))

    def _evaluated(self, plan: results.Plan) -> Iterator[tuple[str, Evaluated]]:
        """Yields each policy that the run leaves rows of, with the name of its method in them."""
        config, last = self.config, self.config.iterations
        others = last if plan.each_iteration else 1  # of which borrowed networks guide methods other than Q#
        for iteration in range(last + 1):
            meant = {method for method in METHODS
                     if not config.value.run or iteration == (last if method == 'qsharp' else others)}
            for policy in itertools.chain.from_iterable(results.policies(plan, iteration, meant)):
                yield policy.method, policy
        if config.value.run:  # nothing is trained then
            return
        if config.baselines.value_on_pairs:
            for policy in itertools.chain.from_iterable(results.policies(plan, 1)):
                yield policy.method + baseline_runs.PAIRS, policy
        for method in config.baselines.methods:
            yield method, Evaluated(method, 0, math.inf, plan.temperatures[0])

    @property
    def other_configuration(self) -> str:
        """What a run that is there has otherwise than this plan, in words; '' where it can go on."""
        path = self.workdir / 'config.json'
        if not path.exists():
            return ''
        try:
            config_lib.check_resume(config_lib.from_json(path.read_text()), self.config)
            if self.config.collect.examples and not self.config.value.run:
                policy_settings.check_finished(self.config, self.workdir, self.config.collect.examples)
        except ValueError as error:
            return str(error)
        return ''

    @property
    def status(self) -> str:
        """How far it is, in words."""
        if self.other_configuration:
            return 'there is another run in its place'
        if not self.missing:
            return 'done'
        path = self.workdir / 'timings.json'
        finished = list(json.loads(path.read_text())) if path.exists() else []
        return f'stopped in or after "{finished[-1]}"' if finished else 'to do'


def planned(name: str, size: str, root: Path, overrides: Overrides = (), policy: str = '',
            only: Sequence[str] = ()) -> list[Planned]:
    """Returns the runs of a table or figure.

    Args:
      name: as in `plans.jobs`.
      size: as in `plans.jobs`.
      root: directory of the work directories.
      overrides: dotted keys with texts, for all runs.
      policy: source of the other policy of table 7.
      only: names of jobs; none for all.

    Raises:
      ValueError: there is no such name, size or job; a key is wrong, or is what makes a job the one that it is; the
        other policy is not named.
    """
    jobs = plans.jobs(name, size)
    names = [job.name for job in jobs]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ValueError(f'--jobs names {", ".join(unknown)}; {_called(name)} at size {size} has {", ".join(names)}.')
    chosen = [job for job in jobs if not only or job.name in only]
    _check_overrides(chosen, overrides)
    found = []
    for job in chosen:
        # A model of the plan may be given as a path of one's own.
        keys = {key: text for key, text in job.keys.items() if key not in dict(overrides)}
        given = [*((key, text) for key, text in job.suits.items() if key not in dict(overrides)), *overrides]
        # One that is neither there nor to come is trained anew.
        if job.reference and (job.reference in [other.name for other in chosen]
                              or pretraining.is_finished(root / size / job.reference)):
            keys['reference.pretrain.run'] = str(root / size / job.reference)
        if job.guided_by:
            keys['value.run'] = str(root / size / job.guided_by)
        if job.other_policy:
            if not policy:
                raise ValueError(f'{_called(name)} guides another policy too: name its checkpoint with --policy, a '
                                 'folder or file of the same tokenizer, or leave it out with --jobs.')
            given = [(key, text) for key, text in given if key != 'reference.source']
            keys['reference.source'] = policy
        every = [*given, *keys.items()]
        found.append(Planned(job, root / size / job.name, config_lib.load(commands.from_here(job.config), every), every,
                             root / size / job.shares if job.shares else None))
    return found


def _called(name: str) -> str:
    return f'the figure {name}' if name == star_graph_records.NAME else f'table {name}'


def _check_overrides(jobs: Sequence[Job], overrides: Overrides) -> None:
    """Raises ValueError for a key that tells jobs apart, unless it names the one model of all of them."""
    for key, _ in overrides:
        alike = [job for job in jobs if not (job.other_policy and key == 'reference.source')]
        configs = [config_lib.flatten(config_lib.load(commands.from_here(job.config), list(job.keys.items())))
                   for job in alike]
        # A key that does not exist is refused, with the nearest names, where it is set.
        values = {keys[key] for keys in configs if key in keys}
        special = [job.name for job in alike if key in job.keys]
        if special and not key.endswith('.source') or key.endswith('.source') and len(values) > 1:
            raise ValueError(f'--config.{key} is not the same for all runs ({", ".join(special)} has a value of its '
                             'own): leave it out, or name the runs that it is for with --jobs.')


def possible(found: Sequence[Planned]) -> list[Possible]:
    """Returns the runs of a plan as tables name them where numbers are missing: with commands that run as they stand.

    Folders of data that are not named are 'path/to/…'. What a run takes from one that is not done is made before it.
    """
    made: dict[str, str] = {}
    plan = {one.job.name: one for one in found}
    for name, one in plan.items():
        before = [other for other in (one.job.shares, one.job.reference, one.job.guided_by) if other in made]
        shared = one.shares if one.job.shares in made or (one.shares and one.shares.exists()) else None
        whole = dataclasses.replace(one, overrides=[*one.overrides, *_folders(one.config)], shares=shared)
        made[name] = ' && '.join([*(made[other] for other in before if plan[other].status != 'done'), whole.command])
    return [Possible(one.workdir, one.config, made[name]) for name, one in plan.items()]


def _folders(config: ml_collections.ConfigDict) -> Overrides:
    """Returns the keys of folders that a run's task needs and that are not set, with texts to put paths in place of."""
    task = config.task[config.task.name]
    names = {'folder': config.task.name, 'test_folder': config.task.math.test_set}
    return [(f'task.{config.task.name}.{key}', f'path/to/{what}') for key, what in names.items()
            if key in task and not task[key]]


def table(name: str, workdirs: Sequence[Path], out: Path, plan: Sequence[Planned] = (), root: Path = cli.REPRODUCED,
          policy: str = '') -> str:
    """Writes a table of the paper, and returns it as Markdown; see `publish.write`.

    Args:
      name: one of `publish.NAMES`.
      workdirs: of runs.
      out: directory of the files.
      plan: runs that are named for missing numbers, before those of the paper's size.
      root: as in `planned`, for these.
      policy: as in `planned`, for these.

    Raises:
      ValueError: as `publish.write`.
    """
    planned_here = {one.workdir for one in plan}
    paper = [one for one in planned(name, 'paper', root, policy=policy or _POLICY) if one.workdir not in planned_here]
    return publish.write(name, workdirs, out, [*possible(plan), *possible(paper)])


def describe(found: Sequence[Planned]) -> str:
    """Returns what is done and what is left, with what it takes."""
    lines = []
    rate = estimates.measured_rate([one.workdir for one in found])
    for one in found:
        lines += [f'{one.job.name}: {one.status}', f'  {one.command}']
        if one.other_configuration:
            lines.append(f'  {one.other_configuration}')
        if one.shares:
            lines.append(f'  takes the first iteration and the reference\'s answers from {one.shares}')
        if one.status == 'done':
            lines.append(f'  took {duration(estimates.seconds_taken(one.workdir))}')
        else:
            lines += [f'  {line}' for line in estimates.of_run(one.config, one.workdir, rate, one.shares is not None)]
    left = sum(one.status != 'done' for one in found)
    if left:
        here = next(folder for folder in (found[0].workdir.absolute(), *found[0].workdir.absolute().parents)
                    if folder.exists())
        lines.append(f'free on disk where they are kept: {shutil.disk_usage(here).free / 2 ** 30:,.1f} GiB')
    return '\n'.join([*lines, f'{len(found) - left} of {len(found)} runs are done.'])


def _check(one: Planned) -> None:
    """Raises ValueError if a run would be refused, before those that come before it take their time."""
    if one.other_configuration:
        raise ValueError(f'{one.job.name}: {one.other_configuration} Or keep the runs of this configuration elsewhere, '
                         'with --root.')
    config = one.config.copy_and_resolve_references()
    config.reference.pretrain.run = ''  # a run before this one may not have trained it yet
    experiment.outline(config, one.workdir)


def run(name: str, size: str, root: Path, overrides: Overrides = (), policy: str = '', only: Sequence[str] = (),
        execute: bool = False) -> str:
    """Prints a plan; runs what is missing, if asked to; makes the table or figure of what there is, returned as text.

    Where there is no run of star graphs, their figure is that of the numbers that are kept with the documentation.

    Args:
      name: as in `planned`, as the others.
      size: as above.
      root: as above.
      overrides: as above.
      policy: as above.
      only: as above.
      execute: whether to run what is not done. A run that was stopped goes on.

    Raises:
      ValueError: as `planned`, or as a run.
    """
    found = planned(name, size, root, overrides, policy, only)
    print(describe(found), flush=True)
    for one in found if execute else []:
        if one.status != 'done':
            _check(one)
    for one in found if execute else []:
        if one.status == 'done':
            continue
        print(f'\n{one.job.name}: {one.command}', flush=True)
        shares = one.shares
        if shares and not (shares / 'config.json').exists():
            print(f'{shares} is not there: roll-outs are collected anew.', flush=True)
            shares = None
        train.run(one.config, one.workdir, relabel_from=shares, relabel_iterations=1)
        jax.clear_caches()  # the next run's programs are others
    made = [one.workdir for one in found if (one.workdir / 'results.jsonl').exists()]
    out = root / size / 'tables'
    if name != star_graph_records.NAME:
        text = table(name, made, out, found, root, policy)
    else:
        kept = _RESULTS / f'{name}_{size}.json'
        if not made and kept.exists():
            print(f'\nno run is in {root / size}: the figure is that of {kept}')
            made = [kept]
        if not made:
            return ''
        text = star_graph_records.write(made, out)
    print(f'\n{text}\nFiles: {out}')
    return text
