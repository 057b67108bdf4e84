// The fleet: nodes, their replicas, what they cost, what has happened. Drawn anew with each status.

import { bar, confirm, copy, dollars, el, find, number, passed, tool } from "./dom.js";

const MOOD = { ready: "good", up: "good", starting: "busy", draining: "busy", down: "warn", failed: "bad", ended: "none" };
const KINDS = {
  ready: "good", proven: "good", updated: "good", joined: "good",
  failed: "bad", lost: "bad", gone: "bad", "rolled back": "bad",
  waits: "warn", drained: "warn", draining: "warn",
};

let seen = null;

/** Whether there is a fleet to show. */
export function drawFleet(status) {
  const { fleet } = status;
  document.body.toggleAttribute("data-fleet", Boolean(fleet));
  if (!fleet) return false;
  const held = document.activeElement?.dataset?.keep;
  find("fleet-main").replaceChildren(...[notice(fleet), tiles(status, fleet), rollout(fleet), nodes(fleet)].filter(Boolean));
  find("fleet-side").replaceChildren(...[events(fleet), ledger(fleet)].filter(Boolean));
  if (held) find("fleet-side").querySelector(`[data-keep="${held}"]`)?.focus();
  return true;
}

/** All replicas, with their nodes. */
const replicasOf = (fleet) => fleet.nodes.flatMap((node) => node.replicas);

function notice(fleet) {
  const words = !fleet.reached
    ? "The nodes cannot be asked just now. This is how they were; what runs there goes on."
    : !replicasOf(fleet).length && "No replica runs. A request wakes this endpoint.";
  return words ? el("p", { class: "banner", role: "status" }, words) : null;
}

function tiles(status, fleet) {
  const all = replicasOf(fleet).filter((one) => one.state !== "ended").length;
  const used = fleet.nodes.filter((node) => node.replicas.length).length;
  const cost = Number(fleet.cost_per_hour);
  const limits = fleet.min === fleet.max ? "" : `, from ${fleet.min} to ${fleet.max}`;
  const wanted = fleet.max === null ? "" : `${number(fleet.desired ?? fleet.min)} wanted${limits}`;
  const million = fleet.tokens_per_s > 0 && cost > 0 ? (cost / (fleet.tokens_per_s * 3600)) * 1e6 : null;
  const priced = [
    million !== null && `${dollars(million)} per million tokens`,
    fleet.max_price_per_hour && `budget ${dollars(Number(fleet.max_price_per_hour))}`,
    fleet.unpriced > 0 && `${plural(fleet.unpriced, "node")} without a price`,
  ].filter(Boolean);
  const queue = status.waiting ? `${number(status.waiting)} in the queue` : "queue empty";
  const places = `of ${plural(fleet.nodes.length, "node")}`;
  return el("div", { class: "tiles four" },
    tile("Replicas ready", [number(fleet.ready), ` of ${number(all)}`], wanted),
    fleet.gpus
      ? tile("GPUs at work", [number(fleet.gpus), ""], `on ${number(used)} ${places}`)
      : tile("Nodes at work", [number(used), ` ${places}`], "no GPU"),
    tile("Tokens", [whole(fleet.tokens_per_s), " /s"], `${number(status.running)} running, ${queue}`),
    tile("Cost", [dollars(cost), " /h"], priced.join(", ")));
}

function tile(name, [value, unit], small) {
  return el("div", { class: "tile" },
    el("h3", {}, name), el("p", { class: "value" }, value, el("small", {}, unit)), el("p", { class: "small" }, small));
}

function rollout(fleet) {
  if (fleet.next_version === null) return null;
  const all = replicasOf(fleet);
  const moved = all.filter((one) => one.version === fleet.next_version && one.state === "ready").length;
  const words = `${number(moved)} of ${number(all.length)} replicas`;
  return el("div", { class: "card rollout" }, bar(`Version ${fleet.next_version} takes the place of version ${fleet.version}`, moved, all.length, words, Infinity));
}

function nodes(fleet) {
  const rolling = fleet.next_version !== null;
  const inUse = (node) => Number(node.replicas.length > 0);
  const sorted = fleet.nodes.toSorted((one, other) => inUse(other) - inUse(one));
  return part("nodes", "Nodes", fleet.nodes.length
    ? el("ul", { class: "cards" }, ...sorted.map((node) => card(node, rolling)))
    : el("p", { class: "hint" }, "No node has joined yet: scalellm deploy join"));
}

