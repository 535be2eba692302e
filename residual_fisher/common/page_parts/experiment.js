// The page of core_experiment.py: one sentence and layer at a time.

const { sentences, layers, scales, directions, kinds } = data;
const values = scales.map(Number);
const kindOf = (direction) => direction.split("_")[0];
const state = { sentence: 0, layer: layers[Math.floor(layers.length / 2)], scale: values.indexOf(Math.max(...values)) };
const minus = (text) => text.replace("-", "−");

const nameOf = (direction) => {
  const [kind, which] = direction.split("_");
  return (
    kinds[kind][0] +
    (which && directions.filter((other) => kindOf(other) === kind).length > 1 ? ` ${Number(which) + 1}` : "")
  );
};
// Of the colours, orange is that of v; they are lighter where it is dark.
const colourOf = (direction) => `color-mix(in oklab, ${kinds[kindOf(direction)][1]}, white var(--tint))`;

const views = []; // what is drawn anew when a choice changes: functions of the chosen sentence and its layer
const update = () => {
  const sentence = sentences[state.sentence];
  for (const view of views) view(sentence, sentence.at[state.layer]);
};

// A part of the page that `draw` fills from the chosen sentence and layer.
function part(title, draw, ...before) {
  const box = html("div");
  views.push((sentence, at) => box.replaceChildren(...[draw(sentence, at)].flat().filter(Boolean)));
  return html("section", {}, title ? html("h2", {}, title) : null, before, box);
}

// --- choices ---

function choices() {
  const picker = html(
    "select",
    { onchange: (event) => ((state.sentence = Number(event.target.value)), update()) },
    sentences.map(({ prompt, target }, i) => {
      const text = `${prompt}${target}`.replace(/\s+/g, " ");
      return html(
        "option",
        { value: i },
        `S${i}  ${text.length > 70 ? `…${text.slice(-69).replace(HALVES, "")}` : text}`,
      );
    }),
  );
  const buttons = html(
    "fieldset",
    {},
    html("legend", {}, "Layer"),
    html(
      "div",
      { class: "choices" },
      layers.map((layer) => {
        const input = html("input", {
          type: "radio",
          name: "layer",
          value: layer,
          onchange: () => ((state.layer = layer), update()),
        });
        views.push(() => (input.checked = state.layer === layer));
        return html("label", {}, input, html("span", {}, layer));
      }),
    ),
  );
  return html("div", { class: "tools sticky" }, html("label", { class: "wide" }, "Sentence", picker), buttons);
}

// --- KL by scale ---

// A scale's place on the axis: logarithmic on either side of a narrow middle.
const sizes = values.map(Math.abs).filter(Boolean);
const spread = logarithmic(Math.min(...sizes, Infinity));

function scaleAxis(width) {
  const most = spread(Math.max(...sizes));
  const [low, high] = [Math.min(...values) < 0 ? -most : 0, Math.max(...values) > 0 ? most : 0];
  const x = linear([low - 0.08, high + 0.08], [space.left, width - space.right]);
  const across = (value) => x(spread(value));
  let last = -Infinity;
  const ticks = values
    .map((value, i) => [value, minus(scales[i])])
    .sort((a, b) => a[0] - b[0])
    .filter(([value]) => across(value) - last > 34 && ((last = across(value)), true));
  return [across, ticks];
}

// A chart over the scales, with a line at the chosen one; a click chooses the scale nearest to the pointer.
function byScale(chart, ...drawn) {
  const { x, height } = chart;
  const at = values[state.scale];
  const cursor = svg("line", { class: "cursor", x1: x(at), x2: x(at), y1: space.top, y2: height - space.bottom });
  const picture = frame({ ...chart, xLabel: `scale (${data.unit})` }, cursor, ...drawn);
  picture.classList.add("area");
  picture.addEventListener("click", (event) => {
    const pointed = event.clientX - picture.getBoundingClientRect().left;
    state.scale = values.reduce(
      (best, value, i) => (Math.abs(x(value) - pointed) < Math.abs(x(values[best]) - pointed) ? i : best),
      0,
    );
    update();
  });
  return picture;
}

const least = 1e-9; // nats: below it is rounding

