"""Every module that declares blocks; importing this one fills the registry."""

from edgeattn.blocks import abn as _abn  # noqa: F401
from edgeattn.blocks import adaptive_context as _adaptive_context  # noqa: F401
from edgeattn.blocks import asymmetric_non_local as _asymmetric_non_local  # noqa: F401
from edgeattn.blocks import carafe as _carafe  # noqa: F401
from edgeattn.blocks import cgnl as _cgnl  # noqa: F401
from edgeattn.blocks import co_attention as _co_attention  # noqa: F401
from edgeattn.blocks import criss_cross as _criss_cross  # noqa: F401
from edgeattn.blocks import cross_attention as _cross_attention  # noqa: F401
from edgeattn.blocks import double_attention as _double_attention  # noqa: F401
from edgeattn.blocks import dynamic_graph as _dynamic_graph  # noqa: F401
from edgeattn.blocks import ema as _ema  # noqa: F401
from edgeattn.blocks import feature_bank as _feature_bank  # noqa: F401
from edgeattn.blocks import global_context as _global_context  # noqa: F401
from edgeattn.blocks import glore as _glore  # noqa: F401
from edgeattn.blocks import local_relation as _local_relation  # noqa: F401
from edgeattn.blocks import non_local as _non_local  # noqa: F401
from edgeattn.blocks import psa as _psa  # noqa: F401
from edgeattn.blocks import rcca as _rcca  # noqa: F401
from edgeattn.blocks import sagan as _sagan  # noqa: F401
from edgeattn.blocks import san as _san  # noqa: F401
from edgeattn.blocks import spygr as _spygr  # noqa: F401
from edgeattn.blocks import stand_alone as _stand_alone  # noqa: F401
