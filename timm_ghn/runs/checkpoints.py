"""Checkpoints of a run, whole or not at all.

accelerate writes the state into a folder with another name; a manifest with the size and the hash of each file goes in
last, everything is flushed to the disk, and only then the folder gets its name. A folder whose files do not agree with
its manifest is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from timm_ghn.errors import CheckpointError, TrainingError

MANIFEST = 'manifest.json'
PROGRESS = 'progress.json'
AVERAGE = 'average.safetensors'

_NAME = re.compile(r'step_(\d+)')
_PARTIAL = '.partial'


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    progress: dict[str, Any],
    *,
    run: dict[str, Any],
    average: nn.Module | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint; all processes call it.

    Args:
        folder: Of the checkpoints.
        accelerator: Holds the model, the optimiser and so on.
        progress: Where the run stands, as plain values; its 'step' names the checkpoint.
        run: What must be the same for a run that goes on from here, as plain values.
        average: Averaged weights.
        keep: How many to keep.

    Raises:
        TrainingError: if it cannot be written; those before it are still there.
    """
    place = folder / f'step_{progress["step"]:08d}'
    partial = place.with_name(place.name + _PARTIAL)
    written = None
    try:
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            tidy(folder)
            partial.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors have errors of their own for a full disk.
        written = error
    # No process may go on as if the checkpoint of all were there.
    failed = any_process(accelerator, written is not None)
    if accelerator.is_main_process and not failed:
        try:
            if average is not None:
                save_file(_tensors(average), partial / AVERAGE)
            _write_json(partial / PROGRESS, {'progress': progress, 'run': run})
            _write_json(partial / MANIFEST, _manifest(partial))
            _flush(partial)
            if place.exists():
                shutil.rmtree(place)
            os.replace(partial, place)
            _flush_folder(folder)
            found = _checkpoints(folder)
            # What lies ahead was damaged, or this run would have gone on from there.
            kept = found[: found.index(place) + 1][-keep:]
            for old in found:
                if old not in kept:
                    shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            written = error
    failed = any_process(accelerator, written is not None)
    if failed:
        if accelerator.is_main_process:
            tidy(folder)
        last = _checkpoints(folder)
        raise TrainingError(
            f'the checkpoint {str(place)!r} cannot be written: {written or "another process failed"}; '
            + (f'the last good one is {last[-1].name!r}: ' if last else 'there is none before it: ')
            + 'make room and start again with --resume'
        ) from written
    return place


def load_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    *,
    run: dict[str, Any],
    defaults: dict[str, Any] | None = None,
    average: nn.Module | None = None,
) -> dict[str, Any] | None:
    """Read the last good checkpoint; all processes call it.

    Args:
        folder: Of the checkpoints.
        accelerator: Gets the state of the model, the optimiser and so on.
        run: What must be as it was when the checkpoint was written.
        defaults: What entries of ``run`` were that a checkpoint of an earlier version does not have.
        average: Gets the averaged weights.

    Returns:
        Where the run stands; None if there is no checkpoint.

    Raises:
        CheckpointError: if the last good one belongs to another run.
    """
    for place in reversed(_checkpoints(folder)):
        flaw = damage(place)
        if flaw is not None:
            if accelerator.is_main_process:
                warnings.warn(f'the checkpoint {str(place)!r} is passed over: {flaw}', stacklevel=2)
            continue
        read = _read_json(place / PROGRESS)
        _check_run(place, {**(defaults or {}), **read['run']}, run)
        accelerator.load_state(str(place))
        if average is not None:
            average.load_state_dict(load_file(place / AVERAGE))
        found: dict[str, Any] = read['progress']
        return found
    return None


def damage(place: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    reading = 'manifest'
    try:
        manifest = _read_json(place / MANIFEST)
        for name, (size, digest) in manifest.items():
            file = place / name
            if not file.is_file():
                return f'{name} is missing'
            if file.stat().st_size != size:
                return f'{name} has {file.stat().st_size} of {size} bytes'
            if _digest(file) != digest:
                return f'{name} has changed'
        if PROGRESS not in manifest:
            return f'{PROGRESS} is missing'
        reading = 'progress'
        read = _read_json(place / PROGRESS)
        if not all(isinstance(read[part], dict) for part in ('progress', 'run')):
            raise ValueError('it does not say where which run stands')
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        return f'its {reading} cannot be read ({" ".join(str(error).split()) or type(error).__name__})'
    return None


def tidy(folder: Path) -> None:
    """Remove what runs that were killed left unfinished, and give its name to a checkpoint that lacks no more."""
    for partial in folder.glob(f'step_*{_PARTIAL}'):
        place = partial.with_name(partial.name.removesuffix(_PARTIAL))
        if damage(partial) is None and not place.exists():
            os.replace(partial, place)
        else:
            shutil.rmtree(partial, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Those that have their name, the oldest first."""
    found = [place for place in folder.glob('step_*') if _NAME.fullmatch(place.name) and place.is_dir()]
    return sorted(found, key=lambda place: int(place.name.removeprefix('step_')))


def _check_run(place: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    was, now = (json.loads(json.dumps(values, default=str)) for values in (was, now))
    changed = [
        f'{name} was {was.get(name)!r} and is {value!r}'
        for name, value in sorted(now.items())
        if was.get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f'{str(place)!r} is of another run ({"; ".join(changed[:3])}); choose another --output, or the same options'
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    # Tied tensors share memory, which the format has no word for.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, _digest(path)) for path in files}


def _digest(path: Path) -> str:
    with path.open('rb') as file:
        found = hashlib.sha256()
        read: Callable[[], bytes] = lambda: file.read(1 << 20)  # noqa: E731
        for part in iter(read, b''):
            found.update(part)
    return found.hexdigest()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8'))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False), encoding='utf-8')


def _flush(folder: Path) -> None:
    """Have all files of a folder on the disk before it gets its name."""
    for path in folder.rglob('*'):
        if path.is_file():
            with path.open('rb') as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name != 'posix':
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def any_process(accelerator: Accelerator, value: bool) -> bool:
    """Whether a value is true in any process; also the point where they wait for one another."""
    flag = torch.tensor([float(value)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction='sum').item() > 0)
