// The status view: load, KV blocks, tables and hit rates, polled while the page is visible.

import { request } from "./api.js";

const INTERVAL_MS = 2000;
const LOST_INTERVAL_MS = 8000;
const MEMORY_EVERY = 5;
const TIMEOUT_MS = 5000;
const element = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");

// Polls until the page closes. `onMemory` is called with the tables of /v1/memory, `onFound` when a
// lost server answers again.
export class StatusView {
  constructor({ onMemory, onFound }) {
    this.onMemory = onMemory;
    this.onFound = onFound;
    this.polls = 0;
    this.last = null;
    document.addEventListener("visibilitychange", () => this.poll());
  }

  async poll() {
    clearTimeout(this.timer);
    if (document.hidden || this.isPolling) return;
    this.isPolling = true;
    let delay = INTERVAL_MS;
    try {
      const metrics = await request("metrics", { signal: AbortSignal.timeout(TIMEOUT_MS) });
      const wasLost = element("load").dataset.state === "lost";
      this.#show(parseMetrics(await metrics.text()));
      if (wasLost) this.onFound();
      if (this.polls % MEMORY_EVERY === 0) await this.#memory();
      this.polls += 1;
    } catch (error) {
      delay = LOST_INTERVAL_MS;
      this.#load("lost", error.status === 401 ? "needs a key" : error.status ? "error" : "unreachable");
      element("load").title = error.message;
      this.last = null;
    }
    this.isPolling = false;
    this.timer = setTimeout(() => this.poll(), delay);
  }

  // Shows these tables of /v1/memory with the next poll.
  describe(tables) {
    this.tables = tables;
  }

  // Polls at once, the tables too.
  refresh() {
    this.polls = 0;
    this.poll();
  }

  async #memory() {
    const answer = await request("v1/memory", { signal: AbortSignal.timeout(TIMEOUT_MS) });
    const { data } = await answer.json();
    this.tables = data;
    this.onMemory(data);
  }

  #show(metrics) {
    const [running, waiting] = [sum(metrics, "num_requests_running"), sum(metrics, "num_requests_waiting")];
    this.#load(running ? "busy" : "idle", running ? `${running} running` : "ready");
    element("load").title = "";
    element("running").textContent = running;
    element("waiting").textContent = waiting;
    element("kv").textContent = percent(sum(metrics, "kv_cache_usage_perc"));
    element("prefix").textContent = ratio(metrics, "prefix_cache_hits_total", "prefix_cache_queries_total");
    this.#throughput(sum(metrics, "generation_tokens_total"));
    element("tables").replaceChildren(...(this.tables ?? []).map((table) => tableStatus(table, metrics)));
  }

  #throughput(tokens) {
    const now = performance.now();
    const rate = this.last && (1000 * (tokens - this.last.tokens)) / (now - this.last.now);
    element("throughput").textContent = rate === null ? "–" : whole.format(Math.round(Math.max(0, rate)));
    this.last = { tokens, now };
  }

  #load(state, text) {
    element("load").dataset.state = state;
    element("load").textContent = text;
  }
}

// Samples of Prometheus' text format, as {name, labels, value}.
export function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map((m) => [m[1], m[2]]));
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

// The prefix of all names is a setting of the server, so only the end of a name counts.
function sum(metrics, name, labels = {}) {
  return metrics
    .filter((sample) => sample.name.endsWith(name))
    .filter((sample) => Object.entries(labels).every(([key, value]) => sample.labels[key] === value))
    .reduce((total, sample) => total + sample.value, 0);
}

function percent(part) {
  return `${(100 * part).toFixed(part && part < 0.1 ? 1 : 0)} %`;
}

function ratio(metrics, part, of, labels) {
  const total = sum(metrics, of, labels);
  return total ? percent(sum(metrics, part, labels) / total) : "–";
}

function tableStatus(table, metrics) {
  const list = document.createElement("dl");
  list.className = "status";
  const add = (term, text) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = term;
    dd.textContent = text;
    list.append(dt, dd);
  };
  add("Table", table.table);
  add("Tier", table.tier);
  add("Rows", whole.format(table.rows));
  const labels = { table: table.table };
  if (sum(metrics, "table_hits_total", labels) + sum(metrics, "table_misses_total", labels))
    add("Row cache hits", ratio(metrics, "table_hits_total", "table_unique_rows_total", labels));
  return list;
}
