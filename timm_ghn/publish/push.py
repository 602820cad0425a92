"""Push a timm model or a GHN to the Hub: one commit with weights, configuration and card, or none."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported
from torch import nn

from timm_ghn.errors import ConfigError, GHNError, HubError, printable
from timm_ghn.files import write_json
from timm_ghn.hub.fetch import check_token
from timm_ghn.hub.load import load_ghn
from timm_ghn.hub.storage import CONFIG_FILE, WEIGHTS_FILE
from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.predict import Prediction
from timm_ghn.publish.card import make_card
from timm_ghn.publish.facts import Facts, ModelFacts, entry_of, ghn_facts, origin_of, provenance_of
from timm_ghn.publish.files import check_loads, check_model, is_ghn, read_source, write_config, write_ghn, write_model
from timm_ghn.publish.training import MetaTraining, Training
from timm_ghn.version import __version__

CARD_FILE = 'README.md'

#: Ends of the names of files that may hold pickles.
PICKLED = ('.bin', '.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle', '.joblib')

_MAIN = constants.DEFAULT_REVISION


@dataclasses.dataclass(frozen=True)
class Target:
    """A destination on the Hub.

    Attributes:
        repo_id: The repository, as 'user/name'.
        private: Whether a new repository is to be private; if None, as the Hub does for this user.
        revision: Branch to commit to, made if it does not exist; 'main' if None.
        create_pr: Whether to open a pull request instead.

    Raises:
        ConfigError: if there can be no such destination.
    """

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
        if self.create_pr and self.branch != _MAIN:
            raise ConfigError(f'expected a pull request to be for the main branch (got revision {self.revision!r})')
        if self.revision == '':
            raise ConfigError("expected revision to be the name of a branch (got '')")

    @property
    def branch(self) -> str:
        """Branch of the commit, or target of the pull request."""
        return self.revision or _MAIN

    @property
    def pinned(self) -> str | None:
        """Revision to name when loading from there; None for the main branch."""
        return None if self.create_pr or self.branch == _MAIN else self.branch


def api_of(token: str | bool | None) -> HfApi:
    """The client with a token, or with huggingface_hub's own (``hf auth login``, HF_TOKEN) if None.

    Raises:
        ConfigError: if it can be no token.
    """
    check_token(token)
    return HfApi(token=token, library_name='timm_ghn', library_version=__version__)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    prediction: Prediction | Mapping[str, Any] | None = None,
    results: Training | MetaTraining | str | os.PathLike[str] | None = None,
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
    target, api = Target(repo_id, private, revision, create_pr), api_of(token)
    with tempfile.TemporaryDirectory(prefix='timm_ghn-push-') as name:
        folder = Path(name)
        facts: Facts
        if isinstance(model, GHN):
            if prediction is not None or model_args is not None or isinstance(results, Training):
                raise ConfigError(
                    'prediction, model_args and the results of fine-tuning are about timm models, not GHNs'
                )
            training = results if isinstance(results, MetaTraining | None) else MetaTraining.read(results)
            write_ghn(model, folder)
            facts = ghn_facts(model, repo_id, target.pinned, training=training, license=license)
            title = f'{printable(model.config.name or "GHN")}, a graph hypernetwork'
            # An unchanged GHN goes back to where it came from: the card there has more facts than the GHN.
            returns = model.origin is not None and model.origin.repo_id == repo_id and facts.unchanged
            keep_card = returns and training is None and license is None and _has_card(target, api)
        else:
            if isinstance(results, MetaTraining):
                raise ConfigError('the results of training a GHN are about GHNs')
            facts = _write_model_files(
                model, folder, target, prediction=prediction, results=results, model_args=model_args, license=license
            )
            title = facts.architecture + (f', predicted by {facts.ghn}' if facts.ghn else '')
            keep_card = False
        files = [WEIGHTS_FILE, CONFIG_FILE]
        if not keep_card:
            make_card(facts).save(folder / CARD_FILE)
            files.append(CARD_FILE)
        return _send(folder, files, target, api, message=commit_message or title)


def _write_model_files(
    model: nn.Module,
    folder: Path,
    target: Target,
    *,
    prediction: Prediction | Mapping[str, Any] | None,
    results: Training | str | os.PathLike[str] | None,
    model_args: Mapping[str, Any] | None,
    license: str | None,
) -> ModelFacts:
    """Write weights and configuration of a timm model, have timm build it from them, and gather what is known."""
    architecture = check_model(model)
    training = results if isinstance(results, Training | None) else Training.read(results)
    provenance, raw = provenance_of(model, prediction, training)
    entry = entry_of(origin_of(provenance))
    images = None
    if training is not None:
        images = training.run.get('data_config')
        if not isinstance(images, Mapping):
            raise ConfigError('the results of the run are incomplete (they have no data_config)')
    config = write_model(model, folder, model_args=model_args, images=images)
    arguments = dict(config.get('model_args') or {})
    known: Any = model.pretrained_cfg
    if config['num_classes'] != known.get('num_classes'):
        # timm before 1.0.31 records no arguments.
        arguments.setdefault('num_classes', int(config['num_classes']))
    facts = ModelFacts(
        repo_id=target.repo_id,
        revision=target.pinned,
        architecture=architecture,
        # Sorted, so that the same facts give the same card: a header of safetensors has no order.
        model_args=dict(sorted(arguments.items())),
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
    return facts


def push_path(
    path: Path, target: Target, *, license: str | None = None, commit_message: str | None = None
) -> CommitInfo:
    """Push what a command wrote, a model or the folder of a GHN, as :func:`push_to_hub` does.

    Raises:
        GHNError: if there is nothing of the kind, or as :func:`push_to_hub`.
    """
    if is_ghn(path):
        model: nn.Module = load_ghn(path)
        known: dict[str, Any] = {}
    else:
        source = read_source(path)
        model = source.model
        known = {'prediction': source.provenance, 'results': source.training, 'model_args': source.model_args}
    return push_to_hub(
        model,
        target.repo_id,
        private=target.private,
        revision=target.revision,
        create_pr=target.create_pr,
        license=license,
        commit_message=commit_message,
        **known,
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
        write_json(config, Path(name) / CONFIG_FILE)
        check_loads(model.state_dict(), Path(name))


def _send(folder: Path, files: Sequence[str], target: Target, api: HfApi, *, message: str) -> CommitInfo:
    """Commit files to a repository and branch, which are made if they do not exist."""
    repo_id = target.repo_id
    with _hub_errors(f'{repo_id} was not pushed to', api):
        api.create_repo(repo_id, private=target.private, exist_ok=True)
        _check_repository(api, target, make_branch=True)
        commit: CommitInfo = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(folder / file)) for file in files],
            commit_message=message,
            revision=target.branch,
            create_pr=target.create_pr,
        )
    return commit


def check_access(target: Target, api: HfApi) -> None:
    """Refuse now what :func:`push_to_hub` would be refused later; nothing is made on the Hub.

    Raises:
        ConfigError: if the repository is public where a private one was asked for, or holds pickles.
        HubError: if the Hub cannot be reached, if nobody is logged in, or if that user may not write there.
    """
    repo_id = target.repo_id
    with _hub_errors(f'{repo_id} cannot be pushed to', api):
        _expect_writer(api.whoami(), target)
        with contextlib.suppress(RepositoryNotFoundError):
            _check_repository(api, target, make_branch=False)


def _has_card(target: Target, api: HfApi) -> bool:
    """Whether the destination has a model card; False if that cannot be found out."""
    try:
        info = api.model_info(target.repo_id, revision=target.branch)
    except Exception:  # the push reports it
        return False
    return any(sibling.rfilename == CARD_FILE for sibling in info.siblings or ())


def _expect_writer(user: Mapping[str, Any], target: Target) -> None:
    """Refuse a token that cannot write; the Hub does not say what a fine-grained one may do."""
    name, owner = str(user.get('name')), target.repo_id.split('/')[0]
    where = f'{target.repo_id} cannot be pushed to {constants.ENDPOINT}'
    if ((user.get('auth') or {}).get('accessToken') or {}).get('role') == 'read':
        raise HubError(f'{where}: the token of {name} may only read. {_HINTS[403]}')
    owners = [name, *(str(org.get('name')) for org in user.get('orgs') or ())]
    if not target.create_pr and owner.casefold() not in map(str.casefold, owners):
        raise HubError(f'{where}: {name} is neither {owner!r} nor in an organisation of that name. {_HINTS[403]}')


def _check_repository(api: HfApi, target: Target, *, make_branch: bool) -> None:
    """Refuse a public repository where a private one was asked for, and files that may be pickled."""
    repo_id = target.repo_id
    info: ModelInfo = api.model_info(repo_id)
    if target.private and info.private is False:
        raise ConfigError(
            f'{repo_id} exists and is public, and a private repository was asked for: change that in its settings '
            f'({constants.ENDPOINT}/{repo_id}/settings), or push to another one'
        )
    if target.branch != _MAIN:
        try:
            info = api.model_info(repo_id, revision=target.branch)
        except RevisionNotFoundError:  # a new branch has the files of the main one
            if make_branch:
                api.create_branch(repo_id, branch=target.branch, exist_ok=True)
    pickled = [file.rfilename for file in info.siblings or () if file.rfilename.lower().endswith(PICKLED)]
    if pickled:
        raise ConfigError(
            f'{repo_id} holds files that may be pickled, which whoever loads the model might execute '
            f'({", ".join(pickled[:3])}): delete them (`hf repos delete-files {repo_id} {pickled[0]}`), or push to '
            'another repository'
        )


@contextlib.contextmanager
def _hub_errors(what: str, api: HfApi) -> Iterator[None]:
    """Turn the client's exceptions, which differ from version to version, into errors with a way out."""
    token = api.token if isinstance(api.token, str) else None if api.token is False else get_token()
    try:
        yield
    except GHNError:
        raise
    except Exception as error:
        reason, hint = _reason_and_hint(error)
        message = f'{what} {constants.ENDPOINT}: {reason.rstrip(".")}. {hint}'
        if token and any(token in str(one) for one in _chain(error)):
            # A server may repeat the request.
            raise HubError(message.replace(token, '(token)')) from None
        raise HubError(message) from error


