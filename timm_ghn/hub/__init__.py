"""From a name or a file to a GHN."""

from timm_ghn.hub.catalogue import (
    GHNEntry as GHNEntry,
    known_ghns as known_ghns,
    list_ghns as list_ghns,
    register_ghn as register_ghn,
    set_default_ghn as set_default_ghn,
)
from timm_ghn.hub.load import load_ghn as load_ghn, shared_ghn as shared_ghn
