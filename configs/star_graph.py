"""Star graphs: a transformer trained on paths, its shortcut, and every method that may or may not remove it.

  python experiments/train.py --config=configs/star_graph.py:tiny --workdir=runs/star_graph_tiny

Trained by next-token prediction, the reference learns to guess the first step and follow that arm: about 1/d of its
paths are right (paper section 3.1).

Sizes:
  tiny: G(2,3), for two CPU cores, Q#, CD and the reference; others are asked for by `baselines.methods`.
  small, small_5_5, small_3_8: G(2,5), G(5,5) and G(3,8) from scratch, every method, for two CPU cores and hours.
  paper, paper_5_5, paper_3_8: the same graphs in the paper's setting: GPT-2 small (medium for G(3,8)) pre-trained on
    200,000 graphs, values and policies on 200,000 others, 20,000 tests.
"""
from __future__ import annotations

import ml_collections

from configs import default

BASELINES = 'reinforce', 'reinforce_greedy', 'grpo', 'dpo', 'rpo'
GRAPHS = {'': (2, 5), '_5_5': (5, 5), '_3_8': (3, 8)}  # degree and path length, by the ending of a size


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
    kind, _, _ = size.partition('_')
    ending = size.removeprefix(kind)
    if size == 'tiny':
        _tiny(config)
    elif kind == 'small' and ending in GRAPHS:
        _graph(config, *GRAPHS[ending])
        _small(config)
    elif kind == 'paper' and ending in GRAPHS:
        _graph(config, *GRAPHS[ending])
        _paper(config)
    else:
        sizes = ', '.join(kind + ending for kind in ('small', 'paper') for ending in GRAPHS)
        raise ValueError(f'configs/star_graph.py has no size {size!r}; it has tiny, {sizes}.')
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
    config.baselines.reinforce.learning_rates = (1e-4, 1e-3)
    config.baselines.grpo.learning_rates = (1e-4, 1e-3)
    config.baselines.dpo.learning_rates = (1e-4, 1e-3)
    config.baselines.rpo.learning_rates = (1e-4, 1e-3)
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
    config.task.star_graph.pretrain_examples = 200_000
    config.task.star_graph.train_examples = 40_000
    config.task.star_graph.validation_examples = 1000
    config.task.star_graph.test_examples = 2000
    config.reference.transformer.layers = 3
    config.reference.transformer.width = 128
    config.reference.transformer.heads = 4
    config.reference.transformer.kv_heads = 4
    config.reference.transformer.mlp_width = 512
    config.reference.pretrain.steps = 5000
    config.reference.pretrain.learning_rate = 5e-3
    config.reference.pretrain.warmup_steps = 100
    config.sampling.max_new_tokens = length + 3
    # The frozen trunk looks one node ahead of the candidate, and each new layer may look one further.
    config.value.extra_layers = length - 2
    config.fit.frozen_layers = 3
    config.fit.epochs = 6.0
    config.fit.warmup_steps = 100
    config.fit.learning_rate_factors = (0.3, 1.0)  # as many rates as the policies have
    config.baselines.methods = BASELINES
    config.baselines.value_on_pairs = True
    config.baselines.epochs = 4.0
    config.eval.each_iteration = True  # all methods have as many answers
    config.eval.methods = ('cd', 'fudge', 'qsharp')


def _paper(config: ml_collections.ConfigDict) -> None:
    medium = config.task.star_graph.path_length == 8
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
    config.baselines.answers = 2_000_000  # 10 passes
    config.baselines.accumulate = 4  # the logits of GPT-2's vocabulary take most memory
    config.eval.methods = ('cd', 'fudge', 'qsharp')
    config.eval.each_iteration = True
    config.eval.batch_rows = 512
    config.eval.block_examples = 2000
