"""Arithmetic in plain text: SmolLM2-135M-Instruct, guided by its own trunk with a Bernoulli head.

  python experiments/train.py --config=configs/arithmetic.py:tiny --workdir=runs/arithmetic_tiny

Sizes:
  tiny: two iterations in about eleven minutes on two CPU cores: what `make demo` runs.
  small: the same with more questions and answers, and the 20 candidates of the paper.
  paper: the paper's recipe (16 answers a question, 5 epochs, AdamW 2e-5, constant) on this task.
"""
from __future__ import annotations

import ml_collections

from configs import default

# Solved examples, which show the format, in an order in which the reference copies either operand: what it never
# writes teaches nothing.
PREFIX = '91 max 8 = 91\n12 + 35 = 47\n19 min 30 = 19\n64 max 27 = 64\n56 min 40 = 40\n5 + 3 = 8\n'


def _upper_layers(config: ml_collections.ConfigDict) -> None:
    """The upper layers learn fastest from what the middle of the network knows of the problem."""
    config.value.init = 'truncate'
    config.value.layers = 20
    config.fit.frozen_layers = 12
    config.fit.batch_size = 8
    config.fit.learning_rate = 4e-4
    config.fit.head_lr_multiplier = 10.0
    config.fit.schedule = 'cosine'


def get_config(size: str = 'tiny') -> ml_collections.ConfigDict:
    """The configuration of one size."""
    config = default.get_config()
    config.reward = 'arithmetic'
    config.task.name = 'arithmetic'
    config.task.template = '{question} = '
    config.task.arithmetic.operations = ('+', 'max', 'min')
    config.task.arithmetic.two_digit_share = 0.6
    config.task.prefix = PREFIX
    config.task.max_prompt_tokens = 96
    config.sampling.max_new_tokens = 8
    config.logging.every_steps = 5
    if size == 'tiny':
        config.sampling.max_new_tokens = 4
        config.task.arithmetic.train_examples = 1800
        config.task.arithmetic.validation_examples = 50
        config.task.arithmetic.test_examples = 100
        config.collect.examples = 900
        config.collect.samples = 4
        config.collect.cut = 'start'
        config.collect.block_examples = 300
        config.collect.batch_rows = 150
        _upper_layers(config)
        config.guidance.candidates = 6
        config.guidance.outside = 'min'  # with so few candidates, the others are often drawn, and seldom right
        config.fit.samples_per_row = 4
        config.fit.epochs = 1.0
        config.fit.warmup_steps = 5
        config.fit.heldout_fraction = 0.05
        config.fit.checkpoint_every_steps = 50
        config.logging.every_steps = 2
        config.logging.heldout_every_steps = 50
        config.eval.samples = 3
        config.eval.maj_k = 3
        config.eta = 0.05
        config.eval.etas = (0.05, 0.2, 0.5)
        config.eval.batch_rows = 150
        config.eval.block_examples = 50
    elif size == 'small':
        _upper_layers(config)
        config.task.arithmetic.train_examples = 1800
        config.collect.samples = 8
        config.collect.block_examples = 300
        config.collect.batch_rows = 150
        config.guidance.epsilon_cutoff = 1e-3
        config.fit.samples_per_row = 8
        config.fit.epochs = 2.0
        config.fit.warmup_steps = 20
        config.eval.samples = 4
        config.eval.maj_k = 4
        config.eval.etas = (0.05, 0.1, 0.2, 0.5)
        config.eval.every_eta = False
        config.eval.batch_rows = 150
        config.eval.methods = ('cd', 'vas', 'qsharp')
    elif size == 'paper':
        config.collect.drop_no_variation = True
        config.guidance.outside = 'zero'
        config.sampling.temperature = 0.8
        config.sampling.top_p = 0.9
    else:
        raise ValueError(f'configs/arithmetic.py has no size {size!r}; it has tiny, small and paper.')
    return config
