"""Push a timm model or a GHN to the Hub: one commit with weights, configuration and card, or none."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported
from torch import nn

from timm_ghn.errors import CheckpointError, ConfigError, GHNError, HubError, printable
from timm_ghn.hub.fetch import check_token, client_text
from timm_ghn.hub.load import load_ghn
from timm_ghn.hub.storage import CONFIG_FILE, WEIGHTS_FILE, save_ghn
from timm_ghn.nn.config import Origin
from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.predict import Prediction
from timm_ghn.publish.card import ghn_card, model_card
from timm_ghn.publish.facts import ModelFacts, entry_of, expect_complete, origin_of, provenance_of
from timm_ghn.publish.files import check_model, read_source, write_model
from timm_ghn.publish.training import MetaTraining, Training
from timm_ghn.runs.results import RESULTS
from timm_ghn.version import __version__

#: Ends of the names of files that may hold pickles.
PICKLED = ('.bin', '.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle', '.joblib')

_MAIN = constants.DEFAULT_REVISION


@dataclasses.dataclass(frozen=True)
class Target:
    """A destination on the Hub, see :func:`push_to_hub`; a ConfigError if there can be none such."""

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ConfigError(f'expected repo_id to be a name on the Hub: {error}') from error
        if '/' not in self.repo_id:
            raise ConfigError(f"expected repo_id with its owner, 'user/name' (got {self.repo_id!r})")
        if self.create_pr and self.revision not in (None, _MAIN):
            raise ConfigError(f'expected a pull request to be for the main branch (got revision {self.revision!r})')

    @property
    def pinned(self) -> str | None:
        """Revision to name when loading from there; None for the main branch."""
        return self.revision if self.revision != _MAIN else None


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    prediction: Prediction | Mapping[str, Any] | None = None,
    results: str | os.PathLike[str] | None = None,
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
    timm builds the model again from these files, and every tensor is compared. If nothing has changed, no commit is
    made.

    Args:
        model: A model of ``timm.create_model``, with its weights, or a GHN.
        repo_id: The repository, as 'user/name'.
        prediction: What :func:`timm_ghn.predict` gave for the model, or its ``provenance``. A model of
            ``timm.create_model('resnet50.ghn')`` needs none, and a GHN has none.
        results: Output folder of the fine-tuning run whose best weights the model has, or another file of weights in
            it; its data set and accuracy go into the card. For a GHN, that of the run of ``timm-ghn train``.
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
    target = Target(repo_id, private, revision, create_pr)
    api = _client(token)
    with tempfile.TemporaryDirectory(prefix='timm_ghn-push-') as name:
        folder = Path(name)
        if isinstance(model, GHN):
            if prediction is not None or model_args is not None:
                raise ConfigError('prediction and model_args are about timm models, not GHNs')
            if model.device.type == 'meta':
                raise CheckpointError('the GHN is on the meta device and has no weights that could be pushed')
            training = None if results is None else MetaTraining.read(results, model.config)
            save_ghn(model, folder)
            title = f'{printable(model.config.name or "GHN")}, a graph hypernetwork'
            license = license or _license_of(model.origin)
            card = ghn_card(model, repo_id, target.pinned, training=training, license=license)
        else:
            facts = _write_model(
                model, folder, target, prediction=prediction, results=results, model_args=model_args, license=license
            )
            title, card = facts.architecture, model_card(facts)
        card.save(folder / 'README.md')
        with _hub_errors(target, api):
            _prepare(target, api)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or title,
                revision=target.revision,
                create_pr=create_pr,
            )


def _write_model(
    model: nn.Module,
    folder: Path,
    target: Target,
    *,
    prediction: Prediction | Mapping[str, Any] | None,
    results: str | os.PathLike[str] | None,
    model_args: Mapping[str, Any] | None,
    license: str | None,
) -> ModelFacts:
    """Write weights and configuration of a timm model, and gather what is known."""
    architecture = check_model(model)
    training = None if results is None else Training.read(results)
    with expect_complete():
        provenance, unchanged = provenance_of(model, prediction, training)
        license = license or _license_of(origin_of(provenance))
        config = write_model(model, folder, model_args=model_args, provenance=provenance, training=training)
    arguments = dict(config.get('model_args') or {})
    known: Any = model.pretrained_cfg
    if config['num_classes'] != known.get('num_classes'):
        arguments['num_classes'] = int(config['num_classes'])
    return ModelFacts(
        repo_id=target.repo_id,
        revision=target.pinned,
        license=license,
        architecture=architecture,
        # Sorted, so that the same facts give the same card: a header of safetensors has no order.
        model_args=dict(sorted(arguments.items())),
        input_size=tuple(config['pretrained_cfg']['input_size']),
        num_classes=int(config['num_classes']),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        provenance=provenance,
        unchanged=unchanged,
        training=training,
    )


def _license_of(origin: Origin | None) -> str | None:
    entry = entry_of(origin)
    return None if entry is None else entry.license


def push_path(
    path: Path, target: Target, *, license: str | None = None, commit_message: str | None = None
) -> CommitInfo:
    """Push what a command wrote, a model or the folder of a GHN, as :func:`push_to_hub` does."""
    known: dict[str, Any] = {}
    if (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file():
        model: nn.Module = load_ghn(path)
        if (path.parent / RESULTS).is_file():  # of the run of `timm-ghn train` that wrote it
            known = {'results': path.parent}
    else:
        source = read_source(path)
        model = source.model
        known = {'prediction': source.provenance, 'results': source.results, 'model_args': source.model_args}
    return push_to_hub(model, license=license, commit_message=commit_message, **vars(target), **known)


def check_pushable(model: nn.Module, model_args: Mapping[str, Any] | None) -> None:
    """Refuse a model that timm could not build again from what :func:`push_to_hub` would send; nothing is sent."""
    check_model(model)
    with tempfile.TemporaryDirectory(prefix='timm_ghn-push-') as name:
        write_model(model, Path(name), model_args=model_args)


def check_access(target: Target) -> None:
    """Make the repository, and refuse now what :func:`push_to_hub` would be refused later.

    Raises:
        ConfigError: if the repository is public where a private one was asked for, or holds pickles.
        HubError: if the Hub cannot be reached, or if the token may not write.
    """
    api = _client(None)
    with _hub_errors(target, api):
        user = api.whoami()
        if user['auth'].get('accessToken', {}).get('role') == 'read':
            raise HubError(f'{target.repo_id} cannot be pushed to: the token of {user["name"]} may only read')
        _prepare(target, api)


def _client(token: str | bool | None) -> HfApi:
    check_token(token)
    return HfApi(token=token, library_name='timm_ghn', library_version=__version__)


def _prepare(target: Target, api: HfApi) -> None:
    """Make repository and branch if they do not exist, and refuse a public one for a private one, and pickles."""
    repo_id, branch = target.repo_id, target.revision or _MAIN
    api.create_repo(repo_id, private=target.private, exist_ok=True)
    info = api.model_info(repo_id)
    if target.private and info.private is False:
        raise ConfigError(
            f'{repo_id} exists and is public, and a private repository was asked for: change that in its settings '
            f'({constants.ENDPOINT}/{repo_id}/settings), or push to another one'
        )
    if branch != _MAIN:
        try:
            info = api.model_info(repo_id, revision=branch)
        except RevisionNotFoundError:  # a new branch has the files of the main one
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    pickled = [file.rfilename for file in info.siblings or () if file.rfilename.lower().endswith(PICKLED)]
    if pickled:
        raise ConfigError(
            f'{repo_id} holds files that may be pickled, which whoever loads the model might execute '
            f'({", ".join(pickled[:3])}): delete them (`hf repos delete-files {repo_id} {pickled[0]}`), or push to '
            'another repository'
        )


@contextlib.contextmanager
def _hub_errors(target: Target, api: HfApi) -> Iterator[None]:
    """Turn the client's exceptions, which differ from version to version, into a HubError with its text."""
    try:
        yield
    except GHNError:
        raise
    except Exception as error:
        shown = client_text(error, api.token)
        raise HubError(
            f'{target.repo_id} was not pushed to {constants.ENDPOINT}: {shown}. Check the name, the '
            'network and the token (`hf auth login` or HF_TOKEN, with write access), and push again: what is there is '
            'neither sent nor committed twice'
        ) from (error if '(token)' not in shown else None)  # whose traceback would show it
