"""Reward functions by name or by file, and weighted sums of them."""
from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
from pathlib import Path
import sys
from typing import Any, TypeVar

Function = TypeVar('Function', bound=Callable[..., Any])

_REGISTRY: dict[str, Registered] = {}
# Modules that register when their rewards are asked for: what they need is in an extra.
_LATE = {'math': 'qsharp_jax.rewards.mathematics'}
_EXTRA = 'math'
# The arguments of a function in the style of verl, which grades one answer at a time.
VERL_ARGUMENTS = ('data_source', 'solution_str', 'ground_truth', 'extra_info')


class RewardError(ValueError):
    """A reward function that cannot be found, or does not do what a reward function does."""


@dataclasses.dataclass(frozen=True)
class Registered:
    """A function that a config can name.

    Attributes:
      function: the function itself.
      as_completion: what a completion is like that says no more than a right answer.
      final_answer: the answer that a completion comes to, by which votes are counted; None, or '', for none.
      equivalent: whether two different such answers are one, in a form of their own; None: they are not. It may take
        for ever if `in_workers`.
      settled: the same where it can be told at once, and None where it cannot.
      in_workers: whether it may hang, and so is called only in processes that can be killed.
      canaries: (answer, completion, what it earns), graded before a run, whatever its questions are: at least one if
        `in_workers`, none otherwise.
      depends: what its rewards depend on beside the file that defines it.
    """

    function: Callable[..., Any]
    as_completion: Callable[[str], str] = str
    final_answer: Callable[[str], str | None] = str.strip
    equivalent: Callable[[str, str], bool] | None = None
    settled: Callable[[str, str], bool | None] = lambda answer, given: None
    in_workers: bool = False
    canaries: tuple[tuple[str, str, float], ...] = ()
    depends: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Term:
    """One function of a weighted sum.

    Attributes:
      name: as in the config.
      weight: its factor.
      registered: the function itself, and what is known of it.
      style: 'batch' (prompts, completions, **columns) or 'verl' (one answer at a time).
      accepted: names of its arguments; None if it takes any.
      required: those without a default.
      file: that defines it.
      source: bytes of that file.
    """

    name: str
    weight: float
    registered: Registered
    style: str
    accepted: tuple[str, ...] | None
    required: tuple[str, ...]
    file: Path
    source: bytes = dataclasses.field(repr=False)

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        return self.registered.function


@dataclasses.dataclass(frozen=True)
class Reward:
    """A weighted sum of functions.

    Attributes:
      spec: as in the config, such as '0.9*arithmetic,0.1*my_rewards.py:brevity'.
      terms: the functions.
      digest: hash of names, weights and the files that define the functions. Labels are kept under it: they are
        made again when a reward's code changes.
    """

    spec: str
    terms: tuple[Term, ...]
    digest: str

    def as_completion(self, answer: str) -> str:
        """Returns a completion that says no more than an answer, in the form that the reward looks for."""
        forms = [term.registered.as_completion for term in self.terms if term.registered.as_completion is not str]
        return forms[0](answer) if forms else answer

    @property
    def voting(self) -> int:
        """The number of the term that says which answers are one: the first that says anything of it, or else 0."""
        return next((number for number, term in enumerate(self.terms)
                     if term.registered.final_answer is not str.strip), 0)


def register(name: str, **known: Any) -> Callable[[Function], Function]:
    """Returns a decorator that lets a config name a function.

    Args:
      name: for the config.
      **known: attributes of `Registered`.

    Raises:
      ValueError: if the name is taken, or would be read as a file or a sum.
    """
    if name in _REGISTRY:
        raise ValueError(f'the reward {name!r} is registered already.')
    if not name or any(mark in name for mark in ':*,'):
        raise ValueError(f'{name!r} cannot name a reward: it must not be empty or hold ":", "*" or ",".')

    def add(function: Function) -> Function:
        _REGISTRY[name] = Registered(function, **known)
        return function

    return add


def names() -> list[str]:
    """Returns the registered names, in alphabetical order."""
    return sorted({*_REGISTRY, *_LATE})


def parse(spec: str) -> tuple[tuple[str, float], ...]:
    """Returns the functions that a config's `reward` names, each with its weight.

    '0.9*arithmetic,0.1*my_rewards.py:brevity' is (('arithmetic', 0.9), ('my_rewards.py:brevity', 0.1)).
    """
    terms = []
    for term in spec.split(','):
        weight, star, name = (part.strip() for part in term.rpartition('*'))
        try:
            factor = float(weight) if star else 1.0
        except ValueError:
            factor = math.nan
        if not name or not math.isfinite(factor):
            raise RewardError(f'reward has the term {term.strip()!r}: write a name, or number*name.')
        terms.append((name, factor))
    return tuple(terms)


