"""Our side: the only file here that calls the project's decoder, roll-outs and fit."""
from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
import platform
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from benchmarks import cutoff, laws, profiles, workload
from benchmarks.laws import policy_of
from benchmarks.workload import Guide
from qsharp_jax import allocation, categorical, decoding, learner, ledger, references, rollout, sharding
from qsharp_jax.data.dataset import AggregatedDataset, DatasetWriter, Rollout
from qsharp_jax.data.packing import attention_mask, FitBatch, FitBatches
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.data.tokenizers import Tokenizer
from qsharp_jax.models import networks, pretrained, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.pretrained import export
from qsharp_jax.optimizers import OptimizerConfig
from qsharp_jax.queue import Queue
from qsharp_jax.types import Params, Reference

# Deviation of the random head's logits over the prompts: it guides by hundredths of a nat a token, as a fitted one.
_SPREAD = 0.5
_SEED = 0
_PROMPTS = 64  # of each length
_PAIRS = 8000  # solved questions that prompts are made of, at most
_SHARD, _BATCHES = 4096, 20  # answers a shard, and batches that are timed, where D grows
_FITTED = 256  # of them, those that samples to fit are made of

Networks = tuple[Reference, decoding.Guidance, Params, Params]  # the value network within the guidance, parameters


class Side:
    """Our networks, and what is measured of them. Each public method is a call of the protocol in worker.py."""

    def __init__(self) -> None:
        allocation.keep_freed_memory()  # as every entry point does
        self._distribution = categorical.make('bernoulli', 0.0, 1.0, 2, 'nearest', 0.75)
        self._pairs: list[tuple[str, str]] = []
        self._folder = Path()
        self._prefilled: tuple[Any, decoding.DecodeState] | None = None
        self._fits: dict[str, tuple[Any, Any, list[FitBatch]]] = {}
        self._compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)

    def about(self) -> dict[str, str]:
        """Returns versions."""
        return {'python': platform.python_version(), 'jax': jax.__version__, 'device': jax.devices()[0].device_kind}

    def setup(self, folder: str, data: str) -> str:
        """Reads the questions, and returns what they are from.

        Args:
          folder: where networks and prompts are left for the peer.
          data: folder of GSM8K.
        """
        self._folder = Path(folder)
        self._pairs, source = workload.solved(Path(data), _PAIRS)
        return source

    @functools.cached_property
    def _file(self) -> pretrained.Checkpoint:
        """The reference: as it is published, or as another process has left it."""
        left = self._folder / workload.REFERENCE
        return pretrained.open_checkpoint(left if left.exists() else workload.SOURCE)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return references.tokenizer_of(pretrained.open_checkpoint(workload.SOURCE))

    def export(self, layers: int, prompt: int) -> None:
        """Writes the reference, the value network of so many layers, and the prompts for the peer, in float32."""
        np.save(self._folder / workload.PROMPTS.format(length=prompt), self._prompts(prompt))
        config, params = self._reference('float32')
        export.write_model(self._folder / workload.REFERENCE, config, params)
        value_config, values = self._value(layers)
        export.write_value(self._folder / workload.VALUE.format(layers=layers),
                           value_lib.trunk_config(value_config, config), values, {})

    def prefill(self, batch: int, prompt: int, layers: int, dtype: str, room: int) -> dict[str, float]:
        """Times both networks' prefill of one prompt a row, and keeps the state for `decode`.

        Args:
          batch: rows.
          prompt: tokens of each prompt.
          layers: of the value network.
          dtype: of the arithmetic.
          room: slots of the cache for each answer.
        """
        reference, how, params, values = self._networks(layers, dtype, Guide())
        rows = jnp.arange(batch, dtype=jnp.int32)
        keys = decoding.unit_keys(_SEED, 0, 'evaluate', rows, jnp.zeros_like(rows))
        prompts = jnp.asarray(self._prompts(prompt)[:batch])
        began = time.perf_counter()
        state = jax.block_until_ready(decoding.start(
            reference, how.value, params, values, prompts, jnp.full(batch, prompt), rows, keys, jnp.full(batch, room),
            buffer=room))
        seconds = time.perf_counter() - began
        self._prefilled = (batch, prompt, layers, dtype, room), state
        return {'seconds': seconds, 'tokens': batch * prompt}

    def decode(self, batch: int, prompt: int, layers: int, dtype: str, room: int, tokens: int,
               guide: dict[str, Any]) -> dict[str, float]:
        """Times `tokens` tokens a row after the prefill."""
        arguments = self._decoding(batch, prompt, layers, dtype, room, tokens, guide)
        began = time.perf_counter()
        state = jax.block_until_ready(decoding.decode(*arguments, eos_ids=()))
        seconds = time.perf_counter() - began
        made = int(state.count.sum())
        assert made == batch * tokens, (made, batch, tokens)
        return {'seconds': seconds, 'tokens': made, 'kl_per_token': float(state.kl.sum()) / made,
                'value_tokens': int(state.value_tokens.sum()), 'reference_tokens': int(state.reference_tokens.sum())}

    def profile_decode(self, batch: int, prompt: int, layers: int, dtype: str, room: int, tokens: int,
                       guide: dict[str, Any]) -> dict[str, float]:
        """Returns the seconds of `decode` by what they went to."""
        arguments = [self._decoding(batch, prompt, layers, dtype, room, tokens, guide) for _ in range(2)]
        jax.block_until_ready(decoding.decode(*arguments[0], eos_ids=()))
        program = decoding.decode.lower(*arguments[1], eos_ids=()).compile()
        return profiles.measure(lambda: jax.block_until_ready(decoding.decode(*arguments[1], eos_ids=())), program,
                                profiles.decode_part)

    def nucleus(self, batch: int, prompt: int, tokens: int) -> list[int]:
        """Returns how many tokens the sampler's nucleus holds, in each of so many steps of each row."""
        def choose(number: int, log_probs: jax.Array) -> jax.Array:
            return jax.random.categorical(jax.random.fold_in(jax.random.key(_SEED), number), log_probs)

        laws = self._laws(batch, prompt, 1, tokens, workload.UNGUIDED, choose)
        return np.isfinite(laws).sum(axis=-1).ravel().tolist()

    def work(self, prompt: int, layers: int, guide: dict[str, Any]) -> dict[str, float]:
        """Returns the parameters that a step reads and the FLOPs of one token, at the beginning of an answer.

        In the order 'after_sampler', of which the number of passes varies, with the least of them: one.
        """
        asked, config = Guide.of(guide), self._file.config
        reference = ledger.reference_cost(config)
        value = ledger.value_cost(config, self._value_config(layers), asked.candidates)
        alone = {'parameters': reference.weights / 4, 'flops': float(reference.flops(1, prompt + 1, 1))}
        if asked.etas is None:
            return alone
        tokens = 1 + asked.candidates
        return {'parameters': alone['parameters'] + value.weights / 4,
                'flops': alone['flops'] + float(value.flops(tokens, prompt + 1, tokens)),
                'flops_a_value_token': float(value.flops(1, prompt + 1, 1))}

    def log_probs(self, batch: int, prompt: int, layers: int, forced: Sequence[Sequence[int]],
                  guide: dict[str, Any]) -> str:
        """Returns the file of the policy's log-probabilities before each of the forced tokens [B, T], for a comparison.

        # [T, B, V]
        """
        tokens = np.asarray(forced, np.int32)
        path = self._folder / 'ours_log_probs.npy'
        np.save(path, self._laws(batch, prompt, layers, tokens.shape[1], Guide.of(guide),
                                 lambda number, _: jnp.asarray(tokens[:, number])))
        return str(path)

    def cutoff(self, batch: int, prompt: int, layers: int, steps: int, cutoffs: Sequence[float],
               guide: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Returns what each cut-off of the candidates changes, see `cutoff.effect`."""
        asked = Guide.of(guide)
        state = self._state(batch, prompt, layers, 'float32', steps, steps, asked)
        reference, how, params, values = self._networks(layers, 'float32', asked)
        return cutoff.effect(reference, how, cutoffs, params, values, policy_of(asked, batch), state, steps, _SEED)

    def first_token(self, prompts: int, samples: int, batch: int, layers: int,
                    guide: dict[str, Any]) -> dict[str, float]:
        """Times the first token of `samples` answers to each prompt, laid out by the project in `batch` rows.

        `compilations` are those of XLA since the call before, at the first call since the process began.
        """
        began, asked = time.perf_counter(), Guide.of(guide)
        queue = self._queue(prompts, batch, layers, asked, decoding.Answering(1), ())
        drawn = queue.draw(range(prompts), samples, jax.tree.map(np.asarray, policy_of(asked, 1)))
        compilations, self._compilations = self._compilations, 0
        return {'seconds': time.perf_counter() - began, 'rows': len(drawn.units.index), 'compilations': compilations}

    def collect(self, prompts: int, samples: int, batch: int, room: int, layers: int,
                guide: dict[str, Any]) -> dict[str, float]:
        """Times roll-in and roll-out of `samples` units of each prompt; an answer ends with its sentence or line.

        `active` are the row-steps in which a token was drawn, `row_steps` are all.
        """
        asked, task = Guide.of(guide), rollout.RollingOut(rollout.RolloutConfig(room))
        queue = self._queue(prompts, batch, layers, asked, task, self._sentence_ends())
        began = time.perf_counter()
        drawn = queue.draw(range(prompts), samples, jax.tree.map(np.asarray, policy_of(asked, 1)))
        return {'seconds': time.perf_counter() - began, 'pairs': len(drawn.units.index), 'active': drawn.written,
                'row_steps': batch * drawn.steps}

    def prepare_fit(self, samples: str, samples_per_row: int, batch: int, layers: int) -> dict[str, int]:
        """Lays out the samples of `workload.fit_samples(samples)`, leaves them for the peer, and starts a fit.

        Returns the tokens of all rows, `computed`, and of those how many are no padding, `real`.
        """
        rollouts, rewards = self._samples(samples)
        folder = tempfile.mkdtemp(dir=self._folder)
        writer = DatasetWriter(folder)
        writer.write_shard(1, 0, rollouts, {})
        writer.write_labels(1, 0, samples, rewards)
        laid = FitBatches(AggregatedDataset(folder, samples, 1), batch, samples_per_row, _SEED)
        batches = [jax.tree.map(jnp.asarray, laid.batch(step)) for step in range(laid.steps_per_epoch)]
        value_config, values = self._value(layers)

        def scores(params: Params, batch: FitBatch) -> jax.Array:
            return networks.value_scores(self._file.config, value_config, params, batch.tokens, batch.positions,
                                         attention_mask(batch.ends), batch.parents)

        optimizer = OptimizerConfig(learning_rate=workload.LEARNING_RATE)
        state = learner.init(values, optimizer)
        self._fits[samples] = state, learner.make_update(scores, self._distribution, optimizer, state), batches
        # Tokens of prompts are seen by others, tokens of answers have an example: padding is neither.
        real = [(one.examples >= 0) | (one.ends > 1 + jnp.arange(one.ends.shape[1])[None]) for one in batches]
        return {'computed': sum(one.tokens.size for one in batches), 'real': sum(int(one.sum()) for one in real)}

    def forget(self) -> dict[str, float]:
        """Lets go of all compiled programs."""
        jax.clear_caches()
        return {}

    def data(self, answers: int) -> dict[str, float]:
        """Times the opening and laying out of a D of so many answers of 32 tokens, and then of batches of 32 of them.

        Eight answers to each prompt, which has 32 tokens too.
        """
        folder, rng = self._folder / f'data_{answers}', np.random.default_rng(_SEED)
        writer, text = DatasetWriter(folder), rng.integers(20, 1000, (_SHARD, 64)).astype(np.int32)
        for block, first in enumerate(range(0, answers, _SHARD)):
            units = range(first, min(first + _SHARD, answers))
            writer.write_shard(1, block, [
                Rollout(1, unit // 8, unit % 8, text[unit // 8 % _SHARD, :32], text[unit % _SHARD, 32:], unit % 32,
                        ended=True, truncated=False) for unit in units], {})
            writer.write_labels(1, block, 'growth', np.asarray([unit % 2 for unit in units], np.float64))
        began = time.perf_counter()
        laid = FitBatches(AggregatedDataset(folder, 'growth', 1), 32, 1, _SEED)
        opened = time.perf_counter()
        for step in range(_BATCHES):
            laid.batch(step)
        return {'open_seconds': opened - began, 'batch_seconds': (time.perf_counter() - opened) / _BATCHES,
                'batch_answers': 32}

    def fit(self, samples: str) -> dict[str, float]:
        """Times one pass over those samples; `tokens` are those with a loss."""
        state, update, batches = self._fits[samples]
        losses = []
        began = time.perf_counter()
        for batch in batches:
            state, metrics = update(state, batch)
            losses.append(metrics['loss'])
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        self._fits[samples] = state, update, batches
        return {'seconds': seconds, 'tokens': sum(int((one.weights > 0).sum()) for one in batches),
                'loss': float(np.mean(losses))}

    def profile_fit(self, samples: str) -> dict[str, float]:
        """Returns the seconds of an update of `fit`, without compiling, by what they went to."""
        self.fit(samples)  # compiled, and memory touched
        state, update, batches = self._fits[samples]
        program, state = update.lower(state, batches[0]).compile(), jax.tree.map(jnp.copy, state)
        return profiles.measure(lambda: jax.block_until_ready(update(state, batches[0])), program, profiles.fit_part)

    def _networks(self, layers: int, dtype: str, guide: Guide) -> Networks:
        reference, value = self._functions(layers, dtype)
        params = self._reference(dtype)[1]
        if guide.etas is None:
            return reference, decoding.Guidance(), params, None
        value = dataclasses.replace(value, ragged=value.ragged and guide.spared)
        how = decoding.Guidance(value=value, distribution=self._distribution, candidates=guide.candidates,
                                epsilon_cutoff=guide.epsilon_cutoff, outside=guide.outside, order=guide.order,
                                offset=guide.offset, draft=guide.draft)
        values = self._value(layers)[1]
        head = jax.tree.map(lambda kernel: guide.spread * kernel, values['head'])
        return reference, how, params, {**values, 'head': head}

    @functools.cache
    def _functions(self, layers: int, dtype: str) -> tuple[Any, Any]:
        config, _ = self._reference(dtype)
        base = dataclasses.replace(config, param_dtype=jnp.dtype('float32'))
        return networks.reference(config), networks.value(base, self._value_config(layers))

    @functools.cache
    def _reference(self, dtype: str) -> tuple[transformer.TransformerConfig, Params]:
        kind = jnp.dtype(dtype)
        config = dataclasses.replace(self._file.config, dtype=kind, param_dtype=kind)
        return config, jax.tree.map(jnp.asarray, pretrained.load_params(self._file, dtype=kind))

    def _value_config(self, layers: int) -> value_lib.ValueConfig:
        return value_lib.ValueConfig(num_scores=1, layers=layers, head_init='normal')

    @functools.cache
    def _value(self, layers: int) -> tuple[value_lib.ValueConfig, Params]:
        """Returns a value network of the reference's first layers with a random head; parameters are always float32."""
        value_config = self._value_config(layers)
        left = self._folder / workload.VALUE.format(layers=layers)
        if left.exists():
            trunk = pretrained.load_params(pretrained.open_folder(left))
            found = {'trunk': trunk, 'head': load_file(left / export.HEAD)}
            return value_config, jax.tree.map(jnp.asarray, found)
        config, params = self._reference('float32')
        values = value_lib.init_value_params(jax.random.key(_SEED), value_config, params, config)
        trunk = value_lib.trunk_config(value_config, config)
        tokens = jnp.asarray(self._prompts(64)[:4])
        positions = jnp.broadcast_to(jnp.arange(64)[None], tokens.shape)
        hidden = jax.jit(functools.partial(transformer.hidden_states, trunk))(
            values['trunk'], tokens, positions, transformer.causal_mask(64))
        values['head']['kernel'] = _opinions(values['head']['kernel'], hidden.reshape(-1, trunk.width))
        return value_config, values

    @functools.cache
    def _prompts(self, length: int) -> np.ndarray:
        left = self._folder / workload.PROMPTS.format(length=length)
        if left.exists():
            return np.asarray(np.load(left))
        return workload.token_prompts(self._pairs, self._tokenizer, _PROMPTS, length)

    def _state(self, batch: int, prompt: int, layers: int, dtype: str, room: int, tokens: int,
               guide: Guide) -> decoding.DecodeState:
        """Returns a copy of the prefilled state, which decoding consumes."""
        if self._prefilled is None or self._prefilled[0] != (batch, prompt, layers, dtype, room):
            self.prefill(batch, prompt, layers, dtype, room)
        assert self._prefilled is not None
        state = dataclasses.replace(self._prefilled[1], limit=jnp.full(batch, tokens))
        if guide.etas is None:
            state = dataclasses.replace(state, value_cache=None)
        return jax.tree.map(jnp.copy, state)

    def _decoding(self, batch: int, prompt: int, layers: int, dtype: str, room: int, tokens: int,
                  guide: dict[str, Any]) -> tuple[Any, ...]:
        """Returns the arguments of `decoding.decode`, of which the state is used up."""
        asked = Guide.of(guide)
        state = jax.block_until_ready(self._state(batch, prompt, layers, dtype, room, tokens, asked))
        return *self._networks(layers, dtype, asked), policy_of(asked, batch), state

    def _laws(self, batch: int, prompt: int, layers: int, steps: int, guide: Guide,
              choose: Callable[[int, jax.Array], jax.Array]) -> np.ndarray:
        """Returns log-probabilities before each of so many tokens, chosen by number and law.  # [T, B, V]"""
        state = self._state(batch, prompt, layers, 'float32', steps, steps, guide)
        reference, how, params, values = self._networks(layers, 'float32', guide)
        step = jax.jit(functools.partial(laws.law_of_step, reference, how))
        follow = jax.jit(functools.partial(laws.follow, how))
        found = []
        for number in range(steps):
            _, log_probs, *after = step(params, values, policy_of(guide, batch), state)
            state = follow(*after, choose(number, log_probs))
            found.append(np.asarray(log_probs))
        return np.stack(found)

    def _queue(self, prompts: int, batch: int, layers: int, guide: Guide, task: decoding.Task,
               ends: tuple[int, ...]) -> Queue:
        asked = Prompts(np.arange(prompts), self._prompts(64)[:prompts].tolist(), [''] * prompts, {})
        return Queue(sharding.make_mesh(devices=jax.devices()[:1]), *self._networks(layers, 'float32', guide), ends,
                     task, asked, batch, _SEED)

    @functools.cache
    def _sentence_ends(self) -> tuple[int, ...]:
        """Returns the ids whose text ends a sentence or a line."""
        pieces = self._tokenizer.pieces(range(self._tokenizer.vocab_size))
        return tuple(index for index, piece in enumerate(pieces) if piece.strip(' ') in ('.', '?', '!', '\n', '\n\n'))

    def _samples(self, name: str) -> tuple[list[Rollout], np.ndarray]:
        """Returns samples to fit and their rewards, which it writes to a file for the peer as well."""
        rng = np.random.default_rng(_SEED)
        encoded = [[np.asarray(self._tokenizer.encode(text), np.int32)
                    for text in (f'Question: {question}\nAnswer:', f' {answer}\n')]
                   for question, answer in self._pairs[:_FITTED]]
        found = []
        for example, sample, length in workload.fit_samples(name):
            prompt, answer = encoded[example][0], encoded[(7 * example + sample) % len(encoded)][1]
            if length:
                prompt, answer = np.resize(prompt, length // 2), np.resize(answer, length // 2)
            found.append(Rollout(1, example, sample, prompt, answer, 0 if length else int(rng.integers(len(answer))),
                                 ended=True, truncated=False))
        rewards = rng.integers(0, 2, len(found)).astype(np.float64)
        workload.write_samples(self._folder / f'{name}.npz', [(one.prompt, one.answer, one.cut) for one in found],
                               rewards)
        return found, rewards

    def _count_compilation(self, event: str, duration_secs: float, **_: Any) -> None:
        self._compilations += event.endswith('/backend_compile_duration')


def _opinions(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """Returns a head [1, D] whose logits on the hidden states [N, D] have mean 0 and deviation `_SPREAD`."""
    mean = jnp.mean(hidden, axis=0)
    kernel = kernel - (jnp.dot(kernel[0], mean) / jnp.dot(mean, mean) * mean)[None]
    return kernel * _SPREAD / jnp.std(hidden @ kernel[0])
