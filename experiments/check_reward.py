"""Tries a reward on a file of answers, before any model runs.

  python experiments/check_reward.py my_rewards.py:brevity --data=answers.jsonl

Each line of the file is an object with the answer in 'completion', 'response' or 'text', the question in 'prompt' or
'question', and whatever other columns the reward asks for. Prints the style that was recognised, times and the slowest
rows, abstentions, whether values are the same when it is called again and on one row alone, the share of equal values,
their correlation with length, and which value network fits.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax import cli
from qsharp_jax.rewards import checking


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('reward', metavar='PATH.py:FUNCTION', help="as 'reward' of a configuration")
    parser.add_argument('--data', type=Path, required=True, metavar='FILE.jsonl', help='answers to grade')
    parser.add_argument('--completion', default='', help='column with the answers')
    parser.add_argument('--workers', type=int,
                        help='processes that grade, one answer at a time; 0: this one, all at once (default: 0, or 1 '
                        'for a reward that must be killed where it hangs)')
    parser.add_argument('--timeout_seconds', type=float, default=5.0, help='for one answer, with workers')
    args = parser.parse_args(argv)
    checking.run(args.reward, args.data, args.completion, args.workers, args.timeout_seconds)


if __name__ == '__main__':
    cli.main(main)
