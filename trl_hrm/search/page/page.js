"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const columns = data.nodes; // the entry of the prompt is the last of each column, so that .at(-1) finds it
const PROMPT = -1;
const ROW = 30; // pixels, as in the style sheet
const SHADES = 20; // steps of the colour scale

const byId = (id) => document.getElementById(id);
const of = (name, node) => columns[name].at(node);
const oneLine = (text) => text.replace(/\s+/g, " ").trim();
const number = (value) => value.toLocaleString("en-US");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

/** An element with text or children. Text is only ever set as text. */
function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.filter((part) => part !== null && part !== undefined));
  return element;
}

function facts(pairs) {
  return pairs.filter(Boolean).map(([name, ...value]) => make("div", "", make("dt", "", name), make("dd", "", ...value)));
}

// Lines of the tree, depth first, and the nodes they stand for

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

/** Which steps of the solution a node holds, as "Step 3" or "Steps 2–3". */
function stepName(node) {
  const last = pathTo(node).reduce((sum, i) => sum + of("num_merged", i), 0);
  const count = node === PROMPT ? 1 : of("num_merged", node);
  return count > 1 ? `Steps ${last - count + 1}–${last}` : `Step ${last}`;
}

function titleOf(line) {
  const node = line.nodes[0];
  if (line.kind === "prompt") return "Problem";
  if (line.kind === "node" && of("role", node) !== "rollout") return stepName(node);
  const from = of("parent", node);
  const where = from === PROMPT ? "from the prompt" : `from ${stepName(from).toLowerCase()}`;
  return line.kind === "rollouts" ? `${plural(line.nodes.length, "rollout")} ${where}` : `Rollout ${where}`;
}

/** How the solutions below nodes ended. Segments do not count: the rollout that they were cut from stands beside them. */
function endings(nodes) {
  const found = new Map();
  const pending = [...nodes];
  while (pending.length) {
    const node = pending.pop();
    pending.push(...childrenOf.get(node).filter((i) => of("role", i) !== "segment"));
    const outcome = of("outcome", node);
    if (!outcome) continue;
    const key = JSON.stringify([outcome, of("answer", node)]);
    found.set(key, (found.get(key) || 0) + 1);
  }
  return [...found].map(([key, count]) => [...JSON.parse(key), count]).sort((a, b) => b[2] - a[2]);
}

// Colours and small marks

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
  const text = symbol ? `${symbol} ${oneLine(answer ?? "")}` : answer ? `${outcome}: ${oneLine(answer)}` : outcome;
  const element = make("span", `badge ${outcome}`, text + (count > 1 ? ` ×${count}` : ""));
  element.title = outcome;
  return element;
}

// Tree

let visible = [];
let selected = 0;
let needle = "";
const tree = byId("tree");
const rows = byId("rows");

function showTree() {
  visible = [];
  const pending = [0];
  while (pending.length) {
    const i = pending.pop();
    visible.push(i);
    if (lines[i].open) pending.push(...lines[i].below.slice().reverse());
  }
  rows.style.height = `${visible.length * ROW}px`;
  drawRows();
}

/** Only the rows in sight are in the document, so that a tree of any size opens at once. */
function drawRows() {
  const first = Math.max(Math.floor(tree.scrollTop / ROW) - 8, 0);
  const last = Math.min(Math.ceil((tree.scrollTop + tree.clientHeight) / ROW) + 8, visible.length);
  const drawn = [];
  for (let place = first; place < last; place++) drawn.push(row(visible[place], place));
  rows.replaceChildren(...drawn);
  const inSight = byId(`row-${selected}`) !== null;
  if (inSight) tree.setAttribute("aria-activedescendant", `row-${selected}`);
  else tree.removeAttribute("aria-activedescendant");
}

function row(i, place) {
  const line = lines[i];
  const siblings = line.above < 0 ? [0] : lines[line.above].below;
  const element = make("div", `row ${line.kind === "node" ? "" : "group"} ${line.below.length ? "" : "leaf"}`);
  element.id = `row-${i}`;
  element.style.top = `${place * ROW}px`;
  element.setAttribute("role", "treeitem");
  element.setAttribute("aria-level", line.depth + 1);
  element.setAttribute("aria-setsize", siblings.length);
  element.setAttribute("aria-posinset", siblings.indexOf(i) + 1);
  element.setAttribute("aria-selected", i === selected);
  if (line.below.length) element.setAttribute("aria-expanded", line.open);
  const indent = make("span", "indent");
  indent.style.width = `${line.depth * 18}px`;
  const twisty = make("span", "twisty");
  twisty.setAttribute("aria-hidden", "true");
  element.append(indent, twisty, ...rowContent(line));
  element.addEventListener("click", (event) => {
    if (event.target === twisty || (i === selected && event.detail === 2)) toggle(i, !line.open);
    else select(i);
  });
  return element;
}

