"use strict";
// Sorting: a click on a heading; numbers by their full precision, what was not measured last. Filtering: the form above.
function key(row, column) {
  const cell = row.cells[column];
  const value = cell.dataset.value;
  if (value === undefined) return cell.textContent;
  if (value === "") return null;
  return value === "inf" ? Infinity : value === "-inf" ? -Infinity : Number(value);
}
function compare(a, b) {
  if (typeof a === "string") return a.localeCompare(b);
  return a < b ? -1 : a > b ? 1 : 0;
}
function sort(table, column) {
  const heading = table.tHead.rows[0].cells[column];
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
  const known = rows.filter(([value]) => value !== null).sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
  const unknown = rows.filter(([value]) => value === null);
  table.tBodies[0].append(...known.concat(unknown).map(([, row]) => row));
}
function filter(form, table) {
  const { layer, approximation, text } = form.elements;
  const wanted = text.value.trim().toLowerCase();
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const fits =
      (layer.value === "*" || row.dataset.layer === layer.value) &&
      (approximation.value === "*" || row.dataset.approximation === approximation.value) &&
      row.textContent.toLowerCase().includes(wanted);
    row.classList.toggle("hidden", !fits);
    shown += fits;
  }
  form.querySelector("output").textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
}
for (const form of document.querySelectorAll(".filters")) {
  const table = document.getElementById(form.dataset.table);
  form.addEventListener("input", () => filter(form, table));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.reset();
  filter(form, table);
  [...table.tHead.rows[0].cells].forEach((cell, column) =>
    cell.querySelector("button").addEventListener("click", () => sort(table, column)));
}
