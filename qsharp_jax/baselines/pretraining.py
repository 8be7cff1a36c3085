"""Next-token pre-training of a reference, from scratch or from a published model, on the texts of a task."""
from __future__ import annotations

from collections.abc import Callable
import hashlib
import json
import math
from pathlib import Path

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from qsharp_jax import checkpoint, learner, optimizers, progress, sharding
from qsharp_jax.data import builders
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.data import star_graph, tokenizers
from qsharp_jax.metrics import Writer
from qsharp_jax.models import networks, transformer
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.types import Array, Params

STAGE = 'pretrain'


@struct.dataclass
class Sequences:
    """Whole texts, right-padded.

    Attributes:
      tokens: ids.  # [B, T] int32
      weights: 1 on each token that the loss predicts, 0 on the others and on padding.  # [B, T] float32
    """

    tokens: Array
    weights: Array


def next_token_loss(config: TransformerConfig, params: Params, batch: Sequences) -> Array:
    """Returns the mean negative log-likelihood, in nats a predicted token, of the weighted tokens.  # []"""
    weights = batch.weights[:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(
        networks.text_logits(config, params, batch.tokens), batch.tokens[:, 1:])
    return jnp.sum(weights * nll) / jnp.sum(weights)


def load_or_train(config: ml_collections.ConfigDict, shape: TransformerConfig, tokenizer: tokenizers.Tokenizer,
                  workdir: Path, mesh: Mesh, published: Callable[[], tuple[Params, str]] | None = None,
                  ) -> tuple[Params, str]:
    """Returns the parameters of the reference, on the mesh, and a digest of its recipe.

    It is trained, unless it is on disk or in the run that `reference.pretrain.run` names.

    Args:
      config: of the run; `reference.pretrain` says how it is trained.
      shape: from `model_shape`, or of the published model that it starts from.
      tokenizer: from `tokenizer_of`, or that model's.
      workdir: of the run; the finished reference is kept in `checkpoints/reference`, an unfinished one beside it.
      mesh: the devices.
      published: returns that model's parameters, on the mesh, and what names them; None to start from scratch.

    Raises:
      ValueError: the run that is named has no finished reference, or one of another recipe.
    """
    def init(key: Array) -> Params:
        return transformer.init_params(key, shape)

    def kept(directory: Path) -> tuple[Params, str]:
        target = sharding.abstract(transformer.param_shapes(shape), transformer.param_shardings(shape, mesh))
        params, meta = checkpoint.restore_params(directory, target)
        return params, meta['digest']

    if is_finished(workdir):
        return kept(finished(workdir))
    if published is None:
        start, origin = sharding.born_sharded(init, mesh, transformer.logical_axes(shape))(
            jax.random.fold_in(jax.random.key(config.seed), 0x9e7)), ''
    else:
        start, origin = published()
    recipe = config.reference.to_dict()
    other = recipe['pretrain'].pop('run')
    if not config.reference.pretrain.curriculum_steps:  # the others play no part then
        for key in ('steps', 'degree', 'path_length'):
            del recipe['pretrain'][f'curriculum_{key}']
    digest = hashlib.sha256(json.dumps(
        [recipe, config.task.to_dict(), config.seed, origin], sort_keys=True).encode()).hexdigest()
    if other:
        check_run(other)
        params, theirs = kept(finished(Path(other)))
        if theirs != digest:
            raise ValueError(f'reference.pretrain.run is {other!r}, whose reference was trained otherwise: the keys '
                             "of reference and task and the seed must be that run's. Take them from its config.json, "
                             'or leave out reference.pretrain.run to train one here.')
    else:
        whole = sequences(config, tokenizer, shape.max_positions)
        smaller = sequences(config, tokenizer, shape.max_positions, smaller=True) if (
            config.reference.pretrain.curriculum_steps) else whole
        params = _train(config, shape, start, smaller, whole, workdir, mesh)
    checkpoint.save_params(finished(workdir), params, {'digest': digest})
    return params, digest


def finished(workdir: Path) -> Path:
    """Returns where a run keeps its finished reference."""
    return workdir / 'checkpoints' / 'reference'


def is_finished(workdir: Path) -> bool:
    """Whether a run has one."""
    return (finished(workdir) / checkpoint.VALUE_FILE).exists()


def check_run(run: str) -> None:
    """Raises ValueError unless the run that `reference.pretrain.run` names has a finished reference."""
    if not is_finished(Path(run)):
        raise ValueError(f'reference.pretrain.run is {run!r}, which holds no finished reference: name the work '
                         "directory of a run whose reference.source is 'pretrain' and that has trained it.")


def tokenizer_of(config: ml_collections.ConfigDict) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a task's own texts; ValueError for a task that has no corpus."""
    check_corpus(config)
    return tokenizers.from_vocabulary(*star_graph.vocabulary(config.task.star_graph.num_nodes))


def check_corpus(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for a task that has no corpus to train on."""
    if config.task.name != 'star_graph':
        raise ValueError(f"reference.source 'pretrain' needs a task with a corpus to train on, and "
                         f'{config.task.name!r} has none: use star_graph, or name a model.')


def model_shape(config: ml_collections.ConfigDict, vocab_size: int) -> TransformerConfig:
    """Returns the transformer that `reference.transformer` describes.

    Args:
      config: of the run.
      vocab_size: of the tokenizer.
    """
    sizes = config.reference.transformer
    if sizes.width % sizes.heads:
        raise ValueError(f'reference.transformer.width is {sizes.width}; it must be a multiple of heads, which is '
                         f'{sizes.heads}.')
    return TransformerConfig(
        vocab_size=vocab_size, width=sizes.width, layers=sizes.layers, heads=sizes.heads, kv_heads=sizes.kv_heads,
        head_dim=sizes.width // sizes.heads, mlp_width=sizes.mlp_width,
        # Room beyond the longest prompt: an answer of the model may be longer than any it was trained on.
        max_positions=2 * config.task.max_prompt_tokens + 64, positions=sizes.positions, rope_base=sizes.rope_base,
        tied_embeddings=sizes.tied_embeddings, dtype=jnp.dtype(config.reference.dtype))


def sequences(config: ml_collections.ConfigDict, tokenizer: tokenizers.Tokenizer, max_positions: int,
              smaller: bool = False) -> Sequences:
    """Returns the corpus on the host: each text of the task's `pretrain` split with its end token.  # [N, T]

    Args:
      config: of the run.
      tokenizer: that the texts are read with.
      max_positions: of the model.
      smaller: whether each graph is cut down to what the first `curriculum_steps` are on.

    Raises:
      ValueError: a text has more tokens than the model has positions, `max_positions`.
    """
    records = builders.read(prompts_lib.task_config(config.task), 'pretrain', config.task.data_dir)
    pretrain, end = config.reference.pretrain, min(tokenizer.eos_ids)
    texts = [(record['question'], record['answer']) for record in records]
    if smaller:
        cut = np.random.default_rng([config.seed, 0xca7])
        texts = [star_graph.smaller(question, pretrain.curriculum_degree, pretrain.curriculum_path_length, cut)
                 for question, _ in texts]
    rng = np.random.default_rng([config.seed, 0xa4])
    at_random = rng.random(len(records)) < pretrain.random_arm_share
    answers = [star_graph.random_path(question, rng) if random else answer
               for (question, answer), random in zip(texts, at_random, strict=True)]
    encoded = [(tokenizer.encode_prompt(question), [*tokenizer.encode(answer), end])
               for (question, _), answer in zip(texts, answers, strict=True)]
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    if longest > max_positions:
        raise ValueError(f'the longest text to pre-train on has {longest} tokens, and the reference {max_positions} '
                         'positions, which are 2 * task.max_prompt_tokens + 64 unless it starts from a published '
                         'model: raise task.max_prompt_tokens.')
    tokens = np.zeros((len(encoded), longest), np.int32)
    weights = np.zeros((len(encoded), longest), np.float32)
    for row, (prompt, answer) in enumerate(encoded):
        whole = [*prompt, *answer]
        tokens[row, :len(whole)] = whole
        first = 1 if pretrain.loss == 'all' else len(prompt)
        weights[row, first:len(whole)] = 1
    return Sequences(tokens=tokens, weights=weights)


def _train(config: ml_collections.ConfigDict, shape: TransformerConfig, start: Params, smaller: Sequences,
           whole: Sequences, workdir: Path, mesh: Mesh) -> Params:
    """Returns the trained parameters, going on from a checkpoint if there is one.

    The first `curriculum_steps` are on the smaller texts, each kind of steps on epochs of its own.
    """
    pretrain = config.reference.pretrain
    optimizer_config = optimizers.OptimizerConfig(
        learning_rate=pretrain.learning_rate, weight_decay=pretrain.weight_decay,
        clip_norm=pretrain.clip_norm or math.inf, schedule=pretrain.schedule, end_share=pretrain.end_share,
        warmup_steps=pretrain.warmup_steps, total_steps=pretrain.steps, optimizer=pretrain.optimizer)
    optimizer = optimizers.make(optimizer_config)
    state = learner.init(start, optimizer_config)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)

    def update(state: learner.LearnerState, batch: Sequences) -> tuple[learner.LearnerState, Array]:
        loss, grads = jax.value_and_grad(lambda params: next_token_loss(shape, params, batch))(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return learner.LearnerState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), loss

    step_fn = jax.jit(update, donate_argnums=0, out_shardings=(placed, None))
    saved = checkpoint.Checkpoints(workdir / 'checkpoints' / STAGE, config.checkpoint.keep)
    found = saved.restore_latest(state)
    if found is not None:
        state = found[0]
    first = int(state.step)
    writer = Writer(workdir)
    writer.resume(STAGE, first)
    with progress.bar('pre-train the reference', total=pretrain.steps, unit='steps', initial=first) as bar:
        for step in range(first, pretrain.steps):
            later = step >= pretrain.curriculum_steps
            corpus, place = (whole, step - pretrain.curriculum_steps) if later else (smaller, step)
            chosen = batch_rows(config.seed, place, pretrain.batch_size, len(corpus.tokens))
            batch = jax.tree.map(lambda leaf: leaf[chosen], corpus)
            state, loss = step_fn(state, sharding.shard_batch(mesh, batch))
            done = step + 1
            bar.update(1)
            if done == pretrain.steps or done % config.logging.every_steps == 0:
                if not math.isfinite(loss):
                    raise ValueError(f'the loss of the pre-training is {float(loss)} at step {done}: lower '
                                     'reference.pretrain.learning_rate or reference.pretrain.clip_norm.')
                writer.write(STAGE, done, {'loss': float(loss)})
                bar.update(0, loss=float(loss))
            if done < pretrain.steps and done % config.fit.checkpoint_every_steps == 0:
                saved.save(done, state, {})
    saved.close()
    writer.close()
    return state.params


def batch_rows(seed: int, step: int, batch: int, rows: int) -> np.ndarray:
    """Returns which texts a step trains on: epochs of the corpus, each in an order of its own.  # [batch]"""
    places = step * batch + np.arange(batch)
    chosen = np.empty(batch, np.int64)
    for epoch in np.unique(places // rows):
        order = np.random.default_rng([seed, 0x9e7, int(epoch)]).permutation(rows)
        inside = places // rows == epoch
        chosen[inside] = order[places[inside] % rows]
    return chosen
