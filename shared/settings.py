"""Every environment variable, and the only reader of the environment."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Flag = Annotated[bool, BeforeValidator(lambda v: False if v == "" else v)]


class SharedSettings(BaseSettings):
    """What gateway and worker must agree on."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, protected_namespaces=()
    )

    redis_url: str = "redis://127.0.0.1:6379/0"
    sessions_ttl_seconds: int = Field(default=3600, ge=1)
    cancel_after_disconnect_seconds: float = Field(default=3600, ge=0)
    persist_sessions: Flag = False
    drain_seconds: float = Field(default=20, ge=0)
    queue_timeout_seconds: float = Field(default=600, ge=1, le=12 * 3600)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class GatewaySettings(SharedSettings):
    """The gateway's part."""

    host: str = "127.0.0.1"
    port: int = Field(default=3000, ge=0, le=65535)
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.7, ge=0, le=2)
    max_queue: int = Field(default=1000, ge=1)
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    max_messages: int = Field(default=2048, ge=1)
    max_media_parts: int = Field(default=64, ge=1)
    strict_model: Flag = False
    api_keys: str = Field(default="", repr=False)
    api_keys_file: str = ""
    stream_url_secret: str = Field(default="", repr=False)
    stream_url_ttl_seconds: int = Field(default=3600, ge=1)
    cors_origins: str = ""
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    header_timeout_seconds: float = Field(default=15, gt=0)
    body_timeout_seconds: float = Field(default=120, gt=0)
    stalled_client_seconds: float = Field(default=60, gt=0)
    keepalive_seconds: float = Field(default=15, gt=0)
    sessions_db_path: str = "data/sessions.db"
    archive_ttl_seconds: int = Field(default=7 * 24 * 3600, ge=1)
    run_state_path: str = ""


class WorkerSettings(SharedSettings):
    """The worker's part."""

    model_repo_id: str = "Qwen/Qwen3-VL-2B-Thinking"
    hf_token: str | None = Field(default=None, repr=False)
    device_map: str = "auto"
    torch_dtype: str = "auto"
    trust_remote_code: Flag = False
    max_batch_size: int = Field(default=32, ge=1)
    context_length: int = Field(default=8192, ge=16)
    max_video_frames: int = Field(default=16, ge=1)
    max_media_bytes: int = Field(default=64 * 2**20, ge=1024)
    max_media_pixels: int = Field(default=64_000_000, ge=1024)
    media_timeout_seconds: float = Field(default=20, gt=0)
    media_processes: int = Field(default=1, ge=1)
    media_allowed_hosts: str = ""
    media_memory_bytes: int = Field(default=2 * 2**30, ge=2**27)
    max_media_aspect: int = Field(default=200, ge=1)
    engine_threads: int = Field(default=1, ge=1)
    max_steps_per_second: float = Field(default=0, ge=0)
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535)
    cache_bytes: int = Field(default=0, ge=0)
    prefix_cache_bytes: int = Field(default=512 * 2**20, ge=0)
    prefill_chunk_tokens: int = Field(default=512, ge=16)
    exact: Literal["auto", "0", "1"] = "auto"
    cuda_graphs: Literal["auto", "0"] = "auto"
    max_attempts: int = Field(default=3, ge=1)
    step_timeout_seconds: float = Field(default=120, gt=0)
    status_file: str = ""
