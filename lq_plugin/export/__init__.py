"""Out of training: files that are really as small as the bits say."""

from lq_plugin.export.packed import load_packed, save_packed

__all__ = ["load_packed", "save_packed"]
