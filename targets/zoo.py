"""Declarations of the deployment targets."""

from edgeattn.targets.spec import TARGETS, Target

_JETPACK = "NVIDIA's Jetson package manifests"
_RELEASES = "TensorRT release notes"

for _name, _summary, _tensorrt, _cuda, _sm, _source in (
    ("jetpack-6.2-orin", "Jetson Orin with JetPack 6.1 or 6.2", (10, 3), (12, 6), 87, _JETPACK),
    ("jetpack-7.1-thor", "Jetson Thor with JetPack 7.0 or 7.1", (10, 13), (13, 0), 110, _JETPACK),
    ("jetpack-7.2-orin", "Jetson Orin with JetPack 7.2", (10, 16), (13, 2), 87, _JETPACK),
    ("jetpack-7.2-thor", "Jetson Thor with JetPack 7.2", (10, 16), (13, 2), 110, _JETPACK),
    ("desktop-ampere-trt-10.16", "discrete Ampere GPU with TensorRT 10.16", (10, 16), (13, 0), 86, _RELEASES),
    ("desktop-ada-trt-10.16", "discrete Ada GPU with TensorRT 10.16", (10, 16), (13, 0), 89, _RELEASES),
    ("datacentre-hopper-trt-11.4", "Hopper GPU with TensorRT 11.4", (11, 4), (13, 0), 90, _RELEASES),
):
    TARGETS.add(Target(_name, _summary, _tensorrt, _cuda, _sm, opset=18, source=_source))
