"""Deterministic parameters and deterministic image pairs for parity tests.

Self-contained: numpy + the standard library (torch only inside ``fill_module``).

RULE  (for one entry ``key`` / ``shape`` of a state_dict, for model ``m``)
--------------------------------------------------------------------------
0. int/bool tensors (``num_batches_tracked``, ``rel_ind``) are left untouched, and so is
   every key matching a ``keep`` pattern of the model (constant buffers).
1. canonical key: ``alias`` substitutions of the model are applied to the key first
   (two names that are ONE tensor in the published module must get one value).
2. seed  = zlib.crc32((salt + canonical_key).encode()),  salt = "" (main) or "holdout:".
   n     = numpy.random.Generator(numpy.random.PCG64(seed)).standard_normal(shape)   (float64)
3. value by name / rank of the (original) key, last dotted component ``leaf``:
     leaf == "running_mean"                 0.1 * n
     leaf == "running_var"                  1 + 0.1 * |n|
     leaf == "bias" or endswith("_bias")    b * n          b = first matching bias rule, else 0.1
     leaf == "weight_g"  (weight norm)      ||v||_row * (1 + 0.1 * n),  v = value of the sibling
                                            ``weight_v`` (incl. its tweaks), row norm in float64
     ndim >= 2                              n * gain / sqrt(prod(shape[1:]))
                                            gain = first matching gain rule, else the default gain
     otherwise (norm scales, ``gamma``)     1 + 0.1 * n
   (fan_in is prod(shape[1:]) for every kind of layer, also for ConvTranspose2d.)
4. ``tweaks`` of the model (regex that must match the full key, index, op, value), applied in order
   on the float64 array: op "set": a[index] = value, "mul": a[index] *= value, "add": a[index] += value,
   "hipass": a -= mean of a over its last two axes, then a *= value (index unused).
5. cast to float32.
"""

import math
import re
import zlib

import numpy as np

HOLDOUT_SALT = "holdout:"

# alias: ResidualBlock.norm3 is registered twice (norm3 and downsample.1) in RAFT-type encoders.
_RAFT_ALIAS = [(r"\.norm3\.", ".downsample.1."), (r"\.norm4\.", ".downsample.1.")]

SPEC = {}


def spec(model):
    """Spec of a model: dict(gain, rules, bias, keep, alias, tweaks)."""
    s = dict(gain=1.0, rules=[], bias=[], keep=[], alias=[], tweaks=[])
    s.update(SPEC[model])
    return s


def _normal(key, shape, salt):
    rng = np.random.Generator(np.random.PCG64(zlib.crc32((salt + key).encode())))
    return rng.standard_normal(tuple(shape))


def _first(rules, key, default):
    for pat, val in rules:
        if re.search(pat, key):
            return val
    return default


def _tweak(key, a, s):
    for pat, index, op, val in s["tweaks"]:
        if re.fullmatch(pat, key):
            if op == "set":
                a[index] = val
            elif op == "mul":
                a[index] *= val
            elif op == "add":
                a[index] += val
            elif op == "hipass":
                a -= a.mean(axis=(-2, -1), keepdims=True)
                a *= val
            else:
                raise ValueError(op)
    return a


def fill_one(key, shape, model, salt="", s=None):
    """float32 array for one float tensor, or None if the rule leaves the tensor untouched."""
    s = s or spec(model)
    if any(re.search(p, key) for p in s["keep"]):
        return None
    ck = key
    for pat, rep in s["alias"]:
        ck = re.sub(pat, rep, ck)
    shape = tuple(int(d) for d in shape)
    leaf = key.rsplit(".", 1)[-1]
    n = _normal(ck, shape, salt)
    if leaf == "running_mean":
        a = 0.1 * n
    elif leaf == "running_var":
        a = 1 + 0.1 * np.abs(n)
    elif leaf == "bias" or leaf.endswith("_bias"):
        a = _first(s["bias"], key, 0.1) * n
    elif leaf == "weight_g":
        raise ValueError("weight_g needs its weight_v: use make_state")
    elif len(shape) >= 2:
        a = n * (_first(s["rules"], key, s["gain"]) / math.sqrt(int(np.prod(shape[1:]))))
    else:
        a = 1 + 0.1 * n
    return _tweak(key, a, s).astype(np.float32)


