"use strict";
/* Pictures and NIfTI volumes as files/pictures.py and files/volumes.py read and write them. PNG is decoded here, for a
   browser keeps 8 bits of 16 and applies colour profiles; JPEG is stripped of profile and orientation first. */

const DAMAGED = "it is damaged or cut short: replace it by an intact copy";
const MOST_BYTES = 2 ** 30, MOST_PIXELS = 1e8, FULL_SCALES = [255, 4095, 65535];
const MILLIMETRES = { 0: 1, 1: 1000, 2: 1, 3: 0.001 };
const AXES_OF_PASSES = [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2],
  [0, 1, 1, 2]];

const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
const latin = (bytes) => Array.from(bytes, (b) => String.fromCharCode(b)).join("");
const bytesOf = (text) => Uint8Array.from(text, (c) => c.charCodeAt(0));

function ensure(condition, sentence) {
  if (!condition) throw new Error(sentence);
}

const joined = async (parts) => new Uint8Array(await new Blob(parts).arrayBuffer());

/** Bytes sent through a compression or decompression stream; more than `most` bytes are refused. */
async function through(bytes, stream, most = 2 * MOST_BYTES) {
  let total = 0; // a blob streams by parts, so that `most` stops what unpacks to too much
  const parts = [], reader = new Blob([bytes]).stream().pipeThrough(stream).getReader();
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    parts.push(read.value);
    ensure((total += read.value.length) <= most, "it unpacks to more than this page can hold: use `predict`");
  }
  return joined(parts);
}

async function inflated(bytes, format, most) {
  try {
    return await through(bytes, new DecompressionStream(format), most);
  } catch (error) {
    throw error instanceof TypeError ? new Error(DAMAGED) : error;
  }
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});
const crcOf = (bytes) => ~bytes.reduce((crc, byte) => CRC[(crc ^ byte) & 255] ^ (crc >>> 8), -1) >>> 0;

