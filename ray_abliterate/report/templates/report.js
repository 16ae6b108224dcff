"use strict";
const data = id => JSON.parse(document.getElementById(id)?.textContent || "null");
const figures = data("figures") || {}, sheets = data("sheets");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 700px)");
const touch = window.matchMedia("(pointer: coarse)").matches;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const config = {responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
  // Named one by one: plotly's own choice holds a button that uploads the figure.
  modeBarButtons: [["toImage", "resetScale2d"]], plotlyServerURL: ""};

// Replaces "var(--name)" by the stylesheet's colour, in a copy.
function painted(value) {
  if (typeof value === "string") {
    const match = /^var\((--[a-z0-9]+)\)$/.exec(value);
    return match ? css(match[1]) : value;
  }
  if (Array.isArray(value)) return value.map(painted);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, painted(part)]));
}

// What a small screen has no room for.
function slimmed(view) {
  for (const axis of [view.layout.xaxis, view.layout.yaxis]) axis.title.text = wrapped(axis.title.text);
  for (const trace of view.data) {
    if (trace.name) trace.name = wrapped(trace.name, 24);
    // Scores only: the plan is in the comparison.
    if (Array.isArray(trace.text)) trace.text = trace.text.map(text =>
      text && text.split("<br>").filter(line => !/: peak |: off$|^direction /.test(line)).map(line => broken(line, 32)).join("<br>"));
    if (trace.marker?.showscale) trace.marker.showscale = false;
    if (trace.type === "heatmap") trace.showscale = false;
  }
  if (view.layout.xaxis.type === "date") Object.assign(view.layout.xaxis, {nticks: 4, tickangle: 0});
  const ticks = view.layout.yaxis.ticktext;
  if (ticks) view.layout.yaxis.ticktext = ticks.map(text => text.length > 14 ? `${text.slice(0, 13)}…` : text);
  return view;
}

function wrapped(text, most = 32) {
  return text.split("<br>").map(line => broken(line, most)).join("<br>");
}

