"""What the tests on a GPU share: where they run, what they compare with, what they report to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from cellserve.models.signature import MODEL_NAME, STEP_NAME
from cellserve.service.runtime.onnx_model import Runtime, RuntimeOptions, StateMemory
from cellserve.service.runtime.providers import CPU, CUDA, Provider, RuntimeUnavailable, providers
from tests.gpu import machine
from tests.gpu.references import Reference, model_folder, names
from tests.gpu.report import Report
from tests.server import Server, start_server

# What is learned first where the time runs out.
ORDER = ("test_opening", "test_parity", "test_exactness", "test_sessions", "test_device", "test_speed")

Open = Callable[..., Runtime]  # of a model's name and a provider, and threads where they are not one


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--provider", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses without a GPU")
    group.addoption("--references", type=Path, default=Path("gpu-references"), help="what `make gpu-references` made")
    group.addoption("--report", type=Path, default=Path("gpu-report.md"), help="where to write what was seen")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Says in one line what is missing; no test is skipped for it."""
    folder = session.config.getoption("--references")
    if not names(folder):
        raise pytest.UsageError(
            f"{folder}/ holds no references: make them with `make gpu-references` where TensorFlow is installed, "
            f"carry the folder here, and name it with --references"
        )
    try:
        providers(session.config.getoption("--provider"))
    except RuntimeUnavailable as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names(metafunc.config.getoption("--references")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem))


@pytest.fixture(scope="session")
def folder(pytestconfig: pytest.Config) -> Path:
    """The references; the models are in `artifacts` there."""
    return Path(pytestconfig.getoption("--references"))


@pytest.fixture(scope="session")
def provider(pytestconfig: pytest.Config) -> Provider:
    """What is tested: cuda, or cpu in a rehearsal."""
    asked: Provider = pytestconfig.getoption("--provider")
    return asked


@pytest.fixture(scope="session")
def execution_provider(provider: Provider) -> str:
    """ONNX Runtime's name for it."""
    return CUDA if provider == "cuda" else CPU


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config, provider: Provider) -> Report:
    """What was seen."""
    what = "on a GPU" if provider == "cuda" else "rehearsed on the CPU: nothing here is of a GPU"
    report = Report(pytestconfig.getoption("--report"), f"Cellserve {what}, {time.strftime('%Y-%m-%d')}")
    for part, told in machine.describe().items():
        report.row("Machine", {"part": part, "": told})
    return report


@pytest.fixture(scope="session")
def opened(folder: Path, provider: Provider) -> Open:
    """Opens a model on a provider, once, as the service does."""

    @cache
    def opened(name: str, on: Provider, threads: int = 1) -> Runtime:
        files = model_folder(folder, name)
        step = files / STEP_NAME if (files / STEP_NAME).exists() else None
        # The tested provider takes a GPU's way in a rehearsal too.
        state_memory: StateMemory = "device" if on == provider and threads == 1 else "host"
        options = RuntimeOptions(provider=on, threads=threads, state_memory=state_memory)
        return Runtime(files / MODEL_NAME, options, step)

    return opened


def start_gpu_server(folder: Path, provider: Provider, *more: str) -> Server:
    """Starts a server process of all models on the provider, their states on the device."""
    models = "--models", str(folder / "artifacts"), "--provider", provider
    return start_server(*models, "--state-memory", "device", *more, fresh=True)


@pytest.fixture(scope="session")
def server(folder: Path, provider: Provider) -> Iterator[Server]:
    """A server process of all models on the provider."""
    server = start_gpu_server(folder, provider)
    yield server
    assert server.stop() == 0


@pytest.fixture
def reference(folder: Path, name: str) -> Reference:
    """Keras's numbers for the model `name`."""
    return Reference.read(folder / f"{name}.npz")