/** EXIF orientation, 1 to 8, of a TIFF header, or of XMP where the header has none. */
function orientationOf(exif, xmp) {
  if (exif && exif.length >= 8) {
    const view = viewOf(exif), little = exif[0] === 0x49, start = view.getUint32(4, little);
    const count = start + 2 <= exif.length ? view.getUint16(start, little) : 0;
    for (let at = start + 2; at < start + 2 + 12 * count && at + 12 <= exif.length; at += 12) {
      if (view.getUint16(at, little) !== 0x0112) continue;
      const tag = view.getUint16(at + 8, little);
      return tag >= 1 && tag <= 8 ? tag : 1;
    }
  }
  const found = /tiff:Orientation(?:="|>)([1-8])/.exec(xmp || "");
  return found ? Number(found[1]) : 1;
}

/** Pixels (H, W, 3) turned by an EXIF orientation. */
function upright({ data, width, height }, tag) {
  if (tag === 1) return { data, width, height };
  const [columns, rows] = tag >= 5 ? [height, width] : [width, height], result = new Uint8Array(data.length);
  const up = [3, 4, 7, 8].includes(tag), across = [2, 3, 6, 7].includes(tag);
  for (let y = 0, to = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
    const row = up ? rows - 1 - y : y, column = across ? columns - 1 - x : x;
    const from = 3 * (tag >= 5 ? column * width + row : row * width + column);
    for (let k = 0; k < 3; k++) result[to++] = data[from + k];
  }
  return { data: result, width: columns, height: rows };
}

/** Colours blended onto black, with the rounding of Pillow. */
function overBlack(level, alpha) {
  const sum = level * alpha * 128 + 0x4000;
  return alpha ? ((sum >> 8) + sum) >> 15 : 0;
}

/** What the filters 1 to 4 of PNG expect of a byte from those on its left, above, and above the left. */
const PREDICTED = [null, (a) => a, (a, b) => b, (a, b) => (a + b) >> 1, (a, b, c) => {
  const pa = Math.abs(b - c), pb = Math.abs(a - c), pc = Math.abs(a + b - 2 * c);
  return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
}];

async function readPng(bytes) {
  const view = viewOf(bytes), data = [], chunks = {};
  let ended = false, xmp = "";
  for (let at = 8; at + 12 <= bytes.length && !ended; at += 12 + view.getUint32(at)) {
    const length = view.getUint32(at), name = latin(bytes.subarray(at + 4, at + 8)),
      body = bytes.subarray(at + 8, at + 8 + length);
    ensure(at + 12 + length <= bytes.length &&
      crcOf(bytes.subarray(at + 4, at + 8 + length)) === view.getUint32(at + 8 + length), DAMAGED);
    ensure(name !== "acTL" || viewOf(body).getUint32(0) < 2, "it is an animation: save one picture as a file");
    ensure(!/^Raw profile type exif/.test(latin(body.subarray(0, 30))),
      "its orientation stands in a text: save it anew");
    if (name === "IDAT") data.push(body);
    else chunks[name] = body;
    if (name === "iTXt" && /^XML:com.adobe.xmp\0\0/.test(latin(body.subarray(0, 24)))) xmp = latin(body);
    ended = name === "IEND";
  }
  ensure(ended && chunks.IHDR, DAMAGED);
  const head = viewOf(chunks.IHDR), [width, height] = [head.getUint32(0), head.getUint32(4)];
  const [bits, kind, , , interlaced] = chunks.IHDR.subarray(8), channels = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }[kind];
  ensure(channels && [1, 2, 4, 8, 16].includes(bits) && width * height, "its header is damaged: replace the file");
  ensure(width * height <= MOST_PIXELS,
    `it has ${width} x ${height} pixels, more than this page takes: use \`predict\``);
  const raw = await inflated(await joined(data), "deflate", width * height * channels * 2 + 16 * height + 64);
  const samples = new Uint16Array(width * height * channels), back = Math.max(1, (bits * channels) >> 3);
  let at = 0;
  for (const [left, top, dx, dy] of interlaced ? AXES_OF_PASSES : [[0, 0, 1, 1]]) {
    const columns = Math.ceil((width - left) / dx), rows = Math.ceil((height - top) / dy);
    const length = Math.ceil((columns * channels * bits) / 8);
    if (columns <= 0 || rows <= 0) continue;
    let above = new Uint8Array(length);
    for (let row = 0; row < rows; row++, at += length) {
      const filter = raw[at++], line = raw.subarray(at, at + length);
      ensure(line.length === length && filter <= 4, DAMAGED);
      for (let i = 0, predicted = PREDICTED[filter]; i < length && filter; i++) {
        line[i] += predicted(i < back ? 0 : line[i - back], above[i], i < back ? 0 : above[i - back]);
      }
      for (let x = 0; x < columns; x++) for (let k = 0; k < channels; k++) {
        const i = x * channels + k, bit = i * bits;
        const to = ((top + row * dy) * width + left + x * dx) * channels + k;
        if (bits === 16) samples[to] = (line[2 * i] << 8) | line[2 * i + 1];
        else samples[to] = bits === 8 ? line[i] : (line[bit >> 3] >> (8 - bits - (bit & 7))) & ((1 << bits) - 1);
      }
      above = line;
    }
  }
  return upright({ data: pngColours(samples, bits, kind, channels, chunks), width, height },
    orientationOf(chunks.eXIf, xmp));
}

function pngColours(samples, bits, kind, channels, { PLTE, tRNS }) {
  if (kind === 2 && bits === 8 && !tRNS) return Uint8Array.from(samples);
  const count = samples.length / channels, result = new Uint8Array(3 * count);
  const keys = tRNS && kind !== 3 ? Array.from({ length: channels }, (_, k) => viewOf(tRNS).getUint16(2 * k)) : null;
  ensure(!(keys && kind === 2 && bits === 16), "it has 16 bits and a transparent colour: save it without transparency");
  ensure(kind !== 3 || PLTE, "its palette is missing: replace the file");
  const white = kind || bits < 16 ? (1 << bits) - 1 :
    FULL_SCALES.find((scale) => samples.every((level) => level <= scale));
  for (let i = 0; i < count; i++) {
    const of = samples.subarray(i * channels, (i + 1) * channels);
    let alpha = 255, rgb;
    if (kind === 3) {
      ensure(3 * of[0] + 2 < PLTE.length, "its palette is too short: replace the file");
      rgb = PLTE.subarray(3 * of[0], 3 * of[0] + 3);
      if (tRNS && of[0] < tRNS.length) alpha = tRNS[of[0]];
    } else {
      const level = (v) => (bits === 8 ? v : bits === 16 && kind ? v >> 8 : Math.floor((v * 255) / white));
      rgb = channels < 3 ? new Array(3).fill(level(of[0])) : [level(of[0]), level(of[1]), level(of[2])];
      if (channels % 2 === 0) alpha = level(of[channels - 1]);
      if (keys && bits < 16 && keys.every((key, k) => of[k] === key)) alpha = 0;
    }
    for (let k = 0; k < 3; k++) result[3 * i + k] = alpha === 255 ? rgb[k] : overBlack(rgb[k], alpha);
  }
  return result;
}

