"""Generated pairs: exact, seeded, varied, and harmless in their extremes."""

import numpy as np
import pytest
import torch
from PIL import Image

from fleetflow.data.generate import dressed, generate, worlds
from fleetflow.data.generate.camera import draw_camera, film
from fleetflow.data.generate.codec import KINDS, coded, quantized, through_codec
from fleetflow.data.generate.held_out import held_out, use_of
from fleetflow.data.generate.motion_blur import motion_blurred
from fleetflow.data.generate.own_texture import STRONGEST, TRAINING, _texture, faint
from fleetflow.data.generate.photographs import photographs
from fleetflow.data.generate.render import render
from fleetflow.data.generate.shapes import GRID, shape_bank
from fleetflow.data.generate.textures import SIDE, bank, level_start, procedural
from fleetflow.io.images import write_image
from fleetflow.ops.warp import warp
from fleetflow.types import FleetflowError

WORLDS = list(worlds.MIXTURE)


@pytest.fixture(scope="module")
def smooth():
    """Surfaces without fine detail, so that what interpolation blurs does not hide errors of the flow."""
    pictures = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return bank(torch.nn.functional.interpolate(pictures, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1))


def make(world, textures, **options):
    return generate(6, 96, 160, seed=3, textures=textures, mixture={world: 1.0}, full=True, camera=False, **options)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_flow_is_exact(smooth, world):
    """What frame1 shows and frame2 still shows has the same color in both: far better than with a wrong flow."""
    sample = make(world, smooth)
    seen = sample.valid & ~sample.occluded
    assert seen.float().mean() > 0.3
    error = (warp(sample.frame2, sample.flow) - sample.frame1).abs().mean(1)
    assert error[seen].median() < 0.004
    assert (error[seen] < 0.03).float().mean() > 0.9
    if sample.flow.any():
        wrong = (warp(sample.frame2, -sample.flow) - sample.frame1).abs().mean(1)
        assert error[seen].mean() < 0.5 * wrong[seen].mean()


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_backward_flow_undoes_the_forward_flow(smooth, world):
    sample = make(world, smooth)
    there = warp(sample.backward, sample.flow)
    loop = (sample.flow + there).square().sum(1).sqrt()
    seen = sample.valid & ~sample.occluded
    assert loop[seen].median() < 0.02
    assert (loop[seen] < 0.5).float().mean() > 0.9


def test_occlusion_by_hand():
    """One square moves 20 px to the right over a still background: it hides what lies to its right."""
    scene = worlds.draw_scene(1, 64, 96, torch.Generator().manual_seed(0), {worlds.still_world: 1.0})
    eye = torch.eye(3)
    motion = eye.repeat(1, worlds.SHEETS, 1, 1)
    motion[0, 1, 0, 2] = 20.0
    outline = eye.repeat(1, worlds.SHEETS, 1, 1)
    outline[0, 1] = torch.linalg.inv(torch.tensor([[10.0, 0, 30], [0, 10, 30], [0, 0, 1]]))
    shape = torch.zeros(1, worlds.SHEETS, dtype=torch.long)
    shape[0, 0] = -1
    present = torch.arange(worlds.SHEETS)[None] < 2
    scene = scene._replace(
        motion=motion, outline=outline, shape=shape, present=present, wobble=torch.zeros(1, worlds.SHEETS)
    )
    textures = procedural(2)
    scene = scene._replace(texture=scene.texture % 2)
    rendered = render(scene, textures, shape_bank(2), 64, 96)
    assert rendered.flow[0, :, 30, 30].tolist() == pytest.approx([20.0, 0.0], abs=1e-4)
    assert rendered.flow[0, :, 30, 60].tolist() == pytest.approx([0.0, 0.0], abs=1e-4)
    assert rendered.occluded[0, 30, 42:59].all(), "the square arrives here"
    assert not rendered.occluded[0, 30, 22:39].any(), "the square itself is seen in both"
    assert not rendered.occluded[0, 30, 64:].any() and not rendered.occluded[0, 5].any()
    assert rendered.backward[0, 0, 30, 50].item() == pytest.approx(-20.0, abs=1e-4)


