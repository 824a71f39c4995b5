// The review page: one likely label error at a time. Names and errors are always set as text; a decision counts once the server says so.
"use strict";

const $ = (id) => document.getElementById(id);
const TOKEN = document.querySelector('meta[name="topwork-token"]').content;
let classes = [];
let everything = []; // what the run doubts, unlikely errors included
let doubts = []; // what is shown
let at = 0;
let decided = []; // rows in the order of their decisions, for undo
let isSaving = false;

async function load() {
  let data;
  try {
    const answer = await fetch("/items");
    data = await answer.json();
  } catch {
    return fail("The server cannot be reached. Is topwork review still running?");
  }
  classes = data.classes;
  everything = data.doubts;
  $("corrections").textContent = data.corrections;
  $("command").textContent = data.command;
  for (const [number, name] of classes.entries()) $("classes").append(new Option(name, number));
  pick();
}

// The likely errors are those of the report; the others are shown on request.
function pick() {
  const now = doubts[at]?.row;
  doubts = everything.filter((doubt) => $("all").checked || doubt.is_confident);
  const n = everything.filter((doubt) => !doubt.is_confident).length;
  $("more").hidden = n === 0;
  $("more-text").textContent = `Also show ${n === 1 ? "1 image that is" : `${n} images that are`} less likely mislabeled`;
  $("none").hidden = doubts.length > 0;
  $("doubt").hidden = doubts.length === 0;
  at = doubts.findIndex((doubt) => doubt.row === now);
  if (at < 0) at = Math.max(0, doubts.findIndex((doubt) => doubt.now_decision === null));
  tell();
  if (doubts.length) show();
}

function tell() {
  const count = (decision) => doubts.filter((doubt) => doubt.now_decision === decision).length;
  const parts = [`${count(null)} of ${doubts.length} undecided`];
  for (const [decision, word] of [["relabel", "relabeled"], ["keep", "kept"], ["remove", "excluded"]]) {
    if (count(decision)) parts.push(`${count(decision)} ${word}`);
  }
  $("tally").textContent = parts.join(" · ");
  $("fit").disabled = !everything.some((doubt) => ["relabel", "remove"].includes(doubt.now_decision));
}

const percent = (share) => (share > 0.999 && share < 1 ? "99.9%" : share < 0.001 && share > 0 ? "0.1%" : `${(100 * share).toFixed(1)}%`);

function show() {
  const doubt = doubts[at];
  const label = classes[doubt.label];
  const suggested = classes[doubt.suggested];
  $("error").hidden = true;
  $("place").textContent = `${at + 1} of ${doubts.length}`;
  $("question").textContent = `Labeled ${label}. Is it ${suggested}?`;
  $("why").textContent =
    `Models not trained on this image predict ${suggested} (${percent(doubt.suggested_probability)}; ` +
    `${label}: ${percent(doubt.label_probability)})${doubt.is_confident ? "" : ". Less likely to be wrong"}.`;
  $("path").textContent = doubt.path;
  $("part").textContent = doubt.part;
  $("gone").hidden = true;
  $("picture").hidden = false;
  $("picture").alt = `image labeled ${label}`;
  $("picture").src = `/image/${doubt.row}`;
  $("keep").querySelector(".name").textContent = label;
  $("change").querySelector(".name").textContent = suggested;
  const chosen = doubt.now_decision;
  $("keep").classList.toggle("chosen", chosen === "keep");
  $("change").classList.toggle("chosen", chosen === "relabel" && doubt.now_label === doubt.suggested);
  $("remove").classList.toggle("chosen", chosen === "remove");
  $("classes").parentElement.classList.toggle("chosen", chosen === "relabel" && doubt.now_label !== doubt.suggested);
  $("classes").value = String(doubt.now_label ?? doubt.label);
  $("stands").hidden = chosen === null;
  $("stands").textContent = { keep: `Kept as ${label}.`, remove: "Excluded.", relabel: `Changed to ${classes[doubt.now_label] ?? "another class"}.` }[chosen] ?? "";
  $("undo").disabled = chosen === null && !decided.length;
  const tiles = doubt.neighbors.map((near) => {
    const tile = document.createElement("li");
    const press = document.createElement("button");
    press.type = "button";
    const image = new Image();
    image.loading = "lazy";
    image.alt = `similar image labeled ${classes[near.label]}`;
    image.src = `/image/${near.row}`;
    press.append(image);
    press.addEventListener("click", () => enlarge(near.row, image.alt, near.path));
    const text = document.createElement("p");
    text.textContent = classes[near.label];
    text.className = near.label === doubt.label ? "same" : "other";
    text.title = near.path;
    tile.append(press, text);
    return tile;
  });
  $("neighbors").replaceChildren(...tiles);
  const following = doubts[at + 1];
  if (following) new Image().src = `/image/${following.row}`; // so that it is there at once
}

