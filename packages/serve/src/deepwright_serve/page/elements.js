// Building blocks: elements, icons, the clipboard, and the line of news at the bottom.

const find = (id) => document.getElementById(id);

/** An element with properties and children; strings become text nodes. */
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const icon = (name) => find(`icon-${name}`).content.firstElementChild.cloneNode(true);
const seconds = (ms) => (ms < 60000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(ms / 60000)} min ${Math.round((ms % 60000) / 1000)} s`);

/** A button with an icon and a word, or with an icon alone and its word for who cannot see it. */
function tool(name, word, onClick, { bare = false, className = "" } = {}) {
  const button = make("button", { type: "button", className, title: bare ? word : "" }, icon(name), ...(bare ? [] : [make("span", {}, word)]));
  if (bare) button.ariaLabel = word;
  button.addEventListener("click", () => onClick(button));
  return button;
}

async function copy(text, button) {
  const label = button.querySelector("span") || button;
  const before = label.textContent;
  label.textContent = (await toClipboard(text)) ? "Copied" : "Not allowed";
  setTimeout(() => { label.textContent = before; }, 1500);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { /* Not a secure context, or forbidden: the old way. */ }
  const field = make("textarea", { value: text, readOnly: true, className: "unseen" });
  document.body.append(field);
  field.select();
  try { return document.execCommand("copy"); } catch { return false; } finally { field.remove(); }
}

let newsTimer = 0;

/** Say something at the bottom of the page, with something that can be done about it, for a while. */
function news(text, word = "", action = null) {
  const parts = [make("span", {}, text)];
  if (action) parts.push(tool("again", word, () => { hideNews(); action(); }));
  find("news").replaceChildren(...parts);
  find("news").hidden = false;
  clearTimeout(newsTimer);
  newsTimer = setTimeout(hideNews, 8000);
}

function hideNews() {
  find("news").hidden = true;
}
