"""A server on the loopback that answers for files as the Hub does."""

from __future__ import annotations

import hashlib
import http.server
import threading
from pathlib import Path

COMMIT = 'c0ffee' + '0' * 34


class FakeHub:
    """Serves ``files``: contents by 'user/repo/file'. ``requests`` lists what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                hub.requests.append(f'{self.command} {self.path}')
                repo, _, rest = self.path.lstrip('/').partition('/resolve/')
                content = hub.files.get(f'{repo}/{rest.partition("/")[2]}')
                if content is None:
                    self.send_response(404)
                    self.send_header('X-Error-Code', 'EntryNotFound')
                    self.send_header('X-Repo-Commit', COMMIT)
                    self.send_header('Content-Length', '0')
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header('X-Repo-Commit', COMMIT)
                self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header('Content-Length', str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.endpoint = f'http://127.0.0.1:{self._server.server_port}'

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def put(self, repo_id: str, folder: Path) -> None:
        for path in folder.iterdir():
            self.files[f'{repo_id}/{path.name}'] = path.read_bytes()
