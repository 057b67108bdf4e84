// The request that the page sends, as a line of curl and as Python; and the dialog that shows them.

import { key, root } from "./api.js";
import { copy, find } from "./dom.js";

/** A word in single quotes for a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function curl(body, withKey) {
  const lines = [`curl -N ${quoted(new URL("v1/chat/completions", root).href)}`];
  if (withKey) lines.push(`  -H "Authorization: Bearer $SCALELLM_API_KEY"`);
  lines.push(`  -H 'Content-Type: application/json'`, `  -d ${quoted(written(body, JSON_WORDS, "  "))}`);
  return lines.join(" \\\n");
}

export function python(body, withKey) {
  const secret = withKey ? 'os.environ["SCALELLM_API_KEY"]' : '"none"';
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", root).href)}, api_key=${secret})`,
    "answer = client.chat.completions.create(",
    ...Object.entries(body).map(([name, value]) => `    ${name}=${written(value, PYTHON_WORDS, "    ", 1)},`),
    ")",
    "for chunk in answer:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
    "",
  ].join("\n");
}

const JSON_WORDS = { null: "null", true: "true", false: "false" };
const PYTHON_WORDS = { null: "None", true: "True", false: "False" };
const SHORT = 80;

/** A JSON value in the words of a language; what is short stands in one line. */
function written(value, words, indent, depth = 0) {
  if (typeof value === "string" || typeof value === "number") return JSON.stringify(value);
  if (value === null || typeof value === "boolean") return words[value];
  const items = Array.isArray(value)
    ? value.map((one) => written(one, words, indent, depth + 1))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${written(one, words, indent, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  if (depth && items.join(", ").length < SHORT) return open + items.join(", ") + close;
  const pad = indent.repeat(depth);
  return `${open}\n${items.map((item) => pad + indent + item).join(",\n")}\n${pad}${close}`;
}

const WRITERS = { curl, python };
let shown = null;
let language = "curl";

/** Show the request with this body. */
export function showCode(body) {
  shown = body;
  write();
  find("code-dialog").showModal();
}

function write() {
  const withKey = Boolean(key.get());
  find("code").textContent = WRITERS[language](shown, withKey);
  find("code-hint").textContent = withKey ? "The key comes from the environment: SCALELLM_API_KEY." : "";
  for (const button of find("code-dialog").querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
}

export function setUpCode() {
  for (const button of find("code-dialog").querySelectorAll("[data-language]")) {
    button.addEventListener("click", () => {
      language = button.dataset.language;
      write();
    });
  }
  find("code-copy").addEventListener("click", async () => {
    const done = await copy(find("code").textContent);
    find("code-copy").textContent = done ? "Copied" : "Select it by hand";
    setTimeout(() => (find("code-copy").textContent = "Copy"), 1500);
  });
}