function card(node, rolling) {
  const gpus = node.gpus > 1 ? `${node.gpus} × ${node.device_title}` : node.device_title;
  const speed = node.replicas.reduce((sum, one) => sum + one.tokens_per_s, 0);
  const free = Math.max(0, node.room - node.replicas.filter((one) => one.state !== "ended").length);
  const price = node.price_per_hour === null ? "no price" : `${dollars(Number(node.price_per_hour))} /h`;
  return el("li", { class: "card", "data-node": node.name },
    el("div", { class: "who" }, dot(worst(node)), el("h4", { class: "name" }, node.name), el("span", { class: "amount" }, price)),
    el("p", { class: "where" }, `${node.provider} · ${gpus}`, node.state === "up" ? null : ` · ${node.state}`,
      el("span", { class: "amount" }, speed ? `${whole(speed)} tokens/s` : "")),
    el("ul", { class: "slots" },
      ...node.replicas.map((one) => slot(one, rolling)),
      free ? el("li", { class: "slot free" }, `${plural(free, "more replica")} would fit`) : null));
}

function slot(one, rolling) {
  const ready = one.state === "ready";
  const facts = ready ? [one.running ? `${number(one.running)} running` : "idle"] : [one.state];
  if (ready && one.tokens_per_s) facts.push(`${whole(one.tokens_per_s)} tokens/s`);
  if (one.restarts) facts.push(plural(one.restarts, "restart"));
  const blocks = ready && one.kv_blocks;
  return el("li", { class: "slot", "data-state": one.state },
    el("div", { class: "who" },
      dot(MOOD[one.state] ?? "none"), el("span", { class: "name" }, one.name),
      rolling && one.version !== null ? el("span", { class: "tag" }, `v${one.version}`) : null,
      el("span", { class: "amount" }, facts.join(" · "))),
    blocks ? bar("KV cache", blocks.used, blocks.total, `${whole((100 * blocks.used) / blocks.total)} %`) : null,
    !ready && one.why ? el("p", { class: "why" }, one.why) : null);
}

/** What a node's dot tells: the worst of its replicas. */
function worst(node) {
  if (node.state !== "up") return "busy";
  const moods = node.replicas.map((one) => MOOD[one.state] ?? "none");
  return ["bad", "warn", "busy", "good"].find((mood) => moods.includes(mood)) ?? "none";
}

const dot = (mood) => el("i", { "data-mood": mood });

function events(fleet) {
  if (!fleet.events.length) return null;
  const key = (event) => `${event.time} ${event.text}`;
  const before = seen ?? new Set(fleet.events.map(key));
  seen = new Set(fleet.events.map(key));
  const line = (event) =>
    el("li", { "data-mood": KINDS[event.kind] ?? "none", class: before.has(key(event)) ? null : "fresh" },
      dot(KINDS[event.kind] ?? "none"), el("span", { class: "what" }, event.text),
      el("time", { datetime: new Date(event.time * 1000).toISOString(), title: new Date(event.time * 1000).toLocaleString() }, passed(Date.now() / 1000 - event.time)));
  return part("events", "Events", el("ol", { class: "events" }, ...fleet.events.map(line)));
}

function ledger(fleet) {
  if (!fleet.ledger) return null;
  const head = `${fleet.ledger.number}:${fleet.ledger.hash}`;
  const button = tool("copy", "Copy the ledger's head", async () => { if (await copy(head)) confirm(button, "copy"); });
  button.dataset.keep = "head";
  return part("ledger", "Ledger", el("div", { class: "card ledger" },
    el("p", {}, plural(fleet.ledger.number, "record"), " · ", el("code", {}, fleet.ledger.hash.slice(0, 12))),
    el("p", { class: "hint" }, "Keep this head: it shows later whether anything was changed."), button));
}

function part(id, title, ...content) {
  return el("section", { "aria-labelledby": `fleet-${id}` }, el("h3", { id: `fleet-${id}` }, title), ...content);
}

const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const whole = (value) => number(value < 10 ? value : Math.round(value));
