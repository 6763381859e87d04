// Flow as pictures, by the rules of fleetflow.visualise (a test compares them). Pictures are RGBA bytes, row by row;
// flow is a Float32Array of u, v pairs in pixels, u to the right and v downwards.

const CORNERS = [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255]];
const STEPS = [15, 6, 4, 11, 13, 6];
const UNKNOWN = 1e9; // pixels
const READABLE_STEPS = [1, 1.5, 2, 3, 5, 7, 10]; // times a power of ten

export function colorWheel() {
  const rows = [];
  STEPS.forEach((steps, k) => {
    const [start, end] = [CORNERS[k], CORNERS[(k + 1) % CORNERS.length]];
    for (let i = 0; i < steps; i++) {
      const ramp = Math.floor((255 * i) / steps);
      rows.push(start.map((value, channel) => value + Math.sign(end[channel] - value) * ramp));
    }
  });
  return rows;
}

const WHEEL = colorWheel();

export function isKnown(u, v) {
  return Math.abs(u) < UNKNOWN && Math.abs(v) < UNKNOWN; // false for NaN
}

// The scale in pixels that 99 % of the motion stays under, rounded up to a readable number; at least 1.
export function robustScale(flow) {
  const lengths = [];
  const step = Math.max(1, Math.floor(flow.length / 2 / 100000));
  for (let i = 0; i < flow.length / 2; i += step) {
    if (isKnown(flow[2 * i], flow[2 * i + 1])) lengths.push(Math.hypot(flow[2 * i], flow[2 * i + 1]));
  }
  lengths.sort((a, b) => a - b);
  const bound = Math.max(lengths.length ? lengths[Math.floor(0.99 * (lengths.length - 1))] : 0, 1);
  const decade = 10 ** Math.floor(Math.log10(bound));
  return decade * READABLE_STEPS.find((factor) => factor * decade >= bound * (1 - 1e-5));
}

export function colorOfFlow(flow, scale, dark = false) {
  const picture = new Uint8ClampedArray(2 * flow.length);
  for (let i = 0; i < flow.length / 2; i++) paintVector(picture, 4 * i, flow[2 * i], flow[2 * i + 1], scale, dark);
  return picture;
}

function paintVector(picture, at, u, v, scale, dark) {
  picture[at + 3] = 255;
  if (!isKnown(u, v)) {
    picture[at] = picture[at + 1] = picture[at + 2] = dark ? 64 : 0;
    return;
  }
  const length = Math.min(Math.hypot(u, v) / scale, 1);
  const position = ((Math.atan2(-v, -u) / Math.PI + 1) / 2) * (WHEEL.length - 1);
  const before = Math.floor(position);
  const share = position - before;
  const [one, other] = [WHEEL[before], WHEEL[(before + 1) % WHEEL.length]];
  for (let channel = 0; channel < 3; channel++) {
    const pure = ((1 - share) * one[channel] + share * other[channel]) / 255;
    picture[at + channel] = Math.floor(255 * (dark ? length * pure : 1 - length * (1 - pure)));
  }
}

// frame2 seen from frame1: what is at x + flow(x), bilinear; gray where that is outside or unknown.
export function warped(frame2, flow, width, height) {
  const picture = new Uint8ClampedArray(frame2.length);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const inside = sample(frame2, width, height, x + flow[2 * i], y + flow[2 * i + 1], picture, 4 * i);
      if (!inside) picture.fill((x + y) % 8 < 4 ? 96 : 128, 4 * i, 4 * i + 3);
      picture[4 * i + 3] = inside ? 255 : 254; // 254 tells the error picture that there is nothing to compare
    }
  }
  return picture;
}

function sample(frame, width, height, x, y, out, at) {
  if (!(x >= 0 && y >= 0 && x <= width - 1 && y <= height - 1)) return false;
  const [left, top] = [Math.min(Math.floor(x), Math.max(width - 2, 0)), Math.min(Math.floor(y), Math.max(height - 2, 0))];
  const [right, below] = [Math.min(left + 1, width - 1), Math.min(top + 1, height - 1)];
  const [a, b] = [x - left, y - top];
  for (let channel = 0; channel < 3; channel++) {
    const value = (column, row) => frame[4 * (row * width + column) + channel];
    out[at + channel] =
      (1 - b) * ((1 - a) * value(left, top) + a * value(right, top)) +
      b * ((1 - a) * value(left, below) + a * value(right, below));
  }
  return true;
}

