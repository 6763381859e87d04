// The desk: sends files to the local server, follows its jobs, and shows their results in viewers.

import { View, Viewer } from "./viewer.js";

const CANCELLED = "Cancelled.";
const find = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
let base = ""; // of this tab's session: "sessions/KEY"
let limits = {};
let files = []; // { name, id, kind, width, height, frames }
let jobs = []; // what is shown
let asked = null; // what is computed now: { jobs, cancelled }
let viewers = [];
let points = []; // { frame, x, y }
let pair = 0;
let playing = null; // the timer
let replayed = 0; // how often play was pressed

async function ask(path, options = {}) {
  const answer = await fetch(path, options);
  const type = answer.headers.get("content-type") ?? "";
  const content = type.includes("json") ? await answer.json() : await answer.arrayBuffer();
  if (!answer.ok) throw new Error(content.error ?? `the server answered ${answer.status}`);
  return content;
}

const send = (path, value) =>
  ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value) });

function say(text, bad = false) {
  find("state").textContent = text;
  find("state").classList.toggle("bad", bad);
}

async function begin() {
  const answer = await send("sessions", { token });
  base = `sessions/${answer.session}`;
  limits = answer.limits;
  const options = answer.networks.map(({ name, about }) => `<option value="${name}">${name} (${about})</option>`).join("");
  find("network").innerHTML = options;
  find("second").insertAdjacentHTML("beforeend", options);
  const pixels = `${Math.floor(limits.pixels / 1e5) / 10} million pixels a frame`;
  find("limits").textContent = `At most ${limits.upload_mb} MB a file, ${pixels}, ${limits.frames} frames a clip.`;
  find("example").disabled = false; // nothing can be asked for before there is a session
}

