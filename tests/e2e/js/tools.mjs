// Asks for a call of a function and for an object, and prints both: node tools.mjs '{"client", "url", "schema"}'.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { ChatOpenAI } from "@langchain/openai";
import { jsonSchema, Output, streamText, tool } from "ai";
import OpenAI from "openai";

const { client, url, schema } = JSON.parse(process.argv[2]);
const baseURL = `${url}/v1`;
const prompt = "Look at the sea.";
const messages = [{ role: "user", content: prompt }];
const base = { model: "any", messages, max_tokens: 150, reasoning_effort: "none" };
const look = { name: "look", description: "Look at something", parameters: schema };
const tools = [{ type: "function", function: look }];

const clients = {
  async openai() {
    const sdk = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
    const tool_choice = { type: "function", function: { name: "look" } };
    const stream = sdk.chat.completions.stream({ ...base, tools, tool_choice });
    const { choices } = await stream.finalChatCompletion();
    const [call] = choices[0].message.tool_calls;
    const response_format = { type: "json_schema", json_schema: { name: "it", schema, strict: true } };
    const whole = await sdk.chat.completions.create({ ...base, response_format });
    return {
      call: { id: call.id, name: call.function.name, input: JSON.parse(call.function.arguments) },
      reason: choices[0].finish_reason,
      object: JSON.parse(whole.choices[0].message.content),
    };
  },

  async ai() {
    const provider = createOpenAICompatible({ name: "unbroken", baseURL, supportsStructuredOutputs: true });
    const providerOptions = { unbroken: { reasoningEffort: "none" } };
    const ask = { model: provider("any"), prompt, maxOutputTokens: 150, maxRetries: 0, providerOptions };
    const inputSchema = jsonSchema(schema);
    const asked = streamText({
      ...ask,
      tools: { look: tool({ description: look.description, inputSchema }) },
      toolChoice: { type: "tool", toolName: "look" },
    });
    const [call] = await asked.toolCalls;
    const written = streamText({ ...ask, output: Output.object({ schema: inputSchema }) });
    return {
      call: { id: call.toolCallId, name: call.toolName, input: call.input },
      reason: await asked.finishReason,
      object: await written.output,
    };
  },

  async langchain() {
    const modelKwargs = { reasoning_effort: "none" };
    const options = { model: "any", apiKey: "none", maxRetries: 0, maxTokens: 150, modelKwargs };
    const llm = new ChatOpenAI({ ...options, configuration: { baseURL } });
    let message;
    for await (const part of await llm.bindTools(tools, { tool_choice: "look" }).stream(prompt)) {
      message = message ? message.concat(part) : part;
    }
    const [call] = message.tool_calls;
    const structured = llm.withStructuredOutput({ title: "it", ...schema }, { method: "jsonSchema" });
    return {
      call: { id: call.id, name: call.name, input: call.args },
      reason: message.response_metadata.finish_reason,
      object: await structured.invoke(prompt),
    };
  },
};

try {
  process.stdout.write(JSON.stringify(await clients[client]()));
} catch (error) {
  process.stdout.write(JSON.stringify({ error: error.name, message: String(error.stack) }));
}
