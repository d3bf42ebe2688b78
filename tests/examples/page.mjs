// Run the script of examples/browser/index.html without a browser: node page.mjs PAGE SERVER STEPS
// STEPS is JSON: [{"skip": "0.3", "say": "Hello"}, …, {"say": "…", "stop": true}]. Prints a line of JSON for each step.
import { readFileSync } from "node:fs";

class Element {
  constructor(attributes = {}) {
    Object.assign(this, { textContent: "", children: [], listeners: {} }, attributes);
  }
  append(child) { this.children.push(child); }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  scrollIntoView() {}
}

const [page, server, steps] = process.argv.slice(2);
const html = readFileSync(page, "utf8");
const elements = Object.fromEntries([...html.matchAll(/<[^>]* id="(\w+)"[^>]*>/g)].map(([tag, id]) =>
  [id, new Element({ value: tag.match(/ value="([^"]*)"/)?.[1] ?? "" })]));
const asked = [];
const ask = globalThis.fetch;
Object.assign(globalThis, {
  document: { getElementById: (id) => elements[id], createElement: () => new Element() },
  location: { search: `?server=${encodeURIComponent(server)}` },
  fetch: (url, options) => {
    if (options?.body) asked.push(JSON.parse(options.body));
    return ask(url, options);
  },
});
const script = html.match(/<script type="module">(.*?)<\/script>/s)[1];
await import(`data:text/javascript,${encodeURIComponent(script)}`);

for (const { skip, say, stop } of JSON.parse(steps)) {
  if (skip) {
    elements.skip.value = skip;
    elements.skip.listeners.input();
  }
  elements.text.value = say;
  const submit = () => elements.form.listeners.submit({ preventDefault() {} });
  const done = submit();
  if (stop) {
    while (!elements.log.children.at(-2)?.textContent) await new Promise((resume) => setTimeout(resume, 5));
    await submit();
  }
  await done;
  const [answer, cost] = elements.log.children.slice(-2).map((line) => line.textContent);
  console.log(JSON.stringify({ body: asked.at(-1), answer, cost, skipped: elements.skipped.textContent, button: elements.send.textContent }));
}
