"""Imports run one way; what knows no network stays so."""
from __future__ import annotations

import ast
from collections.abc import Mapping
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import from its own row and from the rows above it.
LAYERS = (
    ('types', 'allocation'),
    ('categorical', 'guidance', 'estimators', 'calibration'),
    ('config_rules', 'config', 'progress', 'metrics', 'cli', 'commands', 'report'),
    ('sharding', 'topology', 'hlo', 'optimizers', 'data', 'rewards', 'models', 'decoding'),
    ('rollout', 'units', 'queue', 'learner', 'checkpoint', 'baselines', 'ledger',
     'star_graph_records'),
    ('references', 'experiment'),
    ('collect', 'fit', 'evaluate', 'ranking', 'relabel', 'pairs', 'policy_settings',
     'policy_fit', 'first_reference'),
    ('results', 'describe', 'programs'),
    ('baseline_runs',),
    ('baseline_estimates', 'estimates', 'plans', 'fits'),
    ('train', 'generate', 'export', 'chat'),
    ('reproduce',),
)
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}

# Parts that take networks as arguments, or need none.
WITHOUT_MODELS = ('categorical', 'guidance', 'decoding', 'rollout', 'queue', 'data', 'rewards', 'report', 'config',
                  'metrics')

Graph = dict[str, set[str]]


def test_imports_run_one_way() -> None:
    graph = import_graph(ROOT / 'qsharp_jax')
    unknown = sorted({part_of(module) for module in graph} - set(LAYER_OF))
    assert not unknown, f'give {unknown} a place in LAYERS'
    upward = [f'{module} imports {other}' for module, others in graph.items() for other in others
              if LAYER_OF[part_of(other)] > LAYER_OF[part_of(module)]]
    assert not upward


def test_no_import_cycles() -> None:
    graphlib.TopologicalSorter(import_graph(ROOT / 'qsharp_jax')).prepare()


@pytest.mark.parametrize('part', WITHOUT_MODELS)
def test_imports_no_network(part: str) -> None:
    graph = import_graph(ROOT / 'qsharp_jax')
    for module in graph:
        if part_of(module) == part:
            reached = sorted(other for other in reachable(graph, module) if part_of(other) == 'models')
            assert not reached, f'{module} reaches {reached}'


def test_the_library_imports_no_entry_point() -> None:
    entries = 'benchmarks', 'configs', 'experiments', 'tests'
    for path in (ROOT / 'qsharp_jax').rglob('*.py'):
        outside = [name for name in imported_names(path) if name.split('.')[0] in entries]
        assert not outside, f'{path} imports {outside}'


def test_entry_points_hold_flags_only() -> None:
    """Each defines `main` and nothing else, so that its logic is in the library, where tests reach it."""
    for path in sorted((ROOT / 'experiments').glob('*.py')):
        definitions = [node.name for node in ast.walk(ast.parse(path.read_text()))
                       if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert definitions == ['main'], path


@functools.cache
def import_graph(package: Path) -> Graph:
    """The modules of the package, each with those that it imports anywhere in its file."""
    modules = {module_name(path, package): path for path in package.rglob('*.py')}
    graph = {module: {other for other in (_longest(name, modules) for name in imported_names(path)) if other}
             for module, path in modules.items()}
    graph.pop(package.name)
    return graph


def imported_names(path: Path) -> set[str]:
    """Full names that a file imports; `from a import b` is a.b, whether b is a module or something inside a."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: write imports in full'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def _longest(name: str, modules: Mapping[str, Path]) -> str | None:
    """The module that an imported name is, or is inside of; None outside of the package and for the package itself."""
    if name in modules:
        return name if '.' in name else None
    parent = name.rpartition('.')[0]
    return parent if parent in modules and '.' in parent else None


def module_name(path: Path, package: Path) -> str:
    words = path.relative_to(package.parent).with_suffix('').parts
    return '.'.join(words[:-1] if words[-1] == '__init__' else words)


def part_of(module: str) -> str:
    """The word after the package's name: 'models' of 'qsharp_jax.models.value'."""
    return module.split('.')[1]


def reachable(graph: Graph, start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        for other in graph[todo.pop()]:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen
