"""What stands around the solve: diagnostics, norms, dropout, and the published options."""

import argparse
import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fleetflow.deq import (
    DEQ,
    Anderson,
    DEQWrapper,
    Implicit,
    Options,
    Phantom,
    Picard,
    VariationalDropout,
    add_deq_args,
    apply_weight_norm,
    fixed_point,
    get_deq,
    held,
    jacobian_penalty,
    plot_convergence,
    remove_norm,
    reset_dropout,
    reset_weight_norm,
    spectral_norm,
    spectral_radius,
    weight_norm,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# diagnostics


def test_the_jacobian_penalty_is_the_mean_square_of_the_jacobian():
    matrix = torch.randn(6, 6, generator=seeded(), dtype=torch.float64)
    z = (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64))

    def f(z):
        return tuple((torch.cat(z, 1) @ matrix.T * torch.tensor([[1.0], [2.0], [0.0]])).split((2, 4), 1))

    penalty = jacobian_penalty(f, z, probes=4000, generator=seeded(1))
    expected = matrix.square().sum() / 6 * torch.tensor([1.0, 4.0, 0.0])
    assert torch.allclose(penalty, expected.double(), rtol=0.03)
    assert torch.equal(jacobian_penalty(f, z, generator=seeded(2)), jacobian_penalty(f, z, generator=seeded(2)))


def test_the_jacobian_penalty_calms_a_map():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, generator=seeded())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with torch.no_grad():
        layer.weight.copy_(1.5 * torch.linalg.qr(torch.randn(8, 8, generator=seeded()))[0])
    before = spectral_radius(layer, x, generator=seeded())
    for step in range(20):
        optimizer.zero_grad()
        jacobian_penalty(layer, x, generator=seeded(step)).mean().backward()
        optimizer.step()
    assert before.min() > 1.4 and spectral_radius(layer, x, generator=seeded()).max() < 0.5


@pytest.mark.parametrize("values", [[0.9, -0.5, 0.1], [-1.5, 0.9, 0.2]])
def test_the_spectral_radius(values):
    basis = torch.randn(3, 3, generator=seeded(), dtype=torch.float64)
    matrix = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.inverse()
    radius = spectral_radius(lambda z: z @ matrix.T, torch.zeros(2, 3, dtype=torch.float64), generator=seeded())
    assert torch.allclose(radius, torch.full_like(radius, max(map(abs, values))), rtol=1e-4)
    assert not radius.requires_grad


def test_the_spectral_radius_of_a_rotation_and_of_a_constant():
    """A complex pair has no eigenvector to converge to; its modulus is found nevertheless."""
    turn = 0.8 * torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    z = torch.zeros(1, 2, dtype=torch.float64)
    assert abs(spectral_radius(lambda z: z @ turn, z) - 0.8) < 1e-9
    assert spectral_radius(lambda z: torch.ones_like(z), z) < 1e-200


@pytest.mark.parametrize("measure", [jacobian_penalty, spectral_radius])
def test_inference_mode_has_no_jacobian(measure):
    with torch.no_grad():
        assert measure(lambda z: 2 * z, torch.ones(1, 3)) > 1
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        measure(lambda z: 2 * z, torch.ones(1, 3))


@pytest.mark.parametrize("options, message", [({"probes": 1.5}, "probes is 1.5"), ({"probes": 0}, "probes is 0")])
def test_a_bad_number_of_probes(options, message):
    with pytest.raises(ValueError, match=message):
        jacobian_penalty(torch.cos, torch.ones(1, 3), **options)


@pytest.mark.parametrize(
    "solutions, message",
    [
        (fixed_point(torch.cos, torch.ones(1, 1), Picard()), "solutions is Solution; it must map labels"),
        ({}, "solutions is dict; .* one or more"),
        ({"a": [1, 2]}, r"solutions\['a'\] is list; it must be a Solution"),
        ({"a": torch.zeros(4, 0)}, r"solutions\['a'\] is \[4, 0\]"),
        ({"a": torch.zeros(4)}, r"solutions\['a'\] is \[4\]"),
    ],
)
def test_a_plot_of_something_else(solutions, message):
    pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    with pytest.raises(TypeError, match=message):
        plot_convergence(solutions)


