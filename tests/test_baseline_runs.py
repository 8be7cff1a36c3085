"""Policies and pairs beside Q#: what they learn from, that they learn, stop and go on, and what is left behind."""
from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import baseline_runs, checkpoint, decoding, estimates, experiment, export, pairs, policy_fit, train
from qsharp_jax.baselines import policies
from qsharp_jax.data.dataset import Manifest
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import read_rows
from qsharp_jax.models import networks, pretrained, transformer
from qsharp_jax.results import Evaluation, plan_of
from qsharp_jax.types import Params
from tests import tiny

SETTINGS = {
    'iterations': 1, 'baselines__right': 'sampled', 'baselines__batch_size': 8, 'baselines__epochs': 4,
    'baselines__answers': 96, 'baselines__schedule': 'constant', 'baselines__warmup_share': 0,
    'baselines__weight_decay': 0, 'baselines__curve_examples': 8, 'baselines__grpo__samples': 4,
    'baselines__grpo__batches': 2, 'baselines__grpo__passes': 2,
    'eval__cd_network': 'own',
    **{f'baselines__{method}__learning_rates': '0.03' for method in ('reinforce', 'grpo', 'dpo', 'rpo')}}


pytestmark = pytest.mark.usefixtures('one_device')


def loaded(data: Path, workdir: Path, **changes: Any) -> Experiment:
    config = tiny.config(data, **{**SETTINGS, **changes})
    train.prepare(config, workdir)
    return experiment.load(experiment.outline(config, workdir))


