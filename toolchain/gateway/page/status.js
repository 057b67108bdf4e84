// How the endpoint is: asks every two seconds while the page is seen, and draws it, section by section.

import { ask } from "./api.js";
import { bar, duration, el, find, number, uptime } from "./dom.js";
import { spark } from "./spark.js";

const EVERY_MS = 2000;
const MOST = 5; // replicas in the side column

let last = null;
let windowName = "last_minute";
let timer = 0;
let wasReady = false;
let onStatus = () => {};

/** `listener` is called with each status, or with null and the failure. */
export function setUpStatus(listener) {
  onStatus = listener;
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));
  if (!document.hidden) poll();
}

/** Ask now. */
export async function poll() {
  clearTimeout(timer);
  try {
    const response = await ask("status", { signal: AbortSignal.timeout(5000) });
    last = await response.json();
    wasReady ||= last.ready;
    draw();
    pill(...stateOf(last));
    onStatus(last, null);
  } catch (failure) {
    if (failure.status === 401) pill("locked", "Key needed");
    else pill("down", "No answer");
    last = null;
    absent(failure);
    onStatus(null, failure);
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(poll, EVERY_MS);
}

/** What is wrong just now, in a few words; empty where nothing is. */
export function trouble() {
  if (!last || last.ready) return "";
  if (asleep(last)) return "The endpoint sleeps; the request wakes it";
  return wasReady ? "The engine is restarting; the request waits for it" : "No engine is ready; the request waits for one";
}

/** An endpoint over several nodes that runs no replica while nobody asks. */
export function asleep(status) {
  return status.fleet !== null && status.fleet.min === 0 && !status.replicas.length;
}

function stateOf(status) {
  if (asleep(status)) return ["asleep", "Asleep"];
  const up = status.replicas.filter((replica) => replica.ready).length;
  const all = status.replicas.length;
  if (!up) return wasReady ? ["restarting", "Restarting"] : ["restarting", "Not ready"];
  if (up < all) return ["partly", `${up} of ${all} ready`];
  return ["ready", all > 1 ? `${all} ready` : "Ready"];
}

function pill(state, words) {
  const node = find("state");
  if (node.dataset.state === state && node.lastElementChild.textContent === words) return;
  node.dataset.state = state;
  node.lastElementChild.textContent = words;
}

function section(id, title, ...content) {
  const [aside, ...rest] = Array.isArray(title) ? title.toReversed() : [null, title];
  const head = el("div", { class: "head" }, el("h2", { id: `${id}-title` }, Array.isArray(title) ? rest[0] : title), aside);
  return el("section", { id, "aria-labelledby": `${id}-title` }, head, ...content);
}

function draw() {
  const focused = document.activeElement?.dataset?.window;
  const parts = [speed(last), load(last), replicas(last), engine(last), foot(last)];
  find("endpoint").replaceChildren(...parts);
  if (focused) find("endpoint").querySelector(`[data-window="${focused}"]`)?.focus();
}

function speed(status) {
  const seen = status[windowName];
  const { series } = status;
  const whole = (values) => values.slice(0, -1); // the last five seconds are not over: their rate would seem to fall
  const span = (series.step_s * series.ttft_ms_p50.length) / 60;
  const tile = (name, [value, unit], small, values) =>
    el("div", { class: "tile" },
      el("h3", {}, name),
      el("p", { class: "value" }, value, el("small", {}, unit && ` ${unit}`)),
      el("p", { class: "small" }, small),
      spark(values, `${name} over the last ${span} minutes`));
  const p90 = (ms) => (ms === null ? "no request yet" : `p90 ${duration(ms).join(" ")}`);
  const failed = seen.failed ? `${number(seen.failed)} failed` : `${number(seen.requests)} answered`;
  return section("speed", ["Speed", windows()], el("div", { class: "tiles" },
    tile("Time to first token", duration(seen.ttft_ms_p50), p90(seen.ttft_ms_p90), series.ttft_ms_p50),
    tile("Between tokens", duration(seen.itl_ms_p50), p90(seen.itl_ms_p90), series.itl_ms_p50),
    tile("Tokens", [number(seen.tokens_per_s), "/s"], "generated", whole(series.tokens_per_s)),
    tile("Requests", [number(seen.requests_per_s), "/s"], failed, whole(series.requests_per_s))));
}

function windows() {
  const button = (name, words, label) =>
    el("button", {
      type: "button", "data-window": name, "aria-pressed": String(windowName === name), "aria-label": label,
      onclick: () => { windowName = name; draw(); },
    }, words);
  return el("div", { class: "segments", role: "group", "aria-label": "Numbers of" },
    button("last_minute", "1 min", "The last minute"), button("last_five_minutes", "5 min", "The last five minutes"));
}

function load(status) {
  const queue = status.waiting ? `${number(status.waiting)} of ${number(status.max_queue)}` : "empty";
  return section("load", "Load", el("div", { class: "pair" },
    bar("Running", status.running, status.places, `${number(status.running)} of ${number(status.places)}`),
    bar("Queue", status.waiting, status.max_queue, queue)));
}

function replicas(status) {
  const all = status.replicas.length;
  const shown = all > MOST ? status.replicas.slice(0, MOST - 1) : status.replicas;
  const list = shown.map((replica) => {
    const facts = [`${number(replica.in_flight)} in flight`];
    if (replica.restarts) facts.push(`${number(replica.restarts)} restart${replica.restarts > 1 ? "s" : ""}`);
    const blocks = replica.kv_blocks;
    return el("li", { "data-ready": String(replica.ready) },
      el("div", { class: "who" },
        el("i", {}), el("span", { class: "name" }, replica.name),
        el("span", { class: "amount" }, replica.ready ? facts.join(" · ") : "not ready")),
      replica.ready ? null : el("p", { class: "why" }, replica.why_down),
      blocks && bar("KV cache", blocks.used, blocks.total, `${number(blocks.used)} of ${number(blocks.total)} blocks`));
  });
  const more = all > shown.length && el("p", { class: "hint" }, `and ${number(all - shown.length)} more`);
  const none = !all && el("p", { class: "hint" }, "None runs just now.");
  return section("replicas", all === 1 ? "Replica" : `Replicas · ${number(all)}`, el("ul", {}, ...list), more, none);
}

const BACKENDS = { openvino: "OpenVINO", tensorrt_engine: "TensorRT-LLM engine", tensorrt_llmapi: "TensorRT-LLM, PyTorch" };
const VERDICTS = { passed: "good", failed: "bad", unreadable: "bad", "not verified": "open" };

function engine(status) {
  const facts = status.engine;
  if (!facts) {
    const words = "Unknown here: this gateway was given a server's address. Start it with the recipe or the repository, and its passport stands here.";
    return section("engine", "Engine", el("p", { class: "hint" }, words));
  }
  const verdict = el("span", { class: "verdict", "data-verdict": VERDICTS[facts.verdict] }, facts.verdict);
  const rows = [
    ["Recipe", facts.recipe],
    ["Device", facts.gpus > 1 ? `${facts.gpus} × ${facts.device}` : facts.device],
    ["Runs on", BACKENDS[facts.backend] ?? facts.backend],
    ["Release", facts.release],
    ["Weights", facts.weights === "none" ? "not quantized" : facts.weights],
    ["KV cache", facts.kv],
    ["Context", status.max_seq_len && `${number(status.max_seq_len)} tokens`],
    ["Batch", `${number(facts.max_batch_size)} sequences`],
    ["Model", facts.architecture],
    ["Digest", el("code", {}, facts.digest)],
    ["Accuracy", verdict],
  ];
  const list = rows.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  const summary = facts.verdict_summary && el("p", { class: "hint" }, facts.verdict_summary);
  return section("engine", "Engine", el("dl", { class: "passport" }, ...list), summary || null);
}

function foot(status) {
  return el("footer", {}, `scalellm ${status.version} · up ${uptime(status.uptime_s)} · `, el("a", { href: "openapi.json" }, "API schema"));
}

function absent(failure) {
  const words = failure.status === 401
    ? "This endpoint shows its state to those with an API key."
    : "The gateway does not answer. This page asks again every two seconds.";
  find("endpoint").replaceChildren(section("speed", "Endpoint", el("p", { class: "hint" }, words)));
}
