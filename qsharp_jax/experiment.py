"""Everything a run is made of, built from its config: devices, networks, tokenizer, prompts, reward."""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from qsharp_jax import categorical, checkpoint, decoding, references, rewards, sharding, units
from qsharp_jax.categorical import ReturnDistribution
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.data import tokenizer_pairs, tokenizers
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.models import networks, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.queue import Queue
from qsharp_jax.rollout import RolloutConfig
from qsharp_jax.types import Params, Policy, Reference, Value

_CANARIES = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """One run's parts. `outline` makes all of them but the weights of the reference, which `load` adds.

    Attributes:
      config: the locked configuration.
      workdir: where everything the run makes is kept.
      mesh: the devices.
      tokenizer: text to ids and back.
      reference_config: shape of the reference.
      reference_params: its parameters, on the mesh; None in an outline.
      reference_digest: names its weights.
      reference: π_ref.
      value_config: how the value network is cut from its base.
      value_shape: shape of the base, which is the reference or the checkpoint `value.source`.
      tokenizer_differences: special tokens, none of them used, that the base has otherwise than the reference.
      value_base_digest: names the weights of that checkpoint; '' for the reference, and in an outline.
      value: the value network.
      distribution: how its scores are read.
      reward: what an answer earns.
      eos_ids: every token that ends an answer.
      role: what its value networks are called in the work directory: 'value', or 'cd' for CD's own.
      splits: prompts of the splits that were asked for so far; see `prompts`.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    mesh: Mesh
    tokenizer: Any
    reference_config: transformer.TransformerConfig
    reference_params: Params
    reference_digest: str
    reference: Reference
    value_config: value_lib.ValueConfig
    value_shape: transformer.TransformerConfig
    tokenizer_differences: tokenizer_pairs.Differences
    value_base_digest: str
    value: Value
    distribution: ReturnDistribution
    reward: rewards.Reward
    eos_ids: tuple[int, ...]
    role: str = 'value'
    splits: dict[str, Prompts] = dataclasses.field(default_factory=dict)

    def rollout(self, iteration: int | None = None) -> RolloutConfig:
        """Returns how the units of an iteration are drawn; None is the last one, whose answers may be longest."""
        config = self.config
        cut = config.collect.cut
        if cut == 'guided':
            cut = 'start' if (iteration or config.iterations) == 1 else 'uniform'
        return RolloutConfig(config.sampling.max_new_tokens, cut=cut, budget=config.collect.budget)

    def guidance(self, method: str) -> decoding.Guidance:
        """Returns the guidance of a method (`categorical.METHODS`) by the value network."""
        guidance = self.config.guidance
        offset, outside = ('cd', 'average') if method == 'vas' else (method, guidance.outside)
        return decoding.Guidance(
            value=self.value, distribution=self.distribution, candidates=guidance.candidates,
            epsilon_cutoff=guidance.epsilon_cutoff, outside=outside, order=guidance.order, offset=offset,
            draft=guidance.draft)

    def policies(self, eta: Sequence[float], temperature: Sequence[float]) -> Policy:
        """Returns policies, on the host, with the sampler's top-k and top-p.  # [M], [M] -> [M] each

        KL is measured to the reference at the sampler's temperature, or at 1 if that is 0: a greedy choice is no
        distribution to compare with.
        """
        count, sampling = len(eta), self.config.sampling
        return Policy(
            eta=np.asarray(eta, np.float32), temperature=np.asarray(temperature, np.float32),
            top_k=np.full(count, sampling.top_k, np.int32), top_p=np.full(count, sampling.top_p, np.float32),
            reference_temperature=np.full(count, sampling.temperature or 1.0, np.float32))

    def queue(self, how: decoding.Guidance, value_params: Params, task: decoding.Task, prompts: Prompts, rows: int,
              seed: int, iteration: int = 0) -> Queue:
        """Returns the queue that draws units of these prompts; `value_params` from `decoding_params`, or None."""
        return Queue(self.mesh, self.reference, how, self.reference_params, value_params, self.eos_ids, task, prompts,
                     rows, seed, iteration)

    def answer_text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of an answer without the token that ended it."""
        ids = [int(token) for token in tokens]
        if ids and ids[-1] in self.eos_ids:
            ids = ids[:-1]
        return self.tokenizer.decode(ids)

    def prompts(self, split: str) -> Prompts:
        """Returns the prompts of a split."""
        if split not in self.splits:
            prompts = prompts_lib.load(self.config.task, split, self.tokenizer)
            check_prompts(self, prompts)
            self.splits[split] = prompts
        return self.splits[split]

    @functools.cached_property
    def value_axes(self) -> Any:
        """Logical axes of the value network's parameters."""
        return value_lib.logical_axes(self.value_config, self.value_shape)

    @property
    def value_target(self) -> Params:
        """The value network's parameters as jax.ShapeDtypeStructs with shardings; nothing is loaded."""
        base = transformer.param_shapes(self.value_shape)
        shapes = jax.eval_shape(self._start_value, base)
        return sharding.abstract(shapes, sharding.param_shardings(self.mesh, self.value_axes, shapes))

    def decoding_params(self, params: Params) -> Params:
        """Returns value parameters as `value.decoding_params` has them; None for None."""
        return params and value_lib.decoding_params(params, self.value_config, self.value_shape)

    @property
    def decoding_target(self) -> Params:
        """What `decoding_params` would return, as jax.ShapeDtypeStructs with shardings."""
        shapes = jax.eval_shape(self.decoding_params, self.value_target)
        return sharding.abstract(shapes, sharding.param_shardings(self.mesh, self.value_axes, shapes))

    def init_value_params(self) -> Params:
        """Returns the value network before any fit, on the mesh. The same in every iteration."""
        base = self.reference_params
        if self.config.value.source:
            base = references.load_value_base(
                self.config.value.source, self.value_config, self.value_shape, self.mesh)
        return sharding.born_sharded(self._start_value, self.mesh, self.value_axes)(base)

    def _start_value(self, base_params: Params) -> Params:
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0x7a1)
        return value_lib.init_value_params(key, self.value_config, base_params, self.value_shape)

    @property
    def dataset_dir(self) -> Path:
        """Where D is."""
        return self.workdir / 'dataset'

    @functools.cached_property
    def for_cd(self) -> Experiment:
        """The same with the value network that guides CD: fitted by squared error, unless it shares that of Q#."""
        if self.config.eval.cd_network == 'shared':
            return self
        distribution = categorical.make('mse', self.distribution.v_min, self.distribution.v_max)
        value_config = dataclasses.replace(self.value_config, num_scores=distribution.num_scores)
        return dataclasses.replace(
            self, value_config=value_config, distribution=distribution, role='cd',
            value=networks.value(self.value_shape, value_config, references.spares(self.mesh)))

    def value_dir(self, iteration: int) -> Path:
        """Where the finished value network of an iteration is."""
        return Path(self.config.value.run or self.workdir) / 'checkpoints' / f'{self.role}_{iteration}'

    def value_digest(self, iteration: int) -> str:
        """Returns a name for the value network of an iteration that changes when it does; '' for iteration 0."""
        if iteration == 0:
            return ''
        text = (self.value_dir(iteration) / checkpoint.VALUE_FILE).read_bytes()
        return hashlib.sha256(text).hexdigest()[:16]

    def value_meta(self) -> dict[str, Any]:
        """Returns what a value network is only valid with (see `checkpoint.check_value_meta`)."""
        return {
            'reference': self.reference_digest, 'tokenizer': self.tokenizer.fingerprint,
            'support': list(self.distribution.atoms), 'sampler': self.config.sampling.to_dict(),
            'budget': self.config.collect.budget, 'reward': self.reward.digest, 'base': self.value_base_digest,
        }


