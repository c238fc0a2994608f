"use strict";
// One tensor: histogram with clipping bounds, the grid over the density, the criteria over the threshold; and the flow graph.
const markColor = (v, m) => (m.label === "in force" ? "var(--ink)" : color(v.marks.filter((o) => o.label !== "in force").indexOf(m)));
function viewFigures(v) {
  const title = `${v.slot[0].toUpperCase()}${v.slot.slice(1)}: ${v.spec}`;
  const zeros = v.zeros ? ` ${share(v.zeros)} of the elements are exact zeros and not drawn.` : "";
  const kind = v.distribution ? ` Nearer to a ${v.distribution} distribution.` : "";
  const histogram = figure(`histogram-${v.slot}`, title, `Elements by value, ${v.what}, on a logarithmic axis, and where each estimator clips.${kind}${zeros}`, (w) => drawHistogram(v, w));
  if (v.marks?.length) put(histogram, markTable(v));
  const curves = [];
  if (v.mse) curves.push(figure(`mse-${v.slot}`, `Squared error over the threshold, ${v.slot}`, "Both bounds shrink together. Marks: what each estimator reaches.", (w) => drawCurve(v, v.mse, "mean squared error", true, w)));
  if (v.kl) curves.push(figure(`kl-${v.slot}`, `KL divergence over the threshold, ${v.slot}`, "Of the histogram quantized to the levels (Migacz, 2017), around the centre of the values.", (w) => drawCurve(v, v.kl, "KL divergence", false, w)));
  const grid = v.levels?.length ? figure(`grid-${v.slot}`, `Levels over the density of the ${v.slot}`, `${v.levels.length} levels; ${v.what}.${zeros}`, (w) => drawGrid(v, w)) : null;
  grid?.classList.add("wide");
  return html("div", { class: "view" }, histogram, curves.length ? html("div", {}, curves) : null, grid);
}
function markTable(v) {
  const words = `${v.marks.some((m) => m.wins) ? "★: the smallest squared error on this tensor. " : ""}${v.marks.some((m) => m.label === "in force") ? "“in force”: the range that the layer uses now, trained or calibrated." : ""}`;
  return html("div", { class: "scroll" }, words ? html("p", { class: "muted" }, words) : null, html("table", { class: "marks" }, html("thead", {}, html("tr", {}, ["clipping", "low", "high", "SQNR", "clipped"].map((t) => html("th", { scope: "col" }, t)))),
    html("tbody", {}, v.marks.map((m) => html("tr", { class: m.wins ? "wins" : "" }, html("th", { scope: "row" }, html("span", { class: "swatch line", style: `--paint:${markColor(v, m)}`, "aria-hidden": "true" }), m.label + (m.wins ? " ★" : "")), html("td", {}, fmt(m.low)), html("td", {}, fmt(m.high)), html("td", {}, db(m.sqnr_db)), html("td", {}, share(m.clipped)))))));
}
function drawHistogram(v, width) {
  const marks = v.marks ?? [], reach = Math.max(v.high - v.low, 1e-30);
  const inside = marks.flatMap((m) => [m.low, m.high]).filter((b) => b > v.low - 0.3 * reach && b < v.high + 0.3 * reach);
  const f = frame({ width, height: 250, x: padded(extent([v.low, v.high, ...inside]), 0.02), y: [0.5, Math.max(...v.counts, 1) * 1.6], logY: true, xLabel: "value", yLabel: "elements" });
  const n = v.counts.length, at = (i) => f.x(v.low + ((v.high - v.low) * i) / n);
  let d = `M${at(0)},${f.bottom}`;
  v.counts.forEach((c, i) => { d += `V${(c < 0.5 ? f.bottom : f.y(c)).toFixed(1)}H${at(i + 1).toFixed(1)}`; });
  put(f.plot, svg("path", { d: d + `V${f.bottom}Z`, fill: "var(--fill)" }));
  if ((v.levels ?? []).length <= 64) for (const level of v.levels ?? []) put(f.plot, svg("line", { x1: f.x(level), x2: f.x(level), y1: f.bottom - 7, y2: f.bottom, stroke: "var(--ink)", opacity: 0.7 }));
  marks.forEach((m, k) => {
    for (const [bound, side] of [[m.low, "low"], [m.high, "high"]]) {
      if ((side === "low" && v.low >= 0) || f.x(bound) < f.left - 1 || f.x(bound) > f.right + 1) continue;
      const g = svg("g");
      put(g, svg("line", { x1: f.x(bound), x2: f.x(bound), y1: f.top, y2: f.bottom, stroke: markColor(v, m), "stroke-width": m.wins ? 2.6 : 1.6, "stroke-dasharray": m.label === "in force" ? "5 3" : null }));
      put(g, svg("circle", { cx: f.x(bound), cy: f.top + 6 + 11 * k, r: 3.4, fill: markColor(v, m) }));
      put(f.plot, hover(g, () => [m.label, `${fmt(m.low)} … ${fmt(m.high)}`, `${db(m.sqnr_db)}, clipped ${share(m.clipped)}`]));
    }
  });
  return f.root;
}
function drawGrid(v, width) {
  const levels = v.levels, step = levels.length > 1 ? (levels.at(-1) - levels[0]) / (levels.length - 1) : 1;
  const x = [Math.max(v.low, levels[0] - 2 * step), Math.min(v.high, levels.at(-1) + 2 * step)];
  const f = frame({ width, height: 180, x: padded(extent([...x, levels[0], levels.at(-1)]), 0.02), y: [0, Math.max(...v.counts) * 1.08 || 1], xLabel: "value", yLabel: "density", yTicks: [] , left: 30 });
  const n = v.counts.length, at = (i) => v.low + ((v.high - v.low) * (i + 0.5)) / n;
  const points = v.counts.map((c, i) => [f.x(at(i)), f.y(c)]).filter(([p]) => p >= f.left && p <= f.right);
  if (points.length) put(f.plot, svg("path", { d: path(points) + `L${points.at(-1)[0].toFixed(1)},${f.bottom}L${points[0][0].toFixed(1)},${f.bottom}Z`, fill: "var(--fill)", stroke: color(0) }));
  const many = levels.length > 64;
  for (const level of levels) put(f.plot, svg("line", { x1: f.x(level), x2: f.x(level), y1: many ? f.bottom - 24 : f.top, y2: f.bottom, stroke: color(1), "stroke-width": many ? 0.6 : 1.1 }));
  return f.root;
}
function drawCurve(v, curve, label, logY, width) {
  const positive = curve.error.filter((e) => e > 0), ys = logY ? extent(positive) : extent(curve.error);
  const marks = (v.marks ?? []).map((m) => [m, v.high > 0 ? m.high : m.low]).filter(([, b]) => b >= Math.min(...curve.threshold) && b <= Math.max(...curve.threshold));
  const f = frame({ width, height: 190, x: extent(curve.threshold), y: logY ? [ys[0] * 0.7, ys[1] * 1.4] : padded(ys), logY, xLabel: v.high > 0 ? "upper bound" : "lower bound", yLabel: label, left: 64 });
  put(f.plot, svg("path", { d: path(curve.threshold.map((t, i) => [f.x(t), f.y(Math.max(curve.error[i], logY ? ys[0] * 0.7 : 0))])), fill: "none", stroke: color(0), "stroke-width": 1.8 }));
  for (const [m, bound] of marks) {
    let i = curve.threshold.findIndex((t) => t >= bound);
    i = Math.max(1, i < 0 ? curve.threshold.length - 1 : i);
    const t0 = curve.threshold[i - 1], t1 = curve.threshold[i], u = (bound - t0) / (t1 - t0 || 1), error = curve.error[i - 1] + u * (curve.error[i] - curve.error[i - 1]);
    put(f.plot, hover(svg("circle", { cx: f.x(bound), cy: f.y(error), r: m.wins ? 6 : 4.5, fill: markColor(v, m), stroke: "var(--paper)" }), () => [m.label, `${label} ${fmt(error)} at ${fmt(bound)}`]));
  }
  return f.root;
}

