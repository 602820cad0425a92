"""The engine of a training run: it goes on from a checkpoint, stops in time, keeps the log, and ends.

A subclass of :class:`Run` says what a step, an epoch and an evaluation are.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import datetime
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import InitProcessGroupKwargs
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from timm_ghn.contexts import restore_global_state
from timm_ghn.errors import ConfigError, TrainingError
from timm_ghn.runs.checkpoints import CHECKPOINTS, any_process, checkpoints_in, load_checkpoint, save_checkpoint
from timm_ghn.runs.recipes import RunOptions
from timm_ghn.runs.results import CURVES, RESULTS, Results, read_results, versions

if sys.platform != 'win32':
    import fcntl

#: File in the output folder that the main process of a run locks.
_LOCK = '.lock'
#: How long processes on CPUs wait for one another, by a race or while they are suspended; torch's half hour is too
#: short. One that dies is noticed at once, since its connections close.
_PATIENCE = datetime.timedelta(days=1)
#: Steps between two times that processes on GPUs ask one another whether to stop, for which they wait for the GPU.
_ASK_STEPS = 16
_WAY_OUT = 'begin again with a smaller --lr or --clip-grad, or from another start'


@dataclasses.dataclass
class Progress:
    """Where a run stands, as checkpoints keep it: optimiser steps, and the time spent before this process went on."""

    step: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
        output: Folder with results.jsonl, curves.png, checkpoints and weights.
        steps: Optimiser steps done.
        finished: Whether all are; else the run can go on with ``resume``.
        log: The lines of results.jsonl.
        pushed: Address of the commit, or of the pull request, on the Hub, in the process that made it.
    """

    output: Path
    steps: int
    finished: bool
    log: tuple[dict[str, Any], ...]
    pushed: str | None = None

    @property
    def epochs(self) -> tuple[dict[str, Any], ...]:
        """The metrics after each epoch of fine-tuning; those of epoch 0 are from before the training."""
        return tuple(line for line in self.log if line['kind'] == 'epoch')

    @property
    def evaluations(self) -> tuple[dict[str, Any], ...]:
        """The metrics of each evaluation of a GHN in training."""
        return tuple(line for line in self.log if line['kind'] == 'eval')

    @property
    def test_top1(self) -> float | None:
        """Accuracy of the best weights on the test split in percent, if there is one and the run is finished."""
        return self.log[-1].get('test_top1')


@contextlib.contextmanager
def session(options: RunOptions, **arguments: Any) -> Iterator[Accelerator]:
    """The accelerator of a run, which has its output folder for itself and leaves the process as it finds it.

    ``arguments`` are more of accelerate's.

    Raises:
        ConfigError: if accelerate refuses the options, if the tracker is not installed, if another run is at work in
            the folder, or if there are checkpoints and the run is not to go on.
    """
    own = not is_initialized()
    try:
        with restore_global_state():
            accelerator = _build_accelerator(options, arguments)
            with _locked(options.output) if accelerator.is_main_process else contextlib.nullcontext():
                if not options.resume and checkpoints_in(options.output / CHECKPOINTS):
                    raise ConfigError(
                        f'{str(options.output)!r} holds a run: go on with --resume, or choose another --output'
                    )
                yield accelerator
    finally:
        if own:
            # Else the next run would have the precision of this one, whatever it asks for.
            AcceleratorState._reset_state()


