"""A pretrained start for every timm architecture, predicted by a graph hypernetwork.

Importing this package makes GHNs a pretrained-weight source of timm: ``timm.create_model('resnet50.ghn')``.
"""

import sys

if sys.argv[:1] == ['-m']:  # python -m timm_ghn
    from timm_ghn.errors import report_interrupt

    # The imports below take seconds: Ctrl-C meanwhile is one line, as in the command timm-ghn.
    sys.excepthook = report_interrupt

from timm_ghn import timm_source as timm_source
from timm_ghn.errors import (
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    DataError as DataError,
    GHNError as GHNError,
    GHNFallbackWarning as GHNFallbackWarning,
    GHNNotFoundError as GHNNotFoundError,
    HubError as HubError,
    PredictionError as PredictionError,
    TrainingError as TrainingError,
    UnsafeCheckpointError as UnsafeCheckpointError,
    UnsupportedModelError as UnsupportedModelError,
)
from timm_ghn.graph.build import trace as trace
from timm_ghn.graph.graph import Graph as Graph
from timm_ghn.hub.catalogue import (
    list_ghns as list_ghns,
    register_ghn as register_ghn,
    set_default_ghn as set_default_ghn,
)
from timm_ghn.hub.load import load_ghn as load_ghn
from timm_ghn.hub.storage import save_ghn as save_ghn
from timm_ghn.nn.config import GHNConfig as GHNConfig
from timm_ghn.nn.ghn import GHN as GHN
from timm_ghn.prediction.batchnorm import (
    batch_statistics as batch_statistics,
    calibrate_batchnorm_ as calibrate_batchnorm_,
)
from timm_ghn.prediction.plan import ParameterPlan as ParameterPlan, plan_parameters as plan_parameters
from timm_ghn.prediction.postprocess import PostProcess as PostProcess, postprocess_ as postprocess_
from timm_ghn.prediction.predict import Prediction as Prediction, ghn_init as ghn_init, predict as predict
from timm_ghn.publish.push import push_to_hub as push_to_hub
from timm_ghn.timm_source import disable_timm_tags as disable_timm_tags, enable_timm_tags as enable_timm_tags
from timm_ghn.transfer.rank import rank_donors as rank_donors
from timm_ghn.transfer.start import choose_init as choose_init, start_ as start_
from timm_ghn.transfer.transfer import plan_transfer as plan_transfer, transfer_ as transfer_
from timm_ghn.version import __version__ as __version__

enable_timm_tags()