def test_the_plot(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    pyplot.switch_backend("Agg")
    solutions = {
        name: fixed_point(torch.cos, torch.rand(3, 2), solver)
        for name, solver in (("Picard", Picard()), ("Anderson", Anderson()))
    }
    axes = plot_convergence(solutions)
    axes.figure.savefig(tmp_path / "plot.png")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Picard", "Anderson"]
    assert axes.get_yscale() == "log" and len(axes.lines[0].get_xdata()) == len(solutions["Picard"].trace)
    assert plot_convergence({"again": solutions["Picard"].trace}, axes=axes) is axes
    pyplot.close("all")


def test_the_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_convergence({})


# norms and dropout


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1), nn.Flatten(), nn.Linear(48, 5))


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_norms_apply_to_a_whole_module_and_go_away_again(norm):
    plain, x = network(), torch.randn(2, 3, 4, 4, generator=seeded())
    names, reference = set(plain.state_dict()), plain(x)
    normed = norm(copy.deepcopy(plain))
    assert set(normed.state_dict()) & {"0.weight", "2.weight", "4.weight"} == set()
    with pytest.raises(ValueError, match="normalized already"):
        norm(normed)
    value = copy.deepcopy(normed)(x)
    if norm is weight_norm:
        assert torch.allclose(value, reference, atol=1e-6)
    normed(x).sum().backward()
    assert all(parameter.grad is not None for parameter in normed.parameters())
    assert remove_norm(normed) is normed and set(normed.state_dict()) == names
    assert torch.allclose(normed(x), value, atol=1e-6)
    assert {name for name, _ in normed.named_parameters()} == names, "weights are parameters again"


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_parameters_keep_their_order(norm):
    """An optimizer's state knows them by number: one saved before fits after."""
    net = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(2, 3, 1), nn.Linear(5, 2, bias=False))
    before = [(name, parameter.shape) for name, parameter in net.named_parameters()]
    remove_norm(norm(net))
    assert [(name, parameter.shape) for name, parameter in net.named_parameters()] == before


def test_weight_norm_of_a_channel_of_zeros_is_an_error():
    """It has no direction, and would become NaN."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    nn.init.zeros_(net[1].weight[2])
    with pytest.raises(ValueError, match="^layer 1 has a channel of zeros"):
        weight_norm(net)
    assert type(net[0]) is nn.Linear, "nothing has been changed"
    with torch.device("meta"):
        weight_norm(nn.Linear(3, 4))


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_shared_weights_are_not_parted(norm):
    net = nn.ModuleDict({"words": nn.Embedding(5, 4), "out": nn.Linear(4, 5), "twice": nn.Linear(4, 4)})
    net["out"].weight = net["words"].weight
    with pytest.raises(ValueError, match="^layers words, out share a weight"):
        norm(net)
    twice = nn.Sequential(net["twice"], net["twice"])
    assert len(list(norm(twice).parameters())) < 4, "one layer at two places remains one"


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_transposed_convolutions_have_their_outputs_second(norm):
    layer, x = nn.ConvTranspose2d(3, 5, 2, stride=2), torch.randn(2, 3, 4, 4, generator=seeded())
    reference, order = layer(x), [name for name, _ in layer.named_parameters()]
    normed = norm(nn.Sequential(layer))
    if norm is weight_norm:
        length = normed[0].parametrizations.weight.original0
        assert length.shape == (1, 5, 1, 1) and torch.allclose(normed(x), reference, atol=1e-6)
    else:
        matrix = normed[0].weight.detach().transpose(0, 1).flatten(1)
        assert abs(float(torch.linalg.matrix_norm(matrix, 2)) - 1) < 1e-3
    assert [name for name, _ in remove_norm(normed)[0].named_parameters()] == order
    nn.init.zeros_(layer.weight[:, 2])
    with pytest.raises(ValueError, match="channel of zeros"):
        weight_norm(normed)


def test_weight_norm_reads_the_older_names():
    plain, normed = nn.Sequential(nn.Linear(3, 4)), weight_norm(nn.Sequential(nn.Linear(3, 4)))
    direction, length = torch.randn(4, 3, generator=seeded()), torch.rand(4, 1, generator=seeded())
    normed.load_state_dict({"0.bias": plain[0].bias, "0.weight_g": length, "0.weight_v": direction})
    assert torch.allclose(normed[0].weight, length * direction / direction.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("clip", [False, True])
def test_spectral_norm_holds_the_largest_singular_value(clip):
    layer = nn.Sequential(nn.Linear(7, 9))
    with torch.no_grad():
        layer[0].weight.copy_(torch.randn(9, 7, generator=seeded()))
    free = float(torch.linalg.matrix_norm(layer[0].weight.detach(), 2))
    spectral_norm(layer, limit=0.5, clip=clip)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(3):
        norm = float(torch.linalg.matrix_norm(layer[0].weight.detach(), 2))
        assert abs(norm - 0.5) < 0.01, "follows the weight when an optimizer changes it"
        optimizer.zero_grad()
        layer(torch.randn(4, 7, generator=seeded(step))).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        layer[0].parametrizations.weight.original.copy_(torch.randn(9, 7, generator=seeded(9)))
    assert abs(float(torch.linalg.matrix_norm(layer[0].weight.detach(), 2)) - 0.5) < 0.01, "or when it is replaced"
    remove_norm(layer)
    spectral_norm(layer, limit=3 * free, clip=clip)
    assert abs(float(torch.linalg.matrix_norm(layer[0].weight.detach(), 2)) - (0.5 if clip else 3 * free)) < 0.02 * free


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_spectral_norm_follows_in_every_mode(context):
    """What it learns under autocast or in inference mode serves training in float32."""
    net, x = spectral_norm(nn.Sequential(nn.Linear(64, 64))), torch.randn(2, 64, generator=seeded())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        with context():
            net(x)
            assert abs(float(torch.linalg.matrix_norm(net[0].weight.detach().float(), 2)) - 1) < 2e-3
            assert net[0].weight.dtype == torch.float32
        assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().sum()
    loss.backward()
    assert net[0].parametrizations.weight.original.grad.isfinite().all()


def test_spectral_norm_keeps_f_one_map():
    """In training torch's own changes its estimate, and so the weight, at every evaluation."""
    torch.manual_seed(0)
    ours, torchs = (
        spectral_norm(nn.Sequential(nn.Linear(50, 50))),
        nn.utils.parametrizations.spectral_norm(nn.Linear(50, 50)),
    )
    assert torch.equal(ours[0].weight, ours[0].weight) and not torch.equal(torchs.weight, torchs.weight)


