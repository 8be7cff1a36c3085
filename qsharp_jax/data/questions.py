"""Published sets of questions and anyone's own, as a TFDS builder: GSM8K, MATH, AIME-24, QuALITY, JSON Lines."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import http.client
import json
import os
from pathlib import Path
from typing import Any, ClassVar
import urllib.request

import tensorflow_datasets as tfds

from qsharp_jax.data import builders, published, readers, split_ledger
from qsharp_jax.data.published import File
from qsharp_jax.data.readers import Question

REVISION = 1
_TIMEOUT = 60  # seconds that a server may stay silent


@dataclasses.dataclass(frozen=True)
class Source:
    """A file that questions are read from.

    Attributes:
      read: returns its questions.
      file: what is published; None for a file of the user's own.
      key: of the config, that names its folder.
      folder: that it is in; '' if it is to be downloaded.
    """

    read: Callable[[Path], list[Question]]
    file: File | None
    key: str
    folder: str

    @property
    def path(self) -> Path | None:
        """Where the file is; None if it is to be downloaded.

        Raises:
          ValueError: it is not where the config says.
        """
        if not self.folder and self.file:
            return None
        path = Path(self.folder).expanduser()
        if self.file is None:
            if not path.is_file():
                raise ValueError(f'{self.key} is {self.folder!r}, which is no file.')
            return path
        if not (path / self.file.name).is_file():
            raise ValueError(f'{self.key} is {self.folder!r}, which {_content(path)}; the file {self.file.name} is '
                             'needed.')
        return path / self.file.name

    @property
    def digests(self) -> tuple[str, ...]:
        """Those of the file there is, or of the published one."""
        path = self.path
        if path is None:
            assert self.file is not None  # a file of the user's own has a path
            return self.file.digests
        return published.file_digests(path)


@dataclasses.dataclass(eq=False, kw_only=True)
class QuestionsConfig(tfds.core.BuilderConfig):
    """What the sets have in common. A split's questions are in the order of a hash of their texts.

    The files' contents are part of the name, so that a changed file never meets what was prepared from another.

    Attributes:
      validation_share: part of the training file that is held out, the same questions in every run. Questions with
        one key stay together.
      any_version: take files whose checksums are not those of the published version.
    """

    task: ClassVar[str]

    name: str = ''
    validation_share: float = 0.1
    any_version: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f'task.{self.task}.validation_share is {self.validation_share}; it is a share, at least 0 '
                             'and below 1.')

    def sources(self) -> dict[str, Source]:
        """Returns the file of 'train' and of those other splits that have one of their own."""
        raise NotImplementedError

    @property
    def answered(self) -> bool:
        """Whether questions come with answers."""
        return True

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple({**dict.fromkeys(self.sources()), **({'validation': None} if self.validation_share else {})})

    def size(self, split: str) -> int | None:
        """Returns how many questions a split has; None where that is known only once they are read."""
        sizes = {name: source.file.size for name, source in self.sources().items() if source.file}
        train = sizes.get('train')
        if self.any_version or train is None:
            return None
        held_out = round(train * self.validation_share)
        return {**sizes, 'train': train - held_out, 'validation': held_out}.get(split)

    def builder(self, data_dir: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
        """Returns the builder of these questions, which keeps its files below `data_dir`.

        Raises:
          ValueError: a file that the config names is not there.
        """
        contents = {split: source.digests for split, source in self.sources().items()}
        named = dataclasses.replace(self)
        named.name = f'{self.task}-{builders.config_name(self, REVISION, contents)}'
        return Questions(config=named, data_dir=os.fspath(data_dir), file_format='array_record')


@dataclasses.dataclass(eq=False, kw_only=True)
class Gsm8kConfig(QuestionsConfig):
    """GSM8K (Cobbe et al., 2021): 7,473 training questions, of which a tenth is held out, and 1,319 test questions.

    Attributes:
      folder: with train.jsonl and test.jsonl; '' downloads them.
    """

    task = 'gsm8k'
    folder: str = ''

    def sources(self) -> dict[str, Source]:
        return {split: Source(readers.gsm8k, file, 'task.gsm8k.folder', self.folder)
                for split, file in (('train', published.GSM8K_TRAIN), ('test', published.GSM8K_TEST))}


@dataclasses.dataclass(eq=False, kw_only=True)
class MathConfig(QuestionsConfig):
    """The training set of MATH (Hendrycks et al., 2021), of which a tenth is held out, tested on MATH-500 or AIME-24.

    Attributes:
      folder: with train.jsonl.
      test_set: 'math500' (Lightman et al., 2023) or 'aime24', the 30 problems of 2024.
      test_folder: with test.jsonl of MATH-500, or aime24.jsonl; '' downloads them.
    """

    task = 'math'
    folder: str = ''
    test_set: str = 'math500'
    test_folder: str = ''

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_set not in ('math500', 'aime24'):
            raise ValueError(f"task.math.test_set is {self.test_set!r}; it is 'math500' or 'aime24'.")

    def sources(self) -> dict[str, Source]:
        test = {'math500': (published.MATH500, readers.math), 'aime24': (published.AIME24, readers.aime)}
        file, read = test[self.test_set]
        return {'train': Source(readers.math, published.MATH_TRAIN, 'task.math.folder', self.folder),
                'test': Source(read, file, 'task.math.test_folder', self.test_folder)}


@dataclasses.dataclass(eq=False, kw_only=True)
class QualityConfig(QuestionsConfig):
    """QuALITY (Pang et al., 2022): four options to a question on a long article. The labels of its test set are not
    published: the development set is the test split.

    Attributes:
      folder: with the HTML-stripped files of version 1.0.1; '' downloads them.
    """

    task = 'quality'
    folder: str = ''

    def sources(self) -> dict[str, Source]:
        return {split: Source(readers.quality, file, 'task.quality.folder', self.folder)
                for split, file in (('train', published.QUALITY_TRAIN), ('test', published.QUALITY_DEV))}


@dataclasses.dataclass(eq=False, kw_only=True)
class JsonlConfig(QuestionsConfig):
    """Questions in JSON Lines files of the user's own, with any columns.

    Attributes:
      train: path of the file; not empty.
      validation: path of the file; '' holds out `validation_share` of `train`.
      test: path of the file; '' for no such split.
      question: name of the column with the question.
      answer: name of the column with the answer; '' if there is none.
    """

    task = 'jsonl'
    train: str = ''
    validation: str = ''
    test: str = ''
    question: str = 'question'
    answer: str = 'answer'

    @property
    def answered(self) -> bool:
        return bool(self.answer)

    def sources(self) -> dict[str, Source]:
        read = functools.partial(readers.own, question=self.question, answer=self.answer)
        return {split: Source(read, None, f'task.jsonl.{split}', path)
                for split in ('train', 'validation', 'test') if (path := getattr(self, split))}


class Questions(tfds.core.GeneratorBasedBuilder):
    """Questions with their answers. Beside the records lies a ledger of the splits (`split_ledger`).

    Features: `id` (unique over the splits), `question`, `answer` where there is one, and `columns`, the others as JSON.
    """

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS: list[tfds.core.BuilderConfig] = []

    def _info(self) -> tfds.core.DatasetInfo:
        return builders.info(self, 'Questions of which no two splits share one.', self.builder_config.answered,
                             columns=tfds.features.Text())

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # it tries ten times, in as many lines
        config = self.builder_config
        downloads = Path(self.data_dir_root) / 'downloads'
        option = f'task.{config.task}.any_version'
        checked = not config.any_version and any(source.file for source in config.sources().values())
        pools, files = {}, {}
        for split, source in config.sources().items():
            path = source.path or _download(source.file, source.key, downloads)
            try:
                pools[split] = source.read(path)
                if source.file and not config.any_version:
                    published.check_version(source.file, path, pools[split], option)
            except ValueError:
                if source.path is None:
                    path.unlink()  # it would be found again
                raise
            files[split] = published.file_digests(path)
        splits = divide(pools, config.validation_share)
        entries = {split: [split_ledger.Entry(id_, q.place, q.key) for id_, q in numbered]
                   for split, numbered in splits.items()}
        split_ledger.check(entries, option if checked else '')
        split_ledger.write(Path(self.data_dir) / split_ledger.FILE, entries, files)
        return {split: self._generate_examples(numbered) for split, numbered in splits.items()}

    def _generate_examples(self, numbered: Sequence[tuple[int, Question]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for id_, question in numbered:
            answer = {'answer': question.answer} if self.builder_config.answered else {}
            yield id_, {'id': id_, 'question': question.question, **answer, 'columns': json.dumps(question.columns)}


def divide(pools: Mapping[str, Sequence[Question]],
           validation_share: float) -> dict[str, list[tuple[int, Question]]]:
    """Returns the questions of each split with their ids, in the order of a hash of their keys.

    The hash depends on the text alone, so that the same questions are held out on every machine, whatever order a file
    has them in, and so that the first questions of a split are a fair draw of it.

    Args:
      pools: the questions of each file; without 'validation', that split is the first `validation_share` of 'train',
        up to a key that would be in both.
      validation_share: at least 0 and below 1.

    Raises:
      ValueError: nothing would be left to train on.
    """
    def place(question: Question) -> tuple[float, str]:
        return builders.hash_share(split_ledger.normalised(question.key)), question.question

    ordered = {split: sorted(pool, key=place) for split, pool in pools.items()}
    if 'validation' not in ordered:
        pool = ordered['train']
        count = round(len(pool) * validation_share)
        keys = [split_ledger.normalised(question.key) for question in pool]
        while 0 < count < len(pool) and keys[count] == keys[count - 1]:
            count += 1
        if count == len(pool):
            raise ValueError(
                f'the {len(pool)} questions of train are too few, or too many of them have one text, to hold out a '
                f'share of {validation_share:g} and train on the rest: {pool[-1].question.strip()[:80]!r}. Put what '
                'tells them apart into the column of the question, or name a file for the validation split, or set '
                'validation_share=0.')
        if count:
            ordered = {'validation': pool[:count], **ordered, 'train': pool[count:]}
    first, divided = 0, {}
    for split, chosen in ordered.items():
        divided[split] = list(enumerate(chosen, start=first))
        first += len(chosen)
    return divided


def _download(file: File, key: str, directory: Path) -> Path:
    mend = f'Name the folder that holds it in {key}.'
    if not file.url:
        raise ValueError(f'there is no address to download {file.name} from, and {key} is empty. {mend}')
    path = directory / f'{hashlib.sha256(file.url.encode()).hexdigest()[:12]}-{file.name}'
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as answer:
            path.with_suffix('.tmp').write_bytes(answer.read())
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f'{file.name} cannot be downloaded from {file.url}: {error}. {mend}') from error
    path.with_suffix('.tmp').replace(path)
    return path


def _content(folder: Path) -> str:
    if not folder.is_dir():
        return 'is no folder'
    names = sorted(path.name for path in folder.iterdir())
    return f'holds {", ".join(names[:8])}{", …" if len(names) > 8 else ""}' if names else 'is empty'
