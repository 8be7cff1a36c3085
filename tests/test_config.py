"""Loading, overriding, checking and resuming configurations."""
from __future__ import annotations

import ast
import math
from pathlib import Path
import subprocess
import sys
import tokenize

import pytest

from qsharp_jax import categorical, cli, config, config_rules, guidance, optimizers, rollout
from qsharp_jax.baselines import policies
from qsharp_jax.models import value as value_lib

ROOT = Path(__file__).resolve().parents[1]
HEAD = 'from configs import default\n\n\ndef get_config():\n    config = default.get_config()\n'
FILES = [f'configs/{name}.py:{size}' for name in ('arithmetic', 'star_graph', 'gsm8k', 'math', 'quality')
         for size in ('tiny', 'small', 'paper')] + [
             'configs/real_valued.py:tiny', *(f'configs/star_graph.py:{kind}_{graph}' for kind in ('small', 'paper')
                                              for graph in ('5_5', '3_8'))]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize('spec', FILES)
def test_every_shipped_configuration_is_valid_and_locked(spec: str) -> None:
    loaded = config.load(spec)
    with pytest.raises(AttributeError):
        loaded.collect.sampels = 3
    assert config.from_json(config.to_json(loaded)) == loaded


def test_configurations_load_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an entry point does, whose own directory is on the path and not the root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [entry for entry in sys.path if Path(entry or '.').resolve() != ROOT])
    for name in ('configs', 'configs.default'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert config.load(f'{ROOT}/configs/arithmetic.py:tiny').task.name == 'arithmetic'


def test_every_default_is_explained() -> None:
    """Each assignment to a key has a comment on its line or on the line above."""
    path = ROOT / 'configs' / 'default.py'
    with open(path, 'rb') as file:
        commented = {token.start[0] for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute) \
                and not isinstance(node.value, ast.Call):
            # The three sizes of a split, and the mesh's axes, may share the comment of the first.
            near = set(range(node.lineno - 4, node.lineno + 1)) & commented
            assert near, f'line {node.lineno}: {ast.unparse(node)}'


@pytest.mark.parametrize('key, text, value', [
    ('eta', '0.2', 0.2),
    ('collect.eta', 'inf', math.inf),
    ('collect.samples', '4', 4),
    ('value.remat', 'true', True),
    ('value.remat', '0', False),
    ('eval.etas', '0.3', (0.3,)),
    ('eval.etas', '(1, .5)', (1.0, 0.5)),
    ('eval.methods', 'cd,qsharp', ('cd', 'qsharp')),
    ('eval.reference_temperatures', '', ()),
    ('task.stop', "('\\n', ';')", ('\n', ';')),
    ('reward', 'path/to/file.py:function', 'path/to/file.py:function'),
    ('task.arithmetic.operations', '+,-', ('+', '-')),
])
def test_override(key: str, text: str, value: object) -> None:
    loaded = config.load('configs/default.py', [(key, text)])
    found = config.flatten(loaded)[key]
    assert repr(found) == repr(value), 'equal, and of one type'


def test_an_emptied_list_keeps_its_type() -> None:
    loaded = config.load('configs/default.py', [('eval.etas', ''), ('eval.etas', '0.5')])
    assert loaded.eval.etas == (0.5,)


@pytest.mark.parametrize('key, near', [
    ('etaa', 'config.eta'),
    ('colect.samples', 'config.collect.samples'),
    ('collect.temperature', 'config.sampling.temperature'),
    ('top_p', 'config.sampling.top_p'),
    ('fit.lr', 'config.fit.learning_rate'),
    ('collect', 'config.collect.samples'),
    ('zzzzz', 'configs/default.py'),
])
def test_unknown_keys_name_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ValueError) as caught:
        config.load('configs/default.py', [(key, '1')])
    assert near in str(caught.value) and f'config.{key}' in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('key, text', [
    ('collect.samples', '1.5'), ('eta', 'small'), ('value.remat', 'maybe'), ('eval.etas', 'a,b'),
    ('eval.etas', 'True'),
])
def test_wrong_types_are_refused_in_words(key: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"config.{key} is given as '{text}'; it must be"):
        config.load('configs/default.py', [(key, text)])


