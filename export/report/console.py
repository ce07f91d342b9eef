"""Prints the results of an export as a small table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellserve.export.candidates.candidates import Candidate
from cellserve.export.candidates.quantization import QuantizationResult
from cellserve.export.report.page import show_ending
from cellserve.models.signature import ModelDocument

# How a candidate was run for the parity check, in words.
RUNS = {
    "whole": "in one run",
    "chunks": "in chunks",
    "steps": "single steps from Keras's states",
    "model": "beside the saved model",
    "special": "on special numbers",
}


@dataclass(frozen=True, slots=True)
class Results:
    """Results of an export."""

    document: ModelDocument
    chosen: Candidate
    tried: list[Candidate]
    size: int  # total size of the model files, in bytes
    timings: dict[str, dict[str, float | None]]  # microseconds per run: by batch x time, then by maker; always "ours"
    tf2onnx: str  # operators that tf2onnx writes for the recurrences; "" if it cannot convert them
    metrics: dict[str, tuple[float, float]]  # test metric -> (ONNX, Keras)
    quantized: QuantizationResult | None  # for a precision lower than float32
    warning: str  # changes that clients of the previous version must make; empty if none


def show(console: Console, folder: Path, results: Results) -> None:
    """Prints the results of an export.

    Args:
        console: The console to print to.
        folder: The folder of the model.
        results: The results.
    """
    chosen, quantized, signature = results.chosen, results.quantized, results.document.signature
    title = f"exported {escape(str(folder))}"
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    operators = ", ".join(f"{name} {count}" if count > 1 else name for name, count in chosen.operators.items())
    steps = ", with a graph of its own for single steps" if chosen.step else ""
    table.add_row("form", escape(chosen.name + steps + _others(chosen, results.tried, quantized)))
    table.add_row("operators", operators)
    if signature.predict_only:
        table.add_row(
            "predict only", f"{escape(signature.predict_only)}; whole sequences for POST /predict, no sessions"
        )
    figures = chosen.parity.figures()
    parity = ", ".join(f"{figures[run]:.1e} {words}" for run, words in RUNS.items() if run in figures)
    keras_error = chosen.parity.keras_float32_error
    float32_error = f" (float32 Keras itself differs from float64 by {keras_error:.1e})" if keras_error else ""
    table.add_row("parity", f"{parity}; up to {figures['time_steps']} steps{float32_error}")
    table.add_row("bit identity", ("yes: " if chosen.exactness.proved else "NO: ") + escape(chosen.exactness.why))
    size = f"{results.size / 1024:.1f} KiB"
    table.add_row("size", f"{size}{_graphs(chosen, quantized)}" if quantized else size)
    for name, (ours, keras) in results.metrics.items():
        before = (
            f"{quantized.before[name]:.4f} in float32 ({quantized.tolerance[name]:g} may be lost), "
            if quantized
            else ""
        )
        table.add_row(f"test {escape(name)}", f"{ours:.4f} ONNX, {before}{keras:.4f} Keras")
    if quantized and (slower := slower_than_float32(results)):
        table.add_row("time", f"[bold]{slower}[/bold]")
    if results.warning:
        table.add_row("[bold]warning[/bold]", f"[bold]{escape(results.warning)}[/bold]")
    console.print(table)
    console.print(_times(results))
    show_ending(console, folder)


def _times(results: Results) -> Table:
    """The times of the chosen form, beside those of the alternatives that were measured."""
    table = Table(title="microseconds a run, 1 thread", title_justify="left", box=None, padding=(0, 2, 0, 0))
    words = {"tf2onnx": tf2onnx_words(results), "float32": "float32", "ours": "ours", "keras": "Keras"}
    makers = [maker for maker in words if maker in next(iter(results.timings.values()))]
    others = [maker for maker in makers if maker != "ours"]
    ratios = [f"{'tf2onnx' if maker == 'tf2onnx' else words[maker]} / ours" for maker in others]
    for heading in ("batch x time", *(words[maker] for maker in makers), *ratios):
        table.add_column(heading, justify="right")
    for shape, row in results.timings.items():
        cells = [f"{time:.0f}" if (time := row[maker]) else "-" for maker in makers]
        shares = [f"{time / ours:.1f}" if (time := row[maker]) and (ours := row["ours"]) else "-" for maker in others]
        table.add_row(shape, *cells, *shares)
    return table


def _graphs(chosen: Candidate, quantized: QuantizationResult) -> str:
    """Sizes of the graphs alone, without the model documents."""
    return f": graphs of {chosen.size / 1024:.1f} KiB, {quantized.float32.size / 1024:.1f} KiB in float32"


def tf2onnx_words(results: Results) -> str:
    """Heading for tf2onnx's own conversion: `tf2onnx's Loop`, or `tf2onnx's LSTM` if it knows the layer."""
    return f"tf2onnx's {results.tf2onnx}" if results.tf2onnx else "tf2onnx"


def slower_than_float32(results: Results) -> str:
    """Names the shapes for which the lower precision is slower than float32 by more than a tenth; empty if none."""
    told = [
        f"{ours / float32:.1f} x at {shape}"
        for shape, row in results.timings.items()
        if (ours := row["ours"]) and (float32 := row.get("float32")) and ours > 1.1 * float32
    ]
    return f"slower than float32: {', '.join(told)}" if told else ""


def _others(chosen: Candidate, tried: list[Candidate], quantized: QuantizationResult | None) -> str:
    told = list(quantized.rejected) if quantized else []
    for other in tried:
        if other is not chosen:
            shape = "1x50" if "1x50" in chosen.microseconds else next(iter(chosen.microseconds))
            slower = other.microseconds[shape] / chosen.microseconds[shape]
            why = f"{slower:.1f} x the time at {shape}" if other.exactness.proved else "not exact"
            told.append(f"{other.name}: {why}")
    return f" (passed over {'; '.join(told)})" if told else ""