def test_same_seed_same_pair_and_another_index_another_one():
    one, two = (generate(2, 64, 64, seed=0, index=5) for _ in range(2))
    for a, b in zip(one[:4], two[:4]):
        assert torch.equal(a, b)
    assert not torch.equal(one.frame1, generate(2, 64, 64, seed=0, index=6).frame1)
    assert not torch.equal(one.frame1, generate(2, 64, 64, seed=1, index=5).frame1)


def test_sizes_types_and_ranges():
    for height, width in ((1, 1), (3, 50), (64, 96)):
        sample = generate(3, height, width, seed=2)
        assert sample.frame1.shape == sample.frame2.shape == (3, 3, height, width)
        assert sample.flow.shape == (3, 2, height, width) and sample.valid.shape == (3, height, width)
        for frame in sample[:2]:
            assert frame.dtype == torch.float32 and frame.min() >= 0 and frame.max() <= 1
        assert sample.flow.isfinite().all() and sample.valid.dtype == torch.bool
        assert (sample.flow.abs().amax(1)[~sample.valid] == 0).all()


def test_displacements_have_a_heavy_tail():
    """Small and large motions are both common: figures of the mixture at 192x256, in pixels."""
    lengths = torch.cat(
        [generate(8, 192, 256, seed=9, index=k).flow.norm(dim=1)[:, ::4, ::4].flatten() for k in range(6)]
    )
    quantile = torch.quantile(lengths, torch.tensor([0.1, 0.5, 0.99]))
    assert quantile[0] < 1.5 and 2 < quantile[1] < 14 and quantile[2] > 40


def test_some_surfaces_have_one_color_but_never_the_one_behind_all():
    scene = worlds.large_world(worlds.Draw(200, torch.Generator().manual_seed(0)), 96, 128)
    plain = scene.surface[..., :2, :2].det().sqrt() < 0.02  # texture pixels per frame pixel
    assert 0.1 < plain[:, 1:].float().mean() < 0.2 and not plain[:, 0].any()


def test_crowd_moves_by_pieces_before_a_landscape_that_hardly_moves():
    """The legs of a piece move with its body, pieces apart from one another; sky and land alike, seldom far."""
    height, width = 384, 512
    scene = worlds.crowd_world(worlds.Draw(300, torch.Generator().manual_seed(0)), height, width)
    motion = scene.motion
    assert torch.equal(motion[:, 2::2], motion[:, 3::2]) and torch.equal(motion[:, 0], motion[:, 1])
    assert not torch.isclose(motion[:, 3], motion[:, 5]).all(-1).all(-1).any()
    middle = torch.tensor([width / 2, height / 2, 1.0])
    behind = (motion[:, 0] @ middle - middle)[:, :2].norm(dim=1)
    assert behind.median() < 4 and behind.max() < 120
    there = torch.linalg.inv(scene.outline[:, 3::2])[..., 2]  # where the bodies' middles are
    there = there / there[..., 2:]
    moved = ((motion[:, 3::2] @ there[..., None])[..., 0] - there)[..., :2].norm(dim=-1)
    assert moved.median() > 2 * behind.median() and (moved > 40).float().mean() > 0.1
    bodies = scene.present[:, 3::2].sum(1)
    assert bodies.min() >= 2 and bodies.max() == (worlds.CROWD - 2) // 2
    used = 1 + scene.shape[:, 2::2] % (len(shape_bank()) - 1)
    assert (used % 7 == 6).all(), "legs are furniture"


def test_still_world_has_no_motion_and_small_world_little():
    assert make(worlds.still_world, None).flow.abs().max() < 1e-3
    small = make(worlds.small_world, None).flow.norm(dim=1)
    assert 0.05 < small.mean() < 3