function curves(width, at) {
  const height = Math.min(400, Math.max(280, width * 0.66));
  const [x, xTicks] = scaleAxis(width);
  const all = directions
    .flatMap((name) => [...at.along[name].kl, ...at.along[name].predicted])
    .filter((kl) => kl > least);
  if (!all.length) return html("p", { class: "note" }, "No perturbation moved the prediction.");
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const log = linear([Math.log10(low) - 0.2, Math.log10(high) + 0.2], [height - space.bottom, space.top + 12]);
  const y = (kl) => log(Math.log10(kl));
  const sides = [
    values.map((value, i) => [value, i]).filter(([value]) => value < 0),
    values.map((value, i) => [value, i]).filter(([value]) => value > 0),
  ];
  const line = (numbers) =>
    sides.flatMap((side) =>
      pieces(
        side.sort((a, b) => a[0] - b[0]).map(([value, i]) => (numbers[i] > least ? [x(value), y(numbers[i])] : null)),
      ),
    );
  const drawn = [...directions].reverse().map((name) => {
    const [, , shape] = kinds[kindOf(name)];
    const colour = colourOf(name);
    const parts = line(at.along[name].kl);
    return [
      parts.map((piece) =>
        svg("path", { d: path(piece), fill: "none", stroke: colour, "stroke-width": name === "fisher" ? 2.2 : 1.5 }),
      ),
      parts.flat().map(([cx, cy]) => marker(shape, cx, cy, colour)),
    ];
  });
  const predicted = line(at.along.fisher.predicted).map((piece) =>
    svg("path", { d: path(piece), fill: "none", stroke: "var(--ink)", "stroke-width": 1.4, "stroke-dasharray": "5 4" }),
  );
  return byScale(
    {
      width,
      height,
      x,
      y,
      xTicks,
      yTicks: powers(low, high).map((value) => [value, number(value)]),
      yLabel: "KL, nats",
      label: `KL by scale at layer ${state.layer}`,
    },
    drawn,
    predicted,
  );
}

function kl() {
  const names = directions.map((name) => [nameOf(name), colourOf(name), false, kinds[kindOf(name)][2]]);
  return part(
    "How far the prediction moves",
    (_, at) => responsive((width) => curves(width, at)),
    html("p", { class: "note" }, "KL from the unperturbed prediction, on logarithmic axes. Click to choose a scale."),
    legend([...names, ["predicted along v, ½ δᵀFδ", "var(--ink)", true]]),
  );
}

// --- predictions at a scale ---

function probabilities(width, sentence, at) {
  const height = 240;
  const [x, xTicks] = scaleAxis(width);
  const { top, target } = at.along.fisher;
  const most = Math.max(...target, ...top.flat().map(([, p]) => p));
  const limit = [0.1, 0.2, 0.5, 1].find((p) => p >= most) ?? 1;
  const y = linear([0, limit], [height - space.bottom, space.top + 12]);
  const order = values.map((value, i) => [value, i]).sort((a, b) => a[0] - b[0]);
  const tokens = new Map(); // a token's probability is known while it is among the five most probable
  for (const found of top) for (const [text, p] of found) tokens.set(text, Math.max(p, tokens.get(text) ?? 0));
  tokens.delete(sentence.target);
  const colours = ["var(--blue)", "var(--green)", "var(--pink)", "var(--yellow)"].map(
    (colour) => `color-mix(in oklab, ${colour}, white var(--tint))`,
  );
  const leading = [...tokens]
    .sort((a, b) => b[1] - a[1])
    .slice(0, colours.length)
    .map(([text]) => text);
  const known = (text) =>
    order.map(([value, i]) => {
      const token = top[i].find(([other]) => other === text);
      return token ? [x(value), y(token[1])] : null;
    });
  const own = order.map(([value, i]) => (target[i] === null ? null : [x(value), y(target[i])]));
  const line = (points, colour, wide) =>
    pieces(points).map((piece) => [
      svg("path", { d: path(piece), fill: "none", stroke: colour, "stroke-width": wide ? 2.4 : 1.6 }),
      piece.map(([cx, cy]) => marker("disc", cx, cy, colour)),
    ]);
  const picture = byScale(
    {
      width,
      height,
      x,
      y,
      xTicks,
      yTicks: [0, limit / 2, limit].map((p) => [p, number(p)]),
      yLabel: "probability",
      label: "Probabilities of tokens by scale along v",
    },
    leading.map((text, i) => line(known(text), colours[i])),
    line(own, "var(--strong)", true),
  );
  return html(
    "div",
    {},
    legend([
      [said(sentence.target), "var(--strong)", false, "disc"],
      ...leading.map((text, i) => [said(text), colours[i], false, "disc"]),
    ]),
    picture,
  );
}

