"""Loads model and tokenizer by `from_pretrained`.

Whatever goes wrong becomes one sentence for operator and client.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from worker.engine.bucketed import BucketOptions, best_options
from worker.engine.defaults import longest_token, sampling_defaults
from worker.engine.memory import available_memory
from worker.engine.messages import EngineConfig

log = logging.getLogger("unbroken.engine.loader")

Progress = Callable[[str, "float | None"], None]

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
HALF = (torch.bfloat16, torch.float16)
CODE_AND_CONFIG = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
OTHER_FORMATS = ("consolidated*", "original/*", "onnx/*", "*.gguf")
MEMORY_HEADROOM = 1.1  # buffers, the largest tensor twice while it is converted


class LoadError(Exception):
    """The model cannot be loaded; the message is one sentence, without paths or keys."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what identifies it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    context_length: int
    device: str
    dtype: str
    fingerprint: str
    exact: bool = True
    replay: bool = False
    bucketed: BucketOptions | None = None
    defaults: dict[str, float] = field(default_factory=dict)
    token_bytes: int = 0


def use_threads(count: int) -> None:
    """Bound the threads of torch's operators in this process; call it before any of them runs."""
    torch.set_num_threads(count)
    torch.set_num_interop_threads(1)


def display_name(model: str) -> str:
    """Name a model in answers: a hub id as it is, a folder by its last part only."""
    path = Path(model).expanduser()
    return path.resolve().name if _is_path(model) else model


