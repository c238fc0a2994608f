"use strict";
// SVG by hand: elements, scales, axes, a tooltip. Text only ever enters as text.
const NS = "http://www.w3.org/2000/svg";
const put = (node, ...parts) => { for (const p of parts.flat(Infinity)) if (p != null && p !== false) node.append(p); return node; };
function html(tag, attrs = {}, ...parts) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) {
    if (v == null || v === false) continue;
    if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
    else node.setAttribute(k, v === true ? "" : v);
  }
  return put(node, parts);
}
function svg(tag, attrs = {}, ...parts) {
  const node = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attrs)) if (v != null) node.setAttribute(k, v);
  return put(node, parts);
}
const num = (v) => (v === "inf" ? Infinity : v === "-inf" ? -Infinity : v);
const finite = (v) => v != null && Number.isFinite(num(v));
function fmt(v, digits = 4) {
  v = num(v);
  if (v == null) return "–";
  if (typeof v === "boolean") return v ? "yes" : "no";
  if (typeof v !== "number") return String(v);
  if (!Number.isFinite(v)) return v > 0 ? "∞" : "−∞";
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size >= 1e5 || size < 1e-3) return v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e").replaceAll("-", "−");
  return String(Number(v.toPrecision(digits))).replace("-", "−");
}
function big(v) {
  if (v == null) return "–";
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (Math.abs(v) >= size) return fmt(v / size, 3) + " " + unit;
  return fmt(v, 3);
}
const bytes = (v) => { const text = big(v); return v == null ? text : text + (/ \w$/.test(text) ? "B" : " B"); };
const db = (v) => (v == null ? "–" : fmt(v, 3) + " dB");
const share = (v) => (v == null ? "–" : fmt(100 * v, 3) + " %");
const shorten = (name, limit = 28) => (name.length <= limit ? name : name.slice(0, Math.floor(limit * 0.4)) + "…" + name.slice(-(limit - 1 - Math.floor(limit * 0.4))));
const COLORS = ["c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"];
const color = (i) => `var(--${COLORS[i % COLORS.length]})`;

function linear([a, b], [p, q]) {
  const f = (v) => p + ((v - a) / (b - a || 1)) * (q - p);
  f.ticks = (n) => {
    const span = b - a || 1, raw = span / Math.max(n, 1), power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(a / step - 1e-9); i * step <= b + 1e-9 * span; i++) found.push(Math.abs(i * step) < 1e-12 * span ? 0 : i * step);
    return found;
  };
  return f;
}
function log([a, b], [p, q]) {
  const la = Math.log10(a), lb = Math.log10(b);
  const f = (v) => p + ((Math.log10(Math.max(v, a * 1e-3)) - la) / (lb - la || 1)) * (q - p);
  f.ticks = (n) => {
    const found = [], low = Math.ceil(la - 1e-9), high = Math.floor(lb + 1e-9), step = Math.max(1, Math.ceil((high - low + 1) / Math.max(n, 1)));
    for (let e = low; e <= high; e += step) found.push(10 ** e);
    return found.length > 1 ? found : linear([a, b], [p, q]).ticks(n).filter((t) => t > 0);
  };
  return f;
}
const extent = (values) => { let a = Infinity, b = -Infinity; for (const v of values) if (finite(v)) { a = Math.min(a, v); b = Math.max(b, v); } return a > b ? [0, 1] : [a, b]; };
const padded = ([a, b], by = 0.05) => { const m = (b - a) * by || Math.abs(a) * by || 1; return [a - m, b + m]; };

const tip = html("div", { id: "tip", role: "status", hidden: true });
function showTip(lines, x, y) {
  tip.replaceChildren(...lines.map((l) => html("div", {}, l)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - box.width - 4)) + "px";
  tip.style.top = (y + 16 + box.height > innerHeight ? y - box.height - 8 : y + 16) + "px";
}
const hideTip = () => { tip.hidden = true; };
function hover(node, lines, label) {
  node.addEventListener("pointerenter", (e) => showTip(lines(), e.clientX, e.clientY));
  node.addEventListener("pointermove", (e) => showTip(lines(), e.clientX, e.clientY));
  node.addEventListener("pointerleave", hideTip);
  if (label) put(node, svg("title", {}, label));
  return node;
}

