"""The array API: depthwise, pointwise and separable convolution of arrays, and their gradients.

Letters: N batch, H W input, P Q output, C channels, M depth multiplier, F filters, R S taps.

What holds for every function here:

- Arrays are anything that `numpy.asarray` takes, of dtype float16, bfloat16 (of `ml_dtypes`), float32 or float64, in
  any memory order and byte order. Half types are computed in float32; where a CPU multiplies bfloat16 by itself, it
  does so forward, and what lies between two steps is rounded to it, as between two of Keras's layers. Integers are
  refused with a TypeError, since neither Keras nor a rounding of the result would make sense of them: convert them with
  `x.astype("float32")`.
- Arrays of unlike dtypes are promoted as NumPy does (float16 with bfloat16 to float32). A gradient has the shape and
  the dtype of what it is the gradient of; `d_bias` has the promoted dtype.
- Images are `[N,H,W,C]`, or `[N,C,H,W]` with `data_format="channels_first"`. N may be 0, no other
  size.
- Arrays on an NVIDIA card are anything with `__cuda_array_interface__` or DLPack: all of a call's on one card, of one
  dtype, contiguous and channels-last in memory. They are computed there, with no copy, on the stream of the caller; the
  results are arrays of the same library on the same card, and nothing has been waited for when a function returns.
  NumPy arrays go to a card only under backend="cuda": they are copied there, and the results back.
- NaN and infinities pass through, without warnings. No argument is ever changed.
- An argument that cannot be used raises a ValueError, or a TypeError where its type or dtype is at fault, that says
  `Invalid value for argument ...`. So does a kernel that is larger than the padded image, which would leave no output.
"""

from __future__ import annotations

import numpy as np

from . import activations, checks, device_arrays, dispatch, layout, operations


def separable_conv2d(
    x,
    depthwise_kernel,
    pointwise_kernel,
    bias=None,
    *,
    strides=1,
    padding="valid",
    dilation_rate=1,
    data_format="channels_last",
    order="depthwise_pointwise",
    activation=None,
    backend=None,
    out=None,
) -> np.ndarray:
    """Depthwise convolution followed by pointwise convolution: what `keras.layers.SeparableConv2D` computes.

        mid[n,p,q,c*M+m] = sum over r, s of x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c]
                                            * depthwise_kernel[r,s,c,m]
        y[n,p,q,f]       = activation(bias[f] + sum over k of mid[n,p,q,k] * pointwise_kernel[k,f])

    Args:
        x: `[N,H,W,C]`, or `[N,C,H,W]`.
        depthwise_kernel: `[R,S,C,M]`.
        pointwise_kernel: `[1,1,C*M,F]` or `[C*M,F]`.
        bias: `[F]`, or None.
        strides: a positive integer, or one for each axis (height, width); they may differ.
        padding: "valid" (none), "same" (as TensorFlow pads: the output is `ceil(H/stride)`, an odd zero goes last), or
            explicit zeros `((top, bottom), (left, right))`.
        dilation_rate: the distance between taps, one integer or one for each axis; goes together with strides.
        data_format: "channels_last" or "channels_first", for x and the output.
        order: "depthwise_pointwise", or "pointwise_depthwise" for the pointwise step first: pointwise_kernel is then
            `[1,1,C,F]`, depthwise_kernel `[R,S,F,M]`, bias `[F*M]`, and the output has F*M channels.
        activation: None, the name of an element-wise activation of Keras ("relu", "gelu", ...), or a function that
            is given the output (float32 for half types) in `data_format` and returns an array of the same shape.
        backend: "auto", "cpu", "cuda" or "reference", for this call; None for what `set_backend` chose.
        out: an array of the result's shape and dtype to write to. It may overlap the inputs, but for arrays on a card.

    Returns:
        `[N,P,Q,F]`, or `[N,F,P,Q]`: `out` where that is given, else a new C-contiguous array.

    Raises:
        ValueError, TypeError: an argument cannot be used; the message names it.

    Example:
        >>> x = np.ones((1, 5, 5, 2), "float32")
        >>> depthwise_kernel = np.ones((3, 3, 2, 1), "float32")
        >>> pointwise_kernel = np.ones((1, 1, 2, 4), "float32")
        >>> y = fastsepconv.separable_conv2d(x, depthwise_kernel, pointwise_kernel, padding="same", activation="relu6")
        >>> y.shape, float(y.max())
        ((1, 5, 5, 4), 6.0)
    """
    arrays = layout.receive(
        data_format, x=x, depthwise_kernel=depthwise_kernel, pointwise_kernel=pointwise_kernel, bias=bias
    )
    operation = operations.separable(arrays, strides, padding, dilation_rate, order)
    return _forward(operation, arrays, data_format, activation, backend, out)


