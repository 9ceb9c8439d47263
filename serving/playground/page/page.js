// The playground: one prompt, several models side by side, and a vote. Whatever comes from elsewhere is put in as text.

import { Refusal, ask, call } from "./answer.js";

const MOST = 6; // a browser opens no more connections to one server, and a vote names no more models
const KEY = "loraloom.key"; // kept until the tab is closed
const FIELDS = ["prompt", "system", "mode", "max", "temperature", "seed"];
const BOXES = ["turns", "blind"];

const at = (id) => document.getElementById(id);
const make = (tag, text = "", attributes = {}) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.textContent = text;
  return element;
};

let chosen = []; // references, in the order of the panels
let panels = []; // of the last question
let running = null; // its AbortController

function note(text, isBad = false) {
  at("note").textContent = text;
  at("note").classList.toggle("bad", isBad);
}

const key = () => sessionStorage.getItem(KEY) ?? "";

// ---- which models

function choose(references) {
  chosen = [...new Set(references)].slice(0, MOST);
  at("chips").replaceChildren(...chosen.map((reference) => {
    const chip = make("span", reference);
    const remove = make("button", "×", { type: "button", title: `remove ${reference}` });
    remove.setAttribute("aria-label", `remove ${reference}`);
    remove.onclick = () => choose(chosen.filter((other) => other !== reference));
    chip.append(remove);
    return chip;
  }));
  at("adding").disabled = at("add").disabled = chosen.length >= MOST;
  keep();
}

function addTyped() {
  const reference = at("add").value.trim();
  if (reference) choose([...chosen, reference]);
  at("add").value = "";
}

async function learn() {
  note(""); // before it asks: what others say meanwhile stays
  try {
    const cards = (await (await call("v1/models", key())).json()).data;
    const base = cards.find((card) => card.parent === null)?.id;
    const names = cards.filter((card) => card.parent !== null && !card.id.includes("@")).map((card) => card.id);
    const option = (card) => make("option", card.root === card.id ? "" : card.root, { value: card.id });
    at("known").replaceChildren(...cards.map(option));
    at("served").textContent = `${base ?? "no base"}, ${names.length} adapter${names.length === 1 ? "" : "s"}`;
    at("entrance").hidden = !key();
    if (!chosen.length) choose([base, names[0]].filter(Boolean));
  } catch (error) {
    if (!(error instanceof Refusal)) return note(`The server does not answer: ${error.message}`, true);
    if (error.status === 401) {
      at("entrance").hidden = false;
      at("key").focus();
      return note(key() ? "This key is not known here." : "This server wants an API key.", true);
    }
    note(error.message, true);
  }
}

// ---- the address keeps what was asked

function keep() {
  const kept = new URLSearchParams(chosen.map((reference) => ["m", reference]));
  for (const id of FIELDS) {
    if (at(id).value !== at(id).dataset.usual) kept.append(id, at(id).value);
  }
  for (const id of BOXES) {
    if (at(id).checked) kept.append(id, "1");
  }
  history.replaceState(null, "", `#${kept}`);
}

function restore() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const id of FIELDS) {
    const value = kept.get(id);
    const isFit = value !== null && (at(id).type !== "number" || Number.isFinite(Number(value)));
    at(id).value = isFit ? value : at(id).dataset.usual;
  }
  if (!at("mode").value) at("mode").value = "chat"; // of a damaged address
  for (const id of BOXES) at(id).checked = kept.get(id) === "1";
  choose(kept.getAll("m").filter(Boolean));
  show();
}

function show() {
  at("system-row").hidden = at("mode").value !== "chat";
  keep();
}

// ---- asking

function body(reference) {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const common = {
    model: reference,
    max_tokens: number("max"),
    temperature: number("temperature"),
    seed: number("seed"),
  };
  if (at("mode").value === "completion") return ["v1/completions", { ...common, prompt: at("prompt").value }];
  const system = at("system").value.trim() ? [{ role: "system", content: at("system").value }] : [];
  return ["v1/chat/completions", { ...common, messages: [...system, { role: "user", content: at("prompt").value }] }];
}

class Panel {
  constructor(reference, letter, isBlind) {
    this.reference = reference;
    this.request = body(reference); // now: with "one after another", its turn may come after the form was edited
    this.letter = letter;
    this.isBlind = isBlind;
    this.answer = null;
    this.element = make("article");
    this.title = make("h2");
    this.text = make("pre", "", { dir: "auto" });
    this.facts = make("footer", "waiting");
    const head = make("header");
    head.append(this.title);
    this.element.append(head, this.text, this.facts);
    this.tell();
  }

  async run(signal) {
    this.facts.textContent = "asked";
    try {
      const [path, asked] = this.request;
      this.answer = await ask(path, key(), asked, signal, (text) => this.text.append(text));
    } catch (error) {
      this.isStopped = error.name === "AbortError";
      if (!this.isStopped) this.error = error.message;
    }
    this.tell();
  }

  reveal() {
    this.isBlind = false;
    this.tell();
  }

