"""A reward that an untrained model earns now and then, so that tiny runs have something to learn."""
from __future__ import annotations

from collections.abc import Sequence


def starts_low(completions: Sequence[str]) -> list[float]:
    """Whether the answer starts with one of the first four nodes."""
    return [float(text[:1] in ('0', '1', '2', '3')) for text in completions]