def load(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Load what the configuration names.

    `dtype` "auto" keeps the checkpoint's own on a GPU. On a CPU a half-precision checkpoint is
    widened to float32: most CPUs have no fast half arithmetic, and a stream continued after a crash
    equals the undisturbed one only in float32 and wider. "bfloat16" asks for it all the same.

    Args:
        config: the engine's configuration.
        progress: is told (stage, fraction or None) as loading goes on.

    Raises:
        LoadError: with the reason.
    """
    name = display_name(config.model)
    transformers_logging.disable_default_handler()  # its lines shall be JSON too
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()  # `progress` tells; a bar would be no JSON
    with _explained(name):
        folder = _folder(config, name, progress)
        progress("reading the configuration", None)
        options = {"trust_remote_code": config.trust_remote_code}
        model_config = AutoConfig.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        dtype = _dtype(config, model_config)
        if not _uses_gpu(config):
            _check_memory(name, folder, model_config, dtype)
        progress("loading the weights", None)
        model = _model(config, folder, model_config, dtype)
    return _describe(config, name, folder, model, tokenizer)


def _folder(config: EngineConfig, name: str, progress: Progress) -> Path:
    """Return the folder that holds the model; download it where it is not local."""
    if _is_path(config.model):
        folder = Path(config.model).expanduser()
        if not folder.is_dir():
            raise LoadError(f"There is no model folder named '{name}'.")
        if not (folder / "config.json").is_file():
            raise LoadError(f"The model folder '{name}' has no config.json.")
        return folder
    progress("downloading", None)
    folder = _download(config, [*CODE_AND_CONFIG, "*.safetensors"], progress)
    if not any(folder.glob("*.safetensors")):
        folder = _download(config, [*CODE_AND_CONFIG, "*.bin"], progress)
    return folder


def _download(config: EngineConfig, patterns: list[str], progress: Progress) -> Path:
    class Bar(tqdm):
        """Reports the bytes that are there instead of drawing a bar."""

        last = -1

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_files = kwargs.get("unit") != "B" or "Reconstr" not in str(
                kwargs.get("desc")
            )
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            drawn = super().update(n)
            percent = int(100 * self.n / self.total) if self.total else 0
            if not self.counts_files and percent != self.last:
                self.last = percent
                size = f"downloading {self.n / 1e9:.2f} of {self.total / 1e9:.2f} GB"
                progress(size, min(percent, 100) / 100)
            return drawn

    return Path(
        snapshot_download(
            config.model,
            token=config.hf_token,
            allow_patterns=patterns,
            ignore_patterns=list(OTHER_FORMATS),
            tqdm_class=Bar,
        )
    )


class _Nowhere:
    """A file that swallows what a progress bar draws."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _is_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or Path(model).is_dir() or model.count("/") > 1


def _uses_gpu(config: EngineConfig) -> bool:
    return config.device_map != "cpu" and torch.accelerator.is_available()


def _dtype(config: EngineConfig, model_config: PreTrainedConfig) -> torch.dtype:
    if config.dtype != "auto":
        if config.dtype not in DTYPES:
            raise LoadError(
                f"TORCH_DTYPE must be auto, {', '.join(DTYPES)}; it is '{config.dtype}'."
            )
        return DTYPES[config.dtype]
    stored = _stored_dtype(model_config)
    return torch.float32 if stored in HALF and not _uses_gpu(config) else stored


def _stored_dtype(model_config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype of the checkpoint's weights as its configuration states it."""
    stated = (part.dtype for part in (model_config, model_config.get_text_config()))
    return next((dtype for dtype in stated if isinstance(dtype, torch.dtype)), torch.float32)


def _check_memory(
    name: str, folder: Path, model_config: PreTrainedConfig, dtype: torch.dtype
) -> None:
    """Refuse a model that does not fit: the kernel would kill the process without a word."""
    stored = sum(path.stat().st_size for path in _weight_files(folder))
    needed = stored * dtype.itemsize / _stored_dtype(model_config).itemsize * MEMORY_HEADROOM
    if needed > (available := available_memory()):
        raise LoadError(
            f"Not enough memory for '{name}': it needs {needed / 2**30:.1f} GiB as "
            f"{_dtype_name(dtype)}, and {available / 2**30:.1f} GiB are available."
        )


def _weight_files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _model(
    config: EngineConfig, folder: Path, model_config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    multimodal = type(model_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    remote = getattr(model_config, "auto_map", {})
    if multimodal or AutoModelForImageTextToText.__name__ in remote:
        auto = AutoModelForImageTextToText
    else:
        auto = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(
        folder,
        config=model_config,
        dtype=dtype,
        # Without a GPU a map would only offer to spill weights to the disk.
        device_map=config.device_map if _uses_gpu(config) else None,
        attn_implementation="sdpa",
        trust_remote_code=config.trust_remote_code,
    )
    spilled = {"cpu", "disk"} & {str(d) for d in getattr(model, "hf_device_map", {}).values()}
    if spilled and _uses_gpu(config):
        raise LoadError(f"Not enough GPU memory for '{display_name(config.model)}'.")
    return model.eval().requires_grad_(False)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the libraries' exceptions into a `LoadError` of one sentence."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        reason = _known_reason(name, error)
        if reason is None:
            log.exception("'%s' cannot be loaded", name, extra={"why": str(error)[:500]})
            kind = type(error).__name__
            reason = f"'{name}' cannot be loaded ({kind}; the worker's log has the details)."
        raise LoadError(reason) from error


# The first that fits: a gated repository's error is also one of a repository not found.
HUB_REASONS: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((hub.GatedRepoError,), "'{}' is gated: accept its terms on the hub and set HF_TOKEN."),
    (
        (hub.RepositoryNotFoundError,),
        "The hub has no model '{}', or it is private and HF_TOKEN does not open it.",
    ),
    ((hub.HFValidationError,), "'{}' is neither a model folder nor a hub repository id."),
    (
        (hub.LocalEntryNotFoundError, hub.HfHubHTTPError, ConnectionError),
        "The Hugging Face hub cannot be reached, and '{}' is not in the local cache.",
    ),
)


def _known_reason(name: str, error: Exception) -> str | None:
    for kinds, sentence in HUB_REASONS:
        if isinstance(error, kinds):
            return sentence.format(name)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error):
        return f"Not enough memory for '{name}'."
    if "trust_remote_code" in str(error):
        return f"'{name}' brings code of its own: set TRUST_REMOTE_CODE=1 if you trust it."
    return None


def _describe(
    config: EngineConfig,
    name: str,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> LoadedModel:
    text_config = model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or config.context_length
    device, dtype = _device_name(model.device), _dtype_name(model.dtype)
    # Where prefill rounds as decode does, the log need not be fed token by token.
    cpu = model.device.type == "cpu"
    alike = cpu and model.dtype not in HALF
    wanted = cpu if config.exact is None else config.exact
    parts = (
        name,
        _content_hash(folder, model.config),
        device,
        dtype,
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    )
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(model, tokenizer),
        context_length=min(config.context_length, limit),
        device=device,
        dtype=dtype,
        fingerprint=" | ".join(parts),
        exact=alike or wanted,
        replay=wanted and not alike,
        bucketed=best_options(model, exact=wanted) if config.graphs else None,
        defaults=sampling_defaults(model.generation_config),
        token_bytes=longest_token(tokenizer),
    )


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*found, tokenizer.eos_token_id) if i is not None)


def _device_name(device: torch.device) -> str:
    """Name the hardware that rounding depends on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return str(device)


def _content_hash(folder: Path, model_config: PreTrainedConfig) -> str:
    """Hash the configuration and the weight files' names and sizes."""
    content = model_config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype"):
        content.pop(volatile, None)
    sizes = [(path.name, path.stat().st_size) for path in _weight_files(folder)]
    text = json.dumps([content, sizes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
