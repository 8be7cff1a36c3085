"""Published sets of questions: their files, where they are had, and how a copy is known to be the right one.

What is written here was checked against the files themselves or the repositories that hold them, unless it says
'unchecked'. Nothing was downloaded through the addresses below when this was written: `docs/data.md` has the list.
"""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
from pathlib import Path

from qsharp_jax.data.readers import Question

_GITHUB = 'https://raw.githubusercontent.com'


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a published set.

    Attributes:
      name: in a folder of the user's.
      digests: any of which names the published version: 'sha256:…' of the file, 'git:…' as git names its content, or
        'questions:…' (`questions_digest`), which tells the version of a set that is published in several wrappings.
      url: where it is downloaded from; '' if it has to be brought.
      size: number of questions; None if that was not counted.
    """

    name: str
    digests: tuple[str, ...]
    url: str = ''
    size: int | None = None


_GSM8K = f'{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data'
GSM8K_TRAIN = File(
    'train.jsonl', ('sha256:17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465',
                    'questions:c20a9d4fdfa3124c735bc1790b19d63de1a4629c4e92b1f5ad753cb419d350e8'),
    f'{_GSM8K}/train.jsonl', 7473)
GSM8K_TEST = File(
    'test.jsonl', ('sha256:3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14',
                   'questions:3fa49a0fab7cf62c9b98fd91317b89acd6e21eb2ad6497b2742454b777b05d9a'),
    f'{_GSM8K}/test.jsonl', 1319)

# The address that MATH was published at is no longer given by its authors, so there is none here. Of its 7,500 problems
# two have an empty box for an answer, and are left out.
MATH_TRAIN = File(
    'train.jsonl', ('questions:dfdf4c0feb4de902fa4643e97e8a80407cdb1eace6fe138039732d32d544cac3',), size=7498)
# Kept in Git LFS, whose pointer at that commit has this SHA-256; 'problem' and 'solution' are those of the copy whose
# questions were counted here, which has no column 'answer'. Unchecked: the address, and that both are one text.
MATH500 = File(
    'test.jsonl', ('sha256:35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132',
                   'questions:7be5431425ff0dccc21d09a415ff5910dd124a85e34d9284d9c43219f5a27086'),
    'https://media.githubusercontent.com/media/openai/prm800k/7ecc794703b2877f63226f2477a49b34f9b25163/prm800k/'
    'math_splits/test.jsonl', 500)
AIME24 = File(
    'aime24.jsonl', ('sha256:af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac',),
    f'{_GITHUB}/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data/aime24/test.jsonl', 30)

_QUALITY = f'{_GITHUB}/nyu-mll/quality/f84977c40dbfef70c9cab48037b7becfc8e45f73/data/v1.0.1'
QUALITY_TRAIN = File(
    'QuALITY.v1.0.1.htmlstripped.train', ('git:cb16a11b32099774dd0a66f0bfbc67a3926b95c3',),
    f'{_QUALITY}/QuALITY.v1.0.1.htmlstripped.train')
QUALITY_DEV = File(
    'QuALITY.v1.0.1.htmlstripped.dev', ('git:3b719593e8eaa993b1b6cc100deece53019230c4',),
    f'{_QUALITY}/QuALITY.v1.0.1.htmlstripped.dev')


def file_digests(path: Path) -> tuple[str, str]:
    """Returns 'sha256:…' and 'git:…' of a file."""
    content = path.read_bytes()
    blob = hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False)
    return f'sha256:{hashlib.sha256(content).hexdigest()}', f'git:{blob.hexdigest()}'


def questions_digest(questions: Sequence[Question]) -> str:
    """Returns 'questions:…', a hash of all questions with their answers, whatever their order and other columns."""
    lines = sorted(f'{len(q.question)} {q.question} {len(q.answer)} {q.answer}' for q in questions)
    return f'questions:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}'


def check_version(file: File, path: Path, questions: Sequence[Question], option: str) -> None:
    """Raises ValueError unless a file is the published one.

    Args:
      file: what it should be.
      path: of the copy.
      questions: that it holds.
      option: the key that allows other versions, for the message.
    """
    found = (*file_digests(path), questions_digest(questions))
    if not {*found} & {*file.digests}:
        sizes = f' and has {file.size} questions' if file.size else ''
        raise ValueError(
            f'{path} is of another version than the published one: it has {len(questions)} questions, '
            f'{", ".join(found)}; the published one is {" or ".join(file.digests)}{sizes}. Get that one, or set '
            f'{option}=True to take this as it is.')
