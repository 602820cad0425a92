"""From a name or a file to a GHN."""

from timm_ghn.hub.catalogue import GHNEntry as GHNEntry
from timm_ghn.hub.catalogue import known_ghns as known_ghns
from timm_ghn.hub.default import resolve_default as resolve_default
from timm_ghn.hub.default import set_default_ghn as set_default_ghn
from timm_ghn.hub.load import load_ghn as load_ghn
from timm_ghn.hub.load import shared_ghn as shared_ghn
