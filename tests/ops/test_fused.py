"""The Triton kernels, in Triton's interpreter where there is no GPU.

The interpreter is chosen when triton is imported, so the tests that need it run in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_ghn.ops import Edges

pytest.importorskip('triton', reason='triton comes with torch on Linux only')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
HERE = Path(__file__).resolve()
interpreted = pytest.mark.skipif(not INTERPRETED, reason='runs in a process of its own, started by the test below')


@interpreted
@pytest.mark.parametrize('index', [torch.int32, torch.int64])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_wrong_indices_read_nothing(index, dtype):
    """Schedules that :meth:`Edges.of` would refuse: the wrong edges contribute zeros, the others what they should."""
    from timm_ghn.ops.fused import fused_dots, fused_sums

    source = torch.tensor([0, 5, 1, -1, 2, 2**31 - 1, 2], dtype=index)
    pointer = torch.tensor([-3, 2, 5, 99], dtype=index)
    messages, weight = torch.randn(3, 4).to(dtype), torch.rand(7).to(dtype)
    guard = torch.full((2, 4), torch.nan, dtype=dtype)
    fenced = torch.cat((guard, messages, guard))[2:5]  # NaN on both sides: reading them would show
    carried = torch.where(((source >= 0) & (source < 3))[:, None], messages[source.clamp(0, 2)] * weight[:, None], 0)
    expected = torch.stack([carried[:2].sum(0), carried[2:5].sum(0), carried[5:].sum(0)])
    tolerance = 1e-6 if dtype == torch.float32 else 5e-2
    found = fused_sums(fenced, Edges(source, pointer, 3), weight)
    assert torch.allclose(found.float(), expected.float(), rtol=0, atol=tolerance)
    edges = Edges(source, pointer, 3)
    target = torch.tensor([0, 0, 1, 7, -1, 2, 2], dtype=index)
    vars(edges)['target_E'] = target
    arriving = torch.cat((guard, torch.randn(3, 4).to(dtype), guard))[2:5]
    known = (source >= 0) & (source < 3) & (target >= 0) & (target < 3)
    dots = torch.where(known, (messages[source.clamp(0, 2)] * arriving[target.clamp(0, 2)]).sum(1), 0)
    assert torch.allclose(fused_dots(fenced, arriving, edges).float(), dots.float(), rtol=0, atol=tolerance)


@pytest.mark.skipif(INTERPRETED, reason='this is the process that it starts')
def test_kernels_in_the_interpreter():
    """The battery of all backends, GHN-2 on them, and what is above."""
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', 'triton or wrong_indices']
    files = (HERE, HERE.with_name('test_aggregation.py'), HERE.parents[1] / 'nn' / 'test_gated.py')
    run = subprocess.run(
        [*command, *map(str, files)],
        cwd=HERE.parents[2],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r'(\d+) passed', run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) >= 8
