"""Reads the parts of a message's content: text, images and videos under all their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from shared import data_url
from shared.errors import UnbrokenError, invalid
from shared.protocol import MediaPart, MediaRef, TextPart

if TYPE_CHECKING:
    from shared.protocol import Part

MEDIA_TYPES = {
    "image_url": "image",
    "input_image": "image",
    "video_url": "video",
    "input_video": "video",
}


def content_part(raw: Any, where: str) -> Part:
    """Turn a part of a message's content into ours; `where` is its place in the body, for errors.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    kind = raw.get("type") if isinstance(raw, dict) else None
    kind = kind if isinstance(kind, str) else None
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(raw.get("text"), str):
            raise invalid(f"{where}.text", "must be a string")
        return TextPart(raw["text"])
    if kind in MEDIA_TYPES:
        return MediaPart(_media(raw, kind, where))
    if kind in ("input_audio", "file", "refusal", "audio"):
        raise UnbrokenError(
            "unsupported_parameter", f"'{where}' of type '{kind}' is not supported.", where
        )
    known = ", ".join(("text", "input_text", *MEDIA_TYPES))
    raise invalid(f"{where}.type", f"must be one of {known}")


def _media(raw: dict[str, Any], kind: str, where: str) -> MediaRef:
    """Find the URL or the base64 data of a media part, under any of its names."""
    media: Literal["image", "video"] = "image" if MEDIA_TYPES[kind] == "image" else "video"
    url = raw.get(f"{media}_url")
    if isinstance(url, dict):
        url = url.get("url")
    if url is None:
        names = ("data", "b64_json", media)
        data = next((raw[n] for n in names if isinstance(raw.get(n), str)), None)
        if data is not None:
            default = "image/png" if media == "image" else "video/mp4"
            url = data if ":" in data[:8] else f"data:{default};base64,{data}"
    param = f"{where}.{media}_url"
    if not isinstance(url, str) or not url:
        raise invalid(param, "must hold a URL")
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        _check_data_url(url, media, param)
    elif not scheme.startswith(("http://", "https://")):
        raise invalid(param, "must be an http(s) or a base64 data: URL")
    return MediaRef(media, url)


def _check_data_url(url: str, media: str, param: str) -> None:
    """Refuse at once what can be seen to be no base64 data."""
    try:
        for text in data_url.split(url, frames=media == "video").texts:
            data_url.decode(text)
    except data_url.DataUrlError as error:
        raise UnbrokenError("invalid_media", f"'{param}' {error}.", param) from None
