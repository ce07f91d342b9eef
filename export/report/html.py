"""Renders the report of an export as one self-contained page, `report.html`; all names from the network are escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from cellserve.export.report.console import RUNS, Results, slower_than_float32, tf2onnx_words
from cellserve.export.report.network_svg import draw_network
from cellserve.export.report.page import (
    exactness_words,
    operator_list,
    page,
    provenance_table,
    signature_table,
    table,
    time_bars,
)
from cellserve.export.verify.parity import TOLERANCE


def render(results: Results) -> str:
    """Returns the page."""
    document = results.document
    sections = {
        "Network": draw_network(document.drawing),
        "Signature": signature_table(document.signature),
        "Forms and time": _forms(results) + _times(results),
        "Operators": operator_list(document.operators),
        "Parity with Keras": _parity(results),
        "Bit identity": exactness_words(document.exactness),
        "Test metrics": _metrics(results),
        "Provenance": provenance_table(document),
    }
    return page(document, _facts(results), sections)


def _facts(results: Results) -> dict[str, str]:
    document = results.document
    return {
        "precision": document.precision,
        "exact": "yes" if document.exactness.proved else "not proved",
        "size": f"{results.size / 1024:.1f} KiB",
        **{f"test {name}": f"{value:.4f}" for name, value in document.metrics.items()},
    }


def _forms(results: Results) -> str:
    quantized = results.quantized
    forms = [*results.tried, *([quantized.float32] if quantized else [])]
    shapes = list(results.chosen.microseconds)
    head = ["form", "exact", "KiB", *shapes]
    rows = []
    for form in forms:
        name = form.name + (", single steps apart" if form.step else "")
        if form is results.chosen:
            name += " (taken)"
        elif quantized and form is quantized.float32:
            name += " (float32)"
        times = [f"{form.microseconds[shape]:.0f}" for shape in shapes]
        rows.append([name, "yes" if form.exactness.proved else "no", f"{form.size / 1024:.0f}", *times])
    intro = (
        "<p>Every form was built, compared with Keras and proved; the fastest exact one is taken. "
        "Microseconds per run, by batch x time steps, 1 thread:</p>"
    )
    lost = "".join(f"<p>Passed over: {escape(text)}.</p>" for text in quantized.rejected) if quantized else ""
    return intro + table(head, rows, numbers=2) + lost


def _times(results: Results) -> str:
    makers = {"ours": "ours", "float32": "ours in float32", "tf2onnx": tf2onnx_words(results), "keras": "Keras"}
    bars = time_bars(results.timings, makers, "One run of the form that is used; the bars of a group share one scale.")
    slower = slower_than_float32(results)
    return (f'<p class="bad">{escape(slower.capitalize())}</p>' if slower else "") + bars


def _parity(results: Results) -> str:
    parity = results.chosen.parity
    figures = parity.figures()
    rows = [[words, f"{figures[run]:.1e}"] for run, words in RUNS.items() if run in figures]
    differences = table(("largest difference", "relative to max(1, |Keras|)"), rows, numbers=1)
    error = parity.keras_float32_error
    notes = (
        f"<p>Float32 Keras itself differs from a float64 run by {error:.1e}; four times that is allowed.</p>"
        if error
        else ""
    )
    if results.quantized:
        notes += "<p>This precision has no parity limit: the loss on the test data decides.</p>"
    plot = _plot(parity.by_step, None if results.quantized else TOLERANCE, "in one run from random states")
    return plot + differences + notes


def _plot(points: Sequence[tuple[int, float]], limit: float | None, how: str) -> str:
    """Draws the difference from Keras over time steps, on a logarithmic scale."""
    seen = [value for _, value in points if value > 0 and math.isfinite(value)]
    if not seen:
        return "<p>The outputs equal those of Keras, bit for bit.</p>"
    low = math.floor(math.log10(min(seen)))
    high = max(math.ceil(math.log10(max([*seen, limit or 0.0]) * 1.001)), low + 1)
    left, right, top, bottom = 44, 384, 10, 180
    last = max(points)[0]
    first = min(points)[0] if min(points)[0] < last else 0

    def across(step: float) -> float:
        return left + (right - left) * (step - first) / (last - first)

    def down(value: float) -> float:
        exponent = min(max(math.log10(value), low), high) if value > 0 else low
        return bottom - (bottom - top) * (exponent - low) / (high - low)

    lines = []
    for exponent in range(low, high + 1, max(1, (high - low) // 6)):
        y = down(10.0**exponent)
        lines.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="dim" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">1e{exponent}</text>')
    for step in sorted({first, *(round(first + (last - first) * part / 4) for part in (1, 2, 3)), last}):
        lines.append(f'<text class="dim" x="{across(step):.1f}" y="{bottom + 16}" text-anchor="middle">{step}</text>')
    middle = (left + right) / 2
    lines.append(f'<text class="dim" x="{middle}" y="{bottom + 32}" text-anchor="middle">time step</text>')
    if limit:
        y = down(limit)
        lines.append(f'<line class="limit" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{right}" y="{y + 15:.1f}" text-anchor="end">allowed: {limit:g}</text>')
    drawn = " ".join(f"{across(step):.1f},{down(value):.1f}" for step, value in points)
    lines.append(f'<polyline class="curve" points="{drawn}"/>')
    told = f"Largest {max(seen):.1e} and smallest {min(seen):.1e} over time steps {min(points)[0]} to {last}."
    return (
        f'<svg viewBox="0 0 400 216" width="560" role="img" aria-labelledby="plot-title plot-desc">'
        f'<title id="plot-title">Largest difference from Keras at each time step, {how}, logarithmic</title>'
        f'<desc id="plot-desc">{told}</desc>{"".join(lines)}</svg>'
        f'<p class="dim">Largest |ours &minus; Keras| / max(1, |Keras|) of the outputs at each time step, {how}.</p>'
    )


def _metrics(results: Results) -> str:
    if not results.metrics:
        return '<p class="dim">No test data was given (--data FILE.npz).</p>'
    quantized = results.quantized
    if quantized is None:
        rows = [[name, f"{ours:.4f}", f"{keras:.4f}"] for name, (ours, keras) in results.metrics.items()]
        return table(("metric", "this model", "Keras"), rows, numbers=1)
    rows = [
        [name, f"{quantized.before[name]:.4f}", f"{ours:.4f}", f"{keras:.4f}", f"{quantized.tolerance[name]:g}"]
        for name, (ours, keras) in results.metrics.items()
    ]
    head = ("metric", "in float32", f"in {results.document.precision}", "Keras", "may be lost")
    return table(head, rows, numbers=1)
