// The start page: images, scan, training, models, trying one. Names and errors are always set as text.
"use strict";

const $ = (id) => document.getElementById(id);
const TOKEN = document.querySelector('meta[name="topwork-token"]').content;
const IMAGE = /\.(jpe?g|png|webp|gif|bmp|tiff?|heic)$/i;
const BADGE = { label: "Label", ambiguous: "Ambiguous", unknown: "Unknown", error: "Error" };
const FORMATS = { onnx: "ONNX", openvino: "OpenVINO", pt2: ".pt2" };
const TITLE = { scan: "Scanning", training: "Training", export: "Exporting" };
let scanned = null; // what was scanned: {images} or {path}
let trying = null; // the run that is tried
let camera = null;

async function ask(address, body, headers = {}) {
  let response;
  try {
    const options = body === undefined ? {} : { method: "POST", body, headers: { "X-Topwork-Token": TOKEN, ...headers } };
    response = await fetch(address, options);
  } catch {
    throw new Error("The app cannot be reached. Is topwork app still running?");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}
const send = (address, value) => ask(address, JSON.stringify(value));

function fail(error) {
  $("error").textContent = error.message ?? error;
  $("error").hidden = false;
  $("error").scrollIntoView({ block: "nearest" });
}
const guarded = (work) => async (...given) => {
  $("error").hidden = true;
  try {
    await work(...given);
  } catch (error) {
    fail(error);
  }
};

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  Object.assign(made, attributes);
  return made;
}
function button(text, work) {
  const made = element("button", text, { className: "button", type: "button" });
  made.addEventListener("click", guarded(work));
  return made;
}
const percent = (share) => (share > 0.9995 && share < 1 ? "99.9%" : share < 0.0005 && share > 0 ? "0.1%" : `${(100 * share).toFixed(1)}%`);
const counted = (n, noun) => `${n.toLocaleString()} ${noun}${n === 1 ? "" : "s"}`;

function bars(list, pairs, shown) {
  const highest = Math.max(...pairs.map(([, value]) => value), 1e-9);
  list.replaceChildren(
    ...pairs.map(([name, value]) => {
      const item = element("li");
      const track = element("span", "", { className: "bar", ariaHidden: "true" });
      const fill = element("i");
      fill.style.width = `${(100 * value) / highest}%`;
      track.append(fill);
      item.append(element("span", name), element("span", shown(value)), track);
      return item;
    }),
  );
}

// ---- 1. images

async function entriesOf(entry, way = []) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ file, way }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100 at a time
    if (!some.length) return found;
    for (const child of some) found.push(...(await entriesOf(child, [...way, entry.name])));
  }
}

async function keep(files) {
  const images = files.filter(({ file, way }) => IMAGE.test(file.name) && way.length);
  if (!images.length) throw new Error("No folders with images. Drop one folder per class, or a folder that contains them.");
  const isNested = images.some(({ way }) => way.length > 1);
  const name = isNested && new Set(images.map(({ way }) => way[0])).size === 1 ? images[0].way[0] : "dropped";
  let done = 0;
  const waiting = [...images];
  working("Reading images", 0, images.length);
  const worker = async () => {
    for (let next = waiting.pop(); next; next = waiting.pop()) {
      const query = new URLSearchParams({ images: name, label: next.way.at(-1), file: next.file.name });
      await ask(`/keep?${query}`, next.file, { "Content-Type": "application/octet-stream" });
      working("Reading images", ++done, images.length);
    }
  };
  try {
    await Promise.all(Array.from({ length: 4 }, worker));
  } finally {
    $("working").hidden = true;
  }
  await refresh();
  await scan({ images: name });
}