function rowContent(line) {
  const node = line.nodes[0];
  if (line.kind === "rollouts") {
    const found = new Map();
    for (const i of line.nodes) found.set(of("outcome", i), (found.get(of("outcome", i)) || 0) + 1);
    const counted = data.outcomes.filter((outcome) => found.has(outcome)).map((outcome) => {
      return make("span", `badge ${outcome}`, `${found.get(outcome)} ${outcome}`);
    });
    return [make("span", "step", plural(line.nodes.length, "rollout")), ...counted];
  }
  const text = line.kind === "prompt" ? "Problem" : oneLine(of("text", node));
  const marks = [];
  if (line.below.length && of("answered", node) + of("unresolved", node) > 0) {
    const open = of("unresolved", node) ? make("em", "", ` +${of("unresolved", node)}?`) : null;
    const share = make("span", "share", `${of("correct", node)}/${of("answered", node)}`, open);
    share.title = "correct / answered solutions below, and those without a verdict";
    marks.push(share);
  }
  if (line.nodes.length > 1) marks.push(make("span", "badge", `×${line.nodes.length}`));
  if (of("merged_from", node)) marks.push(make("span", "badge", "moved up"));
  if (of("outcome", node)) marks.push(badge(of("outcome", node), of("answer", node)));
  return [valueMark(of("score", node)), make("span", "step", ...highlighted(text)), ...marks];
}

/** The beginning of a text, or where the searched text stands in it. */
function highlighted(text) {
  const found = needle ? text.toLowerCase().indexOf(needle) : -1;
  if (found < 0) return [text.slice(0, 400)];
  const start = found > 40 ? found - 24 : 0;
  const end = found + needle.length;
  return [(start ? "…" : "") + text.slice(start, found), make("mark", "", text.slice(found, end)), text.slice(end, end + 400)];
}

function toggle(i, open) {
  if (!lines[i].below.length || lines[i].open === open) return;
  lines[i].open = open;
  pressDepth(null);
  if (!open && isUnder(selected, i)) select(i);
  showTree();
}

function isUnder(i, top) {
  while (i > top) i = lines[i].above;
  return i === top;
}

function select(i) {
  selected = i;
  let changed = false;
  for (let above = lines[i].above; above >= 0; above = lines[above].above) {
    changed ||= !lines[above].open;
    lines[above].open = true;
  }
  if (changed) showTree();
  const top = visible.indexOf(i) * ROW;
  if (top < tree.scrollTop) tree.scrollTop = top;
  if (top + ROW > tree.scrollTop + tree.clientHeight) tree.scrollTop = top + ROW - tree.clientHeight;
  drawRows();
  drawTrail();
  showDetail(lines[i]);
}

/** Open every step above a depth. Rollouts stay folded, except when all is opened. */
function openTo(depth) {
  const all = depth >= deepest;
  for (const line of lines) line.open = line.depth < depth && (all || line.kind !== "rollouts");
  let i = selected;
  for (let above = lines[i].above; above >= 0; above = lines[above].above) if (!lines[above].open) i = above;
  pressDepth(depth);
  showTree();
  select(i);
}

function pressDepth(depth) {
  for (const button of byId("depths").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", Number(button.value) === depth);
  }
}

tree.addEventListener("scroll", drawRows, { passive: true });
tree.addEventListener("keydown", (event) => {
  const line = lines[selected];
  const place = visible.indexOf(selected);
  const page = Math.max(Math.floor(tree.clientHeight / ROW) - 1, 1);
  const go = (to) => select(visible[Math.min(Math.max(to, 0), visible.length - 1)]);
  const actions = {
    ArrowDown: () => go(place + 1),
    ArrowUp: () => go(place - 1),
    PageDown: () => go(place + page),
    PageUp: () => go(place - page),
    Home: () => go(0),
    End: () => go(visible.length - 1),
    ArrowRight: () => (line.open && line.below.length ? select(line.below[0]) : toggle(selected, true)),
    ArrowLeft: () => (line.open && line.below.length ? toggle(selected, false) : line.above >= 0 && select(line.above)),
    Enter: () => toggle(selected, !line.open),
    " ": () => toggle(selected, !line.open),
  };
  if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  actions[event.key]();
});

