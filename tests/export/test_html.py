"""report.html: whole, well-formed, from nowhere else, and safe whatever the network is called."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.export.pages import Page
from tests.export.unmeasured import unmeasured
from tests.helpers import FEATURES
from tests.networks import network

import keras  # isort: skip  after TensorFlow has been imported quietly
from keras import layers  # isort: skip

from cellserve.export.exporter import export, network_of
from cellserve.export.publish.request import ExportRequest
from cellserve.export.report.network_layers import layers_of
from cellserve.export.report.network_svg import draw_network
from cellserve.export.report.page import REPORT_NAME
from cellserve.models.cells import LSTMCell
from cellserve.models.signature import MODEL_NAME
from cellserve.service.runtime.onnx_model import Runtime

HOSTILE = "<img src=x onerror=\"alert(1)\"> & 'more'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("report")
    path = home / f"{HOSTILE.replace('/', '')}.keras"
    model = network(LSTMCell(6))
    model.save(home / "mine.keras")
    (home / "mine.keras").rename(path)
    path.with_suffix(".card.json").write_text(json.dumps({"description": HOSTILE}))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 6, FEATURES)).astype(np.float32)
    y = np.asarray(model(x))[:, -1].argmax(axis=-1)
    np.savez(home / "test.npz", x=x, lengths=np.full(20, 6, np.int32), y=y)
    with unmeasured():
        yield export(ExportRequest(path, "mine", home / "artifacts", data=home / "test.npz"), Console(quiet=True))


def test_the_report_has_every_section(folder: Path) -> None:
    page = Page((folder / REPORT_NAME).read_text())
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", (folder / REPORT_NAME).read_text())
    assert headings == [
        "Network",
        "Signature",
        "Forms and time",
        "Operators",
        "Parity with Keras",
        "Bit identity",
        "Test metrics",
        "Provenance",
    ]
    document = Runtime(folder / MODEL_NAME).document
    assert document.precision == "float32"
    for told in (
        *document.operators,
        *document.provenance.values(),
        document.exactness.why,
        document.form,
        "recurrent.h [6]",
        "[batch, time, 5]",
        "accuracy",
        "tf2onnx's Loop",
    ):
        assert told in page.text, told


def test_the_drawings_have_titles_and_descriptions_and_the_curve_a_point_for_each_time_step(folder: Path) -> None:
    page = Page((folder / REPORT_NAME).read_text())
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == 2
    ids = {attributes.get("id") for _, attributes in page.tags}
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= ids
    (curve,) = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert len((curve["points"] or "").split()) == 208


def test_the_report_loads_nothing_and_runs_no_script(folder: Path) -> None:
    text = (folder / REPORT_NAME).read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base", "a"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "srcset", "action"}
    assert not [name for name in names if name.startswith("on")]
    assert "://" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert HOSTILE in page.text


def test_names_of_layers_states_and_inputs_are_only_text() -> None:
    x = keras.Input((None, 4), name=HOSTILE)
    h = layers.RNN([LSTMCell(3), LSTMCell(3), LSTMCell(3)], return_sequences=True, name=f"rnn {HOSTILE}")(x)
    model = keras.Model(x, layers.Add(name=f"add {HOSTILE}")([h, layers.Dense(3, name=f"dense {HOSTILE}")(x)]))
    text = draw_network(layers_of(network_of(model)))
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {"div", "svg", "title", "desc", "defs", "marker", "path", "rect", "text"}
    assert f"dense {HOSTILE} (Dense [time, 3])" in page.text
    assert "and 5 more states" in page.text


def test_a_network_that_cannot_be_stepped_is_drawn_too() -> None:
    model = keras.Sequential([keras.Input((None, 4)), layers.Bidirectional(layers.LSTM(3), name="both")])
    assert "both (Bidirectional [6])" in Page(draw_network(layers_of(network_of(model)))).text
