"""Fixtures for tests that use a Hub: a server on the loopback, or a port where nobody listens; never the network."""

from __future__ import annotations

import socket
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import HubServer
from official import official_state, write_joblib

from timm_ghn.hub import catalogue, converted, load
from timm_ghn.hub.catalogue import GHNEntry
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHN, GHNConfig


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def use_endpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Point huggingface_hub at a server, as HF_ENDPOINT does in a new process."""

    def use(endpoint: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', endpoint)
        template = endpoint + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(huggingface_hub.constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)

    return use


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, use_endpoint) -> Iterator[None]:
    """An empty cache, no Hub, no choice of a default, no registered GHN, nothing remembered."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path_factory.mktemp('cache') / 'hub'))
    for variable in (catalogue.VARIABLE, converted.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(catalogue, '_registered', {})
    monkeypatch.setattr(catalogue, '_default', None)
    use_endpoint(f'http://127.0.0.1:{closed_port()}')
    load._last.clear()
    yield
    load._last.clear()


@pytest.fixture
def hub(use_endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that huggingface_hub talks to without Xet, and on whose disk no token is kept.

    Its constants are read from the environment when it is imported, so they are patched; a test that starts a process
    gives it :func:`hub_server.environment` instead.
    """
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_TOKEN_PATH', str(tmp_path / 'no-token'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True)
    with HubServer() as server:
        use_endpoint(server.endpoint)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What huggingface_hub would have waited before it tried again, in seconds; it does not wait."""
    found: list[float] = []
    clock = types.SimpleNamespace(sleep=found.append, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr('huggingface_hub.utils._http.time', clock)
    monkeypatch.setattr('huggingface_hub.file_download.time', clock)
    return found


@pytest.fixture
def small() -> GHNConfig:
    """A GHN-3 that a file can hold in 50 kB."""
    return GHNConfig(hid=8, max_shape=(8, 8, 3, 3), num_classes=5, layers=2, heads=2, name='small')


@pytest.fixture
def small_ghn(small: GHNConfig) -> GHN:
    torch.manual_seed(0)
    return GHN(small)


@pytest.fixture
def folder(tmp_path: Path, small_ghn: GHN) -> Path:
    """The small GHN in the native format."""
    save_ghn(small_ghn, tmp_path / 'native')
    return tmp_path / 'native'


@pytest.fixture
def official(tmp_path: Path, small_ghn: GHN) -> bytes:
    """The small GHN as its authors would have published it."""
    return write_joblib(official_state(small_ghn), tmp_path / 'official.pt').read_bytes()


@pytest.fixture
def mine(hub: HubServer, official: bytes, small: GHNConfig) -> GHNEntry:
    """The entry of an official file on the Hub."""
    hub.put('user/repo', {'ghn.pt': official})
    entry = GHNEntry('mine', '', small, repo_id='user/repo', filename='ghn.pt')
    catalogue._registered['mine'] = entry
    return entry


def expect_same(found: GHN, expected: GHN) -> None:
    """The same weights."""
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value), key


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that only an executed payload makes."""
    return tmp_path / 'executed'
