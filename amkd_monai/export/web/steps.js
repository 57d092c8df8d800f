"use strict";
/* What happens to an image before the network and to its answer after it: the steps of files/steps.py, value by value.
   An array is {data: Float32Array, shape: [channels, ...axes]}, last axis fastest. A step returns [array, way back]. */

const SPACING_TOLERANCE = 1e-3, TILT = 1e-8, TRUNCATED = 4, FEWEST_LEVELS = 16;
const LOWEST_AIR = -1100, HIGHEST_MINIMUM = -200, BRIGHTEST = 0.75;
const PAIRS = ["LR", "PA", "IS"]; // of letters for the ends of an axis; the second is the positive direction

const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
const zeros = (shape) => ({ data: new Float32Array(product(shape)), shape });
const clipped = (value, low, high) => Math.min(Math.max(value, low), high);

function roundEven(value) {
  const nearest = Math.round(value);
  return nearest - value === 0.5 && nearest % 2 ? nearest - 1 : nearest;
}

function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) sum += term *= (2 * x * x) / (2 * n + 1);
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

/** Rows {start, weights} of the matrix that interpolates one axis of a size at places. */
function interpolation(places, size) {
  return places.map((at) => {
    const place = clipped(at, 0, size - 1), low = Math.floor(place), part = place - low;
    return low + 1 < size ? { start: low, weights: [1 - part, part] } : { start: low, weights: [1] };
  });
}

/** Rows of the matrix that resizes one axis, pixel areas aligned; a Gaussian comes first where it shrinks. */
function resizing(size, count, smooth) {
  const rows = interpolation(Array.from({ length: count }, (_, i) => ((i + 0.5) * size) / count - 0.5), size);
  const sigma = (size / count - 1) / 2;
  if (!smooth || sigma <= 0) return rows;
  const tail = Math.floor(Math.max(sigma * TRUNCATED, 0.5) + 0.5), scale = Math.sqrt(0.5) / sigma;
  const taps = Array.from({ length: 2 * tail + 1 }, (_, i) => // integrated over each pixel, zeros beyond the border
    0.5 * (erf(scale * (i - tail + 0.5)) - erf(scale * (i - tail - 0.5))));
  return rows.map(({ start, weights }) => {
    const first = Math.max(start - tail, 0), last = Math.min(start + weights.length - 1 + tail, size - 1);
    const blurred = new Array(last - first + 1).fill(0);
    weights.forEach((weight, w) => taps.forEach((tap, t) => {
      const place = start + w + t - tail;
      if (place >= 0 && place < size) blurred[place - first] += weight * tap;
    }));
    return { start: first, weights: blurred };
  });
}

function alongAxis(array, axis, rows) {
  const shape = array.shape.slice(), size = shape[axis];
  const outer = product(shape.slice(0, axis)), inner = product(shape.slice(axis + 1));
  shape[axis] = rows.length;
  const result = zeros(shape), from = array.data, to = result.data;
  for (let o = 0; o < outer; o++) {
    rows.forEach(({ start, weights }, row) => {
      const at = (o * rows.length + row) * inner;
      weights.forEach((weight, w) => {
        const source = (o * size + start + w) * inner;
        for (let k = 0; k < inner; k++) to[at + k] += weight * from[source + k];
      });
    });
  }
  return result;
}

const alongAxes = (array, matrices) => matrices.reduce((a, rows, axis) => alongAxis(a, axis + 1, rows), array);
const four = (shape) => (shape.length === 4 ? shape : [shape[0], 1, ...shape.slice(1)]);

/** The part of an array from `starts` on with the given sizes, zeros where it lies outside. */
function reframed(array, sizes, starts) {
  const result = zeros([array.shape[0], ...sizes]);
  const [channels, depth, height, width] = four(array.shape), [, layers, rows, columns] = four(result.shape);
  const [front, top, left] = [0, ...starts].slice(-3);
  const first = Math.max(left, 0), last = Math.min(left + columns, width);
  for (let c = 0; c < channels; c++) for (let i = 0; i < layers; i++) for (let j = 0; j < rows; j++) {
    const z = i + front, y = j + top, row = ((c * depth + z) * height + y) * width;
    if (z < 0 || z >= depth || y < 0 || y >= height || last <= first) continue;
    result.data.set(array.data.subarray(row + first, row + last),
      ((c * layers + i) * rows + j) * columns + first - left);
  }
  return result;
}

