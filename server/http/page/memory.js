// The picture of memory: timeline, row map, and the same numbers as tables.

import { RowMap } from "./row_map.js";
import { Timeline } from "./timeline.js";
import { Trace } from "./trace.js";

const NUM_LISTED = 10;
const NUM_COLOURS = 6;
const element = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");

export class MemoryView {
  // `onToken(index)` is called with the token whose rows are shown.
  constructor(onToken) {
    this.trace = new Trace();
    this.onToken = onToken;
    this.selected = null;
    this.paint = { layer: (layer) => this.colours.get(layer) };
    this.timeline = new Timeline(element("timeline"), this.trace, this.paint, {
      pick: (index, read, event) => this.#point(index, read, event),
      leave: () => this.#tip(null),
    });
    this.rowMap = new RowMap(element("row-map"), this.trace, this.paint, (total, event) => {
      this.timeline.mark(total);
      this.rowMap.mark(total);
      this.#tip(event, total && `row ${total.row} · layer ${total.layer} · ${tokens(total.tokens)}`);
    });
  }

  get hasLayers() {
    return this.trace.numRows.size > 0;
  }

  // Takes the tables of /v1/memory.
  describe(tables) {
    const isNew = !this.hasLayers;
    this.trace.describe(tables);
    element("memory").hidden = !this.hasLayers;
    if (!this.hasLayers) return;
    if (isNew) this.#drawLegend(tables);
    this.#listServerRows(tables);
  }

  clear() {
    this.trace.clear();
    this.timeline.clear();
    this.selected = null;
    element("memory-empty").hidden = false;
    for (const id of ["pictures", "details", "answer-rows"]) element(id).hidden = true;
  }

