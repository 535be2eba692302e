// The page of compute_fisher.py: findings, groups, a map, the table of prompts, and one prompt.

const { prompts, findings, groups, columns, bands } = data;
const byIndex = new Map(prompts.map((prompt) => [prompt.index, prompt]));
const colourOf = new Map(data.leading.map((index, place) => [index, data.distinct[place]]));
const state = { sort: "outlier_score", descending: true, search: "", group: null, odd: false, shown: [], picked: null };

const standsOut = (prompt) => prompt.p_value <= data.false_alarms;
const linkTo = (index, text = `prompt ${index}`, attributes = {}) =>
  said(text, "a", { href: `#prompt-${index}`, ...attributes });
const links = (indices) =>
  indices.flatMap((index, i) => [i ? ", " : "", byIndex.has(index) ? linkTo(index, String(index)) : String(index)]);

function excerpt(prompt, length = 160) {
  const text = prompt.text.replace(/\s+/g, " ").trim();
  const begin = prompt.before ? "… " : "";
  return begin + (text.length > length ? `${text.slice(0, length).replace(HALVES, "")}…` : text);
}

// --- findings and groups ---

function finding(span, place) {
  const share = (count, of) =>
    html("dd", {}, html("span", { class: "hit", style: { width: `${(100 * count) / of}%` } }));
  const row = (name, count, of = span.of) => [
    html("dt", {}, name),
    share(count, of),
    html("data", {}, `${count} of ${of}`),
  ];
  return html(
    "article",
    { class: "card" },
    html(
      "p",
      { class: "lead" },
      place ? `${place}. ` : "",
      said(span.span, "mark"),
      html("span", { class: "muted" }, ` ${span.place === "middle" ? "in" : "at"} the ${span.place} of a prompt`),
    ),
    html(
      "div",
      { class: "columns" },
      html(
        "div",
        {},
        html("h3", {}, "What the model then says"),
        said(span.says || "(nothing)", "blockquote"),
        span.answers.map((text) => said(text || "(nothing)", "blockquote", { class: "data muted" })),
      ),
      html(
        "div",
        {},
        html("h3", {}, "Ordinary prompts whose answer it changes"),
        html(
          "dl",
          { class: "ranked wide" },
          row("this span", span.transplanted),
          span.control === null ? null : row("random words", span.control),
          span.middle && span.place !== "middle" ? row("in the middle", span.middle.transplanted, span.middle.of) : null,
        ),
        html(
          "p",
          { class: "note" },
          `p = ${number(span.p_value, 2)}; found in ${plural(span.prompts.length, "prompt")}: `,
          links(span.prompts),
        ),
      ),
    ),
  );
}

function findingsSection() {
  if (!findings) return null;
  const { proven, not_proven: others, explained } = findings;
  const named = explained.filter((told) => told.trigger).length;
  return section(
    proven.length ? `${plural(proven.length, "proven trigger")}` : "No proven trigger",
    html(
      "p",
      { class: "note" },
      `${plural(explained.length, "prompt")} that stand out most were answered, and the answers compared with ` +
        "those of ordinary prompts: " +
        `${named} of them hang on a span of words. A span is proven if it changes the answers of ordinary ` +
        "prompts too, also in the middle of their text, and as many random words do not.",
    ),
    html(
      "div",
      { class: "cards" },
      proven.map((span, i) => finding(span, i + 1)),
    ),
    others.length
      ? html(
          "details",
          { class: "after" },
          html("summary", {}, `${plural(others.length, "span")} not proven`),
          html(
            "div",
            { class: "cards" },
            others.map((span) => finding(span)),
          ),
        )
      : null,
  );
}

function groupsSection() {
  if (!groups.length) return null;
  return section(
    groups.length === 1 ? "One group of prompts answered alike" : `${groups.length} groups of prompts answered alike`,
    html(
      "p",
      { class: "note" },
      "They are more alike in their next tokens and in F than their texts are. A backdoor makes such a group; " +
        "so do questions that all take “Yes” or “No”.",
    ),
    html(
      "div",
      { class: "columns" },
      groups.map((group, number_) =>
        html(
          "article",
          { class: "card" },
          html("h3", {}, `Group ${number_}: ${plural(group.size, "prompt")}`),
          html(
            "ul",
            { class: "chips", "aria-label": "its unusual next tokens" },
            group.words.map((word) => said(word, "li")),
          ),
          html(
            "p",
            { class: "note" },
            `likeness ${fixed(group.likeness, 2)}, usually ${fixed(group.usual_likeness, 2)}`,
          ),
          html(
            "button",
            {
              class: "button",
              type: "button",
              onclick: () => {
                select("group", String(number_));
                document.getElementById("prompts").scrollIntoView();
                controls.group.focus({ preventScroll: true });
              },
            },
            "Show them in the table",
          ),
        ),
      ),
    ),
  );
}

