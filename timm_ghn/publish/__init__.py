"""Models and GHNs on the Hub: what is known of one, its card, and the commit that takes it there."""

from timm_ghn.publish.card import model_card as model_card
from timm_ghn.publish.facts import Facts as Facts, Training as Training
from timm_ghn.publish.files import Source as Source, read_source as read_source
from timm_ghn.publish.ghn import push_ghn as push_ghn
from timm_ghn.publish.ghn_card import ghn_card as ghn_card
from timm_ghn.publish.ghn_facts import GHNFacts as GHNFacts, MetaTraining as MetaTraining
from timm_ghn.publish.push import (
    check_pushable as check_pushable,
    push_path as push_path,
    push_to_hub as push_to_hub,
)
from timm_ghn.publish.send import Target as Target, api_of as api_of, check_access as check_access
