// The page: chat over the public endpoints, and every event shown as it comes.
// A generation is followed by `Stream`, which resumes by Last-Event-ID until the end; `Answer`
// shows one. What has been asked is kept in this tab, so that a reload goes on.

import { Markdown } from "./markdown.js";

const $ = (selector, root = document) => root.querySelector(selector);
const make = (tag, attributes = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const BASE = new URL(".", location.href).href.replace(/\/$/, "");
const PATIENCE = 90_000; // ms without any answer until a stream is given up
const LARGEST_FILE = 20 * 2 ** 20;

// --- What is kept: the chat in this tab, settings for all tabs, the key for this tab only. -------
const kept = {
  read(store, name, otherwise) {
    try { return JSON.parse(store.getItem(name)) ?? otherwise; } catch { return otherwise; }
  },
  write(store, name, value) {
    try { store.setItem(name, JSON.stringify(value)); return true; } catch { return false; }
  },
};
const settings = kept.read(localStorage, "unbroken-settings", {});
let key = kept.read(sessionStorage, "unbroken-key", "");
let control = kept.read(localStorage, "unbroken-control", ""); // what `run.py` prints at its start
const given = /^#control=([\w-]+)$/.exec(location.hash)?.[1];
if (given) {
  kept.write(localStorage, "unbroken-control", (control = given));
  history.replaceState(null, "", location.pathname);
}
let turns = kept.read(sessionStorage, "unbroken-turns", []); // {question, media, session, answer}
function save() {
  if (kept.write(sessionStorage, "unbroken-turns", turns)) return;
  const light = turns.map((turn) => ({ ...turn, media: [], body: undefined })); // media fill the store
  kept.write(sessionStorage, "unbroken-turns", light);
}

// --- The API. -------------------------------------------------------------------------------------
const headers = (more = {}) => (key ? { authorization: `Bearer ${key}`, ...more } : more);

async function api(path, options = {}) {
  const answer = await fetch(BASE + path, { ...options, headers: headers(options.headers) });
  if (!answer.ok) throw await refusal(answer);
  return answer.status === 204 ? null : answer.json();
}

class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function refusal(answer) {
  let message = `The server answered ${answer.status}.`;
  try { message = (await answer.json()).error.message; } catch { /* no JSON */ }
  return new Refused(message, answer.status);
}

const lasting = (status) => status >= 400 && status < 500 && status !== 408 && status !== 429;

/** Split a body into server-sent events: yields {id, data}. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { id: "", data: "" };
      for (const line of block.split("\n")) {
        const [, field, text] = /^([^:]*): ?(.*)$/.exec(line) ?? [];
        if (field === "id" || field === "data") event[field] = text;
      }
      if (event.data) yield event;
    }
  }
}

/** One generation, followed to its end whatever breaks; calls back for all there is to show. */
class Stream {
  constructor(session, body, show) {
    Object.assign(this, { session, body, show, index: -1, gateway: "", ended: false, closed: false });
  }

  async follow() {
    let delay = 100;
    let heard = performance.now();
    for (let attempt = 0; !this.ended && !this.closed; attempt += 1) {
      const before = this.index;
      try {
        await this.connect(attempt);
      } catch (error) {
        if (error instanceof Refused && lasting(error.status)) return this.show.failed(error.message);
      }
      if (this.ended || this.closed) return;
      if (this.index > before) { heard = performance.now(); delay = 100; }
      if (performance.now() - heard > PATIENCE) return this.show.failed("The server does not come back.");
      this.show.broken();
      await sleep(delay);
      delay = Math.min(1000, delay * 1.5);
    }
  }

  async connect(attempt) {
    const begun = this.index >= 0;
    const options = { method: "POST", headers: headers({ accept: "text/event-stream" }) };
    this.abort = new AbortController();
    options.signal = this.abort.signal;
    let path = "/v1/chat/completions";
    if (begun) {
      options.headers["last-event-id"] = `${this.session}:${this.index}`;
    } else if (this.body) { // the same body again attaches: it never generates twice
      options.headers["content-type"] = "application/json";
      options.body = JSON.stringify({ ...this.body, stream: true, session_id: this.session });
    } else if (!key && attempt === 0) {
      return this.listen();
    } else {
      path = `/v1/sessions/${encodeURIComponent(this.session)}/events`;
      options.method = "GET";
    }
    const answer = await fetch(BASE + path, options);
    if (!answer.ok) throw await refusal(answer);
    this.connected(answer.headers.get("x-gateway-id") ?? "", begun);
    for await (const event of eventsOf(answer.body)) this.take(event.id, event.data);
  }

  /** Follow as any page may: with the browser's own EventSource. */
  listen() {
    const path = `/v1/sessions/${encodeURIComponent(this.session)}/events`;
    const source = (this.source = new EventSource(BASE + path));
    let lost = false;
    return new Promise((done) => {
      const end = () => { source.close(); done(); };
      this.close = () => { this.closed = true; end(); };
      source.onopen = () => { this.connected("", lost); lost = false; };
      source.onmessage = (event) => {
        this.take(event.data === "[DONE]" ? "" : event.lastEventId, event.data);
        if (this.ended) end();
      };
      source.onerror = () => {
        lost = this.index >= 0;
        if (lost) this.show.broken();
        if (source.readyState === EventSource.CLOSED) end(); // then by fetch, which tells why
      };
    });
  }

  connected(gateway, again) {
    this.gateway = gateway;
    if (again) this.show.resumed(this.index, gateway);
  }

  take(id, data) {
    if (data === "[DONE]") { this.ended = true; return this.show.done(); }
    const event = JSON.parse(data);
    const index = id ? Number(id.slice(id.lastIndexOf(":") + 1)) : null;
    if (index !== null) {
      if (index !== this.index + 1) this.show.failed(`Event ${index} came after ${this.index}.`);
      this.index = index;
    }
    this.show.event(event, index, this.gateway);
  }

  close() { this.closed = true; this.abort?.abort(); }
}

// --- One answer on the page. ----------------------------------------------------------------------
class Answer {
  constructor(turn, live) {
    this.turn = turn;
    this.root = $("#answer").content.cloneNode(true).firstElementChild;
    for (const part of ["thought", "text", "error", "strip", "ticks", "last", "told", "tools"])
      this[part] = $(`.${part}`, this.root);
    Object.assign(this, { events: 0, resumes: 0, takeovers: 0, workers: [], worker: "", gaps: [], pending: [] });
    this.say = { reasoning: "", content: "" };
    this.markdown = new Markdown(this.text);
    this.root.addEventListener("click", (click) => this.copy(click.target));
    $("#messages").append(this.root);
    for (const button of this.tools.children) // an answer of a link: what was asked is not known
      button.hidden = !turn.body && button.dataset.copy in recipes;
    if (live) this.go(); else this.rest();
  }

  rest() {
    this.markdown.set(this.turn.answer ?? "");
    this.showThought(this.turn.thought ?? "");
    this.fail(this.turn.error);
    this.tools.hidden = false;
  }

  async go() {
    this.root.classList.add("live");
    this.strip.hidden = false;
    this.last.textContent = "waiting for a worker";
    this.stream = new Stream(this.turn.session, this.turn.body, this);
    follow(this);
    this.poll = setInterval(() => this.ask(), 1000);
    await this.stream.follow();
    clearInterval(this.poll);
    if (!this.over) { this.over = true; await this.ask(); }
    const atEnd = this.atEnd();
    this.root.classList.remove("live");
    this.tools.hidden = false;
    if (atEnd) chat.scrollTop = chat.scrollHeight;
    Object.assign(this.turn, { answer: this.say.content, thought: this.say.reasoning, over: true });
    save();
    unfollow(this);
  }

  event(event, index, gateway) {
    const now = performance.now();
    if (index !== null) {
      const gap = this.at === undefined ? 0 : now - this.at;
      this.at = now;
      this.count(index, gap, gateway);
      if (gap > 700) this.ask(); // somebody else may have taken over
    }
    if (event.error) return this.fail(event.error.message);
    const [choice] = event.choices ?? [];
    this.say.reasoning += choice?.delta.reasoning_content ?? "";
    this.say.content += choice?.delta.content ?? "";
    if (choice?.finish_reason === "length") this.say.note = "The answer was cut at the token limit.";
    if (event.session?.status === "cancelled") this.say.note = "Stopped.";
    this.paint();
  }

  count(index, gap, gateway) {
    this.events += 1;
    Object.assign(this, { index, gap, gateway: gateway || this.gateway });
    if (this.events > 2) this.gaps.push(gap);
    const size = gap > 500 ? "x" : gap > 150 ? "l" : gap > 60 ? "m" : "";
    const tick = make("i", { className: size, title: `event ${index}, ${Math.round(gap)} ms` });
    tick.classList.add(this.worker ? this.shade() : "w0");
    this.pending.push(tick);
  }

  shade() { return `w${this.workers.indexOf(this.worker) % 4}`; }

  mark(text, kind) { this.pending.push(make("b", { className: kind, textContent: text })); this.paint(); }

  broken() { this.last.textContent = `#${this.index ?? "–"} · connection lost, resuming …`; }

  resumed(index, gateway) {
    this.resumes += 1;
    this.mark(`resumed after #${index}${gateway ? ` · gateway ${gateway}` : ""}`, "resume");
  }

  /** Ask who generates: the record of the session names the worker. */
  async ask() {
    const asked = this.index;
    let record;
    try { record = await api(`/v1/sessions/${encodeURIComponent(this.turn.session)}`); } catch { return; }
    if (record.status === "queued" && !this.over && this.index === asked)
      this.last.textContent = this.events > 1 ? `#${this.index} · waiting for another worker` : "queued";
    if (!record.worker || record.worker === this.worker) return;
    const before = this.worker;
    this.worker = record.worker;
    if (!this.workers.includes(this.worker)) this.workers.push(this.worker);
    if (before) { this.takeovers += 1; this.mark(`worker ${this.worker.slice(0, 6)} took over`, "takeover"); }
    this.paint();
  }

  paint() {
    if (this.painting) return;
    this.painting = true;
    requestAnimationFrame(() => { this.painting = false; this.draw(); });
  }

  draw() {
    const atEnd = this.atEnd();
    this.markdown.set(this.say.content);
    this.showThought(this.say.reasoning);
    if (this.pending.length) {
      this.ticks.append(...this.pending.splice(0));
      this.ticks.scrollTop = this.ticks.scrollHeight;
    }
    const where = [this.gateway && `gateway ${this.gateway}`, this.worker && `worker ${this.worker.slice(0, 6)}`];
    if (!this.over && this.index !== undefined)
      this.last.textContent = [`#${this.index}`, `+${Math.round(this.gap)} ms`, ...where].filter(Boolean).join(" · ");
    this.told.textContent = this.summary();
    this.ticks.ariaLabel = `Events of this answer: ${this.summary()}`;
    if (atEnd) chat.scrollTop = chat.scrollHeight;
  }

  atEnd() { return chat.scrollHeight - chat.scrollTop - chat.clientHeight < 80; }

  summary() {
    const some = (count, noun) => count && `${count} ${noun}${count === 1 ? "" : "s"}`;
    return [some(this.events, "event"), some(this.resumes, "resume"), some(this.takeovers, "takeover")]
      .filter(Boolean).join(" · ");
  }

  showThought(text) {
    this.thought.hidden = !text.trim();
    const place = $("p", this.thought);
    if (place.textContent !== text) place.textContent = text.trim();
    $("summary", this.thought).textContent = this.over || this.say.content || this.turn.over ? "Thought" : "Thinking …";
  }

  done() {
    this.over = true;
    const longest = Math.round(Math.max(0, ...this.gaps));
    this.draw();
    this.last.textContent = `whole: 0 to ${this.index}, none lost, none twice · longest gap ${longest} ms`;
    this.strip.dataset.done = "true";
    notice(this.say.note ?? "The answer is complete.");
    this.ask();
  }

  failed(message) { this.over = true; this.fail(message); }

  fail(message) {
    if (!message) return;
    this.turn.error = message;
    this.error.textContent = message;
    this.error.hidden = false;
  }

  async copy(button) {
    const what = button.dataset.copy;
    if (!what) return;
    const text = what === "code" ? $("code", button.closest(".code")).textContent
      : what === "answer" ? this.turn.answer
      : what === "link" ? linkTo(this.turn.session) : recipes[what](this.turn.body);
    try { await navigator.clipboard.writeText(text); notice("Copied."); }
    catch { prompt("Copy this:", text); }
  }
}

const linkTo = (session) => `${location.href.replace(/#.*/, "")}#session=${encodeURIComponent(session)}`;

// --- The same request elsewhere. ------------------------------------------------------------------
const recipes = {
  curl: (body) => [
    `curl -N ${BASE}/v1/chat/completions -H 'Content-Type: application/json' \\`,
    ...(key ? ["  -H \"Authorization: Bearer $API_KEY\" \\"] : []),
    `  -d '${JSON.stringify({ ...body, stream: true }).replaceAll("'", "'\\''")}'`,
  ].join("\n"),
  python: (body) => `import json
from openai import OpenAI

client = OpenAI(base_url="${BASE}/v1", api_key="${key ? "YOUR_API_KEY" : "none"}")
request = json.loads(${JSON.stringify(JSON.stringify(body))})
for chunk in client.chat.completions.create(model="any", stream=True, **request):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
`,
  javascript: (body) => `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${BASE}/v1", apiKey: "${key ? "YOUR_API_KEY" : "none"}" });
const request = ${JSON.stringify(body, null, 2)};
for await (const chunk of await client.chat.completions.create({ model: "any", stream: true, ...request }))
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
`,
};

// --- Asking. --------------------------------------------------------------------------------------
const chat = $("#chat");
const field = $("#prompt");
let media = []; // {kind, url}
let following = null;

function notice(text) {
  $("#notice").textContent = text;
  clearTimeout(notice.timer);
  notice.timer = setTimeout(() => ($("#notice").textContent = ""), 6000);
}

function follow(answer) { following = answer; buttons(); }
function unfollow(answer) { if (following === answer) following = null; buttons(); }
function buttons() {
  const hadFocus = document.activeElement === $("#send") || document.activeElement === $("#stop");
  $("#send").hidden = Boolean(following);
  $("#stop").hidden = !following;
  if (hadFocus) field.focus();
}

const parts = (turn) => [
  ...(turn.media ?? []).map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } })),
  ...(turn.question ? [{ type: "text", text: turn.question }] : []),
];