// |frame1 - warped frame2|, mean over the colors, four times as bright; gray where there is nothing to compare.
export function warpError(frame1, warpedFrame2) {
  const picture = new Uint8ClampedArray(frame1.length);
  for (let at = 0; at < frame1.length; at += 4) {
    const outside = warpedFrame2[at + 3] === 254;
    let sum = 0;
    for (let channel = 0; channel < 3; channel++) sum += Math.abs(frame1[at + channel] - warpedFrame2[at + channel]);
    picture.fill(outside ? 96 : (4 * sum) / 3, at, at + 3);
    picture[at + 3] = 255;
  }
  return picture;
}

// frame1 in gray, with what frame2 hides in red; occluded holds 0 to 255, the probability.
export function occlusionPicture(frame1, occluded) {
  const picture = new Uint8ClampedArray(frame1.length);
  for (let at = 0, i = 0; at < frame1.length; at += 4, i++) {
    const gray = 0.299 * frame1[at] + 0.587 * frame1[at + 1] + 0.114 * frame1[at + 2];
    const mix = (0.6 * occluded[i]) / 255;
    [235, 45, 95].forEach((red, channel) => (picture[at + channel] = (1 - mix) * gray + mix * red));
    picture[at + 3] = 255;
  }
  return picture;
}

const RAMP = [[24, 22, 48], [72, 40, 120], [49, 104, 142], [53, 183, 121], [253, 231, 37]];

// Pixels of uncertainty, dark for none, yellow from `scale` on.
export function uncertaintyPicture(uncertainty, scale) {
  const picture = new Uint8ClampedArray(4 * uncertainty.length);
  for (let i = 0; i < uncertainty.length; i++) {
    const position = Math.min(Math.max(uncertainty[i] / scale, 0), 1) * (RAMP.length - 1) || 0;
    const before = Math.min(Math.floor(position), RAMP.length - 2);
    for (let channel = 0; channel < 3; channel++) {
      const [low, high] = [RAMP[before][channel], RAMP[before + 1][channel]];
      picture[4 * i + channel] = low + (position - before) * (high - low);
    }
    picture[4 * i + 3] = 255;
  }
  return picture;
}

// Arrows on every `every`-th pixel, drawn on a canvas context in pixels of the frame.
export function drawArrows(context, flow, width, height, every) {
  const stroke = Math.max(Math.min(every / 12, Math.max(width, height) / 500), 1);
  const lines = [];
  for (let y = Math.floor(((height - 1) % every) / 2); y < height; y += every) {
    for (let x = Math.floor(((width - 1) % every) / 2); x < width; x += every) {
      const [u, v] = [flow[2 * (y * width + x)], flow[2 * (y * width + x) + 1]];
      if (isKnown(u, v)) lines.push([x + 0.5, y + 0.5, u, v]);
    }
  }
  for (const [color, extra] of [["rgba(20,20,25,.8)", Math.max(stroke, 1.5)], ["rgb(255,236,110)", 0]]) {
    context.strokeStyle = context.fillStyle = color;
    context.lineWidth = stroke + extra;
    context.lineCap = context.lineJoin = "round";
    for (const line of lines) drawArrow(context, ...line, stroke, extra);
  }
}

function drawArrow(context, x, y, u, v, stroke, extra) {
  const length = Math.hypot(u, v);
  context.beginPath();
  if (length < Math.max(stroke, 1)) {
    context.arc(x, y, (stroke + extra) / 2, 0, 2 * Math.PI);
    context.fill();
    return;
  }
  const [alongX, alongY, head] = [u / length, v / length, Math.min(5 * stroke + 1, 0.6 * length)];
  const [neckX, neckY] = [x + u - alongX * head, y + v - alongY * head];
  context.moveTo(x, y);
  context.lineTo(neckX, neckY);
  context.stroke();
  context.beginPath();
  context.moveTo(x + u, y + v);
  context.lineTo(neckX - alongY * head * 0.45, neckY + alongX * head * 0.45);
  context.lineTo(neckX + alongY * head * 0.45, neckY - alongX * head * 0.45);
  context.closePath();
  context.fill();
  if (extra) context.stroke();
}