@pytest.fixture(scope='module')
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A run of which the reference and every policy are trained and evaluated."""
    parts = loaded(data, tmp_path_factory.mktemp('runs') / 'compared')
    evaluation = Evaluation(parts, plan_of(parts.config))
    evaluation.run(0, None)
    for method in policies.METHODS:
        baseline_runs.run_policy(parts, evaluation, method)
    return parts


def rows_of(parts: Experiment, method: str, split: str = 'test') -> list[dict[str, Any]]:
    return [row for row in read_rows(parts.workdir / 'results.jsonl')
            if (row['method'], row['split'], row['temperature']) == (method, split, 1.0)]


def samples_of(parts: Experiment, method: str) -> list[dict[str, Any]]:
    found = [read_rows(path) for path in parts.workdir.glob(f'samples/test/{method}-*/*.jsonl')]
    return [row for block in found for row in block]


def test_every_policy_has_its_rows_and_moves_from_the_reference(compared: Experiment) -> None:
    start = rows_of(compared, 'reference')[0]
    for method in policies.METHODS:
        for split in ('validation', 'test'):
            row, = rows_of(compared, method, split)
            assert row['selected'] and row['eta'] is None and row['iteration'] == 0
            assert row['learning_rate'] == 0.03 and row['n_examples'] == 8
            assert np.isfinite(row['difference_to_reference'])
            # The floor is what cutting off the sampler's tail costs. Most probable answers that all earn alike teach
            # nothing: whether these do is up to rounding.
            assert row['kl'] > start['kl'] - (1e-6 if method == 'reinforce_greedy' else 0)
        assert row['answers'] == 96 or policies.METHODS[method].pairs
    # What the reward asks for, an answer that begins with one of the first nodes, is quickly learned.
    for method in ('reinforce', 'grpo', 'rpo'):
        assert rows_of(compared, method)[0]['pass@1'] > start['pass@1'] + 0.15, method


def test_the_divergence_is_that_of_the_sampled_law_to_the_whole_reference(compared: Experiment) -> None:
    params = baseline_runs.chosen_policies(compared)['grpo']
    sample = samples_of(compared, 'grpo')[3]
    prompt = compared.tokenizer.encode(sample['prompt'])
    tokens = jnp.asarray([prompt + sample['tokens']])
    law, reference = (np.asarray(networks.text_logits(compared.reference_config, one, tokens)[0], np.float64)
                      for one in (params, compared.reference_params))
    total = 0.0
    for place in range(len(prompt) - 1, tokens.shape[1] - 1):
        kept = np.argsort(-law[place])[:10]
        log_p = law[place, kept] - np.log(np.exp(law[place, kept]).sum())
        log_q = reference[place, kept] - np.log(np.exp(reference[place]).sum())
        total += np.sum(np.exp(log_p) * (log_p - log_q))
    assert sample['kl'] == pytest.approx(total, rel=1e-4)


def test_training_is_recorded_with_its_answers_and_its_curve(compared: Experiment) -> None:
    for method in policies.METHODS:
        rows = [row for row in read_rows(compared.workdir / 'metrics.jsonl') if row['stage'] == f'{method}_0.03']
        curve = [row for row in rows if 'pass@1' in row]
        assert {'loss', 'grad_norm', 'learning_rate', 'answers'} <= rows[0].keys()
        assert [row['step'] for row in curve[:3]] == ([4, 8, 16] if method == 'grpo' else [1, 2, 4])
        assert curve[-1]['step'] == rows[-1]['step']
        if not policies.METHODS[method].pairs:
            assert curve[-1]['answers'] == 96 and curve[0]['answers'] == (16 if method == 'grpo' else 8)


def test_rounds_are_of_the_policy_and_of_its_most_probable_answers_where_greedy(compared: Experiment) -> None:
    def answers(method: str, number: int, params: Params) -> np.ndarray:
        source = policy_fit._OwnAnswers(compared, method)
        batches, row = source.round(number, params)
        assert row['answers'] == (number + 1) * 8
        assert 0 < np.abs(batches[0].advantages).max() and np.abs(batches[0].advantages.mean()) < 1e-6
        return np.asarray(batches[0].tokens)[:, 0] * np.asarray(batches[0].weights)[:, 0].astype(int)

    start = compared.reference_params
    sampled = answers('reinforce', 0, start)
    # Three rounds are a pass over the 24 questions.
    order = np.concatenate([policy_fit._OwnAnswers(compared, 'reinforce')._which(number) for number in range(6)])
    assert sorted(order[:24]) == sorted(order[24:]) == list(range(24)) and list(order[:24]) != list(order[24:])
    prompts = compared.prompts('train')
    source = policy_fit._OwnAnswers(compared, 'reinforce_greedy')
    batch = source.round(0, start)[0][0]
    likeliest = jnp.argmax(networks.text_logits(compared.reference_config, start, batch.tokens[:, 0]), axis=-1)
    written = batch.weights[:, 0, 1:] > 0
    np.testing.assert_array_equal(likeliest[written], batch.tokens[:, 0, 1:][written])
    assert [tuple(row[:len(prompts.tokens[0])]) for row in batch.tokens[:, 0]] == [
        tuple(prompts.tokens[index]) for index in order[:8]]
    assert (sampled == answers('reinforce', 0, start)).all()
    assert (sampled != answers('reinforce', 0, baseline_runs.chosen_policies(compared)['reinforce'])).any()


def test_a_round_has_no_more_rows_than_answers_and_they_do_not_depend_on_it(compared: Experiment) -> None:
    source, params = policy_fit._OwnAnswers(compared, 'reinforce'), compared.reference_params
    source.round(3, params)
    assert source._queue is not None and compared.config.collect.batch_rows == 16
    wide = policy_fit._answering(compared, compared.prompts('train'), 16)
    wide.renew(params, 4)
    drawn, other = (queue.draw(source._which(3), 1, source._sampler) for queue in (source._queue, wide))
    np.testing.assert_array_equal(drawn.read.tokens, other.read.tokens)
    assert len({tuple(row) for row in drawn.read.tokens}) > 4
    # Of sixteen rows, eight had an answer.
    assert drawn.steps == other.steps and drawn.occupancy == 2 * other.occupancy


def test_new_parameters_compile_nothing(compared: Experiment) -> None:
    source = policy_fit._OwnAnswers(compared, 'reinforce')
    source.round(0, compared.reference_params)
    programs = [fn._cache_size() for fn in (decoding.advance, decoding.refill, decoding.prefill)]
    source.round(1, baseline_runs.chosen_policies(compared)['reinforce'])
    assert programs == [fn._cache_size() for fn in (decoding.advance, decoding.refill, decoding.prefill)]


def test_pairs_are_of_a_right_and_a_wrong_answer(compared: Experiment) -> None:
    found, graded = pairs.read(compared)
    assert 10 <= len(found) <= 24 and graded >= 2 * len(found)
    asked = {tuple(tokens) for tokens in compared.prompts('train').tokens}
    assert len({tuple(pair.prompt) for pair in found} & asked) == len(found)
    for pair in found:
        right, wrong = (compared.answer_text(answer) for answer in (pair.right, pair.wrong))
        assert right[:1] in ('0', '1', '2', '3') and wrong[:1] not in ('0', '1', '2', '3')
    # They are read back rather than drawn again.
    before = {path: path.stat().st_mtime_ns for path in (compared.workdir / 'pairs').rglob('*')}
    pairs.read(compared)
    assert before == {path: path.stat().st_mtime_ns for path in (compared.workdir / 'pairs').rglob('*')}


def test_policies_take_no_more_than_was_said(compared: Experiment, data: Path) -> None:
    def most(methods: str) -> estimates.Bounds:
        return estimates.bounds(tiny.config(data, **SETTINGS, baselines__methods=methods), compared.workdir, False)

    without, every = most(''), most(','.join(policies.METHODS))
    rows = [row for method in policies.METHODS for split in ('validation', 'test')
            for row in rows_of(compared, method, split)]
    assert every.evaluated - without.evaluated == sum(row['n_examples'] * row['n_samples'] for row in rows)
    decoded = sum(row['flops_per_answer'] * row['n_examples'] * row['n_samples'] for row in rows)
    assert every.flops > without.flops + 10 * decoded
    curves = [row for row in read_rows(compared.workdir / 'metrics.jsonl') if 'pass@1' in row]
    # The answers of three methods, two of each pair, and eight a point of the curves.
    assert without.trained == 0 and every.trained >= 3 * 96 + 2 * len(pairs.read(compared)[0]) + 8 * len(curves)


def test_pairs_of_other_settings_are_refused(compared: Experiment, data: Path) -> None:
    again = loaded(data, compared.workdir, baselines__right='answer', baselines__pair_tries=7)
    with pytest.raises(ValueError, match="pairs were drawn with other settings: baselines.right was 'sampled', now "
                                         "'answer'; baselines.pair_tries was 1000, now 7.* delete that directory"):
        pairs.read(again)


def test_given_answers_end_as_the_reference_ends_its_own(data: Path, tmp_path: Path) -> None:
    """Any other of the tokens that end an answer would tell right from wrong by itself."""
    parts = loaded(data, tmp_path, baselines__right='answer', reward='star_graph', baselines__pair_tries=3,
                   task__stop='5,6', task__star_graph__num_nodes=8)
    assert len(parts.eos_ids) == 3
    pairs.draw(parts)
    ends = set()
    for shard in Manifest(pairs.beside(parts).dataset_dir).upto(1):
        right, wrong = ([one for one in Manifest(pairs.beside(parts).dataset_dir).read(shard) if one.sample == kind]
                        for kind in (0, 1))
        counts = collections.Counter(int(one.answer[-1]) for one in wrong if one.ended)
        end, = {int(one.answer[-1]) for one in right}
        assert counts[end] == max(counts.values()) and all(one.ended and not one.truncated for one in right)
        ends.add(end)
    assert ends != {min(parts.tokenizer.eos_ids)}


def test_blocks_without_a_pair_are_passed_over_once(
        data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {'baselines__pair_tries': 2}
    whole = pairs.read(loaded(data, tmp_path / 'whole', **keys))
    parts = loaded(data, tmp_path / 'single', **keys, collect__block_examples=1)
    found, graded = pairs.read(parts)
    assert 1 < len(found) < 24 and graded == 48 == whole[1]
    assert [[leaf.tolist() for leaf in pair] for pair in found] == [
        [leaf.tolist() for leaf in pair] for pair in whole[0]]
    with monkeypatch.context() as patch:
        patch.setattr(pairs, '_search', lambda *args: pytest.fail('it drew'))
        assert len(pairs.read(parts)[0]) == len(found)
    prompts = parts.prompts('train')
    other = dataclasses.replace(prompts, tokens=prompts.tokens[::-1])
    with pytest.raises(ValueError, match='has another prompt in .*pairs'):
        pairs.read(dataclasses.replace(parts, splits={'train': other}))
    again = loaded(data, tmp_path / 'single', **{**keys, 'baselines__pair_tries': 3}, collect__block_examples=1)
    with pytest.raises(ValueError, match='pair_tries was 2, now 3'):
        pairs.read(again)
    # Where no block has one, more tries are a fresh start.
    with pytest.raises(ValueError, match='none of 24 questions both rightly and wrongly in 1 tries'):
        pairs.read(loaded(data, tmp_path / 'none', baselines__pair_tries=1))
    assert pairs.read(loaded(data, tmp_path / 'none', **keys))[1] == 48


def test_an_edited_reward_takes_its_pairs_with_it_and_warns_of_policies(
        data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / 'mine.py'

    def edited(digits: str) -> Experiment:
        path.write_text('def low(completions):\n'
                        f'    return [float(text[:1] in {tuple(digits)}) for text in completions]\n')
        return loaded(data, tmp_path / 'run', reward=f'{path}:low')

    found, _ = pairs.read(edited('0123'))
    policy_fit.train(edited('0123'), 'rpo', 0.03)
    assert 'pairs in' not in caplog.text and 'another reward' not in caplog.text
    parts = edited('01')
    fewer, _ = pairs.read(parts)
    assert 0 < len(fewer) < len(found)
    assert all(parts.answer_text(pair.right)[:1] in ('0', '1') for pair in fewer)
    assert f'{len(found) - len(fewer)} of {len(found)} pairs in' in caplog.text
    policy_fit.train(parts, 'rpo', 0.03)
    assert 'was trained on another reward' in caplog.text
    with pytest.raises(ValueError, match='no right and wrong answer to the reward as it is now: delete'):
        pairs.read(edited('4567'))


def test_networks_on_pairs_are_compared_with_the_reference(compared: Experiment) -> None:
    evaluation = Evaluation(compared, plan_of(compared.config))
    evaluation.run(0, None)
    baseline_runs.run_pairs(compared, evaluation)
    for split in ('validation', 'test'):
        start, = rows_of(compared, 'reference', split)
        for method in ('cd_pairs', 'qsharp_pairs'):
            found = rows_of(compared, method, split)
            assert [row['eta'] for row in found] == [0.1, 0.5]
            for row in found:
                assert row['difference_to_reference'] == pytest.approx(row['pass@1'] - start['pass@1'])
    # Its answers are those of the run.
    assert not list(compared.workdir.glob('pairs/samples/*/reference*'))


def test_pairs_with_the_answers_of_the_task(data: Path, tmp_path: Path) -> None:
    parts = loaded(data, tmp_path, baselines__right='answer', reward='star_graph', baselines__pair_tries=3)
    found, graded = pairs.read(parts)
    assert len(found) == graded == 24  # an untrained reference errs at once
    right = dict(zip(map(tuple, parts.prompts('train').tokens), parts.prompts('train').columns['answer']))
    for pair in found:
        assert parts.answer_text(pair.right) == right[tuple(pair.prompt)] != parts.answer_text(pair.wrong)
        assert int(pair.right[-1]) in parts.eos_ids


def test_answers_that_the_reward_takes_for_wrong_are_no_right_ones(data: Path, tmp_path: Path) -> None:
    parts = loaded(data, tmp_path, baselines__right='answer')
    with pytest.raises(ValueError, match="baselines.right is 'answer', and the answer .* earns 0.* use 'sampled'"):
        pairs.read(parts)


@pytest.mark.parametrize('method', ['grpo', 'rpo'])
def test_a_stopped_training_ends_bit_for_bit_as_a_straight_one(
        compared: Experiment, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    parts = loaded(data, tmp_path)
    save = checkpoint.Checkpoints.save

    def stop(self: checkpoint.Checkpoints, step: int, state: Any, meta: Any) -> None:
        save(self, step, state, meta)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Checkpoints, 'save', stop)
        policy_fit.train(parts, method, 0.03)
    found = policy_fit.train(parts, method, 0.03).params
    jax.tree.map(np.testing.assert_array_equal, found, baseline_runs.chosen_policies(compared)[method])

    def curve(workdir: Path) -> list[dict[str, Any]]:
        return [row for row in read_rows(workdir / 'metrics.jsonl') if row['stage'] == f'{method}_0.03']

    assert curve(parts.workdir) == curve(compared.workdir)


def test_the_rate_that_is_best_on_validation_is_chosen_and_a_finished_run_may_be_given_more(
        data: Path, tmp_path: Path) -> None:
    for rates in ('1e-9', '1e-9,0.03'):
        parts = loaded(data, tmp_path, baselines__reinforce__learning_rates=rates)
        baseline_runs.run_policy(parts, Evaluation(parts, plan_of(parts.config)), 'reinforce')
    row, = rows_of(parts, 'reinforce', 'validation')
    assert row['sweep'].keys() == {'1e-09', '0.03'} and row['sweep']['0.03'] > row['sweep']['1e-09']
    assert row['learning_rate'] == 0.03 and row['pass@1'] == row['sweep']['0.03']
    assert json.loads((tmp_path / 'checkpoints/policy_reinforce.json').read_text())['directory'] == (
        'policy_reinforce_0.03')


def test_other_settings_are_refused_and_finished_policies_read_back(compared: Experiment, data: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in compared.workdir.glob('checkpoints/*/*')}
    again = loaded(data, compared.workdir, baselines__dpo__beta=0.3, baselines__methods='dpo,grpo')
    policy_fit.train(again, 'grpo', 0.03)
    assert written == {path: path.stat().st_mtime_ns for path in compared.workdir.glob('checkpoints/*/*')}
    with pytest.raises(ValueError, match='policy_dpo_0.03 was trained with other settings .* beta was 0.1, now 0.3'):
        policy_fit.train(again, 'dpo', 0.03)


def test_policies_that_more_iterations_would_change_are_named_before_these_are_made(
        compared: Experiment, data: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in compared.workdir.rglob('*')}
    config = tiny.config(data, **{**SETTINGS, 'iterations': 3, 'baselines__answers': 0, 'baselines__methods': 'grpo'})
    with pytest.raises(ValueError, match='policy_grpo_0.03 was .* answers was 96, now 144.* unless config.baselines'):
        train.run(config, compared.workdir)
    assert not [path for path in compared.workdir.rglob('*') if path not in written and path.suffix != '.json']


@pytest.mark.parametrize('batches', [1, 2])
def test_grpo_begins_as_reinforce_on_its_advantages(data: Path, tmp_path: Path, batches: int) -> None:
    """The ratio is 1 where it drew: without KL and scale, its first gradient is the policy gradient."""
    parts = loaded(data, tmp_path, baselines__grpo__batches=batches, baselines__grpo__passes=1, baselines__grpo__kl=0,
                   baselines__grpo__scaled=False)
    batch = policy_fit._source(parts, 'grpo')[0].round(0, parts.reference_params)[0][0]
    settings = {**parts.config.baselines.grpo}
    of_grpo, of_reinforce = (
        jax.grad(lambda params, method=method: policies.loss_of(  # type: ignore[misc]
            method, settings, policy_fit.log_probs_fn(parts), params, parts.reference_params, batch)[0])(
                parts.reference_params) for method in ('grpo', 'reinforce'))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(of_reinforce))
    assert largest > 1e-3
    for ours, plain in zip(jax.tree.leaves(of_grpo), jax.tree.leaves(of_reinforce)):
        np.testing.assert_allclose(ours, plain, atol=1e-5 * largest)


def test_a_round_asks_no_question_twice(data: Path, tmp_path: Path) -> None:
    parts = loaded(data, tmp_path, baselines__batch_size=32)
    with pytest.raises(ValueError, match='a round of reinforce asks 32 questions, and there are 24'):
        policy_fit.train(parts, 'reinforce', 0.03)


def test_policies_are_exported_as_models(compared: Experiment, tmp_path: Path) -> None:
    made = export.run(compared.workdir, tmp_path / 'out')
    assert {folder.name for folder in made} == {'reference', *(f'policy_{method}' for method in policies.METHODS)}
    file = pretrained.open_checkpoint(tmp_path / 'out' / 'policy_dpo')
    mesh = compared.mesh
    params = pretrained.load_params(file, transformer.param_shardings(file.config, mesh), jnp.float32)
    tokens = jnp.asarray([compared.prompts('test').tokens[0]])
    np.testing.assert_array_equal(
        networks.text_logits(file.config, params, tokens),
        networks.text_logits(compared.reference_config, baseline_runs.chosen_policies(compared)['dpo'], tokens))
