"""What a run takes at most, counted from its config and shapes, and how long that is at a rate that was measured."""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import math
from pathlib import Path
import re
import statistics

import jax
import ml_collections

from qsharp_jax import baseline_estimates, describe, experiment, ledger, results, sharding
from qsharp_jax.baseline_estimates import PASSES
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.metrics import read_rows
from qsharp_jax.models import pretrained, transformer
from qsharp_jax.progress import duration

_TOKEN_BYTES = 45  # of an answer's token in samples/: its id, its piece and its value as JSON; about so many were seen
# Shapes in configs/models by a pattern in a source's name, in lower case.
_SHAPES = {'llama-3-8b': 'llama_3_8b', 'llama-3.1-8b': 'llama_3.1_8b', 'llama-3-70b': 'llama_3_70b',
           'llama-3.1-70b': 'llama_3.1_70b', 'llama-3.2-1b': 'llama_3.2_1b', 'llama-3.2-3b': 'llama_3.2_3b',
           'qwen2.5-7b': 'qwen_2.5_7b', 'qwen2.5-1.5b': 'qwen_2.5_1.5b', 'qwen2.5-0.5b': 'qwen_2.5_0.5b',
           '/gpt2$': 'gpt2', '/gpt2-medium$': 'gpt2_medium'}
_ROOT = Path(__file__).resolve().parents[1]


def measured_rate(workdirs: Sequence[Path]) -> float | None:
    """Returns FLOPs a second while answers were decoded in these runs, the median over policies; None before any was.

    The FLOPs are counted (`ledger`), the seconds measured, so that the rate is of this machine and these models.
    """
    rates = [row['flops_per_answer'] / row['seconds_per_answer'] for workdir in workdirs
             for row in read_rows(workdir / 'results.jsonl') if row['seconds_per_answer']]
    return statistics.median(rates) if rates else None


