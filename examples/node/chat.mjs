// Chat with an artifact: node chat.mjs ARTIFACT [--dense] [--price P] [--max-new-tokens N]
import readline from "node:readline";
import { parseArgs } from "node:util";
import { load } from "./artifact.mjs";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    dense: { type: "boolean", default: false },
    price: { type: "string" },
    "max-new-tokens": { type: "string", default: "256" },
  },
});
if (positionals.length !== 1) {
  console.error("Usage: node chat.mjs ARTIFACT [--dense] [--price P] [--max-new-tokens N]");
  process.exit(2);
}
const artifact = await load(positionals[0]);
const messages = [];
const lines = readline.createInterface({ input: process.stdin, output: process.stdout, prompt: "> " });
lines.prompt();
for await (const line of lines) {
  messages.push({ role: "user", content: line });
  // Every turn reads the whole conversation densely, so that the mask is of all of it.
  const prompt = artifact.chat(messages);
  const options = { price: values.price && Number(values.price), maxNewTokens: Number(values["max-new-tokens"]) };
  const tokens = artifact.generate(prompt, { dense: values.dense, ...options });
  let answer = "";
  for await (const piece of artifact.text(tokens)) {
    process.stdout.write(piece);
    answer += piece;
  }
  messages.push({ role: "assistant", content: answer });
  process.stdout.write("\n");
  lines.prompt();
}
process.stdout.write("\n");
