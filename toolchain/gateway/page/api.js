// How the page asks the gateway: the API key, and every failure as a title, an advice and the server's own words.

const KEY = "scalellm-api-key";

/** The reader's API key: in this tab only, gone with it. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The gateway's address, wherever a proxy has put it. */
export const root = new URL("./", document.baseURI);

export class Failure extends Error {
  /** `status` 0: no answer at all; `broken`: the answer had begun. */
  constructor({ status = 0, code = "", detail = "", retryAfter = null, broken = false }) {
    super(detail);
    const [title, advice] = explain(status, code, broken);
    Object.assign(this, { status, code, title, advice, detail, retryAfter });
  }
}

/** Asks, with the key where there is one. Throws Failure, or AbortError when `signal` says so. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  const init = { method: body ? "POST" : "GET", headers, signal, cache: "no-store", credentials: "same-origin" };
  if (body) init.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(new URL(path, root), init);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure({ detail: error.message });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy in between may answer in its own way.
  }
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  return new Failure({
    status: response.status,
    code: error.code ?? "",
    detail: error.message ?? response.statusText,
    retryAfter: Number.isFinite(seconds) ? seconds : null,
  });
}

const BY_CODE = {
  context_length_exceeded: [
    "Too long for this engine",
    "The conversation and the answer must fit into its context. Start a new chat, or lower max tokens.",
  ],
  model_not_found: ["No such model here", "Choose another model at the top."],
};

const BY_STATUS = {
  0: ["The gateway does not answer", "It may have been stopped, or the network is down. Your message is kept: try again."],
  400: ["The request was refused", "Change what is named below, then try again."],
  401: ["An API key is needed", "This endpoint answers to those with a key only."],
  403: ["Not from here", "Open this page at the gateway's own address."],
  413: ["The request is too large", "Send a shorter message, or start a new chat."],
  429: ["The endpoint is full just now", "Its places and its queue are taken, or your key's limit is reached."],
  502: ["The engine failed at this request", "Try again; if it fails again, the gateway's log has the reason."],
  503: ["The engine is not there", "It is restarting or was stopped. The endpoint's status shows when it is back."],
  504: ["It took too long", "The gateway's time limit for a request was reached. Lower max tokens, or try again."],
};

function explain(status, code, broken) {
  if (broken) return ["The answer was cut off", "What came is above. Try again for a whole answer."];
  return BY_CODE[code] ?? BY_STATUS[status] ?? [`The gateway said ${status}`, "The gateway's log has the details."];
}
