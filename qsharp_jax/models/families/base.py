"""What a family is made of: where each stored tensor goes, and how a file's keys become a `TransformerConfig`."""
from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from qsharp_jax.models import transformer
from qsharp_jax.models.transformer import RopeScaling, TransformerConfig

FULL, SLIDING = 'full_attention', 'sliding_attention'

# Keys of a config.json that change no logit of a forward pass in evaluation, whatever their value.
HARMLESS = frozenset({
    'architectures', 'model_type', 'transformers_version', 'transformers.js_config', '_name_or_path', 'torch_dtype',
    'dtype', 'use_cache', 'cache_implementation', 'initializer_range', 'bos_token_id', 'eos_token_id', 'pad_token_id',
    'unk_token_id', 'attention_dropout', 'id2label', 'label2id', 'problem_type', 'output_attentions',
    'output_hidden_states', 'return_dict', 'chunk_size_feed_forward', '_attn_implementation', 'task_specific_params',
    'finetuning_task', '_num_labels', 'max_length', 'do_sample', 'temperature', 'top_k', 'top_p', 'repetition_penalty',
    'auto_map',
    'unsloth_fixed', 'unsloth_version', 'tokenizer_class', 'prefix', 'pruned_heads', 'torchscript',
})


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter of ours inside a stored tensor.

    Attributes:
      name: of the stored tensor.
      path: keys of our parameter tree.
      shape: of our parameter.
      inputs: how many leading axes of `shape` make the rows of the stored matrix; 0: it is stored as a vector.
      transposed: whether the matrix is stored with its outputs first.
      columns: (which, of how many) equal parts of the stored tensor's last axis is ours, or None for all of it.
      interleaved: whether the two partners of a rotation are neighbours in the stored tensor, not half a head apart.
      shift: what is added to the stored numbers.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    inputs: int = 0
    transposed: bool = False
    columns: tuple[int, int] | None = None
    interleaved: bool = False
    shift: float = 0.0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor, slowest axis first."""
        rows, columns = math.prod(self.shape[:self.inputs]), math.prod(self.shape[self.inputs:])
        if self.transposed:
            rows, columns = columns, rows
        columns *= self.columns[1] if self.columns else 1
        return (rows, columns) if self.inputs else (columns,)

    def part(self, index: tuple[slice, ...]) -> tuple[slice, Weight, tuple[slice, ...]]:
        """Returns the stored rows that hold a part of ours, the parameter that they make, and its place in it."""
        if not self.inputs:  # a single row
            return slice(None), self, index
        axis = self.inputs if self.transposed else 0  # of ours, over which the stored rows run first
        begin, end, _ = index[axis].indices(self.shape[axis])
        each = math.prod(self.shape[axis + 1:] if self.transposed else self.shape[1:self.inputs])
        shape = (*self.shape[:axis], end - begin, *self.shape[axis + 1:])
        inside = (*index[:axis], slice(None), *index[axis + 1:])
        return slice(begin * each, end * each), dataclasses.replace(self, shape=shape), inside

    def read(self, stored: np.ndarray) -> np.ndarray:
        """Returns our parameter: a view of `stored`, unless the tensor is interleaved or shifted."""
        if self.columns:
            which, count = self.columns
            size = stored.shape[-1] // count
            stored = stored[..., which * size:(which + 1) * size]
        ours = (stored.T if self.transposed else stored).reshape(self.shape)
        if self.interleaved:
            ours = np.concatenate([ours[..., 0::2], ours[..., 1::2]], axis=-1)
        return ours + np.asarray(self.shift, ours.dtype) if self.shift else ours

    def write(self, ours: np.ndarray) -> np.ndarray:
        """Returns what is stored of our parameter: all of the tensor, or its `columns`."""
        if self.shift:
            ours = ours - np.asarray(self.shift, ours.dtype)
        if self.interleaved:
            ours = np.stack(np.split(ours, 2, axis=-1), axis=-1)
        if not self.inputs:
            return ours.reshape(-1)
        rows = ours.reshape(math.prod(self.shape[:self.inputs]), -1)
        return rows.T if self.transposed else rows


@dataclasses.dataclass(frozen=True)
class Format:
    """How a family's tensors are named and laid out in one file format.

    Attributes:
      names: our parameter -> stored name, with '/' between keys; '*' stands for the number of a layer.
      heads_first: whether matrices are stored with their outputs first.
      columns: our parameters that share a stored tensor -> (which, of how many) parts of its last axis.
      interleaved: our parameters whose rotation partners are neighbours.
      shift: what is added to the scales of norms.
      ignored: pattern of the names of tensors that carry nothing of their own.
      prefix: of stored names, which a checkpoint of the base model leaves out.
    """

    names: Mapping[str, str]
    heads_first: bool = True
    columns: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    interleaved: frozenset[str] = frozenset()
    shift: float = 0.0
    ignored: str = r'$^'
    prefix: str = ''

    def weights(self, config: TransformerConfig) -> list[Weight]:
        """Returns where each parameter of `config` is stored, of each layer by itself also where layers are scanned.

        Raises:
          ValueError: the model has a parameter that this format has no name for.
        """
        shapes = transformer.param_shapes(dataclasses.replace(config, scan_layers=False))
        found = []
        for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            path = tuple(key.key for key in keys)
            number = path[0].removeprefix(transformer.LAYER) if path[0].startswith(transformer.LAYER) else ''
            kind = '/'.join(('*', *path[1:]) if number else path)
            if kind not in self.names:
                raise ValueError(f'the model has the parameter {"/".join(path)!r}, which this format cannot store.')
            # What a table of rows or a kernel of the output projection has in front of its columns.
            inputs = 0 if kind.endswith(('scale', 'bias')) else 2 if kind == '*/attention/output/kernel' else 1
            found.append(Weight(
                name=self.names[kind].replace('*', number), path=path, shape=leaf.shape, inputs=inputs,
                transposed=self.heads_first and kind.endswith('kernel'), columns=self.columns.get(kind),
                interleaved=kind in self.interleaved, shift=self.shift if kind.endswith('scale') else 0.0))
        return found

    def is_ignored(self, name: str) -> bool:
        """Returns whether a stored tensor carries nothing of its own."""
        return re.fullmatch(self.ignored, name) is not None


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      name: `model_type` of its config.json.
      architecture: class of the language model in `transformers`.
      base_architecture: class of the model without head.
      tensors: of its safetensors files.
      read: keys of a config.json -> TransformerConfig.
      write: TransformerConfig -> keys of a config.json that `read` gives it back from, as far as the family can.
      gguf: the format's name of the architecture, '' if it has none here.
      gguf_tensors: of its GGUF files.
      read_gguf: keys of the metadata -> TransformerConfig.
    """

    name: str
    architecture: str
    base_architecture: str
    tensors: Format
    read: Callable[[Keys], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    gguf: str = ''
    gguf_tensors: Format | None = None
    read_gguf: Callable[[Keys], TransformerConfig] | None = None


class Keys:
    """The keys of a config.json, or of one architecture's metadata, each of which must be known.

    Raises ValueError, naming key and family, for what is missing, not allowed or, in `finish`, not known.
    """

    def __init__(self, found: Mapping[str, Any], family: str, source: str, shapes: Mapping[str, tuple[int, ...]],
                 floats: Callable[[str], np.ndarray] | None = None) -> None:
        """Args are the keys, whose they are, the file they are from, its tensors, and how to read a small one."""
        self.found = dict(found)
        self.family = family
        self.source = source
        self.shapes = shapes
        self.floats = floats
        self._known: set[str] = set()

    def take(self, key: str, *default: Any) -> Any:
        """Returns a key's value; `default` where it is missing or null, without one it must be there."""
        self._known.add(key)
        value = self.found.get(key)
        if value is not None:
            return value
        if not default:
            raise ValueError(f'{self.source} ({self.family}) lacks {key!r}: the file is incomplete.')
        return default[0]

    def expect(self, key: str, *allowed: Any) -> None:
        """Checks a key that the decoder knows only some values of; missing or null is fine."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            listed = ', '.join(repr(item) for item in allowed)
            raise ValueError(f'{self.source} ({self.family}): {key!r} is {value!r}; supported: {listed}.')

    def note(self, *keys: str) -> None:
        """Marks keys that change nothing."""
        self._known.update(keys)

    def inside(self, key: str, value: Mapping[str, Any]) -> Keys:
        """Returns the keys of a nested section."""
        return Keys(value, self.family, f'{self.source}, {key}', self.shapes, self.floats)

    def decoder(self, **switches: Any) -> TransformerConfig:
        """Returns the config of these sizes and switches; what it refuses is said of the file."""
        try:
            return TransformerConfig(**switches)
        except ValueError as error:
            raise ValueError(f'{self.source} ({self.family}): {error}') from error

    def finish(self) -> None:
        """Refuses what nobody took: it may change the maths."""
        unknown = sorted(key for key, value in self.found.items()
                         if key not in self._known and key not in HARMLESS and value is not None)
        if unknown:
            raise ValueError(f'{self.source} ({self.family}): the key {unknown[0]!r} = {self.found[unknown[0]]!r} is '
                             f'not known, and may change what the model computes ({len(unknown)} unknown).')


def rope(keys: Keys, base: float, kind: str = '') -> tuple[float, RopeScaling | None]:
    """Returns base and stretch of the rotary positions of a config.json, in its older or newer writing.

    Args:
      keys: of the config.
      base: where the file names none.
      kind: of layer, where each kind has a section of its own.
    """
    nested = keys.take('rope_parameters', {})
    section = nested.get(kind) or {} if kind and (FULL in nested or SLIDING in nested) else nested
    if nested:
        keys.note('rope_theta', 'rope_scaling')
        inner = keys.inside('rope_parameters', section)
        base = float(inner.take('rope_theta', base))
    else:
        base = float(keys.take('rope_theta', base))
        inner = keys.inside('rope_scaling', keys.take('rope_scaling', {}))
    name = inner.take('rope_type', inner.take('type', 'default'))
    scaling = None
    if name == 'linear':
        scaling = RopeScaling('linear', float(inner.take('factor')))
    elif name == 'llama3':
        scaling = RopeScaling(
            'llama3', float(inner.take('factor')), float(inner.take('low_freq_factor')),
            float(inner.take('high_freq_factor')), int(inner.take('original_max_position_embeddings')))
    elif name != 'default':
        raise ValueError(f"{inner.source} ({keys.family}): 'rope_type' is {name!r}; supported: 'default', 'linear', "
                         "'llama3'.")
    inner.expect('partial_rotary_factor', 1.0)
    inner.finish()
    return base, scaling


def rope_section(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Returns what `rope` reads: base and stretch as `rope_parameters`."""
    section: dict[str, Any] = {'rope_type': scaling.kind if scaling else 'default', 'rope_theta': base}
    if scaling is not None:
        section['factor'] = scaling.factor
        if scaling.kind == 'llama3':
            section |= {'low_freq_factor': scaling.low_freq_factor, 'high_freq_factor': scaling.high_freq_factor,
                        'original_max_position_embeddings': scaling.original_max_positions}
    return section


def decoder_shape(keys: Keys) -> dict[str, Any]:
    """Returns the sizes that the config.json of Llama and its kin name alike, as arguments of TransformerConfig."""
    width, heads = keys.take('hidden_size'), keys.take('num_attention_heads')
    return {
        'vocab_size': keys.take('vocab_size'), 'width': width, 'layers': keys.take('num_hidden_layers'), 'heads': heads,
        'kv_heads': keys.take('num_key_value_heads', heads), 'head_dim': keys.take('head_dim', width // heads),
        'mlp_width': keys.take('intermediate_size'), 'max_positions': keys.take('max_position_embeddings'),
        'norm_eps': keys.take('rms_norm_eps', 1e-6)}


def decoder_keys(config: TransformerConfig) -> dict[str, Any]:
    """Returns what `decoder_shape` reads, and the tied embeddings."""
    return {
        'vocab_size': config.vocab_size, 'hidden_size': config.width, 'num_hidden_layers': config.layers,
        'num_attention_heads': config.heads, 'num_key_value_heads': config.kv_heads, 'head_dim': config.head_dim,
        'intermediate_size': config.mlp_width, 'max_position_embeddings': config.max_positions,
        'rms_norm_eps': config.norm_eps, 'tie_word_embeddings': config.tied_embeddings}


def windows(keys: Keys, layers: int, kinds: list[str] | None) -> tuple[int, ...]:
    """Returns `layer_windows` of a config.json whose layers are of the given kinds, or as its `layer_types` says."""
    size = keys.take('sliding_window', 0)
    kinds = keys.take('layer_types', kinds or [FULL] * layers)
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown or len(kinds) != layers:
        raise ValueError(f"{keys.source} ({keys.family}): 'layer_types' names {len(kinds)} layers of kinds "
                         f'{sorted(set(kinds))}; it must name {layers}, each {FULL!r} or {SLIDING!r}.')
    if SLIDING not in kinds:
        return ()
    if not size:
        raise ValueError(f"{keys.source} ({keys.family}): layers are {SLIDING!r}, but 'sliding_window' is missing.")
    return tuple(size if kind == SLIDING else 0 for kind in kinds)


def layer_kinds(config: TransformerConfig) -> list[str]:
    """Returns `layer_types` of a config.json."""
    return [SLIDING if config.window(index) else FULL for index in range(config.layers)]


def gguf_shape(keys: Keys) -> dict[str, Any]:
    """Returns the sizes that all GGUF architectures name alike, as arguments of TransformerConfig."""
    if 'token_embd.weight' not in keys.shapes:
        raise ValueError(f"{keys.source} ({keys.family}) lacks the tensor 'token_embd.weight'.")
    width, heads = keys.take('embedding_length'), keys.take('attention.head_count')
    head_dim = keys.take('attention.key_length', width // heads)
    keys.expect('attention.value_length', head_dim)
    keys.expect('rope.dimension_count', head_dim)
    keys.expect('expert_count', 0)
    vocab_size = keys.shapes['token_embd.weight'][0]
    keys.expect('vocab_size', vocab_size)
    return {
        'vocab_size': vocab_size, 'width': width, 'layers': keys.take('block_count'), 'heads': heads,
        'kv_heads': keys.take('attention.head_count_kv', heads), 'head_dim': head_dim,
        'mlp_width': keys.take('feed_forward_length'), 'max_positions': keys.take('context_length'),
        'norm_eps': keys.take('attention.layer_norm_rms_epsilon'),
        'tied_embeddings': 'output.weight' not in keys.shapes}


def gguf_rope(keys: Keys, base: float = 10000.0) -> dict[str, Any]:
    """Returns base and stretch of a GGUF file's rotary positions, as arguments of TransformerConfig.

    The stretch of Llama 3.1 is stored as a tensor of one factor for each frequency.
    """
    base = float(keys.take('rope.freq_base', base))
    kind = keys.take('rope.scaling.type', 'none')
    keys.note('rope.scaling.original_context_length', 'rope.scaling.finetuned')
    scaling = None
    if kind == 'linear':
        scaling = RopeScaling('linear', float(keys.take('rope.scaling.factor')))
    elif kind != 'none':
        raise ValueError(f"{keys.source} ({keys.family}): 'rope.scaling.type' is {kind!r}; supported: none, linear.")
    if 'rope_freqs.weight' in keys.shapes and keys.floats is not None:
        if scaling is not None:
            raise ValueError(f"{keys.source} ({keys.family}) has both 'rope.scaling.type' {kind!r} and the tensor "
                             "'rope_freqs.weight'; supported: one of them.")
        factors = keys.floats('rope_freqs.weight').reshape(-1)
        scaling = RopeScaling('factors', factors=tuple(float(factor) for factor in factors))
    return {'rope_base': base, 'rope_scaling': scaling}
