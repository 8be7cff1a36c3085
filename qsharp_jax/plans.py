"""Which runs a table or figure of the paper needs, at three sizes."""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses

from qsharp_jax import star_graph_records
from qsharp_jax.report import publish

NAMES = (*publish.NAMES, star_graph_records.NAME)
SIZES = ('tiny', 'small', 'paper')

Keys = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of experiments/train.py.

    Attributes:
      name: of its work directory; tables that need the same run share it.
      config: file and size.
      keys: what it changes of that: what makes it this job, so that no command line may change it.
      shares: name of a job with the same roll-outs, from which those of the first iterations are taken; '' for none.
      reference: name of a job that pre-trains the same reference; '' for none.
      guided_by: name of a job whose value network guides here; '' for its own.
      other_policy: whether its reference is the policy that the command line names (`--policy`).
      suits: keys of the slice that its pair of models was compiled for (docs/scaling.md), for a command line to change.
    """

    name: str
    config: str
    keys: Keys = dataclasses.field(default_factory=dict)
    shares: str = ''
    reference: str = ''
    guided_by: str = ''
    other_policy: bool = False
    suits: Keys = dataclasses.field(default_factory=dict)


_L31_8B = {'reference.source': 'hf:meta-llama/Llama-3.1-8B-Instruct'}
_L3_70B = {'reference.source': 'hf:meta-llama/Meta-Llama-3-70B-Instruct'}
_L31_70B = {'reference.source': 'hf:meta-llama/Llama-3.1-70B-Instruct'}
_3B = {'value.source': 'hf:meta-llama/Llama-3.2-3B-Instruct'}
_QWEN = {'reference.source': 'hf:Qwen/Qwen2.5-7B-Instruct', 'value.source': 'hf:Qwen/Qwen2.5-1.5B-Instruct'}
# v5e:2x4 holds 8B with 1B, v5e:2x2 Qwen's 7B with 1.5B, v5p:2x2x2 70B with either.
_EIGHT = {'mesh.data': '1', 'mesh.tensor': '8', 'value.scan_layers': 'True', 'fit.accumulate': '4'}
_FOUR = {'mesh.data': '1', 'mesh.tensor': '4', 'value.scan_layers': 'True', 'fit.accumulate': '8',
         'collect.batch_rows': '32', 'eval.batch_rows': '32'}
# The articles of QuALITY leave room for fewer rows.
_LONG = {'fit.accumulate': '16', 'collect.batch_rows': '8', 'eval.batch_rows': '8'}
# The network of MATH, on AIME's questions: what the paper trained on for these is not told.
_AIME = {'task.math.test_set': 'aime24', 'eval.select_split': ''}
_OTHER = {'eval.methods': 'qsharp'}
_QSHARP = {'baselines.methods': '', 'baselines.value_on_pairs': 'False', 'eval.methods': 'qsharp'}
_EVERY_METHOD = {'baselines.methods': 'reinforce,reinforce_greedy,grpo,dpo,rpo', 'baselines.value_on_pairs': 'True',
                 'eval.methods': 'cd,fudge,qsharp'}

# Table 4: how each variant differs from the run of two iterations, which is two of its lines.
_VARIANTS: Mapping[str, Keys] = {
    'single': {'fit.tokens': 'single'}, 'q': {'value.type': 'q'}, 'mse': {'value.head': 'mse'},
    'categorical': {'value.head': 'categorical'},
}


_PAPER_Q = {'value.head_init': 'lm_head', 'fit.clip_norm': '0'}  # the official code's Q-type


def _ablated(base: Job, of_q: Keys | None = None) -> list[Job]:
    common = {'iterations': '1', 'eval.methods': 'qsharp', 'eval.reward_model': 'False'}  # what the table shows of them
    return [base, *(Job(f'{base.name}_{name}', base.config,
                        {**base.keys, **keys, **common, **((of_q or {}) if name == 'q' else {})}, base.name,
                        suits=base.suits)
                    for name, keys in _VARIANTS.items())]


def _paper(table: str) -> list[Job]:
    gsm8k, math, quality = (f'configs/{name}.py:paper' for name in ('gsm8k', 'math', 'quality'))
    l3_gsm8k = Job('gsm8k_llama3_8b', gsm8k, suits=_EIGHT)
    l31_gsm8k = Job('gsm8k_llama3.1_8b', gsm8k, _L31_8B, suits=_EIGHT)
    l3_math = Job('math_llama3_8b', math, suits=_EIGHT)
    l31_math = Job('math_llama3.1_8b', math, _L31_8B, suits=_EIGHT)
    qwen_math = Job('math_qwen2.5_7b', math, _QWEN, suits=_FOUR)
    big = [[Job(f'math_{name}_70b_1b', math, keys, suits=_EIGHT),
            Job(f'math_{name}_70b_3b', math, {**keys, **_3B}, f'math_{name}_70b_1b', suits=_EIGHT)]
           for name, keys in (('llama3', _L3_70B), ('llama3.1', _L31_70B))]
    return {
        '1': [l3_gsm8k, l31_gsm8k, l3_math, l31_math],
        '2': [*big[0], *big[1]],
        '3': [l3_gsm8k, l31_math],
        '4': [*_ablated(l3_gsm8k, _PAPER_Q), *_ablated(l31_math, _PAPER_Q)],
        '5': [Job('gsm8k_qwen2.5_7b', gsm8k, _QWEN, suits=_FOUR), qwen_math,
              Job('aime24_qwen2.5_7b', math, {**_QWEN, **_AIME}, guided_by=qwen_math.name, suits=_FOUR)],
        '6': [Job('quality_qwen2.5_7b', quality, _QWEN, suits={**_FOUR, **_LONG}),
              Job('quality_llama3.1_8b', quality, _L31_8B, suits={**_EIGHT, **_LONG})],
        '7': [qwen_math, Job('math_other_policy', math, {**_OTHER, 'value.source': _QWEN['value.source']},
                             guided_by=qwen_math.name, other_policy=True, suits=_FOUR)],
        'fig3': [l3_gsm8k],
    }[table]


def _reduced(table: str, size: str) -> list[Job]:
    """One reference for all tables: that of the config, or of the command line."""
    gsm8k = Job('gsm8k', f'configs/gsm8k.py:{size}')
    deeper = Job('gsm8k_deeper', gsm8k.config, {'value.layers': {'tiny': '16', 'small': '18'}[size]}, shares=gsm8k.name)
    return {
        '1': [gsm8k], '2': [gsm8k, deeper], '3': [gsm8k],
        '4': _ablated(Job('arithmetic', f'configs/arithmetic.py:{size}')),
        '5': [gsm8k], '6': [Job('quality', f'configs/quality.py:{size}')],
        '7': [gsm8k, Job('gsm8k_other_policy', gsm8k.config, _OTHER, guided_by=gsm8k.name, other_policy=True)],
        'fig3': [gsm8k],
    }[table]


def _star_graphs(size: str) -> list[Job]:
    if size == 'tiny':
        return [Job('star_graph', 'configs/star_graph.py:tiny', _EVERY_METHOD)]

    def of(graph: str, keys: Keys) -> Job:
        return Job(f'star_graph{graph}', f'configs/star_graph.py:{size}{graph}', keys)

    graphs = [of(graph, {}) for graph in ('', '_5_5', '_3_8')]
    if size == 'paper':
        return graphs
    # How far the claim goes: Q♯ alone, on longer paths and from fewer graphs.
    alone = {**_QSHARP, 'fit.learning_rate_factors': '0.3'}  # the rate that G(2,5) chose
    longer = [of(f'_2_{length}', alone) for length in (3, 4, 6, 7, 8)]
    # With as many gradient steps as the whole run's first iteration has, but no more than 64 passes.
    fewer = [Job(f'star_graph_of_{count}', graphs[0].config,
                 {**alone, 'iterations': '1', 'collect.examples': f'{count}', 'fit.epochs': f'{passes}'},
                 reference=graphs[0].name)
             for count, passes in ((300, 64), (1000, 64), (3000, 24), (10_000, 7))]
    # Why: a network that cannot look ahead, and one that scores the first step without having read it, as policies do.
    why = [Job(f'star_graph_{name}', graphs[0].config, {**alone, key: text},
               shares=graphs[0].name, reference=graphs[0].name)
           for name, key, text in (('no_lookahead', 'value.lookahead', '0'), ('q_type', 'value.type', 'q'))]
    return [*graphs, *longer, *fewer, *why]


def jobs(name: str, size: str) -> list[Job]:
    """Returns the runs of a table or figure, those that others take something from before these.

    Args:
      name: one of `NAMES`.
      size: one of `SIZES`.

    Raises:
      ValueError: there is no such table, figure or size.
    """
    if name not in NAMES:
        raise ValueError(f'--table is {name!r}; it must be one of {", ".join(publish.NAMES)}.')
    if size not in SIZES:
        raise ValueError(f'--size is {size!r}; it must be one of {", ".join(SIZES)}.')
    if name == star_graph_records.NAME:
        return _star_graphs(size)
    return _paper(name) if size == 'paper' else _reduced(name, size)
