// The user interface: sends the weights to the worker, asks it for text, shows what it answers.
// Text is only ever set as textContent, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const element = (name, attributes = {}, text = "", namespace = document.body.namespaceURI) => {
  const created = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes)) created.setAttribute(key, value);
  created.textContent = text;
  return created;
};
const data = JSON.parse($("data").textContent);
let run = { active: false, ids: [] }; // the text that is generated, or the last one
let lastNumber = 0; // of a text
let turns = []; // of the conversation with a model that answers questions: [question, answer]
const MAX_PROMPT = 60000; // characters: of a longer text, the end is used

function showStatus(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

// --- the worker: a Blob of the engine's text, so that this one file is all there is
let worker;

function startWorker() {
  const engine = Array.from(document.querySelectorAll("script.engine"), (part) => part.textContent);
  const url = URL.createObjectURL(new Blob(engine, { type: "text/javascript" }));
  worker = new Worker(url);
  worker.onmessage = ({ data: message }) => {
    if (message.error) fail(message.error);
    else if (message.ready) setRunning(false, "Ready");
    else if (message.look) receiveLook(message.look);
    else if (message.number === view.number) receiveTokens(message);
    else receiveSteps(message);
  };
  worker.onerror = (event) => fail(event.message ?? "the worker could not be started");
  for (const part of document.querySelectorAll("script.weight")) {
    const { name, kind, shape } = part.dataset;
    const numbers = shape.split(",").map(Number);
    worker.postMessage({ tensor: { name, kind, shape: numbers, base64: part.textContent } });
    part.remove(); // frees its memory
  }
  worker.postMessage({ model: { config: data.config, tokenizer: data.tokenizer } });
}

function fail(message) {
  if (run.active) setRunning(false, ""); // otherwise the model may not be loaded
  showStatus(`Error: ${message}`, true);
}

function setRunning(running, status) {
  if (run.active && !running) turns.push([run.prompt, run.text]);
  $("generate").disabled = running;
  $("halt").disabled = !running;
  run.active = running;
  showStatus(status);
  showView();
}

// --- one text at a time
const readEscapes = (text) => text.replace(/\\([n\\])/g, (_, char) => (char === "n" ? "\n" : "\\"));

function start() {
  const text = $("prompt").value;
  const prompt = text.slice(-MAX_PROMPT).replace(/^[\udc00-\udfff]/, ""); // not half a character
  if (data.qa && !prompt.trim()) return showStatus("Ask a question", true);
  const seed = $("seed").value || String(Math.floor(Math.random() * 1e6));
  const settings = { prompt, seed, qa: data.qa, turns, stop: readEscapes($("stop").value) };
  for (const name of ["temperature", "top_k", "top_p", "max_new_tokens"]) {
    settings[name] = Number($(name).value);
  }
  if (data.qa) $("prompt").value = "";
  else newConversation();
  $("result").hidden = false;
  setRunning(true, "");
  const number = ++lastNumber;
  run = { number, active: true, prompt, text: "", seed, n_tokens: 0 };
  Object.assign(run, { ids: [], notes: [], pending: [] });
  if (prompt !== text) run.notes.push(`only the last ${MAX_PROMPT} characters of the prompt`);
  worker.postMessage({ start: { number, settings } });
}

function newConversation() {
  if (run.active) setRunning(false, `Stopped: ${speed()}`);
  turns = [];
  hideAlternatives();
  $("output").replaceChildren();
  $("result").hidden = true;
}

// The worker computes for a moment and waits: without a request for the next steps, it stops.
function receiveSteps({ number, steps, done, ms }) {
  if (!run.active || number !== run.number) return; // stopped meanwhile
  if (!done) worker.postMessage({ next: true }); // first, so that it works while this is shown
  const output = $("output");
  const nearEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  for (const step of steps) showStep(step);
  if (nearEnd) output.scrollTop = output.scrollHeight;
  if (run.n_tokens) run.began ??= performance.now() - ms; // the prompt has been read
  const { read, of } = steps.at(-1) ?? {};
  if (done) setRunning(false, speed());
  else showStatus(of ? `Reading ${read} of ${count(of)}` : speed());
}

const count = (n) => `${n} token${n === 1 ? "" : "s"}`;

function speed() {
  const perSecond = run.n_tokens && (1000 * run.n_tokens) / (performance.now() - run.began);
  const rounded = perSecond < 20 ? perSecond.toFixed(1) : Math.round(perSecond);
  const parts = [count(run.n_tokens), `${rounded} tokens/s`, `seed ${run.seed}`];
  return [...parts, ...run.notes].join(" \u00b7 ");
}

function showStep(step) {
  if (step.prompt !== undefined) {
    $("output").append(element("span", { class: "prompt" }, step.prompt));
    const { unknown, ids } = step;
    const n = ids.length;
    const size = data.config.block_size;
    const seen = Math.max(size >> 1, 1);
    run.ids = n > size ? ids.slice(-seen) : ids; // what the model sees
    if (unknown.length) run.notes.push(`unknown characters left out: ${unknown.join(" ")}`);
    if (n > size) run.notes.push(`the model sees the last ${seen} of ${count(n)} of the prompt`);
  }
  if (step.token) {
    run.n_tokens += 1;
    run.ids.push(step.token.id);
    run.pending.push(step.token);
  }
  // A token may end inside a character: then the text comes with a later token.
  if (step.text) {
    const kind = step.text.includes("\n") ? "token newline" : "token";
    const span = element("span", { class: kind }, step.text);
    run.text += step.text;
    span.tokens = run.pending;
    span.style.setProperty("--p", step.token ? step.token.probability : 0);
    $("output").append(span);
    run.pending = [];
  }
}

// --- the alternatives of a token
const VISIBLE_SPACES = { " ": "\u2423", "\n": "\u21b5", "\t": "\u21e5" };
const visible = (label) => label.replace(/[ \n\t]/g, (space) => VISIBLE_SPACES[space]);
const percent = (probability) => `${(100 * probability).toFixed(1)}%`;

function showAlternatives(span) {
  hideAlternatives();
  span.classList.add("shown");
  const box = $("alternatives");
  for (const token of span.tokens) {
    const listed = [...token.alternatives];
    if (!listed.some(({ id }) => id === token.id)) listed.push(token);
    if (box.childElementCount) box.append(element("hr"));
    for (const { id, label, probability } of listed) {
      const row = element("div", { class: id === token.id ? "chosen" : "" });
      const bar = element("span", { class: "bar" });
      bar.append(element("span"));
      bar.firstChild.style.setProperty("--p", probability);
      const percentage = element("span", {}, percent(probability));
      row.append(element("span", { class: "label" }, visible(label)), bar, percentage);
      box.append(row);
    }
  }
  box.hidden = false;
  const place = span.getClientRects()[0];
  const { offsetWidth: width, offsetHeight: height } = box;
  const left = Math.min(place.left, document.documentElement.clientWidth - width - 8);
  const above = place.bottom + height + 8 > window.innerHeight && place.top > height + 8;
  const top = above ? place.top - height - 4 : place.bottom + 4;
  box.style.left = `${Math.max(left, 8) + window.scrollX}px`;
  box.style.top = `${top + window.scrollY}px`;
}

function hideAlternatives() {
  $("alternatives").hidden = true;
  $("alternatives").replaceChildren();
  $("output").querySelector(".shown")?.classList.remove("shown");
}

// --- the run: loss curve and settings
// About n round numbers that divide a range: 1, 2 or 5 times a power of ten apart.
function ticks(low, high, n) {
  const power = 10 ** Math.floor(Math.log10((high - low) / n));
  const step = power * [1, 2, 5, 10].find((factor) => (high - low) / (power * factor) <= n);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++)
    found.push(Number((i * step).toPrecision(6)));
  return found;
}

