"use strict";
// Tables with sorting and a filter, text with a copy button, and numbers over a training run.
// columns: [title, row => value, format, kind]
function dataTable(name, columns, rows, { open, filter = true } = {}) {
  let sort = null, down = true, wanted = "";
  const count = html("span", { class: "muted", role: "status" }), body = html("tbody");
  const plain = (v) => (v == null ? "" : typeof v === "number" ? v : String(v));
  const numeric = columns.map(([, of]) => rows.some((row) => typeof of(row) === "number"));
  const heads = columns.map(([title], i) => {
    const head = html("th", { scope: "col", class: numeric[i] ? "number" : null }, html("button", { type: "button", onclick: () => { down = sort === i ? !down : numeric[i]; sort = i; fill(); } }, title));
    return head;
  });
  function fill() {
    const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = rows.filter((row) => { const text = columns.map(([, of]) => plain(of(row))).join(" ").toLowerCase(); return words.every((w) => (w.startsWith("-") && w.length > 1 ? !text.includes(w.slice(1)) : text.includes(w))); });
    if (sort != null) {
      const of = columns[sort][1], sign = down ? -1 : 1;
      shown = [...shown].sort((a, b) => { const p = of(a), q = of(b); if (p == null || q == null) return (p == null) - (q == null); return sign * (typeof p === "number" && typeof q === "number" ? p - q : String(p).localeCompare(String(q))); });
    }
    heads.forEach((h, i) => { if (i === sort) h.setAttribute("aria-sort", down ? "descending" : "ascending"); else h.removeAttribute("aria-sort"); });
    body.replaceChildren(...shown.map((row) => html("tr", {}, columns.map(([, of, show, kind], i) => {
      const v = of(row), text = show ? show(v) : v == null ? "–" : fmt(v), cell = html(i ? "td" : "th", { scope: i ? null : "row", class: numeric[i] ? "number" : null });
      return put(cell, i === 0 && open ? html("button", { type: "button", class: "link", onclick: () => open(row) }, text) : text);
    }))));
    count.textContent = shown.length === rows.length ? `${rows.length} rows` : `${shown.length} of ${rows.length} rows`;
  }
  const input = html("input", { type: "search", placeholder: "filter, -word leaves out", "aria-label": `filter ${name}`, oninput: (e) => { wanted = e.target.value; fill(); } });
  fill();
  return html("div", { class: "table", "data-figure": "table-" + name, "data-drawn": "true" }, filter ? html("div", { class: "tools" }, input, count) : null,
    html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, html("table", {}, html("thead", {}, html("tr", {}, heads)), body)));
}

