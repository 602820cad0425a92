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

HERE = Path(__file__).resolve()


@pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='this is the process that it starts')
def test_kernels_in_the_interpreter():
    """The laws of all backends, and GHN-2 on them."""
    pytest.importorskip('triton', reason='triton comes with torch on Linux only')
    files = (HERE.with_name('test_aggregation.py'), HERE.parents[1] / 'nn' / 'test_gated.py')
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', 'triton', *map(str, files)],
        cwd=HERE.parents[2],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r'(\d+) passed', run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) >= 4
