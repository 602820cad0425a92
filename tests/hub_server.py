"""A Hub on the loopback: repositories in memory, the endpoints that huggingface_hub calls, and faults on demand.

Small files are answered for by the server itself, large ones ("LFS": weights, by the ends of their names) by
a second one under another host name, as the Hub's storage is. All requests are kept, with their headers.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub_handler import Fault, Handler, Refusal, Request
from huggingface_hub import ModelCard

LARGE = ('.safetensors', '.bin', '.pt')


class HubServer:
    """The Hub. ``tokens`` maps a token to (user, whether it may write)."""

    def __init__(self) -> None:
        self.tokens = {'hf_writer': ('user', True), 'hf_reader': ('user', False), 'hf_other': ('other', True)}
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._servers = [self._server('hub'), self._server('storage')]
        self.endpoint = f'http://127.0.0.1:{self._servers[0].server_port}'
        self.storage = f'http://localhost:{self._servers[1].server_port}'

    def _server(self, name: str) -> http.server.ThreadingHTTPServer:
        handler = type('Handler', (Handler,), {'hub': self, 'name': name})
        return http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # What tests ask and do

    def fail(self, method: str, path: str, **how: Any) -> Fault:
        """Let the next matching requests fail."""
        self.faults.append(Fault(method, path, **how))
        return self.faults[-1]

    def asked(self, pattern: str) -> list[Request]:
        """Requests whose 'server METHOD path' has a match of the pattern."""
        return [request for request in self.requests if re.search(pattern, str(request))]

    def exists(self, repo_id: str) -> bool:
        return repo_id in self.repos

    def repo(self, repo_id: str) -> dict[str, Any]:
        return self.repos[repo_id]

    def commits(self, repo_id: str, revision: str = 'main') -> list[str]:
        """Titles of the commits of a revision, the newest last."""
        repo, titles = self.repo(repo_id), []
        oid = repo['refs'][revision]
        while oid:
            titles.append(repo['commits'][oid]['title'])
            oid = repo['commits'][oid]['parent']
        return titles[::-1]

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        """Contents of the files of a revision by path."""
        return {path: self.blob(file['oid']) for path, file in self.listed(self.repo(repo_id), revision).items()}

    def put(self, repo_id: str, files: Mapping[str, bytes], *, revision: str = 'main', **settings: Any) -> str:
        """Make a repository, or a commit in it, without a request; gives the commit."""
        if not self.exists(repo_id):
            self.create(repo_id, private=False)
        repo = self.repo(repo_id)
        repo.update(settings)
        repo['refs'].setdefault(revision, repo['refs']['main'])
        changed = {path: self._keep(path, content) for path, content in files.items()}
        return self._commit(repo, revision, 'put', changed)

    # Repositories

    def create(self, repo_id: str, *, private: bool) -> None:
        first = hashlib.sha1(repo_id.encode()).hexdigest()
        commits = {first: {'parent': None, 'title': 'initial commit', 'files': {}}}
        repo = {'id': repo_id, 'private': private, 'gated': False, 'refs': {'main': first}, 'commits': commits}
        self.repos[repo_id] = repo

    def commit(self, repo: dict[str, Any], revision: str) -> str:
        oid = repo['refs'].get(revision) or (revision if revision in repo['commits'] else None)
        if oid is None:
            raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return str(oid)

    def listed(self, repo: dict[str, Any], revision: str) -> dict[str, dict[str, Any]]:
        """The files of a revision by path."""
        return dict(repo['commits'][self.commit(repo, revision)]['files'])

    def blob(self, oid: str) -> bytes:
        return self.blobs[oid]

    def _keep(self, path: str, content: bytes) -> dict[str, Any]:
        large = path.endswith(LARGE)
        oid = hashlib.sha256(content) if large else hashlib.sha1(b'blob %d\0' % len(content) + content)
        self.blobs[oid.hexdigest()] = content
        return {'oid': oid.hexdigest(), 'size': len(content), 'lfs': large}

    def _commit(self, repo: dict[str, Any], revision: str, title: str, changed: Mapping[str, Any]) -> str:
        parent = repo['refs'][revision]
        files = {**repo['commits'][parent]['files'], **changed}
        oid = hashlib.sha1(json.dumps([parent, title, files, len(repo['commits'])]).encode()).hexdigest()
        repo['commits'][oid] = {'parent': parent, 'title': title, 'files': files}
        repo['refs'][revision] = oid
        return oid

    # Endpoints

    def whoami(self, user: str | None, writes: bool) -> dict[str, Any]:
        if user is None:
            raise Refusal(401, 'Invalid credentials in Authorization header')
        token = {'displayName': 'tests', 'role': 'write' if writes else 'read'}
        return {'type': 'user', 'name': user, 'orgs': [], 'auth': {'type': 'access_token', 'accessToken': token}}

    def create_repo(self, user: str | None, writes: bool, asked: dict[str, Any]) -> dict[str, Any]:
        owner = asked.get('organization') or user
        if user is None:
            raise Refusal(401, 'Invalid username or password.')
        if owner != user or not writes:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f'{owner}/{asked["name"]}'
        if self.exists(repo_id):
            raise Refusal(409, 'You already created this model repo', url=f'{self.endpoint}/{repo_id}')
        self.create(repo_id, private=asked.get('visibility') == 'private' or bool(asked.get('private')))
        return {'url': f'{self.endpoint}/{repo_id}', 'name': repo_id}

    def readable(self, repo_id: str, user: str | None, *, content: bool = False) -> dict[str, Any]:
        repo = self.repo(repo_id) if self.exists(repo_id) else None
        if repo is None or (repo['private'] and user != repo_id.split('/')[0]):
            raise Refusal(401 if user is None else 404, 'Repository not found', 'RepoNotFound')
        if content and repo['gated'] and user != repo_id.split('/')[0]:
            message = f'Access to model {repo_id} is restricted. You must be authenticated and on its list of users'
            raise Refusal(401 if user is None else 403, message, 'GatedRepo')
        return repo

    def expect_writer(self, repo_id: str, user: str | None, writes: bool) -> None:
        if user != repo_id.split('/')[0] or not writes:
            raise Refusal(403 if user else 401, 'You need write access to this repository')

    def info(self, repo: dict[str, Any], revision: str) -> dict[str, Any]:
        oid = self.commit(repo, revision)
        siblings = [{'rfilename': path} for path in self.listed(repo, revision)]
        return {'id': repo['id'], 'sha': oid, 'private': repo['private'], 'gated': repo['gated'], 'siblings': siblings}

    def tree(self, repo: dict[str, Any], revision: str) -> list[dict[str, Any]]:
        entries = []
        for path, file in self.listed(repo, revision).items():
            entry = {'type': 'file', 'path': path, 'size': file['size'], 'oid': file['oid'][:40]}
            lfs = {'oid': file['oid'], 'size': file['size'], 'pointerSize': 130}
            entries.append({**entry, 'lfs': lfs} if file['lfs'] else entry)
        return entries

    def preupload(self, repo: dict[str, Any], revision: str, asked: dict[str, Any]) -> dict[str, Any]:
        files, told = self.listed(repo, revision), []
        for file in asked['files']:
            mode = 'lfs' if file['path'].endswith(LARGE) else 'regular'
            oid = files.get(file['path'], {}).get('oid')
            told.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        return {'files': told}

    def batch(self, repo_id: str, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for wanted in asked['objects']:
            told = {'oid': wanted['oid'], 'size': wanted['size']}
            if wanted['oid'] not in self.blobs:
                upload = {'href': f'{self.storage}/lfs/{wanted["oid"]}?size={wanted["size"]}&signature=secret'}
                verify = {'href': f'{self.endpoint}/api/models/{repo_id}/verify'}
                told['actions'] = {'upload': upload, 'verify': verify}
            objects.append(told)
        return {'transfer': 'basic', 'objects': objects}

    def upload(self, oid: str, size: int, body: bytes) -> None:
        if len(body) != size or hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, 'The provided content does not match its checksum')
        self.blobs[oid] = body

    def make_commit(
        self, repo: dict[str, Any], revision: str, lines: list[dict[str, Any]], *, create_pr: bool
    ) -> dict[str, Any]:
        parent, header, changed = self.commit(repo, revision), lines[0]['value'], {}
        if header.get('parentCommit', parent) != parent:
            raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file':
                changed[value['path']] = self._keep(value['path'], base64.b64decode(value['content']))
            elif line['key'] == 'lfsFile':
                if value['oid'] not in self.blobs:
                    raise Refusal(400, f'LFS pointer pointed to a file that does not exist: {value["oid"]}')
                changed[value['path']] = {'oid': value['oid'], 'size': len(self.blobs[value['oid']]), 'lfs': True}
        if create_pr:
            number = 1 + sum(ref.startswith('refs/pr/') for ref in repo['refs'])
            revision = f'refs/pr/{number}'
            repo['refs'][revision] = parent
        oid = self._commit(repo, revision, header['summary'], changed)
        told = {'success': True, 'commitOid': oid, 'commitUrl': f'{self.endpoint}/{repo["id"]}/commit/{oid}'}
        if create_pr:
            told['pullRequestUrl'] = f'{self.endpoint}/{repo["id"]}/discussions/{number}'
        return told

    def create_branch(self, repo: dict[str, Any], branch: str) -> None:
        repo['refs'].setdefault(branch, repo['refs']['main'])

    def validate_yaml(self, content: str) -> dict[str, Any]:
        """Refuse what the library itself cannot read back, and what the Hub's documentation forbids."""
        try:
            data = ModelCard(content).data
            if data.license is not None and data.license != data.license.lower():
                raise ValueError('"license" must be one of the known identifiers')
        except Exception as error:
            raise Refusal(400, str(error)) from error
        return {'errors': [], 'warnings': []}


def environment(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that talks to a Hub of tests and knows no token but those that it is given."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING', 'TIMM_GHN'))}
    ours = {'HF_ENDPOINT': hub.endpoint, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1'}
    return {**kept, **ours, 'NO_PROXY': '127.0.0.1,localhost', **more}
