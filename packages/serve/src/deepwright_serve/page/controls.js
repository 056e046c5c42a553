// Everything around the conversation: the composer, the list, the settings, the keys.

const narrow = matchMedia("(max-width: 60rem)");

function drawBusy() {
  const controller = running.get(state.current.id);
  document.body.classList.toggle("busy", Boolean(controller));
  find("send").hidden = Boolean(controller);
  find("stop").hidden = !controller;
  log.setAttribute("aria-busy", String(Boolean(controller)));
  find("send").disabled = !question.value.trim();
}

function drawModels() {
  const select = find("model");
  select.replaceChildren(...models.cards.map((card) => make("option", { value: card.id }, card.parent ? `${card.id} (on ${card.parent})` : card.id)));
  select.value = state.settings.model;
  select.hidden = false;
}

// The composer ---------------------------------------------------------------------------------------

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  drawBusy();
}

function send() {
  const text = question.value.trim();
  const conversation = state.current;
  if (!text || running.has(conversation.id)) return;
  question.value = "";
  grow();
  add(conversation, conversation.leaf, { role: "user", content: text });
  answer(conversation);
}

const stop = () => running.get(state.current.id)?.abort();

function begin() {
  show(fresh());
  closeDrawer();
  grow();
  question.focus();
}

question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  else if (event.key === "ArrowUp" && !question.value) {
    const edits = log.querySelectorAll(".turn.user [aria-label=Edit]");
    if (edits.length) { event.preventDefault(); edits[edits.length - 1].click(); }
  }
});
find("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
find("stop").addEventListener("click", stop);
for (const idea of document.querySelectorAll(".ideas button")) {
  idea.addEventListener("click", () => { question.value = idea.textContent; send(); });
}

// The list of conversations --------------------------------------------------------------------------

function drawList() {
  const rows = newest().map((conversation) => {
    const open = make("button", { type: "button", className: "open", title: conversation.title }, conversation.title || "Untitled");
    open.addEventListener("click", () => { show(conversation); closeDrawer(); question.focus(); });
    const row = make("li", { className: conversation === state.current ? "here" : "" }, open,
      ...(running.has(conversation.id) ? [make("i", { className: "writing", title: "Being answered" })] : []),
      tool("edit", "Rename", () => rename(conversation, row, open), { bare: true }),
      tool("export", "Export", () => exportAll([conversation]), { bare: true }),
      tool("bin", "Delete", () => drop(conversation), { bare: true }));
    if (conversation === state.current) open.setAttribute("aria-current", "true");
    return row;
  });
  find("list").replaceChildren(...rows);
  find("nothing").hidden = rows.length > 0;
}

function rename(conversation, row, open) {
  const field = make("input", { type: "text", value: conversation.title, maxLength: LONGEST_TITLE, ariaLabel: "Name of the conversation" });
  let closed = false;
  const close = (taken, byKey = false) => {
    // Taking the field away makes it lose the focus, which closes it again.
    if (closed) return;
    closed = true;
    if (taken && field.value.trim()) { conversation.title = field.value.trim(); const { changed } = conversation; keep(conversation); conversation.changed = changed; }
    drawList();
    if (byKey) find("list").children[newest().indexOf(conversation)]?.querySelector(".open").focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") close(true, true);
    else if (event.key === "Escape") { event.stopPropagation(); close(false, true); }
  });
  field.addEventListener("blur", () => close(true));
  row.classList.add("naming");
  open.replaceWith(field);
  field.select();
}

function drop(conversation) {
  running.get(conversation.id)?.abort();
  remove(conversation);
  if (conversation === state.current) show(newest()[0] || fresh());
  else drawList();
  (find("list").querySelector("[aria-current]") || find("new")).focus();
  news("The conversation is deleted.", "Undo", () => { keep(conversation); show(conversation); });
}

function drawer(open) {
  document.body.classList.toggle("side", open);
  find("toggle").setAttribute("aria-expanded", String(open));
  if (!narrow.matches) { state.settings.side = open; keepSettings(); }
}
const closeDrawer = () => { if (narrow.matches) drawer(false); };
const toggleDrawer = () => {
  drawer(!document.body.classList.contains("side"));
  if (document.body.classList.contains("side")) (find("list").querySelector("[aria-current]") || find("new")).focus();
};

