"""Declarations of the deployment targets."""

from edgeattn.targets.spec import TARGETS, Target

_JETPACK = "NVIDIA's Jetson package manifests"

for _name, _summary, _tensorrt, _cuda, _sm, _source in (
    ("jetpack-6.2-orin", "Jetson Orin with JetPack 6.1 or 6.2", (10, 3), (12, 6), 87, _JETPACK),
    ("jetpack-7.1-thor", "Jetson Thor with JetPack 7.0 or 7.1", (10, 13), (13, 0), 110, _JETPACK),
    ("jetpack-7.2-orin", "Jetson Orin with JetPack 7.2", (10, 16), (13, 2), 87, _JETPACK),
    ("jetpack-7.2-thor", "Jetson Thor with JetPack 7.2", (10, 16), (13, 2), 110, _JETPACK),
):
    TARGETS.add(Target(_name, _summary, _tensorrt, _cuda, _sm, opset=18, source=_source))
