// Shows the values of a chart's lines at the step under the pointer, or at the one that the arrow keys reach.
"use strict";
const charts = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

const nearest = (steps, step) =>
  steps.reduce((best, one, place) => (Math.abs(one - step) < Math.abs(steps[best] - step) ? place : best), 0);

document.querySelectorAll("figure.chart").forEach((figure, number) => {
  const { across, lines } = charts[number];
  const svg = figure.querySelector("svg");
  const values = figure.querySelector(".values");
  const box = JSON.parse(svg.dataset.box);
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const cursor = svg.querySelector(".cursor");
  let at = null;

  const show = (step) => {
    at = step;
    const x = box.left + ((box.right - box.left) * (step - across[0])) / (across[1] - across[0]);
    cursor.replaceChildren();
    const rule = document.createElementNS(SVG, "line");
    Object.entries({ x1: x, x2: x, y1: box.top, y2: box.bottom }).forEach(([name, value]) =>
      rule.setAttribute(name, value));
    cursor.append(rule);
    const parts = lines.map((line) => {
      const place = nearest(line.steps, step);
      const value = line.values[place];
      const where = line.steps[place] === step ? "" : ` (step ${line.steps[place]})`;
      return `${line.name} ${value === null ? "not finite" : value}${where}`;
    });
    values.textContent = `step ${step}: ${parts.join(" · ")}`;
  };
  const hide = () => {
    at = null;
    cursor.replaceChildren();
    values.textContent = "\u00a0";
  };

  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * box.width;
    const step = across[0] + ((x - box.left) / (box.right - box.left)) * (across[1] - across[0]);
    show(steps[nearest(steps, step)]);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("focus", () => show(steps[steps.length - 1]));
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      event.preventDefault();
      const place = at === null ? steps.length - 1 : steps.indexOf(at) + move;
      show(steps[Math.min(Math.max(place, 0), steps.length - 1)]);
    }
  });
});
