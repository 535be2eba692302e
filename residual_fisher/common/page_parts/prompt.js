// One prompt, opened from pipeline.js: a panel beside the table, whose order its buttons follow.

const title = html("h2", { id: "opened", tabindex: "-1" });
const standing = html("p", { class: "note" });
const content = html("div", { class: "body" });
const step = (offset) => {
  const next = state.shown[state.shown.indexOf(state.open) + offset];
  if (next) location.hash = `prompt-${next.index}`;
};
const previous = html("button", { type: "button", class: "button", onclick: () => step(-1) }, "Previous");
const next = html("button", { type: "button", class: "button", onclick: () => step(1) }, "Next");
const dialog = html(
  "dialog",
  { "aria-labelledby": "opened" },
  html(
    "div",
    { class: "head" },
    title,
    previous,
    next,
    html("button", { type: "button", class: "button", onclick: () => dialog.close() }, "Close"),
  ),
  content,
);
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("close", () => {
  if (location.hash.startsWith("#prompt-")) history.replaceState(null, "", "#");
  state.open?.link.focus({ preventScroll: true });
  state.open = null;
});

// The prompt's text; a trigger is marked.
function fullText(prompt, trigger) {
  const skipped = prompt.skipped ?? 0;
  const letters = [...prompt.text]; // places are those of characters, not of halves of them
  const cut = (from, to) => letters.slice(Math.max(0, from - skipped), Math.max(0, to - skipped)).join("");
  const end = skipped + letters.length;
  const parts = trigger
    ? [cut(0, trigger.start), html("mark", {}, cut(trigger.start, trigger.end)), cut(trigger.end, end)]
    : [prompt.text];
  const more = (count, where) =>
    count ? html("span", { class: "muted" }, `[${count} characters ${where} are in prompts.jsonl]`) : null;
  return [
    (prompt.before ?? []).map(([role, text]) =>
      html("div", {}, html("h3", {}, role), said(text, "p", { class: "text data muted" })),
    ),
    html("div", { class: "text data", dir: "auto" }, more(skipped, "before this"), parts, more(prompt.left, "more")),
  ];
}

function answers(prompt, told) {
  if (!told && !prompt.answer) return null;
  const trigger = told?.trigger;
  const proven = findings?.proven.some((span) => span.prompts.includes(prompt.index));
  const quote = (name, text) => html("div", {}, html("h3", {}, name), said(text || "(nothing)", "blockquote"));
  return html(
    "section",
    {},
    html("h2", {}, "The answer"),
    html(
      "div",
      { class: "columns" },
      quote(
        trigger ? ["with ", said(trigger.text, "mark")] : "to the prompt as it is",
        told ? told.answer : prompt.answer,
      ),
      trigger ? quote("without it", trigger.answer_without) : null,
    ),
    told?.odd_part ? html("p", { class: "note" }, "Odd in it: ", said(told.odd_part)) : null,
    trigger
      ? html(
          "p",
          { class: "note" },
          `Without the span, the odd part is ${fixed(trigger.nats, 1)} nats less likely. In ordinary prompts, ` +
            `the span is ${proven ? "a proven trigger" : "not proven to do the same"}.`,
        )
      : null,
  );
}

// Each score as a dot on a line, with the usual band of all prompts.
function scores(width, prompt) {
  const rows = columns.filter(({ key }) => key === "outlier_score" || key.startsWith("z_"));
  const [height, name, most] = [30, 104, 12];
  const x = linear([-most, most], [name, width - 46]);
  const clip = (value) => x(Math.max(-most, Math.min(most, value)));
  return svg(
    "svg",
    {
      width,
      height: height * rows.length + 22,
      role: "img",
      "aria-label": rows.map((row) => `${row.name} ${fixed(prompt[row.key], 1)}`).join(", "),
    },
    rows.map((row, i) => {
      const [cy, quantiles, value] = [height * i + 15, bands.scores[row.key], prompt[row.key]];
      const band = (a, b, style) =>
        svg("rect", {
          class: style,
          x: clip(quantiles[a]),
          width: Math.max(1, clip(quantiles[b]) - clip(quantiles[a])),
          y: cy - 7,
          height: 14,
          rx: 2,
        });
      return [
        svg("text", { x: 0, y: cy + 4, class: "strong" }, row.name),
        svg("line", { class: "grid", x1: name, x2: width - 46, y1: cy, y2: cy }),
        band(0, 4, "band1"),
        band(1, 3, "band2"),
        svg("circle", {
          cx: clip(value),
          cy,
          r: 5,
          fill: value >= 3 ? "var(--strong)" : "var(--link)",
          stroke: "var(--paper)",
        }),
        svg("text", { x: width, y: cy + 4, class: "strong", "text-anchor": "end" }, signed(value)),
      ];
    }),
    [-10, -5, 0, 5, 10].map((tick) =>
      svg("text", { x: x(tick), y: height * rows.length + 16, "text-anchor": "middle" }, number(tick)),
    ),
  );
}

