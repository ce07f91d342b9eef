// Plays any model: one input for each number of a time step, and a table of what came of it.

import { call } from "./api.js";
import { announce, field, h, short } from "./dom.js";
import { Stepper } from "./stepper.js";

const MOST = 48; // inputs; of a larger tensor one field takes all numbers
const ROWS = 200; // of the table

export function playTable(view, model, signal) {
  const { inputs, outputs, predict_only: wholeOnly } = model.signature;
  const stepper = new Stepper(model, signal);
  const forms = inputs.map((spec) => tensorForm(spec));
  const reads = () =>
    named(
      inputs,
      forms.map((form) => form.value()),
    );
  const body = h("tbody", {});
  const count = h("p", { class: "readout" }, " ");
  let steps = [];
  let done = 0;

  const add = (x, y, label) => {
    done += 1;
    body.prepend(
      h(
        "tr",
        {},
        h("th", { scope: "row" }, String(done)),
        h("td", {}, shown(x)),
        h("td", {}, y === null ? "" : shown(y)),
        model.labels ? h("td", {}, label ?? "") : null,
      ),
    );
    while (body.rows.length > ROWS) body.lastChild.remove();
  };
  const step = async () => {
    const x = reads();
    if (wholeOnly) {
      steps.push(x);
      add(x, null);
      count.textContent = `${steps.length} steps to predict`;
      return;
    }
    const answer = await stepper.step(x);
    add(x, answer.y, answer.label);
    announce(`Step ${done}: ${shown(answer.y)}${answer.label ? `, ${answer.label}` : ""}`);
  };
  const predict = async () => {
    const sequence =
      inputs.length === 1 ? steps : Object.fromEntries(inputs.map(({ name }) => [name, steps.map((x) => x[name])]));
    const answer = await call(
      "POST",
      "predict",
      { model: `${model.name}:${model.version}`, sequences: [sequence] },
      { signal },
    );
    const label = answer.labels ? `, ${answer.labels[0]}` : "";
    count.textContent = `${steps.length} steps give ${shown(answer.outputs[0])}${label}`;
    announce(count.textContent);
  };
  const restart = () => {
    stepper.end();
    [steps, done] = [[], 0];
    body.replaceChildren();
    count.textContent = " ";
  };
  let [sample, at] = [0, 0];
  const fill = () => {
    const { x } = model.samples[sample];
    const length = (Array.isArray(x) ? x : Object.values(x)[0]).length;
    inputs.forEach(({ name }, place) => forms[place].set((Array.isArray(x) ? x : x[name])[at]));
    at += 1;
    if (at >= length) [sample, at] = [(sample + 1) % model.samples.length, 0];
  };
  const form = h(
    "form",
    {},
    forms.map(({ element }) => element),
    h(
      "div",
      { class: "row" },
      h("button", { class: "first" }, wholeOnly ? "Add this step" : "Step"),
      wholeOnly && h("button", { type: "button", onclick: predict }, "Predict the sequence"),
      h("button", { type: "button", onclick: restart }, "Start over"),
      model.samples.length > 0 && h("button", { type: "button", onclick: fill }, "Fill in the test data's next step"),
    ),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    return step();
  });
  const heads = [
    "step",
    `given: ${inputs.map(({ name }) => name).join(", ")}`,
    outputs.map(({ name }) => name).join(", "),
    ...(model.labels ? ["label"] : []),
  ];
  view.append(
    h(
      "section",
      { class: "card" },
      h("h2", {}, "A time step"),
      wholeOnly && h("p", {}, h("b", {}, "Whole sequences only: "), wholeOnly),
      form,
    ),
    h(
      "section",
      { class: "card" },
      h("h2", {}, "What came of it"),
      count,
      h(
        "div",
        { class: "wide", tabindex: 0, role: "group", "aria-label": "Steps, the latest first" },
        h(
          "table",
          {},
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              heads.map((head) => h("th", { scope: "col" }, head)),
            ),
          ),
          body,
        ),
      ),
      h("p", {}, stepper.link),
    ),
  );
  if (model.samples.length) fill();
}

/** Fields for one tensor of a time step. */
function tensorForm(spec) {
  const size = spec.shape.reduce((product, each) => product * each, 1);
  const whole = spec.dtype !== "float32";
  const limits = { step: whole ? 1 : "any", ...(spec.bounds && { min: spec.bounds[0], max: spec.bounds[1] }) };
  const hint = spec.bounds ? `from ${spec.bounds[0]} to ${spec.bounds[1]}` : whole ? "integers" : null;
  if (size > MOST) {
    const text = h("textarea", { class: "code", rows: 4, required: true, spellcheck: "false" });
    text.value = Array(size).fill(0).join(", ");
    return {
      element: field(`${spec.name}: ${size} numbers, separated by commas`, text, hint),
      value() {
        const numbers = text.value
          .split(/[\s,;]+/)
          .filter(Boolean)
          .map(Number);
        if (numbers.length !== size || !numbers.every(Number.isFinite)) {
          throw new Error(
            `${spec.name}: ${size} numbers are needed, and there are ${numbers.filter(Number.isFinite).length}.`,
          );
        }
        return nested(numbers, spec.shape);
      },
      set: (values) => (text.value = [values].flat(Infinity).join(", ")),
    };
  }
  const first = spec.bounds ? Math.max(0, spec.bounds[0]) : 0;
  const fields = Array.from({ length: size }, () =>
    h("input", { type: "number", required: true, value: first, ...limits }),
  );
  const names = fields.map((_, place) => `${spec.name}${spec.shape.length ? ` ${place + 1}` : ""}`);
  return {
    element: h(
      "fieldset",
      {},
      h("legend", {}, `${spec.name} [${spec.shape.join(", ")}]${hint ? `, ${hint}` : ""}`),
      h(
        "div",
        { class: "numbers" },
        fields.map((each, place) => field(names[place], each)),
      ),
    ),
    value: () =>
      nested(
        fields.map((each) => Number(each.value)),
        spec.shape,
      ),
    set: (values) => [values].flat(Infinity).forEach((value, place) => (fields[place].value = value)),
  };
}

/** Returns flat numbers nested as a shape says. */
function nested(numbers, shape) {
  if (!shape.length) return numbers[0];
  if (shape.length === 1) return numbers;
  const size = numbers.length / shape[0];
  return Array.from({ length: shape[0] }, (_, place) =>
    nested(numbers.slice(place * size, (place + 1) * size), shape.slice(1)),
  );
}

function named(specs, values) {
  return specs.length === 1 ? values[0] : Object.fromEntries(specs.map(({ name }, place) => [name, values[place]]));
}

function shown(value) {
  if (typeof value === "number") return short(value);
  if (!Array.isArray(value))
    return Object.entries(value)
      .map(([name, each]) => `${name}: ${shown(each)}`)
      .join("; ");
  const flat = value.flat(Infinity);
  return flat.slice(0, 12).map(short).join(", ") + (flat.length > 12 ? `, … (${flat.length})` : "");
}
