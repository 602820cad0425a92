"""Models on the Hub: what is known of one, its card, and the commit that takes it there."""

from timm_ghn.publish.card import model_card as model_card
from timm_ghn.publish.facts import Facts as Facts, Training as Training
from timm_ghn.publish.files import Source as Source, read_source as read_source
from timm_ghn.publish.push import push_to_hub as push_to_hub
