"use strict";
// Without this script the page lacks only read-outs, sorting and the confusion matrix.

const asPercent = (value) => `${(100 * value).toFixed(1)}%`;

/** Shows the values of a chart at the step nearest to the pointer or chosen by arrow keys. */
function readOut(figure) {
  const { first, last, percent, series } = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const cursor = figure.querySelector(".cursor");
  const output = figure.querySelector("output");
  const before = [...output.childNodes];
  const steps = [...new Set(series.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const place = (step) =>
    first[1] + ((step - first[0]) / (last[0] - first[0] || 1)) * (last[1] - first[1]);
  let chosen = null;

  function show(index) {
    chosen = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[chosen];
    const texts = [];
    for (const line of series) {
      const apart = line.steps.map((other) => Math.abs(other - step));
      const least = Math.min(...apart);
      if (least > 0.02 * (last[0] - first[0])) continue; // this line has no value here
      const value = line.values[apart.indexOf(least)];
      const text = percent ? asPercent(value) : String(+value.toPrecision(4));
      texts.push(series.length > 1 ? `${line.name} ${text}` : text);
    }
    cursor.setAttribute("x1", place(step));
    cursor.setAttribute("x2", place(step));
    cursor.style.visibility = "visible";
    output.textContent = `step ${step.toLocaleString("en")}: ${texts.join(", ")}`;
  }

  function rest() {
    if (figure.contains(document.activeElement)) return;
    cursor.style.visibility = "hidden";
    output.replaceChildren(...before);
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const apart = steps.map((step) => Math.abs(place(step) - x));
    show(apart.indexOf(Math.min(...apart)));
  });
  svg.addEventListener("pointerleave", rest);
  figure.addEventListener("blur", rest);
  figure.addEventListener("keydown", (event) => {
    const at = chosen ?? steps.length - 1;
    const goal = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
    if (!(event.key in goal)) return;
    event.preventDefault();
    show(goal[event.key]);
  });
}

/** Makes the headings of a table sort it: numbers from the highest, names from A. */
function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  };
  headings.forEach((heading, column) => {
    heading.firstElementChild.addEventListener("click", () => {
      const numeric = heading.classList.contains("number");
      const first = numeric ? "descending" : "ascending";
      const second = numeric ? "ascending" : "descending";
      const order = heading.getAttribute("aria-sort") === first ? second : first;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        return sign * (numeric ? x - y : x.localeCompare(y));
      });
      table.tBodies[0].append(...rows);
    });
  });
}