function showImages(folders) {
  $("images").replaceChildren(
    ...folders.map(({ name, classes }) => {
      const item = element("li");
      const words = Object.entries(classes).map(([label, n]) => `${label} ${n}`);
      item.append(element("b", name), element("span", words.join(" · "), { className: "muted" }));
      const line = element("p", undefined, { className: "line" });
      const removed = async () => {
        if (!confirm(`Delete the copies in images/${name}?`)) return;
        await send("/forget", { images: name });
        await refresh();
      };
      line.append(button("Scan", () => scan({ images: name })), button("Delete", removed));
      item.append(line);
      return item;
    }),
  );
}

// ---- 2. scan and training

async function scan(what) {
  scanned = what;
  $("scanned").hidden = true;
  await send("/scan", what);
  await follow();
}

function showScan({ scan: found, path }) {
  const classes = Object.entries(found.classes);
  const more = found.n_rejected ? `, ${counted(found.n_rejected, "file")} rejected` : "";
  $("scan-summary").textContent = `${path}: ${counted(found.n_used, "image")} in ${counted(classes.length, "class").replace("classs", "classes")}${more}.`;
  bars($("scan-classes"), classes.slice(0, 50), (n) => n.toLocaleString());
  $("scan-findings").replaceChildren(...[...found.notes, ...found.findings].map((text) => element("li", text)));
  $("scan-rejects").hidden = !found.rejects.length;
  $("scan-rejects").querySelector("summary").textContent = "Rejected files";
  $("scan-rejects").querySelector("ul").replaceChildren(...found.rejects.map((r) => element("li", `${r.path}: ${r.reason}`)));
  $("scanned").hidden = false;
  $("scanned").scrollIntoView({ block: "start" });
}

// ---- the job

function working(title, nDone, nAll, step = "") {
  $("working").hidden = false;
  $("title-working").textContent = title;
  if (nAll) {
    $("bar").max = nAll;
    $("bar").value = nDone;
  } else {
    $("bar").removeAttribute("value");
  }
  $("step").textContent = nAll ? `${step ? `${step}: ` : ""}${nDone.toLocaleString()} of ${nAll.toLocaleString()}` : step;
}

async function follow() {
  $("train").disabled = true;
  try {
    for (;;) {
      const job = await ask("/job");
      if (job.state !== "running") return await finish(job);
      working(TITLE[job.kind], job.n_done ?? 0, job.n_all ?? 0, job.step);
      const epoch = job.epoch ? [`epoch ${job.epoch.epoch}: training loss ${job.epoch.train_loss?.toFixed(3)}`] : [];
      $("notes").replaceChildren(...[...job.notes, ...epoch].map((text) => element("li", text)));
      await new Promise((resolve) => setTimeout(resolve, 250));
    }
  } finally {
    $("train").disabled = false;
    $("working").hidden = true;
  }
}

async function finish(job) {
  await refresh();
  if (job.state === "failed") throw new Error(job.error);
  if (job.kind === "scan") showScan(job);
  if (job.kind === "training") {
    tryRun(job.run);
    $("models").scrollIntoView({ block: "start" });
  }
  if (job.kind === "export") {
    $("exported").textContent = `Wrote ${job.export} and ${job.script}; ${job.checked}.`;
    $("exported").hidden = false;
  }
}

// ---- 3. models

function showRuns(runs, targets) {
  $("models").hidden = !runs.length;
  $("runs").replaceChildren(
    ...runs.map((run) => {
      const item = element("li", undefined, { id: `run-${run.name}` });
      item.append(element("b", run.name));
      const line = element("p", undefined, { className: "line" });
      if (!run.is_finished) {
        item.append(element("span", "Interrupted. Progress is saved.", { className: "muted" }));
        line.append(button("Continue", async () => (await send("/resume", { run: run.name }), await follow())));
      } else {
        const { value, low, high } = run.accuracy ?? {};
        const interval = low == null ? "" : ` (95% CI ${percent(low).slice(0, -1)}–${percent(high).slice(0, -1)})`;
        const words = value == null ? "not measured" : `accuracy ${percent(value)}${interval} on ${counted(run.n, `${run.part} image`)}`;
        item.append(element("span", words, { className: "muted" }));
        line.append(
          element("a", "Report", { className: "button", href: `/report/${encodeURIComponent(run.name)}`, target: "_blank", rel: "noopener" }),
          button("Try it", () => tryRun(run.name)),
          button("Review labels", () => review(run.name)),
          ...Object.keys(targets).map((to) => button(`Export ${FORMATS[to] ?? to}`, async () => (await send("/export", { run: run.name, to }), await follow()))),
        );
      }
      item.append(line);
      return item;
    }),
  );
}