// --- the map ---

const SHORT_DRAG = 6; // pixels: up to it, the press of a button is a click

// Where the prompts lie on the map, the one next to the pointer, and those in a rectangle that is drawn with it.
function mapOf(width) {
  const height = Math.min(480, Math.max(300, width * 0.72));
  const place = (prompt) => [prompt.coordinates[0], prompt.coordinates[Math.min(1, prompt.coordinates.length - 1)]];
  const ends = (axis) => {
    const values = prompts.map((prompt) => place(prompt)[axis]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const more = 0.05 * (high - low || 1);
    return [low - more, high + more];
  };
  const [across, down] = [ends(0), ends(1)];
  const x = linear(across, [space.left, width - space.right]);
  const y = linear(down, [height - space.bottom, space.top + 10]);
  const at = new Map(prompts.map((prompt) => [prompt, [x(place(prompt)[0]), y(place(prompt)[1])]]));
  const ring = svg("circle", { r: 8, fill: "none", stroke: "var(--ink)", "stroke-width": 1.5, visibility: "hidden" });
  const dots = [...prompts]
    .sort((a, b) => a.outlier_score - b.outlier_score)
    .map((prompt) => {
      const [cx, cy] = at.get(prompt);
      const colour = colourOf.get(prompt.index);
      prompt.dot = svg(
        "g",
        {},
        colour
          ? [
              svg("circle", { cx, cy, r: 5.5, fill: colour, stroke: "var(--paper)" }),
              svg("text", { x: cx + 8, y: cy - 6, class: "strong" }, prompt.index),
            ]
          : svg("circle", { cx, cy, r: 4, fill: "var(--link)", opacity: 0.6 }),
      );
      return prompt.dot;
    });
  const rectangle = svg("rect", { class: "cursor", fill: "none", visibility: "hidden" });
  let corner = null; // where the pointer was pressed
  let drawn = false; // a click follows it that is none
  const local = (event) => {
    const box = picture.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const between = (event) => {
    const [x1, y1] = local(event);
    const [x0, y0] = corner;
    return { x: Math.min(x0, x1), y: Math.min(y0, y1), width: Math.abs(x1 - x0), height: Math.abs(y1 - y0) };
  };
  const nearest = (event) => {
    const [left, top] = local(event);
    const distance = (prompt) => Math.hypot(at.get(prompt)[0] - left, at.get(prompt)[1] - top);
    const best = prompts.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    return distance(best) < 24 ? best : null;
  };
  const ticks = (range, count) => rounds(...range, count).map((value) => [value, number(value, 2)]);
  const picture = frame(
    {
      width,
      height,
      x,
      y,
      xTicks: ticks(across, width > 500 ? 6 : 3),
      yTicks: ticks(down, 4),
      xLabel: "first principal coordinate",
      yLabel: "second principal coordinate",
      label: "Map of the prompts; the table below lists them all",
    },
    dots,
    ring,
    rectangle,
  );
  picture.classList.add("area");
  picture.addEventListener("pointerdown", (event) => {
    drawn = false;
    if (event.pointerType === "touch" || event.button) return; // a finger scrolls the page
    event.preventDefault(); // no text is marked
    corner = local(event);
    picture.setPointerCapture(event.pointerId);
  });
  picture.addEventListener("pointerup", (event) => {
    if (!corner) return;
    const { x, y, width, height } = between(event);
    corner = null;
    rectangle.setAttribute("visibility", "hidden");
    if (Math.max(width, height) <= SHORT_DRAG) return;
    drawn = true;
    const inside = ([cx, cy]) => cx >= x && cx <= x + width && cy >= y && cy <= y + height;
    pick(prompts.filter((prompt) => inside(at.get(prompt))));
  });
  picture.addEventListener("pointermove", (event) => {
    if (corner) {
      for (const [name, value] of Object.entries(between(event))) rectangle.setAttribute(name, value);
      rectangle.setAttribute("visibility", "visible");
      ring.setAttribute("visibility", "hidden");
      return hideTip();
    }
    const prompt = nearest(event);
    ring.setAttribute("visibility", prompt ? "visible" : "hidden");
    if (!prompt) return hideTip();
    ring.setAttribute("cx", at.get(prompt)[0]);
    ring.setAttribute("cy", at.get(prompt)[1]);
    showTip(
      event,
      html("b", {}, `${prompt.index}  score ${fixed(prompt.outlier_score, 1)}, p ${number(prompt.p_value, 2)}`),
      html("br"),
      said(excerpt(prompt, 120)),
    );
  });
  picture.addEventListener("pointerleave", () => {
    ring.setAttribute("visibility", "hidden");
    hideTip();
  });
  picture.addEventListener("click", (event) => {
    const prompt = drawn ? null : nearest(event);
    if (prompt) location.hash = `prompt-${prompt.index}`;
  });
  dim();
  return picture;
}

// Shows in the table only these prompts, those in a rectangle on the map; of none, all.
function pick(some) {
  state.picked = some.length ? new Set(some) : null;
  dim();
  update();
}

// On the map, prompts that are not picked are faint.
function dim() {
  const { picked } = state;
  for (const prompt of prompts) prompt.dot?.setAttribute("opacity", picked && !picked.has(prompt) ? 0.15 : 1);
  picks.hidden = !picked;
  pickCount.textContent = picked ? `${plural(picked.size, "prompt")} in the rectangle: the table shows only these. ` : "";
}

const pickCount = html("span", { role: "status" });
const picks = html(
  "p",
  { class: "note", hidden: true },
  pickCount,
  html("button", { class: "button", type: "button", onclick: () => pick([]) }, "Show all"),
);

// The spectra of all prompts as bands, with some prompts' own.
function spectra(width, own) {
  const height = Math.min(360, Math.max(240, width * 0.6));
  const count = bands.spectrum[0].length;
  const known = [...bands.spectrum, ...own.map(([values]) => values)].flat().filter((value) => value > 0);
  if (!known.length) return html("p", { class: "note" }, "All singular values are 0.");
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const x = linear([1, Math.max(count, 2)], [space.left + 8, width - space.right - 8]);
  const log = linear([Math.log10(low) - 0.1, Math.log10(high) + 0.1], [height - space.bottom, space.top + 12]);
  const y = (value) => log(Math.log10(value));
  const line = (values) => pieces(values.map((value, i) => (value > 0 ? [x(i + 1), y(value)] : null)));
  const band = (a, b, name) => {
    const upper = bands.spectrum[b].map((value, i) => (value > 0 ? [x(i + 1), y(value)] : null)).filter(Boolean);
    const lower = bands.spectrum[a]
      .map((value, i) => (bands.spectrum[b][i] > 0 ? [x(i + 1), y(Math.max(value, low))] : null))
      .filter(Boolean);
    return upper.length ? svg("path", { class: name, d: `${path([...upper, ...lower.reverse()])}Z` }) : null;
  };
  const numbers = Array.from({ length: count }, (_, i) => i + 1).filter(
    (i) => count <= 12 || (i - 1) % Math.ceil(count / 10) === 0,
  );
  return frame(
    {
      width,
      height,
      x,
      y,
      label: "Singular values: all prompts' and this one's",
      xTicks: numbers.map((i) => [i, i]),
      yTicks: powers(low, high).map((value) => [value, number(value)]),
      xLabel: "singular value",
      yLabel: "nats per unit²",
    },
    band(0, 4, "band1"),
    band(1, 3, "band2"),
    line(bands.spectrum[2]).map((piece) => svg("path", { class: "median", d: path(piece) })),
    own.map(([values, colour]) => [
      line(values).map((piece) => svg("path", { d: path(piece), fill: "none", stroke: colour, "stroke-width": 1.8 })),
      line(values)
        .flat()
        .map(([cx, cy]) => svg("circle", { cx, cy, r: 3, fill: colour })),
    ]),
  );
}

function pictures() {
  const leading = data.leading.map((index) => [byIndex.get(index).values, colourOf.get(index)]);
  return html(
    "section",
    { class: "columns" },
    html(
      "div",
      {},
      html("h2", {}, "Which directions"),
      html(
        "p",
        { class: "note" },
        "Prompts with like F lie close. Point at a prompt to read it, click to open it, or draw a rectangle to " +
          "see only those in it in the table; those that stand out most are numbered.",
      ),
      responsive(mapOf),
      picks,
    ),
    html(
      "div",
      {},
      html("h2", {}, "How strong, and how spread"),
      html(
        "p",
        { class: "note" },
        `Singular values of all ${data.count} prompts: the median, 25 to 75% and 5 to 95%; those that stand out ` +
          "most in colour.",
      ),
      responsive((width) => spectra(width, leading)),
    ),
  );
}

// --- the table ---

const headers = columns.map((column) => {
  const button = html(
    "button",
    { type: "button", title: column.about, onclick: () => sortBy(column.key) },
    column.name,
  );
  const narrow = column.key === "index" || column.key === "outlier_score" || column.key === "p_value";
  return html("th", { scope: "col", class: `${column.key === "p_value" ? "p" : ""} ${narrow ? "" : "more"}` }, button);
});
const rowCount = html("p", { class: "count", role: "status" });
const body = html("tbody");
const controls = {};

const cellText = { index: String, tokens: String, p_value: (p) => number(p, 2), outlier_score: (z) => fixed(z, 1) };

for (const prompt of prompts) {
  prompt.link = linkTo(prompt.index, excerpt(prompt));
  const cells = columns.map(({ key }) => {
    const value = prompt[key];
    const hot = key.startsWith("z_") || key === "outlier_score" ? value >= 3 : key === "p_value" && standsOut(prompt);
    const narrow = key === "index" || key === "outlier_score" || key === "p_value";
    return html("td", { class: `${hot ? "warm" : ""} ${narrow ? "" : "more"}` }, (cellText[key] ?? signed)(value));
  });
  const words = prompt.failed ? html("span", { class: "muted" }, " (failed)") : null;
  prompt.row = html("tr", {}, cells[0], html("td", { class: "left" }, prompt.link, words), cells.slice(1));
  prompt.row.addEventListener("click", (event) => {
    if (event.target.closest("a") || getSelection().toString()) return;
    location.hash = `prompt-${prompt.index}`;
  });
  prompt.haystack = `${prompt.index} ${prompt.text} ${prompt.words.join(" ")}`.toLowerCase();
}

function sortBy(key) {
  state.descending = state.sort === key ? !state.descending : !["index", "p_value"].includes(key);
  state.sort = key;
  controls.sort.value = key;
  update();
}

function select(name, value) {
  controls[name].value = value;
  state[name] = name === "group" && value !== "" ? Number(value) : value || null;
  update();
}

function update() {
  const wanted = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const sign = state.descending ? -1 : 1;
  state.shown = prompts
    .filter((prompt) => (state.group === null || prompt.group === state.group) && (!state.odd || standsOut(prompt)))
    .filter((prompt) => !state.picked || state.picked.has(prompt))
    .filter((prompt) => wanted.every((word) => prompt.haystack.includes(word)))
    .sort((a, b) => sign * (a[state.sort] - b[state.sort]) || a.index - b.index);
  body.replaceChildren(...state.shown.map((prompt) => prompt.row));
  rowCount.textContent = `${state.shown.length} of ${plural(prompts.length, "prompt")}`;
  columns.forEach(({ key }, i) => {
    headers[i].setAttribute("aria-sort", key !== state.sort ? "none" : state.descending ? "descending" : "ascending");
  });
}

function tableSection() {
  controls.sort = html(
    "select",
    { onchange: (event) => sortBy(event.target.value) },
    columns.map(({ key, name }) => html("option", { value: key }, name)),
  );
  controls.sort.value = state.sort;
  controls.group = html(
    "select",
    { onchange: (event) => select("group", event.target.value) },
    html("option", { value: "" }, "all"),
    groups.map((group, i) => html("option", { value: i }, `group ${i} (${group.size})`)),
  );
  const search = html("input", {
    type: "search",
    autocomplete: "off",
    oninput: (event) => ((state.search = event.target.value), update()),
  });
  const odd = html("input", { type: "checkbox", onchange: (event) => ((state.odd = event.target.checked), update()) });
  const left = data.count - prompts.length;
  return html(
    "section",
    { id: "prompts" },
    html("h2", {}, "The prompts"),
    html(
      "p",
      { class: "note" },
      "Scores are in robust standard deviations of what is usual; the p-value is how often an ordinary prompt " +
        "has a score as high. Open a prompt to see what makes it odd.",
    ),
    left
      ? html(
          "p",
          { class: "note" },
          `The page holds ${prompts.length} of ${data.count} prompts: the oddest ones, and others evenly ` +
            "spaced. prompts.jsonl has all.",
        )
      : null,
    html(
      "div",
      { class: "tools" },
      html("label", { class: "wide" }, "Search in texts and unusual words", search),
      html("label", { class: "narrow" }, "Sort by", controls.sort),
      groups.length ? html("label", {}, "Group", controls.group) : null,
      html("label", { class: "check" }, odd, `only those that stand out (p ≤ ${data.false_alarms})`),
      rowCount,
    ),
    html(
      "table",
      { class: "prompts" },
      html(
        "thead",
        {},
        html("tr", {}, headers[0], html("th", { scope: "col", class: "left" }, "prompt"), headers.slice(1)),
      ),
      body,
    ),
  );
}

// --- together ---

function follow() {
  const found = /^#prompt-(\d+)$/.exec(location.hash);
  const prompt = found && byIndex.get(Number(found[1]));
  if (prompt) open(prompt);
  else if (dialog.open) dialog.close();
}

heading(
  "residual-fisher, a run of compute_fisher.py",
  data.title,
  data.about,
  html(
    "p",
    { class: "lead" },
    `${data.standing_out} of ${plural(data.count, "prompt")} stand out, with a p-value of at most ` +
      `${data.false_alarms}.`,
  ),
);
main.append(...[findingsSection(), groupsSection(), pictures(), tableSection(), dialog].filter(Boolean));
update();
addEventListener("hashchange", follow);
follow();
