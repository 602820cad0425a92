"""Hyper-parameters of a GHN: one frozen record, checked where it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from timm_ghn.errors import ConfigError
from timm_ghn.graph.build import RULES

#: Version of the configuration format that this package writes. Raise it when a reader must know more than before.
FORMAT_VERSION = 2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Graph networks by name, see :func:`timm_ghn.nn.register_gnn`.
GNNS: dict[str, Callable[[GHNConfig], nn.Module]] = {}
DECODERS = ('conv', 'mlp', 'templates')
WINDOWS = ('center', 'corner')
POSTPROCESSING = ('orth', 'noise', 'none')
#: Longest distance that the edge table of the published GHN-3 checkpoints (257 rows, the first two unused) can hold.
MAX_DISTANCE = 254
#: Most layers; the deepest published GHN has 24. A file could ask for millions, which take long to build.
MAX_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class GHNConfig:
    """Hyper-parameters of a graph hypernetwork.

    Attributes:
        hid: Width d of the node embeddings.
        max_shape: Largest tensor decoded at once: (out channels, in channels, height, width). Larger ones are tiled.
        num_classes: Classes K of the data set that the GHN was trained on.
        gnn: Graph network: 'graphormer' (GHN-3), 'gated' (GHN-1, GHN-2), 'mlp' (baseline), or a registered one.
        layers: Depth of the Graphormer; 1 for the others.
        heads: Attention heads of the Graphormer; unused by the others.
        virtual_edges: Longest shortest path that becomes an edge; 1 for none (arXiv 2110.13100, section 4.1).
        layernorm: Whether the node embeddings are layer-normalised before decoding.
        weight_norm: Whether predictions are scaled by fan-in (arXiv 2110.13100, section 4.2).
        decoder: 'conv', 'mlp' as in the baseline decoder of the first release, or 'templates', whose channels
            all have weights of their own.
        window: Where a kernel is cut out of the decoded map: 'center' (GHN-3) or 'corner' (GHN-1, GHN-2).
        templates: Number of templates of the decoder 'templates'; unused by the others.
        codes: Size of its channel codes; unused by the others.
        smooth: Whether nodes are also described by numbers that vary smoothly with sizes and depth.
        rules: Rules that shape the graphs that the GHN reads: 'auto', 'published' or 'operators', see
            :func:`timm_ghn.trace`.
        postprocess: Post-processing that serves its predictions best before training: 'orth', 'noise' or 'none'.
        mean: Mean of the images in training, per channel.
        std: Standard deviation of the images in training, per channel.
        trained: False for random weights.
        name: Name for messages and model cards, if it has one.
        format_version: Version of this record.
    """

    hid: int
    max_shape: tuple[int, int, int, int]
    num_classes: int
    gnn: str = 'graphormer'
    layers: int = 1
    heads: int = 8
    virtual_edges: int = 50
    layernorm: bool = True
    weight_norm: bool = True
    decoder: str = 'conv'
    window: str = 'center'
    smooth: bool = False
    templates: int = 32
    codes: int = 64
    rules: str = 'auto'
    postprocess: str = 'orth'
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    trained: bool = True
    name: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _expect_readable(self.format_version)
        for field in ('hid', 'num_classes', 'layers', 'heads', 'virtual_edges', 'templates', 'codes'):
            _expect_count(field, getattr(self, field))
        if not isinstance(self.max_shape, tuple) or len(self.max_shape) != 4:
            raise ConfigError(f'expected max_shape of 4 sizes: out, in, height, width (got {self.max_shape!r})')
        for size in self.max_shape:
            _expect_count('max_shape', size)
        if self.max_shape[2] != self.max_shape[3]:
            raise ConfigError(f'expected max_shape with height equal to width (got {self.max_shape})')
        if self.hid % 4:
            raise ConfigError(f'expected hid divisible by 4, for the four sizes of a shape (got {self.hid})')
        names = {'gnn': tuple(GNNS), 'decoder': DECODERS, 'window': WINDOWS, 'rules': RULES}
        for field, known in {**names, 'postprocess': POSTPROCESSING}.items():
            if getattr(self, field) not in known:
                raise ConfigError(f'expected {field} to be one of {", ".join(known)} (got {getattr(self, field)!r})')
        if self.gnn == 'graphormer' and self.hid % self.heads:
            raise ConfigError(f'expected hid divisible by heads (got hid {self.hid}, heads {self.heads})')
        if self.layers > MAX_LAYERS:
            raise ConfigError(f'expected at most {MAX_LAYERS:,} layers (got {self.layers})')
        if self.virtual_edges > MAX_DISTANCE:
            raise ConfigError(f'expected virtual_edges of at most {MAX_DISTANCE} (got {self.virtual_edges})')
        if self.decoder == 'mlp' and self.max_shape[0] != self.max_shape[1]:
            raise ConfigError(f"expected square max_shape for the decoder 'mlp' (got {self.max_shape})")
        for field in ('layernorm', 'weight_norm', 'smooth', 'trained'):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f'expected {field} to be true or false (got {getattr(self, field)!r})')
        if not isinstance(self.name, str | None):
            raise ConfigError(f'expected name as text (got {self.name!r})')
        for field in ('mean', 'std'):
            values = getattr(self, field)
            if not isinstance(values, tuple) or len(values) != 3 or not all(map(_is_number, values)):
                raise ConfigError(f'expected {field} of 3 finite numbers, one for each channel (got {values!r})')
        if min(self.std) <= 0:
            raise ConfigError(f'expected a positive std for each channel (got {self.std})')

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values that JSON can hold; :meth:`from_dict` reads it back."""
        record = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in record.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> GHNConfig:
        """Read what :meth:`to_dict` wrote.

        Args:
            record: Values by field; lists stand for tuples. Absent fields take their defaults.

        Raises:
            ConfigError: if a newer version of this package wrote it, if a key is unknown or a required one absent,
                or if a value is out of range.

        What meant something else in an older version is read as that, and has the present version then.
        """
        _expect_readable(record.get('format_version', FORMAT_VERSION))  # first: a newer one may have more keys
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(record) - set(fields))
        if unknown:
            raise ConfigError(f'expected only known keys in a GHN configuration (got {", ".join(unknown)})')
        absent = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in record]
        if absent:
            raise ConfigError(f'expected a GHN configuration to state {", ".join(absent)} (got {", ".join(record)})')
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in record.items()}
        if values.get('format_version', 1) == 1 and values.get('rules') == 'published':
            # In version 1, networks without a published graph had the one by operators.
            values |= {'rules': 'auto', 'format_version': FORMAT_VERSION}
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the weights of a GHN came from.

    Attributes:
        name: Name in the catalogue, if it has one.
        repo_id: Repository on the Hub, if it came from there.
        revision: Commit of the repository.
        file: Name or path of the file.
        sha256: Digest of the file.
        embedded: Whether it is the GHN inside the package.
    """

    name: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None
    embedded: bool = False


def _expect_readable(version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f'expected format_version to be a positive integer (got {version!r})')
    if version > FORMAT_VERSION:
        raise ConfigError(
            f'expected a configuration of format version {FORMAT_VERSION} or older (got {version}): '
            'a newer timm_ghn wrote it, upgrade timm_ghn'
        )


def _expect_count(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f'expected {field} to be a positive integer (got {value!r})')


def _is_number(value: object) -> bool:
    """Whether it is a finite number; an integer beyond the range of floats is none."""
    return isinstance(value, int | float) and abs(value) < 2**63
