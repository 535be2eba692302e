// The page of core_experiment.py --map: a grid of tokens by layers.

const { tokens, layers, ramp } = data;
const MEASURES = {
  nats: ["nats that a step of 1% of ‖h‖ along v costs", (cell) => cell.nats],
  eigenvalue: ["λ₁, nats per unit²", (cell) => cell.eigenvalue],
  effective_rank: ["effective rank", (cell) => cell.effective_rank],
};
// The word with the largest share among those that gain along v (sign 1), or lose (-1).
const word = (cell, sign) => cell.words.find(([, share]) => sign * share > 0)?.[0] ?? "";

const LENSES = {
  lens: "h reads as (logit lens)",
  local_lens: "J h reads as (local Jacobian)",
  jacobian_lens: "h reads as through the Jacobian lens given",
};
const lenses = Object.entries(LENSES).filter(([key]) => tokens.some(({ cells }) => cells.some((cell) => cell[key])));
const WORDS = {
  none: ["none", () => ""],
  gains: ["gains most along v", (cell) => word(cell, 1)],
  loses: ["loses most along v", (cell) => word(cell, -1)],
  ...Object.fromEntries(lenses.map(([key, name]) => [key, [name, (cell) => cell[key]?.[0] ?? ""]])),
};
const state = {
  measure: "nats",
  words: layers.length <= 12 ? "gains" : "none", // of more layers, words make the grid wider than a window
  row: Math.min(1, tokens.length - 1),
  column: layers.length - 1,
};

// --- colours ---

// The range of a measure, without the outermost 2% on either side, and without the first token, whose h is far longer.
function rangeOf(measure) {
  const of = MEASURES[measure][1];
  const found = tokens
    .slice(tokens.length > 1 ? 1 : 0)
    .flatMap(({ cells }) => cells.map(of))
    .filter((value) => value > 0)
    .sort((a, b) => a - b);
  if (!found.length) return [1, 10];
  const at = (share) => found[Math.round(share * (found.length - 1))];
  return [at(0.02), Math.max(at(0.98), 1.01 * at(0.02))];
}

// A colour between those of the ramp, and whether it is dark: there text has to be white.
function colour(share) {
  const place = Math.max(0, Math.min(1, share)) * (ramp.length - 1);
  const [low, part] = [
    Math.min(Math.floor(place), ramp.length - 2),
    place - Math.min(Math.floor(place), ramp.length - 2),
  ];
  return [
    `rgb(${ramp[low].map((value, i) => Math.round(value + part * (ramp[low + 1][i] - value))).join(" ")})`,
    share > 0.82,
  ];
}

function paint() {
  const [low, high] = rangeOf(state.measure);
  const of = MEASURES[state.measure][1];
  tokens.forEach(({ cells }, row) =>
    cells.forEach((cell, column) => {
      const value = of(cell);
      const [fill, dark] = colour(value > 0 ? Math.log(value / low) / Math.log(high / low) : 0);
      const box = boxes[row][column];
      const text = WORDS[state.words][1](cell);
      box.style.background = fill;
      box.classList.toggle("dark", dark);
      box.classList.toggle("again", column > 0 && text === WORDS[state.words][1](cells[column - 1]));
      box.replaceChildren(visible(text));
    }),
  );
  table.style.minWidth = `${280 + layers.length * (state.words === "none" ? 20 : 52)}px`;
  scale.replaceChildren(
    number(low, 2),
    svg(
      "svg",
      { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      Array.from({ length: 50 }, (_, i) => svg("rect", { x: 2 * i, width: 2.2, height: 10, fill: colour(i / 49)[0] })),
    ),
    number(high, 2),
  );
}

// --- the grid ---

const most = Math.max(...tokens.map(({ surprisal }) => surprisal ?? 0), 1e-9);
const scale = html("div", { class: "ramp" });
const readout = html("div", { class: "readout card" });
const boxes = tokens.map(({ token, cells }, row) =>
  cells.map((cell, column) =>
    html("td", {
      class: "cell",
      role: "gridcell",
      tabindex: -1,
      "aria-label":
        `after ${token}, layer ${layers[column]}: ${number(cell.nats, 2)} nats; ` +
        `gains ${word(cell, 1) || "none"}, loses ${word(cell, -1) || "none"}`,
      onfocus: () => read(row, column),
      onpointerenter: () => read(row, column),
      onclick: () => boxes[row][column].focus(),
    }),
  ),
);

const table = html(
  "table",
  {
    class: "map",
    role: "grid",
    "aria-label": "Tokens by layers",
  },
  html(
    "thead",
    {},
    html(
      "tr",
      {},
      [
        ["surprisal", "w-surprise"],
        ["token", "w-token"],
        ...layers.map((layer) => [layer, ""]),
        ["predicted next", "w-next"],
      ].map(([name, width]) => html("th", { scope: "col", class: width }, name)),
    ),
  ),
  html(
    "tbody",
    {},
    tokens.map(({ token, surprisal, predicted: [[guess, p, right]] }, row) =>
      html(
        "tr",
        {},
        html(
          "td",
          { class: "surprise" },
          html("i", { style: { width: `${(100 * (surprisal ?? 0)) / most}%` } }),
          html("b", {}, surprisal === null ? "" : fixed(surprisal, 1)),
        ),
        said(token, "th", { scope: "row" }),
        boxes[row],
        html(
          "td",
          { class: right ? "next right" : "next" },
          html("i", { style: { width: `${100 * p}%` } }),
          html("b", {}, said(guess), html("span", { class: "muted" }, ` ${fixed(p, 2)}`)),
        ),
      ),
    ),
  ),
);

table.addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  boxes[state.row + move[0]]?.[state.column + move[1]]?.focus();
});