/** Decode by the browser; profiles and orientations must be gone. */
async function readByBrowser(bytes, type) {
  const drawn = (image, width, height) => {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
    image instanceof ImageData ? context.putImageData(image, 0, 0) : context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, width, height).data;
  };
  const pattern = Uint8ClampedArray.from({ length: 1024 }, (_, i) => (i % 4 === 3 ? 255 : (i * 37) % 256));
  ensure(drawn(new ImageData(pattern, 16), 16, 16).every((v, i) => v === pattern[i]),
    "this browser changes what is read from pictures (protection against fingerprinting): allow it, or save as PNG");
  const options = { colorSpaceConversion: "none", imageOrientation: "none", premultiplyAlpha: "none" };
  const image = await createImageBitmap(new Blob([bytes], { type }), options).catch(() => {
    throw new Error("the browser cannot decode it: replace it by an intact copy, or save it as PNG");
  });
  const { width, height } = image, rgba = drawn(image, width, height), data = new Uint8Array(3 * width * height);
  for (let i = 0; i < data.length; i++) data[i] = rgba[4 * Math.floor(i / 3) + (i % 3)];
  return { data, width, height };
}

async function readJpeg(bytes) {
  const view = viewOf(bytes), kept = [bytes.subarray(0, 2)];
  let at = 2, exif, xmp, size;
  for (let marker = 0; marker !== 0xda; ) {
    while (bytes[at + 1] === 0xff) at++;
    ensure(at + 4 <= bytes.length && bytes[at] === 0xff, DAMAGED);
    marker = bytes[at + 1];
    const end = at + 2 + view.getUint16(at + 2), body = bytes.subarray(at + 4, end), head = latin(body.subarray(0, 30));
    if (marker === 0xe1 && head.startsWith("Exif\0\0")) exif = exif || body.subarray(6);
    if (marker === 0xe1 && head.startsWith("http://ns.adobe.com/xap/1.0/")) xmp = latin(body);
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      ensure(marker <= 0xc2 && body[0] === 8 && [1, 3].includes(body[5]),
        "it is a JPEG in print colours (CMYK) or of a rare kind, which browsers decode differently: save it as PNG");
      size = [viewOf(body).getUint16(3), viewOf(body).getUint16(1)];
    }
    if (marker !== 0xe1 && marker !== 0xe2) kept.push(bytes.subarray(at, end));
    at = end;
  }
  ensure(size && size[0] * size[1] <= MOST_PIXELS && Math.max(...size) <= 16384,
    "it has more pixels than this page takes");
  let end = at;
  while (end + 1 < bytes.length && !(bytes[end] === 0xff && bytes[end + 1] === 0xd9)) end++;
  ensure(end + 1 < bytes.length, DAMAGED);
  kept.push(bytes.subarray(at, end + 2));
  return upright(await readByBrowser(new Blob(kept), "image/jpeg"), orientationOf(exif, xmp));
}

async function readBmp(bytes) {
  const view = viewOf(bytes), plain = bytes.length > 54 && view.getUint32(14, true) >= 40 && !view.getUint32(30, true);
  ensure(plain && [1, 4, 8, 24].includes(view.getUint16(28, true)), "it is a BMP of a rare kind: save it as PNG");
  ensure(Math.abs(view.getInt32(18, true) * view.getInt32(22, true)) <= MOST_PIXELS,
    "it has more pixels than this page takes");
  ensure(bytes.length >= view.getUint32(2, true), "it is cut short: replace it by an intact copy");
  return readByBrowser(bytes, "image/bmp");
}

/** Read a picture of any mode as {data (H, W, 3), width, height}, upright. */
async function readPicture(bytes) {
  const start = latin(bytes.subarray(0, 8));
  ensure(!latin(bytes.subarray(0, 512)).includes(student.mark), "it is a prediction: give the image it was made from");
  ensure(!/^(II\*|MM\0)/.test(start), "browsers do not read TIFF: save it as PNG, or use `predict`");
  const read = [["\x89PNG\r\n\x1a\n", readPng], ["\xff\xd8\xff", readJpeg], ["BM", readBmp]]
    .find(([head]) => start.startsWith(head));
  ensure(read, "the student takes pictures (PNG, JPEG, BMP), which this is not");
  const picture = await read[1](bytes), problem = levelProblem(picture.data);
  ensure(!problem, problem);
  return picture;
}

function pngChunk(name, body) {
  const bytes = new Uint8Array(body.length + 12), view = viewOf(bytes);
  view.setUint32(0, body.length);
  bytes.set(bytesOf(name), 4);
  bytes.set(body, 8);
  view.setUint32(body.length + 8, crcOf(bytes.subarray(4, body.length + 8)));
  return bytes;
}

