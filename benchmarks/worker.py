"""One side in a process of its own: reads calls as JSON lines, answers each with one JSON line.

  python -m benchmarks.worker ours|peer

A call is {"call": name, ...arguments}; the answer {"result": ...} or {"error": text}. What a library prints goes to
standard error, so that it cannot break the protocol. A result that is an object gets `peak_memory`, the most bytes that
the process held during the call (where the system does not tell, so far).
"""
from __future__ import annotations

import contextlib
import importlib
import json
import os
from pathlib import Path
import resource
import sys
import traceback

SIDES = {'ours': 'benchmarks.ours', 'peer': 'benchmarks.peer'}


def main() -> None:
    """Serves calls until standard input ends."""
    answers = os.fdopen(os.dup(1), 'w', encoding='utf-8', buffering=1)
    os.dup2(2, 1)
    side = importlib.import_module(SIDES[sys.argv[1]]).Side()
    for line in sys.stdin:
        message = json.loads(line)
        _forget_peak()
        try:
            result = getattr(side, message.pop('call'))(**message)
            if isinstance(result, dict):
                result['peak_memory'] = _peak()
            answer = {'result': result}
        except Exception:  # of whatever kind: the caller raises it again, with its traceback
            answer = {'error': traceback.format_exc()}
        answers.write(json.dumps(answer) + '\n')


def _forget_peak() -> None:
    """Has the peak of the resident memory begin anew (proc_pid_clear_refs(5)), where Linux lets it."""
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5', encoding='ascii')


def _peak() -> int:
    try:
        lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == '__main__':
    main()
