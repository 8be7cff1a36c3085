"""Rewards: what an answer earns, by text.

A reward is a function `(prompts, completions, **columns) -> list of numbers`, sync or async; None abstains. `load`
finds it by a registered name or as 'path/to/file.py:function', `score` calls it.
"""
from __future__ import annotations

from qsharp_jax.rewards import builtin
from qsharp_jax.rewards.registry import load, names, parse, register, Reward, RewardError
from qsharp_jax.rewards.scoring import check_canaries, check_columns, score
from qsharp_jax.rewards.voting import votes
