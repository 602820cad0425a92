"""One commit to the Hub with all files or none, and whether it may be made at all."""

from __future__ import annotations

import contextlib
import dataclasses
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

from timm_ghn.errors import ConfigError, GHNError, HubError
from timm_ghn.hub.storage import CONFIG_FILE as CONFIG_FILE, WEIGHTS_FILE as WEIGHTS_FILE
from timm_ghn.tokens import check_token
from timm_ghn.version import __version__

CARD_FILE = 'README.md'
#: What every push brings.
FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)

#: Ends of the names of files that may hold pickles.
PICKLED = ('.bin', '.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle', '.joblib')

_MAIN = constants.DEFAULT_REVISION


@dataclasses.dataclass(frozen=True)
class Target:
    """Where on the Hub something goes.

    Attributes:
        repo_id: The repository, as 'user/name'.
        private: Whether a new repository is to be private; if None, as the Hub does for this user.
        revision: Branch to commit to, made if it does not exist; 'main' if None.
        create_pr: Whether to open a pull request instead.

    Raises:
        ConfigError: if there can be no such place.
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
        """Branch that is committed to, or that a pull request is for."""
        return self.revision or _MAIN

    @property
    def pinned(self) -> str | None:
        """What has to be named to load it from there; None for the main branch."""
        return None if self.create_pr or self.branch == _MAIN else self.branch


def api_of(token: str | bool | None) -> HfApi:
    """The client.

    Args:
        token: Of a user who may write; huggingface_hub's own (``hf auth login``, HF_TOKEN) if None.

    Raises:
        ConfigError: if it can be no token.
    """
    check_token(token)
    return HfApi(token=token, library_name='timm_ghn', library_version=__version__)


def _token_of(token: str | bool | None) -> str | None:
    """The token that is sent: the one that is given, else that of HF_TOKEN or ``hf auth login``."""
    return token if isinstance(token, str) else None if token is False else get_token()


def send(folder: Path, target: Target, api: HfApi, *, message: str, files: Sequence[str] = FILES) -> CommitInfo:
    """Commit files; the repository and the branch are made if they do not exist.

    Args:
        folder: Where the files are.
        target: Where they go.
        api: The client.
        message: First line of the commit's message.
        files: Their names.

    Returns:
        The commit, or the last one if nothing has changed.

    Raises:
        ConfigError: if the repository is public where a private one was asked for, or holds pickles; nothing is sent.
        HubError: if the Hub cannot be reached, or refuses.
    """
    repo_id = target.repo_id
    with _told(f'{repo_id} was not pushed to', api):
        api.create_repo(repo_id, private=target.private, exist_ok=True)
        info = api.model_info(repo_id)
        _refuse_public(info, target)
        if target.branch != _MAIN:
            info = _branch(api, repo_id, target.branch)
        _refuse_pickles(info, repo_id)
        commit: CommitInfo = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(folder / file)) for file in files],
            commit_message=message,
            revision=target.branch,
            create_pr=target.create_pr,
        )
    return commit


def check_access(target: Target, api: HfApi) -> None:
    """Refuse now what :func:`send` would be refused later; nothing is made on the Hub.

    Raises:
        ConfigError: if the repository is public where a private one was asked for, or holds pickles.
        HubError: if the Hub cannot be reached, if nobody is logged in, or if that user may not write there.
    """
    repo_id = target.repo_id
    with _told(f'{repo_id} cannot be pushed to', api):
        _expect_writer(api.whoami(), target)
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return
        _refuse_public(info, target)
        if target.branch != _MAIN:
            # A branch that does not exist is made from the main one.
            with contextlib.suppress(RevisionNotFoundError):
                info = api.model_info(repo_id, revision=target.branch)
        _refuse_pickles(info, repo_id)


def has_card(target: Target, api: HfApi) -> bool:
    """Whether there is a model card already where something goes; False if that cannot be told."""
    try:
        info = api.model_info(target.repo_id, revision=target.branch)
    except Exception:  # whatever is wrong with the network or the repository, the push itself says better
        return False
    return any(sibling.rfilename == CARD_FILE for sibling in info.siblings or ())


def _expect_writer(user: Mapping[str, Any], target: Target) -> None:
    """Refuse a token that cannot write; of a fine-grained one the Hub does not tell."""
    name, owner = str(user.get('name')), target.repo_id.split('/')[0]
    where = f'{target.repo_id} cannot be pushed to {constants.ENDPOINT}'
    if ((user.get('auth') or {}).get('accessToken') or {}).get('role') == 'read':
        raise HubError(f'{where}: the token of {name} may only read. {_HINTS[403]}')
    owners = [name, *(str(org.get('name')) for org in user.get('orgs') or ())]
    if not target.create_pr and owner.casefold() not in map(str.casefold, owners):
        raise HubError(f'{where}: {name} is neither {owner!r} nor in an organisation of that name. {_HINTS[403]}')


def _refuse_public(info: ModelInfo, target: Target) -> None:
    if target.private and info.private is False:
        raise ConfigError(
            f'{target.repo_id} exists and is public, and a private repository was asked for: change that in its '
            f'settings ({constants.ENDPOINT}/{target.repo_id}/settings), or push to another one'
        )


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
def _told(what: str, api: HfApi) -> Iterator[None]:
    """Turn what the client raises, which is another thing from version to version, into errors with a way out."""
    token = _token_of(api.token)
    try:
        yield
    except GHNError:
        raise
    except Exception as error:
        reason, hint = _explained(error)
        message = f'{what} {constants.ENDPOINT}: {reason.rstrip(".")}. {hint}'
        if token and any(token in str(one) for one in _chain(error)):
            # A server may send back what it was asked with.
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


def _explained(error: Exception) -> tuple[str, str]:
    """Reason and way out. Addresses stay out of it: those of uploads are signed."""
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