def test_held_weights_are_computed_once_and_keep_their_graph():
    layer = weight_norm(nn.Sequential(nn.Linear(6, 6)))
    calls = []
    layer[0].parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 6, generator=seeded())
    found = []
    for hold in (True, False):
        layer.zero_grad()
        calls.clear()
        rule = Implicit(Picard(), order=1)
        if hold:
            with held(layer):
                value = fixed_point(lambda z: 0.5 * torch.tanh(layer(z) + x), torch.zeros(2, 6), Picard(), rule).value
            assert len(calls) == 1
        else:
            value = fixed_point(lambda z: 0.5 * torch.tanh(layer(z) + x), torch.zeros(2, 6), Picard(), rule).value
            assert len(calls) > 5
        value.sum().backward()
        found.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert all(torch.allclose(one, other) for one, other in zip(*found))


def test_dropout_keeps_its_mask_until_it_is_reset():
    layer = VariationalDropout(0.5)
    x = torch.ones(4, 50, 3, 2)
    reset_dropout(nn.Sequential(layer), seeded(1))
    first = layer(x)
    assert torch.equal(first, layer(x)) and set(first.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(first.amin((2, 3)), first.amax((2, 3))), "whole channels"
    assert 0.35 < (first == 0).float().mean() < 0.65
    reset_dropout(layer, seeded(2))
    assert not torch.equal(first, layer(x))
    reset_dropout(layer, seeded(1))
    assert torch.equal(first, layer(x))
    with pytest.raises(ValueError, match="call reset_dropout before a solve"):
        layer(x[:2])
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="rate is 1"):
        VariationalDropout(1.0)


def test_dropout_without_a_mask_is_an_error():
    """It would drop the same channels for good, and the same ones in every layer."""
    layer, x = VariationalDropout(0.5), torch.ones(2, 50)
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="call reset_dropout before a solve"):
        layer.train()(x)


def test_a_mask_made_in_inference_mode_serves_training():
    net = nn.Sequential(nn.Linear(4, 4), VariationalDropout(0.5))
    reset_dropout(net, seeded())
    with torch.inference_mode():
        image = net(torch.ones(2, 4))
    assert torch.equal(net(torch.ones(2, 4)), image)
    net(torch.ones(2, 4)).sum().backward()


def test_dropout_leaves_a_fixed_point_to_find():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), VariationalDropout(0.3)), torch.randn(3, 8)
    reset_dropout(net, seeded())
    solution = fixed_point(lambda z: 0.5 * torch.tanh(net(z) + x), torch.zeros(3, 8), Anderson(), Implicit(Anderson()))
    solution.value.sum().backward()
    assert solution.converged.all() and net[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_module_without_weights_is_an_error(norm):
    with pytest.raises(ValueError, match="without linear or convolution layers"):
        norm(nn.ReLU())


# the published options


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1e-3)
    return add_deq_args(parser).parse_args(words)


