// Conversations, kept in this browser and nowhere else: one entry of the local storage each, and one for the settings.
// A conversation is a tree: an edited question or another answer is a sibling of the first, and `leaf` names the end of
// the branch that is shown.

const PLACE = "deepwright.chat.2";
const FORMAT = "deepwright.chat";
const LONGEST_TITLE = 80;
const DEFAULTS = {
  temperature: null, topP: null, topK: null, minP: null, presence: null, frequency: null, repetition: null, seed: null,
  maxTokens: null, system: "", tools: "", thinking: "auto", budget: null, theme: "auto", model: "", side: null,
};
const state = { conversations: new Map(), current: null, settings: { ...DEFAULTS } };

const freshId = () => `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
const newest = () => [...state.conversations.values()].sort((a, b) => b.changed - a.changed);

function fresh() {
  return { id: freshId(), title: "", changed: Date.now(), messages: [], leaf: null };
}

/** A conversation out of what somebody stored or imported: what is not understood is left out; null when nothing is. */
function readConversation(raw) {
  if (!raw || typeof raw !== "object" || !Array.isArray(raw.messages)) return null;
  const known = new Set();
  const messages = [];
  for (const one of raw.messages) {
    if (!one || !["user", "assistant", "tool"].includes(one.role) || typeof one.content !== "string" || typeof one.id !== "string") continue;
    if (known.has(one.id) || !(one.parent === null || known.has(one.parent))) continue;
    known.add(one.id);
    const message = { id: one.id, parent: one.parent, role: one.role, content: one.content };
    for (const field of ["reasoning", "figures", "problem", "model", "call"]) if (typeof one[field] === "string") message[field] = one[field];
    if (Number.isFinite(one.thoughtFor)) message.thoughtFor = one.thoughtFor;
    if (Array.isArray(one.calls)) {
      message.calls = one.calls.filter((call) => call && typeof call.id === "string" && typeof call.name === "string" && typeof call.arguments === "string")
        .map((call) => ({ id: call.id, name: call.name, arguments: call.arguments }));
    }
    messages.push(message);
  }
  if (!messages.length) return null;
  return {
    id: typeof raw.id === "string" && /^[a-z0-9]{1,40}$/.test(raw.id) ? raw.id : freshId(),
    title: typeof raw.title === "string" ? raw.title.slice(0, LONGEST_TITLE) : "",
    changed: Number.isFinite(raw.changed) ? raw.changed : Date.now(),
    messages,
    leaf: known.has(raw.leaf) ? raw.leaf : messages.at(-1).id,
  };
}

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) || "{}");
    for (const field of Object.keys(DEFAULTS)) if (typeof kept[field] === typeof DEFAULTS[field] || (DEFAULTS[field] === null && kept[field] !== undefined)) state.settings[field] = kept[field];
    for (let n = 0; n < localStorage.length; n += 1) {
      const key = localStorage.key(n);
      if (!key.startsWith(`${PLACE}.c.`)) continue;
      try {
        const conversation = readConversation(JSON.parse(localStorage.getItem(key)));
        if (conversation) state.conversations.set(conversation.id, conversation);
      } catch { /* Not ours: leave it. */ }
    }
    state.current = state.conversations.get(sessionStorage.getItem(`${PLACE}.current`)) || newest()[0] || fresh();
  } catch { /* No storage: everything lives as long as the page. */ }
  state.current ??= fresh();
}

function store(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    news("This browser has no room left for conversations; export and delete some.");
  }
}

const keepSettings = () => store(PLACE, state.settings);

/** Keep a conversation as it now is. What is being written is not kept until it is finished. */
function keep(conversation) {
  if (!conversation.messages.length) return;
  conversation.changed = Date.now();
  state.conversations.set(conversation.id, conversation);
  store(`${PLACE}.c.${conversation.id}`, { ...conversation, messages: conversation.messages.map(({ live, thoughtFrom, ...rest }) => rest) });
}

/** Take in what another tab has added to a conversation that is open here, too; the branch that is shown stays. */
function absorb(conversation, other) {
  const known = new Set(conversation.messages.map((message) => message.id));
  conversation.messages.push(...other.messages.filter((message) => !known.has(message.id)));
  conversation.title = other.title;
  conversation.changed = Math.max(conversation.changed, other.changed);
}

function remove(conversation) {
  state.conversations.delete(conversation.id);
  try { localStorage.removeItem(`${PLACE}.c.${conversation.id}`); } catch { /* Nothing was kept, then. */ }
}

function remember(conversation) {
  state.current = conversation;
  try { sessionStorage.setItem(`${PLACE}.current`, conversation.id); } catch { /* Not over a reload, then. */ }
}

const readKey = () => { try { return sessionStorage.getItem(`${PLACE}.key`) || ""; } catch { return ""; } };
const keepKey = (key) => { try { sessionStorage.setItem(`${PLACE}.key`, key); } catch { /* Not kept, then. */ } };

// The tree -------------------------------------------------------------------------------------------

const siblings = (conversation, message) => conversation.messages.filter((other) => other.parent === message.parent && other.role === message.role);

/** The messages of the branch that is shown, in order. */
function branch(conversation, leaf = conversation.leaf) {
  const parents = new Map(conversation.messages.map((message) => [message.id, message]));
  const shown = [];
  for (let at = parents.get(leaf); at; at = parents.get(at.parent)) shown.unshift(at);
  return shown;
}

/** Put a message behind another (null: at the beginning), and show the branch that it ends. */
function add(conversation, parent, fields) {
  const message = { id: freshId(), parent, content: "", ...fields };
  conversation.messages.push(message);
  conversation.leaf = message.id;
  if (!conversation.title && message.role === "user") conversation.title = message.content.trim().replace(/\s+/g, " ").slice(0, LONGEST_TITLE);
  return message;
}

/** Show the branch of another sibling, down to its newest end. */
function turnTo(conversation, message) {
  let end = message;
  for (;;) {
    const next = conversation.messages.filter((other) => other.parent === end.id).at(-1);
    if (!next) break;
    end = next;
  }
  conversation.leaf = end.id;
}

// Out and in -----------------------------------------------------------------------------------------

function exportAll(conversations) {
  const text = JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const anchor = make("a", { href: address, download: conversations.length === 1 ? "conversation.json" : "conversations.json" });
  document.body.append(anchor);
  anchor.click();
  anchor.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** Take conversations out of a file; those that are here already stay as they are. Returns how many came. */
function importAll(text) {
  let raw;
  try { raw = JSON.parse(text); } catch { throw new Error("This file is no JSON; choose one that was exported here."); }
  if (raw?.format !== FORMAT || !Array.isArray(raw.conversations)) throw new Error("This file holds no conversations; choose one that was exported here.");
  const read = raw.conversations.map(readConversation).filter(Boolean);
  for (const conversation of read) {
    if (state.conversations.has(conversation.id)) conversation.id = freshId();
    const { changed } = conversation;
    keep(conversation);
    conversation.changed = changed;
  }
  return read.length;
}
