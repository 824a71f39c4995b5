// What the script of a page adds: theme, enlarged images, tooltips, sorting, filters, the images of a matrix cell, copying.
// Every number is there without it. Names come from people's files: they are only ever set as text.
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
  const percent = (value) => (value >= 0.9995 && value < 1 ? "99.9" : value > 0 && value < 0.0005 ? "0.1" : (100 * value).toFixed(1)) + "%";

  // theme: as the system, light, dark; remembered if the browser lets a file remember
  const themes = { auto: "Auto", light: "Light", dark: "Dark" };
  const button = document.getElementById("theme");
  const setTheme = (name) => {
    if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
    button.querySelector("span").textContent = themes[name];
    button.setAttribute("aria-label", "Color theme: " + (name === "auto" ? "system" : name));
  };
  let theme = "auto";
  try { theme = localStorage.getItem("topwork-theme") || "auto"; } catch { /* not allowed here */ }
  setTheme(theme in themes ? theme : "auto");
  button.addEventListener("click", () => {
    const names = Object.keys(themes);
    const next = names[(names.indexOf(root.dataset.theme || "auto") + 1) % names.length];
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

  // images that enlarge, and the arrow keys from one to the next
  const zoom = document.getElementById("zoom");
  let shown = null;
  const enlarge = (image) => {
    shown = image;
    const card = image.closest(".card, figure");
    zoom.querySelector("img").src = image.src;
    zoom.querySelector("img").alt = image.alt;
    zoom.querySelector("p").textContent = [image.alt, card?.querySelector(".file")?.title].filter(Boolean).join(" · ");
    if (!zoom.open) zoom.showModal();
  };
  document.addEventListener("click", (event) => {
    const image = event.target.closest?.(".tile img");
    if (image) enlarge(image);
    else if (event.target === zoom) zoom.close();
  });
  document.addEventListener("keydown", (event) => {
    const image = event.target.closest?.(".tile img");
    if (image && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); enlarge(image); }
    if (zoom.open && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
      const images = all(".tile img").filter((one) => one.checkVisibility());
      const next = images[images.indexOf(shown) + (event.key === "ArrowRight" ? 1 : -1)];
      if (next) enlarge(next);
    }
  });
  const pressable = (image) => { image.tabIndex = 0; image.setAttribute("role", "button"); return image; };
  for (const image of all(".tile img")) pressable(image);

  // tooltips: the titles of points, shown at once at the nearest point
  const tip = make("div", "tip");
  tip.hidden = true;
  document.body.append(tip);
  for (const chart of all("svg.chart")) {
    const points = all("title", chart).map((title) => {
      const mark = title.parentElement;
      mark.dataset.tip = title.textContent;
      title.remove();
      return mark;
    });
    if (!points.length) continue;
    chart.addEventListener("pointermove", (event) => {
      let best = null, least = 28;
      for (const point of points) {
        const box = point.getBoundingClientRect();
        const far = Math.hypot(Math.max(box.left - event.clientX, 0, event.clientX - box.right), Math.max(box.top - event.clientY, 0, event.clientY - box.bottom));
        if (far < least) [best, least] = [point, far];
      }
      tip.hidden = !best;
      if (!best) return;
      tip.textContent = best.dataset.tip;
      const box = best.getBoundingClientRect();
      const half = tip.offsetWidth / 2;
      const x = Math.min(Math.max(box.left + box.width / 2, half + 8), innerWidth - half - 8);
      tip.style.left = `${x + scrollX - half}px`;
      tip.style.top = `${box.top + scrollY - tip.offsetHeight - 8}px`;
    });
    chart.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  // tables that sort
  const valueOf = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const sortBy = (table, header) => {
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const number = (text) => (text === "" || text === "–" ? NaN : Number(text.replaceAll(",", "")));
    const rows = [...body.rows].map((row) => ({ row, key: valueOf(row, header.cellIndex) }));
    rows.sort((a, b) => {
      if (header.dataset.sort === "text") return (ascending ? 1 : -1) * a.key.localeCompare(b.key, undefined, { numeric: true });
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
    press.addEventListener("click", () => sortBy(header.closest("table"), header));
  }

  // filters
  const tally = (place, n, of) => { place.textContent = n === of ? "" : `${n.toLocaleString("en")} of ${of.toLocaleString("en")}`; };
  for (const input of all("[data-filter]")) {
    const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      tally(input.closest(".filters").querySelector("[role=status]"), rows.filter((row) => !row.hidden).length, rows.length);
    });
  }
  for (const bar of all("[data-filters]")) {
    const box = document.getElementById(bar.dataset.filters);
    const cards = all(".card", box).map((card) => ({ card, text: card.textContent.toLowerCase() }));
    const inputs = all("[data-key]", bar);
    bar.addEventListener("input", () => {
      const fits = ({ card, text }) => inputs.every((input) => {
        const wanted = input.value.trim();
        return !wanted || (input.dataset.key ? card.dataset[input.dataset.key] === wanted : text.includes(wanted.toLowerCase()));
      });
      for (const one of cards) one.card.hidden = !fits(one);
      const n = cards.filter((one) => !one.card.hidden).length;
      const rest = box.querySelector("details");
      if (rest && n < cards.length) rest.open = true;
      tally(bar.querySelector("[role=status]"), n, cards.length);
    });
  }

  // confusion matrix: a grid one walks with the arrow keys; a cell shows its images
  const data = JSON.parse(document.getElementById("page-data")?.textContent ?? "null");
  const cellCard = (row) => {
    const [file, confidence, source] = data.images[row];
    const there = document.querySelector(`[data-row="${row}"]`);
    const url = source ?? (there instanceof HTMLImageElement ? there.src : null);
    const card = make("figure", "card");
    const tile = make("span", "tile");
    if (url) {
      const image = make("img");
      image.src = url;
      image.alt = file;
      tile.append(pressable(image));
    } else tile.append(make("span", "gone", there ? there.textContent : "no picture"));
    const caption = make("figcaption");
    const name = make("p", "file", file);
    name.title = file;
    caption.append(make("p", "line", percent(confidence)), name);
    card.append(tile, caption);
    return card;
  };
  const choose = (box, cell) => {
    for (const other of all('td[aria-selected="true"]', box)) other.setAttribute("aria-selected", "false");
    cell.setAttribute("aria-selected", "true");
    const [label, predicted] = cell.dataset.cell.split(",").map(Number);
    const n = Number(cell.dataset.n);
    const rows = data.parts[box.dataset.part][cell.dataset.cell] || [];
    const title = box.querySelector(".cell-title");
    const name = (number) => make("b", "", data.classes[number]);
    title.replaceChildren(name(label), " predicted as ", name(predicted), `: ${n === 1 ? "1 image" : `${n.toLocaleString("en")} images`} (${cell.dataset.share} of the class)`);
    if (n > rows.length) title.append(rows.length ? `; ${rows.length} shown, most confident first` : "; no images in this page");
    box.querySelector(".cards").replaceChildren(...rows.map((row) => cellCard(row)));
  };
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  for (const box of all(".confusion")) {
    const table = box.querySelector("table");
    const lines = [...table.tBodies[0].rows].map((row) => all("td[data-cell]", row));
    const cells = lines.flat();
    table.setAttribute("role", "grid");
    for (const group of [table.tHead, ...table.tBodies]) group.setAttribute("role", "rowgroup");
    for (const row of table.rows) row.setAttribute("role", "row");
    table.querySelector(".corner").setAttribute("role", "gridcell");
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
      cell.title = `${names[i]} predicted as ${names[j]}: ${cell.dataset.n} (${cell.dataset.share})`;
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
    for (const row of all("tr[data-key]", box.parentElement)) {
      const cell = cells.find((one) => one.dataset.cell === row.dataset.key);
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