def test_before_a_still_camera_only_objects_move():
    sample = generate(6, 96, 160, seed=3, mixture={worlds.watch_world: 1.0}, camera=False)
    length = sample.flow.norm(dim=1)
    assert (length == 0).float().mean() > 0.3 and (length > 3).float().mean() > 0.05


def test_frames_have_texture_of_their_own():
    """Equal frames without motion differ afterwards, more often than frames that move, and stay in range."""
    frame, nothing = torch.rand(64, 3, 48, 64) * 0.2 + 0.4, torch.zeros(64, 2, 48, 64)
    one, two = faint([frame, frame], nothing, torch.Generator().manual_seed(1), TRAINING)
    again, _ = faint([frame, frame], nothing, torch.Generator().manual_seed(1), TRAINING)
    assert torch.equal(one, again) and one.min() >= 0 and one.max() <= 1
    differ = (one - two).flatten(1).std(1)
    assert 0.5 < (differ > 0).float().mean() < 0.9
    assert 0.005 < differ[differ > 0].median() and differ.max() < 2 * STRONGEST
    moved = faint([frame, frame], nothing + 9, torch.Generator().manual_seed(1), TRAINING)
    assert ((moved[0] - moved[1]).flatten(1).std(1) > 0).float().mean() < 0.5


@pytest.mark.parametrize("sigma", [0.5, 1.7, 4.2, 9.9])
def test_own_texture_has_the_scale_asked_for(sigma):
    """Noise blurred by sigma has the correlation exp(-d^2 / 4 sigma^2) at a distance d."""
    noise = _texture(3, 300, 400, sigma, torch.Generator().manual_seed(0))
    assert noise.shape == (3, 300, 400) and noise.std().item() == pytest.approx(1, abs=0.02)
    shift = max(1, round(sigma))
    measured = (noise[..., shift:] * noise[..., :-shift]).mean().item()
    assert measured == pytest.approx(2.718 ** (-(shift**2) / (4 * sigma**2)), abs=0.12)


def test_camera_keeps_range_and_is_seeded():
    frames = list(torch.rand(3, 6, 3, 40, 50))
    one, two = (film(frames, draw_camera(6, 3, g), g) for g in (torch.Generator().manual_seed(4) for _ in range(2)))
    assert len(one) == 3 and all(torch.equal(a, b) for a, b in zip(one, two))
    for frame in one:
        assert 0 <= frame.min() and frame.max() <= 1
        torch.testing.assert_close(frame * 255, (frame * 255).round(), rtol=0, atol=1e-4)


def test_noise_grows_with_the_signal_and_exposure_changes_from_frame_to_frame():
    """A camera without anything else: variance shot * signal + read^2, brightness as its exposure says."""
    camera = draw_camera(1, 2, torch.Generator().manual_seed(0))
    plain = camera._replace(**{name: torch.zeros(1) for name in ("lift", "fog", "defocus", "grain", "sharpen")})
    plain = plain._replace(**{name: torch.ones(1) for name in ("contrast", "gamma", "saturation", "size")})
    plain = plain._replace(tint=torch.ones(1, 3), balance=torch.ones(1, 2, 3), response=torch.ones(1, 2))
    plain = plain._replace(light=torch.zeros(1, 2), subsampled=torch.tensor([False]), codec=torch.tensor([-1]))
    plain = plain._replace(exposure=torch.tensor([[1.0, 1.2]]), shot=torch.tensor([4e-3]), read=torch.tensor([0.01]))
    frame = torch.full((1, 3, 80, 160), 0.2)
    frame[..., 80:] = 0.6
    one, two = film([frame, frame], plain, torch.Generator().manual_seed(0))
    for part, signal in ((one[..., :80], 0.2), (one[..., 80:], 0.6), (two[..., 80:], 0.72)):
        assert part.mean().item() == pytest.approx(signal, abs=0.003)
        assert part.std().item() == pytest.approx((4e-3 * signal + 1e-4) ** 0.5, rel=0.05)


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[kind[0] for kind in KINDS])
def test_codecs_lose_more_the_worse_their_quality(kind):
    pictures = [((frame[0] * 255).byte().permute(1, 2, 0).numpy()) for frame in generate(1, 63, 96, seed=1)[:2]]
    errors = []
    for quality in (0.0, 1.0):
        out, again = coded(pictures, kind, quality), coded(pictures, kind, quality)
        assert len(out) == 2 and out[0].shape == pictures[0].shape and all((a == b).all() for a, b in zip(out, again))
        errors.append(sum(abs(a.astype(float) - b).mean() for a, b in zip(out, pictures)))
    assert 0 < errors[0] < errors[1] < 60