_HINTS = {
    401: 'Log in with `hf auth login`, set HF_TOKEN, or give token=...: it needs write access',
    403: 'The token needs write access to this owner (see https://huggingface.co/settings/tokens); or push to a name '
    'of your own, or open a pull request with create_pr=True',
    404: 'Check the name and that the token may see the repository',
    429: 'The Hub has had too many requests: wait a while, then push again',
}


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _reason_and_hint(error: Exception) -> tuple[str, str]:
    """Reason and hint for an error of the client, without addresses: those of uploads are signed."""
    chain = _chain(error)
    for one in chain:
        if isinstance(one, OfflineModeIsEnabled):
            return 'HF_HUB_OFFLINE is set', 'Unset it and push again'
        if isinstance(one, LocalTokenNotFoundError):
            return 'nobody is logged in', _HINTS[401]
        if isinstance(one, HfHubHTTPError) and one.response is not None:
            status = one.response.status_code
            said = one.server_message or one.response.reason_phrase or ''
            return f'{status} {said}'.strip(), _HINTS.get(status, 'Push again: what is there is not sent twice')
    if isinstance(error, ValueError):
        return str(error), 'No commit was made'
    last = chain[0]
    text = str(chain[-1]).strip() or type(chain[-1]).__name__
    if 'xet' in text:
        return text, 'If this Hub does not speak Xet, set HF_HUB_DISABLE_XET=1 and push again'
    return (
        f'{type(last).__name__}: {text}',
        'Check the network (HF_ENDPOINT is honoured) and push again: what is there is neither sent nor committed twice',
    )
