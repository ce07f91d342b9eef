"""Reports an adoption: a table on the terminal, and a page for browsers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellserve.export.adopt.tensor_roles import Roles, served_type, words
from cellserve.export.report.page import (
    exactness_words,
    operator_list,
    page,
    provenance_table,
    show_ending,
    signature_table,
    table,
    time_bars,
)
from cellserve.models.signature import ModelDocument, TensorSpec

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Adoption:
    """Results of an adoption."""

    document: ModelDocument
    roles: Roles
    constants: Mapping[str, Array]
    size: int  # of the model file, in bytes
    warning: str  # changes that clients of the previous version must make; empty if none

    @property
    def timings(self) -> dict[str, dict[str, float | None]]:
        """Microseconds a run, by batch x time."""
        return {shape: row for shape, row in self.document.timings.items() if shape != "unit"}

    @property
    def found(self) -> list[tuple[str, str]]:
        """What was found in the graph, and what the user said about it: what it is, and the words for it."""
        rows = []
        for state in self.roles.states:
            how = "found by its name" if state.found else "as told"
            where = "no batch axis" if state.batch_axis is None else f"batch at axis {state.batch_axis}"
            rows.append(("state", f"{state.port.name} → {state.following} {list(state.shape)}, {where}, {how}"))
        for role in self.roles.inputs:
            if role.axes.single is not None:
                told = f"{role.port.name} {words(role.port.dims)}: axis {role.axes.single}, of size one, is dropped"
                rows.append(("time step", told))
            if role.context:
                axis = "" if role.context.axis is None else f" along axis {role.context.axis}"
                which = f"the last {role.context.entries} entries of {role.port.name}{axis}"
                rows.append(("context", f"{which} are put before those of the next step"))
        ports = [role.port for role in self.roles.inputs] + [role.port for role in self.roles.states]
        for port in ports:
            if served_type(port.type) != port.type:
                told = f"{port.name}: {port.type} in the graph, {served_type(port.type)} in the service"
                rows.append(("cast", told))
        return rows + [("constant", f"{name} = {value.tolist()}") for name, value in self.constants.items()]

    @property
    def runs(self) -> list[tuple[str, str]]:
        """How the service will run the model."""
        told = self.document.signature
        rows = "any number" if told.batch is None else f"{told.batch}: more are run one after another"
        return [
            ("rows of a run", rows),
            ("time axis", "yes" if told.time_axis else "none: a run is one time step"),
            ("the service will", _promise(self.document)),
        ]


def show(console: Console, folder: Path, adoption: Adoption) -> None:
    """Prints what was found and proved, and how the service will run the model."""
    document = adoption.document
    told = document.signature
    title = f"adopted {escape(str(folder))}"
    made = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = [("a time step takes", _specs(told.inputs)), ("gives", _specs(told.outputs)), *adoption.found]
    rows += adoption.runs[:-1]
    rows.append(("the graph as it was", f"the same to {document.parity['original']:.1e} in a plain loop"))
    rows.append(("bit identity", ("yes: " if document.exactness.proved else "NO: ") + document.exactness.why))
    times = ", ".join(f"{shape} {row['ours']:.0f}" for shape, row in adoption.timings.items())
    rows.append(("microseconds a run", f"{times} (batch x time)"))
    rows.append(("size", f"{adoption.size / 1024:.1f} KiB"))
    rows.append(adoption.runs[-1])
    for name, text in rows:
        made.add_row(name, escape(text))
    if adoption.warning:
        made.add_row("[bold]warning[/bold]", f"[bold]{escape(adoption.warning)}[/bold]")
    console.print(made)
    show_ending(console, folder)


def render(adoption: Adoption) -> str:
    """Returns the page."""
    document = adoption.document
    parity = document.parity
    facts = {
        "exact": "yes" if document.exactness.proved else "not proved",
        "difference from the original": f"{parity['original']:.1e}",
        "size": f"{adoption.size / 1024:.1f} KiB",
    }
    agreement = (
        f"<p>Stepped in the service and in a plain loop over ONNX Runtime, {parity['time_steps']} time steps from "
        f"random states, the largest difference is {parity['original']:.1e}, relative to max(1, |original|).</p>"
    )
    bars = time_bars(adoption.timings, {"ours": "a run"}, "One run, 1 thread.")
    sections = {
        "Signature": signature_table(document.signature),
        "Found in the graph": table((), adoption.found),
        "How it is run": table((), adoption.runs) + bars,
        "Operators": operator_list(document.operators),
        "Agreement with the original graph": agreement,
        "Bit identity": exactness_words(document.exactness),
        "Provenance": provenance_table(document),
    }
    return page(document, facts, sections)


def _promise(document: ModelDocument) -> str:
    told = document.signature
    if told.predict_only is not None:
        return f"answer POST /predict alone, and sessions with 422: {told.predict_only}"
    if not document.exactness.proved:
        return "step it in sessions, one row and one time step a run: no run ever mixes sessions"
    if told.batch is not None:
        return "step it in sessions, each with the bits of a run of its own"
    return "step it in sessions, many to a run, each with the bits of a run of its own"


def _specs(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(
        f"{spec.name} {list(spec.shape)} {spec.dtype}" + (f" {spec.bounds[0]}..{spec.bounds[1]}" if spec.bounds else "")
        for spec in specs
    )