def make_state(entries, model, holdout=False):
    """entries: iterable of (key, shape, dtype string). Returns {key: float32 array}.

    Keys that the rule leaves untouched are absent from the result.
    """
    salt = HOLDOUT_SALT if holdout else ""
    s = spec(model)
    entries = [(k, tuple(sh), str(dt)) for k, sh, dt in entries]
    shapes = {k: sh for k, sh, _ in entries}
    out = {}
    for key, shape, dtype in sorted(entries):
        if "float" not in dtype and "double" not in dtype and "half" not in dtype:
            continue
        if key.endswith("weight_g"):
            vkey = key[:-1] + "v"
            v = fill_one(vkey, shapes[vkey], model, salt, s).astype(np.float64)
            nrm = np.sqrt((v.reshape(v.shape[0], -1) ** 2).sum(1)).reshape(shape)
            out[key] = (nrm * (1 + 0.1 * _normal(key, shape, salt))).astype(np.float32)
        else:
            a = fill_one(key, shape, model, salt, s)
            if a is not None:
                out[key] = a
    return out


def fill_module(module, model, holdout=False):
    """Fill a torch module in place (every float parameter and buffer). Returns the module."""
    import torch

    sd = module.state_dict()
    ent = [(k, tuple(v.shape), str(v.dtype).replace("torch.", "")) for k, v in sd.items()]
    st = make_state(ent, model, holdout)
    with torch.no_grad():
        for k, a in st.items():
            sd[k].copy_(torch.from_numpy(a).to(sd[k].dtype))
    return module


# ---------------------------------------------------------------------------------------------
# input pairs
# ---------------------------------------------------------------------------------------------
def true_flow(h, w, seed=0):
    """Smooth flow (h, w, 2) float64 in pixels, (u, v) = (x, y) displacement, |flow| <~ 6 px."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    r = np.random.Generator(np.random.PCG64(1000 + seed))
    a = r.uniform(1.0, 3.0, 4) * np.where(r.uniform(size=4) < 0.5, -1.0, 1.0)
    p = r.uniform(0, 2 * np.pi, 4)
    u = a[0] * np.sin(2 * np.pi * y / h + p[0]) + a[1] * np.cos(2 * np.pi * x / w + p[1])
    v = a[2] * np.sin(2 * np.pi * x / w + p[2]) + a[3] * np.cos(2 * np.pi * y / h + p[3])
    return np.stack([u, v], -1)


def _texture(x, y, seed):
    """Smooth 3-channel texture in [0, 1] at continuous positions (same shape x, y)."""
    r = np.random.Generator(np.random.PCG64(2000 + seed))
    img = np.zeros(x.shape + (3,))
    for c in range(3):
        t = np.zeros(x.shape)
        for _ in range(12):
            lam = math.exp(r.uniform(math.log(7.0), math.log(90.0)))
            th = r.uniform(0, 2 * math.pi)
            ph = r.uniform(0, 2 * math.pi)
            am = (lam / 90.0) ** 0.35
            t += am * np.sin(2 * np.pi * (math.cos(th) * x + math.sin(th) * y) / lam + ph)
        img[..., c] = 0.5 + 0.5 * np.tanh(0.6 * t)
    return img


def make_pair(h, w, seed=0):
    """(img1, img2, flow): two uint8 RGB images (h, w, 3) and the flow (h, w, 2) float32 with
    img1(p) = img2(p + flow(p)) up to rounding to 8 bits (the texture is a closed formula)."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    f = true_flow(h, w, seed)
    i2 = _texture(x, y, seed)
    i1 = _texture(x + f[..., 0], y + f[..., 1], seed)

    def q(a):
        return np.clip(np.floor(a * 255.0 + 0.5), 0, 255).astype(np.uint8)

    return q(i1), q(i2), f.astype(np.float32)


# ---------------------------------------------------------------------------------------------
# per-model constants of the rule
# ---------------------------------------------------------------------------------------------
# The "hipass" / "add" tweaks act on the last convolution of a feature level: features vary in space
# and have about zero mean after the leaky ReLU, so that cost volumes contain negative values too.
def _corr_tweaks(conv, gain, shift=-0.27):
    return [
        (conv + r"\.weight", (), "hipass", gain),
        (conv + r"\.bias", (), "mul", 0.3),
        (conv + r"\.bias", (), "add", shift),
    ]


SPEC["fastflownet"] = dict(
    gain=1.4,
    rules=[(r"\.conv7\.", 0.5), (r"^up\d", 1.5)],
    tweaks=_corr_tweaks(r"pconv[23]_3\.0", 1.5)
    + [(r"decoder\d\.conv1\.0\.weight", (slice(None), slice(0, 53)), "mul", 8.0)],
)
SPEC["lightflow"] = dict(gain=1.4, rules=[(r"^conv1[2-6]\.3\.", 1.0)])
_FNC_TW = _corr_tweaks(r"flownetc\.conv3\.0", 1.2) + [
    (r"flownetc\.conv3_1\.0\.weight", (slice(None), slice(32, 473)), "mul", 60.0)
]
_FN = [(r"predict_flow\d\.", 0.3), (r"upsampled_flow", 1.4)]
for _m in ("flownet2s", "flownet2sd", "flownetfusion"):
    SPEC[_m] = dict(gain=1.4, rules=_FN)