def outline(config: ml_collections.ConfigDict, workdir: Path, mesh: Mesh | None = None) -> Experiment:
    """Returns the experiment that a checked config describes without the reference's weights: `load` adds them.

    Nothing is computed or written. Whatever can be known to be wrong before anything costly is refused here.

    Args:
      config: of the run.
      workdir: where everything the run makes is kept.
      mesh: of devices that are only compiled for; None for the devices there are. With a mesh, networks need no
        weights, and where they are given by a config.json alone no tokenizer.

    Raises:
      ValueError: a package, file, or device is missing, or keys do not fit each other; in words.
    """
    planned = mesh is not None
    mesh = sharding.make_mesh(**config.mesh) if mesh is None else mesh
    shape, tokenizer = references.outline(config, mesh, planned)
    if not planned:
        references.check_run(config, workdir)
    value = config.value
    distribution = categorical.make(value.head, value.v_min, value.v_max, value.num_atoms, value.projection,
                                    value.sigma)
    value_config = value_lib.ValueConfig(
        num_scores=distribution.num_scores, kind=value.type, init=value.init, layers=value.layers or None,
        extra_layers=value.extra_layers, extra_input=value.extra_input, lookahead=value.lookahead,
        head_init=value.head_init)
    reference = references.network(shape, tokenizer)
    vocab_size = reference.vocab_size
    tokens = vocab_size - sum(hole < vocab_size for hole in tokenizer.holes)
    if config.guidance.candidates > tokens:
        raise ValueError(f'guidance.candidates is {config.guidance.candidates}, but the vocabulary has '
                         f'{tokens} tokens: lower it.')
    value_shape, value_tokenizer = references.value_outline(config, shape, tokenizer, planned)
    eos_ids = prompts_lib.eos_ids(config.task, tokenizer)
    differences: tokenizer_pairs.Differences = {}
    unknown = any(isinstance(one, tokenizers.UnknownTokenizer) for one in (tokenizer, value_tokenizer))
    if config.value.source and not unknown:
        differences = tokenizer_pairs.compare(tokenizer, value_tokenizer)
        tokenizer_pairs.check_used(differences, eos_ids, 'ends an answer')
        if value_shape.vocab_size < vocab_size:
            raise ValueError(f'the checkpoint of value.source has {value_shape.vocab_size} ids, and the tokenizer of '
                             f'the reference {vocab_size}: a value network must read every id. Choose another.')
    trunk = value_lib.trunk_config(value_config, value_shape)
    if config.fit.frozen_layers > trunk.layers:
        raise ValueError(f'fit.frozen_layers is {config.fit.frozen_layers}, but the value network has {trunk.layers} '
                         'layers.')
    _check_rows(config, mesh)
    _check_splits(config)
    return Experiment(
        config=config, workdir=workdir, mesh=mesh, tokenizer=tokenizer, reference_config=shape,
        reference_params=None, reference_digest='', reference=reference,
        value_config=value_config, value_shape=value_shape, tokenizer_differences=differences, value_base_digest='',
        value=networks.value(value_shape, value_config, references.spares(mesh)), distribution=distribution,
        reward=rewards.load(config.reward), eos_ids=eos_ids)