def _build_accelerator(options: RunOptions, arguments: dict[str, Any]) -> Accelerator:
    cpu = not torch.accelerator.is_available()
    # NCCL refuses several processes on one GPU, which a GHN for small networks needs to keep it busy.
    shared_gpu = 0 < torch.cuda.device_count() < int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    backend: dict[str, Any] = {'backend': 'gloo'} if shared_gpu else {}
    try:
        accelerator = Accelerator(
            cpu=cpu,  # else several processes that another launcher started would not find one another
            mixed_precision=options.mixed_precision,
            log_with=options.log_with,
            project_dir=options.output,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE, **backend)] if cpu or shared_gpu else None,
            **arguments,
        )
    except ValueError as error:
        raise ConfigError(f'accelerate refuses the options: {error}') from error
    if options.log_with is not None and not accelerator.log_with:
        raise ConfigError(f'the tracker {options.log_with!r} is not installed; install it, or leave out --log-with')
    return accelerator


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a file in a folder until the context or the process ends, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    # A lock of the process, which workers that are forked do not share: they may outlive it by seconds.
    with (folder / _LOCK).open('w') as file:
        if sys.platform != 'win32':
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise ConfigError(
                    f'another run is at work in {str(folder)!r}: wait for its end, or choose another --output'
                ) from error
        yield


