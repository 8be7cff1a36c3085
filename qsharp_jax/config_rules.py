"""The values that configuration keys may take: one sentence for each that is out of range."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
import math
from typing import Any

CHOICES: dict[str, tuple[str, ...]] = {
    'task.name': ('arithmetic', 'star_graph', 'gsm8k', 'math', 'quality', 'jsonl'),
    'task.math.test_set': ('math500', 'aime24'),
    'reference.dtype': ('float32', 'bfloat16'),
    'reference.scan_layers': ('auto', 'yes', 'no'),
    'reference.transformer.positions': ('rope', 'learned'),
    'reference.pretrain.loss': ('target', 'all'),
    'reference.pretrain.optimizer': ('adamw', 'muon'),
    'reference.pretrain.schedule': ('constant', 'cosine'),
    'value.type': ('v', 'q'),
    'value.init': ('truncate', 'reference', 'pretrained', 'scratch'),
    'value.extra_input': ('stream', 'restart'),
    'value.head_init': ('zero', 'normal', 'lm_head'),
    'value.head': ('bernoulli', 'categorical', 'mse'),
    'value.projection': ('nearest', 'two_hot', 'hl_gauss'),
    'value.dtype': ('float32', 'bfloat16'),
    'guidance.outside': ('zero', 'remove', 'min', 'mean', 'average', 'soft_bellman'),
    'guidance.order': ('paper', 'after_sampler'),
    'guidance.offset': ('qsharp', 'cd', 'fudge'),
    'collect.cut': ('uniform', 'start', 'guided'),
    'collect.budget': ('total', 'fresh'),
    'reward_options.on_error': ('stop', 'abstain'),
    'fit.optimizer': ('adamw', 'muon'),
    'fit.schedule': ('constant', 'cosine'),
    'baselines.right': ('answer', 'sampled'),
    'baselines.optimizer': ('adamw', 'muon'),
    'baselines.schedule': ('constant', 'cosine'),
    'fit.tokens': ('all', 'single'),
    'fit.init': ('base', 'previous'),
    'eval.split': ('train', 'validation', 'test'),
    'eval.select_split': ('', 'train', 'validation', 'test'),
    'eval.cd_network': ('shared', 'own'),
}

_ITEM_CHOICES: dict[str, tuple[str, ...]] = {
    'task.arithmetic.operations': ('+', '-', '*', 'max', 'min'),
    'eval.methods': ('qsharp', 'cd', 'fudge', 'vas'),
    'baselines.methods': ('reinforce', 'reinforce_greedy', 'grpo', 'dpo', 'rpo'),
}

_QUESTIONS = 'gsm8k', 'math', 'quality', 'jsonl'  # tasks of one section

_ABOVE_ZERO = (
    'reference.transformer.rope_base', 'reference.pretrain.learning_rate', 'value.sigma',
    'reward_options.timeout_seconds', 'baselines.epochs', 'baselines.grpo.clip', 'baselines.dpo.beta',
    'baselines.rpo.beta', 'fit.epochs', 'fit.learning_rate', 'fit.head_lr_multiplier',
    'logging.progress_seconds',
)

_AT_LEAST: dict[str, int] = {
    'iterations': 1,
    'task.max_prompt_tokens': 1,
    'task.arithmetic.max_operand': 1,
    'task.arithmetic.train_examples': 1,
    'task.arithmetic.validation_examples': 1,
    'task.arithmetic.test_examples': 1,
    'task.star_graph.degree': 2,
    'task.star_graph.path_length': 2,
    'task.star_graph.num_nodes': 3,
    'task.star_graph.pretrain_examples': 1,
    'task.star_graph.train_examples': 1,
    'task.star_graph.validation_examples': 1,
    'task.star_graph.test_examples': 1,
    'reference.transformer.layers': 1,
    'reference.transformer.width': 1,
    'reference.transformer.heads': 1,
    'reference.transformer.kv_heads': 1,
    'reference.transformer.mlp_width': 1,
    'reference.pretrain.steps': 1,
    'reference.pretrain.curriculum_steps': 0,
    'reference.pretrain.curriculum_degree': 1,
    'reference.pretrain.curriculum_path_length': 2,
    'reference.pretrain.batch_size': 1,
    'reference.pretrain.weight_decay': 0,
    'reference.pretrain.clip_norm': 0,
    'reference.pretrain.warmup_steps': 0,
    'value.layers': 0,
    'value.extra_layers': 0,
    'value.lookahead': 0,
    'value.num_atoms': 2,
    'sampling.temperature': 0,
    'sampling.top_k': 0,
    'sampling.max_new_tokens': 1,
    'guidance.candidates': 1,
    'guidance.draft': 0,
    'collect.examples': 0,
    'collect.samples': 1,
    'collect.block_examples': 1,
    'collect.batch_rows': 1,
    'reward_options.workers': 0,
    'fit.batch_size': 1,
    'fit.samples_per_row': 1,
    'fit.weight_decay': 0,
    'fit.clip_norm': 0,
    'fit.warmup_steps': 0,
    'fit.frozen_layers': 0,
    'fit.accumulate': 1,
    'fit.checkpoint_every_steps': 1,
    'baselines.answers': 0,
    'baselines.pair_tries': 1,
    'baselines.batch_size': 1,
    'baselines.accumulate': 1,
    'baselines.weight_decay': 0,
    'baselines.clip_norm': 0,
    'baselines.curve_examples': 0,
    'baselines.grpo.samples': 2,
    'baselines.grpo.batches': 1,
    'baselines.grpo.passes': 1,
    'baselines.grpo.kl': 0,
    'baselines.rpo.nll_weight': 0,
    'eval.examples': 0,
    'eval.select_examples': 0,
    'eval.samples': 1,
    'eval.maj_k': 1,
    'eval.block_examples': 1,
    'eval.batch_rows': 1,
    'checkpoint.keep': 1,
    'logging.every_steps': 1,
    'logging.heldout_every_steps': 1,
    'logging.report_examples': 0,
}


def check_values(keys: Mapping[str, Any]) -> None:
    """Raises ValueError with one sentence for each value that is not allowed.

    Args:
      keys: every key of a configuration, dotted, with its value.
    """
    problems = [*_single(keys), *_together(keys)]
    if problems:
        raise ValueError('\n'.join(problems))


def _single(keys: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on values that are wrong whatever the others are."""
    for key, allowed in CHOICES.items():
        if keys[key] not in allowed:
            yield f'config.{key} is {keys[key]!r}; it must be one of {_listed(allowed)}.'
    for key, allowed in _ITEM_CHOICES.items():
        wrong = [item for item in keys[key] if item not in allowed]
        if wrong:
            yield f'config.{key} has {_listed(wrong)}; its items must be among {_listed(allowed)}.'
    for key in ('eta', 'collect.eta'):
        if not keys[key] > 0:
            yield (f'config.{key} is {keys[key]:g}; it must be above 0: it divides the return, so a small one guides '
                   'strongly.')
    if keys['eta'] == math.inf:
        yield 'config.eta is inf; it must be finite: the reference, which nothing guides, is always evaluated.'
    for eta in keys['eval.etas']:
        if not 0 < eta < math.inf:
            yield f'config.eval.etas has {eta:g}; every eta must be above 0 and finite.'
    for temperature in keys['eval.reference_temperatures']:
        if not 0 <= temperature < math.inf:
            yield f'config.eval.reference_temperatures has {temperature:g}; a temperature is 0 (greedy) or more.'
    for key in _ABOVE_ZERO:
        if not 0 < keys[key] < math.inf:
            yield f'config.{key} is {keys[key]:g}; it must be above 0.'
    for key, least in _AT_LEAST.items():
        if not least <= keys[key] < math.inf:
            yield f'config.{key} is {keys[key]:g}; it must be {least} or more.'
    if not 0 <= keys['guidance.epsilon_cutoff'] < 1:
        yield (f'config.guidance.epsilon_cutoff is {keys["guidance.epsilon_cutoff"]:g}; it is a probability, '
               'at least 0 (no cut-off) and below 1.')
    if not 0 < keys['sampling.top_p'] <= 1:
        yield f'config.sampling.top_p is {keys["sampling.top_p"]:g}; it must be above 0 and at most 1 (1 keeps all).'
    for key in ('task.arithmetic.two_digit_share', 'reference.pretrain.random_arm_share', 'fit.end_share',
                'reference.pretrain.end_share', 'baselines.end_share'):
        if not 0 <= keys[key] <= 1:
            yield f'config.{key} is {keys[key]:g}; it is a share, 0 to 1.'
    for key in ('fit.heldout_fraction', 'baselines.warmup_share',
                *(f'task.{task}.validation_share' for task in _QUESTIONS)):
        if not 0 <= keys[key] < 1:
            yield f'config.{key} is {keys[key]:g}; it must be at least 0 and below 1.'
    for method in ('reinforce', 'grpo', 'dpo', 'rpo'):
        rates = keys[f'baselines.{method}.learning_rates']
        if not rates or not all(0 < rate < math.inf for rate in rates):
            yield (f'config.baselines.{method}.learning_rates is {rates}; it needs at least one rate, and every one '
                   'must be above 0.')
    factors = keys['fit.learning_rate_factors']
    if not factors or not all(0 < factor < math.inf for factor in factors):
        yield f'config.fit.learning_rate_factors is {factors}; it needs at least one, and every one must be above 0.'
    if '{question}' not in keys['task.template']:
        yield f"config.task.template is {keys['task.template']!r}; it must have '{{question}}' where the question goes."
    for key in ('reward', 'reference.source', 'task.data_dir', 'task.arithmetic.operations', 'eval.methods'):
        if not keys[key]:
            yield f'config.{key} is empty; it needs a value.'


