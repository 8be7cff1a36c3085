"""Compiling for TPUs that are not there: names, refusals, the report, and, slowly, the compiler itself."""
from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
import re
from types import SimpleNamespace

import jax
import pytest

from experiments import train as entry
from qsharp_jax import cli, experiment, fits, programs, references, sharding, topology
from qsharp_jax.fits import Tried
from qsharp_jax.models import pretrained, transformer
from qsharp_jax.programs import Compiled, Decoding, Memory, TooLarge
from tests import tiny

MODELS = Path(__file__).resolve().parents[1] / 'configs' / 'models'
GIBI = 2 ** 30
TOO_LARGE = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.'


@pytest.mark.parametrize('name, devices, accelerator', [
    ('v5e:4x4', 16, 'v5litepod-16'), ('v5p:2x2x1', 4, 'v5p-8'), ('v6e:2x4', 8, 'v6e-8'), ('v4:2x2x2', 8, 'v4-16'),
    ('tpu7x:2x2x1', 4, 'tpu7x-8')])
def test_the_compiler_is_told_what_the_name_says(name: str, devices: int, accelerator: str) -> None:
    found = topology.parse(name)
    assert devices == found.chips
    assert found.environment['TPU_ACCELERATOR_TYPE'] == accelerator
    assert found.environment['TPU_WORKER_HOSTNAMES'] == 'localhost'
    assert found.flops <= found.generation.flops and found.flops * found.generation.cores == found.generation.flops


@pytest.mark.parametrize('name, words', [
    ('v9:2x2', r"'v9:2x2'; the kinds of TPU are v4, v5e, v5p, v6e, tpu7x, .* v4:2x2x2, v5e:2x2"),
    ('v5e', 'of v5e it is written as 2 numbers of chips, such as v5e:2x2'),
    ('v5e:2x2x2', 'of v5e it is written as 2 numbers'), ('v5p:2x2', 'of v5p it is written as 3 numbers'),
    ('v5e:0x2', 'of v5e it is'), ('v5e:2x2 ', 'of v5e it is')])
def test_other_names_are_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        topology.parse(name)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r'package libtpu: run pip install -e "\.\[tpu\]" in the'):
        topology.devices(topology.parse('v5e:2x2'))


def test_a_topology_is_of_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(entry.main, [*tiny.arguments(tmp_path / 'data', tmp_path / 'run'), '--topology=v5e:2x2'])
    assert '--topology v5e:2x2 names devices that are only compiled for: add --dry_run' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name, billions', [
    ('llama_3_8b', 8.03), ('llama_3_70b', 70.55), ('llama_3.2_1b', 1.236), ('llama_3.2_3b', 3.213),
    ('qwen_2.5_7b', 7.616), ('qwen_2.5_1.5b', 1.544), ('qwen_2.5_0.5b', 0.494)])
def test_published_sizes_are_those_of_their_names(name: str, billions: float) -> None:
    _, shape = pretrained.open_shape(MODELS / f'{name}.json')
    count = sum(leaf.size for leaf in jax.tree.leaves(transformer_shapes(shape)))
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)


def transformer_shapes(shape):
    return transformer.param_shapes(dataclasses.replace(shape, scan_layers=True))


def published(tmp_path: Path, **changes):
    """A run of Llama 3 8B beside 3.2 1B, without their weights or tokenizer."""
    return tiny.config(
        tmp_path / 'data', task__name='arithmetic', task__stop="''", reference__source=MODELS / 'llama_3_8b.json',
        value__source=MODELS / 'llama_3.2_1b.json', value__init='pretrained', value__layers=0, **changes)


def test_sizes_alone_are_planned_and_never_run(tmp_path: Path) -> None:
    config = published(tmp_path, mesh__tensor=8)
    mesh = sharding.make_mesh(**config.mesh)
    parts = experiment.outline(config, tmp_path / 'run', mesh)
    assert (parts.reference_config.layers, parts.value_shape.layers) == (32, 16)
    sizes = fits.sizes_of(parts)
    assert (sizes.rows, sizes.prompts, sizes.width, sizes.buffer) == (16, 1, 32, 8)
    # Eight prompts with their answers have 40 tokens each: two fill a row to a multiple of 16, and one would not.
    assert (sizes.fit_rows, sizes.fit_length, sizes.accumulate) == (4, 80, 1)
    with pytest.raises(ValueError, match='holds no weights: it serves --dry_run --topology only'):
        experiment.outline(config, tmp_path / 'run')
    with pytest.raises(ValueError, match='described without its tokenizer'):
        parts.tokenizer.encode('1')


