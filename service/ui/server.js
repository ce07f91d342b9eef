// The tab of the server: what its metrics say, drawn over the last minutes. It asks only while it is seen.

import { get } from "./api.js";
import { LineChart } from "./charts.js";
import { field, h, short, table } from "./dom.js";
import { Reading, Span } from "./metrics.js";

const PERIOD = 2; // seconds between two readings
const POINTS = 151; // five minutes
const FEWEST = 31; // that are drawn: one minute
const APART = 2; // a point is about what happened in so many periods: workers write their numbers once a second
const LATE = 3; // periods without a reading before there is a gap
const TO_CLIENTS = { surface: (name) => name !== "operations" };
const STORE = "Writes to the store, milliseconds"; // only where there is a shared one

const ELSEWHERE =
  "This address does not have the server's metrics. They are on its operations port " +
  "(--operations-port), or a proxy keeps them to itself.";

const history = []; // {tick, reading}: still there when the tab is opened again

/** Each chart: its title, whether it is of one model if one is chosen, and its series by what happened in a span. */
const CHARTS = [
  [
    "Time steps a second",
    true,
    {
      steps: (span, model) => span.rate("cellserve_steps_total", model),
      padding: (span, model) => span.rate("cellserve_padding_steps_total", model),
    },
  ],
  [
    "Batch size, rows",
    true,
    {
      mean: (span, model) => span.mean("cellserve_tick_rows", model),
      p99: (span, model) => span.quantile(0.99, "cellserve_tick_rows", model),
    },
  ],
  ["Time steps that wait", true, { queued: ({ after }, model) => after.sum("cellserve_queued_steps", model) ?? 0 }],
  [
    "Wait and run, milliseconds",
    true,
    {
      "wait p50": stage("queue", 0.5),
      "wait p99": stage("queue", 0.99),
      "run p50": stage("run", 0.5),
      "run p99": stage("run", 0.99),
    },
  ],
  [
    "Requests a second",
    false,
    {
      requests: answers(""),
      "refused (4xx)": answers("4"),
      "failed (5xx)": answers("5"),
    },
  ],
  [
    "From request to answer, milliseconds",
    false,
    {
      p50: (span) => milliseconds(span.quantile(0.5, "cellserve_request_duration_seconds", TO_CLIENTS)),
      p99: (span) => milliseconds(span.quantile(0.99, "cellserve_request_duration_seconds", TO_CLIENTS)),
    },
  ],
  ["Live sessions", false, { sessions: ({ after }) => after.sum("cellserve_sessions") }],
  [STORE, true, { p50: stage("store", 0.5), p99: stage("store", 0.99) }],
];

/** Fills the tab. */
export async function show(view, parts, signal) {
  view.append(h("h1", {}, "Server"));
  const first = await read(signal);
  if (typeof first === "string") {
    view.append(h("p", {}, first));
    return;
  }
  const chosen = h("select", { onchange: () => draw() });
  const facts = h("dl", { class: "facts" });
  const models = h("div", {});
  const written = first.samples("cellserve_stage_duration_seconds_count", { stage: "store" }).length > 0;
  const charts = CHARTS.filter(([title]) => written || title !== STORE).map(([title, byModel, series]) => {
    const chart = new LineChart(
      title,
      Object.keys(series).map((name) => ({ name })),
      { height: 170, min: 0, x: "time", at: (point) => ago(pointsToDraw() - 1 - point) },
    );
    return { title, byModel, series: Object.values(series), chart, heading: h("h2", {}, title) };
  });
  const draw = () => {
    offer(chosen);
    const model = chosen.value ? JSON.parse(chosen.value) : {};
    const spans = spansOfPoints();
    for (const { title, byModel, series, chart, heading } of charts) {
      heading.textContent = model.model && !byModel ? `${title} (all models)` : title;
      chart.draw(series.map((value) => spans.map((span) => (span ? value(span, model) : null))));
    }
    showFacts(facts);
    showModels(models, spans.at(-1));
  };
  view.append(
    facts,
    h("div", { class: "row" }, field("Charts of", chosen)),
    h("p", { class: "dim" }, "The last five minutes, while this tab was seen."),
    h(
      "div",
      { class: "columns" },
      charts.map(({ heading, chart }) => h("section", { class: "card" }, heading, chart.element)),
    ),
    h("h2", {}, "By model"),
    models,
  );
  draw();
  poll(draw, signal);
}

/** Reads the metrics into the history; returns the reading, or a text that says why there are none. */
async function read(signal) {
  try {
    const reading = new Reading(await get("metrics", { headers: { Accept: "application/json" }, signal }));
    const tick = Math.round(reading.time / PERIOD);
    if (history.at(-1)?.tick === tick) history.pop();
    history.push({ tick, reading });
    while (history[0].tick <= tick - POINTS - APART) history.shift();
    return reading;
  } catch (error) {
    if (error.status === 403) return `Only operators see this: ${error.message}`;
    if (error.status === 404) return ELSEWHERE;
    throw error;
  }
}

