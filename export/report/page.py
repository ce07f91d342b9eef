"""The parts of `report.html` that exported and adopted models share; all text is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from rich.console import Console

from cellserve.models.signature import Exactness, ModelDocument, Signature, TensorSpec, default_repository

REPORT_NAME = "report.html"  # written beside the model for people; the service does not read it
_TEMPLATE = Path(__file__).with_name("report.html")
_NUMBER = ' class="number"'


def page(document: ModelDocument, facts: Mapping[str, str], sections: Mapping[str, str]) -> str:
    """Returns a self-contained page.

    Args:
        document: The model.
        facts: Short facts for the top, by name.
        sections: The HTML of each section, by its heading.
    """
    top = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=escape(document.name),
        description=escape(document.description),
        facts=top,
        sections="\n".join(_section(heading, content) for heading, content in sections.items()),
    )


def _section(heading: str, content: str) -> str:
    name = heading.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>\n{content}\n</section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int | None = None) -> str:
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


def signature_table(signature: Signature) -> str:
    """Returns the inputs, outputs and states as clients see them."""
    rows = [[spec.name, "input", spec.dtype, _shape(spec), _more(spec)] for spec in signature.inputs]
    rows += [[spec.name, "output", spec.dtype, _shape(spec), ""] for spec in signature.outputs]
    rows += [
        [state.name, "state", state.dtype, f"[batch{_sizes(state.shape)}]", f"next: {state.next_name}"]
        for state in signature.states
    ]
    made = table(("name", "is", "type", "shape", ""), rows)
    if signature.predict_only is None:
        return made
    return f"{made}<p><b>Whole sequences only:</b> {escape(signature.predict_only)}</p>"


def _shape(spec: TensorSpec) -> str:
    return f"[batch, time{_sizes(spec.shape)}]"


def _sizes(shape: Sequence[int]) -> str:
    return "".join(f", {size}" for size in shape)


def _more(spec: TensorSpec) -> str:
    told = [f"from {spec.bounds[0]} to {spec.bounds[1]}"] if spec.bounds else []
    return ", ".join([*told, *([f"{spec.masked:g} is passed over"] if spec.masked is not None else [])])


def time_bars(timings: Mapping[str, Mapping[str, float | None]], makers: Mapping[str, str], caption: str) -> str:
    """Returns the times of a run as bars, a group for each shape.

    Args:
        timings: Microseconds a run, by batch x time, then by maker.
        makers: The words for each maker, in the order of their bars.
        caption: What the table shows.
    """
    bodies = []
    for shape, row in timings.items():
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
            lines.append(f'<tr><th scope="row">{escape(words)}</th><td class="number">{told}</td><td>{bar}</td></tr>')
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return f'<table class="bars"><caption>{caption}</caption>{"".join(bodies)}</table>'


def operator_list(operators: Mapping[str, int]) -> str:
    """Returns the operators of a graph, with how often each is there."""
    items = (f"<li>{escape(name)}{f' &times; {count}' if count > 1 else ''}</li>" for name, count in operators.items())
    return f'<ul class="operators">{"".join(items)}</ul>'


def exactness_words(exactness: Exactness) -> str:
    """Returns whether bits were proved to stay the same, and why."""
    if exactness.proved:
        told = (
            f'<span class="good">Proved</span> for runs in {escape(exactness.shapes)}. A row has the same bits '
            f"whatever it is batched with: "
        )
    else:
        told = '<span class="bad">Not proved.</span> The service runs the model one row and one time step at a time: '
    return f"<p>{told}{escape(exactness.why)}.</p>"


def provenance_table(document: ModelDocument) -> str:
    """Returns where the model comes from."""
    return table((), ([key, value] for key, value in document.provenance.items()))


def show_ending(console: Console, folder: Path) -> None:
    """Prints where the report is, and the command that serves the model."""
    console.print("report", folder / REPORT_NAME, "in a browser", markup=False, highlight=False, soft_wrap=True)
    console.print("serve ", serve_command(folder), markup=False, highlight=False, soft_wrap=True)


def serve_command(folder: Path) -> str:
    """The command that serves the repository that a version's folder is in."""
    models = folder.parent.parent
    return "cellserve serve" + (f" --models {shlex.quote(str(models))}" if models != default_repository() else "")
