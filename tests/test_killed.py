"""The whole job as a process of its own, killed without warning: it goes on to the result of one that was not."""
from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from qsharp_jax.data.dataset import Manifest
from tests import tiny
from tests.test_train import assert_same, written


class Killed:
    """experiments/train.py as a process of its own, killed without warning as soon as something is there."""

    def __init__(self, data: Path, workdir: Path, compiled: Path) -> None:
        self._command = [sys.executable, str(tiny.ROOT / 'experiments' / 'train.py'), *tiny.arguments(data, workdir)]
        self._env = {
            **os.environ, 'PYTHONPATH': str(tiny.ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
            # Not that of the other tests: a kill may leave half a program behind.
            'JAX_COMPILATION_CACHE_DIR': str(compiled)}

    def run(self, until: Callable[[], bool] = lambda: False) -> int:
        """Returns the process's exit code, -SIGKILL if `until` came true before it ended."""
        process = subprocess.Popen(self._command, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if until():
                    os.kill(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.002)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode in (0, -signal.SIGKILL), output.decode()
        return process.returncode


@pytest.mark.slow
def test_a_process_killed_in_each_phase_goes_on_to_the_same_result(data: Path, tmp_path: Path) -> None:
    straight, workdir, compiled = tmp_path / 'straight', tmp_path / 'killed', tmp_path / 'compiled'
    assert Killed(data, straight, compiled).run() == 0
    killed = Killed(data, workdir, compiled)

    def shards() -> int:
        return len(list((workdir / 'dataset').glob('*.array_record')))

    assert killed.run(until=lambda: shards() >= 2) == -signal.SIGKILL
    assert 2 <= len(Manifest(workdir / 'dataset').upto(1)) + 1 and shards() < 6  # the last may not be listed yet
    kept = written(workdir, 'dataset/00001-00000.array_record')

    fit = workdir / 'checkpoints' / 'fit_1'
    assert killed.run(until=lambda: (fit / '4').exists()) == -signal.SIGKILL
    assert not (workdir / 'checkpoints' / 'value_1').exists()

    def blocks() -> list[Path]:
        return list(workdir.glob('samples/*/qsharp_1-*/block_*.jsonl'))

    assert killed.run(until=lambda: len(blocks()) >= 1) == -signal.SIGKILL
    assert not (workdir / 'checkpoints' / 'value_2').exists()
    kept |= written(workdir, 'samples/*/qsharp_1-*/block_*.jsonl')

    assert killed.run() == 0
    assert_same(workdir, straight)
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in kept.items())