// Detail of the selected line

function showDetail(line) {
  const node = line.nodes[0];
  const score = line.kind === "rollouts" ? undefined : of("score", node);
  const outcome = of("outcome", node);
  const headline = make("div", "headline", make("h2", "", titleOf(line)));
  if (score !== undefined) headline.append(valueMark(score));
  if (outcome && line.kind === "node") headline.append(badge(outcome, of("answer", node)));
  const parts = [headline, change(line), make("p", "change", leavesText(line))];
  if (line.kind !== "rollouts") parts.push(make("pre", "", of("text", node)));
  parts.push(...endingsPart(line), ...trailPart(line), ...samplePart(line));
  byId("detail").replaceChildren(...parts.filter((part) => part !== null));
  byId("detail").scrollTop = 0;
}

function change(line) {
  if (line.kind !== "node" || of("score", line.nodes[0]) === null) return null;
  const before = of("score", of("parent", line.nodes[0]));
  if (before === null) return null;
  const step = of("score", line.nodes[0]) - before;
  const where = of("parent", line.nodes[0]) === PROMPT ? "the prompt" : "the step before it";
  if (Math.abs(step) < 0.005) return make("p", "change", `Same value as ${where}`);
  return make("p", "change", `${Math.abs(step).toFixed(2)} ${step < 0 ? "below" : "above"} ${where}`);
}

function leavesText(line) {
  const node = line.nodes[0];
  if (line.kind === "rollouts" || !childrenOf.get(node).length) return null;
  const [correct, answered, unresolved] = ["correct", "answered", "unresolved"].map((name) => of(name, node));
  if (!answered && !unresolved) return null;
  const rest = unresolved ? `, ${number(unresolved)} more without a verdict` : "";
  return `${number(correct)} of ${number(answered)} answers below are correct${rest}`;
}

function endingsPart(line) {
  if (!line.below.length) return [];
  const found = endings(line.nodes);
  if (!found.length) return [];
  const shown = found.slice(0, 8).map(([outcome, answer, count]) => badge(outcome, answer, count));
  const more = found.length - shown.length;
  if (more) shown.push(make("span", "badge", `${plural(more, "other ending")}`));
  return [make("h3", "", "How the solutions below end"), make("div", "headline", ...shown)];
}

function trailPart(line) {
  if (line.kind === "prompt") return [];
  const items = [PROMPT, ...pathTo(of("parent", line.nodes[0]))].map((node) => {
    const score = of("score", node);
    const text = node === PROMPT ? "(prompt)" : of("text", node);
    const button = make("button", shadeOf(score), make("b", "", score === null ? "–" : score.toFixed(2)), make("span", "", text));
    button.type = "button";
    button.addEventListener("click", () => select(lineOf.get(node)));
    return make("li", "", button);
  });
  return [make("h3", "", "What stands before it"), make("ol", "trail-list", ...items)];
}

function samplePart(line) {
  if (line.kind !== "node") return [];
  const node = line.nodes[0];
  const list = (name) => line.nodes.map((i) => of(name, i)).join(", ");
  const stop = of("stop_reason", node);
  const ended = { stop: "a stop string", eos: "the policy", length: "the limit on tokens" }[of("finish", node)];
  const cached = of("num_cached", node) ? `, ${number(of("num_cached", node))} of the prefix from cache` : "";
  const merged = of("merged_from", node);
  return [
    make("h3", "", line.nodes.length > 1 ? `${line.nodes.length} equal samples` : "Sample"),
    make("dl", "", ...facts([
      ["Role", of("role", node)],
      ["Ended by", ended, stop === null ? null : make("code", "", ` ${JSON.stringify(stop)}`)],
      of("answer", node) !== null && ["Answer", `${of("answer", node)} (${of("outcome", node)})`],
      ["Tokens", number(of("num_tokens", node)) + cached],
      ["Seed", list("seed")],
      of("weight", node) !== 1 && ["Weight", `stands for ${of("weight", node)} siblings`],
      merged && ["Merged from", make("code", "", merged.join(" + "))],
      ["Node", make("code", "", list("node_id"))],
    ])),
  ];
}

