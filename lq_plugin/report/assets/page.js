"use strict";
const DATA = JSON.parse(document.getElementById("report-data").textContent);
const RUNS = DATA.runs.map((run, i) => ({ ...run, label: DATA.runs.length > 1 ? "AB"[i] : "" }));
const PAIR = RUNS.length > 1;
const models = RUNS.filter((r) => r.model), studies = RUNS.filter((r) => r.study);
const main = document.querySelector("main");
const pairs = (entries) => html("div", { class: entries.length > 1 ? "pair" : "" }, entries.map(({ run, parts }) => html("div", {}, run.label ? html("h3", { class: "side" }, `${run.label}: ${run.title}`) : null, parts)));
function section(id, title, ...parts) {
  const node = html("section", { id, "aria-labelledby": id + "-title" }, html("h2", { id: id + "-title", tabindex: "-1" }, title), parts);
  put(main, node);
  return node;
}
const signed = (v, show) => (v == null ? "–" : (v > 0 ? "+" : v < 0 ? "−" : "±") + show(Math.abs(v)));

function cards(run) {
  const found = [];
  if (run.model) {
    const t = run.model.totals ?? {}, metric = mainMetric(run), scores = scoresOf(run).filter((s) => s.metric === metric);
    for (const s of scores) found.push([`${metric}, ${s.variant}`, asScore(s), interval(s)]);
    if (!scores.length) for (const [name, value] of Object.entries(run.model.metrics ?? {}).slice(0, 4)) found.push([name, fmt(value)]);
    found.push(["effective bits", fmt(t.effective_bits)], ["size", bytes(t.bytes), t.compression == null ? "" : fmt(t.compression, 3) + " × smaller"]);
    if (run.model.weight_coverage != null) found.push(["weights quantized", share(run.model.weight_coverage)]);
    if (run.model.compute_coverage != null) found.push(["MACs quantized", share(run.model.compute_coverage)]);
    if (t.bops != null) found.push(["BOPs a sample", big(t.bops)]);
    if (t.activation_bytes != null) found.push(["activations a sample", bytes(t.activation_bytes), `float ${bytes(t.float_activation_bytes)}`]);
    const bad = run.model.layers.filter((l) => troubles(l).length).length;
    found.push(["layers", String(run.model.layers.length), bad ? `${bad} in trouble` : ""]);
  } else if (run.study) found.push(...studyCards(run.study));
  return cardList(found);
}
const bestTrial = (s) => s.trials.find((t) => t.number === (s.best ?? [])[0]?.number);
function studyCards(s) {
  const best = bestTrial(s), found = [["trials", String(s.trials.length)], ["on the front", String(s.trials.filter((t) => t.front).length)]];
  if (best) found.push(["best " + s.metric, fmt(best.mean ?? best.metric), `${best.low == null ? "" : `${fmt(best.low)} … ${fmt(best.high)}, `}at ${isBits(s.cost) ? fmt(best.cost, 3) + " bits" : big(best.cost)}`]);
  if (s.float_metric != null) found.push(["float " + s.metric, fmt(s.float_metric)]);
  return found;
}
const cardList = (found) => html("dl", { class: "cards" }, found.map(([k, v, note]) => html("div", {}, html("dt", {}, k), html("dd", {}, v), note ? html("dd", { class: "note" }, note) : null)));