/** Axes of (C, X, Y, Z) in another order: new axis j is old axis sources[j], backwards where flips[j]. */
function transposed(array, sources, flips) {
  const sizes = sources.map((s) => array.shape[s + 1]), result = zeros([array.shape[0], ...sizes]);
  const strides = [1, 2, 3].map((axis) => product(array.shape.slice(axis + 1)));
  const steps = sources.map((s, j) => (flips[j] ? -strides[s] : strides[s]));
  const origin = sources.reduce((sum, s, j) => sum + (flips[j] ? strides[s] * (sizes[j] - 1) : 0), 0);
  let to = 0;
  for (let c = 0; c < array.shape[0]; c++) for (let i = 0; i < sizes[0]; i++) for (let j = 0; j < sizes[1]; j++) {
    let from = c * product(sizes) + origin + i * steps[0] + j * steps[1];
    for (let k = 0; k < sizes[2]; k++, from += steps[2]) result.data[to++] = array.data[from];
  }
  return result;
}

/** Which old axis each letter of `axes` is, in an array whose axes point to `codes`, and whether it runs backwards. */
function orderTo(codes, axes) {
  const pair = (letter) => PAIRS.findIndex((letters) => letters.includes(letter));
  const sources = [...axes].map((letter) => [...codes].findIndex((own) => pair(own) === pair(letter)));
  return [sources, sources.map((s, j) => codes[s] !== axes[j])];
}

function toUnit(array, low, high) {
  const base = Math.fround(low), range = Math.fround(high - low || 1);
  return { data: array.data.map((v) => clipped(Math.fround(v - base) / range, 0, 1)), shape: array.shape };
}

function percentiles(data, shares) {
  const sorted = data.slice().sort();
  return shares.map((share) => {
    const place = (share / 100) * (sorted.length - 1), low = Math.floor(place),
      next = Math.min(low + 1, sorted.length - 1);
    return sorted[low] + (sorted[next] - sorted[low]) * (place - low);
  });
}

function extremes(data, least = -Infinity) {
  let low = Infinity, high = -Infinity;
  for (const v of data) {
    if (v < low && v >= least) low = v;
    if (v > high) high = v;
  }
  return [low, high];
}

function ctRange(data, low, high, values) {
  const ends = { hu: [low, high], levels: [0, 255], shares: [0, 1] };
  if (ends[values]) return ends[values];
  let [lowest, highest] = extremes(data);
  if (lowest < LOWEST_AIR && LOWEST_AIR <= highest) lowest = extremes(data, LOWEST_AIR)[0]; // padding
  if (lowest <= HIGHEST_MINIMUM) return ends.hu;
  const known = ["shares", "levels"].find((n) =>
    lowest >= 0 && BRIGHTEST * ends[n][1] <= highest && highest <= ends[n][1]);
  if (known) return ends[known];
  throw new Error(`the values ${lowest} to ${highest} are neither Hounsfield units nor windowed to 0..255 or 0..1: ` +
    "take off an offset such as 1024");
}