async function upload(file) {
  if (file.size > limits.upload_mb * 2 ** 20) throw new Error(`${file.name} is larger than ${limits.upload_mb} MB`);
  say(`Reading ${file.name} ...`);
  return ask(`${base}/files?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
}

async function take(chosen) {
  chosen.sort((one, other) => one.name.localeCompare(other.name, undefined, { numeric: true })); // frame 2 before 10
  try {
    for (const file of chosen) {
      const taken = await upload(file);
      const before = taken.kind === "picture" ? files.filter(({ kind }) => kind === "picture").slice(-1) : [];
      files = [...before, taken];
      listFiles();
    }
    say(ready() ? "Ready." : "One more picture is needed.");
  } catch (error) {
    say(error.message, true);
  }
}

function ready() {
  return files.length === 2 || files[0]?.kind === "clip" || files[0]?.kind === "example";
}

function listFiles() {
  find("list").replaceChildren(
    ...files.map(({ name, width, height, frames }) => {
      const item = document.createElement("li");
      const [left, right] = [document.createElement("span"), document.createElement("span")];
      left.textContent = name;
      right.textContent = `${width}\u00d7${height}${frames > 1 ? `, ${frames} frames` : ""}`;
      item.append(left, right);
      return item;
    }),
  );
  find("swap").hidden = files.length !== 2;
  find("run").disabled = Boolean(asked) || !ready();
}

function request(network) {
  const [height, width] = find("size").value.split(/[x ]+/).map(Number);
  return {
    files: files.map(({ id }) => id),
    network,
    iterations: Number(find("iterations").value) || null,
    size: width ? [height, width] : null,
    occlusion: find("both").checked,
  };
}

async function run(event) {
  event.preventDefault();
  if (asked) return;
  stop();
  const networks = [find("network").value, find("second").value].filter(Boolean);
  const mine = (asked = { jobs: [], cancelled: false });
  busy();
  try {
    for (const network of networks) {
      const { job } = await send(`${base}/jobs`, request(network));
      mine.jobs.push({ id: job, network, path: `${base}/jobs/${job}` });
      if (mine.cancelled) throw new Error(CANCELLED);
    }
    for (const job of mine.jobs) await follow(job);
    await Promise.all(mine.jobs.map(async (job) => (job.result = await ask(job.path))));
    jobs = mine.jobs;
    await show();
    const took = jobs.map(({ network, result }) => `${network}: ${result.seconds.toFixed(2)} s a pair`).join(", ");
    say([took, jobs[0].result.problem].filter(Boolean).join("; "));
  } catch (error) {
    dropJobs(mine.jobs);
    say(error.message, error.message !== CANCELLED);
  } finally {
    asked = null;
    busy();
  }
}

const dropJobs = (some) => Promise.allSettled(some.map(({ path }) => ask(path, { method: "DELETE" })));

function busy() {
  const on = Boolean(asked);
  find("run").disabled = on || !ready();
  find("busy").hidden = !on;
  find("progress").removeAttribute("value");
}

function follow(job) {
  let failures = 0;
  return new Promise((resolve, reject) => {
    const source = new EventSource(`${job.path}/events`);
    source.onmessage = ({ data }) => {
      failures = 0;
      const { state, done, total, left, problem, ahead } = JSON.parse(data);
      if (total) find("progress").value = done / total;
      if (state === "waiting") say(`${job.network}: waiting, ${ahead} before it`);
      if (state === "running") say(`${job.network}: ${done} of ${total ?? "?"} pairs${left ? `, ${Math.ceil(left)} s left` : ""}`);
      if (state === "waiting" || state === "running") return;
      source.close();
      state === "done" ? resolve() : reject(new Error(problem ?? CANCELLED));
    };
    source.onerror = () => {
      if (source.readyState === EventSource.CONNECTING && ++failures < 5) return; // the browser tries again
      source.close();
      reject(new Error("the server does not answer any more"));
    };
  });
}

async function cancel() {
  if (!asked) return;
  asked.cancelled = true;
  await dropJobs(asked.jobs);
}

function show() {
  find("empty").hidden = true;
  const view = new View();
  find("viewers").replaceChildren();
  find("viewers").classList.toggle("two", jobs.length > 1);
  viewers = jobs.map(({ network }) => {
    const root = document.createElement("div");
    find("viewers").append(root);
    const viewer = new Viewer(root, { view, title: network });
    root.addEventListener("pick", ({ detail }) => pick(detail));
    return viewer;
  });
  points = [];
  const { result } = jobs[0];
  find("clip").hidden = result.pairs < 2;
  find("time").max = result.pairs - 1;
  find("give").hidden = false;
  find("command").textContent = jobs.map((job) => job.result.command).join("\n");
  return showPair(0);
}

async function pixels(path) {
  const picture = await createImageBitmap(new Blob([await ask(path)]));
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  return context.getImageData(0, 0, picture.width, picture.height).data;
}

async function load(job, k) {
  const { width, height, scale, occlusion, uncertainty } = job.result;
  const [frame1, frame2, content] = await Promise.all([
    pixels(`${job.path}/frames/${k}`), pixels(`${job.path}/frames/${k + 1}`), ask(`${job.path}/pairs/${k}`),
  ]);
  const count = width * height; // float32 flow, float32 uncertainty, uint8 occlusion, as server.py writes them
  let at = 8 * count;
  const data = { width, height, scale, frame1, frame2, flow: new Float32Array(content, 0, 2 * count) };
  data.uncertainty = uncertainty ? new Float32Array(content, at, count) : null;
  at += uncertainty ? 4 * count : 0;
  data.occlusion = occlusion ? new Uint8Array(content, at, count) : null;
  return data;
}

async function showPair(k) {
  pair = k;
  const wanted = jobs;
  let all;
  try {
    all = await Promise.all(wanted.map((job) => load(job, k)));
  } catch (error) {
    stop();
    return say(error.message, true);
  }
  if (wanted !== jobs || pair !== k) return; // another was asked for meanwhile
  const scale = Math.max(...all.map((data) => data.scale)); // one for all, or colors could not be compared
  all.forEach((data, i) => viewers[i].setData({ ...data, scale }));
  find("time").value = k;
  find("when").textContent = `pair ${k + 1} of ${jobs[0].result.pairs}, ${jobs[0].result.times[k].toFixed(2)} s`;
  drawCurve();
  listDownloads();
  showTracks();
}

function listDownloads() {
  const rows = jobs.map(({ path, network, result }) => {
    const row = document.createElement("div");
    const links = result.formats.map(({ format, name }) =>
      Object.assign(document.createElement("a"), {
        className: "button", textContent: format, href: `${path}/download/${format}?pair=${pair}`,
        download: name, title: name,
      }),
    );
    row.append(`Download this pair, ${network}:`, ...links);
    return row;
  });
  for (const { path, network, result } of jobs) {
    if (!result.clip.length) continue;
    const row = document.createElement("div");
    const links = result.clip.map(({ format, name }) =>
      Object.assign(document.createElement("a"), {
        className: "button", textContent: format, href: `${path}/clip/${format}`, download: name, title: name,
      }),
    );
    row.append(`Download the whole clip, ${network}:`, ...links);
    rows.push(row);
  }
  find("downloads").replaceChildren(...rows);
}

function drawCurve() {
  const canvas = find("curve");
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [canvas.clientWidth, canvas.clientHeight];
  Object.assign(canvas, { width: w * ratio, height: h * ratio });
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.body);
  const top = Math.max(1, ...jobs.flatMap(({ result }) => result.motion));
  const count = jobs[0].result.pairs;
  const x = (k) => 4 + ((w - 8) * k) / Math.max(count - 1, 1);
  context.fillStyle = style.getPropertyValue("--line");
  context.fillRect(0, h - 4, w, 1);
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = style.getPropertyValue("--soft");
  context.fillText(`mean motion, up to ${top.toPrecision(2)} px`, 6, 12);
  jobs.forEach(({ result }, i) => {
    context.strokeStyle = style.getPropertyValue(i ? "--bad" : "--accent");
    context.lineWidth = 1.5;
    context.beginPath();
    result.motion.forEach((value, k) => context.lineTo(x(k), h - 4 - ((h - 20) * value) / top));
    context.stroke();
  });
  context.fillStyle = style.getPropertyValue("--ink");
  context.fillRect(x(pair) - 0.5, 16, 1, h - 16);
}

async function pick({ x, y }) {
  if (jobs[0].result.pairs < 2) return;
  const more = [...points, { frame: pair, x, y }];
  try {
    for (const job of jobs) job.tracks = (await send(`${job.path}/tracks`, { points: more })).tracks;
    points = more;
  } catch (error) {
    say(error.message, true);
  }
  showTracks();
}

function showTracks() {
  jobs.forEach(({ tracks = [] }, i) => {
    viewers[i].setTracks(
      tracks.map((track, k) =>
        track.slice(points[k]?.frame ?? 0, pair + 1).map(([x, y, visible]) => ({ x, y, visible: visible > 0 })),
      ),
    );
  });
}

function stop() {
  clearTimeout(playing);
  playing = null;
  find("play").textContent = "Play";
  find("play").setAttribute("aria-pressed", "false");
}

async function play() {
  if (playing) return stop();
  find("play").textContent = "Pause";
  find("play").setAttribute("aria-pressed", "true");
  const mine = ++replayed;
  const step = async () => {
    await showPair((pair + 1) % jobs[0].result.pairs);
    if (playing && mine === replayed) playing = setTimeout(step, 60);
  };
  playing = setTimeout(step, 0);
}

find("files").addEventListener("change", (event) => {
  take([...event.target.files]);
  event.target.value = ""; // the same file may be chosen again
});
find("example").addEventListener("click", async () => {
  try {
    files = [{ id: "example", kind: "example", ...(await ask(`${base}/example`)) }];
    listFiles();
    say("Ready.");
  } catch (error) {
    say(error.message, true);
  }
});
find("swap").addEventListener("click", () => { files.reverse(); listFiles(); });
find("ask").addEventListener("submit", run);
find("cancel").addEventListener("click", cancel);
find("play").addEventListener("click", play);
find("time").addEventListener("input", (event) => { stop(); showPair(Number(event.target.value)); });
find("forget").addEventListener("click", () => { points = []; jobs.forEach((job) => (job.tracks = [])); showTracks(); });
find("copy").addEventListener("click", () => {
  getSelection().selectAllChildren(find("command"));
  if (navigator.clipboard) navigator.clipboard.writeText(find("command").textContent);
  else document.execCommand("copy"); // a page of another machine has no clipboard without TLS
});
window.addEventListener("resize", () => jobs[0]?.result && drawCurve());
const drop = find("drop");
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => { event.preventDefault(); take([...event.dataTransfer.files]); });
window.addEventListener("pagehide", () => base && navigator.sendBeacon(`${base}/end`));
window.addEventListener("pageshow", ({ persisted }) => persisted && location.reload()); // its session has ended
begin().catch((error) => say(error.message, true));
