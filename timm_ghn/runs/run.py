"""What all runs of training do: go on from a checkpoint, stop in time, say and write down how it goes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from torch import nn

from timm_ghn.errors import ConfigError, TrainingError
from timm_ghn.generators import kept_generators
from timm_ghn.runs.checkpoints import any_process, load_checkpoint, save_checkpoint, tidy
from timm_ghn.runs.results import Results

if sys.platform != 'win32':
    import fcntl

#: Folder of the checkpoints in the output folder.
CHECKPOINTS = 'checkpoints'
#: File in the output folder that the main process of a run locks.
_LOCK = '.lock'
#: Steps after which several processes ask one another whether to end; each time they wait for the slowest.
_AGREE = 16


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave what belongs to the whole process as a run finds it: accelerate's settings, the random generators.

    Settings of accelerate that the caller made, by an accelerator of their own, stay too, and hold for the run.
    """
    own = not is_initialized()
    try:
        with kept_generators():
            yield
    finally:
        if own:
            # Else the next run would have the precision of this one, whatever it asks for.
            AcceleratorState._reset_state()


def local_arguments(arguments: dict[str, Any]) -> list[str]:
    """Which arguments name files or folders of this machine: those who read the results elsewhere cannot tell."""
    named = {name: arguments.get(name) for name in ('dataset', 'init')}
    return [name for name, value in named.items() if value and os.path.exists(os.path.expanduser(str(value)))]


class RunOptions(Protocol):
    """What the options of every run say."""

    @property
    def output(self) -> Path:
        """Folder of all that the run writes."""

    @property
    def resume(self) -> bool:
        """Whether to go on from the last good checkpoint."""

    @property
    def time_limit(self) -> float | None:
        """Minutes after which to stop."""

    @property
    def checkpoint_hist(self) -> int:
        """Checkpoints to keep."""

    @property
    def mixed_precision(self) -> str | None:
        """Precision of the networks; None as accelerate says."""

    @property
    def log_with(self) -> str | None:
        """A tracker."""


@contextlib.contextmanager
def exclusive_output(options: RunOptions, *, main: bool) -> Iterator[None]:
    """Keep other runs out of the output folder until the context ends, and refuse one that holds a run already.

    The main process locks a file in the folder; the lock ends with the process, however that ends. Where the system
    has no such locks (Windows, some network file systems), nothing is locked.

    Args:
        options: Of the run.
        main: Whether this is the main process.

    Raises:
        ConfigError: if another run is at work there, or if there are checkpoints and the run is not to go on.
    """
    with _locked(options.output) if main else contextlib.nullcontext():
        if not options.resume and any((options.output / CHECKPOINTS).glob('step_*[0-9]')):
            raise ConfigError(f'{str(options.output)!r} holds a run: go on with --resume, or choose another --output')
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if sys.platform == 'win32':
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # A lock of the process, which workers that are forked do not share: they may outlive it by seconds.
    with (folder / _LOCK).open('w') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f'another run is at work in {str(folder)!r}: wait for its end, or choose another --output'
                ) from error
        yield


def build_accelerator(options: RunOptions, module: str, **arguments: Any) -> Accelerator:
    """The accelerator of a run; in several processes where ``accelerate launch`` started them.

    Args:
        options: Of the run.
        module: What was launched, for the warning that processes are missing.
        **arguments: More of accelerate's.

    Raises:
        ConfigError: if accelerate refuses the options, or if the tracker is not installed.
    """
    if _lost_processes():
        warnings.warn(
            'accelerate launch starts one process on a CPU, whatever --num_processes says, unless MPI starts them; '
            f"'accelerate launch --multi_gpu --num_processes N -m {module}' starts N, on a CPU too",
            stacklevel=3,
        )
    try:
        accelerator = Accelerator(
            # Without this, several processes that another launcher started would not find one another on a CPU.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=options.mixed_precision,
            log_with=options.log_with,
            project_dir=options.output,
            **arguments,
        )
    except ValueError as error:
        raise ConfigError(f'accelerate refuses the options: {error}') from error
    if options.log_with is not None and not accelerator.log_with:
        raise ConfigError(f'the tracker {options.log_with!r} is not installed; install it, or leave out --log-with')
    return accelerator


def _lost_processes() -> bool:
    """Whether accelerate launch was asked for several processes on a CPU and started this one alone."""
    ranks = ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'PMI_SIZE', 'OMPI_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_SIZE')
    on_cpu = os.environ.get('ACCELERATE_USE_CPU', '').lower() in ('1', 'true', 'yes')
    return on_cpu and 'MASTER_PORT' in os.environ and not any(name in os.environ for name in ranks)