// Overview: a bar per node, as wide as the number of leaves below it

const picture = byId("picture");
const levelOf = new Map();
const leafStart = new Map();
const leafCount = new Map(order.map((node) => [node, 0]));
const byLevel = [];
for (const node of [...order].reverse()) {
  if (!leafCount.get(node)) leafCount.set(node, 1);
  if (node !== PROMPT) leafCount.set(of("parent", node), leafCount.get(of("parent", node)) + leafCount.get(node));
}
const cursor = new Map([[PROMPT, 0]]);
for (const node of order) {
  const parent = node === PROMPT ? null : of("parent", node);
  const level = parent === null ? 0 : levelOf.get(parent) + 1;
  const start = parent === null ? 0 : cursor.get(parent);
  if (parent !== null) cursor.set(parent, start + leafCount.get(node));
  levelOf.set(node, level);
  leafStart.set(node, start);
  cursor.set(node, start);
  (byLevel[level] ||= []).push(node);
}
const LEVEL = Math.min(Math.max(Math.floor(150 / byLevel.length), 4), 22); // pixels
const scale = () => picture.clientWidth / leafCount.get(PROMPT);

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** Bars of the nodes that `keep` asks for, by shade. Those narrower than a pixel share one with their neighbours, of their mean value. */
function bars(keep) {
  const pixels = scale();
  const paths = new Map();
  const flush = (bar) => {
    const shade = shadeOf(bar.count ? bar.sum / bar.count : null);
    const width = bar.end - bar.start;
    const box = `M${bar.start.toFixed(2)} ${bar.level * LEVEL}h${Math.max(width - (width > 4 ? 1 : 0), 0.5).toFixed(2)}v${LEVEL - 1}H${bar.start.toFixed(2)}z`;
    paths.set(shade, (paths.get(shade) || "") + box);
  };
  byLevel.forEach((nodes, level) => {
    let bar = null;
    for (const node of nodes) {
      if (!keep(node)) continue;
      const start = leafStart.get(node) * pixels;
      const end = start + leafCount.get(node) * pixels;
      if (bar && (end - bar.start > 1 || start - bar.end > 0.01)) bar = flush(bar);
      bar ||= { level, start, end, sum: 0, count: 0 };
      bar.end = end;
      if (of("score", node) !== null) {
        bar.sum += of("score", node);
        bar.count += 1;
      }
    }
    if (bar) flush(bar);
  });
  return [...paths].map(([shade, d]) => svg("path", shade === "none" ? { d, fill: "url(#stripes)" } : { d, class: shade }));
}

