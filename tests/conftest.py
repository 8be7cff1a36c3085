"""Settings of every test: eight simulated devices, one thread for each test process, no silent broadcasts."""
from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# XLA reads these once, when it starts: before any test module imports jax.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs here run for milliseconds and are compiled for seconds: this takes off a third of that.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# What one test, test process or command that a test starts has compiled serves all others.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    _compiled = tempfile.mkdtemp(prefix='compiled-')
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ.update(
        JAX_COMPILATION_CACHE_DIR=_compiled, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1')
_flags = [os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8']
if 'PYTEST_XDIST_WORKER' in os.environ:
    # Several test processes share the cores.
    _flags += ['--xla_cpu_multi_thread_eigen=false', 'intra_op_parallelism_threads=1']
os.environ['XLA_FLAGS'] = ' '.join(_flags).strip()

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='module', autouse=True)
def programs_are_let_go() -> Iterator[None]:
    """Compiled programs of a module go with it: each maps memory, of which Linux allows a process 65,530 pieces."""
    yield
    jax.clear_caches()


@pytest.fixture(scope='module')
def one_device() -> Iterator[None]:
    """Runs of a module that asks for it see one device."""
    from tests import tiny  # here, so that no project module is imported before the settings above
    with tiny.devices(1):
        yield


@pytest.fixture
def passes_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value passes have all the sizes of a large network's, which the small ones of tests are not worth."""
    from qsharp_jax.models import ragged
    monkeypatch.setattr(ragged, '_WORTH', 0)


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of a module keep their task's data, which is made once."""
    return tmp_path_factory.mktemp('data')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--fail-on-skip', action='store_true', help='a skipped test fails the run')


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption('--fail-on-skip') and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for report in _skipped(config) if config.getoption('--fail-on-skip') else []:
        terminalreporter.write_line(f'skipped, which fails this run: {report.nodeid}', red=True)


def _skipped(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    return reporter.stats.get('skipped', []) if reporter else []
