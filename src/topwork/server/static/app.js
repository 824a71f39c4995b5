// The prediction page: one image goes to the server, the answer is shown. Names and errors are always set as text.
"use strict";

const $ = (id) => document.getElementById(id);
const MEANING = {
  label: "Clear: no other class is likely.",
  ambiguous: "Not clear: another class cannot be ruled out.",
  unknown: "Nothing like this was in the training images; the classes below are the nearest.",
};
const SEVERAL = {
  label: "Each label is given where it is likely enough on its own.",
  ambiguous: "No label is likely enough.",
  unknown: MEANING.unknown,
};
const BADGE = { label: "Label", ambiguous: "Ambiguous", unknown: "Unknown" };
let models = [];
let latest = 0; // answers that come after a newer question are dropped
let pictures = { plain: "", evidence: "" };

async function loadModels() {
  try {
    const answer = await fetch("/models");
    models = (await answer.json()).models;
  } catch {
    fail("The server cannot be reached.");
    return;
  }
  for (const model of models) $("model").append(new Option(model.name, model.name));
  $("choice").hidden = models.length < 2;
  describe();
}

function describe() {
  const model = models.find((m) => m.name === $("model").value) ?? models[0];
  const shown = model.classes.slice(0, 8).join(", ");
  const more = model.classes.length > 8 ? ` and ${model.classes.length - 8} more` : "";
  $("about").textContent = `The model knows ${model.classes.length} classes: ${shown}${more}.`;
}

async function ask(file) {
  const number = ++latest;
  $("error").hidden = true;
  $("answer").hidden = true;
  $("status").textContent = "Looking…";
  $("status").className = "";
  const address = `/predict/${encodeURIComponent($("model").value)}?explain=true`;
  let response, answer;
  try {
    response = await fetch(address, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
    answer = await response.json();
  } catch {
    answer = null;
  }
  if (number !== latest) return;
  $("status").textContent = "";
  $("status").className = "away"; // what follows is for those who do not see the answer
  if (answer === null) fail("The server cannot be reached, or did not take the file. Is it larger than the server allows?");
  else if (!response.ok) fail(`${file.name || "The image"}: ${answer.error}.`);
  else show(file, answer.predictions[0]);
}

function show(file, prediction) {
  if (pictures.plain) URL.revokeObjectURL(pictures.plain);
  pictures = { plain: URL.createObjectURL(file), evidence: prediction.map ?? "" };
  $("look").hidden = !pictures.evidence;
  showPicture();
  $("picture").alt = `The image, named ${headline(prediction)} by the model`;
  $("name").textContent = file.name;
  $("badge").textContent = BADGE[prediction.outcome];
  $("badge").className = prediction.outcome;
  $("decision").textContent = headline(prediction);
  $("meaning").textContent = (hasSeveral() ? SEVERAL : MEANING)[prediction.outcome];
  $("top").replaceChildren(...prediction.top.map(bar));
  $("answer").hidden = false;
  const sure = prediction.outcome === "label" ? `, ${percent(prediction.probability)}` : "";
  $("status").textContent = `${BADGE[prediction.outcome]}: ${headline(prediction)}${sure}.`;
  $("answer").scrollIntoView({ block: "nearest" });
}

function hasSeveral() {
  return models.some((model) => model.name === $("model").value && model.multi_label);
}

function headline(prediction) {
  if (prediction.outcome === "unknown") return "None of the classes it knows";
  if (hasSeveral()) return prediction.label.split("|").join(", ") || "None of the labels";
  if (prediction.outcome === "ambiguous" && prediction.top.length > 1) return `${prediction.top[0][0]} or ${prediction.top[1][0]}`;
  return prediction.label;
}

function showPicture() {
  $("picture").src = $("evidence").checked && pictures.evidence ? pictures.evidence : pictures.plain;
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
    if (event.target.files.length) ask(event.target.files[0]);
    event.target.value = ""; // the same file again is a new question
  });
}
$("model").addEventListener("change", describe);
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
  if (event.dataTransfer.files.length) ask(event.dataTransfer.files[0]);
  else fail("Drop an image file; links and text from other pages are not opened.");
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
  if (file) ask(file);
});
loadModels();