def separable_conv2d_grad(
    x,
    depthwise_kernel,
    pointwise_kernel,
    dy,
    *,
    strides=1,
    padding="valid",
    dilation_rate=1,
    data_format="channels_last",
    order="depthwise_pointwise",
    backend=None,
) -> tuple[np.ndarray, ...]:
    """The gradients of `separable_conv2d` for the gradient `dy` of its output before the activation.

    Args:
        dy: `[N,P,Q,F]`, or `[N,F,P,Q]`: how some number changes with each value of
            `separable_conv2d(x, depthwise_kernel, pointwise_kernel, bias)`. After an activation, multiply by its
            derivative first.
        x, depthwise_kernel, pointwise_kernel, and the others: as in `separable_conv2d`.

    Returns:
        `(dx, d_depthwise, d_pointwise, d_bias)`, shaped as x, depthwise_kernel, pointwise_kernel and `[F]`
        (`[F*M]` with order="pointwise_depthwise").

    Raises:
        ValueError, TypeError: an argument cannot be used; the message names it.

    Example:
        >>> x, dy = np.ones((1, 5, 5, 2)), np.ones((1, 5, 5, 4))
        >>> dx, d_depthwise, d_pointwise, d_bias = fastsepconv.separable_conv2d_grad(
        ...     x, np.ones((3, 3, 2, 1)), np.ones((2, 4)), dy, padding="same"
        ... )
        >>> dx.shape, d_depthwise.shape, d_pointwise.shape, d_bias.shape
        ((1, 5, 5, 2), (3, 3, 2, 1), (2, 4), (4,))
    """
    arrays = layout.receive(
        data_format, x=x, depthwise_kernel=depthwise_kernel, pointwise_kernel=pointwise_kernel, dy=dy
    )
    operation = operations.separable(arrays, strides, padding, dilation_rate, order)
    return _backward(operation, arrays, data_format, backend)


def depthwise_conv2d(
    x,
    depthwise_kernel,
    bias=None,
    *,
    strides=1,
    padding="valid",
    dilation_rate=1,
    data_format="channels_last",
    activation=None,
    backend=None,
    out=None,
) -> np.ndarray:
    """Convolution of every channel with kernels of its own: what `keras.layers.DepthwiseConv2D` computes.

        y[n,p,q,c*M+m] = activation(bias[c*M+m]
            + sum over r, s of x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c] * depthwise_kernel[r,s,c,m])

    Args:
        x: `[N,H,W,C]`, or `[N,C,H,W]`.
        depthwise_kernel: `[R,S,C,M]`.
        bias: `[C*M]`, or None.
        strides, padding, dilation_rate, data_format, activation, backend, out: as in `separable_conv2d`.

    Returns:
        `[N,P,Q,C*M]`, or `[N,C*M,P,Q]`.

    Raises:
        ValueError, TypeError: an argument cannot be used; the message names it.

    Example:
        >>> y = fastsepconv.depthwise_conv2d(np.ones((1, 5, 5, 2)), np.ones((3, 3, 2, 1)), strides=(2, 1))
        >>> y.shape, float(y[0, 0, 0, 0])
        ((1, 2, 3, 2), 9.0)
    """
    arrays = layout.receive(data_format, x=x, depthwise_kernel=depthwise_kernel, bias=bias)
    operation = operations.depthwise(arrays, strides, padding, dilation_rate)
    return _forward(operation, arrays, data_format, activation, backend, out)


def depthwise_conv2d_grad(
    x,
    depthwise_kernel,
    dy,
    *,
    strides=1,
    padding="valid",
    dilation_rate=1,
    data_format="channels_last",
    backend=None,
) -> tuple[np.ndarray, ...]:
    """The gradients of `depthwise_conv2d` for the gradient `dy` of its output before the activation.

    Args:
        dy: `[N,P,Q,C*M]`, or `[N,C*M,P,Q]`.
        x, depthwise_kernel, and the others: as in `depthwise_conv2d`.

    Returns:
        `(dx, d_depthwise, d_bias)`, shaped as x, depthwise_kernel and `[C*M]`.

    Raises:
        ValueError, TypeError: an argument cannot be used; the message names it.
    """
    arrays = layout.receive(data_format, x=x, depthwise_kernel=depthwise_kernel, dy=dy)
    operation = operations.depthwise(arrays, strides, padding, dilation_rate)
    return _backward(operation, arrays, data_format, backend)


def pointwise_conv2d(
    x,
    pointwise_kernel,
    bias=None,
    *,
    activation=None,
    data_format="channels_last",
    backend=None,
    out=None,
) -> np.ndarray:
    """1x1 convolution, a matrix product over the channels: what `keras.layers.Conv2D(F, 1)` computes.

        y[n,h,w,f] = activation(bias[f] + sum over c of x[n,h,w,c] * pointwise_kernel[c,f])

    Args:
        x: `[N,H,W,C]`, or `[N,C,H,W]`.
        pointwise_kernel: `[1,1,C,F]` or `[C,F]`.
        bias: `[F]`, or None.
        activation, data_format, backend, out: as in `separable_conv2d`.

    Returns:
        `[N,H,W,F]`, or `[N,F,H,W]`.

    Raises:
        ValueError, TypeError: an argument cannot be used; the message names it.

    Example:
        >>> fastsepconv.pointwise_conv2d(np.ones((1, 1, 2, 3)), np.ones((3, 2)), np.array([0.0, 0.5]))
        array([[[[3. , 3.5],
                 [3. , 3.5]]]])
    """
    arrays = layout.receive(data_format, x=x, pointwise_kernel=pointwise_kernel, bias=bias)
    return _forward(operations.pointwise(arrays), arrays, data_format, activation, backend, out)