SPEC["flownet2c"] = dict(
    gain=1.4,
    rules=_FN,
    tweaks=_corr_tweaks(r"conv3\.0", 1.2) + [(r"conv3_1\.0\.weight", (slice(None), slice(32, 473)), "mul", 60.0)],
)
for _m in ("flownet2cs", "flownet2css"):
    SPEC[_m] = dict(gain=1.4, rules=_FN, tweaks=_FNC_TW)
SPEC["flownet2"] = dict(
    gain=1.4,
    rules=[(r"^flownets_d\.predict_flow2\.", 60.0), (r"^flownetfusion\.predict_flow0\.", 1.0)] + _FN,
    tweaks=_FNC_TW,
)
SPEC["liteflownet2"] = dict(
    gain=1.4,
    rules=[(r"pred_flow\.", 0.08), (r"dist_layer\.", 2.5), (r"NetM\.layers\.0\.", 4.0)],
    keep=[r"upflow_layer\.weight$", r"corr_up\.weight$"],
    tweaks=_corr_tweaks(
        r"encoder\.layers\.(2\.layers\.1|3\.layers\.1|"
        r"4\.layers\.0|5\.layers\.0)\.conv",
        1.5,
    ),
)
_RAFT_RULES = [
    (r"^fnet\.conv2\.", 0.5),
    (r"^cnet\.conv2\.", 0.15),
    (r"^update_block\.flow_head\.conv2\.", 0.25),
    (r"^update_block\.mask\.2\.", 2.0),
]
SPEC["raft_basic"] = dict(gain=1.4, rules=_RAFT_RULES, bias=[(r"flow_head\.conv2\.bias", 0.02)], alias=_RAFT_ALIAS)
SPEC["raft_small"] = SPEC["raft_basic"]
SPEC["gma"] = dict(
    gain=1.4,
    rules=[(r"^att\.to_qk\.", 3.5), (r"^att\.pos_emb\.", 3.0)] + _RAFT_RULES,
    bias=[(r"flow_head\.conv2\.bias", 0.02)],
    alias=_RAFT_ALIAS,
)


def _deq_tweaks():
    """A restoring force that makes the fixed-point map of the DEQ nets contractive: hidden
    channels 0/1 follow -flow_x/-flow_y (the last two GRU input channels are the flow) and the
    flow head turns them into the update,  delta ~ 0.8 * h[0:2] + a smaller random part."""
    q1 = r"update_block\.gru\.convq1\.weight(_v)?"
    q2 = r"update_block\.gru\.convq2\.weight(_v)?"
    c1 = r"update_block\.flow_head\.conv1\.weight(_v)?"
    c2 = r"update_block\.flow_head\.conv2\.weight(_v)?"
    t = []
    for ch in (0, 1):
        t.append((q1, (ch, ch - 2, 0, 2), "set", -0.3))
        t.append((q2, (ch, ch - 2, 2, 0), "set", -0.3))
    for r, (ch, sg) in enumerate(((0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0))):
        t.append((c1, (r,), "mul", 0.0))
        t.append((c1, (r, ch, 1, 1), "set", sg))
        t.append((c2, (ch, r, 1, 1), "set", sg * 0.8))
    return t


_DEQ_RULES = [
    (r"^fnet\.conv2\.", 0.5),
    (r"^cnet\.conv2\.", 0.15),
    (r"^update_block\.flow_head\.conv2\.", 0.2),
    (r"^update_block\.gru\.", 0.6),
    (r"^(update_block\.)?mask\.2\.", 2.0),
    (r"^update_block\.encoder\.convc1\.", 0.7),
]
for _m in ("deq_flow_v1_b", "deq_flow_v1_h", "deq_flow_v2_h", "deq_flow_v2_tiny"):
    SPEC[_m] = dict(gain=1.2, rules=_DEQ_RULES, alias=_RAFT_ALIAS, tweaks=_deq_tweaks())
SPEC["pwcnet"] = dict(
    gain=1.4,
    rules=[(r"^predict_flow\d\.|^dc_conv7\.", 0.25), (r"^deconv\d\.", 1.5), (r"^upfeat\d\.", 1.0)],
    tweaks=_corr_tweaks(r"conv[23]b\.0", 1.5) + [(r"conv[23]_0\.0\.weight", (slice(None), slice(0, 81)), "mul", 20.0)],
)
