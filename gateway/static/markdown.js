// Markdown of answers as they grow: headings, paragraphs, lists, quotes, tables, code, emphasis and
// links. It makes elements and text, never HTML out of a string, so an answer cannot bring any; links
// lead to http, https and mailto alone, and pictures of other hosts are links.

const make = (tag, attributes = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};

const LONGEST = 20_000; // characters of a paragraph; what is longer is text
const MOST_COLUMNS = 64;
const DEEPEST = 8; // levels of lists, quotes and emphasis; what is deeper is text

// Every pattern below takes time in proportion to its line: no two parts can take the same characters.
const FENCE = /^( {0,3})(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/s;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+)(?=\S)/;
const CELLS_RULE = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;
const blank = (line) => !/\S/.test(line);
const textFrom = (lines, from) => { // the next line that is not blank; -1: none
  while (from < lines.length && blank(lines[from])) from += 1;
  return from < lines.length ? from : -1;
};

/** Markdown in an element, by the text so far; what cannot change any more is left alone. */
export class Markdown {
  constructor(root) { Object.assign(this, { root, text: "", settled: 0, kept: 0 }); }

  /** Show `text`; if it begins with what was shown before, its last block alone is made again. */
  set(text) {
    text = text.replaceAll("\r", "");
    if (text === this.text) return;
    if (!text.startsWith(this.text)) this.settled = this.kept = 0;
    this.text = text;
    const blocks = parse(text.slice(this.settled).split("\n"));
    while (this.root.childNodes.length > this.kept) this.root.lastChild.remove();
    this.root.append(...blocks.map((block) => block.node));
    // A block is settled when the one behind it has begun with a whole line.
    const whole = text.lastIndexOf("\n") + 1;
    const open = blocks.findLastIndex((block) => this.settled + block.at < whole);
    if (open > 0) { this.kept += open; this.settled += blocks[open].at; }
  }
}

/** Parse lines into blocks: {at, node}, where `at` is how many characters come before. */
function parse(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  for (let here = 0; here < lines.length;) {
    let count = 1;
    if (!blank(lines[here])) {
      const [node, taken] = block(lines, here, depth);
      blocks.push({ at, node });
      count = taken;
    }
    for (const end = here + count; here < end; here += 1) at += lines[here].length + 1;
  }
  return blocks;
}

/** Return the block that begins at a line, and how many lines it takes. */
function block(lines, here, depth) {
  const line = lines[here];
  let found;
  if ((found = FENCE.exec(line))) return code(lines, here, found);
  if ((found = HEADING.exec(line))) {
    return [make(`h${Math.min(6, found[1].length + 2)}`, {}, ...inline(title(found[2]))), 1];
  }
  if (RULE.test(line)) return [make("hr"), 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, here, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, here, depth);
  if (isTable(lines, here)) return table(lines, here);
  let end = here + 1;
  while (end < lines.length && !blank(lines[end]) && !interrupts(lines[end])) end += 1;
  return [make("p", {}, ...inline(lines.slice(here, end).join("\n"))), end - here];
}

/** A heading's text without the #s that may close it. */
function title(text) {
  const whole = text.trimEnd();
  let end = whole.length;
  while (whole[end - 1] === "#") end -= 1;
  return end === 0 || /[ \t]/.test(whole[end - 1]) ? whole.slice(0, end).trimEnd() : whole;
}

/** Whether a line ends the paragraph before it; of numbered lists only those from 1. */
function interrupts(line) {
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)
    || (item !== null && (/^[-*+]$/.test(item[2]) || /^1\D$/.test(item[2])));
}

function code(lines, here, [, indent, fence, language]) {
  const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
  let end = here + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const margin = new RegExp(`^ {0,${indent.length}}`);
  const text = lines.slice(here + 1, end).map((line) => line.replace(margin, "")).join("\n");
  const bar = make("div", { className: "bar" },
    make("span", { textContent: language.trim().split(/\s/)[0] || "text" }),
    make("button", { type: "button", className: "quiet", textContent: "Copy" }));
  bar.lastChild.dataset.copy = "code";
  const block = make("pre", { tabIndex: 0 }, make("code", { textContent: text }));
  return [make("div", { className: "code" }, bar, block), Math.min(lines.length, end + 1) - here];
}

function quote(lines, here, depth) {
  let end = here;
  const inner = [];
  while (end < lines.length && (QUOTE.test(lines[end]) || (end > here && !blank(lines[end]) && !interrupts(lines[end]))))
    inner.push(lines[end++].replace(QUOTE, ""));
  return [make("blockquote", {}, ...parse(inner, depth + 1).map((each) => each.node)), end - here];
}

function list(lines, here, depth) {
  const [, , first] = ITEM.exec(lines[here]);
  const numbered = /\d/.test(first);
  const node = make(numbered ? "ol" : "ul");
  if (numbered && !/^1\D$/.test(first)) node.start = parseInt(first, 10);
  let end = here;
  for (let found; end < lines.length && (found = ITEM.exec(lines[end])) && found[2].at(-1) === first.at(-1);) {
    if (RULE.test(lines[end])) break;
    const width = found[1].length + found[2].length + Math.min(found[3].length, 4);
    const inner = [lines[end++].slice(width)];
    const belongs = (line) => line.search(/\S/) >= width;
    for (; end < lines.length; end += 1) {
      const next = textFrom(lines, end);
      if (next < 0 || (next > end && !belongs(lines[next]))) break;
      for (; end < next; end += 1) inner.push("");
      if (!belongs(lines[end]) && (interrupts(lines[end]) || ITEM.test(lines[end]))) break;
      inner.push(belongs(lines[end]) ? lines[end].slice(width) : lines[end].trimStart());
    }
    const blocks = parse(inner, depth + 1).map((each) => each.node);
    const [head] = blocks;
    node.append(make("li", {}, ...(head?.tagName === "P" ? [...head.childNodes, ...blocks.slice(1)] : blocks)));
    const next = textFrom(lines, end);
    if (next > end && ITEM.exec(lines[next])?.[2].at(-1) === first.at(-1)) end = next;
  }
  return [node, end - here];
}

