/**
 * A `fetch` under which chat streams survive lost connections: for openai-node, the Vercel AI SDK,
 * LangChain and browsers. One file without dependencies; Node 18 or newer, or any current browser.
 */

const RETRYABLE = new Set([408, 425, 429, 500, 502, 503, 504]);
const MISSING = 404; // what a stream goes on from: a server that lost its data may yet get it back
const STANDING_MS = 1000; // a resumed stream that stood so long was no failed attempt
const MAX_RETRY_AFTER_MS = 120_000;
const MAX_UNANSWERED = 64;

/**
 * Return a `fetch` that goes on with a stream of `POST …/chat/completions` where it broke.
 *
 * @param {typeof globalThis.fetch} [fetch] what sends the requests
 * @param {import("./unbroken-fetch.js").ResumingFetchOptions} [options]
 * @returns {typeof globalThis.fetch}
 */
export function resumingFetch(fetch = globalThis.fetch, options = {}) {
  const policy = { maxRetries: 8, backoffMs: 250, maxBackoffMs: 8000, fallbacks: [], ...options };
  const unanswered = new Map(); // keys of requests without an answer, for the SDK's own retries
  let turn = 0;

  async function resuming(input, init = {}) {
    const isRequest = typeof input === "object" && "method" in input;
    const method = (init.method ?? (isRequest ? input.method : "GET")).toUpperCase();
    const url = new URL(isRequest ? input.url : input, globalThis.location?.href);
    if (method !== "POST" || !url.pathname.endsWith("/chat/completions")) return fetch(input, init);
    const call = await Call.from(isRequest ? input : null, init, url);
    call.chooseKey(unanswered);
    try {
      const response = await first(call);
      if (RETRYABLE.has(response.status)) call.rememberKey(unanswered);
      if (isStream(response)) return wrap(call, response);
      call.end();
      return response;
    } catch (error) {
      call.rememberKey(unanswered);
      call.end();
      throw error;
    }
  }

  const send = (call) => fetch(...call.attempt([null, ...policy.fallbacks], turn));

  async function first(call) {
    for (;;) {
      try {
        return await send(call);
      } catch (error) {
        call.failed(error);
      }
      await pause(call);
    }
  }

  async function resume(call, askedMs = 0) {
    for (;;) {
      await pause(call, askedMs);
      let response;
      try {
        response = await send(call);
      } catch (error) {
        call.failed(error);
        continue;
      }
      if (isStream(response)) return call.opened(response.body.getReader());
      await response.body?.cancel().catch(() => {});
      const status = response.status;
      if (!RETRYABLE.has(status) && status !== MISSING) call.tries = policy.maxRetries; // it gets no better
      const asked = response.headers.get("retry-after") ?? "";
      askedMs = /^\d+$/.test(asked) ? Math.min(asked * 1000, MAX_RETRY_AFTER_MS) : 0;
    }
  }

  async function pause(call, askedMs = 0) {
    if (call.signal.aborted) throw call.signal.reason;
    if (call.tries >= policy.maxRetries) throw call.cause;
    const longest = Math.min(policy.maxBackoffMs, policy.backoffMs * 2 ** call.tries);
    call.tries += 1;
    turn += 1;
    await sleep(Math.max(askedMs, longest * (0.5 + Math.random() / 2)), call.signal);
  }

  function wrap(call, response) {
    let reader = call.opened(response.body.getReader());
    async function pull(controller) {
      for (;;) {
        try {
          const { value, done } = await reader.read();
          if (done && call.done) break;
          if (done) throw new TypeError("The stream ended before [DONE].");
          const out = call.feed(value);
          if (out) return controller.enqueue(call.encoder.encode(out));
        } catch (error) {
          if (call.done) break;
          call.failed(error);
          reader = await resume(call);
        }
      }
      call.end();
      controller.close();
    }
    const body = new ReadableStream({
      pull: (controller) => pull(controller).catch((error) => (call.end(), Promise.reject(error))),
      cancel: (reason) => call.abort(reason),
    });
    const { status, statusText, headers } = response;
    const whole = new Response(body, { status, statusText, headers });
    return Object.defineProperty(whole, "url", { value: response.url });
  }

  return resuming;
}

/** One chat request over all its attempts: what to send, and what to pass on. */
class Call {
  done = false;
  tries = 0; // in a row, since something came or stood
  cause = undefined; // the first error since then
  #openedAt = Infinity; // when the stream that is read was accepted, ms
  encoder = new TextEncoder();
  #decoder = new TextDecoder();
  #held = "";
  #lastId = "";
  #aborter = new AbortController();

