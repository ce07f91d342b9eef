"""The service's settings: each is a flag of `cellserve serve` and an environment variable `CELLSERVE_...`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Literal, LiteralString, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from cellserve.service.runtime.onnx_model import Optimization, Precision, StateMemory, WhenInexact
from cellserve.service.runtime.providers import Provider

LogFormat = Literal["text", "json"]
WhenFull = Literal["refuse", "evict"]
StoreSync = Literal["checkpoints", "always"]

ENV_PREFIX = "CELLSERVE_"
_LEAST_EXCHANGE_BYTES = 1024 * 1024
_OF_CLIENTS = ("api_key",)  # of a variable that is none of the server's: `cellserve bench` reads it
# Left out of --help: only measurements justify changing them. docs/reference/settings.md has them all.
TUNING = frozenset(
    {"spinning", "memory_arena", "optimization", "state_memory", "quantum", "inline_microseconds", "store_replicas"}
)


class Settings(BaseSettings):
    """All settings; `docs/reference/settings.md` says when to change each."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    models: Path = Field(Path("artifacts"), description="model repository, laid out as NAME/VERSION/model.onnx")
    reload_seconds: float = Field(5, ge=0, description="seconds between scans for new model versions; 0: never")
    max_model_bytes: int = Field(1024**3, ge=1, description="maximum size of a model file, in bytes")
    max_old_versions: int = Field(8, ge=0, description="maximum versions loaded on request besides the newest")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="port of the Open Inference Protocol over gRPC; 0 picks a free one"
    )
    provider: Provider = Field("auto", description="where models run: auto (CUDA if it can be opened), cpu or cuda")
    precision: Precision = Field("float32", description="precision of products on CUDA: float32, or float16")
    cuda_tf32: bool = Field(False, description="whether CUDA may multiply float32 matrices as TF32")
    state_memory: StateMemory = Field(
        "auto", description="where states are kept: host, device, or auto (on CUDA: device)"
    )
    threads: int = Field(1, ge=1, le=256, description="ONNX Runtime threads per run")
    spinning: bool = Field(False, description="whether idle ONNX Runtime threads spin while they wait")
    memory_arena: bool = Field(True, description="whether ONNX Runtime keeps freed memory for the next run")
    optimization: Optimization = Field(
        "all", description="ONNX Runtime graph optimization: all, extended, basic or off"
    )
    when_inexact: WhenInexact = Field(
        "one-row",
        description="models whose bits depend on the batch: one-row is exact and slow, batch fast and not exact",
    )
    max_batch: int = Field(256, ge=1, le=65536, description="maximum rows per run")
    quantum: int = Field(256, ge=1, le=65536, description="maximum time steps of one row per run")
    inline_microseconds: int = Field(1000, ge=0, description="runs predicted to take longer use a thread")
    max_queued_steps: int = Field(1_000_000, ge=1, description="maximum queued time steps per model; then 503")
    max_queued_steps_per_client: int = Field(
        250_000, ge=1, description="maximum queued time steps per model and client; one request with more: 413"
    )
    max_whole_steps: int = Field(65_536, ge=1, description="maximum time steps per run of a predict-only model")
    max_rollout_steps: int = Field(4096, ge=1, description="maximum steps per rollout request")
    max_sessions: int = Field(100_000, ge=1, description="maximum live sessions")
    max_sessions_per_owner: int = Field(50_000, ge=1, description="maximum live sessions of one client")
    max_session_bytes_per_owner: int = Field(
        1024**3, ge=1, description="maximum bytes of the states of one client's sessions"
    )
    when_full: WhenFull = Field(
        "refuse",
        description="at a limit on sessions: refuse (503), or evict the longest idle one",
    )
    session_idle_seconds: float = Field(3600, gt=0, description="idle seconds after which a session expires")
    tombstone_seconds: float = Field(86400, ge=0, description="seconds for which an ended session answers 410")
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="maximum size of a request body, in bytes")
    stream_window: int = Field(256, ge=1, le=65536, description="maximum frames in flight per WebSocket")
    max_connections: int = Field(10_000, ge=1, description="maximum connections, fewer if open files are limited")
    max_connections_per_client: int = Field(1000, ge=1, description="maximum connections from one address")
    head_seconds: float = Field(10, gt=0, description="seconds for a request's head to arrive")
    body_seconds: float = Field(30, gt=0, description="seconds for each further 64 KB of a body to arrive")
    answer_seconds: float = Field(30, gt=0, description="seconds for each further 64 KB of an answer to be read")
    idle_seconds: float = Field(75, gt=0, description="seconds for which a connection without a request is kept")
    pong_seconds: float = Field(20, gt=0, description="seconds between pings on a WebSocket, and to answer one")
    max_sequences: int = Field(4096, ge=1, description="maximum sequences per request")
    workers: int = Field(
        1, ge=1, le=256, description="server processes, or auto: one per core; more than one need a shared store"
    )
    store: str = Field(
        "memory",
        description="memory, lmdb:FOLDER, or redis://HOST:PORT/DB (rediss, unix, redis+sentinel, redis+cluster)",
    )
    store_sync: StoreSync = Field(
        "checkpoints", description="when lmdb:FOLDER is synced to disk: at checkpoints, or always before an answer"
    )
    store_checkpoint_seconds: float = Field(
        10, ge=0, description="seconds between checkpoints of lmdb:FOLDER, for a power cut; 0: none"
    )
    store_max_bytes: int = Field(64 * 1024**3, ge=1024**2, description="maximum size of lmdb:FOLDER, in bytes")
    store_timeout_seconds: float = Field(2, gt=0, description="seconds to wait for an answer of the store")
    store_replicas: int = Field(0, ge=0, description="store replicas that must confirm each write (WAIT)")
    arena_sessions: int = Field(100_000, ge=1, description="sessions per model held in memory with a shared store")
    api_keys_file: Path | None = Field(None, description="accepted API keys, lines owner:sha256; unset: no keys")
    operators: str = Field(
        "",
        pattern=r"^([A-Za-z0-9._-]+(,[A-Za-z0-9._-]+)*)?$",
        description="comma-separated owners who may read /metrics and reload models",
    )
    operations_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="second port, without keys: /metrics, reload, health",
    )
    no_page: bool = Field(False, description="whether to leave out the page at /")
    log_format: LogFormat = Field("text", description="text, or json with one object per line")
    access_log: bool = Field(False, description="whether each request is logged")
    tracing: bool = Field(False, description="whether to send OpenTelemetry traces to OTEL_EXPORTER_OTLP_ENDPOINT")
    trusted_proxies: str = Field(
        "", description="comma-separated addresses and networks of proxies whose X-Forwarded headers are believed"
    )
    allowed_origins: str = Field("", description="comma-separated origins whose pages may use this server")
    allowed_hosts: str = Field("", description="comma-separated names that requests may have in Host; unset: any")
    root_path: str = Field(
        "", pattern=r"^(/[A-Za-z0-9._~-]+)*$", description="path under which a proxy publishes this server"
    )
    shutdown_seconds: int = Field(30, ge=0, description="seconds a stopping server has to finish accepted work")

    @model_validator(mode="after")
    def _check_sessions_are_shared(self) -> Self:
        if self.workers > 1 and self.store == "memory":
            raise _conflict(
                "workers",
                "each process would have its own sessions: give them a shared store with --store lmdb:FOLDER or redis://HOST:PORT",
            )
        return self

    @model_validator(mode="after")
    def _check_precision_has_a_gpu(self) -> Self:
        for name, reduced in (("precision", self.precision != "float32"), ("cuda_tf32", self.cuda_tf32)):
            if reduced and self.provider == "cpu":
                raise _conflict(name, "it is for CUDA, and models run on the CPU: leave it out, or --provider cpu")
        return self

    @field_validator("workers", mode="before")
    @classmethod
    def _count_cores(cls, value: object) -> object:
        return len(os.sched_getaffinity(0)) if value == "auto" else value

    @field_validator("store")
    @classmethod
    def _check_folder(cls, value: str) -> str:
        if value.strip() == "lmdb:":  # it would be the working directory
            raise PydanticCustomError("store", "the folder is missing: send lmdb:FOLDER")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_networks(cls, value: str) -> str:
        for one in filter(None, value.split(",")):
            try:
                ip_network(one.strip())
            except ValueError:
                raise PydanticCustomError(
                    "network",
                    "{one} is not an address or network: send such as 10.0.0.7,10.1.0.0/16",
                    {"one": one.strip()},
                ) from None
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: str) -> str:
        return _check_each(
            value, r"[a-z][a-z0-9+.-]*://[^/\s]+", "{one} is not an origin: send such as https://app.example"
        )

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, value: str) -> str:
        return _check_each(value, r"[a-z0-9._-]+", "{one} is not a name: send such as api.example, without a port")

    @model_validator(mode="after")
    def _check_ports_differ(self) -> Self:
        if self.workers > 1 and self.grpc_port == 0:
            raise _conflict("grpc_port", "0 would be another port in each of --workers: give a port number")
        flags: dict[int, str] = {}
        for name in ("port", "operations_port", "grpc_port"):
            port = getattr(self, name)
            if port in flags:
                raise _conflict(name, f"{port} is {flags[port]} already: give it another")
            if port:
                flags[port] = flag(name)
        return self

    @property
    def held_sessions(self) -> int:
        """Sessions of a model that have slots here, at most."""
        return self.max_sessions if self.store == "memory" else self.arena_sessions

    @property
    def max_exchange_bytes(self) -> int:
        """Bytes of a request's inputs and of its answer together, at most."""
        return max(_LEAST_EXCHANGE_BYTES, 4 * self.max_body_bytes)

    @property
    def max_socket_bytes(self) -> int:
        """Bytes of the frames in flight on a socket and of their answers together, at most."""
        return max(_LEAST_EXCHANGE_BYTES, 2 * self.max_body_bytes)


