// The openai client from npm: node openai.mjs '{"url", "chat", "embed", "tools", "keyed", "key", "empty"}'
// url: a gateway; chat, embed, tools: models; keyed: a gateway that takes one request a minute with key;
// empty: one without a mesh.
import OpenAI from "openai";

const { url, chat, embed, tools, keyed, key, empty } = JSON.parse(process.argv[2]);
const to = (base, apiKey = "none") => new OpenAI({ baseURL: `${base}/v1`, apiKey, maxRetries: 0 });
const client = to(url);
const messages = [{ role: "user", content: "Tell me a story about a fox." }];
const options = { model: chat, messages, max_tokens: 12, temperature: 0 };
const seen = {};

seen.chat = (await client.chat.completions.create(options)).choices[0].message.content;

seen.stream = "";
for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
  seen.stream += chunk.choices[0]?.delta?.content ?? "";
}

const weather = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tool = { type: "function", function: { name: "weather", parameters: weather } };
const called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>';
const calling = await client.chat.completions.create({
  model: tools, messages: [...messages, { role: "assistant", content: called }], tools: [tool], max_tokens: 1,
  // Continue the last message and end it: token 2 ends a message of the demo model.
  add_generation_prompt: false, continue_final_message: true, logit_bias: [[2, 100]],
});
seen.call = calling.choices[0].message.tool_calls[0].function;

const schema = {
  type: "object", properties: { colour: { enum: ["red"] } }, required: ["colour"], additionalProperties: false,
};
const form = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
const answer = await client.chat.completions.create({ ...options, response_format: form, max_tokens: 200 });
seen.schema = JSON.parse(answer.choices[0].message.content);

seen.vectors = (await client.embeddings.create({ model: embed, input: ["a", "b"] })).data.length;
seen.responses = (await client.responses.create({ model: chat, input: "Hello", max_output_tokens: 8 })).output_text;
seen.models = (await client.models.list()).data.map((model) => model.id).sort();

const refusal = async (one, changes = {}) => {
  try {
    await one.chat.completions.create({ ...options, ...changes });
  } catch (error) {
    return [error.constructor.name, error.status, error.code];
  }
};
seen.missing = await refusal(client, { model: "no-such-model" });
seen.long = await refusal(client, { messages: [{ role: "user", content: "Hello there. ".repeat(2000) }] });
seen.stranger = await refusal(to(keyed, "qm-wrong"));
seen.limited = [await refusal(to(keyed, key)), await refusal(to(keyed, key))];
seen.unavailable = await refusal(to(empty));

const busy = async () => {
  const metrics = await (await fetch(`${url}/metrics`)).text();
  return Number(metrics.match(new RegExp(`^qmesh_model_busy\\{model="${chat}"\\} (\\S+)`, "m"))[1]);
};
const endless = await client.completions.create({
  model: chat, prompt: "Once", max_tokens: 16000, stream: true, ignore_eos: true,
});
for await (const _ of endless) {
  seen.busy = await busy();
  break; // leaving the loop closes the connection
}
for (const left = Date.now() + 2000; (await busy()) && Date.now() < left; );
seen.left = await busy();

console.log(JSON.stringify(seen));
