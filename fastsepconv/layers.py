"""Keras's own separable and depthwise layers, computed by this package's kernels.

Each class subclasses the layer that it stands in for and replaces `call`; arguments, weights, configuration and
errors stay Keras's. It also takes over the stock class's `__name__`, because Keras spells that name in the keys of
weight files and in automatic layer names: so weight files and layer names are the same for both layers. Files written
by `model.save()` name the class in full, `fastsepconv>FastSeparableConv2D`; importing this module makes it known.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType

import keras

from . import bridge, checks

Shape = tuple[int | None, ...]


@functools.cache
def _kernels() -> ModuleType | None:
    """The bridge from Keras's backend to the kernels; None, and one warning, where there is none."""
    backend = keras.backend.backend()
    kernels = bridge.for_backend(backend)
    if kernels is None:
        warnings.warn(
            f"fastsepconv has no kernels for Keras's {backend!r} backend: its layers compute with Keras's own "
            "operations there, no faster than Keras's own layers.",
            stacklevel=2,
        )
    return kernels


def _stands_in_for(stock: type[keras.Layer]) -> Callable[[type], type]:
    """Register a layer class under its own name and let it go by the name of `stock` in weight files."""

    def decorate(cls: type) -> type:
        keras.saving.register_keras_serializable("fastsepconv")(cls)
        cls.__name__ = stock.__name__
        return cls

    return decorate


def _repr(layer: keras.Layer) -> str:
    return f"<{type(layer).__qualname__} name={layer.name}, built={layer.built}>"


