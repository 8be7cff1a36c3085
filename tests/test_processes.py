"""Published weights in and out on two processes: parts of a tensor in each, and one set of files from both."""
from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from qsharp_jax import export as run_export
from qsharp_jax import train
from qsharp_jax.models.pretrained import export
from tests import test_huggingface, test_pairs, test_pretrained, tiny
from tests.processes import run_two

# Devices each -> mesh, and devices in the mesh's order: neighbours on either axis are of different processes.
MESHES = {4: ((1, 2, 4), (0, 4, 1, 5, 6, 2, 7, 3)), 1: ((1, 2, 1), (0, 1))}

IN_AND_OUT = '''
from pathlib import Path
import dataclasses
import json
import numpy as np
from qsharp_jax import sharding
from qsharp_jax.models import pretrained, transformer
from qsharp_jax.models.pretrained import export
sizes, order = json.loads(sys.argv[3])
mesh = sharding.make_mesh(*sizes, devices=[jax.devices()[place] for place in order])
out = Path(sys.argv[4])
for name in sys.argv[5:]:
    file = pretrained.open_checkpoint(name)
    expected = pretrained.load_params(file, dtype='bfloat16')
    for scan in (False, True):
        config = dataclasses.replace(file.config, scan_layers=scan)
        params = pretrained.load_params(file, transformer.param_shardings(config, mesh), 'bfloat16')
        leaves = jax.tree.leaves(params)
        split = [leaf for leaf in leaves if not leaf.is_fully_addressable and not leaf.is_fully_replicated]
        assert len(split) > len(leaves) / 2
        whole = transformer.separate_layers(sharding.to_host(params), config)
        jax.tree.map(np.testing.assert_array_equal, whole, expected)
        folder = out / f'{Path(name).name}_{scan}'
        export.write_model(folder, config, params, file_bytes=9000)
        head = {'kernel': params['final_norm']['scale'][None]}
        export.write_value(folder / 'value', config, {'trunk': params, 'head': head}, {'type': 'v'})
        jax.tree.map(np.testing.assert_array_equal, pretrained.load_params(
            pretrained.open_checkpoint(folder), dtype='bfloat16'), expected)
'''


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('devices', MESHES)
def test_weights_come_in_by_parts_and_go_out_whole(tmp_path: Path, devices: int) -> None:
    config = test_huggingface.LLAMA
    export.write_model(tmp_path / 'folder', config, test_huggingface.random_params(config), file_bytes=9000)
    tensors = test_pretrained.stored_tensors(test_pretrained.random_params())
    kinds = {name: gguf.GGMLQuantizationType.Q8_0 for name, array in tensors.items() if array.ndim == 2}
    file = test_pretrained.write(tmp_path / 'model.gguf', tensors, kinds=kinds)
    run_two(IN_AND_OUT, json.dumps(MESHES[devices]), tmp_path / 'out', tmp_path / 'folder', file, devices=devices)
    for name in ('folder', 'model.gguf'):
        one, stacked = (contents(tmp_path / 'out' / f'{name}_{scan}') for scan in (False, True))
        assert one == stacked and not any(path.endswith('.tmp') for path in one)
        assert {'model.safetensors.index.json', 'value/value_head.safetensors', 'value/value_head.json'} <= one.keys()


EXPORT = '''
from pathlib import Path
import time
from qsharp_jax import export
write = export._write_tokenizer
if jax.process_index():
    time.sleep(2)  # one begins late, and the other writes late
else:
    export._write_tokenizer = lambda *args: (time.sleep(1), write(*args))
out, names = Path(sys.argv[4]), sys.argv[5:]
assert export.run(Path(sys.argv[3]), out) == [out / name for name in names]
assert all((out / name / 'tokenizer_config.json').is_file() for name in names)  # whoever is through finds all of it
'''


@pytest.mark.filterwarnings('ignore:the axis .* does not split')
@pytest.mark.whole
@pytest.mark.parametrize('names', [('reference', 'value'), ('reference',)], ids=len)
def test_a_run_is_exported_once(tmp_path: Path, names: tuple[str, ...]) -> None:
    folders = (test_pairs.write(tmp_path / 'reference', test_pairs.REFERENCE, 0),
               test_pairs.write(tmp_path / 'value', test_pairs.VALUE, 1))
    config = test_pairs.config_of(folders, tmp_path, mesh__data=1, mesh__fsdp=4, mesh__tensor=2, fit__batch_size=4,
                                  fit__warmup_steps=0)
    if 'value' in names:
        tiny.run_of_opinions(config, tmp_path / 'run')
    else:
        train.prepare(config, tmp_path / 'run')
    assert [path.name for path in run_export.run(tmp_path / 'run', tmp_path / 'one')] == [*names]
    run_two(EXPORT, tmp_path / 'run', tmp_path / 'two', *names, devices=4)
    assert contents(tmp_path / 'two') == contents(tmp_path / 'one')