def test_options_arrive():
    words = (
        "--f_solver anderson --f_max_iter 30 --f_tol 1e-5 --f_stop_mode rel --ift --b_solver broyden --b_max_iter 25 "
    )
    deq = get_deq(parsed(*(words + "--b_tol 1e-7 --indexing 8 16 --eval_f_max_iter 60").split()))
    assert deq.options == Options(
        f_solver="anderson",
        f_max_iter=30,
        f_tol=1e-5,
        f_stop_mode="rel",
        ift=True,
        b_solver="broyden",
        b_max_iter=25,
        b_tol=1e-7,
        indexing=(8, 16),
        eval_f_max_iter=60,
    )
    assert deq.gradient.max_steps == 25 and deq.gradient.tolerance == 1e-7 and not deq.gradient.relative
    assert get_deq(parsed()).options == get_deq().options == get_deq({}).options == Options()
    assert get_deq({"grad": [3], "tau": 0.5}).gradient == Phantom(3, 0.5)


def test_an_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parsed("--f_max_itr", "5")
    with pytest.raises(ValueError, match='no option "f_max_itr"; did you mean "f_max_iter"'):
        get_deq({"f_max_itr": 5})
    with pytest.raises(ValueError, match='no option "f_max_itr"; did you mean "f_max_iter"'):
        get_deq(argparse.Namespace(lr=0.1, f_max_itr=5))
    with pytest.raises(ValueError, match='no option "color"; known: f_solver'):
        get_deq({"color": 5})
    with pytest.raises(TypeError, match="args is 'anderson'; it must be a Namespace"):
        get_deq("anderson")


def test_the_rest_of_a_program_is_left_alone():
    """Also where its options are nearly ours."""
    names = "color max_iter solver n_steps n_stages ftol tol grads lift taus eval_max_iter gamma core num_iter state"
    assert get_deq(argparse.Namespace(**dict.fromkeys(names.split(), 0.5))).options == Options()
    for name, meant in (("f_solvr", "f_solver"), ("b_maxiter", "b_max_iter"), ("eval_f_iter", "eval_f_max_iter")):
        with pytest.raises(ValueError, match=f'no option "{name}"; did you mean "{meant}"'):
            get_deq(argparse.Namespace(**{name: 1}))


def test_options_under_the_names_of_deq_flow():
    """All of version 2, as its parser gives them."""
    given = {
        "wnorm": False, "f_solver": "broyden", "b_solver": "anderson", "f_thres": 24, "b_thres": 12, "f_eps": 1e-4,
        "b_eps": 1e-5, "f_stop_mode": "rel", "b_stop_mode": "rel", "eval_factor": 1.5, "eval_f_thres": 50,
        "indexing_core": True, "ift": False, "safe_ift": True, "n_losses": 6, "indexing": [], "phantom_grad": [3],
        "tau": 0.5, "sup_all": False, "sradius_mode": False,
    }  # fmt: skip
    expected = Options("broyden", 24, 1e-4, "rel", 1.5, 50, "anderson", 12, 1e-5, "rel", grad=(3,), tau=0.5, n_states=6)
    assert get_deq(given).options == get_deq(argparse.Namespace(lr=0.1, **given)).options == expected
    with pytest.raises(ValueError, match="f_thres and f_max_iter are both given"):
        get_deq(given | {"f_max_iter": 40})


TORCHDEQ = {  # what its parser gives for the options that `Options` does not have
    "norm_type": "weight_norm", "norm_no_scale": False, "norm_clip": False, "norm_clip_value": 1.0,
    "norm_target_norm": 1.0, "sn_n_power_iters": 1, "core": "sliced", "gamma": 0.8, "sup_gap": -1, "sup_loc": [],
    "jac_loss_weight": 0.0, "jac_loss_freq": 0.0, "jac_incremental": 0, "sradius_mode": False,
}  # fmt: skip


