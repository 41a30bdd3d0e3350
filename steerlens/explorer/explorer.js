// The explorer's front end: controls in, views out. A plain module; `model` is Jupyter's, or anything with get, set,
// save_changes, on and off. It keeps no state of its own but where the reader's cursor stands in a text.

const SIGNS = { 1: "added, it says", "-1": "subtracted, it says" };
const REASONS = { eos: "the model ended it", stop: "stopped", length: "cut at the limit" };
const STATUS = {
  running: "writing …",
  judging: "checking …",
  finished: "finished",
  stopped: "stopped",
  refused: "waiting: a control needs another value",
  failed: "failed",
};
const WAIT = { input: 90, typing: 350 }; // milliseconds before a change is sent: a slider that is dragged passes many values
let count = 0; // several explorers may be on one page

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function percent(p) {
  if (p < 0.0001) return "less than 0.01 %";
  return `${Number((100 * p).toPrecision(p < 0.01 ? 1 : 2))} %`;
}

/** 0 where the token was certain, 1 where it was one in ten thousand or rarer. */
const surprise = (p) => Math.min(1, -Math.log10(Math.max(p, 1e-4)) / 4);

/** A token with its spaces and line breaks seen. */
const seen = (token) => token.replace(/ /g, "·").replace(/\n/g, "⏎") || "∅";

/** A number where a text is one; anything else is sent as it was typed, for Python to say what is wrong with it. */
const number = (text) => (text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text);

/** Marks of a dark page where no background is seen, as in Colab's frames, JupyterLab, VS Code and marimo. */
const DARK = ":is(html, body):is([theme='dark'], [data-theme='dark'], [data-jp-theme-light='false'], .vscode-dark, .dark)";

/** Whether what is around an element is dark: notebooks say so in many ways, and their background says it in most. */
function isDark(node) {
  for (let at = node; at; at = at.parentElement ?? at.getRootNode?.().host) {
    const [r, g, b, alpha = 1] = (getComputedStyle(at).backgroundColor.match(/[\d.]+/g) ?? []).map(Number);
    if (alpha > 0.5 && b !== undefined) return 0.299 * r + 0.587 * g + 0.114 * b < 128;
  }
  return document.querySelector(DARK) !== null || matchMedia("(prefers-color-scheme: dark)").matches;
}

function followTheme(root, around) {
  const set = () => (root.dataset.theme = isDark(around) ? "dark" : "light");
  const watcher = new MutationObserver(set);
  for (const node of [document.documentElement, document.body]) {
    watcher.observe(node, { attributes: true, attributeFilter: ["class", "style", "theme", "data-theme",
      "data-jp-theme-light", "data-vscode-theme-kind"] });
  }
  const media = matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", set);
  requestAnimationFrame(set); // once the element is on the page
  set();
  return () => {
    watcher.disconnect();
    media.removeEventListener("change", set);
  };
}

/** A labelled control with a place for what is wrong with it. */
function field(id, name, label, control, { group = false } = {}) {
  const problem = element("p", { class: "problem", id: `${id}-${name}-problem`, hidden: true });
  const parts = group
    ? element("fieldset", { "aria-describedby": problem.id }, element("legend", {}, label), control)
    : element("div", {}, element("label", { for: `${id}-${name}` }, label), control);
  parts.classList.add("field", `field-${name}`);
  parts.append(problem);
  const target = group ? parts : parts.querySelector(`#${id}-${name}`);
  target.setAttribute("aria-describedby", problem.id);
  const refuse = (message) => {
    problem.hidden = !message;
    if (problem.textContent !== (message ?? "")) problem.textContent = message ?? "";
    parts.classList.toggle("refused", Boolean(message));
    if (message) target.setAttribute("aria-invalid", "true");
    else target.removeAttribute("aria-invalid");
  };
  return { parts, refuse };
}

function options(select, values, chosen) {
  const all = values.includes(chosen) ? values : [...values, chosen];
  select.replaceChildren(...all.map((value) => element("option", { value }, value.replace(/_/g, " "))));
  select.value = chosen;
}

