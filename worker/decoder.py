"""Decodes images and videos. Runs in a child process (`create`) that a broken file may take down.

No torch here; Pillow and decord are imported where they are used.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shared.errors import UnbrokenError

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Array = np.ndarray[Any, Any]

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
FRAME_LIST_FPS = 1.0  # a bare list of frames has no times: take them as a second apart


@dataclass(frozen=True)
class Image:
    """A decoded image: `array` is height x width x 3, uint8 RGB."""

    array: Array


@dataclass(frozen=True)
class Video:
    """Frames sampled from a video.

    `frames` is T x height x width x 3, uint8 RGB. Frame t is number `indices[t]` of the
    `total_frames` in the file, and is shown `times[t]` seconds after the first; `fps` is the
    file's average rate.
    """

    frames: Array
    indices: tuple[int, ...]
    fps: float
    total_frames: int
    times: tuple[float, ...]


@dataclass(frozen=True)
class Limits:
    """Bounds on what is decoded.

    Pixels of one image or of all of a video's frames; frames; longest side in shortest sides; bytes
    of memory that the child may take beyond what it starts with (0: no bound).
    """

    max_pixels: int
    max_frames: int
    max_aspect: int = 200
    memory_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """What to decode: `data` is one file, or for `frames` one JPEG, PNG or WebP each."""

    kind: Literal["image", "video", "frames"]
    data: tuple[Any, ...]


def create(limits: Limits) -> Callable[[Job], Image | Video]:
    """Return the handler of the decoder's child process."""
    # FFmpeg and decord print what they cannot read, and a client's media must not reach the log.
    with Path(os.devnull).open("wb") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    if limits.memory_bytes:
        bound_resources(limits.memory_bytes)
    return lambda job: decode(job, limits)


def bound_resources(memory_bytes: int) -> None:
    """Let this process take so much more memory, write no file, and leave no core dump."""
    import PIL.Image

    PIL.Image.init()
    with contextlib.suppress(ImportError):
        import decord  # noqa: F401  # what it maps when it is loaded shall not count
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decode(job: Job, limits: Limits) -> Image | Video:
    """Decode one job.

    Raises:
        UnbrokenError: `invalid_media`: broken, too large, or of a kind that is not supported.
    """
    if job.kind == "image":
        return Image(decode_image(job.data[0], limits.max_pixels, limits.max_aspect))
    if job.kind == "frames":
        return decode_frames(job.data, limits)
    return decode_video(job.data[0], limits)


def decode_image(data: Any, max_pixels: int, max_aspect: int = 200) -> Array:
    """Decode an image file: upright by its EXIF orientation, on white, the first of a series.

    Returns:
        height x width x 3, uint8 RGB.

    Raises:
        UnbrokenError: `invalid_media`.
    """
    from PIL import Image as Pillow
    from PIL import ImageOps, UnidentifiedImageError

    Pillow.MAX_IMAGE_PIXELS = None  # the limit below speaks for itself
    try:
        with Pillow.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise _invalid(
                    f"The image has {width} x {height} pixels; the limit is {max_pixels} in all."
                )
            _check_aspect(width, height, max_aspect)
            opened.load()
            return np.asarray(_on_white(ImageOps.exif_transpose(opened)))
    except UnidentifiedImageError:
        raise _invalid("The image is not a PNG, JPEG, WebP or GIF file, or is corrupt.") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise _invalid("The image is truncated or corrupt.") from error


def _check_aspect(width: int, height: int, max_aspect: int) -> None:
    if max(width, height) > max_aspect * min(width, height):
        raise _invalid(
            f"The picture is {width} x {height}; no side may be {max_aspect} times the other."
        )


def _on_white(image: PillowImage) -> PillowImage:
    from PIL import Image as Pillow

    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey: convert() would clip
        grey = np.asarray(image).astype(np.float32) / 257
        return Pillow.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Pillow.new("RGBA", image.size, "white")
    return Pillow.alpha_composite(canvas, image).convert("RGB")


def decode_frames(files: Sequence[Any], limits: Limits) -> Video:
    """Decode a list of image files as a video, one second apart; sample where there are too many.

    Raises:
        UnbrokenError: `invalid_media`.
    """
    if not files:
        raise _invalid("The list of frames is empty.")
    indices = sample(len(files), limits.max_frames)
    frames: list[Array] = []
    for index in indices:
        pixels = limits.max_pixels // len(indices)
        frames.append(decode_image(files[index], pixels, limits.max_aspect))
        if frames[-1].shape != frames[0].shape:
            raise _invalid("The frames are not all of one size.")
    times = tuple(index / FRAME_LIST_FPS for index in indices)
    return Video(np.stack(frames), tuple(indices), FRAME_LIST_FPS, len(files), times)


def decode_video(data: Any, limits: Limits) -> Video:
    """Decode a video file, sampled uniformly over its length; scaled down to the pixel limit.

    Raises:
        UnbrokenError: `invalid_media`.
    """
    # Only what is meant to be read reaches FFmpeg: its playlists and scripts can name other files.
    if bytes(data[4:8]) != b"ftyp" and bytes(data[:4]) != b"\x1a\x45\xdf\xa3":
        raise _invalid("The video is not an MP4 or WebM file, or is corrupt.")
    try:
        return _read_video(data, limits)
    except UnbrokenError:
        raise
    except Exception as error:  # decord has its own exception, not to be named without decord
        raise _invalid("The video is truncated or corrupt.") from error


def _read_video(data: Any, limits: Limits) -> Video:
    reader = _open_video(data)
    total, fps = len(reader), float(reader.get_avg_fps())
    if not total or not math.isfinite(fps) or fps <= 0:
        raise _invalid("The video has no frames.")
    indices = sample(total, limits.max_frames)
    height, width = reader[indices[0]].shape[:2]
    _check_aspect(width, height, limits.max_aspect)
    scale = math.sqrt(limits.max_pixels / (len(indices) * height * width))
    if scale < 1:
        reader = _open_video(data, max(1, int(width * scale)), max(1, int(height * scale)))
    frames = _read_frames(reader, indices)
    starts = [float(reader.get_frame_timestamp(index)[0]) for index in (0, *indices)]
    times = tuple(start - starts[0] for start in starts[1:])
    return Video(frames, tuple(indices), fps, total, times)


def _read_frames(reader: Any, indices: Sequence[int]) -> Array:
    """Read frames as T x height x width x 3, uint8.

    decord takes the padding of rows for more channels where their padded length is a multiple of
    the width, as in frames 48 or 72 pixels wide; then it cannot read them in one go either.
    """
    height, width, channels = reader[indices[0]].shape
    if channels == 3:
        return np.ascontiguousarray(reader.get_batch(indices).asnumpy())
    rows = [reader[i].asnumpy().reshape(height, width * channels) for i in indices]
    return np.stack(rows)[:, :, : width * 3].reshape(-1, height, width, 3)


def _open_video(data: Any, width: int = -1, height: int = -1) -> Any:
    """Open a video with decord: all that the rest of the program knows of it.

    decord is unmaintained, and has no wheel for some machines.
    """
    try:
        import decord
    except ImportError:
        raise _invalid(
            "This server cannot read video files: its machine has no video decoder."
        ) from None
    # One thread: the order of decord's own threads makes broken files hang more often.
    return decord.VideoReader(io.BytesIO(data), width=width, height=height, num_threads=1)


def sample(total: int, count: int) -> list[int]:
    """Choose `count` of `total` frames, evenly spread from the first to the last."""
    if total <= count:
        return list(range(total))
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _invalid(message: str) -> UnbrokenError:
    return UnbrokenError("invalid_media", message)