class Run(abc.ABC):
    """A run of training in one or several processes.

    Attributes:
        progress: Where the run stands.
        facts: First line of the log: the options, what they led to, and the versions.
        model: What is trained, as accelerate prepares it; a subclass sets it.
        average: Exponential moving average of the weights, if there is one.
    """

    options: RunOptions
    progress: Progress
    model: nn.Module
    #: Entry of the progress and of the lines of the log by which they are ordered.
    ordered_by: ClassVar[str]
    #: Options that may change when a run goes on.
    may_change: ClassVar[tuple[str, ...]]
    logger: ClassVar[logging.Logger]

    def __init__(self, options: RunOptions, accelerator: Accelerator, progress: Progress) -> None:
        self.options = options
        self.accelerator = accelerator
        self.progress = progress
        self.average: ModelEmaV3 | None = None
        arguments = options.to_dict()
        self.facts: dict[str, Any] = {
            'arguments': arguments,
            # What names a file or a folder of this machine: those who read the results elsewhere cannot tell.
            'local': [name for name in ('dataset', 'init') if os.path.exists(os.path.expanduser(str(arguments[name])))],
            'processes': accelerator.num_processes,
            'versions': versions(),
            'device': accelerator.device.type,
        }
        self._started = time.monotonic()
        self._results: Results | None = None
        self._saved_step: int | None = None
        self._terminated = False

    # What a subclass says.

    @property
    @abc.abstractmethod
    def finished(self) -> bool:
        """Whether all is done."""

    @abc.abstractmethod
    def train(self) -> None:
        """Train until all is done, or until :meth:`should_stop`."""

    @abc.abstractmethod
    def finish(self) -> dict[str, Any]:
        """Write what the run is for, whether it is finished or not; gives more entries of the last line of the log."""

    @abc.abstractmethod
    def plot(self, log: list[dict[str, Any]], path: Path) -> None:
        """Draw the curves; a :class:`ConfigError` without matplotlib."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay the same when the run goes on."""
        return {name: value for name, value in self.options.to_dict().items() if name not in self.may_change}

    # What every run does.

    def run(self) -> Result:
        """Go on from the last good checkpoint, or begin; train until all is done or a limit is met.

        SIGTERM, by which schedulers announce the end of a job, stops the run with a checkpoint; then the process ends
        by it.
        """
        with self._stop_at_sigterm():
            try:
                self._start()
                self.train()
                return self._end()
            finally:
                self.accelerator.end_training()
                self.accelerator.free_memory()

    def _start(self) -> None:
        options, found = self.options, None
        if options.resume:
            place = options.output / CHECKPOINTS
            found = load_checkpoint(place, self.accelerator, identity=self.identity, average=self.average)
        if found is not None:
            self.progress = type(self.progress)(**found)
            self._saved_step = self.progress.step
        if self.accelerator.is_main_process:
            resume = None if found is None else (self.ordered_by, found[self.ordered_by])
            self._results = Results(options.output, resume=resume)
        if options.log_with is not None:
            # What every tracker takes as hyper-parameters.
            config = {k: v if isinstance(v, int | float | str) else str(v) for k, v in options.to_dict().items()}
            self.accelerator.init_trackers('timm_ghn', config=config)
        if found is None:
            self.record('run', self.facts)
        else:
            self.say('going on from step %d', self.progress.step)

    def _end(self) -> Result:
        output = self.options.output
        if self._saved_step != self.progress.step:
            self.save_checkpoint()
        if not self.finished:
            self.say('stopped after %d steps; go on with --resume', self.progress.step)
        self.expect_finite_weights()
        values = self.finish()
        self.record('end', {**values, 'finished': self.finished, 'seconds': self.seconds})
        if self.accelerator.is_main_process:
            with contextlib.suppress(ConfigError):  # no matplotlib
                self.plot(read_results(output / RESULTS), output / CURVES)
        self.accelerator.wait_for_everyone()
        return Result(output, self.progress.step, self.finished, tuple(read_results(output / RESULTS)))

    @property
    def trained(self) -> nn.Module:
        """The network that is trained, without what accelerate wraps around it."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    @property
    def seconds(self) -> float:
        """Time spent in the run, in the processes before this one too."""
        return round(self.progress.seconds + time.monotonic() - self._started, 3)

    @property
    def weights(self) -> list[nn.Module]:
        """What has weights that are written: the network, and its average."""
        return [self.trained, *([self.average.module] if self.average is not None else [])]

    def save_checkpoint(self) -> None:
        """Write a checkpoint, unless weights are not finite; all processes call it."""
        self.expect_finite_weights()
        save_checkpoint(
            self.options.output / CHECKPOINTS,
            self.accelerator,
            {**dataclasses.asdict(self.progress), 'seconds': self.seconds},
            identity=self.identity,
            average=self.average,
            keep=self.options.checkpoint_hist,
        )
        self._saved_step = self.progress.step

    def should_stop(self) -> bool:
        """Whether the time is up or the process is to end; all processes call it after each step, and agree."""
        limit = self.options.time_limit
        stop = self._terminated or (limit is not None and time.monotonic() - self._started > 60 * limit)
        if self.accelerator.num_processes == 1:
            return stop
        if self.accelerator.device.type != 'cpu' and self.progress.step % _ASK_STEPS:
            return False
        return any_process(self.accelerator, stop)

    def expect_finite_weights(self) -> None:
        """Refuse to go on, or to write, with weights that are lost, by a TrainingError; all processes call it."""
        finite = [parameter.isfinite().all() for module in self.weights for parameter in module.parameters()]
        # Constant buffers may be masks of minus infinity.
        finite += [(b < math.inf).all() for module in self.weights for b in module.buffers() if b.is_floating_point()]
        if any_process(self.accelerator, not bool(torch.stack(finite).all())):
            raise TrainingError(f'weights are not finite after step {self.progress.step}; {_WAY_OUT}')

    def expect_finite_loss(self, loss: float) -> None:
        """Refuse to go on with a loss that is not finite, by a :class:`TrainingError`."""
        if not math.isfinite(loss):
            raise TrainingError(f'the loss is {loss} by step {self.progress.step}; {_WAY_OUT}')

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Append a line to the log."""
        if self._results is not None:
            self._results.add(kind, values)

    def record_metrics(self, kind: str, values: dict[str, Any]) -> None:
        """Append metrics to the log, and give their numbers to the tracker."""
        values = {**values, 'seconds': self.seconds}
        self.record(kind, values)
        if self.options.log_with is not None:
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=self.progress.step)

    def say(self, text: str, *values: Any) -> None:
        """Log a message in the main process."""
        if self.accelerator.is_main_process:
            self.logger.info(text, *values)

    def progress_bar(self, batches: Iterable[Any] | None = None, **arguments: Any) -> Any:
        """tqdm's progress bar, shown by the main process on a terminal."""
        return tqdm(batches, disable=None if self.accelerator.is_main_process else True, **arguments)

    @contextlib.contextmanager
    def _stop_at_sigterm(self) -> Iterator[None]:
        """Let SIGTERM be noted until the context ends, and end the process by it then."""
        if threading.current_thread() is not threading.main_thread():
            yield  # another one may set no handler
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._terminated = True

        previous = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            if self._terminated:
                signal.raise_signal(signal.SIGTERM)
