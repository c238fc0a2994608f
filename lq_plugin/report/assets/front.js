"use strict";
// The trials of a search by cost and metric: the front, the plan that was trained, and what it scores after training.
const LABELS = { effective_bits: "effective bits a parameter", quantizable_effective_bits: "effective bits of quantizable layers", bytes: "bytes", bops: "bit operations a sample", batch_bops: "bit operations of a batch", energy: "microjoules a sample, by Horowitz's table", activation_memory: "bytes of activations a sample at most", latency: "milliseconds a sample" };
const isBits = (name) => name.endsWith("effective_bits");
const axisLabel = (name) => LABELS[name] ?? name;
const number = (study, t, name) => (name === study.metric ? t.metric : name === study.cost ? t.cost : (t.numbers ?? {})[name]);
// Its looks say more of a plan than its trial.
const score = (t) => t.mean ?? t.metric;
const SHAPES = { uniform: ["diamond", 2], sensitivity: ["triangle", 3] };

function frontOf(study, name) {
  const sure = (t) => (study.maximize ? 1 : -1) * (t.bound ?? t.metric), sorted = [...study.trials].filter((t) => number(study, t, name) != null).sort((a, b) => number(study, a, name) - number(study, b, name) || sure(b) - sure(a));
  let best = -Infinity;
  return sorted.filter((t) => sure(t) > best && ((best = sure(t)), true));
}
// What the model of the same report scores on the metric of the search: its own score, not that of another variant.
function ownScore(run) {
  if (!run.model) return null;
  const found = (run.model.scores ?? []).filter((s) => s.metric === run.study.metric && s.variant !== "float");
  const own = found.find((s) => s.variant === "QAT") ?? found.find((s) => s.variant !== "PTQ");
  const value = (run.model.metrics ?? {})[run.study.metric];
  return own ?? (value == null || found.length ? null : { variant: "this model", value });
}
function ownCost(run, cost) {
  const trial = run.study.trials.find((t) => t.number === run.trained);
  return trial ? number(run.study, trial, cost) : (run.model?.totals ?? {})[cost];
}
// runs: one or two, with a study each
function frontFigure(runs, show) {
  const first = runs[0].study, names = first.costs.filter((c) => runs.every(({ study }) => study.trials.some((t) => number(study, t, c) != null)));
  const choice = html("select", { "aria-label": "horizontal axis", onchange: () => node.redraw() }, names.map((c) => html("option", { value: c }, axisLabel(c))));
  const state = { all: false };
  const toggle = html("button", { type: "button", class: "quiet all", "aria-pressed": "false", onclick: () => { state.all = !state.all; toggle.setAttribute("aria-pressed", state.all); node.redraw(); } }, "all trials");
  const node = figure("pareto", `${first.metric} over cost`, "The line joins the trials that no other beats, and the axes show the part around it; “all trials” shows the rest. Choose a trial to see its numbers and its plan.", (w) => drawFront(runs, choice.value || first.cost, state.all, show, w), [names.length > 1 ? choice : null, toggle]);
  const kinds = new Set(runs.flatMap(({ study }) => study.trials.map((t) => t.kind)));
  const entries = runs.flatMap(({ label, study }, k) => { const name = label ? `${label}: ` : ""; return [[`${name}front of ${study.trials.length} trials`, color(k ? 1 : 0), "line"], ...(kinds.has("sampled") ? [[`${name}${runs[0].kinds.sampled}`, color(k ? 1 : 0), "dot"]] : []), ...(kinds.has("refined") ? [[`${name}${runs[0].kinds.refined}`, color(k ? 1 : 0), "ring"]] : [])]; });
  for (const [kind, [shape, paint]] of Object.entries(SHAPES)) if (kinds.has(kind)) entries.push([runs[0].kinds[kind], color(paint), shape]);
  if (runs.some(({ study }) => study.float_metric != null)) entries.push(["float model", "var(--ink)", "dashes"]);
  if (runs.some(({ study }) => study.trials.some((t) => t.low != null))) entries.push([`interval of ${Math.round(100 * (first.confidence ?? 0.95))} % of plans that were scored again; the front joins their means and is chosen by their worse ends`, color(0), "line"]);
  if (runs.some((r) => r.trained != null)) entries.push(["plan of this page's model", "var(--ink)", "ring"]);
  const owns = [...new Set(runs.filter((r) => ownCost(r, first.cost) != null).map((r) => ownScore(r)?.variant).filter(Boolean))];
  for (const own of owns) entries.push([own === "QAT" ? "that plan after QAT, with its interval of 95 %" : own, "var(--c5)", "square"]);
  return put(node, key(entries));
}
// Limits of the axes: around the front, without the part of it that falls to guessing, or around everything.
function limits(runs, cost, all) {
  const sign = runs[0].study.maximize ? 1 : -1, xs = [], ys = [];
  const trials = runs.flatMap(({ study }) => study.trials.filter((t) => number(study, t, cost) != null).map((t) => [study, t]));
  const sorted = trials.map(([, t]) => sign * score(t)).sort((a, b) => b - a), top = sorted[0], middle = sorted[Math.floor(sorted.length / 2)];
  const least = top - Math.max(3 * (top - middle), 0.02 * Math.abs(top));
  const shown = all ? trials : runs.flatMap(({ study }) => { const front = frontOf(study, cost), good = front.filter((t) => sign * score(t) >= least); return (good.length ? good : front).map((t) => [study, t]); });
  for (const [study, t] of shown) { xs.push(number(study, t, cost)); ys.push(score(t), ...(t.low == null ? [] : [t.low, t.high])); }
  for (const run of runs) {
    if (run.study.float_metric != null) ys.push(run.study.float_metric);
    const own = ownScore(run), at = ownCost(run, cost), trained = run.study.trials.find((t) => t.number === run.trained);
    if (own && at != null) { xs.push(at); ys.push(own.value, ...(own.low == null ? [] : [own.low, own.high])); }
    if (trained) { xs.push(number(run.study, trained, cost)); ys.push(score(trained)); }
  }
  return { x: padded(extent(xs), 0.08), y: padded(extent(ys), 0.1), trials };
}
function drawFront(runs, cost, all, show, width) {
  const { x, y, trials } = limits(runs, cost, all);
  const f = frame({ width, height: Math.min(430, Math.max(300, width * 0.5)), x, y, xLabel: axisLabel(cost), yLabel: runs[0].study.metric, left: 60, xFormat: isBits(cost) ? undefined : big });
  const inside = (study, t) => { const a = f.x(number(study, t, cost)), b = f.y(score(t)); return a >= f.left - 1 && a <= f.right + 1 && b >= f.top - 1 && b <= f.bottom + 1; };
  const clip = "clip" + Math.random().toString(36).slice(2);
  put(f.root, svg("defs", {}, svg("clipPath", { id: clip }, svg("rect", { x: f.left - 8, y: f.top - 6, width: f.right - f.left + 16, height: f.bottom - f.top + 12 }))));
  f.plot.setAttribute("clip-path", `url(#${clip})`);
  const named = [];
  for (const { study } of runs) if (study.float_metric != null) put(f.plot, svg("line", { x1: f.left, x2: f.right, y1: f.y(study.float_metric), y2: f.y(study.float_metric), stroke: "var(--ink)", "stroke-dasharray": "6 4" }));
  runs.forEach((run, k) => {
    const { label, study } = run, paint = color(k ? 1 : 0), front = frontOf(study, cost), onFront = new Set(front);
    put(f.plot, svg("path", { d: path(front.map((t) => [f.x(number(study, t, cost)), f.y(score(t))]), true), fill: "none", stroke: paint, "stroke-width": 1.8 }));
    for (const t of [...study.trials.filter((t) => !onFront.has(t)), ...front]) {
      const value = number(study, t, cost);
      // What is outside of the picture cannot be reached by keys either.
      if (value == null || !inside(study, t)) continue;
      const px = f.x(value), py = f.y(score(t)), best = onFront.has(t), [shape, tint] = SHAPES[t.kind] ?? ["dot"];
      const lines = () => [`${label ? label + ", " : ""}trial ${t.number}: ${t.origin}`, `${study.metric} ${fmt(t.metric, 5)}`, ...(t.low == null ? [] : [`looked at again: ${fmt(t.mean, 5)}, ${fmt(t.low)} … ${fmt(t.high)}`]), `${axisLabel(cost)} ${fmt(value)}`, ...(t.number === run.trained ? ["the plan of this page's model"] : [])];
      if (best && t.low != null) put(f.plot, svg("g", { class: "interval", "data-trial": t.number, "pointer-events": "none" }, svg("line", { x1: px, x2: px, y1: f.y(t.low), y2: f.y(t.high), stroke: paint, "stroke-width": 1.4 }), [t.low, t.high].map((v) => svg("line", { x1: px - 4, x2: px + 4, y1: f.y(v), y2: f.y(v), stroke: paint, "stroke-width": 1.4 }))));
      const mark = shape === "diamond" ? svg("path", { d: `M${px},${py - 7}L${px + 7},${py}L${px},${py + 7}L${px - 7},${py}Z`, fill: color(tint), stroke: "var(--paper)" })
        : shape === "triangle" ? svg("path", { d: `M${px},${py - 6.5}L${px + 6.5},${py + 5}L${px - 6.5},${py + 5}Z`, fill: color(tint), stroke: "var(--paper)" })
        : t.kind === "refined" ? svg("circle", { cx: px, cy: py, r: best ? 4.5 : 3, fill: "var(--paper)", "fill-opacity": 0.6, stroke: paint, "stroke-width": best ? 2.4 : 1.2 })
        : svg("circle", { cx: px, cy: py, r: best ? 5 : 3, fill: paint, "fill-opacity": best ? 1 : 0.5, stroke: best ? "var(--paper)" : null });
      mark.classList.add("pick");
      mark.setAttribute("data-trial", t.number);
      if (best || SHAPES[t.kind]) {
        mark.setAttribute("tabindex", "0");
        mark.setAttribute("role", "button");
        mark.setAttribute("aria-label", lines().join(", "));
        mark.addEventListener("focus", () => { if (mark.matches(":focus-visible")) { const b = mark.getBoundingClientRect(); showTip(lines(), b.right, b.bottom); } });
        mark.addEventListener("blur", hideTip);
        mark.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); show(study, t); } });
      }
      mark.addEventListener("click", () => show(study, t));
      put(f.plot, hover(mark, lines));
      if (t.kind === "uniform" && width > 560) named.push([px, py, t.origin]);
    }
    drawOwn(f, run, cost);
  });
  // Names where there is room for them.
  const taken = [];
  for (const [px, py, name] of named) {
    const long = 6 * name.length, left = px - 11 - long > f.left, box = left ? [px - 11 - long, px - 11] : [px + 11, px + 11 + long];
    if (taken.some(([a, b, h]) => Math.abs(h - py) < 13 && a < box[1] && b > box[0])) continue;
    taken.push([...box, py]);
    put(f.plot, svg("text", { class: "halo", x: left ? px - 11 : px + 11, y: py + 15, "text-anchor": left ? "end" : "start" }, name));
  }
  const beyond = trials.filter(([study, t]) => !inside(study, t)).length;
  if (beyond) put(f.root, svg("text", { class: "beyond", x: f.right, y: f.bottom - 6, "text-anchor": "end" }, `${beyond} trials outside of the picture`));
  f.root.setAttribute("aria-label", `${trials.length} trials by ${cost} and ${runs[0].study.metric}, ${beyond} of them outside of the picture`);
  return f.root;
}
// The plan that was trained, and the trained model above or below it.
function drawOwn(f, run, cost) {
  const { study } = run, trial = study.trials.find((t) => t.number === run.trained), own = ownScore(run), at = ownCost(run, cost);
  const from = trial && number(study, trial, cost) != null ? [f.x(number(study, trial, cost)), f.y(score(trial))] : null;
  if (own && at != null) {
    const px = f.x(at), py = f.y(own.value), paint = "var(--c5)", g = svg("g", { "data-own": own.variant, "data-value": own.value });
    if (from) put(g, svg("line", { x1: from[0], y1: from[1], x2: px, y2: py, stroke: paint, "stroke-dasharray": "3 3" }));
    if (own.low != null) put(g, svg("line", { x1: px, x2: px, y1: f.y(own.low), y2: f.y(own.high), stroke: paint, "stroke-width": 2 }), [own.low, own.high].map((v) => svg("line", { x1: px - 5, x2: px + 5, y1: f.y(v), y2: f.y(v), stroke: paint, "stroke-width": 2 })));
    put(g, svg("rect", { x: px - 5, y: py - 5, width: 10, height: 10, fill: paint, stroke: "var(--paper)" }));
    put(f.plot, hover(g, () => [own.variant === "QAT" ? "this plan after QAT" : own.variant, `${study.metric} ${fmt(own.value, 5)}`, ...(own.low == null ? [] : [`95 %: ${fmt(own.low)} … ${fmt(own.high)}`])]));
  }
  if (from) put(f.plot, svg("circle", { class: "trained", "data-trial": trial.number, cx: from[0], cy: from[1], r: 10, fill: "none", stroke: "var(--ink)", "stroke-width": 2, "pointer-events": "none" }));
}