const STEPS = {
  scale: (array, grid, { low, high }) => [toUnit(array, low, high)],
  scale_percentiles(array, grid, { lower, upper, channel_wise }) {
    const result = zeros(array.shape), length = array.data.length / (channel_wise ? array.shape[0] : 1);
    for (let at = 0; at < array.data.length; at += length) {
      const data = array.data.subarray(at, at + length);
      result.data.set(toUnit({ data }, ...percentiles(data, [lower, upper])).data, at);
    }
    return [result];
  },
  ct_window: (array, grid, { low, high, values }) => [toUnit(array, ...ctRange(array.data, low, high, values))],
  crop_disc(array, grid, { background_level, least_part }) {
    const [channels, height, width] = array.shape, plane = height * width, brightest = new Float32Array(plane);
    for (let c = 0; c < channels; c++) for (let i = 0; i < plane; i++) {
      brightest[i] = c ? Math.max(brightest[i], array.data[c * plane + i]) : array.data[i];
    }
    const level = Math.fround(background_level * Math.max(extremes(brightest)[1], 1e-6));
    const rows = new Array(height).fill(0), columns = new Array(width).fill(0);
    brightest.forEach((v, i) => { if (v > level) { rows[Math.floor(i / width)]++; columns[i % width]++; } });
    const [[top, bottom], [left, right]] = [[rows, width], [columns, height]].map(([counts, across]) => {
      const used = counts.map((count) => count / across > least_part);
      return used.includes(true) ? [used.indexOf(true), used.lastIndexOf(true) + 1] : [0, counts.length];
    });
    const side = Math.max(bottom - top, right - left);
    const before = [side - (bottom - top), side - (right - left)].map((missing) => Math.floor(missing / 2));
    const disc = reframed(array, [bottom - top, right - left], [top, left]);
    return [reframed(disc, [side, side], before.map((n) => -n))];
  },
  neighbours(array) {
    const depth = array.shape[1], plane = array.data.length / depth, result = zeros([3, ...array.shape.slice(1)]);
    [-1, 0, 1].forEach((shift, c) => {
      for (let i = 0; i < depth; i++) {
        const from = clipped(i + shift, 0, depth - 1) * plane;
        result.data.set(array.data.subarray(from, from + plane), (c * depth + i) * plane);
      }
    });
    return [result];
  },
  orientation(array, grid, { axes }) {
    const [sources, flips] = orderTo(grid.codes, axes), [back, unflips] = orderTo(axes, grid.codes);
    return [transposed(array, sources, flips), (answer) => transposed(answer, back, unflips)];
  },
  resize(array, grid, { size, anti_aliasing }) {
    const sizes = array.shape.slice(1);
    if (sizes.every((n, i) => n === size[i])) return [array];
    const there = sizes.map((n, i) => resizing(n, size[i], anti_aliasing));
    const back = sizes.map((n, i) => resizing(size[i], n, false));
    return [alongAxes(array, there), (answer) => alongAxes(answer, back)];
  },
  spacing(array, grid, { pixdim }) {
    const there = [], back = [], sizes = array.shape.slice(1), old = grid.spacing;
    const ratios = old.map((v, i) => (Math.abs(v - pixdim[i]) <= SPACING_TOLERANCE ? v : pixdim[i]) / v);
    const cosine = (i, j) => grid.axes[i].reduce((sum, v, k) => sum + v * grid.axes[j][k], 0);
    const off = sizes.map((_, i) => sizes.map((size, j) => // how far an axis leads along those before it
      (j > i ? (((size - 1) * old[j]) / old[i] / ratios[i]) * cosine(i, j) : 0)));
    const isTilted = off.some((row) => row.reduce((sum, v) => sum + Math.min(v, 0), 0) < -TILT); // as in steps.py
    sizes.forEach((size, i) => {
      const ratio = ratios[i], count = roundEven((size - 1) / ratio + off[i].reduce((sum, v) => sum + Math.abs(v), 1));
      const first = isTilted ? (size - count * ratio) / 2 : 0;
      there.push(interpolation(Array.from({ length: count }, (_, k) => first + k * ratio), size));
      back.push(interpolation(Array.from({ length: size }, (_, k) => (k - first) / ratio), count));
    });
    return [alongAxes(array, there), (answer) => alongAxes(answer, back)];
  },
  crop(array, grid, { size }) {
    const sizes = array.shape.slice(1), kept = sizes.map((n, i) => (size[i] < 0 ? n : Math.min(size[i], n)));
    const starts = sizes.map((n, i) => Math.max(Math.floor(n / 2) - Math.floor(kept[i] / 2), 0));
    return [reframed(array, kept, starts), (answer) => reframed(answer, sizes, starts.map((n) => -n))];
  },
  pad(array, grid, { size }) {
    const sizes = array.shape.slice(1), wanted = sizes.map((n, i) => Math.max(size[i], n));
    const before = sizes.map((n, i) => Math.floor((wanted[i] - n) / 2));
    return [reframed(array, wanted, before.map((n) => -n)), (answer) => reframed(answer, sizes, before)];
  },
};