async function poll(draw, signal) {
  while (!signal.aborted) {
    await new Promise((resolve) => setTimeout(resolve, PERIOD * 1000));
    if (signal.aborted || document.hidden) continue;
    try {
      await read(signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      continue; // a gap in the charts says that nothing was read
    }
    draw();
  }
}

/** Returns how many points the charts have: more, the longer they are seen. */
function pointsToDraw() {
  return Math.min(Math.max(history.at(-1).tick - history[0].tick + 1, FEWEST), POINTS);
}

/** Returns, for each point of the charts, what happened in it; null for what was not read. */
function spansOfPoints() {
  const last = history.at(-1).tick;
  const points = pointsToDraw();
  return Array.from({ length: points }, (_, point) => {
    const tick = last - points + 1 + point;
    const place = history.findLastIndex((one) => one.tick <= tick);
    if (place < 1 || history[place].tick <= tick - LATE) return null;
    const earlier = history.slice(0, place).findLast((one) => one.tick <= tick - APART) ?? history[place - 1];
    return earlier.tick > tick - APART - LATE ? new Span(earlier.reading, history[place].reading) : null;
  });
}

/** Offers the models that have been served, and keeps the chosen one. */
function offer(select) {
  const found = new Map([["", "all models"]]);
  for (const { labels } of history.at(-1).reading.samples("cellserve_steps_total")) {
    found.set(JSON.stringify(labels), `${labels.model}, version ${labels.version}`);
  }
  if (select.options.length === found.size && [...select.options].every(({ value }) => found.has(value))) return;
  const { value } = select;
  select.replaceChildren(...[...found].map(([labels, name]) => h("option", { value: labels }, name)));
  if (found.has(value)) select.value = value;
}

function showFacts(facts) {
  const { reading } = history.at(-1);
  const [build] = reading.samples("cellserve_build_info");
  const sessions = reading.sum("cellserve_sessions");
  const told = [
    ["Version", build.labels.version],
    ["ONNX Runtime", build.labels.runtime],
    ["Up for", ago((reading.time - reading.sum("process_start_time_seconds")) / PERIOD).slice(1)],
    ["Memory", `${Math.round(reading.sum("process_resident_memory_bytes") / 1e6)} MB`],
    ["Live sessions", sessions ?? "unknown: the store is away"],
    ["Open sockets", reading.sum("cellserve_sockets")],
    ["Store errors", reading.sum("cellserve_store_errors_total") ?? 0],
  ];
  facts.replaceChildren(...told.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function showModels(element, span) {
  const { reading } = history.at(-1);
  const cell = (value) => (value === null ? "–" : short(Number(value.toPrecision(3))));
  const rows = reading
    .samples("cellserve_steps_total")
    .map(({ labels, value }) => [
      `${labels.model}:${labels.version}`,
      short(value),
      ...(span
        ? [
            span.rate("cellserve_steps_total", labels),
            span.mean("cellserve_tick_rows", labels),
            ...["queue", "run"].flatMap((name) => [0.5, 0.99].map((share) => stage(name, share)(span, labels))),
          ].map(cell)
        : Array(6).fill("–")),
      reading.sum("cellserve_queued_steps", labels),
      reading.sum("cellserve_slots", labels),
    ]);
  const latencies = ["Wait p50, ms", "Wait p99, ms", "Run p50, ms", "Run p99, ms"];
  element.replaceChildren(
    table(["Model", "Steps", "Steps/s", "Batch", ...latencies, "Queued", "Slots"], rows, {
      caption: "The last seconds of each version",
      numbers: 1,
    }),
  );
}

function stage(name, share) {
  const seconds = "cellserve_stage_duration_seconds";
  return (span, model) => milliseconds(span.quantile(share, seconds, { ...model, stage: name }));
}

function answers(begin) {
  const labels = { ...TO_CLIENTS, status: (status) => status.startsWith(begin) };
  return (span) => span.rate("cellserve_requests_total", labels);
}

function milliseconds(seconds) {
  return seconds === null ? null : seconds * 1000;
}

/** Returns how long ago a point is, such as "−1:30", for points of PERIOD seconds. */
function ago(points) {
  const seconds = Math.round(points * PERIOD);
  if (seconds <= 0) return "now";
  const [hours, minutes, rest] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  const two = (number) => String(number).padStart(2, "0");
  return `−${hours ? `${hours}:${two(minutes)}` : minutes}:${two(rest)}`;
}
