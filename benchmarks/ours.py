"""Our side: the only file here that calls the project's decoder, roll-outs and fit."""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from pathlib import Path
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workload
from benchmarks.workload import Guide
from qsharp_jax import categorical, decoding, guidance, references
from qsharp_jax.decoding.step import score_candidates
from qsharp_jax.models import networks, pretrained, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.pretrained import export
from qsharp_jax.types import Params, Policy

# Spread of the random head's logits over the prompts: guides by a few nats an answer, as a fitted one does.
_SPREAD = 0.5
_SEED = 0


class Side:
    """Our networks, and what is measured of them. Each method is a call of the protocol in worker.py."""

    def __init__(self) -> None:
        self._file = pretrained.open_checkpoint(workload.SOURCE)
        self._tokenizer = references.tokenizer_of(self._file)
        self._distribution = categorical.make('bernoulli', 0.0, 1.0, 2, 'nearest', 0.75)
        self._pairs: list[tuple[str, str]] = []
        self._folder = Path()
        self._prefilled: tuple[Any, decoding.DecodeState] | None = None

    def about(self) -> dict[str, str]:
        """Returns versions."""
        return {'python': platform.python_version(), 'jax': jax.__version__, 'device': jax.devices()[0].device_kind}

    def setup(self, folder: str, data: str) -> dict[str, Any]:
        """Reads the questions; `folder` is where networks and prompts are left for the peer."""
        self._folder = Path(folder)
        self._pairs, source = workload.solved(Path(data), 256)
        return {'questions': source}

    def export(self, layers: int, prompt: int) -> None:
        """Writes the reference, the value network cut to `layers`, and the prompts for the peer, in float32."""
        np.save(self._folder / f'prompts_{prompt}.npy', self._prompts(prompt))
        config, params = self._reference('float32')
        export.write_model(self._folder / workload.REFERENCE, config, params)
        value_config, values = self._value(layers)
        export.write_value(self._folder / workload.VALUE.format(layers=layers),
                           value_lib.trunk_config(value_config, config), values, {})

    def prefill(self, batch: int, prompt: int, layers: int, dtype: str, room: int) -> dict[str, float]:
        """Times both networks' prefill of one prompt a row, and keeps the state for `decode`."""
        arguments = self._start_arguments(batch, prompt, layers, dtype)
        began = time.perf_counter()
        state = jax.block_until_ready(decoding.start(*arguments, limit=jnp.full(batch, room), buffer=room))
        seconds = time.perf_counter() - began
        self._prefilled = (batch, prompt, layers, dtype, room), state
        return {'seconds': seconds, 'tokens': batch * prompt}

    def decode(self, batch: int, prompt: int, layers: int, dtype: str, room: int, tokens: int,
               guide: dict[str, Any]) -> dict[str, float]:
        """Times `tokens` tokens a row after the prefill."""
        asked = Guide.of(guide)
        state, arguments = self._decode_arguments(batch, prompt, layers, dtype, room, tokens, asked)
        jax.block_until_ready(state)
        began = time.perf_counter()
        state = jax.block_until_ready(decoding.decode(*arguments, state, eos_ids=()))
        seconds = time.perf_counter() - began
        made = int(state.count.sum())
        assert made == batch * tokens, (made, batch, tokens)
        return {'seconds': seconds, 'tokens': made, 'kl_per_token': float(state.kl.sum()) / made}

    def log_probs(self, batch: int, prompt: int, layers: int, dtype: str, forced: Sequence[Sequence[int]],
                  guide: dict[str, Any]) -> list[str]:
        """Writes the policy's log-probabilities before each of the forced tokens [B, T] to a file, for a comparison.

        # [T, B, V]
        """
        asked, tokens = Guide.of(guide), np.asarray(forced, np.int32)
        state, (reference, how, params, values, policy) = self._decode_arguments(
            batch, prompt, layers, dtype, tokens.shape[1], tokens.shape[1], asked)
        found = []
        law = jax.jit(functools.partial(_law, reference, how))
        for number in range(tokens.shape[1]):
            log_probs, state = law(params, values, policy, state)
            state = dataclasses.replace(state, pending=jnp.asarray(tokens[:, number]), count=state.count + 1)
            found.append(np.asarray(log_probs))
        path = self._folder / 'ours_log_probs.npy'
        np.save(path, np.stack(found))
        return [str(path)]

    @functools.cache
    def _reference(self, dtype: str) -> tuple[transformer.TransformerConfig, Params]:
        kind = jnp.dtype(dtype)
        config = dataclasses.replace(self._file.config, dtype=kind, param_dtype=kind)
        params = pretrained.load_params(self._file, dtype=kind)
        return config, jax.tree.map(jnp.asarray, params)

    @functools.cache
    def _value(self, layers: int) -> tuple[value_lib.ValueConfig, Params]:
        """Returns a value network of the reference's first layers with a random head; parameters stay float32."""
        config, params = self._reference('float32')
        value_config = value_lib.ValueConfig(num_scores=1, layers=layers, head_init='normal')
        values = value_lib.init_value_params(jax.random.key(_SEED), value_config, params, config)
        trunk = value_lib.trunk_config(value_config, config)
        tokens = jnp.asarray(self._prompts(64)[:16])
        positions = jnp.broadcast_to(jnp.arange(64)[None], tokens.shape)
        hidden = jax.jit(functools.partial(transformer.hidden_states, trunk))(
            values['trunk'], tokens, positions, transformer.causal_mask(64)).reshape(-1, trunk.width)
        values['head']['kernel'] = _opinions(values['head']['kernel'], hidden)
        return value_config, values

    @functools.cache
    def _networks(self, layers: int, dtype: str) -> tuple[Any, Any]:
        config, _ = self._reference(dtype)
        value_config, _ = self._value(layers)
        base = dataclasses.replace(config, param_dtype=jnp.dtype('float32'))
        return networks.reference(config, self._tokenizer.vocab_size), networks.value(base, value_config)

    @functools.cache
    def _prompts(self, length: int) -> np.ndarray:
        return workload.token_prompts(self._pairs, self._tokenizer, 64, length)

    def _start_arguments(self, batch: int, prompt: int, layers: int, dtype: str) -> tuple[Any, ...]:
        reference, value = self._networks(layers, dtype)
        rows = jnp.arange(batch, dtype=jnp.int32)
        keys = decoding.unit_keys(_SEED, 0, 'evaluate', rows, jnp.zeros_like(rows))
        return (reference, value, self._reference(dtype)[1], self._value(layers)[1],
                jnp.asarray(self._prompts(prompt)[:batch]), jnp.full(batch, prompt), rows, keys)

    def _decode_arguments(self, batch: int, prompt: int, layers: int, dtype: str, room: int, tokens: int,
                          guide: Guide) -> tuple[decoding.DecodeState, tuple[Any, ...]]:
        """Returns a copy of the prefilled state, which decoding consumes, and what comes before it."""
        if self._prefilled is None or self._prefilled[0] != (batch, prompt, layers, dtype, room):
            self.prefill(batch, prompt, layers, dtype, room)
        assert self._prefilled is not None
        state = self._prefilled[1]
        reference, value = self._networks(layers, dtype)
        how = decoding.Guidance()
        if guide.etas is None:
            state = dataclasses.replace(state, value_cache=None)
        else:
            how = decoding.Guidance(value=value, distribution=self._distribution, candidates=guide.candidates,
                                    outside=guide.outside, order=guide.order, offset=guide.offset)
        state = jax.tree.map(jnp.copy, dataclasses.replace(state, limit=jnp.full(batch, tokens)))
        values = self._value(layers)[1]
        return state, (reference, how, self._reference(dtype)[1], None if guide.etas is None else values,
                       policy_of(guide, batch))


