"""The other side: the same networks, prompts and law in PyTorch, by `transformers`' own `generate`.

The scheme is the published one: the value network sees the last token in one pass, then all candidates packed in a
second, and its cache is cropped back. Attention is SDPA throughout, nothing is padded, and no scores are kept.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import copy
import functools
import math
import os
from pathlib import Path
import platform
import time
from typing import Any, TypeAlias

import numpy as np
from safetensors.torch import load_file
import torch
import transformers
from transformers.generation import logits_process

from benchmarks import workload
from benchmarks.workload import Guide

Tensor: TypeAlias = torch.Tensor

_PRODUCTS = ('mm', 'addmm', 'bmm', 'baddbmm')


class ValueGuidance(transformers.LogitsProcessor):
    """Adds each candidate's log-weight to its score.

    Behind the warpers, which have cut the scores to the sampler's nucleus, this is the law of the order
    'after_sampler' as long as no nucleus holds more tokens than there are candidates.
    """

    def __init__(self, trunk: Any, head: Tensor, cache: transformers.DynamicCache, etas: Tensor, candidates: int,
                 offset: str) -> None:
        """Takes a cache that holds all but the last token of each row.

        Args:
          trunk: the value network's trunk, a base model.
          head: its Bernoulli head.  # [1, D]
          cache: of the trunk; used up.
          etas: KL coefficient of each row.  # [B]
          candidates: number of best tokens that are scored.
          offset: 'qsharp' or 'cd'.
        """
        self._trunk, self._head, self._cache = trunk, head, cache
        self._etas, self._candidates, self._offset = etas[:, None], candidates, offset

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns guided scores.  # [B, L], [B, V] -> [B, V]"""
        cache, count = self._cache, self._candidates
        self._trunk(input_ids[:, -1:], past_key_values=cache, use_cache=True)
        length = cache.get_seq_length()
        ids = scores.topk(count, dim=-1).indices
        mask = torch.cat([torch.ones(count, length, dtype=torch.bool), torch.eye(count, dtype=torch.bool)], dim=1)
        hidden = self._trunk(
            ids, attention_mask=mask[None, None].expand(len(ids), 1, -1, -1),
            position_ids=torch.full_like(ids, length), past_key_values=cache, use_cache=True).last_hidden_state
        cache.crop(-count)
        # As in the official code, what is not scored keeps its score: its weight is 1.
        return scores.scatter_add(1, ids, self._log_weight(hidden.float() @ self._head[0]))

    def _log_weight(self, logits: Tensor) -> Tensor:
        """Returns log E exp(Z / eta), or E Z / eta, for rewards 0 and 1.  # [B, C] -> [B, C]"""
        if self._offset == 'cd':
            return logits.sigmoid() / self._etas
        log_sigmoid = torch.nn.functional.logsigmoid
        return torch.logaddexp(log_sigmoid(-logits), log_sigmoid(logits) + 1 / self._etas)