  static async from(request, init, url) {
    const call = new Call();
    const body = init.body ?? (request ? await request.clone().arrayBuffer() : undefined);
    const source = init.body ? new Response(body) : null; // reads strings, streams, blobs, buffers
    call.body = source ? await source.arrayBuffer() : body;
    const kept = request ? pick(request, ["credentials", "mode", "cache", "redirect"]) : {};
    call.init = { ...kept, ...init, method: "POST" };
    call.headers = new Headers(init.headers ?? request?.headers);
    call.url = url;
    call.outer = init.signal ?? request?.signal;
    if (call.outer?.aborted) call.abort(call.outer.reason);
    call.outer?.addEventListener("abort", call.#onAbort);
    return call;
  }

  #onAbort = () => this.abort(this.outer.reason);

  get signal() {
    return this.#aborter.signal;
  }

  abort(reason) {
    this.#aborter.abort(reason);
    this.end();
  }

  end() {
    this.outer?.removeEventListener("abort", this.#onAbort);
  }

  get #identity() {
    const text = new TextDecoder().decode(this.body);
    return `${this.url} ${this.headers.get("authorization")} ${text}`;
  }

  /** Give the request an `Idempotency-Key`: a retry of the SDK's has that of the first attempt. */
  chooseKey(unanswered) {
    if (this.headers.has("idempotency-key")) return;
    const isRetry = (this.headers.get("x-stainless-retry-count") ?? "0") !== "0";
    const key = isRetry ? unanswered.get(this.#identity)?.pop() : undefined;
    this.headers.set("idempotency-key", key ?? randomKey());
  }

  rememberKey(unanswered) {
    if (unanswered.size >= MAX_UNANSWERED) unanswered.clear();
    const keys = unanswered.get(this.#identity) ?? [];
    unanswered.set(this.#identity, [...keys, this.headers.get("idempotency-key")]);
  }

  /** Return the next attempt's arguments: the original until an event has come, then a resume. */
  attempt(origins, turn) {
    const origin = origins[turn % origins.length];
    const url = origin ? new URL(this.url.pathname + this.url.search, origin) : this.url;
    const headers = new Headers(this.headers);
    if (this.#lastId) headers.set("last-event-id", this.#lastId);
    const body = this.#lastId ? undefined : this.body;
    return [String(url), { ...this.init, headers, body, signal: this.signal }];
  }

  /**
   * Take bytes; return the text up to the last event with an id, or up to `[DONE]`. Half an event,
   * and events without an id, come again after a resume: they are held back.
   */
  feed(bytes) {
    this.#held += this.#decoder.decode(bytes, { stream: true });
    let safe = 0;
    let start = 0;
    for (const end of this.#held.matchAll(/\r?\n\r?\n/g)) {
      const event = this.#held.slice(start, end.index);
      start = end.index + end[0].length;
      const id = /^id: ?(.+)$/m.exec(event);
      if (id) this.#lastId = id[1].trimEnd();
      else if (/^data: ?\[DONE\]/m.test(event)) this.done = true;
      else continue;
      safe = start;
    }
    const out = this.#held.slice(0, safe);
    this.#held = this.#held.slice(safe);
    if (out) [this.tries, this.cause] = [0, undefined];
    return out;
  }

  /** Note that a stream has begun; returns its reader. */
  opened(reader) {
    this.#openedAt = performance.now();
    return reader;
  }

  /** Forget what will come again; an abort is no failure, and is thrown on. */
  failed(error) {
    if (this.signal.aborted) throw error;
    if (performance.now() - this.#openedAt >= STANDING_MS) [this.tries, this.cause] = [0, undefined];
    this.#openedAt = Infinity;
    this.#held = "";
    this.#decoder = new TextDecoder();
    this.cause ??= error;
  }
}

function isStream(response) {
  const kind = response.headers.get("content-type") ?? "";
  const named = response.headers.has("x-session-id");
  return response.status === 200 && kind.startsWith("text/event-stream") && named && response.body;
}

function pick(object, names) {
  return Object.fromEntries(names.map((name) => [name, object[name]]));
}

function randomKey() {
  const bytes = globalThis.crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => (clearTimeout(timer), reject(signal.reason));
    const timer = setTimeout(() => (signal.removeEventListener("abort", stop), resolve()), ms);
    signal.addEventListener("abort", stop, { once: true });
  });
}
