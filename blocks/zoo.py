"""Every module that declares blocks; importing this one fills the registry."""

from edgeattn.blocks import abn as _abn  # noqa: F401
from edgeattn.blocks import co_attention as _co_attention  # noqa: F401
from edgeattn.blocks import criss_cross as _criss_cross  # noqa: F401
from edgeattn.blocks import rcca as _rcca  # noqa: F401
