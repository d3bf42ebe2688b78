// An artifact in ONNX Runtime: prefill reads a prompt, decode reads of the weights what a mask or a price says.
// What is fed and what comes back is described in docs/artifact-format.md.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import ort from "onnxruntime-node";

const NO_NEURON = new ort.Tensor("int32", Int32Array.of(-1), [1]);

export async function load(folder) {
  const read = async (name) => readFile(join(folder, name), "utf8");
  const [manifest, tokenizer, config] = await Promise.all(
    ["manifest.json", "tokenizer.json", "tokenizer_config.json"].map(async (name) => JSON.parse(await read(name))),
  );
  if (manifest.shape.dtype !== "float32") throw new Error(`${folder} is not float32: build it with --dtype fp32`);
  if ((manifest.kv ?? "float") !== "float") throw new Error(`${folder} stores keys and values in ${manifest.kv}: build it with --kv float`);
  // This package feeds no input that has a default, so it takes the decode graph in which none has.
  const [prefill, decode] = await Promise.all(
    ["prefill.onnx", "decode_explicit.onnx"].map((name) =>
      ort.InferenceSession.create(join(folder, name), { logSeverityLevel: 3 }),
    ),
  );
  const template = manifest.files["chat_template.jinja"] && new Template(await read("chat_template.jinja"));
  return new Artifact(manifest, prefill, decode, new Tokenizer(tokenizer, config), template, config);
}

class Artifact {
  constructor(manifest, prefill, decode, tokenizer, template, config) {
    Object.assign(this, { manifest, prefill, decode, tokenizer, template, config });
  }

  encode(text, options = {}) {
    return this.tokenizer.encode(text, options).ids;
  }

  /** Put a conversation into the model's chat template, up to where its answer begins; token ids. */
  chat(messages) {
    if (!this.template) throw new Error("this model has no chat template");
    const spelling = (token) => token?.content ?? token ?? undefined;
    const { bos_token, eos_token } = this.config;
    const special = { bos_token: spelling(bos_token), eos_token: spelling(eos_token) };
    const text = this.template.render({ messages, add_generation_prompt: true, ...special });
    return this.encode(text, { add_special_tokens: false });
  }

  /** Yield the likeliest tokens after a prompt of token ids. */
  async *generate(prompt, { dense = false, price = this.manifest.price, maxNewTokens = 64 } = {}) {
    const { shape, model } = this.manifest;
    const layers = [...Array(shape.num_layers).keys()];
    const parts = layers.flatMap((i) => [`${i}.key`, `${i}.value`]);
    const empty = new ort.Tensor("float32", new Float32Array(0), [1, shape.num_kv_heads, 0, shape.head_size]);
    let cache = Object.fromEntries(parts.map((part) => [`past_key_values.${part}`, empty]));
    let [session, tokens, length, sparse] = [this.prefill, prompt, 0, {}];
    for (let count = 0; count < maxNewTokens; count++) {
      length += tokens.length;
      const outputs = await session.run({
        input_ids: new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]),
        attention_mask: new ort.Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]),
        ...cache,
        ...sparse,
      });
      cache = Object.fromEntries(parts.map((part) => [`past_key_values.${part}`, outputs[`present.${part}`]]));
      if (session === this.prefill && !dense) {
        // They serve every token after the prompt. Reading on with prefill instead is dense decoding.
        sparse = this.manifest.layout === "priced" ? { price: floats([price]) } : this.mask(outputs, layers);
        session = this.decode;
      }
      const token = argmax(outputs.logits.data);
      if (length >= shape.max_positions || model.eos_token_ids.includes(token)) return;
      yield token;
      tokens = [token];
    }
  }

  /** What decode takes of a prompt's mask. */
  mask(prefilled, layers) {
    const mask = {};
    for (const i of layers) {
      const chosen = prefilled[`present_mask_indices.${i}`];
      mask[`mask_indices.${i}`] = chosen.dims[0] ? chosen : NO_NEURON;
      mask[`tail_mean.${i}`] = prefilled[`present_tail_mean.${i}`];
    }
    if (this.decode.inputNames.includes("token_thresholds"))
      mask.token_thresholds = floats(this.manifest.token_thresholds);
    return mask;
  }

  /** Turn tokens into pieces of text as they come; bytes that are no whole character yet are held back. */
  async *text(tokens) {
    let [ids, shown] = [[], ""];
    for await (const token of tokens) {
      ids.push(token);
      const text = this.tokenizer.decode(ids, { skip_special_tokens: true });
      if (text.endsWith("\ufffd")) continue;
      yield text.slice(shown.length);
      shown = text;
    }
  }
}

function floats(values) {
  return new ort.Tensor("float32", Float32Array.from(values), [values.length]);
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}