// Layers
const order = [...new Set(models.flatMap((r) => r.model.layers.map((l) => l.name)))];
const layerOf = (run, name) => run.model.layers.find((l) => l.name === name);
const openLayer = (name) => { location.hash = "layer=" + encodeURIComponent(name); };
let panel = null, opener = null;
function showLayer(name, focus) {
  const at = order.indexOf(name);
  if (at < 0) return;
  forget(panel);
  const having = models.filter((r) => layerOf(r, name));
  const step = (by) => html("button", { type: "button", disabled: !order[at + by], onclick: () => openLayer(order[at + by]), "aria-label": by < 0 ? "previous layer" : "next layer" }, by < 0 ? "←" : "→");
  panel.replaceChildren(
    html("div", { class: "head" }, html("h2", { id: "layer-title", tabindex: "-1" }, name), html("div", { class: "tools" }, step(-1), step(1), html("button", { type: "button", class: "close", onclick: closeLayer, "aria-label": "close the layer" }, "✕"))),
    pairs(having.map((run) => ({ run, parts: html("div", { class: having.length > 1 ? "figures one" : "figures" }, layerPage(layerOf(run, name))) }))));
  panel.hidden = false;
  for (const b of document.querySelectorAll(".layer")) b.setAttribute("aria-pressed", b.dataset.layer === name);
  if (focus) { panel.scrollIntoView({ block: "start" }); document.getElementById("layer-title").focus({ preventScroll: true }); }
}
function closeLayer() {
  if (!panel || panel.hidden) return;
  const button = document.querySelector('.layer[aria-pressed="true"]');
  forget(panel);
  panel.hidden = true;
  panel.replaceChildren();
  for (const b of document.querySelectorAll(".layer")) b.setAttribute("aria-pressed", "false");
  history.replaceState(null, "", location.pathname + location.search);
  (button ?? opener)?.focus();
}
function route(focus) {
  const match = /^#layer=(.+)$/.exec(location.hash);
  if (match && panel) { hideTip(); showLayer(decodeURIComponent(match[1]), focus); }
}
function layerDifferences() {
  const [a, b] = models, rows = order.map((name) => ({ name, a: layerOf(a, name), b: layerOf(b, name) }));
  const both = (of) => (r) => (r.a && r.b && of(r.a) != null && of(r.b) != null ? num(of(r.b)) - num(of(r.a)) : null);
  const weightDb = (l) => (l.sqnr_db ?? {}).weight, inputDb = (l) => (l.sqnr_db ?? {}).input;
  return dataTable("differences", [["layer", (r) => r.name], ["weight A", (r) => r.a && weightSpec(r.a)], ["weight B", (r) => r.b && weightSpec(r.b)], ["input A", (r) => r.a && ((r.a.specs ?? {}).input ?? "float")], ["input B", (r) => r.b && ((r.b.specs ?? {}).input ?? "float")],
    ["effective bits B−A", both((l) => l.effective_bits), (v) => signed(v, fmt)], ["SQNR weight B−A", both(weightDb), (v) => signed(v, db)], ["SQNR input B−A", both(inputDb), (v) => signed(v, db)], ["bytes B−A", both((l) => l.bytes), (v) => signed(v, bytes)], ["BOPs a sample B−A", both((l) => l.bops), (v) => signed(v, big)]], rows, { open: (r) => openLayer(r.name) });
}
function totals() {
  const rows = [["effective bits", (r) => r.model?.totals.effective_bits, fmt], ["bytes", (r) => r.model?.totals.bytes, bytes], ["MACs a sample", (r) => r.model?.totals.macs, big], ["BOPs a sample", (r) => r.model?.totals.bops, big], ["weights quantized", (r) => r.model?.weight_coverage, share], ["MACs quantized", (r) => r.model?.compute_coverage, share]];
  for (const name of new Set(RUNS.flatMap((r) => Object.keys(r.model?.metrics ?? {})))) rows.push([name, (r) => r.model?.metrics?.[name], fmt]);
  if (studies.length) rows.push(["trials", (r) => r.study?.trials.length, fmt], ["best metric", (r) => r.study && Math.max(...r.study.trials.map((t) => (r.study.maximize ? 1 : -1) * t.metric)) * (r.study.maximize ? 1 : -1), fmt]);
  const known = rows.map(([name, of, show]) => ({ name, a: of(RUNS[0]), b: of(RUNS[1]), show })).filter((r) => r.a != null || r.b != null);
  return html("div", { class: "scroll" }, html("table", { "data-figure": "table-totals", "data-drawn": "true" }, html("thead", {}, html("tr", {}, ["", `A: ${RUNS[0].title}`, `B: ${RUNS[1].title}`, "B − A"].map((t) => html("th", { scope: "col" }, t)))),
    html("tbody", {}, known.map((r) => html("tr", {}, html("th", { scope: "row" }, r.name), html("td", { class: "number" }, r.show(r.a)), html("td", { class: "number" }, r.show(r.b)), html("td", { class: "number" }, r.a == null || r.b == null ? "–" : signed(r.b - r.a, r.show)))))));
}

