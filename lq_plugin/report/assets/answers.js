"use strict";
// Does it still work, what do the bytes hold, how does error accumulate, what is sensitive, and where is this from?
const asScore = (s) => (s.low == null ? fmt(s.value) : share(s.value));
const interval = (s) => (s.low == null ? "" : `${fmt(100 * s.low, 3)} … ${share(s.high)}`);
const scoresOf = (run) => run.model?.scores ?? [];
// The metric that stands for the model: that of its search, else the first share of samples, else the first one.
function mainMetric(run) {
  const found = scoresOf(run), names = found.map((s) => s.metric);
  return names.includes(run.study?.metric) ? run.study.metric : (found.find((s) => s.low != null) ?? found[0])?.metric;
}
function scoreTable(run) {
  const found = scoresOf(run), variants = [...new Set(found.map((s) => s.variant))], metrics = [...new Set(found.map((s) => s.metric))];
  const at = (metric, variant) => found.find((s) => s.metric === metric && s.variant === variant);
  return html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "scores" }, html("table", { "data-figure": "table-scores", "data-drawn": "true" }, html("thead", {}, html("tr", {}, ["metric", ...variants, "samples"].map((t) => html("th", { scope: "col" }, t)))),
    html("tbody", {}, metrics.map((m) => html("tr", {}, html("th", { scope: "row" }, m), variants.map((v) => { const s = at(m, v); return html("td", {}, s ? [asScore(s), s.low == null ? null : html("span", { class: "muted" }, ` (${interval(s)})`)] : "–"); }), html("td", { class: "number" }, fmt(found.find((s) => s.metric === m && s.samples != null)?.samples, 7)))))));
}
function scoreFigure(run) {
  const metric = mainMetric(run), shown = scoresOf(run).filter((s) => s.metric === metric && s.low != null);
  if (!shown.length) return null;
  return figure("scores", `${metric} of this model`, "Bars: Wilson's intervals of 95 %, from the number of samples. The variants saw the same samples, so a difference can be real where bars overlap.", (width) => {
    const high = 34, f = frame({ width, height: 52 + high * shown.length, x: padded(extent(shown.flatMap((s) => [s.low, s.high])), 0.06), y: [shown.length - 0.5, -0.5], yTicks: shown.map((_, i) => i), yFormat: (i) => shorten(shown[i].variant, 12), xFormat: share, xLabel: metric, left: 82 });
    shown.forEach((s, i) => put(f.plot, hover(svg("g", {}, svg("line", { x1: f.x(s.low), x2: f.x(s.high), y1: f.y(i), y2: f.y(i), stroke: color(i), "stroke-width": 3 }), svg("circle", { cx: f.x(s.value), cy: f.y(i), r: 6, fill: color(i), stroke: "var(--paper)" })), () => [s.variant, `${asScore(s)}, 95 %: ${interval(s)}`, `${fmt(s.samples, 7)} samples`])));
    return f.root;
  });
}

const STORED = { weights: "codes of weights", scales: "scales, zero points", ranges: "ranges of activations", float: "stays float: biases, norms, float layers", table: "table of the file" };
function storedFigure(model) {
  const parts = Object.entries(model.stored ?? {}).filter(([, v]) => v > 0), all = parts.reduce((sum, [, v]) => sum + v, 0), t = model.totals ?? {};
  if (!parts.length) return null;
  const memory = t.activation_bytes == null ? "" : ` Activations of one sample take ${bytes(t.activation_bytes)} at the fullest moment (float: ${bytes(t.float_activation_bytes)}), with each tensor kept in the bits of the input that reads it.`;
  const node = figure("stored", "What the bytes hold", `A packed file of ${bytes(all)}; the float model has ${bytes(t.float_bytes)}.${memory}`, (width) => {
    const root = svg("svg", { width, height: 40, viewBox: `0 0 ${width} 40` });
    let x = 2;
    parts.forEach(([name, v], i) => {
      const w = ((width - 4) * v) / all;
      put(root, hover(svg("rect", { "data-part": name, x, y: 4, width: Math.max(w, 0.5), height: 30, fill: color(i), stroke: "var(--paper)" }), () => [STORED[name] ?? name, `${bytes(v)}, ${share(v / all)}`]));
      x += w;
    });
    return root;
  });
  return put(node, key(parts.map(([name, v], i) => [`${STORED[name] ?? name}: ${bytes(v)} (${share(v / all)})`, color(i)])));
}

