// What a request asks besides its text: the fields under the message box, and the body that is sent.

import { find } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** Whether all fields can be sent; shows the first one that cannot. */
export function valid() {
  for (const name of NUMBERS) {
    const field = find(name);
    if (field.checkValidity()) continue;
    toggle(true);
    field.reportValidity();
    return false;
  }
  return true;
}

/** The body of a chat request. An empty field is not sent, so that the endpoint's own default holds. */
export function bodyOf(turns) {
  const system = find("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
  const body = { model: find("model").value, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    const value = find(name).valueAsNumber;
    if (Number.isFinite(value)) body[name] = value;
  }
  return body;
}

function toggle(open) {
  find("parameters").hidden = !open;
  find("open-parameters").setAttribute("aria-expanded", String(open));
  if (open) find("system").focus();
}

function count() {
  const set = [...NUMBERS, "system"].filter((name) => find(name).value !== "").length;
  find("open-parameters").querySelector("span").textContent = set ? `Parameters · ${set}` : "Parameters";
}

export function setUpParameters() {
  find("open-parameters").addEventListener("click", () => toggle(find("parameters").hidden));
  find("parameters").addEventListener("input", count);
  count();
}
