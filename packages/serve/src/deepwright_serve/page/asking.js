// Asking the server: the models that there are, and answers as they come.

const models = { cards: [] };
const running = new Map(); // conversation id -> AbortController
const UNREACHABLE = "The server cannot be reached. Is it still running?";

const headers = () => ({ "Content-Type": "application/json", ...(readKey() && { Authorization: `Bearer ${readKey()}` }) });
const sentence = (error) => (error instanceof TypeError ? UNREACHABLE : error.message);

async function complaint(reply) {
  let text = `The server answered with status ${reply.status}.`;
  try { text = (await reply.json()).error.message || text; } catch { /* Then the status has to do. */ }
  const wait = Number(reply.headers.get("retry-after"));
  return reply.status === 429 && wait > 1 ? `${text} (It asks for ${wait} s of patience.)` : text;
}

async function loadModels() {
  const reply = await fetch("/v1/models", { headers: headers() });
  if (!reply.ok) throw new Error(await complaint(reply));
  models.cards = (await reply.json()).data;
  if (!models.cards.some((card) => card.id === state.settings.model)) state.settings.model = models.cards[0].id;
  drawModels();
}

/** The sampling that was chosen; what was left alone is left to the server. */
function sampling(settings) {
  const fields = {
    temperature: settings.temperature, top_p: settings.topP, top_k: settings.topK, min_p: settings.minP,
    presence_penalty: settings.presence, frequency_penalty: settings.frequency, repetition_penalty: settings.repetition,
    seed: settings.seed, max_tokens: settings.maxTokens,
  };
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
}

/** The messages of a branch as the server wants them. */
function asked(messages, settings) {
  const said = messages.flatMap((message) => {
    if (message.role === "user") return [{ role: "user", content: message.content }];
    if (message.role === "tool") return [{ role: "tool", tool_call_id: message.call, content: message.content }];
    if (!message.content && !message.calls?.length) return [];
    const calls = message.calls?.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
    return [{ role: "assistant", content: message.content, ...(calls?.length && { tool_calls: calls }) }];
  });
  return settings.system.trim() ? [{ role: "system", content: settings.system }, ...said] : said;
}

function bodyOf(messages, settings) {
  const thinking = { type: settings.thinking };
  if (settings.budget !== null && settings.thinking !== "disabled") thinking.budget_tokens = settings.budget;
  return {
    model: settings.model, messages: asked(messages, settings), stream: true, stream_options: { include_usage: true },
    thinking, ...sampling(settings), ...(settings.tools.trim() && { tools: JSON.parse(settings.tools) }),
  };
}

/** Post, and call `onEvent` with each event of the stream. */
async function streamed(body, signal, onEvent) {
  const reply = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!reply.ok) {
    // Perhaps the model is no longer there: the list says which ones are, for the next attempt.
    if (reply.status === 404) loadModels().catch(() => {});
    throw new Error(await complaint(reply));
  }
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") { ended = true; continue; }
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      onEvent(event);
    }
  }
  if (!ended) throw new Error("The connection broke before the answer was finished.");
}

/** Have the branch that is shown answered. The answer grows in its conversation, shown or not. */
async function answer(conversation) {
  const messages = branch(conversation);
  const message = add(conversation, conversation.leaf, { role: "assistant", live: true, model: state.settings.model });
  const controller = new AbortController();
  running.set(conversation.id, controller);
  // Kept now, so that a question outlives a browser that ends while its answer is written.
  keep({ ...conversation, messages: conversation.messages.filter((one) => one !== message), leaf: messages.at(-1).id });
  state.conversations.set(conversation.id, conversation);
  show(conversation);
  const clock = { asked: performance.now(), first: null, pieces: 0, usage: null };
  const drawing = redraw(message);
  try {
    if (!models.cards.length) {
      await loadModels();
      message.model = state.settings.model;
    }
    await streamed(bodyOf(messages, state.settings), controller.signal, (event) => {
      take(message, event, clock);
      drawing.soon();
    });
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else message.problem = sentence(error);
  } finally {
    drawing.end();
    running.delete(conversation.id);
    if (message.reasoning) message.thoughtFor ??= performance.now() - message.thoughtFrom;
    message.figures = figures(clock, message);
    for (const field of ["live", "thoughtFrom", "stopped", "cut"]) delete message[field];
    // What was deleted meanwhile stays deleted.
    if (state.conversations.has(conversation.id)) keep(conversation);
    answered(conversation, message);
  }
}

/** Put what an event brought into the message. */
function take(message, event, clock) {
  if (event.usage) clock.usage = event.usage;
  for (const choice of event.choices || []) {
    const thought = choice.delta.reasoning_content || "", said = choice.delta.content || "", calls = choice.delta.tool_calls || [];
    if (choice.finish_reason === "length") message.cut = true;
    if (!thought && !said && !calls.length) continue;
    const now = performance.now();
    clock.first ??= now;
    clock.pieces += 1;
    if (thought) message.thoughtFrom ??= now;
    else if (message.reasoning) message.thoughtFor ??= now - message.thoughtFrom;
    message.reasoning = (message.reasoning || "") + thought;
    message.content += said;
    for (const piece of calls) {
      message.calls ??= [];
      const call = (message.calls[piece.index] ??= { id: "", name: "", arguments: "" });
      call.id ||= piece.id || "";
      call.name ||= piece.function?.name || "";
      call.arguments += piece.function?.arguments || "";
    }
    message.figures = figures(clock, message);
  }
}

/** Tokens, speed, the time to the first token and the cost, as a line of text. */
function figures(clock, message) {
  if (clock.first === null) return message.stopped ? "stopped" : "";
  const count = clock.usage?.completion_tokens ?? clock.pieces;
  // What came in one piece tells no speed of its own: then the waiting counts, too.
  const streamed = performance.now() - clock.first;
  const time = streamed < 100 ? performance.now() - clock.asked : streamed;
  const parts = [`${clock.usage ? "" : "about "}${count} ${count === 1 ? "token" : "tokens"}`];
  if (count > 1 && time > 0) parts.push(`${((count - 1) / (time / 1000)).toFixed(1)} tokens/s`);
  parts.push(`first after ${seconds(clock.first - clock.asked)}`);
  const cost = clock.usage?.cost?.total;
  if (cost !== undefined) parts.push(`cost ${Number(cost.toPrecision(2))}`);
  if (message.cut) parts.push("cut off at the longest answer");
  if (message.stopped) parts.push("stopped");
  return parts.join(" · ");
}

/** Draws a message again soon, and no more often than drawing takes a small part of the time. */
function redraw(message) {
  let timer = 0, cost = 0;
  const soon = () => {
    timer ||= setTimeout(() => {
      timer = 0;
      const began = performance.now();
      views.get(message)?.draw();
      cost = performance.now() - began;
    }, Math.max(16, 5 * cost));
  };
  // The time of thinking goes on although nothing comes.
  const tick = setInterval(soon, 100);
  return { soon, end() { clearInterval(tick); clearTimeout(timer); } };
}
