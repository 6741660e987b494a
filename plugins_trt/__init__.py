"""Operations that custom TensorRT plugins run, each declared once as a `PluginSpec`."""

from edgeattn.plugins_trt.co_attention import (
    CO_ATTENTION,
    CO_ATTENTION_GATED,
    CO_ATTENTION_ONE_WAY,
    CO_ATTENTION_ONE_WAY_GATED,
)
from edgeattn.plugins_trt.criss_cross import CRISS_CROSS_ATTENTION
from edgeattn.plugins_trt.pixel_attention import PIXEL_ATTENTION
from edgeattn.plugins_trt.registry import PLUGINS, spec_of
from edgeattn.plugins_trt.spec import DOMAIN, PLUGIN_VERSION, PluginSpec, TensorSpec

__all__ = [
    "CO_ATTENTION",
    "CO_ATTENTION_GATED",
    "CO_ATTENTION_ONE_WAY",
    "CO_ATTENTION_ONE_WAY_GATED",
    "CRISS_CROSS_ATTENTION",
    "DOMAIN",
    "PIXEL_ATTENTION",
    "PLUGINS",
    "PLUGIN_VERSION",
    "PluginSpec",
    "TensorSpec",
    "spec_of",
]