// SQNR of each layer's output, of the layer alone and with everything before it quantized.
// `all`: the layers of every model on the page, for one axis.
function pathFigure(model, all, open) {
  const measured = (l) => finite((l.output_db ?? {}).alone) && finite((l.output_db ?? {}).along), layers = model.layers.filter(measured);
  if (!layers.length) return null;
  const curves = [["alone", "layer alone, its input float", 0], ["along", "with everything before it quantized", 1]];
  const node = figure("path", "How error accumulates", "SQNR of each layer's output, in the model's order, on one batch; more is better. The gap between the lines is the error of the layers before.", (width) => {
    const longest = Math.max(...layers.map((l) => Math.min(18, l.name.length))), room = width / layers.length > 13, below = room ? 10 + 5.6 * longest : 0;
    const f = frame({ width, height: 230 + below, x: [-0.5, layers.length - 0.5], y: padded(extent([...all.filter(measured).flatMap((l) => [l.output_db.alone, l.output_db.along]), TROUBLE_DB]), 0.08), xTicks: [], yLabel: "dB", left: 46, bottom: below + 16, xLabel: room ? null : "layers, in the model's order" });
    put(f.plot, svg("line", { x1: f.left, x2: f.right, y1: f.y(TROUBLE_DB), y2: f.y(TROUBLE_DB), stroke: "var(--bad)", "stroke-dasharray": "2 4" }));
    for (const [what, , paint] of curves) put(f.plot, svg("path", { "data-curve": what, d: path(layers.map((l, i) => [f.x(i), f.y(l.output_db[what])])), fill: "none", stroke: color(paint), "stroke-width": 1.6 }));
    layers.forEach((l, i) => {
      for (const [what, , paint] of curves) { const point = svg("circle", { class: "pick", cx: f.x(i), cy: f.y(l.output_db[what]), r: layers.length > 60 ? 2.5 : 4, fill: color(paint), stroke: "var(--paper)" }); point.addEventListener("click", () => open(l.name)); put(f.plot, hover(point, () => [l.name, ...curves.map(([k, words]) => `${words}: ${db(l.output_db[k])}`)])); }
      if (room) put(f.root, svg("text", { x: f.x(i) + 3, y: f.bottom + 8, transform: `rotate(-90 ${f.x(i) + 3} ${f.bottom + 8})`, "text-anchor": "end" }, shorten(l.name, 18)));
    });
    return f.root;
  });
  return put(node, key([...curves.map(([, words, paint]) => [words, color(paint), "line"]), [`${TROUBLE_DB} dB`, "var(--bad)", "dashes"]]));
}

const MEASURES = { kl: "KL divergence of the outputs", sqnr: "noise over signal of the outputs", layer_sqnr: "noise over signal of the layer's own output", loss: "growth of the loss", fisher: "Fisher information (FIT)", first_order: "first-order change of the loss", hessian: "trace of the Hessian (HAWQ-V2)", learned_step: "learned step (LIMPQ)" };
function sensitivityFigure(run) {
  const { measure, values } = run.sensitivity, units = Object.entries(values), word = (choice) => choice.split(" ")[0], size = (w) => (w === "float" ? 99 : Number(/\d+/.exec(w)?.[0] ?? 50));
  const words = [...new Set(units.flatMap(([, row]) => Object.keys(row).map(word)))].sort((a, b) => size(a) - size(b) || a.localeCompare(b));
  const rows = units.map(([name, row]) => ({ name, cells: words.map((w) => { const own = Object.entries(row).filter(([c]) => word(c) === w).map(([, v]) => num(v)); return own.length ? Math.min(...own) : null; }) })).sort((a, b) => Math.max(...b.cells) - Math.max(...a.cells)).slice(0, 60);
  const chosen = Object.fromEntries((run.model?.layers ?? []).flatMap((l) => Object.entries(l.specs ?? {}).map(([slot, spec]) => [`${l.name}.${slot}`, word(spec)])));
  const positive = rows.flatMap((r) => r.cells).filter((v) => v > 0), [a, b] = extent(positive).map((v) => Math.log10(Math.max(v, 1e-30)));
  return figure("sensitivity", "Sensitivity by tensor", `${MEASURES[measure] ?? "Harm"} with this tensor alone quantized, the most sensitive first; bright is worse. Of several choices of one format the best is shown.${Object.keys(chosen).length ? " Framed: what this model has." : ""}`, (width) => {
    const left = Math.min(190, width * 0.42), cell = Math.min(64, (width - left - 6) / words.length), high = 20, narrow = words.some((w) => 7 * w.length > cell), top = narrow ? 12 + 6.6 * Math.min(12, Math.max(...words.map((w) => w.length))) : 22, height = top + 2 + rows.length * high, root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
    words.forEach((w, k) => put(root, narrow ? svg("text", { class: "label", x: left + (k + 0.5) * cell + 4, y: top - 6, transform: `rotate(-90 ${left + (k + 0.5) * cell + 4} ${top - 6})` }, shorten(w, 12)) : svg("text", { class: "label", x: left + (k + 0.5) * cell, y: 14, "text-anchor": "middle" }, w)));
    rows.forEach((r, i) => {
      const y = top + i * high;
      put(root, svg("text", { x: left - 8, y: y + 14, "text-anchor": "end" }, shorten(r.name, Math.floor(left / 6.2)), svg("title", {}, r.name)));
      r.cells.forEach((v, k) => {
        if (v == null) return;
        const t = v > 0 ? (Math.log10(v) - a) / (b - a || 1) : 0, framed = chosen[r.name] === words[k] || (words[k] === "float" && chosen[r.name] == null && run.model != null && r.name.endsWith(".weight"));
        put(root, hover(svg("rect", { "data-unit": r.name, "data-choice": words[k], x: left + k * cell + 1, y: y + 1, width: cell - 3, height: high - 3, fill: heat(t), stroke: framed ? "var(--ink)" : null, "stroke-width": framed ? 2 : null }), () => [r.name, `${words[k]}: ${fmt(v)}`, ...(framed ? ["this model's choice"] : [])]));
        if (cell >= 44) put(root, svg("text", { class: "cell", "pointer-events": "none", x: left + (k + 0.5) * cell, y: y + 14, "text-anchor": "middle", style: `fill:${t > 0.55 ? "#111" : "#fff"}` }, fmt(v, 2)));
      });
    });
    return root;
  });
}

const MADE = { made: "made", command: "by", data: "data", seed: "seed", versions: "with" };
function provenanceList(run) {
  return html("dl", { class: "facts made", "data-figure": "provenance", "data-drawn": "true" }, Object.entries(run.provenance).map(([k, v]) => html("div", {}, html("dt", {}, MADE[k] ?? k), html("dd", {}, v))));
}