const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/)
  .map((cell) => cell.trim().replaceAll("\\|", "|"));

function isTable(lines, here) {
  const [head, rule] = [lines[here], lines[here + 1] ?? ""];
  return head.includes("|") && rule.includes("-") && CELLS_RULE.test(rule.trim())
    && cells(rule).length <= MOST_COLUMNS && cells(head).length === cells(rule).length;
}

function table(lines, here) {
  const head = cells(lines[here]);
  const row = (tag, texts) => make("tr", {}, ...head.map((_, column) => make(tag, {}, ...inline(texts[column] ?? ""))));
  let end = here + 2;
  const body = make("tbody");
  while (end < lines.length && lines[end].includes("|")) body.append(row("td", cells(lines[end++])));
  const node = make("table", {}, make("thead", {}, row("th", head)), body);
  return [make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Table" }, node), end - here];
}

// --- Within a line. -------------------------------------------------------------------------------
const INLINE = [
  [/\\([!-/:-@[-`{-~])/y, ([, sign]) => sign],
  [/!?\[([^[\]\n]*)\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)/y, ([all, text, url], depth) => link(url, text, depth) ?? all],
  [/<?(https?:\/\/[^\s<>]*[^\s<>.,:;!?'")\]}*_])>?/y, ([all, url], depth) => link(url, url, depth) ?? all],
  [/\*(?=[^\s*])([^*\n]*?[^\s\\*])\*|(?<![\p{L}\d])_(?=[^\s_])([^_\n]*?[^\s\\_])_(?![\p{L}\d])/yu,
    ([, text, other], depth) => make("em", {}, ...inline(text ?? other, depth + 1))],
];
const PAIRS = { // what opens and closes, where it closes, and what it makes
  "**": [/(?<=[^\s\\])\*\*(?![*_])/g, "strong"],
  "__": [/(?<=[^\s\\])__(?![*_])/g, "strong"],
  "~~": [/(?<=\S)~~/g, "del"],
};
const PLAIN = /[^\\`![<h*_~]+/y;

function inline(text, depth = 0) {
  if (depth > DEEPEST || text.length > LONGEST) return [text];
  const nodes = [];
  const known = {}; // where each pattern matches next: it is looked for once, however often asked
  const next = (name, pattern, from) => {
    pattern.lastIndex = from;
    if (!(known[name] >= from)) known[name] = pattern.exec(text)?.index ?? Infinity;
    return known[name];
  };
  const unclosed = new Set(); // lengths of backticks that do not come again
  let plain = "";
  for (let here = 0; here < text.length;) {
    const match = (pattern) => { pattern.lastIndex = here; return pattern.exec(text); };
    let found = match(PLAIN);
    if (found) { plain += found[0]; here += found[0].length; continue; }
    if ((found = match(/`+/y))) {
      const count = found[0].length;
      const end = unclosed.has(count) ? -1 : closing(text, here + count, count);
      let inside = end < 0 ? "" : text.slice(here + count, end);
      if (inside.startsWith(" ") && inside.endsWith(" ") && !blank(inside)) inside = inside.slice(1, -1);
      if (end < 0) { plain += found[0]; unclosed.add(count); }
      else { nodes.push(plain, make("code", { textContent: inside })); plain = ""; }
      here = (end < 0 ? here : end) + found[0].length;
      continue;
    }
    const mark = text.slice(here, here + 2);
    if (Object.hasOwn(PAIRS, mark) && /\S/.test(text[here + 2] ?? "")) {
      const [closes, tag] = PAIRS[mark];
      const end = next(mark, closes, here + 3);
      if (end < next("\n", /\n/g, here + 2)) {
        nodes.push(plain, make(tag, {}, ...inline(text.slice(here + 2, end), depth + 1)));
        [plain, here] = ["", end + 2];
        continue;
      }
    }
    const rule = INLINE.find(([pattern]) => (found = match(pattern)));
    if (!rule) { plain += text[here]; here += 1; continue; }
    const made = rule[1](found, depth);
    if (typeof made === "string") plain += made;
    else { nodes.push(plain, made); plain = ""; }
    here += found[0].length;
  }
  return [...nodes, plain].filter((node) => node !== "");
}

/** Where the next run of exactly so many backticks begins; -1: nowhere. */
function closing(text, from, count) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let found; (found = runs.exec(text));) if (found[0].length === count) return found.index;
  return -1;
}

/** A link, unless it leads to a foreign scheme or would lie in another one. */
function link(url, text, depth) {
  if (depth >= DEEPEST || !/^(https?:\/\/|mailto:)./i.test(url)) return null;
  const attributes = { href: url, title: url, target: "_blank", rel: "noopener noreferrer nofollow" };
  return make("a", attributes, ...inline(text || url, DEEPEST));
}
