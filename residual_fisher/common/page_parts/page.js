"use strict";

// What the pages share: elements, numbers, charts. Texts of the data become text nodes or attributes, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");

// --- elements ---

// Characters that nobody sees, or that turn the order of others round: a prompt may hang on them, so they are shown as
// escapes. Lines and tabs are not, nor what joins letters or parts of an emoji.
const UNSEEN = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;
const escape = (character) => {
  const code = character.codePointAt(0).toString(16);
  return code.length <= 2
    ? `\\x${code.padStart(2, "0")}`
    : code.length <= 4
      ? `\\u${code.padStart(4, "0")}`
      : `\\U${code.padStart(8, "0")}`;
};
const visible = (value) => (typeof value === "string" ? value.replace(UNSEEN, escape) : value);

const HALVES = /^[\udc00-\udfff]|[\ud800-\udbff]$/g; // what is left of a character where a text was cut within it

// A function that makes elements: name, attributes ("onclick" is a listener, "style" an object), then children.
const maker =
  (namespace) =>
  (name, attributes = {}, ...children) => {
    const node = document.createElementNS(namespace, name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key === "style") Object.assign(node.style, value);
      else node.setAttribute(key, value === true ? "" : visible(value));
    }
    node.append(
      ...children
        .flat(Infinity)
        .filter((child) => child !== null && child !== undefined && child !== false)
        .map(visible),
    );
    return node;
  };
const html = maker("http://www.w3.org/1999/xhtml");
const svg = maker("http://www.w3.org/2000/svg");

// Text of the data within a line: its direction, right to left or left to right, stays its own.
const said = (text, name = "span", attributes = {}) => html(name, { class: "data", dir: "auto", ...attributes }, text);

const section = (title, ...children) => html("section", {}, html("h2", {}, title), children);

function heading(kicker, title, about, ...children) {
  main.append(
    html(
      "header",
      {},
      html("p", { class: "kicker" }, kicker),
      said(title, "h1"),
      children,
      html(
        "dl",
        { class: "about" },
        about.map(([name, value]) => html("div", {}, html("dt", {}, name), said(value, "dd"))),
      ),
    ),
  );
}

// --- numbers ---

// At most so many significant digits, with a true minus sign; "–" for what is not known.
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text =
    size !== 0 && (size < 1e-4 || size >= 1e6)
      ? value.toExponential(1).replace(".0e", "e")
      : String(Number(value.toPrecision(digits)));
  return text.replace(/-/g, "−");
}
const fixed = (value, digits) =>
  value === null || value === undefined
    ? "–"
    : value
        .toFixed(digits)
        .replace(/^-(?!0\.?0*$)/, "−")
        .replace("-", "");
const signed = (value) => (value >= 0.05 ? "+" : "") + fixed(value, 1);
const percent = (value) => `${Math.round(100 * value)}%`;
const plural = (count, name) => `${count} ${name}${count === 1 ? "" : "s"}`;

// --- axes ---

const linear =
  ([low, high], [from, to]) =>
  (value) =>
    from + ((value - low) / (high - low || 1)) * (to - from);

// Signed logarithm: logarithmic on either side of a narrow middle, from the least size on.
const logarithmic = (least) => (value) =>
  Math.abs(value) < least ? 0.5 * (value / least) : Math.sign(value) * (0.5 + Math.log10(Math.abs(value) / least));

// The powers of ten in a range; of many, every second, third, ... one.
function powers(low, high, most = 6) {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const step = Math.max(1, Math.ceil((last - first + 1) / most));
  return Array.from({ length: Math.max(0, Math.floor((last - first) / step) + 1) }, (_, i) => 10 ** (first + i * step));
}

// Round numbers that divide a range in about so many parts.
function rounds(low, high, parts = 5) {
  const raw = (high - low || 1) / parts;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= raw);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");

// The parts of a curve between points that are not known.
function pieces(points) {
  const found = [[]];
  for (const point of points) point === null ? found.push([]) : found.at(-1).push(point);
  return found.filter((piece) => piece.length);
}

const space = { left: 52, right: 14, top: 10, bottom: 40 };

