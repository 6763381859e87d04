"""Fused convolutions compute what the layers they replace compute."""

import pytest
import torch
from torch import nn

import fleetflow
from fleetflow.inference.fused import FusedConvolution, available, fuse

pytestmark = pytest.mark.skipif(not available(torch.float32), reason="this build of torch has no oneDNN convolutions")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups, stride, dilation, bias", [(1, 1, 1, True), (3, 1, 2, True), (1, 2, 1, False)])
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.LeakyReLU(0.3), nn.ReLU(), nn.Tanh()])
def test_equals_the_layers(dtype, groups, stride, dilation, bias, activation):
    if not available(dtype):
        pytest.skip(f"this processor has no convolutions in {dtype}")
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(6, 9, 3, stride, dilation, dilation, groups, bias), activation, nn.Conv2d(9, 4, 1), nn.BatchNorm2d(4)
    ).eval()
    fused = nn.Sequential(*layers)
    fuse(fused, dtype)
    assert [type(layer) for layer in fused].count(FusedConvolution) == 2
    with torch.inference_mode():
        for size in ((2, 6, 11, 7), (1, 6, 5, 30)):  # weights are packed for the first size, and serve the second
            x = torch.randn(size)
            wanted = layers(x)
            found = fused[2](fused[1](fused[0](x))).float()
            found = fused[3](found)
            assert (found - wanted).abs().max() < (2e-6 if dtype == torch.float32 else 0.04)


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.Sigmoid()])
def test_folds_batch_normalization(activation):
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), activation, nn.BatchNorm2d(4))
    layers.train()(torch.randn(8, 4, 9, 9) * 3 + 1)  # statistics that are not 0 and 1
    nn.init.uniform_(layers[1].weight, 0.5, 2)
    nn.init.normal_(layers[1].bias)
    fused = nn.Sequential(*layers.eval())
    fuse(fused, torch.float32)
    kinds = [type(layer) for layer in fused]
    assert kinds[:2] == [FusedConvolution, nn.Identity] and kinds[3] is nn.BatchNorm2d
    with torch.inference_mode():
        x = torch.randn(2, 4, 8, 10)
        assert (fused(x) - layers(x)).abs().max() < 2e-6


def test_leaves_alone_what_it_cannot_do():
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.ConvTranspose2d(2, 2, 2),
    )
    before = list(model)
    fuse(model, torch.float32)
    assert list(model) == before


def test_the_predictor_fuses_a_copy():
    model = fleetflow.load("fastflownet")
    predictor = fleetflow.Predictor(model, device="cpu", precision="fp32")
    assert any(isinstance(layer, FusedConvolution) for layer in predictor.model.modules())
    assert not any(isinstance(layer, FusedConvolution) for layer in model.modules())
    frames = [torch.rand(1, 3, 64, 128).to(memory_format=torch.channels_last) for _ in range(2)]
    with torch.inference_mode():
        difference = predictor.model(*frames).flow - model(*frames).flow
    assert 0 <= difference.abs().max() < 1e-4
