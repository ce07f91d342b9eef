"""Renders the report of an export as one self-contained page, `report.html`; all names from the network are escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.report.console import RUNS, Results, slower_than_float32, tf2onnx_words
from cellserve.export.report.network_svg import draw_network
from cellserve.export.verify.parity import TOLERANCE
from cellserve.models.signature import TensorSpec

_TEMPLATE = Path(__file__).with_name("report.html")
_NUMBER = ' class="number"'


def render(results: Results, network: StatefulNetwork | SequenceNetwork) -> str:
    """Returns the page."""
    document = results.document
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=escape(document.name),
        description=escape(document.description),
        facts=_facts(results),
        network=draw_network(network),
        signature=_signature(results),
        forms=_forms(results) + _times(results),
        operators=_operators(results),
        parity=_parity(results),
        exactness=_exactness(results),
        metrics=_metrics(results),
        provenance=_table((), ([key, value] for key, value in document.provenance.items())),
    )


def _facts(results: Results) -> str:
    document = results.document
    facts = {
        "precision": document.precision,
        "exact": "yes" if document.exactness.proved else "not proved",
        "size": f"{results.size / 1024:.1f} KiB",
        **{f"test {name}": f"{value:.4f}" for name, value in document.metrics.items()},
    }
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())


def _signature(results: Results) -> str:
    signature = results.document.signature
    rows = [[spec.name, "input", spec.dtype, _shape(spec), _more(spec)] for spec in signature.inputs]
    rows += [[spec.name, "output", spec.dtype, _shape(spec), ""] for spec in signature.outputs]
    rows += [
        [state.name, "state", state.dtype, f"[batch{_sizes(state.shape)}]", f"next: {state.next_name}"]
        for state in signature.states
    ]
    table = _table(("name", "is", "type", "shape", ""), rows)
    if signature.predict_only is None:
        return table
    return f"{table}<p><b>Whole sequences only:</b> {escape(signature.predict_only)}</p>"


def _shape(spec: TensorSpec) -> str:
    return f"[batch, time{_sizes(spec.shape)}]"


def _sizes(shape: Sequence[int]) -> str:
    return "".join(f", {size}" for size in shape)


def _more(spec: TensorSpec) -> str:
    told = [f"from {spec.bounds[0]} to {spec.bounds[1]}"] if spec.bounds else []
    return ", ".join([*told, *([f"{spec.masked:g} is passed over"] if spec.masked is not None else [])])


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
    return intro + _table(head, rows, numbers=2) + lost


def _times(results: Results) -> str:
    makers = {"ours": "ours", "float32": "ours in float32", "tf2onnx": tf2onnx_words(results), "keras": "Keras"}
    bodies = []
    for shape, row in results.timings.items():
        batch, steps = shape.split("x")
        heading = f"batch of {batch}, {steps} time step{'' if steps == '1' else 's'}"
        longest = max((time for time in row.values() if time), default=1.0)
        lines = [f'<tr><th colspan="3" scope="rowgroup">{heading}</th></tr>']
        for maker, words in makers.items():
            if maker not in row:
                continue
            time = row[maker]
            width = 100 * (time or 0) / longest
            told = f"{time:,.0f} µs" if time else "cannot be made"
            bar = f'<div class="bar {maker}" style="width:{width:.1f}%"></div>' if time else ""
            lines.append(f'<tr><th scope="row">{words}</th><td class="number">{told}</td><td>{bar}</td></tr>')
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    slower = slower_than_float32(results)
    told = f'<p class="bad">{escape(slower.capitalize())}</p>' if slower else ""
    caption = "<caption>One run of the form that is used; the bars of a group share one scale.</caption>"
    return f'{told}<table class="bars">{caption}{"".join(bodies)}</table>'


def _operators(results: Results) -> str:
    items = (
        f"<li>{escape(name)}{f' &times; {count}' if count > 1 else ''}</li>"
        for name, count in results.document.operators.items()
    )
    return f'<ul class="operators">{"".join(items)}</ul>'


def _parity(results: Results) -> str:
    parity = results.chosen.parity
    figures = parity.figures()
    rows = [[words, f"{figures[run]:.1e}"] for run, words in RUNS.items() if run in figures]
    table = _table(("largest difference", "relative to max(1, |Keras|)"), rows, numbers=1)
    error = parity.keras_float32_error
    notes = (
        f"<p>Float32 Keras itself differs from a float64 run by {error:.1e}; four times that is allowed.</p>"
        if error
        else ""
    )
    if results.quantized:
        notes += "<p>This precision has no parity limit: the loss on the test data decides.</p>"
    plot = _plot(parity.by_step, None if results.quantized else TOLERANCE, "in one run from random states")
    return plot + table + notes


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


def _exactness(results: Results) -> str:
    exactness = results.document.exactness
    if exactness.proved:
        told = '<span class="good">Proved.</span> A row has the same bits whatever it is batched with: '
        return f"<p>{told}{escape(exactness.why)}.</p>"
    told = '<span class="bad">Not proved.</span> The service runs the model one row and one time step at a time: '
    return f"<p>{told}{escape(exactness.why)}.</p>"


def _metrics(results: Results) -> str:
    if not results.metrics:
        return '<p class="dim">No test data was given (--data FILE.npz).</p>'
    quantized = results.quantized
    if quantized is None:
        rows = [[name, f"{ours:.4f}", f"{keras:.4f}"] for name, (ours, keras) in results.metrics.items()]
        return _table(("metric", "this model", "Keras"), rows, numbers=1)
    rows = [
        [name, f"{quantized.before[name]:.4f}", f"{ours:.4f}", f"{keras:.4f}", f"{quantized.tolerance[name]:g}"]
        for name, (ours, keras) in results.metrics.items()
    ]
    head = ("metric", "in float32", f"in {results.document.precision}", "Keras", "may be lost")
    return _table(head, rows, numbers=1)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int | None = None) -> str:
    """Returns a table; the columns from index `numbers` on are aligned to the right."""

    def kind(place: int) -> str:
        return _NUMBER if numbers is not None and place >= numbers else ""

    headings = "".join(f'<th scope="col"{kind(place)}>{escape(text)}</th>' for place, text in enumerate(head))
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td{kind(place)}>{escape(text)}</td>" for place, text in enumerate(others, 1))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    top = f"<thead><tr>{headings}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(lines)}</tbody></table></div>'
