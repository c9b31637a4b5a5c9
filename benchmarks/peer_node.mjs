// llama.cpp through npm's node-llama-cpp, obeying the same lines as _peer_workers.py:  node peer_node.mjs MODEL.gguf
import { createInterface } from "node:readline";
import { statSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const found = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(found).href);
const path = process.argv[2];
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.disabled });
const model = await llama.loadModel({ modelPath: path });
const sequences = new Map();

async function sequence(threads) {
  if (!sequences.has(threads)) {
    llama.maxThreads = threads;
    const options = { contextSize: 1024, batchSize: 512, threads: { ideal: threads, min: threads } };
    sequences.set(threads, (await model.createContext(options)).getSequence());
  }
  return sequences.get(threads);
}

async function run({ threads, prompt, new: count }) {
  const place = await sequence(threads);
  await place.clearHistory();
  const tokens = [];
  const start = performance.now();
  let first = start;
  for await (const token of place.evaluate(prompt, { temperature: 0 })) {
    tokens.push(token);
    if (tokens.length === 1) first = performance.now();
    if (tokens.length === count) break;
  }
  const each = (performance.now() - first) / Math.max(1, tokens.length - 1);
  return { first_ms: first - start, token_ms: each, tokens };
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  const facts = { read_bytes: statSync(path).size, seconds: 0, nats: null };
  console.log(JSON.stringify(request.do === "facts" ? facts : await run(request)));
}
process.exit(0);