def test_codec_leaves_alone_whom_it_is_not_for_and_frames_too_small():
    frames = list(torch.rand(2, 2, 3, 40, 48).mul(255).round() / 255)
    kind, quality, begun = torch.tensor([-1, 0]), torch.tensor([0.5, 0.5]), torch.tensor([True, True])
    out = through_codec(frames, kind, quality, begun)
    for frame, left in zip(frames, out):
        torch.testing.assert_close(left[0], frame[0], rtol=0, atol=0)
        assert not torch.equal(left[1], frame[1])
    small = [frame[..., :20, :] for frame in frames]
    assert all(torch.equal(a, b) for a, b in zip(small, through_codec(small, kind, quality, begun)))


def test_quantized_blocks():
    """Flat blocks survive; detail goes as the quality does; sizes need not divide by 8."""
    frame = torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    good, bad = ((quantized(frame, torch.full((2,), q)) - frame).abs().mean() for q in (0.0, 1.0))
    assert good < 0.01 < 0.05 < bad
    flat = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(quantized(flat, torch.ones(1)), flat)


def test_motion_blur_is_the_mean_along_the_motion(smooth):
    """A sheet that moves by 60 px with the shutter half open: the frame is the sharp one averaged over 30 px."""
    scene = worlds.draw_scene(1, 64, 160, torch.Generator().manual_seed(0), {worlds.still_world: 1.0})
    motion = torch.eye(3).repeat(1, worlds.SHEETS, 1, 1)
    motion[0, 0, 0, 2] = 60.0
    surface = torch.eye(3).repeat(1, worlds.SHEETS, 1, 1)  # blobs of some 40 texture pixels
    scene = scene._replace(motion=motion, present=torch.arange(worlds.SHEETS)[None] < 1, texture=scene.texture % 6)
    scene = scene._replace(wobble=torch.zeros(1, worlds.SHEETS), shutter=torch.tensor([0.5]), surface=surface)
    rendered = render(scene, smooth, shape_bank(2), 64, 160)
    for when, frame, front in ((0, rendered.frame1, rendered.front1), (1, rendered.frame2, rendered.front2)):
        blurred = motion_blurred(frame, front, scene, smooth, shape_bank(2), when)
        expected = torch.nn.functional.avg_pool2d(frame, (1, 31), 1)
        torch.testing.assert_close(blurred[..., 15:-15], expected, rtol=0, atol=0.01)
        assert (blurred - frame).abs().max() > 0.04
    still = scene._replace(shutter=torch.zeros(1))
    assert torch.equal(
        motion_blurred(rendered.frame1, rendered.front1, still, smooth, shape_bank(2), 0), rendered.frame1
    )


def test_large_foregrounds_are_large_and_fast_before_what_is_slow():
    scene = worlds.front_world(worlds.Draw(200, torch.Generator().manual_seed(0)), 256, 320)
    middle = torch.tensor([160.0, 128.0, 1.0])

    def moved(sheet):
        there = scene.motion[:, sheet] @ middle
        return (there[:, :2] / there[:, 2:] - middle[:2]).norm(dim=1)

    assert moved(0).median() < 2 and moved(0).max() < 12
    assert moved(3).median() > 30 and (scene.present[:, 3]).all() and (scene.shutter > 0).float().mean() > 0.5
    assert scene.present[:, 4:].sum(1).float().mean() > 1


