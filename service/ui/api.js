// The server's API, as everybody has it. The key is kept in this module's memory and nowhere else.

/** The server's address: this file is in its `ui/`, under whatever path a proxy publishes it. */
export const BASE = new URL("../", import.meta.url);

let key = "";
let asking = null; // the one dialog that all refused requests wait for

/** An RFC 9457 problem document, as an error; `kind` is such as "position-conflict". */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail || document.title || `status ${status}`);
    this.status = status;
    this.problem = document;
    this.kind = String(document.type ?? "")
      .split(":")
      .pop();
  }
}

/** Returns the key, for what the page shows to copy; empty if there is none. */
export function currentKey() {
  return key;
}

/** Sets the key, or forgets it with an empty one. */
export function setKey(value) {
  key = value;
}

/**
 * Sends a request and returns the answer. Options: `json` or `body` with `type`, `headers`, `signal`, `keepalive`.
 * Where a key is missing or wrong, the user is asked for one and the request is sent again.
 * Throws a Problem for an error's answer, and AbortError when the signal is aborted.
 */
export async function request(method, path, { json, body, type, headers = {}, signal, keepalive } = {}) {
  for (;;) {
    const sent = { ...headers };
    if (json !== undefined) [body, type] = [JSON.stringify(json), "application/json"];
    if (type) sent["Content-Type"] = type;
    if (key) sent.Authorization = `Bearer ${key}`;
    let answer;
    try {
      answer = await fetch(new URL(path, BASE), {
        method,
        headers: sent,
        body,
        signal,
        keepalive,
        credentials: "omit",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, {
        title: "No answer",
        detail: "The server did not answer: is it running, and this page's network up?",
      });
    }
    if (answer.ok) return answer;
    const problem = await problemOf(answer);
    if (answer.status !== 401 || !(await wantKey(sent.Authorization ? problem.message : ""))) throw problem;
  }
}

async function problemOf(answer) {
  let document = {};
  try {
    document = await answer.json();
  } catch {
    // A proxy's own error page is no JSON.
  }
  return new Problem(answer.status, { title: answer.statusText, ...document });
}

/** Sends a request and returns the JSON of its answer. */
export async function call(method, path, json, options = {}) {
  const answer = await request(method, path, { ...options, json });
  return answer.status === 204 ? null : answer.json();
}

export const get = (path, options) => call("GET", path, undefined, options);
export const post = (path, json = {}, options) => call("POST", path, json, options);

/** Returns a path of encoded parts: `path("sessions", id, "step")`. */
export function path(...parts) {
  return parts.map(encodeURIComponent).join("/");
}

/** Yields a POST's server-sent events as `{id, event, data}`, data parsed; throws a Problem for an event `problem`. */
export async function* events(path, json, { signal, headers } = {}) {
  const answer = await request("POST", path, { json, signal, headers: { Accept: "text/event-stream", ...headers } });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const found = { event: "message", id: null, data: "" };
      for (const line of part.split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) found[line.slice(0, colon)] = line.slice(colon + 2);
      }
      const event = { ...found, data: found.data ? JSON.parse(found.data) : null };
      if (event.event === "problem") throw new Problem(event.data.status, event.data);
      yield event;
    }
  }
}

/**
 * Opens `WS /stream`. `ask(frame)` sends a JSON frame and resolves with its answer, or throws its Problem;
 * frames may be asked before others are answered. `close()` closes it; `closed` resolves when it is.
 */
export async function openStream({ signal } = {}) {
  const socket = new WebSocket(new URL("stream", BASE).href.replace(/^http/, "ws"));
  const waiting = new Map();
  let ref = 0;
  const opened = new Promise((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = () => reject(new Problem(0, { detail: "The stream could not be opened." }));
  });
  const closed = new Promise((resolve) => {
    socket.onclose = (event) => {
      for (const { reject } of waiting.values()) {
        reject(new Problem(0, { detail: event.reason || "The stream was closed." }));
      }
      waiting.clear();
      resolve(event);
    };
  });
  socket.onmessage = ({ data }) => {
    const frame = JSON.parse(data);
    const asked = waiting.get(frame.ref);
    waiting.delete(frame.ref);
    if (frame.op === "error") asked?.reject(new Problem(frame.problem.status, frame.problem));
    else asked?.resolve(frame);
  };
  const ask = (frame) =>
    new Promise((resolve, reject) => {
      if (socket.readyState !== WebSocket.OPEN) {
        reject(new Problem(0, { detail: "The stream is closed." }));
        return;
      }
      waiting.set(++ref, { resolve, reject });
      socket.send(JSON.stringify({ ...frame, ref }));
    });
  const close = () => socket.close();
  signal?.addEventListener("abort", close);
  await opened;
  if (key) await ask({ op: "auth", key });
  return { ask, close, closed };
}

/** Asks the user for a key; resolves to whether one was given. */
export function wantKey(wrong = "") {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key-field");
    document.getElementById("key-wrong").textContent = wrong;
    input.value = "";
    dialog.returnValue = "";
    document.getElementById("key-form").onsubmit = () => {
      key = input.value.trim();
      input.value = "";
      dialog.returnValue = "given";
    };
    document.getElementById("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      asking = null;
      resolve(dialog.returnValue !== "");
    };
    dialog.showModal();
  });
  return asking;
}
