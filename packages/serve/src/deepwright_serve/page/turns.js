// The conversation on the page: a view of each message of the branch that is shown.

const scroller = find("scroller"), log = find("log"), question = find("question");
const views = new Map(); // message -> its view, while it is on the page
let following = true;

scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  find("latest").hidden = following;
});
const follow = () => { if (following) scroller.scrollTop = scroller.scrollHeight; };
find("latest").addEventListener("click", () => { following = true; follow(); });

/** Show a conversation from its beginning to the end of its branch. */
function show(conversation) {
  const other = state.current !== conversation;
  remember(conversation);
  views.clear();
  const messages = branch(conversation);
  for (const message of messages) views.set(message, (message.role === "assistant" ? answerView : message.role === "tool" ? resultView : questionView)(conversation, message));
  log.replaceChildren(...[...views.values()].map((view) => view.node));
  find("welcome").hidden = messages.length > 0;
  following = true;
  follow();
  drawList();
  drawBusy();
  if (other) question.value = "";
}

/** An answer is finished, or broken off. */
function answered(conversation, message) {
  if (state.current === conversation) {
    // All of them: what can be pressed has changed everywhere.
    for (const view of views.values()) view.draw();
    find("status").textContent = message.problem ? "" : "The answer is finished.";
    if (matchMedia("(hover: hover)").matches && !document.querySelector("dialog[open]") && !log.querySelector("textarea")) question.focus();
  }
  drawList();
  drawBusy();
}

function turn(message, label) {
  const node = make("article", { className: `turn ${message.role}` });
  node.setAttribute("aria-label", label);
  return node;
}

/** Which of its siblings a message is, with the ways to the others; nothing where it is the only one. */
function switcher(conversation, message) {
  const all = siblings(conversation, message);
  if (all.length < 2) return [];
  const at = all.indexOf(message);
  const to = (step) => {
    turnTo(conversation, all[at + step]);
    keep(conversation);
    show(conversation);
    // The button that was pressed is gone; the focus goes to the one in its place, or to the other at the last version.
    const ways = [...views.get(all[at + step]).node.querySelectorAll(".switcher button")];
    (step < 0 ? ways : ways.reverse()).find((button) => !button.disabled).focus();
  };
  const before = tool("before", "The version before", () => to(-1), { bare: true });
  const after = tool("chevron", "The next version", () => to(1), { bare: true });
  before.disabled = at === 0 || running.has(conversation.id);
  after.disabled = at === all.length - 1 || running.has(conversation.id);
  return [make("span", { className: "switcher" }, before, make("span", { className: "place" }, `${at + 1} / ${all.length}`), after)];
}

function questionView(conversation, message) {
  const node = turn(message, "You");
  const bubble = make("div", { className: "bubble" }, message.content);
  const meta = make("div", { className: "meta" });
  const draw = () => {
    meta.replaceChildren(...switcher(conversation, message),
      tool("edit", "Edit", edit, { bare: true }),
      tool("copy", "Copy", () => toClipboard(message.content).then((done) => news(done ? "Copied." : "The browser does not allow copying.")), { bare: true }),
      ...unanswered(conversation, message));
  };
  function edit() {
    if (running.has(conversation.id)) return;
    const field = make("textarea", { value: message.content, ariaLabel: "Your message, to be sent again", rows: Math.min(message.content.split("\n").length + 1, 12) });
    const before = document.activeElement;
    const close = () => { node.replaceChildren(bubble, meta); node.classList.remove("editing"); before.focus(); };
    const send = () => {
      const text = field.value.trim();
      if (!text || running.has(conversation.id)) return;
      add(conversation, message.parent, { role: "user", content: text });
      answer(conversation);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
      else if (event.key === "Escape") { event.stopPropagation(); close(); }
    });
    node.classList.add("editing");
    node.replaceChildren(field, make("div", { className: "choices" }, plain("Cancel", close), plain("Send", send, "done")));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
  node.append(bubble, meta);
  draw();
  return { node, draw };
}

function plain(word, onClick, className = "quiet") {
  const button = make("button", { type: "button", className }, word);
  button.addEventListener("click", onClick);
  return button;
}

function resultView(conversation, message) {
  const node = turn(message, "A function's result");
  const call = conversation.messages.flatMap((one) => one.calls || []).find((one) => one.id === message.call);
  node.append(make("div", { className: "call" }, make("div", { className: "bar" }, icon("tool"), make("span", {}, `${call?.name || "The function"} gave`)), make("pre", { tabIndex: 0 }, message.content)));
  const meta = make("div", { className: "meta" });
  node.append(meta);
  const draw = () => meta.replaceChildren(...unanswered(conversation, message));
  draw();
  return { node, draw };
}

