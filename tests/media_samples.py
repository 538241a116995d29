"""Makes the images and videos that tests send: small, deterministic, in real file formats."""

from __future__ import annotations

import base64
import io
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]


def picture(
    width: int = 96, height: int = 64, color: tuple[int, int, int] = (200, 30, 30)
) -> Array:
    """Draw a coloured rectangle on a grey gradient: height x width x 3, uint8."""
    array = np.zeros((height, width, 3), np.uint8)
    array[...] = np.linspace(60, 180, width, dtype=np.uint8)[None, :, None]
    array[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = color
    return array


def encode(
    array: Array, kind: Literal["PNG", "JPEG", "WEBP", "TIFF"] = "PNG", **save: Any
) -> bytes:
    """Encode an image (height x width x 3 or 4, uint8); WebP without loss."""
    buffer = io.BytesIO()
    if kind == "WEBP":
        save.setdefault("lossless", True)
    Image.fromarray(array).save(buffer, kind, **save)
    return buffer.getvalue()


def movie(frames: int = 24, width: int = 96, height: int = 64) -> list[Array]:
    """Draw a bright bar that moves to the right, one step a frame."""
    drawn = []
    for number in range(frames):
        array = np.full((height, width, 3), 20, np.uint8)
        left = (width - 12) * number // max(1, frames - 1)
        array[:, left : left + 12] = (230, 200, 40)
        drawn.append(array)
    return drawn


def encode_video(
    frames: list[Array], container: Literal["mp4", "webm"] = "mp4", fps: int = 8
) -> bytes:
    """Encode a video: H.264 in mp4, VP9 in webm."""
    buffer = io.BytesIO()
    codec = {"mp4": "libx264", "webm": "libvpx-vp9"}[container]
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for array in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def data_url(data: bytes, media_type: str) -> str:
    """Write a `data:` URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
