"""One side in a process of its own: reads calls as JSON lines, answers each with one JSON line.

  python -m benchmarks.worker ours|peer

A call is {"call": name, ...arguments}; the answer {"result": ...} or {"error": text}. What a library prints goes to
standard error, so that it cannot break the protocol. A result that is an object gets `peak_memory`, in bytes, of the
process so far.
"""
from __future__ import annotations

import importlib
import json
import os
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
        try:
            result = getattr(side, message.pop('call'))(**message)
            if isinstance(result, dict):
                result['peak_memory'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer = {'result': result}
        except Exception:  # of whatever kind: the caller raises it again, with its traceback
            answer = {'error': traceback.format_exc()}
        answers.write(json.dumps(answer) + '\n')


if __name__ == '__main__':
    main()
