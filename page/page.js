// FastFlowNet in the visitor's own browser: no server, nothing is uploaded.

import { Viewer } from "./viewer.js";

const find = (id) => document.getElementById(id);
const EMBEDDED = globalThis.EMBEDDED ?? null; // file names to addresses, in the page that is one file
const AGREES = 0.05; // pixels by which WebGPU may differ from wasm
let frames = []; // { name, picture: ImageBitmap }
const sessions = {};
let viewer = null;

function say(text, bad = false) {
  find("state").textContent = text;
  find("state").classList.toggle("bad", bad);
}

// Where a file of the page is: beside it, or within it.
function address(name) {
  return EMBEDDED ? EMBEDDED[name] : `./${name}`;
}

async function bytes(name) {
  return new Uint8Array(await (await fetch(address(name))).arrayBuffer());
}

// The runtime with its own provider, loaded once; "wasm" with threads where the host lets pages share memory.
async function session(provider) {
  sessions[provider] ??= (async () => {
    const ort = await import(provider === "webgpu" ? "./ort/ort.webgpu.min.mjs" : address("ort/ort.wasm.min.mjs"));
    ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency ?? 1, 8) : 1;
    if (EMBEDDED) ort.env.wasm.wasmBinary = await bytes("ort/ort-wasm-simd-threaded.wasm");
    else ort.env.wasm.wasmPaths = new URL("./ort/", location.href).href;
    const network = await bytes("fastflownet.onnx");
    return { ort, network: await ort.InferenceSession.create(network, { executionProviders: [provider] }) };
  })();
  return sessions[provider];
}

async function flowOf(provider, first, second, width, height) {
  const { ort, network } = await session(provider);
  const tensor = (rgba) => {
    const rgb = new Uint8Array(3 * width * height);
    for (let i = 0; i < width * height; i++) rgb.set(rgba.subarray(4 * i, 4 * i + 3), 3 * i);
    return new ort.Tensor("uint8", rgb, [1, height, width, 3]);
  };
  const [name1, name2] = network.inputNames;
  const answer = await network.run({ [name1]: tensor(first), [name2]: tensor(second) });
  return answer[network.outputNames[0]].data;
}

function pixels({ picture }, width, height) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  return context.getImageData(0, 0, width, height).data;
}

async function take(files) {
  files.sort((one, other) => one.name.localeCompare(other.name, undefined, { numeric: true })); // frame 2 before 10
  try {
    for (const file of files) {
      const picture = await createImageBitmap(file).catch(() => {
        throw new Error(`${file.name} is no picture that this browser reads`);
      });
      frames = [...frames.slice(-1), { name: file.name, picture }];
    }
    listFrames();
  } catch (error) {
    say(error.message, true);
  }
}

function listFrames() {
  find("list").replaceChildren(
    ...frames.map(({ name, picture }) =>
      Object.assign(document.createElement("li"), { textContent: `${name} (${picture.width}\u00d7${picture.height})` }),
    ),
  );
  const sizes = new Set(frames.map(({ picture }) => `${picture.width}x${picture.height}`));
  find("run").disabled = frames.length < 2 || sizes.size > 1;
  if (sizes.size > 1) say("Both pictures must have one size.", true);
  else say(frames.length < 2 ? "One more picture is needed." : "Ready.");
}

async function run(event) {
  event.preventDefault();
  find("run").disabled = true;
  try {
    const { width: w, height: h } = frames[0].picture;
    const factor = Math.min(1, Number(find("largest").value) / Math.max(w, h));
    const [width, height] = [Math.max(Math.round(w * factor), 1), Math.max(Math.round(h * factor), 1)];
    const [frame1, frame2] = frames.map((frame) => pixels(frame, width, height));
    say("Loading the network ...");
    const provider = await chosen(frame1, frame2, width, height);
    await session(provider);
    say("Computing ...");
    const begun = performance.now();
    const flow = await flowOf(provider, frame1, frame2, width, height);
    const seconds = (performance.now() - begun) / 1000;
    find("empty").hidden = true;
    find("viewer").hidden = false;
    viewer ??= new Viewer(find("viewer"), { title: "fastflownet" });
    viewer.setData({ width, height, frame1, frame2, flow: new Float32Array(flow), occlusion: null, uncertainty: null });
    say(`${width}\u00d7${height}, ${seconds.toFixed(2)} s on ${provider}${crossOriginIsolated ? "" : ", one thread"}`);
  } catch (error) {
    say(`The flow could not be computed: ${error.message}`, true);
  }
  find("run").disabled = false;
}

// wasm, or WebGPU where it is asked for and gave the same flow as wasm on the first pair.
async function chosen(frame1, frame2, width, height) {
  if (!find("gpu").checked) return "wasm";
  if (chosen.agrees === undefined) {
    const expected = await flowOf("wasm", frame1, frame2, width, height);
    const found = await flowOf("webgpu", frame1, frame2, width, height).catch(() => []);
    chosen.agrees = found.length === expected.length && found.every((value, i) => Math.abs(value - expected[i]) <= AGREES);
  }
  if (!chosen.agrees) {
    find("gpu").checked = false;
    find("gpu").disabled = true;
    find("gpu-label").append(" It does not agree here and is switched off.");
  }
  return chosen.agrees ? "webgpu" : "wasm";
}

async function example() {
  const names = ["frame1.png", "frame2.png"];
  await take(await Promise.all(names.map(async (name) => new File([await bytes(name)], name))));
}

find("gpu-label").hidden = !navigator.gpu || EMBEDDED !== null;
find("files").addEventListener("change", (event) => take([...event.target.files]));
find("example").addEventListener("click", () => example().catch((error) => say(error.message, true)));
find("ask").addEventListener("submit", run);
const drop = find("drop");
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => { event.preventDefault(); take([...event.dataTransfer.files]); });
if (navigator.serviceWorker && isSecureContext && !EMBEDDED) navigator.serviceWorker.register("offline.js");
