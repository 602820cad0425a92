"""Push a timm model to the Hub: one commit with weights, configuration and card, or none."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import nn

from timm_ghn.errors import ConfigError
from timm_ghn.hub.load import load_ghn
from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.predict import Prediction
from timm_ghn.publish.card import model_card, save_card
from timm_ghn.publish.facts import Facts, Training, entry_of, provenance_of
from timm_ghn.publish.files import check_loads, check_model, read_source, write_config, write_model
from timm_ghn.publish.ghn import is_ghn, push_ghn
from timm_ghn.publish.send import CARD_FILE, CONFIG_FILE, Target, api_of, send


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    prediction: Prediction | Mapping[str, Any] | None = None,
    results: Training | str | os.PathLike[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Push a timm model or a GHN to the Hub.

    timm loads the model without this package, as ``hf-hub:user/name``; ``timm_ghn.load_ghn('user/name')`` loads the
    GHN.

    The repository is made if it does not exist. One commit brings ``model.safetensors``, ``config.json`` and
    ``README.md``, a card written from what is known of the weights; all three are replaced. Before anything is sent,
    the model is built again from these files, and every tensor is compared. If nothing has changed, no commit is made.

    Args:
        model: A model of ``timm.create_model``, with its weights, or a GHN.
        repo_id: The repository, as 'user/name'.
        prediction: What :func:`timm_ghn.predict` gave for the model, or its ``provenance``. A model of
            ``timm.create_model('resnet50.ghn')`` needs none, and a GHN has none.
        results: Output folder of the fine-tuning run whose best weights the model has, or another file of weights in
            it; its data set and accuracy go into the card. For a GHN, that of the run of ``timm-ghn train``; by
            default the one beside the file that it was loaded from, if its weights did not change since.
        model_args: More that ``timm.create_model`` needs to build the model, if timm did not record it. For timm
            models only.
        license: Identifier of the licence, e.g. 'mit'; by default that of the GHN, if it is in the catalogue.
        private: Whether a new repository is to be private; if None, as the Hub does for this user.
        revision: Branch to commit to, made if it does not exist; 'main' if None.
        create_pr: Whether to open a pull request instead.
        commit_message: First line of the commit's message.
        token: Of a user who may write there; huggingface_hub's own if None.

    Returns:
        The commit, or the last one if nothing has changed; with ``create_pr`` its ``pr_url`` is the request's.

    Raises:
        ConfigError: if an argument is wrong, or if the repository holds pickled files, or is public where a private
            one was asked for; nothing is sent.
        UnsupportedModelError: if timm cannot build the model again from its configuration; nothing is sent.
        PredictionError: if a weight of a model is not finite; nothing is sent.
        CheckpointError: if a weight of a GHN is not finite, or on the meta device; nothing is sent.
        HubError: if the Hub cannot be reached, or refuses. No commit is made, or the whole one, if only the answer to
            it was lost; to push again does no harm.
    """
    if isinstance(model, GHN):
        if prediction is not None or model_args is not None or isinstance(results, Training):
            raise ConfigError('prediction, model_args and the results of fine-tuning are about timm models, not GHNs')
        return push_ghn(
            model,
            repo_id,
            results=results,
            license=license,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
        )
    target, api = Target(repo_id, private, revision, create_pr), api_of(token)
    architecture = check_model(model)
    training = results if isinstance(results, Training) or results is None else Training.read(results)
    provenance, raw = provenance_of(model, prediction, training)
    entry = entry_of(provenance)
    with tempfile.TemporaryDirectory(prefix='timm_ghn-push-') as name:
        folder = Path(name)
        images = training.data_config if training is not None else None
        config = write_model(model, folder, model_args=model_args, images=images)
        facts = Facts(
            repo_id=repo_id,
            revision=target.pinned,
            architecture=architecture,
            model_args=_arguments(model, config),
            input_size=tuple(config['pretrained_cfg']['input_size']),
            num_classes=int(config['num_classes']),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            provenance=provenance,
            raw=raw,
            training=training,
            license=license or (entry.license if entry is not None else None),
        )
        write_config(config, folder, facts)
        check_loads(model.state_dict(), folder)
        save_card(lambda: model_card(facts), folder / CARD_FILE)
        message = commit_message or f'{architecture}' + (f', predicted by {facts.ghn}' if facts.ghn else '')
        return send(folder, target, api, message=message)


def _arguments(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``timm.create_model`` needs to build a model with this configuration."""
    arguments = dict(config.get('model_args') or {})
    known: Any = model.pretrained_cfg
    if config['num_classes'] != known.get('num_classes'):
        # timm before 1.0.31 records no arguments; of these at least it says.
        arguments.setdefault('num_classes', int(config['num_classes']))
    # Sorted: a header of safetensors gives them in any order, and the same facts are to give the same card.
    return dict(sorted(arguments.items()))


def push_path(
    path: Path, target: Target, *, license: str | None = None, commit_message: str | None = None
) -> CommitInfo:
    """Push what a command wrote: a model or a GHN, as :func:`push_to_hub` does.

    Args:
        path: A file of ``timm-ghn predict``; the output folder of ``timm-ghn finetune``, which stands for the best
            weights, or a file of weights in it; or the folder of a GHN.
        target: Where it goes. The token is huggingface_hub's own.
        license: Identifier of the licence.
        commit_message: First line of the commit's message.

    Raises:
        GHNError: if there is nothing of the kind, or as :func:`push_to_hub`.
    """
    where: dict[str, Any] = {'private': target.private, 'revision': target.revision, 'create_pr': target.create_pr}
    if is_ghn(path):
        return push_ghn(load_ghn(path), target.repo_id, license=license, commit_message=commit_message, **where)
    source = read_source(path)
    return push_to_hub(
        source.model,
        target.repo_id,
        prediction=source.provenance,
        results=source.training,
        model_args=source.model_args,
        license=license,
        commit_message=commit_message,
        **where,
    )


def check_pushable(model: nn.Module, model_args: Mapping[str, Any] | None) -> None:
    """Refuse a model that timm could not build again from what :func:`push_to_hub` would send; nothing is sent.

    Raises:
        UnsupportedModelError: if it cannot.
        ConfigError: if an argument cannot be written.
        PredictionError: if a weight is not finite.
    """
    check_model(model)
    with tempfile.TemporaryDirectory(prefix='timm_ghn-push-') as name:
        config = write_model(model, Path(name), model_args=model_args, images=None)
        (Path(name) / CONFIG_FILE).write_text(json.dumps(config), encoding='utf-8')
        check_loads(model.state_dict(), Path(name))
