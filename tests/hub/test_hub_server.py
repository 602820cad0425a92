"""The Hub of the tests, seen by the real client: what it answers is what the client expects of the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

REPO = 'user/repo'
FILES = {'a.txt': b'small', 'folder/b.safetensors': bytes(range(256)) * 100}


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token='hf_writer')


def test_who_is_asking(hub: HubServer, api: HfApi):
    assert api.whoami()['name'] == 'user'
    with pytest.raises(HfHubHTTPError, match='Invalid user token'):
        api.whoami(token='hf_unknown')


def test_what_is_committed_is_listed_and_downloaded(hub: HubServer, api: HfApi):
    api.create_repo(REPO, private=True)
    additions = [CommitOperationAdd(path, content) for path, content in FILES.items()]
    first = api.create_commit(REPO, additions, commit_message='two files')
    assert sorted(api.list_repo_files(REPO)) == sorted(FILES)
    info = api.model_info(REPO)
    assert (info.sha, info.private) == (first.oid, True)
    assert api.file_exists(REPO, 'a.txt')
    folder = Path(snapshot_download(REPO, token='hf_reader'))
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    api.create_commit(REPO, [CommitOperationDelete('a.txt')], commit_message='one less')
    assert api.list_repo_files(REPO) == ['folder/b.safetensors']
    assert sorted(api.list_repo_files(REPO, revision=first.oid)) == sorted(FILES)


def test_a_commit_on_a_parent_that_is_no_longer_the_last_is_refused(hub: HubServer, api: HfApi):
    first = hub.put(REPO, {'a.txt': b'1'})
    hub.put(REPO, {'a.txt': b'2'})
    with pytest.raises(HfHubHTTPError, match='412'):
        api.create_commit(REPO, [CommitOperationAdd('a.txt', b'3')], commit_message='3', parent_commit=first)
    assert hub.files(REPO) == {'a.txt': b'2'}


def test_the_kinds_of_refusal_are_told_apart(hub: HubServer, api: HfApi):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)
    hub.put(REPO, FILES)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision='v1')
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, 'missing')
    hub.put(REPO, {}, gated=True)
    with pytest.raises(GatedRepoError):
        api.hf_hub_download(REPO, 'a.txt', token='hf_other')


def test_repositories_are_on_the_disk(hub: HubServer):
    hub.put(REPO, FILES)
    with HubServer(hub.folder) as again:
        assert again.files(REPO) == FILES
        assert HfApi(endpoint=again.endpoint).model_info(REPO).sha == hub.repo(REPO)['refs']['main']


def test_a_card_that_the_library_cannot_read_is_refused(hub: HubServer, api: HfApi):
    hub.put(REPO, {})
    with pytest.raises(ValueError, match='Invalid metadata'):
        api.create_commit(REPO, [CommitOperationAdd('README.md', b'---\n- 1\n---\n')], commit_message='card')
    assert hub.files(REPO) == {}
