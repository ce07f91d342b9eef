// What does the same as a session's buttons, to copy: with curl, and in Python.

import { announce, h } from "./dom.js";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Returns lines of curl for a session; `key` says whether a key is required, which is never shown. */
export function curlLines(base, id, x, key) {
  const url = quoted(`${base}sessions/${id}`);
  const of = (path) => quoted(`${base}sessions/${id}/${path}`);
  const curl = key ? 'curl -H "Authorization: Bearer $CELLSERVE_API_KEY"' : "curl";
  return [
    "# where it is, and a step",
    `${curl} ${url}`,
    `${curl} -H 'Content-Type: application/json' -d ${quoted(JSON.stringify({ x }))} ${of("step")}`,
    "# its state: to a file, and back",
    `${curl} -o state.safetensors ${of("state")}`,
    `${curl} -X PUT -H 'Content-Type: application/x-safetensors' --data-binary @state.safetensors ${of("state")}`,
    "# a fork, a reset to zeros, the end",
    `${curl} -X POST ${of("fork")}`,
    `${curl} -X POST ${of("reset")}`,
    `${curl} -X DELETE ${url}`,
  ].join("\n");
}

/** Returns the same in Python, with Cellserve's client. */
export function pythonLines(base, id, x, key) {
  const url = JSON.stringify(base.replace(/\/$/, ""));
  return [
    ...(key ? ["import os", ""] : []),
    "from cellserve import Client",
    "",
    `client = Client(${url}${key ? ', api_key=os.environ["CELLSERVE_API_KEY"]' : ""})`,
    `session = client.attach(${JSON.stringify(id)})`,
    `y = session.step(${JSON.stringify(x)})`,
    "saved = session.state()  # {name: array}",
    "session.set_state(saved)",
    "other = session.fork()",
    "session.reset()",
    "session.delete()",
  ].join("\n");
}

/** Returns text to copy, with a button that does; `name` is what it is, such as "curl". */
export function copyable(name, text) {
  const code = h("pre", { tabindex: 0, "aria-label": name }, text);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      announce(`${name}: copied.`);
    } catch {
      // Over plain HTTP from another machine the browser has no clipboard: the text is selected instead.
      getSelection().selectAllChildren(code);
      announce(`${name}: selected. Copy it with your keyboard.`);
    }
  };
  const button = h("button", { type: "button", onclick: copy, "aria-label": `Copy: ${name}` }, "Copy");
  const head = h("div", { class: "row" }, h("h3", {}, name), button);
  return { element: h("div", { class: "copyable" }, head, code), code };
}