// What one cell says.
function read(row, column) {
  const before = boxes[state.row][state.column];
  before.tabIndex = -1;
  before.removeAttribute("aria-selected");
  Object.assign(state, { row, column });
  boxes[row][column].tabIndex = 0;
  boxes[row][column].setAttribute("aria-selected", "true");
  const { cells, predicted } = tokens[row];
  const cell = cells[column];
  const context = tokens.slice(Math.max(0, row - 12), row + 1).map(({ token }) => token.replace(/^·/, " "));
  const list = (sign) =>
    cell.words
      .filter(([, share]) => sign * share > 0)
      .map(([text, share]) => html("li", {}, said(text), ` ${percent(Math.abs(share))}`));
  readout.replaceChildren(
    html("h3", {}, `Layer ${layers[column]}, after`),
    html(
      "p",
      { class: "text data", dir: "auto" },
      row > 12 ? "…" : "",
      context.slice(0, -1).join(""),
      html("span", { class: "target" }, context.at(-1)),
    ),
    html(
      "p",
      { class: "note" },
      `${number(cell.nats, 2)} nats a step of 1% of ‖h‖; λ₁ ${number(cell.eigenvalue)}; effective rank ` +
        `${number(cell.effective_rank)}`,
    ),
    html("h3", {}, "gain along v"),
    html("ul", { class: "chips gains" }, list(1)),
    html("h3", {}, "lose along v"),
    html("ul", { class: "chips loses" }, list(-1)),
    ...lenses
      .filter(([key]) => cell[key])
      .flatMap(([key, name]) => [
        html("h3", {}, name),
        html(
          "ul",
          { class: "chips reads" },
          cell[key].map((text) => said(text, "li")),
        ),
      ]),
    html("h3", {}, "predicted next"),
    ranked(predicted, (token) => token[2], "right"),
  );
}

main.classList.add("full");
heading("residual-fisher, a run of core_experiment.py --map", data.title, data.about);
if (tokens.length < data.count)
  main.append(
    html(
      "p",
      { class: "note" },
      `The page holds the first ${tokens.length} of ${data.count} tokens; fisher_map.json has all.`,
    ),
  );
const picker = (key, choices) =>
  html(
    "select",
    { onchange: (event) => ((state[key] = event.target.value), paint()) },
    Object.entries(choices).map(([value, [name]]) => html("option", { value, selected: value === state[key] }, name)),
  );
main.append(
  html(
    "section",
    {},
    html(
      "p",
      { class: "note" },
      "A row is a token, a column a layer: how much the prediction after it depends on the residual stream " +
        "there, and on what. Point at a cell, or move with the arrow " +
        "keys. A faint word is the same as one layer before. Predictions that are right are green.",
    ),
    html(
      "div",
      { class: "tools printed" },
      html("label", {}, "Colour", picker("measure", MEASURES)),
      html("label", {}, "Words", picker("words", WORDS)),
      scale,
    ),
    html("div", { class: "mapped" }, html("div", { class: "scroll" }, table), readout),
  ),
);
read(state.row, state.column);
paint();
