"use strict";

// Tables: a click on the title of a column sorts its rows, a second click turns the order round.
for (const button of document.querySelectorAll(".sortable thead button")) {
  button.addEventListener("click", () => {
    const title = button.closest("th"), body = button.closest("table").tBodies[0];
    const column = [...title.parentNode.children].indexOf(title), now = title.getAttribute("aria-sort");
    const order = now === "none" ? button.dataset.first : now === "ascending" ? "descending" : "ascending";
    for (const other of title.parentNode.children) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", other === title ? order : "none");
    }
    const sign = order === "ascending" ? 1 : -1;
    const key = (row) => row.children[column].textContent.trim();
    const rows = [...body.rows].sort((a, b) => {
      const x = parseFloat(key(a)), y = parseFloat(key(b));
      if (column === 0) return sign * key(a).localeCompare(key(b), undefined, { numeric: true });
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what is unknown comes last
      return sign * (x - y);
    });
    body.append(...rows);
  });
}

// Filter: what belongs to other classes only is hidden. The choice is part of the address, so that it can be shared.
const select = document.getElementById("class");
function filter() {
  for (const part of document.querySelectorAll("[data-classes]")) {
    const shown = !select.value || part.dataset.classes.split(" ").includes(select.value);
    part.toggleAttribute("hidden", !shown);
    if (part instanceof SVGElement) part.style.display = shown ? "" : "none";
  }
}
select.addEventListener("change", filter);
filter(); // a browser keeps the choice when the page is loaded again

// Zoom: a click on a picture opens the whole image; keys, wheel and pointer move it.
const dialog = document.getElementById("zoom"), stage = dialog.querySelector(".stage");
let current = null, view = [0, 0, 1, 1];

function show(button) {
  current = button;
  const svg = button.querySelector("svg").cloneNode(true);
  stage.replaceChildren(svg);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", button.getAttribute("aria-label"));
  whole();
  dialog.querySelector("output").textContent = button.closest("figure").querySelector("figcaption").innerText.replace("\n", ", ");
  if (!dialog.open) dialog.showModal();
}
function look(next) {
  view = next;
  stage.firstChild.setAttribute("viewBox", view.join(" "));
}
function whole() {
  const svg = stage.firstChild;
  look([0, 0, Number(svg.dataset.width), Number(svg.dataset.height)]);
}
function zoom(factor, x = view[0] + view[2] / 2, y = view[1] + view[3] / 2) {
  look([x - (x - view[0]) / factor, y - (y - view[1]) / factor, view[2] / factor, view[3] / factor]);
}
function move(dx, dy) {
  look([view[0] + dx * view[2], view[1] + dy * view[3], view[2], view[3]]);
}
function step(by) {
  const all = [...document.querySelectorAll(".gallery figure:not([hidden]) .open")];
  show(all[(all.indexOf(current) + by + all.length) % all.length]);
}
for (const button of document.querySelectorAll(".open")) button.addEventListener("click", () => show(button));
for (const button of dialog.querySelectorAll("[data-step]")) button.addEventListener("click", () => step(Number(button.dataset.step)));
for (const button of dialog.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => zoom(Number(button.dataset.zoom)));
dialog.addEventListener("close", () => current.focus());
dialog.addEventListener("keydown", (event) => {
  const keys = {
    n: () => step(1), p: () => step(-1), PageDown: () => step(1), PageUp: () => step(-1),
    "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: whole,
    ArrowLeft: () => move(-0.1, 0), ArrowRight: () => move(0.1, 0), ArrowUp: () => move(0, -0.1), ArrowDown: () => move(0, 0.1),
  };
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
function place(event) {
  const svg = stage.firstChild, point = new DOMPoint(event.clientX, event.clientY);
  return point.matrixTransform(svg.getScreenCTM().inverse());
}
stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  const at = place(event);
  zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15, at.x, at.y);
}, { passive: false });
stage.addEventListener("pointerdown", (event) => stage.setPointerCapture(event.pointerId));
stage.addEventListener("pointermove", (event) => {
  if (!stage.hasPointerCapture(event.pointerId)) return;
  const scale = stage.firstChild.getScreenCTM().a;
  look([view[0] - event.movementX / scale, view[1] - event.movementY / scale, view[2], view[3]]);
});