/** Write levels (H, W) as a PNG of 8 bits, marked as a prediction. */
async function writePng(levels, width, height) {
  const head = new Uint8Array(13), lines = new Uint8Array((width + 1) * height);
  viewOf(head).setUint32(0, width);
  viewOf(head).setUint32(4, height);
  head[8] = 8;
  for (let y = 0; y < height; y++) lines.set(levels.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const packed = await through(lines, new CompressionStream("deflate"));
  return new Blob([bytesOf("\x89PNG\r\n\x1a\n"), pngChunk("IHDR", head),
    pngChunk("tEXt", bytesOf(`Software\0${student.mark}`)),
    pngChunk("IDAT", packed), pngChunk("IEND", new Uint8Array(0))], { type: "image/png" });
}

const VOXELS = { 2: ["Uint8", 1], 4: ["Int16", 2], 8: ["Int32", 4], 16: ["Float32", 4], 64: ["Float64", 8],
  256: ["Int8", 1], 512: ["Uint16", 2], 768: ["Uint32", 4], 1024: ["BigInt64", 8], 1280: ["BigUint64", 8] };

/** Fields of a NIfTI header, version 1 or 2. */
function niftiHeader(view) {
  const little = [348, 540].includes(view.getInt32(0, true)), size = view.getInt32(0, little), first = size === 348;
  ensure(first || size === 540, "it is no NIfTI volume (.nii, .nii.gz): give one");
  const magic = latin(new Uint8Array(view.buffer, view.byteOffset + (first ? 344 : 4), 3));
  ensure(magic === (first ? "n+1" : "n+2"),
    "it is half of a pair of files or no NIfTI volume: save it as one .nii file");
  const real = (at) => (first ? view.getFloat32(at, little) : view.getFloat64(at, little));
  const reals = (one, two, count) =>
    Array.from({ length: count }, (_, i) => real((first ? one : two) + i * (first ? 4 : 8)));
  const code = (one, two) => (first ? view.getInt16(one, little) : view.getInt32(two, little));
  const dim = Array.from({ length: 8 }, (_, i) =>
    first ? view.getInt16(40 + 2 * i, little) : Number(view.getBigInt64(16 + 8 * i, little)));
  const type = view.getInt16(first ? 70 : 12, little);
  return { little, dim, type, pixdim: reals(76, 104, 8),
    offset: first ? real(108) : Number(view.getBigInt64(168, little)),
    scale: reals(112, 176, 2), qform: code(252, 344), sform: code(254, 348), quaternion: reals(256, 352, 3),
    origin: reals(268, 376, 3), rows: reals(280, 400, 12),
    units: first ? view.getUint8(123) : view.getInt32(500, little) };
}

/** Affine (3 rows of 4) that a header gives, in its units. */
function affineOf({ sform, rows, quaternion: [b, c, d], pixdim, origin }) {
  if (sform) return [rows.slice(0, 4), rows.slice(4, 8), rows.slice(8, 12)];
  const a = Math.sqrt(Math.max(1 - b * b - c * c - d * d, 0)),
    zooms = [pixdim[1], pixdim[2], pixdim[3] * (pixdim[0] < 0 ? -1 : 1)];
  ensure(1 - b * b - c * c - d * d > -1e-6 && Math.min(...pixdim.slice(1, 4)) > 0,
    "its orientation (qform) is damaged: correct its header");
  const turn = [[a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
    [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
    [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c]];
  return turn.map((row, i) => [...row.map((v, j) => v * zooms[j]), origin[i]]);
}

/** Spacing (mm) and letters of the ends of the axes, after the checks of files/volumes.py. */
function gridOf(header, shape) {
  ensure(header.sform || header.qform,
    "it does not say where its axes point (sform and qform are unset): set its orientation");
  const unit = MILLIMETRES[header.units & 7];
  ensure(unit, "its units are unknown: correct its header");
  const affine = affineOf(header).map((row) => row.map((v) => v * unit));
  ensure(affine.flat().every(Number.isFinite), "it has an affine that is not finite: correct its header");
  const exact = [0, 1, 2].map((j) => Math.hypot(affine[0][j], affine[1][j], affine[2][j]));
  ensure(Math.min(...exact) >= 1e-3 && Math.max(...exact) <= 100,
    `it has voxels of ${exact.join(" x ")} mm: its units must be wrong`);
  const axes = [0, 1, 2].map((j) => affine.map((row) => row[j] / exact[j]));
  const dots = [[0, 1], [0, 2], [1, 2]].map(([i, j]) => axes[i].reduce((sum, v, k) => sum + v * axes[j][k], 0));
  ensure(Math.max(...dots.map(Math.abs)) <= 1e-3,
    "it has axes that are not at right angles (sheared): resample it first");
  const stated = header.pixdim.slice(1, 4).map((v) => Math.abs(v) * unit);
  ensure(!header.sform || exact.every((v, i) => Math.abs(v - stated[i]) <= 0.01 * Math.max(...stated)),
    "its sform and its pixdim give different voxel sizes: correct its header");
  const codes = [], free = new Set([0, 1, 2]), steepest = [0, 1, 2].sort((i, j) => // the clearest axis chooses first
    Math.max(...axes[j].map(Math.abs)) - Math.max(...axes[i].map(Math.abs)));
  for (const j of steepest) {
    const out = [...free].reduce((best, i) => (Math.abs(axes[j][i]) > Math.abs(axes[j][best]) ? i : best));
    free.delete(out);
    codes[j] = PAIRS[out][axes[j][out] > 0 ? 1 : 0];
  }
  return { shape, axes, codes: codes.join(""), spacing: exact.map((v) => Math.round(v * 1e6) / 1e6), header };
}

/** Read a NIfTI volume: values of (1, X, Y, Z) and the grid. */
async function readVolume(bytes) {
  if (bytes[0] === 0x1f && bytes[1] === 0x8b) bytes = await inflated(bytes, "gzip");
  ensure(bytes.length > 540, "the student takes NIfTI volumes (.nii, .nii.gz), which this is not");
  ensure(!latin(bytes.subarray(0, 512)).includes(student.mark), "it is a prediction: give the volume it was made from");
  const view = viewOf(bytes), header = niftiHeader(view), shape = header.dim.slice(1, header.dim[0] + 1);
  while (shape.length > 3 && shape.at(-1) === 1) shape.pop();
  ensure(shape.length === 3 && Math.min(...shape) >= 1, `it has the shape ${shape.join("x")}: give a volume of 3 axes`);
  ensure(VOXELS[header.type],
    `it holds values of the NIfTI type ${header.type}: give a volume of one real number per voxel`);
  const grid = gridOf(header, shape), [kind, width] = VOXELS[header.type], [X, Y, Z] = shape,
    get = view[`get${kind}`].bind(view);
  ensure(header.offset >= 0 && header.offset + X * Y * Z * width <= bytes.length,
    "it ends before its last voxel: replace it");
  const isScaled = header.scale[0] && Number.isFinite(header.scale[0]),
    [slope, shift] = isScaled ? header.scale : [1, 0];
  ensure(Number.isFinite(shift), "its scaling is damaged: correct its header");
  const array = zeros([1, X, Y, Z]);
  for (let z = 0, at = header.offset; z < Z; z++) for (let y = 0; y < Y; y++) for (let x = 0; x < X; x++, at += width) {
    array.data[(x * Y + y) * Z + z] = Number(get(at, header.little)) * slope + shift;
  }
  ensure(array.data.every(Number.isFinite), "it holds values that are not finite: replace the file");
  return { array, grid };
}

/** Write a mask (X, Y, Z) as .nii.gz with the geometry of a grid's header. */
async function writeVolume(mask, { shape: [X, Y, Z], header }) {
  const bytes = new Uint8Array(352 + mask.length), view = viewOf(bytes);
  const reals = (at, values) => values.forEach((v, i) => view.setFloat32(at + 4 * i, v, true));
  view.setInt32(0, 348, true);
  [3, X, Y, Z, 1, 1, 1, 1].forEach((n, i) => view.setInt16(40 + 2 * i, n, true));
  [[38, "r"], [148, student.mark], [344, "n+1"]].forEach(([at, text]) => bytes.set(bytesOf(text), at));
  [[70, 2], [72, 8], [252, header.qform], [254, header.sform]].forEach(([at, v]) => view.setInt16(at, v, true));
  reals(76, [...header.pixdim.slice(0, 4), 1, 1, 1, 1]);
  reals(108, [352, 1, 0]);
  bytes[123] = header.units & 7;
  reals(256, [...header.quaternion, ...header.origin, ...header.rows]);
  for (let z = 0, to = 352; z < Z; z++) for (let y = 0; y < Y; y++) for (let x = 0; x < X; x++) {
    bytes[to++] = mask[(x * Y + y) * Z + z];
  }
  return new Blob([await through(bytes, new CompressionStream("gzip"))], { type: "application/gzip" });
}