class Clock(transformers.LogitsProcessor):
    """Notes when each token's logits were there; changes nothing."""

    def __init__(self) -> None:
        """Starts without any."""
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores as they are."""
        self.times.append(time.perf_counter())
        return scores


class Fit:
    """The fit of a value network: the same loss, clipping and optimizer as ours."""

    def __init__(self, trunk: Any, kernel: Tensor) -> None:
        """Takes trunk and head [1, D] over."""
        self._trunk, self._kernel = trunk, torch.nn.Parameter(kernel.clone())
        self._parameters = [*trunk.parameters(), self._kernel]
        decayed = [parameter for parameter in self._parameters if parameter.ndim > 1]
        others = [parameter for parameter in self._parameters if parameter.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{'params': decayed, 'weight_decay': 0.01}, {'params': others, 'weight_decay': 0.0}],
            lr=workload.LEARNING_RATE, fused=True)

    def update(self, tokens: Tensor, weights: Tensor, rewards: Tensor) -> float:
        """Makes one update and returns the loss.

        Padding is at the end of rows, where no token that counts sees it: the causal mask alone is right, and fastest.

        Args:
          tokens: of each sample.  # [B, T]
          weights: of each token's loss; they sum to 1 over a row.  # [B, T]
          rewards: of each sample.  # [B, 1]
        """
        logits = self._trunk(tokens, use_cache=False).last_hidden_state @ self._kernel[0]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, rewards.expand_as(logits), reduction='none')
        loss = (weights * losses).sum() / len(tokens)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 5.0)
        self._optimizer.step()
        return float(loss)


class Side:
    """The peer's networks, and what is measured of them. Each method is a call of the protocol in worker.py."""

    def __init__(self) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._folder = Path()
        self._prefilled: tuple[Any, tuple[Any, Any, Tensor]] | None = None
        self._fits: dict[str, Fit] = {}
        self._batches: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def about(self) -> dict[str, str]:
        """Returns versions."""
        return {'python': platform.python_version(), 'torch': torch.__version__,
                'transformers': transformers.__version__, 'threads': str(torch.get_num_threads())}

    def setup(self, folder: str) -> None:
        """Takes the folder of networks and prompts that the other side leaves."""
        self._folder = Path(folder)

    @torch.inference_mode()
    def prefill(self, batch: int, prompt: int, layers: int, dtype: str) -> dict[str, float]:
        """Times both networks' prefill of one prompt a row, and keeps the caches for `decode`."""
        tokens = torch.tensor(np.load(self._folder / workload.PROMPTS.format(length=prompt))[:batch]).long()
        model, (trunk, _) = self._reference(dtype), self._value(layers, dtype)
        caches = transformers.DynamicCache(config=model.config), transformers.DynamicCache(config=trunk.config)
        began = time.perf_counter()
        # The last token is left to the first step, as on our side.
        model.base_model(tokens[:, :-1], past_key_values=caches[0], use_cache=True)
        trunk(tokens[:, :-1], past_key_values=caches[1], use_cache=True)
        seconds = time.perf_counter() - began
        self._prefilled = (batch, prompt, layers, dtype), (*caches, tokens)
        return {'seconds': seconds, 'tokens': batch * prompt}

    @torch.inference_mode()
    def decode(self, batch: int, prompt: int, layers: int, dtype: str, tokens: int,
               guide: dict[str, Any]) -> dict[str, float]:
        """Times `tokens` tokens a row after the prefill: the time between logits and logits `tokens` tokens later."""
        asked, clock = Guide.of(guide), Clock()
        model = self._reference(dtype)
        cache, prompts, processors, warpers = self._policy(batch, prompt, layers, dtype, asked)
        torch.manual_seed(0)
        made = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), past_key_values=cache, max_new_tokens=tokens + 1,
            do_sample=True, eos_token_id=None, pad_token_id=0, top_k=0,
            logits_processor=transformers.LogitsProcessorList([clock, *processors]), **warpers)
        assert made.shape == (batch, prompt + tokens + 1) and len(clock.times) == tokens + 1, made.shape
        return {'seconds': clock.times[-1] - clock.times[0], 'tokens': batch * tokens}

    def profile_decode(self, tokens: int, **shape: Any) -> dict[str, float]:
        """Returns the seconds of `decode` by what they went to."""
        self.decode(tokens=tokens, **shape)
        return profiled(functools.partial(self.decode, tokens=tokens, **shape))

    @torch.inference_mode()
    def log_probs(self, batch: int, prompt: int, layers: int, forced: Sequence[Sequence[int]], guide: dict[str, Any],
                  ours: str) -> dict[str, float]:
        """Compares the policy's log-probabilities before each of the forced tokens [B, T] with ours in a file."""
        asked, chosen = Guide.of(guide), torch.tensor(forced)
        model = self._reference('float32')
        cache, ids, processors, warpers = self._policy(batch, prompt, layers, 'float32', asked)
        law = transformers.LogitsProcessorList([*processors, *_warpers(warpers)])
        theirs = []
        for number in range(chosen.shape[1]):
            logits = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].float()
            theirs.append(torch.log_softmax(law(ids, logits), dim=-1).numpy())
            ids = torch.cat([ids, chosen[:, number:number + 1]], dim=1)
        return compare(np.stack(theirs), np.load(ours), asked)

    @torch.inference_mode()
    def first_token(self, rows: int, layers: int, guide: dict[str, Any]) -> dict[str, float]:
        """Times one token for `rows` prompts of 64 tokens."""
        began = time.perf_counter()
        self.decode(rows, 64, layers, 'float32', 0, guide)
        return {'seconds': time.perf_counter() - began, 'rows': rows}

    def prepare_fit(self, samples: str, batch: int, layers: int) -> dict[str, int]:
        """Lays out the samples that the other side left, `batch` a step, each padded to the longest of its step.

        Returns the tokens of all rows, `computed`, and of those how many are no padding, `real`.
        """
        sequences, first, rewards = workload.read_samples(self._folder / f'{samples}.npz')
        trunk, kernel = self._value(layers, 'float32')
        self._fits[samples] = Fit(copy.deepcopy(trunk), kernel)
        order = np.random.default_rng(0).permutation(len(sequences))
        steps = np.split(order, range(batch, len(order), batch))
        self._batches[samples] = [
            _padded([sequences[index] for index in chosen], first[chosen], rewards[chosen]) for chosen in steps]
        return {'computed': sum(tokens.numel() for tokens, *_ in self._batches[samples]),
                'real': sum(map(len, sequences))}

    def fit(self, samples: str) -> dict[str, float]:
        """Times one pass over those samples; `tokens` are those with a loss."""
        fit, batches = self._fits[samples], self._batches[samples]
        began = time.perf_counter()
        losses = [fit.update(*batch) for batch in batches]
        return {'seconds': time.perf_counter() - began, 'loss': float(np.mean(losses)),
                'tokens': sum(int((weights > 0).sum()) for _, weights, _ in batches)}

    def profile_fit(self, samples: str) -> dict[str, float]:
        """Returns the seconds of an update of `fit` by what they went to."""
        self.fit(samples)
        return profiled(functools.partial(self._fits[samples].update, *self._batches[samples][0]))

    def _policy(self, batch: int, prompt: int, layers: int, dtype: str, guide: Guide) -> tuple[Any, ...]:
        """Returns a copy of the reference's cache, the prompts, processors, and the options of generate's warpers."""
        if self._prefilled is None or self._prefilled[0] != (batch, prompt, layers, dtype):
            self.prefill(batch, prompt, layers, dtype)
        assert self._prefilled is not None
        reference_cache, value_cache, prompts = self._prefilled[1]
        warpers = {'temperature': guide.temperature, 'top_p': guide.top_p}
        processors: list[Any] = []
        if guide.etas is not None:
            trunk, head = self._value(layers, dtype)
            processors.append(ValueGuidance(
                trunk, head, copy.deepcopy(value_cache), torch.tensor(guide.eta_of_rows(batch)), guide.candidates,
                guide.offset))
            if guide.order == 'after_sampler':
                # generate applies its own warpers last, so here they are given as processors before ours.
                processors = [*_warpers(warpers), *processors]
                warpers = {'temperature': 1.0, 'top_p': 1.0}
        return copy.deepcopy(reference_cache), prompts, processors, warpers

    @functools.cache
    def _reference(self, dtype: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            self._folder / workload.REFERENCE, dtype=getattr(torch, dtype), attn_implementation='sdpa').eval()

    @functools.cache
    def _value(self, layers: int, dtype: str) -> tuple[Any, Tensor]:
        folder = self._folder / workload.VALUE.format(layers=layers)
        trunk = transformers.AutoModel.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation='sdpa').eval()
        return trunk, load_file(folder / 'value_head.safetensors')['kernel']


