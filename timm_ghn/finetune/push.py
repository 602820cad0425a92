"""What a run with ``--push-to-hub`` does before the training and after it, in the main process; else nothing."""

from __future__ import annotations

import logging
import shlex

from timm_ghn.errors import GHNError, HubError, UnsupportedModelError
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.finetune.setup import Start
from timm_ghn.publish.push import Target, check_access, check_pushable, push_path

_logger = logging.getLogger('timm_ghn.finetune')


def check_target(options: FinetuneOptions) -> None:
    """Make the repository, and refuse one that could not be pushed to before hours go into the model.

    Raises:
        ConfigError: if it is public where a private one was asked for, or holds pickled files.
        HubError: if the Hub cannot be reached, if nobody is logged in, or if that user may not write there.
    """
    if options.target is not None:
        check_access(options.target)


def check_start(options: FinetuneOptions, start: Start) -> None:
    """Refuse a model that plain timm could not load from the Hub before hours go into it.

    Raises:
        UnsupportedModelError: if its stem was changed, or if timm builds another model from its configuration.
        GHNError: if it cannot be written.
    """
    if options.target is None:
        return
    if start.edits:
        raise UnsupportedModelError(
            f'push_to_hub needs a model that timm builds again, but the stem of {options.model} is changed for small '
            f'images ({"; ".join(start.edits)}): fine-tune with --small-stem off, or with images of more than 64 pixels'
        )
    check_pushable(start.model, start.arguments)


def push_when_done(options: FinetuneOptions, *, finished: bool) -> str | None:
    """Push the best weights of a run.

    Args:
        options: Of the run.
        finished: Whether all epochs are done; if not, nothing is pushed.

    Returns:
        Address of the commit or of the pull request, if there is one.

    Raises:
        HubError: if it fails; it says with which command to go on, since the weights stay where they are.
    """
    target = options.target
    if target is None:
        return None
    if not finished:
        _logger.info('not pushed to %s: that is for when all epochs are done', target.repo_id)
        return None
    try:
        commit = push_path(options.output, target, license=options.hub_license)
    except (GHNError, OSError) as error:
        raise HubError(
            f'{str(error).rstrip(".")}. The trained model is in {str(options.output)!r}; to push it: '
            f'{push_command(options, target)}'
        ) from error
    _logger.info('pushed to %s', target.repo_id)
    return commit.pr_url or commit.commit_url


def push_command(options: FinetuneOptions, target: Target) -> str:
    """The command that pushes what a run wrote."""
    words = ['timm-ghn', 'push', str(options.output), target.repo_id]
    words += ['--private'] if target.private else []
    words += ['--revision', target.revision] if target.revision else []
    words += ['--create-pr'] if target.create_pr else []
    words += ['--license', options.hub_license] if options.hub_license else []
    return shlex.join(words)
