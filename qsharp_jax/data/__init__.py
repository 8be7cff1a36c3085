"""Tasks, prompts, tokenizers, and the data set that a run collects."""