function drawCurve() {
  const [width, height, left, right, top, bottom] = [$("curve").clientWidth, 240, 40, 72, 28, 36];
  const curves = ["train", "val"]
    .map((name) => ({ name, records: data.log.filter((record) => record[name] !== null) }))
    .filter(({ records }) => records.length);
  const losses = curves.flatMap(({ name, records }) => records.map((record) => record[name]));
  const low = Math.min(...losses);
  const high = Math.max(...losses, low + 1e-3);
  const highStep = Math.max(...data.log.map(({ step }) => step), 1);
  const x = (step) => left + (step / highStep) * (width - left - right);
  const y = (loss) => top + ((high - loss) / (high - low)) * (height - top - bottom);
  const picture = element("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" }, "", SVG);
  const draw = (name, attributes, text) => picture.append(element(name, attributes, text, SVG));
  draw("title", {}, "Loss in nats per token during training");
  for (const loss of ticks(low, high, 5)) {
    draw("line", { class: "grid", x1: left, x2: width - right, y1: y(loss), y2: y(loss) });
    draw("text", { x: left - 8, y: y(loss) + 4, "text-anchor": "end" }, loss);
  }
  for (const step of ticks(0, highStep, width < 500 ? 3 : 6)) {
    draw("text", { x: x(step), y: height - bottom + 18, "text-anchor": "middle" }, step);
  }
  draw("text", { x: x(highStep / 2), y: height - 2, "text-anchor": "middle" }, "step");
  draw("text", { x: 0, y: 12 }, "loss (nats per token)");
  for (const [i, { name, records }] of curves.entries()) {
    const points = records.map((record) => `${x(record.step)},${y(record[name])}`).join(" ");
    const label = `${name} ${records.at(-1)[name].toFixed(2)}`;
    draw("polyline", { class: name, points });
    draw("text", { class: name, x: width - right + 8, y: top + 16 * i }, label);
  }
  $("curve").replaceChildren(picture);
}

