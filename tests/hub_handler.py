"""One request to the Hub of the tests: who asks, what goes wrong on purpose, and which answer it gets."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import re
import socket
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from hub_server import HubServer


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Attributes:
        method: Of the request.
        path: A regular expression that is searched in its path.
        times: For how many requests.
        status: Answer with this status, and nothing else.
        cut: Close the connection after that many bytes of the file that is sent, or of the body that is received.
        lost: Do what was asked, and close the connection without an answer.
        flip: Send the file with a byte changed.
        location: Redirect there.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    cut: int | None = None
    lost: bool = False
    flip: bool = False
    location: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as it came: to which of the two servers, and with which headers (names in lower case)."""

    server: str
    method: str
    path: str
    headers: Mapping[str, str]

    def __str__(self) -> str:
        return f'{self.server} {self.method} {self.path}'


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = '', **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


class Handler(http.server.BaseHTTPRequestHandler):
    """One request, to either server."""

    hub: HubServer
    name: str
    timeout = 20

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_any()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_any(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        hub = self.hub
        with hub.lock:
            hub.requests.append(Request(self.name, self.command, self.path, headers))
            hits = (f for f in hub.faults if f.method == self.command and re.search(f.path, self.path))
            self.fault = next(hits, None)
            if self.fault is not None:
                self.fault.times -= 1
                if self.fault.times <= 0:
                    hub.faults.remove(self.fault)
        receives = self.command in ('POST', 'PUT')
        if receives and self.fault is not None and self.fault.cut is not None:
            self.rfile.read(self.fault.cut)
            self.abort()
            return
        body = self.body() if receives else b''
        if self.fault is not None and self.fault.location is not None:
            self.answer(307, b'', {'Location': self.fault.location})
        elif self.fault is not None and self.fault.status is not None:
            self.answer(self.fault.status, b'{"error": "an injected fault"}', {})
        else:
            self.serve(body)

    def serve(self, body: bytes) -> None:
        with self.hub.lock:
            try:
                found = self.storage(body) if self.name == 'storage' else self.route(body)
            except Refusal as refusal:
                headers = {'X-Error-Message': refusal.message, 'X-Error-Code': refusal.code}
                self.answer(refusal.status, json.dumps({'error': refusal.message, **refusal.more}).encode(), headers)
                return
        if self.fault is not None and self.fault.lost:
            self.abort()
        elif found is not None:
            self.answer(200, json.dumps(found).encode(), {'Content-Type': 'application/json'})

    def body(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        parts = []
        while size := int(self.rfile.readline().strip() or b'0', 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def who(self) -> tuple[str | None, bool]:
        given = self.headers.get('Authorization')
        if given is None:
            return None, False
        token = given.removeprefix('Bearer ')
        if token not in self.hub.tokens:
            raise Refusal(401, 'Invalid credentials in Authorization header')
        return self.hub.tokens[token]

    def route(self, body: bytes) -> Any:
        """The answer as plain values; None if it was given already."""
        hub, parts = self.hub, urlsplit(self.path)
        path, query = parts.path, parse_qs(parts.query)
        user, writes = self.who()
        if path == '/api/whoami-v2':
            return hub.whoami(user, writes)
        if path == '/api/repos/create':
            return hub.create_repo(user, writes, json.loads(body))
        if path == '/api/validate-yaml':
            return hub.validate_yaml(json.loads(body)['content'])
        if match := re.fullmatch(r'/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch', path):
            hub.readable(match[1], user)
            return hub.batch(match[1], json.loads(body))
        if match := re.fullmatch(r'/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)', path):
            self.resolve(hub.readable(match[1], user, content=True), unquote(match[2]), unquote(match[3]))
            return None
        match = re.fullmatch(r'/api/models/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^/]+)(/.*)?)?)?', path)
        if match is None:
            raise Refusal(404, f'Sorry, we cannot find {path}')
        repo_id, what, revision = match[1], match[2] or 'revision', unquote(match[3] or 'main')
        repo = hub.readable(repo_id, user)
        create_pr = query.get('create_pr') == ['1']
        if what == 'revision':
            return hub.info(repo, revision)
        if what == 'tree':
            return hub.tree(repo, revision)
        if user is None:
            raise Refusal(401, 'Invalid username or password.')
        if not (create_pr or what == 'verify'):
            hub.expect_writer(repo_id, user, writes)
        if what == 'verify':
            return {}
        if what == 'branch':
            hub.create_branch(repo, revision)
            return {}
        if what == 'preupload':
            return hub.preupload(repo, revision, json.loads(body))
        if what == 'commit':
            return hub.make_commit(
                repo, revision, [json.loads(line) for line in body.splitlines()], create_pr=create_pr
            )
        raise Refusal(404, f'Sorry, we cannot find {path}')

    def resolve(self, repo: dict[str, Any], revision: str, path: str) -> None:
        oid, file = self.hub.commit(repo, revision), self.hub.listed(repo, revision).get(path)
        if file is None:
            self.answer(404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': oid})
            return
        headers = {'X-Repo-Commit': oid, 'ETag': f'"{file["oid"]}"'}
        if not file['lfs']:
            self.answer(200, self.hub.blob(file['oid']), headers)
            return
        headers = {'X-Repo-Commit': oid, 'X-Linked-Etag': f'"{file["oid"]}"', 'X-Linked-Size': str(file['size'])}
        location = f'{self.hub.storage}/lfs/{file["oid"]}?signature=secret'
        self.answer(302, b'', {**headers, 'Location': location})

    def storage(self, body: bytes) -> Any:
        parts = urlsplit(self.path)
        oid = parts.path.removeprefix('/lfs/')
        if self.command == 'PUT':
            self.hub.upload(oid, int(parse_qs(parts.query)['size'][0]), body)
            return {}
        if oid not in self.hub.blobs:
            raise Refusal(404, 'no such object')
        self.answer(200, self.hub.blob(oid), {'ETag': f'"{oid}"'})
        return None

    def answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        fault = self.fault or Fault('', '')
        if fault.flip and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(content if fault.cut is None else content[: fault.cut])
            self.wfile.flush()
            if fault.cut is not None and self.command != 'HEAD':
                self.connection.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Close the connection at once: the other side sees it reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.connection.close()
        self.rfile = self.wfile = _Closed()  # type: ignore[assignment]


class _Closed:
    """Stands for the files of a connection that is gone."""

    closed = True

    def close(self) -> None:
        pass

    def flush(self) -> None:
        pass
