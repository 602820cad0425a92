"""Push a GHN to the Hub: one commit with weights, configuration and card, or none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub import CommitInfo

from timm_ghn.errors import CheckpointError
from timm_ghn.files import read_json
from timm_ghn.hub.storage import read_ghn, save_ghn
from timm_ghn.nn.ghn import GHN
from timm_ghn.publish.card import save_card
from timm_ghn.publish.ghn_card import ghn_card
from timm_ghn.publish.ghn_facts import MetaTraining, facts_of
from timm_ghn.publish.send import CARD_FILE, CONFIG_FILE, FILES, WEIGHTS_FILE, Target, api_of, has_card, send
from timm_ghn.text import printable

#: Keys of a configuration that no model of timm has.
_OURS = frozenset({'hid', 'max_shape', 'num_classes'})


def is_ghn(path: Path) -> bool:
    """Whether a path is the folder of a GHN.

    Raises:
        CheckpointError: if it is a folder whose configuration is damaged.
    """
    files = path / CONFIG_FILE, path / WEIGHTS_FILE
    return all(file.is_file() for file in files) and read_json(files[0]).keys() >= _OURS


def push_ghn(
    ghn: GHN,
    repo_id: str,
    *,
    results: MetaTraining | str | os.PathLike[str] | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Push a GHN; as :func:`timm_ghn.push_to_hub`, where arguments and errors are described."""
    target, api = Target(repo_id, private, revision, create_pr), api_of(token)
    training = results if isinstance(results, MetaTraining) or results is None else MetaTraining.read(results)
    with tempfile.TemporaryDirectory(prefix='timm_ghn-push-') as name:
        folder = Path(name)
        _write(ghn, folder)
        facts = facts_of(ghn, repo_id, target.pinned, training=training, license=license)
        save_card(lambda: ghn_card(facts), folder / CARD_FILE)
        files: tuple[str, ...] = FILES
        origin, new = ghn.origin, training is not None or license is not None
        if origin is not None and origin.repo_id == repo_id and facts.unchanged and not new and has_card(target, api):
            # It came from there and goes back as it was: the card that is there knows more of it than the GHN does.
            files = (WEIGHTS_FILE, CONFIG_FILE)
        message = commit_message or f'{printable(ghn.config.name or "GHN")}, a graph hypernetwork'
        return send(folder, target, api, message=message, files=files)


def _write(ghn: GHN, folder: Path) -> None:
    """Write a GHN in our form, and read it back.

    Raises:
        CheckpointError: if a weight is not finite or is on the meta device, or if another GHN comes back.
    """
    state = ghn.state_dict()
    if any(value.is_meta for value in state.values()):
        raise CheckpointError('the GHN is on the meta device and has no weights that could be pushed')
    save_ghn(ghn, folder)
    again = read_ghn(folder)
    found = again.state_dict()
    wrong = [key for key, value in state.items() if not torch.equal(value.cpu().to(found[key].dtype), found[key])]
    if again.config != ghn.config or wrong:
        raise CheckpointError(f'another GHN comes back from its files: {len(wrong)} tensors differ')
