// The viewer of one pair: two layers with a wipe between them, zoom, pan, and the vector under the pointer.
// It asks nothing of a server; the desk, the static page and a notebook all give it the same data:
//   { width, height, frame1, frame2: RGBA bytes, flow: Float32Array (u, v), scale: pixels,
//     occlusion: bytes 0 to 255 or null, uncertainty: Float32Array of pixels or null }

import {
  colorOfFlow, drawArrows, isKnown, occlusionPicture, robustScale, uncertaintyPicture, warpError, warped,
} from "./paint.js";

const LAYERS = {
  flow: "Flow",
  arrows: "Arrows",
  frame1: "Frame 1",
  frame2: "Frame 2",
  warped: "Frame 2, warped",
  error: "Error of warping",
  occlusion: "Occlusion",
  uncertainty: "Uncertainty",
};
const ZOOMS = [0.05, 64]; // screen pixels for a pixel of the frame
const KEPT = 40; // screen pixels of the frame that stay on the canvas
const LARGE = 2 ** 22; // pixels of a frame from which on only the layers that are seen are kept

// What several viewers share: place, zoom and the pixel that is looked at.
export class View {
  constructor() {
    Object.assign(this, { zoom: null, x: 0, y: 0, cursor: null, viewers: [] }); // zoom null: all of the frame
  }
  change(values) {
    Object.assign(this, values);
    this.viewers.forEach((viewer) => viewer.draw());
  }
}

