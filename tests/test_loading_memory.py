"""Loading takes little more memory than what is loaded."""
from __future__ import annotations

import json
import os
from pathlib import Path
import subprocess
import sys

import gguf
import numpy as np
import pytest

from qsharp_jax.models.families import llama
from qsharp_jax.models.pretrained import export
from qsharp_jax.models.transformer import TransformerConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIG = TransformerConfig(
    vocab_size=64_000, width=2048, layers=18, heads=16, kv_heads=4, head_dim=128, mlp_width=8192, max_positions=2048)


def write_folder(folder: Path, kind: str) -> Path:
    """A checkpoint whose numbers are zeros that take no room on the disk: the head, and a hole behind it."""
    item = {'BF16': 2, 'F32': 4}[kind]
    place, head = 0, {}
    for weight in llama.FAMILY.tensors.weights(CONFIG):
        end = place + int(np.prod(weight.stored_shape)) * item
        head[weight.name] = {'dtype': kind, 'shape': weight.stored_shape, 'data_offsets': [place, end]}
        place = end
    text = json.dumps(head).encode()
    with (folder / 'model.safetensors').open('wb') as stream:
        stream.write(len(text).to_bytes(8, 'little') + text)
        stream.truncate(8 + len(text) + place)
    export.write_json(folder / 'config.json', {**llama.write(CONFIG), 'model_type': 'llama'})
    return folder


def write_gguf(folder: Path) -> Path:
    """The same as a file of blocks of eight bits."""
    kind = gguf.GGMLQuantizationType.Q8_0
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(folder / 'model.gguf', 'llama')
    for add, number in (
            (writer.add_block_count, CONFIG.layers), (writer.add_context_length, CONFIG.max_positions),
            (writer.add_embedding_length, CONFIG.width), (writer.add_feed_forward_length, CONFIG.mlp_width),
            (writer.add_head_count, CONFIG.heads), (writer.add_head_count_kv, CONFIG.kv_heads)):
        add(number)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    total = 0
    for weight in llama.FAMILY.gguf_tensors.weights(CONFIG):
        shape = weight.stored_shape
        quantised = len(shape) == 2
        count = int(np.prod(shape)) // block * size if quantised else 4 * shape[0]
        stored = (shape[0], shape[1] // block * size) if quantised else shape
        writer.add_tensor_info(
            weight.name, stored, np.dtype(np.uint8 if quantised else np.float32), count, kind if quantised else None)
        total += -(-count // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    path = folder / 'model.gguf'
    head = path.stat().st_size
    with path.open('r+b') as stream:
        stream.truncate(-(-head // 32) * 32 + total)
    return path


@pytest.mark.slow
@pytest.mark.parametrize('kind, dtype, devices, scan', [
    ('BF16', 'bfloat16', 1, False), ('BF16', 'float32', 8, False), ('F32', 'float32', 1, False),
    ('GGUF', 'bfloat16', 8, False), ('BF16', 'bfloat16', 1, True), ('BF16', 'float32', 8, True)])
def test_peak_above_what_the_devices_hold(tmp_path: Path, kind: str, dtype: str, devices: int, scan: bool) -> None:
    checkpoint = write_gguf(tmp_path) if kind == 'GGUF' else write_folder(tmp_path, kind)
    if kind != 'GGUF':
        assert (tmp_path / 'model.safetensors').stat().st_size >= 2e9
    found = subprocess.run(
        [sys.executable, '-m', 'tests.loading_memory', f'--checkpoint={checkpoint}', f'--dtype={dtype}',
         f'--devices={devices}', *['--scan'] * scan],
        check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    measured = json.loads(found.stdout.splitlines()[-1])
    assert measured['leaves'] == 2 + 9 * (1 if scan else CONFIG.layers)
    assert measured['held'] >= 2e9
    assert measured['most'] <= 2.5 * measured['largest'], measured
    # Nothing but the arrays stays.
    assert measured['after'] <= 0.1 * measured['largest'], measured
