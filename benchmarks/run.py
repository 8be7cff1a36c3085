"""Runs the benchmark and writes its tables.

  python benchmarks/run.py [--only=decode,peer] [--full] [--data=FOLDER] [--out=FOLDER]

The two sides, ours in JAX and its peer in PyTorch, live in a process each and take turns: whatever else the machine
does meets both alike, so that ratios hold where times do not. See docs/performance.md.
"""
from __future__ import annotations

from collections.abc import Sequence
import os
from pathlib import Path
import platform
import sys
import tempfile
import time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from absl import app  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks import cases, tables, workload  # noqa: E402
from qsharp_jax import results  # noqa: E402

_ONLY = flags.DEFINE_list('only', [], f'Cases ({", ".join(cases.CASES)}), or beginnings of names of rows such as '
                          "'peer/batch=16'; all if left out. Rows that are not measured stay as they are.")
_FULL = flags.DEFINE_bool('full', False, 'Also measure what takes long: hours instead of half of one.')
_DATA = flags.DEFINE_string('data', '', 'Folder of GSM8K (train.jsonl); else that of the variable '
                            f'{workload.DATA_VARIABLE}, else data/gsm8k. Without it, arithmetic takes its place.')
_OUT = flags.DEFINE_string('out', str(ROOT / 'benchmarks' / 'results'), 'Folder of the results, one file a case.')


def main(argv: Sequence[str]) -> None:
    """Measures what was asked for, row by row; what is measured is kept if a later row fails."""
    if len(argv) > 1:
        raise app.UsageError(f'{argv[1:]} is no option.')
    unknown = [name for name in _ONLY.value if name.split('/')[0] not in cases.CASES]
    if unknown:
        raise app.UsageError(f'--only names {unknown}; the cases are {", ".join(cases.CASES)}.')
    out = Path(_OUT.value)
    with tempfile.TemporaryDirectory() as folder:
        sides = cases.Sides(Path(folder), workload.data_folder(_DATA.value), cases.pick(_ONLY.value), _FULL.value,
                            bool(_ONLY.value))
        try:
            for name, case in cases.CASES.items():
                if _ONLY.value and name not in {asked.split('/')[0] for asked in _ONLY.value}:
                    continue
                if name not in cases.GOES_ON:
                    sides.close()  # all that was ever loaded and compiled takes 12 GB by the end
                began = time.perf_counter()
                for row in case(sides):
                    tables.keep(out / f'{name}.json', row, {**_machine(), **sides.about()})
                    print(f'{row["name"]}: {tables.sentence(row)}  [{time.perf_counter() - began:.0f} s]', flush=True)
                    began = time.perf_counter()
        finally:
            sides.close()
    if out == ROOT / 'benchmarks' / 'results':
        tables.rewrite(ROOT / 'docs' / 'performance.md', out)


def _machine() -> dict[str, Any]:
    model = platform.processor()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
        model = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), model)
    return {'command': 'python benchmarks/run.py ' + ' '.join(argument for argument in sys.argv[1:]
                                                              if not argument.startswith(('--data', '--out'))),
            'commit': results.commit(), 'cores': len(os.sched_getaffinity(0)), 'cpu': model}


if __name__ == '__main__':
    app.run(main)
