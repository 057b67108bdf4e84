// The conversation: what was said, sending it, stopping it, asking again. It is kept in this page's memory alone.

import { ask, Failure, key } from "./api.js";
import { find } from "./dom.js";
import { bodyOf, valid } from "./parameters.js";
import { showCode } from "./snippets.js";
import { events, Stopwatch } from "./stream.js";
import { Answer, question } from "./turn.js";

/** What was said: { role, content, node } of the reader's, and { role, content, view } of the model's. */
let turns = [];
let running = null;
let hooks = null;

/** `given`: { askKey(then), models(), trouble() }: opens the key's dialog; resolves when the models are known; says what is
 * wrong with the endpoint just now. */
export function setUpChat(given) {
  hooks = given;
  const prompt = find("prompt");
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", fit);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
  });
  find("stop").addEventListener("click", stop);
  find("new-chat").addEventListener("click", clear);
  find("open-code").addEventListener("click", () => {
    const words = prompt.value.trim() || "Hello";
    if (valid()) showCode(bodyOf([...history(turns), { role: "user", content: words }]));
  });
  find("scroll").addEventListener("grown", follow);
  find("scroll").addEventListener("scroll", () => (sticking = atEnd()));
  fit();
}

function send() {
  const prompt = find("prompt");
  const content = prompt.value.trim();
  if (!content || running || !valid()) return;
  const node = question(content);
  turns.push({ role: "user", content, node });
  find("log").append(node);
  find("empty").hidden = true;
  prompt.value = "";
  fit();
  sticking = true;
  answer();
}

function stop() {
  running?.abort();
  find("prompt").focus();
}

function clear() {
  running?.abort();
  turns = [];
  find("log").replaceChildren();
  find("empty").hidden = false;
  find("prompt").focus();
}

/** The turns as a request has them: an answer without text was none, and its question is not asked again, because many
 * templates want the roles to alternate. */
function history(some) {
  const kept = some.filter((turn, at) => turn.content && (turn.role !== "user" || some[at + 1]?.content !== ""));
  return kept.map(({ role, content }) => ({ role, content }));
}

/** Ask for an answer to what was said so far. */
async function answer() {
  const before = history(turns);
  const view = new Answer({ again: () => again(turn), code: () => showCode(bodyOf(before)), key: () => hooks.askKey(() => again(turn)) });
  const turn = { role: "assistant", content: "", view };
  turns.push(turn);
  find("log").append(view.node);
  follow();
  const abort = (running = new AbortController());
  working(true);
  let watch = new Stopwatch();
  const waiting = setInterval(() => view.wait(watch.elapsed, hooks.trouble()), 100);
  const say = new Speaker();
  try {
    await hooks.models();
    watch = new Stopwatch();
    const { usage, finish } = await read(bodyOf(before), abort.signal, watch, (piece) => {
      turn.content += piece;
      view.grow(piece);
      say.add(piece);
    });
    view.finish(watch.reading(usage), finish);
    say.end();
  } catch (error) {
    if (abort.signal.aborted) view.finish(watch.reading(null), "stopped");
    else failed(turn, error instanceof Failure ? error : new Failure({ detail: String(error) }), watch);
  } finally {
    clearInterval(waiting);
    if (running === abort) {
      running = null;
      working(false);
    }
    follow();
  }
}

async function read(body, signal, watch, onPiece) {
  let usage = null;
  let finish = "stop";
  const response = await ask("v1/chat/completions", { body, signal });
  for await (const event of events(response, () => watch.arrive())) {
    usage = event.usage ?? usage;
    const [choice] = event.choices;
    if (!choice) continue;
    finish = choice.finish_reason ?? finish;
    if (!choice.delta.content) continue;
    watch.piece();
    onPiece(choice.delta.content);
  }
  return { usage, finish };
}

function failed(turn, failure, watch) {
  turn.view.fail(failure, watch.reading(null));
  if (failure.status === 401) {
    if (key.get()) key.set("");
    hooks.askKey(() => again(turn));
  }
}

/** In place of this answer and what followed it, another one. */
function again(turn) {
  const at = turns.indexOf(turn);
  if (at < 0 || running) return;
  for (const gone of turns.splice(at)) (gone.node ?? gone.view.node).remove();
  sticking = true;
  answer();
}

function working(yes) {
  find("send").hidden = yes;
  find("stop").hidden = !yes;
  find("log").classList.toggle("working", yes);
}

/** Lets the message box be as tall as its text. */
function fit() {
  const prompt = find("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 200)}px`;
  find("send").disabled = !prompt.value.trim();
}

export function suggest(text) {
  find("prompt").value = text;
  fit();
  find("prompt").focus();
}

let sticking = true;

function atEnd() {
  const box = find("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function follow() {
  if (sticking) find("scroll").scrollTop = find("scroll").scrollHeight;
}

/** Gives a screen reader the answer sentence by sentence, as it comes. */
class Speaker {
  held = "";

  add(piece) {
    this.held += piece;
    const end = Math.max(this.held.lastIndexOf(". "), this.held.lastIndexOf("\n"), this.held.lastIndexOf("? "));
    if (end > 40) this.say(end + 1);
  }

  end() {
    if (this.held.trim()) this.say(this.held.length);
  }

  say(length) {
    find("announce").textContent = this.held.slice(0, length);
    this.held = this.held.slice(length);
  }
}
