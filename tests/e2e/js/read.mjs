// Reads streams with one client and prints what it got as JSON: node read.mjs '{"client", "url", …}'.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { ChatOpenAI } from "@langchain/openai";
import { streamText } from "ai";
import OpenAI from "openai";
import { resumingFetch } from "./unbroken-fetch.js";

const job = { streams: 1, resume: true, options: {}, ...JSON.parse(process.argv[2]) };
const baseURL = `${job.url}/v1`;
const fetch = job.resume ? resumingFetch(globalThis.fetch, job.options) : globalThis.fetch;
const messages = [{ role: "user", content: "Tell me." }];
const ask = { model: "any", messages, stream: true, stream_options: { include_usage: true } };

const clients = {
  async openai() {
    const client = new OpenAI({ baseURL, apiKey: "none", fetch, maxRetries: job.maxRetries ?? 0 });
    const stream = await client.chat.completions.create(ask);
    const chunks = [];
    for await (const chunk of stream) {
      chunks.push(chunk);
      if (chunks.length === job.tellAfter) process.stderr.write("reached\n");
    }
    return chunks;
  },

  async ai() {
    const provider = createOpenAICompatible({ name: "unbroken", baseURL, fetch });
    const model = provider("any");
    const { fullStream } = streamText({ model, prompt: "Tell me.", maxRetries: 0 });
    let [reasoning, content] = ["", ""];
    for await (const part of fullStream) {
      if (part.type === "reasoning-delta") reasoning += part.text;
      if (part.type === "text-delta") content += part.text;
      if (part.type === "error") throw part.error;
    }
    return { reasoning, content };
  },

  async langchain() {
    const configuration = { baseURL, fetch };
    const llm = new ChatOpenAI({ model: "any", apiKey: "none", maxRetries: 0, configuration });
    let content = "";
    for await (const part of await llm.stream("Tell me.")) content += part.content;
    return { content };
  },

  /** What a page does: a Request object, and the bytes of the body. */
  async fetch() {
    const headers = { "content-type": "application/json" };
    const body = JSON.stringify(ask);
    const request = new Request(`${baseURL}/chat/completions`, { method: "POST", headers, body });
    const response = await fetch(request);
    return { status: response.status, url: response.url, text: await response.text() };
  },

  /** Leaves in the middle, by its signal or by cancelling the body. */
  async leave() {
    const aborter = new AbortController();
    const headers = { "content-type": "application/json" };
    const init = { method: "POST", headers, body: JSON.stringify(ask), signal: aborter.signal };
    const response = await fetch(`${baseURL}/chat/completions`, init);
    const reader = response.body.getReader();
    await reader.read();
    let ended = "";
    const rest = (async () => {
      while (!(await reader.read()).done);
    })().catch((error) => (ended = error.name));
    process.stderr.write("reached\n");
    await new Promise((resolve) => process.stdin.once("data", resolve));
    if (job.leave === "abort") aborter.abort();
    else await reader.cancel();
    await rest;
    process.stdin.destroy();
    return { ended };
  },
};

try {
  const reads = Array.from({ length: job.streams }, () => clients[job.client]());
  process.stdout.write(JSON.stringify(await Promise.all(reads)));
} catch (error) {
  process.stdout.write(JSON.stringify({ error: error.name, message: String(error.message) }));
}
