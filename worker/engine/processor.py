"""Turns messages and decoded media into model input by the model's own chat template and processor.

Runs in a child process of its own (`create`), because tokenizing and resizing hold the GIL.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image as PillowImage

from shared.errors import UnbrokenError
from shared.protocol import MediaPart, Message, TextPart, ToolCall, Tools
from worker.decoder import Image, Video
from worker.engine.control_tokens import ControlTokens
from worker.engine.messages import AnswerForm, Prompt
from worker.engine.sequence import TOKEN_KINDS
from worker.engine.torchvision_shim import prepare_torchvision
from worker.tools import parser_for

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
        self._parser = parser_for(self._template)
        self._shield = ControlTokens(self._tokenizer, self._processor)

    def build(
        self,
        messages: Sequence[Message],
        media: Sequence[Media],
        tools: Tools | None = None,
        schema: str = "",
        effort: str = "",
    ) -> Prompt:
        """Render, expand and tokenize a conversation.

        Args:
            messages: the conversation.
            media: what its media parts refer to, in order.
            tools: the functions that may be called.
            schema: the JSON Schema of the answer.
            effort: of reasoning, for the chat template.

        Returns:
            The prompt. `tensors` has all of the processor's outputs but `input_ids` and the
            attention mask, which is all ones.

        Raises:
            UnbrokenError: the model cannot take these messages or media.
        """
        images = [item for item in media if isinstance(item, Image)]
        videos = [item for item in media if isinstance(item, Video)]
        self._check_media(messages, images, videos)
        self._check_length(messages, tools)
        conversation = [self._shield_message(message) for message in messages]
        text = self._render(conversation, self._definitions(tools), effort)
        outputs = self._process(text, images, videos)
        ids, tensors = self._shield.restore(outputs)
        digest = _digest(tensors) if media else ""
        form = answer_form(tools, schema, self._parser)
        return Prompt(ids, tensors, self._thinking(ids), digest, form)

    def _definitions(self, tools: Tools | None) -> list[Any] | None:
        if tools is None:
            return None
        if not self._parser:
            raise UnbrokenError(
                "unsupported_parameter", "'tools' are not supported with this model.", "tools"
            )
        return [self._shield.hide_in(json.loads(f.definition)) for f in tools.functions]

    def _check_length(self, messages: Sequence[Message], tools: Tools | None) -> None:
        texts = [p.text for m in messages for p in m.parts if isinstance(p, TextPart)]
        texts += [call.arguments for message in messages for call in message.tool_calls]
        texts += [function.definition for function in tools.functions] if tools else []
        least = sum(len(text.encode()) for text in texts) // self._longest_token
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
        if message.tool_calls:
            turn["tool_calls"] = [self._shield_call(call) for call in message.tool_calls]
        return turn

    def _shield_call(self, call: ToolCall) -> dict[str, Any]:
        """Return a call as templates want it: arguments as an object, where they are one."""
        try:
            arguments = self._shield.hide_in(json.loads(call.arguments))
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            arguments = self._shield.hide(call.arguments)
        function = {"name": self._shield.hide(call.name), "arguments": arguments}
        return {"type": "function", "id": self._shield.hide(call.id), "function": function}

    def _render(
        self, conversation: list[dict[str, Any]], tools: list[Any] | None, effort: str
    ) -> str:
        options: dict[str, Any] = {}
        if effort:  # templates pass over what they do not know
            options = {"enable_thinking": effort != "none", "reasoning_effort": effort}
        try:
            text: str = self._processor.apply_chat_template(
                conversation,
                chat_template=self._template,
                tools=tools,
                tokenize=False,
                add_generation_prompt=True,
                **options,
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


def _digest(tensors: dict[str, Array]) -> str:
    """Identify media by what the model is to see of them."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors.keys() - TOKEN_KINDS):  # these depend on the text around
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


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


def answer_form(tools: Tools | None, schema: str, parser: str) -> AnswerForm:
    """Return what the answer to a request has to look like."""
    if tools is None:
        return AnswerForm(schema)
    functions = tuple((f.name, f.schema) for f in tools.functions if tools.only in (None, f.name))
    parallel = tools.parallel and tools.only is None
    strict = tuple(function.name for function in tools.functions if function.strict)
    return AnswerForm(schema, parser, functions, tools.choice == "required", parallel, strict)


def create(
    options: Mapping[str, Any],
) -> Callable[[tuple[Any, ...]], Prompt]:
    """Load a `PromptProcessor(**options)` in a child process; the handler takes its arguments."""
    torch.set_num_threads(1)  # the engine needs the cores
    processor = PromptProcessor(**options)
    with contextlib.suppress(Exception):  # a request would say why
        processor.build((Message("user", (TextPart("Hello!"),)),), ())  # compiles the template
    return lambda payload: processor.build(*payload)