def test_pictures_kept_for_tests_are_never_trained_on(tmp_path):
    names = [f"{k}.jpg" for k in range(1000)] + [f"{k}.png" for k in range(1000)]
    uses = [use_of(name) for name in names]
    assert 40 < uses[:1000].count("test") < 80 and 60 < uses[1000:].count("validation") < 140
    kept = next(name for name in names if held_out(name) and name.endswith(".png"))
    other = next(name for name in names if not held_out(name) and name.endswith(".png"))
    write_image(tmp_path / kept, torch.zeros(40, 40, 3, dtype=torch.uint8).numpy())
    with pytest.raises(FleetflowError, match="kept for other uses"):
        photographs(tmp_path)
    write_image(tmp_path / other, torch.zeros(40, 40, 3, dtype=torch.uint8).numpy())
    assert photographs(tmp_path).count == 1
    assert photographs(tmp_path, use=use_of(kept)).count == 1


def test_cut_outs_bring_their_outline(tmp_path):
    """An opaque disc on nothing: its outline is a disc, its colors go on beyond it, and objects in scenes use it."""
    y, x = np.mgrid[:100, :100]
    disc = (x - 50) ** 2 + (y - 50) ** 2 < 45**2
    rgba = np.dstack([np.full((100, 100), 250), np.zeros((100, 100)), np.zeros((100, 100)), 255 * disc]).astype(
        np.uint8
    )
    rgba[~disc] = 0
    Image.fromarray(rgba).save(tmp_path / "cut.png")
    write_image(tmp_path / "b.bmp", np.full((60, 60, 3), 128, np.uint8))
    textures = photographs(tmp_path)
    assert (textures.count, len(textures.outlines)) == (1, 1)
    axis = torch.linspace(-1, 1, GRID)
    inside = (axis[:, None] ** 2 + axis**2).sqrt()
    assert (textures.outlines[0][inside < 0.75] > 0).all() and (textures.outlines[0][inside > 0.95] < 0).all()
    first = (textures.total - 1) * SIDE**2
    picture = textures.table[first : first + SIDE**2, :3].view(SIDE, SIDE, 3).float()
    assert (picture[..., 0] > 0.9).float().mean() > 0.95 and picture[..., 1:].max() < 0.05
    scene = worlds.draw_scene(20, 64, 96, torch.Generator().manual_seed(0), worlds.MIXTURE)
    dressed_scene, outlines = dressed(scene, textures, torch.Generator().manual_seed(0))
    assert (dressed_scene.shape == len(outlines) - 1).any() and dressed_scene.texture.max() == textures.total - 1


def test_textures_from_a_folder(tmp_path):
    with pytest.raises(FleetflowError, match="holds no pictures"):
        photographs(tmp_path)
    image = torch.zeros(70, 90, 3, dtype=torch.uint8)
    image[..., 1] = 200
    write_image(tmp_path / "deep" / "green.png", image.numpy())
    textures = photographs(tmp_path)
    assert textures.count == 1 and textures.plain > 0 and textures.total == 1 + textures.plain
    assert textures.table.shape == (textures.total * sum((SIDE >> k) ** 2 for k in range(5)), 4)
    torch.testing.assert_close(textures.table[0].float(), torch.tensor([0, 200 / 255, 0, 0]), rtol=0, atol=1e-3)
    assert level_start(torch.tensor([0, 1]), 1).tolist() == [0, SIDE**2]


def test_shapes_are_neither_empty_nor_outside():
    shapes = shape_bank(30)
    assert shapes.shape == (30, GRID, GRID)
    covered = (shapes > 0).float().mean((1, 2))
    assert covered[0] == 1 and (covered[1:] > 0.01).all()
    border = torch.cat((shapes[1:, 0], shapes[1:, -1], shapes[1:, :, 0], shapes[1:, :, -1]), 1)
    assert (border > 0).float().mean() < 0.02