def seconds_taken(workdir: Path) -> float:
    """Returns the seconds that a run has taken so far, of all its phases."""
    path = workdir / 'timings.json'
    return float(sum(json.loads(path.read_text()).values())) if path.exists() else 0.0


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a run takes at most, from its start.

    Attributes:
      collected: answers to collect.
      trained: answers to draw while other methods are trained.
      pairs: to be drawn for them; how many answers that takes is not known, and the least is counted.
      evaluated: answers to evaluate.
      flops: of pre-training, decoding and fitting.
      networks: bytes of finished value networks.
      disk: bytes of all that is kept.
    """

    collected: int
    trained: int
    pairs: int
    evaluated: int
    flops: float
    networks: int
    disk: float


@dataclasses.dataclass(frozen=True)
class Answers:
    """How many answers a run draws and learns from, from its start.

    Attributes:
      once: that an iteration collects.
      collected: in all iterations.
      fitted: that a value network is fitted to, summed over fits; each fit has all of D.
      guided: to evaluate, drawn with a value network.
      unguided: likewise, without.
    """

    once: int
    collected: int
    fitted: int
    guided: int
    unguided: int


def of_run(config: ml_collections.ConfigDict, workdir: Path, rate: float | None, shares: bool) -> list[str]:
    """Returns sentences on answers, FLOPs, time and disk of a run, from its start.

    Args:
      config: of the run.
      workdir: of the run.
      rate: FLOPs a second; None where nothing was measured.
      shares: as in `bounds`.
    """
    missing = _missing(config)
    if missing:
        return [f'what it takes is not known before its models are here: {missing.splitlines()[0]}']
    try:
        most = bounds(config, workdir, shares)
    except ValueError as error:  # what the run itself would stop with
        return [f'it would not run as things are here: {str(error).splitlines()[0]}']
    took = (f'{duration(most.flops / rate)} at the {rate / 1e9:,.3g} GFLOP/s that answers were decoded with here'
            if rate else 'time is told once a run of the plan has evaluated something')
    others = f', {most.trained:,} to train other methods' if most.trained else ''
    pairs = [f'counted at the fewest answers that they can take are {most.pairs:,} pairs: up to '
             f'{config.baselines.pair_tries:,} are drawn for each'] if most.pairs else []
    return [f'at most {most.collected:,} answers to collect{others} and {most.evaluated:,} to evaluate, of '
            f'{config.sampling.max_new_tokens} tokens', *pairs,
            f'at most {most.flops:.2e} FLOP: {took}',
            f'at most {most.disk / 2 ** 30:,.2f} GiB on disk, of which value networks {most.networks / 2 ** 30:,.2f}']


def bounds(config: ml_collections.ConfigDict, workdir: Path, shares: bool) -> Bounds:
    """Returns what a run takes at most: every answer as long as it may be, every candidate scored.

    Args:
      config: of the run.
      workdir: of the run.
      shares: whether the roll-outs of the first iteration and the reference's answers are another run's.

    Raises:
      ValueError: its models are neither here nor of a known shape.
    """
    parts = _outline(config, workdir)
    longest, fits_here = config.sampling.max_new_tokens, not config.value.run
    _, prompts, width = describe.training_prompts(parts)
    drawn, on_splits = answers(parts), asked(parts)
    collected = drawn.collected - shares * drawn.once
    own_cd, on_pairs = _own_cd(config), _on_pairs(config)
    questions = config.collect.examples or prompts
    beside = baseline_estimates.count(config, questions, on_splits) if fits_here else baseline_estimates.Trained()
    evaluated = drawn.guided + (0 if shares else drawn.unguided) + beside.evaluated
    reference = ledger.reference_cost(parts.reference_config)
    value = ledger.value_cost(parts.value_shape, parts.value_config, config.guidance.candidates)
    keys = width + longest / 2
    of_reference, of_value = float(reference.flops(1, keys, 1)), float(value.flops(1, keys, 1))
    # Roll-in and roll-out may both be as long as an answer may be; the first iteration's roll-ins are not guided.
    written = (2 * collected + evaluated) * longest
    by_value = (drawn.guided + drawn.collected - drawn.once) * longest * (1 + config.guidance.candidates)
    rates = len(config.fit.learning_rate_factors)
    read = rates * drawn.fitted * (width + longest) * config.fit.epochs
    # Of the reference and of each method at its chosen eta: what the value network says of them, and both references.
    chosen = (1 + len(config.eval.methods)) * on_splits[config.eval.split] if config.eval.split in on_splits else 0
    scored, compared = chosen * config.eval.reward_model, 2 * chosen * bool(config.value.run)
    # Each group of answers has its prompt once, and a prompt is prefilled once for all of its answers, at most.
    prefilled = (collected + evaluated) * width
    pretrained = config.reference.source == 'pretrain' and not config.reference.pretrain.run
    texts = beside.passes + pretrained * PASSES * config.reference.pretrain.steps * config.reference.pretrain.batch_size
    flops = ((written + prefilled + (texts + compared) * (width + longest)) * of_reference
             + (by_value + prefilled + PASSES * read + scored * (width + longest)) * of_value)
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.value_target))
    networks = (config.iterations + len(own_cd) + on_pairs) * fits_here
    shapes = transformer.param_shapes(parts.reference_config)
    decoders = (beside.networks + pretrained) * sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    unfinished = 3 * config.checkpoint.keep  # in each checkpoint parameters and two moments
    stored = 8 * (collected + 2 * beside.pairs) + _TOKEN_BYTES * evaluated  # bytes by token of an answer
    return Bounds(collected, beside.drawn, beside.pairs, evaluated, flops, networks * weights,
                  (1 + rates * unfinished) * networks * weights + (1 + unfinished) * decoders + stored * longest)


def answers(parts: experiment.Experiment) -> Answers:
    """Returns how many answers a run draws by itself, without those that other methods are trained and evaluated with.

    Args:
      parts: an outline.
    """
    config, plan = parts.config, results.plan_of(parts.config)
    questions = config.collect.examples or describe.training_prompts(parts)[1]
    once = 0 if config.value.run else questions * config.collect.samples
    fits = (*range(1, config.iterations + 1), *_own_cd(config))  # each has all of D up to its iteration
    fitted = sum(fits) * once + 2 * _on_pairs(config) * questions
    on_splits, guided, unguided = asked(parts), 0, 0
    for iteration in range(config.iterations + 1):
        # Those of the first iteration's network are evaluated with the one on pairs, too.
        for group in results.policies(plan, iteration) * (2 if _on_pairs(config) and iteration == 1 else 1):
            if group[0].guided:
                guided += sum(number * (len(group) if split in plan.sweep_splits else 1)
                              for split, number in on_splits.items())
            else:
                unguided += len(group) * sum(on_splits.values())
    return Answers(once, config.iterations * once, fitted, guided, unguided)


def asked(parts: experiment.Experiment) -> dict[str, int]:
    """Returns how many answers a policy gives on each split."""
    plan = results.plan_of(parts.config)
    return {split: plan.samples * _examples(parts, plan, split) for split in plan.splits}


def _own_cd(config: ml_collections.ConfigDict) -> list[int]:
    """Returns the iterations after which CD has a network of its own fitted."""
    return [iteration for iteration in range(1, config.iterations + 1)
            if results.needs_cd_network(config, iteration) and not config.value.run]


def _on_pairs(config: ml_collections.ConfigDict) -> bool:
    return bool(config.baselines.value_on_pairs and not config.value.run)


def _outline(config: ml_collections.ConfigDict, workdir: Path) -> experiment.Experiment:
    """Returns the parts of a run, with shapes that are known here in place of models of the hub."""
    known = _known(config)
    planned = config.copy_and_resolve_references()
    planned.reference.pretrain.run = ''  # a run before this one in the plan may not have trained it yet
    if not known:
        return experiment.outline(planned, workdir)
    planned.update_from_flattened_dict(known)
    return experiment.outline(planned, workdir, sharding.make_mesh(data=-1, fsdp=1, tensor=1))


def _known(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the shapes of models of the hub that are known here, by the key that names them."""
    known = {}
    for key, source in _sources(config).items():
        shape = next((file for name, file in _SHAPES.items() if re.search(name, source.lower())), None)
        if source.startswith('hf:') and shape:
            known[key] = str(_ROOT / 'configs' / 'models' / f'{shape}.json')
    return known


def _sources(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the checkpoints that a run starts from, by the key that names them."""
    reference, start = config.reference.source, config.reference.pretrain.start
    named = {'reference.source': '' if reference == 'pretrain' else reference,
             'reference.pretrain.start': start if reference == 'pretrain' else '', 'value.source': config.value.source}
    return {key: source for key, source in named.items() if source}


def _missing(config: ml_collections.ConfigDict) -> str:
    """Returns what there is to say of a model that is neither here nor of a known shape; '' where there is none."""
    known = _known(config)
    for key, source in _sources(config).items():
        if key not in known:
            try:
                pretrained.find(source)
            except ValueError as error:
                return str(error)
    return ''


def _examples(parts: experiment.Experiment, plan: results.Plan, split: str) -> int:
    """Returns how many questions of a split are asked; 0 where all are and their number is not known yet."""
    return plan.examples[split] or prompts_lib.task_config(parts.config.task).size(split) or 0
