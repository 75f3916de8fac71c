"use strict";
// On a narrow screen the style sheet stacks the cells of a row, each under its column's name.
for (const table of document.querySelectorAll(".wide > table")) {
  if (!table.tHead) continue;
  const names = [...table.tHead.rows[table.tHead.rows.length - 1].cells].map((head) => head.textContent.trim());
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, at) => { cell.dataset.label = names[at]; });
  table.classList.add("stacked");
}
// Sort any column of a table with class "sortable", missing values last in both directions.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const body = table.tBodies[0];
  const original = [...body.rows];
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.first ?? "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const now = head.getAttribute("aria-sort");
      const next = now === first ? second : now === second ? null : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next) head.setAttribute("aria-sort", next);
      const key = (row) => row.cells[index].dataset.value ?? row.cells[index].textContent.trim();
      const sign = next === "descending" ? -1 : 1;
      const sorted = next === null ? original : [...original].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
      body.append(...sorted);
    });
  });
}
// Search: hide the rows of every table with class "searched" that do not contain all the words.
const search = document.querySelector("#search");
if (search) {
  search.closest("[hidden]").hidden = false;
  const rows = [...document.querySelectorAll("table.searched tbody tr")];
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.dataset.search.includes(word));
    const found = new Set(rows.filter((row) => !row.hidden).map((row) => row.dataset.search)).size;
    const all = new Set(rows.map((row) => row.dataset.search)).size;
    document.querySelector("#found").textContent = found === all ? "" : `${found} of ${all} entries`;
  });
}
// A page of a run in progress loads itself again for as long as its box is ticked.
const reload = document.querySelector("#reload");
if (reload) {
  reload.closest("[hidden]").hidden = false;
  setInterval(() => { if (reload.checked) location.reload(); }, 30_000);
}
