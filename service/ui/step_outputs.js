// What the steps made on the page gave: a text, lines of a few outputs, or a strip of many.

import { LineChart } from "./charts.js";
import { h } from "./dom.js";
import { HeatStrip } from "./heat_strip.js";
import { KEPT } from "./session.js";
import { namedOutputs, sizeOf, takesText } from "./time_steps.js";

const LINES = 4; // outputs, at most, that are drawn as lines
const ROW = 12; // pixels of an output in a strip
const LONGEST = 256;

/** Returns a view of a model's outputs: an `element`, and `show(steps)` with all steps so far. */
export function outputView(model) {
  if (takesText(model) && model.rollout) return textView(model);
  const size = model.signature.outputs.reduce((sum, { shape }) => sum + sizeOf(shape), 0);
  return size > LINES ? stripView(size, model) : lineView(size, model);
}

function textView({ labels }) {
  const text = h("pre", { class: "transcript", tabindex: 0, "aria-label": "The text that it was fed" }, " ");
  const show = (steps) => (text.textContent = steps.map(({ x }) => labels[x]).join("") || " ");
  return { element: h("div", {}, h("h3", {}, "Text that it was fed"), text), show };
}

function lineView(size, { labels }) {
  const names = namedOutputs(Array(size).fill(0), labels).map(([name]) => name);
  const series = names.map((name) => ({ name }));
  const chart = new LineChart("The outputs of the steps made here", series, { height: 160, steps: 20 });
  const show = (steps) =>
    chart.draw(
      names.map((_, place) => steps.map(({ y }) => namedOutputs(y)[place][1])),
      1,
    );
  return { element: h("div", {}, h("h3", {}, "Outputs"), chart.element), show };
}

function stripView(size, { labels }) {
  let shown = null;
  let names = [];
  const options = { columns: KEPT, name: (row) => names[row] ?? row, height: Math.min(ROW * size, LONGEST) };
  const chart = new HeatStrip("Of the steps made here", size, options);
  const label = h("p", {});
  const show = (steps) => {
    for (const { position, y } of steps.slice(steps.indexOf(shown) + 1)) {
      const named = namedOutputs(y, labels);
      names = named.map(([name]) => name);
      chart.push(
        named.map(([, value]) => value),
        position,
      );
    }
    shown = steps.at(-1);
    label.replaceChildren(...(shown?.label === undefined ? [] : ["The latest: ", h("b", {}, shown.label)]));
  };
  return { element: h("div", {}, h("h3", {}, "Outputs"), label, chart.element), show };
}
