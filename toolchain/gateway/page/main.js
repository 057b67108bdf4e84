// The page's beginning: models, key, views; chat and status are told of each other here and nowhere else.

import { ask, key } from "./api.js";
import { setUpChat, suggest } from "./chat.js";
import { el, find, icon, number } from "./dom.js";
import { drawFleet } from "./fleet.js";
import { setUpParameters } from "./parameters.js";
import { setUpCode } from "./snippets.js";
import { asleep, poll, setUpStatus, trouble } from "./status.js";

const IDEAS = ["Explain paged attention in two sentences.", "Write a Python function that reverses a list.", "What is the capital of France?"];

let afterKey = null;
let known = null;
let refusedBefore = false;

/** Open the key's dialog; `then` is called once there is one. */
function askKey(then) {
  afterKey = then ?? null;
  find("key-input").value = key.get();
  find("key-forget").disabled = !key.get();
  if (!find("key-dialog").open) find("key-dialog").showModal();
}

function useKey(value) {
  key.set(value);
  find("key-dialog").close();
  find("open-key").classList.toggle("set", Boolean(value));
  known = null;
  poll();
  if (value) afterKey?.();
  afterKey = null;
}

/** Resolves when the models are known; asks for them where they are not. */
function models() {
  known ??= ask("v1/models").then((response) => response.json()).then(({ data }) => offer(data), forget);
  return known;
}

function forget(failure) {
  known = null;
  throw failure;
}

function offer(data) {
  const chosen = find("model").value;
  find("model").replaceChildren(...data.map(({ id }) => el("option", { value: id, selected: id === chosen }, id)));
  find("model").disabled = false;
  name();
}

/** At the beginning and after a failure; asks for a key by itself once. */
async function loadModels() {
  try {
    await models();
  } catch (failure) {
    if (failure.status === 401 && !refusedBefore && !find("key-dialog").open) askKey();
    refusedBefore = true;
  }
}

function name() {
  const model = find("model").value;
  find("empty-model").textContent = model;
  find("prompt").placeholder = `Message ${model}`;
  document.title = `${model} · scalellm`;
}

function facts(status) {
  const { engine } = status;
  const words = [];
  if (engine) {
    words.push(engine.device);
    words.push(engine.weights === "none" ? "full precision" : `${engine.weights} weights`, `${engine.kv} KV cache`);
  }
  if (status.max_seq_len) words.push(`${number(status.max_seq_len)}-token context`);
  find("empty-facts").textContent = words.join(" · ");
}

function onStatus(status, failure) {
  const words = trouble();
  const banner = find("banner");
  banner.hidden = !words && (failure === null || failure.status === 401);
  if (words && asleep(status)) banner.textContent = "This endpoint sleeps. A message wakes it; the answer takes as long as an engine takes to start.";
  else if (words) banner.textContent = "No engine answers just now. A message waits a while for one to come back.";
  else if (failure) banner.textContent = "The gateway does not answer. What was written here is kept.";
  if (status) facts(status);
  if (status && !drawFleet(status) && document.body.dataset.view === "fleet") show("chat");
  if (status || failure.status === 401) loadModels();
}

function show(view) {
  document.body.dataset.view = view;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.setAttribute("aria-pressed", String(button.dataset.show === view));
  }
}

function setUp() {
  for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
  for (const button of document.querySelectorAll("[data-show]")) button.addEventListener("click", () => show(button.dataset.show));
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  find("ideas").append(...IDEAS.map((text) => el("button", { type: "button", onclick: () => suggest(text) }, text)));
  find("model").addEventListener("change", name);
  find("open-key").addEventListener("click", () => askKey());
  find("open-key").classList.toggle("set", Boolean(key.get()));
  find("key-forget").addEventListener("click", () => useKey(""));
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(find("key-input").value.trim());
  });
  setUpParameters();
  setUpCode();
  setUpChat({ askKey, models, trouble });
  setUpStatus(onStatus);
  find("prompt").focus();
}

setUp();
