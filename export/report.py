"""What a person sees of an export: one small table."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.forms import Form

_RUNS = {
    "whole": "in one run",
    "chunks": "in chunks",
    "steps": "single steps from Keras's states",
    "model": "beside the saved model",
}


def show(
    console: Console,
    path: str,
    form: Form,
    forms: list[Form],
    size: int,
    timings: dict[str, dict[str, float | None]],
    metrics: dict[str, tuple[float, float]],
    predict_only: str | None,
) -> None:
    """Prints what was exported, what was proved and what was measured.

    Args:
        console: Where to.
        path: Where the model was written.
        form: The form that was chosen.
        forms: All forms that were tried.
        size: Of the file, bytes.
        timings: Microseconds a run: by batch x time, then by loop, ours, keras.
        metrics: On the test data: name, then (ONNX, Keras).
        predict_only: Why the network cannot be stepped, where it cannot.
    """
    table = Table(title=f"exported {path}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    operators = ", ".join(f"{name} {count}" if count > 1 else name for name, count in form.operators.items())
    steps = ", with a graph of its own for single steps" if form.step else ""
    table.add_row("form", form.name + steps + _others(form, forms))
    table.add_row("operators", operators)
    if predict_only:
        table.add_row("predict only", f"{escape(predict_only)}; whole sequences for POST /predict, no sessions")
    figures = form.parity.figures()
    parity = ", ".join(f"{figures[run]:.1e} {words}" for run, words in _RUNS.items() if run in figures)
    strays = f" (float32 Keras itself strays {form.parity.strays:.1e} from float64)" if form.parity.strays else ""
    table.add_row("parity", f"{parity}; up to {figures['time_steps']} steps{strays}")
    table.add_row("bit identity", ("yes: " if form.exactness.proved else "NO: ") + escape(form.exactness.why))
    table.add_row("size", f"{size / 1024:.1f} KiB")
    for name, (ours, keras) in metrics.items():
        table.add_row(f"test {name}", f"{ours:.4f} ONNX, {keras:.4f} Keras")
    console.print(table)
    times = Table(title="microseconds a run, 1 thread", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("batch x time", "tf2onnx's Loop", "ours", "Keras", "Loop / ours", "Keras / ours"):
        times.add_column(heading, justify="right")
    for shape, row in timings.items():
        cells = [f"{row[name]:.0f}" if row[name] else "-" for name in ("loop", "ours", "keras")]
        ratios = [f"{row[name] / row['ours']:.1f}" if row[name] and row["ours"] else "-" for name in ("loop", "keras")]  # type: ignore[operator]
        times.add_row(shape, *cells, *ratios)
    console.print(times)


def _others(form: Form, forms: list[Form]) -> str:
    told = []
    for other in forms:
        if other is not form:
            shape = "1x50" if "1x50" in form.microseconds else next(iter(form.microseconds))
            slower = other.microseconds[shape] / form.microseconds[shape]
            why = f"{slower:.1f} x the time at {shape}" if other.exactness.proved else "not exact"
            told.append(f"{other.name}: {why}")
    return f" (passed over {'; '.join(told)})" if told else ""
