// Overview: one bar per node, with the number of leaves below it as width

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

/** Bars of the nodes selected by `keep`, by shade. Neighbours narrower than a pixel share a bar with their mean score. */
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

/** Search results keep their colour, and other nodes fade. */
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

/** Find the node under the pointer by bisection in its level. */
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
    : `${titleOf(lines[lineOf.get(node)])}, MC score ${score === null ? "none" : score.toFixed(2)}: ${oneLine(of("text", node)).slice(0, 240)}`;
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
  if (event.target === byId("search") || event.ctrlKey || event.metaKey || event.altKey) return;
  const link = { p: "previous", n: "next" }[event.key];
  if (link in data.links) location.href = data.links[link];
  if (event.key !== "/") return;
  event.preventDefault();
  byId("search").focus();
});

// Head

const { problem, totals } = data;
document.title = `${problem.id} · search tree`;
byId("kicker").append(...(data.run ? [make("span", "", data.run), " · "] : []), "problem ", make("span", "", problem.id), make("span", "status", problem.status.replaceAll("_", " ")));
byId("problem").append(...textOf(PROMPT));
for (const [name, href] of Object.entries(data.links)) byId(`page-${name}`).href = href;
const rootScore = of("score", PROMPT);
byId("facts").append(...facts([
  ["Reference answer", ...(problem.answer === null ? [null] : answerOf(problem.answer))],
  ["MC score of the prompt", rootScore === null ? "none" : rootScore.toFixed(3), make("span", "note", data.basis ? ` ${data.basis}` : "")],
  of("answered", PROMPT) > 0 && ["Correct answers", `${number(of("correct", PROMPT))} of ${number(of("answered", PROMPT))}`,
    of("unresolved", PROMPT) ? make("span", "note", `, ${number(of("unresolved", PROMPT))} more without an answer`) : null],
  ["Nodes", number(totals.num_nodes)],
  totals.num_tokens > 0 && ["Tokens generated", number(totals.num_tokens)],
  totals.num_tokens > 0 && ["Tokens from cache", number(totals.num_cached)],
]));
if (deepest > 0) byId("depths").append(make("span", "", "Open to"));
for (let depth = 1; depth <= Math.min(deepest, 7); depth++) {
  const button = make("button", "", depth === Math.min(deepest, 7) ? "all" : String(depth));
  button.type = "button";
  button.value = depth === Math.min(deepest, 7) ? deepest : depth;
  button.addEventListener("click", () => openTo(Number(button.value)));
  byId("depths").append(button);
}

// Initially open as many levels as fit into 40 rows

const numRows = (most) => {
  if (most >= deepest) return lines.length;
  return lines.filter((line) => line.depth <= most && (line.above < 0 || lines[line.above].kind !== "rollouts")).length;
};
let depth = 1;
while (depth < deepest && numRows(depth + 1) <= 40) depth++;
openTo(Math.min(depth, deepest));
new ResizeObserver(() => drawRows()).observe(tree);
new ResizeObserver(() => drawPicture()).observe(picture);
