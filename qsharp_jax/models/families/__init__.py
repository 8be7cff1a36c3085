"""Model families: how the names and layouts of a published checkpoint become ours.

A family is a mapping, never a model: one file here reads the keys of its config.json and of its GGUF metadata, and
lists where each tensor goes. docs/models.md shows how to add one.
"""
from __future__ import annotations

from qsharp_jax.models.families import gemma3, gpt2, llama, qwen
from qsharp_jax.models.families.base import Family, Format, Keys, Weight

FAMILIES = {family.name: family for family in (llama.FAMILY, qwen.QWEN2, qwen.QWEN3, gpt2.FAMILY, gemma3.FAMILY)}
GGUF_FAMILIES = {family.gguf: family for family in FAMILIES.values() if family.gguf}

__all__ = ['FAMILIES', 'Family', 'Format', 'GGUF_FAMILIES', 'Keys', 'Weight']
