// The rows that the tokens of one answer read, and their totals.

export class Trace {
  constructor() {
    this.numRows = new Map(); // by layer: rows of the table that it reads
    this.clear();
  }

  // Takes the tables of /v1/memory.
  describe(tables) {
    for (const table of tables)
      for (const layer of table.layers)
        if (!this.numRows.has(layer)) this.numRows.set(layer, table.rows);
  }

  get layers() {
    return [...this.numRows.keys()].sort((a, b) => a - b);
  }

  clear() {
    this.tokens = []; // {text, reads: [{layer, rows, weights}]}
    this.totals = new Map(); // by "layer:row": {layer, row, tokens, weight}
    this.greatestWeight = 0;
    this.greatestTotal = 0;
  }

  // Adds the tokens of one chunk. Their text may come with a later token, so the first shows it all.
  add(text, tokens) {
    tokens.forEach((reads, index) => {
      this.tokens.push({ text: index ? "" : text, reads });
      for (const { layer, rows, weights } of reads)
        rows.forEach((row, rank) => this.#count(layer, row, weights[rank]));
    });
  }

  #count(layer, row, weight) {
    const name = `${layer}:${row}`;
    let total = this.totals.get(name);
    if (!total) this.totals.set(name, (total = { layer, row, tokens: 0, weight: 0 }));
    total.tokens += 1;
    total.weight += weight;
    this.greatestWeight = Math.max(this.greatestWeight, weight);
    this.greatestTotal = Math.max(this.greatestTotal, total.weight);
  }

  mostRead(count) {
    return [...this.totals.values()].sort((a, b) => b.weight - a.weight).slice(0, count);
  }
}
