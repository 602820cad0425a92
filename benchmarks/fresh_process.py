"""What benchmarks/predict.py measures in processes of their own: memory, loading and importing (memory: Linux only)."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from pathlib import Path

import timm_ghn


def in_new_process(code: str, *argv: str) -> list[float]:
    """Numbers that a fresh interpreter prints on its last line."""
    script = [sys.executable, '-W', 'ignore', '-c', code, *argv]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.strip().splitlines()[-1].split()]


_PEAK = """
import re, sys, time
from pathlib import Path
import torch, timm, timm_ghn
sys.path.insert(0, sys.argv[1])
import predict
torch.set_num_threads(1)

def memory(field):
    return int(re.search(field + r':\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024

def forget_peak():
    Path('/proc/self/clear_refs').write_text('5')
"""

_PREDICTING = (
    _PEAK
    + """
ghn, model = predict.ghn_of(sys.argv[2], torch.device('cpu')), timm.create_model(sys.argv[3])
timm_ghn.ghn_init(timm.create_model('test_resnet'), ghn, postprocess=None)  # buffers of libraries, lazy imports
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
forget_peak()
before = memory('VmRSS')
timm_ghn.ghn_init(model, ghn, head='predict', postprocess=None)
print(size, memory('VmHWM') - before)
"""
)

_LOADING = (
    _PEAK
    + """
timm_ghn.load_ghn('ghn_tiny') if 'ghn_tiny' in predict.known_ghns() else None
forget_peak()
before, start, wall = memory('VmRSS'), time.process_time(), time.perf_counter()
ghn = timm_ghn.load_ghn(sys.argv[2])
print(time.process_time() - start, time.perf_counter() - wall, memory('VmHWM') - before, memory('VmHWM'))
"""
)

_IMPORTING = """
import sys, time
import timm
start = time.process_time()
import timm_ghn
print(time.process_time() - start)
"""


def memory(name: str, network: str) -> tuple[float, float]:
    """MiB of a model, and the most that ghn_init takes beside the GHN and the model."""
    size, extra = in_new_process(_PREDICTING, str(Path(__file__).parent), name, network)
    return size, extra


def load(ghn: timm_ghn.GHN) -> tuple[float, ...]:
    """CPU seconds, seconds, MiB above the start and MiB in all to load a GHN, its file being in the disk cache."""
    with tempfile.TemporaryDirectory() as folder:
        timm_ghn.save_ghn(ghn, folder)
        del ghn
        gc.collect()
        return tuple(in_new_process(_LOADING, str(Path(__file__).parent), folder))


def imports(repeat: int) -> float:
    """CPU seconds of importing this package when timm is imported already."""
    return min(in_new_process(_IMPORTING)[0] for _ in range(repeat))
