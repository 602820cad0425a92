"""Files from the Hub, through huggingface_hub and its cache, without its long waits where there is no network."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from timm_ghn.errors import CheckpointError, ConfigError, GHNNotFoundError, first_line
from timm_ghn.files import sha256_of
from timm_ghn.hub.storage import digest_in_name

#: How long the default GHN waits for the Hub before the one inside the package serves, in seconds.
SHORT_PATIENCE = 2.5
#: Seconds before a Hub that could not be reached is asked for the default GHN again.
RETRY_AFTER = 300.0
_unreachable: dict[str, tuple[float, Exception]] = {}


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file in a repository on the Hub.

    Attributes:
        repo_id: The repository, as 'user/name'.
        filename: The file's path in it.
        revision: Branch, tag or commit; the main branch if None.
    """

    repo_id: str
    filename: str
    revision: str | None = None

    def __str__(self) -> str:
        return f'{self.filename} of {self.repo_id}' + (f' at {self.revision}' if self.revision else '')


@dataclasses.dataclass(frozen=True)
class Access:
    """How to reach the Hub.

    Attributes:
        cache_dir: Folder of the cache; huggingface_hub's own if None.
        token: For private repositories; huggingface_hub's own if None.
        local_files_only: Whether to look in the cache only.
        brief: Whether to give up after :data:`SHORT_PATIENCE`, and at once where that happened a moment ago.

    Raises:
        ConfigError: if the token can be none.
    """

    cache_dir: str | Path | None = None
    token: str | bool | None = dataclasses.field(default=None, repr=False)
    local_files_only: bool = False
    brief: bool = False

    def __post_init__(self) -> None:
        check_token(self.token, own=False)  # huggingface_hub's own is checked when the Hub is asked


def fetch(file: HubFile, access: Access, *, prefer_cache: bool = True) -> Path:
    """Path of a file of the Hub in the local cache, downloaded if need be.

    Args:
        file: The file.
        access: How to reach the Hub.
        prefer_cache: Whether a cached file will do; if not, the Hub is asked for a newer one, if it can be reached.

    Raises:
        ConfigError: if huggingface_hub's own token can be none.
        GHNNotFoundError: if it can be reached neither on the Hub nor in the cache; the cause is chained.
        CheckpointError: if what was downloaded is not what the Hub has; it does not stay in the cache.
    """
    cached = _cached(file, access)
    if cached is not None and (prefer_cache or access.local_files_only):
        return cached
    if access.local_files_only:
        raise GHNNotFoundError(
            f'{file} is not in the cache, and local_files_only was asked for: load it once without that'
        )
    check_token(access.token)
    # Exception: the client raises the errors of its HTTP library, which differs from version to version.
    try:
        _probe(file, access)
    except Exception as error:
        if cached is not None:
            return cached
        if access.brief or not _is_transient(error):
            raise _not_found(file, error) from error
    try:
        path = hf_hub_download(
            file.repo_id,
            file.filename,
            revision=file.revision,
            cache_dir=access.cache_dir,
            token=access.token,
        )
    except Exception as error:
        raise _not_found(file, error) from error
    if Path(path) != cached:
        _check_digest(Path(path), file)
    return Path(path)


def _is_transient(error: Exception) -> bool:
    """Whether a server answered that a later request may succeed: huggingface_hub tries again then."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (408, 429, 500, 502, 503, 504)


def _check_digest(path: Path, file: HubFile) -> None:
    """Refuse a large file that was damaged on the way; the cache of the Hub names it by its digest."""
    expected = digest_in_name(path)
    if expected is None or (found := sha256_of(path)) == expected:
        return
    for place in (path.resolve(), path.parent / path.readlink(), path):
        place.unlink(missing_ok=True)
    raise CheckpointError(
        f'{file} arrived damaged: its SHA-256 is {found} where the Hub names {expected}. It was removed from the '
        'cache; load it again'
    )


def _cached(file: HubFile, access: Access) -> Path | None:
    try:
        found = try_to_load_from_cache(file.repo_id, file.filename, cache_dir=access.cache_dir, revision=file.revision)
    except ValueError as error:
        raise GHNNotFoundError(f'{file.repo_id!r} is no name of a repository on the Hub: {error}') from error
    return Path(found) if isinstance(found, str) else None


def _probe(file: HubFile, access: Access) -> None:
    """Raise the error that downloading the file would meet, after one request for its metadata.

    hf_hub_download repeats a request that fails, which takes from half a minute (nobody listens) to six (nobody
    answers). A single request finds out as well.
    """
    url = hf_hub_url(file.repo_id, file.filename, revision=file.revision)
    if access.brief and url in _unreachable:
        when, error = _unreachable[url]
        if time.monotonic() - when < RETRY_AFTER:
            raise error
    patience = min(SHORT_PATIENCE if access.brief else math.inf, constants.HF_HUB_ETAG_TIMEOUT)
    try:
        if get_hf_file_metadata(url, token=access.token, timeout=patience).commit_hash is None:
            raise ConnectionError("the answer is not the Hub's: a proxy or a sign-in page may have given it")
    except Exception as error:
        _unreachable[url] = time.monotonic(), error.with_traceback(None)
        raise
    _unreachable.pop(url, None)


def _not_found(file: HubFile, error: Exception) -> GHNNotFoundError:
    hint = 'Check the name and the network (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured), or give the path '
    hint += 'of a file that you have'
    if isinstance(error, GatedRepoError):
        hint = f'Ask for access at {constants.ENDPOINT}/{file.repo_id}, then log in (`hf auth login`) or give token=...'
    elif isinstance(error, RepositoryNotFoundError):
        hint = f'If {file.repo_id} is private, log in (`hf auth login`), set HF_TOKEN or give token=...; otherwise '
        hint += 'check the name'
    return GHNNotFoundError(
        f'{file} is not in the cache and cannot be had from {constants.ENDPOINT} ({first_line(error)}). {hint}'
    )


def check_token(token: str | bool | None, *, own: bool = True) -> None:
    """Refuse what can be no token, before an HTTP client that cannot send it shows it in its error.

    Args:
        token: As huggingface_hub takes it: None or True for its own, False for none.
        own: Whether huggingface_hub's own token is checked too, if that is meant.
    """
    if own and (token is None or token is True):
        what, token = "huggingface_hub's token, of HF_TOKEN or `hf auth login`,", get_token()
    else:
        what = 'token'
    if token is None or isinstance(token, bool):
        return
    if not isinstance(token, str) or not (token.isascii() and token.isprintable() and token and ' ' not in token):
        raise ConfigError(f'expected {what} to be one word without line ends (it is not shown here)')