def test_layers_are_scanned_where_that_was_measured_to_be_better(tmp_path: Path) -> None:
    for choice, platform, expected in (('auto', 'cpu', False), ('auto', 'tpu', True), ('yes', 'cpu', True),
                                       ('no', 'tpu', False), ('auto', 'gpu', False)):
        config = published(tmp_path, reference__scan_layers=choice)
        mesh = SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(platform=platform)]))
        assert references.outline(config, mesh, planned=True)[0].scan_layers == expected


@pytest.mark.parametrize('cut, budget, tokens', [
    ('uniform', 'total', (1.5, 1.5)), ('uniform', 'fresh', (2, 2)), ('start', 'total', (1, 1)),
    ('guided', 'total', (1, 1.5))])
def test_hours_are_steps_by_their_least_times(
        cut: str, budget: str, tokens: tuple[float, float], tmp_path: Path) -> None:
    config = published(
        tmp_path, iterations=3, collect__examples=30, collect__samples=4, collect__cut=cut, collect__budget=budget,
        collect__batch_rows=8, sampling__max_new_tokens=10, fit__epochs=2.0, fit__batch_size=2, fit__samples_per_row=2,
        eval__methods='qsharp', eval__examples=7, eval__samples=2, eval__etas='0.1,1.0', eval__select_split='',
        eval__reference_temperatures='0.0')
    parts = experiment.outline(config, tmp_path / 'run', sharding.make_mesh(**config.mesh))
    seconds = {fits._ALONE: 36.0, fits._STEP: 360.0, fits._FIT: 3600.0}
    # 120 answers an iteration in 8 rows; each is in all later fits; three networks at two etas; the reference twice.
    collecting = 10 * 15 * (tokens[0] * 0.01 + tokens[1] * 2 * 0.1)
    fitting = 120 * (1 + 2 + 3) * 2 / 4
    evaluating = 10 / 8 * 14 * (2 * 0.01 + 3 * 2 * 0.1)
    said = fits.hours(parts, fits.sizes_of(parts), seconds)
    assert [float(word) for word in re.findall(r'[\d.]+\d', said)] == pytest.approx(
        [collecting, fitting, evaluating, collecting + fitting + evaluating], abs=0.06)
    with config.unlocked():
        config.eval.examples, config.task.name = 0, 'quality'  # how many there are is not told
    assert fits.hours(parts, fits.sizes_of(parts), seconds).startswith('hours of the whole run are not known before')


def program(total: float) -> Compiled:
    return Compiled(Memory(0, 0, 0, 0, 0, int(total)), 1.0, None)


def test_the_least_time_is_that_of_the_narrower_way() -> None:
    v5e = topology.parse('v5e:2x2')
    assert fits.least_seconds(197e12, 819e6, v5e) == (1.0, 'arithmetic')
    assert fits.least_seconds(197e9, 819e9, v5e) == (1.0, 'memory')


def test_what_the_compiler_refuses_says_how_much_it_needs() -> None:
    error = TooLarge(TOO_LARGE)
    assert (error.needed, error.available) == (20.5 * GIBI, 15.75 * GIBI)
    assert fits._refused('decode', error).endswith('does not fit: 20.50 GiB of 15.75')
    assert TooLarge('RESOURCE_EXHAUSTED').needed == float('inf')

    def lower():
        raise jax.errors.JaxRuntimeError(TOO_LARGE)

    with pytest.raises(TooLarge):
        programs.compile_(lower)


