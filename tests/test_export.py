"""Exported files: equal to the network or not there; opened without torch; taken wherever a network is taken."""

import copy
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SLOW
from torch.nn.utils.parametrize import is_parametrized

import fleetflow
from fleetflow.cli import main as cli
from fleetflow.export import calibration, forms, parity, write
from fleetflow.export.graph import Sizes, plain
from fleetflow.export.session import Session
from fleetflow.export.tensorrt import build_script
from fleetflow.io.images import write_image
from fleetflow.models.weights import load
from fleetflow.ops.all_pairs import all_pairs, lookup
from fleetflow.ops.correlation import local_correlation
from fleetflow.ops.dilated_correlation import dilated_correlation
from fleetflow.ops.resize import resize
from fleetflow.ops.subtract_mean import mean_color, subtract_mean
from fleetflow.ops.warp import warp
from fleetflow.registry import models
from fleetflow.types import FleetflowError

slow = pytest.mark.skipif(not SLOW, reason="minutes for each network; FLEETFLOW_SLOW=1 runs it")
SMALL = Sizes(128, 192, 1)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(7, 16), (1, 3), (9, 50), (33, 17)])
def test_forms_compute_what_operators_define(size):
    one, two, flow = random(1, 2, 5, *size), random(2, 2, 5, *size), 9 * random(3, 2, 2, *size)
    cases = [
        (local_correlation, (one, two, 4)),
        (local_correlation, (one, two, 4, (0, 7, 80))),
        (dilated_correlation, (one, two, 20, 2)),
        (warp, (one, flow)),
        (mean_color, (one, two)),
        (subtract_mean, (one, mean_color(one, two))),
        (subtract_mean, (two.to(memory_format=torch.channels_last), random(4, 5))),
        (resize, (flow, (4 * size[0], 4 * size[1]))),
        (resize, (flow, (size[0] + 5, 3 * size[1]))),
    ]
    with fleetflow.reference():
        for operator, given in cases:
            torch.testing.assert_close(forms.FORMS[operator](*given), operator(*given), atol=2e-5, rtol=0)


@pytest.mark.parametrize("radius", [3, 4])
def test_lookup_computes_what_the_operator_defines(radius):
    one, two, at = random(1, 2, 8, 17, 24), random(2, 2, 8, 17, 24), 20 * random(3, 2, 2, 17, 24) + 10
    with fleetflow.reference():
        expected = lookup(all_pairs(one, two, 4), at, radius)
    found = forms.lookup(forms.all_pairs(one, two, 4), at, radius)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_a_warp_leaves_the_picture_and_takes_what_is_no_number():
    features, flow = random(1, 1, 3, 6, 7), torch.zeros(1, 2, 6, 7)
    flow[0, 0, 0], flow[0, 1, 1], flow[0, 0, 2] = float("nan"), -1e9, float("inf")
    flow[0, :, 3], flow[0, 0, 4], flow[0, 1, 5] = -0.4, 6.5, 0.5
    found = forms.warp_form(features, flow)
    assert (found[..., :3, :] == 0).all()
    with fleetflow.reference():
        torch.testing.assert_close(found[..., 3:, :], warp(features, flow)[..., 3:, :], atol=1e-5, rtol=0)


def test_operators_are_back_after_an_export():
    from fleetflow.models import fastflownet

    with forms.for_runtimes():
        assert fastflownet.warp is forms.warp_form
    assert fastflownet.warp is warp


def test_a_network_with_norms_of_weights_stays_as_it_is():
    model = load("deq_flow_tiny")
    for _ in range(2):
        plain(model)
    assert all(hasattr(layer, "weight") for layer in model.modules() if is_parametrized(layer))
    assert any(is_parametrized(layer) for layer in model.modules())


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(5)
    return load("lightflow_050", weights=False)