def load(parts: Experiment) -> Experiment:
    """Returns the experiment with its reference, loaded or pre-trained; the reward is tried out before that.

    Raises:
      ValueError: the weights are missing or damaged, the reward does not work, or prompts and answers do not fit.
    """
    prompts = parts.prompts('train')
    asked = parts.config.collect.examples
    if asked > len(prompts):
        raise ValueError(f'collect.examples is {asked}, but the train split has {len(prompts)} prompts that can be '
                         'asked: lower it, or enlarge the split.')
    _check_warmup(parts.config, asked or len(prompts))
    tokenizer_pairs.warn(parts.tokenizer_differences)
    needed = units.prompt_width(prompts) + parts.rollout().buffer
    most = min(parts.reference_config.max_positions, parts.value_shape.max_positions)
    if needed > most:
        who = 'reference' if most == parts.reference_config.max_positions else 'value network'
        raise ValueError(f'the longest prompt and answer take {needed} positions, and the {who} has {most}: lower '
                         f'sampling.max_new_tokens, which is {parts.config.sampling.max_new_tokens}, or '
                         'task.max_prompt_tokens.')
    _grade_canaries(parts)
    params, digest = references.load(
        parts.config, parts.reference_config, parts.tokenizer, parts.workdir, parts.mesh)
    return dataclasses.replace(
        parts, reference_params=params, reference_digest=digest,
        value_base_digest=references.fingerprint(parts.config.value.source))


def check_prompts(parts: Experiment, prompts: Prompts) -> None:
    """Raises ValueError if prompts hold ids that a network does not have, or that the two networks know differently."""
    used = set().union(*prompts.tokens)
    if max(used) >= parts.reference.vocab_size:
        raise ValueError(f'a prompt holds the token {parts.tokenizer.pieces([max(used)])[0]!r} with id {max(used)}, '
                         f'and the reference has {parts.reference.vocab_size} ids: change task.template.')
    tokenizer_pairs.check_used(parts.tokenizer_differences, used, 'prompts hold')


