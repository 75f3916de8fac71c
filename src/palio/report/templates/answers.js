"use strict";
// The state of the page is the address's hash, so every view, and every question, is a link.
const index = JSON.parse(document.querySelector("#index").textContent);
const $ = (id) => document.getElementById(id);
const UNANSWERED = 1, CUT = 2, SHORTENED = 4, CHUNK = 200;
let shown = [], drawn = 0, current = -1, drawing = 0;

// --- parts: each is a script that calls palioPart with its name
const waiting = new Map(), loaded = new Map();
globalThis.palioPart = (name, data) => waiting.get(name)?.(data);
function part(...path) {
  const address = [index.folder, ...path].join("/");
  if (!loaded.has(address)) {
    loaded.set(address, new Promise((done, failed) => {
      waiting.set([index.folder, ...path].slice(-3).join("/"), done);
      const script = document.createElement("script");
      script.src = `${address}.js`;
      script.onerror = () => { loaded.delete(address); failed(new Error(`${address}.js cannot be loaded`)); };
      document.head.append(script);
    }));
  }
  return loaded.get(address);
}

// --- state
const known = new Set(index.entries.map(([id]) => id));
function state() {
  const given = new URLSearchParams(location.hash.slice(1));
  const entry = known.has(given.get("entry")) ? given.get("entry") : index.entries[0][0];
  const other = given.get("with");
  return {
    entry,
    with: known.has(other) && other !== entry ? other : "",
    scenario: index.scenarios.includes(given.get("scenario")) ? given.get("scenario") : "",
    find: given.get("find") ?? "",
    wrong: given.get("wrong") === "1",
    question: given.get("question") ?? "",
  };
}
function address(changes) {
  const next = { ...state(), ...changes }, given = new URLSearchParams();
  for (const [key, value] of Object.entries(next)) if (value) given.set(key, value === true ? "1" : value);
  return `#${given}`;
}
const go = (changes) => { location.hash = address(changes); };
const keyOf = (number) => { const [run, instance] = index.questions[number]; return `${index.runs[run][0]}/${instance}`; };
const scenarioOf = (number) => index.runs[index.questions[number][0]][1];

// --- marks: shortfall is 0 with full marks, as in palio.answers.comparison
function shortfall(number, mark) {
  const columns = index.metrics[scenarioOf(number)];
  const gaps = mark[0].flatMap((value, at) => (value === null ? [] : [columns[at][1] ? 1 - value : value]));
  if (gaps.length) return gaps.reduce((sum, gap) => sum + gap, 0) / gaps.length;
  return mark[1] & UNANSWERED ? 1 : 0;
}
function full(number, mark) {
  const columns = index.metrics[scenarioOf(number)];
  return !(mark[1] & UNANSWERED)
    && mark[0].every((value, at) => value === null || (columns[at][1] ? value >= 1 : value <= 0));
}
function difference(number, mine, other) {
  return (shortfall(number, other) - shortfall(number, mine)) * index.runs[index.questions[number][0]][2];
}
function signOf(number, mark) {
  if (!mark) return ["–", "no answer yet"];
  if (mark[1] & UNANSWERED) return ["∅", "unanswered"];
  if (mark[0].every((value) => value === null)) return ["·", "no metric has a value"];
  return full(number, mark) ? ["✓", "full marks"] : ["✗", "short of full marks"];
}