@pytest.fixture(scope="module")
def traced_once():
    """While a module's tests run, a network is traced once for each size and number of iterations."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the export extra")
    known, real = {}, write.traced

    def traced(model, sizes, iterations, **how):
        weights = torch.stack([value.double().sum() for value in model.state_dict().values()]).sum().item()
        key = (type(model), weights, sizes, iterations, *how.values())
        if key not in known:
            known.clear()  # of the last network only
            known[key] = real(model, sizes, iterations, **how)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "traced", traced)
        yield


@pytest.fixture(scope="module")
def exported(network, traced_once, tmp_path_factory):
    """Light Flow as an ONNX file for pictures of 128x192."""
    file = tmp_path_factory.mktemp("export") / "light.onnx"
    return write.export(network, file, network="lightflow_050", license="none", sizes=SMALL)


def pictures(height: int = 128, width: int = 192) -> list[np.ndarray]:
    _, image1, image2, _ = next(iter(parity.pairs(Sizes(height, width, 1))))
    return [image1[0], image2[0]]


def test_a_file_is_equal_and_says_what_it_is(exported, network):
    session = Session(exported.files[0])
    images = pictures()
    frames = [torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in images]
    with torch.inference_mode():
        expected = network(*frames).flow[0].permute(1, 2, 0).numpy()
    for each in (session, pickle.loads(pickle.dumps(session)), copy.deepcopy(session)):
        assert np.abs(each(*images) - expected).max() < 1e-3 and np.abs(expected).max() > 0
    assert session.about["network"] == "lightflow_050" and session.about["sizes"]["width"] == 192
    assert {"sha256", "license", "version", "input", "output"} <= session.about.keys()
    report = json.loads(exported.files[0].with_suffix(".parity.json").read_text())
    assert len(report["rows"]) == 4 and all(row["largest"] < 1e-2 for row in report["rows"])
    assert {row["call"] for row in report["rows"]} == {1, 2}
    assert [path.name for path in exported.files[0].parent.iterdir() if path.name.startswith(".")] == []


def spoil(file: Path, kind: str) -> None:
    """Changes an ONNX file: another sampling, or the colors of the first picture the other way round."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(file))
    if kind == "sampling":
        last = [node for node in model.graph.node if node.op_type == "Resize"][-1]
        kept = [attribute for attribute in last.attribute if attribute.name != "nearest_mode"]
        del last.attribute[:]
        last.attribute.extend([*kept, helper.make_attribute("nearest_mode", "ceil")])
    else:
        for node in model.graph.node:
            node.input[:] = ["turned" if name == "image1" else name for name in node.input]
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "order"))
        model.graph.node.insert(0, helper.make_node("Gather", ["image1", "order"], ["turned"], axis=3))
    onnx.save(model, str(file))


@pytest.mark.parametrize("kind", ["sampling", "colors"])
def test_the_gate_closes(kind, exported, network, tmp_path, monkeypatch):
    def spoiled(program, path, *rest):
        shutil.copy(exported.files[0], path)
        spoil(path, kind)

    monkeypatch.setattr(write, "write_onnx", spoiled)
    with pytest.raises(FleetflowError, match="is not equal to the network") as raised:
        write.export(network, tmp_path / "wrong.onnx", network="lightflow_050", sizes=SMALL)
    assert list(tmp_path.iterdir()) == []
    # Sampling is wrong in the last step only, behind all layers; colors are wrong from the first layer on.
    assert ("the first layer that differs is leaky_relu;" in str(raised.value)) == (kind == "colors"), raised.value


def test_a_flow_of_zero_proves_nothing(exported, network):
    """A file of zeros would be equal to such a network, whatever else is in it."""
    still = copy.deepcopy(network)
    for name in ("conv12", "conv13", "conv14", "conv15", "conv16"):
        getattr(still, name)[4].weight.data.zero_()
    with pytest.raises(FleetflowError, match="own flow is 0 px in the mean"):
        parity.check(exported.files[0], still, SMALL, None, "fp32", lambda pair: None)
    short = parity.Row("footage", (1, 128, 192), 1, flow=0.002, largest=0.009, p999=0.004, mean=9e-4, epe=None)
    limit = parity.LIMITS["fp32"]
    assert not parity.passes([short], limit) and parity.passes([short._replace(flow=2.0)], limit)


def test_without_torch(exported):
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'av', 'safetensors', 'tyro', 'rich'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import numpy as np, fleetflow\n"
        f"session = fleetflow.Session({str(exported.files[0])!r})\n"
        "image = np.random.default_rng(0).integers(0, 256, (128, 192, 3)).astype(np.uint8)\n"
        "print(session(image, image[:, ::-1]).shape)\n"
        "peak = [row for row in open('/proc/self/status') if row.startswith('VmHWM')] if sys.platform == 'linux' else []\n"
        "assert all(int(row.split()[1]) < 400 * 1024 for row in peak), peak\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip() == "(128, 192, 2)", ran.stderr


