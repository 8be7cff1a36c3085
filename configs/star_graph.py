"""Star graphs: a transformer trained on paths, its shortcut, and every method that may or may not remove it.

  python experiments/train.py --config=configs/star_graph.py:tiny --workdir=runs/star_graph_tiny

Trained by next-token prediction, the reference learns to guess the first step and follow that arm: about 1/d of its
paths are right (paper section 3.1).

Sizes:
  tiny: G(2,3), for two CPU cores, Q#, CD and the reference; others are asked for by `baselines.methods`.
  small: G(2,5) from scratch, every method, for two CPU cores and hours.
  paper: the same in the paper's setting: GPT-2 small (medium for paths of eight nodes) pre-trained on 200,000 graphs,
    values and policies on 200,000 others, 20,000 tests.
  small_d_l, paper_d_l: another graph G(d, l), such as small_5_5 and small_3_8, which are the paper's others.
"""
from __future__ import annotations

import re

import ml_collections

from configs import default

BASELINES = 'reinforce', 'reinforce_greedy', 'grpo', 'dpo', 'rpo'


def get_config(size: str = 'tiny') -> ml_collections.ConfigDict:
    """The configuration of one size."""
    config = default.get_config()
    config.reward = 'star_graph'
    config.task.name = 'star_graph'
    config.task.stop = ()
    config.reference.source = 'pretrain'
    config.sampling.top_k = 10
    config.guidance.candidates = 10
    config.eval.samples = 1
    config.eval.maj_k = 1
    if size == 'tiny':
        _tiny(config)
        return config
    found = re.fullmatch(r'(small|paper)(?:_([2-9])_([3-9]))?', size)
    if found is None:
        raise ValueError(f'configs/star_graph.py has no size {size!r}; it has tiny, small and paper, which are of '
                         'G(2,5), and small_d_l and paper_d_l of another graph, such as small_5_5: d from 2 and l from '
                         '3, to 9.')
    kind, degree, length = found.groups()
    _graph(config, int(degree or 2), int(length or 5))
    (_small if kind == 'small' else _paper)(config)
    return config


def _graph(config: ml_collections.ConfigDict, degree: int, path_length: int) -> None:
    config.task.star_graph.degree = degree
    config.task.star_graph.path_length = path_length
    # An edge takes two nodes and a bar; with the commas of GPT-2's tokenizer it takes four tokens.
    config.task.max_prompt_tokens = 4 * degree * (path_length - 1) + 4


def _from_scratch(config: ml_collections.ConfigDict) -> None:
    """What the sizes that are trained from scratch have in common (docs/star_graph.md)."""
    config.reference.transformer.rope_base = 100.0
    config.reference.pretrain.loss = 'all'
    # With correct paths only, the reference would copy the goal as the last node of whatever arm it is on.
    config.reference.pretrain.random_arm_share = 0.5
    config.reference.pretrain.optimizer = 'muon'
    config.reference.pretrain.batch_size = 128
    config.reference.pretrain.learning_rate = 1e-2
    config.reference.pretrain.weight_decay = 0.01
    config.collect.samples = 2
    config.collect.block_examples = 1000
    config.collect.batch_rows = 500
    # The reference has learned to look up the next node; the new layers compare what it expects with the goal.
    config.value.extra_input = 'restart'
    config.fit.samples_per_row = 2
    config.fit.batch_size = 64
    config.fit.learning_rate = 3e-3
    config.fit.schedule = 'cosine'
    config.baselines.batch_size = 128
    config.baselines.weight_decay = 0.01
    config.baselines.reinforce.learning_rates = (1e-5, 1e-4, 1e-3)
    config.baselines.grpo.learning_rates = (1e-5, 1e-4, 1e-3)
    config.baselines.dpo.learning_rates = (1e-5, 1e-4, 1e-3)
    config.baselines.rpo.learning_rates = (1e-5, 1e-4, 1e-3)
    config.eval.batch_rows = 500
    config.eval.block_examples = 250
    config.eval.etas = (0.05, 0.1, 0.3)


def _tiny(config: ml_collections.ConfigDict) -> None:
    _from_scratch(config)
    config.iterations = 1
    config.task.star_graph.degree = 2
    config.task.star_graph.path_length = 3
    config.task.star_graph.num_nodes = 20
    config.task.star_graph.pretrain_examples = 60_000
    config.task.star_graph.train_examples = 8_000
    config.task.star_graph.validation_examples = 500
    config.task.star_graph.test_examples = 1000
    config.task.max_prompt_tokens = 24
    config.reference.transformer.layers = 3
    config.reference.transformer.width = 64
    config.reference.transformer.heads = 2
    config.reference.transformer.kv_heads = 2
    config.reference.transformer.mlp_width = 256
    config.reference.pretrain.steps = 1000
    config.reference.pretrain.warmup_steps = 50
    config.sampling.max_new_tokens = 6
    config.collect.cut = 'start'
    config.value.extra_layers = 1
    config.fit.frozen_layers = 3
    config.fit.epochs = 6.0
    config.fit.warmup_steps = 50


