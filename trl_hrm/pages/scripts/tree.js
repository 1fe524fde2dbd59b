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

/** Only visible rows are in the document, so that large trees open quickly. */
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
  const text = line.kind === "prompt" ? "Prompt" : oneLine(of("text", node));
  const marks = [];
  if (line.below.length && of("answered", node) + of("unresolved", node) > 0) {
    const open = of("unresolved", node) ? make("em", "", ` +${of("unresolved", node)}?`) : null;
    const share = make("span", "share", `${of("correct", node)}/${of("answered", node)}`, open);
    share.title = "correct / answered solutions below, + solutions without an answer";
    marks.push(share);
  }
  if (line.nodes.length > 1) marks.push(make("span", "badge", `×${line.nodes.length}`));
  if (of("merged_from", node)) marks.push(make("span", "badge", "moved up"));
  if (of("outcome", node)) marks.push(badge(of("outcome", node), of("answer", node)));
  return [valueMark(of("score", node)), make("span", "step", ...(needle || line.kind === "prompt" ? highlighted(text) : beginning(node))), ...marks];
}

/** The beginning of a step on one line, with its formulas. Tables are too high for a row, so their source is shown. */
function beginning(node) {
  const parts = [];
  let length = 0;
  for (const part of textOf(node)) {
    const shown = typeof part !== "string" ? part : part.replace(/\s+/g, " ");
    const isTable = typeof part !== "string" && part.querySelector("mtable");
    parts.push(isTable ? oneLine(part.title) : typeof shown === "string" ? shown.slice(0, 400 - length) : shown);
    length += typeof shown === "string" ? shown.length : 10;
    if (length >= 400) break;
  }
  if (typeof parts[0] === "string") parts[0] = parts[0].trimStart();
  if (typeof parts.at(-1) === "string") parts[parts.length - 1] = parts.at(-1).trimEnd();
  return parts;
}

/** The beginning of a text, or the part of it around the search text. */
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

/** Open all steps above a depth. Rollouts stay closed unless everything is opened. */
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

// Details of the selected line

function showDetail(line) {
  const node = line.nodes[0];
  const score = line.kind === "rollouts" ? undefined : of("score", node);
  const outcome = of("outcome", node);
  const headline = make("div", "headline", make("h2", "", titleOf(line)));
  if (score !== undefined) headline.append(valueMark(score));
  if (outcome && line.kind === "node") headline.append(badge(outcome, of("answer", node)));
  const parts = [headline, change(line), make("p", "change", leavesText(line))];
  if (line.kind !== "rollouts") parts.push(make("pre", "", ...textOf(node)));
  parts.push(...endingsPart(line), ...trailPart(line), ...samplePart(line));
  byId("detail").replaceChildren(...parts.filter((part) => part !== null));
  byId("detail").scrollTop = 0;
}

function change(line) {
  if (line.kind !== "node" || of("score", line.nodes[0]) === null) return null;
  const before = of("score", of("parent", line.nodes[0]));
  if (before === null) return null;
  const step = of("score", line.nodes[0]) - before;
  const where = of("parent", line.nodes[0]) === PROMPT ? "the prompt" : "the previous step";
  if (Math.abs(step) < 0.005) return make("p", "change", `Same score as ${where}`);
  return make("p", "change", `${Math.abs(step).toFixed(2)} ${step < 0 ? "below" : "above"} ${where}`);
}

function leavesText(line) {
  const node = line.nodes[0];
  if (line.kind === "rollouts" || !childrenOf.get(node).length) return null;
  const [correct, answered, unresolved] = ["correct", "answered", "unresolved"].map((name) => of(name, node));
  if (!answered && !unresolved) return null;
  const rest = unresolved ? `, ${number(unresolved)} more without an answer` : "";
  return `${number(correct)} of ${number(answered)} answers below are correct${rest}`;
}

function endingsPart(line) {
  if (!line.below.length) return [];
  const found = endings(line.nodes);
  if (!found.length) return [];
  const shown = found.slice(0, 8).map(([outcome, answer, count]) => badge(outcome, answer, count));
  const more = found.length - shown.length;
  if (more) shown.push(make("span", "badge", `${plural(more, "other outcome")}`));
  return [make("h3", "", "Outcomes of the solutions below"), make("div", "headline", ...shown)];
}

function trailPart(line) {
  if (line.kind === "prompt") return [];
  const items = [PROMPT, ...pathTo(of("parent", line.nodes[0]))].map((node) => {
    const score = of("score", node);
    const text = node === PROMPT ? ["Prompt"] : textOf(node);
    const button = make("button", shadeOf(score), make("b", "", score === null ? "–" : score.toFixed(2)), make("span", "", ...text));
    button.type = "button";
    button.addEventListener("click", () => select(lineOf.get(node)));
    return make("li", "", button);
  });
  return [make("h3", "", "Path to this step"), make("ol", "trail-list", ...items)];
}

function samplePart(line) {
  if (line.kind !== "node") return [];
  const node = line.nodes[0];
  const list = (name) => line.nodes.map((i) => of(name, i)).join(", ");
  const stop = of("stop_reason", node);
  const ended = { stop: "a stop string", eos: "the policy", length: "the maximum number of tokens" }[of("finish", node)];
  const cached = of("num_cached", node) ? `, ${number(of("num_cached", node))} of the prefix from cache` : "";
  const merged = of("merged_from", node);
  return [
    make("h3", "", line.nodes.length > 1 ? `${line.nodes.length} equal samples` : "Sample"),
    make("dl", "", ...facts([
      ["Role", of("role", node)],
      ["Ended by", ended, stop === null ? null : make("code", "", ` ${JSON.stringify(stop)}`)],
      of("answer", node) !== null && ["Answer", ...answerOf(of("answer", node)), ` (${of("outcome", node)})`],
      ["Tokens", number(of("num_tokens", node)) + cached],
      ["Seed", list("seed")],
      of("weight", node) !== 1 && ["Weight", `represents ${of("weight", node)} siblings`],
      merged && ["Merged from", make("code", "", merged.join(" + "))],
      ["Node", make("code", "", list("node_id"))],
    ])),
  ];
}