find("toggle").addEventListener("click", toggleDrawer);
find("shade").addEventListener("click", closeDrawer);
narrow.addEventListener("change", () => drawer(!narrow.matches && state.settings.side !== false));
find("new").addEventListener("click", begin);
find("new-short").addEventListener("click", begin);
find("export").addEventListener("click", () => (state.conversations.size ? exportAll(newest()) : news("There is nothing to export yet.")));
find("import").addEventListener("click", () => find("file").click());
find("file").addEventListener("change", async () => {
  const [file] = find("file").files;
  if (!file) return;
  try {
    const count = importAll(await file.text());
    show(newest()[0] || state.current);
    news(count === 1 ? "One conversation was imported." : `${count} conversations were imported.`);
  } catch (error) { news(error.message); }
  find("file").value = "";
});
addEventListener("storage", (event) => {
  // Another tab has changed something: the list follows, and what is shown here stays, with what came as its siblings.
  if (!event.key?.startsWith(`${PLACE}.c.`)) return;
  const id = event.key.slice(`${PLACE}.c.`.length);
  const there = event.newValue ? readConversation(JSON.parse(event.newValue)) : null;
  const here = state.current.id === id ? state.current : running.has(id) ? state.conversations.get(id) : null;
  if (here && there) absorb(here, there);
  else if (there) state.conversations.set(id, there);
  else {
    running.get(id)?.abort();
    state.conversations.delete(id);
  }
  if (here === state.current) for (const view of views.values()) view.draw();
  drawList();
});
// What an answer has brought so far outlives a page that is closed or loaded again.
addEventListener("pagehide", () => { for (const id of running.keys()) if (state.conversations.has(id)) keep(state.conversations.get(id)); });

// Settings -------------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const { theme } = state.settings;
  document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
}
dark.addEventListener("change", paint);

const NUMBERS = ["temperature", "topP", "topK", "minP", "presence", "frequency", "repetition", "seed", "maxTokens", "budget"];
const fieldOf = (setting) => find(setting.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`));

function drawSettings() {
  const { settings } = state;
  for (const setting of NUMBERS) fieldOf(setting).value = settings[setting] ?? "";
  for (const setting of ["system", "tools", "theme"]) find(setting).value = settings[setting];
  find("key").value = readKey();
  for (const radio of document.querySelectorAll("[name=thinking]")) radio.checked = radio.value === settings.thinking;
  find("budget-field").hidden = settings.thinking === "disabled";
  checkTools();
}

function checkTools() {
  let wrong = "";
  try {
    if (find("tools").value.trim() && !Array.isArray(JSON.parse(find("tools").value))) wrong = "This is no list; begin with [.";
  } catch (error) { wrong = `This is no JSON: ${error.message}.`; }
  find("tools-wrong").textContent = wrong;
  find("tools").setAttribute("aria-invalid", String(Boolean(wrong)));
  return !wrong;
}

for (const setting of NUMBERS) {
  const field = fieldOf(setting);
  field.addEventListener("input", () => {
    const value = field.value.trim() === "" ? null : Number(field.value);
    field.setAttribute("aria-invalid", String(!field.validity.valid));
    // What the field calls wrong is not sent: the server would refuse the whole request.
    state.settings[setting] = field.validity.valid && Number.isFinite(value) ? value : null;
    keepSettings();
  });
}
for (const setting of ["system", "theme"]) {
  find(setting).addEventListener("input", () => { state.settings[setting] = find(setting).value; keepSettings(); paint(); });
}
find("tools").addEventListener("input", () => { state.settings.tools = checkTools() ? find("tools").value : ""; keepSettings(); });
find("key").addEventListener("input", () => { keepKey(find("key").value.trim()); models.cards = []; });
find("settings").addEventListener("close", () => { if (!models.cards.length) loadModels().catch(() => {}); });
find("model").addEventListener("change", () => { state.settings.model = find("model").value; keepSettings(); });
find("model").addEventListener("pointerdown", () => { loadModels().catch(() => {}); });
for (const radio of document.querySelectorAll("[name=thinking]")) {
  radio.addEventListener("change", () => { state.settings.thinking = radio.value; find("budget-field").hidden = radio.value === "disabled"; keepSettings(); });
}
find("defaults").addEventListener("click", () => {
  for (const setting of NUMBERS) state.settings[setting] = null;
  keepSettings();
  drawSettings();
});
for (const [button, dialog] of [["open-settings", "settings"], ["open-keys", "keys"]]) {
  find(button).addEventListener("click", () => find(dialog).showModal());
  find(dialog).addEventListener("click", (event) => { if (event.target === find(dialog)) find(dialog).close(); });
}

// Keys -----------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  const writing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
  const dialog = document.querySelector("dialog[open]");
  const press = (action) => { event.preventDefault(); action(); };
  if (dialog) return;
  if (event.key === "Escape") {
    if (running.has(state.current.id)) press(stop);
    else if (narrow.matches) closeDrawer();
  } else if (event.altKey && event.code === "KeyN") press(begin);
  else if (event.altKey && event.code === "KeyC") press(toggleDrawer);
  else if (event.altKey && event.code === "KeyR") press(() => log.querySelector(".again")?.click());
  else if (event.altKey && event.code === "KeyS") press(() => find("settings").showModal());
  else if (event.altKey && event.code === "KeyT") press(() => { const all = log.querySelectorAll(".thinking:not([hidden])"); const last = all[all.length - 1]; if (last) last.open = !last.open; });
  else if (event.key === "/" && !writing) press(() => question.focus());
  else if (event.key === "?" && !writing) press(() => find("keys").showModal());
});

restore();
paint();
drawSettings();
show(state.current);
drawer(!narrow.matches && state.settings.side !== false);
grow();
loadModels().catch(() => { /* Told when something is asked: the key may be missing yet. */ });