def _small(config: ml_collections.ConfigDict) -> None:
    _from_scratch(config)
    length = config.task.star_graph.path_length
    config.iterations = 2
    config.task.star_graph.num_nodes = 30  # G(3,8) has 22 nodes
    config.task.star_graph.pretrain_examples = 100_000
    config.task.star_graph.train_examples = 24_000
    config.task.star_graph.validation_examples = 1000
    config.task.star_graph.test_examples = 2000
    config.reference.transformer.layers = 3
    config.reference.transformer.width = 128
    config.reference.transformer.heads = 4
    config.reference.transformer.kv_heads = 4
    config.reference.transformer.mlp_width = 512
    config.reference.pretrain.steps = 2500
    if config.task.star_graph.degree * (length - 1) > 8:  # alone, such graphs were not learned in 400 steps
        config.reference.pretrain.curriculum_steps = 600
    config.reference.pretrain.batch_size = 64
    config.reference.pretrain.learning_rate = 4e-3
    config.reference.pretrain.warmup_steps = 100
    config.sampling.max_new_tokens = length + 3
    config.collect.cut = 'guided'  # a uniform cut leaves the first step, which decides, to a third of the answers
    # At a candidate the trunk expects the node behind it, and each look ahead one more: from the first step to the end.
    config.value.lookahead = length - 3
    config.value.extra_layers = 2
    config.fit.frozen_layers = 3
    config.fit.optimizer = 'muon'
    config.fit.epochs = 3.0
    config.fit.warmup_steps = 100
    config.fit.learning_rate = 1e-2
    config.fit.learning_rate_factors = (0.3, 1.0)  # 3e-3 and 1e-2
    config.baselines.methods = BASELINES
    config.baselines.value_on_pairs = True
    config.baselines.epochs = 3.0
    config.eval.each_iteration = True  # all methods have as many answers
    config.eval.methods = ('cd', 'fudge', 'qsharp')
    config.eval.select_examples = 500
    config.eval.every_eta = False


def _paper(config: ml_collections.ConfigDict) -> None:
    medium = config.task.star_graph.path_length >= 8
    published = f'hf:openai-community/gpt2{"-medium" if medium else ""}'
    config.iterations = 2
    config.reference.dtype = 'bfloat16'
    config.reference.pretrain.start = published
    config.reference.pretrain.steps = 23_437  # 30 passes
    config.reference.pretrain.learning_rate = 2.5e-4
    config.reference.pretrain.warmup_steps = 234
    config.reference.pretrain.end_share = 0.1
    config.sampling.max_new_tokens = 2 * config.task.star_graph.path_length + 2
    config.guidance.outside = 'remove'
    # As published, not as it was pre-trained on graphs.
    config.value.source = published
    config.value.init = 'pretrained'
    config.value.dtype = 'bfloat16'
    config.collect.samples = 2
    config.collect.block_examples = 8000
    config.collect.batch_rows = 512
    config.fit.samples_per_row = 2
    config.fit.batch_size = 128  # prompts with two answers each
    config.fit.epochs = 10.0
    config.fit.learning_rate = 1e-4
    config.fit.weight_decay = 0.1
    config.fit.clip_norm = 1.0
    config.fit.warmup_steps = 1484
    config.fit.schedule = 'cosine'
    config.fit.end_share = 0.1
    config.baselines.methods = BASELINES
    config.baselines.value_on_pairs = True
    # The paper has one rate a method, and ten passes for REINFORCE; here all have as many rates and answers.
    config.fit.learning_rate_factors = (1.0, 2.5)  # the paper's, and the official code's
    config.baselines.reinforce.learning_rates = (1e-5, 1e-4)
    config.baselines.grpo.learning_rates = (1e-5, 1e-4)
    config.baselines.dpo.learning_rates = (1e-5, 1e-4)
    config.baselines.rpo.learning_rates = (1e-5, 1e-4)
    config.baselines.accumulate = 4  # the logits of GPT-2's vocabulary take most memory
    config.eval.methods = ('cd', 'fudge', 'qsharp')
    config.eval.each_iteration = True
    config.eval.batch_rows = 512
    config.eval.block_examples = 2000