function predictions() {
  const order = values
    .map((value, i) => [value, i])
    .sort((a, b) => a[0] - b[0])
    .map(([, i]) => i);
  const slider = html("input", {
    type: "range",
    min: 0,
    max: order.length - 1,
    step: 1,
    id: "scale",
    oninput: (event) => ((state.scale = order[Number(event.target.value)]), update()),
  });
  const output = html("output", { for: "scale" });
  views.push((_, at) => {
    slider.value = order.indexOf(state.scale);
    slider.setAttribute("aria-valuetext", `scale ${scales[state.scale]}`);
    output.textContent =
      `scale ${minus(scales[state.scale])}: a step of ${number(at.steps[state.scale])}, ` +
      `${percent(Math.abs(at.steps[state.scale] ?? 0) / at.norm)} of ‖h‖`;
  });
  const shown = [
    "fisher",
    ...["random", "difference"].map((kind) => directions.find((name) => kindOf(name) === kind)).filter(Boolean),
  ];
  return part(
    "What it predicts then",
    (sentence, at) => [
      html(
        "div",
        { class: "columns predictions" },
        shown.map((name) => {
          const { kl, predicted, top } = at.along[name];
          return html(
            "div",
            {},
            html("h3", { style: { color: colourOf(name) } }, nameOf(name)),
            html(
              "p",
              { class: "note" },
              `${number(kl[state.scale])} nats, predicted ${number(predicted[state.scale])}`,
            ),
            ranked(top[state.scale], ([text]) => text === sentence.target),
          );
        }),
      ),
      html("h3", {}, "Along v"),
      responsive((width) => probabilities(width, sentence, at)),
    ],
    html("label", { class: "slide" }, output, slider),
  );
}

// --- the sentence ---

function sentenceView() {
  return part(null, (sentence, at) => {
    const rest = sentence.sentence.startsWith(sentence.prompt + sentence.target)
      ? sentence.sentence.slice((sentence.prompt + sentence.target).length)
      : "";
    return [
      html(
        "p",
        { class: "text data", dir: "auto" },
        sentence.prompt,
        html("span", { class: "target" }, sentence.target),
        html("span", { class: "muted" }, rest),
      ),
      html(
        "p",
        { class: "note" },
        data.prompts ? "Perturbed at its last token. Predicted is “" : "Perturbed at the last token before “",
        said(sentence.target.trim()),
        `”, whose probability is ${number(sentence.probability)} (rank ${sentence.rank}).`,
      ),
      html(
        "dl",
        { class: "about" },
        [
          ["λ₁", `${number(at.eigenvalue)} nats per unit²`],
          ["effective rank", number(at.rank)],
          ["probability counted", percent(at.mass)],
          ["‖h‖", number(at.norm)],
        ].map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))),
      ),
    ];
  });
}

// --- the words of v ---

function words() {
  return part(
    "The question at each layer",
    (sentence) => {
      const ends = longestBars(layers.map((layer) => sentence.at[layer].words));
      return html(
        "div",
        { class: "layers" },
        layers.map((layer) => [
          html(
            "button",
            {
              type: "button",
              "aria-pressed": String(layer === state.layer),
              "data-layer": layer,
              onclick: () => choose(layer),
            },
            `layer ${layer}`,
          ),
          tokenBar(sentence.at[layer].words, ends),
          html("span", { class: "value" }, `λ₁ ${number(sentence.at[layer].eigenvalue)}`),
        ]),
      );
    },
    html(
      "p",
      { class: "note" },
      "Tokens that lose probability (left) and gain it (right) along v, by their shares of λ. Choose a layer by " +
        "its name.",
    ),
  );
}

function choose(layer) {
  state.layer = layer;
  update();
  document.querySelector(`[data-layer="${layer}"]`).focus();
}

// --- what follows ---

// A continuation; what differs from the unperturbed one, from the first character on, is in colour.
function continued(text, usual) {
  if (text === usual) return html("span", { class: "muted" }, "the same");
  let same = 0;
  while (same < text.length && text[same] === usual[same]) same++;
  same = text.lastIndexOf(" ", same) + 1 ? text.lastIndexOf(" ", same) : 0;
  return html(
    "span",
    { class: "data", dir: "auto" },
    text.slice(0, same),
    html("span", { class: "target" }, text.slice(same) || "(ends here)"),
  );
}