def test_the_defaults_of_torchdeq_are_options():
    given = vars(add_deq_args(argparse.ArgumentParser()).parse_args([])) | TORCHDEQ
    assert get_deq(given).options == get_deq(argparse.Namespace(**given)).options == Options()
    assert get_deq(given | {"core": "indexing", "n_states": 4}).options.n_states == 4


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"norm_type": "spectral_norm"},
            r"norm_type is 'spectral_norm', .*; leave it out and call spectral_norm\(module\)",
        ),
        ({"norm_no_scale": True}, "norm_no_scale is True"),
        ({"norm_clip": True}, r"norm_clip is True, .*; leave it out and call spectral_norm\(module, clip=True\)"),
        ({"norm_clip_value": 0.5}, "norm_clip_value is 0.5"),
        ({"norm_target_norm": 0.9}, "norm_target_norm is 0.9, .*limit="),
        ({"sn_n_power_iters": 3}, "sn_n_power_iters is 3"),
        ({"sup_gap": 2}, "sup_gap is 2"),
        ({"sup_loc": [3]}, r"sup_loc is \[3\]"),
        ({"jac_loss_weight": 0.5}, r"jac_loss_weight is 0.5, .*; leave it out and add jacobian_penalty\(f, z\)"),
        ({"jac_loss_freq": 0.3}, "jac_loss_freq is 0.3"),
        ({"jac_incremental": 10}, "jac_incremental is 10"),
        ({"sradius_mode": True}, r"sradius_mode is True, .*; leave it out and call spectral_radius\(f, z\)"),
        ({"sup_all": True}, "sup_all is True"),
        ({"core": "sliced", "n_states": 2}, "core is 'sliced' with several states: call fixed_point again"),
        ({"core": "sliced", "indexing": [8]}, "core is 'sliced' with several states"),
        ({"indexing_core": False, "n_losses": 2}, "indexing_core is False with several states"),
        ({"sliced_core": True, "n_losses": 2}, "sliced_core is True with several states"),
    ],
)
def test_what_is_done_elsewhere_is_said(options, message):
    for given in (options, argparse.Namespace(lr=0.1, **options)):
        with pytest.raises(ValueError, match=message):
            get_deq(given)


def test_common_names_are_ours_in_a_mapping():
    with pytest.raises(ValueError, match=r"wnorm is True, .*; leave it out and call weight_norm\(module\)"):
        get_deq({"wnorm": True})
    with pytest.raises(ValueError, match="gamma is 0.9, .*; leave it out and weigh the states"):
        get_deq({"gamma": 0.9})
    with pytest.raises(ValueError, match="core is 'own', .*; leave it out and call fixed_point"):
        get_deq({"core": "own"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"f_solver": "newton"}, "f_solver is 'newton'; it must be one of anderson"),
        ({"b_stop_mode": "both"}, "b_stop_mode is 'both'"),
        ({"grad": [1, 3]}, r"grad is \[1, 3\]"),
        ({"n_states": 0}, "n_states is 0"),
        ({"n_states": 41}, "n_states is 41"),
        ({"n_states": 2, "indexing": [4]}, "n_states and indexing"),
        ({"grad": [0]}, "grad is 0"),
        ({"grad": 0}, "grad is 0"),
        ({"grad": []}, r"grad is \[\]"),
        ({"f_max_iter": 0}, "f_max_iter is 0; it must be a whole number, 1 or more"),
        ({"f_max_iter": "40"}, "f_max_iter is '40'"),
        ({"f_max_iter": 2.5}, "f_max_iter is 2.5"),
        ({"eval_f_max_iter": -3}, "eval_f_max_iter is -3"),
        ({"b_max_iter": 0}, "b_max_iter is 0"),
        ({"f_tol": -1.0}, "f_tol is -1.0"),
        ({"b_tol": "1e-6"}, "b_tol is '1e-6'"),
        ({"indexing": [50]}, r"indexing is \(50,\); it must be whole numbers that rise within 1 to 40"),
        ({"indexing": "8"}, "indexing is '8'; it must be a tuple"),
        ({"tau": 2.0}, "tau is 2.0"),
        ({"eval_factor": 0.0}, "eval_factor is 0.0"),
        ({"eval_factor": 0.01}, "eval_factor is 0.01"),
        ({"ift": "false"}, "ift is 'false'; it must be True or False"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        get_deq(options)
    assert "\n" not in str(caught.value)


def test_a_number_may_stand_for_a_list_of_one():
    assert get_deq({"grad": 3}).gradient == Phantom(3) and get_deq({"indexing": 8}).options.indexing == (8,)


def two_equilibria():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 6), torch.randn(3, 6)

    def f(first, second):
        image = 0.8 * torch.tanh(layer(torch.cat((first, second), 1)) + x)
        return image[:, :2], image[:, 2:]

    return layer, f, (torch.zeros(3, 2), torch.zeros(3, 4))