function requestFor(turn) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const earlier of turns.filter((each) => each.over && each.question !== undefined && each.answer)) {
    messages.push({ role: "user", content: earlier.media?.length ? parts(earlier) : earlier.question });
    messages.push({ role: "assistant", content: earlier.answer });
  }
  messages.push({ role: "user", content: turn.media.length ? parts(turn) : turn.question });
  const body = { messages };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"])
    if (settings[name] !== undefined && settings[name] !== "") body[name] = Number(settings[name]);
  return body;
}

function newSession() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `chatcmpl-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

function showQuestion(turn) {
  $("#welcome").hidden = true;
  if (turn.question === undefined) return;
  const shown = turn.media.map(({ kind, url }) =>
    kind === "image" ? make("img", { src: url, alt: "attached image" }) : make("video", { src: url, controls: true, muted: true }));
  const item = make("li", { className: "question" });
  if (shown.length) item.append(make("div", { className: "media" }, ...shown));
  item.append(make("p", { textContent: turn.question }));
  $("#messages").append(item);
}

function ask(question) {
  if (following || (!question && !media.length)) return;
  const turn = { question, media, session: newSession() };
  turn.body = requestFor(turn);
  media = [];
  showMedia();
  field.value = "";
  turns.push(turn);
  save();
  history.replaceState(null, "", linkTo(turn.session));
  showQuestion(turn);
  new Answer(turn, true);
  chat.scrollTop = chat.scrollHeight;
}

async function stop() {
  const session = following?.turn.session;
  for (let attempt = 0; session && following?.turn.session === session && attempt < 20; attempt += 1) {
    try { await api(`/v1/cancel/${encodeURIComponent(session)}`, { method: "POST" }); return; }
    catch (error) { if (error instanceof Refused && lasting(error.status)) return notice(error.message); }
    await sleep(500); // the gateway is being restarted, or has not heard of the session yet
  }
}

// --- Media. ---------------------------------------------------------------------------------------
async function attach(files) {
  for (const file of files) {
    const kind = file.type.split("/")[0];
    if (kind !== "image" && kind !== "video") { notice(`${file.name}: neither image nor video.`); continue; }
    if (file.size > LARGEST_FILE) { notice(`${file.name}: larger than 20 MB.`); continue; }
    const url = await new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.readAsDataURL(file);
    });
    media.push({ kind, url });
  }
  showMedia();
}

function showMedia() {
  $("#attached").replaceChildren(...media.map((item, place) => make("li", {},
    item.kind === "image" ? make("img", { src: item.url, alt: `image ${place + 1}` }) : make("video", { src: item.url, muted: true }),
    make("button", {
      type: "button", textContent: "×", ariaLabel: `Remove ${item.kind} ${place + 1}`,
      onclick: () => { media.splice(place, 1); showMedia(); field.focus(); },
    }))));
}

function plainImage(colour) {
  const canvas = make("canvas", { width: 160, height: 120 });
  const brush = canvas.getContext("2d");
  brush.fillStyle = colour;
  brush.fillRect(0, 0, 160, 120);
  return canvas.toDataURL("image/png");
}

// --- Status. --------------------------------------------------------------------------------------
async function refresh() {
  let state;
  const asked = control ? { headers: { "x-unbroken-control": control } } : {};
  try { state = await api("/v1/status", asked); } catch (error) {
    $("#dot").className = "dot away";
    $("#model").textContent = error.status === 401 ? "API key needed" : "no connection";
    return null;
  }
  const ready = state.workers.filter((worker) => worker.state === "ready");
  $("#dot").className = `dot ${ready.length ? "ready" : "waits"}`;
  $("#model").textContent = ready[0]?.model ?? state.workers[0]?.reason ?? "no worker";
  $("#controls").hidden = !state.controls;
  if ($("#status").open) showStatus(state);
  return state;
}

function showStatus(state) {
  const facts = { Gateway: state.gateway, Waiting: state.queue_depth, Running: state.sessions_running };
  $("#facts").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
  $("#workers").replaceChildren(...state.workers.map((worker) => make("tr", {},
    ...[worker.id.slice(0, 6), worker.state, `${worker.running} of ${worker.slots}`,
      worker.tokens_per_second.toFixed(worker.tokens_per_second < 10 ? 1 : 0),
      `${(100 * worker.cache_usage).toFixed(1)} %`, worker.model || worker.reason]
      .map((text) => make("td", { textContent: text })))));
}

async function kill(part) {
  let worker = following?.worker ?? "";
  if (part === "worker" && !worker) {
    const state = await refresh();
    worker = state?.workers.find((each) => each.state === "ready")?.id ?? "";
  }
  try {
    await api("/demo/kill", {
      method: "POST",
      headers: { "content-type": "application/json", "x-unbroken-control": control },
      body: JSON.stringify({ part, worker }),
    });
    notice(part === "redis" ? "Redis restarts." : `The ${part} is dead; run.py starts another.`);
  } catch (error) {
    notice(error instanceof Refused ? error.message : "The gateway died with the answer, as asked.");
  }
}

// --- Wiring. --------------------------------------------------------------------------------------
$("#form").addEventListener("submit", (event) => { event.preventDefault(); ask(field.value.trim()); });
$("#stop").addEventListener("click", stop);
$("#attach").addEventListener("click", () => $("#file").click());
$("#file").addEventListener("change", (event) => { attach([...event.target.files]); event.target.value = ""; });
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("#form").requestSubmit(); }
});
addEventListener("keydown", (event) => { if (event.key === "Escape" && following && !$("dialog[open]")) stop(); });
addEventListener("paste", (event) => { if (event.clipboardData.files.length) { event.preventDefault(); attach([...event.clipboardData.files]); } });
addEventListener("dragover", (event) => { event.preventDefault(); $("#form").classList.add("over"); });
addEventListener("dragleave", () => $("#form").classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); $("#form").classList.remove("over"); attach([...event.dataTransfer.files]); });
for (const button of document.querySelectorAll("[data-kill]"))
  button.addEventListener("click", () => kill(button.dataset.kill));

$("#new").addEventListener("click", () => {
  following?.stream.close();
  turns = [];
  save();
  location.replace(location.pathname);
});
const form = $("#settings form");
$("#show-settings").addEventListener("click", () => {
  for (const input of form.querySelectorAll("[name]")) input.value = input.name === "key" ? key : settings[input.name] ?? "";
  $("#settings").showModal();
});
$("#settings").addEventListener("close", () => {
  for (const input of form.querySelectorAll("[name]")) {
    if (input.name === "key") key = input.value.trim();
    else settings[input.name] = input.value.trim();
  }
  kept.write(localStorage, "unbroken-settings", settings);
  kept.write(sessionStorage, "unbroken-key", key);
  refresh();
});
$("#show-status").addEventListener("click", async () => { $("#status").showModal(); await refresh(); });
setInterval(() => { if (!document.hidden) refresh(); }, 1500);

for (const [text, colour] of [["Count from 1 to 100.", ""], ["What colour is this image?", "#7b2fa8"], ["Who are you?", ""]]) {
  const idea = make("button", { type: "button", onclick: () => { if (colour) media = [{ kind: "image", url: plainImage(colour) }]; ask(text); } });
  if (colour) { const swatch = make("i", { ariaHidden: "true" }); swatch.style.background = colour; idea.append(swatch); }
  idea.append(text);
  $("#ideas").append(idea);
}

/** Show what this tab has asked, or the session of a link; both go on where they are. */
function restore() {
  const linked = decodeURIComponent(/^#session=(.+)$/.exec(location.hash)?.[1] ?? "");
  if (linked && !turns.some((turn) => turn.session === linked)) turns = [{ media: [], session: linked }];
  for (const turn of turns) { showQuestion(turn); new Answer(turn, !turn.over); }
  chat.scrollTop = chat.scrollHeight;
}
addEventListener("hashchange", () => location.reload());
refresh();
restore();
