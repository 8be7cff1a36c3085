"""What the paper reports (Q#, arXiv 2502.20548), as data: tables 1 to 7. Accuracies in per cent, KL in nats an answer.

Of figure 3 the paper gives no numbers.
"""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses

Numbers = Mapping[str, Mapping[str, float | None]]  # by method, and by name in results.jsonl

# How sources of checkpoints are recognised: a part of their last name, in lower case.
MODELS = {
    'Llama 3 8B': 'llama-3-8b', 'Llama 3.1 8B': 'llama-3.1-8b', 'Llama 3 70B': 'llama-3-70b',
    'Llama 3.1 70B': 'llama-3.1-70b', 'Llama 3.2 1B': 'llama-3.2-1b', 'Llama 3.2 3B': 'llama-3.2-3b',
    'Qwen 2.5 7B': 'qwen2.5-7b', 'Qwen 2.5 1.5B': 'qwen2.5-1.5b',
}
TASKS = {'gsm8k': 'GSM8K', 'math500': 'MATH', 'aime24': 'AIME 2024', 'quality': 'QuALITY'}
# How many there are, by split; those of QuALITY are not told.
QUESTIONS = {'test': {'gsm8k': 1319, 'math500': 500, 'aime24': 30}, 'validation': {'gsm8k': 747, 'math500': 750}}
# Of sampling and evaluation, in all tables (section 3.2, appendix D).
SETTINGS = {'sampling.temperature': 0.8, 'sampling.top_p': 0.9, 'sampling.max_new_tokens': 1024, 'eval.samples': 8}
# Of guidance and of the fits, likewise (appendices D and E).
GUIDANCE = {'guidance.candidates': 20, 'guidance.epsilon_cutoff': 0.0, 'guidance.outside': 'zero',
            'guidance.order': 'paper'}
FITS = {'collect.examples': 0, 'collect.samples': 16, 'collect.budget': 'fresh', 'collect.cut': 'uniform',
        'collect.drop_no_variation': True, 'fit.epochs': 5.0, 'fit.optimizer': 'adamw', 'fit.learning_rate': 2e-5,
        'fit.learning_rate_factors': (1.0,), 'fit.schedule': 'constant', 'fit.warmup_steps': 0,
        'fit.head_lr_multiplier': 1.0, 'fit.weight_decay': 0.01, 'fit.frozen_layers': 0, 'fit.init': 'base'}
CLIP_NORM = {'v': 5.0, 'q': 0.0}  # by the type of the value network
BATCH = 32  # answers
ETA, ITERATIONS = 0.1, 2


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to fit, as the lines of table 4 differ.

    Attributes:
      name: as it is shown; '' where the table has one way only.
      tokens: 'all' or 'single': tokens of an answer that carry loss.
      kind: 'v' or 'q': type of the value network.
      heads: values of `value.head` that are meant.
      iterations: how many; 0 for the last that there is.
      other_policy: whether the value network was fitted for another policy than the one it guides.
    """

    name: str = ''
    tokens: str = 'all'
    kind: str = 'v'
    heads: tuple[str, ...] = ('bernoulli', 'categorical')
    iterations: int = 0
    other_policy: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """What the paper reports of one value network.

    Attributes:
      task: key of `TASKS`.
      reference: key of `MODELS`, as the next.
      value: of the value network.
      numbers: by method and metric.
      variant: how the network is fitted.
      names: how methods are called here, where not as everywhere.
    """

    task: str
    reference: str
    value: str
    numbers: Numbers
    variant: Variant = Variant()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def setting(self) -> tuple[str, str, str]:
        """What it is of, whatever is fitted how."""
        return self.task, self.reference, self.value


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of the paper.

    Attributes:
      number: '1' to '7'.
      title: what it shows.
      split: 'test', or 'validation'.
      columns: what it has, in its order.
    """

    number: str
    title: str
    split: str
    columns: tuple[Column, ...]


def _usual(reference: tuple[float, float], cd: tuple[float, float, float] | None,
           qsharp: tuple[float, float, float]) -> Numbers:
    """Numbers of pass@1, maj1@8 and KL."""
    names = 'pass@1', 'maj@k', 'kl'
    found = {'reference': dict(zip(names, reference)), 'cd': dict(zip(names, cd or ())),
             'qsharp': dict(zip(names, qsharp))}
    return {method: numbers for method, numbers in found.items() if numbers}


def _ranked(reference: tuple[float, ...], qsharp: tuple[float, ...]) -> Numbers:
    names = 'pass@1', 'maj@k', 'best_of_k', 'weighted_maj@k'
    return {'reference': dict(zip(names, reference)), 'qsharp': dict(zip(names, qsharp))}


def _ablation(variant: Variant, gsm8k: float | None, math: float | None) -> tuple[Column, Column]:
    return (Column('gsm8k', 'Llama 3 8B', 'Llama 3.2 1B', {'qsharp': {'pass@1': gsm8k}}, variant),
            Column('math500', 'Llama 3.1 8B', 'Llama 3.2 1B', {'qsharp': {'pass@1': math}}, variant))


