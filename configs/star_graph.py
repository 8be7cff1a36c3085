"""Star graphs: a transformer trained from scratch on paths, its shortcut, and Q# on it.

  python experiments/train.py --config=configs/star_graph.py:tiny --workdir=runs/star_graph_tiny

Trained by next-token prediction, the reference learns to guess the first step and follow that arm: about 1/d of its
paths are right (paper section 3.1).

Sizes:
  tiny: G(2,3), for two CPU cores.
  small: G(2,5), for one GPU.
  paper: G(5,5) with the paper's number of graphs.
"""
from __future__ import annotations

import ml_collections

from configs import default


def get_config(size: str = 'tiny') -> ml_collections.ConfigDict:
    """The configuration of one size."""
    config = default.get_config()
    config.reward = 'star_graph'
    config.iterations = 1
    config.task.name = 'star_graph'
    config.task.stop = ()
    config.reference.source = 'pretrain'
    config.collect.cut = 'start'
    config.value.extra_layers = 1
    config.sampling.top_k = 10
    config.guidance.candidates = 10
    config.eval.samples = 1
    config.eval.maj_k = 1
    if size == 'tiny':
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
        config.reference.transformer.rope_base = 100.0
        config.reference.pretrain.loss = 'all'
        config.reference.pretrain.random_arm_share = 0.5
        config.reference.pretrain.optimizer = 'muon'
        config.reference.pretrain.steps = 1000
        config.reference.pretrain.batch_size = 128
        config.reference.pretrain.learning_rate = 1e-2
        config.reference.pretrain.weight_decay = 0.01
        config.reference.pretrain.warmup_steps = 50
        config.sampling.max_new_tokens = 6
        config.collect.samples = 2
        config.collect.block_examples = 1000
        config.collect.batch_rows = 500
        # The reference has learned to look up the next node; the new layer compares what it expects with the goal.
        config.value.extra_layers = 1
        config.value.extra_input = 'restart'
        config.fit.frozen_layers = 3
        config.fit.samples_per_row = 2
        config.fit.batch_size = 64
        config.fit.epochs = 6.0
        config.fit.learning_rate = 3e-3
        config.fit.warmup_steps = 50
        config.fit.schedule = 'cosine'
        config.eval.batch_rows = 500
        config.eval.block_examples = 250
        config.eval.etas = (0.05, 0.1, 0.3)
    elif size == 'small':
        config.task.star_graph.degree = 2
        config.task.star_graph.path_length = 5
        config.collect.samples = 2
        config.fit.batch_size = 256
        config.fit.learning_rate = 2.5e-4
        config.fit.weight_decay = 0.1
    elif size == 'paper':
        config.task.star_graph.degree = 5
        config.task.star_graph.path_length = 5
        config.reference.transformer.layers = 12
        config.reference.transformer.width = 768
        config.reference.transformer.heads = 12
        config.reference.transformer.kv_heads = 12
        config.reference.transformer.mlp_width = 3072
        config.collect.samples = 2
        config.fit.batch_size = 256
        config.fit.epochs = 10.0
        config.fit.learning_rate = 1e-4
        config.fit.weight_decay = 0.1
        config.fit.clip_norm = 1.0
    else:
        raise ValueError(f'configs/star_graph.py has no size {size!r}; it has tiny, small and paper.')
    return config