/** Draws the confusion matrix on a canvas: a part of it is visible, one cell is chosen. */
function confusionMatrix(canvas, data) {
  const { names, videos, cells, orders } = data;
  const size = names.length;
  const count = new Map(cells.map(([row, column, n]) => [row * size + column, n]));
  const output = document.getElementById("cell");
  const context = canvas.getContext("2d");
  const leastShown = Math.min(size, 4); // cells across, when zoomed in most
  let order = orders.similar; // place -> class
  let shown = { row: 0, column: 0, across: size };
  let chosen = null; // { row, column }, places
  let layout = null; // pixels: left, top, side, cell

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  function fit() {
    shown.across = clamp(shown.across, leastShown, size);
    shown.row = clamp(shown.row, 0, size - shown.across);
    shown.column = clamp(shown.column, 0, size - shown.across);
    canvas.style.touchAction = shown.across < size ? "none" : "auto";
    draw();
  }

  /** Shortens a text to fit. It drops the middle, because names often differ at their ends. */
  function shortened(text, room) {
    if (context.measureText(text).width <= room) return text;
    for (let kept = text.length - 1; kept > 2; kept -= 1) {
      const tail = Math.floor(kept / 2);
      const short = `${text.slice(0, kept - tail).trim()}…${text.slice(-tail).trim()}`;
      if (context.measureText(short).width <= room) return short;
    }
    return "…";
  }

  function draw() {
    const scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const font = `13px ${getComputedStyle(document.body).fontFamily}`;
    context.font = font;
    const longest = Math.max(...names.map((name) => context.measureText(name).width)) + 12;
    const room = Math.round(clamp(longest, 40, width * 0.3));
    const named = (width - room) / shown.across >= 14; // false if there is no room for names
    const gutter = named ? room : 24;
    const side = width - gutter - 1;
    const cell = side / shown.across;
    layout = { left: gutter, top: gutter, side, cell };
    canvas.style.height = `${width}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(width * scale);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.font = font;
    context.textBaseline = "middle";

    context.save();
    context.beginPath();
    context.rect(gutter, gutter, side, side);
    context.clip();
    context.fillStyle = color("--raised");
    context.fillRect(gutter, gutter, side, side);
    const first = { row: Math.floor(shown.row), column: Math.floor(shown.column) };
    const end = Math.ceil(shown.across) + 1;
    for (let row = first.row; row < Math.min(first.row + end, size); row += 1) {
      for (let column = first.column; column < Math.min(first.column + end, size); column += 1) {
        if (row !== column) drawCell(row, column, cell, gutter, color);
      }
    }
    for (let place = 0; place < size; place += 1) drawCell(place, place, cell, gutter, color);
    if (chosen) {
      context.strokeStyle = color("--text");
      context.lineWidth = 2;
      const x = gutter + (chosen.column - shown.column) * cell;
      const y = gutter + (chosen.row - shown.row) * cell;
      context.strokeRect(x - 1, y - 1, Math.max(cell, 4) + 1, Math.max(cell, 4) + 1);
    }
    context.restore();
    drawNames(named, cell, gutter, side, color("--text"));
  }

  function drawCell(row, column, cell, gutter, color) {
    const n = count.get(order[row] * size + order[column]);
    if (!n) return;
    const x = gutter + (column - shown.column) * cell;
    const y = gutter + (row - shown.row) * cell;
    const shade = 0.15 + 0.85 * Math.sqrt(n / videos[order[row]]);
    context.fillStyle = `rgba(${color(row === column ? "--right" : "--wrong")}, ${shade})`;
    // At least 2 pixels: a single mistake among 400 classes stays visible.
    const drawn = Math.max(cell - (cell > 8 ? 1 : 0), 2);
    context.fillRect(x, y, drawn, drawn);
    if (cell < 24) return;
    context.fillStyle = shade > 0.6 ? color("--ground") : color("--text");
    context.textAlign = "center";
    context.fillText(String(n), x + cell / 2, y + cell / 2, cell - 4);
  }

  function drawNames(named, cell, gutter, side, color) {
    context.fillStyle = color;
    if (!named) {
      context.textAlign = "left";
      context.fillText("taken for →", gutter, gutter / 2);
      context.save();
      context.translate(gutter / 2, gutter);
      context.rotate(-Math.PI / 2);
      context.textAlign = "right";
      context.fillText("← label", 0, 0);
      context.restore();
      return;
    }
    for (let place = 0; place < size; place += 1) {
      const name = shortened(names[order[place]], gutter - 10);
      const y = gutter + (place + 0.5 - shown.row) * cell;
      context.textAlign = "right";
      if (y > gutter && y < gutter + side) context.fillText(name, gutter - 6, y);
      const x = gutter + (place + 0.5 - shown.column) * cell;
      if (x > gutter && x < gutter + side) {
        context.save();
        context.translate(x, gutter - 6);
        context.rotate(-Math.PI / 2);
        context.textAlign = "left";
        context.fillText(name, 0, 0);
        context.restore();
      }
    }
  }

  function choose(row, column) {
    chosen = { row: clamp(row, 0, size - 1), column: clamp(column, 0, size - 1) };
    const [label, predicted] = [order[chosen.row], order[chosen.column]];
    const n = count.get(label * size + predicted) ?? 0;
    const all = videos[label];
    const share = all ? `, ${asPercent(n / all)}` : "";
    const relation = label === predicted ? "is recognized" : `is taken for “${names[predicted]}”`;
    output.textContent = `“${names[label]}” ${relation}: ${n} of ${all} videos${share}`;
  }

  function follow() {
    for (const axis of ["row", "column"]) {
      shown[axis] = clamp(shown[axis], chosen[axis] + 1 - shown.across, chosen[axis]);
    }
    fit();
  }

  /** Zooms and keeps the point (row, column) in place. */
  function zoom(factor, row, column) {
    const across = clamp(shown.across / factor, leastShown, size);
    const kept = across / shown.across;
    shown = {
      row: row - (row - shown.row) * kept,
      column: column - (column - shown.column) * kept,
      across,
    };
    fit();
  }

  function zoomMiddle(factor) {
    if (chosen) return zoom(factor, chosen.row + 0.5, chosen.column + 0.5);
    return zoom(factor, shown.row + shown.across / 2, shown.column + shown.across / 2);
  }

  function whole() {
    shown = { row: 0, column: 0, across: size };
    fit();
  }

  function pointed(event) {
    const box = canvas.getBoundingClientRect();
    return {
      row: shown.row + (event.clientY - box.top - 1 - layout.top) / layout.cell,
      column: shown.column + (event.clientX - box.left - 1 - layout.left) / layout.cell,
    };
  }

  let drag = null; // { x, y, row, column } where it began
  canvas.addEventListener("pointerdown", (event) => {
    const { row, column } = pointed(event);
    if (row >= 0 && column >= 0) choose(Math.floor(row), Math.floor(column));
    drag = { x: event.clientX, y: event.clientY, row: shown.row, column: shown.column };
    if (shown.across < size) canvas.setPointerCapture(event.pointerId);
    draw();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag && shown.across < size) {
      shown.row = drag.row - (event.clientY - drag.y) / layout.cell;
      shown.column = drag.column - (event.clientX - drag.x) / layout.cell;
      fit();
      return;
    }
    const { row, column } = pointed(event);
    if (row < 0 || column < 0) return;
    choose(Math.floor(row), Math.floor(column));
    draw();
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
    canvas.addEventListener(name, () => { drag = null; });
  }
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== canvas) return; // the page scrolls
    event.preventDefault();
    const { row, column } = pointed(event);
    zoom(Math.exp(-event.deltaY / 300), row, column);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) {
      const [down, right] = moves[event.key];
      if (chosen) choose(chosen.row + down, chosen.column + right);
      else choose(Math.floor(shown.row), Math.floor(shown.column));
      follow();
    } else if (event.key === "+" || event.key === "=") zoomMiddle(1.5);
    else if (event.key === "-") zoomMiddle(1 / 1.5);
    else if (event.key === "0") whole();
    else return;
    event.preventDefault();
  });

  document.getElementById("closer").addEventListener("click", () => zoomMiddle(1.5));
  document.getElementById("farther").addEventListener("click", () => zoomMiddle(1 / 1.5));
  document.getElementById("whole").addEventListener("click", whole);
  document.getElementById("order").addEventListener("change", (event) => {
    order = orders[event.target.value];
    chosen = null;
    draw();
  });
  for (const button of document.querySelectorAll("button.show")) {
    button.addEventListener("click", () => {
      choose(order.indexOf(+button.dataset.label), order.indexOf(+button.dataset.predicted));
      const apart = Math.abs(chosen.row - chosen.column);
      shown.across = clamp(apart + 6, 12, size); // the two classes and some next to them
      shown.row = chosen.row + 0.5 - shown.across / 2;
      shown.column = chosen.column + 0.5 - shown.across / 2;
      fit();
      canvas.scrollIntoView({ block: "center" });
      canvas.focus({ preventScroll: true });
    });
  }
  window.addEventListener("resize", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  fit();
}

document.querySelectorAll("figure[data-chart]").forEach(readOut);
document.querySelectorAll("table.sortable").forEach(sortable);
const canvas = document.getElementById("matrix");
if (canvas) {
  confusionMatrix(canvas, JSON.parse(document.getElementById("confusion").textContent));
}