// A figure redraws when its width changes, and says so when it is drawn.
const drawn = [];
const watcher = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const figure = drawn.find((f) => f.body === entry.target);
    const width = Math.floor(entry.contentRect.width);
    if (figure && width > 0 && Math.abs(width - figure.width) > 1) { figure.width = width; figure.draw(); }
  }
});
function figure(name, title, caption, draw, extra) {
  const body = html("div", { class: "plot" });
  const save = html("button", { class: "quiet save", type: "button", "aria-label": `Save “${title}” as SVG`, title: "Save as SVG", onclick: () => saveSvg(body, name) }, "SVG");
  const node = html("figure", { "data-figure": name }, html("figcaption", {}, html("div", { class: "head" }, html("h4", {}, title), extra, save), caption ? html("p", {}, caption) : null), body);
  const state = { body, width: 0, draw: () => {
    const picture = draw(state.width);
    body.replaceChildren(picture);
    picture.setAttribute("role", "img");
    if (!picture.getAttribute("aria-label")) picture.setAttribute("aria-label", title + (caption ? ": " + caption : ""));
    node.setAttribute("data-drawn", "true");
  } };
  node.redraw = () => { if (state.width) state.draw(); };
  drawn.push(state);
  watcher.observe(body);
  return node;
}
function forget(root) {
  for (let i = drawn.length - 1; i >= 0; i--) if (root.contains(drawn[i].body)) { watcher.unobserve(drawn[i].body); drawn.splice(i, 1); }
}
const INLINE = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "fill-opacity", "font-family", "font-size", "font-weight", "text-anchor"];
function saveSvg(body, name) {
  const source = body.querySelector("svg"), copy = source.cloneNode(true);
  const from = source.querySelectorAll("*"), to = copy.querySelectorAll("*");
  to.forEach((node, i) => { const style = getComputedStyle(from[i]); for (const key of INLINE) node.style.setProperty(key, style.getPropertyValue(key)); });
  copy.setAttribute("xmlns", NS);
  copy.style.background = getComputedStyle(document.body).backgroundColor;
  const link = html("a", { href: URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" })), download: name.replace(/\W+/g, "_") + ".svg" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// A frame with axes: {width, height, x: [a, b], y: [a, b], logX, logY, xLabel, yLabel, left}
function frame(o) {
  const m = { l: o.left ?? 52, r: o.right ?? 12, t: o.top ?? 10, b: o.bottom ?? (o.xLabel ? 42 : 26) };
  const root = svg("svg", { width: o.width, height: o.height, viewBox: `0 0 ${o.width} ${o.height}` });
  const x = (o.logX ? log : linear)(o.x, [m.l, o.width - m.r]), y = (o.logY ? log : linear)(o.y, [o.height - m.b, m.t]);
  const g = svg("g", { class: "axis" });
  for (const t of o.yTicks ?? y.ticks(Math.max(2, (o.height - m.t - m.b) / 44))) {
    put(g, svg("line", { class: "grid", x1: m.l, x2: o.width - m.r, y1: y(t), y2: y(t) }));
    put(g, svg("text", { x: m.l - 6, y: y(t) + 4, "text-anchor": "end" }, (o.yFormat ?? ((v) => fmt(v, 3)))(t)));
  }
  for (const t of o.xTicks ?? x.ticks(Math.max(2, (o.width - m.l - m.r) / 76))) {
    put(g, svg("line", { class: "tick", x1: x(t), x2: x(t), y1: o.height - m.b, y2: o.height - m.b + 4 }));
    put(g, svg("text", { x: x(t), y: o.height - m.b + 16, "text-anchor": "middle" }, (o.xFormat ?? ((v) => fmt(v, 3)))(t)));
  }
  put(g, svg("line", { class: "base", x1: m.l, x2: o.width - m.r, y1: o.height - m.b, y2: o.height - m.b }));
  if (o.xLabel) put(g, svg("text", { class: "label", x: (m.l + o.width - m.r) / 2, y: o.height - 6, "text-anchor": "middle" }, o.xLabel));
  if (o.yLabel) put(g, svg("text", { class: "label", x: 12, y: (m.t + o.height - m.b) / 2, transform: `rotate(-90 12 ${(m.t + o.height - m.b) / 2})`, "text-anchor": "middle" }, o.yLabel));
  put(root, g);
  const plot = svg("g");
  put(root, plot);
  return { root, plot, x, y, left: m.l, right: o.width - m.r, top: m.t, bottom: o.height - m.b };
}
const path = (points, step) => points.map(([x, y], i) => (i === 0 ? `M${x.toFixed(1)},${y.toFixed(1)}` : step ? `H${x.toFixed(1)}V${y.toFixed(1)}` : `L${x.toFixed(1)},${y.toFixed(1)}`)).join("");
function key(entries) {
  return html("ul", { class: "key" }, entries.map(([label, paint, shape]) => html("li", {}, html("span", { class: "swatch " + (shape ?? ""), style: `--paint:${paint}`, "aria-hidden": "true" }), label)));
}