_ONE, _THREE, _QWEN = 'Llama 3.2 1B', 'Llama 3.2 3B', 'Qwen 2.5 1.5B'
_ABLATIONS = tuple(zip(*(
    _ablation(Variant('single prefix, V, distributional, 1 iteration', tokens='single', iterations=1), 80.5, 64.5),
    _ablation(Variant('all prefixes, Q, distributional, 1 iteration', kind='q', iterations=1), 81.4, 66.4),
    _ablation(Variant('all prefixes, V, MSE, 1 iteration', heads=('mse',), iterations=1), 81.4, 65.4),
    _ablation(Variant('all prefixes, V, distributional, 1 iteration', heads=('bernoulli',), iterations=1), 82.3, 67.4),
    _ablation(Variant('all prefixes, V, distributional, 2 iterations', heads=('bernoulli',), iterations=2), 83.5, 68.5),
    _ablation(Variant('all prefixes, V, categorical, 1 iteration', heads=('categorical',), iterations=1), None, None),
)))
_PPO = {'reference': {'pass@1': 68.4, 'maj@k': 72.4, 'kl_to_first_reference': 69.52},
        'qsharp': {'pass@1': 71.1, 'maj@k': 73.4, 'kl_to_first_reference': 60.53}}

TABLES = {table.number: table for table in (
    Table('1', 'references of 8B guided by a value network of 1B', 'test', (
        Column('gsm8k', 'Llama 3 8B', _ONE, _usual((69.1, 85.8), (77.8, 87.2, 6.39), (78.4, 88.1, 2.65))),
        Column('gsm8k', 'Llama 3.1 8B', _ONE, _usual((82.9, 90.5), (84.5, 90.9, 7.43), (85.1, 91.4, 3.67))),
        Column('math500', 'Llama 3 8B', _ONE, _usual((25.4, 34.3), (24.9, 34.3, 15.27), (27.1, 37.9, 7.14))),
        Column('math500', 'Llama 3.1 8B', _ONE, _usual((43.9, 57.0), (45.3, 59.0, 26.8), (46.7, 60.1, 8.69))))),
    Table('2', 'references of 70B guided by value networks of 1B and 3B', 'test', (
        Column('math500', 'Llama 3 70B', _ONE, _usual((45.6, 55.6), None, (46.4, 55.5, 3.12))),
        Column('math500', 'Llama 3 70B', _THREE, _usual((45.6, 55.6), None, (46.7, 55.3, 5.15))),
        Column('math500', 'Llama 3.1 70B', _ONE, _usual((60.6, 69.0), None, (63.1, 72.5, 4.98))),
        Column('math500', 'Llama 3.1 70B', _THREE, _usual((60.6, 69.0), None, (64.1, 72.7, 4.99))))),
    Table('3', 'the value network as a reward model', 'test', (
        Column('gsm8k', 'Llama 3 8B', _ONE, _ranked((69.1, 85.8, 85.9, 88.5), (78.4, 88.1, 86.0, 89.2))),
        Column('math500', 'Llama 3.1 8B', _ONE, _ranked((43.9, 57.0, 54.0, 59.2), (46.7, 60.1, 54.0, 60.6))))),
    Table('4', 'ablations, on validation', 'validation', (*_ABLATIONS[0], *_ABLATIONS[1])),
    Table('5', 'Qwen 2.5: 7B guided by 1.5B', 'test', (
        Column('gsm8k', 'Qwen 2.5 7B', _QWEN, _usual((76.1, 92.9), (79.0, 93.1, 5.37), (83.5, 93.8, 4.10))),
        Column('math500', 'Qwen 2.5 7B', _QWEN, _usual((58.6, 72.8), (60.7, 74.2, 7.07), (61.9, 74.8, 6.46))),
        # Nothing is said of what it was trained on; that it is the network of MATH is our reading.
        Column('aime24', 'Qwen 2.5 7B', _QWEN, _usual((9.3, 16.7), (13.5, 16.7, 9.95), (14.1, 20.0, 9.23))))),
    Table('6', 'QuALITY: multiple choice on long passages', 'test', (
        Column('quality', 'Qwen 2.5 7B', _QWEN, _usual((64.5, 72.0), (64.2, 66.3, 12.32), (68.1, 73.3, 7.90))),
        Column('quality', 'Llama 3.1 8B', _ONE, _usual((73.5, 79.3), (75.1, 79.3, 9.23), (75.9, 81.1, 8.88))))),
    Table('7', 'a value network on top of another policy', 'test', (
        Column('math500', 'Qwen 2.5 7B', _QWEN, _usual((58.6, 72.8), None, (61.9, 74.8, 6.46))),
        Column('math500', 'Qwen 2.5 7B', _QWEN, _PPO, Variant('another policy', other_policy=True),
               {'reference': 'PPO', 'qsharp': 'PPO + Q♯'}))),
)}
