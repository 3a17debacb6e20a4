// The transcript: prompts, answers and messages. Text enters the page as text nodes only.

const LONGEST_PROMPT = 600;

export class Transcript {
  // `onToken(index)` is called with the token of the last answer that a person points at.
  constructor(root, onToken) {
    this.root = root;
    this.current = null;
    this.spans = new Map(); // of the last answer, by token
    this.pending = document.createDocumentFragment();
    const pick = (event) => {
      const span = event.target.closest("span[data-token]");
      if (span && this.current?.contains(span)) onToken(Number(span.dataset.token));
    };
    root.addEventListener("pointerover", pick);
    root.addEventListener("click", pick);
  }

  clear() {
    this.root.replaceChildren();
    this.root.hidden = true;
    this.current = null;
    this.pending.replaceChildren();
  }

  // Shows a prompt; the answer continues its text.
  beginCompletion(prompt) {
    this.clear();
    const start = document.createElement("span");
    start.className = "given";
    start.textContent = prompt.length > LONGEST_PROMPT ? `…${prompt.slice(-LONGEST_PROMPT)}` : prompt;
    this.#begin("completion").append(start);
  }

  // Shows a person's message and an empty answer to it. Returns a function that takes both back.
  beginReply(message) {
    const asked = this.#begin("message user");
    asked.append(speaker("You"), message);
    const reply = this.#begin("message assistant");
    reply.append(speaker("Model"));
    return () => {
      asked.remove();
      reply.remove();
      this.root.hidden = !this.root.hasChildNodes();
    };
  }

  // Adds text that begins with the token of this index. It appears with the next frame, since a
  // layout for each token would take longer than the model.
  append(text, token) {
    const span = document.createElement("span");
    span.dataset.token = token;
    span.textContent = text;
    this.spans.set(token, span);
    this.pending.append(span);
    this.frame ??= requestAnimationFrame(() => this.#flush());
  }

  finish() {
    this.#flush();
    this.current?.classList.remove("growing");
  }

  #flush() {
    const { root } = this;
    cancelAnimationFrame(this.frame);
    this.frame = null;
    if (!this.pending.hasChildNodes()) return;
    const follows = root.scrollTop + root.clientHeight >= root.scrollHeight - 24;
    this.current.append(this.pending);
    if (follows) root.scrollTop = root.scrollHeight;
  }

  // Emphasises the token of this index.
  mark(index) {
    this.marked?.classList.remove("marked");
    this.marked = this.spans.get(index);
    this.marked?.classList.add("marked");
  }

  #begin(kinds) {
    this.spans.clear();
    this.current = document.createElement("article");
    this.current.className = `${kinds} growing`;
    this.root.querySelectorAll(".growing").forEach((old) => old.classList.remove("growing"));
    this.root.append(this.current);
    this.root.hidden = false;
    this.root.scrollTop = this.root.scrollHeight;
    return this.current;
  }
}

function speaker(name) {
  const made = document.createElement("h2");
  made.textContent = name;
  return made;
}
