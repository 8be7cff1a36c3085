"""Arithmetic in plain text: SmolLM2-135M-Instruct, guided by its own trunk with a Bernoulli head.

  python experiments/train.py --config=configs/arithmetic.py:tiny --workdir=runs/arithmetic_tiny

Sizes:
  tiny: two iterations on two CPU cores, the size of `make demo`.
  small: more questions and answers, on a CPU within an hour or on one GPU.
  paper: the paper's recipe (16 answers a question, 5 epochs, AdamW 2e-5, constant) on this task.
"""
from __future__ import annotations

import ml_collections

from configs import default

# Solved examples, which show the format.
PREFIX = '5 + 3 = 8\n27 max 64 = 64\n'


def get_config(size: str = 'tiny') -> ml_collections.ConfigDict:
    """The configuration of one size."""
    config = default.get_config()
    config.reward = 'arithmetic'
    config.task.name = 'arithmetic'
    config.task.template = '{question} = '
    config.task.arithmetic.operations = ('+', 'max')
    config.task.arithmetic.two_digit_share = 0.6
    config.task.prefix = PREFIX
    config.task.max_prompt_tokens = 64
    config.sampling.max_new_tokens = 8
    config.logging.every_steps = 5
    if size == 'tiny':
        config.sampling.max_new_tokens = 5
        config.task.arithmetic.train_examples = 1000
        config.task.arithmetic.validation_examples = 48
        config.task.arithmetic.test_examples = 120
        config.collect.samples = 6
        config.collect.examples = 500
        config.collect.cut = 'start'
        config.collect.block_examples = 125
        config.collect.batch_rows = 250
        config.value.init = 'truncate'
        config.value.layers = 12
        config.guidance.candidates = 12
        config.fit.samples_per_row = 6
        config.fit.batch_size = 8
        config.fit.epochs = 1.0
        config.fit.frozen_layers = 1
        config.fit.learning_rate = 2e-4
        config.fit.head_lr_multiplier = 10.0
        config.fit.warmup_steps = 5
        config.fit.schedule = 'cosine'
        config.fit.heldout_fraction = 0.08
        config.fit.checkpoint_every_steps = 25
        config.logging.every_steps = 2
        config.logging.heldout_every_steps = 20
        config.eval.samples = 4
        config.eval.maj_k = 4
        config.eval.etas = (0.1, 0.3)
        config.eval.batch_rows = 240
        config.eval.block_examples = 60
    elif size == 'small':
        config.collect.samples = 8
        config.fit.samples_per_row = 8
        config.fit.epochs = 3.0
        config.fit.learning_rate = 1e-4
        config.fit.head_lr_multiplier = 10.0
        config.fit.warmup_steps = 20
        config.fit.schedule = 'cosine'
    elif size == 'paper':
        config.collect.drop_no_variation = True
        config.guidance.outside = 'zero'
        config.sampling.temperature = 0.8
        config.sampling.top_p = 0.9
    else:
        raise ValueError(f'configs/arithmetic.py has no size {size!r}; it has tiny, small and paper.')
    return config