def block(language: str) -> str:
    """The first block of a language in the guide."""
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "export.md").read_text()
    return re.search(rf"```{language}\n(.*?)```", guide, flags=re.S)[1]


def with_onnxruntime_node(folder: Path) -> bool:
    """Whether scripts in the folder find onnxruntime-node; `make test-all` fetches it there, 290 MB."""
    if not shutil.which("node"):
        return False
    if SLOW and shutil.which("npm"):
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "onnxruntime-node@1.30.0"]
        subprocess.run(command, cwd=folder, capture_output=True, timeout=300)
    return (
        subprocess.run(["node", "-e", "require('onnxruntime-node')"], cwd=folder, capture_output=True).returncode == 0
    )


def test_the_javascript_of_the_guide(exported, tmp_path):
    if not with_onnxruntime_node(tmp_path):
        pytest.skip("needs node, npm and FLEETFLOW_SLOW=1, or NODE_PATH with onnxruntime-node in it")
    images = pictures()
    for name, image in zip("ab", images):
        (tmp_path / name).write_bytes(image.tobytes())
    (tmp_path / "run.js").write_text(
        block("js") + "const fs = require('fs');\n"
        "const bytes = (name) => new Uint8Array(fs.readFileSync(name));\n"
        f"ort.InferenceSession.create({str(exported.files[0])!r})\n"
        "  .then((session) => flow(session, bytes('a'), bytes('b'), 128, 192))\n"
        "  .then((found) => fs.writeFileSync('flow', Buffer.from(found.buffer, found.byteOffset, found.byteLength)));\n"
    )
    ran = subprocess.run(["node", "run.js"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = np.frombuffer((tmp_path / "flow").read_bytes(), np.float32).reshape(128, 192, 2)
    assert np.abs(found - Session(exported.files[0])(*images)).max() < 1e-3


@pytest.mark.parametrize(
    "code",
    [
        "from fleetflow.export.session import Session; Session(Path('a.xml'))",
        "from fleetflow.export.openvino import write_openvino; write_openvino(Path('a.onnx'), Path('b.xml'), {})",
    ],
)
def test_nothing_is_told_to_intel(code, tmp_path):
    """`import openvino` alone writes ~/intel and sends an event, unless its telemetry is turned off before."""
    pytest.importorskip("openvino", reason="needs the openvino extra")
    (tmp_path / "a.xml").write_text("<?xml version='1.0'?><net></net>")
    (tmp_path / "a.bin").touch()
    (tmp_path / "home").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "CI"}  # which turns it off, too
    environment["HOME"] = str(tmp_path / "home")
    tried = f"from pathlib import Path\ntry:\n    {code}\nexcept Exception:\n    import sys; assert 'openvino' in sys.modules"
    subprocess.run([sys.executable, "-c", tried], env=environment, cwd=tmp_path, check=True)
    assert not list((tmp_path / "home").rglob("*"))


def test_openvino(traced_once, tmp_path):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    file = tmp_path / "fast.xml"
    written = write.export(load("fastflownet"), file, network="fastflownet", target="openvino", sizes=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fast.bin", "fast.parity.json", "fast.xml"]
    assert max(row.largest for row in written.rows) < 1e-2
    assert Session(file).about["network"] == "fastflownet"
    if not bfloat16():  # OpenVINO would compute in float32 and say nothing
        with pytest.raises(FleetflowError, match="this processor has no bfloat16"):
            Session(file, precision="bf16")
    (tmp_path / "cut.xml").write_bytes(file.read_bytes()[:-20])
    shutil.copy(file.with_suffix(".bin"), tmp_path / "cut.bin")
    with pytest.raises(FleetflowError, match="cut off"):
        Session(tmp_path / "cut.xml")
    file.with_suffix(".bin").unlink()
    with pytest.raises(FleetflowError, match="fast.bin is missing"):
        Session(file)


def bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@slow
def test_the_cpp_of_the_guide(exported, tmp_path):
    openvino = pytest.importorskip("openvino", reason="needs the openvino extra, which has the headers")
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    for name, image in zip("ab", pictures()):
        (tmp_path / name).write_bytes(image.tobytes())
    (tmp_path / "run.cpp").write_text(
        block("cpp") + "#include <fstream>\n#include <iterator>\n"
        "std::vector<uint8_t> bytes(const char* name) {\n"
        "  std::ifstream file(name, std::ios::binary);\n"
        "  return {std::istreambuf_iterator<char>(file), {}};\n}\n"
        "int main(int, char** files) {\n"
        "  auto request = opened(files[1]);\n"
        '  auto image1 = bytes("a"), image2 = bytes("b");\n'
        "  auto found = flow(request, image1, image2, 128, 192);\n"
        '  std::ofstream("flow", std::ios::binary).write(reinterpret_cast<char*>(found.data()), 4 * found.size());\n}\n'
    )
    package = Path(openvino.__file__).parent
    (library,) = (package / "libs").glob("libopenvino.so*")
    command = ["g++", "-std=c++17", "run.cpp", f"-I{package}/include", str(library), f"-Wl,-rpath,{library.parent}"]
    for line in ([*command, "-o", "run"], ["./run", str(exported.files[0])]):
        ran = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    found = np.frombuffer((tmp_path / "flow").read_bytes(), np.float32).reshape(128, 192, 2)
    assert np.abs(found - Session(exported.files[0])(*pictures())).max() < 1e-3


@slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_machine_code(network, tmp_path, monkeypatch):
    """Minutes of compiling."""
    file = tmp_path / "light.pt2"
    sizes = Sizes(64, 64, 1)
    written = write.export(network, file, network="lightflow_050", target="pt2", sizes=sizes, aot=True)
    assert max(row.largest for row in written.rows) < 1e-2
    monkeypatch.setenv("FLEETFLOW_MACHINE_CODE", "1")
    assert Session(file).about["compiled"]


def test_machine_code_of_strangers_is_not_run(tmp_path):
    with zipfile.ZipFile(tmp_path / "theirs.pt2", "w") as archive:
        archive.writestr("theirs/data/aotinductor/model/code.so", b"\x7fELF")
    with pytest.raises(FleetflowError, match="machine code.*FLEETFLOW_MACHINE_CODE=1"):
        Session(tmp_path / "theirs.pt2")


def test_a_file_is_taken_where_a_network_is(exported, tmp_path, monkeypatch):
    for name, image in zip("ab", pictures()):
        write_image(tmp_path / f"{name}.png", image)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "a.png", "b.png", "-o", "out.flo", "-m", str(exported.files[0])]) == 0
    flow, _ = fleetflow.read_flow(tmp_path / "out.flo")
    assert np.abs(np.asarray(flow) - Session(exported.files[0])(*pictures())).max() < 1e-5


