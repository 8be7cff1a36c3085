"""What the entry points share: reading a command line, and saying in one line what is wrong with it."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import os
from pathlib import Path
import sys
import traceback

import ml_collections

from qsharp_jax import allocation
from qsharp_jax import config as config_lib

REPRODUCED = Path('runs/reproduce')  # where the runs of the paper's tables are kept, unless it is said otherwise

_PACKAGE = str(Path(__file__).resolve().parent) + os.sep


def main(run: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs an entry point; an error in the user's words becomes one line and exit code 2.

    Other errors, those of libraries and of the user's own files among them, keep their traceback.

    Args:
      run: what to run, given the arguments after the program's name.
      argv: those arguments; None takes the command line.
    """
    if argv is None:  # a program of its own
        allocation.keep_freed_memory()
    try:
        run(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        if not _is_worded(error):
            raise
        print('\n'.join(f'error: {line}' for line in str(error).splitlines()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print('stopped. The same command goes on from here.', file=sys.stderr)
        raise SystemExit(130) from None


def parse_config(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict | None, list[str]]:
    """The configuration that a command line asks for, and the arguments that are not about it.

    `--config=path/to/file.py:size` names the file, `--config.section.key=value` overrides a key; either may have a
    space in place of '='.

    Returns:
      the configuration, or None if the line has no `--config`, and the other arguments in their order.

    Raises:
      ValueError: an argument has no value, or the configuration is refused.
    """
    spec, overrides, others = split_arguments(argv)
    if spec is None:
        if overrides:
            raise ValueError(f'--config.{overrides[0][0]} changes a configuration, and there is none: add '
                             '--config=configs/arithmetic.py:tiny or another file.')
        return None, others
    return config_lib.load(spec, overrides), others


def split_arguments(argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str]], list[str]]:
    """The `--config` of a command line, what its `--config.key=value` say in their order, and the other arguments.

    Raises:
      ValueError: an argument has no value.
    """
    spec, overrides, others = None, [], []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.partition('=')
        if name != '--config' and not name.startswith('--config.'):
            others.append(argument)
            continue
        if not equals:
            if not arguments or arguments[0].startswith('--'):
                raise ValueError(f'{name} has no value: write {name}=value.')
            value = arguments.pop(0)
        if name == '--config':
            spec = value
        else:
            overrides.append((name.removeprefix('--config.'), value))
    return spec, overrides, others


def numbers(text: str) -> tuple[float, ...]:
    """An argparse type: '0.05,0.1' is (0.05, 0.1)."""
    try:
        return tuple(float(item) for item in text.split(','))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is no list of numbers such as 0.05,0.1') from error


def words(text: str) -> tuple[str, ...]:
    """An argparse type: 'cd,qsharp' is ('cd', 'qsharp')."""
    return tuple(item.strip() for item in text.split(','))


def _is_worded(error: ValueError) -> bool:
    """Whether this package raised the error itself, so that its text tells the user what to do."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE)
