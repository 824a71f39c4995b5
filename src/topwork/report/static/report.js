// What the report's script adds: theme, sorting, filters, the images of a matrix cell. Every number is there without it.
// Names come from people's files: they are only ever set as text.
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const percent = (value) => (100 * value).toFixed(value > 0.9995 && value < 1 ? 2 : 1) + "\u202f%";

  // theme: as the system, light, dark; remembered where the browser lets a file remember
  const themes = { auto: "Auto", light: "Light", dark: "Dark" };
  const button = document.getElementById("theme");
  const setTheme = (name) => {
    if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
    button.querySelector("span").textContent = themes[name];
    button.setAttribute("aria-label", "Color theme: " + (name === "auto" ? "as the system" : name));
  };
  let theme = "auto";
  try { theme = localStorage.getItem("topwork-theme") || "auto"; } catch { /* not allowed here */ }
  setTheme(theme in themes ? theme : "auto");
  button.addEventListener("click", () => {
    const names = Object.keys(themes);
    const now = root.dataset.theme || "auto";
    const next = names[(names.indexOf(now) + 1) % names.length];
    setTheme(next);
    try { localStorage.setItem("topwork-theme", next); } catch { /* not allowed here */ }
  });

  // the section one is in
  const links = new Map(all(".rail a").map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of all("main > section")) seen.observe(section);

  // tables that sort
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  };
  const sortBy = (table, header, kind) => {
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const column = header.cellIndex;
    const number = (text) => (text === "" || text === "–" ? NaN : Number(text.replaceAll(",", "")));
    const rows = [...body.rows].map((row) => ({ row, key: valueOf(row, column) }));
    rows.sort((a, b) => {
      if (kind === "text") return (ascending ? 1 : -1) * a.key.localeCompare(b.key, undefined, { numeric: true });
      const [x, y] = [number(a.key), number(b.key)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // not measured: always last
      return ascending ? x - y : y - x;
    });
    body.append(...rows.map((entry) => entry.row));
    for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  };
  for (const header of all("table.sortable th[data-sort]")) {
    const press = make("button", "", header.textContent);
    press.type = "button";
    header.replaceChildren(press);
    press.addEventListener("click", () => sortBy(header.closest("table"), header, header.dataset.sort));
  }

  // filters
  const tally = (name, shown, n) => {
    const place = document.querySelector(`[data-count="${name}"]`);
    if (place) place.textContent = shown === n ? "" : `${shown.toLocaleString("en")} of ${n.toLocaleString("en")}`;
  };
  for (const input of all("[data-filter]")) {
    const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        shown += !row.hidden;
      }
      tally(input.dataset.filter, shown, rows.length);
    });
  }
  const cards = all("#mistake-cards .card").map((card) => ({
    card, labels: card.dataset.labels.trim().split(" "), part: card.dataset.part, text: card.textContent.toLowerCase(),
  }));
  const wants = Object.fromEntries(all("[data-mistakes]").map((input) => [input.dataset.mistakes, input]));
  const filterMistakes = () => {
    const label = wants.class.value, part = wants.part?.value ?? "", text = wants.text.value.trim().toLowerCase();
    let shown = 0;
    for (const one of cards) {
      const fits = (!label || one.labels.includes(label)) && (!part || one.part === part) && one.text.includes(text);
      one.card.hidden = !fits;
      shown += fits;
    }
    const rest = document.querySelector("#mistake-cards details");
    if (rest && shown < cards.length) rest.open = true;
    tally("mistakes", shown, cards.length);
  };
  for (const input of Object.values(wants)) input.addEventListener("input", filterMistakes);

  // confusion matrix: a grid one walks with the arrow keys; a cell shows its images
  const pictureOf = (row, source) => {
    const there = document.getElementById("picture-" + row);
    const url = source || (there && there.tagName === "IMG" ? there.src : null);
    if (!url) return make("span", "gone", there ? there.textContent : "no picture");
    const image = make("img");
    image.src = url;
    image.alt = "";
    return image;
  };
  const cellCard = (row) => {
    const [file, confidence, source] = data.images[row];
    const card = make("figure", "card");
    const tile = make("span", "tile");
    tile.append(pictureOf(row, source));
    const caption = make("figcaption");
    const name = make("p", "file", file);
    name.title = file;
    caption.append(make("p", "prob", percent(confidence)), name);
    card.append(tile, caption);
    return card;
  };
  const choose = (box, cell) => {
    for (const other of all('td[aria-selected="true"]', box)) other.setAttribute("aria-selected", "false");
    cell.setAttribute("aria-selected", "true");
    const [trueLabel, predicted] = cell.dataset.cell.split(",").map(Number);
    const n = Number(cell.dataset.n);
    const rows = data.parts[box.dataset.part][cell.dataset.cell] || [];
    const isRight = trueLabel === predicted;
    const title = box.querySelector(".cell-title");
    const name = (label) => make("b", "", data.classes[label]);
    const images = n === 1 ? "1 image" : `${n.toLocaleString("en")} images`;
    title.replaceChildren(...(isRight
      ? [name(trueLabel), ` answered right: ${images} (${cell.dataset.share} of the class)`]
      : [name(trueLabel), " taken for ", name(predicted), `: ${images} (${cell.dataset.share} of the class)`]));
    if (n > rows.length) title.append(rows.length ? `; ${rows.length} shown, the surest first` : "; no pictures in this page");
    title.append(".");
    box.querySelector(".cards").replaceChildren(...rows.map((row) => cellCard(row)));
  };
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  for (const box of all(".confusion")) {
    const table = box.querySelector("table");
    const lines = [...table.tBodies[0].rows].map((row) => all("td[data-cell]", row));
    const cells = lines.flat();
    table.setAttribute("role", "grid");
    for (const row of table.rows) row.setAttribute("role", "row");
    for (const header of all("th", table)) header.setAttribute("role", header.scope === "row" ? "rowheader" : "columnheader");
    const focusOn = (cell) => {
      for (const other of cells) other.tabIndex = -1;
      cell.tabIndex = 0;
    };
    const names = [...table.tHead.rows[0].cells].slice(1).map((header) => header.title);
    lines.forEach((line, i) => line.forEach((cell, j) => {
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("aria-selected", "false");
      cell.tabIndex = -1;
      const meaning = i === j ? `${names[i]} answered right` : `${names[i]} taken for ${names[j]}`;
      cell.title = `${meaning}: ${cell.dataset.n} (${cell.dataset.share})`;
      cell.setAttribute("aria-label", cell.title);
    }));
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("td[data-cell]");
      if (cell) { focusOn(cell); choose(box, cell); }
    });
    table.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td[data-cell]");
      if (!cell) return;
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(box, cell); return; }
      const i = lines.findIndex((line) => line.includes(cell)), j = lines[i].indexOf(cell);
      let to = null;
      if (event.key in steps) to = lines[i + steps[event.key][0]]?.[j + steps[event.key][1]];
      if (event.key === "Home") to = lines[i][0];
      if (event.key === "End") to = lines[i].at(-1);
      if (!to) return;
      event.preventDefault();
      focusOn(to);
      to.focus();
      to.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
    const wrong = cells.filter((cell) => { const [t, p] = cell.dataset.cell.split(","); return t !== p && cell.dataset.n !== "0"; });
    const first = wrong.sort((a, b) => b.dataset.n - a.dataset.n)[0] || cells[0];
    focusOn(first);
    choose(box, first);
    for (const row of all("tr[data-pair]", box.closest(".part"))) {
      const cell = cells.find((one) => one.dataset.cell === row.dataset.pair);
      if (!cell) continue;
      const press = make("button", "", row.cells[0].textContent);
      press.type = "button";
      press.title = "Show these images";
      row.cells[0].replaceChildren(press);
      press.addEventListener("click", () => { focusOn(cell); choose(box, cell); cell.focus({ preventScroll: true }); box.scrollIntoView({ block: "start" }); });
    }
  }

  // copy
  for (const press of all("[data-copy]")) {
    press.addEventListener("click", async () => {
      const text = press.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(text.textContent);
        press.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(text);
        press.textContent = "Selected";
      }
      setTimeout(() => { press.textContent = "Copy"; }, 1500);
    });
  }
})();
