"""The undisturbed truth: what the unmodified model says through `generate()`, in float64."""

from __future__ import annotations

from typing import Any

from PIL import Image as PillowImage

from tests.media_samples import data_url
from worker.decoder import Job, Limits, decode

LIMITS = Limits(10**7, 16)


class Oracle:
    """The demo model with its own processor, outside any server."""

    def __init__(self, folder: str) -> None:
        from worker.engine.torchvision_shim import prepare_torchvision

        prepare_torchvision()
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
        self.model = model.eval()

    def greedy(self, messages: list[dict[str, Any]], max_tokens: int) -> tuple[str, str, int]:
        """Return reasoning, answer and the number of tokens, by greedy decoding.

        `messages` are in the client's form, media as `data:` URLs.
        """
        conversation, videos = self._conversation(messages)
        options = {"video_metadata": [videos], "do_sample_frames": False} if videos else {}
        inputs = self.processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs=options,
        )
        output = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        ids = output[0, inputs["input_ids"].shape[1] :]
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        reasoning, tag, answer = text.partition("</think>")
        return reasoning, answer.lstrip("\n") if tag else "", len(ids)

    def _conversation(
        self, messages: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        conversation, videos = [], []
        for message in messages:
            content: list[dict[str, Any]] = []
            parts = message["content"]
            for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
                if part["type"] == "text":
                    content.append(part)
                    continue
                kind = part["type"].removesuffix("_url")
                decoded = decode(Job(kind, (_bytes(part[part["type"]]["url"]),)), LIMITS)
                if kind == "image":
                    content.append({"type": "image", "image": PillowImage.fromarray(decoded.array)})
                else:
                    content.append({"type": "video", "video": decoded.frames})
                    videos.append(
                        {
                            "fps": decoded.fps,
                            "frames_indices": list(decoded.indices),
                            "total_num_frames": decoded.total_frames,
                        }
                    )
            conversation.append({"role": message["role"], "content": content})
        return conversation, videos


def _bytes(url: str) -> bytes:
    import base64

    return base64.b64decode(url.partition(",")[2])


def image_part(data: bytes, media_type: str = "image/png") -> dict[str, Any]:
    """Return a message part that holds an image."""
    return {"type": "image_url", "image_url": {"url": data_url(data, media_type)}}


def video_part(data: bytes, media_type: str = "video/mp4") -> dict[str, Any]:
    """Return a message part that holds a video."""
    return {"type": "video_url", "video_url": {"url": data_url(data, media_type)}}


def text_part(text: str) -> dict[str, Any]:
    """Return a message part that holds text."""
    return {"type": "text", "text": text}