def _padded(sequences: Sequence[np.ndarray], first: np.ndarray, rewards: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens [B, T], weights [B, T] and rewards [B, 1] of a step, as `Fit.update` takes them."""
    length = max(map(len, sequences))
    tokens, weights = torch.zeros(len(sequences), length, dtype=torch.long), torch.zeros(len(sequences), length)
    for row, (sequence, start) in enumerate(zip(sequences, first, strict=True)):
        tokens[row, :len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        weights[row, start:len(sequence)] = 1 / (len(sequence) - start)
    return tokens, weights, torch.tensor(rewards, dtype=torch.float32)[:, None]


def compare(theirs: np.ndarray, ours: np.ndarray, guide: Guide) -> dict[str, float]:
    """Returns how far two laws lie apart.  # 2 x [T, B, V]

    Returns:
      `laws`, how many there are; `largest`, the largest difference of two log-probabilities among the laws that both
      sides give the same support; `other_support`, how many have another, for a token on the very edge of the nucleus;
      `wide`, how many the peer does not compute: those whose nucleus holds more tokens than it scores.
    """
    theirs, ours = (laws.reshape(-1, laws.shape[-1]) for laws in (theirs, ours))
    size = np.isfinite(ours).sum(axis=-1)
    wide = size > guide.candidates if guide.etas is not None and guide.order == 'after_sampler' else size < 0
    same = (np.isfinite(theirs) == np.isfinite(ours)).all(axis=-1)
    both = np.isfinite(theirs) & np.isfinite(ours) & (same & ~wide)[:, None]
    return {'laws': len(ours), 'largest': float(np.abs(theirs[both] - ours[both]).max(initial=0.0)),
            'other_support': int((~same & ~wide).sum()), 'wide': int(wide.sum()),
            'tokens_in_support': float(np.median(size))}


def profiled(run: Callable[[], Any]) -> dict[str, float]:
    """Runs something under PyTorch's profiler, and returns the seconds of each kind of operation.

    They are those of the threads that call operations, of which there is one at a time.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    found: Counter[str] = Counter()
    for event in profile.key_averages():
        name = event.key.removeprefix('aten::')
        kind = 'products' if name in _PRODUCTS else 'attention' if 'scaled_dot_product' in name else 'the rest'
        found[kind] += event.self_cpu_time_total / 1e6
    return dict(found)


def _warpers(options: dict[str, float]) -> list[Any]:
    """Returns the warpers that `generate` makes of these options."""
    found: list[Any] = []
    if options['temperature'] != 1.0:
        found.append(logits_process.TemperatureLogitsWarper(options['temperature']))
    if not math.isclose(options['top_p'], 1.0):
        found.append(logits_process.TopPLogitsWarper(options['top_p']))
    return found
