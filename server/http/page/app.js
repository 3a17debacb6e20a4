// The page: connects the controls, sends requests and shows the streamed answers.

import { Transcript } from "./answer.js";
import { events, request } from "./api.js";
import { connectKeyDialog } from "./key.js";
import { MemoryView } from "./memory.js";
import { connectSettings, samplingOptions } from "./settings.js";
import { StatusView } from "./status.js";
import { connectTheme } from "./theme.js";

const MOST_TOKENS = 256;
const LONGEST_ANNOUNCEMENT = 1000;
const element = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");

const memory = new MemoryView((index) => transcript.mark(index));
const transcript = new Transcript(element("answers"), (index) => memory.select(index));
const status = new StatusView({
  onMemory: (tables) => memory.describe(tables),
  onFound: () => model || start(),
});
const conversation = [];
let model = null;
let running = null; // the AbortController of the request in progress
let ready = null; // a promise: the model and its tables are known, or cannot be
let isDescribed = false;

const mode = () => document.querySelector("input[name=mode]:checked").value;

function start() {
  ready = describe();
}

async function describe() {
  try {
    const listed = await request("v1/models", { asks: true });
    model = (await listed.json()).data[0];
    const tables = await request("v1/memory", { asks: true });
    const { data } = await tables.json();
    memory.describe(data);
    status.describe(data);
    isDescribed = true;
    showError(null);
  } catch (error) {
    showError(error);
    if (error.status === 401) element("key-button").hidden = false;
  }
  if (model) showModel();
  status.poll();
}

function showModel() {
  element("model").textContent = model.id;
  element("model-facts").textContent = `${whole.format(model.max_model_len)} tokens`;
  element("chat-mode").disabled = !model.has_chat_template;
  element("no-chat").hidden = model.has_chat_template;
  const most = element("max_tokens");
  most.placeholder = model.max_model_len;
  if (!most.value) most.value = Math.min(MOST_TOKENS, Math.floor(model.max_model_len / 2));
  if (model.id === "wordnet" && !element("input").value) element("input").value = "memory (noun):";
}

function showMode() {
  const isChat = mode() === "chat";
  element("system-field").hidden = !isChat;
  element("input-label").textContent = isChat ? "Message" : "Prompt";
  element("send").firstChild.textContent = isChat ? "Send " : "Generate ";
  element("input").rows = isChat ? 2 : 4;
  clear();
}

function clear() {
  running?.abort();
  setRunning(null);
  conversation.length = 0;
  transcript.clear();
  memory.clear();
  showError(null);
  element("clear").hidden = element("numbers").hidden = true;
}

async function send() {
  const input = element("input");
  await ready;
  // an answer shows the rows that it reads only if the tables are known when it begins
  if (!isDescribed) await (ready = describe());
  if (running || !input.value) return;
  const text = input.value;
  const isChat = mode() === "chat";
  const body = {
    ...samplingOptions(),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  if (model) body.model = model.id;
  if (memory.hasLayers) body.memory_trace = true;
  let takeBack = () => {};
  if (isChat) {
    const system = element("system").value;
    const question = { role: "user", content: text };
    body.messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation, question];
    takeBack = transcript.beginReply(text);
    input.value = "";
  } else {
    body.prompt = text;
    transcript.beginCompletion(text);
  }
  memory.clear();
  const answer = await stream(isChat ? "v1/chat/completions" : "v1/completions", body);
  if (!isChat || answer === null) return;
  if (answer) conversation.push({ role: "user", content: text }, { role: "assistant", content: answer });
  else if (!element("error").hidden) {
    takeBack();
    input.value ||= text;
  }
}

// Sends a request and shows its answer as it arrives. Returns the text, which is not whole if the
// request failed or was stopped; null if the page was cleared meanwhile.
async function stream(path, body) {
  const controller = new AbortController();
  const clock = new Clock();
  let text = "";
  let end = "";
  setRunning(controller);
  try {
    const response = await request(path, { body, signal: controller.signal, asks: true });
    for await (const event of events(response, controller.signal)) {
      // events that came with the last piece of the stream may be left
      if (controller.signal.aborted) break;
      const [choice] = event.choices;
      if (choice) {
        const more = choice.text ?? choice.delta.content ?? "";
        text += more;
        if (more) transcript.append(more, clock.tokens);
        if (choice.memory_trace?.length) memory.add(more, choice.memory_trace);
        if (choice.finish_reason) end = describeEnd(choice);
      }
      clock.count(event.usage);
    }
  } catch (error) {
    if (!controller.signal.aborted) {
      end = "failed";
      showError(error);
    }
  }
  if (controller.signal.aborted) end = "stopped";
  if (running !== controller) return null;
  setRunning(null);
  transcript.finish();
  element("end").textContent = end;
  announce(end, text);
  status.refresh();
  return text;
}

// The numbers under an answer: time to the first token, tokens per second, usage.
class Clock {
  constructor() {
    this.start = performance.now();
    this.tokens = 0;
    for (const id of ["first-token", "speed", "usage", "end"]) element(id).textContent = "–";
    element("numbers").hidden = false;
  }

  count(usage) {
    if (!usage || usage.completion_tokens === this.tokens) return;
    const now = performance.now();
    if (!this.tokens) {
      this.first = { now, tokens: usage.completion_tokens };
      element("first-token").textContent = `${Math.round(now - this.start)} ms`;
    }
    this.tokens = usage.completion_tokens;
    const seconds = (now - this.first.now) / 1000;
    const rate = (this.tokens - this.first.tokens) / seconds;
    if (seconds > 0) element("speed").textContent = `${rate < 100 ? rate.toFixed(1) : whole.format(Math.round(rate))} /s`;
    const cached = usage.prompt_tokens_details?.cached_tokens;
    element("usage").textContent = `${usage.prompt_tokens} + ${this.tokens}`;
    element("usage").title = `${usage.prompt_tokens} of the prompt${cached ? `, ${cached} of them cached` : ""}, ${this.tokens} generated`;
  }
}

function describeEnd({ finish_reason, stop_reason }) {
  if (finish_reason === "length") return "length limit";
  if (finish_reason !== "stop") return finish_reason;
  return stop_reason === null ? "end of text" : `stop ${JSON.stringify(stop_reason)}`;
}

function setRunning(controller) {
  running = controller;
  const [shown, other] = controller ? ["stop", "send"] : ["send", "stop"];
  const hadFocus = document.activeElement === element(other);
  element(shown).hidden = false;
  element(other).hidden = true;
  if (hadFocus) element(shown).focus();
  element("answers").setAttribute("aria-busy", String(Boolean(controller)));
  if (controller) {
    showError(null);
    element("clear").hidden = false;
    element("announcer").textContent = "Generating";
  }
}

function announce(end, text) {
  if (end === "failed") element("announcer").textContent = "";
  else element("announcer").textContent = `Answer, ${end}: ${text.slice(0, LONGEST_ANNOUNCEMENT)}`;
}

function showError(error) {
  element("error").hidden = !error;
  element("error").textContent = error ? error.message : "";
}

connectTheme(element("theme"), () => memory.recolour());
connectSettings();
if (matchMedia("(max-width: 940px)").matches)
  for (const details of document.querySelectorAll("aside details")) details.open = false;
connectKeyDialog(start);
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", showMode);
element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", () => {
  clear();
  element("input").focus();
});
document.addEventListener("keydown", (event) => {
  if (element("key-dialog").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  if (event.key === "Escape") running?.abort();
});
start();