/** One of the two texts: its tokens, the line that says how likely one of them was, and its verdicts. */
function textPanel(id, name, heading) {
  const text = element("div", { class: "text", tabindex: "0", role: "group", "aria-labelledby": `${id}-${name}-title` });
  const detail = element("p", { class: "detail", role: "status" });
  const verdicts = element("ul", { class: "verdicts" });
  const reason = element("span", { class: "reason" });
  const panel = element("section", { class: `side ${name}` },
    element("h3", { id: `${id}-${name}-title` }, heading, reason), text, detail, verdicts);
  let side = { tokens: [] };
  let cursor = -1;

  function point(place) {
    cursor = Math.max(-1, Math.min(place, side.tokens.length - 1));
    [...text.children].forEach((span, at) => span.classList.toggle("cursor", at === cursor));
    const token = side.tokens[cursor];
    const what = token?.ends ? "the end" : token && `“${seen(token.text)}”`;
    const steered = token && name === "steered" ? `, ${percent(token.steered)} with steering` : "";
    detail.textContent = token ? `${what}: ${percent(token.probability)} without steering${steered}` : "";
  }
  text.addEventListener("pointerover", (event) => {
    const place = [...text.children].indexOf(event.target);
    if (place >= 0) point(place);
  });
  text.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: Math.max(0, cursor - 1), ArrowRight: cursor + 1, Home: 0, End: side.tokens.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation(); // a notebook's own keys
    point(to);
  });

  function show(next) {
    const before = side.tokens;
    side = next;
    const same = before.length <= next.tokens.length && before.every((one, at) =>
      one.text === next.tokens[at].text && one.probability === next.tokens[at].probability && one.ends === next.tokens[at].ends);
    if (!same) {
      text.replaceChildren();
      point(-1);
    }
    for (const token of next.tokens.slice(text.children.length)) {
      const span = element("span", { class: "token" }, token.ends ? "■" : token.text);
      span.style.setProperty("--surprise", surprise(token.probability).toFixed(3));
      span.classList.toggle("rare", token.probability < 0.01);
      span.classList.toggle("ends", token.ends);
      text.append(span);
    }
    reason.textContent = next.finish_reason ? ` (${REASONS[next.finish_reason]})` : "";
    verdicts.replaceChildren(...next.verdicts.map(verdict));
  }
  return { panel, show };
}

function verdict({ vector, followed, strict, note, title }) {
  if (followed === null) return element("li", { class: "unknown" }, `${title ?? vector}: ${note}`);
  const loosely = followed && !strict ? " (loosely: without its first or last line, or its asterisks)" : "";
  return element("li", { class: followed ? "yes" : "no" },
    `${followed ? "✓ follows" : "✗ does not follow"} ${title ?? vector}${loosely}`);
}

function lensRow({ vector, sign, tokens }, titles) {
  const said = tokens.map(([token, logit, beyond]) => element("li", {
    class: beyond ? "beyond" : "",
    title: `logit ${logit.toFixed(2)}, ${beyond ? "above" : "within"} the range of random directions`,
  }, seen(token)));
  return element("div", { class: `lens-row ${sign > 0 ? "plus" : "minus"}` },
    element("p", {}, element("strong", {}, titles[vector] ?? vector), ` ${SIGNS[sign]}`), element("ol", {}, ...said));
}

function legend() {
  const swatches = [1, 0.1, 0.01, 0.001, 0.0001].map((p) => {
    const swatch = element("span", { class: "token" }, p === 0.0001 ? "0.01 % or less" : percent(p));
    swatch.style.setProperty("--surprise", surprise(p));
    swatch.classList.toggle("rare", p < 0.01);
    return swatch;
  });
  return element("p", { class: "legend" }, "A token's probability without steering: ", ...swatches);
}

