// llama.cpp, by the npm package node-llama-cpp, as a process that answers lines of JSON:
//     node llama_cpp.mjs FOLDER_OF_THE_PACKAGE MODEL.gguf THREADS exact|fast
// {"text": "..."} -> its token ids; {"prompt": [ids], "n": 9} -> the most likely next 9 tokens, or
// fewer if the text ends. exact: keys and values are stored in float32; fast: as by default.
import path from "node:path";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const [folder, modelPath, threads, mode] = process.argv.slice(2);
const entry = pathToFileURL(path.join(folder, "dist", "index.js"));
const {getLlama, LlamaLogLevel} = await import(entry.href);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath});
const float32 = {
    flashAttention: false,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32"
};
const context = await model.createContext({
    contextSize: model.trainContextSize,
    threads: Number(threads),
    ...(mode === "exact" ? float32 : {})
});
const sequence = context.getSequence();

async function mostLikely(prompt, n) {
    const tokens = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (tokens.push(token) === n || model.isEogToken(token))
            break;
    }
    return tokens;
}

for await (const line of createInterface({input: process.stdin})) {
    const {text, prompt, n} = JSON.parse(line);
    const answer = prompt ? await mostLikely(prompt, n) : model.tokenize(text);
    process.stdout.write(JSON.stringify(answer) + "\n");
}
await llama.dispose();
