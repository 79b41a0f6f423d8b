// The view "Inside": how the model predicted each token of the text on the screen. It shows what
// the worker computes: the surprise of every token as a color and, of the token that is pointed at,
// what each layer would predict and where each head attends to.
"use strict";

const N_LENS = 5; // tokens per layer
const N_LISTED = 5; // surprising tokens, attended tokens
const UNIFORM = Math.log(data.config.vocab_size); // the entropy of guessing uniformly, in nats
let view = { tokens: [] }; // the run that is shown, its tokens, the place that is pointed at

const nats = (value) => `${value.toFixed(2)} nats`;
const surprise = ({ probability }) => -Math.log(probability);
const quoted = (label) => `\u201c${visible(label)}\u201d`;

// Show the view or the text, as the button says; the view has nothing to show before the end.
function showView() {
  const open = $("inside").getAttribute("aria-pressed") === "true" && !run.active;
  $("view").hidden = !open;
  $("text").hidden = open;
  if (!open) view = { tokens: [] }; // the worker is not asked for more
  if (!open || view.run === run) return;
  view = { run, number: ++lastNumber, tokens: [] };
  $("tokens").replaceChildren();
  showSummary();
  worker.postMessage({ inside: { number: view.number, ids: run.ids } });
}

function receiveTokens({ number, steps, done }) {
  if (number !== view.number) return; // closed meanwhile
  if (!done) worker.postMessage({ next: true });
  for (const token of steps) addToken(token);
  if (done) addToken({ label: "\u2026" }); // the token after the text
  if (view.at === undefined) showSummary();
}

function addToken(token) {
  const { label } = token;
  const kind = label.includes("\n") ? "token newline" : "token";
  token.span = element("span", { class: kind }, label);
  token.span.at = view.tokens.length;
  view.tokens.push(token);
  $("tokens").append(token.span);
}

// --- the surprise of every token

function showSummary() {
  view.at = undefined;
  unmark();
  $("tokens").classList.remove("attention");
  const entropy = $("color").value === "entropy";
  const known = view.tokens.filter(({ probability }) => probability !== undefined);
  const [n, all] = [view.tokens.length, run.ids.length];
  if (n <= all || !known.length) {
    return $("details").replaceChildren(`Reading ${n} of ${count(all)} ...`);
  }
  for (const token of known) shade(token, (entropy ? token.entropy : surprise(token)) / UNIFORM);
  const meaning = entropy
    ? "Entropy: the surprise that the model expected."
    : "Surprise: -ln p, where p is the probability of the token.";
  $("scale-end").textContent = `${nats(UNIFORM)}, as for uniform guessing. ${meaning}`;
  const mean = (f) => nats(known.reduce((sum, token) => sum + f(token), 0) / known.length);
  const [loss, expected] = [mean(surprise), mean((token) => token.entropy)];
  const means = `Mean: surprise ${loss} (the loss on this text), entropy ${expected}.`;
  const least = [...known].sort((a, b) => a.probability - b.probability).slice(0, N_LISTED);
  const list = element("p", {}, "Most surprising: ");
  for (const { span, label, probability } of least) {
    const before = view.tokens.slice(Math.max(0, span.at - 9), span.at).map((t) => t.label);
    const name = `${visible([...before.join("")].slice(-9).join("") + label)} ${percent(probability)}`;
    const button = element("button", { type: "button" }, name);
    button.addEventListener("click", () => {
      span.scrollIntoView({ block: "nearest" });
      $("tokens").focus(); // for the arrow keys
      pointAt(span);
    });
    list.append(button, " ");
  }
  $("details").replaceChildren(element("p", {}, means), list);
}

const nameHeads = (name) => [...$("head").options].slice(1).forEach((o, i) => (o.text = name(i)));
const shade = ({ span }, share) => span.style.setProperty("--p", Math.min(share, 1));

function unmark() {
  nameHeads((i) => i);
  for (const span of document.querySelectorAll("#tokens .shown, #tokens .query"))
    span.classList.remove("shown", "query");
}

// --- how one token was predicted. One question at a time is on its way to the worker.

function showToken({ at }) {
  view.at = at;
  unmark();
  view.tokens[at].span.classList.add("shown");
  if (!at) $("details").textContent = "The first token: nothing before it predicts it.";
  else if (view.asked === undefined) askWorker();
}

