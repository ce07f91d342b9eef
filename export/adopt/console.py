"""Prints the results of an adoption as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellserve.export.adopt.tensor_roles import Roles, served_type
from cellserve.models.signature import ModelDocument, TensorSpec

Array = NDArray[Any]


def show(
    console: Console,
    path: str,
    document: ModelDocument,
    roles: Roles,
    constants: Mapping[str, Array],
    size: int,
    warning: str,
) -> None:
    """Prints what was found and proved, and how the service will run the model."""
    told = document.signature
    table = Table(title=f"adopted {path}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("a time step takes", _specs(told.inputs))
    table.add_row("gives", _specs(told.outputs))
    for state in roles.states:
        how = "found by its name" if state.found else "as told"
        where = "no batch axis" if state.batch_axis is None else f"batch at axis {state.batch_axis}"
        table.add_row("state", f"{state.port.name} → {state.following} {list(state.shape)}, {where}, {how}")
    for role in roles.inputs:
        if role.context:
            axis = "" if role.context.axis is None else f" along axis {role.context.axis}"
            which = f"the last {role.context.entries} entries of {role.port.name}{axis}"
            table.add_row("context", f"{which} stand before those of the next step")
    for name, dtype in casts(roles):
        table.add_row("cast", f"{name}: {dtype} in the graph, {served_type(dtype)} in the service")
    for name, value in constants.items():
        table.add_row("constant", f"{name} = {value.tolist()}")
    table.add_row(
        "rows of a run", "any number" if told.batch is None else f"{told.batch}: more are run one after another"
    )
    table.add_row("time axis", "yes" if told.time_axis else "none: a run is one time step")
    table.add_row("the graph as it was", f"the same to {document.parity['original']:.1e} in a plain loop")
    table.add_row("bit identity", ("yes: " if document.exactness.proved else "NO: ") + document.exactness.why)
    times = ", ".join(f"{shape} {row['ours']:.0f}" for shape, row in document.timings.items() if shape != "unit")
    table.add_row("microseconds a run", f"{times} (batch x time)")
    table.add_row("size", f"{size / 1024:.1f} KiB")
    table.add_row("the service will", _promise(document))
    if warning:
        table.add_row("[bold]warning[/bold]", f"[bold]{escape(warning)}[/bold]")
    console.print(table)


def casts(roles: Roles) -> list[tuple[str, str]]:
    """Inputs and states whose type is another one in the service, with their types in the graph."""
    ports = [role.port for role in roles.inputs] + [role.port for role in roles.states]
    return [(port.name, port.type) for port in ports if served_type(port.type) != port.type]


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