async function review(run) {
  const page = window.open("", "_blank"); // asked for by the click, so that it is not blocked
  const { url } = await send("/review", { run });
  if (page) page.location = url;
  else location.href = url;
}

async function refresh() {
  const state = await ask("/state");
  $("folder").textContent = state.folder;
  showImages(state.images);
  showRuns(state.runs, state.targets);
  return state;
}

// ---- 4. trying a model

function tryRun(run) {
  trying = run;
  $("title-try").textContent = `4. Try ${run}`;
  $("try").hidden = false;
}

async function predict(blob, isLive = false) {
  const answer = await ask(`/predict?${new URLSearchParams({ run: trying })}`, blob, { "Content-Type": "application/octet-stream" });
  if (isLive && !camera) return;
  $("badge").hidden = false;
  $("badge").textContent = BADGE[answer.outcome];
  $("badge").className = answer.outcome;
  if (answer.outcome === "error") {
    $("decision").textContent = answer.error;
    $("top").replaceChildren();
    return;
  }
  $("decision").textContent = answer.outcome === "unknown" ? "None of the known classes" : answer.label;
  $("top").className = "bars";
  bars($("top"), answer.top, percent);
  if (!isLive) {
    $("picture").src = answer.map;
    $("picture").alt = `The image with a heatmap; predicted as ${answer.label}`;
    $("picture").hidden = false;
  }
}

async function start() {
  camera = await navigator.mediaDevices.getUserMedia({ video: true }).catch(() => {
    throw new Error("The webcam is not available. Allow it in the browser, or choose an image.");
  });
  $("video").srcObject = camera;
  await $("video").play();
  toggle(true);
  const canvas = document.createElement("canvas");
  while (camera) {
    canvas.width = $("video").videoWidth;
    canvas.height = $("video").videoHeight;
    canvas.getContext("2d").drawImage($("video"), 0, 0);
    const frame = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
    if (frame) await predict(frame, true);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

function stop() {
  for (const track of camera?.getTracks() ?? []) track.stop();
  camera = null;
  toggle(false);
}
function toggle(isOn) {
  $("video").hidden = $("stop").hidden = !isOn;
  $("webcam").hidden = isOn;
  if (isOn) $("picture").hidden = true;
}

// ---- what the user does

$("folders").addEventListener("change", guarded(async (event) => {
  const files = [...event.target.files].map((file) => ({ file, way: file.webkitRelativePath.split("/").slice(0, -1) }));
  event.target.value = "";
  await keep(files);
}));
$("by-path").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(scan)({ path: $("path").value });
});
$("train").addEventListener("click", guarded(async () => {
  await send("/train", { ...scanned, mode: $("mode").value });
  await follow();
}));
$("file").addEventListener("change", guarded(async (event) => {
  const file = event.target.files[0];
  event.target.value = "";
  stop();
  if (file) await predict(file);
}));
$("webcam").addEventListener("click", guarded(async () => {
  try {
    await start();
  } finally {
    stop();
  }
}));
$("stop").addEventListener("click", stop);
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
document.addEventListener("drop", guarded(async (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const lone = entries.length === 1 && entries[0].isFile && trying;
  if (lone) return await predict(event.dataTransfer.files[0]);
  const found = [];
  for (const entry of entries) found.push(...(await entriesOf(entry)));
  await keep(found);
}));
guarded(async () => {
  const state = await refresh();
  if (state.job.state === "running") await follow();
})();
