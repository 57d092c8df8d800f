"use strict";
/* The page: files in, answers, looking at them, saving them. */

const by = (id) => document.getElementById(id);
const isVolume = student.dimensions === 3, isClasses = student.kind !== "segmentation",
  hasFindings = student.kind === "multilabel";
const entries = []; // {file, id, state, said, and for an answer: mask, certainty, shape, grid, or probabilities}
let network = null, shown = null, busy = Promise.resolve(), cross = null;

const colour = (label) => student.colours[(label - 1) % student.colours.length];
const number = (value, digits = 3) =>
  (value >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits))));
const BLACK = [0, 0, 0], suffix = /(\.nii\.gz|\.[^.]*)$/i;

function element(name, values = {}, ...children) {
  const made = Object.assign(document.createElement(name), values);
  made.append(...children);
  return made;
}

function say(text, part) {
  by("status").textContent = text;
  by("progress").hidden = part === undefined;
  by("progress").value = part || 0;
  return new Promise((resolve) => setTimeout(resolve)); // lets the page draw
}

/** Text of Markdown as the model card has it: headings, tables, lists, code and paragraphs. */
function markdown(text) {
  const parts = [];
  for (const block of text.split(/\n{2,}(?=\S)|(?<=\n)(?=#)|\n(?=```)/)) {
    const lines = block.trim().split("\n"), plain = (line) => line.replace(/\*\*|`/g, "");
    const heading = /^(#+) (.*)/.exec(lines[0]),
      cells = (line) => line.split("|").slice(1, -1).map((cell) => plain(cell.trim()));
    if (heading) parts.push(element(`h${Math.min(heading[1].length, 4)}`, { textContent: heading[2] }));
    else if (lines[0].startsWith("```")) {
      parts.push(element("pre", { textContent: lines.slice(1).join("\n").replace(/```$/, "") }));
    }
    else if (lines[0].startsWith("|")) {
      const rows = lines.filter((line) => !/^[|\s-]+$/.test(line)).map((line, i) =>
        element("tr", {}, ...cells(line).map((cell) => element(i ? "td" : "th", { textContent: cell }))));
      parts.push(element("table", {}, ...rows));
    } else if (lines[0].startsWith("- ")) parts.push(element("ul", {}, ...block.trim().split(/\n(?=- )/).map((item) =>
      element("li", { textContent: plain(item.slice(2)) }))));
    else if (lines.join("")) parts.push(element("p", { textContent: plain(lines.join(" ")) }));
  }
  return parts;
}

async function readInput(file) {
  ensure(file.size <= MOST_BYTES,
    `it is larger than ${MOST_BYTES / 2 ** 30} GiB, more than this page can hold: use \`predict\``);
  ensure(file.size, "it is empty: replace it by an intact copy");
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (isVolume) return readVolume(bytes);
  const { data, width, height } = await readPicture(bytes), array = zeros([3, height, width]);
  data.forEach((level, i) => { array.data[(i % 3) * width * height + Math.floor(i / 3)] = level; });
  return { array, picture: data };
}

async function answer(entry) {
  const input = await readInput(entry.file), advance = (part) => say(by("status").textContent, part);
  if (isClasses) {
    const { data, shape } = (await probabilities(network, input.array))[0];
    entry.probabilities = [...(hasFindings ? data.subarray(shape[1]) : data)]; // of (2, F) those of presence
  }
  else Object.assign(entry, await maskOf(network, input.array, input.grid, isVolume ? advance : undefined));
  entry.shape = input.array.shape.slice(1);
  entry.grid = input.grid;
  entry.state = "done";
  entry.said = isClasses ? namesOf(entry).map((name) => `${name} ${probabilityOf(entry, name)}`).join(", ") || "none"
    : student.classes.slice(1).filter((_, i) => entry.mask.includes(i + 1)).join(", ") || "nothing found";
  entry.input = input;
  for (const other of entries) if (other !== entry && other !== shown) delete other.input; // one image in memory
}

/** The likeliest class, or the findings of probability 0.5 and more. */
const namesOf = ({ probabilities }) => student.classes.filter((_, i) =>
  (hasFindings ? probabilities[i] >= 0.5 : i === probabilities.indexOf(Math.max(...probabilities))));
const probabilityOf = ({ probabilities }, name) => probabilities[student.classes.indexOf(name)].toFixed(2);

async function addFiles(files) {
  const added = [...files].map((file) => ({ file, id: file.name.replace(suffix, ""), state: "waiting", said: "" }));
  for (const entry of added) {
    if ([...entries, ...added].some((o) => o !== entry && o.id === entry.id)) entry.id = entry.file.name;
  }
  entries.push(...added);
  list();
  busy = busy.then(async () => {
    for (const [i, entry] of added.entries()) {
      await say(`${i + 1} of ${added.length}: ${entry.file.name}`, i / added.length);
      try {
        ensure(network, "the student could not be opened, see above");
        await answer(entry);
        if (!shown || i === 0) await show(entry);
      } catch (error) {
        entry.state = "refused";
        entry.said = `${error instanceof RangeError ? "it does not fit into the memory of this page" : error.message}.`;
        delete entry.input;
      }
      list();
    }
    const done = added.filter((entry) => entry.state === "done").length;
    await say(network ? `${done} of ${added.length} predicted.` : by("status").textContent);
  });
  await busy;
}

function list() {
  by("list").replaceChildren(...entries.map((entry) => {
    const button = element("button", { onclick: () => show(entry), disabled: entry.state !== "done" }, entry.file.name,
      element("small", { textContent: entry.said || entry.state }));
    button.setAttribute("aria-current", entry === shown);
    return element("li", { className: entry.state }, button);
  }));
  by("save_all").disabled = !entries.some((entry) => entry.state === "done");
}

async function show(entry) {
  if (shown !== entry && shown) delete shown.input;
  entry.input ||= await readInput(entry.file);
  shown = entry;
  cross = null;
  by("name").textContent = entry.file.name;
  by("view").hidden = by("answer").hidden = false;
  if (isVolume && !entry.levels) {
    entry.levels = percentiles(entry.input.array.data.filter((_, i) => i % 97 === 0), [0.5, 99.5]);
  }
  if (isVolume) resetSlices();
  list();
  draw();
}

/** The plane shown: its size, and the place in the array of each of its pixels; volumes are turned to RAS for it. */
function plane() {
  const [height, width] = shown.shape;
  if (!isVolume) return { width, height, place: (x, y) => y * width + x, aspect: 1, sides: ["", ""] };
  const axis = Number(by("plane").value), [sources, flips] = orderTo(shown.grid.codes, "RAS"),
    sizes = sources.map((s) => shown.shape[s]);
  const strides = [shown.shape[1] * shown.shape[2], shown.shape[2], 1],
    spacing = sources.map((s) => shown.grid.spacing[s]);
  const at = (j, i) => strides[sources[j]] * (flips[j] ? sizes[j] - 1 - i : i),
    slice = at(axis, Number(by("slice").value));
  const [h, v] = [[1, 2], [0, 2], [0, 1]][axis]; // from the patient's right or front, from above or the front
  return { width: sizes[h], height: sizes[v], aspect: spacing[v] / spacing[h], pixel: spacing[h] * spacing[v],
    place: (x, y) => slice + at(h, sizes[h] - 1 - x) + at(v, sizes[v] - 1 - y),
    sides: [axis ? "R" : "A", axis === 2 ? "A" : "S"] };
}

function resetSlices() {
  const axis = Number(by("plane").value), [sources, flips] = orderTo(shown.grid.codes, "RAS"), source = sources[axis];
  const count = shown.shape[source], stride = product(shown.shape.slice(source + 1)), found = new Array(count).fill(0);
  shown.mask.forEach((label, i) => { if (label) found[Math.floor(i / stride) % count]++; });
  const most = Math.max(...found), index = most ? found.indexOf(most) : count >> 1;
  by("slice").max = count - 1;
  by("slice").value = flips[axis] ? count - 1 - index : index;
}

function draw() {
  const { width, height, place, aspect, sides } = plane(), base = new ImageData(width, height),
    { input, mask, certainty } = shown, [low, high] = shown.levels || [];
  for (let y = 0, to = 0; y < height; y++) for (let x = 0; x < width; x++, to += 4) {
    const i = place(x, y);
    if (isVolume) base.data.fill((255 * (input.array.data[i] - low)) / (high - low || 1), to, to + 3);
    else for (let k = 0; k < 3; k++) base.data[to + k] = input.picture[3 * i + k];
    base.data[to + 3] = 255;
  }
  const scale = clipped(900 / Math.max(width, height * aspect), 0.01, 8), columns = Math.round(width * scale),
    rows = Math.round(height * aspect * scale);
  const under = element("canvas", { width, height }),
    canvas = Object.assign(by("canvas"), { width: columns, height: rows });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  under.getContext("2d").putImageData(base, 0, 0);
  context.imageSmoothingQuality = "high";
  context.drawImage(under, 0, 0, columns, rows);
  if (mask) {
    const image = context.getImageData(0, 0, columns, rows), found = new Uint8Array(columns * rows),
      opacity = by("opacity").value / 100,
      wide = Math.max(2, Math.round((1.5 * columns) / (canvas.clientWidth || columns))); // outline, as seen
    const of = (x, y) => place(Math.floor(((x + 0.5) * width) / columns), Math.floor(((y + 0.5) * height) / rows));
    for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) found[y * columns + x] = mask[of(x, y)];
    const isShaded = by("shading").checked, isOutlined = by("outline").checked, isPair = student.classes.length === 2;
    for (let y = 0, i = 0; y < rows; y++) for (let x = 0; x < columns; x++, i++) {
      const label = found[i], differs = (other) => other !== undefined && other !== label;
      const isEdge = isOutlined && ((x >= wide && differs(found[i - wide])) ||
        (x + wide < columns && differs(found[i + wide])) ||
        differs(found[i - wide * columns]) || differs(found[i + wide * columns]));
      let tone = label ? colour(label) : BLACK, alpha = label ? opacity : 0;
      if (isShaded) {
        const p = certainty[of(x, y)] / 255;
        tone = colour(label || 1);
        alpha = opacity * (label ? p : isPair ? 1 - p : 0);
      }
      if (isEdge) [tone, alpha] = label ? [colour(label), 1] : [BLACK, 0.8]; // two tones are seen on any tissue
      for (let k = 0; k < 3 && alpha; k++) image.data[4 * i + k] += (tone[k] - image.data[4 * i + k]) * alpha;
    }
    context.putImageData(image, 0, 0);
  }
  if (cross) {
    const [x, y] = [((cross[0] + 0.5) * columns) / width, ((cross[1] + 0.5) * rows) / height];
    for (const [style, line] of [["#000", 3], ["#fff", 1]]) {
      Object.assign(context, { strokeStyle: style, lineWidth: line });
      context.strokeRect(x - 8, y - 8, 16, 16);
    }
  }
  [by("left").textContent, by("top").textContent] = sides;
  by("slice_number").textContent = `${Number(by("slice").value) + 1} of ${Number(by("slice").max) + 1}`;
  canvas.setAttribute("aria-label", `${shown.file.name}: ${shown.said}`);
  by("figures").replaceChildren(isClasses ? classTable() : maskTable());
}

const classTable = () => element("table", {},
  ...student.classes.map((name, i) => element("tr", {}, element("th", { textContent: name }),
  element("td", { textContent: shown.probabilities[i].toFixed(3) }),
    element("td", {}, element("meter", { value: shown.probabilities[i] })),
    ...(hasFindings ? [element("td", { textContent: namesOf(shown).includes(name) ? "present" : "absent" })] : []))));

/** Pixels, voxels, areas (mm2), volumes (ml) and mean probability of each class but background. */
function figuresOf({ mask, certainty, grid }) {
  const voxel = grid && product(grid.spacing) / 1000, pixel = Number(by("pixel").value) ** 2;
  return student.classes.slice(1).map((name, i) => {
    let count = 0, sum = 0;
    for (let at = 0; at < mask.length; at++) if (mask[at] === i + 1) { count++; sum += certainty[at]; }
    const figures = [[isVolume ? "voxels" : "pixels", count.toLocaleString("en")],
      ["share of the image", `${number((100 * count) / mask.length)} %`]];
    if (voxel) figures.push(["volume", `${number(count * voxel)} ml`]);
    if (!isVolume && pixel) figures.push(["area", `${number(count * pixel)} mm²`]);
    if (count) figures.push(["mean probability", (sum / count / 255).toFixed(2)]);
    return [name, figures];
  });
}

function maskTable() {
  const rows = figuresOf(shown).flatMap(([name, figures], i) => {
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = `rgb(${colour(i + 1)})`;
    if (isVolume) figures.splice(2, 0, ["area in this slice", `${number(areaOf(i + 1))} mm²`]);
    return [element("tr", {}, element("th", { colSpan: 2 }, swatch, name)), ...figures.map(([key, value]) =>
      element("tr", {}, element("td", { textContent: key }), element("td", { textContent: value })))];
  });
  return element("table", {}, ...rows);
}

function areaOf(label) {
  const { width, height, place, pixel } = plane();
  let count = 0;
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) if (shown.mask[place(x, y)] === label) count++;
  return count * pixel;
}

function read(x, y) {
  const { width, height, place } = plane();
  cross = [clipped(x, 0, width - 1), clipped(y, 0, height - 1)];
  const i = place(...cross);
  if (shown.mask) {
    const certainty = (shown.certainty[i] / 255).toFixed(2);
    by("reading").textContent = `(${cross}): ${student.classes[shown.mask[i]]}, probability ${certainty}`;
  }
  draw();
}

function download(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** Save answers as `predict` writes them. */
async function save(answers) {
  if (isClasses) {
    const cell = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const head = ["id", "class", ...student.classes.map((name) => `p_${name.toLowerCase().replaceAll(" ", "_")}`)];
    const rows = answers.map((a) => [a.id, namesOf(a).join("|") || "none", ...a.probabilities.map((p) => p.toFixed(6))]);
    return download(new Blob([[head, ...rows].map((row) => `${row.map(cell)}\n`).join("")], { type: "text/csv" }),
      "predictions.csv");
  }
  for (const { id, mask, shape, grid } of answers) {
    const levels = student.classes.length > 2 ? mask : mask.map((label) => (label ? 255 : 0));
    if (isVolume) download(await writeVolume(mask, grid), `${id}_mask.nii.gz`);
    else download(await writePng(levels, shape[1], shape[0]), `${id}_mask.png`);
    await new Promise((resolve) => setTimeout(resolve, 200)); // browsers drop downloads that come at once
  }
}

function start() {
  document.title = by("title").textContent = student.title;
  by("about").textContent = student.about;
  by("warnings").textContent = [" ", ...student.warnings].join(" ");
  by("kinds").textContent = isVolume ? "NIfTI volumes" : "pictures (PNG, JPEG, BMP)";
  by("files").accept = isVolume ? ".nii,.gz" : ".png,.jpg,.jpeg,.bmp";
  by("calibration").textContent = student.calibration;
  by("card").replaceChildren(...markdown(student.card));
  by("slices").hidden = by("planes").hidden = !isVolume;
  by("sizes").hidden = isVolume || isClasses;
  by("reading").hidden = isClasses;
  for (const id of ["opacity", "outline", "shading"]) by(id).parentElement.hidden = isClasses;
  for (const id of ["opacity", "outline", "shading", "slice", "pixel"]) by(id).addEventListener("input", draw);
  by("plane").addEventListener("input", () => { cross = null; resetSlices(); draw(); });
  by("files").addEventListener("change", () => addFiles(by("files").files));
  by("save").onclick = () => save([shown]);
  by("save_all").onclick = () => save(entries.filter((entry) => entry.state === "done"));
  by("save_picture").onclick = () => by("canvas").toBlob((blob) => download(blob, `${shown.id}_overlay.png`));
  for (const name of ["dragover", "dragleave", "drop"]) addEventListener(name, (event) => {
    event.preventDefault();
    by("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") addFiles(event.dataTransfer.files);
  });
  by("canvas").onclick = (event) => {
    const { width, height } = plane(), box = by("canvas").getBoundingClientRect();
    read(Math.floor(((event.clientX - box.left) / box.width) * width),
      Math.floor(((event.clientY - box.top) / box.height) * height));
  };
  by("canvas").onkeydown = (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const { width, height } = plane(), [x, y] = cross || [width >> 1, height >> 1], by_ = event.shiftKey ? 10 : 1;
    read(x + by_ * step[0], y + by_ * step[1]);
  };
  busy = openStudent().then((opened) => {
    network = opened;
    const bits = network.kind === "int8" ? 8 : 32, backend = network.backend === "webgpu" ? "WebGPU" : "WebAssembly";
    by("runtime").textContent = `${bits} bits, ${backend}, ` +
      `${student.runtime} (MIT licence, Microsoft). ${student.origin}`;
    return say("Ready.");
  }, (error) => say(`The student cannot be opened: ${error.message}.`));
}

start();
