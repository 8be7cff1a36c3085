"""What a dry run says is what a run then takes, and saying it leaves no trace."""
from __future__ import annotations

import dataclasses
from pathlib import Path
import re

import jax
import pytest

from experiments import train as entry
from qsharp_jax import describe, experiment, sharding
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.models import transformer
from qsharp_jax.models import value as value_lib
from tests import tiny

MEBI = 2 ** 20


def mebibytes(text: str, name: str) -> float:
    found = re.search(rf'^  {name} +([\d.]+) MiB$', text, re.MULTILINE)
    assert found, text
    return float(found[1])


def on_first_device(tree: object) -> float:
    """Bytes that arrays take on one device, in MiB."""
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
              if shard.device == jax.devices()[0]]
    return sum(shards) / MEBI


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize('kind', ['rope', 'learned'])
def test_parameters_and_bytes_are_those_of_the_run(sizes: tuple[int, int, int], kind: str, tmp_path: Path) -> None:
    data, fsdp, tensor = sizes
    config = tiny.config(
        tmp_path / 'data', reference__transformer__width=64, reference__transformer__mlp_width=512,
        reference__transformer__positions=kind, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)
    with tiny.devices(data * fsdp * tensor):
        parts = experiment.outline(config, tmp_path / 'run')
        text = describe.plan(parts)
    shape, key = parts.reference_config, jax.random.key(0)
    reference = sharding.born_sharded(
        lambda key: transformer.init_params(key, shape), parts.mesh, transformer.logical_axes(shape))(key)
    value = dataclasses.replace(parts, reference_params=reference).init_value_params()
    assert f'reference            {transformer.count_params(reference):,} parameters, 1 layers of width 64' in text
    assert f'value network        {transformer.count_params(value):,} parameters, 1 layers, 1 score(s)' in text
    assert mebibytes(text, 'reference parameters') == pytest.approx(on_first_device(reference), abs=0.051)
    assert mebibytes(text, 'value parameters') == pytest.approx(on_first_device(value), abs=0.051)
    assert mebibytes(text, 'optimizer moments, gradients') == pytest.approx(3 * on_first_device(value), abs=0.051)
    for name, config_ in (('reference', shape), ('value', value_lib.trunk_config(parts.value_config, shape))):
        # Prompts of up to 32 tokens as configured, and 8 of an answer.
        cache = transformer.init_cache(config_, 16, 40)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) / MEBI / (data * fsdp)
        assert mebibytes(text, f'{name} cache, 16 rows x 40 slots') == pytest.approx(held, abs=0.051)
    lines = [float(size) for size in re.findall(r'([\d.]+) MiB$', text, re.MULTILINE)]
    assert lines[-1] == pytest.approx(sum(lines[:-1]), abs=0.31)


def test_a_dry_run_says_the_whole_config_and_leaves_no_trace(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tiny.devices(1):
        entry.main([*tiny.arguments(tmp_path / 'data', tmp_path / 'run', collect__examples=5), '--dry_run'])
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert f'"data_dir": "{tmp_path}/data"' in text and '"eta": 0.1' in text
    assert 'training prompts     24, up to 32 tokens (as configured' in text
    assert 'collected a pass     5 prompts x 2 answers' in text
    assert 'devices              1, data=1, fsdp=1, tensor=1' in text


def test_prompts_are_counted_once_they_are_made(tmp_path: Path) -> None:
    config = tiny.config(tmp_path / 'data')
    with tiny.devices(1):
        parts = experiment.outline(config, tmp_path / 'run')
        prompts_lib.load(config.task, 'train', parts.tokenizer)
        text, start = describe.plan(parts), describe.run(parts)
    assert 'training prompts     24, up to 16 tokens\n' in text and 'reference cache, 16 rows x 24 slots' in text
    assert 'prompts    24 to train on, the first of 15 tokens' in start
    assert f'reward     {tiny.REWARD}' in start and f'workdir    {tmp_path}/run' in start
