// Runs llama.cpp by the npm package node-llama-cpp: node llama_cpp.mjs FOLDER_OF_THE_PACKAGE
// Reads {model, texts, prompts, n, threads} from stdin and writes {ids, tokens, seconds}: the token
// ids of each text, and for each prompt of ids its n most likely next tokens, and how long it took.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const entry = path.join(process.argv[2], "dist", "index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry).href);
const job = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: job.model});
const ids = job.texts.map((text) => model.tokenize(text));
const context = await model.createContext({
    contextSize: model.trainContextSize,
    threads: job.threads,
    flashAttention: false,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();
const tokens = [];
const seconds = [];
for (const prompt of job.prompts) {
    await sequence.clearHistory();
    const start = performance.now();
    const found = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (found.push(token) === job.n || model.isEogToken(token))
            break;
    }
    seconds.push((performance.now() - start) / 1000);
    tokens.push(found);
}
await llama.dispose();
process.stdout.write(JSON.stringify({ids, tokens, seconds}));