// Trials
let trialPanel = null;
function showTrial(study, t) {
  hideTip();
  const plan = (study.best ?? []).find((b) => b.number === t.number), run = studies.find((r) => r.study === study);
  const again = t.low == null ? {} : { [`${study.metric}, looked at again`]: t.mean, "interval from": t.low, "interval to": t.high, looks: t.looks };
  const numbers = Object.entries({ [study.metric]: t.metric, ...again, ...t.numbers });
  trialPanel.replaceChildren(html("h3", { id: "trial-title", tabindex: "-1" }, `${run.label ? run.label + ", " : ""}Trial ${t.number}: ${t.origin}`),
    html("dl", { class: "facts" }, [...numbers.map(([k, v]) => [k, k === "bytes" || k === "activation_memory" ? bytes(v) : k === "bops" ? big(v) : fmt(v, 5)]), ["seconds", fmt(t.seconds, 3)]].map(([k, v]) => html("div", {}, html("dt", {}, k), html("dd", {}, v)))),
    plan ? copyable(plan.plan, `plan of trial ${t.number}`) : html("p", { class: "muted" }, "Plans are kept of the front's trials only."));
  trialPanel.hidden = false;
  trialPanel.scrollIntoView({ block: "nearest" });
  document.getElementById("trial-title").focus({ preventScroll: true });
}

