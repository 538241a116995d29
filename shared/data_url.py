"""Strict `data:` URLs: what a client may send inline, as gateway and worker both read it."""

from __future__ import annotations

import base64
import binascii
import re
from typing import NamedTuple

_HEAD = re.compile(
    r"data:(?P<type>(?:image|video|application)/[a-z0-9.+-]{1,64})(?:;[a-z0-9=.+-]{1,64}){0,4};base64,",
    re.IGNORECASE,
)
MAX_HEAD = 512
STEP = 1 << 20
"""Characters decoded at a time (a multiple of 4), so that other threads get the GIL in between."""


class DataUrlError(ValueError):
    """The URL is not of the form `data:<type>;base64,<data>`; the text says what is wrong."""


class DataUrl(NamedTuple):
    """The media type in lower case, and the base64 texts: one, or those of a list of frames."""

    media_type: str
    texts: list[str]


def split(url: str, *, frames: bool) -> DataUrl:
    """Split a `data:` URL without decoding it.

    Args:
        url: the URL.
        frames: `data:video/jpeg` is a list of files, with commas between them.

    Raises:
        DataUrlError: it has another form.
    """
    head = _HEAD.match(url, 0, MAX_HEAD)
    if head is None:
        raise DataUrlError("must look like data:<type>;base64,<data>")
    media_type, body = head["type"].lower(), url[head.end() :]
    texts = body.split(",") if frames and media_type == "video/jpeg" else [body]
    return DataUrl(media_type, texts)


def decode(text: str) -> bytes:
    """Decode base64 of the standard alphabet, padded, without white space.

    Raises:
        DataUrlError: it is empty, or something else.
    """
    digits = text.rstrip("=")
    if not digits or len(text) % 4 or len(text) - len(digits) > 2 or "=" in digits:
        raise DataUrlError("holds no valid base64 data")
    try:
        steps = range(0, len(text), STEP)
        return b"".join(base64.b64decode(text[i : i + STEP], validate=True) for i in steps)
    except (binascii.Error, ValueError):
        raise DataUrlError("holds no valid base64 data") from None


def decoded_size(texts: list[str]) -> int:
    """Return an upper bound of the decoded size in bytes, before anything is decoded."""
    return sum(len(text) // 4 * 3 for text in texts)