function continuations() {
  if (!sentences[0].continuation) return null;
  return part("What it goes on to say", ({ continuation }) => {
    const rows = continuation.layers[state.layer] ?? [];
    const names = Object.keys(rows[0]?.said ?? {});
    return [
      html(
        "p",
        { class: "text data", dir: "auto" },
        html("span", { class: "muted" }, "unperturbed: "),
        continuation.none,
      ),
      html(
        "div",
        { class: "scroll" },
        html(
          "table",
          {},
          html(
            "thead",
            {},
            html(
              "tr",
              {},
              ["scale", "nats"].map((name) => html("th", { scope: "col" }, name)),
              names.map((name) => html("th", { scope: "col", class: "left" }, nameOf(name))),
            ),
          ),
          html(
            "tbody",
            {},
            rows.map((row) =>
              html(
                "tr",
                {},
                html("th", { scope: "row" }, minus(row.scale)),
                html("td", {}, number(row.nats, 2)),
                names.map((name) => html("td", { class: "left" }, continued(row.said[name], continuation.none))),
              ),
            ),
          ),
        ),
      ),
    ];
  });
}

function steering() {
  if (!sentences[0].steering) return null;
  return part("What steering costs", ({ steering: { token, probability, layers: found } }) => {
    const at = found[state.layer];
    const goals = [...new Set(Object.values(at).flatMap(Object.keys))];
    const about = html(
      "p",
      { class: "note" },
      "KL in nats to bring “",
      said(token.trim()),
      `” from ${number(probability)} to a probability, and over the least that any perturbation costs.`,
    );
    if (!goals.length) return [about, html("p", {}, "It is more probable already.")];
    const cell = (entry) =>
      html(
        "td",
        {},
        entry ? [number(entry[1], 2), html("span", { class: "muted" }, ` (${number(entry[3])} ×)`)] : "not reached",
      );
    return [
      about,
      html(
        "div",
        { class: "scroll" },
        html(
          "table",
          {},
          html(
            "thead",
            {},
            html(
              "tr",
              {},
              html("th", { scope: "col", class: "left" }, "direction"),
              goals.map((goal) => html("th", { scope: "col" }, `to ${goal}`)),
            ),
          ),
          html(
            "tbody",
            {},
            Object.entries(at).map(([name, entries]) =>
              html(
                "tr",
                {},
                html("th", { scope: "row", class: "left" }, data.steered[name] ?? name),
                goals.map((goal) => cell(entries[goal])),
              ),
            ),
          ),
        ),
      ),
    ];
  });
}

// --- all sentences ---

function summary() {
  const kindNames = Object.keys(Object.values(data.summary)[0].kl_median);
  return section(
    `Medians over ${plural(data.count, "sentence")}`,
    html(
      "div",
      { class: "scroll" },
      html(
        "table",
        {},
        html(
          "thead",
          {},
          html(
            "tr",
            {},
            [
              "layer",
              "λ₁",
              "effective rank",
              ...kindNames.map((kind) => `KL ${kind}`),
              ...kindNames.map((kind) => `top changed, ${kind}`),
            ].map((name) => html("th", { scope: "col" }, name)),
          ),
        ),
        html(
          "tbody",
          {},
          Object.entries(data.summary).map(([layer, entry]) =>
            html(
              "tr",
              {},
              html("th", { scope: "row" }, layer),
              html("td", {}, number(entry.eigenvalue_median)),
              html("td", {}, number(entry.effective_rank_median)),
              kindNames.map((kind) => html("td", {}, number(entry.kl_median[kind], 2))),
              kindNames.map((kind) => html("td", {}, entry.flips[kind] === null ? "–" : percent(entry.flips[kind]))),
            ),
          ),
        ),
      ),
    ),
    html(
      "p",
      { class: "note" },
      `KL in nats, and the share of sentences whose most probable token changed, at scale ±${data.summary_at}.`,
    ),
  );
}

heading("residual-fisher, a run of core_experiment.py", data.title, data.about);
if (sentences.length < data.count)
  main.append(
    html(
      "p",
      { class: "note" },
      `The page holds the first ${sentences.length} of ${data.count} sentences; experiment_results.json has all.`,
    ),
  );
main.append(
  ...[
    choices(),
    sentenceView(),
    html("div", { class: "columns" }, kl(), predictions()),
    words(),
    html("div", { class: "columns" }, continuations(), steering()),
    summary(),
  ].filter(Boolean),
);
update();