@pytest.mark.parametrize('overrides, words', [
    ({'eta': '0'}, 'config.eta is 0'),
    ({'collect.eta': '-1'}, 'config.collect.eta is -1'),
    ({'eta': 'nan'}, 'config.eta is nan'),
    ({'eval.etas': '0.1,0'}, 'config.eval.etas has 0'),
    ({'eval.reference_temperatures': '-0.5'}, 'config.eval.reference_temperatures has -0.5'),
    ({'guidance.outside': 'none'}, "config.guidance.outside is 'none'; it must be one of"),
    ({'collect.cut': 'end'}, "'uniform', 'start'"),
    ({'eval.methods': 'qsharp,ppo'}, "config.eval.methods has 'ppo'"),
    ({'value.v_min': '-1', 'guidance.outside': 'zero'}, 'needs rewards of at least 0'),
    ({'value.v_min': '1'}, 'v_min the smaller'),
    ({'value.layers': '4'}, "'pretrained' copy every layer"),
    ({'value.init': 'truncate'}, 'need a number of layers'),
    ({'value.head_init': 'lm_head'}, "only config.value.type 'q' has"),
    ({'value.type': 'q', 'guidance.outside': 'soft_bellman', 'eval.methods': 'qsharp'}, 'has none'),
    ({'guidance.outside': 'soft_bellman'}, "config.eval.methods has 'cd'"),
    ({'guidance.outside': 'zero', 'eval.methods': 'cd,fudge'}, "tokens that nobody scored would be favoured"),
    ({'guidance.outside': 'zero', 'guidance.offset': 'fudge'}, "config.guidance.offset has 'fudge'"),
    ({'eta': 'inf'}, 'config.eta is inf'),
    ({'eval.etas': '0.1,inf'}, 'config.eval.etas has inf'),
    ({'value.run': 'runs/a', 'baselines.methods': 'dpo'}, 'nothing is trained'),
    ({'value.run': 'runs/a', 'baselines.value_on_pairs': 'True'}, 'nothing is trained'),
    ({'sampling.top_p': '0'}, 'config.sampling.top_p is 0'),
    ({'sampling.top_p': '1.1'}, 'config.sampling.top_p is 1.1'),
    ({'sampling.temperature': '-1'}, 'config.sampling.temperature is -1; it must be 0 or more'),
    ({'sampling.temperature': 'inf'}, 'config.sampling.temperature is inf'),
    ({'fit.learning_rate': '0'}, 'config.fit.learning_rate is 0; it must be above 0'),
    ({'fit.accumulate': '0'}, 'config.fit.accumulate is 0'),
    ({'fit.heldout_fraction': '1'}, 'config.fit.heldout_fraction is 1'),
    ({'task.arithmetic.two_digit_share': '2'}, 'two_digit_share is 2'),
    ({'reference.pretrain.random_arm_share': '-1'}, 'random_arm_share is -1'),
    ({'eval.samples': '2'}, 'a vote needs that many answers'),
    ({'reference.pretrain.curriculum_steps': '23000'}, 'leave some for whole graphs'),
    ({'mesh.fsdp': '-1'}, 'only one may be -1'),
    ({'mesh.tensor': '0'}, 'every size must be at least 1'),
    ({'reference.transformer.kv_heads': '4'}, 'must divide heads'),
    ({'reference.transformer.width': '390'}, 'multiple of twice the heads'),
    ({'task.name': 'star_graph', 'task.star_graph.degree': '20'}, 'has 81 nodes'),
    ({'task.template': 'no place'}, "must have '{question}'"),
    ({'reward': ''}, 'config.reward is empty'),
    ({'task.system': 'Be brief.'}, 'a system turn is part of a chat'),
    ({'guidance.epsilon_cutoff': '1.5'}, 'config.guidance.epsilon_cutoff is 1.5; it is a probability'),
    ({'guidance.epsilon_cutoff': '0.01', 'guidance.order': 'after_sampler'}, 'every token that the sampler leaves'),
    ({'iterations': '0'}, 'config.iterations is 0; it must be 1 or more'),
    ({'value.lookahead': '1', 'value.scan_layers': 'True'}, 'layers that are run again are no stack'),
    ({'value.lookahead': '-1'}, 'config.value.lookahead is -1'),
])
def test_values_out_of_range_are_refused(overrides: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        config.load('configs/default.py', list(overrides.items()))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1, 'one sentence for one mistake'


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        config.load('configs/default.py', [('eta', '0'), ('collect.samples', '0')])
    assert len(str(caught.value).splitlines()) == 2


def test_every_number_has_a_range_and_every_rule_a_key() -> None:
    keys = config.flatten(config.default())
    ranged = {*config_rules.CHOICES, *config_rules._ITEM_CHOICES, *config_rules._ABOVE_ZERO, *config_rules._AT_LEAST}
    assert ranged <= set(keys)
    by_hand = {'seed', 'task.arithmetic.seed', 'task.star_graph.seed', 'eta', 'collect.eta', 'sampling.top_p',
               'guidance.epsilon_cutoff', 'task.arithmetic.two_digit_share', 'reference.pretrain.random_arm_share',
               'fit.heldout_fraction', 'fit.end_share', 'reference.pretrain.end_share', 'baselines.end_share',
               'baselines.warmup_share',
               *(f'task.{task}.validation_share' for task in ('gsm8k', 'math', 'quality', 'jsonl')),
               'value.v_min', 'value.v_max', 'mesh.data', 'mesh.fsdp', 'mesh.tensor'}
    numbers = {key for key, value in keys.items() if type(value) in (int, float)}
    assert numbers - ranged == by_hand


@pytest.mark.parametrize('key, choices', [
    ('collect.budget', rollout.BUDGETS),
    ('collect.cut', (*rollout.CUTS, 'guided')),
    ('baselines.methods', tuple(policies.METHODS)),
    ('baselines.optimizer', optimizers.OPTIMIZERS),
    ('baselines.schedule', optimizers.SCHEDULES),
    ('fit.optimizer', optimizers.OPTIMIZERS),
    ('fit.schedule', optimizers.SCHEDULES),
    ('guidance.offset', categorical.OFFSETS),
    ('guidance.order', guidance.ORDERS),
    ('guidance.outside', guidance.OUTSIDE),
    ('reference.pretrain.optimizer', optimizers.OPTIMIZERS),
    ('reference.pretrain.schedule', optimizers.SCHEDULES),
    ('value.extra_input', value_lib.EXTRA_INPUTS),
    ('value.head', categorical.KINDS),
    ('value.head_init', value_lib.HEAD_INITS),
    ('value.init', value_lib.INITS),
    ('value.projection', categorical.PROJECTIONS),
    ('value.type', value_lib.KINDS),
])
def test_choices_are_those_of_the_library(key: str, choices: tuple[str, ...]) -> None:
    assert set({**config_rules.CHOICES, **config_rules._ITEM_CHOICES}[key]) == set(choices)


def test_a_file_with_a_misspelt_key_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / 'mine.py'
    path.write_text(HEAD + '    config.collect.sampels = 4\n    return config\n')
    with pytest.raises(ValueError, match='line 6.*sampels'):
        config.load(str(path))


def test_a_file_of_other_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'mine.py'
    path.write_text(HEAD + '    config.unlock()\n    config.colour = 1\n    return config\n')
    with pytest.raises(ValueError, match='there is no config.colour'):
        config.load(str(path))
    path.write_text('import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict()\n')
    with pytest.raises(ValueError, match=r'config\.\S+ is missing'):
        config.load(str(path))


def test_a_file_cannot_leave_its_configuration_unlocked(tmp_path: Path) -> None:
    path = tmp_path / 'mine.py'
    path.write_text(HEAD + '    config.unlock()\n    return config\n')
    assert config.load(str(path)).is_locked


@pytest.mark.parametrize('spec, words', [
    ('configs/none.py', 'no configuration file'), ('configs/arithmetic.py:huge', 'tiny, small and paper'),
    ('configs/gsm8k.py:huge', 'tiny, small and paper'), ('configs/real_valued.py:small', 'it has tiny')])
def test_files_and_sizes_that_do_not_exist(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.load(spec)


def test_json_keeps_infinities_and_fills_in_new_keys() -> None:
    loaded = config.load('configs/default.py', [('collect.eta', 'inf')])
    text = config.to_json(loaded)
    assert 'Infinity' not in text
    assert config.from_json(text) == loaded
    lacking = text.replace('"cut": "uniform",', '')
    assert lacking != text and config.from_json(lacking) == loaded
    with pytest.raises(ValueError, match='there is no config.old_key'):
        config.from_json(text.replace('"seed"', '"old_key"'))
    with pytest.raises(ValueError, match='cannot be read'):
        config.from_json(text[:-5])


@pytest.mark.parametrize('key, text', [
    ('iterations', '3'), ('eta', '0.3'), ('eval.samples', '9'), ('logging.every_steps', '1'), ('mesh.fsdp', '2'),
    ('fit.checkpoint_every_steps', '7')])
def test_a_run_may_go_on_with_more_iterations_or_other_observations(key: str, text: str) -> None:
    config.check_resume(config.default(), config.load('configs/default.py', [(key, text)]))


@pytest.mark.parametrize('key, text', [
    ('iterations', '1'), ('collect.eta', '0.3'), ('collect.samples', '9'), ('reward', 'other'), ('seed', '1')])
def test_a_run_may_not_become_another(key: str, text: str) -> None:
    base = config.default()
    with pytest.raises(ValueError) as caught:
        config.check_resume(base, config.load('configs/default.py', [(key, text), ('eval.samples', '9')]))
    old = config.flatten(base)[key]
    assert f'{key} was {old!r}, now' in str(caught.value) and 'eval' not in str(caught.value)


def test_command_line_is_split_into_configuration_and_the_rest() -> None:
    loaded, others = cli.parse_config(
        ['--workdir=x', '--config', 'configs/arithmetic.py:tiny', '--config.eta=0.3', '--config.collect.samples', '5',
         '--dry_run'])
    assert loaded is not None and (loaded.eta, loaded.collect.samples) == (0.3, 5)
    assert others == ['--workdir=x', '--dry_run']
    assert cli.parse_config(['--workdir=x']) == (None, ['--workdir=x'])


@pytest.mark.parametrize('argv, words', [
    (['--config.eta=1'], 'there is none: add --config'),
    (['--config=configs/arithmetic.py', '--config.eta'], '--config.eta has no value'),
    (['--config'], '--config has no value')])
def test_incomplete_command_lines(argv: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cli.parse_config(argv)


def test_only_our_own_errors_become_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def misspelt(argv: object) -> None:
        cli.parse_config(['--config=configs/arithmetic.py', '--config.etaa=1'])

    def broken(argv: object) -> None:
        raise ValueError('from elsewhere')

    with pytest.raises(SystemExit) as caught:
        cli.main(misspelt, [])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1
    with pytest.raises(ValueError, match='from elsewhere'):
        cli.main(broken, [])


def test_the_entry_point_prints_one_line_for_an_unknown_key() -> None:
    done = subprocess.run(
        [sys.executable, 'experiments/train.py', '--config=configs/arithmetic.py:tiny', '--workdir=unused',
         '--config.etaa=1'], capture_output=True, text=True, env={'PYTHONPATH': str(ROOT)}, check=False)
    assert done.returncode == 2
    assert done.stderr == 'error: there is no config.etaa. Did you mean config.eta or config.collect.eta?\n'
