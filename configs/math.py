r"""MATH, tested on MATH-500; `--config.task.math.test_set=aime24` tests on AIME 2024 (docs/data.md).

  python experiments/train.py --config=configs/math.py:small --workdir=runs/math \
    --config.task.math.folder=path/to/math --config.task.math.test_folder=path/to/math500 \
    --config.reference.source=path/to/model

The model is a Hugging Face folder or a GGUF file (docs/models.md). The extra [math] is needed.

Sizes:
  tiny: that the parts fit together, with SmolLM2-135M-Instruct, which answers hardly any question.
  small: an instruct model of half a billion parameters, guided by the lower half of its own layers.
  paper: Llama 3 8B Instruct guided by Llama 3.2 1B.
"""
from __future__ import annotations

import ml_collections

from configs import reasoning


def get_config(size: str = 'tiny') -> ml_collections.ConfigDict:
    """The configuration of one size."""
    config = reasoning.get_config(size, max_prompt_tokens=1024)
    config.task.name = 'math'
    return config
