"""The registry against the networks that it was taken from."""

from __future__ import annotations

import json

import pytest

from fastsepconv.bench import problems
from fastsepconv.bench.problems import BACKWARD, BFLOAT16, FORWARD, NETWORKS, PREDICT, SHAPES, TRAIN, Layer, Network
from fastsepconv.bench.providers import PROVIDERS, RACERS, takes
from fastsepconv.kernels import geometry

ALL = [layer for suite in SHAPES for layer in problems.layers(suite)]
ALL += [network for name in NETWORKS for network in problems.networks(name)]


def separable_shapes(model) -> list[tuple[int, int, int]]:
    """(size, C, F) of each separable convolution of a Keras model; the image must be square."""
    import keras

    shapes = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.SeparableConv2D):
            assert layer.kernel_size == (3, 3) and layer.strides == (1, 1) and layer.padding == "same"
            _, height, width, channels = layer.input.shape
            assert height == width
            shapes.append((height, channels, layer.filters))
    return shapes


def registered(suite: str) -> list[tuple[int, int, int]]:
    return [(layer.size, layer.channels, layer.filters) for layer in SHAPES[suite] for _ in range(layer.uses)]


def test_xception_layers_are_those_of_keras_applications():
    import keras

    model = keras.applications.Xception(weights=None)
    assert sorted(registered("xception")) == sorted(separable_shapes(model))
    assert len(SHAPES["xception"]) == 10
    assert not any(layer.bias for layer in SHAPES["xception"])


def test_tutorial_layers_are_those_of_the_tutorial_network():
    import keras

    from fastsepconv.models import xception

    model = xception(separable_layer=keras.layers.SeparableConv2D)
    assert sorted(registered("tutorial")) == sorted(separable_shapes(model))
    assert sum(layer.uses for layer in SHAPES["tutorial"]) == 34
    assert sum(layer.uses for layer in SHAPES["tutorial"] if layer.size == 3) == 26


def test_names_are_unique():
    assert len({problem.name for problem in ALL}) == len(ALL)


def test_the_names_of_3x3_layers_of_stride_1_say_nothing_of_that():
    """The files in bench/results have them."""
    assert Layer("xception", 19, 728, 1024).name == "xception/19x19x728-1024/batch1/forward"
    assert [layer.shape for layer in SHAPES["depthwise"][:5]] == [
        "147x147x128", "74x74x256", "37x37x728", "19x19x728", "10x10x1536"
    ]  # fmt: skip


def test_another_geometry_is_part_of_the_name():
    layer = Layer("depthwise", 74, 256, 256, op="depthwise", taps=5, strides=2, mode=BACKWARD)
    assert layer.name == "depthwise/74x74x256,5x5,stride2/batch1/backward"
    assert Layer("xception", 19, 8, 9, dilation=2).shape == "19x19x8-9,dilation2"


@pytest.mark.parametrize("layer", SHAPES["depthwise"], ids=lambda layer: layer.shape)
def test_output_sizes_and_padding_are_those_of_the_kernels(layer):
    taps, strides, dilation = ((value,) * 2 for value in (layer.taps, layer.strides, layer.dilation))
    x_shape = (1, layer.size, layer.size, layer.channels)
    found = geometry.resolve(x_shape, (*taps, layer.channels, 1), strides, "same", dilation)
    assert (layer.output_size, layer.padding[0]) == (found.out_height, found.pad_top)
    # The last tap of the last pixel meets the last zero behind the image.
    reach = (layer.output_size - 1) * layer.strides + (layer.taps - 1) * layer.dilation
    assert reach == layer.padding[0] + layer.size + layer.padding[1] - 1


@pytest.mark.parametrize("problem", [ALL[0], ALL[-1], SHAPES["depthwise"][-1]], ids=lambda problem: problem.name)
def test_a_problem_survives_the_way_to_another_process(problem):
    assert problems.from_dict(json.loads(json.dumps(problems.to_dict(problem)))) == problem


def test_weights_rotate_at_batch_1_only():
    layers = problems.layers("xception", batches=[1, 8], modes=[FORWARD])
    assert {layer.batch for layer in layers if layer.weight_sets > 1} == {1}
    assert sum(layer.weight_sets > 1 for layer in layers) == 10
    assert not any(layer.weight_sets > 1 for layer in problems.layers("depthwise", [1]))


def test_rotated_weights_outgrow_the_caches_of_the_cores():
    for layer in problems.layers("xception", [1], [FORWARD]):
        if layer.weight_sets > 1 and layer.channels * layer.filters >= 728 * 728:
            assert layer.weight_sets * 4 * layer.channels * layer.filters > 32 << 20


def test_operations_are_counted_once_forward_and_three_times_with_the_gradients():
    layer = Layer("xception", 19, 728, 1024, batch=8)
    assert layer.flops == 2 * 8 * 19 * 19 * (9 * 728 + 728 * 1024)
    assert Layer("xception", 19, 728, 1024, batch=8, mode=BACKWARD).flops == 3 * layer.flops
    assert Layer("depthwise", 37, 8, 8, op="depthwise", taps=5, strides=2).flops == 2 * 19 * 19 * 25 * 8


def test_bytes_count_each_tensor_once_a_pass_and_dy_once_for_all_gradients():
    strided = {"batch": 2, "op": "depthwise", "strides": 2}
    x, y, kernel = 4 * 2 * 37 * 37 * 8, 4 * 2 * 19 * 19 * 8, 4 * 9 * 8
    assert Layer("depthwise", 37, 8, 8, **strided).bytes_moved == x + kernel + y
    both = Layer("depthwise", 37, 8, 8, mode=BACKWARD, **strided)
    assert both.bytes_moved == (x + kernel + y) + (x + kernel + y) + (x + kernel)
    assert Layer("depthwise", 37, 8, 8, dtype=BFLOAT16, **strided).bytes_moved == (x + kernel + y) / 2
    weights = 9 * 8 + 8 * 12 + 12
    assert Layer("tutorial", 5, 8, 12, bias=True).bytes_moved == 4 * (25 * (8 + 12) + weights)


def test_outputs_name_every_gradient():
    assert Layer("tutorial", 3, 8, 8, bias=True).outputs == ["y"]
    layer = Layer("tutorial", 3, 8, 8, bias=True, mode=BACKWARD)
    assert layer.outputs == ["y", "d_x", "d_depthwise", "d_pointwise", "d_bias"]


def test_networks_take_the_names_of_the_passes():
    assert {network.mode for network in problems.networks("xception", modes=[FORWARD])} == {PREDICT}
    assert problems.networks("tutorial", [2], [BACKWARD]) == [Network("tutorial", 2, TRAIN)]


def test_inference_runtimes_take_no_gradients():
    backward = Layer("xception", 19, 728, 728, mode=BACKWARD)
    differentiable = ["fastsepconv", "tensorflow", "torch", "fastsepconv-arrays"]
    assert [name for name in RACERS if takes(name, backward)] == differentiable
    assert "reference" in PROVIDERS and "reference" not in RACERS