def policy_of(guide: Guide, rows: int) -> Policy:
    """Returns the policy of each row."""
    return Policy(
        eta=jnp.asarray(guide.eta_of_rows(rows)), temperature=jnp.full(rows, guide.temperature),
        top_k=jnp.zeros(rows, jnp.int32), top_p=jnp.full(rows, guide.top_p),
        reference_temperature=jnp.full(rows, guide.temperature))


def _law(reference: Any, how: decoding.Guidance, params: Params, values: Params, policy: Policy,
         state: decoding.DecodeState) -> tuple[jax.Array, decoding.DecodeState]:
    """Returns the log-probabilities of the next token [B, V], and the state with the pending token in its caches."""
    logits, cache = reference.step(params, state.pending, state.length, state.reference_cache)
    sampler = guidance.sampler_log_probs(logits, policy)
    state = dataclasses.replace(state, reference_cache=cache)
    if how.value is None:
        return sampler, state
    scored = score_candidates(how, values, state, policy, logits, sampler)
    law = guidance.policy_log_probs(
        logits, scored.log_weight, scored.mask, scored.root_log_weight, state.count == 0, policy,
        outside=how.outside, order=how.order)
    return law, dataclasses.replace(state, value_cache=scored.cache)


def _opinions(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """Returns a head [1, D] whose logits on the hidden states [N, D] have mean 0 and deviation `_SPREAD`."""
    mean = jnp.mean(hidden, axis=0)
    kernel = kernel - jnp.dot(kernel, mean)[:, None] * mean[None] / jnp.dot(mean, mean)
    return kernel * _SPREAD / jnp.std(hidden @ kernel[0])
