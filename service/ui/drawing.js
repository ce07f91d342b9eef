// Draws a network: layers from top to bottom, states beside the layers that carry them, as the export's report does.

import { h, svg } from "./dom.js";

const [WIDTH, HEIGHT, STATE, DOWN, BESIDE] = [190, 46, 140, 34, 28]; // box width and height, state width, gaps

/** Returns the drawing of a model as `GET /models/{name}` describes it. */
export function drawing(model) {
  const layers = model.drawing.length ? model.drawing : plainLayers(model);
  const boxes = layers.map((layer) => ({ ...layer, rank: 0 }));
  const ranks = [];
  for (const box of boxes) {
    box.rank = 1 + Math.max(-1, ...box.sources.map((source) => boxes[source].rank));
    (ranks[box.rank] ??= []).push(box);
  }
  const chain = ranks.every((row) => row.length === 1);
  const margin = boxes.some((box) => box.sources.some((source) => box.rank - boxes[source].rank > 1)) ? 46 : 4;
  const room = (box) => WIDTH + (box.states.length ? STATE + BESIDE : 0);
  const rowWidth = (row) =>
    row.length === 1 && !chain
      ? 2 * room(row[0]) - WIDTH // the box in the middle, room for its states on both sides
      : row.reduce((sum, box) => sum + room(box) + BESIDE, -BESIDE);
  const width = Math.max(...ranks.map(rowWidth)) + 2 * margin;
  for (const row of ranks) {
    let left = chain ? margin : row.length === 1 ? (width - WIDTH) / 2 : (width - rowWidth(row)) / 2;
    for (const box of row) {
      box.left = left;
      box.top = 4 + box.rank * (HEIGHT + DOWN);
      left += room(box) + BESIDE;
    }
  }
  const height = ranks.length * (HEIGHT + DOWN) - DOWN + 8;
  const told = boxes.map(
    ({ name, label, states }) => `${name} (${label}${states.length ? `, carries ${states.join(", ")}` : ""})`,
  );
  const drawn = svg(
    "svg",
    {
      class: "network",
      viewBox: `0 0 ${width} ${height}`,
      width,
      role: "img",
      "aria-label": `The network, from its inputs to its outputs: ${told.join("; ")}`,
    },
    svg("defs", {}, arrow("arrow"), arrow("state-arrow")),
    boxes.flatMap((box) => box.sources.map((source) => edge(boxes[source], box, ranks))),
    boxes.flatMap(parts),
  );
  return h("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Drawing of the network" }, drawn);
}

/** The layers of a model whose file has no drawing: its graph is one box. */
function plainLayers({ signature, form }) {
  const sizes = (spec) => `[${spec.shape.join(", ")}]`;
  const inputs = signature.inputs.map((spec) => ({
    name: spec.name,
    label: `input ${sizes(spec)}`,
    kind: "input",
    sources: [],
    states: [],
  }));
  const graph = {
    name: form || "the model's graph",
    label: "ONNX",
    kind: signature.states.length ? "recurrent" : "layer",
    sources: inputs.map((_, place) => place),
    states: signature.states.map((state) => `${state.name} ${sizes(state)}`),
  };
  const outputs = signature.outputs.map((spec) => ({
    name: spec.name,
    label: `output ${sizes(spec)}`,
    kind: "output",
    sources: [inputs.length],
    states: [],
  }));
  return [...inputs, graph, ...outputs];
}

function arrow(id) {
  return svg(
    "marker",
    { id, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse" },
    svg("path", { d: "M0 0 8 4 0 8Z", class: id }),
  );
}

function edge(start, end, ranks) {
  const [x1, y1, x2, y2] = [start.left + WIDTH / 2, start.top + HEIGHT, end.left + WIDTH / 2, end.top];
  const bend = DOWN * 0.6;
  let way = `C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}`;
  if (end.rank - start.rank > 1) {
    // Around the left of what stands between.
    const side =
      Math.min(
        ...ranks
          .slice(start.rank + 1, end.rank)
          .flat()
          .map((box) => box.left),
      ) - 24;
    way =
      `C${x1} ${y1 + bend} ${side} ${y1} ${side} ${y1 + bend}L${side} ${y2 - bend}` +
      `C${side} ${y2} ${x2} ${y2 - bend} ${x2} ${y2}`;
  }
  return svg("path", { class: "edge", d: `M${x1} ${y1}${way}`, "marker-end": "url(#arrow)" });
}

function parts(box) {
  const { left, top, states } = box;
  const middle = left + WIDTH / 2;
  const radius = box.kind === "input" || box.kind === "output" ? HEIGHT / 2 : 6;
  const drawn = [
    svg("rect", { class: `box ${box.kind}`, x: left, y: top, width: WIDTH, height: HEIGHT, rx: radius }),
    svg("text", { class: "strong", x: middle, y: top + 19, "text-anchor": "middle" }, fits(box.name, 25)),
    svg("text", { x: middle, y: top + 36, "text-anchor": "middle" }, fits(box.label, 29)),
  ];
  const shown = states.length < 4 ? states.slice(0, 2) : [states[0], `and ${states.length - 1} more states`];
  const each = HEIGHT / Math.min(Math.max(states.length, 1), 2);
  shown.forEach((state, place) => {
    const [x, y] = [left + WIDTH + BESIDE, top + place * each];
    drawn.push(
      svg("path", {
        class: "feedback",
        d: `M${left + WIDTH + 2} ${y + each / 2}H${x - 2}`,
        "marker-start": "url(#state-arrow)",
        "marker-end": "url(#state-arrow)",
      }),
      svg("rect", { class: "state", x, y: y + 1, width: STATE, height: each - 2, rx: 5 }),
      svg("text", { class: "strong", x: x + STATE / 2, y: y + each / 2 + 4, "text-anchor": "middle" }, fits(state, 20)),
    );
  });
  return drawn;
}

function fits(text, most) {
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}