def load(spec: str) -> Reward:
    """Returns the reward that a config names.

    Args:
      spec: a registered name, 'path/to/file.py:function', or a weighted sum of such with commas between.

    Raises:
      RewardError: if a name, file or function does not exist, or is no reward function.
    """
    terms = tuple(_term(name, weight) for name, weight in parse(spec))
    digest = hashlib.sha256()
    for term in terms:
        # The place of the file does not matter, what is in it does.
        digest.update(f'{term.weight!r} {_qualified(term.function)} {len(term.source)}\n'.encode() + term.source)
        digest.update(''.join(f'{len(text)} {text}' for text in term.registered.depends).encode())
    return Reward(spec, terms, digest.hexdigest()[:16])


def _term(name: str, weight: float) -> Term:
    file, colon, attribute = name.rpartition(':')
    if name in _LATE and name not in _REGISTRY:
        try:
            importlib.import_module(_LATE[name])
        except ModuleNotFoundError as error:
            raise RewardError(f'reward {name!r} needs the package {error.name}, which is not installed: run '
                              f'pip install -e ".[{_EXTRA}]" in the folder of this project.') from error
    if colon:
        function, path, source = _from_file(name, file, attribute)
        said = {field: getattr(function, field) for field in ('as_completion', 'final_answer', 'equivalent')
                if hasattr(function, field)}
        registered = Registered(function, **said)
    elif name in _REGISTRY:
        registered = _REGISTRY[name]
        path = Path(inspect.getfile(registered.function))
        source = path.read_bytes()
    elif name.endswith('.py'):
        raise RewardError(f'reward names the file {name!r} without a function: write {name}:function.')
    else:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f'did you mean {" or ".join(near)}? ' if near else ''
        raise RewardError(f'there is no reward {name!r}: {hint}The names are {", ".join(names())}; a function of your '
                          'own is path/to/file.py:function.')
    return _inspected(name, weight, registered, path, source)


def _inspected(name: str, weight: float, registered: Registered, file: Path, source: bytes) -> Term:
    parameters = inspect.signature(registered.function).parameters.values()
    any_ = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [parameter for parameter in parameters
             if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    accepted = tuple(parameter.name for parameter in named)
    style = 'verl' if 'solution_str' in accepted else 'batch'
    if style == 'batch' and 'completions' not in accepted and not any_:
        raise RewardError(
            f'reward {name!r} takes ({", ".join(accepted)}), which is no reward function: it is called as '
            f'function(prompts=..., completions=..., column=...) or as function({", ".join(VERL_ARGUMENTS)}).')
    required = tuple(parameter.name for parameter in named if parameter.default is parameter.empty)
    return Term(name, weight, registered, style, None if any_ else accepted, required, file, source)


def _qualified(function: Callable[..., Any]) -> str:
    """Returns the name of a function within its file; that of its class for an object that is called."""
    return str(getattr(function, '__qualname__', type(function).__qualname__))


def _from_file(name: str, file: str, attribute: str) -> tuple[Callable[..., Any], Path, bytes]:
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise RewardError(f'reward {name!r} names the file {file!r}, which does not exist (looked for {path}).')
    source = path.read_bytes()
    # Named after its content: a changed file is another module, and one of an equal name does not get in the way.
    module_name = f'_qsharp_jax_reward_{path.stem}_{hashlib.sha256(bytes(path) + source).hexdigest()[:12]}'
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise RewardError(f'reward {name!r} names {file!r}, which is no Python file: its name must end in .py.')
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses and pickle look their module up
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # as of a script; last, so that it hides nothing
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise RewardError(f'the file {path} of reward {name!r} does not run: '
                              f'{type(error).__name__}: {error}') from error
    function = getattr(module, attribute, None)
    if callable(function):
        return function, path, source
    own = [key for key, value in vars(module).items()
           if inspect.isfunction(value) and value.__module__ == module_name and not key.startswith('_')]
    what = 'has no such function' if function is None else f'has {attribute!r}, but not as a function'
    raise RewardError(f'reward {name!r}: {path} {what}. {_listed(own)}')


def _listed(functions: Sequence[str]) -> str:
    return f'Its functions are {", ".join(functions)}.' if functions else 'It defines no function.'
