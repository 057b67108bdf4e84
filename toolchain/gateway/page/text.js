// An answer's text as nodes: code blocks, `code` and **bold**; everything else, HTML above all, stays the text it is.

import { el } from "./dom.js";

const FENCE = /^\s{0,3}```+\s*([\w+#.-]*)\s*$/;
const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*)/;

/** Text -> nodes. A code block that is not closed yet reaches to the end: it is still being written. */
export function rendered(text) {
  const nodes = [];
  let plain = [];
  let code = null;
  const flush = () => {
    const joined = plain.join("\n").replace(/^\n+|\n+$/g, "");
    if (joined) nodes.push(el("p", {}, ...inline(joined)));
    plain = [];
  };
  for (const line of text.split("\n")) {
    const fence = FENCE.exec(line);
    if (code) {
      if (fence && !fence[1]) {
        nodes.push(block(code));
        code = null;
      } else code.lines.push(line);
    } else if (fence) {
      flush();
      code = { language: fence[1], lines: [] };
    } else plain.push(line);
  }
  if (code) nodes.push(block(code));
  flush();
  return nodes;
}

function block({ language, lines }) {
  const label = language ? `Code, ${language}` : "Code";
  return el("pre", { tabindex: "0", "aria-label": label, "data-language": language }, el("code", {}, lines.join("\n")));
}

function inline(text) {
  return text.split(INLINE).map((part) => {
    if (part.length > 2 && part.startsWith("`") && part.endsWith("`")) return el("code", {}, part.slice(1, -1));
    if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) return el("strong", {}, part.slice(2, -2));
    return part;
  });
}
