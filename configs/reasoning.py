"""What the experiments on mathematics and reading share: prompt, grader, sampler and recipe, in three sizes.

See sections 3.2 and appendices D to F of the paper. Where it is silent, the comments say so.
"""
from __future__ import annotations

import ml_collections

from configs import default

# One user turn of the model's chat template, without examples.
TEMPLATE = 'Problem:\n\n{question} Write your answer inside \\boxed{{}}.\n\nSolution:'


def get_config(size: str, max_prompt_tokens: int) -> ml_collections.ConfigDict:
    """The configuration of one size, without a task.

    Args:
      size: 'tiny', 'small' or 'paper'.
      max_prompt_tokens: of the task's questions.
    """
    config = default.get_config()
    config.reward = 'math'
    config.reward_options.workers = 2  # as many processes; an answer that hangs is killed, counted and left out
    config.task.template = TEMPLATE
    config.task.chat = True
    config.task.stop = ()  # the tokenizer's own end of a turn
    config.task.max_prompt_tokens = max_prompt_tokens
    config.sampling.temperature = 0.8
    config.sampling.top_p = 0.9
    config.collect.drop_no_variation = True
    config.guidance.outside = 'zero'
    config.eval.cd_network = 'own'  # CD as its authors fit it, by squared error on the reference's own answers
    if size == 'tiny':
        # SmolLM2-135M-Instruct answers hardly any of these questions: this shows that the parts fit, and no gain.
        config.iterations = 1
        config.sampling.max_new_tokens = 96
        config.collect.examples = 8
        config.collect.samples = 4
        config.collect.drop_no_variation = False
        config.collect.batch_rows = 16
        config.collect.block_examples = 8
        config.value.init = 'truncate'
        config.value.layers = 8
        config.fit.batch_size = 8
        config.fit.epochs = 1.0
        config.fit.heldout_fraction = 0.25
        config.eval.examples = 4
        config.eval.select_split = ''
        config.eval.samples = 2
        config.eval.maj_k = 2
        config.eval.etas = (0.1,)
        config.eval.reference_temperatures = (0.0,)
        config.eval.batch_rows = 16
        config.eval.block_examples = 8
    elif size == 'small':
        # A model that gets part of the questions right, guided by its own lower half.
        config.reference.source = 'hf:Qwen/Qwen2.5-0.5B-Instruct'
        config.sampling.temperature = 1.0
        config.sampling.top_p = 1.0
        config.sampling.max_new_tokens = 300
        config.guidance.outside = 'mean'
        # Along 24 answers to GSM8K the 20 most probable tokens left out .0027 of the probability, and those above this
        # cut-off, 3.9 on average, left out .0039. Each costs a third of the reference's operations for a token.
        config.guidance.epsilon_cutoff = 1e-3
        config.collect.examples = 300
        config.collect.samples = 8
        config.collect.batch_rows = 64
        config.collect.block_examples = 100
        config.value.init = 'truncate'
        config.value.layers = 12
        # Rows of 8 answers are longer, and one of them may come twice: on the CPU a step begins before the last one's
        # memory is free. With these, two steps, all activations and the rest take 18 of 24 GB.
        config.fit.batch_size = 8
        config.fit.samples_per_row = 4
        config.fit.accumulate = 4
        config.fit.checkpoint_every_steps = 10
        config.fit.frozen_layers = 4
        config.fit.epochs = 2.0
        config.fit.learning_rate = 1e-4
        config.fit.head_lr_multiplier = 10.0
        config.fit.warmup_steps = 10
        config.fit.schedule = 'cosine'
        config.eval.examples = 300
        config.eval.select_examples = 75
        config.eval.samples = 4
        config.eval.maj_k = 4
        config.eval.etas = (0.05, 0.1, 0.2)
        config.eval.every_eta = False
        config.eval.reference_temperatures = (0.0,)
        config.eval.batch_rows = 64
        config.eval.block_examples = 100
    elif size == 'paper':
        # Other rows of its tables are other `reference.source` and `value.source`.
        config.reference.source = 'hf:meta-llama/Meta-Llama-3-8B-Instruct'
        config.reference.dtype = 'bfloat16'
        config.value.source = 'hf:meta-llama/Llama-3.2-1B-Instruct'
        config.value.init = 'pretrained'
        config.value.head_init = 'normal'
        config.value.dtype = 'bfloat16'
        config.value.remat = True
        config.reward_options.workers = 8
        config.sampling.max_new_tokens = 1024
        config.collect.budget = 'fresh'  # as the official collection
        # The paper does not say how the eta of CD was chosen; here both are chosen on the validation split.
        config.eval.etas = (0.05, 0.1, 0.2, 0.5, 1.0)
        config.eval.every_eta = False
        config.eval.reference_temperatures = (0.0,)
    else:
        raise ValueError(f'there is no size {size!r}; the sizes are tiny, small and paper.')
    return config
