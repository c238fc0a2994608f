"use strict";
// The network as a row of layers.
const BITS_HIGH = 84;
const bitsHeight = (bits) => (BITS_HIGH * (Math.log2(Math.max(bits, 1)) + 1)) / 6;
const SLOT_COLORS = { weight: color(0), input: color(1), output: color(2) };
// A layer is in trouble where the error has more than a tenth of the energy of what it is an error of.
const TROUBLE_DB = 10;
function troubles(l) {
  const ratios = [...["weight", "input", "output"].map((slot) => [slot, (l.sqnr_db ?? {})[slot]]), ["layer's own output", (l.output_db ?? {}).alone], ["output in the network", (l.output_db ?? {}).along]];
  return ratios.filter(([, v]) => v != null && num(v) < TROUBLE_DB).map(([what, v]) => `${what} ${db(v)}`);
}
const LANES = [
  ["SQNR weight", (l) => (l.sqnr_db ?? {}).weight, db],
  ["SQNR input", (l) => (l.sqnr_db ?? {}).input, db],
  ["SQNR output", (l) => (l.output_db ?? {}).along, db],
  ["sensitivity", (l) => l.sensitivity, (v) => fmt(v)],
  ["bytes", (l) => l.bytes, bytes],
  ["BOPs a sample", (l) => l.bops, big],
  ["latency", (l) => l.latency_ms, (v) => fmt(v, 3) + " ms"],
];
const isFloat = (l) => l.weight_bits === 32;
const weightSpec = (l) => (l.specs ?? {}).weight ?? "float";

