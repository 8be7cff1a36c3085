r"""QuALITY: four options to a question on a long article (docs/data.md).

  python experiments/train.py --config=configs/quality.py:small --workdir=runs/quality \
    --config.task.quality.folder=path/to/QuALITY.v1.0.1 \
    --config.reference.source=path/to/model

The model is a Hugging Face folder or a GGUF file (docs/models.md).

Sizes:
  tiny: that the parts fit together, with SmolLM2-135M-Instruct, which answers hardly any question.
  small: an instruct model of half a billion parameters, guided by the lower half of its own layers.
  paper: Llama 3.1 8B Instruct guided by Llama 3.2 1B.
"""
from __future__ import annotations

import ml_collections

from configs import reasoning


def get_config(size: str = 'tiny') -> ml_collections.ConfigDict:
    """The configuration of one size."""
    # Of the articles on a machine without accelerators those that its memory has room for; others are counted.
    config = reasoning.get_config(size, max_prompt_tokens=10240 if size == 'paper' else 6144)
    config.task.name = 'quality'
    config.reward = 'multiple_choice'
    if size == 'paper':
        # Llama 3 reads 8,192 tokens, which the longest articles exceed. Table 6 has Llama 3.1 and Qwen 2.5.
        config.reference.source = 'hf:meta-llama/Llama-3.1-8B-Instruct'
        # Two answers share a copy of their article: attention grows with the square of a row. 32 a step, as everywhere.
        config.fit.samples_per_row = 2
        config.fit.batch_size = 16
    else:
        config.collect.batch_rows = 8
        config.eval.batch_rows = 8
        config.fit.batch_size = 1
        config.fit.samples_per_row = 4
    return config
