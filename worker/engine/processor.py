"""Turns messages and decoded media into model input by the model's own chat template and processor.

Runs in a child process of its own (`create`), because tokenizing and resizing hold the GIL.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image as PillowImage

from shared.errors import UnbrokenError
from shared.protocol import MediaPart, Message, TextPart
from worker.decoder import Image, Video
from worker.engine.messages import Prompt
from worker.engine.sequence import TOKEN_KINDS
from worker.engine.torchvision_shim import prepare_torchvision

log = logging.getLogger("unbroken.engine.processor")

Media = Union[Image, Video]
Array = np.ndarray[Any, Any]


class PromptProcessor:
    """A model's processor (or, for a model of text only, its tokenizer).

    Args:
        model: hub id or folder.
        hf_token: for gated models.
        trust_remote_code: whether code in the model's repository may run.
        max_video_frames: the most frames a video may have here.
        context_length: tokens that a prompt may have at most; text that cannot fit is refused
            before it is tokenized, which takes seconds for megabytes.

    Raises:
        UnbrokenError: `model_not_ready`, with the reason, if it cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        hf_token: str | None,
        *,
        trust_remote_code: bool,
        max_video_frames: int,
        context_length: int = 2**31,
    ) -> None:
        prepare_torchvision()
        self._processor = _load(model, hf_token, trust_remote_code=trust_remote_code)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._multimodal = self._tokenizer is not self._processor
        self._max_video_frames, self._context_length = max_video_frames, context_length
        self._longest_token = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        template = getattr(self._processor, "chat_template", None) or self._tokenizer.chat_template
        self._template = template.get("default") if isinstance(template, dict) else template
        if not self._template:
            raise _not_ready(model, "has no chat template")
        self._shield = _ControlTokens(self._tokenizer, self._processor)

    def build(self, messages: Sequence[Message], media: Sequence[Media]) -> Prompt:
        """Render, expand and tokenize a conversation.

        Args:
            messages: the conversation.
            media: what its media parts refer to, in order.

        Returns:
            The prompt. `tensors` has all of the processor's outputs but `input_ids` and the
            attention mask, which is all ones.

        Raises:
            UnbrokenError: the model cannot take these messages or media.
        """
        images = [item for item in media if isinstance(item, Image)]
        videos = [item for item in media if isinstance(item, Video)]
        self._check_media(messages, images, videos)
        self._check_length(messages)
        text = self._render([self._shield_message(message) for message in messages])
        outputs = self._process(text, images, videos)
        ids, tensors = self._shield.restore(outputs)
        return Prompt(ids, tensors, self._thinking(ids), _digest(tensors) if media else "")

    def _check_length(self, messages: Sequence[Message]) -> None:
        parts = (p.text for m in messages for p in m.parts if isinstance(p, TextPart))
        least = sum(len(text.encode()) for text in parts) // self._longest_token
        if least >= self._context_length:
            raise UnbrokenError(
                "context_length_exceeded",
                f"This model's maximum context length is {self._context_length} tokens, "
                f"but the prompt has more than {least}.",
                "messages",
            )

    def _check_media(
        self, messages: Sequence[Message], images: Sequence[Image], videos: Sequence[Video]
    ) -> None:
        for kind, given in (("image", images), ("video", videos)):
            if given and not getattr(self._processor, f"{kind}_processor", None):
                raise UnbrokenError(
                    "invalid_media", f"This model does not take {kind}s.", _first(messages, kind)
                )
        if any(len(video.frames) > self._max_video_frames for video in videos):
            raise UnbrokenError(
                "invalid_media", "The video has too many frames.", _first(messages, "video")
            )

    def _shield_message(self, message: Message) -> dict[str, Any]:
        parts = [
            {"type": "text", "text": self._shield.hide(part.text)}
            if isinstance(part, TextPart)
            else {"type": part.media.kind}
            for part in message.parts
        ]
        content = parts if self._multimodal else "".join(part["text"] for part in parts)
        turn: dict[str, Any] = {"role": message.role, "content": content}
        for name in ("name", "tool_call_id"):
            if (value := getattr(message, name)) is not None:
                turn[name] = self._shield.hide(value)
        return turn

    def _render(self, conversation: list[dict[str, Any]]) -> str:
        try:
            text: str = self._processor.apply_chat_template(
                conversation,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise UnbrokenError(
                "invalid_value", f"The model's chat template says: {error}", "messages"
            ) from error
        return text

    def _process(
        self, text: str, images: Sequence[Image], videos: Sequence[Video]
    ) -> dict[str, Array]:
        bos = self._tokenizer.bos_token
        # A tokenizer's template is complete; a processor adds what the template has not written.
        arguments: dict[str, Any] = {"return_tensors": "pt"}
        if not self._multimodal or (bos and text.startswith(bos)):
            arguments["add_special_tokens"] = False
        if images:
            arguments["images"] = [[PillowImage.fromarray(image.array) for image in images]]
        if videos:
            padded = [_at_least(video, self._fewest_frames()) for video in videos]
            arguments["videos"] = [[_frames(video) for video in padded]]
            arguments["video_metadata"] = [[_metadata(video) for video in padded]]
            arguments["do_sample_frames"] = False
        try:
            outputs = self._processor(text=[text], **arguments)
        except ValueError as error:
            if not images and not videos:
                raise
            log.info("the processor refused media: %s", error)
            raise UnbrokenError(
                "invalid_media",
                "The model's processor does not take this image or video (its size or shape).",
            ) from error
        return {
            name: value.numpy()
            for name, value in outputs.items()
            if isinstance(value, torch.Tensor)
        }

    def _fewest_frames(self) -> int:
        return int(getattr(self._processor.video_processor, "temporal_patch_size", None) or 1)

    def _thinking(self, ids: list[int]) -> bool:
        """Tell whether the prompt ends inside a thought that the template has opened."""
        opened = self._tokenizer.convert_tokens_to_ids("<think>")
        if opened is None or opened == self._tokenizer.unk_token_id:
            tail = self._tokenizer.decode(ids[-8:])
            return bool(tail.rstrip().endswith("<think>"))
        if opened not in ids:
            return False
        since = ids[len(ids) - ids[::-1].index(opened) :]
        closed = self._tokenizer.convert_tokens_to_ids("</think>")
        return closed not in since and self._shield.special_ids.isdisjoint(since)


class _ControlTokens:
    """Keeps the text of clients from becoming control tokens (`<|im_end|>`, `<|image_pad|>`, …).

    Each control token has a stand-in, an added token of a random name. `hide` puts the stand-ins
    into a client's text, so that neither the processor, which counts and expands placeholders, nor
    the tokenizer sees the tokens there; `restore` then puts the ids of the same characters, read
    as ordinary text, into their places.
    """

    def __init__(self, tokenizer: Any, processor: Any) -> None:
        from transformers import AddedToken

        added = tokenizer.added_tokens_decoder
        names = {token.content for token in added.values() if token.special}
        names |= {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")}
        tokens = sorted((n for n in names if n and n.strip()), key=len, reverse=True)
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        plain = [_encode_as_text(tokenizer, token) for token in tokens]
        nonce = secrets.token_hex(8)
        self._stand_ins = {token: f"q{nonce}x{n}q" for n, token in enumerate(tokens)}
        tokenizer.add_tokens(
            [AddedToken(s, special=True, normalized=False) for s in self._stand_ins.values()]
        )
        ids = tokenizer.convert_tokens_to_ids(list(self._stand_ins.values()))
        self._plain: dict[int, list[int]] = dict(zip(ids, plain, strict=True))
        self._refused = {
            token
            for token, plain_ids in zip(tokens, plain, strict=True)
            if not self.special_ids.isdisjoint(plain_ids)
        }

    def hide(self, text: str) -> str:
        """Replace the control tokens in a client's text by their stand-ins."""
        return self._pattern.sub(self._stand_in, text)

    def _stand_in(self, match: re.Match[str]) -> str:
        if match.group() in self._refused:
            raise UnbrokenError(
                "invalid_value", f"The text contains the control token {match.group()}.", "messages"
            )
        return self._stand_ins[match.group()]

    def restore(self, outputs: dict[str, Array]) -> tuple[list[int], dict[str, Array]]:
        """Return the ids without stand-ins, and the other outputs, fitted to them."""
        ids: list[int] = outputs["input_ids"][0].tolist()
        tensors = {
            name: array
            for name, array in outputs.items()
            if name not in ("input_ids", "attention_mask")
        }
        if self._plain.keys().isdisjoint(ids):
            return ids, tensors
        lengths = [len(self._plain.get(index, (0,))) for index in ids]
        for name, array in tensors.items():
            if array.shape == (1, len(ids)):  # one value for each token
                tensors[name] = np.repeat(array, lengths, axis=1)
        return [new for old in ids for new in self._plain.get(old, (old,))], tensors


def _digest(tensors: dict[str, Array]) -> str:
    """Identify media by what the model is to see of them."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors.keys() - TOKEN_KINDS):  # these depend on the text around
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _encode_as_text(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def _load(model: str, hf_token: str | None, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()  # its lines shall be JSON too
    transformers_logging.enable_propagation()
    options: dict[str, Any] = {"token": hf_token, "trust_remote_code": trust_remote_code}
    try:
        try:
            return AutoProcessor.from_pretrained(model, **options)
        except (OSError, ValueError):
            if hasattr(AutoConfig.from_pretrained(model, **options), "vision_config"):
                raise
            return AutoTokenizer.from_pretrained(model, **options)  # a model of text only
    except Exception as error:
        log.exception("no processor", extra={"why": str(error)[:500]})
        raise _not_ready(model, f"cannot be loaded ({type(error).__name__})") from error


def _not_ready(model: str, what: str) -> UnbrokenError:
    name = Path(model).name if Path(model).is_dir() else model
    return UnbrokenError("model_not_ready", f"The processor of '{name}' {what}.")


def _first(messages: Sequence[Message], kind: str) -> str | None:
    for i, message in enumerate(messages):
        for j, part in enumerate(message.parts):
            if isinstance(part, MediaPart) and part.media.kind == kind:
                return f"messages[{i}].content[{j}]"
    return None


def _at_least(video: Video, count: int) -> Video:
    """Repeat the last frame of a video that is shorter than one temporal patch."""
    missing = count - len(video.frames)
    if missing <= 0:
        return video
    frames = np.concatenate([video.frames, np.repeat(video.frames[-1:], missing, axis=0)])
    return Video(
        frames,
        video.indices + video.indices[-1:] * missing,
        video.fps,
        video.total_frames,
        video.times + video.times[-1:] * missing,
    )


def _frames(video: Video) -> torch.Tensor:
    # Channels first, as the processor's own decoders give them: no guess from the sizes.
    return torch.from_numpy(np.ascontiguousarray(video.frames.transpose(0, 3, 1, 2)))


def _metadata(video: Video) -> dict[str, Any]:
    """Describe the frames so that `index / fps`, as processors compute it, is the true time."""
    regular = all(
        abs(index / video.fps - time) < 0.5 / video.fps
        for index, time in zip(video.indices, video.times, strict=True)
    )
    positions = video.indices if regular else [time * video.fps for time in video.times]
    return {
        "total_num_frames": video.total_frames,
        "fps": video.fps,
        "frames_indices": list(positions),
        "height": video.frames.shape[1],
        "width": video.frames.shape[2],
        "duration": video.total_frames / video.fps,
    }


def create(
    options: Mapping[str, Any],
) -> Callable[[tuple[Sequence[Message], Sequence[Media]]], Prompt]:
    """Load a `PromptProcessor(**options)` in a child process; the handler takes its arguments."""
    torch.set_num_threads(1)  # the engine needs the cores
    processor = PromptProcessor(**options)
    return lambda payload: processor.build(*payload)
