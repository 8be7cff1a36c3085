"""Talking to any checkpoint, guided by a value network or not; the answer appears as it is written."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from qsharp_jax import categorical, checkpoint
from qsharp_jax import config as config_lib
from qsharp_jax import decoding, experiment, references, sharding, units
from qsharp_jax.data import tokenizer_pairs
from qsharp_jax.data.tokenizers import BPETokenizer
from qsharp_jax.decoding import Guidance
from qsharp_jax.models import networks, pretrained, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.pretrained import safetensors
from qsharp_jax.models.pretrained.export import HEAD, HEAD_CONFIG
from qsharp_jax.models.pretrained.huggingface import read_json
from qsharp_jax.types import Params, Policy, Reference

_UNFINISHED = '\ufffd'  # what decodes from a part of a character


@dataclasses.dataclass(frozen=True, eq=False)
class Guide:
    """A value network that was read, and how it guides.

    Attributes:
      how: the guidance.
      params: its parameters, on the mesh.
      eta: KL coefficient of the run that it is of; None for an exported one.
      eos_ids: every token that ends an answer of that run.
      max_positions: the longest sequence that it reads.
      meta: what it is valid for.
    """

    how: Guidance
    params: Params
    eta: float | None
    eos_ids: tuple[int, ...]
    max_positions: int
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Speaker:
    """A reference, guided or not, ready to answer.

    Attributes:
      mesh: the devices.
      tokenizer: of the reference.
      reference: the reference.
      params: its parameters, on the mesh.
      max_positions: the longest sequence of prompt and answer.
      guide: what guides it; None for the reference alone.
      eos_ids: every token that ends an answer.
      policy: eta and sampler, one row.
      max_new_tokens: most tokens of an answer.
    """

    mesh: Mesh
    tokenizer: BPETokenizer
    reference: Reference
    params: Params
    max_positions: int
    guide: Guide | None
    eos_ids: tuple[int, ...]
    policy: Policy
    max_new_tokens: int

    def answer(self, prompt: Sequence[int], seed: int, sample: int) -> Iterator[str]:
        """Yields an answer piece by piece: the text that each token adds, whole characters only.

        Args:
          prompt: ids.
          seed: of the draws.
          sample: number of the answer among those to one prompt.

        Raises:
          ValueError: prompt and answer do not fit the positions of a network.
        """
        # Few widths, so that a conversation that grows is not compiled anew with every turn.
        width = min(units.round_up(len(prompt), 64), self.max_positions - self.max_new_tokens)
        if len(prompt) > width:
            raise ValueError(f'a prompt of {len(prompt)} tokens and an answer of {self.max_new_tokens} do not fit the '
                             f'{self.max_positions} positions of the model: lower --max_new_tokens or shorten it.')
        rows = sharding.pad_rows(1, self.mesh)
        padded = np.zeros((1, width), np.int32)
        padded[0, :len(prompt)] = prompt
        first, numbers = np.arange(rows) == 0, np.full(rows, sample, np.int32)
        which, numbers, policy = sharding.shard_batch(self.mesh, (
            np.zeros(rows, np.int32), numbers, jax.tree.map(lambda value: np.repeat(value, rows), self.policy)))
        prompts = sharding.replicate(self.mesh, (padded, np.array([len(prompt)], np.int32)))
        how = Guidance() if self.guide is None else self.guide.how
        value_params = None if self.guide is None else self.guide.params

        def limit(most: int) -> jax.Array:  # rows that only fill the devices are never begun
            return sharding.shard_batch(self.mesh, np.where(first, most, 0).astype(np.int32))

        keys = decoding.unit_keys(seed, 0, 'evaluate', which, numbers)
        state = decoding.start(self.reference, how.value, self.params, value_params, *prompts, which, keys, limit(1),
                               self.max_new_tokens)
        shown = ''
        for count in range(1, self.max_new_tokens + 1):
            state = decoding.decode(self.reference, how, self.params, value_params, policy,
                                    state.replace(limit=limit(count)), self.eos_ids)
            tokens, ended = sharding.to_host((state.tokens, state.ended))
            # Decoded from its beginning each time: a character may be of several tokens.
            text = self.tokenizer.decode(tokens[0, :count - int(ended[0])])
            done = bool(ended[0]) or count == self.max_new_tokens
            if text.startswith(shown) and (done or not text.endswith(_UNFINISHED)):
                yield text[len(shown):]
                shown = text
            if done:
                return


def run(source: str, value: Path | None, prompts: Iterator[str] | Sequence[str], *, conversation: bool,
        eta: float | None = None, temperature: float | None = None, top_p: float | None = None,
        max_new_tokens: int | None = None, dtype: str = 'float32', samples: int = 1, seed: int = 0, raw: bool = False,
        allow_other: bool = False) -> list[str]:
    """Prints, token by token, and returns answers to each prompt.

    Args:
      source: of the reference, as `reference.source` of a config.
      value: directory of a run's value network (`<workdir>/checkpoints/value_<k>`) or of an exported one; None for the
        reference alone.
      prompts: texts, each asked when the one before is answered.
      conversation: whether each prompt goes on from those before and their answers.
      eta: KL coefficient; None for that of the run that the value network is of.
      temperature: of the sampler; None for that of the value network, or 1.
      top_p: likewise.
      max_new_tokens: likewise, or 256.
      dtype: of the reference, 'float32' or 'bfloat16'.
      samples: answers a prompt.
      seed: of the draws.
      raw: whether prompts are taken as they are although the tokenizer has a chat template.
      allow_other: guide also a reference that the value network was not fitted with.

    Raises:
      ValueError: a network is missing or damaged, they do not belong together, or a prompt cannot be asked.
    """
    if samples < 1 or conversation and samples > 1:
        raise ValueError(f'--samples is {samples}; it must be at least 1, and 1 in a conversation.')
    speaker = load(source, value, eta, temperature, top_p, max_new_tokens, dtype, allow_other)
    chats = speaker.tokenizer.chat_template is not None and not raw
    answers: list[str] = []
    turns: list[dict[str, str]] = []
    before = ''
    for prompt in prompts:
        turns = [*(turns if conversation else []), {'role': 'user', 'content': prompt}]
        text = (before if conversation else '') + prompt
        ids = speaker.tokenizer.encode_chat(turns) if chats else speaker.tokenizer.encode_prompt(text)
        if not ids:
            raise ValueError('a prompt is empty: write something.')
        for sample in range(samples):
            pieces = []
            for piece in speaker.answer(ids, seed, sample):
                print(piece, end='', flush=True)
                pieces.append(piece)
            print(flush=True)
            answers.append(''.join(pieces))
        turns.append({'role': 'assistant', 'content': answers[-1]})
        before = text + answers[-1]
    if not answers:
        raise ValueError('there is no prompt: give --prompt, or one prompt a line on standard input.')
    return answers


def load(source: str, value: Path | None, eta: float | None, temperature: float | None, top_p: float | None,
         max_new_tokens: int | None, dtype: str, allow_other: bool) -> Speaker:
    """Returns a reference and what guides it, on all devices. Arguments as in `run`."""
    if eta is not None and not eta > 0:
        raise ValueError(f'--eta is {eta:g}; it must be above 0 (inf is the reference itself).')
    if eta is not None and value is None:
        raise ValueError(f'--eta is {eta:g}, and nothing guides the reference: give --value, or leave --eta out.')
    mesh = sharding.make_mesh(data=1, tensor=-1)  # one answer at a time: the devices share each product
    file = pretrained.open_checkpoint(source)
    tokenizer = references.tokenizer_of(file)
    number = jnp.dtype(dtype)
    shape = dataclasses.replace(file.config, dtype=number, param_dtype=number,
                                scan_layers=references.scans('auto', mesh))
    guide = None if value is None else load_guide(Path(value), tokenizer, mesh)
    sampler: dict[str, Any] = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'max_new_tokens': 256}
    eos_ids = set(tokenizer.eos_ids)
    if guide is not None:
        sampler.update(guide.meta['sampler'])
        eos_ids |= set(guide.eos_ids)
    asked = {'temperature': temperature, 'top_p': top_p, 'max_new_tokens': max_new_tokens}
    sampler.update({name: given for name, given in asked.items() if given is not None})
    if sampler['temperature'] < 0 or not 0 < sampler['top_p'] <= 1 or sampler['max_new_tokens'] < 1:
        raise ValueError(f'--temperature {sampler["temperature"]:g}, --top_p {sampler["top_p"]:g} and --max_new_tokens '
                         f'{sampler["max_new_tokens"]}: they must be at least 0, in (0, 1], and at least 1.')
    if guide is not None:
        given = {**guide.meta['sampler'], **{name: value for name, value in sampler.items() if name in asked}}
        checkpoint.check_value_meta(guide.meta, {
            **guide.meta, 'reference': file.fingerprint, 'tokenizer': tokenizer.fingerprint,
            'sampler': {**given, 'max_new_tokens': guide.meta['sampler']['max_new_tokens']}}, allow_other)
        eta = guide.eta if eta is None else eta
        if eta is None:
            raise ValueError('an exported value network does not say its KL coefficient: give --eta, such as 0.1.')
        guide = None if math.isinf(eta) else guide
    shardings = transformer.param_shardings(shape, mesh)
    one = np.ones(1, np.float32)
    policy = Policy(
        eta=(math.inf if eta is None else eta) * one, temperature=sampler['temperature'] * one,
        top_k=np.full(1, sampler['top_k'], np.int32), top_p=sampler['top_p'] * one,
        reference_temperature=(sampler['temperature'] or 1.0) * one)
    return Speaker(
        mesh=mesh, tokenizer=tokenizer,
        reference=references.network(shape, tokenizer),
        params=pretrained.load_params(file, shardings, number),
        max_positions=min(shape.max_positions, shape.max_positions if guide is None else guide.max_positions),
        guide=guide, eos_ids=tuple(sorted(eos_ids)), policy=policy, max_new_tokens=sampler['max_new_tokens'])


def load_guide(path: Path, tokenizer: BPETokenizer, mesh: Mesh) -> Guide:
    """Returns the value network in a directory of a run, or in a folder that experiments/export.py wrote.

    Args:
      path: of it.
      tokenizer: of the reference.
      mesh: where its parameters go.

    Raises:
      ValueError: there is none, it is damaged, or its tokenizer is another one.
    """
    if (path / checkpoint.VALUE_FILE).is_file():
        return _of_run(path, mesh)
    if (path / HEAD_CONFIG).is_file():
        return _exported(path, tokenizer, mesh)
    raise ValueError(f'--value {path} holds no value network: give <workdir>/checkpoints/value_<k> of a run, or the '
                     'folder `value` that experiments/export.py wrote.')


def _of_run(path: Path, mesh: Mesh) -> Guide:
    workdir = path.absolute().parents[1]
    if not (workdir / 'config.json').is_file():
        raise ValueError(f'--value {path} is not inside its run: {workdir} has no config.json. Copy the whole '
                         'directory of the run, or export the network with experiments/export.py.')
    config = config_lib.from_json((workdir / 'config.json').read_text())
    parts = dataclasses.replace(experiment.outline(config, workdir), mesh=mesh)
    params, meta = checkpoint.restore_params(path, parts.value_target)
    return Guide(parts.guidance(config.guidance.offset), parts.decoding_params(params), float(config.eta),
                 parts.eos_ids, parts.value_shape.max_positions, meta)


def _exported(path: Path, tokenizer: BPETokenizer, mesh: Mesh) -> Guide:
    about = read_json(path / HEAD_CONFIG)
    missing = sorted({'type', 'head', 'atoms', 'num_scores', 'guidance', 'eos_ids', 'valid_for'} - about.keys())
    if missing:
        raise ValueError(f'{path / HEAD_CONFIG} lacks {missing[0]!r}: export the network again with '
                         'experiments/export.py.')
    file = pretrained.open_checkpoint(path)
    tokenizer_pairs.check_used(tokenizer_pairs.compare(tokenizer, references.tokenizer_of(file)), tokenizer.eos_ids,
                               'ends an answer')
    stored = safetensors.read_head(path / HEAD)
    distribution = categorical.make(about['head'], about['atoms'][0], about['atoms'][-1], len(about['atoms']))
    value_config = value_lib.ValueConfig(
        num_scores=about['num_scores'], kind=about['type'], init='reference', head_bias='bias' in stored)
    network = networks.value(file.config, value_config, references.spares(mesh))
    axes = value_lib.logical_axes(value_config, file.config)
    base = transformer.param_shapes(file.config)
    shapes = jax.eval_shape(
        lambda base: value_lib.init_value_params(jax.random.key(0), value_config, base, file.config), base)
    places = sharding.param_shardings(mesh, axes, shapes)
    head = {name: tensor.read(np.dtype('float32')) for name, tensor in stored.items()}
    wrong = [name for name, leaf in shapes['head'].items() if name not in head or head[name].shape != leaf.shape]
    if wrong:
        raise ValueError(f'{path / HEAD} lacks the tensor {wrong[0]!r} in the shape {shapes["head"][wrong[0]].shape}.')
    params = {'trunk': pretrained.load_params(file, places['trunk'], np.dtype('float32')),
              'head': sharding.shard_params(head, places['head'])}
    return Guide(Guidance(value=network, distribution=distribution, **about['guidance']), params, None,
                 tuple(about['eos_ids']), file.config.max_positions, about['valid_for'])