function copyable(text, label) {
  const said = html("span", { class: "muted", role: "status" });
  const pre = html("pre", { tabindex: "0", "aria-label": label }, text);
  async function copy() {
    try { await navigator.clipboard.writeText(text); }
    catch {
      // Pages opened from disk may have no clipboard: the old way needs a selection.
      const range = document.createRange();
      range.selectNodeContents(pre);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    said.textContent = "copied";
    setTimeout(() => { said.textContent = ""; }, 2000);
  }
  return html("div", { class: "copyable" }, html("div", { class: "tools" }, html("button", { type: "button", class: "copy", onclick: copy }, "Copy"), said), pre);
}

function ledgerTable(model) {
  const columns = [["name", (r) => r.name], ["kind", (r) => r.kind], ...["weight", "input", "output"].map((slot) => [slot, (r) => r[slot]]), ["parameters", (r) => r.parameters, big], ["MACs a sample", (r) => r.macs, big], ["calls", (r) => r.calls], ["why float", (r) => r.reason]];
  return dataTable("ledger", columns.filter(([title, of]) => title === "name" || (model.ledger ?? []).some((r) => of(r) != null)), model.ledger ?? []);
}

// Exported files in their runtimes, next to the model.
function fileTable(files) {
  const metrics = [...new Set(files.flatMap((f) => Object.keys((f.metrics ?? {}).model ?? {})))];
  const columns = [["file", (f) => f.file], ["target", (f) => f.target], ["runtime", (f) => `${f.runtime} ${(f.versions ?? {})[f.runtime] ?? ""}`.trim()], ["size", (f) => f.bytes, bytes],
    ["same class", (f) => f.agreement, share], ["outputs within a step", (f) => f.within_one_step, share], ["largest steps", (f) => num(f.largest_steps), (v) => fmt(v, 3)],
    ["integer products", (f) => (f.products == null ? null : `${f.integer ?? 0} of ${f.products}`)], ["first difference", (f) => f.first_difference],
    ...metrics.flatMap((name) => ["model", "file"].map((who) => [`${name}, ${who}`, (f) => ((f.metrics ?? {})[who] ?? {})[name]])), ["processor", (f) => f.processor]];
  return dataTable("files", columns.filter(([title, of]) => title === "file" || files.some((f) => of(f) != null && of(f) !== "")), files, { filter: false });
}

const ONE_BATCH = { float: "one batch, float", quantized: "one batch, quantized" };
// What belongs into one picture: quantities of all layers by their last word, everything else by its own name.
function seriesGroups(series) {
  const groups = new Map();
  for (const s of series) {
    const match = /^quant(?:_layer)?\/(.+)\/([^/]+)$/.exec(s.name), name = match ? match[2] : s.name.startsWith("quant/") ? s.name : s.name.replace(/^(train|val|test|float)\//, "");
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push({ ...s, label: match ? (name === "loss" && ONE_BATCH[match[1]]) || match[1] : s.name });
  }
  // Numbers of the plan, such as bits, that never changed are in the table of layers.
  for (const [name, found] of groups) if (found.every((s) => /^quant(_layer)?\//.test(s.name) && s.values.every((v) => v === s.values[0]))) groups.delete(name);
  return groups;
}
// `runs`: all of the page, whose curves of one quantity have one pair of axes.
function trainingFigure(model, runs, index) {
  const every = runs.map((run) => seriesGroups(run.model.training ?? []));
  const groups = seriesGroups(model.training), names = [...groups.keys()];
  const preferred = ["loss", "acc"], start = names.find((n) => n === preferred[index]) ?? names[Math.min(index, names.length - 1)];
  const legend = html("div");
  const choice = html("select", { "aria-label": "quantity", onchange: () => node.redraw() }, names.map((n) => html("option", { value: n, selected: n === start }, n)));
  const phases = (model.schedule ?? []).filter((p) => p.count > 0);
  const node = figure("training-" + index, "Over the run", phases.length ? "Upright lines: " + phases.map((p) => `${p.unit} ${p.count}: ${p.label}`).join("; ") : "", (width) => {
    const chosen = groups.get(choice.value).slice(0, 24), shown = every.flatMap((of) => (of.get(choice.value) ?? []).slice(0, 24));
    const f = frame({ width, height: 240, x: padded(extent(shown.flatMap((s) => s.steps)), 0.01), y: padded(extent(shown.flatMap((s) => s.values))), xLabel: "optimizer step", left: 60 });
    for (const p of phases) {
      const step = p.unit === "step" ? p.count : model.epoch_steps ? p.count * model.epoch_steps : null;
      if (step != null) put(f.plot, hover(svg("line", { x1: f.x(step), x2: f.x(step), y1: f.top, y2: f.bottom, stroke: "var(--muted)", "stroke-dasharray": "3 3" }), () => [p.label, `${p.unit} ${p.count}`]));
    }
    chosen.forEach((s, i) => put(f.plot, hover(svg("path", { d: path(s.steps.map((t, k) => [t, s.values[k]]).filter(([, v]) => finite(v)).map(([t, v]) => [f.x(t), f.y(v)])), fill: "none", stroke: color(i), "stroke-width": 1.8 }), () => [s.label, `last ${fmt(s.values.at(-1))}`])));
    legend.replaceChildren(key(chosen.slice(0, 8).map((s, i) => [shorten(s.label, 34), color(i), "line"])));
    return f.root;
  }, choice);
  return put(node, legend);
}