class Run:
    """A run in progress.

    Args:
        options: Of the run.
        accelerator: Its processes.
        started: When it began, of ``time.monotonic``.
        logger: Where the main process says what it does.
    """

    def __init__(self, options: RunOptions, accelerator: Accelerator, started: float, logger: logging.Logger) -> None:
        self._settings = options
        self.accelerator = accelerator
        self.started = started
        self.facts: dict[str, Any] = {}
        self.results: Results | None = None
        self._logger = logger
        self._terminated = False
        self._asked = 0
        self._agreed = False

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Let SIGTERM stop the run with a checkpoint, and end its trackers and processes when the context does."""
        with self._terminable():
            try:
                yield
            finally:
                self.accelerator.end_training()
                self.accelerator.free_memory()

    @contextlib.contextmanager
    def _terminable(self) -> Iterator[None]:
        """Let SIGTERM, by which schedulers announce the end of a job, stop the run with a checkpoint.

        The process ends by it when the context does. A second one ends it at once.
        """
        previous = signal.getsignal(signal.SIGTERM)
        if previous is None or threading.current_thread() is not threading.main_thread():
            # A handler that Python cannot put back, or a thread that may not set one.
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._terminated = True
            signal.signal(signal.SIGTERM, previous)

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            if self._terminated:
                signal.raise_signal(signal.SIGTERM)

    def _restored(self, identity: dict[str, Any], average: nn.Module | None, entry: str) -> dict[str, Any] | None:
        """Read the last good checkpoint if the run is to go on, and open the results.

        Args:
            identity: What must be as it was.
            average: Gets the averaged weights.
            entry: Of the progress and of the results: lines behind where the progress stands are dropped.

        Returns:
            The progress; None for a run that begins.
        """
        options, main = self._settings, self.accelerator.is_main_process
        found = None
        if options.resume:
            if main:
                tidy(options.output / CHECKPOINTS)
            self.accelerator.wait_for_everyone()
            found = load_checkpoint(
                options.output / CHECKPOINTS,
                self.accelerator,
                run=identity,
                defaults=self._defaults(),
                average=average,
            )
        if main:
            self.results = Results(options.output, resume=(entry, found[entry]) if found is not None else None)
        return found

    def _defaults(self) -> dict[str, Any]:
        """What the options are that a run of before did not have yet."""
        return {field.name: field.default for field in dataclasses.fields(self._settings)}  # type: ignore[arg-type]

    def _expect_finite_weights(self, step: int, *modules: nn.Module | None) -> None:
        """Refuse to go on, and above all to write anything, with weights that are lost; all processes call it.

        Raises:
            TrainingError: if parameters or buffers are not finite.
        """
        kept = [module for module in modules if module is not None]
        finite = [parameter.isfinite().all() for module in kept for parameter in module.parameters()]
        # Constant buffers may be masks of minus infinity.
        finite += [(b < math.inf).all() for module in kept for b in module.buffers() if b.is_floating_point()]
        lost = not bool(torch.stack(finite).all())
        if any_process(self.accelerator, lost):
            left = any((self._settings.output / CHECKPOINTS).glob('step_*[0-9]'))
            raise TrainingError(
                f'weights are not finite after step {step}; begin again with a smaller --lr or --clip-grad, or from '
                'another start' + ('. The checkpoints before it are in the output folder' if left else '')
            )

    def _save(self, progress: dict[str, Any], identity: dict[str, Any], average: nn.Module | None) -> None:
        options = self._settings
        save_checkpoint(
            options.output / CHECKPOINTS,
            self.accelerator,
            progress,
            run=identity,
            average=average,
            keep=options.checkpoint_hist,
        )

    def _late(self) -> bool:
        """Whether the time is up or the process is to end; all processes agree."""
        limit = self._settings.time_limit
        late = self._terminated or (limit is not None and time.monotonic() - self.started > 60 * limit)
        if self.accelerator.num_processes == 1:
            return late
        self._asked += 1
        if not self._agreed and (limit is not None or self._asked % _AGREE == 0):
            self._agreed = any_process(self.accelerator, late)
        return self._agreed

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        if self.results is not None:
            self.results.add(kind, values)

    def _say(self, text: str, *values: Any) -> None:
        if self.accelerator.is_main_process:
            self._logger.info(text, *values)
