"""What a person sees of an export: one small table."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellserve.export.candidates.candidates import Form
from cellserve.export.candidates.quantization import Narrowed
from cellserve.models.signature import ModelDocument

# How a form was run beside Keras, in words.
RUNS = {
    "whole": "in one run",
    "chunks": "in chunks",
    "steps": "single steps from Keras's states",
    "model": "beside the saved model",
}


@dataclass(frozen=True, slots=True)
class Results:
    """What came out of an export."""

    document: ModelDocument
    form: Form  # the one that was chosen
    tried: list[Form]
    size: int  # of the files, bytes
    timings: dict[str, dict[str, float | None]]  # microseconds a run: by batch x time, then by tf2onnx, ours, keras
    tf2onnx: str  # the operators that tf2onnx makes of the recurrences; "" where it cannot
    metrics: dict[str, tuple[float, float]]  # on the test data: name, then (ONNX, Keras)
    narrow: Narrowed | None  # where the precision is less than float32
    warning: str  # of what clients of the version before must change


def show(console: Console, path: str, results: Results) -> None:
    """Prints what was exported, what was proved and what was measured.

    Args:
        console: Where to.
        path: Where the model was written.
        results: All of it.
    """
    form, narrow, signature = results.form, results.narrow, results.document.signature
    table = Table(title=f"exported {path}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    operators = ", ".join(f"{name} {count}" if count > 1 else name for name, count in form.operators.items())
    steps = ", with a graph of its own for single steps" if form.step else ""
    table.add_row("form", escape(form.name + steps + _others(form, results.tried, narrow)))
    table.add_row("operators", operators)
    if signature.predict_only:
        table.add_row(
            "predict only", f"{escape(signature.predict_only)}; whole sequences for POST /predict, no sessions"
        )
    figures = form.parity.figures()
    parity = ", ".join(f"{figures[run]:.1e} {words}" for run, words in RUNS.items() if run in figures)
    strays = f" (float32 Keras itself strays {form.parity.strays:.1e} from float64)" if form.parity.strays else ""
    table.add_row("parity", f"{parity}; up to {figures['time_steps']} steps{strays}")
    table.add_row("bit identity", ("yes: " if form.exactness.proved else "NO: ") + escape(form.exactness.why))
    size = f"{results.size / 1024:.1f} KiB"
    table.add_row("size", f"{size}{_graphs(form, narrow)}" if narrow else size)
    for name, (ours, keras) in results.metrics.items():
        before = f"{narrow.before[name]:.4f} in float32 ({narrow.tolerance[name]:g} may be lost), " if narrow else ""
        table.add_row(f"test {escape(name)}", f"{ours:.4f} ONNX, {before}{keras:.4f} Keras")
    if narrow and (slower := slower_than_float32(results)):
        table.add_row("time", f"[bold]{slower}[/bold]")
    if results.warning:
        table.add_row("[bold]warning[/bold]", f"[bold]{escape(results.warning)}[/bold]")
    console.print(table)
    times = Table(title="microseconds a run, 1 thread", title_justify="left", box=None, padding=(0, 2, 0, 0))
    others = {"tf2onnx": "tf2onnx", **({"float32": "float32"} if narrow else {}), "keras": "Keras"}
    columns = {**others, "tf2onnx": tf2onnx_words(results)}
    headings = [*list(columns.values())[:-1], "ours", "Keras", *(f"{heading} / ours" for heading in others.values())]
    for heading in ("batch x time", *headings):
        times.add_column(heading, justify="right")
    for shape, row in results.timings.items():
        cells = [f"{row[name]:.0f}" if row[name] else "-" for name in (*list(others)[:-1], "ours", "keras")]
        ratios = [f"{row[name] / row['ours']:.1f}" if row[name] and row["ours"] else "-" for name in others]  # type: ignore[operator]
        times.add_row(shape, *cells, *ratios)
    console.print(times)


def _graphs(form: Form, narrow: Narrowed) -> str:
    """Gives the sizes without what the files say about themselves."""
    return f": graphs of {form.size / 1024:.1f} KiB, {narrow.float32.size / 1024:.1f} KiB in float32"


def tf2onnx_words(results: Results) -> str:
    """Says what tf2onnx's own conversion comes to: `tf2onnx's Loop`, but an LSTM where it knows the layer."""
    return f"tf2onnx's {results.tf2onnx}" if results.tf2onnx else "tf2onnx"


def slower_than_float32(results: Results) -> str:
    """Says for which shapes the lesser precision took longer than float32, by a tenth or more."""
    told = [
        f"{ours / float32:.1f} x at {shape}"
        for shape, row in results.timings.items()
        if (ours := row["ours"]) and (float32 := row.get("float32")) and ours > 1.1 * float32
    ]
    return f"slower than float32: {', '.join(told)}" if told else ""


def _others(form: Form, forms: list[Form], narrow: Narrowed | None) -> str:
    told = list(narrow.lost) if narrow else []
    for other in forms:
        if other is not form:
            shape = "1x50" if "1x50" in form.microseconds else next(iter(form.microseconds))
            slower = other.microseconds[shape] / form.microseconds[shape]
            why = f"{slower:.1f} x the time at {shape}" if other.exactness.proved else "not exact"
            told.append(f"{other.name}: {why}")
    return f" (passed over {'; '.join(told)})" if told else ""