export class Viewer {
  constructor(root, { view = new View(), title = "", left = "frame1", right = "flow" } = {}) {
    this.root = root;
    this.view = view;
    this.data = null;
    this.layers = {};
    this.wipe = 0.5;
    this.tracks = [];
    view.viewers.push(this);
    this.build(title, left, right);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  build(title, left, right) {
    const options = (chosen) =>
      Object.entries(LAYERS)
        .map(([name, text]) => `<option value="${name}"${name === chosen ? " selected" : ""}>${text}</option>`)
        .join("");
    this.root.classList.add("viewer");
    this.root.innerHTML = `
      <div class="viewer-bar">
        <strong class="viewer-title"></strong>
        <label>Left <select data-side="left">${options(left)}</select></label>
        <label>Right <select data-side="right">${options(right)}</select></label>
        <label>Full color at <input type="range" data-role="scale" min="-2" max="2" step="0.05" value="0">
          <output data-role="scale-value"></output></label>
        <label><input type="checkbox" data-role="dark"> dark wheel</label>
        <span class="viewer-zoom"><button type="button" data-zoom="out" aria-label="Zoom out">&minus;</button>
          <button type="button" data-zoom="fit">Fit</button><button type="button" data-zoom="one">1:1</button>
          <button type="button" data-zoom="in" aria-label="Zoom in">+</button></span>
      </div>
      <div class="viewer-stage"><canvas tabindex="0" role="application"
        aria-label="Picture of the flow. Arrow keys move the pixel that is read, with shift by ten; plus and minus zoom; comma and period move the wipe."></canvas></div>
      <input type="range" class="viewer-wipe" min="0" max="1" step="0.005" value="0.5" aria-label="Wipe between the left and the right layer">
      <p class="viewer-readout" aria-live="polite">Point at the picture to read the flow.</p>`;
    const find = (selector) => this.root.querySelector(selector);
    find(".viewer-title").textContent = title;
    this.stage = find(".viewer-stage");
    this.canvas = find("canvas");
    this.readout = find(".viewer-readout");
    this.scaleInput = find("[data-role=scale]");
    this.scaleOutput = find("[data-role=scale-value]");
    this.wipeInput = find(".viewer-wipe");
    this.darkInput = find("[data-role=dark]");
    this.sides = { left: find("[data-side=left]"), right: find("[data-side=right]") };
  }

  listen() {
    const redraw = () => this.draw();
    Object.values(this.sides).forEach((select) => select.addEventListener("change", redraw));
    const recolor = () => {
      delete this.layers.flow;
      delete this.layers.uncertainty;
      this.draw();
    };
    this.scaleInput.addEventListener("input", recolor);
    this.darkInput.addEventListener("change", recolor);
    this.wipeInput.addEventListener("input", () => this.setWipe(Number(this.wipeInput.value)));
    this.root.querySelectorAll("[data-zoom]").forEach((button) =>
      button.addEventListener("click", () => this.zoomButton(button.dataset.zoom)),
    );
    this.listenToPointer();
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  listenToPointer() {
    let pressed = null;
    let pinch = null; // distance and middle of two fingers
    const touching = new Map(); // pointerId to place
    const canvas = this.canvas;
    const fingers = () => {
      const [a, b] = [...touching.values()];
      return { distance: Math.max(Math.hypot(a.x - b.x, a.y - b.y), 1), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.data) return;
      touching.set(event.pointerId, this.place(event));
      pinch = touching.size === 2 ? fingers() : null;
      if (touching.size > 1) return (pressed = null);
      const onWipe = Math.abs(this.place(event).x - this.wipe * canvas.clientWidth) < 10;
      pressed = { ...this.place(event), onWipe, moved: false, x0: this.origin().x, y0: this.origin().y };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const at = this.place(event);
      if (touching.has(event.pointerId)) touching.set(event.pointerId, at);
      if (pinch) {
        const now = fingers();
        this.zoomBy(now.distance / pinch.distance, pinch, now);
        return (pinch = now);
      }
      if (!pressed) return touching.size ? null : this.look(this.pixel(at));
      pressed.moved ||= Math.hypot(at.x - pressed.x, at.y - pressed.y) > 3;
      if (pressed.onWipe) this.setWipe(at.x / canvas.clientWidth);
      else if (pressed.moved) this.panTo(pressed.x0 + at.x - pressed.x, pressed.y0 + at.y - pressed.y);
    });
    const released = (event) => {
      touching.delete(event.pointerId);
      pinch = touching.size === 2 ? fingers() : null;
    };
    canvas.addEventListener("pointerup", (event) => {
      released(event);
      const pixel = this.pixel(this.place(event));
      if (pressed && !pressed.moved && !pressed.onWipe && pixel) {
        this.look(pixel);
        this.root.dispatchEvent(new CustomEvent("pick", { detail: pixel }));
      }
      pressed = null;
    });
    canvas.addEventListener("pointercancel", (event) => {
      released(event);
      pressed = null;
    });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (this.data) this.zoomBy(Math.exp(-event.deltaY * [1, 33, 300][event.deltaMode] / 300), this.place(event));
    }, { passive: false });
  }

  // A new pair; `scale` in pixels stays that of a clip where it is given.
  setData(data) {
    this.data = { scale: robustScale(data.flow), ...data };
    this.layers = {};
    for (const select of Object.values(this.sides)) {
      for (const option of select.options) option.disabled = option.value in data && !data[option.value];
      if (select.selectedOptions[0]?.disabled) select.value = "flow";
    }
    this.draw();
  }

  setTracks(tracks) {
    this.tracks = tracks; // each a list of { x, y, visible } up to the frame that is shown
    this.draw();
  }

  setWipe(share) {
    this.wipe = Math.min(Math.max(share, 0), 1);
    this.wipeInput.value = this.wipe;
    this.draw();
  }

  scale() {
    return this.data.scale * 2 ** Number(this.scaleInput.value);
  }

  uncertaintyScale() {
    return Math.max(this.scale() / 4, 0.5);
  }

  layer(name) {
    const seen = Object.values(this.sides).map(({ value }) => value);
    if (this.data.width * this.data.height > LARGE) {
      this.layers = Object.fromEntries(Object.entries(this.layers).filter(([kept]) => seen.includes(kept)));
    }
    return (this.layers[name] ??= this.picture(name));
  }

  picture(name) {
    const { width, height, frame1, frame2, flow, occlusion, uncertainty } = this.data;
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d");
    const bytes = {
      frame1: () => frame1,
      frame2: () => frame2,
      flow: () => colorOfFlow(flow, this.scale(), this.darkInput.checked),
      arrows: () => frame1,
      warped: () => warped(frame2, flow, width, height),
      error: () => warpError(frame1, warped(frame2, flow, width, height)),
      occlusion: () => occlusionPicture(frame1, occlusion),
      uncertainty: () => uncertaintyPicture(uncertainty, this.uncertaintyScale()),
    }[name]();
    if (name === "warped") for (let at = 3; at < bytes.length; at += 4) bytes[at] = 255;
    context.putImageData(new ImageData(bytes, width, height), 0, 0);
    if (name === "arrows") drawArrows(context, flow, width, height, Math.max(Math.round(Math.max(width, height) / 24), 8));
    return canvas;
  }

  // Where the frame lies on the canvas, in CSS pixels.
  origin() {
    const { width, height } = this.data;
    const [w, h] = [this.canvas.clientWidth, this.canvas.clientHeight];
    const zoom = this.view.zoom ?? Math.min(w / width, h / height);
    const free = this.view.zoom === null;
    return { zoom, x: free ? (w - zoom * width) / 2 : this.view.x, y: free ? (h - zoom * height) / 2 : this.view.y };
  }

  draw() {
    if (!this.data) return;
    const { width, height } = this.data;
    const ratio = window.devicePixelRatio || 1;
    this.fitStage();
    const [w, h] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!w || !h) return;
    const [columns, rows] = [Math.round(w * ratio), Math.round(h * ratio)];
    if (this.canvas.width !== columns || this.canvas.height !== rows) Object.assign(this.canvas, { width: columns, height: rows });
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, columns, rows);
    const { zoom, x, y } = this.origin();
    const edge = this.wipe * w;
    for (const [side, from, to] of [["left", 0, edge], ["right", edge, w]]) {
      context.save();
      context.scale(ratio, ratio);
      context.beginPath();
      context.rect(from, 0, to - from, h);
      context.clip();
      context.imageSmoothingEnabled = zoom < 2;
      context.drawImage(this.layer(this.sides[side].value), x, y, zoom * width, zoom * height);
      context.restore();
    }
    context.save();
    context.scale(ratio, ratio);
    this.drawWipe(context, edge, h);
    this.drawTracks(context, { zoom, x, y });
    this.drawCursor(context, { zoom, x, y });
    const seen = [this.sides.left.value, this.sides.right.value];
    if (seen.includes("flow")) this.drawLegend(context, w, h);
    if (seen.includes("uncertainty")) this.drawRamp(context, h);
    context.restore();
    this.scaleOutput.textContent = `${Number(this.scale().toPrecision(3))} px`;
  }

  fitStage() {
    const { width, height } = this.data;
    const room = Math.max(window.innerHeight * 0.62, 240);
    this.stage.style.height = `${Math.round(Math.min((this.stage.clientWidth * height) / width, room))}px`;
  }

  drawWipe(context, x, h) {
    context.fillStyle = "rgba(255,255,255,.9)";
    context.fillRect(x - 1, 0, 2, h);
    context.fillStyle = "rgba(0,0,0,.45)";
    context.fillRect(x - 2, 0, 1, h);
    context.fillRect(x + 1, 0, 1, h);
    context.beginPath();
    context.arc(x, h / 2, 9, 0, 2 * Math.PI);
    context.fillStyle = "rgba(255,255,255,.95)";
    context.fill();
    context.strokeStyle = "rgba(0,0,0,.5)";
    context.lineWidth = 1;
    context.stroke();
  }

  drawTracks(context, { zoom, x, y }) {
    this.tracks.forEach((track, k) => {
      context.strokeStyle = context.fillStyle = `hsl(${(k * 137) % 360} 90% 60%)`;
      context.lineWidth = 2;
      context.beginPath();
      track.forEach((point, i) => {
        const [px, py] = [x + zoom * (point.x + 0.5), y + zoom * (point.y + 0.5)];
        i && point.visible && track[i - 1].visible ? context.lineTo(px, py) : context.moveTo(px, py);
      });
      context.stroke();
      const last = track.at(-1);
      if (!last) return;
      context.beginPath();
      context.arc(x + zoom * (last.x + 0.5), y + zoom * (last.y + 0.5), 4, 0, 2 * Math.PI);
      last.visible ? context.fill() : context.stroke();
    });
  }

  drawCursor(context, { zoom, x, y }) {
    const at = this.view.cursor;
    if (!at || at.x >= this.data.width || at.y >= this.data.height) return;
    const [u, v] = this.vector(at);
    const [px, py] = [x + zoom * (at.x + 0.5), y + zoom * (at.y + 0.5)];
    const known = isKnown(u, v);
    for (const [color, width] of [["rgba(0,0,0,.7)", 4], ["white", 1.5]]) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.strokeRect(px - Math.max(zoom / 2, 3), py - Math.max(zoom / 2, 3), Math.max(zoom, 6), Math.max(zoom, 6));
      if (!known) continue;
      context.beginPath();
      context.moveTo(px, py);
      context.lineTo(px + zoom * u, py + zoom * v);
      context.stroke();
      context.beginPath();
      context.arc(px + zoom * u, py + zoom * v, 4, 0, 2 * Math.PI);
      context.stroke();
    }
    this.read(at, u, v);
  }

  read(at, u, v) {
    const parts = [`frame 1 (${at.x}, ${at.y})`];
    if (isKnown(u, v)) {
      parts.push(`flow u ${u.toFixed(2)}, v ${v.toFixed(2)} px`, `length ${Math.hypot(u, v).toFixed(2)} px`,
        `frame 2 (${(at.x + u).toFixed(1)}, ${(at.y + v).toFixed(1)})`);
    } else parts.push("flow unknown");
    const i = at.y * this.data.width + at.x;
    const off = this.data.uncertainty?.[i];
    if (Number.isFinite(off)) parts.push(`uncertainty ${off.toFixed(2)} px`);
    if (this.data.occlusion) parts.push(this.data.occlusion[i] > 127 ? "hidden in frame\u00a02" : "visible in frame\u00a02");
    this.readout.textContent = parts.join(" \u00b7 ");
    Object.assign(this.readout.dataset, { x: at.x, y: at.y, u, v });
  }

  drawLegend(context, w, h) {
    const size = Math.max(Math.min(Math.round(Math.min(w, h) / 6), 110), 40);
    this.wheel ??= wheelPicture();
    const [dark, text] = [this.darkInput.checked, `${Number(this.scale().toPrecision(3))} px`];
    context.fillStyle = dark ? "rgba(24,24,28,.85)" : "rgba(255,255,255,.88)";
    context.fillRect(w - size - 16, h - size - 32, size + 12, size + 28);
    context.drawImage(this.wheel[dark ? 1 : 0], w - size - 10, h - size - 26, size, size);
    context.fillStyle = dark ? "#eee" : "#222";
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    context.fillText(text, w - 10 - size / 2, h - 11);
  }

  // What the colors of uncertainty mean, at the lower left.
  drawRamp(context, h) {
    this.ramp ??= rampPicture();
    context.fillStyle = "rgba(255,255,255,.88)";
    context.fillRect(4, h - 38, 132, 34);
    context.drawImage(this.ramp, 10, h - 32, 120, 8);
    context.fillStyle = "#222";
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "left";
    context.fillText("0", 10, h - 11);
    context.textAlign = "right";
    context.fillText(`${Number(this.uncertaintyScale().toPrecision(3))} px or more`, 130, h - 11);
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  pixel(at) {
    if (!this.data) return null;
    const { zoom, x, y } = this.origin();
    const [px, py] = [Math.floor((at.x - x) / zoom), Math.floor((at.y - y) / zoom)];
    return px >= 0 && py >= 0 && px < this.data.width && py < this.data.height ? { x: px, y: py } : null;
  }

  vector({ x, y }) {
    const i = 2 * (y * this.data.width + x);
    return [this.data.flow[i], this.data.flow[i + 1]];
  }

  look(pixel) {
    if (pixel) this.view.change({ cursor: pixel });
  }

  panTo(x, y) {
    this.moveTo(this.origin().zoom, x, y);
  }

  // Some of the frame always stays on the canvas.
  moveTo(zoom, x, y) {
    const clamp = (at, room, size) => Math.min(Math.max(at, Math.min(KEPT - size, 0)), room - Math.min(KEPT, size));
    const { clientWidth: w, clientHeight: h } = this.canvas;
    this.view.change({ zoom, x: clamp(x, w, zoom * this.data.width), y: clamp(y, h, zoom * this.data.height) });
  }

  // What is at `at` on the canvas comes to `to`.
  zoomBy(factor, at, to = at) {
    const { zoom, x, y } = this.origin();
    const next = Math.min(Math.max(zoom * factor, Math.min(zoom, ZOOMS[0])), Math.max(zoom, ZOOMS[1]));
    this.moveTo(next, to.x - ((at.x - x) * next) / zoom, to.y - ((at.y - y) * next) / zoom);
  }

  zoomButton(kind) {
    if (!this.data) return;
    const middle = { x: this.canvas.clientWidth / 2, y: this.canvas.clientHeight / 2 };
    if (kind === "fit") this.view.change({ zoom: null });
    else this.zoomBy({ in: 1.5, out: 1 / 1.5, one: 1 / this.origin().zoom }[kind], middle);
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { width, height } = this.data ?? {};
    if (!width || event.ctrlKey || event.metaKey || event.altKey) return; // those are the browser's
    const now = this.view.cursor ?? { x: width >> 1, y: height >> 1 };
    if (event.key in moves) {
      const step = event.shiftKey ? 10 : 1;
      const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
      const [dx, dy] = moves[event.key];
      this.look({ x: clamp(now.x + dx * step, width), y: clamp(now.y + dy * step, height) });
    } else if (event.key === "+" || event.key === "=") this.zoomButton("in");
    else if (event.key === "-") this.zoomButton("out");
    else if (event.key === "0") this.zoomButton("fit");
    else if (event.key === ",") this.setWipe(this.wipe - 0.05);
    else if (event.key === ".") this.setWipe(this.wipe + 0.05);
    else if (event.key === "Enter") this.root.dispatchEvent(new CustomEvent("pick", { detail: now }));
    else return;
    event.preventDefault();
  }
}

// The color wheel on light and on dark, for the legend.
function wheelPicture(size = 128) {
  const flow = new Float32Array(2 * size * size);
  for (let i = 0; i < size * size; i++) {
    flow[2 * i] = (((i % size) + 0.5) * 2) / size - 1;
    flow[2 * i + 1] = ((Math.floor(i / size) + 0.5) * 2) / size - 1;
  }
  return [false, true].map((dark) => {
    const bytes = colorOfFlow(flow, 1, dark);
    for (let i = 0; i < size * size; i++) if (Math.hypot(flow[2 * i], flow[2 * i + 1]) > 1) bytes[4 * i + 3] = 0;
    const canvas = new OffscreenCanvas(size, size);
    canvas.getContext("2d").putImageData(new ImageData(bytes, size, size), 0, 0);
    return canvas;
  });
}

// The colors of uncertainty, from none to its scale.
function rampPicture(width = 120) {
  const canvas = new OffscreenCanvas(width, 1);
  const bytes = uncertaintyPicture(Float32Array.from({ length: width }, (_, x) => x / (width - 1)), 1);
  canvas.getContext("2d").putImageData(new ImageData(bytes, width, 1), 0, 0);
  return canvas;
}
