"use strict";
(() => {
  // Tables: a click on a heading sorts by it, numbers as numbers, dashes last.
  const value = (row, column) => {
    const cell = row.children[column];
    if (!cell) return [2, ""];
    const given = cell.querySelector("[data-value]");
    if (given) return [0, parseFloat(given.dataset.value)];
    const text = cell.textContent.trim();
    if (text === "" || text === "\u2013") return [2, ""];
    const number = text.replace(/[\u202f\u00a0]/g, "").replace(/\u2212/g, "-").match(/^[-+]?\d+(\.\d+)?(e[-+]?\d+)?(?![-:\w])/i);
    return number ? [0, parseFloat(number[0])] : [1, text.toLowerCase()];
  };
  const sort = (table, column, head) => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row, place) => ({ row, place, key: value(row, column) }));
    rows.sort((a, b) => {
      if ((a.key[0] === 2) !== (b.key[0] === 2)) return a.key[0] - b.key[0];
      const way = up ? 1 : -1;
      if (a.key[0] !== b.key[0]) return way * (a.key[0] - b.key[0]);
      return way * (a.key[1] < b.key[1] ? -1 : a.key[1] > b.key[1] ? 1 : 0) || a.place - b.place;
    });
    body.append(...rows.map((one) => one.row));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      if (!head.textContent.trim()) return;
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Sort by this column";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, column, head));
      head.append(button);
    });
  }

  // Curves: drag over a part of a panel to see it larger, double-click (or Escape) to see all of it again.
  const NS = "http://www.w3.org/2000/svg";
  const make = (name, attributes, parent) => {
    const made = document.createElementNS(NS, name);
    for (const [key, given] of Object.entries(attributes)) made.setAttribute(key, given);
    if (parent) parent.append(made);
    return made;
  };
  const ticks = (low, high, count) => {
    const raw = (high - low) / count;
    const power = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw) || raw;
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high + 1e-9 * step; k++) found.push(k * step);
    return found;
  };
  const told = (x) => {
    const text = Math.abs(x) < 1e-12 ? "0" : Math.abs(x) >= 1e6 || Math.abs(x) < 1e-3 ? x.toExponential(2) : String(+x.toPrecision(6));
    return text.replace(/-/g, "\u2212");
  };
  const panel = (svg, one, number) => {
    const [left, top, right, bottom] = one.box;
    const find = (name) => Array.from(svg.querySelectorAll(`[id$="zoom-${name}"]`));
    const lines = Array.from(svg.querySelectorAll(`[id*="zoom-line-${number}-"]`));
    const moved = [];
    for (const path of lines.flatMap((line) => Array.from(line.querySelectorAll("path[clip-path]")))) {
      const outer = make("g", { "clip-path": path.getAttribute("clip-path") });
      path.replaceWith(outer);
      path.removeAttribute("clip-path");
      const inner = make("g", {}, outer);
      inner.append(path);
      moved.push({ inner, path });
    }
    const axes = [...find(`x-${number}`), ...find(`y-${number}`)];
    const old = axes.flatMap((axis) => Array.from(axis.querySelectorAll('[id*="tick_"]')));
    const layer = make("g", {}, svg);
    const pad = make("rect", { x: left, y: top, width: right - left, height: bottom - top, fill: "transparent", class: "zoom" }, svg);
    make("title", {}, pad).textContent = "Drag to zoom, double-click to see all";
    const mark = make("rect", { class: "zoommark", visibility: "hidden" }, svg);
    const place = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      return [Math.min(right, Math.max(left, point.x)), Math.min(bottom, Math.max(top, point.y))];
    };
    const show = (x, y) => {
      const whole = x === one.x && y === one.y;
      const sx = (one.x[1] - one.x[0]) / (x[1] - x[0]);
      const sy = (one.y[1] - one.y[0]) / (y[1] - y[0]);
      const at = (v, range, a, b) => a + ((v - range[0]) / (range[1] - range[0])) * (b - a);
      const tx = left - sx * at(x[0], one.x, left, right);
      const ty = bottom - sy * at(y[0], one.y, bottom, top);
      for (const { inner, path } of moved) {
        if (whole) { inner.removeAttribute("transform"); path.removeAttribute("vector-effect"); continue; }
        inner.setAttribute("transform", `matrix(${sx} 0 0 ${sy} ${tx} ${ty})`);
        path.setAttribute("vector-effect", "non-scaling-stroke");
      }
      for (const tick of old) tick.style.display = whole ? "" : "none";
      layer.replaceChildren();
      if (whole) return;
      for (const v of ticks(x[0], x[1], 5)) {
        const label = make("text", { x: at(v, x, left, right), y: bottom + 13, "text-anchor": "middle", class: "zoomtick" }, layer);
        label.textContent = told(v);
      }
      for (const v of ticks(y[0], y[1], 4)) {
        const h = at(v, y, bottom, top);
        make("line", { x1: left, x2: right, y1: h, y2: h, class: "zoomgrid" }, layer);
        make("text", { x: left - 5, y: h + 3, "text-anchor": "end", class: "zoomtick" }, layer).textContent = told(v);
      }
    };
    let now = { x: one.x, y: one.y };
    let begun = null;
    const reset = () => { now = { x: one.x, y: one.y }; show(now.x, now.y); };
    pad.addEventListener("pointerdown", (event) => { begun = place(event); pad.setPointerCapture(event.pointerId); });
    const box = (event) => {
      const end = place(event);
      return [Math.min(begun[0], end[0]), Math.min(begun[1], end[1]), Math.max(begun[0], end[0]), Math.max(begun[1], end[1])];
    };
    pad.addEventListener("pointermove", (event) => {
      if (!begun) return;
      const [x0, y0, x1, y1] = box(event);
      const flat = event.pointerType === "touch" || y1 - y0 < 8;
      const given = { x: x0, y: flat ? top : y0, width: x1 - x0, height: flat ? bottom - top : y1 - y0, visibility: "visible" };
      for (const [key, v] of Object.entries(given)) mark.setAttribute(key, v);
    });
    const stop = () => { begun = null; mark.setAttribute("visibility", "hidden"); };
    pad.addEventListener("pointerup", (event) => {
      if (!begun) return;
      const [x0, y0, x1, y1] = box(event);
      const flat = event.pointerType === "touch" || y1 - y0 < 8;
      stop();
      if (x1 - x0 < 8) return;
      const back = (p, range, a, b) => range[0] + ((p - a) / (b - a)) * (range[1] - range[0]);
      const x = [back(x0, now.x, left, right), back(x1, now.x, left, right)];
      const y = flat ? now.y : [back(y1, now.y, bottom, top), back(y0, now.y, bottom, top)];
      now = { x, y };
      show(x, y);
    });
    pad.addEventListener("pointercancel", stop);
    pad.addEventListener("dblclick", reset);
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") reset(); });
  };
  let hinted = false;
  for (const svg of document.querySelectorAll("svg[data-zoom]")) {
    const told = hinted ? null : svg.closest("figure")?.querySelector("figcaption");
    if (told) {
      hinted = true;
      const hint = document.createElement("span");
      hint.className = "hint";
      hint.textContent = " Drag over a part of a panel to enlarge it; a double click shows all of it again.";
      told.append(hint);
    }
    JSON.parse(svg.dataset.zoom).forEach((one) => panel(svg, one, one.panel));
  }
})();
