// The prediction page: images go to the server, the answers are shown. Names and errors are always set as text.
"use strict";

const $ = (id) => document.getElementById(id);
const MEANING = {
  label: "No other class is likely.",
  ambiguous: "The model can't narrow it down to one class.",
  unknown: "This image is unlike the training images; these are the closest classes.",
};
const SEVERAL = {
  label: "Labels whose probability is above their threshold.",
  ambiguous: "No label is above its threshold.",
  unknown: MEANING.unknown,
};
const BADGE = { label: "Label", ambiguous: "Ambiguous", unknown: "Unknown" };
let models = [];
let token = sessionStorage.getItem("topwork-token") ?? "";
let latest = 0; // answers that come after a newer question are dropped
let answers = []; // of one question: {file, url, prediction} or {file, url, error}
let shown = null;

const headers = (more = {}) => (token ? { Authorization: `Bearer ${token}`, ...more } : more);

async function loadModels() {
  let response;
  try {
    response = await fetch("/models", { headers: headers() });
  } catch {
    fail("The server cannot be reached.");
    return;
  }
  $("token-form").hidden = response.status !== 401;
  if (response.status === 401) {
    if (token) fail("Wrong token.");
    return;
  }
  models = (await response.json()).models;
  $("model").replaceChildren(...models.map((model) => new Option(model.name, model.name)));
  $("choice").hidden = models.length < 2;
  describe();
  loadExamples();
}

function describe() {
  const model = models.find((m) => m.name === $("model").value) ?? models[0];
  const known = model.classes.slice(0, 8).join(", ");
  const more = model.classes.length > 8 ? ` and ${model.classes.length - 8} more` : "";
  $("about").textContent = `The model has ${model.classes.length} classes: ${known}${more}.`;
}

async function loadExamples() {
  const { n } = await (await fetch("/examples", { headers: headers() })).json();
  $("examples").hidden = !n;
  $("examples").replaceChildren();
  for (let number = 0; number < n; number++) {
    const blob = await (await fetch(`/examples/${number}`, { headers: headers() })).blob();
    const button = thumb(URL.createObjectURL(blob), `Example ${number + 1}`, "");
    button.addEventListener("click", () => ask([new File([blob], `example ${number + 1}`, { type: blob.type })]));
    $("examples").append(button);
  }
}

function thumb(url, name, text) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  button.type = "button";
  image.src = url;
  image.alt = name;
  button.append(image);
  if (text) button.append(Object.assign(document.createElement("span"), { textContent: text }));
  return button;
}

async function predictionOf(file, model, explain) {
  const address = `/predict/${encodeURIComponent(model)}?explain=${explain}`;
  let response, answer;
  try {
    const type = { "Content-Type": "application/octet-stream" };
    response = await fetch(address, { method: "POST", body: file, headers: headers(type) });
    answer = await response.json();
  } catch {
    return { error: "The server cannot be reached or rejected the file. Is the file too large?" };
  }
  return response.ok ? { prediction: answer.predictions[0] } : { error: `${file.name || "The image"}: ${answer.error}.` };
}

async function ask(files) {
  const number = ++latest;
  for (const answer of answers) URL.revokeObjectURL(answer.url);
  answers = [];
  $("error").hidden = $("answer").hidden = $("all").hidden = true;
  $("all").replaceChildren();
  $("status").className = "";
  for (const [position, file] of files.entries()) {
    $("status").textContent = files.length > 1 ? `Looking… ${position + 1} of ${files.length}` : "Looking…";
    const found = await predictionOf(file, $("model").value, true);
    if (number !== latest) return;
    answers.push({ file, url: URL.createObjectURL(file), ...found });
    if (files.length > 1) list(answers.at(-1));
  }
  $("status").textContent = "";
  $("status").className = "away"; // what follows is for those who do not see the answer
  show(answers.find((answer) => answer.prediction) ?? answers[0]);
}

function list(answer) {
  const text = answer.prediction ? headline(answer.prediction) : "Error";
  const button = thumb(answer.url, answer.file.name, text);
  button.addEventListener("click", () => show(answer));
  answer.button = button;
  $("all").append(button);
  $("all").hidden = false;
}