function drawPicture() {
  const stripes = svg("pattern", { id: "stripes", width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  stripes.append(svg("rect", { width: 2, height: 4, style: "fill: var(--middle)" }));
  const [all, found, trail] = [svg("g", { class: "all" }), svg("g", { class: "found" }), svg("path", { class: "trail" })];
  all.append(...bars(() => true));
  picture.setAttribute("height", byLevel.length * LEVEL + 1);
  picture.replaceChildren(stripes, all, found, trail);
  drawTrail();
  drawHits();
}

/** What a search found keeps its colour, all else fades. */
function drawHits() {
  const found = new Set(hits.flatMap((i) => lines[i].nodes));
  picture.querySelector(".all")?.classList.toggle("faded", found.size > 0);
  picture.querySelector(".found")?.replaceChildren(...(found.size ? bars((node) => found.has(node)) : []));
}

function boxOf(node) {
  const width = Math.max(leafCount.get(node) * scale(), 3);
  return [Math.min(leafStart.get(node) * scale(), picture.clientWidth - width), levelOf.get(node) * LEVEL, width];
}

function drawTrail() {
  const line = lines[selected];
  const node = line.kind === "rollouts" ? of("parent", line.nodes[0]) : line.nodes[0];
  const boxes = [PROMPT, ...pathTo(node)].map(boxOf).map(([x, y, width]) => {
    return `M${x + 0.75} ${y + 0.75}h${Math.max(width - 2.5, 1)}v${LEVEL - 2.5}h${-Math.max(width - 2.5, 1)}z`;
  });
  picture.querySelector(".trail")?.setAttribute("d", boxes.join(""));
}

/** The node under the pointer, by bisection in its level. */
function nodeAt(event) {
  const frame = picture.getBoundingClientRect();
  const nodes = byLevel[Math.floor((event.clientY - frame.top) / LEVEL)];
  const leaf = (event.clientX - frame.left) / scale();
  if (!nodes) return null;
  let [low, high] = [0, nodes.length - 1];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (leafStart.get(nodes[middle]) <= leaf) low = middle;
    else high = middle - 1;
  }
  const found = nodes[low];
  return leaf >= leafStart.get(found) && leaf < leafStart.get(found) + leafCount.get(found) ? found : null;
}

const caption = byId("caption").textContent;
picture.addEventListener("mousemove", (event) => {
  const node = nodeAt(event);
  const score = node === null ? null : of("score", node);
  byId("caption").textContent = node === null
    ? caption
    : `${titleOf(lines[lineOf.get(node)])}, value ${score === null ? "none" : score.toFixed(2)}: ${oneLine(of("text", node)).slice(0, 240)}`;
});
picture.addEventListener("mouseleave", () => (byId("caption").textContent = caption));
picture.addEventListener("click", (event) => {
  const node = nodeAt(event);
  if (node !== null) select(lineOf.get(node));
});

// Search

let hits = [];
let hit = -1;
const searchable = lines.map((line) => {
  return line.kind === "node" ? oneLine(`${of("text", line.nodes[0])} ${line.nodes.map((i) => of("node_id", i)).join(" ")}`).toLowerCase() : "";
});

function search() {
  needle = oneLine(byId("search").value).toLowerCase();
  hits = needle ? lines.map((_, i) => i).filter((i) => searchable[i].includes(needle)) : [];
  hit = -1;
  showHits();
  drawRows();
  drawHits();
}

function showHits() {
  byId("hits").textContent = !needle ? "" : hit < 0 ? `${number(hits.length)} found` : `${hit + 1} of ${number(hits.length)}`;
  byId("previous").disabled = byId("next").disabled = !hits.length;
}

function goToHit(step) {
  if (!hits.length) return;
  hit = hit < 0 && step < 0 ? hits.length - 1 : (hit + step + hits.length) % hits.length;
  showHits();
  select(hits[hit]);
}

byId("search").addEventListener("input", search);
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") goToHit(event.shiftKey ? -1 : 1);
});
byId("next").addEventListener("click", () => goToHit(1));
byId("previous").addEventListener("click", () => goToHit(-1));
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target === byId("search") || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  byId("search").focus();
});

// Head

const { problem, totals } = data;
document.title = `${problem.id} · search tree`;
byId("kicker").append(...(data.run ? [`${data.run} · `] : []), `problem ${problem.id}`, make("span", "status", problem.status.replaceAll("_", " ")));
byId("problem").textContent = problem.prompt;
const rootScore = of("score", PROMPT);
byId("facts").append(...facts([
  ["Reference answer", problem.answer],
  ["Value of the prompt", rootScore === null ? "none" : rootScore.toFixed(3), make("span", "note", data.basis ? ` ${data.basis}` : "")],
  of("answered", PROMPT) > 0 && ["Correct answers", `${number(of("correct", PROMPT))} of ${number(of("answered", PROMPT))}`,
    of("unresolved", PROMPT) ? make("span", "note", ` and ${number(of("unresolved", PROMPT))} without a verdict`) : null],
  ["Nodes", number(totals.num_nodes)],
  totals.num_tokens > 0 && ["Tokens generated", number(totals.num_tokens)],
  totals.num_tokens > 0 && ["Tokens from cache", number(totals.num_cached)],
]));
byId("depths").append(make("span", "", "Open to"));
for (let depth = 1; depth <= Math.min(deepest, 7); depth++) {
  const button = make("button", "", depth === Math.min(deepest, 7) ? "all" : String(depth));
  button.type = "button";
  button.value = depth === Math.min(deepest, 7) ? deepest : depth;
  button.addEventListener("click", () => openTo(Number(button.value)));
  byId("depths").append(button);
}

// As deep as the first rows show it

let depth = 1;
const atDepth = (most) => lines.filter((line) => line.depth <= most && (line.above < 0 || lines[line.above].kind !== "rollouts")).length;
while (depth < deepest - 1 && atDepth(depth + 1) <= 40) depth++;
openTo(Math.min(depth, deepest));
new ResizeObserver(() => drawRows()).observe(tree);
new ResizeObserver(() => drawPicture()).observe(picture);
