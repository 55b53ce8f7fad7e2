"""API keys: read from environment variables only, and kept out of all that is written or shown."""

import json
import logging
import os
import re
from urllib.parse import quote, quote_plus

import httpx

from axpo.tools.base import ToolError

_PLACEHOLDER = re.compile(r"\{key:([^{}]*)\}")
_PARTS = ("connection", "http11", "http2", "proxy")
_LOGGERS = ("httpx", "httpx2", *(f"{core}.{part}" for core in ("httpcore", "httpcore2") for part in _PARTS))  # URLs
_secrets: set[str] = set()


def read_key(variable: str, purpose: str) -> str:
    """The key in an environment variable; from now on `redact` and the log lines of httpx leave it out.

    Raises ToolError that names the variable where it is not set, or holds what cannot be sent.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ToolError(f"the environment variable {variable} is not set; it holds the key for {purpose}")
    if not key.isascii() or not key.isprintable():
        raise ToolError(f"the environment variable {variable} holds characters that no key has")
    # The forms in which URLs, forms and JSON show it
    _secrets.update({key, quote(key, safe=""), quote(key), quote_plus(key), json.dumps(key)[1:-1]})
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_redact_record)  # adding it twice does nothing
    return key


def redact(text: str) -> str:
    """The text with *** for every key that was read."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def fill_keys(text: str, purpose: str, in_url: bool = False) -> str:
    """The text with the key of NAME for each `{key:NAME}`. Raises ToolError as `read_key` does."""

    def key(match: re.Match[str]) -> str:
        value = read_key(match[1], purpose)
        return quote(value, safe="") if in_url else value

    return _PLACEHOLDER.sub(key, text)


def check_address(url: str, purpose: str) -> str:
    """The address without a slash at its end. Raises ToolError unless it is http(s) and holds no password."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ToolError(f"{purpose}: {url!r} is not an address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ToolError(f"{purpose}: {url!r} is not an address: it begins with http:// or https:// and a host")
    if parsed.userinfo:
        raise ToolError(f"{purpose}: the address holds a user or password; must be one without")
    return url.rstrip("/")


def _redact_record(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    shown = redact(message)
    if shown != message:
        record.msg, record.args = shown, ()
    return True
