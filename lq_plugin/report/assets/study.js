"use strict";
// A search: parallel coordinates, bits of the best plans, importance, hypervolume; its front is in front.js.
// Letters that all of some texts begin with, up to the end of a word.
function shared(texts) {
  const first = texts[0] ?? "", n = [...first].findIndex((c, i) => texts.some((t) => t[i] !== c));
  return n < 0 ? 0 : 1 + Math.max(first.lastIndexOf(" ", n - 1), first.lastIndexOf("_", n - 1));
}
function parallelFigure(study) {
  const brush = {};
  const node = figure("parallel", "Parallel coordinates", "One line a trial, coloured by the metric. Drag along an axis to keep the trials in that part; click the axis to let go.", (w) => drawParallel(study, brush, w, () => node.redraw()));
  return node;
}
function drawParallel(study, brush, width, redraw) {
  const [cost, ...others] = study.costs.map((c) => [c, study.trials.map((t) => number(study, t, c))]);
  const axes = [[study.metric, study.trials.map((t) => t.metric)], cost, ...Object.entries(study.parameters ?? {}), ...others];
  const shown = axes.slice(0, Math.max(3, Math.min(axes.length, Math.floor(width / 92))));
  const height = 320, top = 58, bottom = height - 18, left = 40, right = width - 40;
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  const scales = shown.map(([name, values]) => {
    const known = values.filter((v) => v != null);
    if (known.every((v) => typeof v === "number")) { const s = linear(padded(extent(known), 0.02), [bottom, top]); return { name, at: s, ticks: s.ticks(5).map((t) => [t, big(t)]) }; }
    const kinds = [...new Set(known.map(String))].sort(), step = (bottom - top) / Math.max(kinds.length, 1);
    return { name, at: (v) => bottom - step * (kinds.indexOf(String(v)) + 0.5), ticks: kinds.map((k) => [k, shorten(k.slice(shared(kinds)), 17)]) };
  });
  const x = (i) => left + ((right - left) * i) / Math.max(1, shown.length - 1);
  const kept = (j) => shown.every(([name, values], i) => !brush[name] || (values[j] != null && scales[i].at(values[j]) >= brush[name][0] && scales[i].at(values[j]) <= brush[name][1]));
  const order = study.trials.map((t, j) => [j, study.maximize ? t.metric : -t.metric]).sort((a, b) => a[1] - b[1]), last = Math.max(1, order.length - 1);
  order.forEach(([j], rank) => {
    const points = shown.map(([, values], i) => (values[j] == null ? null : [x(i), scales[i].at(values[j])])).filter(Boolean), on = kept(j), t = study.trials[j];
    put(root, hover(svg("path", { d: path(points), fill: "none", stroke: on ? heat(rank / last) : "var(--line)", "stroke-width": t.front ? 2 : 1, opacity: on ? (t.front ? 1 : 0.45) : 0.3 }), () => [`trial ${t.number}: ${t.origin}`, ...shown.map(([name, values]) => `${name} ${fmt(values[j])}`)]));
  });
  scales.forEach((s, i) => {
    const g = svg("g", { class: "axis pick" }), anchor = i === 0 ? "start" : i === scales.length - 1 ? "end" : "middle", tx = i === 0 ? 4 : i === scales.length - 1 ? width - 4 : x(i);
    put(g, svg("line", { class: "base", x1: x(i), x2: x(i), y1: top, y2: bottom }), svg("rect", { x: x(i) - 10, width: 20, y: top, height: bottom - top, fill: "transparent" }));
    const words = s.name.replace(/\.(bits|scheme)$/, " $1"), room = Math.max(8, Math.floor((right - left) / Math.max(1, shown.length - 1) / 7.4)), pieces = words.length <= room ? [words] : [shorten(words.split(" ")[0], room), words.split(" ")[1] ?? ""];
    pieces.forEach((line, k) => put(g, svg("text", { class: "label", x: tx, y: 16 + 14 * k + (i % 2 ? 14 : 0) * (pieces.length > 1 ? 0 : 1), "text-anchor": anchor }, line)));
    put(g, svg("title", {}, s.name));
    for (const [t, label] of s.ticks) put(g, svg("text", { class: "halo", x: x(i) + (i === scales.length - 1 ? -5 : 5), y: s.at(t) + 4, "text-anchor": i === scales.length - 1 ? "end" : "start" }, label));
    if (brush[s.name]) put(g, svg("rect", { class: "brush", x: x(i) - 7, width: 14, y: brush[s.name][0], height: brush[s.name][1] - brush[s.name][0] }));
    let start = null;
    const where = (e) => Math.max(top, Math.min(bottom, ((e.clientY - root.getBoundingClientRect().top) / root.getBoundingClientRect().height) * height));
    g.addEventListener("pointerdown", (e) => { start = where(e); g.setPointerCapture(e.pointerId); e.preventDefault(); });
    g.addEventListener("pointerup", (e) => { if (start == null) return; const end = where(e); if (Math.abs(end - start) < 4) delete brush[s.name]; else brush[s.name] = [Math.min(start, end), Math.max(start, end)]; start = null; redraw(); });
    put(root, g);
  });
  return root;
}