  tell() {
    const { answer } = this;
    const isResolved = answer?.model && answer.model !== this.reference;
    const who = isResolved ? `${this.reference} → ${answer.model}` : this.reference;
    this.title.textContent = this.isBlind ? `answer ${this.letter}` : `${this.letter} · ${who}`;
    if (this.isStopped) this.facts.textContent = "stopped";
    if (this.error) this.facts.textContent = "failed";
    if (this.error && !this.isBlind) { // it may name the model
      this.text.classList.add("bad");
      this.text.append(`${this.text.textContent ? "\n" : ""}${this.error}`);
      this.error = null;
    }
    if (!answer) return;
    const facts = [
      answer.first === null ? "no text" : `first token ${answer.first.toFixed(0)} ms`,
      answer.perSecond && `${answer.perSecond.toFixed(1)} tokens/s`,
      `${answer.tokens} token${answer.tokens === 1 ? "" : "s"}`,
      answer.finish === "length" && "cut at the limit",
    ];
    this.facts.textContent = this.isBlind ? "answered" : facts.filter(Boolean).join(" · ");
  }
}

// In place, each order as likely as any other (Fisher and Yates).
function shuffle(list) {
  for (let last = list.length - 1; last > 0; last -= 1) {
    const other = Math.floor(Math.random() * (last + 1));
    [list[last], list[other]] = [list[other], list[last]];
  }
  return list;
}

async function question() {
  addTyped();
  if (running) return;
  if (!chosen.length) return note("Add a model to ask.", true);
  keep();
  running = new AbortController();
  const { signal } = running;
  at("ask").disabled = true;
  at("stop").hidden = false;
  at("verdict").hidden = true;
  at("tally").textContent = "";
  note("");
  const isBlind = at("blind").checked;
  const order = isBlind ? shuffle([...chosen]) : chosen;
  panels = order.map((reference, index) => new Panel(reference, "ABCDEF"[index], isBlind));
  at("answers").replaceChildren(...panels.map((panel) => panel.element));
  if (at("turns").checked) {
    for (const panel of panels) await panel.run(signal);
  } else {
    await Promise.all(panels.map((panel) => panel.run(signal)));
  }
  running = null;
  at("ask").disabled = false;
  at("stop").hidden = true;
  offer();
}

// ---- the vote

const comparable = () => panels.filter((panel) => panel.answer?.model);

function offer() {
  const answered = comparable();
  const different = new Set(answered.map((panel) => panel.answer.model)).size;
  const isBlind = panels.some((panel) => panel.isBlind);
  if (answered.length < 2 || different < answered.length) {
    panels.forEach((panel) => panel.reveal());
    if (answered.length > 1) note("Two of the answers are the same version's: there is nothing to vote on.");
    return;
  }
  at("choices").replaceChildren(...answered.map((panel) => {
    const button = make("button", panel.letter, { type: "button" });
    button.onclick = () => vote(panel);
    return button;
  }));
  at("reveal").hidden = !isBlind;
  at("verdict").hidden = false;
}

function close() {
  at("verdict").hidden = true;
  panels.forEach((panel) => panel.reveal());
}

async function vote(best) {
  const voted = panels;
  const cast = { models: comparable().map((panel) => panel.answer.model), better: best?.answer.model ?? null };
  const buttons = at("verdict").querySelectorAll("button");
  buttons.forEach((button) => { button.disabled = true; });
  try {
    const { scores } = await (await call("v1/votes", key(), { method: "POST", body: JSON.stringify(cast) })).json();
    if (panels !== voted) return; // another question has been asked meanwhile
    best?.element.classList.add("best");
    close();
    const percent = (share) => `${(100 * share).toFixed(0)} %`;
    const told = Object.entries(scores).map(([version, score]) =>
      `${version} is preferred in ${percent(score.value)} of its comparisons ` +
      `(95 %: ${percent(score.low)} to ${percent(score.high)}; ${score.count} vote${score.count === 1 ? "" : "s"})`);
    at("tally").textContent = ["The vote is kept.", ...told].join("\n");
  } catch (error) {
    if (panels === voted) note(`The vote is not kept: ${error.message}`, true);
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
}

// ---- what a person does

at("question").onsubmit = (event) => {
  event.preventDefault();
  question();
};
at("question").oninput = show;
at("question").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    at("question").requestSubmit();
  }
};
at("add").onkeydown = (event) => {
  if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    addTyped();
  }
};
at("adding").onclick = addTyped;
at("stop").onclick = () => running?.abort();
at("tie").onclick = () => vote(null);
at("reveal").onclick = close;
at("link").onclick = async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    note("The address of these models, this prompt and these settings is copied.");
  } catch { // browsers let pages copy only where they came over HTTPS, or from this machine
    note("This browser does not let the page copy here. Its address bar holds the link.");
  }
};
at("entrance").onsubmit = (event) => {
  event.preventDefault();
  const typed = at("key").value.trim();
  if (typed) sessionStorage.setItem(KEY, typed);
  else sessionStorage.removeItem(KEY);
  at("key").value = "";
  learn();
};
addEventListener("hashchange", () => {
  restore();
  learn();
});

for (const id of FIELDS) at(id).dataset.usual = at(id).value;
at("entrance").hidden = true;
restore();
learn();
