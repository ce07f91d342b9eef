// Elements without HTML strings: whatever a model is named or says, it is text.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** Returns an element: `h("p", {class: "dim", onclick: f}, "text", h("b", {}, "more"))`. */
export function h(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** Returns an SVG element. */
export function svg(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

let fields = 0;

/** Returns a field with its label above it; `control` is an input, select or textarea. */
export function field(label, control, hint) {
  control.id ||= `field-${++fields}`;
  const parts = [h("label", { for: control.id }, label), control];
  if (hint) {
    parts.push(h("small", { id: `${control.id}-hint` }, hint));
    control.setAttribute("aria-describedby", `${control.id}-hint`);
  }
  return h("div", { class: "field" }, parts);
}

/** Returns a table: `head` are texts, `rows` lists of texts or nodes, the first of which names its row. */
export function table(head, rows, { caption, numbers = Infinity } = {}) {
  const kind = (place) => (place >= numbers ? "number" : null);
  return h(
    "div",
    { class: "wide", tabindex: 0, role: "group", "aria-label": caption ?? head.join(", ") },
    h(
      "table",
      {},
      caption && h("caption", {}, caption),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          head.map((text, place) => h("th", { scope: "col", class: kind(place) }, text)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map(([first, ...others]) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, first),
            others.map((cell, place) => h("td", { class: kind(place + 1) }, cell)),
          ),
        ),
      ),
    ),
  );
}

/** Asks before what cannot be undone; resolves to whether the answer is yes. */
export function confirmed(question, text, yes) {
  return new Promise((resolve) => {
    const dialog = h(
      "dialog",
      { "aria-labelledby": "question" },
      h(
        "form",
        { method: "dialog" },
        h("h2", { id: "question" }, question),
        h("p", {}, text),
        h(
          "p",
          { class: "row" },
          h("button", { value: "yes", class: "danger" }, yes),
          h("button", { value: "", autofocus: true }, "Cancel"),
        ),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Says something to a screen reader, and leaves what it was doing alone. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** Returns a number in few characters: 6 significant digits at most. */
export function short(value) {
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(size < 1 ? 4 : 6)));
}