@pytest.mark.parametrize('first', [8, 64, 1000, 4096])
@pytest.mark.parametrize('step', [1, 8])
def test_the_largest_batch_is_found_in_a_few_programs(
        first: int, step: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = []

    def compiled(parts, sizes):
        tried.append(sizes.rows)
        needed = 4 * GIBI + sizes.rows * GIBI // 100
        if needed <= 15.75 * GIBI:
            return Decoding(program(needed - GIBI), program(needed - 5), program(needed), GIBI // 2)
        return TooLarge(f'Used {needed / GIBI:.3f}G of 15.75G hbm')

    monkeypatch.setattr(fits, 'decoding_programs', compiled)
    monkeypatch.setattr(fits.sharding, 'batch_shards', lambda mesh: step)
    parts = SimpleNamespace(mesh=None, config=tiny.config(tmp_path))
    sizes = programs.Sizes(first, 1, 8, 8, 8, 16, 1)
    found = fits.largest_batch(parts, sizes, 15.9 * GIBI, compiled(parts, sizes))
    assert 1120 <= found <= 1175 and found % step == 0 and found in tried
    assert len(tried) <= 4


def test_where_nothing_fits_nothing_is_found() -> None:
    tried = Tried({}, set(), 10.0)
    tried.add(8, TooLarge('Used 20.00G of 15.75G hbm'))
    assert tried.next_rows(8) == 0 and tried.memory == 15.75 * GIBI


def test_prompts_are_prefilled_beside_the_rows() -> None:
    tried = Tried({}, set(), 10.0)
    tried.add(8, Decoding(program(6), program(1), program(9), caches=5))
    tried.add(4, Decoding(program(6), program(1), program(9), caches=4))
    assert tried.taken == {8: 11, 4: 10} and tried.fitting == {4}


@pytest.mark.slow
def test_a_small_model_is_compiled_for_four_chips(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(
        model_type='llama', hidden_size=512, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=1024, vocab_size=2048, max_position_embeddings=2048, eos_token_id=1, head_dim=128)
    (tmp_path / 'shape.json').write_text(json.dumps(sizes))
    changes = dict(task__name='arithmetic', reference__source=tmp_path / 'shape.json', reference__dtype='bfloat16',
                   value__init='truncate', value__layers=3, mesh__tensor=2, mesh__data=2, sampling__max_new_tokens=96,
                   fit__accumulate=2)
    monkeypatch.setattr(fits, 'largest_batch', lambda *arguments: 16)
    entry.main([*tiny.arguments(tmp_path / 'data', tmp_path / 'run', **changes), '--dry_run', '--topology=v5e:2x2'])
    text = capsys.readouterr().out
    assert 'mesh        data=2, fsdp=1, tensor=2' in text and 'reference 5, scanned; value 3, one by one' in text
    for name in ('prefill', 'refill, 1 rows', 'decode, 16 rows x 128 slots', 'fit, 8 rows', 'decode step',
                 'hours of the whole run', 'largest batch: '):
        assert name in text
    assert os.environ['TPU_ACCELERATOR_TYPE'] == 'v5litepod-4'
    assert not (tmp_path / 'run').exists()

    # What is counted of products is what XLA counts, where no loop hides it.
    config = tiny.config(tmp_path / 'data', **{**changes, 'fit__accumulate': 1, 'reference__scan_layers': 'no'})
    mesh = sharding.make_mesh(**config.mesh, devices=topology.devices(topology.parse('v5e:2x2')))
    parts = experiment.outline(config, tmp_path / 'run', mesh)
    shapes = fits.sizes_of(parts)
    found = programs.decoding_programs(parts, shapes)
    update = programs.compile_(lambda: programs.update(parts, shapes))
    for compiled, run in ((found.prefill, found.prefill.program.run()), (found.advance, found.advance.program.step()),
                          (update, update.program.run())):
        assert run.flops == pytest.approx(compiled.executable.cost_analysis()['flops'], rel=0.1)
    # A step reads parameters and caches once, and brings no parameter from other devices.
    config = tiny.config(tmp_path / 'data', **changes, value__scan_layers=True)
    parts = experiment.outline(config, tmp_path / 'run', mesh)
    found = programs.decoding_programs(parts, shapes)
    program = found.advance.program
    kernels = [math.prod(leaf.sharding.shard_shape(leaf.shape)[1:]) * 2
               for leaf in jax.tree.leaves(programs.reference_params(parts)['layers']) if leaf.ndim > 2]
    assert max(program.gathered(), default=0) < min(kernels)
    # No cache is laid out anew as the loop begins or ends, or as rows are filled; they are split by heads.
    made = found.refill.executable
    caches = {place.shard_shape(leaf.shape) for leaf, place in zip(
        jax.tree.leaves(made.out_info), jax.tree.leaves(made.output_shardings)) if leaf.ndim == 5}
    assert caches == {(8, 5, 2, 128, 128), (8, 3, 2, 128, 128)}
    for program in (found.advance.program, found.refill.program):
        assert not [one for one in program.entry.instructions.values()
                    if one.opcode == 'copy' and one.shapes[0].sizes in caches]
    # State and caches are written where they were, and of the rows only those that are filled.
    for compiled in (found.advance, found.refill):
        assert compiled.memory.aliased > 0.9 * compiled.memory.outputs
    assert found.refill.program.run().bytes < found.caches / 4
    assert max(found.refill.program.gathered(), default=0) < found.caches / 8
