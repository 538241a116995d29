// Reads one Response with openai-node, cut at given events, and prints the events as JSON:
// node responses.mjs '{"urls", "ask", "drops"}'. Each cut is followed by a retrieval from the next URL.

import OpenAI from "openai";

const { urls, ask, drops, helper } = JSON.parse(process.argv[2]);
const clients = urls.map((url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 4 }));

/** Read until an event at which to drop the connection; returns whether the stream has ended. */
async function read(stream, events) {
  for await (const event of stream) {
    events.push(event);
    if (event.sequence_number === drops[0]) {
      drops.shift();
      stream.controller.abort();
      return false;
    }
  }
  return true;
}

const events = [];
let ended = await read(await clients[0].responses.create({ ...ask, stream: true }), events);
const id = events[0].response.id;
for (let next = 1; !ended; next++) {
  const starting_after = events.at(-1).sequence_number;
  const client = clients[next % clients.length];
  ended = await read(await client.responses.retrieve(id, { stream: true, starting_after }), events);
}
const result = { events };
if (helper !== undefined) {
  const stream = clients[0].responses.stream({ response_id: id, starting_after: helper });
  result.numbers = [];
  stream.on("event", (event) => result.numbers.push(event.sequence_number));
  result.final = await stream.finalResponse();
}
result.retrieved = await clients.at(-1).responses.retrieve(id);
console.log(JSON.stringify(result));
