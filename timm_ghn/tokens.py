"""Tokens of the Hub, which no message may show."""

from __future__ import annotations

from huggingface_hub import get_token

from timm_ghn.errors import ConfigError


def check_token(token: str | bool | None, *, own: bool = True) -> None:
    """Refuse what can be no token, before an HTTP client that cannot send it shows it in its error.

    Args:
        token: As huggingface_hub takes it: None or True for its own, False for none.
        own: Whether huggingface_hub's own (HF_TOKEN, ``hf auth login``) is looked at as well, if that is meant.

    Raises:
        ConfigError: if it is no word of ASCII.
    """
    if own and (token is None or token is True):
        what, token = "huggingface_hub's token, of HF_TOKEN or `hf auth login`,", get_token()
    else:
        what = 'token'
    if token is None or isinstance(token, bool):
        return
    if not isinstance(token, str) or not (token.isascii() and token.isprintable() and token and ' ' not in token):
        raise ConfigError(f'expected {what} to be one word without line ends (it is not shown here)')
