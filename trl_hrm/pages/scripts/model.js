"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const columns = data.nodes; // the prompt is the last entry of each column, so that .at(-1) finds it
const PROMPT = -1;
const ROW = 30; // pixels, same as in the style sheet
const SHADES = 20; // steps of the colour scale

const byId = (id) => document.getElementById(id);
const of = (name, node) => columns[name].at(node);
const oneLine = (text) => text.replace(/\s+/g, " ").trim();
const number = (value) => value.toLocaleString("en-US");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

/** Create an element with text or children. Strings become text nodes, never markup. */
function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.filter((part) => part !== null && part !== undefined));
  return element;
}

/** A text as nodes, in which formulas are copies of the elements that the server made. Everything else is inserted as text. */
function withMath(text, places = []) {
  const parts = [];
  let end = 0;
  for (const [start, stop, i] of places) {
    parts.push(text.slice(end, start), byId("formulas").content.children[i].cloneNode(true));
    end = stop;
  }
  return [...parts, text.slice(end)];
}

const textOf = (node) => withMath(of("text", node), data.math[node === PROMPT ? columns.text.length - 1 : node]);
const answerOf = (answer) => (Object.hasOwn(data.answers, answer) ? withMath(answer, [[0, answer.length, data.answers[answer]]]) : [oneLine(answer)]);

function facts(pairs) {
  return pairs.filter(Boolean).map(([name, ...value]) => make("div", "", make("dt", "", name), make("dd", "", ...value)));
}

// Lines of the tree in depth-first order, and their nodes

const lines = data.lines.map(([nodes, above, kind]) => ({ nodes, above, kind, below: [], depth: 0, open: false }));
const lineOf = new Map();
const childrenOf = new Map([[PROMPT, []]]);
const order = []; // nodes, depth first
lines.forEach((line, i) => {
  if (line.above >= 0) {
    line.depth = lines[line.above].depth + 1;
    lines[line.above].below.push(i);
  }
  if (line.kind === "rollouts") return;
  for (const node of line.nodes) {
    lineOf.set(node, i);
    order.push(node);
    childrenOf.set(node, []);
    if (node !== PROMPT) childrenOf.get(of("parent", node)).push(node);
  }
});
const deepest = lines.reduce((most, line) => Math.max(most, line.depth), 0);

function pathTo(node) {
  const path = [];
  for (let i = node; i !== PROMPT; i = of("parent", i)) path.unshift(i);
  return path;
}

/** The steps of the solution in a node, such as "Step 3" or "Steps 2–3". */
function stepName(node) {
  const last = pathTo(node).reduce((sum, i) => sum + of("num_merged", i), 0);
  const count = node === PROMPT ? 1 : of("num_merged", node);
  return count > 1 ? `Steps ${last - count + 1}–${last}` : `Step ${last}`;
}

function titleOf(line) {
  const node = line.nodes[0];
  if (line.kind === "prompt") return "Prompt";
  if (line.kind === "node" && of("role", node) !== "rollout") return stepName(node);
  const from = of("parent", node);
  const where = from === PROMPT ? "from the prompt" : `from ${stepName(from).toLowerCase()}`;
  return line.kind === "rollouts" ? `${plural(line.nodes.length, "rollout")} ${where}` : `Rollout ${where}`;
}

/** Outcomes of the solutions below some nodes. Segments are not counted in addition to their rollout. */
function endings(nodes) {
  const found = new Map();
  const pending = [...nodes];
  for (const node of pending) {
    pending.push(...childrenOf.get(node).filter((i) => of("role", i) !== "segment"));
    const outcome = of("outcome", node);
    if (!outcome) continue;
    const key = JSON.stringify([outcome, of("answer", node)]);
    found.set(key, (found.get(key) || 0) + 1);
  }
  return [...found].map(([key, count]) => [...JSON.parse(key), count]).sort((a, b) => b[2] - a[2]);
}

// Colours and badges

const shadeOf = (score) => (score === null ? "none" : `v${Math.round(score * SHADES)}`);
const shades = make("style", "");
for (let i = 0; i <= SHADES; i++) {
  const [from, to, share] = i * 2 < SHADES ? ["low", "middle", i * 2] : ["middle", "high", i * 2 - SHADES];
  const tint = `color-mix(in oklab, var(--${from}), var(--${to}) ${(100 * share) / SHADES}%)`;
  shades.append(`.v${i} { --tint: ${tint}; } path.v${i} { fill: ${tint}; }\n`);
}
document.head.append(shades);

function meter(score) {
  const element = make("span", `meter ${shadeOf(score)}`);
  element.setAttribute("aria-hidden", "true");
  if (score !== null) {
    const bar = make("i", "");
    bar.style.width = `${Math.max(score * 100, 6)}%`;
    element.append(bar);
  }
  return element;
}

function valueMark(score) {
  return make("span", "value", make("b", "", score === null ? "–" : score.toFixed(2)), meter(score));
}

function badge(outcome, answer, count = 1) {
  const symbol = { correct: "✓", wrong: "✗" }[outcome];
  const words = symbol ? `${symbol} ` : answer ? `${outcome}: ` : outcome;
  const element = make("span", `badge ${outcome}`, words, ...(answer ? answerOf(answer) : []), count > 1 ? ` ×${count}` : "");
  element.title = outcome;
  return element;
}
