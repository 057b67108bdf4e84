// A streamed answer: server-sent events in, pieces of text out, and a stopwatch that measures what this browser saw.

import { Failure } from "./api.js";

/**
 * The JSON objects of `data:` lines, until `[DONE]`. Several may come in one read of the network; `onRead` is called
 * before each read's first. Throws Failure for an error that comes in the stream.
 */
export async function* events(response, onRead) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      onRead();
      const lines = (held + value).split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const text = line.slice(5).trim();
        if (text === "[DONE]") return;
        const event = JSON.parse(text);
        if (event.error) throw new Failure({ broken: true, code: event.error.code, detail: event.error.message });
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Failure({ broken: true, detail: "the connection was closed before the answer's end" });
}

/** Times of one answer, in milliseconds. Begins when it is made: just before the request is sent. */
export class Stopwatch {
  constructor(now = () => performance.now()) {
    this.now = now;
    this.begun = this.read = now();
    this.first = this.last = null;
    this.arrivals = this.pieces = this.early = 0;
  }

  /** Something has come from the network. */
  arrive() {
    this.read = this.now();
  }

  /** A piece of text was in it. */
  piece() {
    if (this.last !== this.read) this.arrivals += 1;
    this.last = this.read;
    this.first ??= this.last;
    this.pieces += 1;
    if (this.last === this.first) this.early += 1;
  }

  get elapsed() {
    return this.now() - this.begun;
  }

  /**
   * ttft: until the first text. itl: from the first read with text to the last, over the tokens that came after the
   * first. rate: its inverse, tokens per second. Both are null where too little came apart to be measured, and of an
   * answer that was stopped: how many tokens there were only the server knows (`usage`).
   */
  reading(usage) {
    const ttft = this.first === null ? null : this.first - this.begun;
    const tokens = usage?.completion_tokens ?? null;
    const later = (tokens ?? 0) - this.early;
    const itl = this.arrivals > 2 && later > 0 ? (this.last - this.first) / later : null;
    return { ttft, itl, rate: itl && 1000 / itl, tokens, prompt: usage?.prompt_tokens ?? null, pieces: this.pieces };
  }
}
