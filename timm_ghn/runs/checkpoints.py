"""Checkpoints of a run, whole or not at all.

accelerate writes the state into a folder with a temporary name; a manifest with the SHA-256 of each file goes in last,
everything is flushed to the disk, and only then the folder gets its name. A folder whose files do not agree with its
manifest is passed over for the one before it.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from timm_ghn.errors import CheckpointError, TrainingError
from timm_ghn.files import PARTIAL, flush, read_json, sha256_of, write_json, write_state_dict

#: Folder of the checkpoints in the output folder of a run.
CHECKPOINTS = 'checkpoints'
MANIFEST = 'manifest.json'
PROGRESS = 'progress.json'
AVERAGE = 'average.safetensors'


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    progress: dict[str, Any],
    *,
    identity: Mapping[str, Any],
    average: nn.Module | None,
    keep: int,
) -> None:
    """Write a checkpoint and remove all but the last ``keep``; all processes call it.

    The 'step' of the progress names it; ``identity`` is what must be the same for a run that goes on.

    Raises:
        TrainingError: if it cannot be written; those before it are still there.
    """
    place = folder / f'step_{progress["step"]:08d}'
    partial = place.with_name(place.name + PARTIAL)
    main = accelerator.is_main_process
    try:
        if main:
            clean_up(folder)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if main:
            if average is not None:
                write_state_dict(average.state_dict(), partial / AVERAGE, {})
            write_json({'progress': progress, 'run': identity}, partial / PROGRESS)
            write_json(manifest_of(partial), partial / MANIFEST)
            flush((*partial.rglob('*'), partial))
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            flush((folder,))
            found = checkpoints_in(folder)
            # What lies ahead was damaged, or this run would have gone on from there.
            kept = found[: found.index(place) + 1][-keep:]
            for old in set(found) - set(kept):
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors have errors of their own for a full disk.
        if main:
            clean_up(folder)
        raise TrainingError(
            f'the checkpoint {str(place)!r} cannot be written: {error}; those before it are still there: make room and '
            'start again with --resume'
        ) from error


def load_checkpoint(
    folder: Path, accelerator: Accelerator, *, identity: Mapping[str, Any], average: nn.Module | None
) -> dict[str, Any] | None:
    """Read the last good checkpoint: where the run stands; None if there is no checkpoint.

    Raises:
        CheckpointError: if the last good one belongs to another run.
    """
    for place in reversed(checkpoints_in(folder)):
        if flaw := damage(place):
            if accelerator.is_main_process:
                warnings.warn(f'the checkpoint {str(place)!r} is passed over: {flaw}', stacklevel=2)
            continue
        found = read_json(place / PROGRESS)
        before = found['run']
        changed = [
            f'{name} was {before.get(name)!r} and is {value!r}'
            for name, value in sorted(identity.items())
            if before.get(name) != value
        ]
        if changed:
            raise CheckpointError(
                f'{str(place)!r} is of another run ({"; ".join(changed[:3])}); choose another --output, or the same '
                'options'
            )
        accelerator.load_state(str(place))
        if average is not None:
            average.load_state_dict(load_file(place / AVERAGE))
        return dict(found['progress'])
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Those that are complete, the oldest first."""
    # Others may keep a step_5_copy there, which is not ours to remove.
    return sorted(place for place in folder.glob('step_*') if re.fullmatch(r'step_\d+', place.name))


def damage(place: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        found = manifest_of(place)
        changed = [name for name, entry in read_json(place / MANIFEST).items() if found.get(name) != entry]
    except (CheckpointError, OSError) as error:
        return str(error)
    return f'{changed[0]} is missing or has changed' if changed else None


def clean_up(folder: Path) -> None:
    """Remove what killed runs left unfinished."""
    for partial in folder.glob(f'step_*{PARTIAL}'):
        shutil.rmtree(partial, ignore_errors=True)


def manifest_of(folder: Path) -> dict[str, list[int | str]]:
    """Size and SHA-256 of each file in a folder."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256_of(path)] for path in files}


def any_process(accelerator: Accelerator, value: bool) -> bool:
    """Whether a value is true in any process; also the point where they wait for one another."""
    flag = torch.tensor([float(value)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction='sum').item() > 0)