function build() {
  document.querySelector("h1").textContent = RUNS.map((r) => (r.label ? r.label + ": " : "") + r.title).join("   ·   ");
  const head = document.querySelector("header");
  put(head, pairs(RUNS.map((run) => ({ run, parts: cards(run) }))));
  for (const note of new Set(RUNS.flatMap((r) => r.notes ?? []))) put(head, html("p", { class: "muted" }, note));
  const answered = models.filter((r) => scoresOf(r).length || Object.keys(r.model.stored ?? {}).length);
  const answers = () => section("answers", "Scores and size", pairs(answered.map((run) => ({ run, parts: [scoreFigure(run), scoresOf(run).length ? scoreTable(run) : null, storedFigure(run.model)] }))));
  if (PAIR) section("compare", "A against B", totals(), models.length > 1 ? layerDifferences() : null);
  if (answered.length) answers();
  const layers = models.flatMap((r) => r.model.layers);
  if (models.length) {
    const node = section("layers", "Layers");
    put(node, html("p", { class: "muted" }, "Bars: bits of the weight on a logarithmic axis, lighter with scales and zero points; diamonds: bits of the input. Choose a layer to see it."));
    const bad = models.some((r) => r.model.layers.some((l) => troubles(l).length));
    if (bad) put(node, html("p", { class: "criterion" }, html("b", { class: "bad" }, "! red"), ` is a layer in trouble: the SQNR of its weight, its input or its output is under ${TROUBLE_DB} dB, which means that the error has more than a tenth of the energy of the values. Training can make up for it, which the scores tell.`));
    for (const run of models) put(node, run.label ? html("h3", { class: "side" }, `${run.label}: ${run.title}`) : null, strip(run.model, layers, openLayer));
    panel = html("section", { id: "layer", "aria-labelledby": "layer-title", hidden: true });
    put(main, panel);
    for (const run of models) put(node, html("details", {}, html("summary", {}, `The same numbers as a table${run.label ? ": " + run.label : ""}`), layerTable(run.model, openLayer)));
  }
  const paths = models.map((run) => ({ run, parts: pathFigure(run.model, layers, openLayer) })).filter(({ parts }) => parts);
  if (paths.length) section("path", "Along the network", pairs(paths));
  const sensitive = RUNS.filter((r) => r.sensitivity && Object.keys(r.sensitivity.values).length);
  if (sensitive.length) section("sensitivity", "Sensitivity", pairs(sensitive.map((run) => ({ run, parts: sensitivityFigure(run) }))));
  const trained = models.filter((r) => seriesGroups(r.model.training ?? []).size);
  if (trained.length) section("training", "Training", pairs(trained.map((run) => ({ run, parts: html("div", { class: PAIR ? "figures one" : "figures" }, trainingFigure(run.model, models, 0), trainingFigure(run.model, models, 1)) }))));
  const timed = models.filter((r) => (r.model.schedule ?? []).length);
  const searched = studies.filter((r) => r.study.trials.length);
  if (searched.length) {
    const node = section("study", "Search");
    if (models.length) put(node, pairs(searched.map((run) => ({ run: { ...run, label: searched.length > 1 ? run.label : "" }, parts: cardList(studyCards(run.study)) }))));
    put(node, frontFigure(searched, showTrial));
    trialPanel = html("div", { class: "panel", "aria-labelledby": "trial-title", hidden: true });
    put(node, trialPanel, hypervolumeFigure(searched));
    put(node, pairs(searched.map((run) => ({ run, parts: [parallelFigure(run.study), (run.study.best ?? []).length ? heatFigure(run.study, showTrial) : null, Object.keys(run.study.importance ?? {}).length ? importanceFigure(run.study) : null,
      html("details", {}, html("summary", {}, "All trials as a table"), trialTable(run.study))] }))));
  }
  const ledgers = models.filter((r) => (r.model.ledger ?? []).length);
  if (ledgers.length) section("ledger", "What is quantized, and what is not", pairs(ledgers.map((run) => ({ run, parts: ledgerTable(run.model) }))));
  const exported = RUNS.filter((r) => (r.files ?? []).length);
  if (exported.length) section("files", "Exported files", html("p", { class: "muted" }, "Each file ran in its runtime next to the model. A step is a 255th of the range of a batch's outputs; the first difference is the first layer whose input differs by more than one of its own steps."), pairs(exported.map((run) => ({ run, parts: fileTable(run.files) }))));
  const plans = models.filter((r) => r.model.plan);
  if (plans.length) section("plan", "Plan", pairs(plans.map((run) => ({ run, parts: [timed.includes(run) ? html("ul", { class: "schedule" }, run.model.schedule.map((p) => html("li", {}, html("b", {}, `${p.unit} ${p.count}`), " " + p.label))) : null, copyable(run.model.plan, "plan as YAML")] }))));
  const known = RUNS.filter((r) => Object.keys(r.provenance ?? {}).length);
  if (known.length) section("made", "Where this comes from", pairs(known.map((run) => ({ run, parts: provenanceList(run) }))));
  put(document.querySelector("nav ul"), [...main.querySelectorAll("section > h2")].filter((h) => h.id !== "layer-title").map((h) => html("li", {}, html("a", { href: "#" + h.parentNode.id }, h.textContent))));
  put(document.body, tip);
  addEventListener("hashchange", () => route(true));
  addEventListener("keydown", (e) => { if (e.key === "Escape") { if (!tip.hidden) hideTip(); else closeLayer(); } });
  // Chrome leaves what has the focus half hidden where 32 pixels of it can be seen.
  addEventListener("focusin", (e) => { if (e.target.matches("a, button, .pick") && e.target.matches(":focus-visible")) e.target.scrollIntoView({ block: "nearest", inline: "nearest" }); });
  addEventListener("scroll", hideTip, { passive: true });
  route(false);
  document.documentElement.dataset.ready = "true";
}
function trialTable(study) {
  const columns = [["trial", (t) => t.number], [study.metric, (t) => t.metric], ...(study.trials.some((t) => t.low != null) ? [["looked at again", (t) => t.mean], ["from", (t) => t.low], ["to", (t) => t.high]] : []), ...study.costs.map((c) => [c, (t) => number(study, t, c), isBits(c) ? undefined : big]), ["from", (t) => t.origin], ["front", (t) => (t.front ? "front" : "")], ["seconds", (t) => t.seconds]];
  return dataTable("trials", columns, study.trials, { open: (t) => showTrial(study, t) });
}
build();
