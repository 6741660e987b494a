"""What every floor of the package may import: errors, atomic files, registries."""

from edgeattn.foundation.errors import UserError
from edgeattn.foundation.files import atomic_path, remove_leftovers, sha256_of, write_text
from edgeattn.foundation.registry import Registry

__version__ = "0.1.0"

__all__ = ["Registry", "UserError", "__version__", "atomic_path", "remove_leftovers", "sha256_of", "write_text"]
