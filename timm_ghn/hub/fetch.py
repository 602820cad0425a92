"""Files from the Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError

from timm_ghn.errors import CheckpointError, ConfigError, GHNNotFoundError
from timm_ghn.files import sha256_of
from timm_ghn.hub.storage import digest_in_name


@dataclasses.dataclass(frozen=True)
class Access:
    """How to reach a repository on the Hub; what is None is as huggingface_hub has it."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = dataclasses.field(default=None, repr=False)
    local_files_only: bool = False


def fetch(repo_id: str, filename: str, access: Access, *, prefer_cache: bool = True) -> Path:
    """Path of a file of the Hub in the local cache, downloaded if need be.

    Unless a cached file will do, the Hub is asked for a newer one, if it can be reached.

    Raises:
        ConfigError: if the token can be none.
        GHNNotFoundError: if the file can be had neither from the Hub nor from the cache; the cause is chained.
        CheckpointError: if what was downloaded is not what the Hub has; it does not stay in the cache.
    """
    if not access.local_files_only:
        check_token(access.token)
    revision, cache_dir = access.revision, access.cache_dir
    name = f'{filename} of {repo_id}' + (f' at {revision}' if revision else '')
    # Exception: the client raises the errors of its HTTP library, which differs from version to version.
    try:
        cached = try_to_load_from_cache(repo_id, filename, revision=revision, cache_dir=cache_dir)
        if isinstance(cached, str) and prefer_cache:
            return Path(cached)
        if not isinstance(cached, str) and not access.local_files_only:
            # hf_hub_download repeats a request that nobody answers for minutes; a single one finds that out as well.
            with contextlib.suppress(HfHubHTTPError):
                url = hf_hub_url(repo_id, filename, revision=revision)
                get_hf_file_metadata(url, token=access.token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        path = hf_hub_download(repo_id, filename, **vars(access))
    except Exception as error:
        raise GHNNotFoundError(
            f'{name} is not in the cache and cannot be had from {constants.ENDPOINT} '
            f'({client_text(error, access.token)}). Check the name, the network and the token (HF_ENDPOINT, HF_TOKEN '
            'and `hf auth login` are honoured), or give the path of a file that you have'
        ) from error
    if path != cached:
        _check_digest(Path(path), name)
    return Path(path)


def _check_digest(path: Path, name: str) -> None:
    """Refuse a large file that was damaged on the way; the cache of the Hub names it by its digest."""
    expected = digest_in_name(path)
    if expected is None or (found := sha256_of(path)) == expected:
        return
    for place in (path.resolve(), path.parent / path.readlink(), path):
        place.unlink(missing_ok=True)
    raise CheckpointError(
        f'{name} arrived damaged: its SHA-256 is {found} where the Hub names {expected}. It was removed from the '
        'cache; load it again'
    )


def check_token(token: str | bool | None) -> None:
    """Refuse what can be no token, before an HTTP client that cannot send it shows it in its error."""
    sent = get_token() if token is None or token is True else token
    if sent is not None and sent is not False and not (isinstance(sent, str) and re.fullmatch('[!-~]+', sent)):
        raise ConfigError('expected the token (token=..., HF_TOKEN or `hf auth login`) to be one word; it is not shown')


def client_text(error: BaseException, token: str | bool | None) -> str:
    """What huggingface_hub says, without the token, which a server may repeat, and queries, which sign uploads."""
    # Its error about an upload does not say why it failed, the cause does.
    one = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
    text = re.sub(r'\?\S*', '', f'{type(one).__name__}: {one}').strip().rstrip('.')
    secret = token if isinstance(token, str) else get_token()
    return text.replace(secret, '(token)') if secret else text
