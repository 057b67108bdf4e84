// Building blocks of the page: elements, icons, numbers as people read them. Text is always text, never HTML.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  up: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  plus: "M12 5v14M5 12h14",
  key: "M8 11a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM11 12l8-8M15.5 7.5l3 3",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  code: "M9 8l-4 4 4 4M15 8l4 4-4 4",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4",
};

/** An element with attributes, listeners (`onclick`) and children; null and false are left out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== false));
  return node;
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A line icon; decoration only, so whatever holds it needs a label. */
export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** A small button that is an icon. */
export function tool(name, label, onclick) {
  return el("button", { type: "button", class: "tool", "aria-label": label, title: label, onclick }, icon(name));
}

export const find = (id) => document.getElementById(id);

const WHOLE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const TENTH = new Intl.NumberFormat("en-US", { maximumFractionDigits: 1 });
const HUNDREDTH = new Intl.NumberFormat("en-US", { maximumFractionDigits: 2 });

/** 0.42, 4.2, 42, 4,200 */
export function number(value) {
  const size = Math.abs(value);
  return (size >= 100 || value === 0 ? WHOLE : size >= 1 ? TENTH : HUNDREDTH).format(value);
}

/** Milliseconds -> ["118", "ms"] or ["1.18", "s"]; a dash for nothing. */
export function duration(ms) {
  if (ms === null || ms === undefined) return ["–", ""];
  return ms < 1000 ? [number(ms), "ms"] : [HUNDREDTH.format(ms / 1000), "s"];
}

/** Seconds -> "3 h 12 min" */
export function uptime(seconds) {
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  const days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

/** Copies, also where a page may not use the clipboard (plain HTTP of another machine). Gives whether it worked. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { class: "unseen" });
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Shows for a moment on a button that it has done its work. */
export function confirm(button, name) {
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(icon(name)), 1500);
}

const DOLLARS = new Intl.NumberFormat("en-US", { style: "currency", currency: "USD" });
const CENTS = new Intl.NumberFormat("en-US", { style: "currency", currency: "USD", maximumSignificantDigits: 2 });

/** $12.50, $0.44, $0.0042 */
export function dollars(value) {
  return (value && value < 0.1 ? CENTS : DOLLARS).format(value);
}

/** Seconds ago -> "now", "12 s", "3 min", "2 h", "4 d" */
export function passed(seconds) {
  if (seconds < 2) return "now";
  const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([one]) => seconds >= one);
  return `${Math.floor(seconds / size)} ${unit}`;
}

/** A labelled bar; `part` of `whole`, which warns from the share `high` on. */
export function bar(name, part, whole, words, high = 0.9) {
  const share = whole ? Math.min(1, part / whole) : 0;
  const fill = el("i", { class: share > high ? "high" : "" });
  fill.style.width = `${(100 * share).toFixed(1)}%`;
  return el("div", { class: "meter" },
    el("span", {}, name), el("span", { class: "amount" }, words),
    el("div", { class: "track", role: "meter", "aria-label": name, "aria-valuemin": "0", "aria-valuemax": String(whole), "aria-valuenow": String(part), "aria-valuetext": words }, fill));
}
