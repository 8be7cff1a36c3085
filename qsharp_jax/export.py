"""A run's networks as Hugging Face folders: reference, trained policies, and the value network with its head."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from qsharp_jax import baseline_runs, checkpoint
from qsharp_jax import config as config_lib
from qsharp_jax import experiment, sharding, train
from qsharp_jax.baselines import pretraining
from qsharp_jax.data.tokenizers import BPETokenizer
from qsharp_jax.experiment import Experiment
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.pretrained import export
from qsharp_jax.types import Params


def run(workdir: Path, out: Path, iteration: int = 0) -> list[Path]:
    """Writes `out`/reference and, if they are finished, `out`/value and `out`/policy_<method>, and returns the folders.

    Each is whole for itself: config.json, weights, and the tokenizer of a published model. A run whose reference was
    pre-trained here has a closed vocabulary, which is written to vocabulary.json. Of several processes all call it, and
    the first writes.

    Args:
      workdir: of the run.
      out: directory to write to; new or empty.
      iteration: whose value network; 0 for the last finished one.

    Raises:
      ValueError: there is no run or no such network, `out` holds something, or no class of `transformers` computes what
        a network does.
    """
    workdir, out = Path(workdir), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'--out {out} holds something already: name a new directory.')
    sharding.wait_for_all('export.begin')  # before one of several processes writes what another would find there
    parts, values = _open(workdir, iteration)
    # Before anything is written, in case one of them cannot be.
    export.family_of(parts.reference_config)
    trunk = value_lib.trunk_config(parts.value_config, parts.value_shape)
    if values is not None:
        export.family_of(trunk)
    keys = {'bos_token_id': parts.tokenizer.bos_id, 'eos_token_id': sorted(parts.tokenizer.eos_ids)}
    trained = baseline_runs.chosen_policies(parts)
    made = [out / 'reference']
    export.write_model(made[0], parts.reference_config, parts.reference_params, keys=keys)
    if values is not None:
        made.append(out / 'value')
        export.write_value(made[1], trunk, values, _about_value(parts), keys)
    for method, params in trained.items():
        made.append(out / f'policy_{method}')
        export.write_model(made[-1], parts.reference_config, params, keys=keys)
    for folder in made:
        _write_tokenizer(folder, parts.tokenizer, keys)
    sharding.wait_for_all('export.end')
    return made


def _open(workdir: Path, iteration: int) -> tuple[Experiment, Params]:
    """Returns a run's parts and its value network, None if it has finished no fit and none is asked for."""
    path = workdir / 'config.json'
    if not iteration and path.exists() and not list(workdir.glob(f'checkpoints/value_*/{checkpoint.VALUE_FILE}')):
        config = config_lib.from_json(path.read_text())
        if config.reference.source == 'pretrain' and not pretraining.is_finished(workdir):
            raise ValueError(f'the run in {workdir} has not finished pre-training its reference: let it go on with '
                             'experiments/train.py first.')
        return experiment.load(experiment.outline(config, workdir)), None
    parts, _, values = train.open_run(workdir, iteration)
    return parts, values


def _about_value(parts: Experiment) -> dict[str, Any]:
    """Returns how the head's scores are read, how the run guides and ends answers, what the network is valid for."""
    distribution = parts.distribution
    return {'type': parts.value_config.kind, 'head': distribution.kind, 'atoms': list(distribution.atoms),
            'num_scores': distribution.num_scores, 'guidance': parts.config.guidance.to_dict(),
            'eos_ids': list(parts.eos_ids), 'valid_for': parts.value_meta()}


def _write_tokenizer(folder: Path, tokenizer: Any, keys: dict[str, Any]) -> None:
    export.write_json(folder / 'generation_config.json', keys)
    if not isinstance(tokenizer, BPETokenizer):
        export.write_json(folder / 'vocabulary.json', {'tokens': list(tokenizer.tokens)})
        return
    export.write_json(folder / 'tokenizer.json', tokenizer.content)
    said: dict[str, Any] = {name: text for name, text in tokenizer.names.items() if text}
    if tokenizer.chat_template is not None:
        said['chat_template'] = tokenizer.chat_template
    export.write_json(folder / 'tokenizer_config.json', {
        **said, 'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False})
