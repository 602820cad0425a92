"""What a run with ``--push-to-hub`` does before the training and after it, in the main process; else nothing."""

from __future__ import annotations

import logging
import shlex

from timm_ghn.errors import GHNError, HubError, UnsupportedModelError
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.finetune.setup import Start
from timm_ghn.publish.push import check_pushable, push_path

_logger = logging.getLogger('timm_ghn.finetune')


def check_start(options: FinetuneOptions, start: Start) -> None:
    """Refuse a model that plain timm could not load from the Hub, by an UnsupportedModelError, before training it."""
    if options.target is None:
        return
    if start.edits:
        raise UnsupportedModelError(
            f'push_to_hub needs a model that timm builds again, but the stem of {options.model} is changed for small '
            f'images ({"; ".join(start.edits)}): fine-tune with --small-stem off, or with images of more than 64 pixels'
        )
    check_pushable(start.model, start.arguments)


def push_when_done(options: FinetuneOptions, *, finished: bool) -> str | None:
    """Push the best weights of a run if it is finished; gives the address of the commit or of the pull request.

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
        words = ['timm-ghn', 'push', str(options.output), target.repo_id]
        words += ['--private'] if target.private else []
        words += ['--revision', target.revision] if target.revision else []
        words += ['--create-pr'] if target.create_pr else []
        words += ['--license', options.hub_license] if options.hub_license else []
        raise HubError(
            f'{str(error).rstrip(".")}. The trained model is in {str(options.output)!r}; to push it: '
            f'{shlex.join(words)}'
        ) from error
    _logger.info('pushed to %s', target.repo_id)
    return commit.pr_url or commit.commit_url