function showRun() {
  $("summary").textContent = data.summary;
  if (data.qa) $("prompt-label").textContent = "Question";
  $("new-chat").hidden = !data.qa;
  $("output").classList.toggle("chat", data.qa);
  $("prompt").placeholder = data.qa ? "Ask the model a question" : "Text that the model continues";
  for (const [name, value] of data.settings) {
    const row = element("tr");
    row.append(element("td", {}, name), element("td", {}, value));
    $("settings").append(row);
  }
  $("training").hidden = false;
  $("curve").hidden = data.log.length === 0;
  if (data.log.length) new ResizeObserver(drawCurve).observe($("curve"));
}

// --- events
for (const id of ["temperature", "top_p"]) {
  const showValue = () => ($(`${id}-value`).textContent = Number($(id).value).toFixed(2));
  $(id).addEventListener("input", showValue);
  showValue();
}
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
$("halt").addEventListener("click", () => setRunning(false, `Stopped: ${speed()}`));
$("new-chat").addEventListener("click", newConversation);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("generate").disabled)
    $("form").requestSubmit();
});
// A mouse shows a token while it points at it; a tap or a click, until the next one in `area`; the
// arrow keys show the previous or the next token. Returns the function that shows a token for good,
// or none.
function makePointable(box, area, show, hide) {
  let pinned = null;
  const point = (token, pin = true) => {
    pinned = pin ? token : null;
    if (token) show(token);
    else hide();
  };
  const free = () => !pinned?.isConnected;
  const tokenAt = ({ target }) => target.closest(".token");
  box.addEventListener("mouseover", (event) => free() && point(tokenAt(event), false));
  box.addEventListener("mouseleave", () => free() && hide());
  box.addEventListener("click", (event) => point(tokenAt(event)));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const tokens = [...box.querySelectorAll(".token")];
    if (!step || !tokens.length) return;
    event.preventDefault();
    const at = tokens.findIndex((token) => token.classList.contains("shown"));
    const token = tokens.at((Math.max(at, step < 0 ? 0 : -1) + step) % tokens.length);
    token.scrollIntoView({ block: "nearest" });
    requestAnimationFrame(() => point(token)); // after "scroll"
  });
  document.addEventListener("click", ({ target }) => area.contains(target) || point(null));
  document.addEventListener("keydown", ({ key }) => key === "Escape" && point(null));
  return point;
}
const pointAtOutput = makePointable($("output"), $("output"), showAlternatives, hideAlternatives);
$("output").addEventListener("scroll", () => pointAtOutput(null));
document.addEventListener("DOMContentLoaded", () => {
  showRun();
  startWorker();
});
