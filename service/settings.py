"""The service's settings: one frozen class, each setting a flag of `cellserve serve` and a variable `CELLSERVE_...`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from cellserve.service.runtime.onnx_model import Optimization, Provider

LogFormat = Literal["text", "json"]
WhenFull = Literal["refuse", "evict"]

ENV_PREFIX = "CELLSERVE_"


class Settings(BaseSettings):
    """What can be set; `docs/settings.md` tells of each when to change it."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    models: Path = Field(Path("artifacts"), description="the model repository: NAME/VERSION/model.onnx")
    reload_seconds: float = Field(
        5, ge=0, description="how often the model repository is looked over for new versions; 0 for never"
    )
    max_model_bytes: int = Field(1024**3, ge=1, description="size of a model file, at most")
    max_old_versions: int = Field(
        8, ge=0, description="versions loaded beside the newest of each model because they were asked for, at most"
    )
    host: str = Field("127.0.0.1", description="the address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="the port to listen on; 0 takes a free one")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="the port of the Open Inference Protocol over gRPC; 0 takes a free one"
    )
    provider: Provider = Field("auto", description="where to run: auto (CUDA where it can be opened), cpu or cuda")
    threads: int = Field(1, ge=1, le=256, description="threads of ONNX Runtime within one run")
    spinning: bool = Field(False, description="whether ONNX Runtime's threads spin while they wait")
    memory_arena: bool = Field(True, description="whether ONNX Runtime keeps freed memory for the next run")
    optimization: Optimization = Field("all", description="how far graphs are optimised: all, extended, basic or off")
    max_batch: int = Field(256, ge=1, le=65536, description="rows of one run, at most")
    quantum: int = Field(32, ge=1, le=65536, description="time steps that one run takes of one row, at most")
    inline_microseconds: int = Field(
        1000, ge=0, description="runs predicted to take no longer are made in the event loop, others on a thread"
    )
    max_queued_steps: int = Field(
        1_000_000, ge=1, description="time steps that may wait to be run, for each model; more are answered 503"
    )
    max_whole_steps: int = Field(
        65_536, ge=1, description="time steps of one run of a model that cannot be stepped; a longer sequence gets 413"
    )
    max_rollout_steps: int = Field(4096, ge=1, description="steps that a session may be asked to go on by itself")
    max_sessions: int = Field(100_000, ge=1, description="live sessions, at most")
    when_full: WhenFull = Field(
        "refuse",
        description="what one session too many meets: refuse (503), or evict the one idle for the longest time",
    )
    session_idle_seconds: float = Field(3600, gt=0, description="a session not used for so long expires")
    tombstone_seconds: float = Field(86400, ge=0, description="for how long a session that is gone is answered 410")
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="size of a request's body, at most")
    stream_window: int = Field(
        256, ge=1, le=65536, description="frames of one WebSocket that may be under way; then it is read no further"
    )
    max_sequences: int = Field(4096, ge=1, description="sequences of one request, at most")
    workers: int = Field(1, ge=1, le=256, description="processes that serve; more than one need a shared store")
    store: str = Field(
        "memory",
        description="where sessions are kept: memory, or redis://HOST:PORT/DB (rediss, unix, redis+cluster) for "
        "several replicas",
    )
    store_timeout_seconds: float = Field(2, gt=0, description="for how long an answer of the store is waited for")
    store_replicas: int = Field(
        0, ge=0, description="replicas of the store that must have a write before it is answered (WAIT)"
    )
    arena_sessions: int = Field(
        100_000, ge=1, description="sessions of a model held in memory with a shared store; others live there alone"
    )
    snapshot: Path | None = Field(
        None, description="a file that all sessions are written to on shutdown and every snapshot_seconds"
    )
    snapshot_seconds: float = Field(60, gt=0, description="for how long changes may go without a snapshot")
    api_keys_file: Path | None = Field(
        None, description="the API keys that are taken, lines owner:sha256; without it nobody needs one"
    )
    operators: str = Field(
        "",
        pattern=r"^([A-Za-z0-9._-]+(,[A-Za-z0-9._-]+)*)?$",
        description="owners, separated by commas, whose keys may read /metrics and reload models",
    )
    operations_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="a second port, for /metrics, reloading, /healthz and /readyz; no key is needed there",
    )
    log_format: LogFormat = Field("text", description="lines of the log: text, or json, an object each")
    access_log: bool = Field(False, description="whether each request is a line of the log")
    tracing: bool = Field(
        False, description="whether requests are traced (OpenTelemetry), to where OTEL_EXPORTER_OTLP_ENDPOINT says"
    )
    allowed_origins: str = Field(
        "", description="origins of pages that may open a WebSocket here, separated by commas; its own always may"
    )
    shutdown_seconds: int = Field(30, ge=0, description="for how long a stopping server finishes what it has accepted")

    @property
    def held_sessions(self) -> int:
        """Sessions of a model that have slots here, at most."""
        return self.max_sessions if self.store == "memory" else self.arena_sessions
