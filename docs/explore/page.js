"use strict";
// The page of explore.py. What is known stands in `data`, what is chosen in `now`, and draw() shows both. Whatever
// comes from the text goes in as text (textContent, attributes), never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const { tokens, names, repeats, models } = data;
const length = tokens.length, two = models.length === 2, sides = ["first", "second"];
const now = { model: 0, layer: 0, head: 0, token: 0, colour: two ? "difference" : "loss" };
let pointed = null;                 // the token under the pointer, shown instead of the chosen one

// ------------------------------------------------------------------------------------------------------------- helpers

const $ = id => document.getElementById(id);

/** An element: its classes, its attributes (or properties), and what is in it. */
function make(name, classes = "", attributes = {}, ...children) {
  const element = document.createElement(name);
  if (classes) element.className = classes;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function svg(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

function button(text, label, action, attributes = {}) {
  const element = make("button", "", { type: "button", "aria-label": label, ...attributes }, text);
  element.addEventListener("click", action);
  return element;
}

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

/** Two digits, or all that stand before the point. */
function short(x) {
  if (Math.abs(x) >= 100) return x.toFixed(0);
  return x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(0) : String(Number(x.toPrecision(2)));
}

const signed = x => (x < 0 ? "−" : "+") + short(Math.abs(x));
const percent = p => p >= 0.0995 ? `${Math.round(100 * p)}%` : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : "<0.1%";
const quoted = name => "“" + visible(name) + "”";

/** A pattern of mixers that may be broken after its commas. */
const breakable = name => name.split(/(?<=,)/).flatMap(part => [part, make("wbr")]);

/** A token's name with spaces and line ends to be seen. */
function visible(name) {
  return name.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "→") || "∅";
}

function bytes(n) {
  if (n < 1000) return `${n} bytes`;
  return n < 1e6 ? `${short(n / 1e3)} KB` : `${short(n / 1e6)} MB`;
}

// ------------------------------------------------------------------------------------------------------------ matrices

const unpacked = new Map();

/** explore.py's pack(), undone: { largest, diagonal: one number a row; rest: 8 bits an entry }. */
function unpack(map) {
  if (!unpacked.has(map)) {
    const raw = Uint8Array.from(atob(map.packed), c => c.charCodeAt(0)).buffer;
    unpacked.set(map, { largest: new Float32Array(raw, 0, length), diagonal: new Float32Array(raw, 4 * length, length),
                        rest: new Int8Array(raw, 8 * length) });
  }
  return unpacked.get(map);
}

/** What token i takes from token j. */
function entry(layer, map, i, j) {
  const { largest, diagonal, rest } = unpack(map);
  if (i === j) return diagonal[i];
  if (layer.whole) return largest[i] * rest[i * length + j] / 127;
  return j < i ? largest[i] * rest[i * (i - 1) / 2 + j] / 127 : 0;
}

const currentLayer = () => models[now.model].layers[now.layer];
const currentMap = () => currentLayer().maps.find(map => map.index === now.head);
const rowOf = i => tokens.map((_, j) => entry(currentLayer(), currentMap(), i, j));

/** A colour of the style sheet, as [red, green, blue]. */
function colour(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
}

/** Draw a matrix, a pixel an entry: from the card's colour to --plus or --minus, which map.limit reaches. */
function paint(canvas, layer, map) {
  canvas.width = canvas.height = length;
  const context = canvas.getContext("2d"), image = context.createImageData(length, length);
  const nothing = colour("--card"), plus = colour("--plus"), minus = colour("--minus");
  for (let i = 0; i < length; i++) {
    for (let j = 0; j < length; j++) {
      const value = entry(layer, map, i, j), full = value < 0 ? minus : plus;
      const amount = Math.min(1, Math.abs(value) / (map.limit || 1));
      for (let k = 0; k < 3; k++) image.data[4 * (i * length + j) + k] = nothing[k] + amount * (full[k] - nothing[k]);
      image.data[4 * (i * length + j) + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

// ----------------------------------------------------------------------------------------- what is chosen, the address

/** Where a reader's eye should go first: the token before the repeat that one model knows far better than the other
    (with one model: the rare repeat that it knows best). */
function interesting() {
  let best = length - 1, most = -Infinity;
  repeats.forEach((kind, i) => {
    const nats = models.map(model => model.loss[i]);
    if (!kind || nats.includes(null)) return;
    const score = two ? Math.abs(nats[0] - nats[1]) : -nats[0];
    if (score + 100 * kind > most) [best, most] = [i - 1, score + 100 * kind];
  });
  return best;
}

/** Read the address. What is not in it, or makes no sense, is as at the start. */
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name, low, high, otherwise) => {
    const value = Number(given.get(name) || NaN);
    return Number.isInteger(value) && value >= low && value <= high ? value : otherwise;
  };
  now.model = number("model", 0, models.length - 1, 0);
  const layers = models[now.model].layers;
  now.layer = number("layer", 0, layers.length - 1, layers.length - 1);
  now.head = number("head", 0, layers[now.layer].total - 1, layers[now.layer].strongest);
  if (!currentMap()) now.head = currentLayer().strongest;
  now.token = number("token", 0, length - 1, interesting());
  now.colour = colours().includes(given.get("colour")) ? given.get("colour") : colours()[0];
}

function writeAddress() {
  const { model, ...rest } = now;
  const parts = new URLSearchParams(two ? { model, ...rest } : { layer: now.layer, head: now.head, token: now.token });
  history.replaceState(null, "", "#" + parts);
}

const colours = () => two ? ["difference", "first", "second"] : ["loss"];

function choose(changes) {
  Object.assign(now, changes);
  pointed = null;
  if (!currentMap()) now.head = currentLayer().strongest;
  writeAddress();
  draw();
}

function chooseModel(model) {
  const layers = models[model].layers, layer = clamp(now.layer, 0, layers.length - 1);
  choose({ model, layer, head: layers[layer].strongest });
}

function chooseLayer(by) {
  const layers = models[now.model].layers, layer = clamp(now.layer + by, 0, layers.length - 1);
  if (layer !== now.layer) choose({ layer, head: layers[layer].strongest });
}

function chooseHead(by) {
  const maps = currentLayer().maps;
  choose({ head: maps[clamp(maps.indexOf(currentMap()) + by, 0, maps.length - 1)].index });
}

const chooseToken = by => choose({ token: clamp(now.token + by, 0, length - 1) });

/** The token before the next (or the previous) repeat: it is what predicts it. */
function chooseRepeat(by) {
  for (let i = now.token + 1 + by; i > 0 && i < length; i += by) if (repeats[i]) return choose({ token: i - 1 });
}

// ------------------------------------------------------------------------------------------------ built once: the text

const spans = [];

/** A line of the text is a div: the bars need room between lines, which empty lines do not. */
function buildText() {
  let line = make("div", "", { role: "none" });
  tokens.forEach((text, i) => {
    const ends = text.match(/\n*$/)[0], ink = make("span", "ink", {}, text.slice(0, text.length - ends.length));
    const span = make("span", "token", { role: "option", id: `token-${i}`, "aria-label": tokenLabel(i) }, ink);
    span.classList.toggle("repeat", repeats[i] > 0);
    span.classList.toggle("rare", repeats[i] > 1);
    if (ends) ink.dataset.ends = "↵".repeat(ends.length);
    if (text === "") ink.dataset.ends = "·";     // part of a character that a later one shows, or added by the tokenizer
    span.addEventListener("pointerenter", event => event.pointerType === "mouse" && point(i));
    span.addEventListener("click", () => choose({ token: i }));
    spans.push(span);
    line.append(span);
    for (const end of ends) {
      line.append(end);
      $("text").append(line);
      line = make("div", "", { role: "none" });
    }
  });
  if (data.left_off) line.append(make("span", "left-off", { id: "left-off" }, ` … ${data.left_off} more tokens`));
  $("text").append(line);
  for (const div of $("text").children) div.classList.toggle("empty", !div.firstElementChild);
  $("text").addEventListener("pointerleave", () => point(null));
}

function point(i) {
  pointed = i;
  draw();
}

function buildHeader() {
  const title = models.map(model => model.name).join(" against ");
  document.title = title;
  models.forEach((model, m) => {
    if (m) $("title").append(" against ");
    $("title").append(make("span", two ? sides[m] : "", {}, model.name));
    const whose = two ? [make("span", sides[m], {}, model.name), " — "] : [];
    $("models").append(make("li", "", {}, ...whose, model.about));
  });
  const blind = models.flatMap(model => model.layers).filter(layer => !layer.causal).map(layer => layer.mixer);
  if (blind.length) note(`${[...new Set(blind)].join(", ")} is not causal: each token sees those after it too, the one `
    + "that is asked for among them. Its loss says nothing about language.");
  if (data.left_off) note(`The text is longer than what is shown: these are its first ${length} tokens of `
    + `${length + data.left_off}.`);
  if (data.rare === null) note("The text that the model was trained on is not there: which repeats are rare in it is "
    + "not known.");
}

const note = text => $("notes").append(make("li", "", {}, text));

function buildColours() {
  const labels = { difference: "difference", loss: "loss" };
  models.forEach((model, m) => { labels[sides[m]] = `loss of ${model.name}`; });
  if (colours().length > 1) {
    for (const name of colours()) {
      $("colours").append(button(labels[name], `colour by ${labels[name]}`, () => choose({ colour: name }),
                                 { "data-colour": name }));
    }
  }
}

function buildSteps() {
  const stepper = (what, id, step, keys) => make("span", "stepper", { role: "group", "aria-label": what },
    button("◂", `previous ${what}`, () => step(-1), { "aria-keyshortcuts": keys[0] }), make("output", "", { id }),
    button("▸", `next ${what}`, () => step(1), { "aria-keyshortcuts": keys[1] }));
  if (two) models.forEach((model, m) => $("steps").append(button(make("span", sides[m], {}, model.name),
    `model ${model.name}`, () => chooseModel(m), { "data-model": m, "aria-keyshortcuts": "m" })));
  $("steps").append(stepper("layer", "layer", chooseLayer, ["[", "]"]),
                    stepper("head or channel", "head", chooseHead, ["ArrowUp", "ArrowDown"]));
}

// ---------------------------------------------------------------------------------------- built once: sums, all layers

function buildSums() {
  const head = make("tr", "", {}, make("th", "", { scope: "col" }, "nats"), make("th", "", { scope: "col" }, "tokens"));
  models.forEach((model, m) => head.append(
    make("th", two ? sides[m] : "", { scope: "col" }, ...breakable(model.name))));
  if (two) head.append(make("th", "", { scope: "col" }, "difference"));
  const body = make("tbody");
  for (const [name, count, nats] of data.sums) {
    const row = make("tr", "", {}, make("th", "", { scope: "row" }, name), make("td", "", {}, String(count)));
    for (const sum of nats) {
      const mean = count ? ` (${(sum / count).toFixed(2)})` : "";
      row.append(make("td", "", {}, sum.toFixed(1), make("small", "", {}, mean)));
    }
    if (two) row.append(lead(nats[1] - nats[0]));
    body.append(row);
  }
  $("table").append(make("thead", "", {}, head), body);
  const rare = data.rare === null ? "" : ` Rare: at most ${data.rare} times in the training text.`;
  $("sums-note").textContent = "The sum over the tokens, and the mean. A repeat ends a pair of tokens that stood "
    + "earlier in the text: it can be looked up." + rare;
}

/** A cell: how many nats less the better model has, in its colour. */
function lead(nats) {
  const side = nats < 0 ? 1 : 0;
  return make("td", Math.abs(nats) < 0.05 ? "" : sides[side], {}, Math.abs(nats).toFixed(1));
}

const thumbs = [];

function buildStrips() {
  models.forEach((model, m) => model.layers.forEach((layer, l) => {
    const name = make("div", "name", {}, `layer ${l} · ${layer.mixer}`);
    if (two) name.prepend(make("span", sides[m], {}, sides[m]), " · ");
    name.append(make("div", "small", {}, `${layer.maps.length} of ${layer.total} ${layer.kind}s`));
    const strip = make("div", "strip", { role: "group", "aria-label": `${model.name}, layer ${l}` });
    for (const map of layer.maps) {
      const canvas = make("canvas"), label = `${model.name}, layer ${l}, ${layer.kind} ${map.index}`;
      const thumb = button(canvas, label, () => choose({ model: m, layer: l, head: map.index }), { title: label });
      thumbs.push({ thumb, canvas, strip, layer, map, model: m, at: l });
      strip.append(thumb);
    }
    const row = make("div", "layer", {}, name, strip);
    if (layer.maps.length < layer.total) row.append(leftOut(layer));
    thumbs.filter(t => t.layer === layer).forEach(t => { t.row = row; });
    $("strips").append(row);
  }));
}

/** Which heads or channels of a layer the page has no room for. */
function leftOut(layer) {
  const here = new Set(layer.maps.map(map => map.index));
  const missing = [...Array(layer.total).keys()].filter(i => !here.has(i));
  const what = `${missing.length} ${layer.kind}s left out: those with the least weight off the diagonal`;
  return make("details", "small", {}, make("summary", "", {}, what), ranges(missing));
}

/** [0, 1, 2, 5] -> "0–2, 5" */
function ranges(numbers) {
  const parts = [];
  for (const n of numbers) {
    const last = parts[parts.length - 1];
    if (last && last[1] === n - 1) last[1] = n; else parts.push([n, n]);
  }
  return parts.map(([a, b]) => a === b ? `${a}` : `${a}–${b}`).join(", ");
}

function paintAll() {
  for (const { canvas, layer, map } of thumbs) paint(canvas, layer, map);
}

// ----------------------------------------------------------------------------------------------------- drawn each time

/** The tint of each token: its loss, or by how much one model knows it better. */
function drawTints() {
  spans.forEach((span, i) => {
    const ink = span.firstChild, nats = models.map(model => model.loss[i]);
    let amount = 0, side = "";
    if (now.colour === "difference" && !nats.includes(null)) {
      amount = Math.abs(nats[1] - nats[0]) / 4;
      side = nats[0] < nats[1] ? "first-wins" : "second-wins";
    } else if (now.colour !== "difference") {
      amount = (nats[now.colour === "second" ? 1 : 0] ?? 0) / 10;
    }
    ink.className = `ink ${side} ${amount > 0.8 ? "strong" : ""}`;
    ink.style.setProperty("--amount", clamp(amount, 0, 1).toFixed(3));
  });
}

function drawLegend() {
  const [first, second] = models.map(model => model.name);
  const tints = now.colour === "difference"
    ? [make("b", "first", {}, `${first} better by 4 nats`), make("span", "ramp difference"),
       make("b", "second", {}, `${second} better by 4`)]
    : ["loss: 0", make("span", "ramp loss"), "10 nats"];
  const rare = [make("span", "box rare", {}, "rare"),
                `repeat of a pair that is at most ${data.rare} times in training`];
  const other = [make("span", "box", {}, "other"), "repeat"];
  const parts = data.rare === null ? [tints, other] : [tints, rare, other];
  $("legend").replaceChildren(...parts.map(part => make("span", "", {}, ...part)));
}

/** The row of M as bars over the text. Their unit is its largest entry off the diagonal; a larger own one is cut. */
function drawRow(i, row) {
  const largest = Math.max(...row.map((value, j) => j === i ? 0 : Math.abs(value))) || Math.abs(row[i]) || 1;
  spans.forEach((span, j) => {
    span.style.setProperty("--size", Math.min(1, Math.abs(row[j]) / largest).toFixed(3));
    span.dataset.weight = row[j];
    span.classList.toggle("adds", row[j] > 0);
    span.classList.toggle("subtracts", row[j] < 0);
    span.classList.toggle("chosen", j === i);
    span.classList.toggle("coming", j === i + 1);
    span.setAttribute("aria-selected", j === now.token);
  });
  $("text").setAttribute("aria-activedescendant", `token-${now.token}`);
}

function tokenLabel(j) {
  const nats = models.map(model => model.loss[j]).filter(x => x !== null).map(x => x.toFixed(1)).join(" and ");
  const kind = ["", ", repeat", ", rare repeat"][repeats[j]];
  return `token ${j} ${quoted(names[j])}${nats && ", loss " + nats}${kind}`;
}

/** What the token takes most from. */
function drawTakes(i, row) {
  const order = [...row.keys()].filter(j => row[j]).sort((a, b) => Math.abs(row[b]) - Math.abs(row[a])).slice(0, 5);
  const largest = Math.abs(row[order[0]]) || 1;
  $("takes").replaceChildren(...order.map(j => bar(
    [visible(names[j]), make("small", "", {}, j === i ? "  itself" : `  ${j}`)], Math.abs(row[j]) / largest,
    signed(row[j]), row[j] < 0 ? "var(--minus)" : "var(--plus)")));
  if (!order.length) $("takes").replaceChildren(make("li", "", {}, "nothing"));
}

function bar(what, share, number, colour) {
  return make("li", "", {}, make("span", "what", {}, ...what),
    make("span", "length", { style: `width: ${(100 * share).toFixed(1)}%; --colour: ${colour}` }),
    make("span", "number", {}, number));
}

/** The likeliest next tokens, and what came. */
function drawNext(i) {
  $("nexts").replaceChildren(...models.flatMap((model, m) => {
    const list = make("ol", "bars"), loss = i + 1 < length ? model.loss[i + 1] : null;
    const came = loss === null ? null : names[i + 1];
    for (const [name, p] of model.next[i]) {
      const line = bar([visible(name)], p, percent(p), two ? `var(--${sides[m]})` : "var(--soft)");
      line.classList.toggle("came", came === name);
      list.append(line);
    }
    const what_came = came === null ? "" : `came: ${quoted(came)}, place ${model.place[i + 1]}, `
      + `${percent(Math.exp(-loss))}, loss ${loss.toFixed(2)} nats`;
    const head = two ? [make("div", sides[m] + " small", {}, model.name)] : [];
    return [...head, list, make("p", "other", {}, what_came)];
  }));
}

function drawSteps() {
  $("layer").textContent = `layer ${now.layer} of ${models[now.model].layers.length}`;
  $("head").textContent = `${currentLayer().kind} ${now.head}`;
  for (const b of $("steps").querySelectorAll("[data-model]")) {
    b.setAttribute("aria-pressed", b.dataset.model === String(now.model));
  }
}

let painted = null;                 // the matrix that is on the canvas

function drawMatrix(i) {
  const layer = currentLayer(), map = currentMap();
  if (painted !== map) paint($("map"), layer, map);
  painted = map;
  $("row").style.top = `calc(${100 * i / length}% - 1.5px)`;
  $("row").style.height = `calc(${100 / length}% + 3px)`;
  $("map").setAttribute("aria-label",
                        `matrix of layer ${now.layer}, ${layer.kind} ${now.head}: ${length} by ${length}`);
  const limit = short(map.limit);
  $("under").replaceChildren(make("span", "", {}, `${layer.mixer}: row = token that takes, column = token taken from`),
    make("span", "", {}, `−${limit}`, make("span", "ramp weight"), limit));
  for (const t of thumbs) {
    const here = t.map === map, layerHere = t.model === now.model && t.at === now.layer;
    t.thumb.setAttribute("aria-pressed", here);
    t.row.classList.toggle("current", layerHere);
    if (here) t.strip.scrollLeft = t.thumb.offsetLeft - t.strip.offsetLeft - t.strip.clientWidth / 2;
  }
}

/** Bytes of state after each token, one line a model. */
function drawState(i) {
  const width = 420, height = 170, left = 8, right = 96, top = 12, bottom = 22;
  const most = Math.max(...models.flatMap(model => model.bytes), 1);
  const x = j => left + (width - left - right) * (length > 1 ? j / (length - 1) : 1);
  const y = n => height - bottom - (height - top - bottom) * n / most;
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  chart.append(svg("line", { class: "axis", x1: left, x2: x(length - 1), y1: y(0), y2: y(0) }),
               svg("text", { x: left, y: height - 5 }, "token 0"),
               svg("text", { x: x(length - 1), y: height - 5, "text-anchor": "end" }, String(length - 1)),
               svg("line", { class: "here", x1: x(i), x2: x(i), y1: top, y2: y(0) }));
  const ends = models.map(model => y(model.bytes[length - 1]));
  if (two && Math.abs(ends[0] - ends[1]) < 15) ends[ends[0] > ends[1] ? 0 : 1] += 15 - Math.abs(ends[0] - ends[1]);
  models.forEach((model, m) => {
    const points = model.bytes.map((n, j) => `${x(j).toFixed(1)},${y(n).toFixed(1)}`);
    if (length === 1) points.unshift(`${left},${y(model.bytes[0])}`);
    chart.append(svg("polyline", { class: `line ${sides[m]}`, points: points.join(" ") }),
                 svg("text", { x: x(length - 1) + 7, y: ends[m] + 4, style: `fill: var(--${sides[m]})` },
                     bytes(model.bytes[length - 1])));
  });
  const kept = models.map(model => model.bytes[i] || model.layers.every(layer => layer.causal)
    ? `${model.name} ${bytes(model.bytes[i])}` : `${model.name} nothing, as it cannot go on`);
  $("state-note").textContent = `Carried from token to token, after token ${i}: ${kept.join(", ")}.`;
  chart.setAttribute("aria-label", $("state-note").textContent);
  $("chart").replaceChildren(chart);
}

/** What a screen reader says of the token that was chosen. */
function speak(i) {
  const taken = [...$("takes").children].map(line => line.textContent).join(", ");
  $("spoken").textContent = `${tokenLabel(i)}. Takes most from ${taken}`;
}

function draw() {
  const i = pointed ?? now.token, row = rowOf(i);
  drawTints();
  drawLegend();
  drawRow(i, row);
  $("token-title").textContent = `Token ${i}: ${quoted(names[i])}`;
  drawTakes(i, row);
  drawNext(i);
  drawSteps();
  drawMatrix(i);
  drawState(i);
  for (const b of $("colours").children) b.setAttribute("aria-pressed", b.dataset.colour === now.colour);
  if (pointed === null) speak(i);
}

// ---------------------------------------------------------------------------------------------------- keys and pointer

const keys = {
  ArrowLeft: () => chooseToken(-1), ArrowRight: () => chooseToken(1), ArrowUp: () => chooseHead(-1),
  ArrowDown: () => chooseHead(1), Home: () => choose({ token: 0 }), End: () => choose({ token: length - 1 }),
  "[": () => chooseLayer(-1), "]": () => chooseLayer(1), n: () => chooseRepeat(1), p: () => chooseRepeat(-1),
  m: () => chooseModel((now.model + 1) % models.length),
  c: () => choose({ colour: colours()[(colours().indexOf(now.colour) + 1) % colours().length] }),
};

/** Letters and brackets work everywhere; arrows where they do not scroll: in the text, the strips, the matrix. */
document.addEventListener("keydown", event => {
  const action = keys[event.key], plain = !event.ctrlKey && !event.metaKey && !event.altKey;
  const moves = event.key.length > 1 && !event.target.closest("#text, #layers, #matrix");
  if (!action || !plain || moves) return;
  event.preventDefault();
  action();
  spans[now.token].scrollIntoView({ block: "nearest" });
});

/** Which row and column of the matrix the pointer is on. */
function cell(event) {
  const box = $("map").getBoundingClientRect();
  const at = (x, size) => clamp(Math.floor(length * x / size), 0, length - 1);
  return [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
}

$("map").addEventListener("pointermove", event => {
  const [i, j] = cell(event);
  point(i);
  $("under").firstChild.textContent = `${i} ${quoted(names[i])} takes `
    + `${signed(entry(currentLayer(), currentMap(), i, j))} from ${j} ${quoted(names[j])}`;
});
$("map").addEventListener("pointerleave", () => point(null));
$("map").addEventListener("click", event => choose({ token: cell(event)[0] }));

window.addEventListener("hashchange", () => { readAddress(); pointed = null; draw(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { painted = null; paintAll(); draw(); });

buildHeader();
buildColours();
buildSteps();
buildText();
buildSums();
buildStrips();
readAddress();
writeAddress();
paintAll();
draw();