def _check_rows(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError unless every batch splits evenly over the devices."""
    for name, rows in (('collect.batch_rows', config.collect.batch_rows), ('eval.batch_rows', config.eval.batch_rows)):
        sharding.check_divisible(rows, mesh, name)
    if config.reference.source == 'pretrain':
        sharding.check_divisible(config.reference.pretrain.batch_size, mesh, 'reference.pretrain.batch_size')
    if config.baselines.methods:
        sharding.check_divisible(config.baselines.batch_size, mesh, 'baselines.batch_size')


def _check_warmup(config: ml_collections.ConfigDict, examples: int) -> None:
    """Raises ValueError if a warm-up would take all the steps of the pre-training, or all that the first fit can have.

    Found at the fit, it would cost what was collected: a run's fit cannot be changed.
    """
    fit = config.fit
    train = examples - max(round(fit.heldout_fraction * examples), 1 if fit.heldout_fraction else 0)
    groups = train * math.ceil(config.collect.samples / fit.samples_per_row)
    most = {'fit': (fit, math.ceil(fit.epochs * math.ceil(groups / fit.batch_size)))}
    if config.reference.source == 'pretrain':
        most['reference.pretrain'] = config.reference.pretrain, config.reference.pretrain.steps
    for name, (section, steps) in most.items():
        if section.schedule == 'cosine' and section.warmup_steps >= steps:
            raise ValueError(f"{name}.warmup_steps is {section.warmup_steps}, and all the steps there are may be "
                             f"{steps}: with {name}.schedule 'cosine' the warm-up must be shorter.")


def _check_splits(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if a split is evaluated that there is not, or more of its examples than it is known to have."""
    task = prompts_lib.task_config(config.task)
    for name, key, split in (('split', 'examples', config.eval.split),
                             ('select_split', 'select_examples', config.eval.select_split)):
        if split and split not in task.splits:
            raise ValueError(f'eval.{name} is {split!r}, and task.{config.task.name} has the splits '
                             f'{", ".join(task.splits)} only: name one of them, or the file of the other.')
        size = task.size(split) if split else None
        if size is not None and config.eval[key] > size:
            raise ValueError(f'eval.{key} is {config.eval[key]}, but the {split} split of task.{config.task.name} has '
                             f'{size} examples: lower the one, or raise the other.')


def _grade_canaries(parts: Experiment) -> None:
    """Grades a right and a wrong answer to a few training questions, before anything costly."""
    prompts = parts.prompts('train')
    rewards.check_columns(parts.reward, prompts.columns)
    if 'answer' in prompts.columns:
        few = slice(0, _CANARIES)
        rewards.check_canaries(
            parts.reward, prompts.texts[few], prompts.columns['answer'][few],
            {name: column[few] for name, column in prompts.columns.items()}, **parts.config.reward_options)


def grade(experiment: Experiment, prompts: Prompts, index: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Returns the reward of each answer, NaN where the reward abstained; refused outside the support.  # [n] float64

    Args:
      experiment: the run.
      prompts: of the split that the answers belong to.
      index: row number in `prompts` of each answer's question.  # [n]
      texts: the answers.
    """
    result = rewards.score(
        experiment.reward, [prompts.texts[i] for i in index], list(texts),
        {name: [column[i] for i in index] for name, column in prompts.columns.items()},
        **experiment.config.reward_options)
    try:
        experiment.distribution.check_rewards(result)
    except ValueError as error:
        row = next(row for row, earned in enumerate(result) if not _fits(experiment, earned))
        raise ValueError(f'reward {experiment.reward.spec!r} returned {result[row]:g} in row {row}, for the completion '
                         f'{texts[row]!r}: {error} With another range, a new --workdir and --relabel_from='
                         f'{experiment.workdir} take over what was decoded.') from error
    return experiment.distribution.at_ends(result)


def _fits(experiment: Experiment, reward: float) -> bool:
    try:
        experiment.distribution.check_rewards(np.array([reward]))
    except ValueError:
        return False
    return True
