"""The commands about data sets: ``timm-ghn finetune``, ``train``, ``evaluate`` and ``search``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from timm_ghn.analysis.search import SearchOptions, search
from timm_ghn.cli.tables import aligned
from timm_ghn.errors import LONGEST, printable
from timm_ghn.finetune import FinetuneOptions, finetune
from timm_ghn.runs.recipes import add_arguments as add_arguments, options_of
from timm_ghn.train import TrainOptions, train
from timm_ghn.train.evaluate import EvaluateOptions, evaluate, summaries

#: The dataclass of each command's options.
OPTIONS = {'finetune': FinetuneOptions, 'train': TrainOptions, 'evaluate': EvaluateOptions, 'search': SearchOptions}


def run_finetune(args: argparse.Namespace) -> int:
    """Fine-tune a model."""
    options = options_of(args, FinetuneOptions)
    with log_to_stderr():
        result = finetune(options)
    _print_once(result.output, result.pushed)
    return 0


def run_train(args: argparse.Namespace) -> int:
    """Train a GHN."""
    options = options_of(args, TrainOptions)
    with log_to_stderr():
        result = train(options)
    _print_once(result.output)
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Print the accuracy of predicted networks."""
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


def run_search(args: argparse.Namespace) -> int:
    """Print architectures, ranked by the accuracy of predicted networks."""
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


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Write the log records of the package to the standard error, each as one printable line."""
    logger = logging.getLogger('timm_ghn')
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.format = lambda record: printable(record.getMessage(), LONGEST)  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