/** What is asked for an answer that never came, because the browser ended before. */
function unanswered(conversation, message) {
  if (conversation.leaf !== message.id || running.has(conversation.id)) return [];
  return [tool("again", "Answer", () => answer(conversation), { className: "again" })];
}

function answerView(conversation, message) {
  const node = turn(message, "Model");
  const summary = make("span"), thought = make("div", { className: "thought" }), thoughtText = document.createTextNode("");
  thought.append(thoughtText);
  const thinking = make("details", { className: "thinking", hidden: true }, make("summary", {}, icon("chevron"), summary), thought);
  const dots = make("span", { className: "waiting", role: "img", ariaLabel: "Waiting for the answer" }, make("i"), make("i"), make("i"));
  const text = prose();
  const calls = make("div", { className: "calls" });
  const problem = make("div", { className: "problem", hidden: true });
  problem.setAttribute("role", "alert");
  const meta = make("div", { className: "meta" });
  node.append(thinking, dots, text.node, calls, problem, meta);
  function draw() {
    const live = message.live === true;
    const stillThinking = live && message.reasoning && message.thoughtFor === undefined;
    dots.hidden = !live || Boolean(message.reasoning || message.content || message.calls);
    thinking.hidden = !message.reasoning;
    thinking.classList.toggle("live", Boolean(stillThinking));
    if (message.reasoning) {
      const time = stillThinking ? performance.now() - message.thoughtFrom : message.thoughtFor;
      const said = `${stillThinking ? "Thinking" : "Thought"}${time === undefined ? "" : ` for ${seconds(time)}`}`;
      if (summary.textContent !== said) summary.textContent = said;
      if (message.reasoning.length !== thoughtText.length) thoughtText.appendData(message.reasoning.slice(thoughtText.length));
    }
    text.draw(message.content);
    calls.replaceChildren(...(message.calls || []).map((call) => callView(call)), ...(live ? [] : results(conversation, message)));
    problem.hidden = !message.problem;
    if (problem.textContent !== (message.problem || "")) problem.textContent = message.problem || "";
    meta.replaceChildren(...(live ? [make("span", { className: "figures" }, message.figures || "")] : footing(conversation, message)));
    follow();
  }
  draw();
  return { node, draw };
}

function callView(call) {
  let shown = call.arguments;
  try { shown = JSON.stringify(JSON.parse(shown), null, 2); } catch { /* Half a call, or arguments that are no JSON: as they are. */ }
  return make("div", { className: "call" },
    make("div", { className: "bar" }, icon("tool"), make("span", {}, "Calls "), make("b", {}, call.name || "a function")),
    make("pre", { tabIndex: 0 }, shown));
}

/** Where the results of an answer's calls are written, at the end of a branch. */
function results(conversation, message) {
  if (!message.calls?.length || conversation.leaf !== message.id) return [];
  const fields = message.calls.map((call) => make("textarea", { rows: 2, placeholder: `What ${call.name} gives`, ariaLabel: `Result of ${call.name}` }));
  const send = () => {
    let parent = message.id;
    message.calls.forEach((call, n) => { parent = add(conversation, parent, { role: "tool", call: call.id, content: fields[n].value }).id; });
    answer(conversation);
  };
  return [make("div", { className: "results" }, ...fields, plain("Send results", send, "done"))];
}

function footing(conversation, message) {
  const parts = [...switcher(conversation, message)];
  if (message.figures) parts.push(make("span", { className: "figures", title: message.model ? `by ${message.model}` : "" }, message.figures));
  if (message.content) parts.push(tool("copy", "Copy", (button) => copy(message.content, button)));
  if (conversation.leaf === message.id) {
    const again = tool("again", message.problem ? "Try again" : "Regenerate", () => regenerate(conversation, message), { className: "again" });
    parts.push(again);
  }
  return parts;
}

/** Another answer to the same question. One that said nothing is replaced, any other stays beside the new one. */
function regenerate(conversation, message) {
  if (running.has(conversation.id)) return;
  conversation.leaf = message.parent;
  if (!message.content && !message.reasoning && !message.calls) conversation.messages.splice(conversation.messages.indexOf(message), 1);
  answer(conversation);
}
