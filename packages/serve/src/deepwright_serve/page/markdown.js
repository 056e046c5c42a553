// Markdown -> nodes. A small part of Markdown. Every piece of the text ends in a text node; no piece is ever parsed as
// HTML, and only http and https become links. Each function looks at each character a bounded number of times, so that
// no text that a model writes can hold up the page.

const MARK = /`+|\*\*?|~~|\[|https?:\/\//g;
const LINK = /\[([^\]\n]{1,1000})\]\((https?:\/\/[^\s()<>]{1,2000})\)/y;
const ADDRESS = /https?:\/\/[^\s<>()]{1,2000}/y;
const DEEPEST = 6, WIDEST = 64;

const matchAt = (pattern, text, at) => { pattern.lastIndex = at; return pattern.exec(text); };
const isSpace = (character) => character === undefined || /\s/.test(character);
const isWord = (character) => character !== undefined && /[\p{L}\p{N}_]/u.test(character);
const link = (target, label) => make("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, label);

/** The nodes of a line or of several. */
function inline(text, depth = 0) {
  const nodes = [];
  const hopeless = new Set(); // marks that are not closed anywhere behind
  const mark = new RegExp(MARK);
  let from = 0, match;
  const take = (start, end, node) => { if (start > from) nodes.push(text.slice(from, start)); nodes.push(node); from = mark.lastIndex = end; };
  while ((match = mark.exec(text))) {
    const [found] = match, at = match.index;
    if (found[0] === "`") {
      const end = hopeless.has(found) ? -1 : closingTicks(text, found, at + found.length);
      if (end < 0) { hopeless.add(found); continue; }
      const code = text.slice(at + found.length, end);
      take(at, end + found.length, make("code", {}, code.trim() || code));
    } else if (found === "[") {
      const linked = matchAt(LINK, text, at);
      if (linked) take(at, at + linked[0].length, link(linked[2], linked[1]));
    } else if (found.startsWith("http")) {
      const target = matchAt(ADDRESS, text, at)?.[0].replace(/[.,;:!?'"*`]+$/, "");
      if (target && target.length > found.length && !isWord(text[at - 1])) take(at, at + target.length, link(target, target));
    } else {
      if (depth >= DEEPEST || hopeless.has(found) || isSpace(text[at + found.length]) || (found === "*" && isWord(text[at - 1]))) continue;
      const end = closing(text, found, at + found.length);
      if (end < 0) { hopeless.add(found); continue; }
      const inner = inline(text.slice(at + found.length, end), depth + 1);
      take(at, end + found.length, make({ "**": "strong", "*": "em", "~~": "s" }[found], {}, ...inner));
    }
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

/** Where a run of exactly these back-ticks stands. */
function closingTicks(text, ticks, from) {
  for (let at = text.indexOf(ticks, from); at >= 0;) {
    let end = at;
    while (text[end] === "`") end += 1;
    if (end - at === ticks.length) return at;
    at = text.indexOf(ticks, end);
  }
  return -1;
}

/** Where the mark stands again, behind something that is no space. */
function closing(text, found, from) {
  for (let at = text.indexOf(found, from + 1); at >= 0; at = text.indexOf(found, at + found.length)) {
    if (isSpace(text[at - 1])) continue;
    if (found !== "*") return at;
    if (text[at + 1] === "*") at += 1;
    else if (text[at - 1] !== "*" && !isWord(text[at + 1])) return at;
  }
  return -1;
}

const lines = (text) => text.split("\n").flatMap((line, n) => (n ? [make("br"), ...inline(line)] : inline(line)));
const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(\S.*|)$/;
const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([^\s`]{0,40})/;

const isRule = (line) => line.length < 200 && /^\s{0,3}(?:-[\s-]*-[\s-]*-|\*[\s*]*\*[\s*]*\*|_[\s_]*_[\s_]*_)\s*$/.test(line);
const isHeading = (line) => /^#{1,6}\s/.test(line);
const isTable = (line, next = "") => line.includes("|") && next.includes("|") && next.includes("-") && next.length < 2000 && /^[\s|:-]+$/.test(next) && cells(line).length <= WIDEST;

// A list is cut at an item after so many lines, into lists that look like one: what is settled of it is made once.
// Not where all items have the number 1, of which each list would begin again.
const PART = 100;
const cutBefore = (line, first) => {
  const [item, list] = [ITEM.exec(line), ITEM.exec(first)];
  return item && item[1].length <= list[1].length + 1 && Number(item[3] ?? 2) > 1;
};

/** The blocks of a text: for each the number of its first line, and a function that makes its node. */
function split(source, depth = 0) {
  const found = [];
  let at = 0;
  const takeWhile = (test) => { const from = at; while (at < source.length && test(source[at], at - from)) at += 1; return source.slice(from, at); };
  while (at < source.length) {
    const first = at, line = source[at];
    const add = (build) => found.push({ first, build });
    const fence = FENCE.exec(line);
    if (!line.trim()) at += 1;
    else if (fence) {
      at += 1;
      const body = takeWhile((l) => !l.trimStart().startsWith(fence[1]));
      at += 1;
      add(() => codeBlock(body.join("\n"), fence[2]));
    } else if (isHeading(line)) {
      at += 1;
      const level = Math.min(line.indexOf(" ") < 0 ? 4 : line.search(/[^#]/), 4);
      add(() => make(`h${level}`, {}, ...inline(withoutHashes(line))));
    } else if (isRule(line)) {
      at += 1;
      add(() => make("hr"));
    } else if (/^\s{0,3}>/.test(line) && depth < DEEPEST) {
      const quoted = takeWhile((l) => /^\s{0,3}>/.test(l)).map((l) => l.replace(/^\s{0,3}>\s?/, ""));
      add(() => make("blockquote", {}, ...blocks(quoted, depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const items = takeWhile((l, n) => (ITEM.test(l) || (n && /^\s{2,}\S/.test(l))) && !(n >= PART && cutBefore(l, line)));
      add(() => list(items, depth));
    } else if (isTable(line, source[at + 1])) {
      at += 2;
      const rows = takeWhile((l) => l.includes("|"));
      add(() => table(line, rows));
    } else {
      const paragraph = takeWhile((l, n) => l.trim() && !(n && (FENCE.test(l) || isHeading(l) || /^\s{0,3}>/.test(l) || ITEM.test(l))));
      add(() => make("p", {}, ...lines(paragraph.join("\n"))));
    }
  }
  return found;
}

const blocks = (source, depth = 0) => split(source, depth).map((block) => block.build());

function withoutHashes(line) {
  const text = line.replace(/^#+/, "").trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return end < text.length && isSpace(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
}

function list(source, depth) {
  const [, indent, bullet, start] = ITEM.exec(source[0]);
  const node = bullet ? make("ul") : make("ol", { start: Number(start) });
  let item = [];
  const close = () => { if (item.length) node.append(make("li", {}, ...lines(item[0]), ...(item.length > 1 ? blocks(item.slice(1), depth + 1) : []))); };
  for (const line of source) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= indent.length + 1) { close(); item = [match[4]]; }
    else item.push(line.slice(Math.min(indent.length + 2, line.search(/\S/))));
  }
  close();
  return node;
}

function table(head, rows) {
  const row = (line, tag) => make("tr", {}, ...cells(line).slice(0, WIDEST).map((cell) => make(tag, {}, ...inline(cell))));
  return make("div", { className: "table", tabIndex: 0 },
    make("table", {}, make("thead", {}, row(head, "th")), make("tbody", {}, ...rows.map((line) => row(line, "td")))));
}

function codeBlock(text, language) {
  const button = make("button", { type: "button" }, make("span", {}, "Copy"));
  button.addEventListener("click", () => copy(text, button));
  return make("div", { className: "code" },
    make("div", { className: "bar" }, make("span", {}, language || "code"), button),
    make("pre", { tabIndex: 0 }, make("code", {}, text)));
}

// A line that is half written may be taken for a block of its own, and turn out to belong to the one before.
const UNSETTLED = 2;

/** A place for a text that grows: all blocks but the last are made once. */
function prose() {
  const node = make("div", { className: "prose" });
  let shown = "", settled = 0, kept = 0;
  function draw(text) {
    if (text === shown) return;
    if (!text.startsWith(shown)) { settled = kept = 0; }
    shown = text;
    const source = text.slice(settled).split("\n");
    const found = split(source);
    while (node.childNodes.length > kept) node.lastChild.remove();
    node.append(...found.map((block) => block.build()));
    const open = Math.max(found.length - UNSETTLED, 0);
    if (!open) return;
    kept += open;
    for (let line = 0; line < found[open].first; line += 1) settled += source[line].length + 1;
  }
  return { node, draw };
}