def test_errors_are_one_line(exported, network, tmp_path):
    session, (image, _) = Session(exported.files[0]), pictures()
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"no graph")
    foreign = tmp_path / "foreign.onnx"
    import onnx

    model = onnx.load(str(exported.files[0]))
    del model.metadata_props[:]
    onnx.save(model, str(foreign))
    model.metadata_props.add(key="fleetflow", value=json.dumps({**session.about, "format": 2, "version": "9.0"}))
    newer = tmp_path / "newer.onnx"
    onnx.save(model, str(newer))
    model.metadata_props[0].value = "[1]"
    other = tmp_path / "other.onnx"
    onnx.save(model, str(other))
    half = tmp_path / "half.onnx"
    half.write_bytes(newer.read_bytes()[:100_000])
    archive, alone = tmp_path / "half.pt2", tmp_path / "alone.pte"
    archive.write_bytes(b"PK\x03\x04" + bytes(100))
    alone.write_bytes(bytes(100))
    unknown = tmp_path / "unknown.onnx"
    model.graph.node[0].op_type = "Teleport"
    onnx.save(model, str(unknown))
    cases = [
        (lambda: session(image.astype(np.float32), image), "expected uint8"),
        (lambda: session(image, image[:64]), "both must have the same size"),
        (lambda: session(image[:64], image[:64]), "takes pictures of 128x192"),
        (lambda: session(np.stack([image] * 2), np.stack([image] * 2)), "1 pair at once"),
        (lambda: session.predict(image, image, iterations=3), "iterations"),
        (lambda: Session(wrong), "cannot be opened by ONNX Runtime"),
        (lambda: Session(foreign), "was not written by fleetflow export"),
        (lambda: Session(newer), "fleetflow 9.0, a newer one than this"),
        (lambda: Session(other), "was not written by fleetflow export"),
        (lambda: Session(exported.files[0], threads=-1), "threads is -1"),
        (lambda: session(image[None][:0], image[None][:0]), "no pair"),
        (lambda: Session(half), "cannot be opened by ONNX Runtime"),
        (lambda: Session(archive), "cannot be read as an exported program"),
        (lambda: Session(alone), "alone.pte.json is missing"),
        (lambda: Session(newer, precision="bf16"), "expected fp32"),
        (lambda: Session(unknown), "Teleport"),
        (lambda: Session(tmp_path / "none.onnx"), "does not exist"),
        (lambda: Session(tmp_path), "has no encode"),
        (lambda: write.export(network, tmp_path / "a.xml", network="x"), "does not end in .onnx"),
        (lambda: write.export(network, tmp_path / "a.pte", network="x", target="executorch"), "--size"),
        (lambda: write.export(network, tmp_path / "parts", network="x", sizes=SMALL, parts=True), "leave --parts out"),
        (lambda: write.export(network, tmp_path / "a.onnx", network="x", sizes=SMALL, int8_pairs=[]), "openvino"),
        (lambda: write.export(network, tmp_path / "a.xml", network="x", target="openvino", bf16=True), "--size"),
        (lambda: write.export(network, tmp_path / "a.onnx", network="x", sizes=SMALL, aot=True), "--to pt2"),
        (lambda: write.export(network, tmp_path / "a.onnx", network="x", half=True, bf16=True), "give one"),
    ]
    for call, words in cases:
        with pytest.raises(FleetflowError, match=words) as raised:
            call()
        assert "\n" not in str(raised.value)
    with pytest.raises(TypeError):
        session(image)


