"""What the grader of mathematics says of pairs whose verdict is known: right and wrong, accepted and not.

    python -m tests.grading_matrix --out=docs/grading.md

grades every pair of `tests/grading_pairs.py` as a run does, in worker processes with a time limit, and writes the
confusion matrix, each verdict that is not the label, and each that depends on which of the two is called the answer.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import importlib.metadata
import math
from pathlib import Path

from qsharp_jax import rewards
from qsharp_jax.data import answer_text
from tests.grading_pairs import BOXLESS, RIGHT, WRONG

WORKERS, SECONDS = 2, 5.0
ENDLESS = 'without end'  # the kind of pairs that no comparison ends on

Labelled = tuple[str, str, str, bool]  # kind, answer, given, whether it is right


def labelled() -> list[Labelled]:
    """Every pair with its kind and label."""
    return [(kind, answer, given, right) for right, kinds in ((True, RIGHT), (False, WRONG))
            for kind, pairs in kinds.items() for answer, given in pairs]


def grade(answers: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The reward of each completion; NaN where there was no verdict in time."""
    return rewards.score(
        rewards.load('math'), [''] * len(answers), completions, {'answer': answers}, workers=WORKERS,
        timeout_seconds=SECONDS, on_error='stop').tolist()


def grade_pairs(pairs: Sequence[Labelled]) -> list[float]:
    """The reward of each pair, its second part in a box."""
    return grade([answer for _, answer, _, _ in pairs], [answer_text.boxed(given) for _, _, given, _ in pairs])


def document() -> str:
    """The whole document, as Markdown."""
    pairs = labelled()
    verdicts = grade_pairs(pairs)
    twoway = [pair for pair in pairs if pair[0] != ENDLESS]
    swapped = dict(zip(twoway, grade_pairs([(kind, given, answer, right) for kind, answer, given, right in twoway])))
    boxless = grade(['72'] * len(BOXLESS), BOXLESS)
    kinds = list(dict.fromkeys(kind for kind, *_ in pairs))
    lines = [
        '# What the grader of mathematics says', '',
        'Made by `python -m tests.grading_matrix --out=docs/grading.md` from the pairs in `tests/grading_pairs.py`,',
        f'with math-verify {importlib.metadata.version("math-verify")} in {WORKERS} worker processes, {SECONDS:g} s an '
        'answer.', '',
        '| kind | right, accepted | right, rejected | wrong, accepted | wrong, rejected | no verdict |',
        '|---|--:|--:|--:|--:|--:|']
    for kind in (*kinds, 'all'):
        counts = [0] * 5
        for pair, verdict in zip(pairs, verdicts):
            if kind in (pair[0], 'all'):
                counts[4 if math.isnan(verdict) else 2 * (not pair[3]) + (verdict == 0)] += 1
        lines.append(f'| {kind} | {" | ".join(map(str, counts))} |')
    lines += [
        '', f'Of {len(BOXLESS)} completions without one closed box that holds the answer, up to 100,000 characters of '
        f'nested braces, {sum(verdict == 1 for verdict in boxless)} are accepted and '
        f'{sum(map(math.isnan, boxless))} get no verdict.', '', '## Verdicts that are not the label', '',
        '| answer | given | label | verdict |', '|---|---|---|---|']
    lines += [f'| {_code(answer)} | {_code(given)} | {_word(right)} | {_word(verdict)} |'
              for (_, answer, given, right), verdict in zip(pairs, verdicts) if verdict != right]
    lines += [
        '', '## Verdicts that depend on which one is the answer', '', '| answer | given | verdict | the other way |',
        '|---|---|---|---|']
    lines += [f'| {_code(pair[1])} | {_code(pair[2])} | {_word(verdict)} | {_word(swapped[pair])} |'
              for pair, verdict in zip(pairs, verdicts)
              if pair in swapped and verdict != swapped[pair]]
    return '\n'.join(lines) + '\n'


def _code(text: str) -> str:
    shown = text if len(text) <= 60 else f'{text[:60]}…'
    return f'`{shown}`'.replace('|', r'\|') if shown.strip('` ') else '(empty)'


def _word(verdict: float) -> str:
    return 'none' if math.isnan(verdict) else 'right' if verdict else 'wrong'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='the document')
    args = parser.parse_args(argv)
    args.out.write_text(document(), encoding='utf-8')
    print(args.out)


if __name__ == '__main__':
    main()
