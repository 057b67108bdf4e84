// A small line chart: one value a step, null where nothing was measured. Drawn by hand in SVG, from zero upwards.

import { svg } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 30;
const TOP = 3;

/** Values, the oldest first -> an SVG image with a label for those who cannot see it. */
export function spark(values, label) {
  const most = Math.max(...values.map((value) => value ?? 0), 0);
  const x = (index) => ((index / Math.max(1, values.length - 1)) * WIDTH).toFixed(1);
  const y = (value) => (HEIGHT - 1 - (most ? (value / most) * (HEIGHT - 1 - TOP) : 0)).toFixed(1);
  const parts = [svg("path", { d: `M0 ${HEIGHT - 1}H${WIDTH}`, class: "base" })];
  for (const run of runs(values)) {
    const points = run.map((index) => `${x(index)} ${y(values[index])}`);
    const alone = points.length === 1;
    if (!alone) {
      const [first, last] = [x(run[0]), x(run.at(-1))];
      parts.push(svg("path", { d: `M${first} ${HEIGHT - 1}L${points.join("L")}L${last} ${HEIGHT - 1}Z`, class: "area" }));
    }
    parts.push(svg("path", { d: `M${points.join("L")}${alone ? "h.01" : ""}`, class: alone ? "line dot" : "line" }));
  }
  const box = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "spark" };
  return svg("svg", { ...box, role: "img", "aria-label": label }, ...parts);
}

/** The indices of values that follow each other without a gap. */
function runs(values) {
  const found = [];
  values.forEach((value, index) => {
    if (value === null) return;
    if (found.length && found.at(-1).at(-1) === index - 1) found.at(-1).push(index);
    else found.push([index]);
  });
  return found;
}