@pytest.mark.parametrize("solver", ["anderson", "broyden", "newton_krylov", "fixed_point_iter", "naive_solver"])
@pytest.mark.parametrize("ift", [False, True])
def test_a_call_in_training_and_in_evaluation(solver, ift):
    layer, f, z0 = two_equilibria()
    deq = get_deq({"f_solver": solver, "f_tol": 1e-5, "ift": ift, "n_states": 4, "eval_factor": 1.5})
    states, info = deq(f, z0)
    assert len(states) == 4 and info.converged.all() and [part.shape for part in states[-1]] == [(3, 2), (3, 4)]
    sum(part.sum() for state in states for part in state).backward()
    assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        states, info = deq.eval()(f, z0)
    image = f(*states[-1])
    assert len(states) == 1 and all(torch.allclose(a, b, atol=2e-5) for a, b in zip(image, states[-1]))
    for mode in ("abs", "rel"):
        (state,), info = get_deq({"f_stop_mode": mode}).eval()(f, z0)
        state, image = torch.cat(state, 1), torch.cat(f(*state), 1)
        size = image.norm(dim=1) if mode == "rel" else 1
        assert torch.allclose((image - state).norm(dim=1) / size, info.residual, rtol=1e-2)
    deq = DEQ(Options(f_tol=0.0, f_max_iter=10, eval_factor=1.5))
    assert len(deq(f, z0)[1].trace) == 10 and len(deq.eval()(f, z0)[1].trace) == 15


@pytest.mark.skipif(importlib.util.find_spec("torchdeq") is None, reason="needs torchdeq, which nothing else here does")
@pytest.mark.parametrize("options", [{"ift": True}, {"grad": [3], "tau": 0.7}])
@pytest.mark.parametrize("solver", ["anderson", "broyden", "fixed_point_iter"])
def test_torchdeq_gives_the_same(solver, options):
    import torchdeq

    layer, f, z0 = two_equilibria()
    options = {"f_solver": solver, "b_solver": solver, "f_tol": 1e-6, "b_tol": 1e-7, "f_max_iter": 60, **options}
    found = []
    for deq in (get_deq(options), torchdeq.get_deq(argparse.Namespace(**vars(parsed()) | options), core="indexing")):
        layer.zero_grad()
        states, _ = deq(f, z0)
        sum(part.square().sum() for part in states[-1]).backward()
        found.append((len(states), *(part.detach() for part in states[-1]), layer.weight.grad.clone()))
    assert found[0][0] == found[1][0]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found[0][1:], found[1][1:]))


def test_a_program_written_for_deq_flow_runs():
    """Its flags, its class, its wrapper, its weight norm."""
    words = "--wnorm --f_thres 24 --f_solver anderson --f_eps 1e-5 --eval_f_thres 50 --phantom_grad 2 --n_losses 1"
    args = add_deq_args(argparse.ArgumentParser()).parse_args(words.split())
    assert args.wnorm and args.f_max_iter == 24 and args.grad == [2]
    torch.manual_seed(0)
    cell, x = nn.Linear(6, 6), torch.randn(3, 6)
    with torch.no_grad():
        cell.weight.mul_(0.5)
    expected = cell.weight.detach().clone()
    if args.wnorm:
        apply_weight_norm(cell)
    torch.testing.assert_close(reset_weight_norm(cell).weight, expected)
    kind = get_deq(args)
    deq = kind(args).eval()
    assert deq.options.eval_f_max_iter == 50

    def f(h, c):
        image = torch.tanh(cell(torch.cat((h, c), 1)) + x)
        return image[:, :4], image[:, 4:]

    wrapped = DEQWrapper(f, (torch.zeros(3, 4), torch.zeros(3, 2)))
    start = wrapped.list2vec(torch.zeros(3, 4), torch.zeros(3, 2))
    states, info = deq(wrapped, start, False, False)
    h, c = wrapped.vec2list(states[-1])
    assert h.shape == (3, 4) and c.shape == (3, 2) and info.converged.all()
    torch.testing.assert_close(torch.cat(f(h, c), 1), torch.cat((h, c), 1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="call spectral_radius"):
        deq(wrapped, start, False, True)


def test_weight_norm_leaves_out_what_is_named():
    network = nn.ModuleDict({"cell": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    apply_weight_norm(network, filter_out=["head"])
    assert parametrize.is_parametrized(network["cell"]) and not parametrize.is_parametrized(network["head"])
