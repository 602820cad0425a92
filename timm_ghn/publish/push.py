"""Push a timm model to the Hub: one commit with weights, configuration and card, or none."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported
from torch import nn

from timm_ghn.errors import ConfigError, GHNError, HubError
from timm_ghn.prediction import Prediction
from timm_ghn.publish.card import model_card
from timm_ghn.publish.facts import Facts, Training, entry_of, provenance_of
from timm_ghn.publish.files import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_loads,
    check_model,
    write_config,
    write_model,
)
from timm_ghn.version import __version__

#: Ends of the names of files that may hold pickles.
PICKLED = ('.bin', '.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle', '.joblib')

_MAIN = constants.DEFAULT_REVISION


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
    """Push a timm model to the Hub, where timm loads it without this package: ``hf-hub:user/name``.

    The repository is made if it does not exist. One commit brings ``model.safetensors``, ``config.json`` and
    ``README.md``, a card written from what is known of the weights; all three are replaced. Before anything is sent,
    timm builds the model from these files, and every tensor is compared. If nothing has changed, no commit is made.

    Args:
        model: A model of ``timm.create_model``, with its weights.
        repo_id: The repository, as 'user/name'.
        prediction: What :func:`timm_ghn.predict` gave for the model, or its ``provenance``. A model of
            ``timm.create_model('resnet50.ghn')`` needs none.
        results: Output folder of the fine-tuning run whose best weights the model has, or another file of weights in
            it; its data set and accuracy go into the card.
        model_args: More that ``timm.create_model`` needs to build the model, if timm did not record it.
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
        PredictionError: if a weight is not finite; nothing is sent.
        HubError: if the Hub cannot be reached, or refuses. No commit is made, or the whole one, if only the answer to
            it was lost; to push again does no harm.
    """
    _check(repo_id, revision, create_pr, token)
    architecture = check_model(model)
    training = results if isinstance(results, Training) or results is None else Training.read(results)
    provenance, raw = provenance_of(model, prediction, training)
    entry = entry_of(provenance)
    with tempfile.TemporaryDirectory(prefix='timm_ghn-push-') as name:
        folder = Path(name)
        images = training.run['data_config'] if training is not None else None
        config = write_model(model, folder, model_args=model_args, images=images)
        facts = Facts(
            repo_id=repo_id,
            revision=None if revision == _MAIN or create_pr else revision,
            architecture=architecture,
            # Sorted: a header of safetensors gives them in any order, and the same facts are to give the same card.
            model_args=dict(sorted((config.get('model_args') or {}).items())),
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
        try:
            model_card(facts).save(folder / CARD_FILE)
        except ValueError as error:
            raise ConfigError(f'huggingface_hub refuses the metadata of the card: {error}') from error
        message = commit_message or f'{architecture}' + (f', predicted by {facts.ghn}' if facts.ghn else '')
        return _send(
            folder,
            facts,
            HfApi(token=token, library_name='timm_ghn', library_version=__version__),
            private=private,
            revision=revision or _MAIN,
            create_pr=create_pr,
            message=message,
        )


def _check(repo_id: str, revision: str | None, create_pr: bool, token: str | bool | None) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f'expected repo_id to be a name on the Hub: {error}') from error
    if '/' not in repo_id:
        raise ConfigError(f"expected repo_id with its owner, 'user/name' (got {repo_id!r})")
    if create_pr and revision not in (None, _MAIN):
        raise ConfigError(f'expected a pull request to be for the main branch (got revision {revision!r})')
    if revision == '':
        raise ConfigError("expected revision to be the name of a branch (got '')")
    # The HTTP client would print it in its error.
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and token and ' ' not in token):
        raise ConfigError('expected token to be one word without line ends (it is not shown here)')


def _send(
    folder: Path, facts: Facts, api: HfApi, *, private: bool | None, revision: str, create_pr: bool, message: str
) -> CommitInfo:
    repo_id = facts.repo_id
    with _told(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and info.private is False:
            raise ConfigError(
                f'{repo_id} exists and is public, and a private repository was asked for: change that in its settings '
                f'({constants.ENDPOINT}/{repo_id}/settings), or push to another one'
            )
        if revision != _MAIN:
            info = _branch(api, repo_id, revision)
        _refuse_pickles(info, repo_id)
        files = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)
        commit: CommitInfo = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(folder / file)) for file in files],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    return commit


def _branch(api: HfApi, repo_id: str, revision: str) -> ModelInfo:
    """What is in a branch, which is made if it does not exist."""
    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.model_info(repo_id, revision=revision)


def _refuse_pickles(info: ModelInfo, repo_id: str) -> None:
    names = [sibling.rfilename for sibling in info.siblings or ()]
    pickled = [name for name in names if name.lower().endswith(PICKLED)]
    if pickled:
        raise ConfigError(
            f'{repo_id} holds files that may be pickled, which whoever loads the model might execute '
            f'({", ".join(pickled[:3])}): delete them (`hf repos delete-files {repo_id} {pickled[0]}`), or push to '
            'another repository'
        )


@contextlib.contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """Turn what the client raises, which is another thing from version to version, into errors with a way out."""
    try:
        yield
    except GHNError:
        raise
    except Exception as error:
        reason, hint = _explained(error)
        raise HubError(f'{repo_id} was not pushed to {constants.ENDPOINT}: {reason.rstrip(".")}. {hint}') from error


_HINTS = {
    401: 'Log in with `hf auth login`, set HF_TOKEN, or give token=...: it needs write access',
    403: 'The token needs write access to this owner (see https://huggingface.co/settings/tokens); or push to a name '
    'of your own, or open a pull request with create_pr=True',
    404: 'Check the name and that the token may see the repository',
    429: 'The Hub has had too many requests: wait a while, then push again',
}


def _explained(error: Exception) -> tuple[str, str]:
    """Reason and way out. Addresses stay out of it: those of uploads are signed."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for one in chain:
        if isinstance(one, OfflineModeIsEnabled):
            return 'HF_HUB_OFFLINE is set', 'Unset it and push again'
        if isinstance(one, HfHubHTTPError) and one.response is not None:
            status = one.response.status_code
            said = ' '.join((one.server_message or one.response.reason_phrase or '').split())
            return f'{status} {said}'.strip(), _HINTS.get(status, 'Push again: what is there is not sent twice')
    if isinstance(error, ValueError):
        return ' '.join(str(error).split()), 'No commit was made'
    last = chain[0]
    text = ' '.join(str(chain[-1]).split()) or type(chain[-1]).__name__
    if 'xet' in text:
        return text, 'If this Hub does not speak Xet, set HF_HUB_DISABLE_XET=1 and push again'
    return (
        f'{type(last).__name__}: {text}',
        'Check the network (HF_ENDPOINT is honoured) and push again: what is there is neither sent nor committed twice',
    )
