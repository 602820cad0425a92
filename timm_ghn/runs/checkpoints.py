"""Checkpoints of a run, whole or not at all.

accelerate writes the state into a folder with a temporary name; a manifest with the size and the SHA-256 of each file
goes in last, everything is flushed to the disk, and only then the folder gets its name. A folder whose files do not
agree with its manifest is passed over for the one before it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
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

_NAME = re.compile(r'step_(\d+)')


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run; all of its processes call :meth:`save` and :meth:`load`.

    Attributes:
        folder: Where they are.
        accelerator: Holds the model, the optimiser and so on.
        identity: What must be the same for a run that goes on, as plain values.
        average: Averaged weights.
        keep: How many to keep.
    """

    folder: Path
    accelerator: Accelerator
    identity: Mapping[str, Any]
    average: nn.Module | None = None
    keep: int = 2

    def save(self, progress: dict[str, Any]) -> None:
        """Write a checkpoint and remove the oldest.

        Args:
            progress: Where the run stands, as plain values; its 'step' names the checkpoint.

        Raises:
            TrainingError: if it cannot be written; those before it are still there.
        """
        place = self.folder / f'step_{progress["step"]:08d}'
        partial = place.with_name(place.name + PARTIAL)

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean_up(self.folder)
            partial.mkdir()

        def finish() -> None:
            if self.average is not None:
                write_state_dict(self.average.state_dict(), partial / AVERAGE, {})
            write_json({'progress': progress, 'run': to_plain(self.identity)}, partial / PROGRESS)
            write_json(manifest_of(partial), partial / MANIFEST)
            flush((*partial.rglob('*'), partial))
            if place.exists():
                shutil.rmtree(place)
            partial.rename(place)
            flush((self.folder,))
            found = checkpoints_in(self.folder)
            # What lies ahead was damaged, or this run would have gone on from there.
            kept = found[: found.index(place) + 1][-self.keep :]
            for old in found:
                if old not in kept:
                    shutil.rmtree(old)

        main = self.accelerator.is_main_process
        save_state = functools.partial(self.accelerator.save_state, str(partial))
        for action, acts in ((prepare, main), (save_state, True), (finish, main)):
            cause: Exception | None = None
            try:
                if acts:
                    action()
            except (OSError, RuntimeError, SafetensorError) as error:
                # torch and safetensors have errors of their own for a full disk.
                cause = error
            # No process may go on as if the checkpoint of all were there.
            if any_process(self.accelerator, cause is not None):
                raise self._not_written(place, cause) from cause

    def _not_written(self, place: Path, cause: Exception | None) -> TrainingError:
        if self.accelerator.is_main_process:
            clean_up(self.folder)
        last = checkpoints_in(self.folder)
        return TrainingError(
            f'the checkpoint {str(place)!r} cannot be written: {cause or "another process failed"}; '
            + (f'the last good one is {last[-1].name!r}: ' if last else 'there is none before it: ')
            + 'make room and start again with --resume'
        )

    def load(self) -> dict[str, Any] | None:
        """Read the last good checkpoint: where the run stands; None if there is no checkpoint.

        Raises:
            CheckpointError: if the last good one belongs to another run.
        """
        if self.accelerator.is_main_process:
            clean_up(self.folder)
        self.accelerator.wait_for_everyone()
        for place in reversed(checkpoints_in(self.folder)):
            flaw = damage(place)
            if flaw is not None:
                if self.accelerator.is_main_process:
                    warnings.warn(f'the checkpoint {str(place)!r} is passed over: {flaw}', stacklevel=2)
                continue
            read = read_json(place / PROGRESS)
            self._check_run(place, read['run'])
            self.accelerator.load_state(str(place))
            if self.average is not None:
                self.average.load_state_dict(load_file(place / AVERAGE))
            found: dict[str, Any] = read['progress']
            return found
        return None

    def _check_run(self, place: Path, before: dict[str, Any]) -> None:
        changed = [
            f'{name} was {before.get(name)!r} and is {value!r}'
            for name, value in sorted(to_plain(self.identity).items())
            if before.get(name) != value
        ]
        if changed:
            raise CheckpointError(
                f'{str(place)!r} is of another run ({"; ".join(changed[:3])}); choose another --output, or the same '
                'options'
            )


def checkpoints_in(folder: Path) -> list[Path]:
    """Those that are complete, the oldest first."""
    found = [place for place in folder.glob('step_*') if _NAME.fullmatch(place.name) and place.is_dir()]
    return sorted(found, key=lambda place: int(place.name.removeprefix('step_')))


def damage(place: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    reading = 'manifest'
    try:
        manifest = read_json(place / MANIFEST)
        for name, (size, digest) in manifest.items():
            file = place / name
            if not file.is_file():
                return f'{name} is missing'
            if file.stat().st_size != size:
                return f'{name} has {file.stat().st_size} of {size} bytes'
            if sha256_of(file) != digest:
                return f'{name} has changed'
        if PROGRESS not in manifest:
            return f'{PROGRESS} is missing'
        reading = 'progress'
        read = read_json(place / PROGRESS)
        if not all(isinstance(read[part], dict) for part in ('progress', 'run')):
            raise ValueError('it does not say where which run stands')
    except (CheckpointError, OSError, ValueError, TypeError, LookupError) as error:
        return f'its {reading} cannot be read ({" ".join(str(error).split()) or type(error).__name__})'
    return None


def clean_up(folder: Path) -> None:
    """Remove what killed runs left unfinished."""
    for partial in folder.glob(f'step_*{PARTIAL}'):
        shutil.rmtree(partial, ignore_errors=True)


def manifest_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file in a folder."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, sha256_of(path)) for path in files}


def any_process(accelerator: Accelerator, value: bool) -> bool:
    """Whether a value is true in any process; also the point where they wait for one another."""
    flag = torch.tensor([float(value)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction='sum').item() > 0)


def to_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(dict(values), default=str))
    return found
