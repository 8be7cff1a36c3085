"""Model families: how the names and layouts of a published checkpoint become ours.

A family is a mapping, never a model: a `TransformerConfig` made from metadata, and for each stored tensor its
place in our parameter tree, its stored shape, and how it is rearranged.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from qsharp_jax.models.transformer import RopeScaling, TransformerConfig

Rearrange = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where a stored tensor goes.

    Attributes:
      path: keys of our parameter tree.
      shape: of the stored tensor, slowest axis first.
      rearrange: from the stored array to ours.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    rearrange: Rearrange


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of the GGUF format.

    Attributes:
      config: (metadata, shapes of the stored tensors by name) -> TransformerConfig.
      weights: config -> where each stored tensor goes, by its name.
    """

    config: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], TransformerConfig]
    weights: Callable[[TransformerConfig], dict[str, Weight]]


def llama_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> TransformerConfig:
    """Returns the config of a GGUF file of architecture 'llama' (Llama, SmolLM2).

    Raises:
      ValueError: if a key is missing or the file uses what the decoder does not have.
    """
    def read(key: str) -> Any:
        if f'llama.{key}' not in metadata:
            raise ValueError(f"The GGUF metadata lacks 'llama.{key}': the file is incomplete.")
        return metadata[f'llama.{key}']

    width, heads = read('embedding_length'), read('attention.head_count')
    head_dim = metadata.get('llama.attention.key_length', width // heads)
    rotated = metadata.get('llama.rope.dimension_count', head_dim)
    if rotated != head_dim:
        raise ValueError(f'llama.rope.dimension_count is {rotated}; only a rotation of the whole head '
                         f'({head_dim}) is supported.')
    if metadata.get('llama.expert_count', 0):
        raise ValueError(f"llama.expert_count is {metadata['llama.expert_count']}; mixtures of experts are "
                         'not supported.')
    scaling = None
    kind = metadata.get('llama.rope.scaling.type', 'none')
    if kind == 'linear':
        scaling = RopeScaling('linear', read('rope.scaling.factor'))
    elif kind != 'none':
        raise ValueError(f'llama.rope.scaling.type is {kind!r}; allowed: none, linear.')
    if 'token_embd.weight' not in shapes:
        raise ValueError("The GGUF file lacks the tensor 'token_embd.weight'.")
    return TransformerConfig(
        vocab_size=shapes['token_embd.weight'][0],
        width=width,
        layers=read('block_count'),
        heads=heads,
        kv_heads=metadata.get('llama.attention.head_count_kv', heads),
        head_dim=head_dim,
        mlp_width=read('feed_forward_length'),
        max_positions=read('context_length'),
        norm_eps=read('attention.layer_norm_rms_epsilon'),
        rope_base=metadata.get('llama.rope.freq_base', 10000.0),
        rope_scaling=scaling,
        tied_embeddings='output.weight' not in shapes)


def llama_weights(config: TransformerConfig) -> dict[str, Weight]:
    """Returns where each tensor of a GGUF file of architecture 'llama' goes."""
    width, inner, head_dim = config.width, config.mlp_width, config.head_dim
    vocabulary = (config.vocab_size, width)
    weights = {
        'token_embd.weight': Weight(('embedding',), vocabulary, _same),
        'output_norm.weight': Weight(('final_norm', 'scale'), (width,), _same),
    }
    if not config.tied_embeddings:
        weights['output.weight'] = Weight(('head',), vocabulary, _same)
    for index in range(config.layers):
        def add(name: str, path: tuple[str, ...], shape: tuple[int, ...], rearrange: Rearrange) -> None:
            weights[f'blk.{index}.{name}.weight'] = Weight((f'layers_{index}', *path), shape, rearrange)

        def project(name: str, ours: str, heads: int, rotated: bool) -> None:
            add(name, ('attention', ours, 'kernel'), (heads * head_dim, width), _split_heads(heads, rotated))

        add('attn_norm', ('attention_norm', 'scale'), (width,), _same)
        project('attn_q', 'query', config.heads, True)
        project('attn_k', 'key', config.kv_heads, True)
        project('attn_v', 'value', config.kv_heads, False)
        add('attn_output', ('attention', 'output', 'kernel'), (width, config.heads * head_dim),
            lambda array: array.T.reshape(config.heads, head_dim, width))
        add('ffn_norm', ('mlp_norm', 'scale'), (width,), _same)
        add('ffn_gate', ('mlp', 'gate', 'kernel'), (inner, width), _transpose)
        add('ffn_up', ('mlp', 'up', 'kernel'), (inner, width), _transpose)
        add('ffn_down', ('mlp', 'down', 'kernel'), (width, inner), _transpose)
    return weights


FAMILIES = {'llama': Family(llama_config, llama_weights)}


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transpose(array: np.ndarray) -> np.ndarray:
    return array.T


def _split_heads(heads: int, rotated: bool) -> Rearrange:
    """Returns stored [H * Dh, D] -> our [D, H, Dh].

    GGUF keeps the two partners of a rotation next to each other in its llama architecture; ours are half a
    head apart.
    """
    def rearrange(array: np.ndarray) -> np.ndarray:
        split = array.reshape(heads, -1, array.shape[1])
        if rotated:
            split = np.concatenate([split[:, 0::2], split[:, 1::2]], axis=1)
        return split.transpose(2, 0, 1)
    return rearrange