const zoom = $("zoom");
function enlarge(row, alt, path) {
  zoom.querySelector("img").src = `/image/${row}`;
  zoom.querySelector("img").alt = alt;
  zoom.querySelector("p").textContent = path;
  zoom.showModal();
}
document.querySelector(".picture").addEventListener("click", () => enlarge(doubts[at].row, $("picture").alt, doubts[at].path));
zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });

$("picture").addEventListener("error", async () => {
  const row = doubts[at].row;
  $("picture").hidden = true;
  $("gone").hidden = false;
  $("gone").textContent = "The image cannot be shown.";
  try {
    const answer = await fetch(`/image/${row}`);
    if (!answer.ok && row === doubts[at].row) $("gone").textContent = `The image cannot be shown: ${(await answer.json()).error}.`;
  } catch { /* the sentence above stays */ }
});

async function post(address, value) {
  return fetch(address, { method: "POST", body: JSON.stringify(value), headers: { "X-Topwork-Token": TOKEN, "Content-Type": "application/json" } });
}

async function decide(decision, label = null) {
  if (isSaving || !doubts.length) return;
  isSaving = true;
  const doubt = doubts[at];
  let response, answer;
  try {
    response = await post("/decide", { row: doubt.row, decision, label, version: doubt.now_version });
    answer = await response.json();
  } catch {
    fail("Not saved: the server cannot be reached.");
    return;
  } finally {
    isSaving = false;
  }
  if (response.ok || response.status === 409) {
    doubt.now_decision = answer.decision;
    doubt.now_label = answer.label;
    doubt.now_version = answer.version;
  }
  if (response.ok) {
    tell();
    decided = decided.filter((row) => row !== doubt.row);
    if (decision === "undo") return show();
    decided.push(doubt.row);
    walk(1);
  } else {
    show();
    fail(`Not saved: ${answer.error}.`);
  }
}

// Undoes what was decided about this image, or else the last decision.
function undo() {
  if ($("undo").disabled || isSaving) return;
  if (doubts[at].now_decision === null) {
    const last = doubts.findIndex((doubt) => doubt.row === decided.at(-1));
    if (last < 0) return;
    at = last;
    show();
  }
  decide("undo");
}

function walk(step) {
  const only = $("open-only").checked;
  let to = at + step;
  while (only && doubts[to] && doubts[to].now_decision !== null) to += step;
  if (doubts[to]) at = to;
  show();
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = false;
}

function choose(label) {
  const doubt = doubts[at];
  if (label === doubt.label) decide("keep");
  else decide("relabel", label);
}

$("keep").addEventListener("click", () => decide("keep"));
$("change").addEventListener("click", () => decide("relabel", doubts[at].suggested));
$("remove").addEventListener("click", () => decide("remove"));
$("undo").addEventListener("click", undo);
$("all").addEventListener("change", pick);
$("next").addEventListener("click", () => walk(1));
$("back").addEventListener("click", () => walk(-1));
$("classes").addEventListener("change", () => { const label = Number($("classes").value); $("classes").blur(); choose(label); });

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !doubts.length || zoom.open) return;
  if (event.target instanceof HTMLSelectElement || event.target instanceof HTMLInputElement) return;
  const action = {
    k: () => decide("keep"),
    s: () => decide("relabel", doubts[at].suggested),
    x: () => decide("remove"),
    u: undo,
    c: () => $("classes").focus(),
    arrowright: () => walk(1),
    arrowleft: () => walk(-1),
  }[event.key.toLowerCase()];
  if (action) {
    event.preventDefault();
    action();
  }
});

// ---- retraining with corrected labels

$("fit").addEventListener("click", async () => {
  try {
    await post("/fit", {});
  } catch {
    return fail("The server cannot be reached.");
  }
  watch();
});

async function watch() {
  $("fit").disabled = true;
  $("outcome").hidden = false;
  $("outcome").className = "";
  let found;
  do {
    try {
      found = await (await fetch("/fit")).json();
    } catch {
      found = { state: "failed", error: "the server cannot be reached" };
    }
    if (found.state === "running") {
      const done = found.n_all ? `: ${found.n_done.toLocaleString()} of ${found.n_all.toLocaleString()}` : "";
      $("outcome").textContent = `Retraining: ${found.step}${done}…`;
      await new Promise((resolve) => setTimeout(resolve, 400));
    }
  } while (found.state === "running");
  $("fit").disabled = false;
  $("outcome").classList.toggle("failed", found.state === "failed");
  $("outcome").textContent = found.state === "done" ? `${found.sentence} New run: ${found.run}` : `Retraining failed: ${found.error}`;
  $("report").hidden = found.state !== "done";
}

load();