function directions(prompt) {
  if (!prompt.directions.length) return null;
  const ends = longestBars(prompt.directions);
  const names = ["first", "second", "third"];
  return html(
    "section",
    {},
    html("h2", {}, "The leading directions in words"),
    html(
      "p",
      { class: "note" },
      "Tokens that lose probability (left) and gain it (right) along each singular vector; a token's length is " +
        "its share of the singular value.",
    ),
    html(
      "div",
      { class: "bars" },
      prompt.directions.map((tokens, i) => [
        html(
          "h3",
          {},
          `${names[i]}: ${number(prompt.values[i])} nats per unit²`,
          i === prompt.along ? html("span", { class: "warm" }, ": most unlike the others’") : null,
        ),
        tokenBar(tokens, ends),
      ]),
    ),
  );
}

// Prompts whose F is most alike, by their principal coordinates; a failed prompt has none.
function nearestTo(prompt, count = 6) {
  const distance = (other) => Math.hypot(...other.coordinates.map((value, i) => value - prompt.coordinates[i]));
  return prompts
    .filter((other) => other !== prompt && !other.failed)
    .map((other) => [distance(other), other])
    .sort((a, b) => a[0] - b[0])
    .slice(0, count)
    .map(([, other]) => other);
}

function open(prompt) {
  const told = findings?.explained.find((one) => one.index === prompt.index);
  state.open = prompt;
  hideTip();
  title.textContent = `Prompt ${prompt.index}`;
  const place = state.shown.indexOf(prompt);
  previous.disabled = place <= 0;
  next.disabled = place < 0 || place === state.shown.length - 1;
  standing.replaceChildren(
    standsOut(prompt) ? html("span", { class: "warm" }, "Stands out: ") : "",
    `score ${fixed(prompt.outlier_score, 1)}, p = ${number(prompt.p_value, 2)}; ${prompt.tokens} tokens`,
    prompt.truncated ? " (its text was cut for the model)" : "",
    prompt.group === null ? "" : `; in group ${prompt.group}`,
  );
  const reading = html("div", {}, standing, fullText(prompt, told?.trigger));
  const details = [
    answers(prompt, told),
    html(
      "div",
      { class: "columns" },
      html(
        "section",
        {},
        html("h2", {}, "In which way it is unusual"),
        html("p", { class: "note" }, "Robust standard deviations; bands: 25 to 75% and 5 to 95% of all prompts."),
        responsive((width) => scores(width, prompt)),
        prompt.words.length
          ? html(
              "p",
              { class: "note" },
              "Unusual next tokens: ",
              html(
                "span",
                { class: "chips" },
                prompt.words.map((word) => said(word, "span", { class: "chip" })),
              ),
            )
          : null,
      ),
      html(
        "section",
        {},
        html("h2", {}, "What it is answered with"),
        html(
          "p",
          { class: "note" },
          "The most probable next tokens; in orange those that a word of the prompt begins with.",
        ),
        ranked(prompt.next, (token) => token[2]),
      ),
    ),
    directions(prompt),
    html(
      "div",
      { class: "columns" },
      html(
        "section",
        {},
        html("h2", {}, "Its spectrum"),
        html("p", { class: "note" }, "Orange, beside all prompts’: the median, 25 to 75% and 5 to 95%."),
        responsive((width) => spectra(width, [[prompt.values, "var(--strong)"]])),
      ),
      html(
        "section",
        {},
        html("h2", {}, "Nearest prompts"),
        html("p", { class: "note" }, "Those whose F is most alike, by the principal coordinates."),
        html(
          "ol",
          { class: "near" },
          nearestTo(prompt).map((other) =>
            html("li", {}, linkTo(other.index, String(other.index)), "  ", said(excerpt(other, 90))),
          ),
        ),
      ),
    ),
  ];
  content.replaceChildren(
    reading,
    ...(prompt.failed ? [said(`It failed: ${prompt.failed}`, "p")] : details.filter(Boolean)),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  title.focus();
}