// --- the list
function make(name, content, attributes = {}) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...(Array.isArray(content) ? content : [content ?? ""]));
  return node;
}
function sign(number, mark) {
  const [character, meaning] = signOf(number, mark);
  return make("span", character, { class: `sign ${meaning === "full marks" ? "c-good" : "c-closed"}`, title: meaning, role: "img", "aria-label": meaning });
}
async function select(now) {
  const mine = await part("entries", now.entry, "marks");
  const other = now.with ? await part("entries", now.with, "marks") : null;
  const words = now.find.toLowerCase().split(/\s+/).filter(Boolean);
  let found = index.questions.map((_, number) => number).filter((number) => {
    if (now.scenario && index.scenarios[scenarioOf(number)] !== now.scenario) return false;
    const mark = mine[number];
    if (other) {
      if (!mark || !other[number]) return false;
      const lead = difference(number, mark, other[number]);
      if (now.wrong ? lead >= 0 : false) return false;
    } else if (now.wrong && (!mark || full(number, mark))) return false;
    if (!words.length) return true;
    const text = `${keyOf(number)} ${index.questions[number][2]} ${mark?.[2] ?? ""} ${other?.[number]?.[2] ?? ""}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const rank = other
    ? (number) => -Math.abs(difference(number, mine[number], other[number]))
    : now.wrong ? (number) => -shortfall(number, mine[number]) : null;
  if (rank) {
    const order = new Map(found.map((number) => [number, rank(number)]));
    found.sort((a, b) => order.get(a) - order.get(b) || a - b);
  }
  return { mine, other, found };
}
function item(number, mine, other) {
  const signs = [sign(number, mine[number]), ...(other ? [sign(number, other[number])] : [])];
  const text = [
    make("small", `${index.scenarios[scenarioOf(number)].replaceAll("_", " ")} ${index.questions[number][1]}`),
    make("span", index.questions[number][2]),
  ];
  const answer = mine[number]?.[2];
  if (answer) text.push(make("span", `→ ${answer}`, { class: "head" }));
  const link = make("a", [make("span", signs, { class: "signs" }), make("span", text, { class: "texts" })], { href: address({ question: keyOf(number) }) });
  return make("li", link, { "data-number": number });
}
function draw(upTo, marks) {
  const items = [];
  for (; drawn < Math.min(upTo, shown.length); drawn++) items.push(item(shown[drawn], marks.mine, marks.other));
  $("list").append(...items);
  $("more").hidden = drawn >= shown.length;
}
let marks = null, listed = "";
async function show() {
  const now = state(), turn = ++drawing;
  for (const name of ["entry", "with", "scenario"]) $(name).value = now[name];
  if (document.activeElement !== $("find")) $("find").value = now.find;
  $("wrong").checked = now.wrong;
  $("wrong-label").textContent = now.with ? `only what ${now.entry} lost to ${now.with}` : "without full marks only";
  try {
    const view = JSON.stringify({ ...now, question: "" });
    if (view !== listed) {
      const chosen = await select(now);
      if (turn !== drawing) return;
      [marks, shown, drawn, listed] = [chosen, chosen.found, 0, view];
      $("list").replaceChildren();
      draw(CHUNK, marks);
      let text = `${shown.length} of ${index.questions.length} questions`;
      if (marks.other) {
        const lead = shown.map((number) => difference(number, marks.mine[number], marks.other[number]));
        text += `; ${now.entry} did better on ${lead.filter((one) => one > 0).length}, ${now.with} on ${lead.filter((one) => one < 0).length}; those that decide come first`;
      }
      $("count").textContent = text;
    }
    await open(now, turn);
  } catch (error) {
    $("count").textContent = error.message;
  }
}

// --- one question
const byKey = new Map(index.questions.map((_, number) => [keyOf(number), number]));
async function open(now, turn) {
  const number = byKey.get(now.question);
  document.body.classList.toggle("one", number !== undefined);
  current = shown.indexOf(number);
  if (current >= drawn) draw(current + CHUNK, marks);
  for (const node of $("list").querySelectorAll("[aria-current]")) node.removeAttribute("aria-current");
  if (number === undefined) return;
  const line = $("list").querySelector(`[data-number="${number}"] a`);
  line?.setAttribute("aria-current", "true");
  line?.scrollIntoView({ block: "nearest" });
  const at = Math.floor(number / index.part), place = number % index.part;
  const names = [now.entry, ...(now.with ? [now.with] : [])];
  const [[prompts, references], ...replies] = (await Promise.all([
    part("questions", at), ...names.map((name) => part("entries", name, at)),
  ])).map((content) => content[place]);
  if (turn !== drawing) return;
  const all = [marks.mine, ...(marks.other ? [marks.other] : [])];
  $("question").replaceChildren(
    make("p", steps(), { class: "steps" }),
    make("h2", [`${index.scenarios[scenarioOf(number)].replaceAll("_", " ")}, ${index.questions[number][1]}`]),
    make("p", index.runs[index.questions[number][0]][0], { class: "kicker" }),
    ...prompts.filter(([variant]) => !variant).concat(prompts.filter(([variant]) => variant)).slice(0, 1).flatMap(([, prompt]) => [make("h3", "Prompt"), make("pre", prompt)]),
    make("h3", references.length > 1 ? "Choices" : "Reference"),
    make("ul", references.map(([label, text, correct]) => make("li", [correct ? make("b", "✓ correct: ") : "", make("code", `${label && `${label}. `}${text}`)])), { class: "choices" }),
    make("div", names.map((name, which) => column(name, number, all[which][number], replies[which], prompts)), { class: "columns" }),
  );
}
function steps() {
  const links = [make("a", "All questions", { href: address({ question: "" }), class: "back" })];
  if (current > 0) links.push(make("a", "← Previous", { href: address({ question: keyOf(shown[current - 1]) }) }));
  if (current >= 0 && current + 1 < shown.length) links.push(make("a", "Next →", { href: address({ question: keyOf(shown[current + 1]) }) }));
  return links;
}
function column(name, number, mark, replies, prompts) {
  const nodes = [make("h3", name)];
  if (!replies) return make("section", [...nodes, make("p", "No answer: its HELM run has not finished.", { class: "missing" })]);
  for (const [variant, text, why, cut, shortened, prompt, logprob] of replies) {
    if (variant) nodes.push(make("h4", variant));
    if (variant && prompts.length > 1) {
      const own = prompts.find(([one]) => one === variant);
      if (own) nodes.push(make("details", [make("summary", "Its prompt"), make("pre", own[1])]));
    }
    if (text === null) nodes.push(make("p", `Unanswered: ${why}`, { class: "stopped" }));
    else nodes.push(text.trim() ? make("pre", text, { class: "answer" }) : make("p", "The answer is empty.", { class: "missing" }));
    if (cut) nodes.push(make("p", "Cut at a stop sequence: the server went on behind it.", { class: "aside" }));
    if (logprob !== null) nodes.push(make("p", `Log-probability ${logprob}`, { class: "aside" }));
    if (shortened) nodes.push(make("details", [make("summary", `The model's window shortened the prompt: ${shortened}`), make("pre", prompt)]));
  }
  const columns = index.metrics[scenarioOf(number)];
  nodes.push(make("dl", columns.map(([title, higher], at) => make("div", [
    make("dt", `${title}${higher ? "" : " (lower is better)"}`),
    make("dd", mark?.[0][at] === null || mark?.[0][at] === undefined ? "no value" : String(mark[0][at])),
  ])), { class: "facts" }));
  return make("section", nodes);
}

// --- controls
for (const [id, team] of index.entries) {
  $("entry").append(new Option(`${id} (${team})`, id));
  $("with").append(new Option(`${id} (${team})`, id));
}
for (const name of index.scenarios) $("scenario").append(new Option(name.replaceAll("_", " "), name));
for (const name of ["entry", "with", "scenario"]) $(name).addEventListener("change", () => go({ [name]: $(name).value, question: "" }));
$("wrong").addEventListener("change", () => go({ wrong: $("wrong").checked, question: "" }));
$("find").addEventListener("input", () => history.replaceState(null, "", address({ find: $("find").value, question: "" })) ?? show());
$("more").addEventListener("click", () => draw(drawn + CHUNK, marks));
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { if (document.activeElement === $("find")) $("find").blur(); else go({ question: "" }); return; }
  if (event.target.matches("input:not([type=checkbox]), select, textarea")) return;
  const step = { j: 1, k: -1 }[event.key];
  if (step) { const next = shown[current < 0 && step < 0 ? 0 : current + step]; if (next !== undefined) go({ question: keyOf(next) }); }
  else if (event.key === "w") go({ wrong: !state().wrong, question: "" });
  else if (event.key === "/") { event.preventDefault(); $("find").focus(); }
});
addEventListener("hashchange", show);
show();
