// The openai client from npm against a gateway: node openai.mjs URL CHAT_MODEL EMBEDDING_MODEL
import OpenAI from "openai";

const [url, model, embed] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Tell me a story about a fox." }];
const options = { model, messages, max_tokens: 12, temperature: 0 };
const seen = {};

seen.chat = (await client.chat.completions.create(options)).choices[0].message.content;

seen.stream = "";
for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
  seen.stream += chunk.choices[0]?.delta?.content ?? "";
}

seen.vectors = (await client.embeddings.create({ model: embed, input: ["a", "b"] })).data.length;
seen.responses = (await client.responses.create({ model, input: "Hello", max_output_tokens: 8 })).output_text;

try {
  await client.chat.completions.create({ ...options, model: "no-such-model" });
} catch (error) {
  seen.missing = [error.status, error.code];
}

const endless = await client.completions.create({ model, prompt: "Once", max_tokens: 2000, stream: true });
for await (const _ of endless) {
  break; // leaving the loop closes the connection
}
seen.cancelled = endless.controller.signal.aborted;

console.log(JSON.stringify(seen));