def pointwise_conv2d_grad(
    x, pointwise_kernel, dy, *, data_format="channels_last", backend=None
) -> tuple[np.ndarray, ...]:
    """The gradients of `pointwise_conv2d` for the gradient `dy` of its output before the activation.

    Args:
        dy: `[N,H,W,F]`, or `[N,F,H,W]`.
        x, pointwise_kernel, data_format, backend: as in `pointwise_conv2d`.

    Returns:
        `(dx, d_pointwise, d_bias)`, shaped as x, pointwise_kernel and `[F]`.

    Raises:
        ValueError, TypeError: an argument cannot be used; the message names it.
    """
    arrays = layout.receive(data_format, x=x, pointwise_kernel=pointwise_kernel, dy=dy)
    return _backward(operations.pointwise(arrays), arrays, data_format, backend)


def _forward(operation, arrays, data_format, activation, backend, out) -> np.ndarray:
    if not isinstance(arrays["x"], np.ndarray):
        return _forward_on_card(operation, arrays, data_format, activation, backend, out)
    kernels = dispatch.kernels(backend)
    clamp, function = activations.get(activation)
    shape, dtype = operation.output_shape, layout.common_dtype(arrays.values())
    if "bias" in arrays:
        checks.shape("bias", arrays["bias"], shape[-1:], "one value for each of the output's channels")
    if out is not None:
        checks.output(out, layout.shape_in(data_format, shape), dtype)
    working = layout.working_dtype(dtype, kernels.FORWARD_HALVES if function is None else ())
    arrays = layout.for_kernels(arrays, working)
    room = None if out is None else layout.room_in(out, data_format, working, arrays.values())
    y = layout.empty(shape, working) if room is None else room
    operation.forward(kernels, arrays, y, clamp)
    if room is not None and function is None:
        return out
    result = layout.from_channels_last(y, data_format)
    return layout.deliver(result if function is None else function(result), out, dtype)


def _backward(operation, arrays, data_format, backend) -> tuple[np.ndarray, ...]:
    if not isinstance(arrays["x"], np.ndarray):
        return _backward_on_card(operation, arrays, data_format, backend)
    kernels = dispatch.kernels(backend)
    shape, dtype = operation.output_shape, layout.common_dtype(arrays.values())
    dy = layout.from_channels_last(arrays["dy"], data_format)
    checks.shape("dy", dy, layout.shape_in(data_format, shape), "the output's shape")
    dtypes = {name: array.dtype.newbyteorder("=") for name, array in arrays.items() if name != "dy"} | {"bias": dtype}
    working = layout.working_dtype(dtype)
    arrays = layout.for_kernels(arrays, working)
    shapes = {name: array.shape for name, array in arrays.items() if name != "dy"} | {"bias": shape[-1:]}
    gradients = {name: layout.empty(wanted, working) for name, wanted in shapes.items()}
    operation.backward(kernels, arrays, gradients)
    gradients["x"] = layout.from_channels_last(gradients["x"], data_format)
    return tuple(layout.deliver(gradient, None, dtypes[name]) for name, gradient in gradients.items())


def _forward_on_card(operation, arrays, data_format, activation, backend, out):
    kernels = dispatch.kernels_on_card(backend)
    clamp, function = activations.get(activation)
    if callable(activation) and out is not None:
        expected = "None or a name, or without `out` a function of an array on a card"
        raise checks.invalid("activation", expected, activation)
    x, shape = arrays["x"], operation.output_shape
    if "bias" in arrays:
        checks.shape("bias", arrays["bias"], shape[-1:], "one value for each of the output's channels")
    arrays = device_arrays.for_kernels(arrays)
    y = device_arrays.new(x, shape) if out is None else device_arrays.output(out, data_format, shape, arrays)
    named = function is not None and not callable(activation)
    before = operations.between(x, shape) if named and layout.is_half(x.dtype) else y
    operation.forward(kernels, arrays, before, clamp)
    if named:
        device_arrays.activate(activation, before, y)
    result = device_arrays.deliver(y, data_format) if out is None else out
    return result if named or function is None else activation(result)


def _backward_on_card(operation, arrays, data_format, backend):
    kernels = dispatch.kernels_on_card(backend)
    x, shape = arrays["x"], operation.output_shape
    dy = layout.from_channels_last(arrays["dy"], data_format)
    checks.shape("dy", dy, layout.shape_in(data_format, shape), "the output's shape")
    arrays = device_arrays.for_kernels(arrays)
    shapes = {name: array.shape for name, array in arrays.items() if name != "dy"} | {"bias": shape[-1:]}
    gradients = {name: device_arrays.new(x, wanted) for name, wanted in shapes.items()}
    operation.backward(kernels, arrays, gradients)
    dx = device_arrays.deliver(gradients.pop("x"), data_format)
    return (dx, *(gradient.owner for gradient in gradients.values()))
