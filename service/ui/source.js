// Where a sequence to play comes from: the model's own test data, or a CSV that is pasted or dropped.

import { columnsOf } from "./csv.js";
import { announce, field, h } from "./dom.js";

/**
 * A card to choose a sequence with; `onchoose(steps, name)` is called with its time steps, as the API takes them.
 *
 * @param model As `GET /models/{name}` describes it.
 */
export function sequenceSource(model, onchoose) {
  const [{ shape }] = model.signature.inputs;
  const features = shape.length ? shape[0] : 1;
  const wrong = h("p", { class: "bad", role: "alert" });
  const parts = [h("h2", {}, "The sequence")];
  const choose = (steps, name) => {
    wrong.textContent = "";
    onchoose(steps, name);
  };
  let first = () => {};
  if (model.samples.length) {
    const names = model.samples.map(
      ({ x, label }, place) => `${place + 1}: ${label === null ? "" : `${label}, `}${x.length} steps`,
    );
    const select = h(
      "select",
      {},
      names.map((name, place) => h("option", { value: place }, name)),
    );
    first = () => choose(model.samples[select.value].x, `example ${names[select.value]}`);
    select.addEventListener("change", first);
    parts.push(
      h(
        "div",
        { class: "row" },
        field("From the model's test data", select),
        h("button", { type: "button", onclick: first }, "Take it"),
      ),
    );
  }
  const text = h("textarea", {
    class: "code",
    rows: 4,
    spellcheck: "false",
    placeholder: features === 1 ? "12.5\n13.1\n…" : `${"0.1, ".repeat(Math.min(features, 3))}…`,
  });
  const column = h("select", {});
  const columnField = field("Column", column);
  columnField.hidden = true;
  let columns = [];
  const take = () => {
    const taken = features === 1 ? [columns[column.value]] : columns.slice(0, features);
    const steps = taken[0].values.map((_, step) =>
      shape.length ? taken.map(({ values }) => values[step]) : taken[0].values[step],
    );
    choose(
      steps,
      `${taken
        .map(({ name }) => name)
        .slice(0, 3)
        .join(", ")}, ${steps.length} steps`,
    );
  };
  const read = () => {
    try {
      columns = columnsOf(text.value);
      if (columns.length < features) {
        throw new Error(`The model takes ${features} numbers a step, and ${columns.length} columns have numbers.`);
      }
    } catch (error) {
      wrong.textContent = error.message;
      return;
    }
    column.replaceChildren(...columns.map(({ name }, place) => h("option", { value: place }, name)));
    column.value = columns.length - 1; // what comes after dates
    columnField.hidden = features > 1 || columns.length === 1;
    take();
  };
  column.addEventListener("change", take);
  const file = h("input", { type: "file", accept: ".csv,.txt,.tsv,text/*" });
  const load = async (given) => {
    if (!given) return;
    text.value = await given.text();
    read();
    announce(`${given.name} was read.`);
  };
  file.addEventListener("change", () => load(file.files[0]));
  const hint = features === 1 ? "A row for each time step." : `A row for each time step, ${features} numbers in each.`;
  parts.push(
    h(
      "details",
      { open: !model.samples.length },
      h("summary", {}, "Your own: paste or drop a CSV"),
      dropZone(
        load,
        field("CSV", text, hint),
        h(
          "div",
          { class: "row" },
          h("button", { type: "button", onclick: read }, "Use it"),
          columnField,
          field("or a file", file),
        ),
      ),
    ),
    wrong,
  );
  return { element: h("section", { class: "card source" }, parts), first: () => first() };
}

/** Returns a zone that files may be dropped on. */
export function dropZone(onfile, ...content) {
  const zone = h("div", { class: "drop" }, content);
  const over = (event) => {
    event.preventDefault();
    zone.classList.toggle("over", event.type === "dragover");
  };
  for (const name of ["dragover", "dragleave", "drop"]) zone.addEventListener(name, over);
  zone.addEventListener("drop", (event) => onfile(event.dataTransfer.files[0]));
  return zone;
}
