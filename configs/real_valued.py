"""A reward that is not binary: how much of a path of a star graph is right, from -3/2 to 2, with a categorical head.

  python experiments/train.py --config=configs/real_valued.py --workdir=runs/real_valued
  python -m tests.real_valued --workdir=runs/real_valued --out=docs/figures/real_valued.png

Graphs are so small that every answer can be listed, so that the second command knows the optimum of every eta; one
value network serves all five.
"""
from __future__ import annotations

import ml_collections

from configs import star_graph


def get_config(size: str = 'tiny') -> ml_collections.ConfigDict:
    """The configuration of its only size."""
    if size != 'tiny':
        raise ValueError(f'configs/real_valued.py has no size {size!r}; it has tiny.')
    config = star_graph.get_config('tiny')
    config.reward = 'star_graph_progress'
    config.iterations = 2
    config.task.star_graph.num_nodes = 6
    config.task.star_graph.pretrain_examples = 250
    config.task.star_graph.train_examples = 16  # each is asked often enough that its rare answers are seen
    config.task.star_graph.validation_examples = 8
    config.task.star_graph.test_examples = 8
    # It walks along any arm, whatever the goal.
    config.reference.transformer.layers = 2
    config.reference.pretrain.random_arm_share = 1.0
    config.reference.pretrain.steps = 100
    config.reference.pretrain.warmup_steps = 20
    # Hot enough for answers of every kind. What the theory calls the reference is this sampler, so values are applied
    # after it.
    config.sampling.temperature = 2.5
    config.sampling.top_k = 0
    config.guidance.order = 'after_sampler'
    config.sampling.max_new_tokens = 4  # a path of three nodes, and its end
    config.guidance.candidates = 10  # the whole vocabulary
    config.value.head = 'categorical'
    config.value.v_min = -1.5
    config.value.v_max = 2.0
    config.value.num_atoms = 8  # every half: all rewards are atoms
    config.collect.cut = 'uniform'
    config.collect.samples = 256
    config.collect.block_examples = 8
    config.collect.batch_rows = 512
    config.fit.frozen_layers = 0
    config.fit.samples_per_row = 16
    config.fit.batch_size = 16
    config.fit.epochs = 40.0
    config.fit.heldout_fraction = 0.0  # every question is fitted, and measured with answers drawn anew
    config.fit.warmup_steps = 20
    config.eta = 0.5
    config.eval.split = 'train'
    config.eval.methods = ('qsharp',)
    config.eval.select_split = ''
    config.eval.examples = 16
    config.eval.samples = 64
    config.eval.maj_k = 4
    config.eval.etas = (0.1, 0.25, 0.5, 1.0, 2.0)
    config.eval.reference_temperatures = ()
    config.eval.batch_rows = 512
    config.eval.block_examples = 16
    return config