function wrapped(text, limit, most) {
  const lines = [];
  for (const word of text.split(" ")) if (lines.length && (lines.at(-1) + " " + word).length <= limit) lines[lines.length - 1] += " " + word; else lines.push(word);
  return lines.length <= most ? lines : [...lines.slice(0, most - 1), shorten(lines.slice(most - 1).join(" "), limit)];
}
function drawFlow(flow, width) {
  const columns = [...new Set(flow.nodes.map((n) => n.column ?? 0))].sort((a, b) => a - b), rows = Math.max(...flow.nodes.map((n) => n.row ?? 0)) + 1;
  const upright = width < 640, across = upright ? rows : columns.length, gap = upright ? 12 : 46;
  const w = Math.min(260, (width - gap * (across - 1) - 4) / across), h = upright ? 96 : 78, vgap = 22;
  const place = (n) => { const c = columns.indexOf(n.column ?? 0), r = n.row ?? 0; return upright ? [2 + r * (w + gap), 2 + c * (h + vgap)] : [2 + c * (w + gap), 2 + r * (h + vgap)]; };
  const height = (upright ? columns.length : rows) * (h + vgap) - vgap + 4;
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-label": flow.nodes.map((n) => [n.label, n.detail].filter(Boolean).join(": ")).join("; ") });
  const byId = Object.fromEntries(flow.nodes.map((n) => [n.id, n]));
  put(root, svg("defs", {}, svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto-start-reverse" }, svg("path", { d: "M0,0L8,4L0,8z", fill: "var(--muted)" }))));
  for (const [a, b] of flow.edges) {
    const [ax, ay] = place(byId[a]), [bx, by] = place(byId[b]), quantized = byId[a].kind === "quantizer";
    const from = upright ? [ax + w / 2, ay + h] : [ax + w, ay + h / 2], to = upright ? [bx + w / 2, by] : [bx, by + h / 2];
    const bend = upright ? `C${from[0]},${from[1] + 18} ${to[0]},${to[1] - 18}` : `C${from[0] + 26},${from[1]} ${to[0] - 26},${to[1]}`;
    put(root, svg("path", { d: `M${from}${bend} ${to}`, fill: "none", stroke: quantized ? color(0) : "var(--muted)", "stroke-width": quantized ? 2.4 : 1.6, "stroke-dasharray": quantized ? null : "5 4", "marker-end": "url(#arrow)" }));
  }
  for (const n of flow.nodes) {
    const [x, y] = place(n), limit = Math.floor((w - 14) / 6.1), letters = Math.floor((w - 14) / 7.4), g = svg("g", { class: "node " + n.kind });
    put(g, svg("rect", { x, y, width: w, height: h, rx: 8 }));
    wrapped(n.label, letters, 2).forEach((line, i) => put(g, svg("text", { class: "title", x: x + 8, y: y + 19 + 14 * i }, line)));
    const down = wrapped(n.label, letters, 2).length;
    wrapped(n.detail ?? "", limit + 1, 5 - down).forEach((line, i) => put(g, svg("text", { x: x + 8, y: y + 20 + 14 * down + 13 * i }, line)));
    put(root, put(g, svg("title", {}, [n.label, n.detail].filter(Boolean).join("\n"))));
  }
  return root;
}