def test_the_script_for_tensorrt():
    script = build_script(Path("net.onnx"), Sizes(), half=True)
    assert "--onnx=net.onnx --saveEngine=net.engine --fp16" in script
    assert "--optShapes=image1:1x448x1024x3,image2:1x448x1024x3" in script
    assert "Shapes" not in build_script(Path("net.onnx"), Sizes(448, 1024, 1), half=False)


def test_pictures_of_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "COUNT", 2)
    found = calibration.pairs("footage", SMALL)
    assert len(found) == 2 and all(image.shape == (1, 128, 192, 3) and image.dtype == np.uint8 for image in found[0])
    for name, image in zip("abc", [*pictures(), pictures(64, 64)[0]]):
        write_image(tmp_path / f"{name}.png", image)
    assert len(calibration.pairs(str(tmp_path), SMALL)) == 1  # the third is of another size
    for source, words in ((tmp_path / "none", "is no folder"), (tmp_path, "holds no two pictures")):
        with pytest.raises(FleetflowError, match=words):
            calibration.pairs(str(source), Sizes(96, 96, 1))


EVERY = itertools.product(models, ("onnx", "openvino"))


@pytest.mark.parametrize("name,target", EVERY if SLOW else [("raft_small", "onnx")])
def test_every_network(name, target, traced_once, tmp_path):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    torch.manual_seed(0)
    try:
        model = load(name)
    except FleetflowError:
        model = load(name, weights=False)
    iterations = None if model.iterations is None else 3 if SLOW else 1
    file = tmp_path / f"net{write.SUFFIXES[target]}"
    write.export(model, file, network=name, target=target, sizes=Sizes(150, 214, 1), iterations=iterations)


@slow
@pytest.mark.parametrize("name", ["fastflownet", "lightflow_050", "deq_flow_tiny"])
def test_any_size(name, tmp_path):
    model = load(name, weights=name != "lightflow_050")
    iterations = None if model.iterations is None else 1
    written = write.export(model, tmp_path / "net.onnx", network=name, iterations=iterations)
    assert {row.size for row in written.rows} == {(1, 133, 171), (2, 133, 171), (1, 190, 251), (3, 190, 251)}


@slow
@pytest.mark.parametrize("name", ["raft_small", "deq_flow_tiny"])
def test_parts(name, tmp_path):
    model = plain(load(name))
    write.export(model, tmp_path / "parts", network=name, sizes=SMALL, iterations=4, parts=True)
    session = Session(tmp_path / "parts")
    with pytest.raises(FleetflowError, match="one of three parts"):
        Session(tmp_path / "parts" / "encode.onnx")
    found = session.predict(*pictures())
    assert found.iterations == 4 and session.predict(*pictures(), tolerance=10.0).iterations == 1
    warm = session.predict(*pictures(), found, iterations=1)
    assert warm.residual < session.predict(*pictures(), iterations=1).residual