def _together(keys: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on values that do not fit each other."""
    if not -math.inf < keys['value.v_min'] < keys['value.v_max'] < math.inf:
        yield (f'config.value.v_min is {keys["value.v_min"]:g} and config.value.v_max is {keys["value.v_max"]:g}; both '
               'must be finite and v_min the smaller.')
    elif keys['guidance.outside'] == 'zero' and keys['value.v_min'] < 0:
        yield (f"config.guidance.outside is 'zero', which needs rewards of at least 0, and config.value.v_min is "
               f"{keys['value.v_min']:g}: choose 'mean', 'min', 'remove' or 'soft_bellman', or shift the reward.")
    yield from _offsets(keys)
    if keys['guidance.epsilon_cutoff'] and keys['guidance.order'] == 'after_sampler':
        yield (f"config.guidance.epsilon_cutoff is {keys['guidance.epsilon_cutoff']:g}, and config.guidance.order is "
               "'after_sampler', in which every token that the sampler leaves is a candidate: cut with "
               'config.sampling.top_p, or set it to 0.')
    if keys['reference.pretrain.curriculum_steps'] >= keys['reference.pretrain.steps']:
        yield (f"config.reference.pretrain.curriculum_steps is {keys['reference.pretrain.curriculum_steps']}, and "
               f"config.reference.pretrain.steps, of which these are the first, {keys['reference.pretrain.steps']}: "
               'leave some for whole graphs.')
    if (keys['value.init'] in ('reference', 'pretrained')) != (keys['value.layers'] == 0):
        yield (f"config.value.init is {keys['value.init']!r} and config.value.layers is {keys['value.layers']}: "
               "'reference' and 'pretrained' copy every layer and take 0; 'truncate' and 'scratch' need a number of "
               'layers.')
    if keys['value.init'] == 'pretrained' and not keys['value.source']:
        yield ("config.value.init is 'pretrained', and config.value.source names no checkpoint: name one, or use "
               "'reference'.")
    if keys['value.init'] == 'reference' and keys['value.source']:
        yield (f"config.value.init is 'reference', and config.value.source is {keys['value.source']!r}: use "
               "'pretrained' to copy that checkpoint, or ''.")
    if keys['value.head_init'] == 'lm_head' and keys['value.type'] != 'q':
        yield "config.value.head_init is 'lm_head', which only config.value.type 'q' has; choose 'zero' or 'normal'."
    if keys['guidance.outside'] == 'soft_bellman' and keys['value.type'] == 'q':
        yield ("config.guidance.outside is 'soft_bellman', which needs the value of the last chosen token, and "
               "config.value.type 'q' has none: choose another rule, or type 'v'.")
    if len(keys['fit.learning_rate_factors']) > 1 and not keys['fit.heldout_fraction']:
        yield (f"config.fit.learning_rate_factors is {keys['fit.learning_rate_factors']}, and "
               'config.fit.heldout_fraction is 0: the best is chosen by the loss on held-out prompts. Hold some out, '
               'or give one factor.')
    if keys['value.lookahead'] > 0 and keys['value.scan_layers']:
        yield (f"config.value.lookahead is {keys['value.lookahead']}, and config.value.scan_layers is True: layers "
               'that are run again are no stack. Set one of them to its default.')
    if keys['fit.frozen_layers'] and keys['value.scan_layers']:
        yield (f"config.fit.frozen_layers is {keys['fit.frozen_layers']}, and config.value.scan_layers is True: "
               'stacked layers are trained together or not at all. Set one of them to its default.')
    if keys['baselines.accumulate'] > 0 and keys['baselines.batch_size'] % keys['baselines.accumulate']:
        yield (f"config.baselines.accumulate is {keys['baselines.accumulate']}; it must divide batch_size, which is "
               f"{keys['baselines.batch_size']}.")
    round_ = keys['baselines.batch_size'] * keys['baselines.grpo.batches']
    if keys['baselines.grpo.samples'] > 0 and round_ % keys['baselines.grpo.samples']:
        yield (f"config.baselines.grpo.samples is {keys['baselines.grpo.samples']}; it must divide the answers of a "
               f'round, batch_size * grpo.batches, which are {round_}.')
    if keys['value.run'] and (keys['baselines.methods'] or keys['baselines.value_on_pairs']):
        yield (f"config.value.run is {keys['value.run']!r}: a finished network guides, and nothing is trained. Set "
               "config.baselines.methods to '' and config.baselines.value_on_pairs to False.")
    several = [method for method in (name.removesuffix('_greedy') for name in keys['baselines.methods'])
               if len(keys[f'baselines.{method}.learning_rates']) > 1]
    if several and not keys['eval.select_split']:
        yield (f'config.baselines.{several[0]}.learning_rates has several rates, and config.eval.select_split, which '
               "the best is chosen on, is '': name a split, or give one rate.")
    if keys['eval.maj_k'] > keys['eval.samples']:
        yield (f'config.eval.maj_k is {keys["eval.maj_k"]}; a vote needs that many answers, and config.eval.samples is '
               f'{keys["eval.samples"]}.')
    sizes = [keys[f'mesh.{axis}'] for axis in ('data', 'fsdp', 'tensor')]
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        yield (f'config.mesh is data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}; every size must be at least 1, '
               'and only one may be -1, for the devices that the others leave.')
    heads, kv_heads = keys['reference.transformer.heads'], keys['reference.transformer.kv_heads']
    if kv_heads > 0 and heads % kv_heads:
        yield f'config.reference.transformer.kv_heads is {kv_heads}; it must divide heads, which is {heads}.'
    width = keys['reference.transformer.width']
    if heads > 0 and width % (2 * heads):
        yield (f'config.reference.transformer.width is {width}; it must be a multiple of twice the heads, which are '
               f'{heads}.')
    if keys['task.system'] and not keys['task.chat']:
        yield ("config.task.system is a text, and config.task.chat is False: a system turn is part of a chat. Set chat "
               "to True, or put the text into config.task.prefix.")
    if keys['task.name'] == 'jsonl' and not keys['task.jsonl.train']:
        yield "config.task.jsonl.train is empty, and config.task.name is 'jsonl': name a JSON Lines file of questions."
    if keys['task.name'] == 'star_graph':
        needed = keys['task.star_graph.degree'] * (keys['task.star_graph.path_length'] - 1) + 1
        if needed > keys['task.star_graph.num_nodes']:
            yield (f'config.task.star_graph.num_nodes is {keys["task.star_graph.num_nodes"]}, but a graph of this '
                   f'degree and path_length has {needed} nodes.')


def _offsets(keys: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on methods whose weights the rule for tokens outside the candidates does not suit."""
    used = {keys['guidance.offset'], *keys['eval.methods']}
    for method, outside, why in (
            ('fudge', 'zero', "is the weight of certain success: its own weights, log probabilities of success, are at "
                              'most 0, and tokens that nobody scored would be favoured'),
            ('cd', 'soft_bellman', 'holds for means of exp(Z/eta), and not for exp(E[Z]/eta)')):
        if method in used and keys['guidance.outside'] == outside:
            where = 'guidance.offset' if keys['guidance.offset'] == method else 'eval.methods'
            yield (f'config.{where} has {method!r}, and config.guidance.outside is {outside!r}, which {why}: choose '
                   f"'mean' or 'min', or leave {method!r} out.")


def _listed(items: tuple[str, ...] | list[str]) -> str:
    return ', '.join(repr(item) for item in items)
