// The tab Models: what each model takes and gives, how it was proved, its drawing, and its versions.

import { get, path } from "./api.js";
import { drawing } from "./drawing.js";
import { h, short, table } from "./dom.js";

const TASKS = { forecast: "forecast", classify: "classification", text: "text", audio: "audio" };

export async function show(view, [name], signal) {
  view.append(h("h1", {}, name ?? "Models"));
  if (name === undefined) await showList(view, signal);
  else await showModel(view, name, signal);
}

async function showList(view, signal) {
  const { models } = await get("models", { signal });
  const cards = models.map((model) =>
    h(
      "li",
      { class: "card" },
      h(
        "h2",
        {},
        model.version === null ? model.name : h("a", { href: `#/${path("models", model.name)}` }, model.name),
      ),
      h("p", {}, model.description || h("span", { class: "dim" }, "no description")),
      h("p", { class: "dim" }, facts(model).join(" · ")),
      model.versions
        .filter(({ reason }) => reason)
        .map(({ version, reason }) => h("p", { class: "bad" }, `version ${version}: ${reason}`)),
      model.version !== null &&
        h(
          "p",
          {},
          h("a", { href: `#/${path("play", model.name)}`, "aria-label": `Play with ${model.name}` }, "Play with it"),
        ),
    ),
  );
  view.append(
    cards.length
      ? h("ul", { class: "cards" }, cards)
      : h(
          "p",
          {},
          "There is no model in the repository yet. It is looked for again every few seconds: reload this page.",
        ),
  );
}

function facts({ version, precision, versions }) {
  const sessions = versions.reduce((sum, each) => sum + each.sessions, 0);
  return [
    version === null ? "not served" : `version ${version}`,
    precision,
    `${sessions} session${sessions === 1 ? "" : "s"}`,
  ].filter(Boolean);
}

async function showModel(view, name, signal) {
  const model = await get(path("models", name), { signal });
  const { signature } = model;
  view.append(
    h("p", {}, model.description),
    h(
      "p",
      {},
      h("a", { class: "button first", href: `#/${path("play", name)}` }, "Play with it"),
      " ",
      h("a", { href: "#/models" }, "All models"),
    ),
    h(
      "dl",
      { class: "facts" },
      Object.entries({
        version: model.version,
        task: TASKS[model.task] ?? "any",
        ...(model.sample_rate && { "sample rate": `${model.sample_rate} Hz` }),
        precision: model.precision,
        form: model.form || "unknown",
        exact: model.exact ? "yes" : "not proved",
        provider: model.provider.replace("ExecutionProvider", ""),
        ...Object.fromEntries(Object.entries(model.metrics).map(([key, value]) => [`test ${key}`, short(value)])),
      }).map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, String(value)))),
    ),
    h(
      "div",
      { class: "masonry" },
      section("Network", drawing(model)),
      section(
        "What it takes and gives",
        tensors(signature),
        signature.predict_only && h("p", {}, h("b", {}, "Whole sequences only: "), signature.predict_only),
        model.labels && h("p", {}, h("b", {}, "Labels: "), labelList(model.labels)),
      ),
      section(
        "Versions",
        table(
          ["version", "state", "sessions"],
          model.versions.map((each) => [
            h("a", { href: `#/${path("models", `${model.name}:${each.version}`)}` }, String(each.version)),
            each.reason ? `${each.state}: ${each.reason}` : each.state,
            String(each.sessions),
          ]),
          { numbers: 2 },
        ),
      ),
      section(
        "Exactness",
        h(
          "p",
          {},
          h("b", { class: model.exact ? "good" : "bad" }, model.exact ? "Proved" : "Not proved"),
          ` for ${model.shapes}: ${model.exactness}.`,
        ),
      ),
      parity(model.parity),
      times(model.timings),
      section(
        "Operators",
        h(
          "ul",
          { class: "pills" },
          Object.entries(model.operators).map(([operator, count]) =>
            h("li", {}, count > 1 ? `${operator} × ${count}` : operator),
          ),
        ),
      ),
      section(
        "Where it comes from",
        h(
          "div",
          { class: "anywhere" },
          table(["of", "is"], Object.entries({ ...model.provenance, digest: model.digest })),
        ),
      ),
    ),
  );
}

function section(heading, ...content) {
  return h("section", { class: "card" }, h("h2", {}, heading), content);
}

function tensors({ inputs, outputs, states }) {
  const rows = [
    ...inputs.map((spec) => [spec.name, "input", spec.dtype, sizes(["batch", "time"], spec.shape), more(spec)]),
    ...outputs.map((spec) => [spec.name, "output", spec.dtype, sizes(["batch", "time"], spec.shape), ""]),
    ...states.map((state) => [state.name, "state", state.dtype, sizes(["batch"], state.shape), ""]),
  ];
  return table(["name", "is", "type", "shape", ""], rows);
}

const sizes = (axes, shape) => h("span", { class: "whole" }, `[${[...axes, ...shape].join(", ")}]`);

function more({ bounds, masked }) {
  return [bounds && `${bounds[0]} to ${bounds[1]}`, masked !== null && `${masked} is passed over`]
    .filter(Boolean)
    .join(", ");
}

function labelList(labels) {
  return labels.every((label) => label.length === 1)
    ? h("code", {}, JSON.stringify(labels.join("")))
    : labels.join(", ");
}

const RUNS = {
  original: "beside the original graph",
  whole: "in one run",
  chunks: "in chunks",
  steps: "single steps, from given states",
  model: "beside the saved model",
  special: "on special numbers",
};

function parity(figures) {
  const rows = Object.entries(RUNS)
    .filter(([run]) => run in figures)
    .map(([run, words]) => [words, figures[run].toExponential(1)]);
  if (!rows.length) return null;
  return section(
    "Parity",
    table(["largest difference from the original", ""], rows, { numbers: 1 }),
    figures.tolerance &&
      h(
        "p",
        { class: "dim" },
        `At most ${figures.tolerance} · max(1, |original|) is allowed, over ${figures.time_steps} steps.`,
      ),
  );
}

function times(timings) {
  const makers = { ours: "this form", float32: "in float32", tf2onnx: "tf2onnx", keras: "Keras" };
  const shapes = Object.entries(timings).filter(([, row]) => typeof row === "object");
  if (!shapes.length) return null;
  const used = Object.keys(makers).filter((maker) => shapes.some(([, row]) => row[maker]));
  return section(
    "Time",
    table(
      ["batch × steps", ...used.map((maker) => makers[maker])],
      shapes.map(([shape, row]) => [
        shape.replace("x", " × "),
        ...used.map((maker) => (row[maker] ? Math.round(row[maker]).toLocaleString("en") : "–")),
      ]),
      { numbers: 1, caption: "Microseconds a run, on one thread, where the model was made" },
    ),
  );
}
