"""The version, as a literal: the package also runs from its folder, uninstalled."""

__version__ = "0.1.0.dev0"