function askWorker() {
  view.asked = view.at;
  worker.postMessage({ look: { number: view.number, at: view.at } });
}

function receiveLook(look) {
  if (look.number !== view.number) return;
  view.asked = undefined;
  view.look = look;
  if (view.at && view.at !== look.at) askWorker();
  else if (view.at) showLook();
}

function showLook() {
  const { at, lens } = view.look;
  const token = view.tokens[at];
  const isLast = token.probability === undefined;
  const numbers = () => [
    `probability ${percent(token.probability)}`,
    `surprise ${nats(surprise(token))}`,
    `entropy ${nats(token.entropy)}`,
  ];
  const text = isLast ? "the next token" : numbers().join(" \u00b7 ");
  const title = element("p", { class: "title" }, `${quoted(token.label)} ${text}`);
  const [answer] = lens.at(-1).alternatives;
  const first = lens.findIndex(({ alternatives: [best] }) => best.id === answer.id);
  const best = `The model's first choice is ${quoted(answer.label)} (framed)`;
  const own = () => ` The text has ${quoted(token.label)} (bold), ${percent(token.probability)}.`;
  const note = `${best}, first in the lead after layer ${first}.${isLast ? "" : own()}`;
  $("details").replaceChildren(title, lensTable(lens, answer), element("p", {}, note));
  $("details").append(attentionLine());
}

function lensTable(lens, answer) {
  const table = element("table", { class: "lens" });
  const head = element("tr");
  head.append(element("th", {}, "layer"));
  head.append(element("th", { colspan: N_LENS }, "most likely after that layer"));
  table.append(head);
  for (const [layer, { id: own, alternatives }] of lens.entries()) {
    const row = element("tr");
    row.append(element("th", {}, layer));
    for (const { id, label, probability } of alternatives.slice(0, N_LENS)) {
      const kinds = [id === own && "chosen", id === answer.id && "answer"].filter(Boolean);
      const cell = element("td", { class: kinds.join(" ") });
      cell.append(element("span", {}, visible(label)), element("small", {}, percent(probability)));
      cell.style.setProperty("--p", probability);
      row.append(cell);
    }
    table.append(row);
  }
  return table;
}

// Shade the tokens that were attended to, and list the most important ones with their distances.
function attentionLine() {
  const { at, begin, attention } = view.look;
  const [layer, head] = ["layer", "head"].map((id) => $(id).value);
  const heads = attention[layer].filter((_, i) => head === "mean" || i === Number(head));
  const weights = view.tokens.map(() => 0);
  for (const row of heads) row.forEach((w, s) => (weights[begin + s] += w / heads.length));
  const highest = Math.max(...weights);
  nameHeads((i) => `${i} (${percent(Math.max(...attention[layer][i]))})`);
  for (const [i, token] of view.tokens.entries()) shade(token, weights[i] / highest);
  $("tokens").classList.add("attention");
  view.tokens[at - 1].span.classList.add("query");
  const end = `attention weight ${percent(highest)}. Dotted: the token that attends.`;
  $("scale-end").textContent = end;
  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, N_LISTED);
  const items = order.filter((i) => weights[i]).map((i) => {
    const place = i === at - 1 ? "itself" : `${at - 1 - i} before`;
    return `${quoted(view.tokens[i].label)} ${percent(weights[i])} (${place})`;
  });
  const who = head === "mean" ? "the heads, on average, attend" : `head ${head} attends`;
  return element("p", {}, `In layer ${layer}, ${who} to ${items.join(", ")}.`);
}

// --- events
for (const [id, n] of [["layer", data.config.n_layer], ["head", data.config.n_head]]) {
  for (let i = 0; i < n; i++) $(id).append(element("option", { value: i }, i));
}
$("inside").addEventListener("click", () => {
  const open = $("inside").getAttribute("aria-pressed") !== "true";
  $("inside").setAttribute("aria-pressed", open);
  showView();
});
const redraw = () => view.at && view.look && showLook();
for (const id of ["layer", "head"]) $(id).addEventListener("change", redraw);
$("color").addEventListener("change", () => pointAt(null));
const pointAt = makePointable($("tokens"), $("view"), showToken, showSummary);
