// The tab Play: what can be done with a model depends on its task.

import { get, path } from "./api.js";
import { field, h } from "./dom.js";
import { playAudio } from "./play_audio.js";
import { playClassifier } from "./play_classifier.js";
import { playForecaster } from "./play_forecaster.js";
import { playTable } from "./play_table.js";
import { playText } from "./play_text.js";

const VIEWS = { forecast: playForecaster, classify: playClassifier, text: playText, audio: playAudio };

export async function show(view, [name, how], signal) {
  view.append(h("h1", {}, "Play"));
  const { models } = await get("models", { signal });
  const names = models.filter(({ version }) => version !== null).map((model) => model.name);
  if (!names.length) {
    view.append(h("p", {}, "No model is served yet."));
    return;
  }
  const chosen = name ?? names[0];
  const select = h(
    "select",
    {},
    [...new Set([...names, chosen])].map((each) => h("option", { value: each, selected: each === chosen }, each)),
  );
  select.addEventListener("change", () => (location.hash = `#/${path("play", select.value)}`));
  const choice = h("div", { class: "row" }, field("Model", select));
  view.append(choice);
  const model = await get(path("models", chosen), { signal });
  choice.append(h("p", {}, h("a", { href: `#/${path("models", chosen)}` }, "About it")));
  const special = fits(model) ? VIEWS[model.task] : undefined;
  const asTable = how === "table" || !special;
  if (special) {
    choice.append(
      h(
        "p",
        {},
        h(
          "a",
          { href: `#/${path("play", chosen, ...(asTable ? [] : ["table"]))}` },
          asTable ? "Back to its own view" : "As a plain table",
        ),
      ),
    );
  }
  view.append(h("p", { class: "dim" }, model.description));
  await (asTable ? playTable : special)(view, model, signal);
}

/** Whether the view of a model's task can show it: several inputs need the table. */
function fits({ signature }) {
  return signature.inputs.length === 1 && signature.inputs[0].shape.length <= 1;
}