function show(answer) {
  shown = answer;
  for (const other of answers) other.button?.setAttribute("aria-pressed", String(other === answer));
  $("error").hidden = true;
  $("answer").hidden = !answer.prediction;
  if (!answer.prediction) return fail(answer.error);
  const { file, prediction } = answer;
  $("look").hidden = !prediction.map;
  showPicture();
  $("picture").alt = `The image, named ${headline(prediction)} by the model`;
  $("name").textContent = file.name;
  $("badge").textContent = BADGE[prediction.outcome];
  $("badge").className = prediction.outcome;
  $("decision").textContent = headline(prediction);
  $("meaning").textContent = (hasSeveral() ? SEVERAL : MEANING)[prediction.outcome];
  $("top").replaceChildren(...prediction.top.map(bar));
  const sure = prediction.outcome === "label" ? `, ${percent(prediction.probability)}` : "";
  $("status").textContent = `${BADGE[prediction.outcome]}: ${headline(prediction)}${sure}.`;
  $("answer").scrollIntoView({ block: "nearest" });
  compare(answer);
}

async function compare(answer) {
  const others = models.filter((model) => model.name !== $("model").value);
  $("others").hidden = !others.length;
  $("others").querySelector("ul").replaceChildren();
  for (const model of others) {
    const { prediction, error } = await predictionOf(answer.file, model.name, false);
    if (shown !== answer) return;
    const item = document.createElement("li");
    const said = prediction ? `${prediction.label || "none"} (${BADGE[prediction.outcome].toLowerCase()}, ${percent(prediction.probability)})` : error;
    item.append(Object.assign(document.createElement("span"), { textContent: model.name }), Object.assign(document.createElement("b"), { textContent: said }));
    $("others").querySelector("ul").append(item);
  }
}

function hasSeveral() {
  return models.some((model) => model.name === $("model").value && model.multi_label);
}

function headline(prediction) {
  if (prediction.outcome === "unknown") return "None of the known classes";
  if (hasSeveral()) return prediction.label.split("|").join(", ") || "None of the labels";
  if (prediction.outcome === "ambiguous" && prediction.top.length > 1) return `${prediction.top[0][0]} or ${prediction.top[1][0]}`;
  return prediction.label;
}

function showPicture() {
  $("picture").src = ($("evidence").checked && shown.prediction.map) || shown.url;
}

function bar([label, probability]) {
  const item = document.createElement("li");
  const name = document.createElement("span");
  const share = document.createElement("span");
  const track = document.createElement("span");
  const fill = document.createElement("i");
  name.textContent = label;
  share.textContent = percent(probability);
  track.className = "bar";
  track.setAttribute("aria-hidden", "true");
  fill.style.width = `${100 * probability}%`;
  track.append(fill);
  item.append(name, share, track);
  return item;
}

function percent(probability) {
  return probability > 0.9995 && probability < 1 ? "99.9%" : probability < 0.0005 && probability > 0 ? "0.1%" : `${(100 * probability).toFixed(1)}%`;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = false;
}

if (navigator.maxTouchPoints || matchMedia("(any-pointer: coarse)").matches) {
  for (const element of document.querySelectorAll('[for="camera"], #camera')) element.hidden = false;
}
for (const id of ["file", "camera"]) {
  $(id).addEventListener("change", (event) => {
    if (event.target.files.length) ask([...event.target.files]);
    event.target.value = ""; // the same file again is a new question
  });
}
$("model").addEventListener("change", () => {
  describe();
  if (answers.length) ask(answers.map((answer) => answer.file));
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  sessionStorage.setItem("topwork-token", token);
  $("error").hidden = true;
  loadModels();
});
$("evidence").addEventListener("change", showPicture);
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // a file dropped beside the field must not replace the page
    $("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (event.dataTransfer.files.length) ask([...event.dataTransfer.files]);
  else fail("Drop an image file; links and text from other pages are not supported.");
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
  if (file) ask([file]);
});
loadModels();
