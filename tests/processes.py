"""Programs on two processes of this machine, as on two hosts."""
from __future__ import annotations

from pathlib import Path
import socket
import subprocess
import sys

ROOT = Path(__file__).resolve().parents[1]
_START = '''
import sys
import jax
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
'''


def run_two(program: str, *arguments: object, devices: int) -> None:
    """Runs a program, which finds `arguments` from sys.argv[3] on, on two processes of `devices` each.

    Raises AssertionError with what a process said last unless both come to the program's end.
    """
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    env = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'PATH': ''}
    running = [subprocess.Popen(
        [sys.executable, '-c', f"{_START}{program}\nprint('done', flush=True)", str(port), str(i),
         *map(str, arguments)], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for output, error in outputs:
        assert output.endswith('done\n'), error[-3000:]