function render({ model, el }) {
  const id = `steerlens-${++count}`;
  const { vectors, layers, operators, positions, unit } = model.get("choices");
  const titles = Object.fromEntries(vectors.map(({ name, title }) => [name, title]));

  const prompt = element("textarea", { id: `${id}-prompt`, rows: "2", spellcheck: "false" });
  const boxes = vectors.map(({ name, title }) => {
    const box = element("input", { type: "checkbox", value: name });
    return { box, label: element("label", { class: "choice" }, box, ` ${title}`) };
  });
  const layer = element("input", { id: `${id}-layer`, type: "range", min: "0", max: String(layers.length - 1), step: "1" });
  const layerShown = element("output", { for: layer.id });
  const coeff = element("input", { id: `${id}-coeff-slider`, type: "range", min: "-3", max: "3", step: "0.05" });
  coeff.setAttribute("aria-label", "Coefficient, as a slider");
  const coeffText = element("input", { id: `${id}-coeff`, type: "text", inputmode: "decimal", size: "6" });
  const coeffUnit = element("span", { class: "unit" });
  const operator = element("select", { id: `${id}-operator` });
  const rule = element("select", { id: `${id}-positions` });
  const length = element("input", { id: `${id}-max_new_tokens`, type: "number", min: "1", step: "1" });
  const stop = element("button", { type: "button", class: "stop" }, "Stop");

  const fields = {
    prompt: field(id, "prompt", "Prompt", prompt),
    vectors: field(id, "vectors", "Instructions", element("div", { class: "choices" }, ...boxes.map(({ label }) => label)), { group: true }),
    layer: field(id, "layer", "Layer", element("div", { class: "slider" }, layer, layerShown)),
    coeff: field(id, "coeff", "Coefficient", element("div", { class: "slider" }, coeff, coeffText, coeffUnit)),
    operator: field(id, "operator", "Operator", operator),
    positions: field(id, "positions", "Positions", rule),
    max_new_tokens: field(id, "max_new_tokens", "New tokens", length),
  };
  const controls = element("form", { class: "controls", "aria-label": "What is steered" });
  controls.append(...Object.values(fields).map(({ parts }) => parts));
  controls.addEventListener("submit", (event) => event.preventDefault());

  const status = element("p", { class: "status", role: "status" });
  const plan = element("p", { class: "plan" });
  const sides = { unsteered: textPanel(id, "unsteered", "Unsteered"), steered: textPanel(id, "steered", "Steered") };
  const lens = element("div", { class: "lens-rows" });
  const lensTitle = element("h3", {});
  const root = element("div", { class: "steerlens-explorer", role: "region", "aria-label": "Steering explorer" },
    controls,
    element("div", { class: "progress" }, stop, status),
    element("div", { class: "sides" }, sides.unsteered.panel, sides.steered.panel),
    legend(),
    element("section", { class: "lens" }, lensTitle, lens,
      element("p", { class: "note" }, "Bold: promoted more than any of 39 random directions promotes its token of the same rank.")),
    plan);

  let waiting = null;
  function values() {
    return {
      prompt: prompt.value,
      vectors: boxes.filter(({ box }) => box.checked).map(({ box }) => box.value),
      layer: layers[Number(layer.value)],
      coeff: number(coeffText.value),
      operator: operator.value,
      positions: rule.value,
      max_new_tokens: number(length.value),
    };
  }
  function send() {
    waiting = null;
    model.set("asked", values());
    model.save_changes();
  }
  function changed(wait) {
    describe();
    clearTimeout(waiting);
    waiting = setTimeout(send, wait);
  }
  /** What stands beside the controls and follows from them alone. */
  function describe() {
    const at = String(layers[Number(layer.value)]);
    layerShown.textContent = at;
    layer.setAttribute("aria-valuetext", `layer ${at}`);
    lensTitle.textContent = `What the direction says at layer ${at}`;
    coeffUnit.textContent = operator.value === "add" ? unit : "of the full change";
  }
  function fill() {
    if (waiting !== null) return; // the reader is ahead of what was sent
    const asked = model.get("asked");
    if (JSON.stringify(asked) === JSON.stringify(values())) return;
    if (prompt.value !== asked.prompt) prompt.value = asked.prompt;
    for (const { box } of boxes) box.checked = asked.vectors.includes(box.value);
    layer.value = String(Math.max(0, layers.indexOf(asked.layer)));
    coeffText.value = String(asked.coeff);
    coeff.value = String(asked.coeff);
    options(operator, operators, asked.operator);
    options(rule, positions, asked.positions);
    length.value = String(asked.max_new_tokens);
    describe();
  }
  function show() {
    const view = model.get("view");
    const problems = Object.fromEntries(view.problems);
    for (const [name, { refuse }] of Object.entries(fields)) refuse(problems[name]);
    const said = problems.run ? `${STATUS[view.status]}: ${problems.run}` : STATUS[view.status];
    if (status.textContent !== said) status.textContent = said;
    status.classList.toggle("problem", Boolean(problems.run));
    root.dataset.status = view.status;
    stop.setAttribute("aria-disabled", String(!["running", "judging"].includes(view.status)));
    if (view.status === "refused") return; // what was seen last stays
    for (const name of ["unsteered", "steered"]) {
      const side = view[name];
      sides[name].show({ ...side, verdicts: side.verdicts.map((one) => ({ ...one, title: titles[one.vector] })) });
    }
    lens.replaceChildren(...view.lens.map((row) => lensRow(row, titles)));
    if (problems.lens) lens.replaceChildren(element("p", { class: "problem" }, problems.lens));
    plan.textContent = view.plan && `Plan: ${view.plan}`;
  }

  prompt.addEventListener("input", () => changed(WAIT.typing));
  coeffText.addEventListener("input", () => {
    if (typeof number(coeffText.value) === "number") coeff.value = coeffText.value;
    changed(WAIT.typing);
  });
  length.addEventListener("input", () => changed(WAIT.typing));
  coeff.addEventListener("input", () => {
    coeffText.value = String(Number(coeff.value));
    changed(WAIT.input);
  });
  for (const control of [layer, operator, rule, ...boxes.map(({ box }) => box)]) {
    control.addEventListener("input", () => changed(WAIT.input));
  }
  stop.addEventListener("click", () => {
    if (stop.getAttribute("aria-disabled") === "true") return;
    model.set("stopped", model.get("stopped") + 1);
    model.save_changes();
  });
  // A notebook has keys of its own for letters, arrows and Enter; those pressed in a control are the control's.
  root.addEventListener("keydown", (event) => event.stopPropagation());

  fill();
  show();
  model.on("change:asked", fill);
  model.on("change:view", show);
  el.append(root);
  const forget = followTheme(root, el);
  return () => {
    clearTimeout(waiting);
    forget();
    model.off("change:asked", fill);
    model.off("change:view", show);
  };
}

export default { render };
