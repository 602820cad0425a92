"""Whatever a file holds, reading it ends in a GHN or in an error of ours; nothing in it runs, hangs or takes memory.

``pytest -m slow tests/hub/test_fuzz.py`` runs 17,500 cases; the default run 105.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch
from official import WRITERS, official_state, options

if sys.platform != 'linux':
    pytest.skip('its limits are those of Linux', allow_module_level=True)

from fuzz import (
    CANARY,
    forget_peak,
    limits,
    mutate_json,
    mutate_safetensors,
    payloads,
    pickle_mutation,
    resident,
    run_cases,
    zip_mutation,
)

from timm_ghn.errors import GHNError
from timm_ghn.hub import GHNEntry, load_ghn
from timm_ghn.hub.converted import read_converted
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHN, GHNConfig

OFFICIAL = ('torch', 'legacy', 'joblib', 'trainer')
TARGETS = ('config', 'header', 'kept', *OFFICIAL)
#: Cases of each target.
MANY = 2500
FEW = 15


def fuzz(target: str, tmp_path: Path, ghn: GHN, marker: Path, *, cases: int, seed: int) -> dict[str, int]:
    limited = {'cases': cases, 'seed': seed, 'expected': GHNError, 'marker': marker}
    if target in ('config', 'header'):
        save_ghn(ghn, tmp_path / 'ghn')
        name, mutate = {
            'config': ('config.json', mutate_json),
            'header': ('model.safetensors', mutate_safetensors),
        }[target]
        return run_cases(tmp_path / 'ghn' / name, mutate, lambda: load_ghn(tmp_path / 'ghn'), **limited)
    if target == 'kept':
        return fuzz_conversions(tmp_path, ghn, limited)
    path = tmp_path / 'ghn.pt'
    state = official_state(ghn)
    # All but joblib's state their configuration.
    saved = state if target == 'joblib' else {'state_dict': state, 'config': options(ghn), 'epoch': 3}
    if target == 'trainer':
        saved |= trained(ghn)
    WRITERS['torch' if target == 'trainer' else target](saved, path)
    mutate = zip_mutation(marker) if target in ('torch', 'trainer') else pickle_mutation(marker)
    return run_cases(path, mutate, lambda: load_ghn(path), **limited)


def trained(ghn: GHN) -> dict[str, object]:
    """What a trainer adds to its checkpoints."""
    optimizer = torch.optim.AdamW(ghn.parameters())
    ghn.embed.weight.sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(lr=4e-4, betas=(0.9, 0.99), device=torch.device('cpu'), heads=[1, 2])
    return {'optimizer': optimizer.state_dict(), 'args': arguments, 'step': 100}


def fuzz_conversions(tmp_path: Path, ghn: GHN, limited: dict[str, object]) -> dict[str, int]:
    """The configuration of a conversion: whatever it says, the GHN is the one of the official file."""
    path = WRITERS['joblib'](official_state(ghn), tmp_path / 'ghn.pt')
    entry = GHNEntry('mine', '', 'joblib', ghn.config, repo_id='user/repo', filename='ghn.pt')
    read_converted(path, entry, tmp_path / 'cache')
    (place,) = (tmp_path / 'cache').iterdir()
    expected = ghn.state_dict()

    def read() -> None:
        found = read_converted(path, entry, tmp_path / 'cache').state_dict()
        assert all(found[key].equal(value) for key, value in expected.items())

    return run_cases(place / 'config.json', mutate_json, read, **limited)


def expect_both(target: str, ended: dict[str, int]) -> None:
    """Some mutations must have been refused, else they are too tame; a changed conversion is always replaced."""
    refused = sum(count for how, count in ended.items() if how != 'read')
    assert bool(refused) != (target == 'kept'), ended


@pytest.fixture(autouse=True)
def _not_on_the_disk(monkeypatch):
    """A conversion waits until it is on the disk; thousands of them need not."""
    monkeypatch.setattr('timm_ghn.files.os.fsync', lambda _: None)


@pytest.mark.parametrize('target', TARGETS)
def test_some_cases(target, tmp_path, small_ghn, marker):
    expect_both(target, fuzz(target, tmp_path, small_ghn, marker, cases=FEW, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize('target', TARGETS)
def test_many_cases(target, tmp_path, small_ghn, marker):
    ended = fuzz(target, tmp_path, small_ghn, marker, cases=MANY, seed=1)
    assert sum(ended.values()) == MANY
    expect_both(target, ended)


# That the fuzzing would notice


def test_a_payload_that_runs_is_noticed(tmp_path, marker):
    path = tmp_path / 'file'
    path.write_bytes(payloads(marker)[0] + b'.')
    with pytest.raises(AssertionError, match='executed'):
        run_cases(
            path,
            lambda rng, data: data,
            lambda: pickle.loads(path.read_bytes()),
            cases=1, seed=0, expected=GHNError, marker=marker,
        )  # fmt: skip
    assert marker.exists()
    assert any(event.startswith('os.system') for event in CANARY.sung)


@pytest.mark.parametrize(
    ('read', 'match'),
    [
        (lambda: bytearray(4 << 30), 'MemoryError'),
        (lambda: torch.ones(150_000_000), 'TooLargeError'),
        (lambda: {}['x'], 'KeyError'),
        (lambda: [None for _ in iter(int, 1)], 'TooSlowError|MemoryError'),
        (lambda: time.sleep(60), 'TooSlowError'),
        (lambda: sys.exit(3), 'SystemExit'),
    ],
    ids=['addresses', 'memory', 'crash', 'endless', 'waiting', 'exit'],
)
def test_what_must_not_happen_is_noticed(tmp_path, marker, monkeypatch, read, match):
    if 'TooSlow' in match:
        monkeypatch.setattr('fuzz.MAX_SECONDS', 0.5)
        monkeypatch.setattr('fuzz.MAX_WAIT', 0.5)
    path = tmp_path / 'file'
    path.touch()
    torch.ones(1)  # the first operation of torch takes addresses for its threads
    with pytest.raises(AssertionError, match=f'seed 7, case 0: ({match})'):
        run_cases(path, lambda rng, data: data, read, cases=1, seed=7, expected=GHNError, marker=marker)


# Sizes that lie


def test_sizes_that_no_memory_holds_are_refused_at_once(tmp_path, small_ghn, marker):
    save_ghn(small_ghn, tmp_path / 'ghn')
    path = tmp_path / 'ghn' / 'config.json'
    record = json.loads(path.read_text())
    huge = [
        {'hid': 10**12}, {'num_classes': 10**12}, {'layers': 10**12}, {'heads': 10**12}, {'max_shape': [10**6] * 4},
        {'max_shape': [8, 8, 10**6, 10**6]}, {'decoder': 'templates', 'templates': 10**12, 'codes': 10**12},
        {'decoder': 'templates', 'codes': 10**6}, {'hid': 4 * 10**5, 'heads': 1}, {'layers': 10**5},
        {'mean': [10**400, 0, 0]}, {'std': [1, 1, 10**400]},
    ]  # fmt: skip
    with limits():
        for changes in huge:
            path.write_text(json.dumps(record | changes))
            with pytest.raises(GHNError):
                load_ghn(tmp_path / 'ghn')


def test_sizes_up_to_those_of_the_file_cost_little(tmp_path):
    """A configuration that the file is just large enough for: the GHN is built without memory before it is refused."""
    config = GHNConfig(hid=8, max_shape=(8, 8, 3, 3), num_classes=5, layers=2, heads=2)
    save_ghn(GHN(config), tmp_path / 'ghn')
    path = tmp_path / 'ghn' / 'config.json'
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {'num_classes': 10_000, 'hid': 9_000, 'heads': 8, 'layers': 40}))
    before = resident('VmRSS')
    forget_peak()
    with pytest.raises(GHNError):
        load_ghn(path.parent)
    assert resident('VmHWM') - before < 300e6