// A line in parts of so many characters at most; a tag counts for nothing, an entity for one.
function broken(line, most) {
  let found = "", count = 0;
  for (const word of line.split(/(?<= )/)) {
    const atoms = word.match(/&[a-z#0-9]+;|<[^>]*>|./g) || [];
    const room = most - atoms.filter(atom => !atom.startsWith("<")).length;
    if (count > Math.max(room, 0)) [found, count] = [`${found}<br>`, 0];
    for (const atom of atoms) {
      if (!atom.startsWith("<") && count++ === most) [found, count] = [`${found}<br>`, 1];
      found += atom;
    }
  }
  return found;
}

function draw(name) {
  const place = document.getElementById(`plot-${name}`);
  if (!place) return;
  const chooser = document.querySelector(`select[data-figure="${name}"]`);
  const chosen = figures[name].views[chooser ? Number(chooser.value) : figures[name].chosen];
  const view = narrow.matches ? slimmed(painted(chosen)) : painted(chosen);
  const lines = {gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true};
  const named = view.data.filter(trace => trace.name && trace.type !== "heatmap").length > 1;
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: {l: 56, r: narrow.matches ? 4 : 12, t: 32, b: 48},
    font: {color: css("--ink"), size: narrow.matches ? 12 : 13, family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"},
    hoverlabel: {align: "left", bgcolor: css("--panel"), bordercolor: css("--line"), namelength: -1, font: {color: css("--ink")}},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--accent")},
    dragmode: touch ? false : "zoom",  // a finger that drags scrolls the page
    showlegend: named, legend: {orientation: "h", x: 0, y: 1.06, yanchor: "bottom"}, hovermode: "closest",
    ...view.layout,
  };
  for (const axis of ["xaxis", "yaxis"]) {
    const title = {...view.layout[axis].title, standoff: 10, font: {size: narrow.matches ? 12 : 13}};
    layout[axis] = {...lines, ...view.layout[axis], title};
  }
  if (layout.height) place.style.minHeight = `${layout.height}px`;
  const first = !place.data;
  Plotly.react(place, view.data, layout, config);
  if (first) place.on("plotly_click", event => {
    const key = event.points.map(point => point.customdata).find(Boolean);
    if (key && sheets) take(key);
  });
}

// One that can't be drawn, for want of room, leaves the others alone.
function drawAll() {
  for (const name of Object.keys(figures))
    try { draw(name); } catch (error) { console.error(name, error); }
}

// Two models side by side.

const picks = ["first", "second"].map(id => document.getElementById(id));
const picked = () => picks.map(pick => sheets.models.find(model => model.key === pick.value));

// A model becomes the first one, and changes places if it was the second.
function take(key) {
  if (picks[1].value === key) picks[1].value = picks[0].value;
  picks[0].value = key;
  compare();
  for (const said of document.querySelectorAll(".said"))
    said.textContent = `${picked()[0].name} is in the comparison below, with ${picked()[1].name}.`;
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const escaped = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const digits = value => Number(value.toPrecision(3)).toString().replace("-", "−");

// The first model against the second: the difference, and whether it is for the better.
function difference(field, one, two) {
  const cell = element("td", undefined, {"data-label": "difference"});
  if (!one || !two || one.length < 4 || two.length < 4 || one[1] === two[1]) return cell;
  const by = one[1] - two[1];
  cell.append(element("span", `${by > 0 ? "+" : ""}${digits(by)}`));
  if (field.goal !== "minimize" && field.goal !== "maximize") return cell;
  const better = (by < 0) === (field.goal === "minimize");
  const apart = one[2] > two[3] || two[2] > one[3];
  cell.append(element("small", `${better ? "better" : "worse"}${apart ? "" : "; the intervals overlap"}`,
    {class: better ? "better" : "worse"}));
  return cell;
}

// Both intervals along one line; it begins at 0 unless both are far from there.
function strip(cells) {
  const known = cells.filter(cell => cell && cell.length === 4);
  const line = element("div", undefined, {class: "strip", "aria-hidden": "true"});
  const least = Math.min(...known.map(cell => cell[2])), high = Math.max(...known.map(cell => cell[3]));
  const low = least > 0 && least < high / 2 ? 0 : least;
  const at = value => `${100 * (value - low) / (high - low || 1)}%`;
  line.append(element("i", undefined, {class: "track"}));
  const dots = [];
  cells.forEach((cell, place) => {
    if (!cell || cell.length < 4) return;
    const side = place ? " second" : "";
    const range = element("i", undefined, {class: `range${side}`}), dot = element("i", undefined, {class: `at${side}`});
    range.style.left = at(cell[2]);
    range.style.width = `${100 * (cell[3] - cell[2]) / (high - low || 1)}%`;
    dot.style.left = at(cell[1]);
    line.append(range);
    dots.push(dot);
  });
  line.append(...dots);
  return line;
}

function compare() {
  const models = picked(), body = document.querySelector("#comparison tbody");
  models.forEach((model, place) => { document.getElementById(`head-${place}`).textContent = model.name; });
  body.replaceChildren();
  let part = "";
  sheets.fields.forEach((field, place) => {
    const cells = models.map(model => model.cells[place]);
    if (!cells.some(Boolean)) return;
    if (field.part !== part) {
      const row = element("tr", undefined, {class: "part"});
      const named = element("th", part = field.part, {colspan: 4, scope: "colgroup"});
      if (part === "Plan") named.append(element("small", models.map(model => model.name).join(", then "), {class: "narrow"}));
      row.append(named);
      body.append(row);
    }
    const row = element("tr", undefined, {class: field.part.toLowerCase()}), head = element("th", field.name, {scope: "row"});
    const unit = [field.unit, {minimize: "lower is better", maximize: "higher is better"}[field.goal]].filter(Boolean);
    if (unit.length) head.append(element("small", unit.join(", ")));
    if (field.part !== "Plan" && cells.some(cell => cell?.length === 4)) head.append(strip(cells));
    row.append(head);
    cells.forEach((cell, side) => {
      const [value, ...rest] = (cell ? cell[0] : "").split("; ");
      const made = element("td", undefined, {"data-label": models[side].name});
      if (cell) made.append(element("span", value));
      if (rest.length) made.append(element("small", rest.join("; ")));
      row.append(made);
    });
    row.append(difference(field, ...cells));
    body.append(row);
  });
  strengthen(models);
}

// The strengths of both, the second dashed.
function strengthen(models) {
  const figure = figures.strengths;
  if (!figure) return;
  figure.lines ??= Object.fromEntries(figure.views[0].data.map(trace => [trace.name, trace]));
  const edited = models.filter(model => Object.keys(model.strengths).length);
  const view = figure.views[0], dash = ["solid", "dash"];
  view.data = edited.flatMap(model => Object.entries(model.strengths).map(([component, strengths]) => {
    const trace = figure.lines[component];
    const line = {...trace.line, dash: dash[models.indexOf(model)]};
    return {...trace, name: `${escaped(component)}, ${model.name}`, y: strengths, line};
  }));
  const marked = edited.filter(model => model.direction !== null);
  view.layout.shapes = marked.map(model => ({type: "line", x0: model.direction, x1: model.direction, yref: "paper",
    y0: 0, y1: 1, line: {color: "var(--muted)", width: 1, dash: dash[models.indexOf(model)]}}));
  const said = models.map(model => !edited.includes(model) ? `${model.name} is not edited`
    : model.direction === null ? `${model.name} takes each layer's own direction`
    : `${model.name} takes the direction of layer ${model.direction.toFixed(1)} (vertical line)`);
  document.getElementById("plot-strengths").setAttribute("aria-describedby", "directions");
  document.getElementById("directions").textContent = said.join("; ") + ".";
  draw("strengths");
}

if (sheets) document.getElementById("compare").hidden = false;
drawAll();
if (sheets) {
  picks.forEach(pick => pick.addEventListener("change", compare));
  document.getElementById("swap").addEventListener("click", () => {
    [picks[0].value, picks[1].value] = [picks[1].value, picks[0].value];
    compare();
  });
  for (const button of document.querySelectorAll("button[data-take]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      take(button.dataset.take);
      document.getElementById("compare").scrollIntoView();
      picks[0].focus({preventScroll: true});
    });
  }
  compare();
}
for (const chooser of document.querySelectorAll("select[data-figure]"))
  chooser.addEventListener("change", () => draw(chooser.dataset.figure));
for (const change of [dark, narrow])
  change.addEventListener("change", drawAll);