// `all`: the layers of every model on the page, which have the same lanes and scales.
function strip(model, all, open) {
  const lanes = LANES.filter(([, of]) => all.some((l) => of(l) != null));
  const tops = lanes.map(([, of]) => Math.max(...all.map((l) => { const v = num(of(l)); return Number.isFinite(v) ? v : 0; }), 1e-30));
  const labels = html("div", { class: "lanes", "aria-hidden": "true" }, html("div", { class: "bits", style: `height:${BITS_HIGH}px` }, "bits"), lanes.map(([name]) => html("div", { class: "lane" }, name)), html("div", { class: "name" }, "layer"));
  const longest = Math.max(...model.layers.map((l) => Math.min(22, l.name.length)));
  const row = html("div", { class: model.layers.length <= 10 ? "row few" : "row", style: `--name:${12 + 6.6 * longest}px`, role: "toolbar", "aria-label": "layers, arrow keys move, Enter opens" });
  model.layers.forEach((l, i) => {
    const bad = troubles(l), facts = () => [l.name + "  " + l.kind, `weight ${weightSpec(l)}, input ${(l.specs ?? {}).input ?? "float"}`, `${l.effective_bits == null ? "held by " + l.tied_to : fmt(l.effective_bits) + " effective bits"}`, ...lanes.map(([name, of, show]) => `${name} ${show(of(l))}`), ...(bad.length ? [`under ${TROUBLE_DB} dB: ${bad.join(", ")}`] : [])];
    const column = html("button", { type: "button", class: "layer" + (isFloat(l) ? " float" : "") + (bad.length ? " trouble" : ""), "data-layer": l.name, tabindex: i ? "-1" : "0", "aria-label": `${l.name}, ${facts().slice(1).join(", ")}`, onclick: () => open(l.name) },
      html("span", { class: "bits", style: `height:${BITS_HIGH}px` }, bad.length ? html("i", {}, "!") : null,
        html("span", { class: "bar extra", style: `height:${bitsHeight(Math.min(l.effective_bits ?? l.weight_bits, 32)).toFixed(1)}px` }),
        html("span", { class: "bar", style: `height:${bitsHeight(l.weight_bits).toFixed(1)}px` }, html("b", {}, String(l.weight_bits))),
        html("span", { class: "mark", style: `bottom:${bitsHeight(l.input_bits).toFixed(1)}px` })),
      lanes.map(([, of], k) => { const v = num(of(l)); return html("span", { class: "lane" }, v == null ? null : html("span", { class: "fill", style: `height:${Math.max(0, Math.min(100, (100 * (Number.isFinite(v) ? v : tops[k])) / tops[k])).toFixed(1)}%` })); }),
      html("span", { class: "name" }, shorten(l.name, 22)));
    column.addEventListener("pointerenter", (e) => showTip(facts(), e.clientX, e.clientY));
    column.addEventListener("pointerleave", hideTip);
    column.addEventListener("focus", () => { if (column.matches(":focus-visible")) { const b = column.getBoundingClientRect(); showTip(facts(), b.left, b.top + 80); } });
    column.addEventListener("blur", hideTip);
    put(row, column);
  });
  row.addEventListener("keydown", (e) => {
    const all = [...row.children], at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[e.key];
    if (to == null || to < 0 || to >= all.length) return;
    e.preventDefault();
    all.forEach((c, i) => c.setAttribute("tabindex", i === to ? "0" : "-1"));
    all[to].focus();
    all[to].scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  return html("div", { class: "strip", "data-figure": "layers", "data-drawn": "true" }, labels, html("div", { class: "scroll" }, row));
}

const LAYER_COLUMNS = [
  ["layer", (l) => l.name, null, "name"], ["kind", (l) => l.kind], ["weight", weightSpec], ["input", (l) => (l.specs ?? {}).input ?? "float"],
  ["effective bits", (l) => l.effective_bits, (v) => fmt(v)], ["SQNR weight", (l) => num((l.sqnr_db ?? {}).weight), db], ["SQNR input", (l) => num((l.sqnr_db ?? {}).input), db],
  ["output alone", (l) => num((l.output_db ?? {}).alone), db], ["output in the network", (l) => num((l.output_db ?? {}).along), db], ["in trouble", (l) => troubles(l).join(", ") || null],
  ["sensitivity", (l) => l.sensitivity, fmt], ["bytes", (l) => l.bytes, bytes], ["MACs a sample", (l) => l.macs, big], ["BOPs a sample", (l) => l.bops, big], ["latency a sample", (l) => l.latency_ms, (v) => fmt(v, 3) + " ms"],
];
function layerTable(model, open) {
  const columns = LAYER_COLUMNS.filter(([, of]) => model.layers.some((l) => of(l) != null && of(l) !== undefined));
  return dataTable("layers", columns, model.layers, { open: (l) => open(l.name) });
}

// One layer.
function layerPage(l) {
  const facts = [
    ["kind", `${l.kind} [${(l.shape ?? []).join(", ")}]`], ["weight", weightSpec(l)], ["input", (l.specs ?? {}).input ?? "float"], (l.specs ?? {}).output ? ["output", l.specs.output] : null,
    ["effective bits", l.effective_bits == null ? `held by ${l.tied_to}` : fmt(l.effective_bits)], ["size", `${bytes(l.bytes)} of ${bytes(l.float_bytes)} float`],
    l.macs == null ? null : ["MACs, BOPs a sample", `${big(l.macs)}, ${big(l.bops)}`], l.latency_ms == null ? null : ["latency", fmt(l.latency_ms, 3) + " ms"], l.sensitivity == null ? null : ["sensitivity", fmt(l.sensitivity)],
    ...Object.keys(l.sqnr_db ?? {}).map((slot) => [`SQNR ${slot}`, `${db(l.sqnr_db[slot])}${(l.clipped ?? {})[slot] == null ? "" : ", clipped " + share(l.clipped[slot])}`]),
    ...[["alone", "output, layer alone"], ["along", "output, in the network"]].filter(([k]) => (l.output_db ?? {})[k] != null).map(([k, words]) => [words, db(l.output_db[k])]),
    ...Object.entries(l.bounds ?? {}).map(([slot, [low, high]]) => [`range ${slot}`, `${fmt(low)} … ${fmt(high)}`]),
    l.reason ? ["float because", l.reason] : null,
  ].filter(Boolean);
  const parts = [html("dl", { class: "facts" }, facts.map(([k, v]) => html("div", {}, html("dt", {}, k), html("dd", {}, v))))];
  if (l.flow) parts.push(figure("flow", "Flow", "Full lines carry quantized values, dashed ones float values.", (w) => drawFlow(l.flow, w)));
  if (l.boxes) parts.push(boxFigure(l));
  for (const v of l.views ?? []) parts.push(viewFigures(v));
  if (l.rounding) parts.push(roundingFigure(l.rounding));
  if (l.error) parts.push(figure("error-map", "Where the weight's error is", `Squared error of each cell of output × input channels over the weight's mean square, in dB; ${l.error.rows} × ${l.error.columns} channels.`, (w) => drawErrorMap(l.error, w)));
  if (parts.length === 1) parts.push(html("p", { class: "muted" }, "No pictures were kept for this layer: it is one of the smaller ones."));
  return parts;
}

function boxFigure(l) {
  const b = l.boxes, ratios = Object.entries(b.sqnr_db ?? {});
  const worst = ratios.length > 1 ? ratios.map(([k, v]) => `${k.replace("_", " ")} ${db(v)}`).join(", ") : "";
  const caption = (worst ? `The same levels with other granularities: ${worst}. ` : "") + (b.per_tensor == null ? "" : "Between the dotted lines, one scale for the whole tensor would round every value to 0.");
  const entries = [["median", "var(--ink)", "line"], ["quartiles", color(0)], ["5 … 95 %", color(0), "line"], ["extremes", "var(--muted)", "dot"]];
  if (b.low?.length) entries.push(["range of the levels", color(1), "line"]);
  const node = figure("boxes", "Weight by output channel", caption, (w) => drawBoxes(b, w));
  return put(node, key(entries));
}
function drawBoxes(b, width) {
  const n = b.quantiles[0].length, per = b.channels / n;
  const f = frame({ width, height: 260, x: [-0.5, n - 0.5], y: padded(extent([...b.quantiles[0], ...b.quantiles[6], ...(b.low ?? []), ...(b.high ?? [])])), xLabel: per > 1 ? `output channel (${fmt(per, 3)} a column)` : "output channel", yLabel: "value", xFormat: (t) => (t < 0 || t % 1 ? "" : fmt(Math.round(t * per), 6)) });
  const w = Math.max(1.5, ((f.right - f.left) / n) * 0.66);
  const q = (k, i) => f.y(b.quantiles[k][i]);
  for (let i = 0; i < n; i++) {
    const x = f.x(i), g = svg("g");
    put(g, svg("line", { x1: x, x2: x, y1: q(1, i), y2: q(5, i), stroke: color(0), "stroke-width": 1.2 }));
    put(g, svg("rect", { x: x - w / 2, width: w, y: q(4, i), height: Math.max(0.5, q(2, i) - q(4, i)), fill: color(0), "fill-opacity": 0.55 }));
    put(g, svg("line", { x1: x - w / 2, x2: x + w / 2, y1: q(3, i), y2: q(3, i), stroke: "var(--ink)", "stroke-width": 1.4 }));
    for (const k of [0, 6]) put(g, svg("circle", { cx: x, cy: q(k, i), r: Math.min(2, w / 2), fill: "var(--muted)" }));
    for (const bound of [b.low, b.high]) if (bound?.length) put(g, svg("line", { x1: x - w * 0.7, x2: x + w * 0.7, y1: f.y(bound[i]), y2: f.y(bound[i]), stroke: color(1), "stroke-width": 1.8 }));
    const first = Math.round(i * per), last = Math.max(first, Math.round((i + 1) * per) - 1);
    hover(g, () => [first === last ? `channel ${first}` : `channels ${first}–${last}`, `median ${fmt(b.quantiles[3][i])}`, `${fmt(b.quantiles[0][i])} … ${fmt(b.quantiles[6][i])}`, b.low?.length ? `levels ${fmt(b.low[i])} … ${fmt(b.high[i])}` : "float"]);
    put(f.plot, g);
  }
  if (b.per_tensor != null) for (const s of [-0.5, 0.5]) put(f.plot, svg("line", { x1: f.left, x2: f.right, y1: f.y(s * b.per_tensor), y2: f.y(s * b.per_tensor), stroke: "var(--muted)", "stroke-dasharray": "2 3" }));
  return f.root;
}

function roundingFigure(r) {
  const all = (r.same ?? 0) + (r.up ?? 0) + (r.down ?? 0);
  const how = all ? `Of ${fmt(all, 7)} weights between two levels, ${fmt(r.up ?? 0, 7)} (${share((r.up ?? 0) / all)}) went up and ${fmt(r.down ?? 0, 7)} (${share((r.down ?? 0) / all)}) down against nearest. ` : "";
  const unit = r.unit ? `Learned in ${r.unit}: error ${fmt(r.before)} → ${fmt(r.after)} of the variation${r.kept === false ? "; nearest rounding was better and stays" : ""}.` : "";
  if (!all) return html("p", { "data-figure": "rounding", "data-drawn": "true" }, unit);
  return put(figure("rounding", "Learned rounding against nearest", how + unit, (w) => drawRounding(r, w)), key([["learned: share rounded up", color(0)], ["nearest", "var(--ink)", "line"]]));
}
function drawRounding(r, width) {
  const n = r.up_share.length;
  const f = frame({ width, height: 200, x: [0, 1], y: [0, 1], xLabel: "place between the two levels", yLabel: "rounded up" });
  r.up_share.forEach((v, i) => {
    if (v == null) return;
    const x = f.x(i / n), w = f.x((i + 1) / n) - x;
    put(f.plot, hover(svg("rect", { x: x + 1, width: w - 2, y: f.y(v), height: f.bottom - f.y(v), fill: color(0), "fill-opacity": 0.7 }), () => [`${fmt(i / n)} … ${fmt((i + 1) / n)} of a step`, `${share(v)} rounded up`]));
  });
  return put(f.root, svg("path", { d: `M${f.x(0)},${f.y(0)}H${f.x(0.5)}V${f.y(1)}H${f.x(1)}`, fill: "none", stroke: "var(--ink)", "stroke-width": 1.6 }));
}

function drawErrorMap(e, width) {
  const n = e.cells.length, m = e.cells[0].length, values = e.cells.flat().filter((v) => v != null), [a, b] = extent(values);
  const cell = Math.max(4, Math.min(15, (width - 70) / m)), left = 52, root = svg("svg", { width, height: n * cell + 54, viewBox: `0 0 ${width} ${n * cell + 54}` });
  e.cells.forEach((line, i) => line.forEach((v, k) => put(root, hover(svg("rect", { x: left + k * cell, y: 4 + i * cell, width: cell - 0.5, height: cell - 0.5, fill: v == null ? "var(--line)" : heat((v - a) / (b - a || 1)) }), () => [`output ${part(e.rows, n, i)}, input ${part(e.columns, m, k)}`, v == null ? "nothing lost" : db(v)]))));
  put(root, svg("text", { class: "label", x: left, y: n * cell + 20 }, "input channel →"), svg("text", { class: "label", x: left, y: n * cell + 37 }, `dark ${fmt(a, 3)} dB … bright ${fmt(b, 3)} dB`));
  return put(root, svg("text", { class: "label", x: 14, y: 4 + (n * cell) / 2, transform: `rotate(-90 14 ${4 + (n * cell) / 2})`, "text-anchor": "middle" }, n * cell > 90 ? "output channel" : "output"));
}
const part = (size, pieces, i) => { const a = Math.round((i * size) / pieces), b = Math.max(a, Math.round(((i + 1) * size) / pieces) - 1); return a === b ? String(a) : `${a}–${b}`; };
// Dark blue to yellow, of even lightness steps (viridis at five places).
const HEAT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function heat(t) {
  const p = Math.max(0, Math.min(1, t)) * 4, i = Math.min(3, Math.floor(p)), u = p - i;
  return `rgb(${HEAT[i].map((c, k) => Math.round(c + (HEAT[i + 1][k] - c) * u)).join(",")})`;
}
