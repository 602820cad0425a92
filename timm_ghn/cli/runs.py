"""The commands about data sets: ``timm-ghn finetune``, ``train``, ``evaluate`` and ``search``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from timm_ghn.cli.tables import aligned
from timm_ghn.errors import LONGEST, printable
from timm_ghn.runs.recipes import add_arguments, options_of

#: Module and name of the dataclass of each command's options.
_OPTIONS = {
    'finetune': ('timm_ghn.finetune.options', 'FinetuneOptions'),
    'train': ('timm_ghn.train.options', 'TrainOptions'),
    'evaluate': ('timm_ghn.train.evaluate', 'EvaluateOptions'),
    'search': ('timm_ghn.analysis.search', 'SearchOptions'),
}


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Give the parser of a command an option for every field of its dataclass."""
    module, name = _OPTIONS[command]
    options = importlib.import_module(module)
    add_arguments(parser, getattr(options, name), options.GROUPS)


def finetune_model(args: argparse.Namespace) -> int:
    """Fine-tune a model."""
    from timm_ghn.finetune import FinetuneOptions, finetune

    options = options_of(args, FinetuneOptions)
    with log_to_stderr():
        result = finetune(options)
    _print_once(result.output, result.pushed)
    return 0


def train_ghn(args: argparse.Namespace) -> int:
    """Train a GHN."""
    from timm_ghn.train import TrainOptions, train

    options = options_of(args, TrainOptions)
    with log_to_stderr():
        result = train(options)
    _print_once(result.output)
    return 0


def evaluate_ghn(args: argparse.Namespace) -> int:
    """Print the accuracy of predicted networks."""
    from timm_ghn.train.evaluate import EvaluateOptions, evaluate, summaries

    options = options_of(args, EvaluateOptions)
    rows = evaluate(options)
    if options.split:
        header: tuple[str, ...] = ('split', 'networks', 'mean accuracy, %', 'standard error', 'maximum')
        cells: list[tuple[str, ...]] = [
            (row.split, f'{row.networks:,}', f'{row.mean:.2f}', f'{row.standard_error:.2f}', f'{row.maximum:.2f}')
            for row in summaries(rows)
        ]
    else:
        header = ('family', 'architecture', 'parameters', 'accuracy, %', 'cross-entropy')
        cells = [(row.family, row.name, f'{row.parameters:,}', f'{row.top1:.2f}', f'{row.loss:.3f}') for row in rows]
    print('\n'.join(aligned(header, cells)))
    return 0


def search_architectures(args: argparse.Namespace) -> int:
    """Print architectures, ranked by the accuracy of predicted networks."""
    from timm_ghn.analysis.search import SearchOptions, search

    rows = search(options_of(args, SearchOptions))
    cells = [
        (str(rank), row.name, f'{row.parameters:,}', f'{row.macs:,}', f'{row.top1:.2f}', f'{row.loss:.3f}')
        for rank, row in enumerate(rows, 1)
    ]
    header = ('rank', 'architecture', 'parameters', 'multiply-accumulates', 'accuracy, %', 'cross-entropy')
    print('\n'.join(aligned(header, cells)))
    return 0


def _print_once(*lines: Any) -> None:
    """Print on the main process only."""
    if int(os.environ.get('RANK', 0)) == 0:
        print(*(line for line in lines if line is not None), sep='\n')


class _Line(logging.Formatter):
    """One printable line for each record."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage(), LONGEST)


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Write the log records of the package to the standard error."""
    logger = logging.getLogger('timm_ghn')
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
