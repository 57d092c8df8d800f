"use strict";
/* The student by ONNX Runtime Web, and its answers on the grid of the input. Everything comes from scripts beside the
   page: pages from disk may not fetch. */

const VERSION = 3; // of configs/predict.json
const packed = {}; // filled by the scripts that `export` wrote

function load(file) {
  return new Promise((resolve, reject) => {
    const script = Object.assign(document.createElement("script"), { src: file, onload: resolve });
    script.onerror = () => reject(new Error(`${file} is missing beside the page: copy the whole folder`));
    document.head.append(script);
  });
}

/** Bytes of a script of `export`: compressed, two in each letter, those of numbers of `planes` bytes apart. */
async function unpacked(name) {
  await load(`${name}.js`);
  const { size, length, planes, text } = packed[name], letters = new Uint16Array(text.length);
  for (let i = 0, to = 0; i < text.length; i++) {
    const letter = text.charCodeAt(i);
    letters[to++] = letter === 0xe000 ? text.charCodeAt(++i) ^ 0x8000 : letter;
  }
  delete packed[name];
  const apart = await inflated(new Uint8Array(letters.buffer, 0, length), "gzip"),
    result = new Uint8Array(apart.length);
  if (planes === 1) return apart;
  const count = apart.length / planes;
  for (let k = 0; k < planes; k++) for (let i = 0; i < count; i++) result[i * planes + k] = apart[k * count + i];
  return result.subarray(0, size);
}

/** The image on which `export` noted the student's probabilities. */
function checkImage([channels, height, width]) {
  const image = zeros([1, channels, height, width]);
  for (let c = 0, i = 0; c < channels; c++) for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    image.data[i++] = 0.5 + 0.25 * Math.sin(y / 7 + c) + 0.25 * Math.cos(x / 11);
  }
  return image;
}

/** Open one network on one backend; one that does not answer as the exported network is an error. */
async function opened(kind, backend) {
  const runtime = backend === "webgpu" ? "jspi" : "wasm";
  const { file, check, tolerance } = student.networks[kind];
  const [binary, glue, model] = await Promise.all([
    ...[`runtime_${runtime}`, `runtime_${runtime}_glue`, file].map(unpacked),
    load(`ort.${runtime}.min.js`)]);
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(new Blob([glue], { type: "text/javascript" })) };
  ort.env.wasm.wasmBinary = binary.buffer;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  const session = await ort.InferenceSession.create(model, { executionProviders: [backend],
    graphOptimizationLevel: kind === "int8" ? "disabled" : "all" }); // `export` has done what there is to do
  const network = { kind, backend, async run(batch) { // (B, C, H, W) to probabilities
    const { pred } = await session.run({ image: new ort.Tensor("float32", batch.data, batch.shape) });
    const data = new Float32Array(await pred.getData());
    softmax(data, pred.dims);
    return { data, shape: pred.dims };
  } };
  const answer = (await network.run(checkImage(student.check_shape))).data, last = check.length - 1;
  const off = check.map((p, i) => Math.abs(p - answer[Math.floor((i * (answer.length - 1)) / last)]));
  ensure(off.every((d) => d <= tolerance),
    `ONNX Runtime on ${backend} answers otherwise than the exported network (by ` +
    `${Math.max(...off).toPrecision(2)} in a probability): use another browser, or \`predict\``);
  return network;
}

/** The student on the graphics processor where there is one, else on the processor. */
async function openStudent() {
  ensure(student.version === VERSION,
    `${student.name} was exported by another version of amkd_monai than this page: export it again`);
  const kinds = Object.keys(student.networks), slow = kinds.includes("int8") ? "int8" : "float";
  const isPossible = kinds.includes("float") && "Suspending" in WebAssembly && navigator.gpu;
  if (isPossible && (await navigator.gpu.requestAdapter().catch(() => null))) {
    try {
      return await opened("float", "webgpu");
    } catch (error) {
      console.warn(`WebGPU is not used: ${error.message}`);
    }
  }
  return opened(slow, "wasm");
}

/** Probabilities (C,) or (C, ...) at the network's resolution of an image (3, H, W) or (1, X, Y, Z), and ways back. */
async function probabilities(network, image, grid, advance = () => {}) {
  const [array, backs] = prepare(image, student.steps, grid), problem = levelProblem(array.data);
  ensure(!problem, problem);
  const batch = array.shape.length === 4 ? alongBatch(array) : { data: array.data, shape: [1, ...array.shape] };
  const [count, ...one] = batch.shape, length = product(one), parts = [];
  for (let i = 0; i < count; i += student.batch_size) {
    const n = Math.min(student.batch_size, count - i);
    parts.push(await network.run({ data: batch.data.slice(i * length, (i + n) * length), shape: [n, ...one] }));
    await advance((i + n) / count);
  }
  const rest = parts[0].shape.slice(1), answer = zeros([count, ...rest]);
  parts.reduce((at, part) => (answer.data.set(part.data, at), at + part.data.length), 0);
  return [array.shape.length === 4 ? alongBatch(answer) : { data: answer.data, shape: rest }, backs];
}

/** Exchange the first two axes. */
function alongBatch({ data, shape: [first, second, ...rest] }) {
  const result = zeros([second, first, ...rest]), length = product(rest);
  for (let i = 0; i < first; i++) for (let j = 0; j < second; j++) {
    result.data.set(data.subarray((i * second + j) * length, (i * second + j + 1) * length), (j * first + i) * length);
  }
  return result;
}

/** Label map at the input's resolution and the probability of each label, 0 to 255. */
async function maskOf(network, image, grid, advance) {
  const [answer, backs] = await probabilities(network, image, grid, advance),
    places = image.data.length / image.shape[0];
  const mask = new Uint8Array(places), highest = new Float32Array(places).fill(-1),
    one = answer.data.length / answer.shape[0];
  for (let label = 0; label < answer.shape[0]; label++) {
    const own = { data: answer.data.subarray(label * one, (label + 1) * one), shape: [1, ...answer.shape.slice(1)] };
    const found = backs.reduceRight((array, back) => back(array), own).data;
    for (let i = 0; i < places; i++) if (found[i] > highest[i]) { highest[i] = found[i]; mask[i] = label; }
  }
  for (const label of student.largest_component) keepLargest(mask, label, image.shape.slice(1));
  return { mask, certainty: Uint8Array.from(highest, (p) => Math.round(255 * p)) };
}
