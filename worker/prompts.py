"""Prepares prompts: fetches a request's media, and has child processes decode and process them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Union

from shared.errors import UnbrokenError
from shared.protocol import GenerationRequest, MediaPart, MediaRef
from shared.settings import WorkerSettings
from worker import media
from worker.child import ChildDied, ChildError, ChildPool, ChildTimeout, PoolFull, StartFailed
from worker.decoder import Image, Job, Limits, Video
from worker.engine.messages import Prompt
from worker.engine_client import LOAD_DELAYS
from worker.forms import FormChecker
from worker.launch import Launch, execute
from worker.media_guard import AllowedHosts

log = logging.getLogger("unbroken.prompts")

FETCHES_AT_ONCE = 16
PROCESSOR_SECONDS = 120.0
# All media of one request together may have this many times the pixels of a single one, so that
# small files that decode to large pictures cannot fill the memory by their number.
PIXELS_PER_REQUEST = 4

T = TypeVar("T")
Decoded = Union[Image, Video]


@dataclass(frozen=True)
class _Item:
    """One media part: its reference, and the field it stands in."""

    ref: MediaRef
    param: str


class PromptBuilder:
    """Turns requests into prompts. Loads the processor in the background after `start`.

    Args:
        settings: the model, and limits on media.
        load_delays: seconds to wait before a new try, after 1, 2, … loads that failed.
        launch: starts the processes that need torch.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        load_delays: Sequence[float] = LOAD_DELAYS,
        launch: Launch = execute,
    ) -> None:
        self._settings = settings
        AllowedHosts(settings.media_allowed_hosts)  # a wrong one ends the start, not a fetch
        limits = Limits(
            settings.max_media_pixels,
            settings.max_video_frames,
            settings.max_media_aspect,
            settings.media_memory_bytes,
        )
        self._limits, self._load_delays, self._launch = limits, load_delays, launch
        self._decoder, self._processor = self._pools()
        self._forms = FormChecker(settings.media_processes)
        self._fetches = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._loading: asyncio.Task[None] | None = None
        self._ready = False
        self._failed: str | None = None
        self._settled = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether prompts can be built."""
        return self._ready

    @property
    def failed(self) -> str | None:
        """Why loading failed, in one sentence; None while it has not."""
        return self._failed

    def _pools(self) -> tuple[ChildPool, ChildPool]:
        settings = self._settings
        decoder = ChildPool(
            "worker.decoder:create",
            (self._limits,),
            size=settings.media_processes,
            timeout=settings.media_timeout_seconds,
            start_timeout=60,
        )
        processor = ChildPool(
            "worker.engine.processor:create",
            (
                {
                    "model": settings.model_repo_id,
                    "hf_token": settings.hf_token,
                    "trust_remote_code": settings.trust_remote_code,
                    "max_video_frames": settings.max_video_frames,
                    "context_length": settings.context_length,
                },
            ),
            size=settings.media_processes,
            timeout=PROCESSOR_SECONDS,
            launch=self._launch,
        )
        return decoder, processor

    async def start(self) -> None:
        """Begin to load; returns at once, `ready` or `failed` will tell. To be called once."""
        self._loading = asyncio.get_running_loop().create_task(self._load())

    async def wait_ready(self) -> None:
        """Wait until the first load has ended.

        Raises:
            UnbrokenError: `model_not_ready`, if it failed or was never begun.
        """
        if self._loading is not None:
            await self._settled.wait()
        if not self._ready:
            raise UnbrokenError("model_not_ready", self._failed or "The model is not loaded.")

    async def build(
        self, request: GenerationRequest, *, begun: bool = False
    ) -> tuple[Prompt, tuple[str, ...]]:
        """Prepare a request's prompt.

        Args:
            request: of the session.
            begun: whether it has tokens already, so that its form is known to be good.

        Returns:
            The prompt, and the content hash of each media part in order.

        Raises:
            UnbrokenError: the request is at fault, or the processor is not available.
        """
        await self.wait_ready()
        items = _items(request)
        files = await _all([self._fetch(item) for item in items])
        self._check_total(files)
        hashes = await asyncio.to_thread(_hashes, files) if files else ()
        decoded: list[Decoded] = []
        for item, file in zip(items, files, strict=True):
            decoded.append(await self._decode(item, file))
            self._check_pixels(decoded, item)
        prompt = await self._process(request, decoded)
        if not begun:
            await self._forms.check(prompt.form)
        return prompt, hashes

    async def close(self) -> None:
        """End all child processes."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait({self._loading})
        self._ready = False
        pools = (self._decoder, self._processor, self._forms)
        await asyncio.gather(*(pool.close() for pool in pools))

    async def _load(self) -> None:
        """Start the children; again, after a while, where the model cannot be loaded."""
        for attempt in itertools.count():
            starts = (self._decoder.start(), self._processor.start(), self._forms.start())
            results = await asyncio.gather(*starts, return_exceptions=True)
            error = next((r for r in results if r is not None), None)
            if error is None:
                break
            if not isinstance(error, (StartFailed, ChildDied, OSError)):
                raise error
            self._failed = str(error)
            log.warning("prompts cannot be prepared: %s", error)
            self._settled.set()
            await asyncio.sleep(self._load_delays[min(attempt, len(self._load_delays) - 1)])
            pools = (self._decoder, self._processor, self._forms)
            await asyncio.gather(*(pool.close() for pool in pools))
            self._decoder, self._processor = self._pools()
            self._forms = FormChecker(self._settings.media_processes)
        self._ready, self._failed = True, None
        self._settled.set()
        log.info("the processor is loaded")

    async def _fetch(self, item: _Item) -> bytes | list[bytes]:
        async with self._fetches:
            return await media.fetch(item.ref, self._settings, item.param)

    def _check_total(self, files: Sequence[bytes | list[bytes]]) -> None:
        total = sum(len(f) if isinstance(f, bytes) else sum(map(len, f)) for f in files)
        if total > self._settings.max_media_bytes:
            raise UnbrokenError(
                "request_too_large",
                f"The request's media are larger than {self._settings.max_media_bytes} bytes.",
                "messages",
            )

    def _check_pixels(self, decoded: Sequence[Decoded], item: _Item) -> None:
        arrays = [d.array if isinstance(d, Image) else d.frames for d in decoded]
        limit = PIXELS_PER_REQUEST * self._settings.max_media_pixels
        if sum(array.size // 3 for array in arrays) > limit:
            raise UnbrokenError(
                "invalid_media", f"The media have more than {limit} pixels together.", item.param
            )

    async def _decode(self, item: _Item, file: bytes | list[bytes]) -> Decoded:
        frames = [file] if isinstance(file, bytes) else file
        kind = item.ref.kind if isinstance(file, bytes) else "frames"
        # A PickleBuffer goes beside the pickle, uncopied.
        job = Job(kind, tuple(pickle.PickleBuffer(frame) for frame in frames))
        try:
            result: Decoded = await self._decoder.call(job)
        except UnbrokenError as error:
            raise UnbrokenError(error.code, error.message, item.param) from None
        except ChildTimeout:
            raise UnbrokenError(
                "invalid_media", f"The {item.ref.kind} takes too long to decode.", item.param
            ) from None
        except (ChildDied, ChildError):
            raise UnbrokenError(
                "invalid_media", f"The {item.ref.kind} cannot be decoded.", item.param
            ) from None
        except (PoolFull, StartFailed):
            raise _busy() from None
        return result

    async def _process(self, request: GenerationRequest, decoded: Sequence[Decoded]) -> Prompt:
        try:
            wish = (request.messages, decoded, request.tools, request.schema, request.effort)
            prompt: Prompt = await self._processor.call(wish)
        except (ChildDied, ChildError) as error:
            log.warning("the processor failed: %s", error)
            raise UnbrokenError("generation_failed", "The prompt cannot be prepared.") from None
        except (PoolFull, StartFailed):
            raise _busy() from None
        return prompt


def _items(request: GenerationRequest) -> list[_Item]:
    return [
        _Item(part.media, f"messages[{i}].content[{j}]")
        for i, message in enumerate(request.messages)
        for j, part in enumerate(message.parts)
        if isinstance(part, MediaPart)
    ]


def _hashes(files: Sequence[bytes | list[bytes]]) -> tuple[str, ...]:
    return tuple(media.content_hash(file) for file in files)


def _busy() -> UnbrokenError:
    return UnbrokenError("unavailable", "The worker cannot prepare prompts now.", retry_after=1)


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines at once; the first error, or a cancellation, ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
