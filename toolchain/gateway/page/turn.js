// One answer on the page: waiting, growing, whole, stopped or failed; its numbers, and what can be done with it.

import { confirm, copy, duration, el, number, tool } from "./dom.js";
import { rendered } from "./text.js";

/** A message of the reader's. */
export function question(text) {
  return el("article", { class: "turn user", "aria-label": "You" }, el("p", {}, text));
}

export class Answer {
  /** `on`: { again, code, key }, what its buttons do. */
  constructor(on) {
    this.on = on;
    this.text = "";
    this.prose = el("div", { class: "prose" });
    this.foot = el("div", { class: "foot" });
    this.node = el("article", { class: "turn model waiting", "aria-label": "Answer", "aria-busy": "true" });
    this.node.append(this.prose, this.foot);
    this.drawing = 0;
  }

  /** Says for how long it has been waited; `why` where something is known to be the matter. */
  wait(ms, why) {
    if (this.text || ms < 400) return;
    const [value, unit] = duration(Math.floor(ms / 100) * 100);
    this.foot.replaceChildren(el("span", { class: "note" }, `${why || "Waiting for the first token"} · ${value} ${unit}`));
  }

  grow(piece) {
    this.text += piece;
    this.node.classList.replace("waiting", "growing");
    if (!this.drawing) this.drawing = requestAnimationFrame(() => this.draw());
  }

  draw() {
    if (this.drawing) cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    this.prose.replaceChildren(...rendered(this.text.trimStart()));
    if (this.node.classList.contains("growing") && this.foot.childElementCount) this.foot.replaceChildren();
    this.node.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }

  /** `reading`: of its stopwatch; `ended`: "stop", "length", or "stopped" by the reader. */
  finish(reading, ended) {
    this.settle("done");
    const notes = { length: "cut at max tokens", stopped: "stopped" };
    this.foot.replaceChildren(numbers(reading, notes[ended]), this.tools());
  }

  /** A failure: what it is, what to do, and the server's own words. */
  fail(failure, reading) {
    this.settle(this.text ? "done" : "failed");
    const again = el("button", { type: "button", class: "button", onclick: this.on.again }, "Try again");
    const words = el("p", { class: "detail" }, failure.detail);
    const box = el("div", { class: "failure", role: "alert" }, el("h3", {}, failure.title), el("p", {}, failure.advice), words);
    if (failure.status === 401) {
      box.append(el("div", { class: "row" }, el("button", { type: "button", class: "button first", onclick: this.on.key }, "Enter an API key")));
    } else box.append(el("div", { class: "row" }, again));
    if (failure.retryAfter) countdown(again, failure.retryAfter);
    this.foot.replaceChildren(...(this.text ? [numbers(reading)] : []), box);
  }

  settle(state) {
    this.draw();
    this.node.classList.remove("waiting", "growing");
    this.node.classList.add(state);
    this.node.setAttribute("aria-busy", "false");
  }

  tools() {
    const copying = tool("copy", "Copy this answer", async () => (await copy(this.text)) && confirm(copying, "copy"));
    const again = tool("again", "Answer again", this.on.again);
    again.classList.add("again");
    return el("div", { class: "tools" }, copying, again, tool("code", "This request as code", this.on.code));
  }
}

function countdown(button, seconds) {
  let left = Math.ceil(seconds);
  button.disabled = true;
  const tick = () => {
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    button.disabled = left > 0;
    if (left-- > 0) setTimeout(tick, 1000);
  };
  tick();
}

const MEANING = {
  TTFT: "From sending the request to the first text, measured in this browser",
  ITL: "From the first text to the last, for each token that came after the first, measured in this browser",
  rate: "Tokens per second after the first text, measured in this browser",
  tokens: "Tokens of the prompt and of the answer, as the server counted them",
};

function numbers(reading, note) {
  const facts = [];
  const add = (name, label, value, unit) =>
    facts.push(el("div", { title: MEANING[name] }, el("dt", {}, label), el("dd", {}, value, unit && el("small", {}, ` ${unit}`))));
  if (reading.tokens !== null) add("tokens", "Tokens", `${number(reading.prompt)} → ${number(reading.tokens)}`, "");
  else if (reading.pieces) add("", "Pieces", number(reading.pieces), "");
  if (reading.ttft !== null) add("TTFT", "TTFT", ...duration(reading.ttft));
  if (reading.itl !== null) add("ITL", "ITL", ...duration(reading.itl));
  if (reading.rate !== null) add("rate", "Speed", number(reading.rate), "tok/s");
  if (note) facts.push(el("div", {}, el("dt", { class: "unseen" }, "Ended"), el("dd", { class: "note" }, note)));
  return el("dl", { class: "numbers" }, ...facts);
}
