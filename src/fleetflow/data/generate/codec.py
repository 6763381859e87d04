"""What a codec leaves of frames: encoded and decoded as a clip by PyAV; on other devices quantized in blocks."""

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 32  # pixels; smaller frames are left as they are
# encoder, decoder, pixel format, options, best and worst quality (H.264, HEVC: crf; others: quantizer)
KINDS = (
    ("libx264", "h264", "yuv420p", {"preset": "ultrafast", "tune": "zerolatency", "refs": "1"}, (16, 36)),
    ("mjpeg", "mjpeg", "yuvj420p", {}, (2, 14)),
    ("mpeg4", "mpeg4", "yuv420p", {}, (2, 12)),
    (
        "libx265",
        "hevc",
        "yuv420p",
        {"preset": "ultrafast", "tune": "zerolatency", "x265-params": "log-level=none:pools=none:frame-threads=1"},
        (18, 36),
    ),
    ("libx264", "h264", "yuv420p", {"preset": "medium", "tune": "zerolatency"}, (18, 36)),
)
# luminance table of JPEG (ITU-T T.81, annex K), used for all channels
JPEG = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)


def coded(frames: Sequence[np.ndarray], kind: int, quality: float, interval: int = 250) -> list[np.ndarray]:
    """Returns frames uint8 [H, W, 3] RGB, of one size, as they come out of an encoder and its decoder.

    Args:
        kind: number of an entry of `KINDS`.
        quality: from 0, best, to 1.
        interval: of frames between key frames.
    """
    encoder, decoder, pixels, options, (best, worst) = KINDS[kind]
    height, width = frames[0].shape[:2]
    level = str(round(best + quality * (worst - best)))
    writer, reader = av.CodecContext.create(encoder, "w"), av.CodecContext.create(decoder, "r")
    assert isinstance(writer, av.VideoCodecContext) and isinstance(reader, av.VideoCodecContext)  # as in `KINDS`
    writer.width, writer.height = width + width % 2, height + height % 2
    writer.pix_fmt, writer.time_base, writer.thread_count = pixels, Fraction(1, 25), 1
    writer.gop_size, writer.max_b_frames = interval, 0
    writer.options = {**options, **({"crf": level} if "26" in encoder else {"qmin": level, "qmax": level})}
    reader.thread_count = 1
    packets = []
    for k, frame in enumerate(frames):
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)
        picture.pts = k
        packets += writer.encode(picture)
    packets += writer.encode(None)
    decoded = [picture for packet in (*packets, None) for picture in reader.decode(packet)]
    return [picture.to_ndarray(format="rgb24")[:height, :width] for picture in decoded]


def through_codec(frames: list[Tensor], kind: Tensor, quality: Tensor, begun: Tensor) -> list[Tensor]:
    """Returns frames [B, 3, H, W] in [0, 1]; those of the samples that have a codec as it leaves them.

    On the CPU the frames of a sample are a clip of a real encoder. On other devices a copy to the CPU and back would
    take longer than all else: there the frames are quantized in blocks as JPEG does, whatever the codec.

    Args:
        kind: [B] number of an entry of `KINDS`, -1 for none.
        quality: [B], 0 best, 1 worst.
        begun: [B] bool; the clip began before its first frame here, so that this one too is predicted from another.
    """
    if min(frames[0].shape[-2:]) < SMALLEST:
        return frames
    rows = (kind >= 0).nonzero()[:, 0].tolist()
    frames = [frame.clone() for frame in frames]
    if frames[0].device.type != "cpu":
        some = torch.tensor(rows, dtype=torch.long, device=frames[0].device)
        for frame in frames:
            frame[some] = quantized(frame[some], quality.to(frame.device)[some])
        return frames
    for row in rows:
        clip = [frame[row].mul(255).round().byte().permute(1, 2, 0).contiguous().numpy() for frame in frames]
        before = clip[:0:-1] if begun[row] else []  # there and back: what comes before is what follows
        out = coded([*before, *clip], int(kind[row]), float(quality[row]))[len(before) :]
        for frame, picture in zip(frames, out):
            frame[row] = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    return frames


def quantized(frame: Tensor, quality: Tensor) -> Tensor:
    """Returns the frame [B, 3, H, W] with the coefficients of its 8x8 blocks quantized as in JPEG; any device.

    Args:
        quality: [B], 0 best (tables times 0.1), 1 worst (times 2.5).
    """
    height, width = frame.shape[-2:]
    place = torch.arange(8, device=frame.device, dtype=frame.dtype)
    cosine = torch.cos((place[None] + 0.5) * place[:, None] * torch.pi / 8) / 2
    cosine[0] /= 2**0.5
    step = torch.tensor([float(number) for number in JPEG.split()], device=frame.device).view(8, 8) / 255
    step = step * (0.1 * 25**quality)[:, None, None, None, None, None]
    wide = F.pad(frame, (0, -width % 8, 0, -height % 8), mode="replicate") - 0.5
    blocks = wide.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [B, 3, h, w, 8, 8]
    values = cosine @ blocks @ cosine.mT
    blocks = cosine.mT @ ((values / step).round() * step) @ cosine
    wide = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3) + 0.5
    return wide[..., :height, :width].clamp(0, 1)