/** Apply the steps of a description; return the network's input and the ways back, first step first. */
function prepare(array, steps, grid) {
  const backs = [];
  for (const { step, ...settings } of steps) {
    if (!Object.hasOwn(STEPS, step)) throw new Error(`there is no step '${step}' in this version: export again`);
    const [changed, back] = STEPS[step](array, grid, settings);
    array = changed;
    if (back) backs.push(back);
    if (step === "orientation") {
      const [sources, flips] = orderTo(grid.codes, settings.axes);
      grid = { codes: settings.axes, spacing: sources.map((s) => grid.spacing[s]),
        axes: sources.map((s, j) => grid.axes[s].map((v) => (flips[j] ? -v : v))) };
    }
  }
  return [array, backs];
}

/** Say that levels, Uint8Array or in [0, 1], are almost all the same; empty if they are not. */
function levelProblem(levels) {
  let found = new Set();
  for (const sampled of [4000, 1000000]) {
    const step = Math.max(1, Math.floor(levels.length / sampled)), isWhole = levels instanceof Uint8Array;
    found = new Set();
    for (let i = 0; i < levels.length; i += step) {
      found.add(isWhole ? levels[i] : roundEven(Math.fround(clipped(levels[i], 0, 1) * 255)));
    }
    if (found.size > Math.min(FEWEST_LEVELS, Math.floor(levels.length / 64))) return "";
  }
  const [low, high] = extremes(found);
  return `it has only ${found.size} of 256 levels (from ${low} to ${high}): it is blank or its scale is unknown`;
}

/** Probabilities along the second axis of logits (B, C, ...), in place. */
function softmax(data, [batch, classes, ...rest]) {
  const places = product(rest);
  for (let b = 0; b < batch; b++) for (let p = 0; p < places; p++) {
    const at = (c) => (b * classes + c) * places + p;
    let highest = -Infinity, sum = 0;
    for (let c = 0; c < classes; c++) highest = Math.max(highest, data[at(c)]);
    for (let c = 0; c < classes; c++) sum += data[at(c)] = Math.exp(data[at(c)] - highest);
    for (let c = 0; c < classes; c++) data[at(c)] /= sum;
  }
}

/** Keep only the largest connected part of a label of a mask of three axes, diagonal neighbours included, in place. */
function keepLargest(mask, label, shape) {
  const [depth, height, width] = [1, ...shape].slice(-3), part = new Int32Array(mask.length), counts = [0], stack = [];
  for (let seed = 0; seed < mask.length; seed++) {
    if (mask[seed] !== label || part[seed]) continue;
    const number = counts.push(0) - 1;
    part[seed] = number;
    stack.push(seed);
    while (stack.length) {
      const at = stack.pop(), x = at % width, y = Math.floor(at / width) % height,
        z = Math.floor(at / (width * height));
      counts[number]++;
      for (let k = Math.max(z - 1, 0); k <= Math.min(z + 1, depth - 1); k++)
        for (let j = Math.max(y - 1, 0); j <= Math.min(y + 1, height - 1); j++)
          for (let i = Math.max(x - 1, 0); i <= Math.min(x + 1, width - 1); i++) {
            const next = (k * height + j) * width + i;
            if (mask[next] === label && !part[next]) { part[next] = number; stack.push(next); }
          }
    }
  }
  const largest = counts.indexOf(Math.max(...counts.slice(1)), 1);
  for (let i = 0; i < mask.length; i++) if (part[i] && part[i] !== largest) mask[i] = 0;
}
