"""The losses of `trl`, on the same weights and answers, have the same values and gradients as ours.

Where the methods differ by design (docs/baselines.md) the comparison is of the part that both have: RPO with answers of
one length, since trl divides their likelihood by it; GRPO without KL, since trl estimates it from the drawn tokens.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import models as tokenizer_models
from tokenizers import Tokenizer

from qsharp_jax.baselines import losses, policies
from qsharp_jax.models import pretrained
from qsharp_jax.models.pretrained import export
from tests import published

pytestmark = pytest.mark.parity

FAMILY = 'llama_untied'
PAIRS, PROMPT, ANSWER = 5, 4, 7  # the longest
BETA = 0.3


@pytest.fixture
def models(tmp_path):
    """The policy and π_ref in PyTorch, their common config, and their parameters here."""
    folders = [tmp_path / name for name in ('policy', 'reference')]
    torch_models = [published.torch_model(FAMILY, seed) for seed in range(2)]
    for model, folder in zip(torch_models, folders):
        model.save_pretrained(folder)
    files = [pretrained.open_checkpoint(folder) for folder in folders]
    return torch_models, files[0].config, [jax.tree.map(jnp.asarray, pretrained.load_params(file)) for file in files]


@pytest.fixture
def options(tmp_path):
    """What every trainer of trl is told."""
    return dict(output_dir=str(tmp_path / 'trl'), report_to=[], use_cpu=True, bf16=False, disable_dropout=True,
                per_device_train_batch_size=PAIRS)


def tokenizer():
    """The tokens of the tiny models; nothing is tokenized that matters."""
    import transformers
    words = Tokenizer(tokenizer_models.WordLevel({f't{number}': number for number in range(50)}, unk_token='t2'))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token='t0', eos_token='t1')


def drawn(seed, lengths):
    """Prompts and answers of some lengths: tokens, and which of them are of an answer.  # [B, PROMPT + ANSWER] x 2"""
    tokens = np.random.default_rng(seed).integers(3, 50, (len(lengths), PROMPT + ANSWER))
    places = np.arange(PROMPT + ANSWER)[None] - PROMPT
    return tokens, ((places >= 0) & (places < np.array(lengths)[:, None])).astype(np.float32)


def token_log_probs(config, params, tokens):
    """Of each token but the first, given those before it.  # [B, T] -> [B, T - 1]"""
    tokens = jnp.asarray(tokens)
    return policies.chosen_log_probs(policies.network_log_probs(config, 50, (), 1.0)(params, tokens), tokens)


def check(loss, params, config, trl_loss, model, folder):
    """Asserts that value and gradient of our loss are those that PyTorch found for `model`."""
    import transformers
    value, gradient = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, trl_loss.item(), rtol=1e-5)
    model.zero_grad()
    trl_loss.backward()
    # Written as a model, our gradient has their names and layouts.
    export.write_model(folder, config, gradient)
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert theirs.keys() == ours.keys()
    largest = max(np.abs(grad).max() for grad in theirs.values())
    assert largest > 1e-2
    for name, grad in theirs.items():
        np.testing.assert_allclose(ours[name].numpy(), grad, atol=1e-5 * largest, rtol=0, err_msg=name)


@pytest.mark.parametrize('nll_weight', [0.0, 0.5])
def test_dpo_and_rpo(models, options, nll_weight, tmp_path):
    import datasets
    import torch
    import trl
    (policy, reference), config, (params, reference_params) = models
    lengths = [ANSWER] * 2 * PAIRS if nll_weight else [7, 3, 1, 5, 4, 2, 6, 7, 1, 3]
    tokens, weights = drawn(0, lengths)  # the chosen answers, then the rejected ones
    rpo = dict(loss_type=['sigmoid', 'sft'], loss_weights=[1.0, nll_weight * ANSWER]) if nll_weight else {}
    trainer = trl.DPOTrainer(
        model=policy, ref_model=reference, args=trl.DPOConfig(**options, beta=BETA, **rpo),
        processing_class=tokenizer(), train_dataset=datasets.Dataset.from_dict(
            {'prompt': ['t3'], 'chosen': ['t4'], 'rejected': ['t5']}))
    theirs = trainer.compute_loss(policy, {
        'input_ids': torch.tensor(tokens), 'completion_mask': torch.tensor(weights).long(),
        'attention_mask': torch.ones(tokens.shape, dtype=torch.long)})

    def answers(params):
        found = losses.answer_log_probs(token_log_probs(config, params, tokens), jnp.asarray(weights[:, 1:]))
        return found[:PAIRS], found[PAIRS:]

    fixed = answers(reference_params)
    loss = functools.partial(losses.rpo, nll_weight=nll_weight) if nll_weight else losses.dpo
    check(lambda params: loss(*answers(params), *fixed, BETA), params, config, theirs, policy, tmp_path / 'gradient')


def test_clipped_surrogate(models, options, tmp_path):
    import datasets
    import torch
    import trl
    (policy, _), config, (params, _) = models
    tokens, weights = drawn(1, [7, 3, 1, 5, 4])
    advantages = np.array([1.3, -0.4, 0.8, -1.1, 0.2], np.float32)
    # Some ratios within the bounds, some beyond them on either side.
    old = np.array(token_log_probs(config, params, tokens)) + np.random.default_rng(2).normal(
        scale=0.3, size=(PAIRS, PROMPT + ANSWER - 1)).astype(np.float32)
    trainer = trl.GRPOTrainer(
        model=policy, reward_funcs=lambda completions, **_: [0.0] * len(completions), processing_class=tokenizer(),
        args=trl.GRPOConfig(**options, beta=0.0, epsilon=0.2, loss_type='luspo', importance_sampling_level='token',
                            num_generations=PAIRS, max_completion_length=ANSWER),
        train_dataset=datasets.Dataset.from_dict({'prompt': ['t3']}))
    trainer.current_gradient_accumulation_steps = 1
    given = {'prompt_ids': tokens[:, :PROMPT], 'prompt_mask': np.ones((PAIRS, PROMPT), int),
             'completion_ids': tokens[:, PROMPT:], 'completion_mask': weights[:, PROMPT:].astype(int),
             'advantages': advantages, 'old_per_token_logps': old[:, PROMPT - 1:]}
    theirs = trainer.compute_loss(policy, {name: torch.tensor(array) for name, array in given.items()})

    def loss(params):
        return losses.clipped(token_log_probs(config, params, tokens), jnp.asarray(old), jnp.asarray(weights[:, 1:]),
                              jnp.asarray(advantages), 0.2)

    ratio = np.exp(token_log_probs(config, params, tokens) - old)[weights[:, 1:] > 0]
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and ((ratio > 0.8) & (ratio < 1.2)).any()
    check(loss, params, config, theirs, policy, tmp_path / 'gradient')