def unknown_variables(environment: Collection[str]) -> list[str]:
    """Returns a message for each environment variable that is named like a setting, but is none."""
    messages = []
    for variable in sorted(environment):
        name = variable.lower().removeprefix(ENV_PREFIX.lower())  # in any case, as pydantic-settings reads them
        if variable.upper().startswith(ENV_PREFIX) and name not in (*Settings.model_fields, *_OF_CLIENTS):
            nearest = get_close_matches(name, Settings.model_fields, 1)
            meant = f"did you mean {ENV_PREFIX}{nearest[0].upper()}?" if nearest else None
            advice = meant or "docs/reference/settings.md lists them"
            messages.append(f"{variable[:100]} is not a setting: {advice}")
    return messages


def _check_each(value: str, pattern: str, message: LiteralString) -> str:
    """Returns a comma-separated list; raises the error with this message if one of it does not match the pattern."""
    for one in filter(None, value.split(",")):
        if not re.fullmatch(pattern, one.strip(), re.IGNORECASE):
            raise PydanticCustomError("item", message, {"one": one.strip()})
    return value


def flag(name: str) -> str:
    """Returns a setting's flag."""
    return f"--{name.replace('_', '-')}"


def _conflict(name: str, message: str) -> PydanticCustomError:
    """Returns the error to raise where a setting conflicts with others."""
    return PydanticCustomError("conflict", "{flag}: {message}", {"flag": flag(name), "message": message})


def explain_invalid(error: ValidationError, given: Collection[str] = ()) -> str:
    """Returns what is wrong with the first invalid setting, named as the user gave it.

    Args:
        error: What is wrong.
        given: The settings that were given as flags; others are from the environment.
    """
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"]  # a conflict between settings names them itself
    name = str(first["loc"][0])
    place = flag(name) if name in given else f"{ENV_PREFIX}{name.upper()}"
    return f"{place}: {first['msg']}, got {first['input']!r}"
