// The row map: every row that an answer read, at its place in the square of product keys.

import { sizeCanvas } from "./timeline.js";

const PADDING = 10;
const CELLS = 8;

export class RowMap {
  // `pick(total)` is called with the row that a person points at, or null.
  constructor(canvas, trace, paint, pick) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.trace = trace;
    this.paint = paint;
    this.reads = [];
    this.marked = null;
    canvas.addEventListener("pointermove", (event) => pick(this.#nearest(event), event));
    canvas.addEventListener("pointerdown", (event) => pick(this.#nearest(event), event));
    canvas.addEventListener("pointerleave", () => pick(null, null));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  // Emphasises the reads of one token.
  activate(reads) {
    this.reads = reads;
    this.draw();
  }

  mark(total) {
    this.marked = total;
    this.draw();
  }

  draw() {
    const size = Math.floor(this.canvas.parentElement.clientWidth);
    if (!size) return;
    this.size = size;
    sizeCanvas(this.canvas, size, size);
    const { context, paint, trace, marked } = this;
    context.clearRect(0, 0, size, size);
    this.#drawGrid();
    for (const total of trace.totals.values()) {
      const share = total.weight / trace.greatestTotal;
      const isMarked = marked && marked.layer === total.layer && marked.row === total.row;
      context.globalAlpha = isMarked ? 1 : marked ? 0.14 : 0.22 + 0.5 * Math.sqrt(share);
      context.fillStyle = paint.layer(total.layer);
      this.#dot(total.layer, total.row, isMarked ? 6 : 1.1 + 3.6 * Math.sqrt(share));
    }
    context.globalAlpha = 1;
    if (!marked) for (const read of this.reads) this.#drawActive(read);
  }

  #drawGrid() {
    const { context, size } = this;
    context.fillStyle = this.paint.line;
    for (let line = 0; line <= CELLS; line += 1) {
      const at = Math.round(PADDING + (line * (size - 2 * PADDING)) / CELLS);
      context.fillRect(at, PADDING, 1, size - 2 * PADDING);
      context.fillRect(PADDING, at, size - 2 * PADDING + 1, 1);
    }
  }

  #drawActive({ layer, rows, weights }) {
    const { context, paint } = this;
    rows.forEach((row, rank) => {
      const share = weights[rank] / this.trace.greatestWeight;
      context.fillStyle = context.strokeStyle = paint.layer(layer);
      this.#dot(layer, row, 2 + 3.5 * Math.sqrt(share));
      context.lineWidth = 1.2;
      context.globalAlpha = 0.6;
      this.#ring(layer, row, 5 + 4.5 * Math.sqrt(share));
      context.globalAlpha = 1;
    });
  }

  #dot(layer, row, radius) {
    const [x, y] = this.#place(layer, row);
    this.context.beginPath();
    this.context.arc(x, y, radius, 0, 2 * Math.PI);
    this.context.fill();
  }

  #ring(layer, row, radius) {
    const [x, y] = this.#place(layer, row);
    this.context.beginPath();
    this.context.arc(x, y, radius, 0, 2 * Math.PI);
    this.context.stroke();
  }

  // A row's number is (first subkey) * side + (second subkey).
  #place(layer, row) {
    const side = Math.max(2, Math.ceil(Math.sqrt(this.trace.numRows.get(layer))));
    const scale = (this.size - 2 * PADDING) / (side - 1);
    return [PADDING + (row % side) * scale, PADDING + Math.floor(row / side) * scale];
  }

  #nearest(event) {
    let best = null;
    let least = 14 ** 2;
    for (const total of this.trace.totals.values()) {
      const [x, y] = this.#place(total.layer, total.row);
      const distance = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
      if (distance < least) [best, least] = [total, distance];
    }
    return best;
  }
}