@_stands_in_for(keras.layers.SeparableConv2D)
class FastSeparableConv2D(keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` on fast kernels: every argument, default, weight and error is Keras's.

    What the constructor takes, works, also where TensorFlow has no kernel for it (unequal `strides`). XLA
    (`jit_compile=True`) cannot compile a model that holds this layer; Keras then turns it off and says so.

    Args:
        order: "depthwise_pointwise", or "pointwise_depthwise" for the reading of Xception that mixes the channels
            first. Left out of `get_config()` at its default. Every other argument is described in Keras's class.

    Input shape: `[N, H, W, C]`, or `[N, C, H, W]` with `data_format="channels_first"`.

    Output shape and weights, with M = `depth_multiplier`, F = `filters`, (R, S) = `kernel_size`:
        - "depthwise_pointwise": `[N, P, Q, F]`; depthwise_kernel `[R, S, C, M]`, pointwise_kernel `[1, 1, C*M, F]`,
          bias `[F]`, in that order in `get_weights()`.
        - "pointwise_depthwise": `[N, P, Q, F*M]`; pointwise_kernel `[1, 1, C, F]`, depthwise_kernel `[R, S, F, M]`,
          bias `[F*M]`, in that order: that of a `Conv2D` followed by a `DepthwiseConv2D`.

    Raises:
        ValueError: what Keras raises, and an unknown `order`.
    """

    order = "depthwise_pointwise"

    def __init__(
        self,
        filters,
        kernel_size,
        strides=(1, 1),
        padding="valid",
        data_format=None,
        dilation_rate=(1, 1),
        depth_multiplier=1,
        activation=None,
        use_bias=True,
        depthwise_initializer="glorot_uniform",
        pointwise_initializer="glorot_uniform",
        bias_initializer="zeros",
        depthwise_regularizer=None,
        pointwise_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        depthwise_constraint=None,
        pointwise_constraint=None,
        bias_constraint=None,
        *,
        order="depthwise_pointwise",
        **kwargs,
    ):
        super().__init__(
            filters=filters,
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            depth_multiplier=depth_multiplier,
            activation=activation,
            use_bias=use_bias,
            depthwise_initializer=depthwise_initializer,
            pointwise_initializer=pointwise_initializer,
            bias_initializer=bias_initializer,
            depthwise_regularizer=depthwise_regularizer,
            pointwise_regularizer=pointwise_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            depthwise_constraint=depthwise_constraint,
            pointwise_constraint=pointwise_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        self.order = checks.order(order)
        self.supports_jit = keras.backend.backend() != "tensorflow"

    def build(self, input_shape):
        """Create the weights for inputs of `input_shape`; raises ValueError where the output would be empty."""
        if not isinstance(self, FastSeparableConv2D) or self.order == "depthwise_pointwise":
            # `revert` leaves this method with a layer that was not built before: hence no super() either.
            keras.layers.SeparableConv2D.build(self, input_shape)
            return
        axis = self._channel_axis
        channels = input_shape[axis]
        self.input_spec = keras.InputSpec(min_ndim=self.rank + 2, axes={axis: channels})
        bias_shape = (self.compute_output_shape(input_shape)[axis],)
        depthwise_shape = (*self.kernel_size, self.filters, self.depth_multiplier)
        self.pointwise_kernel = self._add("pointwise", "pointwise_kernel", (1, 1, channels, self.filters))
        self.depthwise_kernel = self._add("depthwise", "depthwise_kernel", depthwise_shape)
        self.bias = self._add("bias", "bias", bias_shape) if self.use_bias else None

    def _add(self, role: str, name: str, shape: Shape) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=shape,
            dtype=self.dtype,
            initializer=getattr(self, f"{role}_initializer"),
            regularizer=getattr(self, f"{role}_regularizer"),
            constraint=getattr(self, f"{role}_constraint"),
        )

    @property
    def _channel_axis(self) -> int:
        return -1 if self.data_format == "channels_last" else 1

    def call(self, inputs):
        """`[N, H, W, C]` to `[N, P, Q, F]` (or F*M, see `order`), activation included."""
        kernels = _kernels()
        if kernels is None:
            return self.stock_call(inputs)
        outputs = kernels.separable_conv2d(
            inputs,
            self.depthwise_kernel,
            self.pointwise_kernel,
            self.bias,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
            order=self.order,
        )
        return outputs if self.activation is None else self.activation(outputs)

    def stock_call(self, inputs):
        """The same result by Keras's own operations: what `verify` compares `call` with."""
        if self.order == "depthwise_pointwise":
            return keras.layers.SeparableConv2D.call(self, inputs)
        outputs = keras.ops.depthwise_conv(
            keras.ops.conv(inputs, self.pointwise_kernel, data_format=self.data_format),
            self.depthwise_kernel,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
        if self.bias is not None:
            bias_shape = [1] * (self.rank + 2)
            bias_shape[self._channel_axis] = -1
            outputs += keras.ops.reshape(self.bias, bias_shape)
        return outputs if self.activation is None else self.activation(outputs)

    def compute_output_shape(self, input_shape):
        """The shape of the output for inputs of `input_shape`; raises ValueError where it would be empty."""
        shape = list(super().compute_output_shape(input_shape))
        if self.order == "pointwise_depthwise":
            shape[self._channel_axis] *= self.depth_multiplier
        return tuple(shape)

    def get_config(self):
        """Keras's configuration; `order` is in it only where it is not the default."""
        config = super().get_config()
        return config if self.order == "depthwise_pointwise" else {**config, "order": self.order}

    __repr__ = _repr


@_stands_in_for(keras.layers.DepthwiseConv2D)
class FastDepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` on fast kernels: every argument, default, weight and error is Keras's.

    What the constructor takes, works, also where TensorFlow has no kernel for it (unequal `strides`). XLA
    (`jit_compile=True`) cannot compile a model that holds this layer; Keras then turns it off and says so.

    Input shape: `[N, H, W, C]`, or `[N, C, H, W]` with `data_format="channels_first"`.
    Output shape: `[N, P, Q, C*M]`; weights kernel `[R, S, C, M]` and bias `[C*M]`.
    """

    def __init__(
        self,
        kernel_size,
        strides=(1, 1),
        padding="valid",
        depth_multiplier=1,
        data_format=None,
        dilation_rate=(1, 1),
        activation=None,
        use_bias=True,
        depthwise_initializer="glorot_uniform",
        bias_initializer="zeros",
        depthwise_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        depthwise_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            depth_multiplier=depth_multiplier,
            data_format=data_format,
            dilation_rate=dilation_rate,
            activation=activation,
            use_bias=use_bias,
            depthwise_initializer=depthwise_initializer,
            bias_initializer=bias_initializer,
            depthwise_regularizer=depthwise_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            depthwise_constraint=depthwise_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        self.supports_jit = keras.backend.backend() != "tensorflow"

    def call(self, inputs):
        """`[N, H, W, C]` to `[N, P, Q, C*M]`, activation included."""
        kernels = _kernels()
        if kernels is None:
            return self.stock_call(inputs)
        outputs = kernels.depthwise_conv2d(
            inputs,
            self.kernel,
            self.bias,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
        return outputs if self.activation is None else self.activation(outputs)

    def stock_call(self, inputs):
        """The same result by Keras's own operations: what `verify` compares `call` with."""
        return keras.layers.DepthwiseConv2D.call(self, inputs)

    __repr__ = _repr
