from __future__ import annotations

import itertools
import os
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import LARGE_GOLDEN, TINY, make_ghn

from timm_ghn import GHN
from timm_ghn.cli import main as cli
from timm_ghn.ops import backends

torch.set_num_threads(1)  # threads that wait for each other on a busy machine take ten times as long


@pytest.fixture(autouse=True)
def no_accelerator_is_left() -> Iterator[None]:
    """Take away accelerate's settings, which outlive an accelerator: the next test of the process would have them."""
    yield
    state = sys.modules.get('accelerate.state')
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def call_cli(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    """Run a command of timm-ghn in this process: exit code, standard output, standard error."""

    def run(line: str) -> tuple[int, str, str]:
        try:
            code = cli.main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope='session')
def golden() -> Path:
    """Checkpoints of the published sizes, and what the reference predicted from them."""
    if not (LARGE_GOLDEN / 'README.md').exists():
        pytest.skip('no large golden set: set TIMM_GHN_GOLDEN to its folder')
    return LARGE_GOLDEN


@pytest.fixture(scope='session')
def image_data() -> Path:
    """Folders of real images as parquet files."""
    place = Path(os.environ.get('TIMM_GHN_DATA') or Path(__file__).parents[2] / 'shared' / 'data')
    if not (place / 'cifar10').is_dir():
        pytest.skip('no real images: set TIMM_GHN_DATA to a folder with cifar10/*.parquet')
    return place


@pytest.fixture(scope='session', params=sorted(TINY))
def ghn(request: pytest.FixtureRequest) -> GHN:
    """A small GHN of each kind with random weights."""
    return make_ghn(TINY[request.param])


@pytest.fixture
def scatter_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch-scatter's function with its documented meaning, so that our part of the call is tested without it."""
    double = types.ModuleType('torch_scatter')

    def segment_csr(src, indptr, *, reduce):
        assert (indptr.dtype, reduce) == (torch.int64, 'sum')
        return torch.stack([src[a:b].sum(0) for a, b in itertools.pairwise(indptr)])

    double.segment_csr = segment_csr
    monkeypatch.setitem(sys.modules, 'torch_scatter', double)
    backends.missing_package.cache_clear()
    yield
    backends.missing_package.cache_clear()
