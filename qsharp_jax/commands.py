"""Commands of experiments/train.py, as they are typed in the current directory."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
import shlex
from typing import Any

from qsharp_jax import config as config_lib
from qsharp_jax.config import Overrides

SIZES = ('tiny', 'small', 'paper')  # of the configurations that are shipped

_ROOT = Path(__file__).resolve().parents[1]


def from_here(path: str) -> str:
    """Returns a path of this checkout, with a size behind it or not, as it is written from the current directory."""
    return path if Path(path.partition(':')[0]).exists() else str(_ROOT / path)


def train(spec: str, workdir: Path, overrides: Overrides, flags: Sequence[str] = ()) -> str:
    """Returns the command that makes a run, or goes on with it.

    Args:
      spec: file and size of its configuration, from the root of this checkout.
      workdir: where it is kept.
      overrides: dotted keys with their texts.
      flags: what else is given, such as '--relabel_from=runs/other'.
    """
    words = ['python', from_here('experiments/train.py'), f'--config={from_here(spec)}', f'--workdir={workdir}',
             *(f'--config.{key}={text}' for key, text in overrides), *flags]
    return ' '.join(map(_quoted, words))


def _quoted(word: str) -> str:
    """Returns a word as a shell reads it, on one line: line ends are written as bash and zsh have them."""
    if '\n' not in word:
        return shlex.quote(word)
    return "$'" + word.replace('\\', r'\\').replace("'", r"\'").replace('\n', r'\n') + "'"


def resume(config: Mapping[str, Any], workdir: Path) -> str:
    """Returns the command that goes on with a run of which only the configuration is known.

    It names the shipped configuration of the run's task that the fewest keys differ from.

    Args:
      config: of the run, nested.
      workdir: where it is kept.
    """
    keys = config_lib.flatten(config)
    changes = {}
    for spec in ('configs/default.py', *(f'configs/{keys["task.name"]}.py:{size}' for size in SIZES)):
        if Path(from_here(spec).partition(':')[0]).exists():
            base = config_lib.flatten(config_lib.load(from_here(spec)))
            changes[spec] = [(key, str(value)) for key, value in keys.items() if value != base[key]]
    nearest = min(changes, key=lambda spec: len(changes[spec]))
    return train(nearest, workdir, changes[nearest])
