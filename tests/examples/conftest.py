"""An example here meets a Hub of its own, or none."""

from hub_fixtures import *  # noqa: F403
from hub_fixtures import _alone as _alone
