"""Files that the command line writes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from timm_ghn.errors import ConfigError
from timm_ghn.nn.storage import replacing


def check_output(path: Path, suffixes: Sequence[str] = ('.safetensors',)) -> None:
    """Refuse a file that cannot be written before minutes go into what it is to hold.

    Args:
        path: The file.
        suffixes: Ends that its name may have.

    Raises:
        ConfigError: if it ends otherwise.
        OSError: if it cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f'expected a name that ends in {" or ".join(suffixes)} (got {str(path)!r})')
    if path.is_dir():
        raise IsADirectoryError(f'{str(path)!r} is a folder')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'the folder {str(path.parent)!r} does not exist')
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f'the folder {str(path.parent)!r} cannot be written')


def write_state_dict(state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors: the whole file, or nothing.

    Args:
        state_dict: What to write.
        path: The file; one that exists is replaced.
        metadata: Goes into the file's header, as JSON where it is not text.

    Raises:
        OSError: if the file cannot be written.
    """
    # Tied parameters share memory, which the format has no word for: each name gets its own copy.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with replacing(path) as part:
        try:
            save_file(tensors, part, metadata={'format': 'pt', **header})
        except SafetensorError as error:
            raise OSError(f'{str(path)!r} cannot be written: {error}') from error