// A picture with axes. `x` and `y` are scales in pixels; a tick is [value, text].
function frame({ width, height, label, x, y, xTicks, yTicks, xLabel, yLabel }, ...content) {
  const right = width - space.right;
  const bottom = height - space.bottom;
  return svg(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    yTicks.map(([at, text]) => [
      svg("line", { class: "grid", x1: space.left, x2: right, y1: y(at), y2: y(at) }),
      svg("text", { x: space.left - 8, y: y(at) + 4, "text-anchor": "end" }, text),
    ]),
    svg("line", { class: "axis", x1: space.left, x2: right, y1: bottom, y2: bottom }),
    xTicks.map(([at, text]) => [
      svg("line", { class: "axis", x1: x(at), x2: x(at), y1: bottom, y2: bottom + 4 }),
      svg("text", { x: x(at), y: bottom + 18, "text-anchor": "middle" }, text),
    ]),
    svg("text", { x: (space.left + right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel),
    svg("text", { x: 2, y: space.top - 1, class: "strong" }, yLabel),
    content,
  );
}

// Draws again whenever its width changes; `draw` gets the width.
function responsive(draw, name = "div", attributes = {}) {
  const box = html(name, attributes);
  let drawn = 0;
  box.redraw = () => {
    drawn = Math.floor(box.clientWidth);
    if (drawn > 0) box.replaceChildren(draw(drawn));
  };
  new ResizeObserver(() => Math.floor(box.clientWidth) !== drawn && box.redraw()).observe(box);
  return box;
}

function legend(entries) {
  return html(
    "ul",
    { class: "legend" },
    entries.map(([name, colour, dashed, mark]) =>
      html(
        "li",
        {},
        svg(
          "svg",
          { class: "sign", viewBox: "0 0 18 10", "aria-hidden": "true" },
          svg("line", {
            x1: 0,
            x2: 18,
            y1: 5,
            y2: 5,
            stroke: colour,
            "stroke-width": 2,
            "stroke-dasharray": dashed ? "4 3" : null,
          }),
          mark ? marker(mark, 9, 5, colour) : null,
        ),
        name,
      ),
    ),
  );
}

// A disc, square or triangle around a point.
function marker(shape, x, y, fill) {
  if (shape === "square") return svg("rect", { x: x - 3, y: y - 3, width: 6, height: 6, fill });
  if (shape === "triangle") return svg("path", { d: `M${x},${y - 4}L${x + 4},${y + 3}L${x - 4},${y + 3}Z`, fill });
  return svg("circle", { cx: x, cy: y, r: 3.2, fill });
}

// --- tokens ---

const ruler = document.createElement("canvas").getContext("2d");
function widthOf(text) {
  ruler.font = `13px ${getComputedStyle(document.body).fontFamily}`;
  return ruler.measureText(text).width;
}

// The lengths of the longest bars to the left and to the right of 0. A token is [text, signed share].
function longestBars(directions) {
  const side = (sign) =>
    Math.max(0, ...directions.map((tokens) => sum(tokens.map(([, share]) => Math.max(0, sign * share)))));
  return [side(-1), side(1)];
}
const sum = (values) => values.reduce((total, value) => total + value, 0);

// One direction's tokens as a bar: to the left of 0 those that it lowers, to the right those that it raises. Where the
// bar is too short for words, the first ones stand below it.
function tokenBar(tokens, [left, right]) {
  const list = (sign) =>
    tokens.filter(([, share]) => sign * share > 0).map(([text, share]) => `${text} ${percent(Math.abs(share))}`);
  const told = `lose: ${list(-1).join(", ") || "none"}; gain: ${list(1).join(", ") || "none"}`;
  const texts = (sign) =>
    tokens
      .filter(([, share]) => sign * share > 0)
      .slice(0, 3)
      .map(([text]) => text)
      .join(" ") || "–";
  const total = left + right || 1;
  const draw = (width) => {
    const parts = [];
    for (const sign of [-1, 1]) {
      let end = 0;
      const side = tokens.filter(([, share]) => sign * share > 0);
      side.forEach(([text, share], place) => {
        const long = Math.abs(share);
        const from = sign > 0 ? left + end : left - end - long;
        const room = (long / total) * width;
        const [kind, does] = sign > 0 ? ["gain", "gains"] : ["lose", "loses"];
        parts.push(
          said(room > widthOf(text) + 6 ? text : "", "span", {
            class: kind,
            title: `${text} ${does}: ${percent(long)} of λ`,
            style: {
              left: `${(100 * from) / total}%`,
              width: `${(100 * long) / total}%`,
              background: `color-mix(in oklab, var(--${kind}) ${Math.max(100 - 13 * place, 40)}%, var(--paper))`,
            },
          }),
        );
        end += long;
      });
    }
    const bar = html("div", { class: "bar" }, parts, html("i", { style: { left: `${(100 * left) / total}%` } }));
    return width < 420 ? html("div", {}, bar, said(`${texts(-1)} ← → ${texts(1)}`, "p", { class: "note" })) : bar;
  };
  return responsive(draw, "div", { role: "img", "aria-label": told });
}

// The most probable tokens as bars: [text, probability]; those that are hits have a class, and with it a colour.
function ranked(tokens, isHit = () => false, hit = "hit") {
  if (!tokens.length) return html("p", { class: "note" }, "Not known: the numbers overflowed.");
  return html(
    "dl",
    { class: "ranked" },
    tokens.map((token) => [
      said(token[0], "dt", { title: token[0] }),
      html("dd", {}, html("span", { class: isHit(token) ? hit : null, style: { width: `${100 * token[1]}%` } })),
      html("data", { value: token[1] }, token[1] < 0.0005 ? number(token[1], 1) : fixed(token[1], 3)),
    ]),
  );
}

// --- a note at the pointer ---

const tip = html("div", { id: "tip", hidden: true, "aria-hidden": "true" });
document.body.append(tip);

function showTip(event, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const beside = event.clientX + 16 + width > innerWidth ? event.clientX - width - 12 : event.clientX + 16;
  tip.style.left = `${Math.max(4, beside)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 4))}px`;
}
const hideTip = () => (tip.hidden = true);
addEventListener("scroll", hideTip, { passive: true });