function heatFigure(study, show) {
  const slots = [["weight_bits", "weights"], ["input_bits", "inputs"]].filter(([slot]) => study.best.some((b) => (b[slot] ?? []).some((v) => v != null)));
  const choice = html("select", { "aria-label": "tensor", onchange: () => node.redraw() }, slots.map(([slot, name]) => html("option", { value: slot }, name)));
  const node = figure("bits", "Bits by layer of the best plans", `${study.best.length} plans of the front, the best first; choose a row to see its plan.`, (w) => drawBits(study, choice.value || "weight_bits", show, w), slots.length > 1 ? choice : null);
  return node;
}
function drawBits(study, slot, show, width) {
  const n = study.best.length, m = study.layers.length, left = 46, byNumber = Object.fromEntries(study.trials.map((t) => [t.number, t]));
  const cell = Math.max(3, Math.min(34, (width - left - 6) / m)), high = Math.max(13, Math.min(22, 420 / n)), across = Math.max(1, Math.floor((width - left) / 58)), names = cell >= 10 ? 14 + 6.4 * Math.min(18, Math.max(...study.layers.map((l) => l.length))) : 18;
  const widths = [...new Set(study.best.flatMap((b) => b[slot] ?? []).filter((v) => v != null))].sort((a, b) => a - b), tint = (v) => (v == null ? "var(--line)" : heat(widths.length > 1 ? 0.08 + (0.84 * widths.indexOf(v)) / (widths.length - 1) : 0.5));
  const kinds = widths.concat(study.best.some((b) => (b[slot] ?? []).includes(null)) ? [null] : []), legend = 6 + 20 * Math.ceil(kinds.length / across);
  const height = n * high + names + legend, root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  kinds.forEach((v, k) => {
    const x = left + 58 * (k % across), y = 3 + 20 * Math.floor(k / across);
    put(root, svg("rect", { x, y, width: 14, height: 14, fill: tint(v) }), svg("text", { x: x + 18, y: y + 12 }, v == null ? "float" : `${v} bit`));
  });
  study.best.forEach((b, i) => {
    const y = legend + i * high, g = svg("g", { class: "pick", tabindex: i ? "-1" : "0", role: "button", "aria-label": `plan of trial ${b.number}` }), t = byNumber[b.number];
    put(g, svg("text", { x: left - 6, y: y + high / 2 + 4, "text-anchor": "end" }, `#${b.number}`));
    (b[slot] ?? []).forEach((v, k) => {
      put(g, hover(svg("rect", { x: left + k * cell, y, width: Math.max(cell - 0.7, 1), height: high - 1, fill: tint(v) }), () => [study.layers[k], `${v == null ? "float" : v + " bit"}, trial ${b.number}`, t ? `${study.metric} ${fmt(t.metric, 5)}, ${axisLabel(study.cost)} ${fmt(t.cost)}` : ""]));
      if (v != null && cell >= 16 && high >= 13) put(g, svg("text", { class: "cell", x: left + (k + 0.5) * cell, y: y + high / 2 + 4, "text-anchor": "middle", style: `fill:${widths.indexOf(v) > (widths.length - 1) * 0.55 ? "#111" : "#fff"}` }, String(v)));
    });
    g.addEventListener("click", () => t && show(study, t));
    g.addEventListener("keydown", (e) => {
      if ((e.key === "Enter" || e.key === " ") && t) { e.preventDefault(); show(study, t); }
      const rows = [...root.querySelectorAll("g.pick")], to = { ArrowDown: i + 1, ArrowUp: i - 1 }[e.key];
      if (to != null && rows[to]) { e.preventDefault(); rows[to].focus(); }
    });
    put(root, g);
  });
  const y = legend + n * high + 8;
  if (cell >= 10) study.layers.forEach((name, k) => { const x = left + (k + 0.5) * cell + 3; put(root, svg("text", { x, y, transform: `rotate(-90 ${x} ${y})`, "text-anchor": "end" }, shorten(name, 18))); });
  else put(root, svg("text", { class: "label", x: left, y: y + 8 }, `${m} layers, in the model's order`));
  return root;
}

function importanceFigure(study) {
  const found = Object.entries(study.importance ?? {});
  return figure("importance", "What mattered for " + study.metric, "Share of the variation among the best trials that each parameter accounts for (PED-ANOVA).", (width) => {
    const shown = found.slice(0, 20), high = 20, left = Math.min(210, width * 0.45), height = shown.length * high + 8, root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` }), most = Math.max(...shown.map(([, v]) => v), 1e-9);
    shown.forEach(([name, v], i) => put(root, svg("text", { x: left - 8, y: i * high + 15, "text-anchor": "end" }, shorten(name, Math.floor(left / 6.6)), svg("title", {}, name)), svg("rect", { x: left, y: i * high + 4, width: Math.max(1, ((width - left - 60) * v) / most), height: high - 7, fill: color(0) }), svg("text", { x: left + ((width - left - 60) * v) / most + 6, y: i * high + 15 }, share(v))));
    return root;
  });
}
function hypervolumeFigure(studies) {
  const node = figure("hypervolume", "How far the search came", "Share of the box between the worst and the best values that the trials so far dominate. A line that has gone flat says the search is over.", (width) => {
    const f = frame({ width, height: 220, x: [0, Math.max(1, ...studies.map(({ study }) => study.trials.length))], y: [0, Math.max(...studies.flatMap(({ study }) => study.hypervolume), 0.1) * 1.05], xLabel: "trials", yLabel: "hypervolume" });
    studies.forEach(({ study }, k) => put(f.plot, hover(svg("path", { d: path(study.hypervolume.map((v, i) => [f.x(i + 1), f.y(v)]), true), fill: "none", stroke: color(k ? 1 : 0), "stroke-width": 2 }), () => [`${study.name}: ${fmt(study.hypervolume.at(-1))} after ${study.trials.length} trials`])));
    return f.root;
  });
  return studies.length > 1 ? put(node, key(studies.map(({ label, study }, k) => [label || study.name, color(k ? 1 : 0), "line"]))) : node;
}
