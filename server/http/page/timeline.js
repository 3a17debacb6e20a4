// The timeline: a column per token, a lane per memory layer, and a dot per row that was read.

const LABEL_HEIGHT = 30;
const LANE_PADDING = 9;
const LEAST_COLUMN = 15;
const WIDEST_SCALE = 2.6;
const LEAST_LANE = 44;
// as high as the row map at its full width
const LANES_HEIGHT = 242;
const LONGEST_LABEL = 24;
const FONT = "13px Inter, ui-sans-serif, system-ui, sans-serif";
const STEPS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10 };

export class Timeline {
  // `paint` gives colours; `pick(index, read)` is called for the token that a person points at.
  constructor(scroller, trace, paint, { pick, leave }) {
    this.scroller = scroller;
    this.track = scroller.querySelector(".track");
    this.canvas = scroller.querySelector("canvas");
    this.context = this.canvas.getContext("2d");
    this.trace = trace;
    this.paint = paint;
    this.natural = [0]; // left edges of all columns at scale 1, and the right edge of the last
    this.edges = [0]; // the same, stretched while they fit into view
    this.active = null;
    this.marked = null;
    scroller.addEventListener("scroll", () => this.draw());
    scroller.addEventListener("keydown", (event) => this.#move(event, pick));
    this.canvas.addEventListener("pointermove", (event) => this.#point(event, pick));
    this.canvas.addEventListener("pointerdown", (event) => this.#point(event, pick));
    this.canvas.addEventListener("pointerleave", leave);
    new ResizeObserver(() => this.grow()).observe(scroller);
  }

  get laneHeight() {
    return Math.max(LEAST_LANE, LANES_HEIGHT / Math.max(1, this.trace.layers.length));
  }

  clear() {
    this.natural = [0];
    this.edges = [0];
    this.active = this.marked = null;
    this.track.style.width = "0";
  }

  // Lays out the tokens that the trace has gained, and follows the end if it was in view.
  grow() {
    const { scroller, natural, context } = this;
    const follows = scroller.scrollLeft + scroller.clientWidth >= scroller.scrollWidth - 8;
    context.font = FONT;
    for (const { text } of this.trace.tokens.slice(natural.length - 1)) {
      const width = text ? context.measureText(label(text)).width + 1 : 0;
      natural.push(natural.at(-1) + Math.max(LEAST_COLUMN, width));
    }
    const fitting = scroller.clientWidth / Math.max(1, natural.at(-1));
    const scale = Math.min(WIDEST_SCALE, Math.max(1, fitting));
    this.edges = natural.map((edge) => edge * scale);
    this.track.style.width = `${Math.floor(this.edges.at(-1))}px`;
    if (follows) scroller.scrollLeft = scroller.scrollWidth;
    this.draw();
  }

  // Marks a token, and scrolls to it if `reveal` is set.
  activate(index, reveal = false) {
    this.active = index;
    const { scroller, edges } = this;
    if (reveal && edges[index] < scroller.scrollLeft) scroller.scrollLeft = edges[index] - 40;
    else if (reveal && edges[index + 1] > scroller.scrollLeft + scroller.clientWidth)
      scroller.scrollLeft = edges[index + 1] - scroller.clientWidth + 40;
    this.draw();
  }

  // Emphasises one row, `{layer, row}`, wherever it was read.
  mark(total) {
    this.marked = total;
    this.draw();
  }

  draw() {
    const { context, trace, edges, laneHeight } = this;
    const width = this.scroller.clientWidth;
    if (!width) return;
    const lanes = trace.layers.length * laneHeight;
    sizeCanvas(this.canvas, width, lanes + LABEL_HEIGHT);
    const from = this.scroller.scrollLeft;
    const first = this.#columnAt(from);
    context.clearRect(0, 0, width, lanes + LABEL_HEIGHT);
    this.#drawLanes(width);
    for (let index = first; index < trace.tokens.length && edges[index] < from + width; index += 1) {
      const left = edges[index] - from;
      const columnWidth = edges[index + 1] - edges[index];
      if (index === this.active) {
        context.fillStyle = this.paint.band;
        context.beginPath();
        context.roundRect(left, 0, columnWidth, lanes + LABEL_HEIGHT, 4);
        context.fill();
      }
      const { text, reads } = trace.tokens[index];
      for (const read of reads) this.#drawReads(read, left + columnWidth / 2, index);
      context.font = FONT;
      context.textBaseline = "middle";
      context.fillStyle = index === this.active ? this.paint.ink : this.paint.muted;
      const shown = label(text);
      const middle = Math.max(0, (columnWidth - context.measureText(shown).width) / 2);
      context.fillText(shown, left + middle, lanes + LABEL_HEIGHT / 2 + 1);
    }
  }

  #drawLanes(width) {
    const { context, trace, laneHeight } = this;
    context.fillStyle = this.paint.line;
    trace.layers.forEach((_, lane) => context.fillRect(0, (lane + 1) * laneHeight - 1, width, 1));
  }

  #drawReads({ layer, rows, weights }, x, index) {
    const { context, marked } = this;
    context.fillStyle = this.paint.layer(layer);
    rows.forEach((row, rank) => {
      const share = weights[rank] / this.trace.greatestWeight;
      const isMarked = marked && marked.layer === layer && marked.row === row;
      const strength = index === this.active ? 1 : 0.35 + 0.65 * Math.sqrt(share);
      context.globalAlpha = isMarked ? 1 : marked ? 0.14 : strength;
      context.beginPath();
      context.arc(x, this.#height(layer, row), 1.3 + 4.7 * Math.sqrt(share), 0, 2 * Math.PI);
      context.fill();
    });
    context.globalAlpha = 1;
  }

  #height(layer, row) {
    const lane = this.trace.layers.indexOf(layer);
    const part = row / Math.max(1, this.trace.numRows.get(layer) - 1);
    return lane * this.laneHeight + LANE_PADDING + part * (this.laneHeight - 2 * LANE_PADDING - 1);
  }

  #columnAt(x) {
    let low = 0;
    let high = this.edges.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.edges[middle] <= x) low = middle;
      else high = middle;
    }
    return low;
  }

  #point(event, pick) {
    const x = event.offsetX + this.scroller.scrollLeft;
    if (x < this.edges.at(-1)) {
      const index = this.#columnAt(x);
      pick(index, this.#nearest(index, event.offsetY), event);
    }
  }

  #nearest(index, y) {
    let best = null;
    for (const { layer, rows, weights } of this.trace.tokens[index].reads)
      rows.forEach((row, rank) => {
        const distance = Math.abs(this.#height(layer, row) - y);
        if (distance < (best?.distance ?? 12)) best = { distance, layer, row, weight: weights[rank] };
      });
    return best;
  }

  #move(event, pick) {
    const last = this.trace.tokens.length - 1;
    const step = STEPS[event.key];
    let index = null;
    if (event.key === "Home") index = 0;
    else if (event.key === "End") index = last;
    else if (step) index = Math.min(last, Math.max(0, (this.active ?? last) + step));
    if (index === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    pick(index, null, null);
    this.activate(index, true);
  }
}

// Gives a canvas a size in CSS pixels, sharp on dense screens.
export function sizeCanvas(canvas, width, height) {
  const density = devicePixelRatio || 1;
  const [across, down] = [Math.round(width * density), Math.round(height * density)];
  if (canvas.width !== across || canvas.height !== down) {
    canvas.width = across;
    canvas.height = down;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  canvas.getContext("2d").setTransform(density, 0, 0, density, 0, 0);
}

// A token's text on one line.
export function label(text) {
  const line = text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return line.length > LONGEST_LABEL ? `${line.slice(0, LONGEST_LABEL - 1)}…` : line;
}