  // Adds the tokens of one chunk of a stream; the pictures follow with the next frame.
  add(text, reads) {
    this.trace.add(text, reads);
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#refresh();
    });
  }

  // Shows the rows of a token and keeps them while more tokens arrive.
  select(index) {
    if (index >= this.trace.tokens.length) return;
    this.selected = index;
    this.#show(index);
    this.timeline.activate(index, true);
  }

  // Reads the colours anew after a change of theme.
  recolour() {
    const style = getComputedStyle(element("memory"));
    this.colours = new Map();
    for (const swatch of element("legend").querySelectorAll("i"))
      this.colours.set(Number(swatch.dataset.layer), getComputedStyle(swatch).color);
    this.paint.ink = style.color;
    this.paint.muted = getComputedStyle(element("memory-facts")).color;
    this.paint.line = getComputedStyle(element("legend")).borderTopColor;
    this.paint.band = getComputedStyle(element("legend")).outlineColor;
    this.timeline.draw();
    this.rowMap.draw();
  }

  #refresh() {
    if (!this.trace.tokens.length) return;
    element("memory-empty").hidden = true;
    for (const id of ["pictures", "details", "answer-rows"]) element(id).hidden = false;
    this.timeline.grow();
    this.#show(this.selected ?? this.trace.tokens.length - 1);
    this.#listAnswerRows();
  }

  #drawLegend(tables) {
    const facts = tables.map((table) => `${whole.format(table.rows)} rows of ${table.row_values} values`);
    element("memory-facts").textContent = [...new Set(facts)].join(", ");
    element("legend").replaceChildren(...this.trace.layers.map((layer, index) => {
      const [item, swatch] = [document.createElement("li"), document.createElement("i")];
      swatch.className = `layer-${index % NUM_COLOURS}`;
      swatch.dataset.layer = layer;
      item.append(swatch, `Layer ${layer}`);
      return item;
    }));
    element("row-map-caption").textContent =
      "Each row at its place in the square of product keys; the rings show this token.";
    this.recolour();
  }

  #point(index, read, event) {
    this.selected = index;
    this.#show(index);
    this.#tip(event, read && `row ${read.row} · layer ${read.layer} · weight ${read.weight.toFixed(3)}`);
  }

  #show(index) {
    const { text, reads } = this.trace.tokens[index];
    const number = `${index + 1} of ${this.trace.tokens.length}`;
    element("token-number").textContent = number;
    element("token-text").textContent = text;
    element("token-text").hidden = !text;
    element("layer-tables").replaceChildren(...reads.map((read) => this.#layerTable(read)));
    const slider = element("timeline");
    slider.setAttribute("aria-valuemax", this.trace.tokens.length);
    slider.setAttribute("aria-valuenow", index + 1);
    slider.setAttribute("aria-valuetext", `${number}, ${text}: ${reads.map(spoken).join("; ")}`);
    this.timeline.activate(index);
    this.rowMap.activate(reads);
    this.onToken(index);
  }

  #layerTable({ layer, rows, weights }) {
    const table = document.createElement("table");
    const caption = table.createCaption();
    const swatch = document.createElement("i");
    swatch.className = `layer-${this.trace.layers.indexOf(layer) % NUM_COLOURS}`;
    caption.append(swatch, `Layer ${layer}`);
    const head = table.createTHead().insertRow();
    for (const title of ["Row", "Weight"]) head.append(heading(title, "col"));
    const body = table.createTBody();
    rows.forEach((row, rank) => {
      const line = body.insertRow();
      line.append(heading(row, "row"));
      const share = weights[rank] / this.trace.greatestWeight;
      line.append(measured(weights[rank].toFixed(3), share, swatch.className));
    });
    return table;
  }

  #listAnswerRows() {
    const lines = this.trace.mostRead(NUM_LISTED).map((total) => {
      const line = document.createElement("tr");
      const name = heading("", "row");
      name.append(this.#rowButton(total));
      const colour = `layer-${this.trace.layers.indexOf(total.layer) % NUM_COLOURS}`;
      const share = total.weight / this.trace.greatestTotal;
      line.append(name, cell(total.layer), cell(total.tokens), measured(total.weight.toFixed(2), share, colour));
      return line;
    });
    const body = element("answer-rows").querySelector("tbody");
    // a rebuilt table would take the focus from its buttons
    if (!body.contains(document.activeElement)) body.replaceChildren(...lines);
  }

  #rowButton(total) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "row-button";
    button.textContent = total.row;
    button.title = "Show where it was read";
    const mark = (marked) => {
      this.timeline.mark(marked);
      this.rowMap.mark(marked);
    };
    for (const name of ["pointerenter", "focus", "click"]) button.addEventListener(name, () => mark(total));
    for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => mark(null));
    return button;
  }

  #listServerRows(tables) {
    const read = tables.filter((table) => table.usage?.most_read.length);
    element("server-rows").hidden = !read.length;
    element("server-rows").classList.toggle("one-table", tables.length === 1);
    const lines = read.flatMap((table) => table.usage.most_read.slice(0, NUM_LISTED).map((row) => {
      const line = document.createElement("tr");
      const share = row.reads / table.usage.counted_reads;
      const most = table.usage.most_read[0].reads;
      line.append(heading(row.row, "row"), cell(table.table, "of-table"), cell(whole.format(row.reads)));
      line.append(measured(`${(100 * share).toFixed(2)} %`, row.reads / most, ""));
      return line;
    }));
    element("server-rows").querySelector("tbody").replaceChildren(...lines);
  }

  #tip(event, text) {
    const tip = element("tip");
    tip.hidden = !(event && text);
    if (tip.hidden) return;
    tip.textContent = text;
    const { left, top, width } = element("memory").getBoundingClientRect();
    const x = Math.min(event.clientX - left + 14, width - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${event.clientY - top - 34}px`;
  }
}

const tokens = (count) => (count === 1 ? "1 token" : `${count} tokens`);
const spoken = ({ layer, rows, weights }) =>
  `layer ${layer}, row ${rows[0]} with weight ${weights[0].toFixed(2)}`;

function heading(text, scope) {
  const made = document.createElement("th");
  made.scope = scope;
  made.textContent = text;
  return made;
}

function cell(text, kind = "") {
  const made = document.createElement("td");
  made.className = kind;
  made.textContent = text;
  return made;
}

// A cell with a number and a bar for its share of the greatest one.
function measured(text, share, colour) {
  const made = cell("");
  const bar = document.createElement("i");
  bar.className = `bar ${colour}`;
  bar.style.setProperty("--share", share.toFixed(3));
  made.append(bar, text);
  return made;
}
